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
	var batches [][]pruneStep
	add := func(step pruneStep) {
		if last := len(batches) - 1; last >= 0 && len(batches[last]) < pruneBatch {
			batches[last] = append(batches[last], step)
			return
		}
		batches = append(batches, []pruneStep{step})
	}
	err := s.scan(ctx, nodePrefix, func(kv *mvccpb.KeyValue) error {
		n, err := decodeNode(kv, nodePrefix)
		if err != nil || !ended(n) || !endedBefore(n, nodesEndedBefore) {
			return err
		}
		step := removal(kv)
		step.ops = append(step.ops, clientv3.OpPut(tombstonePrefix+n.GetNode().GetNodeId(), string(kv.Value)))
		add(step)
		return nil
	})
	if err == nil {
		err = s.scan(ctx, tombstonePrefix, func(kv *mvccpb.KeyValue) error {
			n, err := decodeNode(kv, tombstonePrefix)
			if err != nil || !endedBefore(n, tombstonesBefore) {
				return err
			}
			add(removal(kv))
			return nil
		})
	}
	if err != nil {
		return 0, fmt.Errorf("prune ended nodes: %w", err)
	}

	pruned := 0
	for _, batch := range batches {
		var conditions []clientv3.Cmp
		var ops []clientv3.Op
		for _, step := range batch {
			conditions = append(conditions, step.unchanged)
			ops = append(ops, step.ops...)
		}
		done, err := s.commit(ctx, conditions, ops...)
		if err != nil {
			return pruned, fmt.Errorf("prune ended nodes: %w", err)
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
