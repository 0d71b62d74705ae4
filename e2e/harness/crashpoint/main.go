// Command crashpoint kills a process when it is about to make the K-th of those system calls by which it acts on the world
// outside of it. All its threads are counted together, and what it forks until that executes a program of its own.
//
// strace can inject a signal as well, but counts for each thread on its own, and Go moves work between threads.
package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// steps are the system calls that count, by their numbers.
var steps = map[uint64]string{
	unix.SYS_MKDIRAT: "mkdirat", unix.SYS_OPENAT: "openat", unix.SYS_WRITE: "write", unix.SYS_PWRITE64: "pwrite64",
	unix.SYS_FTRUNCATE: "ftruncate", unix.SYS_FALLOCATE: "fallocate", unix.SYS_FSYNC: "fsync", unix.SYS_FDATASYNC: "fdatasync",
	unix.SYS_RENAMEAT: "renameat", unix.SYS_RENAMEAT2: "renameat2", unix.SYS_UNLINKAT: "unlinkat", unix.SYS_BIND: "bind",
	unix.SYS_CLONE: "clone", unix.SYS_CLONE3: "clone3", unix.SYS_SETSID: "setsid", unix.SYS_EXECVE: "execve",
	unix.SYS_PIDFD_OPEN: "pidfd_open", unix.SYS_PIDFD_SEND_SIGNAL: "pidfd_send_signal", unix.SYS_KILL: "kill",
	unix.SYS_WAIT4: "wait4", unix.SYS_WAITID: "waitid",
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "crashpoint:", err)
		os.Exit(1)
	}
}

// run prints "attached" once it counts, and at the process's end how many steps there were and, if it was ended by this
// program at a step, the step's name. SIGTERM ends the process at once; K = 0 leaves it to that.
func run() error {
	if len(os.Args) != 3 {
		return errors.New("usage: crashpoint PID K")
	}
	pid, err := strconv.Atoi(os.Args[1])
	if err != nil {
		return err
	}
	k, err := strconv.Atoi(os.Args[2])
	if err != nil {
		return err
	}
	runtime.LockOSThread() // a tracer is a thread
	t := tracer{pid: pid, k: k, tracees: map[int]bool{}}
	if err := t.attach(); err != nil {
		return err
	}
	enough := make(chan os.Signal, 1)
	signal.Notify(enough, unix.SIGTERM)
	go func() {
		<-enough
		_ = unix.Kill(pid, unix.SIGKILL) // ESRCH: it has just ended
	}()
	fmt.Fprintln(os.Stdout, "attached")
	if err := t.trace(); err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, t.count, t.at)
	return nil
}

type tracer struct {
	pid, k int
	// tracees are the threads that live, and children before they execute a program.
	tracees map[int]bool
	count   int
	at      string
}

// attach takes hold of all threads. Those that start meanwhile are taken hold of with the thread that starts them, or
// found in the next pass.
func (t *tracer) attach() error {
	const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_TRACEFORK | unix.PTRACE_O_TRACEVFORK | unix.PTRACE_O_TRACEEXEC
	for found := true; found; {
		found = false
		dir, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", t.pid))
		if err != nil {
			return err
		}
		for _, d := range dir {
			tid, err := strconv.Atoi(d.Name())
			if err != nil || t.tracees[tid] {
				continue
			}
			switch err := ptrace(unix.PTRACE_SEIZE, tid, options); {
			case errors.Is(err, unix.ESRCH):
				continue // it has ended
			case errors.Is(err, unix.EPERM) && tracerOf(t.pid, tid) == os.Getpid(): // it came with another one
			case err != nil:
				return fmt.Errorf("attach to thread %d: %w", tid, err)
			}
			found, t.tracees[tid] = true, true
			_ = ptrace(unix.PTRACE_INTERRUPT, tid, 0) // ESRCH: it has ended
		}
	}
	return nil
}

func tracerOf(pid, tid int) (tracer int) {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/status", pid, tid)) // none: it has ended
	for line := range strings.Lines(string(status)) {
		if n, _ := fmt.Sscanf(line, "TracerPid:\t%d", &tracer); n == 1 {
			return tracer
		}
	}
	return 0
}

// trace follows the tracees until none is left.
func (t *tracer) trace() error {
	for len(t.tracees) > 0 {
		var status unix.WaitStatus
		tid, err := unix.Wait4(-1, &status, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("wait: %w", err)
		case !status.Stopped():
			delete(t.tracees, tid)
			continue
		}
		t.tracees[tid] = true
		pass := unix.Signal(0)
		switch event := int(status) >> 16; {
		case status.StopSignal() == unix.SIGTRAP|0x80:
			t.step(tid)
		case event == unix.PTRACE_EVENT_EXEC:
			delete(t.tracees, tid) // a node's process from now on
			_ = ptrace(unix.PTRACE_DETACH, tid, 0)
			continue
		case event == 0:
			pass = status.StopSignal()
		}
		_ = ptrace(unix.PTRACE_SYSCALL, tid, uintptr(pass)) // ESRCH: it was killed
	}
	return nil
}

// step looks at what a thread is about to do.
func (t *tracer) step(tid int) {
	const get, entry, createFlags = 0x420e, 1, 2 // PTRACE_GET_SYSCALL_INFO, PTRACE_SYSCALL_INFO_ENTRY, the flags' argument of openat
	var info [88]byte
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, get, uintptr(tid), uintptr(len(info)), uintptr(unsafe.Pointer(&info)), 0, 0) //nolint:gosec // the kernel's interface
	if errno != 0 || info[0] != entry {
		return
	}
	name, counts := steps[binary.NativeEndian.Uint64(info[24:])]
	flags := binary.NativeEndian.Uint64(info[32+8*createFlags:])
	if !counts || name == "openat" && flags&syscall.O_CREAT == 0 {
		return
	}
	t.count++
	if t.count == t.k {
		t.at = name
		_ = unix.Kill(t.pid, unix.SIGKILL) // the call isn't made any more
	}
}

func ptrace(request, tid int, data uintptr) error {
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), 0, data, 0, 0); errno != 0 {
		return errno
	}
	return nil
}
