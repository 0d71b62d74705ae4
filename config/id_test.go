package config

import (
	"strings"
	"testing"
)

func TestValidID(t *testing.T) {
	t.Parallel()
	for _, id := range []string{"a", "agent-001", "A_b.9", "-", "...", strings.Repeat("x", 64)} {
		if err := ValidID("agent id", id); err != nil {
			t.Errorf("ValidID(%q): %v", id, err)
		}
	}
	const rule = "letters, digits, - _ and . are allowed, 1 to 64 of them"
	for id, want := range map[string]string{
		"":                      "agent id is empty; " + rule,
		"a b":                   `agent id "a b" has " " in it; ` + rule,
		"a/b":                   `agent id "a/b" has "/" in it; ` + rule,
		"é":                     `agent id "é" has "é" in it; ` + rule,
		"a\n":                   `agent id "a\n" has "\n" in it; ` + rule,
		"a\xff":                 `agent id "a\xff" has "\xff" in it; ` + rule,
		".":                     `agent id "." names a folder; ` + rule + ", and not only dots",
		"..":                    `agent id ".." names a folder; ` + rule + ", and not only dots",
		strings.Repeat("x", 65): `agent id "xxxxxxxxxxxxxxxx"... is 65 bytes long; ` + rule,
	} {
		if err := ValidID("agent id", id); err == nil || err.Error() != want {
			t.Errorf("ValidID(%q): %v; want %s", id, err, want)
		}
	}
}

func TestNameOf(t *testing.T) {
	for name, want := range map[string]string{
		"host-1.example": "host-1.example", `DOMAIN\anna`: "DOMAIN-anna", "jürgen": "j-rgen", "": "master", ".": "master", "..": "master", "a/../b": "a-..-b",
		strings.Repeat("x", 70): strings.Repeat("x", 64),
	} {
		if got := NameOf(name, "master"); got != want || ValidID("", got) != nil {
			t.Errorf("%q becomes %q, want %q", name, got, want)
		}
	}
}
