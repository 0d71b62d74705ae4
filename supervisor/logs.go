package supervisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	liveSuffix      = ".log"
	temporarySuffix = ".new"

	// lookEvery is how often a quiet log is looked at; one that grows fast is looked at after lookSoonest or later.
	lookEvery   = time.Second
	lookSoonest = 5 * time.Millisecond
	// maxNotes is how many moments are kept for each log: some minutes to the second, hours more coarsely.
	maxNotes = 512
	// coarse is how much a file's times may lag behind the clock.
	coarse = 20 * time.Millisecond
)

// LogsConfig is what a folder of logs is kept by. Dir alone is needed.
type LogsConfig struct {
	// Dir is absolute. It is made where it is missing.
	Dir string
	// UnitBudget is how many bytes the log of one unit may take; 0: 64 MiB. A log is moved on in eighths of it: greater
	// parts would make rotations rarer, and keep less while one is under way. It is held within a second; a log that grows
	// faster than the disk can copy loses its older half uncopied.
	UnitBudget int64
	// Budget is how many bytes all logs may take, those of ended units with them; 0: 1 GiB.
	Budget int64
	// Notify is called for each event, from the goroutine that it happens in; it must return soon.
	Notify func(LogEvent)
}

// LogKind is what happened to a log.
type LogKind int

// The kinds of event.
const (
	// LogsUnbounded: the file system can take nothing out of a file's beginning, so that the logs grow for ever. ID is empty.
	LogsUnbounded LogKind = iota
	// LogStuck: the log couldn't be rotated; Err says why. It is tried again and again.
	LogStuck
	// LogCut: Bytes of the log weren't kept, because it grew too fast or the budget of all logs is spent.
	LogCut
	// LogRemoved: the log of a unit that had ended was removed for the budget of all logs.
	LogRemoved
	// LogLost: the log's file was removed by somebody else, and the unit's processes write on where nobody reads. It isn't within
	// any budget, and takes up the disk, until the unit's process is started anew.
	LogLost
)

// LogEvent is one thing that happened to a log.
type LogEvent struct {
	ID    string
	Kind  LogKind
	Bytes int64
	Err   error
}

// Logs keeps a folder of logs within budgets: one log a unit, ID.log, with its segments beside it. The units' processes
// write to the files themselves, whether anybody looks after them or not.
type Logs struct {
	cfg    LogsConfig
	cutter cutter
	// part is the size of a segment.
	part int64

	mu   sync.Mutex // guards what follows
	logs map[string]*keptLog
}

// keptLog is what is known of one log.
type keptLog struct {
	id, path string

	// What follows is guarded by Logs.mu.

	// watched: a process may write to it.
	watched bool
	// due is when it is to be looked at; the zero time: at once.
	due time.Time
	// ended: it is to be looked at once more.
	ended bool
	// busy is closed when whoever works on the log's files is done; nil while nobody does.
	busy  chan struct{}
	notes []note

	// What follows is whose busy is.
	head     head
	size     int64 // of the live file at the last look
	written  time.Time
	looked   time.Time
	segments []segment
	stuck    bool
	present  bool // the live file was there at the last look
	lost     bool // it was then, and isn't any more
}

// note says that a log had come to a position at a time.
type note struct {
	at       time.Time
	position int64
}

// OpenLogs takes up a folder of logs. Rotations that were broken off are brought to their end.
func OpenLogs(cfg LogsConfig) (*Logs, error) {
	if !filepath.IsAbs(cfg.Dir) || cfg.UnitBudget < 0 || cfg.Budget < 0 {
		return nil, errors.New("logs: Dir must be absolute, UnitBudget and Budget not negative")
	}
	cfg.UnitBudget, cfg.Budget = cmp.Or(cfg.UnitBudget, 64<<20), cmp.Or(cfg.Budget, 1<<30)
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the folder of logs: %w", err)
	}
	c, err := newCutter(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("find out how logs can be rotated: %w", err)
	}
	const least = 16 // blocks: a header may take two, and half a segment must free more
	l := &Logs{cfg: cfg, cutter: c, part: max(cfg.UnitBudget/8, least*c.block), logs: map[string]*keptLog{}}
	if c.release == nil {
		l.tell(LogEvent{Kind: LogsUnbounded})
	}
	if err := l.scan(); err != nil {
		return nil, err
	}
	return l, nil
}

// scan finds the logs that are there.
func (l *Logs) scan() error {
	entries, err := os.ReadDir(l.cfg.Dir)
	if err != nil {
		return fmt.Errorf("list the folder of logs: %w", err)
	}
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), liveSuffix); ok && e.Type().IsRegular() {
			l.logs[id] = &keptLog{id: id, path: l.Path(id)}
		}
	}
	for _, e := range entries {
		end := strings.LastIndex(e.Name(), liveSuffix+".")
		if end < 0 {
			continue
		}
		id, live := e.Name()[:end], e.Name()[:end+len(liveSuffix)]
		path := filepath.Join(l.cfg.Dir, e.Name())
		g := l.logs[id]
		start, isSegment := segmentStart(live, e.Name())
		switch {
		case e.Name() == live+temporarySuffix, isSegment && g == nil: // its log was being removed
			_ = os.Remove(path) // the next start tries again
		case isSegment:
			if info, err := e.Info(); err == nil {
				g.segments = append(g.segments, segment{start: start, size: info.Size(), at: info.ModTime()}) // sorted as the names are
			}
		}
	}
	for _, g := range l.logs {
		if err := l.takeUp(g); err != nil {
			l.failed(g, err)
		}
	}
	for _, pid := range pids() {
		for _, link := range outputLinks(pid) {
			if id, ok := strings.CutSuffix(filepath.Base(link), liveSuffix+removedSuffix); ok && filepath.Dir(link) == l.cfg.Dir && l.logs[id] == nil {
				l.logs[id] = &keptLog{id: id, path: l.Path(id), present: true} // before it was removed
			}
		}
	}
	return nil
}

// takeUp brings a rotation to its end that was broken off, and learns how the log stands.
func (l *Logs) takeUp(g *keptLog) error {
	if l.cutter.release != nil {
		if err := l.cutter.recover(g.path); err != nil {
			return err
		}
	}
	live, err := os.Open(g.path)
	if err != nil {
		return err
	}
	defer live.Close()
	info, err := live.Stat()
	if err != nil {
		return err
	}
	g.size, g.written, g.looked, g.present = info.Size(), info.ModTime(), time.Now(), true
	if g.head, err = settledHead(live); err != nil {
		return err
	}
	kept := g.segments[:0]
	for _, s := range g.segments {
		// Those that only stood for bytes which weren't kept have done so. What claims to lie behind the log's beginning is
		// of the log as it was before somebody emptied it.
		if s.end() > g.head.position || isHole(segmentPath(g.path, s.start)) {
			if err := os.Remove(segmentPath(g.path, s.start)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			continue
		}
		kept = append(kept, s)
	}
	g.segments = kept
	return nil
}

// again is takeUp for a log whose files aren't as they were left.
func (l *Logs) again(g *keptLog) (err error) {
	if g.segments, err = segments(g.path); err != nil {
		return err
	}
	return l.takeUp(g)
}

func isHole(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	holds, err := hasBlocks(f)
	return err == nil && !holds
}

// Path is where the log of a unit stands.
func (l *Logs) Path(id string) string { return filepath.Join(l.cfg.Dir, id+liveSuffix) }

// Watch says that a unit may write to its log from now on: before it opens it. Where the log of an earlier process is just
// being removed, that is waited for.
func (l *Logs) Watch(id string) {
	g := l.claimOrMake(id)
	l.mu.Lock()
	g.watched, g.due = true, time.Time{}
	l.mu.Unlock()
	l.unclaim(g)
}

// Rest says that nothing of a unit is left that could write to its log.
func (l *Logs) Rest(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if g := l.logs[id]; g != nil {
		g.watched, g.ended, g.notes = false, true, nil
	}
}

// Remove removes a unit's log, of which nobody writes any more. It is no error where there is none.
func (l *Logs) Remove(id string) error {
	g := l.claimOrMake(id)
	defer l.unclaim(g)
	return l.remove(g)
}

// remove removes the files of a log that the caller has claimed.
func (l *Logs) remove(g *keptLog) error {
	err := os.Remove(g.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	for _, s := range g.segments { // without a live file they are nobody's
		if gone := os.Remove(segmentPath(g.path, s.start)); gone != nil && !errors.Is(gone, fs.ErrNotExist) {
			err = errors.Join(err, gone)
		}
	}
	if err != nil {
		return fmt.Errorf("remove log: %w", err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.logs, g.id)
	return nil
}

// claim waits until nobody else works on a log's files, and has it then; nil where there is no such log.
func (l *Logs) claim(id string) *keptLog {
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.logs[id]
	for g != nil && g.busy != nil {
		busy := g.busy
		l.mu.Unlock()
		<-busy
		l.mu.Lock()
		g = l.logs[id] // another one, or none, where it was removed
	}
	if g != nil {
		g.busy = make(chan struct{})
	}
	return g
}

// claimOrMake is claim for a log that there may not be yet.
func (l *Logs) claimOrMake(id string) *keptLog {
	for {
		if g := l.claim(id); g != nil {
			return g
		}
		l.mu.Lock()
		if l.logs[id] == nil {
			l.logs[id] = &keptLog{id: id, path: l.Path(id)}
		}
		l.mu.Unlock()
	}
}

func (l *Logs) unclaim(g *keptLog) {
	l.mu.Lock()
	close(g.busy)
	g.busy = nil
	l.mu.Unlock()
}

// Run keeps the logs within their budgets until ctx ends.
func (l *Logs) Run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		for _, id := range l.dueAt(time.Now()) {
			if ctx.Err() != nil {
				return nil
			}
			if g := l.claim(id); g != nil {
				l.look(g)
				l.unclaim(g)
			}
		}
		l.fit(ctx)
		timer.Reset(l.pause(time.Now()))
	}
}

// dueAt are the logs that are to be looked at.
func (l *Logs) dueAt(now time.Time) (ids []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, g := range l.logs {
		if (g.watched && !g.due.After(now)) || g.ended {
			ids = append(ids, id)
		}
	}
	return ids
}

// pause is how long none is due.
func (l *Logs) pause(now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	pause := lookEvery
	for _, g := range l.logs {
		if g.watched {
			pause = min(pause, g.due.Sub(now))
		}
	}
	return max(pause, lookSoonest)
}

// look sees how far a claimed log has grown, and rotates it where that is enough.
func (l *Logs) look(g *keptLog) {
	l.mu.Lock()
	g.ended = false // what rests from now on is looked at once more
	watched := g.watched
	l.mu.Unlock()
	before, since := g.size, g.looked
	info, err := os.Stat(g.path)
	now := time.Now()
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // nothing was written yet, or
		if g.present && watched {
			l.tell(LogEvent{ID: g.id, Kind: LogLost})
			g.lost, g.head, g.size = true, head{}, 0 // what is taken up isn't to be had back
		}
	}
	g.present = info != nil
	// Enough to rotate: also what was written while it was rotated last, and is all there is of it by now.
	enough := func() bool { return l.cutter.release != nil && g.size-g.head.data >= l.part }
	if info != nil && (g.stuck || g.lost || info.Size() != g.size || !info.ModTime().Equal(g.written) || enough()) {
		g.size, g.written = info.Size(), info.ModTime()
		if g.stuck || g.lost || g.size < before { // somebody cut it
			err = l.again(g)
		}
		g.lost = g.lost && err != nil
		l.note(g, now)
		if err == nil && enough() {
			err = l.rotate(g)
		}
	}
	g.looked = now
	l.failed(g, err)

	// Halfway to the next rotation it is looked at again, if it grows on as it did.
	pause := lookEvery
	if grown := g.size - before; grown > 0 && !g.stuck {
		left := max(0, l.part-(g.size-g.head.data))
		pause = min(pause, time.Duration(float64(now.Sub(since))*float64(left)/float64(grown)/2))
	}
	if enough() && !g.stuck {
		pause = 0
	}
	l.mu.Lock()
	g.due = now.Add(max(pause, lookSoonest))
	l.mu.Unlock()
}

// failed tells of trouble with a log, once until that is over.
func (l *Logs) failed(g *keptLog, err error) {
	if err != nil && !g.stuck {
		l.tell(LogEvent{ID: g.id, Kind: LogStuck, Err: err})
	}
	g.stuck = err != nil
}

func (l *Logs) tell(e LogEvent) {
	if l.cfg.Notify != nil {
		l.cfg.Notify(e)
	}
}

// note keeps how far a log has come. Where there are too many notes, every second one goes.
func (l *Logs) note(g *keptLog, now time.Time) {
	n := note{at: now, position: g.head.position + max(0, g.size-g.head.data)}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !g.watched || len(g.notes) > 0 && now.Sub(g.notes[len(g.notes)-1].at) < lookEvery {
		return
	}
	if len(g.notes) == maxNotes {
		for i := range maxNotes / 2 {
			g.notes[i] = g.notes[2*i]
		}
		g.notes = g.notes[:maxNotes/2]
	}
	g.notes = append(g.notes, n)
}

// since is a position before which everything was written before a time, in a log that ends at end.
func (l *Logs) since(r *LogReader, id string, t time.Time, end int64) (position int64, err error) {
	l.mu.Lock()
	if g := l.logs[id]; g != nil {
		for _, n := range g.notes {
			if !n.at.After(t) {
				position = n.position
			}
		}
	}
	l.mu.Unlock()
	t = t.Add(-coarse)
	if info, err := r.live.Stat(); err != nil || info.ModTime().Before(t) {
		return end, err
	}
	all, err := segments(r.path)
	for _, s := range all {
		if s.at.Before(t) {
			position = max(position, s.end())
		}
	}
	return position, err
}
