package supervisor

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

const mib = 1 << 20

// limitedSpec runs the fixture under a memory limit, where this host has one.
func limitedSpec(t *testing.T, mode string) (spec Spec, readyFile string) {
	t.Helper()
	t.Setenv(groupsEnv, "1")
	spec, readyFile = fixtureSpec(t, mode)
	if spec.Cgroups.memory == "" {
		skip(t, "no memory limit can be set here")
	}
	spec.Args = []string{readyFile, "200"}
	spec.Limits = Limits{Memory: 64 * mib, CPUWeight: 50}
	return spec, readyFile
}

func TestLimitsAreInForce(t *testing.T) {
	spec, _ := limitedSpec(t, "allocate")
	w := watch(t, spec)
	if s := w.until(ProcessReady).State; !s.MemoryLimited {
		t.Errorf("state %+v", s)
	}
	g := spec.Cgroups.of(spec.ID)
	files := map[string]string{ // v2
		filepath.Join(g.memory, "memory.max"): "67108864", filepath.Join(g.memory, "memory.swap.max"): "0", filepath.Join(g.memory, "memory.low"): "67108864",
		filepath.Join(g.memory, "memory.oom.group"): "1", filepath.Join(g.cpu, "cpu.weight"): "50",
	}
	if g.memory != g.unified {
		files = map[string]string{
			filepath.Join(g.memory, "memory.limit_in_bytes"): "67108864", filepath.Join(g.memory, "memory.memsw.limit_in_bytes"): "67108864",
			filepath.Join(g.memory, "memory.soft_limit_in_bytes"): "67108864", filepath.Join(g.cpu, "cpu.shares"): "512",
		}
	}
	for file, want := range files {
		got, err := os.ReadFile(file)
		if swap := strings.Contains(file, "sw"); swap && os.IsNotExist(err) {
			continue
		}
		if strings.TrimSpace(string(got)) != want {
			t.Errorf("%s is %q (%v), want %s", file, got, err, want)
		}
	}
}

// Whoever takes up a unit finds out whether its process is held to the limit.
func TestAdoptedLimits(t *testing.T) {
	spec, _ := limitedSpec(t, "allocate")
	for name, test := range map[string]struct {
		started, adopted Limits
		want             bool
	}{
		"the same":          {spec.Limits, spec.Limits, true},
		"lower":             {Limits{Memory: 32 * mib}, spec.Limits, true},
		"higher":            {Limits{Memory: 65 * mib}, spec.Limits, false},
		"none before":       {Limits{}, spec.Limits, false},
		"none is asked for": {spec.Limits, Limits{}, false},
	} {
		t.Run(name, func(t *testing.T) {
			spec.Limits = test.started
			w := watch(t, spec)
			w.until(ProcessReady)
			w.Release()
			w.awaitDone()
			spec.Limits = test.adopted
			again := adopt(t, spec, w.journal.last())
			if s := again.until(ProcessAdopted).State; s.MemoryLimited != test.want || s.PID == 0 {
				t.Errorf("adopted %+v, want it limited: %v", s, test.want)
			}
		})
	}
}

func TestOOMIsAReasonOfItsOwn(t *testing.T) {
	for _, test := range []struct{ mode, want string }{
		{"allocate", "killed by SIGKILL: over its memory limit"},
		{"allocate-in-child", "exit code 7: over its memory limit"},
	} {
		for _, adopted := range []bool{false, true} {
			t.Run(test.mode+"/adopted="+strconv.FormatBool(adopted), func(t *testing.T) {
				spec, ready := limitedSpec(t, test.mode)
				w := watch(t, spec)
				w.until(ProcessReady)
				if adopted {
					w.Release()
					w.awaitDone()
					w = adopt(t, spec, w.journal.last())
					w.until(ProcessReady)
				}
				if err := touch(ready+".go", ""); err != nil {
					t.Fatal(err)
				}
				want := test.want
				if endsWhole(spec) {
					want = "killed by SIGKILL: over its memory limit"
				}
				exit := w.until(ProcessExited).State.LastExit
				if exit.String() != want {
					t.Errorf("exit %v, want %s", exit, want)
				}
				if last := w.journal.last().LastExit; last == nil || !last.OOMKilled {
					t.Errorf("on record: %+v", last)
				}
				if exists(ready + ".done") {
					t.Error("the limit didn't bite")
				}
			})
		}
	}
}

// endsWhole tells whether the kernel ends all of a unit that is over its limit, as it does in the unified hierarchy, or one
// process of it.
func endsWhole(spec Spec) bool { return spec.Cgroups.memory == spec.Cgroups.unified }

// What nobody watched is known by what is left of the control group.
func TestOOMWhileNobodyWatches(t *testing.T) {
	spec, ready := limitedSpec(t, "allocate")
	w := watch(t, spec)
	pid := w.until(ProcessReady).State.PID
	w.Release()
	w.awaitDone()
	if err := touch(ready+".go", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Wait4(pid, nil, 0, nil); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(ready + ".go"); err != nil {
		t.Fatal(err)
	}
	w = adopt(t, spec, w.journal.last())
	if exit := w.until(ProcessExited).State.LastExit; !exit.Unknown || exit.String() != "ended over its memory limit" {
		t.Errorf("exit %+v", exit)
	}
	w.until(ProcessReady)
	w.kill()
	if exit := w.until(ProcessExited).State.LastExit; exit.String() != "killed by SIGKILL" {
		t.Errorf("killed by a person, it was %v", exit)
	}
}

// A group may be left by a process whose successor is taken up: what the kernel killed before isn't held against that.
func TestOOMOfAnEarlierProcess(t *testing.T) {
	for _, watched := range []bool{true, false} {
		t.Run(fmt.Sprintf("watched=%v", watched), func(t *testing.T) {
			spec, ready := limitedSpec(t, "allocate")
			g := spec.Cgroups.of(spec.ID)
			if g.memory == g.unified {
				skip(t, "who keeps the group of the memory from being removed would be in the unit's own")
			}
			w := watch(t, spec)
			w.until(ProcessReady)
			lodger := exec.Command("sleep", "3600")
			if err := lodger.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() { // before the test's other ends
				_ = lodger.Process.Kill()
				_ = lodger.Wait() // killed
			}()
			if err := write(filepath.Join(g.memory, "cgroup.procs"), strconv.Itoa(lodger.Process.Pid)); err != nil {
				t.Fatal(err)
			}
			if err := touch(ready+".go", ""); err != nil {
				t.Fatal(err)
			}
			if exit := w.until(ProcessExited).State.LastExit; !exit.OOMKilled {
				t.Fatalf("exit %+v", exit)
			}
			if err := os.Remove(ready + ".go"); err != nil {
				t.Fatal(err)
			}
			pid := w.until(ProcessReady).State.PID
			w.recorded()
			w.Release()
			w.awaitDone()
			want := "killed by SIGKILL"
			if !watched {
				want = "an exit that nobody saw"
				if err := unix.Kill(pid, unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
				if _, err := unix.Wait4(pid, nil, 0, nil); err != nil {
					t.Fatal(err)
				}
			}
			w = adopt(t, spec, w.journal.last())
			if watched {
				w.until(ProcessReady)
				w.kill()
			}
			if exit := w.until(ProcessExited).State.LastExit; exit.String() != want {
				t.Errorf("it was %v, want %s", exit, want)
			}
			w.Stop()
			w.end()
		})
	}
}

// Who is stopped long after a descendant was killed isn't killed for its memory.
func TestStopAfterAnOOM(t *testing.T) {
	spec, ready := limitedSpec(t, "outlive")
	spec.StopSignal = unix.SIGKILL
	w := watch(t, spec)
	w.until(ProcessReady)
	if err := touch(ready+".go", ""); err != nil {
		t.Fatal(err)
	}
	if endsWhole(spec) { // nothing outlives a descendant that was killed so
		if exit := w.until(ProcessExited).State.LastExit; exit.String() != "killed by SIGKILL: over its memory limit" {
			t.Errorf("it was %v", exit)
		}
		return
	}
	await(t, "the child's end", func() bool { return exists(ready + ".done") })
	if n := spec.Cgroups.of(spec.ID).ooms(); n != (ooms{kills: 1, own: true}) {
		t.Errorf("the group saw %+v", n)
	}
	w.Stop()
	if exit := w.end().State.LastExit; exit.String() != "killed by SIGKILL" {
		t.Errorf("stopped, it was %v", exit)
	}
}

// An exit that came after a kill of a descendant, and not by it, isn't held against the limit.
func TestWhatIsNoOOM(t *testing.T) {
	for name, test := range map[string]struct {
		exit Exit
		want bool
	}{
		"killed":             {Exit{Code: -1, Signal: "SIGKILL"}, true},
		"gave up":            {Exit{Code: 1}, true},
		"unknown":            {Exit{Code: -1, Unknown: true}, true},
		"ended well":         {Exit{}, false},
		"followed a signal":  {Exit{Code: -1, Signal: "SIGTERM"}, false},
		"broke for a reason": {Exit{Code: -1, Signal: "SIGSEGV"}, false},
	} {
		if got := test.exit.mayBeOOM(); got != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	before := ooms{kills: 3}
	for now, want := range map[ooms]bool{before: false, {4, false}: false, {3, true}: false, {4, true}: true} {
		if got := now.since(before); got != want {
			t.Errorf("%+v since %+v: %v", now, before, got)
		}
	}
}

// The files of the unified hierarchy, as they are written and read; there is no kernel behind these.
func TestLimitsOfTheUnifiedHierarchy(t *testing.T) {
	for name, test := range map[string]struct {
		missing string
		memory  bool
	}{
		"all there":            {"", true},
		"no swap":              {"memory.swap.max", true},
		"an old kernel":        {"memory.oom.group", true},
		"no memory controller": {"memory.max", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			want := map[string]string{
				"memory.max": "1048576", "memory.swap.max": "0", "memory.low": "1048576", "memory.oom.group": "1", "cpu.weight": "7",
			}
			for file := range want {
				if file != test.missing {
					if err := os.WriteFile(filepath.Join(dir, file), []byte("max\n"), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			g := group{unified: dir, memory: dir, cpu: dir}
			if got := g.limit(Limits{Memory: mib, CPUWeight: 7}); got != test.memory {
				t.Errorf("memory is limited: %v", got)
			}
			for file, value := range want {
				if got, _ := os.ReadFile(filepath.Join(dir, file)); file != test.missing && test.memory && string(got) != value {
					t.Errorf("%s is %q, want %s", file, got, value)
				}
			}
		})
	}
	dir := t.TempDir()
	g := group{unified: dir, memory: dir}
	for file, content := range map[string]string{
		"cgroup.procs": "1\n42\n", "memory.max": "max\n", "memory.events": "low 0\nhigh 0\nmax 12\noom 2\noom_kill 3\noom_group_kill 1\n", "cpu.stat": "usage_usec 1500\nuser_usec 1000\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := g.ooms(), (ooms{kills: 3, own: true}); got != want {
		t.Errorf("read %+v, want %+v", got, want)
	}
	if cpu, ok := g.cpuTime(); !ok || cpu.Microseconds() != 1500 {
		t.Errorf("read %v of processor time", cpu)
	}
	if g.limited(42, mib) {
		t.Error("max is taken for a limit")
	}
	if err := os.WriteFile(filepath.Join(dir, "memory.max"), []byte("1048576\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if !g.limited(42, mib) || g.limited(43, mib) || g.limited(42, mib-1) {
		t.Error("a limit isn't known by its number and its members")
	}
}
