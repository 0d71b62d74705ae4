package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// smallLogs is a folder of logs whose segments are of 16 blocks, with what happens to it.
func smallLogs(t testing.TB, dir string, budget int64) (l *Logs, events func() []LogEvent) {
	t.Helper()
	var mu sync.Mutex
	var seen []LogEvent
	l, err := OpenLogs(LogsConfig{Dir: dir, UnitBudget: 1, Budget: budget, Notify: func(e LogEvent) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, e)
	}})
	if err != nil {
		t.Fatal(err)
	}
	return l, func() []LogEvent {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(seen)
	}
}

// lookAt has one log looked at.
func lookAt(l *Logs, id string) {
	g := l.claim(id)
	l.look(g)
	l.unclaim(g)
}

// grow appends numbered lines to a log, a segment's worth at a time, and has it rotated.
func grow(t testing.TB, l *Logs, id string, from, parts int) (lines []byte) {
	t.Helper()
	for n := from; parts > 0; parts-- {
		var piece []byte
		for ; int64(len(piece)) < l.part; n++ {
			piece = fmt.Appendf(piece, "%0*d\n", floodLine-1, n)
		}
		if err := appendTo(l.Path(id), piece); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, piece...)
		lookAt(l, id)
	}
	return lines
}

func names(t testing.TB, dir string) (all []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		all = append(all, e.Name())
	}
	return all
}

func TestOpenLogsRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]LogsConfig{
		"relative": {Dir: "logs"}, "a file": {Dir: file}, "no budget": {Dir: t.TempDir(), Budget: -1},
	} {
		if _, err := OpenLogs(cfg); err == nil {
			t.Errorf("%s: opened", name)
		}
	}
}

// choose is the order in which logs go.
func TestChoose(t *testing.T) {
	gone := func(id string, bytes, at int64) usage { return usage{id: id, bytes: bytes, oldest: at} }
	live := func(id string, bytes, live, at int64, segments int) usage {
		return usage{id: id, watched: true, bytes: bytes, live: live, oldest: at, segments: segments}
	}
	for name, c := range map[string]struct {
		all  []usage
		what relief
		id   string
	}{
		"none":                       {nil, nothing, ""},
		"it fits":                    {[]usage{gone("a", 50, 1), live("b", 50, 50, 1, 0)}, nothing, ""},
		"ended first, the oldest":    {[]usage{live("a", 90, 10, 1, 3), gone("b", 5, 9), gone("c", 20, 4), gone("d", 5, 5)}, removal, "c"},
		"then the oldest segment":    {[]usage{live("a", 60, 60, 1, 0), live("b", 30, 5, 8, 1), live("c", 30, 5, 7, 2)}, trimming, "c"},
		"then the longest live file": {[]usage{live("a", 50, 50, 1, 0), live("b", 60, 60, 2, 0)}, halving, "b"},
		"but none that is short":     {[]usage{live("a", 60, 10, 1, 0), live("b", 60, 9, 2, 0)}, nothing, ""},
	} {
		if what, id := choose(c.all, 100, 10); what != c.what || id != c.id {
			t.Errorf("%s: %d of %q, want %d of %q", name, what, id, c.what, c.id)
		}
	}
}

// All logs together keep to their budget: those of ended units go first, the oldest of them; the rest keep their ends.
func TestBudgetOfAllLogs(t *testing.T) {
	dir := t.TempDir()
	l, events := smallLogs(t, dir, 1<<30)
	written := map[string][]byte{}
	for _, id := range []string{"old", "older", "busy", "quiet"} {
		l.Watch(id)
		written[id] = grow(t, l, id, 0, 3)
	}
	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(l.Path("older"), past, past); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"old", "older"} {
		l.Rest(id)
		lookAt(l, id)
	}
	total := func() (sum int64) {
		for _, u := range l.usages() {
			sum += u.bytes
		}
		return sum
	}
	removed := func() (ids []string) {
		for _, e := range events() {
			if e.Kind == LogRemoved {
				ids = append(ids, e.ID)
			}
		}
		return ids
	}
	for _, step := range []struct {
		budget  int64 // in segments
		removed []string
	}{{11, []string{"older"}}, {8, []string{"older", "old"}}, {4, []string{"older", "old"}}, {1, []string{"older", "old"}}} {
		l.cfg.Budget = step.budget * l.part
		l.fit(t.Context())
		if got := total(); got > l.cfg.Budget {
			t.Errorf("%d bytes are kept, of a budget of %d", got, l.cfg.Budget)
		}
		if diff := cmp.Diff(step.removed, removed()); diff != "" {
			t.Errorf("at %d segments, removed:\n%s", step.budget, diff)
		}
		for _, id := range []string{"busy", "quiet"} {
			got, begin, err := readAll(l.Path(id), 0)
			if err != nil || !bytes.Equal(got, written[id][begin:]) {
				t.Errorf("at %d segments, %s is kept from %d on: %v", step.budget, id, begin, err)
			}
		}
	}
	for _, name := range names(t, dir) {
		if strings.HasPrefix(name, "old") {
			t.Errorf("%s is left", name)
		}
	}
}

// A unit that starts while the log of its earlier process is being removed for the budget is kept track of: the removal
// either hasn't begun, and then it isn't done, or is over before the unit opens its log.
func TestWatchMeetsRemoval(t *testing.T) {
	old := func(t *testing.T) *Logs {
		l, _ := smallLogs(t, t.TempDir(), 1)
		l.Watch("a")
		grow(t, l, "a", 0, 2)
		l.Rest("a")
		lookAt(l, "a")
		return l
	}
	check := func(t *testing.T, l *Logs, kept bool) {
		t.Helper()
		g := l.logs["a"]
		if g == nil || !g.watched {
			t.Fatalf("nobody looks after the log: %+v", g)
		}
		if parts, err := segments(l.Path("a")); err != nil || len(parts) > 0 != kept || exists(l.Path("a")) != kept {
			t.Errorf("of the old log there are segments %v, %v", parts, err)
		}
		first := 0
		if kept {
			first = int(g.head.position+g.size-g.head.data) / floodLine
		}
		grow(t, l, "a", first, 2)
		if len(g.segments) == 0 {
			t.Error("what the new process writes isn't rotated")
		}
	}
	t.Run("it was chosen", func(t *testing.T) {
		l := old(t)
		what, id := choose(l.usages(), 1, 0)
		if what != removal || id != "a" {
			t.Fatalf("%d of %q is chosen", what, id)
		}
		l.Watch("a")
		g := l.claim("a")
		if err := l.relieve(g, what); err != nil {
			t.Fatal(err)
		}
		l.unclaim(g)
		check(t, l, true)
	})
	t.Run("it is being removed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := old(t)
			g := l.claim("a")
			go l.Watch("a")
			synctest.Wait()
			if err := l.remove(g); err != nil {
				t.Fatal(err)
			}
			l.unclaim(g)
			synctest.Wait()
			check(t, l, false)
		})
	})
}

// Nothing is left of a log that is removed, and nothing of one that a supervisor was removing when it ended.
func TestRemovedLogs(t *testing.T) {
	dir := t.TempDir()
	l, _ := smallLogs(t, dir, 1<<30)
	for _, id := range []string{"a", "a.log.b", "c"} {
		l.Watch(id)
		grow(t, l, id, 0, 2)
	}
	if err := errors.Join(l.Remove("a"), l.Remove("a"), l.Remove("nobody's")); err != nil {
		t.Fatal(err)
	}
	for _, name := range names(t, dir) {
		if strings.HasPrefix(name, "a.log") && !strings.HasPrefix(name, "a.log.b.log") {
			t.Errorf("%s is left", name)
		}
	}
	if err := errors.Join(os.Remove(l.Path("c")), os.WriteFile(l.Path("a.log.b")+temporarySuffix, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	before := len(names(t, dir))
	l, _ = smallLogs(t, dir, 1<<30)
	left := names(t, dir)
	if len(left) >= before || len(l.logs) != 1 {
		t.Errorf("%v is left", left)
	}
	for _, name := range left {
		if !strings.HasPrefix(name, "a.log.b.log") || strings.HasSuffix(name, temporarySuffix) {
			t.Errorf("%s is left", name)
		}
	}
}

// Somebody who empties a log's file begins it anew: what was before goes, and what comes is kept.
func TestEmptiedLog(t *testing.T) {
	for _, again := range []int64{10, 5 << 20} {
		l, events := smallLogs(t, t.TempDir(), 1<<30)
		l.Watch("a")
		grow(t, l, "a", 0, 3)
		fresh := bytes.Repeat([]byte("a fresh line\n"), int(again)/13+1)
		if err := os.WriteFile(l.Path("a"), fresh, 0o600); err != nil {
			t.Fatal(err)
		}
		for range 20 {
			lookAt(l, "a")
			if err := appendTo(l.Path("a"), []byte("more\n")); err != nil {
				t.Fatal(err)
			}
			fresh = append(fresh, "more\n"...)
		}
		got, begin, err := readAll(l.Path("a"), 0)
		if err != nil || begin > int64(len(fresh)) || !bytes.Equal(got, fresh[begin:]) {
			t.Errorf("kept from %d on: %.100q, %v", begin, got, err)
		}
		for _, e := range events() {
			if e.Kind == LogStuck {
				t.Error(e.Err)
			}
		}
	}
}

// A log that can't be rotated is told of once, and is rotated when it can be.
func TestStuckLog(t *testing.T) {
	l, events := smallLogs(t, t.TempDir(), 1<<30)
	l.Watch("a")
	works := l.cutter.release
	l.cutter.release = func(int, int64) error { return unix.EIO }
	lines := grow(t, l, "a", 0, 3)
	if all := events(); len(all) != 1 || all[0].Kind != LogStuck || !errors.Is(all[0].Err, unix.EIO) {
		t.Errorf("told: %v", all)
	}
	l.cutter.release = works
	lookAt(l, "a")
	got, begin, err := readAll(l.Path("a"), 0)
	if err != nil || begin != 0 || !bytes.Equal(got, lines) {
		t.Errorf("kept from %d on, %d bytes of %d: %v", begin, len(got), len(lines), err)
	}
	if parts, err := segments(l.Path("a")); err != nil || len(parts) == 0 {
		t.Errorf("segments: %v, %v", parts, err)
	}
}

// A live file that somebody removes is told of once, and what is written to another one later is kept as ever.
func TestLiveFileThatSomebodyRemoves(t *testing.T) {
	l, events := smallLogs(t, t.TempDir(), 1<<30)
	lost := func() (n int) {
		for _, e := range events() {
			if e.Kind == LogLost && e.ID == "a" {
				n++
			}
		}
		return n
	}
	l.Watch("a")
	lookAt(l, "a")
	if lost() != 0 {
		t.Error("one that wasn't made yet is called removed")
	}
	for round := range 2 {
		grow(t, l, "a", 0, 3)
		if err := os.Remove(l.Path("a")); err != nil {
			t.Fatal(err)
		}
		lookAt(l, "a")
		lookAt(l, "a")
		if got := lost(); got != round+1 {
			t.Errorf("told %d times of %d removals", got, round+1)
		}
		if g := l.logs["a"]; g.size != 0 || g.head != (head{}) {
			t.Errorf("known of it: %+v", g)
		}
		lines := grow(t, l, "a", 1000, 3)
		if got, begin, err := readAll(l.Path("a"), 0); err != nil || begin != 0 || !bytes.Equal(got, lines) {
			t.Errorf("kept from %d on, %d bytes of %d: %v", begin, len(got), len(lines), err)
		}
	}
	l.Rest("a")
	if err := os.Remove(l.Path("a")); err != nil {
		t.Fatal(err)
	}
	lookAt(l, "a")
	if got := lost(); got != 2 {
		t.Error("one that nobody writes to is told of")
	}
	for _, e := range events() {
		if e.Kind == LogStuck {
			t.Error(e.Err)
		}
	}
}

// Whose log was removed while no supervisor ran is told of by the next one, and is known by it still.
func TestLiveFileThatWasRemovedWhileNobodyLooked(t *testing.T) {
	dir := t.TempDir()
	spec := commandSpec(t, "sleep", "3600")
	spec.LogPath, spec.Mark = filepath.Join(dir, "a"+liveSuffix), ""
	w := watch(t, spec)
	pid := w.until(ProcessReady).State.PID
	if err := os.Remove(spec.LogPath); err != nil {
		t.Fatal(err)
	}
	l, events := smallLogs(t, dir, 1<<30)
	l.Watch("a")
	lookAt(l, "a")
	if all := events(); len(all) != 1 || all[0] != (LogEvent{ID: "a", Kind: LogLost}) {
		t.Errorf("told: %v", all)
	}
	if !slices.Contains(Living(Cgroups{}, "SUTRA_TEST_NOBODY=", dir), "a") || !slices.Equal(newKin(group{}, &spec).find(), []int{pid}) {
		t.Error("it isn't known by its log")
	}
	w.Stop()
	w.end()
}

// What is written while a log is looked at is seen, also where its unit ends meanwhile.
func TestLogThatRestsWhileItIsLookedAt(t *testing.T) {
	l, _ := smallLogs(t, t.TempDir(), 1<<30)
	l.Watch("a")
	last := bytes.Repeat([]byte("a last line\n"), int(l.part)/12+1)
	works := l.cutter.release
	l.cutter.release = func(int, int64) error { // after the look's first step
		l.cutter.release = works
		if err := appendTo(l.Path("a"), last); err != nil {
			t.Error(err)
		}
		l.Rest("a")
		return unix.EIO
	}
	lines := append(grow(t, l, "a", 0, 1), last...)
	if due := l.dueAt(time.Now()); !slices.Equal(due, []string{"a"}) {
		t.Fatalf("to be looked at: %v", due)
	}
	lookAt(l, "a")
	if got := sizeOf(l.logs["a"]); got < int64(len(lines)) {
		t.Errorf("%d bytes are counted of %d", got, len(lines))
	}
	if due := l.dueAt(time.Now()); len(due) != 0 {
		t.Errorf("to be looked at: %v", due)
	}
}

// What a process writes while its log is cut is moved on as well, though it writes nothing after that.
func TestLogThatGrowsWhileItIsCut(t *testing.T) {
	l, _ := smallLogs(t, t.TempDir(), 1<<30)
	l.Watch("a")
	last := bytes.Repeat([]byte("a last line\n"), 3*int(l.part)/12)
	l.cutter.step = func(name string) {
		if name == "header" {
			l.cutter.step = func(string) {}
			if err := appendTo(l.Path("a"), last); err != nil {
				t.Error(err)
			}
		}
	}
	lines := append(grow(t, l, "a", 0, 1), last...)
	for range 6 { // each moves half a segment or more
		lookAt(l, "a")
	}
	if g := l.logs["a"]; g.size-g.head.data >= l.part {
		t.Errorf("the live file keeps %d bytes, a segment has %d", g.size-g.head.data, l.part)
	}
	if got, begin, err := readAll(l.Path("a"), 0); err != nil || begin != 0 || !bytes.Equal(got, lines) {
		t.Errorf("kept from %d on, %d bytes of %d: %v", begin, len(got), len(lines), err)
	}
}

func TestUnboundedLogsAreToldOfOnce(t *testing.T) {
	l, events := smallLogs(t, t.TempDir(), 1)
	l.cutter.release = nil
	l.Watch("a")
	lines := grow(t, l, "a", 0, 5)
	l.fit(t.Context())
	if got, begin, err := readAll(l.Path("a"), 0); err != nil || begin != 0 || !bytes.Equal(got, lines) || len(events()) > 0 {
		t.Errorf("kept from %d on, %v; told: %v", begin, err, events())
	}
}

// What a dead process wrote last is found wherever it was moved to, and nothing of another's.
func TestOutputAcrossARotation(t *testing.T) {
	for _, mode := range logModes() {
		t.Run(mode.name, func(t *testing.T) {
			l, _ := smallLogs(t, mode.dir(t), 1<<30)
			mode.use(t, l)
			l.Watch("unit")
			grow(t, l, "unit", 0, 2)
			spec, ready := fixtureSpec(t, "exit-at-term")
			spec.LogPath = l.Path("unit")
			if err := appendTo(spec.LogPath, []byte("an earlier one's\n")); err != nil {
				t.Fatal(err)
			}
			w := watch(t, spec)
			w.until(ProcessReady)
			if !exists(ready) {
				t.Fatal("it isn't ready")
			}
			// It would have to write more than a segment itself, with its last words in two files.
			if err := appendTo(spec.LogPath, append(bytes.Repeat([]byte("x\n"), int(l.part)/2), "its last words\n"...)); err != nil {
				t.Fatal(err)
			}
			lookAt(l, "unit")
			if err := appendTo(spec.LogPath, []byte("and one more\n")); err != nil {
				t.Fatal(err)
			}
			w.Stop()
			got := w.end().State.LastExit.Output
			if len(got) != maxOutput || !strings.HasSuffix(got, "x\nx\nits last words\nand one more\n") {
				t.Errorf("output: %d bytes, ending in %q", len(got), got[max(0, len(got)-60):])
			}
			short := watch(t, Spec{
				ID: "short", Path: "/bin/sh", Args: []string{"-c", "echo own"}, Env: []string{markOf(t.TempDir())}, Dir: t.TempDir(),
				LogPath: spec.LogPath, StopGrace: never, Restart: Restart{First: never, Max: never, Threshold: 1, Window: never},
			})
			if out := short.until(ProcessExited).State.LastExit.Output; out != "own\n" {
				t.Errorf("output of the next process: %q", out)
			}
		})
	}
}

// Followers get every byte once while the log is rotated under them, and end with the unit.
func TestFollowAFlood(t *testing.T) {
	for _, mode := range logModes() {
		t.Run(mode.name, func(t *testing.T) {
			l, err := OpenLogs(LogsConfig{Dir: mode.dir(t), UnitBudget: 4 << 20})
			if err != nil {
				t.Fatal(err)
			}
			mode.use(t, l)
			spec, _ := fixtureSpec(t, "flood")
			spec.LogPath = l.Path("unit")
			l.Watch("unit")
			w := watch(t, spec)
			runLogs(t, l)
			ended := make(chan struct{})
			var group sync.WaitGroup
			var done [3]int64
			for i := range done {
				group.Go(func() {
					last, position := int64(-1), int64(0)
					err := l.Tail(t.Context(), "unit", LogRange{Follow: true}, ended, func(c LogChunk) error {
						if len(c.Data) > 0 && c.Data[len(c.Data)-1] != '\n' && !closed(ended) {
							return fmt.Errorf("a piece that ends in %q", c.Data[len(c.Data)-1])
						}
						if begin := c.Position - int64(len(c.Data)); begin != position+c.Skipped && position > 0 {
							return fmt.Errorf("from %d to %d, skipped %d", position, begin, c.Skipped)
						}
						position = c.Position
						if n, _ := digits(c.Data[:min(len(c.Data), floodLine-1)]); len(c.Data) > 0 && n*floodLine != position-int64(len(c.Data)) {
							return fmt.Errorf("line %d is said to be at %d", n, position-int64(len(c.Data)))
						}
						for line := range bytes.Lines(c.Data) {
							n, ok := digits(bytes.TrimSuffix(line, []byte("\n")))
							if !ok || len(line) != floodLine {
								return fmt.Errorf("%q after line %d", line, last)
							}
							if c.Skipped == 0 && last >= 0 && n != last+1 {
								return fmt.Errorf("line %d follows line %d", n, last)
							}
							last, c.Skipped = n, 0
						}
						return nil
					})
					if err != nil {
						t.Error(err)
					}
					done[i] = position
				})
			}
			await(t, "48 MiB", func() bool {
				r, err := ReadLog(l.Path("unit"))
				if err != nil {
					return false
				}
				defer r.Close()
				end, err := r.End()
				return err == nil && end > 48<<20
			})
			w.Stop()
			w.kill()
			w.end()
			close(ended)
			group.Wait()
			r, err := ReadLog(l.Path("unit"))
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if end, err := r.End(); err != nil || done != [3]int64{end, end, end} {
				t.Errorf("followed to %d, of %d: %v", done, end, err)
			}
		})
	}
}

// The last lines are found across segments, and times by what was noted.
func TestTailAcrossSegments(t *testing.T) {
	l, _ := smallLogs(t, t.TempDir(), 1<<30)
	l.Watch("a")
	begin := time.Now()
	lines := grow(t, l, "a", 0, 2)
	r, err := ReadLog(l.Path("a"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	tailed := func(want LogRange) (out []byte) {
		t.Helper()
		over := make(chan struct{})
		close(over)
		if err := l.Tail(t.Context(), "a", want, over, func(c LogChunk) error { out = append(out, c.Data...); return nil }); err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, n := range []int{0, 1, 1000, 1500, 2000, 1 << 20} {
		want := lines[max(0, len(lines)-n*floodLine):]
		if got := tailed(LogRange{Last: true, Lines: n}); !bytes.Equal(got, want) {
			t.Errorf("the last %d lines are %d bytes, want %d", n, len(got), len(want))
		}
	}
	middle := time.Now()
	more := grow(t, l, "a", len(lines)/floodLine, 1)
	g := l.logs["a"]
	g.notes = append(g.notes, note{at: middle, position: int64(len(lines))})
	for _, c := range []struct {
		since time.Time
		want  []byte
	}{
		{begin.Add(-time.Hour), slices.Concat(lines, more)}, {middle, more}, {time.Now().Add(time.Hour), nil},
	} {
		if got := tailed(LogRange{Since: c.since}); !bytes.Equal(got, c.want) {
			t.Errorf("since %v: %d bytes, want %d", c.since.Sub(begin), len(got), len(c.want))
		}
	}
	// Without the notes the segments' times are left: rather more than less.
	again, _ := smallLogs(t, l.cfg.Dir, 1<<30)
	l = again
	if got := tailed(LogRange{Since: middle}); !bytes.HasSuffix(slices.Concat(lines, more), got) || len(got) < len(more) {
		t.Errorf("after a restart: %d bytes, of which %d are new", len(got), len(more))
	}
	if err := l.Tail(context.Background(), "nobody's", LogRange{}, closedChannel(), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of no log: %v", err)
	}
}

// A part that isn't followed ends where the log ended when it was asked for, though the log grows faster than it is
// sent and is rotated meanwhile; what isn't kept any more when its turn comes is counted.
func TestTailOfAFloodEnds(t *testing.T) {
	for _, mode := range logModes() {
		t.Run(mode.name, func(t *testing.T) {
			type part struct {
				name string
				want LogRange
				// parts are how many segments' worth is written while a piece is sent.
				parts int
			}
			cases := []part{{"the last lines", LogRange{Last: true, Lines: 2000}, 1}, {"since", LogRange{Since: time.Now().Add(-time.Hour)}, 1}}
			for parts := 1; parts < 12; parts++ {
				cases = append(cases, part{fmt.Sprintf("all, outrun by %d", parts), LogRange{}, parts})
			}
			for _, c := range cases {
				l, _ := smallLogs(t, mode.dir(t), 1<<30)
				mode.use(t, l)
				l.Watch("a")
				written := grow(t, l, "a", 0, 4)
				// It ends within a segment to be.
				for range l.part / 8 / floodLine {
					written = fmt.Appendf(written, "%0*d\n", floodLine-1, len(written)/floodLine)
				}
				end := int64(len(written))
				if err := appendTo(l.Path("a"), written[4*l.part:]); err != nil {
					t.Fatal(err)
				}
				var position, skipped, first int64
				var got []byte
				first = -1
				pieces := 0
				send := func(c LogChunk) error {
					if pieces++; pieces > 100 {
						return errors.New("it doesn't end")
					}
					begin := c.Position - int64(len(c.Data))
					if first < 0 {
						first = begin - c.Skipped
						position = first
					}
					if begin != position+c.Skipped || c.Position > end {
						return fmt.Errorf("from %d to %d after %d, skipped %d", begin, c.Position, position, c.Skipped)
					}
					if !bytes.Equal(c.Data, written[begin:c.Position]) {
						return fmt.Errorf("what is sent from %d on isn't what was written there", begin)
					}
					position, skipped, got = c.Position, skipped+c.Skipped, append(got, c.Data...)
					return nil
				}
				next := int(end) / floodLine
				err := l.Tail(t.Context(), "a", c.want, nil, func(piece LogChunk) error {
					err := send(piece)
					more := grow(t, l, "a", next, c.parts)
					next += len(more) / floodLine
					return err
				})
				if err != nil || position != end {
					t.Errorf("%s: to %d of %d: %v", c.name, position, end, err)
				}
				if lines := bytes.Count(got, []byte("\n")); c.want.Last && lines != c.want.Lines {
					t.Errorf("%s: %d lines", c.name, lines)
				}
				if c.parts == 1 && skipped > 0 || c.parts > 8 && skipped == 0 || first > 0 && !c.want.Last {
					t.Errorf("%s: from %d on, %d bytes skipped", c.name, first, skipped)
				}
			}
		})
	}
}

// What the agent noted tells more than the files do.
func TestSinceGoesByNotes(t *testing.T) {
	l, _ := smallLogs(t, t.TempDir(), 1<<30)
	l.Watch("a")
	if err := appendTo(l.Path("a"), []byte("old\nolder and n")); err != nil {
		t.Fatal(err)
	}
	lookAt(l, "a")
	noted := l.logs["a"].notes[0].at
	if err := appendTo(l.Path("a"), []byte("ew\nnew\n")); err != nil {
		t.Fatal(err)
	}
	var out []byte
	err := l.Tail(t.Context(), "a", LogRange{Since: noted}, closedChannel(), func(c LogChunk) error { out = append(out, c.Data...); return nil })
	if err != nil || string(out) != "older and new\nnew\n" {
		t.Errorf("%q, %v", out, err)
	}
}

// A follower gets a line once it is whole, and what its writer left of one at the end.
func TestFollowersGetWholeLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.log")
	var pieces []string
	follower := tail{until: math.MaxInt64, buf: make([]byte, chunkSize), send: func(c LogChunk) error { pieces = append(pieces, string(c.Data)); return nil }}
	for _, step := range []struct {
		text string
		over bool
	}{{"one\ntw", false}, {"o", false}, {"\nthr", false}, {"", true}} {
		if err := appendTo(path, []byte(step.text)); err != nil {
			t.Fatal(err)
		}
		if follower.r == nil {
			r, err := ReadLog(path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = r.Close() }) // nothing was written
			follower.r = r
		}
		if _, err := follower.drain(t.Context(), step.over); err != nil {
			t.Fatal(err)
		}
		pieces = append(pieces, "|")
	}
	if diff := cmp.Diff([]string{"one\n", "|", "|", "two\n", "|", "thr", "|"}, pieces); diff != "" {
		t.Error(diff)
	}
}

func closedChannel() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}

// Notes stay few however long a log grows, and reach back to its beginning.
func TestNotesAreThinnedOut(t *testing.T) {
	l, _ := smallLogs(t, t.TempDir(), 1<<30)
	l.Watch("a")
	g := l.logs["a"]
	begin := time.Now()
	for i := range 100_000 {
		g.size = int64(i)
		l.note(g, begin.Add(time.Duration(i)*lookEvery))
	}
	if n := len(g.notes); n > maxNotes || n < maxNotes/4 || g.notes[0].position != 0 || g.notes[n-1].position < 99_000 {
		t.Errorf("%d notes from %d to %d", n, g.notes[0].position, g.notes[n-1].position)
	}
	if !slices.IsSortedFunc(g.notes, func(a, b note) int { return a.at.Compare(b.at) }) {
		t.Error("the notes are out of order")
	}
}

// A real tmpfs, which takes nothing out of a file's front: its logs get holes.
func TestLogsOnTmpfs(t *testing.T) {
	dir := logMode{memory: true}.dir(t)
	l, events := smallLogs(t, dir, 1<<30)
	if l.cutter.release == nil || !l.cutter.sparse {
		t.Fatalf("it works as %+v", l.cutter)
	}
	l.Watch("a")
	lines := grow(t, l, "a", 0, 20)
	got, begin, err := readAll(l.Path("a"), 0)
	if err != nil || begin == 0 || !bytes.Equal(got, lines[begin:]) || int64(len(got)) < 6*l.part {
		t.Errorf("kept from %d on: %v", begin, err)
	}
	var used int64
	for _, name := range names(t, dir) {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, name), &st); err != nil {
			t.Fatal(err)
		}
		used += st.Blocks * 512
	}
	if used > 8*l.part+2*l.cutter.block {
		t.Errorf("%d bytes of memory are taken by a budget of %d", used, 8*l.part)
	}
	if len(events()) > 0 {
		t.Errorf("told: %v", events())
	}
}

// On a full disk nothing is lost of a log that can't be rotated, its writer goes on, and the rotation is made up for once
// there is room.
func TestRotationOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	switch err := unix.Mount("sutra-test", dir, "tmpfs", 0, "size=4m,mode=0700"); {
	case errors.Is(err, unix.EPERM):
		skipLog(t, "may not mount")
	case err != nil:
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	l, events := smallLogs(t, dir, 1<<30)
	l.Watch("a")
	log, _, err := openLog(l.Path("a"))
	if err != nil {
		t.Fatal(err)
	}
	writer := exec.CommandContext(t.Context(), "cat")
	writer.Stdout = log
	in, err := writer.StdinPipe()
	if err := errors.Join(err, writer.Start(), log.Close()); err != nil {
		t.Fatal(err)
	}
	var written []byte
	write := func(what string, size int64) {
		t.Helper()
		var piece []byte
		for int64(len(piece)) < size {
			piece = fmt.Appendf(piece, "%0*d\n", floodLine-1, (len(written)+len(piece))/floodLine)
		}
		written = append(written, piece...)
		if _, err := in.Write(piece); err != nil {
			t.Fatal(err)
		}
		await(t, what, func() bool {
			r, err := ReadLog(l.Path("a"))
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			end, err := r.End()
			return err == nil && end == int64(len(written))
		})
	}
	kept := func(when string) (parts int) {
		t.Helper()
		if got, begin, err := readAll(l.Path("a"), 0); err != nil || begin != 0 || !bytes.Equal(got, written) {
			t.Errorf("%s, %d bytes are kept of %d, from %d on: %v", when, len(got), len(written), begin, err)
		}
		found, err := segments(l.Path("a"))
		if err != nil || exists(l.Path("a")+temporarySuffix) {
			t.Errorf("%s, there are segments %v, and what wasn't finished is there: %v", when, found, err)
		}
		return len(found)
	}
	write("the first lines", l.part)
	lookAt(l, "a")
	before := kept("with room")

	// A segment doesn't fit any more, what the writer adds does.
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		t.Fatal(err)
	}
	ballast, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	room := int64(st.Bavail) * st.Bsize
	if err := errors.Join(unix.Fallocate(int(ballast.Fd()), 0, 0, room-l.part*7/4), ballast.Close()); err != nil {
		t.Fatal(err)
	}
	write("lines on a disk that fills up", l.part)
	for range 3 {
		lookAt(l, "a")
		write("a line on a full disk", floodLine)
	}
	if after := kept("on a full disk"); after != before || before == 0 {
		t.Errorf("%d segments before, and %d on a full disk", before, after)
	}
	if told := events(); len(told) != 1 || told[0].Kind != LogStuck || !errors.Is(told[0].Err, unix.ENOSPC) {
		t.Errorf("told: %v", told)
	}
	// Nor is anything lost by an agent that starts on it.
	l, events = smallLogs(t, dir, 1<<30)
	l.Watch("a")
	write("a line after a start on a full disk", floodLine)
	lookAt(l, "a")
	if after := kept("after a start on a full disk"); after != before || len(events()) != 1 {
		t.Errorf("%d segments, %d before; told: %v", after, before, events())
	}

	if err := os.Remove(ballast.Name()); err != nil {
		t.Fatal(err)
	}
	lookAt(l, "a")
	if after := kept("with room again"); after != before+1 || len(events()) != 1 {
		t.Errorf("%d segments, %d before; told: %v", after, before, events())
	}
	write("more lines", 2*l.part)
	lookAt(l, "a")
	lookAt(l, "a")
	if after := kept("later"); after < before+2 {
		t.Errorf("it isn't rotated on: %d segments", after)
	}
	if err := errors.Join(in.Close(), writer.Wait()); err != nil {
		t.Errorf("its writer: %v", err)
	}
}
