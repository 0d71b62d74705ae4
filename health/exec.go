package health

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxExecOutput is how much of a command's last output its error shows.
	maxExecOutput = 512
	// outputGrace is how long a process that left the command's group may hold on to its output, before that is cut off.
	outputGrace = 100 * time.Millisecond
)

// script runs the command $1 in a process of its own beside the shell, which waits for it and, where that is told to end,
// ends its whole group with it.
const script = `trap 'kill -KILL 0' TERM; (eval "$1") & wait $!`

type execProbe struct {
	command string
	dir     string
	env     []string
}

func (p execProbe) Check(ctx context.Context) error {
	const what = "exec probe"
	if ctx.Err() != nil {
		return failed(ctx, what, ctx.Err())
	}
	var out tail
	// Without the context: its way to kill can come after the reaping, when the group's id may be another's.
	cmd := exec.Command("/bin/sh", "-c", script, "sh", p.command) //nolint:noctx // the group is killed below
	// Never nil, which would hand down this process's own environment.
	cmd.Env = append([]string{}, p.env...)
	cmd.Dir = p.dir
	cmd.Stdout, cmd.Stderr = &out, &out
	// Who waits for a command that hangs may be killed: nobody else would ever end it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGTERM}
	cmd.WaitDelay = outputGrace
	started, exited := make(chan error, 1), make(chan struct{})
	go func() {
		// The kernel goes by the death of the thread that forks: that isn't to end before the shell does.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(exited)
		err := cmd.Start()
		started <- err
		if err == nil {
			awaitExit(cmd.Process.Pid)
		}
	}()
	if err := <-started; err != nil {
		return failed(ctx, what, err)
	}
	cut := false
	select {
	case <-exited:
	case <-ctx.Done():
		cut = true
	}
	// The shell isn't reaped yet, so that the group's id is still its own.
	_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	<-exited
	err := cmd.Wait()

	switch {
	case cut:
		return out.explain(failed(ctx, what, ctx.Err()))
	case err == nil, errors.Is(err, exec.ErrWaitDelay):
		return nil
	default:
		return out.explain(fmt.Errorf("%s: %w", what, err))
	}
}

// awaitExit returns once the child has exited, and leaves it unreaped.
func awaitExit(pid int) {
	for {
		if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// tail keeps the last bytes written to it.
type tail struct{ kept []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.kept = append(t.kept, p[max(0, len(p)-maxExecOutput):]...)
	if over := len(t.kept) - maxExecOutput; over > 0 {
		t.kept = append(t.kept[:0], t.kept[over:]...)
	}
	return len(p), nil
}

// explain adds what was written, quoted so that it stays in one line.
func (t *tail) explain(err error) error {
	said := bytes.TrimSpace(t.kept)
	if len(said) == 0 {
		return err
	}
	return fmt.Errorf("%w, its last output %q", err, said)
}
