package nodes

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// talking adds a profile that runs a shell's line, ready at once.
func talking(line string) func(*Config) {
	return func(c *Config) {
		p := c.Profiles["default"]
		p.Name, p.StorageBinary, p.Args = "talking", "/bin/sh", []string{"-c", line}
		c.Profiles["talking"] = p
	}
}

// tailed reads a part of a log; each piece is also told to the test as it comes.
func tailed(ctx context.Context, m *Manager, id string, r *sutrav1.LogRange, each ...func(*sutrav1.LogChunk)) (string, error) {
	var out strings.Builder
	err := m.TailLogs(ctx, id, r, func(c *sutrav1.LogChunk) error {
		out.Write(c.GetData())
		for _, f := range each {
			f(c)
		}
		return nil
	})
	return out.String(), err
}

func mustTail(t *testing.T, m *Manager, id string, r *sutrav1.LogRange) string {
	t.Helper()
	out, err := tailed(t.Context(), m, id, r)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestTailRanges(t *testing.T) {
	m := newManager(t)
	node := mustSpawn(t, m, want("node-1"))
	if out := mustTail(t, m, "node-1", nil); out != "" {
		t.Errorf("a silent node said %q", out)
	}
	const all = "one\ntwo\n\nfour\nfive"
	if err := os.WriteFile(m.logPath("node-1"), []byte(all), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		r    *sutrav1.LogRange
		want string
	}{
		"all":            {&sutrav1.LogRange{}, all},
		"no line":        {&sutrav1.LogRange{Tail: proto.Uint32(0)}, ""},
		"the last line":  {&sutrav1.LogRange{Tail: proto.Uint32(1)}, "five"},
		"an empty line":  {&sutrav1.LogRange{Tail: proto.Uint32(3)}, "\nfour\nfive"},
		"as many":        {&sutrav1.LogRange{Tail: proto.Uint32(5)}, all},
		"more":           {&sutrav1.LogRange{Tail: proto.Uint32(1 << 31)}, all},
		"from":           {&sutrav1.LogRange{Position: 4}, "two\n\nfour\nfive"},
		"from the end":   {&sutrav1.LogRange{Position: uint64(len(all))}, ""},
		"from beyond it": {&sutrav1.LogRange{Position: 1 << 63}, ""},
		"since long ago": {&sutrav1.LogRange{Since: timestamppb.New(time.Now().Add(-time.Hour))}, all},
		"since soon":     {&sutrav1.LogRange{Since: timestamppb.New(time.Now().Add(time.Hour))}, "five"}, // a line that goes on
	} {
		if got := mustTail(t, m, "node-1", c.r); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	_, err := tailed(t.Context(), m, "node-2", nil)
	expectReason(t, err, rpc.NodeNotFound)
	_, err = tailed(t.Context(), m, "node-2", &sutrav1.LogRange{Follow: true})
	expectReason(t, err, rpc.NodeNotFound)

	if _, err := m.Stop(t.Context(), node.GetNodeId()); err != nil {
		t.Fatal(err)
	}
	for _, follow := range []bool{false, true} {
		if out := mustTail(t, m, "node-1", &sutrav1.LogRange{Follow: follow}); out != all {
			t.Errorf("after the node's end, follow %v: %q", follow, out)
		}
	}
}

// Pieces end with lines, and add up at the positions that they name, however long the lines are.
func TestTailPieces(t *testing.T) {
	m := newManager(t)
	mustSpawn(t, m, want("node-1"))
	var all []byte
	for i := range 3000 {
		all = fmt.Appendf(all, "%d %s\n", i, strings.Repeat("x", i%100))
	}
	all = append(all, strings.Repeat("y", 300_000)+"\nlast\n"...)
	if err := os.WriteFile(m.logPath("node-1"), all, 0o600); err != nil {
		t.Fatal(err)
	}
	at := uint64(0)
	out, err := tailed(t.Context(), m, "node-1", nil, func(c *sutrav1.LogChunk) {
		n := uint64(len(c.GetData()))
		if n > 64<<10 || c.GetPosition() != at+n || c.GetSkipped() != 0 {
			t.Errorf("at %d: a piece of %d bytes to %d", at, n, c.GetPosition())
		}
		if at = c.GetPosition(); all[at-1] != '\n' && n != 64<<10 {
			t.Errorf("the piece to %d ends within a line", at)
		}
	})
	if err != nil || out != string(all) {
		t.Errorf("%v, %d bytes of %d", err, len(out), len(all))
	}
}

// A follower gets all that a node says through all its crashes, and its last words; then it is done.
func TestFollowThroughRestartsToTheEnd(t *testing.T) {
	m := newManager(t, talking(`trap 'echo last words; exit 0' TERM; echo begin; i=0; while [ $i -lt 5 ]; do i=$((i+1)); echo $i; sleep .01; done;
		[ -e calm ] || exit 1; while :; do sleep .01; done`))
	node := mustSpawn(t, m, want("node-1", as("talking")))
	seen := make(chan string, 1000)
	ended := make(chan error, 1)
	var out string
	go func() {
		var err error
		out, err = tailed(t.Context(), m, "node-1", &sutrav1.LogRange{Follow: true}, func(c *sutrav1.LogChunk) { seen <- string(c.GetData()) })
		ended <- err
	}()
	for begins := 0; begins < 3; {
		select {
		case piece := <-seen:
			begins += strings.Count(piece, "begin\n")
		case <-time.After(30 * time.Second):
			t.Fatal("no restart was followed")
		}
	}
	if err := os.WriteFile(node.GetStoragePath()+"/calm", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	awaitPhase(t, m, "node-1", sutrav1.Phase_PHASE_RUNNING)
	if _, err := m.Stop(t.Context(), "node-1"); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the follower didn't end with the node")
	}
	log, err := os.ReadFile(m.logPath("node-1"))
	if err != nil {
		t.Fatal(err)
	}
	if out != string(log) {
		t.Errorf("followed:\n%s\nwritten:\n%s", out, log)
	}
}

// A follower ends with its caller, with its sender's trouble, and with a node that failed and stays to be looked at.
func TestFollowersEnd(t *testing.T) {
	m := newManager(t)
	mustSpawn(t, m, want("node-1"))
	ctx, cancel := context.WithCancel(t.Context())
	_, err := tailed(ctx, m, "node-1", &sutrav1.LogRange{Follow: true}, func(*sutrav1.LogChunk) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	trouble := errors.New("nobody reads")
	err = m.TailLogs(t.Context(), "node-1", &sutrav1.LogRange{Follow: true}, func(*sutrav1.LogChunk) error { return trouble })
	if !errors.Is(err, trouble) {
		t.Errorf("nobody reads: %v", err)
	}

	given, up := context.WithCancel(t.Context())
	up()
	_, err = m.Spawn(given, want("node-2", as("dying")))
	expectReason(t, err, rpc.NotReadyYet)
	awaitPhase(t, m, "node-2", sutrav1.Phase_PHASE_FAILED)
	out, err := tailed(t.Context(), m, "node-2", &sutrav1.LogRange{Follow: true})
	if err != nil || out != "last words\n" {
		t.Errorf("of a failed node: %q, %v", out, err)
	}
}
