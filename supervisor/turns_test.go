package supervisor

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

func TestTurnEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := make(turns, 1)
		ts <- struct{}{}
		end := ts.hold(turnHold)
		time.Sleep(turnHold - 1)
		synctest.Wait()
		if len(ts) != 1 {
			t.Fatal("it ended before its time")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if len(ts) != 0 {
			t.Fatal("it holds on")
		}
		ts <- struct{}{} // the next one's
		end()
		if len(ts) != 1 {
			t.Error("it ended another's turn")
		}
		next := ts.hold(turnHold)
		next()
		time.Sleep(2 * turnHold)
		if len(ts) != 0 {
			t.Error("an end in time was none")
		}
	})
}

// storm is many units whose processes can be killed together.
type storm struct {
	t        *testing.T
	units    []*Unit
	starting atomic.Int64 // processes that were started again and aren't ready
	most     atomic.Int64 // of them at any time
	ready    chan struct{}
}

// newStorm starts units, each ready at once the first time, and later only when the test says so.
func newStorm(t *testing.T, count, width int, hold time.Duration) *storm {
	t.Helper()
	s := &storm{t: t, ready: make(chan struct{})}
	sup := newSupervisor(t, &memory{}, func(e Event) {
		switch {
		case e.Kind == ProcessStarted && e.State.Restarts > 0:
			if now := s.starting.Add(1); now > s.most.Load() {
				s.most.Store(now)
			}
		case e.Kind == ProcessReady && e.State.Restarts > 0:
			s.starting.Add(-1)
		}
	})
	sup.turns, sup.hold = make(turns, width), hold
	for range count {
		s.units = append(s.units, s.start(sup))
	}
	t.Cleanup(func() {
		for _, u := range s.units {
			u.Stop()
		}
		for _, u := range s.units {
			awaitClosed(t, "the unit's end", u.Done())
		}
	})
	for _, u := range s.units {
		awaitClosed(t, "settled", u.Settled())
	}
	return s
}

func (s *storm) start(sup *Supervisor) *Unit {
	s.t.Helper()
	spec := commandSpec(s.t, "sleep", "3600")
	var runs atomic.Int64
	spec.Ready = func(ctx context.Context) error {
		if runs.Add(1) == 1 {
			return nil
		}
		select {
		case <-s.ready:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	u, err := sup.Start(spec)
	if err != nil {
		s.t.Fatal(err)
	}
	return u
}

func (s *storm) killAll() {
	s.t.Helper()
	for _, u := range s.units {
		if err := unix.Kill(u.State().PID, unix.SIGKILL); err != nil {
			s.t.Fatal(err)
		}
	}
}

// Of many that crash together only a few are between start and readiness at once.
func TestStormIsSpread(t *testing.T) {
	const count, width = 20, 3
	s := newStorm(t, count, width, never)
	s.killAll()
	for range count {
		await(t, "the next to start", func() bool { return s.starting.Load() > 0 })
		s.ready <- struct{}{}
	}
	await(t, "all to run", func() bool {
		for _, u := range s.units {
			if st := u.State(); st.Phase != Running || st.Restarts != 1 {
				return false
			}
		}
		return true
	})
	if most := s.most.Load(); most > width {
		t.Errorf("%d processes were loading at once, want at most %d", most, width)
	}
}

// Whoever asks for a unit, or for a restart, doesn't wait behind a storm. Those that are stopped leave the queue.
func TestStormHoldsUpNobodyElse(t *testing.T) {
	s := newStorm(t, 4, 1, never)
	s.killAll()
	await(t, "one to have its turn", func() bool { return s.starting.Load() == 1 })
	fresh := s.start(s.units[0].s)
	s.units = append(s.units, fresh)
	awaitClosed(t, "a new unit's readiness", fresh.Settled())
	var waits *Unit
	await(t, "one to wait", func() bool {
		for _, u := range s.units {
			if st := u.State(); st.PID == 0 && st.Phase == Starting {
				waits = u
			}
		}
		return waits != nil
	})
	restarted := waits.Restart(0)
	await(t, "the restart that was asked for", func() bool { return waits.State().PID != 0 })
	for _, u := range s.units {
		u.Stop()
	}
	if got := outcome(t, restarted); got.State.Phase != Stopped {
		t.Errorf("outcome %+v", got)
	}
	for _, u := range s.units {
		awaitClosed(t, "the unit's end", u.Done())
	}
	if n := len(fresh.s.turns); n != 0 {
		t.Errorf("%d turns are still taken", n)
	}
}

// One that never gets ready doesn't keep the others waiting for ever.
func TestStormPassesThoseThatHang(t *testing.T) {
	s := newStorm(t, 6, 1, time.Millisecond)
	s.killAll()
	await(t, "all to have been started", func() bool { return s.starting.Load() == int64(len(s.units)) })
}

// After a boot of the host all start anew, and a few at a time.
func TestStormAfterABoot(t *testing.T) {
	const count, width = 6, 2
	var starting, most atomic.Int64
	sup := newSupervisor(t, &memory{}, func(e Event) {
		switch e.Kind {
		case ProcessStarted:
			if now := starting.Add(1); now > most.Load() {
				most.Store(now)
			}
		case ProcessReady:
			starting.Add(-1)
		}
	})
	sup.turns, sup.hold = make(turns, width), never
	var units []*Unit
	var gates []chan struct{}
	for range count {
		spec, gate := gatedSpec(t)
		u, err := sup.Adopt(spec, Record{Identity: Identity{PID: 1, BootID: "another"}, EverReady: true}, false)
		if err != nil {
			t.Fatal(err)
		}
		units, gates = append(units, u), append(gates, gate)
	}
	for _, gate := range gates {
		go func() { gate <- struct{}{} }()
	}
	for _, u := range units {
		awaitClosed(t, "settled", u.Settled())
	}
	if n := most.Load(); n > width {
		t.Errorf("%d processes were loading at once, want at most %d", n, width)
	}
	for _, u := range units {
		u.Stop()
		awaitClosed(t, "the unit's end", u.Done())
	}
}
