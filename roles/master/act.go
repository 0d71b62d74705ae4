package master

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/reconcile"
	"github.com/sutra-grid/sutra/rpc"
)

var _ reconcile.Actor = (*service)(nil)

// Act carries out one step of the reconciler.
func (s *service) Act(ctx context.Context, a reconcile.Action) error {
	rec, recorded := s.registry.Record(a.NodeID)
	switch a.Kind {
	case reconcile.Spawn:
		return s.respawn(ctx, rec)
	case reconcile.Stop:
		if recorded && !rec.GetNode().Ended() {
			_, err := s.stop(ctx, rec)
			return err
		}
		_, err := s.stopAtAgent(ctx, a.NodeID, a.AgentID)
		return err
	case reconcile.Confirm:
		view, _ := s.registry.Node(a.NodeID, time.Now())
		_, err := s.change(ctx, a.NodeID, func(rec *sutrav1.NodeRecord) bool {
			if view.Node.GetPhase() != sutrav1.Phase_PHASE_RUNNING {
				return false // it ended since the plan was made
			}
			rec.Confirmed = true
			rec.Node.Port, rec.Node.StoragePath = view.Node.GetPort(), view.Node.GetStoragePath()
			return true
		})
		return err
	case reconcile.Adopt:
		return s.adopt(ctx, a.NodeID)
	case reconcile.Forget:
		if err := s.store.ForgetNode(ctx, a.NodeID); err != nil {
			return persisted(err)
		}
		s.registry.Drop(a.NodeID)
		return nil
	case reconcile.Bury:
		return s.settle(ctx, rec)
	default:
		return fmt.Errorf("no such action: %s", a.Kind)
	}
}

// respawn runs a wanted node that its agent doesn't. One that was never confirmed and turns out to be
// impossible ends as FAILED: its caller was told to look later.
func (s *service) respawn(ctx context.Context, rec *sutrav1.NodeRecord) error {
	_, err := s.spawn(ctx, rec)
	switch {
	case rpc.ReasonOf(err) == rpc.StoppedMeanwhile:
		return nil // whoever stopped it brings it to its end
	case !rpc.Refused(err) || rec.GetConfirmed():
		return err
	}
	_, ending := s.end(ctx, rec.GetNode().GetNodeId(), sutrav1.Phase_PHASE_FAILED, rpc.AsError(err).Exit, err.Error())
	return ending
}

// settle writes down the end of a node that its agent has no process of any more. What became of one that was wanted
// its agent says.
func (s *service) settle(ctx context.Context, rec *sutrav1.NodeRecord) error {
	id := rec.GetNode().GetNodeId()
	if rec.GetNode().GetDesired() == sutrav1.Desired_DESIRED_STOPPED {
		_, err := s.end(ctx, id, sutrav1.Phase_PHASE_STOPPED, nil, "")
		return err
	}
	view, ok := s.registry.Node(id, time.Now())
	if seen := view.Node; !ok || !seen.GetCompleted() && (rec.GetConfirmed() || seen.GetPhase() != sutrav1.Phase_PHASE_FAILED) {
		return nil // it has changed since the plan was made
	}
	_, err := s.endAs(ctx, id, view.Node)
	return err
}

// adopt records a node that an agent runs: this master lost its disk, or is a new one.
func (s *service) adopt(ctx context.Context, id string) error {
	release, ok, err := s.registry.Ticket(ctx, id)
	if err != nil {
		return tooLate(id)
	}
	if !ok {
		return nil
	}
	defer release()
	view, ok := s.registry.Node(id, time.Now())
	if !ok || view.Wanted || s.registry.Removed(id) {
		return nil // somebody has stopped it since the plan was made
	}
	n := view.Node
	agent, _ := s.registry.Callable(n.GetAgentId(), time.Now()) // where it can't be called just now, it is known all the same
	rec := &sutrav1.NodeRecord{Node: &sutrav1.Node{
		NodeId: id, AgentId: n.GetAgentId(), Profile: n.GetProfile(), Port: n.GetPort(), StoragePath: n.GetStoragePath(),
		MemoryLimitMb: n.GetMemoryLimitMb(), Desired: sutrav1.Desired_DESIRED_RUNNING, Generation: max(n.GetGeneration(), 1),
	}, Confirmed: true, CreatedAt: timestamppb.Now(), InstanceId: agent.GetInstanceId()}
	if err := s.store.SaveNode(ctx, rec); err != nil {
		return persisted(err)
	}
	s.registry.Put(rec)
	return nil
}
