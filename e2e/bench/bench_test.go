// Package bench measures what users wait for, on the real binary, beside the floor
// of the same run: a bare fork and exec, a bare gRPC call.
package bench_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }

const sleepProfile = `
max_nodes = 2000
default_memory_mb = 1
[storage.profiles.sleep]
storage_binary = "/bin/sleep"
args = ["100000"]
ready = "none"
`

// times are the durations of one benchmark's iterations.
type times []time.Duration

func (t *times) since(start time.Time) { *t = append(*t, time.Since(start)) }

func (t times) quantile(q float64) time.Duration {
	if len(t) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(t))
	return sorted[int(q*float64(len(sorted)-1))]
}

// report gives p50 and p99, and the p50 as a multiple of the floor's.
func (t times) report(b *testing.B, floor times, name string) {
	b.Helper()
	b.ReportMetric(0, "ns/op") // p50 says more than a mean that one fsync spoils
	b.ReportMetric(float64(t.quantile(.5).Microseconds()), "p50-us")
	b.ReportMetric(float64(t.quantile(.99).Microseconds()), "p99-us")
	if len(floor) > 0 {
		b.ReportMetric(float64(floor.quantile(.5).Nanoseconds())/1e3, name+"-p50-us")
		b.ReportMetric(float64(t.quantile(.5))/float64(floor.quantile(.5)), "x-"+name)
	}
}

func grid(b *testing.B) *harness.Grid {
	b.Helper()
	g := harness.New(b)
	g.StartMaster()
	g.StartAgent("agent-001", sleepProfile)
	return g
}

// forkExec starts a sleep and ends it again as a stop does: how long its start takes, and its end.
func forkExec(b *testing.B, started, exited *times) {
	b.Helper()
	cmd := exec.Command("/bin/sleep", "100000")
	start := time.Now()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	started.since(start)
	start = time.Now()
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		b.Fatal(err)
	}
	_ = cmd.Wait() // ended by a signal, as it was told
	exited.since(start)
}

// BenchmarkSpawnStop: one node after the other, beside a bare fork and exec, and beside what the process itself takes to end.
func BenchmarkSpawnStop(b *testing.B) {
	g := grid(b)
	var spawn, stop, floor, exit times
	for b.Loop() {
		forkExec(b, &floor, &exit)
		start := time.Now()
		resp, err := g.Client().SpawnNode(b.Context(), &sutrav1.SpawnNodeRequest{Profile: "sleep"})
		if err != nil {
			b.Fatal(err)
		}
		spawn.since(start)
		start = time.Now()
		if _, err := g.Client().StopNode(b.Context(), &sutrav1.StopNodeRequest{NodeId: resp.GetNode().GetNodeId()}); err != nil {
			b.Fatal(err)
		}
		stop.since(start)
	}
	b.ReportMetric(float64(stop.quantile(.5).Microseconds()), "stop-p50-us")
	b.ReportMetric(float64(exit.quantile(.5).Microseconds()), "exit-p50-us")
	b.ReportMetric(float64((stop.quantile(.5) - exit.quantile(.5)).Microseconds()), "stop-beyond-exit-us")
	spawn.report(b, floor, "forkexec")
}

// BenchmarkStatus: live (two hops) and cached (one), beside a bare gRPC call of the same shape.
func BenchmarkStatus(b *testing.B) {
	g := grid(b)
	node := g.Spawn(&sutrav1.SpawnNodeRequest{Profile: "sleep"})
	bare := bareServer(b)
	for _, kind := range []struct {
		name   string
		cached bool
	}{{"live", false}, {"cached", true}} {
		b.Run(kind.name, func(b *testing.B) {
			var t, floor times
			req := &sutrav1.GetNodeStatusRequest{NodeId: node.GetNodeId(), CachedOnly: kind.cached}
			for b.Loop() {
				start := time.Now()
				if _, err := bare.GetNodeStatus(b.Context(), req); err != nil {
					b.Fatal(err)
				}
				floor.since(start)
				start = time.Now()
				resp, err := g.Client().GetNodeStatus(b.Context(), req)
				if err != nil {
					b.Fatal(err)
				}
				t.since(start)
				if want := resp.GetSource() == sutrav1.Source_SOURCE_CACHED; want != kind.cached {
					b.Fatalf("answered from %v: %s", resp.GetSource(), resp.GetReason())
				}
			}
			t.report(b, floor, "grpc")
		})
	}
}

// BenchmarkSpawn100: a hundred nodes by 8 clients at once; an iteration is the whole hundred.
func BenchmarkSpawn100(b *testing.B) {
	const nodes, clients = 100, 8
	g := grid(b)
	var all, floor times
	for b.Loop() {
		start := time.Now()
		parallel(clients, nodes, func(int) {
			if _, err := g.Client().SpawnNode(b.Context(), &sutrav1.SpawnNodeRequest{Profile: "sleep"}); err != nil {
				b.Error(err)
			}
		})
		all.since(start)
		running := g.Nodes(false)
		if len(running) != nodes {
			b.Fatalf("%d nodes run, want %d", len(running), nodes)
		}
		parallel(clients, nodes, func(i int) {
			if _, err := g.Client().StopNode(b.Context(), &sutrav1.StopNodeRequest{NodeId: running[i].GetNodeId()}); err != nil {
				b.Error(err)
			}
		})

		children := make([]*exec.Cmd, nodes)
		start = time.Now()
		parallel(clients, nodes, func(i int) {
			children[i] = exec.Command("/bin/sleep", "100000")
			if err := children[i].Start(); err != nil {
				b.Error(err)
			}
		})
		floor.since(start)
		for _, c := range children {
			if c.Process != nil {
				_ = c.Process.Kill() // ours, and not waited for yet
				_ = c.Wait()         // killed, as it was told
			}
		}
	}
	b.ReportMetric(nodes/all.quantile(.5).Seconds(), "nodes/s")
	all.report(b, floor, "forkexec")
}

// parallel calls f for 0 to n-1 from several goroutines.
func parallel(workers, n int, f func(i int)) {
	var next atomic.Int64
	var group sync.WaitGroup
	for range workers {
		group.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	group.Wait()
}

// bareServer answers GetNodeStatus with nothing behind it and nothing around it.
func bareServer(b *testing.B) sutrav1.GridMasterClient {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	srv := grpc.NewServer()
	sutrav1.RegisterGridMasterServer(srv, bareMaster{})
	go func() {
		if err := srv.Serve(l); err != nil {
			b.Errorf("serve: %v", err)
		}
	}()
	b.Cleanup(srv.Stop)
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := conn.Close(); err != nil {
			b.Error(err)
		}
	})
	return sutrav1.NewGridMasterClient(conn)
}

type bareMaster struct {
	sutrav1.UnimplementedGridMasterServer
}

func (bareMaster) GetNodeStatus(_ context.Context, req *sutrav1.GetNodeStatusRequest) (*sutrav1.GetNodeStatusResponse, error) {
	if req.GetNodeId() == "" {
		return nil, fmt.Errorf("no node asked for")
	}
	return &sutrav1.GetNodeStatusResponse{Node: &sutrav1.Node{NodeId: req.GetNodeId()}}, nil
}
