package client

import (
	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func (c *client) stopCommand() *cli.Command {
	return &cli.Command{
		Name:      "stop",
		Usage:     "stop a node and wait until its process has ended",
		UsageText: "sutra stop --node NODE [--agent AGENT]",
		Description: `The node gets its stop signal, a while to follow it, then SIGKILL. Its data stays. Stopping a node that
has stopped or that nobody knows is no error, and the answer says so.

Examples:
  sutra stop --node NODE
  sutra stop --node NODE --agent agent-001     refused where the node is on another agent

Exit codes: 0 the node doesn't run; 1 failed; 2 bad flags; 4 master or agent unavailable; 5 timed out,
the stop goes on; 6 not allowed; 7 the node is on another agent`,
		Flags: []cli.Flag{
			nodeFlag(),
			&cli.StringFlag{Name: "agent", Aliases: []string{"a"}, Usage: "`AGENT` that the node must be on (default: any)"},
		},
		Action: c.verb("node", stop),
	}
}

func stop(cctx *cli.Context, s *session) error {
	id, err := requiredNode(cctx)
	if err != nil {
		return err
	}
	response, err := s.master.StopNode(cctx.Context, &sutrav1.StopNodeRequest{NodeId: id, AgentId: cctx.String("agent")})
	if err != nil {
		return err
	}
	if response.GetNode() == nil {
		s.tell("sutra list-nodes shows the nodes there are")
	}
	return s.show(response, func() string { return stopped(id, response) + "\n" })
}

func stopped(id string, response *sutrav1.StopNodeResponse) string {
	said := "stopped " + clean(id)
	switch {
	case response.GetNode() == nil:
		return "no such node: nothing to stop (" + clean(id) + ")"
	case response.GetAlreadyStopped():
		said = clean(id) + " was already stopped"
	}
	if exit := response.GetNode().GetLastExit(); exit != nil {
		said += " (" + clean(exit.Summary()) + ")"
	}
	return said
}
