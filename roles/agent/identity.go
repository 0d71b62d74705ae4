package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"time"

	"github.com/rs/zerolog"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// identity is whom this agent is in its grid. It is kept in a file; without one it is got for a token.
type identity struct {
	agentID string
	// file is where it is kept, and home where a master of this host leaves a token.
	file, home string
	// token is the one that the agent was given; empty where it was given none.
	token string
	log   zerolog.Logger

	held pki.Holder
	// soon holds a token while the master wants the certificate renewed before it is due.
	soon chan struct{}
	// expel ends connections by roots that aren't trusted any more.
	expel func()
}

// openIdentity reads the identity that is there; there may be none yet.
func openIdentity(i *identity) (*identity, error) {
	i.soon = make(chan struct{}, 1)
	c, err := pki.Load(i.file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return i, nil
	case err != nil:
		return nil, rpc.Errorf(rpc.Unauthenticated, "agent %s can't use its identity: %v", i.agentID, err).
			WithHint("mend the file; or remove it, and join anew: sutra agent --join-token TOKEN")
	case c.Identity.Kind != pki.Agent || c.Identity.Name != i.agentID:
		return nil, rpc.Errorf(rpc.Unauthenticated, "%s is the identity of %s, and this is agent %s", i.file, c.Identity, i.agentID).
			WithHint("give this agent another home, or remove the file and join anew: sutra agent --join-token TOKEN")
	}
	i.held.Set(c)
	return i, nil
}

// ensure makes sure that there is an identity which a master takes: it joins the grid, or renews what has expired. foreign tells that
// the master was found to be of none of the identity's roots.
func (i *identity) ensure(ctx context.Context, master string, foreign bool) error {
	c := i.held.Get()
	switch {
	case c == nil, foreign && i.elsewhere(c):
		return i.join(ctx, master)
	case time.Now().After(c.Expires):
		return i.renew(ctx, master)
	default:
		return nil
	}
}

// tokenText is the token that the agent was given, else the one that a master of this host has left, and where it is from; empty
// where there is none.
func (i *identity) tokenText() (text, from string, err error) {
	if i.token != "" {
		return i.token, "--join-token", nil
	}
	from = config.JoinToken(i.home)
	data, err := os.ReadFile(from)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", from, rpc.Errorf(rpc.Unauthenticated, "the token that the master left for agents of this host can't be read: %v", err).
			WithHint("run the agent as the account that the master runs as, or give it a token of its own: sutra agent --join-token TOKEN")
	}
	return string(data), from, nil
}

// elsewhere tells whether there is a token of a root that the identity doesn't trust: the operator moved the agent to another
// grid, the master of this host lost all it had, or the grid moved to another root without this agent.
func (i *identity) elsewhere(c *pki.Credentials) bool {
	text, _, err := i.tokenText()
	if err != nil {
		return false
	}
	token, err := pki.ParseToken(text)
	return err == nil && !c.Trusts(token.Root)
}

// join gets an identity for a token.
func (i *identity) join(ctx context.Context, master string) error {
	text, from, err := i.tokenText()
	if err != nil {
		return err
	}
	if text == "" {
		e := rpc.Errorf(rpc.Unauthenticated, "agent %s has no identity in the grid yet", i.agentID).
			WithHint("on the master's host: sutra token create; here: sutra agent --config FILE --join-token TOKEN")
		if rpc.Loopback(master) {
			e.Message += ", and no master of this host has left a token in " + from
		}
		return e
	}
	token, err := pki.ParseToken(text)
	if err != nil {
		return rpc.Errorf(rpc.TokenRefused, "%s: %v", from, err).WithHint("copy it whole, as sutra token create printed it")
	}
	key, request, err := pki.NewRequest()
	if err != nil {
		return err
	}
	channel := rpc.Join(master, token)
	defer channel.Close()
	resp, err := sutrav1.NewGridMasterClient(channel).Enroll(ctx, &sutrav1.EnrollRequest{
		TokenId: token.ID, TokenSecret: token.Secret[:], CertificateRequest: request, Name: i.agentID, Role: sutrav1.Role_ROLE_AGENT,
	})
	if err != nil {
		return err
	}
	c, err := pki.FromAnswer(key, resp.GetCertificates())
	if err != nil {
		return fmt.Errorf("join the grid at %s: %w", master, err)
	}
	i.log.Info().Str("grid_id", c.Identity.Grid).Time("certificate_ends", c.Expires).Msg("joined the grid")
	return i.take(c)
}

// take keeps other credentials from now on.
func (i *identity) take(c *pki.Credentials) error {
	if c.Identity.Kind != pki.Agent || c.Identity.Name != i.agentID {
		return fmt.Errorf("the master gave this agent the identity of %s", c.Identity)
	}
	if err := c.Save(i.file); err != nil {
		// It is good until this process ends, and asked for anew after that.
		i.log.Warn().Err(err).Msg("identity not saved")
	}
	i.held.Set(c)
	i.expel()
	return nil
}

// renew gets another certificate. Where the present one has expired, that is proved by its key.
func (i *identity) renew(ctx context.Context, master string) error {
	now := i.held.Get()
	key, request, err := pki.NewRequest()
	if err != nil {
		return err
	}
	req := &sutrav1.RenewRequest{CertificateRequest: request}
	if expired := time.Now().After(now.Expires); expired {
		key = now.Key()
		if req.CertificateRequest, err = pki.Request(key); err != nil {
			return err
		}
		req.ExpiredChain = now.Chain()
	}
	channel := rpc.Master(master, rpc.Held(&i.held), nil)
	defer channel.Close()
	resp, err := sutrav1.NewGridMasterClient(channel).Renew(ctx, req)
	if err != nil {
		return err
	}
	c, err := pki.FromAnswer(key, resp.GetCertificates())
	if err != nil {
		return fmt.Errorf("renew the identity at %s: %w", master, err)
	}
	i.log.Debug().Time("certificate_ends", c.Expires).Msg("identity renewed")
	return i.take(c)
}

// hurry has the certificate renewed soon.
func (i *identity) hurry() {
	select {
	case i.soon <- struct{}{}:
	default:
	}
}

// soonWithin is how long the agents of a grid take at most to do what they are asked to do soon, so that not all do it at once.
const soonWithin = 30 * time.Second

// keep renews the certificate in time, until ctx ends. One that expires all the same is renewed by ensure.
func (i *identity) keep(ctx context.Context, master func() string) {
	for ctx.Err() == nil {
		c := i.held.Get()
		if c == nil || time.Now().After(c.Expires) { // ensure's to do
			sleep(ctx, time.Second)
			continue
		}
		due := time.NewTimer(time.Until(c.RenewAt()))
		select {
		case <-ctx.Done():
		case <-due.C:
		case <-i.soon:
			sleep(ctx, rand.N(max(min(soonWithin, c.Expires.Sub(c.Begins)/10), 1)))
		}
		due.Stop()
		if ctx.Err() != nil {
			return
		}
		if err := i.renew(ctx, master()); err != nil && ctx.Err() == nil {
			i.log.Warn().Err(err).Time("certificate_ends", c.Expires).Msg("identity not renewed; trying on")
			pause := min(max(c.Expires.Sub(c.Begins)/20, time.Second), time.Minute)
			sleep(ctx, pause/2+rand.N(pause/2))
		}
		select {
		case <-i.soon: // asked for before this
		default:
		}
	}
}
