package e2e_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// hostAddress is an address of this host that isn't loopback.
func hostAddress(t *testing.T) string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() && n.IP.To4() != nil {
			return n.IP.String()
		}
	}
	harness.Skip(t, "this host has loopback addresses alone")
	return ""
}

// relay passes connections on to where to says at that time.
func relay(t *testing.T, to *atomic.Value) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	pass := func(dst, src net.Conn) {
		_, _ = io.Copy(dst, src)
		_ = errors.Join(dst.Close(), src.Close())
	}
	go func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to.Load().(string))
			if err != nil {
				_ = from.Close()
				continue
			}
			go pass(server, from)
			go pass(from, server)
		}
	}()
	return l.Addr().String()
}

// writeIdentity writes a certificate with its key as an identity of somebody.
func writeIdentity(t *testing.T, path string, cert tls.Certificate) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	data := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	for _, c := range cert.Certificate {
		data = append(data, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c})...)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// age has an agent's identity be one whose certificate ended longer ago than anybody is renewed for.
func age(t *testing.T, g *harness.Grid, home, id string) {
	t.Helper()
	_, grid := g.Authority()
	writeIdentity(t, filepath.Join(home, "agents", id, "identity.pem"), stolen(t, g).forge(grid, func(c *x509.Certificate) {
		c.URIs[0].Path, c.Subject.Organization = "/agent/"+id, nil
		c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		c.NotBefore, c.NotAfter = time.Now().Add(-32*24*time.Hour), time.Now().Add(-31*24*time.Hour)
	}))
}

// An agent whose identity is of no use any more looks after its nodes, says what is the matter, and comes back with a token.
func TestAgentWithoutAGoodIdentity(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster("--listen", "0.0.0.0:0", "--degraded-after", "2s", "--offline-after", "3s")
	_, port, err := net.SplitHostPort(g.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	const id = "agent-far"
	home, file := filepath.Join(g.Dir, "far"), g.AgentFile(id, manyProfiles)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, file, strings.Replace(string(text), g.Endpoint, net.JoinHostPort(hostAddress(t), port), 1), 0o600)
	starts := 0
	launch := func(args ...string) *harness.Process {
		starts++
		p := g.LaunchAgent(fmt.Sprintf("%s-%d", id, starts), file, append([]string{"--home", home}, args...)...)
		return p
	}
	token := func() string { return strings.TrimSpace(g.MustRun("token", "create", "--agent-id", id)) }
	// looksAfter tells of the trouble, and starts a node again that has ended.
	looksAfter := func(agent *harness.Process, node *sutrav1.Node, says string) {
		t.Helper()
		harness.Await(t, "the agent to say what is the matter", func() error { return logSays(agent, says) })
		var was int
		harness.Await(t, "the node", func() error {
			for pid, of := range g.NodeProcesses() {
				if of == node.GetNodeId() {
					was = pid
					return syscall.Kill(pid, syscall.SIGKILL)
				}
			}
			return errors.New("it isn't there")
		})
		harness.Await(t, "the node to be started again", func() error {
			for pid, of := range g.NodeProcesses() {
				if of == node.GetNodeId() && pid != was {
					return nil
				}
			}
			return errors.New("it isn't there")
		})
		if !agent.Running() {
			t.Errorf("the agent ended:\n%s", agent.Log())
		}
	}

	agent := launch("--join-token", token())
	g.AwaitAgent(id, sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: id, Profile: "sleep"})
	agent.Kill()
	age(t, g, home, id)
	agent = launch()
	looksAfter(agent, node, "longer than 720h0m0s ago")
	agent.Kill()
	agent = launch("--join-token", strings.TrimSpace(g.MustRun("token", "create", "--role", "viewer")))
	looksAfter(agent, node, "is for the role viewer")
	agent.Kill()
	agent = launch("--join-token", token())
	harness.Await(t, "the agent to register", func() error { return logSays(agent, "registered with the master") })
	agent.Kill()

	path := filepath.Join(home, "agents", id, "identity.pem")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, path, string(good[:len(good)/2]), 0o600)
	agent = launch()
	looksAfter(agent, node, "can't use its identity")
	writeFile(t, path, string(good), 0o600)
	harness.Await(t, "the agent to register", func() error { return logSays(agent, "registered with the master") })
	g.AwaitNode(node.GetNodeId(), "to run", func(n *sutrav1.Node) bool { return n.GetPhase() == running })
	// One without nodes is told so at once, as ever.
	if r := g.Run("agent", "--config", file, "--home", filepath.Join(g.Dir, "nobody")); r.Code != 6 || !strings.Contains(r.Stderr, "no identity in the grid yet") {
		t.Errorf("an agent without a token: %+v", r)
	}

	// On the master's host it needs no step.
	local := g.StartAgent("agent-001", manyProfiles)
	node = g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: "agent-001", Profile: "sleep"})
	local.Kill()
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)
	age(t, g, g.Home, "agent-001")
	restarted(t, g, "agent-001", "aged")
	if err := sameRun(node, g.AwaitNode(node.GetNodeId(), "to run", func(n *sutrav1.Node) bool { return n.GetPhase() == running })); err != nil {
		t.Error(err)
	}
}

// An agent with an identity that its master takes is kept in its grid, whatever tokens lie about, and also where another grid's
// master answered for a while.
func TestALeftoverTokenLeadsNobodyAstray(t *testing.T) {
	t.Parallel()
	g, other, third := harness.New(t), harness.New(t), harness.New(t)
	for _, g := range []*harness.Grid{g, other, third} {
		g.StartMaster()
	}
	var to atomic.Value
	to.Store(g.Endpoint)
	at := relay(t, &to)
	home, file := filepath.Join(g.Dir, "h"), g.AgentFile("agent-001", manyProfiles)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, file, strings.Replace(string(text), g.Endpoint, at, 1), 0o600)
	agent := g.LaunchAgent("first", file, "--home", home, "--join-token", g.Token())
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	agent.Stop()
	left := filepath.Join(home, "credentials", "join-token")
	if err := os.MkdirAll(filepath.Dir(left), 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, left, third.Token(), 0o600)
	to.Store(other.Endpoint)
	agent = g.LaunchAgent("second", file, "--home", home)
	harness.Await(t, "the agent to name the token", func() error { return logSays(agent, left+": ") })
	to.Store(g.Endpoint)
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	agent.Stop()
	agent = g.LaunchAgent("third", file, "--home", home)
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	if logSays(agent, left) == nil {
		t.Errorf("the leftover token was looked at:\n%s", agent.Log())
	}
}

// Whoever is killed between a token's use and the saved answer, agent, person or master, gets the answer by asking again: a
// token for one is enough.
func TestKilledWhileJoining(t *testing.T) {
	t.Parallel()
	harness.Need(t, "root")
	g := harness.New(t)
	master := g.StartMaster()
	joiners := 0
	agent := func(id, token string) *harness.Process {
		joiners++
		return g.LaunchAgent(fmt.Sprintf("%s-%d", id, joiners), filepath.Join(g.Dir, id+".toml"), "--home", filepath.Join(g.Dir, id), "--join-token", token)
	}
	over := func(what string, done func() bool) {
		t.Helper()
		harness.Await(t, what, func() error {
			if done() {
				return nil
			}
			return errors.New("it goes on")
		})
	}
	killed := map[string]int{}
	each := func(who string, round func(id string, k int) (int, string)) {
		t.Helper()
		whole, last := round(who+"-0", 0)
		if whole == 0 || last != "" {
			t.Fatalf("%s: without a crash there were %d steps, the last %q", who, whole, last)
		}
		for k := range steps(t, whole) {
			_, last := round(fmt.Sprintf("%s-%d", who, k), k)
			killed[who+" "+last]++
			if t.Failed() {
				t.Fatalf("%s killed at step %d of %d, %s", who, k, whole, last)
			}
		}
	}
	each("agent", func(id string, k int) (int, string) {
		token := g.Token()
		g.AgentFile(id, manyProfiles)
		master.Signal(syscall.SIGSTOP)
		a := agent(id, token)
		harness.Await(t, "the agent to begin", func() error { return logSays(a, "agent listening") })
		point := harness.CrashAt(t, a, k)
		master.Signal(syscall.SIGCONT)
		over("the agent to register or to end", func() bool { return logSays(a, "registered with the master") == nil || !a.Running() })
		n, last := point.End()
		a = agent(id, token)
		harness.Await(t, "the agent to register", func() error { return logSays(a, "registered with the master") })
		absent(t, filepath.Join(g.Dir, id, "agents", id, "join.key"))
		a.Stop()
		return n, last
	})
	each("person", func(id string, k int) (int, string) {
		args := []string{"login", "--home", filepath.Join(g.Dir, id), "--master", g.Endpoint, "--token", strings.TrimSpace(g.MustRun("token", "create", "--role", "viewer")), "--name", id}
		master.Signal(syscall.SIGSTOP)
		p := g.Launch(id, args...)
		key := filepath.Join(g.Dir, id, "credentials", "login.key")
		harness.Await(t, "the key", func() error { _, err := os.Stat(key); return err })
		point := harness.CrashAt(t, p, k)
		master.Signal(syscall.SIGCONT)
		over("the login's end", func() bool { return !p.Running() })
		n, last := point.End()
		status := []string{"status", "--home", filepath.Join(g.Dir, id), "--master", g.Endpoint}
		if r := g.Run(status...); r.Code != 0 { // else it had been saved
			g.MustRun(args...)
			absent(t, key)
			g.MustRun(status...)
		}
		return n, last
	})
	each("master", func(id string, k int) (int, string) {
		token := g.Token()
		g.AgentFile(id, manyProfiles)
		point := harness.CrashAt(t, master, k)
		a := agent(id, token)
		over("the agent to register or the master to end", func() bool { return logSays(a, "registered with the master") == nil || !master.Running() })
		n, last := point.End()
		master = g.StartMaster()
		harness.Await(t, "the agent to register", func() error { return logSays(a, "registered with the master") })
		a.Stop()
		return n, last
	})
	t.Logf("killed at %v", killed)
}

// What couldn't be saved on a full disk is saved when there is room, and nothing is spent before its key is on disk.
func TestFullDiskWhileJoining(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	home, file, token := filepath.Join(g.Dir, "small"), g.AgentFile("agent-001", manyProfiles), g.Token()
	harness.SmallDisk(t, home, 8)
	path := filepath.Join(home, "agents", "agent-001", "identity.pem")
	master.Signal(syscall.SIGSTOP)
	agent := g.LaunchAgent("full", file, "--home", home, "--join-token", token)
	harness.Await(t, "the key", func() error { _, err := os.Stat(filepath.Join(filepath.Dir(path), "join.key")); return err })
	free := harness.FillDisk(t, home, 0)
	master.Signal(syscall.SIGCONT)
	harness.Await(t, "the agent to say so", func() error { return logSays(agent, "identity not saved") })
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY) // it works with what it has
	absent(t, path)
	free()
	harness.Await(t, "the identity to be saved", func() error { _, err := os.Stat(path); return err })
	agent.Kill()
	agent = g.LaunchAgent("again", file, "--home", home)
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	agent.Kill()

	// Without room for a key the token isn't spent.
	other, token := filepath.Join(g.Dir, "smaller"), g.Token()
	harness.SmallDisk(t, other, 8)
	g.AgentFile("agent-002", manyProfiles)
	agent = g.LaunchAgent("fuller", filepath.Join(g.Dir, "agent-002.toml"), "--home", other, "--join-token-file", filepath.Join(g.Dir, "none"))
	agent.Wait()
	free = harness.FillDisk(t, other, 0)
	agent = g.LaunchAgent("fullest", filepath.Join(g.Dir, "agent-002.toml"), "--home", other, "--join-token", token)
	harness.Await(t, "the agent to say so or to end", func() error {
		if !agent.Running() {
			return nil
		}
		return logSays(agent, "doesn't join the grid yet")
	})
	free()
	if !agent.Running() {
		agent = g.LaunchAgent("roomy", filepath.Join(g.Dir, "agent-002.toml"), "--home", other, "--join-token", token)
	}
	g.AwaitAgent("agent-002", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	agent.Kill()
}

// The file with a token is needed by those who have no identity yet, and by nobody else.
func TestJoinTokenFileIsReadOnce(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	token, file, home := writeFile(t, filepath.Join(g.Dir, "token"), g.Token(), 0o600), g.AgentFile("agent-001", manyProfiles), filepath.Join(g.Dir, "b")
	agent := g.LaunchAgent("first", file, "--home", home, "--join-token-file", token)
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	agent.Kill()
	if err := os.Remove(token); err != nil {
		t.Fatal(err)
	}
	again := g.LaunchAgent("second", file, "--home", home, "--join-token-file", token)
	harness.Await(t, "the agent to register", func() error { return logSays(again, "registered with the master") })
	r := g.Run("agent", "--config", file, "--home", filepath.Join(g.Dir, "c"), "--join-token-file", token)
	for _, w := range []string{"--join-token-file can't be read", token, "hint: ", "sutra token create"} {
		if r.Code != 2 || !strings.Contains(r.Stderr, w) {
			t.Errorf("without the file and an identity it doesn't say %q: %+v", w, r)
		}
	}
}

// A login takes nobody's better identity away.
func TestLoginKeepsAnAdmin(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	files, err := filepath.Glob(filepath.Join(g.Home, "credentials", "*.pem"))
	if err != nil || len(files) != 1 {
		t.Fatalf("credentials %v, %v", files, err)
	}
	before, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	token := strings.TrimSpace(g.MustRun("token", "create", "--role", "viewer", "--uses", "2"))
	refused(t, g, 2, "USAGE", []string{"user admin", "the role admin", "--home FOLDER", files[0], "next start of the master"}, "login", "--token", token, "--name", "anna")
	if after, err := os.ReadFile(files[0]); err != nil || !bytes.Equal(after, before) {
		t.Errorf("the identity was changed (%v)", err)
	}
	g.MustRun("login", "--token", token, "--name", "anna", "--home", filepath.Join(g.Dir, "anna"), "--master", g.Endpoint)
	g.MustRun("token", "list")
	// Who means it, does as the hint says, and comes back as it says.
	if err := os.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	g.MustRun("login", "--token", token, "--name", "anna-here")
	refused(t, g, 6, "PERMISSION_DENIED", nil, "token", "list")
	operator := g.As(pki.UserIdentity(strings.TrimSuffix(filepath.Base(files[0]), ".pem"), "bob", sutrav1.Role_ROLE_OPERATOR))()[0]
	if err := operator.Save(files[0]); err != nil {
		t.Fatal(err)
	}
	refused(t, g, 2, "USAGE", []string{"user bob", "the role operator"}, "login", "--token", token)
	if err := os.Remove(files[0]); err != nil {
		t.Fatal(err)
	}
	master.Stop()
	g.StartMaster()
	g.MustRun("token", "list")
}

// An authority that is lost isn't replaced unasked: the master says what is missing, and goes on with a backup, or with another
// authority where the operator says so.
func TestLostAuthority(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	agent := g.StartAgent("agent-001", manyProfiles)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	first, grid := g.Authority()
	dir := filepath.Join(g.Home, "master", "pki")
	root, issuer, note := filepath.Join(dir, "root.pem"), filepath.Join(dir, "issuer.pem"), filepath.Join(g.Home, "master", "root.sha256")
	remove := func(paths ...string) {
		t.Helper()
		for _, path := range paths {
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	refuses := func(says ...string) {
		t.Helper()
		r := g.Run("master", "--listen", "127.0.0.1:0", "--http", "off")
		for _, w := range append(says, "backup") {
			if r.Code != 1 || !strings.Contains(r.Stderr, w) {
				t.Errorf("it doesn't say %q: %+v", w, r)
			}
		}
	}
	master.Stop()
	backup := filepath.Join(g.Dir, "backup")
	if err := os.CopyFS(backup, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	restore := func() {
		t.Helper()
		remove(dir)
		if err := os.CopyFS(dir, os.DirFS(backup)); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{root, issuer} {
			if err := os.Chmod(path, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}

	remove(root)
	refuses(root, note)
	absent(t, root)
	remove(dir)
	refuses(root, note)
	absent(t, root)
	if _, err := pki.OpenAuthority(dir, grid); err != nil { // another one
		t.Fatal(err)
	}
	refuses("the root in "+dir, note)
	restore()
	master = g.StartMaster()
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)

	// A rotation that was broken off before its root was noted.
	g.MustRun("ca", "rotate", "--apply")
	master.Kill()
	hash := first.Hash()
	writeFile(t, note, fmt.Sprintf("%x\n", hash), 0o600)
	master = g.StartMaster()
	newest, _ := g.Authority()
	if is, err := os.ReadFile(note); err != nil || strings.TrimSpace(string(is)) != fmt.Sprintf("%x", newest.Hash()) {
		t.Errorf("noted is %q, %v, want %x", is, err, newest.Hash())
	}
	g.MustRun("ca", "retire", "--apply", "--force")
	master.Stop()
	restore() // the first root, which is trusted no more
	refuses("the root in "+dir, note)

	// The operator gives the root up.
	remove(root, note)
	refuses(root, issuer)
	absent(t, root)
	remove(dir)
	g.StartMaster()
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY) // by its host's token
	if !agent.Running() {
		t.Error("the agent ended")
	}
	takenUp(t, g, []*sutrav1.Node{node})
}

// The end of the grid's root is told of in time, and until then the grid is as healthy as it is.
func TestStatusTellsOfTheRootsEnd(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	g.StartAgent("agent-001", manyProfiles)
	if out := g.MustRun("status"); strings.Contains(out, "root ends") {
		t.Errorf("ten years before:\n%s", out)
	}
	master.Stop()
	authority, _ := g.Authority()
	if _, err := authority.Rotate(time.Now().Add(-3620 * 24 * time.Hour)); err != nil { // it has ten years
		t.Fatal(err)
	}
	master = g.StartMaster()
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	out := g.MustRun("status")
	if words := strings.Fields(out); words[1] != "HEALTHY" {
		t.Errorf("a month before it is %s", words[1])
	}
	for _, w := range []string{"the grid's root ends at", "in 29 days", "sutra ca rotate"} {
		if !strings.Contains(out, w) {
			t.Errorf("a month before it doesn't say %q:\n%s", w, out)
		}
	}
	if err := logSays(master, "in 29 days"); err != nil {
		t.Error(err)
	}
}
