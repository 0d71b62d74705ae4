package nodes

import (
	"context"
	"time"

	"golang.org/x/sync/errgroup"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/supervisor"
)

// parallelProbes bounds how many nodes are probed at once: a probe is cheap, a thousand at once aren't.
const parallelProbes = 16

// Run probes the running nodes in turn, every CheckEvery, until ctx ends.
func (m *Manager) Run(ctx context.Context) error {
	tick := time.NewTicker(m.cfg.CheckEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			m.checkAll(ctx)
		}
	}
}

func (m *Manager) checkAll(ctx context.Context) {
	m.mu.Lock()
	var running []*entry
	for _, e := range m.entries {
		if e.state.Phase == supervisor.Running && !e.stopping() {
			running = append(running, e)
		}
	}
	m.mu.Unlock()
	var group errgroup.Group
	group.SetLimit(parallelProbes)
	for _, e := range running {
		group.Go(func() error { m.check(ctx, e); return nil })
	}
	_ = group.Wait() // checks report through their entries
}

// check probes one running node and notes the outcome.
func (m *Manager) check(ctx context.Context, e *entry) {
	m.mu.Lock()
	spec, pid := e.spec, e.state.PID
	m.mu.Unlock()
	probe, err := m.probe(spec, m.cfg.Profiles[spec.GetProfile()])
	if err == nil {
		limited, cancel := context.WithTimeout(ctx, probeTimeout)
		defer cancel()
		err = probe.Check(limited)
	}
	if ctx.Err() != nil {
		return
	}
	health, trouble := sutrav1.NodeHealth_NODE_HEALTH_READY, ""
	if err != nil {
		health, trouble = sutrav1.NodeHealth_NODE_HEALTH_NOT_READY, err.Error()
	}

	m.mu.Lock()
	changed := e.state.Phase == supervisor.Running && !e.stopping() && e.state.PID == pid && e.health != health
	if changed {
		e.health, e.trouble = health, trouble
		m.touch(e)
	}
	m.mu.Unlock()
	switch {
	case changed && err != nil:
		m.cfg.Log.Warn().Str("node_id", spec.GetNodeId()).Err(err).Msg("node isn't ready any more")
	case changed:
		m.cfg.Log.Info().Str("node_id", spec.GetNodeId()).Msg("node is ready again")
	}
}
