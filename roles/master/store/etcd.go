package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/rs/zerolog"
	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
)

// quotaBytes bounds etcd's database. A node's record is some 300 bytes, so that it is
// a bound for accidents only; etcd's own advice ends at 8 GiB.
const quotaBytes = 2 << 30

// readyWithin is for an etcd that runs but can't elect itself, now or ever; a sound one
// takes 0.1 s.
const readyWithin = 10 * time.Second

func (s *Store) etcdConfig(log zerolog.Logger) *embed.Config {
	c := embed.NewConfig()
	// Neither the name nor the default peer address, which stands for the member in
	// etcd's books, is ever dialed or listened on. Both are fixed with the first start.
	c.Name = "master"
	c.InitialCluster = c.InitialClusterFromName(c.Name)
	c.Dir = s.etcdDir()
	c.ListenPeerUrls, c.ListenClientUrls, c.AdvertiseClientUrls = nil, nil, nil
	// Alone, a member is its own majority: fast ticks cost nothing and it elects itself
	// within 0.1 s.
	c.TickMs, c.ElectionMs = 10, 100
	c.QuotaBackendBytes = quotaBytes
	// Nothing reads old revisions; every 5 minutes all but the last 1,000 go.
	c.AutoCompactionMode, c.AutoCompactionRetention = embed.CompactorModeRevision, "1000"
	// A segment has 64 MB. Those behind the last snapshot serve followers only, and etcd's
	// default would keep five of them.
	c.MaxWalFiles = 2
	c.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(&logCore{enc: newEncoder(), log: log},
		zap.WithFatalHook(s.fatal), zap.WithPanicHook(s.fatal), zap.ErrorOutput(zapDiscard{io.Discard})))
	return c
}

// start leaves etcd running and s.etcd set, or else the home unlocked. Only where etcd
// met a fatal error after it began to run, or still hangs in its start, it keeps the lock.
func (s *Store) start(ctx context.Context, log zerolog.Logger) error {
	if err := s.checkHome(); err != nil {
		_ = s.unlock()
		return err
	}
	type result struct {
		etcd *embed.Etcd
		err  error
	}
	started := make(chan result, 1)
	go func() {
		etcd, err := startEtcd(s.etcdConfig(log))
		started <- result{etcd, err}
	}()
	select {
	case r := <-started:
		if r.err != nil {
			_ = s.unlock()
			return s.explain(r.err)
		}
		s.etcd = r.etcd
	case <-s.fatal.failed():
		_ = s.unlock()
		return s.explain(s.fatal.err())
	case <-ctx.Done():
		// etcd's start can't be interrupted: it is undone once it is through.
		go func() {
			select {
			case r := <-started:
				if r.err != nil {
					_ = s.unlock()
					return
				}
				s.etcd = r.etcd
				s.stopEtcd()
			case <-s.fatal.failed():
			}
		}()
		return fmt.Errorf("start etcd in %s: %w", s.etcdDir(), context.Cause(ctx))
	}

	patience := time.NewTimer(readyWithin)
	defer patience.Stop()
	select {
	case <-s.etcd.Server.ReadyNotify():
		return nil
	case <-s.fatal.failed():
		return s.explain(s.fatal.err())
	case <-patience.C:
		s.stopEtcd()
		return s.explain(fmt.Errorf("no leader within %v: its log and its database don't belong together, "+
			"or it is one of several members", readyWithin))
	case <-ctx.Done():
		s.stopEtcd()
		return fmt.Errorf("wait for etcd in %s: %w", s.etcdDir(), context.Cause(ctx))
	}
}

// startEtcd turns etcd's panics on what it finds on disk into errors, also those of
// reading a memory-mapped page that the file is too short for.
func startEtcd(c *embed.Config) (etcd *embed.Etcd, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer recoverTo(&err)
	return embed.StartEtcd(c)
}

func recoverTo(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("it can't be read: %v", p)
	}
}

// checkHome prepares a first start, and finds what etcd would meet in a goroutine of its
// own, where its panics can't be caught or where it would wait for ever.
func (s *Store) checkHome() error {
	fresh, err := s.firstStart()
	if err != nil || fresh {
		return err
	}
	// To open its log etcd allocates another segment. Without, it may fail at once, or
	// much later: when it needs that segment.
	if err := s.checkFree(s.minFree); err != nil {
		return fmt.Errorf("%w; free some space and start again", err)
	}
	member := filepath.Join(s.etcdDir(), "member")
	if !wal.Exist(filepath.Join(member, "wal")) {
		return s.explain(errors.New("its log, member/wal, is missing"))
	}
	db := filepath.Join(member, "snap", "db")
	err = checkDB(db)
	if errors.Is(err, berrors.ErrTimeout) {
		return fmt.Errorf("another process, perhaps an etcd, has %s open; stop it or choose another home", db)
	}
	return s.explain(err)
}

// firstStart says whether etcd has yet to write its first log. An etcd that is killed
// before it has, leaves a folder that it can never start from. So a mark stands beside
// the folder until the first start is through, and what is found with a mark goes.
//
// Invariant: with the mark there, nothing in the folder was ever acknowledged.
func (s *Store) firstStart() (bool, error) {
	_, err := os.Stat(s.mark())
	switch {
	case err == nil:
		if err := os.RemoveAll(s.etcdDir()); err != nil {
			return false, fmt.Errorf("remove what an interrupted first start left: %w", err)
		}
	case !errors.Is(err, os.ErrNotExist):
		return false, s.explain(err)
	}
	entries, err := os.ReadDir(s.etcdDir())
	if len(entries) > 0 {
		return false, nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return false, s.explain(err)
	}
	// A new log takes one segment and allocates the next.
	if err := s.checkFree(s.minFree + 2*uint64(wal.SegmentSizeBytes)); err != nil {
		return false, fmt.Errorf("%w; free some space and start again", err)
	}
	if err := os.WriteFile(s.mark(), nil, 0o600); err != nil {
		return false, s.explain(err)
	}
	return true, syncDir(s.dir)
}

// firstStarted ends the first start. It must be durable before the first write is
// acknowledged.
func (s *Store) firstStarted() error {
	if err := os.Remove(s.mark()); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	}
	return syncDir(s.dir)
}

func (s *Store) mark() string { return filepath.Join(s.dir, "etcd.first-start") }

// syncDir makes what was created and removed in a folder durable.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// checkDB reads every page that etcd will.
func checkDB(path string) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer recoverTo(&err)
	// A read-only open of an empty file fails in words that say nothing.
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.Size() == 0 {
		return fmt.Errorf("%s is empty", path)
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	return db.View(func(tx *bbolt.Tx) error {
		if info.Size() < tx.Size() {
			return fmt.Errorf("%s has %d bytes of %d", path, info.Size(), tx.Size())
		}
		return tx.ForEach(func(_ []byte, b *bbolt.Bucket) error {
			return b.ForEach(func(_, _ []byte) error { return nil })
		})
	})
}

// explain adds to an error of etcd's start what to do about it.
func (s *Store) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC):
		return fmt.Errorf("start etcd in %s: %w: %w; free some space and start again", s.etcdDir(), ErrDiskFull, err)
	case errors.Is(err, os.ErrPermission), errors.Is(err, syscall.EROFS):
		return fmt.Errorf("start etcd in %s: %w; let this user write there, or choose another home", s.etcdDir(), err)
	default:
		return fmt.Errorf("start etcd in %s: %w; if the folder is damaged, move it away and start again: "+
			"the master rebuilds from its agents", s.etcdDir(), err)
	}
}
