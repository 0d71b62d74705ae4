package store

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

var (
	errUsedUp = errors.New("it was used up")
	errTaken  = errors.New("it is taken")
)

// useUp is what a joiner does that wants to be the only one.
func useUp(as *sutrav1.IdentityRecord) func(*sutrav1.TokenRecord, *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error) {
	return func(t *sutrav1.TokenRecord, known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error) {
		switch {
		case t.GetUsesLeft() == 0:
			return nil, errUsedUp
		case known != nil:
			return nil, errTaken
		}
		t.UsesLeft--
		return as, nil
	}
}

// Of many that want the last use of a token, or to be the same by tokens of their own, one succeeds; what the others saw is changed
// in nothing.
func TestJoinRaces(t *testing.T) {
	s := open(t, home(t))
	ctx := t.Context()
	const joiners = 8
	tokens := []string{"shared"}
	for i := range joiners {
		tokens = append(tokens, fmt.Sprintf("own-%d", i))
	}
	for _, id := range tokens {
		if err := s.SaveToken(ctx, &sutrav1.TokenRecord{TokenId: id, UsesLeft: 1}); err != nil {
			t.Fatal(err)
		}
	}
	race := func(join func(i int) error, lost error) {
		t.Helper()
		errs := make([]error, joiners)
		var group sync.WaitGroup
		for i := range joiners {
			group.Go(func() { errs[i] = join(i) })
		}
		group.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else if !errors.Is(err, lost) {
				t.Error(err)
			}
		}
		if won != 1 {
			t.Errorf("%d of %d succeeded", won, joiners)
		}
	}
	race(func(i int) error {
		name := fmt.Sprintf("agent-%d", i)
		return s.Join(ctx, "shared", "agent", name, useUp(&sutrav1.IdentityRecord{Kind: "agent", Name: name}))
	}, errUsedUp)
	race(func(i int) error {
		return s.Join(ctx, tokens[i+1], "user", "anna", useUp(&sutrav1.IdentityRecord{Kind: "user", Name: "anna", TokenId: tokens[i+1]}))
	}, errTaken)
	left := 0
	all, err := s.Tokens(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range all {
		left += int(token.GetUsesLeft())
	}
	if left != joiners-1 {
		t.Errorf("%d uses are left of %d tokens, want %d", left, len(all), joiners-1)
	}
	if err := s.Join(ctx, "none", "user", "bob", useUp(nil)); !errors.Is(err, ErrNoToken) {
		t.Errorf("a token that isn't there: %v", err)
	}
}

// An agent and a person of one name are two; a record survives a restart, and is changed as it is at that moment.
func TestIdentitiesSurviveRestart(t *testing.T) {
	dir := home(t)
	s := open(t, dir)
	ctx := t.Context()
	agent := &sutrav1.IdentityRecord{Kind: "agent", Name: "anna", TokenId: "a", GivenAt: timestamppb.New(epoch)}
	person := &sutrav1.IdentityRecord{Kind: "user", Name: "anna", Role: sutrav1.Role_ROLE_VIEWER}
	for _, rec := range []*sutrav1.IdentityRecord{agent, person} {
		if err := s.ChangeIdentity(ctx, rec.GetKind(), "anna", func(known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error) {
			if known != nil {
				t.Errorf("%s anna is there already: %v", rec.GetKind(), known)
			}
			return rec, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	refusal := errors.New("no")
	for _, want := range []*sutrav1.IdentityRecord{agent, person} {
		for range 2 { // a refused change changes nothing, nor does one that isn't any
			if err := s.ChangeIdentity(ctx, want.GetKind(), "anna", func(known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error) {
				if d := cmp.Diff(want, known, protocmp.Transform()); d != "" {
					t.Errorf("-want +got\n%s", d)
				}
				known.TokenId = "changed"
				return nil, refusal
			}); !errors.Is(err, refusal) {
				t.Error(err)
			}
		}
	}
	var group sync.WaitGroup
	for range 10 {
		group.Go(func() {
			if err := s.ChangeIdentity(ctx, "user", "anna", func(known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error) {
				known.TokenId += "x"
				return known, nil
			}); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if err := s.ChangeIdentity(ctx, "user", "anna", func(known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error) {
		if known.GetTokenId() != "xxxxxxxxxx" {
			t.Errorf("of 10 changes there are %d", len(known.GetTokenId()))
		}
		return known, nil
	}); err != nil {
		t.Error(err)
	}
	if _, err := s.client.Put(ctx, identityPrefix+"user/bob", "\x0a\x04user\x12\x04anna"); err != nil {
		t.Fatal(err)
	}
	if err := s.ChangeIdentity(ctx, "user", "bob", nil); err == nil || !strings.Contains(err.Error(), identityPrefix+"user/bob") || !strings.Contains(err.Error(), `holds "user/anna"`) {
		t.Errorf("a record of another: %v", err)
	}
}

func TestPruneAccess(t *testing.T) {
	s := open(t, home(t))
	ctx := t.Context()
	before, after := timestamppb.New(epoch.Add(-1)), timestamppb.New(epoch)
	for _, token := range []*sutrav1.TokenRecord{
		{TokenId: "expired", UsesLeft: 5, ExpiresAt: before},
		{TokenId: "expired just now", UsesLeft: 5, ExpiresAt: after},
		{TokenId: "used up", ExpiresAt: after, LastUsedAt: before},
		{TokenId: "used up just now", ExpiresAt: after, LastUsedAt: after},
		{TokenId: "used up by another version", ExpiresAt: after},
		{TokenId: "used and good", UsesLeft: 1, ExpiresAt: after, LastUsedAt: before},
		{TokenId: "local", Local: true, LastUsedAt: before},
	} {
		if err := s.SaveToken(ctx, token); err != nil {
			t.Fatal(err)
		}
	}
	long := epoch.Add(-time.Hour)
	for name, end := range map[string]*timestamppb.Timestamp{"old": timestamppb.New(long.Add(-1)), "new": timestamppb.New(long), "unknown": nil} {
		if err := s.ChangeIdentity(ctx, "user", name, func(*sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error) {
			return &sutrav1.IdentityRecord{Kind: "user", Name: name, ExpiresAt: end}, nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.SaveNode(ctx, node("node-a")); err != nil {
		t.Fatal(err)
	}
	for _, want := range []int{3, 0} {
		if n, err := s.PruneAccess(ctx, epoch, long); n != want || err != nil {
			t.Errorf("pruned %d, %v; want %d", n, err, want)
		}
	}
	all, err := s.Tokens(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, token := range all {
		ids = append(ids, token.GetTokenId())
	}
	if d := cmp.Diff([]string{"expired just now", "local", "used and good", "used up by another version", "used up just now"}, ids); d != "" {
		t.Errorf("tokens -want +got\n%s", d)
	}
	for name, want := range map[string]bool{"old": false, "new": true, "unknown": true} {
		if err := s.ChangeIdentity(ctx, "user", name, func(known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error) {
			if (known != nil) != want {
				t.Errorf("%s: %v", name, known)
			}
			return known, nil
		}); err != nil {
			t.Error(err)
		}
	}
	wantState(t, s, State{Nodes: []*sutrav1.NodeRecord{node("node-a")}})
}
