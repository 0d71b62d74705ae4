package agent

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
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
	// keyFile has the key that is joined with until the identity is saved: whoever lost the answer, or ended before that, gets it
	// again for that key although the token is used up.
	keyFile string
	// token is the one that the agent was given, or tokenFile the file that has it; both empty where it was given none.
	token, tokenFile string
	log              zerolog.Logger

	held pki.Holder
	// soon holds a token while the master wants the certificate renewed before it is due.
	soon chan struct{}
	// expel ends connections by roots that aren't trusted any more.
	expel func()

	saving sync.Mutex // held while the file is written
	// unsaved tells that what is held isn't in the file.
	unsaved atomic.Bool
}

// open reads the identity that is there; there may be none yet.
func (i *identity) open() error {
	c, err := pki.Load(i.file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return rpc.Errorf(rpc.Unauthenticated, "agent %s can't use its identity: %v", i.agentID, err).
			WithHint("mend the file; or remove it, and join anew: sutra agent --join-token TOKEN")
	case c.Identity.Kind != pki.Agent || c.Identity.Name != i.agentID:
		return rpc.Errorf(rpc.Unauthenticated, "%s is the identity of %s, and this is agent %s", i.file, c.Identity, i.agentID).
			WithHint("give this agent another home, or remove the file and join anew: sutra agent --join-token TOKEN")
	}
	_ = os.Remove(i.keyFile) // this process's last life may have ended before it came to that
	i.held.Set(c)
	return nil
}

// ensure makes sure that there is an identity which by its times a master takes: it joins the grid, or renews what has expired.
func (i *identity) ensure(ctx context.Context, master string) error {
	if i.held.Get() == nil {
		if err := i.open(); err != nil { // it may have been mended or removed
			return err
		}
	}
	switch c := i.held.Get(); {
	case c == nil:
		return i.join(ctx, master)
	case !c.Holds(time.Now()):
		return i.prove(ctx, master)
	default:
		return nil
	}
}

// prove gets another certificate by the key of the one that isn't taken any more, or for a token.
func (i *identity) prove(ctx context.Context, master string) error {
	err := i.renew(ctx, master, true)
	if err != nil {
		return i.orJoin(ctx, master, err)
	}
	return nil
}

// orJoin joins anew where a master doesn't take the identity, and there is a token that may help: any where the grid's own master
// doesn't know this agent any more; where the master isn't of the identity's grid, one of another grid. Then the operator moved the
// agent, the master of this host lost all it had, or the grid moved to another root without this agent. Whatever tokens lie
// about, an identity that is taken is kept.
func (i *identity) orJoin(ctx context.Context, master string, refused error) error {
	text, _, err := i.tokenText()
	token, bad := pki.ParseToken(text)
	reason := rpc.ReasonOf(refused)
	if err != nil || bad != nil || reason != rpc.Unauthenticated && (reason != rpc.UntrustedPeer || i.held.Get().Trusts(token.Root)) {
		return refused
	}
	err = i.join(ctx, master)
	if err == nil {
		return nil
	}
	was, is := rpc.AsError(refused), rpc.AsError(err)
	hint := is.Hint
	if is.Reason == rpc.UntrustedPeer || rpc.Unanswered(is) { // which tells nothing new
		hint = was.Hint
	}
	return rpc.Errorf(was.Reason, "%s; it couldn't join anew either: %s", was.Message, is.Message).WithHint("%s", hint)
}

// tokenText is the token that the agent was given, else the one that a master of this host has left, and where it is from; empty
// where there is none.
func (i *identity) tokenText() (text, from string, err error) {
	if i.token != "" {
		return i.token, "--join-token", nil
	}
	if i.tokenFile != "" {
		data, err := os.ReadFile(i.tokenFile)
		if err != nil {
			return "", i.tokenFile, rpc.Errorf(rpc.InvalidArgument, "agent %s needs a token, and --join-token-file can't be read: %v", i.agentID, err).
				WithHint("write the token there; one comes from sutra token create, on the master's host")
		}
		return string(data), i.tokenFile, nil
	}
	from = config.JoinToken(i.home)
	data, err := os.ReadFile(from)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", from, rpc.Errorf(rpc.Unauthenticated, "the token that the master left for agents of this host can't be read: %v", err).
			WithHint("run the agent as the account that the master runs as, or give it a token of its own: sutra agent --join-token TOKEN")
	}
	return string(data), from, nil
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
	key, err := i.joinKey()
	if err != nil {
		return fmt.Errorf("agent %s doesn't join the grid yet: %w", i.agentID, err)
	}
	request, err := pki.Request(key)
	if err != nil {
		return err
	}
	channel := rpc.Join(master, token)
	defer channel.Close()
	resp, err := sutrav1.NewGridMasterClient(channel).Enroll(ctx, &sutrav1.EnrollRequest{
		TokenId: token.ID, TokenSecret: token.Secret[:], CertificateRequest: request, Name: i.agentID, Role: sutrav1.Role_ROLE_AGENT,
	})
	if err != nil {
		if e := rpc.AsError(err); e.Reason == rpc.TokenRefused || e.Reason == rpc.UntrustedPeer {
			return rpc.Errorf(e.Reason, "%s: %s", from, e.Message).WithHint("%s", e.Hint)
		}
		return err
	}
	c, err := pki.FromAnswer(key, resp.GetCertificates())
	if err != nil {
		return fmt.Errorf("join the grid at %s: %w", master, err)
	}
	i.log.Info().Str("grid_id", c.Identity.Grid).Time("certificate_ends", c.Expires).Msg("joined the grid")
	return i.take(c)
}

// joinKey is the key to join with. It is on disk before a token is spent.
func (i *identity) joinKey() (*ecdsa.PrivateKey, error) {
	if c := i.held.Get(); c != nil && !i.unsaved.Load() {
		return c.Key(), nil
	}
	return pki.KeepKey(i.keyFile)
}

// take keeps other credentials from now on.
func (i *identity) take(c *pki.Credentials) error {
	if c.Identity.Kind != pki.Agent || c.Identity.Name != i.agentID {
		return fmt.Errorf("the master gave this agent the identity of %s", c.Identity)
	}
	i.held.Set(c)
	i.save()
	i.expel()
	return nil
}

// save writes what is held to the file. Where that fails, as on a full disk, due tries again; until then the identity can be had again
// as it was got: for the old certificate, or for the token with the key that is kept.
func (i *identity) save() {
	i.saving.Lock()
	defer i.saving.Unlock()
	err := i.held.Get().Save(i.file)
	i.unsaved.Store(err != nil)
	if err != nil {
		i.log.Warn().Err(err).Msg("identity not saved; trying on")
		return
	}
	_ = os.Remove(i.keyFile) // there mostly is none, and one that is left is of no use
}

// renew gets another certificate. Where the present one isn't good, or isn't taken, that is proved by its key.
func (i *identity) renew(ctx context.Context, master string, byKey bool) error {
	now := i.held.Get()
	key, request, err := pki.NewRequest()
	if err != nil {
		return err
	}
	req := &sutrav1.RenewRequest{CertificateRequest: request}
	if byKey {
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

// keep renews the certificate in time, until ctx ends.
func (i *identity) keep(ctx context.Context, master func() string) {
	for {
		c := i.due(ctx)
		if c == nil {
			return
		}
		if err := i.renew(ctx, master(), !c.Holds(time.Now())); err != nil && ctx.Err() == nil {
			event := i.log.Warn().Err(err).Time("certificate_ends", c.Expires)
			if hint := rpc.AsError(err).Hint; hint != "" {
				event = event.Str("hint", hint)
			}
			event.Msg("identity not renewed; trying on")
			pause := c.Pause()
			sleep(ctx, pause/2+rand.N(pause/2))
		}
		select {
		case <-i.soon: // asked for before this
		default:
		}
	}
}

// saveAgain is how long to wait before what couldn't be saved is saved again.
const saveAgain = 5 * time.Second

// due waits until the certificate is to be renewed, and returns what is held then; nil where ctx ended first. Meanwhile it saves what
// couldn't be saved. One that has expired is renewed by ensure, which a refusal leads to, and by keep only where none came.
func (i *identity) due(ctx context.Context) *pki.Credentials {
	var expired *pki.Credentials
	for ctx.Err() == nil {
		c, look := i.held.Get(), time.Second
		if c != nil {
			now := time.Now()
			switch look = pki.LookEvery(c.Life()); {
			case now.After(c.Expires) && c != expired:
				expired = c
			case c.Due(now):
				return c
			}
		}
		if i.unsaved.Load() {
			look = min(look, saveAgain)
		}
		timer := time.NewTimer(look)
		select {
		case <-ctx.Done():
		case <-timer.C:
			if i.unsaved.Load() {
				i.save()
			}
		case <-i.soon:
			if c != nil && sleep(ctx, rand.N(max(min(soonWithin, c.Life()/10), 1))) {
				return i.held.Get()
			}
		}
		timer.Stop()
	}
	return nil
}
