package supervisor

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// hold keeps a process from dying, as a disk that doesn't answer would, until thaw is called or the test is over.
func hold(t *testing.T, pid int) (thaw func()) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	freezer := findHierarchy(mounts, own, "freezer").group
	if freezer == "" {
		skip(t, "no v1 freezer is mounted, in which processes outlive SIGKILL")
	}
	dir := filepath.Join(freezer, "frozen"+strings.ReplaceAll(t.TempDir(), "/", "-"))
	if err := os.Mkdir(dir, 0o700); err != nil {
		skip(t, "no control group can be made here: %v", err)
	}
	set := func(name, value string) {
		if err := write(filepath.Join(dir, name), value); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := removeGroup(dir); err != nil {
			t.Error(err)
		}
	})
	thaw = func() { set("freezer.state", "THAWED") }
	t.Cleanup(func() {
		thaw()
		await(t, "the held process's end", func() bool { return len(pidsIn(dir)) == 0 })
	})
	set("cgroup.procs", strconv.Itoa(pid))
	set("freezer.state", "FROZEN")
	await(t, "the process to stand still", func() bool {
		state, err := os.ReadFile(filepath.Join(dir, "freezer.state"))
		return err == nil && strings.TrimSpace(string(state)) == "FROZEN"
	})
	return thaw
}

// impatient starts, or adopts, a unit that soon sees no hope.
func impatient(begin func(*Supervisor) (*Unit, error)) func(*Supervisor) (*Unit, error) {
	return func(s *Supervisor) (*Unit, error) {
		s.patience = 20 * time.Millisecond
		return begin(s)
	}
}

// inAndOutOfGroups runs a test with control groups and without.
func inAndOutOfGroups(t *testing.T, f func(*testing.T)) {
	for _, groups := range []string{"", "1"} {
		t.Run(fmt.Sprintf("groups=%q", groups), func(t *testing.T) {
			t.Setenv(groupsEnv, groups)
			f(t)
		})
	}
}

// blames tells whether a state says of a process that it holds the unit up.
func blames(s State, pid int) bool {
	return strings.HasPrefix(s.Unkillable, fmt.Sprintf("process %d, ", pid)) && strings.HasSuffix(s.Unkillable, " in state D (disk sleep)")
}

// While a process of a crashed one lives there is no other one, which would want the same port and files.
func TestNoSuccessorBesideWhatCannotBeKilled(t *testing.T) {
	inAndOutOfGroups(t, func(t *testing.T) {
		spec, readyFile := fixtureSpec(t, "escape")
		spec.Args = []string{readyFile, "serve"}
		w := watchFrom(t, spec, &memory{}, impatient(func(s *Supervisor) (*Unit, error) { return s.Start(spec) }))
		w.until(ProcessReady)
		escapee := childOf(t, readyFile)
		thaw := hold(t, escapee)
		w.kill()
		if s := w.until(KillFailed).State; !blames(s, escapee) {
			t.Errorf("held up by %q, want process %d", s.Unkillable, escapee)
		}
		if gone(escapee) {
			t.Fatal("the escapee isn't held")
		}
		thaw()
		if s := w.until(ProcessReady).State; s.Unkillable != "" || s.LastExit.Signal != "SIGKILL" {
			t.Errorf("state %+v", s)
		}
		if !gone(escapee) {
			t.Error("the escapee lives beside another process")
		}
		w.expect("process started: starting", "process ready: running", "kill failed: restarting", "process exited: starting",
			"process started: starting", "process ready: running")
	})
}

// A stop isn't done before, and a unit that is let go doesn't wait for it.
func TestStopOfWhatCannotBeKilled(t *testing.T) {
	for _, who := range []string{"the leader", "a descendant"} {
		t.Run(who, func(t *testing.T) {
			inAndOutOfGroups(t, func(t *testing.T) {
				spec, readyFile := fixtureSpec(t, "escape")
				spec.Args, spec.StopGrace = []string{readyFile, "serve"}, time.Millisecond
				w := watchFrom(t, spec, &memory{}, impatient(func(s *Supervisor) (*Unit, error) { return s.Start(spec) }))
				held := w.until(ProcessReady).State.PID
				if who == "a descendant" {
					held = childOf(t, readyFile)
				}
				record := w.recorded()
				thaw := hold(t, held)
				w.Stop()
				if s := w.until(KillFailed).State; !blames(s, held) {
					t.Errorf("held up by %q, want process %d", s.Unkillable, held)
				}
				w.expect("process started: starting", "process ready: running", "stop escalated: stopping", "kill failed: stopping")
				w.Release()
				w.awaitDone()
				if s := w.State(); s.Phase != Stopping || gone(held) || len(w.events) > 0 {
					t.Fatalf("let go as %+v, with process %d gone: %v", s, held, gone(held))
				}

				again := watchFrom(t, spec, &memory{}, impatient(func(s *Supervisor) (*Unit, error) { return s.Adopt(spec, record, true) }))
				if s := again.until(KillFailed).State; !blames(s, held) {
					t.Errorf("held up by %q, want process %d", s.Unkillable, held)
				}
				again.Release()
				again.awaitDone()
				awaitClosed(t, "settled", again.Settled())
				if s := again.State(); s.Phase == Stopped || gone(held) || len(again.events) > 0 {
					t.Fatalf("let go as %+v, with process %d gone: %v", s, held, gone(held))
				}

				last := watchFrom(t, spec, &memory{}, impatient(func(s *Supervisor) (*Unit, error) { return s.Adopt(spec, record, true) }))
				last.until(KillFailed)
				thaw()
				if s := last.end().State; s.Phase != Stopped || s.Unkillable != "" {
					t.Errorf("ended %+v", s)
				}
				if !gone(held) {
					t.Error("it is taken for stopped, and lives")
				}
			})
		})
	}
}

// What the supervisor itself couldn't end doesn't hold up a stop that comes later, nor the release after that.
func TestStopOfWhatWasKilledInVain(t *testing.T) {
	inAndOutOfGroups(t, func(t *testing.T) {
		spec, _ := fixtureSpec(t, "serve")
		spec.StopGrace = time.Millisecond
		w := watchFrom(t, spec, &memory{}, impatient(func(s *Supervisor) (*Unit, error) { return s.Start(spec) }))
		pid := w.until(ProcessReady).State.PID
		record := w.recorded()
		thaw := hold(t, pid)
		w.Unwell(pid, "it hangs")
		w.until(KillFailed)
		w.Stop()
		await(t, "the stop", func() bool { return w.State().Phase == Stopping })
		w.Release()
		w.awaitDone()
		if s := w.State(); !blames(s, pid) || gone(pid) {
			t.Errorf("let go as %+v, with the process gone: %v", s, gone(pid))
		}
		again := watchFrom(t, spec, &memory{}, impatient(func(s *Supervisor) (*Unit, error) { return s.Adopt(spec, record, true) }))
		again.until(KillFailed)
		thaw()
		again.end()
	})
}

// A stop that comes with the release is done; the release is for what can't be.
func TestReleaseAfterAStopIsForWhatCannotBeKilled(t *testing.T) {
	for range 20 {
		both := make(chan struct{})
		w := watch(t, commandSpec(t, "sleep", "3600"), func(e Event) {
			if e.Kind == ProcessReady {
				<-both
			}
		})
		pid := w.next().State.PID
		w.Stop()
		w.Release()
		close(both)
		if s := w.end().State; s.Phase != Stopped || !gone(pid) {
			t.Fatalf("ended %+v, gone: %v", s, gone(pid))
		}
	}
}

func TestDescribe(t *testing.T) {
	self := os.Getpid()
	for want, pids := range map[string][]int{
		"a process that can't be seen":               nil,
		fmt.Sprintf("process %d", 1<<30):             {1 << 30},
		fmt.Sprintf("process %d, and 2 more", 1<<30): {1 << 30, self, 1},
	} {
		if got := describe(pids); got != want {
			t.Errorf("%v are %q, want %q", pids, got, want)
		}
	}
	name := strings.TrimSpace(procFile(t, self, "comm"))
	if got := describe([]int{self}); !strings.HasPrefix(got, fmt.Sprintf("process %d, %s, in state ", self, name)) {
		t.Errorf("this process is %q", got)
	}
}
