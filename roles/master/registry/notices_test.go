package registry

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// news is what the registry gave notice of since the last call, a line each.
func (g *grid) news() []string {
	var lines []string
	for _, e := range g.told {
		switch about := e.GetAbout().(type) {
		case *sutrav1.Event_Agent:
			lines = append(lines, fmt.Sprintf("agent %s %s>%s %s", about.Agent.GetAgentId(), about.Agent.GetFrom().Word(), about.Agent.GetTo().Word(), about.Agent.GetWhy()))
		case *sutrav1.Event_Node:
			n := about.Node
			lines = append(lines, strings.TrimSpace(fmt.Sprintf("node %s on %s %s>%s pid %d restarts %d %s",
				n.GetNodeId(), n.GetAgentId(), n.GetFrom().Word(), n.GetTo().Word(), n.GetPid(), n.GetRestartCount(), n.GetReason())))
		}
	}
	g.told = nil
	return lines
}

func wantNews(t *testing.T, g *grid, what string, want ...string) {
	t.Helper()
	if got := g.news(); !slices.Equal(got, want) {
		t.Errorf("%s: told of\n%s\nwant\n%s", what, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// process is what an agent says of a node that has one.
func process(id, agentID string, phase sutrav1.Phase, revision uint64, pid int32, restarts uint32) *sutrav1.Node {
	n := says(id, agentID, phase, revision)
	n.Pid, n.RestartCount = pid, restarts
	return n
}

func TestNoticesOfANode(t *testing.T) {
	g := newGrid(t)
	epoch, sequence := g.register(host("a")).GetEpoch(), uint64(0)
	g.Transitions(g.now)
	wantNews(t, g, "an agent", "agent a UNKNOWN>HEALTHY it is heard of")
	beat := func(changed ...*sutrav1.Node) {
		t.Helper()
		sequence++
		g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: epoch, Sequence: sequence, Changed: changed})
	}

	g.reserve(wants("n1", "a"))
	beat(process("n1", "a", starting, 1, 7, 0))
	g.Observe(process("n1", "a", running, 2, 7, 0), g.now)
	beat(process("n1", "a", running, 2, 7, 0))
	g.edit("n1", func(rec *sutrav1.NodeRecord) { rec.Confirmed = true })
	beat()
	wantNews(t, g, "a spawn", "node n1 on a UNSPECIFIED>STARTING pid 7 restarts 0", "node n1 on a STARTING>RUNNING pid 7 restarts 0")

	crashed := process("n1", "a", starting, 3, 0, 0)
	crashed.Reason = "is started again"
	beat(crashed)
	beat(process("n1", "a", running, 4, 8, 1))
	beat(process("n1", "a", running, 3, 0, 0)) // overtaken
	beat(process("n1", "a", running, 6, 9, 2)) // that it crashed in between wasn't told
	again := process("n1", "a", running, 7, 9, 2)
	again.Health, again.Reason = sutrav1.NodeHealth_NODE_HEALTH_NOT_READY, "slow"
	beat(again)
	wantNews(
		t, g, "crashes", "node n1 on a RUNNING>STARTING pid 0 restarts 0 is started again", "node n1 on a STARTING>RUNNING pid 8 restarts 1",
		"node n1 on a RUNNING>RUNNING pid 9 restarts 2",
	)

	g.Gone("n1")
	wantNews(t, g, "no word of it")
	rec := g.edit("n1", func(rec *sutrav1.NodeRecord) {
		rec.Node.Phase, rec.Node.LastExit, rec.Node.RestartCount = stopped, &sutrav1.Exit{Signal: "SIGTERM"}, 2
	})
	wantNews(t, g, "a stop", "node n1 on a RUNNING>STOPPED pid 0 restarts 2 killed by SIGTERM")
	g.Observe(process("n1", "a", running, 9, 9, 2), g.now)
	g.Gone("n1")
	g.Bury(rec)
	wantNews(t, g, "a late word")

	g.reserve(wants("n2", "a"))
	beat(process("n2", "a", starting, 1, 7, 0))
	g.Drop("n2")
	g.reserve(wants("n3", "a"))
	g.Drop("n3") // nobody ever saw it
	wantNews(t, g, "failed spawns", "node n2 on a UNSPECIFIED>STARTING pid 7 restarts 0",
		"node n2 on a STARTING>FAILED pid 0 restarts 0 its spawn had no success, and was undone")

	beat(process("n4", "a", running, 1, 7, 0))
	g.Bury(&sutrav1.NodeRecord{Node: says("n4", "a", running, 1)})
	g.Gone("n4")
	wantNews(t, g, "one that nobody wants", "node n4 on a UNSPECIFIED>RUNNING pid 7 restarts 0",
		"node n4 on a RUNNING>STOPPED pid 0 restarts 0 its agent doesn't run it any more")
}

func TestNoticesOfAnAgent(t *testing.T) {
	g := newGrid(t)
	epoch := g.register(host("a"), says("n1", "a", running, 1)).GetEpoch()
	g.Transitions(g.now)
	g.news()
	for range 40 {
		g.pass(time.Second)
		g.Transitions(g.now)
	}
	g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: epoch, Sequence: 1})
	g.Transitions(g.now)
	g.Unregister("a", epoch)
	g.Unregister("a", epoch)
	g.Transitions(g.now)
	g.register(host("a"), says("n1", "a", running, 1))
	g.Transitions(g.now)
	g.Leave("a")
	g.Transitions(g.now)
	wantNews(
		t, g, "an agent that comes and goes", "agent a HEALTHY>DEGRADED last heard of 15s ago", "agent a DEGRADED>OFFLINE last heard of 30s ago",
		"agent a OFFLINE>HEALTHY it is heard of", "agent a HEALTHY>OFFLINE it took its leave", "agent a OFFLINE>HEALTHY it is heard of",
		"agent a HEALTHY>OFFLINE it is kept out of the grid",
	)
}

// What was so before a master's start is no news to it; what is another way then is.
func TestNoticesAfterAStart(t *testing.T) {
	g := newGrid(t)
	record := func(id string, confirmed bool) *sutrav1.NodeRecord {
		rec := wants(id, "a")
		rec.Confirmed = confirmed
		return rec
	}
	ended := record("n3", true)
	ended.Node.Phase = stopped
	g.Load([]*sutrav1.Agent{host("a")}, []*sutrav1.NodeRecord{record("n1", true), record("n2", true), ended, record("n4", false)}, nil, g.now)
	wantNews(t, g, "a start")
	g.register(host("a"), process("n1", "a", running, 1, 7, 3), process("n2", "a", sutrav1.Phase_PHASE_CRASH_LOOP, 1, 0, 9), process("n4", "a", running, 1, 8, 0))
	wantNews(t, g, "an agent's word", "node n2 on a RUNNING>CRASH_LOOP pid 0 restarts 9", "node n4 on a UNSPECIFIED>RUNNING pid 8 restarts 0")
	g.Observe(process("n1", "a", running, 2, 17, 4), g.now)
	wantNews(t, g, "a new process", "node n1 on a RUNNING>RUNNING pid 17 restarts 4")
}

// What an agent says is kept for others to read only as far as a record of calls would have it.
func TestNoticesAreBounded(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"))
	n := says("n", "a", failed, 1)
	n.Reason = strings.Repeat("ü", (maxStatement-100)/2) // what is longer isn't taken in
	g.Observe(n, g.now)
	if size := proto.Size(g.told[0]); size > 10_000 || !utf8.ValidString(g.told[0].GetNode().GetReason()) {
		t.Errorf("a notice has %d bytes", size)
	}
}

// All agents beat all the time, and mostly nothing has changed.
func TestBeatsWithoutNewsAllocateNothing(t *testing.T) {
	g := newGrid(t)
	nodes := []*sutrav1.Node{process("n1", "a", running, 1, 7, 0), process("n2", "a", running, 1, 8, 0)}
	b := &sutrav1.HeartbeatRequest{AgentId: "a", Epoch: g.register(host("a"), nodes...).GetEpoch()}
	g.news()
	for what, changed := range map[string][]*sutrav1.Node{"no nodes": nil, "nodes as they were": nodes} {
		b.Changed = changed
		if n := testing.AllocsPerRun(100, func() {
			b.Sequence++
			g.beat(b)
		}); n > 0 {
			t.Errorf("a beat with %s makes %v allocations", what, n)
		}
	}
	wantNews(t, g, "beats without news")
}
