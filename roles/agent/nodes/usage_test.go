package nodes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/supervisor"
)

// What nodes use is measured while the manager runs, told of once, and changes no node.
func TestUsageIsMeasured(t *testing.T) {
	onEachHost(t, func(t *testing.T, cgroups func(*Config)) {
		m := newManager(t, cgroups, func(c *Config) { c.CheckEvery = 20 * time.Millisecond })
		ctx, cancel := context.WithCancel(t.Context())
		over := make(chan error, 1)
		go func() { over <- m.Run(ctx) }()
		n := mustSpawn(t, m, want("node-1"))
		if err := os.WriteFile(filepath.Join(n.GetStoragePath(), "data"), make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		_, _, revision := m.Changes(0)
		await(t, "usage", func() error {
			is, _ := m.Get("node-1")
			if u := is.GetUsage(); u.GetMemoryBytes() < 1<<16 || u.GetOpenFiles() < 3 || u.GetDiskBytes() < 1<<20 || u.GetDiskBytes() > 2<<20 || u.GetCpuCores() > 1 {
				return fmt.Errorf("it is %v", u)
			}
			return nil
		})
		if changed, _, now := m.Changes(revision); len(changed) > 0 || now != revision {
			t.Errorf("usage is taken for a change: %v", changed)
		}
		was, round := m.Usage(0)
		await(t, "it to be measured again", func() error {
			is, now := m.Usage(round)
			if len(was) != 1 || len(is) != 1 || is[0].GetNodeId() != "node-1" || now <= round {
				return fmt.Errorf("in round %d it was %v, and now, %d, it is %v", round, was, now, is)
			}
			return nil
		})
		cancel()
		if err := <-over; err != nil {
			t.Fatal(err)
		}
		_, round = m.Usage(0)
		if again, now := m.Usage(round); len(again) > 0 || now != round {
			t.Errorf("told again of %v", again)
		}
		if err := syscall.Kill(int(n.GetPid()), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if is := awaitPhaseAfter(t, m, n); is.GetUsage() != nil {
			t.Errorf("another process's usage is shown: %v", is.GetUsage())
		}
		m.measure()
		if is, _ := m.Get("node-1"); is.GetUsage() == nil {
			t.Error("the new process isn't measured")
		}
	})
}

func TestCoresAreASharePerTime(t *testing.T) {
	now := time.Now()
	of := func(pid int, cpu time.Duration) supervisor.Usage { return supervisor.Usage{PID: pid, CPUTime: cpu} }
	first := usage{}.next(of(1, time.Second), now, now.Add(-4*time.Second))
	second := first.next(of(1, 4*time.Second), now.Add(2*time.Second), now)
	other := second.next(of(2, time.Second), now.Add(4*time.Second), now.Add(3*time.Second))
	less := other.next(of(2, 0), now.Add(5*time.Second), now.Add(3*time.Second))
	still := less.next(of(2, time.Second), now.Add(5*time.Second), now)
	if got := fmt.Sprint(first.cores, second.cores, other.cores, less.cores, still.cores); got != "0.25 1.5 1 0 0" {
		t.Errorf("shares are %s", got)
	}
}

// The count is du's.
func TestDiskUse(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, size int) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 300 {
		write(fmt.Sprintf("many/%d", i), i*10)
	}
	write("a/b/c/deep", 1<<20)
	err := errors.Join(
		os.Link(filepath.Join(dir, "a", "b", "c", "deep"), filepath.Join(dir, "again")),
		os.Symlink("/", filepath.Join(dir, "root")),
		os.Truncate(filepath.Join(dir, "many", "0"), 1<<30), // a hole
	)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("du", "-s", "-B1", dir).Output()
	if err != nil {
		t.Fatal(err)
	}
	want, _, _ := strings.Cut(string(out), "\t")
	if got, ok := diskUse(t.Context(), dir, &pace{}); !ok || strconv.FormatUint(got, 10) != want {
		t.Errorf("counted %d, and du %s", got, want)
	}
	if got, ok := diskUse(t.Context(), filepath.Join(dir, "missing"), &pace{}); got != 0 || !ok {
		t.Errorf("what isn't there takes %d", got)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, ok := diskUse(ended, dir, &pace{}); ok {
		t.Error("it isn't broken off")
	}
}

// What a node's user puts in a folder's place, after it was looked at, neither leads elsewhere nor holds up anybody.
func TestDiskUseOpensFoldersOnly(t *testing.T) {
	dir := t.TempDir()
	folder, link, fifo := filepath.Join(dir, "folder"), filepath.Join(dir, "link"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.Mkdir(folder, 0o700), os.Symlink(folder, link), unix.Mkfifo(fifo, 0o600)); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{folder: nil, link: unix.ENOTDIR, fifo: unix.ENOTDIR} {
		opened := make(chan error, 1)
		go func() {
			f, err := openFolder(path)
			if err == nil {
				err = f.Close()
			}
			opened <- err
		}()
		select {
		case err := <-opened:
			if !errors.Is(err, want) {
				t.Errorf("opening the %s: %v, want %v", filepath.Base(path), err, want)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("opening the %s waits", filepath.Base(path))
		}
	}
}

func TestPaceRestsAHundredTimes(t *testing.T) {
	var p pace
	began := time.Now()
	p.rest(t.Context(), 400*time.Microsecond)
	p.rest(t.Context(), 500*time.Microsecond)
	if p.busy != 900*time.Microsecond {
		t.Errorf("after less than a moment, %v are remembered", p.busy)
	}
	p.rest(t.Context(), 100*time.Microsecond)
	if passed := time.Since(began); passed < 100*time.Millisecond || p.busy != 0 {
		t.Errorf("rested for %v, and remembers %v", passed, p.busy)
	}
}

// A limit that can't be set is the profile's fault, and said so.
func TestOpenFiles(t *testing.T) {
	m := newManager(t, func(c *Config) {
		for name, files := range map[string]int{"few": 77, "too-many": 1 << 30} {
			p := c.Profiles["default"]
			p.Name, p.OpenFiles = name, files
			c.Profiles[name] = p
		}
	})
	n := mustSpawn(t, m, want("node-1", as("few")))
	var limit unix.Rlimit
	if err := unix.Prlimit(int(n.GetPid()), unix.RLIMIT_NOFILE, nil, &limit); err != nil || limit.Cur != 77 || limit.Max != 77 {
		t.Errorf("the limit is %+v (%v)", limit, err)
	}
	_, err := m.Spawn(t.Context(), want("node-2", as("too-many")))
	expectReason(t, err, rpc.BinaryUnusable)
	if e := rpc.AsError(err); !strings.Contains(e.Message, "1073741824 open files") || !strings.Contains(e.Hint, "open_files of profile too-many") {
		t.Errorf("error %q, hint %q", e.Message, e.Hint)
	}
}

// Where groups can be made the limit is enforced, and is so for whoever takes the node up.
func TestMemoryLimitIsEnforced(t *testing.T) {
	onEachHost(t, func(t *testing.T, cgroups func(*Config)) {
		m := newManager(t, cgroups)
		enforced := sutrav1.Enforcement_ENFORCEMENT_ENFORCED
		if m.cfg.Cgroups == (supervisor.Cgroups{}) {
			enforced = sutrav1.Enforcement_ENFORCEMENT_UNENFORCED
		}
		if n := mustSpawn(t, m, want("node-1")); n.GetMemoryLimit() != enforced {
			t.Errorf("spawned: %v", n)
		}
		m = reopen(t, m)
		if n, _ := m.Get("node-1"); n.GetMemoryLimit() != enforced {
			t.Errorf("taken up: %v", n)
		}
	})
}

// ordinaryEnv makes a test run as the child of itself that has no privilege.
const ordinaryEnv = "SUTRA_TEST_ORDINARY"

// An ordinary user's agent says what it can't do, and its nodes run without.
func TestOrdinaryUser(t *testing.T) {
	if os.Getenv(ordinaryEnv) == "" && os.Getuid() == 0 {
		self, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		dir, err := os.MkdirTemp("", "sutra-ordinary-") // the test's own folder is root's alone
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.RemoveAll(dir); err != nil {
				t.Error(err)
			}
		})
		const nobody = 65534
		binary := filepath.Join(dir, "test")
		if err := errors.Join(os.WriteFile(binary, self, 0o755), os.Chmod(binary, 0o755), os.Chmod(dir, 0o777)); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), binary, "-test.run=^TestOrdinaryUser$", "-test.v")
		cmd.Dir, cmd.Env = dir, []string{"TMPDIR=" + dir, "PATH=" + os.Getenv("PATH"), ordinaryEnv + "=1"}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := cmd.CombinedOutput()
		if err != nil || !bytes.Contains(out, []byte("--- PASS: TestOrdinaryUser")) {
			t.Errorf("as nobody: %v\n%s", err, out)
		}
		return
	}
	groups, lacking := supervisor.OpenCgroups("sutra-test-ordinary")
	if groups != (supervisor.Cgroups{}) {
		t.Cleanup(func() { _ = groups.Remove() })
		t.Skip("this user may make control groups")
	}
	all := strings.Join(lacking, "\n")
	for _, part := range []string{"processes that leave their session may escape a stop: ", "memory limits and cpu weights aren't enforced: ", "permission denied", "Delegate=yes"} {
		if !strings.Contains(all, part) {
			t.Errorf("it is said:\n%s\nwant %q in it", all, part)
		}
	}
	m := newManager(t, func(c *Config) { c.Cgroups = groups })
	n := mustSpawn(t, m, want("node-1"))
	if n.GetMemoryLimit() != sutrav1.Enforcement_ENFORCEMENT_UNENFORCED || n.GetMemoryLimitMb() != 16 {
		t.Errorf("spawned: %v", n)
	}
	m.measure()
	if is, _ := m.Get("node-1"); is.GetUsage().GetMemoryBytes() == 0 || is.GetUsage().GetOpenFiles() == 0 {
		t.Errorf("measured: %v", is.GetUsage())
	}
}
