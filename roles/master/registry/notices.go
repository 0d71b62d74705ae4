package registry

import (
	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// told is what was last told of a node: its phase, and the process that had it; 0: none, or nobody knows.
type told struct {
	phase sutrav1.Phase
	pid   int32
}

// show notes an agent's health, and tells of it where it is another than before. Needs mu.
func (r *Registry) show(id string, a *agent, to health.State, why string) {
	from := a.shown
	if a.shown = to; from == to || r.notice == nil {
		return
	}
	r.notice(&sutrav1.Event{About: &sutrav1.Event_Agent{Agent: &sutrav1.AgentEvent{
		AgentId: rpc.Tellable(id), From: healthOf(from), To: healthOf(to), Why: rpc.Tellable(why),
	}}})
}

// tell tells of a node's phase where it is another than before, or where another process runs. An end that is on record is
// the last word; until then what counts is what its agent says. That it says nothing any more is no phase: what became of the
// node will be told. Needs mu.
func (r *Registry) tell(id string, n *node) {
	is := n.seen
	if n.record.GetNode().Ended() {
		is = n.record.GetNode()
	}
	if is == nil {
		return
	}
	another := is.GetPhase() == sutrav1.Phase_PHASE_RUNNING && n.told.pid != 0 && n.told.pid != is.GetPid()
	if is.GetPhase() == n.told.phase && !another {
		n.told.pid = is.GetPid()
		return
	}
	reason := is.GetReason()
	if reason == "" && is.Ended() && is.GetLastExit() != nil {
		reason = is.GetLastExit().Summary()
	}
	r.note(id, n, &sutrav1.NodeEvent{To: is.GetPhase(), Pid: is.GetPid(), RestartCount: is.GetRestartCount(), Reason: reason})
}

// tellGone tells of the end of a node that is forgotten without one on record. Needs mu.
func (r *Registry) tellGone(id string, n *node) {
	switch last := n.told.phase; {
	case last == sutrav1.Phase_PHASE_UNSPECIFIED, last == sutrav1.Phase_PHASE_STOPPED, last == sutrav1.Phase_PHASE_FAILED:
	case n.record != nil:
		r.note(id, n, &sutrav1.NodeEvent{To: sutrav1.Phase_PHASE_FAILED, Reason: "its spawn had no success, and was undone"})
	default:
		r.note(id, n, &sutrav1.NodeEvent{To: sutrav1.Phase_PHASE_STOPPED, Reason: "its agent doesn't run it any more"})
	}
}

// note completes a node's event and sends it off. Needs mu.
func (r *Registry) note(id string, n *node, e *sutrav1.NodeEvent) {
	e.NodeId, e.AgentId, e.From, e.Reason = rpc.Tellable(id), rpc.Tellable(n.agentID), n.told.phase, rpc.Tellable(e.GetReason())
	n.told = told{e.GetTo(), e.GetPid()}
	if r.notice != nil {
		r.notice(&sutrav1.Event{About: &sutrav1.Event_Node{Node: e}})
	}
}
