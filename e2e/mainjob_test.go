package e2e_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// The whole round of the quick start, with the verbs that a person types.
func TestQuickStart(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("agent-001", "max_nodes = 5")
	for _, said := range []string{"agent listening", "registered with the master", "heartbeat loop started"} {
		harness.Await(t, "the agent to say so", func() error { return logSays(agent, said) })
	}
	storage := filepath.Join(g.Dir, "test-storage")
	port := fmt.Sprint(g.FreePort())

	if out := g.MustRun("list-agents"); !strings.Contains(out, "agent-001") || !strings.Contains(out, "HEALTHY") {
		t.Errorf("list-agents:\n%s", out)
	}
	var spawned struct {
		Node struct {
			NodeID   string `json:"node_id"`
			Phase    string
			Endpoint string
		}
	}
	out := g.MustRun("spawn", "--agent", "agent-001", "--port", port, "--storage-path", storage, "-o", "json")
	if err := json.Unmarshal([]byte(out), &spawned); err != nil {
		t.Fatalf("spawn -o json: %v\n%s", err, out)
	}
	id := spawned.Node.NodeID
	if spawned.Node.Phase != "PHASE_RUNNING" || spawned.Node.Endpoint != "127.0.0.1:"+port {
		t.Errorf("spawned: %s", out)
	}
	if out := g.MustRun("status"); !strings.Contains(out, "HEALTHY") || !strings.Contains(out, "1 RUNNING") {
		t.Errorf("status:\n%s", out)
	}
	if out := g.MustRun("node-status", "--node", id); !strings.Contains(out, "LIVE") || !strings.Contains(out, storage) {
		t.Errorf("node-status:\n%s", out)
	}
	if out := g.MustRun("list-nodes", "-a", "agent-001"); !strings.Contains(out, id) {
		t.Errorf("list-nodes:\n%s", out)
	}
	g.MustRun("stop", "--node", id, "--agent", "agent-001")
	if left := g.NodeProcesses(); len(left) > 0 {
		t.Errorf("after stop there are processes: %v", left)
	}
	l, err := net.Listen("tcp", ":"+port)
	if err != nil {
		t.Fatalf("after stop the port isn't free: %v", err)
	}
	_ = l.Close() // it was only to see
	if out := g.MustRun("stop", "-n", id); !strings.Contains(out, "already stopped") {
		t.Errorf("second stop: %s", out)
	}
	if out := g.MustRun("smoke"); !strings.Contains(out, "9 of 9 steps passed") {
		t.Errorf("smoke:\n%s", out)
	}
	if left := g.NodeProcesses(); len(left) > 0 {
		t.Errorf("after smoke there are processes: %v", left)
	}
}

// A node that is killed comes back, with another pid and every key that it had acknowledged.
func TestKilledNodeComesBackWithItsKeys(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", "")
	node := g.Spawn(&sutrav1.SpawnNodeRequest{})
	acknowledged := map[string]string{}
	for i := range 50 {
		key, value := fmt.Sprintf("key/%d", i), fmt.Sprintf("value %d", i)
		putKey(t, node.GetEndpoint(), key, value)
		acknowledged[key] = value
	}
	if err := syscall.Kill(int(node.GetPid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	again := g.AwaitNode(node.GetNodeId(), "to run with another pid", func(n *sutrav1.Node) bool {
		return n.GetPhase() == sutrav1.Phase_PHASE_RUNNING && n.GetPid() != node.GetPid()
	})
	if again.GetRestartCount() != 1 || again.GetLastExit().GetSignal() != "SIGKILL" || again.GetPort() != node.GetPort() {
		t.Errorf("after the kill: %v", again)
	}
	found := map[string]string{}
	for key := range acknowledged {
		found[key] = getKey(t, node.GetEndpoint(), key)
	}
	if diff := cmp.Diff(acknowledged, found); diff != "" {
		t.Errorf("keys before and after (-want +got):\n%s", diff)
	}
}

func putKey(t *testing.T, endpoint, key, value string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, "http://"+endpoint+"/kv/"+key, strings.NewReader(value))
	if err != nil {
		t.Fatal(err)
	}
	if code, body := do(t, req); code != http.StatusNoContent {
		t.Fatalf("PUT %s: %d %s", key, code, body)
	}
}

func getKey(t *testing.T, endpoint, key string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+endpoint+"/kv/"+key, nil)
	if err != nil {
		t.Fatal(err)
	}
	code, body := do(t, req)
	if code != http.StatusOK {
		t.Fatalf("GET %s: %d %s", key, code, body)
	}
	return body
}

func do(t *testing.T, req *http.Request) (code int, body string) {
	t.Helper()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

// A whole grid in one process: it says where everything is, answers, and takes all of it along when it ends.
func TestDev(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		g := harness.New(t)
		dev := g.Launch("dev-"+sig.String(), "dev")
		where := regexp.MustCompile(`master\s+(\S+)`)
		harness.Await(t, "dev to greet", func() error {
			if !bytes.Contains(dev.Log(), []byte("Ctrl-C stops all of it.")) {
				return fmt.Errorf("it said: %s", dev.Log())
			}
			return nil
		})
		said := dev.Log()
		master := string(where.FindSubmatch(said)[1])
		out := g.MustRun("--master", master, "status")
		if !strings.Contains(out, "HEALTHY") || !strings.Contains(out, "1 RUNNING") {
			t.Errorf("status of dev:\n%s", out)
		}
		home := string(regexp.MustCompile(`home\s+(\S+)`).FindSubmatch(said)[1])
		pid := regexp.MustCompile(`pid (\d+)`).FindSubmatch(said)[1]
		agents, err := filepath.Glob(filepath.Join(home, "agents", "*", "instance_id"))
		if err != nil || len(agents) != 1 {
			t.Fatalf("agents in dev's home: %v, %v", agents, err)
		}
		instance, err := os.ReadFile(agents[0])
		if err != nil {
			t.Fatal(err)
		}
		dev.Signal(sig)
		if code := dev.Wait(); code != 0 {
			t.Errorf("dev ended with %d", code)
		}
		if left := harness.AgentGroups(string(instance)); len(left) > 0 {
			t.Errorf("the control groups %v are still there", left)
		}
		if _, err := os.Stat(home); !os.IsNotExist(err) {
			t.Errorf("the temporary home %s is still there: %v", home, err)
		}
		if _, err := os.Stat("/proc/" + string(pid)); !os.IsNotExist(err) {
			t.Errorf("the node's process %s is still there", pid)
		}
	}
}

// A home that is kept gives the same node with the same data the next time. This runs beside no other test, whose node could
// take the port while the kept one is away.
func TestDevKeepsItsHome(t *testing.T) {
	g := harness.New(t)
	home := filepath.Join(g.Dir, "kept")
	var ids, values []string
	for round := range 2 {
		dev := g.Launch(fmt.Sprintf("dev-%d", round), "dev", "--home", home)
		harness.Await(t, "dev to greet", func() error {
			if !bytes.Contains(dev.Log(), []byte("Ctrl-C stops all of it.")) {
				return fmt.Errorf("it said: %s", dev.Log())
			}
			return nil
		})
		found := regexp.MustCompile(`node\s+(\S+) at ([^,]+),`).FindSubmatch(dev.Log())
		ids = append(ids, string(found[1]))
		if round == 0 {
			putKey(t, string(found[2]), "k", "kept")
		}
		values = append(values, getKey(t, string(found[2]), "k"))
		dev.Stop()
	}
	if ids[0] != ids[1] || values[1] != "kept" {
		t.Errorf("nodes %v, values %v", ids, values)
	}
}
