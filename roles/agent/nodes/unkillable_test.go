package nodes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// A stopped node whose process can't be killed, because a disk doesn't answer for example, is STOPPING for as long, and says
// why; its port stays its own, and its agent may end.
func TestStopOfANodeThatCannotBeKilled(t *testing.T) {
	m := newManager(t, func(c *Config) {
		p := c.Profiles["default"]
		p.StopGrace = time.Millisecond
		c.Profiles["default"] = p
	})
	n := mustSpawn(t, m, want("node-a"))
	thaw := freeze(t, int(n.GetPid()))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	_, err := m.Stop(ctx, "node-a")
	expectReason(t, err, rpc.StillRunning)

	says := fmt.Sprintf("hasn't ended: process %d, sleep, in state D (disk sleep), outlives SIGKILL", n.GetPid())
	stuck := func(m *Manager) {
		t.Helper()
		await(t, "the reason", func() error {
			got, _ := m.Get("node-a")
			if got.GetPhase() != sutrav1.Phase_PHASE_STOPPING || !strings.HasPrefix(got.GetReason(), says) {
				return fmt.Errorf("it is %v", got)
			}
			return nil
		})
	}
	stuck(m)
	_, err = m.Spawn(t.Context(), want("node-b", on(int(n.GetPort()))))
	expectReason(t, err, rpc.PortInUse)

	next := reopen(t, m)
	stuck(next)
	thaw()
	if _, err := next.Stop(t.Context(), "node-a"); err != nil {
		t.Fatal(err)
	}
	if left := processes(t, next); len(left) > 0 {
		t.Errorf("stopped, and %v live", left)
	}
}

// A probe that can't be killed counts as one that failed, each time that the node would be asked again; no other is run beside
// it, and the agent may end.
func TestProbeThatCannotBeKilled(t *testing.T) {
	m := newManager(t, every(20*time.Millisecond), probed("asked", "test -e $HOME/slow || exit 0; echo >>$HOME/ran; exec sh -c 'echo $$ >$HOME/new; mv $HOME/new $HOME/pid; exec sleep 1000'"))
	n := mustSpawn(t, m, want("node-a", as("asked")))
	if err := os.WriteFile(filepath.Join(n.GetStoragePath(), "slow"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	var pid int
	await(t, "the probe", func() error {
		text, err := os.ReadFile(filepath.Join(n.GetStoragePath(), "pid"))
		_, _ = fmt.Sscan(string(text), &pid)
		return err
	})
	thaw := freeze(t, pid)
	await(t, "the node to be put down", func() error {
		got, _ := m.Get("node-a")
		exit := got.GetLastExit()
		if !strings.HasPrefix(exit.GetCause(), "liveness probe failed 3 times: exec probe: ") || !strings.Contains(exit.GetCause(), fmt.Sprintf("process %d of an earlier one outlives SIGKILL", pid)) {
			return fmt.Errorf("it is %v", got)
		}
		return nil
	})
	cancel()
	await(t, "the end of the checks", func() error {
		select {
		case err := <-ended:
			return err
		default:
			return errors.New("a check goes on")
		}
	})
	if ran, err := os.ReadFile(filepath.Join(n.GetStoragePath(), "ran")); len(ran) != 1 {
		t.Errorf("%d probes were run (%v)", len(ran), err)
	}
	thaw()
	await(t, "the probe's end", func() error {
		if len(zeroSeparated(pid, "cmdline")) > 0 {
			return fmt.Errorf("process %d lives", pid)
		}
		return nil
	})
}

// freeze keeps a process from dying until thaw is called or the test is over.
func freeze(t *testing.T, pid int) (thaw func()) {
	t.Helper()
	dir := "/sys/fs/cgroup/freezer/frozen" + strings.ReplaceAll(t.TempDir(), "/", "-")
	if err := os.Mkdir(dir, 0o700); err != nil {
		if os.Getenv("SUTRA_TEST_NO_SKIP") != "" {
			t.Fatal(err)
		}
		t.Skipf("there is no v1 freezer, in which processes outlive SIGKILL: %v", err)
	}
	set := func(name, value string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(value), 0); err != nil {
			t.Error(err)
		}
	}
	state := func() string {
		data, err := os.ReadFile(filepath.Join(dir, "freezer.state"))
		if err != nil {
			t.Error(err)
		}
		return strings.TrimSpace(string(data))
	}
	thaw = func() { set("freezer.state", "THAWED") }
	t.Cleanup(func() {
		thaw()
		await(t, "the group's end", func() error { return os.Remove(dir) })
	})
	set("cgroup.procs", strconv.Itoa(pid))
	set("freezer.state", "FROZEN")
	await(t, "the process to stand still", func() error {
		if s := state(); s != "FROZEN" {
			return errors.New(s)
		}
		return nil
	})
	return thaw
}
