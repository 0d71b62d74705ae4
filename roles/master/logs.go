package master

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// awayPause is the wait between two tries to reach the agent of a log that is followed.
const awayPause = 250 * time.Millisecond

// TailLogs passes on what a node's agent has of its log, also of a node that has ended or was removed. A log that is
// followed goes on once its agent is back.
func (s *service) TailLogs(req *sutrav1.TailLogsRequest, stream grpc.ServerStreamingServer[sutrav1.TailLogsResponse]) error {
	id := req.GetNodeId()
	var bad checks
	bad.id("node_id", id)
	if err := bad.err(); err != nil {
		return err
	}
	agentID, _, ok := s.registry.Place(id, time.Now())
	if !ok {
		return nodeNotFound(id)
	}
	ctx := stream.Context()
	pass := &logPass{stream: stream, rest: &sutrav1.LogRange{}}
	if req.GetRange() != nil {
		pass.rest = proto.CloneOf(req.GetRange())
	}
	for {
		err := s.passLog(ctx, pass, id, agentID)
		switch _, ended, _ := s.registry.Place(id, time.Now()); {
		case rpc.ReasonOf(err) == rpc.CertificateExpired && !pass.lost:
			continue // this master's own, which it has renewed long since
		case err == nil, pass.lost, !pass.rest.GetFollow(), ended, rpc.Refused(err):
			return away(err, agentID)
		case ctx.Err() != nil:
			return ctx.Err()
		}
		if !pass.noticed {
			pass.noticed = true
			if err := stream.Send(&sutrav1.TailLogsResponse{Notice: "waiting for agent " + agentID + ": " + err.Error()}); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(awayPause):
		}
	}
}

// away says what to do where an agent that has a log can't be reached or doesn't answer.
func away(err error, agentID string) error {
	e := rpc.AsError(err)
	if e == nil || e.RetryAfter > 0 || e.Reason != rpc.AgentUnreachable && e.Reason != rpc.AgentOffline && e.Reason != rpc.TimedOut {
		return err
	}
	return e.With("agent_id", agentID).WithHint("look at agent %s on its host, which keeps the log: sutra list-agents shows when it is back", agentID)
}

// logPass is one log on its way to a caller.
type logPass struct {
	stream grpc.ServerStreamingServer[sutrav1.TailLogsResponse]
	// rest is what the caller hasn't got yet.
	rest *sutrav1.LogRange
	// noticed: the caller knows that the agent is away.
	noticed bool
	// lost: the caller can't be reached any more.
	lost bool
}

// passLog passes on one stream of the agent's. nil says that the agent has ended it: there is no more.
func (s *service) passLog(ctx context.Context, p *logPass, id, agentID string) error {
	client, err := s.agentClient(agentID)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the agent's stream
	from, err := client.TailLogs(ctx, &sutrav1.GridAgentTailLogsRequest{NodeId: id, AgentId: agentID, Range: p.rest})
	if err != nil {
		return err
	}
	for {
		got, err := from.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		p.noticed = false
		if err := p.stream.Send(&sutrav1.TailLogsResponse{Chunk: got.GetChunk()}); err != nil {
			p.lost = true
			return err
		}
		p.rest = &sutrav1.LogRange{Follow: p.rest.GetFollow(), Position: got.GetChunk().GetPosition()}
	}
}
