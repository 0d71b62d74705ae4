package health

import (
	"context"
	"fmt"
	"time"
)

const (
	firstPause = 2 * time.Millisecond
	maxPause   = 250 * time.Millisecond
)

// AwaitReady checks until the probe is content: at once, then after 2 ms, and
// after pauses that grow by half each time up to 250 ms. each, which must be
// positive, bounds one check. Where the context ends first, the error wraps the
// cause of that and what the last check said.
func AwaitReady(ctx context.Context, p Probe, each time.Duration) error {
	var last error
	for pause := firstPause; ; pause = min(pause*3/2, maxPause) {
		err := checkWithin(ctx, p, each)
		if err == nil {
			return nil
		}
		// A check that the end of the wait cut short knows less than the one before it.
		if ctx.Err() == nil || last == nil {
			last = err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%w; the last check said: %w", context.Cause(ctx), last)
		}
	}
}

func checkWithin(ctx context.Context, p Probe, each time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, each)
	defer cancel()
	return p.Check(ctx)
}
