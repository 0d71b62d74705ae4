package e2e_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// pretender is a server that isn't who its callers look for. It notes what it is asked.
type pretender struct {
	at    string
	mu    sync.Mutex // guards asked
	asked []string
}

// pretend starts one; without a config it talks in the clear.
func pretend(t *testing.T, config *tls.Config) *pretender {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	i := &pretender{at: l.Addr().String()}
	options := []grpc.ServerOption{grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(stream)
		i.mu.Lock()
		i.asked = append(i.asked, method)
		i.mu.Unlock()
		return status.Error(codes.Unimplemented, "it only listens")
	})}
	if config != nil {
		options = append(options, grpc.Creds(credentials.NewTLS(config)))
	}
	server := grpc.NewServer(options...)
	go func() { _ = server.Serve(l) }() // it ends with Stop
	t.Cleanup(server.Stop)
	return i
}

func (i *pretender) heard() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.asked
}

// Who isn't vouched for is asked nothing: not by a person's verbs, nor by an agent, with an identity or with a token, nor by the master
// that finds somebody else in an agent's place. All of them say what is the matter.
func TestImpostors(t *testing.T) {
	t.Parallel()
	g, other := harness.New(t), harness.New(t)
	g.StartMaster()
	other.StartMaster()
	authority, grid := g.Authority()
	_, otherGrid := other.Authority()
	own, foreign, nobody := stolen(t, g), stolen(t, other), forger{t: t}
	token := strings.TrimSpace(g.MustRun("token", "create", "--role", "viewer"))
	forAgents := g.Token()

	same := func(*x509.Certificate) {}
	lasting := func(from, to time.Duration) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Now().Add(from), time.Now().Add(to) }
	}
	const (
		expired    = "its certificate expired at"
		early      = "do the clocks of both hosts agree"
		elsewhere  = "its certificate is of another grid"
		wrongToken = "the join token is of another grid"
		wrongName  = "its certificate doesn't hold"
		wrongUse   = "isn't for this use"
	)
	for n, c := range []struct {
		name string
		by   forger
		grid string
		edit func(*x509.Certificate)              // of a master's or an agent's
		tls  func(config *tls.Config) *tls.Config // nil: as it is
		// What is said of it by those who have an identity, and by those who have a token; "" where it is taken for what it says.
		says, joiner string
		unreachable  bool // it isn't even understood
	}{
		{"a good one's", own, grid, same, nil, "", "", false},
		{"expired", own, grid, lasting(-time.Hour, -time.Minute), nil, expired, expired, false},
		{"not yet valid", own, grid, lasting(time.Hour, 2*time.Hour), nil, early, early, false},
		{"self-signed", nobody, grid, same, nil, elsewhere, wrongToken, false},
		{"another grid's", foreign, otherGrid, same, nil, elsewhere, wrongToken, false},
		{"another grid's, with this one's name", foreign, grid, same, nil, elsewhere, wrongToken, false},
		{"this grid's, with another one's name", own, otherGrid, same, nil, wrongName, wrongName, false},
		{"for clients alone", own, grid, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, nil, wrongUse, wrongUse, false},
		{"not for signing", own, grid, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }, nil, wrongUse, wrongUse, false},
		{"another agent's", own, grid, func(c *x509.Certificate) { c.URIs[0].Path = "/agent/eve" }, nil, "it is agent eve, where", "it is agent eve, where", false},
		{"a person's", own, grid, func(c *x509.Certificate) {
			c.URIs[0].Path, c.Subject.Organization = "/user/eve", []string{"admin"}
		}, nil, "it is user eve, where", "it is user eve, where", false},
		{"TLS 1.2", own, grid, same, func(c *tls.Config) *tls.Config {
			c.MaxVersion = tls.VersionTLS12
			return c
		}, "doesn't speak TLS 1.3", "doesn't speak TLS 1.3", true},
		{"none", own, grid, same, func(c *tls.Config) *tls.Config {
			c.Certificates = nil
			c.GetCertificate = func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, errors.New("there is none") }
			return c
		}, "broke off the handshake", "broke off the handshake", true},
		{"in the clear", own, grid, same, func(*tls.Config) *tls.Config { return nil }, "doesn't speak TLS", "doesn't speak TLS", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			posing := func(kind, name string) *pretender {
				cert := c.by.forge(c.grid, func(cert *x509.Certificate) {
					cert.URIs[0].Path, cert.Subject.Organization = "/"+kind+"/"+name, nil
					cert.ExtKeyUsage = append(cert.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
					c.edit(cert)
				})
				config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert}
				if c.tls != nil {
					config = c.tls(config)
				}
				return pretend(t, config)
			}
			code, reason := 6, "(UNTRUSTED_PEER)"
			switch {
			case c.says == "":
				code, reason = 1, "(UNIMPLEMENTED)" // its answer
			case c.unreachable:
				code, reason = 4, "_UNREACHABLE)"
			}
			refuses := func(who, says string, r harness.Result) {
				if r.Code != code || !strings.Contains(r.Stderr, says) || !strings.Contains(r.Stderr, reason) {
					t.Errorf("%s: want exit code %d, %s and %q, got %+v", who, code, reason, says, r)
				}
			}

			master := posing("master", "m")
			refuses("a person", c.says, g.Run("status", "--master", master.at))
			refuses("a person who joins", c.joiner, g.Run("login", "--home", filepath.Join(g.Dir, "new"), "--master", master.at, "--token", token))
			member, newcomer := fmt.Sprintf("member-%d", n), fmt.Sprintf("newcomer-%d", n)
			identity, err := authority.Own(pki.AgentIdentity(grid, member), time.Hour)
			if err == nil {
				err = identity.Save(filepath.Join(g.Home, "agents", member, "identity.pem"))
			}
			if err != nil {
				t.Fatal(err)
			}
			file := func(id string) string {
				return writeFile(t, filepath.Join(g.Dir, id+".toml"), fmt.Sprintf("[agent]\nagent_id = %q\nagent_port = 0\nmaster_endpoint = %q\n", id, master.at), 0o600)
			}
			for id, says := range map[string]string{member: c.says, newcomer: c.joiner} {
				agent := g.LaunchAgent(id, file(id), "--join-token", forAgents)
				harness.Await(t, id+" to say why it doesn't register", func() error {
					return errors.Join(logSays(agent, "not registered; trying on"), logSays(agent, says))
				})
				agent.Stop()
			}

			// The master's turn.
			id := fmt.Sprintf("agent-%d", n)
			agent := posing("agent", id)
			if _, err := as(t, g, pki.AgentIdentity(grid, id)).RegisterAgent(t.Context(), &sutrav1.RegisterAgentRequest{
				Agent:             &sutrav1.Agent{AgentId: id, InstanceId: id, Endpoint: agent.at, MaxNodes: 1},
				HeartbeatInterval: durationpb.New(time.Second),
			}); err != nil {
				t.Fatal(err)
			}
			refuses("the master", c.says, g.Run("spawn", "-a", id))

			asMaster, asAgent := strings.Join(master.heard(), " "), strings.Join(agent.heard(), " ")
			if c.says != "" && asMaster+asAgent != "" {
				t.Errorf("as a master it was asked %q, as an agent %q", asMaster, asAgent)
			}
			for _, method := range []string{"GetClusterStatus", "Enroll", "RegisterAgent"} {
				if c.says == "" && !strings.Contains(asMaster, method) {
					t.Errorf("as a master it was asked %q, and not %s", asMaster, method)
				}
			}
			if c.says == "" && !strings.Contains(asAgent, "SpawnNode") {
				t.Errorf("as an agent it was asked %q", asAgent)
			}
		})
	}
}
