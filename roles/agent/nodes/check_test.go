package nodes

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
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

// A node that fails a check is NOT_READY, says why, and is READY after the next good one, which forgets the failed ones.
func TestHealthFollowsTheChecks(t *testing.T) {
	m := newManager(t, probed("moody", "test ! -e $HOME/bad || { echo in a mood; exit 1; }")) // nothing is checked but here
	n := mustSpawn(t, m, want("node-1", as("moody")))
	bad := filepath.Join(n.GetStoragePath(), "bad")
	e, last := m.entries["node-1"], n.GetRevision()
	check := func(well, news bool) {
		t.Helper()
		m.check(t.Context(), e)
		is, _ := m.Get("node-1")
		health := map[bool]sutrav1.NodeHealth{false: sutrav1.NodeHealth_NODE_HEALTH_NOT_READY, true: sutrav1.NodeHealth_NODE_HEALTH_READY}[well]
		if is.GetPhase() != sutrav1.Phase_PHASE_RUNNING || is.GetHealth() != health || strings.Contains(is.GetReason(), "in a mood") == well ||
			is.GetPid() != n.GetPid() || is.GetRestartCount() != 0 || (is.GetRevision() > last) != news {
			t.Fatalf("the node is %v", is)
		}
		last = is.GetRevision()
	}
	check(true, false)
	for range 2 {
		if err := os.WriteFile(bad, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		check(false, true)
		check(false, false)
		if err := os.Remove(bad); err != nil {
			t.Fatal(err)
		}
		check(true, true)
	}
}

// A process that a signal stopped before it was ready is ended as well; one that only needs long isn't.
func TestSuspendedBeforeItIsReady(t *testing.T) {
	m := newManager(t, every(20*time.Millisecond))
	run(t, m)
	outcome := make(chan error, 1)
	patient, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	go func() {
		_, err := m.Spawn(patient, want("node-1", as("slow")))
		outcome <- err
	}()
	hasty, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := m.Spawn(hasty, want("node-2", as("slow")))
	expectReason(t, err, rpc.NotReadyYet)
	pid := func(id string) (pid int) {
		await(t, "the process", func() error {
			n, _ := m.Get(id)
			if pid = int(n.GetPid()); pid == 0 {
				return fmt.Errorf("it is %v", n)
			}
			return nil
		})
		return pid
	}
	slow := pid("node-2")
	if err := syscall.Kill(pid("node-1"), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	err = <-outcome
	expectReason(t, err, rpc.NodeDiedEarly)
	if exit := rpc.AsError(err).Exit; !strings.HasPrefix(exit.GetCause(), "liveness probe failed 3 times: its process was stopped by a signal") {
		t.Errorf("exit %v", exit)
	}
	if is, _ := m.Get("node-2"); int(is.GetPid()) != slow || is.GetPhase() != sutrav1.Phase_PHASE_STARTING {
		t.Errorf("the other one is %v", is)
	}
}

// What isn't ready in the time that its profile gives it fails its spawn.
func TestReadyTimeout(t *testing.T) {
	m := newManager(t, func(c *Config) {
		p := c.Profiles["slow"]
		p.ReadyTimeout = 50 * time.Millisecond
		c.Profiles["slow"] = p
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := m.Spawn(ctx, want("node-1", as("slow")))
	expectReason(t, err, rpc.NodeDiedEarly)
	if got, want := rpc.AsError(err).Exit.GetCause(), "not ready within 50ms; the last check said: exec probe: exit status 1"; got != want {
		t.Errorf("cause %q, want %q", got, want)
	}
	if all := m.List(); len(all) > 0 {
		t.Errorf("nodes: %v", all)
	}
}

// A node that hangs and isn't started again by its policy is ended and has failed, and all that is told of it says so.
func TestHungNodeThatIsNotRestarted(t *testing.T) {
	var log lines
	m := newManager(t, every(20*time.Millisecond), withHung("never"), func(c *Config) { c.Log = zerolog.New(&log) })
	run(t, m)
	n := mustSpawn(t, m, want("node-1", as("job")))
	if err := os.WriteFile(filepath.Join(n.GetStoragePath(), "bad"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const why = "liveness probe failed 3 times: exec probe: exit status 1"
	is := awaitPhase(t, m, "node-1", sutrav1.Phase_PHASE_STOPPING)
	if is.GetPid() != n.GetPid() || is.GetReason() != "is ended, and isn't started again: "+why || is.GetDesired() != sutrav1.Desired_DESIRED_RUNNING {
		t.Errorf("while it is ended: %v", is)
	}
	if err := os.WriteFile(filepath.Join(n.GetStoragePath(), "let-go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	is = awaitPhase(t, m, "node-1", sutrav1.Phase_PHASE_FAILED)
	if !is.GetCompleted() || is.GetReason() != "had to be ended: exit code 0 ("+why+"); by its profile's restart policy it isn't started again" ||
		is.GetLastExit().GetCause() != why || is.GetRestartCount() != 0 {
		t.Errorf("afterwards: %v", is)
	}
	pid := fmt.Sprintf(`"pid":%d`, n.GetPid())
	log.expect(t, pid, "none follows")
	log.expect(t, pid, "node ended", `"phase":"FAILED"`)
	if said := log.String(); strings.Contains(said, "another one") || strings.Contains(said, "will be restarted") {
		t.Errorf("the log says\n%s", said)
	}
}

// withHung adds the profile of a server that hangs while there is a file "bad", and ends, when told to, not before there is
// a file "let-go".
func withHung(policy string) func(*Config) {
	return func(c *Config) {
		p := c.Profiles["default"]
		p.Name, p.Restart = "job", policy
		p.StorageBinary, p.Args = "/bin/sh", []string{"-c", "trap 'while test ! -e let-go; do sleep .02; done; exit 0' TERM; touch trapped; while :; do sleep .02; done"}
		p.Ready = config.Ready{Kind: "exec", Arg: "test -e $HOME/trapped -a ! -e $HOME/bad"}
		c.Profiles["job"] = p
	}
}

// Who asks for a restart gets one, also while a node is ended that would not be started again.
func TestRestartOfAHungNodeThatIsNotRestarted(t *testing.T) {
	m := newManager(t, every(20*time.Millisecond), withHung("never"))
	run(t, m)
	n := mustSpawn(t, m, want("node-1", as("job")))
	bad := filepath.Join(n.GetStoragePath(), "bad")
	if err := os.WriteFile(bad, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	awaitPhase(t, m, "node-1", sutrav1.Phase_PHASE_STOPPING)
	if err := os.Remove(bad); err != nil {
		t.Fatal(err)
	}
	outcome := make(chan error, 1)
	go func() {
		_, err := m.Restart(t.Context(), "node-1", 0)
		outcome <- err
	}()
	await(t, "the restart to be under way", func() error {
		if is, _ := m.Get("node-1"); is.GetPhase() != sutrav1.Phase_PHASE_STARTING || !strings.HasPrefix(is.GetReason(), "is ended, to be started anew: ") {
			return fmt.Errorf("it is %v", is)
		}
		return nil
	})
	if err := os.WriteFile(filepath.Join(n.GetStoragePath(), "let-go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := <-outcome; err != nil {
		t.Fatal(err)
	}
	if is, _ := m.Get("node-1"); is.GetPhase() != sutrav1.Phase_PHASE_RUNNING || is.GetRestartCount() != 1 || is.GetPid() == n.GetPid() {
		t.Errorf("the node is %v", is)
	}
}

// lines is a log that a test reads.
type lines struct {
	mu  sync.Mutex // guards what follows
	all strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

// count is how many lines have all parts.
func (l *lines) count(parts ...string) (n int) {
	for line := range strings.Lines(l.String()) {
		has := true
		for _, part := range parts {
			has = has && strings.Contains(line, part)
		}
		if has {
			n++
		}
	}
	return n
}

// expect awaits a line with all parts: events are told of before they are logged.
func (l *lines) expect(t *testing.T, parts ...string) {
	t.Helper()
	await(t, fmt.Sprintf("a line with %q", parts), func() error {
		if l.count(parts...) == 0 {
			return fmt.Errorf("the log says\n%s", l)
		}
		return nil
	})
}

// A crash is logged once, with the process that it was, also where the next agent goes on with it.
func TestCrashIsLoggedOnce(t *testing.T) {
	var log lines
	m := newManager(t, func(c *Config) {
		p := c.Profiles["default"]
		p.StorageBinary, p.Args = "/bin/sh", []string{"-c", "test -e broken && exit 4; exec sleep 100000"}
		c.Profiles["default"] = p
		c.Log = zerolog.New(&log)
	})
	n := mustSpawn(t, m, want("node-1"))
	if err := os.WriteFile(filepath.Join(n.GetStoragePath(), "broken"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(int(n.GetPid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	log.expect(t, "node crashed", fmt.Sprintf(`"pid":%d`, n.GetPid()), "killed by SIGKILL")
	is := awaitPhase(t, m, "node-1", sutrav1.Phase_PHASE_CRASH_LOOP)
	if reason := is.GetReason(); !strings.HasPrefix(reason, "ends again and again; the last end: exit code 4; next start at ") || is.GetMemoryLimit() != n.GetMemoryLimit() {
		t.Errorf("the node was %v\nand is %v", n, is)
	}
	log.expect(t, "node crashed", `"phase":"CRASH_LOOP"`)
	reopen(t, m)
	log.expect(t, "node waits for its next start")
	said := log.String()
	crashes, starts := strings.Count(said, "node crashed"), strings.Count(said, "node started")
	if crashes > starts || strings.Contains(said, `"pid":0`) {
		t.Errorf("%d crashes of %d processes:\n%s", crashes, starts, said)
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

// Where orphans come to the agent, as they do to a container's first process, none of what nodes and their probes leave behind
// stays a zombie while they run.
func TestOrphansOfNodesAreReaped(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0); err != nil {
			t.Error(err)
		}
	})
	leave := func(word string) string {
		return fmt.Sprintf("(sh -c 'echo $$ >>$HOME/%s' &); (setsid sh -c 'echo $$ >>$HOME/%s' &); ", word, word)
	}
	m := newManager(t, every(20*time.Millisecond), probed("parent", leave("probe")+"sleep 1000 & echo $! >>$HOME/probe"), func(c *Config) {
		p := c.Profiles["parent"]
		p.StorageBinary, p.Args = "/bin/sh", []string{"-c", leave("node") + "exec sleep 100000"}
		c.Profiles["parent"] = p
	})
	run(t, m)
	n := mustSpawn(t, m, want("node-a", as("parent")))
	for word, least := range map[string]int{"node": 2, "probe": 9} {
		await(t, "the orphans of the "+word, func() error {
			data, err := os.ReadFile(filepath.Join(n.GetStoragePath(), word))
			pids := strings.Fields(string(data))
			if len(pids) < least {
				return fmt.Errorf("there are %q (%w)", pids, err)
			}
			for _, pid := range pids[:least] {
				if _, err := os.Stat("/proc/" + pid); err == nil {
					return fmt.Errorf("process %s is there", pid)
				}
			}
			return nil
		})
	}
	if is, _ := m.Get("node-a"); is.GetPid() != n.GetPid() || is.GetHealth() != sutrav1.NodeHealth_NODE_HEALTH_READY {
		t.Errorf("the node is %v", is)
	}
}
