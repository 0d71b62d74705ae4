package e2e_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/xid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// descriptors counts what a process has open.
func descriptors(t *testing.T, p *harness.Process) int {
	t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// dialFrom is a bare connection to the master from another address of this host; from nobody where own is nil.
func dialFrom(t *testing.T, g *harness.Grid, from string, own func() []*pki.Credentials) *grpc.ClientConn {
	t.Helper()
	config := pki.ClientTLS(func() []*pki.Credentials { return nil }, pki.Peer{})
	config.VerifyConnection = nil
	if own != nil {
		config = pki.ClientTLS(own, pki.Peer{Kind: pki.Master})
	}
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	cc, err := grpc.NewClient("passthrough:///"+g.Endpoint, grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithContextDialer(func(ctx context.Context, at string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", at) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

// Ten thousand connections that never say a word, from several addresses, leave the master with no more than a bounded
// number of them, and whoever means it gets in meanwhile: from the same address, too, and on a new connection each time.
func TestHalfOpenConnections(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	before := descriptors(t, master)
	const all, bound = 10_000, 1024
	opened := make(chan net.Conn, all)
	var flood errgroup.Group
	flood.SetLimit(50)
	for i := range all {
		flood.Go(func() error {
			dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(1+i%8))}}
			c, err := dialer.DialContext(t.Context(), "tcp", g.Endpoint)
			if err != nil {
				return err
			}
			if i%2 == 0 { // the beginning of a handshake, and no more
				_, _ = c.Write([]byte{22, 3, 1}) // it may be ended by now
			}
			opened <- c
			if i%4 != 0 { // this end needs descriptors, too
				return c.Close()
			}
			return nil
		})
	}
	most, calls := 0, 0
	done, sampled := make(chan error, 1), make(chan struct{})
	go func() { done <- flood.Wait() }()
	go func() {
		defer close(sampled)
		for err := error(nil); err == nil && len(opened) < all; time.Sleep(5 * time.Millisecond) {
			var now []os.DirEntry
			now, err = os.ReadDir(fmt.Sprintf("/proc/%d/fd", master.PID()))
			most = max(most, len(now)-before)
		}
	}()
	_, grid := g.Authority()
	vera := g.As(pki.UserIdentity(grid, "vera", sutrav1.Role_ROLE_VIEWER))
	for over := false; !over; calls++ {
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			over = true
		default:
		}
		channel := rpc.Master(g.Endpoint, vera, nil)
		if _, err := sutrav1.NewGridMasterClient(channel).ListNodes(t.Context(), &sutrav1.ListNodesRequest{}); err != nil {
			t.Errorf("call %d meanwhile: %v", calls, err)
		}
		channel.Close()
	}
	<-sampled
	if most > bound+100 {
		t.Errorf("the master had %d descriptors more, want at most about %d", most, bound)
	}
	t.Logf("%d calls meanwhile; at most %d descriptors more", calls, most)
	close(opened)
	// The handshake's time ends the rest, and nothing of them stays behind.
	harness.Await(t, "the master to have ended them", func() error {
		if now := descriptors(t, master) - before; now > 20 {
			return fmt.Errorf("it has %d descriptors more", now)
		}
		return nil
	})
	for c := range opened {
		_ = c.Close() // most are closed
	}
	if log := string(master.Log()); !strings.Contains(log, "connections that don't say who they are") {
		t.Error("the master's log doesn't tell of it")
	}
}

// A handshake a byte at a time is ended by its time, before a hundred bytes have come.
func TestSlowHandshake(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	c, err := net.Dial("tcp", g.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, c) // however it ends
	}()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	hello := append([]byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3}, make([]byte, 90)...)
	for i := 0; ; i++ {
		select {
		case <-ended:
			if i == 0 {
				t.Error("it was ended before it began")
			}
			return
		case <-tick.C:
			if i >= len(hello) {
				t.Fatal("it goes on for ever")
			}
			_, _ = c.Write(hello[i : i+1]) // where it fails, the reader sees the end
		}
	}
}

// Requests and headers that are too long are refused, and what a stranger sends is cut off; calls of others go on.
func TestLongRequests(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	_, grid := g.Authority()
	olga := g.As(pki.UserIdentity(grid, "olga", sutrav1.Role_ROLE_OPERATOR))
	channel := rpc.Master(g.Endpoint, olga, nil)
	t.Cleanup(channel.Close)
	long := strings.Repeat("x", 5<<20)
	_, err := sutrav1.NewGridMasterClient(channel).SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{StoragePath: "/" + long})
	if rpc.ReasonOf(err) != rpc.MessageTooLarge {
		t.Errorf("5 MiB: %.200v", err)
	}
	stranger := sutrav1.NewGridMasterClient(dialFrom(t, g, "127.0.0.1", nil))
	if _, err := stranger.Enroll(t.Context(), &sutrav1.EnrollRequest{Name: long[:3<<20]}); status.Code(err) != codes.Unavailable {
		t.Errorf("3 MiB of a stranger: %.200v", err)
	}
	if _, err := sutrav1.NewGridMasterClient(channel).ListNodes(t.Context(), &sutrav1.ListNodesRequest{}); err != nil {
		t.Errorf("after it: %v", err)
	}
}

// One identity that follows logs without end is bounded, and keeps nobody else from following one, nor the master from
// calling the agent.
func TestTooManyStreams(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	g.StartAgent("a1", sleepProfile)
	_, grid := g.Authority()
	node := g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: "a1", Profile: "sleep"})
	follow := func(c sutrav1.GridMasterClient) error {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		t.Cleanup(cancel)
		stream, err := c.TailLogs(ctx, &sutrav1.TailLogsRequest{NodeId: node.GetNodeId(), Range: &sutrav1.LogRange{Follow: true}})
		if err != nil {
			return err
		}
		for err == nil {
			_, err = stream.Recv()
		}
		return err
	}
	eve := g.As(pki.UserIdentity(grid, "eve", sutrav1.Role_ROLE_VIEWER))
	var refusals, others int
	results := make(chan error, 400)
	for i := range 400 {
		from := fmt.Sprintf("127.0.0.%d", 2+i/100) // and over several connections
		cc := sutrav1.NewGridMasterClient(dialFrom(t, g, from, eve))
		go func() { results <- follow(cc) }()
	}
	harness.Await(t, "eve to be refused", func() error {
		for {
			select {
			case err := <-results:
				if rpc.ReasonOf(err) == rpc.TooManyRequests {
					refusals++
				} else if others++; others > 3 {
					t.Fatalf("a stream ended in %v", err)
				}
			default:
				if refusals >= 400-256 {
					return nil
				}
				return fmt.Errorf("%d are refused", refusals)
			}
		}
	})
	if refusals > 400-256 {
		t.Errorf("%d of 400 streams are refused, want %d", refusals, 400-256)
	}
	if r := g.Run("logs", "--node", node.GetNodeId(), "--tail", "1"); r.Code != 0 {
		t.Errorf("the admin's logs meanwhile: %+v", r)
	}
	g.MustRun("stop", "--node", node.GetNodeId())
}

// Who tries token after token has to wait, on any connection and under any name; a good agent joins meanwhile from any address, the same
// one, too, and one that is in goes on from there.
func TestTokensByTheDozen(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	token, err := pki.ParseToken(strings.TrimSpace(g.MustRun("token", "create")))
	if err != nil {
		t.Fatal(err)
	}
	_, request, err := pki.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	enroll := func(from string, id string, secret []byte) error {
		_, err := sutrav1.NewGridMasterClient(dialFrom(t, g, from, nil)).Enroll(t.Context(), &sutrav1.EnrollRequest{
			TokenId: id, TokenSecret: secret, CertificateRequest: request, Name: "agent-007", Role: sutrav1.Role_ROLE_AGENT,
		})
		return err
	}
	guess := make([]byte, len(token.Secret))
	heard, slowed := 0, 0
	for range 100 {
		_, _ = rand.Read(guess) // never fails
		id := token.ID
		if heard%2 == 1 {
			id = xid.New().String()
		}
		switch err := enroll("127.0.0.2", id, guess); rpc.ReasonOf(err) {
		case rpc.TokenRefused:
			heard++
		case rpc.TooManyRequests:
			if slowed++; rpc.AsError(err).RetryAfter <= 0 {
				t.Errorf("it isn't told for how long: %v", err)
			}
		default:
			t.Fatal(err)
		}
	}
	// A hundred take a while: some waits may be over by then.
	if heard > 30 || heard < 20 || slowed < 70 {
		t.Errorf("of 100 tokens %d were tried, and %d not", heard, slowed)
	}
	for _, from := range []string{"127.0.0.2", "127.0.0.3"} { // the same key's, so that it is one use
		if err := enroll(from, token.ID, token.Secret[:]); err != nil {
			t.Errorf("the right one from %s: %v", from, err)
		}
	}
	_, grid := g.Authority()
	renewal := sutrav1.NewGridMasterClient(dialFrom(t, g, "127.0.0.2", g.As(pki.AgentIdentity(grid, "agent-001"))))
	if _, err := renewal.Renew(t.Context(), &sutrav1.RenewRequest{CertificateRequest: request}); err != nil {
		t.Errorf("a renewal from there: %v", err)
	}
	if lines, _ := onRecord(t, filepath.Join(g.Home, "master", "refused.log")); len(lines) < 20 || len(lines) > 60 {
		t.Errorf("%d refusals are on record: %q", len(lines), lines)
	}
}
