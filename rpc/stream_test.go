package rpc

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/test/bufconn"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

type tailStream = grpc.ServerStreamingServer[sutrav1.TailLogsResponse]

// streaming is a master whose TailLogs a test writes.
type streaming struct {
	sutrav1.UnimplementedGridMasterServer
	tailLogs func(tailStream) error
}

func (s *streaming) TailLogs(_ *sutrav1.TailLogsRequest, stream tailStream) error {
	return s.tailLogs(stream)
}

// tail reads a stream to its end.
func tail(ctx context.Context, c sutrav1.GridMasterClient) (pieces int, err error) {
	stream, err := c.TailLogs(ctx, &sutrav1.TailLogsRequest{})
	if err != nil {
		return 0, err
	}
	for {
		if _, err := stream.Recv(); err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return pieces, err
		}
		pieces++
	}
}

func piece(size int) *sutrav1.TailLogsResponse {
	return &sutrav1.TailLogsResponse{Chunk: &sutrav1.LogChunk{Data: make([]byte, size)}}
}

// What goes wrong in a stream reaches its caller in the one form, and ends nothing else.
func TestStreamErrors(t *testing.T) {
	checkLeaks(t)
	log := &safeBuffer{}
	for name, test := range map[string]struct {
		handler func(tailStream) error
		reason  Reason
		message string
	}{
		"own":   {func(tailStream) error { return Errorf(NodeNotFound, "no node x").With("node_id", "x") }, NodeNotFound, "no node x"},
		"plain": {func(tailStream) error { return errors.New("plain trouble") }, Internal, "plain trouble"},
		"panic": {func(tailStream) error { panicsHere(); return nil }, Internal, "/sutra.v1.GridMaster/TailLogs failed inside: a broken invariant"},
	} {
		t.Run(name, func(t *testing.T) {
			srv := NewServer(zerolog.New(log), nil, Guard{})
			sutrav1.RegisterGridMasterServer(srv, &streaming{tailLogs: func(s tailStream) error {
				if err := s.Send(piece(10)); err != nil {
					return err
				}
				return test.handler(s)
			}})
			_, client := dialMaster(t, serve(t, srv, anyPort).endpoint, nil)
			for range 2 {
				pieces, err := tail(t.Context(), client)
				wantError(t, err, test.reason, test.message)
				if pieces != 1 {
					t.Errorf("%d pieces came before the error", pieces)
				}
			}
		})
	}
	if !strings.Contains(log.String(), "panicsHere") {
		t.Errorf("the panic's place isn't in the log:\n%s", log)
	}
}

// A connection that breaks under a stream is the transport's trouble, and is called so.
func TestABrokenStreamIsUnreachable(t *testing.T) {
	checkLeaks(t)
	srv := NewServer(zerolog.Nop(), nil, Guard{})
	began := make(chan struct{})
	sutrav1.RegisterGridMasterServer(srv, &streaming{tailLogs: func(s tailStream) error {
		close(began)
		<-s.Context().Done()
		return s.Context().Err()
	}})
	up := serve(t, srv, anyPort)
	_, client := dialMaster(t, up.endpoint, nil)
	ended := make(chan error, 1)
	go func() {
		_, err := tail(t.Context(), client)
		ended <- err
	}()
	<-began
	up.kill()
	wantError(t, receive(t, "the stream's end", ended), MasterUnreachable, "can't reach the master at "+up.endpoint)
}

// A server that stops ends its streams, whether they wait for something to send or for their caller to read, and a
// caller that hangs up ends its own.
func TestStreamsEndWithTheServer(t *testing.T) {
	for name, handler := range map[string]func(tailStream) error{
		"waits": func(s tailStream) error {
			<-s.Context().Done()
			return s.Context().Err()
		},
		"its caller doesn't read": func(s tailStream) error {
			for {
				if err := s.Send(piece(1 << 20)); err != nil {
					return err
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			// A server that drains waits half a second for its streams: none of that is the machine's.
			synctest.Test(t, func(t *testing.T) {
				srv := NewServer(zerolog.Nop(), nil, Guard{})
				began, gone := make(chan struct{}, 2), make(chan struct{}, 2)
				sutrav1.RegisterGridMasterServer(srv, &streaming{tailLogs: func(s tailStream) error {
					defer func() { gone <- struct{}{} }()
					if err := s.Send(piece(1)); err != nil {
						return err
					}
					began <- struct{}{}
					return handler(s)
				}})
				l := bufconn.Listen(64 << 10)
				ctx, stop := context.WithCancel(t.Context())
				defer stop()
				served := make(chan error, 1)
				go func() { served <- Serve(ctx, srv, l) }()
				ch, _ := dialInMemory(t, l, Trust{})
				client := sutrav1.NewGridMasterClient(ch)

				hangsUp, hangUp := context.WithCancel(t.Context())
				if _, err := client.TailLogs(hangsUp, &sutrav1.TailLogsRequest{}); err != nil {
					t.Fatal(err)
				}
				receive(t, "the stream's start", began)
				hangUp()
				receive(t, "the end of a stream whose caller hung up", gone)

				stream, err := client.TailLogs(t.Context(), &sutrav1.TailLogsRequest{})
				if err != nil {
					t.Fatal(err)
				}
				receive(t, "the stream's start", began)
				stop()
				if err := receive(t, "Serve's return", served); err != nil {
					t.Errorf("Serve returns %v", err)
				}
				receive(t, "the stream's end", gone)
				for err == nil {
					_, err = stream.Recv()
				}
				if reason := ReasonOf(err); reason != ShuttingDown && (name == "waits" || reason != MasterUnreachable) {
					t.Errorf("the caller is told %v", err)
				}
			})
		})
	}
}

// The other end's silence is borne for the time that the caller or the contract gives it, and only until its first
// message: what follows may take long. Time passes only while all wait, so that none of it is the machine's.
func TestAStreamWithoutAnAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := NewServer(zerolog.Nop(), nil, Guard{})
		var streams atomic.Int32
		outlived, over := make(chan struct{}), make(chan struct{})
		sutrav1.RegisterGridMasterServer(srv, &streaming{tailLogs: func(s tailStream) error {
			if streams.Add(1) == 1 {
				if err := s.Send(piece(1)); err != nil {
					return err
				}
				select {
				case <-outlived:
					return s.Send(piece(1))
				case <-s.Context().Done():
				}
			}
			<-s.Context().Done()
			<-over // a server that hangs doesn't say at the last moment that the time is over
			return s.Context().Err()
		}})
		ch, _ := dialInMemory(t, serveInMemory(t, srv), Trust{})
		defer close(over)
		const limit = time.Second
		client := sutrav1.NewGridMasterClient(within{ch, limit})
		long, err := client.TailLogs(t.Context(), &sutrav1.TailLogsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := long.Recv(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Nanosecond) // its time is over when that of another, which begins later, is
		began := time.Now()
		_, err = tail(t.Context(), client)
		wantError(t, err, TimedOut, "the master at memory is there, and sent nothing of what was asked for in time")
		if !Unanswered(err) {
			t.Error("silence passes for an answer")
		}
		if took := time.Since(began); took != limit {
			t.Errorf("it was borne for %s, want %s", took, limit)
		}
		close(outlived)
		if _, err := long.Recv(); err != nil {
			t.Errorf("a stream that had begun: %v", err)
		}
		if _, err := long.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("at its end: %v", err)
		}

		// A caller that hangs up isn't told that the other end was slow, and one whose own time is over is.
		ctx, hangUp := context.WithCancel(t.Context())
		hangUp()
		_, err = tail(ctx, client)
		wantError(t, err, Canceled, "the call to the master was canceled")
		ctx, hangUp = context.WithTimeout(t.Context(), limit)
		defer hangUp()
		_, err = tail(ctx, sutrav1.NewGridMasterClient(ch))
		wantError(t, err, TimedOut, "the master at memory didn't answer in time")
	})
}

// What accepts connections and says nothing holds a stream up no longer than anything else.
func TestAStreamToASilentPort(t *testing.T) {
	checkLeaks(t)
	l := listen(t, anyPort)
	t.Cleanup(func() { _ = l.Close() })
	ch, _ := dialMaster(t, l.Addr().String(), nil)
	_, err := tail(t.Context(), sutrav1.NewGridMasterClient(within{ch, 50 * time.Millisecond}))
	wantError(t, err, TimedOut, "the master at "+l.Addr().String()+" didn't answer in time")
}

// within is a channel whose streams are to be answered in a time.
type within struct {
	*Channel
	limit time.Duration
}

func (w within) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return w.NewStreamWithin(ctx, w.limit, desc, method, opts...)
}

// A connection that this side drops, because its other end is taken for dead, breaks the streams on it: nobody canceled
// them.
func TestADroppedConnectionBreaksItsStreams(t *testing.T) {
	checkLeaks(t)
	srv := NewServer(zerolog.Nop(), nil, Guard{})
	began := make(chan struct{})
	sutrav1.RegisterGridMasterServer(srv, &streaming{tailLogs: func(s tailStream) error {
		if err := s.Send(piece(1)); err != nil {
			return err
		}
		close(began)
		<-s.Context().Done()
		return s.Context().Err()
	}})
	up := serve(t, srv, anyPort)
	ch, client := dialMaster(t, up.endpoint, nil)
	ended := make(chan error, 1)
	go func() {
		_, err := tail(t.Context(), client)
		ended <- err
	}()
	receive(t, "the stream's start", began)
	ch.Close()
	wantError(t, receive(t, "the stream's end", ended), MasterUnreachable, "can't reach the master at "+up.endpoint+": the connection broke")

	ch, client = dialMaster(t, up.endpoint, nil)
	c, err := ch.link.acquire()
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close() // between a call's taking it and its using it
	_, err = tail(t.Context(), client)
	wantError(t, err, MasterUnreachable, "can't reach the master at "+up.endpoint+": the connection broke")
	ch.link.release(c, false)
}
