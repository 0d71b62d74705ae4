package agent

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// settings reads a unit file as systemd does: section/key to value; keys that come twice are an error here.
func settings(t *testing.T, unit string) map[string]string {
	t.Helper()
	found, section := map[string]string{}, ""
	for line := range strings.Lines(unit) {
		line = strings.TrimSpace(line)
		switch {
		case line == "", line[0] == '#', line[0] == ';':
		case line[0] == '[':
			section = strings.Trim(line, "[]")
		default:
			key, value, ok := strings.Cut(line, "=")
			if key = section + "/" + key; !ok || found[key] != "" {
				t.Errorf("line %q has no value, or is the second of its kind", line)
			}
			found[key] = value
		}
	}
	return found
}

// words splits a command line by systemd's rules for quoted text, specifiers and, but in the first word, variables.
func words(t *testing.T, line string) []string {
	t.Helper()
	var all []string
	var word strings.Builder
	quoted, open := false, false
	flush := func() {
		if open {
			text := strings.ReplaceAll(word.String(), "%%", "%")
			if len(all) > 0 {
				text = strings.ReplaceAll(text, "$$", "$")
			}
			all = append(all, text)
		}
		word.Reset()
		open = false
	}
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case c == '\\':
			i++
			escaped, known := map[byte]byte{'\\': '\\', '"': '"', 'n': '\n'}[line[i]]
			if !known {
				t.Fatalf("%q escapes %q", line, line[i])
			}
			word.WriteByte(escaped)
		case c == '"':
			quoted, open = !quoted, true
		case c == ' ' && !quoted:
			flush()
		default:
			open = true
			word.WriteByte(c)
		}
	}
	if quoted {
		t.Errorf("%q leaves a quote open", line)
	}
	flush()
	return all
}

func TestUnit(t *testing.T) {
	for _, path := range []string{"/usr/local/bin/sutra", "/a b/100%/$HOME ${x}/\"quoted\"/back\\slash/two\nlines"} {
		for _, uid := range []int{0, 1000} {
			stopNodes := uid == 0
			is := settings(t, Unit(path, path+"/agent.toml", path+"/home", uid, stopNodes, 90*time.Second))
			want := []string{path, "agent", "--config", path + "/agent.toml", "--home", path + "/home"}
			if stopNodes {
				want = append(want, "--stop-nodes")
			}
			if limit := is["Service/TimeoutStopSec"]; limit != map[bool]string{true: "120"}[stopNodes] {
				t.Errorf("a stop may take %q, with nodes %v", limit, stopNodes)
			}
			if got := words(t, is["Service/ExecStart"]); !slices.Equal(got, want) {
				t.Errorf("the command is %q, want %q", got, want)
			}
			if user := is["Service/User"]; user != map[int]string{0: "", 1000: "1000"}[uid] {
				t.Errorf("for uid %d the user is %q", uid, user)
			}
			for key, value := range map[string]string{
				"Unit/After": "network-online.target", "Service/Type": "notify", "Service/KillMode": "process", "Service/Delegate": "yes",
				"Service/DelegateSubgroup": "agent", "Service/Restart": "always", "Install/WantedBy": "multi-user.target",
			} {
				if is[key] != value {
					t.Errorf("%s is %q, want %q", key, is[key], value)
				}
			}
			if !strings.HasPrefix(is["Service/OOMScoreAdjust"], "-") || is["Service/LimitNOFILE"] == "" {
				t.Errorf("the unit's settings are %v", is)
			}
		}
	}
}

func TestSystemdTakesTheUnit(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		if os.Getenv("SUTRA_TEST_NO_SKIP") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	dir := filepath.Join(t.TempDir(), "a b $x 100%")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	binary, unit := filepath.Join(dir, "sutra"), filepath.Join(t.TempDir(), "sutra-agent.service")
	if err := os.WriteFile(binary, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(unit, []byte(Unit(binary, dir+"/\"a\" \\ $b.toml", dir, 1000, true, time.Second)), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), analyze, "verify", "--man=no", unit).CombinedOutput()
	if err != nil {
		t.Errorf("systemd-analyze: %v", err)
	}
	for line := range strings.Lines(string(out)) {
		// It looks at the host's other units as well, and before systemd 254 it doesn't know all of this one's keys.
		if strings.Contains(line, filepath.Base(unit)) && (!strings.Contains(line, "'DelegateSubgroup'") || !strings.Contains(line, "ignoring")) {
			t.Errorf("systemd-analyze says: %s", line)
		}
	}
}
