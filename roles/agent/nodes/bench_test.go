package nodes

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/supervisor"
)

// BenchmarkUsage measures a thousand nodes as often as an agent does by default, and tells which share of a core that
// takes in the long run: "core-%" all that is measured, "disk-core-%" of it for the disks, which are paced by themselves.
func BenchmarkUsage(b *testing.B) {
	const nodes, every = 1000, 10 * time.Second
	for name, groups := range map[string]bool{"control groups": true, "none": false} {
		b.Run(name, func(b *testing.B) {
			m := newManager(b, func(c *Config) {
				c.Agent.MaxNodes, c.Agent.DefaultMemoryMb = nodes, 1
				if !groups {
					return
				}
				var why []string
				if c.Cgroups, why = supervisor.OpenCgroups("sutra-" + c.Agent.GetInstanceId()); len(why) > 0 {
					b.Skip(why)
				}
				cgroups := c.Cgroups
				b.Cleanup(func() { // after the manager's end
					if err := cgroups.Remove(); err != nil {
						b.Error(err)
					}
				})
			})
			var spawns sync.WaitGroup
			slots := make(chan struct{}, 16)
			for i := range nodes {
				spawns.Go(func() {
					slots <- struct{}{}
					defer func() { <-slots }()
					if _, err := m.Spawn(b.Context(), want(fmt.Sprintf("node-%d", i))); err != nil {
						b.Error(err)
					}
				})
			}
			spawns.Wait()
			var disks time.Duration
			paths := []string{}
			for _, n := range m.List() {
				paths = append(paths, n.GetStoragePath())
			}
			began := cpu(b)
			for b.Loop() {
				m.measure()
				before := cpu(b)
				for _, path := range paths {
					var p pace // one that comes to no rest: the work is what counts
					_, _ = diskUse(b.Context(), path, &p)
				}
				disks += cpu(b) - before
			}
			all := cpu(b) - began
			measured, _ := m.Usage(0)
			if len(measured) != nodes {
				b.Errorf("%d nodes were measured, want %d", len(measured), nodes)
			}
			perRound := func(d time.Duration) float64 { return 100 * d.Seconds() / float64(b.N) / every.Seconds() }
			b.ReportMetric(perRound(all), "core-%")
			b.ReportMetric(perRound(disks), "disk-core-%")
		})
	}
}

// cpu is what this process has used so far.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var r unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
