package master

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/store"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// notedEvery is how much later than is written down an identity's last certificate may end: who asks for one after the other
// has little of it written to disk.
const notedEvery = 24 * time.Hour

// holderOf is how records know one that has a key, as a SubjectPublicKeyInfo, and a name.
func holderOf(public []byte, name string) []byte {
	sum := sha256.Sum256(append(slices.Clone(public), name...)) // the keys of a grid are all of one length
	return sum[:]
}

// sameHost tells whether a call comes from this host itself: over loopback, or from the very address that it was made to.
func sameHost(ctx context.Context) bool {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return false
	}
	from, _ := p.Addr.(*net.TCPAddr)
	to, _ := p.LocalAddr.(*net.TCPAddr)
	return from != nil && (from.IP.IsLoopback() || to != nil && from.IP.Equal(to.IP))
}

// free tells whether a token that isn't made for one identity alone may give it: that it is nobody's.
func (s *service) free(t *sutrav1.TokenRecord, known *sutrav1.IdentityRecord, id pki.Identity, now time.Time) error {
	if id.Kind != pki.Agent {
		if known != nil {
			return taken(id, known)
		}
		return nil
	}
	if t.GetLocal() && known.GetLocal() {
		return nil // the agent is this host's own, and has lost its identity
	}
	if live := s.registry.Taken(id.Name, now); live != nil {
		return rpc.AsError(live).WithHint("%s", howElse(id))
	}
	if known != nil || !t.GetLocal() && s.registry.Knows(id.Name) {
		return taken(id, known)
	}
	return nil
}

// taken is what one is told who wants to be somebody that there is already.
func taken(id pki.Identity, known *sutrav1.IdentityRecord) *rpc.Error {
	why := "there is one already, or nodes of it"
	if at := known.GetGivenAt(); at != nil {
		why = "it was given a certificate at " + at.AsTime().UTC().Format(time.RFC3339)
	}
	if id.Kind == pki.Agent {
		return rpc.Errorf(rpc.AgentIDTaken, "agent id %s is taken: %s", id.Name, why).With("agent_id", id.Name).WithHint("%s", howElse(id))
	}
	return rpc.Errorf(rpc.NameTaken, "the name %s is taken: %s", id.Name, why).With("name", id.Name).WithHint("%s", howElse(id))
}

// howElse is what one does who can't be given an identity with a token for anybody.
func howElse(id pki.Identity) string {
	if id.Kind == pki.Agent {
		return "give this agent another agent_id; if it is that agent, and its identity is lost, join with a token for it: sutra token create --agent-id " + id.Name
	}
	return "choose another name: sutra login --name NAME; if it is you, and your identity is lost, join with a token for you: sutra token create --role " +
		pki.RoleWord(id.Role) + " --name " + id.Name
}

// give is the record of an identity that is given now to who asks for it with a token. Whose it was before has certificates that begin
// before the next second, the new holder none: see settled.
func (s *service) give(t *sutrav1.TokenRecord, known *sutrav1.IdentityRecord, id pki.Identity, holder []byte, now time.Time) *sutrav1.IdentityRecord {
	rec := &sutrav1.IdentityRecord{
		Kind: string(id.Kind), Name: id.Name, Role: id.Role, TokenId: t.GetTokenId(), GivenAt: timestamppb.New(now), Holder: holder, Local: t.GetLocal(),
		ExpiresAt: timestamppb.New(now.Add(s.access.life)),
	}
	if known != nil || id.Kind == pki.Agent && s.registry.Knows(id.Name) {
		rec.CertificatesSince = timestamppb.New(now.Truncate(time.Second).Add(time.Second))
	}
	return rec
}

// settled waits until certificates of an identity that are made now begin later than those of whose it was before, which is within a
// second: certificates tell no smaller times.
func settled(ctx context.Context, rec *sutrav1.IdentityRecord) error {
	if rec.GetCertificatesSince() == nil {
		return nil
	}
	timer := time.NewTimer(min(time.Until(rec.GetCertificatesSince().AsTime()), time.Second))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// holds refuses one whose identity was given to another since its certificate was made, and notes when the next one ends.
// Identities from before there were such records get theirs here.
func (s *service) holds(ctx context.Context, id pki.Identity, cert *x509.Certificate, now time.Time) error {
	err := s.store.ChangeIdentity(ctx, string(id.Kind), id.Name, func(known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error) {
		if known == nil {
			known = &sutrav1.IdentityRecord{Kind: string(id.Kind), Name: id.Name, Role: id.Role}
		}
		if now.Before(known.GetGivenAt().AsTime()) {
			known.CertificatesSince = nil // the clock was set back: the new holder's would look like the old one's
		}
		if since := known.GetCertificatesSince(); since != nil && pki.Begins(cert).Before(since.AsTime()) {
			return nil, taken(id, known)
		}
		s.note(known, now)
		return known, nil
	})
	switch {
	case errors.Is(err, store.ErrDiskFull): // it was allowed; the next one writes it down
		return nil
	case err != nil && rpc.ReasonOf(err) != rpc.Internal:
		return err
	default:
		return persisted(err)
	}
}

// note writes down when a certificate ends that is given now.
func (s *service) note(rec *sutrav1.IdentityRecord, now time.Time) {
	if end := now.Add(s.access.life); rec.GetExpiresAt() == nil || end.Sub(rec.GetExpiresAt().AsTime()) > notedEvery {
		rec.ExpiresAt = timestamppb.New(end)
	}
}
