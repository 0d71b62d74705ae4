package e2e_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// jobProfiles are servers that run until they find a file "end" in their place, with its exit code.
const jobProfiles = `
max_nodes = 100
default_memory_mb = 16
[storage.profiles.once]
storage_binary = "/bin/sh"
args = ["-c", "until code=$(cat end) && test -n \"$code\"; do sleep .05; done; exit $code"]
ready = "none"
restart = "never"
[storage.profiles.job]
storage_binary = "/bin/sh"
args = ["-c", "until code=$(cat end) && test -n \"$code\"; do sleep .05; done; exit $code"]
ready = "none"
restart = "on-failure"
success_exit_codes = [0, 7]
[storage.profiles.sleep]
storage_binary = "/bin/sleep"
args = ["100000"]
ready = "none"
[monitoring]
health_check_interval_secs = 1
`

// The kernel accepts connections for a stopped redis, so that its port tells nothing; it is restarted all the same, with its data.
func TestStoppedRedisIsRestarted(t *testing.T) {
	t.Parallel()
	harness.Need(t, "redis-server")
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", "default_memory_mb = 64"+redisProfile(t)+"[monitoring]\nhealth_check_interval_secs = 1\n")
	n := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "redis"})
	if err := connect(t, n).Set(t.Context(), "name", "redis", 0).Err(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(int(n.GetPid()), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	is := g.AwaitNode(n.GetNodeId(), "to run again", func(is *sutrav1.Node) bool {
		return is.GetPhase() == running && is.GetPid() != n.GetPid() && is.GetRestartCount() == 1
	})
	if cause := is.GetLastExit().GetCause(); !strings.HasPrefix(cause, "liveness probe failed 3 times: ") || is.GetPort() != n.GetPort() {
		t.Errorf("the node is %v", is)
	}
	if got, err := connect(t, is).Get(t.Context(), "name").Result(); err != nil || got != "redis" {
		t.Errorf("GET: %q, %v", got, err)
	}
}

// What a node's profile doesn't restart ends, its port is free, and no start of agent or master runs it again.
func TestNodesThatRunToTheirEnd(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	agent := g.StartAgent("agent-001", jobProfiles)
	finish := func(n *sutrav1.Node, code int) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(n.GetStoragePath(), "end"), fmt.Append(nil, code), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ended := func(n *sutrav1.Node, phase sutrav1.Phase, code int32) {
		t.Helper()
		is := g.AwaitNode(n.GetNodeId(), "to have ended", func(is *sutrav1.Node) bool {
			return is.GetDesired() == sutrav1.Desired_DESIRED_STOPPED
		})
		if is.GetPhase() != phase || !is.GetCompleted() || is.GetLastExit().GetCode() != code || is.GetRestartCount() < n.GetRestartCount() || is.GetPort() != n.GetPort() {
			t.Errorf("the node was %v\nand ended %v", n, is)
		}
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", n.GetPort()))
		if err != nil {
			t.Fatal(err)
		}
		_ = l.Close() // it was only to see
		if r := g.Run("restart", "--node", n.GetNodeId()); r.Code != 7 || !strings.Contains(r.Stderr, "NODE_ENDED") {
			t.Errorf("restart of an ended node: exit code %d, %s", r.Code, r.Stderr)
		}
	}
	good, bad := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "once"}), g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "once"})
	job, excused := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "job"}), g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "job"})
	finish(good, 0)
	ended(good, sutrav1.Phase_PHASE_STOPPED, 0)
	g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep", Port: good.GetPort()})
	finish(bad, 3)
	ended(bad, sutrav1.Phase_PHASE_FAILED, 3)
	finish(excused, 7)
	ended(excused, sutrav1.Phase_PHASE_STOPPED, 7)
	finish(job, 5)
	job = g.AwaitNode(job.GetNodeId(), "to be restarted", func(n *sutrav1.Node) bool { return n.GetRestartCount() > 0 })
	if err := os.Remove(filepath.Join(job.GetStoragePath(), "end")); err != nil {
		t.Fatal(err)
	}
	job = g.AwaitNode(job.GetNodeId(), "to run", func(n *sutrav1.Node) bool { return n.GetPhase() == running })

	// It ends while there is no master, and the agent is killed with what it knows.
	master.Signal(syscall.SIGKILL)
	master.Wait()
	finish(job, 0)
	harness.Await(t, "the agent to see the job's end", func() error {
		for line := range strings.Lines(string(agent.Log())) {
			if strings.Contains(line, "node ended") && strings.Contains(line, job.GetNodeId()) {
				return nil
			}
		}
		return errors.New("it doesn't say so")
	})
	agent.Signal(syscall.SIGKILL)
	agent.Wait()
	g.StartMaster()
	g.LaunchAgent("agent-001-again", filepath.Join(g.Dir, "agent-001.toml"))
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	ended(job, sutrav1.Phase_PHASE_STOPPED, 0)
	harness.Await(t, "the agent to let go of what has ended", func() error {
		for _, n := range g.Nodes(false) {
			if n.GetProfile() != "sleep" {
				return fmt.Errorf("there is %v", n)
			}
		}
		return nil
	})
}

func TestRestartVerb(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", "")
	n := g.Spawn(&sutrav1.SpawnNodeRequest{MemoryLimitMb: 64})
	id := n.GetNodeId()
	if said := g.MustRun("restart", "--node", id, "--agent", "agent-001"); !strings.Contains(said, "restarted "+id) {
		t.Errorf("said %q", said)
	}
	is := g.AwaitNode(id, "to run anew", func(is *sutrav1.Node) bool { return is.GetPhase() == running && is.GetPid() != n.GetPid() })
	if is.GetRestartCount() != 1 || is.GetPort() != n.GetPort() || is.GetStoragePath() != n.GetStoragePath() || is.GetLastExit().GetCause() != "restart asked for" {
		t.Errorf("the node was %v\nand is %v", n, is)
	}
	for _, c := range []struct {
		code   int
		reason string
		args   []string
	}{
		{7, "WRONG_AGENT", []string{"-n", id, "-a", "agent-002"}},
		{3, "NODE_NOT_FOUND", []string{"-n", "node-of-nobody"}},
		{2, "USAGE", nil},
	} {
		if r := g.Run(append([]string{"restart"}, c.args...)...); r.Code != c.code || c.code != 2 && !strings.Contains(r.Stderr, c.reason) {
			t.Errorf("restart %v: exit code %d, %s", c.args, r.Code, r.Stderr)
		}
	}
	g.MustRun("stop", "--node", id)
	if r := g.Run("restart", "--node", id); r.Code != 7 || !strings.Contains(r.Stderr, "NODE_ENDED") {
		t.Errorf("restart of a stopped node: exit code %d, %s", r.Code, r.Stderr)
	}
}

// Many nodes that are killed together come back, each once.
func TestStormOfRestarts(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", jobProfiles)
	nodes := spawnMany(t, g, 60, &sutrav1.SpawnNodeRequest{Profile: "sleep"})
	for _, n := range nodes {
		if err := syscall.Kill(int(n.GetPid()), syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	fresh := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	for _, n := range nodes {
		g.AwaitNode(n.GetNodeId(), "to run again", func(is *sutrav1.Node) bool {
			return is.GetPhase() == running && is.GetRestartCount() == 1 && is.GetPid() != n.GetPid()
		})
	}
	if ids := awaitAgreement(t, g); len(ids) != len(nodes)+1 || fresh.GetPhase() != running {
		t.Errorf("%d nodes run, want %d; the new one is %v", len(ids), len(nodes)+1, fresh)
	}
}
