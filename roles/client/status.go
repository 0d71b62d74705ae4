package client

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func (c *client) statusCommand() *cli.Command {
	return &cli.Command{
		Name:      "status",
		Usage:     "say how the whole grid is",
		UsageText: "sutra status",
		Description: `One word for the grid's health with its reasons, then agents, nodes, capacity and the master itself.

Examples:
  sutra status
  sutra status -o json | jq -e '.health == "CLUSTER_HEALTH_HEALTHY"'

Exit codes: 0 the master answered, whatever the health; 1 failed; 2 bad flags; 4 master unavailable;
5 timed out; 6 not allowed`,
		Action: c.verb("", clusterStatus),
	}
}

func clusterStatus(cctx *cli.Context, s *session) error {
	response, err := s.master.GetClusterStatus(cctx.Context, &sutrav1.GetClusterStatusRequest{})
	if err != nil {
		return err
	}
	return s.show(response, func() string { return s.clusterTable(response).render(s.Color && s.OutTTY) })
}

func (s *session) clusterTable(r *sutrav1.GetClusterStatusResponse) table {
	t := table{}
	t.add(text("grid"), word(r.GetHealth().Word()))
	for _, reason := range r.GetReasons() {
		t.add(text("reason"), text(reason))
	}
	t.add(text("agents"), text(counts(r.GetAgentsByHealth(), sutrav1.AgentHealth_name, "AGENT_HEALTH_")))
	t.add(text("nodes"), text(counts(r.GetNodesByPhase(), sutrav1.Phase_name, "PHASE_")))
	t.add(text("capacity"), text(fmt.Sprintf("%d of %d nodes taken", r.GetSlotsTaken(), r.GetMaxNodes())))
	t.add(text("master"), text(fmt.Sprintf("%s at %s, up %s", r.GetVersion(), s.endpoint, age(s.now(), r.GetStartedAt()))))
	t.add(text("grid id"), text(r.GetGridId()))
	if r.GetRootExpiresAt() != nil {
		t.add(text("security"), text(fmt.Sprintf("TLS; the grid's root until %s, the master's certificate until %s, renewed before",
			r.GetRootExpiresAt().AsTime().UTC().Format(time.DateOnly), r.GetCertificateExpiresAt().AsTime().UTC().Format(time.RFC3339))))
		if first := r.GetAgentCertificateExpiresAt(); first != nil {
			t.add(text("certificates"), text("the first of the agents' ends at "+first.AsTime().UTC().Format(time.RFC3339)+", renewed before"))
		}
		if since := r.GetRotatedAt(); since != nil {
			t.add(text("authority"), text(fmt.Sprintf("moving to another root since %s; the next step: sutra ca retire", since.AsTime().UTC().Format(time.RFC3339))))
		}
	} else {
		t.add(text("security"), text("none: everything is sent in the clear (--insecure)"))
	}
	return t
}

// counts writes counts by an enum's words, in the enum's order; words of a newer master come last.
func counts(by map[string]uint32, names map[int32]string, prefix string) string {
	words := make([]string, 0, len(names)+len(by))
	for _, n := range slices.Sorted(maps.Keys(names)) {
		words = append(words, strings.TrimPrefix(names[n], prefix))
	}
	for _, w := range slices.Sorted(maps.Keys(by)) {
		if !slices.Contains(words, w) {
			words = append(words, w)
		}
	}
	var said []string
	for _, w := range words {
		if by[w] > 0 {
			said = append(said, fmt.Sprintf("%d %s", by[w], w))
		}
	}
	if said == nil {
		return "none"
	}
	return strings.Join(said, ", ")
}
