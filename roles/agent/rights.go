package agent

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/rpc"
)

// rights are those that the kernel gives this process, a bit each.
func rights() (uint64, error) {
	var caps [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &caps[0]); err != nil {
		return 0, fmt.Errorf("ask for this process's rights: %w", err)
	}
	return uint64(caps[1].Effective)<<32 | uint64(caps[0].Effective), nil
}

// checkUsers refuses profiles whose nodes are to run as a user that an agent with such rights, which runs as uid and gid, can't
// run them as, or couldn't look after. The first one tells all.
func checkUsers(profiles map[string]config.Profile, rights uint64, uid, gid int) error {
	for _, name := range slices.Sorted(maps.Keys(profiles)) {
		p := profiles[name]
		if p.RunAs == nil || int(p.RunAs.UID) == uid && int(p.RunAs.GID) == gid {
			continue
		}
		needs := map[string]int{
			"CAP_CHOWN": unix.CAP_CHOWN, "CAP_DAC_OVERRIDE": unix.CAP_DAC_OVERRIDE, "CAP_FOWNER": unix.CAP_FOWNER, "CAP_KILL": unix.CAP_KILL,
			"CAP_SETGID": unix.CAP_SETGID, "CAP_SETUID": unix.CAP_SETUID,
		}
		also := ""
		if p.OpenFiles > 0 { // another user's limits are set
			needs["CAP_SYS_RESOURCE"], also = unix.CAP_SYS_RESOURCE, ", with open_files"
		}
		var lacks []string
		for right, bit := range needs {
			if rights&(1<<bit) == 0 {
				lacks = append(lacks, right)
			}
		}
		if len(lacks) == 0 {
			continue
		}
		slices.Sort(lacks)
		hint := "run the agent as root, or leave run_as out: nodes run as the agent's user then"
		if also != "" {
			hint = "run the agent with these rights, or leave run_as or open_files out"
		}
		return rpc.Errorf(rpc.InvalidArgument, "profile %s: run_as = %q%s takes rights that this agent, which runs as user %d, lacks: %s",
			name, p.RunAs.Name, also, uid, strings.Join(lacks, ", ")).WithHint("%s", hint)
	}
	return nil
}

// mayRunAs is checkUsers for this process.
func mayRunAs(profiles map[string]config.Profile) error {
	all, err := rights()
	if err != nil {
		return err
	}
	return checkUsers(profiles, all, os.Geteuid(), os.Getegid())
}
