package nodes

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/rpc"
)

// needRoot is for tests that only root can run.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("SUTRA_TEST_NO_SKIP") != "" {
		t.Fatal("only root can run something as another user")
	}
	t.Skip("only root can run something as another user")
}

func stranger() *config.Account {
	return &config.Account{Name: "stranger", UID: 65533, GID: 65532, Groups: []uint32{65532}}
}

// strangers has each profile's nodes run as another user.
func strangers(c *Config) {
	for name, p := range c.Profiles {
		p.RunAs = stranger()
		c.Profiles[name] = p
	}
}

// openRoot is a folder that everybody can get to.
func openRoot(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{filepath.Dir(root), root} {
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func chmod(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func chown(t *testing.T, path string, uid int) {
	t.Helper()
	if err := os.Lchown(path, uid, uid); err != nil {
		t.Fatal(err)
	}
}

// owner is whose a file is, and how it may be used.
func owner(t *testing.T, path string) string {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%d:%d %04o", st.Uid, st.Gid, st.Mode&0o7777)
}

func TestAllowedPaths(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"data", "data2", "other", "disk"} {
		makeDir(t, filepath.Join(root, dir))
	}
	link(t, filepath.Join(root, "disk"), filepath.Join(root, "linked"))
	link(t, filepath.Join(root, "other"), filepath.Join(root, "data", "out"))
	link(t, filepath.Join(root, "data"), filepath.Join(root, "other", "in"))
	allow := func(names ...string) func(*Config) {
		return func(c *Config) {
			c.AllowedPaths = []string{}
			for _, name := range names {
				c.AllowedPaths = append(c.AllowedPaths, filepath.Join(root, name))
			}
		}
	}
	usual := newManager(t, allow("data", "linked", "not-there-yet"))
	for path, allowed := range map[string]bool{
		"data": true, "data/a/b": true, "other/in/c": true, "linked/a": true, "disk/b": true, "not-there-yet/a": true,
		"other": false, "data2": false, "data/out/a": false, "dat": false, "": true,
	} {
		asked := ""
		if path != "" {
			asked = filepath.Join(root, path)
		}
		n, err := usual.Spawn(t.Context(), want("node-1", at(asked)))
		if !allowed {
			expectReason(t, err, rpc.PathUnusable)
			if said := rpc.AsError(err); !strings.Contains(said.Message, asked) || !strings.Contains(said.Message, "isn't within allowed_paths of agent "+agentID) ||
				!strings.Contains(said.Hint, filepath.Join(root, "data")+" or ") {
				t.Errorf("%s: %s; %s", path, said.Message, said.Hint)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", path, err)
		} else if _, err := usual.Stop(t.Context(), n.GetNodeId()); err != nil {
			t.Error(err)
		}
	}
	if exists(t, filepath.Join(root, "other", "a")) || exists(t, filepath.Join(root, "dat")) {
		t.Error("a refused place was made")
	}

	none := newManager(t, allow())
	_, err := none.Spawn(t.Context(), want("node-1", at(filepath.Join(root, "data"))))
	expectReason(t, err, rpc.PathUnusable)
	own := mustSpawn(t, none, want("node-1"))
	if _, err := none.Stop(t.Context(), "node-1"); err != nil {
		t.Fatal(err)
	}
	mustSpawn(t, none, want("node-1", at(own.GetStoragePath())))
}

// Where paths are allowed by the file, nobody who isn't trusted may be able to turn one elsewhere later.
func TestWayIsGuarded(t *testing.T) {
	needRoot(t)
	root := openRoot(t)
	m := newManager(t, func(c *Config) { c.AllowedPaths = []string{root} })
	theirs := newManager(t, strangers, func(c *Config) { c.AllowedPaths = []string{root} })
	free := newManager(t)
	place := func(name string, uid int, mode os.FileMode) string {
		path := makeDir(t, filepath.Join(root, name))
		chown(t, path, uid)
		chmod(t, path, mode)
		return path
	}
	makeDir(t, place("foreign/x", 0, 0o755))
	chown(t, filepath.Join(root, "foreign"), 65530)
	makeDir(t, place("sticky/mallory", 65530, 0o700))
	chmod(t, filepath.Join(root, "sticky"), 0o777|os.ModeSticky)
	for _, c := range []struct {
		m    *Manager
		path string
		says string
	}{
		{m, place("plain", 0, 0o755) + "/a", ""},
		{m, place("foreign-last", 65530, 0o700), ""},
		{m, place("grouped-last", 0, 0o770), ""},
		{m, place("grouped", 0, 0o775) + "/a", "grouped: others than its owner may change it (mode 0775)"},
		{m, place("open", 0, 0o757) + "/a", "open: others than its owner may change it (mode 0757)"},
		{m, root + "/foreign/x/a", "foreign: it belongs to the user 65530"},
		{m, root + "/sticky/a", ""},
		{m, root + "/sticky/mallory", "can't be used: it belongs to the user 65530"},
		{m, place("node's", 65533, 0o755) + "/a", "node's: it belongs to the user 65533"},
		{theirs, root + "/node's/b", ""},
		{theirs, root + "/grouped/b", "grouped: others than its owner may change it"},
		{free, root + "/grouped/c", ""},
		{free, root + "/foreign/x/c", ""},
	} {
		_, err := c.m.Spawn(t.Context(), want("node-1", at(c.path)))
		if c.says == "" {
			if err != nil {
				t.Errorf("%s: %v", c.path, err)
			} else if _, err := c.m.Stop(t.Context(), "node-1"); err != nil {
				t.Error(err)
			}
			continue
		}
		expectReason(t, err, rpc.PathUnusable)
		if !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v; want that %s", c.path, err, c.says)
		}
		if strings.HasSuffix(c.path, "/a") && exists(t, c.path) {
			t.Errorf("%s was made and left", c.path)
		}
	}
}

// While somebody turns a part of the path elsewhere and back, again and again, nodes run where they may or not at all.
func TestNodesDoNotFollowASwappedLink(t *testing.T) {
	root := t.TempDir()
	allowed, outside := makeDir(t, filepath.Join(root, "allowed")), makeDir(t, filepath.Join(root, "outside"))
	makeDir(t, filepath.Join(allowed, "x"))
	link(t, outside, filepath.Join(allowed, "y"))
	m := newManager(t, func(c *Config) {
		c.AllowedPaths = []string{allowed}
		p := c.Profiles["default"]
		p.StorageBinary, p.Args = "/bin/sh", []string{"-c", "echo >here; exec sleep 100000"}
		c.Profiles["default"] = p
	})
	over := make(chan struct{})
	var swapper sync.WaitGroup
	swapper.Go(func() {
		for {
			select {
			case <-over:
				return
			default:
			}
			// In one step, so that there always is one or the other.
			if err := unix.Renameat2(unix.AT_FDCWD, filepath.Join(allowed, "x"), unix.AT_FDCWD, filepath.Join(allowed, "y"), unix.RENAME_EXCHANGE); err != nil {
				t.Error(err)
				return
			}
		}
	})
	spawned, refused := 0, 0
	for i := 0; i < 4000 && (spawned < 15 || refused < 15); i++ {
		id := fmt.Sprintf("node-%d", i)
		_, err := m.Spawn(t.Context(), want(id, at(filepath.Join(allowed, "x", id))))
		switch rpc.ReasonOf(err) {
		case "":
			spawned++
			if _, err := m.Stop(t.Context(), id); err != nil {
				t.Error(err)
			}
		case rpc.PathUnusable:
			refused++
		default:
			t.Errorf("%v", err)
		}
	}
	close(over)
	swapper.Wait()
	if spawned < 15 || refused < 15 {
		t.Errorf("%d were spawned and %d refused: there was no race", spawned, refused)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside there are %v (%v)", left, err)
	}
}

// What an agent makes for another user's node is that user's, and what lies around it isn't.
func TestStorageOfAnotherUser(t *testing.T) {
	needRoot(t)
	root := openRoot(t)
	m := newManager(t, strangers, func(c *Config) {
		c.Home = openRoot(t)
		c.Dir = filepath.Join(c.Home, "agents", agentID)
		makeDir(t, c.Dir)
		p := c.Profiles["default"]
		p.StorageBinary, p.Args = "/bin/sh", []string{"-c", `id -u >"$HOME/who"; exec sleep 100000`}
		p.Ready = config.Ready{Kind: "exec", Arg: `test "$(cat who)$(id -u)" = 6553365533`}
		c.Profiles["default"] = p
	})
	theirs := "65533:65532 0700"
	own := mustSpawn(t, m, want("node-own"))
	chosen := mustSpawn(t, m, want("node-chosen", at(filepath.Join(root, "a", "b", "c"))))
	for path, is := range map[string]string{
		own.GetStoragePath(): theirs, chosen.GetStoragePath(): theirs, filepath.Join(root, "a"): "0:0 0711", filepath.Join(root, "a", "b"): "0:0 0711",
		filepath.Join(chosen.GetStoragePath(), "who"): "65533:65532 0644", m.logPath("node-own"): "0:0 0600", m.cfg.Dir: "0:0 0711",
		filepath.Join(m.cfg.Dir, "data"): "0:0 0711", filepath.Join(m.cfg.Home, "agents"): "0:0 0711", filepath.Join(m.cfg.Dir, "wanted"): "0:0 0700",
	} {
		if got := owner(t, path); got != is {
			t.Errorf("%s is %s, want %s", path, got, is)
		}
	}
	var usage uint64
	await(t, "its disk to be counted", func() error {
		var ok bool
		if usage, ok = diskUse(t.Context(), own.GetStoragePath(), &pace{}); !ok || usage == 0 {
			return fmt.Errorf("%d bytes", usage)
		}
		return nil
	})
	for _, id := range []string{"node-own", "node-chosen"} {
		if _, err := m.Stop(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}

	// What was there keeps its owner, and where that keeps the node out it is said.
	kept := makeDir(t, filepath.Join(root, "kept"))
	_, err := m.Spawn(t.Context(), want("node-1", at(kept)))
	expectReason(t, err, rpc.PathUnusable)
	if said := rpc.AsError(err); !strings.Contains(said.Message, "can't be used by stranger: permission denied") || !strings.Contains(said.Hint, "that stranger may get to") {
		t.Errorf("%s; %s", said.Message, said.Hint)
	}
	if got := owner(t, kept); got != "0:0 0700" {
		t.Errorf("it is %s now", got)
	}
	_, err = m.Spawn(t.Context(), want("node-1", at(filepath.Join(kept, "deep", "within"))))
	expectReason(t, err, rpc.PathUnusable)
	if !strings.Contains(err.Error(), filepath.Join(kept, "deep")+": permission denied") {
		t.Errorf("the way is barred: %v", err)
	}
	if exists(t, filepath.Join(kept, "deep")) {
		t.Error("what was made in vain is left")
	}
	// What failed is taken back, also where that is another user's.
	_, err = m.Spawn(t.Context(), want("node-1", as("dying"), at(filepath.Join(root, "dead", "deep"))))
	expectReason(t, err, rpc.NodeDiedEarly)
	if exists(t, filepath.Join(root, "dead")) {
		t.Error("a failed spawn left its folder")
	}
}

// A binary that the node's user may not execute is told of before anything is made.
func TestBinaryOfAnotherUser(t *testing.T) {
	needRoot(t)
	secret := filepath.Join(openRoot(t), "server")
	if err := os.WriteFile(secret, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	hidden := filepath.Join(makeDir(t, filepath.Join(t.TempDir(), "hidden")), "server")
	m := newManager(t, strangers, func(c *Config) {
		for name, binary := range map[string]string{"default": "", "slow": secret} {
			p := c.Profiles[name]
			p.StorageBinary = binary
			c.Profiles[name] = p
		}
		c.Builtin = hidden
	})
	for profile, words := range map[string][]string{
		"slow": {"server of profile slow", "isn't executable for stranger", "correct storage_binary"}, "default": {hidden, "can't be looked at: permission denied for stranger", "put sutra itself where that user may execute it"},
	} {
		_, err := m.Spawn(t.Context(), want("node-1", as(profile)))
		expectReason(t, err, rpc.BinaryUnusable)
		said := rpc.AsError(err)
		for _, word := range words {
			if !strings.Contains(said.Message+"; "+said.Hint, word) {
				t.Errorf("%s: %s; %s: want %q", profile, said.Message, said.Hint, word)
			}
		}
	}
}
