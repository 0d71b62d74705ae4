// Package registry holds the agents and nodes of a grid in memory: what is wanted
// of each node beside what its agent last said of it. It does no I/O.
package registry

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// Registry is safe for concurrent use.
//
// Invariant: a message that was put in is never changed afterwards, only replaced,
// so that readers may hold on to what they were handed.
type Registry struct {
	thresholds health.Thresholds
	// changed holds a token while something changed that the reconciler hasn't looked at.
	changed chan struct{}
	// notice takes each change of an agent's health and of a node's phase, in order. It is called with mu held, and waits for
	// nothing; nil: nobody wants to know.
	notice func(*sutrav1.Event)

	mu       sync.RWMutex // guards what follows; no I/O under it
	agents   map[string]*agent
	epochs   map[string]uint64 // of agents that were forgotten: a later start's is higher, so that nothing said before counts again
	nodes    map[string]*node
	on       map[string]map[string]*node // the same nodes, by agent: most questions are about one agent's
	tombs    map[string]*sutrav1.NodeRecord
	requests map[string]string // request_id -> node_id, tombstones included
	restarts uint64            // sum of the restarts that agents told of
	ignored  map[string]int    // statements that weren't taken in, by agent, since Ignored told of them; nil for none
	watched  time.Time         // when Watch last looked; zero before its first call
	stood    time.Duration     // how long this process has stood still so far
}

// agent is one agent. Its statements count only while inventory is set.
type agent struct {
	info *sutrav1.Agent // health, last_heartbeat and node_count are filled in by views
	live health.Liveness
	// shown is the health that was last told of.
	shown    health.State
	known    time.Time // since when this master knows of it
	lastBeat time.Time // the last one's arrival, a registration included; zero before
	sequence uint64    // of the last beat in the epoch that is in force
	// inventory: everything that the agent runs is known, since it registered or beat in full in the epoch that is in force.
	inventory bool
	// claim is the registration that is being persisted; nil where none is.
	claim *sutrav1.Agent
	// claims is when as many registrations as a burst may come at once again.
	claims time.Time
}

// node is one node: wanted (record), seen, or both.
type node struct {
	agentID string              // never changes
	record  *sutrav1.NodeRecord // nil: an agent runs it and nobody here knows why
	seen    *sutrav1.Node       // nil: its agent doesn't speak of it
	seenAt  time.Time
	// answered: it was seen in the answer to a call, and no list of all that the agent runs came since.
	answered bool
	usage    *sutrav1.Usage // of the process that was seen last; nil where that wasn't measured yet
	told     told
	// ticket holds one token; who changes the record on disk has it meanwhile.
	ticket chan struct{}
	// busy counts the calls under way that change the node; the reconciler leaves it alone meanwhile.
	busy int
	// spawning is closed when the call that made the node has its outcome; nil where none is under way.
	spawning chan struct{}
	// discarded: its spawn failed and was undone, except that the store still has its record.
	discarded bool
	// trouble is why the reconciler's last attempt failed; the next one is due at retryAt.
	trouble string
	tries   int
	retryAt time.Time
}

// New makes an empty registry. The thresholds must be valid. notice, which may be nil, takes each change of an agent's health
// and of a node's phase, in order; it must not wait, nor call the registry.
func New(t health.Thresholds, notice func(*sutrav1.Event)) *Registry {
	return &Registry{
		thresholds: t, changed: make(chan struct{}, 1), notice: notice,
		agents: map[string]*agent{}, epochs: map[string]uint64{}, nodes: map[string]*node{}, on: map[string]map[string]*node{}, tombs: map[string]*sutrav1.NodeRecord{}, requests: map[string]string{},
	}
}

// Load takes in what the store holds. No agent has been heard of yet, and none counts as
// OFFLINE before a full window has passed since now.
func (r *Registry) Load(agents []*sutrav1.Agent, nodes, tombstones []*sutrav1.NodeRecord, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range agents {
		r.agents[a.GetAgentId()] = &agent{info: a, known: now, live: health.NewLiveness(r.thresholds, r.awake(now))}
	}
	for _, rec := range nodes {
		n := r.put(rec)
		// What was so before this start is no news.
		switch {
		case rec.GetNode().Ended():
			n.told.phase = rec.GetNode().GetPhase()
		case rec.GetConfirmed():
			n.told.phase = sutrav1.Phase_PHASE_RUNNING
		}
	}
	for _, rec := range tombstones {
		r.bury(rec)
	}
}

// Changed yields once after one or more changes.
func (r *Registry) Changed() <-chan struct{} { return r.changed }

func (r *Registry) touch() {
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

// Put replaces a node's record by one that was persisted.
func (r *Registry) Put(rec *sutrav1.NodeRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tell(rec.GetNode().GetNodeId(), r.put(rec))
	r.touch()
}

func (r *Registry) put(rec *sutrav1.NodeRecord) *node {
	id := rec.GetNode().GetNodeId()
	n := r.nodes[id]
	if n == nil {
		n = r.add(id, rec.GetNode().GetAgentId())
	}
	if n.record.GetNode().GetGeneration() != rec.GetNode().GetGeneration() {
		n.calm() // the trouble was with what was wanted before
	}
	n.record = rec
	if rec.GetRequestId() != "" {
		r.requests[rec.GetRequestId()] = id
	}
	return n
}

// Discard takes a node out of everything but the store, which didn't forget it yet: the reconciler has it do so.
func (r *Registry) Discard(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.nodes[id]; n != nil && n.record != nil {
		r.forgetRequest(n.record)
		n.discarded = true
		r.touch()
	}
}

// Drop forgets a node whose spawn was undone.
func (r *Registry) Drop(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.nodes[id]; n != nil {
		r.forgetRequest(n.record)
		r.remove(id, n)
		r.touch()
	}
}

func (r *Registry) forgetRequest(rec *sutrav1.NodeRecord) {
	if r.requests[rec.GetRequestId()] == rec.GetNode().GetNodeId() {
		delete(r.requests, rec.GetRequestId())
	}
}

// Bury replaces a node's record by its tombstone: an agent that comes back with it is told to stop it.
func (r *Registry) Bury(rec *sutrav1.NodeRecord) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bury(rec)
	r.touch()
}

// bury keeps a node that its agent still speaks of, so that it is stopped there.
func (r *Registry) bury(rec *sutrav1.NodeRecord) {
	id := rec.GetNode().GetNodeId()
	if n := r.nodes[id]; n != nil {
		n.record = nil
		r.tell(id, n)
		if n.seen == nil {
			r.remove(id, n)
		}
	}
	r.tombs[id] = rec
	if _, taken := r.requests[rec.GetRequestId()]; !taken && rec.GetRequestId() != "" {
		r.requests[rec.GetRequestId()] = id
	}
}

// Prune does in memory what the store's Prune did on disk.
func (r *Registry) Prune(nodesEndedBefore, tombstonesBefore time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, rec := range r.tombs {
		if endedBefore(rec, tombstonesBefore) {
			delete(r.tombs, id)
			r.forgetRequest(rec)
		}
	}
	for _, n := range r.nodes {
		if n.record.GetNode().Ended() && n.busy == 0 && endedBefore(n.record, nodesEndedBefore) {
			r.bury(n.record)
		}
	}
	r.touch()
}

func endedBefore(rec *sutrav1.NodeRecord, t time.Time) bool {
	return rec.GetEndedAt() != nil && rec.GetEndedAt().AsTime().Before(t)
}

// Record returns a node's record; ok is false where the node isn't wanted by anybody.
func (r *Registry) Record(id string) (rec *sutrav1.NodeRecord, ok bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	n := r.nodes[id]
	if n == nil || n.record == nil {
		return nil, false
	}
	return n.record, true
}

// Removed tells whether the node was known once and removed.
func (r *Registry) Removed(id string) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.tombs[id] != nil
}

// Ticket gives its holder alone the right to change what is on disk and here of a node, whether it has a record or its
// agent alone speaks of it, so that the two see the same changes in the same order. ok is false where no such node is
// known, also where the last holder removed it.
func (r *Registry) Ticket(ctx context.Context, id string) (release func(), ok bool, err error) {
	n := r.known(id)
	if n == nil {
		return nil, false, nil
	}
	select {
	case <-n.ticket:
	case <-ctx.Done():
		return nil, true, ctx.Err()
	}
	release = func() { n.ticket <- struct{}{} }
	if r.known(id) != n {
		release()
		return nil, false, nil
	}
	return release, true, nil
}

func (r *Registry) known(id string) *node {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.nodes[id]
}

// add makes the node of an id that isn't known yet.
func (r *Registry) add(id, agentID string) *node {
	n := &node{agentID: agentID, ticket: make(chan struct{}, 1)}
	n.ticket <- struct{}{}
	r.nodes[id] = n
	if r.on[agentID] == nil {
		r.on[agentID] = map[string]*node{}
	}
	r.on[agentID][id] = n
	return n
}

func (r *Registry) remove(id string, n *node) {
	r.tellGone(id, n)
	delete(r.nodes, id)
	delete(r.on[n.agentID], id)
}

// Requested tells whether a request id was seen before.
func (r *Registry) Requested(requestID string) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	_, ok := r.requests[requestID]
	return ok && requestID != ""
}

// Reservation is what Reserve found or made.
type Reservation struct {
	// Record is the node's: the new one, or that of an earlier request with the same id.
	Record *sutrav1.NodeRecord
	// Existing: the request was seen before.
	Existing bool
	// Spawning is closed when the earlier request has its outcome; nil where that is known already.
	Spawning <-chan struct{}
	// Done must be called when the outcome of a new reservation is known.
	Done func()
}

// Reserve takes slot, port and path for a new node, all or nothing. A request id that was seen
// before reserves nothing.
func (r *Registry) Reserve(rec *sutrav1.NodeRecord, now time.Time) (Reservation, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if id, ok := r.requests[rec.GetRequestId()]; ok && rec.GetRequestId() != "" {
		if n := r.nodes[id]; n != nil && n.record != nil {
			return Reservation{Record: n.record, Existing: true, Spawning: n.spawning}, nil
		}
		return Reservation{Record: r.tombs[id], Existing: true}, nil
	}
	a := r.agents[rec.GetNode().GetAgentId()]
	if a == nil {
		return Reservation{}, NotRegistered(rec.GetNode().GetAgentId())
	}
	if err := a.callable(r.awake(now)); err != nil {
		return Reservation{}, err
	}
	if misfit := rpc.Fit(a.info, r.slots(a.info.GetAgentId()), rec.GetNode()); misfit != nil {
		return Reservation{}, misfit
	}
	n := r.add(rec.GetNode().GetNodeId(), rec.GetNode().GetAgentId())
	n.record, n.spawning, n.busy = rec, make(chan struct{}), 1
	if rec.GetRequestId() != "" {
		r.requests[rec.GetRequestId()] = rec.GetNode().GetNodeId()
	}
	return Reservation{Record: rec, Done: func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		close(n.spawning)
		n.spawning = nil
		n.busy--
		r.touch()
	}}, nil
}

// slots returns the nodes that hold a slot on an agent, with the ports and paths that the agent gave them.
func (r *Registry) slots(agentID string) []*sutrav1.Node {
	var held []*sutrav1.Node
	for _, n := range r.on[agentID] {
		switch {
		case n.record.GetNode().Ended() || n.discarded:
		case n.seen != nil:
			held = append(held, n.seen)
		default:
			held = append(held, n.record.GetNode())
		}
	}
	return held
}

// Begin keeps the reconciler off a node until the returned function is called.
func (r *Registry) Begin(id string) (end func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[id]
	if n == nil {
		return func() {}
	}
	return r.begin(n)
}

func (r *Registry) begin(n *node) (end func()) {
	n.busy++
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		n.busy--
		r.touch()
	}
}

// BeginIdle is Begin for the reconciler itself: it fails where anybody else is at the node.
func (r *Registry) BeginIdle(id string) (end func(), ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[id]
	if n == nil || n.busy > 0 {
		return nil, false
	}
	return r.begin(n), true
}

// Trouble notes that an attempt to bring a node to what is wanted failed, and returns the pause until
// the next: 1 s, doubling to at most a minute. A nil error ends the trouble.
func (r *Registry) Trouble(id string, err error, now time.Time) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := r.nodes[id]
	if n == nil {
		return 0
	}
	if err == nil {
		n.calm()
		return 0
	}
	pause := min(time.Second<<min(n.tries, 6), time.Minute)
	n.trouble, n.retryAt = err.Error(), now.Add(pause)
	n.tries++
	return pause
}

func (n *node) calm() { n.trouble, n.tries, n.retryAt = "", 0, time.Time{} }

// Restarts is the count of restarts that agents told of since this master started.
func (r *Registry) Restarts() uint64 {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.restarts
}

// NotRegistered is the error of an agent that nobody knows.
func NotRegistered(id string) *rpc.Error {
	return rpc.Errorf(rpc.AgentNotRegistered, "agent %s isn't registered", id).With("agent_id", id).
		WithHint("see which agents are: sutra list-agents")
}

func byID(a, b *sutrav1.Node) int { return strings.Compare(a.GetNodeId(), b.GetNodeId()) }

func sorted[M any](m map[string]M) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
