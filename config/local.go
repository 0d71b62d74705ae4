package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// DefaultMaster is where a master listens that nobody told otherwise.
const DefaultMaster = "localhost:7000"

// Local is what a running role leaves under run/ in its home, so that the other roles
// of the same host and account find it without flags.
type Local struct {
	// Endpoint is the role's gRPC address, host:port.
	Endpoint string `json:"endpoint"`
	// HTTP is where /metrics and /healthz are, host:port; empty where they are off.
	HTTP string `json:"http,omitempty"`
	PID  int    `json:"pid"`
}

func localPath(home, name string) string { return filepath.Join(home, "run", name+".json") }

// Announce leaves l under the role's name and returns the function that takes it back.
func Announce(home, name string, l Local) (withdraw func() error, err error) {
	path := localPath(home, name)
	data, err := json.Marshal(l)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", path, err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make run folder: %w", err)
	}
	if err := WriteFile(path, data); err != nil {
		return nil, fmt.Errorf("announce %s: %w", name, err)
	}
	return func() error { return os.Remove(path) }, nil
}

// Announced is what the role of that name left when it last ran from this home; false where none did, or
// where it was withdrawn. A role that was killed can't withdraw it.
func Announced(home, name string) (Local, bool) {
	data, err := os.ReadFile(localPath(home, name))
	var l Local
	if err != nil || json.Unmarshal(data, &l) != nil || l.Endpoint == "" {
		return Local{}, false
	}
	return l, true
}

// LocalMaster is the endpoint of the master that runs, or last ran, from this home; DefaultMaster where none did.
func LocalMaster(home string) string {
	if l, ok := Announced(home, "master"); ok {
		return l.Endpoint
	}
	return DefaultMaster
}

// WriteFile replaces a file at once and durably: after a crash it holds the old content or the new.
func WriteFile(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			if rm := os.Remove(f.Name()); !errors.Is(rm, fs.ErrNotExist) {
				err = errors.Join(err, rm)
			}
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	// The folder's entry must last as well as the content.
	folder, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(folder.Sync(), folder.Close())
}

// ErrLocked is that of a Lock which another process has.
var ErrLocked = errors.New("another process has it")

// lockPatience is how long a lock is waited for. A process that was killed may leave a child that hasn't executed its
// program yet; until then that holds the lock.
const lockPatience = 2 * time.Second

// Lock takes the file at path for this process until unlock is called or the process ends. Where
// another process has it and keeps it for 2 s, the error is ErrLocked and says which.
func Lock(path string) (unlock func() error, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	for end := time.Now().Add(lockPatience); errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	}
	if err != nil {
		holder, _ := fs.ReadFile(os.DirFS(filepath.Dir(path)), filepath.Base(path))
		_ = f.Close() // nothing was written
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w, pid %s", ErrLocked, strings.TrimSpace(string(holder)))
		}
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	// The lock is the kernel's. The pid in the file only helps whoever is refused: a full disk keeps nobody from starting.
	if err := f.Truncate(0); err == nil {
		_, _ = fmt.Fprintln(f, os.Getpid())
	}
	return f.Close, nil
}

// Abandoned tells whether the file of a Lock is there and no process has it.
func Abandoned(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) == nil
}
