package registry

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

const (
	starting = sutrav1.Phase_PHASE_STARTING
	running  = sutrav1.Phase_PHASE_RUNNING
	failed   = sutrav1.Phase_PHASE_FAILED
	stopped  = sutrav1.Phase_PHASE_STOPPED
)

// grid is a registry with a clock that only the test moves.
type grid struct {
	*Registry
	t   rapid.TB
	now time.Time
	// told is what the registry gave notice of.
	told []*sutrav1.Event
}

func newGrid(t rapid.TB) *grid {
	g := &grid{t: t, now: time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)}
	g.Registry = New(health.DefaultThresholds(), func(e *sutrav1.Event) { g.told = append(g.told, e) })
	return g
}

func (g *grid) pass(d time.Duration) { g.now = g.now.Add(d) }

// register goes the whole way of a registration that is persisted at once.
func (g *grid) register(a *sutrav1.Agent, nodes ...*sutrav1.Node) *sutrav1.Agent {
	g.t.Helper()
	claim, err := g.Claim(a, g.now)
	if err != nil {
		g.t.Fatalf("claim %s: %v", a.GetAgentId(), err)
	}
	g.Register(claim, nodes, g.now)
	return claim
}

// beat takes in a heartbeat that must be accepted.
func (g *grid) beat(b *sutrav1.HeartbeatRequest) (wantFull bool) {
	g.t.Helper()
	wantFull, err := g.Beat(b, g.now)
	if err != nil {
		g.t.Fatalf("beat of %s: %v", b.GetAgentId(), err)
	}
	return wantFull
}

// reserve makes a reservation that must succeed, and ends it.
func (g *grid) reserve(rec *sutrav1.NodeRecord) {
	g.t.Helper()
	r, err := g.Reserve(rec, g.now)
	if err != nil {
		g.t.Fatalf("reserve %s: %v", rec.GetNode().GetNodeId(), err)
	}
	r.Done()
}

// end puts a node's record as ended.
func (g *grid) end(id string, phase sutrav1.Phase) *sutrav1.NodeRecord {
	g.t.Helper()
	rec := g.edit(id, func(rec *sutrav1.NodeRecord) {
		rec.Node.Phase, rec.Node.Desired = phase, sutrav1.Desired_DESIRED_STOPPED
		rec.EndedAt = timestamppb.New(g.now)
	})
	return rec
}

// edit puts a changed copy of a node's record, as everybody must who changes one.
func (g *grid) edit(id string, change func(*sutrav1.NodeRecord)) *sutrav1.NodeRecord {
	g.t.Helper()
	rec, ok := g.Record(id)
	if !ok {
		g.t.Fatalf("node %s has no record", id)
	}
	next := proto.CloneOf(rec)
	change(next)
	next.Node.Generation++
	g.Put(next)
	return next
}

// node returns a node's view, which must be there.
func (g *grid) node(id string) View {
	g.t.Helper()
	v, ok := g.Node(id, g.now)
	if !ok {
		g.t.Fatalf("node %s isn't there", id)
	}
	return v
}

// ids are those of the nodes that are there, ended ones included.
func (g *grid) ids() []string {
	var ids []string
	for _, v := range g.Nodes("", true, g.now) {
		ids = append(ids, v.Node.GetNodeId())
	}
	return ids
}

func (g *grid) state(agentID string) health.State {
	g.t.Helper()
	for _, c := range g.Candidates(g.now) {
		if c.Agent.GetAgentId() == agentID {
			return c.State
		}
	}
	g.t.Fatalf("agent %s isn't there", agentID)
	return 0
}

// touched tells whether something changed since the last call.
func (g *grid) touched() bool {
	select {
	case <-g.Changed():
		return true
	default:
		return false
	}
}

func host(id string) *sutrav1.Agent {
	return &sutrav1.Agent{
		AgentId: id, InstanceId: "home-of-" + id, Hostname: "host-of-" + id, Endpoint: id + ":8001",
		MaxNodes: 5, MemoryTotalMb: 1000, Profiles: []string{"default"},
	}
}

// another is a different agent that was given the same id.
func another(a *sutrav1.Agent) *sutrav1.Agent {
	b := proto.CloneOf(a)
	b.InstanceId, b.Endpoint = "another-home", "elsewhere:8001"
	return b
}

func wants(id, agentID string) *sutrav1.NodeRecord {
	return &sutrav1.NodeRecord{Node: &sutrav1.Node{
		NodeId: id, AgentId: agentID, Profile: "default", Desired: sutrav1.Desired_DESIRED_RUNNING, Generation: 1,
	}}
}

func says(id, agentID string, phase sutrav1.Phase, revision uint64) *sutrav1.Node {
	return &sutrav1.Node{NodeId: id, AgentId: agentID, Profile: "default", Phase: phase, Revision: revision}
}

func wantReason(t testing.TB, err error, want rpc.Reason) {
	t.Helper()
	if got := rpc.ReasonOf(err); got != want {
		t.Fatalf("got %q (%v), want %q", got, err, want)
	}
}

func wantIDs(t testing.TB, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}
