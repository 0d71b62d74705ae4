package supervisor

import "time"

// restartAsked is the Exit.Cause of a process that was ended because a restart was asked for.
const restartAsked = "restart asked for"

// unwellGrace bounds the grace of a process that hangs: such a one seldom follows a signal, and those that wait for it
// are kept waiting long enough as it is.
const unwellGrace = 5 * time.Second

// Restarted is the outcome of a restart that was asked for.
type Restarted struct {
	// State of the unit at that moment: Running where the restart went well.
	State State
	// Early is how the new process ended before it was ready, or why it couldn't be started; else nil. It is restarted
	// as after any crash.
	Early *Exit
}

// request is what is asked of a unit while it runs.
type request struct {
	// restarts is what State.Restarts may be at most for a restart to be due.
	restarts int
	answer   chan<- Restarted // takes one without blocking; nil: it isn't a restart that is asked for
	// pid of the process that is to be ended because of cause.
	pid   int
	cause string
}

// Restart asks for a new process in the place of the current one, or at once where a pause is being sat out;
// the crashes so far are forgotten. Where State.Restarts is more than restarts already, none is made: to ask twice
// is to ask once. The channel yields once the outcome is known: the new process is ready or has ended, or the unit
// has ended or was let go first.
func (u *Unit) Restart(restarts int) <-chan Restarted {
	answer := make(chan Restarted, 1)
	u.request(request{restarts: restarts, answer: answer})
	return answer
}

// Unwell says why a process, by its pid, is to be ended and treated as crashed: it runs and doesn't work. It returns
// at once. Where the unit doesn't run by that very process, or ends it already, nothing happens.
func (u *Unit) Unwell(pid int, cause string) { u.request(request{pid: pid, cause: cause}) }

func (u *Unit) request(r request) {
	u.mu.Lock()
	over, state := u.over, u.state
	if !over {
		u.requests = append(u.requests, r)
	}
	u.mu.Unlock()
	if over {
		r.reply(Restarted{State: state})
		return
	}
	select {
	case u.wake <- struct{}{}:
	default:
	}
}

func (r request) reply(with Restarted) {
	if r.answer != nil {
		r.answer <- with
	}
}

// taken returns what was asked since it was last called, in the order in which it was.
func (u *Unit) taken() []request {
	u.mu.Lock()
	defer u.mu.Unlock()
	all := u.requests
	u.requests = nil
	return all
}

// due tells whether a request asks for a restart that wasn't made yet.
func (u *Unit) due(r request) bool { return r.answer != nil && r.restarts >= u.State().Restarts }

// reply answers all that wait for a restart.
func (u *Unit) reply(early *Exit) {
	for _, r := range u.waiting {
		r.reply(Restarted{State: u.State(), Early: early})
	}
	u.waiting = nil
}

// finish ends run: nobody waits for the unit any more.
func (u *Unit) finish() {
	u.mu.Lock()
	u.over = true
	u.mu.Unlock()
	u.waiting = append(u.waiting, u.taken()...)
	u.reply(nil)
	close(u.done)
	u.settle()
}
