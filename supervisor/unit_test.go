package supervisor

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestUnitRunsUntilItIsStopped(t *testing.T) {
	spec, _ := fixtureSpec(t, "serve")
	w := watch(t, spec)
	started, ready := w.next(), w.next()
	w.Stop()
	end := w.end()
	w.expect("process started: starting", "process ready: running", "unit ended: stopped")

	if pid := started.State.PID; pid == 0 || ready.State.PID != pid || started.ID != spec.ID {
		t.Errorf("one process should have started and served: %+v, %+v", started, ready)
	}
	if ready.State.LastExit != nil || end.State.StartedAt != started.State.StartedAt || end.State.Restarts != 0 {
		t.Errorf("states: %+v, %+v", ready.State, end.State)
	}
	if exit := end.State.LastExit; exit.Signal != "SIGTERM" || exit.Code != -1 || exit.At.Before(end.State.StartedAt) {
		t.Errorf("exit: %+v", exit)
	}
}

func TestSettledFollowsTheEvent(t *testing.T) {
	for name, test := range map[string]struct {
		args  []string
		phase Phase
	}{
		"ready":  {[]string{"3600"}, Running},
		"failed": {[]string{"no number"}, Failed},
	} {
		t.Run(name, func(t *testing.T) {
			spec := commandSpec(t, "sleep", test.args...)
			if test.phase == Failed {
				spec.Ready = func(ctx context.Context) error {
					<-ctx.Done()
					return ctx.Err()
				}
			}
			unit := make(chan *Unit, 1)
			w := watch(t, spec, func(e Event) {
				if e.State.Phase != test.phase {
					return
				}
				u := <-unit
				select {
				case <-u.Settled():
					t.Error("settled before the event was told")
				default:
				}
				unit <- u
			})
			unit <- w.Unit
			awaitClosed(t, "settled", w.Settled())
			if phase := w.State().Phase; phase != test.phase {
				t.Errorf("settled as %v", phase)
			}
		})
	}
}

func TestEndBeforeReadyFailsTheUnit(t *testing.T) {
	const earlier = "what an earlier process wrote\n"
	long := numbered(2000)
	for name, test := range map[string]struct {
		mode   string
		args   []string
		want   Exit
		string string
	}{
		"exit code": {"exit", []string{"3", "to stdout\n", "to stderr\n"}, Exit{Code: 3, Output: "to stdout\nto stderr\n"}, "exit code 3"},
		"exit 0":    {"exit", []string{"0", "", ""}, Exit{}, "exit code 0"},
		"signal":    {"die", []string{"9"}, Exit{Code: -1, Signal: "SIGKILL"}, "killed by SIGKILL"},
		"prints":    {"print", []string{"2000"}, Exit{Code: 3, Output: long[len(long)-maxOutput:]}, "exit code 3"},
	} {
		t.Run(name, func(t *testing.T) {
			spec, _ := fixtureSpec(t, test.mode, test.args...)
			if err := os.WriteFile(spec.LogPath, []byte(earlier), 0o600); err != nil {
				t.Fatal(err)
			}
			w := watch(t, spec)
			exit := w.end().State.LastExit
			w.expect("process started: starting", "unit ended: failed")
			if exit.Code != test.want.Code || exit.Signal != test.want.Signal || exit.Err != nil || exit.Output != test.want.Output {
				t.Errorf("exit %+v, want %+v", exit, test.want)
			}
			if exit.String() != test.string {
				t.Errorf("exit says %q, want %q", exit, test.string)
			}
			if log, err := os.ReadFile(spec.LogPath); err != nil || !strings.HasPrefix(string(log), earlier) {
				t.Errorf("the log lost what was in it (%v)", err)
			}
		})
	}
}

func TestRealTimeSignalHasAName(t *testing.T) {
	w := watch(t, commandSpec(t, "sh", "-c", "kill -40 $$"))
	if exit := w.until(ProcessExited).State.LastExit; exit.Signal != "signal 40" {
		t.Errorf("exit %+v", exit)
	}
}

func TestWithoutProbeItIsReadyHoweverSoonItEnds(t *testing.T) {
	for range 20 {
		w := watch(t, commandSpec(t, "sh", "-c", "exit 7"))
		exited := w.until(ProcessExited)
		w.expect("process started: starting", "process ready: running", "process exited: starting")
		if exited.State.LastExit.Code != 7 {
			t.Errorf("exit %+v", exited.State.LastExit)
		}
		w.Stop()
		w.end()
	}
}

// An answer that comes from another process at the same port doesn't make a dead one ready.
func TestReadinessOfADeadProcessIsNone(t *testing.T) {
	for range 20 { // select picks at random
		spec := commandSpec(t, "sh", "-c", "exit 7")
		pid := make(chan int, 1)
		spec.Ready = func(context.Context) error {
			fd, err := unix.PidfdOpen(<-pid, 0)
			if err != nil {
				return err
			}
			ended(fd, -1)
			return unix.Close(fd)
		}
		w := watch(t, spec)
		pid <- w.next().State.PID
		w.end()
		w.expect("process started: starting", "unit ended: failed")
	}
}

func TestCrashIsAnsweredWithARestart(t *testing.T) {
	spec, _ := fixtureSpec(t, "serve")
	spec.Restart.First, spec.Restart.Max = 20*time.Millisecond, 20*time.Millisecond
	w := watch(t, spec)
	first := w.until(ProcessReady)
	w.kill()
	exited := w.until(ProcessExited)
	again := w.until(ProcessReady)
	w.Stop()
	end := w.end()
	w.expect(
		"process started: starting", "process ready: running", "process exited: starting",
		"process started: starting", "process ready: running", "unit ended: stopped",
	)
	if s := exited.State; s.PID != 0 || s.Restarts != 0 || s.LastExit.Signal != "SIGKILL" ||
		s.NextStart.Before(s.LastExit.At.Add(15*time.Millisecond)) {
		t.Errorf("after the crash: %+v, %+v", s, s.LastExit)
	}
	if s := again.State; s.PID == first.State.PID || s.Restarts != 1 || s.LastExit != exited.State.LastExit ||
		s.StartedAt.Before(exited.State.NextStart) || !s.NextStart.IsZero() {
		t.Errorf("after the restart: %+v", s)
	}
	if end.State.LastExit.Signal != "SIGTERM" || end.State.Restarts != 1 {
		t.Errorf("at the end: %+v", end.State)
	}
}

func TestCrashLoop(t *testing.T) {
	spec := commandSpec(t, "sh", "-c", "exit 3")
	spec.Restart.Threshold = 3
	w := watch(t, spec)
	for range 4 {
		w.until(ProcessExited)
	}
	w.expect(
		"process started: starting", "process ready: running", "process exited: starting",
		"process started: starting", "process ready: running", "process exited: starting",
		"process started: starting", "process ready: running", "process exited: crash-looping",
		"process started: starting", "process ready: running", "process exited: crash-looping",
	)
	if s := w.seen[len(w.seen)-1].State; s.Restarts != 3 {
		t.Errorf("%d restarts, want 3", s.Restarts)
	}
}

func TestCrashLoopIsLeftAfterAQuietTime(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	spec.Restart.Threshold, spec.Restart.Window = 2, 500*time.Millisecond
	w := watch(t, spec)
	w.until(ProcessReady)
	w.kill()
	first := w.until(ProcessExited).State.LastExit.At
	w.until(ProcessReady)
	time.Sleep(time.Until(first.Add(spec.Restart.Window))) // the quiet time itself
	w.kill()
	second := w.until(ProcessExited).State
	w.expect(
		"process started: starting", "process ready: running", "process exited: starting",
		"process started: starting", "process ready: running", "process exited: starting",
	)
	if n := w.journal.last().Crashes; n != 1 {
		t.Errorf("%d crashes count, the last %v after the first", n, second.LastExit.At.Sub(first))
	}
}

func TestRestartGoesOnWhileTheBinaryIsMissing(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	binary := filepath.Join(spec.Dir, "server")
	sleep := spec.Path
	link := func() {
		if err := os.Symlink(sleep, binary); err != nil {
			t.Fatal(err)
		}
	}
	link()
	spec.Path = binary
	w := watch(t, spec)
	w.until(ProcessReady)
	if err := os.Remove(binary); err != nil {
		t.Fatal(err)
	}
	w.kill()
	for range 3 {
		w.until(ProcessExited)
	}
	w.expect(
		"process started: starting", "process ready: running",
		"process exited: starting", "process exited: starting", "process exited: starting",
	)
	s := w.seen[len(w.seen)-1].State
	if exit := s.LastExit; exit.Code != -1 || !errors.Is(exit.Err, fs.ErrNotExist) || !strings.Contains(exit.String(), binary) {
		t.Errorf("exit %+v", exit)
	}
	if s.Restarts != 0 || s.PID != 0 {
		t.Errorf("counted a start that wasn't one: %+v", s)
	}
	link()
	if again := w.until(ProcessReady).State; again.Restarts != 1 {
		t.Errorf("back with %+v", again)
	}
}

// Whatever ends a process ends the wait for its readiness before anything is told of it.
func TestReadyIsCancelledAndAwaited(t *testing.T) {
	for name, test := range map[string]struct {
		act  func(w *watched, answer chan<- struct{})
		want []string
	}{
		"stop": {
			func(w *watched, _ chan<- struct{}) { w.Stop() },
			[]string{"process started: starting", "unit ended: stopped"},
		},
		"exit": {
			func(w *watched, _ chan<- struct{}) { w.kill() },
			[]string{"process started: starting", "unit ended: failed"},
		},
		"crash after a restart": {
			func(w *watched, answer chan<- struct{}) {
				answer <- struct{}{}
				w.until(ProcessReady)
				w.kill()
				w.until(ProcessStarted)
				w.kill()
				w.until(ProcessExited)
				w.Stop()
			},
			[]string{
				"process started: starting", "process ready: running", "process exited: starting",
				"process started: starting", "process exited: starting", "unit ended: stopped",
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var waits atomic.Int32
			answer := make(chan struct{})
			spec := commandSpec(t, "sleep", "3600")
			spec.Ready = func(ctx context.Context) error {
				waits.Add(1)
				defer waits.Add(-1)
				select {
				case <-answer:
					return nil
				case <-ctx.Done():
					time.Sleep(20 * time.Millisecond) // a probe that is slow to notice
					return ctx.Err()
				}
			}
			w := watch(t, spec, func(e Event) {
				if n := waits.Load(); e.State.PID == 0 && n != 0 {
					t.Errorf("%v: %d waits for readiness go on", e.Kind, n)
				}
			})
			await(t, "the probe", func() bool { return waits.Load() == 1 })
			test.act(w, answer)
			w.end()
			w.expect(test.want...)
		})
	}
}

func TestStopDuringBackOff(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	spec.Restart.First, spec.Restart.Max = never, never
	w := watch(t, spec)
	w.until(ProcessReady)
	w.kill()
	exited := w.until(ProcessExited)
	w.Stop()
	end := w.end()
	w.expect("process started: starting", "process ready: running", "process exited: starting", "unit ended: stopped")
	if end.State.LastExit != exited.State.LastExit {
		t.Errorf("exit %+v, want the crash's", end.State.LastExit)
	}
}
