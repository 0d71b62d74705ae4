package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// forger signs what no authority of a grid would, with the grid's own issuer or another.
type forger struct {
	t      *testing.T
	issuer *x509.Certificate
	key    *ecdsa.PrivateKey
	// above are who vouch for the issuer.
	above [][]byte
}

// stolen is a forger with the keys of a grid.
func stolen(t *testing.T, g *harness.Grid) forger {
	t.Helper()
	read := func(name string) (cert *x509.Certificate, key *ecdsa.PrivateKey) {
		data, err := os.ReadFile(filepath.Join(g.Home, "master", "pki", name))
		if err != nil {
			t.Fatal(err)
		}
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			switch block.Type {
			case "CERTIFICATE":
				if cert, err = x509.ParseCertificate(block.Bytes); err != nil {
					t.Fatal(err)
				}
			case "PRIVATE KEY":
				found, err := x509.ParsePKCS8PrivateKey(block.Bytes)
				if err != nil {
					t.Fatal(err)
				}
				key = found.(*ecdsa.PrivateKey)
			}
		}
		return cert, key
	}
	root, _ := read("root.pem")
	issuer, key := read("issuer.pem")
	return forger{t, issuer, key, [][]byte{root.Raw}}
}

// forge makes a certificate of somebody who may be whoever edit makes of an admin.
func (f forger) forge(grid string, edit func(*x509.Certificate)) tls.Certificate {
	f.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		f.t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "user eve", Organization: []string{"admin"}},
		URIs:      []*url.URL{{Scheme: "spiffe", Host: grid, Path: "/user/eve"}},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	edit(cert)
	issuer, by := f.issuer, f.key
	if issuer == nil {
		issuer, by = cert, key
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, issuer, key.Public(), by)
	if err != nil {
		f.t.Fatal(err)
	}
	made := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	if f.issuer != nil {
		made.Certificate = append(append(made.Certificate, f.issuer.Raw), f.above...)
	}
	return made
}

// What isn't vouched for gets nowhere, at the master and at an agent, and is told why.
func TestBadCertificates(t *testing.T) {
	t.Parallel()
	g, other := harness.New(t), harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", manyProfiles)
	other.StartMaster()
	_, grid := g.Authority()
	_, otherGrid := other.Authority()
	own, foreign, nobody := stolen(t, g), stolen(t, other), forger{t: t}
	g.MustRun("agents", "ban", "agent-002")
	as := func(kind, name string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs[0].Path = "/" + kind + "/" + name
			c.Subject.Organization = nil
		}
	}
	same := func(*x509.Certificate) {}
	agents := own.forge(grid, as("agent", "agent-001"))
	signer, err := x509.ParseCertificate(agents.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	byAgent := forger{t, signer, agents.PrivateKey.(*ecdsa.PrivateKey), agents.Certificate[1:]}
	agentAt := agentOf(t, g, "agent-001").GetEndpoint()
	for _, c := range []struct {
		name    string
		cert    *tls.Certificate // nil: none
		edit    func(*tls.Config)
		code    codes.Code // of the master's answer; OK: it is let in
		says    string
		atAgent codes.Code
	}{
		{"an admin's", p(own.forge(grid, same)), nil, codes.OK, "", codes.PermissionDenied},
		{"none", nil, nil, codes.Unauthenticated, "it shows no certificate", codes.Unauthenticated},
		{"expired", p(own.forge(grid, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })), nil, codes.Unauthenticated, "expired at", codes.Unauthenticated},
		{"not yet valid", p(own.forge(grid, func(c *x509.Certificate) {
			c.NotBefore = time.Now().Add(time.Hour)
			c.NotAfter = time.Now().Add(2 * time.Hour)
		})), nil, codes.Unauthenticated, "clocks", codes.Unauthenticated},
		{"self-signed", p(nobody.forge(grid, same)), nil, codes.Unauthenticated, "another grid", codes.Unauthenticated},
		{"self-signed, an authority", p(nobody.forge(grid, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign })), nil, codes.Unauthenticated, "authority", codes.Unauthenticated},
		{"another grid's", p(foreign.forge(otherGrid, same)), nil, codes.Unauthenticated, "another grid", codes.Unauthenticated},
		{"another grid's, with this one's name", p(foreign.forge(grid, same)), nil, codes.Unauthenticated, "another grid", codes.Unauthenticated},
		{"this grid's, with another one's name", p(own.forge(otherGrid, same)), nil, codes.Unauthenticated, "", codes.Unauthenticated},
		{"for servers alone", p(own.forge(grid, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })), nil, codes.Unauthenticated, "isn't for this use", codes.Unauthenticated},
		{"not for signing", p(own.forge(grid, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment })), nil, codes.Unauthenticated, "isn't for this use", codes.Unauthenticated},
		{"signed by an agent", p(byAgent.forge(grid, same)), nil, codes.Unauthenticated, "another grid", codes.Unauthenticated},
		{"without a role", p(own.forge(grid, func(c *x509.Certificate) { c.Subject.Organization = nil })), nil, codes.Unauthenticated, "roles", codes.Unauthenticated},
		{"with two roles", p(own.forge(grid, func(c *x509.Certificate) { c.Subject.Organization = []string{"admin", "viewer"} })), nil, codes.Unauthenticated, "roles", codes.Unauthenticated},
		{"with an agent's role", p(own.forge(grid, func(c *x509.Certificate) { c.Subject.Organization = []string{"agent"} })), nil, codes.Unauthenticated, "", codes.Unauthenticated},
		{"of two", p(own.forge(grid, func(c *x509.Certificate) {
			c.URIs = append(c.URIs, &url.URL{Scheme: "spiffe", Host: grid, Path: "/user/bob"})
		})), nil, codes.Unauthenticated, "", codes.Unauthenticated},
		{"an agent's", p(own.forge(grid, as("agent", "agent-001"))), nil, codes.PermissionDenied, "whose role is agent", codes.PermissionDenied},
		{"a banned agent's", p(own.forge(grid, as("agent", "agent-002"))), nil, codes.PermissionDenied, "is banned from this grid", codes.PermissionDenied},
		{"a master's", p(own.forge(grid, as("master", "m"))), nil, codes.PermissionDenied, "whose role is master", codes.OK},
		{"TLS 1.2", p(own.forge(grid, same)), func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, codes.Unavailable, "protocol version", codes.Unavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}
			if c.cert != nil {
				config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return c.cert, nil } // wanted or not
			}
			if c.edit != nil {
				c.edit(config)
			}
			answer := func(at string, call func(grpc.ClientConnInterface) error) error {
				conn, err := grpc.NewClient("passthrough:///"+at, grpc.WithTransportCredentials(credentials.NewTLS(config)))
				if err != nil {
					t.Fatal(err)
				}
				defer conn.Close()
				return call(conn)
			}
			err := answer(g.Endpoint, func(conn grpc.ClientConnInterface) error {
				_, err := sutrav1.NewGridMasterClient(conn).ListNodes(t.Context(), &sutrav1.ListNodesRequest{})
				return err
			})
			if status.Code(err) != c.code || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("the master says %v, want %v with %q", err, c.code, c.says)
			}
			err = answer(agentAt, func(conn grpc.ClientConnInterface) error {
				_, err := sutrav1.NewGridAgentClient(conn).ListNodes(t.Context(), &sutrav1.GridAgentListNodesRequest{AgentId: "agent-001"})
				return err
			})
			if status.Code(err) != c.atAgent {
				t.Errorf("the agent says %v, want %v", err, c.atAgent)
			}
			// The master's pages go by the same identities.
			page := &http.Transport{TLSClientConfig: config.Clone()}
			page.TLSClientConfig.NextProtos = nil
			defer page.CloseIdleConnections()
			got, want := 0, map[codes.Code]int{codes.OK: http.StatusOK, codes.Unauthenticated: http.StatusUnauthorized, codes.PermissionDenied: http.StatusForbidden}[c.code]
			request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+g.HTTP+"/metrics", http.NoBody)
			if err != nil {
				t.Fatal(err)
			}
			if answer, err := page.RoundTrip(request); err == nil {
				got = answer.StatusCode
				_ = answer.Body.Close() // only its status counts
			}
			if got != want {
				t.Errorf("/metrics answers %d, want %d", got, want)
			}
		})
	}
	// In the clear nobody gets an answer.
	for _, at := range []string{g.Endpoint, agentAt} {
		conn, err := grpc.NewClient("passthrough:///"+at, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		_, err = sutrav1.NewGridMasterClient(conn).ListNodes(t.Context(), &sutrav1.ListNodesRequest{})
		if status.Code(err) != codes.Unavailable {
			t.Errorf("in the clear %s says %v", at, err)
		}
		_ = conn.Close() // nothing was written
	}
	if r := g.Run("status", "--insecure"); r.Code != 4 || !strings.Contains(r.Stderr, "hint: ") {
		t.Errorf("status --insecure of a secure grid: %+v", r)
	}
}

func p[T any](v T) *T { return &v }

// An agent's identity is good for itself alone.
func TestAgentSpeaksForItselfAlone(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", manyProfiles)
	_, grid := g.Authority()
	channel := rpc.Master(g.Endpoint, g.As(pki.AgentIdentity(grid, "agent-002")), nil)
	defer channel.Close()
	eve := sutrav1.NewGridMasterClient(channel)
	_, beat := eve.Heartbeat(t.Context(), &sutrav1.HeartbeatRequest{AgentId: "agent-001", Epoch: 1, Sequence: 1 << 40})
	_, leave := eve.UnregisterAgent(t.Context(), &sutrav1.UnregisterAgentRequest{AgentId: "agent-001", Epoch: 1})
	_, register := eve.RegisterAgent(t.Context(), &sutrav1.RegisterAgentRequest{Agent: &sutrav1.Agent{AgentId: "agent-001"}})
	_, spawn := eve.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{})
	_, list := eve.ListNodes(t.Context(), &sutrav1.ListNodesRequest{})
	for what, err := range map[string]error{"beat": beat, "leave": leave, "register": register, "spawn": spawn, "list": list} {
		if rpc.ReasonOf(err) != rpc.PermissionDenied {
			t.Errorf("%s: %v", what, err)
		}
	}
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
}

// What an agent says of itself is written down at each registration, and what it runs is adopted: neither fills the master.
func TestAnAgentThatSaysTooMuch(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	_, grid := g.Authority()
	channel := rpc.Master(g.Endpoint, g.As(pki.AgentIdentity(grid, "liar")), nil)
	defer channel.Close()
	liar := sutrav1.NewGridMasterClient(channel)
	self := func(edit func(*sutrav1.Agent)) *sutrav1.RegisterAgentRequest {
		a := &sutrav1.Agent{AgentId: "liar", InstanceId: "i", Endpoint: "127.0.0.1:9", MaxNodes: 1}
		edit(a)
		return &sutrav1.RegisterAgentRequest{Agent: a, HeartbeatInterval: durationpb.New(time.Second)}
	}
	for name, edit := range map[string]func(*sutrav1.Agent){
		"agent.max_nodes 10001 isn't between": func(a *sutrav1.Agent) { a.MaxNodes = 10001 },
		"names and labels":                    func(a *sutrav1.Agent) { a.Hostname = strings.Repeat("x", 1<<20) },
	} {
		if _, err := liar.RegisterAgent(t.Context(), self(edit)); rpc.ReasonOf(err) != rpc.InvalidArgument || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	resp, err := liar.RegisterAgent(t.Context(), self(func(*sutrav1.Agent) {}))
	if err != nil {
		t.Fatal(err)
	}
	beat := &sutrav1.HeartbeatRequest{AgentId: "liar", Epoch: resp.GetEpoch(), Full: true}
	for i := range 12000 { // starting: nobody adopts it
		beat.Changed = append(beat.Changed, &sutrav1.Node{NodeId: fmt.Sprintf("node-fake%d", i), AgentId: "liar", Phase: sutrav1.Phase_PHASE_STARTING, Revision: 1})
	}
	beat.Sequence++
	if _, err := liar.Heartbeat(t.Context(), beat); err != nil {
		t.Fatal(err)
	}
	if n := len(g.Nodes(false)); n != 10000 {
		t.Errorf("%d nodes were taken in, want 10000", n)
	}
	harness.Await(t, "the master to say so", func() error { return logSays(master, `"agent_id":"liar","nodes":2000`) })
	if out := g.MustRun("status"); !strings.Contains(out, "the first of the agents' ends at") {
		t.Errorf("status says\n%s", out)
	}
	beat.Sequence, beat.Changed = beat.Sequence+1, nil
	if _, err := liar.Heartbeat(t.Context(), beat); err != nil {
		t.Fatal(err)
	}
	if nodes := g.Nodes(false); len(nodes) != 0 {
		t.Errorf("%d nodes are left", len(nodes))
	}
}

// Certificates that last seconds are renewed all the time, under load: no call fails, and a stream goes on.
func TestRenewalUnderLoad(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster("--certificate-life", "2s")
	g.StartAgent("agent-001", manyProfiles)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	logs := g.Launch("logs", "logs", "-n", node.GetNodeId(), "-f")
	stop := calling(t, g, node)
	file := filepath.Join(g.Home, "agents", "agent-001", "identity.pem")
	seen := map[string]bool{}
	harness.Await(t, "the agent's certificate to be renewed", func() error {
		c, err := pki.Load(file)
		if err != nil {
			return err
		}
		seen[c.Expires.String()] = true
		if len(seen) < 4+rounds(t)/5 {
			return fmt.Errorf("%d times so far", len(seen))
		}
		return nil
	})
	calls := stop()
	if !logs.Running() {
		t.Errorf("the stream has ended:\n%s", logs.Log())
	}
	logs.Signal(syscall.SIGINT)
	// What was away for longer than a certificate lasts comes back, too.
	if out := g.MustRun("status"); !strings.Contains(out, "1 HEALTHY") {
		t.Errorf("status:\n%s", out)
	}
	t.Logf("%d calls, %d certificates", calls, len(seen))
}

// calling has four callers ask for a node's live state until stop, which fails the test where a call has failed, and returns how many
// there were. Each has one identity all the time: it is the master's and the agents' that change.
func calling(t *testing.T, g *harness.Grid, node *sutrav1.Node) (stop func() int) {
	t.Helper()
	_, grid := g.Authority()
	admin := g.As(pki.UserIdentity(grid, "test", sutrav1.Role_ROLE_ADMIN))
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	var calls atomic.Int64
	failed := make(chan error, 10)
	for range 4 {
		group.Go(func() {
			channel := rpc.Master(g.Endpoint, admin, nil)
			defer channel.Close()
			client := sutrav1.NewGridMasterClient(channel)
			for ctx.Err() == nil {
				resp, err := client.GetNodeStatus(context.WithoutCancel(ctx), &sutrav1.GetNodeStatusRequest{NodeId: node.GetNodeId()})
				if err == nil && resp.GetSource() != sutrav1.Source_SOURCE_LIVE {
					err = fmt.Errorf("answered from %v: %s", resp.GetSource(), resp.GetReason())
				}
				if err != nil {
					select {
					case failed <- err:
					default:
					}
				}
				calls.Add(1)
			}
		})
	}
	return func() int {
		t.Helper()
		cancel()
		group.Wait()
		close(failed)
		for err := range failed {
			t.Errorf("of %d calls some failed, one with: %v", calls.Load(), err)
		}
		if calls.Load() == 0 {
			t.Error("nothing was called")
		}
		return int(calls.Load())
	}
}

// An agent that slept for longer than its certificate lasts comes back by itself; its nodes are as they were.
func TestExpiredAgent(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	// Certificates end at whole seconds: one of a second may last for none.
	g.StartMaster("--certificate-life", "2s", "--degraded-after", "2s", "--offline-after", "3s")
	agent := g.StartAgent("agent-001", manyProfiles)
	nodes := spawnMany(t, g, 2, &sutrav1.SpawnNodeRequest{Profile: "sleep"})
	agent.Signal(syscall.SIGSTOP)
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)
	agent.Signal(syscall.SIGCONT)
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	agent.Kill()
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)
	restarted(t, g, "agent-001", "again")
	takenUp(t, g, nodes)
}

// A banned agent is out, with its connections; its nodes run on, and it comes back when it may.
func TestBan(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	agent := g.StartAgent("agent-001", manyProfiles)
	nodes := spawnMany(t, g, 2, &sutrav1.SpawnNodeRequest{Profile: "sleep"})
	g.MustRun("agents", "ban", "--reason", "its host was stolen", "agent-001")
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)
	harness.Await(t, "the agent to be told", func() error { return logSays(agent, "its host was stolen") })
	refused(t, g, 4, "AGENT_OFFLINE", []string{"agent-001"}, "spawn", "--profile", "sleep", "-a", "agent-001")
	agent.Kill()
	agent = g.LaunchAgent("banned", filepath.Join(g.Dir, "agent-001.toml")) // with its old certificate, or the host's token
	harness.Await(t, "the agent to be told again", func() error { return logSays(agent, "is banned from this grid") })
	for _, n := range nodes {
		if err := syscall.Kill(int(n.GetPid()), 0); err != nil {
			t.Errorf("node %s: %v", n.GetNodeId(), err)
		}
	}
	g.MustRun("agents", "unban", "agent-001")
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	takenUp(t, g, nodes)
}

// What others made talks to a grid as well, if it has an identity.
func TestOpenSSL(t *testing.T) {
	t.Parallel()
	harness.Need(t, "openssl")
	g := harness.New(t)
	g.StartMaster()
	files, err := filepath.Glob(filepath.Join(g.Home, "credentials", "*.pem"))
	if err != nil || len(files) != 1 {
		t.Fatalf("credentials %v, %v", files, err)
	}
	for name, c := range map[string]struct {
		args []string
		says []string
	}{
		"with an identity": {[]string{"-cert", files[0], "-key", files[0], "-CAfile", files[0]}, []string{"Verify return code: 0 (ok)", "TLSv1.3", "ALPN protocol: h2"}},
		"by TLS 1.2":       {[]string{"-tls1_2"}, []string{"alert protocol version"}},
	} {
		cmd := exec.CommandContext(t.Context(), "openssl", append([]string{"s_client", "-connect", g.Endpoint, "-alpn", "h2"}, c.args...)...)
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(in, "Q\n") // quits once it is connected
		_ = in.Close()
		out, _ := cmd.CombinedOutput() // it fails where it was refused
		for _, w := range c.says {
			if !strings.Contains(string(out), w) {
				t.Errorf("%s: openssl doesn't say %q:\n%s", name, w, out)
			}
		}
	}
}

// Everything in the clear takes --insecure at both ends, and loopback.
func TestInsecure(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	refused(t, g, 2, "USAGE", []string{"--insecure is for loopback", "--insecure=anywhere"}, "master", "--insecure")
	refused(t, g, 2, "USAGE", []string{"--insecure stands alone"}, "master", "--insecure=maybe")
	refused(t, g, 2, "USAGE", []string{"--insecure is for loopback", "10.1.2.3"}, "status", "--insecure", "--master", "10.1.2.3:7000")
	master := g.Launch("master", "master", "--insecure", "--listen", "127.0.0.1:0", "--http", "off")
	harness.Await(t, "the master", func() error { return logSays(master, "master listening") })
	if err := logSays(master, "everything is sent in the clear"); err != nil {
		t.Error(err)
	}
	agent := g.Launch("agent", "agent", "--insecure", "--config", writeFile(t, filepath.Join(g.Dir, "a.toml"), "[agent]\nagent_id = \"a\"\nagent_port = 0\n[monitoring]\nheartbeat_interval_secs = 1\n", 0o600))
	harness.Await(t, "the agent", func() error { return logSays(agent, "registered with the master") })
	if out := g.MustRun("list-agents", "--insecure"); !strings.Contains(out, "HEALTHY") {
		t.Errorf("list-agents:\n%s", out)
	}
	// Nobody else reaches what runs in the clear, unless that was asked for.
	reached := func(name string) error {
		_, port, ok := strings.Cut(agentAt(t, g, name), ":")
		if !ok {
			t.Fatalf("agent %s is nowhere", name)
		}
		conn, err := net.Dial("tcp", net.JoinHostPort(hostAddress(t), port))
		if err == nil {
			_ = conn.Close() // nothing was said
		}
		return err
	}
	if err := reached("a"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("from another host: %v", err)
	}
	anywhere := g.Launch("anywhere", "agent", "--insecure=anywhere", "--config", writeFile(t, filepath.Join(g.Dir, "b.toml"), "[agent]\nagent_id = \"b\"\nagent_port = 0\n", 0o600))
	harness.Await(t, "the agent", func() error { return logSays(anywhere, "registered with the master") })
	if err := reached("b"); err != nil {
		t.Errorf("anywhere, from another host: %v", err)
	}
	if r := g.Run("list-agents"); r.Code == 0 || !strings.Contains(r.Stderr, "doesn't speak TLS") {
		t.Errorf("a secure client of an insecure master: %+v", r)
	}
	// Nobody gets there what would be good when the grid is secure again.
	for _, args := range [][]string{
		{"token", "create", "--role", "admin"},
		{"token", "revoke", "d4k2v8"},
		{"agents", "ban", "a"},
		{"agents", "unban", "a"},
		{"ca", "rotate"},
		{"ca", "rotate", "--apply"},
		{"ca", "retire", "--apply"},
	} {
		refused(t, g, 7, "IN_THE_CLEAR", []string{"--insecure", "hint: "}, append([]string{"--insecure"}, args...)...)
	}
	endpoint := regexp.MustCompile(`"listen":"([^"]+)"`).FindSubmatch(master.Log())
	channel := rpc.Master(string(endpoint[1]), nil, nil)
	defer channel.Close()
	_, request, err := pki.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	client := sutrav1.NewGridMasterClient(channel)
	if _, err := client.Enroll(t.Context(), &sutrav1.EnrollRequest{Name: "mallory", CertificateRequest: request}); rpc.ReasonOf(err) != rpc.InTheClear {
		t.Errorf("Enroll in the clear: %v", err)
	}
	if _, err := client.Renew(t.Context(), &sutrav1.RenewRequest{CertificateRequest: request}); rpc.ReasonOf(err) != rpc.InTheClear {
		t.Errorf("Renew in the clear: %v", err)
	}
	g.MustRun("token", "list", "--insecure")
	absent(t, filepath.Join(g.Home, "credentials"))
	absent(t, filepath.Join(g.Home, "master", "pki"))
}

// agentAt is where an agent of a grid in the clear is called.
func agentAt(t *testing.T, g *harness.Grid, id string) string {
	t.Helper()
	var resp sutrav1.ListAgentsResponse
	if err := protojson.Unmarshal([]byte(g.MustRun("list-agents", "--insecure", "-o", "json")), &resp); err != nil {
		t.Fatal(err)
	}
	for _, a := range resp.GetAgents() {
		if a.GetAgentId() == id {
			return a.GetEndpoint()
		}
	}
	return ""
}
