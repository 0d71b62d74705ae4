package placement

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/registry"
	"github.com/sutra-grid/sutra/rpc"
)

// agent is a healthy candidate with some of its slots taken.
func agent(id string, slots, of int) registry.Candidate {
	c := registry.Candidate{State: health.Healthy, Agent: &sutrav1.Agent{
		AgentId: id, MaxNodes: uint32(of), MemoryTotalMb: 1000, DefaultMemoryMb: 100, Profiles: []string{"default", "redis"},
	}}
	for i := range slots {
		c.Slots = append(c.Slots, &sutrav1.Node{
			NodeId: id + "-node-" + string(rune('a'+i)), AgentId: id, Port: uint32(1000 + i), StoragePath: "/" + string(rune('a'+i)),
		})
	}
	return c
}

// but changes a candidate.
func but(c registry.Candidate, change func(*registry.Candidate)) registry.Candidate {
	change(&c)
	return c
}

func TestChoose(t *testing.T) {
	node := &sutrav1.Node{Profile: "default"}
	cases := []struct {
		name  string
		among []registry.Candidate
		want  *sutrav1.Node
		gets  string
	}{
		{"the only one", []registry.Candidate{agent("a", 0, 1)}, node, "a"},
		{"smallest part taken", []registry.Candidate{agent("a", 1, 2), agent("b", 2, 5), agent("c", 1, 2)}, node, "b"},
		{"same part, fewest nodes", []registry.Candidate{agent("a", 2, 4), agent("b", 1, 2)}, node, "b"},
		{"all empty, by id", []registry.Candidate{agent("c", 0, 9), agent("a", 0, 1), agent("b", 0, 5)}, node, "a"},
		{"the emptiest isn't healthy", []registry.Candidate{
			but(agent("a", 0, 5), func(c *registry.Candidate) { c.State = health.Degraded }), agent("b", 4, 5),
		}, node, "b"},
		{"the emptiest is draining", []registry.Candidate{
			but(agent("a", 0, 5), func(c *registry.Candidate) { c.Agent.Draining = true }), agent("b", 4, 5),
		}, node, "b"},
		{"the emptiest can't run it", []registry.Candidate{
			but(agent("a", 0, 5), func(c *registry.Candidate) { c.Agent.Profiles = []string{"default"} }), agent("b", 4, 5),
		}, &sutrav1.Node{Profile: "redis"}, "b"},
		{"port taken on the emptiest", []registry.Candidate{agent("a", 1, 9), agent("b", 0, 0), but(agent("c", 4, 5), func(c *registry.Candidate) {
			c.Slots = slices.Clone(c.Slots)[1:]
		})}, &sutrav1.Node{Profile: "default", Port: 1000}, "c"},
		{"no memory for the default on the emptiest", []registry.Candidate{
			but(agent("a", 0, 5), func(c *registry.Candidate) { c.Agent.DefaultMemoryMb = 1001 }), agent("b", 4, 5),
		}, node, "b"},
		{"the default doesn't matter to a node with its own limit", []registry.Candidate{
			but(agent("a", 0, 5), func(c *registry.Candidate) { c.Agent.DefaultMemoryMb = 1001 }), agent("b", 4, 5),
		}, &sutrav1.Node{Profile: "default", MemoryLimitMb: 1}, "a"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			before := proto.CloneOf(c.want)
			got, err := Choose(c.among, c.want)
			if err != nil || got != c.gets {
				t.Errorf("got %q (%v), want %q", got, err, c.gets)
			}
			if !proto.Equal(c.want, before) {
				t.Errorf("the wish was changed to %v", c.want)
			}
		})
	}
}

func TestWhyNoAgentCanTakeANode(t *testing.T) {
	state := func(s health.State) func(*registry.Candidate) {
		return func(c *registry.Candidate) { c.State = s }
	}
	away := but(agent("a", 0, 5), state(health.Offline))
	cases := []struct {
		name   string
		among  []registry.Candidate
		want   *sutrav1.Node
		reason rpc.Reason
		says   []string
		nodeID string
	}{
		{name: "none there", reason: rpc.NoAgentAvailable, says: []string{"no agent is registered"}},
		{
			name: "none healthy", reason: rpc.NoAgentAvailable,
			among: []registry.Candidate{away, but(agent("b", 0, 5), state(health.Degraded)), but(agent("c", 0, 5), state(health.Unknown))},
			says:  []string{"a is OFFLINE; b is DEGRADED; c is UNKNOWN"},
		},
		{
			name: "draining", reason: rpc.NoAgentAvailable, says: []string{"b is draining"},
			among: []registry.Candidate{but(agent("b", 0, 5), func(c *registry.Candidate) { c.Agent.Draining = true })},
		},
		{
			name: "a profile of an agent that is away", reason: rpc.NoAgentAvailable, says: []string{"b has no profile nginx", "a is OFFLINE"},
			among: []registry.Candidate{
				but(but(agent("a", 0, 5), state(health.Offline)), func(c *registry.Candidate) { c.Agent.Profiles = []string{"nginx"} }), agent("b", 0, 5),
			},
			want: &sutrav1.Node{Profile: "nginx"},
		},
		{
			name: "a profile that nobody has", reason: rpc.InvalidArgument, says: []string{`no agent has "nginx"`, "default, redis"},
			among: []registry.Candidate{away, agent("b", 0, 5)}, want: &sutrav1.Node{Profile: "nginx"},
		},
		{
			name: "full", reason: rpc.AgentFull, says: []string{"a is OFFLINE", "agent b is full: it runs 2 of at most 2 nodes"},
			among: []registry.Candidate{away, agent("b", 2, 2)},
		},
		{
			name: "port", reason: rpc.PortInUse, says: []string{"a is OFFLINE", "port 1001 on b belongs to node b-node-b"}, nodeID: "b-node-b",
			among: []registry.Candidate{away, agent("b", 2, 5)}, want: &sutrav1.Node{Profile: "default", Port: 1001},
		},
		{
			name: "path", reason: rpc.PathInUse, says: []string{"storage path /a/x on b"}, nodeID: "b-node-a",
			among: []registry.Candidate{agent("b", 2, 5)}, want: &sutrav1.Node{Profile: "default", StoragePath: "/a/x"},
		},
		{
			name: "memory", reason: rpc.MemoryOverCommitted, says: []string{"agent b has 1000 MiB"},
			among: []registry.Candidate{agent("b", 2, 5)}, want: &sutrav1.Node{Profile: "default", MemoryLimitMb: 1001},
		},
		{
			name: "the first that could be asked counts", reason: rpc.PortInUse, nodeID: "b-node-a",
			says:  []string{"port 1000 on b", "agent c is full"},
			among: []registry.Candidate{agent("b", 1, 5), agent("c", 0, 0)}, want: &sutrav1.Node{Profile: "default", Port: 1000},
		},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if c.want == nil {
				c.want = &sutrav1.Node{Profile: "default"}
			}
			got, err := Choose(c.among, c.want)
			e := rpc.AsError(err)
			if e == nil || got != "" {
				t.Fatalf("got %q, %v; want an error", got, err)
			}
			if e.Reason != c.reason || e.Hint == "" || e.Meta["node_id"] != c.nodeID {
				t.Errorf("got %s, hint %q, node %q; want %s with a hint and node %q", e.Reason, e.Hint, e.Meta["node_id"], c.reason, c.nodeID)
			}
			for _, part := range c.says {
				if !strings.Contains(e.Message, part) {
					t.Errorf("%q doesn't say %q", e.Message, part)
				}
			}
		})
	}
}

func TestChooseKeepsItsRules(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var among []registry.Candidate
		for i := range rapid.IntRange(0, 6).Draw(t, "agents") {
			of := rapid.IntRange(0, 5).Draw(t, "max")
			c := agent(string(rune('a'+i)), rapid.IntRange(0, of).Draw(t, "taken"), of)
			c.State = rapid.SampledFrom([]health.State{health.Healthy, health.Healthy, health.Healthy, health.Degraded, health.Offline, health.Unknown}).Draw(t, "state")
			c.Agent.Draining = rapid.IntRange(0, 5).Draw(t, "draining") == 0
			c.Agent.DefaultMemoryMb = rapid.SampledFrom([]uint32{0, 100, 2000}).Draw(t, "default memory")
			among = append(among, c)
		}
		want := &sutrav1.Node{
			Profile:       rapid.SampledFrom([]string{"default", "redis", "none"}).Draw(t, "profile"),
			Port:          rapid.SampledFrom([]uint32{0, 1000, 1002}).Draw(t, "port"),
			StoragePath:   rapid.SampledFrom([]string{"", "/b", "/new"}).Draw(t, "path"),
			MemoryLimitMb: rapid.SampledFrom([]uint32{0, 900, 1100}).Draw(t, "memory"),
		}
		got, err := Choose(among, want)
		if again, _ := Choose(rapid.Permutation(among).Draw(t, "other order"), want); again != got {
			t.Fatalf("in another order %q is chosen, not %q", again, got)
		}
		if (got == "") != (err != nil) {
			t.Fatalf("got %q and %v", got, err)
		}
		part := func(c registry.Candidate) float64 { return float64(len(c.Slots)) / float64(c.Agent.GetMaxNodes()) }
		var chosen *registry.Candidate
		var able []registry.Candidate
		for _, c := range among {
			onIt := proto.CloneOf(want)
			if onIt.GetMemoryLimitMb() == 0 {
				onIt.MemoryLimitMb = c.Agent.GetDefaultMemoryMb()
			}
			if c.State == health.Healthy && !c.Agent.GetDraining() && slices.Contains(c.Agent.GetProfiles(), want.GetProfile()) &&
				rpc.Fit(c.Agent, c.Slots, onIt) == nil {
				able = append(able, c)
				if c.Agent.GetAgentId() == got {
					chosen = &c
				}
			}
		}
		if (chosen == nil) != (len(able) == 0) {
			t.Fatalf("chose %q (%v) of the able %v", got, err, able)
		}
		for _, c := range able {
			switch p, best := part(c), part(*chosen); {
			case p < best,
				p == best && len(c.Slots) < len(chosen.Slots),
				p == best && len(c.Slots) == len(chosen.Slots) && c.Agent.GetAgentId() < got:
				t.Fatalf("chose %q, and %q comes first", got, c.Agent.GetAgentId())
			}
		}
	})
}
