package master

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// StopNode: persist that the node is to be stopped, have its agent end it, write down how it ended.
func (s *service) StopNode(ctx context.Context, req *sutrav1.StopNodeRequest) (*sutrav1.StopNodeResponse, error) {
	id := req.GetNodeId()
	view, ok, err := s.asked(id, req.GetAgentId())
	switch {
	case err != nil:
		return nil, err
	case !ok:
		return &sutrav1.StopNodeResponse{AlreadyStopped: true}, nil
	}
	if !view.Wanted {
		resp, wanted, err := s.stopUnrecorded(ctx, view.Node)
		if err != nil || !wanted {
			return resp, err
		}
		// It was adopted meanwhile.
		if view, ok = s.registry.Node(id, time.Now()); !ok {
			return &sutrav1.StopNodeResponse{AlreadyStopped: true}, nil
		}
	}
	if view.Ended {
		return &sutrav1.StopNodeResponse{Node: view.Node, AlreadyStopped: true}, nil
	}

	defer s.registry.Begin(id)()
	ctx, cancel := detached(ctx)
	defer cancel()
	rec, err := s.change(ctx, id, func(rec *sutrav1.NodeRecord) bool {
		if rec.GetNode().GetDesired() == sutrav1.Desired_DESIRED_STOPPED {
			return false
		}
		rec.Node.Desired = sutrav1.Desired_DESIRED_STOPPED
		rec.Node.Generation++
		return true
	})
	if rpc.ReasonOf(err) == rpc.NodeNotFound {
		return &sutrav1.StopNodeResponse{AlreadyStopped: true}, nil // its spawn was undone at this moment
	}
	if err != nil {
		return nil, err
	}
	rpc.Begins(ctx, id, rec.GetNode().GetAgentId())
	node, err := s.stop(ctx, rec)
	if err != nil {
		e := rpc.AsError(err).With("node_id", id)
		if !rpc.Refused(e) {
			e.Message += "; the stop is noted and will be done"
			_ = e.WithHint("see how far it is: sutra node-status --node %s", id)
		}
		return nil, e
	}
	return &sutrav1.StopNodeResponse{Node: node}, nil
}

// stopUnrecorded ends a node that its agent runs and this master has no record of. Its tombstone keeps it from being
// adopted. wanted tells that there is a record by now, and that nothing was done.
func (s *service) stopUnrecorded(ctx context.Context, node *sutrav1.Node) (resp *sutrav1.StopNodeResponse, wanted bool, err error) {
	id := node.GetNodeId()
	release, ok, err := s.registry.Ticket(ctx, id)
	if err != nil {
		return nil, false, tooLate(id)
	}
	if !ok {
		return &sutrav1.StopNodeResponse{AlreadyStopped: true}, false, nil
	}
	if _, wanted := s.registry.Record(id); wanted {
		release()
		return nil, true, nil
	}
	rec := &sutrav1.NodeRecord{Node: proto.CloneOf(node), EndedAt: timestamppb.Now()}
	err = s.store.BuryNode(ctx, rec)
	if err == nil {
		s.registry.Bury(rec)
	}
	release()
	if err != nil {
		return nil, false, persisted(err)
	}
	ctx, cancel := detached(ctx)
	defer cancel()
	rpc.Begins(ctx, id, node.GetAgentId())
	last, err := s.stopAtAgent(ctx, id, node.GetAgentId())
	if err != nil {
		return nil, false, rpc.AsError(err).With("node_id", id)
	}
	return &sutrav1.StopNodeResponse{Node: last, AlreadyStopped: last == nil}, false, nil
}

// stop has the agent end a node that is recorded as to be stopped. To call it again is safe.
func (s *service) stop(ctx context.Context, rec *sutrav1.NodeRecord) (*sutrav1.Node, error) {
	id := rec.GetNode().GetNodeId()
	last, err := s.stopAtAgent(ctx, id, rec.GetNode().GetAgentId())
	if err != nil {
		return nil, err
	}
	as := &sutrav1.Node{Phase: sutrav1.Phase_PHASE_STOPPED, LastExit: last.GetLastExit(), RestartCount: last.GetRestartCount()}
	if last.GetCompleted() {
		as = last // there was nothing to stop
	}
	ended, err := s.endAs(ctx, id, as)
	if err != nil {
		return nil, err
	}
	return ended.GetNode(), nil
}

// stopAtAgent ends whatever the agent runs under an id, and returns its last state; nil where it ran nothing.
func (s *service) stopAtAgent(ctx context.Context, id, agentID string) (*sutrav1.Node, error) {
	client, err := s.agentClient(agentID)
	if err != nil {
		return nil, err
	}
	resp, err := client.StopNode(ctx, &sutrav1.GridAgentStopNodeRequest{NodeId: id, AgentId: agentID})
	if err != nil {
		return nil, err
	}
	s.registry.Gone(id)
	return resp.GetNode(), nil
}

// RemoveNode replaces an ended node's record by its tombstone.
func (s *service) RemoveNode(ctx context.Context, req *sutrav1.RemoveNodeRequest) (*sutrav1.RemoveNodeResponse, error) {
	id := req.GetNodeId()
	var bad checks
	bad.id("node_id", id)
	if err := bad.err(); err != nil {
		return nil, err
	}
	release, ok, err := s.registry.Ticket(ctx, id)
	if err != nil {
		return nil, tooLate(id)
	}
	if !ok {
		return &sutrav1.RemoveNodeResponse{AlreadyRemoved: true}, nil
	}
	defer release()
	rec, ok := s.registry.Record(id)
	if !ok || !rec.GetNode().Ended() {
		return nil, rpc.Errorf(rpc.NodeStillLive, "node %s hasn't ended", id).With("node_id", id).
			WithHint("stop it first: sutra stop --node %s", id)
	}
	if err := s.store.BuryNode(ctx, rec); err != nil {
		return nil, persisted(err)
	}
	s.registry.Bury(rec)
	return &sutrav1.RemoveNodeResponse{}, nil
}
