package agent

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/xid"
	"github.com/rs/zerolog"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/agent/nodes"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

const (
	// firstPause and lastPause bound the wait between two tries to register.
	firstPause = 200 * time.Millisecond
	lastPause  = 5 * time.Second
	// missedPause is the wait after a beat that didn't arrive: a master that was restarted is to hear soon.
	missedPause = time.Second
	// settle lets changes that belong together go in one beat, and a spawn answer its caller before the beat that tells of it.
	settle = 20 * time.Millisecond
	// supersededPause keeps two agents that share one identity from taking it from each other all the time.
	supersededPause = 10 * time.Second
	// beatOutput is how much of a dead process's output a beat carries; who wants all of it asks the agent.
	beatOutput = 256
)

// link keeps the agent known to the master: it registers, beats, and registers again when it was forgotten.
type link struct {
	self       *sutrav1.Agent
	masters    []string
	every      time.Duration
	nodes      *nodes.Manager
	rpcMetrics *rpc.Metrics
	metrics    *linkMetrics
	identity   *identity // nil: in the clear
	log        zerolog.Logger

	// at is the index into masters of the one that is talked to.
	at atomic.Int32
	// registered tells /healthz whether the master knows this agent.
	registered atomic.Bool

	// What follows is run's alone.
	epoch uint64 // the last one given; 0 before the first registration
	// sequence of the last beat of the epoch; acknowledged is the revision up to which the master knows everything,
	// and full that it wants to be told everything.
	sequence, acknowledged uint64
	full                   bool
	measured               uint64       // the round of measuring up to which the master knows what nodes use
	channel                *rpc.Channel // to master()
	client                 sutrav1.GridMasterClient
}

func newInstanceID() string { return xid.New().String() }

// run returns nil when ctx has ended and the master was told so, and an error where the master refuses
// this agent for good.
func (l *link) run(ctx context.Context) error {
	l.connect()
	defer func() {
		l.leave(context.WithoutCancel(ctx))
		l.channel.Close()
	}()
	for first := true; ctx.Err() == nil; first = false {
		err := l.register(ctx, first)
		if err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		l.registered.Store(true)
		pause := l.beat(ctx)
		l.registered.Store(false)
		if !sleep(ctx, pause) {
			return nil
		}
	}
	return nil
}

func (l *link) connect() {
	if l.channel != nil {
		l.channel.Close()
	}
	var credentials func() []*pki.Credentials
	if l.identity != nil {
		credentials = rpc.Held(&l.identity.held)
	}
	l.channel = rpc.Master(l.master(), credentials, l.rpcMetrics)
	l.client = sutrav1.NewGridMasterClient(l.channel)
}

// master is the endpoint of the one that is talked to.
func (l *link) master() string { return l.masters[l.at.Load()] }

// next turns to the next master of the list.
func (l *link) next() {
	if len(l.masters) > 1 {
		l.at.Store((l.at.Load() + 1) % int32(len(l.masters)))
		l.connect()
	}
}

// register tries until the master accepts, for as long as it is away. A refusal that no time heals is an
// error before the first success; later the agent goes on trying, because it has nodes to run.
func (l *link) register(ctx context.Context, first bool) error {
	said := ""
	for pause := firstPause; ctx.Err() == nil; pause = min(2*pause, lastPause) {
		var resp *sutrav1.RegisterAgentResponse
		var err error
		if l.identity != nil {
			err = l.identity.ensure(ctx, l.master())
		}
		unknown := err != nil
		if err == nil {
			resp, err = l.client.RegisterAgent(ctx, &sutrav1.RegisterAgentRequest{
				Agent: l.self, Nodes: brief(l.nodes.List()), HeartbeatInterval: durationpb.New(l.every),
			})
			if err != nil && l.identity != nil {
				unknown, err = l.refused(ctx, err)
			}
		}
		if err == nil && resp != nil {
			l.epoch = resp.GetEpoch()
			l.log.Info().Str("master", l.master()).Str("grid_id", resp.GetGridId()).Uint64("epoch", resp.GetEpoch()).
				Str("master_version", resp.GetMasterVersion()).Msg("registered with the master")
			return nil
		}
		if ctx.Err() != nil {
			return nil
		}
		if err == nil { // it has another identity
			if !sleep(ctx, pause) {
				return nil
			}
			continue
		}
		e := rpc.AsError(err)
		// For want of an identity no agent ends that has nodes: it goes on to look after them.
		if first && l.forGood(e) && (!unknown || len(l.nodes.List()) == 0) {
			return e
		}
		if e.Message != said {
			said = e.Message
			event := l.log.Warn().Err(e)
			if e.Hint != "" {
				event = event.Str("hint", e.Hint)
			}
			event.Msg("not registered; trying on until the master accepts")
		}
		l.next()
		if !sleep(ctx, pause/2+rand.N(pause/2)) {
			return nil
		}
	}
	return nil
}

// refused gets another identity, where that may help after a registration failed; nil: it has one. unknown tells that it is for
// want of one that the agent isn't registered.
func (l *link) refused(ctx context.Context, why error) (unknown bool, err error) {
	switch rpc.ReasonOf(why) {
	case rpc.Unauthenticated:
		return true, l.identity.prove(ctx, l.master())
	case rpc.UntrustedPeer:
		return true, l.identity.orJoin(ctx, l.master(), why)
	default:
		return false, why
	}
}

// forGood tells whether no time heals an error of a first registration. A token that a master of this host is still to leave
// is waited for.
func (l *link) forGood(e *rpc.Error) bool {
	switch e.Reason {
	case rpc.AgentIDTaken, rpc.TokenRefused:
		return true
	case rpc.Unauthenticated:
		return !rpc.Loopback(l.master())
	default:
		return e.Code() == codes.InvalidArgument
	}
}

// beat sends heartbeats until the registration is lost, and returns how long to wait before the next one.
func (l *link) beat(ctx context.Context) time.Duration {
	l.log.Info().Dur("interval_ms", l.every).Msg("heartbeat loop started")
	tick := time.NewTicker(l.every)
	defer tick.Stop()
	l.sequence, l.acknowledged, l.measured, l.full = 0, 0, 0, true
	missed := false
	for {
		resp, now, measured, err := l.tell(ctx)
		if ctx.Err() != nil {
			return 0
		}
		l.metrics.sent(err)
		switch reason := rpc.ReasonOf(err); {
		case err == nil:
			if missed {
				l.log.Info().Str("master", l.master()).Msg("the master answers again")
			}
			missed, l.acknowledged, l.measured, l.full = false, now, measured, resp.GetWantFull()
			if resp.GetWantRenewal() && l.identity != nil {
				l.identity.hurry()
			}
			if l.full {
				if !sleep(ctx, settle) {
					return 0
				}
				continue
			}
		case reason == rpc.AgentNotRegistered:
			l.log.Warn().Msg("the master doesn't know this agent (any more); registering again")
			return 0
		case reason == rpc.Unauthenticated, reason == rpc.UntrustedPeer:
			l.log.Warn().Err(err).Msg("the master doesn't take this agent's identity (any more); registering again")
			return missedPause
		case reason == rpc.EpochSuperseded:
			l.log.Error().Err(err).Msg("another agent runs under this agent's identity; stop one of the two")
			return supersededPause
		default:
			if !missed {
				l.log.Warn().Err(err).Msg("heartbeat missed; nodes run on, trying again")
			}
			missed = true
			l.next()
		}
		if missed {
			if !sleep(ctx, missedPause/2+rand.N(missedPause/2)) {
				return 0
			}
			continue
		}
		select {
		case <-ctx.Done():
			return 0
		case <-tick.C:
		case <-l.nodes.Dirty():
			if !sleep(ctx, settle) {
				return 0
			}
		}
	}
}

// tell sends one beat, and returns the revision and the round of measuring that it brings the master to.
func (l *link) tell(ctx context.Context) (resp *sutrav1.HeartbeatResponse, now, measured uint64, err error) {
	l.sequence++
	if l.full {
		l.acknowledged, l.measured = 0, 0
	}
	select {
	case <-l.nodes.Dirty(): // what changed up to here, this beat tells
	default:
	}
	changed, gone, now := l.nodes.Changes(l.acknowledged)
	usage, measured := l.nodes.Usage(l.measured) // after the changes: it is of the processes that they tell of
	resp, err = l.client.Heartbeat(ctx, &sutrav1.HeartbeatRequest{
		AgentId: l.self.GetAgentId(), Epoch: l.epoch, Sequence: l.sequence, Changed: brief(changed), Gone: gone, Full: l.full, Usage: usage,
	})
	return resp, now, measured, err
}

// leave tells the master the last of the nodes, and that this agent stops in good order. A master that is away finds
// out by itself.
func (l *link) leave(ctx context.Context) {
	if l.epoch == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	_, _, _, err := l.tell(ctx)
	if err == nil {
		_, err = l.client.UnregisterAgent(ctx, &sutrav1.UnregisterAgentRequest{AgentId: l.self.GetAgentId(), Epoch: l.epoch})
	}
	if err != nil {
		l.log.Warn().Err(err).Msg("the master wasn't told that this agent stops")
	}
}

// errNotRegistered is what /healthz says while the master doesn't know this agent.
var errNotRegistered = errors.New("not registered with the master")

func (l *link) healthy() error {
	if !l.registered.Load() {
		return errNotRegistered
	}
	return nil
}

// brief shortens the outputs in statements that are about to be sent.
func brief(nodes []*sutrav1.Node) []*sutrav1.Node {
	for _, n := range nodes {
		if out := n.GetLastExit().GetOutput(); len(out) > beatOutput {
			n.LastExit.Output = strings.ToValidUTF8(out[len(out)-beatOutput:], "\uFFFD")
		}
	}
	return nodes
}

// sleep waits; false where ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// linkMetrics counts heartbeats.
type linkMetrics struct{ beats *prometheus.CounterVec }

func newLinkMetrics(r prometheus.Registerer) *linkMetrics {
	m := &linkMetrics{beats: prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sutra_heartbeats_sent_total", Help: "Heartbeats sent to the master, by outcome (ok or the error's reason).",
	}, []string{"outcome"})}
	r.MustRegister(m.beats)
	return m
}

func (m *linkMetrics) sent(err error) {
	outcome := "ok"
	if err != nil {
		outcome = string(rpc.ReasonOf(err))
	}
	m.beats.WithLabelValues(outcome).Inc()
}
