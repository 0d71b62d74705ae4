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
	"strings"
)

// Cgroups is where units get control groups of their own. The zero Cgroups makes none.
type Cgroups struct {
	// unified is the folder in the unified (v2) hierarchy under which a unit's group is made; empty where the host has no
	// such hierarchy or this process may not write to it. Hybrid hosts have one beside the old hierarchies.
	unified string
}

// group is one unit's control group; the zero group is none.
type group struct {
	unified string
}

// OpenCgroups finds the hierarchy and makes a folder of the given name in it, beneath the group that this process is in.
// Why says, for the log, what can't be done here; empty where all can. It is no error to run without.
func OpenCgroups(name string) (c Cgroups, why string) {
	const less = "processes that leave their session may escape a stop: "
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return c, less + err.Error()
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return c, less + err.Error()
	}
	at := unifiedGroup(mounts, own)
	if at == "" {
		return c, less + "there is no unified control group hierarchy"
	}
	dir := filepath.Join(at, name)
	if err := makeGroup(dir); err != nil {
		return c, less + err.Error()
	}
	return Cgroups{unified: dir}, ""
}

// unifiedGroup finds, from a process's mountinfo and cgroup files, the folder of its own group in the unified hierarchy;
// empty where there is none.
func unifiedGroup(mountinfo, own []byte) string {
	path, known := "", false
	for line := range bytes.Lines(own) {
		parts := strings.SplitN(strings.TrimSpace(string(line)), ":", 3)
		if len(parts) == 3 && parts[1] == "" {
			path, known = parts[2], true
		}
	}
	for line := range bytes.Lines(mountinfo) {
		fields := strings.Fields(string(line))
		dash := slices.Index(fields, "-")
		// Later mounts of the hierarchy are those of containers on this host.
		if dash < 6 || len(fields) < dash+4 || fields[dash+1] != "cgroup2" || !known {
			continue
		}
		root, at := fields[3], fields[4]
		// A container's mount shows only what lies beneath its root.
		// What is outside of this process's namespace begins with "/..".
		if rel, err := filepath.Rel(root, path); err == nil && !strings.HasPrefix(path, "/..") && rel != ".." && !strings.HasPrefix(rel, "../") {
			return filepath.Join(at, rel)
		}
		return at
	}
	return ""
}

func makeGroup(dir string) error {
	if err := os.Mkdir(dir, 0o750); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make control group: %w", err)
	}
	return nil
}

// Remove deletes the folder that OpenCgroups made. It fails while a unit's group is in it.
func (c Cgroups) Remove() error { return group(c).remove() }

// of names the group of a unit.
func (c Cgroups) of(id string) (g group) {
	if c.unified != "" {
		g.unified = filepath.Join(c.unified, id)
	}
	return g
}

// make makes the group, if it isn't there.
func (g group) make() error {
	if g.unified == "" {
		return nil
	}
	return makeGroup(g.unified)
}

// kill ends every process of the group; members that fork meanwhile are caught too.
func (g group) kill() error {
	err := os.WriteFile(filepath.Join(g.unified, "cgroup.kill"), []byte("1"), 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nobody is in a group that isn't
	}
	return err
}

// populated tells whether any process is left in the group or beneath it.
func (g group) populated() bool {
	data, err := os.ReadFile(filepath.Join(g.unified, "cgroup.events"))
	return err == nil && bytes.Contains(data, []byte("populated 1"))
}

// members are the pids in the group.
func (g group) members() []int {
	var pids []int
	data, _ := os.ReadFile(filepath.Join(g.unified, "cgroup.procs")) // none where the group is gone
	for field := range bytes.FieldsSeq(data) {
		if pid, err := strconv.Atoi(string(field)); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

// remove deletes the group. It fails while anybody is in it.
func (g group) remove() error {
	if g.unified == "" {
		return nil
	}
	if err := os.Remove(g.unified); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
