// Package store is the master's durable state: agents, nodes and tombstones in a
// one-member etcd that runs inside the process and opens no socket.
package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/rs/xid"
	"github.com/rs/zerolog"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"

	"github.com/sutra-grid/sutra/config"
)

// Config says where the state lives.
type Config struct {
	// Dir is the master's home; it is made with mode 0700 where it is missing.
	Dir string
	// Log gets etcd's warnings and errors, each with etcd's own JSON in the field "etcd".
	Log zerolog.Logger
	// MinFreeBytes is how much must be free on Dir's file system for a write to be let
	// through; 0 means DefaultMinFree. A higher value refuses sooner, a value below
	// DefaultMinFree risks that etcd itself meets the full disk, which ends the master.
	MinFreeBytes uint64
}

// Store is safe for concurrent use.
type Store struct {
	dir     string
	minFree uint64
	gridID  string
	unlock  func() error // gives the home back
	etcd    *embed.Etcd
	client  *clientv3.Client
	fatal   *fatalHook

	closeOnce sync.Once
	closeErr  error
}

// Open locks c.Dir against a second master (the error is config.ErrLocked), starts etcd in it and waits until it answers.
// A fresh home gets a new grid id.
//
// After a failed Open the process should end: where etcd gave up half-way, its
// goroutines stay behind.
func Open(ctx context.Context, c Config) (*Store, error) {
	if c.Dir == "" {
		return nil, errors.New("open store: no folder given")
	}
	if c.MinFreeBytes == 0 {
		c.MinFreeBytes = DefaultMinFree
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open store: make the master's home: %w; let this user write there, or choose another home", err)
	}
	unlock, err := config.Lock(filepath.Join(c.Dir, "lock"))
	switch {
	case errors.Is(err, config.ErrLocked):
		return nil, fmt.Errorf("open store: a master already runs in %s: %w", c.Dir, err)
	case err != nil:
		return nil, fmt.Errorf("open store: lock the master's home: %w; let this user write there, or choose another home", err)
	}
	s := &Store{
		dir: c.Dir, minFree: c.MinFreeBytes, unlock: unlock,
		fatal: newFatalHook(),
	}
	if err := s.start(ctx, c.Log); err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	s.client = v3client.New(s.etcd.Server)
	if s.gridID, err = s.claimGridID(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open store: read or draw the grid id: %w", err), s.Close())
	}
	if err := s.firstStarted(); err != nil {
		return nil, errors.Join(fmt.Errorf("open store: end the first start: %w", err), s.Close())
	}
	return s, nil
}

// claimGridID returns the grid's id, drawn by whoever asks first.
func (s *Store) claimGridID(ctx context.Context) (string, error) {
	resp, err := s.client.Get(ctx, gridIDKey)
	if err != nil {
		return "", err
	}
	if len(resp.Kvs) == 1 {
		return string(resp.Kvs[0].Value), nil
	}
	id := xid.New().String()
	drawn, err := s.commit(ctx,
		[]clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(gridIDKey), "=", 0)},
		clientv3.OpPut(gridIDKey, id))
	if err != nil {
		return "", err
	}
	if !drawn {
		return s.claimGridID(ctx)
	}
	return id, nil
}

// GridID is drawn at random on the first start in a home and never changes.
func (s *Store) GridID() string { return s.gridID }

// Err delivers at most one error: the one that etcd can't go on after. From then on
// every call fails, and the process must end to release the home.
func (s *Store) Err() <-chan error { return s.fatal.errc }

// Close stops etcd, waits for it, and releases the home last. Calls under way fail.
// After a fatal error of etcd's (see Err) there is nothing left to wait for: Close
// returns at once and the home stays locked until the process ends.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		if s.fatal.err() != nil {
			return
		}
		if err := s.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
			s.closeErr = fmt.Errorf("close store: %w", err)
		}
		s.stopEtcd()
	})
	return s.closeErr
}

// stopEtcd releases the lock only where etcd has really let go of its files.
func (s *Store) stopEtcd() {
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.etcd.Close()
	}()
	select {
	case <-stopped:
		_ = s.unlock()
	case <-s.fatal.failed():
	}
}

func (s *Store) etcdDir() string { return filepath.Join(s.dir, "etcd") }
