package supervisor

import (
	"time"

	"golang.org/x/sys/unix"
)

// attend watches one process until it and all it forked are gone, or the unit is let go. The unit is settled when it serves.
func (u *Unit) attend(p *process) (exit *Exit, released bool) {
	u.served = false
	serves := func() {
		u.served = true
		// What is told ready is on record as such. Which process that is nobody waits for where its group tells.
		if !u.record.Ready || u.unsaved && !p.kin.group.exists() {
			u.record.EverReady, u.record.Ready, u.unsaved = true, true, false
			u.save()
		}
		u.update(ProcessReady, func(s *State) { s.Phase = Running })
		u.turnOver()
		u.settle()
		u.reply(nil)
	}
	ctx, cancel := u.spec.readiness()
	var probe <-chan error // nil where no answer is awaited
	switch {
	case closed(u.stop), u.record.Ending != "":
	case u.spec.Ready == nil, u.record.Ready: // the latter was adopted; whether it still serves is probed as ever
		serves()
	default:
		answer := make(chan error, 1)
		go func() { answer <- u.spec.Ready(ctx) }()
		probe = answer
	}
	defer func() {
		cancel()
		if probe != nil {
			<-probe //nolint:errcheck // its context has ended: nobody asks any more
		}
		u.turnOver()
	}()

	stop, release := u.stop, u.release
	var graceEnds time.Time // the zero time: what the leader leaves behind is killed at once
	var escalate, hopeless <-chan time.Time
	inVain := false // it was killed, and lives
	sendOff := func(grace time.Duration) {
		if !graceEnds.IsZero() {
			return // it was told to go, and has what is left of its grace
		}
		graceEnds = time.Now().Add(grace)
		escalate = time.After(grace)
		_ = p.signal(u.spec.stopSignal()) // ESRCH: it has just ended
		_ = p.signal(unix.SIGCONT)        // a stopped process would sit the signal out
	}
	putDown := func(cause string) {
		grace := u.spec.StopGrace
		if cause != restartAsked {
			grace = min(grace, unwellGrace)
		}
		if u.answered(&Exit{Cause: cause}) {
			u.update(RestartBegan, func(s *State) { s.Phase, s.Ending = Restarting, cause })
		} else {
			u.update(EndBegan, func(s *State) { s.Phase, s.Ending = Stopping, cause })
		}
		sendOff(grace)
	}
	end := func(cause string) {
		u.record.Ending = cause
		u.save()
		putDown(cause)
	}
	if u.record.Ending != "" && !closed(u.stop) {
		putDown(u.record.Ending) // the supervisor before had begun
	}
	for {
		if u.unsaved {
			u.unsaved = false
			u.save()
		}
		select {
		case <-p.exited:
			u.set(func(s *State) { s.Unkillable = "" }) // it wasn't
			exit := p.reap(func() bool { return u.emptied(p, graceEnds, escalate != nil, release) })
			if exit == nil {
				return nil, true
			}
			if stop == nil {
				return exit, false
			}
			exit.Cause = u.record.Ending
			if exit.Cause != restartAsked && !u.served {
				u.reply(exit)
			}
			return exit, false
		case err := <-probe:
			probe = nil
			switch {
			case stop == nil || u.record.Ending != "" || p.ended(): // what answered for a dead process was another one
			case err == nil:
				serves()
			default:
				end(err.Error())
			}
		case <-u.wake:
			for _, r := range u.taken() {
				if cause := u.hear(r, p.identity.PID, stop == nil); cause != "" {
					end(cause)
				}
			}
		case <-stop:
			stop, release = nil, nil
			if inVain {
				release = u.release
			}
			u.set(func(s *State) { s.Phase, s.Ending = Stopping, "" })
			sendOff(u.spec.StopGrace)
		case <-escalate:
			escalate = nil
			p.kill()
			u.emit(StopEscalated)
			hopeless = time.After(u.s.patience)
		case <-hopeless:
			inVain, release = true, u.release
			u.unkillable(p)
		case <-release:
			if stop != nil && closed(u.stop) {
				release = nil
				continue // the stop comes first
			}
			p.letGo()
			return nil, true
		}
	}
}

// hear takes in a request while a process runs. It returns why that is to be ended, and nothing where it isn't.
func (u *Unit) hear(r request, pid int, stopping bool) (cause string) {
	switch {
	case r.answer == nil && r.pid == pid && !stopping && u.record.Ending == "":
		return r.cause
	case r.answer == nil:
		return ""
	case u.due(r) && !stopping && u.record.Ending == "":
		cause = restartAsked
	case u.due(r) && !stopping && u.State().Phase == Stopping: // none would have followed
		u.update(RestartBegan, func(s *State) { s.Phase = Restarting })
	case !u.due(r) && u.served && u.record.Ending == "" && !stopping:
		r.reply(Restarted{State: u.State()})
		return ""
	}
	u.waiting = append(u.waiting, r)
	return cause
}
