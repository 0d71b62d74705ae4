package e2e_test

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// authorityOf is what the master says of its authority.
func authorityOf(t *testing.T, g *harness.Grid) *sutrav1.Authority {
	t.Helper()
	resp, err := g.Client().GetAuthority(t.Context(), &sutrav1.GetAuthorityRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetAuthority()
}

// moved waits until those agents, and no others, have moved to the newest root.
func moved(t *testing.T, g *harness.Grid, agents ...string) {
	t.Helper()
	harness.Await(t, "the agents to move", func() error {
		if is := authorityOf(t, g).GetAgentsMoved(); !slices.Equal(is, agents) {
			return fmt.Errorf("%v have moved, want %v", is, agents)
		}
		return nil
	})
}

// A live grid moves to another root: no call fails, no node is touched, whoever is there moves by itself, and who was away
// isn't shut out before the older root is retired.
func TestMoveToAnotherRoot(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster("--certificate-life", "20s", "--degraded-after", "2s", "--offline-after", "3s")
	at := func(home string, args ...string) []string {
		return append(args, "--home", filepath.Join(g.Dir, home), "--master", g.Endpoint)
	}
	g.StartAgent("agent-a", manyProfiles)
	agents := map[string]*harness.Process{}
	launch := func(id string, args ...string) {
		agents[id] = g.LaunchAgent(id, filepath.Join(g.Dir, id+".toml"), append([]string{"--home", filepath.Join(g.Dir, id)}, args...)...)
	}
	for _, id := range []string{"agent-b", "agent-c", "agent-d"} {
		g.AgentFile(id, manyProfiles)
		launch(id, "--join-token", g.Token())
		g.AwaitAgent(id, sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	}
	var nodes []*sutrav1.Node
	for _, id := range []string{"agent-a", "agent-b", "agent-c", "agent-d"} {
		nodes = append(nodes, g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: id, Profile: "sleep"}))
	}
	oldToken := strings.TrimSpace(g.MustRun("token", "create", "--role", "viewer", "--uses", "5"))
	for _, home := range []string{"early", "late"} {
		g.MustRun(at(home, "login", "--token", oldToken, "--name", home)...)
	}
	agents["agent-c"].Kill()
	agents["agent-d"].Kill()

	// Nothing is changed that isn't asked for.
	refused(t, g, 7, "NO_ROTATION", []string{"sutra ca rotate"}, "ca", "retire")
	refused(t, g, 7, "NO_ROTATION", nil, "ca", "retire", "--apply")
	refused(t, g, 2, "USAGE", nil, "ca", "retire", "--force")
	refused(t, g, 2, "USAGE", nil, "ca", "rotate", "now")
	refused(t, g, 6, "PERMISSION_DENIED", []string{"takes the role admin"}, at("early", "ca", "rotate", "--apply")...)
	was := authorityOf(t, g)
	if r := g.Run("ca", "rotate"); r.Code != 0 || !strings.Contains(r.Stderr, "nothing was changed") || !strings.Contains(r.Stdout, was.GetRoots()[0].GetRoot()[:16]) {
		t.Errorf("a dry run: %+v", r)
	}
	if is := authorityOf(t, g); len(is.GetRoots()) != 1 || is.GetRoots()[0].GetRoot() != was.GetRoots()[0].GetRoot() || is.GetRotatedAt() != nil {
		t.Errorf("after a dry run it is %v, and was %v", is, was)
	}

	stop := calling(t, g, nodes[0])
	logs := g.Launch("logs", "logs", "-n", nodes[1].GetNodeId(), "-f")
	var rotated sutrav1.RotateAuthorityResponse
	if err := protojson.Unmarshal([]byte(g.MustRun("ca", "rotate", "--apply", "-o", "json")), &rotated); err != nil {
		t.Fatal(err)
	}
	now := rotated.GetAuthority()
	if len(now.GetRoots()) != 2 || now.GetRoots()[1].GetRoot() != was.GetRoots()[0].GetRoot() || now.GetRotatedAt() == nil ||
		now.GetRetiresAt().AsTime().Sub(now.GetRotatedAt().AsTime()) != 60*24*time.Hour {
		t.Errorf("it is %v", now)
	}
	moved(t, g, "agent-a", "agent-b")
	refused(t, g, 7, "ROTATION_UNDER_WAY", []string{"sutra ca retire"}, "ca", "rotate", "--apply")
	if out := g.MustRun("ca", "retire"); !strings.Contains(out, "2: agent-a, agent-b") || !strings.Contains(out, "2: agent-c, agent-d") {
		t.Errorf("ca retire says\n%s", out)
	}
	if out := g.MustRun("status"); !strings.Contains(out, "moving to another root") {
		t.Errorf("status says\n%s", out)
	}
	// Old identities and tokens are good, and so are new ones.
	g.MustRun(at("early", "status")...)
	g.MustRun(at("first", "login", "--token", oldToken, "--name", "first")...)
	newToken := strings.TrimSpace(g.MustRun("token", "create", "--role", "viewer", "--uses", "5"))
	g.MustRun(at("second", "login", "--token", newToken, "--name", "second")...)
	if calls := stop(); calls < 100 || !logs.Running() {
		t.Errorf("%d calls; the stream goes on: %t\n%s", calls, logs.Running(), logs.Log())
	}
	logs.Signal(syscall.SIGINT)
	logs.Wait()

	// The next start of the master goes on with the move.
	master.Kill()
	g.StartMaster("--certificate-life", "20s", "--degraded-after", "2s", "--offline-after", "3s")
	moved(t, g, "agent-a", "agent-b")
	refused(t, g, 7, "AGENTS_LEFT", []string{"agent-c, agent-d", "--force"}, "ca", "retire", "--apply")
	launch("agent-c") // its certificate may have expired
	moved(t, g, "agent-a", "agent-b", "agent-c")
	refused(t, g, 7, "AGENTS_LEFT", []string{"retired: agent-d"}, "ca", "retire", "--apply")

	stop = calling(t, g, nodes[0])
	g.MustRun(at("first", "status")...) // its identity is by the newest root, and is renewed where it is due
	g.MustRun("ca", "retire", "--apply", "--force")
	if is := authorityOf(t, g); len(is.GetRoots()) != 1 || is.GetRoots()[0].GetRoot() != now.GetRoots()[0].GetRoot() || is.GetRotatedAt() != nil {
		t.Errorf("retired, it is %v", is)
	}
	g.MustRun(at("second", "status")...)
	g.MustRun(at("early", "status")...) // which has called something meanwhile
	refused(t, g, 6, "UNTRUSTED_PEER", []string{"sutra login"}, at("late", "status")...)
	refused(t, g, 6, "UNTRUSTED_PEER", []string{"the join token is of another grid"}, at("third", "login", "--token", oldToken)...)
	g.MustRun(at("third", "login", "--token", newToken, "--name", "third")...)
	tokenID := strings.Split(oldToken, ":")[2]
	if out := g.MustRun("token", "list"); strings.Contains(out, tokenID) || !strings.Contains(out, strings.Split(newToken, ":")[2]) {
		t.Errorf("token list says\n%s", out)
	}
	stop()
	// Who was away all the time is told what to do, and joins anew; its node has run on.
	launch("agent-d")
	harness.Await(t, "the agent to be told", func() error { return logSays(agents["agent-d"], "sutra token create on its master's host") })
	agents["agent-d"].Kill()
	launch("agent-d", "--join-token", g.TokenFor("agent-d"))
	g.AwaitAgent("agent-d", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	takenUp(t, g, nodes)
	// And once more.
	g.MustRun("ca", "rotate", "--apply")
	g.BecomeAdmin()
	moved(t, g, "agent-a", "agent-b", "agent-c", "agent-d")
	g.MustRun("ca", "retire", "--apply")
	takenUp(t, g, nodes)
}

// Whoever took the old root's keys commands no agent once that root is retired, long before the agents' certificates end.
func TestARetiredRootCommandsNobody(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster("--certificate-life", "300s") // half a minute is a tenth of it
	g.StartAgent("agent-001", manyProfiles)
	_, grid := g.Authority()
	forged := stolen(t, g).forge(grid, func(c *x509.Certificate) { c.URIs[0].Path, c.Subject.Organization = "/master/m", nil })
	config := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{forged}}
	conn, err := grpc.NewClient("passthrough:///"+agentOf(t, g, "agent-001").GetEndpoint(), grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	command := func() error {
		_, err := sutrav1.NewGridAgentClient(conn).ListNodes(t.Context(), &sutrav1.GridAgentListNodesRequest{AgentId: "agent-001"})
		return err
	}
	g.MustRun("ca", "rotate", "--apply")
	g.BecomeAdmin()
	moved(t, g, "agent-001")
	if err := command(); err != nil {
		t.Fatalf("while both roots are trusted: %v", err)
	}
	g.MustRun("ca", "retire", "--apply")
	harness.Await(t, "the agent to trust the old root no more", func() error {
		if code := status.Code(command()); code != codes.Unauthenticated {
			return fmt.Errorf("it says %v", code)
		}
		return nil
	})
	g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	g.MustRun("status")
}

// The master is killed at any step of a rotation: the grid has the one root or both, all get on with either, and the move can be
// made again or goes on.
func TestMasterKilledWhileItRotates(t *testing.T) {
	t.Parallel()
	harness.Need(t, "root")
	g := harness.New(t)
	master := g.StartMaster("--certificate-life", "10s")
	g.StartAgent("agent-001", manyProfiles)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	verb := func(k int, args ...string) (steps int, last string) {
		point := harness.CrashAt(t, master, k)
		done := make(chan harness.Result, 1)
		// The master is named: while it is started again, its home names none.
		go func() { done <- g.Run(append(args, "--timeout", "5s", "--master", g.Endpoint)...) }()
		harness.Await(t, "the verb's end or the master's", func() error {
			if len(done) > 0 || !master.Running() {
				return nil
			}
			return errors.New("it goes on")
		})
		steps, last = point.End()
		master = g.StartMaster("--certificate-life", "10s")
		if r := <-done; r.Code != 0 && r.Code != 4 && r.Code != 7 {
			t.Errorf("sutra %v: %+v", args, r)
		}
		g.AwaitAgent("agent-001", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
		return steps, last
	}
	complete := func() {
		t.Helper()
		if authorityOf(t, g).GetRotatedAt() == nil {
			g.MustRun("ca", "rotate", "--apply")
		}
		moved(t, g, "agent-001")
	}
	killed := map[string]int{}
	whole, _ := verb(0, "ca", "rotate", "--apply")
	for k := range steps(t, whole) {
		complete()
		_, last := verb(k, "ca", "retire", "--apply")
		killed["retire, "+last]++
		if authorityOf(t, g).GetRotatedAt() != nil {
			moved(t, g, "agent-001")
			g.MustRun("ca", "retire", "--apply")
		}
		_, last = verb(k, "ca", "rotate", "--apply")
		killed["rotate, "+last]++
		if t.Failed() {
			t.Fatalf("when the master was killed at step %d of %d, %s", k, whole, last)
		}
	}
	complete()
	takenUp(t, g, []*sutrav1.Node{node})
	t.Logf("%d steps; killed at %v", whole, killed)
}

// A move that nobody ends is ended by the master when nothing can rest on the older root any more.
func TestTheOlderRootRetiresByItself(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	began := func(ago time.Duration) *sutrav1.Authority {
		t.Helper()
		master.Kill()
		authority, _ := g.Authority()
		if !authority.Rotated().IsZero() {
			var err error
			if authority, err = authority.Retire(time.Now()); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := authority.Rotate(time.Now().Add(-ago)); err != nil {
			t.Fatal(err)
		}
		master = g.StartMaster()
		return authorityOf(t, g)
	}
	if is := began(59 * 24 * time.Hour); len(is.GetRoots()) != 2 || time.Until(is.GetRetiresAt().AsTime()) > 24*time.Hour {
		t.Errorf("after 59 days it is %v", is)
	}
	newest := began(61 * 24 * time.Hour).GetRoots()[0].GetRoot()
	harness.Await(t, "the older root to be retired", func() error {
		if is := authorityOf(t, g); len(is.GetRoots()) != 1 || is.GetRoots()[0].GetRoot() != newest || is.GetRotatedAt() != nil {
			return fmt.Errorf("it is %v", is)
		}
		return nil
	})
}
