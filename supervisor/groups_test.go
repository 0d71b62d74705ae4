package supervisor

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// What happens to a unit is the same where it has control groups.
func TestSequencesInControlGroups(t *testing.T) {
	t.Setenv(groupsEnv, "1")
	sequences(t)
}

func TestSequencesWithoutTheUnifiedHierarchy(t *testing.T) {
	t.Setenv(groupsEnv, "v1")
	if c := wantedGroups(t, t.TempDir()); c.unified != "" || c.freezer == "" && os.Getuid() == 0 {
		t.Fatalf("opened %+v", c)
	}
	sequences(t)
}

func sequences(t *testing.T) {
	for name, test := range map[string]func(*testing.T){
		"CrashIsAnsweredWithARestart":            TestCrashIsAnsweredWithARestart,
		"CrashLoop":                              TestCrashLoop,
		"CrashLoopIsLeftAfterAQuietTime":         TestCrashLoopIsLeftAfterAQuietTime,
		"CrashTakesTheChildrenAlong":             TestCrashTakesTheChildrenAlong,
		"DescriptorsAreGivenBack":                TestDescriptorsAreGivenBack,
		"EndBeforeReadyFailsTheUnit":             TestEndBeforeReadyFailsTheUnit,
		"EscapeesEndWithTheUnit":                 TestEscapeesEndWithTheUnit,
		"ManyUnits":                              TestManyUnits,
		"OrphansThatComeHomeAreReaped":           TestOrphansThatComeHomeAreReaped,
		"OutputOfALogThatWasCutIsNone":           TestOutputOfALogThatWasCutIsNone,
		"ProcessStartsClean":                     TestProcessStartsClean,
		"ReadinessOfADeadProcessIsNone":          TestReadinessOfADeadProcessIsNone,
		"ReadyIsCancelledAndAwaited":             TestReadyIsCancelledAndAwaited,
		"RestartGoesOnWhileTheBinaryIsMissing":   TestRestartGoesOnWhileTheBinaryIsMissing,
		"SettledFollowsTheEvent":                 TestSettledFollowsTheEvent,
		"StartErrors":                            TestStartErrors,
		"StopBeforeReady":                        TestStopBeforeReady,
		"StopDuringBackOff":                      TestStopDuringBackOff,
		"StopEscalatesAfterTheGrace":             TestStopEscalatesAfterTheGrace,
		"StopIsIdempotent":                       TestStopIsIdempotent,
		"StopOfALeaderWithAChild":                TestStopOfALeaderWithAChild,
		"StopSignalIsTheSpecs":                   TestStopSignalIsTheSpecs,
		"StopWakesAStoppedProcess":               TestStopWakesAStoppedProcess,
		"StrangersAreNotSignalled":               TestStrangersAreNotSignalled,
		"UnitRunsUntilItIsStopped":               TestUnitRunsUntilItIsStopped,
		"WithoutProbeItIsReadyHoweverSoonItEnds": TestWithoutProbeItIsReadyHoweverSoonItEnds,
	} {
		t.Run(name, test)
	}
}

// It isn't moved there: what it forks first of all is in the group too.
func TestProcessIsBornIntoItsControlGroup(t *testing.T) {
	t.Setenv(groupsEnv, "1")
	spec, _ := fixtureSpec(t, "groups")
	spec.Limits.CPUWeight = 200
	w := watch(t, spec)
	w.until(ProcessReady)
	log, err := os.ReadFile(spec.LogPath)
	if err != nil {
		t.Fatal(err)
	}
	dirs := group(spec.Cgroups).dirs()
	if got := strings.Count(string(log), "/"+filepath.Base(dirs[0])+"/"+spec.ID+"\n"); got != len(dirs) {
		t.Errorf("born into\n%swant the unit's group in each of %v", log, dirs)
	}
	for _, dir := range dirs {
		if !exists(filepath.Join(dir, spec.ID)) {
			t.Errorf("there is no group of the unit in %s", dir)
		}
	}
	w.Stop()
	w.end()
	for _, dir := range dirs {
		if exists(filepath.Join(dir, spec.ID)) {
			t.Errorf("the unit's group is left in %s", dir)
		}
	}
}

// Where there is no hierarchy a unit does without, and the reasons say so.
func TestNoControlGroups(t *testing.T) {
	var none group
	if none.exists() || none.populated() || len(none.members()) != 0 || none.make() != nil || none.remove() != nil ||
		none.limit(Limits{Memory: 1, CPUWeight: 1}) || none.limited(os.Getpid(), 1) || none.ooms() != (ooms{}) {
		t.Error("the zero group isn't none")
	}
	if got := (Cgroups{}).of("unit"); got != none {
		t.Errorf("groups %+v", got)
	}
	t.Setenv(groupsEnv, "1")
	dir := t.TempDir()
	c := wantedGroups(t, dir)
	again, why := OpenCgroups(groupsName(dir))
	if again != c || os.Getuid() == 0 && len(why) > 0 {
		t.Errorf("opened %+v first and %+v later (%q)", c, again, why)
	}
	bad, why := OpenCgroups(filepath.Join(groupsName(dir), "missing", "folder"))
	if bad != (Cgroups{}) || len(why) != 2 || !strings.Contains(why[0], "escape") || !strings.Contains(why[1], "memory limits") {
		t.Errorf("opened %+v (%q)", bad, why)
	}
}

// Before Linux 5.14 a group is killed one by one.
func TestKillOfAGroupWithoutCgroupKill(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	w := watch(t, spec)
	pid := w.until(ProcessReady).State.PID
	old := t.TempDir()
	if err := os.Mkdir(filepath.Join(old, "cgroup.kill"), 0o700); err != nil { // it can't be written to
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(old, "cgroup.procs"), []byte(strconv.Itoa(pid)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	newKin(group{unified: old}, &Spec{}).kill()
	if exit := w.until(ProcessExited).State.LastExit; exit.Signal != "SIGKILL" {
		t.Errorf("exit %+v", exit)
	}
}

// What ends loses its environment, and its mark with it, before its ports. It is waited for all the same.
func TestWhoWasMarkedIsWaitedFor(t *testing.T) {
	spec := commandSpec(t, "sh", "-c", "echo >ready; until [ -e go ]; do sleep 0.01; done; exec env -i sleep 3600 >/dev/null 2>&1")
	w := watch(t, spec)
	pid := w.until(ProcessReady).State.PID
	await(t, "the shell", func() bool { return exists(filepath.Join(spec.Dir, "ready")) })
	k := newKin(group{}, &spec)
	if !slices.Contains(k.find(), pid) {
		t.Fatalf("found %v, want %d among them", k.find(), pid)
	}
	if err := touch(filepath.Join(spec.Dir, "go"), ""); err != nil {
		t.Fatal(err)
	}
	await(t, "the loss of the mark", func() bool { return !k.bears(pid) })
	if !k.left() || !slices.Contains(k.find(), pid) {
		t.Error("it is taken for gone")
	}
	if slices.Contains(newKin(group{}, &spec).find(), pid) {
		t.Error("one without the mark was found by it")
	}
	k.ending[os.Getpid()] = 1 // the pid has come to somebody else
	if slices.Contains(k.find(), os.Getpid()) {
		t.Error("a stranger is waited for")
	}
	w.Stop()
	w.end()
	if k.left() {
		t.Errorf("%v are taken for alive", k.find())
	}
}

// A node may make groups of its own beneath the unit's for what it runs. They are the unit's still.
func TestGroupsBeneathTheUnits(t *testing.T) {
	for _, hierarchies := range []string{"1", "v1"} {
		t.Run(hierarchies, func(t *testing.T) {
			t.Setenv(groupsEnv, hierarchies)
			spec, readyFile := fixtureSpec(t, "escape")
			spec.Args, spec.Mark = []string{readyFile, "slow-term"}, "NOBODY=has it" // the group alone tells
			spec.Limits.Memory = 1 << 30
			if spec.Cgroups.memory == "" {
				skip(t, "memory can't be limited here")
			}
			w := watch(t, spec)
			leader := w.until(ProcessReady).State.PID
			escapee := childOf(t, readyFile)
			g := spec.Cgroups.of(spec.ID)
			for dir, pid := range map[string]int{
				filepath.Join(g.at(), "runtime", "job"):  escapee,
				filepath.Join(g.at(), "runtime", "idle"): 0,
				filepath.Join(g.memory, "own"):           leader,
			} {
				if err := os.MkdirAll(dir, 0o750); err != nil {
					t.Fatal(err)
				}
				if pid == 0 {
					continue
				}
				if err := write(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
					t.Fatal(err)
				}
			}
			if slices.Contains(pidsIn(g.at()), escapee) {
				t.Fatal("the escapee is in the unit's own group")
			}
			for _, pid := range []int{leader, escapee} {
				if !slices.Contains(newKin(g, &Spec{}).find(), pid) {
					t.Errorf("process %d isn't found", pid)
				}
			}
			w.Release()
			w.awaitDone()
			again := adopt(t, spec, w.recorded())
			if s := again.until(ProcessReady).State; s.PID != leader || !s.MemoryLimited {
				t.Errorf("adopted %+v", s)
			}
			again.Stop()
			again.end()
			again.expect("process adopted: running", "process ready: running", "unit ended: stopped")
			if !gone(escapee) || !exists(readyFile+".child.finished") {
				t.Error("the escapee is left, or was killed at its work")
			}
			for _, dir := range g.dirs() {
				if exists(dir) {
					t.Errorf("%s is left", dir)
				}
			}
		})
	}
}
