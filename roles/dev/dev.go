// Package dev runs a whole grid in one process: a master, an agent and one node.
package dev

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/agent"
	"github.com/sutra-grid/sutra/roles/master"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// Config is what a grid in one process needs to know.
type Config struct {
	// Home keeps everything; empty: a temporary folder that is removed at the end.
	Home string
	// Binary is the sutra binary, which nodes are run with.
	Binary string
	// Call is how the user calls it, for the commands that are shown.
	Call string
	// UsualMaster is the endpoint that a command asks which names no master.
	UsualMaster func() (string, error)
	Version     string
	// Out is where a person reads what runs.
	Out io.Writer
	Log zerolog.Logger
}

const agentID = "agent-001"

// agentFile is the agent's configuration; the port comes with the listener.
const agentFile = `
[agent]
agent_id = "` + agentID + `"
[storage]
max_nodes = 20
`

// parseFile is the agent's file for a home and a master.
func parseFile(home string, masterAt net.Addr) (*config.Agent, error) {
	file, err := config.ParseAgent([]byte(agentFile), home, "the built-in agent file")
	if err != nil {
		return nil, err
	}
	file.MasterEndpoints = []string{masterAt.String()}
	return file, nil
}

// Run runs the grid until ctx ends, then stops all of it: the nodes, the agent, the master.
func Run(ctx context.Context, cfg Config) error {
	said := make(chan struct{})
	unwatch := context.AfterFunc(ctx, func() {
		defer close(said)
		fmt.Fprintln(cfg.Out, "stopping ...") // whoever doesn't listen any more needn't know
	})
	err := run(ctx, cfg)
	if unwatch() {
		return err
	}
	<-said
	if err == nil {
		fmt.Fprintln(cfg.Out, "stopped")
	}
	return err
}

func run(ctx context.Context, cfg Config) (err error) {
	if cfg.Home == "" {
		clearAbandoned(context.WithoutCancel(ctx), cfg) // as bounded as a node's stop
	}
	home, passing, err := makeHome(cfg.Home)
	if err != nil {
		return err
	}
	if passing {
		defer func() {
			if rm := os.RemoveAll(home); rm != nil && err == nil {
				err = fmt.Errorf("remove the temporary home: %w", rm)
			}
		}()
	}

	masterAt, err := listenNear("127.0.0.1:7000")
	if err != nil {
		return err
	}
	defer masterAt.Close()
	httpAt, err := listenNear("127.0.0.1:7080")
	if err != nil {
		return err
	}
	defer httpAt.Close()
	agentAt, err := listenNear("127.0.0.1:8001")
	if err != nil {
		return err
	}
	defer agentAt.Close()

	// Not to be broken off: opening the store is short, and what a store that was given up leaves behind may still write.
	m, err := master.New(context.WithoutCancel(ctx), master.Config{
		Home: home, Listener: masterAt, HTTP: httpAt, Thresholds: health.DefaultThresholds(), Version: cfg.Version, CertificateLife: certificateLife,
		Log: cfg.Log.With().Str("role", "master").Logger(),
	})
	if err != nil {
		return err
	}
	// The master outlives the agent, which reports the end of its nodes to it.
	masterCtx, stopMaster := context.WithCancel(context.WithoutCancel(ctx))
	defer stopMaster()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.Run(masterCtx) })
	group.Go(func() error {
		defer stopMaster()
		file, err := parseFile(home, masterAt.Addr())
		if err != nil {
			return err
		}
		a, err := agent.New(ctx, agent.Config{
			Home: home, File: file, Listen: only(agentAt), Binary: cfg.Binary, StopNodes: true, Version: cfg.Version,
			Log: cfg.Log.With().Str("role", "agent").Logger(),
		})
		if err != nil {
			return err
		}
		return a.Run(ctx)
	})
	group.Go(func() error {
		own, err := credentials(home)
		if err != nil {
			return err
		}
		channel := rpc.Master(masterAt.Addr().String(), own, nil)
		defer channel.Close()
		client := sutrav1.NewGridMasterClient(channel)
		node, err := firstNode(ctx, client)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("run the first node: %w", err)
		}
		if !isUsual(ctx, cfg, own, client, masterAt.Addr()) {
			cfg.Call += " --master " + masterAt.Addr().String()
		}
		return greet(cfg, home, passing, masterAt.Addr(), httpAt.Addr(), agentAt.Addr(), node)
	})
	err = group.Wait()
	if errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}

// certificateLife is how long a laptop's certificates last, and are renewed in.
const certificateLife = 24 * time.Hour

// credentials are those that the master has left in its home.
func credentials(home string) (func() []*pki.Credentials, error) {
	var all []*pki.Credentials
	for _, path := range config.AllCredentials(home) {
		c, err := pki.Load(path)
		if err != nil {
			return nil, err
		}
		all = append(all, c)
	}
	return func() []*pki.Credentials { return all }, nil
}

func makeHome(given string) (home string, passing bool, err error) {
	if given == "" {
		home, err = os.MkdirTemp("", config.DevHome)
		if err != nil {
			return "", false, fmt.Errorf("make a temporary home: %w", err)
		}
		return home, true, nil
	}
	home, err = filepath.Abs(given)
	if err != nil {
		return "", false, fmt.Errorf("home %s: %w", given, err)
	}
	return home, false, nil
}

// only is how an agent listens that has a listener, and serves no metrics.
func only(l net.Listener) func() (calls, metrics net.Listener, err error) {
	return func() (calls, metrics net.Listener, err error) { return l, nil, nil }
}

// listenNear listens at the usual address, or at any free port of its host where that is taken.
func listenNear(usual string) (net.Listener, error) {
	l, err := net.Listen("tcp", usual)
	if err == nil {
		return l, nil
	}
	if l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, fmt.Errorf("listen on loopback: %w", err)
	}
	return l, nil
}

// firstNode waits for the agent and for a running node, which it spawns where the home knows none.
func firstNode(ctx context.Context, client sutrav1.GridMasterClient) (*sutrav1.Node, error) {
	for {
		agents, err := client.ListAgents(ctx, &sutrav1.ListAgentsRequest{})
		if err != nil {
			return nil, err
		}
		if len(agents.GetAgents()) > 0 && agents.GetAgents()[0].GetHealth() == sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY {
			break
		}
		if err := pause(ctx); err != nil {
			return nil, err
		}
	}
	for {
		known, err := client.ListNodes(ctx, &sutrav1.ListNodesRequest{})
		if err != nil {
			return nil, err
		}
		if len(known.GetNodes()) == 0 {
			resp, err := client.SpawnNode(ctx, &sutrav1.SpawnNodeRequest{})
			return resp.GetNode(), err
		}
		for _, n := range known.GetNodes() {
			switch n.GetPhase() {
			case sutrav1.Phase_PHASE_RUNNING:
				return n, nil
			case sutrav1.Phase_PHASE_FAILED, sutrav1.Phase_PHASE_CRASH_LOOP:
				return nil, fmt.Errorf("node %s of this home doesn't run: %s", n.GetNodeId(), n.GetReason())
			}
		}
		if err := pause(ctx); err != nil {
			return nil, err
		}
	}
}

// isUsual tells whether a command that names no master asks this one. The environment or an announcement may
// lead it elsewhere, and two names of one host may lead to the same: the masters themselves say who they are.
func isUsual(ctx context.Context, cfg Config, credentials func() []*pki.Credentials, own sutrav1.GridMasterClient, at net.Addr) bool {
	usual, err := cfg.UsualMaster()
	if err != nil {
		return false
	}
	if _, port, err := net.SplitHostPort(usual); err != nil || port != strconv.Itoa(at.(*net.TCPAddr).Port) {
		return false
	}
	channel := rpc.Master(usual, credentials, nil)
	defer channel.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	theirs, err := sutrav1.NewGridMasterClient(channel).GetClusterStatus(ctx, &sutrav1.GetClusterStatusRequest{})
	if err != nil {
		return false
	}
	ours, err := own.GetClusterStatus(ctx, &sutrav1.GetClusterStatusRequest{})
	return err == nil && ours.GetGridId() == theirs.GetGridId()
}

func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(10 * time.Millisecond):
		return nil
	}
}

// greet says what runs where and what to try next.
func greet(cfg Config, home string, passing bool, masterAt, httpAt, agentAt net.Addr, n *sutrav1.Node) error {
	call := cfg.Call
	kept := "kept"
	if passing {
		kept = "removed at the end"
	}
	_, err := fmt.Fprintf(cfg.Out, `A grid runs in this process (sutra %s):
  master   %s   metrics https://%s/metrics
  agent    agent-001 at %s
  node     %s at %s, pid %d
  home     %s (%s)

Try in another terminal:
  %s status
  %s list-nodes
  %s spawn --agent agent-001 --storage-path /tmp/test-storage
  %s smoke
  curl -X PUT --data-binary hello http://%s/kv/greeting
  curl http://%s/kv/greeting

Ctrl-C stops all of it.
`, cfg.Version, masterAt, httpAt, agentAt, n.GetNodeId(), n.GetEndpoint(), n.GetPid(), home, kept,
		call, call, call, call, n.GetEndpoint(), n.GetEndpoint())
	return err
}
