package agent

import (
	"context"
	"fmt"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/xid"
	"github.com/rs/zerolog"
	"google.golang.org/grpc"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/agent/nodes"
	"github.com/sutra-grid/sutra/rpc"
)

// patience is how long anything may take that must come.
const patience = 20 * time.Second

// fakeMaster hands each call to the test, which answers it.
type fakeMaster struct {
	sutrav1.UnimplementedGridMasterServer
	registrations chan *sutrav1.RegisterAgentRequest
	beats         chan *sutrav1.HeartbeatRequest
	answers       chan answer // to beats
	leaves        chan *sutrav1.UnregisterAgentRequest
	epoch         uint64
}

type answer struct {
	wantFull bool
	err      error
}

func (m *fakeMaster) RegisterAgent(_ context.Context, req *sutrav1.RegisterAgentRequest) (*sutrav1.RegisterAgentResponse, error) {
	m.epoch++
	m.registrations <- req
	return &sutrav1.RegisterAgentResponse{Epoch: m.epoch}, nil
}

func (m *fakeMaster) Heartbeat(ctx context.Context, req *sutrav1.HeartbeatRequest) (*sutrav1.HeartbeatResponse, error) {
	m.beats <- req
	select {
	case a := <-m.answers:
		return &sutrav1.HeartbeatResponse{WantFull: a.wantFull}, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (m *fakeMaster) UnregisterAgent(_ context.Context, req *sutrav1.UnregisterAgentRequest) (*sutrav1.UnregisterAgentResponse, error) {
	m.leaves <- req
	return &sutrav1.UnregisterAgentResponse{}, nil
}

func next[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("still waiting for %s", what)
		panic("unreachable")
	}
}

// newNodes makes a node manager that runs sleeps.
func newNodes(t *testing.T, self *sutrav1.Agent) *nodes.Manager {
	t.Helper()
	m, err := nodes.New(nodes.Config{
		Agent: self, Host: "127.0.0.1", Home: t.TempDir(), Dir: t.TempDir(), BasePort: 20000, Builtin: "/bin/false", CheckEvery: time.Hour, Log: zerolog.Nop(),
		Profiles: map[string]config.Profile{"default": {
			Name: "default", StorageBinary: "/bin/sleep", Args: []string{"100000"}, Ready: config.Ready{Kind: "none"}, StopSignal: "TERM", StopGrace: patience,
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(true); err != nil {
			t.Error(err)
		}
	})
	return m
}

// spawn runs a node, and returns when there is no more to be said of it.
func spawn(t *testing.T, m *nodes.Manager, id string) {
	t.Helper()
	if err := spawned(t.Context(), m, id); err != nil {
		t.Fatal(err)
	}
}

func spawned(ctx context.Context, m *nodes.Manager, id string) error {
	if _, err := m.Spawn(ctx, &sutrav1.Node{NodeId: id, AgentId: "a", Profile: "default", Generation: 1}); err != nil {
		return err
	}
	for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
		if n, ok := m.Get(id); ok && n.GetHealth() == sutrav1.NodeHealth_NODE_HEALTH_READY {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("node %s isn't ready", id)
		}
	}
}

// An agent tells its master all at first and when asked, what changed together in one beat, the last of it when it
// leaves, and registers again when it was forgotten. No beat comes by the clock.
func TestLink(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	master := &fakeMaster{
		registrations: make(chan *sutrav1.RegisterAgentRequest, 9), beats: make(chan *sutrav1.HeartbeatRequest, 9),
		answers: make(chan answer), leaves: make(chan *sutrav1.UnregisterAgentRequest, 9),
	}
	server := rpc.NewServer(zerolog.Nop(), nil, rpc.Guard{})
	sutrav1.RegisterGridMasterServer(server, master)
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(server.Stop)

	self := &sutrav1.Agent{AgentId: "a", InstanceId: xid.New().String(), MaxNodes: 9, MemoryTotalMb: 1 << 20, DefaultMemoryMb: 16}
	manager := newNodes(t, self)
	l := &link{
		self: self, masters: []string{listener.Addr().String()}, every: time.Hour, nodes: manager,
		metrics: newLinkMetrics(prometheus.NewRegistry()), log: zerolog.Nop(),
	}
	ctx, leave := context.WithCancel(t.Context())
	defer leave()
	ended := make(chan error, 1)
	go func() { ended <- l.run(ctx) }()

	beat := func(what string, epoch, sequence uint64, full bool, changed int) {
		t.Helper()
		b := next(t, what, master.beats)
		if b.GetEpoch() != epoch || b.GetSequence() != sequence || b.GetFull() != full || len(b.GetChanged()) != changed {
			t.Fatalf("%s: epoch %d, sequence %d, full %v, %d changed: %v", what, b.GetEpoch(), b.GetSequence(), b.GetFull(), len(b.GetChanged()), b)
		}
	}
	reply := func(a answer) {
		t.Helper()
		select {
		case master.answers <- a:
		case <-time.After(patience):
			t.Fatal("nobody waits for the answer to a beat")
		}
	}

	if r := next(t, "the registration", master.registrations); len(r.GetNodes()) != 0 || r.GetAgent().GetAgentId() != "a" {
		t.Errorf("it registers as %v", r)
	}
	beat("the first beat", 1, 1, true, 0)
	for _, id := range []string{"n1", "n2", "n3"} {
		spawn(t, manager, id)
	}
	reply(answer{})
	beat("a burst of changes", 1, 2, false, 3)
	reply(answer{wantFull: true})
	beat("the inventory that is asked for", 1, 3, true, 3)
	spawn(t, manager, "n4")
	reply(answer{})
	beat("one change", 1, 4, false, 1)
	reply(answer{err: rpc.Errorf(rpc.AgentNotRegistered, "who?")})
	if r := next(t, "the registration of a forgotten agent", master.registrations); len(r.GetNodes()) != 4 {
		t.Errorf("it registers again with %v", r.GetNodes())
	}
	beat("the first beat of an epoch", 2, 1, true, 4)
	reply(answer{})

	if _, err := manager.Stop(t.Context(), "n1"); err != nil {
		t.Fatal(err)
	}
	leave()
	go func() {
		for {
			select {
			case master.answers <- answer{}:
			case <-t.Context().Done():
				return
			}
		}
	}()
	gone := false
	for open := true; open; {
		select {
		case b := <-master.beats:
			gone = gone || len(b.GetGone()) == 1 && b.GetGone()[0] == "n1"
		case left := <-master.leaves:
			open = false
			if left.GetAgentId() != "a" || left.GetEpoch() != 2 {
				t.Errorf("it leaves as %v", left)
			}
		case <-time.After(patience):
			t.Fatal("it doesn't take its leave")
		}
	}
	if !gone {
		t.Error("the master isn't told the last before the leave")
	}
	if err := next(t, "the end", ended); err != nil {
		t.Error(err)
	}
}

// heard is a master that hands each beat to the test, and answers it as the test says. It isn't called over a network.
type heard struct {
	sutrav1.GridMasterClient
	beats   chan *sutrav1.HeartbeatRequest
	answers chan answer
}

func (h heard) Heartbeat(ctx context.Context, req *sutrav1.HeartbeatRequest, _ ...grpc.CallOption) (*sutrav1.HeartbeatResponse, error) {
	h.beats <- req
	select {
	case a := <-h.answers:
		return &sutrav1.HeartbeatResponse{WantFull: a.wantFull}, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// What changes while changes settle goes out in the same beat, and no beat without news follows. The link has a clock of its
// own, which stands still while the test does something; nodes live in real time.
func TestChangesSettle(t *testing.T) {
	self := &sutrav1.Agent{AgentId: "a", InstanceId: xid.New().String(), MaxNodes: 9, MemoryTotalMb: 1 << 20, DefaultMemoryMb: 16}
	manager := newNodes(t, self)
	wanted, ran := make(chan string), make(chan error)
	defer close(wanted)
	go func() {
		for id := range wanted {
			ran <- spawned(context.WithoutCancel(t.Context()), manager, id)
		}
	}()
	synctest.Test(t, func(t *testing.T) {
		master := heard{beats: make(chan *sutrav1.HeartbeatRequest), answers: make(chan answer)}
		l := &link{
			self: self, masters: []string{"a master"}, every: time.Hour, nodes: manager, client: master,
			metrics: newLinkMetrics(prometheus.NewRegistry()), log: zerolog.Nop(),
		}
		ctx, leave := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			l.beat(ctx)
		}()
		defer func() {
			leave()
			<-ended
		}()
		run := func(ids ...string) {
			t.Helper()
			for _, id := range ids {
				wanted <- id
				if err := <-ran; err != nil {
					t.Fatal(err)
				}
			}
		}
		settling := func(what string) {
			t.Helper()
			synctest.Wait()
			select {
			case b := <-master.beats:
				t.Fatalf("%s, it beats at once: %v", what, b)
			default:
			}
		}
		beat := func(what string, full bool, changed ...string) {
			t.Helper()
			b := <-master.beats
			var ids []string
			for _, n := range b.GetChanged() {
				ids = append(ids, n.GetNodeId())
			}
			if b.GetFull() != full || !slices.Equal(ids, changed) {
				t.Fatalf("%s: full %v, changed %v, want %v", what, b.GetFull(), ids, changed)
			}
			if len(manager.Dirty()) > 0 {
				t.Errorf("after %s, a beat without news is to follow", what)
			}
		}
		beat("the first beat", true)
		run("n1")
		master.answers <- answer{}
		settling("after a change")
		run("n2", "n3")
		beat("what changed meanwhile", false, "n1", "n2", "n3")
		master.answers <- answer{wantFull: true}
		settling("asked for an inventory")
		run("n4")
		beat("the inventory", true, "n1", "n2", "n3", "n4")
		run("n5")
		master.answers <- answer{}
		beat("and nothing but what came after it", false, "n5")
	})
}
