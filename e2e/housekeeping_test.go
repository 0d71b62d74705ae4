package e2e_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// notices is a socket of the kind that systemd gives to a service, and what is said to it.
type notices struct {
	path string
	conn *net.UnixConn
}

func listenForNotices(t *testing.T, dir string) notices {
	t.Helper()
	path := filepath.Join(dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() }) // nothing was written
	return notices{path, conn}
}

// next waits for what is said next.
func (n notices) next(t *testing.T) string {
	t.Helper()
	if err := n.conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 4096)
	count, err := n.conn.Read(buf)
	if err != nil {
		t.Fatalf("nothing was said: %v", err)
	}
	return string(buf[:count])
}

// silent tells whether nothing more was said; who could say it has ended.
func (n notices) silent(t *testing.T) bool {
	t.Helper()
	raw, err := n.conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	count, asked := 0, error(nil)
	if err := errors.Join(raw.Control(func(fd uintptr) { count, asked = unix.IoctlGetInt(int(fd), unix.TIOCINQ) }), asked); err != nil {
		t.Fatal(err)
	}
	return count == 0
}

// The agent says that it is ready once it has taken its nodes up and can be called, and that it stops.
func TestServiceManagerIsTold(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("agent-001", manyProfiles)
	nodes := spawnMany(t, g, 5, &sutrav1.SpawnNodeRequest{Profile: "sleep"})
	agent.Kill()
	told := listenForNotices(t, g.Dir)
	g.Env = append(g.Env, "NOTIFY_SOCKET="+told.path)

	agent = g.LaunchAgent("second", filepath.Join(g.Dir, "agent-001.toml"))
	if said := told.next(t); said != "READY=1" {
		t.Fatalf("the agent said %q", said)
	}
	log := string(agent.Log())
	if n := strings.Count(log, "node taken up"); n != len(nodes) || !strings.Contains(log, "agent listening") {
		t.Errorf("it said that it is ready when %d of %d nodes were taken up:\n%s", n, len(nodes), log)
	}
	for _, n := range nodes {
		if env := strings.Join(environment(t, int(n.GetPid())), " "); strings.Contains(env, "NOTIFY_SOCKET") {
			t.Errorf("a node could speak for its agent: %s", env)
		}
	}
	agent.Signal(unix.SIGTERM)
	if said := told.next(t); said != "STOPPING=1" {
		t.Errorf("the agent said %q", said)
	}
	if code := agent.Wait(); code != 0 {
		t.Errorf("the agent ended with %d", code)
	}
	if !told.silent(t) {
		t.Errorf("and then it said %q", told.next(t))
	}

	// Nobody listens: that is said, and no reason to fail.
	g.Env[len(g.Env)-1] = "NOTIFY_SOCKET=" + told.path + "-nobody"
	third := restarted(t, g, "agent-001", "third")
	if err := logSays(third, "the service manager wasn't told"); err != nil {
		t.Error(err)
	}
	takenUp(t, g, nodes)
}

func environment(t *testing.T, pid int) []string {
	t.Helper()
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSuffix(string(env), "\x00"), "\x00")
}

// Whatever a shell leaves open or exports for the agent, a node gets nothing of it; the first one and one that is
// started again.
func TestNodesInheritNothing(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	leaked := filepath.Join(g.Dir, "leaked")
	g.Env = append(g.Env, "LD_PRELOAD_OF_SOMEBODY=1", "SUTRA_NODE_ID=poison", "SUTRA_MARK=poison", "LANG=poison", "TMPDIR="+g.Dir, "BASH_ENV=/poison")
	sutra := g.Binary
	// The shell gives what it opened to what it becomes.
	g.Binary = filepath.Join(g.Dir, "leaky")
	script := fmt.Sprintf("#!/bin/sh\nexec 3>%s 7<&3 9</dev/null\nexec %s \"$@\"\n", leaked, sutra)
	if err := os.WriteFile(g.Binary, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	agent := g.StartAgent("agent-001", manyProfiles)
	g.Binary = sutra
	if path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/3", agent.PID())); err != nil || path != leaked {
		t.Fatalf("the agent inherited %q, %v", path, err)
	}
	for _, profile := range []string{"sleep", "default"} {
		n := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: profile, MemoryLimitMb: 64})
		inheritsNothing(t, g, n)
		killNode(t, g, n)
		inheritsNothing(t, g, g.AwaitNode(n.GetNodeId(), "to be restarted", func(is *sutrav1.Node) bool { return is.GetPhase() == running && is.GetPid() != n.GetPid() }))
	}
}

// inheritsNothing checks that a node has the documented environment, and no descriptor but the streams and what it opened
// itself.
func inheritsNothing(t *testing.T, g *harness.Grid, n *sutrav1.Node) {
	t.Helper()
	pid := int(n.GetPid())
	want := map[string]string{
		"HOME": n.GetStoragePath(), "LANG": "C.UTF-8", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"SUTRA_AGENT_ID": "agent-001", "SUTRA_NODE_ID": n.GetNodeId(), "SUTRA_PROFILE": n.GetProfile(), "SUTRA_PORT": fmt.Sprint(n.GetPort()),
		"SUTRA_STORAGE_PATH": n.GetStoragePath(), "SUTRA_MEMORY_MB": fmt.Sprint(n.GetMemoryLimitMb()), "SUTRA_MARK": "",
	}
	for _, entry := range environment(t, pid) {
		name, value, _ := strings.Cut(entry, "=")
		switch expected, documented := want[name]; {
		case !documented:
			t.Errorf("node of %s has %s in its environment", n.GetProfile(), entry)
		case value == "poison", expected != "" && value != expected:
			t.Errorf("node of %s has %s in its environment, and not %q", n.GetProfile(), entry, expected)
		}
		delete(want, name)
	}
	if len(want) > 0 {
		t.Errorf("node of %s misses %v", n.GetProfile(), want)
	}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	descriptors, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	open := map[string]string{}
	for _, fd := range descriptors {
		path, err := os.Readlink(filepath.Join(dir, fd.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		open[fd.Name()] = path
		own := slices.ContainsFunc([]string{n.GetStoragePath() + "/", "socket:", "anon_inode:", "/sys/fs/cgroup/"}, // the last are Go's
			func(prefix string) bool { return strings.HasPrefix(path, prefix) })
		if fd.Name() > "2" && (n.GetProfile() == "sleep" || !own) {
			t.Errorf("node of %s has descriptor %s of %s", n.GetProfile(), fd.Name(), path)
		}
	}
	log := filepath.Join(g.Home, "agents", "agent-001", "logs", n.GetNodeId()+".log")
	if streams := []string{open["0"], open["1"], open["2"]}; !slices.Equal(streams, []string{"/dev/null", log, log}) {
		t.Errorf("the streams of the node of %s are %q", n.GetProfile(), streams)
	}
}

// The unit that the agent prints runs this binary with this file and this home.
func TestPrintUnit(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.Endpoint = "127.0.0.1:1" // nobody is asked
	file := g.AgentFile("agent-001", "")
	unit := g.MustRun("agent", "--print-unit", "--config", filepath.Base(file))
	command := fmt.Sprintf("\nExecStart=%q agent --config %q --home %q\n", g.Binary, file, g.Home)
	if !strings.Contains(unit, command) {
		t.Errorf("the unit is\n%s\nwithout%s", unit, command)
	}
	if strings.Contains(unit, "--stop-nodes") || strings.Contains(unit, "TimeoutStopSec") {
		t.Errorf("nodes don't outlive the agent of the unit\n%s", unit)
	}
	taking := g.MustRun("agent", "--print-unit", "--stop-nodes", "--config", g.AgentFile("agent-002", "stop_grace_secs = 100"))
	if !strings.Contains(taking, "--stop-nodes\n") || !strings.Contains(taking, "\nTimeoutStopSec=130\n") {
		t.Errorf("with --stop-nodes the unit is\n%s", taking)
	}
	if elsewhere := g.MustRun("agent", "--print-unit", "--config", file, "--home", "/elsewhere"); !strings.Contains(elsewhere, `--home "/elsewhere"`) {
		t.Errorf("with another home the unit is\n%s", elsewhere)
	}
	if _, err := os.Stat(g.Home); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("printing made the home: %v", err)
	}
	refused(t, g, 2, "USAGE", []string{"--config FILE"}, "agent", "--print-unit")
	refused(t, g, 2, "USAGE", []string{"missing.toml"}, "agent", "--print-unit", "--config", "missing.toml")
}
