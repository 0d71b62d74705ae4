package e2e_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/sutra-grid/sutra/e2e/harness"
)

// A client that others made, with nothing but the files that lie in the homes: it finds the grid's own word for itself in the
// certificates of master and agent, and may do what the identity that it shows may, no more.
func TestGrpcurl(t *testing.T) {
	t.Parallel()
	harness.Need(t, "grpcurl")
	g, other := harness.New(t), harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", manyProfiles)
	g.StartAgent("agent-002", manyProfiles)
	other.StartMaster()
	_, grid := g.Authority()
	_, otherGrid := other.Authority()
	one, two := agentOf(t, g, "agent-001").GetEndpoint(), agentOf(t, g, "agent-002").GetEndpoint()

	admin, foreign := filepath.Join(g.Home, "credentials", grid+".pem"), filepath.Join(other.Home, "credentials", otherGrid+".pem")
	agent := filepath.Join(g.Home, "agents", "agent-001", "identity.pem")
	person := func(role string) (file string) {
		home, token := filepath.Join(g.Dir, role), strings.TrimSpace(g.MustRun("token", "create", "--role", role))
		g.MustRun("login", "--home", home, "--master", g.Endpoint, "--token", token, "--name", role)
		return filepath.Join(home, "credentials", grid+".pem")
	}
	viewer, operator := person("viewer"), person("operator")

	// What a caller shows of itself, and whom it takes for the grid.
	trusting := func(file, name string) []string { return []string{"-cacert", file, "-servername", name} }
	nobody := trusting(admin, grid)
	showing := func(file string, trust ...string) []string {
		return append([]string{"-cert", file, "-key", file}, trust...)
	}
	as := func(file string) []string { return showing(file, nobody...) }
	anybody := []string{"-insecure"}

	ok, denied, unknown := 0, 64+int(codes.PermissionDenied), 64+int(codes.Unauthenticated)
	const failed = 1 // before the call itself
	spawn := `{"agent_id": "agent-001", "profile": "sleep"}`
	direct := func(agent string) string {
		return fmt.Sprintf(`{"node": {"node_id": "node-eve", "agent_id": %q, "profile": "sleep"}}`, agent)
	}
	for _, c := range []struct {
		who      string
		at       string
		identity []string
		method   string
		request  string // "": grpcurl's own verb is meant, and the contract is asked for
		code     int
		says     string
	}{
		{"an admin", g.Endpoint, as(admin), "list", "", ok, "sutra.v1.GridMaster\n"},
		{"an admin", one, as(admin), "list", "", ok, "sutra.v1.GridAgent\n"},
		{"an admin", g.Endpoint, as(admin), "GridMaster/GetClusterStatus", "{}", ok, fmt.Sprintf(`"gridId": %q`, grid)},
		{"an admin", g.Endpoint, as(admin), "GridMaster/SpawnNode", spawn, ok, `"phase": "PHASE_RUNNING"`},
		{"an admin", g.Endpoint, as(admin), "GridMaster/ListNodes", "{}", ok, `"nodeId": "node-`},
		{"an admin", one, as(admin), "GridAgent/SpawnNode", direct("agent-001"), denied, "that takes the role master"},

		{"a viewer", g.Endpoint, as(viewer), "GridMaster/ListNodes", "{}", ok, `"nodeId": "node-`},
		{"a viewer", g.Endpoint, as(viewer), "GridMaster/GetClusterStatus", "{}", ok, fmt.Sprintf(`"gridId": %q`, grid)},
		{"a viewer", g.Endpoint, as(viewer), "GridMaster/SpawnNode", spawn, denied, "user viewer, whose role is viewer, may not call SpawnNode"},
		{"a viewer", g.Endpoint, as(viewer), "list", "", failed, "that takes the role admin"},
		{"a viewer", one, as(viewer), "list", "", failed, "that takes the role admin"},

		{"an operator", g.Endpoint, as(operator), "GridMaster/SpawnNode", spawn, ok, `"phase": "PHASE_RUNNING"`},
		{"an operator", g.Endpoint, as(operator), "GridMaster/CreateToken", "{}", denied, "user operator, whose role is operator, may not call CreateToken"},
		{"an operator", one, as(operator), "GridAgent/SpawnNode", direct("agent-001"), denied, "that takes the role master"},
		{"an operator", g.Endpoint, as(operator), "list", "", failed, "that takes the role admin"},

		{"an agent", g.Endpoint, as(agent), "GridMaster/Heartbeat", `{"agent_id": "agent-001", "epoch": 1, "sequence": 1}`, ok, "{}"}, // older than those that it sent
		{"an agent", g.Endpoint, as(agent), "GridMaster/Heartbeat", `{"agent_id": "agent-002", "epoch": 1, "sequence": 1}`, denied, `agent agent-001 may not speak for agent "agent-002"`},
		{"an agent", g.Endpoint, as(agent), "GridMaster/SpawnNode", spawn, denied, "agent agent-001, whose role is agent, may not call SpawnNode"},
		{"an agent", g.Endpoint, as(agent), "GridMaster/ListNodes", "{}", denied, "agent agent-001, whose role is agent, may not call ListNodes"},
		{"an agent", two, as(agent), "GridAgent/SpawnNode", direct("agent-002"), denied, "agent agent-001, whose role is agent, may not call SpawnNode"},
		{"an agent", two, as(agent), "GridAgent/ListNodes", `{"agent_id": "agent-002"}`, denied, "agent agent-001, whose role is agent, may not call ListNodes"},
		{"an agent", g.Endpoint, as(agent), "list", "", failed, "that takes the role admin"},

		{"nobody", g.Endpoint, nobody, "GridMaster/SpawnNode", spawn, unknown, "it shows no certificate"},
		{"nobody", one, nobody, "GridAgent/SpawnNode", direct("agent-001"), unknown, "it shows no certificate"},
		{"nobody", g.Endpoint, nobody, "list", "", failed, "it shows no certificate"},
		{"one who takes anybody", g.Endpoint, anybody, "GridMaster/SpawnNode", spawn, unknown, "it shows no certificate"},
		{"one who takes anybody", one, anybody, "GridAgent/SpawnNode", direct("agent-001"), unknown, "it shows no certificate"},
		{"one who takes anybody", g.Endpoint, anybody, "list", "", failed, "it shows no certificate"},
		{"another grid's admin", g.Endpoint, showing(foreign, anybody...), "GridMaster/SpawnNode", spawn, unknown, "the caller isn't known here"},

		{"one in the clear", g.Endpoint, []string{"-plaintext"}, "GridMaster/SpawnNode", spawn, failed, "Failed to dial target host"},
		{"one in the clear", one, []string{"-plaintext"}, "GridAgent/SpawnNode", direct("agent-001"), failed, "Failed to dial target host"},
		{"one who knows nobody", g.Endpoint, nil, "GridMaster/SpawnNode", spawn, failed, "failed to verify certificate"},
		{"one who looks for another grid", g.Endpoint, trusting(foreign, otherGrid), "GridMaster/SpawnNode", spawn, failed, "certificate is valid for " + grid + ", not " + otherGrid},
		{"one with another grid's root", g.Endpoint, trusting(foreign, grid), "GridMaster/SpawnNode", spawn, failed, "certificate signed by unknown authority"},
	} {
		args := append([]string{"-connect-timeout", "60"}, c.identity...)
		switch {
		case c.request == "":
			args = append(args, c.at, c.method)
		case c.who == "an admin": // who asks the grid itself for the contract
			args = append(args, "-d", c.request, c.at, "sutra.v1."+c.method)
		default:
			args = append(args, "-import-path", "../proto", "-proto", "sutra/v1/grid_master.proto", "-proto", "sutra/v1/grid_agent.proto",
				"-d", c.request, c.at, "sutra.v1."+c.method)
		}
		var out bytes.Buffer
		cmd := exec.CommandContext(t.Context(), "grpcurl", args...)
		cmd.Stdout, cmd.Stderr = &out, &out
		var exit *exec.ExitError
		if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		if code := cmd.ProcessState.ExitCode(); code != c.code || !strings.Contains(out.String(), c.says) {
			t.Errorf("%s calls %s at %s: exit code %d, want %d with %q\n%s", c.who, c.method, c.at, code, c.code, c.says, &out)
		}
		if c.code == ok && c.request != "" && !json.Valid(out.Bytes()) {
			t.Errorf("%s gets as answer of %s:\n%s", c.who, c.method, &out)
		}
	}
	// The others' spawns did nothing.
	if nodes := g.Nodes(true); len(nodes) != 2 {
		t.Errorf("an admin and an operator spawned a node each, and there are %v", nodes)
	}
}
