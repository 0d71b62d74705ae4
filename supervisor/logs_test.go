package supervisor

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// logMode is how a test's file system takes bytes out of a file.
type logMode struct {
	name   string
	sparse bool
	// memory: on a tmpfs, else where tests have their folders.
	memory bool
}

func logModes() []logMode {
	return []logMode{{name: "collapse"}, {name: "punch", sparse: true}, {name: "punch on tmpfs", sparse: true, memory: true}}
}

// dir is a folder of the mode's file system.
func (m logMode) dir(t testing.TB) string {
	t.Helper()
	if !m.memory {
		return t.TempDir()
	}
	const shm = "/dev/shm"
	var st unix.Statfs_t
	if err := unix.Statfs(shm, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
		skipLog(t, "%s is no tmpfs here", shm)
	}
	dir, err := os.MkdirTemp(shm, "sutra-test-")
	if err != nil {
		skipLog(t, "no folder in %s: %v", shm, err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// use makes a folder of logs work in a mode, where the file system can.
func (m logMode) use(t testing.TB, l *Logs) {
	t.Helper()
	probe, err := os.Create(filepath.Join(l.cfg.Dir, "probe"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(probe.Close(), os.Remove(probe.Name())); err != nil {
			t.Error(err)
		}
	}()
	if _, err := probe.Write(make([]byte, 2*l.cutter.block)); err != nil {
		t.Fatal(err)
	}
	chosen := l.cutter.sparse
	l.cutter.release, l.cutter.sparse = collapse, false
	if m.sparse {
		l.cutter.release, l.cutter.sparse = punch, true
	}
	if err := l.cutter.release(int(probe.Fd()), l.cutter.block); err != nil {
		skipLog(t, "this file system can't %s: %v", m.name, err)
	}
	if (!m.sparse || m.memory) && chosen != m.sparse {
		t.Errorf("of itself, it doesn't %s", m.name)
	}
}

func skipLog(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("SUTRA_TEST_NO_SKIP") != "" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// readAll reads a log from a position on, and where that begins.
func readAll(path string, from int64) (data []byte, begin int64, err error) {
	r, err := ReadLog(path)
	if err != nil {
		return nil, 0, err
	}
	defer r.Close()
	buf := make([]byte, 50_000)
	begin = -1
	for at := from; ; {
		n, found, err := r.ReadAt(buf, at)
		if begin < 0 {
			begin = found
		} else if found != at && n > 0 {
			return nil, 0, fmt.Errorf("a gap from %d to %d", at, found)
		}
		if errors.Is(err, io.EOF) {
			end, err := r.End()
			if err == nil && end != found {
				err = fmt.Errorf("read to %d of %d", found, end)
			}
			return data, begin, err
		}
		if err != nil {
			return nil, 0, err
		}
		data = append(data, buf[:n]...)
		at = found + int64(n)
	}
}

func appendTo(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

// broken is what a step panics with where the supervisor ends in it.
type broken struct{ step string }

// logModel is a log, and what was written to it.
type logModel struct {
	dir     string
	mode    logMode
	l       *Logs
	written []byte
}

func (m *logModel) open(t *rapid.T) {
	l, err := OpenLogs(LogsConfig{Dir: m.dir, Notify: func(e LogEvent) {
		if e.Kind == LogStuck {
			t.Errorf("stuck: %v", e.Err)
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	m.l = l
	m.l.cutter.release, m.l.cutter.sparse = collapse, false
	if m.mode.sparse {
		m.l.cutter.release, m.l.cutter.sparse = punch, true
	}
	m.l.part, m.l.cfg.UnitBudget = 8*m.l.cutter.block, 64*m.l.cutter.block
	m.l.Watch("a")
}

// look has the log looked at, and the supervisor end in a step; "" for none.
func (m *logModel) look(t *rapid.T, at string) {
	defer func() {
		if caught := recover(); caught != nil {
			if _, ok := caught.(broken); !ok {
				panic(caught)
			}
			m.check(t) // as it was left
			m.open(t)
		}
	}()
	m.l.cutter.step = func(name string) {
		if name == at {
			panic(broken{name})
		}
	}
	g := m.l.claim("a")
	m.l.look(g)
	m.l.unclaim(g)
}

// check: what is kept is the end of what was written, at its positions, and enough of it.
func (m *logModel) check(t *rapid.T) {
	got, begin, err := readAll(m.l.Path("a"), 0)
	if errors.Is(err, os.ErrNotExist) && len(m.written) == 0 {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if end := begin + int64(len(got)); end != int64(len(m.written)) {
		t.Fatalf("it ends at %d, and %d bytes were written", end, len(m.written))
	}
	if !bytes.Equal(got, m.written[begin:]) {
		t.Fatalf("what is kept from %d on isn't what was written there", begin)
	}
	if least := min(int64(len(m.written)), m.l.part*3); int64(len(got)) < least {
		t.Fatalf("only %d bytes are kept of %d", len(got), len(m.written))
	}
	parts, err := segments(m.l.Path("a"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range parts {
		data := m.written[s.start:s.end()]
		if data[len(data)-1] != '\n' && bytes.IndexByte(data[len(data)/2:], '\n') >= 0 && !isHole(segmentPath(m.l.Path("a"), s.start)) {
			t.Fatalf("the segment at %d splits a line", s.start)
		}
	}
}

func TestRotationAgainstAModel(t *testing.T) {
	for _, mode := range logModes() {
		t.Run(mode.name, func(t *testing.T) {
			dir := mode.dir(t)
			l, err := OpenLogs(LogsConfig{Dir: dir, UnitBudget: 1, Budget: 1})
			if err != nil {
				t.Fatal(err)
			}
			mode.use(t, l)
			if err := flag.Set("rapid.checks", "25"); err != nil { // each waits for a disk
				t.Fatal(err)
			}
			rapid.Check(t, func(t *rapid.T) {
				sub, err := os.MkdirTemp(dir, "")
				if err != nil {
					t.Fatal(err)
				}
				m := &logModel{dir: sub, mode: mode}
				m.open(t)
				seed := rand.NewChaCha8([32]byte{byte(rapid.IntRange(0, 255).Draw(t, "seed"))})
				write := func(size, line int) {
					data := make([]byte, size)
					_, _ = seed.Read(data) // never fails
					for i := range data {
						if data[i] == '\n' || data[i] == 0 && i%7 > 0 {
							data[i] = '.'
						}
						if line > 0 && i%line == line-1 {
							data[i] = '\n'
						}
					}
					if err := appendTo(m.l.Path("a"), data); err != nil {
						t.Fatal(err)
					}
					m.written = append(m.written, data...)
				}
				t.Repeat(map[string]func(*rapid.T){
					"": m.check,
					"write": func(t *rapid.T) {
						write(rapid.IntRange(1, 40_000).Draw(t, "size"), rapid.IntRange(1, 300).Draw(t, "line"))
					},
					"long line": func(t *rapid.T) { write(rapid.IntRange(1, 50_000).Draw(t, "size"), 0) },
					"flood":     func(t *rapid.T) { write(rapid.IntRange(100_000, 400_000).Draw(t, "size"), 100) },
					"look":      func(t *rapid.T) { m.look(t, "") },
					"reopen":    func(t *rapid.T) { m.open(t) },
					"crash": func(t *rapid.T) {
						m.look(t, rapid.SampledFrom([]string{"copy", "sync", "forgo", "rename", "header", "release", "release-header", "forget", "remove"}).Draw(t, "step"))
					},
				})
			})
		})
	}
}

func FuzzParseHeader(f *testing.F) {
	f.Add(newHeader(16_771_234, "node-1.log.0000000000000000000", 4321))
	f.Add(newHeader(0, "x", headerSize("x")))
	f.Add([]byte("[sutra: this log goes on at byte 00000000000"))
	f.Add([]byte("2026-03-01 12:00:00 ready\n"))
	f.Fuzz(func(t *testing.T, line []byte) {
		position, length, ok := parseHeader(line)
		if !ok {
			return
		}
		if position < 0 || length < 1 || length > maxHeader {
			t.Fatalf("position %d, length %d", position, length)
		}
		before, _, _ := bytes.Cut(line[len(headerBegin)+positionDigits+len(headerBefore):], []byte(headerLength))
		again := newHeader(position, string(before), length)
		if p, n, ok := parseHeader(again); !ok || p != position || n != length || int64(len(again)) != length || again[length-1] != '\n' {
			t.Fatalf("%q reads as %d, %d, %v", again, p, n, ok)
		}
	})
}

// runLogs runs a folder of logs until the test's end.
func runLogs(t testing.TB, l *Logs) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var group sync.WaitGroup
	group.Go(func() {
		if err := l.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { cancel(); group.Wait() })
}

// consecutive checks numbered lines, of which the first may have lost its beginning.
func consecutive(t *testing.T, what string, data []byte, last int64) int64 {
	t.Helper()
	if last < 0 {
		data = data[bytes.IndexByte(data, '\n')+1:]
	}
	for line := range bytes.Lines(data) {
		if line[len(line)-1] != '\n' {
			break // it was being written
		}
		n, err := strconv.ParseInt(strings.TrimLeft(string(line[:len(line)-1]), "0"), 10, 64)
		if err != nil || len(line) != floodLine || last >= 0 && n != last+1 {
			t.Fatalf("%s: %q follows line %d", what, line, last)
		}
		last = n
	}
	return last
}

// A process that floods its log is kept up with: nothing is missing between what is kept, and this process holds none of it.
func TestFlood(t *testing.T) {
	for _, mode := range logModes() {
		t.Run(mode.name, func(t *testing.T) {
			dir := mode.dir(t)
			var cut atomic.Int64
			l, err := OpenLogs(LogsConfig{Dir: dir, UnitBudget: 16 << 20, Budget: 1 << 30, Notify: func(e LogEvent) {
				if e.Kind != LogCut {
					t.Errorf("%+v", e)
				}
				cut.Add(e.Bytes)
			}})
			if err != nil {
				t.Fatal(err)
			}
			mode.use(t, l)
			var rotations atomic.Int64
			l.cutter.step = func(name string) {
				if name == "release" {
					rotations.Add(1)
				}
			}
			spec, _ := fixtureSpec(t, "flood")
			spec.LogPath = l.Path("unit")
			l.Watch("unit")
			var before, after runtime.MemStats
			w := watch(t, spec)
			runLogs(t, l)
			w.until(ProcessReady)
			await(t, "the first rotation", func() bool { return rotations.Load() > 0 })
			runtime.GC()
			runtime.ReadMemStats(&before)
			await(t, "20 rotations", func() bool { return rotations.Load() > 20 })
			runtime.ReadMemStats(&after)
			if grown := int64(after.Sys) - int64(before.Sys); grown > 8<<20 {
				t.Errorf("memory grew by %d bytes", grown)
			}
			if allocated := after.TotalAlloc - before.TotalAlloc; allocated > 64<<20 {
				t.Errorf("%d bytes were allocated", allocated)
			}
			w.Stop()
			w.kill()
			w.end()

			data, begin, err := readAll(l.Path("unit"), 0)
			if err != nil {
				t.Fatal(err)
			}
			last := consecutive(t, "the log", data, -1)
			if at := begin + int64(len(data)); at/floodLine-1 != last {
				t.Errorf("position %d, after line %d", at, last)
			}
			parts, err := segments(l.Path("unit"))
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range parts {
				data, err := os.ReadFile(segmentPath(l.Path("unit"), s.start))
				if err != nil {
					t.Fatal(err)
				}
				if first := consecutive(t, "a segment", data[:floodLine], -1); first >= 0 || s.start%floodLine != 0 {
					t.Errorf("the segment at %d doesn't begin with a line", s.start)
				}
			}
			t.Logf("%d rotations, %d segments, %d MiB written, %d MiB kept, %d MiB uncopied", rotations.Load(), len(parts),
				(begin+int64(len(data)))>>20, len(data)>>20, cut.Load()>>20)
		})
	}
}

// readCalls counts the reading system calls of this thread.
func readCalls(t *testing.T) (n int) {
	t.Helper()
	counts, err := os.ReadFile("/proc/thread-self/io")
	if err != nil {
		skipLog(t, "this kernel doesn't count a thread's reads: %v", err)
	}
	_, rest, _ := strings.Cut(string(counts), "syscr: ")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// A log that begins with zeros or with a hole, which a process can write, isn't taken for one that is being rotated: to
// find its beginning takes no more than it takes anywhere, and it is read, rotated and read again as it was written.
func TestLogsThatBeginWithZeros(t *testing.T) {
	zeros := bytes.Repeat([]byte("\x00"), 1<<20)
	for _, mode := range logModes() {
		t.Run(mode.name, func(t *testing.T) {
			for name, c := range map[string]struct {
				begin []byte
				hole  int64
			}{
				"one zero": {begin: []byte("\x00 and text\n")}, "many": {begin: zeros}, "a hole": {hole: 1 << 20},
				"a hole and zeros": {hole: 1 << 20, begin: zeros}, "nothing but a hole": {hole: 4096},
			} {
				l, events := smallLogs(t, mode.dir(t), 1<<30)
				mode.use(t, l)
				l.part, l.cfg.UnitBudget = 1<<18, 16<<20
				path := l.Path("a")
				f, err := os.Create(path)
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(f.Truncate(c.hole), f.Close(), appendTo(path, c.begin)); err != nil {
					t.Fatal(err)
				}
				written := append(make([]byte, c.hole), c.begin...)
				live, err := os.Open(path)
				if err != nil {
					t.Fatal(err)
				}
				runtime.LockOSThread()
				before := readCalls(t)
				overhead := readCalls(t) - before
				before = readCalls(t)
				h, err := settledHead(live)
				took := readCalls(t) - before - overhead
				runtime.UnlockOSThread()
				if err := errors.Join(err, live.Close()); err != nil || h != (head{}) {
					t.Errorf("%s: it is said to begin at %+v: %v", name, h, err)
				}
				if took > 4 && name != "a hole and zeros" {
					t.Errorf("%s: its beginning took %d reads", name, took)
				}
				l.Watch("a")
				for range 5 {
					more := bytes.Repeat([]byte("\x00\x00 a line\n"), int(l.part)/6)
					if err := appendTo(path, more); err != nil {
						t.Fatal(err)
					}
					written = append(written, more...)
					lookAt(l, "a")
					got, begin, err := readAll(path, 0)
					if err != nil || begin != 0 || !bytes.Equal(got, written) {
						t.Fatalf("%s: %d bytes are kept of %d, from %d on: %v", name, len(got), len(written), begin, err)
					}
				}
				if parts, err := segments(path); err != nil || len(parts) < 3 || len(events()) > 0 {
					t.Errorf("%s: segments %v, %v; told: %v", name, parts, err, events())
				}
			}
		})
	}
}

// floodAt are the bytes of a log of numbered lines from a position on: each line bears the number of those before it.
func floodAt(position int64, size int) []byte {
	first := position / floodLine
	var lines []byte
	for n := first; len(lines) < size+floodLine; n++ {
		lines = fmt.Appendf(lines, "%0*d\n", floodLine-1, n)
	}
	return lines[position-first*floodLine:][:size]
}

// Whatever a rotation does between two looks of a reader's at the files, each byte is read once, at its position, and
// none is passed over that is kept. Both go on step by step: the rotation stands at a step when a read begins, and does a
// number of steps at one point of it; for all steps that a reader may see, and all points.
func TestReadsMeetCuts(t *testing.T) {
	for _, mode := range []logMode{{name: "collapse"}, {name: "punch", sparse: true, memory: true}} {
		t.Run(mode.name, func(t *testing.T) {
			l, events := smallLogs(t, mode.dir(t), 1<<30)
			mode.use(t, l)
			l.Watch("a")
			path := l.Path("a")
			var end int64
			write := func(parts int64) {
				if err := appendTo(path, floodAt(end, int(parts*l.part))); err != nil {
					t.Error(err)
				}
				end += parts * l.part
			}
			turns := 0
			next, stop := iter.Pull(func(yield func(string) bool) {
				on := true
				l.cutter.step = func(name string) { on = on && yield(name) }
				for ; on; turns++ {
					if turns%5 == 4 {
						write(9) // more than is kept: it is cut without a copy
					} else {
						write(1)
					}
					on = on && yield("write")
					lookAt(l, "a")
					on = on && yield("end")
				}
			})
			defer stop()
			// visible are the steps before which something has happened that a reader may see.
			visible := []string{"write", "header", "release", "release-header", "remove", "forget", "end"}
			begins, most := visible[:4], 3
			if !mode.sparse {
				begins, most = visible[:3], 2 // each rotation waits for a disk
			}
			advance := func() (step string) {
				for !slices.Contains(visible, step) {
					step, _ = next()
				}
				return step
			}
			for turns < 4 {
				advance()
			}
			// kept is the first position from one on that is kept now.
			kept := func(from int64) int64 {
				r, err := ReadLog(path)
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				_, at, err := r.ReadAt(make([]byte, 1), from)
				if err != nil && !errors.Is(err, io.EOF) {
					t.Fatal(err)
				}
				return at
			}
			// interrupted reads with a rotation's steps at one point, and tells whether the read came that far.
			interrupted := func(point, steps int, read func(*LogReader)) bool {
				r, err := ReadLog(path)
				if err != nil {
					t.Fatal(err)
				}
				defer r.Close()
				points := 0
				r.step = func() {
					if points == point {
						for range steps {
							advance()
						}
					}
					points++
				}
				read(r)
				return points > point
			}
			buf := make([]byte, l.part*3/4)
			var reads []func(*LogReader)
			for _, from := range []func() int64{
				func() int64 { return kept(0) },
				func() int64 { return l.logs["a"].head.position - l.part/2 },
				func() int64 { return l.logs["a"].head.position },
			} {
				reads = append(reads, func(r *LogReader) {
					at := from()
					for range 3 {
						before := end
						n, begin, err := r.ReadAt(buf, at)
						if errors.Is(err, io.EOF) && begin >= before && n == 0 {
							return
						}
						if err != nil || n == 0 {
							t.Fatalf("at %d of %d to %d: %d bytes, %v", at, before, end, n, err)
						}
						if begin < at || begin > at && kept(at) < begin {
							t.Fatalf("at %d it reads on at %d, and what is at %d is kept", at, begin, kept(at))
						}
						if !bytes.Equal(buf[:n], floodAt(begin, n)) {
							t.Fatalf("what it reads at %d isn't what was written there: %.70q", begin, buf[:n])
						}
						at = begin + int64(n)
					}
				})
			}
			reads = append(reads, func(r *LogReader) {
				before := end
				if got, err := r.End(); err != nil || got < before || got > end {
					t.Fatalf("it ends at %d, of %d to %d: %v", got, before, end, err)
				}
			}, func(r *LogReader) {
				last, lines := end, int(l.part*2/floodLine)
				want := last - int64(lines)*floodLine
				got, err := lastLines(r, last, lines)
				if err != nil || got < want || got > want && kept(want) < min(got, last) {
					t.Fatalf("the last %d lines before %d begin at %d: %v", lines, last, got, err)
				}
			})
			combinations := 0
			for _, read := range reads {
				for _, first := range begins {
					for steps := 1; steps <= most; steps++ {
						for point, further := 0, true; further; point++ {
							for at := advance(); at != first; at = advance() {
								continue // the begin that is wanted comes round
							}
							further = interrupted(point, steps, read)
							combinations++
						}
					}
				}
			}
			for _, e := range events() {
				if e.Kind != LogCut {
					t.Errorf("told: %+v", e)
				}
			}
			t.Logf("%d combinations, %d rotations", combinations, turns)
		})
	}
}
