package e2e_test

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// A banned person is out: what they follow ends, their certificate is good for nothing and isn't renewed, no token gives
// one by their name, and none that they made gives any; also after a restart of the master. They come back when they may.
func TestBanOfAPerson(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	g.StartAgent("agent-001", sleepProfile)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	_, grid := g.Authority()
	home := filepath.Join(g.Dir, "anna")
	at := func(args ...string) []string { return append(args, "--home", home, "--master", g.Endpoint) }
	login := func(role, home string) harness.Result {
		token := strings.TrimSpace(g.MustRun("token", "create", "--role", role))
		return g.Run("login", "--home", home, "--master", g.Endpoint, "--token", token, "--name", "anna")
	}
	if r := login("admin", home); r.Code != 0 {
		t.Fatalf("login: %+v", r)
	}
	kept := strings.TrimSpace(g.MustRun(at("token", "create", "--role", "admin")...))
	follower := g.Launch("anna", at("logs", "-n", node.GetNodeId(), "-f")...)
	others := as(t, g, pki.UserIdentity(grid, "anna-2", sutrav1.Role_ROLE_VIEWER))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := others.TailLogs(ctx, &sutrav1.TailLogsRequest{NodeId: node.GetNodeId(), Range: &sutrav1.LogRange{Follow: true}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil { // where the log begins
		t.Fatal(err)
	}
	page := reader(t, filepath.Join(home, "credentials", grid+".pem"), grid) // one connection is kept
	if code, body := fetchAs(t, page, "https://"+g.HTTP+"/metrics"); code != http.StatusOK {
		t.Fatalf("/metrics: %d %s", code, body)
	}
	harness.Await(t, "the follower's stream", func() error {
		if n := series(t, g, g.HTTP)[`grpc_server_started_total{grpc_method="TailLogs",grpc_service="sutra.v1.GridMaster",grpc_type="server_stream"}`]; n != 2 {
			return fmt.Errorf("%v streams", n)
		}
		return nil
	})

	if r := g.Run("users", "ban", "--reason", "left us", "anna"); r.Code != 0 || r.Stdout != "banned anna\n" || !strings.Contains(r.Stderr, "sutra users unban anna lets them in again") {
		t.Errorf("ban: %+v", r)
	}
	if code := follower.Wait(); code != 6 || !strings.Contains(string(follower.Log()), "(BANNED)") {
		t.Errorf("what she followed ended with %d:\n%s", code, follower.Log())
	}
	out := func(when string) {
		t.Helper()
		if r := g.Run(at("status")...); r.Code != 6 || !strings.Contains(r.Stderr, "user anna is banned from this grid by user admin at ") ||
			!strings.Contains(r.Stderr, ": left us (BANNED)") || !strings.Contains(r.Stderr, "sutra users unban anna") {
			t.Errorf("%s, status: %+v", when, r)
		}
		own, err := pki.Load(filepath.Join(home, "credentials", grid+".pem"))
		if err != nil {
			t.Fatal(err)
		}
		request, err := pki.Request(own.Key())
		if err != nil {
			t.Fatal(err)
		}
		renewal := sutrav1.NewGridMasterClient(dialFrom(t, g, "127.0.0.1", func() []*pki.Credentials { return []*pki.Credentials{own} }))
		if _, err := renewal.Renew(t.Context(), &sutrav1.RenewRequest{CertificateRequest: request}); rpc.ReasonOf(err) != rpc.Banned {
			t.Errorf("%s, renewal: %v", when, err)
		}
		if code, body := fetchAs(t, page, "https://"+g.HTTP+"/metrics"); code != http.StatusForbidden || !strings.Contains(body, "user anna is banned") {
			t.Errorf("%s, /metrics: %d %s", when, code, body)
		}
		if r := login("viewer", filepath.Join(g.Dir, "anna-again")); r.Code != 6 || !strings.Contains(r.Stderr, "(BANNED)") {
			t.Errorf("%s, with another token: %+v", when, r)
		}
		if r := g.Run("login", "--home", filepath.Join(g.Dir, "bob"), "--master", g.Endpoint, "--token", kept, "--name", "bob"); r.Code != 6 ||
			!strings.Contains(r.Stderr, "was made by user anna, who is banned by user admin at ") || !strings.Contains(r.Stderr, "(TOKEN_REFUSED)") {
			t.Errorf("%s, with a token that she made: %+v", when, r)
		}
	}
	out("banned")
	cancel()
	if _, err := stream.Recv(); rpc.ReasonOf(err) != rpc.Canceled {
		t.Errorf("what another person followed ended with %v", err)
	}
	if _, err := others.ListNodes(t.Context(), &sutrav1.ListNodesRequest{}); err != nil {
		t.Errorf("another person: %v", err)
	}
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	g.MustRun("agents", "ban", "anna") // an agent of that name is another one
	if table := g.MustRun("list-bans"); !strings.Contains(table, "agent  anna") || !strings.Contains(table, "user   anna") || !strings.Contains(table, "user admin  left us\n") {
		t.Errorf("list-bans:\n%s", table)
	}
	if r := g.Run("agents", "ban", "ANNA"); r.Code != 0 || !strings.Contains(r.Stderr, "no agent has registered by that id") {
		t.Errorf("ban of one that isn't there: %+v", r)
	}
	for _, name := range []string{"anna", "ANNA"} {
		if r := g.Run("agents", "unban", name); r.Code != 0 || r.Stderr != "" {
			t.Errorf("unban of %s: %+v", name, r)
		}
	}
	if r := g.Run("agents", "unban", "anna"); r.Code != 0 || !strings.Contains(r.Stderr, "it wasn't banned") {
		t.Errorf("unban of one that isn't banned: %+v", r)
	}
	master.Stop()
	g.StartMaster()
	page = reader(t, filepath.Join(home, "credentials", grid+".pem"), grid)
	out("after a restart")
	onOne := as(t, g, pki.UserIdentity(grid, "anna", sutrav1.Role_ROLE_VIEWER))
	if _, err := onOne.ListNodes(t.Context(), &sutrav1.ListNodesRequest{}); rpc.ReasonOf(err) != rpc.Banned {
		t.Errorf("banned, her call says %v", err)
	}
	g.MustRun("users", "unban", "anna")
	for range 40 { // more than a stranger may
		if _, err := onOne.ListNodes(t.Context(), &sutrav1.ListNodesRequest{}); err != nil {
			t.Fatalf("banned no more, her call says %v", err)
		}
	}
	g.MustRun(at("status")...)
	if r := g.Run("login", "--home", filepath.Join(g.Dir, "bob"), "--master", g.Endpoint, "--token", kept, "--name", "bob"); r.Code != 0 {
		t.Errorf("with the token that she made: %+v", r)
	}
	if r := g.Run("list-bans"); r.Code != 0 || r.Stdout != "" || !strings.Contains(r.Stderr, "nobody is banned") {
		t.Errorf("list-bans: %+v", r)
	}
	lines, all := onRecord(t, filepath.Join(g.Home, "master", "audit.log"))
	for _, want := range []string{"user admin BanUser OK", "user admin UnbanUser OK"} {
		i := slices.Index(lines, want)
		if i < 0 {
			t.Fatalf("%q isn't on record: %q", want, lines)
		}
		if what, _ := all[i]["what"].(map[string]any); what["name"] != "anna" || strings.Contains(want, " Ban") && what["reason"] != "left us" {
			t.Errorf("on record is %v", all[i])
		}
	}
	if lines, _ := onRecord(t, filepath.Join(g.Home, "master", "refused.log")); !slices.Contains(lines, "user anna GetClusterStatus PermissionDenied BANNED") {
		t.Errorf("refused was, by the record, %q", lines)
	}
}

// No admin bans itself, and whatever another one bans: the account that the master runs as has an admin's identity.
func TestNoGridIsLeftWithoutAnAdmin(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	_, grid := g.Authority()
	refused(t, g, 6, "PERMISSION_DENIED", []string{"user admin may not ban itself", "have another admin do it"}, "users", "ban", "admin")
	refused(t, g, 2, "INVALID_ARGUMENT", []string{"name"}, "users", "ban", "no/name")
	refused(t, g, 2, "INVALID_ARGUMENT", []string{"reason", "256"}, "users", "ban", "--reason", strings.Repeat("x", 257), "anna")
	dora := as(t, g, pki.UserIdentity(grid, "dora", sutrav1.Role_ROLE_ADMIN))
	ban := func(name string) {
		t.Helper()
		if _, err := dora.BanUser(t.Context(), &sutrav1.BanUserRequest{Name: name}); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(g.Home, "credentials", grid+".pem")
	is := func(name string) {
		t.Helper()
		own, err := pki.Load(file)
		if err != nil {
			t.Fatal(err)
		}
		if want := pki.UserIdentity(grid, name, sutrav1.Role_ROLE_ADMIN); own.Identity != want {
			t.Errorf("the account is %v, want %v", own.Identity, want)
		}
		g.MustRun("status")
	}
	stolen, err := pki.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	ban("admin")
	is("admin-2")
	thief := rpc.Master(g.Endpoint, func() []*pki.Credentials { return []*pki.Credentials{stolen} }, nil)
	defer thief.Close()
	if _, err := sutrav1.NewGridMasterClient(thief).ListNodes(t.Context(), &sutrav1.ListNodesRequest{}); rpc.ReasonOf(err) != rpc.Banned {
		t.Errorf("the stolen identity: %v", err)
	}
	ban("admin-2")
	is("admin-3")
	master.Stop()
	master = g.StartMaster()
	is("admin-3")
	g.MustRun("users", "unban", "admin")
	master.Stop()
	g.StartMaster()
	is("admin")

	// One who has joined as somebody else on that account is that, until they are banned.
	token := strings.TrimSpace(g.MustRun("token", "create", "--role", "admin"))
	refused(t, g, 2, "USAGE", []string{"this account is user admin"}, "login", "--token", token, "--name", "carl")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	g.MustRun("login", "--token", token, "--name", "carl")
	is("carl")
	ban("admin")
	is("carl")
	ban("carl")
	is("admin-3")
}
