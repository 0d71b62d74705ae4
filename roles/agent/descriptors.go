package agent

import (
	"fmt"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/config"
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

// mostOpenFiles is how many files this process can let another one have open.
func mostOpenFiles() (uint64, error) {
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &own); err != nil {
		return 0, fmt.Errorf("ask for the limit of open files: %w", err)
	}
	all, err := rights()
	if err != nil {
		return 0, err
	}
	if all&(1<<unix.CAP_SYS_RESOURCE) == 0 {
		return own.Max, nil
	}
	data, err := os.ReadFile("/proc/sys/fs/nr_open") // beyond which nobody comes
	if err != nil {
		return 0, fmt.Errorf("ask for the host's limit of open files: %w", err)
	}
	return strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
}

// warnOfOpenFiles names the profiles that promise more open files than there are: their nodes can't be started.
func warnOfOpenFiles(log zerolog.Logger, profiles map[string]config.Profile) {
	most, err := mostOpenFiles()
	if err != nil {
		log.Warn().Err(err).Msg("whether nodes can have as many open files as their profiles say isn't known")
		return
	}
	for _, name := range slices.Sorted(maps.Keys(profiles)) {
		if p := profiles[name]; p.OpenFiles > 0 && uint64(p.OpenFiles) > most {
			log.Warn().Str("profile", name).Int("open_files", p.OpenFiles).Uint64("at_most", most).
				Str("hint", "lower open_files in the agent's file, or let the agent have as many (LimitNOFILE= of a systemd unit), and restart it").
				Msgf("profile %s gives a node %d open files, and this agent can give it %d at most: no node of that profile can be started",
					name, p.OpenFiles, most)
		}
	}
}
