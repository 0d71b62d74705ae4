package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

func TestExitCode(t *testing.T) {
	cases := []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("something"), 1},
		{&UsageError{Message: "bad"}, 2},
		{fmt.Errorf("wrapped: %w", &UsageError{Message: "bad"}), 2},
		{rpc.Errorf(rpc.InvalidArgument, "x"), 2},
		{rpc.Errorf(rpc.NodeNotFound, "x"), 3},
		{rpc.Errorf(rpc.AgentNotRegistered, "x"), 3},
		{rpc.Errorf(rpc.MasterUnreachable, "x"), 4},
		{rpc.Errorf(rpc.AgentOffline, "x"), 4},
		{fmt.Errorf("wrapped: %w", rpc.Errorf(rpc.NoAgentAvailable, "x")), 4},
		{rpc.Errorf(rpc.TimedOut, "x"), 5},
		{context.DeadlineExceeded, 5},
		{status.Error(codes.Unauthenticated, "x"), 6},
		{status.Error(codes.PermissionDenied, "x"), 6},
		{rpc.Errorf(rpc.PortInUse, "x"), 7},
		{rpc.Errorf(rpc.AgentFull, "x"), 7},
		{rpc.Errorf(rpc.NodeStillLive, "x"), 7},
		{rpc.Errorf(rpc.NodeDiedEarly, "x"), 1},
		{rpc.Errorf(rpc.Canceled, "x"), 1},
		{rpc.Errorf(rpc.Unimplemented, "x"), 1},
		{rpc.Errorf(rpc.Internal, "x"), 1},
	}
	for _, c := range cases {
		if got := ExitCode(c.err); got != c.want {
			t.Errorf("%v: %d, want %d", c.err, got, c.want)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	f := serve(t, &fakeMaster{})
	cases := []struct{ args, want string }{
		{"stop", "error: sutra stop needs --node (USAGE)\nhint: sutra stop --node NODE   (sutra list-nodes shows the ids)\n"},
		{"stop --node=", "error: --node is empty (USAGE)\nhint: give it a value or leave it out; sutra stop --help says what it takes\n"},
		{"remove", "error: sutra remove needs --node (USAGE)\nhint: sutra remove --node NODE   (sutra list-nodes shows the ids)\n"},
		{"node-status", "error: sutra node-status needs --node (USAGE)\nhint: sutra node-status --node NODE   (sutra list-nodes shows the ids)\n"},
		{"stop node-x", "error: sutra stop takes flags only, and \"node-x\" is none (USAGE)\nhint: sutra stop --node node-x\n"},
		{"stop node-x -a agent-001", "error: sutra stop takes flags only, and \"node-x\" is none (USAGE)\nhint: sutra stop --node node-x -a agent-001\n"},
		{"stop -n node-x node-y", "error: sutra stop takes flags only, and \"node-y\" is none (USAGE)\nhint: sutra stop --help lists the flags\n"},
		{"stop help", "error: sutra stop takes flags only, and \"help\" is none (USAGE)\nhint: sutra stop --help\n"},
		{"spawn help", "error: sutra spawn takes flags only, and \"help\" is none (USAGE)\nhint: sutra spawn --help\n"},
		{"spawn agent-001", "error: sutra spawn takes flags only, and \"agent-001\" is none (USAGE)\nhint: sutra spawn --agent agent-001\n"},
		{"status now", "error: sutra status takes flags only, and \"now\" is none (USAGE)\nhint: sutra status --help lists the flags\n"},
		{"stop --nod x", "error: unknown flag --nod (USAGE)\nhint: sutra stop --help lists the flags and what they take\n"},
		{"stop --node", "error: flag needs an argument: --node (USAGE)\nhint: sutra stop --help lists the flags and what they take\n"},
		{"--colour status", "error: unknown flag --colour (USAGE)\nhint: sutra --help lists the flags and what they take\n"},
		{"spawn --port x", "error: --port \"x\" isn't a whole number of 0 or more (USAGE)\nhint: write digits only, such as --port 2000\n"},
		{"spawn -p 0", "error: --port 0 is no port that a node could be reached at (USAGE)\nhint: choose one of 1024-65535, or leave --port out and the agent picks a free one\n"},
		{"spawn -p 80", "error: --port 80 is privileged: only root may listen there (USAGE)\nhint: choose one of 1024-65535, or leave --port out and the agent picks a free one\n"},
		{"spawn -p 1023", "error: --port 1023 is privileged: only root may listen there (USAGE)\nhint: choose one of 1024-65535, or leave --port out and the agent picks a free one\n"},
		{"spawn --port 65536", "error: --port 65536 is out of range (USAGE)\nhint: choose one of 1024-65535, or leave --port out and the agent picks a free one\n"},
		{"spawn --port -1", "error: --port -1 is out of range (USAGE)\nhint: choose one of 1024-65535, or leave --port out and the agent picks a free one\n"},
		{"spawn --memory 0", "error: --memory 0 leaves the node no memory (USAGE)\nhint: give at least 1 MiB, or leave --memory out for the agent's default_memory_mb\n"},
		{"spawn --memory -5", "error: --memory \"-5\" isn't a whole number of 0 or more (USAGE)\nhint: write digits only, such as --memory 2000\n"},
		{"logs -n x --tail -1", "error: --tail \"-1\" isn't a whole number of 0 or more (USAGE)\nhint: write digits only, such as --tail 2000\n"},
		{"logs -n x --tail=", "error: --tail \"\" isn't a whole number of 0 or more (USAGE)\nhint: write digits only, such as --tail 2000\n"},
		{"logs -n x --tail 1e3", "error: --tail \"1e3\" isn't a whole number of 0 or more (USAGE)\nhint: write digits only, such as --tail 2000\n"},
		{"logs -n x --tail 99999999999999999999", "error: --tail 99999999999999999999 is too large (USAGE)\nhint: write digits only, such as --tail 2000\n"},
		{"logs -n x -f=maybe", "error: -f takes no value, and has \"maybe\" (USAGE)\nhint: write -f alone, or leave it out\n"},
		{"logs --tail 5", "error: sutra logs needs --node (USAGE)\nhint: sutra logs --node NODE   (sutra list-nodes shows the ids)\n"},
		{"spawn --memory 4294967296", "error: --memory 4294967296 is more than any host has (USAGE)\nhint: give MiB, not bytes, or leave --memory out for the agent's default_memory_mb\n"},
		{"status --timeout 5", "error: invalid value \"5\" for flag --timeout: parse error (USAGE)\nhint: a duration has a unit: --timeout 5s\n"},
		{"--timeout 5 status", "error: invalid value \"5\" for flag --timeout: parse error (USAGE)\nhint: a duration has a unit: --timeout 5s\n"},
		{"spawn -p 5x", "error: -p \"5x\" isn't a whole number of 0 or more (USAGE)\nhint: write digits only, such as -p 2000\n"},
		{"status -o xml", "error: unknown output format \"xml\" (USAGE)\nhint: --output is table or json\n"},
		{"status --timeout 0s", "error: --timeout 0s leaves no time for a call (USAGE)\nhint: write a duration such as 500ms, 3s or 1m, or leave --timeout out\n"},
		{"--timeout -1s status", "error: --timeout -1s leaves no time for a call (USAGE)\nhint: write a duration such as 500ms, 3s or 1m, or leave --timeout out\n"},
		{"status --master a/b", "error: --master: \"a/b\" has a path or query after the address; write host:port, for example 10.0.0.10:7000 (USAGE)\n"},
	}
	for _, c := range cases {
		said, err := refused(t, f, strings.Fields(c.args)...)
		if ExitCode(err) != exitUsage {
			t.Errorf("%s: exit code %d", c.args, ExitCode(err))
		}
		diff(t, said, c.want)
	}
	if len(f.requests()) != 0 {
		t.Errorf("the master was asked: %v", f.requests())
	}
}

func TestWantsJSON(t *testing.T) {
	for args, want := range map[string]bool{
		"status": false, "-o json status": true, "status -o json": true, "status -o=json": true,
		"status --output json": true, "--output=json stop": true, "status -o table": false,
		"-o json status -o table": false, "-o table status -o json": true, "status -o": false,
		"status json": false, "status -- -o json": false, "stop --node -o json": true,
	} {
		if got := WantsJSON(strings.Fields(args)); got != want {
			t.Errorf("%s: %v", args, got)
		}
	}
}

func diedEarly() error {
	e := rpc.Errorf(rpc.NodeDiedEarly, "node node-1 on agent-001 started and died before it was ready: exit code 3").
		With("node_id", "node-1").WithHint("look at its log")
	e.Exit = &sutrav1.Exit{Code: 3, Output: "first\nbad \x1b[31mcolour\r\n\tlast\n"}
	return e
}

func TestErrorsForPeople(t *testing.T) {
	f := serve(t, &fakeMaster{onSpawn: func(context.Context, *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
		return nil, diedEarly()
	}})
	said, err := refused(t, f, "spawn")
	if ExitCode(err) != exitFailed {
		t.Errorf("exit code %d", ExitCode(err))
	}
	diff(t, said, `
error: node node-1 on agent-001 started and died before it was ready: exit code 3 (NODE_DIED_EARLY)
hint: look at its log
  | first
  | bad \x1b[31mcolour
  |     last
`)
	cases := []struct {
		err  error
		want string
	}{
		{&fs.PathError{Op: "open", Path: "agent.toml", Err: fs.ErrNotExist}, "error: open agent.toml: file does not exist\n"},
		{errors.Join(errors.New("a.toml:1: x"), errors.New("a.toml:2: y")), "error: a.toml:1: x\n  a.toml:2: y\n"},
		{fmt.Errorf("step 3: %w", rpc.Errorf(rpc.AgentFull, "agent is full")), "error: step 3: agent is full (AGENT_FULL)\n"},
		{status.Error(codes.NotFound, "gone"), "error: gone (INTERNAL)\n"},
		{rpc.Errorf(rpc.Internal, "a\x1b]0;title\x07").WithHint("b\x9bc\u202e"), "error: a\\x1b]0;title\\a (INTERNAL)\nhint: b\\x9bc\\u202e\n"},
	}
	for _, c := range cases {
		var out bytes.Buffer
		PrintError(&Streams{Err: &out, Color: true}, false, c.err) // colour is for terminals only
		diff(t, out.String(), c.want)
	}
	var out bytes.Buffer
	PrintError(&Streams{Err: &out, ErrTTY: true, Color: true}, false, errors.New("x"))
	diff(t, out.String(), "\x1b[31merror:\x1b[0m x\n")
}

func TestErrorsForPrograms(t *testing.T) {
	invalid := rpc.Invalid(rpc.Violation{Field: "port", Description: "is <odd>"})
	cases := []struct {
		err  error
		want map[string]any
	}{
		{diedEarly(), map[string]any{
			"reason": "NODE_DIED_EARLY", "code": "ABORTED", "hint": "look at its log",
			"message":  "node node-1 on agent-001 started and died before it was ready: exit code 3",
			"metadata": map[string]any{"node_id": "node-1"}, "violations": []any{},
			"exit": map[string]any{"code": 3.0, "signal": "", "unknown": false, "oom_killed": false, "cause": "", "at": nil, "output": "first\nbad \x1b[31mcolour\r\n\tlast\n"},
		}},
		{invalid, map[string]any{
			"reason": "INVALID_ARGUMENT", "code": "INVALID_ARGUMENT", "hint": "", "message": "port is <odd>", "metadata": map[string]any{},
			"violations": []any{map[string]any{"field": "port", "description": "is <odd>"}}, "exit": nil,
		}},
		{&UsageError{Message: "bad", Hint: "good"}, map[string]any{
			"reason": "USAGE", "code": "INVALID_ARGUMENT", "hint": "good", "message": "bad",
			"metadata": map[string]any{}, "violations": []any{}, "exit": nil,
		}},
		{errors.New("plain"), map[string]any{
			"reason": "FAILED", "code": "UNKNOWN", "hint": "", "message": "plain",
			"metadata": map[string]any{}, "violations": []any{}, "exit": nil,
		}},
	}
	for _, c := range cases {
		var out bytes.Buffer
		PrintError(&Streams{Err: &out, ErrTTY: true, Color: true}, true, c.err)
		if lines := strings.Count(out.String(), "\n"); lines != 1 || !strings.HasSuffix(out.String(), "\n") {
			t.Errorf("%d lines: %q", lines, out.String())
		}
		var got map[string]map[string]any
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(map[string]map[string]any{"error": c.want}, got); d != "" {
			t.Errorf("-want +got\n%s", d)
		}
	}
}
