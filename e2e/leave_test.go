package e2e_test

import (
	"strings"
	"testing"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// An agent that ends in good order without a node is waited for by nobody, also after the master's restart; one with a
// node is OFFLINE, and its slots are no capacity.
func TestAgentsLeave(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	g.StartAgent("stays", sleepProfile)
	bare, needed := g.StartAgent("bare", sleepProfile), g.StartAgent("needed", sleepProfile)
	done := g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: "bare", Profile: "sleep"})
	g.MustRun("stop", "-n", done.GetNodeId())
	node := g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: "needed", Profile: "sleep"})

	status := func() *sutrav1.GetClusterStatusResponse {
		t.Helper()
		resp, err := g.Client().GetClusterStatus(t.Context(), &sutrav1.GetClusterStatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	each := status().GetMaxNodes() / 3
	bare.Stop()
	if s := status(); s.GetHealth() != sutrav1.ClusterHealth_CLUSTER_HEALTH_HEALTHY || s.GetMaxNodes() != 2*each {
		t.Errorf("without an agent that had no node: %v", s)
	}
	if log := string(master.Log()); strings.Contains(log, "agent is offline") || !strings.Contains(log, "agent took its leave") {
		t.Errorf("the master takes a leave for a loss:\n%s", log)
	}
	needed.Stop()
	if s := status(); s.GetHealth() != sutrav1.ClusterHealth_CLUSTER_HEALTH_DEGRADED || s.GetMaxNodes() != each {
		t.Errorf("without an agent that has a node: %v", s)
	}
	master.Stop()
	g.StartMaster()
	if out := g.MustRun("list-agents"); strings.Contains(out, "bare") || !strings.Contains(out, "needed") {
		t.Errorf("after the master's restart:\n%s", out)
	}
	g.StartAgent("bare", sleepProfile)
	g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: "bare", Profile: "sleep"})
	g.StartAgent("needed", sleepProfile)
	g.AwaitNode(node.GetNodeId(), "to be taken up", func(n *sutrav1.Node) bool { return n.GetPhase() == running })
	g.AwaitAgent("stays", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	if s := status(); s.GetHealth() != sutrav1.ClusterHealth_CLUSTER_HEALTH_HEALTHY || s.GetMaxNodes() != 3*each {
		t.Errorf("with all agents back: %v", s)
	}
}
