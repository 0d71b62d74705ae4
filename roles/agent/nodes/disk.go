package nodes

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// pace keeps work that can wait to a hundredth of a core: what took a moment is followed by a pause of a hundred.
// The zero pace has done nothing yet.
type pace struct {
	busy time.Duration // without a pause after it
}

// rest notes that something took so long, and pauses where that has come to more than a moment.
func (p *pace) rest(ctx context.Context, took time.Duration) {
	const moment = time.Millisecond
	if p.busy += took; p.busy >= moment {
		pause(ctx, 100*p.busy)
		p.busy = 0
	}
}

// diskUse adds up the blocks of all that lies under a path, itself included; a file with several names counts once. What
// goes away meanwhile, or can't be looked at, counts for nothing. ok is false where ctx ended first.
func diskUse(ctx context.Context, path string, p *pace) (bytes uint64, ok bool) {
	type inode struct{ device, number uint64 }
	linked := map[inode]bool{}
	// A data set with more such files is overestimated rather than remembered.
	const maxLinked = 100_000
	count := func(path string) (isDir bool) {
		var st unix.Stat_t
		if unix.Lstat(path, &st) != nil {
			return false
		}
		isDir = st.Mode&unix.S_IFMT == unix.S_IFDIR
		if at := (inode{st.Dev, st.Ino}); st.Nlink > 1 && !isDir && len(linked) < maxLinked {
			if linked[at] {
				return false
			}
			linked[at] = true
		}
		const block = 512 // of st_blocks, whatever the file system's are
		bytes += uint64(st.Blocks) * block
		return isDir
	}
	var folders []string
	began := time.Now()
	if count(path) {
		folders = []string{path}
	}
	rest := func() {
		p.rest(ctx, time.Since(began))
		began = time.Now()
	}
	for len(folders) > 0 {
		dir := folders[len(folders)-1]
		folders = folders[:len(folders)-1]
		f, err := openFolder(dir)
		if err != nil {
			continue
		}
		for {
			const batch = 128
			names, err := f.Readdirnames(batch)
			for _, name := range names {
				if at := filepath.Join(dir, name); count(at) {
					folders = append(folders, at)
				}
			}
			rest()
			if err != nil || ctx.Err() != nil {
				break
			}
		}
		_ = f.Close() // nothing was written
		if ctx.Err() != nil {
			return 0, false
		}
	}
	rest()
	return bytes, ctx.Err() == nil
}

// openFolder opens what was a folder when it was looked at. Whoever owns the one that it lies in may have put something else there
// since: no link is followed, and nothing is waited for.
func openFolder(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}
