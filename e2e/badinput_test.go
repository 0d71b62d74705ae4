package e2e_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

const badProfiles = `
max_nodes = 2
default_memory_mb = 64
[storage.profiles.sleep]
storage_binary = "/bin/sleep"
args = ["100000"]
ready = "none"
[storage.profiles.dies]
storage_binary = "/bin/sh"
args = ["-c", "echo out of cheese; touch made-before-the-end; echo 'no \u001b[31mmore' >&2; exit 3"]
[storage.profiles.killed]
storage_binary = "/bin/sh"
args = ["-c", "kill -KILL $$"]
[storage.profiles.missing]
storage_binary = "./no-such-server"
[storage.profiles.folder]
storage_binary = "."
[storage.profiles.data]
storage_binary = "./data.txt"
[storage.profiles.garbage]
storage_binary = "./garbage"
`

// A spawn that can't be, in every way that a command line allows: it is refused, and nothing is left of it.
func TestRefusedSpawns(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	writeFile(t, filepath.Join(g.Dir, "data.txt"), "no program", 0o600)
	writeFile(t, filepath.Join(g.Dir, "garbage"), "\x7fELF, or not", 0o700)
	inTheWay := writeFile(t, filepath.Join(g.Dir, "in-the-way"), "kept", 0o600)
	g.StartAgent("a1", badProfiles)
	taken, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	takenPort := fmt.Sprint(taken.Addr().(*net.TCPAddr).Port)
	long := strings.Repeat("x", 65)
	const ids = "letters, digits, - _ and . are allowed"

	for _, c := range []struct {
		name   string
		args   []string
		code   int
		reason string
		words  []string
	}{
		{"port 0", []string{"-p", "0"}, 2, "USAGE", []string{"--port 0", "1024-65535", "hint: "}},
		{"port negative", []string{"-p", "-1"}, 2, "USAGE", []string{"--port -1", "1024-65535"}},
		{"port 70000", []string{"-p", "70000"}, 2, "USAGE", []string{"--port 70000", "out of range", "1024-65535"}},
		{"port privileged", []string{"-p", "80"}, 2, "USAGE", []string{"--port 80", "privileged", "1024-65535"}},
		{"port of letters", []string{"--port", "NaN"}, 2, "USAGE", []string{`"NaN"`, "--port", "digits only"}},
		{"port not given", []string{"--port"}, 2, "USAGE", []string{"--port", "--help"}},
		{"port of another process", []string{"-p", takenPort}, 7, "PORT_IN_USE", []string{takenPort, "another process", "ss -ltnp"}},
		{"memory 0", []string{"--memory", "0"}, 2, "USAGE", []string{"--memory 0", "at least 1 MiB"}},
		{"memory negative", []string{"--memory", "-1"}, 2, "USAGE", []string{`"-1"`, "--memory"}},
		{"memory NaN", []string{"--memory", "NaN"}, 2, "USAGE", []string{`"NaN"`, "--memory"}},
		{"memory in bytes", []string{"--memory", "17592186044416000"}, 2, "USAGE", []string{"--memory 17592186044416000", "MiB, not bytes"}},
		{"memory in KiB", []string{"--memory", "2000000000"}, 2, "INVALID_ARGUMENT", []string{"memory_limit_mb", "MiB, not bytes"}},
		{"memory over the host's", []string{"--memory", "1000000000"}, 7, "MEMORY_OVER_COMMITTED", []string{"1000000000 MiB", "a1", "hint: ", "--memory"}},
		{"memory over the named host's", []string{"-a", "a1", "--memory", "1000000000"}, 7, "MEMORY_OVER_COMMITTED", []string{"1000000000 MiB", "a1"}},
		{"agent odd", []string{"-a", "a b"}, 2, "INVALID_ARGUMENT", []string{`agent_id "a b"`, ids}},
		{"agent too long", []string{"-a", long}, 2, "INVALID_ARGUMENT", []string{"agent_id", "65", ids}},
		{"agent a folder", []string{"-a", ".."}, 2, "INVALID_ARGUMENT", []string{`agent_id ".."`, ids}},
		{"agent unknown", []string{"-a", "nope"}, 3, "AGENT_NOT_REGISTERED", []string{"nope", "sutra list-agents"}},
		{"request id odd", []string{"--request-id", "a/b"}, 2, "INVALID_ARGUMENT", []string{`request_id "a/b"`, ids}},
		{"request id too long", []string{"--request-id", long}, 2, "INVALID_ARGUMENT", []string{"request_id", ids}},
		{"profile odd", []string{"--profile", "a b"}, 2, "INVALID_ARGUMENT", []string{`profile "a b"`, ids}},
		{"profile unknown anywhere", []string{"--profile", "nope"}, 2, "INVALID_ARGUMENT", []string{`no agent has "nope"`, "data, default,", "storage.profiles.nope"}},
		{"path in the home", []string{"--storage-path", filepath.Join(g.Home, "master")}, 2, "INVALID_ARGUMENT", []string{"storage_path", g.Home, "elsewhere"}},
		{"path around the home", []string{"--storage-path", g.Dir}, 2, "INVALID_ARGUMENT", []string{"storage_path", g.Home, "elsewhere"}},
		{"profile unknown there", []string{"-a", "a1", "--profile", "nope"}, 2, "INVALID_ARGUMENT", []string{`"nope"`, "it has: data, default,", "storage.profiles.nope"}},
		{"binary missing", []string{"--profile", "missing"}, 7, "BINARY_UNUSABLE", []string{g.Dir + "/no-such-server", "doesn't exist", "storage_binary"}},
		{"binary a folder", []string{"--profile", "folder"}, 7, "BINARY_UNUSABLE", []string{g.Dir, "isn't a file", "storage_binary"}},
		{"binary not executable", []string{"--profile", "data"}, 7, "BINARY_UNUSABLE", []string{g.Dir + "/data.txt", "isn't executable", "storage_binary"}},
		{"binary no program", []string{"--profile", "garbage"}, 7, "BINARY_UNUSABLE", []string{g.Dir + "/garbage", "exec format error", "storage_binary"}},
		{"path relative", []string{"--storage-path", "data"}, 2, "INVALID_ARGUMENT", []string{"storage_path", "absolute", "for example /"}},
		{"path with ..", []string{"--storage-path", "/tmp/../etc"}, 2, "INVALID_ARGUMENT", []string{"storage_path", `".."`}},
		{"path /", []string{"--storage-path", "/"}, 2, "INVALID_ARGUMENT", []string{"storage_path", "root folder"}},
		{"path too long", []string{"--storage-path", "/" + strings.Repeat("x/", 2000)}, 2, "INVALID_ARGUMENT", []string{"storage_path", "too long"}},
		{"path with a line break", []string{"--storage-path", "/tmp/a\nb"}, 2, "INVALID_ARGUMENT", []string{"storage_path", "control characters"}},
		{"path a file", []string{"--storage-path", inTheWay}, 7, "PATH_UNUSABLE", []string{inTheWay, "not a directory", "hint: "}},
		{"path below a file", []string{"--storage-path", inTheWay + "/x/y"}, 7, "PATH_UNUSABLE", []string{inTheWay + "/x/y", "not a directory", "hint: "}},
		{"path where nobody may write", []string{"--storage-path", "/proc/x"}, 7, "PATH_UNUSABLE", []string{"/proc/x", "hint: "}},
		{"dies", []string{"--profile", "dies"}, 1, "NODE_DIED_EARLY", []string{"exit code 3", "| out of cheese\n", `| no \x1b[31mmore`, "profile dies"}},
		{"is killed", []string{"--profile", "killed"}, 1, "NODE_DIED_EARLY", []string{"killed by SIGKILL", "profile killed"}},
		{"dies elsewhere", []string{"--profile", "dies", "--storage-path", filepath.Join(g.Dir, "new", "place")}, 1, "NODE_DIED_EARLY", []string{"exit code 3"}},
		{"stray argument", []string{"a1"}, 2, "USAGE", []string{`"a1"`, "--agent a1"}},
		{"unknown flag", []string{"--prot", "5000"}, 2, "USAGE", []string{"unknown flag --prot", "--help"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := refused(t, g, c.code, c.reason, c.words, append([]string{"spawn"}, c.args...)...)
			if c.reason == "NODE_DIED_EARLY" && c.name != "is killed" {
				if e := f.Error.Exit; e == nil || e.Code != 3 || !strings.Contains(e.Output, "out of cheese") {
					t.Errorf("the JSON error's exit is %+v", e)
				}
			}
			nothingLeft(t, g, "a1")
		})
	}
	absent(t, filepath.Join(g.Dir, "new"))
	absent(t, filepath.Join(g.Dir, "data"))
	if kept, err := os.ReadFile(inTheWay); err != nil || string(kept) != "kept" {
		t.Errorf("the file in the way holds %q: %v", kept, err)
	}

	// After all this both work as if nothing had been. Then the agent is full.
	first := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep", RequestId: "wish"})
	g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	refused(t, g, 7, "AGENT_FULL", []string{"a1 is full", "2 of at most 2", "max_nodes"}, "spawn", "--profile", "sleep")
	refused(t, g, 7, "AGENT_FULL", []string{"a1 is full", "max_nodes"}, "spawn", "-a", "a1")
	refused(t, g, 7, "PORT_IN_USE", []string{first.GetNodeId(), "sutra stop --node " + first.GetNodeId()}, "spawn", "-p", fmt.Sprint(first.GetPort()))
	refused(t, g, 7, "PATH_IN_USE", []string{first.GetNodeId(), first.GetStoragePath(), "hint: "}, "spawn", "--storage-path", first.GetStoragePath()+"/within")
	refused(t, g, 2, "INVALID_ARGUMENT", []string{"request_id wish was used before", "hint: "}, "spawn", "--request-id", "wish", "--profile", "dies")
	refused(t, g, 2, "INVALID_ARGUMENT", []string{"request_id wish was used before"}, "spawn", "--request-id", "wish", "--profile", "sleep", "--memory", "17")
	refused(t, g, 2, "INVALID_ARGUMENT", []string{"request_id wish was used before"}, "spawn", "--request-id", "wish", "--profile", "sleep", "--storage-path", filepath.Join(g.Dir, "p2"))
	if nodes := g.Nodes(true); len(nodes) != 2 || len(g.NodeProcesses()) != 2 {
		t.Errorf("there are the nodes %v and the processes %v", nodes, g.NodeProcesses())
	}
}

// What verbs that work on a node say of one that isn't there, isn't as they need it, or can't be.
func TestRefusedNodes(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("a1", badProfiles)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	id, long := node.GetNodeId(), strings.Repeat("x", 65)

	for _, verb := range []string{"stop", "remove", "node-status"} {
		refused(t, g, 2, "USAGE", []string{"needs --node", "sutra list-nodes"}, verb)
		refused(t, g, 2, "USAGE", []string{"--node is empty", "sutra " + verb}, verb, "-n", "")
		refused(t, g, 2, "USAGE", []string{id, "--node " + id}, verb, id)
		for _, odd := range []string{"a b", "a/../b", "nö", "..", long, "\x1b[31m"} {
			refused(t, g, 2, "INVALID_ARGUMENT", []string{"node_id", "letters, digits, - _ and . are allowed"}, verb, "-n", odd)
		}
	}
	refused(t, g, 2, "INVALID_ARGUMENT", []string{`agent_id "a b"`}, "stop", "-n", id, "-a", "a b")
	refused(t, g, 2, "INVALID_ARGUMENT", []string{`agent_id "a b"`}, "list-nodes", "-a", "a b")
	refused(t, g, 3, "AGENT_NOT_REGISTERED", []string{"nope", "sutra list-agents"}, "list-nodes", "-a", "nope")
	refused(t, g, 3, "NODE_NOT_FOUND", []string{"there is no node nope", "sutra list-nodes --all"}, "node-status", "-n", "nope")
	refused(t, g, 7, "WRONG_AGENT", []string{id, "is on agent a1, not on other", "leave out --agent"}, "stop", "-n", id, "-a", "other")
	refused(t, g, 7, "NODE_STILL_LIVE", []string{id, "sutra stop --node " + id}, "remove", "-n", id)
	if now := g.Nodes(false); len(now) != 1 || now[0].GetPid() != node.GetPid() {
		t.Errorf("after all the refusals the nodes are %v", now)
	}

	for _, verb := range []string{"stop", "remove"} {
		if out := g.MustRun(verb, "-n", "nope"); !strings.Contains(out, "no such node: nothing to "+verb+" (nope)") {
			t.Errorf("%s of an unknown node: %s", verb, out)
		}
	}
	g.MustRun("stop", "-n", id)
	if out := g.MustRun("stop", "-n", id); !strings.Contains(out, id+" was already stopped") {
		t.Errorf("second stop: %s", out)
	}
	if out := g.MustRun("stop", "-n", id, "-o", "json"); !strings.Contains(out, `"already_stopped":true`) {
		t.Errorf("third stop: %s", out)
	}
	g.MustRun("remove", "-n", id)
	if out := g.MustRun("remove", "-n", id); !strings.Contains(out, "nothing to remove") {
		t.Errorf("second remove: %s", out)
	}
	for _, verb := range []string{"node-status", "restart"} {
		refused(t, g, 3, "NODE_NOT_FOUND", []string{id, "was removed", "hint: ", "sutra logs --node " + id}, verb, "-n", id)
	}
}

// Requests that no sutra verb would send: the master checks them itself.
func TestRefusedRequests(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("a1", badProfiles)
	ctx, master := t.Context(), g.Client()
	spawn := func(req *sutrav1.SpawnNodeRequest) error { _, err := master.SpawnNode(ctx, req); return err }
	_, grid := g.Authority()
	as := func(id string) sutrav1.GridMasterClient {
		channel := rpc.Master(g.Endpoint, g.As(pki.AgentIdentity(grid, id)), nil)
		t.Cleanup(channel.Close)
		return sutrav1.NewGridMasterClient(channel)
	}
	stranger, a1 := as("stranger"), as("a1")
	register := func(change func(*sutrav1.RegisterAgentRequest)) error {
		req := &sutrav1.RegisterAgentRequest{
			Agent:             &sutrav1.Agent{AgentId: "stranger", InstanceId: "i1", Endpoint: "127.0.0.1:9", MaxNodes: 1},
			HeartbeatInterval: durationpb.New(5e9),
		}
		change(req)
		caller := stranger
		if req.GetAgent().GetAgentId() == "a1" {
			caller = a1
		}
		_, err := caller.RegisterAgent(ctx, req)
		return err
	}
	endpoint := func(at string) error {
		return register(func(r *sutrav1.RegisterAgentRequest) { r.Agent.Endpoint = at })
	}
	_, stopErr := master.StopNode(ctx, &sutrav1.StopNodeRequest{})
	_, removeErr := master.RemoveNode(ctx, &sutrav1.RemoveNodeRequest{NodeId: "a\x00b"})
	_, statusErr := master.GetNodeStatus(ctx, &sutrav1.GetNodeStatusRequest{NodeId: strings.Repeat("x", 65)})
	_, listErr := master.ListNodes(ctx, &sutrav1.ListNodesRequest{AgentId: "../a1"})
	_, beatErr := stranger.Heartbeat(ctx, &sutrav1.HeartbeatRequest{AgentId: "stranger", Epoch: 1, Sequence: 1})

	for _, c := range []struct {
		name   string
		err    error
		code   codes.Code
		reason rpc.Reason
		field  string
	}{
		{"privileged port", spawn(&sutrav1.SpawnNodeRequest{Port: 80}), codes.InvalidArgument, rpc.InvalidArgument, "port"},
		{"port 70000", spawn(&sutrav1.SpawnNodeRequest{Port: 70000}), codes.InvalidArgument, rpc.InvalidArgument, "port"},
		{"odd agent", spawn(&sutrav1.SpawnNodeRequest{AgentId: "a b"}), codes.InvalidArgument, rpc.InvalidArgument, "agent_id"},
		{"odd request id", spawn(&sutrav1.SpawnNodeRequest{RequestId: "\n"}), codes.InvalidArgument, rpc.InvalidArgument, "request_id"},
		{"relative path", spawn(&sutrav1.SpawnNodeRequest{StoragePath: "x"}), codes.InvalidArgument, rpc.InvalidArgument, "storage_path"},
		{"path with ..", spawn(&sutrav1.SpawnNodeRequest{StoragePath: "/x/../y"}), codes.InvalidArgument, rpc.InvalidArgument, "storage_path"},
		{"memory beyond any host's", spawn(&sutrav1.SpawnNodeRequest{MemoryLimitMb: 1<<30 + 1}), codes.InvalidArgument, rpc.InvalidArgument, "memory_limit_mb"},
		{"memory that would wrap", spawn(&sutrav1.SpawnNodeRequest{MemoryLimitMb: 1<<32 - 1}), codes.InvalidArgument, rpc.InvalidArgument, "memory_limit_mb"},
		{"stop without a node", stopErr, codes.InvalidArgument, rpc.InvalidArgument, "node_id"},
		{"remove of an odd node", removeErr, codes.InvalidArgument, rpc.InvalidArgument, "node_id"},
		{"status of a long node", statusErr, codes.InvalidArgument, rpc.InvalidArgument, "node_id"},
		{"list of an odd agent", listErr, codes.InvalidArgument, rpc.InvalidArgument, "agent_id"},
		{"5 MB", spawn(&sutrav1.SpawnNodeRequest{StoragePath: "/" + strings.Repeat("x", 5_000_000)}), codes.ResourceExhausted, rpc.MessageTooLarge, ""},
		{"beat of a stranger", beatErr, codes.NotFound, rpc.AgentNotRegistered, ""},
		{"no host", endpoint(":8001"), codes.InvalidArgument, rpc.InvalidArgument, "agent.endpoint"},
		{"no port", endpoint("10.0.0.5"), codes.InvalidArgument, rpc.InvalidArgument, "agent.endpoint"},
		{"port 0", endpoint("10.0.0.5:0"), codes.InvalidArgument, rpc.InvalidArgument, "agent.endpoint"},
		{"port 65536", endpoint("10.0.0.5:65536"), codes.InvalidArgument, rpc.InvalidArgument, "agent.endpoint"},
		{"unspecified host", endpoint("0.0.0.0:8001"), codes.InvalidArgument, rpc.InvalidArgument, "agent.endpoint"},
		{"unspecified IPv6 host", endpoint("[::]:8001"), codes.InvalidArgument, rpc.InvalidArgument, "agent.endpoint"},
		{"no address", endpoint(""), codes.InvalidArgument, rpc.InvalidArgument, "agent.endpoint"},
		{
			"agent without id", register(func(r *sutrav1.RegisterAgentRequest) { r.Agent = nil }),
			codes.PermissionDenied, rpc.PermissionDenied, "",
		},
		{
			"agent's odd id", register(func(r *sutrav1.RegisterAgentRequest) { r.Agent.AgentId = "a/b" }),
			codes.PermissionDenied, rpc.PermissionDenied, "",
		},
		{
			"no slots", register(func(r *sutrav1.RegisterAgentRequest) { r.Agent.MaxNodes = 0 }),
			codes.InvalidArgument, rpc.InvalidArgument, "agent.max_nodes",
		},
		{
			"no beats", register(func(r *sutrav1.RegisterAgentRequest) { r.HeartbeatInterval = nil }),
			codes.InvalidArgument, rpc.InvalidArgument, "heartbeat_interval",
		},
		{
			"beats too rare", register(func(r *sutrav1.RegisterAgentRequest) { r.HeartbeatInterval = durationpb.New(15e9) }),
			codes.InvalidArgument, rpc.InvalidArgument, "heartbeat_interval",
		},
		{
			"taken id", register(func(r *sutrav1.RegisterAgentRequest) { r.Agent.AgentId = "a1" }),
			codes.AlreadyExists, rpc.AgentIDTaken, "",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := rpc.AsError(c.err)
			if e == nil {
				t.Fatal("it was accepted")
			}
			if e.Code() != c.code || e.Reason != c.reason {
				t.Errorf("%s, %s: %v; want %s, %s", e.Code(), e.Reason, e, c.code, c.reason)
			}
			if c.field != "" && (len(e.Violations) == 0 || e.Violations[0].Field != c.field || !strings.HasPrefix(e.Message, c.field+" ")) {
				t.Errorf("violations %v of %q, want one of field %s", e.Violations, e.Message, c.field)
			}
		})
	}
	nothingLeft(t, g, "a1")
	if out := g.MustRun("list-agents"); strings.Contains(out, "stranger") || strings.Count(out, "\n") != 2 {
		t.Errorf("after the refused registrations:\n%s", out)
	}
}
