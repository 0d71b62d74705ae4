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
	w := watch(t, spec)
	w.until(ProcessReady)
	log, err := os.ReadFile(spec.LogPath)
	if err != nil {
		t.Fatal(err)
	}
	if want := "/" + filepath.Base(spec.Cgroups.unified) + "/" + spec.ID + "\n"; !strings.Contains(string(log), want) {
		t.Errorf("born into\n%swant %s", log, want)
	}
	for _, dir := range []string{spec.Cgroups.unified} {
		if dir != "" && !exists(filepath.Join(dir, spec.ID)) {
			t.Errorf("there is no group of the unit in %s", dir)
		}
	}
	w.Stop()
	w.end()
	for _, dir := range []string{spec.Cgroups.unified} {
		if exists(filepath.Join(dir, spec.ID)) {
			t.Errorf("the unit's group is left in %s", dir)
		}
	}
}

func TestUnifiedGroup(t *testing.T) {
	for name, test := range map[string]struct {
		mounts, own, want string
	}{
		"v2": {
			"24 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
			"0::/system.slice/sutra.service\n", "/sys/fs/cgroup/system.slice/sutra.service",
		},
		"hybrid": {
			"35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n" +
				"36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw shared:1 master:2 - cgroup cgroup rw,cpu,cpuacct\n" +
				"41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n",
			"9:name=systemd:/init\n4:memory:/user/a\n1:cpu,cpuacct:/\n0::/b\n", "/sys/fs/cgroup/unified/b",
		},
		"v1": {
			"35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,hugetlb,memory\n",
			"4:hugetlb,memory:/\n", "",
		},
		"v1 without memory": {"35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memorial\n", "4:memorial:/\n", ""},
		"container, bind-mounted root": {
			"30 24 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
			"4:memory:/docker/abc/x\n0::/docker/abc\n", "/sys/fs/cgroup",
		},
		"container with a namespace, mounted from outside": {
			"30 24 0:26 /../.. /sys/fs/cgroup rw - cgroup2 cgroup rw\n", "0::/\n", "/sys/fs/cgroup",
		},
		"a group outside of the namespace": {"30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n", "0::/../other\n", "/sys/fs/cgroup"},
		"a group beside the mount's root":  {"30 24 0:26 /docker/abc /cg rw - cgroup2 cgroup rw\n", "0::/docker/abcdef\n", "/cg"},
		"a host with a container's mounts too": {
			"30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n99 24 0:26 /docker/abc /run/abc/rootfs/sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
			"0::/a\n", "/sys/fs/cgroup/a",
		},
		"a group with a colon":  {"30 24 0:26 / /cg rw - cgroup2 cgroup rw\n", "0::/a:b\n", "/cg/a:b"},
		"not told of the group": {"30 24 0:26 / /cg rw - cgroup2 cgroup rw\n", "", ""},
		"no line end":           {"30 24 0:26 / /cg rw - cgroup2 cgroup rw", "0::/", "/cg"},
		"garbage":               {"- - -\n1 2 3\n\n30 24 0:26 / /cg rw - cgroup2\n1 2 3 4 5 6 7 8 9\n", "::\nx\n0:\n", ""},
		"nothing":               {},
	} {
		t.Run(name, func(t *testing.T) {
			if got := unifiedGroup([]byte(test.mounts), []byte(test.own)); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}

func FuzzUnifiedGroup(f *testing.F) {
	f.Add([]byte("30 24 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"), []byte("0::/a\n"))
	f.Add([]byte("35 31 0:32 /x /m rw - cgroup cgroup rw,memory"), []byte("4:memory,cpu:/x/../y\n"))
	f.Fuzz(func(t *testing.T, mounts, own []byte) {
		dir := unifiedGroup(mounts, own)
		if dir == "" {
			return
		}
		within := false
		for field := range strings.FieldsSeq(string(mounts)) {
			within = within || strings.HasPrefix(dir, filepath.Clean(field)) || filepath.Clean(field) == "."
		}
		if !within {
			t.Errorf("%q is beneath no mount of %q", dir, mounts)
		}
	})
}

// Where there is no hierarchy a unit does without, and the reasons say so.
func TestNoControlGroups(t *testing.T) {
	var none group
	if none.populated() || len(none.members()) != 0 || none.make() != nil || none.remove() != nil {
		t.Error("the zero group isn't none")
	}
	if got := (Cgroups{}).of("unit"); got != none {
		t.Errorf("groups %+v", got)
	}
	t.Setenv(groupsEnv, "1")
	dir := t.TempDir()
	c := wantedGroups(t, dir)
	again, why := OpenCgroups(groupsName(dir))
	if again != c || c.unified != "" && why != "" {
		t.Errorf("opened %+v first and %+v later (%q)", c, again, why)
	}
	bad, why := OpenCgroups(filepath.Join(groupsName(dir), "missing", "folder"))
	if bad != (Cgroups{}) || !strings.Contains(why, "escape") {
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
	newKin(group{unified: old}, "").kill()
	if exit := w.until(ProcessExited).State.LastExit; exit.Signal != "SIGKILL" {
		t.Errorf("exit %+v", exit)
	}
}

// What ends loses its environment, and its mark with it, before its ports. It is waited for all the same.
func TestWhoWasMarkedIsWaitedFor(t *testing.T) {
	spec := commandSpec(t, "sh", "-c", "echo >ready; until [ -e go ]; do sleep 0.01; done; exec env -i sleep 3600")
	w := watch(t, spec)
	pid := w.until(ProcessReady).State.PID
	await(t, "the shell", func() bool { return exists(filepath.Join(spec.Dir, "ready")) })
	k := newKin(group{}, spec.Mark)
	if !slices.Contains(k.find(), pid) {
		t.Fatalf("found %v, want %d among them", k.find(), pid)
	}
	if err := touch(filepath.Join(spec.Dir, "go"), ""); err != nil {
		t.Fatal(err)
	}
	await(t, "the loss of the mark", func() bool { return !marked(pid, spec.Mark) })
	if !k.left() || !slices.Contains(k.find(), pid) {
		t.Error("it is taken for gone")
	}
	if slices.Contains(newKin(group{}, spec.Mark).find(), pid) {
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
