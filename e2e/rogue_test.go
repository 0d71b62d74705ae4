package e2e_test

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// floodMiB is how much a flooding node writes, in lines of floodLine bytes.
const floodMiB, floodLine = 48, 64

// misbehaviours are the rogue server's, each a profile of its own.
var misbehaviours = map[string]struct {
	words string
	// keys of the profile, beside a grace of a second.
	keys string
	// restless: it is another process every now and then.
	restless bool
	// processes that it has when it is what it is to be.
	processes int
	// shows tells whether the grid shows what it is to; nil: RUNNING and READY.
	shows func(*sutrav1.Node) bool
}{
	"well-behaved":  {processes: 1},
	"ignore-term":   {words: "ignore-term", processes: 1},
	"escape":        {words: "escape", processes: 2},
	"regroup":       {words: "regroup", processes: 2},
	"leak":          {words: "leak=96", processes: 1},
	"flood":         {words: fmt.Sprintf("flood=%d", floodMiB), processes: 1},
	"close-stdout":  {words: "close-stdout", processes: 1},
	"late":          {words: "late=1500", processes: 1},
	"delete-binary": {words: "delete-binary", processes: 1},
	"all-together":  {words: "ignore-term close-stdout late=100 delete-binary leak=8 escape", processes: 2},
	"exit": {words: "exit=200", keys: `ready = "none"`, restless: true, processes: 1, shows: func(n *sutrav1.Node) bool {
		return n.GetRestartCount() > 0 && n.GetLastExit() != nil && n.GetDesired() == sutrav1.Desired_DESIRED_RUNNING
	}},
	"hang": {words: "ignore-term hang=1", keys: `ready = "http:/"`, restless: true, processes: 1, shows: func(n *sutrav1.Node) bool {
		return n.GetHealth() == sutrav1.NodeHealth_NODE_HEALTH_NOT_READY || n.GetRestartCount() > 0
	}},
}

// rogueProfiles are the [storage] section of an agent that runs all of them.
func rogueProfiles(t *testing.T, dir string) string {
	t.Helper()
	var toml strings.Builder
	toml.WriteString("max_nodes = 100\ndefault_memory_mb = 256\n")
	for name, is := range misbehaviours {
		binary := filepath.Join(dir, "rogue-"+name) // its own: some delete it
		harness.Rogue(t, binary)
		args := append([]string{"--port", "{port}"}, strings.Fields(is.words)...)
		fmt.Fprintf(&toml, "[storage.profiles.%s]\nstorage_binary = %q\nargs = [\"%s\"]\nstop_grace_secs = 1\n%s\n", name, binary, strings.Join(args, `", "`), is.keys)
	}
	binary := filepath.Join(dir, "rogue-daemonize")
	harness.Rogue(t, binary)
	fmt.Fprintf(&toml, "[storage.profiles.daemonize]\nstorage_binary = %q\nargs = [\"--port\", \"{port}\", \"daemonize\"]\nready = \"exec:exit 1\"\n", binary)
	toml.WriteString("[monitoring]\nheartbeat_interval_secs = 1\nhealth_check_interval_secs = 1\n")
	return toml.String()
}

// Whatever a server does, the grid shows it, its agent's death changes nothing of it, and its stop leaves nothing: no process
// and no port or path that another couldn't have at once.
func TestMisbehavingServers(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("agent-001", rogueProfiles(t, g.Dir))
	rogues := map[string]*sutrav1.Node{}
	for name := range misbehaviours {
		rogues[name] = g.Spawn(&sutrav1.SpawnNodeRequest{Profile: name, StoragePath: filepath.Join(g.Dir, "places", name)})
	}
	before := asTheyAre(t, g, rogues)
	flooded(t, g, rogues["flood"])

	agent.Kill()
	restarted(t, g, "agent-001", "second")
	after := asTheyAre(t, g, rogues)
	for name, is := range misbehaviours {
		switch was, now := before[name], after[name]; {
		case is.restless:
		case !slices.Equal(was.pids, now.pids):
			t.Errorf("%s: its processes were %v and are %v", name, was.pids, now.pids)
		default:
			if err := sameRun(was.node, now.node); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	g.AwaitNode(rogues["exit"].GetNodeId(), "to be restarted by the second agent", func(n *sutrav1.Node) bool {
		return n.GetRestartCount() > after["exit"].node.GetRestartCount()
	})
	// A binary that is gone is missed when it is needed.
	deleted := after["delete-binary"].node
	killNode(t, g, deleted)
	g.AwaitNode(deleted.GetNodeId(), "to miss its binary", func(n *sutrav1.Node) bool {
		return n.GetPhase() != running && strings.Contains(n.GetLastExit().GetOutput(), "no such file")
	})

	var stops errgroup.Group
	for name, n := range rogues {
		stops.Go(func() error {
			_, err := g.Client().StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: n.GetNodeId()})
			if left := processes(g)[n.GetNodeId()]; err == nil && left > 0 {
				err = fmt.Errorf("it has stopped, and %d of its processes live", left)
			}
			if err != nil {
				return fmt.Errorf("stop of %s: %w", name, err)
			}
			_, err = g.Client().SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: "well-behaved", Port: n.GetPort(), StoragePath: n.GetStoragePath()})
			if err != nil {
				return fmt.Errorf("after the stop of %s another can't have its place: %w", name, err)
			}
			return nil
		})
	}
	if err := stops.Wait(); err != nil {
		t.Fatal(err)
	}
	if ids := awaitAgreement(t, g); len(ids) != len(rogues) {
		t.Errorf("there were %d rogues, and in their places are %v", len(rogues), ids)
	}
	stoppedForGood(t, g, g.Nodes(false))
}

// rogue is one of them as it is at a moment.
type rogue struct {
	node *sutrav1.Node
	pids []int
}

// asTheyAre waits until all rogues are what they are to be.
func asTheyAre(t *testing.T, g *harness.Grid, rogues map[string]*sutrav1.Node) map[string]rogue {
	t.Helper()
	found := map[string]rogue{}
	for name, n := range rogues {
		is := misbehaviours[name]
		shows := is.shows
		if shows == nil {
			shows = func(n *sutrav1.Node) bool {
				return n.GetPhase() == running && n.GetHealth() == sutrav1.NodeHealth_NODE_HEALTH_READY && n.GetRestartCount() == 0
			}
		}
		node := g.AwaitNode(n.GetNodeId(), "to be shown as "+name, shows)
		var pids []int
		harness.Await(t, name+" to be whole", func() error {
			all := g.NodeProcesses()
			maps.DeleteFunc(all, func(_ int, id string) bool { return id != n.GetNodeId() })
			if pids = slices.Sorted(maps.Keys(all)); len(pids) != is.processes {
				return fmt.Errorf("its processes are %v", pids)
			}
			return nil
		})
		found[name] = rogue{node, pids}
	}
	return found
}

// flooded waits for the end of the flood, and checks that what its log holds of it is consecutive.
func flooded(t *testing.T, g *harness.Grid, n *sutrav1.Node) {
	t.Helper()
	last := fmt.Sprintf("%0*d\n", floodLine-1, floodMiB<<20/floodLine-1)
	var log []byte
	harness.Await(t, "the last line of the flood", func() error {
		stream, err := g.Client().TailLogs(t.Context(), &sutrav1.TailLogsRequest{NodeId: n.GetNodeId()})
		if err != nil {
			return err
		}
		log = nil
		for {
			resp, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return err
			}
			log = append(log, resp.GetChunk().GetData()...)
		}
		if !strings.HasSuffix(string(log), last) {
			return fmt.Errorf("the log has %d bytes", len(log))
		}
		return nil
	})
	next := -1
	for line := range strings.Lines(string(log)) {
		i, err := strconv.Atoi(strings.TrimSuffix(line, "\n"))
		if err != nil || next >= 0 && i != next {
			t.Fatalf("line %q of the flood's log, want number %d", line, next)
		}
		next = i + 1
	}
}

// A server that makes itself a daemon has left its agent: the spawn fails, and nothing of it stays.
func TestDaemonIsNoNode(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", rogueProfiles(t, g.Dir))
	place, port := filepath.Join(g.Dir, "place"), uint32(g.FreePort())
	_, err := g.Client().SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: "daemonize", StoragePath: place, Port: port})
	if rpc.ReasonOf(err) != rpc.NodeDiedEarly {
		t.Fatalf("the spawn of a daemon: %v", err)
	}
	if left := g.NodeProcesses(); len(left) > 0 {
		t.Errorf("the daemon left %v", left)
	}
	if _, err := os.Stat(place); !os.IsNotExist(err) {
		t.Errorf("the daemon left its place: %v", err)
	}
	n := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "well-behaved", StoragePath: place, Port: port})
	stoppedForGood(t, g, []*sutrav1.Node{n})
}

// A server that is late is shown as starting until it listens.
func TestLateServerIsStarting(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", rogueProfiles(t, g.Dir))
	outcome := make(chan error, 1)
	go func() {
		_, err := g.Client().SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{Profile: "late"})
		outcome <- err
	}()
	harness.Await(t, "the late one to be starting", func() error {
		if all := g.Nodes(false); len(all) != 1 || all[0].GetPid() == 0 || all[0].GetPhase() != sutrav1.Phase_PHASE_STARTING {
			return fmt.Errorf("there are %v", all)
		}
		return nil
	})
	if err := <-outcome; err != nil {
		t.Fatal(err)
	}
	if all := g.Nodes(false); len(all) != 1 || all[0].GetPhase() != running {
		t.Errorf("then there are %v", all)
	}
}
