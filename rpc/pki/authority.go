package pki

import (
	"bytes"
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
	// authorityBackdate is that of an authority's own. They aren't made anew when a clock that was wrong then is set.
	authorityBackdate = 24 * time.Hour
)

// Authority vouches for a grid's identities: a root, which is trusted, and an issuer, which the root vouches for and which signs
// all else. While the grid moves to another root the one before is trusted as well, and vouches for the issuer, too: whoever
// trusts either root can verify what the issuer signs. An Authority doesn't change; Rotate and Retire make others.
type Authority struct {
	dir, grid string
	// roots, the newest first. One, or two while the grid moves.
	roots []*x509.Certificate
	// issuer signs with key. above is what vouches for what it signs: its certificate by each root, and that root.
	issuer *x509.Certificate
	key    *ecdsa.PrivateKey
	above  []*x509.Certificate
}

// The files of an authority. root.pem has the newest root's key and all roots, issuer.pem the issuer's key and its certificates. Which
// roots there are root.pem alone decides: it is written last.
const (
	rootFile   = "root.pem"
	issuerFile = "issuer.pem"
)

// OpenAuthority reads the authority of a grid from a folder, or makes one there. The folder is the caller's alone.
func OpenAuthority(dir, grid string) (*Authority, error) {
	a, err := ReadAuthority(dir, grid)
	if !errors.Is(err, fs.ErrNotExist) {
		return a, err
	}
	if left := filepath.Join(dir, issuerFile); exists(left) { // a root is written before its issuer
		return nil, fmt.Errorf("%w, and %s, which it vouches for, is there: put it back from a backup; or remove that one as well for "+
			"another authority, with which all other hosts and people have to join anew", err, left)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the authority's folder: %w", err)
	}
	root, err := newRoot(grid, time.Now())
	if err == nil {
		err = root.write(filepath.Join(dir, rootFile))
	}
	if err != nil {
		return nil, fmt.Errorf("the grid's root: %w", err)
	}
	return ReadAuthority(dir, grid)
}

// ReadAuthority is OpenAuthority for an authority that is there: where it has no root the error is fs.ErrNotExist.
func ReadAuthority(dir, grid string) (*Authority, error) {
	rootPath, issuerPath := filepath.Join(dir, rootFile), filepath.Join(dir, issuerFile)
	root, err := readPair(rootPath)
	if err != nil {
		return nil, fmt.Errorf("the grid's root: %w", err)
	}
	for _, cert := range root.certs {
		if of := cert.Subject.SerialNumber; of != grid {
			return nil, fmt.Errorf("%s is the root of grid %s, and this is grid %s", rootPath, of, grid)
		}
	}
	if n := len(root.certs); n > 2 || n == 2 && root.certs[0].Equal(root.certs[1]) {
		return nil, fmt.Errorf("%s has %d certificates, where one is wanted, or two different ones while the grid moves to another root", rootPath, n)
	}
	issuer, err := readPair(issuerPath)
	if errors.Is(err, fs.ErrNotExist) && len(root.certs) > 1 { // one that the newest root alone vouches for would cut off all who trust the older
		return nil, fmt.Errorf("%s is lost, without which the grid can't go on to move to another root; put it back from a backup: %w", issuerPath, err)
	}
	if errors.Is(err, fs.ErrNotExist) { // it was lost, or the process ended between the two
		issuer, err = newIssuer(grid, root, time.Now())
		if err == nil {
			err = issuer.write(issuerPath)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the grid's issuer: %w", err)
	}
	a := &Authority{dir: dir, grid: grid, roots: root.certs, key: issuer.key}
	for _, by := range a.roots {
		for _, cert := range issuer.certs {
			if cert.CheckSignatureFrom(by) == nil {
				a.above = append(a.above, cert, by)
			}
		}
	}
	if len(a.above) == 0 {
		return nil, fmt.Errorf("%s doesn't vouch for %s", rootPath, issuerPath)
	}
	a.issuer = a.above[0]
	return a, nil
}

// ErrRotating is that of a grid which moves to another root already; ErrNotRotating that of one which doesn't.
var (
	ErrRotating    = errors.New("the grid is moving to another root")
	ErrNotRotating = errors.New("the grid isn't moving to another root")
)

// Rotate makes another root and another issuer, from now on (now) the grid's own; the root that was is trusted as well until
// Retire. The key of that root is gone: nobody can make certificates with it any more who hasn't taken it before. Wherever it is
// broken off, the folder holds the one or the other authority.
func (a *Authority) Rotate(now time.Time) (*Authority, error) {
	if len(a.roots) > 1 {
		return nil, ErrRotating
	}
	before, err := readPair(filepath.Join(a.dir, rootFile))
	if err != nil {
		return nil, fmt.Errorf("the grid's root: %w", err)
	}
	if len(before.certs) > 1 { // it does on disk, where an earlier try failed at its end
		return nil, ErrRotating
	}
	root, err := newRoot(a.grid, now)
	if err != nil {
		return nil, err
	}
	issuer, err := newIssuer(a.grid, root, now)
	if err != nil {
		return nil, err
	}
	crossed, err := sign(issuerTemplate(a.grid), issuer.key, before, now)
	if err != nil {
		return nil, err
	}
	root.certs, issuer.certs = append(root.certs, before.cert()), append(issuer.certs, crossed)
	// The root that is there vouches for the new issuer, too.
	if err := issuer.write(filepath.Join(a.dir, issuerFile)); err != nil {
		return nil, fmt.Errorf("write the new issuer: %w", err)
	}
	if err := root.write(filepath.Join(a.dir, rootFile)); err != nil {
		return nil, fmt.Errorf("write the new root: %w", err)
	}
	return OpenAuthority(a.dir, a.grid)
}

// Retire ends the trust in the root that was before the newest, and makes another issuer: by its certificates one knows who has heard
// of that, and trusts the older root no more.
func (a *Authority) Retire(now time.Time) (*Authority, error) {
	if len(a.roots) == 1 {
		return nil, ErrNotRotating
	}
	path := filepath.Join(a.dir, rootFile)
	root, err := readPair(path)
	if err != nil {
		return nil, fmt.Errorf("the grid's root: %w", err)
	}
	issuer, err := newIssuer(a.grid, root, now)
	if err != nil {
		return nil, err
	}
	if err := issuer.write(filepath.Join(a.dir, issuerFile)); err != nil {
		return nil, fmt.Errorf("write the new issuer: %w", err)
	}
	root.certs = root.certs[:1]
	if err := root.write(path); err != nil {
		return nil, fmt.Errorf("write the roots: %w", err)
	}
	return OpenAuthority(a.dir, a.grid)
}

// Rotated is when the grid began to move to its newest root; the zero time where it doesn't move.
func (a *Authority) Rotated() time.Time {
	if len(a.roots) == 1 {
		return time.Time{}
	}
	return a.roots[0].NotBefore.Add(authorityBackdate)
}

// Issued tells whether a certificate was signed by the present issuer, and not by one before it.
func (a *Authority) Issued(cert *x509.Certificate) bool {
	return bytes.Equal(cert.AuthorityKeyId, a.issuer.SubjectKeyId)
}

func newRoot(grid string, now time.Time) (pair, error) {
	return newPair(&x509.Certificate{
		Subject:  pkix.Name{CommonName: "Sutra grid " + grid, SerialNumber: grid},
		IsCA:     true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, MaxPathLen: 1,
	}, nil, now)
}

func newIssuer(grid string, root pair, now time.Time) (pair, error) {
	return newPair(issuerTemplate(grid), &root, now)
}

func issuerTemplate(grid string) *x509.Certificate {
	return &x509.Certificate{
		Subject:  pkix.Name{CommonName: "Sutra grid " + grid + " issuer", SerialNumber: grid},
		IsCA:     true,
		KeyUsage: x509.KeyUsageCertSign, MaxPathLenZero: true,
		// It can vouch for this grid's identities only.
		PermittedURIDomains: []string{grid}, PermittedDNSDomainsCritical: true,
	}
}

// newPair makes a key and its certificate, which a parent signs; nil: it signs itself.
func newPair(cert *x509.Certificate, parent *pair, now time.Time) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, fmt.Errorf("make a key: %w", err)
	}
	if parent == nil {
		parent = &pair{key: key, certs: []*x509.Certificate{cert}}
	}
	made, err := sign(cert, key, *parent, now)
	return pair{key: key, certs: []*x509.Certificate{made}}, err
}

// sign makes an authority's certificate for a key. It doesn't outlive that of the parent, unless it is the parent's own.
func sign(cert *x509.Certificate, key *ecdsa.PrivateKey, parent pair, now time.Time) (made *x509.Certificate, err error) {
	if cert.SerialNumber, err = serial(); err != nil {
		return nil, err
	}
	cert.NotBefore, cert.NotAfter, cert.BasicConstraintsValid = now.Add(-authorityBackdate), now.Add(authorityLife), true
	if end := parent.cert().NotAfter; cert.NotAfter.After(end) {
		cert.NotAfter = end
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, parent.cert(), key.Public(), parent.key)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", cert.Subject.CommonName, err)
	}
	return x509.ParseCertificate(der)
}

func serial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("draw a serial number: %w", err)
	}
	return n.Add(n, big.NewInt(1)), nil
}

// Roots are the certificates that vouch for the grid's identities, the newest first.
func (a *Authority) Roots() []*x509.Certificate { return a.roots }

// Hash is the SHA-256 of the newest root, by which one knows it that has a token.
func (a *Authority) Hash() [sha256.Size]byte { return sha256.Sum256(a.roots[0].Raw) }

// Issue vouches for an identity that has the key of a certificate request, for ttl. Of the request nothing but the key is
// taken: whom it may name is the caller's to know. The chain has the roots in it, so that one who knows only the hash of one can
// verify it.
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
	if end := a.issuer.NotAfter; cert.NotAfter.After(end) {
		cert.NotAfter = end
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, a.issuer, public, a.key)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate of %s: %w", id, err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return append([]*x509.Certificate{leaf}, a.above...), nil
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
