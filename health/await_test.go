package health

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

type probeFunc func(ctx context.Context) error

func (f probeFunc) Check(ctx context.Context) error { return f(ctx) }

func TestAwaitReadyPacesItsChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		last := start
		var pauses []time.Duration
		err := AwaitReady(t.Context(), probeFunc(func(context.Context) error {
			pauses = append(pauses, time.Since(last))
			last = time.Now()
			if len(pauses) == 16 {
				return nil
			}
			return errors.New("not yet")
		}), time.Second)
		if err != nil {
			t.Fatal(err)
		}
		ms := time.Millisecond
		if want := []time.Duration{0, 2 * ms, 3 * ms, 4500 * time.Microsecond}; !slices.Equal(pauses[:4], want) {
			t.Errorf("first pauses %v, want %v", pauses[:4], want)
		}
		if got := pauses[13:]; !slices.Equal(got, []time.Duration{250 * ms, 250 * ms, 250 * ms}) {
			t.Errorf("late pauses %v, want 250ms each", got)
		}
	})
}

func TestAwaitReadyBoundsEachCheckAndEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond)
		defer cancel()
		start := time.Now()
		checks := 0
		err := AwaitReady(ctx, probeFunc(func(ctx context.Context) error {
			checks++
			<-ctx.Done()
			if checks == 2 {
				return errors.New("second hung")
			}
			return errors.New("hung")
		}), time.Second)
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "second hung") {
			t.Errorf("got %v, want the deadline with what the last whole check said", err)
		}
		if took := time.Since(start); checks != 3 || took != 2500*time.Millisecond {
			t.Errorf("%d checks in %s, want 3 in 2.5s", checks, took)
		}
	})
}

func TestAwaitReadyStopsWhenCancelledBetweenChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		refused := errors.New("refused")
		err := AwaitReady(ctx, probeFunc(func(context.Context) error {
			time.AfterFunc(time.Millisecond, cancel)
			return refused
		}), time.Second)
		if !errors.Is(err, context.Canceled) || !errors.Is(err, refused) {
			t.Errorf("got %v, want both the cancellation and the last check's error", err)
		}
	})
}
