package client

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"testing"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// smokeGrid is a fake master with one node at a time, whose port is real. Like the real one it gives
// the same node for the same request id, and forgets nothing before it is removed.
type smokeGrid struct {
	*fakeMaster
	t *testing.T
	// storage serves the node's port.
	storage http.Handler
	// leakPort keeps the port open when the node stops.
	leakPort bool

	mu   sync.Mutex // guards what follows
	node *sutrav1.Node
	by   string
	port io.Closer
}

const smokeNode = "node-smoke"

// nodePort is a node's server, which may be closed before it has begun to serve.
type nodePort struct {
	srv *http.Server
	l   net.Listener
}

func (p nodePort) Close() error {
	err := p.srv.Close()
	_ = p.l.Close() // srv has done so if it serves
	return err
}

func newSmokeGrid(t *testing.T) *smokeGrid {
	g := &smokeGrid{fakeMaster: &fakeMaster{}, t: t, storage: keyValue(smokeNode)}
	g.onStatus = healthyGrid
	g.onListAgents = func() (*sutrav1.ListAgentsResponse, error) {
		return &sutrav1.ListAgentsResponse{Agents: []*sutrav1.Agent{
			{AgentId: "agent-001", Health: sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY},
			{AgentId: "agent-002", Health: sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE},
		}}, nil
	}
	g.onSpawn = func(_ context.Context, r *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
		return g.spawn(r)
	}
	g.onStop = func(r *sutrav1.StopNodeRequest) (*sutrav1.StopNodeResponse, error) { return g.stop(r) }
	g.onRemove = func(r *sutrav1.RemoveNodeRequest) (*sutrav1.RemoveNodeResponse, error) { return g.remove(r) }
	g.onNodeStatus = func(*sutrav1.GetNodeStatusRequest) (*sutrav1.GetNodeStatusResponse, error) {
		return &sutrav1.GetNodeStatusResponse{Node: g.current(), Source: sutrav1.Source_SOURCE_LIVE}, nil
	}
	g.onListNodes = func(*sutrav1.ListNodesRequest) (*sutrav1.ListNodesResponse, error) {
		return &sutrav1.ListNodesResponse{Nodes: []*sutrav1.Node{{NodeId: "node-other"}, g.current()}}, nil
	}
	serve(t, g.fakeMaster)
	t.Cleanup(func() {
		if g.port != nil {
			_ = g.port.Close() // closed before where it doesn't leak
		}
	})
	return g
}

func (g *smokeGrid) spawn(r *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.node != nil && g.by != r.GetRequestId() {
		return nil, rpc.Errorf(rpc.AgentFull, "one node is all there is room for")
	}
	if g.node == nil {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		srv := &http.Server{Handler: g.storage}
		go func() { _ = srv.Serve(l) }() // ends with Close, which says so
		g.by, g.port = r.GetRequestId(), nodePort{srv, l}
		g.node = &sutrav1.Node{
			NodeId: smokeNode, AgentId: "agent-001", Endpoint: l.Addr().String(), Pid: 7,
			Phase: sutrav1.Phase_PHASE_RUNNING,
		}
	}
	return &sutrav1.SpawnNodeResponse{Node: g.node}, nil
}

func (g *smokeGrid) stop(r *sutrav1.StopNodeRequest) (*sutrav1.StopNodeResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.node == nil || r.GetNodeId() != smokeNode {
		return &sutrav1.StopNodeResponse{AlreadyStopped: true}, nil
	}
	if !g.leakPort {
		if err := g.port.Close(); err != nil && g.node.GetPhase() != sutrav1.Phase_PHASE_STOPPED {
			return nil, err
		}
	}
	g.node = &sutrav1.Node{NodeId: smokeNode, AgentId: "agent-001", Phase: sutrav1.Phase_PHASE_STOPPED, LastExit: &sutrav1.Exit{}}
	return &sutrav1.StopNodeResponse{Node: g.node}, nil
}

func (g *smokeGrid) remove(r *sutrav1.RemoveNodeRequest) (*sutrav1.RemoveNodeResponse, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if r.GetNodeId() != smokeNode || g.node == nil {
		return &sutrav1.RemoveNodeResponse{AlreadyRemoved: true}, nil
	}
	if !g.node.Ended() {
		return nil, rpc.Errorf(rpc.NodeStillLive, "node %s still runs", smokeNode)
	}
	g.node = nil
	return &sutrav1.RemoveNodeResponse{}, nil
}

func (g *smokeGrid) current() *sutrav1.Node {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.node
}

func (g *smokeGrid) wantNothingLeft() {
	g.t.Helper()
	if n := g.current(); n != nil {
		g.t.Errorf("left behind: %v", n)
	}
}

// keyValue answers as the built-in storage server of a node does.
func keyValue(nodeID string) http.Handler {
	var mu sync.Mutex // guards values
	values := map[string]string{}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, `{"status":"ok","node_id":%q}`, nodeID)
	})
	mux.HandleFunc("PUT /kv/{key}", func(w http.ResponseWriter, r *http.Request) {
		value, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		values[r.PathValue("key")] = string(value)
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("GET /kv/{key}", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprint(w, values[r.PathValue("key")])
	})
	return mux
}

// smoke runs the verb and returns its output, ports and request ids blotted out.
func (g *smokeGrid) smoke(ctx context.Context, term *terminal, args ...string) (string, error) {
	g.t.Helper()
	err := term.run(ctx, append([]string{"--master", g.endpoint, "smoke"}, args...)...)
	out := strings.ReplaceAll(term.out.String(), g.endpoint, "MASTER")
	return regexp.MustCompile(`127\.0\.0\.1:\d+`).ReplaceAllString(out, "NODE-PORT"), err
}
