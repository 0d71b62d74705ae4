package store

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/testing/protocmp"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func load(t *testing.T, s *Store) State {
	t.Helper()
	st, err := s.Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func wantState(t *testing.T, s *Store, want State) {
	t.Helper()
	if diff := cmp.Diff(want, load(t, s), protocmp.Transform()); diff != "" {
		t.Errorf("state (-want +got):\n%s", diff)
	}
}

func TestStateSurvivesRestart(t *testing.T) {
	dir := home(t)
	s := open(t, dir)
	ctx := t.Context()
	wantState(t, s, State{})
	grid := s.GridID()
	if len(grid) != 20 {
		t.Errorf("grid id is %q, want an xid", grid)
	}

	a1 := &sutrav1.Agent{AgentId: "agent-001", Endpoint: "10.0.0.1:8001", Labels: map[string]string{"rack": "a", "zone": "z"}, Epoch: 7}
	a2 := &sutrav1.Agent{AgentId: "agent-002", InstanceId: "instance"}
	changed := node("node-b")
	changed.Confirmed = true
	buried := endedNode("node-c", sutrav1.Phase_PHASE_STOPPED, epoch)
	for what, write := range map[string]func() error{
		"agents": func() error {
			if err := s.SaveAgent(ctx, a2); err != nil {
				return err
			}
			return s.SaveAgent(ctx, a1)
		},
		"a changed node": func() error {
			if err := s.SaveNode(ctx, node("node-b")); err != nil {
				return err
			}
			return s.SaveNode(ctx, changed)
		},
		"a node": func() error { return s.SaveNode(ctx, node("node-a")) },
		"a buried node": func() error {
			if err := s.SaveNode(ctx, node("node-c")); err != nil {
				return err
			}
			return s.BuryNode(ctx, buried)
		},
		"a forgotten node": func() error {
			if err := s.SaveNode(ctx, node("node-d")); err != nil {
				return err
			}
			return s.ForgetNode(ctx, "node-d")
		},
		"an unknown node": func() error { return s.ForgetNode(ctx, "node-e") },
	} {
		if err := write(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	want := State{
		Agents:     []*sutrav1.Agent{a1, a2},
		Nodes:      []*sutrav1.NodeRecord{node("node-a"), changed},
		Tombstones: []*sutrav1.NodeRecord{buried},
	}
	wantState(t, s, want)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = open(t, dir)
	wantState(t, s, want)
	if s.GridID() != grid {
		t.Errorf("grid id is %s, was %s", s.GridID(), grid)
	}
}

// An agent and a person of one name are two, and neither's ban takes the other's place. What was written before people could
// be banned is still read.
func TestBansSurviveRestart(t *testing.T) {
	dir := home(t)
	s := open(t, dir)
	ctx := t.Context()
	agent, person := &sutrav1.BanRecord{AgentId: "user", BannedBy: "user admin"}, &sutrav1.BanRecord{User: "user", Reason: "left"}
	gone := &sutrav1.BanRecord{User: "agent-001"}
	for _, b := range []*sutrav1.BanRecord{agent, person, gone} {
		if err := s.SaveBan(ctx, b); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.client.Put(ctx, "/sutra/v1/bans/agent-001", "\x0a\x09agent-001\x12\x06stolen"); err != nil {
		t.Fatal(err)
	}
	for range 2 { // ending what has ended is no error
		if err := s.DeleteBan(ctx, gone); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.SaveBan(ctx, &sutrav1.BanRecord{}); err == nil {
		t.Error("a ban of nobody was saved")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	wantState(t, open(t, dir), State{Bans: []*sutrav1.BanRecord{{AgentId: "agent-001", Reason: "stolen"}, agent, person}})
}

// An agent is forgotten only as the one that was judged.
func TestForgetAgent(t *testing.T) {
	s := open(t, home(t))
	ctx := t.Context()
	first, second := &sutrav1.Agent{AgentId: "a", Epoch: 1}, &sutrav1.Agent{AgentId: "a", Epoch: 2}
	for _, a := range []*sutrav1.Agent{first, second, {AgentId: "b"}} {
		if err := s.SaveAgent(ctx, a); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []struct {
		agent *sutrav1.Agent
		want  bool
	}{{first, false}, {second, true}, {second, false}} {
		if got, err := s.ForgetAgent(ctx, step.agent); err != nil || got != step.want {
			t.Errorf("forget %v: %v, %v", step.agent, got, err)
		}
	}
	wantState(t, s, State{Agents: []*sutrav1.Agent{{AgentId: "b"}}})
	if _, err := s.ForgetAgent(ctx, &sutrav1.Agent{}); err == nil {
		t.Error("an agent without an id is forgotten")
	}
}

func TestRecordsThatCantBeSaved(t *testing.T) {
	s := open(t, home(t))
	ctx := t.Context()
	huge := node("node-huge")
	huge.Node.Reason = strings.Repeat("x", 2<<20)
	invalid := node("node-invalid")
	invalid.Node.Reason = "\xff"
	for name, tc := range map[string]struct {
		err  error
		want string
	}{
		"agent without id":    {s.SaveAgent(ctx, &sutrav1.Agent{}), `save agent "": it has no id`},
		"node without id":     {s.SaveNode(ctx, &sutrav1.NodeRecord{}), `save node "": it has no id`},
		"bury without id":     {s.BuryNode(ctx, &sutrav1.NodeRecord{}), `bury node "": it has no id`},
		"bury without an end": {s.BuryNode(ctx, node("node-a")), `bury node "node-a": its ended_at is not set`},
		"too large":           {s.SaveNode(ctx, huge), `save node "node-huge": etcdserver: request is too large`},
		"not UTF-8":           {s.SaveNode(ctx, invalid), `save node "node-invalid": encode: `},
	} {
		if tc.err == nil || !strings.HasPrefix(tc.err.Error(), tc.want) {
			t.Errorf("%s: got %v, want %s", name, tc.err, tc.want)
		}
	}
	wantState(t, s, State{})
}

func TestLoadNamesTheKeyItCantDecode(t *testing.T) {
	other, err := putOp("", "x", node("node-other"))
	if err != nil {
		t.Fatal(err)
	}
	otherNode := string(other.ValueBytes())
	for _, tc := range []struct{ key, value, want string }{
		{agentPrefix + "agent-001", "\xff\xff\xff", "cannot parse"},
		{nodePrefix + "node-a", "\xff\xff\xff", "cannot parse"},
		{tombstonePrefix + "node-a", "\xff\xff\xff", "cannot parse"},
		{agentPrefix + "agent-001", "", `holds agent ""`},
		{nodePrefix + "node-a", otherNode, `holds node "node-other"`},
		{tombstonePrefix + "node-a", otherNode, `holds node "node-other"`},
		{banPrefix + "agent-001", "", `bans ""`},
		{banPrefix + "user/anna", "\x0a\x04anna", `bans "anna"`},
	} {
		s := open(t, home(t))
		if _, err := s.client.Put(t.Context(), tc.key, tc.value); err != nil {
			t.Fatal(err)
		}
		st, err := s.Load(t.Context())
		if err == nil || !strings.Contains(err.Error(), tc.key) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("got %v, want it to name %s and say %s", err, tc.key, tc.want)
		}
		if len(st.Agents)+len(st.Nodes)+len(st.Tombstones)+len(st.Bans) > 0 {
			t.Errorf("%s: a part of the state beside the error", tc.key)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

// fillNodes writes n records quickly.
func fillNodes(t testing.TB, s *Store, n int, record func(id string) *sutrav1.NodeRecord) {
	t.Helper()
	var ops []clientv3.Op
	for i := range n {
		put, err := putOp(nodePrefix, fmt.Sprintf("node-%06d", i), record(fmt.Sprintf("node-%06d", i)))
		if err != nil {
			t.Fatal(err)
		}
		if ops = append(ops, put); len(ops) < 128 && i < n-1 {
			continue
		}
		if _, err := s.commit(t.Context(), nil, ops...); err != nil {
			t.Fatal(err)
		}
		ops = nil
	}
}

// However many pages a read takes, what is written meanwhile isn't in it.
func TestLoadReadsOneMoment(t *testing.T) {
	s := open(t, home(t))
	ctx := t.Context()
	const n = 2*pageSize + 1
	fillNodes(t, s, n, node)
	st := load(t, s)
	if len(st.Nodes) != n {
		t.Fatalf("%d nodes, want %d", len(st.Nodes), n)
	}
	for i, got := range st.Nodes {
		if want := fmt.Sprintf("node-%06d", i); got.GetNode().GetNodeId() != want {
			t.Fatalf("node %d is %s, want %s", i, got.GetNode().GetNodeId(), want)
		}
	}

	seen, last := 0, ""
	err := s.scan(ctx, nodePrefix, func(kv *mvccpb.KeyValue) error {
		last = string(kv.Key)
		if seen++; seen == 1 {
			if err := s.ForgetNode(ctx, fmt.Sprintf("node-%06d", n-1)); err != nil {
				return err
			}
			return s.SaveNode(ctx, node("node-new"))
		}
		return nil
	})
	if want := fmt.Sprintf("%snode-%06d", nodePrefix, n-1); err != nil || seen != n || last != want {
		t.Errorf("%d nodes up to %s, %v; want the %d of the moment, up to %s", seen, last, err, n, want)
	}
}
