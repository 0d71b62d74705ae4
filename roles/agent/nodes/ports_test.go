package nodes

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

func TestParallelSpawnsGetPortsOfTheirOwn(t *testing.T) {
	m := newManager(t)
	// A stranger has the second port.
	stranger, err := net.Listen("tcp", ":"+strconv.Itoa(m.cfg.BasePort+1))
	if err != nil {
		t.Skipf("no two ports in a row: %v", err)
	}
	defer stranger.Close()
	const count = 40
	nodes := make([]*sutrav1.Node, count)
	var spawns sync.WaitGroup
	for i := range nodes {
		spawns.Go(func() {
			n, err := m.Spawn(t.Context(), want(fmt.Sprintf("node-%d", i)))
			if err != nil {
				t.Error(err)
			}
			nodes[i] = n
		})
	}
	spawns.Wait()
	holder := map[uint32]string{}
	for _, n := range nodes {
		port := n.GetPort()
		if port < uint32(m.cfg.BasePort) || port == uint32(m.cfg.BasePort+1) {
			t.Errorf("node %s got port %d, the base is %d and the next one is taken", n.GetNodeId(), port, m.cfg.BasePort)
		}
		if other, taken := holder[port]; taken {
			t.Errorf("nodes %s and %s both got port %d", other, n.GetNodeId(), port)
		}
		holder[port] = n.GetNodeId()
		if n.GetEndpoint() != fmt.Sprintf("192.0.2.1:%d", port) {
			t.Errorf("node with port %d has endpoint %s", port, n.GetEndpoint())
		}
	}
	// The first port is given again once it is free.
	if _, err := m.Stop(t.Context(), holder[uint32(m.cfg.BasePort)]); err != nil {
		t.Fatal(err)
	}
	if n := mustSpawn(t, m, want("node-again")); n.GetPort() != uint32(m.cfg.BasePort) {
		t.Errorf("the next node got port %d, and %d was free", n.GetPort(), m.cfg.BasePort)
	}
}

// Two agents of a host begin at the same port. While a node starts there, which may not have come to listen yet, the other
// agent's must not: as soon as it listened, both would be taken for ready.
func TestAgentsOfOneHostDoNotShareAPort(t *testing.T) {
	one := newManager(t)
	other := newManager(t, func(c *Config) { c.BasePort = one.cfg.BasePort })
	defer shut(t, other) // the ends of both look for what is left of either
	defer shut(t, one)
	ended := make(chan error, 1)
	go func() {
		_, err := one.Spawn(t.Context(), want("node-slow", as("slow")))
		ended <- err
	}()
	var slow *sutrav1.Node
	await(t, "the slow node's start", func() error {
		if slow, _ = one.Get("node-slow"); slow.GetPid() == 0 {
			return errors.New("it has no process")
		}
		return nil
	})
	if n := mustSpawn(t, other, want("node-1")); n.GetPort() == slow.GetPort() {
		t.Errorf("both got port %d", n.GetPort())
	}
	there := on(int(slow.GetPort()))
	if _, err := other.Spawn(t.Context(), want("node-2", there)); rpc.ReasonOf(err) != rpc.PortInUse || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("on the other's port: %v", err)
	}
	if err := os.WriteFile(filepath.Join(slow.GetStoragePath(), "ready"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	mustSpawn(t, other, want("node-3", there)) // it is ready, and listens nowhere
}

func TestOnePortIsOneNodes(t *testing.T) {
	m := newManager(t)
	port := freePort(t)
	errs := make([]error, 10)
	var spawns sync.WaitGroup
	for i := range errs {
		spawns.Go(func() { _, errs[i] = m.Spawn(t.Context(), want(fmt.Sprintf("node-%d", i), on(port))) })
	}
	spawns.Wait()
	all := m.List()
	if len(all) != 1 {
		t.Fatalf("%d nodes got port %d", len(all), port)
	}
	for i, err := range errs {
		if id := fmt.Sprintf("node-%d", i); id == all[0].GetNodeId() {
			if err != nil {
				t.Errorf("the winner was told %v", err)
			}
		} else if e := rpc.AsError(err); e.Reason != rpc.PortInUse || e.Meta["node_id"] != all[0].GetNodeId() {
			t.Errorf("the winner is %s, and a loser was told %v", all[0].GetNodeId(), e.Meta)
		}
	}
}

func TestPortOfAStranger(t *testing.T) {
	m := newManager(t)
	stranger, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer stranger.Close()
	port := stranger.Addr().(*net.TCPAddr).Port
	_, err = m.Spawn(t.Context(), want("node-1", on(port)))
	expectReason(t, err, rpc.PortInUse)
	if e := rpc.AsError(err); e.Meta["port"] != strconv.Itoa(port) || e.Hint == "" {
		t.Errorf("refused with %v %v %q", e, e.Meta, e.Hint)
	}
	if len(m.List()) != 0 || exists(t, filepath.Join(m.cfg.Dir, "data", "node-1")) || exists(t, m.logPath("node-1")) {
		t.Error("the refused spawn left something behind")
	}
}

func TestNoFreePort(t *testing.T) {
	if err := tryBind(maxPort); err != nil {
		t.Skipf("the last port: %v", err)
	}
	m := newManager(t, func(c *Config) { c.BasePort = maxPort })
	if n := mustSpawn(t, m, want("node-1")); n.GetPort() != maxPort {
		t.Errorf("got port %d", n.GetPort())
	}
	_, err := m.Spawn(t.Context(), want("node-2"))
	expectReason(t, err, rpc.NoFreePort)
	if len(m.List()) != 1 || exists(t, filepath.Join(m.cfg.Dir, "data", "node-2")) {
		t.Error("the refused spawn left something behind")
	}
}

func TestCovers(t *testing.T) {
	for _, c := range []struct {
		ranges    string
		low, high int
		want      bool
	}{
		{"", 1, 1, false},
		{"50051", 50051, 50051, true},
		{"50051", 50051, 50052, false},
		{"50050", 50051, 50051, false},
		{"50051-50060", 50051, 50060, true},
		{"50051-50060", 50050, 50060, false},
		{"50051-50060", 50051, 50061, false},
		{"8080,50000-50100", 50051, 50060, true},
		{"50051-50055,50056-50060", 50054, 50057, false}, // the kernel joins such ranges itself
		{"x-50060", 50051, 50052, false},
		{"50051-x", 50051, 50051, false},
		{",,", 0, 0, false},
	} {
		if got := covers(c.ranges, c.low, c.high); got != c.want {
			t.Errorf("covers(%q, %d, %d) = %v", c.ranges, c.low, c.high, got)
		}
	}
}

func TestPortRange(t *testing.T) {
	for _, c := range []struct {
		text      string
		low, high int
		ok        bool
	}{
		{"32768\t60999\n", 32768, 60999, true},
		{"1 2", 1, 2, true},
		{"32768\n", 0, 0, false},
		{"", 0, 0, false},
		{"low high", 0, 0, false},
	} {
		path := filepath.Join(t.TempDir(), "range")
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		low, high, ok := portRange(path)
		if ok != c.ok || ok && (low != c.low || high != c.high) {
			t.Errorf("portRange of %q = %d, %d, %v", c.text, low, high, ok)
		}
	}
	if _, _, ok := portRange("/nowhere"); ok {
		t.Error("a file that isn't there has a range")
	}
}
