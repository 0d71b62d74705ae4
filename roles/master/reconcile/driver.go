package reconcile

import (
	"context"
	"sync"
	"time"

	"github.com/rs/zerolog"

	"github.com/sutra-grid/sutra/roles/master/registry"
	"github.com/sutra-grid/sutra/rpc"
)

const (
	// settle lets changes that belong together arrive before they are acted on.
	settle = 20 * time.Millisecond
	// period is how often the plan is made anew although nothing changed: retries come due.
	period = time.Second
	// parallel bounds the actions under way on one agent: one that doesn't answer holds up nobody but itself.
	parallel = 16
)

// Actor carries out one action. It returns nil where the node is now as wanted, or somebody else sees to it.
type Actor interface {
	Act(ctx context.Context, a Action) error
}

// Driver looks for what is due and has it done.
type Driver struct {
	Registry *registry.Registry
	Actor    Actor
	Log      zerolog.Logger
}

// Run works until ctx ends.
func (d *Driver) Run(ctx context.Context) error {
	var group sync.WaitGroup
	defer group.Wait()
	slots := map[string]chan struct{}{} // by agent
	tick := time.NewTicker(period)
	defer tick.Stop()
	for {
		for _, a := range Plan(d.Registry.States(time.Now()), time.Now()) {
			slot := slots[a.AgentID]
			if slot == nil {
				slot = make(chan struct{}, parallel)
				slots[a.AgentID] = slot
			}
			select {
			case slot <- struct{}{}:
			default:
				continue // planned again when a slot is free
			}
			end, ok := d.Registry.BeginIdle(a.NodeID)
			if !ok {
				<-slot
				continue
			}
			group.Go(func() {
				d.act(ctx, a)
				<-slot
				end()
			})
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-d.Registry.Changed():
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(settle):
			}
		}
	}
}

func (d *Driver) act(ctx context.Context, a Action) {
	log := d.Log.With().Str("action", string(a.Kind)).Str("node_id", a.NodeID).Str("agent_id", a.AgentID).Str("reason", a.Reason).Logger()
	err := d.Actor.Act(ctx, a)
	if ctx.Err() != nil {
		return
	}
	pause := d.Registry.Trouble(a.NodeID, err, time.Now())
	if err != nil {
		level := zerolog.WarnLevel
		if rpc.ReasonOf(err) == rpc.ShuttingDown {
			level = zerolog.DebugLevel // an agent that takes its nodes along is told of before it is gone
		}
		log.WithLevel(level).Err(err).Dur("retry_in_ms", pause).Msg("reconcile failed")
		return
	}
	if a.Kind == Confirm {
		log.Debug().Msg("reconciled") // every spawn ends so
		return
	}
	log.Info().Msg("reconciled")
}
