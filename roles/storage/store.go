package storage

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/sutra-grid/sutra/rpc"
)

const (
	fileName = "kv.db"
	// lockWait is long enough for a server that is just ending, and short enough to refuse a second one at once.
	lockWait = 100 * time.Millisecond
	// batchDelay is what a lone writer waits for others to share its fsync.
	batchDelay = 500 * time.Microsecond
	// mapSize is address space, not memory: a store grows this far before its file must be mapped anew, and the pages that
	// a truncated file lacks lie inside of the mapping, where reading them faults and doesn't hit a neighbour's memory.
	mapSize = 1 << 30
)

// bucketName is the bucket of all keys. Invariant: its sequence is the number of
// its keys, so that counting them costs no scan.
var bucketName = []byte("kv")

// store is the keys and values on disk. Its reads copy, so that no transaction
// stays open for as long as a client takes to receive: the file would grow for
// as long, and writers wait when it must be mapped anew.
type store struct {
	db *bbolt.DB
}

// errDamaged is what a file is called that no server should write to.
var errDamaged = errors.New("the file is damaged or is not a store")

// openStore opens the store in a folder, and makes what is missing.
func openStore(folder string) (*store, error) {
	const advice = "it needs a folder where this user may write, on a disk with room"
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return nil, fmt.Errorf("make storage folder %s: %w: %s", folder, err, advice)
	}
	file := filepath.Join(folder, fileName)
	db, err := openDB(file)
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, rpc.Errorf(rpc.PathInUse, "open store %s: another server has it open", file).With("storage_path", folder).
			WithHint("stop that one, or choose another path")
	case errors.Is(err, errDamaged):
		return nil, fmt.Errorf("open store %s: %w: put a copy of it back, or move it away to start empty", file, err)
	case err != nil:
		return nil, fmt.Errorf("open store %s: %w: %s", file, err, advice)
	}
	return &store{db: db}, nil
}

// openDB opens the file, finds out whether it is whole enough to be used, and
// makes the bucket of a new one.
func openDB(file string) (db *bbolt.DB, err error) {
	// bbolt panics on damaged pages, and reads those that a truncated file lacks through a mapping.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			db, err = nil, fmt.Errorf("%w (%v)", errDamaged, p)
		}
	}()
	db, err = bbolt.Open(file, 0o600, &bbolt.Options{Timeout: lockWait, FreelistType: bbolt.FreelistMapType, InitialMmapSize: mapSize})
	if err != nil {
		// What comes neither from the system nor from the lock, bbolt says of the file's content.
		if _, system := errors.AsType[syscall.Errno](err); !system && !errors.Is(err, bolterrors.ErrTimeout) {
			err = fmt.Errorf("%w (%w)", errDamaged, err)
		}
		return nil, err
	}
	if err = checkSize(db, file); err == nil {
		err = makeBucket(db, file)
	}
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	db.MaxBatchDelay = batchDelay
	return db, nil
}

// checkSize refuses a file that lacks pages at its end: reading one would end the process.
func checkSize(db *bbolt.DB, file string) error {
	info, err := os.Stat(file)
	if err != nil {
		return err
	}
	return db.View(func(tx *bbolt.Tx) error {
		if info.Size() < tx.Size() {
			return fmt.Errorf("%w (%d bytes of %d are there)", errDamaged, info.Size(), tx.Size())
		}
		return nil
	})
}

// makeBucket doesn't write to a file that has the bucket, so that a store opens
// on a full disk too.
func makeBucket(db *bbolt.DB, file string) error {
	made := false
	if err := db.View(func(tx *bbolt.Tx) error {
		made = tx.Bucket(bucketName) != nil
		return nil
	}); err != nil || made {
		return err
	}
	if err := db.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucket(bucketName)
		return err
	}); err != nil {
		return err
	}
	// The file's entry must be as durable as what will be written into it.
	folder, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}

func (s *store) close() error {
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("close store: %w", err)
	}
	return nil
}

// put returns once the value is on disk. Concurrent writers share an fsync, and
// where that fails its error.
func (s *store) put(key string, value []byte) error {
	return s.db.Batch(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketName)
		if b.Get([]byte(key)) == nil {
			if err := b.SetSequence(b.Sequence() + 1); err != nil {
				return err
			}
		}
		return b.Put([]byte(key), value)
	})
}

// remove returns once the key is gone from the disk, also where there was none.
func (s *store) remove(key string) error {
	return s.db.Batch(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketName)
		if b.Get([]byte(key)) == nil {
			return nil
		}
		if err := b.SetSequence(b.Sequence() - 1); err != nil {
			return err
		}
		return b.Delete([]byte(key))
	})
}

// get returns a copy of the value, and false where there is no such key.
func (s *store) get(key string) (value []byte, ok bool, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		found := tx.Bucket(bucketName).Get([]byte(key))
		value, ok = bytes.Clone(found), found != nil
		return nil
	})
	return value, ok, err
}

// count is the number of keys.
func (s *store) count() (n uint64, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		n = tx.Bucket(bucketName).Sequence()
		return nil
	})
	return n, err
}

// list returns the first keys in byte order that have the prefix and come behind
// after, at most limit, and whether there are more.
func (s *store) list(prefix, after string, limit int) (keys []string, more bool, err error) {
	keys = []string{}
	err = s.db.View(func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucketName).Cursor()
		for k, _ := c.Seek([]byte(max(prefix, after))); k != nil && strings.HasPrefix(string(k), prefix); k, _ = c.Next() {
			if string(k) == after {
				continue
			}
			if len(keys) == limit {
				more = true
				return nil
			}
			keys = append(keys, string(k))
		}
		return nil
	})
	return keys, more, err
}
