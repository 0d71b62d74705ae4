package store

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.etcd.io/etcd/server/v3/embed"
)

// childOpenOnce opens the store, reads all of it, and reports the error on stdout.
func childOpenOnce(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := Open(ctx, Config{Dir: dir, Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	if _, err := s.Load(ctx); err != nil {
		return err
	}
	return s.Close()
}

// A damaged or foreign etcd folder ends neither in a crash nor in a hang, and the error says what
// to do. Each runs in a process of its own to see whether that survives.
func TestDamagedFolder(t *testing.T) {
	const moveAway = "move it away"
	overwrite := func(rel, with string, at int64) func(t *testing.T, etcd string) {
		return func(t *testing.T, etcd string) {
			f, err := os.OpenFile(only(t, filepath.Join(etcd, rel)), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte(with), at); err != nil {
				t.Fatal(err)
			}
		}
	}
	truncate := func(rel string, size int64) func(t *testing.T, etcd string) {
		return func(t *testing.T, etcd string) {
			if err := os.Truncate(only(t, filepath.Join(etcd, rel)), size); err != nil {
				t.Fatal(err)
			}
		}
	}
	const db, log = "member/snap/db", "member/wal/*.wal"
	garbage := strings.Repeat("garbage!", 8192)
	for name, tc := range map[string]struct {
		damage func(t *testing.T, etcd string)
		want   []string
	}{
		"db is garbage":           {overwrite(db, garbage, 0), []string{moveAway, "invalid database"}},
		"db pages are garbage":    {overwrite(db, garbage, 8192), []string{moveAway}},
		"db is truncated":         {truncate(db, 16384), []string{moveAway, "16384 bytes of"}},
		"db is a stub":            {truncate(db, 100), []string{moveAway}},
		"db is empty":             {truncate(db, 0), []string{moveAway, "is empty"}},
		"wal is garbage":          {overwrite(log, garbage, 0), []string{moveAway}},
		"wal records are garbage": {overwrite(log, garbage, 200), []string{moveAway}},
		"wal is truncated":        {truncate(log, 100), []string{moveAway}},
		"wal is empty":            {truncate(log, 0), []string{moveAway}},
		"wal is gone": {func(t *testing.T, etcd string) {
			if err := os.RemoveAll(filepath.Join(etcd, "member", "wal")); err != nil {
				t.Fatal(err)
			}
		}, []string{moveAway, "member/wal, is missing"}},
		"db is gone": {func(t *testing.T, etcd string) {
			if err := os.Remove(filepath.Join(etcd, db)); err != nil {
				t.Fatal(err)
			}
		}, []string{moveAway}},
		"a file in the folder's place": {func(t *testing.T, etcd string) {
			if err := os.RemoveAll(etcd); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(etcd, []byte("a file"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, []string{moveAway}},
		"a member of a larger cluster": {foreignMember, []string{moveAway, "one of several members"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := home(t)
			s := open(t, dir)
			for i := range 500 {
				if err := s.SaveNode(t.Context(), node(fmt.Sprintf("node-%d", i))); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			etcd := filepath.Join(dir, "etcd")
			tc.damage(t, etcd)
			out, err := child(t, "openonce", dir).CombinedOutput()
			if err == nil {
				t.Fatal("opened as if nothing were wrong")
			}
			msg := string(out)
			for _, want := range append(tc.want, etcd) {
				if !strings.Contains(msg, want) {
					t.Errorf("no %q in the error", want)
				}
			}
			if strings.Contains(msg, "goroutine") || strings.Count(msg, "\n") != 1 || !strings.HasPrefix(msg, "error: ") {
				t.Error("more than one line of error")
			}
			if t.Failed() {
				t.Logf("%.3000s", msg)
			}
		})
	}
}

// only is the one file that a pattern matches.
func only(t *testing.T, pattern string) string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) != 1 {
		t.Fatalf("%s: %d files, %v", pattern, len(files), err)
	}
	return files[0]
}

func foreignMember(t *testing.T, etcd string) {
	if err := os.RemoveAll(etcd); err != nil {
		t.Fatal(err)
	}
	s := &Store{dir: filepath.Dir(etcd), fatal: newFatalHook()}
	c := s.etcdConfig(zerolog.Nop())
	c.InitialCluster += ",b=http://127.0.0.1:1,c=http://127.0.0.1:2"
	c.InitialElectionTickAdvance = false
	e, err := embed.StartEtcd(c)
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.After(10 * time.Second)
	for len(e.Server.Cluster().Members()) != 3 {
		select {
		case <-deadline:
			t.Fatal("no members")
		case <-time.After(10 * time.Millisecond):
		}
	}
	e.Close()
}
