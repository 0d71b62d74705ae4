package reconcile

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/registry"
)

const (
	starting  = sutrav1.Phase_PHASE_STARTING
	running   = sutrav1.Phase_PHASE_RUNNING
	stopping  = sutrav1.Phase_PHASE_STOPPING
	stopped   = sutrav1.Phase_PHASE_STOPPED
	failed    = sutrav1.Phase_PHASE_FAILED
	crashLoop = sutrav1.Phase_PHASE_CRASH_LOOP
)

func noon() time.Time { return time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC) }

// record is what is wanted of a node.
func record(desired sutrav1.Desired, ended sutrav1.Phase, confirmed bool) *sutrav1.NodeRecord {
	return &sutrav1.NodeRecord{Node: &sutrav1.Node{NodeId: "n", AgentId: "a", Desired: desired, Phase: ended}, Confirmed: confirmed}
}

// seen is what an agent says; nil for no phase.
func seen(p sutrav1.Phase) *sutrav1.Node {
	if p == 0 {
		return nil
	}
	return &sutrav1.Node{NodeId: "n", AgentId: "a", Phase: p}
}

func TestPlan(t *testing.T) {
	wanted := record(sutrav1.Desired_DESIRED_RUNNING, 0, true)
	intent := record(sutrav1.Desired_DESIRED_RUNNING, 0, false)
	unwanted := record(sutrav1.Desired_DESIRED_STOPPED, 0, true)
	ended := record(sutrav1.Desired_DESIRED_STOPPED, stopped, true)
	died := record(sutrav1.Desired_DESIRED_STOPPED, failed, false)
	cases := []struct {
		name    string
		record  *sutrav1.NodeRecord
		removed bool
		want    map[sutrav1.Phase]Kind // by what is seen; 0: nothing
	}{
		{"nobody's", nil, false, map[sutrav1.Phase]Kind{
			starting: "", running: Adopt, stopping: "", stopped: "", failed: Stop, crashLoop: Adopt,
		}},
		{"removed", nil, true, map[sutrav1.Phase]Kind{
			starting: Stop, running: Stop, stopping: Stop, stopped: Stop, failed: Stop, crashLoop: Stop,
		}},
		{"wanted", wanted, false, map[sutrav1.Phase]Kind{
			0: Spawn, starting: "", running: "", stopping: "", stopped: "", failed: Spawn, crashLoop: "",
		}},
		{"intended", intent, false, map[sutrav1.Phase]Kind{
			0: Spawn, starting: "", running: Confirm, stopping: "", stopped: "", failed: Bury, crashLoop: "",
		}},
		{"to be stopped", unwanted, false, map[sutrav1.Phase]Kind{
			0: Bury, starting: Stop, running: Stop, stopping: Stop, stopped: Stop, failed: Stop, crashLoop: Stop,
		}},
		{"ended", ended, false, map[sutrav1.Phase]Kind{
			0: "", starting: Stop, running: Stop, stopping: Stop, stopped: Stop, failed: Stop, crashLoop: Stop,
		}},
		{"died", died, false, map[sutrav1.Phase]Kind{
			0: "", starting: Stop, running: Stop, stopping: Stop, stopped: Stop, failed: Stop, crashLoop: Stop,
		}},
	}
	reasons := map[string]Kind{}
	for _, c := range cases {
		for phase, want := range c.want {
			s := registry.NodeState{ID: "n", AgentID: "a", Record: c.record, Removed: c.removed, Seen: seen(phase), Settled: true}
			got := Plan([]registry.NodeState{s}, noon())
			if want == "" {
				if len(got) != 0 {
					t.Errorf("%s, seen %v: got %v, want nothing", c.name, phase, got)
				}
				continue
			}
			if len(got) != 1 || got[0].Kind != want || got[0].NodeID != "n" || got[0].AgentID != "a" || got[0].Reason == "" {
				t.Errorf("%s, seen %v: got %v, want %s with a reason", c.name, phase, got, want)
				continue
			}
			if other, used := reasons[got[0].Reason]; used && other != want {
				t.Errorf("%s and %s are due for one reason: %s", other, want, got[0].Reason)
			}
			reasons[got[0].Reason] = want
			for why, not := range map[string]registry.NodeState{
				"busy":           {ID: s.ID, AgentID: s.AgentID, Record: s.Record, Seen: s.Seen, Removed: s.Removed, Settled: true, Busy: true},
				"not settled":    {ID: s.ID, AgentID: s.AgentID, Record: s.Record, Seen: s.Seen, Removed: s.Removed},
				"not due so far": {ID: s.ID, AgentID: s.AgentID, Record: s.Record, Seen: s.Seen, Removed: s.Removed, Settled: true, RetryAt: noon().Add(1)},
			} {
				if got := Plan([]registry.NodeState{not}, noon()); len(got) != 0 {
					t.Errorf("%s, seen %v, %s: got %v, want nothing", c.name, phase, why, got)
				}
			}
			s.RetryAt = noon()
			if len(Plan([]registry.NodeState{s}, noon())) != 1 {
				t.Errorf("%s, seen %v: not tried again when it is due", c.name, phase)
			}
		}
	}
}

func TestPlanKeepsItsRules(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var states []registry.NodeState
		quiet := map[string]bool{}
		for i := range rapid.IntRange(0, 12).Draw(t, "nodes") {
			s := registry.NodeState{
				ID: string(rune('a' + i)), AgentID: "agent",
				Settled: rapid.IntRange(0, 3).Draw(t, "settled") > 0,
				Busy:    rapid.IntRange(0, 3).Draw(t, "busy") == 0,
				RetryAt: noon().Add(time.Duration(rapid.IntRange(-1, 1).Draw(t, "due"))),
				Seen:    seen(rapid.SampledFrom([]sutrav1.Phase{0, starting, running, failed}).Draw(t, "seen")),
			}
			if s.Seen == nil || rapid.Bool().Draw(t, "recorded") {
				s.Record = record(rapid.SampledFrom([]sutrav1.Desired{sutrav1.Desired_DESIRED_RUNNING, sutrav1.Desired_DESIRED_STOPPED}).Draw(t, "desired"),
					rapid.SampledFrom([]sutrav1.Phase{0, stopped}).Draw(t, "ended"), rapid.Bool().Draw(t, "confirmed"))
			}
			quiet[s.ID] = !s.Settled || s.Busy || noon().Before(s.RetryAt)
			states = append(states, s)
		}
		got := Plan(states, noon())
		if again := Plan(states, noon()); !slices.Equal(got, again) {
			t.Fatalf("planned %v, and then %v", got, again)
		}
		last := ""
		for _, a := range got {
			if a.NodeID <= last {
				t.Fatalf("%s comes after %s: out of order, or twice", a.NodeID, last)
			}
			last = a.NodeID
			if quiet[a.NodeID] {
				t.Fatalf("%v is due for a node that is to be left alone", a)
			}
		}
		// What is due for a node doesn't depend on the others.
		var single []Action
		for _, s := range states {
			single = append(single, Plan([]registry.NodeState{s}, noon())...)
		}
		if !slices.Equal(got, single) {
			t.Fatalf("planned %v, and node by node %v", got, single)
		}
	})
}

// What has run to its end is written down as such and not started again; only then its agent may forget it.
func TestCompletedIsWrittenDown(t *testing.T) {
	for name, c := range map[string]struct {
		state registry.NodeState
		want  Kind
	}{
		"wanted":        {registry.NodeState{Record: record(sutrav1.Desired_DESIRED_RUNNING, 0, true)}, Bury},
		"intended":      {registry.NodeState{Record: record(sutrav1.Desired_DESIRED_RUNNING, 0, false)}, Bury},
		"displaced":     {registry.NodeState{Record: record(sutrav1.Desired_DESIRED_RUNNING, 0, true), Displaced: true}, Bury},
		"to be stopped": {registry.NodeState{Record: record(sutrav1.Desired_DESIRED_STOPPED, 0, true)}, Stop},
		"written down":  {registry.NodeState{Record: record(sutrav1.Desired_DESIRED_STOPPED, stopped, true)}, Stop},
		"nobody's":      {registry.NodeState{}, Adopt},
		"removed":       {registry.NodeState{Removed: true}, Stop},
	} {
		for _, phase := range []sutrav1.Phase{stopped, failed} {
			s := c.state
			s.ID, s.AgentID, s.Settled, s.Seen = "n", "a", true, seen(phase)
			s.Seen.Completed = true
			if got := Plan([]registry.NodeState{s}, noon()); len(got) != 1 || got[0].Kind != c.want || got[0].Reason == "" {
				t.Errorf("%s, completed as %v: %v, want one %s", name, phase, got, c.want)
			}
		}
	}
}

// What was undone is forgotten by the store whether or not its agent can be asked.
func TestDiscardedIsForgotten(t *testing.T) {
	rec := &sutrav1.NodeRecord{Node: &sutrav1.Node{NodeId: "n", AgentId: "a", Desired: sutrav1.Desired_DESIRED_RUNNING}}
	for _, settled := range []bool{false, true} {
		got := Plan([]registry.NodeState{{ID: "n", AgentID: "a", Record: rec, Discarded: true, Settled: settled}}, time.Now())
		if len(got) != 1 || got[0].Kind != Forget {
			t.Errorf("settled %v: %v, want one %s", settled, got, Forget)
		}
	}
	now := time.Now()
	if got := Plan([]registry.NodeState{{ID: "n", Record: rec, Discarded: true, RetryAt: now.Add(time.Second)}}, now); len(got) != 0 {
		t.Errorf("before its next try is due: %v", got)
	}
}

// A node whose agent is another one now isn't started there; it can be stopped and buried.
func TestDisplacedIsntStarted(t *testing.T) {
	state := registry.NodeState{ID: "n", AgentID: "a", Displaced: true, Settled: true, Record: &sutrav1.NodeRecord{
		Confirmed: true, Node: &sutrav1.Node{NodeId: "n", AgentId: "a", Desired: sutrav1.Desired_DESIRED_RUNNING},
	}}
	if got := Plan([]registry.NodeState{state}, time.Now()); len(got) != 0 {
		t.Errorf("wanted: %v", got)
	}
	state.Record.Node.Desired = sutrav1.Desired_DESIRED_STOPPED
	if got := Plan([]registry.NodeState{state}, time.Now()); len(got) != 1 || got[0].Kind != Bury {
		t.Errorf("to be stopped: %v, want one %s", got, Bury)
	}
}
