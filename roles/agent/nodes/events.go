package nodes

import (
	"cmp"
	"time"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/supervisor"
)

// happened takes in one event of an entry's unit.
func (m *Manager) happened(ev supervisor.Event) {
	m.mu.Lock()
	e := m.entries[ev.ID]
	var release func()
	if e != nil {
		release = e.release
	}
	m.mu.Unlock()
	if e == nil {
		return // forgotten while its unit's last words were on their way
	}
	if ev.State.Phase != supervisor.Starting && release != nil {
		release() // before anybody hears that the port is free, or that the node listens
	}
	// What is completed stays, here and on record, until the master has written that down and has it stopped.
	stopped := ev.Kind == supervisor.UnitEnded && ev.State.Phase == supervisor.Stopped && !ev.State.Completed
	if stopped {
		m.eraseSoon(e)
	}
	m.mu.Lock()
	told := e.awaited > 0
	m.mu.Unlock()
	if ev.Kind == supervisor.UnitEnded && ev.State.Phase == supervisor.Failed && !ev.State.Completed && told {
		// The spawn fails, and nothing stays of it. Where nobody waits any more the node may have served somebody: its
		// files stay. All this while the entry holds its path: the next one there has files of its own.
		m.undo(e)
	}
	m.mu.Lock()
	before := e.state
	e.state = ev.State
	switch ev.Kind {
	case supervisor.ProcessReady:
		e.health, e.trouble = sutrav1.NodeHealth_NODE_HEALTH_READY, ""
	case supervisor.StopEscalated, supervisor.KillFailed, supervisor.RecordLost:
	default:
		e.health = sutrav1.NodeHealth_NODE_HEALTH_NOT_READY
	}
	switch ev.Kind {
	case supervisor.ProcessStarted, supervisor.ProcessAdopted, supervisor.ProcessReady:
		e.checks.begin(time.Now(), m.cfg.CheckEvery)
	}
	if ev.State.PID != 0 {
		e.enforced = enforcement(ev.State)
	}
	m.touch(e)
	if ev.Kind == supervisor.UnitEnded {
		m.silence(e)
	}
	if stopped {
		m.forget(e)
	}
	m.mu.Unlock()

	if ev.Kind == supervisor.ProcessStarted && ev.State.Restarts > 0 {
		m.cfg.Metrics.restarted(e.profile)
	}
	m.say(ev, before)
}

// say logs an event of a unit; before is its state before that.
func (m *Manager) say(ev supervisor.Event, before supervisor.State) {
	with := m.cfg.Log.With().Str("node_id", ev.ID)
	if pid := cmp.Or(ev.State.PID, before.PID); pid != 0 { // else nothing could be started
		with = with.Int("pid", pid)
	}
	log, phase := with.Logger(), phaseOf(ev.State.Phase).Word()
	switch ev.Kind {
	case supervisor.ProcessStarted:
		log.Info().Int("restarts", ev.State.Restarts).Msg("node started")
	case supervisor.ProcessAdopted:
		log.Info().Int("restarts", ev.State.Restarts).Str("phase", phase).Msg("node taken up")
	case supervisor.RecordLost:
		log.Error().Err(ev.Err).Msg("node's record not written; it is found by its control group or its mark after the agent's next start")
	case supervisor.ProcessReady:
		log.Info().Msg("node ready")
	case supervisor.RestartBegan:
		log.Warn().Str("cause", ev.State.Ending).Msg("node's process is ended, another one follows")
	case supervisor.EndBegan:
		log.Warn().Str("cause", ev.State.Ending).Msg("node's process is ended, and none follows")
	case supervisor.ProcessExited:
		exit := ev.State.LastExit
		log = log.With().Stringer("exit", exit).Str("phase", phase).Time("next_start", ev.State.NextStart).Logger()
		switch {
		case before.LastExit != nil && before.LastExit.At.Equal(exit.At): // an agent before this one saw it, and said so
			log.Info().Msg("node waits for its next start")
		case exit.Cause != "" && ev.State.Phase == supervisor.Starting:
			log.Info().Msg("node's process has ended")
		default:
			log.Warn().Msg("node crashed; it will be restarted")
		}
	case supervisor.StopEscalated:
		log.Warn().Msg("node didn't stop in its grace; killed")
	case supervisor.KillFailed:
		log.Error().Str("left", ev.State.Unkillable).Msg("what is left of a node outlives SIGKILL; it is waited for")
	case supervisor.UnitEnded:
		log.Info().Str("phase", phase).Stringer("exit", exitOf(ev.State)).Msg("node ended")
	}
}
