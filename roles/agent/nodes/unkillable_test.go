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
