package supervisor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrDir is in the error of a start whose directory couldn't be opened.
var ErrDir = errors.New("go to its directory")

// OpenFolder opens a folder, no part of whose absolute path may be a symbolic link: it lies where its path says, whoever has put
// something else on the way since that was looked at. The descriptor names the folder, and nothing can be read from it.
func OpenFolder(path string) (*os.File, error) {
	path = filepath.Clean(path)
	at, err := OpenIn(unix.AT_FDCWD, "/")
	for end := 0; err == nil && end < len(path) && path != "/"; {
		begin := end + 1
		if end = strings.IndexByte(path[begin:], '/') + begin; end < begin {
			end = len(path)
		}
		var next int
		if next, err = OpenIn(at, path[begin:end]); err != nil {
			err = &fs.PathError{Op: "open", Path: path[:end], Err: err}
		}
		_ = unix.Close(at) // nothing was written
		at = next
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(at), path), nil
}

// OpenIn opens a folder in another one, as OpenFolder does.
func OpenIn(dir int, name string) (fd int, err error) {
	for {
		fd, err = unix.Openat(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOTDIR):
			return -1, fmt.Errorf("%w, or a symbolic link to one", err)
		default:
			return fd, err
		}
	}
}
