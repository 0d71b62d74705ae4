package supervisor

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// As calls f with what a user may do with files, and no more: the kernel looks at who asks for each one, thread by thread. nil: as
// this process. What f starts by go isn't in that thread.
func As(c *syscall.Credential, f func() error) error {
	if c == nil {
		return f()
	}
	return aside(func() (again bool, err error) {
		groups := make([]int, len(c.Groups))
		for i, g := range c.Groups {
			groups[i] = int(g)
		}
		if err := unix.Setgroups(groups); err != nil { // of this thread alone, as all of x/sys
			return false, fmt.Errorf("be in the groups of user %d: %w", c.Uid, err)
		}
		stay := stayHidden()
		// They don't tell whether they did it, but what was before.
		_, _ = unix.SetfsgidRetGid(int(c.Gid))
		_, _ = unix.SetfsuidRetUid(int(c.Uid))
		stay()
		gid, _ := unix.SetfsgidRetGid(-1)
		uid, _ := unix.SetfsuidRetUid(-1)
		if uid != int(c.Uid) || gid != int(c.Gid) {
			return false, fmt.Errorf("be user %d with group %d towards files: %w", c.Uid, c.Gid, unix.EPERM)
		}
		return false, f()
	})
}

// stayHidden is called before a thread becomes somebody else, or forks who does, and what it returns afterwards. The kernel then
// makes of the whole process's memory what fs.suid_dumpable says: fit for a core file, on many hosts, although the process has
// hidden it.
func stayHidden() (stay func()) {
	was, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil || was != 1 {
		was = 0 // 2 is the kernel's, for the moment of another change
	}
	return func() { _ = unix.Prctl(unix.PR_SET_DUMPABLE, uintptr(was), 0, 0, 0) } // it takes both
}
