package nodes

import (
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

// takeUp makes an entry of a record, or returns the one that is there. Where its process can't be taken up now, it is a
// stray.
func (m *Manager) takeUp(rec *sutrav1.ProcessRecord) *entry {
	id := rec.GetNode().GetNodeId()
	e := newEntry(proto.CloneOf(rec.GetNode()))
	e.record, e.copied = recordOf(rec), true
	e.files = files{storage: rec.GetNode().GetStoragePath(), log: m.logPath(id), logged: true}
	e.spec.Completed, e.spec.Phase = false, 0 // that is the unit's to say
	m.mu.Lock()
	if other := m.entries[id]; other != nil {
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
		m.cfg.Log.Error().Err(err).Str("node_id", id).Msg("node not taken up; that is tried again when it is wanted, stopped, or at the agent's next start")
		m.strays[id] = true
		e.refused = rpc.AsError(err)
		m.forget(e)
	} else {
		delete(m.strays, id)
		e.unit, e.state = unit, unit.State()
		m.touch(e)
	}
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

// stray tells whether processes of a node run that isn't known here: its record was lost, and the copy of that, too.
func (m *Manager) stray(id string) bool {
	m.mu.Lock()
	stray := m.strays[id]
	m.mu.Unlock()
	return stray || m.cfg.Cgroups.Populated(id)
}

// retake takes up a stray that is wanted again.
func (m *Manager) retake(e *entry, p profile, binary string) (*supervisor.Unit, error) {
	if e.spec.GetPort() == 0 {
		return nil, rpc.Errorf(rpc.NodeStillLive, "node %s runs already, without a record of its port", e.id).With("node_id", e.id).
			WithHint("stop it first: sutra stop --node %s --agent %s", e.id, m.cfg.Agent.GetAgentId())
	}
	spec, err := m.spec(e, p, binary)
	if err != nil {
		return nil, err
	}
	return m.units.Adopt(spec, supervisor.Record{EverReady: true}, false)
}

// entryOf returns what is known of a node, nil where nothing is. A stray that is to be stopped is taken up for that.
func (m *Manager) entryOf(id string) *entry {
	m.mu.Lock()
	e, closing := m.entries[id], m.closing
	m.mu.Unlock()
	if e != nil || closing || !m.stray(id) {
		return e
	}
	return m.takeUp(&sutrav1.ProcessRecord{EverReady: true, Node: &sutrav1.Node{
		NodeId: id, AgentId: m.cfg.Agent.GetAgentId(), StoragePath: filepath.Join(m.cfg.Dir, "data", id), Desired: sutrav1.Desired_DESIRED_STOPPED,
	}})
}

// unrecorded makes up records of the nodes that run and aren't on record, by the copies of what was wanted of them: the
// file of records was lost, or isn't the last one. Those that don't run are the master's to want again.
func (m *Manager) unrecorded(kept []*sutrav1.ProcessRecord) []*sutrav1.ProcessRecord {
	known := map[string]bool{}
	for _, rec := range kept {
		known[rec.GetNode().GetNodeId()] = true
	}
	var found []*sutrav1.ProcessRecord
	for _, id := range supervisor.Living(m.cfg.Cgroups, m.mark(""), filepath.Dir(m.logPath(""))) {
		if known[id] {
			continue
		}
		node, err := m.wanted.read(id)
		if err != nil {
			m.strays[id] = true
			m.cfg.Log.Error().Err(err).Str("node_id", id).
				Str("hint", "it is taken up when it is wanted again; to end it: sutra stop --node "+id+" --agent "+m.cfg.Agent.GetAgentId()).
				Msg("a node runs that isn't on record, and what was wanted of it is lost")
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
