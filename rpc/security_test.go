package rpc

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

const gridID = "d4k2v8grid"

func newAuthority(t testing.TB, grid string) *pki.Authority {
	t.Helper()
	a, err := pki.OpenAuthority(filepath.Join(t.TempDir(), "pki"), grid)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// held are an identity's credentials, for an hour.
func held(t testing.TB, a *pki.Authority, id pki.Identity) *pki.Holder {
	t.Helper()
	h := &pki.Holder{}
	renew(t, a, id, h)
	return h
}

func renew(t testing.TB, a *pki.Authority, id pki.Identity, h *pki.Holder) {
	t.Helper()
	c, err := a.Own(id, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	h.Set(c)
}

// methods are those of the grid's services.
func methods() map[string]protoreflect.MethodDescriptor {
	all := map[string]protoreflect.MethodDescriptor{}
	for _, file := range []protoreflect.FileDescriptor{sutrav1.File_sutra_v1_grid_master_proto, sutrav1.File_sutra_v1_grid_agent_proto} {
		for i := range file.Services().Len() {
			of := file.Services().Get(i).Methods()
			for j := range of.Len() {
				all[fullMethod(of.Get(j))] = of.Get(j)
			}
		}
	}
	return all
}

// request is one of a method's, about an agent where it names any.
func request(t *testing.T, m protoreflect.MethodDescriptor, agent string) proto.Message {
	t.Helper()
	kind, err := protoregistry.GlobalTypes.FindMessageByName(m.Input().FullName())
	if err != nil {
		t.Fatal(err)
	}
	made := kind.New()
	fields := m.Input().Fields()
	if f := fields.ByName("agent_id"); f != nil {
		made.Set(f, protoreflect.ValueOfString(agent))
	}
	if f := fields.ByName("agent"); f != nil {
		made.Set(f, protoreflect.ValueOfMessage((&sutrav1.Agent{AgentId: agent}).ProtoReflect()))
	}
	return made.Interface()
}

// The contract's words, written out: whoever changes who may do what changes this table, too.
var mayCall = map[string]string{
	"/sutra.v1.GridMaster/RegisterAgent": "agent", "/sutra.v1.GridMaster/Heartbeat": "agent", "/sutra.v1.GridMaster/UnregisterAgent": "agent",
	"/sutra.v1.GridMaster/Enroll": "anyone", "/sutra.v1.GridMaster/Renew": "anyone",
	"/sutra.v1.GridMaster/CreateToken": "admin", "/sutra.v1.GridMaster/ListTokens": "admin", "/sutra.v1.GridMaster/RevokeToken": "admin",
	"/sutra.v1.GridMaster/BanAgent": "admin", "/sutra.v1.GridMaster/UnbanAgent": "admin",
	"/sutra.v1.GridMaster/GetAuthority": "admin", "/sutra.v1.GridMaster/RotateAuthority": "admin", "/sutra.v1.GridMaster/RetireAuthority": "admin",
	"/sutra.v1.GridMaster/BanUser": "admin", "/sutra.v1.GridMaster/UnbanUser": "admin", "/sutra.v1.GridMaster/ListBans": "viewer operator admin",
	"/sutra.v1.GridMaster/SpawnNode": "operator admin", "/sutra.v1.GridMaster/StopNode": "operator admin",
	"/sutra.v1.GridMaster/RestartNode": "operator admin", "/sutra.v1.GridMaster/RemoveNode": "operator admin",
	"/sutra.v1.GridMaster/GetNodeStatus": "viewer operator admin", "/sutra.v1.GridMaster/ListNodes": "viewer operator admin",
	"/sutra.v1.GridMaster/ListAgents": "viewer operator admin", "/sutra.v1.GridMaster/GetClusterStatus": "viewer operator admin",
	"/sutra.v1.GridMaster/TailLogs": "viewer operator admin", "/sutra.v1.GridMaster/WatchEvents": "viewer operator admin",
	"/sutra.v1.GridAgent/SpawnNode": "master", "/sutra.v1.GridAgent/StopNode": "master", "/sutra.v1.GridAgent/RestartNode": "master",
	"/sutra.v1.GridAgent/GetNodeStatus": "master", "/sutra.v1.GridAgent/ListNodes": "master", "/sutra.v1.GridAgent/TailLogs": "master",
}

func TestEveryMethodAndEveryCaller(t *testing.T) {
	now := time.Now()
	later, earlier := now.Add(time.Hour), now.Add(-time.Second)
	banned := errors.New("by user admin")
	guard := Guard{Credentials: &pki.Holder{}, Banned: func(id pki.Identity) error {
		if id.Name == "banned" {
			return banned
		}
		return nil
	}}
	user := func(name string, r sutrav1.Role) pki.Identity { return pki.UserIdentity(gridID, name, r) }
	callers := map[string]struct {
		Caller
		role    string // whose rights it has; "": none
		refused Reason // of one that has none
	}{
		"nobody":           {Caller{Why: errors.New("it shows no certificate")}, "", Unauthenticated},
		"one in the clear": {callerOf(context.Background()), "", Unauthenticated},
		"viewer":           {Caller{Identity: user("v", sutrav1.Role_ROLE_VIEWER), Expires: later}, "viewer", ""},
		"operator":         {Caller{Identity: user("o", sutrav1.Role_ROLE_OPERATOR), Expires: later}, "operator", ""},
		"admin":            {Caller{Identity: user("a", sutrav1.Role_ROLE_ADMIN), Expires: later}, "admin", ""},
		"agent":            {Caller{Identity: pki.AgentIdentity(gridID, "agent-001"), Expires: later}, "agent", ""},
		"master":           {Caller{Identity: pki.MasterIdentity(gridID, "m"), Expires: later}, "master", ""},
		"expired admin":    {Caller{Identity: user("a", sutrav1.Role_ROLE_ADMIN), Expires: earlier}, "", Unauthenticated},
		"expired agent":    {Caller{Identity: pki.AgentIdentity(gridID, "agent-001"), Expires: earlier}, "", Unauthenticated},
		"expired master":   {Caller{Identity: pki.MasterIdentity(gridID, "m"), Expires: earlier}, "", Unauthenticated},
		"banned agent":     {Caller{Identity: pki.AgentIdentity(gridID, "banned"), Expires: later}, "", Banned},
		"banned admin":     {Caller{Identity: user("banned", sutrav1.Role_ROLE_ADMIN), Expires: later}, "", Banned},
		"without role":     {Caller{Identity: user("x", sutrav1.Role_ROLE_UNSPECIFIED), Expires: later}, "", PermissionDenied},
		"of no such role":  {Caller{Identity: user("x", sutrav1.Role(99)), Expires: later}, "", PermissionDenied},
		"role of anyone":   {Caller{Identity: user("x", sutrav1.Role_ROLE_ANYONE), Expires: later}, "", PermissionDenied},
	}
	all := methods()
	if len(all) != len(mayCall) {
		t.Errorf("there are %d methods, and the table has %d", len(all), len(mayCall))
	}
	for method, m := range all {
		policy, _ := PolicyOf(method)
		if declared := strings.ReplaceAll(roleWords(policy.Roles), " or ", " "); declared != mayCall[method] {
			t.Errorf("%s is for %q by its policy, for %q by the table", method, declared, mayCall[method])
		}
		allowed := strings.Fields(mayCall[method])
		for who, c := range callers {
			want := c.refused
			if want == "" {
				want = PermissionDenied
			}
			for _, role := range allowed {
				if role == "anyone" || role == c.role {
					want = ""
				}
			}
			got := guard.authorize(method, c.Caller, request(t, m, "agent-001"), now)
			if (want == "") != (got == nil) || got != nil && got.Reason != want {
				t.Errorf("%s by %s: %v, want %q", method, who, got, want)
			}
			if got != nil && c.Why != nil && !strings.Contains(got.Message, c.Why.Error()) {
				t.Errorf("%s by %s doesn't say why it isn't known: %q", method, who, got.Message)
			}
			if got != nil && (got.Hint == "" || got.Message == "") {
				t.Errorf("%s by %s doesn't say what to do: %q, hint %q", method, who, got.Message, got.Hint)
			}
		}
	}
	for _, unknown := range []string{"/sutra.v1.GridMaster/Nothing", "/grpc.health.v1.Health/Check", "", "/"} {
		for who, c := range callers {
			if got := guard.authorize(unknown, c.Caller, nil, now); got == nil || got.Reason != PermissionDenied {
				t.Errorf("%q by %s: %v", unknown, who, got)
			}
		}
	}
}

// In the clear nobody is given anything that lasts: what is about who may come in is refused, and all else is let through.
func TestWhatIsRefusedInTheClear(t *testing.T) {
	for method, m := range methods() {
		policy, _ := PolicyOf(method)
		admits := mayCall[method] == "anyone" || mayCall[method] == "admin" && policy.Mutates
		switch got := (Guard{}).authorize(method, callerOf(context.Background()), request(t, m, "agent-001"), time.Now()); {
		case (got != nil) != policy.SecureOnly, admits && got == nil:
			t.Errorf("%s: %v, want it refused: %t", method, got, policy.SecureOnly || admits)
		case got != nil && (got.Reason != InTheClear || got.Code() != codes.FailedPrecondition || !strings.Contains(got.Message, shortName(method)) || got.Hint == ""):
			t.Errorf("%s: %+v", method, got)
		}
	}
}

// What an agent may call it may call for itself alone: each such request must name an agent, and none may be a stream,
// whose request isn't known when it is admitted.
func TestAgentsSpeakForThemselves(t *testing.T) {
	now := time.Now()
	guard := Guard{Credentials: &pki.Holder{}}
	caller := Caller{Identity: pki.AgentIdentity(gridID, "agent-001"), Expires: now.Add(time.Hour)}
	checked := 0
	for method, m := range methods() {
		if mayCall[method] != "agent" {
			continue
		}
		checked++
		if m.IsStreamingClient() || m.IsStreamingServer() {
			t.Errorf("%s streams, and agents may call it", method)
		}
		if (m.Input().Fields().ByName("agent_id") == nil) == (m.Input().Fields().ByName("agent") == nil) {
			t.Errorf("the request of %s must name one agent", method)
		}
		for of, want := range map[string]bool{"agent-001": true, "agent-002": false, "": false, "agent-0011": false, "AGENT-001": false} {
			if got := guard.authorize(method, caller, request(t, m, of), now); (got == nil) != want || got != nil && (got.Reason != PermissionDenied || got.Hint == "") {
				t.Errorf("agent-001 calls %s for %q: %v", method, of, got)
			}
		}
		for name, odd := range map[string]any{"no request": nil, "one that names none": &sutrav1.ListNodesResponse{}, "an empty one": request(t, m, "")} {
			if got := guard.authorize(method, caller, odd, now); got == nil {
				t.Errorf("agent-001 calls %s with %s", method, name)
			}
		}
	}
	if checked != 3 {
		t.Errorf("agents may call %d methods, want 3", checked)
	}
}

// Each beat of each agent passes here.
func TestAuthorizeAllocatesNothing(t *testing.T) {
	now := time.Now()
	guard := Guard{Credentials: &pki.Holder{}, Banned: func(pki.Identity) error { return nil }}
	ctx := withCaller(Caller{Identity: pki.AgentIdentity(gridID, "agent-001"), Expires: now.Add(time.Hour)})
	var beat any = &sutrav1.HeartbeatRequest{AgentId: "agent-001"}
	if n := testing.AllocsPerRun(100, func() {
		if guard.authorize(sutrav1.GridMaster_Heartbeat_FullMethodName, callerOf(ctx), beat, now) != nil {
			t.Error("refused")
		}
	}); n > 0 {
		t.Errorf("%v allocations a call", n)
	}
}

func TestInsecureAllows(t *testing.T) {
	for address, loopback := range map[string]bool{
		"127.0.0.1:7000": true, "127.8.9.1:7000": true, "[::1]:7000": true, "::1": true, "[::1]": true, "127.0.0.1": true,
		"localhost:7000": true, "localhost": true, "[::ffff:127.0.0.1]:7000": true,
		"0.0.0.0:7000": false, "[::]:7000": false, ":7000": false, "": false, "10.0.0.1:7000": false, "[fe80::1%lo]:7000": false, "[2001:db8::1]:7000": false,
		"master.example.org:7000": false, "localhost.example.org:7000": false, "127.0.0.1.nip.io:7000": false, "128.0.0.1:7000": false, "0:7000": false,
		"*:7000": false, "127.1:7000": false, "2130706433:7000": false,
	} {
		err := InsecureLoopback.Allows(address)
		if (err == nil) != loopback {
			t.Errorf("--insecure at %q: %v", address, err)
		}
		if err != nil && !strings.Contains(err.Error(), "--insecure=anywhere") {
			t.Errorf("%q doesn't say what to do", err)
		}
		for _, any := range []Insecure{Secure, InsecureAnywhere} {
			if err := any.Allows(address); err != nil {
				t.Errorf("%q at %q: %v", any, address, err)
			}
		}
	}
}

// shakes shakes hands, and then listens until its caller hangs up.
func shakes(config *tls.Config) func(net.Conn) {
	return func(raw net.Conn) {
		c := tls.Server(raw, config)
		if c.Handshake() == nil {
			_, _ = io.Copy(io.Discard, c)
		}
	}
}

// Each case calls ListAgents, which is tried again where that may help.
func TestWhoAnswersATLSCall(t *testing.T) {
	ours, other := newAuthority(t, gridID), newAuthority(t, "another")
	user := Held(held(t, ours, pki.UserIdentity(gridID, "ann", sutrav1.Role_ROLE_VIEWER)))
	serves := func(h *pki.Holder) func(*testing.T) *running {
		return func(t *testing.T) *running {
			srv := NewServer(zerolog.Nop(), nil, Guard{Credentials: h})
			sutrav1.RegisterGridMasterServer(srv, &master{})
			return serve(t, srv, anyPort)
		}
	}
	raw := func(treat func(net.Conn)) func(*testing.T) *running {
		return func(t *testing.T) *running {
			l := listen(t, anyPort)
			done := make(chan struct{})
			go func() {
				defer close(done)
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					treat(c)
					_ = c.Close()
				}
			}()
			t.Cleanup(func() { _ = l.Close(); <-done })
			return &running{countingListener: l, endpoint: l.Addr().String()}
		}
	}
	shown, err := ours.Own(pki.MasterIdentity(gridID, "m"), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	pair := tls.Certificate{Certificate: shown.Chain(), PrivateKey: shown.Key()}
	expired := &pki.Holder{}
	gone, err := ours.Own(pki.MasterIdentity(gridID, "m"), -time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	expired.Set(gone)
	token, err := pki.NewToken(other.Hash())
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		start   func(*testing.T) *running
		call    func(endpoint string) *Channel // nil: as a user
		reason  Reason
		message string // AT stands for the endpoint
		hint    string // a part of it
		dials   int32
	}{
		"another grid": {
			serves(held(t, other, pki.MasterIdentity("another", "m"))), nil, UntrustedPeer,
			"who answers at AT isn't taken for the master of this grid: its certificate is of another grid, or of this grid's before it was made anew",
			"sutra login --master AT --token TOKEN", 1,
		},
		"an agent": {
			serves(held(t, ours, pki.AgentIdentity(gridID, "agent-001"))), nil, UntrustedPeer,
			"who answers at AT isn't taken for the master of this grid: it is agent agent-001, where a master was expected", "check the address", 1,
		},
		"an expired master": {serves(expired), nil, UntrustedPeer, "isn't taken for the master of this grid: its certificate expired at", "", 1},
		"another agent": {
			serves(held(t, ours, pki.AgentIdentity(gridID, "agent-002"))),
			func(endpoint string) *Channel { return NewPool(user, nil).Agent("agent-001", endpoint) }, UntrustedPeer,
			"who answers at AT isn't taken for agent agent-001 of this grid: it is agent agent-002, where agent agent-001 was expected", "check advertise in their files", 1,
		},
		"another grid than the token's": {
			serves(held(t, ours, pki.MasterIdentity(gridID, "m"))), func(endpoint string) *Channel { return Join(endpoint, token) }, UntrustedPeer,
			"who answers at AT isn't taken for the master of this grid: the join token is of another grid", "sutra token create", 1,
		},
		"one who has no identity yet": {
			serves(held(t, ours, pki.MasterIdentity(gridID, "m"))), func(endpoint string) *Channel { return Master(endpoint, Held(&pki.Holder{}), nil) }, UntrustedPeer,
			"who answers at AT isn't taken for the master of this grid: this side has no identity of any grid yet", "sutra login --master AT --token TOKEN", 1,
		},
		"a grid in the clear": {
			func(t *testing.T) *running { return serveMaster(t, &master{}, anyPort) }, nil, MasterUnreachable,
			"can't reach the master at AT: what listens there doesn't speak TLS: it is another service, or a grid with --insecure, which is called with --insecure as well", "", 4,
		},
		"a grid with TLS, called in the clear": {
			serves(held(t, ours, pki.MasterIdentity(gridID, "m"))), func(endpoint string) *Channel { return Master(endpoint, nil, nil) }, MasterUnreachable,
			"can't reach the master at AT: what listens there closed the connection at once, as a grid without --insecure does to those who call with it", "", 4,
		},
		"a server without identity": {serves(&pki.Holder{}), nil, MasterUnreachable, "can't reach the master at AT: it broke off the handshake, as one does that has no identity in a grid yet", "", 4},
		"a web server":              {raw(says("HTTP/1.1 400 Bad Request\r\n\r\n")), nil, MasterUnreachable, "what listens there doesn't speak TLS: it is another service, or a grid with --insecure", "", 4},
		"SSH":                       {raw(says("SSH-2.0-OpenSSH_9.6\r\n")), nil, MasterUnreachable, "what listens there doesn't speak TLS: it is another service, or a grid with --insecure", "", 4},
		"one who closes at once":    {raw(func(net.Conn) {}), nil, MasterUnreachable, "can't reach the master at AT: what listens there closed the connection at once", "", 4},
		"a web server with TLS":     {raw(shakes(&tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}})), nil, MasterUnreachable, "can't reach the master at AT: what listens there doesn't speak gRPC", "", 4},
		"one without protocols":     {raw(shakes(&tls.Config{Certificates: []tls.Certificate{pair}})), nil, MasterUnreachable, "can't reach the master at AT: what listens there doesn't speak gRPC", "", 4},
		"one of TLS 1.2":            {raw(shakes(&tls.Config{Certificates: []tls.Certificate{pair}, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}})), nil, MasterUnreachable, "can't reach the master at AT: what listens there doesn't speak TLS 1.3, as all of a grid do", "", 4},
		"another service with TLS": {
			func(t *testing.T) *running {
				srv := NewServer(zerolog.Nop(), nil, Guard{Credentials: held(t, ours, pki.MasterIdentity(gridID, "m"))})
				return serve(t, srv, anyPort)
			}, nil, MasterUnreachable, "can't reach the master at AT: what listens there is another gRPC service", "", 1,
		},
		"nobody": {
			func(t *testing.T) *running {
				return &running{countingListener: &countingListener{}, endpoint: closedPort(t)}
			}, nil,
			MasterUnreachable, "can't reach the master at AT: connection refused", "", 0,
		},
	} {
		t.Run(name, func(t *testing.T) {
			checkLeaks(t)
			there := c.start(t)
			channel := Master(there.endpoint, user, nil)
			if c.call != nil {
				channel = c.call(there.endpoint)
			}
			t.Cleanup(channel.Close)
			err := listAgents(t.Context(), sutrav1.NewGridMasterClient(channel))
			wantError(t, err, c.reason, strings.ReplaceAll(c.message, "AT", there.endpoint))
			e := AsError(err)
			if strings.Contains(e.Message, "--insecure") != strings.Contains(c.message, "--insecure") {
				t.Errorf("--insecure is spoken of, or isn't: %q", e.Message)
			}
			if hint := strings.ReplaceAll(c.hint, "AT", there.endpoint); !strings.Contains(e.Hint, hint) || strings.HasPrefix(c.message, "can't reach") && strings.Contains(e.Message, "desc =") {
				t.Errorf("hint %q, want %q", e.Hint, hint)
			}
			if c.reason == UntrustedPeer && (e.Code() != codes.Unauthenticated || !NoEffect(err) || !Unanswered(err)) {
				t.Errorf("code %s, NoEffect %v, Unanswered %v", e.Code(), NoEffect(err), Unanswered(err))
			}
			if got := there.accepted.Load(); got != c.dials {
				t.Errorf("%d dials, want %d", got, c.dials)
			}
		})
	}
}

// withCaller is a call's context.
func withCaller(c Caller) context.Context {
	return peer.NewContext(context.Background(), &peer.Peer{AuthInfo: c})
}
