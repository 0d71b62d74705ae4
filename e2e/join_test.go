package e2e_test

import (
	"crypto/ecdsa"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// newKey is a key to join with.
func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, _, err := pki.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// joinAs asks for an identity with a token, a key of one's own and a name; as a person where role is unspecified.
func joinAs(t *testing.T, g *harness.Grid, secret string, key *ecdsa.PrivateKey, name string, role sutrav1.Role) (*pki.Credentials, error) {
	t.Helper()
	token, err := pki.ParseToken(secret)
	if err != nil {
		t.Fatal(err)
	}
	request, err := pki.Request(key)
	if err != nil {
		t.Fatal(err)
	}
	channel := rpc.Join(g.Endpoint, token)
	defer channel.Close()
	resp, err := sutrav1.NewGridMasterClient(channel).Enroll(t.Context(), &sutrav1.EnrollRequest{
		TokenId: token.ID, TokenSecret: token.Secret[:], CertificateRequest: request, Name: name, Role: role,
	})
	if err != nil {
		return nil, err
	}
	c, err := pki.FromAnswer(key, resp.GetCertificates())
	if err == nil && c.Identity.Role != resp.GetRole() {
		t.Errorf("%s is told that its role is %s", c.Identity, pki.RoleWord(resp.GetRole()))
	}
	return c, err
}

// renewAs asks for another certificate, with a key of its own.
func renewAs(t *testing.T, g *harness.Grid, c *pki.Credentials) (*pki.Credentials, error) {
	t.Helper()
	key, request, err := pki.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	channel := rpc.Master(g.Endpoint, func() []*pki.Credentials { return []*pki.Credentials{c} }, nil)
	defer channel.Close()
	resp, err := sutrav1.NewGridMasterClient(channel).Renew(t.Context(), &sutrav1.RenewRequest{CertificateRequest: request})
	if err != nil {
		return nil, err
	}
	return pki.FromAnswer(key, resp.GetCertificates())
}

// usesLeft is how many may still join with a token.
func usesLeft(t *testing.T, g *harness.Grid, secret string) uint32 {
	t.Helper()
	resp, err := g.Client().ListTokens(t.Context(), &sutrav1.ListTokensRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range resp.GetTokens() {
		if token.GetTokenId() == strings.Split(secret, ":")[2] {
			return token.GetUsesLeft()
		}
	}
	t.Fatal("the token isn't listed")
	return 0
}

// personsToken is a token for people.
func personsToken(t *testing.T, g *harness.Grid, role string, args ...string) string {
	t.Helper()
	return strings.TrimSpace(g.MustRun(append([]string{"token", "create", "--role", role}, args...)...))
}

const asAgent, asPerson = sutrav1.Role_ROLE_AGENT, sutrav1.Role_ROLE_UNSPECIFIED

// A second host, that is a second home, joins with one token and one command; nobody joins with the same token again.
func TestJoin(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	run := func(home string, args ...string) harness.Result {
		return g.Run(append(args, "--home", filepath.Join(g.Dir, home))...)
	}
	token := strings.TrimSpace(g.MustRun("token", "create", "--agent-id", "agent-b"))
	file := g.AgentFile("agent-b", manyProfiles)
	g.LaunchAgent("agent-b", file, "--home", filepath.Join(g.Dir, "b"), "--join-token", token)
	g.AwaitAgent("agent-b", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: "agent-b", Profile: "sleep"})
	again := run("c", "agent", "--config", file, "--join-token", token)
	if again.Code != 6 || !strings.Contains(again.Stderr, "was used up (TOKEN_REFUSED)") || !strings.Contains(again.Stderr, "sutra token create") {
		t.Errorf("the same token again: %+v", again)
	}
	// People.
	viewer := strings.TrimSpace(g.MustRun("token", "create", "--role", "viewer", "--uses", "2"))
	for _, home := range []string{"v1", "v2"} {
		if r := run(home, "login", "--master", g.Endpoint, "--token", viewer, "--name", home); r.Code != 0 || !strings.Contains(r.Stdout, "as user "+home+", with the role viewer") {
			t.Errorf("login: %+v", r)
		}
		if r := run(home, "status", "--master", g.Endpoint); r.Code != 0 {
			t.Errorf("status of a viewer: %+v", r)
		}
		if r := run(home, "stop", "-n", node.GetNodeId(), "--master", g.Endpoint); r.Code != 6 || !strings.Contains(r.Stderr, "(PERMISSION_DENIED)") {
			t.Errorf("stop by a viewer: %+v", r)
		}
	}
	if r := run("v3", "login", "--master", g.Endpoint, "--token", viewer); r.Code != 6 || !strings.Contains(r.Stderr, "was used up") {
		t.Errorf("a third login with two uses: %+v", r)
	}
	if r := run("nobody", "status", "--master", g.Endpoint); r.Code != 6 || !strings.Contains(r.Stderr, "(UNTRUSTED_PEER)") || !strings.Contains(r.Stderr, "sutra login") {
		t.Errorf("status of nobody: %+v", r)
	}

	// Tokens that are none, or not for this.
	other := harness.New(t)
	other.StartMaster()
	foreign := strings.TrimSpace(other.MustRun("token", "create", "--role", "viewer"))
	revoked := strings.TrimSpace(g.MustRun("token", "create", "--role", "viewer"))
	g.MustRun("token", "revoke", strings.Split(revoked, ":")[2])
	fresh := strings.TrimSpace(g.MustRun("token", "create", "--role", "viewer"))
	short := strings.TrimSpace(g.MustRun("token", "create", "--role", "viewer", "--ttl", "1s", "--uses", "10000"))
	forAgents := strings.TrimSpace(g.MustRun("token", "create"))
	parts := strings.Split(fresh, ":")
	over := time.Now().Add(time.Second) // its end, or after it
	harness.Await(t, "the token's end", func() error {
		if now := time.Now(); !now.After(over) {
			return fmt.Errorf("it is %s only", now)
		}
		return nil
	})
	for says, token := range map[string]string{
		"isn't known here":          revoked,
		"expired at":                short,
		"has another secret":        strings.Join([]string{parts[0], parts[1], parts[2], strings.Split(viewer, ":")[3]}, ":"),
		"is for the role agent":     forAgents,
		"the token is cut off":      fresh[:len(fresh)-7],
		"is of another grid":        foreign,
		"that is no join token":     "hello",
		"the token's id is damaged": strings.Replace(fresh, parts[2], "x"+parts[2][1:]+"!", 1),
	} {
		r := run("x", "login", "--master", g.Endpoint, "--token", token)
		if r.Code != 6 || !strings.Contains(r.Stderr, says) || !strings.Contains(r.Stderr, "hint: ") {
			t.Errorf("want %q: %+v", says, r)
		}
		if secret := strings.Split(token, ":"); len(secret) == 4 && strings.Contains(r.Stderr, secret[3]) {
			t.Errorf("the error shows the secret: %s", r.Stderr)
		}
	}
	if files, err := filepath.Glob(filepath.Join(g.Dir, "x", "credentials", "*.pem")); err != nil || len(files) > 0 {
		t.Errorf("refused, and there is %v, %v", files, err)
	}
}

// Of two agents that come with one token at the same time, one joins.
func TestTokenIsUsedOnce(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	for round := range 2 { // those who come too late fail, and a host that fails often has to wait
		secret := g.Token()
		token, err := pki.ParseToken(secret)
		if err != nil {
			t.Fatal(err)
		}
		const joiners = 8
		errs := make([]error, joiners)
		var group sync.WaitGroup
		for i := range joiners {
			group.Go(func() {
				_, request, err := pki.NewRequest()
				if err != nil {
					errs[i] = err
					return
				}
				channel := rpc.Join(g.Endpoint, token)
				defer channel.Close()
				_, errs[i] = sutrav1.NewGridMasterClient(channel).Enroll(t.Context(), &sutrav1.EnrollRequest{
					TokenId: token.ID, TokenSecret: token.Secret[:], CertificateRequest: request, Name: fmt.Sprintf("agent-%d-%d", round, i), Role: sutrav1.Role_ROLE_AGENT,
				})
			})
		}
		group.Wait()
		joined := 0
		for _, err := range errs {
			switch {
			case err == nil:
				joined++
			case rpc.ReasonOf(err) != rpc.TokenRefused:
				t.Errorf("refused with %v", err)
			}
		}
		if joined != 1 {
			t.Errorf("%d joined with a token for one", joined)
		}
	}
}

// One use of a token gives one identity: who asks again, because the answer was lost, gets the same, and no other.
func TestOneUseGivesOneIdentity(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("agent-001", manyProfiles)
	for secret, c := range map[string]struct {
		role   sutrav1.Role
		own    string
		others []string
	}{
		g.Token():                    {asAgent, "agent-x", []string{"agent-001", "agent-y"}},
		personsToken(t, g, "viewer"): {asPerson, "anna", []string{"bob", "root"}},
	} {
		key := newKey(t)
		for range 3 {
			if got, err := joinAs(t, g, secret, key, c.own, c.role); err != nil || got.Identity.Name != c.own {
				t.Errorf("%s: %v", c.own, err)
			}
		}
		for _, other := range c.others {
			if _, err := joinAs(t, g, secret, key, other, c.role); rpc.ReasonOf(err) != rpc.TokenRefused || !strings.Contains(err.Error(), "was used up") {
				t.Errorf("%s with the key and the token of %s: %v", other, c.own, err)
			}
		}
		if _, err := joinAs(t, g, secret, newKey(t), c.own, c.role); rpc.ReasonOf(err) != rpc.TokenRefused {
			t.Errorf("%s with another key: %v", c.own, err)
		}
	}
	// With a token of more uses the same key counts once for each name.
	secret, key := personsToken(t, g, "viewer", "--uses", "2"), newKey(t)
	for _, name := range []string{"carl", "dora", "carl"} {
		if _, err := joinAs(t, g, secret, key, name, asPerson); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := usesLeft(t, g, secret); n != 0 {
		t.Errorf("%d uses are left", n)
	}
}

// An agent's id that was given belongs to whom it was given, though it isn't there: another gets it with no token but one that is made
// for that id, and then the holder from before gets no further certificates.
func TestAgentsIDBelongsToItsHolder(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	options := []string{"--degraded-after", "2s", "--offline-after", "3s"}
	master := g.StartMaster(options...)
	isTaken := func(what string, err error, id string) {
		t.Helper()
		if rpc.ReasonOf(err) != rpc.AgentIDTaken || !strings.Contains(rpc.AsError(err).Hint, "sutra token create --agent-id "+id) {
			t.Errorf("%s: %v", what, err)
		}
	}
	// One that has never registered.
	first, err := joinAs(t, g, g.Token(), newKey(t), "agent-007", asAgent)
	if err != nil {
		t.Fatal(err)
	}
	spare := g.Token()
	_, err = joinAs(t, g, spare, newKey(t), "agent-007", asAgent)
	isTaken("a second one of the id", err, "agent-007")
	if n := usesLeft(t, g, spare); n != 1 {
		t.Errorf("who was refused used the token up: %d uses are left", n)
	}
	// Of many at once, each with a token of its own, one gets it.
	const joiners = 6
	tokens, errs := make([]string, joiners), make([]error, joiners)
	for i := range joiners {
		tokens[i] = g.Token()
	}
	var group sync.WaitGroup
	for i := range joiners {
		key := newKey(t)
		group.Go(func() { _, errs[i] = joinAs(t, g, tokens[i], key, "agent-008", asAgent) })
	}
	group.Wait()
	joined := 0
	for _, err := range errs {
		if err == nil {
			joined++
		} else if rpc.ReasonOf(err) != rpc.AgentIDTaken {
			t.Error(err)
		}
	}
	if joined != 1 {
		t.Errorf("%d of %d joined as one agent", joined, joiners)
	}
	// One that is away, with a node that is wanted; also after the master's restart.
	victim := g.StartAgent("victim", manyProfiles)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: "victim", Profile: "sleep"})
	victim.Kill()
	g.AwaitAgent("victim", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)
	_, err = joinAs(t, g, spare, newKey(t), "victim", asAgent)
	isTaken("the id of one that is OFFLINE", err, "victim")
	master.Kill()
	g.StartMaster(options...)
	_, err = joinAs(t, g, spare, newKey(t), "agent-007", asAgent)
	isTaken("after the master's restart", err, "agent-007")
	// One that the grid knows from before it kept who is who: it ran in the clear, for example.
	_, grid := g.Authority()
	old := as(t, g, pki.AgentIdentity(grid, "old"))
	registered, err := old.RegisterAgent(t.Context(), &sutrav1.RegisterAgentRequest{
		Agent: &sutrav1.Agent{AgentId: "old", InstanceId: "i", Endpoint: "127.0.0.1:1", MaxNodes: 1}, HeartbeatInterval: durationpb.New(time.Second),
	})
	if err != nil {
		t.Fatal(err)
	}
	g.AwaitAgent("old", sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE)
	_, err = joinAs(t, g, spare, newKey(t), "old", asAgent)
	isTaken("one that the grid knows", err, "old")
	if _, err := old.UnregisterAgent(t.Context(), &sutrav1.UnregisterAgentRequest{AgentId: "old", Epoch: registered.GetEpoch()}); err != nil {
		t.Fatal(err)
	}
	if _, err = joinAs(t, g, spare, newKey(t), "old", asAgent); err != nil {
		t.Errorf("one that the grid has forgotten: %v", err)
	}

	// It lost its home.
	second, err := joinAs(t, g, g.TokenFor("agent-007"), newKey(t), "agent-007", asAgent)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := renewAs(t, g, first); rpc.ReasonOf(err) != rpc.AgentIDTaken {
		t.Errorf("the holder from before is renewed: %v", err)
	}
	for range 3 { // at once, and with another key each time
		if second, err = renewAs(t, g, second); err != nil {
			t.Fatalf("the new holder isn't renewed: %v", err)
		}
	}
	// Its host lost its identity, and has the token that the master left there.
	if err := os.Remove(filepath.Join(g.Home, "agents", "victim", "identity.pem")); err != nil {
		t.Fatal(err)
	}
	restarted(t, g, "victim", "again")
	takenUp(t, g, []*sutrav1.Node{node})
}

// A person's name that was given belongs to whom it was given, in whatever role; the names of the masters' admins are nobody else's.
func TestPersonsNameBelongsToItsHolder(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	home := func(name string) string { return filepath.Join(g.Dir, name) }
	login := func(token, name, at string) []string {
		return []string{"login", "--master", g.Endpoint, "--token", token, "--name", name, "--home", home(at)}
	}
	many := personsToken(t, g, "viewer", "--uses", "5")
	g.MustRun(login(many, "anna", "anna")...)
	refused(t, g, 7, "NAME_TAKEN", []string{"the name anna is taken", "sutra login --name NAME", "sutra token create --role viewer --name anna"}, login(many, "anna", "eve")...)
	refused(t, g, 7, "NAME_TAKEN", []string{"sutra token create --role admin --name anna"}, login(personsToken(t, g, "admin"), "anna", "eve")...)
	for _, name := range []string{"admin", "admin-2"} {
		refused(t, g, 7, "NAME_TAKEN", []string{"the admin on the master's own host"}, login(many, name, "eve")...)
		refused(t, g, 2, "INVALID_ARGUMENT", []string{name}, "token", "create", "--role", "viewer", "--name", name)
	}
	refused(t, g, 2, "INVALID_ARGUMENT", []string{"is for tokens of people"}, "token", "create", "--name", "anna")
	if files, err := filepath.Glob(filepath.Join(home("eve"), "credentials", "*.pem")); err != nil || len(files) > 0 {
		t.Errorf("refused, and there is %v, %v", files, err)
	}
	if n := usesLeft(t, g, many); n != 4 {
		t.Errorf("%d uses are left", n)
	}
	g.MustRun(login(many, "administrator", "else")...)

	annas := personsToken(t, g, "operator", "--name", "anna")
	if out := g.MustRun("token", "list"); !slices.ContainsFunc(strings.Split(out, "\n"), func(line string) bool {
		return strings.HasPrefix(line, strings.Split(annas, ":")[2]) && strings.Contains(line, " anna ")
	}) {
		t.Errorf("token list says\n%s", out)
	}
	refused(t, g, 6, "TOKEN_REFUSED", []string{"is for user anna alone, and this is bob", "sutra login --name anna"}, login(annas, "bob", "bob")...)
	if out := g.MustRun(login(annas, "anna", "anew")...); !strings.Contains(out, "as user anna, with the role operator") {
		t.Errorf("login says %q", out)
	}
	before, err := pki.Load(only(t, filepath.Join(home("anna"), "credentials", "*.pem")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := renewAs(t, g, before); rpc.ReasonOf(err) != rpc.NameTaken {
		t.Errorf("the holder from before is renewed: %v", err)
	}
	now, err := pki.Load(only(t, filepath.Join(home("anew"), "credentials", "*.pem")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := renewAs(t, g, now); err != nil {
		t.Errorf("the new holder isn't renewed: %v", err)
	}
	// Who was there before it was kept who is who has its name from its next renewal on.
	_, grid := g.Authority()
	if _, err := renewAs(t, g, g.As(pki.UserIdentity(grid, "otto", sutrav1.Role_ROLE_VIEWER))()[0]); err != nil {
		t.Fatal(err)
	}
	refused(t, g, 7, "NAME_TAKEN", []string{"the name otto is taken"}, login(many, "otto", "eve")...)
}

// only is the one file that a pattern finds.
func only(t *testing.T, pattern string) string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) != 1 {
		t.Fatalf("%s: %q, %v", pattern, files, err)
	}
	return files[0]
}

// There is one token for the master's host: it is listed, can be revoked, is good from there alone, and doesn't give what is
// another host's agent's.
func TestTokenOfTheMastersHost(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	options := []string{"--degraded-after", "2s", "--offline-after", "3s"}
	master := g.StartMaster(options...)
	file := filepath.Join(g.Home, "credentials", "join-token")
	left := func() string {
		t.Helper()
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(data))
	}
	again := func() {
		t.Helper()
		master.Signal(syscall.SIGTERM)
		master.Wait()
		master = g.StartMaster(options...)
	}
	listed := func() string {
		t.Helper()
		var ids []string
		for line := range strings.Lines(g.MustRun("token", "list")) {
			if words := strings.Fields(line); words[2] == "master's-host" && words[1] == "agent" && words[3] == "any" && words[4] == "never" {
				ids = append(ids, words[0])
			}
		}
		return strings.Join(ids, " ")
	}
	id := func(secret string) string { return strings.Split(secret, ":")[2] }

	first := left()
	if is := listed(); is != id(first) {
		t.Errorf("listed is %q, want %q", is, id(first))
	}
	again()
	if left() != first {
		t.Error("a token that is good was replaced")
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	again()
	second := left()
	if is := listed(); second == first || is != id(second) {
		t.Errorf("listed is %q, want %q", is, id(second))
	}
	if _, err := joinAs(t, g, first, newKey(t), "evil", asAgent); rpc.ReasonOf(err) != rpc.TokenRefused {
		t.Errorf("with the token that was replaced: %v", err)
	}
	g.MustRun("token", "revoke", id(second))
	if _, err := joinAs(t, g, second, newKey(t), "evil", asAgent); rpc.ReasonOf(err) != rpc.TokenRefused {
		t.Errorf("with the token that was revoked: %v", err)
	}
	if is := listed(); is != "" {
		t.Errorf("listed is %q", is)
	}
	again()
	if left() == second || listed() != id(left()) {
		t.Errorf("after it was revoked and the master has started, %q is listed", listed())
	}

	// Agents of another host, that is of another home with a token from elsewhere.
	elsewhere := g.LaunchAgent("elsewhere", g.AgentFile("agent-b", manyProfiles), "--home", filepath.Join(g.Dir, "b"), "--join-token", g.Token())
	g.AwaitAgent("agent-b", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	for _, state := range []sutrav1.AgentHealth{sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY, sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE} {
		g.AwaitAgent("agent-b", state)
		if _, err := joinAs(t, g, left(), newKey(t), "agent-b", asAgent); rpc.ReasonOf(err) != rpc.AgentIDTaken {
			t.Errorf("as another host's agent, which is %v: %v", state, err)
		}
		elsewhere.Kill()
	}
	// Its own agent has lost its identity, and is started again before anybody misses it.
	own := g.StartAgent("agent-a", manyProfiles)
	own.Kill()
	if err := os.Remove(filepath.Join(g.Home, "agents", "agent-a", "identity.pem")); err != nil {
		t.Fatal(err)
	}
	restarted(t, g, "agent-a", "again")
	if _, err := joinAs(t, g, left(), newKey(t), "agent-c", asAgent); err != nil {
		t.Errorf("from this host: %v", err)
	}
}

// Agents and people are renewed, also where their certificate has expired, and masters aren't; whom a renewal or a token has made what
// is on record.
func TestRenewalsAreOnRecord(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	_, grid := g.Authority()
	keys := stolen(t, g)
	expired := func(path, role string) *sutrav1.RenewRequest {
		t.Helper()
		cert := keys.forge(grid, func(c *x509.Certificate) {
			c.URIs[0].Path, c.NotAfter = path, time.Now().Add(-time.Second)
			if c.Subject.Organization = nil; role != "" {
				c.Subject.Organization = []string{role}
			}
		})
		request, err := pki.Request(cert.PrivateKey.(*ecdsa.PrivateKey))
		if err != nil {
			t.Fatal(err)
		}
		return &sutrav1.RenewRequest{CertificateRequest: request, ExpiredChain: cert.Certificate}
	}
	_, request, err := pki.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	live := &sutrav1.RenewRequest{CertificateRequest: request}
	nobody := sutrav1.NewGridMasterClient(dialFrom(t, g, "127.0.0.2", nil))
	for _, c := range []struct {
		by   sutrav1.GridMasterClient
		req  *sutrav1.RenewRequest
		want rpc.Reason
	}{
		{as(t, g, pki.AgentIdentity(grid, "a1")), live, ""},
		{as(t, g, pki.UserIdentity(grid, "olga", sutrav1.Role_ROLE_OPERATOR)), live, ""},
		{as(t, g, pki.MasterIdentity(grid, "m")), live, rpc.PermissionDenied},
		{nobody, expired("/agent/a2", ""), ""},
		{nobody, expired("/user/vera", "viewer"), ""},
		{nobody, expired("/master/m", ""), rpc.PermissionDenied},
	} {
		if _, err := c.by.Renew(t.Context(), c.req); rpc.ReasonOf(err) != c.want {
			t.Errorf("renewal: %v, want %q", err, c.want)
		}
	}
	if _, err := joinAs(t, g, personsToken(t, g, "admin"), newKey(t), "ada", asPerson); err != nil {
		t.Fatal(err)
	}
	_, renewals := onRecord(t, filepath.Join(g.Home, "master", "upkeep.log"))
	_, joins := onRecord(t, filepath.Join(g.Home, "master", "audit.log"))
	var told []string
	for _, one := range append(renewals, joins...) {
		if method := one["method"]; method == "Renew" || method == "Enroll" {
			what, _ := one["what"].(map[string]any)
			told = append(told, fmt.Sprint(method, " by ", one["who"], ": ", what["name"], ", ", what["role"]))
		}
	}
	if want := []string{
		"Renew by agent a1: a1, agent", "Renew by user olga: olga, operator", "Renew by nobody: a2, agent", "Renew by nobody: vera, viewer", "Enroll by nobody: ada, admin",
	}; !slices.Equal(told, want) {
		t.Errorf("on record is\n%s\nwant\n%s", strings.Join(told, "\n"), strings.Join(want, "\n"))
	}
}
