package client

import (
	"context"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

func before(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(epoch.Add(-d)) }

func runningNode() *sutrav1.Node {
	return &sutrav1.Node{
		NodeId: "node-1", AgentId: "agent-001", Profile: "default",
		Phase: sutrav1.Phase_PHASE_RUNNING, Desired: sutrav1.Desired_DESIRED_RUNNING, Health: sutrav1.NodeHealth_NODE_HEALTH_READY,
		Pid: 4242, Port: 50051, Endpoint: "127.0.0.1:50051", StoragePath: "/tmp/test-storage", MemoryLimitMb: 512,
		StartedAt: before(3 * time.Minute),
	}
}

// wantJSON checks that out is one line of JSON, with snake_case names and every key, that says what want says.
func wantJSON(t *testing.T, out string, want proto.Message, keys ...string) {
	t.Helper()
	if strings.Count(out, "\n") != 1 || !strings.HasSuffix(out, "}\n") {
		t.Errorf("not one line: %q", out)
	}
	got := want.ProtoReflect().New().Interface()
	if err := protojson.Unmarshal([]byte(out), got); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, protocmp.Transform()); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	for _, key := range keys {
		if !strings.Contains(out, `"`+key+`":`) {
			t.Errorf("%s lacks %s", out, key)
		}
	}
}

func TestSpawn(t *testing.T) {
	answer := &sutrav1.SpawnNodeResponse{Node: runningNode()}
	f := serve(t, &fakeMaster{onSpawn: func(context.Context, *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
		return answer, nil
	}})
	out, _ := ask(t, f, "spawn", "-a", "agent-001", "-p", "50051", "--storage-path", "/tmp/test-storage",
		"--memory", "512", "--profile", "redis", "--request-id", "r1")
	diff(t, out, `
node          node-1
agent         agent-001
endpoint      127.0.0.1:50051
pid           4242
storage path  /tmp/test-storage
`)
	out, _ = ask(t, f, "spawn", "--request-id", "r2", "-o", "json")
	wantJSON(t, out, answer, "node_id", "restart_count", "last_exit")
	wantRequests(t, f,
		&sutrav1.SpawnNodeRequest{
			RequestId: "r1", AgentId: "agent-001", Profile: "redis", Port: 50051, StoragePath: "/tmp/test-storage", MemoryLimitMb: 512,
		},
		&sutrav1.SpawnNodeRequest{RequestId: "r2"})

	home := t.TempDir()
	announceMaster(t, home, config.Local{Endpoint: f.endpoint})
	t.Setenv("SUTRA_MASTER", "")
	t.Setenv("SUTRA_HOME", home)
	odd := filepath.Join(t.TempDir(), "an odd 'home'")
	announceMaster(t, odd, config.Local{Endpoint: f.endpoint})
	for _, c := range []struct {
		call string
		args []string
		want string
	}{
		{"sutra", []string{"spawn"}, "sutra"},
		{"go run .", []string{"spawn"}, "go run ."},
		{"sutra", []string{"spawn", "--master", f.endpoint}, "sutra --master " + f.endpoint},
		{"./bin/sutra", []string{"--master", f.endpoint, "--home", home, "spawn"}, "./bin/sutra --master " + f.endpoint + " --home " + home},
		{"sutra", []string{"--home", odd, "spawn"}, "sutra --home '" + strings.ReplaceAll(odd, "'", `'\''`) + "'"},
	} {
		term := newTerminal()
		term.OutTTY, term.Call = true, c.call
		if err := term.run(t.Context(), c.args...); err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(term.out.String(), "\nnext:\n  "+c.want+" node-status --node node-1\n  "+c.want+" stop --node node-1\n") {
			t.Errorf("%v: want next commands of %s:\n%s", c.args, c.want, term.out.String())
		}
	}
}

// Each spawn is a wish of its own unless its user says otherwise.
func TestSpawnMakesUpRequestIDs(t *testing.T) {
	f := serve(t, &fakeMaster{onSpawn: func(context.Context, *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
		return &sutrav1.SpawnNodeResponse{}, nil
	}})
	ask(t, f, "spawn")
	ask(t, f, "spawn")
	seen := f.requests()
	first, second := seen[0].(*sutrav1.SpawnNodeRequest).GetRequestId(), seen[1].(*sutrav1.SpawnNodeRequest).GetRequestId()
	if first == "" || second == "" || first == second {
		t.Errorf("%q and %q", first, second)
	}
}

func TestInterruptedSpawnSaysHowToFindItsNode(t *testing.T) {
	arrived := make(chan struct{})
	f := serve(t, &fakeMaster{onSpawn: func(ctx context.Context, _ *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
		close(arrived)
		<-ctx.Done()
		return nil, ctx.Err()
	}})
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	go func() {
		<-arrived
		interrupt()
	}()
	term := newTerminal()
	err := term.run(ctx, "spawn", "--request-id", "r1", "--master", f.endpoint)
	if ExitCode(err) != exitFailed {
		t.Errorf("exit code %d", ExitCode(err))
	}
	PrintError(term.Streams, false, err)
	diff(t, term.err.String(), `
error: the spawn was interrupted, its node may still start (request id r1) (CANCELED)
hint: sutra list-nodes shows it; sutra spawn with the same flags and --request-id r1 gives the same node
`)
	if term.out.Len() != 0 {
		t.Errorf("stdout: %s", term.out.String())
	}
}

// What the master knows better isn't overwritten, and a refusal started nothing.
func TestSpawnKeepsTheMastersWords(t *testing.T) {
	cases := map[string]struct {
		err  error
		want string
	}{
		"refused": {
			rpc.Errorf(rpc.PortInUse, "port 50051 belongs to node-9").With("node_id", "node-9").WithHint("leave out the port"),
			"error: port 50051 belongs to node-9 (PORT_IN_USE)\nhint: leave out the port\n",
		},
		"no agent": {
			rpc.Errorf(rpc.NoAgentAvailable, "no agent is registered"),
			"error: no agent is registered (NO_AGENT_AVAILABLE)\n",
		},
		"named with hint": {
			rpc.Errorf(rpc.NotReadyYet, "node-1 isn't ready yet").With("node_id", "node-1").WithHint("look later"),
			"error: node-1 isn't ready yet (NOT_READY_YET)\nhint: look later\n",
		},
		"nothing started": {
			rpc.Errorf(rpc.AgentUnreachable, "can't reach agent-001; nothing was started").With("agent_id", "agent-001").WithHint("sutra list-agents"),
			"error: can't reach agent-001; nothing was started (AGENT_UNREACHABLE)\nhint: sutra list-agents\n",
		},
		"named without hint": {
			rpc.Errorf(rpc.AgentUnreachable, "agent-001 went away").With("node_id", "node-1"),
			"error: agent-001 went away; the node may still start (request id r1) (AGENT_UNREACHABLE)\n" +
				"hint: sutra node-status --node node-1 shows it; sutra spawn with the same flags and --request-id r1 gives the same node\n",
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			f := serve(t, &fakeMaster{onSpawn: func(context.Context, *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
				return nil, c.err
			}})
			said, _ := refused(t, f, "spawn", "--request-id", "r1")
			diff(t, said, c.want)
		})
	}
}

func TestErrorOfAVerbAsJSON(t *testing.T) {
	f := serve(t, &fakeMaster{onNodeStatus: func(*sutrav1.GetNodeStatusRequest) (*sutrav1.GetNodeStatusResponse, error) {
		return nil, rpc.Errorf(rpc.NodeNotFound, "nobody knows node-x").With("node_id", "node-x")
	}})
	said, err := refused(t, f, "node-status", "-n", "node-x", "-o", "json")
	var got struct{ Error failure }
	if jsonErr := json.Unmarshal([]byte(said), &got); jsonErr != nil {
		t.Fatal(jsonErr)
	}
	if ExitCode(err) != exitNotFound || got.Error.Reason != "NODE_NOT_FOUND" || got.Error.Code != "NOT_FOUND" ||
		got.Error.Metadata["node_id"] != "node-x" {
		t.Errorf("exit %d, %s", ExitCode(err), said)
	}
}

func TestStop(t *testing.T) {
	exited := func(e *sutrav1.Exit) *sutrav1.Node { return &sutrav1.Node{NodeId: "node-1", LastExit: e} }
	cases := []struct {
		answer *sutrav1.StopNodeResponse
		want   string
	}{
		{&sutrav1.StopNodeResponse{Node: exited(&sutrav1.Exit{})}, "stopped node-1 (exit code 0)\n"},
		{&sutrav1.StopNodeResponse{Node: exited(&sutrav1.Exit{Signal: "SIGKILL"})}, "stopped node-1 (killed by SIGKILL)\n"},
		{&sutrav1.StopNodeResponse{Node: exited(nil)}, "stopped node-1\n"},
		{&sutrav1.StopNodeResponse{Node: exited(&sutrav1.Exit{}), AlreadyStopped: true}, "node-1 was already stopped (exit code 0)\n"},
		{&sutrav1.StopNodeResponse{AlreadyStopped: true}, "no such node: nothing to stop (node-1)\n"},
	}
	for _, c := range cases {
		f := serve(t, &fakeMaster{onStop: func(*sutrav1.StopNodeRequest) (*sutrav1.StopNodeResponse, error) { return c.answer, nil }})
		out, _ := ask(t, f, "stop", "--node", "node-1", "--agent", "agent-001")
		diff(t, out, c.want)
		out, errs := ask(t, f, "stop", "-n", "node-1", "-o", "json")
		wantJSON(t, out, c.answer, "already_stopped")
		if errs != "" {
			t.Errorf("stderr with json: %s", errs)
		}
		wantRequests(t, f, &sutrav1.StopNodeRequest{NodeId: "node-1", AgentId: "agent-001"}, &sutrav1.StopNodeRequest{NodeId: "node-1"})
	}
}

func TestRestart(t *testing.T) {
	answer := &sutrav1.RestartNodeResponse{Node: &sutrav1.Node{NodeId: "node-1", Pid: 4711, RestartCount: 3}}
	f := serve(t, &fakeMaster{onRestart: func(*sutrav1.RestartNodeRequest) (*sutrav1.RestartNodeResponse, error) { return answer, nil }})
	out, _ := ask(t, f, "restart", "--node", "node-1", "--agent", "agent-001")
	diff(t, out, "restarted node-1 (pid 4711, 3 restarts so far)\n")
	out, errs := ask(t, f, "restart", "-n", "node-1", "-o", "json")
	wantJSON(t, out, answer, "restart_count")
	if errs != "" {
		t.Errorf("stderr with json: %s", errs)
	}
	wantRequests(t, f, &sutrav1.RestartNodeRequest{NodeId: "node-1", AgentId: "agent-001"}, &sutrav1.RestartNodeRequest{NodeId: "node-1"})
}

func TestRemove(t *testing.T) {
	for _, c := range []struct {
		already bool
		want    string
	}{
		{false, "removed node-1; its data and its log stay on the agent's host\n"},
		{true, "no such node: nothing to remove (node-1)\n"},
	} {
		answer := &sutrav1.RemoveNodeResponse{AlreadyRemoved: c.already}
		f := serve(t, &fakeMaster{onRemove: func(*sutrav1.RemoveNodeRequest) (*sutrav1.RemoveNodeResponse, error) { return answer, nil }})
		out, _ := ask(t, f, "remove", "-n", "node-1")
		diff(t, out, c.want)
		out, _ = ask(t, f, "remove", "-n", "node-1", "-o", "json")
		wantJSON(t, out, answer, "already_removed")
		wantRequests(t, f, &sutrav1.RemoveNodeRequest{NodeId: "node-1"}, &sutrav1.RemoveNodeRequest{NodeId: "node-1"})
	}
}

func TestStatus(t *testing.T) {
	answer := &sutrav1.GetClusterStatusResponse{
		GridId: "grid-1", Health: sutrav1.ClusterHealth_CLUSTER_HEALTH_DEGRADED,
		Reasons: []string{"agent-002 is OFFLINE", "evil \x1b[2J"}, Version: "0.1.0", StartedAt: before(2 * time.Hour),
		AgentsByHealth: map[string]uint32{"OFFLINE": 1, "HEALTHY": 2, "DEGRADED": 0},
		NodesByPhase:   map[string]uint32{"STOPPED": 6, "RUNNING": 3, "FAILED": 1, "HIBERNATING": 2},
		MaxNodes:       15, SlotsTaken: 4,
	}
	f := serve(t, &fakeMaster{onStatus: func() (*sutrav1.GetClusterStatusResponse, error) { return answer, nil }})
	out, _ := ask(t, f, "status")
	diff(t, out, `
grid      DEGRADED
reason    agent-002 is OFFLINE
reason    evil \x1b[2J
agents    2 HEALTHY, 1 OFFLINE
nodes     3 RUNNING, 6 STOPPED, 1 FAILED, 2 HIBERNATING
capacity  4 of 15 nodes taken
master    0.1.0 at `+f.endpoint+`, up 2h
grid id   grid-1
security  none: everything is sent in the clear (--insecure)
`)
	out, _ = ask(t, f, "status", "-o", "json")
	wantJSON(t, out, answer, "agents_by_health")
}

func TestNodeStatus(t *testing.T) {
	crashed := runningNode()
	crashed.Phase, crashed.Health, crashed.Pid, crashed.StartedAt = sutrav1.Phase_PHASE_CRASH_LOOP, 0, 0, nil
	crashed.RestartCount, crashed.Reason, crashed.MemoryLimitMb = 7, "next try in 8s", 0
	crashed.ObservedAt = before(12 * time.Second)
	crashed.LastExit = &sutrav1.Exit{Signal: "SIGSEGV", At: before(9 * time.Second), Output: "one\n\x1b[2Jtwo\n"}
	measured := runningNode()
	measured.MemoryLimit = sutrav1.Enforcement_ENFORCEMENT_UNENFORCED
	measured.LastExit = &sutrav1.Exit{Signal: "SIGKILL", OomKilled: true, At: before(9 * time.Second)}
	measured.Usage = &sutrav1.Usage{
		CpuTime: durationpb.New(61300 * time.Millisecond), CpuCores: 1.504, MemoryBytes: 5 << 29, OpenFiles: 7, DiskBytes: 4096,
	}
	cases := []struct {
		answer *sutrav1.GetNodeStatusResponse
		want   string
	}{
		{&sutrav1.GetNodeStatusResponse{Node: runningNode(), Source: sutrav1.Source_SOURCE_LIVE}, `
node          node-1
agent         agent-001
profile       default
phase         RUNNING (desired RUNNING)
health        READY
source        LIVE
pid           4242
endpoint      127.0.0.1:50051
storage path  /tmp/test-storage
memory limit  512 MiB
started       2026-03-01T11:57:00Z (3m ago)
cpu           -
memory        -
open files    -
disk          -
restarts      0
last exit     -
`},
		{&sutrav1.GetNodeStatusResponse{
			Node: crashed, Source: sutrav1.Source_SOURCE_CACHED, Reason: "agent-001 didn't answer",
		}, `
node          node-1
agent         agent-001
profile       default
phase         CRASH_LOOP (desired RUNNING)
reason        next try in 8s
health        -
source        CACHED, observed 12s ago: agent-001 didn't answer
pid           -
endpoint      127.0.0.1:50051
storage path  /tmp/test-storage
memory limit  -
started       -
cpu           -
memory        -
open files    -
disk          -
restarts      7
last exit     killed by SIGSEGV, 9s ago
  | one
  | \x1b[2Jtwo
`},
		{&sutrav1.GetNodeStatusResponse{Node: measured, Source: sutrav1.Source_SOURCE_LIVE}, `
node          node-1
agent         agent-001
profile       default
phase         RUNNING (desired RUNNING)
health        READY
source        LIVE
pid           4242
endpoint      127.0.0.1:50051
storage path  /tmp/test-storage
memory limit  512 MiB (unenforced)
started       2026-03-01T11:57:00Z (3m ago)
cpu           150.4% of a core, 61.3s since its start
memory        2.5 GiB
open files    7
disk          4.0 KiB
restarts      0
last exit     killed by SIGKILL: over its memory limit, 9s ago
`},
	}
	for _, c := range cases {
		f := serve(t, &fakeMaster{onNodeStatus: func(*sutrav1.GetNodeStatusRequest) (*sutrav1.GetNodeStatusResponse, error) { return c.answer, nil }})
		out, _ := ask(t, f, "node-status", "--node", "node-1")
		diff(t, out, c.want)
		out, _ = ask(t, f, "node-status", "--cached", "-n", "node-1", "-o", "json")
		wantJSON(t, out, c.answer, "observed_at", "storage_path")
		wantRequests(t, f, &sutrav1.GetNodeStatusRequest{NodeId: "node-1"}, &sutrav1.GetNodeStatusRequest{NodeId: "node-1", CachedOnly: true})
	}
}

func TestNeverObserved(t *testing.T) {
	got := sourceText(&sutrav1.GetNodeStatusResponse{Source: sutrav1.Source_SOURCE_CACHED, Reason: "x"}, epoch)
	if got != "CACHED, never observed: x" {
		t.Error(got)
	}
}

func TestListNodes(t *testing.T) {
	starting := &sutrav1.Node{NodeId: "node-2", AgentId: "agent-\x1b[31m2", Phase: sutrav1.Phase_PHASE_STARTING, Reason: "line\nbreak"}
	running := runningNode()
	running.ObservedAt = before(4 * time.Second)
	answer := &sutrav1.ListNodesResponse{Nodes: []*sutrav1.Node{running, starting}}
	f := serve(t, &fakeMaster{onListNodes: func(*sutrav1.ListNodesRequest) (*sutrav1.ListNodesResponse, error) { return answer, nil }})
	out, _ := ask(t, f, "list-nodes")
	diff(t, out, `
NODE    AGENT            PHASE     HEALTH  PID   PORT   RESTARTS  AGE  SEEN  REASON
node-1  agent-001        RUNNING   READY   4242  50051  0         3m   4s    -
node-2  agent-\x1b[31m2  STARTING  -       -     -      0         -    -     line\nbreak
`)
	out, _ = ask(t, f, "list-nodes", "-a", "agent-001", "--all", "-o", "json")
	wantJSON(t, out, answer, "nodes", "observed_at")
	wantRequests(t, f, &sutrav1.ListNodesRequest{}, &sutrav1.ListNodesRequest{AgentId: "agent-001", IncludeEnded: true})
}

func TestListAgents(t *testing.T) {
	answer := &sutrav1.ListAgentsResponse{Agents: []*sutrav1.Agent{
		{
			AgentId: "agent-001", Endpoint: "10.0.0.5:8001", Platform: "linux/amd64", Version: "0.1.0", MaxNodes: 5, NodeCount: 2,
			Health: sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY, LastHeartbeat: before(2 * time.Second), Draining: true,
		},
		{AgentId: "agent-002", Health: sutrav1.AgentHealth_AGENT_HEALTH_UNKNOWN, MaxNodes: 10},
	}}
	f := serve(t, &fakeMaster{onListAgents: func() (*sutrav1.ListAgentsResponse, error) { return answer, nil }})
	out, _ := ask(t, f, "list-agents")
	diff(t, out, `
AGENT      HEALTH            LAST-BEAT  NODES  ENDPOINT       PLATFORM     VERSION
agent-001  HEALTHY,DRAINING  2s         2/5    10.0.0.5:8001  linux/amd64  0.1.0
agent-002  UNKNOWN           -          0/10   -              -            -
`)
	out, _ = ask(t, f, "list-agents", "-o", "json")
	wantJSON(t, out, answer, "agents", "last_heartbeat")
}

func TestBans(t *testing.T) {
	answer := &sutrav1.ListBansResponse{Bans: []*sutrav1.BanRecord{
		{AgentId: "agent-001", BannedBy: "user admin", BannedAt: timestamppb.New(epoch)},
		{User: "anna", BannedBy: "user admin", BannedAt: timestamppb.New(epoch.Add(time.Hour)), Reason: "left \x1b[2J"},
	}}
	f := serve(t, &fakeMaster{onListBans: func() (*sutrav1.ListBansResponse, error) { return answer, nil }})
	out, _ := ask(t, f, "list-bans")
	diff(t, out, `
KIND   NAME       SINCE                 BY          WHY
agent  agent-001  2026-03-01T12:00:00Z  user admin  -
user   anna       2026-03-01T13:00:00Z  user admin  left \x1b[2J
`)
	out, _ = ask(t, f, "list-bans", "-o", "json")
	wantJSON(t, out, answer, "bans", "banned_by")
	wantRequests(t, f, &sutrav1.ListBansRequest{}, &sutrav1.ListBansRequest{})
}

// An empty list is said in words that don't get into a pipe, and is a document all the same.
func TestEmptyLists(t *testing.T) {
	f := serve(t, &fakeMaster{
		onListNodes: func(*sutrav1.ListNodesRequest) (*sutrav1.ListNodesResponse, error) {
			return &sutrav1.ListNodesResponse{}, nil
		},
		onListAgents: func() (*sutrav1.ListAgentsResponse, error) { return &sutrav1.ListAgentsResponse{}, nil },
		onListBans:   func() (*sutrav1.ListBansResponse, error) { return &sutrav1.ListBansResponse{}, nil },
	})
	for args, want := range map[string]string{
		"list-agents":        "no agent is registered; start one with: sutra agent --config agent.toml\n",
		"list-nodes":         "there is no node; start one with: sutra spawn   and see those that ended with: sutra list-nodes --all\n",
		"list-nodes -a a1":   "there is no node on a1; start one with: sutra spawn --agent a1   and see those that ended with: sutra list-nodes --all\n",
		"list-nodes --all":   "there is no node; start one with: sutra spawn\n",
		"list-bans":          "nobody is banned; sutra agents ban and sutra users ban keep somebody out\n",
		"list-nodes -o json": "", "list-agents -o json": "", "list-bans -o json": "",
	} {
		out, errs := ask(t, f, strings.Fields(args)...)
		diff(t, errs, want)
		if isJSON := strings.HasPrefix(out, "{"); isJSON != (want == "") || !isJSON && out != "" {
			t.Errorf("%s: stdout %q", args, out)
		}
	}
}

func TestColourOnATerminalOnly(t *testing.T) {
	f := serve(t, &fakeMaster{onStatus: healthyGrid})
	for _, c := range []struct{ tty, color, want bool }{{true, true, true}, {true, false, false}, {false, true, false}} {
		term := newTerminal()
		term.OutTTY, term.Color = c.tty, c.color
		if err := term.run(t.Context(), "status", "--master", f.endpoint); err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(term.out.String(), "\x1b[32mHEALTHY"); got != c.want {
			t.Errorf("%+v:\n%q", c, term.out.String())
		}
	}
}
