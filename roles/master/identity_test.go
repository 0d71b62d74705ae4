package master

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/rpc/pki"
)

const grid = "d4k2v8grid"

// lines is a log that is read while it is written.
type lines struct {
	mu  sync.Mutex
	all bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.Write(p)
}

func (l *lines) count(words string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.all.String(), words)
}

// renewing is a master that does nothing but renew what it has, for a bubble.
func renewing(t *testing.T, life time.Duration) (m *Master, log *lines) {
	t.Helper()
	home := t.TempDir()
	authority, err := pki.OpenAuthority(filepath.Join(home, "master", "pki"), grid)
	if err != nil {
		t.Fatal(err)
	}
	a := &access{grid: grid, life: life, authority: authority}
	log = &lines{}
	m = &Master{cfg: Config{Home: home, Log: zerolog.New(log)}, identity: &pki.Holder{}, service: &service{access: a}}
	if err := m.renewOwn(a); err != nil {
		t.Fatal(err)
	}
	if err := m.leaveAdmin(a); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.renew(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return m, log
}

// The clock jumps while the master waits: within a minute it has a certificate that holds by the new time.
func TestRenewalAfterTheClockWasSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := renewing(t, 24*time.Hour)
		for name, life := range map[string]time.Duration{"expired long ago": -30 * time.Hour, "due": time.Millisecond} {
			// The clock of a bubble can't be set: the certificate is put where it would be then.
			old, err := m.service.access.current().Own(pki.MasterIdentity(grid, "m"), life)
			if err != nil {
				t.Fatal(err)
			}
			m.identity.Set(old)
			time.Sleep(61 * time.Second)
			if now := m.identity.Get(); now == old || !now.Holds(time.Now()) || now.Due(time.Now()) {
				t.Errorf("%s: it wasn't renewed", name)
			}
			admin, err := pki.Load(config.Credentials(m.cfg.Home, grid))
			if err != nil || admin.Due(time.Now()) {
				t.Errorf("%s: the admin's: %v", name, err)
			}
		}
	})
}

// An admin's identity that can't be left is left within a minute of when it can.
func TestAdminIsLeftAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, log := renewing(t, 24*time.Hour)
		dir := filepath.Join(m.cfg.Home, "credentials")
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir, nil, 0o600); err != nil { // in the folder's place
			t.Fatal(err)
		}
		time.Sleep(17 * time.Hour)
		if n := log.count("the admin's identity of this account isn't renewed"); n < 2 {
			t.Errorf("it says so %d times", n)
		}
		if err := os.Remove(dir); err != nil {
			t.Fatal(err)
		}
		time.Sleep(61 * time.Second)
		if _, err := pki.Load(config.Credentials(m.cfg.Home, grid)); err != nil {
			t.Error(err)
		}
	})
}

// From 90 days before its end on the master warns of the root's, once a day, and at the end it doesn't spin.
func TestTheRootEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, log := renewing(t, 24*time.Hour)
		const day = 24 * time.Hour
		left := func(d time.Duration) { // the authority's root is another, which ends then
			a := m.service.access
			if !a.current().Rotated().IsZero() {
				now, err := a.current().Retire(time.Now())
				if err != nil {
					t.Fatal(err)
				}
				a.replace(now)
			}
			next, err := a.current().Rotate(time.Now().Add(d - 3650*day))
			if err != nil {
				t.Fatal(err)
			}
			a.replace(next)
			if err := m.renewOwn(a); err != nil {
				t.Fatal(err)
			}
		}
		left(91 * day)
		time.Sleep(day - time.Minute)
		if n := log.count("the grid's root"); n != 0 {
			t.Errorf("%d warnings before it is time", n)
		}
		time.Sleep(5 * day)
		if n := log.count("move to another before: sutra ca rotate"); n < 5 || n > 6 {
			t.Errorf("%d warnings in 5 days", n)
		}
		left(time.Hour)
		time.Sleep(time.Hour)
		before := m.identity.Renewals()
		time.Sleep(time.Hour)
		if n := m.identity.Renewals() - before; n > 61 {
			t.Errorf("%d certificates in an hour after the root's end", n)
		}
		if n := log.count("nobody is let in any more"); n != 1 {
			t.Errorf("the end was told of %d times", n)
		}
	})
}
