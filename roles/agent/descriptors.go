package agent

import (
	"fmt"
	"math"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// firstInherited is the lowest descriptor that isn't one of the standard streams.
const firstInherited = 3

// keepDescriptors makes every descriptor above stderr this process's own: what a shell or a service manager leaked into it
// isn't passed on to nodes, which would hold files, sockets and pipes of others for as long as they run.
func keepDescriptors() error {
	err := unix.CloseRange(firstInherited, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
	if err == nil {
		return nil
	}
	// Before Linux 5.11 the kernel can't, and a filter of system calls may forbid it.
	return keepListed()
}

// keepListed is keepDescriptors for one descriptor after the other.
func keepListed() error {
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list inherited descriptors: %w", err)
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("list inherited descriptors: %w", err)
	}
	for _, name := range names {
		if fd, err := strconv.Atoi(name); err == nil && fd >= firstInherited {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}
