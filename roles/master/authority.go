package master

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// MaxCertificateLife bounds how long a stolen key is of use.
const MaxCertificateLife = 30 * 24 * time.Hour

// retiredAfter is how long after a rotation the older root is trusted where nobody retires it: by then no certificate of its is good for
// anything, not even for proving by its key who one is.
const retiredAfter = MaxCertificateLife + graceAfterExpiry

// current is the authority that certificates are given by now; nil in the clear.
func (a *access) current() *pki.Authority {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.authority
}

// replace has another authority be the current one.
func (a *access) replace(by *pki.Authority) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.authority = by
}

// shown notes which certificate an agent calls with, and tells whether that is to be renewed: because the grid moves away from its root,
// or has done so since, and its agent trusts that root still.
func (a *access) shown(agentID string, cert *x509.Certificate) (renew bool) {
	if cert == nil {
		return false
	}
	a.mu.RLock()
	authority, known := a.authority, a.certificates[agentID]
	a.mu.RUnlock()
	if known != cert { // another connection
		a.mu.Lock()
		a.certificates[agentID] = cert
		a.mu.Unlock()
	}
	return !authority.Issued(cert)
}

// certificate is what an agent called with last; nil where it hasn't since this master's start.
func (a *access) certificate(agentID string) *x509.Certificate {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.certificates[agentID]
}

// GetAuthority answers from memory.
func (s *service) GetAuthority(context.Context, *sutrav1.GetAuthorityRequest) (*sutrav1.GetAuthorityResponse, error) {
	return &sutrav1.GetAuthorityResponse{Authority: s.authority()}, nil
}

// RotateAuthority: write another root and issuer, then give this master, its admin and its host's agents what they have from it.
// All others follow when they renew what they have.
func (s *service) RotateAuthority(ctx context.Context, req *sutrav1.RotateAuthorityRequest) (*sutrav1.RotateAuthorityResponse, error) {
	s.access.changing.Lock()
	defer s.access.changing.Unlock()
	now := s.access.current()
	switch at := place(now, req.GetRoot()); {
	case at < 0:
		return nil, noRoot(req.GetRoot())
	case at == 0 && !now.Rotated().IsZero():
		return nil, rpc.Errorf(rpc.RotationUnderWay, "the grid has been moving to root %s since %s", brief(req.GetRoot()), now.Rotated().UTC().Format(time.RFC3339)).
			WithHint("end that move first: sutra ca retire")
	case at == 0:
		next, err := now.Rotate(time.Now())
		if err != nil {
			return nil, rpc.Errorf(rpc.Internal, "the grid has the root that it had: %v", err).WithHint("mend that on the master's host, and repeat it")
		}
		s.access.replace(next)
		s.log.Warn().Str("root", name(next.Roots()[0])).Str("before", req.GetRoot()).Msg("the grid moves to another root; both are trusted")
	}
	if err := s.follow(ctx); err != nil { // also where the first try came to here
		return nil, rpc.Errorf(rpc.Internal, "the grid moves to another root, and its master hasn't yet all that it has from it: %v", err).
			WithHint("mend that on the master's host; it goes on by itself within a minute")
	}
	return &sutrav1.RotateAuthorityResponse{Authority: s.authority()}, nil
}

// follow gives this master and its host what they have from another authority, whether or not the caller waits for it, and ends the
// connections that rest on none of its roots. Where that fails it is tried again every now and then (see renew). Needs changing.
func (s *service) follow(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
	defer cancel()
	s.access.behind.Store(true)
	err := s.anew(ctx, s.access)
	if err == nil {
		err = s.forgetTokens(ctx)
	}
	s.expel() // by the roots that this master shows by now
	s.access.behind.Store(err != nil)
	return err
}

// RetireAuthority: whoever has nothing by the newest root is cut off from here on.
func (s *service) RetireAuthority(ctx context.Context, req *sutrav1.RetireAuthorityRequest) (*sutrav1.RetireAuthorityResponse, error) {
	s.access.changing.Lock()
	defer s.access.changing.Unlock()
	now := s.access.current()
	switch at := place(now, req.GetRoot()); {
	case at == 0:
		return nil, rpc.Errorf(rpc.NoRotation, "%s is the grid's newest root", brief(req.GetRoot())).WithHint("begin to move to another one: sutra ca rotate")
	case at < 0 && !isHash(req.GetRoot()):
		return nil, noRoot(req.GetRoot())
	case at > 0:
		if cert := rpc.CertificateOf(ctx); cert != nil && !now.Issued(cert) {
			return nil, rpc.Errorf(rpc.AgentsLeft, "the certificate of %s, who asks for it, is by the root that is to be retired, too", caller(ctx)).
				WithHint("see why this account's identity isn't renewed: its file under credentials/ must be this account's to write")
		}
		if left := s.authority().GetAgentsLeft(); len(left) > 0 && !req.GetForce() {
			return nil, rpc.Errorf(rpc.AgentsLeft, "these would be cut off, whose certificates are by the root that is to be retired: %s", few(left)).
				WithHint("wait until they have moved, which takes those that are there half a minute; or cut them off, to join anew with a token: sutra ca retire --apply --force")
		}
		if err := s.retire(ctx, now); err != nil {
			return nil, err
		}
	}
	return &sutrav1.RetireAuthorityResponse{Authority: s.authority()}, nil
}

// retire ends the trust in the older root, and the connections that rest on it.
func (s *service) retire(ctx context.Context, now *pki.Authority) error {
	err := s.store.SaveRoot(name(now.Roots()[0])) // else the next start could take what is left for another authority
	var next *pki.Authority
	if err == nil {
		next, err = now.Retire(time.Now())
	}
	if err != nil {
		return rpc.Errorf(rpc.Internal, "the older root is trusted as before: %v", err).WithHint("mend that on the master's host, and repeat it")
	}
	s.access.replace(next)
	s.log.Warn().Str("root", name(now.Roots()[1])).Msg("the grid has moved to another root; the one before is trusted no more")
	if err := s.follow(ctx); err != nil {
		return rpc.Errorf(rpc.Internal, "the older root is trusted no more, and the master hasn't yet all that it has from the newest: %v", err).
			WithHint("mend that on the master's host; it goes on by itself within a minute")
	}
	return nil
}

// forgetTokens forgets the tokens that name a root which isn't trusted: nobody can join with them any more.
func (s *service) forgetTokens(ctx context.Context) error {
	all, err := s.store.Tokens(ctx)
	for _, t := range all {
		if err == nil && t.GetRoot() != "" && place(s.access.current(), t.GetRoot()) < 0 {
			_, err = s.store.DeleteToken(ctx, t.GetTokenId())
		}
	}
	return err
}

// retireInTime retires the older root when its time is over.
func (s *service) retireInTime(ctx context.Context) error {
	s.access.changing.Lock()
	defer s.access.changing.Unlock()
	now := s.access.current()
	if now == nil || now.Rotated().IsZero() || time.Since(now.Rotated()) < retiredAfter {
		return nil
	}
	return s.retire(ctx, now)
}

// authority is what is told of the current one.
func (s *service) authority() *sutrav1.Authority {
	now := s.access.current()
	m := &sutrav1.Authority{}
	for _, root := range now.Roots() {
		m.Roots = append(m.Roots, &sutrav1.Root{Root: name(root), BeginsAt: timestamppb.New(root.NotBefore), ExpiresAt: timestamppb.New(root.NotAfter)})
	}
	since := now.Rotated()
	if since.IsZero() {
		return m
	}
	m.RotatedAt, m.RetiresAt = timestamppb.New(since), timestamppb.New(since.Add(retiredAfter))
	for _, a := range s.registry.Agents(time.Now()) {
		if s.access.banned(pki.AgentIdentity(s.access.grid, a.GetAgentId())) != nil {
			continue // it is kept out anyway
		}
		if cert := s.access.certificate(a.GetAgentId()); cert != nil && now.Issued(cert) {
			m.AgentsMoved = append(m.AgentsMoved, a.GetAgentId())
		} else {
			m.AgentsLeft = append(m.AgentsLeft, a.GetAgentId())
		}
	}
	return m
}

// name is what a root is called.
func name(root *x509.Certificate) string {
	hash := sha256.Sum256(root.Raw)
	return hex.EncodeToString(hash[:])
}

// place is where among an authority's roots one of that name is; -1: nowhere.
func place(a *pki.Authority, root string) int {
	for i, r := range a.Roots() {
		if strings.EqualFold(name(r), root) {
			return i
		}
	}
	return -1
}

func isHash(root string) bool {
	hash, err := hex.DecodeString(root)
	return err == nil && len(hash) == sha256.Size
}

func noRoot(root string) error {
	return rpc.Invalid(rpc.Violation{Field: "root", Description: fmt.Sprintf("%.80q is no root of this grid", root)})
}

// brief is as much of a root's name as people need.
func brief(root string) string { return root[:min(len(root), 16)] }

// few names some of many.
func few(names []string) string {
	const shown = 5
	if len(names) <= shown {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:shown], ", "), len(names)-shown)
}
