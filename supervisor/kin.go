package supervisor

import (
	"bytes"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// kin is everything that descends from a unit's process: it is found by its control group or, where there is
// none, by the mark that all of it inherits in its environment.
type kin struct {
	group group
	mark  string
	// ending are those that were found by the mark, by their pids with their start ticks: one that ends loses its
	// environment a while before its ports and files.
	ending map[int]uint64
}

func newKin(g group, mark string) kin { return kin{group: g, mark: mark, ending: map[int]uint64{}} }

// kill ends what is found of it.
func (k kin) kill() {
	if k.group.unified != "" && k.group.kill() == nil {
		return
	}
	thaw := k.group.freeze()
	k.signal(unix.SIGKILL, 0) // also before Linux 5.14, whose groups can't be killed as a whole
	thaw()
}

// signal sends to each that is found of it, but for the members of one process group.
func (k kin) signal(sig unix.Signal, but int) {
	for _, pid := range k.find() {
		if pid == os.Getpid() {
			continue // a thread of it was on its way through a v1 group
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue // it has ended
		}
		// Found again, now that the pidfd holds it: it is still the one that was found.
		if st, err := readStat(pid); err == nil && (but == 0 || st.group != but) && k.has(pid) {
			_ = unix.PidfdSendSignal(fd, sig, nil, 0) // ESRCH: it has ended
		}
		_ = unix.Close(fd) // nothing was written
	}
}

// has tells whether a process is of the kin.
func (k kin) has(pid int) bool {
	if k.group.exists() {
		return slices.Contains(k.group.members(), pid)
	}
	return marked(pid, k.mark)
}

// find returns the pids of what lives of it.
func (k kin) find() []int {
	if k.group.exists() {
		return k.group.members()
	}
	var found []int
	for _, pid := range pids() {
		if !marked(pid, k.mark) {
			continue
		}
		if st, err := readStat(pid); err == nil {
			k.ending[pid] = st.startTicks
		}
	}
	for pid, ticks := range k.ending {
		if st, err := readStat(pid); err == nil && st.startTicks == ticks && !st.zombie {
			found = append(found, pid)
		} else {
			delete(k.ending, pid)
		}
	}
	return found
}

// left tells whether anything of it lives.
func (k kin) left() bool {
	if k.group.exists() {
		return k.group.populated()
	}
	return len(k.find()) > 0
}

// leader returns the process of it that a supervisor forked: the one that has led a session for longest.
func (k kin) leader(bootID string) (leader Identity) {
	for _, pid := range k.find() {
		st, err := readStat(pid)
		if err != nil || st.session != pid || st.zombie {
			continue
		}
		// Ticks are coarse: of two in one, the parent has the lower pid.
		if leader.PID == 0 || st.startTicks < leader.StartTicks || st.startTicks == leader.StartTicks && pid < leader.PID {
			leader = Identity{PID: pid, StartTicks: st.startTicks, BootID: bootID}
		}
	}
	return leader
}

// pids are those of all processes; without /proc there are none.
func pids() []int {
	dirs, _ := os.ReadDir("/proc")
	var all []int
	for _, d := range dirs {
		if pid, err := strconv.Atoi(d.Name()); err == nil {
			all = append(all, pid)
		}
	}
	return all
}

// marked tells whether a process has the mark as an entry of its environment.
func marked(pid int, mark string) bool {
	env, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil || mark == "" {
		return false
	}
	for entry := range bytes.SplitSeq(env, []byte{0}) {
		if string(entry) == mark {
			return true
		}
	}
	return false
}

// Leaders returns the environments of the processes that lead their session and have an entry with the given
// beginning in theirs: units whose records were lost.
func Leaders(markPrefix string) []map[string]string {
	var found []map[string]string
	for _, pid := range pids() {
		data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/environ")
		if err != nil || !bytes.Contains(data, []byte(markPrefix)) || !leads(pid) {
			continue
		}
		env := map[string]string{}
		for entry := range bytes.SplitSeq(data, []byte{0}) {
			if name, value, ok := strings.Cut(string(entry), "="); ok {
				env[name] = value
			}
		}
		found = append(found, env)
	}
	return found
}
