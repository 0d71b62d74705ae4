package supervisor

import (
	"os"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// children are the leaders that this process forked, for whichever supervisor. It has one set of them, as the kernel has.
var children = brood{leaders: map[int]int{}}

// brood keeps apart the children that somebody waits for from those that came home.
type brood struct {
	mu sync.Mutex // guards what follows
	// forks counts those under way, of whose children nobody knows the pids yet.
	forks int
	// leaders counts by pid: as soon as one is reaped its number may be the next one's, which is counted before the first is forgotten.
	leaders map[int]int
}

// expect announces a fork. forked is called after it with the child, once, with 0 where there is none.
func (b *brood) expect() (forked func(pid int)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.forks++
	return func(pid int) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.forks--
		if pid != 0 {
			b.leaders[pid]++
		}
	}
}

// add takes in a leader that was found: it may have been let go by this very process.
func (b *brood) add(pid int) { b.expect()(pid) }

// forget is called once a leader is reaped, or let go.
func (b *brood) forget(pid int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.leaders[pid]--; b.leaders[pid] == 0 {
		delete(b.leaders, pid)
	}
}

// mayHave tells whether a child that was seen before may be one of those that somebody waits for.
func (b *brood) mayHave(pid int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.forks > 0 || b.leaders[pid] > 0
}

// ReapOrphans reaps what units and probes left behind, where that comes to this process as it does to a container's first
// one: else it would stay a zombie, with its pid, for as long as this process lives. It is to be called now and then.
//
// Whose an orphan was the kernel doesn't say. It is therefore known by what no child is that this process waits for: such
// a one leads a session and is known to children, or leads a process group in this process's own session, as probes do.
// Whoever starts a process in another way loses its exit here.
func ReapOrphans() {
	if !comeHome() {
		return
	}
	var info unix.Siginfo
	if unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil) != nil || info.Signo == 0 {
		return // no child has ended
	}
	own, err := readStat(os.Getpid())
	if err != nil {
		return
	}
	for _, pid := range pids() {
		if !orphaned(pid, own.session) {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it was reaped
		}
		// Looked at again, now that the pidfd holds it. Where it was reaped meanwhile, whoever has its number isn't waited for.
		if orphaned(pid, own.session) {
			_ = unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOHANG, nil)
		}
		_ = unix.Close(fd) // nothing was written
	}
}

// orphaned tells whether a process is a dead child of this one for which nobody waits.
func orphaned(pid, ownSession int) bool {
	st, err := readStat(pid)
	switch {
	case err != nil, !st.zombie, st.parent != os.Getpid():
		return false
	case st.session == pid:
		return !children.mayHave(pid)
	default:
		return st.session != ownSession || st.group != pid
	}
}

// comeHome tells whether orphans become this process's children.
func comeHome() bool {
	var subreaper int
	err := unix.Prctl(unix.PR_GET_CHILD_SUBREAPER, uintptr(unsafe.Pointer(&subreaper)), 0, 0, 0) //nolint:gosec // the kernel takes a pointer
	return os.Getpid() == 1 || err == nil && subreaper != 0
}
