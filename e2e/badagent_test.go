package e2e_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// A file that can't be right: the agent says where and what is allowed, and makes nothing.
func TestRefusedAgentFiles(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	const ids = "letters, digits, - _ and . are allowed"
	agent := "[agent]\nagent_id = \"a1\"\n"
	for i, c := range []struct {
		text  string
		words []string
	}{
		{"", []string{"is empty", "--print-config"}},
		{"[agent\n", []string{":1:", "not valid TOML", "--print-config"}},
		{"[agent]\nagent_di = \"a1\"\n", []string{":2: agent.agent_di: unknown key; did you mean agent_id?", "agent_id: is missing"}},
		{agent + "[storag]\nmax_nodes = 1\n", []string{":3: storag: unknown table; did you mean storage?"}},
		{agent + "max_nodes = 1\n", []string{":3: agent.max_nodes: unknown key; it belongs in [storage]"}},
		{agent + "[storage.profiles.p]\nstop_signl = \"INT\"\n", []string{":4: storage.profiles.p.stop_signl", "stop_signal?"}},
		{agent + "agent_port = \"8001\"\n", []string{":3: agent.agent_port: is a string; must be a whole number"}},
		{agent + "agent_port = 80.5\n", []string{"agent.agent_port: is a decimal number"}},
		{agent + "agent_port = nan\n", []string{"agent.agent_port: is a decimal number"}},
		{agent + "[storage]\nargs = \"--port\"\n", []string{":4: storage.args: is a string; must be a list of strings"}},
		{agent + "agent_port = 80\n", []string{":3: agent.agent_port: 80 is a privileged port", "1024 to 65535"}},
		{agent + "agent_port = 70000\n", []string{":3: agent.agent_port: 70000 is not a usable port", "1024 to 65535"}},
		{agent + "[storage]\nbase_port = 0\n", []string{":4: storage.base_port: 0 is not a usable port", "1024 to 65535"}},
		{agent + "[storage]\nbase_port = 65535\n", []string{":4: storage.base_port: 65535 leaves 1 ports for max_nodes = 5"}},
		{agent + "[storage]\nmax_nodes = 0\n", []string{":4: storage.max_nodes: 0 is out of range; allowed: 1 to 10000"}},
		{agent + "[storage]\ndefault_memory_mb = -1\n", []string{":4: storage.default_memory_mb: -1 is out of range"}},
		{"[agent]\nagent_id = \"\"\n", []string{":2: agent.agent_id: is empty", ids}},
		{"[agent]\nagent_id = \"a b\"\n", []string{`:2: agent.agent_id: "a b"`, ids}},
		{"[agent]\nagent_id = \"../a\"\n", []string{`:2: agent.agent_id: "../a"`, ids}},
		{"[agent]\nagent_id = \"" + strings.Repeat("x", 65) + "\"\n", []string{":2: agent.agent_id:", "65 bytes long", ids}},
		{"[agent]\nagent_id = 1\n", []string{":2: agent.agent_id: is a whole number; must be a string"}},
		{agent + "advertise = \"10.0.0.5\"\n", []string{":3: agent.advertise:", "has no port", "10.0.0.5:8001"}},
		{agent + "advertise = \"0.0.0.0:8001\"\n", []string{":3: agent.advertise:", "is every address of a host", "10.0.0.5:8001"}},
		{agent + "advertise = \"[::]:8001\"\n", []string{":3: agent.advertise:", "is every address of a host"}},
		{agent + "advertise = \":8001\"\n", []string{":3: agent.advertise:", "has no host"}},
		{agent + "master_endpoint = \"ftp://x:1\"\n", []string{":3: agent.master_endpoint:", "unknown scheme"}},
		{agent + "[storage]\nready = \"udp\"\n", []string{":4: storage.ready:", "tcp, http:/path, grpc, exec:CMD, none"}},
		{agent + "[monitoring]\nheartbeat_interval_secs = 0\n", []string{":4: monitoring.heartbeat_interval_secs: 0 is out of range"}},
	} {
		file := writeFile(t, filepath.Join(g.Dir, fmt.Sprintf("bad-%d.toml", i)), c.text, 0o600)
		refused(t, g, 2, "USAGE", append(c.words, file), "agent", "--config", file)
	}
	refused(t, g, 2, "USAGE", []string{"needs --config FILE", "--print-config"}, "agent")
	refused(t, g, 2, "USAGE", []string{"nowhere.toml", "no such file", "--print-config"}, "agent", "--config", "nowhere.toml")
	refused(t, g, 2, "USAGE", []string{g.Dir, "is a folder", "agent.toml"}, "agent", "--config", g.Dir)
	refused(t, g, 2, "USAGE", []string{`"agent.toml"`}, "agent", "agent.toml")
	absent(t, g.Home)
}

// An agent starts with binaries that it couldn't run, and says so of each profile; one that is installed later is run.
func TestUnusableBinaries(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	missing, plain := filepath.Join(g.Dir, "missing"), writeFile(t, filepath.Join(g.Dir, "plain"), "#!/bin/sh\n", 0o600)
	profile := func(name, binary string) string {
		return fmt.Sprintf("\n[storage.profiles.%s]\nstorage_binary = %q\nargs = []\nready = \"none\"\n", name, binary)
	}
	agent := g.StartAgent("a1", profile("later", missing)+profile("plain", plain)+profile("good", "/bin/sh"))
	var warned []string
	for line := range strings.Lines(string(agent.Log())) {
		if strings.Contains(line, "no node of that profile can be started") {
			warned = append(warned, line)
		}
	}
	if len(warned) != 2 {
		t.Fatalf("warnings: %q", warned)
	}
	for i, words := range [][]string{{"later", missing, "doesn't exist"}, {"plain", plain, "isn't executable"}} {
		for _, w := range append(words, `"level":"warn"`, "hint") {
			if !strings.Contains(warned[i], w) {
				t.Errorf("the warning doesn't say %q: %s", w, warned[i])
			}
		}
	}
	writeFile(t, missing, "#!/bin/sh\nexec sleep 100000\n", 0o700)
	g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "later"})
}

// Addresses that are taken: each role names the address, its holder's finder and the setting, and makes nothing.
func TestAddressInUse(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	taken, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	port := fmt.Sprint(taken.Addr().(*net.TCPAddr).Port)
	at := "127.0.0.1:" + port
	agent := "[agent]\nagent_id = \"a1\"\nagent_port = "
	byPort := writeFile(t, filepath.Join(g.Dir, "port.toml"), agent+port+"\n", 0o600)
	byMetrics := writeFile(t, filepath.Join(g.Dir, "metrics.toml"), agent+"0\n[monitoring]\nmetrics_listen = \""+at+"\"\n", 0o600)

	refused(t, g, 7, "PORT_IN_USE", []string{at, "the address is in use", "ss -ltnp", "--listen"}, "master", "--listen", at, "--http", "off")
	refused(t, g, 7, "PORT_IN_USE", []string{at, "the address is in use", "ss -ltnp", "--http"}, "master", "--listen", "127.0.0.1:0", "--http", at)
	refused(t, g, 7, "PORT_IN_USE", []string{":" + port, "the address is in use", "agent_port in " + byPort}, "agent", "--config", byPort)
	refused(t, g, 7, "PORT_IN_USE", []string{at, "the address is in use", "metrics_listen in " + byMetrics}, "agent", "--config", byMetrics)
	refused(t, g, 7, "PORT_IN_USE", []string{":" + port, "the address is in use", "--port"}, "storage", "--port", port, "--storage-path", filepath.Join(g.Dir, "kv"))
	absent(t, filepath.Join(g.Dir, "kv"))

	for _, odd := range []string{"nonsense", "127.0.0.1", "127.0.0.1:70000", "256.0.0.1:7000", "192.0.2.1:7000"} {
		refused(t, g, 2, "INVALID_ARGUMENT", []string{odd, "--listen HOST:PORT"}, "master", "--listen", odd, "--http", "off")
	}
	refused(t, g, 2, "USAGE", []string{"degraded after 15s and offline after 1s"}, "master", "--listen", "127.0.0.1:0", "--offline-after", "1s")
	refused(t, g, 2, "USAGE", []string{"degraded after -1s"}, "master", "--listen", "127.0.0.1:0", "--degraded-after", "-1s")
	refused(t, g, 2, "USAGE", []string{`"NaN"`, "--offline-after", "--help"}, "master", "--offline-after", "NaN")
	refused(t, g, 2, "USAGE", []string{`"stray"`}, "master", "stray")
	// An agent has taken its home by then, and given it back.
	err = filepath.WalkDir(g.Home, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Base(path) != "lock" {
			t.Errorf("%s was left", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}

	// A home that can't be one.
	file := writeFile(t, filepath.Join(g.Dir, "file"), "kept", 0o600)
	refusedAtStart(t, g, 1, []string{file, "not a directory"}, "master", "--listen", "127.0.0.1:0", "--http", "off", "--home", file)
	ok := writeFile(t, filepath.Join(g.Dir, "ok.toml"), agent+"0\n", 0o600)
	refusedAtStart(t, g, 1, []string{file, "not a directory"}, "agent", "--config", ok, "--home", file)
	refusedAtStart(t, g, 1, []string{file, "not a directory"}, "dev", "--home", file)
}

// One home has one master; the first one doesn't notice the second.
func TestSecondMaster(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	first := g.StartMaster()
	refused(t, g, 7, "PATH_IN_USE", []string{"a master already runs in", fmt.Sprintf("pid %d", first.PID()), "hint: ", "--home FOLDER"},
		"master", "--listen", "127.0.0.1:0", "--http", "off")
	if out := g.MustRun("status"); !strings.Contains(out, g.Endpoint) {
		t.Errorf("after the second master's start status says:\n%s", out)
	}
}

// One storage path has one server.
func TestSecondStorageServer(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("a1", "")
	node := g.Spawn(&sutrav1.SpawnNodeRequest{})
	refused(t, g, 7, "PATH_IN_USE", []string{node.GetStoragePath(), "another server has it open", "hint: ", "choose another path"},
		"storage", "--port", fmt.Sprint(g.FreePort()), "--storage-path", node.GetStoragePath())
}

// Two agents with one id: the second is refused while the first lives, on the same home and on another, and
// takes its place once the first is OFFLINE.
func TestTwoAgentsWithOneID(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster("--degraded-after", "3s", "--offline-after", "6s")
	const storage = badProfiles + "[monitoring]\nheartbeat_interval_secs = 1\n"
	first := g.StartAgent("a1", storage)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	file, elsewhere := filepath.Join(g.Dir, "a1.toml"), filepath.Join(g.Dir, "elsewhere")

	refused(t, g, 7, "AGENT_ID_TAKEN", []string{"a1", "another process has it", fmt.Sprintf("pid %d", first.PID()), "hint: "}, "agent", "--config", file)
	// Its port is taken, too, and that isn't what is wrong.
	agents, err := g.Client().ListAgents(t.Context(), &sutrav1.ListAgentsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(agents.GetAgents()[0].GetEndpoint())
	same, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	fixed := filepath.Join(g.Dir, "fixed.toml")
	if err := os.WriteFile(fixed, bytes.Replace(same, []byte("agent_port = 0"), []byte("agent_port = "+port), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, g, 7, "AGENT_ID_TAKEN", []string{"another process has it"}, "agent", "--config", fixed)
	refused(t, g, 7, "PORT_IN_USE", []string{port, "agent_port in "}, "agent", "--config", fixed, "--home", elsewhere)
	refusedAtStart(t, g, 7, []string{"agent id a1 is taken", "(AGENT_ID_TAKEN)", "hint: give this agent another agent_id"},
		"agent", "--config", file, "--home", elsewhere, "--join-token", g.Token())
	instance, err := os.ReadFile(filepath.Join(elsewhere, "agents", "a1", "instance_id"))
	if err != nil {
		t.Fatal(err)
	}
	if groups := harness.AgentGroups(string(instance)); len(groups) > 0 {
		t.Errorf("a refused agent left the control groups %v", groups)
	}
	if now := g.AwaitNode(node.GetNodeId(), "to be as before", func(*sutrav1.Node) bool { return true }); now.GetPid() != node.GetPid() {
		t.Errorf("the refused agents changed the node: %v", now)
	}
	g.MustRun("stop", "-n", node.GetNodeId())

	first.Kill()
	g.AwaitAgent("a1", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)
	refused(t, g, 4, "AGENT_OFFLINE", []string{"agent a1 is OFFLINE", "last heard of", "sutra list-agents"}, "spawn", "-a", "a1", "--profile", "sleep")
	refused(t, g, 4, "NO_AGENT_AVAILABLE", []string{"a1 is OFFLINE", "sutra list-agents"}, "spawn", "--profile", "sleep")
	if n := len(g.Nodes(false)) + len(g.NodeProcesses()); n != 0 {
		t.Errorf("the refused spawns left %d nodes or processes", n)
	}
	// While it is away its id is still its own.
	refusedAtStart(t, g, 7, []string{"agent id a1 is taken: it was given a certificate at ", "(AGENT_ID_TAKEN)", "sutra token create --agent-id a1"},
		"agent", "--config", file, "--home", elsewhere, "--join-token", g.Token())
	second := g.LaunchAgent("a1-second", file, "--home", elsewhere, "--join-token", g.TokenFor("a1"))
	g.AwaitAgent("a1", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: "a1", Profile: "sleep"})
	// The first one's turn to be refused.
	refusedAtStart(t, g, 7, []string{"agent id a1 is taken"}, "agent", "--config", file)
	if !second.Running() {
		t.Error("the second agent ended")
	}
}

// An agent whose beats come too rarely for its master is told so at once.
func TestHeartbeatTooRare(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	file := g.AgentFile("a1", "[monitoring]\nheartbeat_interval_secs = 15\n")
	refusedAtStart(t, g, 2, []string{"heartbeat_interval 15s", "shorter than 15s", "(INVALID_ARGUMENT)"}, "agent", "--config", file)
	if out := g.Run("list-agents"); !strings.Contains(out.Stderr, "no agent is registered") {
		t.Errorf("list-agents: %+v", out)
	}
}

// Where root may write anywhere, a disk that is mounted read-only still refuses.
func TestReadOnlyDisk(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("a1", badProfiles)
	dir := filepath.Join(g.Dir, "read-only")
	harness.SmallDisk(t, dir, 1)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatalf("mount read-only: %v", err)
	}
	for _, path := range []string{dir, filepath.Join(dir, "below")} {
		refused(t, g, 7, "PATH_UNUSABLE", []string{path, "read-only file system", "hint: "}, "spawn", "--profile", "sleep", "--storage-path", path)
	}
	nothingLeft(t, g, "a1")
}
