package supervisor

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestFindHierarchy(t *testing.T) {
	const v1 = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n" +
		"36 31 0:33 / /sys/fs/cgroup/cpu,cpuacct rw shared:1 master:2 - cgroup cgroup rw,cpu,cpuacct\n"
	const hybrid = v1 + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
	const inHybrid = "9:name=systemd:/init\n4:memory:/user/a\n1:cpu,cpuacct:/\n0::/b\n"
	for name, test := range map[string]struct {
		mounts, own, controller, want string
	}{
		"v2": {
			"24 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n",
			"0::/system.slice/sutra.service\n", "", "/sys/fs/cgroup/system.slice/sutra.service",
		},
		"v2, v1 wanted":                    {"30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,memory\n", "0::/\n", "memory", ""},
		"hybrid":                           {hybrid, inHybrid, "", "/sys/fs/cgroup/unified/b"},
		"hybrid, memory":                   {hybrid, inHybrid, "memory", "/sys/fs/cgroup/memory/user/a"},
		"hybrid, cpu with another":         {hybrid, inHybrid, "cpu", "/sys/fs/cgroup/cpu,cpuacct"},
		"hybrid, a controller that is off": {hybrid, inHybrid, "freezer", ""},
		"v1":                               {v1, inHybrid, "", ""},
		"v1, memory with another":          {"35 31 0:32 / /m rw - cgroup cgroup rw,hugetlb,memory\n", "4:hugetlb,memory:/x\n", "memory", "/m/x"},
		"v1 without memory":                {"35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memorial\n", "4:memorial:/\n", "memory", ""},
		"container, bind-mounted root": {
			"30 24 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n", "4:memory:/docker/abc/x\n0::/docker/abc\n", "", "/sys/fs/cgroup",
		},
		"container, bind-mounted v1 root": {
			"35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n", "4:memory:/docker/abc/x\n", "memory", "/sys/fs/cgroup/memory/x",
		},
		"container with a namespace, mounted from outside": {
			"30 24 0:26 /../.. /sys/fs/cgroup rw - cgroup2 cgroup rw\n", "0::/\n", "", "/sys/fs/cgroup",
		},
		"a group outside of the namespace": {"30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw\n", "0::/../other\n", "", "/sys/fs/cgroup"},
		"a group beside the mount's root":  {"30 24 0:26 /docker/abc /cg rw - cgroup2 cgroup rw\n", "0::/docker/abcdef\n", "", "/cg"},
		"a host with a container's mounts too": {
			"30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n99 24 0:26 /docker/abc /run/abc/rootfs/sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
			"0::/a\n", "", "/sys/fs/cgroup/a",
		},
		"a group with a colon":  {"30 24 0:26 / /cg rw - cgroup2 cgroup rw\n", "0::/a:b\n", "", "/cg/a:b"},
		"not told of the group": {"30 24 0:26 / /cg rw - cgroup2 cgroup rw\n", "", "", ""},
		"no line end":           {"30 24 0:26 / /cg rw - cgroup2 cgroup rw", "0::/", "", "/cg"},
		"garbage":               {"- - -\n1 2 3\n\n30 24 0:26 / /cg rw - cgroup2\n1 2 3 4 5 6 7 8 9\n", "::\nx\n0:\n", "", ""},
		"nothing":               {},
	} {
		t.Run(name, func(t *testing.T) {
			if got := findHierarchy([]byte(test.mounts), []byte(test.own), test.controller); got.group != test.want || (got.top == "") != (test.want == "") {
				t.Errorf("got %+v, want %q", got, test.want)
			}
		})
	}
}

func FuzzFindHierarchy(f *testing.F) {
	f.Add([]byte("30 24 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"), []byte("0::/a\n"), "")
	f.Add([]byte("35 31 0:32 /x /m rw - cgroup cgroup rw,memory"), []byte("4:memory,cpu:/x/../y\n"), "memory")
	f.Fuzz(func(t *testing.T, mounts, own []byte, controller string) {
		h := findHierarchy(mounts, own, controller)
		if h.group == "" {
			return
		}
		within := false
		for field := range strings.FieldsSeq(string(mounts)) {
			within = within || strings.HasPrefix(h.group, filepath.Clean(field)) || filepath.Clean(field) == "."
		}
		if !within {
			t.Errorf("%q is beneath no mount of %q", h.group, mounts)
		}
	})
}

// tree is a made-up unified hierarchy: files that keep what was written last, without a kernel behind them.
type tree struct {
	t   *testing.T
	top string
}

// group makes a group with the files that the kernel gives it.
func (tr tree) group(path, controllers, enabled string, pids ...int) string {
	tr.t.Helper()
	dir := filepath.Join(tr.top, path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		tr.t.Fatal(err)
	}
	var procs strings.Builder
	for _, pid := range pids {
		procs.WriteString(strconv.Itoa(pid) + "\n")
	}
	files := map[string]string{"cgroup.controllers": controllers, "cgroup.subtree_control": enabled, "cgroup.procs": procs.String()}
	if path != "" {
		files["cgroup.events"] = "populated 1\n"
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			tr.t.Fatal(err)
		}
	}
	return dir
}

func (tr tree) read(path string) string {
	data, err := os.ReadFile(filepath.Join(tr.top, path))
	if err != nil {
		return err.Error()
	}
	return string(data)
}

func (tr tree) open(own string) (Cgroups, []string) {
	return openCgroups([]byte("30 24 0:26 / "+tr.top+" rw - cgroup2 cgroup2 rw\n"), []byte("0::"+own+"\n"), "sutra-x")
}

// Controllers come to the units' groups, where the agent's own group lets it hand them down.
func TestControllersAreHandedDown(t *testing.T) {
	self := os.Getpid()
	for name, test := range map[string]struct {
		make    func(tree)
		own     string
		folder  string // of the units
		limits  bool
		moved   string // the group that this process moved to
		lacking string
	}{
		"alone in a delegated group": {
			make: func(tr tree) {
				tr.group("/s.scope", "cpu memory pids", "", self)
				tr.group("/s.scope/agent", "", "")
				tr.group("/s.scope/sutra-x", "cpu memory", "")
			},
			own: "/s.scope", folder: "/s.scope/sutra-x", limits: true, moved: "/s.scope/agent",
		},
		"in the leaf of a delegated group": {
			make: func(tr tree) {
				tr.group("/s.scope", "cpu memory pids", "")
				tr.group("/s.scope/agent", "", "", self)
				tr.group("/s.scope/sutra-x", "cpu memory", "")
			},
			own: "/s.scope/agent", folder: "/s.scope/sutra-x", limits: true,
		},
		"in a leaf with others": {
			make: func(tr tree) {
				tr.group("/s.scope", "cpu memory pids", "cpu memory")
				tr.group("/s.scope/agent", "cpu memory", "", self, 1)
				tr.group("/s.scope/sutra-x", "cpu memory", "cpu memory")
			},
			own: "/s.scope/agent", folder: "/s.scope/sutra-x", limits: true,
		},
		"with others in one group": {
			make: func(tr tree) {
				tr.group("/user", "cpu memory", "", self, 1)
				tr.group("/user/sutra-x", "", "")
			},
			own: "/user", folder: "/user/sutra-x", lacking: "/user has processes beside this one",
		},
		"a group without controllers": {
			make: func(tr tree) {
				tr.group("/user", "pids", "", self)
				tr.group("/user/sutra-x", "", "")
			},
			own: "/user", folder: "/user/sutra-x", lacking: "/user isn't given the memory controller",
		},
		"a service, which must be started again": {
			make: func(tr tree) {
				tr.group("/s.service", "cpu memory", "", self)
				tr.group("/s.service/sutra-x", "cpu memory", "")
			},
			own: "/s.service", folder: "/s.service/sutra-x", lacking: "/s.service, systemd before version 254 couldn't start the service again",
		},
		"a service that is started in its leaf": {
			make: func(tr tree) {
				tr.group("/s.service", "cpu memory", "")
				tr.group("/s.service/agent", "", "", self)
				tr.group("/s.service/sutra-x", "cpu memory", "")
			},
			own: "/s.service/agent", folder: "/s.service/sutra-x", limits: true,
		},
		"a service, and the top is open": {
			make: func(tr tree) {
				tr.group("/s.service", "cpu memory", "", self)
				tr.group("/sutra-x", "cpu memory", "")
			},
			own: "/s.service", folder: "/sutra-x", limits: true,
		},
		"a session, and the top is open": {
			make: func(tr tree) {
				tr.group("/user", "cpu memory", "", self, 1)
				tr.group("/sutra-x", "cpu memory", "")
			},
			own: "/user", folder: "/sutra-x", limits: true,
		},
		"the root, which may have both": {
			make: func(tr tree) {
				tr.group("", "cpu memory", "", self, 1)
				tr.group("/sutra-x", "cpu memory", "")
			},
			own: "/", folder: "/sutra-x", limits: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			tr := tree{t: t, top: t.TempDir()}
			tr.group("", "cpu memory pids", "")
			test.make(tr)
			c, lacking := tr.open(test.own)
			want := Cgroups{unified: filepath.Join(tr.top, test.folder)}
			if test.limits {
				want.memory, want.cpu = want.unified, want.unified
			}
			if c != want {
				t.Errorf("opened %+v, want %+v", c, want)
			}
			switch {
			case test.lacking == "" && len(lacking) > 0, test.lacking != "" && len(lacking) != 1:
				t.Errorf("lacking %q, want %q", lacking, test.lacking)
			case test.lacking != "":
				for _, part := range []string{"memory limits", "aren't enforced", test.lacking, "root"} {
					if !strings.Contains(lacking[0], part) {
						t.Errorf("lacking %q, want %q in it", lacking[0], part)
					}
				}
			}
			// What was written last is there: the cpu comes after the memory.
			for _, group := range []string{filepath.Dir(test.folder), test.folder} {
				got := tr.read(group + "/cgroup.subtree_control")
				if test.limits && got != "+cpu" && got != "cpu memory" || !test.limits && got != "" {
					t.Errorf("%s hands down %q", group, got)
				}
			}
			if got := tr.read("/s.scope/agent/cgroup.procs"); test.moved != "" && got != "0" {
				t.Errorf("the group of its own has %q", got)
			}
			if got := tr.read(test.own + "/cgroup.procs"); test.moved == "" && !strings.HasPrefix(got, strconv.Itoa(self)) {
				t.Errorf("this process's group was written to: %q", got)
			}
			if test.moved == "" && exists(filepath.Join(tr.top, test.own, "agent")) {
				t.Error("a group was made to move to")
			}
			if in := "/sutra-x"; in != test.folder && exists(filepath.Join(tr.top, in)) {
				t.Error("a group was made in vain at the top")
			}
		})
	}
}

// A session of a user often has the memory and not the cpu.
func TestOneControllerIsHandedDown(t *testing.T) {
	tr := tree{t: t, top: t.TempDir()}
	tr.group("/u", "memory pids", "", os.Getpid())
	tr.group("/u/agent", "", "")
	tr.group("/u/sutra-x", "memory", "")
	c, lacking := tr.open("/u")
	if c.memory != c.unified || c.unified == "" || c.cpu != "" {
		t.Errorf("opened %+v", c)
	}
	if len(lacking) != 1 || !strings.HasPrefix(lacking[0], "cpu weights aren't enforced: control group "+tr.top+"/u isn't given the cpu controller") {
		t.Errorf("lacking %q", lacking)
	}
	for _, group := range []string{"/u", "/u/sutra-x"} {
		if got := tr.read(group + "/cgroup.subtree_control"); got != "+memory" {
			t.Errorf("%s hands down %q", group, got)
		}
	}
}

// hidden is this process's mounts without the unified hierarchy.
func hidden(t *testing.T) (mounts, own []byte) {
	t.Helper()
	mounts, own, err := hide()
	if err != nil {
		t.Fatal(err)
	}
	return mounts, own
}

func hide() (mounts, own []byte, err error) {
	if mounts, err = os.ReadFile("/proc/self/mountinfo"); err != nil {
		return nil, nil, err
	}
	if own, err = os.ReadFile("/proc/self/cgroup"); err != nil {
		return nil, nil, err
	}
	lines := slices.Collect(bytes.Lines(mounts))
	lines = slices.DeleteFunc(lines, func(line []byte) bool { return bytes.Contains(line, []byte(" - cgroup2 ")) })
	return bytes.Join(lines, nil), own, nil
}
