package master

import (
	"bytes"
	"context"
	"time"

	"github.com/rs/xid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/placement"
	"github.com/sutra-grid/sutra/roles/master/registry"
	"github.com/sutra-grid/sutra/rpc"
)

const (
	// placeTries bounds how often placement is made anew because others took the place meanwhile.
	placeTries = 5
	// maxMemoryMB is a pebibyte.
	maxMemoryMB = 1 << 30
)

// SpawnNode: check, reserve, persist the intent, call the agent. An outcome that is known and bad
// undoes everything; one that is unknown leaves the record, and the reconciler settles it.
func (s *service) SpawnNode(ctx context.Context, req *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
	if err := checkSpawn(req); err != nil {
		return nil, err
	}
	for {
		r, err := s.reserve(req)
		if err != nil {
			return nil, err
		}
		if !r.Existing {
			node, err := s.spawnReserved(ctx, r)
			if err != nil {
				return nil, err
			}
			return &sutrav1.SpawnNodeResponse{Node: node}, nil
		}
		if !bytes.Equal(wish(req), r.Record.GetWish()) {
			return nil, rpc.Invalid(rpc.Violation{
				Field: "request_id", Description: req.GetRequestId() + " was used before, for another node",
			}).With("node_id", r.Record.GetNode().GetNodeId()).
				WithHint("use a request id of its own for each node; that one's is shown by: sutra node-status --node %s", r.Record.GetNode().GetNodeId())
		}
		if r.Spawning != nil {
			select {
			case <-r.Spawning: // look again: it is there, or it was undone
				continue
			case <-ctx.Done():
				return nil, tooLate(r.Record.GetNode().GetNodeId())
			}
		}
		node, err := s.spawnAgain(ctx, r.Record)
		if err != nil {
			return nil, err
		}
		return &sutrav1.SpawnNodeResponse{Node: node}, nil
	}
}

func checkSpawn(req *sutrav1.SpawnNodeRequest) error {
	var bad checks
	if req.GetRequestId() != "" {
		bad.id("request_id", req.GetRequestId())
	}
	if req.GetAgentId() != "" {
		bad.id("agent_id", req.GetAgentId())
	}
	if req.GetProfile() != "" {
		bad.id("profile", req.GetProfile())
	}
	if port := req.GetPort(); port != 0 {
		if why := rpc.CheckPort(int(port)); why != "" {
			bad.add("port", "%d %s; take one from %d to %d", port, why, rpc.MinPort, rpc.MaxPort)
		}
	}
	if req.GetStoragePath() != "" {
		if e := rpc.AsError(rpc.CheckStoragePath(req.GetStoragePath())); e != nil {
			bad = append(bad, e.Violations...)
		}
	}
	if req.GetMemoryLimitMb() > maxMemoryMB {
		bad.add("memory_limit_mb", "%d MiB is more than any host has; give MiB, not bytes", req.GetMemoryLimitMb())
	}
	return bad.err()
}

// wish is what a request asks for, whatever its id.
func wish(req *sutrav1.SpawnNodeRequest) []byte {
	anonymous := proto.CloneOf(req)
	anonymous.RequestId, anonymous.Profile = "", profileOf(req)
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(anonymous)
	if err != nil {
		return nil // it came over the wire, so that it can go there
	}
	return data
}

func profileOf(req *sutrav1.SpawnNodeRequest) string {
	if req.GetProfile() == "" {
		return "default"
	}
	return req.GetProfile()
}

// reserve finds the node's place and takes it.
func (s *service) reserve(req *sutrav1.SpawnNodeRequest) (registry.Reservation, error) {
	now := time.Now()
	for try := 1; ; try++ {
		node := &sutrav1.Node{
			NodeId: "node-" + xid.New().String(), AgentId: req.GetAgentId(), Profile: profileOf(req), Port: req.GetPort(),
			StoragePath: req.GetStoragePath(), MemoryLimitMb: req.GetMemoryLimitMb(),
			Desired: sutrav1.Desired_DESIRED_RUNNING, Generation: 1,
		}
		if node.GetAgentId() == "" && !s.registry.Requested(req.GetRequestId()) {
			var err error
			if node.AgentId, err = placement.Choose(s.registry.Candidates(now), node); err != nil {
				return registry.Reservation{}, err
			}
		}
		agent, _ := s.registry.Callable(node.GetAgentId(), now) // Reserve tells of one that can't be called
		if node.GetMemoryLimitMb() == 0 {
			node.MemoryLimitMb = agent.GetDefaultMemoryMb()
		}
		r, err := s.registry.Reserve(&sutrav1.NodeRecord{
			Node: node, RequestId: req.GetRequestId(), CreatedAt: timestamppb.New(now), InstanceId: agent.GetInstanceId(),
			Wish: wish(req),
		}, now)
		if err != nil && req.GetAgentId() == "" && try < placeTries {
			continue // others took the place since the look at the candidates
		}
		return r, err
	}
}

// spawnReserved carries a new reservation to its outcome. It isn't broken off when the caller hangs up:
// from the persisted intent on the node is wanted.
func (s *service) spawnReserved(ctx context.Context, r registry.Reservation) (*sutrav1.Node, error) {
	defer r.Done()
	ctx, cancel := detached(ctx)
	defer cancel()
	id := r.Record.GetNode().GetNodeId()
	began := time.Now()
	// Nobody but this call changes the record yet; the write is the intent.
	_, err := s.change(ctx, id, func(*sutrav1.NodeRecord) bool { return true })
	if err != nil {
		s.undo(ctx, id)
		return nil, err
	}
	s.metrics.stage("persist", began)
	rpc.Begins(ctx, id, r.Record.GetNode().GetAgentId())
	node, err := s.spawn(ctx, r.Record)
	if rpc.NoEffect(err) {
		s.undo(ctx, id)
		err = nothingStarted(rpc.AsError(err))
	}
	return node, err
}

// nothingStarted completes the error of a call that never reached its agent. It names no node any more: there is none.
func nothingStarted(e *rpc.Error) *rpc.Error {
	if e.Reason != rpc.AgentUnreachable {
		return e // the agent's own words, or the registry's
	}
	delete(e.Meta, "node_id")
	e.Message += "; nothing was started"
	return e.WithHint("look at the agent on its host, or choose another: sutra list-agents")
}

// detached is a context that outlives its caller's hanging up, but not its deadline.
func detached(ctx context.Context) (context.Context, context.CancelFunc) {
	free := context.WithoutCancel(ctx)
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(free)
	}
	return context.WithDeadline(free, deadline)
}

// spawnAgain answers a request that was seen before.
func (s *service) spawnAgain(ctx context.Context, rec *sutrav1.NodeRecord) (*sutrav1.Node, error) {
	id := rec.GetNode().GetNodeId()
	view, ok := s.registry.Node(id, time.Now())
	switch {
	case ok && view.Node.GetCompleted():
		return nil, rpc.Errorf(rpc.StoppedMeanwhile, "node %s of request %s has run to its end since", id, rec.GetRequestId()).
			With("node_id", id).WithHint("use another request id for another node")
	case !ok || view.Ended || view.Node.GetDesired() == sutrav1.Desired_DESIRED_STOPPED:
		return nil, rpc.Errorf(rpc.StoppedMeanwhile, "node %s of request %s has been stopped since", id, rec.GetRequestId()).
			With("node_id", id).WithHint("use another request id for another node")
	case rec.GetConfirmed():
		return view.Node, nil
	}
	defer s.registry.Begin(id)()
	ctx, cancel := detached(ctx)
	defer cancel()
	rpc.Begins(ctx, id, rec.GetNode().GetAgentId())
	return s.spawn(ctx, rec)
}

// spawn asks the agent to run a recorded node. To call it again for the same record is safe: the agent knows the node by its id.
func (s *service) spawn(ctx context.Context, rec *sutrav1.NodeRecord) (*sutrav1.Node, error) {
	id, agentID := rec.GetNode().GetNodeId(), rec.GetNode().GetAgentId()
	client, err := s.agentClient(agentID)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	resp, err := client.SpawnNode(ctx, &sutrav1.GridAgentSpawnNodeRequest{Node: rec.GetNode()})
	if err != nil {
		e := rpc.AsError(err).With("node_id", id).With("agent_id", agentID)
		if !rpc.NoEffect(e) && e.Hint == "" {
			e.Message += "; whether node " + id + " starts isn't known yet"
			_ = e.WithHint("look again in a few seconds: sutra node-status --node %s", id)
		}
		return nil, e
	}
	s.metrics.stage("agent", began)
	node := resp.GetNode()
	s.registry.Observe(node, time.Now())
	if now, ok := s.registry.Record(id); !ok || now.GetNode().GetDesired() != sutrav1.Desired_DESIRED_RUNNING {
		return nil, rpc.Errorf(rpc.StoppedMeanwhile, "node %s was stopped while it was starting", id).With("node_id", id)
	}
	// The intent is on disk, so that the node can't be lost. That it went well, and which port it got, the reconciler
	// writes down in a moment: the caller doesn't wait for that.
	view, ok := s.registry.Node(id, time.Now())
	if !ok {
		return node, nil
	}
	return view.Node, nil
}
