package rpc

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func TestRetries(t *testing.T) {
	raw := func(try int) error { return status.Errorf(codes.Unavailable, "down %d", try) }
	const always = 99
	for name, c := range map[string]struct {
		fail     func(try int) error // what tries 1 to failures end in
		failures int
		beat     bool // call Heartbeat, which isn't retry-safe
		requests int32
		conns    int32
		reason   Reason // "": the call succeeds
		message  string
	}{
		"never up":         {raw, always, false, 4, 4, MasterUnreachable, ": down 4"},
		"up at the second": {raw, 1, false, 2, 2, "", ""},
		"up at the fourth": {raw, 3, false, 4, 4, "", ""},
		"not retry-safe":   {raw, always, true, 1, 1, MasterUnreachable, ": down 1"},
		"another code": {
			func(int) error { return status.Error(codes.Aborted, "no") }, always, false, 1, 1, Internal, "no",
		},
		"the grid's own UNAVAILABLE": {
			func(int) error { return Errorf(AgentOffline, "agent-001 is offline") }, always, false, 1, 1, AgentOffline, "agent-001 is offline",
		},
		"the grid's own, soon to pass": {
			func(int) error {
				e := Errorf(ShuttingDown, "one moment")
				e.RetryAfter = time.Millisecond
				return e
			}, always, false, 4, 1, ShuttingDown, "one moment",
		},
		"the grid's own, passed": {
			func(int) error {
				e := Errorf(ShuttingDown, "one moment")
				e.RetryAfter = time.Millisecond
				return e
			}, 1, false, 2, 1, "", "",
		},
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			m := &master{}
			m.listAgents = func(_ context.Context, try int) (*sutrav1.ListAgentsResponse, error) {
				if try <= c.failures {
					return nil, c.fail(try)
				}
				return &sutrav1.ListAgentsResponse{Agents: []*sutrav1.Agent{{AgentId: "agent-001"}}}, nil
			}
			m.heartbeat = func(_ context.Context, try int) (*sutrav1.HeartbeatResponse, error) { return nil, c.fail(try) }
			srv := serveMaster(t, m, anyPort)
			metrics := NewMetrics(prometheus.NewRegistry())
			ch, client := dialMaster(t, srv.endpoint, metrics)

			call, method := listAgents, sutrav1.GridMaster_ListAgents_FullMethodName
			if c.beat {
				call = func(ctx context.Context, c sutrav1.GridMasterClient, _ ...grpc.CallOption) error {
					return heartbeat(ctx, c)
				}
				method = sutrav1.GridMaster_Heartbeat_FullMethodName
			}
			err := call(t.Context(), client)
			if c.reason == "" {
				if err != nil {
					t.Errorf("got %v, want success", err)
				}
			} else {
				wantError(t, err, c.reason, c.message)
			}
			if got := m.requests.Load(); got != c.requests {
				t.Errorf("the server got %d requests, want %d", got, c.requests)
			}
			if got := srv.accepted.Load(); got != c.conns {
				t.Errorf("the server accepted %d connections, want %d", got, c.conns)
			}
			if got := value(t, metrics.retries.WithLabelValues(method)); got != float64(c.requests-1) {
				t.Errorf("%v retries counted, want %d", got, c.requests-1)
			}
			ch.Close()
			await(t, "no connection is left", func() bool { return srv.open.Load() == 0 })
		})
	}
}

func TestBackoff(t *testing.T) {
	seen := map[time.Duration]bool{}
	for range 500 {
		b := backoff()
		total := time.Duration(0)
		for i, full := range []time.Duration{100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond} {
			pause, stop := b.Next()
			if stop || pause > full || pause < full*3/4 {
				t.Fatalf("pause %d is %s (stop %v), want from %s to %s", i+1, pause, stop, full*3/4, full)
			}
			total += pause
			seen[pause] = true
		}
		if total > 700*time.Millisecond {
			t.Fatalf("pauses add up to %s", total)
		}
		if _, stop := b.Next(); !stop {
			t.Fatal("a fourth retry")
		}
	}
	if len(seen) < 100 {
		t.Errorf("only %d different pauses in 1500: callers come back together", len(seen))
	}
}

func TestTheEarlierDeadlineWins(t *testing.T) {
	checkLeaks(t)
	left := make(chan time.Duration, 1)
	m := &master{listAgents: func(ctx context.Context, _ int) (*sutrav1.ListAgentsResponse, error) {
		deadline, _ := ctx.Deadline()
		left <- time.Until(deadline)
		return &sutrav1.ListAgentsResponse{}, nil
	}}
	srv := grpc.NewServer() // sets no deadline of its own
	sutrav1.RegisterGridMasterServer(srv, m)
	_, client := dialMaster(t, serve(t, srv, anyPort).endpoint, nil)
	for _, c := range []struct{ caller, most time.Duration }{
		{time.Hour, 5 * time.Second},
		{3 * time.Second, 3 * time.Second},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), c.caller)
		err := listAgents(ctx, client)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		if got := receive(t, "the server's deadline", left); got > c.most {
			t.Errorf("the caller gives %s: the server has %s, want at most %s", c.caller, got, c.most)
		}
	}
}

func TestGivingUpBetweenTriesReportsTheLastRealError(t *testing.T) {
	checkLeaks(t)
	m := failing(status.Error(codes.Unavailable, "down"))
	_, client := dialMaster(t, serveMaster(t, m, anyPort).endpoint, nil)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err := listAgents(ctx, client, grpc.OnFinish(func(error) { cancel() }))
	wantError(t, err, MasterUnreachable, ": down")
	if got := m.requests.Load(); got != 1 {
		t.Errorf("%d requests, want 1", got)
	}
}

func TestACallerThatGaveUpBeforehandSendsNothing(t *testing.T) {
	checkLeaks(t)
	m := &master{}
	srv := serveMaster(t, m, anyPort)
	_, client := dialMaster(t, srv.endpoint, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := listAgents(ctx, client)
	wantError(t, err, Canceled, "the call to the master was canceled")
	if !NoEffect(err) || m.requests.Load() != 0 || srv.accepted.Load() != 0 {
		t.Errorf("NoEffect %v, %d requests, %d connections", NoEffect(err), m.requests.Load(), srv.accepted.Load())
	}
}

func TestAServerThatComesBackBetweenTriesIsReached(t *testing.T) {
	for _, warm := range []bool{false, true} {
		t.Run(fmt.Sprintf("connected before: %v", warm), func(t *testing.T) {
			checkLeaks(t)
			first := serveMaster(t, &master{}, anyPort)
			_, client := dialMaster(t, first.endpoint, nil)
			if warm {
				if err := listAgents(t.Context(), client); err != nil {
					t.Fatal(err)
				}
			}
			first.kill()
			back := &master{}
			var failures []error
			err := listAgents(t.Context(), client, grpc.OnFinish(func(err error) {
				if err != nil && len(failures) == 0 {
					serveMaster(t, back, first.endpoint)
				}
				if err != nil {
					failures = append(failures, err)
				}
			}))
			if err != nil {
				t.Errorf("got %v, want the call to reach the new server", err)
			}
			if len(failures) != 1 || status.Code(failures[0]) != codes.Unavailable || back.requests.Load() != 1 {
				t.Errorf("failures %v and %d requests, want one UNAVAILABLE and 1", failures, back.requests.Load())
			}
		})
	}
}
