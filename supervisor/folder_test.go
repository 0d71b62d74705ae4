package supervisor

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A process is started in the very folder that its spec names, and not where a symbolic link in its place leads.
func TestDirectoryIsNoLink(t *testing.T) {
	for _, name := range []string{"the last part", "a part before"} {
		t.Run(name, func(t *testing.T) {
			spec := commandSpec(t, "sh", "-c", "echo $(pwd -P); exit 3")
			root := spec.Dir
			spec.Dir = filepath.Join(root, "a", "b")
			if err := os.MkdirAll(spec.Dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if exit := runOnce(t, spec); strings.TrimSpace(exit.Output) != spec.Dir {
				t.Errorf("it ran in %q", exit.Output)
			}
			at := spec.Dir
			if name != "the last part" {
				at = filepath.Dir(at)
			}
			if err := os.Rename(at, at+"-moved"); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(at+"-moved", at); err != nil {
				t.Fatal(err)
			}
			before := descriptors(t)
			if p, err := start(&spec, ""); !errors.Is(err, unix.ENOTDIR) || !strings.Contains(err.Error(), "open "+at+": not a directory, or a symbolic link") {
				t.Errorf("started as %v; error %v", p, err)
			}
			if after := descriptors(t); after != before {
				t.Errorf("%d descriptors are open, and were %d", after, before)
			}
			noChildren(t)
		})
	}
}
