package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"
	"go.uber.org/zap"
)

func TestOpenAndCloseLeaveNothing(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	dir := home(t)
	before := sockets(t)
	for range 2 {
		var log bytes.Buffer
		s, err := Open(t.Context(), Config{Dir: dir, Log: zerolog.New(&log)})
		if err != nil {
			t.Fatal(err)
		}
		if n := sockets(t); n != before {
			t.Errorf("%d sockets, were %d", n, before)
		}
		if err := s.SaveNode(t.Context(), node("node-a")); err != nil {
			t.Error(err)
		}
		for range 2 {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
		select {
		case err := <-s.Err():
			t.Errorf("Err after a good life: %v", err)
		default:
		}
		if err := s.SaveNode(t.Context(), node("node-b")); err == nil {
			t.Error("a closed store saves")
		}
		if _, err := s.Load(t.Context()); err == nil {
			t.Error("a closed store loads")
		}
		// People see etcd's warnings: a sound start must have none.
		for line := range strings.Lines(log.String()) {
			// On a slow machine etcd rightly complains of slowness.
			if !strings.Contains(line, "took") {
				t.Errorf("logged: %s", line)
			}
		}
	}
	for _, private := range []string{"", "etcd"} {
		if info, err := os.Stat(filepath.Join(dir, private)); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("mode of %q: %v, %v; want 0700", private, info.Mode(), err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "etcd.first-start")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the mark of a first start: %v", err)
	}
}

func sockets(t *testing.T) int {
	t.Helper()
	fds, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, "socket:") {
			n++
		}
	}
	return n
}

func TestNothingOnStdoutAndStderr(t *testing.T) {
	dir := home(t)
	for range 2 {
		if out, err := child(t, "openonce", dir).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%v, output %q", err, out)
		}
	}
}

func TestConfigWithoutDir(t *testing.T) {
	if _, err := Open(t.Context(), Config{Log: zerolog.Nop()}); err == nil {
		t.Error("opened")
	}
}

// An Open that is given up leaves the home to the next one.
func TestOpenGivenUp(t *testing.T) {
	dir := home(t)
	why := errors.New("changed my mind")
	for _, patience := range []time.Duration{0, 10 * time.Millisecond, 40 * time.Millisecond} {
		ctx, cancel := context.WithTimeoutCause(t.Context(), patience, why)
		s, err := Open(ctx, Config{Dir: dir, Log: zerolog.Nop()})
		cancel()
		if err == nil {
			err = s.Close()
		}
		if err != nil && !errors.Is(err, why) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("after %v: %v", patience, err)
		}
		deadline := time.Now().Add(20 * time.Second)
		for {
			s, err := Open(t.Context(), Config{Dir: dir, Log: zerolog.Nop()})
			if err == nil {
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				break
			}
			if time.Now().After(deadline) || !strings.Contains(err.Error(), "already runs") {
				t.Fatalf("after %v: %v", patience, err)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// Calls that are under way when the store closes end, each with the truth.
func TestCloseUnderLoad(t *testing.T) {
	dir := home(t)
	s := open(t, dir)
	var acknowledged sync.Map
	var count atomic.Int64
	enough := make(chan struct{})
	var writers sync.WaitGroup
	for w := range 8 {
		writers.Go(func() {
			for i := 0; ; i++ {
				id := fmt.Sprintf("node-%d-%d", w, i)
				if s.SaveNode(context.Background(), node(id)) != nil {
					return
				}
				acknowledged.Store(id, true)
				if count.Add(1) == 100 {
					close(enough)
				}
			}
		})
	}
	select {
	case <-enough:
	case <-time.After(20 * time.Second):
		t.Fatal("no 100 writes within 20 s")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	writers.Wait()

	kept := map[string]bool{}
	for _, n := range load(t, open(t, dir)).Nodes {
		kept[n.GetNode().GetNodeId()] = true
	}
	acknowledged.Range(func(id, _ any) bool {
		if !kept[id.(string)] {
			t.Errorf("lost %s", id)
		}
		return true
	})
}

func TestLogOfEtcd(t *testing.T) {
	var out bytes.Buffer
	lg := zap.New(&logCore{enc: newEncoder(), log: zerolog.New(&out)}).With(zap.String("member", "m")).Named("mvcc")
	lg.Info("not worth a line")
	lg.Warn("slow disk", zap.Duration("took", time.Second))
	lg.Error("lost a page", zap.Error(errors.New("torn")))
	var got []map[string]any
	for line := range strings.Lines(out.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("%v in %s", err, line)
		}
		got = append(got, m)
	}
	want := `[map[etcd:map[logger:mvcc member:m took:1s] level:warn message:etcd: slow disk] ` +
		`map[etcd:map[error:torn logger:mvcc member:m] level:error message:etcd: lost a page]]`
	if s := fmt.Sprint(got); s != want {
		t.Errorf("got  %s\nwant %s", s, want)
	}
}

func BenchmarkSaveNode(b *testing.B) {
	b.Run("one", func(b *testing.B) {
		s := open(b, home(b))
		for i := 0; b.Loop(); i++ {
			if err := s.SaveNode(b.Context(), node(fmt.Sprintf("node-%d", i%1000))); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("parallel", func(b *testing.B) {
		s := open(b, home(b))
		b.SetParallelism(64)
		var ids atomic.Int64
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				if err := s.SaveNode(b.Context(), node(fmt.Sprintf("node-%d", ids.Add(1)%1000))); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

func BenchmarkOpen(b *testing.B) {
	dir := home(b)
	if err := open(b, dir).Close(); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		s, err := Open(b.Context(), Config{Dir: dir, Log: zerolog.Nop()})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
