package e2e_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// history is what clients asked of nodes and were told, with when; and what was seen of them meanwhile.
type history struct {
	mu    sync.Mutex // guards what follows
	calls map[string][]porcupine.Operation
	ended map[string]bool // stopped, and told so
	start time.Time
}

// deed is what a call does to its node.
type deed int

const (
	spawned deed = iota
	ended
	// shown: the master lists it or not, as the call's output says.
	shown
	// seen: the host has a process of it.
	seen
)

func (d deed) String() string { return [...]string{"spawned", "stopped", "shown", "seen"}[d] }

func newHistory() *history {
	return &history{calls: map[string][]porcupine.Operation{}, ended: map[string]bool{}, start: time.Now()}
}

func (h *history) now() int64 { return int64(time.Since(h.start)) }

// note takes down a call of which the outcome is known.
func (h *history) note(node string, d deed, called int64, output bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.calls[node] = append(h.calls[node], porcupine.Operation{Input: d, Call: called, Output: output, Return: h.now()})
	if d == ended {
		h.ended[node] = true
	}
}

// look takes down what the master shows and the host has, of the nodes that were told of by now.
func (h *history) look(ctx context.Context, g *harness.Grid, c sutrav1.GridMasterClient) error {
	h.mu.Lock()
	told := map[string]bool{}
	for id := range h.calls {
		told[id] = false
	}
	h.mu.Unlock()
	called := h.now()
	resp, err := c.ListNodes(ctx, &sutrav1.ListNodesRequest{})
	if err != nil {
		return err
	}
	for _, n := range resp.GetNodes() {
		told[n.GetNodeId()] = true
	}
	for id, is := range told {
		h.note(id, shown, called, is)
	}
	called = h.now()
	for id := range processes(g) {
		h.note(id, seen, called, true)
	}
	return nil
}

// oneLife is what each node's history must be: it comes into being once, is there from then on, and ends once.
var oneLife = porcupine.Model{
	Init: func() any { return "never was" },
	Step: func(state, input, output any) (bool, any) {
		switch input.(deed) {
		case spawned:
			return state == "never was", "lives"
		case ended:
			return state == "lives", "is gone"
		default:
			return (state == "lives") == output.(bool), state
		}
	},
	DescribeOperation: func(input, output any) string { return fmt.Sprint(input, " ", output) },
}

// judge checks the histories of all nodes and forgets those of nodes that are gone. One that nobody was told of is the
// beginning of a spawn that came to nothing, was taken back and was begun anew: it may be shown, and never has a process.
func (h *history) judge(t *testing.T) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, calls := range h.calls {
		if !slices.ContainsFunc(calls, is(spawned)) && !slices.ContainsFunc(calls, is(seen)) {
			delete(h.calls, id)
			continue
		}
		if !porcupine.CheckOperations(oneLife, calls) {
			var told strings.Builder
			for _, c := range calls {
				fmt.Fprintf(&told, "%12v to %12v: %v %v\n", time.Duration(c.Call), time.Duration(c.Return), c.Input, c.Output)
			}
			t.Errorf("no single life of node %s explains what was told of it:\n%s", id, &told)
		}
		if h.ended[id] {
			delete(h.calls, id)
			delete(h.ended, id)
		}
	}
}

func is(d deed) func(porcupine.Operation) bool {
	return func(c porcupine.Operation) bool { return c.Input == d }
}

// A history that no node can have had is found.
func TestHistoryIsJudged(t *testing.T) {
	op := func(d deed, call, back int64, output bool) porcupine.Operation {
		return porcupine.Operation{Input: d, Call: call, Return: back, Output: output}
	}
	for name, c := range map[string]struct {
		calls []porcupine.Operation
		holds bool
	}{
		"a life":                     {[]porcupine.Operation{op(spawned, 0, 2, true), op(shown, 3, 4, true), op(seen, 3, 4, true), op(ended, 5, 9, true), op(shown, 10, 11, false)}, true},
		"seen before it was told":    {[]porcupine.Operation{op(spawned, 0, 5, true), op(seen, 1, 2, true)}, true},
		"shown while it is stopped":  {[]porcupine.Operation{op(spawned, 0, 1, true), op(ended, 2, 9, true), op(shown, 3, 4, true), op(shown, 5, 6, false)}, true},
		"lost":                       {[]porcupine.Operation{op(spawned, 0, 1, true), op(shown, 2, 3, false)}, false},
		"seen after its stop":        {[]porcupine.Operation{op(spawned, 0, 1, true), op(ended, 2, 3, true), op(seen, 4, 5, true)}, false},
		"back again":                 {[]porcupine.Operation{op(spawned, 0, 1, true), op(ended, 2, 9, true), op(shown, 3, 4, false), op(shown, 5, 6, true)}, false},
		"spawned twice":              {[]porcupine.Operation{op(spawned, 0, 1, true), op(spawned, 2, 3, true)}, false},
		"there before it was wanted": {[]porcupine.Operation{op(seen, 0, 1, true), op(spawned, 2, 3, true)}, false},
	} {
		if holds := porcupine.CheckOperations(oneLife, c.calls); holds != c.holds {
			t.Errorf("%s: %v", name, holds)
		}
	}
}
