package nodes

import (
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/supervisor"
)

// restore takes up the nodes that are on record.
func (m *Manager) restore(kept []*sutrav1.ProcessRecord) {
	for _, rec := range kept {
		id := rec.GetNode().GetNodeId()
		e := newEntry(proto.CloneOf(rec.GetNode()))
		e.record = recordOf(rec)
		e.files = files{storage: rec.GetNode().GetStoragePath(), log: m.logPath(id), logged: true}
		e.spec.Completed, e.spec.Phase = false, 0 // that is the unit's to say
		m.logs.Watch(id)
		m.mu.Lock()
		m.entries[id] = e
		m.mu.Unlock()
		unit, err := m.adopt(e)
		m.mu.Lock()
		if err != nil {
			m.cfg.Log.Error().Err(err).Str("node_id", id).Msg("node not taken up")
			m.forget(e)
		} else {
			e.unit, e.state = unit, unit.State()
			m.touch(e)
		}
		close(e.launched)
		m.mu.Unlock()
	}
}

func (m *Manager) adopt(e *entry) (*supervisor.Unit, error) {
	profile, ok := m.cfg.Profiles[e.spec.GetProfile()]
	binary := profile.StorageBinary
	switch {
	case !ok:
		// It runs on; a restart says what is missing.
		binary = "/the agent's file has no profile " + e.spec.GetProfile()
		profile.StopSignal, profile.Ready.Kind = "TERM", "none"
	case binary == "":
		binary = m.cfg.Builtin
	}
	spec, err := m.spec(e, profile, binary)
	if err != nil {
		return nil, err
	}
	return m.units.Adopt(spec, e.record, e.stopping())
}

// retake takes up a node that runs without a record, which was lost, and that its mark doesn't tell, because it dropped its
// environment: it is found by its control group when it is wanted again.
func (m *Manager) retake(e *entry, p profile, binary string) (*supervisor.Unit, error) {
	if e.spec.GetPort() == 0 {
		return nil, rpc.Errorf(rpc.NodeStillLive, "node %s runs already, without a record of its port", e.id).With("node_id", e.id).
			WithHint("end it by hand on its host; its processes are those with %s as their working directory", e.spec.GetStoragePath())
	}
	spec, err := m.spec(e, p, binary)
	if err != nil {
		return nil, err
	}
	return m.units.Adopt(spec, supervisor.Record{EverReady: true}, false)
}

// unrecorded makes up records of the processes that bear this agent's mark and aren't on record: the file of records
// was lost, or isn't the last one.
func (m *Manager) unrecorded(kept []*sutrav1.ProcessRecord) []*sutrav1.ProcessRecord {
	known := map[string]bool{}
	for _, rec := range kept {
		known[rec.GetNode().GetNodeId()] = true
	}
	var found []*sutrav1.ProcessRecord
	prefix := m.cfg.Agent.GetInstanceId() + "/"
	for _, env := range supervisor.Leaders(markName + "=" + prefix) {
		id := strings.TrimPrefix(env[markName], prefix)
		if known[id] {
			continue // also where a node's descendant leads a session of its own
		}
		known[id] = true
		port, _ := strconv.ParseUint(env["SUTRA_PORT"], 10, 16)
		memory, _ := strconv.ParseUint(env["SUTRA_MEMORY_MB"], 10, 32)
		found = append(found, &sutrav1.ProcessRecord{EverReady: true, Node: &sutrav1.Node{
			NodeId: id, AgentId: m.cfg.Agent.GetAgentId(), Profile: env["SUTRA_PROFILE"],
			Port: uint32(port), StoragePath: env["SUTRA_STORAGE_PATH"], MemoryLimitMb: uint32(memory),
			Desired: sutrav1.Desired_DESIRED_RUNNING, Generation: 1,
		}})
	}
	if len(found) > 0 {
		m.cfg.Log.Warn().Int("nodes", len(found)).Msg("nodes run that aren't on record; taken up by their marks")
	}
	return found
}
