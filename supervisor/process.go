package supervisor

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// maxOutput is how much of a dead process's output is kept.
const maxOutput = 4 << 10

// process is one process that leads a session, and all that it forked.
type process struct {
	identity Identity
	// child: this process forked it. An adopted one is another's child by now, or came home to this process.
	child bool
	// pidfd refers to this process and no other, also when its pid has come to somebody else.
	pidfd *os.File
	kin   kin
	// limited: its control group holds it to its memory limit.
	limited bool
	// ooms are those that its group had seen before it: of an adopted one only their count is known.
	ooms ooms
	// killed: this process sent it SIGKILL.
	killed bool
	// exited is closed when the leader has ended, or was let go. A child stays a zombie until reap.
	exited    chan struct{}
	startedAt time.Time

	logPath string
	// logStart is the log's end at the start: what lies behind that position is this process's or newer.
	logStart int64
}

// watch waits until the leader has ended.
func (p *process) watch() {
	defer close(p.exited)
	conn, err := p.pidfd.SyscallConn()
	if err != nil {
		return // closed: it was let go
	}
	err = conn.Read(func(fd uintptr) bool { return ended(int(fd), 0) })
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		// The poller can't hold it: wait in a thread, which keeps it open meanwhile.
		_ = conn.Control(func(fd uintptr) { ended(int(fd), -1) })
	}
}

// ended tells whether the leader has ended.
func (p *process) ended() bool { return ended(int(p.pidfd.Fd()), 0) }

// signal sends to the leader's process group, until reap has returned. Through the pidfd it reaches this group
// or nobody. Before Linux 6.9 it goes by number, and only while the number is surely the leader's.
func (p *process) signal(sig unix.Signal) error {
	p.killed = p.killed || sig == unix.SIGKILL
	err := unix.PidfdSendSignal(int(p.pidfd.Fd()), sig, nil, unix.PIDFD_SIGNAL_PROCESS_GROUP)
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	if p.child || !p.ended() {
		return unix.Kill(-p.identity.PID, sig)
	}
	return unix.ESRCH
}

// kill ends everything that descends from the process. It is repeated until nothing is left: what forks
// while it is looked for is found the next time.
func (p *process) kill() {
	_ = p.signal(unix.SIGKILL) // ESRCH: the session's first group is empty
	p.kin.kill()
}

// group is the leader's process group; 0 where nobody is in it, not even a zombie: its number may be another's by now.
func (p *process) group() int {
	if p.signal(0) != nil {
		return 0
	}
	return p.identity.PID
}

// left tells whether anything that descends from the process, or itself, still runs.
func (p *process) left() bool { return p.kin.leftWith(p.group()) }

// find returns the pids of what lives of it.
func (p *process) find() []int { return p.kin.findWith(p.group()) }

// reap takes the exit status of a leader that has ended. In between it calls emptied, which waits until nothing that the leader
// forked is left and returns false where that was left to itself. exit is nil then.
func (p *process) reap(emptied func() bool) (exit *Exit) {
	defer func() { _ = p.pidfd.Close() }() // nothing can be done about it
	exit = &Exit{Code: -1, At: time.Now(), Unknown: true}
	exit.learn(p.status()) // before its parent has it forgotten
	children.forget(p.identity.PID)
	oom := !p.killed && exit.mayBeOOM() && p.kin.group.ooms().since(p.ooms)
	if !emptied() {
		return nil
	}
	if exit.Unknown {
		exit.learn(p.statusLater())
	}
	exit.OOMKilled = oom && exit.mayBeOOM()
	_ = p.kin.group.remove() // nobody is in it
	exit.Output = lastOutput(p.logPath, p.logStart, maxOutput)
	return exit
}

// learn takes in how the process ended, where that is known.
func (e *Exit) learn(status unix.WaitStatus, known bool) {
	if !known {
		return
	}
	e.Unknown, e.Code = false, status.ExitStatus()
	if status.Signaled() {
		e.Signal = signalName(status.Signal())
	}
}

// status is how the leader ended, as far as that is known at once.
func (p *process) status() (status unix.WaitStatus, known bool) {
	// An orphan may have come home to this process. As long as it isn't reaped the pid is its own.
	if err := unix.Waitid(unix.P_PIDFD, int(p.pidfd.Fd()), nil, unix.WEXITED|unix.WNOWAIT, nil); err == nil {
		_, err := unix.Wait4(p.identity.PID, &status, 0, nil)
		p.child = false // from now on its number may be another's
		return status, err == nil
	}
	if status, known = exitOfZombie(p.identity.PID, int(p.pidfd.Fd())); !known {
		status, known, _ = exitOfReaped(int(p.pidfd.Fd())) // by now, perhaps
	}
	return status, known
}

// statusLater is status for one that had to be reaped first, and whose parent, the host's first process, may take its time.
func (p *process) statusLater() (status unix.WaitStatus, known bool) {
	for pause := time.Millisecond; pause < 2*time.Second; pause *= 2 {
		status, known, able := exitOfReaped(int(p.pidfd.Fd()))
		if known || !able {
			return status, known
		}
		time.Sleep(pause)
	}
	return 0, false
}

// signalName is never empty: real-time signals have a number only.
func signalName(sig unix.Signal) string {
	if name := unix.SignalName(sig); name != "" {
		return name
	}
	return fmt.Sprintf("signal %d", int(sig))
}
