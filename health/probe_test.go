package health

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	grpchealth "google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// hangingServer makes the test binary a server that answers http and grpc probes until it is frozen.
const hangingServer = "SUTRA_TEST_HANGING_SERVER"

// patientProber makes the test binary run the command that it holds as a probe, and wait for it.
const patientProber = "SUTRA_TEST_PATIENT_PROBER"

func TestMain(m *testing.M) {
	if command := os.Getenv(patientProber); command != "" {
		fmt.Fprintln(os.Stderr, (&execProbe{command: command, run: Run{Env: os.Environ()}}).Check(context.Background()))
		os.Exit(1)
	}
	if os.Getenv(hangingServer) != "" {
		fmt.Fprintln(os.Stderr, serveBoth())
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// serveBoth serves http and grpc on two ports, which it prints on one line.
func serveBoth() error {
	web, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	rpc, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	srv := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, grpchealth.NewServer())
	go func() { _ = srv.Serve(rpc) }()
	fmt.Fprintln(os.Stdout, web.Addr(), rpc.Addr())
	return http.Serve(web, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
}

func newProbe(t *testing.T, kind, arg, addr string, env ...string) Probe {
	t.Helper()
	p, err := NewProbe(kind, arg, addr, Run{Dir: t.TempDir(), Env: env})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// check runs one check under a deadline that only a hanging check reaches.
func check(t *testing.T, p Probe) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), awaitLimit)
	defer cancel()
	err := p.Check(ctx)
	if err != nil && strings.Contains(err.Error(), "\n") {
		t.Errorf("error is more than one line: %v", err)
	}
	return err
}

func expectError(t *testing.T, err error, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("got error %v, want one that says %q", err, part)
		}
	}
}

// closedAddr is an address on which nothing listens.
func closedAddr(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestNewProbeRefuses(t *testing.T) {
	for _, tc := range []struct{ kind, arg, addr, says string }{
		{"udp", "", "localhost:1", "unknown"},
		{"", "", "localhost:1", "unknown"},
		{"tcp", "", "localhost", "host:port"},
		{"tcp", "", "localhost:", "host:port"},
		{"tcp", "x", "localhost:1", "no argument"},
		{"grpc", "x", "localhost:1", "no argument"},
		{"none", "x", "", "no argument"},
		{"http", "", "localhost:1", "slash"},
		{"http", "healthz", "localhost:1", "slash"},
		{"http", "/%zz", "localhost:1", "parse path"},
		{"http", "/", "", "host:port"},
		{"exec", " ", "", "no command"},
	} {
		_, err := NewProbe(tc.kind, tc.arg, tc.addr, Run{})
		expectError(t, err, tc.says)
	}
}

func TestNoneIsAlwaysReady(t *testing.T) {
	if err := check(t, newProbe(t, "none", "", "")); err != nil {
		t.Error(err)
	}
}

func TestTCPProbe(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := newProbe(t, "tcp", "", l.Addr().String())
	if err := check(t, p); err != nil {
		t.Error(err)
	}
	_ = l.Close()
	expectError(t, check(t, p), "tcp probe", "connection refused")
}

func TestHTTPProbe(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.URL.Query().Get("code"))
		if err != nil || r.URL.Path != "/ready" {
			t.Errorf("asked for %s", r.URL)
		}
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(code)
		fmt.Fprint(w, strings.Repeat("x", 1<<20)) // never read
	}))
	var open atomic.Int64
	srv.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateNew:
			open.Add(1)
		case http.StateClosed:
			open.Add(-1)
		}
	}
	srv.Start()
	defer srv.Close()
	addr := srv.Listener.Addr().String()
	for _, code := range []int{200, 204, 302, 399, 404, 500} {
		err := check(t, newProbe(t, "http", fmt.Sprintf("/ready?code=%d", code), addr))
		if code < 400 {
			if err != nil {
				t.Errorf("%d: %v", code, err)
			}
			continue
		}
		expectError(t, err, "http://"+addr+"/ready", strconv.Itoa(code))
	}
	await(t, "the end of all connections", func() bool { return open.Load() == 0 })
	expectError(t, check(t, newProbe(t, "http", "/", closedAddr(t))), "http probe", "connection refused")
}

func TestGRPCProbe(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	state := grpchealth.NewServer()
	srv := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(srv, state)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	p := newProbe(t, "grpc", "", l.Addr().String())
	if err := check(t, p); err != nil {
		t.Error(err)
	}
	state.SetServingStatus("", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	expectError(t, check(t, p), "grpc probe", "NOT_SERVING")
	srv.Stop()
	if err := <-served; err != nil {
		t.Error(err)
	}
	expectError(t, check(t, p), "grpc probe", "connection refused")

	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	expectError(t, check(t, newProbe(t, "grpc", "", web.Listener.Addr().String())), "grpc probe", "Unavailable")
}

func TestExecProbe(t *testing.T) {
	t.Setenv("LEAKED", "yes")
	for _, tc := range []struct {
		name, command string
		says          []string // empty: ready
	}{
		{"exit 0", "true", nil},
		{"environment is the given one alone", `test "$ASKED" = "for it" -a -z "$LEAKED"`, nil},
		{"exit code", "exit 3", []string{"exec probe", "exit status 3"}},
		{"signal", "kill -9 $$", []string{"killed"}},
		{"output", "echo out; echo err >&2; exit 1", []string{`"out\nerr"`}},
		{"last of much output", "yes | head -c 1000000; echo end; exit 1", []string{`y\ny\nend"`}},
		{"unknown command", "no-such-command", []string{"exit status 127", "not found"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := check(t, newProbe(t, "exec", tc.command, "", "ASKED=for it", "PATH="+os.Getenv("PATH")))
			if tc.says == nil && err != nil {
				t.Error(err)
			}
			expectError(t, err, tc.says...)
			if err != nil && len(err.Error()) > 2*maxExecOutput+100 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
		})
	}
}

// TestExecProbeLeavesNoProcess lets a command start a child and then end in
// each of the two ways, and awaits the end of the child too.
func TestExecProbeLeavesNoProcess(t *testing.T) {
	for name, after := range map[string]string{"exits": "exit 0", "is cut off": "wait"} {
		t.Run(name, func(t *testing.T) {
			pidFile := filepath.Join(t.TempDir(), "pid")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			p := newProbe(t, "exec", fmt.Sprintf("sleep 1000 & echo $! > %s.new; echo started; mv %s.new %s; %s", pidFile, pidFile, pidFile, after), "",
				"PATH="+os.Getenv("PATH"))
			checked := make(chan error, 1)
			go func() { checked <- p.Check(ctx) }()
			var child int
			await(t, "the child's pid", func() bool {
				text, err := os.ReadFile(pidFile)
				child, _ = strconv.Atoi(strings.TrimSpace(string(text)))
				return err == nil
			})
			if after == "exit 0" {
				if err := <-checked; err != nil {
					t.Error(err)
				}
			} else {
				cancel()
				err := <-checked
				expectError(t, err, "given up", `"started"`)
				if !errors.Is(err, context.Canceled) {
					t.Errorf("got %v, want the context's error", err)
				}
			}
			await(t, "the child's end", func() bool { return gone(child) })
		})
	}
}

// A command that hangs, and what it started, ends with who waits for it, however that ends.
func TestExecProbeEndsWithItsCaller(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	pidFile := filepath.Join(t.TempDir(), "pids")
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), patientProber+"="+fmt.Sprintf("sleep 1000 & echo $$ $! >%s.new; mv %s.new %s; sleep 1000; :", pidFile, pidFile, pidFile))
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var shell, child int
	await(t, "the command", func() bool {
		text, err := os.ReadFile(pidFile)
		if err != nil {
			return false
		}
		_, err = fmt.Sscan(string(text), &shell, &child)
		return err == nil
	})
	t.Cleanup(func() { _ = syscall.Kill(-shell, syscall.SIGKILL) }) // ESRCH: as it should be
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	await(t, "the end of all of it", func() bool { return errors.Is(syscall.Kill(-shell, 0), syscall.ESRCH) || gone(shell) && gone(child) })
}

// What outlives SIGKILL, as a process does that waits for a disk, holds up nobody, and no other is run beside it.
func TestExecProbeThatCannotBeKilled(t *testing.T) {
	for held, who := range []string{"the shell", "the command"} {
		t.Run(who, func(t *testing.T) {
			dir := t.TempDir()
			p, err := NewProbe("exec", "test ! -e pids || exit 0; sleep 1000 & echo $$ $! >new; mv new pids; wait", "", Run{Dir: dir, Env: []string{"PATH=" + os.Getenv("PATH")}})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			checked := make(chan error, 1)
			go func() { checked <- p.Check(ctx) }()
			var pids [2]int
			await(t, "the command", func() bool {
				text, err := os.ReadFile(filepath.Join(dir, "pids"))
				_, _ = fmt.Sscan(string(text), &pids[0], &pids[1])
				return err == nil
			})
			thaw := hold(t, pids[held])
			cancel()
			select {
			case err := <-checked:
				expectError(t, err, "given up", fmt.Sprintf("process %d of it outlives SIGKILL", pids[held]))
			case <-time.After(awaitLimit):
				t.Fatal("the check waits for what can't be killed")
			}
			expectError(t, check(t, p), fmt.Sprintf("process %d of an earlier one outlives SIGKILL", pids[held]))
			thaw()
			await(t, "the next check", func() bool { return p.Check(t.Context()) == nil })
			if !gone(pids[held]) {
				t.Error("another was run beside it")
			}
		})
	}
}

// hold keeps a process from dying until thaw is called or the test is over.
func hold(t *testing.T, pid int) (thaw func()) {
	t.Helper()
	dir := "/sys/fs/cgroup/freezer/held" + strings.ReplaceAll(t.TempDir(), "/", "-")
	if err := os.Mkdir(dir, 0o700); err != nil {
		if os.Getenv("SUTRA_TEST_NO_SKIP") != "" {
			t.Fatal(err)
		}
		t.Skipf("there is no v1 freezer, in which processes outlive SIGKILL: %v", err)
	}
	set := func(name, value string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0); err != nil {
			t.Error(err)
		}
	}
	thaw = func() { set("freezer.state", "THAWED") }
	t.Cleanup(func() {
		thaw()
		await(t, "the group's end", func() bool { return os.Remove(dir) == nil })
	})
	set("cgroup.procs", strconv.Itoa(pid))
	set("freezer.state", "FROZEN")
	await(t, "the process to stand still", func() bool {
		state, err := os.ReadFile(filepath.Join(dir, "freezer.state"))
		return err == nil && strings.TrimSpace(string(state)) == "FROZEN"
	})
	return thaw
}

// TestExecProbeDoesNotWaitForDaemons holds for a command that leaves its group
// with the probe's pipe open: only the output is cut off.
func TestExecProbeDoesNotWaitForDaemons(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	p := newProbe(t, "exec", fmt.Sprintf("setsid sh -c 'echo $$ > %s.new; mv %s.new %s; exec sleep 1000' & while ! test -e %s; do :; done", pidFile, pidFile, pidFile, pidFile),
		"", "PATH="+os.Getenv("PATH"))
	err := check(t, p)
	text, readErr := os.ReadFile(pidFile)
	if readErr != nil {
		t.Fatal(err, readErr)
	}
	daemon, _ := strconv.Atoi(strings.TrimSpace(string(text)))
	if killErr := syscall.Kill(daemon, syscall.SIGKILL); killErr != nil {
		t.Errorf("the daemon has not outlived the check: %v", killErr)
	}
	if err != nil {
		t.Error(err)
	}
}

func TestChecksOfAFrozenServerEndWithTheirContext(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), hangingServer+"=1")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	var web, rpc string
	if _, err := fmt.Fscan(out, &web, &rpc); err != nil {
		t.Fatal(err)
	}
	probes := map[string]Probe{
		"http": newProbe(t, "http", "/", web),
		"grpc": newProbe(t, "grpc", "", rpc),
	}
	for kind, p := range probes {
		if err := check(t, p); err != nil {
			t.Fatalf("%s before the freeze: %v", kind, err)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	await(t, "the freeze", func() bool { return frozen(t, cmd.Process.Pid) })
	for kind, p := range probes {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		err := p.Check(ctx)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: got %v, want the deadline", kind, err)
		}
		expectError(t, err, kind+" probe", "no answer in time")
	}
}

// gone says whether a process has ended; a zombie has.
func gone(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || strings.Contains(string(stat), ") Z ")
}

// frozen says whether every thread of a process has stopped: the signal only asks for it.
func frozen(t *testing.T, pid int) bool {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(threads) == 0 {
		t.Fatalf("no threads of %d: %v", pid, err)
	}
	for _, thread := range threads {
		if stat, err := os.ReadFile(thread); err == nil && !strings.Contains(string(stat), ") T ") {
			return false
		}
	}
	return true
}

// awaitLimit is long enough for a busy machine: only a failing test reaches it.
const awaitLimit = 30 * time.Second

func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(awaitLimit); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come within %s", what, awaitLimit)
		}
	}
}

func TestSocketDeadlineBeforeTheContextsOwnIsNamedTheSame(t *testing.T) {
	err := failed(t.Context(), "tcp probe", fmt.Errorf("dial: %w", context.DeadlineExceeded))
	expectError(t, err, "no answer in time")
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}
}

// The command sees the node's own folder, as the node does.
func TestExecRunsInItsFolder(t *testing.T) {
	dir := t.TempDir()
	p, err := NewProbe("exec", "test -e ready", "", Run{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Check(t.Context()); err == nil {
		t.Error("ready before its file is there")
	}
	if err := os.WriteFile(filepath.Join(dir, "ready"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.Check(t.Context()); err != nil {
		t.Errorf("not ready with its file there: %v", err)
	}
}

// The command is run as the user that it is to be run as, and gets no rights besides where it isn't to. This process keeps its own.
func TestExecRunsAsAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("SUTRA_TEST_NO_SKIP") != "" {
			t.Fatal("only root can run something as another user")
		}
		t.Skip("only root can run something as another user")
	}
	for _, forbidden := range []bool{false, true} {
		run := Run{Env: []string{"PATH=" + os.Getenv("PATH")}, Dir: "/", NoNewPrivileges: forbidden}
		run.Credential = &syscall.Credential{Uid: 65533, Gid: 65532, Groups: []uint32{65532}}
		const show = `echo "$(id -u) $(id -g) $(id -G) $(grep NoNewPrivs: /proc/self/status)"; exit 1`
		for range 10 {
			p, err := NewProbe("exec", show, "", run)
			if err != nil {
				t.Fatal(err)
			}
			expectError(t, check(t, p), fmt.Sprintf(`65533 65532 65532 NoNewPrivs:\t%d`, map[bool]int{true: 1}[forbidden]))
		}
		if hidden, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || hidden != 1 {
			t.Errorf("this process's memory is %d, %v; it was open before", hidden, err)
		}
	}
	p, err := NewProbe("exec", `echo "$(id -u) $(grep NoNewPrivs: /proc/self/status)"; exit 1`, "", Run{Env: []string{"PATH=" + os.Getenv("PATH")}})
	if err != nil {
		t.Fatal(err)
	}
	for range 10 {
		expectError(t, check(t, p), `0 NoNewPrivs:\t0`)
	}
}
