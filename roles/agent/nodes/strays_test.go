package nodes

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/rs/zerolog"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/supervisor"
)

// A node that runs, and of which neither a record nor a copy is left, is taken up when it is wanted again, and ended when it
// is to be stopped; with control groups also where it has dropped its environment and its log.
func TestStrays(t *testing.T) {
	onEachHost(t, func(t *testing.T, cgroups func(*Config)) {
		for name, script := range map[string]string{
			"with its mark":    "exec sleep 100000",
			"with its log":     "exec env -i sleep 100000",
			"with its group":   "exec env -i sleep 100000 >/dev/null 2>&1",
			"that has a child": "env -i setsid sleep 100000 & exec env -i sleep 100000",
		} {
			t.Run(name, func(t *testing.T) {
				m := newManager(t, cgroups, func(c *Config) {
					p := c.Profiles["default"]
					p.StorageBinary, p.Args = "/bin/sh", []string{"-c", script}
					c.Profiles["stray"] = p
				})
				if m.cfg.Cgroups == (supervisor.Cgroups{}) && name == "with its group" {
					return // nothing tells it from a stranger
				}
				wish := want("node-1", as("stray"), on(freePort(t)))
				was := mustSpawn(t, m, wish)
				await(t, "the process to be what it is to be", func() error {
					if command := zeroSeparated(int(was.GetPid()), "cmdline"); len(command) == 0 || filepath.Base(command[0]) != "sleep" {
						return fmt.Errorf("it is %q", command)
					}
					return nil
				})
				lose := func() {
					if err := m.Close(false); err != nil {
						t.Fatal(err)
					}
					for _, name := range []string{"nodes.db", "wanted/node-1"} {
						if err := os.Remove(filepath.Join(m.cfg.Dir, name)); err != nil {
							t.Fatal(err)
						}
					}
					m = open(t, m.cfg)
					if n, _ := m.Get("node-1"); n.GetPhase() != sutrav1.Phase_PHASE_UNKNOWN || !strings.Contains(n.GetReason(), "runs unsupervised") {
						t.Fatalf("it is known as %v: this test shows nothing", n)
					}
				}
				lose()
				_, err := m.Spawn(t.Context(), want("node-1", as("stray")))
				expectReason(t, err, rpc.NodeStillLive)
				if is := mustSpawn(t, m, wish); is.GetPid() != was.GetPid() {
					t.Errorf("pid %d, want %d: there are two now", is.GetPid(), was.GetPid())
				}
				lose()
				if n, err := m.Stop(t.Context(), "node-1"); err != nil || n.GetPhase() != sutrav1.Phase_PHASE_STOPPED {
					t.Errorf("stop: %v, %v", n, err)
				}
				if command := zeroSeparated(int(was.GetPid()), "cmdline"); len(command) > 0 {
					t.Errorf("process %d runs on: %q", was.GetPid(), command)
				}
				if n, err := m.Stop(t.Context(), "node-1"); n != nil || err != nil {
					t.Errorf("stopped again: %v, %v", n, err)
				}
			})
		}
	})
}

// What is no node's id ends nobody: as the name of a control group it would be that of all nodes, or of a stranger's.
func TestStopOfWhatIsNoID(t *testing.T) {
	onEachHost(t, func(t *testing.T, cgroups func(*Config)) {
		m := newManager(t, cgroups)
		was := mustSpawn(t, m, want("node-1"))
		for _, id := range []string{".", "", "..", "../" + filepath.Base(m.cfg.Dir), "node-1/.", "./node-1", "node-1/../node-1"} {
			if n, err := m.Stop(t.Context(), id); n != nil {
				t.Errorf("stop of %q: %v, %v", id, n, err)
			}
		}
		if is, _ := m.Get("node-1"); is.GetPid() != was.GetPid() || is.GetPhase() != sutrav1.Phase_PHASE_RUNNING {
			t.Errorf("the node is %v", is)
		}
	})
}

// The log of a stray is looked after like any other: it writes to it.
func TestLogOfAStray(t *testing.T) {
	m := newManager(t, func(c *Config) {
		c.NodeLogBudget, c.LogBudget = 1<<20, 2<<20
		p := c.Profiles["default"]
		p.StorageBinary, p.Args = "/bin/sh", []string{"-c", "exec env -i sh -c 'until [ -e flood ]; do sleep .01; done; seq 1 400000; exec sleep 100000'"}
		c.Profiles["flood"] = p
	})
	n := mustSpawn(t, m, want("node-1", as("flood"), on(freePort(t))))
	if err := m.Close(false); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"nodes.db", "wanted/node-1"} {
		if err := os.Remove(filepath.Join(m.cfg.Dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	m = open(t, m.cfg)
	run(t, m)
	if _, err := m.Spawn(t.Context(), want("node-1", as("flood"))); rpc.ReasonOf(err) != rpc.NodeStillLive { // refused, for want of a port
		t.Fatalf("spawn: %v", err)
	}
	if err := os.WriteFile(filepath.Join(n.GetStoragePath(), "flood"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	await(t, "the log to be brought within its budget", func() error {
		data, err := os.ReadFile(m.logPath("node-1"))
		var st syscall.Stat_t
		if err = errors.Join(err, syscall.Stat(m.logPath("node-1"), &st)); err != nil {
			return err
		}
		if !bytes.HasSuffix(data, []byte("\n400000\n")) || st.Blocks*512 > 1<<20 {
			return fmt.Errorf("it takes %d bytes", st.Blocks*512)
		}
		return nil
	})
	if stdout, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/1", n.GetPid())); stdout != m.logPath("node-1") {
		t.Errorf("it writes to %s (%v)", stdout, err)
	}
	if err := m.Close(true); err != nil {
		t.Fatal(err)
	}
	if command := zeroSeparated(int(n.GetPid()), "cmdline"); len(command) > 0 {
		t.Errorf("it outlived an agent that ends its nodes: %q", command)
	}
	m = open(t, m.cfg) // for the test's end to close
}

// However many want a stray at once, to run or to end, it is taken up once.
func TestStrayIsTakenUpOnce(t *testing.T) {
	onEachHost(t, func(t *testing.T, cgroups func(*Config)) {
		for round := range 20 {
			m := newManager(t, cgroups)
			wish := want("node-1", on(freePort(t)))
			was := mustSpawn(t, m, wish)
			if err := m.Close(false); err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"nodes.db", "wanted/node-1"} {
				if err := os.Remove(filepath.Join(m.cfg.Dir, name)); err != nil {
					t.Fatal(err)
				}
			}
			log := &lines{}
			m.cfg.Log = zerolog.New(log)
			m = open(t, m.cfg)
			var group sync.WaitGroup
			for range 4 {
				group.Go(func() {
					n, err := m.Spawn(t.Context(), wish)
					if round%2 == 0 && (err != nil || n.GetPid() != was.GetPid()) { // else it may have been stopped before
						t.Errorf("spawned: %v, %v", n, err)
					}
				})
				group.Go(m.lookAfterStrays)
			}
			if round%2 == 1 {
				group.Go(func() {
					if _, err := m.Stop(t.Context(), "node-1"); err != nil {
						t.Error(err)
					}
				})
			}
			group.Wait()
			if _, err := m.Stop(t.Context(), "node-1"); err != nil {
				t.Error(err)
			}
			if count := strings.Count(log.String(), "node taken up"); count != 1 {
				t.Fatalf("it was taken up %d times:\n%s", count, log.String())
			}
		}
	})
}
