package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

const (
	// maxFileBytes bounds what is read, so that a wrong path does not fill the memory.
	maxFileBytes = 1 << 20

	minPort, maxPort = 1024, 65535
	// maxMemoryMB is a pebibyte: more than any host has, and a number that the contract can carry.
	maxMemoryMB   = 1 << 30
	maxSeconds    = 3600
	maxLabelRunes = 128

	printConfigHint = "`sutra agent --print-config > agent.toml` writes an example"
)

// MaxNodes is how many nodes an agent can be told to have at once.
const MaxNodes = 10000

// Agent is a valid configuration of one agent.
type Agent struct {
	// AgentID satisfies ValidID.
	AgentID string
	// MasterEndpoints are host:port, in the file's order; nil where the file names none, and the
	// agent looks for a master on its own host.
	MasterEndpoints []string
	// AgentPort is where the agent serves gRPC: 1024-65535, or 0 for any free port. Default 8001.
	AgentPort int
	// Advertise is the host:port at which the master reaches the agent; "" lets the agent find out.
	Advertise string
	// Labels describe the host to placement; nil where there are none.
	Labels map[string]string
	// MaxNodes is how many nodes may live here at once, 1-10000. Default 5.
	MaxNodes int
	// BasePort is the first port tried for a node that names none. Default 50051.
	// Invariant: BasePort >= 1024 and BasePort+MaxNodes-1 <= 65535.
	BasePort int
	// DefaultMemoryMB is the limit, in MiB, of a node that names none; at least 1. Default 512.
	DefaultMemoryMB uint64
	// Profiles are the ways to run a storage server, by name. Invariant: "default" is among them.
	Profiles map[string]Profile
	// AllowedPaths are the folders within which a node may have a storage path of its choice, absolute and clean; nil: anywhere but in
	// the home of Sutra. Nodes without such a path lie in the agent's home in any case.
	AllowedPaths []string
	// NodeLogBudgetMB is how much disk, in MiB, the log of one node may take, at least 1; LogBudgetMB how much all logs of
	// the agent may, those of ended nodes with them. Defaults 64 and 1024. Invariant: LogBudgetMB >= NodeLogBudgetMB.
	NodeLogBudgetMB, LogBudgetMB uint64
	// HeartbeatInterval and HealthCheckInterval are whole seconds, 1 s to 1 h. Defaults 5 s and 10 s.
	HeartbeatInterval   time.Duration
	HealthCheckInterval time.Duration
	// MetricsListen is the host:port of the agent's HTTP listener, port 0 for any; "" is off.
	MetricsListen string
}

// LoadAgent reads and validates the agent's file. A relative storage_binary is
// relative to the file's folder.
func LoadAgent(path string) (*Agent, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	return ParseAgent(data, filepath.Dir(path), path)
}

func readFile(path string) ([]byte, error) {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("open configuration %s: %w; %s", path, reason(err), printConfigHint)
	}
	if err != nil {
		return nil, fmt.Errorf("open configuration %s: %w; it must be a file that this user may read", path, reason(err))
	}
	defer func() { _ = file.Close() }() // nothing was written

	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("look at configuration %s: %w", path, reason(err))
	}
	if info.IsDir() {
		return nil, fmt.Errorf("open configuration: %s is a folder; name the file in it, for example %s",
			path, filepath.Join(path, "agent.toml"))
	}
	// One byte more than allowed tells a file that fits from one that does not; a pipe has no size to ask for.
	data, err := io.ReadAll(io.LimitReader(file, maxFileBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read configuration %s: %w", path, reason(err))
	}
	return data, nil
}

// reason is the system's own word for what went wrong with a file, without the verb and the path that os puts before it.
func reason(err error) error {
	if at, ok := errors.AsType[*fs.PathError](err); ok {
		return at.Err
	}
	return err
}

// ParseAgent validates the text of an agent's file. A relative storage_binary is
// relative to dir; messages call the file name. The error holds one line a problem:
// `name:LINE: key: what is wrong; what is allowed`.
func ParseAgent(data []byte, dir, name string) (*Agent, error) {
	doc, err := parseDocument(data, name)
	if err != nil {
		return nil, err
	}
	agent := readAgent(doc, dir)
	doc.refuseUnknown()
	if err := doc.err(); err != nil {
		return nil, err
	}
	return agent, nil
}

// readAgent notes every problem in doc; what it returns is valid only where there is none.
func readAgent(doc *document, dir string) *Agent {
	agent := &Agent{}
	root := doc.root()
	readIdentity(root.child("agent"), agent)
	readStorage(root.child("storage"), agent, dir)

	readLogs(root.child("logs"), agent)
	monitoring := root.child("monitoring")
	agent.HeartbeatInterval = monitoring.seconds("heartbeat_interval_secs", 5, 1)
	agent.HealthCheckInterval = monitoring.seconds("health_check_interval_secs", 10, 1)
	agent.MetricsListen = text(monitoring, "metrics_listen", "", metricsListen)
	return agent
}

func readIdentity(t *table, agent *Agent) {
	agent.AgentID = text(t, "agent_id", "", func(id string) (string, error) { return id, checkID(id) })
	if _, ok := t.values["agent_id"]; !ok && !t.mistyped {
		t.problem("agent_id", `is missing; give this agent a name of its own, for example agent_id = "agent-001"`)
	}
	agent.MasterEndpoints = readEndpoints(t)
	agent.AgentPort = t.port("agent_port", 8001, true)
	agent.Advertise = text(t, "advertise", "", advertise)

	labels := t.child("labels")
	for _, key := range labels.names() {
		if agent.Labels == nil {
			agent.Labels = make(map[string]string)
		}
		if err := checkID(key); err != nil {
			labels.problem(key, "label key %v", err)
		}
		agent.Labels[key] = text(labels, key, "", labelValue)
	}
}

func readEndpoints(t *table) []string {
	const key = "master_endpoint"
	var written []string
	switch value := t.take(key).(type) {
	case nil:
		return nil
	case string:
		written = []string{value}
	case []any:
		written = t.strings(key, value)
		if len(value) == 0 {
			t.problem(key, "is an empty list; name a master, or leave the key out to look for one on this host")
		}
	default:
		t.problem(key, "is %s; must be a string or a list of strings", kindOf(value))
	}
	endpoints := make([]string, 0, len(written))
	for _, w := range written {
		endpoint, err := Endpoint(w)
		if err != nil {
			t.problem(key, "%v", err)
			continue
		}
		endpoints = append(endpoints, endpoint)
	}
	return endpoints
}

func readStorage(t *table, agent *Agent, dir string) {
	agent.MaxNodes = int(t.whole("max_nodes", 5, 1, MaxNodes))
	agent.BasePort = t.port("base_port", 50051, false)
	if agent.BasePort+agent.MaxNodes-1 > maxPort {
		t.problem("base_port", "%d leaves %d ports for max_nodes = %d; base_port + max_nodes - 1 must be at most %d",
			agent.BasePort, maxPort-agent.BasePort+1, agent.MaxNodes, maxPort)
	}
	agent.DefaultMemoryMB = uint64(t.whole("default_memory_mb", 512, 1, maxMemoryMB))

	agent.AllowedPaths = readAllowed(t)

	agent.Profiles = map[string]Profile{DefaultProfile: readProfile(t, DefaultProfile, dir)}
	profiles := t.child("profiles")
	for _, name := range profiles.names() {
		profile := readProfile(profiles.child(name), name, dir)
		if name == DefaultProfile {
			profiles.problem(name, "is the [storage] table itself; set its keys there, or choose another name")
		} else if err := checkID(name); err != nil {
			profiles.problem(name, "profile name %v", err)
		}
		agent.Profiles[name] = profile
	}
}

func readAllowed(t *table) []string {
	const key = "allowed_paths"
	list, ok := read[[]any](t, key, "a list of strings")
	if !ok {
		return nil
	}
	paths := t.strings(key, list)
	for i, path := range paths {
		if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
			t.problem(key, "%.80q is no absolute path; write it from the root on, for example /data", path)
		}
		paths[i] = filepath.Clean(path)
	}
	return paths
}

func readLogs(t *table, agent *Agent) {
	agent.NodeLogBudgetMB = uint64(t.whole("node_budget_mb", 64, 1, maxMemoryMB))
	agent.LogBudgetMB = uint64(t.whole("agent_budget_mb", 1024, 1, maxMemoryMB))
	if agent.LogBudgetMB < agent.NodeLogBudgetMB {
		t.problem("agent_budget_mb", "%d is less than node_budget_mb = %d; it must hold the log of one node at least",
			agent.LogBudgetMB, agent.NodeLogBudgetMB)
	}
}

func labelValue(value string) (string, error) {
	if n := utf8.RuneCountInString(value); n > maxLabelRunes {
		return "", fmt.Errorf("has %d characters; at most %d are allowed", n, maxLabelRunes)
	}
	if strings.ContainsFunc(value, unicode.IsControl) {
		return "", fmt.Errorf("%q has a control character; use printable text", value)
	}
	return value, nil
}
