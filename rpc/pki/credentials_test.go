package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func TestCredentialsSavedAreLoaded(t *testing.T) {
	a, dir := authorityIn(t, gridID)
	next := authority(t, gridID)
	c := own(t, a, UserIdentity(gridID, "ann", admin))
	c.roots = append(c.roots, next.roots[0]) // as in a change of roots
	path := filepath.Join(t.TempDir(), "folder", "ann.pem")
	if _, err := Load(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of none there is %v", err)
	}
	if err := c.Save(path); err != nil {
		t.Fatal(err)
	}
	got, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	if got.Identity != c.Identity || !got.Expires.Equal(c.Expires) || !got.Begins.Equal(c.Begins) || !got.Key().Equal(c.Key()) ||
		!got.cert.Leaf.Equal(c.cert.Leaf) || len(got.roots) != 2 || !contains(got.roots, a.roots[0]) || !contains(got.roots, next.roots[0]) {
		t.Errorf("loaded %+v, saved %+v", got, c)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 1 {
		t.Errorf("beside it there are %v, %v", left, err)
	}

	// One that bears its issuer's name and isn't signed with its own key vouches for nobody: the next root as this one signs it.
	root, err := readPair(filepath.Join(dir, "root.pem"))
	if err != nil {
		t.Fatal(err)
	}
	crossed, err := x509.CreateCertificate(nil, next.roots[0], a.roots[0], next.roots[0].PublicKey, root.key)
	if err != nil {
		t.Fatal(err)
	}
	seen := own(t, a, UserIdentity(gridID, "ann", admin))
	seen.cert.Certificate = append(seen.cert.Certificate, crossed)
	other := filepath.Join(t.TempDir(), "crossed.pem")
	if err := seen.Save(other); err != nil {
		t.Fatal(err)
	}
	if got, err := Load(other); err != nil || len(got.roots) != 1 || !got.roots[0].Equal(a.roots[0]) {
		t.Errorf("of a root and one that it signed, both are trusted, or none: %+v, %v", got, err)
	}

	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	blocks := bytes.SplitAfter(whole, []byte("-----\n"))
	for end := range len(whole) - 1 {
		if _, _, err := parsePEM(whole[:end]); err == nil && !endsABlock(blocks, end) {
			t.Fatalf("cut off after %d of %d bytes it passes for whole", end, len(whole))
		}
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = Load(path)
	wantWords(t, "a file that others may read", err, "chmod 600 it")
}

func TestOtherKeysAreNoCredentials(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := template(gridID)
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "c.pem")
	if err := writePEM(path, key, []*x509.Certificate{leaf}); err != nil {
		t.Fatal(err)
	}
	_, err = Load(path)
	wantWords(t, "a key on P-384", err, "an ECDSA P-256 one")
}

// endsABlock tells whether so many bytes are whole blocks, but for the last line's end.
func endsABlock(parts [][]byte, end int) bool {
	sum := 0
	for _, part := range parts {
		sum += len(part)
		if end == sum || end == sum-1 {
			return true
		}
	}
	return false
}

func TestFromAnswer(t *testing.T) {
	a := authority(t, gridID)
	key, request, err := NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	stranger, _, err := NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	id := AgentIdentity(gridID, "agent-001")
	chain, err := a.Issue(request, id, life)
	if err != nil {
		t.Fatal(err)
	}
	answer := &sutrav1.Certificates{Roots: [][]byte{a.roots[0].Raw}}
	for _, c := range chain {
		answer.Chain = append(answer.Chain, c.Raw)
	}
	c, err := FromAnswer(key, answer)
	if err != nil || c.Identity != id || vouches(a, c) != nil {
		t.Fatalf("%+v, %v", c, err)
	}
	_, err = FromAnswer(stranger, answer)
	wantWords(t, "another key", err, "isn't that of the key")
	for name, c := range map[string]*sutrav1.Certificates{
		"nothing": nil, "no roots": {Chain: answer.Chain}, "no chain": {Roots: answer.Roots},
	} {
		_, err = FromAnswer(key, c)
		wantWords(t, name, err, "without a certificate or without roots")
	}
	_, err = FromAnswer(key, &sutrav1.Certificates{Chain: [][]byte{{1, 2}}, Roots: answer.Roots})
	wantWords(t, "a damaged chain", err, "read a certificate")
}

func TestRenewAt(t *testing.T) {
	a := authority(t, gridID)
	for _, life := range []time.Duration{time.Second, time.Minute, 24 * time.Hour, authorityLife} {
		at := map[time.Duration]bool{}
		for range 20 {
			c, err := a.Own(AgentIdentity(gridID, "agent-001"), life)
			if err != nil {
				t.Fatal(err)
			}
			got, whole := c.RenewAt(), c.Expires.Sub(c.Begins)
			if earliest, latest := c.Begins.Add(whole*2/3-whole/10), c.Begins.Add(whole*2/3); got.Before(earliest) || got.After(latest) {
				t.Errorf("of a life of %s from %s on it is renewed at %s", whole, c.Begins, got)
			}
			if !got.Equal(c.RenewAt()) {
				t.Error("it changes")
			}
			at[got.Sub(c.Begins)] = true
		}
		if len(at) < 10 {
			t.Errorf("of 20 lives of %s there are %d times of renewal only", life, len(at))
		}
	}
	ended, err := a.Own(AgentIdentity(gridID, "agent-001"), -time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if ended.RenewAt().After(time.Now()) {
		t.Error("one that has ended isn't due")
	}
}

func TestVerifyExpired(t *testing.T) {
	a, twin := authority(t, gridID), authority(t, gridID)
	const grace = time.Hour
	id := AgentIdentity(gridID, "agent-001")
	c := own(t, a, id)
	end := c.Expires
	stranger, _, err := NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	alien := own(t, twin, id)
	server := forge(t, a, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] })
	chain := func(ders [][]byte) []*x509.Certificate {
		certs, err := ParseCertificates(ders)
		if err != nil {
			t.Fatal(err)
		}
		return certs
	}
	for name, v := range map[string]struct {
		of    *Credentials
		chain []*x509.Certificate
		grid  string
		now   time.Time
		want  string
	}{
		"valid still":       {c, chain(c.Chain()), gridID, end.Add(-time.Minute), ""},
		"just over":         {c, chain(c.Chain()), gridID, end.Add(time.Second), ""},
		"in its grace":      {c, chain(c.Chain()), gridID, end.Add(grace), ""},
		"after its grace":   {c, chain(c.Chain()), gridID, end.Add(grace + time.Second), "longer than 1h0m0s ago"},
		"before its time":   {c, chain(c.Chain()), gridID, c.Begins.Add(-2 * backdate), ""},
		"long before that":  {c, chain(c.Chain()), gridID, c.Begins.Add(-2 * grace), "do the clocks"},
		"for another grid":  {c, chain(c.Chain()), "another", end.Add(time.Second), "it is of grid " + gridID},
		"a twin grid's":     {alien, chain(alien.Chain()), gridID, end.Add(time.Second), "of another grid"},
		"another's key":     {&Credentials{cert: shows(t, stranger, c.Chain()...)}, chain(c.Chain()), gridID, end.Add(time.Second), "the key isn't that of its certificate"},
		"no certificate":    {c, nil, gridID, end, "it shows no certificate"},
		"a server's":        {&Credentials{cert: server}, chain(server.Certificate), gridID, server.Leaf.NotAfter.Add(time.Second), "isn't for this use"},
		"without its chain": {c, chain(c.Chain()[:1]), gridID, end.Add(time.Second), "of another grid"},
	} {
		got, err := VerifyExpired(v.chain, a.Roots(), v.grid, &v.of.Key().PublicKey, v.now, grace)
		wantWords(t, name, err, v.want)
		if err == nil && got != id || err != nil && got != (Identity{}) {
			t.Errorf("%s: it is taken for %s", name, got)
		}
	}
}
