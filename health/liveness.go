package health

import (
	"fmt"
	"time"
)

// State is what an agent's heartbeats say of it.
type State int

// The states.
const (
	// Unknown: no beat has come yet, and it is too early to call that Offline.
	Unknown State = iota
	Healthy
	Degraded
	Offline
)

func (s State) String() string {
	return [...]string{"unknown", "healthy", "degraded", "offline"}[s]
}

// Thresholds are the silences after which an agent is no longer taken for well.
// Shorter ones see a failure sooner and take a busy host for a dead one more often.
type Thresholds struct {
	// Degraded is the silence that makes an agent Degraded; default 15 s, three lost beats.
	Degraded time.Duration
	// Offline is the silence that makes it Offline; default 30 s.
	Offline time.Duration
}

// DefaultThresholds are 15 s and 30 s.
func DefaultThresholds() Thresholds {
	return Thresholds{Degraded: 15 * time.Second, Offline: 30 * time.Second}
}

// Validate refuses thresholds other than 0 < Degraded < Offline.
func (t Thresholds) Validate() error {
	if t.Degraded <= 0 || t.Offline <= t.Degraded {
		return fmt.Errorf("liveness thresholds: degraded after %s and offline after %s: need 0 < degraded < offline", t.Degraded, t.Offline)
	}
	return nil
}

// Liveness follows the heartbeats of one agent. It is a plain value without a
// lock or a clock: the caller guards it, and passes in times that come from one
// process's time.Now, so that a step of the wall clock changes nothing.
type Liveness struct {
	thresholds Thresholds
	start      time.Time
	// last is the newest beat. Invariant: it is never before an earlier beat, and means nothing until beaten.
	last   time.Time
	beaten bool
	// left holds from an orderly leave to the next beat.
	left bool
}

// NewLiveness starts to wait for an agent's first beat. The thresholds must be valid.
func NewLiveness(t Thresholds, start time.Time) Liveness {
	return Liveness{thresholds: t, start: start}
}

// Beat takes in a heartbeat that arrived now and says what it changed. Whatever
// the state was, the agent is Healthy after it.
func (l *Liveness) Beat(now time.Time) (from, to State) {
	from = l.State(now)
	// Callers may take the time before they take their lock, so beats can arrive out of order.
	if !l.beaten || now.Sub(l.last) > 0 {
		l.last = now
	}
	l.beaten, l.left = true, false
	return from, Healthy
}

// Left makes the agent, which has unregistered in good order, Offline at once
// and until its next beat.
func (l *Liveness) Left() {
	l.left = true
}

// State is what the beats so far say of the agent now. A silence of exactly a
// threshold has reached it.
func (l Liveness) State(now time.Time) State {
	switch {
	case l.left:
		return Offline
	case !l.beaten && now.Sub(l.start) >= l.thresholds.Offline:
		return Offline
	case !l.beaten:
		return Unknown
	}
	switch silent := now.Sub(l.last); {
	case silent >= l.thresholds.Offline:
		return Offline
	case silent >= l.thresholds.Degraded:
		return Degraded
	default:
		return Healthy
	}
}

// Silent is the time since the last beat, never negative, and false where there
// was no beat.
func (l Liveness) Silent(now time.Time) (time.Duration, bool) {
	if !l.beaten {
		return 0, false
	}
	return max(0, now.Sub(l.last)), true
}

// NextChange is the time from now, always positive, after which silence alone
// would change the state, and false where it never will.
func (l Liveness) NextChange(now time.Time) (time.Duration, bool) {
	switch l.State(now) {
	case Unknown:
		return l.thresholds.Offline - now.Sub(l.start), true
	case Healthy:
		return l.thresholds.Degraded - now.Sub(l.last), true
	case Degraded:
		return l.thresholds.Offline - now.Sub(l.last), true
	default:
		return 0, false
	}
}
