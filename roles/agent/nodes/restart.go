package nodes

import (
	"context"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/supervisor"
)

// Restart ends a node's process, starts another one and waits until that is ready, has died or ctx ends; in the last
// case it goes on. Port and path stay the node's. count is the restart_count up to which a restart is due: a node that was
// started again since isn't once more, only waited for.
func (m *Manager) Restart(ctx context.Context, id string, count uint32) (*sutrav1.Node, error) {
	m.mu.Lock()
	e := m.entries[id]
	m.mu.Unlock()
	if e == nil {
		return nil, m.notHere(id)
	}
	if !e.started(ctx) {
		return nil, m.notReadyYet(e)
	}
	if e.refused != nil {
		if m.isStray(e) {
			return nil, e.refused
		}
		return nil, m.notHere(id)
	}
	m.mu.Lock()
	// A stop that came before is obeyed before: it has set what is desired.
	over, node := e.stopping() || e.state.Completed, m.view(e)
	m.mu.Unlock()
	if over {
		return nil, rpc.Ended(node)
	}
	var outcome supervisor.Restarted
	select {
	case outcome = <-e.unit.Restart(int(count)):
	case <-ctx.Done():
		return nil, m.notReadyYet(e)
	}

	m.mu.Lock()
	node = m.view(e)
	m.mu.Unlock()
	state := outcome.State
	switch {
	case outcome.Early != nil:
		node.LastExit = exitMessage(outcome.Early)
		return nil, rpc.Exited(node)
	case state.Completed:
		return nil, rpc.Ended(node)
	case state.Phase == supervisor.Stopped:
		return nil, rpc.Errorf(rpc.StoppedMeanwhile, "node %s was stopped while it was restarted", id).With("node_id", id)
	case state.Phase == supervisor.Failed:
		return nil, rpc.Exited(node)
	case state.Phase != supervisor.Running:
		// It was let go.
		return nil, rpc.Errorf(rpc.NotReadyYet, "node %s isn't restarted yet: its agent is shutting down", id).With("node_id", id).
			WithHint("its restart goes on at the agent's next start: sutra node-status --node %s", id)
	}
	// As it was then: it may have gone through more since.
	node.Phase, node.Pid, node.RestartCount = sutrav1.Phase_PHASE_RUNNING, int32(state.PID), uint32(state.Restarts)
	return node, nil
}

func (m *Manager) notHere(id string) *rpc.Error {
	return rpc.Errorf(rpc.NodeNotFound, "agent %s runs no node %s", m.cfg.Agent.GetAgentId(), id).With("node_id", id)
}
