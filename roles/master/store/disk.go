package store

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// DefaultMinFree is what stays free on the file system of the master's home, in bytes.
// A write may make etcd allocate its log's next segment, 61 MiB at once, and reaches the
// database only 0.1 s after it was acknowledged: neither may fail.
const DefaultMinFree = 96 << 20

// ErrDiskFull says that a write was refused because the file system of the master's
// home is too full. Nothing is lost, reads go on, and so do writes once there is space.
var ErrDiskFull = errors.New("disk full")

// Healthy tells why nothing can be written now; nil where it can.
func (s *Store) Healthy() error {
	if err := s.fatal.err(); err != nil {
		return err
	}
	return s.checkFree(s.minFree)
}

// checkFree keeps writes from etcd on a full disk: a log that can't be appended to
// makes etcd give up for good.
func (s *Store) checkFree(need uint64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return fmt.Errorf("see how much is free in %s: %w", s.dir, err)
	}
	free := st.Bavail * uint64(st.Bsize)
	if free >= need {
		return nil
	}
	return fmt.Errorf("%w: %d MiB free in %s, %d MiB needed",
		ErrDiskFull, free>>20, s.dir, need>>20)
}
