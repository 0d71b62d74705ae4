package rpc

import (
	"context"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/rs/zerolog"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// patience is when an await gives up; nothing that goes well comes near it.
const patience = 10 * time.Second

// await waits until cond holds.
func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("gave up waiting until %s", what)
		}
	}
}

// timed is a context whose time is over when a test says so: once there is what it is to be over for.
type timed struct {
	context.Context
	over chan struct{}
}

func (c timed) Done() <-chan struct{} { return c.over }

func (c timed) Err() error {
	select {
	case <-c.over:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// receive waits for a channel's next value.
func receive[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("gave up waiting for %s", what)
		panic("unreachable")
	}
}

// checkLeaks fails the test where a goroutine outlives all its clean-ups registered later.
func checkLeaks(t *testing.T) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, before) })
}

// master answers three methods as the test says, and counts the requests.
type master struct {
	sutrav1.UnimplementedGridMasterServer
	requests   atomic.Int32
	listAgents func(ctx context.Context, try int) (*sutrav1.ListAgentsResponse, error)
	heartbeat  func(ctx context.Context, try int) (*sutrav1.HeartbeatResponse, error)
	spawnNode  func(ctx context.Context, req *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error)
}

func (m *master) ListAgents(ctx context.Context, _ *sutrav1.ListAgentsRequest) (*sutrav1.ListAgentsResponse, error) {
	try := int(m.requests.Add(1))
	if m.listAgents == nil {
		return &sutrav1.ListAgentsResponse{}, nil
	}
	return m.listAgents(ctx, try)
}

func (m *master) Heartbeat(ctx context.Context, _ *sutrav1.HeartbeatRequest) (*sutrav1.HeartbeatResponse, error) {
	return m.heartbeat(ctx, int(m.requests.Add(1)))
}

func (m *master) SpawnNode(ctx context.Context, req *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
	m.requests.Add(1)
	return m.spawnNode(ctx, req)
}

// failing is a master whose calls all end in err.
func failing(err error) *master {
	return &master{
		listAgents: func(context.Context, int) (*sutrav1.ListAgentsResponse, error) { return nil, err },
		heartbeat:  func(context.Context, int) (*sutrav1.HeartbeatResponse, error) { return nil, err },
	}
}

// countingListener counts the connections that it accepted and those still open.
type countingListener struct {
	net.Listener
	accepted, open atomic.Int32
}

func (l *countingListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.accepted.Add(1)
	l.open.Add(1)
	return &countedConn{Conn: c, closed: sync.OnceFunc(func() { l.open.Add(-1) })}, nil
}

type countedConn struct {
	net.Conn
	closed func()
}

func (c *countedConn) Close() error {
	c.closed()
	return c.Conn.Close()
}

func listen(t testing.TB, addr string) *countingListener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() }) // most are closed by then
	return &countingListener{Listener: l}
}

// running is a gRPC server on loopback.
type running struct {
	*countingListener
	endpoint string
	// kill ends the server and all its connections at once.
	kill func()
}

// server is a bare gRPC server or a Server.
type server interface {
	grpc.ServiceRegistrar
	Serve(l net.Listener) error
	Stop()
}

// serve runs srv on addr until it is killed or the test ends.
func serve(t testing.TB, srv server, addr string) *running {
	t.Helper()
	l := listen(t, addr)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l) // ends by kill
	}()
	r := &running{countingListener: l, endpoint: l.Addr().String(), kill: func() { srv.Stop(); <-done }}
	t.Cleanup(r.kill)
	return r
}

func serveMaster(t *testing.T, m *master, addr string) *running {
	t.Helper()
	srv := NewServer(zerolog.Nop(), nil, Guard{})
	sutrav1.RegisterGridMasterServer(srv, m)
	return serve(t, srv, addr)
}

const anyPort = "127.0.0.1:0"

// closedPort is an endpoint that refuses connections.
func closedPort(t *testing.T) string {
	t.Helper()
	l := listen(t, anyPort)
	_ = l.Close()
	return l.Addr().String()
}

// dialMaster makes a channel that is closed when the test ends.
func dialMaster(t *testing.T, endpoint string, m *Metrics) (*Channel, sutrav1.GridMasterClient) {
	t.Helper()
	ch := Master(endpoint, nil, m)
	t.Cleanup(ch.Close)
	return ch, sutrav1.NewGridMasterClient(ch)
}

// serveInMemory serves srv until the test ends, without a network: for a bubble of time.
func serveInMemory(t *testing.T, srv *Server) *bufconn.Listener {
	t.Helper()
	l := bufconn.Listen(64 << 10)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = srv.Serve(l) // ends by Stop
	}()
	t.Cleanup(func() { srv.Stop(); <-served })
	return l
}

// dialInMemory makes a channel to what listens there, which is closed when the test ends; dials counts its connections.
func dialInMemory(t *testing.T, l *bufconn.Listener, trust Trust) (ch *Channel, dials *atomic.Int32) {
	t.Helper()
	dials = &atomic.Int32{}
	cc, err := grpc.NewClient("passthrough:///memory", grpc.WithTransportCredentials(trust.transport()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			dials.Add(1)
			return l.DialContext(ctx)
		}))
	if err != nil {
		t.Fatal(err)
	}
	ch = masterChannel("memory", trust, nil)
	ch.link.conn = &conn{ClientConn: cc, shown: trust.newest()}
	t.Cleanup(ch.Close)
	return ch, dials
}

func listAgents(ctx context.Context, c sutrav1.GridMasterClient, opts ...grpc.CallOption) error {
	_, err := c.ListAgents(ctx, &sutrav1.ListAgentsRequest{}, opts...)
	return err
}

func heartbeat(ctx context.Context, c sutrav1.GridMasterClient) error {
	_, err := c.Heartbeat(ctx, &sutrav1.HeartbeatRequest{})
	return err
}

// wantError checks the whole of what a caller sees; the message may be given in part.
func wantError(t *testing.T, err error, reason Reason, message string) {
	t.Helper()
	e := AsError(err)
	if e == nil {
		t.Fatalf("no error, want %s", reason)
	}
	if e.Reason != reason || !strings.Contains(e.Message, message) {
		t.Errorf("got %s %q, want %s %q", e.Reason, e.Message, reason, message)
	}
	if strings.ContainsAny(e.Message, "\n") {
		t.Errorf("message has more than one line: %q", e.Message)
	}
}

// value reads a gauge or a counter.
func value(t *testing.T, m prometheus.Metric) float64 {
	t.Helper()
	var read dto.Metric
	if err := m.Write(&read); err != nil {
		t.Fatal(err)
	}
	return read.GetGauge().GetValue() + read.GetCounter().GetValue()
}

// skip skips the test, which is a failure where SUTRA_TEST_NO_SKIP is set.
func skip(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("SUTRA_TEST_NO_SKIP") != "" {
		t.Fatalf("%s, and SUTRA_TEST_NO_SKIP forbids to skip", why)
	}
	t.Skip(why)
}
