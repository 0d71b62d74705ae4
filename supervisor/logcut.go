package supervisor

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// cutter moves the beginning of live files to segments. The process goes on writing: nothing of what it does is
// waited for, and it waits for nothing but the file system.
//
// A rotation goes through these steps, each of which leaves a log that reads the same:
//
//	copy     the beginning of the live file, up to the end of a line, is copied to a temporary file
//	rename   that becomes a segment; from now on readers take those bytes from there
//	header   the last of those bytes in the live file are overwritten by a header
//	release  what stands before the header is taken out of the live file
type cutter struct {
	// block is what the file system takes out of files in.
	block int64
	// release is how it does that; nil where it can't.
	release func(fd int, size int64) error
	// sparse: what was taken out leaves a hole, and offsets stay as they are.
	sparse bool
	// step is called before each step with its name; tests break off there.
	step func(name string)
}

// newCutter finds out what the file system of a folder can do.
func newCutter(dir string) (c cutter, err error) {
	c.step = func(string) {}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return c, fmt.Errorf("look at the file system of %s: %w", dir, err)
	}
	c.block = max(st.Bsize, 512)
	probe, err := os.CreateTemp(dir, ".probe-")
	if err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, probe.Close(), os.Remove(probe.Name())) }()
	if err := probe.Truncate(2 * c.block); err != nil { // takes no room, which a full disk hasn't
		return c, err
	}
	switch {
	case collapse(int(probe.Fd()), c.block) == nil:
		c.release = collapse
	case punch(int(probe.Fd()), c.block) == nil:
		c.release, c.sparse = punch, true
	}
	return c, nil
}

// collapse takes the first bytes out of a file, whole blocks of it; what follows moves to the front.
func collapse(fd int, size int64) error {
	return unix.Fallocate(fd, unix.FALLOC_FL_COLLAPSE_RANGE, 0, size)
}

// punch makes a hole of a file's first bytes.
func punch(fd int, size int64) error {
	return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, size)
}

// move copies the bytes of a live file from offset to to into a segment.
func (c cutter) move(live *os.File, path string, offset, to, position int64) (s segment, err error) {
	c.step("copy")
	temporary := path + temporarySuffix
	out, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return s, err
	}
	if err := c.fill(out, live, offset, to); err != nil {
		return s, errors.Join(err, out.Close(), os.Remove(temporary))
	}
	info, err := out.Stat()
	if err := errors.Join(err, out.Close()); err != nil {
		return s, errors.Join(err, os.Remove(temporary))
	}
	c.step("rename")
	if err := c.publish(path, position); err != nil {
		return s, errors.Join(err, os.Remove(temporary))
	}
	return segment{start: position, size: info.Size(), at: info.ModTime()}, nil
}

// fill copies inside the kernel, with what the file system has for it.
func (c cutter) fill(out, live *os.File, offset, to int64) error {
	if _, err := live.Seek(offset, io.SeekStart); err != nil {
		return err
	}
	if _, err := io.CopyN(out, live, to-offset); err != nil {
		return err
	}
	c.step("sync")
	return out.Sync()
}

// publish gives the temporary file a segment's name.
func (c cutter) publish(path string, position int64) error {
	if err := os.Rename(path+temporarySuffix, segmentPath(path, position)); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// forgo is move for bytes that aren't kept: the segment is a hole, which only stands for them until they are cut.
func (c cutter) forgo(path string, size, position int64) error {
	c.step("forgo")
	out, err := os.OpenFile(path+temporarySuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(out.Truncate(size), out.Close()); err != nil {
		return err
	}
	c.step("rename")
	return c.publish(path, position)
}

// cut takes the bytes before an offset, which stand in segments, out of a live file, and returns its new head.
// The file must not be open for appending: what is written at an offset then lands at the end.
func (c cutter) cut(live *os.File, path string, h head, offset int64) (head, error) {
	before := filepath.Base(segmentPath(path, h.position))
	size := (offset - headerSize(before)) / c.block * c.block
	if size <= c.round(h.data) {
		return h, fmt.Errorf("there is no whole block before offset %d", offset)
	}
	position := h.position + offset - h.data
	c.step("header")
	if _, err := live.WriteAt(newHeader(position, before, offset-size), size); err != nil {
		return h, err
	}
	if !c.sparse {
		c.step("release")
		if err := c.release(int(live.Fd()), size); err != nil {
			return h, err
		}
		return head{data: offset - size, position: position}, nil
	}
	if err := live.Sync(); err != nil { // collapsing does so by itself
		return h, err
	}
	// A hole may be seen half made: the old header, which says that all of it stands in segments, goes last.
	c.step("release")
	if err := unix.Fallocate(int(live.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, c.round(h.data), size-c.round(h.data)); err != nil {
		return h, err
	}
	c.step("release-header")
	if err := c.release(int(live.Fd()), size); err != nil {
		return h, err
	}
	return head{offset: size, data: offset, position: position}, nil
}

// round is the next beginning of a block.
func (c cutter) round(offset int64) int64 { return (offset + c.block - 1) / c.block * c.block }

// recover brings a rotation to its end that was broken off, and removes what none of its steps would use.
func (c cutter) recover(path string) error {
	if err := os.Remove(path + temporarySuffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	live, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer live.Close()
	h, err := settledHead(live)
	if err != nil {
		return err
	}
	to := moved(path, h)
	if to == h.position {
		return nil
	}
	if h == (head{}) && !startsAlike(live, segmentPath(path, 0)) {
		return nil // it was emptied by somebody, and begins anew
	}
	_, err = c.cut(live, path, h, h.data+to-h.position)
	return err
}

// startsAlike tells whether a live file begins with the very bytes that a segment begins with.
func startsAlike(live *os.File, segment string) bool {
	other, err := os.Open(segment)
	if err != nil {
		return false
	}
	defer other.Close()
	if holds, err := hasBlocks(other); err != nil || !holds {
		return err == nil
	}
	a, b := make([]byte, 512), make([]byte, 512)
	n, _ := live.ReadAt(a, 0) // less where there is less
	m, _ := other.ReadAt(b, 0)
	n = min(n, m)
	return n > 0 && bytes.Equal(a[:n], b[:n])
}

// lineEnd is the last offset behind a line break that is greater than low and at most high; false where there is none.
func lineEnd(f io.ReaderAt, low, high int64) (int64, bool) {
	buf := make([]byte, 64<<10)
	for high > low {
		from := max(low, high-int64(len(buf)))
		n, err := f.ReadAt(buf[:high-from], from)
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, false
		}
		if i := bytes.LastIndexByte(buf[:n], '\n'); i >= 0 {
			return from + int64(i) + 1, true
		}
		high = from
	}
	return 0, false
}
