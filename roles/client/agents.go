package client

import (
	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func (c *client) agentsCommand() *cli.Command {
	return &cli.Command{
		Name:  "agents",
		Usage: "keep agents out of the grid, and let them in again",
		Description: `sutra list-bans shows which are banned.

Examples:
  sutra agents ban --reason "its host was stolen" agent-001
  sutra agents unban agent-001

Exit codes: 0 done; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed`,
		Subcommands: []*cli.Command{
			{
				Name:      "ban",
				Usage:     "keep an agent out, with all certificates that it has; its nodes run on",
				UsageText: "sutra agents ban [--reason TEXT] AGENT",
				Description: `Its connections end at once, and it is OFFLINE.

Exit codes: 0 banned; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed`,
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "reason", Usage: "`WHY`, for those who look later"},
				},
				Action: c.verb(argument, banAgent),
			},
			{
				Name:        "unban",
				Usage:       "let a banned agent in again",
				UsageText:   "sutra agents unban AGENT",
				Description: `Exit codes: 0 it may come in; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed`,
				Action:      c.verb(argument, unbanAgent),
			},
		},
	}
}

func banAgent(cctx *cli.Context, s *session) error {
	id, err := theArgument(cctx, "agent's id", "sutra list-agents shows the ids")
	if err != nil {
		return err
	}
	response, err := s.master.BanAgent(cctx.Context, &sutrav1.BanAgentRequest{AgentId: id, Reason: cctx.String("reason")})
	if err != nil {
		return err
	}
	if response.GetAgentUnknown() {
		s.tell("no agent has registered by that id, and it is kept out if it comes; sutra list-agents shows the ids")
	} else {
		s.tell("its nodes run on; sutra agents unban " + shellWord(id) + " lets it in again")
	}
	return s.show(response, func() string { return "banned " + clean(id) + "\n" })
}

func unbanAgent(cctx *cli.Context, s *session) error {
	id, err := theArgument(cctx, "agent's id", "sutra list-agents shows the ids")
	if err != nil {
		return err
	}
	response, err := s.master.UnbanAgent(cctx.Context, &sutrav1.UnbanAgentRequest{AgentId: id})
	if err != nil {
		return err
	}
	s.tellNotBanned(response)
	return s.show(response, func() string { return clean(id) + " may come in\n" })
}

// tellNotBanned says of an unban that there was no ban.
func (s *session) tellNotBanned(response interface{ GetNotBanned() bool }) {
	if response.GetNotBanned() {
		s.tell("it wasn't banned; sutra list-bans shows who is")
	}
}
