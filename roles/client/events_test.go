package client

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

type eventStream = grpc.ServerStreamingServer[sutrav1.WatchEventsResponse]

func begin(run string, sequence uint64) *sutrav1.WatchEventsResponse {
	return &sutrav1.WatchEventsResponse{Message: &sutrav1.WatchEventsResponse_Begin{Begin: &sutrav1.EventPosition{RunId: run, Sequence: sequence}}}
}

func missing(count uint64, restarted bool) *sutrav1.WatchEventsResponse {
	return &sutrav1.WatchEventsResponse{Message: &sutrav1.WatchEventsResponse_Missed{Missed: &sutrav1.EventsMissed{Count: count, Restarted: restarted}}}
}

// happened is an event of run r, a second after the one before.
func happened(sequence uint64, e *sutrav1.Event) *sutrav1.WatchEventsResponse {
	e.Time = timestamppb.New(epoch.Add(time.Duration(sequence) * time.Second))
	e.Position = &sutrav1.EventPosition{RunId: "r", Sequence: sequence}
	return &sutrav1.WatchEventsResponse{Message: &sutrav1.WatchEventsResponse_Event{Event: e}}
}

func nodeHappened(sequence uint64) *sutrav1.WatchEventsResponse {
	return happened(sequence, &sutrav1.Event{About: &sutrav1.Event_Node{Node: &sutrav1.NodeEvent{
		NodeId: "node-cc1234567890abcdefgh", AgentId: "a1", To: sutrav1.Phase_PHASE_STARTING,
	}}})
}

// oneOfEach are all kinds of events, with texts that nobody should trust.
func oneOfEach() []*sutrav1.WatchEventsResponse {
	return []*sutrav1.WatchEventsResponse{
		begin("r", 0),
		missing(7, false),
		happened(1, &sutrav1.Event{About: &sutrav1.Event_Call{Call: &sutrav1.CallEvent{
			Who: "user anna", Role: "operator", From: "10.0.0.7:4711", Method: "SpawnNode", Code: "OK", Took: durationpb.New(1234567 * time.Microsecond),
			What: map[string]string{"storage_path": "/a b\x1b[31m", "agent_id": "a1"}, BeganAt: timestamppb.New(epoch),
		}}}),
		happened(2, &sutrav1.Event{About: &sutrav1.Event_Call{Call: &sutrav1.CallEvent{
			Who: "user bob", From: "10.0.0.8:4711", Method: "UnregisterAgent", Code: "NotFound", Reason: "NODE_NOT_FOUND",
		}}}),
		happened(3, &sutrav1.Event{About: &sutrav1.Event_Agent{Agent: &sutrav1.AgentEvent{
			AgentId: "a1", From: sutrav1.AgentHealth_AGENT_HEALTH_DEGRADED, To: sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE, Why: "last heard of 30s ago",
		}}}),
		nodeHappened(4),
		happened(5, &sutrav1.Event{About: &sutrav1.Event_Node{Node: &sutrav1.NodeEvent{
			NodeId: "node-cc1234567890abcdefgh", AgentId: "a1", From: sutrav1.Phase_PHASE_STARTING, To: sutrav1.Phase_PHASE_RUNNING,
			Pid: 4242, RestartCount: 2, Reason: "slow",
		}}}),
		happened(6, &sutrav1.Event{}),
	}
}

// telling sends messages and ends.
func telling(messages ...*sutrav1.WatchEventsResponse) *fakeMaster {
	return &fakeMaster{onEvents: func(_ *sutrav1.WatchEventsRequest, s eventStream) error {
		for _, m := range messages {
			if err := s.Send(m); err != nil {
				return err
			}
		}
		return nil
	}}
}

func TestEvents(t *testing.T) {
	f := serve(t, telling(oneOfEach()...))
	out, errs := ask(t, f, "events")
	diff(t, out, `
TIME                  EVENT            WHO                        WHAT
2026-03-01T12:00:01Z  SpawnNode        user anna                  OK in 1.235s from 10.0.0.7:4711 agent_id=a1 storage_path='/a b\x1b[31m'
2026-03-01T12:00:02Z  UnregisterAgent  user bob                   NotFound NODE_NOT_FOUND in 0s from 10.0.0.8:4711
2026-03-01T12:00:03Z  agent            a1                         DEGRADED -> OFFLINE: last heard of 30s ago
2026-03-01T12:00:04Z  node             node-cc1234567890abcdefgh  STARTING on a1
2026-03-01T12:00:05Z  node             node-cc1234567890abcdefgh  STARTING -> RUNNING on a1, pid 4242, restarts 2: slow
2026-03-01T12:00:06Z  of a newer master
`)
	diff(t, errs, "7 events before this aren't remembered any more\n")

	out, errs = ask(t, f, "events", "--since", "10m", "-o", "json")
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if len(lines) != len(oneOfEach())-1 {
		t.Fatalf("%d lines:\n%s", len(lines), out)
	}
	for i, want := range oneOfEach()[1:] {
		wantJSON(t, lines[i]+"\n", want)
	}
	diff(t, lines[0], `{"missed":{"count":"7","restarted":false}}`)
	diff(t, lines[3], `{"event":{"time":"2026-03-01T12:00:03Z","position":{"run_id":"r","sequence":"3"},"agent":{"agent_id":"a1","from":"AGENT_HEALTH_DEGRADED","to":"AGENT_HEALTH_OFFLINE","why":"last heard of 30s ago"}}}`)
	diff(t, errs, "")

	for _, args := range [][]string{{"events"}, {"events", "-o", "json"}} {
		out, errs = ask(t, serve(t, telling(begin("r", 9))), args...)
		diff(t, out, "")
		if said := "there is no event to tell of\n"; len(args) == 1 {
			diff(t, errs, said)
		}
	}
	ask(t, f, "events", "-f", "--since", "2026-03-01T11:00:00Z")
	ask(t, f, "events", "--since", "2026-03-01T12:00:30Z") // another host's clock is ahead
	wantRequests(
		t, f,
		&sutrav1.WatchEventsRequest{},
		&sutrav1.WatchEventsRequest{Since: durationpb.New(10 * time.Minute)},
		&sutrav1.WatchEventsRequest{Follow: true, Since: durationpb.New(time.Hour)},
		&sutrav1.WatchEventsRequest{Since: durationpb.New(0)},
	)

	term := newTerminal()
	term.OutTTY, term.Color = true, true
	if err := term.run(t.Context(), "events", "--master", f.endpoint); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\x1b[31mNotFound NODE_NOT_FOUND in", "\x1b[31mDEGRADED -> OFFLINE: ", "\x1b[32mSTARTING -> RUNNING on a1"} {
		if !strings.Contains(term.out.String(), want) {
			t.Errorf("a terminal doesn't show %q:\n%q", want, term.out.String())
		}
	}
}

// Events are followed on where the master comes back, from where they were: also where none has come yet, and where the
// master is another run.
func TestEventsOutlastTheMaster(t *testing.T) {
	var calls atomic.Int32
	stopping := rpc.Errorf(rpc.ShuttingDown, "the master is shutting down")
	f := serve(t, &fakeMaster{onEvents: func(_ *sutrav1.WatchEventsRequest, s eventStream) error {
		send := func(messages ...*sutrav1.WatchEventsResponse) {
			for _, m := range messages {
				if err := s.Send(m); err != nil {
					t.Error(err)
				}
			}
		}
		switch calls.Add(1) {
		case 1:
			send(begin("r", 3))
			return stopping
		case 2:
			send(begin("r", 3), nodeHappened(4))
			return stopping
		case 3:
			return stopping
		}
		send(begin("r2", 0), missing(0, true), missing(2, false), nodeHappened(5))
		return nil
	}})
	out, errs := ask(t, f, "events", "-f", "--since", "0s")
	diff(t, out, `
TIME                  EVENT            WHO                        WHAT
2026-03-01T12:00:04Z  node             node-cc1234567890abcdefgh  STARTING on a1
2026-03-01T12:00:05Z  node             node-cc1234567890abcdefgh  STARTING on a1
`)
	const waiting = "waiting for the master: the master is shutting down\n"
	diff(t, errs, waiting+waiting+"the master has started since then: events from before its start are missing here, and its calls are in its audit.log\n"+
		"2 events before this aren't remembered any more\n")
	after := func(sequence uint64) *sutrav1.WatchEventsRequest {
		return &sutrav1.WatchEventsRequest{Follow: true, After: &sutrav1.EventPosition{RunId: "r", Sequence: sequence}}
	}
	wantRequests(t, f, &sutrav1.WatchEventsRequest{Follow: true, Since: durationpb.New(0)}, after(3), after(4), after(4))
}

func TestEventsRefuses(t *testing.T) {
	f := serve(t, &fakeMaster{onEvents: func(*sutrav1.WatchEventsRequest, eventStream) error {
		return rpc.Errorf(rpc.PermissionDenied, "agents may not")
	}})
	for _, c := range []struct {
		args []string
		code int
		said string
	}{
		{nil, exitRefused, "error: agents may not (PERMISSION_DENIED)\n"},
		{[]string{"--since", "yesterday"}, exitUsage, "error: --since \"yesterday\" is neither a duration nor a time (USAGE)\nhint: "},
		{[]string{"--since=-5m"}, exitUsage, "error: --since \"-5m\" lies in the future"},
		{[]string{"--since", "2099-01-01T00:00:00Z"}, exitUsage, "lies in the future"},
		{[]string{"--since", ""}, exitUsage, "--since is empty"},
		{[]string{"a1"}, exitUsage, `"a1"`},
		{[]string{"--node", "n"}, exitUsage, "unknown flag --node"},
		{[]string{"--master", "127.0.0.1:1"}, exitUnavailable, "MASTER_UNREACHABLE"},
	} {
		for _, follow := range []string{"--follow=false", "-f"} {
			said, err := refused(t, f, append([]string{"events", follow}, c.args...)...)
			if ExitCode(err) != c.code || !strings.Contains(said, c.said) {
				t.Errorf("events %s %q: %d\n%s", follow, c.args, ExitCode(err), said)
			}
		}
	}
}

// To interrupt it is how following ends, also where nothing has happened yet.
func TestInterruptedEvents(t *testing.T) {
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	f := serve(t, &fakeMaster{onEvents: func(_ *sutrav1.WatchEventsRequest, s eventStream) error {
		err := s.Send(begin("r", 0))
		interrupt()
		<-s.Context().Done()
		return err
	}})
	term := newTerminal()
	if err := term.run(ctx, "events", "-f", "--master", f.endpoint); err != nil {
		t.Error(err)
	}
	diff(t, term.out.String()+term.err.String(), "")
}
