package health

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

func TestLivenessThroughSilenceAndRecovery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := NewLiveness(DefaultThresholds(), time.Now())
		expect := func(want State) {
			t.Helper()
			if got := l.State(time.Now()); got != want {
				t.Fatalf("state is %s, want %s", got, want)
			}
		}
		beat := func(wantFrom State) {
			t.Helper()
			if from, to := l.Beat(time.Now()); from != wantFrom || to != Healthy {
				t.Fatalf("beat went from %s to %s, want from %s to healthy", from, to, wantFrom)
			}
			expect(Healthy)
		}

		expect(Unknown)
		time.Sleep(30*time.Second - 1)
		expect(Unknown)
		if _, ok := l.Silent(time.Now()); ok {
			t.Error("silent since a beat that never came")
		}
		time.Sleep(time.Nanosecond)
		expect(Offline)
		beat(Offline)

		time.Sleep(15*time.Second - 1)
		expect(Healthy)
		time.Sleep(time.Nanosecond)
		expect(Degraded)
		beat(Degraded)

		time.Sleep(30*time.Second - 1)
		expect(Degraded)
		time.Sleep(time.Nanosecond)
		expect(Offline)
		if silent, ok := l.Silent(time.Now()); !ok || silent != 30*time.Second {
			t.Errorf("silent for %s, %t, want 30s", silent, ok)
		}
		beat(Offline)
		beat(Healthy)
		if silent, ok := l.Silent(time.Now().Add(-time.Second)); !ok || silent != 0 {
			t.Errorf("silent for %s, %t before the last beat, want 0", silent, ok)
		}

		l.Left()
		expect(Offline)
		beat(Offline)
	})
}

func TestNextChangeWakesAtEachChangeAndNoOther(t *testing.T) {
	tests := []struct {
		name    string
		prepare func(l *Liveness)
		want    []State
		at      []time.Duration
	}{
		{"never beaten", func(*Liveness) {}, []State{Unknown, Offline}, []time.Duration{30 * time.Second}},
		{
			"beaten", func(l *Liveness) { l.Beat(time.Now()) },
			[]State{Healthy, Degraded, Offline},
			[]time.Duration{15 * time.Second, 30 * time.Second},
		},
		{"left", func(l *Liveness) { l.Beat(time.Now()); l.Left() }, []State{Offline}, nil},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				l := NewLiveness(DefaultThresholds(), start)
				tc.prepare(&l)
				states := []State{l.State(time.Now())}
				var at []time.Duration
				for {
					wait, ok := l.NextChange(time.Now())
					if !ok {
						break
					}
					time.Sleep(wait)
					states = append(states, l.State(time.Now()))
					at = append(at, time.Since(start))
				}
				if !slices.Equal(states, tc.want) || !slices.Equal(at, tc.at) {
					t.Errorf("states %v at %v, want %v at %v", states, at, tc.want, tc.at)
				}
			})
		})
	}
}

// TestLivenessInvariants drives a Liveness with any sequence of beats, leaves
// and silences, and holds it against what must be true whatever came before.
func TestLivenessInvariants(t *testing.T) {
	start := time.Now()
	rapid.Check(t, func(t *rapid.T) {
		th := Thresholds{Degraded: time.Duration(rapid.Int64Range(1, 50).Draw(t, "degraded"))}
		th.Offline = th.Degraded + time.Duration(rapid.Int64Range(1, 50).Draw(t, "more"))
		if err := th.Validate(); err != nil {
			t.Fatal(err)
		}
		now := start
		l := NewLiveness(th, start)
		var newest time.Time // of the beats; zero before the first
		left := false
		t.Repeat(map[string]func(*rapid.T){
			"silence": func(t *rapid.T) {
				now = now.Add(time.Duration(rapid.Int64Range(0, 70).Draw(t, "for")))
			},
			"beat": func(t *rapid.T) {
				// Up to three units late, as one that overtook another on the way to the lock.
				at := now.Add(-time.Duration(rapid.Int64Range(0, 3).Draw(t, "late")))
				if newest.IsZero() || at.After(newest) {
					newest = at
				}
				left = false
				before := l.State(at)
				if from, to := l.Beat(at); from != before || to != Healthy || l.State(at) != Healthy {
					t.Fatalf("beat went from %s (was %s) to %s (is %s)", from, before, to, l.State(at))
				}
			},
			"leave": func(*rapid.T) {
				left = true
				l.Left()
			},
			"": func(t *rapid.T) {
				state := l.State(now)
				since := newest
				if since.IsZero() {
					since = start
				}
				silent := now.Sub(since)
				switch {
				case left && state != Offline:
					t.Fatalf("%s after it left", state)
				case !left && (state == Offline) != (silent >= th.Offline):
					t.Fatalf("%s after %d units, offline at %d", state, silent, th.Offline)
				case state == Degraded && (newest.IsZero() || silent < th.Degraded):
					t.Fatalf("degraded after %d units of %d, first beat seen: %t", silent, th.Degraded, !newest.IsZero())
				case state == Healthy && (newest.IsZero() || silent >= th.Degraded):
					t.Fatalf("healthy after %d units of %d, first beat seen: %t", silent, th.Degraded, !newest.IsZero())
				case state == Unknown && !newest.IsZero():
					t.Fatal("unknown after a beat")
				}
				if got, ok := l.Silent(now); ok == newest.IsZero() || (ok && got != max(0, silent)) {
					t.Fatalf("silent for %d, %t, want %d", got, ok, silent)
				}
				wait, ok := l.NextChange(now)
				if ok != (state != Offline) {
					t.Fatalf("next change from %s: %t", state, ok)
				}
				if ok && (wait <= 0 || l.State(now.Add(wait-1)) != state || l.State(now.Add(wait)) == state) {
					t.Fatalf("from %s the next change isn't after %d units", state, wait)
				}
			},
		})
	})
}

func TestThresholdsValidate(t *testing.T) {
	if err := DefaultThresholds().Validate(); err != nil {
		t.Errorf("defaults: %v", err)
	}
	for _, bad := range []Thresholds{{}, {Degraded: 1}, {Degraded: 1, Offline: 1}, {Degraded: 2, Offline: 1}, {Degraded: -1, Offline: 1}, {Offline: 1}} {
		if bad.Validate() == nil {
			t.Errorf("%+v was accepted", bad)
		}
	}
}
