package supervisor

import (
	"math"
	"math/big"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestCrashesGrowThePauseUpToItsBound(t *testing.T) {
	const ms = time.Millisecond
	c := crashes{policy: Restart{First: 100 * ms, Max: 700 * ms, Threshold: 3, Quiet: time.Minute}}
	for i, step := range []struct {
		ran   time.Duration
		pause time.Duration // before jitter
		loop  bool
	}{
		{0, 100 * ms, false},
		{time.Second, 200 * ms, false},
		{time.Minute - 1, 400 * ms, true},
		{0, 700 * ms, true},
		{0, 700 * ms, true},
		{time.Minute, 100 * ms, false}, // it was quiet: all is forgotten
		{0, 200 * ms, false},
		{time.Hour, 100 * ms, false},
	} {
		pause, loop := c.crashed(step.ran)
		if pause > step.pause || pause < step.pause*3/4 || loop != step.loop {
			t.Errorf("crash %d: pause %v, loop %v; want %v less at most a quarter, %v", i+1, pause, loop, step.pause, step.loop)
		}
	}
}

func TestCrashesReachAnOddBoundByDoubling(t *testing.T) {
	c := crashes{policy: Restart{First: 1, Max: 3, Threshold: 1, Quiet: 1}}
	for _, want := range []time.Duration{1, 2, 3, 3} { // too short for jitter
		if pause, _ := c.crashed(0); pause != want {
			t.Errorf("pause %v, want %v", pause, want)
		}
	}
}

func TestCrashesJitter(t *testing.T) {
	policy := Restart{First: time.Hour, Max: time.Hour, Threshold: 1, Quiet: time.Hour}
	pauses := map[time.Duration]bool{}
	for range 100 {
		c := crashes{policy: policy}
		pause, _ := c.crashed(0)
		pauses[pause] = true
	}
	if len(pauses) < 2 {
		t.Error("a hundred units would be restarted all at once")
	}
}

func TestCrashesKeepToAnyPolicy(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		first := rapid.Int64Range(1, math.MaxInt64).Draw(t, "first")
		policy := Restart{
			First:     time.Duration(first),
			Max:       time.Duration(rapid.Int64Range(first, math.MaxInt64).Draw(t, "max")),
			Threshold: rapid.IntRange(1, 10).Draw(t, "threshold"),
			Quiet:     time.Duration(rapid.Int64Range(1, math.MaxInt64).Draw(t, "quiet")),
		}
		if err := policy.validate(); err != nil {
			t.Fatal(err)
		}
		c := crashes{policy: policy}
		count := 0
		for range rapid.IntRange(1, 100).Draw(t, "crashes") {
			ran := time.Duration(0)
			if rapid.IntRange(0, 9).Draw(t, "quiet now") == 0 {
				ran, count = policy.Quiet, 0
			}
			count++
			whole := policy.Max
			if n := new(big.Int).Lsh(big.NewInt(first), uint(count-1)); n.Cmp(big.NewInt(int64(whole))) < 0 {
				whole = time.Duration(n.Int64())
			}
			pause, loop := c.crashed(ran)
			if pause > whole || pause < whole-whole/4 {
				t.Fatalf("crash %d: pause %v, want %v less at most a quarter", count, pause, whole)
			}
			if loop != (count >= policy.Threshold) {
				t.Fatalf("crash %d of %d: loop %v", count, policy.Threshold, loop)
			}
		}
	})
}

func TestDefaultRestartIsValid(t *testing.T) {
	if err := DefaultRestart().validate(); err != nil {
		t.Error(err)
	}
}
