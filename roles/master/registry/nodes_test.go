package registry

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func TestView(t *testing.T) {
	const later = 5 * time.Second
	cases := []struct {
		name   string
		do     func(g *grid)
		phase  sutrav1.Phase
		reason string
		seen   bool // whether its agent ever spoke of it
	}{
		{"being made", func(g *grid) { g.Begin("n") }, starting, "", false},
		{"not seen yet", func(*grid) {}, starting, "its agent doesn't run it yet", false},
		{"seen", func(g *grid) { g.Observe(says("n", "a", running, 1), g.now) }, running, "", true},
		{"seen, with a reason", func(g *grid) {
			n := says("n", "a", sutrav1.Phase_PHASE_CRASH_LOOP, 1)
			n.Reason = "crashes again and again"
			g.Observe(n, g.now)
		}, sutrav1.Phase_PHASE_CRASH_LOOP, "crashes again and again", true},
		{"agent degraded", func(g *grid) {
			g.Observe(says("n", "a", running, 1), g.now)
			g.pass(20 * time.Second)
		}, running, "", true},
		{"agent offline", func(g *grid) {
			g.Observe(says("n", "a", running, 1), g.now)
			g.pass(30 * time.Second)
		}, sutrav1.Phase_PHASE_UNKNOWN, "agent a is OFFLINE, last heard of 30s ago; the node was last seen RUNNING", true},
		{
			"agent offline, never seen", func(g *grid) { g.pass(31 * time.Second) }, sutrav1.Phase_PHASE_UNKNOWN,
			"agent a is OFFLINE, last heard of 31s ago", false,
		},
		{"agent unknown", func(g *grid) {
			g.Load([]*sutrav1.Agent{host("a")}, nil, nil, g.now)
		}, sutrav1.Phase_PHASE_UNKNOWN, "agent a is UNKNOWN, not heard of since the master started", false},
		{
			"agent never registered", func(g *grid) { g.Drop("n"); g.Put(wants("n", "lost")) }, sutrav1.Phase_PHASE_UNKNOWN,
			"agent lost is UNKNOWN, not registered", false,
		},
		{"to be stopped", func(g *grid) {
			g.Observe(says("n", "a", running, 1), g.now)
			g.edit("n", func(rec *sutrav1.NodeRecord) { rec.Node.Desired = sutrav1.Desired_DESIRED_STOPPED })
		}, sutrav1.Phase_PHASE_STOPPING, "", true},
		{"to be stopped, not seen, in trouble", func(g *grid) {
			g.edit("n", func(rec *sutrav1.NodeRecord) { rec.Node.Desired = sutrav1.Desired_DESIRED_STOPPED })
			g.Trouble("n", errors.New("no route"), g.now)
		}, sutrav1.Phase_PHASE_STOPPING, "", false},
		{"in trouble", func(g *grid) { g.Trouble("n", errors.New("no route"), g.now) }, failed, "no route; it is tried again", false},
		{"in trouble, and seen", func(g *grid) {
			g.Trouble("n", errors.New("no route"), g.now)
			g.Observe(says("n", "a", running, 1), g.now)
		}, running, "", true},
		{"wanted differently since the trouble", func(g *grid) {
			g.Trouble("n", errors.New("no route"), g.now)
			g.edit("n", func(*sutrav1.NodeRecord) {})
		}, starting, "its agent doesn't run it yet", false},
		{"gone", func(g *grid) {
			g.Observe(says("n", "a", running, 1), g.now)
			g.Gone("n")
		}, starting, "its agent doesn't run it yet", false},
		{"removed, and its agent came back with it", func(g *grid) {
			g.Bury(g.end("n", stopped))
			g.Observe(says("n", "a", running, 1), g.now)
		}, sutrav1.Phase_PHASE_STOPPING, "", true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			g := newGrid(t)
			g.register(host("a"))
			g.Put(wants("n", "a"))
			observed := g.now
			c.do(g)
			v := g.node("n")
			if v.Node.GetPhase() != c.phase || v.Node.GetReason() != c.reason {
				t.Errorf("got %v, %q; want %v, %q", v.Node.GetPhase(), v.Node.GetReason(), c.phase, c.reason)
			}
			at := v.Node.GetObservedAt()
			if c.seen && !at.AsTime().Equal(observed) || !c.seen && at != nil {
				t.Errorf("observed at %v", at)
			}
			if c.phase == sutrav1.Phase_PHASE_UNKNOWN && v.Node.GetHealth() != 0 {
				t.Error("the health of a node that nobody can ask is told")
			}
			if rec, ok := g.Record("n"); ok && (v.Node.GetGeneration() != rec.GetNode().GetGeneration() || v.Node.GetDesired() != rec.GetNode().GetDesired()) {
				t.Error("the view doesn't say what is wanted")
			}
		})
	}

	g := newGrid(t)
	g.register(host("a"), says("n", "a", running, 1))
	g.Put(wants("n", "a"))
	g.pass(later)
	ended := g.now
	rec := g.end("n", failed)
	g.pass(later)
	g.Observe(says("n", "a", running, 9), g.now)
	want := proto.CloneOf(rec.GetNode())
	want.ObservedAt = timestamppb.New(ended)
	if v := g.node("n"); !proto.Equal(v.Node, want) {
		t.Errorf("got %v, want what its record says of its end, whatever is heard later", v)
	}
	if _, ok := g.Node("nothing", g.now); ok {
		t.Error("a node that isn't there has a view")
	}
}

func TestNodesAreListedByAgentAndEnd(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"), says("a2", "a", running, 1))
	g.register(host("b"))
	g.Put(wants("a1", "a"))
	g.Put(wants("a3", "a"))
	g.Put(wants("b1", "b"))
	g.end("a3", stopped)
	list := func(agentID string, ended bool) (ids []string) {
		for _, v := range g.Nodes(agentID, ended, g.now) {
			ids = append(ids, v.Node.GetNodeId())
		}
		return ids
	}
	wantIDs(t, list("", true), "a1", "a2", "a3", "b1")
	wantIDs(t, list("", false), "a1", "a2", "b1")
	wantIDs(t, list("a", true), "a1", "a2", "a3")
	wantIDs(t, list("b", false), "b1")
	wantIDs(t, list("c", true))
	for _, a := range g.Agents(g.now) {
		if want := map[string]uint32{"a": 2, "b": 1}[a.GetAgentId()]; a.GetNodeCount() != want {
			t.Errorf("%s counts %d nodes, want %d", a.GetAgentId(), a.GetNodeCount(), want)
		}
	}
	for _, c := range g.Candidates(g.now) {
		if want := map[string]int{"a": 2, "b": 1}[c.Agent.GetAgentId()]; len(c.Slots) != want || c.State != health.Healthy {
			t.Errorf("%s is %v and holds %d slots, want %d", c.Agent.GetAgentId(), c.State, len(c.Slots), want)
		}
	}
}

func TestTicketSerialises(t *testing.T) {
	g := newGrid(t)
	g.Put(wants("n", "a"))
	var holders atomic.Int32
	var group sync.WaitGroup
	for range 50 {
		group.Go(func() {
			release, ok, err := g.Ticket(t.Context(), "n")
			if err != nil || !ok {
				t.Errorf("no ticket: %v, %v", ok, err)
				return
			}
			defer release()
			if holders.Add(1) != 1 {
				t.Error("two hold the ticket")
			}
			rec, _ := g.Record("n")
			next := proto.CloneOf(rec)
			next.Node.Generation++
			g.Put(next)
			holders.Add(-1)
		})
	}
	group.Wait()
	if rec, _ := g.Record("n"); rec.GetNode().GetGeneration() != 51 {
		t.Errorf("generation %d after 50 changes of 1", rec.GetNode().GetGeneration())
	}
}

func TestTicketOfWhatIsNotThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGrid(t)
		if _, ok, err := g.Ticket(t.Context(), "n"); ok || err != nil {
			t.Errorf("a node that isn't there has a ticket: %v", err)
		}
		g.Observe(says("seen", "a", running, 1), g.now)
		if _, ok, _ := g.Ticket(t.Context(), "seen"); !ok {
			t.Error("a node that its agent alone speaks of has no ticket: its adoption and its stop could cross")
		}

		g.Put(wants("n", "a"))
		release, _, _ := g.Ticket(t.Context(), "n")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, ok, err := g.Ticket(ctx, "n"); !ok || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("waited for the ticket with %v, %v; want the deadline", ok, err)
		}
		waiter := make(chan bool)
		go func() {
			_, ok, err := g.Ticket(t.Context(), "n")
			waiter <- ok || err != nil
		}()
		synctest.Wait()
		g.Bury(g.end("n", stopped)) // by the holder
		release()
		if <-waiter {
			t.Error("who waited got the ticket of a node that was removed")
		}
	})
}

func TestBusyNodesAreLeftAlone(t *testing.T) {
	g := newGrid(t)
	g.Put(wants("n", "a"))
	busy := func() bool { return g.States(g.now)[0].Busy }
	first, second := g.Begin("n"), g.Begin("n")
	if _, ok := g.BeginIdle("n"); ok || !busy() {
		t.Error("the reconciler gets at a node that two are at")
	}
	first()
	if _, ok := g.BeginIdle("n"); ok || !busy() {
		t.Error("the reconciler gets at a node that one is still at")
	}
	g.touched()
	second()
	if busy() || !g.touched() {
		t.Error("the node isn't idle, or nobody is told")
	}
	end, ok := g.BeginIdle("n")
	if !ok || !busy() {
		t.Fatal("the reconciler doesn't get at an idle node")
	}
	g.Drop("n")
	g.Put(wants("n", "a"))
	end()
	if busy() {
		t.Error("the end of the old node's call counts for the new one")
	}
	if end, ok := g.BeginIdle("n"); !ok {
		t.Error("the new node isn't idle")
	} else {
		end()
	}
	if _, ok := g.BeginIdle("nothing"); ok {
		t.Error("a node that isn't there is idle")
	}
	g.Begin("nothing")()
}

func TestOneOfManyFindsANodeIdle(t *testing.T) {
	g := newGrid(t)
	g.Put(wants("n", "a"))
	for range 3000 {
		var won, arrived atomic.Int32
		var group sync.WaitGroup
		for range 2 {
			group.Go(func() {
				for arrived.Add(1); arrived.Load() < 2; {
					runtime.Gosched()
				}
				if _, ok := g.BeginIdle("n"); ok {
					won.Add(1)
				}
			})
		}
		group.Wait()
		if won.Load() != 1 {
			t.Fatalf("%d found the node idle at once", won.Load())
		}
		g.Drop("n")
		g.Put(wants("n", "a"))
	}
}

func TestTroublePauses(t *testing.T) {
	g := newGrid(t)
	g.Put(wants("n", "a"))
	var pauses []time.Duration
	for range 9 {
		pause := g.Trouble("n", errors.New("no route"), g.now)
		if at := g.States(g.now)[0].RetryAt; !at.Equal(g.now.Add(pause)) {
			t.Errorf("due at %v, want after the pause of %v", at, pause)
		}
		pauses = append(pauses, pause/time.Second)
		g.pass(pause)
	}
	if want := []time.Duration{1, 2, 4, 8, 16, 32, 60, 60, 60}; !slices.Equal(pauses, want) {
		t.Errorf("pauses of %v seconds, want %v", pauses, want)
	}
	if pause := g.Trouble("n", nil, g.now); pause != 0 || !g.States(g.now)[0].RetryAt.IsZero() {
		t.Error("the trouble isn't over")
	}
	if pause := g.Trouble("n", errors.New("no route"), g.now); pause != time.Second {
		t.Errorf("new trouble begins with a pause of %v", pause)
	}
	g.edit("n", func(rec *sutrav1.NodeRecord) { rec.Node.Desired = sutrav1.Desired_DESIRED_STOPPED })
	if !g.States(g.now)[0].RetryAt.IsZero() {
		t.Error("what is wanted now waits for what was wanted before")
	}
	if g.Trouble("nothing", errors.New("no route"), g.now) != 0 {
		t.Error("a node that isn't there has trouble")
	}
}

func TestPruneAndBury(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"))
	for _, id := range []string{"live", "old", "held", "busy", "young"} {
		rec := wants(id, "a")
		rec.RequestId = "r-" + id
		g.Put(rec)
	}
	g.end("old", stopped)
	g.end("held", failed)
	g.end("busy", stopped)
	g.Observe(says("held", "a", failed, 1), g.now)
	end := g.Begin("busy")
	g.pass(time.Hour)
	g.end("young", stopped)

	prune := func(nodes, tombs time.Duration) {
		g.Prune(g.now.Add(-nodes), g.now.Add(-tombs))
	}
	prune(time.Hour, 0)
	wantIDs(t, g.ids(), "busy", "held", "live", "old", "young")
	prune(time.Hour-1, 24*time.Hour)
	wantIDs(t, g.ids(), "busy", "held", "live", "young")
	for _, s := range g.States(g.now) {
		if s.Removed != (s.ID == "held") {
			t.Errorf("%s is removed: %v", s.ID, s.Removed)
		}
	}
	if !g.Removed("old") || !g.Removed("held") || g.Removed("busy") || g.Removed("nothing") {
		t.Error("the tombstones are wrong")
	}
	if !g.Requested("r-old") {
		t.Error("the request of a removed node is forgotten before its tombstone")
	}
	end()
	g.Gone("held")
	prune(time.Hour-1, 24*time.Hour)
	wantIDs(t, g.ids(), "live", "young")
	prune(24*time.Hour, time.Hour)
	if !g.Removed("old") {
		t.Error("a tombstone went too early")
	}
	prune(24*time.Hour, time.Hour-1)
	if len(g.tombs) != 0 || len(g.requests) != 2 {
		t.Errorf("%d tombstones and %d requests are left, want none and those of the 2 nodes", len(g.tombs), len(g.requests))
	}

	noEnd := g.edit("young", func(rec *sutrav1.NodeRecord) { rec.EndedAt = nil })
	prune(0, 0)
	wantIDs(t, g.ids(), "live", "young")
	g.touched()
	g.Bury(noEnd)
	if !g.touched() {
		t.Error("nobody is told that a node was removed")
	}
	prune(0, 0)
	if !g.Removed("young") {
		t.Error("a tombstone without an end was taken for an old one, and the store keeps it")
	}
}

func TestLoadedTombstones(t *testing.T) {
	g := newGrid(t)
	tomb := wants("n", "a")
	tomb.RequestId = "r"
	g.Load([]*sutrav1.Agent{host("a")}, nil, []*sutrav1.NodeRecord{tomb}, g.now)
	g.register(host("a"), says("n", "a", running, 1), says("m", "a", running, 2))
	for _, s := range g.States(g.now) {
		if s.Removed != (s.ID == "n") || s.Record != nil || !s.Settled {
			t.Errorf("got %+v", s)
		}
	}
	if _, ok := g.Record("n"); ok || !g.Requested("r") {
		t.Error("a tombstone is a record, or its request is forgotten")
	}
}

// What is handed out is read here without a lock while everything changes: the race detector finds
// a message that is changed after that.
func TestReadersMayKeepWhatTheyAreHanded(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"))
	now := g.now
	var group sync.WaitGroup
	stop := make(chan struct{})
	for range 2 {
		group.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				for _, a := range g.Agents(now) {
					a.Hostname = "its own copy"
				}
				for _, v := range g.Nodes("", true, now) {
					_ = v.Node.String()
				}
				for _, s := range g.States(now) {
					_, _ = s.Record.String(), s.Seen.String()
				}
				for _, c := range g.Candidates(now) {
					_ = c.Agent.String()
					for _, n := range c.Slots {
						_ = n.String()
					}
				}
				if a, _ := g.Callable("a", now); a != nil {
					_ = a.String()
				}
			}
		})
	}
	for i := range 300 {
		id := fmt.Sprint("n", i%4)
		epoch := uint64(i/50 + 2)
		if i%50 == 0 {
			g.register(host("a"), says(id, "a", starting, 1))
		}
		_, _ = g.Beat(&sutrav1.HeartbeatRequest{
			AgentId: "a", Epoch: epoch + uint64(i%50/25), Sequence: uint64(i%50 + 1), Full: i%7 == 0,
			Changed: []*sutrav1.Node{says(id, "a", running, uint64(i%50))},
		}, now)
		if r, err := g.Reserve(wish(id, "a", uint32(1000+i), "", 1), now); err == nil {
			g.Put(proto.CloneOf(r.Record))
			r.Done()
		}
		if rec, ok := g.Record(id); ok && i%3 == 0 {
			ended := proto.CloneOf(rec)
			ended.Node.Phase = stopped
			g.Put(ended)
			g.Trouble(id, errors.New("no route"), now)
			g.Bury(ended)
		}
	}
	close(stop)
	group.Wait()
}
