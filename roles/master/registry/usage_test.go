package registry

import (
	"testing"

	"google.golang.org/protobuf/proto"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// What a node uses comes with beats and answers, and is that of the process that was seen last.
func TestUsage(t *testing.T) {
	use := func(bytes uint64) *sutrav1.Usage { return &sutrav1.Usage{MemoryBytes: bytes} }
	said := func(pid int32, revision uint64, u *sutrav1.Usage) *sutrav1.Node {
		n := says("n", "a", running, revision)
		n.Pid, n.Usage = pid, u
		return n
	}
	g := newGrid(t)
	g.register(host("a"), said(1, 1, nil))
	g.register(host("b"))
	g.Put(wants("n", "a"))
	sequence := uint64(0)
	beat := func(agent string, full bool, u *sutrav1.Usage, changed ...*sutrav1.Node) {
		sequence++
		g.beat(&sutrav1.HeartbeatRequest{
			AgentId: agent, Epoch: 1, Sequence: sequence, Full: full, Changed: changed,
			Usage: []*sutrav1.NodeUsage{{NodeId: "n", Usage: u}, {NodeId: "unknown", Usage: u}},
		})
	}
	handed := g.node("n").Node
	for _, step := range []struct {
		name string
		take func()
		want *sutrav1.Usage
	}{
		{"nothing was measured", func() {}, nil},
		{"a beat", func() { g.touched(); beat("a", false, use(1)) }, use(1)},
		{"another agent's", func() { beat("b", false, use(9)) }, use(1)},
		{"a change without", func() { g.Observe(said(1, 2, nil), g.now) }, use(1)},
		{"an answer", func() { g.Observe(said(1, 3, use(3)), g.now) }, use(3)},
		{"an answer that was overtaken", func() { g.Observe(said(1, 2, use(2)), g.now) }, use(3)},
		{"another process", func() { g.Observe(said(2, 4, nil), g.now) }, nil},
		{"a full beat", func() { beat("a", true, use(5), said(2, 4, nil)) }, use(5)},
		{"gone", func() { g.Gone("n") }, nil},
		{"measured, and not there any more", func() { beat("a", false, use(7)) }, nil},
	} {
		step.take()
		if got := g.node("n").Node.GetUsage(); !proto.Equal(got, step.want) {
			t.Errorf("%s: usage %v, want %v", step.name, got, step.want)
		}
	}
	if handed.GetUsage() != nil {
		t.Error("what was handed out before was changed")
	}
	g.touched()
	beat("a", false, use(8))
	if g.touched() {
		t.Error("usage is taken for a change")
	}
}
