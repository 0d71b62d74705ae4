package supervisor

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// takeOrphans has orphans come to this process until the test is over, as they do to a container's first one.
func takeOrphans(t *testing.T) {
	t.Helper()
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0); err != nil {
			t.Error(err)
		}
	})
}

// awaitReaped reaps orphans until a process isn't even a zombie.
func awaitReaped(t *testing.T, pid int) {
	t.Helper()
	await(t, "the orphan to be reaped", func() bool {
		ReapOrphans()
		return errors.Is(unix.Kill(pid, 0), unix.ESRCH)
	})
}

// What leaves a unit's session is reaped while the unit runs, and what its stop ends afterwards.
func TestOrphansThatComeHomeAreReaped(t *testing.T) {
	takeOrphans(t)
	spec, readyFile := fixtureSpec(t, "escape")
	spec.Args = []string{readyFile, "serve"}
	w := watch(t, spec)
	leader := w.until(ProcessReady).State.PID
	escapee := childOf(t, readyFile)
	if st, err := readStat(escapee); err != nil || st.parent != os.Getpid() || st.session != escapee {
		t.Fatalf("the escapee is %+v (%v)", st, err)
	}
	ReapOrphans()
	if gone(escapee) || gone(leader) {
		t.Fatal("what lives was reaped")
	}
	if err := unix.Kill(escapee, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitReaped(t, escapee)

	w.kill() // the next one's escapee is ended with it
	w.until(ProcessReady)
	escapee = childOf(t, readyFile)
	w.Stop()
	w.end()
	awaitReaped(t, escapee)
}

// What stayed in the unit's session, or in its group, doesn't hold its stop up as a zombie.
func TestStopDoesNotWaitForOrphansToBeReaped(t *testing.T) {
	takeOrphans(t)
	spec, readyFile := fixtureSpec(t, "with-child")
	spec.Args = []string{readyFile, "slow-term"}
	w := watch(t, spec)
	w.until(ProcessReady)
	child := childOf(t, readyFile)
	w.Stop()
	w.end()
	w.expect(graceful...)
	awaitReaped(t, child)
}

// The exit of a leader is its unit's to take, however late that comes to it, and nobody's once the unit is gone.
func TestLeadersAreReapedByTheirUnits(t *testing.T) {
	takeOrphans(t)
	spec := commandSpec(t, "sleep", "3600")
	dead := make(chan struct{}, 1)
	awaitDead := func(e Event) {
		if e.Kind == ProcessReady {
			<-dead
		}
	}
	kill := func(w *watched) {
		t.Helper()
		pid := w.State().PID
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		await(t, "its end", func() bool { return gone(pid) })
		ReapOrphans()
		if err := unix.Kill(pid, 0); err != nil {
			t.Errorf("its exit was taken: %v", err)
		}
		dead <- struct{}{}
		if exit := w.until(ProcessExited).State.LastExit; exit.Signal != "SIGKILL" {
			t.Errorf("it ended with %v", exit)
		}
	}
	w := watch(t, spec, awaitDead)
	kill(w)
	dead <- struct{}{}
	w.until(ProcessReady)
	record := w.recorded()
	w.Release()
	w.awaitDone()

	w = adopt(t, spec, record, awaitDead)
	kill(w)
	dead <- struct{}{}
	w.until(ProcessReady)
	pid := w.State().PID
	w.Release()
	w.awaitDone()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitReaped(t, pid)
	children.mu.Lock()
	defer children.mu.Unlock()
	if children.forks != 0 || len(children.leaders) != 0 {
		t.Errorf("children are waited for: %d and %v", children.forks, children.leaders)
	}
}

// One whose fork isn't over yet is nobody's orphan, nor is one that was forgotten once and forked twice.
func TestChildrenThatAreWaitedFor(t *testing.T) {
	takeOrphans(t)
	forked := children.expect()
	pid, err := syscall.ForkExec("/bin/true", []string{"true"}, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: true}})
	if err != nil {
		t.Fatal(err)
	}
	await(t, "its end", func() bool { return gone(pid) })
	there := func(when string) {
		t.Helper()
		ReapOrphans()
		if err := unix.Kill(pid, 0); err != nil {
			t.Fatalf("%s its exit is lost: %v", when, err)
		}
	}
	there("before its pid is known")
	forked(pid)
	there("before it is reaped")
	children.add(pid)
	children.forget(pid)
	there("when its number was another's before")
	children.expect()(0)
	children.forget(pid)
	awaitReaped(t, pid)
}

// A command that has a process group in this process's session is somebody else's to wait for, and what it leaves in
// that is nobody's.
func TestOrphansOfProbes(t *testing.T) {
	takeOrphans(t)
	cmd := exec.Command("/bin/sh", "-c", "sleep 1000 >&- & echo $!; exit 3")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	var out strings.Builder
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "its end", func() bool { return gone(cmd.Process.Pid) })
	ReapOrphans()
	if err := unix.Kill(-cmd.Process.Pid, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 3 {
		t.Errorf("it ended with %v", err)
	}
	left, err := strconv.Atoi(strings.TrimSpace(out.String()))
	if err != nil {
		t.Fatal(err)
	}
	awaitReaped(t, left)
}
