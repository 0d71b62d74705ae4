package client

import (
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func (c *client) nodeStatusCommand() *cli.Command {
	return &cli.Command{
		Name:      "node-status",
		Usage:     "say what a node does right now",
		UsageText: "sutra node-status --node NODE [--cached]",
		Description: `The master asks the node's agent (source LIVE). Where the agent doesn't answer it says what it last
heard (source CACHED), how long ago that was, and why.

Examples:
  sutra node-status --node NODE
  sutra node-status --node NODE --cached       answers from the master's memory at once

Exit codes: 0 the state is known, whatever it is; 1 failed; 2 bad flags; 3 no such node; 4 master
unavailable; 5 timed out; 6 not allowed`,
		Flags: []cli.Flag{
			nodeFlag(),
			&cli.BoolFlag{Name: "cached", Usage: "don't ask the agent"},
		},
		Action: c.verb("node", nodeStatus),
	}
}

func nodeStatus(cctx *cli.Context, s *session) error {
	id, err := requiredNode(cctx)
	if err != nil {
		return err
	}
	response, err := s.master.GetNodeStatus(cctx.Context, &sutrav1.GetNodeStatusRequest{NodeId: id, CachedOnly: cctx.Bool("cached")})
	if err != nil {
		return err
	}
	return s.show(response, func() string {
		return s.nodeTable(response).render(s.Color && s.OutTTY) + quoteOutput(response.GetNode().GetLastExit().GetOutput())
	})
}

// nodeTable ends with the last exit, so that the output that goes with it can follow.
func (s *session) nodeTable(r *sutrav1.GetNodeStatusResponse) table {
	n, now := r.GetNode(), s.now()
	t := table{}
	t.add(text("node"), text(n.GetNodeId()))
	t.add(text("agent"), text(n.GetAgentId()))
	t.add(text("profile"), text(n.GetProfile()))
	phase := n.GetPhase().Word()
	t.add(text("phase"), cell{phase + " (desired " + n.GetDesired().Word() + ")", toneOf(phase)})
	if n.GetReason() != "" {
		t.add(text("reason"), text(n.GetReason()))
	}
	t.add(text("health"), word(n.GetHealth().Word()))
	t.add(text("source"), text(sourceText(r, now)))
	t.add(text("pid"), text(number(n.GetPid())))
	t.add(text("endpoint"), text(n.GetEndpoint()))
	t.add(text("storage path"), text(n.GetStoragePath()))
	t.add(text("memory limit"), text(memoryText(n)))
	started := ""
	if at := n.GetStartedAt(); at != nil {
		started = fmt.Sprintf("%s (%s)", at.AsTime().Format(time.RFC3339), ago(now, at))
	}
	t.add(text("started"), text(started))
	t.add(text("cpu"), text(cpuText(n.GetUsage())))
	t.add(text("memory"), text(sizeText(n.GetUsage().GetMemoryBytes())))
	t.add(text("open files"), text(number(n.GetUsage().GetOpenFiles())))
	t.add(text("disk"), text(sizeText(n.GetUsage().GetDiskBytes())))
	t.add(text("restarts"), text(fmt.Sprint(n.GetRestartCount())))
	if at := n.GetNextStart(); at != nil {
		t.add(text("next start"), text(at.AsTime().Format(time.RFC3339)))
	}
	exit := ""
	if e := n.GetLastExit(); e != nil {
		exit = e.Summary()
		if e.GetAt() != nil {
			exit += ", " + ago(now, e.GetAt())
		}
	}
	t.add(text("last exit"), text(exit))
	return t
}

func sourceText(r *sutrav1.GetNodeStatusResponse, now time.Time) string {
	said := r.GetSource().Word()
	switch {
	case r.GetSource() == sutrav1.Source_SOURCE_LIVE:
		return said
	case r.GetNode().GetObservedAt() == nil:
		said += ", never observed"
	default:
		said += ", observed " + ago(now, r.GetNode().GetObservedAt())
	}
	if r.GetReason() != "" {
		said += ": " + r.GetReason()
	}
	return said
}

// memoryText is a node's limit, and whether its host holds it to that.
func memoryText(n *sutrav1.Node) string {
	if n.GetMemoryLimitMb() == 0 {
		return ""
	}
	said := fmt.Sprintf("%d MiB", n.GetMemoryLimitMb())
	if n.GetMemoryLimit() != sutrav1.Enforcement_ENFORCEMENT_UNSPECIFIED {
		said += " (" + strings.ToLower(n.GetMemoryLimit().Word()) + ")"
	}
	return said
}

func cpuText(u *sutrav1.Usage) string {
	if u == nil {
		return ""
	}
	return fmt.Sprintf("%.1f%% of a core, %.1fs since its start", 100*u.GetCpuCores(), u.GetCpuTime().AsDuration().Seconds())
}

// sizeText is a size in the unit that suits it; empty where nothing was measured.
func sizeText(bytes uint64) string {
	size := float64(bytes)
	switch {
	case bytes == 0:
		return ""
	case bytes >= 1<<30:
		return fmt.Sprintf("%.1f GiB", size/(1<<30))
	case bytes >= 1<<20:
		return fmt.Sprintf("%.1f MiB", size/(1<<20))
	default:
		return fmt.Sprintf("%.1f KiB", size/(1<<10))
	}
}
