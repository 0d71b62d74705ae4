package nodes

import (
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// files are what a spawn made on disk, so that a failed one can take it back.
type files struct {
	storage string
	// created are the folders that weren't there before, outermost first.
	created []string
	log     string
	// logged: the log was there before, with what earlier processes of the node wrote.
	logged bool
}

// storagePath is where a node's data lies: the path asked for with its symbolic links resolved as far
// as it exists, so that two names of one place are known as one; else a folder of its own.
func (m *Manager) storagePath(n *sutrav1.Node) (string, error) {
	path, own := n.GetStoragePath(), filepath.Join(m.cfg.Dir, "data", n.GetNodeId())
	if path == "" || path == own { // the latter where the master wants it again
		return own, nil
	}
	if err := rpc.CheckStoragePath(path); err != nil {
		return "", err
	}
	rest := ""
	for at := filepath.Clean(path); ; at = filepath.Dir(at) {
		resolved, err := filepath.EvalSymlinks(at)
		if err == nil {
			resolved = filepath.Join(resolved, rest)
			if rpc.Overlap(resolved, m.cfg.Home) {
				return "", rpc.Invalid(rpc.Violation{
					Field: "storage_path", Description: "is, holds or lies within " + m.cfg.Home + ", where Sutra keeps what is its own",
				}).With("storage_path", path).WithHint("choose a folder elsewhere, or leave the path out for one of the node's own")
			}
			return resolved, nil
		}
		if !errors.Is(err, fs.ErrNotExist) || at == "/" {
			return "", pathUnusable(path, err)
		}
		rest = filepath.Join(filepath.Base(at), rest)
	}
}

// prepare makes the folders of a node and finds out whether its data can be written.
func prepare(id, storage, log string) (f files, err error) {
	_, err = os.Lstat(log)
	f = files{storage: storage, log: log, logged: err == nil}
	for at := storage; ; at = filepath.Dir(at) {
		if _, err := os.Lstat(at); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		f.created = append([]string{at}, f.created...)
	}
	defer func() {
		if err != nil {
			f.undo()
		}
	}()
	if err := os.MkdirAll(storage, 0o700); err != nil {
		return f, pathUnusable(storage, err)
	}
	// To try is the only honest test: permissions, read-only mounts and full disks all show here. The name is the node's
	// own, so that what an agent leaves that dies here goes when the node is spawned again.
	probe, err := os.OpenFile(filepath.Join(storage, ".sutra-probe-"+id), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return f, pathUnusable(storage, err)
	}
	_, err = probe.Write([]byte{0})
	err = errors.Join(err, probe.Close(), os.Remove(probe.Name()))
	if err != nil {
		return f, pathUnusable(storage, err)
	}
	if err := os.MkdirAll(filepath.Dir(log), 0o700); err != nil {
		return f, pathUnusable(filepath.Dir(log), err)
	}
	return f, nil
}

// undo removes what prepare made and what a process that never served left in it. Folders that were there before are
// not touched, and an outer folder only goes where it is empty.
func (f files) undo() {
	for i := len(f.created) - 1; i >= 0; i-- {
		if f.created[i] == f.storage {
			_ = os.RemoveAll(f.storage) // what can't be removed stays: the spawn's own error matters more
			continue
		}
		_ = os.Remove(f.created[i]) // fails, rightly, where somebody else uses it by now
	}
}

func pathUnusable(path string, err error) *rpc.Error {
	var at *fs.PathError
	if errors.As(err, &at) {
		err = at.Err
	}
	if errors.Is(err, unix.ENOSPC) {
		return rpc.Errorf(rpc.DiskFull, "storage path %s can't be used: %v", path, err).
			With("storage_path", path).WithHint("free some space on that disk: df -h %s", path)
	}
	return rpc.Errorf(rpc.PathUnusable, "storage path %s can't be used: %v", path, err).
		With("storage_path", path).WithHint("it must be a folder that the agent may write to, or one that it can make")
}

// binary returns the binary of a profile, if it can be executed.
func (m *Manager) binary(p profile) (string, error) {
	path := p.StorageBinary
	if path == "" {
		return m.cfg.Builtin, nil
	}
	bad := func(why string) error {
		return rpc.Errorf(rpc.BinaryUnusable, "storage binary %s of profile %s on %s %s", path, p.Name, m.cfg.Agent.GetAgentId(), why).
			With("storage_binary", path).WithHint("install it there, or correct storage_binary in the agent's file and restart the agent")
	}
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", bad("doesn't exist")
	case err != nil:
		return "", bad("can't be looked at: " + strings.TrimPrefix(err.Error(), "stat "+path+": "))
	case !info.Mode().IsRegular():
		return "", bad("isn't a file")
	case info.Mode().Perm()&0o111 == 0 || unix.Access(path, unix.X_OK) != nil:
		return "", bad("isn't executable")
	}
	return path, nil
}

// WarnOfBinaries names the profiles whose binary couldn't be run now. It may be installed later: a spawn looks again.
func (m *Manager) WarnOfBinaries() {
	for _, name := range slices.Sorted(maps.Keys(m.cfg.Profiles)) {
		if _, err := m.binary(m.cfg.Profiles[name]); err != nil {
			e := rpc.AsError(err)
			m.cfg.Log.Warn().Str("profile", name).Str("storage_binary", m.cfg.Profiles[name].StorageBinary).Str("hint", e.Hint).
				Msg(e.Message + "; until that is mended, no node of that profile can be started")
		}
	}
}
