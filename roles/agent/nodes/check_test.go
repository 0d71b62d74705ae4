package nodes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/supervisor"
)

// run has a manager check its nodes until the test's end, before that of the nodes.
func run(t *testing.T, m *Manager) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func every(d time.Duration) func(*Config) { return func(c *Config) { c.CheckEvery = d } }

// probed adds the profile of a server that sleeps and is asked by a command.
func probed(name, command string) func(*Config) {
	return func(c *Config) {
		p := c.Profiles["default"]
		p.Name, p.Ready = name, config.Ready{Kind: "exec", Arg: command}
		c.Profiles[name] = p
	}
}

// A process that a signal stopped is restarted although nothing asks it anything.
func TestSuspendedNodeIsRestarted(t *testing.T) {
	m := newManager(t, every(20*time.Millisecond))
	run(t, m)
	n := mustSpawn(t, m, want("node-1"))
	well := mustSpawn(t, m, want("node-2"))
	if err := syscall.Kill(int(n.GetPid()), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	is := awaitPhaseAfter(t, m, n)
	if exit := is.GetLastExit(); is.GetRestartCount() != 1 || exit.GetSignal() != "SIGTERM" ||
		!strings.HasPrefix(exit.GetCause(), "liveness probe failed 3 times: its process was stopped by a signal") {
		t.Errorf("the node is %v", is)
	}
	if is, _ := m.Get("node-2"); is.GetPid() != well.GetPid() || is.GetHealth() != sutrav1.NodeHealth_NODE_HEALTH_READY {
		t.Errorf("another node is %v", is)
	}
}

// Two failed checks in a row make a node NOT_READY for a while, three restart it.
func TestFailedChecks(t *testing.T) {
	for failures, restarted := range map[int]bool{2: false, 3: true} {
		t.Run(fmt.Sprint(failures), func(t *testing.T) {
			// The first check is of its readiness; those after it fail.
			m := newManager(t, every(20*time.Millisecond), probed("counted", fmt.Sprintf(
				"echo >>$HOME/checks; n=$(wc -l <$HOME/checks); [ $n -eq 1 ] || [ $n -gt %d ]", 1+failures)))
			run(t, m)
			n := mustSpawn(t, m, want("node-1", as("counted")))
			await(t, "many checks", func() error {
				data, err := os.ReadFile(filepath.Join(n.GetStoragePath(), "checks"))
				if err == nil && len(data) < failures+8 {
					return fmt.Errorf("there were %d", len(data))
				}
				return err
			})
			is := awaitPhase(t, m, "node-1", sutrav1.Phase_PHASE_RUNNING)
			if (is.GetRestartCount() == 1) != restarted || (is.GetPid() != n.GetPid()) != restarted || is.GetHealth() != sutrav1.NodeHealth_NODE_HEALTH_READY {
				t.Errorf("the node is %v", is)
			}
		})
	}
}

// Nodes that hang keep nobody else from being checked.
func TestHungNodesHoldUpNoOther(t *testing.T) {
	const hung = 20
	m := newManager(t, every(20*time.Millisecond),
		probed("hung", "test ! -e $HOME/served && touch $HOME/served || sleep 100"), probed("well", "echo >>$HOME/checks"))
	run(t, m)
	well := mustSpawn(t, m, want("well", as("well")))
	for i := range hung {
		mustSpawn(t, m, want(fmt.Sprintf("hung-%d", i), as("hung")))
	}
	hanging := func() (n int) {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, e := range m.entries {
			if e.profile == "hung" && e.checks.running {
				n++
			}
		}
		return n
	}
	await(t, "all to hang", func() error {
		if n := hanging(); n < hung {
			return fmt.Errorf("%d of %d do", n, hung)
		}
		return nil
	})
	checks := func() int {
		data, err := os.ReadFile(filepath.Join(well.GetStoragePath(), "checks"))
		if err != nil {
			t.Fatal(err)
		}
		return len(data)
	}
	before := checks()
	await(t, "further checks of the one that is well", func() error {
		if n := checks(); n < before+3 {
			return fmt.Errorf("%d, before %d", n, before)
		}
		return nil
	})
	for _, n := range m.List() {
		if n.GetRestartCount() > 0 {
			t.Fatalf("the checks of a node that is well came only after %v had been given up", n)
		}
	}
}

// Each node has its own time, none is checked twice at once, and no more than there is room for.
func TestScheduleOfChecks(t *testing.T) {
	const count, interval = 1000, 10 * time.Second
	m := &Manager{cfg: Config{CheckEvery: interval}, entries: map[string]*entry{}}
	start := time.Now()
	for i := range count {
		e := &entry{state: supervisor.State{Phase: supervisor.Running}, spec: &sutrav1.Node{}}
		e.checks.begin(start, interval)
		m.entries[fmt.Sprint(i)] = e
	}
	seen := map[*entry]int{}
	most := 0
	for step := range 3 * checkSteps {
		due := m.due(start.Add(time.Duration(step)*interval/checkSteps), count)
		most = max(most, len(due))
		for _, e := range due {
			seen[e]++
			e.checks.running = false
		}
	}
	if len(seen) != count || most > count/8 {
		t.Errorf("%d of %d nodes were checked, up to %d of them at once", len(seen), count, most)
	}
	for e, n := range seen {
		if n < 2 || n > 3 {
			t.Errorf("a node was checked %d times in three intervals: %+v", n, e.checks)
		}
	}
	later := start.Add(time.Hour)
	if first := m.due(later, 10); len(first) != 10 {
		t.Errorf("%d were taken on, and there is room for 10", len(first))
	}
	if rest := m.due(later, count); len(rest) != count-10 {
		t.Errorf("%d further ones are due, and 10 of %d are being checked", len(rest), count)
	}
	if none := m.due(later.Add(time.Hour), 0); len(none) != 0 {
		t.Errorf("%d were taken on without room", len(none))
	}
}
