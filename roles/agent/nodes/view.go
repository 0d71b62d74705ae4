package nodes

import (
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/supervisor"
)

// view says what an entry's node does. Needs mu.
func (m *Manager) view(e *entry) *sutrav1.Node {
	n := proto.CloneOf(e.spec)
	s := e.state
	n.Phase = phaseOf(s.Phase)
	if e.astray() {
		n.Phase = sutrav1.Phase_PHASE_UNKNOWN
	}
	if e.stopping() && !n.Ended() {
		n.Phase = sutrav1.Phase_PHASE_STOPPING
	}
	n.Health = e.health
	n.Pid = int32(s.PID)
	n.RestartCount = uint32(s.Restarts)
	n.Revision = e.revision
	n.Reason = e.reason()
	n.LastExit = exitMessage(s.LastExit)
	n.Completed = s.Completed
	n.NextStart = nil
	if !s.NextStart.IsZero() {
		n.NextStart = timestamppb.New(s.NextStart)
	}
	n.StartedAt, n.MemoryLimit, n.Usage = nil, sutrav1.Enforcement_ENFORCEMENT_UNSPECIFIED, e.usageMessage()
	switch {
	case s.PID != 0:
		n.StartedAt, n.MemoryLimit = timestamppb.New(s.StartedAt), enforcement(s)
	case !n.Ended(): // it waits for its next start
		n.MemoryLimit = e.enforced
	}
	if n.GetPort() != 0 {
		n.Endpoint = m.endpoint(n.GetPort())
	}
	return n
}

// enforcement is whether a process is held to its node's limit.
func enforcement(s supervisor.State) sutrav1.Enforcement {
	if s.MemoryLimited {
		return sutrav1.Enforcement_ENFORCEMENT_ENFORCED
	}
	return sutrav1.Enforcement_ENFORCEMENT_UNENFORCED
}

// stopping tells whether the node is to end, or has ended so: as somebody wants, and not because it hung. Needs Manager.mu.
func (e *entry) stopping() bool {
	return e.spec.GetDesired() == sutrav1.Desired_DESIRED_STOPPED || e.state.Phase == supervisor.Stopping && e.state.Ending == "" ||
		e.state.Phase == supervisor.Stopped && !e.state.Completed
}

func (e *entry) reason() string {
	s := e.state
	switch {
	case e.astray():
		return "runs unsupervised: " + e.refused.Message
	case s.Unkillable != "":
		return "hasn't ended: " + s.Unkillable + ", outlives SIGKILL; it is waited for, and holds port and files meanwhile"
	case s.Completed && s.LastExit.Cause != "":
		return "had to be ended: " + s.LastExit.String() + "; by its profile's restart policy it isn't started again"
	case s.Completed:
		return "ended by itself: " + s.LastExit.String() + "; by its profile's restart policy it isn't started again"
	case s.Phase == supervisor.Restarting:
		return "is ended, to be started anew: " + s.Ending
	case s.Phase == supervisor.Stopping && s.Ending != "":
		return "is ended, and isn't started again: " + s.Ending
	case s.Phase == supervisor.CrashLooping:
		return "ends again and again; the last end: " + s.LastExit.String() + "; " + e.nextStart()
	case s.Phase == supervisor.Failed:
		return "ended before it was ready: " + s.LastExit.String()
	case s.Phase == supervisor.Starting && s.LastExit != nil && s.PID == 0:
		return "is started again; the last end: " + s.LastExit.String() + "; " + e.nextStart()
	case s.Phase == supervisor.Starting && s.LastExit != nil:
		return "is started again; the last end: " + s.LastExit.String()
	case s.Phase == supervisor.Running && !e.stopping():
		return e.trouble
	}
	return ""
}

// nextStart says when the next process is started. On a host where many restart it may have to wait for its turn.
func (e *entry) nextStart() string {
	return "next start at " + e.state.NextStart.UTC().Format(time.TimeOnly) + " UTC at the earliest"
}

func phaseOf(p supervisor.Phase) sutrav1.Phase {
	return map[supervisor.Phase]sutrav1.Phase{
		supervisor.Starting:     sutrav1.Phase_PHASE_STARTING,
		supervisor.Running:      sutrav1.Phase_PHASE_RUNNING,
		supervisor.Restarting:   sutrav1.Phase_PHASE_STARTING,
		supervisor.CrashLooping: sutrav1.Phase_PHASE_CRASH_LOOP,
		supervisor.Stopping:     sutrav1.Phase_PHASE_STOPPING,
		supervisor.Stopped:      sutrav1.Phase_PHASE_STOPPED,
		supervisor.Failed:       sutrav1.Phase_PHASE_FAILED,
	}[p]
}

func exitMessage(e *supervisor.Exit) *sutrav1.Exit {
	if e == nil {
		return nil
	}
	out := strings.ToValidUTF8(e.Output, "\uFFFD")
	if e.Err != nil {
		out = e.Err.Error()
	}
	return &sutrav1.Exit{
		Code: int32(e.Code), Unknown: e.Unknown, OomKilled: e.OOMKilled, Signal: e.Signal, At: timestamppb.New(e.At), Output: out, Cause: e.Cause,
	}
}

// exitOf is a state's last exit for the log; one that never had a process has none.
func exitOf(s supervisor.State) *supervisor.Exit {
	if s.LastExit == nil {
		return &supervisor.Exit{At: s.StartedAt}
	}
	return s.LastExit
}
