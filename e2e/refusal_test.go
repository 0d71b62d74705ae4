package e2e_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode"

	"github.com/sutra-grid/sutra/e2e/harness"
)

// failure is an error's JSON form.
type failure struct {
	Error struct {
		Reason, Message, Hint, Code string
		Metadata                    map[string]string
		Exit                        *struct {
			Code   int
			Output string
		}
	}
}

// refused runs a verb that is to fail, for people and as JSON: each time with the exit code and the reason. words are
// what must be said of what failed, why, and what to do next. It returns the JSON form.
func refused(t *testing.T, g *harness.Grid, code int, reason string, words []string, args ...string) failure {
	t.Helper()
	r := g.Run(args...)
	if r.Code != code {
		t.Errorf("sutra %q: exit code %d, want %d\n%s%s", args, r.Code, code, r.Stdout, r.Stderr)
	}
	if !strings.HasPrefix(r.Stderr, "error: ") || reason != "FAILED" && !strings.Contains(r.Stderr, "("+reason+")") {
		t.Errorf("sutra %q: want an error with reason %s, got:\n%s", args, reason, r.Stderr)
	}
	for _, w := range words {
		if !strings.Contains(r.Stderr, w) {
			t.Errorf("sutra %q doesn't say %q:\n%s", args, w, r.Stderr)
		}
	}
	plain(t, r.Stdout+r.Stderr)

	r = g.Run(append([]string{"-o", "json"}, args...)...)
	var f failure
	if err := json.Unmarshal([]byte(r.Stderr), &f); err != nil || strings.Count(r.Stderr, "\n") != 1 {
		t.Fatalf("sutra -o json %q: want one JSON line on stderr (%v), got:\n%s", args, err, r.Stderr)
	}
	if r.Code != code || f.Error.Reason != reason || f.Error.Message == "" || f.Error.Code == "" {
		t.Errorf("sutra -o json %q: exit code %d, want %d with reason %s:\n%s", args, r.Code, code, reason, r.Stderr)
	}
	if r.Stdout != "" {
		t.Errorf("sutra -o json %q wrote to stdout: %s", args, r.Stdout)
	}
	return f
}

// refusedAtStart runs a role that is to refuse its start. It logs in JSON, so that its error comes last and for people only.
func refusedAtStart(t *testing.T, g *harness.Grid, code int, words []string, args ...string) {
	t.Helper()
	r := g.Run(args...)
	at := strings.LastIndex("\n"+r.Stderr, "\nerror: ")
	if r.Code != code || at < 0 {
		t.Fatalf("sutra %q: exit code %d, want %d and an error\n%s", args, r.Code, code, r.Stderr)
	}
	for _, w := range words {
		if !strings.Contains(r.Stderr[at:], w) {
			t.Errorf("sutra %q doesn't say %q:\n%s", args, w, r.Stderr[at:])
		}
	}
}

// plain fails where text for a pipe has colour or another control character in it.
func plain(t *testing.T, text string) {
	t.Helper()
	if at := strings.IndexFunc(text, func(r rune) bool { return unicode.IsControl(r) && r != '\n' }); at >= 0 {
		t.Errorf("control character %q in:\n%s", text[at], text)
	}
}

// nothingLeft fails where a refused spawn left a record, a process, a folder or a log of a node.
func nothingLeft(t *testing.T, g *harness.Grid, agents ...string) {
	t.Helper()
	if left := g.Nodes(true); len(left) > 0 {
		t.Errorf("nodes were left: %v", left)
	}
	if left := g.NodeProcesses(); len(left) > 0 {
		t.Errorf("processes were left: %v", left)
	}
	for _, a := range agents {
		for _, dir := range []string{"data", "logs"} {
			left, err := os.ReadDir(filepath.Join(g.Home, "agents", a, dir))
			if err != nil && !os.IsNotExist(err) {
				t.Error(err)
			}
			if len(left) > 0 {
				t.Errorf("%s of agent %s: %v was left", dir, a, left)
			}
		}
	}
}

// absent fails where something is at the path.
func absent(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("%s is there: %v", path, err)
	}
}

func writeFile(t *testing.T, path, text string, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	return path
}
