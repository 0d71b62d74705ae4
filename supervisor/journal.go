package supervisor

import "time"

// Record is what must be known of a unit to take it up again after its supervisor ended.
type Record struct {
	// Identity of the current process, or of the last one where Exited is set. The zero Identity says that a process was
	// about to be started, and whether it was is found out by the unit's control group or its mark.
	Identity Identity
	// Cgroups are the folders of the control group that this process was started in, by what each is for; none where it had none.
	Cgroups map[string]string
	// OOMKills are the processes that the kernel had killed in that group for want of memory before this one was started: the
	// group of an earlier one may have been left.
	OOMKills  uint64
	StartedAt time.Time
	// LogStart is the position of the log's end when the process was started.
	LogStart int64
	// EverReady: one of the unit's processes was ready once.
	EverReady bool
	// Ready: the process of Identity was. One that wasn't may be loading its data still.
	Ready bool
	// Exited: the process of Identity has ended, and LastExit is how. That isn't left to the times of both: a clock may
	// be set back between them.
	Exited bool
	// Restarts counts the starts beyond the first, with the one that was about to be.
	Restarts int
	// Crashes counts those that count still at the last one.
	Crashes int
	// LastExit is how the last process ended; nil while none has.
	LastExit *Exit
	// Ending is why the current process is being ended, though nobody wants the unit stopped; empty where it isn't.
	Ending string
	// Completed: the last process ended without a stop, and the policy says that there is no other one.
	Completed bool
	// Failed: the unit is Completed, and its last exit was no success.
	Failed bool
}

// completedAs is the last phase of a unit that is Completed.
func (r *Record) completedAs() Phase {
	if r.Failed {
		return Failed
	}
	return Stopped
}

// Journal keeps the units' records where they outlive this process and the host's power.
type Journal interface {
	// Save returns once the record is durable. It replaces the unit's earlier one.
	Save(id string, r Record) error
}
