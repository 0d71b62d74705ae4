package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
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

// Server is a gRPC server with the grid's limits.
type Server struct {
	*grpc.Server
	log       zerolog.Logger
	security  Guard
	admission *admission
	// stopping is closed when the server begins to stop.
	stopping chan struct{}
	stopOnce sync.Once
	// calls counts the unary calls under way.
	calls atomic.Int64
}

// NewServer makes a server. Services are registered by the caller; m may be nil.
func NewServer(log zerolog.Logger, m *Metrics, g Guard) *Server {
	s := &Server{log: log, security: g, admission: newAdmission(g), stopping: make(chan struct{})}
	unary := []grpc.UnaryServerInterceptor{s.guard}
	stream := []grpc.StreamServerInterceptor{s.guardStream}
	if m != nil {
		unary = append([]grpc.UnaryServerInterceptor{m.server.UnaryServerInterceptor()}, unary...)
		stream = append([]grpc.StreamServerInterceptor{m.server.StreamServerInterceptor()}, stream...)
	}
	s.Server = grpc.NewServer(
		grpc.Creds(s.admission),
		grpc.ChainUnaryInterceptor(unary...),
		grpc.ChainStreamInterceptor(stream...),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.ConnectionTimeout(10*time.Second), // a handshake that dawdles holds no place
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		// Half of what callers keep to, so that a ping which comes early isn't an offence.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveTime / 2, PermitWithoutStream: true}),
	)
	return s
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
		s.security.Audit.call(ctx, info.FullMethod, start, req, resp, err)
	}()
	if refused := s.security.authorize(info.FullMethod, callerOf(ctx), req, start); refused != nil {
		return nil, refused
	}
	return handler(ctx, req)
}

// Expel ends the connections of those who are banned by now.
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

// guardStream does the same for streams, which have no deadline: they end with the server. It tells their callers at
// once that they are heard, who may have to wait for the first message.
func (s *Server) guardStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	ended := make(chan struct{})
	defer func() { <-ended }()
	go func() {
		defer close(ended)
		select {
		case <-s.stopping:
			cancel()
		case <-ctx.Done():
		}
	}()
	defer cancel()             // before the wait
	_ = stream.SendHeader(nil) // where it fails, the stream is over
	start := time.Now()
	defer func() {
		caught := recover()
		select {
		case <-s.stopping:
			if err != nil && caught == nil {
				err = Errorf(ShuttingDown, "%s was broken off: the server is shutting down", info.FullMethod)
			}
		default:
		}
		err = s.outcome(info.FullMethod, start, caught, err)
		s.security.Audit.call(ctx, info.FullMethod, start, nil, nil, err)
	}()
	if refused := s.security.authorize(info.FullMethod, callerOf(ctx), nil, start); refused != nil {
		return refused
	}
	return handler(srv, guarded{stream, ctx})
}

// guarded is a stream whose context ends with the server, too.
type guarded struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // it is the stream's
}

func (g guarded) Context() context.Context { return g.ctx }

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
