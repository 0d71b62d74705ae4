// Package sutrav1 is the contract of master, agent and client: the generated code, and what people call its values.
package sutrav1

import (
	"strconv"
	"strings"
)

// Word is the phase as people write it, for example RUNNING.
func (x Phase) Word() string { return strings.TrimPrefix(x.String(), "PHASE_") }

// Word is the health as people write it, for example READY.
func (x NodeHealth) Word() string { return strings.TrimPrefix(x.String(), "NODE_HEALTH_") }

// Word is the health as people write it, for example OFFLINE.
func (x AgentHealth) Word() string { return strings.TrimPrefix(x.String(), "AGENT_HEALTH_") }

// Word is the health as people write it, for example DEGRADED.
func (x ClusterHealth) Word() string { return strings.TrimPrefix(x.String(), "CLUSTER_HEALTH_") }

// Word is what is wanted as people write it, for example RUNNING.
func (x Desired) Word() string { return strings.TrimPrefix(x.String(), "DESIRED_") }

// Word is the source as people write it, for example LIVE.
func (x Source) Word() string { return strings.TrimPrefix(x.String(), "SOURCE_") }

// Word is whether a limit is enforced, as people write it, for example UNENFORCED.
func (x Enforcement) Word() string { return strings.TrimPrefix(x.String(), "ENFORCEMENT_") }

// Ended tells whether the node holds nothing any more: no process, slot, port or path.
func (x *Node) Ended() bool {
	return x.GetPhase() == Phase_PHASE_STOPPED || x.GetPhase() == Phase_PHASE_FAILED
}

// Summary is how a process ended, and why where the agent ended it, in a few words.
func (x *Exit) Summary() string {
	if x.GetCause() != "" {
		return x.how() + " (" + x.GetCause() + ")"
	}
	return x.how()
}

func (x *Exit) how() string {
	how := "exit code " + strconv.Itoa(int(x.GetCode()))
	switch {
	case x.GetUnknown() && x.GetOomKilled():
		return "ended over its memory limit"
	case x.GetUnknown():
		how = "an exit that nobody saw"
	case x.GetSignal() != "":
		how = "killed by " + x.GetSignal()
	}
	if x.GetOomKilled() {
		how += ": over its memory limit"
	}
	return how
}
