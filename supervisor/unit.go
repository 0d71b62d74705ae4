package supervisor

import (
	"fmt"
	"slices"
	"sync"
	"time"
)

// Supervisor is what all units of one owner share.
type Supervisor struct {
	journal Journal
	notify  func(Event)
	bootID  string
	census  *census
	turns   turns
	hold    time.Duration // of a turn
	// patience is how long killed processes may take to be gone.
	patience time.Duration
}

// New makes a supervisor without units.
//
// notify is called for each event of a unit, in order, from the unit's own goroutine and without
// a lock; it must return soon, for the unit waits for it.
//
// Signals that this process ignores it catches from then on, and does nothing about them still: units aren't to ignore them.
func New(journal Journal, notify func(Event)) (*Supervisor, error) {
	bootID, err := BootID()
	if err != nil {
		return nil, err
	}
	catchIgnored()
	return &Supervisor{journal: journal, notify: notify, bootID: bootID, census: newCensus(), turns: newTurns(), hold: turnHold, patience: killPatience}, nil
}

// Unit is one supervised process through all its restarts, until it is stopped, fails or is let go.
type Unit struct {
	spec Spec
	s    *Supervisor

	stop     chan struct{} // closed by the first Stop
	stopOnce sync.Once
	release  chan struct{} // closed by the first Release
	freeOnce sync.Once
	done     chan struct{} // closed when nothing of the unit is left, or it was let go
	settled  chan struct{} // closed when the first process is ready, else right after done
	settle   func()        // closes settled; idempotent

	wake chan struct{} // holds a token while there may be requests

	// What follows is run's alone.
	record  Record
	unsaved bool // the record has an identity that isn't on disk yet
	crash   crashes
	served  bool      // the last process was ready
	waiting []request // whose outcome the next readiness or end decides
	endTurn func()    // nil where the last process was started out of turn

	mu       sync.Mutex // guards what follows
	state    State
	requests []request
	over     bool // run has ended, or is about to
}

func (s *Supervisor) unit(spec Spec) *Unit {
	settled := make(chan struct{})
	return &Unit{
		spec: spec, s: s, stop: make(chan struct{}), release: make(chan struct{}), done: make(chan struct{}),
		settled: settled, settle: sync.OnceFunc(func() { close(settled) }),
		wake: make(chan struct{}, 1), crash: crashes{policy: spec.Restart},
	}
}

// Start forks the first process and supervises it from then on. An error means that
// nothing was started.
func (s *Supervisor) Start(spec Spec) (*Unit, error) {
	if err := spec.validate(); err != nil {
		return nil, err
	}
	u := s.unit(spec)
	p, err := u.fork()
	if err != nil {
		return nil, err
	}
	u.state = State{Phase: Starting, PID: p.identity.PID, StartedAt: p.startedAt, MemoryLimited: p.limited}
	go func() {
		u.emit(ProcessStarted)
		u.run(p, nil)
	}()
	return u, nil
}

// Adopt takes up a unit by its record: its process, where that still runs; else a new one, as after a crash, or
// at once where the host was booted since. What is left of a process that is gone is ended first.
// With stop it isn't run again, and what still runs is stopped. One that is Completed stays so.
func (s *Supervisor) Adopt(spec Spec, r Record, stop bool) (*Unit, error) {
	if err := spec.validate(); err != nil {
		return nil, err
	}
	u := s.unit(spec)
	if stop {
		u.Stop()
	}
	u.record = r
	u.state = State{Phase: Starting, StartedAt: r.StartedAt, Restarts: r.Restarts, LastExit: r.LastExit}
	if r.Completed {
		u.state.Phase, u.state.Completed = r.completedAs(), true
		go func() {
			u.emit(ProcessAdopted)
			u.end(r.completedAs(), nil)
			u.finish()
		}()
		return u, nil
	}
	p, err := u.find()
	if err != nil {
		return nil, err
	}
	exit := u.missed(p)
	if p != nil {
		u.state.PID, u.state.StartedAt, u.state.MemoryLimited = p.identity.PID, p.startedAt, p.limited
		if r.Ready {
			u.state.Phase = Running
		}
	}
	go func() {
		u.emit(ProcessAdopted)
		if p == nil {
			if !u.endLeftovers() { // it was let go
				u.finish()
				return
			}
		} else {
			u.unsaved = r.Identity != u.record.Identity
		}
		u.run(p, exit)
	}()
	return u, nil
}

// missed is the exit of a process that is gone; nil where it runs, and where it can't be held
// against the unit: the host was booted, or the process was never forked. It takes up the count of crashes.
func (u *Unit) missed(p *process) *Exit {
	r := &u.record
	if r.LastExit != nil {
		u.crash.resume(r.Crashes, r.LastExit.At)
	}
	switch {
	case p != nil || r.Identity.BootID != u.s.bootID:
		return nil
	case r.Exited && r.LastExit != nil: // it was seen, and counted, and is counted again
		u.crash.resume(max(0, r.Crashes-1), r.LastExit.At)
		return r.LastExit
	default:
		// Its control group is there until what it left behind is ended.
		return &Exit{
			Code: -1, Unknown: true, At: time.Now(), Cause: r.Ending,
			OOMKilled: slices.ContainsFunc(u.groups(), func(g group) bool { return g.ooms().since(ooms{kills: r.OOMKills}) }),
		}
	}
}

// State is what the unit is doing now.
func (u *Unit) State() State {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state
}

// Settled is closed once the first process is ready, or the unit has ended without that; the
// state and the event that say so come before. A unit that is let go is settled too: it is Done by then, so that who waited for its
// readiness can tell.
func (u *Unit) Settled() <-chan struct{} { return u.settled }

// Done is closed once nothing of the unit is left, or it was let go.
func (u *Unit) Done() <-chan struct{} { return u.done }

// Stop asks the unit to end. It returns at once; Done tells when it has. Idempotent.
func (u *Unit) Stop() { u.stopOnce.Do(func() { close(u.stop) }) }

// Release lets the unit's process run on without a supervisor: its record says how to take it up again. It returns
// at once; Done tells when the unit's goroutines have ended. A stop that was asked for is finished first, where it can be: what
// can't be killed is left.
func (u *Unit) Release() { u.freeOnce.Do(func() { close(u.release) }) }

// run carries the unit from its first process, or from how that ended, to its end.
func (u *Unit) run(p *process, exit *Exit) {
	defer u.finish()
	for {
		if p != nil {
			var released bool
			if exit, released = u.attend(p); released {
				return
			}
		}
		asked := exit != nil && exit.Cause == restartAsked || slices.ContainsFunc(u.waiting, u.due)
		switch {
		case closed(u.stop):
			u.end(Stopped, exit)
			return
		case exit == nil || asked || u.answered(exit):
		case !u.record.EverReady:
			u.record.LastExit, u.record.Exited, u.record.Ending = exit, true, ""
			u.save()
			u.end(Failed, exit)
			return
		default:
			u.complete(exit)
			return
		}
		if !u.pause(exit, asked) {
			if closed(u.stop) {
				u.end(Stopped, nil)
			}
			return // else it was let go
		}
		p, exit = u.again()
	}
}

// answered tells whether an exit is answered with another process.
func (u *Unit) answered(e *Exit) bool {
	switch {
	case e.Err != nil, e.Cause == restartAsked: // what couldn't be started hasn't ended
		return true
	default:
		return u.record.EverReady && u.spec.Restart.again(e)
	}
}

// end is the unit's last word. exit is nil where the state has the last one.
func (u *Unit) end(phase Phase, exit *Exit) {
	u.leaveGroup()
	u.update(UnitEnded, func(s *State) {
		s.Phase, s.PID, s.NextStart, s.Ending, s.Completed = phase, 0, time.Time{}, "", u.record.Completed
		if exit != nil {
			s.LastExit = exit
		}
	})
}

// complete ends a unit that its policy doesn't start again.
func (u *Unit) complete(exit *Exit) {
	r := &u.record
	r.LastExit, r.Ending, r.Completed, r.Failed = exit, "", true, !u.spec.Restart.succeeded(exit)
	u.save()
	u.end(r.completedAs(), exit)
}

// pause tells of an exit, sits out what the policy answers it with, and waits for the unit's turn. It returns false
// where the unit was stopped or let go meanwhile. exit is nil where the start isn't the answer to an end. A start that
// somebody asked for waits for nothing.
func (u *Unit) pause(exit *Exit, asked bool) bool {
	var wait time.Duration
	if exit != nil {
		var loop bool
		if asked {
			u.crash.forget()
		} else {
			wait, loop = u.crash.crashed(exit.At)
		}
		u.record.LastExit, u.record.Exited, u.record.Crashes, u.record.Ending = exit, true, len(u.crash.at), ""
		u.save()
		u.update(ProcessExited, func(s *State) {
			s.Phase, s.PID, s.LastExit, s.NextStart, s.Ending = Starting, 0, exit, time.Now().Add(wait), ""
			if loop {
				s.Phase = CrashLooping
			}
		})
	}
	if asked {
		return !closed(u.stop) && !closed(u.release)
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	var turn chan<- struct{} // nil until the pause is over
	for {
		select {
		case <-u.stop:
			return false
		case <-u.release:
			return false
		case <-timer.C:
			turn = u.s.turns
		case turn <- struct{}{}:
			u.endTurn = u.s.turns.hold(u.s.hold)
			if closed(u.stop) || closed(u.release) {
				u.turnOver()
				return false
			}
			return true
		case <-u.wake:
			for _, r := range u.taken() {
				switch {
				case u.due(r):
					asked = true
					u.waiting = append(u.waiting, r)
				case u.served || exit == nil:
					r.reply(Restarted{State: u.State()})
				default: // it was made before, and this is what has come of it
					r.reply(Restarted{State: u.State(), Early: exit})
				}
			}
			if asked {
				u.crash.forget()
				u.record.Crashes = 0
				return !closed(u.stop) && !closed(u.release)
			}
		}
	}
}

// turnOver lets the next one have its turn.
func (u *Unit) turnOver() {
	if u.endTurn != nil {
		u.endTurn()
		u.endTurn = nil
	}
}

// again starts the next process, or returns why it couldn't be started.
func (u *Unit) again() (*process, *Exit) {
	if u.record.Identity != (Identity{}) { // else this start was counted when it was about to be
		u.record.Restarts++
	}
	p, err := u.fork()
	if err != nil {
		exit := &Exit{Code: -1, At: time.Now(), Err: err}
		u.turnOver()
		u.served = false
		u.reply(exit)
		return nil, exit
	}
	u.update(ProcessStarted, func(s *State) {
		s.Phase, s.PID, s.StartedAt, s.NextStart, s.Restarts = Starting, p.identity.PID, p.startedAt, time.Time{}, u.record.Restarts
		s.MemoryLimited = p.limited
	})
	return p, nil
}

// fork starts a process, after a record that one is about to be. Which one it is attend records: a crash in between leaves
// one that is found by its control group, else by its mark, if it hasn't dropped that.
func (u *Unit) fork() (*process, error) {
	u.leaveGroup()
	g := u.spec.Cgroups.of(u.spec.ID)
	u.record.Cgroups, u.record.OOMKills = g.recorded(), g.ooms().kills
	u.record.Identity, u.record.Exited = Identity{}, false
	u.record.Ready = u.spec.Ready == nil
	u.record.EverReady = u.record.EverReady || u.record.Ready
	if err := u.s.journal.Save(u.spec.ID, u.record); err != nil {
		return nil, fmt.Errorf("record that it is about to be started: %w", err)
	}
	p, err := start(&u.spec, u.s.bootID)
	if err != nil {
		return nil, err
	}
	p.kin.census = u.s.census
	u.record.StartedAt, u.record.LogStart = p.startedAt, p.logStart
	if p.identity.StartTicks != 0 { // else it couldn't be read, and half an identity would be a stranger's to the next supervisor
		u.record.Identity = p.identity
	}
	u.unsaved = true
	return p, nil
}

// leaveGroup removes the last process's control group where that lies elsewhere than the next one's would. Nobody of the unit
// is left.
func (u *Unit) leaveGroup() {
	now := u.spec.Cgroups.of(u.spec.ID)
	if then := groupOnRecord(u.record.Cgroups, u.spec.ID); then != now {
		then.abandon(now)
	}
}

// save writes the record down. A unit whose record can't be written goes on: its process is found without.
func (u *Unit) save() {
	if err := u.s.journal.Save(u.spec.ID, u.record); err != nil {
		u.s.notify(Event{ID: u.spec.ID, Kind: RecordLost, State: u.State(), Err: err})
	}
}

func closed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}

func (u *Unit) set(change func(*State)) State {
	u.mu.Lock()
	defer u.mu.Unlock()
	change(&u.state)
	return u.state
}

func (u *Unit) update(kind Kind, change func(*State)) {
	u.s.notify(Event{ID: u.spec.ID, Kind: kind, State: u.set(change)})
}

func (u *Unit) emit(kind Kind) { u.update(kind, func(*State) {}) }
