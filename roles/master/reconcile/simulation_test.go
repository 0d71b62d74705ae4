package reconcile

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"pgregory.net/rapid"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/registry"
)

// world is a grid without processes: the real registry and Plan, a store and agents that are maps, and
// calls that get lost on their way there or back.
type world struct {
	t        *rapid.T
	now      time.Time
	registry *registry.Registry
	agents   map[string]*sutrav1.Agent      // on the master's disk
	records  map[string]*sutrav1.NodeRecord // on the master's disk
	tombs    map[string]*sutrav1.NodeRecord // on the master's disk
	hosts    map[string]*simHost
	// finished are the nodes that ran to their end and whose agents hold on to that until they are told not to, and the
	// phase that each is to end in.
	finished map[string]sutrav1.Phase
	made     int
	// lossy: calls may be lost.
	lossy bool
}

// simHost is an agent and what it runs.
type simHost struct {
	away            bool
	epoch, sequence uint64
	revision        uint64
	runs            map[string]*sutrav1.Node
	news            map[string]bool // ids that the master hasn't been told of since they changed
}

func newWorld(t *rapid.T) *world {
	w := &world{
		t: t, now: noon(), lossy: true, agents: map[string]*sutrav1.Agent{}, records: map[string]*sutrav1.NodeRecord{}, tombs: map[string]*sutrav1.NodeRecord{},
		registry: registry.New(health.DefaultThresholds(), nil), hosts: map[string]*simHost{}, finished: map[string]sutrav1.Phase{},
	}
	for _, id := range []string{"a", "b"} {
		w.hosts[id] = &simHost{runs: map[string]*sutrav1.Node{}}
		w.register(id)
	}
	return w
}

func (w *world) register(id string) {
	h := w.hosts[id]
	claim, err := w.registry.Claim(&sutrav1.Agent{AgentId: id, InstanceId: "home-of-" + id, MaxNodes: 1000}, w.now)
	if err != nil {
		w.t.Fatalf("%s isn't let in: %v", id, err)
	}
	w.agents[id] = claim
	w.registry.Register(claim, slices.Collect(maps.Values(h.runs)), w.now)
	h.epoch, h.sequence, h.news = claim.GetEpoch(), 0, map[string]bool{}
}

func (w *world) save(rec *sutrav1.NodeRecord) {
	w.records[rec.GetNode().GetNodeId()] = rec
	w.registry.Put(rec)
}

func (w *world) edit(id string, change func(*sutrav1.NodeRecord)) {
	next := proto.CloneOf(w.records[id])
	change(next)
	w.save(next)
}

func (w *world) end(id string, phase sutrav1.Phase) {
	w.edit(id, func(rec *sutrav1.NodeRecord) {
		rec.Node.Phase, rec.Node.Desired = phase, sutrav1.Desired_DESIRED_STOPPED
		rec.Node.Generation++
		rec.EndedAt = timestamppb.New(w.now)
	})
}

var (
	errLost    = errors.New("the call was lost")
	errRefused = errors.New("the node died before it was ready")
)

// call has an agent do something. The call, or the answer to it, may be lost.
func (w *world) call(agentID string, do func(h *simHost)) error {
	h := w.hosts[agentID]
	lost := 0
	if w.lossy {
		lost = rapid.IntRange(0, 4).Draw(w.t, "lost")
	}
	if h.away || lost == 1 {
		return errLost
	}
	do(h)
	if lost == 2 {
		return errLost
	}
	return nil
}

// say notes a change of what an agent runs.
func (h *simHost) say(n *sutrav1.Node, phase sutrav1.Phase) {
	h.revision++
	n = proto.CloneOf(n)
	n.Phase, n.Revision = phase, h.revision
	h.runs[n.GetNodeId()], h.news[n.GetNodeId()] = n, true
}

// live are the nodes that something may yet happen to.
func (h *simHost) live() map[string]*sutrav1.Node {
	live := maps.Clone(h.runs)
	maps.DeleteFunc(live, func(_ string, n *sutrav1.Node) bool { return n.GetCompleted() })
	return live
}

func (h *simHost) forget(id string) {
	delete(h.runs, id)
	h.news[id] = true
}

// spawn does what a master does with a recorded node, in small. The agent knows a node by its id.
func (w *world) spawn(id string) error {
	want := w.records[id].GetNode()
	var answer *sutrav1.Node
	err := w.call(want.GetAgentId(), func(h *simHost) {
		switch n := h.runs[id]; {
		case n == nil && (!w.lossy || rapid.IntRange(0, 5).Draw(w.t, "dies early") > 0):
			h.say(want, running)
			answer = h.runs[id]
		case n == nil, n.GetPhase() == failed && !n.GetCompleted():
			h.forget(id)
		default:
			answer = n
		}
	})
	switch {
	case err != nil:
		return err
	case answer == nil && w.records[id].GetConfirmed():
		return errRefused
	case answer == nil:
		w.end(id, failed)
		return nil
	}
	w.registry.Observe(answer, w.now)
	w.edit(id, func(rec *sutrav1.NodeRecord) { rec.Confirmed = true })
	return nil
}

func (w *world) stop(id, agentID string) error {
	if err := w.call(agentID, func(h *simHost) { h.forget(id) }); err != nil {
		return err
	}
	w.registry.Gone(id)
	if rec := w.records[id]; rec != nil && !rec.GetNode().Ended() {
		w.end(id, stopped)
	}
	return nil
}

// Act is the Actor of this world.
func (w *world) Act(_ context.Context, a Action) error {
	if rec := w.records[a.NodeID]; rec != nil && rec.GetNode().GetAgentId() != a.AgentID {
		w.t.Fatalf("%v, and the node belongs to %s", a, rec.GetNode().GetAgentId())
	}
	switch a.Kind {
	case Spawn:
		return w.spawn(a.NodeID)
	case Stop:
		return w.stop(a.NodeID, a.AgentID)
	case Confirm:
		w.edit(a.NodeID, func(rec *sutrav1.NodeRecord) { rec.Confirmed = true })
	case Adopt:
		view, _ := w.registry.Node(a.NodeID, w.now)
		w.save(&sutrav1.NodeRecord{Confirmed: true, Node: &sutrav1.Node{
			NodeId: a.NodeID, AgentId: a.AgentID, Desired: sutrav1.Desired_DESIRED_RUNNING, Generation: view.Node.GetGeneration(),
		}})
	case Bury:
		phase := stopped
		if view, _ := w.registry.Node(a.NodeID, w.now); view.Node.GetCompleted() {
			phase = view.Node.GetPhase()
		}
		w.end(a.NodeID, phase)
	}
	return nil
}

// reconcile does what the driver does at one look, and returns what was due.
func (w *world) reconcile() []Action {
	due := Plan(w.registry.States(w.now), w.now)
	for _, a := range due {
		end, ok := w.registry.BeginIdle(a.NodeID)
		if !ok {
			continue
		}
		w.registry.Trouble(a.NodeID, w.Act(w.t.Context(), a), w.now)
		end()
	}
	return due
}

// beat tells the master what is new at an agent, and all where it asks.
func (w *world) beat(id string) {
	h := w.hosts[id]
	if h.away {
		return
	}
	for full := false; ; {
		h.sequence++
		b := &sutrav1.HeartbeatRequest{AgentId: id, Epoch: h.epoch, Sequence: h.sequence, Full: full}
		for _, n := range slices.Sorted(maps.Keys(h.runs)) {
			if full || h.news[n] {
				b.Changed = append(b.Changed, h.runs[n])
			}
		}
		for n := range h.news {
			if h.runs[n] == nil {
				b.Gone = append(b.Gone, n)
			}
		}
		want, err := w.registry.Beat(b, w.now)
		if err != nil { // the master lost its disk
			w.register(id)
			return
		}
		if !want {
			h.news = map[string]bool{}
			return
		}
		full = true
	}
}

func some[V any](t *rapid.T, of map[string]V) string {
	if len(of) == 0 {
		t.Skip("there is none")
	}
	return rapid.SampledFrom(slices.Sorted(maps.Keys(of))).Draw(t, "which")
}

// steps are what happens to a grid.
func (w *world) steps() map[string]func(*rapid.T) {
	host := func(t *rapid.T) (string, *simHost) {
		id := some(t, w.hosts)
		return id, w.hosts[id]
	}
	return map[string]func(*rapid.T){
		"": w.check,
		"spawn": func(t *rapid.T) {
			id, _ := host(t)
			w.made++
			rec := &sutrav1.NodeRecord{Node: &sutrav1.Node{
				NodeId: fmt.Sprintf("n%03d", w.made), AgentId: id, Desired: sutrav1.Desired_DESIRED_RUNNING, Generation: 1,
			}}
			r, err := w.registry.Reserve(rec, w.now)
			if err != nil {
				t.Skip(err)
			}
			w.save(rec)
			_ = w.spawn(rec.GetNode().GetNodeId())
			r.Done()
		},
		"stop": func(t *rapid.T) {
			id := some(t, w.records)
			if w.records[id].GetNode().GetDesired() == sutrav1.Desired_DESIRED_STOPPED {
				t.Skip("it is stopped")
			}
			w.edit(id, func(rec *sutrav1.NodeRecord) {
				rec.Node.Desired = sutrav1.Desired_DESIRED_STOPPED
				rec.Node.Generation++
			})
			delete(w.finished, id) // that it was stopped is as true
			_ = w.stop(id, w.records[id].GetNode().GetAgentId())
		},
		"remove": func(t *rapid.T) {
			id := some(t, w.records)
			if !w.records[id].GetNode().Ended() {
				t.Skip("it hasn't ended")
			}
			w.tombs[id] = w.records[id]
			delete(w.records, id)
			w.registry.Bury(w.tombs[id])
		},
		"node is back": func(t *rapid.T) { // its agent's host was set back to an older state
			over := maps.Clone(w.tombs)
			for id, rec := range w.records {
				if rec.GetNode().Ended() {
					over[id] = rec
				}
			}
			n := over[some(t, over)].GetNode()
			w.hosts[n.GetAgentId()].say(n, running)
			delete(w.finished, n.GetNodeId())
		},
		"node vanishes": func(t *rapid.T) { _, h := host(t); h.forget(some(t, h.live())) },
		"node fails":    func(t *rapid.T) { _, h := host(t); h.say(h.runs[some(t, h.live())], failed) },
		"node loops":    func(t *rapid.T) { _, h := host(t); h.say(h.runs[some(t, h.live())], crashLoop) },
		"node starts":   func(t *rapid.T) { _, h := host(t); h.say(h.runs[some(t, h.live())], starting) },
		"node finishes": func(t *rapid.T) {
			_, h := host(t)
			n := proto.CloneOf(h.runs[some(t, h.live())])
			n.Completed = true
			phase := rapid.SampledFrom([]sutrav1.Phase{stopped, failed}).Draw(t, "as")
			h.say(n, phase)
			if rec := w.records[n.GetNodeId()]; rec == nil || rec.GetNode().GetDesired() == sutrav1.Desired_DESIRED_RUNNING {
				w.finished[n.GetNodeId()] = phase
			}
		},
		"agent leaves":   func(t *rapid.T) { _, h := host(t); h.away = true },
		"agent is back":  func(t *rapid.T) { _, h := host(t); h.away = false },
		"agent restarts": func(t *rapid.T) { w.restart(some(t, w.hosts), false) },
		"agent forgets":  func(t *rapid.T) { w.restart(some(t, w.hosts), true) },
		"beat":           func(t *rapid.T) { w.beat(some(t, w.hosts)) },
		"look":           func(*rapid.T) { w.reconcile() },
		"look again":     func(*rapid.T) { w.reconcile() },
		"master restarts": func(*rapid.T) {
			w.registry = registry.New(health.DefaultThresholds(), nil)
			w.registry.Load(slices.Collect(maps.Values(w.agents)), slices.Collect(maps.Values(w.records)), slices.Collect(maps.Values(w.tombs)), w.now)
		},
		"master loses its disk": func(t *rapid.T) {
			if rapid.IntRange(0, 4).Draw(t, "luck") > 0 {
				t.Skip("not this time")
			}
			w.agents, w.records, w.tombs = map[string]*sutrav1.Agent{}, map[string]*sutrav1.NodeRecord{}, map[string]*sutrav1.NodeRecord{}
			w.registry = registry.New(health.DefaultThresholds(), nil)
		},
		"time passes": func(t *rapid.T) {
			w.now = w.now.Add(time.Duration(rapid.IntRange(1, 20).Draw(t, "seconds")) * time.Second)
			for _, id := range slices.Sorted(maps.Keys(w.hosts)) {
				w.beat(id)
			}
		},
	}
}

// restart registers an agent anew, with its processes or without.
func (w *world) restart(id string, empty bool) {
	h := w.hosts[id]
	h.away, h.revision = false, 0
	if empty {
		for n := range h.runs {
			delete(w.finished, n)
		}
		h.runs = map[string]*sutrav1.Node{}
	}
	for n := range h.runs {
		h.say(h.runs[n], h.runs[n].GetPhase())
	}
	w.register(id)
}

// check: no node has two processes, and none runs where it doesn't belong.
func (w *world) check(t *rapid.T) {
	where := map[string]string{}
	for _, agentID := range slices.Sorted(maps.Keys(w.hosts)) {
		for id := range w.hosts[agentID].runs {
			if other, runs := where[id]; runs {
				t.Fatalf("%s runs on %s and on %s", id, other, agentID)
			}
			where[id] = agentID
			if rec := w.records[id]; rec != nil && rec.GetNode().GetAgentId() != agentID {
				t.Fatalf("%s runs on %s and belongs to %s", id, agentID, rec.GetNode().GetAgentId())
			}
		}
	}
}

// settle is what a grid comes to when nothing more goes wrong.
func (w *world) settle() {
	w.lossy = false
	for id, h := range w.hosts {
		h.away = false
		w.beat(id)
		for _, n := range h.runs { // what was starting comes up
			if n.GetPhase() == starting {
				h.say(n, running)
			}
		}
	}
	for quiet := 0; quiet < 2; {
		// Longer than any pause, in steps that no agent is OFFLINE after.
		quiet++
		for range 7 {
			for id := range w.hosts {
				w.beat(id)
			}
			if due := w.reconcile(); len(due) > 0 {
				quiet = 0
			}
			w.now = w.now.Add(10 * time.Second)
			w.check(w.t)
		}
		if w.now.Sub(noon()) > 24*time.Hour {
			w.t.Fatalf("the grid doesn't come to rest: %v is still due", Plan(w.registry.States(w.now), w.now))
		}
	}
}

func TestGridComesToWhatIsWanted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		for range 4 { // a long story: what one step leaves behind, many others must find
			t.Repeat(w.steps())
		}
		wanted := map[string]bool{} // and once known to be possible
		for id, rec := range w.records {
			if rec.GetConfirmed() && rec.GetNode().GetDesired() == sutrav1.Desired_DESIRED_RUNNING && w.finished[id] == 0 {
				wanted[id] = true
			}
		}
		w.settle()
		for id := range wanted {
			if w.records[id].GetNode().GetDesired() != sutrav1.Desired_DESIRED_RUNNING {
				t.Errorf("%s was wanted, and the reconciler gave it up: %v", id, w.records[id])
			}
		}
		for id, phase := range w.finished {
			if rec := w.records[id]; rec != nil && rec.GetNode().GetPhase() != phase {
				t.Errorf("%s has run to its end as %v, and on record is %v", id, phase, rec)
			}
		}
		running := map[string]bool{}
		for _, h := range w.hosts {
			for id, n := range h.runs {
				running[id] = n.GetPhase() == sutrav1.Phase_PHASE_RUNNING || n.GetPhase() == crashLoop
				if rec := w.records[id]; w.tombs[id] != nil || rec == nil || rec.GetNode().GetDesired() != sutrav1.Desired_DESIRED_RUNNING {
					t.Errorf("%v runs, and %v is wanted", n, rec)
				}
			}
		}
		for id, rec := range w.records {
			switch {
			case rec.GetNode().GetDesired() == sutrav1.Desired_DESIRED_RUNNING && !running[id]:
				t.Errorf("%s is wanted, and doesn't run", id)
			case rec.GetNode().GetDesired() == sutrav1.Desired_DESIRED_STOPPED && !rec.GetNode().Ended():
				t.Errorf("%s was to be stopped, and hasn't ended", id)
			}
		}
	})
}
