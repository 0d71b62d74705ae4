package registry

import (
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// View is a node as the master knows it.
type View struct {
	Node *sutrav1.Node
	// Ended: it is recorded as ended for good. A node in trouble is shown as FAILED too, and is wanted still.
	Ended bool
	// Wanted: there is a record of it. Else an agent runs it and nobody here knows why.
	Wanted bool
}

// Node returns a node as it stands now.
func (r *Registry) Node(id string, now time.Time) (View, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	n := r.nodes[id]
	if n == nil || n.discarded {
		return View{}, false
	}
	return r.view(n, now), true
}

// Place is the agent that a node is or was on, also where it was removed, and whether it has ended.
func (r *Registry) Place(id string, now time.Time) (agentID string, ended, ok bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if n := r.nodes[id]; n != nil && !n.discarded {
		return n.agentID, r.view(n, now).Ended, true
	}
	if rec := r.tombs[id]; rec != nil {
		return rec.GetNode().GetAgentId(), true, true
	}
	return "", false, false
}

// Nodes returns the nodes of one agent, or of all where agentID is empty, by id.
func (r *Registry) Nodes(agentID string, ended bool, now time.Time) []View {
	r.mu.RLock()
	defer r.mu.RUnlock()
	nodes := r.nodes
	if agentID != "" {
		nodes = r.on[agentID]
	}
	var views []View
	for _, n := range nodes {
		if !n.discarded && (ended || !n.record.GetNode().Ended()) {
			views = append(views, r.view(n, now))
		}
	}
	slices.SortFunc(views, func(a, b View) int { return byID(a.Node, b.Node) })
	return views
}

// view puts together what is wanted, what was seen and whether the one who saw it can be believed.
func (r *Registry) view(n *node, now time.Time) View {
	wanted := n.record.GetNode()
	if wanted.Ended() {
		ended := proto.CloneOf(wanted)
		ended.ObservedAt = n.record.GetEndedAt()
		return View{Node: ended, Ended: true, Wanted: true}
	}
	var v *sutrav1.Node
	if n.seen != nil {
		v = proto.CloneOf(n.seen)
		v.Usage = n.usage
		v.Desired = sutrav1.Desired_DESIRED_RUNNING
	} else {
		v = proto.CloneOf(wanted)
		v.Phase, v.Reason = sutrav1.Phase_PHASE_STARTING, ""
	}
	switch {
	case wanted != nil:
		v.Desired, v.Generation = wanted.GetDesired(), wanted.GetGeneration()
	case r.tombs[v.GetNodeId()] != nil:
		v.Desired = sutrav1.Desired_DESIRED_STOPPED
	}

	a := r.agents[n.agentID]
	state := health.Unknown
	silence := "not registered"
	if a != nil {
		state, silence = a.live.State(r.awake(now)), a.silence(r.awake(now))
	}
	switch {
	case state == health.Offline || state == health.Unknown:
		last := ""
		if n.seen != nil {
			last = "; the node was last seen " + n.seen.GetPhase().Word()
		}
		v.Phase, v.Health = sutrav1.Phase_PHASE_UNKNOWN, 0
		v.Reason = "agent " + n.agentID + " is " + healthOf(state).Word() + ", " + silence + last
	case v.GetDesired() == sutrav1.Desired_DESIRED_STOPPED:
		v.Phase = sutrav1.Phase_PHASE_STOPPING
	case n.seen == nil && n.displaced(a):
		v.Phase, v.Reason = sutrav1.Phase_PHASE_UNKNOWN, "agent "+n.agentID+" is another one now, on "+a.info.GetHostname()+
			"; the node's data is where the old one was. Bring that back, or stop the node"
	case n.seen == nil && n.trouble != "":
		v.Phase, v.Reason = sutrav1.Phase_PHASE_FAILED, n.trouble+"; it is tried again"
	case n.seen == nil && n.busy == 0:
		v.Reason = "its agent doesn't run it yet"
	}
	v.ObservedAt = nil
	if at := n.observedAt(a); !at.IsZero() {
		v.ObservedAt = timestamppb.New(at)
	}
	return View{Node: v, Wanted: wanted != nil}
}

// observedAt is when the node's agent last said, or let stand, what was seen; zero where it never did. A beat says
// only what changed, and so confirms the rest.
func (n *node) observedAt(a *agent) time.Time {
	if n.seen == nil || a == nil || !a.inventory || a.lastBeat.Before(n.seenAt) {
		return n.seenAt
	}
	return a.lastBeat
}

// displaced tells whether an agent isn't the one that the node was placed on.
func (n *node) displaced(a *agent) bool {
	placed := n.record.GetInstanceId()
	return placed != "" && a != nil && a.info != nil && a.info.GetInstanceId() != placed
}

// NodeState is a node as the reconciler looks at it.
type NodeState struct {
	ID      string
	AgentID string
	Record  *sutrav1.NodeRecord // nil: not wanted by anybody
	Seen    *sutrav1.Node       // nil: its agent doesn't run it, if Settled
	// Settled: the agent can be called and has said everything that it runs.
	Settled bool
	// Busy: somebody is at it.
	Busy bool
	// Removed: there is a tombstone.
	Removed bool
	// Discarded: only its record is left, to be removed.
	Discarded bool
	// Displaced: the agent isn't the one that the node was placed on, it only has its id.
	Displaced bool
	RetryAt   time.Time
}

// States returns all nodes for the reconciler, by id.
func (r *Registry) States(now time.Time) []NodeState {
	r.mu.RLock()
	defer r.mu.RUnlock()
	all := make([]NodeState, 0, len(r.nodes))
	for _, id := range sorted(r.nodes) {
		n := r.nodes[id]
		a := r.agents[n.agentID]
		all = append(all, NodeState{
			ID: id, AgentID: n.agentID, Record: n.record, Seen: n.seen, Busy: n.busy > 0, RetryAt: n.retryAt,
			Removed:   n.record == nil && r.tombs[id] != nil,
			Displaced: n.displaced(a),
			Discarded: n.discarded,
			Settled:   a != nil && a.inventory && a.callable(r.awake(now)) == nil,
		})
	}
	return all
}

// Candidate is an agent as placement looks at it.
type Candidate struct {
	Agent *sutrav1.Agent
	State health.State
	// Slots are the nodes that hold a slot there.
	Slots []*sutrav1.Node
}

// Candidates returns all agents for placement, by id.
func (r *Registry) Candidates(now time.Time) []Candidate {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var all []Candidate
	for _, id := range sorted(r.agents) {
		if a := r.agents[id]; a.info != nil {
			all = append(all, Candidate{Agent: a.info, State: a.live.State(r.awake(now)), Slots: r.slots(id)})
		}
	}
	return all
}
