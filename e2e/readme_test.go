package e2e_test

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/sutra-grid/sutra/e2e/harness"
	"github.com/sutra-grid/sutra/rpc"
)

func readme(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// The README's table of commands has each verb, and each flag that is not every verb's.
func TestReadmeCommandTable(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	written := map[string][]string{}
	for line := range strings.Lines(readme(t)) {
		if !strings.HasPrefix(line, "| `sutra ") {
			continue
		}
		for _, call := range regexp.MustCompile("`sutra ((?:(?:token|agents|users|ca) )?[a-z-]+)([^`]*)`").FindAllStringSubmatch(line, -1) {
			flags := regexp.MustCompile(`[ \[](--?[a-z][a-z-]*)`).FindAllStringSubmatch(call[2], -1)
			written[call[1]] = append(written[call[1]], "") // also without flags the verb is there
			for _, f := range flags {
				written[call[1]] = append(written[call[1]], f[1])
			}
		}
	}
	for verb := range written {
		if _, ok := verbs[verb]; !ok {
			t.Errorf("README has a verb %s, which sutra doesn't", verb)
		}
	}
	shared := []string{"--help", "--master", "--home", "--output", "--timeout", "--insecure"}
	for verb := range verbs {
		if written[verb] == nil {
			t.Errorf("README's table lacks %s", verb)
		}
		known := []string{""}
		for _, f := range regexp.MustCompile(`(?m)^ +(--[a-z-]+)(?: [^ ,]+)?(?:, (-[a-z]))?`).FindAllStringSubmatch(g.MustRun(append(strings.Fields(verb), "--help")...), -1) {
			known = append(known, f[1], f[2])
			if !slices.Contains(shared, f[1]) && !slices.Contains(written[verb], f[1]) && (f[2] == "" || !slices.Contains(written[verb], f[2])) {
				t.Errorf("README's row of %s lacks %s", verb, f[1])
			}
		}
		for _, f := range written[verb] {
			if !slices.Contains(known, f) {
				t.Errorf("README's row of %s has %s, which it doesn't take: %v", verb, f, known)
			}
		}
	}
}

// The README's table of the agent's file has the keys of the commented example, which has all of them.
func TestReadmeConfigTable(t *testing.T) {
	t.Parallel()
	keys := func(pattern, text string) []string {
		var found []string
		for _, key := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
			found = append(found, key[1])
		}
		slices.Sort(found)
		return slices.Compact(found)
	}
	want := keys(`(?m)^#?([a-z_]+) = `, harness.New(t).MustRun("agent", "--print-config"))
	_, table, _ := strings.Cut(readme(t), "| key | default | meaning |")
	table, _, _ = strings.Cut(table, "\n\n")
	var first strings.Builder
	for row := range strings.Lines(table) {
		cells := strings.Split(row, "|")
		first.WriteString(cells[min(1, len(cells)-1)] + "\n")
	}
	if diff := cmp.Diff(want, keys("[` ]([a-z_]+)`", first.String())); diff != "" || len(want) < 10 {
		t.Errorf("keys of the example and of README (-want +got):\n%s", diff)
	}
}

// The README's table of errors is the code's.
func TestReadmeErrorTable(t *testing.T) {
	t.Parallel()
	byCode := map[string][]string{"INVALID_ARGUMENT": {"USAGE"}, "UNKNOWN": {"FAILED"}} // the client's own
	for reason, c := range rpc.Codes() {
		name := code.Code(c).String()
		if name == "CANCELLED" {
			name = "CANCELED" // as gRPC spells it
		}
		byCode[name] = append(byCode[name], string(reason))
	}
	for name, reasons := range byCode {
		row := ""
		for line := range strings.Lines(readme(t)) {
			if strings.HasPrefix(line, "| "+name+" |") {
				row = line
			}
		}
		var said []string
		for part := range strings.SplitSeq(row, "`") {
			if part != "" && strings.ToUpper(part) == part && !strings.ContainsAny(part, " |,") {
				said = append(said, part)
			}
		}
		slices.Sort(said)
		slices.Sort(reasons)
		if fmt.Sprint(said) != fmt.Sprint(reasons) {
			t.Errorf("README says of %s: %v; the code: %v", name, said, reasons)
		}
	}
}
