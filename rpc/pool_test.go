package rpc

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// agent answers ListNodes.
type agent struct {
	sutrav1.UnimplementedGridAgentServer
	requests atomic.Int32
}

func (a *agent) ListNodes(context.Context, *sutrav1.GridAgentListNodesRequest) (*sutrav1.GridAgentListNodesResponse, error) {
	a.requests.Add(1)
	return &sutrav1.GridAgentListNodesResponse{}, nil
}

func serveAgent(t *testing.T) (*agent, *running) {
	t.Helper()
	a := &agent{}
	srv := NewServer(zerolog.Nop(), nil, Guard{})
	sutrav1.RegisterGridAgentServer(srv, a)
	return a, serve(t, srv, anyPort)
}

func listNodes(ctx context.Context, ch *Channel) error {
	_, err := sutrav1.NewGridAgentClient(ch).ListNodes(ctx, &sutrav1.GridAgentListNodesRequest{})
	return err
}

func TestPoolKeepsOneConnectionAnAgent(t *testing.T) {
	checkLeaks(t)
	a, srv := serveAgent(t)
	b, other := serveAgent(t)
	metrics := NewMetrics(prometheus.NewRegistry())
	pool := NewPool(nil, metrics)
	t.Cleanup(pool.Close)
	var callers sync.WaitGroup
	for range 100 {
		callers.Go(func() {
			for range 5 {
				if err := listNodes(t.Context(), pool.Agent("agent-001", srv.endpoint)); err != nil {
					t.Error(err)
				}
			}
			if err := listNodes(t.Context(), pool.Agent("agent-002", other.endpoint)); err != nil {
				t.Error(err)
			}
		})
	}
	callers.Wait()
	if a.requests.Load() != 500 || b.requests.Load() != 100 {
		t.Errorf("%d and %d requests, want 500 and 100", a.requests.Load(), b.requests.Load())
	}
	if srv.accepted.Load() != 1 || other.accepted.Load() != 1 || value(t, metrics.conns) != 2 {
		t.Errorf("%d and %d connections, gauge %v, want 1, 1 and 2", srv.accepted.Load(), other.accepted.Load(), value(t, metrics.conns))
	}
}

func TestPoolFollowsAnAgentToItsNewEndpoint(t *testing.T) {
	checkLeaks(t)
	_, old := serveAgent(t)
	moved, now := serveAgent(t)
	metrics := NewMetrics(prometheus.NewRegistry())
	pool := NewPool(nil, metrics)
	t.Cleanup(pool.Close)
	before := pool.Agent("agent-001", old.endpoint)
	if err := listNodes(t.Context(), before); err != nil {
		t.Fatal(err)
	}
	if err := listNodes(t.Context(), pool.Agent("agent-001", now.endpoint)); err != nil {
		t.Fatal(err)
	}
	await(t, "the old connection is closed", func() bool { return old.open.Load() == 0 })
	if moved.requests.Load() != 1 || value(t, metrics.conns) != 1 {
		t.Errorf("%d requests at the new endpoint, gauge %v, want 1 and 1", moved.requests.Load(), value(t, metrics.conns))
	}
	err := listNodes(t.Context(), before)
	wantError(t, err, AgentUnreachable, "the connection was closed")
	if !NoEffect(err) || old.accepted.Load() != 1 {
		t.Errorf("NoEffect %v, %d connections, want true and 1", NoEffect(err), old.accepted.Load())
	}
}

func TestPoolDropAndClose(t *testing.T) {
	for name, metrics := range map[string]*Metrics{"counted": NewMetrics(prometheus.NewRegistry()), "not counted": nil} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			_, srv := serveAgent(t)
			pool := NewPool(nil, metrics)
			t.Cleanup(pool.Close)
			check := func(when string, conns int32) {
				t.Helper()
				await(t, when, func() bool { return srv.open.Load() == conns })
				if metrics != nil && value(t, metrics.conns) != float64(conns) {
					t.Errorf("%s: gauge is %v, want %d", when, value(t, metrics.conns), conns)
				}
			}
			call := func() {
				t.Helper()
				if err := listNodes(t.Context(), pool.Agent("agent-001", srv.endpoint)); err != nil {
					t.Error(err)
				}
			}
			pool.Drop("stranger")
			call()
			check("connected", 1)
			pool.Drop("agent-001")
			check("dropped", 0)
			pool.Drop("agent-001")
			call()
			check("dialed anew", 1)
			pool.Close()
			check("closed", 0)
			pool.Close()
			check("closed again", 0)
			if srv.accepted.Load() != 2 {
				t.Errorf("%d connections in all, want 2", srv.accepted.Load())
			}
		})
	}
}
