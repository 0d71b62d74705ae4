package nodes

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rs/xid"
	"github.com/rs/zerolog"
	"go.etcd.io/bbolt"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/supervisor"
)

// onEachHost runs a test with control groups, where they can be made, and without.
func onEachHost(t *testing.T, test func(t *testing.T, cgroups func(*Config))) {
	t.Run("no control groups", func(t *testing.T) { test(t, func(*Config) {}) })
	t.Run("control groups", func(t *testing.T) {
		tried, why := supervisor.OpenCgroups("sutra-" + xid.New().String())
		if tried == (supervisor.Cgroups{}) {
			if os.Getenv("SUTRA_TEST_NO_SKIP") != "" {
				t.Fatal(why)
			}
			t.Skip(why)
		}
		if err := tried.Remove(); err != nil {
			t.Error(err)
		}
		test(t, func(c *Config) {
			c.Cgroups, _ = supervisor.OpenCgroups("sutra-" + c.Agent.GetInstanceId())
			cgroups := c.Cgroups
			t.Cleanup(func() { // after the manager's end
				if err := cgroups.Remove(); err != nil {
					t.Errorf("control groups are left: %v", err)
				}
			})
		})
	})
}

// reopen leaves the nodes of a manager to another one.
func reopen(t *testing.T, m *Manager) *Manager {
	t.Helper()
	if err := m.Close(false); err != nil {
		t.Fatal(err)
	}
	return open(t, m.cfg)
}

func TestNodesOutliveTheManager(t *testing.T) {
	onEachHost(t, func(t *testing.T, cgroups func(*Config)) {
		m := newManager(t, cgroups, func(c *Config) {
			p := c.Profiles["deaf"]
			p.StopGrace = 100 * time.Millisecond
			c.Profiles["deaf"] = p
		})
		before := map[string]*sutrav1.Node{}
		for i := range 5 {
			n := mustSpawn(t, m, want(fmt.Sprintf("node-%d", i), as([]string{"default", "deaf"}[i%2]), func(n *sutrav1.Node) { n.Generation = uint64(i) }))
			before[n.GetNodeId()] = n
		}
		if err := syscall.Kill(int(before["node-0"].GetPid()), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		before["node-0"] = awaitPhaseAfter(t, m, before["node-0"])
		for range 2 {
			m = reopen(t, m)
			for id, was := range before {
				await(t, id+" to be as it was", func() error {
					is, _ := m.Get(id)
					is.Revision = was.Revision
					if diff := cmp.Diff(was, is, protocmp.Transform()); diff != "" {
						return fmt.Errorf("(-was +is):\n%s", diff)
					}
					return nil
				})
			}
		}
		if p := processes(t, m); len(p) < len(before) {
			t.Errorf("processes: %v", p)
		}
		if again := mustSpawn(t, m, want("node-1", as("deaf"))); again.GetPid() != before["node-1"].GetPid() {
			t.Errorf("a node that was taken up was run again: %v", again)
		}
		_, err := m.Spawn(t.Context(), want("node-x", on(int(before["node-2"].GetPort()))))
		expectReason(t, err, rpc.PortInUse)

		was := before["node-2"]
		if err := syscall.Kill(int(was.GetPid()), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if is := awaitPhaseAfter(t, m, was); is.GetRestartCount() != 1 || is.GetPort() != was.GetPort() {
			t.Errorf("killed, the node is %v", is)
		}
		for id := range before {
			if n, err := m.Stop(t.Context(), id); err != nil || n.GetPhase() != sutrav1.Phase_PHASE_STOPPED {
				t.Errorf("stop of %s: %v, %v", id, n, err)
			}
		}
		if left := processes(t, m); len(left) > 0 {
			t.Errorf("stopped, and left %v", left)
		}
		if m = reopen(t, m); len(m.List()) > 0 {
			t.Errorf("stopped nodes are on record: %v", m.List())
		}
	})
}

// A node that is let go while it starts goes on starting; who waited for it isn't told that it runs.
func TestLetGoWhileStarting(t *testing.T) {
	onEachHost(t, func(t *testing.T, cgroups func(*Config)) {
		m := newManager(t, cgroups)
		outcome := make(chan error, 1)
		go func() {
			_, err := m.Spawn(t.Context(), want("node-1", as("slow")))
			outcome <- err
		}()
		var n *sutrav1.Node
		await(t, "the process", func() error {
			if n, _ = m.Get("node-1"); n.GetPid() == 0 {
				return fmt.Errorf("it is %v", n)
			}
			return nil
		})
		m = reopen(t, m)
		expectReason(t, <-outcome, rpc.NotReadyYet)
		if is, _ := m.Get("node-1"); is.GetPid() != n.GetPid() || is.GetPhase() != sutrav1.Phase_PHASE_STARTING {
			t.Errorf("node was %v\nand is %v", n, is)
		}
		if err := os.WriteFile(filepath.Join(n.GetStoragePath(), "ready"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if is := mustSpawn(t, m, want("node-1", as("slow"))); is.GetPid() != n.GetPid() || is.GetPhase() != sutrav1.Phase_PHASE_RUNNING {
			t.Errorf("node was %v\nand is %v", n, is)
		}
	})
}

// A process is found again that was forked right before the end, when its identity wasn't yet on record; also where it has
// overwritten its environment.
func TestForkedAndNotYetOnRecord(t *testing.T) {
	onEachHost(t, func(t *testing.T, cgroups func(*Config)) {
		m := newManager(t, cgroups, func(c *Config) {
			p := c.Profiles["default"]
			p.StorageBinary, p.Args = "/usr/bin/env", []string{"-i", "/bin/sleep", "100000"}
			c.Profiles["bare"] = p
		})
		before := map[string]*sutrav1.Node{}
		for i, profile := range []string{"default", "bare"} {
			id := fmt.Sprintf("node-%d", i)
			n := mustSpawn(t, m, want(id, as(profile)))
			before[id] = n
			await(t, "the process to be what it is to be", func() error {
				if command := zeroSeparated(int(n.GetPid()), "cmdline"); len(command) == 0 || filepath.Base(command[0]) != "sleep" {
					return fmt.Errorf("it is %q", command)
				}
				return nil
			})
			record := &sutrav1.ProcessRecord{Node: proto.CloneOf(m.entries[id].spec)}
			if err := m.records.save(record); err != nil {
				t.Fatal(err)
			}
		}
		m = reopen(t, m)
		for id, was := range before {
			if is := awaitPhase(t, m, id, sutrav1.Phase_PHASE_RUNNING); is.GetPid() != was.GetPid() || is.GetRestartCount() != 0 {
				t.Errorf("node was %v\nand is %v", was, is)
			}
			if _, err := m.Stop(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			if err := syscall.Kill(int(was.GetPid()), 0); err == nil && len(zeroSeparated(int(was.GetPid()), "cmdline")) > 0 {
				t.Errorf("process %d of %s outlived its stop", was.GetPid(), id)
			}
		}
	})
}

// Whatever order a stop and the manager's end come in: who is told that the node has stopped is told the
// truth, and else the next manager stops it.
func TestStopWhileLettingGo(t *testing.T) {
	m := newManager(t)
	told := 0
	for round := range 40 {
		id := fmt.Sprintf("node-%d", round)
		mustSpawn(t, m, want(id))
		var stop sync.WaitGroup
		stop.Go(func() {
			switch n, err := m.Stop(t.Context(), id); {
			case err != nil && rpc.ReasonOf(err) != rpc.StillRunning:
				t.Errorf("stop: %v", err)
			case err == nil:
				told++
				for _, live := range processes(t, m) {
					if live == id {
						t.Errorf("said to be stopped as %v, and it runs", n)
					}
				}
			}
		})
		await(t, "the stop to be noted", func() error {
			if n, known := m.Get(id); known && n.GetDesired() != sutrav1.Desired_DESIRED_STOPPED {
				return fmt.Errorf("it is %v", n)
			}
			return nil
		})
		if err := m.Close(false); err != nil {
			t.Fatal(err)
		}
		stop.Wait()
		m = open(t, m.cfg)
		await(t, "the node to be gone", func() error {
			if n, known := m.Get(id); known && n.GetDesired() == sutrav1.Desired_DESIRED_STOPPED {
				return fmt.Errorf("it is %v", n)
			}
			return nil
		})
		// A stop that wasn't written down in time is the caller's to repeat: it was told so.
		if _, err := m.Stop(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if left := processes(t, m); len(left) > 0 {
			t.Fatalf("left %v", left)
		}
	}
	t.Logf("%d of 40 were told that it had stopped", told)
}

// However the file of records is spoilt, the nodes that run are taken up once each, and the file is put aside.
func TestSpoiltRecords(t *testing.T) {
	overwrite := func(from, to int) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for i := from; i < min(to, len(data)); i++ {
				data[i] = byte(i * 7)
			}
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	truncate := func(to int64) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			if err := os.Truncate(path, to); err != nil {
				t.Fatal(err)
			}
		}
	}
	record := func(key, value string) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
			if err != nil {
				t.Fatal(err)
			}
			if err := db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(recordsBucket).Put([]byte(key), []byte(value)) }); err != nil {
				t.Fatal(err)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, path string)
		aside bool
	}{
		{"all overwritten", overwrite(0, 1<<20), true},
		{"both metas overwritten", overwrite(0, 8192), true},
		{"all but the metas overwritten", overwrite(8192, 1<<20), true},
		{"one byte left", truncate(1), true},
		{"a page left", truncate(4096), true},
		{"metas left", truncate(8192), true},
		{"a record that isn't one", record("node-1", "\xff\xff\xff"), true},
		{"another one's record", record("node-1", ""), true},
		{"nothing left", truncate(0), false},
		{"gone", func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}, false},
	} {
		test := func(t *testing.T, cgroups func(*Config)) {
			log, err := os.Create(filepath.Join(t.TempDir(), "log"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = log.Close() }) // after the manager's end
			m := newManager(t, cgroups, func(c *Config) {
				c.Log = zerolog.New(log)
				p := c.Profiles["default"]
				p.Name, p.StorageBinary, p.Args = "family", "/bin/sh", []string{"-c", "setsid sleep 100000 & touch ready; wait"}
				p.Ready.Kind, p.Ready.Arg = "exec", "test -e $HOME/ready"
				c.Profiles["family"] = p
				p = c.Profiles["default"]
				p.Name, p.StorageBinary, p.Args = "bare", "/bin/sh", []string{"-c", "exec env -i sleep 100000"}
				c.Profiles["bare"] = p
			})
			before := map[string]*sutrav1.Node{}
			for i, profile := range []string{"default", "bare", "family"} { // of which one has two session leaders
				n := mustSpawn(t, m, want(fmt.Sprintf("node-%d", i), as(profile), at(filepath.Join(t.TempDir(), "place")), func(n *sutrav1.Node) { n.MemoryLimitMb = 33 }))
				before[n.GetNodeId()] = n
			}
			await(t, "the whole family", func() error {
				if p := processes(t, m); len(p) != 3 {
					return fmt.Errorf("there are %v", p)
				}
				if env := zeroSeparated(int(before["node-1"].GetPid()), "environ"); len(env) != 1 || env[0] != "" {
					return fmt.Errorf("the bare one has %q", env)
				}
				return nil
			})
			if err := m.Close(false); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(m.cfg.Dir, "nodes.db")
			c.spoil(t, path)
			m = open(t, m.cfg)
			for id, was := range before {
				is := awaitPhase(t, m, id, sutrav1.Phase_PHASE_RUNNING)
				if is.GetPid() != was.GetPid() || is.GetPort() != was.GetPort() || is.GetStoragePath() != was.GetStoragePath() ||
					is.GetMemoryLimitMb() != was.GetMemoryLimitMb() || is.GetProfile() != was.GetProfile() || is.GetDesired() != was.GetDesired() {
					t.Errorf("node was %v\nand is %v", was, is)
				}
			}
			if all := m.List(); len(all) != len(before) {
				t.Errorf("nodes: %v", all)
			}
			if p := processes(t, m); len(p) != 3 {
				t.Errorf("processes: %v", p)
			}
			aside, err := filepath.Glob(path + ".damaged-*")
			if err != nil || (len(aside) == 1) != c.aside {
				t.Errorf("put aside: %q, %v", aside, err)
			}
			said, err := os.ReadFile(log.Name())
			if err != nil || c.aside && !bytes.Contains(said, []byte("records of this agent's nodes are damaged")) ||
				!bytes.Contains(said, []byte("aren't on record")) {
				t.Errorf("the log says\n%s, %v", said, err)
			}
			// What was made anew holds the next time.
			m = reopen(t, m)
			for id, was := range before {
				if is := awaitPhase(t, m, id, sutrav1.Phase_PHASE_RUNNING); is.GetPid() != was.GetPid() {
					t.Errorf("node was %v\nand is %v", was, is)
				}
			}
		}
		t.Run(c.name, func(t *testing.T) { onEachHost(t, test) })
	}
}

// What a record says is done, whatever became of its process.
func TestRecordsOfTheDead(t *testing.T) {
	onEachHost(t, func(t *testing.T, cgroups func(*Config)) {
		bootID, err := supervisor.BootID()
		if err != nil {
			t.Fatal(err)
		}
		// A stranger has the pid by now.
		stranger := int32(os.Getpid())
		for _, c := range []struct {
			name   string
			record *sutrav1.ProcessRecord
			stop   bool
			phase  sutrav1.Phase
			// restarts that are counted, beyond the record's.
			restarts uint32
		}{
			{"ready once, gone", &sutrav1.ProcessRecord{Pid: stranger, StartTicks: 1, BootId: bootID, EverReady: true, Restarts: 3}, false, sutrav1.Phase_PHASE_RUNNING, 4},
			{"of another boot", &sutrav1.ProcessRecord{Pid: stranger, StartTicks: 1, BootId: "another", EverReady: true, Restarts: 3}, false, sutrav1.Phase_PHASE_RUNNING, 4},
			{"never ready, gone", &sutrav1.ProcessRecord{Pid: stranger, StartTicks: 1, BootId: bootID}, false, sutrav1.Phase_PHASE_FAILED, 0},
			{"to be stopped, gone", &sutrav1.ProcessRecord{Pid: stranger, StartTicks: 1, BootId: bootID, EverReady: true}, true, 0, 0},
			{"to be stopped, of another boot", &sutrav1.ProcessRecord{Pid: stranger, StartTicks: 1, BootId: "another", EverReady: true}, true, 0, 0},
			{"to be stopped, never forked", &sutrav1.ProcessRecord{}, true, 0, 0},
		} {
			t.Run(c.name, func(t *testing.T) {
				m := newManager(t, cgroups)
				place := filepath.Join(t.TempDir(), "place")
				makeDir(t, place)
				makeDir(t, filepath.Dir(m.logPath("node-1")))
				c.record.StartedAt = timestamppb.Now()
				c.record.Node = want("node-1", at(place), on(freePort(t)), as("trace"))
				c.record.Node.Desired = sutrav1.Desired_DESIRED_RUNNING
				if c.stop {
					c.record.Node.Desired = sutrav1.Desired_DESIRED_STOPPED
				}
				trace := m.cfg.Profiles["default"]
				trace.StorageBinary, trace.Args = "/bin/sh", []string{"-c", "touch trace; exec sleep 100000"}
				m.cfg.Profiles["trace"] = trace
				if err := m.records.save(c.record); err != nil {
					t.Fatal(err)
				}
				m = reopen(t, m)
				if c.stop {
					await(t, "the node to be forgotten", func() error {
						if n, known := m.Get("node-1"); known {
							return fmt.Errorf("it is %v", n)
						}
						return nil
					})
					if exists(t, filepath.Join(place, "trace")) {
						t.Error("a node that was to be stopped was started")
					}
					if m = reopen(t, m); len(m.List()) > 0 {
						t.Errorf("its record is still there: %v", m.List())
					}
					return
				}
				if n := awaitPhase(t, m, "node-1", c.phase); n.GetRestartCount() != c.restarts || n.GetPid() == stranger {
					t.Errorf("the node is %v", n)
				}
			})
		}
	})
}

// A node that can't be taken up is neither started a second time nor called stopped while it runs.
func TestNodeThatCannotBeTakenUp(t *testing.T) {
	onEachHost(t, func(t *testing.T, cgroups func(*Config)) {
		m := newManager(t, cgroups)
		wish := want("node-1", on(freePort(t)))
		was := mustSpawn(t, m, wish)
		spoil := func() {
			if err := m.Close(false); err != nil {
				t.Fatal(err)
			}
			r, all, _, err := openRecords(filepath.Join(m.cfg.Dir, "nodes.db"))
			if err != nil || len(all) != 1 {
				t.Fatalf("records %v, %v", all, err)
			}
			all[0].Node.StoragePath = "no/absolute/path"
			if err := errors.Join(r.save(all[0]), r.db.Close()); err != nil {
				t.Fatal(err)
			}
			m = open(t, m.cfg)
		}
		spoil()
		if n, _ := m.Get("node-1"); n.GetPhase() != sutrav1.Phase_PHASE_UNKNOWN {
			t.Fatalf("it is known as %v: this test shows nothing", n)
		}
		if is := mustSpawn(t, m, wish); is.GetPid() != was.GetPid() {
			t.Errorf("pid %d, want %d: there are two now", is.GetPid(), was.GetPid())
		}
		spoil()
		if n, err := m.Stop(t.Context(), "node-1"); err != nil || n.GetPhase() != sutrav1.Phase_PHASE_STOPPED {
			t.Errorf("stop: %v, %v", n, err)
		}
		if command := zeroSeparated(int(was.GetPid()), "cmdline"); len(command) > 0 {
			t.Errorf("process %d runs on: %q", was.GetPid(), command)
		}
		if m = reopen(t, m); len(m.List()) > 0 {
			t.Errorf("stopped, it is on record: %v", m.List())
		}
	})
}

// A record that couldn't be removed is removed later: a node that was stopped doesn't come back.
func TestRecordsThatAreOwed(t *testing.T) {
	m := newManager(t)
	for _, id := range []string{"node-1", "node-2"} {
		mustSpawn(t, m, want(id))
	}
	copied := filepath.Join(m.cfg.Dir, "wanted", "node-1")
	// A folder in its place, with something in it, can't be removed; nor could a record be on a disk that is broken.
	if err := errors.Join(os.Remove(copied), os.MkdirAll(filepath.Join(copied, "x"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"node-1", "node-2"} {
		if _, err := m.Stop(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	await(t, "the record to be owed", func() error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if len(m.owed) != 1 || m.owed[0].id != "node-1" {
			return fmt.Errorf("owed: %v", m.owed)
		}
		return nil
	})
	m.settle()
	if len(m.owed) != 1 {
		t.Errorf("what can't be removed is forgotten: %v", m.owed)
	}
	if err := os.RemoveAll(copied); err != nil {
		t.Fatal(err)
	}
	m.settle()
	if len(m.owed) != 0 {
		t.Errorf("owed: %v", m.owed)
	}
	// An old debt isn't paid with a new record.
	m.owed = append(m.owed, newEntry(want("node-1")))
	mustSpawn(t, m, want("node-1"))
	m.settle()
	if m = reopen(t, m); len(m.List()) != 1 {
		t.Errorf("nodes: %v", m.List())
	}
}
