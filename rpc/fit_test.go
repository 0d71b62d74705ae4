package rpc

import (
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func TestFit(t *testing.T) {
	node := func(port uint32, path string, memory uint32) *sutrav1.Node {
		return &sutrav1.Node{NodeId: "node-1", Port: port, StoragePath: path, MemoryLimitMb: memory}
	}
	type nodes = []*sutrav1.Node
	for name, c := range map[string]struct {
		live   nodes
		want   *sutrav1.Node
		reason Reason // "": it fits
	}{
		"an empty agent":                {nil, node(50051, "/a", 512), ""},
		"another port and path":         {nodes{node(50051, "/a", 400)}, node(50052, "/b", 400), ""},
		"the same port":                 {nodes{node(50052, "/a", 0), node(50051, "/b", 0)}, node(50051, "/c", 0), PortInUse},
		"no port yet on either side":    {nodes{node(0, "/a", 0)}, node(0, "/b", 0), ""},
		"no port yet here":              {nodes{node(50051, "/a", 0)}, node(0, "/b", 0), ""},
		"no port yet there":             {nodes{node(0, "/a", 0)}, node(50051, "/b", 0), ""},
		"the same path":                 {nodes{node(1, "/a", 0)}, node(2, "/a", 0), PathInUse},
		"the same path, said otherwise": {nodes{node(1, "/a/b", 0)}, node(2, "/a//./b/", 0), PathInUse},
		"a path within another":         {nodes{node(1, "/a", 0)}, node(2, "/a/b", 0), PathInUse},
		"a path around another":         {nodes{node(1, "/a/b/c", 0)}, node(2, "/a/b", 0), PathInUse},
		"a path that starts alike":      {nodes{node(1, "/a", 0)}, node(2, "/ab", 0), ""},
		"a path that starts alike, two": {nodes{node(1, "/ab", 0)}, node(2, "/a", 0), ""},
		"siblings":                      {nodes{node(1, "/a/b", 0)}, node(2, "/a/c", 0), ""},
		"the root":                      {nodes{node(1, "/a", 0)}, node(2, "/", 0), PathInUse},
		"within the root":               {nodes{node(1, "/", 0)}, node(2, "/a", 0), PathInUse},
		"no path yet":                   {nodes{node(1, "", 0)}, node(2, "", 0), ""},
		"memory to the last":            {nodes{node(1, "/a", 600)}, node(2, "/b", 400), ""},
		"memory and one":                {nodes{node(1, "/a", 300), node(2, "/b", 300)}, node(3, "/c", 401), MemoryOverCommitted},
		"memory without bounds":         {nodes{node(1, "/a", 600)}, node(2, "/b", math.MaxUint32-599), MemoryOverCommitted},
		"memory promised twice over":    {nodes{node(1, "/a", math.MaxUint32), node(2, "/b", 2)}, node(3, "/c", 1), MemoryOverCommitted},
		"one slot left":                 {nodes{node(1, "/a", 0), node(2, "/b", 0)}, node(3, "/c", 0), ""},
		"no slot left":                  {nodes{node(1, "/a", 0), node(2, "/b", 0), node(4, "/d", 0)}, node(3, "/c", 0), AgentFull},
	} {
		t.Run(name, func(t *testing.T) {
			e := Fit(&sutrav1.Agent{AgentId: "agent-001", MaxNodes: 3, MemoryTotalMb: 1000}, c.live, c.want)
			if e == nil {
				if c.reason != "" {
					t.Errorf("fits, want %s", c.reason)
				}
				return
			}
			if e.Reason != c.reason || !strings.Contains(e.Message, "agent-001") || e.Hint == "" {
				t.Errorf("got %s %q (hint %q), want %q with the agent's name and a hint", e.Reason, e.Message, e.Hint, c.reason)
			}
			if (c.reason == PortInUse || c.reason == PathInUse) && e.Meta["node_id"] != "node-1" {
				t.Errorf("meta %v doesn't name the node", e.Meta)
			}
		})
	}
	if e := Fit(&sutrav1.Agent{MaxNodes: 9}, nodes{node(1, "/a", 1<<30)}, node(2, "/b", 1<<30)); e != nil {
		t.Errorf("an agent that doesn't say its memory is bounded: %v", e)
	}
	if e := Fit(&sutrav1.Agent{}, nil, node(1, "/a", 0)); ReasonOf(e) != AgentFull {
		t.Errorf("an agent without slots takes a node: %v", e)
	}
}

func TestClashesAreMutual(t *testing.T) {
	roomy := &sutrav1.Agent{AgentId: "agent-001", MaxNodes: 9}
	rapid.Check(t, func(t *rapid.T) {
		draw := func(name string) *sutrav1.Node {
			parts := rapid.SliceOfN(rapid.SampledFrom([]string{"a", "b", "ab", ".", ""}), 0, 4).Draw(t, name+" path")
			path := "/" + strings.Join(parts, "/")
			if rapid.Bool().Draw(t, name+" has no path") {
				path = ""
			}
			return &sutrav1.Node{NodeId: name, Port: uint32(rapid.IntRange(0, 2).Draw(t, name+" port")), StoragePath: path}
		}
		a, b := draw("a"), draw("b")
		reason := func(live, want *sutrav1.Node) Reason {
			if e := Fit(roomy, []*sutrav1.Node{live}, want); e != nil {
				return e.Reason
			}
			return ""
		}
		if x, y := reason(a, b), reason(b, a); x != y {
			t.Errorf("b beside a: %q, a beside b: %q", x, y)
		}
		if self := reason(a, a); (self == "") != (a.GetPort() == 0 && a.GetStoragePath() == "") {
			t.Errorf("a beside itself: %q", self)
		}
	})
}
