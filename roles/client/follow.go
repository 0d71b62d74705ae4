package client

import (
	"context"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sutra-grid/sutra/rpc"
)

const (
	// masterAway is how long something is followed without a master; masterPause is the wait between two tries to reach it.
	masterAway  = 30 * time.Second
	masterPause = 250 * time.Millisecond
	// clockSkew is how much the clock of a host where somebody looked up a time may be ahead of this one's.
	clockSkew = time.Minute
)

// follow has once print what one stream brings, until it ends, and again where a master that was away is back, and with a renewed
// certificate where the one that it had has ended. To interrupt it is its usual end. once tells whether the master sent anything.
func (s *session) follow(ctx context.Context, once func(context.Context) (answered bool, err error)) error {
	keeping, stop := context.WithCancel(ctx)
	var kept sync.WaitGroup
	kept.Go(func() { s.keep(keeping) })
	defer kept.Wait()
	defer stop()
	var away time.Time // since when; zero where it isn't
	for began := false; ; {
		answered, err := once(ctx)
		began = began || answered
		if answered {
			away = time.Time{}
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case rpc.ReasonOf(err) == rpc.CertificateExpired:
		case err == nil, !began, rpc.AsError(err).Code() != codes.Unavailable && !hangs(err):
			return err
		case away.IsZero():
			away = s.now()
			s.tell("waiting for the master: %s", clean(err.Error()))
		case s.now().Sub(away) >= masterAway:
			return err
		}
		timer := time.NewTimer(masterPause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		if err := s.redial(ctx, renewalDue); err != nil { // with an identity that may have been renewed meanwhile
			return err
		}
	}
}

// hangs tells whether it is the master that doesn't answer.
func hangs(err error) bool { return rpc.Unanswered(err) && rpc.ReasonOf(err) == rpc.TimedOut }

// moment is the time that --since means; nil where it isn't given.
func (s *session) moment(since string) (*timestamppb.Timestamp, error) {
	if since == "" {
		return nil, nil
	}
	at, err := time.Parse(time.RFC3339, since)
	if ago, notDuration := time.ParseDuration(since); notDuration == nil {
		at, err = s.now().Add(-ago), nil
	}
	switch {
	case err != nil:
		return nil, &UsageError{
			Message: fmt.Sprintf("--since %q is neither a duration nor a time", since),
			Hint:    "write a duration such as 90s, 10m or 2h, or a time such as 2026-03-01T12:00:00Z",
		}
	case at.After(s.now().Add(clockSkew)):
		return nil, &UsageError{
			Message: fmt.Sprintf("--since %q lies in the future: nothing is written yet that is so new", since),
			Hint:    "write how far to go back, such as 90s, 10m or 2h, or a time that has passed, such as 2026-03-01T12:00:00Z",
		}
	}
	return timestamppb.New(at), nil
}
