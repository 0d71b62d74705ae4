package store

import (
	"context"
	"errors"
	"fmt"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// ErrNoToken is that of a token which isn't there.
var ErrNoToken = errors.New("there is no such token")

// SaveToken writes a new token's record.
func (s *Store) SaveToken(ctx context.Context, t *sutrav1.TokenRecord) error {
	put, err := putOp(tokenPrefix, t.GetTokenId(), t)
	if err == nil {
		_, err = s.commit(ctx, nil, put)
	}
	if err != nil {
		return fmt.Errorf("save token %q: %w", t.GetTokenId(), err)
	}
	return nil
}

// Join replaces, at once, a token's record and that of the identity which is given for it: edit changes a copy of the one, and
// returns the other. Of two that use a token up, or want to be the same, one succeeds, and the other's edit sees that. known is
// nil where the identity was never given. Where edit returns an error nothing is changed. The token that isn't there is ErrNoToken.
func (s *Store) Join(
	ctx context.Context, tokenID, kind, name string, edit func(t *sutrav1.TokenRecord, known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error),
) error {
	for {
		t, unchanged, err := s.token(ctx, tokenID)
		if err != nil {
			return err
		}
		done, err := s.changeIdentity(ctx, kind, name, func(known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, []clientv3.Cmp, []clientv3.Op, error) {
			before := proto.CloneOf(t)
			now, err := edit(t, known)
			if err != nil || proto.Equal(before, t) {
				return now, []clientv3.Cmp{unchanged}, nil, err
			}
			put, err := putOp(tokenPrefix, tokenID, t)
			return now, []clientv3.Cmp{unchanged}, []clientv3.Op{put}, err
		})
		if err != nil || done {
			return err
		}
	}
}

// token reads a token's record, and says when it is still the same.
func (s *Store) token(ctx context.Context, id string) (t *sutrav1.TokenRecord, unchanged clientv3.Cmp, err error) {
	resp, err := s.get(ctx, tokenPrefix+id)
	switch {
	case err != nil:
		return nil, unchanged, fmt.Errorf("read token %q: %w", id, err)
	case len(resp.Kvs) == 0:
		return nil, unchanged, ErrNoToken
	}
	t, err = decodeToken(resp.Kvs[0])
	return t, clientv3.Compare(clientv3.ModRevision(tokenPrefix+id), "=", resp.Kvs[0].ModRevision), err
}

// ChangeIdentity replaces an identity's record by what edit makes of a copy, which is nil where there is none. Where edit returns an
// error nothing is changed.
func (s *Store) ChangeIdentity(ctx context.Context, kind, name string, edit func(known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, error)) error {
	for {
		done, err := s.changeIdentity(ctx, kind, name, func(known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, []clientv3.Cmp, []clientv3.Op, error) {
			now, err := edit(known)
			return now, nil, nil, err
		})
		if err != nil || done {
			return err
		}
	}
}

// changeIdentity tries once to replace an identity's record, together with what else edit wants to be written on which conditions. It
// reports whether nothing had changed meanwhile.
func (s *Store) changeIdentity(
	ctx context.Context, kind, name string, edit func(known *sutrav1.IdentityRecord) (*sutrav1.IdentityRecord, []clientv3.Cmp, []clientv3.Op, error),
) (done bool, err error) {
	id := identityID(kind, name)
	key, revision := identityPrefix+id, int64(0)
	resp, err := s.get(ctx, key)
	if err != nil {
		return false, fmt.Errorf("read the record of %s: %w", id, err)
	}
	var known, before *sutrav1.IdentityRecord
	if len(resp.Kvs) > 0 {
		if before, err = decodeIdentity(resp.Kvs[0]); err != nil {
			return false, err
		}
		known, revision = proto.CloneOf(before), resp.Kvs[0].ModRevision
	}
	now, conditions, ops, err := edit(known)
	if err != nil {
		return false, err
	}
	if !proto.Equal(before, now) {
		put, err := putOp(identityPrefix, id, now)
		if err != nil {
			return false, fmt.Errorf("save the record of %s: %w", id, err)
		}
		ops = append(ops, put)
	}
	if len(ops) == 0 {
		return true, nil
	}
	done, err = s.commit(ctx, append(conditions, clientv3.Compare(clientv3.ModRevision(key), "=", revision)), ops...)
	if err != nil {
		return false, fmt.Errorf("save the record of %s: %w", id, err)
	}
	return done, nil
}

// identityID is what the key of an identity's record ends in.
func identityID(kind, name string) string { return kind + "/" + name }

func decodeIdentity(kv *mvccpb.KeyValue) (*sutrav1.IdentityRecord, error) {
	key, rec := string(kv.Key), &sutrav1.IdentityRecord{}
	if err := proto.Unmarshal(kv.Value, rec); err != nil {
		return nil, damaged(key, err)
	}
	if id := identityID(rec.GetKind(), rec.GetName()); identityPrefix+id != key {
		return nil, damaged(key, fmt.Errorf("it holds %q", id))
	}
	return rec, nil
}

// DeleteToken removes a token's record; false where there was none.
func (s *Store) DeleteToken(ctx context.Context, id string) (deleted bool, err error) {
	key := tokenPrefix + id
	deleted, err = s.commit(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(key), ">", 0)}, clientv3.OpDelete(key))
	if err != nil {
		return false, fmt.Errorf("delete token %q: %w", id, err)
	}
	return deleted, nil
}

// Tokens are the records of all tokens, by id.
func (s *Store) Tokens(ctx context.Context) (all []*sutrav1.TokenRecord, err error) {
	err = s.scan(ctx, tokenPrefix, func(kv *mvccpb.KeyValue) error {
		t, err := decodeToken(kv)
		if err == nil {
			all = append(all, t)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read the tokens: %w", err)
	}
	return all, nil
}

func decodeToken(kv *mvccpb.KeyValue) (*sutrav1.TokenRecord, error) {
	key, t := string(kv.Key), &sutrav1.TokenRecord{}
	if err := proto.Unmarshal(kv.Value, t); err != nil {
		return nil, damaged(key, err)
	}
	if tokenPrefix+t.GetTokenId() != key {
		return nil, damaged(key, fmt.Errorf("it holds token %q", t.GetTokenId()))
	}
	return t, nil
}

// banID is what a ban's key ends in. No agent's id has a slash, so that people's names are none of theirs.
func banID(b *sutrav1.BanRecord) string {
	if b.GetUser() != "" {
		return "user/" + b.GetUser()
	}
	return b.GetAgentId()
}

// SaveBan writes that an agent or a person is banned.
func (s *Store) SaveBan(ctx context.Context, b *sutrav1.BanRecord) error {
	put, err := putOp(banPrefix, banID(b), b)
	if err == nil {
		_, err = s.commit(ctx, nil, put)
	}
	if err != nil {
		return fmt.Errorf("save the ban of %q: %w", banID(b), err)
	}
	return nil
}

// DeleteBan lets those in again whom a ban is about. Who isn't banned is no error.
func (s *Store) DeleteBan(ctx context.Context, b *sutrav1.BanRecord) error {
	if _, err := s.commit(ctx, nil, clientv3.OpDelete(banPrefix+banID(b))); err != nil {
		return fmt.Errorf("end the ban of %q: %w", banID(b), err)
	}
	return nil
}

func (s *Store) get(ctx context.Context, key string) (*clientv3.GetResponse, error) {
	ctx, release := s.fatal.bind(ctx)
	defer release()
	resp, err := s.client.Get(ctx, key)
	if err != nil {
		return nil, s.reason(err)
	}
	return resp, nil
}
