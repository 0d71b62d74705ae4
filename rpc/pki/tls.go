package pki

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// tlsConfig is what all connections of a grid have in common.
func tlsConfig() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, SessionTicketsDisabled: true}
}

// ServerTLS is how a server with these credentials talks. Whoever shows no certificate, or one that doesn't hold, is let
// through all the same: PeerOf says who it is, and why it is nobody, and so can an error that tells what to do.
func (h *Holder) ServerTLS() *tls.Config {
	outer := tlsConfig()
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		c := h.Get()
		if c == nil {
			return nil, errors.New("this server has no identity yet")
		}
		inner := tlsConfig()
		inner.Certificates = []tls.Certificate{c.cert}
		inner.ClientAuth, inner.ClientCAs = tls.RequestClientCert, x509.NewCertPool()
		for _, root := range c.roots {
			inner.ClientCAs.AddCert(root) // it is told to the other end, which may have credentials of several grids
		}
		return inner, nil
	}
	return outer
}

// PeerOf is whom the certificates name that the other end of an accepted connection has shown; nobody, and why, where it isn't
// vouched for.
func (h *Holder) PeerOf(shown []*x509.Certificate) (Identity, error) {
	c := h.Get()
	if c == nil {
		return Identity{}, errors.New("this server has no identity yet")
	}
	return Verify(shown, c.roots, c.Identity.Grid, x509.ExtKeyUsageClientAuth, time.Now())
}

// Peer is whom a client wants to find at the other end: a kind, and a name unless any will do.
type Peer struct {
	Kind Kind
	Name string
}

// ClientTLS is how a client with some credentials talks to a peer: it shows those of the peer's grid.
func ClientTLS(all func() []*Credentials, want Peer) *tls.Config {
	config := tlsConfig()
	// Hosts move and have many names: it is the identity that is verified, by VerifyConnection.
	config.InsecureSkipVerify = true
	config.VerifyConnection = func(state tls.ConnectionState) (err error) {
		defer func() { err = untrusted(err) }()
		var first error
		for _, c := range all() {
			id, err := Verify(state.PeerCertificates, c.roots, c.Identity.Grid, x509.ExtKeyUsageServerAuth, time.Now())
			if err == nil {
				shown := slices.DeleteFunc(slices.Clone(state.PeerCertificates), func(cert *x509.Certificate) bool { return !isRoot(cert) })
				c.outdated.Store(!sameCertificates(shown, c.roots))
				return want.check(id)
			}
			if first == nil {
				first = err
			}
		}
		if first == nil {
			first = errNoIdentity
		}
		return first
	}
	config.GetClientCertificate = func(info *tls.CertificateRequestInfo) (*tls.Certificate, error) {
		for _, c := range all() {
			if info.SupportsCertificate(&c.cert) == nil {
				return &c.cert, nil
			}
		}
		return &tls.Certificate{}, nil // none: the server says what it thinks of that
	}
	return config
}

// Untrusted is what the errors of clients' handshakes begin with that are no technical failure: the other end was understood, and
// isn't who is wanted.
const Untrusted = "untrusted: "

var errNoIdentity = errors.New("this side has no identity of any grid yet")

func untrusted(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s%w", Untrusted, err)
}

func (p Peer) check(id Identity) error {
	if id.Kind != p.Kind || p.Name != "" && id.Name != p.Name {
		if p.Name == "" {
			return fmt.Errorf("it is %s, where a %s was expected", id, p.Kind)
		}
		return fmt.Errorf("it is %s, where %s %s was expected", id, p.Kind, p.Name)
	}
	return nil
}

// JoinTLS is how one that has nothing but a token talks to a master: only one that the token's root vouches for is sent
// anything. It shows no certificate.
func JoinTLS(root [sha256.Size]byte) *tls.Config {
	config := tlsConfig()
	config.InsecureSkipVerify = true // it is the token that is held against the other end, by VerifyConnection
	config.VerifyConnection = func(state tls.ConnectionState) (err error) {
		defer func() { err = untrusted(err) }()
		chain := state.PeerCertificates
		var roots []*x509.Certificate
		for _, c := range chain {
			if sha256.Sum256(c.Raw) == root {
				roots = append(roots, c)
			}
		}
		if len(roots) == 0 {
			return errForeignToken
		}
		id, err := identityOf(chain[0])
		if err != nil {
			return err
		}
		if _, err = Verify(chain, roots, id.Grid, x509.ExtKeyUsageServerAuth, time.Now()); err != nil {
			return err
		}
		return Peer{Kind: Master}.check(id)
	}
	return config
}

var errForeignToken = errors.New("the join token is of another grid")
