package master

import (
	"context"
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/registry"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// maxReasons bounds what GetClusterStatus explains.
const maxReasons = 10

// GetNodeStatus asks the node's agent; where that can't answer, it gives the last known state and says why.
func (s *service) GetNodeStatus(ctx context.Context, req *sutrav1.GetNodeStatusRequest) (*sutrav1.GetNodeStatusResponse, error) {
	id := req.GetNodeId()
	view, ok, err := s.asked(id, "")
	switch {
	case err != nil:
		return nil, err
	case !ok:
		return nil, s.notFound(id)
	case view.Ended:
		return cached(view, "the node has ended"), nil
	case req.GetCachedOnly():
		return cached(view, "asked for"), nil
	}
	client, err := s.agentClient(view.Node.GetAgentId())
	if err != nil {
		return cached(view, err.Error()), nil
	}
	ctx, cancel := detached(ctx)
	defer cancel()
	resp, err := client.GetNodeStatus(ctx, &sutrav1.GridAgentGetNodeStatusRequest{NodeId: id, AgentId: view.Node.GetAgentId()})
	if err != nil {
		if now, ok := s.registry.Node(id, time.Now()); ok {
			view = now // it may have changed while the agent was asked
		}
		return cached(view, err.Error()), nil
	}
	s.registry.Observe(resp.GetNode(), time.Now())
	if view, ok = s.registry.Node(id, time.Now()); !ok {
		return nil, nodeNotFound(id)
	}
	return &sutrav1.GetNodeStatusResponse{
		Node: view.Node, Source: sutrav1.Source_SOURCE_LIVE, ObservedAt: view.Node.GetObservedAt(),
	}, nil
}

func cached(v registry.View, reason string) *sutrav1.GetNodeStatusResponse {
	return &sutrav1.GetNodeStatusResponse{
		Node: v.Node, Source: sutrav1.Source_SOURCE_CACHED, ObservedAt: v.Node.GetObservedAt(), Reason: reason,
	}
}

func (s *service) ListNodes(_ context.Context, req *sutrav1.ListNodesRequest) (*sutrav1.ListNodesResponse, error) {
	if err := s.knownAgent(req.GetAgentId()); err != nil {
		return nil, err
	}
	views := s.registry.Nodes(req.GetAgentId(), req.GetIncludeEnded(), time.Now())
	resp := &sutrav1.ListNodesResponse{}
	for _, v := range views {
		resp.Nodes = append(resp.Nodes, v.Node)
	}
	return resp, nil
}

func (s *service) GetClusterStatus(context.Context, *sutrav1.GetClusterStatusRequest) (*sutrav1.GetClusterStatusResponse, error) {
	now := time.Now()
	resp := &sutrav1.GetClusterStatusResponse{
		GridId: s.store.GridID(), Version: s.version, StartedAt: timestamppb.New(s.started),
		AgentsByHealth: map[string]uint32{}, NodesByPhase: map[string]uint32{},
	}
	var warning string
	if s.identity != nil {
		authority := s.access.current()
		root := authority.Roots()[0]
		resp.RootExpiresAt, warning = timestamppb.New(root.NotAfter), rootWarning(root, now)
		if since := authority.Rotated(); !since.IsZero() {
			resp.RotatedAt = timestamppb.New(since)
		}
		resp.CertificateExpiresAt = timestamppb.New(s.identity.Get().Expires)
	}
	usable := false
	for _, a := range s.agents(now) {
		resp.AgentsByHealth[a.GetHealth().Word()]++
		resp.SlotsTaken += a.GetNodeCount()
		switch a.GetHealth() {
		case sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY, sutrav1.AgentHealth_AGENT_HEALTH_DEGRADED:
			resp.MaxNodes += a.GetMaxNodes() // nothing can be started on the others
		}
		switch a.GetHealth() {
		case sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY:
			usable = true
		default:
			resp.Reasons = append(resp.Reasons, fmt.Sprintf("agent %s is %s", a.GetAgentId(), a.GetHealth().Word()))
		}
		if ends := a.GetCertificateExpiresAt(); ends != nil && a.GetHealth() != sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE {
			if first := resp.GetAgentCertificateExpiresAt(); first == nil || ends.AsTime().Before(first.AsTime()) {
				resp.AgentCertificateExpiresAt = ends
			}
			cert := s.access.certificate(a.GetAgentId())
			if cert != nil && cert.NotAfter.Sub(now) < cert.NotAfter.Sub(pki.Begins(cert))/6 { // it should have been renewed when a third was left
				resp.Reasons = append(resp.Reasons, fmt.Sprintf("agent %s hasn't renewed its certificate, which ends at %s: its log says why",
					a.GetAgentId(), ends.AsTime().UTC().Format(time.RFC3339)))
			}
		}
	}
	for _, v := range s.registry.Nodes("", false, now) {
		n := v.Node
		resp.NodesByPhase[n.GetPhase().Word()]++
		switch n.GetPhase() {
		case sutrav1.Phase_PHASE_FAILED, sutrav1.Phase_PHASE_CRASH_LOOP, sutrav1.Phase_PHASE_UNKNOWN:
			resp.Reasons = append(resp.Reasons, fmt.Sprintf("node %s is %s: %s", n.GetNodeId(), n.GetPhase().Word(), n.GetReason()))
		case sutrav1.Phase_PHASE_RUNNING:
			if n.GetHealth() == sutrav1.NodeHealth_NODE_HEALTH_NOT_READY {
				resp.Reasons = append(resp.Reasons, fmt.Sprintf("node %s isn't ready: %s", n.GetNodeId(), n.GetReason()))
			}
		}
	}
	switch {
	case !usable:
		resp.Health = sutrav1.ClusterHealth_CLUSTER_HEALTH_DOWN
		resp.Reasons = append([]string{"no agent is HEALTHY"}, resp.Reasons...)
	case len(resp.Reasons) > 0:
		resp.Health = sutrav1.ClusterHealth_CLUSTER_HEALTH_DEGRADED
	default:
		resp.Health = sutrav1.ClusterHealth_CLUSTER_HEALTH_HEALTHY
	}
	if warning != "" { // as healthy as it is until then
		resp.Reasons = append([]string{warning}, resp.Reasons...)
	}
	if more := len(resp.Reasons) - maxReasons; more > 0 {
		resp.Reasons = append(resp.Reasons[:maxReasons-1], fmt.Sprintf("and %d more", more+1))
	}
	return resp, nil
}
