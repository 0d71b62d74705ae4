package client

import (
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"google.golang.org/protobuf/types/known/durationpb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

func (c *client) tokenCommand() *cli.Command {
	return &cli.Command{
		Name:  "token",
		Usage: "make, list and revoke the tokens with which agents and people join the grid",
		Description: `A token is a secret: whoever has it joins. It says which grid it is of, so that nobody else gets it.

Examples:
  sutra token create                             one agent may join within 24 h
  sutra token create --role operator --ttl 1h    one person, who may spawn and stop
  sutra token list
  sutra token revoke ID

Exit codes: 0 done; 1 failed; 2 bad flags; 3 there is no such token; 4 master unavailable; 5 timed out; 6 not allowed`,
		Subcommands: []*cli.Command{c.tokenCreateCommand(), c.tokenListCommand(), c.tokenRevokeCommand()},
	}
}

func (c *client) tokenCreateCommand() *cli.Command {
	return &cli.Command{
		Name:      "create",
		Usage:     "make a join token",
		UsageText: "sutra token create [--role agent|operator|viewer|admin] [--ttl 24h] [--uses 1] [--agent-id ID] [--name NAME]",
		Description: `It is shown once: the grid keeps its hash alone. An agent's id or a person's name that was given already is given again only for a
token that is made for it. Whose it was before then gets no further certificates, and is out within a day.

Examples:
  T=$(sutra token create)                        for: sutra agent --config agent.toml --join-token "$T"
  sutra token create --agent-id agent-007        no other agent may join with it, and that one also if it has lost its identity
  sutra token create --role viewer               for: sutra login --master HOST:7000 --token TOKEN
  sutra token create --role viewer --name anna   for: sutra login --master HOST:7000 --token TOKEN --name anna

Exit codes: 0 made; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "role", Value: "agent", Usage: "what those who join are to be: `ROLE` agent, operator, viewer or admin"},
			&cli.DurationFlag{Name: "ttl", Value: 24 * time.Hour, Usage: "`TIME` for which it is good"},
			&cli.UintFlag{Name: "uses", Value: 1, Usage: "how `MANY` may join with it"},
			&cli.StringFlag{Name: "agent-id", Usage: "the only `AGENT` that may join with it (default: any whose id is free)"},
			&cli.StringFlag{Name: "name", Usage: "the only `PERSON` that may join with it (default: any whose name is free)"},
		},
		Action: c.verb("", createToken),
	}
}

func createToken(cctx *cli.Context, s *session) error {
	role, ok := map[string]sutrav1.Role{
		"agent": sutrav1.Role_ROLE_AGENT, "viewer": sutrav1.Role_ROLE_VIEWER, "operator": sutrav1.Role_ROLE_OPERATOR, "admin": sutrav1.Role_ROLE_ADMIN,
	}[cctx.String("role")]
	if !ok {
		return &UsageError{Message: fmt.Sprintf("there is no role %q", cctx.String("role")), Hint: "--role is agent, operator, viewer or admin"}
	}
	response, err := s.master.CreateToken(cctx.Context, &sutrav1.CreateTokenRequest{
		Ttl: durationpb.New(cctx.Duration("ttl")), Uses: uint32(min(cctx.Uint("uses"), 1<<31)), AgentId: cctx.String("agent-id"), Name: cctx.String("name"), Role: role,
	})
	if err != nil {
		return err
	}
	switch name := response.GetToken().GetName(); {
	case role == sutrav1.Role_ROLE_AGENT:
		s.tell("on the agent's host: sutra agent --config agent.toml --join-token TOKEN")
	case name != "":
		s.tell("on the other host: sutra login --master HOST:PORT --token TOKEN --name " + clean(name))
	default:
		s.tell("on the other host: sutra login --master HOST:PORT --token TOKEN")
	}
	return s.show(response, func() string { return response.GetSecret() + "\n" })
}

func (c *client) tokenListCommand() *cli.Command {
	return &cli.Command{
		Name:      "list",
		Usage:     "list the join tokens, without their secrets",
		UsageText: "sutra token list",
		Description: `One that has expired or was used up is listed for another day. The one for the master's host is that which the master leaves for agents
there; where it is revoked, the master makes another at its next start.

Exit codes: 0 the master answered; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed`,
		Action: c.verb("", listTokens),
	}
}

func listTokens(cctx *cli.Context, s *session) error {
	response, err := s.master.ListTokens(cctx.Context, &sutrav1.ListTokensRequest{})
	if err != nil {
		return err
	}
	if len(response.GetTokens()) == 0 && !s.json {
		s.tell("there is no token; make one with: sutra token create")
		return nil
	}
	return s.show(response, func() string {
		t := header("TOKEN", "ROLE", "FOR", "USES-LEFT", "EXPIRES", "MADE-BY")
		for _, tok := range response.GetTokens() {
			whom, uses, end := tok.GetAgentId()+tok.GetName(), fmt.Sprint(tok.GetUsesLeft()), tok.GetExpiresAt().AsTime().UTC().Format(time.RFC3339)
			if tok.GetLocal() {
				whom, uses, end = "master's-host", "any", "never"
			}
			t.add(text(tok.GetTokenId()), text(strings.ToLower(strings.TrimPrefix(tok.GetRole().String(), "ROLE_"))), text(whom), text(uses), text(end),
				text(tok.GetCreatedBy()))
		}
		return t.render(s.Color && s.OutTTY)
	})
}

func (c *client) tokenRevokeCommand() *cli.Command {
	return &cli.Command{
		Name:      "revoke",
		Usage:     "make a join token useless; who has joined with it stays",
		UsageText: "sutra token revoke ID",
		Description: `Exit codes: 0 revoked; 1 failed; 2 bad flags; 3 there is no such token; 4 master unavailable; 5 timed out;
6 not allowed`,
		Action: c.verb(argument, revokeToken),
	}
}

func revokeToken(cctx *cli.Context, s *session) error {
	id, err := theArgument(cctx, "token's id", "sutra token list shows the ids")
	if err != nil {
		return err
	}
	if token, err := pki.ParseToken(id); err == nil {
		id = token.ID // what is to be revoked is plain, and the secret is nobody's business
	}
	response, err := s.master.RevokeToken(cctx.Context, &sutrav1.RevokeTokenRequest{TokenId: id})
	if err != nil {
		return err
	}
	return s.show(response, func() string { return "revoked " + clean(id) + "\n" })
}
