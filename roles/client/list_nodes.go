package client

import (
	"fmt"

	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func (c *client) listNodesCommand() *cli.Command {
	return &cli.Command{
		Name:      "list-nodes",
		Usage:     "list the nodes and what they do",
		UsageText: "sutra list-nodes [--agent AGENT] [--all]",
		Description: `The master answers from memory: SEEN is how long ago a node's agent last spoke of it, AGE how long its
process has been running. node-status asks the agent itself.

Examples:
  sutra list-nodes
  sutra list-nodes --agent agent-001 --all
  sutra list-nodes -o json | jq -r '.nodes[].endpoint'

Exit codes: 0 the master answered; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "agent", Aliases: []string{"a"}, Usage: "only the nodes of this `AGENT`"},
			&cli.BoolFlag{Name: "all", Usage: "nodes that ended, too"},
		},
		Action: c.verb("agent", listNodes),
	}
}

func listNodes(cctx *cli.Context, s *session) error {
	agent, all := cctx.String("agent"), cctx.Bool("all")
	response, err := s.master.ListNodes(cctx.Context, &sutrav1.ListNodesRequest{AgentId: agent, IncludeEnded: all})
	if err != nil {
		return err
	}
	if len(response.GetNodes()) == 0 && !s.json {
		where, next := "", "sutra spawn"
		if agent != "" {
			where = " on " + clean(agent)
			next += " --agent " + clean(agent)
		}
		if !all {
			next += "   and see those that ended with: sutra list-nodes --all"
		}
		s.tell("there is no node%s; start one with: %s", where, next)
		return nil
	}
	return s.show(response, func() string { return s.nodesTable(response).render(s.Color && s.OutTTY) })
}

func (s *session) nodesTable(r *sutrav1.ListNodesResponse) table {
	now := s.now()
	t := header("NODE", "AGENT", "PHASE", "HEALTH", "PID", "PORT", "RESTARTS", "AGE", "SEEN", "REASON")
	for _, n := range r.GetNodes() {
		t.add(text(n.GetNodeId()), text(n.GetAgentId()), word(n.GetPhase().Word()), word(n.GetHealth().Word()),
			text(number(n.GetPid())), text(number(n.GetPort())), text(fmt.Sprint(n.GetRestartCount())),
			text(age(now, n.GetStartedAt())), text(age(now, n.GetObservedAt())), text(n.GetReason()))
	}
	return t
}
