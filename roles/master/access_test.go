package master

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/registry"
	"github.com/sutra-grid/sutra/roles/master/store"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

func TestSameHost(t *testing.T) {
	tcp := func(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 7000} }
	for _, c := range []struct {
		from, to net.Addr
		want     bool
	}{
		{tcp("127.0.0.1"), tcp("127.0.0.1"), true},
		{tcp("127.0.0.2"), tcp("127.0.0.1"), true},
		{tcp("::1"), tcp("::1"), true},
		{tcp("10.0.0.5"), tcp("10.0.0.5"), true},
		{tcp("10.0.0.5"), tcp("::ffff:10.0.0.5"), true},
		{tcp("10.0.0.6"), tcp("10.0.0.5"), false},
		{tcp("10.0.0.6"), tcp("127.0.0.1"), false},
		{tcp("10.0.0.6"), nil, false},
		{nil, nil, false},
	} {
		if got := sameHost(peer.NewContext(t.Context(), &peer.Peer{Addr: c.from, LocalAddr: c.to})); got != c.want {
			t.Errorf("from %v to %v: %t", c.from, c.to, got)
		}
	}
	if sameHost(t.Context()) {
		t.Error("a call from nowhere is from this host")
	}
}

func TestMastersAdmins(t *testing.T) {
	for name, want := range map[string]bool{
		"admin": true, "admin-2": true, "admin-10": true, "admin-": false, "admin-b": false, "admins": false, "Admin": false, "x-admin": false, "": false,
	} {
		if got := isHostAdminName(name); got != want {
			t.Errorf("%q: %t", name, got)
		}
	}
}

// What a token gives to whom, as far as it takes no grid that runs.
func TestRedeem(t *testing.T) {
	const grid = "d4k2v8grid"
	now := time.Date(2026, 5, 4, 12, 0, 0, 500, time.UTC)
	s := &service{access: &access{grid: grid, life: time.Hour, bans: nil}, registry: registry.New(health.DefaultThresholds(), func(*sutrav1.Event) {})}
	token, err := pki.NewToken([sha256.Size]byte{})
	if err != nil {
		t.Fatal(err)
	}
	key := []byte("a key")
	keyAlone := sha256.Sum256(key)
	mine, others := holderOf(key, "a1"), holderOf([]byte("another"), "a1")
	const agent = sutrav1.Role_ROLE_AGENT
	record := func(edit func(*sutrav1.TokenRecord)) *sutrav1.TokenRecord {
		rec := &sutrav1.TokenRecord{TokenId: token.ID, SecretSha256: token.SecretHash(), Role: agent, UsesLeft: 1, ExpiresAt: timestamppb.New(now.Add(time.Hour))}
		edit(rec)
		return rec
	}
	held := func(token string, by []byte, local bool) *sutrav1.IdentityRecord {
		return &sutrav1.IdentityRecord{Kind: "agent", Name: "a1", Role: agent, TokenId: token, Holder: by, Local: local, GivenAt: timestamppb.New(now.Add(-time.Hour))}
	}
	for name, c := range map[string]struct {
		token *sutrav1.TokenRecord
		known *sutrav1.IdentityRecord
		far   bool
		want  rpc.Reason
		left  uint32
		since bool // the holder from before is out
	}{
		"free":           {token: record(func(*sutrav1.TokenRecord) {})},
		"held":           {token: record(func(*sutrav1.TokenRecord) {}), known: held("t0", others, false), want: rpc.AgentIDTaken, left: 1},
		"made for it":    {token: record(func(r *sutrav1.TokenRecord) { r.AgentId = "a1" }), known: held("t0", others, false), since: true},
		"for another":    {token: record(func(r *sutrav1.TokenRecord) { r.AgentId = "a2" }), want: rpc.TokenRefused, left: 1},
		"used up":        {token: record(func(r *sutrav1.TokenRecord) { r.UsesLeft = 0 }), want: rpc.TokenRefused},
		"again":          {token: record(func(r *sutrav1.TokenRecord) { r.UsesLeft, r.UsedBy = 0, [][]byte{mine} }), known: held(token.ID, mine, false)},
		"again, of two":  {token: record(func(r *sutrav1.TokenRecord) { r.UsedBy = [][]byte{mine} }), known: held(token.ID, mine, false), left: 1},
		"given to other": {token: record(func(r *sutrav1.TokenRecord) { r.UsesLeft, r.UsedBy = 0, [][]byte{mine} }), known: held("t2", others, false), want: rpc.TokenRefused},
		"given to other, by a token for it": {
			token: record(func(r *sutrav1.TokenRecord) { r.UsesLeft, r.UsedBy, r.AgentId = 0, [][]byte{mine}, "a1" }), known: held("t2", others, false), want: rpc.TokenRefused,
		},
		"used by the key, of another version's record":   {token: record(func(r *sutrav1.TokenRecord) { r.UsesLeft, r.UsedBy = 0, [][]byte{keyAlone[:]} }), want: rpc.TokenRefused},
		"used by the key, of such a record, and another": {token: record(func(r *sutrav1.TokenRecord) { r.UsedBy = [][]byte{keyAlone[:]} })},
		"expired":                                {token: record(func(r *sutrav1.TokenRecord) { r.ExpiresAt = timestamppb.New(now.Add(-1)) }), want: rpc.TokenRefused, left: 1},
		"a person's":                             {token: record(func(r *sutrav1.TokenRecord) { r.Role = sutrav1.Role_ROLE_VIEWER }), want: rpc.TokenRefused, left: 1},
		"the host's":                             {token: record(func(r *sutrav1.TokenRecord) { r.Local, r.UsesLeft = true, 0 })},
		"the host's, from another":               {token: record(func(r *sutrav1.TokenRecord) { r.Local = true }), far: true, want: rpc.TokenRefused, left: 1},
		"the host's, for its own once more":      {token: record(func(r *sutrav1.TokenRecord) { r.Local, r.UsesLeft = true, 0 }), known: held("t0", others, true), since: true},
		"the host's, for another host's agent":   {token: record(func(r *sutrav1.TokenRecord) { r.Local, r.UsesLeft = true, 0 }), known: held("t0", others, false), want: rpc.AgentIDTaken},
		"its own, with a token from elsewhere":   {token: record(func(*sutrav1.TokenRecord) {}), known: held("t0", others, true), want: rpc.AgentIDTaken, left: 1},
		"from before there were such records":    {token: record(func(r *sutrav1.TokenRecord) { r.AgentId = "a1" }), known: &sutrav1.IdentityRecord{Kind: "agent", Name: "a1", Role: agent}, since: true},
		"held from before there were records of": {token: record(func(*sutrav1.TokenRecord) {}), known: &sutrav1.IdentityRecord{Kind: "agent", Name: "a1", Role: agent}, want: rpc.AgentIDTaken, left: 1},
	} {
		before := len(c.token.GetUsedBy())
		got, err := s.redeem(c.token, token.Secret[:], c.known, pki.AgentIdentity(grid, "a1"), mine, !c.far, now)
		if rpc.ReasonOf(err) != c.want || c.token.GetUsesLeft() != c.left {
			t.Errorf("%s: %v, want %q; %d uses are left, want %d", name, err, c.want, c.token.GetUsesLeft(), c.left)
		}
		if used := len(c.token.GetUsedBy()) > before; used != (c.token.GetLastUsedAt() != nil) || used && c.token.GetLastUsedAt().AsTime() != now {
			t.Errorf("%s: it was used: %t; last at %v", name, used, c.token.GetLastUsedAt())
		}
		if err != nil {
			if rpc.AsError(err).Hint == "" {
				t.Errorf("%s: %v doesn't say what to do", name, err)
			}
			continue
		}
		if got.GetKind() != "agent" || got.GetName() != "a1" || got.GetTokenId() != token.ID || !bytes.Equal(got.GetHolder(), mine) || got.GetLocal() != c.token.GetLocal() || got.GetExpiresAt() == nil {
			t.Errorf("%s: its record is %v", name, got)
		}
		if since := got.GetCertificatesSince(); (since != nil) != c.since || c.since && since.AsTime() != now.Truncate(time.Second).Add(time.Second) {
			t.Errorf("%s: certificates of before %v aren't renewed", name, since)
		}
		if _, err := s.redeem(c.token, make([]byte, len(token.Secret)), c.known, pki.AgentIdentity(grid, "a1"), mine, true, now); rpc.ReasonOf(err) != rpc.TokenRefused {
			t.Errorf("%s, with another secret: %v", name, err)
		}
	}
}

// What was given before there were records of it isn't renewed either once it is another's.
func TestRedeemWhatOnlyTheGridKnows(t *testing.T) {
	s := &service{access: &access{life: time.Hour}, registry: registry.New(health.DefaultThresholds(), nil)}
	s.registry.Load([]*sutrav1.Agent{{AgentId: "old"}}, nil, nil, time.Now())
	token, err := pki.NewToken([sha256.Size]byte{})
	if err != nil {
		t.Fatal(err)
	}
	for name, since := range map[string]bool{"old": true, "new": false} {
		made := &sutrav1.TokenRecord{TokenId: token.ID, SecretSha256: token.SecretHash(), Role: sutrav1.Role_ROLE_AGENT, UsesLeft: 1, AgentId: name}
		got, err := s.redeem(made, token.Secret[:], nil, pki.AgentIdentity("d4k2v8grid", name), nil, false, time.Now())
		if err != nil || (got.GetCertificatesSince() != nil) != since {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// Who was an agent before another was given its identity isn't renewed, unless the master's clock was set back since: then nobody can
// tell them apart.
func TestHolds(t *testing.T) {
	st, err := store.Open(t.Context(), store.Config{Dir: filepath.Join(t.TempDir(), "master"), Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	s := &service{store: st, access: &access{life: time.Hour}}
	id := pki.AgentIdentity("d4k2v8grid", "a1")
	given := time.Date(2026, 5, 4, 12, 0, 0, 500, time.UTC)
	record := func(edit func(*sutrav1.IdentityRecord)) *sutrav1.IdentityRecord {
		t.Helper()
		var is *sutrav1.IdentityRecord
		if err := st.ChangeIdentity(t.Context(), "agent", "a1", func(known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error) {
			if known == nil {
				known = &sutrav1.IdentityRecord{Kind: "agent", Name: "a1", GivenAt: timestamppb.New(given), CertificatesSince: timestamppb.New(given.Truncate(time.Second).Add(time.Second))}
			}
			edit(known)
			is = known
			return known, nil
		}); err != nil {
			t.Fatal(err)
		}
		return is
	}
	record(func(*sutrav1.IdentityRecord) {})
	made := func(at time.Time) *x509.Certificate {
		return &x509.Certificate{NotBefore: at.Truncate(time.Second).Add(-5 * time.Minute)}
	}
	old, own := made(given), made(given.Add(time.Second))
	for _, c := range []struct {
		cert *x509.Certificate
		at   time.Time
		want rpc.Reason
		ends time.Time
	}{
		{old, given.Add(time.Hour), rpc.AgentIDTaken, time.Time{}},
		{own, given.Add(time.Hour), "", given.Add(2 * time.Hour)},
		{own, given.Add(24 * time.Hour), "", given.Add(2 * time.Hour)}, // not each is written down
		{own, given.Add(26 * time.Hour), "", given.Add(27 * time.Hour)},
		{old, given.Add(26 * time.Hour), rpc.AgentIDTaken, given.Add(27 * time.Hour)},
		{made(given.Add(-time.Hour)), given.Add(-time.Minute), "", given.Add(27 * time.Hour)},
		{made(given.Add(-time.Minute)), given.Add(time.Minute), "", given.Add(27 * time.Hour)},
	} {
		err := s.holds(t.Context(), id, c.cert, c.at)
		if rpc.ReasonOf(err) != c.want {
			t.Errorf("at %s: %v, want %q", c.at, err, c.want)
		}
		if is := record(func(*sutrav1.IdentityRecord) {}).GetExpiresAt(); (is == nil) != c.ends.IsZero() || is != nil && is.AsTime() != c.ends {
			t.Errorf("at %s its last certificate is noted to end at %v, want %s", c.at, is.AsTime(), c.ends)
		}
	}
}

// A master forgets tokens that are over by a day, and identities that are by a month.
func TestOldTokensAreForgotten(t *testing.T) {
	home := t.TempDir()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	dir := filepath.Join(home, "master")
	st, err := store.Open(ctx, store.Config{Dir: dir, Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	ago := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(time.Now().Add(-d)) }
	const day = 24 * time.Hour
	for _, rec := range []*sutrav1.TokenRecord{
		{TokenId: "expired-25h", UsesLeft: 1, ExpiresAt: ago(25 * time.Hour)},
		{TokenId: "expired-23h", UsesLeft: 1, ExpiresAt: ago(23 * time.Hour)},
		{TokenId: "used-up-25h", ExpiresAt: ago(-day), LastUsedAt: ago(25 * time.Hour)},
		{TokenId: "used-up-23h", ExpiresAt: ago(-day), LastUsedAt: ago(23 * time.Hour)},
	} {
		if err := st.SaveToken(ctx, rec); err != nil {
			t.Fatal(err)
		}
	}
	for name, end := range map[string]*timestamppb.Timestamp{"past": ago(31*day + time.Hour), "grace": ago(31*day - time.Hour)} {
		if err := st.ChangeIdentity(ctx, "user", name, func(*sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error) {
			return &sutrav1.IdentityRecord{Kind: "user", Name: name, ExpiresAt: end}, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m, err := New(ctx, Config{Home: home, Listener: listener, Thresholds: health.DefaultThresholds(), CertificateLife: time.Hour, Log: zerolog.Nop()})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- m.Run(ctx) }()
	for wait := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		resp, err := m.service.ListTokens(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		var left []string
		for _, token := range resp.GetTokens() {
			if !token.GetLocal() {
				left = append(left, token.GetTokenId())
			}
		}
		known := map[string]bool{}
		for _, name := range []string{"past", "grace"} {
			if err := m.store.ChangeIdentity(ctx, "user", name, func(rec *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error) {
				known[name] = rec != nil
				return rec, nil
			}); err != nil {
				t.Fatal(err)
			}
		}
		if len(left) == 2 && left[0] == "expired-23h" && left[1] == "used-up-23h" && !known["past"] && known["grace"] {
			break
		}
		if time.Now().After(wait) {
			t.Fatalf("left are the tokens %q and the identities %v", left, known)
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
