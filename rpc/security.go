package rpc

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// Guard is how a server finds out who calls, and whom it keeps out. The zero Guard asks nobody and lets everybody in: it is
// for grids that were told to be insecure.
type Guard struct {
	// Credentials are the server's own; nil: connections are in the clear.
	Credentials *pki.Holder
	// Banned says why an identity is kept out although its certificate holds; nil where none is.
	Banned func(pki.Identity) error
	// Audit puts calls on record; nil: none are.
	Audit *Audit
	// ForMasters: nobody but masters call this server, each over one connection for all of its callers.
	ForMasters bool
}

// Caller is who is at the other end of a server's connection.
type Caller struct {
	credentials.CommonAuthInfo
	// Identity is nobody where Why says that nobody is known.
	Identity pki.Identity
	Why      error
	// Certificate is what it has shown, and Expires when that ends.
	Certificate *x509.Certificate
	Expires     time.Time
	// calls counts those of a stranger; nil where it is none. Who is banned counts as one.
	calls *atomic.Int32
}

// AuthType is how gRPC calls this.
func (Caller) AuthType() string { return "sutra" }

// CallerOf is who made the call with that context; nobody on a connection in the clear, or on one that has outlived the
// certificate it was made with.
func CallerOf(ctx context.Context) pki.Identity {
	caller := callerOf(ctx)
	if time.Now().After(caller.Expires) {
		return pki.Identity{}
	}
	return caller.Identity
}

// CertificateOf is the certificate of who made the call with that context; nil where that is nobody.
func CertificateOf(ctx context.Context) *x509.Certificate { return callerOf(ctx).Certificate }

func callerOf(ctx context.Context) Caller {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return Caller{Why: errInClear}
	}
	caller, ok := p.AuthInfo.(Caller)
	if !ok {
		return Caller{Why: errInClear}
	}
	return caller
}

var errInClear = errors.New("the connection is in the clear")

// admission is a Guard's side of the handshakes: it knows each connection's caller.
type admission struct {
	credentials.TransportCredentials
	guard Guard

	mu    sync.Mutex // guards conns
	conns map[*known]bool
}

// known is a connection whose caller is known.
type known struct {
	net.Conn
	// raw is what Conn lies on.
	raw    net.Conn
	caller pki.Identity
	// shown are the certificates that say so, and by the credentials whose roots they were held against.
	shown []*x509.Certificate
	by    *pki.Credentials
	gone  func(*known)
	// kept is whether it was let in as a stranger, because the caller was banned.
	kept atomic.Bool
}

// Read reads. A stranger that shook hands and says nothing of what it wants is in its handshake still.
func (k *known) Read(p []byte) (int, error) {
	n, err := k.Conn.Read(p)
	if g, ok := k.raw.(*guest); ok && err != nil && k.caller == (pki.Identity{}) && timedOut(err) {
		g.count(slowHandshake)
	}
	return n, err
}

// Close forgets the connection.
func (k *known) Close() error {
	k.gone(k)
	return k.Conn.Close()
}

func newAdmission(g Guard) *admission {
	a := &admission{TransportCredentials: insecure.NewCredentials(), guard: g, conns: map[*known]bool{}}
	if g.Credentials != nil {
		a.TransportCredentials = credentials.NewTLS(g.Credentials.ServerTLS())
	}
	return a
}

// ServerHandshake finds out who calls.
func (a *admission) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	atDoor, _ := raw.(*guest) // always, but for tests that serve by themselves
	conn, info, err := a.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		if atDoor != nil {
			atDoor.failed(err)
		}
		return nil, nil, err
	}
	shown, ok := info.(credentials.TLSInfo)
	if !ok {
		if atDoor != nil {
			err = atDoor.welcome(pki.Identity{})
		}
		return conn, info, err
	}
	caller := Caller{CommonAuthInfo: shown.CommonAuthInfo}
	by, certs := a.guard.Credentials.Get(), shown.State.PeerCertificates
	caller.Identity, caller.Why = a.guard.Credentials.PeerOf(certs)
	if caller.Why == nil {
		caller.Certificate, caller.Expires = certs[0], certs[0].NotAfter
	}
	k := &known{Conn: conn, raw: raw, caller: caller.Identity, shown: certs, by: by, gone: a.forget}
	a.mu.Lock()
	a.conns[k] = true
	a.mu.Unlock()
	if a.distrusts(k) { // since it was looked at; expel may have come before it was on the list
		a.forget(k)
		return nil, nil, errors.New("the root that vouches for it isn't trusted any more")
	}
	banned := a.guard.banned(caller.Identity) != nil // neither may a ban come in between
	k.kept.Store(banned)
	if caller.Why != nil || banned {
		caller.calls = new(atomic.Int32)
	} else if atDoor != nil {
		if err := atDoor.welcome(caller.Identity); err != nil {
			a.forget(k)
			return nil, nil, err
		}
	}
	return k, caller, nil
}

// distrusts tells whether the roots by which a caller was known vouch for it no more.
func (a *admission) distrusts(k *known) bool {
	if k.caller == (pki.Identity{}) || a.guard.Credentials.Get().SameRoots(k.by) {
		return false
	}
	_, why := a.guard.Credentials.PeerOf(k.shown)
	return why != nil
}

func (a *admission) forget(k *known) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.conns, k)
}

// expel ends the connections of those who are banned by now, or whom no root vouches for any more; and those of a stranger that is
// banned no more, who comes anew.
func (a *admission) expel() {
	a.mu.Lock()
	all := slices.Collect(maps.Keys(a.conns))
	a.mu.Unlock()
	for _, k := range all {
		if banned := a.guard.banned(k.caller) != nil; banned || k.kept.Load() || a.distrusts(k) {
			a.forget(k)
			// Its transport finds out. There is no parting word: one who doesn't read could hold up the rest with it.
			_ = k.raw.Close()
		}
	}
}

// authorize tells whether a caller may make a call. What no rule allows is refused.
func (g Guard) authorize(method string, caller Caller, request any, now time.Time) *Error {
	if refused := g.admits(method, caller, now); refused != nil {
		return refused
	}
	policy, _ := PolicyOf(method)
	if id := caller.Identity; g.Credentials != nil && id.Role == sutrav1.Role_ROLE_AGENT && !slices.Contains(policy.Roles, sutrav1.Role_ROLE_ANYONE) {
		if of, ok := agentOf(request); !ok || of != id.Name {
			return Errorf(PermissionDenied, "%s may not speak for agent %q", id, of).
				WithHint("an agent_id goes with its identity: give the agent with another one a home of its own, and a join token")
		}
	}
	return nil
}

// admits tells as much of that as is known before a request is read.
func (g Guard) admits(method string, caller Caller, now time.Time) *Error {
	policy, ok := PolicyOf(method)
	if g.Credentials == nil {
		if policy.SecureOnly {
			return Errorf(InTheClear, "this grid runs in the clear (--insecure), where nobody is known: %s is refused to all", shortName(method)).
				WithHint("start its master, agents and clients without --insecure")
		}
		return nil
	}
	if !ok {
		return Errorf(PermissionDenied, "%s is no method of the grid", method)
	}
	if slices.Contains(policy.Roles, sutrav1.Role_ROLE_ANYONE) {
		return nil
	}
	id := caller.Identity
	switch {
	case caller.Why != nil:
		return Errorf(Unauthenticated, "the caller isn't known here: %v", caller.Why).WithHint("%s", hintFor(method))
	case now.After(caller.Expires):
		return Errorf(Unauthenticated, "the certificate of %s expired at %s", id, caller.Expires.UTC().Format(time.RFC3339)).WithHint("%s", hintFor(method))
	}
	if refused := g.banned(id); refused != nil {
		return refused
	}
	if !slices.Contains(policy.Roles, id.Role) {
		return Errorf(PermissionDenied, "%s, whose role is %s, may not call %s; that takes the role %s", id, pki.RoleWord(id.Role), shortName(method), roleWords(policy.Roles)).
			WithHint("use an identity that has it: sutra login")
	}
	return nil
}

func (g Guard) banned(id pki.Identity) *Error {
	if g.Banned == nil || id == (pki.Identity{}) {
		return nil
	}
	if why := g.Banned(id); why != nil {
		return IsBanned(id, why)
	}
	return nil
}

// IsBanned is what one is told who is kept out, and why.
func IsBanned(id pki.Identity, why error) *Error {
	verb := "agents"
	if id.Kind == pki.User {
		verb = "users"
	}
	return Errorf(Banned, "%s is banned from this grid %v", id, why).WithHint("an admin lets it in again: sutra %s unban %s", verb, id.Name)
}

// agentOf is the agent that a request is about.
func agentOf(request any) (string, bool) {
	switch r := request.(type) {
	case interface{ GetAgent() *sutrav1.Agent }:
		return r.GetAgent().GetAgentId(), true
	case interface{ GetAgentId() string }:
		return r.GetAgentId(), true
	default:
		return "", false
	}
}

// hintFor is what one does whom a server doesn't know.
func hintFor(method string) string {
	if policy, _ := PolicyOf(method); slices.Contains(policy.Roles, sutrav1.Role_ROLE_AGENT) {
		return "give the agent a join token: sutra token create on the master's host, then sutra agent --join-token TOKEN"
	}
	return "on the master's host: sutra token create --role operator; here: sutra login --master HOST:PORT --token TOKEN"
}

func shortName(method string) string { return method[strings.LastIndexByte(method, '/')+1:] }

func roleWords(roles []sutrav1.Role) string {
	words := make([]string, len(roles))
	for i, r := range roles {
		words[i] = pki.RoleWord(r)
	}
	return strings.Join(words, " or ")
}

// Trust is whom a client shows itself as, and whom it wants to find. The zero Trust talks in the clear to anybody.
type Trust struct {
	// Credentials are those that it has, of one grid or several; nil: it has none and wants none.
	Credentials func() []*pki.Credentials
	// Peer is who is to be at the other end.
	Peer pki.Peer
	// Token is for one that has no credentials yet: it talks to nobody but a master of the token's grid.
	Token *pki.Token
}

func (t Trust) transport() credentials.TransportCredentials {
	switch {
	case t.inClear():
		return insecure.NewCredentials()
	case t.Token != nil:
		return credentials.NewTLS(pki.JoinTLS(t.Token.Root))
	default:
		return credentials.NewTLS(pki.ClientTLS(t.Credentials, t.Peer))
	}
}

func (t Trust) inClear() bool { return t.Token == nil && t.Credentials == nil }

// hint is what one does who finds somebody else than is wanted at an address, and why it isn't who is wanted.
func (t Trust) hint(endpoint, why string) string {
	switch {
	case strings.Contains(why, pki.Clocks):
		return "the clock of this host says " + time.Now().UTC().Format(time.RFC3339) + "; compare it with that of the other host (date -u), and set the one " +
			"that is wrong: within a minute a master then shows another certificate"
	case t.Token != nil:
		return "check the address; or have an admin of the grid that is there make a token: sutra token create"
	case t.Peer.Kind == pki.Agent:
		return "two agents share one address, or one has moved; check advertise in their files"
	default:
		return "check the address; to join the grid that is there: sutra token create on its master's host; here: sutra login --master " +
			endpoint + " --token TOKEN, for an agent: sutra agent --join-token TOKEN"
	}
}

// newest is the credentials that a connection would be made with now, for comparison.
func (t Trust) newest() *pki.Credentials {
	if t.Credentials == nil {
		return nil
	}
	if all := t.Credentials(); len(all) > 0 {
		return all[0]
	}
	return nil
}

// Held is the credentials of a holder, as Trust wants them; nil for none: in the clear.
func Held(h *pki.Holder) func() []*pki.Credentials {
	if h == nil {
		return nil
	}
	return h.All
}

// Insecure is how far somebody wanted to do without security.
type Insecure string

// The ways of --insecure.
const (
	Secure Insecure = ""
	// InsecureLoopback is for connections that don't leave the host.
	InsecureLoopback Insecure = "loopback"
	// InsecureAnywhere is for any.
	InsecureAnywhere Insecure = "anywhere"
)

// Allows tells why an address can't be used in the clear; nil where it can, or where it needn't.
func (i Insecure) Allows(address string) error {
	if i == Secure || i == InsecureAnywhere {
		return nil
	}
	if Loopback(address) {
		return nil
	}
	return fmt.Errorf("--insecure is for loopback addresses, and %s is none; --insecure=anywhere sends everything in the clear", address)
}

// tlsTrouble is what a failed handshake's words begin with.
const tlsTrouble = "authentication handshake failed: "

// untrusted tells whether a connection failed because the other end isn't who is wanted, and says why.
func untrusted(message string) (why string, ok bool) {
	_, why, ok = strings.Cut(message, tlsTrouble+pki.Untrusted)
	return strings.TrimSuffix(why, `"`), ok
}
