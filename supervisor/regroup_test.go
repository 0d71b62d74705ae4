package supervisor

import (
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// elsewhere has a supervisor in another control group than this process carry out a plan. Nothing of that group may be left at
// the test's end.
func elsewhere(t *testing.T, p plan) (*Record, func()) {
	t.Helper()
	p.Within = "elsewhere" + strings.ReplaceAll(p.Dir, "/", "-")
	t.Cleanup(func() {
		for _, dir := range basesOf(p.Within) {
			if subs := subgroups(dir); len(subs) > 0 {
				t.Errorf("%v are left", subs)
			}
			if err := removeGroup(dir); err != nil {
				t.Error(err)
			}
		}
	})
	return carryOut(t, p)
}

// A supervisor that was started from another group, a session's for example, finds the process where it is: its limit holds,
// and the group goes with it.
func TestAdoptFromAnotherControlGroup(t *testing.T) {
	for _, groups := range []string{"1", "v1"} {
		t.Run(groups, func(t *testing.T) {
			t.Setenv(groupsEnv, groups)
			p := plan{
				Dir: t.TempDir(), Mode: "allocate", Args: []string{"200"}, Memory: 64 * mib, Groups: true, V1: groups == "v1",
				DieAt: 3, Written: true, BackOff: quick(),
			}
			later := wantedGroups(t, p.Dir)
			if later.memory == "" || later.memory == later.unified {
				skip(t, "the memory's control groups don't lie beneath this process's own")
			}
			spec, err := p.spec(later)
			if err != nil {
				t.Fatal(err)
			}
			r, over := elsewhere(t, p)
			then := groupOnRecord(r.Cgroups, spec.ID)
			if then.memory == later.of(spec.ID).memory || !exists(then.memory) {
				t.Fatalf("started in %+v", then)
			}
			w := adopt(t, spec, *r)
			if s := w.until(ProcessReady).State; s.PID != r.Identity.PID || !s.MemoryLimited {
				t.Errorf("adopted %+v", s)
			}
			if err := touch(filepath.Join(p.Dir, "ready.go"), ""); err != nil {
				t.Fatal(err)
			}
			if exit := w.until(ProcessExited).State.LastExit; !exit.OOMKilled {
				t.Errorf("exit %v", exit)
			}
			w.until(ProcessReady)
			if exists(filepath.Dir(then.memory)) {
				t.Errorf("%s is left", filepath.Dir(then.memory))
			}
			if now := groupOnRecord(w.recorded().Cgroups, spec.ID); now != later.of(spec.ID) {
				t.Errorf("on record: %+v", now)
			}
			w.Stop()
			w.end()
			over()
		})
	}
}

// What a process left in a group that is elsewhere is found there, also where nothing else tells of it.
func TestAdoptEndsLeftoversInAnotherControlGroup(t *testing.T) {
	for name, identified := range map[string]bool{"of a process": true, "of one without an identity": false} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(groupsEnv, "v1")
			p := plan{Dir: t.TempDir(), Mode: "serve", Groups: true, V1: true, DieAt: 2, Written: identified, BackOff: quick()}
			spec, err := p.spec(wantedGroups(t, p.Dir))
			if err != nil {
				t.Fatal(err)
			}
			r, over := elsewhere(t, p)
			then := groupOnRecord(r.Cgroups, spec.ID)
			var leader int
			await(t, "the process", func() bool {
				members := then.members()
				if len(members) == 1 {
					leader = members[0]
				}
				return leader != 0 && exists(filepath.Join(p.Dir, "ready"))
			})
			bare := exec.Command("sleep", "3600")
			bare.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
			if err := bare.Start(); err != nil {
				t.Fatal(err)
			}
			for _, dir := range then.dirs() {
				if err := write(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(bare.Process.Pid)); exists(dir) && err != nil {
					t.Error(err)
				}
			}
			if err := unix.Kill(leader, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			await(t, "the leader's end", func() bool { return gone(leader) })
			r.EverReady = true
			// What is left leads a session and runs a program: where no identity tells otherwise, it is taken for the process.
			w := adopt(t, spec, *r)
			first := w.until(ProcessReady).State
			if taken := first.PID == bare.Process.Pid; taken == identified {
				t.Errorf("adopted %+v, left was %d", first, bare.Process.Pid)
			}
			w.Stop()
			w.end()
			if !gone(bare.Process.Pid) {
				t.Error("what was left in the group lives")
				_ = bare.Process.Kill()
			}
			_ = bare.Wait() // ECHILD where the unit, whose child it never was, had to reap it
			over()
		})
	}
}
