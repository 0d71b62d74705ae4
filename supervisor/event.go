package supervisor

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Phase is what a unit is doing.
type Phase int

// The phases.
const (
	// Starting: the process runs and isn't ready, or waits for its next start after a crash.
	Starting Phase = iota
	Running
	// Restarting: the process is being ended, and another one follows.
	Restarting
	// CrashLooping: it waits for its next start after one crash too many.
	CrashLooping
	Stopping
	// Stopped: nothing of it is left. Final.
	Stopped
	// Failed: its first process ended before it was ready, or it is Completed and that was no success. Nothing of it is left. Final.
	Failed
)

func (p Phase) String() string {
	return [...]string{"starting", "running", "restarting", "crash-looping", "stopping", "stopped", "failed"}[p]
}

// Exit is how a process ended.
type Exit struct {
	// Code is 0-255, and -1 where the process was ended by a signal, couldn't be started or Unknown is set.
	Code int
	// Signal is the name, for example SIGKILL; empty where the process exited by itself.
	Signal string
	At     time.Time
	// Output is the end of what this process wrote, at most 4 KiB.
	Output string
	// Unknown: it ended, and nobody saw how. That is so of what ended while no supervisor ran, and of adopted processes before
	// Linux 6.6, or where they aren't this process's to look at.
	Unknown bool
	// OOMKilled: the kernel killed the process, or one of its descendants before it ended by itself, because the unit
	// went beyond its memory limit.
	OOMKilled bool
	// Err is why the process couldn't be started; else nil.
	Err error
	// Cause is why the supervisor ended it, though nobody wanted the unit stopped. Empty where it ended by itself or was stopped.
	Cause string
}

// mayBeOOM tells whether it is how a process ends that is killed for want of memory, or whose descendants are.
func (e *Exit) mayBeOOM() bool {
	return e.Unknown || e.Signal == signalName(unix.SIGKILL) || e.Signal == "" && e.Code != 0
}

func (e *Exit) String() string {
	if e.Cause != "" {
		return e.how() + " (" + e.Cause + ")"
	}
	return e.how()
}

func (e *Exit) how() string {
	switch {
	case e.Err != nil:
		return e.Err.Error()
	case e.OOMKilled && e.Unknown:
		return "ended over its memory limit"
	case e.OOMKilled:
		how := *e
		how.OOMKilled = false
		return how.how() + ": over its memory limit"
	case e.Unknown:
		return "an exit that nobody saw"
	case e.Signal != "":
		return "killed by " + e.Signal
	default:
		return fmt.Sprintf("exit code %d", e.Code)
	}
}

// State is what a unit is doing, at one moment.
type State struct {
	Phase Phase
	// PID is 0 while there is no process.
	PID int
	// StartedAt is the start of the current process, or of the last one.
	StartedAt time.Time
	// Restarts counts the starts beyond the first.
	Restarts int
	// LastExit is how the last process ended; nil while none has. It is never changed.
	LastExit *Exit
	// NextStart is when a crashed process is started again; zero while it runs.
	NextStart time.Time
	// Ending is why the process is being ended where the phase is Restarting, and where it is Stopping though nobody wants
	// the unit stopped; else empty.
	Ending string
	// Completed: it wasn't stopped, was ready once, and its policy says that it isn't started again. The phase is Stopped after a
	// success, else Failed. Its record stays, so that whoever takes it up finds it so.
	Completed bool
	// Unkillable says which of its processes outlive SIGKILL and hold its port and files; empty where none do. No other process is
	// started, and no stop is done, until they are gone.
	Unkillable string
	// MemoryLimited: the current process, or the last one, is held to Spec.Limits.Memory.
	MemoryLimited bool
}

// Kind is what happened to a unit.
type Kind int

// The kinds of event.
const (
	// ProcessStarted: a process was forked.
	ProcessStarted Kind = iota
	// ProcessAdopted: the unit was taken up from its record. State.PID is 0 where its process was gone.
	ProcessAdopted
	// ProcessReady: it serves.
	ProcessReady
	// RestartBegan: the process is being ended so that another one can follow. State.Ending says why.
	RestartBegan
	// EndBegan: the process is being ended, and by the unit's policy, or because none was ready yet, none follows.
	// State.Ending says why.
	EndBegan
	// ProcessExited: it and its group are gone. State.LastExit says how.
	ProcessExited
	// StopEscalated: the stop signal didn't help in time; the group was sent SIGKILL.
	StopEscalated
	// KillFailed: what was sent SIGKILL is still there, as State.Unkillable says. It is waited for.
	KillFailed
	// RecordLost: the unit's record couldn't be written; Err says why. The unit goes on.
	RecordLost
	// UnitEnded: the unit is Stopped or Failed, and no further event follows.
	UnitEnded
)

func (k Kind) String() string {
	return [...]string{
		"process started", "process adopted", "process ready", "restart began", "end began", "process exited", "stop escalated", "kill failed",
		"record lost", "unit ended",
	}[k]
}

// Event is one thing that happened to a unit, with the state after it.
type Event struct {
	ID    string
	Kind  Kind
	State State
	// Err is set where the kind says so.
	Err error
}
