package supervisor

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Usage is what all processes of a unit use together.
type Usage struct {
	// PID is the unit's process that it was measured of.
	PID int
	// CPUTime since that process was started, what has ended since included.
	CPUTime time.Duration
	// Memory is resident, in bytes; a page that several processes share counts for each.
	Memory uint64
	// OpenFiles are the descriptors that the unit's process has open.
	OpenFiles int
}

// Measure says what units use now, by their ids; one without a process is left out. Where units have no control groups
// it goes through /proc once, for all of them.
func Measure(units []*Unit) map[string]Usage {
	found := make(map[string]Usage, len(units))
	var loose []*Unit
	for _, u := range units {
		pid := u.State().PID
		if pid == 0 {
			continue
		}
		g := u.spec.Cgroups.of(u.spec.ID)
		members := g.members()
		cpu, ok := g.cpuTime()
		if !ok || !slices.Contains(members, pid) {
			loose = append(loose, u)
			continue
		}
		use := Usage{PID: pid, CPUTime: cpu, OpenFiles: openFiles(pid)}
		for _, member := range members {
			use.Memory += resident(member)
		}
		found[u.spec.ID] = use
	}
	if len(loose) > 0 {
		measureLoose(loose, found)
	}
	for _, u := range units {
		if use, ok := found[u.spec.ID]; ok && u.State().PID != use.PID {
			delete(found, u.spec.ID) // it ended meanwhile, and its pid may be another's
		}
	}
	return found
}

// measureLoose adds up what belongs to the units' sessions or descends from them.
func measureLoose(units []*Unit, found map[string]Usage) {
	leaders := map[int]string{}
	for _, u := range units {
		if pid := u.State().PID; pid != 0 {
			leaders[pid] = u.spec.ID
			found[u.spec.ID] = Usage{PID: pid, OpenFiles: openFiles(pid)}
		}
	}
	stats := map[int]stat{}
	for _, pid := range pids() {
		if st, err := readStat(pid); err == nil {
			stats[pid] = st
		}
	}
	for pid, st := range stats {
		id, ok := leaders[st.session]
		// One that made a session of its own is known by its ancestors, while those live. Nobody is their own, but
		// they were read one after the other.
		for at, steps := st, 0; !ok && at.parent > 1 && steps < len(stats); steps++ {
			at = stats[at.parent]
			id, ok = leaders[at.session]
		}
		if ok {
			use := found[id]
			use.CPUTime += st.cpu
			use.Memory += resident(pid)
			found[id] = use
		}
	}
}

// cpuTime is what the group's members, those that have ended included, have used since it was made; false where it doesn't tell.
func (g group) cpuTime() (time.Duration, bool) {
	if g.unified != "" {
		n, ok := number(filepath.Join(g.unified, "cpu.stat"), "usage_usec")
		return time.Duration(n) * time.Microsecond, ok
	}
	n, ok := number(filepath.Join(g.cpuacct, "cpuacct.usage"), "")
	return time.Duration(n), ok && g.cpuacct != ""
}

// resident is a process's resident memory in bytes; 0 where it is gone.
func resident(pid int) uint64 {
	data, err := read("/proc/" + strconv.Itoa(pid) + "/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(data))
	if len(fields) < 2 {
		return 0
	}
	pages, _ := strconv.ParseUint(fields[1], 10, 64)
	return pages * uint64(os.Getpagesize())
}

// openFiles counts a process's descriptors; 0 where they aren't this process's to see.
func openFiles(pid int) int {
	dir := "/proc/" + strconv.Itoa(pid) + "/fd"
	var st unix.Stat_t
	if unix.Stat(dir, &st) == nil && st.Size > 0 { // the count, since Linux 6.2
		return int(st.Size)
	}
	f, err := os.Open(dir)
	if err != nil {
		return 0
	}
	defer f.Close()
	names, _ := f.Readdirnames(-1) // as far as it goes: the process may end meanwhile
	return len(names)
}
