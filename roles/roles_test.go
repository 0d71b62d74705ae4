package roles

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"github.com/sutra-grid/sutra/roles/client"
)

// runFor runs a command line, interrupted already: a role that should have refused it doesn't go far.
func runFor(t *testing.T, args ...string) (out string, err error) {
	t.Helper()
	t.Setenv("SUTRA_HOME", t.TempDir())
	ctx, interrupt := context.WithCancel(t.Context())
	interrupt()
	var stdout, stderr bytes.Buffer
	err = run(ctx, &client.Streams{Out: &stdout, Err: &stderr, Call: "sutra"}, "v1.2.3", append([]string{"sutra"}, args...))
	return stdout.String(), err
}

// usageError fails where err is none, and where help was printed instead of it.
func usageError(t *testing.T, args []string, out string, err error) *client.UsageError {
	t.Helper()
	var usage *client.UsageError
	if !errors.As(err, &usage) || client.ExitCode(err) != 2 || out != "" {
		t.Fatalf("sutra %q: want a usage error, got %v, and on stdout:\n%s", args, err, out)
	}
	if strings.Contains(usage.Message, "\n") || usage.Hint == "" {
		t.Errorf("sutra %q: want one line and a hint: %q, %q", args, usage.Message, usage.Hint)
	}
	return usage
}

// An empty text is refused for each flag that takes one, of each command, in each spelling.
func TestEmptyFlags(t *testing.T) {
	a := app(&client.Streams{}, "")
	checked := 0
	check := func(flags []cli.Flag, before, after []string) {
		for _, f := range flags {
			if _, ok := f.(*cli.StringFlag); !ok {
				continue
			}
			for _, name := range f.Names() {
				name = "--" + name
				args := append(append(append([]string{}, before...), name, ""), after...)
				out, err := runFor(t, args...)
				if usage := usageError(t, args, out, err); !strings.Contains(usage.Message, "--"+f.Names()[0]+" ") {
					t.Errorf("sutra %q: %s", args, usage.Message)
				}
				checked++
			}
		}
	}
	check(a.Flags, nil, []string{"status"})
	for _, c := range a.Commands {
		check(c.Flags, []string{c.Name}, nil)
	}
	if checked < 40 {
		t.Errorf("only %d flags were checked", checked)
	}
}

func TestUsage(t *testing.T) {
	for _, c := range []struct {
		args          []string
		message, hint string
	}{
		{[]string{"statsu"}, `no verb "statsu"`, "did you mean: sutra status "},
		{[]string{"Status"}, `no verb "Status"`, "did you mean: sutra status "},
		{[]string{"lst"}, `no verb "lst"`, "did you mean: sutra list-agents, sutra list-nodes, sutra list-bans "},
		{[]string{"list"}, `no verb "list"`, "did you mean: sutra list-agents, sutra list-nodes, sutra list-bans "},
		{[]string{"nodes"}, `no verb "nodes"`, "did you mean: sutra list-nodes "},
		{[]string{"frobnicate"}, `no verb "frobnicate"`, "sutra --help lists the verbs"},
		{[]string{""}, `no verb ""`, "sutra --help lists the verbs"},
		{[]string{"help", "nope"}, `no verb "nope"`, "sutra --help"},
		{[]string{"help", "spwan"}, `no verb "spwan"`, "did you mean: sutra spawn "},
		{[]string{"--help", "nope"}, `no verb "nope"`, "sutra --help"},
		{[]string{"storage"}, "needs --port and --storage-path", "sutra storage --port 50051 --storage-path"},
		{[]string{"storage", "--port", "50051"}, "needs --port and --storage-path", "sutra storage --port 50051"},
		{[]string{"storage", "--port", "0", "--storage-path", "/nonexistent"}, "--port 0 is no port", "1024-65535"},
		{[]string{"storage", "--port", "-1", "--storage-path", "/nonexistent"}, "--port -1 is out of range", "1024-65535"},
		{[]string{"storage", "--port", "65536", "--storage-path", "/nonexistent"}, "--port 65536 is out of range", "1024-65535"},
		{[]string{"storage", "--port", "80", "--storage-path", "/nonexistent"}, "--port 80 is privileged", "1024-65535"},
		{[]string{"storage", "--port", "50051", "--storage-path", "data"}, `--storage-path "data" must be absolute`, "sutra storage --port 50051"},
		{[]string{"storage", "--port", "50051", "--storage-path", "/a/../b"}, `--storage-path "/a/../b" must not contain ".."`, "sutra storage --port 50051"},
		{[]string{"storage", "--port", "50051", "--storage-path", "/nonexistent", "--node-id", "a b"}, `--node-id "a b" has " " in it`, "--node-id kv-1"},
		{[]string{"storage", "--port", "50051", "--storage-path", ""}, "--storage-path is empty", "sutra storage --help"},
		{[]string{"master", "--offline-after", "30"}, `"30" for flag --offline-after`, "--offline-after 30s"},
		{[]string{"--version", "status"}, "--version stands alone", "sutra --version"},
	} {
		out, err := runFor(t, c.args...)
		usage := usageError(t, c.args, out, err)
		if !strings.Contains(usage.Message, c.message) || !strings.Contains(usage.Hint, c.hint) {
			t.Errorf("sutra %q: %q, %q", c.args, usage.Message, usage.Hint)
		}
	}
}

func TestVersion(t *testing.T) {
	for _, word := range []string{"version", "--version", "-v"} {
		if out, err := runFor(t, word); err != nil || !strings.HasPrefix(out, "sutra v1.2.3 go1") || strings.Count(out, "\n") != 1 {
			t.Errorf("sutra %s: %v\n%s", word, err, out)
		}
	}
}

func TestVersionAsJSON(t *testing.T) {
	for _, args := range [][]string{{"version", "-o", "json"}, {"-o", "json", "version"}, {"--output=json", "--version"}} {
		out, err := runFor(t, args...)
		var said map[string]string
		if err := errors.Join(err, json.Unmarshal([]byte(out), &said)); err != nil {
			t.Errorf("sutra %q: %v\n%s", args, err, out)
		}
		if said["version"] != "v1.2.3" || said["commit"] != "" || said["go"] == "" || said["platform"] == "" || strings.Count(out, "\n") != 1 {
			t.Errorf("sutra %q: %s", args, out)
		}
	}
	var out bytes.Buffer
	streams := &client.Streams{Out: &out, Err: &out}
	if err := run(t.Context(), streams, Version("v1.2.3", "abc"), []string{"sutra", "version", "-o", "json"}); err != nil || !strings.HasPrefix(out.String(), `{"version":"v1.2.3","commit":"abc",`) {
		t.Errorf("with a commit: %v\n%s", err, out.String())
	}
}

func TestHelpOnAVerb(t *testing.T) {
	for _, args := range [][]string{{"help"}, {"help", "spawn"}, {"spawn", "--help"}, {"--help"}} {
		if out, err := runFor(t, args...); err != nil || !strings.Contains(out, "sutra") {
			t.Errorf("sutra %q: %v\n%s", args, err, out)
		}
	}
}
