package pki

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

const (
	gridID = "d4k2v8grid"
	// life is that of the tests' certificates: none ends by itself.
	life  = time.Hour
	admin = sutrav1.Role_ROLE_ADMIN
)

// authority makes one for a grid with that id, in a folder of its own.
func authority(t testing.TB, grid string) *Authority {
	t.Helper()
	a, _ := authorityIn(t, grid)
	return a
}

// authorityIn tells the folder as well.
func authorityIn(t testing.TB, grid string) (*Authority, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pki")
	a, err := OpenAuthority(dir, grid)
	if err != nil {
		t.Fatal(err)
	}
	return a, dir
}

func own(t testing.TB, a *Authority, id Identity) *Credentials {
	t.Helper()
	c, err := a.Own(id, life)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// forge signs a certificate with the authority's own key, whatever it says. It begins as a master's.
func forge(t testing.TB, a *Authority, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	key, _, err := NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	cert := template(a.grid)
	change(cert)
	der, err := x509.CreateCertificate(rand.Reader, cert, a.issuer, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return shows(t, key, der, a.issuer.Raw, a.roots[0].Raw)
}

// template is a good master's certificate.
func template(grid string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(7), URIs: []*url.URL{MasterIdentity(grid, "m").URI()},
		NotBefore: time.Now().Add(-life), NotAfter: time.Now().Add(life), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
}

func shows(t testing.TB, key *ecdsa.PrivateKey, chain ...[]byte) tls.Certificate {
	t.Helper()
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: chain, PrivateKey: key, Leaf: leaf}
}

// names are changes to what a certificate says of its owner.
func names(uris ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.URIs = nil
		for _, text := range uris {
			uri, err := url.Parse(text)
			if err != nil {
				panic(err)
			}
			c.URIs = append(c.URIs, uri)
		}
	}
}

func person(roles ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		names("spiffe://" + gridID + "/user/ann")(c)
		c.Subject = pkix.Name{Organization: roles}
	}
}

// meeting is what both ends of a connection make of each other.
type meeting struct {
	client, server error
	// seen is what the server's end saw of the client, and met what the client's saw of the server.
	seen, met tls.ConnectionState
}

// meet has a client and a server shake hands over loopback.
func meet(t testing.TB, client, server *tls.Config) meeting {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	served := make(chan meeting, 1)
	go func() {
		raw, err := l.Accept()
		if err != nil {
			served <- meeting{server: err}
			return
		}
		defer func() { _ = raw.Close() }()
		_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
		conn := tls.Server(raw, server)
		err = conn.Handshake()
		served <- meeting{server: err, seen: conn.ConnectionState()}
	}()
	raw, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = raw.Close() }()
	_ = raw.SetDeadline(time.Now().Add(10 * time.Second))
	config := client.Clone()
	config.ServerName = "a.host.of.the.grid" // as gRPC does
	conn := tls.Client(raw, config)
	err = conn.Handshake()
	met := conn.ConnectionState()
	if err != nil {
		_ = raw.Close() // or the server would wait
	}
	m := <-served
	m.client, m.met = err, met
	return m
}

// showing is a client that shows a certificate whatever the server asks for, and takes any server.
func showing(cert tls.Certificate) *tls.Config {
	return &tls.Config{
		NextProtos: []string{"h2"}, InsecureSkipVerify: true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil },
	}
}

// posing is a server that shows a certificate and asks for any.
func posing(cert tls.Certificate) *tls.Config {
	return &tls.Config{
		NextProtos: []string{"h2"}, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert,
		MinVersion: tls.VersionTLS12,
	}
}

func holder(c *Credentials) *Holder {
	h := &Holder{}
	h.Set(c)
	return h
}

func all(cs ...*Credentials) func() []*Credentials { return func() []*Credentials { return cs } }

// wantWords checks an error by a part of it; "" is for none.
func wantWords(t *testing.T, what string, err error, words string) {
	t.Helper()
	if words == "" && err != nil || words != "" && (err == nil || !strings.Contains(err.Error(), words)) {
		t.Errorf("%s: got %v, want %q", what, err, words)
	}
}
