package supervisor

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"math"
	"time"
)

// chunkSize bounds a piece of a log.
const chunkSize = 64 << 10

const (
	// A follower looks again after followSoonest while its log grows, and after up to followLatest while it doesn't.
	followSoonest = 10 * time.Millisecond
	followLatest  = 200 * time.Millisecond
)

// LogRange is which part of a log is asked for. The zero LogRange is all that is kept.
type LogRange struct {
	// Follow goes on with what is written from then on.
	Follow bool
	// Lines: at most so many of the last lines, where Last is set.
	Last  bool
	Lines int
	// Since: nothing that was written before; zero: not given. Lines bear no time, so that it is more rather than less.
	Since time.Time
	// Position: begin there instead; 0: not given.
	Position int64
}

// LogChunk is a piece of a log.
type LogChunk struct {
	// Data is whole lines, unless one is longer than a chunk or the log ends within it. It is only valid until send returns.
	Data []byte
	// Position is where the log goes on after Data.
	Position int64
	// Skipped counts the bytes before Data that were asked for and aren't kept any more.
	Skipped int64
}

// Tail sends a part of a unit's log, piece by piece: without Follow up to where the log ends now, however fast it grows.
// With Follow it begins with an empty piece that says where the part begins, and returns nil once ended is closed and
// all that was written is sent. fs.ErrNotExist is a log that doesn't exist; while the unit hasn't ended, it may come, and
// an empty piece says that it is waited for.
func (l *Logs) Tail(ctx context.Context, id string, want LogRange, ended <-chan struct{}, send func(LogChunk) error) error {
	pause := pacer{ctx: ctx, ended: ended}
	defer pause.stop()
	r, err := ReadLog(l.Path(id))
	if errors.Is(err, fs.ErrNotExist) && want.Follow && !closed(ended) {
		if err := send(LogChunk{}); err != nil {
			return err
		}
	}
	for errors.Is(err, fs.ErrNotExist) && want.Follow && !closed(ended) && pause.wait() {
		r, err = ReadLog(l.Path(id))
	}
	switch {
	case ctx.Err() != nil:
		if err == nil {
			_ = r.Close() // nothing was written
		}
		return ctx.Err()
	case errors.Is(err, fs.ErrNotExist) && !want.Follow && !closed(ended):
		return nil
	case err != nil:
		return err
	}
	defer r.Close()
	t := tail{r: r, send: send, buf: make([]byte, chunkSize), until: math.MaxInt64}
	end, err := r.End()
	if err != nil {
		return err
	}
	if t.position, err = l.begin(r, id, want, end); err != nil {
		return err
	}
	if !want.Follow {
		t.until = end
	} else {
		if err := send(LogChunk{Position: t.position}); err != nil {
			return err
		}
	}
	for {
		over := !want.Follow || closed(ended) // asked before it reads: what was written before, it reads
		grown, err := t.drain(ctx, over)
		if err != nil || over {
			return err
		}
		if grown {
			pause.next = followSoonest
		}
		for waiting := true; waiting; {
			if !pause.wait() {
				return ctx.Err()
			}
			if waiting, err = t.unchanged(); err != nil {
				return err
			}
			waiting = waiting && !closed(ended)
		}
	}
}

// begin is the position that a range begins at, of a log that ends at end.
func (l *Logs) begin(r *LogReader, id string, want LogRange, end int64) (position int64, err error) {
	if want.Position > 0 {
		return min(want.Position, end), nil // the host may have crashed before the last bytes were on its disk
	}
	if position, err = r.Start(); err != nil {
		return 0, err
	}
	if want.Last {
		from, err := lastLines(r, end, want.Lines)
		if err != nil {
			return 0, err
		}
		position = max(position, from)
	}
	if !want.Since.IsZero() {
		from, err := l.since(r, id, want.Since, end)
		if err != nil {
			return 0, err
		}
		if from > position {
			// The moment that was noted may have been in the midst of a line.
			if from, err = lineStart(r, min(from, end)); err != nil {
				return 0, err
			}
			position = max(position, from)
		}
	}
	return position, nil
}

// tail is a reader on its way through a log.
type tail struct {
	r        *LogReader
	send     func(LogChunk) error
	buf      []byte
	position int64
	// until is where the part ends that is asked for.
	until   int64
	skipped int64
	// size and written are the live file's when it was last read to the end.
	size    int64
	written time.Time
}

// drain sends what is there. over: also the beginning of a line whose rest won't come.
func (t *tail) drain(ctx context.Context, over bool) (grown bool, err error) {
	if _, err := t.unchanged(); err != nil {
		return false, err
	}
	for ctx.Err() == nil && t.position < t.until {
		n, at, err := t.r.ReadAt(t.buf[:min(int64(len(t.buf)), t.until-t.position)], t.position)
		if err != nil && !errors.Is(err, io.EOF) {
			return grown, err
		}
		if at >= t.until { // nothing of the part is kept any more
			lost := LogChunk{Position: t.until, Skipped: t.skipped + t.until - t.position}
			t.position = t.until
			return grown, t.send(lost)
		}
		t.skipped += at - t.position
		t.position = at
		n = int(min(int64(n), t.until-at))
		if n == 0 {
			return grown, t.cutShort()
		}
		data := t.buf[:n]
		if i := bytes.LastIndexByte(data, '\n'); i >= 0 {
			data = data[:i+1]
		} else if n < len(t.buf) && !over {
			// Where it isn't the end of the log that ends the piece, the line goes on behind it.
			if end, err := t.r.End(); err != nil || at+int64(n) >= end {
				return grown, err
			}
		}
		t.position = at + int64(len(data))
		chunk := LogChunk{Data: data, Position: t.position, Skipped: t.skipped}
		t.skipped, grown = 0, true
		if err := t.send(chunk); err != nil {
			return grown, err
		}
	}
	return grown, ctx.Err()
}

// cutShort goes to the beginning of a log that somebody has emptied.
func (t *tail) cutShort() error {
	end, err := t.r.End()
	if err != nil || end >= t.position {
		return err
	}
	h, err := settledHead(t.r.live)
	t.position, t.size = h.position, -1 // no file's size: it is read once more
	return err
}

// unchanged tells whether the live file is as it was at the last call.
func (t *tail) unchanged() (bool, error) {
	info, err := t.r.live.Stat()
	if err != nil {
		return false, err
	}
	same := info.Size() == t.size && info.ModTime().Equal(t.written)
	t.size, t.written = info.Size(), info.ModTime()
	return same, nil
}

// lastLines is the position that the last lines begin at, as far as they are kept. What follows the last line break is
// a line, too.
func lastLines(r *LogReader, end int64, lines int) (int64, error) {
	if lines <= 0 {
		return end, nil
	}
	position := end
	buf := make([]byte, chunkSize)
	for position > 0 {
		n, at, err := readBefore(r, buf, position)
		if err != nil {
			return 0, err
		}
		piece := buf[:n]
		if position == end {
			piece = bytes.TrimSuffix(piece, []byte("\n")) // it ends the last line, and begins none
		}
		for i := bytes.LastIndexByte(piece, '\n'); i >= 0; i = bytes.LastIndexByte(piece[:i], '\n') {
			if lines--; lines == 0 {
				return at + int64(i) + 1, nil
			}
		}
		if n == 0 {
			return position, nil // nothing before is kept
		}
		position = at
	}
	return position, nil
}

// lineStart is the beginning of the line that a position lies in, at most a chunk before it.
func lineStart(r *LogReader, position int64) (int64, error) {
	buf := make([]byte, chunkSize)
	n, at, err := readBefore(r, buf, position)
	if err != nil {
		return 0, err
	}
	return at + int64(bytes.LastIndexByte(buf[:n], '\n')) + 1, nil
}

// readBefore fills p with the bytes that end before a position, as far as they are kept; they begin at at.
func readBefore(r *LogReader, p []byte, end int64) (n int, at int64, err error) {
	begin := max(0, end-int64(len(p)))
	for next := begin; next < end; {
		got, from, err := r.ReadAt(p[next-begin:end-begin], next)
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, end, err
		}
		if from >= end || got == 0 {
			return 0, end, nil
		}
		if from > next { // what is before isn't kept: it begins here
			copy(p, p[next-begin:next-begin+int64(got)])
			begin = from
			got = min(got, int(end-from))
		}
		next = from + int64(got)
		n = int(next - begin)
	}
	return n, begin, nil
}

// pacer waits, longer with each time that nothing happened.
type pacer struct {
	ctx   context.Context
	ended <-chan struct{}
	next  time.Duration
	timer *time.Timer
}

// wait returns false where ctx ended first. It returns at once where the unit has ended.
func (p *pacer) wait() bool {
	p.next = min(max(p.next, followSoonest), followLatest)
	if p.timer == nil {
		p.timer = time.NewTimer(p.next)
	} else {
		p.timer.Reset(p.next)
	}
	p.next *= 2
	select {
	case <-p.ctx.Done():
		return false
	case <-p.ended:
		return true
	case <-p.timer.C:
		return true
	}
}

func (p *pacer) stop() {
	if p.timer != nil {
		p.timer.Stop()
	}
}
