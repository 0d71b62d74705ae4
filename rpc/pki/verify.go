package pki

import (
	"crypto/ecdsa"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// Verify finds out whom a chain of certificates, leaf first, names, if one of the roots vouches for it now, for that use and for
// that grid. That the other end has the key is the handshake's to see to.
func Verify(chain, roots []*x509.Certificate, grid string, use x509.ExtKeyUsage, now time.Time) (Identity, error) {
	if len(chain) == 0 {
		return Identity{}, errors.New("it shows no certificate")
	}
	opts := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{use},
	}
	for _, c := range roots {
		opts.Roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		if !contains(roots, c) { // one that is both would cost another check of its signature
			opts.Intermediates.AddCert(c)
		}
	}
	leaf := chain[0]
	if leaf.IsCA {
		return Identity{}, errors.New("it shows an authority's certificate as its own")
	}
	if _, err := leaf.Verify(opts); err != nil {
		return Identity{}, explain(leaf, err, now)
	}
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 { // neither that nor a handshake looks at it
		return Identity{}, errWrongUse
	}
	id, err := identityOf(leaf)
	if err != nil {
		return Identity{}, err
	}
	if id.Grid != grid {
		return Identity{}, fmt.Errorf("it is of grid %s, and this is grid %s", id.Grid, grid)
	}
	return id, nil
}

var errWrongUse = errors.New("its certificate isn't for this use")

// Clocks is what the words of an error have in them that may be due to a host's clock.
const Clocks = "do the clocks of both hosts agree?"

// explain says of a certificate that wasn't vouched for what a person has to know.
func explain(leaf *x509.Certificate, err error, now time.Time) error {
	var invalid x509.CertificateInvalidError
	var unknown x509.UnknownAuthorityError
	// The time of one of those above it may be the trouble as well.
	whose, cert := "its certificate", leaf
	if errors.As(err, &invalid) && invalid.Reason == x509.Expired && !invalid.Cert.Equal(leaf) {
		whose, cert = "the certificate of its grid's authority", invalid.Cert
	}
	switch {
	case now.Before(cert.NotBefore):
		return fmt.Errorf("%s is valid from %s only; %s", whose, cert.NotBefore.UTC().Format(time.RFC3339), Clocks)
	case now.After(cert.NotAfter):
		return fmt.Errorf("%s expired at %s; %s", whose, cert.NotAfter.UTC().Format(time.RFC3339), Clocks)
	case errors.As(err, &unknown):
		if _, err := identityOf(leaf); err != nil {
			return errors.New("its certificate is none that a grid gives")
		}
		return errors.New("its certificate is of another grid, or of this grid's before it was made anew")
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return errWrongUse
	}
	return fmt.Errorf("its certificate doesn't hold: %w", err)
}

// VerifyExpired is Verify for an identity whose certificate has ended, at most grace ago, or begins no later than grace from
// now, because a clock was set back, and that has proved that the certificate's key is its own.
func VerifyExpired(chain, roots []*x509.Certificate, grid string, key *ecdsa.PublicKey, now time.Time, grace time.Duration) (Identity, error) {
	if len(chain) == 0 {
		return Identity{}, errors.New("it shows no certificate")
	}
	leaf := chain[0]
	if !key.Equal(leaf.PublicKey) {
		return Identity{}, errors.New("the key isn't that of its certificate")
	}
	if now.After(leaf.NotAfter.Add(grace)) {
		return Identity{}, fmt.Errorf("its certificate expired at %s, longer than %s ago", leaf.NotAfter.UTC().Format(time.RFC3339), grace)
	}
	switch {
	case now.After(leaf.NotAfter):
		now = leaf.NotAfter // as it was in its last moment
	case now.Before(leaf.NotBefore) && leaf.NotBefore.Sub(now) <= grace:
		now = leaf.NotBefore
	}
	return Verify(chain, roots, grid, x509.ExtKeyUsageClientAuth, now)
}
