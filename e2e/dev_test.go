package e2e_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/sutra-grid/sutra/e2e/harness"
)

// A dev that is killed leaves its node and its temporary home to the next one, which clears both away and takes the
// node's port again. A home that another dev runs in is left alone.
func TestKilledDevIsClearedAway(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	node := regexp.MustCompile(`(?m)^  node +(\S+) at (\S+), pid (\d+)$`)
	homes := func() []string {
		found, err := filepath.Glob(filepath.Join(g.Dir, "sutra-dev-*"))
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	greeted := func(dev *harness.Process) []string {
		t.Helper()
		said(t, dev, "Ctrl-C stops all of it.")
		return node.FindStringSubmatch(string(dev.Log()))
	}
	first := g.Launch("first", "dev")
	was, old := greeted(first), homes()
	if len(was) != 4 || len(old) != 1 {
		t.Fatalf("dev runs %q in %q", was, old)
	}
	first.Kill()
	if len(g.NodeProcesses()) == 0 {
		t.Fatal("the node ended with its dev: this test shows nothing")
	}

	second := g.Launch("second", "dev")
	is := greeted(second)
	if log := string(second.Log()); strings.Count(log, "cleared away") != 1 || !strings.Contains(log, "left in "+old[0]+"\n") {
		t.Errorf("the second dev says:\n%s", log)
	}
	if is[1] == was[1] {
		t.Errorf("the first dev's node was %q, the second's is %q", was[1:], is[1:])
	}
	if is[2] != was[2] {
		// Only another one on this host may have taken the port meanwhile.
		if l, err := net.Listen("tcp", was[2]); err == nil {
			_ = l.Close()
			t.Errorf("port of %s is free, and the second dev's node is at %s", was[2], is[2])
		}
	}
	if now := homes(); len(now) != 1 || now[0] == old[0] {
		t.Errorf("the home was %q, and then there are %q", old, now)
	}
	harness.Await(t, "the first dev's node to be gone", func() error {
		if _, err := os.Stat("/proc/" + was[3]); !errors.Is(err, os.ErrNotExist) {
			return errors.New("process " + was[3] + " is there")
		}
		return nil
	})
	third := g.Launch("third", "dev")
	greeted(third)
	if strings.Contains(string(third.Log()), "cleared away") || len(homes()) != 2 {
		t.Errorf("the third dev says:\n%s", third.Log())
	}
	third.Stop()
	second.Stop()
	if left := homes(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}
