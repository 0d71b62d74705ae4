package e2e_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// Whatever becomes of the agent's file of records while it is dead: it starts, says so, and takes up what runs.
func TestRecordsSpoiltWhileAgentIsDead(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("agent-001", manyProfiles)
	nodes := append(spawnMany(t, g, 3, &sutrav1.SpawnNodeRequest{Profile: "sleep"}),
		g.Spawn(&sutrav1.SpawnNodeRequest{}), g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "bare"}))
	putKey(t, nodes[3].GetEndpoint(), "k", "v")
	path := filepath.Join(g.Home, "agents", "agent-001", "nodes.db")
	garbage := []byte(strings.Repeat("this is no database. ", 4000))
	for i, c := range []struct {
		name  string
		spoil func(size int64) error
		says  string
	}{
		{"overwritten", func(int64) error { return os.WriteFile(path, garbage, 0o600) }, "damaged"},
		{"cut to its first pages", func(int64) error { return os.Truncate(path, 8192) }, "damaged"},
		{"emptied", func(int64) error { return os.Truncate(path, 0) }, "aren't on record"},
		{"removed", func(int64) error { return os.Remove(path) }, "aren't on record"},
	} {
		agent.Kill()
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.spoil(info.Size()); err != nil {
			t.Fatal(err)
		}
		agent = restarted(t, g, "agent-001", fmt.Sprintf("start-%d", i))
		if err := logSays(agent, c.says); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if ids := awaitAgreement(t, g); len(ids) != len(nodes) {
			t.Errorf("%s: nodes %v", c.name, ids)
		}
		for _, was := range nodes {
			is := g.AwaitNode(was.GetNodeId(), "to be ready", func(n *sutrav1.Node) bool { return n.GetHealth() == sutrav1.NodeHealth_NODE_HEALTH_READY })
			if is.GetPid() != was.GetPid() || is.GetPort() != was.GetPort() || is.GetStoragePath() != was.GetStoragePath() ||
				is.GetMemoryLimitMb() != was.GetMemoryLimitMb() || is.GetProfile() != was.GetProfile() {
				t.Errorf("%s: node was %v\nand is %v", c.name, was, is)
			}
		}
		aside, err := filepath.Glob(path + ".damaged-*")
		if err != nil || (len(aside) > 0) != (c.says == "damaged") {
			t.Errorf("%s: put aside %q, %v", c.name, aside, err)
		}
		for _, a := range aside {
			if err := os.Remove(a); err != nil {
				t.Error(err)
			}
		}
	}
	if got := getKey(t, nodes[3].GetEndpoint(), "k"); got != "v" {
		t.Errorf("key is %q after all that", got)
	}
	// Without its records too, a crash is answered and a stop leaves nothing.
	killNode(t, g, nodes[0])
	g.AwaitNode(nodes[0].GetNodeId(), "to be restarted", func(n *sutrav1.Node) bool { return n.GetPhase() == running && n.GetPid() != nodes[0].GetPid() })
	stoppedForGood(t, g, nodes)
}

// What runs, and is on nobody's record, is shown and can be stopped.
func TestStray(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	agent := g.StartAgent("agent-001", manyProfiles)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "bare"})
	id := node.GetNodeId()
	home := filepath.Join(g.Home, "agents", "agent-001")
	lose := func(all ...string) {
		t.Helper()
		agent.Kill()
		for _, lost := range append(all, filepath.Join(home, "nodes.db"), filepath.Join(home, "wanted")) {
			if err := os.RemoveAll(lost); err != nil {
				t.Fatal(err)
			}
		}
	}
	// While the master wants it, that has it taken up again.
	lose()
	agent = restarted(t, g, "agent-001", "wanted")
	g.AwaitNode(id, "to be taken up", func(n *sutrav1.Node) bool {
		return n.GetPhase() == running && n.GetPid() == node.GetPid() && n.GetPort() == node.GetPort()
	})
	// What it had stopped meanwhile is stopped.
	lose()
	if out := g.Run("stop", "--node", id); out.Code == 0 {
		t.Errorf("stopped without its agent: %s", out.Stdout)
	}
	agent = restarted(t, g, "agent-001", "stopped")
	harness.Await(t, "its end", func() error {
		if p := g.NodeProcesses(); len(p) != 0 {
			return fmt.Errorf("processes: %v", p)
		}
		return nil
	})
	// The master has lost all it knew, too.
	node = g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "bare"})
	id = node.GetNodeId()
	master.Kill()
	lose(filepath.Join(g.Home, "master"))
	g.StartMaster()
	agent = g.LaunchAgent("unknown", filepath.Join(g.Dir, "agent-001.toml"))
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	g.AwaitNode(id, "to be shown", func(n *sutrav1.Node) bool {
		return n.GetPhase() == sutrav1.Phase_PHASE_UNKNOWN && strings.Contains(n.GetReason(), "runs unsupervised")
	})
	if err := logSays(agent, "sutra stop --node "+id); err != nil {
		t.Error(err)
	}
	for _, said := range []string{"stopped", "nothing to stop"} {
		if out := g.MustRun("stop", "--node", id); !strings.Contains(out, said) {
			t.Errorf("the stop says %q, want %q", out, said)
		}
		if p := g.NodeProcesses(); len(p) != 0 {
			t.Errorf("processes: %v", p)
		}
	}
}

// An agent that would take its nodes along when it is stopped leaves them alone when it is refused.
func TestRefusedAgentTakesNoNodesAlong(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster("--degraded-after", "2s", "--offline-after", "3s")
	first := g.StartAgent("agent-001", manyProfiles)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	first.Kill()
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE) // else nobody else gets its id
	file := filepath.Join(g.Dir, "agent-001.toml")
	other := g.LaunchAgent("other", file, "--home", filepath.Join(g.Dir, "other"), "--join-token", g.TokenFor("agent-001"))
	harness.Await(t, "the other one to have the id", func() error { return logSays(other, "registered with the master") })
	refused := g.LaunchAgent("refused", file, "--stop-nodes")
	harness.Await(t, "the refusal", func() error {
		if refused.Running() {
			return fmt.Errorf("it runs:\n%s", refused.Log())
		}
		return logSays(refused, "AGENT_ID_TAKEN")
	})
	if err := syscall.Kill(int(node.GetPid()), 0); err != nil {
		t.Errorf("the node's process: %v", err)
	}
	other.Signal(syscall.SIGTERM)
	other.Wait()
	restarted(t, g, "agent-001", "again")
	stopAll(t, g, []string{node.GetNodeId()})
}
