package registry

import (
	"google.golang.org/protobuf/proto"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// An agent, or who has stolen its key, can tell of anything. These bound what it can make a master hold.
const (
	// maxOfAgent is how many nodes of one agent there are here before it tells of one that isn't known: as many as its file can ask for.
	maxOfAgent = config.MaxNodes
	// maxStatement is how large is what it says of one node: a storage path, a dead process's output and a reason are some 10 KB.
	maxStatement = 16 << 10
)

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
