package rpc

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"github.com/sutra-grid/sutra/rpc/pki"
)

const (
	// keepaliveTime is how long a connection may be silent before a ping asks whether its other
	// end lives; keepaliveTimeout is how long the answer may take. Without them a call on a
	// connection whose host vanished hangs until TCP gives up, a quarter of an hour later.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 5 * time.Second

	// maxRequest bounds what a server reads, and so what a stranger can make it hold.
	maxRequest = 4 << 20
	// maxResponse bounds what a caller reads from a server that it chose: a list of 100,000 nodes fits.
	maxResponse = 64 << 20
)

// link is the one connection to an endpoint. A failed connection is replaced, not
// repaired: gRPC's own reconnect waits a second and more.
type link struct {
	endpoint string
	metrics  *Metrics
	trust    Trust

	mu     sync.Mutex // guards what follows
	conn   *conn      // nil until the first call and after a failure
	closed bool
}

// conn counts its calls, so that dropping it doesn't break those that still go well.
type conn struct {
	*grpc.ClientConn
	shown   *pki.Credentials // when it was made
	calls   int              // guarded by link.mu
	dropped bool             // guarded by link.mu
}

func newLink(endpoint string, trust Trust, m *Metrics) *link {
	return &link{endpoint: endpoint, trust: trust, metrics: m}
}

func (l *link) invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	c, err := l.acquire()
	if err != nil {
		return err
	}
	err = uncanceled(ctx, c.Invoke(ctx, method, args, reply, opts...))
	l.release(c, broken(err))
	return err
}

// uncanceled is an error of a call with a context. CANCELED is also gRPC's word for a connection that was closed before
// the call or under it; where it isn't the caller who canceled, that is what it means.
func uncanceled(ctx context.Context, err error) error {
	if status.Code(err) == codes.Canceled && ctx.Err() == nil && !answered(err) {
		return status.Error(codes.Unavailable, "the connection broke")
	}
	return err
}

func (l *link) newStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	c, err := l.acquire()
	if err != nil {
		return nil, err
	}
	opts = append(opts, grpc.OnFinish(func(err error) { l.release(c, broken(err)) }))
	return c.NewStream(ctx, desc, method, opts...)
}

// broken tells whether an error is the transport's.
func broken(err error) bool { return status.Code(err) == codes.Unavailable && !answered(err) }

func (l *link) acquire() (*conn, error) {
	var idle *conn
	defer func() {
		if idle != nil {
			_ = idle.Close() // errs only where it was closed before
		}
	}()
	l.mu.Lock()
	defer l.mu.Unlock() // before the above
	if l.closed {
		return nil, errClosed
	}
	newest := l.trust.newest() // with the lock held: of two callers, the later one must not have seen the earlier credentials
	if old := l.conn; old != nil && old.shown != newest {
		// The credentials were renewed: calls under way end on the connection that they began on.
		l.conn, old.dropped = nil, true
		l.metrics.connections(-1)
		if old.calls == 0 {
			idle = old
		}
	}
	if l.conn == nil {
		cc, err := dial(l.endpoint, l.trust, l.metrics) // no I/O: gRPC connects at the first call
		if err != nil {
			return nil, status.Error(codes.Unavailable, err.Error())
		}
		l.conn = &conn{ClientConn: cc, shown: newest}
		l.metrics.connections(1)
	}
	l.conn.calls++
	return l.conn, nil
}

func (l *link) release(c *conn, failed bool) {
	l.mu.Lock()
	c.calls--
	if failed && l.conn == c {
		l.conn, c.dropped = nil, true
		l.metrics.connections(-1)
	}
	last := c.dropped && c.calls == 0
	l.mu.Unlock()
	if last {
		_ = c.Close() // errs only where it was closed before
	}
}

func (l *link) close() {
	l.mu.Lock()
	c := l.conn
	l.conn, l.closed = nil, true
	l.mu.Unlock()
	if c != nil {
		l.metrics.connections(-1)
		_ = c.Close() // errs only where it was closed before
	}
}

func dial(endpoint string, trust Trust, m *Metrics) (*grpc.ClientConn, error) {
	opts := []grpc.DialOption{
		grpc.WithTransportCredentials(trust.transport()),
		grpc.WithDisableServiceConfig(),
		grpc.WithNoProxy(),      // a grid's hosts reach each other directly, whatever HTTPS_PROXY is for
		grpc.WithDisableRetry(), // the middleware retries, and only what is safe
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxResponse)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true,
		}),
	}
	if m != nil {
		opts = append(opts, grpc.WithUnaryInterceptor(m.client.UnaryClientInterceptor()),
			grpc.WithStreamInterceptor(m.client.StreamClientInterceptor()))
	}
	// passthrough: the endpoint is host:port and nothing else; the system's resolver looks the host up at each dial.
	return grpc.NewClient("passthrough:///"+endpoint, opts...)
}
