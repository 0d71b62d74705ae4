package master

import (
	"context"
	"time"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// RestartNode: ask the agent how often the node was started, and have it started once more than that. The call to the
// agent may be tried again with the same effect; this one can't, for it would ask anew.
func (s *service) RestartNode(ctx context.Context, req *sutrav1.RestartNodeRequest) (*sutrav1.RestartNodeResponse, error) {
	id := req.GetNodeId()
	view, ok, err := s.asked(id, req.GetAgentId())
	switch {
	case err != nil:
		return nil, err
	case !ok:
		return nil, s.notFound(id)
	}
	if view.Ended || view.Node.GetDesired() == sutrav1.Desired_DESIRED_STOPPED {
		return nil, rpc.Ended(view.Node)
	}

	defer s.registry.Begin(id)()
	ctx, cancel := detached(ctx)
	defer cancel()
	node, err := s.restart(ctx, id, view.Node.GetAgentId())
	if err != nil {
		return nil, rpc.AsError(err).With("node_id", id).With("agent_id", view.Node.GetAgentId())
	}
	return &sutrav1.RestartNodeResponse{Node: node}, nil
}

func (s *service) restart(ctx context.Context, id, agentID string) (*sutrav1.Node, error) {
	client, err := s.agentClient(agentID)
	if err != nil {
		return nil, err
	}
	is, err := client.GetNodeStatus(ctx, &sutrav1.GridAgentGetNodeStatusRequest{NodeId: id, AgentId: agentID})
	if err != nil {
		return nil, err
	}
	rpc.Begins(ctx, id, agentID)
	resp, err := client.RestartNode(ctx, &sutrav1.GridAgentRestartNodeRequest{
		NodeId: id, AgentId: agentID, RestartCount: is.GetNode().GetRestartCount(),
	})
	if err != nil {
		e := rpc.AsError(err)
		if !rpc.NoEffect(e) && e.Hint == "" {
			e.Message += "; whether node " + id + " was restarted isn't known"
			_ = e.WithHint("its pid and restarts tell: sutra node-status --node %s", id)
		}
		return nil, e
	}
	node := resp.GetNode()
	s.registry.Observe(node, time.Now())
	if view, ok := s.registry.Node(id, time.Now()); ok {
		return view.Node, nil
	}
	return node, nil
}

// onAgent refuses a call that names another agent than the node's.
func onAgent(n *sutrav1.Node, asked string) error {
	is := n.GetAgentId()
	if asked == "" || asked == is {
		return nil
	}
	return rpc.Errorf(rpc.WrongAgent, "node %s is on agent %s, not on %s", n.GetNodeId(), is, asked).
		With("node_id", n.GetNodeId()).With("agent_id", is).WithHint("leave out --agent: the node says where it is")
}
