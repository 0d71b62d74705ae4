package nodes

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/supervisor"
)

// A unit's record comes back as it was, whatever fields it has.
func TestRecordsKeepAllThatAUnitHas(t *testing.T) {
	at := time.Unix(1700000000, 5).UTC()
	r := supervisor.Record{
		Identity: supervisor.Identity{PID: 1, StartTicks: 2, BootID: "boot"}, Cgroups: map[string]string{"memory": "/memory/node"}, OOMKills: 6, StartedAt: at, LogStart: 3,
		EverReady: true, Ready: true, Exited: true, Restarts: 4, Crashes: 5, Ending: "hung", Completed: true, Failed: true,
		LastExit: &supervisor.Exit{Code: -1, Signal: "SIGKILL", At: at, Output: "last words", Unknown: true, OOMKilled: true, Cause: "hung"},
	}
	for i, v := 0, reflect.ValueOf(r); i < v.NumField(); i++ {
		if v.Field(i).IsZero() {
			t.Errorf("%s isn't tried", v.Type().Field(i).Name)
		}
	}
	if diff := cmp.Diff(r, recordOf(recordMessage(want("node-1"), r))); diff != "" {
		t.Errorf("(-written +read):\n%s", diff)
	}
}

// writtenRecords is a file of records as an agent leaves it that has had some nodes come and go.
func writtenRecords(t testing.TB) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "nodes.db")
	r, _, _, err := openRecords(path)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 60 {
		rec := &sutrav1.ProcessRecord{Node: want(fmt.Sprintf("node-%d", i)), Pid: int32(i), BootId: "boot", LastExit: &sutrav1.Exit{Output: string(make([]byte, 200))}}
		if err := r.save(rec); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 30 {
		if err := r.remove(fmt.Sprintf("node-%d", 2*i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.db.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Whatever bytes the file of records has, it can be opened, by way of a new one where it makes no sense, and takes
// records from then on.
func FuzzDamagedRecords(f *testing.F) {
	whole := writtenRecords(f)
	f.Add(uint32(0), []byte{}, uint32(0))
	f.Add(uint32(0), []byte("no database"), uint32(0))
	for _, page := range []uint32{0, 1, 2, 3, 4, 5, 6, 7, 8} {
		for _, at := range []uint32{0, 8, 10, 12, 16, 24, 32, 200} { // headers, metas, elements, values
			f.Add(page*4096+at, []byte{0, 0, 0, 0, 0, 0, 0, 0}, uint32(0))
			f.Add(page*4096+at, []byte{0xff, 0xff, 0xff, 0xff}, uint32(0))
			f.Add(page*4096+at, []byte{1, 0, 4, 0}, uint32(0))
		}
		f.Add(uint32(0), []byte{}, page*4096+7)
	}
	f.Fuzz(func(t *testing.T, at uint32, with []byte, length uint32) {
		data := append([]byte(nil), whole...)
		if int(at) < len(data) {
			copy(data[at:], with)
		}
		if length > 0 && int(length) < len(data) {
			data = data[:length]
		}
		path := filepath.Join(t.TempDir(), "nodes.db")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		r, all, aside, err := openRecords(path)
		if err != nil && aside == "" {
			t.Fatalf("it can't be opened: %v", err)
		}
		// What was read is what there is from now on: records come, are replaced and go.
		left := map[string]bool{"node-new": true}
		for i, rec := range all {
			if id := rec.GetNode().GetNodeId(); i%2 == 0 {
				left[id] = true
				rec = proto.CloneOf(rec)
				rec.Restarts = 7
				err = r.save(rec)
			} else {
				err = r.remove(id)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := r.save(&sutrav1.ProcessRecord{Node: want("node-new"), Restarts: 7}); err != nil {
			t.Fatal(err)
		}
		if err := r.db.Close(); err != nil {
			t.Fatal(err)
		}
		r, all, aside, err = openRecords(path)
		if err != nil || aside != "" {
			t.Fatalf("opened again: %v, put aside as %q", err, aside)
		}
		defer r.db.Close()
		for _, rec := range all {
			if id := rec.GetNode().GetNodeId(); !left[id] || rec.GetRestarts() != 7 {
				t.Errorf("read again: %v", rec)
			}
			delete(left, rec.GetNode().GetNodeId())
		}
		if len(left) > 0 {
			t.Errorf("not read again: %v", left)
		}
	})
}
