package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// The user that confined nodes run as owns nothing else.
const strangerUID, strangerGID = 65533, 65532

// reachable lets everybody on to a grid's folder, and puts a sutra binary there that everybody may execute.
func reachable(t *testing.T, g *harness.Grid) (binary string) {
	t.Helper()
	for _, dir := range []string{filepath.Dir(g.Dir), g.Dir} {
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(g.Binary)
	if err != nil {
		t.Fatal(err)
	}
	binary = filepath.Join(g.Dir, "sutra")
	if err := os.WriteFile(binary, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return binary
}

// asStranger runs a command as the user that confined nodes run as, and returns what it writes.
func asStranger(t *testing.T, name string, args ...string) (out string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // for an agent that starts and isn't to
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env, cmd.Dir = []string{"PATH=" + os.Getenv("PATH"), "GORACE=atexit_sleep_ms=10"}, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: strangerUID, Gid: strangerGID}}
	data, err := cmd.CombinedOutput()
	return string(data), err
}

// statusLine is a line of a process's /proc/PID/status.
func statusLine(t *testing.T, pid int, name string) string {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	t.Fatalf("no %s in\n%s", name, status)
	return ""
}

// A profile's nodes run as its user, in folders of that user, who can't read what else is in the home. They are adopted,
// restarted, measured and stopped like all others.
func TestNodesOfAnotherUser(t *testing.T) {
	t.Parallel()
	harness.Need(t, "root")
	g := harness.New(t)
	binary := reachable(t, g)
	g.StartMaster()
	storage := fmt.Sprintf(`
[storage.profiles.theirs]
storage_binary = %q
args = ["storage", "--port", "{port}", "--storage-path", "{storage_path}", "--node-id", "{node_id}"]
run_as = "%d:%d"
[storage.profiles.free]
storage_binary = "/bin/sleep"
args = ["100000"]
ready = "none"
no_new_privileges = false
[monitoring]
health_check_interval_secs = 1
`, binary, strangerUID, strangerGID)
	agent := g.StartAgent("agent-001", storage)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "theirs"})
	isStrangers := func(pid int) {
		t.Helper()
		for name, want := range map[string]string{
			"Uid": "65533 65533 65533 65533", "Gid": "65532 65532 65532 65532", "Groups": "65532", "NoNewPrivs": "1", "CapEff": "0000000000000000",
		} {
			if got := statusLine(t, pid, name); got != want {
				t.Errorf("%s of the node is %s, want %s", name, got, want)
			}
		}
	}
	isStrangers(int(node.GetPid()))
	files := 0
	err := filepath.WalkDir(node.GetStoragePath(), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		files++
		info, err := d.Info()
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != strangerUID || st.Gid != strangerGID {
			t.Errorf("%s is %v", path, info.Sys())
		}
		return nil
	})
	if err != nil || files < 2 {
		t.Errorf("%d files in the node's storage (%v)", files, err)
	}

	var secrets []string
	err = filepath.WalkDir(g.Home, func(path string, _ fs.DirEntry, err error) error {
		if err == nil && path == node.GetStoragePath() {
			return filepath.SkipDir
		}
		secrets = append(secrets, path)
		return err
	})
	if err != nil || len(secrets) < 10 {
		t.Fatalf("the home has %q (%v)", secrets, err)
	}
	show := append([]string{"-c", `for f; do if [ -r "$f" ] || [ -w "$f" ]; then echo "$f"; fi; done`, "sh"}, secrets...)
	if out, err := asStranger(t, "/bin/sh", show...); err != nil || out != "" {
		t.Errorf("the node's user can read or change (%v)\n%s", err, out)
	}
	if out, err := asStranger(t, "/bin/ls", node.GetStoragePath()); err != nil {
		t.Errorf("the node's user can't get to its data: %v\n%s", err, out)
	}

	ours := g.Spawn(&sutrav1.SpawnNodeRequest{})
	free := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "free"})
	for pid, want := range map[int]string{int(ours.GetPid()): "1", int(free.GetPid()): "0", agent.PID(): "0"} {
		if got := statusLine(t, pid, "NoNewPrivs"); got != want {
			t.Errorf("NoNewPrivs of %d is %s, want %s", pid, got, want)
		}
	}

	agent.Kill()
	g.StartAgent("agent-001", storage)
	g.AwaitNode(node.GetNodeId(), "to be taken up, and measured", func(n *sutrav1.Node) bool {
		return n.GetPhase() == running && n.GetPid() == node.GetPid() && n.GetUsage().GetOpenFiles() >= 3 && n.GetUsage().GetDiskBytes() > 0
	})
	if err := unix.Kill(int(node.GetPid()), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	again := g.AwaitNode(node.GetNodeId(), "to be restarted", func(n *sutrav1.Node) bool {
		return n.GetPhase() == running && n.GetRestartCount() == 1
	})
	if again.GetLastExit().GetSignal() != "SIGKILL" {
		t.Errorf("it ended by %v", again.GetLastExit())
	}
	isStrangers(int(again.GetPid()))
	stopAll(t, g, []string{node.GetNodeId(), ours.GetNodeId(), free.GetNodeId()})
	if err := unix.Kill(int(again.GetPid()), 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("it wasn't ended: %v", err)
	}
}

// What an agent's file asks for in vain is told at the agent's start.
func TestRunAsThatCannotBe(t *testing.T) {
	t.Parallel()
	harness.Need(t, "root")
	g := harness.New(t)
	binary := reachable(t, g)
	g.StartMaster()
	file := g.AgentFile("agent-001", "run_as = 'no-such-user'")
	refusedAtStart(t, g, 2, []string{file + ":7: storage.run_as: there is no user \"no-such-user\" on this host"}, "agent", "--config", file)

	file = g.AgentFile("agent-001", "run_as = 'root'")
	home := filepath.Join(g.Dir, "other-home")
	if err := os.Mkdir(home, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, home} {
		if err := os.Chown(path, strangerUID, strangerGID); err != nil {
			t.Fatal(err)
		}
	}
	out, err := asStranger(t, binary, "agent", "--config", file, "--home", home)
	const want = `profile default: run_as = "root" takes rights that this agent, which runs as user 65533, lacks: CAP_CHOWN, `
	if err == nil || !strings.Contains(out, want) || !strings.Contains(out, "hint: run the agent as root, or leave run_as out") {
		t.Errorf("an agent without rights (%v) says\n%s", err, out)
	}
}

// An agent's file says where storage may lie. While somebody turns a part of a path elsewhere and back, nodes run there or not at all.
func TestAllowedPaths(t *testing.T) {
	t.Parallel()
	harness.Need(t, "root")
	g := harness.New(t)
	allowed, outside := filepath.Join(g.Dir, "allowed"), filepath.Join(g.Dir, "outside")
	for _, dir := range []string{filepath.Join(allowed, "x"), outside} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, filepath.Join(allowed, "y")); err != nil {
		t.Fatal(err)
	}
	g.StartMaster()
	g.StartAgent("agent-001", fmt.Sprintf("allowed_paths = [%q]\n", allowed)+`
[storage.profiles.writer]
storage_binary = "/bin/sh"
args = ["-c", "echo >here; exec sleep 100000"]
ready = "none"
`)
	for _, path := range []string{filepath.Join(outside, "a"), filepath.Join(allowed, "y", "a"), allowed + "2"} {
		refused(t, g, 7, "PATH_UNUSABLE", []string{path, "isn't within allowed_paths of agent agent-001", "choose a folder within " + allowed},
			"spawn", "--profile", "writer", "--storage-path", path)
	}
	over := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for {
			select {
			case <-over:
				return
			default:
			}
			if err := unix.Renameat2(unix.AT_FDCWD, filepath.Join(allowed, "x"), unix.AT_FDCWD, filepath.Join(allowed, "y"), unix.RENAME_EXCHANGE); err != nil {
				t.Error(err)
				return
			}
		}
	})
	const enough = 8
	spawned, turnedAway := 0, 0
	for i := 0; i < 2000 && (spawned < enough || turnedAway < enough); i++ {
		resp, err := g.Client().SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: "writer", StoragePath: filepath.Join(allowed, "x", fmt.Sprint(i))})
		switch {
		case err == nil:
			spawned++
			stopAll(t, g, []string{resp.GetNode().GetNodeId()})
		case rpc.ReasonOf(err) == rpc.PathUnusable:
			turnedAway++
		default:
			t.Error(err)
		}
	}
	close(over)
	swapper.Wait()
	if spawned < enough || turnedAway < enough {
		t.Errorf("%d were spawned and %d refused: there was no race", spawned, turnedAway)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside there are %v (%v)", left, err)
	}
}
