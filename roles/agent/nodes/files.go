package nodes

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/supervisor"
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
	path, own := n.GetStoragePath(), m.ownFolder(n.GetNodeId())
	if path == "" || path == own { // the latter where the master wants it again
		return own, nil
	}
	if err := rpc.CheckStoragePath(path); err != nil {
		return "", err
	}
	resolved, err := resolve(path)
	if err != nil {
		return "", pathUnusable(path, err, nil)
	}
	if rpc.Overlap(resolved, m.cfg.Home) {
		return "", rpc.Invalid(rpc.Violation{
			Field: "storage_path", Description: "is, holds or lies within " + m.cfg.Home + ", where Sutra keeps what is its own",
		}).With("storage_path", path).WithHint("choose a folder elsewhere, or leave the path out for one of the node's own")
	}
	return resolved, m.allowed(path, resolved)
}

// allowed refuses a storage path that lies elsewhere than the agent's file allows; resolved is where it leads.
func (m *Manager) allowed(path, resolved string) error {
	if m.cfg.AllowedPaths == nil {
		return nil
	}
	for _, folder := range m.cfg.AllowedPaths {
		if folder, err := resolve(folder); err == nil && within(folder, resolved) {
			return nil
		}
	}
	leads := ""
	if resolved != filepath.Clean(path) {
		leads = ", which leads to " + resolved + ","
	}
	e := rpc.Errorf(rpc.PathUnusable, "storage path %s%s isn't within allowed_paths of agent %s", path, leads, m.cfg.Agent.GetAgentId()).
		With("storage_path", path)
	if len(m.cfg.AllowedPaths) == 0 {
		return e.WithHint("it allows none: leave the path out for a folder of the node's own")
	}
	return e.WithHint("choose a folder within %s, or leave the path out for one of the node's own", strings.Join(m.cfg.AllowedPaths, " or "))
}

// within tells whether a path is a folder's or lies in it; both are absolute and clean.
func within(folder, path string) bool {
	return len(path) >= len(folder) && rpc.Overlap(folder, path)
}

// resolve follows the symbolic links of a path as far as it exists.
func resolve(path string) (string, error) {
	rest := ""
	for at := filepath.Clean(path); ; at = filepath.Dir(at) {
		resolved, err := filepath.EvalSymlinks(at)
		if err == nil {
			return filepath.Join(resolved, rest), nil
		}
		if !errors.Is(err, fs.ErrNotExist) || at == "/" {
			return "", err
		}
		rest = filepath.Join(filepath.Base(at), rest)
	}
}

// ownFolder is where a node's data lies that has no path of its choice.
func (m *Manager) ownFolder(id string) string { return filepath.Join(m.cfg.Dir, "data", id) }

// prepare makes the folders of a node and finds out whether its data can be written.
func (m *Manager) prepare(id, storage string, p profile) (f files, err error) {
	log := m.logPath(id)
	_, err = os.Lstat(log)
	f = files{storage: storage, log: log, logged: err == nil}
	defer func() {
		if err != nil {
			f.undo()
		}
	}()
	user := credential(p)
	guarded := m.cfg.AllowedPaths != nil && storage != m.ownFolder(id)
	if err := f.make(user, guarded); err != nil {
		return f, pathUnusable(storage, err, p.RunAs)
	}
	if err := supervisor.As(user, func() error { return tryToWrite(storage, id) }); err != nil {
		return f, pathUnusable(storage, err, p.RunAs)
	}
	if err := os.MkdirAll(filepath.Dir(log), 0o700); err != nil {
		return f, pathUnusable(filepath.Dir(log), err, nil)
	}
	return f, nil
}

// make opens the way to the storage folder, each step in the one before, and makes those that are missing. Where somebody has put
// a symbolic link on it since the path was resolved, that isn't followed. What it makes on the way can be passed by the node's
// user, to whom the folder itself belongs; nil is the agent's own. Where the way is guarded, nobody else may be able to change it.
func (f *files) make(user *syscall.Credential, guarded bool) error {
	trusted := []uint32{0, uint32(os.Geteuid())}
	if user != nil {
		trusted = append(trusted, user.Uid)
	}
	at, err := supervisor.OpenIn(unix.AT_FDCWD, "/")
	if err != nil {
		return &fs.PathError{Op: "open", Path: "/", Err: err}
	}
	defer func() { _ = unix.Close(at) }() // nothing was written
	path, shared := "/", false
	for name := range strings.SplitSeq(strings.TrimPrefix(f.storage, "/"), "/") {
		var st unix.Stat_t
		if err := unix.Fstat(at, &st); err != nil {
			return &fs.PathError{Op: "look at", Path: path, Err: err}
		}
		if guarded {
			if err := alterable(&st, true, shared, trusted); err != nil {
				return &fs.PathError{Op: "pass", Path: path, Err: err}
			}
		}
		shared = st.Mode&unix.S_ISVTX != 0 && st.Mode&0o022 != 0
		path = filepath.Join(path, name)
		next, err := supervisor.OpenIn(at, name)
		if errors.Is(err, unix.ENOENT) {
			next, err = f.makeStep(at, name, path, user)
		}
		if err != nil {
			return &fs.PathError{Op: "open", Path: path, Err: err}
		}
		_ = unix.Close(at) // nothing was written
		at = next
	}
	if !guarded {
		return nil
	}
	var st unix.Stat_t
	err = unix.Fstat(at, &st)
	if err == nil {
		err = alterable(&st, false, shared, trusted)
	}
	if err != nil {
		return &fs.PathError{Op: "use", Path: path, Err: err}
	}
	return nil
}

// makeStep makes and opens a folder in another one.
func (f *files) makeStep(dir int, name, path string, user *syscall.Credential) (fd int, err error) {
	switch err := unix.Mkdirat(dir, name, 0o700); {
	case err == nil:
		f.created = append(f.created, path)
	case !errors.Is(err, unix.EEXIST): // else somebody else was faster, and it is theirs
		return -1, err
	default:
		user = nil
	}
	if fd, err = supervisor.OpenIn(dir, name); err != nil || user == nil {
		return fd, err
	}
	if path == f.storage {
		err = unix.Fchownat(fd, "", int(user.Uid), int(user.Gid), unix.AT_EMPTY_PATH)
	} else {
		err = letPass(fd)
	}
	if err != nil {
		_ = unix.Close(fd) // nothing was written
		return -1, err
	}
	return fd, nil
}

// letPass lets everybody on to what lies in a folder, as far as that lets them; they can't see what is in it.
func letPass(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	return unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), st.Mode&0o7777|0o011) // the descriptor itself is too weak
}

// alterable tells whether anybody but those who are trusted could put something else in the place of a step on the way to a
// storage folder, or of what follows it. shared: everybody may put things beside it, and take away their own. The last step's
// content is its owner's business.
func alterable(st *unix.Stat_t, onTheWay, shared bool, trusted []uint32) error {
	if (onTheWay || shared) && !slices.Contains(trusted, st.Uid) {
		return fmt.Errorf("it belongs to the user %d, who could put anything in its place", st.Uid)
	}
	if onTheWay && st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0 {
		return fmt.Errorf("others than its owner may change it (mode %04o), who could put anything in the storage's place", st.Mode&0o7777)
	}
	return nil
}

// tryToWrite is the only honest test whether a folder can be used: permissions, read-only mounts and full disks all show. The name
// is the node's own, so that what an agent leaves that dies here goes when the node is spawned again.
func tryToWrite(storage, id string) error {
	dir, err := supervisor.OpenFolder(storage)
	if err != nil {
		return err
	}
	defer dir.Close()
	at, name := int(dir.Fd()), ".sutra-probe-"+id
	fd, err := unix.Openat(at, name, unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &fs.PathError{Op: "write", Path: storage, Err: err}
	}
	_, err = unix.Write(fd, []byte{0})
	return errors.Join(err, unix.Close(fd), unix.Unlinkat(at, name, 0))
}

// undo removes what prepare made and what a process that never served left in it. Folders that were there before are
// not touched, and an outer folder only goes where it is empty.
func (f files) undo() {
	for _, path := range slices.Backward(f.created) {
		remove(path, path == f.storage) // what can't be removed stays: the spawn's own error matters more
	}
}

// remove removes a folder, to which no symbolic link may lead by now. One that isn't empty goes only where all of it is to go.
func remove(path string, all bool) {
	parent, err := supervisor.OpenFolder(filepath.Dir(path))
	if err != nil {
		return
	}
	defer parent.Close()
	if !all {
		_ = unix.Unlinkat(int(parent.Fd()), filepath.Base(path), unix.AT_REMOVEDIR) // fails, rightly, where somebody else uses it by now
		return
	}
	root, err := os.OpenRoot("/proc/self/fd/" + strconv.Itoa(int(parent.Fd())))
	if err != nil {
		return
	}
	defer root.Close()
	_ = root.RemoveAll(filepath.Base(path)) // as undo says
}

// openWays lets the users that nodes run as on to the folders of their data within the home. All else in it is for the agent's
// eyes alone.
func (m *Manager) openWays() error {
	if !slices.ContainsFunc(slices.Collect(maps.Values(m.cfg.Profiles)), func(p profile) bool { return credential(p) != nil }) {
		return nil
	}
	data := filepath.Dir(m.ownFolder("any"))
	if err := os.MkdirAll(data, 0o700); err != nil {
		return fmt.Errorf("make the folder of the nodes' data: %w", err)
	}
	ways := []string{data, m.cfg.Dir}
	for at := filepath.Dir(m.cfg.Dir); within(m.cfg.Home, at); at = filepath.Dir(at) {
		ways = append(ways, at)
	}
	for _, way := range ways {
		dir, err := supervisor.OpenFolder(way)
		if err == nil {
			err = errors.Join(letPass(int(dir.Fd())), dir.Close())
		}
		if err != nil {
			return fmt.Errorf("let the users that nodes run as on to their data: %w", err)
		}
	}
	return nil
}

// pathUnusable says why a path can't be used by a user; nil is the agent's own.
func pathUnusable(path string, err error, user *config.Account) *rpc.Error {
	where, who, whose := path, "", "the agent"
	if user != nil {
		who, whose = " by "+user.Name, user.Name
	}
	var at *fs.PathError
	if errors.As(err, &at) {
		where, err = at.Path, at.Err
	}
	why := err.Error()
	if where != path {
		why = where + ": " + why
	}
	if errors.Is(err, unix.ENOSPC) {
		return rpc.Errorf(rpc.DiskFull, "storage path %s can't be used%s: %s", path, who, why).
			With("storage_path", path).WithHint("free some space on that disk: df -h %s", path)
	}
	return rpc.Errorf(rpc.PathUnusable, "storage path %s can't be used%s: %s", path, who, why).
		With("storage_path", path).WithHint("it must be a folder that %s may get to and write to, or one that the agent can make", whose)
}

// binary returns the binary of a profile, if it can be executed.
func (m *Manager) binary(p profile) (string, error) {
	path, hint := p.StorageBinary, "install it there, or correct storage_binary in the agent's file and restart the agent"
	user := credential(p)
	if path == "" {
		if path = m.cfg.Builtin; user == nil {
			return path, nil
		}
		hint = "put sutra itself where that user may execute it, /usr/local/bin for example, and restart the agent"
	}
	who := ""
	if user != nil {
		who = " for " + p.RunAs.Name
	}
	bad := func(why string) error {
		return rpc.Errorf(rpc.BinaryUnusable, "storage binary %s of profile %s on %s %s", path, p.Name, m.cfg.Agent.GetAgentId(), why+who).
			With("storage_binary", path).WithHint("%s", hint)
	}
	return path, supervisor.As(user, func() error {
		info, err := os.Stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return bad("doesn't exist")
		case err != nil:
			return bad("can't be looked at: " + strings.TrimPrefix(err.Error(), "stat "+path+": "))
		case !info.Mode().IsRegular():
			return bad("isn't a file")
		case info.Mode().Perm()&0o111 == 0 || unix.Faccessat(unix.AT_FDCWD, path, unix.X_OK, unix.AT_EACCESS) != nil:
			return bad("isn't executable")
		}
		return nil
	})
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
