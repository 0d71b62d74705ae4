package client

import (
	"fmt"
	"math"
	"strings"

	"github.com/rs/xid"
	"github.com/urfave/cli/v2"
	"google.golang.org/grpc/codes"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

func (c *client) spawnCommand() *cli.Command {
	return &cli.Command{
		Name:      "spawn",
		Usage:     "start a node and wait until it is ready",
		UsageText: "sutra spawn [--agent AGENT] [--port PORT] [--storage-path FOLDER] [--memory MIB] [--profile PROFILE] [--request-id ID]",
		Description: `Without flags the master picks an agent, and the agent a free port and a folder of the node's own.

Examples:
  sutra spawn
  sutra spawn --agent agent-001 --port 50051 --storage-path /tmp/test-storage
  sutra spawn -o json | jq -r .node.endpoint

An interrupted or timed-out spawn may still go on. The same --request-id with the same flags then
gives the node that it started, never a second one.

Exit codes: 0 the node is ready; 1 it died before it was; 2 bad flags; 3 no such agent; 4 master or
agent unavailable; 5 timed out; 6 not allowed; 7 port or path taken, agent full or binary unusable`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "agent", Aliases: []string{"a"}, Usage: "id of the `AGENT` to run it (default: the master picks one)"},
			&cli.IntFlag{Name: "port", Aliases: []string{"p"}, DefaultText: "the agent picks a free one", Usage: "the node's `PORT`, 1024-65535"},
			&cli.StringFlag{Name: "storage-path", Usage: "absolute `FOLDER` on the agent's host for its data (default: one of its own under the agent's home)"},
			&cli.Uint64Flag{Name: "memory", DefaultText: "the agent's default_memory_mb", Usage: "memory limit in `MIB`"},
			&cli.StringFlag{Name: "profile", Usage: "`PROFILE` of the agent's file that says which server to run (default: \"default\")"},
			&cli.StringFlag{Name: "request-id", Usage: "`ID` of this wish: asked twice it gives one node (default: a new one)"},
		},
		Action: c.verb("agent", spawn),
	}
}

func spawn(cctx *cli.Context, s *session) error {
	request, err := spawnRequest(cctx)
	if err != nil {
		return err
	}
	response, err := s.master.SpawnNode(cctx.Context, request)
	if err != nil {
		return explainSpawn(err, request.GetRequestId())
	}
	node := response.GetNode()
	return s.show(response, func() string { return s.spawned(node) })
}

func spawnRequest(cctx *cli.Context) (*sutrav1.SpawnNodeRequest, error) {
	port := cctx.Int("port")
	if cctx.IsSet("port") {
		if why := rpc.CheckPort(port); why != "" {
			return nil, &UsageError{
				Message: fmt.Sprintf("--port %d %s", port, why),
				Hint:    fmt.Sprintf("choose one of %d-%d, or leave --port out and the agent picks a free one", rpc.MinPort, rpc.MaxPort),
			}
		}
	}
	memory := cctx.Uint64("memory")
	if cctx.IsSet("memory") && (memory == 0 || memory > math.MaxUint32) {
		why, hint := "leaves the node no memory", "give at least 1 MiB"
		if memory > 0 {
			why, hint = "is more than any host has", "give MiB, not bytes"
		}
		return nil, &UsageError{
			Message: fmt.Sprintf("--memory %d %s", memory, why),
			Hint:    hint + ", or leave --memory out for the agent's default_memory_mb",
		}
	}
	id := cctx.String("request-id")
	if id == "" {
		id = xid.New().String()
	}
	return &sutrav1.SpawnNodeRequest{
		RequestId:     id,
		AgentId:       cctx.String("agent"),
		Profile:       cctx.String("profile"),
		Port:          uint32(port),
		StoragePath:   cctx.String("storage-path"),
		MemoryLimitMb: uint32(memory),
	}, nil
}

func (s *session) spawned(node *sutrav1.Node) string {
	t := table{}
	t.add(text("node"), text(node.GetNodeId()))
	t.add(text("agent"), text(node.GetAgentId()))
	t.add(text("endpoint"), text(node.GetEndpoint()))
	t.add(text("pid"), text(number(node.GetPid())))
	t.add(text("storage path"), text(node.GetStoragePath()))
	out := t.render(false)
	if s.OutTTY {
		id := clean(node.GetNodeId())
		out += "\nnext:\n  " + s.call + " node-status --node " + id + "\n  " + s.call + " stop --node " + id + "\n"
	}
	return out
}

// mayHaveStarted tells whether a node may run, or start yet, although its spawn failed.
func mayHaveStarted(e *rpc.Error) bool {
	switch {
	case rpc.NoEffect(e), e.Reason == rpc.NoAgentAvailable: // without an agent no node was placed
		return false
	case e.Reason == rpc.AgentUnreachable: // the master names the node where there may be one
		return e.Meta["node_id"] != ""
	default:
		return true
	}
}

// explainSpawn adds to a spawn's error how to find what may have started.
func explainSpawn(err error, requestID string) error {
	e := rpc.AsError(err)
	if !mayHaveStarted(e) {
		return e
	}
	_ = e.With("request_id", requestID)
	again := "sutra spawn with the same flags and --request-id " + requestID + " gives the same node"
	find := "sutra list-nodes shows it"
	if id := e.Meta["node_id"]; id != "" {
		find = "sutra node-status --node " + id + " shows it"
	}
	switch {
	case e.Code() == codes.Canceled:
		e.Message = "the spawn was interrupted, its node may still start (request id " + requestID + ")"
		e.Hint = find + "; " + again
	case strings.Contains(e.Message, notMaster):
	case e.Reason == rpc.MasterUnreachable:
		e.Hint += "; should the node have started, " + again
	case e.Hint == "" || e.Meta["node_id"] == "":
		e.Message += "; the node may still start (request id " + requestID + ")"
		e.Hint = find + "; " + again
	}
	return e
}
