package store

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

const (
	keyPrefix       = "/sutra/v1/"
	gridIDKey       = keyPrefix + "meta/grid_id"
	agentPrefix     = keyPrefix + "agents/"
	nodePrefix      = keyPrefix + "nodes/"
	tombstonePrefix = keyPrefix + "tombstones/"
	tokenPrefix     = keyPrefix + "tokens/"
	banPrefix       = keyPrefix + "bans/"
	identityPrefix  = keyPrefix + "identities/"
)

// pageSize bounds how many values one read holds in memory beside the result.
const pageSize = 5000

// State is all that the master wrote, each list in the order of its ids.
type State struct {
	Agents []*sutrav1.Agent
	Nodes  []*sutrav1.NodeRecord
	// Nodes that ended and were removed: one that an agent reports again is not adopted.
	Tombstones []*sutrav1.NodeRecord
	// Of agents and of people.
	Bans []*sutrav1.BanRecord
}

// Load reads the state as it was at one moment. A value that can't be decoded is an
// error that names its key.
func (s *Store) Load(ctx context.Context) (State, error) {
	var st State
	err := s.scan(ctx, keyPrefix, func(kv *mvccpb.KeyValue) error {
		key := string(kv.Key)
		switch {
		case strings.HasPrefix(key, agentPrefix):
			a := &sutrav1.Agent{}
			if err := proto.Unmarshal(kv.Value, a); err != nil {
				return damaged(key, err)
			}
			if agentPrefix+a.GetAgentId() != key {
				return damaged(key, fmt.Errorf("it holds agent %q", a.GetAgentId()))
			}
			st.Agents = append(st.Agents, a)
		case strings.HasPrefix(key, nodePrefix):
			n, err := decodeNode(kv, nodePrefix)
			if err != nil {
				return err
			}
			st.Nodes = append(st.Nodes, n)
		case strings.HasPrefix(key, tombstonePrefix):
			n, err := decodeNode(kv, tombstonePrefix)
			if err != nil {
				return err
			}
			st.Tombstones = append(st.Tombstones, n)
		case strings.HasPrefix(key, banPrefix):
			b := &sutrav1.BanRecord{}
			if err := proto.Unmarshal(kv.Value, b); err != nil {
				return damaged(key, err)
			}
			if banPrefix+banID(b) != key {
				return damaged(key, fmt.Errorf("it bans %q", banID(b)))
			}
			st.Bans = append(st.Bans, b)
		}
		return nil
	})
	if err != nil {
		return State{}, fmt.Errorf("load the master's state from %s: %w", s.etcdDir(), err)
	}
	return st, nil
}

// scan calls visit for every key with the prefix, in order, as they were at one revision.
func (s *Store) scan(ctx context.Context, prefix string, visit func(*mvccpb.KeyValue) error) error {
	from, end, revision := prefix, clientv3.GetPrefixRangeEnd(prefix), int64(0)
	ctx, release := s.fatal.bind(ctx)
	defer release()
	for {
		page, err := s.client.Get(ctx, from,
			clientv3.WithRange(end), clientv3.WithLimit(pageSize), clientv3.WithRev(revision))
		if err != nil {
			return s.reason(err)
		}
		for _, kv := range page.Kvs {
			if err := visit(kv); err != nil {
				return err
			}
		}
		if !page.More {
			return nil
		}
		from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
		// Only the first page's header names the revision that was read; the later ones'
		// name the newest.
		if revision == 0 {
			revision = page.Header.Revision
		}
	}
}

func decodeNode(kv *mvccpb.KeyValue, prefix string) (*sutrav1.NodeRecord, error) {
	key, n := string(kv.Key), &sutrav1.NodeRecord{}
	if err := proto.Unmarshal(kv.Value, n); err != nil {
		return nil, damaged(key, err)
	}
	if id := n.GetNode().GetNodeId(); prefix+id != key {
		return nil, damaged(key, fmt.Errorf("it holds node %q", id))
	}
	return n, nil
}

func damaged(key string, err error) error {
	return fmt.Errorf("decode %s: %w; it was written by another version or is damaged: start the version that wrote it, "+
		"or move the folder away and start again, the master rebuilds from its agents", key, err)
}

// SaveAgent writes an agent's record, whether new or changed. Once it returns nil, the
// record survives the loss of the process and of power.
func (s *Store) SaveAgent(ctx context.Context, a *sutrav1.Agent) error {
	put, err := putOp(agentPrefix, a.GetAgentId(), a)
	if err == nil {
		_, err = s.commit(ctx, nil, put)
	}
	if err != nil {
		return fmt.Errorf("save agent %q: %w", a.GetAgentId(), err)
	}
	return nil
}

// ForgetAgent removes an agent's record, unless a newer one took its place meanwhile.
func (s *Store) ForgetAgent(ctx context.Context, a *sutrav1.Agent) (forgotten bool, err error) {
	put, err := putOp(agentPrefix, a.GetAgentId(), a)
	if err == nil {
		key := string(put.KeyBytes())
		forgotten, err = s.commit(ctx,
			[]clientv3.Cmp{clientv3.Compare(clientv3.Value(key), "=", string(put.ValueBytes()))}, clientv3.OpDelete(key))
	}
	if err != nil {
		return false, fmt.Errorf("forget agent %q: %w", a.GetAgentId(), err)
	}
	return forgotten, nil
}

// SaveNode writes a node's record, whether new or changed, as durably as SaveAgent.
func (s *Store) SaveNode(ctx context.Context, n *sutrav1.NodeRecord) error {
	put, err := putOp(nodePrefix, n.GetNode().GetNodeId(), n)
	if err == nil {
		_, err = s.commit(ctx, nil, put)
	}
	if err != nil {
		return fmt.Errorf("save node %q: %w", n.GetNode().GetNodeId(), err)
	}
	return nil
}

// ForgetNode removes a node's record without a trace: for a spawn that is undone. An
// unknown id is no error.
func (s *Store) ForgetNode(ctx context.Context, nodeID string) error {
	if _, err := s.commit(ctx, nil, clientv3.OpDelete(nodePrefix+nodeID)); err != nil {
		return fmt.Errorf("forget node %q: %w", nodeID, err)
	}
	return nil
}

// BuryNode turns a node's record into a tombstone, in one step. The record must have
// its ended_at set, from which Prune counts the tombstone's age.
func (s *Store) BuryNode(ctx context.Context, n *sutrav1.NodeRecord) error {
	id := n.GetNode().GetNodeId()
	put, err := putOp(tombstonePrefix, id, n)
	if err == nil && n.GetEndedAt() == nil {
		err = errors.New("its ended_at is not set")
	}
	if err == nil {
		_, err = s.commit(ctx, nil, clientv3.OpDelete(nodePrefix+id), put)
	}
	if err != nil {
		return fmt.Errorf("bury node %q: %w", id, err)
	}
	return nil
}

func putOp(prefix, id string, m proto.Message) (clientv3.Op, error) {
	if id == "" {
		return clientv3.Op{}, errors.New("it has no id")
	}
	// Deterministic, so that equal records are equal bytes.
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return clientv3.Op{}, fmt.Errorf("encode: %w", err)
	}
	return clientv3.OpPut(prefix+id, string(value)), nil
}

// commit is the one way of every write. It reports whether the conditions held; where
// they didn't, nothing was written.
func (s *Store) commit(ctx context.Context, conditions []clientv3.Cmp, ops ...clientv3.Op) (bool, error) {
	if err := s.fatal.err(); err != nil {
		return false, err
	}
	if err := s.checkFree(s.minFree); err != nil {
		return false, fmt.Errorf("%w; free some space, the master goes on by itself", err)
	}
	ctx, release := s.fatal.bind(ctx)
	defer release()
	resp, err := s.client.Txn(ctx).If(conditions...).Then(ops...).Commit()
	if err != nil {
		return false, s.reason(err)
	}
	return resp.Succeeded, nil
}

// reason prefers why etcd failed to what a call saw of it.
func (s *Store) reason(err error) error {
	if fatal := s.fatal.err(); fatal != nil {
		return fatal
	}
	return err
}
