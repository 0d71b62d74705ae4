package client

import (
	"time"

	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

func (c *client) listBansCommand() *cli.Command {
	return &cli.Command{
		Name:      "list-bans",
		Usage:     "list who is kept out of the grid: agents and people, since when, by whom and why",
		UsageText: "sutra list-bans",
		Description: `Examples:
  sutra list-bans
  sutra list-bans -o json | jq -r '.bans[].user // empty'

Exit codes: 0 the master answered; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed`,
		Action: c.verb("", listBans),
	}
}

func listBans(cctx *cli.Context, s *session) error {
	response, err := s.master.ListBans(cctx.Context, &sutrav1.ListBansRequest{})
	if err != nil {
		return err
	}
	if len(response.GetBans()) == 0 && !s.json {
		s.tell("nobody is banned; sutra agents ban and sutra users ban keep somebody out")
		return nil
	}
	return s.show(response, func() string {
		t := header("KIND", "NAME", "SINCE", "BY", "WHY")
		for _, b := range response.GetBans() {
			kind, name := pki.Agent, b.GetAgentId()
			if b.GetUser() != "" {
				kind, name = pki.User, b.GetUser()
			}
			t.add(text(string(kind)), text(name), text(b.GetBannedAt().AsTime().UTC().Format(time.RFC3339)), text(b.GetBannedBy()), text(b.GetReason()))
		}
		return t.render(s.Color && s.OutTTY)
	})
}
