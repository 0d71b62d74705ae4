package store

import (
	"context"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func TestPrune(t *testing.T) {
	const stopped, failed = sutrav1.Phase_PHASE_STOPPED, sutrav1.Phase_PHASE_FAILED
	s := open(t, home(t))
	ctx := t.Context()
	before, after := epoch.Add(-time.Nanosecond), epoch
	oldGrave := epoch.Add(-time.Hour)

	for _, n := range []*sutrav1.NodeRecord{
		node("node-running"),
		endedNode("node-stopped-old", stopped, before),
		endedNode("node-failed-old", failed, oldGrave),
		endedNode("node-stopped-new", stopped, after),
		// Ended once, and running again.
		endedNode("node-restarted", sutrav1.Phase_PHASE_RUNNING, before),
	} {
		if err := s.SaveNode(ctx, n); err != nil {
			t.Fatal(err)
		}
	}
	failing := node("node-failing")
	failing.Node.Phase = failed
	if err := s.SaveNode(ctx, failing); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*sutrav1.NodeRecord{
		endedNode("node-grave-old", stopped, oldGrave.Add(-1)),
		endedNode("node-grave-new", stopped, oldGrave),
	} {
		if err := s.BuryNode(ctx, n); err != nil {
			t.Fatal(err)
		}
	}

	if n, err := s.Prune(ctx, epoch, oldGrave); n != 3 || err != nil {
		t.Errorf("pruned %d, %v; want 3", n, err)
	}
	want := State{
		Nodes: []*sutrav1.NodeRecord{
			failing,
			endedNode("node-restarted", sutrav1.Phase_PHASE_RUNNING, before),
			node("node-running"),
			endedNode("node-stopped-new", stopped, after),
		},
		Tombstones: []*sutrav1.NodeRecord{
			endedNode("node-failed-old", failed, oldGrave),
			endedNode("node-grave-new", stopped, oldGrave),
			endedNode("node-stopped-old", stopped, before),
		},
	}
	wantState(t, s, want)
	if n, err := s.Prune(ctx, epoch, oldGrave); n != 0 || err != nil {
		t.Errorf("pruned %d more, %v; want 0", n, err)
	}
	wantState(t, s, want)
}

func TestPruneMoreThanOneTransaction(t *testing.T) {
	s := open(t, home(t))
	const n = 3*pruneBatch + 1
	fillNodes(t, s, n, func(id string) *sutrav1.NodeRecord {
		return endedNode(id, sutrav1.Phase_PHASE_STOPPED, epoch)
	})
	later := epoch.Add(time.Second)
	for _, want := range []struct{ nodes, tombstones int }{{0, n}, {0, 0}} {
		if pruned, err := s.Prune(t.Context(), later, later); pruned != n || err != nil {
			t.Errorf("pruned %d, %v; want %d", pruned, err, n)
		}
		if st := load(t, s); len(st.Nodes) != want.nodes || len(st.Tombstones) != want.tombstones {
			t.Errorf("%d nodes and %d tombstones, want %v", len(st.Nodes), len(st.Tombstones), want)
		}
	}
}

// changing is a KV that lets a record change between the look and the write.
type changing struct {
	clientv3.KV
	change func()
}

func (c changing) Txn(ctx context.Context) clientv3.Txn {
	c.change()
	return c.KV.Txn(ctx)
}

// A node that is wanted again, or removed, while Prune runs stays as it was made.
func TestPruneLeavesWhatChanged(t *testing.T) {
	for name, change := range map[string]clientv3.Op{
		"changed":   clientv3.OpPut(nodePrefix+"node-a", "changed"),
		"forgotten": clientv3.OpDelete(nodePrefix + "node-a"),
	} {
		s := open(t, home(t))
		ctx := t.Context()
		if err := s.SaveNode(ctx, endedNode("node-a", sutrav1.Phase_PHASE_STOPPED, epoch)); err != nil {
			t.Fatal(err)
		}
		kv := s.client.KV
		s.client.KV = changing{kv, func() {
			if _, err := kv.Do(ctx, change); err != nil {
				t.Error(err)
			}
		}}
		if n, err := s.Prune(ctx, epoch.Add(1), epoch); n != 0 || err != nil {
			t.Errorf("%s: pruned %d, %v; want 0", name, n, err)
		}
		s.client.KV = kv
		left := map[string]string{}
		if err := s.scan(ctx, keyPrefix, func(pair *mvccpb.KeyValue) error {
			if key := string(pair.Key); key != gridIDKey {
				left[key] = string(pair.Value)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if name == "changed" && (len(left) != 1 || left[nodePrefix+"node-a"] != "changed") || name == "forgotten" && len(left) != 0 {
			t.Errorf("%s: left %q", name, left)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}
