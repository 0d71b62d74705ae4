package client

import (
	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func (c *client) usersCommand() *cli.Command {
	return &cli.Command{
		Name:  "users",
		Usage: "keep people out of the grid, and let them in again",
		Description: `A person is who joined with sutra login, a program with such an identity, too. sutra list-bans shows who is banned.

Examples:
  sutra users ban --reason "left the company" anna
  sutra users unban anna

Exit codes: 0 done; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed`,
		Subcommands: []*cli.Command{
			{
				Name:      "ban",
				Usage:     "keep a person out, with all certificates that they have and tokens that they made",
				UsageText: "sutra users ban [--reason TEXT] NAME",
				Description: `Their connections to the master end at once, what they follow with them, and nobody joins by their name or with a token
that they made. Who has joined with one stays. An admin can't ban itself; where that of the master's own account is
banned, by another, the master leaves that account a new one.

Exit codes: 0 banned; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed`,
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "reason", Usage: "`WHY`, for those who look later; the banned one is told it as well"},
				},
				Action: c.verb(argument, banUser),
			},
			{
				Name:        "unban",
				Usage:       "let a banned person in again",
				UsageText:   "sutra users unban NAME",
				Description: `Exit codes: 0 they may come in; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed`,
				Action:      c.verb(argument, unbanUser),
			},
		},
	}
}

const whichUser = "sutra list-bans and the master's audit.log have the names"

func banUser(cctx *cli.Context, s *session) error {
	name, err := theArgument(cctx, "person's name", whichUser)
	if err != nil {
		return err
	}
	response, err := s.master.BanUser(cctx.Context, &sutrav1.BanUserRequest{Name: name, Reason: cctx.String("reason")})
	if err != nil {
		return err
	}
	s.tell("whoever joined with a token of theirs stays, by other names; sutra users unban " + shellWord(name) + " lets them in again")
	return s.show(response, func() string { return "banned " + clean(name) + "\n" })
}

func unbanUser(cctx *cli.Context, s *session) error {
	name, err := theArgument(cctx, "person's name", whichUser)
	if err != nil {
		return err
	}
	response, err := s.master.UnbanUser(cctx.Context, &sutrav1.UnbanUserRequest{Name: name})
	if err != nil {
		return err
	}
	s.tellNotBanned(response)
	return s.show(response, func() string { return clean(name) + " may come in\n" })
}
