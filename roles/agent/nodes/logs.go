package nodes

import (
	"context"
	"errors"
	"io/fs"
	"math"
	"path/filepath"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/supervisor"
)

func (m *Manager) openLogs() (*supervisor.Logs, error) {
	return supervisor.OpenLogs(supervisor.LogsConfig{
		Dir: filepath.Join(m.cfg.Dir, "logs"), UnitBudget: m.cfg.NodeLogBudget, Budget: m.cfg.LogBudget, Notify: m.logged,
	})
}

func (m *Manager) logPath(id string) string { return m.logs.Path(id) }

// logged takes in one event of a log.
func (m *Manager) logged(ev supervisor.LogEvent) {
	log := m.cfg.Log.With().Str("node_id", ev.ID).Logger()
	switch ev.Kind {
	case supervisor.LogsUnbounded:
		m.cfg.Log.Warn().Str("folder", filepath.Join(m.cfg.Dir, "logs")).
			Str("hint", "have the agent's home on ext4, xfs, btrfs or tmpfs, or watch its size").
			Msg("nodes' logs grow without a bound: their file system can take nothing out of a file's beginning")
	case supervisor.LogStuck:
		log.Warn().Err(ev.Err).Msg("node's log not rotated; trying on")
	case supervisor.LogCut:
		log.Debug().Int64("bytes", ev.Bytes).Msg("the oldest part of a node's log wasn't kept")
	case supervisor.LogLost:
		log.Error().Str("hint", "begin a new one with: sutra restart --node "+ev.ID).
			Msg("node's log was removed by somebody else; the node writes on where nobody can read it, and that fills the disk")
	case supervisor.LogRemoved:
		log.Info().Int64("bytes", ev.Bytes).Msg("log of a node that has ended removed: the budget of all logs is spent")
	}
}

// silence notes that nothing of an entry's node is left that could write to its log. Needs mu.
func (m *Manager) silence(e *entry) {
	select {
	case <-e.silent:
	default:
		close(e.silent)
		m.logs.Rest(e.id)
	}
}

// undo takes back what a spawn that failed has made, its log included; one that was there before stays.
func (m *Manager) undo(e *entry) {
	e.files.undo()
	if e.files.logged {
		return
	}
	if err := m.logs.Remove(e.id); err != nil {
		m.cfg.Log.Warn().Err(err).Str("node_id", e.id).Msg("log of a failed spawn not removed")
	}
}

// TailLogs sends a part of a node's log, piece by piece. Where it follows, it ends with the node.
func (m *Manager) TailLogs(ctx context.Context, id string, r *sutrav1.LogRange, send func(*sutrav1.LogChunk) error) error {
	m.mu.Lock()
	e := m.entries[id]
	m.mu.Unlock()
	var silent <-chan struct{}
	if e != nil {
		silent = e.silent
	} else {
		over := make(chan struct{})
		close(over)
		silent = over
	}
	want := supervisor.LogRange{
		Follow: r.GetFollow(), Last: r != nil && r.Tail != nil, Lines: int(r.GetTail()), Position: int64(min(r.GetPosition(), math.MaxInt64)),
	}
	if r.GetSince() != nil {
		want.Since = r.GetSince().AsTime()
	}
	err := m.logs.Tail(ctx, id, want, silent, func(c supervisor.LogChunk) error {
		return send(&sutrav1.LogChunk{Data: c.Data, Position: uint64(c.Position), Skipped: uint64(c.Skipped)})
	})
	var disk *fs.PathError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return rpc.Errorf(rpc.NodeNotFound, "agent %s has no log of node %s", m.cfg.Agent.GetAgentId(), id).With("node_id", id).
			WithHint("logs of nodes that have ended are kept until the agent's [logs] agent_budget_mb is spent")
	case errors.As(err, &disk):
		return rpc.Errorf(rpc.Internal, "the log of node %s on agent %s can't be read: %v", id, m.cfg.Agent.GetAgentId(), err).With("node_id", id).
			WithHint("look at that folder's disk and permissions on the agent's host")
	}
	return err
}
