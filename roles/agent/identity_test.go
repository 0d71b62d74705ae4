package agent

import (
	"context"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	"github.com/sutra-grid/sutra/rpc/pki"
)

// Whether a certificate is due is looked at every minute: the clock may be set, and the host may sleep.
func TestDueAfterTheClockWasSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		authority, err := pki.OpenAuthority(filepath.Join(t.TempDir(), "pki"), "d4k2v8grid")
		if err != nil {
			t.Fatal(err)
		}
		of := func(life time.Duration) *pki.Credentials {
			c, err := authority.Own(pki.AgentIdentity("d4k2v8grid", "agent-001"), life)
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		i := &identity{soon: make(chan struct{}, 1), log: zerolog.Nop(), file: filepath.Join(t.TempDir(), "identity.pem")}
		i.held.Set(of(24 * time.Hour))
		// within is what is due while something happens; nil: nothing is for that long.
		within := func(d time.Duration, happens func()) *pki.Credentials {
			ctx, stop := context.WithCancel(t.Context())
			due := make(chan *pki.Credentials, 1)
			go func() { due <- i.due(ctx) }()
			synctest.Wait()
			happens()
			time.Sleep(d)
			stop()
			return <-due
		}
		nothing := func() {}
		if within(time.Hour, nothing) != nil {
			t.Error("a good one is due")
		}
		// The clock of a bubble can't be set: the certificates are what they would be then.
		old := of(time.Hour)
		time.Sleep(50 * time.Minute)
		if within(time.Minute+time.Second, func() { i.held.Set(old) }) != old {
			t.Error("one that is due wasn't seen within a minute")
		}
		expired := of(-time.Hour)
		i.held.Set(of(24 * time.Hour))
		if within(2*time.Minute+time.Second, func() { i.held.Set(expired) }) != expired {
			t.Error("one that expired, and that nothing else has renewed, wasn't seen")
		}
		i.held.Set(of(24 * time.Hour))
		if within(soonWithin+time.Second, i.hurry) != i.held.Get() {
			t.Error("one that is wanted anew isn't due soon")
		}
		if within(saveAgain+time.Minute, func() { i.unsaved.Store(true) }) != nil {
			t.Error("what isn't saved is due")
		}
		if saved, err := pki.Load(i.file); err != nil || !saved.Expires.Equal(i.held.Get().Expires) || i.unsaved.Load() {
			t.Errorf("what wasn't saved isn't saved: %v", err)
		}
	})
}
