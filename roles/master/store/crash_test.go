package store

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rs/zerolog"
)

// childHold keeps the store open until its stdin ends.
func childHold(dir string) error {
	s, err := Open(context.Background(), Config{Dir: dir, Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, "open")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return s.Close()
}

// childWrite saves nodes from several goroutines, each named on stdout once it is
// acknowledged, until it is killed.
func childWrite(dir string) error {
	s, err := Open(context.Background(), Config{Dir: dir, Log: zerolog.Nop()})
	if err != nil {
		return err
	}
	failed := make(chan error)
	for writer := range 4 {
		go func() {
			for i := 0; ; i++ {
				id := fmt.Sprintf("node-%d-%d-%d", os.Getpid(), writer, i)
				if err := s.SaveNode(context.Background(), node(id)); err != nil {
					failed <- err
					return
				}
				fmt.Fprintln(os.Stdout, id)
			}
		}()
	}
	return <-failed
}

func TestKilledMasterLosesNothingAcknowledged(t *testing.T) {
	dir := home(t)
	acknowledged := map[string]bool{}
	grid := ""
	for _, enough := range []int{1, 37, 400, 2500} {
		cmd := child(t, "write", dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// A child that hangs must not hang the test.
		watchdog := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
		seen, r := 0, bufio.NewReader(out)
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				break
			}
			if strings.HasPrefix(line, "error:") {
				t.Fatal(line)
			}
			acknowledged[strings.TrimSpace(line)] = true
			if seen++; seen == enough {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait()
		watchdog.Stop()
		if seen < enough {
			t.Fatalf("the writer was to acknowledge %d nodes, and did %d", enough, seen)
		}

		s := open(t, dir)
		st, err := s.Load(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if grid != "" && s.GridID() != grid {
			t.Errorf("grid id is %s, was %s", s.GridID(), grid)
		}
		grid = s.GridID()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		kept := map[string]bool{}
		for _, n := range st.Nodes {
			kept[n.GetNode().GetNodeId()] = true
		}
		for id := range acknowledged {
			if !kept[id] {
				t.Fatalf("lost %s, one of %d", id, len(acknowledged))
			}
		}
	}
}

// Killed at any moment of its first start, the next start makes a whole home of it.
func TestKilledInFirstStart(t *testing.T) {
	for _, delay := range []time.Duration{5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 120} {
		dir := home(t)
		cmd := child(t, "hold", dir)
		if _, err := cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.AfterFunc(delay*time.Millisecond, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		s := open(t, dir)
		if err := s.SaveNode(t.Context(), node("node-a")); err != nil {
			t.Errorf("killed after %v ms: %v", int(delay), err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestSecondMasterIsRefused(t *testing.T) {
	dir := home(t)
	cmd := child(t, "hold", dir)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	t.Cleanup(kill)
	defer stdin.Close()
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || line != "open\n" {
		t.Fatalf("the holder said %q, %v", line, err)
	}

	_, err = Open(t.Context(), Config{Dir: dir, Log: zerolog.Nop()})
	want := fmt.Sprintf("another process has it, pid %d", cmd.Process.Pid)
	if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v, want it to say %q and %s", err, want, dir)
	}

	kill()
	s := open(t, dir)
	_, err = Open(t.Context(), Config{Dir: dir, Log: zerolog.Nop()})
	if want := fmt.Sprintf("another process has it, pid %d", os.Getpid()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("second Open in one process: got %v, want it to say %q", err, want)
	}
	if err := s.SaveNode(t.Context(), node("node-a")); err != nil {
		t.Errorf("the first master is disturbed: %v", err)
	}
}
