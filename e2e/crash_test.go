package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// manyProfiles is the [storage] section of an agent that runs many cheap nodes and beats often.
const manyProfiles = `
max_nodes = 400
default_memory_mb = 64
[storage.profiles.sleep]
storage_binary = "/bin/sleep"
args = ["100000"]
ready = "none"
[storage.profiles.bare] # it drops its environment, as redis does
storage_binary = "/usr/bin/env"
args = ["-i", "/bin/sleep", "100000"]
ready = "none"
[monitoring]
heartbeat_interval_secs = 1
`

// rounds is how often a fault is repeated: 10 times, or SUTRA_SOAK_ROUNDS times.
func rounds(t *testing.T) int {
	t.Helper()
	said := os.Getenv("SUTRA_SOAK_ROUNDS")
	if said == "" {
		return 10
	}
	n, err := strconv.Atoi(said)
	if err != nil || n < 1 {
		t.Fatalf("SUTRA_SOAK_ROUNDS is %q, and must be a count", said)
	}
	return n
}

// caller is a client of its own, with a connection of its own.
func caller(t *testing.T, g *harness.Grid) sutrav1.GridMasterClient {
	t.Helper()
	ch := rpc.Master(g.Endpoint, g.Credentials, nil)
	t.Cleanup(ch.Close)
	return sutrav1.NewGridMasterClient(ch)
}

// unknown tells whether an error leaves it open what became of a call.
func unknown(err error) bool {
	code := rpc.AsError(err).Code()
	return code == codes.Unavailable || code == codes.DeadlineExceeded
}

// insist repeats a call until its outcome is known.
func insist[T any](ctx context.Context, call func() (T, error)) (T, error) {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	for {
		resp, err := call()
		if err == nil || !unknown(err) {
			return resp, err
		}
		select {
		case <-ctx.Done():
			return resp, fmt.Errorf("no known outcome in time: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func insistSpawn(ctx context.Context, c sutrav1.GridMasterClient, req *sutrav1.SpawnNodeRequest) (*sutrav1.Node, error) {
	resp, err := insist(ctx, func() (*sutrav1.SpawnNodeResponse, error) { return c.SpawnNode(ctx, req) })
	if err != nil {
		return nil, fmt.Errorf("spawn %s: %w", req.GetRequestId(), err)
	}
	return resp.GetNode(), nil
}

// processes counts the live processes of each node.
func processes(g *harness.Grid) map[string]int {
	count := map[string]int{}
	for _, id := range g.NodeProcesses() {
		count[id]++
	}
	return count
}

// held is what the agents themselves say that they run, and how.
func held(t *testing.T, g *harness.Grid) (map[string]sutrav1.Phase, error) {
	t.Helper()
	agents, err := g.Client().ListAgents(t.Context(), &sutrav1.ListAgentsRequest{})
	if err != nil {
		return nil, err
	}
	_, grid := g.Authority()
	pool := rpc.NewPool(g.As(pki.MasterIdentity(grid, "test")), nil)
	defer pool.Close()
	found := map[string]sutrav1.Phase{}
	for _, a := range agents.GetAgents() {
		client := sutrav1.NewGridAgentClient(pool.Agent(a.GetAgentId(), a.GetEndpoint()))
		nodes, err := client.ListNodes(t.Context(), &sutrav1.GridAgentListNodesRequest{AgentId: a.GetAgentId()})
		if err != nil {
			return nil, err
		}
		for _, n := range nodes.GetNodes() {
			found[n.GetNodeId()] = n.GetPhase()
		}
	}
	return found, nil
}

// awaitAgreement waits until processes, agents and master tell of the same nodes, one process each and all
// RUNNING, and returns their ids.
func awaitAgreement(t *testing.T, g *harness.Grid) []string {
	t.Helper()
	var ids []string
	harness.Await(t, "processes, agents and master to agree", func() error {
		resp, err := g.Client().ListNodes(t.Context(), &sutrav1.ListNodesRequest{})
		if err != nil {
			return err
		}
		ids = nil
		shown, one := map[string]sutrav1.Phase{}, map[string]int{}
		for _, n := range resp.GetNodes() {
			ids = append(ids, n.GetNodeId())
			shown[n.GetNodeId()], one[n.GetNodeId()] = n.GetPhase(), 1
			if n.GetPhase() != sutrav1.Phase_PHASE_RUNNING {
				return fmt.Errorf("the master shows %v", n)
			}
		}
		run, err := held(t, g)
		if err != nil {
			return err
		}
		if diff := cmp.Diff(shown, run); diff != "" {
			return fmt.Errorf("agents (-master +agents):\n%s", diff)
		}
		if diff := cmp.Diff(one, processes(g)); diff != "" {
			return fmt.Errorf("processes (-master +processes):\n%s", diff)
		}
		return nil
	})
	slices.Sort(ids)
	return ids
}

// stopAll stops nodes, four at a time.
func stopAll(t *testing.T, g *harness.Grid, ids []string) {
	t.Helper()
	var group errgroup.Group
	group.SetLimit(4)
	for _, id := range ids {
		group.Go(func() error {
			_, err := insist(t.Context(), func() (*sutrav1.StopNodeResponse, error) {
				return g.Client().StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: id})
			})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatalf("stop nodes: %v", err)
	}
}

// The master is killed while clients spawn: what was acknowledged stays, what was asked for twice is there
// once, and what nobody got an answer for comes to an end that all agree on.
func TestMasterKilledDuringSpawns(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	for _, id := range []string{"agent-001", "agent-002"} {
		g.StartAgent(id, manyProfiles)
	}
	const clients, each = 5, 4
	callers := make([]sutrav1.GridMasterClient, clients)
	for i := range callers {
		callers[i] = caller(t, g)
	}
	var under atomic.Int64 // calls under way
	met := int64(0)        // by a kill
	for round := range rounds(t) {
		var mu sync.Mutex // guards requests and acknowledged
		requests := map[string]*sutrav1.SpawnNodeRequest{}
		acknowledged := map[string]string{} // request id -> node id
		acknowledge := func(req *sutrav1.SpawnNodeRequest, n *sutrav1.Node) error {
			mu.Lock()
			defer mu.Unlock()
			if before, ok := acknowledged[req.GetRequestId()]; ok && before != n.GetNodeId() {
				return fmt.Errorf("request %s gave node %s and then %s", req.GetRequestId(), before, n.GetNodeId())
			}
			acknowledged[req.GetRequestId()] = n.GetNodeId()
			return nil
		}
		var group errgroup.Group
		for c, client := range callers {
			group.Go(func() error {
				for i := range each {
					req := &sutrav1.SpawnNodeRequest{RequestId: fmt.Sprintf("r%d-c%d-%d", round, c, i), Profile: "sleep"}
					if i == 1 {
						req.Profile = "" // the built-in server, which takes a while to be ready
					}
					if i%2 == 0 {
						req.AgentId = "agent-002"
					}
					mu.Lock()
					requests[req.GetRequestId()] = req
					mu.Unlock()
					var node *sutrav1.Node
					var err error
					under.Add(1)
					if c == 0 {
						// This one gives up at the first trouble: nobody but the reconciler sees to its nodes.
						var resp *sutrav1.SpawnNodeResponse
						resp, err = client.SpawnNode(t.Context(), req)
						node = resp.GetNode()
					} else {
						node, err = insistSpawn(t.Context(), client, req)
					}
					under.Add(-1)
					if c == 0 && err != nil && unknown(err) {
						continue
					}
					if err != nil {
						return err
					}
					if err := acknowledge(req, node); err != nil {
						return err
					}
				}
				return nil
			})
		}
		time.Sleep(rand.N(60 * time.Millisecond)) // anywhere in the middle
		master.Kill()
		met += under.Load()
		master = g.StartMaster()
		if err := group.Wait(); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}

		settled := awaitAgreement(t, g)
		for _, id := range acknowledged {
			if !slices.Contains(settled, id) {
				t.Errorf("round %d: node %s was acknowledged and is lost", round, id)
			}
		}
		for _, req := range requests {
			node, err := insistSpawn(t.Context(), callers[1], req)
			if err == nil {
				err = acknowledge(req, node)
			}
			if err != nil {
				t.Fatalf("round %d: asked again: %v", round, err)
			}
		}
		want := slices.Sorted(maps.Values(acknowledged))
		if n := len(slices.Compact(slices.Clone(want))); n != len(requests) {
			t.Errorf("round %d: %d requests ended in %d nodes", round, len(requests), n)
		}
		if diff := cmp.Diff(want, awaitAgreement(t, g)); diff != "" {
			t.Fatalf("round %d: nodes (-acknowledged +there):\n%s", round, diff)
		}
		stopAll(t, g, want)
		if left := awaitAgreement(t, g); len(left) > 0 {
			t.Fatalf("round %d: stopped and still there: %v", round, left)
		}
	}
	if met == 0 {
		t.Error("no kill met a spawn: this test showed nothing")
	}
}

// The master is killed while clients stop nodes: who was told that a node has stopped was told the truth,
// and a stop that the master had begun is brought to its end by the next one.
func TestMasterKilledDuringStops(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	g.StartAgent("agent-001", manyProfiles)
	callers := make([]sutrav1.GridMasterClient, 4)
	for i := range callers {
		callers[i] = caller(t, g)
	}
	var under atomic.Int64 // stops under way
	met := int64(0)        // by a kill
	for round := range rounds(t) {
		var mu sync.Mutex // guards ids and then stopped
		var ids []string
		var group errgroup.Group
		for c, client := range callers {
			group.Go(func() error {
				for i := range 5 {
					n, err := insistSpawn(t.Context(), client, &sutrav1.SpawnNodeRequest{
						RequestId: fmt.Sprintf("r%d-c%d-%d", round, c, i), Profile: []string{"sleep", "default"}[i/4],
					})
					if err != nil {
						return err
					}
					mu.Lock()
					ids = append(ids, n.GetNodeId())
					mu.Unlock()
				}
				return nil
			})
		}
		if err := group.Wait(); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}

		stopped := map[string]bool{}
		for c, client := range callers {
			group.Go(func() error {
				for i := c; i < len(ids); i += len(callers) {
					under.Add(1)
					_, err := client.StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: ids[i]})
					under.Add(-1)
					switch {
					case err == nil:
						mu.Lock()
						stopped[ids[i]] = true
						mu.Unlock()
					case !unknown(err):
						return fmt.Errorf("stop %s: %w", ids[i], err)
					}
				}
				return nil
			})
		}
		time.Sleep(rand.N(40 * time.Millisecond)) // anywhere in the middle
		master.Kill()
		met += under.Load()
		master = g.StartMaster()
		if err := group.Wait(); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}

		for _, id := range ids {
			g.AwaitNode(id, "to run, or to be gone as it is to be", func(n *sutrav1.Node) bool {
				live := processes(g)[id]
				switch n.GetPhase() {
				case sutrav1.Phase_PHASE_STOPPED:
					return live == 0
				case sutrav1.Phase_PHASE_RUNNING:
					if stopped[id] {
						t.Fatalf("round %d: node %s was acknowledged as stopped, and is %v", round, id, n)
					}
					return live == 1 && n.GetDesired() == sutrav1.Desired_DESIRED_RUNNING
				default:
					return false
				}
			})
		}
		stopAll(t, g, ids)
		if left := awaitAgreement(t, g); len(left) > 0 {
			t.Fatalf("round %d: stopped and still there: %v", round, left)
		}
		for _, n := range g.Nodes(true) {
			if n.GetPhase() != sutrav1.Phase_PHASE_STOPPED {
				t.Errorf("round %d: ended node is %v", round, n)
			}
		}
	}
	if met == 0 {
		t.Error("no kill met a stop: this test showed nothing")
	}
}

// A master that lost its disk takes in what its agents run, and ends nothing.
func TestMasterThatLostItsDisk(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	g.StartAgent("agent-001", manyProfiles)
	before := map[string]*sutrav1.Node{}
	for range 3 {
		n := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
		before[n.GetNodeId()] = n
	}
	builtin := g.Spawn(&sutrav1.SpawnNodeRequest{})
	before[builtin.GetNodeId()] = builtin
	putKey(t, builtin.GetEndpoint(), "k", "v")
	gone := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	stopAll(t, g, []string{gone.GetNodeId()})

	master.Kill()
	if err := os.RemoveAll(g.Home + "/master"); err != nil {
		t.Fatal(err)
	}
	g.StartMaster()
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	harness.Await(t, "all nodes to be adopted", func() error {
		resp, err := g.Client().ListNodes(t.Context(), &sutrav1.ListNodesRequest{IncludeEnded: true})
		if err != nil {
			return err
		}
		if len(resp.GetNodes()) != len(before) {
			return fmt.Errorf("nodes: %v", resp.GetNodes())
		}
		for _, n := range resp.GetNodes() {
			if n.GetGeneration() == 0 || n.GetPhase() != sutrav1.Phase_PHASE_RUNNING {
				return fmt.Errorf("not yet adopted: %v", n)
			}
		}
		return nil
	})
	if ids := awaitAgreement(t, g); !slices.Equal(ids, slices.Sorted(maps.Keys(before))) {
		t.Errorf("nodes after the loss: %v", ids)
	}
	for _, n := range g.Nodes(false) {
		was := before[n.GetNodeId()]
		if n.GetPid() != was.GetPid() || n.GetPort() != was.GetPort() || n.GetStoragePath() != was.GetStoragePath() ||
			n.GetMemoryLimitMb() != was.GetMemoryLimitMb() || n.GetProfile() != was.GetProfile() || n.GetRestartCount() != 0 {
			t.Errorf("node was %v\nand is %v", was, n)
		}
	}
	if got := getKey(t, builtin.GetEndpoint(), "k"); got != "v" {
		t.Errorf("key is %q after the loss", got)
	}
	// What it took in is its own: it survives the next start, and what belongs to a node can't be taken.
	_, err := g.Client().SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: "sleep", Port: builtin.GetPort()})
	if e := rpc.AsError(err); rpc.ReasonOf(err) != rpc.PortInUse || !strings.Contains(e.Error(), builtin.GetNodeId()) {
		t.Errorf("spawn on an adopted node's port: %v", err)
	}
	stopAll(t, g, slices.Collect(maps.Keys(before)))
	if left := awaitAgreement(t, g); len(left) > 0 {
		t.Errorf("stopped and still there: %v", left)
	}
}

// Agents go on without a master: nodes run, crashed ones come back, and the master learns of it later.
func TestAgentsGoOnWithoutMaster(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster("--degraded-after", "2s", "--offline-after", "3s")
	agent := g.StartAgent("agent-001", manyProfiles)
	steady := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	crashing := g.Spawn(&sutrav1.SpawnNodeRequest{})
	putKey(t, crashing.GetEndpoint(), "k", "v")

	master.Kill()
	killNode(t, g, crashing)
	harness.Await(t, "the agent to restart the node and to miss the master", func() error {
		if strings.Count(string(agent.Log()), "node ready") < 3 { // the two first starts were some as well
			return errors.New("the node isn't ready again")
		}
		if !strings.Contains(string(agent.Log()), "heartbeat missed") {
			return errors.New("no beat was missed")
		}
		return nil
	})
	if got := getKey(t, crashing.GetEndpoint(), "k"); got != "v" {
		t.Errorf("key is %q after a crash without a master", got)
	}
	g.StartMaster("--degraded-after", "2s", "--offline-after", "3s")
	g.AwaitNode(crashing.GetNodeId(), "to be known again", func(n *sutrav1.Node) bool {
		return n.GetPhase() == sutrav1.Phase_PHASE_RUNNING && n.GetRestartCount() == 1 && n.GetPid() != crashing.GetPid() &&
			n.GetLastExit().GetSignal() == "SIGKILL"
	})
	g.AwaitNode(steady.GetNodeId(), "to have run on", func(n *sutrav1.Node) bool {
		return n.GetPhase() == sutrav1.Phase_PHASE_RUNNING && n.GetRestartCount() == 0 && n.GetPid() == steady.GetPid()
	})
	awaitAgreement(t, g)
}
