package e2e_test

import (
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// readerAs is an HTTP client that is somebody in a grid, for longer than any test.
func readerAs(t *testing.T, g *harness.Grid, id pki.Identity) *http.Client {
	t.Helper()
	file := filepath.Join(t.TempDir(), "id.pem")
	a, grid := g.Authority()
	own, err := a.Own(id, time.Hour)
	if err == nil {
		err = own.Save(file)
	}
	if err != nil {
		t.Fatal(err)
	}
	return reader(t, file, grid)
}

// Of the HTTP pages, a stranger gets /healthz on the host itself; the rest is for people of the grid, at the master and at
// an agent, on any address.
func TestHTTPNeedsAnIdentity(t *testing.T) {
	t.Parallel()
	g, other := harness.New(t), harness.New(t)
	g.StartMaster("--http", "0.0.0.0:0") // the last --http wins
	other.StartMaster()
	agentHTTP := fmt.Sprintf("0.0.0.0:%d", g.FreePort())
	g.StartAgent("a1", sleepProfile+"[monitoring]\nmetrics_listen = \""+agentHTTP+"\"\n")
	_, port, err := net.SplitHostPort(g.HTTP)
	if err != nil {
		t.Fatal(err)
	}
	_, agentPort, _ := net.SplitHostPort(agentHTTP) // we made it
	_, grid := g.Authority()

	// Identities, each in a file as its owner has it.
	as := func(g *harness.Grid, id pki.Identity) *http.Client {
		t.Helper()
		client := readerAs(t, g, id)
		if id.Grid != grid { // it doesn't trust this grid, either
			client.Transport.(*http.Transport).TLSClientConfig.InsecureSkipVerify = true
		}
		return client
	}
	nobody := &http.Client{Transport: &http.Transport{TLSClientConfig: as(g, pki.AgentIdentity(grid, "x")).Transport.(*http.Transport).TLSClientConfig.Clone()}}
	nobody.Transport.(*http.Transport).TLSClientConfig.Certificates = nil
	_, otherGrid := other.Authority()
	hosts := []string{"127.0.0.1"}
	if addrs, err := net.InterfaceAddrs(); err == nil {
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() && n.IP.To4() != nil {
				hosts = append(hosts, n.IP.String())
				break
			}
		}
	}
	for _, host := range hosts {
		for _, at := range []string{net.JoinHostPort(host, port), net.JoinHostPort(host, agentPort)} {
			local := http.StatusUnauthorized
			if host == "127.0.0.1" {
				local = http.StatusOK
			}
			for _, c := range []struct {
				who              string
				client           *http.Client
				scheme           string
				metrics, healthz int
			}{
				{"in the clear", &http.Client{Transport: &http.Transport{}}, "http", http.StatusUnauthorized, local},
				{"without a certificate", nobody, "https", http.StatusUnauthorized, local},
				{"another grid's admin", as(other, pki.UserIdentity(otherGrid, "eve", sutrav1.Role_ROLE_ADMIN)), "https", http.StatusUnauthorized, local},
				{"an agent", as(g, pki.AgentIdentity(grid, "a2")), "https", http.StatusForbidden, map[int]int{http.StatusOK: http.StatusOK, http.StatusUnauthorized: http.StatusForbidden}[local]},
				{"a viewer", as(g, pki.UserIdentity(grid, "vera", sutrav1.Role_ROLE_VIEWER)), "https", http.StatusOK, http.StatusOK},
			} {
				for page, want := range map[string]int{"/metrics": c.metrics, "/healthz": c.healthz, "/healthz/../metrics": c.metrics} {
					code, body := fetchAs(t, c.client, c.scheme+"://"+at+page)
					if code != want || (code == http.StatusOK) != (strings.Contains(body, "go_goroutines") || body == "ok\n") {
						t.Errorf("%s of %s, %s: %d, want %d\n%.300s", page, at, c.who, code, want, body)
					}
				}
				c.client.CloseIdleConnections()
			}
		}
	}
	refused(t, g, 2, "USAGE", []string{"--insecure is for loopback addresses"}, "master", "--insecure", "--listen", "127.0.0.1:0", "--http", "0.0.0.0:0")
}
