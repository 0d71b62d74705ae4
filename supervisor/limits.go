package supervisor

import (
	"bytes"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
)

// Limits are what a unit's processes may use. The zero Limits sets none.
type Limits struct {
	// Memory, in bytes, swap included, is for all processes of the unit together. It is enforced where the unit has a
	// control group with that controller; State.MemoryLimited says whether. 0: none.
	Memory uint64
	// CPUWeight is the unit's share of the processors where not all get what they want, from 1 to 10000; everything
	// else on the host has 100. It is left out where there is no such controller. 0: 100.
	CPUWeight int
	// OpenFiles is how many files each process may have open: the soft and the hard limit. 0: as this process. A program
	// with more rights than this process, set-user-id for example, doesn't get them where this is set.
	OpenFiles uint64
}

// ErrLimit is in the error of a start for which a limit couldn't be set.
var ErrLimit = errors.New("set limit")

// limit sets the limits of a group that nobody is in yet. It tells whether that of memory is in force.
func (g group) limit(l Limits) (memory bool) {
	if l.CPUWeight != 0 && g.cpu != "" {
		name, value := "cpu.weight", l.CPUWeight
		if g.cpu != g.unified {
			name, value = "cpu.shares", max(2, l.CPUWeight*1024/100) // of which the default is 1024
		}
		_ = write(filepath.Join(g.cpu, name), strconv.Itoa(value)) // a weight is a wish
	}
	if l.Memory == 0 || g.memory == "" {
		return false
	}
	value := strconv.FormatUint(l.Memory, 10)
	set := func(name, value string) error { return write(filepath.Join(g.memory, name), value) }
	if g.memory == g.unified {
		_ = set("memory.low", value) // wishes: older kernels haven't all
		_ = set("memory.oom.group", "1")
		return set("memory.max", value) == nil && ifThere(set("memory.swap.max", "0")) == nil
	}
	_ = set("memory.soft_limit_in_bytes", value)
	_ = set("memory.memsw.limit_in_bytes", "-1") // memory with swap can't be less than memory, which is unlimited yet
	return set("memory.limit_in_bytes", value) == nil && ifThere(set("memory.memsw.limit_in_bytes", value)) == nil
}

// ifThere forgives that there is no such limit: a kernel without swap has none of it.
func ifThere(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// limited tells whether a process is held to no more memory than this.
func (g group) limited(pid int, memory uint64) bool {
	if g.memory == "" || memory == 0 || !slices.Contains(pidsBeneath(g.memory), pid) {
		return false
	}
	name := "memory.max"
	if g.memory != g.unified {
		name = "memory.limit_in_bytes"
	}
	now, ok := number(filepath.Join(g.memory, name), "")
	return ok && now <= memory
}

// ooms are what a group, since it was made, has seen of want of memory.
type ooms struct {
	// kills counts the processes that the kernel killed for it.
	kills uint64
	// own: the group's own limit was reached. Else it was the host's memory that ran out.
	own bool
}

func (g group) ooms() (n ooms) {
	switch g.memory {
	case "":
	case g.unified:
		events := filepath.Join(g.memory, "memory.events")
		n.kills, _ = number(events, "oom_kill")
		limited, _ := number(events, "oom")
		n.own = limited > 0
	default:
		// There is a counter of failed charges, which kernels of late leave at 0. At the limit, what is left is less than
		// the largest piece that the kernel insists on.
		const piece = 256 << 10
		n.kills, _ = number(filepath.Join(g.memory, "memory.oom_control"), "oom_kill")
		limit, _ := number(filepath.Join(g.memory, "memory.limit_in_bytes"), "")
		most, _ := number(filepath.Join(g.memory, "memory.max_usage_in_bytes"), "")
		n.own = most+piece > limit
	}
	return n
}

// since tells whether somebody was killed since before because the group's own limit was reached.
func (n ooms) since(before ooms) bool { return n.kills > before.kills && n.own }

// number reads a number from one of the kernel's files: the one after a word that begins a line, or the file's only one.
func number(path, word string) (n uint64, ok bool) {
	data, err := read(path)
	if err != nil {
		return 0, false
	}
	for line := range bytes.Lines(data) {
		fields := bytes.Fields(line)
		if word != "" && len(fields) == 2 && string(fields[0]) == word {
			fields = fields[1:]
		}
		if len(fields) == 1 {
			n, err := strconv.ParseUint(string(fields[0]), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}
