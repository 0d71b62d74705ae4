package nodes

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

func makeDir(t *testing.T, path string) string {
	t.Helper()
	if err := os.MkdirAll(path, 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func link(t *testing.T, to, from string) {
	t.Helper()
	if err := os.Symlink(to, from); err != nil {
		t.Fatal(err)
	}
}

// However a place is called, it belongs to one node.
func TestPlacesAreKnownByAllTheirNames(t *testing.T) {
	m := newManager(t)
	root := t.TempDir()
	makeDir(t, filepath.Join(root, "real"))
	link(t, filepath.Join(root, "real"), filepath.Join(root, "link"))
	link(t, "link", filepath.Join(root, "link-to-link"))
	link(t, filepath.Join(root, "real", "taken"), filepath.Join(root, "straight"))
	first := mustSpawn(t, m, want("node-first", at(filepath.Join(root, "link", "taken"))))
	if is := filepath.Join(root, "real", "taken"); first.GetStoragePath() != is {
		t.Errorf("the node lies in %s, want %s", first.GetStoragePath(), is)
	}
	own := mustSpawn(t, m, want("node-own"))
	for _, c := range []struct {
		path  string
		taken bool
	}{
		{"real/taken", true},
		{"link/taken", true},
		{"link-to-link/taken", true},
		{"straight", true},
		{"straight/deep/within", true},
		{"real/taken/within", true},
		{"real", true},
		{"link", true},
		{"", true},
		{"real/taken2", false},
		{"real/take", false},
		{"link/beside/deep", false},
	} {
		id := "node-" + filepath.Base(c.path)
		n, err := m.Spawn(t.Context(), want(id, at(filepath.Join(root, c.path))))
		if !c.taken {
			if err != nil {
				t.Errorf("%s: %v", c.path, err)
			} else if _, err := m.Stop(t.Context(), n.GetNodeId()); err != nil {
				t.Error(err)
			}
			continue
		}
		expectReason(t, err, rpc.PathInUse)
		if e := rpc.AsError(err); e.Meta["node_id"] != first.GetNodeId() {
			t.Errorf("%s: refused for %s", c.path, e.Meta["node_id"])
		}
	}
	_, err := m.Spawn(t.Context(), want("node-x", at(filepath.Join(m.cfg.Dir, "data"))))
	expectReason(t, err, rpc.PathInUse)
	if e := rpc.AsError(err); e.Meta["node_id"] != own.GetNodeId() {
		t.Errorf("the folder around a node's own: refused for %s", e.Meta["node_id"])
	}
	if _, err := m.Stop(t.Context(), first.GetNodeId()); err != nil {
		t.Fatal(err)
	}
	mustSpawn(t, m, want("node-heir", at(filepath.Join(root, "straight"))))
}

func TestFailedSpawnIsUndone(t *testing.T) {
	for _, c := range []struct {
		name    string
		profile string
		// before makes what is there before, and returns the path to ask for.
		before func(t *testing.T, root string) string
		reason rpc.Reason
		// left is what is there afterwards, seen from root.
		left, gone []string
	}{
		{
			"died early, all new", "dying", func(_ *testing.T, root string) string { return filepath.Join(root, "a", "b", "c") },
			rpc.NodeDiedEarly, nil,
			[]string{"a"},
		},
		{"died early, beside others", "dying", func(t *testing.T, root string) string {
			makeDir(t, filepath.Join(root, "a", "other"))
			return filepath.Join(root, "a", "b", "c")
		}, rpc.NodeDiedEarly, []string{"a/other"}, []string{"a/b"}},
		{"died early, in a folder that was there", "dying", func(t *testing.T, root string) string {
			makeDir(t, filepath.Join(root, "a", "precious"))
			return filepath.Join(root, "a")
		}, rpc.NodeDiedEarly, []string{"a/precious", "a/leftover"}, nil},
		{
			"no binary", "missing", func(_ *testing.T, root string) string { return filepath.Join(root, "a", "b") },
			rpc.BinaryUnusable, nil,
			[]string{"a"},
		},
		{"a file in the way", "default", func(t *testing.T, root string) string {
			if err := os.WriteFile(filepath.Join(root, "file"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(root, "file", "a")
		}, rpc.PathUnusable, []string{"file"}, nil},
		{"a file in its place", "default", func(t *testing.T, root string) string {
			if err := os.WriteFile(filepath.Join(root, "file"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(root, "file")
		}, rpc.PathUnusable, []string{"file"}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newManager(t)
			root := t.TempDir()
			path := c.before(t, root)
			port := freePort(t)
			_, err := m.Spawn(t.Context(), want("node-1", as(c.profile), at(path), on(port)))
			expectReason(t, err, c.reason)
			for _, p := range c.left {
				if !exists(t, filepath.Join(root, p)) {
					t.Errorf("%s was there before and is gone", p)
				}
			}
			for _, p := range c.gone {
				if exists(t, filepath.Join(root, p)) {
					t.Errorf("%s was left behind", p)
				}
			}
			if exists(t, m.logPath("node-1")) {
				t.Error("the log was left behind")
			}
			if all := m.List(); len(all) > 0 {
				t.Errorf("nodes: %v", all)
			}
			// Port and place are free.
			if c.reason != rpc.PathUnusable {
				mustSpawn(t, m, want("node-2", at(path), on(port)))
			}
		})
	}
}

// A node that is wanted again, where it was by its own choice, is run there; nobody else is.
func TestOwnFolderLiesWithinTheHome(t *testing.T) {
	m := newManager(t, func(c *Config) {
		c.Dir = filepath.Join(c.Home, "agents", agentID)
		makeDir(t, c.Dir)
	})
	n := mustSpawn(t, m, want("node-1"))
	if _, err := m.Stop(t.Context(), "node-1"); err != nil {
		t.Fatal(err)
	}
	if again := mustSpawn(t, m, want("node-1", at(n.GetStoragePath()))); again.GetStoragePath() != n.GetStoragePath() {
		t.Errorf("it was in %s and is in %s", n.GetStoragePath(), again.GetStoragePath())
	}
	_, err := m.Spawn(t.Context(), want("node-2", at(n.GetStoragePath())))
	expectReason(t, err, rpc.InvalidArgument)
}

// A node that ran before keeps its data and its log when it can't be started again.
func TestFailedRespawnKeepsDataAndLog(t *testing.T) {
	m := newManager(t)
	data := filepath.Join(mustSpawn(t, m, want("node-1")).GetStoragePath(), "data")
	if err := os.WriteFile(data, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Stop(t.Context(), "node-1"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(m.logPath("node-1"), []byte("earlier\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, profile := range []string{"dying", "missing"} {
		if _, err := m.Spawn(t.Context(), want("node-1", as(profile))); err == nil {
			t.Errorf("profile %s: spawned", profile)
		}
		if !exists(t, data) || !exists(t, m.logPath("node-1")) {
			t.Errorf("profile %s: data or log is gone", profile)
		}
	}
}

// A spawn whose caller has given up leaves the reason and its files, which somebody may have used by then, and the
// same place can be had at once.
func TestUnobservedFailure(t *testing.T) {
	m := newManager(t, func(c *Config) {
		p := c.Profiles["slow"]
		p.StorageBinary, p.Args = "/bin/sh", []string{"-c", "while [ ! -e die ]; do sleep .01; done; exit 4"}
		c.Profiles["slow"] = p
	})
	path := filepath.Join(t.TempDir(), "place")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := m.Spawn(ctx, want("node-1", as("slow"), at(path)))
	expectReason(t, err, rpc.NotReadyYet)
	if e := rpc.AsError(err); e.Meta["node_id"] != "node-1" {
		t.Errorf("the error names %v", e.Meta)
	}
	if err := os.WriteFile(filepath.Join(path, "die"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if n := awaitPhase(t, m, "node-1", sutrav1.Phase_PHASE_FAILED); n.GetLastExit().GetCode() != 4 {
		t.Errorf("it failed as %v", n)
	}
	if !exists(t, filepath.Join(path, "die")) || !exists(t, m.logPath("node-1")) {
		t.Error("its files are gone")
	}
	mustSpawn(t, m, want("node-2", at(path)))
	_, err = m.Spawn(t.Context(), want("node-1", as("slow"), at(path)))
	expectReason(t, err, rpc.NodeDiedEarly)
	if !exists(t, path) {
		t.Error("the next node's folder is gone")
	}
}
