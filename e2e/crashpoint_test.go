package e2e_test

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// crashed is a grid whose agent is killed at one step after the other.
type crashed struct {
	*harness.Grid
	t     *testing.T
	agent *harness.Process
	round int
	// wanted are the nodes that were acknowledged and not stopped since.
	wanted map[string]*sutrav1.Node
}

// The agent is killed at each step that it takes between a call and its answer, or between a crash and the restart: each
// write, each sync, the fork, what the child does before it is the node. Afterwards processes, records and what the
// master shows are one, and what was acknowledged is there. By default some of the steps are tried, with SUTRA_SOAK_ROUNDS all.
func TestAgentKilledAtEachStep(t *testing.T) {
	t.Parallel()
	harness.Need(t, "root")
	for name, operation := range map[string]func(*crashed, int) (int, string){
		"spawn": (*crashed).spawn, "spawn of a server": (*crashed).spawnServer, "spawn without environment": (*crashed).spawnBare,
		"stop": (*crashed).stop, "restart": (*crashed).restart,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := harness.New(t)
			g.StartMaster()
			c := &crashed{Grid: g, t: t, wanted: map[string]*sutrav1.Node{}, agent: g.StartAgent("agent-001", manyProfiles)}
			bystander := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
			c.wanted[bystander.GetNodeId()] = bystander
			whole, last := operation(c, 0)
			if whole == 0 || last != "" {
				t.Fatalf("without a crash there were %d steps, the last %q", whole, last)
			}
			names := map[string]int{}
			for k := range steps(t, whole) {
				steps, last := operation(c, k)
				names[last]++
				if t.Failed() {
					t.Fatalf("when the agent was killed at step %d of %d, %s", k, steps, last)
				}
			}
			t.Logf("%d steps without a crash; killed at %v", whole, names)
			if err := sameRun(bystander, g.AwaitNode(bystander.GetNodeId(), "to run", func(n *sutrav1.Node) bool { return n.GetPhase() == running })); err != nil {
				t.Error(err)
			}
		})
	}
}

// steps yields those at which a process is to be killed, of about so many.
func steps(t *testing.T, whole int) func(func(int) bool) {
	return func(yield func(int) bool) {
		if os.Getenv("SUTRA_SOAK_ROUNDS") != "" {
			for k := 1; k <= whole+whole/4; k++ { // how many there are varies with the heartbeats between
				if !yield(k) {
					return
				}
			}
			return
		}
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		random := rand.New(rand.NewPCG(seed, 0))
		count := min(rounds(t), whole)
		for i := range count {
			from, to := whole*i/count, whole*(i+1)/count
			if !yield(1 + from + random.IntN(to-from)) {
				return
			}
		}
	}
}

// crash runs an operation under an agent that is killed at its k-th step from then on, and starts the next one. over tells
// that the operation is, however it went.
func (c *crashed) crash(k int, operation func(), over func() bool) (steps int, last string) {
	c.t.Helper()
	c.round++
	point := harness.CrashAt(c.t, c.agent, k)
	done := make(chan struct{})
	go func() {
		defer close(done)
		operation()
	}()
	harness.Await(c.t, "the operation's end or the agent's", func() error {
		if over() || !c.agent.Running() {
			return nil
		}
		return errors.New("it goes on")
	})
	steps, last = point.End()
	c.agent = restarted(c.t, c.Grid, "agent-001", fmt.Sprintf("agent-%d", c.round))
	<-done
	return steps, last
}

// agrees checks that the wanted nodes are there and nothing else is: processes, records, control groups, folders.
func (c *crashed) agrees() {
	c.t.Helper()
	want := slices.Sorted(maps.Keys(c.wanted))
	if diff := cmp.Diff(want, awaitAgreement(c.t, c.Grid)); diff != "" {
		c.t.Errorf("nodes (-wanted +there):\n%s", diff)
	}
	pids := map[string]int{}
	for pid, id := range c.NodeProcesses() {
		pids[id] = pid
	}
	harness.Await(c.t, "the records to be those of the processes", func() error {
		if diff := cmp.Diff(pids, c.records()); diff != "" {
			return fmt.Errorf("(-processes +records):\n%s", diff)
		}
		return nil
	})
	var groups []string
	for instance := range c.Instances() {
		for _, group := range harness.NodeGroups(c.t, instance) {
			groups = append(groups, filepath.Base(group))
		}
	}
	slices.Sort(groups)
	// A node has one in each hierarchy.
	if groups = slices.Compact(groups); len(groups) > 0 && !slices.Equal(groups, want) {
		c.t.Errorf("the control groups are %v, want those of %v", groups, want)
	}
	home := filepath.Join(c.Home, "agents", "agent-001")
	err := filepath.WalkDir(home, func(path string, _ fs.DirEntry, err error) error {
		if strings.HasPrefix(filepath.Base(path), ".") {
			c.t.Errorf("%s was left behind", path)
		}
		return err
	})
	if err != nil {
		c.t.Error(err)
	}
}

// records are the pids that the agent has on record. It is read from a copy: the agent has the file.
func (c *crashed) records() map[string]int {
	c.t.Helper()
	data, err := os.ReadFile(filepath.Join(c.Home, "agents", "agent-001", "nodes.db"))
	if err != nil {
		c.t.Fatal(err)
	}
	path := filepath.Join(c.t.TempDir(), "nodes.db")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		c.t.Fatal(err)
	}
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	defer db.Close()
	pids := map[string]int{}
	err = db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket([]byte("nodes")).ForEach(func(id, value []byte) error {
			rec := &sutrav1.ProcessRecord{}
			pids[string(id)] = -1
			if err := proto.Unmarshal(value, rec); err != nil {
				return err
			}
			if rec.GetNode().GetDesired() == sutrav1.Desired_DESIRED_RUNNING {
				pids[string(id)] = int(rec.GetPid())
			}
			return nil
		})
	})
	if err != nil {
		c.t.Fatal(err)
	}
	return pids
}

func (c *crashed) spawn(k int) (int, string)       { return c.spawnOf("sleep", k) }
func (c *crashed) spawnServer(k int) (int, string) { return c.spawnOf("default", k) }
func (c *crashed) spawnBare(k int) (int, string)   { return c.spawnOf("bare", k) }

func (c *crashed) spawnOf(profile string, k int) (int, string) {
	c.t.Helper()
	req := &sutrav1.SpawnNodeRequest{Profile: profile, MemoryLimitMb: 64, RequestId: fmt.Sprintf("%s-%d-%d", profile, c.round, k)}
	var first *sutrav1.SpawnNodeResponse
	var err error
	answered := make(chan struct{})
	steps, last := c.crash(k, func() {
		defer close(answered)
		first, err = c.Client().SpawnNode(c.t.Context(), req)
	}, func() bool { return isClosed(answered) })
	if err != nil && !unknown(err) {
		c.t.Errorf("the spawn: %v", err)
	}
	// Whether the client asks again or the reconciler is left alone with it: there is one node.
	known := slices.Sorted(maps.Keys(c.wanted))
	there := slices.DeleteFunc(awaitAgreement(c.t, c.Grid), func(id string) bool { return slices.Contains(known, id) })
	if err == nil && !slices.Equal(there, []string{first.GetNode().GetNodeId()}) {
		c.t.Errorf("node %v was acknowledged, and there is %v", first.GetNode(), there)
	}
	node, err := insistSpawn(c.t.Context(), c.Client(), req)
	switch {
	case err != nil:
		c.t.Fatal(err)
	case len(there) > 1 || len(there) == 1 && there[0] != node.GetNodeId():
		c.t.Errorf("asked for again it is %v, and there was %v", node, there)
	case first != nil && sameRun(first.GetNode(), node) != nil:
		c.t.Error(sameRun(first.GetNode(), node))
	}
	c.wanted[node.GetNodeId()] = node
	c.agrees()
	c.end(node)
	return steps, last
}

// end stops a node without a crash.
func (c *crashed) end(n *sutrav1.Node) {
	c.t.Helper()
	delete(c.wanted, n.GetNodeId())
	stoppedForGood(c.t, c.Grid, []*sutrav1.Node{n})
}

func (c *crashed) stop(k int) (int, string) {
	c.t.Helper()
	node := c.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	var err error
	answered := make(chan struct{})
	steps, last := c.crash(k, func() {
		defer close(answered)
		_, err = c.Client().StopNode(c.t.Context(), &sutrav1.StopNodeRequest{NodeId: node.GetNodeId()})
		if live := processes(c.Grid)[node.GetNodeId()]; err == nil && live > 0 {
			c.t.Errorf("the stop was acknowledged, and %d processes live", live)
		}
	}, func() bool { return isClosed(answered) })
	if err != nil && !unknown(err) {
		c.t.Errorf("the stop: %v", err)
	}
	// The master has noted it before it asked its agent: it is done without being asked for again.
	c.AwaitNode(node.GetNodeId(), "to be stopped", func(n *sutrav1.Node) bool { return n.GetPhase() == stopped })
	c.agrees()
	c.end(node) // again, and in vain
	return steps, last
}

func (c *crashed) restart(k int) (int, string) {
	c.t.Helper()
	node := c.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	again := func(n *sutrav1.Node) bool {
		return n.GetPhase() == running && n.GetPid() != node.GetPid() && n.GetPid() != 0
	}
	steps, last := c.crash(k, func() {
		if err := strike(c.Grid, node); err != nil {
			c.t.Error(err)
		}
	}, func() bool {
		resp, err := c.Client().GetNodeStatus(c.t.Context(), &sutrav1.GetNodeStatusRequest{NodeId: node.GetNodeId(), CachedOnly: true})
		return err == nil && again(resp.GetNode())
	})
	is := c.AwaitNode(node.GetNodeId(), "to be restarted", again)
	if is.GetRestartCount() != 1 || is.GetPort() != node.GetPort() || is.GetStoragePath() != node.GetStoragePath() {
		c.t.Errorf("node was %v\nand is %v", node, is)
	}
	c.wanted[node.GetNodeId()] = is
	c.agrees()
	c.end(node)
	return steps, last
}

func isClosed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
