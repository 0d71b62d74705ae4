package supervisor

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestProcessStartsClean(t *testing.T) {
	t.Setenv("SUTRA_TEST_SECRET", "of the supervisor")
	spec := commandSpec(t, "sleep", "3600")
	spec.Env = []string{"A=1", "B=2"}
	w := watch(t, spec)
	pid := w.next().State.PID
	// A fork has returned a moment before the kernel shows what the program was given.
	await(t, "the program's arguments", func() bool { return procFile(t, pid, "cmdline") != "" && procFile(t, pid, "environ") != "" })

	// Between the fork's end and the program's start the kernel has neither to show.
	await(t, "the process to have a command line and an environment", func() bool {
		return procFile(t, pid, "cmdline") != "" && procFile(t, pid, "environ") != ""
	})
	if got, want := procFile(t, pid, "cmdline"), "sleep\x003600\x00"; got != want {
		t.Errorf("command line %q, want %q", got, want)
	}
	if got, want := procFile(t, pid, "environ"), "A=1\x00B=2\x00"; got != want {
		t.Errorf("environment %q, want %q", got, want)
	}
	if session, err := unix.Getsid(pid); err != nil || session != pid {
		t.Errorf("session %d (%v), want %d, its own", session, err, pid)
	}
	dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
	if err != nil || dir != spec.Dir {
		t.Errorf("directory %q (%v), want %q", dir, err, spec.Dir)
	}
	files := map[string]string{}
	for _, fd := range []string{"0", "1", "2"} {
		if files[fd], err = os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd)); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(map[string]string{"0": os.DevNull, "1": spec.LogPath, "2": spec.LogPath}, files); diff != "" {
		t.Errorf("open files (-want +got):\n%s", diff)
	}
	_, flags, _ := strings.Cut(procFile(t, pid, "fdinfo/1"), "flags:")
	mode, err := strconv.ParseInt(strings.Fields(flags)[0], 8, 64)
	if err != nil || mode&unix.O_APPEND == 0 {
		t.Errorf("stdout has flags %o (%v), want O_APPEND among them", mode, err)
	}
	if info, err := os.Stat(spec.LogPath); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the log has mode %v (%v), want 0600", info.Mode(), err)
	}
}

func TestOutputOfALogThatWasCutIsNone(t *testing.T) {
	spec := commandSpec(t, "sh", "-c", ": >log; exit 1")
	if err := os.WriteFile(spec.LogPath, []byte("earlier\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := watch(t, spec)
	if exit := w.until(ProcessExited).State.LastExit; exit.Output != "" || exit.Code != 1 {
		t.Errorf("exit %+v", exit)
	}
}

func TestStartErrors(t *testing.T) {
	for name, test := range map[string]struct {
		spoil func(*Spec)
		is    error
		says  string
	}{
		"missing binary":     {func(s *Spec) { s.Path = "/missing/server" }, fs.ErrNotExist, "start /missing/server: "},
		"not executable":     {func(s *Spec) { s.Path = s.LogPath }, fs.ErrPermission, "/log: permission denied"},
		"missing directory":  {func(s *Spec) { s.Dir = "/missing/dir" }, fs.ErrNotExist, "open /missing: "},
		"missing log folder": {func(s *Spec) { s.LogPath = "/missing/log" }, fs.ErrNotExist, "open log: open /missing/log: "},
		"log is a directory": {func(s *Spec) { s.LogPath = s.Dir }, unix.EISDIR, "open log: "},
		"NUL in an argument": {func(s *Spec) { s.Args = []string{"a\x00b"} }, unix.EINVAL, "invalid argument"},
		"relative path":      {func(s *Spec) { s.Path = "sleep" }, nil, `spec of unit: Path "sleep" isn't absolute`},
		"relative directory": {func(s *Spec) { s.Dir = "." }, nil, `Dir "." isn't absolute`},
		"relative log":       {func(s *Spec) { s.LogPath = "" }, nil, `LogPath "" isn't absolute`},
		"no id":              {func(s *Spec) { s.ID = "" }, nil, "isn't a plain name"},
		"negative grace":     {func(s *Spec) { s.StopGrace = -time.Second }, nil, "StopGrace -1s is negative"},
		"no first pause":     {func(s *Spec) { s.Restart.First = 0 }, nil, "restart: "},
		"max below first":    {func(s *Spec) { s.Restart.Max = s.Restart.First - 1 }, nil, "restart: "},
		"no threshold":       {func(s *Spec) { s.Restart.Threshold = 0 }, nil, "restart: "},
		"no quiet":           {func(s *Spec) { s.Restart.Window = 0 }, nil, "restart: "},
	} {
		t.Run(name, func(t *testing.T) {
			spec := commandSpec(t, "sleep", "3600")
			test.spoil(&spec)
			before := descriptors(t)
			s := newSupervisor(t, &memory{}, func(e Event) { t.Errorf("told of %v", e.Kind) })
			u, err := s.Start(spec)
			if u != nil || err == nil || !strings.Contains(err.Error(), test.says) {
				t.Fatalf("unit %v, error %v; want an error that says %q", u, err, test.says)
			}
			if test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("error %v isn't %v", err, test.is)
			}
			noChildren(t)
			if after := descriptors(t); after != before {
				t.Errorf("%d descriptors, %d before", after, before)
			}
		})
	}
}

func TestDescriptorsAreGivenBack(t *testing.T) {
	cycle := func() {
		w := watch(t, commandSpec(t, "sleep", "3600"))
		w.until(ProcessReady)
		w.kill()
		w.until(ProcessStarted)
		w.Stop()
		w.end()
	}
	cycle() // the runtime's poller takes its own with the first
	before := descriptors(t)
	for range 20 {
		cycle()
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

// Many processes cost goroutines, not threads.
func TestManyUnits(t *testing.T) {
	const count = 200
	units := make([]*watched, count)
	for i := range units {
		units[i] = watch(t, commandSpec(t, "sleep", "3600"))
	}
	for _, w := range units {
		w.until(ProcessReady)
	}
	for _, w := range units {
		w.Stop()
	}
	for _, w := range units {
		w.end()
	}
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	if len(threads) >= count { // one each; reading /proc at once takes some for a while
		t.Errorf("%d units took %d threads", count, len(threads))
	}
}

// Where the poller refuses the descriptor, as it refuses one that blocks, the exit is waited for in a thread.
func TestExitIsSeenWithoutThePoller(t *testing.T) {
	spec := commandSpec(t, "sh", "-c", "echo >ready; exec sleep 3600")
	p, err := start(&spec, "")
	if err != nil {
		t.Fatal(err)
	}
	blocking, err := unix.PidfdOpen(p.identity.PID, 0)
	if err != nil {
		t.Fatal(err)
	}
	unpollable := os.NewFile(uintptr(blocking), "pidfd")
	defer unpollable.Close()
	second := &process{identity: p.identity, pidfd: unpollable, exited: make(chan struct{})}
	wasZombie := make(chan bool, 1)
	go func() {
		second.watch()
		wasZombie <- p.ended()
	}()
	await(t, "the process", func() bool { return exists(spec.Dir + "/ready") })
	if err := p.signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitClosed(t, "the exit", p.exited)
	awaitClosed(t, "the exit", second.exited)
	if !<-wasZombie {
		t.Error("the exit was told of before it was one")
	}
	p.reap(func() bool { return killed(p) })
}

// killed is for what a process left behind, where nobody supervises it.
func killed(left remains) bool {
	for ; left.left(); time.Sleep(time.Millisecond) {
		left.kill()
	}
	return true
}

// Nor does a supervisor that lets go of such a process wait for its end.
func TestLetGoWithoutThePoller(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	p, err := start(&spec, "")
	if err != nil {
		t.Fatal(err)
	}
	blocking, err := unix.PidfdOpen(p.identity.PID, 0)
	if err != nil {
		t.Fatal(err)
	}
	second := &process{identity: p.identity, pidfd: os.NewFile(uintptr(blocking), "pidfd"), exited: make(chan struct{})}
	children.add(p.identity.PID)
	go second.watch()
	free := make(chan struct{})
	go func() {
		defer close(free)
		second.letGo()
	}()
	awaitClosed(t, "the process to be let go", free)
	if err := p.signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitClosed(t, "the exit", p.exited)
	awaitClosed(t, "the end of the watch", second.exited)
	p.reap(func() bool { return killed(p) })
}

// A pid, and with it a group's number, can come to somebody else once its process is reaped.
func TestStrangersAreNotSignalled(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	p, err := start(&spec, "")
	if err != nil {
		t.Fatal(err)
	}
	defer p.pidfd.Close()
	flagErr := unix.PidfdSendSignal(int(p.pidfd.Fd()), 0, nil, unix.PIDFD_SIGNAL_PROCESS_GROUP)
	if err := p.signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	awaitClosed(t, "the exit", p.exited)
	if _, err := unix.Wait4(p.identity.PID, nil, 0, nil); err != nil {
		t.Fatal(err)
	}
	children.forget(p.identity.PID)
	if flagErr != nil {
		skip(t, "the kernel can't signal a group by descriptor: %v", flagErr)
	}

	stageStranger(t, p.identity.PID)
	if err := p.signal(unix.SIGKILL); !errors.Is(err, unix.ESRCH) {
		t.Errorf("signal: %v, want %v", err, unix.ESRCH)
	}
	if p.left() {
		t.Error("a stranger was taken for a member")
	}
	strangerLives(t, p.identity.PID)
	if err := p.kin.group.remove(); err != nil {
		t.Error(err)
	}
}

// What the kernel hides of another user's process isn't taken for a good exit.
func TestExitThatIsNotToBeSeenIsUnknown(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		code, uid     int
		before, after string
	}{
		"a stranger's": {0, 65533, "0 false", "0 true"},
		"a bad one":    {7, 65533, "0 false", "1792 true"},
		"one's own":    {0, os.Getuid(), "0 true", "0 true"},
	} {
		t.Run(name, func(t *testing.T) {
			if os.Getuid() != 0 && os.Getuid() != test.uid {
				skip(t, "only root has another user's process")
			}
			pid, err := syscall.ForkExec("/bin/sh", []string{"sh", "-c", fmt.Sprintf("exit %d", test.code)}, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: true}})
			if err != nil {
				t.Fatal(err)
			}
			await(t, "the exit", func() bool { return gone(pid) })
			witness := exec.Command(self, strconv.Itoa(pid), strconv.Itoa(test.uid))
			witness.Env = []string{fixtureEnv + "=witness", raceEnv}
			witness.Stderr = os.Stderr
			out, err := witness.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := witness.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewScanner(out)
			if lines.Scan(); lines.Text() != test.before {
				t.Errorf("of the zombie is said %q, want %q", lines.Text(), test.before)
			}
			if _, err := unix.Wait4(pid, nil, 0, nil); err != nil {
				t.Error(err)
			}
			if lines.Scan(); lines.Text() != test.after {
				t.Errorf("after it was reaped is said %q, want %q", lines.Text(), test.after)
			}
			if err := witness.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}

// stageStranger starts a process, which leads a session and group, with a pid that somebody else had. It ends with the test,
// or when end is called.
func stageStranger(t *testing.T, pid int) (end func()) {
	t.Helper()
	const lastPID = "/proc/sys/kernel/ns_last_pid"
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	var forked []int
	end = sync.OnceFunc(func() { // also those that missed the pid
		for _, pid := range forked {
			_ = unix.Kill(pid, unix.SIGKILL)
			_, _ = unix.Wait4(pid, nil, 0, nil)
		}
	})
	t.Cleanup(end)
	for stranger := 0; stranger != pid; {
		if err := os.WriteFile(lastPID, []byte(strconv.Itoa(pid-1)), 0); err != nil {
			skip(t, "the next pid can't be chosen here, that takes root: %v", err)
		}
		stranger, err = syscall.ForkExec(sleep, []string{"sleep", "3600"}, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: true}})
		if err != nil {
			t.Fatal(err)
		}
		forked = append(forked, stranger)
	}
	return end
}

func strangerLives(t *testing.T, pid int) {
	t.Helper()
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err != nil || info.Signo != 0 {
		t.Errorf("the stranger has ended (%v)", err)
	}
}

// skip is for what this machine can't do. Where SUTRA_TEST_NO_SKIP is set, that is a failure.
func skip(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("SUTRA_TEST_NO_SKIP") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}
