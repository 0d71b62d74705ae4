package supervisor

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// outcome awaits what has come of a restart that was asked for.
func outcome(t *testing.T, c <-chan Restarted) Restarted {
	t.Helper()
	select {
	case r := <-c:
		return r
	case <-time.After(patience):
		t.Fatal("still waiting for the outcome of a restart")
		return Restarted{}
	}
}

// readyAnew keeps a new process from counting as ready by the file of the one before.
func readyAnew(t *testing.T, readyFile string) func(Event) {
	return func(e Event) {
		if e.Kind != ProcessExited {
			return
		}
		if err := os.Remove(readyFile); err != nil {
			t.Error(err)
		}
	}
}

func TestRestartThatIsAskedFor(t *testing.T) {
	spec, _ := fixtureSpec(t, "serve")
	spec.Restart.First, spec.Restart.Max = never, never // no pause is sat out
	w := watch(t, spec)
	first := w.until(ProcessReady).State
	got := outcome(t, w.Restart(0))
	if s := got.State; got.Early != nil || s.Phase != Running || s.PID == first.PID || s.PID == 0 || s.Restarts != 1 {
		t.Errorf("outcome %+v", got)
	}
	if exit := got.State.LastExit; exit.Signal != "SIGTERM" || exit.Cause != restartAsked {
		t.Errorf("exit %+v", exit)
	}
	// The same request again is the same restart.
	if again := outcome(t, w.Restart(0)); again.State.PID != got.State.PID || again.State.Restarts != 1 {
		t.Errorf("asked again: %+v", again)
	}
	w.Stop()
	w.end()
	w.expect(
		"process started: starting", "process ready: running", "restart began: restarting", "process exited: starting",
		"process started: starting", "process ready: running", "unit ended: stopped",
	)
	if began := w.seen[2].State; began.PID != first.PID || began.Ending != restartAsked {
		t.Errorf("at its beginning: %+v", began)
	}
	if s := w.seen[4].State; s.Ending != "" {
		t.Errorf("when it had begun: %+v", s)
	}
	if late := outcome(t, w.Restart(1)); late.State.Phase != Stopped {
		t.Errorf("asked after the end: %+v", late)
	}
}

// Who asks for one restart gets one, however many ask for it at once.
func TestRestartAskedForByMany(t *testing.T) {
	spec, _ := fixtureSpec(t, "slow-term")
	w := watch(t, spec)
	w.until(ProcessReady)
	var all []<-chan Restarted
	for range 50 {
		all = append(all, w.Restart(0))
	}
	for _, c := range all {
		if got := outcome(t, c); got.State.Restarts != 1 || got.State.Phase != Running {
			t.Errorf("outcome %+v", got)
		}
	}
	w.Stop()
	if end := w.end(); end.State.Restarts != 1 {
		t.Errorf("%d restarts", end.State.Restarts)
	}
}

func TestRestartEscalatesAfterTheGrace(t *testing.T) {
	spec, readyFile := fixtureSpec(t, "ignore-term")
	spec.StopGrace = 50 * time.Millisecond
	w := watch(t, spec, readyAnew(t, readyFile))
	w.until(ProcessReady)
	if exit := outcome(t, w.Restart(0)).State.LastExit; exit.Signal != "SIGKILL" || exit.Cause != restartAsked {
		t.Errorf("exit %+v", exit)
	}
	w.Stop()
	w.end()
	w.expect(
		"process started: starting", "process ready: running", "restart began: restarting", "stop escalated: restarting",
		"process exited: starting", "process started: starting", "process ready: running", "stop escalated: stopping", "unit ended: stopped",
	)
}

// What the old process left behind in a session of its own is gone before the new one starts.
func TestRestartTakesEscapeesAlong(t *testing.T) {
	spec, readyFile := fixtureSpec(t, "escape")
	spec.Args = []string{readyFile, "ignore-term"}
	spec.StopGrace = 50 * time.Millisecond
	escapee := 0
	w := watch(t, spec, readyAnew(t, readyFile), func(e Event) {
		if e.Kind == ProcessExited && !gone(escapee) {
			t.Error("the escapee outlived the event that says it is gone")
		}
	})
	w.until(ProcessReady)
	escapee = childOf(t, readyFile)
	if got := outcome(t, w.Restart(0)); got.State.Phase != Running {
		t.Errorf("outcome %+v", got)
	}
}

// A crash loop ends with a restart that is asked for: it begins at once, and the crashes are forgotten.
func TestRestartLeavesACrashLoop(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	spec.Restart.Threshold, spec.Restart.First, spec.Restart.Max = 1, never, never
	w := watch(t, spec)
	w.until(ProcessReady)
	w.kill()
	crashed := w.until(ProcessExited)
	if crashed.State.Phase != CrashLooping || w.journal.last().Crashes != 1 {
		t.Fatalf("state %+v, on record %+v", crashed.State, w.journal.last())
	}
	got := outcome(t, w.Restart(0))
	if s := got.State; s.Phase != Running || s.Restarts != 1 || s.LastExit != crashed.State.LastExit || !s.NextStart.IsZero() {
		t.Errorf("outcome %+v", got)
	}
	if n := w.journal.last().Crashes; n != 0 {
		t.Errorf("%d crashes are on record", n)
	}
}

// A restart that is asked for is a new beginning, whether a process runs then or a pause is sat out: the next crash is the
// first again.
func TestRestartForgetsTheCrashes(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	spec.Restart.Threshold, spec.Restart.First, spec.Restart.Max = 2, never, never
	first := func(t *testing.T, w *watched) {
		t.Helper()
		if got := outcome(t, w.Restart(w.State().Restarts)); got.State.Phase != Running {
			t.Fatalf("outcome %+v", got)
		}
		w.kill()
		ended := func() *Exit { return w.until(ProcessExited).State.LastExit }
		for exit := ended(); exit.Cause == restartAsked; exit = ended() {
			continue // that was the restart's own
		}
		if s := w.State(); s.Phase != Starting || w.journal.last().Crashes != 1 {
			t.Errorf("state %+v, on record %+v", s, w.journal.last())
		}
	}
	before := watch(t, spec)
	before.until(ProcessReady)
	before.recorded()
	before.Release()
	before.awaitDone()
	r := before.journal.last()
	r.Crashes, r.LastExit = 1, &Exit{Code: 7, At: time.Now()}
	w := adopt(t, spec, r)
	w.until(ProcessReady)
	t.Run("while it runs", func(t *testing.T) { first(t, w) })
	t.Run("during a pause", func(t *testing.T) { first(t, w) })
}

// gatedSpec is ready, each time, when the test says so.
func gatedSpec(t *testing.T) (spec Spec, gate chan struct{}) {
	t.Helper()
	spec, gate = commandSpec(t, "sleep", "3600"), make(chan struct{})
	spec.Ready = func(ctx context.Context) error {
		select {
		case <-gate:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return spec, gate
}

// The new process dies before it is ready: that is the outcome, and from then on it is a crash like any other.
func TestRestartThatDiesEarly(t *testing.T) {
	spec, gate := gatedSpec(t)
	spec.Restart.First, spec.Restart.Max = never, never
	w := watch(t, spec)
	gate <- struct{}{}
	w.until(ProcessReady)
	c := w.Restart(0)
	w.until(ProcessStarted)
	w.kill()
	if got := outcome(t, c); got.Early == nil || got.Early.Signal != "SIGKILL" || got.Early.Cause != "" {
		t.Errorf("outcome %+v", got)
	}
	exited := w.until(ProcessExited).State
	if exited.Phase != Starting || exited.NextStart.IsZero() || w.journal.last().Crashes != 1 {
		t.Errorf("state %+v, on record %+v", exited, w.journal.last())
	}
	// Asked again, as by a caller that missed the answer, it says so again.
	if again := outcome(t, w.Restart(0)); again.Early == nil || again.State.PID != 0 {
		t.Errorf("asked again: %+v", again)
	}
	w.Stop()
	w.end()
}

func TestRestartThatCannotBeStarted(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	binary := spec.Dir + "/server"
	if err := os.Symlink(spec.Path, binary); err != nil {
		t.Fatal(err)
	}
	spec.Path = binary
	spec.Restart.First, spec.Restart.Max = never, never
	w := watch(t, spec)
	w.until(ProcessReady)
	if err := os.Remove(binary); err != nil {
		t.Fatal(err)
	}
	got := outcome(t, w.Restart(0))
	if got.Early == nil || !errors.Is(got.Early.Err, os.ErrNotExist) {
		t.Errorf("outcome %+v", got)
	}
	w.until(ProcessExited)
	w.until(ProcessExited)
	w.expect("process started: starting", "process ready: running", "restart began: restarting", "process exited: starting", "process exited: starting")
}

// A stop that comes during a restart wins.
func TestStopDuringARestart(t *testing.T) {
	t.Run("while the old process ends", func(t *testing.T) {
		spec, _ := fixtureSpec(t, "slow-term")
		w := watch(t, spec)
		w.until(ProcessReady)
		c := w.Restart(0)
		w.until(RestartBegan)
		w.Stop()
		end := w.end()
		if got := outcome(t, c); got.State.Phase != Stopped || got.Early != nil {
			t.Errorf("outcome %+v", got)
		}
		if end.State.LastExit.Cause != "" || end.State.Restarts != 0 || end.State.Ending != "" {
			t.Errorf("ended %+v", end.State)
		}
		w.expect("process started: starting", "process ready: running", "restart began: restarting", "unit ended: stopped")
	})
	t.Run("while the new process starts", func(t *testing.T) {
		spec, gate := gatedSpec(t)
		w := watch(t, spec)
		gate <- struct{}{}
		w.until(ProcessReady)
		c := w.Restart(0)
		w.until(ProcessStarted)
		w.Stop()
		w.end()
		if got := outcome(t, c); got.State.Phase != Stopped || got.Early != nil {
			t.Errorf("outcome %+v", got)
		}
	})
}

// A restart before the first process was ever ready replaces it, and who waits for the unit goes on waiting.
func TestRestartBeforeReady(t *testing.T) {
	spec, gate := gatedSpec(t)
	w := watch(t, spec)
	w.until(ProcessStarted)
	c := w.Restart(0)
	w.until(ProcessStarted)
	select {
	case <-w.Settled():
		t.Error("settled without a process that serves")
	default:
	}
	gate <- struct{}{}
	if got := outcome(t, c); got.State.Phase != Running || got.State.Restarts != 1 {
		t.Errorf("outcome %+v", got)
	}
	awaitClosed(t, "settled", w.Settled())
	w.until(ProcessReady)
	w.expect("process started: starting", "restart began: restarting", "process exited: starting", "process started: starting", "process ready: running")
}

// The next supervisor goes on with a restart in whose midst its predecessor ended.
func TestRestartOutlivesItsSupervisor(t *testing.T) {
	for name, test := range map[string]struct {
		runs bool
		want []string
	}{
		"the old process runs": {true, []string{
			"process adopted: running", "restart began: restarting", "process exited: starting", "process started: starting", "process ready: running",
		}},
		"the old process is gone": {false, []string{
			"process adopted: starting", "process exited: starting", "process started: starting", "process ready: running",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			spec, _ := fixtureSpec(t, "ignore-term")
			spec.Restart.First, spec.Restart.Max, spec.Restart.Policy = never, never, Never
			before := watch(t, spec)
			pid := before.until(ProcessReady).State.PID
			c := before.Restart(0)
			before.until(RestartBegan)
			before.Release()
			before.awaitDone()
			if got := outcome(t, c); got.State.Phase != Restarting {
				t.Errorf("outcome %+v", got)
			}
			if !test.runs {
				if err := unix.Kill(pid, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				if _, err := unix.Wait4(pid, nil, 0, nil); err != nil {
					t.Fatal(err)
				}
			}
			spec.StopGrace = 50 * time.Millisecond
			w := adopt(t, spec, before.journal.last())
			s := w.until(ProcessReady).State
			if s.PID == pid || s.Restarts != 1 || s.LastExit.Cause != restartAsked {
				t.Errorf("state %+v, exit %+v", s, s.LastExit)
			}
			var without []string // the grace may have to be waited out
			for _, e := range w.sequence() {
				if !strings.HasPrefix(e, "stop escalated") {
					without = append(without, e)
				}
			}
			w.seen = nil
			if got, want := strings.Join(without, "\n"), strings.Join(test.want, "\n"); got != want {
				t.Errorf("events\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// A process that runs and doesn't work is ended, and that is a crash.
func TestUnwellProcessIsReplaced(t *testing.T) {
	spec, _ := fixtureSpec(t, "serve")
	spec.Restart.Policy = OnFailure
	w := watch(t, spec)
	pid := w.until(ProcessReady).State.PID
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	await(t, "SIGSTOP", func() bool { return Suspended(pid) })
	w.Unwell(pid+1, "it is another one") // nothing happens
	w.Unwell(pid, "it hangs")
	exited := w.until(ProcessExited).State
	if exit := exited.LastExit; exit.Signal != "SIGTERM" || exit.Cause != "it hangs" || exit.String() != "killed by SIGTERM (it hangs)" {
		t.Errorf("exit %+v", exit)
	}
	if w.journal.last().Crashes != 1 {
		t.Errorf("on record %+v", w.journal.last())
	}
	again := w.until(ProcessReady).State
	w.Unwell(pid, "it was replaced already") // nothing happens
	if again.PID == pid || again.Restarts != 1 || Suspended(again.PID) {
		t.Errorf("after the restart %+v", again)
	}
	w.Stop()
	w.end()
	w.expect(
		"process started: starting", "process ready: running", "restart began: restarting", "process exited: starting",
		"process started: starting", "process ready: running", "unit ended: stopped",
	)
}

// A restart that is asked for while a hung process is being ended is made at once.
func TestRestartOfAnUnwellProcess(t *testing.T) {
	spec, _ := fixtureSpec(t, "slow-term")
	spec.Restart.First, spec.Restart.Max, spec.Restart.Policy = never, never, Never
	w := watch(t, spec)
	pid := w.until(ProcessReady).State.PID
	w.Unwell(pid, "it hangs")
	w.until(EndBegan)
	got := outcome(t, w.Restart(0))
	if s := got.State; s.Phase != Running || s.Restarts != 1 || s.LastExit.Cause != "it hangs" {
		t.Errorf("outcome %+v", got)
	}
	w.until(ProcessReady)
	w.expect(
		"process started: starting", "process ready: running", "end began: stopping", "restart began: restarting", "process exited: starting",
		"process started: starting", "process ready: running",
	)
}

// Where the policy doesn't start it again, a process that hangs is ended, and the unit has failed.
func TestUnwellProcessUnderAPolicyThatDoesNotRestart(t *testing.T) {
	spec, _ := fixtureSpec(t, "serve")
	spec.Restart.Policy, spec.Restart.Success = Never, []int{0}
	w := watch(t, spec)
	w.Unwell(w.until(ProcessReady).State.PID, "it hangs")
	if began := w.until(EndBegan).State; began.Ending != "it hangs" || began.PID == 0 {
		t.Errorf("at its beginning: %+v", began)
	}
	if end := w.end().State; !end.Completed || end.Phase != Failed || end.Ending != "" || end.LastExit.Cause != "it hangs" {
		t.Errorf("ended %+v", end)
	}
	w.expect("process started: starting", "process ready: running", "end began: stopping", "unit ended: failed")
}

// slowSpec is ready at once but in the given processes, counted from 1, which aren't ready for as long as they may take.
func slowSpec(t *testing.T, slow ...int32) Spec {
	t.Helper()
	spec := commandSpec(t, "sleep", "3600")
	spec.ReadyTimeout = 20 * time.Millisecond
	var count atomic.Int32
	spec.Ready = func(ctx context.Context) error {
		if !slices.Contains(slow, count.Add(1)) {
			return nil
		}
		<-ctx.Done()
		return context.Cause(ctx)
	}
	return spec
}

// A process that isn't ready in its time is ended, and that is a crash.
func TestReadyTimeoutIsACrash(t *testing.T) {
	w := watch(t, slowSpec(t, 2, 3))
	w.until(ProcessReady)
	c := w.Restart(0)
	if got := outcome(t, c); got.Early == nil || got.Early.Cause != "not ready within 20ms" || got.Early.Signal != "SIGTERM" {
		t.Errorf("outcome %+v", got)
	}
	if s := w.until(ProcessReady).State; s.Restarts != 3 || w.journal.last().Crashes != 2 {
		t.Errorf("state %+v, on record %+v", s, w.journal.last())
	}
	w.expect(
		"process started: starting", "process ready: running", "restart began: restarting", "process exited: starting",
		"process started: starting", "restart began: restarting", "process exited: starting",
		"process started: starting", "restart began: restarting", "process exited: starting",
		"process started: starting", "process ready: running",
	)
}

// A first process that isn't ready in its time fails its unit, as one that ends before it is.
func TestReadyTimeoutOfTheFirstProcess(t *testing.T) {
	w := watch(t, slowSpec(t, 1))
	if end := w.end().State; end.Completed || end.LastExit.Cause != "not ready within 20ms" {
		t.Errorf("ended %+v", end)
	}
	w.expect("process started: starting", "end began: stopping", "unit ended: failed")
}

// An adopted process has its time anew, and is held to it.
func TestReadyTimeoutOfAnAdoptedProcess(t *testing.T) {
	spec, gate := gatedSpec(t)
	before := watch(t, spec)
	gate <- struct{}{}
	before.until(ProcessReady)
	before.kill()
	before.until(ProcessStarted)
	pid := before.recorded().Identity.PID
	before.Release()
	before.awaitDone()
	quick := slowSpec(t, 1)
	spec.Ready, spec.ReadyTimeout = quick.Ready, quick.ReadyTimeout
	w := adopt(t, spec, before.journal.last())
	if s := w.until(ProcessReady).State; s.PID == pid || s.Restarts != 2 || s.LastExit.Cause != "not ready within 20ms" {
		t.Errorf("state %+v, exit %+v", s, s.LastExit)
	}
	w.expect("process adopted: starting", "restart began: restarting", "process exited: starting", "process started: starting", "process ready: running")
}

// A process that is found to hang before it is ready isn't waited for.
func TestUnwellProcessThatIsNotReady(t *testing.T) {
	spec, gate := gatedSpec(t)
	w := watch(t, spec)
	gate <- struct{}{}
	w.until(ProcessReady)
	w.kill()
	pid := w.until(ProcessStarted).State.PID
	w.Unwell(pid, "it hangs")
	w.until(ProcessExited) // before that, the process that hangs could still get ready
	gate <- struct{}{}
	if s := w.until(ProcessReady).State; s.PID == pid || s.LastExit.Cause != "it hangs" || w.journal.last().Crashes != 2 {
		t.Errorf("state %+v, exit %+v, on record %+v", s, s.LastExit, w.journal.last())
	}
}

func TestSuspendedTellsWhatASignalStopped(t *testing.T) {
	spec, _ := fixtureSpec(t, "stop-self")
	spec.Ready = nil
	w := watch(t, spec)
	pid := w.until(ProcessReady).State.PID
	await(t, "SIGSTOP", func() bool { return Suspended(pid) })
	if Suspended(os.Getpid()) || Suspended(0) {
		t.Error("what isn't stopped is said to be")
	}
}
