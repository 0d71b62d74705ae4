package e2e_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// fetch gets a page.
func fetch(t *testing.T, url string) (code int, body string) {
	t.Helper()
	return fetchAs(t, http.DefaultClient, url)
}

// reader is an HTTP client with an identity of the grid, made of its file alone, as Prometheus and others take it.
func reader(t *testing.T, file, grid string) *http.Client {
	t.Helper()
	own, err := tls.LoadX509KeyPair(file, file)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(data)
	transport := &http.Transport{TLSClientConfig: &tls.Config{Certificates: []tls.Certificate{own}, RootCAs: roots, ServerName: grid}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// admin is a reader with the identity that the master has left.
func admin(t *testing.T, g *harness.Grid) *http.Client {
	t.Helper()
	_, grid := g.Authority()
	return reader(t, filepath.Join(g.Home, "credentials", grid+".pem"), grid)
}

func fetchAs(t *testing.T, client *http.Client, url string) (code int, body string) {
	t.Helper()
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

// series reads a /metrics page: values by what stands before them.
func series(t *testing.T, g *harness.Grid, at string) map[string]float64 {
	t.Helper()
	return seriesAs(t, admin(t, g), at)
}

func seriesAs(t *testing.T, client *http.Client, at string) map[string]float64 {
	t.Helper()
	code, body := fetchAs(t, client, "https://"+at+"/metrics")
	if code != http.StatusOK {
		t.Fatalf("/metrics of %s: %d\n%s", at, code, body)
	}
	values := map[string]float64{}
	for line := range strings.Lines(body) {
		cut := strings.LastIndexByte(strings.TrimSpace(line), ' ')
		if cut < 0 || line[0] == '#' {
			continue
		}
		v, err := strconv.ParseFloat(strings.TrimSpace(line[cut:]), 64)
		if err != nil {
			t.Fatalf("/metrics of %s: %q: %v", at, line, err)
		}
		values[line[:cut]] = v
	}
	return values
}

// wantSeries compares some series of a page.
func wantSeries(got, want map[string]float64) error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if v, ok := got[name]; !ok || v != want[name] {
			errs = append(errs, fmt.Errorf("%s is %v (there: %v), want %v", name, v, ok, want[name]))
		}
	}
	return errors.Join(errs...)
}

// promtool lets Prometheus's own linter read a page.
func promtool(t *testing.T, g *harness.Grid, at string) {
	t.Helper()
	_, body := fetchAs(t, admin(t, g), "https://"+at+"/metrics")
	cmd := exec.Command("promtool", "check", "metrics")
	cmd.Stdin = strings.NewReader(body)
	if out, err := cmd.CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("promtool check metrics of %s: %v\n%s", at, err, out)
	}
}

// handled is the labels of a call that ended with a code, call those of all calls of a method.
func handled(service, method, code string) string {
	return fmt.Sprintf(`{grpc_code=%q,grpc_method=%q,grpc_service="sutra.v1.%s",grpc_type="unary"}`, code, method, service)
}

func call(service, method, more string) string {
	return fmt.Sprintf(`{grpc_method=%q,grpc_service="sutra.v1.%s",grpc_type="unary"%s}`, method, service, more)
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	harness.Need(t, "promtool")
	g := harness.New(t)
	g.StartMaster("--degraded-after", "3s", "--offline-after", "8s")
	agentHTTP := fmt.Sprintf("127.0.0.1:%d", g.FreePort())
	monitoring := "[monitoring]\nheartbeat_interval_secs = 1\nhealth_check_interval_secs = 1\nmetrics_listen = \"" + agentHTTP + "\"\n"
	agent := g.StartAgent("a1", badProfiles+monitoring)
	gone := g.StartAgent("a2", badProfiles+"[monitoring]\nheartbeat_interval_secs = 1\n")

	for _, at := range []string{g.HTTP, agentHTTP} {
		if code, body := fetch(t, "http://"+at+"/healthz"); code != http.StatusOK || body != "ok\n" {
			t.Errorf("/healthz of %s: %d %q", at, code, body)
		}
		if code, _ := fetchAs(t, admin(t, g), "https://"+at+"/other"); code != http.StatusNotFound {
			t.Errorf("/other of %s: %d", at, code)
		}
		resp, err := admin(t, g).Post("https://"+at+"/metrics", "text/plain", strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close() // nothing is read
		if resp.StatusCode != http.StatusMethodNotAllowed {
			t.Errorf("POST /metrics of %s: %d", at, resp.StatusCode)
		}
	}

	// Two nodes, one of which crashes once, one that dies early, and one that was wanted on an agent that just went.
	crashed := g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: "a1", Profile: "sleep"})
	stopped := g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: "a1", Profile: "sleep"})
	g.MustRun("stop", "-n", stopped.GetNodeId())
	if _, err := g.Client().SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{AgentId: "a1", Profile: "dies"}); rpc.ReasonOf(err) != rpc.NodeDiedEarly {
		t.Errorf("spawn of a dying node: %v", err)
	}
	gone.Kill()
	if _, err := g.Client().SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{AgentId: "a2", Profile: "sleep"}); rpc.ReasonOf(err) != rpc.AgentUnreachable {
		t.Errorf("spawn on an agent that was killed: %v", err)
	}
	if err := syscall.Kill(int(crashed.GetPid()), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	g.AwaitNode(crashed.GetNodeId(), "to run again", func(n *sutrav1.Node) bool {
		return n.GetPhase() == sutrav1.Phase_PHASE_RUNNING && n.GetRestartCount() == 1
	})

	master, own := map[string]float64{
		`sutra_agents{health="HEALTHY"}`:                                                      1,
		`sutra_agents{health="OFFLINE"}`:                                                      1,
		`sutra_nodes{phase="RUNNING"}`:                                                        1,
		`sutra_nodes{phase="STOPPED"}`:                                                        1,
		`sutra_nodes{phase="FAILED"}`:                                                         0,
		`sutra_node_restarts_total`:                                                           1,
		`sutra_rpc_retries_total{grpc_method="/sutra.v1.GridAgent/SpawnNode"}`:                3,
		`sutra_rpc_pool_connections`:                                                          1,
		`sutra_spawn_stage_seconds_count{stage="persist"}`:                                    4,
		`sutra_spawn_stage_seconds_count{stage="agent"}`:                                      2,
		`grpc_server_handled_total` + handled("GridMaster", "SpawnNode", "OK"):                2,
		`grpc_server_handled_total` + handled("GridMaster", "SpawnNode", "Aborted"):           1,
		`grpc_server_handled_total` + handled("GridMaster", "SpawnNode", "Unavailable"):       1,
		`grpc_server_handled_total` + handled("GridMaster", "StopNode", "OK"):                 1,
		`grpc_server_handled_total` + handled("GridMaster", "RegisterAgent", "OK"):            2,
		`grpc_client_handled_total` + handled("GridAgent", "SpawnNode", "OK"):                 2,
		`grpc_client_handled_total` + handled("GridAgent", "SpawnNode", "Aborted"):            1,
		`grpc_client_handled_total` + handled("GridAgent", "SpawnNode", "Unavailable"):        4,
		`grpc_server_handling_seconds_count` + call("GridMaster", "SpawnNode", ""):            4,
		`grpc_server_handling_seconds_bucket` + call("GridMaster", "SpawnNode", `,le="+Inf"`): 4,
		`grpc_client_handling_seconds_count` + call("GridAgent", "SpawnNode", ""):             7,
	}, map[string]float64{
		`sutra_nodes{phase="RUNNING"}`:                                             1,
		`sutra_node_restarts_total{profile="sleep"}`:                               1,
		`sutra_spawn_stage_seconds_count{stage="prepare"}`:                         3,
		`sutra_spawn_stage_seconds_count{stage="fork"}`:                            3,
		`sutra_spawn_stage_seconds_count{stage="ready"}`:                           3,
		`sutra_rpc_pool_connections`:                                               1,
		`grpc_server_handled_total` + handled("GridAgent", "SpawnNode", "OK"):      2,
		`grpc_server_handled_total` + handled("GridAgent", "SpawnNode", "Aborted"): 1,
		`grpc_client_handled_total` + handled("GridMaster", "RegisterAgent", "OK"): 1,
	}
	// What agents tell of comes with their beats.
	harness.Await(t, "the master's metrics", func() error { return wantSeries(series(t, g, g.HTTP), master) })
	harness.Await(t, "the agent's metrics", func() error { return wantSeries(series(t, g, agentHTTP), own) })
	beats := `sutra_heartbeats_received_total{outcome="ok"}`
	sent := `sutra_heartbeats_sent_total{outcome="ok"}`
	before, sentBefore := series(t, g, g.HTTP)[beats], series(t, g, agentHTTP)[sent]
	harness.Await(t, "more heartbeats", func() error {
		if now, sentNow := series(t, g, g.HTTP)[beats], series(t, g, agentHTTP)[sent]; now <= before || sentNow <= sentBefore {
			return fmt.Errorf("received %v, then %v; sent %v, then %v", before, now, sentBefore, sentNow)
		}
		return nil
	})
	harness.Await(t, "what the node uses", func() error {
		labels := fmt.Sprintf(`{node_id=%q,profile="sleep"}`, crashed.GetNodeId())
		now := series(t, g, agentHTTP)
		for name, least := range map[string]float64{"sutra_node_cpu_seconds_total": 1e-6, "sutra_node_memory_bytes": 1 << 16, "sutra_node_disk_bytes": 1} {
			if v, ok := now[name+labels]; !ok || v < least {
				return fmt.Errorf("%s%s is %v (there: %v)", name, labels, v, ok)
			}
		}
		return nil
	})
	promtool(t, g, g.HTTP)
	promtool(t, g, agentHTTP)
	agent.Stop()
	harness.Await(t, "the agent to be OFFLINE in the metrics", func() error {
		return wantSeries(series(t, g, g.HTTP), map[string]float64{`sutra_agents{health="OFFLINE"}`: 2})
	})
}

// What a server ends or refuses at its door shows in its metrics, once each: at the gRPC port, and at that of the pages.
func TestMetricsOfTheDoor(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	_, grid := g.Authority()
	page := readerAs(t, g, pki.UserIdentity(grid, "vera", sutrav1.Role_ROLE_VIEWER)) // by one connection
	dial := func(from, at string) net.Conn {
		t.Helper()
		dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := dialer.DialContext(t.Context(), "tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	ended := func(why string) string { return fmt.Sprintf(`sutra_rpc_connections_ended_total{why=%q}`, why) }
	refused := func(reason rpc.Reason) string { return fmt.Sprintf(`sutra_rpc_calls_refused_total{reason=%q}`, reason) }
	want := map[string]float64{}
	for _, why := range []string{"no_room", "out_of_time", "too_much", "too_many", "handshake_failed", "handshake_timeout"} {
		want[ended(why)] = 0
	}
	for _, reason := range []rpc.Reason{rpc.Unauthenticated, rpc.TokenRefused, rpc.Banned, rpc.PermissionDenied, rpc.TooManyRequests} {
		want[refused(reason)] = 0
	}
	if err := wantSeries(seriesAs(t, page, g.HTTP), want); err != nil {
		t.Fatal(err)
	}

	// Strangers: who says nothing and is ended for others or by the time of a handshake, here and there, or shakes hands and
	// then says nothing; who doesn't speak TLS; who sends too much; who calls too often, and stays.
	for range 256 + 3 {
		dial("127.0.0.2", g.Endpoint)
	}
	dial("127.0.0.3", g.HTTP)
	want[ended("no_room")], want[ended("handshake_timeout")] = 3, 256+2
	idle := tls.Client(dial("127.0.0.3", g.Endpoint), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err := idle.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	for at, first := range map[string]byte{g.Endpoint: 'G', g.HTTP: 22} {
		c := dial("127.0.0.4", at)
		if _, err := c.Write(append([]byte{first}, "ET / HTTP/1.1\r\n\r\n"...)); err != nil {
			t.Fatal(err)
		}
		want[ended("handshake_failed")]++
	}
	stranger := func(from string) (c sutrav1.GridMasterClient, leaves func()) {
		cc := dialFrom(t, g, from, nil)
		return sutrav1.NewGridMasterClient(cc), func() { _ = cc.Close() } // or its time would end it, too
	}
	long := &sutrav1.EnrollRequest{Name: strings.Repeat("x", 3<<20)}
	c, leaves := stranger("127.0.0.5")
	if _, err := c.Enroll(t.Context(), long); status.Code(err) != codes.Unavailable {
		t.Errorf("a stranger that sends much: %v", err)
	}
	leaves()
	want[ended("too_much")]++
	const often = 32
	c, _ = stranger("127.0.0.6")
	for range often + 1 {
		if _, err := c.ListNodes(t.Context(), &sutrav1.ListNodesRequest{}); err == nil {
			t.Error("a stranger was let in")
		}
	}
	want[ended("out_of_time")]++ // it stays
	want[refused(rpc.Unauthenticated)], want[refused(rpc.TooManyRequests)] = often, 1

	// Those that are known, and one that wants to be.
	if _, err := as(t, g, pki.UserIdentity(grid, "olga", sutrav1.Role_ROLE_OPERATOR)).ListTokens(t.Context(), &sutrav1.ListTokensRequest{}); err == nil {
		t.Error("an operator sees the tokens")
	}
	if code, _ := fetchAs(t, readerAs(t, g, pki.AgentIdentity(grid, "a1")), "https://"+g.HTTP+"/metrics"); code != http.StatusForbidden {
		t.Errorf("an agent's /metrics: %d", code)
	}
	want[refused(rpc.PermissionDenied)] = 2
	g.MustRun("users", "ban", "anna")
	if _, err := as(t, g, pki.UserIdentity(grid, "anna", sutrav1.Role_ROLE_ADMIN)).ListNodes(t.Context(), &sutrav1.ListNodesRequest{}); err == nil {
		t.Error("a banned person sees the nodes")
	}
	want[refused(rpc.Banned)]++
	_, request, err := pki.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	c, leaves = stranger("127.0.0.7")
	if _, err := c.Enroll(t.Context(), &sutrav1.EnrollRequest{TokenId: "no-token", CertificateRequest: request, Name: "eve"}); rpc.ReasonOf(err) != rpc.TokenRefused {
		t.Errorf("no token: %v", err)
	}
	leaves()
	want[refused(rpc.TokenRefused)]++
	if _, err := g.Client().StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: "node-x", AgentId: "a x"}); err == nil {
		t.Error("a bad request was taken") // which is no refusal of somebody
	}
	harness.Await(t, "what was ended and refused", func() error { return wantSeries(seriesAs(t, page, g.HTTP), want) })
}

// An agent that no master knows says so, and begins to be well when one does.
func TestAgentHealthz(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.Endpoint = fmt.Sprintf("127.0.0.1:%d", g.FreePort()) // where the master will be
	at := fmt.Sprintf("127.0.0.1:%d", g.FreePort())
	agent := g.LaunchAgent("a1", g.AgentFile("a1", "[monitoring]\nmetrics_listen = \""+at+"\"\n"))
	said(t, agent, "trying on until the master accepts")
	if code, body := fetch(t, "http://"+at+"/healthz"); code != http.StatusServiceUnavailable || body != "not registered with the master\n" {
		t.Errorf("/healthz without a master: %d %q", code, body)
	}
	g.StartMaster("--http", "off") // the last --http wins
	if g.HTTP != "" {
		t.Errorf("with --http off there is HTTP at %s", g.HTTP)
	}
	g.AwaitAgent("a1", sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
	harness.Await(t, "the agent to call itself well", func() error {
		if code, body := fetch(t, "http://"+at+"/healthz"); code != http.StatusOK {
			return fmt.Errorf("/healthz: %d %q", code, body)
		}
		return nil
	})
}
