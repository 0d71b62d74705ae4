package supervisor

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// graceful is how the events of a unit go that needs no force.
var graceful = []string{"process started: starting", "process ready: running", "unit ended: stopped"}

// forced is how they go where the stop signal isn't enough.
var forced = []string{
	"process started: starting", "process ready: running", "stop escalated: stopping", "unit ended: stopped",
}

func TestStopBeforeReady(t *testing.T) {
	spec, readyFile := fixtureSpec(t, "serve")
	spec.Args = []string{readyFile + " of another"}
	w := watch(t, spec)
	await(t, "the process", func() bool { return exists(spec.Args[0]) })
	w.Stop()
	end := w.end()
	w.expect("process started: starting", "unit ended: stopped")
	if end.State.LastExit.Signal != "SIGTERM" {
		t.Errorf("exit %+v", end.State.LastExit)
	}
}

func TestStopIsIdempotent(t *testing.T) {
	w := watch(t, commandSpec(t, "sleep", "3600"))
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			w.Stop()
			awaitClosed(t, "the unit's end", w.Done())
			w.Stop()
		})
	}
	all.Wait()
	w.end()
	// A stop may come before the readiness.
	if got := w.sequence(); got[0] != graceful[0] || got[len(got)-1] != graceful[2] || len(got) > 3 {
		t.Errorf("events %q", got)
	}
}

func TestStopSignalIsTheSpecs(t *testing.T) {
	spec := commandSpec(t, "sh", "-c", "trap 'exit 5' INT; echo $$ >ready; while :; do sleep 0.01; done")
	spec.StopSignal = unix.SIGINT
	w := watch(t, spec)
	w.until(ProcessReady)
	await(t, "the trap", func() bool { return exists(spec.Dir + "/ready") })
	w.Stop()
	end := w.end()
	w.expect(graceful...)
	if end.State.LastExit.Code != 5 {
		t.Errorf("exit %+v", end.State.LastExit)
	}
}

func TestStopEscalatesAfterTheGrace(t *testing.T) {
	spec, _ := fixtureSpec(t, "ignore-term")
	spec.StopGrace = 50 * time.Millisecond
	w := watch(t, spec)
	w.until(ProcessReady)
	asked := time.Now()
	w.Stop()
	end := w.end()
	w.expect(forced...)
	if exit := end.State.LastExit; exit.Signal != "SIGKILL" || exit.At.Before(asked.Add(spec.StopGrace)) {
		t.Errorf("exit %+v, want SIGKILL and not before the grace is over", exit)
	}
}

func TestStopWakesAStoppedProcess(t *testing.T) {
	spec, _ := fixtureSpec(t, "stop-self")
	spec.Ready = nil
	w := watch(t, spec)
	pid := w.until(ProcessReady).State.PID
	await(t, "SIGSTOP", func() bool { return strings.Contains(procFile(t, pid, "status"), "T (stopped)") })
	w.Stop()
	end := w.end()
	w.expect(graceful...)
	if exit := end.State.LastExit; exit.Signal != "SIGTERM" {
		t.Errorf("exit %+v", exit)
	}
}

// A member of the group that goes on after its leader has all of the grace to end by itself, and no more.
func TestStopOfALeaderWithAChild(t *testing.T) {
	for name, test := range map[string]struct {
		child    string
		grace    time.Duration
		want     []string
		finished bool
	}{
		"that ends at once":       {"serve", never, graceful, false},
		"that finishes its work":  {"slow-term", never, graceful, true},
		"that ignores the signal": {"ignore-term", 50 * time.Millisecond, forced, false},
	} {
		t.Run(name, func(t *testing.T) {
			spec, readyFile := fixtureSpec(t, "with-child")
			spec.Args = []string{readyFile, test.child}
			spec.StopGrace = test.grace
			w := watch(t, spec)
			w.until(ProcessReady)
			child := childOf(t, readyFile)
			w.Stop()
			end := w.end()
			w.expect(test.want...)
			// A short grace may be over before a busy machine has ended the leader.
			if exit := end.State.LastExit; exit.Signal != "SIGTERM" && test.grace == never {
				t.Errorf("exit %+v", exit)
			}
			if finished := exists(readyFile + ".child.finished"); finished != test.finished {
				t.Errorf("the child finished: %v", finished)
			}
			if !gone(child) {
				t.Error("the child is left")
			}
		})
	}
}

func TestCrashTakesTheChildrenAlong(t *testing.T) {
	spec, readyFile := fixtureSpec(t, "with-child")
	spec.Args = []string{readyFile, "ignore-term"}
	spec.Restart.First, spec.Restart.Max = never, never
	child := make(chan int, 1)
	w := watch(t, spec, func(e Event) {
		if e.Kind != ProcessExited {
			return
		}
		if !gone(<-child) {
			t.Error("the child outlived the event that says it is gone")
		}
	})
	w.until(ProcessReady)
	child <- childOf(t, readyFile)
	w.kill()
	w.until(ProcessExited)
	w.expect("process started: starting", "process ready: running", "process exited: starting")
}

func childOf(t *testing.T, readyFile string) int {
	t.Helper()
	text, err := os.ReadFile(readyFile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(string(text))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func procFile(t *testing.T, pid int, name string) string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// A process that has left the session, and whose parent is gone, is still the unit's.
func TestEscapeesEndWithTheUnit(t *testing.T) {
	for name, test := range map[string]struct {
		mode     string
		grace    time.Duration
		crash    bool
		want     []string
		finished bool
	}{
		"at a stop":                      {"serve", never, false, graceful, false},
		"after finishing its work":       {"slow-term", never, false, graceful, true},
		"by force after the grace":       {"ignore-term", 50 * time.Millisecond, false, forced, false},
		"at once where the leader fails": {"slow-term", never, true, []string{graceful[0], graceful[1], "process exited: starting"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			spec, readyFile := fixtureSpec(t, "escape")
			spec.Args = []string{readyFile, test.mode}
			spec.StopGrace = test.grace
			spec.Restart.First, spec.Restart.Max = never, never
			w := watch(t, spec)
			leader := w.until(ProcessReady).State.PID
			escapee := childOf(t, readyFile)
			if session, err := unix.Getsid(escapee); err != nil || session != escapee || gone(escapee) {
				t.Fatalf("the escapee is in session %d (%v)", session, err)
			}
			if test.crash {
				if err := unix.Kill(leader, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				w.until(ProcessExited)
			} else {
				w.Stop()
				w.end()
			}
			w.expect(test.want...)
			if !gone(escapee) {
				t.Error("the escapee is left")
			}
			if finished := exists(readyFile + ".child.finished"); finished != test.finished {
				t.Errorf("the escapee finished: %v", finished)
			}
		})
	}
}
