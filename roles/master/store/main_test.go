package store

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// childEnv names what the test binary does instead of testing, in the folder childDir.
const (
	childEnv = "SUTRA_STORE_TEST_CHILD"
	childDir = "SUTRA_STORE_TEST_DIR"
)

// children run in a process of their own: to be killed, or because what they do to etcd
// can't be undone within a process.
var children = map[string]func(dir string) error{
	"hold":     childHold,
	"write":    childWrite,
	"exhaust":  childExhaust,
	"openonce": childOpenOnce,
}

func TestMain(m *testing.M) {
	if child, ok := children[os.Getenv(childEnv)]; ok {
		if err := child(os.Getenv(childDir)); err != nil {
			fmt.Fprintln(os.Stdout, "error:", err)
			os.Exit(3)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func child(t *testing.T, name, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+name, childDir+"="+dir)
	return cmd
}

// open fails the test where the store doesn't start, and closes it with the test.
func open(t testing.TB, dir string) *Store {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	s, err := Open(ctx, Config{Dir: dir, Log: zerolog.New(zerolog.NewTestWriter(t))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func home(t testing.TB) string { return filepath.Join(t.TempDir(), "master") }

func node(id string) *sutrav1.NodeRecord {
	return &sutrav1.NodeRecord{
		Node: &sutrav1.Node{
			NodeId: id, AgentId: "agent-001", Profile: "default", Port: 50051,
			Desired: sutrav1.Desired_DESIRED_RUNNING, StoragePath: "/srv/" + id, MemoryLimitMb: 512,
		},
		RequestId: "request-" + id,
		CreatedAt: timestamppb.New(epoch),
	}
}

func endedNode(id string, phase sutrav1.Phase, at time.Time) *sutrav1.NodeRecord {
	n := node(id)
	n.Node.Phase = phase
	n.EndedAt = timestamppb.New(at)
	return n
}

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)

// skip is for what this machine can't do; where SUTRA_TEST_NO_SKIP is 1 it fails.
func skip(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("SUTRA_TEST_NO_SKIP") == "1" {
		t.Fatalf("may not skip: "+format, args...)
	}
	t.Skipf(format, args...)
}
