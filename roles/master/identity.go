package master

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// secure opens the grid's authority and gives this master its identity, and leaves on this host what its agents and its
// people need: an admin's identity and a token. In the clear it does nothing of that: what the authority vouches for would be good
// for long after.
func (m *Master) secure(ctx context.Context, bans []*sutrav1.BanRecord) (*access, error) {
	a := &access{grid: m.store.GridID(), life: m.cfg.CertificateLife, bans: map[whom]*sutrav1.BanRecord{}, certificates: map[string]*x509.Certificate{}}
	for _, b := range bans {
		a.bans[whomOf(b)] = b
	}
	if m.cfg.Insecure != rpc.Secure {
		m.cfg.Log.Warn().Msg("--insecure: everything is sent in the clear, and whoever reaches this port runs the grid")
		return a, nil
	}
	var err error
	if a.authority, err = m.openAuthority(a.grid); err != nil {
		return nil, fmt.Errorf("open the grid's authority: %w", err)
	}
	m.identity = &pki.Holder{}
	rpc.ExportCredentials(m.metrics, m.identity)
	return a, m.anew(ctx, a)
}

// openAuthority opens the grid's authority, and makes one where the grid never had any: one that was lost mustn't be replaced
// unseen, because that shuts out all who have an identity.
func (m *Master) openAuthority(grid string) (*pki.Authority, error) {
	dir := filepath.Join(m.cfg.Home, "master", "pki")
	known, err := m.store.Root()
	if err != nil {
		return nil, err
	}
	if known == "" {
		a, err := pki.OpenAuthority(dir, grid)
		if err != nil {
			return nil, err
		}
		return a, m.store.SaveRoot(name(a.Roots()[0]))
	}
	const way = "put the folder %s back from a backup; or give that root up, which takes all other hosts and people to join anew: move that folder away, " +
		"remove %s, and start again"
	a, err := pki.ReadAuthority(dir, grid)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w; by that root, %s, all certificates of this grid were given: "+way, err, brief(known), dir, m.store.RootFile())
	case err != nil:
		return nil, err
	case place(a, known) < 0:
		return nil, fmt.Errorf("the root in %s is %s, and the certificates of this grid were given by root %s: "+way, dir, brief(name(a.Roots()[0])), brief(known), dir, m.store.RootFile())
	}
	return a, nil // where a rotation was broken off, it is the one before: anew writes the newest
}

// anew gives this master and this host what they have from the authority: after a start, and when the authority is another.
func (m *Master) anew(ctx context.Context, a *access) error {
	if m.identity == nil {
		return nil
	}
	if err := m.store.SaveRoot(name(a.current().Roots()[0])); err != nil {
		return err
	}
	if err := m.renewOwn(a); err != nil {
		return err
	}
	if err := m.leaveAdmin(a); err != nil {
		return fmt.Errorf("leave an admin's identity for this account: %w", err)
	}
	if err := m.leaveToken(ctx, a); err != nil {
		return fmt.Errorf("leave a token for this host's agents: %w", err)
	}
	return nil
}

// hostAdmin is the name of the admin that a master leaves for its own account. Where that is banned, because its key was
// stolen for example, it is the first of admin-2, admin-3 and so on that isn't.
const hostAdmin = "admin"

func (a *access) hostAdmin() pki.Identity {
	id := pki.UserIdentity(a.grid, hostAdmin, sutrav1.Role_ROLE_ADMIN)
	for i := 2; a.banned(id) != nil; i++ {
		id.Name = fmt.Sprintf("%s-%d", hostAdmin, i)
	}
	return id
}

// isHostAdmin tells whether an identity is one of those that a master leaves.
func isHostAdmin(id pki.Identity) bool {
	return id.Role == sutrav1.Role_ROLE_ADMIN && isHostAdminName(id.Name)
}

// isHostAdminName tells whether a person's name is one of theirs, which nobody else is given.
func isHostAdminName(name string) bool {
	number, more := strings.CutPrefix(name, hostAdmin+"-")
	_, err := strconv.Atoi(number)
	return name == hostAdmin || more && err == nil
}

// leaveAdmin leaves an admin's identity for this account, unless somebody has joined with it as somebody else, whom the authority
// vouches for and who isn't banned: who can read the authority's keys can't be locked out, and needn't forge anything. In the clear it does nothing.
func (m *Master) leaveAdmin(a *access) error {
	if m.identity == nil {
		return nil
	}
	path := config.Credentials(m.cfg.Home, a.grid)
	if there, err := pki.Load(path); err == nil && !isHostAdmin(there.Identity) && a.banned(there.Identity) == nil && a.knows(there) {
		return nil
	}
	for {
		id := a.hostAdmin()
		admin, err := a.current().Own(id, a.life)
		if err == nil {
			err = admin.Save(path)
		}
		if err != nil || a.banned(id) == nil { // it may have been banned meanwhile
			return err
		}
	}
}

// knows tells whether the authority vouches for credentials, or may renew them if they have expired.
func (a *access) knows(c *pki.Credentials) bool {
	chain, err := pki.ParseCertificates(c.Chain())
	if err == nil {
		_, err = pki.VerifyExpired(chain, a.current().Roots(), a.grid, &c.Key().PublicKey, time.Now(), graceAfterExpiry)
	}
	return err == nil
}

// masterName names this master in its certificate: its host, as far as names may have its letters.
func masterName() string {
	host, _ := os.Hostname() // without one it is "master"
	return config.NameOf(host, "master")
}

func (m *Master) renewOwn(a *access) error {
	own, err := a.current().Own(pki.MasterIdentity(a.grid, masterName()), a.life)
	if err != nil {
		return fmt.Errorf("give this master its identity: %w", err)
	}
	m.identity.Set(own)
	return nil
}

// renew replaces the master's own certificate and the admin's of this account in time, until ctx ends, and warns of the root's end.
func (m *Master) renew(ctx context.Context) error {
	if m.identity == nil {
		return nil
	}
	a := m.service.access
	tick := time.NewTicker(pki.LookEvery(a.life))
	defer tick.Stop()
	left, said := true, "" // anew has left it
	for {
		now := time.Now()
		if m.identity.Get().Due(now) {
			a.changing.Lock() // no other root comes in between
			err := m.renewOwn(a)
			a.changing.Unlock()
			if err != nil {
				return err
			}
			left = false
		}
		if a.behind.Load() { // or somebody is at it
			a.changing.Lock()
			var err error
			if a.behind.Load() {
				err = m.service.follow(ctx)
			}
			a.changing.Unlock()
			if err != nil {
				m.cfg.Log.Warn().Err(err).Msg("this master and its host haven't all that they have from the authority; trying on")
			}
		}
		if !left {
			err := m.leaveAdmin(a)
			if left = err == nil; !left {
				m.cfg.Log.Warn().Err(err).Msg("the admin's identity of this account isn't renewed; trying on")
			}
		}
		if warning := rootWarning(a.current().Roots()[0], now); warning != said { // another one each day
			if said = warning; said != "" {
				m.cfg.Log.Warn().Msg(said)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// rootWarning says what is to be done about the end of the grid's root from 90 days before it on; empty until then.
func rootWarning(root *x509.Certificate, now time.Time) string {
	const day = 24 * time.Hour
	end := root.NotAfter.UTC().Format(time.RFC3339)
	switch left := root.NotAfter.Sub(now); {
	case left > 90*day:
		return ""
	case left > 0:
		return fmt.Sprintf("the grid's root ends at %s, in %d days, and all certificates with it; move to another before: sutra ca rotate", end, left/day)
	default:
		return fmt.Sprintf("the grid's root ended at %s, and all certificates with it: nobody is let in any more; if this host's clock is right, all have to join anew, "+
			"once this master was started without its folder master/pki and the file root.sha256 beside it", end)
	}
}

// leaveToken leaves a token for agents of this host under credentials/, unless the one that is there is still good. No other than
// the one in the file stays good.
func (m *Master) leaveToken(ctx context.Context, a *access) error {
	path := config.JoinToken(m.cfg.Home)
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	there, bad := pki.ParseToken(string(data))
	all, err := m.store.Tokens(ctx)
	if err != nil {
		return err
	}
	good, others := false, []string{}
	for _, t := range all {
		switch {
		case !t.GetLocal():
		case bad == nil && t.GetTokenId() == there.ID && there.Root == a.current().Hash() && there.Matches(t.GetSecretSha256()):
			good = true
		default:
			others = append(others, t.GetTokenId())
		}
	}
	if !good {
		if err := m.makeToken(ctx, a, path); err != nil {
			return err
		}
	}
	for _, id := range others {
		if _, err := m.store.DeleteToken(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// makeToken makes a token for agents of this host and leaves it in a file.
func (m *Master) makeToken(ctx context.Context, a *access, path string) error {
	authority := a.current()
	token, err := pki.NewToken(authority.Hash())
	if err != nil {
		return err
	}
	rec := &sutrav1.TokenRecord{
		TokenId: token.ID, SecretSha256: token.SecretHash(), Role: sutrav1.Role_ROLE_AGENT, Local: true, CreatedAt: timestamppb.Now(),
		CreatedBy: "master", Root: name(authority.Roots()[0]),
	}
	if err := m.store.SaveToken(ctx, rec); err != nil {
		return err
	}
	return config.WriteFile(path, []byte(token.Encode()+"\n")) // 0600
}
