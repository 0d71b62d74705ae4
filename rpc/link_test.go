package rpc

import (
	"context"
	"errors"
	"io"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// blocking is a master whose SpawnNode says so in started and waits for release.
func blocking() (m *master, started chan struct{}, release chan struct{}) {
	started, release = make(chan struct{}, 1), make(chan struct{})
	m = failing(status.Error(codes.Unavailable, "raw"))
	m.listAgents = nil
	m.spawnNode = func(ctx context.Context, _ *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
		started <- struct{}{}
		select {
		case <-release:
			return &sutrav1.SpawnNodeResponse{Node: &sutrav1.Node{NodeId: "node-1"}}, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return m, started, release
}

func spawnInBackground(ctx context.Context, client sutrav1.GridMasterClient) <-chan error {
	ended := make(chan error, 1)
	go func() {
		_, err := client.SpawnNode(ctx, &sutrav1.SpawnNodeRequest{})
		ended <- err
	}()
	return ended
}

func TestADroppedConnectionCarriesItsCallsToTheirEnd(t *testing.T) {
	checkLeaks(t)
	m, started, release := blocking()
	srv := serveMaster(t, m, anyPort)
	metrics := NewMetrics(prometheus.NewRegistry())
	_, client := dialMaster(t, srv.endpoint, metrics)

	ended := spawnInBackground(t.Context(), client)
	receive(t, "the spawn's start", started)
	wantError(t, heartbeat(t.Context(), client), MasterUnreachable, ": raw")
	if got := value(t, metrics.conns); got != 0 {
		t.Errorf("gauge is %v after the drop, want 0", got)
	}
	if err := listAgents(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	if accepted, open := srv.accepted.Load(), srv.open.Load(); accepted != 2 || open != 2 {
		t.Errorf("%d connections accepted, %d open, want 2 and 2", accepted, open)
	}
	close(release)
	if err := receive(t, "the spawn's end", ended); err != nil {
		t.Errorf("the other call's failure broke this one: %v", err)
	}
	await(t, "the dropped connection is closed", func() bool { return srv.open.Load() == 1 })
	if got := value(t, metrics.conns); got != 1 {
		t.Errorf("gauge is %v, want 1", got)
	}
}

func TestCloseEndsCallsUnderWay(t *testing.T) {
	checkLeaks(t)
	m, started, _ := blocking()
	srv := serveMaster(t, m, anyPort)
	metrics := NewMetrics(prometheus.NewRegistry())
	ch, client := dialMaster(t, srv.endpoint, metrics)
	ended := spawnInBackground(t.Context(), client)
	receive(t, "the spawn's start", started)
	ch.Close()
	err := receive(t, "the spawn's end", ended)
	wantError(t, err, MasterUnreachable, "the connection was closed")
	if NoEffect(err) {
		t.Error("a call that was broken off after it was sent passes for one without effect")
	}
	await(t, "the connection is closed", func() bool { return srv.open.Load() == 0 })

	err = listAgents(t.Context(), client)
	wantError(t, err, MasterUnreachable, "the connection was closed")
	if !NoEffect(err) {
		t.Error("a call on a closed channel passes for one that may have had an effect")
	}
	if got := value(t, metrics.retries.WithLabelValues(sutrav1.GridMaster_ListAgents_FullMethodName)); got != 0 {
		t.Errorf("%v retries on a channel that was closed for good", got)
	}
	ch.Close() // a second time
	if srv.accepted.Load() != 1 || m.requests.Load() != 1 || value(t, metrics.conns) != 0 {
		t.Errorf("%d connections, %d requests, gauge %v, want 1, 1, 0", srv.accepted.Load(), m.requests.Load(), value(t, metrics.conns))
	}
}

// The connection may go between a call's taking and its using it. That isn't the caller's cancelation.
func TestACallOnAConnectionJustClosedIsRetried(t *testing.T) {
	checkLeaks(t)
	m := &master{}
	srv := serveMaster(t, m, anyPort)
	ch, client := dialMaster(t, srv.endpoint, nil)
	c, err := ch.link.acquire()
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if err := listAgents(t.Context(), client); err != nil {
		t.Errorf("got %v, want success on a new connection", err)
	}
	ch.link.release(c, false)
}

func TestStreams(t *testing.T) {
	checkLeaks(t)
	desc := &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}
	srv := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		for {
			got := &sutrav1.Node{}
			if err := s.RecvMsg(got); err != nil {
				return nil //nolint:nilerr // the caller ended it, or is gone
			}
			if err := s.SendMsg(got); err != nil {
				return err
			}
		}
	}))
	sutrav1.RegisterGridMasterServer(srv, failing(status.Error(codes.Unavailable, "raw")))
	up := serve(t, srv, anyPort)
	ch, client := dialMaster(t, up.endpoint, nil)

	stream, err := ch.NewStream(t.Context(), desc, "/test.Echo/Echo")
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, heartbeat(t.Context(), client), MasterUnreachable, ": raw")
	sent, got := &sutrav1.Node{NodeId: "node-1"}, &sutrav1.Node{}
	if err := errors.Join(stream.SendMsg(sent), stream.RecvMsg(got)); err != nil || !proto.Equal(sent, got) {
		t.Errorf("after the drop the stream gives %v, %v", got, err)
	}
	if up.open.Load() != 1 {
		t.Errorf("%d connections open, want the stream's", up.open.Load())
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := stream.RecvMsg(got); !errors.Is(err, io.EOF) {
		t.Fatalf("got %v, want the end", err)
	}
	await(t, "the stream's connection is closed", func() bool { return up.open.Load() == 0 })

	up.kill()
	_, err = ch.NewStream(t.Context(), desc, "/test.Echo/Echo")
	wantError(t, err, MasterUnreachable, "can't reach the master at "+up.endpoint+": connection refused")
	ch.link.mu.Lock()
	defer ch.link.mu.Unlock()
	if ch.link.conn != nil {
		t.Error("a stream that failed to open left its connection in place")
	}
}
