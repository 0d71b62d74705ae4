package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

func TestSmoke(t *testing.T) {
	g := newSmokeGrid(t)
	out, err := g.smoke(t.Context(), newTerminal(), "--agent", "agent-001", "--profile", "redis")
	if err != nil {
		t.Error(err)
	}
	diff(t, out, `
ok   1 the master answers              0 ms  version 0.1.0, grid grid-1, at MASTER
ok   2 an agent is healthy             0 ms  agent-001 is HEALTHY
ok   3 a node is spawned               0 ms  node-smoke on agent-001 at NODE-PORT, pid 7
ok   4 its status is live              0 ms  RUNNING, LIVE
ok   5 list-nodes shows it             0 ms  one of 2
ok   6 its port can be used            0 ms  a value was stored and read back
ok   7 it is stopped                   0 ms  stopped node-smoke (exit code 0)
ok   8 its port is free again          0 ms  NODE-PORT refuses connections
ok   9 it is removed                   0 ms  STOPPED, then removed
9 of 9 steps passed in 0 ms
`)
	g.wantNothingLeft()
	spawned := g.requests()[2].(*sutrav1.SpawnNodeRequest)
	if spawned.GetAgentId() != "agent-001" || spawned.GetProfile() != "redis" || spawned.GetStoragePath() != "" ||
		spawned.GetPort() != 0 || spawned.GetRequestId() == "" {
		t.Errorf("asked for %v", spawned)
	}
}

func TestSmokeWithAnotherServer(t *testing.T) {
	elsewhere := listen(t)
	redirected := &http.Server{Handler: keyValue(smokeNode)}
	go func() { _ = redirected.Serve(elsewhere) }() // ends with Close, which says so
	defer redirected.Close()
	for name, storage := range map[string]http.Handler{
		"hangs up":   http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }),
		"other HTTP": http.NotFoundHandler(),
		"redirects":  http.RedirectHandler("http://"+elsewhere.Addr().String()+"/healthz", http.StatusTemporaryRedirect),
	} {
		t.Run(name, func(t *testing.T) {
			g := newSmokeGrid(t)
			g.storage = storage
			out, err := g.smoke(t.Context(), newTerminal())
			if err != nil {
				t.Error(err)
			}
			if !strings.Contains(out, "accepts connections; not the built-in server, nothing was stored\n") ||
				!strings.Contains(out, "\n9 of 9 steps passed") {
				t.Error(out)
			}
			g.wantNothingLeft()
		})
	}
}

func TestSmokeAsJSON(t *testing.T) {
	for _, fails := range []bool{false, true} {
		g := newSmokeGrid(t)
		want := smokeReport{Steps: []smokeStep{}, Passed: 9, Total: 9}
		if fails {
			g.onListNodes = func(*sutrav1.ListNodesRequest) (*sutrav1.ListNodesResponse, error) {
				return &sutrav1.ListNodesResponse{}, nil
			}
			want.Passed = 4
			want.Cleanup = &smokeStep{Name: "clean up", OK: true, Detail: "stopped and removed node-smoke"}
		}
		out, err := g.smoke(t.Context(), newTerminal(), "-o", "json")
		if (err != nil) != fails {
			t.Error(err)
		}
		var got smokeReport
		if err := json.Unmarshal([]byte(out), &got); err != nil || strings.Count(out, "\n") != 1 {
			t.Fatalf("%v: %s", err, out)
		}
		for i, step := range got.Steps {
			if ok := i < want.Passed; step.OK != ok || (step.Error == "") != ok || step.Name == "" {
				t.Errorf("step %d: %+v", i+1, step)
			}
		}
		if fails != (len(got.Steps) == 5) {
			t.Errorf("%d steps", len(got.Steps))
		}
		got.Steps = want.Steps
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("-want +got\n%s", d)
		}
		g.wantNothingLeft()
	}
}

// Whatever fails, the run stops there, says so and leaves nothing behind.
func TestSmokeCleansUpAfterEachStep(t *testing.T) {
	internal := rpc.Errorf(rpc.Internal, "broken on purpose")
	cases := map[string]struct {
		breaks func(*smokeGrid)
		args   []string
		passed int
		exit   int
		says   string
	}{
		"master": {
			breaks: func(g *smokeGrid) {
				g.onStatus = func() (*sutrav1.GetClusterStatusResponse, error) { return nil, internal }
			},
			passed: 0, exit: exitFailed, says: "broken on purpose",
		},
		"no agent": {
			breaks: func(g *smokeGrid) {
				g.onListAgents = func() (*sutrav1.ListAgentsResponse, error) { return &sutrav1.ListAgentsResponse{}, nil }
			},
			passed: 1, exit: exitUnavailable, says: "none of 0 agents is HEALTHY",
		},
		"agent offline":   {args: []string{"-a", "agent-002"}, passed: 1, exit: exitUnavailable, says: "agent-002 is OFFLINE"},
		"agent not there": {args: []string{"-a", "agent-003"}, passed: 1, exit: exitNotFound, says: "agent-003 isn't registered"},
		"status": {
			breaks: func(g *smokeGrid) {
				g.onNodeStatus = func(*sutrav1.GetNodeStatusRequest) (*sutrav1.GetNodeStatusResponse, error) {
					return &sutrav1.GetNodeStatusResponse{Node: g.current(), Source: sutrav1.Source_SOURCE_CACHED}, nil
				}
			},
			passed: 3, exit: exitFailed, says: "should be RUNNING, LIVE and is RUNNING, CACHED",
		},
		"not running": {
			breaks: func(g *smokeGrid) {
				g.onNodeStatus = func(*sutrav1.GetNodeStatusRequest) (*sutrav1.GetNodeStatusResponse, error) {
					return &sutrav1.GetNodeStatusResponse{
						Node: &sutrav1.Node{Phase: sutrav1.Phase_PHASE_CRASH_LOOP}, Source: sutrav1.Source_SOURCE_LIVE,
					}, nil
				}
			},
			passed: 3, exit: exitFailed, says: "should be RUNNING, LIVE and is CRASH_LOOP, LIVE",
		},
		"list": {
			breaks: func(g *smokeGrid) {
				g.onListNodes = func(*sutrav1.ListNodesRequest) (*sutrav1.ListNodesResponse, error) { return nil, internal }
			},
			passed: 4, exit: exitFailed, says: "broken on purpose",
		},
		"port": {
			breaks: func(g *smokeGrid) {
				g.onListNodes = func(*sutrav1.ListNodesRequest) (*sutrav1.ListNodesResponse, error) {
					return &sutrav1.ListNodesResponse{Nodes: []*sutrav1.Node{g.current()}}, g.port.Close()
				}
			},
			passed: 5, exit: exitFailed, says: "connection refused",
		},
		"another node's port": {
			breaks: func(g *smokeGrid) { g.storage = keyValue("node-9") },
			passed: 5, exit: exitFailed, says: "should be node node-smoke and says that it is node-9",
		},
		"lost value": {
			breaks: func(g *smokeGrid) {
				g.storage = http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, `{"node_id":%q}`, smokeNode) })
			},
			passed: 5, exit: exitFailed, says: "read back",
		},
		"disk full": {
			breaks: func(g *smokeGrid) {
				inner := g.storage
				g.storage = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.Method == http.MethodPut {
						http.Error(w, "disk full", http.StatusInsufficientStorage)
						return
					}
					inner.ServeHTTP(w, r)
				})
			},
			passed: 5, exit: exitFailed, says: "507 Insufficient Storage: disk full",
		},
		"first stop": {
			breaks: func(g *smokeGrid) {
				var once sync.Once
				g.onStop = func(r *sutrav1.StopNodeRequest) (answer *sutrav1.StopNodeResponse, err error) {
					err = rpc.Errorf(rpc.StillRunning, "it doesn't want to")
					once.Do(func() { r = nil })
					if r != nil {
						return g.stop(r)
					}
					return nil, err
				}
			},
			passed: 6, exit: exitTimedOut, says: "it doesn't want to",
		},
		"port not free": {
			breaks: func(g *smokeGrid) { g.leakPort = true },
			passed: 7, exit: exitFailed, says: "it still accepts connections",
		},
		"not stopped": {
			breaks: func(g *smokeGrid) {
				g.onNodeStatus = func(*sutrav1.GetNodeStatusRequest) (*sutrav1.GetNodeStatusResponse, error) {
					return &sutrav1.GetNodeStatusResponse{
						Node: &sutrav1.Node{Phase: sutrav1.Phase_PHASE_RUNNING}, Source: sutrav1.Source_SOURCE_LIVE,
					}, nil
				}
			},
			passed: 8, exit: exitFailed, says: "should be STOPPED and is RUNNING",
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			g := newSmokeGrid(t)
			if c.breaks != nil {
				c.breaks(g)
			}
			term := newTerminal()
			term.portFree = 50 * time.Millisecond // the port that stays open stays so for ever
			out, err := g.smoke(t.Context(), term, c.args...)
			if ExitCode(err) != c.exit || !strings.Contains(fmt.Sprint(err), c.says) {
				t.Errorf("exit code %d: %v", ExitCode(err), err)
			}
			lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
			if want := fmt.Sprintf("%d of 9 steps passed", c.passed); lines[len(lines)-1] != want {
				t.Errorf("no last line %q:\n%s", want, out)
			}
			if failed := lines[c.passed]; !strings.HasPrefix(failed, "FAIL") || !strings.Contains(failed, c.says) {
				t.Errorf("%q doesn't say what failed", failed)
			}
			if cleaned := strings.Contains(out, "stopped and removed node-smoke"); cleaned != (c.passed > 2) {
				t.Errorf("cleaned up: %v\n%s", cleaned, out)
			}
			g.wantNothingLeft()
		})
	}
}

// A spawn of unknown outcome may have left a node; one that was refused names another's.
func TestSmokeAfterAFailedSpawn(t *testing.T) {
	cases := map[string]struct {
		answer func(*smokeGrid, *sutrav1.SpawnNodeRequest, int) error
		clean  string // of the clean-up line; empty where there is none
	}{
		"timed out, node named": {
			func(*smokeGrid, *sutrav1.SpawnNodeRequest, int) error {
				return rpc.Errorf(rpc.NotReadyYet, "not ready").With("node_id", smokeNode)
			},
			"stopped and removed node-smoke",
		},
		"answer lost, found by the same request": {
			func(_ *smokeGrid, _ *sutrav1.SpawnNodeRequest, try int) error {
				if try == 1 {
					return rpc.Errorf(rpc.TimedOut, "too late")
				}
				return nil
			},
			"stopped and removed node-smoke",
		},
		"answer lost, node named by the second try": {
			func(_ *smokeGrid, _ *sutrav1.SpawnNodeRequest, try int) error {
				e := rpc.Errorf(rpc.TimedOut, "too late")
				if try == 2 {
					e = e.With("node_id", smokeNode)
				}
				return e
			},
			"stopped and removed node-smoke",
		},
		"refused, another's node named": {
			func(g *smokeGrid, _ *sutrav1.SpawnNodeRequest, _ int) error {
				g.by = "somebody else"
				return rpc.Errorf(rpc.PortInUse, "port 50051 belongs to node-smoke").With("node_id", smokeNode)
			},
			"",
		},
		"no agent": {
			func(g *smokeGrid, _ *sutrav1.SpawnNodeRequest, _ int) error {
				g.by = "somebody else"
				return rpc.Errorf(rpc.NoAgentAvailable, "none")
			},
			"",
		},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			g := newSmokeGrid(t)
			try := 0
			g.onSpawn = func(_ context.Context, r *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
				try++
				answer, err := g.spawn(r)
				if scripted := c.answer(g, r, try); scripted != nil {
					return nil, scripted
				}
				return answer, err
			}
			out, err := g.smoke(t.Context(), newTerminal())
			if err == nil || !strings.HasSuffix(out, "\n2 of 9 steps passed\n") {
				t.Errorf("%v\n%s", err, out)
			}
			if c.clean != "" {
				if !strings.Contains(out, c.clean) {
					t.Errorf("no %q:\n%s", c.clean, out)
				}
				g.wantNothingLeft()
				return
			}
			if n := g.current(); n == nil || n.Ended() || strings.Contains(out, "clean up") {
				t.Errorf("somebody else's node was touched: %v\n%s", n, out)
			}
		})
	}
}

func TestSmokeInterrupted(t *testing.T) {
	cases := map[string]func(*smokeGrid, context.CancelFunc){
		"during the spawn": func(g *smokeGrid, interrupt context.CancelFunc) {
			first := true
			g.onSpawn = func(ctx context.Context, r *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
				if !first {
					return g.spawn(r)
				}
				first = false
				_, err := g.spawn(r)
				interrupt()
				<-ctx.Done()
				return nil, errors.Join(err, ctx.Err())
			}
		},
		"after the spawn": func(g *smokeGrid, interrupt context.CancelFunc) {
			g.onListNodes = func(*sutrav1.ListNodesRequest) (*sutrav1.ListNodesResponse, error) {
				interrupt()
				return &sutrav1.ListNodesResponse{Nodes: []*sutrav1.Node{g.current()}}, nil
			}
		},
		"while its port is used": func(g *smokeGrid, interrupt context.CancelFunc) {
			g.storage = http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				interrupt()
				<-r.Context().Done()
			})
		},
	}
	for name, breaks := range cases {
		t.Run(name, func(t *testing.T) {
			g := newSmokeGrid(t)
			ctx, interrupt := context.WithCancel(t.Context())
			defer interrupt()
			breaks(g, interrupt)
			out, err := g.smoke(ctx, newTerminal())
			if ExitCode(err) != exitFailed || !strings.Contains(out, "stopped and removed node-smoke") {
				t.Errorf("%v\n%s", err, out)
			}
			g.wantNothingLeft()
		})
	}
}

// What can't be cleaned up is named, with the commands that do it later.
func TestSmokeSaysWhatIsLeft(t *testing.T) {
	g := newSmokeGrid(t)
	g.onStop = func(*sutrav1.StopNodeRequest) (*sutrav1.StopNodeResponse, error) {
		return nil, rpc.Errorf(rpc.AgentUnreachable, "agent-001 went away")
	}
	out, err := g.smoke(t.Context(), newTerminal())
	const left = "node node-smoke is left, remove it with sutra --master MASTER stop --node node-smoke && " +
		"sutra --master MASTER remove --node node-smoke: agent-001 went away"
	if ExitCode(err) != exitUnavailable || !strings.Contains(err.Error(), strings.ReplaceAll(left, "MASTER", g.endpoint)) ||
		!strings.Contains(out, "clean up") || !strings.Contains(out, left) {
		t.Errorf("%v\n%s", err, out)
	}

	g = newSmokeGrid(t)
	g.onSpawn = func(context.Context, *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
		return nil, rpc.Errorf(rpc.TimedOut, "too late")
	}
	if _, err = g.smoke(t.Context(), newTerminal()); ExitCode(err) != exitTimedOut || !strings.Contains(err.Error(), "a node may be left") {
		t.Error(err)
	}
}

// A reader that goes away, as head does, must not keep the node from being removed.
func TestSmokeCleansUpThoughNobodyReads(t *testing.T) {
	g := newSmokeGrid(t)
	term := newTerminal()
	term.Out = &closing{lines: 3}
	if _, err := g.smoke(t.Context(), term); ExitCode(err) != exitFailed {
		t.Error(err)
	}
	if g.by == "" {
		t.Error("nothing was spawned")
	}
	g.wantNothingLeft()
}

// closing takes some writes and then no more.
type closing struct{ lines int }

func (c *closing) Write(p []byte) (int, error) {
	if c.lines--; c.lines < 0 {
		return 0, io.ErrClosedPipe
	}
	return len(p), nil
}

func TestSmokeOnATerminal(t *testing.T) {
	g := newSmokeGrid(t)
	term := newTerminal()
	term.OutTTY, term.Color = true, true
	g.onListNodes = func(*sutrav1.ListNodesRequest) (*sutrav1.ListNodesResponse, error) {
		return nil, rpc.Errorf(rpc.Internal, "evil \x1b[2J")
	}
	out, _ := g.smoke(t.Context(), term)
	if !strings.Contains(out, "\x1b[32m✓\x1b[0m 1 the master") || !strings.Contains(out, "\x1b[31m✗\x1b[0m 5 list-nodes") ||
		strings.Contains(out, "\x1b[2J") {
		t.Errorf("%q", out)
	}
}
