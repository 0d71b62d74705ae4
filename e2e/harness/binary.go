// Package harness runs the real sutra binary: masters, agents and client verbs as
// processes of their own, each test in homes and on ports of its own.
package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

const modulePath = "github.com/sutra-grid/sutra"

// buildOnce builds the binary that all tests of a package share. The folder is removed by Main.
var buildOnce = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "sutra-e2e-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "sutra")
	return path, build(path)
})

var rogueOnce = sync.OnceValues(func() (string, error) { return buildBeside("rogue") })

func build(path string, args ...string) error {
	if raceEnabled {
		args = append(args, "-race")
	}
	return goBuild(path, append(args, modulePath)...)
}

func goBuild(path string, args ...string) error {
	cmd := exec.CommandContext(context.Background(), "go", append([]string{"build", "-o", path}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w\n%s", filepath.Base(path), err, out)
	}
	return nil
}

// buildBeside builds a command of the harness beside the sutra binary.
func buildBeside(name string) (string, error) {
	sutra, err := buildOnce()
	if err != nil {
		return "", err
	}
	path := filepath.Join(filepath.Dir(sutra), name)
	return path, goBuild(path, modulePath+"/e2e/harness/"+name)
}

// BuildVersion builds another binary from this tree, which calls itself by the version, and puts it at a path.
func BuildVersion(t testing.TB, path, version string) {
	t.Helper()
	if err := build(path, "-ldflags", "-X main.version="+version); err != nil {
		t.Fatal(err)
	}
}

// Binary returns the path of a sutra binary built from this tree, with the race detector where the tests have it.
func Binary(t testing.TB) string {
	t.Helper()
	path, err := buildOnce()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// Rogue puts the misbehaving server at a path; what it can do is said there.
func Rogue(t testing.TB, path string) {
	t.Helper()
	built, err := rogueOnce()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(built)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o700); err != nil { //nolint:gosec // it is to be run
		t.Fatal(err)
	}
}

// Main runs a package's tests, clears the binary away and returns the exit code.
func Main(m *testing.M) int {
	code := m.Run()
	if path, err := buildOnce(); err == nil {
		_ = os.RemoveAll(filepath.Dir(path)) // a leftover in the temporary folder harms nobody
	}
	return code
}
