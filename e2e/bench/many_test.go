package bench_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// pss is a process's share of the memory that it uses, in MiB: what it shares with others counts in part.
func pss(b *testing.B, pid int) float64 {
	b.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		b.Fatal(err)
	}
	for line := range bytes.Lines(data) {
		var kib int
		if n, _ := fmt.Sscanf(string(line), "Pss: %d kB", &kib); n == 1 {
			return float64(kib) / 1024
		}
	}
	b.Fatalf("no Pss in %s", data)
	return 0
}

// children are the processes that a process has forked and that live.
func children(b *testing.B, pid int) (count int) {
	b.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		b.Fatal(err)
	}
	for _, t := range tasks {
		pids, err := os.ReadFile(t)
		if err == nil { // else the thread has ended
			count += len(bytes.Fields(pids))
		}
	}
	return count
}

// BenchmarkThousand: a thousand nodes on one agent by 16 clients at once, beside as many bare processes; an iteration is the
// thousand's whole life.
func BenchmarkThousand(b *testing.B) {
	const nodes, clients = 1000, 16
	g := harness.New(b)
	g.StartMaster()
	agent := g.StartAgent("agent-001", sleepProfile)
	var spawn, stop, start, end times
	idle, full := pss(b, agent.PID()), 0.0
	for b.Loop() {
		began := time.Now()
		ids := make([]string, nodes)
		parallel(clients, nodes, func(i int) {
			resp, err := g.Client().SpawnNode(b.Context(), &sutrav1.SpawnNodeRequest{Profile: "sleep"})
			if err != nil {
				b.Error(err)
			}
			ids[i] = resp.GetNode().GetNodeId()
		})
		spawn.since(began)
		full = max(full, pss(b, agent.PID()))
		if all, own := children(b, agent.PID()), len(g.NodeProcesses()); all != nodes || own != nodes {
			b.Errorf("for %d nodes there are %d processes, and the agent has %d children", nodes, own, all)
		}
		began = time.Now()
		parallel(clients, nodes, func(i int) {
			if _, err := g.Client().StopNode(b.Context(), &sutrav1.StopNodeRequest{NodeId: ids[i]}); err != nil {
				b.Error(err)
			}
		})
		stop.since(began)
		if left := g.NodeProcesses(); len(left) > 0 {
			b.Errorf("after the stops there are %v", left)
		}

		bare := make([]*exec.Cmd, nodes)
		began = time.Now()
		parallel(clients, nodes, func(i int) {
			bare[i] = exec.Command("/bin/sleep", "100000")
			if err := bare[i].Start(); err != nil {
				b.Error(err)
			}
		})
		start.since(began)
		began = time.Now()
		parallel(clients, nodes, func(i int) {
			if bare[i].Process != nil {
				_ = bare[i].Process.Kill() // ours, and not waited for yet
				_ = bare[i].Wait()         // killed, as it was told
			}
		})
		end.since(began)
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(spawn.quantile(.5).Seconds(), "spawn-s")
	b.ReportMetric(stop.quantile(.5).Seconds(), "stop-s")
	b.ReportMetric(float64(spawn.quantile(.5))/float64(start.quantile(.5)), "x-forkexec")
	b.ReportMetric(float64(stop.quantile(.5))/float64(end.quantile(.5)), "x-kill")
	b.ReportMetric(idle, "idle-pss-MiB")
	b.ReportMetric(full, "pss-MiB")
}

// BenchmarkAdopt: the agent is killed under 200 nodes and started again, until the master has heard of all of them from the
// new one; beside the start of the binary alone.
func BenchmarkAdopt(b *testing.B) {
	const nodes = 200
	g := harness.New(b)
	g.StartMaster()
	agent := g.StartAgent("agent-001", sleepProfile)
	before := map[string]*sutrav1.Node{}
	parallel(8, nodes, func(int) {
		if _, err := g.Client().SpawnNode(b.Context(), &sutrav1.SpawnNodeRequest{Profile: "sleep"}); err != nil {
			b.Error(err)
		}
	})
	for _, n := range g.Nodes(false) {
		before[n.GetNodeId()] = n
	}
	var adopt, bare times
	for b.Loop() {
		agent.Kill()
		began := time.Now()
		if out, err := exec.Command(g.Binary, "version").CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
		bare.since(began)

		epoch := epochOf(b, g)
		began = time.Now()
		agent = g.LaunchAgent(fmt.Sprintf("agent-%d", len(adopt)), filepath.Join(g.Dir, "agent-001.toml"))
		harness.Await(b, "the agent to register", func() error {
			if now := epochOf(b, g); now == epoch {
				return fmt.Errorf("its epoch is still %d", now)
			}
			return nil
		})
		adopt.since(began)
		after := g.Nodes(false)
		for _, n := range after {
			if was := before[n.GetNodeId()]; n.GetPid() != was.GetPid() || n.GetPhase() != sutrav1.Phase_PHASE_RUNNING || n.GetRestartCount() != 0 {
				b.Errorf("node was %v\nand is %v", was, n)
			}
		}
		if len(after) != nodes {
			b.Errorf("there were %d nodes, and there are %d", nodes, len(after))
		}
	}
	adopt.report(b, bare, "version")
}

func epochOf(b *testing.B, g *harness.Grid) uint64 {
	b.Helper()
	resp, err := g.Client().ListAgents(b.Context(), &sutrav1.ListAgentsRequest{})
	if err != nil || len(resp.GetAgents()) != 1 {
		b.Fatalf("agents: %v, %v", resp, err)
	}
	return resp.GetAgents()[0].GetEpoch()
}
