package health

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxExecOutput is how much of a command's last output its error shows.
	maxExecOutput = 512
	// outputGrace is how long a process that left the command's group may hold on to its output, before that is cut off.
	outputGrace = 100 * time.Millisecond
	// killPatience is how long what was killed may take to be gone. Only what the kernel holds isn't by then.
	killPatience = time.Second
)

// script runs the command $1 in the folder $2 and in a process of its own beside the shell, which waits for it and, where
// that is told to end, ends its whole group with it. The shell itself goes to no folder, whose disk may not answer.
const script = `trap 'kill -KILL 0' TERM; (cd "$2" && eval "$1") & wait $!`

type execProbe struct {
	command string
	run     Run
	// stuck is a process of an earlier check that outlives SIGKILL; 0 where there is none. Another check would add another.
	stuck atomic.Int64
}

func (p *execProbe) Check(ctx context.Context) error {
	const what = "exec probe"
	if ctx.Err() != nil {
		return failed(ctx, what, ctx.Err())
	}
	if pid := p.stuck.Load(); pid != 0 {
		return fmt.Errorf("%s: process %d of an earlier one outlives SIGKILL, and no other is run until it is gone", what, pid)
	}
	var out tail
	// Without the context: its way to kill can come after the reaping, when the group's id may be another's.
	cmd := exec.Command("/bin/sh", "-c", script, "sh", p.command, cmp.Or(p.run.Dir, ".")) //nolint:noctx // the group is killed below
	// Never nil, which would hand down this process's own environment.
	cmd.Env = append([]string{}, p.run.Env...)
	cmd.Stdout, cmd.Stderr = &out, &out
	// Who waits for a command that hangs may be killed: nobody else would ever end it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGTERM, Credential: p.run.Credential}
	cmd.WaitDelay = outputGrace
	started, exited := make(chan error, 1), make(chan struct{})
	go func() {
		// The kernel goes by the death of the thread that forks: that isn't to end before the shell does.
		runtime.LockOSThread()
		var err error
		if !p.run.NoNewPrivileges {
			defer runtime.UnlockOSThread()
		} else { // which nothing takes from the thread again: it ends with this goroutine
			err = unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		}
		defer close(exited)
		if err == nil {
			err = p.start(cmd)
		}
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
	if cut {
		if left := awaitGroup(cmd.Process.Pid); left != 0 {
			p.stuck.Store(int64(left))
			go func() {
				for left := left; left != 0; {
					left = awaitGroup(cmd.Process.Pid)
				}
				<-exited
				_ = cmd.Wait() // it was killed
				p.stuck.Store(0)
			}()
			return fmt.Errorf("%w; process %d of it outlives SIGKILL", failed(ctx, what, ctx.Err()), left)
		}
	}
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

// start starts a command. One of another user has the kernel make of this process's memory what fs.suid_dumpable says: what it was
// before is set again.
func (p *execProbe) start(cmd *exec.Cmd) error {
	if p.run.Credential != nil {
		was, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		if err != nil || was != 1 {
			was = 0 // 2 is the kernel's, for the moment of another change
		}
		defer func() { _ = unix.Prctl(unix.PR_SET_DUMPABLE, uintptr(was), 0, 0, 0) }() // it takes both
	}
	return cmd.Start()
}

// awaitExit returns once the child has exited, and leaves it unreaped.
func awaitExit(pid int) {
	for {
		if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// awaitGroup waits for the end of a killed group whose leader isn't reaped. It returns the pid of one that outlives that, else 0.
func awaitGroup(group int) (left int) {
	deadline := time.Now().Add(killPatience)
	for pause := time.Millisecond; ; pause = min(2*pause, killPatience/4) {
		if left = survivor(group); left == 0 || time.Now().After(deadline) {
			return left
		}
		time.Sleep(pause)
	}
}

// survivor returns the pid of a group's process that hasn't ended, else 0.
func survivor(group int) (pid int) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat") // without /proc none is seen
	for _, path := range stats {
		line, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		var (
			state        string
			parent, pgrp int
		)
		// The name before the last parenthesis may hold anything.
		_, err = fmt.Sscan(string(line[bytes.LastIndexByte(line, ')')+1:]), &state, &parent, &pgrp)
		if err == nil && pgrp == group && state != "Z" && state != "X" {
			_, _ = fmt.Sscanf(path, "/proc/%d/", &pid) // it is a number
			return pid
		}
	}
	return 0
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
