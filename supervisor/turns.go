package supervisor

import (
	"runtime"
	"sync"
	"time"
)

// turns bounds how many units at once are between the start of a process, where that answers a crash or a
// boot, and its readiness: a thousand that crash together would keep each other, and the host, from getting ready. Who
// comes first is served first.
type turns chan struct{}

// newTurns gives each core four to load at once, so that those that wait for a disk or a peer leave it busy.
func newTurns() turns { return make(turns, 4*runtime.NumCPU()) }

// turnHold is how long one that doesn't get ready keeps the others waiting.
const turnHold = 5 * time.Second

// hold begins a turn that was taken. It ends when the returned function is called first, and by itself after limit.
func (t turns) hold(limit time.Duration) (end func()) {
	free := sync.OnceFunc(func() { <-t })
	timer := time.AfterFunc(limit, free)
	return func() {
		timer.Stop()
		free()
	}
}
