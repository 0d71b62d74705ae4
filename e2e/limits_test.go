package e2e_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// greedy is a shell that becomes, once it may, a tail that holds the 200 MiB of a line without an end.
const greedy = `
[storage.profiles.greedy]
storage_binary = "/bin/sh"
args = ["-c", "until [ -e go ]; do sleep 0.05; done; [ -p line ] || mkfifo line; head -c 200M /dev/zero >line & exec tail <line"]
ready = "none"
cpu_weight = 50
open_files = 256
[monitoring]
heartbeat_interval_secs = 1
health_check_interval_secs = 1
`

// A node that goes beyond its memory limit is killed for it, which is said to be the reason wherever the node is shown; it
// is restarted, and as it does so again and again it is in a crash loop.
func TestMemoryLimitBites(t *testing.T) {
	t.Parallel()
	harness.Need(t, "root")
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("agent-001", greedy)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "greedy", MemoryLimitMb: 64})
	if node.GetMemoryLimit() != sutrav1.Enforcement_ENFORCEMENT_ENFORCED {
		t.Fatalf("spawned: %v", node)
	}
	if out := g.MustRun("node-status", "-n", node.GetNodeId()); !strings.Contains(out, "64 MiB (enforced)") {
		t.Errorf("it isn't said that the limit is enforced:\n%s", out)
	}
	if err := os.WriteFile(filepath.Join(node.GetStoragePath(), "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const why = "killed by SIGKILL: over its memory limit"
	first := g.AwaitNode(node.GetNodeId(), "to be killed and restarted", func(n *sutrav1.Node) bool { return n.GetRestartCount() > 0 })
	if !first.GetLastExit().GetOomKilled() || first.GetLastExit().GetSignal() != "SIGKILL" {
		t.Errorf("it ended by %v", first.GetLastExit())
	}
	g.AwaitNode(node.GetNodeId(), "to be in a crash loop", func(n *sutrav1.Node) bool {
		return n.GetPhase() == crashLoop && strings.Contains(n.GetReason(), why) && n.GetLastExit().GetOomKilled()
	})
	for _, verb := range [][]string{{"node-status", "-n", node.GetNodeId()}, {"list-nodes"}} {
		harness.Await(t, strings.Join(verb, " ")+" to say why", func() error {
			if out := g.MustRun(verb...); !strings.Contains(out, why) {
				return errors.New(out)
			}
			return nil
		})
	}
	harness.Await(t, "the agent's log to say why", func() error { return logSays(agent, why) })

	// What the agent that did the watching knew, the next one knows.
	agent.Kill()
	g.StartAgent("agent-001", greedy)
	g.AwaitNode(node.GetNodeId(), "to be known as before", func(n *sutrav1.Node) bool { return n.GetLastExit().GetOomKilled() })
	if err := os.Remove(filepath.Join(node.GetStoragePath(), "go")); err != nil {
		t.Fatal(err)
	}
	g.AwaitNode(node.GetNodeId(), "to run", func(n *sutrav1.Node) bool { return n.GetPhase() == running })
	stopAll(t, g, []string{node.GetNodeId()})
}

// What a node uses is shown by its agent's answer, and by the master alone.
func TestUsageIsShown(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", greedy)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "greedy"})
	if err := os.WriteFile(filepath.Join(node.GetStoragePath(), "data"), make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, cached := range []bool{false, true} {
		harness.Await(t, fmt.Sprintf("usage, cached: %v", cached), func() error {
			resp, err := g.Client().GetNodeStatus(t.Context(), &sutrav1.GetNodeStatusRequest{NodeId: node.GetNodeId(), CachedOnly: cached})
			if err != nil {
				return err
			}
			if u := resp.GetNode().GetUsage(); u.GetMemoryBytes() == 0 || u.GetCpuTime().AsDuration() <= 0 || u.GetOpenFiles() < 3 || u.GetDiskBytes() < 3<<20 {
				return fmt.Errorf("it is %v", u)
			}
			return nil
		})
	}
	harness.Await(t, "all of it in a table", func() error {
		out := g.MustRun("node-status", "--cached", "-n", node.GetNodeId())
		for _, part := range []string{"% of a core, ", "\nmemory  ", "\nopen files    ", "\ndisk          3.0 MiB\n"} {
			if !strings.Contains(out, part) {
				return fmt.Errorf("want %q in\n%s", part, out)
			}
		}
		return nil
	})
	stopAll(t, g, []string{node.GetNodeId()})
}

// A profile that promises more open files than its agent can give is named at the agent's start, as its spawns are refused.
func TestTooManyOpenFiles(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("agent-001", sleepProfile+"open_files = 32\n[storage.profiles.vast]\nstorage_binary = \"/bin/sleep\"\nargs = [\"100000\"]\nready = \"none\"\nopen_files = 1073741824\n")
	harness.Await(t, "the agent to say so", func() error {
		return logSays(agent, "profile vast gives a node 1073741824 open files, and this agent can give it ")
	})
	refused(t, g, 7, "BINARY_UNUSABLE", []string{"1073741824 open files", "lower open_files of profile vast"}, "spawn", "--profile", "vast")
	g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	if said := string(agent.Log()); strings.Contains(said, "profile sleep gives") || strings.Contains(said, "isn't known") {
		t.Errorf("the agent says\n%s", said)
	}
}
