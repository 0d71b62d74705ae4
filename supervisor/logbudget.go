package supervisor

import (
	"context"
	"errors"
	"io/fs"
	"os"
)

// rotate moves the beginning of a claimed log's live file to a segment, and removes its oldest ones to make room.
func (l *Logs) rotate(g *keptLog) error {
	live, err := os.OpenFile(g.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer live.Close()
	if h, err := settledHead(live); err != nil || h != g.head {
		return errors.Join(err, l.again(g)) // somebody emptied it, and it has grown again
	}
	budget := max(l.cfg.UnitBudget, 8*l.part)
	if g.size-g.head.offset+l.part > budget { // also without a segment
		return l.shorten(g, live, budget/2)
	}
	from := g.head.data
	to := split(live, from+l.part/2, from+l.part)
	for len(g.segments) > 0 && sizeOf(g)+to-from > budget {
		if err := l.removeOldest(g); err != nil {
			return err
		}
	}
	s, err := l.cutter.move(live, g.path, from, to, g.head.position)
	if err != nil {
		return err
	}
	g.segments = append(g.segments, s)
	return l.cut(g, live, to)
}

// split is where a log is cut: behind the last line that ends between two offsets, or else at the second. A line
// longer than half a segment may be split so.
func split(live *os.File, low, high int64) int64 {
	if to, ok := lineEnd(live, low, high); ok {
		return to
	}
	return high
}

// shorten takes all but about keep bytes out of a claimed log, without a copy.
func (l *Logs) shorten(g *keptLog, live *os.File, keep int64) error {
	for len(g.segments) > 0 {
		if err := l.removeOldest(g); err != nil {
			return err
		}
	}
	from := g.head.data
	high := g.size - keep
	to := split(live, max(high-l.part/2, from+(high-from)/2), high)
	position := g.head.position
	if err := l.cutter.forgo(g.path, to-from, position); err != nil {
		return err
	}
	if err := l.cut(g, live, to); err != nil {
		return err
	}
	l.cutter.step("forget")
	if err := os.Remove(segmentPath(g.path, position)); err != nil {
		return err
	}
	l.tell(LogEvent{ID: g.id, Kind: LogCut, Bytes: to - from})
	return nil
}

func (l *Logs) cut(g *keptLog, live *os.File, to int64) error {
	h, err := l.cutter.cut(live, g.path, g.head, to)
	if err != nil {
		return err
	}
	g.head = h
	info, err := live.Stat()
	if err != nil {
		return err
	}
	g.size, g.written = info.Size(), info.ModTime()
	return nil
}

func (l *Logs) removeOldest(g *keptLog) error {
	l.cutter.step("remove")
	err := os.Remove(segmentPath(g.path, g.segments[0].start))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	g.segments = g.segments[1:]
	return nil
}

// sizeOf is how many bytes a log takes.
func sizeOf(g *keptLog) int64 {
	size := g.size - g.head.offset
	for _, s := range g.segments {
		size += s.size
	}
	return size
}

// relief is what is to be done so that all logs fit into their budget.
type relief int

const (
	nothing relief = iota
	// removal of the log of a unit that has ended
	removal
	// trimming of a log by its oldest segment
	trimming
	// halving of a live file
	halving
)

// usage is how much a log takes, for the choice of what goes first.
type usage struct {
	id      string
	watched bool
	// bytes is all that it takes, live what its live file holds.
	bytes, live int64
	// oldest is when the oldest segment was written; of a log without segments, or of an ended unit, when the last
	// byte was. In nanoseconds since 1970.
	oldest   int64
	segments int
}

// choose says what goes first where all logs together take more than the budget: logs of ended units, the one that was
// written to longest ago first; then the oldest segment of all; then half of the longest live file. least is what a
// live file keeps.
func choose(all []usage, budget, least int64) (what relief, id string) {
	var total, best int64
	for _, u := range all {
		total += u.bytes
	}
	if total <= budget {
		return nothing, ""
	}
	for _, u := range all {
		switch {
		case !u.watched:
			if what != removal || u.oldest < best {
				what, id, best = removal, u.id, u.oldest
			}
		case what == removal:
		case u.segments > 0:
			if what != trimming || u.oldest < best {
				what, id, best = trimming, u.id, u.oldest
			}
		case what == trimming:
		case u.live > least && (what != halving || u.live > best):
			what, id, best = halving, u.id, u.live
		}
	}
	return what, id
}

// fit brings all logs together into their budget.
func (l *Logs) fit(ctx context.Context) {
	if l.cutter.release == nil {
		return
	}
	least := 16 * l.cutter.block
	for ctx.Err() == nil {
		what, id := choose(l.usages(), l.cfg.Budget, least)
		if what == nothing {
			return
		}
		g := l.claim(id)
		if g == nil {
			continue
		}
		err := l.relieve(g, what)
		l.unclaim(g)
		l.failed(g, err)
		if err != nil {
			return // the next look tries again
		}
	}
}

// relieve does with a claimed log what was chosen.
func (l *Logs) relieve(g *keptLog, what relief) error {
	switch what {
	case removal:
		l.mu.Lock()
		watched := g.watched
		l.mu.Unlock()
		if watched { // its unit began anew since it was chosen
			return nil
		}
		size := sizeOf(g)
		if err := l.remove(g); err != nil {
			return err
		}
		l.tell(LogEvent{ID: g.id, Kind: LogRemoved, Bytes: size})
		return nil
	case trimming:
		if len(g.segments) == 0 {
			return nil
		}
		return l.removeOldest(g)
	default:
		live, err := os.OpenFile(g.path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer live.Close()
		return l.shorten(g, live, (g.size-g.head.data)/2)
	}
}

// usages are those of all logs. It is Run's alone: what it reads of logs changes in no other goroutine.
func (l *Logs) usages() []usage {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := make([]usage, 0, len(l.logs))
	for _, g := range l.logs {
		u := usage{id: g.id, watched: g.watched, live: g.size - g.head.data, oldest: g.written.UnixNano(), segments: len(g.segments)}
		if g.watched && len(g.segments) > 0 {
			u.oldest = g.segments[0].at.UnixNano()
		}
		u.bytes = l.cutter.round(sizeOf(g))
		all = append(all, u)
	}
	return all
}
