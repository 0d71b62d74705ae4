package supervisor

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// kin is everything that descends from a unit's process: it is found by its control group or, where there is
// none, by what all of it inherits: the mark in its environment, and the log that it writes to.
type kin struct {
	group     group
	mark, log string
	// ending are those that were found without a group, by their pids with their start ticks: one that ends loses its
	// environment a while before its ports and files.
	ending map[int]uint64
	census *census
}

func newKin(g group, s *Spec) kin {
	return kin{group: g, mark: s.Mark, log: s.LogPath, ending: map[int]uint64{}}
}

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
	return k.bears(pid)
}

// bears tells whether a process has what the kin's processes inherit. One may overwrite its environment, and another close
// its output: only what does both is lost sight of.
func (k kin) bears(pid int) bool {
	return marked(pid, k.mark) || k.log != "" && slices.Contains(outputs(pid), k.log)
}

// find returns the pids of what lives of it.
func (k kin) find() []int { return k.findWith(0) }

// findWith returns the pids of what lives of it or is in a process group; 0 is none.
func (k kin) findWith(pgrp int) (found []int) {
	var others []int
	if k.group.exists() {
		found = k.group.members()
		if pgrp != 0 {
			others = k.census.find("", "", pgrp).groups[pgrp]
		}
	} else {
		l := k.census.find(k.mark, k.log, pgrp)
		others = l.groups[pgrp]
		for _, pid := range slices.Concat(l.marks[k.mark], l.logs[k.log]) {
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
	}
	for _, pid := range others {
		if !slices.Contains(found, pid) {
			found = append(found, pid)
		}
	}
	return found
}

// left tells whether anything of it lives.
func (k kin) left() bool { return k.leftWith(0) }

// leftWith tells whether anything of it lives, or of a process group; 0 is none.
func (k kin) leftWith(pgrp int) bool {
	if k.group.exists() {
		return k.group.populated() || pgrp != 0 && len(k.census.find("", "", pgrp).groups[pgrp]) > 0
	}
	return len(k.findWith(pgrp)) > 0
}

// leader returns the process of it that a supervisor forked; nobody where that is gone, as far as what is left shows that.
func (k kin) leader(bootID string) Identity {
	members := map[int]stat{}
	for _, pid := range k.find() {
		if st, err := readStat(pid); err == nil && !st.zombie && pid != os.Getpid() { // a thread of it may be in a v1 group
			members[pid] = st
		}
	}
	pid := eldest(members)
	if pid == 0 {
		return Identity{}
	}
	return Identity{PID: pid, StartTicks: members[pid].startTicks, BootID: bootID}
}

// eldest returns the member that all others may descend from, and that is as a supervisor forks it: it leads a session and
// runs a program. Where the first one isn't, its ancestor is gone, and the others' with it. What is left of a unit may be a
// single daemon that looks just like a leader, and nothing the kernel shows tells it from one: it is taken for it.
func eldest(members map[int]stat) (first int) {
	mayLead := func(pid int) bool { st := members[pid]; return st.session == pid && !st.forked }
	for pid, st := range members {
		// Ticks are coarse: of two in one, the parent has the lower pid.
		if than := members[first]; first == 0 || st.startTicks < than.startTicks ||
			st.startTicks == than.startTicks && (mayLead(pid) && !mayLead(first) || mayLead(pid) == mayLead(first) && pid < first) {
			first = pid
		}
	}
	if first != 0 && !mayLead(first) {
		return 0
	}
	return first
}

// marked tells whether a process has the mark as an entry of its environment.
func marked(pid int, mark string) bool {
	if mark == "" {
		return false
	}
	for entry := range bytes.SplitSeq(environ(pid), []byte{0}) {
		if string(entry) == mark {
			return true
		}
	}
	return false
}

// removedSuffix is what the kernel has behind the path of an open file that was removed.
const removedSuffix = " (deleted)"

// outputs are the files that a process has as its stdout and stderr, or had before somebody removed them.
func outputs(pid int) (paths []string) {
	for _, path := range outputLinks(pid) {
		paths = append(paths, strings.TrimSuffix(path, removedSuffix))
	}
	return paths
}

func outputLinks(pid int) (links []string) {
	for _, fd := range []string{"1", "2"} {
		if path, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/fd/" + fd); err == nil {
			links = append(links, path)
		}
	}
	return links
}

// Lives tells whether processes of a unit run, whoever looks after them: in its control group, with its mark or with its log.
func Lives(c Cgroups, id, mark, log string) bool {
	k := newKin(c.of(id), &Spec{Mark: mark, LogPath: log})
	return k.left() || k.group.exists() && newKin(group{}, &Spec{Mark: mark, LogPath: log}).left()
}

// Living returns the ids of the units whose processes run, whoever looks after them: those with somebody in their control
// group, and those that a mark with the given beginning tells, or a log in the given folder.
func Living(c Cgroups, markPrefix, logs string) []string {
	found := map[string]bool{}
	if dir := group(c).at(); dir != "" {
		groups, _ := os.ReadDir(dir) // none where it is gone
		for _, g := range groups {
			if g.IsDir() && c.Populated(g.Name()) {
				found[g.Name()] = true
			}
		}
	}
	for _, pid := range pids() {
		for entry := range bytes.SplitSeq(environ(pid), []byte{0}) {
			if id, ok := strings.CutPrefix(string(entry), markPrefix); ok {
				found[id] = true
			}
		}
		for _, path := range outputs(pid) {
			if id, ok := strings.CutSuffix(filepath.Base(path), liveSuffix); ok && filepath.Dir(path) == logs {
				found[id] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}
