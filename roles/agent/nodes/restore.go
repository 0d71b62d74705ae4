package nodes

import (
	"errors"
	"io/fs"
	"path/filepath"

	"google.golang.org/protobuf/proto"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/supervisor"
)

// restore takes up the nodes that are on record.
func (m *Manager) restore(kept []*sutrav1.ProcessRecord) {
	for _, rec := range kept {
		m.takeUp(rec)
	}
}

// takeUp makes an entry of a record, in the place of a stray's. Where what runs can't be taken up now it is one of a stray.
// It returns the entry that has the id then; nil where the manager is closing.
func (m *Manager) takeUp(rec *sutrav1.ProcessRecord) *entry {
	id := rec.GetNode().GetNodeId()
	e := newEntry(proto.CloneOf(rec.GetNode()))
	e.record, e.copied = recordOf(rec), true
	e.files = files{storage: rec.GetNode().GetStoragePath(), log: m.logPath(id), logged: true}
	e.spec.Completed, e.spec.Phase = false, 0 // that is the unit's to say
	m.mu.Lock()
	other := m.entries[id]
	if m.closing || other != nil && !other.astray() {
		m.mu.Unlock()
		return other
	}
	m.entries[id] = e
	m.mu.Unlock()
	m.logs.Watch(id)
	unit, err := m.adopt(e)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		if other == nil || other.refused.Message != err.Error() {
			m.cfg.Log.Error().Err(err).Str("node_id", id).Msg("node not taken up; trying on")
		}
		e.stray, e.refused = rec, rpc.AsError(err)
	} else {
		e.unit, e.state = unit, unit.State()
	}
	m.touch(e)
	close(e.launched)
	return e
}

func (m *Manager) adopt(e *entry) (*supervisor.Unit, error) {
	profile, ok := m.cfg.Profiles[e.spec.GetProfile()]
	binary := profile.StorageBinary
	switch {
	case !ok:
		// It runs on; a restart says what is missing.
		binary = "/the agent's file has no profile " + e.spec.GetProfile()
		profile.StopSignal, profile.StopGrace, profile.Ready.Kind = "TERM", config.DefaultStopGrace, "none"
	case binary == "":
		binary = m.cfg.Builtin
	}
	spec, err := m.spec(e, profile, binary)
	if err != nil {
		return nil, err
	}
	return m.units.Adopt(spec, e.record, e.stopping())
}

// retake takes up a stray that is wanted again.
func (m *Manager) retake(e *entry, p profile, binary string) (*supervisor.Unit, error) {
	if e.spec.GetPort() == 0 {
		return nil, rpc.Errorf(rpc.NodeStillLive, "node %s runs already, without a record of its port", e.id).With("node_id", e.id).
			WithHint("stop it first: sutra stop --node %s", e.id)
	}
	spec, err := m.spec(e, p, binary)
	if err != nil {
		return nil, err
	}
	return m.units.Adopt(spec, supervisor.Record{EverReady: true}, false)
}

// lives tells whether processes of a node run, whatever is known of it.
func (m *Manager) lives(id string) bool {
	return supervisor.Lives(m.cfg.Cgroups, id, m.mark(id), m.logPath(id))
}

// runsAlready tells whether a node that is to be started does.
func (m *Manager) runsAlready(e *entry) bool {
	known := e.stray != nil
	if known && m.lives(e.id) {
		return true
	}
	var rec *sutrav1.ProcessRecord
	if !known && m.cfg.Cgroups.Populated(e.id) { // cheap enough to be asked each time
		rec = &sutrav1.ProcessRecord{EverReady: true, Node: m.nameless(e.id)}
	}
	m.mu.Lock()
	e.stray = rec
	m.mu.Unlock()
	return rec != nil
}

// unrecorded makes up records of the nodes that run and aren't on record, by the copies of what was wanted of them: the
// file of records was lost, or isn't the last one. Those that don't run are the master's to want again.
func (m *Manager) unrecorded(kept []*sutrav1.ProcessRecord) []*sutrav1.ProcessRecord {
	known := map[string]bool{}
	for _, rec := range kept {
		id := rec.GetNode().GetNodeId()
		known[id] = true
		if err := m.wanted.complete(rec.GetNode()); err != nil {
			m.cfg.Log.Warn().Err(err).Str("node_id", id).Msg("no copy of what is wanted of a node")
		}
	}
	var found []*sutrav1.ProcessRecord
	for _, id := range supervisor.Living(m.cfg.Cgroups, m.mark(""), filepath.Dir(m.logPath(""))) {
		if known[id] || config.ValidID("", id) != nil { // the latter is a process's own make-up
			continue
		}
		node, err := m.wanted.read(id)
		if err != nil {
			m.cfg.Log.Error().Err(err).Str("node_id", id).
				Str("hint", "it is taken up when it is wanted again; to end it: sutra stop --node "+id).
				Msg("a node runs that isn't on record, and what was wanted of it is lost")
			m.addStray(id, rpc.Errorf(rpc.NodeStillLive, "node %s runs without a record of what was wanted of it: %v", id, err))
			known[id] = !errors.Is(err, fs.ErrNotExist) // a copy that can't be read now may be read later
			continue
		}
		known[id] = true
		found = append(found, &sutrav1.ProcessRecord{EverReady: true, Node: node})
	}
	if len(found) > 0 {
		m.cfg.Log.Warn().Int("nodes", len(found)).Msg("nodes run that aren't on record; taken up as they were wanted")
	}
	if err := m.wanted.dropOthers(known); err != nil {
		m.cfg.Log.Warn().Err(err).Msg("copies of what was wanted of nodes that are gone not removed")
	}
	return found
}
