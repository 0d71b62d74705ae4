// Package reconcile brings what runs to what is wanted: Plan decides, purely;
// Driver carries out.
package reconcile

import (
	"time"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/registry"
)

// Kind is what is to be done about a node.
type Kind string

// The kinds of action.
const (
	// Spawn asks the agent to run a wanted node.
	Spawn Kind = "spawn"
	// Stop asks the agent to end a node that isn't wanted there.
	Stop Kind = "stop"
	// Confirm writes down that a spawn went well, and which port and path it got.
	Confirm Kind = "confirm"
	// Adopt takes in a node that an agent runs and this master has never heard of.
	Adopt Kind = "adopt"
	// Forget removes the record of a spawn that was undone.
	Forget Kind = "forget"
	// Bury writes down that a node has ended.
	Bury Kind = "bury"
)

// Action is one step, and why it is due.
type Action struct {
	Kind    Kind
	NodeID  string
	AgentID string
	Reason  string
}

// Plan returns the steps that are due, in the order of states, at most one a node. What an agent runs is
// only known while it is Settled; before that nothing is concluded from a node's absence.
func Plan(states []registry.NodeState, now time.Time) []Action {
	var actions []Action
	for _, s := range states {
		if s.Busy || now.Before(s.RetryAt) || !s.Settled && !s.Discarded {
			continue
		}
		if kind, reason := decide(s); kind != "" {
			actions = append(actions, Action{Kind: kind, NodeID: s.ID, AgentID: s.AgentID, Reason: reason})
		}
	}
	return actions
}

func decide(s registry.NodeState) (Kind, string) {
	runs := s.Seen != nil
	phase := s.Seen.GetPhase()
	completed := s.Seen.GetCompleted()
	failed := phase == sutrav1.Phase_PHASE_FAILED
	wanted := s.Record.GetNode()
	switch {
	case s.Discarded:
		return Forget, "its spawn failed, and the store still has its record"
	case s.Record == nil && s.Removed:
		return Stop, "it was removed while its agent was away"
	case s.Record == nil && completed:
		return Adopt, "it has run to its end at its agent, and the master has no record of it"
	case s.Record == nil && failed:
		return Stop, "it has failed and nobody wants it"
	case s.Record == nil && phase != sutrav1.Phase_PHASE_RUNNING && phase != sutrav1.Phase_PHASE_CRASH_LOOP:
		return "", "" // it may be a spawn that was undone a moment ago: what was once ready is adopted, nothing else
	case s.Record == nil:
		return Adopt, "its agent runs it and the master has no record of it"
	case wanted.Ended() && runs:
		return Stop, "it has ended, and its agent still holds it"
	case wanted.Ended():
		return "", ""
	case wanted.GetDesired() == sutrav1.Desired_DESIRED_STOPPED && runs:
		return Stop, "it is to be stopped and still there"
	case wanted.GetDesired() == sutrav1.Desired_DESIRED_STOPPED:
		return Bury, "it was to be stopped, and its agent doesn't run it"
	case phase == sutrav1.Phase_PHASE_UNKNOWN && runs && !s.Displaced:
		return Spawn, "it is wanted, and runs unsupervised"
	case completed:
		return Bury, "it has run to its end, and its agent doesn't start it again"
	case !runs && s.Displaced:
		return "", "" // its data is on another host, and so may its process be
	case !runs:
		return Spawn, "it is wanted, and its agent doesn't run it"
	case failed && !s.Record.GetConfirmed():
		return Bury, "it died before it was ever ready"
	case failed:
		return Spawn, "it is wanted, and died when it was started again"
	case !s.Record.GetConfirmed() && phase == sutrav1.Phase_PHASE_RUNNING:
		return Confirm, "it runs, and that isn't written down yet"
	}
	return "", ""
}
