package config

import (
	"path/filepath"
	"testing"
)

func TestHome(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	type vars = map[string]string
	for name, test := range map[string]struct {
		flag string
		uid  int
		env  vars
		want string // "" is an error
	}{
		"flag":          {"/f", 0, vars{"SUTRA_HOME": "/s"}, "/f"},
		"relative flag": {"f/../g", 1, nil, filepath.Join(dir, "g")},
		"env":           {"", 0, vars{"SUTRA_HOME": "/s", "XDG_DATA_HOME": "/x"}, "/s"},
		"relative env":  {"", 1, vars{"SUTRA_HOME": "s"}, filepath.Join(dir, "s")},
		"root":          {"", 0, vars{"XDG_DATA_HOME": "/x", "HOME": "/root"}, "/var/lib/sutra"},
		"xdg":           {"", 1, vars{"XDG_DATA_HOME": "/x", "HOME": "/h"}, "/x/sutra"},
		"relative xdg":  {"", 1, vars{"XDG_DATA_HOME": "x", "HOME": "/h"}, "/h/.local/share/sutra"},
		"user":          {"", 1, vars{"HOME": "/h"}, "/h/.local/share/sutra"},
		"nothing":       {"", 1, nil, ""},
	} {
		got, err := home(test.flag, test.uid, func(key string) string { return test.env[key] })
		if got != test.want || (err != nil) != (test.want == "") {
			t.Errorf("%s: %q, %v; want %q", name, got, err, test.want)
		}
	}

	t.Setenv("SUTRA_HOME", "/from/env")
	if got, err := Home(""); err != nil || got != "/from/env" {
		t.Errorf("Home: %q, %v", got, err)
	}
}
