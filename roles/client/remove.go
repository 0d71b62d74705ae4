package client

import (
	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func (c *client) removeCommand() *cli.Command {
	return &cli.Command{
		Name:      "remove",
		Usage:     "forget a node that has ended",
		UsageText: "sutra remove --node NODE",
		Description: `The node disappears from list-nodes --all. Its data and its log stay on the agent's host. Removing a
node that nobody knows is no error, and the answer says so.

Examples:
  sutra stop --node NODE && sutra remove --node NODE

Exit codes: 0 nobody knows the node any more; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out;
6 not allowed; 7 the node hasn't ended: stop it first`,
		Flags:  []cli.Flag{nodeFlag()},
		Action: c.verb("node", remove),
	}
}

func remove(cctx *cli.Context, s *session) error {
	id, err := requiredNode(cctx)
	if err != nil {
		return err
	}
	response, err := s.master.RemoveNode(cctx.Context, &sutrav1.RemoveNodeRequest{NodeId: id})
	if err != nil {
		return err
	}
	return s.show(response, func() string {
		if response.GetAlreadyRemoved() {
			return "no such node: nothing to remove (" + clean(id) + ")\n"
		}
		return "removed " + clean(id) + "; its data and its log stay on the agent's host\n"
	})
}
