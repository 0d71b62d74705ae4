package supervisor

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestReleaseAndAdoptAgain(t *testing.T) {
	for name, env := range map[string]string{"without control groups": "", "in control groups": "1"} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(groupsEnv, env)
			spec, _ := fixtureSpec(t, "count")
			w := watch(t, spec)
			first := w.until(ProcessReady).State
			others := goleak.IgnoreCurrent()
			record, before := w.recorded(), 0
			for round := range 5 {
				w.Release()
				w.awaitDone()
				awaitClosed(t, "settled", w.Settled())
				goleak.VerifyNone(t, others)
				if gone(first.PID) {
					t.Fatal("the process went with its supervisor")
				}
				w.expect([]string{"process started: starting", "process adopted: running"}[min(round, 1)], "process ready: running")
				if round == 1 {
					before = descriptors(t)
				}
				w = adopt(t, spec, record)
				if s := w.until(ProcessReady).State; s.PID != first.PID || !s.StartedAt.Equal(first.StartedAt) {
					t.Fatalf("adopted %+v, want %+v", s, first)
				}
			}
			if after := descriptors(t); after != before+1 { // the last round's pidfd is still open
				t.Errorf("%d descriptors, %d before", after, before)
			}
			w.kill()
			if exit := w.until(ProcessExited).State.LastExit; exit.Signal != "SIGKILL" {
				t.Errorf("exit %+v", exit)
			}
			if again := w.until(ProcessReady).State; again.Restarts != 1 {
				t.Errorf("after the crash: %+v", again)
			}
			w.Stop()
			w.end()
			unbroken(t, spec.LogPath)
		})
	}
}

// Who waits for the readiness of a unit that is let go can tell that nobody else does.
func TestReleaseWhileStarting(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	spec.Ready = func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
	w := watch(t, spec)
	w.until(ProcessStarted)
	for range 100 {
		record := w.recorded()
		w.Release()
		awaitClosed(t, "settled", w.Settled())
		if !closed(w.Done()) {
			t.Error("settled, starting, and not yet let go")
		}
		w = adopt(t, spec, record)
		w.until(ProcessAdopted)
	}
	w.Stop()
	w.end()
}

// Until its process has been started again, a unit that is let go has none.
func TestReleaseDuringBackOff(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	spec.Restart.First, spec.Restart.Max, spec.Restart.Threshold = never, never, 1
	w := watch(t, spec)
	w.until(ProcessReady)
	w.kill()
	exit := w.until(ProcessExited).State.LastExit
	w.Release()
	w.awaitDone()
	w.expect("process started: starting", "process ready: running", "process exited: crash-looping")
	again := adopt(t, spec, w.journal.last())
	exited := again.until(ProcessExited).State
	again.expect("process adopted: starting", "process exited: crash-looping")
	if exited.LastExit != exit || exited.Restarts != 0 {
		t.Errorf("after the adoption: %+v", exited)
	}
	if last := again.journal.last(); last.Crashes != 1 {
		t.Errorf("a crash was counted again: %+v", last)
	}
}

func TestReleaseDuringAStopFinishesTheStop(t *testing.T) {
	spec, _ := fixtureSpec(t, "ignore-term")
	spec.StopGrace = 50 * time.Millisecond
	w := watch(t, spec)
	pid := w.until(ProcessReady).State.PID
	w.Stop()
	await(t, "the stop", func() bool { return w.State().Phase != Running })
	w.Release()
	w.end()
	w.expect(forced...)
	if !gone(pid) {
		t.Error("the process runs on")
	}
}

// Whichever of the two comes first, the unit ends, and the process with the stop alone.
func TestStopDuringRelease(t *testing.T) {
	for range 20 {
		spec := commandSpec(t, "sleep", "3600")
		w := watch(t, spec)
		pid := w.until(ProcessReady).State.PID
		var both sync.WaitGroup
		both.Go(w.Stop)
		both.Go(w.Release)
		both.Wait()
		w.awaitDone()
		if stopped := w.State().Phase == Stopped; stopped != gone(pid) {
			t.Errorf("stopped: %v, gone: %v", stopped, gone(pid))
		}
		if !gone(pid) {
			again := adopt(t, spec, w.journal.last())
			again.Stop()
			again.end()
		}
	}
}

// One that isn't ready yet is asked no more once it is let go.
func TestReleaseBeforeReady(t *testing.T) {
	spec, readyFile := fixtureSpec(t, "serve")
	spec.Ready = fileAppears(readyFile + " of another")
	w := watch(t, spec)
	pid := w.next().State.PID
	w.Release()
	w.awaitDone()
	w.expect("process started: starting")
	if gone(pid) {
		t.Error("the process went with its supervisor")
	}
	spec.Ready = fileAppears(readyFile)
	again := adopt(t, spec, w.journal.last())
	again.until(ProcessReady)
	again.expect("process adopted: starting", "process ready: running")
	if err := unix.Kill(pid, 0); err != nil {
		t.Error(err)
	}
	again.Stop()
	again.end()
}

// What a process that is gone left behind has its grace from whoever restarts it, and isn't waited for by one that lets go.
func TestReleaseWhileLeftoversHaveTheirGrace(t *testing.T) {
	for _, stop := range []bool{false, true} {
		t.Run(fmt.Sprintf("stopped=%v", stop), func(t *testing.T) {
			inAndOutOfGroups(t, func(t *testing.T) {
				spec, readyFile := fixtureSpec(t, "with-child")
				spec.Args = []string{readyFile, "ignore-term"}
				w := watch(t, spec)
				leader := w.until(ProcessReady).State.PID
				child := childOf(t, readyFile)
				w.Restart(0)
				await(t, "the leader's end", func() bool { return groupLives(leader) && !exists(fmt.Sprintf("/proc/%d", leader)) })
				if stop {
					w.Stop()
				}
				w.Release()
				if stop { // which is finished first
					if err := unix.Kill(child, unix.SIGKILL); err != nil {
						t.Fatal(err)
					}
					w.end()
					w.expect("process started: starting", "process ready: running", "restart began: restarting", "unit ended: stopped")
					return
				}
				w.awaitDone()
				if gone(child) {
					t.Fatal("the child was killed before its grace was over")
				}
				again := adopt(t, spec, w.journal.last(), func(e Event) {
					if e.Kind == ProcessStarted && !gone(child) {
						t.Error("the child lives beside another process")
					}
				})
				again.until(ProcessReady)
				again.expect("process adopted: starting", "process exited: starting", "process started: starting", "process ready: running")
			})
		})
	}
}
