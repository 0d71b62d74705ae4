package master

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/store"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

const (
	// tokenLife is how long a token lasts that was asked for without a time; maxTokenLife bounds one with a time.
	tokenLife    = 24 * time.Hour
	maxTokenLife = 365 * 24 * time.Hour
	maxTokenUses = 10000
	// graceAfterExpiry is how long after its certificate's end an identity may prove by its old key who it is.
	graceAfterExpiry = 30 * 24 * time.Hour
)

// access is what a master knows of who may come in.
type access struct {
	grid string
	// life is how long the certificates last that it gives.
	life time.Duration
	// changing is held by whoever replaces the authority, also while its files are written: nobody else waits for it.
	changing sync.Mutex
	// behind: this master, or its host, hasn't got yet what it has from the present authority.
	behind atomic.Bool

	mu        sync.RWMutex // guards what follows
	bans      map[whom]*sutrav1.BanRecord
	authority *pki.Authority // nil: in the clear
	// certificates are those that agents called with last, since this master's start.
	certificates map[string]*x509.Certificate
}

// certify gives an identity a certificate for a key.
func (a *access) certify(request []byte, id pki.Identity) (*sutrav1.Certificates, error) {
	authority := a.current()
	chain, err := authority.Issue(request, id, a.life)
	if err != nil {
		return nil, rpc.Invalid(rpc.Violation{Field: "certificate_request", Description: err.Error()})
	}
	answer := &sutrav1.Certificates{}
	for _, c := range chain {
		answer.Chain = append(answer.Chain, c.Raw)
	}
	for _, c := range authority.Roots() {
		answer.Roots = append(answer.Roots, c.Raw)
	}
	return answer, nil
}

// Enroll: verify the token, use it up, give the identity that it stands for.
func (s *service) Enroll(ctx context.Context, req *sutrav1.EnrollRequest) (*sutrav1.EnrollResponse, error) {
	var bad checks
	bad.id("name", req.GetName())
	key, err := pki.RequestKey(req.GetCertificateRequest())
	if err != nil {
		bad.add("certificate_request", "%v", err)
	}
	if err := bad.err(); err != nil {
		return nil, err
	}
	public, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode the caller's key: %w", err)
	}
	id := pki.UserIdentity(s.access.grid, req.GetName(), sutrav1.Role_ROLE_UNSPECIFIED) // the token says which
	if req.GetRole() == sutrav1.Role_ROLE_AGENT {
		id = pki.AgentIdentity(s.access.grid, req.GetName())
	}
	holder, own := holderOf(public, req.GetName()), sameHost(ctx)
	var given *sutrav1.IdentityRecord
	err = s.store.Join(ctx, req.GetTokenId(), string(id.Kind), id.Name,
		func(t *sutrav1.TokenRecord, known *sutrav1.IdentityRecord) (_ *sutrav1.IdentityRecord, err error) {
			if id.Kind == pki.User {
				id.Role = t.GetRole()
			}
			given, err = s.redeem(t, req.GetTokenSecret(), known, id, holder, own, time.Now())
			return given, err
		})
	switch {
	case errors.Is(err, store.ErrNoToken):
		return nil, tokenRefused(req.GetTokenId(), "isn't known here: it was revoked, it ended or was used up more than a day ago, or it is of another grid")
	case err != nil && rpc.ReasonOf(err) != rpc.Internal:
		return nil, err // redeem's word
	case err != nil:
		return nil, persisted(err)
	}
	if err := settled(ctx, given); err != nil {
		return nil, err
	}
	certificates, err := s.access.certify(req.GetCertificateRequest(), id)
	if err != nil {
		return nil, err
	}
	s.log.Info().Stringer("identity", id).Str("role", pki.RoleWord(id.Role)).Str("token_id", req.GetTokenId()).Msg("joined the grid")
	return &sutrav1.EnrollResponse{Certificates: certificates, Role: id.Role}, nil
}

// redeem decides whether a token gives an identity to the one who asks with it, takes a use from it, and returns the identity's record
// from then on. known is that from before; nil: it is nobody's. own: who asks is on this host.
func (s *service) redeem(t *sutrav1.TokenRecord, secret []byte, known *sutrav1.IdentityRecord, id pki.Identity, holder []byte, own bool, now time.Time) (*sutrav1.IdentityRecord, error) {
	var token pki.Token
	copy(token.Secret[:], secret)
	if len(secret) != len(token.Secret) || !token.Matches(t.GetSecretSha256()) {
		return nil, tokenRefused(t.GetTokenId(), "has another secret: it was mistyped or made up")
	}
	if why := s.access.maker(t); why != nil {
		return nil, tokenRefused(t.GetTokenId(), "was made by %s, who is banned %v", t.GetCreatedBy(), why)
	}
	// Who asks once more for what the token gave it has it, unless it was given to another since.
	has := known.GetTokenId() == t.GetTokenId() && bytes.Equal(known.GetHolder(), holder)
	again := (has || known == nil) && slices.ContainsFunc(t.GetUsedBy(), func(by []byte) bool { return bytes.Equal(by, holder) })
	switch {
	case t.GetExpiresAt() != nil && now.After(t.GetExpiresAt().AsTime()):
		return nil, tokenRefused(t.GetTokenId(), "expired at %s", t.GetExpiresAt().AsTime().UTC().Format(time.RFC3339))
	case t.GetLocal() && !own:
		return nil, tokenRefused(t.GetTokenId(), "is for agents of the master's own host, and this one isn't there")
	case !t.GetLocal() && t.GetUsesLeft() == 0 && !again:
		return nil, tokenRefused(t.GetTokenId(), "was used up")
	case (t.GetRole() == sutrav1.Role_ROLE_AGENT) != (id.Kind == pki.Agent):
		return nil, tokenRefused(t.GetTokenId(), "is for the role %s", pki.RoleWord(t.GetRole()))
	case t.GetAgentId() != "" && t.GetAgentId() != id.Name:
		return nil, tokenRefused(t.GetTokenId(), "is for agent %s alone, and this is %s", t.GetAgentId(), id.Name).
			WithHint("join with a token for it, or for any: sutra token create")
	case t.GetName() != "" && t.GetName() != id.Name:
		return nil, tokenRefused(t.GetTokenId(), "is for user %s alone, and this is %s", t.GetName(), id.Name).
			WithHint("if you are that: sutra login --name %s", t.GetName())
	case id.Kind == pki.User && isHostAdminName(id.Name):
		return nil, rpc.Errorf(rpc.NameTaken, "the name %s is that of the admin on the master's own host", id.Name).WithHint("choose another name: sutra login --name NAME")
	}
	if why := s.access.banned(id); why != nil {
		return nil, rpc.IsBanned(id, why)
	}
	if alone := t.GetAgentId() != "" || t.GetName() != ""; !has && !alone {
		// Whoever has a token for anybody must not become one that is there already.
		if err := s.free(t, known, id, now); err != nil {
			return nil, err
		}
	}
	if !again && !t.GetLocal() {
		t.UsesLeft--
		t.UsedBy, t.LastUsedAt = append(t.UsedBy, holder), timestamppb.New(now)
	}
	if !has {
		return s.give(t, known, id, holder, now), nil
	}
	s.note(known, now)
	return known, nil
}

func tokenRefused(id, format string, args ...any) *rpc.Error {
	return rpc.Errorf(rpc.TokenRefused, "token %.32q "+format, append([]any{id}, args...)...).
		WithHint("have an admin make another: sutra token create")
}

// Renew: find out who asks, by the connection or by an expired certificate with its key, and give that identity again.
func (s *service) Renew(ctx context.Context, req *sutrav1.RenewRequest) (*sutrav1.RenewResponse, error) {
	key, err := pki.RequestKey(req.GetCertificateRequest())
	if err != nil {
		return nil, rpc.Invalid(rpc.Violation{Field: "certificate_request", Description: err.Error()})
	}
	id, cert := rpc.CallerOf(ctx), rpc.CertificateOf(ctx)
	if id == (pki.Identity{}) {
		chain, err := pki.ParseCertificates(req.GetExpiredChain())
		if err == nil {
			id, err = pki.VerifyExpired(chain, s.access.current().Roots(), s.access.grid, key, time.Now(), graceAfterExpiry)
		}
		if err != nil {
			return nil, rpc.Errorf(rpc.Unauthenticated, "who asks to be renewed isn't known: %v", err).
				WithHint("join anew with a token for the same agent, or the same person, on the master's host: sutra token create --agent-id ID, or --name NAME")
		}
		cert = chain[0]
	}
	if id.Kind != pki.Agent && id.Kind != pki.User {
		return nil, rpc.Errorf(rpc.PermissionDenied, "%s isn't renewed: a master makes its own certificates", id).
			WithHint("where one has expired, start that master again")
	}
	if why := s.access.banned(id); why != nil {
		return nil, rpc.IsBanned(id, why)
	}
	certificates, err := s.access.certify(req.GetCertificateRequest(), id)
	if err != nil {
		return nil, err
	}
	// After the certificate was made: so that none is left with one from after another has become its holder.
	if err := s.holds(ctx, id, cert, time.Now()); err != nil {
		return nil, err
	}
	return &sutrav1.RenewResponse{Certificates: certificates, Name: id.Name, Role: id.Role}, nil
}

// CreateToken: draw a secret, keep its hash.
func (s *service) CreateToken(ctx context.Context, req *sutrav1.CreateTokenRequest) (*sutrav1.CreateTokenResponse, error) {
	role, life, uses := req.GetRole(), tokenLife, req.GetUses()
	if role == sutrav1.Role_ROLE_UNSPECIFIED {
		role = sutrav1.Role_ROLE_AGENT
	}
	if req.GetTtl() != nil {
		life = req.GetTtl().AsDuration()
	}
	uses = max(uses, 1)
	var bad checks
	switch role {
	case sutrav1.Role_ROLE_AGENT, sutrav1.Role_ROLE_VIEWER, sutrav1.Role_ROLE_OPERATOR, sutrav1.Role_ROLE_ADMIN:
	default:
		bad.add("role", "there is no joining as %s: agent, viewer, operator or admin is meant", pki.RoleWord(role))
	}
	if life < time.Second || life > maxTokenLife {
		bad.add("ttl", "%s isn't between 1s and %s", life, maxTokenLife)
	}
	if uses > maxTokenUses {
		bad.add("uses", "%d is more than %d", uses, maxTokenUses)
	}
	if req.GetAgentId() != "" {
		bad.id("agent_id", req.GetAgentId())
		if role != sutrav1.Role_ROLE_AGENT {
			bad.add("agent_id", "is for tokens of the role agent")
		}
	}
	if req.GetName() != "" {
		bad.id("name", req.GetName())
		switch {
		case role == sutrav1.Role_ROLE_AGENT:
			bad.add("name", "is for tokens of people: with the role viewer, operator or admin")
		case isHostAdminName(req.GetName()):
			bad.add("name", "%s is the admin on the master's own host", req.GetName())
		}
	}
	if err := bad.err(); err != nil {
		return nil, err
	}
	now := time.Now()
	authority := s.access.current()
	token, err := pki.NewToken(authority.Hash())
	if err != nil {
		return nil, err
	}
	rec := &sutrav1.TokenRecord{
		TokenId: token.ID, SecretSha256: token.SecretHash(), Role: role, AgentId: req.GetAgentId(), Name: req.GetName(), UsesLeft: uses,
		CreatedAt: timestamppb.New(now), ExpiresAt: timestamppb.New(now.Add(life)), CreatedBy: caller(ctx),
		Root: name(authority.Roots()[0]),
	}
	if err := s.store.SaveToken(ctx, rec); err != nil {
		return nil, persisted(err)
	}
	return &sutrav1.CreateTokenResponse{Token: tokenMessage(rec), Secret: token.Encode()}, nil
}

// caller is who makes a call, for records.
func caller(ctx context.Context) string { return rpc.CallerOf(ctx).String() }

func tokenMessage(t *sutrav1.TokenRecord) *sutrav1.JoinToken {
	return &sutrav1.JoinToken{
		TokenId: t.GetTokenId(), Role: t.GetRole(), AgentId: t.GetAgentId(), UsesLeft: t.GetUsesLeft(), CreatedAt: t.GetCreatedAt(),
		ExpiresAt: t.GetExpiresAt(), CreatedBy: t.GetCreatedBy(), Name: t.GetName(), Local: t.GetLocal(),
	}
}

// ListTokens reads them from the store.
func (s *service) ListTokens(ctx context.Context, _ *sutrav1.ListTokensRequest) (*sutrav1.ListTokensResponse, error) {
	all, err := s.store.Tokens(ctx)
	if err != nil {
		return nil, persisted(err)
	}
	resp := &sutrav1.ListTokensResponse{}
	for _, t := range all {
		resp.Tokens = append(resp.Tokens, tokenMessage(t))
	}
	return resp, nil
}

// RevokeToken forgets it. The host's own is made anew at the next start.
func (s *service) RevokeToken(ctx context.Context, req *sutrav1.RevokeTokenRequest) (*sutrav1.RevokeTokenResponse, error) {
	var bad checks
	bad.id("token_id", req.GetTokenId())
	if err := bad.err(); err != nil {
		return nil, err
	}
	there, err := s.store.DeleteToken(ctx, req.GetTokenId())
	switch {
	case err != nil:
		return nil, persisted(err)
	case !there:
		return nil, rpc.Errorf(rpc.TokenNotFound, "there is no token %s", req.GetTokenId()).WithHint("see which there are: sutra token list")
	}
	return &sutrav1.RevokeTokenResponse{}, nil
}
