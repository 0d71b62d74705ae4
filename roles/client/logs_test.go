package client

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

type logStream = grpc.ServerStreamingServer[sutrav1.TailLogsResponse]

func logPiece(data string, position uint64) *sutrav1.TailLogsResponse {
	return &sutrav1.TailLogsResponse{Chunk: &sutrav1.LogChunk{Data: []byte(data), Position: position}}
}

// logging sends pieces and ends.
func logging(pieces ...*sutrav1.TailLogsResponse) *fakeMaster {
	return &fakeMaster{onLogs: func(_ *sutrav1.TailLogsRequest, s logStream) error {
		for _, p := range pieces {
			if err := s.Send(p); err != nil {
				return err
			}
		}
		return nil
	}}
}

func TestLogs(t *testing.T) {
	cut := logPiece("\x1b[31mred\r\n\tpart", 40)
	cut.Chunk.Skipped = 7
	f := serve(t, logging(logPiece("", 10), logPiece("<one>\ntwo\n", 20), &sutrav1.TailLogsResponse{Notice: "waiting for agent a"}, cut, logPiece("\xff\n", 42)))
	out, errs := ask(t, f, "logs", "-n", "node-1")
	diff(t, out, "<one>\ntwo\n\x1b[31mred\r\n\tpart\xff\n")
	diff(t, errs, "waiting for agent a\n7 bytes before this aren't kept any more\n")

	out, errs = ask(t, f, "logs", "-n", "node-1", "-f", "--tail", "0", "--since", "10m", "-o", "json")
	diff(t, out, `
{"position":20,"data":"<one>\ntwo\n"}
{"notice":"waiting for agent a"}
{"position":40,"skipped":7,"data":"\u001b[31mred\r\n\tpart"}
{"position":42,"data_base64":"/wo="}
`)
	diff(t, errs, "")

	term := newTerminal()
	term.OutTTY = true
	if err := term.run(t.Context(), "logs", "--node", "node-1", "--since", "2026-03-01T11:00:00Z", "--master", f.endpoint); err != nil {
		t.Fatal(err)
	}
	diff(t, term.out.String(), "<one>\ntwo\n\\x1b[31mred\n    part\\xff\n")

	wantRequests(
		t, f,
		&sutrav1.TailLogsRequest{NodeId: "node-1", Range: &sutrav1.LogRange{}},
		&sutrav1.TailLogsRequest{NodeId: "node-1", Range: &sutrav1.LogRange{Follow: true, Tail: proto.Uint32(0), Since: before(10 * time.Minute)}},
		&sutrav1.TailLogsRequest{NodeId: "node-1", Range: &sutrav1.LogRange{Since: timestamppb.New(epoch.Add(-time.Hour))}},
	)
}

func TestLogsRefuses(t *testing.T) {
	f := serve(t, &fakeMaster{onLogs: func(*sutrav1.TailLogsRequest, logStream) error {
		return rpc.Errorf(rpc.NodeNotFound, "there is no node node-1")
	}})
	for args, want := range map[string]struct {
		code int
		said string
	}{
		"node-1":               {exitNotFound, "error: there is no node node-1 (NODE_NOT_FOUND)\n"},
		"yesterday":            {exitUsage, "error: --since \"yesterday\" is neither a duration nor a time (USAGE)\nhint: write a duration such as 90s, 10m or 2h, or a time such as 2026-03-01T12:00:00Z\n"},
		"-5m":                  {exitUsage, "error: --since \"-5m\" lies in the future: nothing is written yet that is so new (USAGE)\nhint: write how far to go back, such as 90s, 10m or 2h, or a time that has passed, such as 2026-03-01T12:00:00Z\n"},
		"2099-01-01T00:00:00Z": {exitUsage, "error: --since \"2099-01-01T00:00:00Z\" lies in the future: nothing is written yet that is so new (USAGE)\nhint: write how far to go back, such as 90s, 10m or 2h, or a time that has passed, such as 2026-03-01T12:00:00Z\n"},
	} {
		for _, follow := range []string{"--follow=false", "-f"} {
			line := []string{"logs", "-n", "node-1", follow}
			if args != "node-1" {
				line = append(line, "--since="+args)
			}
			said, err := refused(t, f, line...)
			if ExitCode(err) != want.code || said != want.said {
				t.Errorf("%v: %d\n%s", line, ExitCode(err), said)
			}
		}
	}
}

// A log is followed on where the master comes back, from where it was, and until it has been away for long.
func TestFollowOutlastsTheMaster(t *testing.T) {
	var calls atomic.Int32
	f := serve(t, &fakeMaster{onLogs: func(_ *sutrav1.TailLogsRequest, s logStream) error {
		switch calls.Add(1) {
		case 1:
			if err := s.Send(logPiece("one\n", 4)); err != nil {
				return err
			}
			return rpc.Errorf(rpc.ShuttingDown, "the master is shutting down")
		case 2:
			return rpc.Errorf(rpc.AgentOffline, "not yet")
		case 3:
			return s.Send(logPiece("two\n", 8))
		}
		return nil
	}})
	out, errs := ask(t, f, "logs", "-n", "node-1", "-f", "--tail", "1")
	diff(t, out, "one\ntwo\n")
	diff(t, errs, "waiting for the master: the master is shutting down\n")
	rest := &sutrav1.TailLogsRequest{NodeId: "node-1", Range: &sutrav1.LogRange{Follow: true, Position: 4}}
	wantRequests(t, f, &sutrav1.TailLogsRequest{NodeId: "node-1", Range: &sutrav1.LogRange{Follow: true, Tail: proto.Uint32(1)}}, rest, rest)

	calls.Store(0)
	f.onLogs = func(_ *sutrav1.TailLogsRequest, s logStream) error {
		if calls.Add(1) == 1 {
			if err := s.Send(logPiece("one\n", 4)); err != nil {
				return err
			}
		}
		return rpc.Errorf(rpc.ShuttingDown, "the master is shutting down")
	}
	term := newTerminal()
	var seconds atomic.Int64
	term.now = func() time.Time { return epoch.Add(time.Duration(seconds.Add(16)) * time.Second) }
	if err := term.run(t.Context(), "logs", "-n", "node-1", "-f", "--master", f.endpoint); ExitCode(err) != exitUnavailable {
		t.Errorf("without a master for long: %v", err)
	}
	if calls.Load() != 3 {
		t.Errorf("it tried %d times", calls.Load())
	}

	// A master that isn't there to begin with isn't waited for.
	l := listen(t)
	_ = l.Close()
	term = newTerminal()
	if err := term.run(t.Context(), "logs", "-n", "node-1", "-f", "--master", l.Addr().String()); ExitCode(err) != exitUnavailable {
		t.Errorf("without a master: %v", err)
	}
}

// listens is longer than any answer takes to come, and shorter than the contract's limit for a log's beginning.
const listens = 5 * time.Second

// --timeout is for a log's beginning: one that doesn't come ends the verb, and one that came goes on for longer.
func TestTimeoutOfLogs(t *testing.T) {
	t.Parallel()
	silent := &fakeMaster{onLogs: func(_ *sutrav1.TailLogsRequest, s logStream) error {
		<-s.Context().Done()
		return s.Context().Err()
	}}
	f := serve(t, silent)
	// A limit that is longer than the contract's changes nothing, and isn't what a call fails by.
	contracts := make(chan error, 1)
	go func() {
		contracts <- newTerminal().run(t.Context(), "logs", "-n", "node-1", "--timeout", "1h", "--master", f.endpoint)
	}()
	for _, follow := range []string{"--follow=false", "-f"} {
		said, err := refused(t, f, "logs", "-n", "node-1", follow, "--timeout", "300ms")
		if ExitCode(err) != exitTimedOut || !strings.Contains(said, "in time (TIMED_OUT)\nhint: the limit was --timeout 300ms; give it more or leave it out\n") {
			t.Errorf("%s: exit %d\n%s", follow, ExitCode(err), said)
		}
	}

	select {
	case err := <-contracts:
		t.Errorf("with a shorter limit it takes longer than this: %v", err)
		contracts <- err
	default:
	}

	begun, over := make(chan struct{}), make(chan struct{})
	f = serve(t, &fakeMaster{onLogs: func(_ *sutrav1.TailLogsRequest, s logStream) error {
		if err := s.Send(logPiece("one\n", 4)); err != nil {
			return err
		}
		close(begun)
		<-over
		return s.Send(logPiece("two\n", 8))
	}})
	term := newTerminal()
	ended := make(chan error, 1)
	go func() {
		ended <- term.run(t.Context(), "logs", "-n", "node-1", "-f", "--timeout", listens.String(), "--master", f.endpoint)
	}()
	select {
	case <-begun:
	case err := <-ended:
		t.Fatalf("the log ended before it had begun: %v", err)
	}
	// Of two limits of the same length the one that began later ends later.
	if _, err := refused(t, serve(t, silent), "logs", "-n", "node-1", "--timeout", listens.String()); ExitCode(err) != exitTimedOut {
		t.Errorf("of a silent master: %v", err)
	}
	close(over)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	diff(t, term.out.String(), "one\ntwo\n")
	if err := <-contracts; ExitCode(err) != exitTimedOut || strings.Contains(rpc.AsError(err).Hint, "--timeout") {
		t.Errorf("%v, %s", err, rpc.AsError(err).Hint)
	}
}

// A master that hangs while a log is followed is waited for like one that is gone; what it says itself ends the verb.
func TestFollowOutlastsAMasterThatHangs(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	f := serve(t, &fakeMaster{onLogs: func(_ *sutrav1.TailLogsRequest, s logStream) error {
		switch calls.Add(1) {
		case 1:
			if err := s.Send(logPiece("one\n", 4)); err != nil {
				return err
			}
			return rpc.Errorf(rpc.ShuttingDown, "the master is shutting down")
		case 2:
			<-s.Context().Done()
			return s.Context().Err()
		case 3:
			return s.Send(logPiece("two\n", 8))
		}
		return rpc.Errorf(rpc.TimedOut, "the agent is slow")
	}})
	out, _ := ask(t, f, "logs", "-n", "node-1", "-f", "--timeout", listens.String())
	diff(t, out, "one\ntwo\n")
	said, err := refused(t, f, "logs", "-n", "node-1", "-f")
	diff(t, said, "error: the agent is slow (TIMED_OUT)\n") // no hint that blames a master which answers
	if ExitCode(err) != exitTimedOut {
		t.Error(err)
	}
}

// To interrupt it is how following ends, and breaks off anything else.
func TestInterruptedLogs(t *testing.T) {
	for flag, want := range map[string]int{"--follow": exitOK, "--follow=false": exitFailed} {
		ctx, interrupt := context.WithCancel(t.Context())
		t.Cleanup(interrupt)
		f := serve(t, &fakeMaster{onLogs: func(_ *sutrav1.TailLogsRequest, s logStream) error {
			err := s.Send(logPiece("one\n", 4))
			interrupt()
			<-s.Context().Done()
			return err
		}})
		err := newTerminal().run(ctx, "logs", "-n", "node-1", flag, "--master", f.endpoint)
		if ExitCode(err) != want {
			t.Errorf("%s: %v", flag, err)
		}
	}
}
