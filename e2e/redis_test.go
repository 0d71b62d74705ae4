package e2e_test

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// redisProfile is the one that the README shows, and the commented example of the agent's file with it.
func redisProfile(t *testing.T) string {
	t.Helper()
	_, block, found := strings.Cut(readme(t), "```toml\n[storage.profiles.redis]\n")
	block, _, ended := strings.Cut(block, "```")
	if !found || !ended {
		t.Fatal("the README shows no profile of redis")
	}
	return "\n[storage.profiles.redis]\n" + block
}

func TestExampleShowsTheReadmesRedis(t *testing.T) {
	t.Parallel()
	example := harness.New(t).MustRun("agent", "--print-config")
	for line := range strings.Lines(strings.TrimSpace(redisProfile(t))) {
		if !strings.Contains(example, "\n#"+strings.TrimSpace(line)+"\n") {
			t.Errorf("the commented example lacks the README's line %s", line)
		}
	}
}

// Three real Redis servers: spoken to by a real client, one killed and back with its data, all stopped cleanly.
func TestRedis(t *testing.T) {
	t.Parallel()
	harness.Need(t, "redis-server")
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", "default_memory_mb = 64"+redisProfile(t))
	var nodes []*sutrav1.Node
	for i := range 3 {
		n := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "redis"})
		nodes = append(nodes, n)
		if err := connect(t, n).Set(t.Context(), "name", fmt.Sprintf("redis %d", i), 0).Err(); err != nil {
			t.Fatalf("SET on node %d: %v", i, err)
		}
	}
	killed := nodes[1]
	if err := syscall.Kill(int(killed.GetPid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	g.AwaitNode(killed.GetNodeId(), "to run again", func(n *sutrav1.Node) bool {
		return n.GetPhase() == sutrav1.Phase_PHASE_RUNNING && n.GetPid() != killed.GetPid() && n.GetRestartCount() == 1
	})
	for i, n := range nodes {
		got, err := connect(t, n).Get(t.Context(), "name").Result()
		if want := fmt.Sprintf("redis %d", i); err != nil || got != want {
			t.Errorf("GET on node %d: %q, %v; want %q", i, got, err, want)
		}
		config, err := connect(t, n).ConfigGet(t.Context(), "maxmemory").Result()
		if err != nil || config["maxmemory"] != fmt.Sprint(64<<20) {
			t.Errorf("maxmemory of node %d: %v, %v", i, config, err)
		}
	}
	for _, n := range nodes {
		resp, err := g.Client().StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: n.GetNodeId()})
		if err != nil {
			t.Fatal(err)
		}
		if exit := resp.GetNode().GetLastExit(); exit.GetCode() != 0 || exit.GetSignal() != "" {
			t.Errorf("redis ended by %v, want exit code 0", exit.Summary())
		}
	}
}

func connect(t *testing.T, n *sutrav1.Node) *redis.Client {
	t.Helper()
	c := redis.NewClient(&redis.Options{Addr: n.GetEndpoint()})
	t.Cleanup(func() { _ = c.Close() }) // its server may be gone by then
	return c
}
