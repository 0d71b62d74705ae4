package supervisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// file is a journal that outlives its process, and the place where that dies: by SIGKILL, at the nth save.
type file struct {
	path  string
	saves int
	dieAt int
	// written: the nth record is on disk when it dies.
	written bool
}

func (f *file) Save(_ string, r Record) error {
	f.saves++
	if f.saves == f.dieAt && !f.written {
		die()
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if err := touch(f.path, string(data)); err != nil {
		return err
	}
	if f.saves == f.dieAt {
		die()
	}
	return nil
}

func die() {
	_ = unix.Kill(os.Getpid(), unix.SIGKILL) // it can't fail
	select {}
}

// plan is what a supervisor that is going to die does.
type plan struct {
	Dir     string   // the unit's
	Mode    string   // the unit's
	Args    []string // the unit's, behind the file that it has for its readiness
	Memory  uint64   // the unit's limit
	Groups  bool     // as the host has them
	V1      bool     // Groups without the unified hierarchy
	Within  string   // the control group beneath its own, in each hierarchy, that the supervisor moves to before it makes others
	DieAt   int
	Written bool
	// CrashFirst: the unit's first process is killed once it is ready.
	CrashFirst bool
	BackOff    Restart
	// Deaf: the supervisor was started with signals that are ignored or blocked.
	Deaf bool
	// Lazy: the host's first process doesn't reap orphans until the test is over.
	Lazy bool
}

// spec is the unit's, the same in both of its supervisors.
func (p plan) spec(c Cgroups) (Spec, error) {
	self, err := os.Executable()
	if err != nil {
		return Spec{}, err
	}
	ready := filepath.Join(p.Dir, "ready")
	return Spec{
		ID: "unit", Path: self, Args: append([]string{ready}, p.Args...), Dir: p.Dir, LogPath: filepath.Join(p.Dir, "log"),
		Env: []string{fixtureEnv + "=" + p.Mode, raceEnv, markOf(p.Dir)}, Mark: markOf(p.Dir), Cgroups: c,
		StopGrace: never, Restart: p.BackOff, Ready: fileAppears(ready),
		Limits: Limits{Memory: p.Memory},
	}, nil
}

func (p plan) journalPath() string { return filepath.Join(p.Dir, "journal") }

// supervise is the fixture that carries out a plan, until it dies.
func supervise(args []string) error {
	var p plan
	if err := json.Unmarshal([]byte(args[0]), &p); err != nil {
		return err
	}
	if p.Deaf {
		p.Deaf = false
		return deafen(p)
	}
	mounts, own, err := hide()
	if err != nil {
		return err
	}
	if p.Within != "" {
		for _, dir := range basesOf(p.Within) {
			if err := errors.Join(makeGroup(dir), write(filepath.Join(dir, "cgroup.procs"), "0")); err != nil {
				return err
			}
		}
		if own, err = os.ReadFile("/proc/self/cgroup"); err != nil {
			return err
		}
	}
	var c Cgroups
	switch {
	case p.V1:
		c, _ = openCgroups(mounts, own, groupsName(p.Dir))
	case p.Groups:
		c, _ = OpenCgroups(groupsName(p.Dir))
	}
	spec, err := p.spec(c)
	if err != nil {
		return err
	}
	crash := p.CrashFirst
	s, err := New(&file{path: p.journalPath(), dieAt: p.DieAt, written: p.Written}, func(e Event) {
		if e.Kind == ProcessReady && crash {
			crash = false
			_ = unix.Kill(e.State.PID, unix.SIGKILL) // the test finds out where it failed
		}
	})
	if err != nil {
		return err
	}
	if _, err := s.Start(spec); err != nil {
		return err
	}
	select {}
}

// deafen executes supervise anew, as somebody's script with traps or a program that waits for its signals in a thread would.
func deafen(p plan) error {
	args, err := json.Marshal(p)
	if err != nil {
		return err
	}
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGTSTP)
	runtime.LockOSThread()
	var mask unix.Sigset_t
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGUSR1} {
		mask.Val[0] |= 1 << (sig - 1)
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &mask, nil); err != nil {
		return err
	}
	return syscall.Exec("/proc/self/exe", []string{"fixture", string(args)}, os.Environ())
}

// basesOf are the folders of a group beneath this process's own, in each hierarchy of use.
func basesOf(name string) (dirs []string) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	own, err2 := os.ReadFile("/proc/self/cgroup")
	if errors.Join(err, err2) != nil {
		return nil
	}
	for _, controller := range []string{"", "memory", "cpu", "cpuacct", "freezer"} {
		if h := findHierarchy(mounts, own, controller); h.group != "" && !slices.Contains(dirs, filepath.Join(h.group, name)) {
			dirs = append(dirs, filepath.Join(h.group, name))
		}
	}
	return dirs
}

// keep is the fixture that stands for a host's first process: it starts a supervisor, tells in the file args[0] once
// that is gone, and reaps the orphans that come to it from when the file args[2] is there.
func keep(args []string) error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	cmd := again("supervise", args[1])
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil: // nobody is left to wait for
			return nil
		case pid == cmd.Process.Pid:
			if err := touch(args[0], strconv.Itoa(int(status.Signal()))); err != nil {
				return err
			}
			if err := awaitFile(args[2]); err != nil {
				return err
			}
		}
	}
}

// carryOut has a supervisor follow a plan to its death. The record that it left is nil where there is none. over is
// to be called when none of the processes that it left should be there.
func carryOut(t *testing.T, p plan) (r *Record, over func()) {
	t.Helper()
	args, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	died := filepath.Join(p.Dir, "died")
	reap := filepath.Join(p.Dir, "reap")
	if !p.Lazy {
		if err := touch(reap, ""); err != nil {
			t.Fatal(err)
		}
	}
	keeper := again("keep", died, string(args), reap)
	keeper.Stderr = os.Stderr
	if err := keeper.Start(); err != nil {
		t.Fatal(err)
	}
	over = sync.OnceFunc(func() { // the keeper ends by itself once all that it keeps is gone
		for _, pid := range newKin(group{}, &Spec{Mark: markOf(p.Dir)}).find() {
			t.Errorf("process %d is left", pid)
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		if err := errors.Join(touch(reap, ""), keeper.Wait()); err != nil {
			t.Errorf("the keeper: %v", err)
		}
	})
	t.Cleanup(over)
	await(t, "the supervisor's death", func() bool { return exists(died) })
	if signal, err := os.ReadFile(died); err != nil || string(signal) != strconv.Itoa(int(unix.SIGKILL)) {
		t.Fatalf("the supervisor ended by signal %q (%v)", signal, err)
	}
	data, err := os.ReadFile(p.journalPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, over
	}
	if err != nil {
		t.Fatal(err)
	}
	r = &Record{}
	if err := json.Unmarshal(data, r); err != nil {
		t.Fatal(fmt.Errorf("read the journal: %w", err))
	}
	return r, over
}
