package agent

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/agent/nodes"
	"github.com/sutra-grid/sutra/rpc"
)

// service is what the master calls.
type service struct {
	sutrav1.UnimplementedGridAgentServer
	agentID string
	nodes   *nodes.Manager
}

func (s *service) SpawnNode(ctx context.Context, req *sutrav1.GridAgentSpawnNodeRequest) (*sutrav1.GridAgentSpawnNodeResponse, error) {
	if err := s.asked("node.node_id", req.GetNode()); err != nil {
		return nil, err
	}
	node, err := s.nodes.Spawn(ctx, req.GetNode())
	if err != nil {
		return nil, err
	}
	return &sutrav1.GridAgentSpawnNodeResponse{Node: node}, nil
}

// asked refuses a call on a node whose id can't be one, for it becomes the name of files and control groups, and one that is
// for another agent.
func (s *service) asked(field string, req interface {
	GetNodeId() string
	GetAgentId() string
},
) error {
	if err := config.ValidID("", req.GetNodeId()); err != nil {
		return rpc.Invalid(rpc.Violation{Field: field, Description: err.Error()})
	}
	return s.meant(req.GetAgentId())
}

// meant refuses a call that is for another agent: this one has come to its address.
func (s *service) meant(agentID string) error {
	if agentID == s.agentID {
		return nil
	}
	return rpc.Errorf(rpc.WrongAgent, "the call is meant for agent %q, and this is %s", agentID, s.agentID).With("agent_id", s.agentID).
		WithHint("two agents share one address, or one has moved; check advertise in their files")
}

func (s *service) StopNode(ctx context.Context, req *sutrav1.GridAgentStopNodeRequest) (*sutrav1.GridAgentStopNodeResponse, error) {
	if err := s.asked("node_id", req); err != nil {
		return nil, err
	}
	node, err := s.nodes.Stop(ctx, req.GetNodeId())
	if err != nil {
		return nil, err
	}
	return &sutrav1.GridAgentStopNodeResponse{Node: node}, nil
}

func (s *service) RestartNode(ctx context.Context, req *sutrav1.GridAgentRestartNodeRequest) (*sutrav1.GridAgentRestartNodeResponse, error) {
	if err := s.asked("node_id", req); err != nil {
		return nil, err
	}
	node, err := s.nodes.Restart(ctx, req.GetNodeId(), req.GetRestartCount())
	if err != nil {
		return nil, err
	}
	return &sutrav1.GridAgentRestartNodeResponse{Node: node}, nil
}

func (s *service) GetNodeStatus(_ context.Context, req *sutrav1.GridAgentGetNodeStatusRequest) (*sutrav1.GridAgentGetNodeStatusResponse, error) {
	if err := s.asked("node_id", req); err != nil {
		return nil, err
	}
	node, ok := s.nodes.Get(req.GetNodeId())
	if !ok {
		return nil, rpc.Errorf(rpc.NodeNotFound, "agent %s runs no node %s", s.agentID, req.GetNodeId()).With("node_id", req.GetNodeId())
	}
	return &sutrav1.GridAgentGetNodeStatusResponse{Node: node, ObservedAt: timestamppb.Now()}, nil
}

// TailLogs streams a node's log, also of a node that has ended.
func (s *service) TailLogs(req *sutrav1.GridAgentTailLogsRequest, stream grpc.ServerStreamingServer[sutrav1.GridAgentTailLogsResponse]) error {
	if err := s.asked("node_id", req); err != nil {
		return err
	}
	return s.nodes.TailLogs(stream.Context(), req.GetNodeId(), req.GetRange(), func(c *sutrav1.LogChunk) error {
		return stream.Send(&sutrav1.GridAgentTailLogsResponse{Chunk: c})
	})
}

func (s *service) ListNodes(_ context.Context, req *sutrav1.GridAgentListNodesRequest) (*sutrav1.GridAgentListNodesResponse, error) {
	if err := s.meant(req.GetAgentId()); err != nil {
		return nil, err
	}
	return &sutrav1.GridAgentListNodesResponse{Nodes: s.nodes.List()}, nil
}
