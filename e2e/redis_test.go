package e2e_test

import (
	"fmt"
	"syscall"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

const redisProfile = `
[storage.profiles.redis]
storage_binary = "/usr/bin/redis-server"
args = ["--port", "{port}", "--dir", "{storage_path}", "--maxmemory", "{memory_mb}mb", "--appendonly", "yes", "--appendfsync", "always", "--set-proc-title", "no"]
`

// Three real Redis servers: spoken to by a real client, one killed and back with its data, all stopped cleanly.
func TestRedis(t *testing.T) {
	t.Parallel()
	harness.Need(t, "redis-server")
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", "default_memory_mb = 64"+redisProfile)
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
