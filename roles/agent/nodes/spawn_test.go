package nodes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

func TestOneIDIsOneProcess(t *testing.T) {
	for _, profile := range []string{"default", "slow"} {
		t.Run(profile, func(t *testing.T) {
			m := newManager(t)
			nodes := make([]*sutrav1.Node, 20)
			var spawns sync.WaitGroup
			for i := range nodes {
				spawns.Go(func() {
					n, err := m.Spawn(t.Context(), want("node-1", as(profile)))
					if err != nil {
						t.Error(err)
					}
					nodes[i] = n
				})
			}
			if profile == "slow" {
				await(t, "the folder", func() error {
					return os.WriteFile(filepath.Join(m.cfg.Dir, "data", "node-1", "ready"), nil, 0o600)
				})
			}
			spawns.Wait()
			for _, n := range nodes {
				if n.GetPid() == 0 || n.GetPid() != nodes[0].GetPid() || n.GetPhase() != sutrav1.Phase_PHASE_RUNNING {
					t.Errorf("one caller got %v, another %v", nodes[0], n)
				}
			}
			if p := processes(t, m); len(p) != 1 {
				t.Errorf("processes: %v", p)
			}
		})
	}
}

func TestAllCallersHearOfAnEarlyDeath(t *testing.T) {
	m := newManager(t)
	var spawns sync.WaitGroup
	errs := make([]error, 10)
	for i := range errs {
		spawns.Go(func() { _, errs[i] = m.Spawn(t.Context(), want("node-1", as("dying"))) })
	}
	spawns.Wait()
	for _, err := range errs {
		expectReason(t, err, rpc.NodeDiedEarly)
		e := rpc.AsError(err)
		if e.Exit.GetCode() != 3 || !strings.Contains(e.Exit.GetOutput(), "last words") || e.Meta["node_id"] != "node-1" {
			t.Errorf("a caller was told %v: %v %v", e, e.Exit, e.Meta)
		}
	}
	if all := m.List(); len(all) > 0 {
		t.Errorf("nodes: %v", all)
	}
	if exists(t, filepath.Join(m.cfg.Dir, "data", "node-1")) || exists(t, m.logPath("node-1")) {
		t.Error("files were left behind")
	}
}

// A caller that can't wait longer leaves a whole node.
func TestCallerGivesUp(t *testing.T) {
	m := newManager(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := m.Spawn(ctx, want("node-1", as("slow")))
	expectReason(t, err, rpc.NotReadyYet)
	if e := rpc.AsError(err); e.Meta["node_id"] != "node-1" || !strings.Contains(e.Hint, "node-1") {
		t.Errorf("a caller was told %v, %q, %v", e, e.Hint, e.Meta)
	}
	var n *sutrav1.Node
	await(t, "the process", func() error {
		if n, _ = m.Get("node-1"); n.GetPid() == 0 || n.GetPhase() != sutrav1.Phase_PHASE_STARTING {
			return fmt.Errorf("it is %v", n)
		}
		return nil
	})
	if err := os.WriteFile(filepath.Join(n.GetStoragePath(), "ready"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if again := mustSpawn(t, m, want("node-1", as("slow"))); again.GetPid() != n.GetPid() || again.GetHealth() != sutrav1.NodeHealth_NODE_HEALTH_READY {
		t.Errorf("was %v\nand is %v", n, again)
	}
}

func TestCloseWhileSpawning(t *testing.T) {
	for round := range 10 {
		m := newManager(t)
		var spawns sync.WaitGroup
		for i := range 20 {
			spawns.Go(func() {
				_, err := m.Spawn(t.Context(), want(fmt.Sprintf("node-%d", i), as([]string{"default", "slow"}[i%2])))
				if reason := rpc.ReasonOf(err); err != nil && reason != rpc.ShuttingDown && reason != rpc.StoppedMeanwhile {
					t.Errorf("round %d: %v", round, err)
				}
			})
		}
		await(t, "some nodes", func() error {
			if n := len(m.List()); n < 2*round {
				return fmt.Errorf("there are %d", n)
			}
			return nil
		})
		shut(t, m)
		if left := processes(t, m); len(left) > 0 {
			t.Errorf("round %d: closed, and left %v", round, left)
		}
		spawns.Wait()
		if left := processes(t, m); len(left) > 0 {
			t.Errorf("round %d: closed, and then there are %v", round, left)
		}
		if _, err := m.Spawn(t.Context(), want("node-late")); rpc.ReasonOf(err) != rpc.ShuttingDown {
			t.Errorf("round %d: spawn after the end: %v", round, err)
		}
		shut(t, m) // idempotent
	}
}

func TestStop(t *testing.T) {
	m := newManager(t, func(c *Config) {
		p := c.Profiles["deaf"]
		p.StopGrace = time.Second
		c.Profiles["deaf"] = p
	})
	if n, err := m.Stop(t.Context(), "node-unknown"); n != nil || err != nil {
		t.Errorf("stop of nothing: %v, %v", n, err)
	}
	deaf := mustSpawn(t, m, want("node-deaf", as("deaf")))
	await(t, "the node not to listen", func() error {
		_, err := os.Stat(filepath.Join(deaf.GetStoragePath(), "deaf"))
		return err
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := m.Stop(ctx, "node-deaf")
	expectReason(t, err, rpc.StillRunning)
	awaitPhase(t, m, "node-deaf", sutrav1.Phase_PHASE_STOPPING)
	// Until its exit is confirmed, its port is its own.
	_, err = m.Spawn(t.Context(), want("node-2", on(int(deaf.GetPort()))))
	expectReason(t, err, rpc.PortInUse)
	n, err := m.Stop(t.Context(), "node-deaf")
	if err != nil || n.GetPhase() != sutrav1.Phase_PHASE_STOPPED || n.GetLastExit().GetSignal() != "SIGKILL" || n.GetPid() != 0 {
		t.Errorf("stopped: %v, %v", n, err)
	}
	mustSpawn(t, m, want("node-2", on(int(deaf.GetPort()))))
}

func TestAdmission(t *testing.T) {
	m := newManager(t, func(c *Config) { c.Agent.MaxNodes, c.Agent.MemoryTotalMb = 2, 100 })
	mustSpawn(t, m, want("node-1"))
	link(t, m.cfg.Home, filepath.Join(m.cfg.Dir, "way-home"))
	for _, c := range []struct {
		name   string
		edit   func(*sutrav1.Node)
		reason rpc.Reason
	}{
		{"unknown profile", as("nonesuch"), rpc.InvalidArgument},
		{"relative path", at("here"), rpc.InvalidArgument},
		{"path with ..", at("/tmp/../etc"), rpc.InvalidArgument},
		{"within the home", at(m.cfg.Home + "/agents"), rpc.InvalidArgument},
		{"within the home by another name", at(filepath.Join(m.cfg.Dir, "way-home", "agents")), rpc.InvalidArgument},
		{"around the home", at(filepath.Dir(m.cfg.Home)), rpc.InvalidArgument},
		{"too much memory", func(n *sutrav1.Node) { n.MemoryLimitMb = 85 }, rpc.MemoryOverCommitted},
	} {
		_, err := m.Spawn(t.Context(), want("node-2", c.edit))
		if rpc.ReasonOf(err) != c.reason {
			t.Errorf("%s: %v (%s), want %s", c.name, err, rpc.ReasonOf(err), c.reason)
		}
	}
	mustSpawn(t, m, want("node-2", func(n *sutrav1.Node) { n.MemoryLimitMb = 84 }))
	_, err := m.Spawn(t.Context(), want("node-3"))
	expectReason(t, err, rpc.AgentFull)
}

// What a node finds around it is what is documented, and nothing of the agent's own.
func TestEnvironmentAndArguments(t *testing.T) {
	t.Setenv("SUTRA_SECRET", "of the agent")
	m := newManager(t, func(c *Config) {
		c.Profiles["wordy"] = config.Profile{
			Name: "wordy", StorageBinary: "/bin/sh", Ready: config.Ready{Kind: "none"}, StopSignal: "TERM", StopGrace: time.Second,
			Args: []string{"-c", "sleep 100000; :", "{node_id}", "--port={port}", "{storage_path}/{storage_path}", "{memory_mb}MB", `{"json": {}}`, "{portion}", ""},
		}
	})
	n := mustSpawn(t, m, want("node-1", as("wordy"), func(n *sutrav1.Node) { n.MemoryLimitMb = 77 }))
	path, port := filepath.Join(m.cfg.Dir, "data", "node-1"), strconv.Itoa(int(n.GetPort()))
	environment := zeroSeparated(int(n.GetPid()), "environ")
	slices.Sort(environment)
	if diff := cmp.Diff([]string{
		"HOME=" + path, "LANG=C.UTF-8", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"SUTRA_AGENT_ID=" + agentID, "SUTRA_MARK=" + m.cfg.Agent.GetInstanceId() + "/node-1", "SUTRA_MEMORY_MB=77",
		"SUTRA_NODE_ID=node-1", "SUTRA_PORT=" + port, "SUTRA_PROFILE=wordy", "SUTRA_STORAGE_PATH=" + path,
	}, environment); diff != "" {
		t.Errorf("environment (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{
		"sh", "-c", "sleep 100000; :", "node-1", "--port=" + port, path + "/" + path, "77MB", `{"json": {}}`, "{portion}", "",
	}, zeroSeparated(int(n.GetPid()), "cmdline")); diff != "" {
		t.Errorf("arguments (-want +got):\n%s", diff)
	}
	if dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", n.GetPid())); err != nil || dir != path {
		t.Errorf("working directory %q, %v", dir, err)
	}
}

// A probe has what its node has, but for the mark: it isn't to be taken for one of the node's processes.
func TestEnvironmentOfAProbe(t *testing.T) {
	m := newManager(t, probed("asked", "env >env; exit 0"))
	n := mustSpawn(t, m, want("node-1", as("asked")))
	data, err := os.ReadFile(filepath.Join(n.GetStoragePath(), "env"))
	if err != nil {
		t.Fatal(err)
	}
	theirs := strings.Split(strings.TrimSpace(string(data)), "\n")
	for _, entry := range zeroSeparated(int(n.GetPid()), "environ") {
		if marks := strings.HasPrefix(entry, "SUTRA_MARK="); slices.Contains(theirs, entry) == marks {
			t.Errorf("%s of the node isn't what it should be in %q", entry, theirs)
		}
	}
	if strings.Contains(string(data), m.mark("node-1")) {
		t.Errorf("the mark is in %q", theirs)
	}
}

// A profile without a binary runs the one that Sutra brings along.
func TestBuiltinCommand(t *testing.T) {
	m := newManager(t, func(c *Config) {
		c.Builtin = filepath.Join(c.Dir, "sutra")
		if err := os.WriteFile(c.Builtin, []byte("#!/bin/sh\nsleep 100000; :\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		p := c.Profiles["default"]
		p.StorageBinary, p.Args = "", []string{"--port", "{port}"}
		c.Profiles["default"] = p
	})
	n := mustSpawn(t, m, want("node-1"))
	got := zeroSeparated(int(n.GetPid()), "cmdline")
	if diff := cmp.Diff([]string{m.cfg.Builtin, "storage", "--port", strconv.Itoa(int(n.GetPort()))}, got[max(0, len(got)-4):]); diff != "" {
		t.Errorf("command (-want +got):\n%s", diff)
	}
}
