package e2e_test

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// verbs are all of them, with the flags that each one's help must show.
var verbs = map[string][]string{
	"dev":         {"--home"},
	"master":      {"--home", "--listen", "--http", "--certificate-life", "--insecure", "--degraded-after", "--offline-after"},
	"agent":       {"--home", "--config", "--join-token", "--join-token-file", "--insecure", "--stop-nodes", "--print-config", "--print-unit"},
	"storage":     {"--port", "--storage-path", "--node-id"},
	"spawn":       {"--agent", "-a", "--port", "-p", "--storage-path", "--memory", "--profile", "--request-id", "--master", "--output", "-o", "--timeout"},
	"stop":        {"--node", "-n", "--agent", "-a", "--master", "--output", "--timeout"},
	"restart":     {"--node", "-n", "--agent", "-a", "--master", "--output", "--timeout"},
	"remove":      {"--node", "-n", "--master", "--output"},
	"status":      {"--master", "--output", "--timeout"},
	"node-status": {"--node", "-n", "--cached", "--master", "--output"},
	"list-agents": {"--master", "--output"},
	"list-nodes":  {"--agent", "-a", "--all", "--master", "--output"},
	"list-bans":   {"--master", "--output"},
	"logs":        {"--node", "-n", "--follow", "-f", "--tail", "--since", "--master", "--output"},
	"events":      {"--follow", "-f", "--since", "--master", "--output"},
	"smoke":       {"--agent", "--profile", "--master", "--output"},
	"login":       {"--master", "--token", "--name"},

	"token create": {"--role", "--ttl", "--uses", "--agent-id", "--name", "--master", "--output"},
	"token list":   {"--master", "--output"},
	"token revoke": {"--master", "--output"},
	"agents ban":   {"--reason", "--master", "--output"},
	"agents unban": {"--master", "--output"},
	"users ban":    {"--reason", "--master", "--output"},
	"users unban":  {"--master", "--output"},
	"ca rotate":    {"--apply", "--master", "--output"},
	"ca retire":    {"--apply", "--force", "--master", "--output"},

	"version":    nil,
	"completion": nil,
}

func TestHelp(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	all := g.MustRun("--help")
	plain(t, strings.ReplaceAll(all, "\t", " "))
	for verb, flags := range verbs {
		words := strings.Fields(verb)
		if !regexp.MustCompile(`(?m)^\s+` + words[0] + `\s+\S`).MatchString(all) {
			t.Errorf("sutra --help doesn't list %s", verb)
		}
		help := g.MustRun(append(words, "--help")...)
		for _, w := range append(flags, "Exit codes: 0 ", "sutra "+verb) {
			if !strings.Contains(help, w) {
				t.Errorf("sutra %s --help doesn't say %q", verb, w)
			}
		}
		for _, line := range strings.Split(help, "\n") {
			if len(line) > 240 {
				t.Errorf("sutra %s --help has a line of %d characters: %s", verb, len(line), line)
			}
		}
		if short := g.MustRun(append(words, "-h")...); short != help {
			t.Errorf("sutra %s -h differs from --help", verb)
		}
	}
	if out := g.MustRun(); out != all {
		t.Errorf("sutra alone says:\n%s", out)
	}
	for _, version := range []string{"version", "--version", "-v"} {
		out := g.MustRun(version)
		if !regexp.MustCompile(`^sutra \S+.* go1\S+.* linux/\w+\n$`).MatchString(out) {
			t.Errorf("sutra %s: %q", version, out)
		}
	}
	absent(t, g.Home)
}

func TestCompletion(t *testing.T) {
	t.Parallel()
	harness.Need(t, "bash")
	g := harness.New(t)
	script := g.MustRun("completion", "bash")
	bash := func(stdin string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "bash", args...)
		cmd.Stdin = strings.NewReader(stdin)
		cmd.Env = append(slices.Clone(g.Env), "PATH="+filepath.Dir(harness.Binary(t))+":/usr/bin:/bin")
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("bash %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	bash(script, "-n")
	// What bash itself does at a press of Tab: set the words, call the function, read the replies.
	complete := func(words ...string) []string {
		return strings.Fields(bash(script + "\nCOMP_WORDS=(" + strings.Join(words, " ") + `); COMP_CWORD=$((${#COMP_WORDS[@]}-1)); _sutra; echo "${COMPREPLY[@]}"`))
	}
	offered := map[string]bool{}
	for _, v := range complete("sutra", "''") {
		offered[v] = true
	}
	for verb := range verbs {
		if !offered[strings.Fields(verb)[0]] {
			t.Errorf("completion doesn't offer %s, only %v", verb, offered)
		}
	}
	if got := complete("sutra", "list-"); strings.Join(got, " ") != "list-agents list-nodes list-bans" {
		t.Errorf("list- completes to %v", got)
	}
	if got := complete("sutra", "spawn", "--st"); strings.Join(got, " ") != "--storage-path" {
		t.Errorf("spawn --st completes to %v", got)
	}
	if got := complete("sutra", "spawn", "--"); !strings.Contains(strings.Join(got, " "), "--storage-path") {
		t.Errorf("spawn -- completes to %v", got)
	}
	// Behind "--" nothing is offered, and above all nothing is run.
	if got := complete("sutra", "version", "--", "''"); len(got) > 0 {
		t.Errorf("version -- completes to %v", got)
	}
	refused(t, g, 2, "USAGE", []string{"bash or zsh"}, "completion")
	refused(t, g, 2, "USAGE", []string{"bash or zsh"}, "completion", "fish")
	if zsh := g.MustRun("completion", "zsh"); !strings.HasPrefix(zsh, "#compdef sutra\n") {
		t.Errorf("completion zsh:\n%s", zsh)
	}
}

// Tables and JSON say the same of real things, wherever flags stand and however the master is named.
func TestOutput(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	agent := g.StartAgent("a1", badProfiles)
	running := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	ended := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	g.MustRun("stop", "-n", ended.GetNodeId())

	for _, c := range []struct {
		args  []string
		table []string // regular expressions
		json  []string
	}{
		{[]string{"status"}, []string{`(?m)^grid +HEALTHY$`, `(?m)^agents +1 HEALTHY$`, `(?m)^nodes +1 RUNNING$`, `(?m)^capacity +1 of 2 nodes taken$`}, []string{`"health":"CLUSTER_HEALTH_HEALTHY"`, `"max_nodes":2`}},
		{[]string{"list-agents"}, []string{`^AGENT +HEALTH +LAST-BEAT +NODES +ENDPOINT`, `(?m)^a1 +HEALTHY +\d+s +1/2 +127\.0\.0\.1:\d+ +linux/`}, []string{`"agent_id":"a1"`, `"health":"AGENT_HEALTH_HEALTHY"`}},
		{[]string{"list-nodes"}, []string{`^NODE +AGENT +PHASE +HEALTH +PID`, `(?m)^` + running.GetNodeId() + ` +a1 +RUNNING +READY +\d+ +\d+ +0 +\d+s +\d+s +-$`}, []string{`"node_id":"` + running.GetNodeId(), `"phase":"PHASE_RUNNING"`}},
		{[]string{"list-nodes", "--all"}, []string{running.GetNodeId(), `(?m)^` + ended.GetNodeId() + ` +a1 +STOPPED`}, []string{ended.GetNodeId(), `"signal":"SIGTERM"`}},
		{[]string{"node-status", "-n", running.GetNodeId()}, []string{`(?m)^phase +RUNNING \(desired RUNNING\)$`, `(?m)^source +LIVE$`, `(?m)^memory limit +64 MiB \((un)?enforced\)$`}, []string{`"source":"SOURCE_LIVE"`, `"memory_limit_mb":64`}},
		{[]string{"node-status", "--cached", "-n", running.GetNodeId()}, []string{`(?m)^source +CACHED, observed \d+s ago: asked for$`}, []string{`"source":"SOURCE_CACHED"`}},
		{[]string{"node-status", "-n", ended.GetNodeId()}, []string{`(?m)^phase +STOPPED`, `CACHED.*the node has ended`, `(?m)^last exit +killed by SIGTERM, \d+s ago$`}, []string{`"reason":"the node has ended"`}},
	} {
		out := g.MustRun(c.args...)
		plain(t, out)
		for _, want := range c.table {
			if !regexp.MustCompile(want).MatchString(out) {
				t.Errorf("sutra %v doesn't match %s:\n%s", c.args, want, out)
			}
		}
		before := g.MustRun(append([]string{"-o", "json"}, c.args...)...)
		for _, doc := range []string{before, g.MustRun(append(c.args, "--output=json")...)} {
			if !json.Valid([]byte(doc)) || strings.Count(doc, "\n") != 1 {
				t.Errorf("sutra %v -o json isn't one line of JSON:\n%s", c.args, doc)
			}
			for _, want := range c.json {
				if !strings.Contains(doc, want) {
					t.Errorf("sutra %v -o json doesn't have %s:\n%s", c.args, want, doc)
				}
			}
		}
	}
	// After the verb wins, then before it, then the environment, then the host's own master.
	g.MustRun("--master", "127.0.0.1:1", "status", "--master", "http://"+g.Endpoint)
	g.MustRun("--timeout", "30s", "status", "--timeout", "20s")
	g.Env = append(g.Env, "SUTRA_MASTER=127.0.0.1:1")
	refused(t, g, 4, "MASTER_UNREACHABLE", []string{"127.0.0.1:1:"}, "status")
	g.MustRun("--master", g.Endpoint, "status")
	g.Env = append(g.Env, "SUTRA_HOME=/nonexistent", "SUTRA_MASTER="+g.Endpoint)
	refused(t, g, 6, "UNTRUSTED_PEER", []string{g.Endpoint, "sutra login"}, "status") // it is there, and the home has no identity
	g.Env = append(g.Env, "SUTRA_MASTER=")
	g.MustRun("--home", g.Home, "status")
	g.MustRun("status", "--home", g.Home)
	g.Env = append(g.Env, "SUTRA_HOME="+g.Home)

	refused(t, g, 2, "USAGE", []string{`no verb "statu"`, "did you mean: sutra status"}, "statu")
	refused(t, g, 2, "USAGE", []string{`no verb "lst"`, "sutra list-agents, sutra list-nodes"}, "lst")
	refused(t, g, 2, "USAGE", []string{`no verb "frobnicate"`, "sutra --help"}, "frobnicate")
	refused(t, g, 2, "USAGE", []string{`no verb "nope"`, "sutra --help"}, "help", "nope")
	refused(t, g, 2, "USAGE", []string{"sutra storage needs --port", "hint: sutra storage --port"}, "storage")
	refused(t, g, 2, "USAGE", []string{"--port 0 is no port", "1024-65535"}, "storage", "--port", "0", "--storage-path", g.Dir)
	refused(t, g, 2, "USAGE", []string{"--master is empty", "sutra status --help"}, "status", "--master", "")
	refused(t, g, 2, "USAGE", []string{"unknown flag --bogus", "sutra --help"}, "--bogus", "status")
	refused(t, g, 2, "USAGE", []string{"unknown flag --bogus", "sutra status --help"}, "status", "--bogus")
	for verb := range verbs {
		switch words := strings.Fields(verb); verb {
		case "completion":
		case "agents ban", "agents unban", "users ban", "users unban", "token revoke":
			refused(t, g, 2, "USAGE", []string{"has 2 words there", "sutra " + verb}, append(words, "one", "stray")...)
			refused(t, g, 2, "USAGE", []string{"has 0 words there", "sutra " + verb}, words...)
		default:
			refused(t, g, 2, "USAGE", []string{`"stray"`, "sutra " + verb}, append(words, "stray")...)
		}
	}
	for _, args := range [][]string{{"-o", "xml", "status"}, {"status", "-o", "xml"}} {
		if r := g.Run(args...); r.Code != 2 || !strings.Contains(r.Stderr, "unknown output format") || !strings.Contains(r.Stderr, "table or json") || r.Stdout != "" {
			t.Errorf("sutra %v: %+v", args, r)
		}
	}

	// Logs that no terminal shows are JSON, a line each.
	for _, p := range []*harness.Process{master, agent} {
		for line := range bytes.Lines(p.Log()) {
			var entry struct{ Level, Time, Message string }
			if err := json.Unmarshal(line, &entry); err != nil || entry.Level == "" || entry.Time == "" || entry.Message == "" {
				t.Errorf("%s logged %q: %v", p.Name, line, err)
			}
		}
	}
}

// On a terminal there is colour, and logs are for people; NO_COLOR takes the colour away.
func TestTerminal(t *testing.T) {
	t.Parallel()
	harness.Need(t, "script")
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("a1", badProfiles)
	// It logs as every agent does, and is then refused: its id is taken.
	second := harness.Binary(t) + " agent --config " + filepath.Join(g.Dir, "a1.toml") + " --home " + filepath.Join(g.Dir, "elsewhere") + " --join-token " + g.Token()
	terminal := func(command string, env ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "script", "--quiet", "--return", "--command", command, "/dev/null")
		cmd.Env = append(append(cmd.Env, g.Env...), append(env, "TERM=xterm")...)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Fatalf("script: %v", err)
		}
		return strings.ReplaceAll(string(out), "\r\n", "\n")
	}
	const green, red = "\x1b[32m", "\x1b[31m"
	log := terminal(second)
	for _, w := range []string{"INF", "agent listening", red + "error:", "(AGENT_ID_TAKEN)", "\nhint: "} {
		if !strings.Contains(log, w) {
			t.Errorf("on a terminal the agent doesn't say %q:\n%q", w, log)
		}
	}
	if strings.Contains(log, `{"`) {
		t.Errorf("on a terminal the agent logs JSON:\n%s", log)
	}
	plain(t, terminal(second, "NO_COLOR=1"))

	status := harness.Binary(t) + " status"
	if out := terminal(status); !strings.Contains(out, green+"HEALTHY") {
		t.Errorf("on a terminal status says:\n%q", out)
	}
	plain(t, terminal(status, "NO_COLOR=1"))
	if out := terminal(harness.Binary(t) + " smoke"); strings.Count(out, "✓") != 9 {
		t.Errorf("on a terminal smoke says:\n%s", out)
	}
	if out := g.MustRun("smoke"); strings.Count(out, "ok  ") != 9 || strings.Contains(out, "✓") {
		t.Errorf("in a pipe smoke says:\n%s", out)
	}
	// JSON is for programs, wherever it goes.
	plain(t, terminal(status+" -o json"))
}

// The commands that dev shows lead to its own grid, also where another master would be found without flags.
func TestDevShowsItsOwnMaster(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster() // announced in the home that commands without flags look into
	spoken := harness.New(t)
	spoken.Env = append(spoken.Env, "SUTRA_MASTER="+g.Endpoint)
	alone := harness.New(t)
	for name, c := range map[string]struct {
		g    *harness.Grid
		args []string
		bare bool
	}{
		"another announced":      {g: g, args: []string{"dev"}},
		"another in environment": {g: spoken, args: []string{"dev", "--home", spoken.Home}},
		"in the usual home":      {g: alone, args: []string{"dev", "--home", alone.Home}, bare: true},
	} {
		t.Run(name, func(t *testing.T) {
			dev := c.g.Launch("dev", c.args...)
			said(t, dev, "Ctrl-C stops all of it.")
			greeting := string(dev.Log())
			if _, banner, found := strings.Cut(greeting, "A grid runs"); !found || strings.Count(banner, "\n") > 15 {
				t.Errorf("dev greets at length:\n%s", greeting)
			}
			master := regexp.MustCompile(`(?m)^  master +(\S+)`).FindStringSubmatch(greeting)[1]
			shown := regexp.MustCompile(`(?m)^  \S+/sutra (.*)(status|list-nodes|smoke)$`).FindAllStringSubmatch(greeting, -1)
			if len(shown) != 3 {
				t.Fatalf("dev shows the commands %q:\n%s", shown, greeting)
			}
			for _, command := range shown {
				flags := strings.Fields(command[1])
				if bare := len(flags) == 0; bare != c.bare {
					t.Errorf("dev shows %q", command[0])
				}
				if out := c.g.MustRun(append(flags, "status")...); !strings.Contains(out, " at "+master+",") {
					t.Errorf("%q asks another master than %s:\n%s", command[0], master, out)
				}
			}
			dev.Stop()
			if end, found := strings.CutPrefix(string(dev.Log()), greeting); !found || end != "stopping ...\nstopped\n" {
				t.Errorf("dev ends with:\n%s", end)
			}
		})
	}
}
