package master

import (
	"context"
	"net"
	"time"

	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// maxAgent is how much an agent may say of itself, in bytes; it is written down at each registration. A thousand labels or profiles are less.
const maxAgent = 64 << 10

func (s *service) RegisterAgent(ctx context.Context, req *sutrav1.RegisterAgentRequest) (*sutrav1.RegisterAgentResponse, error) {
	a := req.GetAgent()
	var bad checks
	bad.id("agent.agent_id", a.GetAgentId())
	bad.id("agent.instance_id", a.GetInstanceId())
	var from net.Addr
	if caller, ok := peer.FromContext(ctx); ok {
		from = caller.Addr
	}
	if why := address(a.GetEndpoint(), from); why != "" {
		bad.add("agent.endpoint", "%s", why)
	}
	if n := a.GetMaxNodes(); n == 0 || n > config.MaxNodes {
		bad.add("agent.max_nodes", "%d isn't between 1 and %d", n, config.MaxNodes)
	}
	if size := proto.Size(a); size > maxAgent {
		bad.add("agent", "has %d bytes of names and labels, of which at most %d are taken", size, maxAgent)
	}
	if every := req.GetHeartbeatInterval().AsDuration(); every <= 0 || every >= s.thresholds.Degraded {
		bad.add("heartbeat_interval", "%v must be positive and shorter than %v, after which the master calls a silent agent DEGRADED",
			every, s.thresholds.Degraded)
	}
	if err := bad.err(); err != nil {
		return nil, err
	}

	claim, err := s.registry.Claim(a, time.Now())
	if err != nil {
		s.log.Warn().Err(err).Str("agent_id", a.GetAgentId()).Str("endpoint", a.GetEndpoint()).Msg("registration refused")
		return nil, err
	}
	if err := s.store.SaveAgent(ctx, claim); err != nil {
		s.registry.Release(claim)
		return nil, persisted(err)
	}
	s.registry.Register(claim, req.GetNodes(), time.Now())
	s.access.shown(a.GetAgentId(), rpc.CertificateOf(ctx))
	s.log.Info().Str("agent_id", a.GetAgentId()).Str("endpoint", a.GetEndpoint()).Str("hostname", a.GetHostname()).
		Uint64("epoch", claim.GetEpoch()).Int("nodes", len(req.GetNodes())).Msg("agent registered")
	return &sutrav1.RegisterAgentResponse{GridId: s.store.GridID(), Epoch: claim.GetEpoch(), MasterVersion: s.version}, nil
}

func (s *service) Heartbeat(ctx context.Context, req *sutrav1.HeartbeatRequest) (*sutrav1.HeartbeatResponse, error) {
	wantFull, err := s.registry.Beat(req, time.Now())
	s.metrics.beat(err)
	if err != nil {
		return nil, err
	}
	return &sutrav1.HeartbeatResponse{WantFull: wantFull, WantRenewal: s.access.shown(req.GetAgentId(), rpc.CertificateOf(ctx))}, nil
}

// UnregisterAgent: an agent that leaves no node behind is forgotten, so that nobody waits for it. One that does is OFFLINE.
func (s *service) UnregisterAgent(ctx context.Context, req *sutrav1.UnregisterAgentRequest) (*sutrav1.UnregisterAgentResponse, error) {
	if s.registry.Unregister(req.GetAgentId(), req.GetEpoch()) {
		s.pool.Drop(req.GetAgentId())
		s.log.Info().Str("agent_id", req.GetAgentId()).Msg("agent took its leave")
		for _, a := range s.registry.Idle(0, time.Now()) {
			if a.GetAgentId() == req.GetAgentId() {
				s.forget(ctx, a)
			}
		}
	}
	return &sutrav1.UnregisterAgentResponse{}, nil
}

// forget removes an agent that nobody waits for. Where the store can't, prune tries again.
func (s *service) forget(ctx context.Context, a *sutrav1.Agent) {
	switch forgotten, err := s.store.ForgetAgent(ctx, a); {
	case err != nil:
		s.log.Warn().Err(err).Str("agent_id", a.GetAgentId()).Msg("agent without nodes not forgotten yet")
	case forgotten:
		s.registry.Forget(a, time.Now())
		s.log.Info().Str("agent_id", a.GetAgentId()).Msg("agent without nodes is forgotten")
	}
}

func (s *service) ListAgents(context.Context, *sutrav1.ListAgentsRequest) (*sutrav1.ListAgentsResponse, error) {
	return &sutrav1.ListAgentsResponse{Agents: s.agents(time.Now())}, nil
}

// agents are all of them as they stand now, by id.
func (s *service) agents(now time.Time) []*sutrav1.Agent {
	all := s.registry.Agents(now)
	for _, a := range all {
		if cert := s.access.certificate(a.GetAgentId()); cert != nil {
			a.CertificateExpiresAt = timestamppb.New(cert.NotAfter)
		}
	}
	return all
}

// knownAgent refuses the name of an agent that isn't registered; no name is right.
func (s *service) knownAgent(id string) error {
	if id == "" {
		return nil
	}
	var bad checks
	bad.id("agent_id", id)
	if err := bad.err(); err != nil {
		return err
	}
	if _, err := s.registry.Callable(id, time.Now()); rpc.ReasonOf(err) == rpc.AgentNotRegistered {
		return err
	}
	return nil
}
