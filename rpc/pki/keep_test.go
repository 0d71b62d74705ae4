package pki

import (
	"crypto/x509"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Of an authority that has lost its root no other one is made, and one that was never there can be told from that.
func TestALostRootIsMissed(t *testing.T) {
	a, dir := authorityIn(t, gridID)
	root, issuer := filepath.Join(dir, rootFile), filepath.Join(dir, issuerFile)
	if _, err := ReadAuthority(filepath.Join(dir, "none"), gridID); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an authority that isn't there: %v", err)
	}
	if err := os.Remove(root); err != nil {
		t.Fatal(err)
	}
	_, err := OpenAuthority(dir, gridID)
	for _, words := range []string{root, issuer, "backup"} {
		wantWords(t, "without its root", err, words)
	}
	if exists(root) {
		t.Error("another root was made")
	}
	if _, err := ReadAuthority(dir, gridID); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("read without its root: %v", err)
	}
	if err := os.Remove(issuer); err != nil {
		t.Fatal(err)
	}
	if other, err := OpenAuthority(dir, gridID); err != nil || other.Hash() == a.Hash() {
		t.Errorf("with nothing left: %v", err)
	}
}

// A clock that was wrong by hours when the authority was made is set, and what is made from then on holds.
func TestAnAuthorityOutlivesItsClock(t *testing.T) {
	ahead := time.Now().Add(20 * time.Hour)
	root, err := newRoot(gridID, ahead)
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := newIssuer(gridID, root, ahead)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := errors.Join(root.write(filepath.Join(dir, rootFile)), issuer.write(filepath.Join(dir, issuerFile))); err != nil {
		t.Fatal(err)
	}
	a, err := OpenAuthority(dir, gridID)
	if err != nil {
		t.Fatal(err)
	}
	if err := vouches(a, own(t, a, AgentIdentity(gridID, "agent-001"))); err != nil {
		t.Error(err)
	}
	// Where that isn't enough, it says whose time it is.
	chain := certificates(t, own(t, a, AgentIdentity(gridID, "agent-001")))
	for at, words := range map[time.Time]string{
		time.Now().Add(-5 * time.Hour):        "its certificate is valid from",
		time.Now().Add(2 * life):              "its certificate expired at",
		a.Roots()[0].NotAfter.Add(time.Hour):  "its certificate expired at",
		a.Roots()[0].NotBefore.Add(time.Hour): "its certificate is valid from",
	} {
		_, err := Verify(chain, a.Roots(), gridID, x509.ExtKeyUsageClientAuth, at)
		wantWords(t, at.String(), err, words)
		wantWords(t, at.String(), err, Clocks)
	}
	far := time.Now().Add(48 * time.Hour)
	if root, err = newRoot(gridID, far); err != nil {
		t.Fatal(err)
	}
	if issuer, err = newIssuer(gridID, root, far); err != nil {
		t.Fatal(err)
	}
	early := &Authority{grid: gridID, roots: root.certs, issuer: issuer.cert(), key: issuer.key, above: append(issuer.certs, root.certs...)}
	_, err = Verify(certificates(t, own(t, early, AgentIdentity(gridID, "agent-001"))), early.roots, gridID, x509.ExtKeyUsageClientAuth, time.Now())
	wantWords(t, "an authority from the day after tomorrow", err, "the certificate of its grid's authority is valid from")
	wantWords(t, "an authority from the day after tomorrow", err, Clocks)
}

// Credentials are due by what the clock says, wherever it was set to.
func TestDueByTheClock(t *testing.T) {
	a := authority(t, gridID)
	c := own(t, a, AgentIdentity(gridID, "agent-001"))
	for _, at := range []struct {
		name       string
		after      time.Duration
		due, holds bool
	}{
		{"at once", 0, false, true},
		{"in good time", life / 2, false, true},
		{"late", life * 3 / 4, true, true},
		{"too late", 2 * life, true, false},
		{"a clock that was set back a little", -time.Minute, false, true},
		{"a clock that was set back", -life, true, false},
	} {
		if now := time.Now().Add(at.after); c.Due(now) != at.due || c.Holds(now) != at.holds {
			t.Errorf("%s: due %t, holds %t", at.name, c.Due(now), c.Holds(now))
		}
	}
	// Whoever has one from a clock that was ahead proves by its key who it is.
	key, chain := &c.Key().PublicKey, certificates(t, c)
	for before, ok := range map[time.Duration]bool{2 * time.Hour: true, 23 * time.Hour: true, 80 * time.Hour: false} {
		id, err := VerifyExpired(chain, a.Roots(), gridID, key, time.Now().Add(-before), 48*time.Hour)
		if ok != (err == nil) || ok && id != c.Identity {
			t.Errorf("%s before: %s, %v", before, id, err)
		}
	}
}

// A key that is kept is the same whenever it is asked for, and nobody else's.
func TestKeepKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "home", "join.key")
	first, err := KeepKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("its file is %v, %v", info, err)
	}
	if again, err := KeepKey(path); err != nil || !again.Equal(first) {
		t.Errorf("asked for again it is another one, %v", err)
	}
	for text, words := range map[string]string{"": "there is no key in", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n": "it is damaged: remove it"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := KeepKey(path)
		wantWords(t, "damaged", err, words)
		wantWords(t, "damaged", err, path)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = KeepKey(path)
	wantWords(t, "open to others", err, "chmod 600")
}
