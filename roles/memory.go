package roles

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// hideMemory keeps this process's memory, which has keys and tokens, from other processes of the account, and out of core files,
// wherever the host would put them. It isn't inherited by what is executed: nodes leave core files as they are told to.
func hideMemory() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("keep this process's memory to itself: %w", err)
	}
	return nil
}
