package rpc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// equal is equality of what travels.
var equal = cmp.Options{protocmp.Transform(), cmpopts.IgnoreUnexported(Error{})}

func TestErrorsArriveAsTheyWereSent(t *testing.T) {
	checkLeaks(t)
	full := Errorf(NodeDiedEarly, "node %s died: %q", "node-1", "é\t").With("node_id", "node-1").With("port", "50051").
		WithHint("look at its log: sutra logs --node %s", "node-1")
	full.Violations = []Violation{{"port", "is privileged"}, {"storage_path", "must be absolute"}}
	full.Exit = &sutrav1.Exit{Code: 3, Signal: "SIGKILL", At: timestamppb.New(time.Unix(1, 2)), Output: strings.Repeat("out of memory\n", 290)}
	full.RetryAfter = 1500 * time.Millisecond
	hostile := Errorf(PathUnusable, "open \xff: no").With("storage_path", "/\xfe").WithHint("rename \xfd")
	hostile.Violations = []Violation{{"storage_path", "\xfc"}}
	readable := Errorf(PathUnusable, "open \uFFFD: no").With("storage_path", "/\uFFFD").WithHint("rename \uFFFD")
	readable.Violations = []Violation{{"storage_path", "\uFFFD"}}

	for name, c := range map[string]struct {
		sent error
		want *Error
		code codes.Code
	}{
		"bare":        {Errorf(AgentFull, "full"), Errorf(AgentFull, "full"), codes.ResourceExhausted},
		"hint alone":  {Errorf(AgentFull, "full").WithHint("wait"), Errorf(AgentFull, "full").WithHint("wait"), codes.ResourceExhausted},
		"full":        {full, full, codes.Aborted},
		"wrapped":     {fmt.Errorf("spawn: %w", Errorf(PortInUse, "port 1 is taken").With("port", "1")), Errorf(PortInUse, "spawn: port 1 is taken").With("port", "1"), codes.AlreadyExists},
		"joined":      {errors.Join(Errorf(NodeNotFound, "no node"), errors.New("and more")), Errorf(NodeNotFound, "no node\nand more"), codes.NotFound},
		"plain":       {errors.New("disk on fire"), Errorf(Internal, "disk on fire"), codes.Internal},
		"deadline":    {fmt.Errorf("ask: %w", context.DeadlineExceeded), Errorf(TimedOut, "ask: context deadline exceeded"), codes.DeadlineExceeded},
		"canceled":    {fmt.Errorf("ask: %w", context.Canceled), Errorf(Canceled, "ask: context canceled"), codes.Canceled},
		"bad bytes":   {hostile, readable, codes.FailedPrecondition},
		"bare status": {status.Error(codes.InvalidArgument, "odd"), Errorf(InvalidArgument, "odd"), codes.InvalidArgument},
		"no reason of ours": {
			Errorf("FROM_THE_FUTURE", "newer than this caller"), Errorf("FROM_THE_FUTURE", "newer than this caller"), codes.Internal,
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, client := dialMaster(t, serveMaster(t, failing(c.sent), anyPort).endpoint, nil)
			got := AsError(heartbeat(t.Context(), client))
			if diff := cmp.Diff(c.want, got, equal); diff != "" {
				t.Errorf("-want +got\n%s", diff)
			}
			if got.Code() != c.code {
				t.Errorf("code %s, want %s", got.Code(), c.code)
			}
			// A master passes on what an agent said.
			if diff := cmp.Diff(got, AsError(status.FromProto(got.GRPCStatus().Proto()).Err()), equal); diff != "" {
				t.Errorf("second hop: -first +second\n%s", diff)
			}
		})
	}
}

func TestAsError(t *testing.T) {
	if e := AsError(nil); e != nil || ReasonOf(nil) != "" {
		t.Errorf("nil became %v", e)
	}
	own := Errorf(WrongAgent, "not mine")
	if AsError(fmt.Errorf("stop: %w", own)) != own || ReasonOf(own) != WrongAgent {
		t.Error("an Error isn't found within its wrapping")
	}
	for err, want := range map[error]Reason{
		context.Canceled:                                                 Canceled,
		context.DeadlineExceeded:                                         TimedOut,
		errors.New("any"):                                                Internal,
		status.Error(codes.Canceled, "bare"):                             Canceled,
		status.Error(codes.DeadlineExceeded, "bare"):                     TimedOut,
		status.Error(codes.Unimplemented, "bare"):                        Unimplemented,
		status.Error(codes.Unauthenticated, "bare"):                      Internal,
		fmt.Errorf("w: %w", status.Error(codes.InvalidArgument, "bare")): InvalidArgument,
	} {
		if got := ReasonOf(err); got != want {
			t.Errorf("%v has reason %s, want %s", err, got, want)
		}
	}
}

func TestExited(t *testing.T) {
	exit := &sutrav1.Exit{Code: 127, Output: "not found"}
	e := Exited(&sutrav1.Node{NodeId: "node-1", AgentId: "agent-001", Profile: "redis", LastExit: exit})
	want := Errorf(NodeDiedEarly, "node node-1 on agent-001 started and died before it was ready: exit code 127").With("node_id", "node-1")
	want.Exit = exit
	if !strings.Contains(e.Hint, "profile redis") {
		t.Errorf("hint %q doesn't name the profile", e.Hint)
	}
	want.Hint = e.Hint
	if diff := cmp.Diff(want, e, equal); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

// safeBuffer is a log that the server writes and the test reads.
type safeBuffer struct {
	mu  sync.Mutex // guards buf
	buf bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func panicsHere() { panic(errors.New("a broken invariant")) }

// What to do goes by how it ended.
func TestExitedHints(t *testing.T) {
	for hint, exit := range map[string]*sutrav1.Exit{
		"more --memory":          {Code: -1, Signal: "SIGKILL", OomKilled: true},
		"its limit was 64 MiB":   {Code: -1, Unknown: true, OomKilled: true},
		"stay in the foreground": {},
		"ready_timeout_secs":     {Code: -1, Signal: "SIGTERM", Cause: "not ready within 5s"},
		"its last output":        {Code: 1},
		"its last output says":   {Code: -1, Signal: "SIGKILL"},
		"says why":               {Code: -1, Unknown: true},
	} {
		e := Exited(&sutrav1.Node{NodeId: "node-1", AgentId: "agent-001", Profile: "redis", MemoryLimitMb: 64, LastExit: exit})
		if !strings.Contains(e.Hint, hint) || !strings.Contains(e.Hint, "profile redis") || e.Exit != exit {
			t.Errorf("%v: the hint is %q, and should say %q", exit, e.Hint, hint)
		}
	}
}

// A path in the agent's home is no other node's to have.
func TestEndedHints(t *testing.T) {
	for path, hint := range map[string]string{
		"/srv/data":                          "--profile redis --storage-path /srv/data",
		"/home/agents/agent-001/data/node-1": "takes up a copy: sutra spawn --agent agent-001 --profile redis --storage-path COPY",
	} {
		e := Ended(&sutrav1.Node{NodeId: "node-1", AgentId: "agent-001", Profile: "redis", StoragePath: path})
		if e.Reason != NodeEnded || !strings.Contains(e.Hint, hint) {
			t.Errorf("%v, %q; want %q", e, e.Hint, hint)
		}
	}
}

func TestAPanicEndsOneCallOnly(t *testing.T) {
	checkLeaks(t)
	log := &safeBuffer{}
	srv := NewServer(zerolog.New(log), nil, Guard{})
	sutrav1.RegisterGridMasterServer(srv, &master{heartbeat: func(context.Context, int) (*sutrav1.HeartbeatResponse, error) {
		panicsHere()
		return nil, nil
	}})
	_, client := dialMaster(t, serve(t, srv, anyPort).endpoint, nil)
	for range 2 {
		wantError(t, heartbeat(t.Context(), client), Internal, "/sutra.v1.GridMaster/Heartbeat failed inside: a broken invariant")
	}
	if err := listAgents(t.Context(), client); err != nil {
		t.Errorf("after the panic: %v", err)
	}
	for _, want := range []string{`"panic":"a broken invariant"`, "panicsHere", "/sutra.v1.GridMaster/Heartbeat"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log lacks %s:\n%s", want, log)
		}
	}
}

func TestRefused(t *testing.T) {
	refused := map[codes.Code]bool{
		codes.InvalidArgument: true, codes.NotFound: true, codes.AlreadyExists: true, codes.ResourceExhausted: true,
		codes.FailedPrecondition: true, codes.Aborted: true, codes.PermissionDenied: true, codes.Unauthenticated: true,
		codes.Unimplemented: true, codes.OutOfRange: true,
	}
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		err := status.Error(code, "said")
		if Refused(err) != refused[code] || NoEffect(err) != refused[code] {
			t.Errorf("%s: Refused %v, NoEffect %v, want %v", code, Refused(err), NoEffect(err), refused[code])
		}
	}
	if Refused(nil) || NoEffect(nil) {
		t.Error("success passes for a failure")
	}
	for reason, code := range Codes() {
		err := fmt.Errorf("wrapped: %w", Errorf(reason, "said"))
		if Refused(err) != refused[code] {
			t.Errorf("%s: Refused %v", reason, Refused(err))
		}
		if want := refused[code] || reason == AgentOffline || reason == ShuttingDown; NoEffect(err) != want {
			t.Errorf("%s: NoEffect %v, want %v", reason, NoEffect(err), want)
		}
	}
}

func TestNoEffectOfCallsThatFailOnTheWay(t *testing.T) {
	t.Run("never connected", func(t *testing.T) {
		checkLeaks(t)
		_, client := dialMaster(t, closedPort(t), nil)
		if err := listAgents(t.Context(), client); !NoEffect(err) || Refused(err) {
			t.Errorf("%v: NoEffect %v, Refused %v, want true and false", err, NoEffect(err), Refused(err))
		}
	})
	t.Run("sent, then refused connections", func(t *testing.T) {
		checkLeaks(t)
		m := failing(status.Error(codes.Unavailable, "raw"))
		srv := serveMaster(t, m, anyPort)
		_, client := dialMaster(t, srv.endpoint, nil)
		err := listAgents(t.Context(), client, grpc.OnFinish(func(error) { srv.kill() }))
		wantError(t, err, MasterUnreachable, "connection refused")
		if NoEffect(err) || m.requests.Load() != 1 {
			t.Errorf("NoEffect %v after %d requests, want false after 1", NoEffect(err), m.requests.Load())
		}
	})
	t.Run("the connection breaks under the call", func(t *testing.T) {
		checkLeaks(t)
		m, started, _ := blocking()
		m.heartbeat = func(ctx context.Context, _ int) (*sutrav1.HeartbeatResponse, error) {
			started <- struct{}{}
			<-ctx.Done()
			return nil, ctx.Err()
		}
		srv := serveMaster(t, m, anyPort)
		_, client := dialMaster(t, srv.endpoint, nil)
		ended := make(chan error, 1)
		go func() { ended <- heartbeat(t.Context(), client) }()
		receive(t, "the call's start", started)
		srv.kill()
		err := receive(t, "the call's end", ended)
		wantError(t, err, MasterUnreachable, "can't reach the master at "+srv.endpoint+": the connection broke")
		if NoEffect(err) || Refused(err) {
			t.Errorf("NoEffect %v, Refused %v, want false", NoEffect(err), Refused(err))
		}
	})
}
