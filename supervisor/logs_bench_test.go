package supervisor

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// A look at a thousand quiet logs, as it is due once a second, beside a thousand bare stats.
func BenchmarkQuietLogs(b *testing.B) {
	const count = 1000
	dir := b.TempDir()
	l, _ := smallLogs(b, dir, 1<<30)
	var ids []string
	for i := range count {
		id := fmt.Sprintf("node-%d", i)
		if err := os.WriteFile(l.Path(id), []byte("a line\n"), 0o600); err != nil {
			b.Fatal(err)
		}
		l.Watch(id)
		lookAt(l, id)
		ids = append(ids, id)
	}
	b.Run("stat", func(b *testing.B) {
		for b.Loop() {
			for _, id := range ids {
				if _, err := os.Stat(filepath.Join(dir, id+liveSuffix)); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("look", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			for _, id := range ids {
				lookAt(l, id)
			}
			l.fit(b.Context())
		}
	})
}

// The rotation of 8 MiB, the segment of a node's log by default, beside the bare copy with its fsync that it can't do without.
func BenchmarkRotation(b *testing.B) {
	const size = 8 << 20
	piece := bytes.Repeat([]byte("a line of a log that is long enough to look like one\n"), size/53+1)
	b.Run("copy", func(b *testing.B) {
		dir := b.TempDir()
		from := filepath.Join(dir, "from")
		if err := os.WriteFile(from, piece, 0o600); err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(len(piece)))
		for b.Loop() {
			in, err := os.Open(from)
			if err != nil {
				b.Fatal(err)
			}
			out, err := os.Create(filepath.Join(dir, "to"))
			if err != nil {
				b.Fatal(err)
			}
			if _, err := io.Copy(out, in); err != nil {
				b.Fatal(err)
			}
			if err := out.Sync(); err != nil {
				b.Fatal(err)
			}
			_, _ = in.Close(), out.Close()
		}
	})
	b.Run("rotate", func(b *testing.B) {
		l, err := OpenLogs(LogsConfig{Dir: b.TempDir()})
		if err != nil {
			b.Fatal(err)
		}
		l.Watch("a")
		b.SetBytes(int64(len(piece)))
		for b.Loop() {
			b.StopTimer()
			if err := appendTo(l.Path("a"), piece); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			lookAt(l, "a")
		}
	})
}
