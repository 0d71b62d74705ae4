package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	"github.com/sutra-grid/sutra/rpc/pki"
)

// answerTime is what is kept of a call's time for its answer, so that a caller learns what is the matter instead of
// merely running out of time.
const answerTime = 250 * time.Millisecond

const (
	// drainTime is how long a stopping server waits for calls under way.
	drainTime = 5 * time.Second
	// streamDrainTime is how long it waits for streams alone. They are ended when it begins to stop; what is left then are
	// those whose callers don't read.
	streamDrainTime = 500 * time.Millisecond
)

const (
	// maxHeaders bounds what is read of a call's headers.
	maxHeaders = 16 << 10
	// maxStreamsOfOne is how many streams, logs or events that are followed, one identity may have, over all of its connections, and how many
	// other calls besides. Each log is one of those that the master has to an agent.
	maxStreamsOfOne = 256
	// maxOfConnection is how many of both one connection may have at once: what one more waits for at its own end. A master
	// has one to each agent, for all of its callers.
	maxOfConnection, maxOfMasters = 2 * maxStreamsOfOne, 4096
	// maxRead is how many requests of one identity are read at once. Of each one more there is no more than its window meanwhile.
	// Together they are what one identity can make a server hold: 8 requests, and 512 windows.
	maxRead      = 8
	streamWindow = 64 << 10
	connWindow   = 1 << 20 // for all of a connection's requests under way; what came is made room for at once
	// requestTime is how long a request may take until it is whole, from when its method is known: as long as a call of most
	// methods may take in all.
	requestTime = 5 * time.Second
)

// Server is a gRPC server with the grid's limits.
type Server struct {
	*grpc.Server
	log       zerolog.Logger
	metrics   *Metrics
	security  Guard
	admission *admission
	door      *door
	joins     *joins
	streams   perIdentity
	underWay  perIdentity
	reads     turns
	// stopping is closed when the server begins to stop.
	stopping chan struct{}
	stopOnce sync.Once
	// calls counts the unary calls under way.
	calls atomic.Int64
}

// NewServer makes a server. Services are registered by the caller; m may be nil.
func NewServer(log zerolog.Logger, m *Metrics, g Guard) *Server {
	s := &Server{log: log, metrics: m, security: g, admission: newAdmission(g), door: newDoor(log, m), joins: newJoins(), stopping: make(chan struct{})}
	unary := []grpc.UnaryServerInterceptor{s.guard}
	stream := []grpc.StreamServerInterceptor{s.guardStream}
	if m != nil {
		unary = append([]grpc.UnaryServerInterceptor{m.server.UnaryServerInterceptor()}, unary...)
		stream = append([]grpc.StreamServerInterceptor{m.server.StreamServerInterceptor()}, stream...)
	}
	streams := uint32(maxOfConnection)
	if g.Credentials == nil || g.ForMasters { // in the clear nobody knows who a master is
		streams = maxOfMasters
	}
	s.Server = grpc.NewServer(
		grpc.Creds(s.admission),
		grpc.ChainUnaryInterceptor(unary...),
		grpc.ChainStreamInterceptor(stream...),
		grpc.InTapHandle(s.tap),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxHeaderListSize(maxHeaders),
		grpc.MaxConcurrentStreams(streams),
		grpc.StaticStreamWindowSize(streamWindow),
		grpc.StaticConnWindowSize(connWindow),
		grpc.ConnectionTimeout(10*time.Second), // a handshake that dawdles holds no place
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		// Half of what callers keep to, so that a ping which comes early isn't an offence.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveTime / 2, PermitWithoutStream: true}),
	)
	reflection.Register(s.Server)
	return s
}

// Serve serves a listener until Stop or GracefulStop.
func (s *Server) Serve(l net.Listener) error { return s.Server.Serve(guarding{l, s.door}) }

// underWay is a call that the server hears, and its context.
type underWay struct {
	context.Context //nolint:containedctx // it is one
	// cancel ends it where its request is late, which gRPC tells the caller by what Err says.
	cancel context.CancelFunc
	late   atomic.Bool
	// refused is why its request isn't read; nil where it is.
	refused *Error
	// begin puts on record that it begins to have an effect; nil where nothing is on record. begun: it was called; said: there is a line.
	begin func(node, agent string)
	begun bool
	said  bool
}

// Err says why it has ended.
func (u *underWay) Err() error {
	err := u.Context.Err()
	if err != nil && u.late.Load() {
		return context.DeadlineExceeded
	}
	return err
}

// Value has the call itself, too.
func (u *underWay) Value(key any) any {
	if key == (underWayKey{}) {
		return u
	}
	return u.Context.Value(key)
}

type underWayKey struct{}

func underWayOf(ctx context.Context) *underWay {
	u, _ := ctx.Value(underWayKey{}).(*underWay)
	return u
}

// tap bounds the calls of strangers before anything is read of them. It is called by the connection's reader, and doesn't
// wait.
func (s *Server) tap(ctx context.Context, _ *tap.Info) (context.Context, error) {
	caller := callerOf(ctx)
	if caller.calls != nil && caller.calls.Add(1) > strangerCalls {
		refused := s.security.banned(caller.Identity)
		if refused == nil {
			refused = Errorf(TooManyRequests, "more than %d calls without saying who it is", strangerCalls)
		}
		s.metrics.refuse(refused)
		return nil, refused
	}
	ctx, cancel := context.WithCancel(ctx) // which the stream's own end does, too
	return &underWay{Context: ctx, cancel: cancel}, nil
}

// RegisterService registers a service. Whoever may not call a method of it, or has too many calls under way, is refused before
// his request is read.
func (s *Server) RegisterService(d *grpc.ServiceDesc, impl any) {
	service := *d
	service.Methods = slices.Clone(d.Methods)
	for i := range service.Methods {
		m := &service.Methods[i]
		m.Handler = s.beforeReading(fmt.Sprintf("/%s/%s", d.ServiceName, m.MethodName), m.Handler)
	}
	s.Server.RegisterService(&service, impl)
}

// beforeReading is a method's handler with a look at its caller first.
func (s *Server) beforeReading(method string, handler grpc.MethodHandler) grpc.MethodHandler {
	return func(srv any, ctx context.Context, read func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		id := callerOf(ctx).Identity
		refused := s.security.admits(method, callerOf(ctx), time.Now())
		switch {
		case refused != nil:
		case !s.underWay.begin(id):
			refused = Errorf(TooManyRequests, "%s has %d calls under way already", id, maxStreamsOfOne).WithHint("wait for some of them")
		default:
			defer s.underWay.end(id)
			return handler(srv, ctx, func(m any) error { return s.read(ctx, func() error { return read(m) }) }, interceptor)
		}
		underWayOf(ctx).refused = refused
		// By way of guard, as any other, so that it is counted and on record.
		return interceptor(ctx, nil, &grpc.UnaryServerInfo{Server: srv, FullMethod: method}, nil)
	}
}

// read reads a request when it is its turn, within its time.
func (s *Server) read(ctx context.Context, read func() error) error {
	u := underWayOf(ctx)
	late := time.AfterFunc(requestTime, func() {
		u.late.Store(true)
		u.cancel()
	})
	done, err := s.reads.await(ctx, callerOf(ctx).Identity)
	if err == nil {
		defer done()
		err = read()
	}
	if !late.Stop() {
		return context.DeadlineExceeded
	}
	return err
}

// guard gives each call its method's deadline even where the caller set none, turns a panic into INTERNAL
// and plain errors into an Error.
func (s *Server) guard(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	s.calls.Add(1)
	defer s.calls.Add(-1)
	if deadline, ok := handlerDeadline(ctx, info.FullMethod, time.Now()); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, deadline)
		defer cancel()
	}
	start := time.Now()
	defer func() {
		if err = s.outcome(info.FullMethod, start, recover(), err); err != nil {
			resp = nil
		}
		s.metrics.refuse(err)
		s.security.Audit.call(ctx, info.FullMethod, start, req, resp, err)
	}()
	if refused := underWayOf(ctx).refused; refused != nil {
		return nil, refused
	}
	caller := callerOf(ctx)
	if refused := s.security.authorize(info.FullMethod, caller, req, start); refused != nil {
		return nil, refused
	}
	s.security.Audit.watch(ctx, info.FullMethod, start, req)
	if caller.calls == nil {
		return handler(ctx, req)
	}
	// A stranger that may call at all wants an identity.
	return s.joins.attempt(ctx, func() (any, error) { return handler(ctx, req) })
}

// Expel ends the connections of those who are banned by now, or aren't any more and were when they came, and of those whom the
// server's present roots don't vouch for.
func (s *Server) Expel() { s.admission.expel() }

// handlerDeadline is when a call's handler must have ended: a little before the caller's time or the method's own is
// over, whichever is earlier, so that what it then says arrives.
func handlerDeadline(ctx context.Context, method string, now time.Time) (deadline time.Time, ok bool) {
	deadline, ok = ctx.Deadline()
	if p, known := PolicyOf(method); known && p.Timeout > 0 {
		if own := now.Add(p.Timeout); !ok || own.Before(deadline) {
			deadline, ok = own, true
		}
	}
	if !ok {
		return time.Time{}, false
	}
	return deadline.Add(-min(answerTime, deadline.Sub(now)/10)), true
}

// guardStream does the same for streams, which have no deadline: they end with the server, and with the certificate that
// they were begun with. It tells their callers at once that they are heard, who may have to wait for the first message.
func (s *Server) guardStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	ctx, end := context.WithCancelCause(stream.Context())
	caller := callerOf(ctx)
	defer end(nil)
	ended := make(chan struct{})
	defer func() { <-ended }()
	go func() {
		defer close(ended)
		var expires <-chan time.Time // never, in the clear
		if caller.Identity != (pki.Identity{}) {
			timer := time.NewTimer(time.Until(caller.Expires))
			defer timer.Stop()
			expires = timer.C
		}
		select {
		case <-s.stopping:
			end(nil)
		case <-expires:
			end(errExpired)
		case <-ctx.Done():
		}
	}()
	defer end(nil) // before the wait
	start, begun := time.Now(), false
	defer func() {
		caught := recover()
		switch {
		case err == nil || caught != nil:
		case s.stops():
			err = Errorf(ShuttingDown, "%s was broken off: the server is shutting down", info.FullMethod)
		case begun && errors.Is(context.Cause(ctx), errExpired):
			err = Errorf(CertificateExpired, "%s was broken off: the certificate that %s began it with expired at %s", shortName(info.FullMethod),
				caller.Identity, caller.Expires.UTC().Format(time.RFC3339)).WithHint("renew the certificate, as sutra does by itself, and go on from where it was")
		}
		if err = s.outcome(info.FullMethod, start, caught, err); ReasonOf(err) == CertificateExpired {
			return // it wasn't refused
		}
		s.metrics.refuse(err)
		s.security.Audit.call(ctx, info.FullMethod, start, nil, nil, err)
	}()
	if refused := s.security.authorize(info.FullMethod, caller, nil, start); refused != nil {
		return refused
	}
	id := caller.Identity
	if !s.streams.begin(id) {
		return Errorf(TooManyRequests, "%s has %d streams open already", id, maxStreamsOfOne).WithHint("end some of them")
	}
	defer s.streams.end(id)
	begun = true
	_ = stream.SendHeader(nil) // where it fails, the stream is over
	if !info.IsClientStream {
		stream = asked{stream, s}
	}
	return handler(srv, guarded{stream, ctx})
}

// asked is a stream that begins with one request.
type asked struct {
	grpc.ServerStream
	server *Server
}

// RecvMsg reads the request.
func (a asked) RecvMsg(m any) error {
	return a.server.read(a.Context(), func() error { return a.ServerStream.RecvMsg(m) })
}

// turns lets so many of each identity do something at once, and others wait.
type turns struct {
	mu  sync.Mutex // guards all
	all map[pki.Identity]*turn
}

type turn struct {
	// places has as many as may be at it.
	places chan struct{}
	// wanted counts those who are at it, or wait.
	wanted int
}

// await waits for a place; done gives it back. As perIdentity, it bounds neither masters nor nobody.
func (t *turns) await(ctx context.Context, id pki.Identity) (done func(), err error) {
	if unbounded(id) {
		return func() {}, nil
	}
	t.mu.Lock()
	own := t.all[id]
	if own == nil {
		if t.all == nil {
			t.all = map[pki.Identity]*turn{}
		}
		own = &turn{places: make(chan struct{}, maxRead)}
		t.all[id] = own
	}
	own.wanted++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if own.wanted--; own.wanted == 0 {
			delete(t.all, id)
		}
	}
	select {
	case own.places <- struct{}{}:
		return func() { <-own.places; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

// perIdentity counts what each identity has open.
type perIdentity struct {
	mu   sync.Mutex // guards open
	open map[pki.Identity]int
}

// begin tells whether an identity may have one more. A master passes on what others want, and nobody isn't one: neither is bounded.
func (p *perIdentity) begin(id pki.Identity) bool {
	if unbounded(id) {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open[id] >= maxStreamsOfOne {
		return false
	}
	if p.open == nil {
		p.open = map[pki.Identity]int{}
	}
	p.open[id]++
	return true
}

func unbounded(id pki.Identity) bool { return id == (pki.Identity{}) || id.Kind == pki.Master }

func (p *perIdentity) end(id pki.Identity) {
	if unbounded(id) {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open[id]--; p.open[id] <= 0 {
		delete(p.open, id)
	}
}

// errExpired is the cause of a stream's end whose caller's certificate has come to its own.
var errExpired = errors.New("the caller's certificate has expired")

// stops tells whether the server has begun to stop.
func (s *Server) stops() bool {
	select {
	case <-s.stopping:
		return true
	default:
		return false
	}
}

// guarded is a stream whose context ends before its caller wants it, and which sends nothing after that.
type guarded struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // it is the stream's
}

func (g guarded) Context() context.Context { return g.ctx }

func (g guarded) SendMsg(m any) error {
	if err := g.ctx.Err(); err != nil {
		return err
	}
	return g.ServerStream.SendMsg(m)
}

// outcome is the error of a handler's, whatever it left behind.
func (s *Server) outcome(method string, start time.Time, caught any, err error) error {
	if caught != nil {
		s.log.Error().Str("method", method).Str("panic", fmt.Sprint(caught)).Bytes("stack", debug.Stack()).Msg("a handler panicked")
		err = Errorf(Internal, "%s failed inside: %v", method, caught)
	}
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); !ok {
		err = AsError(err)
	}
	s.log.Debug().Str("method", method).Stringer("code", status.Code(err)).Dur("took_ms", time.Since(start)).Err(err).Msg("call failed")
	return err
}

// Serve serves until ctx ends; then it takes no more calls, ends the streams and gives calls under
// way 5 s. It closes the listener.
func Serve(ctx context.Context, srv *Server, l net.Listener) error {
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		srv.Stop() // ends the connections that were accepted before
		return fmt.Errorf("serve gRPC on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	srv.stopOnce.Do(func() { close(srv.stopping) })
	drained := make(chan struct{})
	go func() { srv.GracefulStop(); close(drained) }()
	srv.drain(drained)
	if err := <-failed; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve gRPC on %s: %w", l.Addr(), err)
	}
	return nil
}

// drain waits until the server has drained, and ends what takes too long.
func (s *Server) drain(drained <-chan struct{}) {
	over := time.NewTimer(drainTime)
	defer over.Stop()
	streams := time.NewTicker(streamDrainTime)
	defer streams.Stop()
	for {
		select {
		case <-drained:
			return
		case <-streams.C:
			if s.calls.Load() > 0 {
				continue
			}
		case <-over.C:
		}
		s.Stop()
		<-drained
		return
	}
}
