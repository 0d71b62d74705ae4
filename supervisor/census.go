package supervisor

import (
	"bytes"
	"os"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// census finds processes by what is asked for. Whoever asks while it looks through /proc shares the next look with all who
// do: a hundred units that stop at once cost little more than one. A look counts for those who asked before it began.
type census struct {
	// looking holds a token while a look is under way.
	looking chan struct{}

	mu   sync.Mutex // guards what follows
	next *look      // that hasn't begun; nil where nobody asks for one
}

// look is one look through /proc. What is found is there once done is closed.
type look struct {
	done chan struct{}
	// marks, logs and groups are the processes that have what was asked for: the mark in their environment, the log as their
	// output, and the process group, of which zombies don't count.
	marks, logs map[string][]int
	groups      map[int][]int
}

func newCensus() *census { return &census{looking: make(chan struct{}, 1)} }

// find returns a look that began after the call, in which a mark, the path of a log and a process group were looked for; what is empty
// wasn't. A nil census shares its look with nobody.
func (c *census) find(mark, log string, group int) *look {
	if c == nil {
		c = newCensus()
	}
	c.mu.Lock()
	first := c.next == nil
	if first {
		c.next = &look{done: make(chan struct{}), marks: map[string][]int{}, logs: map[string][]int{}, groups: map[int][]int{}}
	}
	l := c.next
	if mark != "" {
		l.marks[mark] = nil
	}
	if log != "" {
		l.logs[log] = nil
	}
	if group != 0 {
		l.groups[group] = nil
	}
	c.mu.Unlock()
	if first {
		c.looking <- struct{}{}
		c.mu.Lock()
		c.next = nil // from now on it is too late for this one
		c.mu.Unlock()
		l.run()
		<-c.looking
		close(l.done)
	}
	<-l.done
	return l
}

func (l *look) run() {
	for _, pid := range pids() {
		if len(l.groups) > 0 {
			group, err := unix.Getpgid(pid)
			if found, asked := l.groups[group]; err == nil && asked {
				if st, err := readStat(pid); err == nil && st.group == group && !st.zombie {
					l.groups[group] = append(found, pid)
				}
			}
		}
		if len(l.marks) > 0 {
			for entry := range bytes.SplitSeq(environ(pid), []byte{0}) {
				if found, asked := l.marks[string(entry)]; asked && !slices.Contains(found, pid) {
					l.marks[string(entry)] = append(found, pid)
				}
			}
		}
		if len(l.logs) > 0 {
			for _, path := range outputs(pid) {
				if found, asked := l.logs[path]; asked && !slices.Contains(found, pid) {
					l.logs[path] = append(found, pid)
				}
			}
		}
	}
}

// pids are those of all processes; without /proc there are none.
func pids() []int {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1) // as far as it goes
	var all []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			all = append(all, pid)
		}
	}
	return all
}

// environ is a process's environment; empty where it is gone, or another account's.
func environ(pid int) []byte {
	env, err := read("/proc/" + strconv.Itoa(pid) + "/environ")
	if err != nil {
		return nil
	}
	return env
}
