package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

func (c *client) loginCommand() *cli.Command {
	return &cli.Command{
		Name:      "login",
		Usage:     "join a grid as a person, with a token",
		UsageText: "sutra login --master HOST:PORT --token TOKEN [--name NAME]",
		Description: `The identity that the token gives is kept under credentials/ in the home, and is used by all verbs from then on. An account
has one identity in a grid: where it is an operator or an admin already, another one needs another --home.
$SUTRA_JOIN_TOKEN stands for --token, and shows in no list of processes.

Examples:
  sutra login --master 10.0.0.10:7000 --token "$T"

Exit codes: 0 joined; 1 failed; 2 bad flags; 4 master unavailable; 5 timed out; 6 the token is refused`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "token", EnvVars: []string{"SUTRA_JOIN_TOKEN"}, Usage: "the `TOKEN` that sutra token create printed"},
			&cli.StringFlag{Name: "name", Usage: "what the grid calls this `PERSON` (default: this account's name)"},
		},
		Action: c.verb("token", login),
	}
}

func login(cctx *cli.Context, s *session) error {
	if cctx.String("token") == "" {
		return &UsageError{Message: "sutra login needs --token", Hint: "an admin makes one: sutra token create --role operator"}
	}
	token, err := pki.ParseToken(cctx.String("token"))
	if err != nil {
		return rpc.Errorf(rpc.TokenRefused, "--token: %v", err).WithHint("copy it whole, as sutra token create printed it")
	}
	name := cctx.String("name")
	if name == "" {
		name = accountName()
	}
	if err := s.replaceable(cctx.Context, token); err != nil {
		return err
	}
	// Whoever lost the answer asks again with the same key, and is answered again although the token is used up.
	keyFile := filepath.Join(s.home, "credentials", "login.key")
	key, err := pki.KeepKey(keyFile)
	if err != nil {
		return err
	}
	request, err := pki.Request(key)
	if err != nil {
		return err
	}
	s.channel.Close()
	s.channel = rpc.Join(s.endpoint, token) // closed by verb
	response, err := s.master.Enroll(cctx.Context, &sutrav1.EnrollRequest{
		TokenId: token.ID, TokenSecret: token.Secret[:], CertificateRequest: request, Name: name,
	})
	if err != nil {
		return err
	}
	own, err := pki.FromAnswer(key, response.GetCertificates())
	if err != nil {
		return fmt.Errorf("join the grid at %s: %w", s.endpoint, err)
	}
	if err := own.Save(config.Credentials(s.home, own.Identity.Grid)); err != nil {
		return err
	}
	_ = os.Remove(keyFile) // one that is left is of no use
	s.tell("all verbs use it from now on; name the master with SUTRA_MASTER=" + s.endpoint)
	return s.write(fmt.Sprintf("joined grid %s as %s, with the role %s\n", own.Identity.Grid, own.Identity, pki.RoleWord(own.Identity.Role)))
}

// replaceable tells why a token of a grid mustn't be spent in this home: an account has one identity in a grid, and which role a
// token gives shows when it is spent. Nobody is to lose an operator's or an admin's for less, and unasked. Where the identity has another
// root than the token, the master tells whether the grid moves from the one to the other.
func (s *session) replaceable(ctx context.Context, token pki.Token) error {
	for _, c := range s.own {
		if c.Identity.Role == sutrav1.Role_ROLE_VIEWER || time.Now().After(c.Expires) || s.files[c] != config.Credentials(s.home, c.Identity.Grid) {
			continue
		}
		ours := c.Trusts(token.Root)
		if !ours {
			_, err := s.master.GetClusterStatus(ctx, &sutrav1.GetClusterStatusRequest{})
			ours = err == nil && c.Outdated()
		}
		if ours {
			return &UsageError{
				Message: fmt.Sprintf("this account is %s in that grid already, with the role %s, and would be that no more", c.Identity, pki.RoleWord(c.Identity.Role)),
				Hint: "keep the other identity elsewhere: sutra login --home FOLDER ...; or give this one up, and remove " + s.files[c] +
					" (on the master's host, the next start of the master leaves an admin's there again)",
			}
		}
	}
	return nil
}

// accountName is this account's name, as far as names in a grid may have its letters.
func accountName() string {
	const unknown = "user"
	u, err := user.Current()
	if err != nil {
		return unknown
	}
	return config.NameOf(u.Username, unknown)
}

// credentials reads the identities that this account has, one a grid, with the files they are from; those of a grid that runs
// for a first look with them.
func credentials(home string) (all []*pki.Credentials, files map[*pki.Credentials]string, err error) {
	files = map[*pki.Credentials]string{}
	for _, path := range config.AllCredentials(home) {
		c, err := pki.Load(path)
		if errors.Is(err, os.ErrNotExist) {
			continue // removed at this moment
		}
		if err != nil {
			return nil, nil, rpc.Errorf(rpc.Unauthenticated, "%v", err).
				WithHint("mend the file; or remove it, and start this host's master again, or sutra login")
		}
		all, files[c] = append(all, c), path
	}
	for _, path := range config.DevCredentials() {
		if c, err := pki.Load(path); err == nil { // else it is about to come or to go
			all, files[c] = append(all, c), path
		}
	}
	return all, files, nil
}

// renewalTime bounds what a verb takes to renew an identity before its own call: that a master isn't there is to be said soon.
const renewalTime = 2 * time.Second

// renewalDue tells whether it is time to renew.
func renewalDue(c *pki.Credentials) bool { return c.Due(time.Now()) }

// renewOwn renews those of this account's identities that are due, or all, and whose grid this master's is. What can't be renewed is used
// as it is.
func (s *session) renewOwn(ctx context.Context, due func(*pki.Credentials) bool) {
	limit := renewalTime
	if s.timeout > 0 {
		limit = min(limit, s.timeout)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for i, c := range s.own {
		if !due(c) {
			continue
		}
		again, err := s.renew(ctx, c)
		if err != nil {
			continue // the verb's own call says what is the matter
		}
		s.own[i], s.files[again] = again, s.files[c]
		if err := again.Save(s.files[c]); err != nil { // it is renewed again the next time
			s.unsaved = err
		}
	}
}

// renew has the master give an identity another certificate.
func (s *session) renew(ctx context.Context, c *pki.Credentials) (*pki.Credentials, error) {
	request, err := pki.Request(c.Key())
	if err != nil {
		return nil, err
	}
	req := &sutrav1.RenewRequest{CertificateRequest: request}
	if !c.Holds(time.Now()) {
		req.ExpiredChain = c.Chain()
	}
	channel := rpc.Master(s.endpoint, func() []*pki.Credentials { return []*pki.Credentials{c} }, nil)
	defer channel.Close()
	response, err := sutrav1.NewGridMasterClient(channel).Renew(ctx, req)
	if err != nil {
		return nil, err
	}
	again, err := pki.FromAnswer(c.Key(), response.GetCertificates())
	if err == nil && again.Identity != c.Identity {
		err = fmt.Errorf("the master gave %s the identity of %s", c.Identity, again.Identity)
	}
	return again, err
}

// keep renews this account's identities of the master's grid in their files when they become due, until ctx ends: for a verb that goes on
// for longer than a certificate.
func (s *session) keep(ctx context.Context) {
	if s.insecure != rpc.Secure {
		return
	}
	foreign := map[string]bool{} // files of identities in other grids
	for {
		next := time.Minute                  // the clock may be set, or the host may sleep
		all, files, _ := credentials(s.home) // a file that can't be read may be mended the next time
		for _, c := range all {
			if foreign[files[c]] {
				continue
			}
			if renewalDue(c) {
				again, err := s.renew(ctx, c)
				switch {
				case rpc.ReasonOf(err) == rpc.UntrustedPeer:
					foreign[files[c]] = true
					continue
				case err == nil && again.Save(files[c]) == nil:
					c = again
				}
			}
			wait := time.Until(c.RenewAt())
			if wait <= 0 { // it wasn't renewed
				wait = c.Pause()
			}
			next = min(next, wait)
		}
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}
