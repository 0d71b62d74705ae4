package registry

import (
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// An agent, or who has stolen its key, can tell of anything. These bound what it can make a master hold.
const (
	// maxOfAgent is how many nodes of one agent there are here before it tells of one that isn't known: as many as its file can ask for.
	maxOfAgent = config.MaxNodes
	// claimBurst registrations of one agent are taken at once, and one more each claimEvery: each is written to disk.
	claimBurst = 100
	claimEvery = time.Second
	// maxStatement is how large is what it says of one node: a storage path, a dead process's output and a reason are some 10 KB.
	maxStatement = 16 << 10
)

// tooSoon tells that an agent has registered too often; nil where it hasn't, and this time counts.
func (a *agent) tooSoon(id string, now time.Time) *rpc.Error {
	if a.claims.Before(now) {
		a.claims = now
	}
	if wait := a.claims.Sub(now) - (claimBurst-1)*claimEvery; wait > 0 {
		e := rpc.Errorf(rpc.TooManyRequests, "agent %s registers again and again; the next time is heard in %s", id, wait).With("agent_id", id)
		e.RetryAfter = wait
		return e.WithHint("if two agents share that id, stop one of them; if this one isn't yours: sutra agents ban %s", id)
	}
	a.claims = a.claims.Add(claimEvery)
	return nil
}

// Ignored is how many statements of nodes weren't taken in since the last call, by agent; nil where all were.
func (r *Registry) Ignored() map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	ignored := r.ignored
	r.ignored = nil
	return ignored
}

// bounded tells whether a statement may be taken in, and counts it where not.
func (r *Registry) bounded(said *sutrav1.Node) bool {
	known := r.nodes[said.GetNodeId()] != nil
	if (known || len(r.on[said.GetAgentId()]) < maxOfAgent && config.ValidID("", said.GetNodeId()) == nil) && proto.Size(said) <= maxStatement {
		return true
	}
	if r.ignored == nil {
		r.ignored = map[string]int{}
	}
	r.ignored[said.GetAgentId()]++
	return false
}
