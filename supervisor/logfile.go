package supervisor

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A log is one stream of bytes. A byte's position counts those before it since the log's beginning, and never
// changes. The newest bytes stand in the live file, which the process appends to. Older ones were moved, by a rotation,
// to segments: files that never change and are named after the live file and the position of their first byte.
//
// What the files say is all there is to know: each step of a rotation leaves a log that reads the same. So a reader
// needs nobody's leave, and a rotation that was broken off is finished by whoever comes next.

// segment is a part of a log that was moved out of the live file.
type segment struct {
	start, size int64
	// at is when it was written: after the last of its bytes.
	at time.Time
}

func (s segment) end() int64 { return s.start + s.size }

func segmentPath(live string, start int64) string {
	return fmt.Sprintf("%s.%0*d", live, positionDigits, start)
}

// segmentStart is the position in a segment's name; ok is false for any other file's.
func segmentStart(live, name string) (start int64, ok bool) {
	rest, ok := strings.CutPrefix(name, live+".")
	if !ok || len(rest) != positionDigits {
		return 0, false
	}
	return digits([]byte(rest))
}

// segments lists a log's segments by position.
func segments(live string) ([]segment, error) {
	dir, err := os.Open(filepath.Dir(live))
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var found []segment
	for _, name := range names {
		start, ok := segmentStart(filepath.Base(live), name)
		if !ok {
			continue
		}
		if info, err := os.Lstat(segmentPath(live, start)); err == nil { // else it went meanwhile
			found = append(found, segment{start: start, size: info.Size(), at: info.ModTime()})
		}
	}
	slices.SortFunc(found, func(a, b segment) int { return cmp.Compare(a.start, b.start) })
	return found, nil
}

// head is where a live file's bytes begin. The zero head is that of a log that was never rotated.
type head struct {
	// offset of the header in the file; before it is a hole.
	offset int64
	// data is the offset of the first byte behind the header, and position is that byte's.
	data, position int64
}

// settledHead finds the head of a live file, also while its beginning is being taken out.
func settledHead(f *os.File) (head, error) {
	buf := make([]byte, maxHeaderText)
	for hole := int64(0); ; {
		n, err := f.ReadAt(buf, 0)
		if err != nil && !errors.Is(err, io.EOF) {
			return head{}, err
		}
		if position, length, ok := parseHeader(buf[:n]); ok {
			return head{data: length, position: position}, nil
		}
		if n == 0 || buf[0] != 0 {
			return head{}, nil
		}
		offset, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			return head{}, nil // all of it is a hole: no rotation leaves that
		case err != nil:
			return head{}, err
		case offset == 0:
			return head{}, nil // the process wrote that zero
		}
		h, ok, err := headBehind(f, offset)
		if err != nil || ok {
			return h, err
		}
		// A header stands before what is before it is taken out: where there is none, the hole grew since it was measured.
		// One that stays as it is was made by the process itself.
		if offset == hole {
			return head{}, nil
		}
		hole = offset
	}
}

// headBehind is the head of a live file that begins with a hole up to an offset; false where no header follows it.
func headBehind(f *os.File, offset int64) (head, bool, error) {
	buf := make([]byte, maxHeaderText)
	// File systems with large records give back a hole's last part as zeros.
	for zeros := 0; zeros < maxHeader; {
		n, err := f.ReadAt(buf, offset)
		if err != nil && !errors.Is(err, io.EOF) {
			return head{}, false, err
		}
		skip := n - len(bytes.TrimLeft(buf[:n], "\x00"))
		if skip == 0 {
			position, length, ok := parseHeader(buf[:n])
			return head{offset: offset, data: offset + length, position: position}, ok, nil
		}
		offset, zeros = offset+int64(skip), zeros+skip
	}
	return head{}, false, nil
}

// moved is the position up to which the live file's bytes stand in a segment, too: those are to be read there, for a
// rotation is about to take them out of the live file.
func moved(live string, h head) int64 {
	info, err := os.Lstat(segmentPath(live, h.position))
	if err != nil {
		return h.position
	}
	return h.position + info.Size()
}

// openLog opens a log's live file for appending, or makes it, and returns the position of what is appended.
func openLog(path string) (f *os.File, end int64, err error) {
	f, err = os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, 0, fmt.Errorf("open log: %w", err)
	}
	r, err := ReadLog(path)
	if err == nil {
		end, err = r.End()
		_ = r.Close() // nothing was written
	}
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("measure log: %w", err), f.Close())
	}
	return f, end, nil
}

// LogReader reads one log. It isn't safe for concurrent use.
type LogReader struct {
	path string
	live *os.File

	// part is the segment that was read last, and file is open on it; nil where there is none.
	part segment
	file *os.File

	// step is called behind each look at the files, which a rotation may follow; tests have one follow.
	step func()
}

// ReadLog opens a log for reading by the path of its live file.
func ReadLog(path string) (*LogReader, error) {
	live, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return &LogReader{path: path, live: live, step: func() {}}, nil
}

// Close gives the reader's files back.
func (r *LogReader) Close() error {
	if r.file != nil {
		_ = r.file.Close() // nothing was written
	}
	return r.live.Close()
}

// End is the position behind the last byte.
func (r *LogReader) End() (int64, error) {
	for {
		before, err := settledHead(r.live)
		if err != nil {
			return 0, err
		}
		r.step()
		info, err := r.live.Stat()
		if err != nil {
			return 0, err
		}
		r.step()
		after, err := settledHead(r.live)
		if err != nil {
			return 0, err
		}
		if before == after {
			return max(before.position, before.position+info.Size()-before.data), nil
		}
	}
}

// Start is the position of the first byte that is kept.
func (r *LogReader) Start() (int64, error) {
	for {
		h, err := settledHead(r.live)
		if err != nil {
			return 0, err
		}
		all, err := segments(r.path)
		if err != nil {
			return 0, err
		}
		if again, err := settledHead(r.live); err != nil || again == h {
			if len(all) > 0 {
				return min(h.position, all[0].start), err
			}
			return h.position, err
		}
	}
}

// ReadAt reads bytes from a position on, or, where that isn't kept any more, from the first one behind it that is: at.
// It returns what is there at once, which may be less than p holds, and io.EOF with nothing at the log's end.
func (r *LogReader) ReadAt(p []byte, position int64) (n int, at int64, err error) {
	for {
		h, err := settledHead(r.live)
		if err != nil {
			return 0, position, fmt.Errorf("read log: %w", err)
		}
		r.step()
		from := moved(r.path, h)
		r.step()
		at = position
		if at < from {
			n, next, err := r.readSegment(p, at)
			if err != nil || n > 0 {
				return n, next, err
			}
			at = from
		}
		n, err = r.live.ReadAt(p, h.data+at-h.position)
		r.step()
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, at, fmt.Errorf("read log: %w", err)
		}
		// What was read is right where no rotation came between; else what was looked for may have become a segment since.
		again, err := settledHead(r.live)
		if err != nil {
			return 0, at, fmt.Errorf("read log: %w", err)
		}
		r.step()
		if again != h || moved(r.path, h) != from {
			continue
		}
		if n == 0 {
			return 0, at, io.EOF
		}
		return n, at, nil
	}
}

// readSegment reads from the segment that has a position, or from the first one behind it; nothing where there is none.
func (r *LogReader) readSegment(p []byte, position int64) (n int, at int64, err error) {
	for tries := 0; ; tries++ {
		if r.file == nil || position < r.part.start || position >= r.part.end() {
			if err := r.openSegment(position); err != nil {
				if errors.Is(err, fs.ErrNotExist) && tries < 10 {
					continue // it went just now
				}
				return 0, position, fmt.Errorf("read log: %w", err)
			}
			if r.file == nil {
				return 0, position, nil
			}
		}
		at = max(position, r.part.start)
		n, err = r.file.ReadAt(p[:min(int64(len(p)), r.part.end()-at)], at-r.part.start)
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, at, fmt.Errorf("read log: %w", err)
		}
		return n, at, nil
	}
}

func (r *LogReader) openSegment(position int64) error {
	if r.file != nil {
		_ = r.file.Close() // nothing was written
		r.file = nil
	}
	all, err := segments(r.path)
	if err != nil {
		return err
	}
	r.step()
	for _, s := range all {
		if s.end() <= position {
			continue
		}
		file, err := os.Open(segmentPath(r.path, s.start))
		if err != nil {
			return err
		}
		r.step()
		if holds, err := hasBlocks(file); err != nil || !holds {
			_ = file.Close() // nothing was written
			if err != nil {
				return err
			}
			continue
		}
		r.part, r.file = s, file
		return nil
	}
	return nil
}

// hasBlocks tells a segment from one that only stands for bytes which weren't kept: that is nothing but a hole.
func hasBlocks(f *os.File) (bool, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, err
	}
	return st.Blocks > 0, nil
}

// lastOutput is the end of what a log has behind a position, at most limit bytes. The log may be gone or cut: then there
// is none.
func lastOutput(path string, from int64, limit int) string {
	r, err := ReadLog(path)
	if err != nil {
		return ""
	}
	defer r.Close()
	end, err := r.End()
	if err != nil {
		return ""
	}
	var out []byte
	buf := make([]byte, limit)
	for at := max(from, end-int64(limit)); at < end; {
		n, begin, err := r.ReadAt(buf[:min(int64(limit), end-at)], at)
		if err != nil {
			break
		}
		out = append(out, buf[:n]...)
		at = begin + int64(n)
	}
	return string(out[max(0, len(out)-limit):])
}
