package agent

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDescriptorsAreKept(t *testing.T) {
	for name, keep := range map[string]func() error{"by the kernel": keepDescriptors, "one by one": keepListed} {
		t.Run(name, func(t *testing.T) {
			file, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			leaked, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD, 100) // as a shell leaks one: without close-on-exec
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = unix.Close(leaked) }() // nothing was written
			if err := keep(); err != nil {
				t.Fatal(err)
			}
			for fd, want := range map[int]int{leaked: unix.FD_CLOEXEC, 0: 0, 1: 0, 2: 0} {
				if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags != want {
					t.Errorf("flags of descriptor %d: %d, %v; want %d", fd, flags, err, want)
				}
			}
		})
	}
}
