package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"google.golang.org/protobuf/types/known/durationpb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

func (c *client) eventsCommand() *cli.Command {
	return &cli.Command{
		Name:      "events",
		Usage:     "print what happened in the grid, and follow what happens",
		UsageText: "sutra events [--follow] [--since WHEN]",
		Description: `Prints the calls that changed something, with who made them and how they ended, the changes of agents'
health and those of nodes' phases, as the master learned of them. It remembers the last few thousand since
its start; what lasts is its record, audit.log. With --follow it goes on, also across restarts of the
master, and says where events are missing. With -o json each event is one line: {"event":{...}}, and
where some are missing: {"missed":{"count":...,"restarted":...}}.

Examples:
  sutra events --since 10m
  sutra events --follow --since 0s
  sutra events -o json | jq -r 'select(.event.call) | .event.call | .who + " " + .method'

Exit codes: 0 all is printed, or following was interrupted; 1 failed; 2 bad flags; 4 master unavailable;
5 timed out; 6 not allowed`,
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on with what happens from then on"},
			&cli.StringFlag{Name: "since", Usage: "leave out what is older: a duration such as 10m, or a time `WHEN` as 2026-03-01T12:00:00Z (default: all)"},
		},
		Action: c.verb("", events),
	}
}

func events(cctx *cli.Context, s *session) error {
	run := eventsRun{session: s, rest: &sutrav1.WatchEventsRequest{Follow: cctx.Bool("follow")}}
	since, err := s.moment(cctx.String("since"))
	if err != nil {
		return err
	}
	if since != nil {
		run.rest.Since = durationpb.New(max(0, s.now().Sub(since.AsTime())))
	}
	if run.rest.GetFollow() {
		return s.follow(cctx.Context, run.once)
	}
	if _, err := run.once(cctx.Context); err != nil {
		return err
	}
	if !run.printed {
		s.tell("there is no event to tell of")
	}
	return nil
}

// eventsRun prints events.
type eventsRun struct {
	*session
	// rest is what isn't printed yet.
	rest *sutrav1.WatchEventsRequest
	// printed: something was.
	printed bool
}

// once prints what one stream brings.
func (r *eventsRun) once(ctx context.Context) (answered bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := r.master.WatchEvents(ctx, r.rest)
	if err != nil {
		return false, r.advise(sutrav1.GridMaster_WatchEvents_FullMethodName, rpc.AsError(err))
	}
	for {
		got, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return answered, nil
		}
		if err != nil {
			return answered, r.advise(sutrav1.GridMaster_WatchEvents_FullMethodName, rpc.AsError(err))
		}
		answered = true
		at := got.GetBegin()
		if at == nil {
			if err := r.print(got); err != nil {
				return answered, err
			}
			at = got.GetEvent().GetPosition()
		}
		if at != nil {
			r.rest = &sutrav1.WatchEventsRequest{Follow: r.rest.GetFollow(), After: at}
		}
	}
}

// eventWidths are those of all columns but the last: a time, the longest of the contract's methods, and a node's id.
var eventWidths = []int{len(time.RFC3339) - len("07:00"), len("UnregisterAgent"), len("node-") + 20}

func (r *eventsRun) print(got *sutrav1.WatchEventsResponse) error {
	e, missed := got.GetEvent(), got.GetMissed()
	switch {
	case r.json:
		r.printed = true
		return r.show(got, nil)
	case missed.GetRestarted():
		r.tell("the master has started since then: events from before its start are missing here, and its calls are in its audit.log")
	case missed != nil:
		r.tell("%d events before this aren't remembered any more", missed.GetCount())
	}
	if e == nil {
		return nil
	}
	var rows table
	if !r.printed {
		rows = header("TIME", "EVENT", "WHO", "WHAT")
		r.printed = true
	}
	at := text(e.GetTime().AsTime().UTC().Format(time.RFC3339))
	switch about := e.GetAbout().(type) {
	case *sutrav1.Event_Call:
		rows.add(at, text(about.Call.GetMethod()), text(about.Call.GetWho()), callCell(about.Call))
	case *sutrav1.Event_Agent:
		rows.add(at, text("agent"), text(about.Agent.GetAgentId()), agentCell(about.Agent))
	case *sutrav1.Event_Node:
		rows.add(at, text("node"), text(about.Node.GetNodeId()), nodeCell(about.Node))
	default:
		rows.add(at, text("of a newer master"))
	}
	return r.write(rows.renderWithin(eventWidths, r.Color && r.OutTTY))
}

func callCell(c *sutrav1.CallEvent) cell {
	words := []string{c.GetCode()}
	if c.GetReason() != "" {
		words = append(words, c.GetReason())
	}
	words = append(words, "in", c.GetTook().AsDuration().Round(time.Millisecond).String(), "from", c.GetFrom())
	for _, field := range slices.Sorted(maps.Keys(c.GetWhat())) {
		words = append(words, field+"="+shellWord(c.GetWhat()[field]))
	}
	said := cell{text: strings.Join(words, " ")}
	if c.GetCode() != "OK" {
		said.tone = toneBad
	}
	return said
}

func agentCell(a *sutrav1.AgentEvent) cell {
	return cell{a.GetFrom().Word() + " -> " + a.GetTo().Word() + ": " + a.GetWhy(), toneOf(a.GetTo().Word())}
}

func nodeCell(n *sutrav1.NodeEvent) cell {
	said := n.GetTo().Word() + " on " + n.GetAgentId()
	if n.GetFrom() != sutrav1.Phase_PHASE_UNSPECIFIED {
		said = n.GetFrom().Word() + " -> " + said
	}
	if n.GetPid() != 0 {
		said += fmt.Sprintf(", pid %d", n.GetPid())
	}
	if n.GetRestartCount() > 0 {
		said += fmt.Sprintf(", restarts %d", n.GetRestartCount())
	}
	if n.GetReason() != "" {
		said += ": " + n.GetReason()
	}
	return cell{said, toneOf(n.GetTo().Word())}
}
