package nodes

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// withJob adds the profile of a server that runs until it finds the file "end" in its place, with its exit code.
func withJob(policy string, codes ...int) func(*Config) {
	return func(c *Config) {
		c.Profiles["job"] = config.Profile{
			Name: "job", StorageBinary: "/bin/sh", Args: []string{"-c", "while ! test -s end; do sleep .02; done; exit $(cat end)"},
			Ready: config.Ready{Kind: "none"}, StopSignal: "TERM", StopGrace: 10 * time.Second, Restart: policy, SuccessExitCodes: codes,
		}
	}
}

// finish has a job end with a code.
func finish(t *testing.T, n *sutrav1.Node, code int) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(n.GetStoragePath(), "end"), []byte(strconv.Itoa(code)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A node that has run to its end holds nothing and is kept, here and on record, until it is stopped.
func TestCompletedNodeStays(t *testing.T) {
	for name, test := range map[string]struct {
		policy string
		code   int
		phase  sutrav1.Phase
	}{
		"never, success":      {"never", 0, sutrav1.Phase_PHASE_STOPPED},
		"never, failure":      {"never", 3, sutrav1.Phase_PHASE_FAILED},
		"on failure, success": {"on-failure", 7, sutrav1.Phase_PHASE_STOPPED},
	} {
		t.Run(name, func(t *testing.T) {
			m := newManager(t, withJob(test.policy, 0, 7))
			n := mustSpawn(t, m, want("node-1", as("job"), on(freePort(t))))
			finish(t, n, test.code)
			check := func(is *sutrav1.Node) {
				t.Helper()
				if is.GetPhase() != test.phase || !is.GetCompleted() || is.GetPid() != 0 || is.GetLastExit().GetCode() != int32(test.code) ||
					is.GetReason() == "" || is.GetRestartCount() != 0 || is.GetNextStart() != nil {
					t.Errorf("the node is %v", is)
				}
			}
			check(awaitPhase(t, m, "node-1", test.phase))
			if left := processes(t, m); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			m = reopen(t, m)
			check(awaitPhase(t, m, "node-1", test.phase))
			again, err := m.Spawn(t.Context(), want("node-1", as("job")))
			if err != nil {
				t.Fatalf("a spawn that comes late: %v", err)
			}
			check(again)
			_, err = m.Restart(t.Context(), "node-1", 0)
			expectReason(t, err, rpc.NodeEnded)

			mustSpawn(t, m, want("node-2", on(int(n.GetPort())), at(t.TempDir()))) // its port is free
			if n.GetStoragePath() != again.GetStoragePath() {
				t.Errorf("its place was %s and is %s", n.GetStoragePath(), again.GetStoragePath())
			}
			last, err := m.Stop(t.Context(), "node-1")
			if err != nil {
				t.Fatal(err)
			}
			check(last)
			if m = reopen(t, m); len(m.List()) != 1 {
				t.Errorf("nodes %v", m.List())
			}
		})
	}
}

func TestPolicyRestartsAfterAFailure(t *testing.T) {
	for policy, code := range map[string]int{"on-failure": 3, "always": 0} {
		t.Run(policy, func(t *testing.T) {
			m := newManager(t, withJob(policy, 0))
			n := mustSpawn(t, m, want("node-1", as("job")))
			finish(t, n, code)
			await(t, "a restart", func() error {
				if is, _ := m.Get("node-1"); is.GetRestartCount() == 0 || is.GetLastExit().GetCode() != int32(code) {
					return fmt.Errorf("it is %v", is)
				}
				return nil
			})
		})
	}
}

func TestRestart(t *testing.T) {
	m := newManager(t)
	n := mustSpawn(t, m, want("node-1", on(freePort(t))))
	is, err := m.Restart(t.Context(), "node-1", 0)
	if err != nil {
		t.Fatal(err)
	}
	if is.GetPid() == n.GetPid() || is.GetRestartCount() != 1 || is.GetPhase() != sutrav1.Phase_PHASE_RUNNING || is.GetPort() != n.GetPort() ||
		is.GetStoragePath() != n.GetStoragePath() || is.GetLastExit().GetCause() != "restart asked for" {
		t.Errorf("was %v\nand is %v", n, is)
	}
	if again, err := m.Restart(t.Context(), "node-1", 0); err != nil || again.GetPid() != is.GetPid() || again.GetRestartCount() != 1 {
		t.Errorf("the same request once more: %v, %v", again, err)
	}
	_, err = m.Restart(t.Context(), "node-2", 0)
	expectReason(t, err, rpc.NodeNotFound)
	if _, err := m.Stop(t.Context(), "node-1"); err != nil {
		t.Fatal(err)
	}
	_, err = m.Restart(t.Context(), "node-1", 1)
	expectReason(t, err, rpc.NodeNotFound)
}

// A node in a crash loop is started at once; one that dies before it is ready again is an error with its exit, and goes on
// being restarted.
func TestRestartOfACrashLoop(t *testing.T) {
	m := newManager(t, func(c *Config) {
		p := c.Profiles["default"]
		p.Name, p.StorageBinary, p.Args = "broken", "/bin/sh", []string{"-c", "test -e broken || exec sleep 100000; echo it is broken; exit 4"}
		p.Ready = config.Ready{Kind: "exec", Arg: "sleep .1"}
		c.Profiles["broken"] = p
	})
	n := mustSpawn(t, m, want("node-1", as("broken")))
	broken := filepath.Join(n.GetStoragePath(), "broken")
	if err := os.WriteFile(broken, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(int(n.GetPid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	looping := awaitPhase(t, m, "node-1", sutrav1.Phase_PHASE_CRASH_LOOP)
	if looping.GetNextStart() == nil || looping.GetReason() == "" {
		t.Errorf("the node is %v", looping)
	}
	_, err := m.Restart(t.Context(), "node-1", 1000) // more than it has by then: it is due
	expectReason(t, err, rpc.NodeDiedEarly)
	if e := rpc.AsError(err); e.Exit.GetCode() != 4 || e.Exit.GetOutput() != "it is broken\n" {
		t.Errorf("exit %v", e.Exit)
	}
	if err := os.Remove(broken); err != nil {
		t.Fatal(err)
	}
	is, err := m.Restart(t.Context(), "node-1", 1000)
	if err != nil || is.GetPhase() != sutrav1.Phase_PHASE_RUNNING {
		t.Errorf("mended: %v, %v", is, err)
	}
}

// What leaves the session of a node and ignores the stop signal is gone, too, when the stop is confirmed.
func TestStopTakesEscapeesAlong(t *testing.T) {
	onEachHost(t, func(t *testing.T, cgroups func(*Config)) {
		m := newManager(t, cgroups, func(c *Config) {
			p := c.Profiles["default"]
			p.StopGrace = 200 * time.Millisecond
			p.StorageBinary = "/bin/sh"
			p.Args = []string{"-c", `setsid sh -c 'trap "" TERM; touch escaped; while :; do sleep .05; done' & exec sleep 100000`}
			c.Profiles["escape"] = p
		})
		n := mustSpawn(t, m, want("node-1", as("escape")))
		await(t, "the escape", func() error {
			_, err := os.Stat(filepath.Join(n.GetStoragePath(), "escaped"))
			return err
		})
		if _, err := m.Stop(t.Context(), "node-1"); err != nil {
			t.Fatal(err)
		}
		if left := processes(t, m); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
}

// call is one call on a node, as porcupine's input and output.
type call struct {
	verb  string
	count uint32 // of a restart
}

type answer struct {
	reason   rpc.Reason
	restarts uint32
	there    bool // a stop found something
}

// life is what a node's history comes to.
type life struct {
	runs     bool
	restarts uint32
}

// oneNode is a node whose calls take effect one after the other.
func oneNode() porcupine.Model {
	return (&porcupine.NondeterministicModel{
		Init: func() []any { return []any{life{}} },
		Step: func(state, input, output any) []any {
			s, in, out := state.(life), input.(call), output.(answer)
			switch {
			case in.verb == "spawn" && out.reason == "":
				if s.runs {
					return []any{s}
				}
				return []any{life{runs: true}}
			case in.verb == "spawn" && out.reason == rpc.StoppedMeanwhile:
				return []any{s, life{runs: true, restarts: s.restarts}} // whether it had begun isn't said
			case in.verb == "stop" && out.reason == "" && out.there == s.runs:
				return []any{life{}}
			case in.verb == "restart" && out.reason == "" && s.runs:
				if s.restarts <= in.count {
					s.restarts++
				}
				if out.restarts == s.restarts {
					return []any{s}
				}
			case in.verb == "restart" && (out.reason == rpc.NodeNotFound || out.reason == rpc.NodeEnded) && !s.runs:
				return []any{s}
			case in.verb == "restart" && out.reason == rpc.StoppedMeanwhile && s.runs:
				return []any{s, life{runs: true, restarts: s.restarts + 1}} // it may have come as far
			}
			return nil
		},
		Equal: func(a, b any) bool { return a == b },
	}).ToModel()
}

// Calls on one node from many sides have the effect of some order in which each comes between its beginning and its end.
func TestCallsOnOneNodeFollowEachOther(t *testing.T) {
	m := newManager(t)
	went := map[string]int{} // well, by verb
	for round := 0; round < 30 && (went["spawn"] == 0 || went["restart"] == 0 || went["stop"] == 0); round++ {
		callsOnOneNode(t, m, went)
		if _, err := m.Stop(t.Context(), "node-1"); err != nil {
			t.Fatal(err)
		}
	}
	if t.Logf("%v", went); went["spawn"] == 0 || went["restart"] == 0 || went["stop"] == 0 {
		t.Errorf("some call never went well: %v", went)
	}
}

func callsOnOneNode(t *testing.T, m *Manager, went map[string]int) {
	t.Helper()
	const callers, calls = 8, 12
	began := time.Now()
	var mu sync.Mutex // guards history
	var history []porcupine.Operation
	var group sync.WaitGroup
	for caller := range callers {
		group.Go(func() {
			for i := range calls {
				in, out := call{verb: []string{"spawn", "restart", "restart", "stop", "spawn"}[(caller+i*3)%5]}, answer{}
				var n *sutrav1.Node
				var err error
				if in.verb == "restart" {
					is, _ := m.Get("node-1")
					in.count = is.GetRestartCount()
				}
				at := time.Since(began)
				switch in.verb {
				case "spawn":
					_, err = m.Spawn(t.Context(), want("node-1"))
				case "stop":
					n, err = m.Stop(t.Context(), "node-1")
					out.there = n != nil
				case "restart":
					n, err = m.Restart(t.Context(), "node-1", in.count)
					out.restarts = n.GetRestartCount()
				}
				out.reason = rpc.ReasonOf(err)
				mu.Lock()
				history = append(history, porcupine.Operation{ClientId: caller, Input: in, Output: out, Call: at.Nanoseconds(), Return: time.Since(began).Nanoseconds()})
				mu.Unlock()
			}
		})
	}
	group.Wait()
	if got := porcupine.CheckOperationsTimeout(oneNode(), history, time.Minute); got != porcupine.Ok {
		for _, op := range history {
			t.Logf("%d: %v -> %v from %d to %d", op.ClientId, op.Input, op.Output, op.Call, op.Return)
		}
		t.Fatalf("the history is %s", got)
	}
	for _, op := range history {
		if op.Output.(answer).reason == "" {
			went[op.Input.(call).verb]++
		}
	}
}

// BenchmarkStop compares the stop of a hundred nodes, which each take a tenth of a second over it, with that of one.
func BenchmarkStop(b *testing.B) {
	m := newManager(b, func(c *Config) {
		p := c.Profiles["default"]
		p.StorageBinary, p.Args = "/bin/sh", []string{"-c", "trap 'sleep .1; exit 0' TERM; touch trapped; while :; do sleep .02; done"}
		p.Ready = config.Ready{Kind: "exec", Arg: "test -e $HOME/trapped"}
		c.Profiles["slow-stop"] = p
	})
	stop := func(count int) time.Duration {
		b.StopTimer()
		var group sync.WaitGroup
		for i := range count {
			group.Go(func() {
				if _, err := m.Spawn(b.Context(), want(fmt.Sprintf("node-%d", i), as("slow-stop"))); err != nil {
					b.Error(err)
				}
			})
		}
		group.Wait()
		b.StartTimer()
		began := time.Now()
		for i := range count {
			group.Go(func() {
				if _, err := m.Stop(b.Context(), fmt.Sprintf("node-%d", i)); err != nil {
					b.Error(err)
				}
			})
		}
		group.Wait()
		return time.Since(began)
	}
	var one, hundred time.Duration
	for b.Loop() {
		one += stop(1)
		hundred += stop(100)
	}
	b.ReportMetric(hundred.Seconds()/one.Seconds(), "hundred/one")
}
