package master

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/registry"
	"github.com/sutra-grid/sutra/rpc"
)

// cleanupTime bounds what is written down although the call's own time is over.
const cleanupTime = 5 * time.Second

// change replaces a node's record, on disk and then in memory, by what edit makes of a copy; it writes
// nothing where edit returns false. It returns the record that is in force afterwards. Changes of one node
// follow each other; those of different nodes share etcd's batches.
func (s *service) change(ctx context.Context, id string, edit func(rec *sutrav1.NodeRecord) bool) (*sutrav1.NodeRecord, error) {
	release, ok, err := s.registry.Ticket(ctx, id)
	if err != nil {
		return nil, tooLate(id)
	}
	if !ok {
		return nil, nodeNotFound(id)
	}
	defer release()
	current, ok := s.registry.Record(id)
	if !ok {
		return nil, nodeNotFound(id)
	}
	next := proto.CloneOf(current)
	if !edit(next) {
		return current, nil
	}
	if err := s.store.SaveNode(ctx, next); err != nil {
		return nil, persisted(err)
	}
	s.registry.Put(next)
	return next, nil
}

// end writes down that a node has ended, and how.
func (s *service) end(ctx context.Context, id string, phase sutrav1.Phase, exit *sutrav1.Exit, reason string) (*sutrav1.NodeRecord, error) {
	return s.endAs(ctx, id, &sutrav1.Node{Phase: phase, LastExit: exit, Reason: reason})
}

// endAs writes down that a node has ended, as its agent has seen that.
func (s *service) endAs(ctx context.Context, id string, seen *sutrav1.Node) (*sutrav1.NodeRecord, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	return s.change(ctx, id, func(rec *sutrav1.NodeRecord) bool {
		n := rec.GetNode()
		if n.Ended() {
			return false
		}
		n.Phase, n.Desired, n.LastExit, n.Reason = seen.GetPhase(), sutrav1.Desired_DESIRED_STOPPED, seen.GetLastExit(), seen.GetReason()
		n.Completed, n.RestartCount = seen.GetCompleted(), seen.GetRestartCount()
		if n.GetPort() == 0 { // it ended before it was confirmed
			n.Port, n.StoragePath = seen.GetPort(), seen.GetStoragePath()
		}
		n.Generation++
		rec.EndedAt = timestamppb.Now()
		return true
	})
}

// undo removes a node that isn't and won't be, without a trace, unless it was stopped meanwhile: then
// whoever stops it brings it to its end.
func (s *service) undo(ctx context.Context, id string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	release, ok, err := s.registry.Ticket(ctx, id)
	if err != nil || !ok {
		return
	}
	defer release()
	rec, ok := s.registry.Record(id)
	if !ok || rec.GetConfirmed() || rec.GetNode().GetDesired() != sutrav1.Desired_DESIRED_RUNNING {
		return
	}
	if err := s.store.ForgetNode(ctx, id); err != nil {
		s.log.Warn().Err(err).Str("node_id", id).Msg("record of a failed spawn not removed yet; trying on")
		s.registry.Discard(id)
		return
	}
	s.registry.Drop(id)
}

// tooLate is the error of a call whose time ran out while it waited for another one on the same node.
func tooLate(id string) *rpc.Error {
	return rpc.Errorf(rpc.TimedOut, "another call on node %s took all of this one's time", id).With("node_id", id).
		WithHint("see what it does: sutra node-status --node %s", id)
}

// asked finds the node that a request names, and the agent that it may name with it. ok is false where there is no such node.
func (s *service) asked(id, agentID string) (view registry.View, ok bool, err error) {
	var bad checks
	bad.id("node_id", id)
	if agentID != "" {
		bad.id("agent_id", agentID)
	}
	if err := bad.err(); err != nil {
		return view, false, err
	}
	if view, ok = s.registry.Node(id, time.Now()); ok {
		err = onAgent(view.Node, agentID)
	}
	return view, ok, err
}

// notFound is the error of a call for a node that isn't there, or not any more.
func (s *service) notFound(id string) *rpc.Error {
	if !s.registry.Removed(id) {
		return nodeNotFound(id)
	}
	return rpc.Errorf(rpc.NodeNotFound, "node %s was removed", id).With("node_id", id).
		WithHint("its log is kept for a while: sutra logs --node %s   see which nodes there are: sutra list-nodes --all", id)
}

func nodeNotFound(id string) *rpc.Error {
	return rpc.Errorf(rpc.NodeNotFound, "there is no node %s", id).With("node_id", id).
		WithHint("see which nodes there are: sutra list-nodes --all")
}
