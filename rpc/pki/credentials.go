package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"sync/atomic"
	"time"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// Credentials are one identity with its key, and the roots that it trusts: what a process shows at the other end of a
// connection, and what it holds the other end against.
type Credentials struct {
	Identity Identity
	// Expires is when the certificate ends.
	Expires time.Time
	// Begins is when it was made, about.
	Begins time.Time
	cert   tls.Certificate
	roots  []*x509.Certificate
	// outdated: a server that they found to be who it says has shown other roots than they have.
	outdated atomic.Bool
}

// NewCredentials puts together what an authority answered to a request with a key: the chain, leaf first, and the roots.
func NewCredentials(key *ecdsa.PrivateKey, chain, roots []*x509.Certificate) (*Credentials, error) {
	if len(chain) == 0 || len(roots) == 0 {
		return nil, errors.New("credentials without a certificate or without roots")
	}
	leaf := chain[0]
	if public, ok := leaf.PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(key.Public()) {
		return nil, errors.New("the certificate isn't that of the key")
	}
	id, err := identityOf(leaf)
	if err != nil {
		return nil, err
	}
	c := &Credentials{
		Identity: id, Begins: Begins(leaf), Expires: leaf.NotAfter, roots: roots,
		cert: tls.Certificate{PrivateKey: key, Leaf: leaf},
	}
	for _, cert := range chain {
		c.cert.Certificate = append(c.cert.Certificate, cert.Raw)
	}
	return c, nil
}

// Begins is when a certificate was made, to the second.
func Begins(cert *x509.Certificate) time.Time { return cert.NotBefore.Add(backdate) }

// Own issues credentials for an identity whose key is this process's own.
func (a *Authority) Own(id Identity, ttl time.Duration) (*Credentials, error) {
	key, request, err := NewRequest()
	if err != nil {
		return nil, err
	}
	chain, err := a.Issue(request, id, ttl)
	if err != nil {
		return nil, err
	}
	return NewCredentials(key, chain, a.Roots())
}

// Key is the credentials' private key.
func (c *Credentials) Key() *ecdsa.PrivateKey {
	key, _ := c.cert.PrivateKey.(*ecdsa.PrivateKey) // always one
	return key
}

// Chain is the certificate with those that vouch for it, leaf first, in DER.
func (c *Credentials) Chain() [][]byte { return c.cert.Certificate }

// Save writes the credentials to a file that only its owner can read.
func (c *Credentials) Save(path string) error {
	certs, err := ParseCertificates(c.cert.Certificate)
	if err != nil {
		return err
	}
	for _, root := range c.roots {
		if !contains(certs, root) {
			certs = append(certs, root)
		}
	}
	if err := writePEM(path, c.Key(), certs); err != nil {
		return fmt.Errorf("save the credentials of %s: %w", c.Identity, err)
	}
	return nil
}

// Load reads credentials that Save wrote; the error is fs.ErrNotExist where there are none. The roots are those
// certificates in it that vouch for themselves.
func Load(path string) (*Credentials, error) {
	key, certs, err := readPEM(path)
	if err != nil {
		return nil, fmt.Errorf("load credentials: %w", err)
	}
	var roots []*x509.Certificate
	for _, c := range certs {
		if isRoot(c) {
			roots = append(roots, c)
		}
	}
	c, err := NewCredentials(key, certs, roots)
	if err != nil {
		return nil, fmt.Errorf("load credentials from %s: %w", path, err)
	}
	return c, nil
}

// isRoot tells whether a certificate vouches for itself.
func isRoot(c *x509.Certificate) bool {
	return c.IsCA && bytes.Equal(c.RawIssuer, c.RawSubject) && c.CheckSignatureFrom(c) == nil
}

// SameRoots tells whether both trust the same.
func (c *Credentials) SameRoots(other *Credentials) bool {
	return c == other || slices.EqualFunc(c.roots, other.roots, (*x509.Certificate).Equal)
}

// sameCertificates tells whether two lists have the same, in whatever order.
func sameCertificates(a, b []*x509.Certificate) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(c *x509.Certificate) bool { return !contains(b, c) })
}

func contains(certs []*x509.Certificate, c *x509.Certificate) bool {
	for _, other := range certs {
		if other.Equal(c) {
			return true
		}
	}
	return false
}

// ParseCertificates reads certificates in DER.
func ParseCertificates(ders [][]byte) ([]*x509.Certificate, error) {
	certs := make([]*x509.Certificate, 0, len(ders))
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("read a certificate: %w", err)
		}
		certs = append(certs, c)
	}
	return certs, nil
}

// Holder holds the credentials that connections are made with; they may be replaced while it is in use. The zero Holder
// has none yet.
type Holder struct {
	current atomic.Pointer[[]*Credentials] // one, in a list that is made once: each call asks for it
	sets    atomic.Int64
}

// Set replaces the credentials: connections from now on are made with them, and those that are there go on.
func (h *Holder) Set(c *Credentials) {
	h.current.Store(&[]*Credentials{c})
	h.sets.Add(1)
}

// Renewals is how often the credentials were replaced by others.
func (h *Holder) Renewals() int64 { return max(h.sets.Load()-1, 0) }

// Get returns the credentials, nil where there are none yet.
func (h *Holder) Get() *Credentials {
	if all := h.All(); len(all) > 0 {
		return all[0]
	}
	return nil
}

// All returns the credentials as a list; it is not to be changed.
func (h *Holder) All() []*Credentials {
	if all := h.current.Load(); all != nil {
		return *all
	}
	return nil
}

// RenewAt is when the credentials are to be replaced: after two thirds of their life, and up to a tenth of it earlier, so that
// a grid's identities aren't renewed together.
func (c *Credentials) RenewAt() time.Time {
	life := c.Life()
	// The serial number is random, and stays what it is.
	early := new(big.Int).Mod(c.cert.Leaf.SerialNumber, big.NewInt(int64(max(life/10, 1))))
	return c.Begins.Add(life*2/3 - time.Duration(early.Int64()))
}

// Holds tells whether the certificate is good at a time, as far as that goes by its own.
func (c *Credentials) Holds(now time.Time) bool {
	return !now.Before(c.cert.Leaf.NotBefore) && !now.After(c.Expires)
}

// Due tells whether the credentials are to be replaced: when RenewAt has come, or when the clock was set back to before they
// begin.
func (c *Credentials) Due(now time.Time) bool {
	return !now.Before(c.RenewAt()) || now.Before(c.cert.Leaf.NotBefore)
}

// Outdated tells whether the grid has other roots than the credentials, as a server has shown last: renewed, they have the same.
func (c *Credentials) Outdated() bool { return c.outdated.Load() }

// LookEvery is how often to look whether credentials of such a life are due. Nobody may wait for that with a timer alone: it goes
// by a clock that stands still while the host sleeps, and that isn't set with the one on the wall.
func LookEvery(life time.Duration) time.Duration {
	return min(max(life/10, 100*time.Millisecond), time.Minute)
}

// Pause is how long to wait after a renewal that failed.
func (c *Credentials) Pause() time.Duration { return min(max(c.Life()/20, time.Second), time.Minute) }

// Life is how long the certificate lasts.
func (c *Credentials) Life() time.Duration { return c.Expires.Sub(c.Begins) }

// FromAnswer puts together what a master answered to a request with a key.
func FromAnswer(key *ecdsa.PrivateKey, answer *sutrav1.Certificates) (*Credentials, error) {
	chain, err := ParseCertificates(answer.GetChain())
	if err != nil {
		return nil, err
	}
	roots, err := ParseCertificates(answer.GetRoots())
	if err != nil {
		return nil, err
	}
	return NewCredentials(key, chain, roots)
}

// Trusts tells whether the root with that SHA-256 is one of the credentials'.
func (c *Credentials) Trusts(root [sha256.Size]byte) bool {
	for _, r := range c.roots {
		if sha256.Sum256(r.Raw) == root {
			return true
		}
	}
	return false
}
