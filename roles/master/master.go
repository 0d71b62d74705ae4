// Package master decides what runs where: it knows the agents, keeps what is
// wanted, calls the agents and answers the clients.
package master

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/events"
	"github.com/sutra-grid/sutra/roles/master/reconcile"
	"github.com/sutra-grid/sutra/roles/master/registry"
	"github.com/sutra-grid/sutra/roles/master/store"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

const (
	// watchEvery is how often agents' silences are looked at.
	watchEvery = 250 * time.Millisecond
	// pruneEvery is how often ended nodes, old tombstones, and tokens and identities that are over are cleared away.
	pruneEvery = 10 * time.Minute
	// endedFor is how long an ended node is shown; its request id is known for as long.
	endedFor = 24 * time.Hour
	// silentFor is how long an OFFLINE agent without nodes is shown.
	silentFor = 24 * time.Hour
	// tombstoneFor is how long an agent may be away and still be told that its node was removed.
	tombstoneFor = 30 * 24 * time.Hour
	// tokenFor is how long a token is listed that nobody can join with any more.
	tokenFor = 24 * time.Hour
	// identityFor is how long after its last certificate's end an identity belongs to whom it was given: for as long as that may prove by
	// its key who it is, and what the record may lag behind.
	identityFor = graceAfterExpiry + notedEvery
)

// Config is what a master is made of.
type Config struct {
	// Home is SUTRA_HOME; the master's own part of it is master/.
	Home string
	// Listener is where agents and clients call. Owned by the master from New on.
	Listener net.Listener
	// HTTP is where /metrics and /healthz are served; nil: nowhere. Owned by the master from New on.
	HTTP net.Listener
	// Thresholds of the agents' silence.
	Thresholds health.Thresholds
	Version    string
	// Insecure has everything in the clear.
	Insecure rpc.Insecure
	// CertificateLife is how long the certificates last that the master gives.
	CertificateLife time.Duration
	Log             zerolog.Logger
}

// Master is one master of a grid.
type Master struct {
	cfg      Config
	metrics  *prometheus.Registry
	rpc      *rpc.Metrics
	store    *store.Store
	registry *registry.Registry
	pool     *rpc.Pool
	service  *service
	// identity is the master's own; nil where everything is in the clear.
	identity *pki.Holder
	audit    *rpc.Audit
}

// New opens the master's home, with all that was wanted before, and starts to wait for the agents.
func New(ctx context.Context, cfg Config) (*Master, error) {
	if err := cfg.Thresholds.Validate(); err != nil {
		return nil, err
	}
	st, err := store.Open(ctx, store.Config{Dir: filepath.Join(cfg.Home, "master"), Log: cfg.Log})
	if errors.Is(err, config.ErrLocked) {
		return nil, rpc.Errorf(rpc.PathInUse, "%v", err).With("home", cfg.Home).
			WithHint("stop that one, or choose another home for this one: sutra master --home FOLDER")
	}
	if err != nil {
		return nil, err
	}
	state, err := st.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("load what is wanted: %w", orClose(err, st))
	}
	started, hub := time.Now(), events.New()
	m := &Master{cfg: cfg, metrics: prometheus.NewRegistry(), store: st, registry: registry.New(cfg.Thresholds, hub.Publish)}
	m.registry.Load(state.Agents, state.Nodes, state.Tombstones, started)

	m.metrics.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	m.rpc = rpc.NewMetrics(m.metrics)
	admittance, err := m.secure(ctx, state.Bans)
	if err != nil {
		return nil, orClose(err, st)
	}
	if m.audit, err = rpc.OpenAudit(filepath.Join(cfg.Home, "master"), cfg.Log, hub.Publish); err != nil {
		return nil, orClose(err, st)
	}
	m.pool = rpc.NewPool(rpc.Held(m.identity), m.rpc)
	m.service = &service{
		store: st, registry: m.registry, events: hub, pool: m.pool, metrics: newMetrics(m.metrics, m.registry),
		thresholds: cfg.Thresholds, version: cfg.Version, started: started, access: admittance, identity: m.identity, anew: m.anew, log: cfg.Log,
		leaveAdmin: func() error { return m.leaveAdmin(admittance) },
	}
	cfg.Log.Info().Str("version", cfg.Version).Str("grid_id", st.GridID()).Int("agents", len(state.Agents)).
		Int("nodes", len(state.Nodes)).Str("home", cfg.Home).Msg("master starting")
	return m, nil
}

// Run works until ctx ends or the store fails.
func (m *Master) Run(ctx context.Context) (err error) {
	log := m.cfg.Log
	defer func() { err = orClose(err, m.store) }()
	defer m.pool.Close()
	defer func() { _ = m.audit.Close() }() // nothing is buffered

	local := config.Local{Endpoint: reachable(m.cfg.Listener.Addr()), PID: os.Getpid()}
	if m.cfg.HTTP != nil {
		local.HTTP = reachable(m.cfg.HTTP.Addr())
	}
	withdraw, err := config.Announce(m.cfg.Home, "master", local)
	if err != nil {
		return fmt.Errorf("announce the master on this host: %w", err)
	}
	defer func() {
		if err := withdraw(); err != nil {
			log.Warn().Err(err).Msg("announcement not withdrawn")
		}
	}()

	guard := rpc.Guard{Credentials: m.identity, Banned: m.service.access.banned, Audit: m.audit}
	server := rpc.NewServer(log, m.rpc, guard)
	m.service.expel = server.Expel
	sutrav1.RegisterGridMasterServer(server, m.service)
	driver := &reconcile.Driver{Registry: m.registry, Actor: m.service, Log: log}

	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return rpc.Serve(ctx, server, m.cfg.Listener) })
	if m.cfg.HTTP != nil {
		group.Go(func() error {
			return rpc.ServeHTTP(ctx, rpc.Observability(m.metrics, m.store.Healthy), m.cfg.HTTP, guard, m.rpc)
		})
	}
	group.Go(func() error { return driver.Run(ctx) })
	group.Go(func() error { return m.watch(ctx) })
	group.Go(func() error { return m.prune(ctx) })
	group.Go(func() error { return m.renew(ctx) })
	group.Go(func() error {
		select {
		case <-ctx.Done():
			return nil
		case err := <-m.store.Err():
			return fmt.Errorf("the store failed: %w", err)
		}
	})
	log.Info().Str("listen", m.cfg.Listener.Addr().String()).Str("http", local.HTTP).Msg("master listening")
	err = group.Wait()
	log.Info().Msg("master stopped")
	return err
}

// watch tells of agents whose health changes.
func (m *Master) watch(ctx context.Context) error {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	told := map[string]time.Time{} // when it was said of an agent that it makes nodes up
	for {
		if stood := m.registry.Watch(time.Now()); stood > 0 {
			m.cfg.Log.Warn().Dur("stood_ms", stood).Msg("this master stood still; that time isn't held against the agents")
		}
		for id, count := range m.registry.Ignored() {
			if time.Since(told[id]) < time.Minute {
				continue
			}
			told[id] = time.Now()
			m.cfg.Log.Warn().Str("agent_id", id).Int("nodes", count).
				Msg("an agent tells of nodes that can't be, or of more than there can be; they are ignored. If it isn't yours: sutra agents ban")
		}
		for _, t := range m.registry.Transitions(time.Now()) {
			event := m.cfg.Log.Info()
			if t.To == health.Degraded || t.To == health.Offline {
				event = m.cfg.Log.Warn()
			}
			event.Str("agent_id", t.AgentID).Stringer("from", t.From).Stringer("to", t.To).Msg("agent is " + t.To.String() + ", " + t.Silence)
			if t.To == health.Offline {
				m.pool.Drop(t.AgentID)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// prune clears away what ended long ago, and agents that are long gone.
func (m *Master) prune(ctx context.Context) error {
	tick := time.NewTicker(pruneEvery)
	defer tick.Stop()
	for {
		now := time.Now()
		ended, tombs := now.Add(-endedFor), now.Add(-tombstoneFor)
		switch count, err := m.store.Prune(ctx, ended, tombs); {
		case err != nil && ctx.Err() == nil:
			m.cfg.Log.Warn().Err(err).Msg("ended nodes not pruned")
		case err == nil:
			m.registry.Prune(ended, tombs)
			if count > 0 {
				m.cfg.Log.Info().Int("records", count).Msg("pruned ended nodes")
			}
		}
		switch count, err := m.store.PruneAccess(ctx, now.Add(-tokenFor), now.Add(-identityFor)); {
		case err != nil && ctx.Err() == nil:
			m.cfg.Log.Warn().Err(err).Msg("tokens and identities not pruned")
		case err == nil && count > 0:
			m.cfg.Log.Info().Int("records", count).Msg("pruned tokens and identities that are over")
		}
		if err := m.service.retireInTime(ctx); err != nil && ctx.Err() == nil {
			m.cfg.Log.Warn().Err(err).Msg("the older root isn't retired; trying on")
		}
		for _, a := range m.registry.Idle(silentFor, now) {
			m.service.forget(ctx, a)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// orClose closes the store; the first trouble is the one that counts.
func orClose(err error, st *store.Store) error {
	if closing := st.Close(); err == nil && closing != nil {
		return fmt.Errorf("close the store: %w", closing)
	}
	return err
}

// reachable is where a role of the same host reaches a listener.
func reachable(addr net.Addr) string {
	at, ok := addr.(*net.TCPAddr)
	if !ok || !at.IP.IsUnspecified() {
		return addr.String()
	}
	return net.JoinHostPort("127.0.0.1", fmt.Sprint(at.Port))
}
