package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
)

// answerTime is what is kept of a call's time for its answer, so that a caller learns what is the matter instead of
// merely running out of time.
const answerTime = 250 * time.Millisecond

// drainTime is how long a stopping server waits for calls under way.
const drainTime = 5 * time.Second

// NewServer makes a gRPC server with the grid's limits. Services are registered by the caller; m may be nil.
func NewServer(log zerolog.Logger, m *Metrics) *grpc.Server {
	unary := []grpc.UnaryServerInterceptor{guard(log)}
	var stream []grpc.StreamServerInterceptor
	if m != nil {
		unary = append([]grpc.UnaryServerInterceptor{m.server.UnaryServerInterceptor()}, unary...)
		stream = append(stream, m.server.StreamServerInterceptor())
	}
	return grpc.NewServer(
		grpc.ChainUnaryInterceptor(unary...),
		grpc.ChainStreamInterceptor(stream...),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.ConnectionTimeout(10*time.Second), // a handshake that dawdles holds no place
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout}),
		// Half of what callers keep to, so that a ping which comes early isn't an offence.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveTime / 2, PermitWithoutStream: true}),
	)
}

// guard gives each call its method's deadline even where the caller set none, turns a panic into INTERNAL
// and plain errors into an Error.
func guard(log zerolog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
		if deadline, ok := handlerDeadline(ctx, info.FullMethod, time.Now()); ok {
			var cancel context.CancelFunc
			ctx, cancel = context.WithDeadline(ctx, deadline)
			defer cancel()
		}
		start := time.Now()
		defer func() {
			if caught := recover(); caught != nil {
				log.Error().Str("method", info.FullMethod).Str("panic", fmt.Sprint(caught)).
					Bytes("stack", debug.Stack()).Msg("a handler panicked")
				resp, err = nil, Errorf(Internal, "%s failed inside: %v", info.FullMethod, caught)
			}
			if err == nil {
				return
			}
			if _, ok := status.FromError(err); !ok {
				err = AsError(err)
			}
			log.Debug().Str("method", info.FullMethod).Stringer("code", status.Code(err)).
				Dur("took_ms", time.Since(start)).Err(err).Msg("call failed")
		}()
		return handler(ctx, req)
	}
}

// handlerDeadline is when a call's handler must have ended: a little before the caller's time or the method's own is
// over, whichever is earlier, so that what it then says arrives.
func handlerDeadline(ctx context.Context, method string, now time.Time) (deadline time.Time, ok bool) {
	deadline, ok = ctx.Deadline()
	if p, known := PolicyOf(method); known && p.Timeout > 0 {
		if own := now.Add(p.Timeout); !ok || own.Before(deadline) {
			deadline, ok = own, true
		}
	}
	return deadline.Add(-min(answerTime, deadline.Sub(now)/10)), ok
}

// Serve serves until ctx ends; then it takes no more calls and gives those under
// way 5 s. It closes the listener.
func Serve(ctx context.Context, srv *grpc.Server, l net.Listener) error {
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		srv.Stop() // ends the connections that were accepted before
		return fmt.Errorf("serve gRPC on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	drained := make(chan struct{})
	go func() { srv.GracefulStop(); close(drained) }()
	select {
	case <-drained:
	case <-time.After(drainTime):
		srv.Stop()
		<-drained
	}
	if err := <-failed; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve gRPC on %s: %w", l.Addr(), err)
	}
	return nil
}
