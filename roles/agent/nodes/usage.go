package nodes

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/supervisor"
)

// usage is what a node's processes use, as it was last measured. The zero usage is of none.
type usage struct {
	supervisor.Usage
	at time.Time
	// cores is the share of a core since the measurement before.
	cores float64
	// round is the Manager's when it was measured.
	round uint64
}

// measureUsage measures the nodes every CheckEvery, until ctx ends.
func (m *Manager) measureUsage(ctx context.Context) {
	for pause(ctx, m.cfg.CheckEvery); ctx.Err() == nil; pause(ctx, m.cfg.CheckEvery) {
		m.measure()
		m.settle()
		m.lookAfterStrays()
	}
}

// measure notes what the nodes use. That is no change of them: it is passed on when there is a beat anyway.
func (m *Manager) measure() {
	m.mu.Lock()
	var units []*supervisor.Unit
	for _, e := range m.entries {
		if e.unit != nil && e.state.PID != 0 {
			units = append(units, e.unit)
		}
	}
	m.mu.Unlock()
	found, now := supervisor.Measure(units), time.Now()

	m.mu.Lock()
	defer m.mu.Unlock()
	m.round++
	for id, use := range found {
		if e := m.entries[id]; e != nil && e.state.PID == use.PID {
			e.usage = e.usage.next(use, now, e.state.StartedAt)
			e.usage.round = m.round
		}
	}
}

// next is the usage that follows on one, which may be of an earlier process.
func (u usage) next(use supervisor.Usage, now, started time.Time) usage {
	before, since := u.CPUTime, u.at
	if u.PID != use.PID {
		before, since = 0, started
	}
	n := usage{Usage: use, at: now}
	if passed := now.Sub(since); passed > 0 {
		n.cores = max(0, (use.CPUTime-before).Seconds()/passed.Seconds())
	}
	return n
}

// usageMessage is what an entry's node uses; nil where its present process wasn't measured yet. Needs Manager.mu.
func (e *entry) usageMessage() *sutrav1.Usage {
	u := e.usage
	if u.PID == 0 || u.PID != e.state.PID {
		return nil
	}
	return &sutrav1.Usage{
		CpuTime: durationpb.New(u.CPUTime), CpuCores: u.cores, MemoryBytes: u.Memory, OpenFiles: uint32(u.OpenFiles), DiskBytes: e.disk,
	}
}

// Usage returns what the nodes use that were measured after a round (0: all of them), and the round that this brings
// the caller to.
func (m *Manager) Usage(since uint64) (measured []*sutrav1.NodeUsage, now uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, e := range m.entries {
		if u := e.usageMessage(); u != nil && e.usage.round > since {
			measured = append(measured, &sutrav1.NodeUsage{NodeId: id, Usage: u})
		}
	}
	return measured, m.round
}

// measureDisks looks, in turn, at how much the nodes' files take, until ctx ends: each at most every CheckEvery.
func (m *Manager) measureDisks(ctx context.Context) {
	var p pace
	for ctx.Err() == nil {
		began := time.Now()
		m.mu.Lock()
		paths := map[*entry]string{}
		for _, e := range m.entries {
			if e.state.PID != 0 {
				paths[e] = e.spec.GetStoragePath()
			}
		}
		m.mu.Unlock()
		for e, path := range paths {
			bytes, ok := diskUse(ctx, path, &p)
			if !ok {
				return
			}
			m.mu.Lock()
			e.disk = bytes
			m.mu.Unlock()
		}
		pause(ctx, m.cfg.CheckEvery-time.Since(began))
	}
}

// pause waits, unless ctx ends before.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
