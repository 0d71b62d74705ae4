package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

const (
	// authorityLife is how long a grid's authority lasts.
	authorityLife = 10 * 365 * 24 * time.Hour
	// backdate is how far a certificate's beginning lies before its making: the clocks of a grid's hosts differ.
	backdate = 5 * time.Minute
)

// Authority vouches for a grid's identities: a root, which is trusted, and an issuer, which the root vouches for and which signs
// all else.
type Authority struct {
	grid   string
	root   *x509.Certificate
	issuer *x509.Certificate
	key    *ecdsa.PrivateKey
}

// OpenAuthority reads the authority of a grid from a folder, or makes one there. The folder is the caller's alone.
func OpenAuthority(dir, grid string) (*Authority, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the authority's folder: %w", err)
	}
	rootFile, issuerFile := filepath.Join(dir, "root.pem"), filepath.Join(dir, "issuer.pem")
	root, err := readPair(rootFile)
	if errors.Is(err, fs.ErrNotExist) {
		root, err = newRoot(grid)
		if err == nil {
			err = root.write(rootFile)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the grid's root: %w", err)
	}
	if of := root.cert.Subject.SerialNumber; of != grid {
		return nil, fmt.Errorf("%s is the root of grid %s, and this is grid %s", rootFile, of, grid)
	}
	issuer, err := readPair(issuerFile)
	if errors.Is(err, fs.ErrNotExist) { // also where the process ended between the two
		issuer, err = newIssuer(grid, root)
		if err == nil {
			err = issuer.write(issuerFile)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the grid's issuer: %w", err)
	}
	a := &Authority{grid: grid, root: root.cert, issuer: issuer.cert, key: issuer.key}
	if err := issuer.cert.CheckSignatureFrom(root.cert); err != nil {
		return nil, fmt.Errorf("%s doesn't vouch for %s: %w", rootFile, issuerFile, err)
	}
	return a, nil
}

func newRoot(grid string) (pair, error) {
	return newPair(&x509.Certificate{
		Subject:  pkix.Name{CommonName: "Sutra grid " + grid, SerialNumber: grid},
		IsCA:     true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, MaxPathLen: 1,
	}, nil)
}

func newIssuer(grid string, root pair) (pair, error) {
	return newPair(&x509.Certificate{
		Subject:  pkix.Name{CommonName: "Sutra grid " + grid + " issuer", SerialNumber: grid},
		IsCA:     true,
		KeyUsage: x509.KeyUsageCertSign, MaxPathLenZero: true,
		// It can vouch for this grid's identities only.
		PermittedURIDomains: []string{grid}, PermittedDNSDomainsCritical: true,
	}, &root)
}

// newPair makes a key and its certificate, which a parent signs; nil: it signs itself.
func newPair(cert *x509.Certificate, parent *pair) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, fmt.Errorf("make a key: %w", err)
	}
	if cert.SerialNumber, err = serial(); err != nil {
		return pair{}, err
	}
	now := time.Now()
	cert.NotBefore, cert.NotAfter, cert.BasicConstraintsValid = now.Add(-backdate), now.Add(authorityLife), true
	signer, by := cert, key
	if parent != nil {
		signer, by = parent.cert, parent.key
		if cert.NotAfter.After(signer.NotAfter) {
			cert.NotAfter = signer.NotAfter
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, signer, key.Public(), by)
	if err != nil {
		return pair{}, fmt.Errorf("sign %s: %w", cert.Subject.CommonName, err)
	}
	made, err := x509.ParseCertificate(der)
	return pair{cert: made, key: key}, err
}

func serial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("draw a serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

// Roots are the certificates that vouch for the grid's identities, the newest first.
func (a *Authority) Roots() []*x509.Certificate { return []*x509.Certificate{a.root} }

// Hash is the SHA-256 of the root, by which one knows it that has a token.
func (a *Authority) Hash() [sha256.Size]byte { return sha256.Sum256(a.root.Raw) }

// Issue vouches for an identity that has the key of a certificate request, for ttl. Of the request nothing but the key is
// taken: whom it may name is the caller's to know. The chain ends with the root, so that one who knows only its hash can verify it.
func (a *Authority) Issue(request []byte, id Identity, ttl time.Duration) (chain []*x509.Certificate, err error) {
	public, err := RequestKey(request)
	if err != nil {
		return nil, err
	}
	return a.issue(public, id, ttl)
}

func (a *Authority) issue(public *ecdsa.PublicKey, id Identity, ttl time.Duration) (chain []*x509.Certificate, err error) {
	if err := id.validate(); err != nil {
		return nil, err
	}
	if id.Grid != a.grid {
		return nil, fmt.Errorf("this is the authority of grid %s, and %s is of grid %s", a.grid, id, id.Grid)
	}
	number, err := serial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	cert := &x509.Certificate{
		SerialNumber: number, Subject: pkix.Name{CommonName: id.String()}, URIs: []*url.URL{id.URI()},
		NotBefore: now.Add(-backdate), NotAfter: now.Add(ttl), BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	if id.Kind == User {
		cert.Subject.Organization = []string{RoleWord(id.Role)}
	} else { // it serves as well
		cert.ExtKeyUsage = append(cert.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		cert.DNSNames = []string{id.Grid} // for programs such as Prometheus, which know of no other names
	}
	if cert.NotAfter.After(a.issuer.NotAfter) {
		cert.NotAfter = a.issuer.NotAfter
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, a.issuer, public, a.key)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate of %s: %w", id, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return []*x509.Certificate{leaf, a.issuer, a.root}, nil
}

// NewRequest makes a key and a request for a certificate for it.
func NewRequest() (key *ecdsa.PrivateKey, request []byte, err error) {
	key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make a key: %w", err)
	}
	request, err = Request(key)
	return key, request, err
}

// Request asks for another certificate for a key. Its signature proves that whoever made it had the key.
func Request(key crypto.Signer) ([]byte, error) {
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate request: %w", err)
	}
	return request, nil
}

// RequestKey is the key of a certificate request; an error where the request isn't signed with it, or it isn't one of ours.
func RequestKey(request []byte) (*ecdsa.PublicKey, error) {
	req, err := x509.ParseCertificateRequest(request)
	if err != nil {
		return nil, fmt.Errorf("read the certificate request: %w", err)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("the certificate request isn't signed with its key: %w", err)
	}
	public, ok := req.PublicKey.(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, errors.New("the key of the certificate request isn't ECDSA P-256")
	}
	return public, nil
}
