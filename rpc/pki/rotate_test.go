package pki

import (
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

// Each end trusts what it was given before or after the grid began to move, and shows what it was given before or after.
func TestBothRootsAreTrustedMeanwhile(t *testing.T) {
	before, dir := authorityIn(t, gridID)
	during, err := before.Rotate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if root, err := readPair(filepath.Join(dir, rootFile)); err != nil || root.cert().Equal(before.roots[0]) || !root.cert().Equal(during.roots[0]) {
		t.Errorf("the newest root isn't that whose key is kept: %v", err)
	}
	if len(during.Roots()) != 2 || during.Rotated().IsZero() || time.Since(during.Rotated()) > time.Minute || !before.Rotated().IsZero() {
		t.Errorf("%d roots since %s, before it since %s", len(during.Roots()), during.Rotated(), before.Rotated())
	}
	again, err := OpenAuthority(dir, gridID)
	if err != nil || again.Hash() != during.Hash() || !slices.EqualFunc(again.roots, during.roots, (*x509.Certificate).Equal) || !slices.EqualFunc(again.above, during.above, (*x509.Certificate).Equal) {
		t.Errorf("opened again it is another: %v", err)
	}
	if _, err := again.Rotate(time.Now()); !errors.Is(err, ErrRotating) {
		t.Errorf("rotated twice: %v", err)
	}
	authorities := map[string]*Authority{"before": before, "during": during}
	for from, servers := range authorities {
		server := holder(own(t, servers, MasterIdentity(gridID, "m")))
		for at, clients := range authorities {
			name := "a client from " + at + " at a server from " + from
			client := own(t, clients, AgentIdentity(gridID, "agent-001"))
			m := meet(t, ClientTLS(all(client), Peer{Kind: Master}), server.ServerTLS())
			wantWords(t, name, m.client, "")
			if outdated := client.Outdated(); outdated != (at != from) {
				t.Errorf("%s is to be renewed: %t", name, outdated)
			}
			if id, err := server.PeerOf(m.seen.PeerCertificates); err != nil || id != client.Identity {
				t.Errorf("%s: %s, %v", name, id, err)
			}
			if issued := during.Issued(client.cert.Leaf); issued != (at == "during") {
				t.Errorf("issued by the present issuer %s: %t", at, issued)
			}
		}
		// Whoever has a token of either root, and nothing else.
		for at, tokens := range authorities {
			m := meet(t, JoinTLS(tokens.Hash()), server.ServerTLS())
			want := ""
			if from == "before" && at == "during" {
				want = "the join token is of another grid" // it isn't the grid's yet
			}
			wantWords(t, "a token from "+at+" at a server from "+from, m.client, want)
		}
	}
}

func TestARetiredRootIsTrustedNoMore(t *testing.T) {
	before, dir := authorityIn(t, gridID)
	if _, err := before.Retire(time.Now()); !errors.Is(err, ErrNotRotating) {
		t.Errorf("the only root was retired: %v", err)
	}
	old := own(t, before, AgentIdentity(gridID, "agent-001"))
	during, err := before.Rotate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	moved := own(t, during, AgentIdentity(gridID, "agent-001"))
	after, err := during.Retire(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if again, err := OpenAuthority(dir, gridID); err != nil || again.Hash() != during.Hash() || len(again.Roots()) != 1 || len(again.above) != 2 || again.Issued(moved.cert.Leaf) {
		t.Errorf("opened again it is %+v, %v", again, err)
	}
	server := holder(own(t, after, MasterIdentity(gridID, "m")))
	for _, c := range []struct {
		name           string
		of             *Credentials
		client, server string
	}{
		{"one that hasn't moved", old, "its certificate is of another grid, or of this grid's before it was made anew", "of another grid"},
		{"one that has", moved, "", ""},
		{"one that came later", own(t, after, AgentIdentity(gridID, "agent-001")), "", ""},
	} {
		wantWords(t, c.name, meet(t, ClientTLS(all(c.of), Peer{Kind: Master}), server.ServerTLS()).client, c.client)
		_, err := server.PeerOf(certificates(t, c.of))
		wantWords(t, c.name+", as a caller", err, c.server)
	}
	wantWords(t, "an old token", meet(t, JoinTLS(before.Hash()), server.ServerTLS()).client, "the join token is of another grid")
	wantWords(t, "a new token", meet(t, JoinTLS(sha256.Sum256(during.roots[0].Raw)), server.ServerTLS()).client, "")

	// And the next time.
	next, err := after.Rotate(time.Now())
	if err != nil || next.Hash() == after.Hash() {
		t.Fatalf("a second move: %v", err)
	}
	if err := errors.Join(vouches(next, moved), vouches(after, own(t, next, AgentIdentity(gridID, "agent-001")))); err != nil {
		t.Error(err)
	}
}

// The process ends between the two files, or can't write the second one.
func TestARotationThatIsBrokenOff(t *testing.T) {
	before, dir := authorityIn(t, gridID)
	old := own(t, before, AgentIdentity(gridID, "agent-001"))
	root, err := os.ReadFile(filepath.Join(dir, rootFile))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := before.Rotate(time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, rootFile), root, 0o600); err != nil { // the first file alone was written
		t.Fatal(err)
	}
	a, err := OpenAuthority(dir, gridID)
	if err != nil {
		t.Fatal(err)
	}
	if a.Hash() != before.Hash() || len(a.Roots()) != 1 || !a.Rotated().IsZero() {
		t.Errorf("it has %d roots, since %s", len(a.Roots()), a.Rotated())
	}
	between := own(t, a, AgentIdentity(gridID, "agent-001"))
	if err := errors.Join(vouches(a, old), vouches(before, between)); err != nil {
		t.Error(err)
	}
	during, err := a.Rotate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(vouches(during, old), vouches(during, between), vouches(before, own(t, during, AgentIdentity(gridID, "agent-001")))); err != nil {
		t.Error(err)
	}
}

func certificates(t *testing.T, c *Credentials) []*x509.Certificate {
	t.Helper()
	certs, err := ParseCertificates(c.Chain())
	if err != nil {
		t.Fatal(err)
	}
	return certs
}
