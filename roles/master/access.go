package master

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
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

	mu        sync.RWMutex // guards what follows
	bans      map[string]*sutrav1.BanRecord
	authority *pki.Authority
	// moved are the agents that have shown a certificate of the newest root's since the grid began to move to it.
	moved map[string]bool
}

// banned says why an identity is kept out; nil where it isn't.
func (a *access) banned(id pki.Identity) error {
	if id.Kind != pki.Agent {
		return nil
	}
	a.mu.RLock()
	ban := a.bans[id.Name]
	a.mu.RUnlock()
	if ban == nil {
		return nil
	}
	why := "by " + ban.GetBannedBy() + " at " + ban.GetBannedAt().AsTime().UTC().Format(time.RFC3339)
	if ban.GetReason() != "" {
		why += ": " + ban.GetReason()
	}
	return errors.New(why)
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
	joiner := sha256.Sum256(public)
	var id pki.Identity
	err = s.store.ChangeToken(ctx, req.GetTokenId(), func(t *sutrav1.TokenRecord) (err error) {
		id, err = s.redeem(t, req, joiner[:], time.Now())
		return err
	})
	switch {
	case errors.Is(err, store.ErrNoToken):
		return nil, tokenRefused(req.GetTokenId(), "isn't known here: it was revoked, used up long ago, or is of another grid")
	case err != nil && rpc.ReasonOf(err) != rpc.Internal:
		return nil, err // redeem's word
	case err != nil:
		return nil, persisted(err)
	}
	certificates, err := s.access.certify(req.GetCertificateRequest(), id)
	if err != nil {
		return nil, err
	}
	s.log.Info().Stringer("identity", id).Str("role", pki.RoleWord(id.Role)).Str("token_id", req.GetTokenId()).Msg("joined the grid")
	return &sutrav1.EnrollResponse{Certificates: certificates}, nil
}

// redeem decides what a token gives to the one who asks with it, and takes a use from it.
func (s *service) redeem(t *sutrav1.TokenRecord, req *sutrav1.EnrollRequest, joiner []byte, now time.Time) (pki.Identity, error) {
	var token pki.Token
	copy(token.Secret[:], req.GetTokenSecret())
	if len(req.GetTokenSecret()) != len(token.Secret) || !token.Matches(t.GetSecretSha256()) {
		return pki.Identity{}, tokenRefused(t.GetTokenId(), "has another secret: it was mistyped or made up")
	}
	again := slices.ContainsFunc(t.GetUsedBy(), func(k []byte) bool { return slices.Equal(k, joiner) })
	switch {
	case t.GetExpiresAt() != nil && now.After(t.GetExpiresAt().AsTime()):
		return pki.Identity{}, tokenRefused(t.GetTokenId(), "expired at %s", t.GetExpiresAt().AsTime().UTC().Format(time.RFC3339))
	case !t.GetLocal() && t.GetUsesLeft() == 0 && !again:
		return pki.Identity{}, tokenRefused(t.GetTokenId(), "was used up")
	}
	id := pki.UserIdentity(s.access.grid, req.GetName(), t.GetRole())
	if t.GetRole() == sutrav1.Role_ROLE_AGENT {
		id = pki.AgentIdentity(s.access.grid, req.GetName())
	}
	asAgent := req.GetRole() == sutrav1.Role_ROLE_AGENT
	switch {
	case asAgent != (id.Kind == pki.Agent):
		return pki.Identity{}, tokenRefused(t.GetTokenId(), "is for the role %s", pki.RoleWord(t.GetRole()))
	case t.GetAgentId() != "" && t.GetAgentId() != id.Name:
		return pki.Identity{}, tokenRefused(t.GetTokenId(), "is for agent %s alone, and this is %s", t.GetAgentId(), id.Name)
	}
	if why := s.access.banned(id); why != nil {
		return pki.Identity{}, rpc.IsBanned(id, why)
	}
	if id.Kind == pki.Agent && t.GetAgentId() == "" && !again && !t.GetLocal() {
		// Whoever has a token for any agent must not become one that is there already.
		if taken := s.registry.Taken(id.Name, now); taken != nil {
			return pki.Identity{}, taken
		}
	}
	if !again && !t.GetLocal() {
		t.UsesLeft--
		t.UsedBy = append(t.UsedBy, joiner)
	}
	return id, nil
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
	id := rpc.CallerOf(ctx)
	if id == (pki.Identity{}) {
		chain, err := pki.ParseCertificates(req.GetExpiredChain())
		if err == nil {
			id, err = pki.VerifyExpired(chain, s.access.current().Roots(), s.access.grid, key, time.Now(), graceAfterExpiry)
		}
		if err != nil {
			return nil, rpc.Errorf(rpc.Unauthenticated, "who asks to be renewed isn't known: %v", err).
				WithHint("join anew with a token: sutra token create on the master's host")
		}
	}
	if why := s.access.banned(id); why != nil {
		return nil, rpc.IsBanned(id, why)
	}
	certificates, err := s.access.certify(req.GetCertificateRequest(), id)
	if err != nil {
		return nil, err
	}
	return &sutrav1.RenewResponse{Certificates: certificates}, nil
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
	if err := bad.err(); err != nil {
		return nil, err
	}
	now := time.Now()
	root := s.access.current().Roots()[0]
	token, err := pki.NewToken(sha256.Sum256(root.Raw))
	if err != nil {
		return nil, err
	}
	rec := &sutrav1.TokenRecord{
		TokenId: token.ID, SecretSha256: token.SecretHash(), Role: role, AgentId: req.GetAgentId(), UsesLeft: uses,
		CreatedAt: timestamppb.New(now), ExpiresAt: timestamppb.New(now.Add(life)), CreatedBy: caller(ctx),
		Root: name(root),
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
		ExpiresAt: t.GetExpiresAt(), CreatedBy: t.GetCreatedBy(),
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
		if !t.GetLocal() { // that one is the host's own affair
			resp.Tokens = append(resp.Tokens, tokenMessage(t))
		}
	}
	return resp, nil
}

// RevokeToken forgets it.
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

// BanAgent: write it down, end its connections, call it no more.
func (s *service) BanAgent(ctx context.Context, req *sutrav1.BanAgentRequest) (*sutrav1.BanAgentResponse, error) {
	var bad checks
	bad.id("agent_id", req.GetAgentId())
	if len(req.GetReason()) > 256 {
		bad.add("reason", "is longer than 256 bytes")
	}
	if err := bad.err(); err != nil {
		return nil, err
	}
	ban := &sutrav1.BanRecord{AgentId: req.GetAgentId(), Reason: req.GetReason(), BannedAt: timestamppb.Now(), BannedBy: caller(ctx)}
	if err := s.store.SaveBan(ctx, ban); err != nil {
		return nil, persisted(err)
	}
	s.access.mu.Lock()
	s.access.bans[ban.GetAgentId()] = ban
	s.access.mu.Unlock()
	s.expel()
	s.pool.Drop(ban.GetAgentId())
	s.registry.Leave(ban.GetAgentId())
	return &sutrav1.BanAgentResponse{}, nil
}

// UnbanAgent: the agent comes back by itself, with the certificate that it has.
func (s *service) UnbanAgent(ctx context.Context, req *sutrav1.UnbanAgentRequest) (*sutrav1.UnbanAgentResponse, error) {
	var bad checks
	bad.id("agent_id", req.GetAgentId())
	if err := bad.err(); err != nil {
		return nil, err
	}
	if err := s.store.DeleteBan(ctx, req.GetAgentId()); err != nil {
		return nil, persisted(err)
	}
	s.access.mu.Lock()
	delete(s.access.bans, req.GetAgentId())
	s.access.mu.Unlock()
	s.expel() // what it has is a stranger's connection
	return &sutrav1.UnbanAgentResponse{}, nil
}
