package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// atOnce has each client make one call at the same moment, and returns the answers in their order.
func atOnce(clients []sutrav1.GridMasterClient, call func(i int, c sutrav1.GridMasterClient) (*sutrav1.SpawnNodeResponse, error)) (nodes []*sutrav1.Node, errs []error) {
	nodes, errs = make([]*sutrav1.Node, len(clients)), make([]error, len(clients))
	gate := make(chan struct{})
	var callers sync.WaitGroup
	for i, c := range clients {
		callers.Go(func() {
			<-gate
			resp, err := call(i, c)
			nodes[i], errs[i] = resp.GetNode(), err
		})
	}
	close(gate)
	callers.Wait()
	return nodes, errs
}

// Of clients that want the same port or the same place at once, one gets it and the others learn who has it.
func TestRaceForPortAndPath(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", manyProfiles)
	clients := make([]sutrav1.GridMasterClient, 3)
	for i := range clients {
		clients[i] = caller(t, g)
	}
	for round := range 3 * rounds(t) {
		port, place := uint32(g.FreePort()), filepath.Join(g.Dir, "place")
		for _, race := range []struct {
			name   string
			reason rpc.Reason
			want   func(i int) *sutrav1.SpawnNodeRequest
		}{
			{"port", rpc.PortInUse, func(int) *sutrav1.SpawnNodeRequest {
				return &sutrav1.SpawnNodeRequest{Profile: "sleep", Port: port}
			}},
			{"path", rpc.PathInUse, func(i int) *sutrav1.SpawnNodeRequest {
				// The same, spelt otherwise, and a place within it.
				return &sutrav1.SpawnNodeRequest{Profile: "sleep", StoragePath: place + []string{"", "/", "/within"}[i]}
			}},
		} {
			nodes, errs := atOnce(clients, func(i int, c sutrav1.GridMasterClient) (*sutrav1.SpawnNodeResponse, error) {
				return c.SpawnNode(t.Context(), race.want(i))
			})
			var winner *sutrav1.Node
			for _, n := range nodes {
				if n != nil && winner != nil {
					t.Fatalf("round %d: two got the %s: %v and %v", round, race.name, winner, n)
				}
				if n != nil {
					winner = n
				}
			}
			if winner == nil {
				t.Fatalf("round %d: nobody got the %s: %v", round, race.name, errs)
			}
			for i, err := range errs {
				if nodes[i] != nil {
					continue
				}
				e := rpc.AsError(err)
				if e.Reason != race.reason || e.Meta["node_id"] != winner.GetNodeId() || !strings.Contains(e.Error(), winner.GetNodeId()) {
					t.Errorf("round %d: the %s belongs to %s, and another was told: %v %v", round, race.name, winner.GetNodeId(), err, e.Meta)
				}
			}
			if all := g.Nodes(false); len(all) != 1 {
				t.Fatalf("round %d: nodes after the race for a %s: %v", round, race.name, all)
			}
			stopAll(t, g, []string{winner.GetNodeId()})
		}
	}
	if left := awaitAgreement(t, g); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// One wish that many clients bring forward at once is granted once, and is whose it is.
func TestRaceWithOneRequestID(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", manyProfiles)
	clients := make([]sutrav1.GridMasterClient, 20)
	for i := range clients {
		clients[i] = caller(t, g)
	}
	for _, profile := range []string{"sleep", "default"} {
		nodes, errs := atOnce(clients, func(_ int, c sutrav1.GridMasterClient) (*sutrav1.SpawnNodeResponse, error) {
			return c.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: profile, RequestId: "wish-" + profile})
		})
		for i, n := range nodes {
			if errs[i] != nil || n.GetNodeId() != nodes[0].GetNodeId() || n.GetPid() != nodes[0].GetPid() || n.GetPhase() != running {
				t.Errorf("client %d got %v, %v; client 0 got %v", i, n, errs[i], nodes[0])
			}
		}
	}
	ids := awaitAgreement(t, g)
	if len(ids) != 2 {
		t.Errorf("two wishes gave %v", ids)
	}
	_, err := clients[0].SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: "default", RequestId: "wish-sleep"})
	if e := rpc.AsError(err); rpc.ReasonOf(err) != rpc.InvalidArgument || !strings.Contains(e.Error(), "wish-sleep") {
		t.Errorf("another wish under the same id: %v", err)
	}
	stopAll(t, g, ids)
	_, err = clients[0].SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: "sleep", RequestId: "wish-sleep"})
	if rpc.ReasonOf(err) != rpc.StoppedMeanwhile {
		t.Errorf("a wish whose node was stopped since, again: %v", err)
	}
}

// A node that is stopped while it starts is gone, and its spawn says so.
func TestStopWhileStarting(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", manyProfiles+`
[storage.profiles.slow]
storage_binary = "/bin/sleep"
args = ["100000"]
ready = "exec:test -e $HOME/ready"
`)
	outcome := make(chan error, 1)
	go func() {
		_, err := g.Client().SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: "slow", RequestId: "wish"})
		outcome <- err
	}()
	var node *sutrav1.Node
	harness.Await(t, "the node to have a process", func() error {
		for _, n := range g.Nodes(false) {
			if node = n; n.GetPid() != 0 && n.GetPhase() == sutrav1.Phase_PHASE_STARTING {
				return nil
			}
		}
		return errors.New("there is none")
	})
	resp, err := g.Client().StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: node.GetNodeId()})
	if err != nil || resp.GetNode().GetPhase() != stopped {
		t.Errorf("stop of a starting node: %v, %v", resp, err)
	}
	if err := <-outcome; rpc.ReasonOf(err) != rpc.StoppedMeanwhile || rpc.AsError(err).Meta["node_id"] != node.GetNodeId() {
		t.Errorf("the spawn of the stopped node: %v", err)
	}
	if left := g.NodeProcesses(); len(left) > 0 {
		t.Errorf("stopped, and left %v", left)
	}
	if left := awaitAgreement(t, g); len(left) > 0 {
		t.Errorf("stopped and still there: %v", left)
	}
}

// Eight clients spawn and stop on one agent while node processes are killed; in the end all is as they want it.
func TestStorm(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", manyProfiles)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var killer sync.WaitGroup
	observer, kills := caller(t, g), 0
	killer.Go(func() {
		for ctx.Err() == nil {
			resp, err := observer.ListNodes(ctx, &sutrav1.ListNodesRequest{})
			if err != nil {
				continue // the storm is over
			}
			for _, n := range resp.GetNodes() {
				// One that has ended meanwhile can't be struck any more.
				if rand.N(4) == 0 && n.GetPid() != 0 && strike(g, n) == nil {
					kills++
				}
			}
		}
	})

	var mu sync.Mutex // guards wanted and count
	wanted := map[string]bool{}
	count := 0
	var group errgroup.Group
	for c := range 8 {
		client := caller(t, g)
		group.Go(func() error {
			var mine []string
			for i := range 4 * rounds(t) {
				if len(mine) > 3 || i%3 == 2 {
					resp, err := client.StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: mine[0]})
					if err != nil || resp.GetNode().GetPhase() != stopped {
						return fmt.Errorf("stop: %v, %w", resp, err)
					}
					mine = mine[1:]
					continue
				}
				req := &sutrav1.SpawnNodeRequest{RequestId: fmt.Sprintf("c%d-%d", c, i), Profile: "sleep"}
				if i%8 == 0 {
					req.Profile = ""
				}
				n, err := insistSpawn(t.Context(), client, req)
				if rpc.ReasonOf(err) == rpc.NodeDiedEarly {
					continue // killed before it was ready: undone
				}
				if err != nil {
					return err
				}
				mine = append(mine, n.GetNodeId())
				mu.Lock()
				count++
				mu.Unlock()
			}
			mu.Lock()
			defer mu.Unlock()
			for _, id := range mine {
				wanted[id] = true
			}
			return nil
		})
	}
	err := group.Wait()
	cancel()
	killer.Wait()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d nodes were spawned, %d processes killed", count, kills)
	if kills == 0 {
		t.Error("no process was killed")
	}
	ids := awaitAgreement(t, g)
	if len(ids) != len(wanted) {
		t.Errorf("%d nodes are wanted, %d run", len(wanted), len(ids))
	}
	for _, id := range ids {
		if !wanted[id] {
			t.Errorf("node %s runs, and nobody wants it", id)
		}
	}
	stopAll(t, g, ids)
	if left := awaitAgreement(t, g); len(left) > 0 {
		t.Errorf("stopped and still there: %v", left)
	}
}
