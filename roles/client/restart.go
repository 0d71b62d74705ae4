package client

import (
	"fmt"

	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func (c *client) restartCommand() *cli.Command {
	return &cli.Command{
		Name:      "restart",
		Usage:     "end a node's process, start it anew and wait until it is ready",
		UsageText: "sutra restart --node NODE [--agent AGENT]",
		Description: `The process gets its stop signal, a while to follow it, then SIGKILL. The new one has the same port and
data. A node in CRASH_LOOP is started at once, and its crashes are forgotten.

Examples:
  sutra restart --node NODE
  sutra restart --node NODE --agent agent-001     refused where the node is on another agent

Exit codes: 0 the node is ready again; 1 it died before it was, and is restarted as after any crash; 2 bad
flags; 3 no such node; 4 master or agent unavailable; 5 timed out, the restart goes on; 6 not allowed;
7 the node has ended or is on another agent`,
		Flags: []cli.Flag{
			nodeFlag(),
			&cli.StringFlag{Name: "agent", Aliases: []string{"a"}, Usage: "`AGENT` that the node must be on (default: any)"},
		},
		Action: c.verb("node", restart),
	}
}

func restart(cctx *cli.Context, s *session) error {
	id, err := requiredNode(cctx)
	if err != nil {
		return err
	}
	response, err := s.master.RestartNode(cctx.Context, &sutrav1.RestartNodeRequest{NodeId: id, AgentId: cctx.String("agent")})
	if err != nil {
		return err
	}
	return s.show(response, func() string {
		n := response.GetNode()
		return fmt.Sprintf("restarted %s (pid %d, %d restarts so far)\n", clean(id), n.GetPid(), n.GetRestartCount())
	})
}
