package client

import (
	"strings"
	"testing"
	"time"
	"unicode"

	"google.golang.org/protobuf/types/known/timestamppb"
)

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"agent-001 läuft: 漢字":     "agent-001 läuft: 漢字",
		"\x1b[2J\x1b]52;c;YQ==\a": `\x1b[2J\x1b]52;c;YQ==\a`,
		"a\r\nb\tc\x00\x7f":       `a\r\nb\tc\x00\x7f`,
		"\u009b31m":               `\u009b31m`,
		"\x9b31m \xff":            `\x9b31m \xff`,
		"\u202egnp.exe\u2066":     `\u202egnp.exe\u2066`,
		"no\u00a0break":           `no\u00a0break`,
		"\ufffd":                  "\ufffd",
	} {
		if got := clean(in); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

func FuzzClean(f *testing.F) {
	f.Add("\x1b[31m\xff\u202e")
	f.Fuzz(func(t *testing.T, s string) {
		for _, out := range append(cleanLines(s), clean(s)) {
			if i := strings.IndexFunc(out, func(r rune) bool { return !unicode.IsPrint(r) }); i >= 0 {
				t.Errorf("%q: %q doesn't print", s, out[i:])
			}
		}
	})
}

func TestAge(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Hour: "0s", 0: "0s", 12*time.Second + 900*time.Millisecond: "12s", 59 * time.Second: "59s",
		time.Minute: "1m", 59*time.Minute + 59*time.Second: "59m", time.Hour: "1h", 23*time.Hour + 59*time.Minute: "23h",
		24 * time.Hour: "1d", 100 * 24 * time.Hour: "100d",
	} {
		if got := age(epoch, timestamppb.New(epoch.Add(-d))); got != want {
			t.Errorf("%s: %s, want %s", d, got, want)
		}
	}
	if got := age(epoch, nil); got != "" {
		t.Errorf("no time: %q", got)
	}
}

func TestColourKeepsTheColumns(t *testing.T) {
	lines := header("NODE", "PHASE", "PID")
	lines.add(text("node-1"), word("RUNNING"), text("12"))
	lines.add(text("node-22"), word("CRASH_LOOP"), text(""))
	diff(t, lines.render(false), `
NODE     PHASE       PID
node-1   RUNNING     12
node-22  CRASH_LOOP  -
`)
	coloured := lines.render(true)
	if !strings.Contains(coloured, "\x1b[32mRUNNING\x1b[0m") || !strings.Contains(coloured, "\x1b[31mCRASH_LOOP\x1b[0m") {
		t.Errorf("%q", coloured)
	}
	plain := strings.NewReplacer("\x1b[32m", "", "\x1b[31m", "", "\x1b[0m", "").Replace(coloured)
	diff(t, plain, lines.render(false))
}
