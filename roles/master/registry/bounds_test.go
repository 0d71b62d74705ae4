package registry

import (
	"fmt"
	"strings"
	"testing"
	"time"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// What an agent makes up fills no master; what is wanted there is believed all the same.
func TestAnAgentThatMakesNodesUp(t *testing.T) {
	g := newGrid(t)
	g.register(host("a"))
	g.register(host("b"))
	g.Put(wants("wanted", "a"))
	beat := &sutrav1.HeartbeatRequest{AgentId: "a", Epoch: 1, Full: true}
	for i := range maxOfAgent + 500 {
		beat.Changed = append(beat.Changed, says(fmt.Sprintf("node-%d", i), "a", running, 1))
	}
	beat.Changed = append(beat.Changed, says("wanted", "a", running, 1))
	beat.Sequence++
	g.beat(beat)
	if n := len(g.Nodes("a", true, g.now)); n != maxOfAgent {
		t.Errorf("%d nodes were taken in, want %d", n, maxOfAgent)
	}
	if g.node("wanted").Node.GetPhase() != running {
		t.Errorf("what is wanted isn't believed: %v", g.node("wanted"))
	}
	if ignored := g.Ignored(); len(ignored) != 1 || ignored["a"] != 501 {
		t.Errorf("ignored %v, want 501 of a", ignored)
	}
	if again := g.Ignored(); again != nil {
		t.Errorf("told twice: %v", again)
	}
	// Each can be believed by itself, or not.
	for name, n := range map[string]*sutrav1.Node{
		"an id that can't be":   says("../x", "b", running, 1),
		"an id without an end":  says(strings.Repeat("x", 65), "b", running, 1),
		"a reason without end":  {NodeId: "n", AgentId: "b", Phase: running, Reason: strings.Repeat("x", maxStatement)},
		"a storage path as big": {NodeId: "n", AgentId: "b", Phase: running, StoragePath: "/" + strings.Repeat("x", maxStatement)},
	} {
		g.Observe(n, g.now)
		if ignored := g.Ignored(); ignored["b"] != 1 {
			t.Errorf("%s: ignored %v", name, ignored)
		}
		if _, there := g.Node(n.GetNodeId(), g.now.Add(time.Second)); there {
			t.Errorf("%s was taken in", name)
		}
	}
	g.Observe(says("n", "b", running, 1), g.now)
	if g.Ignored() != nil || g.node("n").Node.GetPhase() != running {
		t.Error("a node that can be wasn't taken in")
	}
}

// Each registration is written down: one agent's can't fill the disk.
func TestAnAgentThatRegistersAllTheTime(t *testing.T) {
	g := newGrid(t)
	taken := 0
	claim := func(id string) error {
		_, err := g.Claim(host(id), g.now)
		return err
	}
	for range 3 * claimBurst {
		if claim("a") == nil {
			taken++
		}
	}
	if taken != claimBurst {
		t.Errorf("%d registrations at once were taken, want %d", taken, claimBurst)
	}
	wantReason(t, claim("a"), rpc.TooManyRequests)
	if err := claim("b"); err != nil {
		t.Errorf("another agent: %v", err)
	}
	g.pass(claimEvery)
	if err := claim("a"); err != nil {
		t.Errorf("later: %v", err)
	}
	wantReason(t, claim("a"), rpc.TooManyRequests)
}
