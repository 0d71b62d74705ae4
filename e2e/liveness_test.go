package e2e_test

import (
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

const sleepProfile = `
max_nodes = 50
default_memory_mb = 64
[storage.profiles.sleep]
storage_binary = "/bin/sleep"
args = ["100000"]
ready = "none"
`

// Three agents of one machine; one is frozen, found DEGRADED and OFFLINE, and comes back.
func TestFrozenAgent(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster("--degraded-after", "3s", "--offline-after", "6s")
	ids := []string{"agent-001", "agent-002", "agent-003"}
	agents := map[string]*harness.Process{}
	for _, id := range ids {
		agents[id] = g.StartAgent(id, sleepProfile+"[monitoring]\nheartbeat_interval_secs = 1\n")
	}
	nodes := map[string]*sutrav1.Node{}
	for _, id := range ids {
		nodes[id] = g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: id, Profile: "sleep"})
		g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: id, Profile: "sleep"})
	}
	healths := func() map[string]string {
		resp, err := g.Client().ListAgents(t.Context(), &sutrav1.ListAgentsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]string{}
		for _, a := range resp.GetAgents() {
			found[a.GetAgentId()] = a.GetHealth().Word()
			if a.GetNodeCount() != 2 {
				t.Errorf("%s holds %d nodes, want 2", a.GetAgentId(), a.GetNodeCount())
			}
		}
		return found
	}
	if diff := cmp.Diff(map[string]string{"agent-001": "HEALTHY", "agent-002": "HEALTHY", "agent-003": "HEALTHY"}, healths()); diff != "" {
		t.Errorf("agents (-want +got):\n%s", diff)
	}

	const frozen = "agent-002"
	agents[frozen].Signal(syscall.SIGSTOP)
	g.AwaitAgent(frozen, sutrav1.AgentHealth_AGENT_HEALTH_DEGRADED)
	g.AwaitAgent(frozen, sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)
	if diff := cmp.Diff(map[string]string{"agent-001": "HEALTHY", frozen: "OFFLINE", "agent-003": "HEALTHY"}, healths()); diff != "" {
		t.Errorf("agents while one is frozen (-want +got):\n%s", diff)
	}
	resp, err := g.Client().GetNodeStatus(t.Context(), &sutrav1.GetNodeStatusRequest{NodeId: nodes[frozen].GetNodeId()})
	if err != nil {
		t.Fatal(err)
	}
	if n := resp.GetNode(); resp.GetSource() != sutrav1.Source_SOURCE_CACHED || n.GetPhase() != sutrav1.Phase_PHASE_UNKNOWN ||
		n.GetPid() != nodes[frozen].GetPid() || !resp.GetObservedAt().IsValid() || !strings.Contains(resp.GetReason(), "OFFLINE") ||
		!strings.Contains(n.GetReason(), "last seen RUNNING") {
		t.Errorf("status from a frozen agent: %v", resp)
	}

	agents[frozen].Signal(syscall.SIGCONT)
	g.AwaitAgent(frozen, sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	for id, n := range nodes {
		resp, err := g.Client().GetNodeStatus(t.Context(), &sutrav1.GetNodeStatusRequest{NodeId: n.GetNodeId()})
		if err != nil {
			t.Fatal(err)
		}
		if resp.GetSource() != sutrav1.Source_SOURCE_LIVE || resp.GetNode().GetPid() != n.GetPid() || resp.GetNode().GetRestartCount() != 0 {
			t.Errorf("node of %s afterwards: %v", id, resp)
		}
	}
}

// The windows that a grid has by default: 15 s and 30 s.
func TestDefaultWindows(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("agent-001", sleepProfile)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	agent.Signal(syscall.SIGSTOP)
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_DEGRADED)
	// Not OFFLINE yet: the agent is asked, can't answer in time, and the last state is given with the reason.
	resp, err := g.Client().GetNodeStatus(t.Context(), &sutrav1.GetNodeStatusRequest{NodeId: node.GetNodeId()})
	if err != nil {
		t.Fatal(err)
	}
	if resp.GetSource() != sutrav1.Source_SOURCE_CACHED || resp.GetNode().GetPhase() != sutrav1.Phase_PHASE_RUNNING ||
		!strings.Contains(resp.GetReason(), "didn't answer in time") {
		t.Errorf("status from a degraded agent: %v", resp)
	}
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)
	agent.Signal(syscall.SIGCONT)
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
}

// An agent that only has the id of another host's is accepted once that is OFFLINE, and isn't given its nodes:
// their data, and maybe their processes, are where the old one was.
func TestReplacedHost(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster("--degraded-after", "2s", "--offline-after", "3s")
	const monitoring = "[monitoring]\nheartbeat_interval_secs = 1\n"
	old := g.StartAgent("agent-001", sleepProfile+monitoring)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	old.Signal(syscall.SIGSTOP)
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)

	other := g.LaunchAgent("other-host", g.AgentFile("agent-001", sleepProfile+monitoring), "--home", g.Dir+"/other", "--join-token", g.TokenFor("agent-001"))
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	shown := g.AwaitNode(node.GetNodeId(), "to be somewhere else", func(n *sutrav1.Node) bool {
		return n.GetPhase() == sutrav1.Phase_PHASE_UNKNOWN && strings.Contains(n.GetReason(), "another one now")
	})
	// Spawns on the new host work, and go through the reconciler's rounds before the old node is looked at.
	g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	if got := g.Nodes(false); len(got) != 2 || len(g.NodeProcesses()) != 2 {
		t.Errorf("nodes %v, processes %v, displaced %v", got, g.NodeProcesses(), shown)
	}
	other.Stop()
	old.Signal(syscall.SIGCONT)
	// The old one is back: it registers again, and what it runs is what was wanted.
	g.AwaitNode(node.GetNodeId(), "to be live with the old pid", func(n *sutrav1.Node) bool {
		return n.GetPhase() == sutrav1.Phase_PHASE_RUNNING && n.GetPid() == node.GetPid()
	})
}
