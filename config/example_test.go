package config

import (
	"regexp"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestExampleIsTheDefaults(t *testing.T) {
	t.Parallel()
	want := defaults()
	want.AgentID = "agent-001"
	want.MasterEndpoints = []string{"localhost:7000"}
	if diff := cmp.Diff(want, mustParse(t, AgentExample())); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// TestExampleShowsEveryKey switches on what the example has behind "#": that must load too, set
// each key that the loader asks for, and show defaults as they are.
func TestExampleShowsEveryKey(t *testing.T) {
	t.Parallel()
	full := regexp.MustCompile(`(?m)^#(\S)`).ReplaceAllString(AgentExample(), "$1")
	doc, err := parseDocument([]byte(full), "agent.toml")
	if err != nil {
		t.Fatal(err)
	}
	agent := readAgent(doc, "/etc/sutra")
	doc.refuseUnknown()
	if err := doc.err(); err != nil {
		t.Fatal(err)
	}
	for _, table := range doc.tables {
		for _, key := range table.known {
			if path := append(slices.Clone(table.path), key); doc.lines[dotted(path)] == 0 {
				t.Errorf("%s is not in the example", dotted(path))
			}
		}
	}
	if diff := cmp.Diff(defaultProfile(), agent.Profiles["default"]); diff != "" {
		t.Errorf("what is shown for [storage] is not its default, -want +got:\n%s", diff)
	}
	if _, ok := agent.Profiles["redis"]; !ok || agent.Advertise == "" || agent.Labels == nil || agent.MetricsListen == "" {
		t.Errorf("not all settings were switched on: %+v", agent)
	}
}
