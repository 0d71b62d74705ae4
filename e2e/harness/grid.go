package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// Grid is a home of its own and the processes that run from it.
type Grid struct {
	t testing.TB
	// Dir is the test's folder; Home, the grid's, lies in it.
	Dir, Home string
	// Env is what every process of the grid gets; no more.
	Env []string
	// Binary is what every process of the grid runs from its start on.
	Binary string

	master  *Process
	agents  []*Process
	channel *rpc.Channel
	// credentials are replaced where a master makes a grid anew.
	credentials atomic.Pointer[[]*pki.Credentials]
	// Endpoint of the master, once it runs.
	Endpoint string
	// HTTP address of the master, once it runs.
	HTTP string
}

// New makes an empty grid. At the test's end its processes are stopped in good order. Nodes outlive their agents, and
// so they may run on: those that the master wants to run, each in one session. Any other process of a node is
// an orphan or a double, and a control group of any other node a leftover: the test fails. Where no master runs
// in the end, none is wanted.
func New(t testing.TB) *Grid {
	t.Helper()
	dir := t.TempDir()
	g := &Grid{t: t, Dir: dir, Home: filepath.Join(dir, "home"), Binary: Binary(t)}
	g.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "SUTRA_HOME=" + g.Home, "TMPDIR=" + dir, "GORACE=halt_on_error=1 atexit_sleep_ms=10"}
	t.Cleanup(g.end)
	return g
}

// StartMaster runs a master on free ports and waits until it answers.
func (g *Grid) StartMaster(args ...string) *Process {
	g.t.Helper()
	announced := filepath.Join(g.Home, "run", "master.json")
	_ = os.Remove(announced) // a killed master leaves it
	listen := "127.0.0.1:0"
	if g.Endpoint != "" {
		listen = g.Endpoint // where its agents look for it
	}
	g.master = start(g.t, g.Binary, g.Dir, "master", g.Env, append([]string{"master", "--listen", listen, "--http", "127.0.0.1:0"}, args...)...)
	Await(g.t, "the master to announce itself", func() error {
		if !g.master.Running() {
			g.t.Fatalf("the master ended:\n%s", g.master.Log())
		}
		data, err := os.ReadFile(announced)
		if err != nil {
			return err
		}
		var said struct{ Endpoint, HTTP string }
		if err := json.Unmarshal(data, &said); err != nil {
			return err
		}
		g.Endpoint, g.HTTP = said.Endpoint, said.HTTP
		return nil
	})
	g.BecomeAdmin()
	if g.channel == nil {
		g.channel = rpc.Master(g.Endpoint, g.Credentials, nil)
	}
	Await(g.t, "the master to answer", func() error {
		_, err := g.Client().GetClusterStatus(g.t.Context(), &sutrav1.GetClusterStatusRequest{})
		return err
	})
	return g.master
}

// BecomeAdmin gives the test an admin's identity, by the grid's newest root.
func (g *Grid) BecomeAdmin() {
	g.t.Helper()
	_, grid := g.Authority()
	admin := g.As(pki.UserIdentity(grid, "test", sutrav1.Role_ROLE_ADMIN))()
	g.credentials.Store(&admin)
}

// Credentials are an admin's, which last for as long as any test.
func (g *Grid) Credentials() []*pki.Credentials { return *g.credentials.Load() }

// Authority is the grid's, with its key, and the grid's id: whoever has that key may be anybody.
func (g *Grid) Authority() (a *pki.Authority, grid string) {
	g.t.Helper()
	files, err := filepath.Glob(filepath.Join(g.Home, "credentials", "*.pem"))
	if err != nil || len(files) == 0 {
		g.t.Fatalf("no credentials in %s (%v)", g.Home, err)
	}
	for _, file := range files { // one a grid that a master made here
		grid = strings.TrimSuffix(filepath.Base(file), ".pem")
		if a, err = pki.OpenAuthority(filepath.Join(g.Home, "master", "pki"), grid); err == nil {
			return a, grid
		}
	}
	g.t.Fatal(err)
	return nil, ""
}

// As are credentials of anybody in this grid.
func (g *Grid) As(id pki.Identity) func() []*pki.Credentials {
	g.t.Helper()
	a, _ := g.Authority()
	c, err := a.Own(id, 24*time.Hour)
	if err != nil {
		g.t.Fatal(err)
	}
	return func() []*pki.Credentials { return []*pki.Credentials{c} }
}

// Token is a join token of this grid for one agent, of whatever id that is free.
func (g *Grid) Token() string {
	g.t.Helper()
	resp, err := g.Client().CreateToken(g.t.Context(), &sutrav1.CreateTokenRequest{})
	if err != nil {
		g.t.Fatal(err)
	}
	return resp.GetSecret()
}

// TokenFor is a join token of this grid for one agent, whether or not there was one of that id.
func (g *Grid) TokenFor(agentID string) string {
	g.t.Helper()
	resp, err := g.Client().CreateToken(g.t.Context(), &sutrav1.CreateTokenRequest{AgentId: agentID})
	if err != nil {
		g.t.Fatal(err)
	}
	return resp.GetSecret()
}

// AgentFile is the file of an agent on any free port; storage is what stands in its [storage] section, and below.
func (g *Grid) AgentFile(id, storage string) string {
	g.t.Helper()
	path := filepath.Join(g.Dir, id+".toml")
	base := g.FreePort()
	lastPort.Add(50) // so that the nodes of agents that run at the same time seldom want the same port
	text := fmt.Sprintf("[agent]\nagent_id = %q\nagent_port = 0\nmaster_endpoint = %q\n[storage]\nbase_port = %d\n%s\n",
		id, "http://"+g.Endpoint, base, storage)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		g.t.Fatal(err)
	}
	return path
}

// StartAgent runs an agent in the grid's home and waits until the master calls it HEALTHY.
func (g *Grid) StartAgent(id, storage string) *Process {
	g.t.Helper()
	a := g.LaunchAgent(id, g.AgentFile(id, storage))
	g.AwaitAgent(id, sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	return a
}

// LaunchAgent runs an agent by a file and waits for nothing.
func (g *Grid) LaunchAgent(id, file string, args ...string) *Process {
	g.t.Helper()
	a := start(g.t, g.Binary, g.Dir, id, g.Env, append([]string{"agent", "--config", file}, args...)...)
	g.agents = append(g.agents, a)
	return a
}

// Launch runs any other sutra command in the background, with its output in its log.
func (g *Grid) Launch(name string, args ...string) *Process {
	g.t.Helper()
	p := start(g.t, g.Binary, g.Dir, name, g.Env, args...)
	g.agents = append(g.agents, p) // ended with the agents: whatever it is, it may have nodes
	return p
}

// Client calls the grid's master.
func (g *Grid) Client() sutrav1.GridMasterClient { return sutrav1.NewGridMasterClient(g.channel) }

// AwaitAgent waits until the master says that an agent is in a state.
func (g *Grid) AwaitAgent(id string, want sutrav1.AgentHealth) {
	g.t.Helper()
	Await(g.t, "agent "+id+" to be "+want.Word(), func() error {
		resp, err := g.Client().ListAgents(g.t.Context(), &sutrav1.ListAgentsRequest{})
		if err != nil {
			return err
		}
		for _, a := range resp.GetAgents() {
			if a.GetAgentId() == id && a.GetHealth() == want {
				return nil
			}
		}
		return fmt.Errorf("agents: %v", resp.GetAgents())
	})
}

// AwaitNode waits until what the master knows of a node, ended or not, is as asked for, and returns it.
func (g *Grid) AwaitNode(id, what string, ok func(*sutrav1.Node) bool) *sutrav1.Node {
	g.t.Helper()
	var found *sutrav1.Node
	Await(g.t, "node "+id+" "+what, func() error {
		resp, err := g.Client().GetNodeStatus(g.t.Context(), &sutrav1.GetNodeStatusRequest{NodeId: id})
		if err != nil {
			return err
		}
		if found = resp.GetNode(); !ok(found) {
			return fmt.Errorf("it is %v", found)
		}
		return nil
	})
	return found
}

// Spawn spawns a node and fails the test where that fails.
func (g *Grid) Spawn(req *sutrav1.SpawnNodeRequest) *sutrav1.Node {
	g.t.Helper()
	resp, err := g.Client().SpawnNode(g.t.Context(), req)
	if err != nil {
		g.t.Fatalf("spawn %v: %v", req, err)
	}
	return resp.GetNode()
}

// Nodes returns all nodes that the master shows, ended ones as well where asked.
func (g *Grid) Nodes(ended bool) []*sutrav1.Node {
	g.t.Helper()
	resp, err := g.Client().ListNodes(g.t.Context(), &sutrav1.ListNodesRequest{IncludeEnded: ended})
	if err != nil {
		g.t.Fatalf("list nodes: %v", err)
	}
	return resp.GetNodes()
}

// Result is what one client verb did.
type Result struct {
	Code           int
	Stdout, Stderr string
}

// Run runs a client verb to its end.
func (g *Grid) Run(args ...string) Result {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, g.Binary, args...)
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.Dir = g.Env, &out, &errs, g.Dir
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		g.t.Fatalf("run sutra %v: %v", args, err)
	}
	return Result{Code: cmd.ProcessState.ExitCode(), Stdout: out.String(), Stderr: errs.String()}
}

// MustRun runs a client verb that is to succeed, and returns its stdout.
func (g *Grid) MustRun(args ...string) string {
	g.t.Helper()
	r := g.Run(args...)
	if r.Code != 0 {
		g.t.Fatalf("sutra %s: exit code %d\n%s%s", strings.Join(args, " "), r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// lastPort is where the search for a free port goes on. It begins at a place of this process's own, so that test
// packages that run side by side seldom meet, and below the range of outgoing connections' ports.
var lastPort atomic.Int32

// FreePort returns a port that was free just now, and hands out none twice.
func (g *Grid) FreePort() int {
	g.t.Helper()
	lastPort.CompareAndSwap(0, int32(12000+os.Getpid()%180*100))
	for range 10000 {
		port := int(lastPort.Add(1))
		if port >= 32000 {
			lastPort.Store(12000)
			continue
		}
		if l, err := net.Listen("tcp", fmt.Sprintf(":%d", port)); err == nil {
			_ = l.Close() // it was only to see
			return port
		}
	}
	g.t.Fatal("no free port")
	return 0
}

// Await calls check until it returns nil, and fails the test with its last error where that takes too long.
func Await(t testing.TB, what string, check func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatalf("waited %v for %s: %v", patience, what, err)
}

// Need fails or skips the test where a program isn't installed or the test must be root; where
// SUTRA_TEST_NO_SKIP is set, a skip is a failure.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if p == "root" {
			if os.Getuid() != 0 {
				Skip(t, "needs root")
			}
			continue
		}
		if _, err := exec.LookPath(p); err != nil {
			Skip(t, p+" isn't installed")
		}
	}
}

// Skip skips the test, which is a failure where SUTRA_TEST_NO_SKIP is set.
func Skip(t testing.TB, why string) {
	t.Helper()
	if os.Getenv("SUTRA_TEST_NO_SKIP") != "" {
		t.Fatalf("%s, and SUTRA_TEST_NO_SKIP forbids to skip", why)
	}
	t.Skip(why)
}
