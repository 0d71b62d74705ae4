package rpc

import (
	"context"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// refuses tells whether nothing listens at addr.
func refuses(addr net.Addr) bool {
	c, err := net.Dial(addr.Network(), addr.String())
	if err == nil {
		_ = c.Close()
	}
	return err != nil
}

func TestServeLetsCallsUnderWayEnd(t *testing.T) {
	checkLeaks(t)
	m, started, release := blocking()
	srv := NewServer(zerolog.Nop(), NewMetrics(prometheus.NewRegistry()), Guard{})
	sutrav1.RegisterGridMasterServer(srv, m)
	l := listen(t, anyPort)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, srv, l) }()

	_, client := dialMaster(t, l.Addr().String(), nil)
	ended := spawnInBackground(t.Context(), client)
	receive(t, "the spawn's start", started)
	stop()
	await(t, "the listener is closed", func() bool { return refuses(l.Addr()) })
	select {
	case err := <-served:
		t.Fatalf("Serve returned before the call's end: %v", err)
	default:
	}
	close(release)
	if err := receive(t, "the spawn's end", ended); err != nil {
		t.Errorf("the call under way ends in %v", err)
	}
	if err := receive(t, "Serve's return", served); err != nil {
		t.Errorf("Serve returns %v", err)
	}
}

func TestServeCutsCallsAfterTheDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, started, _ := blocking()
		gone := make(chan struct{})
		hangs := m.spawnNode
		m.spawnNode = func(ctx context.Context, req *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
			defer close(gone)
			return hangs(ctx, req)
		}
		srv := NewServer(zerolog.Nop(), nil, Guard{})
		sutrav1.RegisterGridMasterServer(srv, m)
		l := bufconn.Listen(64 << 10)
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		served := make(chan error, 1)
		go func() { served <- Serve(ctx, srv, l) }()

		cc, err := grpc.NewClient("passthrough:///memory", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = cc.Close() }()
		ended := spawnInBackground(t.Context(), sutrav1.NewGridMasterClient(cc))
		<-started
		stopped := time.Now()
		stop()
		if err := <-served; err != nil {
			t.Errorf("Serve returns %v", err)
		}
		if took := time.Since(stopped); took != drainTime {
			t.Errorf("the drain took %s, want %s", took, drainTime)
		}
		select {
		case <-gone:
		default:
			t.Error("Serve returned before its handler")
		}
		if err := <-ended; status.Code(err) != codes.Unavailable {
			t.Errorf("the call ends in %v, want UNAVAILABLE", err)
		}
	})
}

func TestServeWhenAlreadyOver(t *testing.T) {
	checkLeaks(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l := listen(t, anyPort)
	if err := Serve(ctx, NewServer(zerolog.Nop(), nil, Guard{}), l); err != nil {
		t.Errorf("Serve returns %v", err)
	}
	if !refuses(l.Addr()) {
		t.Error("the listener is still open")
	}
}

func TestServeReportsAFailedListener(t *testing.T) {
	checkLeaks(t)
	srv := NewServer(zerolog.Nop(), nil, Guard{})
	sutrav1.RegisterGridMasterServer(srv, &master{})
	l := listen(t, anyPort)
	served := make(chan error, 1)
	go func() { served <- Serve(t.Context(), srv, l) }()
	_, client := dialMaster(t, l.Addr().String(), nil)
	if err := listAgents(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	err := receive(t, "Serve's return", served)
	if err == nil || !strings.Contains(err.Error(), "serve gRPC on "+l.Addr().String()) {
		t.Errorf("Serve returns %v, want an error with the address", err)
	}
	if open := l.open.Load(); open != 0 {
		t.Errorf("Serve returned with %d connections open", open)
	}
}

// A caller without a deadline must not hold a handler for ever.
func TestTheServerSetsTheMethodsDeadline(t *testing.T) {
	checkLeaks(t)
	left := make(chan time.Duration, 1)
	m := &master{listAgents: func(ctx context.Context, _ int) (*sutrav1.ListAgentsResponse, error) {
		deadline, ok := ctx.Deadline()
		if !ok {
			deadline = time.Now().Add(time.Hour)
		}
		left <- time.Until(deadline)
		return &sutrav1.ListAgentsResponse{}, nil
	}}
	bare, err := grpc.NewClient("passthrough:///"+serveMaster(t, m, anyPort).endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = bare.Close() })
	if err := listAgents(t.Context(), sutrav1.NewGridMasterClient(bare)); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, "the deadline", left); got > 5*time.Second {
		t.Errorf("the handler has %s, want at most 5s", got)
	}
}

func TestHandlerDeadline(t *testing.T) {
	const spawn, unknown = sutrav1.GridMaster_SpawnNode_FullMethodName, "/other.Service/Call"
	policy, ok := PolicyOf(spawn)
	if !ok || policy.Timeout < 10*time.Second {
		t.Fatalf("the policy of a spawn is %+v", policy)
	}
	now := time.Now()
	for name, c := range map[string]struct {
		caller time.Duration // until its deadline; 0: it has none
		method string
		want   time.Duration // until the handler's; 0: it has none
	}{
		"caller earlier":          {5 * time.Second, spawn, 5*time.Second - answerTime},
		"method earlier":          {time.Hour, spawn, policy.Timeout - answerTime},
		"method alone":            {0, spawn, policy.Timeout - answerTime},
		"caller alone":            {time.Hour, unknown, time.Hour - answerTime},
		"none":                    {0, unknown, 0},
		"a tenth of a short time": {time.Second, spawn, 900 * time.Millisecond},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		if c.caller > 0 {
			ctx, cancel = context.WithDeadline(t.Context(), now.Add(c.caller))
		}
		got, ok := handlerDeadline(ctx, c.method, now)
		cancel()
		if c.want == 0 && (ok || !got.IsZero()) || c.want > 0 && (!ok || !got.Equal(now.Add(c.want))) {
			t.Errorf("%s: %v after now (%v), want %v", name, got.Sub(now), ok, c.want)
		}
	}
}
