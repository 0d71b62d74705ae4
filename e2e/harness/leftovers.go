package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// end stops what runs, judges what is left and clears it away; see New.
func (g *Grid) end() {
	for _, a := range g.agents {
		if a.Running() {
			a.Signal(syscall.SIGCONT)
			a.Stop()
		}
	}
	orderly := !slices.ContainsFunc(g.agents, func(a *Process) bool { return a.Wait() < 0 })
	wanted, instances := map[string]bool{}, g.Instances()
	if g.master != nil && g.master.Running() {
		g.master.Signal(syscall.SIGCONT)
		wanted = g.wanted(instances)
		g.master.Stop()
	}
	if g.channel != nil {
		g.channel.Close()
	}
	for pid, id := range g.NodeProcesses() {
		if !wanted[id] {
			g.t.Errorf("process %d of node %s was left behind", pid, id)
		}
	}
	for id, pids := range g.NodeLeaders() {
		if len(pids) > 1 {
			g.t.Errorf("node %s runs more than once: processes %v", id, pids)
		}
	}
	Await(g.t, "the nodes' processes to end", func() error {
		left := g.NodeProcesses()
		for pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL) // ours by its environment
		}
		if len(left) > 0 {
			return fmt.Errorf("there are %v", left)
		}
		return nil
	})
	for instance := range instances {
		// An agent that was killed leaves its group.
		if groups := AgentGroups(instance); orderly && len(groups) > 0 && len(NodeGroups(g.t, instance)) == 0 {
			g.t.Errorf("control groups %v were left behind without a node", groups)
		}
		for _, group := range NodeGroups(g.t, instance) {
			if !wanted[filepath.Base(group)] {
				g.t.Errorf("control group %s was left behind", group)
			}
		}
		Await(g.t, "the control groups of agent "+instance+" to be removed", func() error {
			var errs []error
			for _, group := range append(NodeGroups(g.t, instance), AgentGroups(instance)...) {
				errs = append(errs, os.Remove(group)) // in vain while a process that was killed isn't quite gone
			}
			return errors.Join(errs...)
		})
	}
}

// wanted is which nodes the master wants to run. It adds the instances of the agents that the master knows: the folder
// of one may be away.
func (g *Grid) wanted(instances map[string]bool) map[string]bool {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	nodes, err := g.Client().ListNodes(ctx, &sutrav1.ListNodesRequest{})
	if err != nil {
		g.t.Errorf("ask what is wanted: %v", err)
	}
	wanted := map[string]bool{}
	for _, n := range nodes.GetNodes() {
		if n.GetDesired() == sutrav1.Desired_DESIRED_RUNNING {
			wanted[n.GetNodeId()] = true
		}
	}
	agents, err := g.Client().ListAgents(ctx, &sutrav1.ListAgentsRequest{})
	if err != nil {
		g.t.Errorf("ask for the agents: %v", err)
	}
	for _, a := range agents.GetAgents() {
		instances[a.GetInstanceId()] = true
	}
	return wanted
}

// Instances are the random names of the agents' homes in the test's folder.
func (g *Grid) Instances() map[string]bool {
	g.t.Helper()
	found := map[string]bool{}
	for _, home := range []string{"*", "*/*"} {
		paths, err := filepath.Glob(filepath.Join(g.Dir, home, "agents", "*", "instance_id"))
		if err != nil {
			g.t.Error(err)
		}
		for _, path := range paths {
			id, err := os.ReadFile(path)
			if err != nil {
				g.t.Error(err)
			}
			found[string(id)] = true
		}
	}
	return found
}

// NodeGroups are the control groups that the nodes of an agent's home have.
func NodeGroups(t testing.TB, instance string) []string {
	t.Helper()
	var groups []string
	for _, at := range AgentGroups(instance) {
		entries, err := os.ReadDir(at)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
		for _, e := range entries {
			if e.IsDir() {
				groups = append(groups, filepath.Join(at, e.Name()))
			}
		}
	}
	return groups
}

// AgentGroups are the control groups of an agent's home: one a hierarchy, beneath the group that the tests run in.
func AgentGroups(instance string) []string {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil // a kernel without
	}
	var groups []string
	for line := range strings.Lines(string(own)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		// v1 hierarchies are mounted under their controllers' names.
		for _, hierarchy := range []string{"", "unified", parts[1]} {
			// A container's group may be its mount's root, and an agent may have left its group for one beneath it.
			for _, path := range []string{parts[2], filepath.Dir(parts[2]), "/"} {
				group := filepath.Clean("/sys/fs/cgroup/" + hierarchy + "/" + path + "/sutra-" + instance)
				if _, err := os.Stat(group); err == nil && !slices.Contains(groups, group) {
					groups = append(groups, group)
				}
			}
		}
	}
	return groups
}

// NodeLeaders are the processes of this grid's nodes that lead a session, as what an agent starts does, by node id. A
// node has one, unless it makes sessions itself.
func (g *Grid) NodeLeaders() map[string][]int {
	g.t.Helper()
	found := map[string][]int{}
	for pid, id := range g.NodeProcesses() {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue // gone meanwhile
		}
		// State, parent, group and session follow the name.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if fields[3] == strconv.Itoa(pid) {
			found[id] = append(found[id], pid)
		}
	}
	return found
}

// NodeProcesses finds the live processes of this grid's nodes, by their environment and, because some servers overwrite
// that, by their control groups and their logs: node id by pid.
func (g *Grid) NodeProcesses() map[int]string {
	g.t.Helper()
	found := map[int]string{}
	for instance := range g.Instances() {
		for _, group := range NodeGroups(g.t, instance) {
			pids, _ := os.ReadFile(filepath.Join(group, "cgroup.procs")) // none where the group is gone
			for field := range bytes.FieldsSeq(pids) {
				if pid, err := strconv.Atoi(string(field)); err == nil {
					found[pid] = filepath.Base(group)
				}
			}
		}
	}
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		g.t.Fatal(err)
	}
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		if log, err := os.Readlink("/proc/" + d.Name() + "/fd/1"); err == nil && strings.HasPrefix(log, g.Home+"/agents/") {
			if id, ok := strings.CutSuffix(filepath.Base(log), ".log"); ok {
				found[pid] = id
			}
		}
		env, err := os.ReadFile("/proc/" + d.Name() + "/environ")
		if err != nil || !bytes.Contains(env, []byte("SUTRA_STORAGE_PATH="+g.Dir+"/")) {
			continue // gone meanwhile, or somebody else's; a zombie's environment is empty
		}
		for kv := range bytes.SplitSeq(env, []byte{0}) {
			if id, ok := bytes.CutPrefix(kv, []byte("SUTRA_NODE_ID=")); ok {
				found[pid] = string(id)
			}
		}
	}
	return found
}
