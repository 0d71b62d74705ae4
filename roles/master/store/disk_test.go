package store

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"golang.org/x/sys/unix"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// smallDisk mounts a tmpfs for the test.
func smallDisk(t *testing.T, mib int) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm", mib)); err != nil {
		skip(t, "can't mount a tmpfs (needs root): %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fill leaves so many bytes free on the disk that holds the home of a running store, or
// less; remove what it returns to undo it.
func fill(disk string, leave uint64) (string, error) {
	if err := awaitSpareSegment(disk); err != nil {
		return "", err
	}
	path := filepath.Join(disk, "filler")
	f, err := os.Create(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	chunk := make([]byte, 1<<20)
	for {
		var st unix.Statfs_t
		if err := unix.Statfs(disk, &st); err != nil {
			return "", err
		}
		free := st.Bavail * uint64(st.Bsize)
		if free <= leave {
			return path, nil
		}
		if _, err := f.Write(chunk[:min(free-leave, uint64(len(chunk)))]); errors.Is(err, syscall.ENOSPC) {
			return path, nil
		} else if err != nil {
			return "", err
		}
	}
}

// awaitSpareSegment waits until etcd has allocated its log's next segment, which it does
// in the background.
func awaitSpareSegment(disk string) error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		spare, err := filepath.Glob(filepath.Join(disk, "master", "etcd", "member", "wal", "*.tmp"))
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if len(spare) == 1 && unix.Stat(spare[0], &st) == nil && st.Blocks*512 >= wal.SegmentSizeBytes {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no spare log segment within 20 s: %v", spare)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestFullDiskRefusesWritesAndRecovers(t *testing.T) {
	disk := smallDisk(t, 320)
	s := open(t, filepath.Join(disk, "master"))
	ctx := t.Context()
	if err := s.SaveNode(ctx, node("node-before")); err != nil {
		t.Fatal(err)
	}
	for _, leave := range []uint64{DefaultMinFree - 1<<20, 0} {
		filler, err := fill(disk, leave)
		if err != nil {
			t.Fatal(err)
		}
		for name, write := range map[string]func() error{
			"SaveNode":   func() error { return s.SaveNode(ctx, node("node-during")) },
			"BuryNode":   func() error { return s.BuryNode(ctx, endedNode("node-before", 0, epoch)) },
			"ForgetNode": func() error { return s.ForgetNode(ctx, "node-before") },
		} {
			err := write()
			if !errors.Is(err, ErrDiskFull) || !strings.Contains(err.Error(), s.dir) || !strings.Contains(err.Error(), "free some space") {
				t.Errorf("%s with %d bytes free: got %v, want ErrDiskFull and what to do", name, leave, err)
			}
		}
		st, err := s.Load(ctx)
		if err != nil || len(st.Nodes) != 1 {
			t.Errorf("load with %d bytes free: %d nodes, %v", leave, len(st.Nodes), err)
		}
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		if err := s.SaveNode(ctx, node("node-before")); err != nil {
			t.Errorf("save once there is space: %v", err)
		}
	}
	select {
	case err := <-s.Err():
		t.Error(err)
	default:
	}

	filler, err := fill(disk, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(ctx, Config{Dir: s.dir, Log: zerolog.Nop()}); !errors.Is(err, ErrDiskFull) ||
		!strings.Contains(err.Error(), "start again") {
		t.Errorf("start on a full disk: %v, want ErrDiskFull and what to do", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	wantState(t, open(t, s.dir), State{Nodes: []*sutrav1.NodeRecord{node("node-before")}})
}

// A log segment that is used up just before writes are refused still finds room for the
// next: etcd fails for good where it doesn't.
func TestLogGrowsOnAnAlmostFullDisk(t *testing.T) {
	disk := smallDisk(t, 800)
	s := open(t, filepath.Join(disk, "master"))
	ctx := t.Context()
	big := node("node-big")
	big.Node.Reason = strings.Repeat("x", 1<<20)
	// etcd gives a write up after 5 s, which it may take on a busy machine.
	persist := func() (err error) {
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
			if err = s.SaveNode(ctx, big); !errors.Is(err, rpctypes.ErrTimeout) {
				return err
			}
		}
		return err
	}
	for range 57 {
		if err := persist(); err != nil {
			t.Fatal(err)
		}
	}
	filler, err := fill(disk, DefaultMinFree+30<<20)
	if err != nil {
		t.Fatal(err)
	}
	for range 200 {
		if err = persist(); err != nil {
			break
		}
	}
	if !errors.Is(err, ErrDiskFull) {
		t.Fatalf("got %v, want ErrDiskFull", err)
	}
	if segments, _ := filepath.Glob(filepath.Join(s.etcdDir(), "member", "wal", "*.wal")); len(segments) != 2 {
		t.Fatalf("%d log segments, the test is about the step to the second", len(segments))
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	for i := range 70 {
		if err := persist(); err != nil {
			t.Fatalf("save %d MiB after there is space: %v", i, err)
		}
	}
}

func TestFirstStartOnTooSmallADisk(t *testing.T) {
	dir := filepath.Join(smallDisk(t, 100), "master")
	_, err := Open(t.Context(), Config{Dir: dir, Log: zerolog.Nop()})
	if !errors.Is(err, ErrDiskFull) || !strings.Contains(err.Error(), "218 MiB needed") {
		t.Errorf("got %v, want ErrDiskFull", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "etcd")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was left in the home: %v", err)
	}
}

// childExhaust fills the disk behind a store that is as good as unguarded, so that etcd
// meets the full disk.
func childExhaust(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := Open(ctx, Config{Dir: dir, Log: zerolog.Nop(), MinFreeBytes: 1})
	if err != nil {
		return err
	}
	if err := s.SaveNode(ctx, node("node-before")); err != nil {
		return err
	}
	if _, err := fill(filepath.Dir(dir), 8<<20); err != nil {
		return err
	}
	big := node("node-big")
	big.Node.Reason = strings.Repeat("x", 1<<20)
	var under error
	for under == nil {
		under = s.SaveNode(ctx, big)
	}
	select {
	case err := <-s.Err():
		if !errors.Is(err, syscall.ENOSPC) {
			return fmt.Errorf("Err: %w, want ENOSPC", err)
		}
	case <-ctx.Done():
		return errors.New("Err says nothing")
	}
	// The write that met the failure ends with it; whether it was kept is unknown.
	if !errors.Is(under, syscall.ENOSPC) && !errors.Is(under, ErrDiskFull) {
		return fmt.Errorf("write under way: %w", under)
	}
	if _, err := s.Load(ctx); !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("load afterwards: %w", err)
	}
	if err := s.SaveNode(ctx, node("node-after")); !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("write afterwards: %w", err)
	}
	if err := s.Close(); err != nil {
		return fmt.Errorf("close: %w", err)
	}
	if _, err := Open(ctx, Config{Dir: dir, Log: zerolog.Nop()}); err == nil {
		return errors.New("the home is unlocked though etcd still holds its files")
	}
	return nil
}

func TestFatalErrorOfEtcd(t *testing.T) {
	disk := smallDisk(t, 320)
	dir := filepath.Join(disk, "master")
	if out, err := child(t, "exhaust", dir).CombinedOutput(); err != nil || len(out) > 0 {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := os.Remove(filepath.Join(disk, "filler")); err != nil {
		t.Fatal(err)
	}
	st, err := open(t, dir).Load(t.Context())
	if err != nil || len(st.Nodes) == 0 || st.Nodes[len(st.Nodes)-1].GetNode().GetNodeId() == "node-after" {
		t.Errorf("after a restart on a disk with space: %v, %v", st.Nodes, err)
	}
}

func TestHomeThatCantBeWritten(t *testing.T) {
	disk := smallDisk(t, 320)
	dir := filepath.Join(disk, "master")
	s := open(t, dir)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", disk, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		skip(t, "can't remount read-only: %v", err)
	}
	for _, dir := range []string{dir, filepath.Join(disk, "other")} {
		_, err := Open(t.Context(), Config{Dir: dir, Log: zerolog.Nop()})
		if !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "choose another home") {
			t.Errorf("got %v, want read-only, %s and what to do", err, dir)
		}
	}
}
