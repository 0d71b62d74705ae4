package harness

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
)

var crashpointOnce = sync.OnceValues(func() (string, error) { return buildBeside("crashpoint") })

// CrashPoint is what will kill a process at a certain step; see the command crashpoint.
type CrashPoint struct {
	t      testing.TB
	victim *Process
	cmd    *exec.Cmd
	out    *bufio.Reader
}

// CrashAt lets a process live until its k-th step from now on; with 0, until End. It needs root.
func CrashAt(t testing.TB, victim *Process, k int) *CrashPoint {
	t.Helper()
	Need(t, "root")
	path, err := crashpointOnce()
	if err != nil {
		t.Fatal(err)
	}
	c := &CrashPoint{t: t, victim: victim, cmd: exec.CommandContext(t.Context(), path, fmt.Sprint(victim.PID()), fmt.Sprint(k))}
	c.cmd.Stderr = os.Stderr
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c.out = bufio.NewReader(out)
	if line, err := c.out.ReadString('\n'); line != "attached\n" {
		t.Fatalf("attach to %s: %q, %v", victim.Name, line, err)
	}
	return c
}

// End kills the process, if it hasn't come to its step. It returns how many steps there were, and which was the
// last one; empty where it didn't come so far.
func (c *CrashPoint) End() (steps int, last string) {
	c.t.Helper()
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil && c.victim.Running() {
		c.t.Fatal(err)
	}
	rest, err := io.ReadAll(c.out)
	if err != nil {
		c.t.Fatal(err)
	}
	if err := c.cmd.Wait(); err != nil {
		c.t.Fatalf("crashpoint: %v", err)
	}
	if _, err := fmt.Sscan(string(rest), &steps); err != nil {
		c.t.Fatalf("crashpoint said %q: %v", rest, err)
	}
	_, last, _ = strings.Cut(strings.TrimSpace(string(rest)), " ")
	c.victim.Wait()
	return steps, last
}
