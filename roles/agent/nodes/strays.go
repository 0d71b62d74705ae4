package nodes

import (
	"google.golang.org/protobuf/proto"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// astray tells whether the entry is that of a stray: a node whose processes run, and that nobody supervises or is about to.
// Needs Manager.mu.
func (e *entry) astray() bool {
	select {
	case <-e.launched:
		return e.stray != nil
	default:
		return false // it is being taken up
	}
}

func (m *Manager) isStray(e *entry) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return e.astray()
}

// addStray makes the entry of a stray that nothing is known of but its id.
func (m *Manager) addStray(id string, why *rpc.Error) {
	node := m.nameless(id)
	e := newEntry(node)
	m.logs.Watch(id) // it writes to it
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.entries[id] == nil {
		m.entries[id] = e
		e.stray, e.refused = &sutrav1.ProcessRecord{EverReady: true, Node: node}, why
		m.touch(e)
		close(e.launched)
	}
}

// strays are the entries of strays, or of that one with an id.
func (m *Manager) strays(id string) []*entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	var found []*entry
	for _, e := range m.entries {
		if e.astray() && (id == "" || e.id == id) {
			found = append(found, e)
		}
	}
	return found
}

// lookAfterStrays takes up those strays that are on record, and forgets those that have ended of the others.
func (m *Manager) lookAfterStrays() {
	for _, e := range m.strays("") {
		switch {
		case e.stray.GetNode().GetProfile() != "":
			m.takeUp(e.stray)
		case !m.lives(e.id):
			m.cfg.Log.Info().Str("node_id", e.id).Msg("what ran without a record has ended")
			m.drop(e)
		}
	}
}

// stopStrays takes up strays to be stopped: all, or that one with an id. For that no more of it is needed than its id.
func (m *Manager) stopStrays(id string) {
	for _, e := range m.strays(id) {
		for _, node := range []*sutrav1.Node{proto.CloneOf(e.stray.GetNode()), m.nameless(e.id)} {
			node.Desired = sutrav1.Desired_DESIRED_STOPPED
			if now := m.takeUp(&sutrav1.ProcessRecord{EverReady: true, Node: node}); now == nil || !m.isStray(now) {
				break
			}
		}
	}
}

// nameless is a node that nothing is known of but its id.
func (m *Manager) nameless(id string) *sutrav1.Node {
	return &sutrav1.Node{
		NodeId: id, AgentId: m.cfg.Agent.GetAgentId(), StoragePath: m.ownFolder(id), Desired: sutrav1.Desired_DESIRED_RUNNING,
	}
}
