package master

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// whom a ban is about: an agent, or a person in whatever role.
type whom struct {
	kind pki.Kind
	name string
}

func whomOf(b *sutrav1.BanRecord) whom {
	if b.GetUser() != "" {
		return whom{pki.User, b.GetUser()}
	}
	return whom{pki.Agent, b.GetAgentId()}
}

// banned says why an identity is kept out; nil where it isn't.
func (a *access) banned(id pki.Identity) error {
	a.mu.RLock()
	ban := a.bans[whom{id.Kind, id.Name}]
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

// maker says why the one who made a token is kept out; nil where it isn't. Else a banned person would come in again, by
// another name, with a token that it has kept.
func (a *access) maker(t *sutrav1.TokenRecord) error {
	name, ok := strings.CutPrefix(t.GetCreatedBy(), string(pki.User)+" ")
	if !ok {
		return nil
	}
	return a.banned(pki.Identity{Kind: pki.User, Name: name})
}

// ban: write it down, end the connections.
func (s *service) ban(ctx context.Context, b *sutrav1.BanRecord) error {
	b.BannedAt, b.BannedBy = timestamppb.Now(), caller(ctx)
	b.Reason = string(pki.Conceal([]byte(b.GetReason()))) // many may read it
	if err := s.store.SaveBan(ctx, b); err != nil {
		return persisted(err)
	}
	s.access.mu.Lock()
	s.access.bans[whomOf(b)] = b
	s.access.mu.Unlock()
	s.expel()
	return nil
}

// unban lets somebody in again, and tells whether that was banned.
func (s *service) unban(ctx context.Context, b *sutrav1.BanRecord) (banned bool, err error) {
	if err := s.store.DeleteBan(ctx, b); err != nil {
		return false, persisted(err)
	}
	s.access.mu.Lock()
	banned = s.access.bans[whomOf(b)] != nil
	delete(s.access.bans, whomOf(b))
	s.access.mu.Unlock()
	s.expel() // what it has is a stranger's connection
	return banned, nil
}

func (c *checks) reason(why string) {
	if len(why) > 256 {
		c.add("reason", "is longer than 256 bytes")
	}
}

// BanAgent keeps an agent out, and calls it no more.
func (s *service) BanAgent(ctx context.Context, req *sutrav1.BanAgentRequest) (*sutrav1.BanAgentResponse, error) {
	var bad checks
	bad.id("agent_id", req.GetAgentId())
	bad.reason(req.GetReason())
	if err := bad.err(); err != nil {
		return nil, err
	}
	if err := s.ban(ctx, &sutrav1.BanRecord{AgentId: req.GetAgentId(), Reason: req.GetReason()}); err != nil {
		return nil, err
	}
	s.pool.Drop(req.GetAgentId())
	s.registry.Leave(req.GetAgentId())
	return &sutrav1.BanAgentResponse{AgentUnknown: s.knownAgent(req.GetAgentId()) != nil}, nil
}

// UnbanAgent: the agent comes back by itself, with the certificate that it has.
func (s *service) UnbanAgent(ctx context.Context, req *sutrav1.UnbanAgentRequest) (*sutrav1.UnbanAgentResponse, error) {
	var bad checks
	bad.id("agent_id", req.GetAgentId())
	if err := bad.err(); err != nil {
		return nil, err
	}
	banned, err := s.unban(ctx, &sutrav1.BanRecord{AgentId: req.GetAgentId()})
	if err != nil {
		return nil, err
	}
	return &sutrav1.UnbanAgentResponse{NotBanned: !banned}, nil
}

// BanUser keeps a person out. The one who bans is an admin that stays, and the account that the master runs as always has
// one, so that no grid is left without.
func (s *service) BanUser(ctx context.Context, req *sutrav1.BanUserRequest) (*sutrav1.BanUserResponse, error) {
	var bad checks
	bad.id("name", req.GetName())
	bad.reason(req.GetReason())
	if err := bad.err(); err != nil {
		return nil, err
	}
	if own := rpc.CallerOf(ctx); own.Kind == pki.User && own.Name == req.GetName() {
		return nil, rpc.Errorf(rpc.PermissionDenied, "%s may not ban itself", own).
			WithHint("have another admin do it; one is made with: sutra token create --role admin, and sutra login --name NAME")
	}
	if err := s.ban(ctx, &sutrav1.BanRecord{User: req.GetName(), Reason: req.GetReason()}); err != nil {
		return nil, err
	}
	if err := s.leaveAdmin(); err != nil {
		return nil, rpc.Errorf(rpc.Internal, "user %s is banned, but the account that the master runs as can't be given an identity: %v", req.GetName(), err).
			WithHint("once the disk is mended, ban it again")
	}
	return &sutrav1.BanUserResponse{}, nil
}

// UnbanUser: the person's certificate is good again, if it hasn't ended.
func (s *service) UnbanUser(ctx context.Context, req *sutrav1.UnbanUserRequest) (*sutrav1.UnbanUserResponse, error) {
	var bad checks
	bad.id("name", req.GetName())
	if err := bad.err(); err != nil {
		return nil, err
	}
	banned, err := s.unban(ctx, &sutrav1.BanRecord{User: req.GetName()})
	if err != nil {
		return nil, err
	}
	return &sutrav1.UnbanUserResponse{NotBanned: !banned}, nil
}

// ListBans answers from memory.
func (s *service) ListBans(context.Context, *sutrav1.ListBansRequest) (*sutrav1.ListBansResponse, error) {
	s.access.mu.RLock()
	all := slices.Collect(maps.Values(s.access.bans)) // none is ever changed
	s.access.mu.RUnlock()
	slices.SortFunc(all, func(a, b *sutrav1.BanRecord) int {
		return cmp.Or(cmp.Compare(a.GetUser(), b.GetUser()), cmp.Compare(a.GetAgentId(), b.GetAgentId()))
	})
	return &sutrav1.ListBansResponse{Bans: all}, nil
}
