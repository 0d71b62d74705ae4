package config

import "testing"

func TestNearest(t *testing.T) {
	t.Parallel()
	known := []string{"stop_signal", "stop_grace_secs", "args", "ready"}
	for word, want := range map[string]string{
		"stop_grace":   "stop_grace_secs",
		"Stop_grace":   "stop_grace_secs",
		"stop_grace_s": "stop_grace_secs",
		"stop_signals": "stop_signal",
		"stop_sgnal":   "stop_signal",
		"arg":          "args",
		"raedy":        "ready",
		"stop":         "", // the beginning of two
		"st":           "",
		"r":            "",
		"port":         "",
	} {
		if got, _ := Nearest(word, known); got != want {
			t.Errorf("Nearest(%q) = %q, want %q", word, got, want)
		}
	}
}

func TestDistance(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		a, b string
		want int
	}{
		{"", "", 0},
		{"", "abc", 3},
		{"abc", "", 3},
		{"kitten", "sitting", 3},
		{"flaw", "lawn", 2},
		{"max_nodes", "max_nodes", 0},
	} {
		if got := distance(test.a, test.b); got != test.want {
			t.Errorf("distance(%q, %q) = %d, want %d", test.a, test.b, got, test.want)
		}
	}
}
