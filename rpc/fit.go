package rpc

import (
	"path/filepath"
	"strconv"
	"strings"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// Fit tells what keeps a node from running on an agent beside the nodes that hold
// a slot there; nil where nothing does. It is the one rule that the master
// reserves by and the agent admits by: they must refuse the same things in the
// same words.
func Fit(agent *sutrav1.Agent, live []*sutrav1.Node, want *sutrav1.Node) *Error {
	free := agent.GetMemoryTotalMb()
	for _, n := range live {
		free -= min(free, n.GetMemoryLimitMb())
		if n.GetPort() != 0 && n.GetPort() == want.GetPort() {
			return Errorf(PortInUse, "port %d on %s belongs to node %s", want.GetPort(), agent.GetAgentId(), n.GetNodeId()).
				With("node_id", n.GetNodeId()).With("port", strconv.Itoa(int(want.GetPort()))).
				WithHint("leave out the port to get a free one, or stop that node: sutra stop --node %s", n.GetNodeId())
		}
		if Overlap(n.GetStoragePath(), want.GetStoragePath()) {
			return Errorf(PathInUse, "storage path %s on %s is, holds or lies within %s, which belongs to node %s",
				want.GetStoragePath(), agent.GetAgentId(), n.GetStoragePath(), n.GetNodeId()).
				With("node_id", n.GetNodeId()).With("storage_path", n.GetStoragePath()).
				WithHint("choose another path, or stop that node: sutra stop --node %s", n.GetNodeId())
		}
	}
	if len(live) >= int(agent.GetMaxNodes()) {
		return Errorf(AgentFull, "agent %s is full: it runs %d of at most %d nodes", agent.GetAgentId(), len(live), agent.GetMaxNodes()).
			WithHint("stop a node, raise max_nodes in the agent's file, or use another agent: sutra list-agents")
	}
	if total := agent.GetMemoryTotalMb(); total > 0 && want.GetMemoryLimitMb() > free {
		return Errorf(MemoryOverCommitted, "agent %s has %d MiB of memory, %d MiB of it not promised to nodes; this node is to get %d MiB",
			agent.GetAgentId(), total, free, want.GetMemoryLimitMb()).
			WithHint("give the node less with --memory, or use another agent: sutra list-agents")
	}
	return nil
}

// Overlap tells whether one of two absolute paths is the other or lies within it. "" is no path yet.
func Overlap(a, b string) bool {
	if a == "" || b == "" {
		return false
	}
	a, b = filepath.Clean(a), filepath.Clean(b)
	if len(a) > len(b) {
		a, b = b, a
	}
	return a == b || strings.HasPrefix(b, strings.TrimSuffix(a, string(filepath.Separator))+string(filepath.Separator))
}
