package registry

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// wish is a record with all that can clash.
func wish(id, agentID string, port uint32, path string, memory uint32) *sutrav1.NodeRecord {
	rec := wants(id, agentID)
	rec.Node.Port, rec.Node.StoragePath, rec.Node.MemoryLimitMb = port, path, memory
	return rec
}

func TestReserveTakesAllOrNothing(t *testing.T) {
	cases := []struct {
		name   string
		rec    *sutrav1.NodeRecord
		before func(g *grid)
		want   rpc.Reason
		holder string // node_id in the refusal
	}{
		{name: "all free", rec: wish("n", "a", 2000, "/new", 100)},
		{name: "port of a reserved node", rec: wish("n", "a", 1000, "/new", 100), want: rpc.PortInUse, holder: "held"},
		{name: "same port on another agent", rec: wish("n", "b", 1000, "/held", 100)},
		{name: "port that the agent chose", rec: wish("n", "a", 1001, "/new", 100), want: rpc.PortInUse, holder: "auto"},
		{name: "port of a node that nobody wants", rec: wish("n", "a", 1002, "/new", 100), want: rpc.PortInUse, holder: "stranger"},
		{name: "path of a node", rec: wish("n", "a", 0, "/held", 100), want: rpc.PathInUse, holder: "held"},
		{name: "path inside another's", rec: wish("n", "a", 0, "/held/x", 100), want: rpc.PathInUse, holder: "held"},
		{name: "path around another's", rec: wish("n", "a", 0, "/data", 100), want: rpc.PathInUse, holder: "auto"},
		{name: "path beside another's", rec: wish("n", "a", 0, "/held-too", 100)},
		{name: "the last of the memory", rec: wish("n", "a", 0, "", 700)},
		{name: "more than the memory", rec: wish("n", "a", 0, "", 701), want: rpc.MemoryOverCommitted},
		{name: "last slot", rec: wish("n", "a", 0, "", 1), before: func(g *grid) { g.reserve(wants("m", "a")) }},
		{name: "no slot", rec: wish("n", "a", 0, "", 1), want: rpc.AgentFull, before: func(g *grid) {
			g.reserve(wants("m1", "a"))
			g.reserve(wants("m2", "a"))
		}},
		{name: "port of a stopped node", rec: wish("n", "a", 1000, "/held", 800), before: func(g *grid) { g.end("held", stopped) }},
		{name: "port of a failed node", rec: wish("n", "a", 1001, "/data/auto", 800), before: func(g *grid) { g.end("auto", failed) }},
		{name: "port of a node that is to stop", rec: wish("n", "a", 1000, "/new", 1), want: rpc.PortInUse, holder: "held", before: func(g *grid) {
			g.edit("held", func(rec *sutrav1.NodeRecord) { rec.Node.Desired = sutrav1.Desired_DESIRED_STOPPED })
		}},
		{name: "port of a node that was undone", rec: wish("n", "a", 1000, "/held", 800), before: func(g *grid) { g.Drop("held") }},
		{name: "port of a stranger that left", rec: wish("n", "a", 1002, "/new", 1), before: func(g *grid) { g.Gone("stranger") }},
		{name: "unknown agent", rec: wish("n", "nobody", 0, "", 1), want: rpc.AgentNotRegistered},
		{name: "agent whose registration is being persisted", rec: wish("n", "c", 0, "", 1), want: rpc.AgentNotRegistered, before: func(g *grid) {
			_, _ = g.Claim(host("c"), g.now)
		}},
		{name: "degraded agent", rec: wish("n", "a", 0, "", 1), before: func(g *grid) { g.pass(29 * time.Second) }},
		{name: "offline agent", rec: wish("n", "a", 0, "", 1), want: rpc.AgentOffline, before: func(g *grid) { g.pass(30 * time.Second) }},
		{name: "agent not heard of yet", rec: wish("n", "c", 0, "", 1), want: rpc.AgentOffline, before: func(g *grid) {
			g.Load([]*sutrav1.Agent{host("c")}, nil, nil, g.now)
		}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			g := newGrid(t)
			g.register(host("a"))
			g.register(host("b"))
			g.reserve(wish("held", "a", 1000, "/held", 200))
			g.reserve(wish("auto", "a", 0, "", 50))
			auto := wish("auto", "a", 1001, "/data/auto", 100).GetNode()
			auto.Phase, auto.Revision = running, 1
			stranger := wish("stranger", "a", 1002, "/elsewhere", 0).GetNode()
			stranger.Phase, stranger.Revision = running, 2
			g.Observe(auto, g.now)
			g.Observe(stranger, g.now)
			if c.before != nil {
				c.before(g)
			}
			ids, requests := g.ids(), len(g.requests)

			c.rec.RequestId = "r"
			r, err := g.Reserve(c.rec, g.now)
			wantReason(t, err, c.want)
			if got := rpc.AsError(err); got != nil && got.Meta["node_id"] != c.holder {
				t.Errorf("the refusal names node %q as the holder, want %q", got.Meta["node_id"], c.holder)
			}
			if err != nil {
				wantIDs(t, g.ids(), ids...)
				if len(g.requests) != requests {
					t.Error("the refused request left its id behind")
				}
				return
			}
			if r.Existing || r.Record != c.rec {
				t.Errorf("got %+v, want the new record", r)
			}
			_, err = g.Reserve(wish("second", c.rec.GetNode().GetAgentId(), 0, "/held", 1000), g.now)
			if err == nil {
				t.Error("what is reserved can be reserved again")
			}
			r.Done()
		})
	}
}

func TestRequestIDNamesOneNode(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"))
	first := wants("n", "a")
	first.RequestId = "r"
	r, err := g.Reserve(first, g.now)
	wantReason(t, err, "")

	again := func() Reservation {
		t.Helper()
		second := wants("other", "a")
		second.RequestId = "r"
		got, err := g.Reserve(second, g.now)
		wantReason(t, err, "")
		if !got.Existing || got.Done != nil || !g.Requested("r") {
			t.Fatalf("the request was taken for a new one: %+v", got)
		}
		if got.Record.GetNode().GetNodeId() != "n" {
			t.Fatalf("got the record of %q, want that of n", got.Record.GetNode().GetNodeId())
		}
		return got
	}
	waiting := again().Spawning
	select {
	case <-waiting:
		t.Fatal("the spawn has its outcome before Done")
	default:
	}
	if !g.States(g.now)[0].Busy {
		t.Error("the reconciler isn't kept off a node that is being made")
	}
	g.touched()
	r.Done()
	<-waiting
	if !g.touched() || g.States(g.now)[0].Busy {
		t.Error("the reconciler isn't told that the node is left to it")
	}
	if again().Spawning != nil {
		t.Error("the spawn is still under way after Done")
	}

	g.pass(time.Minute) // the agent is offline: what is known doesn't depend on it
	again()
	ended := g.end("n", stopped)
	again()
	g.Bury(ended)
	again()
	g.Observe(says("n", "a", running, 1), g.now) // its agent comes back with it
	again()
	g.Prune(g.now.Add(time.Second), g.now.Add(time.Second))
	if g.Requested("r") || len(g.requests) != 0 {
		t.Error("the request is still known when its tombstone is gone")
	}
}

func TestUndoneRequestIsNew(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"))
	rec := wants("n", "a")
	rec.RequestId = "r"
	r, _ := g.Reserve(rec, g.now)
	g.Drop("n")
	r.Done()
	if g.Requested("r") || len(g.ids()) != 0 {
		t.Fatal("the undone node left something behind")
	}
	retry := wants("m", "a")
	retry.RequestId = "r"
	if r, err := g.Reserve(retry, g.now); err != nil || r.Existing {
		t.Fatalf("got %+v, %v; want a new node", r, err)
	}
	g.Drop("n")
	if !g.Requested("r") {
		t.Error("a second undoing of the old node took the new one's request")
	}
	// The undone record was still on disk, and ended after a restart of the master.
	old := wants("n", "a")
	old.RequestId = "r"
	old.EndedAt = timestamppb.New(g.now)
	g.Put(retry)
	g.Bury(old)
	if r, _ := g.Reserve(wishOf("r"), g.now); r.Record != retry {
		t.Errorf("the request leads to %v, want the live node", r.Record)
	}
	g.Prune(g.now, g.now.Add(1))
	if g.Removed("n") {
		t.Error("the old tombstone is still there")
	}
	if r, _ := g.Reserve(wishOf("r"), g.now); r.Record != retry {
		t.Errorf("the request leads to %v, want the live node", r.Record)
	}
}

func wishOf(requestID string) *sutrav1.NodeRecord {
	rec := wants("any", "a")
	rec.RequestId = requestID
	return rec
}

func TestNoRequestIDIsNoRequest(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"))
	g.reserve(wants("n1", "a"))
	g.reserve(wants("n2", "a"))
	if g.Requested("") || len(g.requests) != 0 {
		t.Error("an empty request id is remembered")
	}
	wantIDs(t, g.ids(), "n1", "n2")
}

func TestOneOfManyGetsAPort(t *testing.T) {
	g := newGrid(t)
	a := host("a")
	a.MaxNodes = 1000
	g.register(a)
	const callers = 100
	results := make([]error, callers)
	var group sync.WaitGroup
	begin := make(chan struct{})
	for i := range callers {
		group.Go(func() {
			<-begin
			r, err := g.Reserve(wish(fmt.Sprint("n", i), "a", 1000, "", 0), g.now)
			if err == nil {
				g.Put(r.Record)
				r.Done()
			}
			results[i] = err
		})
	}
	close(begin)
	group.Wait()
	won := 0
	for _, err := range results {
		if err == nil {
			won++
			continue
		}
		wantReason(t, err, rpc.PortInUse)
	}
	if won != 1 || len(g.ids()) != 1 {
		t.Errorf("%d callers got the port, and there are %d nodes", won, len(g.ids()))
	}
}

func TestOneOfManyMakesARequestsNode(t *testing.T) {
	g := newGrid(t)
	a := host("a")
	a.MaxNodes = 1000
	g.register(a)
	made := make(chan string, 100)
	var group sync.WaitGroup
	for i := range cap(made) {
		group.Go(func() {
			rec := wants(fmt.Sprint("n", i), "a")
			rec.RequestId = "r"
			r, err := g.Reserve(rec, g.now)
			if err != nil {
				t.Error(err)
				return
			}
			if !r.Existing {
				r.Done()
			} else if r.Spawning != nil {
				<-r.Spawning
			}
			made <- r.Record.GetNode().GetNodeId()
		})
	}
	group.Wait()
	close(made)
	first := <-made
	for id := range made {
		if id != first {
			t.Fatalf("one request led to %s and to %s", first, id)
		}
	}
	wantIDs(t, g.ids(), first)
}
