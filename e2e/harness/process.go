package harness

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// patience is how long anything may take before a test gives up; long, because machines can be slow, and
// nothing waits for it to pass.
const patience = 60 * time.Second

// Process is one running sutra.
type Process struct {
	t    testing.TB
	Name string
	Cmd  *exec.Cmd
	// LogPath holds its stderr.
	LogPath string

	done chan struct{}
}

// start runs the binary with its output in a file of the test's folder.
func start(t testing.TB, binary, dir, name string, env []string, args ...string) *Process {
	t.Helper()
	logPath := filepath.Join(dir, name+".log")
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	p := &Process{t: t, Name: name, Cmd: exec.CommandContext(context.WithoutCancel(t.Context()), binary, args...), LogPath: logPath, done: make(chan struct{})}
	p.Cmd.Env = env
	p.Cmd.Stdout, p.Cmd.Stderr = log, log
	p.Cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.Cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	go func() {
		_ = p.Cmd.Wait() // Wait reads the exit code from ProcessState
		close(p.done)
	}()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("---- log of %s\n%s", name, tail(p.Log(), 6000))
		}
	})
	return p
}

// PID of the process.
func (p *Process) PID() int { return p.Cmd.Process.Pid }

// Log is what the process wrote so far.
func (p *Process) Log() []byte {
	data, err := os.ReadFile(p.LogPath)
	if err != nil {
		p.t.Errorf("read log of %s: %v", p.Name, err)
	}
	return data
}

// Running tells whether the process hasn't ended.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Signal sends a signal to the process alone.
func (p *Process) Signal(sig syscall.Signal) {
	p.t.Helper()
	if err := p.Cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Fatalf("signal %s: %v", p.Name, err)
	}
}

// Wait waits for the end and returns the exit code; -1 where a signal ended it.
func (p *Process) Wait() int {
	p.t.Helper()
	select {
	case <-p.done:
		return p.Cmd.ProcessState.ExitCode()
	case <-time.After(patience):
		p.t.Errorf("%s didn't end; its goroutines:\n", p.Name)
		_ = p.Cmd.Process.Signal(syscall.SIGQUIT)
		<-p.done
		return -1
	}
}

// Kill ends the process at once, as a crash would.
func (p *Process) Kill() {
	p.t.Helper()
	p.Signal(syscall.SIGKILL)
	p.Wait()
}

// Stop asks the process to end and expects that it does so in good order.
func (p *Process) Stop() {
	p.t.Helper()
	p.Signal(syscall.SIGTERM)
	if code := p.Wait(); code != 0 {
		p.t.Errorf("%s ended with exit code %d after SIGTERM", p.Name, code)
	}
}

func tail(b []byte, n int) []byte {
	if len(b) > n {
		return b[bytes.IndexByte(b[len(b)-n:], '\n')+1+len(b)-n:]
	}
	return b
}
