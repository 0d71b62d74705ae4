// Package events remembers what happened in a grid lately, in order, and tells those who ask. It does no I/O.
package events

import (
	"crypto/rand"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

const (
	// maxEvents and maxBytes bound what is remembered: the last hours of a quiet grid, the last minutes of one where much
	// goes wrong. What exceeds either takes the oldest with it.
	maxEvents = 4096
	maxBytes  = 8 << 20
	// maxBatch bounds what a Reader gets at once, and so what is kept alive for one that is slow.
	maxBatch = 16
)

// Hub is safe for concurrent use. It doesn't know who watches: each Reader asks for what comes after what it had, so that a
// slow one holds up nobody, and takes up nothing.
type Hub struct {
	run     string
	started time.Time

	mu sync.Mutex // guards what follows; no I/O under it
	// ring has the events from first to last, each at its sequence modulo maxEvents; none where first is last + 1.
	//
	// Invariant: an event in it isn't changed any more, so that readers may hold on to it.
	ring        [maxEvents]*sutrav1.Event
	first, last uint64
	bytes       int
	// forgotten is the time of the newest event that isn't remembered any more; zero where all are.
	forgotten time.Time
	// more is closed at the next event; nil while nobody waits for it.
	more chan struct{}
}

// New makes the hub of one run of a master.
func New() *Hub { return &Hub{run: rand.Text(), started: time.Now(), first: 1} }

// Publish adds an event, which is the hub's from then on, and gives it its time and its position. It waits for nobody.
func (h *Hub) Publish(e *sutrav1.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.last-h.first+1 == maxEvents {
		h.forget()
	}
	h.last++
	e.Time, e.Position = timestamppb.Now(), &sutrav1.EventPosition{RunId: h.run, Sequence: h.last}
	h.ring[h.last%maxEvents] = e
	for h.bytes += proto.Size(e); h.bytes > maxBytes && h.first < h.last; {
		h.forget()
	}
	if h.more != nil {
		close(h.more)
		h.more = nil
	}
}

// forget forgets the oldest event. Needs mu.
func (h *Hub) forget() {
	oldest := &h.ring[h.first%maxEvents]
	h.bytes -= proto.Size(*oldest)
	h.forgotten = (*oldest).GetTime().AsTime()
	*oldest = nil
	h.first++
}

// Reader reads events in order, for one goroutine.
type Reader struct {
	hub  *Hub
	next uint64
	// Begin is where it begins: what After continues from.
	Begin *sutrav1.EventPosition
	// Last is the sequence of the newest event when the Reader was made.
	Last uint64
	// Restarted: what was asked for includes what happened before this run, of which nothing is known.
	Restarted bool
}

// All reads all that is remembered.
func (h *Hub) All() *Reader {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.read(h.first, false)
}

// After reads what came after a position, of this run or an earlier one.
func (h *Hub) After(p *sutrav1.EventPosition) *Reader {
	h.mu.Lock()
	defer h.mu.Unlock()
	if p.GetRunId() != h.run {
		return h.read(1, true)
	}
	return h.read(min(p.GetSequence(), h.last)+1, false)
}

// Since reads what happened in the time before now.
func (h *Hub) Since(ago time.Duration) *Reader {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	begin, restarted := now.Add(-ago), now.Sub(h.started) < ago
	if !h.forgotten.IsZero() && !h.forgotten.Before(begin) {
		return h.read(1, restarted) // what is missing is said, though some of it may be older
	}
	next := h.first
	for next <= h.last && h.ring[next%maxEvents].GetTime().AsTime().Before(begin) {
		next++
	}
	return h.read(next, restarted)
}

// read makes a Reader. Needs mu.
func (h *Hub) read(next uint64, restarted bool) *Reader {
	return &Reader{hub: h, next: next, Begin: &sutrav1.EventPosition{RunId: h.run, Sequence: next - 1}, Last: h.last, Restarted: restarted}
}

// Next returns the next events, after those that were missed because the Reader came too late for them. Where there is none
// yet, more is closed as soon as there is.
func (r *Reader) Next() (missed uint64, events []*sutrav1.Event, more <-chan struct{}) {
	h := r.hub
	h.mu.Lock()
	defer h.mu.Unlock()
	if r.next < h.first {
		missed, r.next = h.first-r.next, h.first
	}
	for ; r.next <= h.last && len(events) < maxBatch; r.next++ {
		events = append(events, h.ring[r.next%maxEvents])
	}
	if len(events) > 0 {
		return missed, events, nil
	}
	if h.more == nil {
		h.more = make(chan struct{})
	}
	return missed, nil, h.more
}

// Done tells whether all was read that was there when the Reader was made.
func (r *Reader) Done() bool { return r.next > r.Last }
