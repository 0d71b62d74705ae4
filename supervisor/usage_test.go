package supervisor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// What a unit uses is what all that descends from its process does, whether control groups tell or /proc is gone through.
func TestMeasure(t *testing.T) {
	for _, kind := range []string{"", "1", "v1"} {
		t.Run("groups="+kind, func(t *testing.T) {
			t.Setenv(groupsEnv, kind)
			const script = "(i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done); " + // in a child, which ends
				"sleep 3600 & setsid sleep 3600 & exec 5</dev/null 6</dev/null; echo >ready; wait"
			spec := commandSpec(t, "sh", "-c", script)
			w := watch(t, spec)
			pid := w.until(ProcessReady).State.PID
			await(t, "the work to be done", func() bool { return exists(filepath.Join(spec.Dir, "ready")) })
			kin := newKin(group{}, &spec)
			var use Usage
			await(t, "the one that leaves the session", func() bool {
				return slices.ContainsFunc(kin.find(), func(member int) bool { return member != pid && leads(member) })
			})
			await(t, "the memory of all three", func() bool {
				use = Measure([]*Unit{w.Unit})[spec.ID]
				sum, all := uint64(0), kin.find()
				for _, pid := range all {
					sum += resident(pid)
				}
				return len(all) == 3 && use.Memory == sum && sum > 0
			})
			if use.PID != pid || use.CPUTime < 20*time.Millisecond || use.CPUTime > time.Minute {
				t.Errorf("measured %+v", use)
			}
			await(t, "the count of open files", func() bool {
				files := Measure([]*Unit{w.Unit})[spec.ID].OpenFiles
				names, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
				return err == nil && files == len(names) && files >= 5
			})
			w.Stop()
			w.end()
			if got := Measure([]*Unit{w.Unit}); len(got) > 0 {
				t.Errorf("of nothing, measured %+v", got)
			}
		})
	}
}

func TestUsageOfThisProcess(t *testing.T) {
	if m := resident(os.Getpid()); m < mib || m > 1<<40 {
		t.Errorf("%d bytes are resident", m)
	}
	before := openFiles(os.Getpid())
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if now := openFiles(os.Getpid()); now != before+1 {
		t.Errorf("%d files were open, and after one more %d", before, now)
	}
	if got := fmt.Sprint(resident(1<<30), openFiles(1<<30)); got != "0 0" {
		t.Errorf("nobody uses %s", got)
	}
}

// leads tells whether a process leads its session, as everything that a supervisor forks does.
func leads(pid int) bool {
	st, err := readStat(pid)
	return err == nil && st.session == pid
}
