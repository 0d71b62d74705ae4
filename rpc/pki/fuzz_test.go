package pki

import (
	"bytes"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzParseToken: what is read is written the same, and what isn't shows nothing of itself.
func FuzzParseToken(f *testing.F) {
	whole := token(f).Encode()
	for _, text := range []string{"", whole, whole[:50], whole + "\n", strings.ReplaceAll(whole, ":", "\n:"), "sutra1:::", "sutra1:a:b:c:d"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, err := ParseToken(text)
		if err == nil && got.Encode() != strings.TrimSpace(text) {
			t.Errorf("%q is read as %q", text, got.Encode())
		}
		if err != nil && got != (Token{}) {
			t.Errorf("%q is refused (%v) and read", text, err)
		}
	})
}

// FuzzParsePEM: what is read can be written, and is read the same then.
func FuzzParsePEM(f *testing.F) {
	c := own(f, authority(f, gridID), AgentIdentity(gridID, "agent-001"))
	path := filepath.Join(f.TempDir(), "c.pem")
	if err := c.Save(path); err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	end := bytes.Index(whole, []byte("-----BEGIN CERT"))
	for _, data := range [][]byte{
		nil, whole, whole[:end], whole[end:], whole[:len(whole)-30], bytes.ReplaceAll(whole, []byte("\n"), []byte("\r\n")),
		append([]byte("words before\n"), whole...), append(bytes.Clone(whole), "words behind"...), append(bytes.Clone(whole), whole...),
	} {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		key, certs, err := parsePEM(data)
		if err != nil {
			if key != nil || certs != nil {
				t.Errorf("refused (%v) and read", err)
			}
			return
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		again := pem.EncodeToMemory(&pem.Block{Type: keyBlock, Bytes: der})
		for _, c := range certs {
			again = append(again, pem.EncodeToMemory(&pem.Block{Type: certBlock, Bytes: c.Raw})...)
		}
		sameKey, same, err := parsePEM(again)
		if err != nil || !sameKey.Equal(key) || len(same) != len(certs) {
			t.Fatalf("what was read isn't read again: %v", err)
		}
		for i := range certs {
			if !same[i].Equal(certs[i]) {
				t.Error("what was read is read otherwise")
			}
		}
	})
}

// FuzzIdentityOf: whoever is read out of a certificate can be written into one, by exactly that name.
func FuzzIdentityOf(f *testing.F) {
	for _, uri := range []string{
		"spiffe://g/master/m", "spiffe://g/agent/agent-001", "spiffe://g/user/ann", "spiffe://g:1/agent/a", "spiffe://g/agent/a?", "spiffe://g/agent/a#",
		"spiffe://g/agent/%61", "spiffe://g//a", "spiffe:g/agent/a", "SPIFFE://g/agent/a", "spiffe://g/agent/../a", "spiffe://u:p@g/agent/a", "", "//g/agent/a",
	} {
		f.Add(uri, "", "")
		f.Add(uri, "admin", "")
	}
	f.Add("spiffe://g/user/ann", "admin", "viewer")
	f.Fuzz(func(t *testing.T, text, first, second string) {
		uri, err := url.Parse(text)
		if err != nil {
			return
		}
		cert := &x509.Certificate{URIs: []*url.URL{uri}}
		for _, word := range []string{first, second} {
			if word != "" {
				cert.Subject.Organization = append(cert.Subject.Organization, word)
			}
		}
		id, err := identityOf(cert)
		if err != nil {
			if id != (Identity{}) {
				t.Errorf("%q is refused (%v) and read", text, err)
			}
			return
		}
		if err := id.validate(); err != nil {
			t.Errorf("%q is read as %+v: %v", text, id, err)
		}
		if id.URI().String() != uri.String() {
			t.Errorf("%q is read as %q", text, id.URI())
		}
		same := &x509.Certificate{URIs: []*url.URL{id.URI()}}
		if id.Kind == User {
			same.Subject = pkix.Name{Organization: []string{RoleWord(id.Role)}}
		}
		if again, err := identityOf(same); err != nil || again != id {
			t.Errorf("%+v is written and read as %+v, %v", id, again, err)
		}
	})
}
