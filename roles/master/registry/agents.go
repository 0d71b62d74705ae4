package registry

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// Claim prepares a registration: it refuses another agent's id and gives the epoch. The record
// that it returns is to be persisted, and then registered or released.
func (r *Registry) Claim(a *sutrav1.Agent, now time.Time) (*sutrav1.Agent, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := a.GetAgentId()
	rec := proto.CloneOf(a)
	rec.Health, rec.LastHeartbeat, rec.NodeCount, rec.Epoch = 0, nil, 0, r.epochs[id]+1
	rec.CertificateExpiresAt = nil
	known := r.agents[id]
	if known == nil {
		known = &agent{known: now, live: health.NewLiveness(r.thresholds, r.awake(now))}
		r.agents[id] = known
	}
	if soon := known.tooSoon(id, now); soon != nil {
		return nil, soon
	}
	for _, other := range []*sutrav1.Agent{known.info, known.claim} {
		if other == nil {
			continue
		}
		if other.GetInstanceId() != a.GetInstanceId() && known.live.State(r.awake(now)) != health.Offline {
			return nil, taken(other, known.live.State(r.awake(now)))
		}
		rec.Epoch = max(rec.GetEpoch(), other.GetEpoch()+1)
		rec.Draining = rec.GetDraining() || other.GetDraining()
	}
	known.claim = rec
	return rec, nil
}

func taken(by *sutrav1.Agent, state health.State) *rpc.Error {
	return rpc.Errorf(rpc.AgentIDTaken, "agent id %s is taken by the agent on %s at %s, which is %s",
		by.GetAgentId(), by.GetHostname(), by.GetEndpoint(), state).
		With("agent_id", by.GetAgentId()).With("endpoint", by.GetEndpoint()).
		WithHint("give this agent another agent_id, or stop the other one and wait until it is OFFLINE: sutra list-agents")
}

// Taken says that an agent has an id already and isn't OFFLINE; nil where none does.
func (r *Registry) Taken(id string, now time.Time) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	a := r.agents[id]
	if a == nil || a.info == nil || a.live.State(r.awake(now)) == health.Offline {
		return nil
	}
	return taken(a.info, a.live.State(r.awake(now)))
}

// Knows tells whether there is an agent of that id, OFFLINE or not, or a node of it that hasn't ended.
func (r *Registry) Knows(id string) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if a := r.agents[id]; a != nil && a.info != nil {
		return true
	}
	for _, n := range r.on[id] {
		if n.record != nil && !n.record.GetNode().Ended() {
			return true
		}
	}
	return false
}

// Leave makes an agent OFFLINE that isn't to be heard any more.
func (r *Registry) Leave(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.agents[id]
	if a == nil || a.info == nil {
		return
	}
	a.live.Left()
	r.show(id, a, health.Offline, "it is kept out of the grid")
	a.inventory = false
	r.touch()
}

// Release takes a claim back that couldn't be persisted.
func (r *Registry) Release(claim *sutrav1.Agent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.agents[claim.GetAgentId()]
	if a == nil || a.claim != claim {
		return
	}
	a.claim = nil
	if a.info == nil {
		delete(r.agents, claim.GetAgentId())
	}
}

// Register puts a persisted claim into force, with all that the agent runs.
func (r *Registry) Register(claim *sutrav1.Agent, nodes []*sutrav1.Node, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.agents[claim.GetAgentId()]
	if a == nil || a.claim != claim {
		return // a later registration of the same agent overtook this one
	}
	a.info, a.claim = claim, nil
	a.live.Beat(r.awake(now))
	a.lastBeat, a.sequence, a.inventory = now, 0, false
	a.inventory = !r.observeAll(a, nodes, now) // in doubt, the next beat is asked to be full
	for _, n := range r.on[claim.GetAgentId()] {
		n.calm() // what failed at the agent as it was may well succeed now
	}
	r.touch()
}

// Unregister makes an agent OFFLINE that has taken its leave, unless it has started again since. It tells whether it did.
func (r *Registry) Unregister(id string, epoch uint64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.agents[id]
	if a == nil || a.info == nil || a.info.GetEpoch() != epoch {
		return false
	}
	a.live.Left()
	r.show(id, a, health.Offline, "it took its leave") // no transition to look for: it is known why
	a.inventory = false
	r.touch()
	return true
}

// Idle returns the OFFLINE agents that have no node, wanted or seen, and that haven't been heard of for at least
// silent, by id. Ended nodes need no agent.
func (r *Registry) Idle(silent time.Duration, now time.Time) []*sutrav1.Agent {
	r.mu.RLock()
	defer r.mu.RUnlock()
	var idle []*sutrav1.Agent
	for _, id := range sorted(r.agents) {
		if a := r.agents[id]; r.idle(a, now) && now.Sub(a.known) >= silent && now.Sub(a.lastBeat) >= silent {
			idle = append(idle, a.info)
		}
	}
	return idle
}

func (r *Registry) idle(a *agent, now time.Time) bool {
	if a.info == nil || a.claim != nil || a.live.State(r.awake(now)) != health.Offline {
		return false
	}
	for _, n := range r.on[a.info.GetAgentId()] {
		if n.seen != nil || n.busy > 0 || !n.record.GetNode().Ended() {
			return false
		}
	}
	return true
}

// Forget takes out an agent that the store has forgotten, unless it came back meanwhile.
func (r *Registry) Forget(rec *sutrav1.Agent, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := rec.GetAgentId()
	if a := r.agents[id]; a != nil && a.info == rec && r.idle(a, now) {
		delete(r.agents, id)
		r.epochs[id] = rec.GetEpoch()
		r.touch()
	}
}

// Beat takes in a heartbeat. wantFull asks for one with everything.
func (r *Registry) Beat(b *sutrav1.HeartbeatRequest, now time.Time) (wantFull bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := r.agents[b.GetAgentId()]
	if a == nil || a.info == nil {
		return false, NotRegistered(b.GetAgentId())
	}
	switch epoch := a.info.GetEpoch(); {
	case b.GetEpoch() < epoch:
		return false, rpc.Errorf(rpc.EpochSuperseded, "agent %s has started again since: this beat is of epoch %d, and epoch %d is in force",
			b.GetAgentId(), b.GetEpoch(), epoch).With("agent_id", b.GetAgentId())
	case b.GetEpoch() > epoch:
		// The epoch's record was lost or overtaken on its way to disk; the agent knows better.
		info := proto.CloneOf(a.info)
		info.Epoch = b.GetEpoch()
		a.info, a.sequence, a.inventory = info, 0, false
	case b.GetSequence() <= a.sequence:
		return false, nil // late: a newer one was here before
	}
	a.sequence = b.GetSequence()
	a.live.Beat(r.awake(now))
	a.lastBeat = now
	if b.GetFull() {
		doubt := r.observeAll(a, b.GetChanged(), now)
		r.measured(b)
		r.touch()
		return doubt, nil
	}
	if !a.inventory {
		return true, nil
	}
	for _, n := range b.GetChanged() {
		if n.GetAgentId() == b.GetAgentId() {
			r.observe(n, now)
		}
	}
	for _, id := range b.GetGone() {
		if n := r.nodes[id]; n != nil && n.agentID == b.GetAgentId() {
			r.unsee(id, n)
		}
	}
	r.measured(b)
	if len(b.GetChanged())+len(b.GetGone()) > 0 {
		r.touch()
	}
	return false, nil
}

// measured takes in what a beat says of what nodes use.
func (r *Registry) measured(b *sutrav1.HeartbeatRequest) {
	for _, u := range b.GetUsage() {
		if n := r.nodes[u.GetNodeId()]; n != nil && n.agentID == b.GetAgentId() && n.seen != nil {
			n.usage = u.GetUsage()
		}
	}
}

// observeAll takes in everything that an agent runs: what isn't listed isn't there. But a list may have been on its way when
// the agent answered a call with a node that it doesn't have yet: of such a one there is doubt, until the next list.
func (r *Registry) observeAll(a *agent, nodes []*sutrav1.Node, now time.Time) (doubt bool) {
	listed := make(map[string]bool, len(nodes))
	for _, n := range nodes {
		if n.GetAgentId() == a.info.GetAgentId() {
			listed[n.GetNodeId()] = true
			r.observe(n, now)
		}
	}
	for id, n := range r.on[a.info.GetAgentId()] {
		switch {
		case listed[id]:
		case n.answered:
			doubt = true
		default:
			r.unsee(id, n)
		}
		n.answered = false
	}
	a.inventory = true
	return doubt
}

func (r *Registry) unsee(id string, n *node) {
	n.seen, n.seenAt, n.usage, n.answered = nil, time.Time{}, nil, false
	if n.record == nil {
		r.remove(id, n)
	}
}

// Observe takes in what an agent answered about one of its nodes.
func (r *Registry) Observe(n *sutrav1.Node, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.observe(n, now)
	if known := r.nodes[n.GetNodeId()]; known != nil && known.seen == n {
		known.answered = true
	}
}

func (r *Registry) observe(said *sutrav1.Node, now time.Time) {
	if !r.bounded(said) {
		return
	}
	n := r.nodes[said.GetNodeId()]
	if n == nil {
		n = r.add(said.GetNodeId(), said.GetAgentId())
	} else if n.agentID != said.GetAgentId() {
		return // only the agent that it was placed on is believed
	}
	if n.seen != nil {
		// Without an inventory, what was seen is of an older epoch, whose revisions say nothing about this one's.
		if a := r.agents[said.GetAgentId()]; a != nil && a.inventory && said.GetRevision() < n.seen.GetRevision() {
			return // overtaken on its way by a newer one
		}
		if more := said.GetRestartCount(); more > n.seen.GetRestartCount() {
			r.restarts += uint64(more - n.seen.GetRestartCount())
		}
	}
	if said.GetUsage() != nil || said.GetPid() != n.seen.GetPid() {
		n.usage = said.GetUsage()
	}
	n.seen, n.seenAt = said, now
	r.tell(said.GetNodeId(), n)
}

// Gone takes in that an agent has a node no more.
func (r *Registry) Gone(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := r.nodes[id]; n != nil {
		r.unsee(id, n)
	}
}

// callable tells why an agent can't be called now; nil where it can.
func (a *agent) callable(now time.Time) error {
	if a.info == nil {
		return NotRegistered(a.claim.GetAgentId())
	}
	id := a.info.GetAgentId()
	switch a.live.State(now) {
	case health.Offline:
		return rpc.Errorf(rpc.AgentOffline, "agent %s is OFFLINE: %s", id, a.silence(now)).With("agent_id", id).
			WithHint("look at the agent on its host, or choose another: sutra list-agents")
	case health.Unknown:
		e := rpc.Errorf(rpc.AgentOffline, "agent %s hasn't been heard of since the master started", id).With("agent_id", id).
			WithHint("it reports within seconds if it lives: sutra list-agents")
		e.RetryAfter = time.Second
		return e
	}
	return nil
}

// silence says how long an agent hasn't been heard of.
func (a *agent) silence(now time.Time) string {
	if d, ok := a.live.Silent(now); ok {
		return fmt.Sprintf("last heard of %v ago", d.Round(time.Second))
	}
	return "not heard of since the master started"
}

// Callable returns an agent that can be called now, or the reason why not.
func (r *Registry) Callable(id string, now time.Time) (*sutrav1.Agent, error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	a := r.agents[id]
	if a == nil {
		return nil, NotRegistered(id)
	}
	return a.info, a.callable(r.awake(now))
}

// Agents returns all agents as they stand now, by id.
func (r *Registry) Agents(now time.Time) []*sutrav1.Agent {
	r.mu.RLock()
	defer r.mu.RUnlock()
	count := map[string]uint32{}
	for _, n := range r.nodes {
		if !n.record.GetNode().Ended() && !n.discarded {
			count[n.agentID]++
		}
	}
	all := make([]*sutrav1.Agent, 0, len(r.agents))
	for _, id := range sorted(r.agents) {
		a := r.agents[id]
		if a.info == nil {
			continue
		}
		v := proto.CloneOf(a.info)
		v.Health = healthOf(a.live.State(r.awake(now)))
		v.NodeCount = count[id]
		if d, ok := a.live.Silent(r.awake(now)); ok {
			v.LastHeartbeat = timestamppb.New(now.Add(-d))
		}
		all = append(all, v)
	}
	return all
}

func healthOf(s health.State) sutrav1.AgentHealth {
	return map[health.State]sutrav1.AgentHealth{
		health.Unknown:  sutrav1.AgentHealth_AGENT_HEALTH_UNKNOWN,
		health.Healthy:  sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY,
		health.Degraded: sutrav1.AgentHealth_AGENT_HEALTH_DEGRADED,
		health.Offline:  sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE,
	}[s]
}

// Transition is a change of an agent's health.
type Transition struct {
	AgentID  string
	From, To health.State
	// Silence says how long the agent hasn't been heard of.
	Silence string
}

// Transitions returns the changes of health since the last call, by agent id.
func (r *Registry) Transitions(now time.Time) []Transition {
	r.mu.Lock()
	defer r.mu.Unlock()
	var changes []Transition
	awake := r.awake(now)
	for id, a := range r.agents {
		if to := a.live.State(awake); to != a.shown {
			changes = append(changes, Transition{AgentID: id, From: a.shown, To: to, Silence: a.silence(awake)})
		}
	}
	slices.SortFunc(changes, func(a, b Transition) int { return strings.Compare(a.AgentID, b.AgentID) })
	for _, c := range changes {
		why := c.Silence
		if c.To == health.Healthy {
			why = "it is heard of"
		}
		r.show(c.AgentID, r.agents[c.AgentID], c.To, why)
	}
	if len(changes) > 0 {
		r.touch()
	}
	return changes
}
