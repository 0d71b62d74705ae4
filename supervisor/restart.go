package supervisor

import (
	"errors"
	"math/rand/v2"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Restart says whether and when a process that ended by itself is started again. Where it is, it is
// for ever: a host that gets well again is used again.
type Restart struct {
	// Policy says after which ends it is.
	Policy Policy
	// Success are the exit codes, 0-255, that are no failure.
	Success []int
	// First pause before a restart; it doubles with each further crash.
	First time.Duration
	// Max bounds the pause.
	Max time.Duration
	// Threshold is the count of crashes within Window from which on the unit is in a crash loop.
	Threshold int
	// Window is how long a crash counts. So long without one, and the next is the first again.
	Window time.Duration
}

// Policy is which ends of a process are answered with a restart.
type Policy int

// The policies. What a person asks for is done under each of them, and so is the start after the host's, because a
// power cut is no end of the process's own. A process that hung and had to be ended has failed.
const (
	// Always restarts whatever the exit.
	Always Policy = iota
	// OnFailure doesn't restart after a success.
	OnFailure
	// Never doesn't restart.
	Never
)

func (p Policy) String() string { return [...]string{"always", "on-failure", "never"}[p] }

// DefaultRestart restarts at once as a person sees it, and at most every 30 s in the long run.
func DefaultRestart() Restart {
	return Restart{Success: []int{0}, First: 100 * time.Millisecond, Max: 30 * time.Second, Threshold: 5, Window: 10 * time.Minute}
}

func (r Restart) validate() error {
	if r.First <= 0 || r.Max < r.First || r.Threshold < 1 || r.Window <= 0 {
		return errors.New("restart: First, Threshold and Window must be positive and Max at least First")
	}
	if r.Policy < Always || r.Policy > Never {
		return errors.New("restart: there is no such Policy")
	}
	return nil
}

// succeeded tells whether an exit is no failure. The signals that ask a process to go are none, as systemd has it
// (systemd.service(5), SuccessExitStatus). What nobody saw isn't taken for a success, nor what had to be ended.
func (r Restart) succeeded(e *Exit) bool {
	switch {
	case e.Err != nil || e.Unknown || e.Cause != "":
		return false
	case e.Signal != "":
		gentle := []unix.Signal{unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGPIPE}
		return slices.ContainsFunc(gentle, func(s unix.Signal) bool { return unix.SignalName(s) == e.Signal })
	default:
		return slices.Contains(r.Success, e.Code)
	}
}

// again tells whether the policy answers an exit with a restart.
func (r Restart) again(e *Exit) bool {
	return r.Policy == Always || r.Policy == OnFailure && !r.succeeded(e)
}

// crashes remembers when a process crashed, as far as that counts still.
type crashes struct {
	policy Restart
	at     []time.Time // oldest first, at most as many as most says
}

// maxCrashes is how many are remembered at least: so many doublings bring any pause to its bound.
const maxCrashes = 64

// most bounds what is remembered.
func (c *crashes) most() int { return max(maxCrashes, c.policy.Threshold) }

// crashed takes in one crash. It returns how long to wait before the next start, and whether this is a crash loop by now.
func (c *crashes) crashed(at time.Time) (pause time.Duration, loop bool) {
	c.at = slices.DeleteFunc(c.at, func(t time.Time) bool { return at.Sub(t) >= c.policy.Window })
	c.at = append(c.at, at)
	c.at = c.at[max(0, len(c.at)-c.most()):]
	pause = c.policy.First
	for range len(c.at) - 1 {
		if pause > c.policy.Max/2 {
			pause = c.policy.Max
			break
		}
		pause *= 2
	}
	// Jitter only shortens, by up to a quarter: nodes that crashed together don't restart together.
	return pause - rand.N(pause/4+1), len(c.at) >= c.policy.Threshold
}

// resume takes up a count that an earlier supervisor wrote down at its last crash, or that a damaged record has. When the
// others were isn't on record: they count for as long as the last one.
func (c *crashes) resume(count int, last time.Time) {
	c.at = slices.Repeat([]time.Time{last}, min(max(count, 0), c.most()))
}

// forget is for a new beginning.
func (c *crashes) forget() { c.at = nil }
