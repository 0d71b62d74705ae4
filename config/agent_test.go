package config

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func builtinArgs() []string {
	return []string{"--port", "{port}", "--storage-path", "{storage_path}", "--node-id", "{node_id}"}
}

func defaultProfile() Profile {
	return Profile{
		Name: "default", Args: builtinArgs(), Ready: Ready{Kind: "tcp"}, ReadyTimeout: time.Hour, StopSignal: "TERM", StopGrace: 8 * time.Second,
		Restart: "always", SuccessExitCodes: []int{0}, CPUWeight: 100, NoNewPrivileges: true,
	}
}

func defaults() *Agent {
	return &Agent{
		AgentID: "a", AgentPort: 8001, MaxNodes: 5, BasePort: 50051, DefaultMemoryMB: 512,
		NodeLogBudgetMB: 64, LogBudgetMB: 1024,
		Profiles:          map[string]Profile{"default": defaultProfile()},
		HeartbeatInterval: 5 * time.Second, HealthCheckInterval: 10 * time.Second,
	}
}

func mustParse(t *testing.T, text string) *Agent {
	t.Helper()
	agent, err := ParseAgent([]byte(text), "/etc/sutra", "agent.toml")
	if err != nil {
		t.Fatalf("ParseAgent: %v", err)
	}
	return agent
}

func TestDefaults(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"minimal":         "[agent]\nagent_id = 'a'\n",
		"CRLF":            "[agent]\r\nagent_id = 'a'\r\n",
		"byte order mark": "\ufeff[agent]\nagent_id = 'a'",
		"dotted":          "agent.agent_id = 'a'",
		"empty tables":    "[agent]\nagent_id = 'a'\nlabels = {}\n[storage]\n[storage.profiles]\n[monitoring]\n",
		"empty strings":   "[agent]\nagent_id = 'a'\nadvertise = ''\n[storage]\nstorage_binary = ''\n[monitoring]\nmetrics_listen = ''",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if diff := cmp.Diff(defaults(), mustParse(t, text)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestEveryKey(t *testing.T) {
	t.Parallel()
	got := mustParse(t, `
[agent]
agent_id = "rack-1.host_2"
master_endpoint = ["http://10.0.0.1:7001", "master"]
agent_port = 0
advertise = "[fd00::5]:8001"
labels = { rack = "a", "zone.x" = "" }
[storage]
max_nodes = 10000
storage_binary = "bin/../server"
args = []
ready = "http:/healthz?full=1"
ready_timeout_secs = 0
stop_signal = "sigint"
stop_grace_secs = 0
restart = "never"
success_exit_codes = []
cpu_weight = 1
run_as = "root:65532"
no_new_privileges = false
allowed_paths = ["/data//x/", "/"]
base_port = 55536
default_memory_mb = 1
[storage.profiles.redis]
storage_binary = "/usr/bin/redis-server"
args = ["{port}", "{\"json\": {}}", "{storage_path}/{node_id}", "--mem={memory_mb}mb"]
ready = "exec: redis-cli ping"
ready_timeout_secs = 86400
stop_signal = "Quit"
stop_grace_secs = 3600
restart = "on-failure"
success_exit_codes = [0, 143, 255]
cpu_weight = 10000
open_files = 1073741824
run_as = "65531:65532"
no_new_privileges = true
[storage.profiles.bare]
[logs]
node_budget_mb = 1
agent_budget_mb = 1
[monitoring]
heartbeat_interval_secs = 3600
health_check_interval_secs = 1
metrics_listen = "127.0.0.1:0"
`)
	bare := defaultProfile()
	bare.Name = "bare"
	want := &Agent{
		AgentID: "rack-1.host_2", MasterEndpoints: []string{"10.0.0.1:7001", "master:7000"},
		AgentPort: 0, Advertise: "[fd00::5]:8001", Labels: map[string]string{"rack": "a", "zone.x": ""},
		MaxNodes: 10000, BasePort: 55536, DefaultMemoryMB: 1, AllowedPaths: []string{"/data/x", "/"}, NodeLogBudgetMB: 1, LogBudgetMB: 1,
		Profiles: map[string]Profile{
			"default": {
				Name: "default", StorageBinary: "/etc/sutra/server", Args: []string{},
				Ready: Ready{Kind: "http", Arg: "/healthz?full=1"}, StopSignal: "INT",
				Restart: "never", SuccessExitCodes: []int{}, CPUWeight: 1,
				RunAs: &Account{Name: "root:65532", GID: 65532, Groups: []uint32{65532}},
			},
			"redis": {
				Name: "redis", StorageBinary: "/usr/bin/redis-server",
				Args:  []string{"{port}", `{"json": {}}`, "{storage_path}/{node_id}", "--mem={memory_mb}mb"},
				Ready: Ready{Kind: "exec", Arg: "redis-cli ping"}, ReadyTimeout: 24 * time.Hour, StopSignal: "QUIT", StopGrace: time.Hour,
				Restart: "on-failure", SuccessExitCodes: []int{0, 143, 255}, CPUWeight: 10000, OpenFiles: 1 << 30,
				RunAs: &Account{Name: "65531:65532", UID: 65531, GID: 65532, Groups: []uint32{65532}}, NoNewPrivileges: true,
			},
			"bare": bare,
		},
		HeartbeatInterval: time.Hour, HealthCheckInterval: time.Second, MetricsListen: "127.0.0.1:0",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// Nowhere isn't the same as anywhere.
func TestAllowedNowhere(t *testing.T) {
	t.Parallel()
	if got := mustParse(t, "[agent]\nagent_id = 'a'\n[storage]\nallowed_paths = []").AllowedPaths; got == nil || len(got) > 0 {
		t.Errorf("allowed: %#v", got)
	}
}

// A user who is named without a group has all of its groups, which are the same by its number.
func TestRunAsOfAUser(t *testing.T) {
	t.Parallel()
	root := mustParse(t, "[agent]\nagent_id = 'a'\n[storage]\nrun_as = 'root'").Profiles["default"].RunAs
	if root == nil || root.UID != 0 || root.GID != 0 || !slices.Contains(root.Groups, 0) {
		t.Fatalf("root is %+v", root)
	}
	same := mustParse(t, "[agent]\nagent_id = 'a'\n[storage]\nrun_as = '0'").Profiles["default"].RunAs
	same.Name = root.Name
	if diff := cmp.Diff(root, same); diff != "" {
		t.Errorf("by name and by number (-name +number):\n%s", diff)
	}
}

// TestRefused has one problem a file, and wants exactly that one line.
func TestRefused(t *testing.T) {
	t.Parallel()
	const id = "[agent]\nagent_id = 'a'\n" // what follows is line 3
	const ports = "; use 1024 to 65535"
	for name, test := range map[string]struct{ text, want string }{
		"empty":           {"", "agent.toml: is empty; `sutra agent --print-config > agent.toml` writes an example"},
		"blank":           {" \r\n\t\n", "agent.toml: is empty; `sutra agent --print-config > agent.toml` writes an example"},
		"only a comment":  {"# soon\n", `agent.toml: agent.agent_id: is missing; give this agent a name of its own, for example agent_id = "agent-001"`},
		"no id":           {"\n[agent]\nagent_port = 0", `agent.toml:2: agent.agent_id: is missing; give this agent a name of its own, for example agent_id = "agent-001"`},
		"syntax":          {id + "agent_port = \n", "agent.toml:3: column 14: not valid TOML: "},
		"bare word":       {"[agent]\nagent_id = agent-001", "agent.toml:2: column 12: not valid TOML: "},
		"bare CR":         {"[agent]\ragent_id = 'a'", "agent.toml:1: column 8: not valid TOML: "},
		"duplicate key":   {id + "agent_id = 'b'", "agent.toml:3: column 1: not valid TOML: key agent_id is already defined"},
		"duplicate table": {id + "[storage]\n[storage]", "agent.toml:4: column 2: not valid TOML: table storage already exists"},
		"duplicate break": {id + "\"x\\ny\" = 1\n\"x\\ny\" = 2", "agent.toml:4: column 1: not valid TOML: key x y is already defined"},
		"huge number":     {id + "agent_port = 99999999999999999999", "agent.toml:3: column 14: not valid TOML: decimal number is too large"},
		"not UTF-8":       {id + "# caf\xe9\n", "agent.toml:3: is not UTF-8 text; save the file as UTF-8"},
		"UTF-16":          {"\xff\xfe[\x00a\x00", "agent.toml:1: is not UTF-8 text; save the file as UTF-8"},
		"too large":       {id + strings.Repeat("#", maxFileBytes), "agent.toml: is larger than 1 MiB"},

		"near key":         {id + "[storage]\nmax_node = 5", "agent.toml:4: storage.max_node: unknown key; did you mean max_nodes?"},
		"case":             {id + "AGENT_PORT = 1", "agent.toml:3: agent.AGENT_PORT: unknown key; did you mean agent_port?"},
		"near table":       {id + "[storge]", "agent.toml:3: storge: unknown table; did you mean storage?"},
		"near in profile":  {id + "[storage.profiles.redis]\nstop_sinal = 'INT'", "agent.toml:4: storage.profiles.redis.stop_sinal: unknown key; did you mean stop_signal?"},
		"far key":          {id + "[monitoring]\nzzzzzzzzzzzzz = 5", "agent.toml:4: monitoring.zzzzzzzzzzzzz: unknown key; allowed here: heartbeat_interval_secs, health_check_interval_secs, metrics_listen"},
		"long key":         {id + strings.Repeat("x", 300) + " = 5", "unknown key; allowed here: agent_id, master_endpoint, agent_port, advertise, labels"},
		"elsewhere":        {id + "base_port = 50051", "agent.toml:3: agent.base_port: unknown key; it belongs in [storage]"},
		"table elsewhere":  {id + "[profiles.redis]", "agent.toml:3: profiles: unknown table; it belongs in [storage]"},
		"not of a profile": {id + "[storage.profiles.redis]\nmax_nodes = 1", "agent.toml:4: storage.profiles.redis.max_nodes: unknown key; it belongs in [storage]"},
		"a label's name":   {id + "rack = 'a'\nlabels.rack = 'a'", "agent.toml:3: agent.rack: unknown key; allowed here: agent_id"},
		"a top table":      {id + "[storage.agent]", "agent.toml:3: storage.agent: unknown table; allowed here: max_nodes"},
		"in inline table":  {id + "[storage]\nprofiles = { x = { args = [],\n raedy = 'tcp' } }", "agent.toml:5: storage.profiles.x.raedy: unknown key; did you mean ready?"},
		"odd key":          {id + "\"x.y\" = 1", "agent.toml:3: agent.\"x.y\": unknown key; allowed here: agent_id"},

		"id a number":       {"[agent]\nagent_id = 1", "agent.toml:2: agent.agent_id: is a whole number; must be a string"},
		"port a string":     {id + "agent_port = '8001'", "agent.toml:3: agent.agent_port: is a string; must be a whole number"},
		"fraction":          {id + "[monitoring]\nheartbeat_interval_secs = 0.5", "agent.toml:4: monitoring.heartbeat_interval_secs: is a decimal number; must be a whole number"},
		"bool":              {id + "[storage]\nmax_nodes = true", "agent.toml:4: storage.max_nodes: is true or false; must be a whole number"},
		"date":              {id + "[storage]\nready = 2024-01-01", "agent.toml:4: storage.ready: is a date or time; must be a string"},
		"a table":           {id + "[agent.advertise]", "agent.toml:3: agent.advertise: is a table; must be a string"},
		"args a string":     {id + "[storage]\nargs = '--port'", "agent.toml:4: storage.args: is a string; must be a list of strings"},
		"args of a number":  {id + "[storage]\nargs = ['--port', 6379]", "agent.toml:4: storage.args: element 2 is a whole number; must be a string, in quotes"},
		"agent no table":    {"agent = 'a'", "agent.toml:1: agent: is a string; must be a table"},
		"storage a list":    {id + "[[storage]]\nmax_nodes = 1", "agent.toml:3: storage: is a list; must be a table"},
		"profile no table":  {id + "[storage.profiles]\nredis = '/bin/redis'", "agent.toml:4: storage.profiles.redis: is a string; must be a table"},
		"label a number":    {id + "labels = { rack = 1 }", "agent.toml:3: agent.labels.rack: is a whole number; must be a string"},
		"labels a list":     {id + "labels = ['a']", "agent.toml:3: agent.labels: is a list; must be a table"},
		"master a number":   {id + "master_endpoint = 7000", "agent.toml:3: agent.master_endpoint: is a whole number; must be a string or a list of strings"},
		"master no strings": {id + "master_endpoint = ['m', true]", "agent.toml:3: agent.master_endpoint: element 2 is true or false; must be a string, in quotes"},

		"empty id":        {"[agent]\nagent_id = ''", "agent.toml:2: agent.agent_id: is empty; letters, digits, - _ and . are allowed, 1 to 64 of them"},
		"odd id":          {"[agent]\nagent_id = 'a b'", `agent.toml:2: agent.agent_id: "a b" has " " in it; letters`},
		"empty master":    {id + "master_endpoint = ''", `agent.toml:3: agent.master_endpoint: "" is empty; write host:port`},
		"no masters":      {id + "master_endpoint = []", "agent.toml:3: agent.master_endpoint: is an empty list; name a master"},
		"label key":       {id + "labels = { 'a b' = '' }", `agent.toml:3: agent.labels."a b": label key "a b" has " " in it; letters`},
		"label value":     {id + "[agent.labels]\nrack = \"a\\tb\"", `agent.toml:4: agent.labels.rack: "a\tb" has a control character; use printable text`},
		"long label":      {id + "labels.rack = '" + strings.Repeat("é", 129) + "'", "agent.toml:3: agent.labels.rack: has 129 characters; at most 128 are allowed"},
		"negative port":   {id + "agent_port = -1", "agent.toml:3: agent.agent_port: -1 is not a usable port" + ports + ", or 0 for any free port"},
		"privileged":      {id + "agent_port = 1023", "agent.toml:3: agent.agent_port: 1023 is a privileged port, which only root may open" + ports + ", or 0 for any free port"},
		"high port":       {id + "agent_port = 70000", "agent.toml:3: agent.agent_port: 70000 is not a usable port" + ports + ", or 0 for any free port"},
		"base zero":       {id + "[storage]\nbase_port = 0", "agent.toml:4: storage.base_port: 0 is not a usable port" + ports},
		"base privilege":  {id + "[storage]\nbase_port = 80", "agent.toml:4: storage.base_port: 80 is a privileged port, which only root may open" + ports},
		"base high":       {id + "[storage]\nbase_port = 65536", "agent.toml:4: storage.base_port: 65536 is not a usable port" + ports},
		"no room":         {id + "[storage]\nmax_nodes = 10\nbase_port = 65527", "agent.toml:5: storage.base_port: 65527 leaves 9 ports for max_nodes = 10; base_port + max_nodes - 1 must be at most 65535"},
		"no nodes":        {id + "[storage]\nmax_nodes = 0", "agent.toml:4: storage.max_nodes: 0 is out of range; allowed: 1 to 10000"},
		"many nodes":      {id + "[storage]\nmax_nodes = 10001", "agent.toml:4: storage.max_nodes: 10001 is out of range; allowed: 1 to 10000"},
		"no memory":       {id + "[storage]\ndefault_memory_mb = 0", "agent.toml:4: storage.default_memory_mb: 0 is out of range; allowed: 1 to 1073741824"},
		"no log":          {id + "[logs]\nnode_budget_mb = 0", "agent.toml:4: logs.node_budget_mb: 0 is out of range; allowed: 1 to 1073741824"},
		"no logs":         {id + "[logs]\nagent_budget_mb = 63", "agent.toml:4: logs.agent_budget_mb: 63 is less than node_budget_mb = 64; it must hold the log of one node at least"},
		"no heartbeat":    {id + "[monitoring]\nheartbeat_interval_secs = 0", "agent.toml:4: monitoring.heartbeat_interval_secs: 0 is out of range; allowed: 1 to 3600"},
		"slow check":      {id + "[monitoring]\nhealth_check_interval_secs = 3601", "agent.toml:4: monitoring.health_check_interval_secs: 3601 is out of range; allowed: 1 to 3600"},
		"negative grace":  {id + "[storage]\nstop_grace_secs = -1", "agent.toml:4: storage.stop_grace_secs: -1 is out of range; allowed: 0 to 3600"},
		"long grace":      {id + "[storage]\nstop_grace_secs = 3601", "agent.toml:4: storage.stop_grace_secs: 3601 is out of range; allowed: 0 to 3600"},
		"no weight":       {id + "[storage]\ncpu_weight = 0", "agent.toml:4: storage.cpu_weight: 0 is out of range; allowed: 1 to 10000"},
		"great weight":    {id + "[storage.profiles.x]\ncpu_weight = 10001", "agent.toml:4: storage.profiles.x.cpu_weight: 10001 is out of range; allowed: 1 to 10000"},
		"negative files":  {id + "[storage]\nopen_files = -1", "agent.toml:4: storage.open_files: -1 is out of range; allowed: 0 to 1073741824"},
		"many files":      {id + "[storage]\nopen_files = 1073741825", "agent.toml:4: storage.open_files: 1073741825 is out of range; allowed: 0 to 1073741824"},
		"unknown user":    {id + "[storage]\nrun_as = 'no-such-user'", `agent.toml:4: storage.run_as: there is no user "no-such-user" on this host; make one, or write "user" or "user:group", by name or number`},
		"unknown group":   {id + "[storage]\nrun_as = 'root:no-such-group'", `agent.toml:4: storage.run_as: there is no group "no-such-group" on this host; make one, or write its number`},
		"unknown id":      {id + "[storage]\nrun_as = '65531'", `agent.toml:4: storage.run_as: there is no user with the id 65531 on this host, whose groups it could have; write 65531:GROUP`},
		"no id at all":    {id + "[storage]\nrun_as = '4294967295:0'", `agent.toml:4: storage.run_as: there is no user "4294967295" on this host`},
		"half an account": {id + "[storage.profiles.x]\nrun_as = 'root:'", `agent.toml:4: storage.profiles.x.run_as: "root:" is half an account; write "user" or "user:group"`},
		"id unquoted":     {id + "[storage]\nrun_as = 1000", `agent.toml:4: storage.run_as: is a whole number; must be a string`},
		"privileges":      {id + "[storage]\nno_new_privileges = 1", `agent.toml:4: storage.no_new_privileges: is a whole number; must be true or false`},
		"allowed path":    {id + "[storage]\nallowed_paths = ['/data', 'data']", `agent.toml:4: storage.allowed_paths: "data" is no absolute path; write it from the root on`},
		"allowed text":    {id + "[storage]\nallowed_paths = '/data'", `agent.toml:4: storage.allowed_paths: is a string; must be a list of strings`},
		"allowed number":  {id + "[storage]\nallowed_paths = [1]", `agent.toml:4: storage.allowed_paths: element 1 is a whole number; must be a string, in quotes`},
		"allowed anew":    {id + "[storage.profiles.x]\nallowed_paths = []", `agent.toml:4: storage.profiles.x.allowed_paths: unknown key; it belongs in [storage]`},
		"signal":          {id + "[storage]\nstop_signal = 'STOP'", `agent.toml:4: storage.stop_signal: unknown signal "STOP"; allowed: TERM, INT, QUIT, HUP, USR1, USR2, KILL`},
		"policy":          {id + "[storage]\nrestart = 'on_failure'", `agent.toml:4: storage.restart: unknown policy "on_failure"; allowed: always, on-failure, never`},
		"exit code":       {id + "[storage]\nsuccess_exit_codes = [0, 256]", "agent.toml:4: storage.success_exit_codes: element 2, 256, is out of range; allowed: 0 to 255"},
		"worded code":     {id + "[storage]\nsuccess_exit_codes = ['0']", "agent.toml:4: storage.success_exit_codes: element 1 is a string; must be a whole number"},
		"single code":     {id + "[storage]\nsuccess_exit_codes = 0", "agent.toml:4: storage.success_exit_codes: is a whole number; must be a list of whole numbers"},
		"probe":           {id + "[storage]\nready = 'udp'", `agent.toml:4: storage.ready: unknown probe "udp"; allowed: tcp, http:/path, grpc, exec:CMD, none`},
		"tcp argument":    {id + "[storage]\nready = 'tcp:80'", `agent.toml:4: storage.ready: unknown probe "tcp:80"; allowed`},
		"http alone":      {id + "[storage]\nready = 'http'", `agent.toml:4: storage.ready: unknown probe "http"; allowed`},
		"http URL":        {id + "[storage]\nready = 'http://h/x y'", `agent.toml:4: storage.ready: "http://h/x y" needs a path; write it as http:/path`},
		"http other host": {id + "[storage]\nready = 'http:http://h/x'", `agent.toml:4: storage.ready: "http:http://h/x" needs a path; write it as http:/path`},
		"http relative":   {id + "[storage]\nready = 'http:x'", `agent.toml:4: storage.ready: "http:x" needs a path; write it as http:/path`},
		"exec nothing":    {id + "[storage]\nready = 'exec: '", "agent.toml:4: storage.ready: exec needs a command; write it as exec:CMD"},
		"placeholder":     {id + "[storage]\nargs = ['-p{port}', '{node-id}']", "agent.toml:4: storage.args: unknown placeholder {node-id}; allowed: {port} {storage_path} {node_id} {memory_mb}"},
		"zero in arg":     {id + "[storage]\nargs = [\"a\\u0000\"]", `agent.toml:4: storage.args: "a\x00" has a zero byte`},
		"zero in binary":  {id + "[storage]\nstorage_binary = \"a\\u0000\"", `agent.toml:4: storage.storage_binary: "a\x00" has a zero byte`},
		"profile name":    {id + "[storage.profiles.'a b']", `agent.toml:3: storage.profiles."a b": profile name "a b" has " " in it; letters`},
		"default twice":   {id + "[storage.profiles.default]", "agent.toml:3: storage.profiles.default: is the [storage] table itself; set its keys there, or choose another name"},
		"advertise":       {id + "advertise = '10.0.0.5'", `agent.toml:3: agent.advertise: "10.0.0.5" has no port; write the host:port at which the master reaches this agent`},
		"metrics listen":  {id + "[monitoring]\nmetrics_listen = ':9090'", `agent.toml:4: monitoring.metrics_listen: ":9090" has no host; write host:port`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			agent, err := ParseAgent([]byte(test.text), "/etc/sutra", "agent.toml")
			if err == nil {
				t.Fatalf("accepted as %+v; want %s", agent, test.want)
			}
			if !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error:\n%v\nwant one line with:\n%s", err, test.want)
			}
		})
	}
}

func TestAllProblemsAtOnce(t *testing.T) {
	t.Parallel()
	_, err := ParseAgent([]byte(`[storage.profiles.x]
redy = "tcp"
[monitoring]
metrics_listen = 9090
[storage]
max_nodes = 0
base_port = 80
`), "", "conf/agent.toml")
	want := `conf/agent.toml:2: storage.profiles.x.redy: unknown key; did you mean ready?
conf/agent.toml:4: monitoring.metrics_listen: is a whole number; must be a string
conf/agent.toml:6: storage.max_nodes: 0 is out of range; allowed: 1 to 10000
conf/agent.toml:7: storage.base_port: 80 is a privileged port, which only root may open; use 1024 to 65535
conf/agent.toml: agent.agent_id: is missing; give this agent a name of its own, for example agent_id = "agent-001"`
	if err == nil {
		t.Fatal("accepted")
	}
	if diff := cmp.Diff(want, err.Error()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// A dotted key of half a million parts must not cost the square of its length.
func TestDeepKey(t *testing.T) {
	t.Parallel()
	deep := "[agent]\nagent_id = 'a'\n" + strings.Repeat("x.", 400_000) + "x = 1\n"
	_, err := ParseAgent([]byte(deep), "", "agent.toml")
	if err == nil || !strings.HasPrefix(err.Error(), "agent.toml:3: agent.x: unknown table") {
		t.Errorf("error: %v", err)
	}
}

func TestLoadAgent(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "agent.toml")
	if err := os.WriteFile(path, []byte("[agent]\nagent_id='a'\n[storage]\nstorage_binary='bin/server'"), 0o600); err != nil {
		t.Fatal(err)
	}
	agent, err := LoadAgent(path)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := agent.Profiles["default"].StorageBinary, filepath.Join(dir, "bin", "server"); got != want {
		t.Errorf("storage binary %s, want %s", got, want)
	}

	missing := filepath.Join(dir, "none.toml")
	_, err = LoadAgent(missing)
	if !errors.Is(err, fs.ErrNotExist) || !strings.HasPrefix(err.Error(), "open configuration "+missing+": no such file") || !strings.Contains(err.Error(), printConfigHint) {
		t.Errorf("missing file: %v", err)
	}
	if _, err = LoadAgent(dir); err == nil || !strings.Contains(err.Error(), dir+" is a folder; name the file in it") {
		t.Errorf("folder: %v", err)
	}
	if _, err = LoadAgent("/dev/zero"); err == nil || !strings.Contains(err.Error(), "/dev/zero: is larger than 1 MiB") {
		t.Errorf("endless file: %v", err)
	}
	if err := os.WriteFile(path, []byte("[agent]\nagent_id=1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err = LoadAgent(path); err == nil || !strings.HasPrefix(err.Error(), path+":2: agent.agent_id: ") {
		t.Errorf("bad file: %v", err)
	}
}

// A relative path given by name must yield an absolute binary too.
func TestLoadAgentFromRelativePath(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	if err := os.WriteFile("agent.toml", []byte("[agent]\nagent_id='a'\n[storage]\nstorage_binary='server'"), 0o600); err != nil {
		t.Fatal(err)
	}
	agent, err := LoadAgent("agent.toml")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := agent.Profiles["default"].StorageBinary, filepath.Join(dir, "server"); got != want {
		t.Errorf("storage binary %s, want %s", got, want)
	}
}

func FuzzParseAgent(f *testing.F) {
	// Small seeds: the fuzzer mutates and minimizes them far faster than the example file.
	for _, seed := range []string{
		"agent.agent_id='a'",
		"[agent]\nagent_id='a'\nmaster_endpoint=['http://h','::1']\nagent_port=0\nadvertise='h:1'\nlabels={a='b'}",
		"agent={agent_id='a'}\n[storage]\nmax_nodes=9\nbase_port=60000\ndefault_memory_mb=7\nstorage_binary='x'",
		"agent={agent_id='a'}\n[storage.profiles.x]\nargs=['{port}']\nready='http:/x'\nstop_signal='sigint'\nstop_grace_secs=1",
		"agent={agent_id='a'}\n[storage]\nready='exec:x'\n[monitoring]\nheartbeat_interval_secs=1\nmetrics_listen='h:0'",
		"a={b={c={d={e={f=1}}}}}\n[[z]]\n\"\\n\"=1\n\"\\n\"=2",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		agent, err := ParseAgent(data, "/dir", "agent.toml")
		if err != nil {
			if agent != nil {
				t.Error("an agent and an error")
			}
			for line := range strings.Lines(err.Error()) {
				if !strings.HasPrefix(line, "agent.toml:") {
					t.Errorf("a line without its place: %q", line)
				}
			}
			return
		}
		checkInvariants(t, agent)
	})
}

func checkInvariants(t *testing.T, agent *Agent) {
	t.Helper()
	if err := ValidID("agent id", agent.AgentID); err != nil {
		t.Error(err)
	}
	for _, endpoint := range agent.MasterEndpoints {
		if again, err := Endpoint(endpoint); err != nil || again != endpoint {
			t.Errorf("endpoint %q becomes %q, %v", endpoint, again, err)
		}
	}
	if agent.MasterEndpoints != nil && len(agent.MasterEndpoints) == 0 {
		t.Error("an empty list of masters")
	}
	if p := agent.AgentPort; p != 0 && (p < 1024 || p > 65535) {
		t.Errorf("agent port %d", p)
	}
	if agent.MaxNodes < 1 || agent.BasePort < 1024 || agent.BasePort+agent.MaxNodes-1 > 65535 {
		t.Errorf("%d nodes from port %d", agent.MaxNodes, agent.BasePort)
	}
	if agent.DefaultMemoryMB < 1 {
		t.Error("no memory")
	}
	if agent.NodeLogBudgetMB < 1 || agent.LogBudgetMB < agent.NodeLogBudgetMB {
		t.Errorf("log budgets %d and %d", agent.NodeLogBudgetMB, agent.LogBudgetMB)
	}
	for _, interval := range []time.Duration{agent.HeartbeatInterval, agent.HealthCheckInterval} {
		if interval < time.Second || interval > time.Hour {
			t.Errorf("interval %v", interval)
		}
	}
	if _, ok := agent.Profiles["default"]; !ok {
		t.Error("no default profile")
	}
	for name, p := range agent.Profiles {
		if ValidID("profile", name) != nil || p.Name != name || p.Args == nil || p.StopSignal == "" || p.Ready.Kind == "" {
			t.Errorf("profile %q: %+v", name, p)
		}
		if p.StorageBinary != "" && !filepath.IsAbs(p.StorageBinary) {
			t.Errorf("profile %q: relative binary %q", name, p.StorageBinary)
		}
		if (p.Ready.Kind == "http" || p.Ready.Kind == "exec") == (p.Ready.Arg == "") {
			t.Errorf("profile %q: probe %+v", name, p.Ready)
		}
	}
}
