package events

import (
	"fmt"
	"math"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func event(reason string) *sutrav1.Event {
	return &sutrav1.Event{About: &sutrav1.Event_Node{Node: &sutrav1.NodeEvent{Reason: reason}}}
}

func publish(h *Hub, count int) {
	for range count {
		h.Publish(event("r"))
	}
}

// rest reads all that there is: what was missed before it, and the sequences of the first and the last event, between which
// none may be missing.
func rest(t *testing.T, r *Reader) (missed, first, last uint64) {
	t.Helper()
	for {
		lost, batch, more := r.Next()
		if missed += lost; lost > 0 && last > 0 {
			t.Errorf("%d are missed after %d", lost, last)
		}
		if len(batch) == 0 {
			if more == nil {
				t.Error("there is nothing, and nothing to wait for")
			}
			return missed, first, last
		}
		for _, e := range batch {
			if last++; first == 0 {
				first, last = e.GetPosition().GetSequence(), e.GetPosition().GetSequence()
			}
			if e.GetPosition().GetSequence() != last || e.GetPosition().GetRunId() != r.hub.run || e.GetTime() == nil {
				t.Fatalf("event %d is %v", last, e)
			}
		}
	}
}

func wantRest(t *testing.T, what string, r *Reader, missed, first, last uint64) {
	t.Helper()
	if m, f, l := rest(t, r); m != missed || f != first || l != last {
		t.Errorf("%s: missed %d, then %d to %d; want %d, then %d to %d", what, m, f, l, missed, first, last)
	}
}

func TestHubRemembersTheNewest(t *testing.T) {
	h := New()
	wantRest(t, "an empty one", h.All(), 0, 0, 0)
	early, waits := h.All(), h.All()
	_, _, more := waits.Next()
	publish(h, 1)
	<-more
	wantRest(t, "one that waited", waits, 0, 1, 1)
	publish(h, maxEvents-1)
	wantRest(t, "a full one", h.All(), 0, 1, maxEvents)
	publish(h, 3)
	wantRest(t, "one that forgot", h.All(), 0, 4, maxEvents+3)
	wantRest(t, "from the beginning on", early, 3, 4, maxEvents+3)
	publish(h, 2*maxEvents)
	wantRest(t, "one that came late", early, maxEvents, 2*maxEvents+4, 3*maxEvents+3)

	r := h.All()
	publish(h, 1)
	if r.Done() || r.Last != 3*maxEvents+3 {
		t.Errorf("done %v, last %d", r.Done(), r.Last)
	}
	if rest(t, r); !r.Done() {
		t.Error("all is read, and it isn't done")
	}
}

// Few events that are large take as much as many small ones.
func TestHubIsBounded(t *testing.T) {
	h := New()
	const size = 100_000
	for range 3 * maxBytes / size {
		h.Publish(event(strings.Repeat("x", size)))
	}
	if count := h.last - h.first + 1; h.bytes > maxBytes || count < maxBytes/size-1 {
		t.Errorf("%d events of %d bytes are remembered", count, h.bytes)
	}
	h.Publish(event(strings.Repeat("x", 2*maxBytes)))
	if h.first != h.last {
		t.Errorf("beside one that is too large %d are remembered", h.last-h.first)
	}
	publish(h, 1)
	if _, batch, _ := h.All().Next(); len(batch) != 1 || h.bytes > 1000 {
		t.Errorf("after it %d events of %d bytes are remembered", len(batch), h.bytes)
	}
	held := 0
	for _, e := range h.ring {
		if e != nil {
			held++
		}
	}
	if held != 1 {
		t.Errorf("the ring holds %d", held)
	}
}

func TestHubGoesOnAfterAPosition(t *testing.T) {
	h, another := New(), New()
	publish(h, 5)
	at := func(run string, sequence uint64) *sutrav1.EventPosition {
		return &sutrav1.EventPosition{RunId: run, Sequence: sequence}
	}
	r := h.After(at(h.run, 3))
	if r.Restarted || r.Begin.GetSequence() != 3 || r.Begin.GetRunId() != h.run {
		t.Errorf("it begins at %v, restarted %v", r.Begin, r.Restarted)
	}
	wantRest(t, "the rest", r, 0, 4, 5)
	wantRest(t, "nothing new", h.After(at(h.run, 5)), 0, 0, 0)
	wantRest(t, "one that is made up", h.After(at(h.run, math.MaxUint64)), 0, 0, 0)
	for _, p := range []*sutrav1.EventPosition{at(another.run, 3), at("", 0), nil} {
		r := h.After(p)
		if !r.Restarted || r.Begin.GetSequence() != 0 {
			t.Errorf("after %v it begins at %v, restarted %v", p, r.Begin, r.Restarted)
		}
		wantRest(t, "another run's", r, 0, 1, 5)
	}
	publish(h, maxEvents)
	wantRest(t, "after a long time", h.After(at(h.run, 3)), 2, 6, maxEvents+5)
}

func TestHubGoesBackInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Hour)
		h := New()
		for range 3 {
			publish(h, 2)
			time.Sleep(time.Minute)
		}
		for _, c := range []struct {
			ago       time.Duration
			first     uint64
			restarted bool
		}{
			{0, 0, false},
			{time.Minute - 1, 0, false},
			{time.Minute, 5, false},
			{2 * time.Minute, 3, false},
			{3 * time.Minute, 1, false},
			{3*time.Minute + 1, 1, true},
			{math.MaxInt64, 1, true},
		} {
			r := h.Since(c.ago)
			if r.Restarted != c.restarted {
				t.Errorf("%v ago: restarted %v", c.ago, r.Restarted)
			}
			last := uint64(6)
			if c.first == 0 {
				last = 0
			}
			wantRest(t, fmt.Sprint(c.ago, " ago"), r, 0, c.first, last)
		}
		publish(h, maxEvents-1) // so that five of the six are forgotten
		wantRest(t, "what is remembered", h.Since(time.Minute-1), 0, 7, maxEvents+5)
		wantRest(t, "all of it", h.Since(2*time.Minute-1), 5, 6, maxEvents+5)
	})
}

// Many publish, many read, some of them too slowly: nobody waits for anybody, each reader gets every event or is told that it
// didn't.
func TestHubUnderLoad(t *testing.T) {
	h := New()
	const publishers, each = 4, 2 * maxEvents
	var publishing, reading sync.WaitGroup
	published := make(chan struct{})
	for i := range 6 {
		slow, r := i%2 == 0, h.All()
		reading.Go(func() {
			told := make([]int, publishers)
			var next, lost uint64 = 1, 0
			for next <= publishers*each {
				missed, batch, more := r.Next()
				next, lost = next+missed, lost+missed
				for _, e := range batch {
					var p, n int
					if _, err := fmt.Sscan(e.GetNode().GetReason(), &p, &n); err != nil || e.GetPosition().GetSequence() != next || n <= told[p] {
						t.Errorf("event %d is %v, %v", next, e, err)
						return
					}
					told[p] = n
					next++
				}
				switch {
				case slow:
					<-published
				case len(batch) == 0:
					<-more
				}
			}
			if slow && lost < publishers*each-maxEvents-maxBatch {
				t.Errorf("a slow one missed %d", lost)
			}
		})
	}
	for p := range publishers {
		publishing.Go(func() {
			for n := range each {
				h.Publish(event(fmt.Sprintf("%d %d", p, n+1)))
			}
		})
	}
	publishing.Wait()
	close(published)
	reading.Wait()
}
