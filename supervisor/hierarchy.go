package supervisor

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// leaf is the group beneath its own that an agent moves to, where processes and controllers can't be in one. systemd, from
// version 254 on, starts it there where a unit says DelegateSubgroup=agent.
const leaf = "agent"

// OpenCgroups finds what the host has and makes a folder of the given name in each hierarchy that is of use: at the top of
// the unified one, where this process may, else beneath the group that it is in. To hand controllers down from there it
// moves to a group of its own, where no other process is in its present one. lacking says, for the log, what can't be done
// here, why and what helps. It is no error to run without.
func OpenCgroups(name string) (c Cgroups, lacking []string) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		mounts = nil // then no hierarchy is found
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		own = nil
	}
	return openCgroups(mounts, own, name)
}

// openCgroups is OpenCgroups for a process's mountinfo and cgroup files.
func openCgroups(mounts, own []byte, name string) (c Cgroups, lacking []string) {
	noGroup := errors.New("the host has no hierarchy of control groups for that")
	var missing map[string]error
	if h := findHierarchy(mounts, own, ""); h.group != "" {
		var wanted []string // what no v1 hierarchy has
		for _, controller := range []string{"memory", "cpu"} {
			if findHierarchy(mounts, own, controller).group == "" {
				wanted = append(wanted, controller)
			}
		}
		c.unified, missing, noGroup = h.open(name, wanted)
	}
	give := func(controller string, dir *string) (why error) {
		switch h := findHierarchy(mounts, own, controller); {
		case h.group != "":
			*dir, why = h.openOld(name)
		case c.unified == "":
			why = noGroup
		case missing[controller] != nil:
			why = missing[controller]
		default:
			*dir = c.unified
		}
		return why
	}
	noMemory, noCPU := give("memory", &c.memory), give("cpu", &c.cpu)
	if c.unified == "" {
		noGroup = give("freezer", &c.freezer)
		_ = give("cpuacct", &c.cpuacct) // without it, what is used is added up from /proc
	}

	helps, orDelegate := "; run the agent as root", ", or as a systemd service with Delegate=yes"
	if os.Geteuid() == 0 {
		helps, orDelegate = "; root could, where the kernel has that controller and /sys/fs/cgroup is mounted to be written to", ""
	}
	if !group(c).exists() {
		lacking = append(lacking, fmt.Sprintf("processes that leave their session may escape a stop: %v%s%s", noGroup, helps, orDelegate))
	}
	switch {
	case c.memory == "" && c.cpu == "":
		lacking = append(lacking, fmt.Sprintf("memory limits and cpu weights aren't enforced: %v%s", noMemory, helps))
	case c.memory == "":
		lacking = append(lacking, fmt.Sprintf("memory limits aren't enforced: %v%s", noMemory, helps))
	case c.cpu == "":
		lacking = append(lacking, fmt.Sprintf("cpu weights aren't enforced: %v%s", noCPU, helps))
	}
	return c, lacking
}

// hierarchy is where a process is in one hierarchy.
type hierarchy struct {
	// top is where the hierarchy is mounted, and group the folder of the process's own group in it; empty where there is none.
	top, group string
}

// findHierarchy finds, from a process's mountinfo and cgroup files, the v1 hierarchy that has a controller; "" stands
// for the unified one.
func findHierarchy(mountinfo, own []byte, controller string) hierarchy {
	path, known := "", false
	for line := range bytes.Lines(own) {
		parts := strings.SplitN(strings.TrimSpace(string(line)), ":", 3)
		if len(parts) == 3 && slices.Contains(strings.Split(parts[1], ","), controller) {
			path, known = parts[2], true
		}
	}
	for line := range bytes.Lines(mountinfo) {
		fields := strings.Fields(string(line))
		dash := slices.Index(fields, "-")
		if dash < 6 || len(fields) < dash+4 || !known {
			continue
		}
		// Later mounts of the hierarchy are those of containers on this host.
		switch kind, options := fields[dash+1], strings.Split(fields[dash+3], ","); {
		case controller == "" && kind == "cgroup2":
		case controller != "" && kind == "cgroup" && slices.Contains(options, controller):
		default:
			continue
		}
		root, at := fields[3], fields[4]
		// A container's mount shows only what lies beneath its root.
		// What is outside of this process's namespace begins with "/..".
		if rel, err := filepath.Rel(root, path); err == nil && !strings.HasPrefix(path, "/..") && rel != ".." && !strings.HasPrefix(rel, "../") {
			return hierarchy{top: at, group: filepath.Join(at, rel)}
		}
		return hierarchy{top: at, group: at}
	}
	return hierarchy{}
}

// open makes a folder in the unified hierarchy, whose groups have the wanted controllers; missing says of each why they
// haven't. At the top nobody is in the way, neither other processes nor a service manager.
func (h hierarchy) open(name string, wanted []string) (folder string, missing map[string]error, err error) {
	if folder, missing, err = h.openIn(h.top, name, wanted); err == nil && len(missing) == 0 {
		return folder, nil, nil
	}
	if err == nil {
		_ = removeGroup(folder) // it was made in vain, unless units are in it
	}
	base := h.group
	if filepath.Base(base) == leaf && base != h.top {
		base = filepath.Dir(base)
	}
	return h.openIn(base, name, wanted)
}

func (h hierarchy) openIn(base, name string, wanted []string) (folder string, missing map[string]error, err error) {
	folder, missing = filepath.Join(base, name), map[string]error{}
	if err := makeGroup(folder); err != nil {
		return "", nil, err
	}
	for _, controller := range wanted {
		var why error
		if base == h.group && strings.HasSuffix(base, ".service") {
			// The kernel lets no process into a group that hands controllers down: the next agent's would be refused.
			why = fmt.Errorf("while nodes ran with them in %s, systemd before version 254 couldn't start the service again", base)
		} else if why = handDown(base, base == h.group, controller); why == nil {
			why = enable(folder, controller)
		}
		if why != nil {
			missing[controller] = why
		}
	}
	return folder, missing, nil
}

// handDown has the groups in a group get a controller. inside tells that this process is in it itself: it leaves, because
// no group but the root has both processes and groups with controllers.
func handDown(base string, inside bool, controller string) error {
	if has(filepath.Join(base, "cgroup.subtree_control"), controller) {
		return nil
	}
	if !has(filepath.Join(base, "cgroup.controllers"), controller) {
		return fmt.Errorf("control group %s isn't given the %s controller", base, controller)
	}
	// The root group has no such file.
	if inside && isThere(filepath.Join(base, "cgroup.events")) {
		if slices.ContainsFunc(pidsIn(base), func(pid int) bool { return pid != os.Getpid() }) {
			return fmt.Errorf("control group %s has processes beside this one", base)
		}
		to := filepath.Join(base, leaf)
		if err := makeGroup(to); err != nil {
			return err
		}
		if err := write(filepath.Join(to, "cgroup.procs"), "0"); err != nil {
			return fmt.Errorf("move to a control group of its own: %w", err)
		}
	}
	return enable(base, controller)
}

// enable has the groups in a group get a controller.
func enable(dir, controller string) error {
	file := filepath.Join(dir, "cgroup.subtree_control")
	if has(file, controller) {
		return nil
	}
	if err := write(file, "+"+controller); err != nil {
		return fmt.Errorf("hand down the %s controller: %w", controller, err)
	}
	return nil
}

// has tells whether a word is in a file.
func has(file, word string) bool {
	data, err := os.ReadFile(file)
	return err == nil && slices.Contains(strings.Fields(string(data)), word)
}

// openOld makes a folder in a v1 hierarchy. One that a thread can't go to and come back from is of no use.
func (h hierarchy) openOld(name string) (folder string, err error) {
	folder = filepath.Join(h.group, name)
	if err := makeGroup(folder); err != nil {
		return "", err
	}
	if err := visit([]string{folder}, []string{h.group}, false, func() error { return nil }); err != nil {
		_ = removeGroup(folder) // it was made in vain
		return "", err
	}
	return folder, nil
}
