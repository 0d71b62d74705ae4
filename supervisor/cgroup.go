package supervisor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroups is where units get control groups of their own: a folder in each hierarchy that is of use on this host, empty
// where there is none. The zero Cgroups makes no groups.
type Cgroups struct {
	// unified is in the v2 hierarchy; it holds a unit's processes together and kills them.
	unified string
	// memory and cpu are in the hierarchy that has the controller: a v1 hierarchy, else the same as unified.
	memory, cpu string
	// cpuacct and freezer are in v1 hierarchies, and empty beside a unified one, which does their work better.
	cpuacct, freezer string
}

// group is one unit's control group, in all hierarchies; the zero group is none.
type group Cgroups

// of names the group of a unit.
func (c Cgroups) of(id string) group {
	g := group(c)
	for _, dir := range []*string{&g.unified, &g.memory, &g.cpu, &g.cpuacct, &g.freezer} {
		if *dir != "" {
			*dir = filepath.Join(*dir, id)
		}
	}
	return g
}

// under names the group of a unit with limits. A v1 hierarchy takes its time to let a thread in and out: where the unit has
// the weight of everything else it needs none of that for the processors.
func (c Cgroups) under(id string, l Limits) group {
	g := c.of(id)
	if weighted := l.CPUWeight != 0 && l.CPUWeight != 100; !weighted && g.cpu != g.at() {
		g.cpu = ""
	}
	return g
}

// named are its folders by what each is for, as a record has them.
func (g *group) named() map[string]*string {
	return map[string]*string{"unified": &g.unified, "memory": &g.memory, "cpu": &g.cpu, "cpuacct": &g.cpuacct, "freezer": &g.freezer}
}

// recorded is the group for a unit's record.
func (g group) recorded() map[string]string {
	folders := map[string]string{}
	for name, dir := range g.named() {
		if *dir != "" {
			folders[name] = *dir
		}
	}
	return folders
}

// groupOnRecord is the group that a unit's record tells. What can't be that unit's is left out.
func groupOnRecord(folders map[string]string, id string) (g group) {
	for name, dir := range g.named() {
		if filepath.Base(folders[name]) == id {
			*dir = folders[name]
		}
	}
	return g
}

// Remove deletes the folders that OpenCgroups made, with what units left in them. It fails while a process is in one.
func (c Cgroups) Remove() error { return group(c).remove() }

// exists tells whether the group is one, in any hierarchy.
func (g group) exists() bool { return g != group{} }

// dirs are its folders, each once: hierarchies may have several controllers.
func (g group) dirs() []string {
	var dirs []string
	for _, dir := range []string{g.unified, g.freezer, g.memory, g.cpu, g.cpuacct} {
		if dir != "" && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// old are its folders in v1 hierarchies.
func (g group) old() []string {
	return slices.DeleteFunc(g.dirs(), func(dir string) bool { return dir == g.unified })
}

// at is the folder by which its members are known.
func (g group) at() string {
	if dirs := g.dirs(); len(dirs) > 0 {
		return dirs[0]
	}
	return ""
}

// make makes the group, where it isn't there, with the folder that it is to lie in: somebody may have removed an empty one.
func (g group) make() error {
	for _, dir := range g.dirs() {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return fmt.Errorf("make control group: %w", err)
		}
	}
	return nil
}

func makeGroup(dir string) error {
	if err := os.Mkdir(dir, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make control group: %w", err)
	}
	return nil
}

// kill ends every process of the group in the unified hierarchy; members that fork meanwhile are caught too.
func (g group) kill() error {
	err := write(filepath.Join(g.unified, "cgroup.kill"), "1")
	if errors.Is(err, fs.ErrNotExist) && !isThere(g.unified) {
		return nil // nobody is in a group that isn't
	}
	return err
}

// freeze keeps the members of a v1 group from forking while they are killed, as far as the kernel gets hold of them at
// once. They die when they are thawed.
func (g group) freeze() (thaw func()) {
	if g.freezer == "" {
		return func() {}
	}
	state := filepath.Join(g.freezer, "freezer.state")
	_ = write(state, "FROZEN") // without it, who kills goes on until nobody is left
	return func() { _ = write(state, "THAWED") }
}

// populated tells whether any process is left in the group or beneath it. What can't be read isn't empty.
func (g group) populated() bool {
	if g.unified == "" {
		return len(g.members()) > 0
	}
	data, err := os.ReadFile(filepath.Join(g.unified, "cgroup.events"))
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV)
	}
	return bytes.Contains(data, []byte("populated 1"))
}

// Populated tells whether any process is in a unit's group.
func (c Cgroups) Populated(id string) bool {
	g := c.of(id)
	return g.exists() && g.populated()
}

// members are the pids in the group and beneath it.
func (g group) members() []int { return pidsBeneath(g.at()) }

// pidsBeneath are the pids in the group of a folder, and in the groups that its members have made in it for what they run.
func pidsBeneath(dir string) []int {
	pids := pidsIn(dir)
	for _, sub := range subgroups(dir) {
		pids = append(pids, pidsBeneath(sub)...)
	}
	return pids
}

// subgroups are the folders in the folder of a group. Most have none, and then its count of links says so.
func subgroups(dir string) []string {
	var st unix.Stat_t
	if dir == "" || unix.Stat(dir, &st) != nil || st.Nlink <= 2 {
		return nil
	}
	entries, _ := os.ReadDir(dir) // gone: there are none
	var subs []string
	for _, e := range entries {
		if e.IsDir() {
			subs = append(subs, filepath.Join(dir, e.Name()))
		}
	}
	return subs
}

// pidsIn are the pids in the group of a folder; none where it is gone.
func pidsIn(dir string) []int {
	data, err := read(filepath.Join(dir, "cgroup.procs"))
	if dir == "" || err != nil {
		return nil
	}
	var pids []int
	for field := range bytes.FieldsSeq(data) {
		if pid, err := strconv.Atoi(string(field)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// remove deletes the group, with those beneath it. It fails while anybody is in one.
func (g group) remove() error {
	var errs []error
	for _, dir := range g.dirs() {
		if err := removeGroup(dir); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// abandon removes a group that is empty for good, and what it lies in where that is empty as well and holds nothing of now.
func (g group) abandon(now group) {
	_ = g.remove() // who is in it has no business there
	for _, dir := range g.dirs() {
		if !slices.ContainsFunc(now.dirs(), func(n string) bool { return filepath.Dir(n) == filepath.Dir(dir) }) {
			_ = unix.Rmdir(filepath.Dir(dir)) // the last of its units succeeds
		}
	}
}

// removeGroup removes one folder, and the groups in it before. A v1 group is busy for a moment after its last member has gone.
func removeGroup(dir string) error {
	const tries = 20
	for i := 0; ; i++ {
		err := unix.Rmdir(dir)
		switch {
		case err == nil, errors.Is(err, fs.ErrNotExist):
			return nil
		case !errors.Is(err, unix.EBUSY) || i == tries || len(pidsIn(dir)) > 0:
			return &fs.PathError{Op: "remove control group", Path: dir, Err: err}
		}
		if subs := subgroups(dir); len(subs) > 0 {
			for _, sub := range subs {
				if err := removeGroup(sub); err != nil {
					return err
				}
			}
			continue
		}
		time.Sleep(time.Millisecond)
	}
}

// write writes to one of the kernel's files, which must be there.
func write(path, value string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_TRUNC|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	_, err = unix.Write(fd, []byte(value))
	_ = unix.Close(fd) // the write has told
	if err != nil {
		return &fs.PathError{Op: "write " + value + " to", Path: path, Err: err}
	}
	return nil
}

// read is os.ReadFile at half the cost, for the kernel's small files that are read often.
func read(path string) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }() // nothing was written
	data := make([]byte, 0, 1024)
	for {
		n, err := unix.Read(fd, data[len(data):cap(data)])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return nil, &fs.PathError{Op: "read", Path: path, Err: err}
		case n == 0:
			return data, nil
		default:
			if data = data[:len(data)+n]; len(data) == cap(data) {
				data = slices.Grow(data, len(data))
			}
		}
	}
}

func isThere(path string) bool { return unix.Access(path, unix.F_OK) == nil }
