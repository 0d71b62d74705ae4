package e2e_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
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

// A log is followed for longer than certificates last, the follower's and the master's: each stream ends with its
// certificate, is begun anew with another, and not one line is missing or there twice.
func TestFollowOutlastsCertificates(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster("--certificate-life", "5s")
	at := fmt.Sprintf("127.0.0.1:%d", g.FreePort())
	g.StartAgent("a1", countProfile+"[monitoring]\nmetrics_listen = \""+at+"\"\n")
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "count"})
	id, home := node.GetNodeId(), filepath.Join(g.Dir, "anna")
	token := strings.TrimSpace(g.MustRun("token", "create", "--role", "viewer"))
	g.MustRun("login", "--home", home, "--master", g.Endpoint, "--token", token, "--name", "anna")
	follower, said := follow(t, g, "anna", id, "--home", home, "--master", g.Endpoint)
	_, grid := g.Authority()
	page := readerAs(t, g, pki.UserIdentity(grid, "vera", sutrav1.Role_ROLE_VIEWER))
	broken := func(at, service string) float64 {
		return seriesAs(t, page, at)[fmt.Sprintf(`grpc_server_handled_total{grpc_code="Unauthenticated",grpc_method="TailLogs",grpc_service="sutra.v1.%s",grpc_type="server_stream"}`, service)]
	}
	// One whose certificate lasts sees nothing of the ends of the master's.
	lasting := make(chan error, 1)
	vera := as(t, g, pki.UserIdentity(grid, "vera", sutrav1.Role_ROLE_VIEWER))
	go func() {
		stream, err := vera.TailLogs(t.Context(), &sutrav1.TailLogsRequest{NodeId: id, Range: &sutrav1.LogRange{Follow: true}})
		for err == nil {
			_, err = stream.Recv()
		}
		lasting <- err
	}()
	lives := map[time.Time]bool{}
	harness.Await(t, "the ends of some certificates", func() error {
		if !follower.Running() {
			t.Fatalf("the follower ended:\n%.2000s", follower.Log())
		}
		own, err := pki.Load(filepath.Join(home, "credentials", grid+".pem"))
		if err != nil {
			return err
		}
		lives[own.Expires] = true
		if ended, of := broken(g.HTTP, "GridMaster"), broken(at, "GridAgent"); ended < 3 || of < 2 || len(lives) < 4 {
			return fmt.Errorf("%v streams of the follower have ended, %v of the master, and %d certificates were seen", ended, of, len(lives))
		}
		return nil
	})
	g.MustRun("stop", "-n", id)
	if code := follower.Wait(); code != 0 {
		t.Errorf("the follower ended with %d", code)
	}
	if err := <-lasting; !errors.Is(err, io.EOF) {
		t.Errorf("the stream of one whose certificate lasts ended with %v", err)
	}
	data := said()
	first, last := counted(t, data, 0)
	if first != 1 || last < 100 {
		t.Errorf("followed from line %d to line %d", first, last)
	}
	if kept, to := counted(t, []byte(g.MustRun("logs", "-n", id)), 0); to != last {
		t.Errorf("kept are lines %d to %d, followed to %d", kept, to, last)
	}
	if bytes.Contains(follower.Log(), []byte("waiting for ")) {
		t.Errorf("it says that it waits:\n%.2000s", follower.Log())
	}
	if lines, _ := onRecord(t, filepath.Join(g.Home, "master", "upkeep.log")); !slices.Contains(lines, "user anna Renew OK") {
		t.Errorf("she didn't renew before it was too late: %q", lines)
	}
	for _, record := range []string{filepath.Join("master", "refused.log"), filepath.Join("agents", "a1", "refused.log")} {
		if lines, _ := onRecord(t, filepath.Join(g.Home, record)); len(lines) > 0 {
			t.Errorf("%s has %q", record, lines)
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

// An agent that hangs doesn't hold up those who want a log of its nodes, nor does a master that hangs: they learn in the
// time of a call, or in theirs, who doesn't answer. Who follows waits.
func TestLogsOfTheFrozen(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	agent := g.StartAgent("a1", manyProfiles)
	id := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"}).GetNodeId()
	log := filepath.Join(g.Home, "agents", "a1", "logs", id+".log")
	write := func(text string) {
		t.Helper()
		f, err := os.OpenFile(log, os.O_APPEND|os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteString(text)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	write("one\n")
	says := func(code int, args []string, parts ...string) {
		t.Helper()
		r := g.Run(append([]string{"logs", "-n", id}, args...)...)
		if r.Code != code || r.Stdout != "" {
			t.Errorf("%v: exit %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
		}
		for _, part := range append(parts, "\nhint: ") {
			if !strings.Contains(r.Stderr, part) {
				t.Errorf("%v: it doesn't say %q:\n%s", args, part, r.Stderr)
			}
		}
	}

	agent.Signal(syscall.SIGSTOP)
	says(5, nil, "agent a1 at ", " didn't answer in time (TIMED_OUT)", "look at agent a1 on its host")
	says(5, []string{"--timeout", "1s"}, "the master at "+g.Endpoint+" is there, and sent nothing", "the limit was --timeout 1s")
	agent.Signal(syscall.SIGCONT)
	harness.Await(t, "the agent to answer again", func() error {
		if r := g.Run("logs", "-n", id); r.Stdout != "one\n" {
			return fmt.Errorf("%s", r.Stderr)
		}
		return nil
	})

	// It follows for longer than its limit.
	follower, said := follow(t, g, "follower", id, "--timeout", "2s")
	harness.Await(t, "the follower to follow", func() error {
		if out := string(said()); out != "one\n" {
			return fmt.Errorf("%q", out)
		}
		return nil
	})
	master.Signal(syscall.SIGSTOP)
	for _, args := range [][]string{nil, {"-f"}} {
		says(5, args, "the master at "+g.Endpoint+" didn't answer in time (TIMED_OUT)", "ss -ltnp")
		says(5, append([]string{"--timeout", "1s"}, args...), "the master at "+g.Endpoint+" didn't answer in time (TIMED_OUT)", "the limit was --timeout 1s")
	}
	harness.Await(t, "the follower to wait", func() error {
		return logSays(follower, "waiting for the master: can't reach the master at "+g.Endpoint+": it stopped answering\n")
	})
	write("two\n")
	master.Signal(syscall.SIGCONT)
	harness.Await(t, "the follower to go on", func() error {
		if out := string(said()); out != "one\ntwo\n" {
			return fmt.Errorf("%q", out)
		}
		return nil
	})
	g.MustRun("stop", "-n", id)
	if code := follower.Wait(); code != 0 {
		t.Errorf("the follower ended with %d", code)
	}
}

// A master that gives an agent up breaks off what it asked it: nobody has canceled that.
func TestLogsOfAnAgentThatIsGivenUp(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster("--degraded-after", "2s", "--offline-after", "4s")
	agent := g.StartAgent("a1", manyProfiles)
	id := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"}).GetNodeId()
	follower, _ := follow(t, g, "follower", id, "-o", "json")
	log, err := os.OpenFile(filepath.Join(g.Home, "agents", "a1", "logs", id+".log"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = log.WriteString("one\n")
	if err := errors.Join(err, log.Close()); err != nil {
		t.Fatal(err)
	}
	harness.Await(t, "the follower to follow", func() error { return logSays(follower, "one") })

	agent.Signal(syscall.SIGSTOP)
	harness.Await(t, "the follower to wait", func() error { return logSays(follower, "notice") })
	if err := logSays(follower, `{"notice":"waiting for agent a1: can't reach agent a1 at `); err != nil {
		t.Errorf("%v:\n%s", err, follower.Log())
	}
	g.AwaitAgent("a1", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)
	if r := g.Run("logs", "-n", id); r.Code != 4 || !strings.Contains(r.Stderr, "(AGENT_OFFLINE)\nhint: look at agent a1 on its host") {
		t.Errorf("of an agent that is OFFLINE: %d\n%s", r.Code, r.Stderr)
	}
	agent.Signal(syscall.SIGCONT)
	g.AwaitAgent("a1", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	g.MustRun("stop", "-n", id)
	if code := follower.Wait(); code != 0 {
		t.Errorf("the follower ended with %d:\n%s", code, follower.Log())
	}
}

// Who doesn't follow gets what there is, and no more: also of a node that writes faster than anybody reads.
func TestLogsOfAFlood(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("a1", `[storage.profiles.flood]
storage_binary = "/usr/bin/yes"
args = ["a line"]
ready = "none"
[logs]
node_budget_mb = 8
`)
	id := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "flood"}).GetNodeId()
	harness.Await(t, "a thousand lines", func() error {
		if out := g.MustRun("logs", "-n", id, "--tail", "1000"); strings.Count(out, "\n") < 999 {
			return fmt.Errorf("%d bytes", len(out))
		}
		return nil
	})
	for range 3 {
		// The end may lie within a line.
		if out := g.MustRun("logs", "-n", id, "--tail", "1000"); len(out) > 7*1000 || len(out) <= 7*999 {
			t.Errorf("the last 1000 lines are %d bytes", len(out))
		}
	}
	if out := g.MustRun("logs", "-n", id); len(out) > 64<<20 {
		t.Errorf("%d bytes are kept of a budget of 8 MiB", len(out))
	}
	g.MustRun("stop", "-n", id)
}
