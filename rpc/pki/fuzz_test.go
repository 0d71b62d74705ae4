package pki

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
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

// FuzzConceal: nothing is left of a token, whatever stands around it, and nothing is taken out of a text without one.
func FuzzConceal(f *testing.F) {
	whole := token(f).Encode()
	secret := whole[strings.LastIndexByte(whole, ':')+1:]
	for _, around := range []string{"", "--token=", "\n", "sutra1:", "sutra", ":", "(", whole, whole[:9]} {
		f.Add(around, "")
		f.Add("", around)
		f.Add(around, around)
	}
	f.Fuzz(func(t *testing.T, before, after string) {
		for text, holds := range map[string]bool{before + whole + after: true, before + after: HoldsToken(before+after) >= 0} {
			shown := string(Conceal([]byte(text)))
			if HoldsToken(shown) >= 0 || holds && strings.Contains(shown, secret) {
				t.Errorf("%q is shown as %q", text, shown)
			}
			if !holds && shown != text {
				t.Errorf("%q holds no token, and is shown as %q", text, shown)
			}
		}
	})
}

// FuzzRequestKey: what a stranger's request says of itself changes nothing in the certificate that it gets.
func FuzzRequestKey(f *testing.F) {
	a := authority(f, gridID)
	key, good, err := NewRequest()
	if err != nil {
		f.Fatal(err)
	}
	eve, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "user eve", Organization: []string{"admin"}}, DNSNames: []string{gridID},
		URIs: []*url.URL{UserIdentity(gridID, "eve", admin).URI()},
	}, key)
	if err != nil {
		f.Fatal(err)
	}
	for _, request := range [][]byte{nil, good, eve, good[:len(good)-1], append(bytes.Clone(good), 0), bytes.Repeat([]byte{0x30, 0x80}, 1000)} {
		f.Add(request)
	}
	f.Fuzz(func(t *testing.T, request []byte) {
		public, err := RequestKey(request)
		chain, issued := a.Issue(request, AgentIdentity(gridID, "agent-001"), life)
		if err != nil || issued != nil {
			if public != nil || err == nil || issued == nil {
				t.Errorf("refused (%v, %v) and read as %v", err, issued, public)
			}
			return
		}
		id, err := Verify(chain, a.Roots(), gridID, x509.ExtKeyUsageClientAuth, time.Now())
		if err != nil || id != AgentIdentity(gridID, "agent-001") || !public.Equal(chain[0].PublicKey) || len(chain[0].Subject.Organization) > 0 {
			t.Errorf("it got a certificate of %v (%v): %v", id, err, chain[0].Subject)
		}
	})
}

// FuzzChain: however somebody puts certificates together that were given, and whatever is changed in one, nobody is taken for anyone
// else than whom the first one names, and none for a use that it isn't for.
func FuzzChain(f *testing.F) {
	// The keys are other ones in each of the fuzzer's processes: it is told which certificates to take, and what to change.
	a, other := authority(f, gridID), authority(f, gridID)
	agent, master, foreign := own(f, a, AgentIdentity(gridID, "agent-001")), own(f, a, MasterIdentity(gridID, "m")), own(f, other, MasterIdentity(gridID, "m"))
	late, err := a.Own(UserIdentity(gridID, "ann", admin), -time.Minute)
	if err != nil {
		f.Fatal(err)
	}
	given := map[string]Identity{} // by what is signed of a certificate: a signature has more than one form
	for _, c := range []*Credentials{agent, master, late} {
		given[string(c.cert.Leaf.RawTBSCertificate)] = c.Identity
	}
	all := [][]byte{agent.Chain()[0], master.Chain()[0], late.Chain()[0], foreign.Chain()[0], a.issuer.Raw, a.roots[0].Raw, other.issuer.Raw, other.roots[0].Raw}
	for leaf := range byte(len(all)) {
		f.Add(leaf, byte(4), byte(5), byte(0), uint16(0), []byte(nil))
		f.Add(leaf, byte(5), byte(4), byte(0), uint16(0), []byte(nil))
		f.Add(leaf, byte(6), byte(5), byte(0), uint16(0), []byte(nil))
		f.Add(leaf, byte(4), byte(7), byte(0), uint16(0), []byte(nil))
		f.Add(leaf, byte(4), byte(5), byte(0), uint16(300), []byte("agent-002"))
	}
	joining := JoinTLS(a.Hash()).VerifyConnection
	f.Fuzz(func(t *testing.T, first, second, third, changed byte, at uint16, to []byte) {
		var ders [][]byte
		for _, i := range []byte{first, second, third} {
			ders = append(ders, bytes.Clone(all[int(i)%len(all)]))
		}
		der := ders[int(changed)%len(ders)]
		copy(der[int(at)%len(der):], to)
		chain, err := ParseCertificates(ders)
		if err != nil {
			return
		}
		known := given[string(chain[0].RawTBSCertificate)]
		check := func(as string, id Identity, err error, may bool) {
			if (err == nil) != (id != Identity{}) || err == nil && (!may || id != known) {
				t.Errorf("%s it is taken for %v (%v), and is %v", as, id, err, known)
			}
			if err != nil && may && len(to) == 0 && second == 4 && third == 5 {
				t.Errorf("%s it isn't taken for %v: %v", as, known, err)
			}
		}
		now := time.Now()
		good := known == agent.Identity || known == master.Identity
		id, err := Verify(chain, a.Roots(), gridID, x509.ExtKeyUsageClientAuth, now)
		check("as a caller", id, err, good)
		id, err = Verify(chain, a.Roots(), gridID, x509.ExtKeyUsageServerAuth, now)
		check("as a server", id, err, good)
		id, err = VerifyExpired(chain, a.Roots(), gridID, &agent.Key().PublicKey, now, 0)
		check("with the agent's key", id, err, known == agent.Identity)
		id, err = VerifyExpired(chain, a.Roots(), gridID, &late.Key().PublicKey, now, life)
		check("with the late one's key", id, err, known == late.Identity)
		id, err = VerifyExpired(chain, a.Roots(), gridID, &late.Key().PublicKey, now, 0)
		check("with the late one's key, too late", id, err, false)
		if err := joining(tls.ConnectionState{PeerCertificates: chain}); (err == nil) && known != master.Identity {
			t.Errorf("by a token it is taken for a master, and is %v", known)
		}
	})
}
