package supervisor

import (
	"errors"
	"math"
	"math/big"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestCrashesGrowThePauseUpToItsBound(t *testing.T) {
	const ms = time.Millisecond
	c := crashes{policy: Restart{First: 100 * ms, Max: 700 * ms, Threshold: 3, Window: time.Minute}}
	now := time.Now()
	for i, step := range []struct {
		later time.Duration
		pause time.Duration // before jitter
		loop  bool
	}{
		{0, 100 * ms, false},
		{time.Second, 200 * ms, false},
		{59*time.Second - 1, 400 * ms, true},
		{1, 400 * ms, true}, // the first one counts no more
		{0, 700 * ms, true},
		{time.Minute - 1, 400 * ms, true},
		{time.Minute, 100 * ms, false}, // it was quiet: all is forgotten
		{time.Second, 200 * ms, false},
		{time.Hour, 100 * ms, false},
	} {
		now = now.Add(step.later)
		pause, loop := c.crashed(now)
		if pause > step.pause || pause < step.pause*3/4 || loop != step.loop {
			t.Errorf("crash %d: pause %v, loop %v; want %v less at most a quarter, %v", i+1, pause, loop, step.pause, step.loop)
		}
	}
	c.forget()
	if pause, loop := c.crashed(now); pause > 100*ms || loop {
		t.Errorf("after a new beginning: pause %v, loop %v", pause, loop)
	}
}

// A count that was on record stands for crashes at the last one.
func TestCrashesGoOnFromARecord(t *testing.T) {
	policy := Restart{First: 8, Max: 1 << 20, Threshold: 5, Window: time.Minute}
	now := time.Now()
	for later, want := range map[time.Duration]time.Duration{time.Minute - 1: 128, time.Minute: 8} {
		c := crashes{policy: policy}
		c.resume(4, now)
		if pause, loop := c.crashed(now.Add(later)); pause > want || pause < want*3/4 || loop != (want == 128) {
			t.Errorf("after %v: pause %v, loop %v, want %v", later, pause, loop, want)
		}
	}
}

// Whatever count a record has, it costs no more than one that was reached, and means the same.
func FuzzCrashesGoOnFromARecord(f *testing.F) {
	f.Add(0, int64(0))
	f.Add(4, int64(1))
	f.Add(-1, int64(-1))
	f.Add(math.MaxInt, int64(math.MaxInt64))
	f.Add(math.MaxUint32, int64(math.MinInt64))
	f.Fuzz(func(t *testing.T, count int, ago int64) {
		policy := DefaultRestart()
		c := crashes{policy: policy}
		now := time.Now()
		c.resume(count, now.Add(time.Duration(ago)))
		if len(c.at) > maxCrashes {
			t.Fatalf("%d are remembered", len(c.at))
		}
		pause, loop := c.crashed(now)
		if pause <= 0 || pause > policy.Max {
			t.Errorf("pause %v", pause)
		}
		if counted := ago > -int64(policy.Window) && ago <= 0; counted && loop != (count >= policy.Threshold-1) {
			t.Errorf("after %d, loop %v", count, loop)
		}
	})
}

func TestCrashesReachAnOddBoundByDoubling(t *testing.T) {
	c := crashes{policy: Restart{First: 1, Max: 3, Threshold: 1, Window: time.Hour}}
	for _, want := range []time.Duration{1, 2, 3, 3} { // too short for jitter
		if pause, _ := c.crashed(time.Now()); pause != want {
			t.Errorf("pause %v, want %v", pause, want)
		}
	}
}

func TestCrashesJitter(t *testing.T) {
	policy := Restart{First: time.Hour, Max: time.Hour, Threshold: 1, Window: time.Hour}
	pauses := map[time.Duration]bool{}
	for range 100 {
		c := crashes{policy: policy}
		pause, _ := c.crashed(time.Now())
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
			Window:    time.Duration(rapid.Int64Range(1, int64(24*time.Hour)).Draw(t, "window")),
		}
		if err := policy.validate(); err != nil {
			t.Fatal(err)
		}
		c := crashes{policy: policy}
		count := 0
		now := time.Now()
		for range rapid.IntRange(1, 100).Draw(t, "crashes") {
			if rapid.IntRange(0, 9).Draw(t, "quiet now") == 0 {
				now, count = now.Add(policy.Window), 0
			}
			count++
			whole := policy.Max
			if n := new(big.Int).Lsh(big.NewInt(first), uint(count-1)); n.Cmp(big.NewInt(int64(whole))) < 0 {
				whole = time.Duration(n.Int64())
			}
			pause, loop := c.crashed(now)
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

func TestPolicyOfAnExit(t *testing.T) {
	code := func(c int) *Exit { return &Exit{Code: c} }
	signal := func(s string) *Exit { return &Exit{Code: -1, Signal: s} }
	for name, test := range map[string]struct {
		exit    *Exit
		success bool
	}{
		"0":                  {code(0), true},
		"an excused code":    {code(7), true},
		"another code":       {code(1), false},
		"SIGTERM":            {signal("SIGTERM"), true},
		"SIGHUP":             {signal("SIGHUP"), true},
		"SIGINT":             {signal("SIGINT"), true},
		"SIGPIPE":            {signal("SIGPIPE"), true},
		"SIGKILL":            {signal("SIGKILL"), false},
		"SIGSEGV":            {signal("SIGSEGV"), false},
		"a nameless signal":  {signal("signal 40"), false},
		"unseen":             {&Exit{Code: -1, Unknown: true}, false},
		"not started":        {&Exit{Code: -1, Err: errors.New("no such file")}, false},
		"0 after it hung":    {&Exit{Code: 0, Cause: "it hung"}, false},
		"a code that was -1": {&Exit{Code: -1}, false},
	} {
		for policy, again := range map[Policy]bool{Always: true, OnFailure: !test.success, Never: false} {
			r := Restart{Policy: policy, Success: []int{0, 7}}
			if r.succeeded(test.exit) != test.success || r.again(test.exit) != again {
				t.Errorf("%s with %v: success %v, again %v", name, policy, r.succeeded(test.exit), r.again(test.exit))
			}
		}
	}
}
