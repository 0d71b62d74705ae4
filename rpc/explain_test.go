package rpc

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// serveRaw treats each connection as the test says, and closes it then.
func serveRaw(t *testing.T, treat func(net.Conn)) string {
	t.Helper()
	l := listen(t, anyPort)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			treat(c)
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return l.Addr().String()
}

// says sends a few words and then listens until its caller hangs up.
func says(words string) func(net.Conn) {
	return func(c net.Conn) {
		_, _ = io.WriteString(c, words)
		_, _ = io.Copy(io.Discard, c)
	}
}

func serveHTTP(t *testing.T, h2c bool) string {
	t.Helper()
	l := listen(t, anyPort)
	srv := &http.Server{Handler: http.NotFoundHandler(), ReadHeaderTimeout: patience, Protocols: new(http.Protocols)}
	srv.Protocols.SetHTTP1(!h2c)
	srv.Protocols.SetUnencryptedHTTP2(h2c)
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close(); <-done })
	return l.Addr().String()
}

// Each case calls Heartbeat, which is tried once.
func TestWhoAnswersInsteadOfTheMaster(t *testing.T) {
	for name, c := range map[string]struct {
		start   func(t *testing.T) string
		reason  Reason
		code    codes.Code
		message string // AT stands for the endpoint
		unsent  bool
	}{
		"nobody": {closedPort, MasterUnreachable, codes.Unavailable, "can't reach the master at AT: connection refused", true},
		"HTTP/1.1": {
			func(t *testing.T) string { return serveHTTP(t, false) },
			MasterUnreachable, codes.Unavailable, "can't reach the master at AT: what listens there doesn't speak gRPC", false,
		},
		"HTTP/2": {
			func(t *testing.T) string { return serveHTTP(t, true) },
			MasterUnreachable, codes.Unavailable, "can't reach the master at AT: what listens there doesn't speak gRPC", true,
		},
		"SSH": {
			func(t *testing.T) string { return serveRaw(t, says("SSH-2.0-OpenSSH_9.6\r\n")) },
			MasterUnreachable, codes.Unavailable, "can't reach the master at AT: what listens there doesn't speak gRPC", false,
		},
		"redis": {
			func(t *testing.T) string { return serveRaw(t, says("-ERR unknown command 'PRI'\r\n")) },
			MasterUnreachable, codes.Unavailable, "can't reach the master at AT: what listens there doesn't speak gRPC", false,
		},
		"one who closes at once": {
			func(t *testing.T) string { return serveRaw(t, func(net.Conn) {}) },
			MasterUnreachable, codes.Unavailable, "can't reach the master at AT: what listens there closed the connection at once, as a grid without --insecure does to those who call with it", false,
		},
		"another gRPC server": {
			func(t *testing.T) string { return serve(t, grpc.NewServer(), anyPort).endpoint },
			MasterUnreachable, codes.Unavailable, "can't reach the master at AT: what listens there is another gRPC service", true,
		},
		"no port": {
			func(*testing.T) string { return "localhost" },
			MasterUnreachable, codes.Unavailable, "can't reach the master at AT: address localhost: missing port in address", true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			endpoint := c.start(t)
			_, client := dialMaster(t, endpoint, nil)
			err := heartbeat(t.Context(), client)
			message := strings.ReplaceAll(c.message, "AT", endpoint)
			wantError(t, err, c.reason, message)
			if got := AsError(err); got.Message != message || got.Code() != c.code || got.unsent != c.unsent {
				t.Errorf("got %q %s unsent %v, want %q %s %v", got.Message, got.Code(), got.unsent, message, c.code, c.unsent)
			}
		})
	}
}

func TestAListenerThatNeverSpeaks(t *testing.T) {
	checkLeaks(t)
	ctx := timed{t.Context(), make(chan struct{})}
	endpoint := serveRaw(t, func(c net.Conn) {
		close(ctx.over)
		says("")(c)
	})
	_, client := dialMaster(t, endpoint, nil)
	err := heartbeat(ctx, client)
	wantError(t, err, TimedOut, "the master at "+endpoint+" didn't answer in time")
	if AsError(err).Code() != codes.DeadlineExceeded || NoEffect(err) {
		t.Errorf("code %s, NoEffect %v", AsError(err).Code(), NoEffect(err))
	}
}

func TestAHostWithoutAddress(t *testing.T) {
	checkLeaks(t)
	// Longer than a name may be, so that it is refused here and no resolver has to answer.
	host := strings.Repeat("x", 64) + ".invalid"
	_, client := dialMaster(t, host+":7000", nil)
	err := heartbeat(t.Context(), client)
	wantError(t, err, MasterUnreachable, "can't reach the master at "+host+":7000: lookup "+host)
	if !NoEffect(err) {
		t.Error("a call to nowhere passes for one that may have had an effect")
	}
}

func TestAgentsAreNamed(t *testing.T) {
	checkLeaks(t)
	pool := NewPool(nil, nil)
	t.Cleanup(pool.Close)
	endpoint := closedPort(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, err := sutrav1.NewGridAgentClient(pool.Agent("agent-001", endpoint)).
		ListNodes(ctx, &sutrav1.GridAgentListNodesRequest{}, grpc.OnFinish(func(error) { cancel() }))
	wantError(t, err, AgentUnreachable, "can't reach agent agent-001 at "+endpoint+": connection refused")
}

func TestMessagesTooLarge(t *testing.T) {
	checkLeaks(t)
	m := &master{
		// Of all methods this one has the most time, which so long an answer may need.
		spawnNode: func(_ context.Context, req *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
			if req.GetStoragePath() != "" {
				return &sutrav1.SpawnNodeResponse{}, nil
			}
			return &sutrav1.SpawnNodeResponse{Node: &sutrav1.Node{Reason: strings.Repeat("x", maxResponse+1)}}, nil
		},
		heartbeat: func(context.Context, int) (*sutrav1.HeartbeatResponse, error) {
			return nil, status.Error(codes.ResourceExhausted, "too many streams")
		},
	}
	endpoint := serveMaster(t, m, anyPort).endpoint
	_, client := dialMaster(t, endpoint, nil)

	for _, c := range []struct {
		size int
		said string // "": it is accepted
	}{
		{5_000_000, "4.8 MiB"},
		{maxRequest, "4.1 MiB"}, // its frame makes it longer
		{maxRequest - 100, ""},
	} {
		_, err := client.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{StoragePath: strings.Repeat("x", c.size)})
		if c.said == "" {
			if err != nil {
				t.Errorf("a request of %d bytes: %v", c.size, err)
			}
			continue
		}
		wantError(t, err, MessageTooLarge, "the request to the master at "+endpoint+" is too large: "+c.said+", where at most 4.0 MiB are accepted")
		if e := AsError(err); e.Code() != codes.ResourceExhausted || !NoEffect(err) || e.Hint == "" {
			t.Errorf("code %s, NoEffect %v, hint %q", e.Code(), NoEffect(err), e.Hint)
		}
	}
	if got := m.requests.Load(); got != 1 {
		t.Errorf("%d requests reached the handler, want 1", got)
	}

	_, err := client.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{})
	wantError(t, err, MessageTooLarge, "the answer of the master at "+endpoint+" is too large: 64.1 MiB, of which at most 64.0 MiB are read")
	if Refused(err) || NoEffect(err) {
		t.Error("a call that was carried out passes for a refused one")
	}

	wantError(t, heartbeat(t.Context(), client), Internal, "the master at "+endpoint+" is out of some resource: too many streams")
}

func TestCause(t *testing.T) {
	for message, want := range map[string]string{
		`connection error: desc = "transport: Error while dialing: dial tcp 10.0.0.1:7000: connect: no route to host"`:                          "no route to host",
		`connection error: desc = "transport: Error while dialing: dial tcp 10.0.0.1:7000: i/o timeout"`:                                        "i/o timeout",
		`connection error: desc = "transport: Error while dialing: dial tcp: lookup nowhere on 10.0.0.53:53: no such host"`:                     "lookup nowhere on 10.0.0.53:53: no such host",
		`connection error: desc = "error reading server preface: EOF"`:                                                                          "what listens there closed the connection at once",
		`connection error: desc = "error reading server preface: read tcp 1.2.3.4:5->1.2.3.4:6: use of closed network connection"`:              "what listens there doesn't answer",
		"write tcp 127.0.0.1:1->127.0.0.1:2: write: broken pipe":                                                                                "what listens there closed the connection at once",
		`connection error: desc = "transport: failed to write client preface: write tcp 1.2.3.4:5->1.2.3.4:6: write: connection reset by peer"`: "what listens there closed the connection at once",
		`connection error: desc = "initial http2 frame from server is not a settings frame: *http2.PingFrame"`:                                  "what listens there doesn't speak gRPC",
		"error reading from server: EOF": "the connection broke",
		"error reading from server: read tcp 127.0.0.1:1->127.0.0.1:2: read: connection reset by peer": "the connection broke",
		"grpc: the client connection is closing":                                                       "the connection broke",
		"draining":                                                                                     "draining",
	} {
		if got := cause(message); got != want {
			t.Errorf("%s\n got %q\nwant %q", message, got, want)
		}
	}
}
