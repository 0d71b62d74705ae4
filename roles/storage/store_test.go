package storage

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/rs/zerolog"
	"go.etcd.io/bbolt"
)

// process is the test binary run as a server.
type process struct {
	*client
	cmd *exec.Cmd
}

func startProcess(t *testing.T, path string) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), serverPath+"="+path)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	addr, err := bufio.NewReader(out).ReadString('\n')
	p := &process{client: newClient(t, strings.TrimSpace(addr)), cmd: cmd}
	t.Cleanup(p.kill)
	if err != nil {
		p.kill()
		t.Fatalf("start server: %v, it said %s", err, stderr.String())
	}
	return p
}

// kill returns once the process is gone, and may be called again.
func (p *process) kill() {
	_ = p.cmd.Process.Signal(syscall.SIGKILL)
	_ = p.cmd.Wait()
}

// TestAcknowledgedWritesSurviveKill lets each writer rewrite and delete keys of
// its own until the server is killed. Of a writer's keys all must be as they were
// acknowledged; only the one whose write was under way may be the newer.
func TestAcknowledgedWritesSurviveKill(t *testing.T) {
	const writers, keysEach, rounds, writesARound = 16, 5, 3, 1500
	path := t.TempDir()
	type writer struct {
		acked    map[string]string // "" is a key that isn't there
		inFlight string
		newer    string
	}
	all := make([]*writer, writers)
	for i := range all {
		all[i] = &writer{acked: map[string]string{}}
	}
	for round := range rounds {
		p := startProcess(t, path)
		var acks atomic.Int64
		var running sync.WaitGroup
		for i, w := range all {
			running.Go(func() {
				for n := 0; ; n++ {
					w.inFlight = fmt.Sprintf("w%02d/%d", i, n%keysEach)
					w.newer = fmt.Sprintf("%d.%d ", round, n) + strings.Repeat("x", n%3000)
					method := http.MethodPut
					if n%7 == 6 {
						method, w.newer = http.MethodDelete, ""
					}
					a, err := p.try(method, "/kv/"+w.inFlight, strings.NewReader(w.newer))
					if err != nil {
						return
					}
					if a.code != http.StatusNoContent {
						t.Errorf("%s was answered %d %s", method, a.code, a.body)
						return
					}
					w.acked[w.inFlight] = w.newer
					acks.Add(1)
				}
			})
		}
		await(t, "enough writes", func() bool { return t.Failed() || acks.Load() >= writesARound })
		p.kill()
		running.Wait()
		if t.Failed() {
			return
		}

		c, stop := start(t, path)
		present := 0
		for i, w := range all {
			for n := range keysEach {
				key := fmt.Sprintf("w%02d/%d", i, n)
				a := c.do(http.MethodGet, "/kv/"+key, "")
				got := string(a.body)
				if a.code == http.StatusNotFound {
					got = ""
				} else {
					present++
				}
				switch {
				case got == w.acked[key]:
				case key == w.inFlight && got == w.newer:
					w.acked[key] = got
				default:
					t.Errorf("round %d: %s is %.20q, acknowledged was %.20q", round, key, got, w.acked[key])
				}
			}
		}
		if listed, counted := len(c.list("").Keys), c.count(); listed != present || counted != present {
			t.Errorf("round %d: %d keys are there, %d listed, %d counted", round, present, listed, counted)
		}
		stop()
	}
}

func openError(t *testing.T, path string) string {
	t.Helper()
	s, err := New(Config{Listener: loopback(t), Path: path, Log: zerolog.Nop()})
	if err == nil {
		t.Fatal("opened", s.store.close())
	}
	return err.Error()
}

func expectSays(t *testing.T, got string, parts ...string) {
	t.Helper()
	for _, part := range parts {
		if !strings.Contains(got, part) {
			t.Errorf("error is %q, want one that says %q", got, part)
		}
	}
}

func TestASecondServerIsRefused(t *testing.T) {
	path := t.TempDir()
	p := startProcess(t, path)
	p.expect(204, "PUT", "/kv/k", "v")
	expectSays(t, openError(t, path), filepath.Join(path, fileName), "another server has it open")
	p.expectValue("/kv/k", "v")
	p.kill()
	c, stop := start(t, path)
	expectSays(t, openError(t, path), "another server has it open")
	c.expectValue("/kv/k", "v")
	stop()
	c, _ = start(t, path)
	c.expectValue("/kv/k", "v")
}

func TestNewRefuses(t *testing.T) {
	if _, err := New(Config{Path: t.TempDir()}); err == nil {
		t.Error("no listener was accepted")
	}
	expectSays(t, openError(t, ""), "no storage path")

	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	expectSays(t, openError(t, file), file, "not a directory")
	expectSays(t, openError(t, file+"/below"), file, "not a directory")
	// No user can make a folder there, not even root.
	expectSays(t, openError(t, "/proc/sutra"), "/proc/sutra", "may write")

	taken := t.TempDir()
	if err := os.Mkdir(filepath.Join(taken, fileName), 0o700); err != nil {
		t.Fatal(err)
	}
	expectSays(t, openError(t, taken), filepath.Join(taken, fileName), "is a directory")
}

func TestNewMakesAPrivateFolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b")
	c, _ := start(t, path)
	c.expect(204, "PUT", "/kv/k", "v")
	for name, want := range map[string]os.FileMode{path: 0o700, filepath.Join(path, fileName): 0o600} {
		info, err := os.Stat(name)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: mode %v, %v, want %v", name, info.Mode(), err, want)
		}
	}
}

func TestADamagedFileIsRefusedAndKept(t *testing.T) {
	whole := t.TempDir()
	c, stop := start(t, whole)
	for i := range 50 {
		c.expect(204, "PUT", fmt.Sprintf("/kv/%d", i), strings.Repeat("v", 5000))
	}
	stop()
	db, err := openDB(filepath.Join(whole, fileName))
	if err != nil {
		t.Fatal(err)
	}
	var used int64
	if err := errors.Join(db.View(func(tx *bbolt.Tx) error { used = tx.Size(); return nil }), db.Close()); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(filepath.Join(whole, fileName))
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	damage := map[string]func(b []byte) []byte{
		"not a store":          func(b []byte) []byte { return bytes.Repeat([]byte("garbage "), len(b)/8) },
		"short":                func(b []byte) []byte { return b[:100] },
		"one page":             func(b []byte) []byte { return b[:page] },
		"metas alone":          func(b []byte) []byte { return b[:2*page] },
		"end is missing":       func(b []byte) []byte { return b[:6*page] },
		"last page is missing": func(b []byte) []byte { return b[:int(used)-page] },
		"metas are damaged":    func(b []byte) []byte { clear(b[16:100]); clear(b[page+16 : page+100]); return b },
		"all but the metas is zero": func(b []byte) []byte {
			clear(b[2*page:])
			return b
		},
		"all but the metas is noise": func(b []byte) []byte {
			for i := range b[2*page:] {
				b[2*page+i] = byte(i*7919) | 1
			}
			return b
		},
	}
	for name, spoil := range damage {
		t.Run(name, func(t *testing.T) {
			path := t.TempDir()
			file := filepath.Join(path, fileName)
			bad := spoil(bytes.Clone(good))
			if err := os.WriteFile(file, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			expectSays(t, openError(t, path), file, "damaged", "move it away")
			if after, err := os.ReadFile(file); err != nil || !bytes.Equal(after, bad) {
				t.Errorf("the file has changed, %v", err)
			}
		})
	}
}

func TestAFullDiskRefusesWritesAndKeepsServing(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, "needs root to mount a small disk")
	}
	disk := t.TempDir()
	if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=4m"); err != nil {
		skip(t, fmt.Sprintf("needs to mount a small disk: %v", err))
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(disk, 0); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(disk, "data")
	value := strings.Repeat("0123456789abcdef", 16<<10)

	c, stop := start(t, path)
	stored := 0
	for {
		a := c.do(http.MethodPut, fmt.Sprintf("/kv/%d", stored), value)
		if a.code == http.StatusInsufficientStorage {
			expectSays(t, string(a.body), `"error"`, "disk is full")
			break
		}
		if a.code != http.StatusNoContent || stored > 16 {
			t.Fatalf("write %d was answered %d %s, want 507 in the end", stored, a.code, a.body)
		}
		stored++
	}
	check := func() {
		t.Helper()
		if n := c.count(); n != stored || len(c.list("").Keys) != stored {
			t.Errorf("%d keys counted, %q listed, %d stored", n, c.list("").Keys, stored)
		}
		for i := range stored {
			c.expectValue(fmt.Sprintf("/kv/%d", i), value)
		}
		c.expect(404, "GET", fmt.Sprintf("/kv/%d", stored), "")
	}
	check()
	stop()

	// Not a byte is left for the restart.
	rest, err := os.Create(filepath.Join(disk, "rest"))
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = rest.Write(make([]byte, 4096))
	}
	if closeErr := rest.Close(); closeErr != nil || !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err, closeErr)
	}
	c, _ = start(t, path)
	check()
	c.expect(507, "PUT", "/kv/more", value+value)
	check()
	if err := os.Remove(rest.Name()); err != nil {
		t.Fatal(err)
	}
	stored--
	c.expect(204, "DELETE", fmt.Sprintf("/kv/%d", stored), "")
	check()
	c.expect(204, "PUT", fmt.Sprintf("/kv/%d", stored), value)
	stored++
	check()
}
