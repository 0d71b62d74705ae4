package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

const (
	running   = sutrav1.Phase_PHASE_RUNNING
	stopped   = sutrav1.Phase_PHASE_STOPPED
	crashLoop = sutrav1.Phase_PHASE_CRASH_LOOP
)

// strike kills the process that a node was last seen with, if it is still the node's.
func strike(g *harness.Grid, n *sutrav1.Node) error {
	p, err := os.FindProcess(int(n.GetPid())) // holds this process and no other from here on
	if err != nil {
		return err
	}
	defer func() { _ = p.Release() }() // it isn't waited for
	if g.NodeProcesses()[p.Pid] != n.GetNodeId() {
		return fmt.Errorf("process %d isn't one of node %s (any more)", p.Pid, n.GetNodeId())
	}
	return p.Signal(syscall.SIGKILL)
}

func killNode(t *testing.T, g *harness.Grid, n *sutrav1.Node) {
	t.Helper()
	if err := strike(g, n); err != nil {
		t.Fatal(err)
	}
}

// logSays tells whether a process has logged a text, as an error until it has.
func logSays(p *harness.Process, text string) error {
	if !strings.Contains(string(p.Log()), text) {
		return fmt.Errorf("%s hasn't logged %q", p.Name, text)
	}
	return nil
}

// A stop that can't reach the agent is noted and done when the agent is back.
func TestStopWhileAgentIsAway(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster("--degraded-after", "2s", "--offline-after", "3s")
	agent := g.StartAgent("agent-001", manyProfiles)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})

	agent.Signal(syscall.SIGSTOP)
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)
	_, err := g.Client().StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: node.GetNodeId()})
	if e := rpc.AsError(err); rpc.ReasonOf(err) != rpc.AgentOffline || !strings.Contains(e.Error(), "is noted") || e.Hint == "" {
		t.Fatalf("stop while the agent is away: %v", err)
	}
	if n := g.Nodes(false); len(n) != 1 || n[0].GetDesired() != sutrav1.Desired_DESIRED_STOPPED || n[0].GetPhase() != sutrav1.Phase_PHASE_UNKNOWN {
		t.Errorf("nodes after the stop: %v", n)
	}
	if len(g.NodeProcesses()) != 1 {
		t.Errorf("processes after the stop: %v", g.NodeProcesses())
	}
	_, err = g.Client().RemoveNode(t.Context(), &sutrav1.RemoveNodeRequest{NodeId: node.GetNodeId()})
	if rpc.ReasonOf(err) != rpc.NodeStillLive {
		t.Errorf("remove of a node that may still run: %v", err)
	}
	// Its port and path are still its own.
	_, err = g.Client().SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: "sleep", AgentId: "agent-001", Port: node.GetPort()})
	if rpc.ReasonOf(err) != rpc.AgentOffline {
		t.Errorf("spawn on an agent that is away: %v", err)
	}

	agent.Signal(syscall.SIGCONT)
	g.AwaitNode(node.GetNodeId(), "to be stopped", func(n *sutrav1.Node) bool { return n.GetPhase() == stopped })
	if left := g.NodeProcesses(); len(left) > 0 {
		t.Errorf("stopped, and its processes are %v", left)
	}
	awaitAgreement(t, g)
}

// A master that was frozen doesn't hold its own silence against the agents.
func TestFrozenMaster(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster("--degraded-after", "5s", "--offline-after", "8s")
	agents := []*harness.Process{g.StartAgent("agent-001", manyProfiles), g.StartAgent("agent-002", manyProfiles)}
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep", AgentId: "agent-001"})

	master.Signal(syscall.SIGSTOP)
	for _, a := range agents {
		harness.Await(t, "a beat to be missed", func() error { return logSays(a, "heartbeat missed") })
	}
	// A call's own 5 s make the standstill longer than the OFFLINE window.
	_, err := g.Client().ListAgents(t.Context(), &sutrav1.ListAgentsRequest{})
	if rpc.ReasonOf(err) != rpc.TimedOut {
		t.Errorf("a call to a frozen master: %v", err)
	}
	master.Signal(syscall.SIGCONT)

	if _, err := caller(t, g).SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: "sleep", AgentId: "agent-002"}); err != nil {
		t.Errorf("the first spawn after the standstill: %v", err)
	}
	for _, a := range agents {
		harness.Await(t, a.Name+" to be heard again", func() error { return logSays(a, "the master answers again") })
	}
	if err := logSays(master, "this master stood still"); err != nil {
		t.Error(err)
	}
	for _, word := range []string{`"to":"degraded"`, `"to":"offline"`} {
		if strings.Contains(string(master.Log()), word) {
			t.Errorf("the master blamed an agent: its log has %s", word)
		}
	}
	g.AwaitNode(node.GetNodeId(), "to have run on", func(n *sutrav1.Node) bool { return n.GetPhase() == running && n.GetPid() == node.GetPid() })
	awaitAgreement(t, g)
}

// On a full disk the master refuses what it can't write down, answers all else, and goes on by itself.
func TestFullDiskOfTheMaster(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	home := filepath.Join(g.Home, "master")
	harness.SmallDisk(t, home, 320)
	master := g.StartMaster()
	g.StartAgent("agent-001", manyProfiles)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})

	free := harness.FillDisk(t, home, 1<<20)
	refused := func(what string, err error) {
		t.Helper()
		e := rpc.AsError(err)
		if rpc.ReasonOf(err) != rpc.DiskFull || !strings.Contains(e.Error(), home) || !strings.Contains(e.Error(), "nothing was changed") ||
			!strings.Contains(e.Hint, "free some space") {
			t.Errorf("%s on a full disk: %v", what, err)
		}
	}
	_, err := g.Client().SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: "sleep", RequestId: "wish"})
	refused("spawn", err)
	_, err = g.Client().StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: node.GetNodeId()})
	refused("stop", err)
	if ids := awaitAgreement(t, g); len(ids) != 1 || ids[0] != node.GetNodeId() {
		t.Errorf("nodes after the refusals: %v", ids)
	}
	killNode(t, g, node)
	g.AwaitNode(node.GetNodeId(), "to be restarted", func(n *sutrav1.Node) bool {
		return n.GetPhase() == running && n.GetRestartCount() == 1 && n.GetDesired() == sutrav1.Desired_DESIRED_RUNNING
	})

	free()
	if !master.Running() {
		t.Fatal("the master has ended")
	}
	again := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep", RequestId: "wish"})
	stopAll(t, g, []string{node.GetNodeId()})
	master.Kill()
	g.StartMaster()
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	if ids := awaitAgreement(t, g); len(ids) != 1 || ids[0] != again.GetNodeId() {
		t.Errorf("nodes in the end: %v", ids)
	}
}

// On a full disk an agent refuses a spawn and leaves nothing of it; a server there refuses writes and lives on.
func TestFullDiskOfAnAgent(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	home := filepath.Join(g.Home, "agents", "agent-001")
	harness.SmallDisk(t, home, 16)
	g.StartMaster()
	agent := g.StartAgent("agent-001", manyProfiles)
	others := spawnMany(t, g, 2, &sutrav1.SpawnNodeRequest{Profile: "sleep"})
	node := g.Spawn(&sutrav1.SpawnNodeRequest{MemoryLimitMb: 256}) // of which its files, on a disk in memory, take their part
	putKey(t, node.GetEndpoint(), "k", "v")
	found := func() []string {
		var paths []string
		for _, pattern := range []string{"data/*", "logs/*"} {
			names, err := filepath.Glob(filepath.Join(home, pattern))
			if err != nil {
				t.Fatal(err)
			}
			paths = append(paths, names...)
		}
		return paths
	}
	before := found()
	put := func() (code int, body string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+node.GetEndpoint()+"/kv/big",
			strings.NewReader(strings.Repeat("x", 4<<20)))
		if err != nil {
			t.Fatal(err)
		}
		return do(t, req)
	}

	free := harness.FillDisk(t, home, 0)
	for _, profile := range []string{"", "sleep"} {
		_, err := g.Client().SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: profile})
		if e := rpc.AsError(err); rpc.ReasonOf(err) != rpc.DiskFull || !strings.Contains(e.Error(), home) || !strings.Contains(e.Hint, "df -h") {
			t.Errorf("spawn of profile %q on a full disk: %v", profile, err)
		}
	}
	if after := found(); strings.Join(after, " ") != strings.Join(before, " ") {
		t.Errorf("the refused spawns left files: %q, before %q", after, before)
	}
	if all := g.Nodes(true); len(all) != 3 {
		t.Errorf("the refused spawns left nodes: %v", all)
	}
	if code, body := put(); code != http.StatusInsufficientStorage {
		t.Errorf("PUT on a full disk: %d %s", code, body)
	}
	if got := getKey(t, node.GetEndpoint(), "k"); got != "v" {
		t.Errorf("key is %q on a full disk", got)
	}
	// The next agent starts there, too, and looks after all of them.
	agent.Kill()
	agent = restarted(t, g, "agent-001", "full")
	takenUp(t, g, append([]*sutrav1.Node{node}, others...))
	// So does one whose records are damaged as well.
	agent.Kill()
	records, err := os.OpenFile(filepath.Join(home, "nodes.db"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = records.Write(bytes.Repeat([]byte("damage"), 2000)) // over what is there: that takes no space
	if err := errors.Join(err, records.Close()); err != nil {
		t.Fatal(err)
	}
	if err := logSays(restarted(t, g, "agent-001", "full and damaged"), "removed: the disk is full"); err != nil {
		t.Error(err)
	}
	takenUp(t, g, append([]*sutrav1.Node{node}, others...))
	killNode(t, g, others[0])
	g.AwaitNode(others[0].GetNodeId(), "to be restarted", func(n *sutrav1.Node) bool { return n.GetPhase() == running && n.GetRestartCount() == 1 })
	stopAll(t, g, []string{others[1].GetNodeId()})

	free()
	if code, body := put(); code != http.StatusNoContent {
		t.Errorf("PUT with space again: %d %s", code, body)
	}
	g.Spawn(&sutrav1.SpawnNodeRequest{})
	g.AwaitNode(node.GetNodeId(), "to have lived on", func(n *sutrav1.Node) bool {
		return n.GetPhase() == running && n.GetPid() == node.GetPid() && n.GetRestartCount() == 0
	})
	awaitAgreement(t, g)
}

// A node that crashes at every start is shown as CRASH_LOOP with the reason, and runs once its trouble is over.
func TestCrashLoop(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", manyProfiles+`
[storage.profiles.moody]
storage_binary = "/bin/sh"
args = ["-c", "if [ -e bad ]; then echo 'in a bad mood'; exit 3; fi; exec sleep 100000"]
ready = "none"
`)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "moody"})
	bad := filepath.Join(node.GetStoragePath(), "bad")
	if err := os.WriteFile(bad, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	killNode(t, g, node)
	g.AwaitNode(node.GetNodeId(), "to be in a crash loop", func(n *sutrav1.Node) bool {
		return n.GetPhase() == crashLoop && strings.Contains(n.GetReason(), "exit code 3") && n.GetLastExit().GetCode() == 3 &&
			strings.Contains(n.GetLastExit().GetOutput(), "in a bad mood") && n.GetRestartCount() >= 4 && n.GetPid() == 0
	})
	status, err := g.Client().GetClusterStatus(t.Context(), &sutrav1.GetClusterStatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if status.GetHealth() != sutrav1.ClusterHealth_CLUSTER_HEALTH_DEGRADED {
		t.Errorf("a grid with a node in a crash loop is %v", status)
	}
	if err := os.Remove(bad); err != nil {
		t.Fatal(err)
	}
	back := g.AwaitNode(node.GetNodeId(), "to run again", func(n *sutrav1.Node) bool { return n.GetPhase() == running })
	if back.GetRestartCount() < 5 || back.GetReason() != "" || back.GetPid() == node.GetPid() {
		t.Errorf("after the crash loop: %v", back)
	}
	awaitAgreement(t, g)
}

// A stop ends all that a node has started, also what doesn't listen to the stop signal.
func TestStopEndsGrandchildren(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", manyProfiles+`
[storage.profiles.parent]
storage_binary = "/bin/sh"
args = ["-c", "sleep 100000 & (trap '' TERM; exec sleep 100001) & wait"]
ready = "none"
stop_grace_secs = 1
`)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "parent"})
	family := func(want int) {
		t.Helper()
		harness.Await(t, "the family to be whole", func() error {
			if p := g.NodeProcesses(); len(p) < want {
				return fmt.Errorf("processes: %v", p)
			}
			return nil
		})
	}
	family(3) // the shell, its child, and one that doesn't listen
	killNode(t, g, node)
	again := g.AwaitNode(node.GetNodeId(), "to be restarted", func(n *sutrav1.Node) bool {
		return n.GetPhase() == running && n.GetRestartCount() == 1
	})
	family(3)
	if n := len(g.NodeProcesses()); n != 3 {
		t.Errorf("%d processes after the restart: the first family wasn't ended", n)
	}
	stopAll(t, g, []string{again.GetNodeId()})
	if left := g.NodeProcesses(); len(left) > 0 {
		t.Errorf("stopped, and left %v", left)
	}
}
