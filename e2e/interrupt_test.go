package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// moments is at how many points of a run each role is interrupted.
const moments = 8

// interruptAt sends SIGINT to a process once a part of a whole run's time is over, and returns its exit code. Where
// exactly the signal falls is chance and doesn't matter: at no moment may it do harm.
func interruptAt(p *harness.Process, whole time.Duration, part, parts int) int {
	time.Sleep(whole * time.Duration(part) / time.Duration(parts))
	p.Signal(syscall.SIGINT)
	return p.Wait()
}

// inGoodOrder tells whether an interrupted process ended as it should: by itself, or before Go's runtime was up.
func inGoodOrder(p *harness.Process, code int) bool {
	if code == 0 {
		return true
	}
	how, ok := p.Cmd.ProcessState.Sys().(syscall.WaitStatus)
	return ok && how.Signaled() && how.Signal() == syscall.SIGINT && len(p.Log()) == 0
}

// said waits until a process's log has a text in it, and returns how long that took.
func said(t *testing.T, p *harness.Process, text string) time.Duration {
	t.Helper()
	start := time.Now()
	harness.Await(t, p.Name+" to say "+text, func() error {
		if bytes.Contains(p.Log(), []byte(text)) {
			return nil
		}
		return errors.New("it hasn't yet")
	})
	return time.Since(start)
}

// Whenever dev is interrupted, nothing of its grid is left: no process, no temporary home.
func TestInterruptDev(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	tmp := filepath.Join(g.Dir, "tmp")
	if err := os.Mkdir(tmp, 0o700); err != nil {
		t.Fatal(err)
	}
	g.Env = append(g.Env, "TMPDIR="+tmp)
	first := g.Launch("dev", "dev")
	whole := said(t, first, "Ctrl-C stops all of it.")
	first.Signal(syscall.SIGINT)
	if code := first.Wait(); code != 0 {
		t.Errorf("dev ended with %d", code)
	}
	for i := range moments {
		dev := g.Launch(fmt.Sprintf("dev-%d", i), "dev")
		if code := interruptAt(dev, whole, i, moments); !inGoodOrder(dev, code) {
			t.Errorf("dev, interrupted at moment %d of %d, ended with %d:\n%s", i, moments, code, dev.Log())
		}
		if left := g.NodeProcesses(); len(left) > 0 {
			t.Fatalf("dev, interrupted at moment %d of %d, left the processes %v", i, moments, left)
		}
		left, err := os.ReadDir(tmp)
		if err != nil {
			t.Fatal(err)
		}
		if len(left) > 0 {
			t.Fatalf("dev, interrupted at moment %d of %d, left %v\n%s", i, moments, left, dev.Log())
		}
	}
}

// Whenever the master is interrupted, its home can be opened again and knows what it knew.
func TestInterruptMaster(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	grid := g.MustRun("status", "-o", "json")
	master.Stop()
	start := time.Now()
	g.StartMaster().Stop()
	whole := time.Since(start)
	for i := range moments {
		m := g.Launch(fmt.Sprintf("master-%d", i), "master", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
		if code := interruptAt(m, whole, i, moments); !inGoodOrder(m, code) {
			t.Errorf("the master, interrupted at moment %d of %d, ended with %d:\n%s", i, moments, code, m.Log())
		}
		absent(t, filepath.Join(g.Home, "run", "master.json"))
	}
	g.StartMaster()
	id, _, _ := strings.Cut(grid, ",") // {"grid_id":"..."
	if now := g.MustRun("status", "-o", "json"); !strings.HasPrefix(now, id) {
		t.Errorf("the grid was %s and is %s", id, now)
	}
}

// Whenever the agent is interrupted, its nodes run on, and its next start takes them up.
func TestInterruptAgent(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("a1", sleepProfile)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	file := filepath.Join(g.Dir, "a1.toml")
	end := func(a *harness.Process, code int) {
		t.Helper()
		if !inGoodOrder(a, code) {
			t.Errorf("the agent ended with %d", code)
		}
		if p := g.NodeProcesses(); len(p) != 1 || p[int(node.GetPid())] != node.GetNodeId() {
			t.Fatalf("the processes are %v, and the node is %v", p, node)
		}
	}
	agent.Signal(syscall.SIGINT)
	end(agent, agent.Wait())
	agent = g.LaunchAgent("agent", file)
	whole := said(t, agent, "heartbeat loop started")
	agent.Signal(syscall.SIGINT)
	end(agent, agent.Wait())
	for i := range moments {
		a := g.LaunchAgent(fmt.Sprintf("agent-%d", i), file)
		end(a, interruptAt(a, whole, i, moments))
	}
	g.LaunchAgent("last", file)
	back := g.AwaitNode(node.GetNodeId(), "to run at last", func(n *sutrav1.Node) bool { return n.GetPhase() == running })
	if same := sameRun(node, back); same != nil || len(g.Nodes(true)) != 1 {
		t.Error(same, g.Nodes(true))
	}
}

// Whenever smoke is interrupted, its node is stopped and removed.
func TestInterruptSmoke(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("a1", "default_memory_mb = 64")
	start := time.Now()
	g.MustRun("smoke")
	whole := time.Since(start)
	interrupted := 0
	for i := range 2 * moments {
		smoke := g.Launch(fmt.Sprintf("smoke-%d", i), "smoke")
		code := interruptAt(smoke, whole, i, 2*moments)
		switch log := string(smoke.Log()); {
		case inGoodOrder(smoke, code):
		case code == -1 && strings.Contains(log, "9 of 9 steps passed"): // it was all but gone
		case code == 1 && strings.Contains(log, "error: smoke step") && !strings.Contains(log, "cleaning up failed"):
			interrupted++
		default:
			t.Errorf("smoke, interrupted at moment %d of %d, ended with %d:\n%s", i, 2*moments, code, log)
		}
		if all, left := g.Nodes(true), g.NodeProcesses(); len(all) > 0 || len(left) > 0 {
			t.Fatalf("smoke, interrupted at moment %d of %d, left the nodes %v and the processes %v:\n%s", i, 2*moments, all, left, smoke.Log())
		}
	}
	if interrupted == 0 {
		t.Error("no interruption fell into a run")
	}
}
