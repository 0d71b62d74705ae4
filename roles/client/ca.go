package client

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

func (c *client) caCommand() *cli.Command {
	return &cli.Command{
		Name:  "ca",
		Usage: "move a live grid to a new certificate authority",
		Description: `A grid's certificates all go back to its root, which lasts ten years. These move it to another one, because its key may be
known to others, or because the ten years are nearly over. No call fails meanwhile, and no node is touched.

Examples:
  sutra ca rotate            what would be done, and changes nothing
  sutra ca rotate --apply    make another root; the one before is trusted as well
  sutra ca retire            which agents haven't moved yet
  sutra ca retire --apply    trust the one before no more

Exit codes: 0 done, or it could be; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed; 7 this isn't the
time for it`,
		Subcommands: []*cli.Command{
			{
				Name:      "rotate",
				Usage:     "make another root for the grid; without --apply only say what that would do",
				UsageText: "sutra ca rotate [--apply]",
				Description: `The new root and what it signs are made at once. Whoever trusts the one before trusts what the new one signs, until the
latter is retired. Agents get certificates by the new root within half a minute, people with their next verb. Join tokens stay good.

Exit codes: 0 done, or it could be; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed; 7 the grid is moving
already`,
				Flags:  []cli.Flag{applyFlag()},
				Action: c.verb("", rotateAuthority),
			},
			{
				Name:      "retire",
				Usage:     "trust the root before the newest no more; without --apply only say who would be cut off",
				UsageText: "sutra ca retire [--apply [--force]]",
				Description: `Connections, identities and join tokens by the root before the newest are good for nothing from then on. Whoever is cut off
joins anew with a token that is made for it: sutra token create --agent-id or --name, then sutra agent --join-token or sutra login.
An agent's nodes run on.

Exit codes: 0 done, or it could be; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 not allowed; 7 the grid isn't
moving, or agents would be cut off`,
				Flags: []cli.Flag{
					applyFlag(),
					&cli.BoolFlag{Name: "force", Usage: "cut off the agents that haven't moved, too"},
				},
				Action: c.verb("", retireAuthority),
			},
		},
	}
}

func applyFlag() cli.Flag {
	return &cli.BoolFlag{Name: "apply", Usage: "do it (default: say what would be done)"}
}

func rotateAuthority(cctx *cli.Context, s *session) error {
	response, err := s.master.GetAuthority(cctx.Context, &sutrav1.GetAuthorityRequest{})
	if err != nil {
		return err
	}
	now := response.GetAuthority()
	if now.GetRotatedAt() != nil && !cctx.Bool("apply") {
		s.tell("the grid is moving to another root already; the next step: sutra ca retire")
		return s.show(response, func() string { return s.authorityTable(now).render(s.Color && s.OutTTY) })
	}
	if !cctx.Bool("apply") {
		s.tell("nothing was changed. With --apply another root is made beside this one, no call fails, and agents get certificates by it\n" +
			"within half a minute, people with their next verb. Then: sutra ca retire")
		return s.show(response, func() string { return s.authorityTable(now).render(s.Color && s.OutTTY) })
	}
	rotated, err := s.master.RotateAuthority(cctx.Context, &sutrav1.RotateAuthorityRequest{Root: now.GetRoots()[0].GetRoot()})
	if err != nil {
		return err
	}
	s.tell("both roots are trusted from now on; see in a moment who has moved: sutra ca retire")
	return s.show(rotated, func() string { return s.authorityTable(rotated.GetAuthority()).render(s.Color && s.OutTTY) })
}

func retireAuthority(cctx *cli.Context, s *session) error {
	if cctx.Bool("force") && !cctx.Bool("apply") {
		return &UsageError{Message: "--force is for --apply", Hint: "sutra ca retire --apply --force"}
	}
	response, err := s.master.GetAuthority(cctx.Context, &sutrav1.GetAuthorityRequest{})
	if err != nil {
		return err
	}
	now := response.GetAuthority()
	if now.GetRotatedAt() == nil {
		return rpc.Errorf(rpc.NoRotation, "the grid has one root, and isn't moving to another").WithHint("begin to move: sutra ca rotate")
	}
	if !cctx.Bool("apply") {
		s.tell("nothing was changed. With --apply the older root is trusted no more: agents that are left, people who called nothing\n"+
			"since %s, and tokens from before that are cut off, and join anew with a token", now.GetRotatedAt().AsTime().UTC().Format(time.RFC3339))
		return s.show(response, func() string { return s.authorityTable(now).render(s.Color && s.OutTTY) })
	}
	// This account isn't to be among those who are cut off.
	if err := s.redial(cctx.Context, func(*pki.Credentials) bool { return true }); err != nil {
		return err
	}
	if s.unsaved != nil {
		return fmt.Errorf("this account would be cut off: its identity was renewed, and can't be kept: %w", s.unsaved)
	}
	oldest := now.GetRoots()[len(now.GetRoots())-1].GetRoot()
	retired, err := s.master.RetireAuthority(cctx.Context, &sutrav1.RetireAuthorityRequest{Root: oldest, Force: cctx.Bool("force")})
	if err != nil {
		return err
	}
	return s.show(retired, func() string { return s.authorityTable(retired.GetAuthority()).render(s.Color && s.OutTTY) })
}

func (s *session) authorityTable(a *sutrav1.Authority) table {
	t := table{}
	for i, root := range a.GetRoots() {
		what := "root"
		if i > 0 {
			what = "older root"
		}
		t.add(text(what), text(fmt.Sprintf("%.16s, until %s", root.GetRoot(), root.GetExpiresAt().AsTime().UTC().Format(time.DateOnly))))
	}
	if a.GetRotatedAt() == nil {
		return t
	}
	t.add(text("moving since"), text(a.GetRotatedAt().AsTime().UTC().Format(time.RFC3339)))
	t.add(text("agents moved"), text(listed(a.GetAgentsMoved())))
	t.add(text("agents left"), text(listed(a.GetAgentsLeft())))
	t.add(text("retired"), text(fmt.Sprintf("by sutra ca retire, or on %s by itself", a.GetRetiresAt().AsTime().UTC().Format(time.DateOnly))))
	return t
}

// listed is a list as people read it.
func listed(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return fmt.Sprintf("%d: %s", len(names), strings.Join(slices.Sorted(slices.Values(names)), ", "))
}
