package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

const (
	// useLimit bounds each connection and each HTTP request to the node.
	useLimit = 3 * time.Second
	// portFreeLimit is how long a stopped node's port may take to refuse.
	portFreeLimit = 5 * time.Second
	portFreeEach  = 20 * time.Millisecond
)

// smokeAction is a step to do: its detail is one line of what was found.
type smokeAction struct {
	name string
	do   func(context.Context) (detail string, err error)
}

// smokeRun is one smoke test under way.
type smokeRun struct {
	*session
	request *sutrav1.SpawnNodeRequest
	// node is what the spawn answered.
	node *sutrav1.Node
	// nodeID is the run's own node, once it is known.
	nodeID string
	// unclean is set from a spawn that may have started something until its node is removed.
	unclean bool
}

func (r *smokeRun) steps() []smokeAction {
	return []smokeAction{
		{"the master answers", r.masterAnswers},
		{"an agent is healthy", r.agentHealthy},
		{"a node is spawned", r.spawn},
		{"its status is live", r.statusLive},
		{"list-nodes shows it", r.listed},
		{"its port can be used", r.use},
		{"it is stopped", r.stop},
		{"its port is free again", r.portIsFree},
		{"it is removed", r.stoppedAndRemoved},
	}
}

func (r *smokeRun) masterAnswers(ctx context.Context) (string, error) {
	grid, err := r.master.GetClusterStatus(ctx, &sutrav1.GetClusterStatusRequest{})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("version %s, grid %s, at %s", grid.GetVersion(), grid.GetGridId(), r.endpoint), nil
}

func (r *smokeRun) agentHealthy(ctx context.Context) (string, error) {
	response, err := r.master.ListAgents(ctx, &sutrav1.ListAgentsRequest{})
	if err != nil {
		return "", err
	}
	wanted := r.request.GetAgentId()
	healthy := 0
	for _, a := range response.GetAgents() {
		ok := a.GetHealth() == sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY
		if ok {
			healthy++
		}
		switch {
		case a.GetAgentId() != wanted:
		case ok:
			return wanted + " is HEALTHY", nil
		default:
			return "", rpc.Errorf(rpc.AgentOffline, "agent %s is %s", wanted, a.GetHealth().Word()).
				WithHint("look at its log, and when it was last heard of: sutra list-agents")
		}
	}
	switch {
	case wanted != "":
		return "", rpc.Errorf(rpc.AgentNotRegistered, "agent %s isn't registered", wanted).
			WithHint("see those that are: sutra list-agents")
	case healthy == 0:
		return "", rpc.Errorf(rpc.NoAgentAvailable, "none of %d agents is HEALTHY", len(response.GetAgents())).
			WithHint("see them with: sutra list-agents   or start one: sutra agent --config agent.toml")
	}
	return fmt.Sprintf("%d of %d are HEALTHY", healthy, len(response.GetAgents())), nil
}

func (r *smokeRun) spawn(ctx context.Context) (string, error) {
	response, err := r.master.SpawnNode(ctx, r.request)
	if err != nil {
		// Of an error with a known outcome the id is of another node: the one in the way.
		if e := rpc.AsError(err); mayHaveStarted(e) {
			r.unclean, r.nodeID = true, e.Meta["node_id"]
		}
		return "", err
	}
	r.node, r.nodeID, r.unclean = response.GetNode(), response.GetNode().GetNodeId(), true
	return fmt.Sprintf("%s on %s at %s, pid %d", r.nodeID, r.node.GetAgentId(), r.node.GetEndpoint(), r.node.GetPid()), nil
}

func (r *smokeRun) statusLive(ctx context.Context) (string, error) {
	status, err := r.master.GetNodeStatus(ctx, &sutrav1.GetNodeStatusRequest{NodeId: r.nodeID})
	if err != nil {
		return "", err
	}
	said := status.GetNode().GetPhase().Word() + ", " + sourceText(status, r.now())
	if status.GetNode().GetPhase() != sutrav1.Phase_PHASE_RUNNING || status.GetSource() != sutrav1.Source_SOURCE_LIVE {
		return "", fmt.Errorf("node %s should be RUNNING, LIVE and is %s", r.nodeID, said)
	}
	return said, nil
}

func (r *smokeRun) listed(ctx context.Context) (string, error) {
	response, err := r.master.ListNodes(ctx, &sutrav1.ListNodesRequest{})
	if err != nil {
		return "", err
	}
	for _, n := range response.GetNodes() {
		if n.GetNodeId() == r.nodeID {
			return fmt.Sprintf("one of %d", len(response.GetNodes())), nil
		}
	}
	return "", fmt.Errorf("list-nodes has %d nodes, and %s isn't among them", len(response.GetNodes()), r.nodeID)
}

// use connects to the node's port and, where the built-in server answers there, stores a value and reads it back.
func (r *smokeRun) use(ctx context.Context) (string, error) {
	conn, err := r.connect(ctx)
	if err != nil {
		return "", fmt.Errorf("connect to node %s, which must be reachable from here: %w", r.nodeID, err)
	}
	_ = conn.Close() // nothing was written

	// No proxy stands between a grid and its nodes, and no connection may outlive the step.
	transport := &http.Transport{DisableKeepAlives: true}
	defer transport.CloseIdleConnections()
	web := &http.Client{
		Transport: transport, Timeout: useLimit,
		// Whatever listens there must not send the value elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}

	var health struct {
		NodeID string `json:"node_id"`
	}
	body, err := r.ask(ctx, web, http.MethodGet, "/healthz", "")
	if err != nil || json.Unmarshal([]byte(body), &health) != nil || health.NodeID == "" {
		if ctx.Err() != nil {
			return "", ctx.Err()
		}
		return "accepts connections; not the built-in server, nothing was stored", nil
	}
	if health.NodeID != r.nodeID {
		return "", fmt.Errorf("%s should be node %s and says that it is %s", r.node.GetEndpoint(), r.nodeID, health.NodeID)
	}
	const path = "/kv/sutra-smoke"
	value := "stored by sutra smoke as " + r.request.GetRequestId()
	if _, err := r.ask(ctx, web, http.MethodPut, path, value); err != nil {
		return "", fmt.Errorf("store a value: %w", err)
	}
	back, err := r.ask(ctx, web, http.MethodGet, path, "")
	if err != nil {
		return "", fmt.Errorf("read the value back: %w", err)
	}
	if back != value {
		return "", fmt.Errorf("stored %q and read back %.200q", value, back)
	}
	return "a value was stored and read back", nil
}

// ask makes one HTTP request of the node; an answer other than 2xx is an error.
func (r *smokeRun) ask(ctx context.Context, web *http.Client, method, path, body string) (string, error) {
	url := "http://" + r.node.GetEndpoint() + path
	request, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	answer, err := web.Do(request)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	const enough = 64 << 10 // whatever listens there may talk for ever
	said, err := io.ReadAll(io.LimitReader(answer.Body, enough))
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", method, url, err)
	}
	if answer.StatusCode/100 != 2 {
		return "", fmt.Errorf("%s %s answers %s: %.200s", method, url, answer.Status, said)
	}
	return string(said), nil
}

func (r *smokeRun) stop(ctx context.Context) (string, error) {
	response, err := r.master.StopNode(ctx, &sutrav1.StopNodeRequest{NodeId: r.nodeID})
	if err != nil {
		return "", err
	}
	return stopped(r.nodeID, response), nil
}

func (r *smokeRun) portIsFree(ctx context.Context) (string, error) {
	limited, cancel := context.WithTimeout(ctx, r.portFree)
	defer cancel()
	tick := time.NewTicker(portFreeEach)
	defer tick.Stop()
	for {
		conn, err := r.connect(ctx) // not limited: the limit's end says nothing of the port
		if err == nil {
			_ = conn.Close() // nothing was written
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			return r.node.GetEndpoint() + " refuses connections", nil
		}
		select {
		case <-tick.C:
		case <-limited.Done():
			if ctx.Err() != nil {
				return "", ctx.Err()
			}
			if err == nil {
				err = errors.New("it still accepts connections")
			}
			return "", fmt.Errorf("%s should refuse connections %s after its node stopped: %w", r.node.GetEndpoint(), r.portFree, err)
		}
	}
}

func (r *smokeRun) connect(ctx context.Context) (net.Conn, error) {
	return (&net.Dialer{Timeout: useLimit}).DialContext(ctx, "tcp", r.node.GetEndpoint())
}

func (r *smokeRun) stoppedAndRemoved(ctx context.Context) (string, error) {
	status, err := r.master.GetNodeStatus(ctx, &sutrav1.GetNodeStatusRequest{NodeId: r.nodeID})
	if err != nil {
		return "", err
	}
	if phase := status.GetNode().GetPhase(); phase != sutrav1.Phase_PHASE_STOPPED {
		return "", fmt.Errorf("node %s should be STOPPED and is %s", r.nodeID, phase.Word())
	}
	return r.remove(ctx)
}

func (r *smokeRun) remove(ctx context.Context) (string, error) {
	if _, err := r.master.RemoveNode(ctx, &sutrav1.RemoveNodeRequest{NodeId: r.nodeID}); err != nil {
		return "", err
	}
	r.unclean = false
	return "STOPPED, then removed", nil
}
