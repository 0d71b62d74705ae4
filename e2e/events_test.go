package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// watched is what a `sutra events -o json` has printed so far; its last line may be cut off.
func watched(t *testing.T, out []byte) []*sutrav1.WatchEventsResponse {
	t.Helper()
	var all []*sutrav1.WatchEventsResponse
	for line := range bytes.Lines(out) {
		if !bytes.HasSuffix(line, []byte("\n")) {
			break
		}
		got := &sutrav1.WatchEventsResponse{}
		if err := protojson.Unmarshal(line, got); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all = append(all, got)
	}
	return all
}

// inShort is a message in a few words.
func inShort(m *sutrav1.WatchEventsResponse) string {
	e := m.GetEvent()
	switch {
	case m.GetMissed() != nil:
		return fmt.Sprintf("missed %d restarted %v", m.GetMissed().GetCount(), m.GetMissed().GetRestarted())
	case e.GetCall() != nil:
		return strings.TrimSpace(fmt.Sprintf("%s %s %s %s", e.GetCall().GetWho(), e.GetCall().GetMethod(), e.GetCall().GetCode(), e.GetCall().GetReason()))
	case e.GetAgent() != nil:
		return fmt.Sprintf("%s %s", e.GetAgent().GetAgentId(), e.GetAgent().GetTo().Word())
	default:
		return fmt.Sprintf("%s %s restarts %d", e.GetNode().GetNodeId(), e.GetNode().GetTo().Word(), e.GetNode().GetRestartCount())
	}
}

// Whoever follows sees all that happens, in order and once, through a kill -9 of the master; and of calls the very same as
// is on record.
func TestEventsAreFollowed(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	start := func() *harness.Process { return g.StartMaster("--degraded-after", "3s", "--offline-after", "6s") }
	master := start()
	follower := g.Launch("follower", "events", "-f", "-o", "json")
	// Each is waited for, so that the next thing doesn't happen before; others may come in between.
	var want []string
	sees := func(lines ...string) {
		t.Helper()
		want = append(want, lines...)
		harness.Await(t, "the follower to see "+strings.Join(lines, ", "), func() error {
			if !follower.Running() {
				t.Fatalf("the follower ended:\n%s", follower.Log())
			}
			var seen []string
			next := 0
			for _, m := range watched(t, follower.Log()) {
				seen = append(seen, inShort(m))
				if next < len(want) && seen[len(seen)-1] == want[next] {
					next++
				}
			}
			if next < len(want) {
				return fmt.Errorf("%q doesn't come after what was seen:\n%s", want[next], strings.Join(seen, "\n"))
			}
			return nil
		})
	}

	agent := g.StartAgent("a1", sleepProfile+"[monitoring]\nheartbeat_interval_secs = 1\n")
	sees("nobody Enroll OK", "a1 HEALTHY")
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	id := node.GetNodeId()
	sees(id+" RUNNING restarts 0", "user test SpawnNode OK")
	if err := syscall.Kill(int(node.GetPid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	sees(id + " RUNNING restarts 1")
	refused(t, g, 3, "AGENT_NOT_REGISTERED", nil, "spawn", "-a", "nobody") // nothing came of it
	g.MustRun("token", "create")
	sees("user admin CreateToken OK")

	master.Kill()
	start()
	sees("missed 0 restarted true", "a1 HEALTHY")
	agent.Signal(syscall.SIGSTOP)
	sees("a1 DEGRADED", "a1 OFFLINE")
	agent.Signal(syscall.SIGCONT)
	sees("a1 HEALTHY")
	g.MustRun("agents", "ban", "a1")
	sees("a1 OFFLINE", "user admin BanAgent OK")
	g.MustRun("agents", "unban", "a1")
	sees("user admin UnbanAgent OK", "a1 HEALTHY")
	g.MustRun("stop", "-n", id)
	sees(id+" STOPPED restarts 1", "user admin StopNode OK")
	follower.Signal(syscall.SIGINT)
	if code := follower.Wait(); code != 0 {
		t.Errorf("interrupted, it ended with %d", code)
	}

	all := watched(t, follower.Log())
	var calls, restarts []string
	last := &sutrav1.EventPosition{}
	for _, m := range all {
		e := m.GetEvent()
		if e == nil {
			restarts = append(restarts, inShort(m))
			continue
		}
		if p := e.GetPosition(); p.GetRunId() == last.GetRunId() && p.GetSequence() != last.GetSequence()+1 || p.GetRunId() != last.GetRunId() && p.GetSequence() != 1 {
			t.Errorf("%v comes after %v", e, last)
		}
		last = e.GetPosition()
		if c := e.GetCall(); c != nil {
			calls = append(calls, fmt.Sprint(c.GetBeganAt().AsTime().Format(time.RFC3339Nano), c.GetFrom(), c.GetRole(), inShort(m), c.GetWhat()))
		}
	}
	if !slices.Equal(restarts, []string{"missed 0 restarted true"}) {
		t.Errorf("missed were %q", restarts)
	}
	lines, record := onRecord(t, filepath.Join(g.Home, "master", "audit.log"))
	var ended []string
	for i, one := range record {
		role, what := one["role"], one["what"]
		if role == nil {
			role = ""
		}
		if what == nil {
			what = map[string]string{}
		}
		if one["begun"] != true { // that a call begins is on record, and no event
			ended = append(ended, fmt.Sprint(one["time"], one["from"], role, lines[i], what))
		}
	}
	if !slices.Equal(calls, ended) {
		t.Errorf("the calls were\n%s\nand on record are\n%s", strings.Join(calls, "\n"), strings.Join(ended, "\n"))
	}
}

// One who watches and doesn't read holds up nobody, and learns how much it missed once it reads again.
func TestSlowWatcher(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // an event that doesn't come isn't waited for without end
	defer cancel()
	stream, err := g.Client().WatchEvents(ctx, &sutrav1.WatchEventsRequest{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := stream.Recv(); err != nil || got.GetBegin() == nil {
		t.Fatalf("first comes %v, %v", got, err)
	}
	// More than is remembered, and than the connection holds.
	const callers, each, remembered = 16, 400, 4096
	why := strings.Repeat("x", 256)
	var calls sync.WaitGroup
	for i := range callers {
		calls.Go(func() {
			for k := range each {
				if _, err := g.Client().BanUser(ctx, &sutrav1.BanUserRequest{Name: fmt.Sprintf("user-%d-%d", i, k), Reason: why}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	calls.Wait()
	var read, missed uint64
	for read+missed < callers*each {
		got, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		missed += got.GetMissed().GetCount()
		if e := got.GetEvent(); e != nil {
			if read++; e.GetPosition().GetSequence() != read+missed {
				t.Fatalf("event %d comes after %d that were read and %d that were missed", e.GetPosition().GetSequence(), read, missed)
			}
		}
	}
	if missed == 0 || read < remembered {
		t.Errorf("%d were read, %d missed", read, missed)
	}
}

func TestEventsVerb(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	if r := g.Run("events", "--since", "0s"); r.Code != 0 || r.Stdout != "" || r.Stderr != "there is no event to tell of\n" {
		t.Errorf("of a grid where nothing happened: %+v", r)
	}
	_, grid := g.Authority()
	g.MustRun("token", "create", "--role", "viewer", "--ttl", "1h")
	out := g.MustRun("events")
	plain(t, out)
	if want := `^TIME +EVENT +WHO +WHAT\n\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ +CreateToken +user admin +OK in \d+m?s from 127\.0\.0\.1:\d+ role=viewer token_id=\w+ ttl=1h0m0s uses=1 uses_left=1\n$`; !regexp.MustCompile(want).MatchString(out) {
		t.Errorf("events are\n%s", out)
	}
	if r := g.Run("events", "--since", "1h"); r.Code != 0 || !strings.Contains(r.Stdout, "CreateToken") || !strings.Contains(r.Stderr, "the master has started since then") {
		t.Errorf("of the last hour: %+v", r)
	}
	refused(t, g, 2, "USAGE", []string{`--since "soon"`, "hint: "}, "events", "--since", "soon")
	refused(t, g, 2, "USAGE", []string{"lies in the future"}, "events", "-f", "--since=-5m")

	// A viewer may; what no verb would send is refused.
	vera := as(t, g, pki.UserIdentity(grid, "vera", sutrav1.Role_ROLE_VIEWER))
	for what, c := range map[string]struct {
		req    *sutrav1.WatchEventsRequest
		reason rpc.Reason
	}{
		"all":                {&sutrav1.WatchEventsRequest{}, ""},
		"of a longest time":  {&sutrav1.WatchEventsRequest{Since: &durationpb.Duration{Seconds: 315_576_000_000}}, ""},
		"of the future":      {&sutrav1.WatchEventsRequest{Since: durationpb.New(-time.Second)}, rpc.InvalidArgument},
		"of no time":         {&sutrav1.WatchEventsRequest{Since: &durationpb.Duration{Seconds: 1, Nanos: -1}}, rpc.InvalidArgument},
		"after what will be": {&sutrav1.WatchEventsRequest{After: &sutrav1.EventPosition{Sequence: 1 << 63}}, ""},
	} {
		stream, err := vera.WatchEvents(t.Context(), c.req)
		if err != nil {
			t.Fatal(err)
		}
		first, err := stream.Recv()
		if rpc.ReasonOf(err) != c.reason && err != nil || (err == nil) != (c.reason == "") || err == nil && first.GetBegin().GetRunId() == "" {
			t.Errorf("events %s: %v, %v", what, first, err)
		}
	}

	// One whose output nobody reads any more ends as soon as it has something to say.
	cmd := exec.Command(g.Binary, "events", "-f")
	cmd.Env, cmd.Dir = g.Env, g.Dir
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := bufio.NewReader(pipe).ReadString('\n'); err != nil {
		t.Error(err)
	}
	_ = pipe.Close() // nothing was written to it
	g.MustRun("token", "create")
	err = cmd.Wait()
	if state, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || state.Signal() != syscall.SIGPIPE {
		t.Errorf("it ended with %v", err)
	}

	// Whoever follows doesn't hold up a master's stop, and learns after a while that it is gone.
	follower := g.Launch("follower", "events", "-f")
	harness.Await(t, "the follower to follow", func() error {
		if n := bytes.Count(follower.Log(), []byte("CreateToken")); n != 2 {
			return fmt.Errorf("%s", follower.Log())
		}
		return nil
	})
	master.Stop()
	harness.Await(t, "the follower to wait", func() error {
		if !bytes.Contains(follower.Log(), []byte("waiting for the master: ")) {
			return fmt.Errorf("%s", follower.Log())
		}
		return nil
	})
	follower.Signal(syscall.SIGTERM)
	if code := follower.Wait(); code != 0 {
		t.Errorf("it ended with %d", code)
	}
}
