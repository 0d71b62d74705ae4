package registry

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

func TestLoadedAgentIsNotOfflineBeforeAFullWindow(t *testing.T) {
	g := newGrid(t)
	g.Load([]*sutrav1.Agent{host("a")}, nil, nil, g.now)
	for _, step := range []struct {
		after time.Duration
		want  sutrav1.AgentHealth
	}{
		{0, sutrav1.AgentHealth_AGENT_HEALTH_UNKNOWN},
		{30*time.Second - 1, sutrav1.AgentHealth_AGENT_HEALTH_UNKNOWN},
		{30 * time.Second, sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE},
	} {
		now := g.now.Add(step.after)
		a := g.Agents(now)[0]
		if a.GetHealth() != step.want || a.GetLastHeartbeat() != nil {
			t.Errorf("after %v: %v, last beat %v; want %v without a beat", step.after, a.GetHealth(), a.GetLastHeartbeat(), step.want)
		}
		_, err := g.Callable("a", now)
		wantReason(t, err, rpc.AgentOffline)
		if soon := rpc.AsError(err).RetryAfter > 0; soon != (step.want == sutrav1.AgentHealth_AGENT_HEALTH_UNKNOWN) {
			t.Errorf("after %v: to try again soon: %v", step.after, soon)
		}
	}
}

func TestTransitionsAreToldOnceEach(t *testing.T) {
	g := newGrid(t)
	epoch := g.register(host("a")).GetEpoch()
	var got []string
	look := func() {
		for _, c := range g.Transitions(g.now) {
			got = append(got, fmt.Sprintf("%s %v>%v, %s", c.AgentID, c.From, c.To, c.Silence))
		}
	}
	look()
	g.touched()
	look()
	if g.touched() {
		t.Error("a change without a change of health")
	}
	for range 40 {
		g.pass(time.Second)
		look()
	}
	if !g.touched() {
		t.Error("nobody is told that an agent's health changed")
	}
	g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: epoch, Sequence: 1})
	look()
	g.Unregister("a", epoch)
	look() // a leave isn't told of: whoever took it in knows
	g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: epoch, Sequence: 2})
	look()
	if want := []string{
		"a unknown>healthy, last heard of 0s ago",
		"a healthy>degraded, last heard of 15s ago",
		"a degraded>offline, last heard of 30s ago",
		"a offline>healthy, last heard of 0s ago",
		"a offline>healthy, last heard of 0s ago",
	}; !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestClaimOfAnIDThatIsKnown(t *testing.T) {
	cases := map[string]struct {
		before func(g *grid)
		epoch  uint64 // of the next claim that is accepted
		taken  bool   // for another instance
	}{
		"claim under way": {func(g *grid) { _, _ = g.Claim(host("a"), g.now) }, 2, true},
		"loaded": {func(g *grid) {
			a := host("a")
			a.Epoch = 7
			g.Load([]*sutrav1.Agent{a}, nil, nil, g.now)
		}, 8, true},
		"healthy":  {func(g *grid) { g.register(host("a")) }, 2, true},
		"degraded": {func(g *grid) { g.register(host("a")); g.pass(15 * time.Second) }, 2, true},
		"offline":  {func(g *grid) { g.register(host("a")); g.pass(30 * time.Second) }, 2, false},
		"left":     {func(g *grid) { g.Unregister("a", g.register(host("a")).GetEpoch()) }, 2, false},
		"offline since it was loaded": {func(g *grid) {
			g.Load([]*sutrav1.Agent{host("a")}, nil, nil, g.now)
			g.pass(30 * time.Second)
		}, 1, false},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			g := newGrid(t)
			c.before(g)
			other, err := g.Claim(another(host("a")), g.now)
			if !c.taken {
				wantReason(t, err, "")
				if other.GetEpoch() != c.epoch {
					t.Errorf("the other instance gets epoch %d, want %d", other.GetEpoch(), c.epoch)
				}
				return
			}
			wantReason(t, err, rpc.AgentIDTaken)
			if e := rpc.AsError(err); e.Meta["endpoint"] != "a:8001" || e.Hint == "" {
				t.Errorf("the refusal doesn't say who has the id or what to do: %v, %q", e.Meta, e.Hint)
			}
			again, err := g.Claim(host("a"), g.now)
			wantReason(t, err, "")
			if again.GetEpoch() != c.epoch {
				t.Errorf("the agent itself gets epoch %d, want %d", again.GetEpoch(), c.epoch)
			}
		})
	}
}

func TestClaimKeepsToItselfWhatViewsFillIn(t *testing.T) {
	g := newGrid(t)
	asked := host("a")
	asked.Health, asked.NodeCount, asked.Epoch = sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE, 9, 99
	before := proto.CloneOf(asked)
	claim := g.register(asked)
	if !proto.Equal(asked, before) {
		t.Error("the request was changed")
	}
	if claim.GetHealth() != 0 || claim.GetNodeCount() != 0 || claim.GetEpoch() != 1 {
		t.Errorf("the agent's word was taken for what the master decides: %v", claim)
	}
	again := proto.CloneOf(asked)
	again.Draining = true
	g.register(again)
	if !g.register(host("a")).GetDraining() {
		t.Error("a restart of the agent ended its draining")
	}
}

func TestOneOfManyInstancesGetsAnID(t *testing.T) {
	g := newGrid(t)
	var mu sync.Mutex
	var won []*sutrav1.Agent
	var group sync.WaitGroup
	for i := range 50 {
		group.Go(func() {
			a := host("a")
			a.InstanceId = fmt.Sprint("home-", i)
			claim, err := g.Claim(a, g.now)
			if err != nil {
				return
			}
			g.Register(claim, nil, g.now)
			mu.Lock()
			defer mu.Unlock()
			won = append(won, claim)
		})
	}
	group.Wait()
	if len(won) != 1 || g.Agents(g.now)[0].GetInstanceId() != won[0].GetInstanceId() {
		t.Fatalf("%d instances got the id, want the one that is registered: %v", len(won), won)
	}
}

func TestOvertakenClaimHasNoEffect(t *testing.T) {
	g := newGrid(t)
	first, _ := g.Claim(host("a"), g.now)
	second, _ := g.Claim(host("a"), g.now)
	g.Register(first, []*sutrav1.Node{says("n", "a", running, 1)}, g.now)
	g.Release(first)
	if len(g.Agents(g.now)) != 0 || len(g.ids()) != 0 {
		t.Fatal("the overtaken claim came into force")
	}
	g.Register(second, nil, g.now)
	if got := g.Agents(g.now); len(got) != 1 || got[0].GetEpoch() != 2 {
		t.Fatalf("got %v, want the second claim in force", got)
	}
	g.Release(second)
	if len(g.Agents(g.now)) != 1 {
		t.Error("a claim in force was released")
	}
}

func TestReleasedClaim(t *testing.T) {
	g := newGrid(t)
	claim, _ := g.Claim(host("new"), g.now)
	if _, err := g.Callable("new", g.now); rpc.ReasonOf(err) != rpc.AgentNotRegistered {
		t.Errorf("a claim alone makes the agent callable: %v", err)
	}
	g.Release(claim)
	if len(g.agents) != 0 {
		t.Error("the claim of a new agent leaves something behind")
	}
	if _, err := g.Claim(another(host("new")), g.now); err != nil {
		t.Errorf("the id is still taken: %v", err)
	}

	g.register(host("old"))
	claim, _ = g.Claim(host("old"), g.now)
	g.Release(claim)
	if a, err := g.Callable("old", g.now); err != nil || a.GetEpoch() != 1 {
		t.Errorf("the registration in force is %v (%v), want the first one's", a, err)
	}
}

func TestWhichBeatsCount(t *testing.T) {
	cases := []struct {
		name            string
		epoch, sequence uint64
		reason          rpc.Reason
		counts          bool
		wantFull        bool
	}{
		{"older epoch", 1, 9, rpc.EpochSuperseded, false, false},
		{"newer", 2, 6, "", true, false},
		{"same again", 2, 5, "", false, false},
		{"late", 2, 4, "", false, false},
		{"newer epoch, of which all that runs isn't known", 3, 1, "", true, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			g := newGrid(t)
			g.register(host("a"))
			g.register(host("a"))
			g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 2, Sequence: 5, Full: true, Changed: []*sutrav1.Node{says("n", "a", starting, 1)}})
			g.pass(20 * time.Second)
			full, err := g.Beat(&sutrav1.HeartbeatRequest{
				AgentId: "a", Epoch: c.epoch, Sequence: c.sequence, Changed: []*sutrav1.Node{says("n", "a", running, 2)},
			}, g.now)
			wantReason(t, err, c.reason)
			if full != c.wantFull {
				t.Errorf("full inventory wanted: %v", full)
			}
			if alive := g.state("a") == health.Healthy; alive != c.counts {
				t.Errorf("agent is %v", g.state("a"))
			}
			if news := g.node("n").Node.GetPhase() == running; news != (c.counts && !c.wantFull) {
				t.Errorf("node is %v", g.node("n").Node.GetPhase())
			}
		})
	}
	_, err := newGrid(t).Beat(&sutrav1.HeartbeatRequest{AgentId: "nobody"}, time.Time{})
	wantReason(t, err, rpc.AgentNotRegistered)
	g := newGrid(t)
	_, _ = g.Claim(host("a"), g.now)
	_, err = g.Beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 1, Sequence: 1}, g.now)
	wantReason(t, err, rpc.AgentNotRegistered)
}

func TestInventoryIsAskedForUntilItIsThere(t *testing.T) {
	g := newGrid(t)
	a := host("a")
	a.Epoch = 3
	g.Load([]*sutrav1.Agent{a}, []*sutrav1.NodeRecord{wants("n", "a")}, nil, g.now)
	beat := &sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 3, Changed: []*sutrav1.Node{says("n", "a", running, 4)}}
	for range 2 {
		beat.Sequence++
		if !g.beat(beat) {
			t.Fatal("nothing is known of what the agent runs, and it isn't asked")
		}
		if s := g.States(g.now)[0]; s.Settled || s.Seen != nil {
			t.Fatalf("a part was taken for the whole: %+v", s)
		}
	}
	g.touched()
	if g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 3, Sequence: 3, Full: true, Changed: beat.GetChanged()}) {
		t.Fatal("asked again for what just came")
	}
	if s := g.States(g.now)[0]; !s.Settled || s.Seen == nil || !g.touched() {
		t.Fatalf("the inventory wasn't taken in: %+v", s)
	}
	if g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 3, Sequence: 4}) || g.touched() {
		t.Error("a beat without news asks or changes something")
	}
	g.Unregister("a", 3)
	if !g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 3, Sequence: 5}) {
		t.Error("not asked again after the agent took its leave")
	}
}

func TestBeatsSayWhatRuns(t *testing.T) {
	g := newGrid(t)
	g.register(host("b"), says("b1", "b", running, 1))
	g.register(host("a"), says("a1", "a", running, 1), says("a2", "a", running, 2), says("b1", "b", failed, 9))
	g.Put(wants("a2", "a"))
	g.Put(wants("b2", "b"))
	beat := &sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 1}
	say := func(full bool, changed []*sutrav1.Node, gone ...string) {
		t.Helper()
		beat.Sequence++
		beat.Full, beat.Changed, beat.Gone = full, changed, gone
		g.beat(beat)
	}
	wantIDs(t, g.ids(), "a1", "a2", "b1", "b2")

	say(false, []*sutrav1.Node{says("a3", "a", starting, 3)}, "a1", "b1")
	wantIDs(t, g.ids(), "a2", "a3", "b1", "b2")
	say(false, []*sutrav1.Node{says("b1", "b", failed, 9), says("b2", "a", running, 9), says("b2", "b", running, 9), says("b3", "b", running, 9)})
	wantIDs(t, g.ids(), "a2", "a3", "b1", "b2")
	say(true, []*sutrav1.Node{says("a4", "a", starting, 4), says("b1", "b", failed, 9), says("b2", "a", running, 9)})
	wantIDs(t, g.ids(), "a2", "a4", "b1", "b2")
	seen := map[string]bool{}
	for _, s := range g.States(g.now) {
		seen[s.ID] = s.Seen != nil
	}
	if seen["a2"] {
		t.Error("a2 isn't in the inventory, and still counts as running")
	}
	if seen["b2"] || g.node("b1").Node.GetPhase() != running {
		t.Error("agent a was believed about a node of agent b")
	}
}

// A list of all that an agent runs may be older than its answer to a call: it takes two lists to take such a node for gone.
func TestListThatIsOlderThanAnAnswer(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"))
	g.Observe(says("n", "a", running, 5), g.now)
	beat := &sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 1, Full: true}
	for i, want := range []struct{ full, seen bool }{{true, true}, {false, false}} {
		beat.Sequence++
		if full := g.beat(beat); full != want.full {
			t.Errorf("list %d: another one is wanted: %v", i, full)
		}
		_, seen := g.Node("n", g.now)
		if seen != want.seen {
			t.Errorf("list %d: it is there: %v", i, seen)
		}
	}
	// One that lists it dispels the doubt.
	g.Observe(says("n", "a", running, 6), g.now)
	beat.Sequence++
	beat.Changed = []*sutrav1.Node{says("n", "a", running, 6)}
	g.beat(beat)
	beat.Sequence++
	beat.Changed = nil
	if g.beat(beat) {
		t.Error("one that was listed, and isn't any more, is in doubt")
	}
	if _, seen := g.Node("n", g.now); seen {
		t.Error("it is still there")
	}
}

func TestNewerRevisionStands(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"), says("n", "a", starting, 5))
	now := says("n", "a", running, 7)
	g.Observe(now, g.now)
	stale := []*sutrav1.Node{says("n", "a", starting, 6)}
	for name, late := range map[string]func(){
		"answer": func() { g.Observe(stale[0], g.now) },
		"beat":   func() { g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 1, Sequence: 1, Changed: stale}) },
		"inventory": func() {
			g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 1, Sequence: 2, Changed: stale, Full: true})
		},
	} {
		late()
		if got := g.States(g.now)[0].Seen; got != now {
			t.Errorf("an %s that was overtaken replaced what is newer: %v", name, got)
		}
	}
	// The agent starts again, and counts its revisions from one.
	g.register(host("a"), says("n", "a", starting, 1))
	g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 2, Sequence: 1, Changed: []*sutrav1.Node{says("n", "a", failed, 2)}})
	if got := g.node("n").Node.GetPhase(); got != failed {
		t.Errorf("got %v, want what the agent said in its new epoch", got)
	}
	// The same, where the registration was overtaken on its way to disk.
	handed, _ := g.Callable("a", g.now)
	if !g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 3, Sequence: 1}) {
		t.Error("the new epoch's inventory isn't asked for")
	}
	g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 3, Sequence: 2, Full: true, Changed: []*sutrav1.Node{says("n", "a", running, 1)}})
	if got := g.node("n").Node.GetPhase(); got != running {
		t.Errorf("got %v, want what the agent said in its newest epoch", got)
	}
	if handed.GetEpoch() != 2 || g.Agents(g.now)[0].GetEpoch() != 3 {
		t.Error("the new epoch isn't in force, or was written into what was handed out before")
	}
}

func TestRestartsAreCountedOnceEach(t *testing.T) {
	g := newGrid(t)
	said := func(restarts uint32, revision uint64) *sutrav1.Node {
		n := says("n", "a", running, revision)
		n.RestartCount = restarts
		return n
	}
	g.register(host("a"), said(3, 1))
	for _, step := range []struct {
		name string
		take func()
		want uint64
	}{
		{"first sight", func() {}, 0},
		{"beat", func() {
			g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 1, Sequence: 1, Changed: []*sutrav1.Node{said(4, 2)}})
		}, 1},
		{"answer with the same", func() { g.Observe(said(4, 2), g.now) }, 1},
		{"overtaken answer", func() { g.Observe(said(3, 1), g.now) }, 1},
		{"inventory", func() {
			g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 1, Sequence: 2, Full: true, Changed: []*sutrav1.Node{said(6, 3)}})
		}, 3},
		{"registration", func() { g.register(host("a"), said(7, 1)) }, 4},
		{"count begun anew", func() { g.register(host("a"), said(0, 1)) }, 4},
	} {
		if step.take(); g.Restarts() != step.want {
			t.Errorf("%s: %d restarts, want %d", step.name, g.Restarts(), step.want)
		}
	}
}

func TestUnregister(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"))
	g.register(host("a"))
	g.Unregister("a", 1)
	if g.state("a") != health.Healthy {
		t.Error("the leave of an epoch that is over counts")
	}
	g.touched()
	g.Unregister("a", 2)
	if g.state("a") != health.Offline || !g.touched() {
		t.Error("the agent's leave doesn't count")
	}
	g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 2, Sequence: 1})
	if g.state("a") != health.Healthy {
		t.Error("a beat after the leave doesn't count")
	}
	g.Unregister("nobody", 0)

	_, _ = g.Claim(host("b"), g.now)
	g.Unregister("b", 0)
	if _, err := g.Claim(another(host("b")), g.now); rpc.ReasonOf(err) != rpc.AgentIDTaken {
		t.Errorf("a leave without an epoch gave a claim away: %v", err)
	}
}

func ids(agents []*sutrav1.Agent) []string {
	var ids []string
	for _, a := range agents {
		ids = append(ids, a.GetAgentId())
	}
	return ids
}

// Only an agent that is OFFLINE, silent for long enough and without a node is idle.
func TestIdleAgents(t *testing.T) {
	g := newGrid(t)
	g.Load([]*sutrav1.Agent{host("loaded")}, nil, nil, g.now)
	for _, id := range []string{"bare", "ended", "wanted"} {
		g.register(host(id))
	}
	g.register(host("seen"), says("s", "seen", running, 1))
	g.Put(wants("w", "wanted"))
	g.Put(wants("e", "ended"))
	g.end("e", stopped)
	g.register(host("ghost"))
	g.Put(wants("g", "ghost"))
	g.end("g", stopped)
	g.Observe(says("g", "ghost", running, 1), g.now) // it runs there in spite of its end
	g.pass(10 * time.Second)
	g.Unregister("bare", 1)
	wantIDs(t, ids(g.Idle(0, g.now)), "bare")
	if left := g.Transitions(g.now); slices.ContainsFunc(left, func(t Transition) bool { return t.AgentID == "bare" }) {
		t.Errorf("a leave is told of as a silence: %v", left)
	}
	wantIDs(t, ids(g.Idle(time.Minute, g.now)))
	g.pass(50*time.Second - 1)
	wantIDs(t, ids(g.Idle(time.Minute, g.now)))
	g.pass(1)
	wantIDs(t, ids(g.Idle(time.Minute, g.now)), "bare", "ended", "loaded")
}

// An agent's id is known while there is the agent, OFFLINE or not, or a node that is wanted there.
func TestKnows(t *testing.T) {
	g := newGrid(t)
	claim, err := g.Claim(host("claims"), g.now)
	if err != nil {
		t.Fatal(err)
	}
	there := g.register(host("there"))
	g.Load([]*sutrav1.Agent{host("loaded")}, nil, nil, g.now)
	g.Put(wants("w", "lost"))
	g.Put(wants("e", "done"))
	g.end("e", stopped)
	known := func(want ...string) {
		t.Helper()
		var is []string
		for _, id := range []string{"claims", "done", "loaded", "lost", "nobody", "there"} {
			if g.Knows(id) {
				is = append(is, id)
			}
		}
		wantIDs(t, is, want...)
	}
	known("loaded", "lost", "there")
	g.Unregister("there", there.GetEpoch())
	known("loaded", "lost", "there")
	g.Forget(there, g.now)
	g.Register(claim, nil, g.now)
	g.end("w", stopped)
	known("claims", "loaded")
}

// What an agent said before it was forgotten counts no more when it is there again.
func TestForget(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"))
	old := g.register(host("a"))
	g.Forget(old, g.now)
	if g.state("a") != health.Healthy {
		t.Fatal("an agent that is there was forgotten")
	}
	g.Unregister("a", old.GetEpoch())
	claim, err := g.Claim(host("a"), g.now)
	if err != nil {
		t.Fatal(err)
	}
	g.Forget(old, g.now)
	g.Register(claim, nil, g.now)
	if g.state("a") != health.Healthy {
		t.Fatal("an agent was forgotten while it registered")
	}
	g.Unregister("a", claim.GetEpoch())
	g.Forget(old, g.now)
	if g.state("a") != health.Offline {
		t.Fatal("a record that is over had the agent forgotten")
	}
	g.Forget(claim, g.now)
	_, err = g.Beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: claim.GetEpoch(), Sequence: 9}, g.now)
	wantReason(t, err, rpc.AgentNotRegistered)
	if again := g.register(another(host("a"))); again.GetEpoch() <= claim.GetEpoch() || g.Unregister("a", claim.GetEpoch()) {
		t.Errorf("it starts again in epoch %d after %d, and its old leave counts", again.GetEpoch(), claim.GetEpoch())
	}
	_, err = g.Beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: claim.GetEpoch(), Sequence: 10}, g.now)
	wantReason(t, err, rpc.EpochSuperseded)
}

func TestRegistrationMakesWhatFailedDue(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"))
	g.register(host("b"))
	for _, a := range []string{"a", "b"} {
		g.Put(wants("on-"+a, a))
		for range 7 {
			g.Trouble("on-"+a, fmt.Errorf("no route"), g.now)
		}
	}
	g.register(host("a"))
	for _, s := range g.States(g.now) {
		if due := !g.now.Before(s.RetryAt); due != (s.AgentID == "a") {
			t.Errorf("%s is due: %v", s.ID, due)
		}
	}
}

// A beat without news confirms what was said before; an agent that falls silent confirms nothing.
func TestQuietNodeIsObservedByBeats(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"), says("n", "a", running, 1))
	g.Put(wants("n", "a"))
	for sequence := range uint64(3) {
		g.pass(5 * time.Second)
		g.beat(&sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 1, Sequence: sequence + 1})
		if got := g.node("n").Node.GetObservedAt().AsTime(); !got.Equal(g.now) {
			t.Errorf("observed at %v after the beat at %v", got, g.now)
		}
	}
	last := g.now
	g.pass(time.Hour)
	if n := g.node("n").Node; !n.GetObservedAt().AsTime().Equal(last) || n.GetPhase() != sutrav1.Phase_PHASE_UNKNOWN {
		t.Errorf("after an hour of silence: %v", n)
	}
}
