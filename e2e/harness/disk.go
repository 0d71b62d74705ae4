package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// SmallDisk mounts a file system of its own at dir, which it makes. It needs root, and skips where mounting is forbidden.
func SmallDisk(t testing.TB, dir string, mib int) {
	t.Helper()
	Need(t, "root")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	err := unix.Mount("sutra-test", dir, "tmpfs", 0, fmt.Sprintf("size=%dm,mode=0700", mib))
	if errors.Is(err, unix.EPERM) {
		Skip(t, "may not mount")
	}
	if err != nil {
		t.Fatalf("mount %s: %v", dir, err)
	}
	t.Cleanup(func() {
		// What still runs keeps it until it ends.
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
}

// FillDisk leaves so many bytes on the file system that dir lies on, and returns what makes room again.
func FillDisk(t testing.TB, dir string, leave uint64) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "ballast")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	Await(t, "the disk to be full", func() error {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			return err
		}
		room := st.Bavail * uint64(st.Bsize)
		if room <= leave {
			return nil
		}
		info, err := f.Stat()
		if err != nil {
			return err
		}
		// Others may allocate at the same time.
		return errors.Join(unix.Fallocate(int(f.Fd()), 0, info.Size(), int64(room-leave)), errors.New("not yet looked again"))
	})
	return func() {
		if err := os.Remove(path); err != nil {
			t.Error(err)
		}
	}
}
