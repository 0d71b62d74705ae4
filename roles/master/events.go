package master

import (
	"google.golang.org/grpc"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/events"
	"github.com/sutra-grid/sutra/rpc"
)

// WatchEvents passes on what the hub remembers, and what comes.
func (s *service) WatchEvents(req *sutrav1.WatchEventsRequest, stream grpc.ServerStreamingServer[sutrav1.WatchEventsResponse]) error {
	from, err := s.eventsAsked(req)
	if err != nil {
		return err
	}
	if err := stream.Send(&sutrav1.WatchEventsResponse{Message: &sutrav1.WatchEventsResponse_Begin{Begin: from.Begin}}); err != nil {
		return err
	}
	if from.Restarted {
		if err := stream.Send(eventsMissed(&sutrav1.EventsMissed{Restarted: true})); err != nil {
			return err
		}
	}
	for req.GetFollow() || !from.Done() {
		missed, batch, more := from.Next()
		if missed > 0 {
			if err := stream.Send(eventsMissed(&sutrav1.EventsMissed{Count: missed})); err != nil {
				return err
			}
		}
		for _, e := range batch {
			if err := stream.Send(&sutrav1.WatchEventsResponse{Message: &sutrav1.WatchEventsResponse_Event{Event: e}}); err != nil {
				return err
			}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-stream.Context().Done():
			return stream.Context().Err()
		case <-more:
		}
	}
	return nil
}

func (s *service) eventsAsked(req *sutrav1.WatchEventsRequest) (*events.Reader, error) {
	since := req.GetSince()
	if err := since.CheckValid(); since != nil && (err != nil || since.AsDuration() < 0) {
		return nil, rpc.Invalid(rpc.Violation{Field: "since", Description: "must be how long ago, and no less than 0 s"})
	}
	switch {
	case req.GetAfter() != nil:
		return s.events.After(req.GetAfter()), nil
	case since != nil:
		return s.events.Since(since.AsDuration()), nil
	default:
		return s.events.All(), nil
	}
}

func eventsMissed(m *sutrav1.EventsMissed) *sutrav1.WatchEventsResponse {
	return &sutrav1.WatchEventsResponse{Message: &sutrav1.WatchEventsResponse_Missed{Missed: m}}
}
