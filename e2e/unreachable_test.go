package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// impostor listens where a master is looked for, and treats each connection as asked.
func impostor(t *testing.T, treat func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go treat(conn)
		}
	}()
	return l.Addr().String()
}

// Where a master should be there is none, or something else: each verb says so, in its time, with a hint.
func TestNoMaster(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	nobody := fmt.Sprintf("127.0.0.1:%d", g.FreePort())
	hangsUp := impostor(t, func(c net.Conn) { _ = c.Close() })
	silent := impostor(t, func(c net.Conn) {
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
	})
	banner := impostor(t, func(c net.Conn) {
		_, _ = io.WriteString(c, "SSH-2.0-OpenSSH_9.2\r\n")
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
	})
	web := &http.Server{Handler: http.NotFoundHandler()}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = web.Serve(l) }()
	t.Cleanup(func() { _ = web.Close() })
	webAt := l.Addr().String()

	bare, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	other := grpc.NewServer()
	go func() { _ = other.Serve(bare) }()
	t.Cleanup(other.Stop)
	h2, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	web2 := &http.Server{Handler: http.NotFoundHandler(), Protocols: new(http.Protocols)}
	web2.Protocols.SetUnencryptedHTTP2(true)
	go func() { _ = web2.Serve(h2) }()
	t.Cleanup(func() { _ = web2.Close() })
	elsewhere := harness.New(t)
	elsewhere.StartMaster()
	elsewhere.StartAgent("a1", "")
	agents, err := elsewhere.Client().ListAgents(t.Context(), &sutrav1.ListAgentsRequest{})
	if err != nil || len(agents.GetAgents()) != 1 {
		t.Fatalf("agents %v, %v", agents, err)
	}

	port := func(at string) string { return "ss -ltnp 'sport = :" + at[strings.LastIndex(at, ":")+1:] + "'" }
	type wrong struct {
		code   int
		reason string
		words  []string
		args   []string
	}
	cases := []wrong{
		{
			6, "UNTRUSTED_PEER",
			[]string{"it is agent a1, where a master was expected"},
			[]string{"status", "--master", agents.GetAgents()[0].GetEndpoint(), "--home", elsewhere.Home},
		},
		{5, "TIMED_OUT", []string{"the master at " + silent + " didn't answer in time", port(silent)}, []string{"status", "--master", silent}},
		{5, "TIMED_OUT", []string{silent, "didn't answer in time", "--timeout 300ms"}, []string{"--timeout", "300ms", "status", "--master", silent}},
		{5, "TIMED_OUT", []string{silent, "may still start", "--request-id"}, []string{"--timeout", "300ms", "spawn", "--master", silent}},
	}
	for _, verb := range []string{"status", "list-agents", "list-nodes", "node-status -n x", "stop -n x", "remove -n x", "spawn"} {
		args := strings.Fields(verb)
		cases = append(cases, wrong{
			4, "MASTER_UNREACHABLE",
			[]string{"can't reach the master at " + nobody + ": connection refused", "sutra master", "--master HOST:PORT"},
			append(args, "--master", nobody),
		})
	}
	for at, why := range map[string]string{
		hangsUp: "closed the connection at once", h2.Addr().String(): "closed the connection at once",
		banner: "doesn't speak TLS", webAt: "doesn't speak TLS", bare.Addr().String(): "doesn't speak TLS",
	} {
		for _, verb := range []string{"status", "spawn", "stop -n x"} {
			args := strings.Fields(verb)
			cases = append(cases, wrong{
				4, "MASTER_UNREACHABLE",
				[]string{at, "what listens there " + why, "another service", port(at), "--master HOST:PORT"},
				append(args, "--master", at),
			})
		}
	}
	for _, c := range cases {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			t.Parallel() // they wait more than they work
			refused(t, g, c.code, c.reason, c.words, c.args...)
		})
	}
	if r := g.Run("smoke", "--master", nobody); r.Code != 4 || !strings.Contains(r.Stdout, "0 of 9 steps passed") || !strings.Contains(r.Stderr, "(MASTER_UNREACHABLE)") {
		t.Errorf("smoke without a master: %+v", r)
	}

	for _, odd := range []string{"host:0", "host:70000", "ftp://host:1", "http://host:1/path", "a b:1"} {
		refused(t, g, 2, "USAGE", []string{"--master", "host:port"}, "status", "--master", odd)
	}
	for _, odd := range []string{"0s", "-1s", "NaN", "3"} {
		refused(t, g, 2, "USAGE", []string{"--timeout", "hint: "}, "status", "--timeout", odd)
	}
	absent(t, g.Home)
}

// slowProfile is that of a server which is ready once its folder has a file of that name.
const slowProfile = `
default_memory_mb = 64
[storage.profiles.slow]
storage_binary = "/bin/sleep"
args = ["100000"]
ready = "exec:test -e $SUTRA_STORAGE_PATH/ready"
`

// A client that goes away while its node starts: the node stays, is listed, becomes RUNNING, and the same request gives it.
func TestClientHangsUp(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("a1", slowProfile)

	hangUps := map[string]func(t *testing.T, args []string){
		"SIGINT": func(t *testing.T, args []string) {
			spawn := launchSpawn(t, g, "spawn-int", args)
			spawn.Signal(syscall.SIGINT)
			if code := spawn.Wait(); code != 1 {
				t.Errorf("interrupted spawn: exit code %d", code)
			}
			for _, w := range []string{"the spawn was interrupted", "(CANCELED)", "--request-id SIGINT gives the same node"} {
				if !strings.Contains(string(spawn.Log()), w) {
					t.Errorf("interrupted spawn doesn't say %q: %s", w, spawn.Log())
				}
			}
		},
		"SIGKILL": func(t *testing.T, args []string) { launchSpawn(t, g, "spawn-kill", args).Kill() },
		"timeout": func(t *testing.T, args []string) {
			r := g.Run(append(args, "--timeout", "1s")...)
			if r.Code != 5 || !strings.Contains(r.Stderr, "(TIMED_OUT)") && !strings.Contains(r.Stderr, "(NOT_READY_YET)") || !strings.Contains(r.Stderr, "sutra node-status --node node-") {
				t.Errorf("spawn that timed out: %+v", r)
			}
		},
		"cancel": func(t *testing.T, args []string) {
			conn, err := grpc.NewClient("passthrough:///"+g.Endpoint, grpc.WithTransportCredentials(credentials.NewTLS(pki.ClientTLS(g.Credentials, pki.Peer{Kind: pki.Master}))))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() {
				_, err := sutrav1.NewGridMasterClient(conn).SpawnNode(ctx, &sutrav1.SpawnNodeRequest{RequestId: "cancel", Profile: "slow", StoragePath: args[len(args)-1]})
				done <- err
			}()
			awaitStarting(t, g, args[len(args)-1])
			cancel()
			if err := <-done; err == nil {
				t.Error("the canceled spawn succeeded")
			}
		},
	}
	for name, hangUp := range hangUps {
		path := filepath.Join(g.Dir, "data-"+name)
		args := []string{"spawn", "--profile", "slow", "--request-id", name, "--storage-path", path}
		hangUp(t, args)
		node := awaitStarting(t, g, path)
		if out := g.MustRun("list-nodes"); !strings.Contains(out, node.GetNodeId()) || !strings.Contains(out, "STARTING") {
			t.Errorf("%s: list-nodes:\n%s", name, out)
		}
		writeFile(t, filepath.Join(path, "ready"), "", 0o600)
		running := g.AwaitNode(node.GetNodeId(), "to run", func(n *sutrav1.Node) bool { return n.GetPhase() == sutrav1.Phase_PHASE_RUNNING })
		again := g.Spawn(&sutrav1.SpawnNodeRequest{RequestId: name, Profile: "slow", StoragePath: path})
		if again.GetNodeId() != node.GetNodeId() || again.GetPid() != running.GetPid() {
			t.Errorf("%s: the same request gives %v, and the node is %v", name, again, running)
		}
		if all := g.Nodes(true); len(all) != 1 || len(g.NodeProcesses()) != 1 {
			t.Errorf("%s: there are the nodes %v and the processes %v", name, all, g.NodeProcesses())
		}
		g.MustRun("stop", "-n", node.GetNodeId())
		g.MustRun("remove", "-n", node.GetNodeId())
	}
}

// launchSpawn starts a spawn and waits until its node starts.
func launchSpawn(t *testing.T, g *harness.Grid, name string, args []string) *harness.Process {
	t.Helper()
	spawn := g.Launch(name, args...)
	awaitStarting(t, g, args[len(args)-1])
	return spawn
}

// awaitStarting waits for the process of the node with a storage path, and returns the node.
func awaitStarting(t *testing.T, g *harness.Grid, path string) (node *sutrav1.Node) {
	t.Helper()
	harness.Await(t, "a process with the storage path "+path, func() error {
		for _, n := range g.Nodes(false) {
			if n.GetStoragePath() == path && n.GetPid() != 0 {
				node = n
				return nil
			}
		}
		return errors.New("there is none yet")
	})
	return node
}

// A spawn whose agent is just gone starts nothing, says so, and its hint leads on.
func TestSpawnOnAKilledAgent(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("a1", "")
	agent.Kill()
	refused(t, g, 4, "AGENT_UNREACHABLE", []string{"connection refused; nothing was started", "hint: ", "sutra list-agents"}, "spawn", "-a", "a1")
	if r := g.Run("spawn", "-a", "a1"); strings.Contains(r.Stderr, "may still start") || strings.Contains(r.Stderr, "node-status") {
		t.Errorf("the spawn speaks of a node: %s", r.Stderr)
	}
	if out := g.MustRun("list-agents"); !strings.Contains(out, "a1") {
		t.Errorf("list-agents: %s", out)
	}
	nothingLeft(t, g, "a1")
}
