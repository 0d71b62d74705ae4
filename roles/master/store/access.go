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

// ChangeToken replaces a token's record by what edit makes of a copy, at once: of two that use a token up one succeeds, and the
// other's edit sees that. Where edit returns an error nothing is changed. The token that isn't there is ErrNoToken.
func (s *Store) ChangeToken(ctx context.Context, id string, edit func(*sutrav1.TokenRecord) error) error {
	key := tokenPrefix + id
	for {
		resp, err := s.get(ctx, key)
		switch {
		case err != nil:
			return fmt.Errorf("read token %q: %w", id, err)
		case len(resp.Kvs) == 0:
			return ErrNoToken
		}
		t, err := decodeToken(resp.Kvs[0])
		if err != nil {
			return err
		}
		before := proto.CloneOf(t)
		if err := edit(t); err != nil {
			return err
		}
		if proto.Equal(before, t) {
			return nil
		}
		put, err := putOp(tokenPrefix, id, t)
		if err != nil {
			return fmt.Errorf("save token %q: %w", id, err)
		}
		done, err := s.commit(ctx, []clientv3.Cmp{clientv3.Compare(clientv3.ModRevision(key), "=", resp.Kvs[0].ModRevision)}, put)
		if err != nil {
			return fmt.Errorf("save token %q: %w", id, err)
		}
		if done {
			return nil
		}
	}
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
