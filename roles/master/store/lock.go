package store

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// dirLock keeps a second master out of a home. The kernel drops it with the process,
// so a killed master leaves nothing to clean up.
type dirLock struct {
	file *os.File
}

func lockDir(dir string) (*dirLock, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the master's home: %w; let this user write there, or choose another home", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer func() { _ = f.Close() }()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		holder := "another process"
		if pid, err := os.ReadFile(path); err == nil && len(pid) > 0 {
			holder = "process " + strings.TrimSpace(string(pid))
		}
		return nil, fmt.Errorf("a master already runs in %s (%s holds %s); stop it or choose another home", dir, holder, path)
	}
	// The pid is for people only: a full disk must not keep the master from starting.
	if err := f.Truncate(0); err == nil {
		_, _ = fmt.Fprintf(f, "%d\n", os.Getpid())
	}
	return &dirLock{file: f}, nil
}

// release leaves the file: removing it would let two masters lock two files of one name.
func (l *dirLock) release() {
	_ = l.file.Truncate(0)
	_ = l.file.Close()
}
