package nodes

import (
	"flag"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"pgregory.net/rapid"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// follower is what the master makes of an agent's changes.
type follower struct {
	nodes        map[string]*sutrav1.Node
	acknowledged uint64
}

// poll takes in what changed; an answer that is lost is asked for again with the next poll.
func (f *follower) poll(m *Manager, lost bool) {
	changed, gone, now := m.Changes(f.acknowledged)
	if lost {
		return
	}
	for _, id := range gone {
		delete(f.nodes, id)
	}
	for _, n := range changed {
		f.nodes[n.GetNodeId()] = n
	}
	f.acknowledged = now
}

func (f *follower) sorted() []*sutrav1.Node {
	var all []*sutrav1.Node
	for _, n := range f.nodes {
		all = append(all, n)
	}
	slices.SortFunc(all, func(a, b *sutrav1.Node) int { return strings.Compare(a.GetNodeId(), b.GetNodeId()) })
	return all
}

// Whoever follows the changes, with answers lost on the way, knows what is there.
func TestChangesAddUp(t *testing.T) {
	if err := flag.Set("rapid.checks", "25"); err != nil { // each starts and stops a dozen processes
		t.Fatal(err)
	}
	rounds := 0
	rapid.Check(t, func(rt *rapid.T) {
		rounds++
		m := newManager(t)
		defer shut(t, m)
		f := &follower{nodes: map[string]*sutrav1.Node{}}
		id := rapid.Map(rapid.IntRange(0, 4), func(i int) string { return fmt.Sprintf("node-%d", i) })
		rt.Repeat(map[string]func(*rapid.T){
			"spawn": func(rt *rapid.T) {
				if _, err := m.Spawn(t.Context(), want(id.Draw(rt, "id"))); err != nil {
					rt.Fatal(err)
				}
			},
			"die early": func(rt *rapid.T) {
				n := id.Draw(rt, "id")
				if _, known := m.Get(n); !known {
					_, _ = m.Spawn(t.Context(), want(n, as("dying"))) // its end is another test's
				}
			},
			"stop": func(rt *rapid.T) {
				if _, err := m.Stop(t.Context(), id.Draw(rt, "id")); err != nil {
					rt.Fatal(err)
				}
			},
			"poll": func(rt *rapid.T) { f.poll(m, rapid.Bool().Draw(rt, "lost")) },
			"": func(rt *rapid.T) {
				f.poll(m, false)
				if diff := cmp.Diff(m.List(), f.sorted(), protocmp.Transform()); diff != "" {
					rt.Fatalf("nodes (-there +followed):\n%s", diff)
				}
				changed, gone, now := m.Changes(f.acknowledged)
				if len(changed)+len(gone) > 0 || now != f.acknowledged {
					rt.Fatalf("nothing has happened since %d, and changes to %d are %v, %v", f.acknowledged, now, changed, gone)
				}
				for _, n := range m.List() {
					if changed, _, _ := m.Changes(n.GetRevision() - 1); !slices.ContainsFunc(changed,
						func(c *sutrav1.Node) bool { return c.GetNodeId() == n.GetNodeId() }) {
						rt.Fatalf("since before %v, these have changed: %v", n, changed)
					}
				}
				if len(m.gone) > 0 {
					rt.Fatalf("what was passed on is kept: %v", m.gone)
				}
			},
		})
	})
	if rounds == 0 {
		t.Error("nothing was tried")
	}
}

// A change is announced, gets a higher revision than all before, and is told until it is acknowledged.
func TestChangesTellOfACrash(t *testing.T) {
	m := newManager(t)
	n := mustSpawn(t, m, want("node-1"))
	quiet := mustSpawn(t, m, want("node-2"))
	_, _, seen := m.Changes(0)
	select {
	case <-m.Dirty():
	default:
		t.Error("two spawns weren't announced")
	}
	if err := syscall.Kill(int(n.GetPid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	again := awaitPhaseAfter(t, m, n)
	<-m.Dirty()
	if again.GetRestartCount() != 1 || again.GetLastExit().GetSignal() != "SIGKILL" || again.GetRevision() <= seen || again.GetPort() != n.GetPort() {
		t.Errorf("was %v\nand is %v", n, again)
	}
	for range 2 { // the first answer may be lost
		changed, gone, now := m.Changes(seen)
		if len(changed) != 1 || changed[0].GetNodeId() != "node-1" || len(gone) > 0 || now < again.GetRevision() {
			t.Errorf("changes since %d: %v, %v, up to %d", seen, changed, gone, now)
		}
	}
	for range 2 {
		if _, err := m.Stop(t.Context(), quiet.GetNodeId()); err != nil {
			t.Fatal(err)
		}
		if _, gone, _ := m.Changes(again.GetRevision()); !slices.Equal(gone, []string{"node-2"}) {
			t.Errorf("gone: %v", gone)
		}
	}
}

func awaitPhaseAfter(t *testing.T, m *Manager, was *sutrav1.Node) *sutrav1.Node {
	t.Helper()
	var n *sutrav1.Node
	await(t, was.GetNodeId()+" to be restarted", func() error {
		n, _ = m.Get(was.GetNodeId())
		if n.GetPhase() != sutrav1.Phase_PHASE_RUNNING || n.GetPid() == was.GetPid() {
			return fmt.Errorf("it is %v", n)
		}
		return nil
	})
	return n
}
