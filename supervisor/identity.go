package supervisor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Identity tells a process from every other that had or will have its pid. The zero
// Identity is nobody's.
type Identity struct {
	PID int
	// StartTicks is when the process started, in clock ticks since the boot (proc(5), stat, field 22).
	StartTicks uint64
	// BootID is the host's, drawn by the kernel at each boot.
	BootID string
}

// BootID is the kernel's random name for the time since the last boot.
func BootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

// identify reads the identity of a process that can't be reaped meanwhile, or whose pidfd is open.
func identify(pid int, bootID string) (Identity, error) {
	st, err := readStat(pid)
	if err != nil {
		return Identity{}, err
	}
	return Identity{PID: pid, StartTicks: st.startTicks, BootID: bootID}, nil
}

// tick is the unit of times in /proc: USER_HZ is 100 on all that Go runs on.
const tick = time.Second / 100

// startTime is when a process started, as its ticks tell: to a hundredth of a second, and with the clock as it is set now.
func startTime(ticks uint64) time.Time {
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		return time.Now()
	}
	return time.Now().Add(time.Duration(ticks)*tick - time.Duration(boot.Nano()))
}

func readStat(pid int) (stat, error) {
	data, err := read("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return stat{}, fmt.Errorf("look at process %d: %w", pid, err)
	}
	st, err := parseStat(data)
	if err != nil {
		return stat{}, fmt.Errorf("look at process %d: %w", pid, err)
	}
	return st, nil
}

// stat is what is used of /proc/PID/stat.
type stat struct {
	// zombie: it has ended, all its threads have, and its parent hasn't asked how.
	zombie bool
	// stopped: a signal did that, and no debugger.
	stopped bool
	// forked: it runs its parent's program, and has executed none itself.
	forked     bool
	parent     int
	group      int
	session    int
	startTicks uint64
	// cpu is what it and the children that it waited for have used.
	cpu time.Duration
	// exit is how a zombie ended; also 0 where that isn't this process's to know.
	exit unix.WaitStatus
}

// parseStat reads a line of /proc/PID/stat. The name in it may hold anything, parentheses and line breaks
// included, so that the fields are counted from the last closing one.
func parseStat(line []byte) (stat, error) {
	end := bytes.LastIndexByte(line, ')')
	if end < 0 {
		return stat{}, errors.New("there is no name in it")
	}
	fields := strings.Fields(string(line[end+1:]))
	// Numbered from 1 by proc(5); the state, field 3, is the first here.
	const state, ppid, group, session, flags, utime, cstime, threads, starttime, exitcode = 0, 4 - 3, 5 - 3, 6 - 3, 9 - 3, 14 - 3, 17 - 3, 20 - 3, 22 - 3, 52 - 3
	if len(fields) <= starttime {
		return stat{}, fmt.Errorf("it has %d fields after the name", len(fields))
	}
	pgrp, err := strconv.Atoi(fields[group])
	if err != nil {
		return stat{}, fmt.Errorf("read process group: %w", err)
	}
	sid, err := strconv.Atoi(fields[session])
	if err != nil {
		return stat{}, fmt.Errorf("read session: %w", err)
	}
	ticks, err := strconv.ParseUint(fields[starttime], 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("read start time: %w", err)
	}
	parent, err := strconv.Atoi(fields[ppid])
	if err != nil {
		return stat{}, fmt.Errorf("read parent: %w", err)
	}
	bits, err := strconv.ParseUint(fields[flags], 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("read flags: %w", err)
	}
	const forkNoExec = 0x40 // PF_FORKNOEXEC in the kernel's sched.h
	left, err := strconv.Atoi(fields[threads])
	if err != nil {
		return stat{}, fmt.Errorf("read count of threads: %w", err)
	}
	st := stat{
		// A first thread that has ended before the others is shown as a zombie, too.
		zombie: (fields[state] == "Z" || fields[state] == "X") && left <= 1, stopped: fields[state] == "T",
		forked: bits&forkNoExec != 0, parent: parent, group: pgrp, session: sid, startTicks: ticks,
	}
	for _, field := range fields[utime : cstime+1] {
		used, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return stat{}, fmt.Errorf("read cpu time: %w", err)
		}
		st.cpu += time.Duration(used) * tick
	}
	if len(fields) > exitcode {
		code, err := strconv.ParseUint(fields[exitcode], 10, 32)
		if err != nil {
			return stat{}, fmt.Errorf("read exit code: %w", err)
		}
		st.exit = unix.WaitStatus(code)
	}
	return st, nil
}

// openIdentity returns a pidfd of the very process that an identity names, or -1 where that is gone. The
// pidfd is opened first: what is compared afterwards is the process that it holds.
func openIdentity(id Identity, bootID string) (pidfd int, err error) {
	if id.PID <= 0 || id.BootID != bootID {
		return -1, nil
	}
	fd, err := unix.PidfdOpen(id.PID, 0)
	switch {
	case errors.Is(err, unix.ESRCH), errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL):
		return -1, nil // gone, or the number is that of another's thread by now: kernels differ in how they say so
	case err != nil:
		return -1, fmt.Errorf("open pidfd of process %d: %w", id.PID, err)
	}
	_ = unix.SetNonblock(fd, true) // as in start
	now, err := identify(id.PID, bootID)
	if err == nil && now == id && !ended(fd, 0) {
		return fd, nil
	}
	_ = unix.Close(fd) // nothing was written
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
		return -1, err // nobody knows: for want of descriptors, say
	}
	return -1, nil
}

// ended tells whether the process behind a pidfd has ended, after at most wait milliseconds; -1: however long it takes.
func ended(pidfd, wait int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, wait)
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}

// exitOfZombie tells how a process ended that isn't this one's child, and that its parent hasn't reaped. known is false
// where it has, or where the kernel doesn't tell.
func exitOfZombie(pid, pidfd int) (status unix.WaitStatus, known bool) {
	if !statHasExits() {
		return 0, false
	}
	st, err := readStat(pid)
	if err != nil || !st.zombie || st.exit == 0 && !maySee(pid) {
		return 0, false
	}
	// Until it is reaped its pid is its own: what was read is of this process, and isn't of one half taken apart.
	err = unix.PidfdSendSignal(pidfd, 0, nil, 0)
	return st.exit, err == nil || errors.Is(err, unix.EPERM)
}

// maySee tells whether the kernel shows this process all that /proc/PID/stat has of another one: it hides some of a stranger's and
// writes 0 instead. A zombie has nothing left that would show it but this link, which is under the same condition. A
// process's user or group alone wouldn't tell: one that has changed them, or a security module, may hide it too.
func maySee(pid int) bool {
	_, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/user")
	return err == nil
}

// statHasExits tells whether the exit code in /proc/PID/stat is the process's. Older kernels have the first thread's there,
// which may have ended before and otherwise.
func statHasExits() bool {
	var v unix.Utsname
	if unix.Uname(&v) != nil {
		return false
	}
	var major, minor int
	_, err := fmt.Sscanf(unix.ByteSliceToString(v.Release[:]), "%d.%d", &major, &minor)
	return err == nil && (major > 6 || major == 6 && minor >= 6)
}

// exitOfReaped asks the kernel how a process ended that isn't this one's child. known is false while its parent
// hasn't reaped it, and able is false where the kernel never says: before Linux 6.15.
func exitOfReaped(pidfd int) (status unix.WaitStatus, known, able bool) {
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	err := unix.IoctlPidfdInfo(pidfd, &info)
	switch {
	case err != nil:
		return 0, false, false
	case info.Mask&unix.PIDFD_INFO_EXIT == 0:
		return 0, false, true
	}
	return unix.WaitStatus(info.Exit_code), true, true
}
