package client

import (
	"fmt"

	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func (c *client) listAgentsCommand() *cli.Command {
	return &cli.Command{
		Name:      "list-agents",
		Usage:     "list the agents, their health and their room",
		UsageText: "sutra list-agents",
		Description: `NODES is how many nodes an agent runs of how many at most, LAST-BEAT how long it has been silent.

Examples:
  sutra list-agents
  sutra list-agents -o json | jq -r '.agents[] | select(.health == "AGENT_HEALTH_OFFLINE") | .agent_id'

Exit codes: 0 the master answered; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed`,
		Action: c.verb("", listAgents),
	}
}

func listAgents(cctx *cli.Context, s *session) error {
	response, err := s.master.ListAgents(cctx.Context, &sutrav1.ListAgentsRequest{})
	if err != nil {
		return err
	}
	if len(response.GetAgents()) == 0 && !s.json {
		s.tell("no agent is registered; start one with: sutra agent --config agent.toml")
		return nil
	}
	return s.show(response, func() string { return s.agentsTable(response).render(s.Color && s.OutTTY) })
}

func (s *session) agentsTable(r *sutrav1.ListAgentsResponse) table {
	now := s.now()
	t := header("AGENT", "HEALTH", "LAST-BEAT", "NODES", "ENDPOINT", "PLATFORM", "VERSION")
	for _, a := range r.GetAgents() {
		health := word(a.GetHealth().Word())
		if a.GetDraining() {
			health.text += ",DRAINING"
		}
		t.add(text(a.GetAgentId()), health, text(age(now, a.GetLastHeartbeat())),
			text(fmt.Sprintf("%d/%d", a.GetNodeCount(), a.GetMaxNodes())),
			text(a.GetEndpoint()), text(a.GetPlatform()), text(a.GetVersion()))
	}
	return t
}
