package storage

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
)

// pipes is a listener in memory, so that a server's time-outs run on a bubble's clock.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	close(p.closed)
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: "pipe"} }

func (p *pipes) dial() net.Conn {
	near, far := net.Pipe()
	p.conns <- far
	return near
}

// lingering is a connection whose reader takes a second to see its end.
type lingering struct{ net.Conn }

func (l lingering) Read(b []byte) (int, error) {
	n, err := l.Conn.Read(b)
	if err != nil {
		time.Sleep(time.Second)
	}
	return n, err
}

// inBubble runs a test beside a server, which cancel tells to stop and ended says has.
func inBubble(t *testing.T, test func(t *testing.T, l *pipes, cancel func(), ended <-chan error)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l := &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
		s, err := New(Config{Listener: l, Path: t.TempDir(), Log: zerolog.Nop()})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() {
			ended <- s.Run(ctx)
			close(ended)
		}()
		defer func() {
			cancel()
			if err := <-ended; err != nil {
				t.Errorf("run: %v", err)
			}
		}()
		test(t, l, cancel, ended)
	})
}

// roundTrip sends a request over a connection of its own and gives the answer's code.
func roundTrip(t *testing.T, l *pipes, request string) int {
	t.Helper()
	conn := l.dial()
	defer conn.Close()
	return exchange(t, conn, request)
}

func exchange(t *testing.T, conn net.Conn, request string) int {
	t.Helper()
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	return readCode(t, conn)
}

func readCode(t *testing.T, conn net.Conn) int {
	t.Helper()
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		t.Fatal(err)
	}
	return res.StatusCode
}

func putRequest(key string, size int, body string) string {
	return fmt.Sprintf("PUT /kv/%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", key, size, body)
}

func TestSlowClientsAreCutOff(t *testing.T) {
	for name, tc := range map[string]struct {
		first string // sent at once, then a byte each second
		after time.Duration
	}{
		"header":  {"GET /kv/k HTTP/1.1\r\nX: ", headerTimeout},
		"body":    {putRequest("k", 1000, ""), readTimeout},
		"nothing": {"", headerTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T, l *pipes, _ func(), _ <-chan error) {
				start := time.Now()
				conn := l.dial()
				defer conn.Close()
				var dripping sync.WaitGroup
				dripping.Go(func() {
					_, err := io.WriteString(conn, tc.first)
					for err == nil && tc.first != "" {
						time.Sleep(time.Second)
						_, err = io.WriteString(conn, "x")
					}
				})
				first := make([]byte, 1)
				_, err := conn.Read(first)
				if took := time.Since(start); took != tc.after {
					t.Errorf("cut off after %s (%v), want %s", took, err, tc.after)
				}
				_, _ = io.Copy(io.Discard, conn)
				dripping.Wait()
				if code := roundTrip(t, l, "GET /kv/k HTTP/1.1\r\nHost: x\r\n\r\n"); code != http.StatusNotFound {
					t.Errorf("the half-sent key was answered %d, want 404", code)
				}
			})
		})
	}
}

func TestIdleClientsAreCutOff(t *testing.T) {
	inBubble(t, func(t *testing.T, l *pipes, _ func(), _ <-chan error) {
		conn := l.dial()
		defer conn.Close()
		if code := exchange(t, conn, putRequest("k", 1, "v")); code != http.StatusNoContent {
			t.Fatalf("answered %d, want 204", code)
		}
		start := time.Now()
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) || time.Since(start) != idleTimeout {
			t.Errorf("got %v after %s, want EOF after %s", err, time.Since(start), idleTimeout)
		}
	})
}

// TestReadersThatStop lets two clients ask for a value and not take it, while it
// is overwritten until its place in the file is used again.
func TestReadersThatStop(t *testing.T) {
	inBubble(t, func(t *testing.T, l *pipes, _ func(), _ <-chan error) {
		const size = 1 << 20
		put := func(letter string) {
			t.Helper()
			if code := roundTrip(t, l, putRequest("k", size, strings.Repeat(letter, size))); code != http.StatusNoContent {
				t.Fatalf("answered %d, want 204", code)
			}
		}
		put("v")
		start := time.Now()
		slow, stuck := l.dial(), l.dial()
		defer slow.Close()
		defer stuck.Close()
		for _, conn := range []net.Conn{slow, stuck} {
			if _, err := io.WriteString(conn, "GET /kv/k HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
		for _, letter := range []string{"a", "b", "c", "d"} {
			put(letter)
		}
		if took := time.Since(start); took >= writeTimeout {
			t.Errorf("the writers waited %s for the readers", took)
		}

		res, err := http.ReadResponse(bufio.NewReader(slow), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if got, err := io.ReadAll(res.Body); err != nil || string(got) != strings.Repeat("v", size) {
			t.Errorf("the slow reader got %d bytes, %v, other than those it asked for", len(got), err)
		}
		time.Sleep(time.Until(start.Add(writeTimeout + 1)))
		if got, _ := io.Copy(io.Discard, stuck); got >= size {
			t.Error("the stuck reader got its value after all that time")
		}
	})
}

func TestStopLetsARequestUnderWayEnd(t *testing.T) {
	inBubble(t, func(t *testing.T, l *pipes, cancel func(), ended <-chan error) {
		conn := l.dial()
		defer conn.Close()
		if _, err := io.WriteString(conn, putRequest("k", 4, "ha")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		cancel()
		time.Sleep(stopTimeout - time.Second)
		select {
		case err := <-ended:
			t.Fatalf("ended before the request: %v", err)
		default:
		}
		if code := exchange(t, conn, "lf"); code != http.StatusNoContent {
			t.Errorf("answered %d, want 204", code)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// TestStopCutsOffWhoTakesTooLong also holds Run to its word that all has ended
// when it returns: the handler that was cut off too.
func TestStopCutsOffWhoTakesTooLong(t *testing.T) {
	inBubble(t, func(t *testing.T, l *pipes, cancel func(), ended <-chan error) {
		conn, far := net.Pipe()
		defer conn.Close()
		l.conns <- lingering{far}
		if _, err := io.WriteString(conn, putRequest("k", 4, "ha")); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		start := time.Now()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if took := time.Since(start); took < stopTimeout+time.Second || took >= 2*stopTimeout {
			t.Errorf("ended after %s, want %s and a second or few", took, stopTimeout)
		}
	})
}

func TestABrokenListenerEndsRun(t *testing.T) {
	l := loopback(t)
	path := t.TempDir()
	s, err := New(Config{Listener: l, Path: path, Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Run(t.Context()); err == nil {
		t.Error("run ended without an error")
	} else {
		expectSays(t, err.Error(), "serve storage on", l.Addr().String())
	}
	// The store was closed, so that it opens again.
	start(t, path)
}
