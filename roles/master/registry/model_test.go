package registry

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// model is what a registry ought to hold, in the plainest form, beside the registry.
type model struct {
	*grid
	hosts map[string]*modelHost
	// records and tombs are what was persisted, by node_id.
	records, tombs map[string]*sutrav1.NodeRecord
	// seen is what the master was last told of each node.
	seen map[string]*sutrav1.Node
	// answered are those of seen that were told of in an answer, since the last inventory.
	answered map[string]bool
	open     map[string]func()        // reservations that have no outcome yet
	over     map[string]bool          // nodes that ended at some time, forgotten ones included
	phases   map[string]sutrav1.Phase // that were last told of
	made     int
	// kept are messages that went in or came out, each beside a copy of what it was then.
	kept []keptMessage
}

type keptMessage struct{ message, copied proto.Message }

// modelHost is an agent that runs nodes.
type modelHost struct {
	runs                      map[string]*sutrav1.Node
	epoch, sequence, revision uint64
	silentSince               time.Time
	changed                   map[string]bool // since the last beat
	// left: it took its leave and hasn't started since; forgotten: it had no node then.
	left, forgotten bool
	// doubt: its registration left one, so that a full beat is waited for.
	doubt bool
}

func newModel(t *rapid.T) *model {
	return &model{
		grid:    newGrid(t),
		hosts:   map[string]*modelHost{"a": {runs: map[string]*sutrav1.Node{}}, "b": {runs: map[string]*sutrav1.Node{}}},
		records: map[string]*sutrav1.NodeRecord{}, tombs: map[string]*sutrav1.NodeRecord{},
		seen: map[string]*sutrav1.Node{}, answered: map[string]bool{}, open: map[string]func(){}, over: map[string]bool{},
		phases: map[string]sutrav1.Phase{},
	}
}

func (m *model) keep(messages ...proto.Message) {
	for _, k := range messages {
		m.kept = append(m.kept, keptMessage{k, proto.Clone(k)})
	}
}

func (m *model) host(t *rapid.T) (string, *modelHost) {
	id := rapid.SampledFrom([]string{"a", "b"}).Draw(t, "agent")
	return id, m.hosts[id]
}

// some draws one of the ids; the step is skipped where there is none.
func some[V any](t *rapid.T, of map[string]V) string {
	if len(of) == 0 {
		t.Skip("there is none")
	}
	return rapid.SampledFrom(sorted(of)).Draw(t, "node")
}

// live are the nodes that hold a slot, as they hold it.
func (m *model) live(agentID string) map[string]*sutrav1.Node {
	held := map[string]*sutrav1.Node{}
	for id, rec := range m.records {
		if !rec.GetNode().Ended() && rec.GetNode().GetAgentId() == agentID {
			held[id] = rec.GetNode()
		}
	}
	for id, n := range m.seen {
		if rec := m.records[id]; n.GetAgentId() == agentID && (rec == nil || !rec.GetNode().Ended()) {
			held[id] = n
		}
	}
	return held
}

func (m *model) list(h *modelHost) []*sutrav1.Node {
	var all []*sutrav1.Node
	for _, id := range sorted(h.runs) {
		all = append(all, h.runs[id])
		m.keep(h.runs[id])
	}
	return all
}

// say makes an agent's next statement about a node.
func (m *model) say(h *modelHost, n *sutrav1.Node, phase sutrav1.Phase) {
	h.revision++
	n = proto.CloneOf(n)
	n.Phase, n.Revision = phase, h.revision
	h.runs[n.GetNodeId()], h.changed[n.GetNodeId()] = n, true
}

// inventory takes in all that an agent runs. What it told of in an answer, and doesn't list, is in doubt until the next one.
func (m *model) inventory(agentID string, h *modelHost) (doubt bool) {
	for id, n := range m.seen {
		switch {
		case n.GetAgentId() != agentID:
			continue
		case m.answered[id] && h.runs[id] == nil:
			doubt = true
		default:
			delete(m.seen, id)
		}
		delete(m.answered, id)
	}
	for id, n := range h.runs {
		m.seen[id] = n
	}
	h.changed, h.silentSince = map[string]bool{}, m.now
	return doubt
}

// Register: the agent starts, and counts its revisions anew.
func (m *model) Register(t *rapid.T) {
	id, h := m.host(t)
	h.epoch, h.sequence, h.revision, h.changed = h.epoch+1, 0, 0, map[string]bool{}
	h.left, h.forgotten = false, false
	for _, n := range sorted(h.runs) {
		m.say(h, h.runs[n], running)
	}
	a := host(id)
	a.MaxNodes = 3
	m.keep(a)
	claim := m.register(a, m.list(h)...)
	m.keep(claim)
	if claim.GetEpoch() != h.epoch {
		t.Fatalf("%s got epoch %d at its start number %d", id, claim.GetEpoch(), h.epoch)
	}
	h.doubt = m.inventory(id, h)
}

func (m *model) Beat(t *rapid.T) {
	id, h := m.host(t)
	if h.epoch == 0 || h.forgotten {
		_, err := m.grid.Beat(&sutrav1.HeartbeatRequest{AgentId: id, Epoch: h.epoch, Sequence: h.sequence + 1}, m.now)
		if rpc.ReasonOf(err) != rpc.AgentNotRegistered {
			t.Fatalf("an agent that isn't registered beats: %v", err)
		}
		return
	}
	if h.left {
		t.Skip("it has left")
	}
	late := rapid.Bool().Draw(t, "late")
	if !late {
		h.sequence++
	}
	b := &sutrav1.HeartbeatRequest{AgentId: id, Epoch: h.epoch, Sequence: h.sequence, Full: rapid.Bool().Draw(t, "full")}
	if b.GetFull() {
		b.Changed = m.list(h)
	} else {
		for _, n := range sorted(h.changed) {
			if h.runs[n] == nil {
				b.Gone = append(b.Gone, n)
			} else {
				b.Changed = append(b.Changed, h.runs[n])
			}
		}
	}
	m.keep(b)
	wantFull, doubt := m.beat(b), false
	switch {
	case late:
	case b.GetFull():
		doubt = m.inventory(id, h)
		h.doubt = false
	case h.doubt:
		doubt, h.silentSince = true, m.now
	default:
		for n := range h.changed {
			if delete(m.seen, n); h.runs[n] == nil {
				delete(m.answered, n)
			}
			if h.runs[n] != nil {
				m.seen[n] = h.runs[n]
			}
		}
		h.changed, h.silentSince = map[string]bool{}, m.now
	}
	if wantFull != doubt {
		t.Fatalf("%s is asked for another inventory: %v, want %v", id, wantFull, doubt)
	}
}

// Leave: the agent stops in good order, and is forgotten where it has no node.
func (m *model) Leave(t *rapid.T) {
	id, h := m.host(t)
	if h.epoch == 0 || h.left {
		t.Skip("it isn't there")
	}
	m.Unregister(id, h.epoch)
	h.left = true
	needed := len(m.live(id)) > 0
	for _, n := range m.seen {
		needed = needed || n.GetAgentId() == id
	}
	for node := range m.open {
		needed = needed || m.records[node].GetNode().GetAgentId() == id
	}
	for _, a := range m.Idle(0, m.now) {
		if a.GetAgentId() == id {
			m.Forget(a, m.now)
			h.forgotten = true
		}
	}
	if h.forgotten == needed {
		t.Fatalf("%s is forgotten: %v, and its nodes are %v, %v", id, h.forgotten, m.live(id), m.seen)
	}
}

// Reserve expects the very outcome that the model's plain rules give.
func (m *model) Reserve(t *rapid.T) {
	agentID, h := m.host(t)
	m.made++
	rec := wish(fmt.Sprintf("n%03d", m.made), agentID,
		rapid.Uint32Range(0, 4).Draw(t, "port"), rapid.SampledFrom([]string{"", "/x", "/x/y", "/z"}).Draw(t, "path"),
		rapid.SampledFrom([]uint32{0, 400}).Draw(t, "memory"))
	rec.RequestId = rapid.SampledFrom([]string{"", "r1", "r2", "r3"}).Draw(t, "request")
	m.keep(rec)
	r, err := m.grid.Reserve(rec, m.now)

	if known := m.requested(rec.GetRequestId()); known != nil {
		if err != nil || !r.Existing || !proto.Equal(r.Record, known) {
			t.Fatalf("request %s led to %+v (%v), want %v", rec.GetRequestId(), r, err, known)
		}
		id := known.GetNode().GetNodeId()
		if open := m.open[id] != nil && m.records[id] != nil; open != (r.Spawning != nil) {
			t.Fatalf("request %s has an outcome to wait for: %v", rec.GetRequestId(), r.Spawning != nil)
		}
		return
	}
	held := m.live(agentID)
	memory := rec.GetNode().GetMemoryLimitMb()
	clash := false
	for _, n := range held {
		memory += n.GetMemoryLimitMb()
		paths := []string{n.GetStoragePath(), rec.GetNode().GetStoragePath()}
		slices.Sort(paths)
		clash = clash || n.GetPort() != 0 && n.GetPort() == rec.GetNode().GetPort() ||
			paths[0] != "" && (paths[0] == paths[1] || paths[0] == "/x" && paths[1] == "/x/y")
	}
	free := h.epoch > 0 && !h.left && m.now.Sub(h.silentSince) < 30*time.Second && !clash && len(held) < 3 && memory <= 1000
	if free != (err == nil) {
		t.Fatalf("reserve %v beside %v: %v", rec, held, err)
	}
	if err == nil {
		m.records[rec.GetNode().GetNodeId()] = rec
		m.open[rec.GetNode().GetNodeId()] = r.Done
	}
}

func (m *model) requested(id string) *sutrav1.NodeRecord {
	for _, recs := range []map[string]*sutrav1.NodeRecord{m.records, m.tombs} {
		for _, rec := range recs {
			if id != "" && rec.GetRequestId() == id {
				return rec
			}
		}
	}
	return nil
}

// Answer: an agent runs a node that is wanted of it, and the master hears of it at once.
func (m *model) Answer(t *rapid.T) {
	id := some(t, m.records)
	want := m.records[id].GetNode()
	h := m.hosts[want.GetAgentId()]
	if want.Ended() || want.GetDesired() != sutrav1.Desired_DESIRED_RUNNING || h.runs[id] != nil || h.left {
		t.Skip("it isn't to be started")
	}
	n := proto.CloneOf(want)
	for port := uint32(1); n.GetPort() == 0; port++ {
		taken := false
		for _, other := range m.live(want.GetAgentId()) {
			taken = taken || other.GetPort() == port
		}
		for _, other := range h.runs {
			taken = taken || other.GetPort() == port
		}
		if !taken {
			n.Port = port
		}
	}
	m.say(h, n, running)
	m.keep(h.runs[id])
	m.Observe(h.runs[id], m.now)
	m.answered[id] = true
	m.seen[id] = h.runs[id]
	m.change(id, func(rec *sutrav1.NodeRecord) { rec.Confirmed, rec.Node.Port = true, n.GetPort() })
}

func (m *model) change(id string, edit func(*sutrav1.NodeRecord)) {
	m.records[id] = m.edit(id, edit)
	m.keep(m.records[id])
}

// Lose: a node ends at its agent, which says so with its next beat.
func (m *model) Lose(t *rapid.T) {
	_, h := m.host(t)
	id := some(t, h.runs)
	delete(h.runs, id)
	h.changed[id] = true
}

func (m *model) Crash(t *rapid.T) {
	_, h := m.host(t)
	m.say(h, h.runs[some(t, h.runs)], failed)
}

func (m *model) Stop(t *rapid.T) {
	id := some(t, m.records)
	if m.records[id].GetNode().Ended() {
		t.Skip("it has ended")
	}
	m.change(id, func(rec *sutrav1.NodeRecord) { rec.Node.Desired = sutrav1.Desired_DESIRED_STOPPED })
}

// End: the agent confirms that a node is gone, and that is written down.
func (m *model) End(t *rapid.T) {
	id := some(t, m.records)
	if m.records[id].GetNode().Ended() {
		t.Skip("it has ended")
	}
	h := m.hosts[m.records[id].GetNode().GetAgentId()]
	delete(h.runs, id)
	m.Gone(id)
	delete(m.seen, id)
	delete(m.answered, id)
	m.over[id] = true
	m.records[id] = m.end(id, rapid.SampledFrom([]sutrav1.Phase{stopped, failed}).Draw(t, "phase"))
	m.keep(m.records[id])
}

// Ghost: what an agent said before a node's end arrives after it.
func (m *model) Ghost(t *rapid.T) {
	id := some(t, m.records)
	rec := m.records[id]
	if !rec.GetNode().Ended() || m.seen[id] != nil || m.hosts[rec.GetNode().GetAgentId()].forgotten {
		t.Skip("it hasn't ended, or was heard of, or nobody is there to speak")
	}
	n := says(id, rec.GetNode().GetAgentId(), running, 0)
	n.Port = rec.GetNode().GetPort()
	m.Observe(n, m.now)
	m.seen[id], m.answered[id] = n, true
	m.keep(n)
}

// Undo: a spawn without effect leaves no trace.
func (m *model) Undo(t *rapid.T) {
	id := some(t, m.open)
	if m.records[id] == nil || m.records[id].GetConfirmed() || m.seen[id] != nil {
		t.Skip("it had an effect")
	}
	m.Drop(id)
	delete(m.records, id)
}

func (m *model) Done(t *rapid.T) {
	id := some(t, m.open)
	m.open[id]()
	delete(m.open, id)
}

func (m *model) Remove(t *rapid.T) {
	id := some(t, m.records)
	if !m.records[id].GetNode().Ended() {
		t.Skip("it hasn't ended")
	}
	m.Bury(m.records[id])
	m.tombs[id] = m.records[id]
	delete(m.records, id)
}

func (m *model) Prune(t *rapid.T) {
	ended := m.now.Add(-rapid.SampledFrom([]time.Duration{0, 10 * time.Second}).Draw(t, "age of nodes"))
	tombs := m.now.Add(-rapid.SampledFrom([]time.Duration{0, 20 * time.Second}).Draw(t, "age of tombstones"))
	m.grid.Prune(ended, tombs)
	for id, rec := range m.tombs {
		if rec.GetEndedAt().AsTime().Before(tombs) {
			delete(m.tombs, id)
		}
	}
	for id, rec := range m.records {
		if rec.GetNode().Ended() && m.open[id] == nil && rec.GetEndedAt().AsTime().Before(ended) {
			m.tombs[id] = rec
			delete(m.records, id)
		}
	}
}

func (m *model) Trouble(t *rapid.T) {
	m.grid.Trouble(some(t, m.records), errors.New("no route"), m.now)
}

func (m *model) Pass(t *rapid.T) {
	m.pass(time.Duration(rapid.IntRange(1, 20).Draw(t, "seconds")) * time.Second)
}

// checkNotices follows what was told of the nodes: each change goes on from the last one, and the last one is what is so.
func (m *model) checkNotices(t *rapid.T, ids map[string]bool) {
	for _, e := range m.told {
		n := e.GetNode()
		if n == nil {
			continue
		}
		before := &sutrav1.Node{Phase: m.phases[n.GetNodeId()]}
		anew := n.GetFrom() == sutrav1.Phase_PHASE_UNSPECIFIED && before.Ended()
		if n.GetFrom() != before.GetPhase() && !anew || n.GetFrom() == n.GetTo() {
			t.Fatalf("told of %v, and before of %v", n, before.GetPhase())
		}
		m.phases[n.GetNodeId()] = n.GetTo()
	}
	m.told = nil
	for id := range ids {
		is := m.seen[id]
		if m.records[id].GetNode().Ended() {
			is = m.records[id].GetNode()
		}
		if is != nil && m.phases[id] != is.GetPhase() {
			t.Fatalf("%s is %v, and told of was %v", id, is.GetPhase(), m.phases[id])
		}
	}
	for id, phase := range m.phases {
		if gone := (&sutrav1.Node{Phase: phase}); !ids[id] && !gone.Ended() {
			t.Fatalf("%s isn't there any more, and told of was %v", id, phase)
		}
	}
}

// Check compares the whole registry with the model.
func (m *model) Check(t *rapid.T) {
	ids := map[string]bool{}
	for id := range m.records {
		ids[id] = true
	}
	for id := range m.seen {
		ids[id] = true
	}
	views := m.Nodes("", true, m.now)
	if got := m.ids(); !slices.Equal(got, sorted(ids)) {
		t.Fatalf("there are %q, want %q", got, sorted(ids))
	}
	for _, v := range views {
		m.keep(v.Node)
	}
	m.checkNotices(t, ids)
	for _, s := range m.States(m.now) {
		if !proto.Equal(s.Record, m.records[s.ID]) || !proto.Equal(s.Seen, m.seen[s.ID]) {
			t.Fatalf("%s is %v and %v, want %v and %v", s.ID, s.Record, s.Seen, m.records[s.ID], m.seen[s.ID])
		}
		if open := m.open[s.ID] != nil; s.Busy != open || s.Removed != (m.tombs[s.ID] != nil) {
			t.Fatalf("%s is busy: %v, removed: %v", s.ID, s.Busy, s.Removed)
		}
	}

	total := 0
	for _, a := range m.Agents(m.now) {
		m.keep(a)
		held := m.live(a.GetAgentId())
		total += len(held)
		if int(a.GetNodeCount()) != len(held) {
			t.Fatalf("%s counts %d nodes, want %d", a.GetAgentId(), a.GetNodeCount(), len(held))
		}
	}
	if live := len(m.Nodes("", false, m.now)); live != total {
		t.Fatalf("%d live nodes, and the agents count %d", live, total)
	}
	for _, c := range m.Candidates(m.now) {
		m.keep(c.Agent)
		ports, once := map[uint32]string{}, map[string]bool{}
		for _, n := range c.Slots {
			m.keep(n)
			id := n.GetNodeId()
			if rec := m.records[id]; once[id] || rec.GetNode().Ended() {
				t.Fatalf("%s holds a slot twice, or has ended: %v", id, rec)
			}
			once[id] = true
			if m.over[id] {
				continue // an agent's late word about what is over
			}
			if other, taken := ports[n.GetPort()]; taken && n.GetPort() != 0 {
				t.Fatalf("%s and %s share port %d of %s", other, id, n.GetPort(), c.Agent.GetAgentId())
			}
			ports[n.GetPort()] = id
		}
	}

	wanted := map[string]string{}
	for _, recs := range []map[string]*sutrav1.NodeRecord{m.tombs, m.records} {
		for id, rec := range recs {
			if rec.GetRequestId() != "" {
				wanted[rec.GetRequestId()] = id
			}
		}
	}
	if len(m.requests) != len(wanted) || len(m.Registry.tombs) != len(m.tombs) {
		t.Fatalf("requests %v and %d tombstones, want %v and %d", m.requests, len(m.Registry.tombs), wanted, len(m.tombs))
	}
	for request, id := range wanted {
		if m.requests[request] != id {
			t.Fatalf("request %s leads to %q, want %q", request, m.requests[request], id)
		}
	}
}

func TestRegistryFollowsTheModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := newModel(t)
		t.Repeat(map[string]func(*rapid.T){
			"": m.Check, "register": m.Register, "leave": m.Leave, "beat": m.Beat, "reserve": m.Reserve, "reserve more": m.Reserve,
			"answer": m.Answer, "lose": m.Lose, "crash": m.Crash, "stop": m.Stop, "end": m.End, "ghost": m.Ghost,
			"undo": m.Undo, "done": m.Done, "remove": m.Remove, "prune": m.Prune, "trouble": m.Trouble, "pass": m.Pass,
		})
		for _, k := range m.kept {
			if !proto.Equal(k.message, k.copied) {
				t.Fatalf("a message was changed after it went in or out: it was %v and is %v", k.copied, k.message)
			}
		}
	})
}
