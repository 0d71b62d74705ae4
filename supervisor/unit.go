package supervisor

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Supervisor is what all units of one owner share.
type Supervisor struct {
	journal Journal
	notify  func(Event)
	bootID  string
}

// New makes a supervisor without units.
//
// notify is called for each event of a unit, in order, from the unit's own goroutine and without
// a lock; it must return soon, for the unit waits for it.
func New(journal Journal, notify func(Event)) (*Supervisor, error) {
	bootID, err := BootID()
	if err != nil {
		return nil, err
	}
	return &Supervisor{journal: journal, notify: notify, bootID: bootID}, nil
}

// Unit is one supervised process through all its restarts, until it is stopped, fails or is let go.
type Unit struct {
	spec Spec
	s    *Supervisor

	stop     chan struct{} // closed by the first Stop
	stopOnce sync.Once
	release  chan struct{} // closed by the first Release
	freeOnce sync.Once
	settled  chan struct{} // closed when the first process is ready or the unit has ended
	done     chan struct{} // closed when nothing of the unit is left, or it was let go

	// What follows is run's alone.
	record Record
	// unsaved: the record has an identity that isn't on disk yet.
	unsaved bool
	crash   crashes
	ran     time.Duration // how long the last process served

	mu    sync.Mutex // guards state
	state State
}

func (s *Supervisor) unit(spec Spec) *Unit {
	return &Unit{
		spec: spec, s: s, stop: make(chan struct{}), release: make(chan struct{}), settled: make(chan struct{}), done: make(chan struct{}),
		crash: crashes{policy: spec.Restart},
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
	u.state = State{Phase: Starting, PID: p.identity.PID, StartedAt: p.startedAt}
	go func() {
		u.emit(ProcessStarted)
		u.run(p, nil)
	}()
	return u, nil
}

// Adopt takes up a unit by its record: its process, where that still runs; else a new one, as after a crash, or
// at once where the host was booted since. What is left of a process that is gone is ended first.
// With stop it isn't run again, and what still runs is stopped.
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
	p, err := u.find()
	if err != nil {
		return nil, err
	}
	exit := u.missed(p)
	if p != nil {
		u.state.PID, u.state.StartedAt = p.identity.PID, p.startedAt
		if r.EverReady {
			u.state.Phase = Running
		}
	}
	go func() {
		u.emit(ProcessAdopted)
		switch {
		case p == nil:
			u.endLeftovers()
		default:
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
	u.crash.count = r.Crashes
	switch {
	case p != nil || r.Identity.BootID != u.s.bootID:
		return nil
	case r.LastExit != nil && r.LastExit.At.After(r.StartedAt): // it was seen, and counted, and is counted again
		u.crash.count = max(0, r.Crashes-1)
		return r.LastExit
	default:
		return &Exit{Code: -1, Unknown: true, At: time.Now()}
	}
}

// State is what the unit is doing now.
func (u *Unit) State() State {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.state
}

// Settled is closed once the first process is ready, or the unit has ended without that; the
// state and the event that say so come before. A unit that is let go is settled too.
func (u *Unit) Settled() <-chan struct{} { return u.settled }

// Done is closed once nothing of the unit is left, or it was let go.
func (u *Unit) Done() <-chan struct{} { return u.done }

// Stop asks the unit to end. It returns at once; Done tells when it has. Idempotent.
func (u *Unit) Stop() { u.stopOnce.Do(func() { close(u.stop) }) }

// Release lets the unit's process run on without a supervisor: its record says how to take it up again. It returns
// at once; Done tells when the unit's goroutines have ended. A stop that is under way is finished first.
func (u *Unit) Release() { u.freeOnce.Do(func() { close(u.release) }) }

// run carries the unit from its first process, or from how that ended, to its end.
func (u *Unit) run(p *process, exit *Exit) {
	defer close(u.done)
	settle := sync.OnceFunc(func() { close(u.settled) })
	defer settle()
	for {
		if p == nil {
			switch {
			case closed(u.stop):
				u.end(Stopped, exit)
				return
			case exit != nil && !u.record.EverReady:
				u.end(Failed, exit)
				return
			}
			if p = u.restart(exit); p == nil {
				if closed(u.stop) {
					u.end(Stopped, nil)
				}
				return // else it was let go
			}
		}
		var released bool
		exit, released = u.attend(p, settle)
		if released {
			return
		}
		p = nil
	}
}

// end is the unit's last word. exit is nil where the state has the last one.
func (u *Unit) end(phase Phase, exit *Exit) {
	u.update(UnitEnded, func(s *State) {
		s.Phase, s.PID, s.NextStart = phase, 0, time.Time{}
		if exit != nil {
			s.LastExit = exit
		}
	})
}

// attend watches one process until it and all it forked are gone, or the unit is let go. settle is called when it serves.
func (u *Unit) attend(p *process, settle func()) (exit *Exit, released bool) {
	ready := false
	serves := func() {
		ready = true
		if !u.record.EverReady {
			u.record.EverReady = true
			u.save()
		}
		u.update(ProcessReady, func(s *State) { s.Phase = Running })
		settle()
	}
	ctx, cancel := context.WithCancel(context.Background())
	var probe <-chan bool // nil where no answer is awaited
	switch {
	case closed(u.stop):
	case u.spec.Ready == nil, !p.child && u.record.EverReady: // an adopted one served before; whether it does is probed as ever
		serves()
	default:
		answer := make(chan bool, 1)
		go func() { answer <- u.spec.Ready(ctx) == nil }()
		probe = answer
	}
	defer func() {
		cancel()
		if probe != nil {
			<-probe
		}
	}()

	stop, release := u.stop, u.release
	var graceEnds time.Time // the zero time: what the leader leaves behind is killed at once
	var escalate <-chan time.Time
	for {
		// Nobody waits for the disk to hear that the process serves: until the record is written, what was started is
		// found by its control group or its mark.
		if u.unsaved {
			u.unsaved = false
			u.save()
		}
		select {
		case <-p.exited:
			exit, overstayed := p.reap(u.spec.stopSignal(), graceEnds)
			if overstayed && escalate != nil {
				u.emit(StopEscalated)
			}
			if ready {
				u.ran = exit.At.Sub(p.startedAt)
			}
			return exit, false
		case answered := <-probe:
			probe = nil
			// What answered for a dead process was another one.
			if answered && stop != nil && !p.ended() {
				serves()
			}
		case <-stop:
			stop, release = nil, nil
			u.set(func(s *State) { s.Phase = Stopping })
			graceEnds = time.Now().Add(u.spec.StopGrace)
			escalate = time.After(u.spec.StopGrace)
			_ = p.signal(u.spec.stopSignal()) // ESRCH: it has just ended
			_ = p.signal(unix.SIGCONT)        // a stopped process would sit the signal out
		case <-escalate:
			escalate = nil
			p.kill()
			u.emit(StopEscalated)
		case <-release:
			p.letGo()
			return nil, true
		}
	}
}

// restart waits as long as the policy says and starts the next process, however many
// tries that takes. It returns nil where the unit was stopped or let go meanwhile.
// exit is nil where the start isn't the answer to a crash.
func (u *Unit) restart(exit *Exit) *process {
	for {
		if exit != nil {
			pause, loop := u.crash.crashed(u.ran)
			u.ran = 0
			u.record.LastExit, u.record.Crashes = exit, u.crash.count
			u.save()
			u.update(ProcessExited, func(s *State) {
				s.Phase, s.PID, s.LastExit, s.NextStart = Starting, 0, exit, time.Now().Add(pause)
				if loop {
					s.Phase = CrashLooping
				}
			})
			timer := time.NewTimer(pause)
			select {
			case <-u.stop:
				timer.Stop()
				return nil
			case <-u.release:
				timer.Stop()
				return nil
			case <-timer.C:
			}
		}
		if closed(u.stop) || closed(u.release) {
			return nil
		}
		if u.record.Identity != (Identity{}) { // else this start was counted when it was about to be
			u.record.Restarts++
		}
		p, err := u.fork()
		if err == nil {
			u.update(ProcessStarted, func(s *State) {
				s.Phase, s.PID, s.StartedAt, s.NextStart, s.Restarts = Starting, p.identity.PID, p.startedAt, time.Time{}, u.record.Restarts
			})
			return p
		}
		exit = &Exit{Code: -1, At: time.Now(), Err: err}
	}
}

// fork starts a process, after a record that one is about to be. Which one it is attend records: a crash in between
// leaves one that is found by its control group or its mark.
func (u *Unit) fork() (*process, error) {
	u.record.Identity = Identity{}
	u.record.EverReady = u.record.EverReady || u.spec.Ready == nil
	if err := u.s.journal.Save(u.spec.ID, u.record); err != nil {
		return nil, fmt.Errorf("record that it is about to be started: %w", err)
	}
	p, err := start(&u.spec, u.s.bootID)
	if err != nil {
		return nil, err
	}
	u.record.Identity, u.record.StartedAt, u.record.LogStart = p.identity, p.startedAt, p.logStart
	u.unsaved = true
	return p, nil
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
