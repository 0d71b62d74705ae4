package store

import (
	"context"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// pruneBatch records go in one transaction: with 2 operations each they stay within
// the 128 that etcd allows.
const pruneBatch = 64

// Prune turns nodes that ended before nodesEndedBefore into tombstones, and removes
// tombstones of nodes that ended before tombstonesBefore. It returns how many records
// it moved or removed, also beside an error. What changes while it runs is left to the
// next call.
func (s *Store) Prune(ctx context.Context, nodesEndedBefore, tombstonesBefore time.Time) (int, error) {
	var prune pruning
	err := s.scan(ctx, nodePrefix, func(kv *mvccpb.KeyValue) error {
		n, err := decodeNode(kv, nodePrefix)
		if err != nil || !ended(n) || !endedBefore(n, nodesEndedBefore) {
			return err
		}
		step := removal(kv)
		step.ops = append(step.ops, clientv3.OpPut(tombstonePrefix+n.GetNode().GetNodeId(), string(kv.Value)))
		prune.add(step)
		return nil
	})
	if err == nil {
		err = s.scan(ctx, tombstonePrefix, func(kv *mvccpb.KeyValue) error {
			n, err := decodeNode(kv, tombstonePrefix)
			if err != nil || !endedBefore(n, tombstonesBefore) {
				return err
			}
			prune.add(removal(kv))
			return nil
		})
	}
	pruned := 0
	if err == nil {
		pruned, err = prune.commit(ctx, s)
	}
	if err != nil {
		return pruned, fmt.Errorf("prune ended nodes: %w", err)
	}
	return pruned, nil
}

// PruneAccess removes tokens that ended, or that were used up, before tokensBefore, and the records of identities whose last
// certificate ended before identitiesBefore. It returns and leaves the same as Prune.
func (s *Store) PruneAccess(ctx context.Context, tokensBefore, identitiesBefore time.Time) (int, error) {
	var prune pruning
	err := s.scan(ctx, tokenPrefix, func(kv *mvccpb.KeyValue) error {
		t, err := decodeToken(kv)
		if err == nil && over(t, tokensBefore) {
			prune.add(removal(kv))
		}
		return err
	})
	if err == nil {
		err = s.scan(ctx, identityPrefix, func(kv *mvccpb.KeyValue) error {
			rec, err := decodeIdentity(kv)
			if err == nil && rec.GetExpiresAt() != nil && rec.GetExpiresAt().AsTime().Before(identitiesBefore) {
				prune.add(removal(kv))
			}
			return err
		})
	}
	pruned := 0
	if err == nil {
		pruned, err = prune.commit(ctx, s)
	}
	if err != nil {
		return pruned, fmt.Errorf("prune tokens and identities: %w", err)
	}
	return pruned, nil
}

// over tells whether nobody could join with a token any more before t.
func over(token *sutrav1.TokenRecord, t time.Time) bool {
	if token.GetLocal() {
		return false
	}
	expired := token.GetExpiresAt() != nil && token.GetExpiresAt().AsTime().Before(t)
	return expired || token.GetUsesLeft() == 0 && token.GetLastUsedAt() != nil && token.GetLastUsedAt().AsTime().Before(t)
}

// pruning is what is to be pruned, in batches that each fit a transaction.
type pruning [][]pruneStep

func (p *pruning) add(step pruneStep) {
	if last := len(*p) - 1; last >= 0 && len((*p)[last]) < pruneBatch {
		(*p)[last] = append((*p)[last], step)
		return
	}
	*p = append(*p, []pruneStep{step})
}

// commit carries it out, and returns how many steps it did.
func (p pruning) commit(ctx context.Context, s *Store) (int, error) {
	pruned := 0
	for _, batch := range p {
		var conditions []clientv3.Cmp
		var ops []clientv3.Op
		for _, step := range batch {
			conditions = append(conditions, step.unchanged)
			ops = append(ops, step.ops...)
		}
		done, err := s.commit(ctx, conditions, ops...)
		if err != nil {
			return pruned, err
		}
		if done {
			pruned += len(batch)
		}
	}
	return pruned, nil
}

// pruneStep is what becomes of one record, on the condition that it is still the one
// that was judged.
type pruneStep struct {
	unchanged clientv3.Cmp
	ops       []clientv3.Op
}

func removal(kv *mvccpb.KeyValue) pruneStep {
	key := string(kv.Key)
	return pruneStep{
		unchanged: clientv3.Compare(clientv3.ModRevision(key), "=", kv.ModRevision),
		ops:       []clientv3.Op{clientv3.OpDelete(key)},
	}
}

func ended(n *sutrav1.NodeRecord) bool {
	phase := n.GetNode().GetPhase()
	return phase == sutrav1.Phase_PHASE_STOPPED || phase == sutrav1.Phase_PHASE_FAILED
}

func endedBefore(n *sutrav1.NodeRecord, t time.Time) bool {
	return n.GetEndedAt() != nil && n.GetEndedAt().AsTime().Before(t)
}
