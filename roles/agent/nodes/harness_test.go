package nodes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rs/xid"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

const agentID = "agent-001"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newManager makes a manager of a home of its own with cheap profiles, and closes it at the test's end.
func newManager(t testing.TB, edit ...func(*Config)) *Manager {
	t.Helper()
	profile := func(name, ready string, command ...string) config.Profile {
		kind, arg, _ := strings.Cut(ready, ":")
		return config.Profile{
			Name: name, StorageBinary: command[0], Args: command[1:], Ready: config.Ready{Kind: kind, Arg: arg},
			StopSignal: "TERM", StopGrace: 10 * time.Second,
		}
	}
	cfg := Config{
		Agent: &sutrav1.Agent{AgentId: agentID, InstanceId: xid.New().String(), MaxNodes: 200, MemoryTotalMb: 1 << 20, DefaultMemoryMb: 16},
		Host:  "192.0.2.1", Home: t.TempDir(), Dir: t.TempDir(), BasePort: freePort(t), CheckEvery: time.Hour, Builtin: "/bin/false", Log: zerolog.Nop(),
		Profiles: map[string]config.Profile{
			"default": profile("default", "none", "/bin/sleep", "100000"),
			// ready once there is a file "ready" in its place
			"slow":    profile("slow", "exec:test -e $HOME/ready", "/bin/sleep", "100000"),
			"dying":   profile("dying", "exec:test -e $HOME/ready", "/bin/sh", "-c", "echo last words; touch leftover; exit 3"),
			"deaf":    profile("deaf", "none", "/bin/sh", "-c", "trap '' TERM; touch deaf; while :; do sleep .1; done"),
			"missing": profile("missing", "none", "/nowhere/to/be/found"),
		},
	}
	for _, e := range edit {
		e(&cfg)
	}
	return open(t, cfg)
}

// open makes a manager and stops its nodes at the test's end.
func open(t testing.TB, cfg Config) *Manager {
	t.Helper()
	m, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		shut(t, m)
		for pid, id := range processes(t, m) {
			t.Errorf("process %d of node %s was left behind", pid, id)
		}
	})
	return m
}

// shut closes a manager with its nodes.
func shut(t testing.TB, m *Manager) {
	t.Helper()
	if err := m.Close(true); err != nil {
		t.Errorf("close: %v", err)
	}
}

func want(id string, edit ...func(*sutrav1.Node)) *sutrav1.Node {
	n := &sutrav1.Node{NodeId: id, AgentId: agentID, Profile: "default", Generation: 1}
	for _, e := range edit {
		e(n)
	}
	return n
}

func as(profile string) func(*sutrav1.Node) { return func(n *sutrav1.Node) { n.Profile = profile } }
func on(port int) func(*sutrav1.Node)       { return func(n *sutrav1.Node) { n.Port = uint32(port) } }

func at(path string) func(*sutrav1.Node) { return func(n *sutrav1.Node) { n.StoragePath = path } }

func mustSpawn(t *testing.T, m *Manager, n *sutrav1.Node) *sutrav1.Node {
	t.Helper()
	got, err := m.Spawn(t.Context(), n)
	if err != nil {
		t.Fatalf("spawn %v: %v", n, err)
	}
	return got
}

func expectReason(t *testing.T, err error, reason rpc.Reason) {
	t.Helper()
	if rpc.ReasonOf(err) != reason {
		t.Fatalf("error %q (%s), want %s", err, rpc.ReasonOf(err), reason)
	}
}

// processes finds the live processes of a test's nodes, whose data lies in its temporary folders: node id by pid.
func processes(t testing.TB, m *Manager) map[int]string {
	t.Helper()
	found := map[int]string{}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		env := strings.Join(zeroSeparated(pid, "environ"), "\n")
		if _, id, ok := strings.Cut(env, "SUTRA_NODE_ID="); ok && strings.Contains(env, "SUTRA_STORAGE_PATH="+filepath.Dir(m.cfg.Dir)+"/") {
			found[pid], _, _ = strings.Cut(id, "\n")
		}
	}
	return found
}

// zeroSeparated reads a process's environment or command line; nothing where it is gone.
func zeroSeparated(pid int, file string) []string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	if err != nil {
		return nil
	}
	var list []string
	for s := range bytes.SplitSeq(bytes.TrimSuffix(data, []byte{0}), []byte{0}) {
		list = append(list, string(s))
	}
	return list
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// await calls check until it returns nil.
func await(t *testing.T, what string, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("waited for %s: %v", what, err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func awaitPhase(t *testing.T, m *Manager, id string, phase sutrav1.Phase) *sutrav1.Node {
	t.Helper()
	var n *sutrav1.Node
	await(t, id+" to be "+phase.Word(), func() error {
		n, _ = m.Get(id)
		if n.GetPhase() != phase {
			return fmt.Errorf("it is %v", n)
		}
		return nil
	})
	return n
}

func exists(t *testing.T, path string) bool {
	t.Helper()
	_, err := os.Lstat(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return err == nil
}
