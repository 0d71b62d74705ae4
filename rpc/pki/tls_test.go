package pki

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"strings"
	"sync"
	"testing"
	"time"
)

// Each certificate is shown three times: by a caller to a server, by a server to a member of the grid, and by a server
// to one who has a token.
func TestWhoIsTakenForWhat(t *testing.T) {
	ours := authority(t, gridID)
	twin, other := authority(t, gridID), authority(t, "another")
	master := holder(own(t, ours, MasterIdentity(gridID, "m")))
	member := all(own(t, ours, AgentIdentity(gridID, "agent-001")))
	good := forge(t, ours, func(*x509.Certificate) {})
	key, _, err := NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	self, err := x509.CreateCertificate(nil, template(gridID), template(gridID), key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	const (
		foreign     = "its certificate is of another grid"
		wrongToken  = "the join token is of another grid"
		noIdentity  = "is no identity of a grid"
		wrongUse    = "isn't for this use"
		noneOfGrids = "none that a grid gives"
	)
	for name, c := range map[string]struct {
		cert tls.Certificate
		// Why it isn't taken as a caller, as a master, and as a master by one with a token; "": it is.
		caller, server, join string
	}{
		"a master": {cert: good},
		"an agent": {
			own(t, ours, AgentIdentity(gridID, "agent-001")).cert, "",
			"it is agent agent-001, where a master was expected", "it is agent agent-001, where a master was expected",
		},
		"an admin":      {own(t, ours, UserIdentity(gridID, "ann", admin)).cert, "", wrongUse, wrongUse},
		"expired":       {forge(t, ours, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }), "its certificate expired at", "its certificate expired at", "its certificate expired at"},
		"not yet valid": {forge(t, ours, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), "do the clocks", "do the clocks", "do the clocks"},
		"self-signed":   {shows(t, key, self), foreign, foreign, wrongToken},
		"self-signed, with the grid's own behind it": {shows(t, key, self, ours.issuer.Raw, ours.roots[0].Raw), foreign, foreign, foreign},
		"another grid with the same names":           {own(t, twin, MasterIdentity(gridID, "m")).cert, foreign, foreign, wrongToken},
		"another grid's, with this one's root beside": {
			withRoot(own(t, twin, MasterIdentity(gridID, "m")).cert, ours), foreign, foreign, foreign,
		},
		"another grid": {own(t, other, MasterIdentity("another", "m")).cert, foreign, foreign, wrongToken},
		"the authority itself": {
			shows(t, ours.key, ours.issuer.Raw, ours.roots[0].Raw), "an authority's certificate as its own",
			"an authority's certificate as its own", "names no identity",
		},
		"a leaf that would sign": {
			forge(t, ours, func(c *x509.Certificate) { c.IsCA = true }), "an authority's certificate as its own",
			"an authority's certificate as its own", "an authority's certificate as its own",
		},
		"not for signing":  {forge(t, ours, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyEncipherment }), wrongUse, wrongUse, wrongUse},
		"for servers only": {forge(t, ours, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }), wrongUse, "", ""},
		"for clients only": {forge(t, ours, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }), "", wrongUse, wrongUse},
		"without its root": {cut(good, 2), "", "", wrongToken},
		"all alone":        {cut(good, 1), foreign, foreign, wrongToken},
		"a web server's": {
			forge(t, other, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"www.example.org"} }),
			noneOfGrids, noneOfGrids, wrongToken,
		},
		"no URI":    {forge(t, ours, names()), "names no identity", "names no identity", "names no identity"},
		"two URIs":  {forge(t, ours, names("spiffe://"+gridID+"/master/m", "spiffe://"+gridID+"/agent/a")), "names no identity", "names no identity", "names no identity"},
		"a host":    {forge(t, ours, func(c *x509.Certificate) { c.DNSNames = []string{"m"} }), "names no identity", "names no identity", "names no identity"},
		"https":     {forge(t, ours, names("https://"+gridID+"/master/m")), noIdentity, noIdentity, noIdentity},
		"a port":    {forge(t, ours, names("spiffe://"+gridID+":7000/master/m")), noIdentity, noIdentity, noIdentity},
		"a query":   {forge(t, ours, names("spiffe://"+gridID+"/master/m?role=admin")), noIdentity, noIdentity, noIdentity},
		"a part":    {forge(t, ours, names("spiffe://"+gridID+"/master/m#x")), noIdentity, noIdentity, noIdentity},
		"somebody":  {forge(t, ours, names("spiffe://ann@"+gridID+"/master/m")), noIdentity, noIdentity, noIdentity},
		"escaped":   {forge(t, ours, names("spiffe://"+gridID+"/master/%6D")), noIdentity, noIdentity, noIdentity},
		"a slash":   {forge(t, ours, names("spiffe://"+gridID+"/master/m%2Fn")), noIdentity, noIdentity, noIdentity},
		"a path":    {forge(t, ours, names("spiffe://"+gridID+"/master/m/n")), noIdentity, noIdentity, noIdentity},
		"an end":    {forge(t, ours, names("spiffe://"+gridID+"/master/m/")), noIdentity, noIdentity, noIdentity},
		"no name":   {forge(t, ours, names("spiffe://"+gridID+"/master/")), noIdentity, noIdentity, noIdentity},
		"no kind":   {forge(t, ours, names("spiffe://"+gridID+"/root/m")), noIdentity, noIdentity, noIdentity},
		"dots":      {forge(t, ours, names("spiffe://"+gridID+"/master/..")), noIdentity, noIdentity, noIdentity},
		"grid name": {forge(t, ours, names("spiffe://another/master/m")), "its certificate doesn't hold", "its certificate doesn't hold", "its certificate doesn't hold"},
		"a master with a role": {
			forge(t, ours, func(c *x509.Certificate) { c.Subject = pkix.Name{Organization: []string{"admin"}} }), "comes with 1 roles", "comes with 1 roles", "comes with 1 roles",
		},
		"a person":               {forge(t, ours, person("viewer")), "", "it is user ann", "it is user ann"},
		"a person without role":  {forge(t, ours, person()), "comes with 0 roles", "comes with 0 roles", "comes with 0 roles"},
		"a person of two roles":  {forge(t, ours, person("viewer", "admin")), "comes with 2 roles", "comes with 2 roles", "comes with 2 roles"},
		"a person as a master":   {forge(t, ours, person("master")), noIdentity, noIdentity, noIdentity},
		"a person of no role":    {forge(t, ours, person("unspecified")), noIdentity, noIdentity, noIdentity},
		"a person with any role": {forge(t, ours, person("anyone")), noIdentity, noIdentity, noIdentity},
	} {
		t.Run(name, func(t *testing.T) {
			m := meet(t, showing(c.cert), master.ServerTLS())
			if m.server != nil { // it is let through, and told why it is nobody
				t.Errorf("the server breaks off: %v", m.server)
			}
			id, err := master.PeerOf(m.seen.PeerCertificates)
			wantWords(t, "as a caller", err, c.caller)
			if (err == nil) == (id == Identity{}) {
				t.Errorf("it is taken for %v, with %v", id, err)
			}
			for as, direction := range map[string]struct {
				config *tls.Config
				want   string
			}{
				"as a master":           {ClientTLS(member, Peer{Kind: Master}), c.server},
				"as the token's master": {JoinTLS(ours.Hash()), c.join},
			} {
				err := meet(t, direction.config, posing(c.cert)).client
				wantWords(t, as, err, direction.want)
				if err != nil && !strings.HasPrefix(err.Error(), Untrusted) {
					t.Errorf("%s: %q isn't told from a technical failure", as, err)
				}
			}
		})
	}
}

func cut(c tls.Certificate, n int) tls.Certificate {
	c.Certificate = c.Certificate[:n]
	return c
}

func withRoot(c tls.Certificate, a *Authority) tls.Certificate {
	c.Certificate = append(c.Certificate[:len(c.Certificate):len(c.Certificate)], a.roots[0].Raw)
	return c
}

func TestAClientWantsTheOneItCalls(t *testing.T) {
	a := authority(t, gridID)
	server := holder(own(t, a, AgentIdentity(gridID, "agent-001"))).ServerTLS()
	client := all(own(t, a, MasterIdentity(gridID, "m")))
	for want, words := range map[Peer]string{
		{Agent, "agent-001"}: "", {Agent, ""}: "",
		{Agent, "agent-002"}:  "it is agent agent-001, where agent agent-002 was expected",
		{Master, ""}:          "it is agent agent-001, where a master was expected",
		{Master, "agent-001"}: "it is agent agent-001, where master agent-001 was expected",
	} {
		wantWords(t, string(want.Kind)+" "+want.Name, meet(t, ClientTLS(client, want), server).client, words)
	}
}

func TestNothingButTLS13(t *testing.T) {
	a := authority(t, gridID)
	c := own(t, a, MasterIdentity(gridID, "m"))
	old := showing(c.cert)
	old.MaxVersion = tls.VersionTLS12
	wantWords(t, "a client of TLS 1.2", meet(t, old, holder(c).ServerTLS()).server, "unsupported versions")
	server := posing(c.cert)
	server.MaxVersion = tls.VersionTLS12
	for name, client := range map[string]*tls.Config{"member": ClientTLS(all(c), Peer{Kind: Master}), "joiner": JoinTLS(a.Hash())} {
		wantWords(t, "a server of TLS 1.2 and a "+name, meet(t, client, server).client, "protocol version not supported")
	}
}

func TestWhoHasNoIdentity(t *testing.T) {
	a := authority(t, gridID)
	c := own(t, a, MasterIdentity(gridID, "m"))
	server := holder(c)
	for name, client := range map[string]*tls.Config{
		"a stranger": {InsecureSkipVerify: true, NextProtos: []string{"h2"}},
		"a joiner":   JoinTLS(a.Hash()),
	} {
		m := meet(t, client, server.ServerTLS())
		if m.client != nil || m.server != nil {
			t.Errorf("%s isn't let through: %v, %v", name, m.client, m.server)
		}
		id, err := server.PeerOf(m.seen.PeerCertificates)
		wantWords(t, name, err, "it shows no certificate")
		if id != (Identity{}) {
			t.Errorf("%s is taken for %s", name, id)
		}
	}
	wantWords(t, "a client without identity", meet(t, ClientTLS(all(), Peer{Kind: Master}), server.ServerTLS()).client, errNoIdentity.Error())
	empty := &Holder{}
	wantWords(t, "a server without identity", meet(t, ClientTLS(all(c), Peer{Kind: Master}), empty.ServerTLS()).server, "no identity yet")
	_, err := empty.PeerOf(nil)
	wantWords(t, "its word on a peer", err, "no identity yet")
}

// One with identities of several grids shows each grid its own, and no other.
func TestSeveralGrids(t *testing.T) {
	a, b, c := authority(t, "grid-a"), authority(t, "grid-b"), authority(t, "grid-c")
	client := ClientTLS(all(own(t, a, UserIdentity("grid-a", "ann", admin)), own(t, b, UserIdentity("grid-b", "bob", admin))), Peer{Kind: Master})
	for grid, want := range map[*Authority]string{a: "user ann", b: "user bob"} {
		server := holder(own(t, grid, MasterIdentity(grid.grid, "m")))
		m := meet(t, client, server.ServerTLS())
		id, err := server.PeerOf(m.seen.PeerCertificates)
		if m.client != nil || err != nil || id.String() != want || id.Grid != grid.grid {
			t.Errorf("grid %s sees %s (%v), the client %v", grid.grid, id, err, m.client)
		}
	}
	m := meet(t, client, holder(own(t, c, MasterIdentity("grid-c", "m"))).ServerTLS())
	wantWords(t, "a third grid", m.client, "of another grid")
	if len(m.seen.PeerCertificates) > 0 {
		t.Error("a grid that isn't trusted was shown an identity")
	}
	// What is told is what the server's own grid has to say.
	late := forge(t, b, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	wantWords(t, "an expired master of the second grid", meet(t, client, posing(late)).client, "expired at")
}

func TestCredentialsAreReplacedUnderHandshakes(t *testing.T) {
	a := authority(t, gridID)
	server, client := holder(own(t, a, MasterIdentity(gridID, "m"))), holder(own(t, a, AgentIdentity(gridID, "agent-001")))
	ends := [2]*tls.Config{ClientTLS(func() []*Credentials { return all(client.Get())() }, Peer{Kind: Master}), server.ServerTLS()}
	var renewing sync.WaitGroup
	over := make(chan struct{})
	renewing.Go(func() {
		for {
			select {
			case <-over:
				return
			default:
				server.Set(own(t, a, MasterIdentity(gridID, "m")))
				client.Set(own(t, a, AgentIdentity(gridID, "agent-001")))
			}
		}
	})
	seen := map[string]bool{}
	for range 50 {
		m := meet(t, ends[0], ends[1])
		id, err := server.PeerOf(m.seen.PeerCertificates)
		if m.client != nil || m.server != nil || err != nil || id.Name != "agent-001" {
			t.Fatalf("client %v, server %v, caller %s %v", m.client, m.server, id, err)
		}
		seen[m.met.PeerCertificates[0].SerialNumber.String()] = true
	}
	close(over)
	renewing.Wait()
	if len(seen) < 2 {
		t.Error("all connections show the same certificate")
	}
	m := meet(t, ends[0], ends[1])
	if !m.met.PeerCertificates[0].Equal(server.Get().cert.Leaf) || !m.seen.PeerCertificates[0].Equal(client.Get().cert.Leaf) {
		t.Error("a connection after the last change shows an earlier certificate")
	}
}
