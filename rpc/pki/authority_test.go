package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// vouches tells whether an authority's roots vouch for credentials.
func vouches(a *Authority, c *Credentials) error {
	chain, err := ParseCertificates(c.Chain())
	if err == nil {
		_, err = Verify(chain, a.Roots(), a.grid, x509.ExtKeyUsageClientAuth, time.Now())
	}
	return err
}

func TestAnAuthorityOpenedAgainIsTheSame(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	first, err := OpenAuthority(dir, gridID)
	if err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]fs.FileMode{".": fs.ModeDir | 0o700, "root.pem": 0o600, "issuer.pem": 0o600} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v, want %s", name, info.Mode(), err, mode)
		}
	}
	before := own(t, first, AgentIdentity(gridID, "agent-001"))
	again, err := OpenAuthority(dir, gridID)
	if err != nil {
		t.Fatal(err)
	}
	if again.Hash() != first.Hash() || !again.issuer.Equal(first.issuer) || !again.key.Equal(first.key) {
		t.Error("it is another authority")
	}
	// As where the process ended between the two, or the issuer was lost.
	if err := os.Remove(filepath.Join(dir, "issuer.pem")); err != nil {
		t.Fatal(err)
	}
	if again, err = OpenAuthority(dir, gridID); err != nil {
		t.Fatal(err)
	}
	if again.Hash() != first.Hash() || again.issuer.Equal(first.issuer) {
		t.Error("with the issuer gone, it has another root, or the lost issuer")
	}
	for name, c := range map[string]*Credentials{"before": before, "after": own(t, again, AgentIdentity(gridID, "agent-001"))} {
		if err := errors.Join(vouches(first, c), vouches(again, c)); err != nil {
			t.Errorf("credentials from %s the loss: %v", name, err)
		}
	}
}

func TestAnAuthorityIsNobodyElses(t *testing.T) {
	of := func(grid string) (string, []byte, []byte) {
		dir := filepath.Join(t.TempDir(), "pki")
		if _, err := OpenAuthority(dir, grid); err != nil {
			t.Fatal(err)
		}
		root, err := os.ReadFile(filepath.Join(dir, "root.pem"))
		issuer, err2 := os.ReadFile(filepath.Join(dir, "issuer.pem"))
		if err := errors.Join(err, err2); err != nil {
			t.Fatal(err)
		}
		return dir, root, issuer
	}
	dir, root, issuer := of(gridID)
	_, twin, _ := of(gridID)
	_, foreign, _ := of("another")
	for name, c := range map[string]struct {
		root, issuer []byte // nil: there is none
		mode         fs.FileMode
		want         string
	}{
		"read by its group":        {root, issuer, 0o640, "chmod 600 it"},
		"read by anybody":          {root, issuer, 0o604, "chmod 600 it"},
		"another grid's root":      {foreign, nil, 0o600, "is the root of grid another, and this is grid " + gridID},
		"a twin's root":            {twin, issuer, 0o600, "doesn't vouch for"},
		"no file but an empty one": {[]byte{}, issuer, 0o600, "there must be a key and a certificate"},
		"cut off":                  {root[:len(root)-40], issuer, 0o600, "cut off"},
		"certificate only":         {root[len(keyOf(root)):], issuer, 0o600, "there must be a key and a certificate"},
		"another's certificate":    {append(keyOf(root), twin[len(keyOf(twin)):]...), issuer, 0o600, "isn't that of its key"},
		"two certificates":         {append(bytes.Clone(root), root[len(keyOf(root)):]...), issuer, 0o600, "2 certificates, where one is wanted"},
		"two keys":                 {append(keyOf(twin), root...), issuer, 0o600, "there must be one key"},
		"a damaged key":            {bytes.Replace(bytes.Clone(root), []byte("-----\nM"), []byte("-----\nN"), 1), issuer, 0o600, "read the key: it is damaged"},
		"a damaged certificate": {
			append(keyOf(root), bytes.Replace(root[len(keyOf(root)):], []byte("-----\nM"), []byte("-----\nN"), 1)...), issuer, 0o600, "read a certificate",
		},
	} {
		t.Run(name, func(t *testing.T) {
			for file, data := range map[string][]byte{"root.pem": c.root, "issuer.pem": c.issuer} {
				path := filepath.Join(dir, file)
				if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
					t.Fatal(err)
				}
				if data == nil {
					continue
				}
				if err := errors.Join(os.WriteFile(path, data, 0o600), os.Chmod(path, c.mode)); err != nil {
					t.Fatal(err)
				}
			}
			_, err := OpenAuthority(dir, gridID)
			wantWords(t, "it", err, c.want)
			if _, err := os.Stat(filepath.Join(dir, "issuer.pem")); c.issuer == nil && !errors.Is(err, fs.ErrNotExist) {
				t.Error("an issuer was made for a root that isn't this grid's")
			}
		})
	}
}

// keyOf is the key's part of a file.
func keyOf(data []byte) []byte {
	end := []byte("-----END PRIVATE KEY-----\n")
	return bytes.Clone(data[:bytes.Index(data, end)+len(end)])
}

func TestIssueGivesNothingButWhatItIsTold(t *testing.T) {
	a := authority(t, gridID)
	key, request, err := NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[Identity]string{
		AgentIdentity(gridID, "agent-001"):                    "",
		UserIdentity(gridID, "ann", admin):                    "",
		AgentIdentity("another", "agent-001"):                 "this is the authority of grid " + gridID,
		AgentIdentity(gridID, "a/b"):                          "may have more than",
		AgentIdentity(gridID, "a%62"):                         "may have more than",
		AgentIdentity(gridID, ".."):                           "may have more than",
		AgentIdentity(gridID, ""):                             "may have more than",
		{Grid: gridID, Kind: Agent, Name: "a", Role: admin}:   "can't have the role admin",
		{Grid: gridID, Kind: "root", Name: "a", Role: admin}:  "there is no kind",
		{Grid: gridID, Kind: User, Name: "ann"}:               "can't have the role unspecified",
		UserIdentity(gridID, "ann", sutrav1.Role_ROLE_MASTER): "can't have the role master",
		UserIdentity(gridID, "ann", sutrav1.Role_ROLE_ANYONE): "can't have the role anyone",
		UserIdentity(gridID, "ann", sutrav1.Role(99)):         "can't have the role 99",
		{}: "may have more than",
	} {
		chain, err := a.Issue(request, id, life)
		wantWords(t, id.String(), err, want)
		if err != nil {
			continue
		}
		got, err := identityOf(chain[0])
		if err != nil || got != id || !key.PublicKey.Equal(chain[0].PublicKey) || chain[0].IsCA || !chain[2].Equal(a.roots[0]) {
			t.Errorf("%s got a certificate of %s (%v)", id, got, err)
		}
	}
	// Not even the authority's own end is outlived.
	chain, err := a.Issue(request, AgentIdentity(gridID, "agent-001"), 100*365*24*time.Hour)
	if err != nil || chain[0].NotAfter.After(a.issuer.NotAfter) {
		t.Errorf("a certificate outlives its issuer: %v", err)
	}
}

func TestRequestKey(t *testing.T) {
	_, good, err := NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ofRSA, err := Request(rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	ofP384, err := Request(p384)
	if err != nil {
		t.Fatal(err)
	}
	forged := bytes.Clone(good)
	forged[len(forged)-1] ^= 1
	for name, c := range map[string]struct {
		request []byte
		want    string
	}{
		"good": {good, ""}, "none": {nil, "read the certificate request"}, "cut off": {good[:len(good)-1], "read the certificate request"},
		"another's signature": {forged, "isn't signed with its key"}, "RSA": {ofRSA, "isn't ECDSA P-256"}, "P-384": {ofP384, "isn't ECDSA P-256"},
	} {
		key, err := RequestKey(c.request)
		wantWords(t, name, err, c.want)
		if (key == nil) != (err != nil) {
			t.Errorf("%s: key %v with %v", name, key, err)
		}
	}
}
