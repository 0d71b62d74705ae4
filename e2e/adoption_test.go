package e2e_test

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// sameRun says in what a node isn't the same run of the same process any more; nil where it is.
func sameRun(was, is *sutrav1.Node) error {
	// An agent that was killed before it wrote a start down leaves it to the kernel's clock, whose ticks are 10 ms.
	const ticks = 20 * time.Millisecond
	if is.GetPid() != was.GetPid() || is.GetStartedAt().AsTime().Sub(was.GetStartedAt().AsTime()).Abs() > ticks ||
		is.GetRestartCount() != was.GetRestartCount() || is.GetPort() != was.GetPort() || is.GetStoragePath() != was.GetStoragePath() ||
		is.GetMemoryLimitMb() != was.GetMemoryLimitMb() || is.GetProfile() != was.GetProfile() || is.GetGeneration() != was.GetGeneration() {
		return fmt.Errorf("node was %v\nand is %v", was, is)
	}
	return nil
}

// restarted runs an agent again by its file, under a name of its own for its log, and waits until the master knows it.
func restarted(t *testing.T, g *harness.Grid, agentID, name string, args ...string) *harness.Process {
	t.Helper()
	before := agentOf(t, g, agentID).GetEpoch()
	a := g.LaunchAgent(name, filepath.Join(g.Dir, agentID+".toml"), args...)
	harness.Await(t, agentID+" to register again", func() error {
		if !a.Running() {
			t.Fatalf("%s ended:\n%s", name, a.Log())
		}
		if is := agentOf(t, g, agentID); is.GetEpoch() == before || is.GetHealth() != sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY {
			return fmt.Errorf("it is %v", is)
		}
		return nil
	})
	return a
}

func agentOf(t *testing.T, g *harness.Grid, id string) *sutrav1.Agent {
	t.Helper()
	resp, err := g.Client().ListAgents(t.Context(), &sutrav1.ListAgentsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range resp.GetAgents() {
		if a.GetAgentId() == id {
			return a
		}
	}
	t.Fatalf("the master doesn't know %s: %v", id, resp.GetAgents())
	return nil
}

// takenUp checks that all nodes are known, live, as the same runs of the same processes, and nothing beside them.
func takenUp(t *testing.T, g *harness.Grid, before []*sutrav1.Node) {
	t.Helper()
	if ids := awaitAgreement(t, g); len(ids) != len(before) {
		t.Fatalf("there were %d nodes, and there are %v", len(before), ids)
	}
	for _, was := range before {
		is := g.AwaitNode(was.GetNodeId(), "to be ready", func(n *sutrav1.Node) bool {
			return n.GetPhase() == running && n.GetHealth() == sutrav1.NodeHealth_NODE_HEALTH_READY
		})
		if err := sameRun(was, is); err != nil {
			t.Error(err)
		}
	}
}

// spawnMany spawns nodes of a profile, four at a time.
func spawnMany(t *testing.T, g *harness.Grid, count int, req *sutrav1.SpawnNodeRequest) []*sutrav1.Node {
	t.Helper()
	nodes := make([]*sutrav1.Node, count)
	var group errgroup.Group
	group.SetLimit(4)
	for i := range nodes {
		group.Go(func() error {
			resp, err := g.Client().SpawnNode(t.Context(), req)
			nodes[i] = resp.GetNode()
			return err
		})
	}
	if err := group.Wait(); err != nil {
		t.Fatalf("spawn: %v", err)
	}
	return nodes
}

// stoppedForGood stops nodes and checks that nothing is left of them: no process, no control group, no port.
func stoppedForGood(t *testing.T, g *harness.Grid, nodes []*sutrav1.Node) {
	t.Helper()
	var ids []string
	for _, n := range nodes {
		ids = append(ids, n.GetNodeId())
	}
	stopAll(t, g, ids)
	for pid, id := range g.NodeProcesses() {
		if slices.Contains(ids, id) {
			t.Errorf("process %d of %s is left", pid, id)
		}
	}
	for instance := range g.Instances() {
		for _, group := range harness.NodeGroups(t, instance) {
			if slices.Contains(ids, filepath.Base(group)) {
				t.Errorf("control group %s is left", group)
			}
		}
	}
	for _, n := range nodes {
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", n.GetPort()))
		if err != nil {
			t.Errorf("port of %s: %v", n.GetNodeId(), err)
			continue
		}
		_ = l.Close() // it was only to see
	}
}

// many is how many nodes an agent is replaced under: as many as any machine bears, or with SUTRA_SOAK_ROUNDS as many as a
// host may well have.
func many() int {
	if os.Getenv("SUTRA_SOAK_ROUNDS") != "" {
		return 200
	}
	return 40
}

// Under many nodes the agent is killed, and the next one takes up all of them: nothing of theirs has changed, and
// they are supervised as before.
func TestAgentKilledUnderManyNodes(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("agent-001", manyProfiles+redisProfile(t))
	builtin := spawnMany(t, g, many()*3/5, &sutrav1.SpawnNodeRequest{MemoryLimitMb: 64})
	nodes := append(slices.Clone(builtin), spawnMany(t, g, many()/5, &sutrav1.SpawnNodeRequest{Profile: "sleep"})...)
	others := "sleep"
	if _, err := exec.LookPath("redis-server"); err == nil {
		others = "redis"
	}
	nodes = append(nodes, spawnMany(t, g, many()/5, &sutrav1.SpawnNodeRequest{Profile: others, MemoryLimitMb: 64})...)
	last := len(nodes) - 1
	for _, n := range builtin {
		putKey(t, n.GetEndpoint(), "k", n.GetNodeId())
	}
	for _, i := range []int{0, last} { // counters that aren't zero
		killNode(t, g, nodes[i])
		was := nodes[i]
		nodes[i] = g.AwaitNode(was.GetNodeId(), "to be restarted", func(n *sutrav1.Node) bool {
			return n.GetPhase() == running && n.GetPid() != was.GetPid() && n.GetRestartCount() == 1
		})
	}

	agent.Kill()
	for _, n := range builtin {
		if got := getKey(t, n.GetEndpoint(), "k"); got != n.GetNodeId() {
			t.Errorf("key is %q without the agent", got)
		}
	}
	start := time.Now()
	restarted(t, g, "agent-001", "second")
	t.Logf("%d nodes were taken up %v after the start", len(nodes), time.Since(start))
	takenUp(t, g, nodes)
	for _, n := range builtin {
		if got := getKey(t, n.GetEndpoint(), "k"); got != n.GetNodeId() {
			t.Errorf("key is %q after the adoption", got)
		}
	}
	for _, i := range []int{0, 1, last} {
		was := nodes[i]
		killNode(t, g, was)
		nodes[i] = g.AwaitNode(was.GetNodeId(), "to be restarted", func(n *sutrav1.Node) bool {
			return n.GetPhase() == running && n.GetPid() != was.GetPid() && n.GetRestartCount() == was.GetRestartCount()+1
		})
	}
	if got := getKey(t, nodes[1].GetEndpoint(), "k"); got != nodes[1].GetNodeId() {
		t.Errorf("key is %q after the crash of an adopted node", got)
	}
	stoppedForGood(t, g, nodes)
	if left := awaitAgreement(t, g); len(left) > 0 {
		t.Errorf("stopped and still there: %v", left)
	}
}

// An agent that ends in good order says so, leaves its nodes running, and is replaced by a new version under them; so is
// one that is killed.
func TestNewVersionUnderRunningNodes(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	installed := filepath.Join(g.Dir, "sutra")
	old, err := os.ReadFile(g.Binary)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(installed, old, 0o700); err != nil {
		t.Fatal(err)
	}
	g.Binary = installed
	g.StartMaster() // with its long windows: OFFLINE can only come from the agent's leave
	agent := g.StartAgent("agent-001", manyProfiles)
	nodes := append(spawnMany(t, g, many()-2, &sutrav1.SpawnNodeRequest{Profile: "sleep"}),
		g.Spawn(&sutrav1.SpawnNodeRequest{}), g.Spawn(&sutrav1.SpawnNodeRequest{StoragePath: filepath.Join(g.Dir, "own", "place")}))
	servers := nodes[many()-2:]
	for _, n := range servers {
		putKey(t, n.GetEndpoint(), "k", n.GetNodeId())
	}

	agent.Stop()
	if h := agentOf(t, g, "agent-001").GetHealth(); h != sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE {
		t.Errorf("an agent that has just ended is %s", h.Word())
	}
	for _, n := range g.Nodes(false) {
		if n.GetPhase() != sutrav1.Phase_PHASE_UNKNOWN || n.GetDesired() != sutrav1.Desired_DESIRED_RUNNING {
			t.Errorf("without its agent, a node is %v", n)
		}
	}
	if n := len(g.NodeLeaders()); n != len(nodes) {
		t.Errorf("without their agent, %d of %d nodes run", n, len(nodes))
	}

	for _, version := range []string{"v2", "v3"} {
		harness.BuildVersion(t, installed+".new", version)
		if err := os.Rename(installed+".new", installed); err != nil {
			t.Fatal(err)
		}
		agent.Kill() // the first has ended already
		agent = restarted(t, g, "agent-001", version)
		if v := agentOf(t, g, "agent-001").GetVersion(); !strings.HasPrefix(v, version) {
			t.Errorf("the version of agent %s is %q", version, v)
		}
		takenUp(t, g, nodes)
		for _, n := range servers {
			if got := getKey(t, n.GetEndpoint(), "k"); got != n.GetNodeId() {
				t.Errorf("key is %q after the upgrade to %s", got, version)
			}
		}
	}
	// What is started from now on is the new version's.
	killNode(t, g, servers[0])
	again := g.AwaitNode(servers[0].GetNodeId(), "to be restarted", func(n *sutrav1.Node) bool {
		return n.GetPhase() == running && n.GetPid() != servers[0].GetPid()
	})
	if path, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", again.GetPid())); err != nil || path != installed {
		t.Errorf("the restarted node runs %q, %v", path, err)
	}
	if got := getKey(t, again.GetEndpoint(), "k"); got != again.GetNodeId() {
		t.Errorf("key is %q after the restart", got)
	}
}

// With --stop-nodes an agent takes its nodes along; the next one runs them anew, where they were.
func TestStopNodesWithTheAgent(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.LaunchAgent("agent-001", g.AgentFile("agent-001", manyProfiles), "--stop-nodes")
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	// On ports that are asked for: one that the agent chose is on the master's record a moment later.
	var nodes []*sutrav1.Node
	for _, profile := range []string{"sleep", "sleep", "sleep", "default"} {
		nodes = append(nodes, g.Spawn(&sutrav1.SpawnNodeRequest{Profile: profile, Port: uint32(g.FreePort())}))
	}
	putKey(t, nodes[3].GetEndpoint(), "k", "v")

	agent.Stop()
	if left := g.NodeProcesses(); len(left) > 0 {
		t.Errorf("the agent ended and left %v", left)
	}
	for instance := range g.Instances() {
		if left := harness.AgentGroups(instance); len(left) > 0 {
			t.Errorf("the agent ended and left %v", left)
		}
	}
	for _, n := range g.Nodes(false) {
		if n.GetPhase() != sutrav1.Phase_PHASE_UNKNOWN || n.GetDesired() != sutrav1.Desired_DESIRED_RUNNING {
			t.Errorf("without its agent, a node is %v", n)
		}
	}

	restarted(t, g, "agent-001", "second")
	for _, was := range nodes {
		is := g.AwaitNode(was.GetNodeId(), "to be back", func(n *sutrav1.Node) bool { return n.GetPhase() == running && n.GetPid() != was.GetPid() })
		if is.GetPort() != was.GetPort() || is.GetStoragePath() != was.GetStoragePath() || is.GetMemoryLimitMb() != was.GetMemoryLimitMb() {
			t.Errorf("node was %v\nand is %v", was, is)
		}
	}
	if got := getKey(t, nodes[3].GetEndpoint(), "k"); got != "v" {
		t.Errorf("key is %q after the return", got)
	}
	awaitAgreement(t, g)
}

// An agent that is told to end while a node starts leaves it starting, and the spawn's caller isn't told that it runs.
func TestAgentEndsWhileNodeStarts(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("agent-001", manyProfiles+`
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
	agent.Stop()
	restarted(t, g, "agent-001", "second")
	if leaders := g.NodeLeaders()[node.GetNodeId()]; !slices.Equal(leaders, []int{int(node.GetPid())}) {
		t.Errorf("processes: %v, and the node was %v", leaders, node)
	}
	if err := os.WriteFile(filepath.Join(node.GetStoragePath(), "ready"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	g.AwaitNode(node.GetNodeId(), "to be ready", func(n *sutrav1.Node) bool { return n.GetPhase() == running && n.GetPid() == node.GetPid() })
	if err := <-outcome; err != nil && !unknown(err) {
		t.Errorf("the spawn: %v", err)
	}
	resp, err := insist(t.Context(), func() (*sutrav1.SpawnNodeResponse, error) {
		return g.Client().SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: "slow", RequestId: "wish"})
	})
	if err != nil || resp.GetNode().GetPid() != node.GetPid() {
		t.Errorf("the wish, repeated, gave %v, %v; the node was %v", resp, err, node)
	}
	awaitAgreement(t, g)
}

// The agent is killed at any moment while clients spawn and stop and nodes crash: afterwards every node that was
// acknowledged runs once, every one whose stop was acknowledged is gone, and nothing else is there.
func TestAgentKilledAtAnyMoment(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("agent-001", manyProfiles)
	callers := make([]sutrav1.GridMasterClient, 4)
	for i := range callers {
		callers[i] = caller(t, g)
	}
	var mu sync.Mutex // guards wanted and gone
	wanted, gone := map[string]*sutrav1.Node{}, map[string]bool{}
	told, watcher := newHistory(), caller(t, g)
	for round := range rounds(t) {
		var group errgroup.Group
		over, watched := make(chan struct{}), make(chan error, 1)
		go func() {
			var err error
			for err == nil && !isClosed(over) {
				err = told.look(t.Context(), g, watcher)
				time.Sleep(20 * time.Millisecond) // so that it isn't all that the machine does
			}
			watched <- err
		}()
		for c, client := range callers {
			dice := rand.New(rand.NewPCG(seed, uint64(round*len(callers)+c+1)))
			group.Go(func() error {
				var mine []*sutrav1.Node
				for i := range 8 {
					switch roll := dice.IntN(10); {
					case roll < 3 && len(mine) > 0: // a stop, repeated until its outcome is known
						n := mine[0]
						mine = mine[1:]
						mu.Lock()
						delete(wanted, n.GetNodeId())
						mu.Unlock()
						called := told.now()
						_, err := insist(t.Context(), func() (*sutrav1.StopNodeResponse, error) {
							return client.StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: n.GetNodeId()})
						})
						if err != nil {
							return fmt.Errorf("stop %s: %w", n.GetNodeId(), err)
						}
						told.note(n.GetNodeId(), ended, called, true)
						if live := processes(g)[n.GetNodeId()]; live > 0 {
							return fmt.Errorf("stop of %s was acknowledged, and %d processes live", n.GetNodeId(), live)
						}
						mu.Lock()
						gone[n.GetNodeId()] = true
						mu.Unlock()
					case roll < 5 && len(mine) > 0: // a crash; in vain where it has crashed already
						_ = strike(g, mine[dice.IntN(len(mine))])
					default:
						req := &sutrav1.SpawnNodeRequest{RequestId: fmt.Sprintf("r%d-c%d-%d", round, c, i), Profile: "sleep"}
						if dice.IntN(6) == 0 {
							req.Profile, req.MemoryLimitMb = "", 64
						}
						called := told.now()
						n, err := insistSpawn(t.Context(), client, req)
						if err != nil {
							return err
						}
						told.note(n.GetNodeId(), spawned, called, true)
						mine = append(mine, n)
						mu.Lock()
						wanted[n.GetNodeId()] = n
						mu.Unlock()
					}
				}
				return nil
			})
		}
		for range 1 + random.IntN(2) {
			time.Sleep(time.Duration(random.Int64N(int64(400 * time.Millisecond)))) // anywhere: in the load, or in the start of the last one
			agent.Kill()
			agent = g.LaunchAgent(fmt.Sprintf("round-%d", round), filepath.Join(g.Dir, "agent-001.toml"))
		}
		err := group.Wait()
		close(over)
		if err := errors.Join(err, <-watched); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
		settled := awaitAgreement(t, g)
		if err := told.look(t.Context(), g, watcher); err != nil {
			t.Fatal(err)
		}
		told.judge(t)
		if len(settled) != len(wanted) {
			t.Errorf("round %d: %d nodes are wanted, and there are %d", round, len(wanted), len(settled))
		}
		for _, id := range settled {
			if wanted[id] == nil {
				t.Errorf("round %d: node %s runs (stopped: %v), and nobody wants it", round, id, gone[id])
			}
		}
		for id, pids := range g.NodeLeaders() {
			if len(pids) != 1 {
				t.Errorf("round %d: node %s runs as %v", round, id, pids)
			}
		}
		if t.Failed() {
			return
		}
		// The next round begins with few again, and with nodes that went through all of this.
		var ids []string
		for id := range wanted {
			if len(wanted)-len(ids) > 5 {
				ids = append(ids, id)
			}
		}
		called := told.now()
		stopAll(t, g, ids)
		for _, id := range ids {
			told.note(id, ended, called, true)
			delete(wanted, id)
		}
	}
}

// A stop that is asked for while the agent is dead is noted, and done when it is back; the node is called STOPPED when
// its process is gone, not before.
func TestStopWhileAgentIsDead(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster("--degraded-after", "2s", "--offline-after", "3s")
	agent := g.StartAgent("agent-001", manyProfiles+`
[storage.profiles.deaf]
storage_binary = "/bin/sh"
args = ["-c", "trap '' TERM; while :; do sleep .1; done"]
ready = "none"
stop_grace_secs = 1
`)
	nodes := []*sutrav1.Node{g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"}), g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "deaf"}), g.Spawn(&sutrav1.SpawnNodeRequest{})}
	kept := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	agent.Kill()
	for i, n := range nodes {
		if i == 1 { // at first the master doesn't know that the agent is dead, then it does
			g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)
		}
		_, err := g.Client().StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: n.GetNodeId()})
		if !unknown(err) {
			t.Errorf("stop of %s without its agent: %v", n.GetNodeId(), err)
		}
	}
	for _, n := range g.Nodes(false) {
		if n.GetNodeId() != kept.GetNodeId() && n.GetDesired() != sutrav1.Desired_DESIRED_STOPPED || n.GetPhase() == stopped {
			t.Errorf("after the stops, a node is %v", n)
		}
	}
	if leaders := g.NodeLeaders(); len(leaders) != len(nodes)+1 {
		t.Errorf("without their agent, there are %v", leaders)
	}
	g.LaunchAgent("second", filepath.Join(g.Dir, "agent-001.toml"))
	for _, n := range nodes {
		g.AwaitNode(n.GetNodeId(), "to be stopped", func(is *sutrav1.Node) bool {
			if is.GetPhase() != stopped {
				return false
			}
			if live := processes(g)[n.GetNodeId()]; live > 0 {
				t.Errorf("%d processes of a node live that is %v", live, is)
			}
			return true
		})
	}
	takenUp(t, g, []*sutrav1.Node{kept})
}

// What dies while the agent is away is run again, with all it left behind out of the way.
func TestNodesDieWhileAgentIsDead(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("agent-001", manyProfiles+`
[storage.profiles.parent]
storage_binary = "/bin/sh"
args = ["-c", "(trap '' TERM; exec setsid sleep 100001) & wait"]
ready = "none"
`)
	dead := []*sutrav1.Node{g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"}), g.Spawn(&sutrav1.SpawnNodeRequest{}), g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "parent"})}
	steady := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	putKey(t, dead[1].GetEndpoint(), "k", "v")
	harness.Await(t, "the parent to have its child in a session of its own", func() error {
		if p := g.NodeLeaders()[dead[2].GetNodeId()]; len(p) != 2 {
			return fmt.Errorf("leaders: %v", p)
		}
		return nil
	})
	orphans := g.NodeLeaders()[dead[2].GetNodeId()]
	agent.Kill()
	for _, n := range dead {
		killNode(t, g, n)
	}
	restarted(t, g, "agent-001", "second")
	for _, was := range dead {
		g.AwaitNode(was.GetNodeId(), "to be restarted", func(n *sutrav1.Node) bool {
			return n.GetPhase() == running && n.GetPid() != was.GetPid() && n.GetRestartCount() == 1 && n.GetLastExit() != nil && n.GetPort() == was.GetPort()
		})
	}
	if got := getKey(t, dead[1].GetEndpoint(), "k"); got != "v" {
		t.Errorf("key is %q after the restart", got)
	}
	if err := sameRun(steady, g.AwaitNode(steady.GetNodeId(), "to run", func(n *sutrav1.Node) bool { return n.GetPhase() == running })); err != nil {
		t.Error(err)
	}
	live := g.NodeProcesses()
	for _, pid := range orphans {
		if _, ok := live[pid]; ok {
			t.Errorf("process %d of the dead parent lives beside the new one: %v", pid, live)
		}
	}
	stoppedForGood(t, g, dead)
}

// Two grids on one host have agents of one id and profiles of one name; neither touches the other's nodes.
func TestTwoHomesOnOneHost(t *testing.T) {
	t.Parallel()
	grids := []*harness.Grid{harness.New(t), harness.New(t)}
	agents, nodes := make([]*harness.Process, 2), make([][]*sutrav1.Node, 2)
	for i, g := range grids {
		g.StartMaster()
		agents[i] = g.StartAgent("agent-001", manyProfiles)
		nodes[i] = append(spawnMany(t, g, 3, &sutrav1.SpawnNodeRequest{Profile: "sleep"}), g.Spawn(&sutrav1.SpawnNodeRequest{}))
	}
	for _, a := range agents {
		a.Kill()
	}
	// The records of one are lost, so that it looks for what runs.
	if err := os.Remove(filepath.Join(grids[0].Home, "agents", "agent-001", "nodes.db")); err != nil {
		t.Fatal(err)
	}
	first := restarted(t, grids[0], "agent-001", "second", "--stop-nodes")
	if ids := awaitAgreement(t, grids[0]); len(ids) != len(nodes[0]) {
		t.Errorf("nodes of the first: %v", ids)
	}
	first.Stop()
	if left := grids[0].NodeProcesses(); len(left) > 0 {
		t.Errorf("the first has ended, and left %v", left)
	}
	restarted(t, grids[1], "agent-001", "second")
	takenUp(t, grids[1], nodes[1])
	restarted(t, grids[0], "agent-001", "third")
	if ids := awaitAgreement(t, grids[0]); len(ids) != len(nodes[0]) {
		t.Errorf("nodes of the first in the end: %v", ids)
	}
	takenUp(t, grids[1], nodes[1])
}

// Master and agent are killed together, the master's home is kept or lost: the nodes stay the same.
func TestMasterAndAgentKilledTogether(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	agent := g.StartAgent("agent-001", manyProfiles)
	nodes := append(spawnMany(t, g, 4, &sutrav1.SpawnNodeRequest{Profile: "sleep"}), g.Spawn(&sutrav1.SpawnNodeRequest{}))
	for i, lost := range []bool{false, true} {
		agent.Kill()
		master.Kill()
		if lost {
			if err := os.RemoveAll(filepath.Join(g.Home, "master")); err != nil {
				t.Fatal(err)
			}
		}
		// The agent is first: it takes its nodes up without a master.
		agent = g.LaunchAgent(fmt.Sprintf("start-%d", i), filepath.Join(g.Dir, "agent-001.toml"))
		harness.Await(t, "the nodes to be taken up", func() error {
			if n := strings.Count(string(agent.Log()), "node taken up"); n != len(nodes) {
				return fmt.Errorf("%d are", n)
			}
			return nil
		})
		master = g.StartMaster()
		g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
		harness.Await(t, "the master to know all nodes", func() error {
			if is := g.Nodes(false); len(is) != len(nodes) {
				return fmt.Errorf("there are %v", is)
			}
			return nil
		})
		takenUp(t, g, nodes)
	}
	stoppedForGood(t, g, nodes)
	if _, err := os.Stat(filepath.Join(g.Home, "agents", "agent-001", "logs", nodes[0].GetNodeId()+".log")); errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the log of a node that ran is gone: %v", err)
	}
}
