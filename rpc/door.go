package rpc

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"github.com/sutra-grid/sutra/rpc/pki"
)

const (
	// maxStrangersOfHost and maxStrangers are how many connections there may be at once whose other end hasn't shown yet who
	// it is, of a host and in all. For one more the oldest is ended, so that whoever really wants in gets in: it is
	// a stranger for milliseconds only.
	maxStrangersOfHost = 256
	maxStrangers       = 1024
	// strangerTime is how long a stranger may stay: long enough to join the grid, or to hear why it is refused.
	strangerTime = 30 * time.Second
	// strangerBytes and strangerCalls are what it may send meanwhile. Times maxStrangers they are what strangers can make a server
	// hold.
	strangerBytes = 256 << 10
	strangerCalls = 32
	// maxConnections is how many connections one identity may have, which keeps to one as a rule.
	maxConnections = 512
	// doorSays is how often the log tells of strangers that were ended for others.
	doorSays = time.Minute
)

// door lets connections in, and keeps strangers from taking up all the room.
type door struct {
	log     zerolog.Logger
	metrics *Metrics

	mu        sync.Mutex // guards what follows
	strangers list.List  // of *guest, the oldest first
	hosts     map[netip.Addr]*list.List
	known     map[pki.Identity]int
	ended     int // strangers that were ended for others, since said
	said      time.Time
}

func newDoor(log zerolog.Logger, m *Metrics) *door {
	return &door{log: log, metrics: m, hosts: map[netip.Addr]*list.List{}, known: map[pki.Identity]int{}}
}

// guarding is a listener that lets its connections in by a door.
type guarding struct {
	net.Listener
	door *door
}

// Accept waits for the next connection.
func (l guarding) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.door.admit(c), nil
}

// guest is a connection that came in by a door.
type guest struct {
	net.Conn
	door *door
	host netip.Addr
	// left is how many bytes it may still send as a stranger, known that it is none any more.
	left  atomic.Int64
	known atomic.Bool
	// timer ends a stranger.
	timer *time.Timer
	// counted: it is known to the metrics why it was ended.
	counted atomic.Bool

	// Guarded by door.mu. The elements are nil where it is no stranger any more.
	inAll, inHost *list.Element
	identity      pki.Identity
	gone          bool
}

func (d *door) admit(c net.Conn) net.Conn {
	g := &guest{Conn: c, door: d, host: hostOf(c.RemoteAddr())}
	g.left.Store(strangerBytes)
	d.mu.Lock()
	ofHost := d.hosts[g.host]
	if ofHost == nil {
		ofHost = list.New()
		d.hosts[g.host] = ofHost
	}
	var out *guest
	switch {
	case ofHost.Len() >= maxStrangersOfHost:
		out, _ = ofHost.Front().Value.(*guest)
	case d.strangers.Len() >= maxStrangers:
		out, _ = d.strangers.Front().Value.(*guest)
	}
	ended := 0
	if out != nil {
		d.leaves(out)
		d.ended++
		if now := time.Now(); now.Sub(d.said) > doorSays {
			ended, d.ended, d.said = d.ended, 0, now
		}
	}
	if d.hosts[g.host] == nil { // out was its last one
		d.hosts[g.host] = ofHost
	}
	g.inAll, g.inHost = d.strangers.PushBack(g), ofHost.PushBack(g)
	g.timer = time.AfterFunc(strangerTime, func() {
		g.count(outOfTime)
		_ = g.Close() // its reader finds out
	})
	d.mu.Unlock()
	if out != nil {
		out.count(noRoom)
		_ = out.Conn.Close() // its reader finds out
	}
	if ended > 0 {
		d.log.Warn().Int("ended", ended).Stringer("last_host", g.host).
			Msg("too many connections that don't say who they are; the oldest were ended for others")
	}
	return g
}

// leaves takes a guest off the lists.
func (d *door) leaves(g *guest) {
	if g.inAll != nil {
		d.strangers.Remove(g.inAll)
		ofHost := d.hosts[g.host]
		ofHost.Remove(g.inHost)
		if ofHost.Len() == 0 {
			delete(d.hosts, g.host)
		}
		g.inAll, g.inHost = nil, nil
	}
	if g.timer != nil {
		g.timer.Stop()
	}
}

// welcome says who a guest is; nobody, where connections are in the clear. Then it is no stranger any more.
func (g *guest) welcome(id pki.Identity) error {
	d := g.door
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case g.gone:
		return net.ErrClosed
	case id != pki.Identity{} && d.known[id] >= maxConnections:
		g.count(tooMany)
		return fmt.Errorf("%s has %d connections already", id, maxConnections)
	}
	d.leaves(g)
	g.known.Store(true)
	if g.identity = id; id != (pki.Identity{}) {
		d.known[id]++
	}
	return nil
}

// count tells the metrics why a guest is ended. What comes of that later, a handshake that fails for example, is none of it.
func (g *guest) count(why string) {
	if g.counted.CompareAndSwap(false, true) {
		g.door.metrics.end(why)
	}
}

// failed tells the metrics of a handshake that failed.
func (g *guest) failed(err error) {
	why := badHandshake
	if timedOut(err) {
		why = slowHandshake
	}
	g.count(why)
}

func timedOut(err error) bool {
	var network net.Error
	return errors.As(err, &network) && network.Timeout()
}

// Read reads; of a stranger only so much.
func (g *guest) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	if !g.known.Load() && g.left.Add(-int64(n)) < 0 {
		g.count(tooMuch)
		return 0, errors.Join(errTooMuch, g.Close())
	}
	return n, err
}

var errTooMuch = errors.New("it sent too much without saying who it is")

// Close ends the connection.
func (g *guest) Close() error {
	d := g.door
	d.mu.Lock()
	if !g.gone {
		g.gone = true
		d.leaves(g)
		if g.identity != (pki.Identity{}) {
			if d.known[g.identity]--; d.known[g.identity] == 0 {
				delete(d.known, g.identity)
			}
		}
	}
	d.mu.Unlock()
	return g.Conn.Close()
}

const (
	// freeAttempts of a host may fail before it has to wait; the first pause doubles with each one more.
	freeAttempts = 20
	firstWait    = time.Second
	lastWait     = time.Minute
	// attemptsForgotten is how long a host has to be quiet until it begins anew.
	attemptsForgotten = 10 * time.Minute
	// joinsAtOnce is how many attempts are looked at at once, joinsOfWaiting how many are of hosts that have to wait. Those are
	// looked at all the same: a good token, or an old key, isn't guessed, and whoever has one isn't to blame for others
	// at its address. What the rest of them cost is this one's work.
	joinsAtOnce, joinsOfWaiting = 16, 1
)

// joins are the attempts to be given an identity.
type joins struct {
	attempts        byAddress[attempts]
	places, waiting chan struct{}
}

func newJoins() *joins {
	return &joins{places: make(chan struct{}, joinsAtOnce), waiting: make(chan struct{}, joinsOfWaiting)}
}

// attempt makes an attempt when it is its turn, and tells who fails while his host has to wait for how long that is.
func (j *joins) attempt(ctx context.Context, handler func() (any, error)) (any, error) {
	host := hostOf(callersAddress(ctx))
	wait := func() (wait time.Duration) {
		j.attempts.at(host, func(a *attempts) { wait = a.wait(time.Now()) })
		return wait
	}
	enter := func(places chan struct{}) (leave func(), err error) {
		select {
		case places <- struct{}{}:
			return func() { <-places }, nil
		case <-ctx.Done():
			return nil, Errorf(TooManyRequests, "too many attempts to be given an identity are under way").WithHint("try again in a while")
		}
	}
	waits := wait() > 0
	places := j.places
	if waits {
		places = j.waiting
	}
	leave, err := enter(places)
	if err == nil && !waits && wait() > 0 { // others of that host have failed meanwhile
		leave()
		leave, err = enter(j.waiting)
	}
	if err != nil {
		return nil, err
	}
	defer func() { leave() }()
	resp, err := handler()
	if !Refused(err) {
		return resp, err
	}
	left := wait()
	if left == 0 {
		j.attempts.at(host, func(a *attempts) { a.fail(time.Now()) })
		return nil, err
	}
	e := Errorf(TooManyRequests, "too many attempts from %s to be given an identity have failed; the next one is heard in %s", host, left.Round(time.Second/10)).
		WithHint("wait that long, and try again")
	e.RetryAfter = left
	return nil, e
}

// attempts are those of a host to be given an identity.
type attempts struct {
	failed int
	// until is when the next one is heard that may fail, or was.
	until time.Time
}

// wait is how long it has to wait until then.
func (a *attempts) wait(now time.Time) time.Duration { return max(a.until.Sub(now), 0) }

// fail counts one that has failed.
func (a *attempts) fail(now time.Time) {
	if now.Sub(a.until) > attemptsForgotten {
		a.failed = 0
	}
	a.failed++
	a.until = now
	if over := a.failed - freeAttempts; over > 0 {
		a.until = now.Add(min(firstWait<<min(over-1, 10), lastWait))
	}
}
