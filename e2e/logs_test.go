package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// countProfile numbers its lines, on through its restarts. It fills an eighth of its budget in a second or two, and all of it
// in some ten: so long a follower may be held up and lose nothing.
const countProfile = `[storage.profiles.count]
storage_binary = "/bin/sh"
args = ["-c", "while :; do n=$(cat n 2>/dev/null || echo 0); n=$((n+1)); echo $n >n.new; mv n.new n; printf '%05000d\n' $n; sleep .01; done"]
ready = "none"
stop_signal = "KILL"
[logs]
node_budget_mb = 3
agent_budget_mb = 3
`

// counted checks that lines are numbered without a gap, and returns the last number. A line may be missing where its
// writer was killed between counting it and writing it.
func counted(t *testing.T, data []byte, kills int) (first, last int) {
	t.Helper()
	gaps := 0
	for line := range bytes.Lines(data) {
		n, err := strconv.Atoi(strings.TrimLeft(strings.TrimSpace(string(line)), "0"))
		if err != nil || len(line) != 5001 {
			t.Fatalf("a broken line after %d: %.60q", last, line)
		}
		switch {
		case first == 0:
			first = n
		case n == last+2:
			gaps++
		case n != last+1:
			t.Fatalf("line %d follows line %d", n, last)
		}
		last = n
	}
	if gaps > kills {
		t.Fatalf("%d lines are missing, and the node was killed %d times", gaps, kills)
	}
	return first, last
}

// follow starts to follow a node's log, with its output in a file.
func follow(t *testing.T, g *harness.Grid, name, id string, args ...string) (*harness.Process, func() []byte) {
	t.Helper()
	p := g.Launch(name, append([]string{"logs", "-n", id, "-f"}, args...)...)
	return p, func() []byte {
		data := p.Log()
		// What it says itself is for people, and goes between the lines.
		var lines [][]byte
		for line := range bytes.Lines(data) {
			if !bytes.HasPrefix(line, []byte("waiting for ")) {
				lines = append(lines, line)
			}
		}
		return bytes.Join(lines, nil)
	}
}

// A log is followed through rotations and restarts of the node, kill -9 of its agent and of the master, and ends when the
// node is stopped: not one line is missing.
func TestFollowThroughEverything(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	agent := g.StartAgent("a1", countProfile)
	file := filepath.Join(g.Dir, "a1.toml")
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "count"})
	id := node.GetNodeId()
	follower, said := follow(t, g, "follower", id)
	reach := func(what string, more int) {
		t.Helper()
		from := bytes.Count(said(), []byte("\n"))
		harness.Await(t, what, func() error {
			if !follower.Running() {
				t.Fatalf("the follower ended:\n%.2000s", follower.Log())
			}
			if now := bytes.Count(said(), []byte("\n")); now < from+more {
				return fmt.Errorf("%d lines", now-from)
			}
			return nil
		})
	}
	reach("the first lines", 20)

	rotated := func() int {
		parts, err := filepath.Glob(filepath.Join(g.Home, "agents", "a1", "logs", id+".log.*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(parts)
	}
	reach("rotations", 400)
	if rotated() == 0 {
		t.Error("the log wasn't rotated")
	}
	kills := 0
	if err := syscall.Kill(int(node.GetPid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	kills++
	reach("lines of the restarted node", 50)

	agent.Kill()
	reach2 := bytes.Count(said(), []byte("\n"))
	agent = g.LaunchAgent("a1-again", file)
	reach("lines after the agent's kill and restart", 100)
	agent.Stop()
	g.LaunchAgent("a1-third", file)
	reach("lines after the agent's stop and restart", 100)
	master.Kill()
	master = g.StartMaster()
	reach("lines after the master's kill and restart", 100)
	master.Stop()
	g.StartMaster()
	reach("lines after the master's stop and restart", 100)
	if log := string(follower.Log()); !strings.Contains(log, "waiting for agent a1: ") || !strings.Contains(log, "waiting for the master: ") {
		t.Error("it didn't say what it waited for")
	}

	g.MustRun("stop", "-n", id)
	if code := follower.Wait(); code != 0 {
		t.Errorf("the follower ended with %d", code)
	}
	first, last := counted(t, said(), kills)
	counter, err := os.ReadFile(filepath.Join(node.GetStoragePath(), "n"))
	if err != nil {
		t.Fatal(err)
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(counter)))
	if first != 1 || last < n-1 || last < reach2 {
		t.Errorf("followed from line %d to line %d of %d", first, last, n)
	}

	// What is kept of it is still there, and is its end.
	kept := g.MustRun("logs", "-n", id)
	if from, to := counted(t, []byte(kept), kills); to != last || from < 2 {
		t.Errorf("kept: lines %d to %d of %d", from, to, last)
	}
	if size := len(kept); size > 3<<20 || size < 3<<18 {
		t.Errorf("%d bytes are kept of a budget of 3 MiB", size)
	}
	g.MustRun("remove", "-n", id)
	for _, args := range [][]string{{"--tail", "3"}, {"--tail", "3", "-f"}} {
		out := g.MustRun(append([]string{"logs", "-n", id}, args...)...)
		if from, to := counted(t, []byte(out), 0); from != last-2 || to != last {
			t.Errorf("%v of a removed node: lines %d to %d of %d", args, from, to, last)
		}
	}
}

func TestLogsVerb(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("a1", `[storage.profiles.talk]
storage_binary = "/bin/sh"
args = ["-c", "echo one; echo two >&2; printf 'a\\377b\\n'; sleep 3600 & wait"]
ready = "none"
`)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "talk"})
	id := node.GetNodeId()
	harness.Await(t, "the node's words", func() error {
		if out := g.MustRun("logs", "-n", id); out != "one\ntwo\na\xffb\n" {
			return fmt.Errorf("%q", out)
		}
		return nil
	})
	if out := g.MustRun("logs", "--node", id, "--tail", "2", "-o", "json"); out != `{"position":12,"data_base64":"dHdvCmH/Ygo="}`+"\n" {
		t.Errorf("as JSON: %s", out)
	}
	if out := g.MustRun("logs", "-n", id, "--since", "1h"); !strings.HasPrefix(out, "one\n") {
		t.Errorf("of the last hour: %q", out)
	}
	if r := g.Run("logs", "-n", "node-x"); r.Code != 3 || !strings.Contains(r.Stderr, "NODE_NOT_FOUND") {
		t.Errorf("of no node: %d\n%s", r.Code, r.Stderr)
	}

	follower, said := follow(t, g, "follower", id, "--tail", "1")
	prints := func(want string) {
		t.Helper()
		harness.Await(t, "the follower to print", func() error {
			if out := string(said()); out != want {
				return fmt.Errorf("%q", out)
			}
			return nil
		})
	}
	prints("a\xffb\n")
	log, err := os.OpenFile(filepath.Join(g.Home, "agents", "a1", "logs", id+".log"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = log.WriteString("more\n")
	if err := errors.Join(err, log.Close()); err != nil {
		t.Fatal(err)
	}
	prints("a\xffb\nmore\n")
	follower.Signal(syscall.SIGINT)
	if code := follower.Wait(); code != 0 {
		t.Errorf("interrupted, it ended with %d:\n%s", code, follower.Log())
	}

	// Whoever follows doesn't hold up an agent's or a master's stop.
	follower, _ = follow(t, g, "another", id)
	harness.Await(t, "the follower to follow", func() error {
		if !bytes.Contains(follower.Log(), []byte("more")) {
			return fmt.Errorf("%s", follower.Log())
		}
		return nil
	})
	agent.Stop()
	if r := g.Run("logs", "-n", id); r.Code != 4 {
		t.Errorf("without its agent: %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	g.MustRun("status")
	follower.Signal(syscall.SIGTERM)
	if code := follower.Wait(); code != 0 {
		t.Errorf("it ended with %d", code)
	}
	g.LaunchAgent("a1-again", filepath.Join(g.Dir, "a1.toml"))
	g.AwaitNode(id, "to be live", func(n *sutrav1.Node) bool { return n.GetPhase() == running })
	g.MustRun("stop", "-n", id)
}
