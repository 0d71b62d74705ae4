package nodes

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/supervisor"
)

var recordsBucket = []byte("nodes")

// records are the nodes' records on disk, by node id. Saves that come together share an fsync.
type records struct{ db *bbolt.DB }

// openRecords opens the file, or makes it. One that can't be read is put aside, under the name that is returned
// with an error that says what was wrong with it.
//
// The file is written anew each time: a database may be damaged where a reader doesn't come by, and end the agent at a
// later write.
func openRecords(path string) (r records, all []*sutrav1.ProcessRecord, aside string, err error) {
	all, err = readRecords(path)
	switch {
	case errors.Is(err, errDamaged):
		aside = fmt.Sprintf("%s.damaged-%d", path, time.Now().Unix())
		if mv := os.Rename(path, aside); mv != nil {
			return records{}, nil, "", errors.Join(err, mv)
		}
		all = nil
	case err != nil:
		return records{}, nil, "", err
	}
	r, again := writeRecords(path, all)
	if errors.Is(again, unix.ENOSPC) && aside != "" {
		// It takes the place that its successor needs. To look after the nodes comes before to find out what happened.
		if os.Remove(aside) == nil {
			aside += " (removed: the disk is full)"
		}
		r, again = writeRecords(path, all)
	}
	if errors.Is(again, unix.ENOSPC) && aside == "" {
		// There is no room for a new one: the agent goes on with the old one, so that somebody looks after the nodes.
		_ = os.Remove(path + ".new")
		r.db, again = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second, FreelistType: bbolt.FreelistMapType})
		if again == nil {
			r.db.MaxBatchDelay = 0
		}
	}
	if again != nil {
		return records{}, nil, "", fmt.Errorf("write records %s: %w", path, errors.Join(again, err))
	}
	return r, all, aside, err
}

// errDamaged marks a file whose content makes no sense.
var errDamaged = errors.New("the file is damaged")

// readRecords reads a file of records; there are none where there is no file yet.
func readRecords(path string) (all []*sutrav1.ProcessRecord, err error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0 {
		return nil, nil
	}
	// A file that is shorter than it says faults where it is read.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil { // bbolt panics on pages that make no sense
			all, err = nil, fmt.Errorf("read records %s: %w: %v", path, errDamaged, p)
		}
	}()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second, ReadOnly: true})
	if err != nil {
		// What the system doesn't object to, bbolt objects to the content of.
		if errno := unix.Errno(0); !errors.As(err, &errno) && !errors.Is(err, bolterrors.ErrTimeout) {
			err = fmt.Errorf("%w: %w", errDamaged, err)
		}
		return nil, fmt.Errorf("open records %s: %w", path, err)
	}
	err = db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(recordsBucket)
		if b == nil {
			return fmt.Errorf("%w: there are no records in it", errDamaged)
		}
		return b.ForEach(func(id, value []byte) error {
			rec := &sutrav1.ProcessRecord{}
			if err := proto.Unmarshal(value, rec); err != nil {
				return fmt.Errorf("%w: the record of %q can't be read: %w", errDamaged, id, err)
			}
			if of := rec.GetNode().GetNodeId(); of != string(id) || of == "" {
				return fmt.Errorf("%w: the record of %q is one of %q", errDamaged, id, of)
			}
			all = append(all, rec)
			return nil
		})
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return nil, fmt.Errorf("read records %s: %w", path, err)
	}
	return all, nil
}

// writeRecords replaces a file of records by a new one and opens that. After a crash the old one is there or the new one,
// whole.
func writeRecords(path string, all []*sutrav1.ProcessRecord) (r records, err error) {
	fresh := path + ".new"
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) { // of an agent that died here
		return records{}, err
	}
	db, err := bbolt.Open(fresh, 0o600, &bbolt.Options{Timeout: time.Second, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return records{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, db.Close())
		}
	}()
	db.MaxBatchDelay = 0
	err = db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket(recordsBucket)
		if err != nil {
			return err
		}
		for _, rec := range all {
			data, err := proto.Marshal(rec)
			if err != nil {
				return err
			}
			if err := b.Put([]byte(rec.GetNode().GetNodeId()), data); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return records{}, err
	}
	if err := os.Rename(fresh, path); err != nil {
		return records{}, err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return records{}, err
	}
	defer dir.Close()
	return records{db: db}, dir.Sync()
}

func (r records) save(rec *sutrav1.ProcessRecord) error {
	data, err := proto.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	err = r.db.Batch(func(tx *bbolt.Tx) error {
		return tx.Bucket(recordsBucket).Put([]byte(rec.GetNode().GetNodeId()), data)
	})
	if err != nil {
		return fmt.Errorf("write record of %s: %w", rec.GetNode().GetNodeId(), err)
	}
	return nil
}

func (r records) remove(id string) error {
	return r.db.Batch(func(tx *bbolt.Tx) error { return tx.Bucket(recordsBucket).Delete([]byte(id)) })
}

// recordMessage is how a unit's record is written.
func recordMessage(node *sutrav1.Node, r supervisor.Record) *sutrav1.ProcessRecord {
	if r.Completed {
		node = proto.CloneOf(node)
		node.Completed, node.Phase = true, sutrav1.Phase_PHASE_STOPPED
		if r.Failed {
			node.Phase = sutrav1.Phase_PHASE_FAILED
		}
	}
	rec := &sutrav1.ProcessRecord{
		Node: node, Pid: int32(r.Identity.PID), StartTicks: r.Identity.StartTicks, BootId: r.Identity.BootID, LogStart: r.LogStart,
		EverReady: r.EverReady, Restarts: uint32(r.Restarts), Crashes: uint32(r.Crashes), LastExit: exitMessage(r.LastExit),
		Ending: r.Ending, Ready: r.Ready, Exited: r.Exited, Cgroups: r.Cgroups, OomKills: r.OOMKills,
	}
	if !r.StartedAt.IsZero() {
		rec.StartedAt = timestamppb.New(r.StartedAt)
	}
	return rec
}

// recordOf is the unit's record that was written so.
func recordOf(rec *sutrav1.ProcessRecord) supervisor.Record {
	r := supervisor.Record{
		Identity: supervisor.Identity{PID: int(rec.GetPid()), StartTicks: rec.GetStartTicks(), BootID: rec.GetBootId()},
		LogStart: rec.GetLogStart(), EverReady: rec.GetEverReady(), Restarts: int(rec.GetRestarts()), Crashes: int(rec.GetCrashes()),
		Ending: rec.GetEnding(), Ready: rec.GetReady(), Exited: rec.GetExited(), Completed: rec.GetNode().GetCompleted(), Failed: rec.GetNode().GetPhase() == sutrav1.Phase_PHASE_FAILED,
		Cgroups: rec.GetCgroups(), OOMKills: rec.GetOomKills(),
	}
	if rec.GetStartedAt() != nil {
		r.StartedAt = rec.GetStartedAt().AsTime()
	}
	if e := rec.GetLastExit(); e != nil {
		r.LastExit = &supervisor.Exit{
			Code: int(e.GetCode()), Signal: e.GetSignal(), Unknown: e.GetUnknown(), OOMKilled: e.GetOomKilled(), At: e.GetAt().AsTime(),
			Output: e.GetOutput(), Cause: e.GetCause(),
		}
	}
	return r
}
