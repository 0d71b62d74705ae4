package supervisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// forkExec is syscall.ForkExec into a group and under a spec's limits, all of which hold before the program's first instruction.
// A descriptor joins the unified hierarchy only (attr has that). A v1 group is inherited from the thread that
// forks, which therefore is in it for as long as that takes. To have no new privileges is inherited, too, and for ever.
func (g group) forkExec(path string, argv []string, attr *syscall.ProcAttr, s *Spec) (pid int, err error) {
	old := g.old()
	hold := s.Limits.OpenFiles > 0 || ownScore() != 0
	if len(old) == 0 && !hold && !s.NoNewPrivileges {
		return forkUnblocked(path, argv, attr)
	}
	homes := make([]string, len(old))
	for i, dir := range old {
		homes[i] = filepath.Dir(filepath.Dir(dir)) // the folder of the groups lies in this process's own
	}
	err = visit(old, homes, s.NoNewPrivileges, func() (err error) {
		attr.Sys.Ptrace = hold
		pid, err = forkUnblocked(path, argv, attr)
		if hold && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS)) {
			// Tracing may be forbidden. Then the program runs for a moment before the limits hold.
			attr.Sys.Ptrace = false
			pid, err = forkUnblocked(path, argv, attr)
		}
		if err != nil || !hold {
			return err
		}
		if attr.Sys.Ptrace {
			if !trapped(pid) {
				return nil // it has ended: who watches it sees that
			}
			defer func() { _ = syscall.PtraceDetach(pid) }() // ESRCH: it has ended
		}
		if err = s.Limits.hold(pid); err != nil {
			_ = unix.Kill(pid, unix.SIGKILL) // ours: it isn't reaped yet
			_, _ = unix.Wait4(pid, nil, 0, nil)
		}
		return err
	})
	return pid, err
}

// visit calls f in a thread that is in v1 groups meanwhile, and sees it home afterwards. One that is to have no new privileges
// ends instead, as nothing gives them back to it.
func visit(groups, homes []string, noNewPrivileges bool, f func() error) error {
	return aside(func() (again bool, err error) {
		entered := 0
		for _, dir := range groups {
			// 0 is the thread that writes, alone; any number would hold up all forks of the host.
			if err = write(filepath.Join(dir, "tasks"), "0"); err != nil {
				err = fmt.Errorf("join control group: %w", err)
				break
			}
			entered++
		}
		if err == nil && noNewPrivileges {
			if err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
				err = fmt.Errorf("give up new privileges: %w", err)
			}
		}
		if err == nil {
			err = f()
		}
		again = !noNewPrivileges
		for _, home := range homes[:entered] {
			again = write(filepath.Join(home, "tasks"), "0") == nil && again // else something else would run in a unit's groups
		}
		return again, err
	})
}

// aside calls f in a thread that nothing else runs in meanwhile, and that ends afterwards where it isn't to be used again.
func aside(f func() (again bool, err error)) error {
	done := make(chan error, 1)
	var run func()
	run = func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The runtime never ends a process's first thread. While that is kept here, it isn't the next one's.
			defer runtime.UnlockOSThread()
			next := make(chan struct{})
			go func() {
				defer close(next)
				run()
			}()
			<-next
			return
		}
		again, err := f()
		if again {
			runtime.UnlockOSThread()
		} // else the thread ends with this goroutine
		done <- err
	}
	go run()
	return <-done
}

// trapped waits until a child that asked to be traced stops at its program's first instruction; false where it has
// ended before.
func trapped(pid int) bool {
	const trap = 4 // CLD_TRAPPED
	var info unix.Siginfo
	for {
		err := unix.Waitid(unix.P_PID, pid, &info, unix.WSTOPPED|unix.WEXITED|unix.WNOWAIT|unix.WALL, nil)
		if !errors.Is(err, unix.EINTR) {
			return err == nil && info.Code == trap
		}
	}
}

// hold sets those limits of a child that are a process's own. Its score for the host's out-of-memory killer isn't the
// agent's, whose host may have made it the last to go. A score that can't be lowered stays.
func (l Limits) hold(pid int) error {
	_ = write("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", "0")
	if l.OpenFiles == 0 {
		return nil
	}
	limit := unix.Rlimit{Cur: l.OpenFiles, Max: l.OpenFiles}
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		return fmt.Errorf("%w: %d open files: %w", ErrLimit, l.OpenFiles, err)
	}
	return nil
}

// ownScore is what children inherit as their score; 0 where it can't be read.
func ownScore() int {
	data, _ := os.ReadFile("/proc/self/oom_score_adj")
	score, _ := strconv.Atoi(strings.TrimSpace(string(data)))
	return score
}
