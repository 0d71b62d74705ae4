package supervisor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// start forks the process of a spec, born into its control group and with its log file as stdout and stderr.
func start(s *Spec, bootID string) (*process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("open stdin: %w", err)
	}
	defer null.Close()
	dir, err := OpenFolder(s.Dir)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w: %w", s.Path, ErrDir, err)
	}
	defer dir.Close()
	log, logStart, err := openLog(s.LogPath)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	group := s.Cgroups.under(s.ID, s.Limits)
	if err := group.make(); err != nil {
		return nil, errors.Join(err, group.remove())
	}
	limited, before := group.limit(s.Limits), group.ooms()

	pidfd := -1
	attr := &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd, Credential: s.Credential}
	if group.unified != "" {
		folder, err := os.Open(group.unified)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("open control group: %w", err), group.remove())
		}
		defer folder.Close()
		attr.UseCgroupFD, attr.CgroupFD = true, int(folder.Fd())
	}
	startedAt := time.Now()
	forked := children.expect()
	pid, err := group.forkExec(s.Path, append([]string{filepath.Base(s.Path)}, s.Args...), &syscall.ProcAttr{
		// The child has the same descriptors until it executes its program.
		Dir: fmt.Sprintf("/proc/self/fd/%d", dir.Fd()), Env: s.Env, Files: []uintptr{null.Fd(), log.Fd(), log.Fd()}, Sys: attr,
	}, s)
	if err != nil {
		forked(0)
		if pidfd >= 0 { // there was a process, and it was ended
			_ = unix.Close(pidfd)
		}
		_ = group.remove() // it was made for this process alone
		return nil, fmt.Errorf("start %s: %w", s.Path, err)
	}
	forked(pid)
	if pidfd < 0 {
		_ = unix.Kill(-pid, unix.SIGKILL) // ours: it isn't reaped yet
		_, _ = unix.Wait4(pid, nil, 0, nil)
		children.forget(pid)
		return nil, errors.Join(errors.New("the kernel has no pidfd: Linux 5.4 or newer is needed"), group.remove())
	}
	// A non-blocking descriptor is waited for by the runtime's poller: a thousand processes
	// cost a thousand goroutines, not a thousand threads.
	_ = unix.SetNonblock(pidfd, true)
	id, err := identify(pid, bootID) // it can't be gone: nobody else reaps it
	if err != nil {
		id = Identity{PID: pid, BootID: bootID}
	}
	p := &process{
		identity: id, child: true, pidfd: os.NewFile(uintptr(pidfd), "pidfd"), kin: newKin(group, s), limited: limited, ooms: before,
		startedAt: startedAt, logPath: s.LogPath, logStart: logStart, exited: make(chan struct{}),
	}
	go p.watch()
	return p, nil
}
