package supervisor

import (
	"errors"
	"math/rand/v2"
	"time"
)

// Restart says when a crashed process is started again. Every crash is answered
// with a restart, for ever: a host that gets well again is used again.
type Restart struct {
	// First pause before a restart; it doubles with each further crash.
	First time.Duration
	// Max bounds the pause.
	Max time.Duration
	// Threshold is the count of crashes, each within Quiet of its start, from which on the unit is in a crash loop.
	Threshold int
	// Quiet is how long a process must have run for the crashes before to be forgotten.
	Quiet time.Duration
}

// DefaultRestart restarts at once as a person sees it, and at most every 30 s in the long run.
func DefaultRestart() Restart {
	return Restart{First: 100 * time.Millisecond, Max: 30 * time.Second, Threshold: 5, Quiet: time.Minute}
}

func (r Restart) validate() error {
	if r.First <= 0 || r.Max < r.First || r.Threshold < 1 || r.Quiet <= 0 {
		return errors.New("restart: First, Threshold and Quiet must be positive and Max at least First")
	}
	return nil
}

// crashes remembers how often a process crashed without a quiet period between.
type crashes struct {
	policy Restart
	count  int
}

// crashed takes in one crash of a process that had run for ran. It returns how long
// to wait before the next start, and whether this is a crash loop by now.
func (c *crashes) crashed(ran time.Duration) (pause time.Duration, loop bool) {
	if ran >= c.policy.Quiet {
		c.count = 0
	}
	c.count++
	pause = c.policy.First
	for range c.count - 1 {
		if pause > c.policy.Max/2 {
			pause = c.policy.Max
			break
		}
		pause *= 2
	}
	// Jitter only shortens, by up to a quarter: nodes that crashed together don't restart together.
	return pause - rand.N(pause/4+1), c.count >= c.policy.Threshold
}
