package nodes

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/supervisor"
)

const (
	// parallelChecks bounds how many nodes are checked at once. A check of one that hangs costs a wait and little else, so
	// that a thousand of them are through in less than the usual interval.
	parallelChecks = 256
	// checkSteps is into how many parts the time between two checks of a node is cut: so fine is the schedule.
	checkSteps = 50
	// unwellAfter is how many checks in a row a node fails before it is restarted.
	unwellAfter = 3
	// reapEvery is how long what nodes leave behind may stay a zombie, where it comes to this process.
	reapEvery = time.Second
)

// checks is where a node stands with its checks.
type checks struct {
	// next is when the next one is due.
	next time.Time
	// running: one is under way. Invariant: there is never a second one.
	running bool
	// failed counts the last ones in a row that failed.
	failed int
}

// begin makes the schedule of a node whose process was just started, or has just become ready. Nodes of which that happened
// together are checked apart.
func (c *checks) begin(now time.Time, every time.Duration) {
	c.next, c.failed = now.Add(every/2+rand.N(every/2+1)), 0
}

// Run looks after the nodes and their logs until ctx ends.
func (m *Manager) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.logs.Run(ctx) })
	for _, work := range []func(context.Context){m.checkNodes, m.measureUsage, m.measureDisks, reapOrphans} {
		group.Go(func() error { work(ctx); return nil })
	}
	return group.Wait()
}

func reapOrphans(ctx context.Context) {
	for pause(ctx, reapEvery); ctx.Err() == nil; pause(ctx, reapEvery) {
		supervisor.ReapOrphans()
	}
}

// checkNodes checks each node that runs every CheckEvery, until ctx ends.
func (m *Manager) checkNodes(ctx context.Context) {
	var group sync.WaitGroup
	defer group.Wait()
	slots := make(chan struct{}, parallelChecks)
	tick := time.NewTicker(max(m.cfg.CheckEvery/checkSteps, time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, e := range m.due(time.Now(), cap(slots)-len(slots)) {
			slots <- struct{}{} // there is room: nobody else takes any
			group.Go(func() {
				m.check(ctx, e)
				<-slots
			})
		}
	}
}

// due returns the nodes whose check is due, at most so many, as being checked from now on.
func (m *Manager) due(now time.Time, most int) []*entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	var due []*entry
	for _, e := range m.entries { // in no order, so that where there are too many each has its chance
		c := &e.checks
		if len(due) == most {
			break
		}
		runs := e.state.Phase == supervisor.Running || e.state.Phase == supervisor.Starting && e.state.PID != 0
		if !runs || e.stopping() || c.running || now.Before(c.next) {
			continue
		}
		c.running, c.next = true, now.Add(m.cfg.CheckEvery)
		due = append(due, e)
	}
	return due
}

// check probes one node, notes the outcome and has its process ended where it was one too many. One that isn't ready yet
// is only looked at: what it is asked by its probe is the unit's business until then, for as long as its profile says.
func (m *Manager) check(ctx context.Context, e *entry) {
	m.mu.Lock()
	spec, phase, pid := e.spec, e.state.Phase, e.state.PID
	m.mu.Unlock()
	var err error
	switch {
	case supervisor.Suspended(pid):
		err = errSuspended
	case phase == supervisor.Running:
		err = ask(ctx, e.probe)
	}
	health, trouble := sutrav1.NodeHealth_NODE_HEALTH_READY, ""
	if err != nil {
		health, trouble = sutrav1.NodeHealth_NODE_HEALTH_NOT_READY, err.Error()
	}

	m.mu.Lock()
	same := ctx.Err() == nil && e.state.Phase == phase && !e.stopping() && e.state.PID == pid
	changed, unwell := same && phase == supervisor.Running && e.health != health, false
	if same {
		e.checks.failed++
		if err == nil {
			e.checks.failed = 0
		}
		unwell = e.checks.failed >= unwellAfter
	}
	if changed {
		e.health, e.trouble = health, trouble
		m.touch(e)
	}
	e.checks.running = false
	unit := e.unit
	m.mu.Unlock()
	switch {
	case changed && err != nil:
		m.cfg.Log.Warn().Str("node_id", spec.GetNodeId()).Err(err).Msg("node isn't ready any more")
	case changed:
		m.cfg.Log.Info().Str("node_id", spec.GetNodeId()).Msg("node is ready again")
	}
	if unwell && unit != nil { // it is nil for a moment after the first process's start
		unit.Unwell(pid, fmt.Sprintf("liveness probe failed %d times: %v", unwellAfter, err))
	}
}

// errSuspended is what is wrong with a node that the kernel still accepts connections for.
var errSuspended = errors.New("its process was stopped by a signal and doesn't run")

// ask finds out whether a node works.
func ask(ctx context.Context, probe health.Probe) error {
	if probe == nil {
		return nil // taken up from an agent whose file had its profile: nobody knows how to ask
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	return probe.Check(ctx)
}
