package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The supervisor is killed at each of its steps, and another one takes the unit up by what was on record.
func TestAdoptAfterADeathAtAnyStep(t *testing.T) {
	for name, test := range map[string]struct {
		dieAt    int
		written  bool
		crash    bool // the first process crashed before
		running  bool // a process is left
		restarts int
		want     []string // from the adoption until it is ready
	}{
		"before the intent":               {dieAt: 1},
		"after the intent":                {1, true, false, false, 0, []string{"process adopted: starting", "process started: starting", "process ready: running"}},
		"after the fork":                  {2, false, false, true, 0, []string{"process adopted: starting", "process ready: running"}},
		"after the identity":              {2, true, false, true, 0, []string{"process adopted: starting", "process ready: running"}},
		"before it was told ready":        {3, false, false, true, 0, []string{"process adopted: starting", "process ready: running"}},
		"after it was told ready":         {3, true, false, true, 0, []string{"process adopted: running", "process ready: running"}},
		"before a crash was noted":        {4, false, true, false, 1, []string{"process adopted: starting", "process exited: starting", "process started: starting", "process ready: running"}},
		"during the back-off":             {4, true, true, false, 1, []string{"process adopted: starting", "process exited: starting", "process started: starting", "process ready: running"}},
		"after the intent to restart":     {5, true, true, false, 1, []string{"process adopted: starting", "process started: starting", "process ready: running"}},
		"after the second fork":           {6, false, true, true, 1, []string{"process adopted: starting", "process ready: running"}},
		"after the second one's identity": {6, true, true, true, 1, []string{"process adopted: starting", "process ready: running"}},
		"before the second was ready":     {7, false, true, true, 1, []string{"process adopted: starting", "process ready: running"}},
		"after the second was ready":      {7, true, true, true, 1, []string{"process adopted: running", "process ready: running"}},
	} {
		for _, groups := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/groups=%v", name, groups), func(t *testing.T) {
				if groups {
					t.Setenv(groupsEnv, "1")
				}
				p := plan{Dir: t.TempDir(), Mode: "count", Groups: groups, DieAt: test.dieAt, Written: test.written, CrashFirst: test.crash, BackOff: quick()}
				spec, err := p.spec(wantedGroups(t, p.Dir))
				if err != nil {
					t.Fatal(err)
				}
				r, over := carryOut(t, p)
				left := newKin(group{}, &spec)
				if want := btoi(test.running); !eventually(func() bool { return len(left.find()) == want }) {
					t.Fatalf("the supervisor left processes %v, want %d", left.find(), want)
				}
				if r == nil {
					if test.dieAt != 1 || test.written {
						t.Fatal("no record")
					}
					over()
					return
				}
				if test.running && groups {
					spec.Mark += " of somebody else" // the group is enough
				}
				pids := left.find()
				w := adopt(t, spec, *r)
				spec.Mark = markOf(p.Dir)
				adopted := w.next().State
				if test.running && adopted.PID != pids[0] || !test.running && adopted.PID != 0 {
					t.Errorf("adopted %d, want one of %v", adopted.PID, pids)
				}
				switch known := r.Identity != (Identity{}); {
				case known && !adopted.StartedAt.Equal(r.StartedAt):
					t.Errorf("started at %v, want %v", adopted.StartedAt, r.StartedAt)
				case !known && test.running:
					if at := adopted.StartedAt; time.Since(at) < 0 || time.Since(at) > patience {
						t.Errorf("started at %v", at)
					}
				}
				ready := w.until(ProcessReady).State
				awaitClosed(t, "settled", w.Settled())
				w.expect(test.want...)
				if ready.Restarts != test.restarts {
					t.Errorf("%d restarts, want %d", ready.Restarts, test.restarts)
				}
				last := w.recorded()
				if last.Crashes != btoi(test.crash) || last.Restarts != test.restarts || !last.EverReady {
					t.Errorf("on record: %+v", last)
				}
				if test.running && last.Identity.PID != pids[0] {
					t.Errorf("what was found isn't on record: %+v", last)
				}
				if exit := ready.LastExit; (exit != nil) != test.crash || test.dieAt == 4 && exit.Unknown != !test.written || test.dieAt == 4 && test.written && exit.Signal != "SIGKILL" {
					t.Errorf("last exit %+v", exit)
				}
				if now := left.find(); len(now) != 1 || now[0] != ready.PID {
					t.Errorf("processes %v, want %d alone", now, ready.PID)
				}

				if !eventually(func() bool { return strings.Contains(readLog(t, spec.LogPath), fmt.Sprintf("%d 0\n", ready.PID)) }) {
					t.Error("what serves isn't in the log")
				}
				w.kill()
				exited := w.until(ProcessExited).State
				if exit := exited.LastExit; exit.Signal != "SIGKILL" {
					t.Errorf("exit %+v", exit)
				}
				if again := w.until(ProcessReady).State; again.Restarts != test.restarts+1 || again.PID == ready.PID {
					t.Errorf("after the crash: %+v", again)
				}
				w.Stop()
				if end := w.end(); end.State.Phase != Stopped {
					t.Errorf("ended %v", end.State.Phase)
				}
				over()
				unbroken(t, spec.LogPath)
			})
		}
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// eventually is for what is about to come true, and tells whether it did.
func eventually(met func() bool) bool {
	for deadline := time.Now().Add(patience); !met(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return false
		}
	}
	return true
}

func unbroken(t *testing.T, path string) {
	t.Helper()
	next := map[string]int{}
	for line := range strings.Lines(readLog(t, path)) {
		pid, n, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if !ok || n != strconv.Itoa(next[pid]) {
			t.Fatalf("line %q of the log, want number %d", line, next[pid])
		}
		next[pid]++
	}
	if len(next) == 0 {
		t.Error("the log is empty")
	}
}

func readLog(t *testing.T, path string) string {
	t.Helper()
	log, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(log)
}

func TestAdoptedExitCodeIsTheKernels(t *testing.T) {
	p := plan{Dir: t.TempDir(), Mode: "exit-at-term", DieAt: 3, Written: true, BackOff: quick()}
	spec, err := p.spec(Cgroups{})
	if err != nil {
		t.Fatal(err)
	}
	r, over := carryOut(t, p)
	w := adopt(t, spec, *r)
	w.until(ProcessReady)
	w.Stop()
	if exit := w.end().State.LastExit; exit.Code != 3 || exit.Unknown || exit.Signal != "" {
		t.Errorf("exit %+v", exit)
	}
	w.expect("process adopted: running", "process ready: running", "unit ended: stopped")
	over()
}

// Where nobody reaps orphans, a zombie keeps nothing from ending, and its exit is known.
func TestAdoptedZombieEndsTheUnit(t *testing.T) {
	for name, test := range map[string]struct{ mode, want string }{
		"by a signal": {"serve", "killed by SIGTERM"},
		"by itself":   {"exit-at-term", "exit code 3"},
		"well":        {"end-at-term", "exit code 0"},
		"by a thread": {"thread-at-term", "exit code 5"},
	} {
		t.Run(name, func(t *testing.T) {
			p := plan{Dir: t.TempDir(), Mode: test.mode, DieAt: 3, Written: true, BackOff: quick(), Lazy: true}
			spec, err := p.spec(Cgroups{})
			if err != nil {
				t.Fatal(err)
			}
			r, over := carryOut(t, p)
			if gone(r.Identity.PID) {
				t.Error("it serves, and is taken for gone")
			}
			w := adopt(t, spec, *r)
			w.until(ProcessReady)
			asked := time.Now()
			w.Stop()
			exit := w.end().State.LastExit
			if exit.Unknown || exit.String() != test.want {
				t.Errorf("exit %+v, want %s", exit, test.want)
			}
			if exit.At.Before(asked) {
				t.Errorf("ended at %v, before it was asked to", exit.At)
			}
			w.expect("process adopted: running", "process ready: running", "unit ended: stopped")
			over()
		})
	}
}

// ranBefore is the record of a unit whose process is gone.
func ranBefore(t *testing.T, spec Spec) Record {
	t.Helper()
	w := watch(t, spec)
	w.until(ProcessReady)
	r := w.recorded()
	w.Stop()
	w.end()
	// No host gives a number to another process before the clock has ticked; a test may.
	await(t, "the next tick", func() bool { return startTime(r.Identity.StartTicks + 1).Before(time.Now()) })
	return r
}

func TestAdoptLeavesAStrangerAlone(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	r := ranBefore(t, spec)
	end := stageStranger(t, r.Identity.PID)
	w := adopt(t, spec, r)
	w.until(ProcessReady)
	w.expect("process adopted: starting", "process exited: starting", "process started: starting", "process ready: running")
	if s := w.State(); !s.LastExit.Unknown || s.Restarts != 1 || s.PID == r.Identity.PID {
		t.Errorf("state %+v", s)
	}
	w.Stop()
	w.end()
	strangerLives(t, r.Identity.PID)
	end()
}

// A pid may have become the number of somebody's thread.
func TestAdoptTakesAThreadForNoProcess(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	r := ranBefore(t, spec)
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		if tid, err := strconv.Atoi(task.Name()); err == nil && tid != os.Getpid() {
			r.Identity.PID = tid
		}
	}
	w := adopt(t, spec, r)
	w.until(ProcessReady)
	w.expect("process adopted: starting", "process exited: starting", "process started: starting", "process ready: running")
}

func TestAdoptAfterABoot(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	spec.Restart.First, spec.Restart.Max = never, never
	r := ranBefore(t, spec)
	r.Identity.BootID, r.Crashes, r.Restarts, r.LastExit = "another", 2, 3, &Exit{Code: 7, At: r.StartedAt.Add(1)}
	// Whoever has the pid by now, with whatever start, is a stranger.
	end := stageStranger(t, r.Identity.PID)
	w := adopt(t, spec, r)
	ready := w.until(ProcessReady).State
	w.expect("process adopted: starting", "process started: starting", "process ready: running")
	if ready.Restarts != 4 || ready.LastExit != r.LastExit {
		t.Errorf("state %+v", ready)
	}
	if last := w.recorded(); last.Crashes != 2 || last.Restarts != 4 || last.Identity.BootID == "another" {
		t.Errorf("on record: %+v", last)
	}
	strangerLives(t, r.Identity.PID)
	w.Stop()
	w.end()
	end()
}

// A clock that is set between a start and an end makes no difference to whether the end was seen.
func TestAdoptDoesNotGoByTheClock(t *testing.T) {
	for name, test := range map[string]struct {
		seen    bool
		at      time.Duration // of the exit on record, after the start
		crashes int
	}{
		"seen, set back meanwhile":       {true, -time.Hour, 2},
		"not seen, set back before that": {false, time.Hour, 3},
	} {
		t.Run(name, func(t *testing.T) {
			spec := commandSpec(t, "sleep", "3600")
			r := ranBefore(t, spec)
			r.Exited, r.Crashes, r.LastExit = test.seen, 2, &Exit{Code: 7, At: r.StartedAt.Add(test.at)}
			w := adopt(t, spec, r)
			exit := w.until(ProcessExited).State.LastExit
			if (exit == r.LastExit) != test.seen || exit.Unknown == test.seen || w.journal.last().Crashes != test.crashes {
				t.Errorf("exit %+v, on record %+v", exit, w.journal.last())
			}
		})
	}
}

// A process that was never ready, and went while nobody watched, has failed.
func TestAdoptOfOneThatFailed(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	r := ranBefore(t, spec)
	r.EverReady = false
	w := adopt(t, spec, r)
	if exit := w.end().State.LastExit; !exit.Unknown {
		t.Errorf("exit %+v", exit)
	}
	w.expect("process adopted: starting", "unit ended: failed")
}

// How it ended stays on record where somebody watched.
func TestAdoptOfOneThatWasSeenToFail(t *testing.T) {
	spec, _ := fixtureSpec(t, "exit", "7", "last words", "")
	w := watch(t, spec)
	exit := w.end().State.LastExit
	again := adopt(t, spec, w.journal.last())
	if got := again.end().State.LastExit; got == nil || got.String() != "exit code 7" || *got != *exit {
		t.Errorf("exit %+v, want %+v", got, exit)
	}
	again.expect("process adopted: starting", "unit ended: failed")
}

func TestAdoptToStop(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(*Record)
		runs  bool
		want  []string
	}{
		"one that runs":            {func(*Record) {}, true, []string{"process adopted: running", "unit ended: stopped"}},
		"one that is gone":         {func(*Record) {}, false, []string{"process adopted: starting", "unit ended: stopped"}},
		"one that failed":          {func(r *Record) { r.EverReady = false }, false, []string{"process adopted: starting", "unit ended: stopped"}},
		"one from before the boot": {func(r *Record) { r.Identity.BootID = "another" }, false, []string{"process adopted: starting", "unit ended: stopped"}},
		"one that never was":       {func(r *Record) { r.Identity = Identity{} }, false, []string{"process adopted: starting", "unit ended: stopped"}},
	} {
		t.Run(name, func(t *testing.T) {
			spec := commandSpec(t, "sleep", "3600")
			before := watch(t, spec)
			pid := before.until(ProcessReady).State.PID
			if test.runs {
				before.Release()
			} else {
				before.Stop()
			}
			before.awaitDone()
			r := before.journal.last()
			test.spoil(&r)
			w := watchFrom(t, spec, &memory{}, func(s *Supervisor) (*Unit, error) { return s.Adopt(spec, r, true) })
			w.end()
			w.expect(test.want...)
			if !gone(pid) {
				t.Error("the process runs on")
			}
		})
	}
}

func TestStopOfAnAdoptedProcessThatIsNotReady(t *testing.T) {
	p := plan{Dir: t.TempDir(), Mode: "serve", DieAt: 2, Written: true, BackOff: quick()}
	spec, err := p.spec(Cgroups{})
	if err != nil {
		t.Fatal(err)
	}
	r, over := carryOut(t, p)
	spec.Ready = func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	}
	w := adopt(t, spec, *r)
	w.until(ProcessAdopted)
	w.Stop()
	if exit := w.end().State.LastExit; exit.Signal != "SIGTERM" {
		t.Errorf("exit %+v", exit)
	}
	w.expect("process adopted: starting", "unit ended: stopped")
	over()
}

// What a process left is ended before its successor starts.
func TestAdoptEndsLeftoversFirst(t *testing.T) {
	for _, groups := range []bool{false, true} {
		t.Run(fmt.Sprintf("groups=%v", groups), func(t *testing.T) {
			spec, readyFile := fixtureSpec(t, "escape")
			spec.Args = []string{readyFile, "ignore-term"}
			later := Cgroups{}
			if groups { // the supervisor before had none: the mark is what is left to go by
				t.Setenv(groupsEnv, "1")
				later = wantedGroups(t, spec.Dir)
			}
			before := watch(t, spec)
			leader := before.until(ProcessReady).State.PID
			escapee := childOf(t, readyFile)
			before.Release()
			before.awaitDone()
			if err := unix.Kill(leader, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			if _, err := unix.Wait4(leader, nil, 0, nil); err != nil {
				t.Fatal(err)
			}
			if gone(escapee) {
				t.Fatal("the escapee went with its leader")
			}
			spec.Cgroups = later
			w := adopt(t, spec, before.journal.last(), func(e Event) {
				if e.Kind != ProcessAdopted && !gone(escapee) {
					t.Errorf("%v before the escapee was gone", e.Kind)
				}
			})
			w.until(ProcessReady)
			w.expect("process adopted: starting", "process exited: starting", "process started: starting", "process ready: running")
			w.Stop()
			w.end()
		})
	}
}

func TestEldest(t *testing.T) {
	for name, test := range map[string]struct {
		members map[int]stat
		want    int
	}{
		"nobody":                  {},
		"a leader":                {map[int]stat{40: {session: 40, startTicks: 5}}, 40},
		"a leader and a daemon":   {map[int]stat{40: {session: 40, startTicks: 6}, 50: {session: 50, startTicks: 5}}, 50},
		"both in one tick":        {map[int]stat{40: {session: 40, startTicks: 5}, 50: {session: 50, startTicks: 5}}, 40},
		"a child in the same":     {map[int]stat{40: {session: 50, startTicks: 5}, 50: {session: 50, startTicks: 5}}, 50},
		"a child and a daemon":    {map[int]stat{40: {session: 30, startTicks: 5}, 50: {session: 50, startTicks: 6}}, 0},
		"a daemon that is a fork": {map[int]stat{40: {session: 40, startTicks: 5, forked: true}}, 0},
		"a fork and what it runs": {map[int]stat{40: {session: 40, startTicks: 5, forked: true}, 50: {session: 50, startTicks: 6}}, 0},
	} {
		if got := eldest(test.members); got != test.want {
			t.Errorf("%s: %d, want %d", name, got, test.want)
		}
	}
}

// A daemon that the node left behind isn't taken for the node.
func TestAdoptEndsWhatOutlivedItsLeader(t *testing.T) {
	inAndOutOfGroups(t, func(t *testing.T) {
		spec := commandSpec(t, "sh", "-c", "sleep 3600 & sleep .05; setsid sleep 3600 & echo $! >daemon; wait")
		before := watch(t, spec)
		leader := before.until(ProcessReady).State.PID
		var daemon int
		await(t, "the daemon", func() bool {
			text, _ := os.ReadFile(filepath.Join(spec.Dir, "daemon"))
			daemon, _ = strconv.Atoi(strings.TrimSpace(string(text)))
			session, err := unix.Getsid(daemon)
			return daemon != 0 && err == nil && session == daemon
		})
		before.Release()
		before.awaitDone()
		if err := unix.Kill(leader, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Wait4(leader, nil, 0, nil); err != nil {
			t.Fatal(err)
		}
		if gone(daemon) {
			t.Fatal("the daemon went with its leader")
		}
		w := adopt(t, spec, Record{EverReady: true})
		w.until(ProcessReady)
		if !gone(daemon) {
			t.Error("the daemon lives beside the new process")
		}
		w.expect("process adopted: starting", "process started: starting", "process ready: running")
	})
}

// A process that was started without a control group, or in another one, is found by its mark after it was adopted.
func TestAdoptedProcessOutsideItsControlGroup(t *testing.T) {
	spec, readyFile := fixtureSpec(t, "escape")
	spec.Args = []string{readyFile, "slow-term"}
	t.Setenv(groupsEnv, "1")
	later := wantedGroups(t, spec.Dir)
	before := watch(t, spec)
	pid := before.until(ProcessReady).State.PID
	escapee := childOf(t, readyFile)
	before.Release()
	before.awaitDone()
	spec.Cgroups = later
	w := adopt(t, spec, before.journal.last())
	if got := w.until(ProcessReady).State.PID; got != pid {
		t.Errorf("adopted %d, want %d", got, pid)
	}
	w.Stop()
	w.end()
	w.expect("process adopted: running", "process ready: running", "unit ended: stopped")
	if !gone(escapee) || !exists(readyFile+".child.finished") {
		t.Error("the escapee is left, or was killed at its work")
	}
}

func TestJournalThatCannotTakeTheIntentStartsNothing(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	full := errors.New("the disk is full")
	s := newSupervisor(t, &memory{fail: func(int) error { return full }}, func(e Event) { t.Errorf("told of %v", e.Kind) })
	if u, err := s.Start(spec); u != nil || !errors.Is(err, full) {
		t.Errorf("unit %v, error %v", u, err)
	}
	noChildren(t)
	if exists(spec.LogPath) {
		t.Error("there is a log")
	}
}

// Where there is no group to find a process by, its identity is tried to be written before it is told ready.
func TestJournalThatCannotTakeTheIdentityIsTold(t *testing.T) {
	run := []string{"process started: starting", "record lost: starting", "process ready: running"}
	cannotTakeTheIdentity(t, slices.Concat(run, []string{"process exited: starting"}, run, []string{"unit ended: stopped"})...)
}

func TestJournalThatCannotTakeTheIdentityInAGroup(t *testing.T) {
	t.Setenv(groupsEnv, "1")
	run := []string{"process started: starting", "process ready: running", "record lost: running"}
	cannotTakeTheIdentity(t, slices.Concat(run, []string{"process exited: starting"}, run, []string{"unit ended: stopped"})...)
}

func cannotTakeTheIdentity(t *testing.T, want ...string) {
	t.Helper()
	full := errors.New("the disk is full")
	spec := commandSpec(t, "sleep", "3600")
	j := &memory{fail: func(n int) error {
		if n == 2 || n == 5 { // both processes' identities
			return full
		}
		return nil
	}}
	w := watchFrom(t, spec, j, func(s *Supervisor) (*Unit, error) { return s.Start(spec) })
	pid := w.next().State.PID
	for ready, lost := false, false; !ready || !lost; {
		switch e := w.next(); e.Kind {
		case ProcessReady:
			ready = true
		case RecordLost:
			lost = true
			if !errors.Is(e.Err, full) || e.State.PID != pid || e.ID != spec.ID {
				t.Errorf("event %+v", e)
			}
		default:
			t.Fatalf("event %+v", e)
		}
	}
	w.kill()
	w.until(ProcessReady)
	await(t, "the second identity", func() bool { return len(j.all()) >= 5 })
	w.Stop()
	w.end()
	w.expect(want...)
}

// A restart that can't be put on record isn't made, and tried again.
func TestJournalThatCannotTakeTheIntentOfARestart(t *testing.T) {
	full := errors.New("the disk is full")
	spec := commandSpec(t, "sleep", "3600")
	j := &memory{fail: func(n int) error {
		if n == 4 { // intent, identity, exit, intent
			return full
		}
		return nil
	}}
	w := watchFrom(t, spec, j, func(s *Supervisor) (*Unit, error) { return s.Start(spec) })
	w.until(ProcessReady)
	w.kill()
	w.until(ProcessExited)
	if exit := w.next().State.LastExit; !errors.Is(exit.Err, full) {
		t.Errorf("exit %+v", exit)
	}
	if again := w.until(ProcessReady).State; again.Restarts != 1 {
		t.Errorf("%d restarts", again.Restarts)
	}
	if last := w.journal.last(); last.Restarts != 1 || last.Crashes != 2 {
		t.Errorf("on record: %+v", last)
	}
}

// The last of several exits is the one that a stop leaves.
func TestStopKeepsTheLastExit(t *testing.T) {
	full := errors.New("the disk is full")
	spec := commandSpec(t, "sleep", "3600")
	j := &memory{fail: func(n int) error {
		if n >= 4 {
			return full
		}
		return nil
	}}
	w := watchFrom(t, spec, j, func(s *Supervisor) (*Unit, error) { return s.Start(spec) })
	w.until(ProcessReady)
	w.kill()
	w.until(ProcessExited)
	w.until(ProcessExited)
	w.Stop()
	if exit := w.end().State.LastExit; !errors.Is(exit.Err, full) {
		t.Errorf("exit %+v", exit)
	}
}
