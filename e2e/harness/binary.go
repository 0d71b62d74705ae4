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

// buildOnce builds the binary that all tests of a package share. The folder is removed by Main.
var buildOnce = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "sutra-e2e-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "sutra")
	return path, build(path)
})

func build(path string, args ...string) error {
	args = append([]string{"build", "-o", path}, args...)
	if raceEnabled {
		args = append(args, "-race")
	}
	cmd := exec.CommandContext(context.Background(), "go", append(args, "github.com/sutra-grid/sutra")...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build sutra: %w\n%s", err, out)
	}
	return nil
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

// Main runs a package's tests, clears the binary away and returns the exit code.
func Main(m *testing.M) int {
	code := m.Run()
	if path, err := buildOnce(); err == nil {
		_ = os.RemoveAll(filepath.Dir(path)) // a leftover in the temporary folder harms nobody
	}
	return code
}
