// Package nodes is the agent's node manager: it admits nodes, gives them ports,
// paths and command lines, runs them through the supervisor and says what they do.
package nodes

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/protobuf/proto"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/supervisor"
)

// Config is what the manager runs nodes with. All fields are needed but Metrics, AllowedPaths and the log budgets.
type Config struct {
	// Agent says the limits that nodes are admitted by: agent_id, max_nodes, memory_total_mb, default_memory_mb.
	Agent *sutrav1.Agent
	// Host is where the nodes' clients reach this host.
	Host string
	// Home is SUTRA_HOME, which no storage path may touch; its symbolic links are resolved.
	Home string
	// Dir is the agent's home: data/NODE_ID and logs/NODE_ID.log lie under it.
	Dir string
	// BasePort is where the search for a free port begins.
	BasePort int
	// Profiles by name; "default" is among them.
	Profiles map[string]config.Profile
	// AllowedPaths are the folders within which a storage path may lie that isn't the node's own; nil: anywhere but in Home.
	AllowedPaths []string
	// Builtin is the sutra binary itself, which profiles without a binary run.
	Builtin string
	// CheckEvery is the time from one check of a running node to the next.
	CheckEvery time.Duration
	// NodeLogBudget and LogBudget are how many bytes the log of one node and all logs may take; 0: the supervisor's defaults.
	NodeLogBudget, LogBudget int64
	// Cgroups is where nodes get control groups of their own.
	Cgroups supervisor.Cgroups
	Metrics *Metrics
	Log     zerolog.Logger
}

// Manager runs an agent's nodes.
type Manager struct {
	cfg     Config
	units   *supervisor.Supervisor
	logs    *supervisor.Logs
	records records
	wanted  wanted

	// dirty holds a token while something changed that nobody has asked for yet.
	dirty chan struct{}

	mu       sync.Mutex // guards what follows; no I/O under it
	entries  map[string]*entry
	gone     map[string]uint64 // revision at which a node was forgotten, until that was passed on
	revision uint64            // of the last change
	round    uint64            // of measuring what the nodes use
	closing  bool
	// erasing are the ids whose records are being removed, each closed when that is done.
	erasing map[string]chan struct{}
	// owed are entries whose records couldn't be removed. That is tried again: on record, they would come back.
	owed []*entry

	erasures sync.WaitGroup
}

// entry is one node from its admission until it is forgotten.
type entry struct {
	id      string // of the node
	profile string // of the node
	// launched is closed once either unit or refused is set.
	launched chan struct{}
	// writing holds one token; who writes the entry's record has it meanwhile. written, the version on disk, and copied, that
	// there is a copy of what is wanted, belong to whoever has the token.
	writing chan struct{}
	written uint64
	copied  bool
	// silent is closed once nothing of the node is left that could write to its log. Under Manager.mu.
	silent chan struct{}
	// probe asks the node whether it works; nil where there is none to ask. It is set before there is a unit.
	probe health.Probe

	// guarded by Manager.mu
	spec     *sutrav1.Node // replaced, never changed: what is wanted, with port and path filled in
	record   supervisor.Record
	version  uint64 // of spec, record and erased, as far as they are to be on disk
	erased   bool   // nothing is to be on disk any more
	unit     *supervisor.Unit
	refused  *rpc.Error
	stray    *sutrav1.ProcessRecord // how it is taken up, of a node that runs and can't be supervised until then; else nil
	state    supervisor.State
	enforced sutrav1.Enforcement // of the memory limit, by the last process that there was
	health   sutrav1.NodeHealth
	trouble  string // why the last probe failed
	checks   checks
	revision uint64
	awaited  int    // callers that wait for the outcome of its start
	release  func() // lets other agents have its port; nil where that isn't kept from them
	usage    usage
	disk     uint64 // bytes under the storage path; 0 before they were first counted

	files files
}

// newEntry is the entry of a node that nothing is known of but what is wanted.
func newEntry(spec *sutrav1.Node) *entry {
	e := &entry{
		id: spec.GetNodeId(), profile: spec.GetProfile(), launched: make(chan struct{}), silent: make(chan struct{}),
		writing: make(chan struct{}, 1), spec: spec, health: sutrav1.NodeHealth_NODE_HEALTH_NOT_READY,
	}
	e.writing <- struct{}{}
	return e
}

// New takes up the nodes that an earlier agent of this home left running, or is to run again.
func New(cfg Config) (*Manager, error) {
	m := &Manager{
		cfg: cfg, wanted: wanted(filepath.Join(cfg.Dir, "wanted")), dirty: make(chan struct{}, 1), entries: map[string]*entry{},
		gone: map[string]uint64{}, erasing: map[string]chan struct{}{},
	}
	err := m.openWays()
	if err != nil {
		return nil, err
	}
	if m.units, err = supervisor.New((*journal)(m), m.happened); err != nil {
		return nil, err
	}
	if m.logs, err = m.openLogs(); err != nil {
		return nil, err
	}
	records, kept, aside, err := openRecords(filepath.Join(cfg.Dir, "nodes.db"))
	if aside == "" && err != nil {
		return nil, err
	}
	m.records = records
	if aside != "" {
		cfg.Log.Error().Err(err).Str("put_aside", aside).
			Msg("the records of this agent's nodes are damaged; they are made anew from the processes that run")
	}
	m.restore(append(kept, m.unrecorded(kept)...))
	return m, nil
}

// Dirty yields once after one or more changes.
func (m *Manager) Dirty() <-chan struct{} { return m.dirty }

// Spawn runs a node and waits until it is ready, has died or ctx ends; in the last
// case the node goes on starting. A node_id that is known already isn't run again:
// its outcome is awaited.
func (m *Manager) Spawn(ctx context.Context, want *sutrav1.Node) (*sutrav1.Node, error) {
	e, isNew, err := m.admit(ctx, want)
	if err != nil {
		return nil, err
	}
	if isNew {
		m.launch(e) // not to be broken off: a caller that hangs up leaves a whole node, not half of one
	}
	return m.await(ctx, e)
}

// admit takes a node in, with its slot, port and path, or returns the entry that has its id.
func (m *Manager) admit(ctx context.Context, want *sutrav1.Node) (e *entry, isNew bool, err error) {
	id := want.GetNodeId()
	if _, ok := m.cfg.Profiles[want.GetProfile()]; !ok {
		return nil, false, m.unknownProfile(want.GetProfile())
	}
	spec := proto.CloneOf(want)
	if spec.GetMemoryLimitMb() == 0 {
		spec.MemoryLimitMb = m.cfg.Agent.GetDefaultMemoryMb()
	}
	if spec.StoragePath, err = m.storagePath(spec); err != nil {
		return nil, false, err
	}

	m.mu.Lock()
	for erased := m.erasing[id]; erased != nil; erased = m.erasing[id] {
		m.mu.Unlock()
		select {
		case <-erased:
		case <-ctx.Done():
			return nil, false, rpc.AsError(ctx.Err())
		}
		m.mu.Lock()
	}
	defer m.mu.Unlock()
	stray := m.entries[id]
	if stray != nil && !stray.astray() {
		return stray, false, nil // also one that is being taken up: it is awaited, and not taken up a second time
	}
	if m.closing {
		return nil, false, rpc.Errorf(rpc.ShuttingDown, "agent %s is shutting down", m.cfg.Agent.GetAgentId())
	}
	if misfit := rpc.Fit(m.cfg.Agent, m.live(id), spec); misfit != nil {
		return nil, false, misfit
	}
	spec.Desired = sutrav1.Desired_DESIRED_RUNNING
	e = newEntry(spec)
	if stray != nil { // it is taken up, unless it has ended
		e.stray = stray.stray
	}
	m.entries[id] = e
	m.touch(e)
	return e, true, nil
}

// live returns the nodes that hold a slot, but for one. Needs mu.
func (m *Manager) live(but string) []*sutrav1.Node {
	nodes := make([]*sutrav1.Node, 0, len(m.entries))
	for id, e := range m.entries {
		if id != but && e.state.Phase != supervisor.Failed && !e.state.Completed {
			nodes = append(nodes, e.spec)
		}
	}
	return nodes
}

// launch brings an admitted entry to its first process, or takes it back.
func (m *Manager) launch(e *entry) {
	unit, err := m.start(e)
	if err != nil && e.stray != nil { // it runs on
		m.mu.Lock()
		defer m.mu.Unlock()
		e.refused = rpc.AsError(err)
		m.touch(e)
		close(e.launched)
		return
	}
	if err != nil {
		m.erase(e)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		e.refused = rpc.AsError(err)
		m.forget(e)
	} else {
		e.unit, e.stray = unit, nil
	}
	close(e.launched)
}

// start does what may take time: files, port, fork. Nothing of it is left where it fails.
func (m *Manager) start(e *entry) (unit *supervisor.Unit, err error) {
	profile := m.cfg.Profiles[e.spec.GetProfile()]
	began := time.Now()
	binary, err := m.binary(profile)
	if err != nil {
		return nil, err
	}
	if e.files, err = m.prepare(e.id, e.spec.GetStoragePath(), profile); err != nil {
		return nil, err
	}
	m.logs.Watch(e.id)
	defer func() {
		if err != nil {
			m.undo(e)
		}
	}()
	if m.runsAlready(e) {
		return m.retake(e, profile, binary)
	}
	release, err := m.takePort(e)
	if err != nil {
		return nil, err
	}
	release = sync.OnceFunc(release)
	m.mu.Lock()
	e.release = release
	m.mu.Unlock()
	defer func() {
		if err != nil {
			release()
			return
		}
		go func() { // for one that is let go while it starts, of which no event tells
			<-unit.Settled()
			release()
		}()
	}()
	m.cfg.Metrics.stage("prepare", began)

	began = time.Now()
	spec, err := m.spec(e, profile, binary)
	if err != nil {
		return nil, err
	}
	unit, err = m.units.Start(spec)
	if errors.Is(err, supervisor.ErrDir) { // it was there a moment ago
		return nil, pathUnusable(e.spec.GetStoragePath(), err, profile.RunAs)
	}
	if err != nil {
		hint := "correct storage_binary of profile %s in the agent's file, and restart the agent"
		if errors.Is(err, supervisor.ErrLimit) {
			hint = "lower open_files of profile %s in the agent's file, or let the agent have as many (LimitNOFILE= of a systemd unit), and restart it"
		}
		return nil, rpc.Errorf(rpc.BinaryUnusable, "node %s can't be started: %v", e.spec.GetNodeId(), err).
			With("node_id", e.spec.GetNodeId()).WithHint(hint, e.spec.GetProfile())
	}
	m.cfg.Metrics.stage("fork", began)
	return unit, nil
}

// await waits for the outcome of an entry's start.
func (m *Manager) await(ctx context.Context, e *entry) (*sutrav1.Node, error) {
	m.mu.Lock()
	e.awaited++
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		e.awaited--
		m.mu.Unlock()
	}()
	began := time.Now()
	if !e.started(ctx) {
		return nil, m.notReadyYet(e)
	}
	if e.refused != nil {
		return nil, e.refused
	}
	select {
	case <-e.unit.Settled():
	case <-ctx.Done():
		return nil, m.notReadyYet(e)
	}
	m.cfg.Metrics.stage("ready", began)

	m.mu.Lock()
	state, node, stopping := e.state, m.view(e), e.stopping()
	m.mu.Unlock()
	if state.Phase == supervisor.Failed && !state.Completed && ctx.Err() == nil {
		m.drop(e) // the caller is told; where there is none, the node stays to be looked at
	}
	switch {
	case state.Completed: // it served, and that is over by now
		return node, nil
	case state.Phase == supervisor.Failed:
		return nil, rpc.Exited(node)
	case stopping:
		return nil, rpc.Errorf(rpc.StoppedMeanwhile, "node %s was stopped while it was starting", node.GetNodeId()).
			With("node_id", node.GetNodeId())
	case state.Phase == supervisor.Starting && ended(e.unit): // let go: nobody here waits for it any more
		return nil, m.notReadyYet(e)
	default:
		return node, nil
	}
}

func (m *Manager) notReadyYet(e *entry) *rpc.Error {
	id := e.id
	return rpc.Errorf(rpc.NotReadyYet, "node %s was started and isn't ready yet", id).With("node_id", id).
		WithHint("it goes on starting: sutra node-status --node %s", id)
}

// ended tells whether nobody supervises a unit any more.
func ended(u *supervisor.Unit) bool {
	select {
	case <-u.Done():
		return true
	default:
		return false
	}
}

// Stop ends a node, forgets it and returns its last state; nil where there is no
// such node. An error means that ctx ended first: the stop goes on.
func (m *Manager) Stop(ctx context.Context, id string) (*sutrav1.Node, error) {
	m.stopStrays(id)
	m.mu.Lock()
	e := m.entries[id]
	m.mu.Unlock()
	if e == nil {
		return nil, nil
	}
	if !e.started(ctx) {
		return nil, m.stillRunning(e)
	}
	if e.refused != nil {
		if m.isStray(e) {
			return nil, e.refused
		}
		return nil, nil
	}
	m.note(e, func() {
		spec := proto.CloneOf(e.spec)
		spec.Desired = sutrav1.Desired_DESIRED_STOPPED
		e.spec = spec
		m.touch(e) // STOPPING is news
	})
	// The master has written down that the node is to end. That this agent has, too, is waited for by whoever is answered,
	// and not by the node: what was called stopped isn't started again after a crash.
	noted := make(chan error, 1)
	go func() { noted <- m.persist(e) }()
	e.unit.Stop()
	var unnoted error
	select {
	case unnoted = <-noted:
	case <-ctx.Done():
		return nil, m.stillRunning(e)
	}
	if unnoted != nil {
		m.cfg.Log.Warn().Err(unnoted).Str("node_id", id).Msg("stop not written down; it is done all the same")
	}
	select {
	case <-e.unit.Done():
	case <-ctx.Done():
		return nil, m.stillRunning(e)
	}
	if phase := e.unit.State().Phase; phase != supervisor.Stopped && phase != supervisor.Failed {
		// It was let go before it took notice.
		err := rpc.Errorf(rpc.StillRunning, "node %s hasn't ended: its agent is shutting down", id).With("node_id", id)
		if unnoted != nil {
			return nil, err.WithHint("repeat the stop once the agent runs again: sutra stop --node %s", id)
		}
		return nil, err.WithHint("its stop is noted, and done at the agent's next start: sutra node-status --node %s", id)
	}
	m.drop(e)
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.view(e), nil
}

func (m *Manager) stillRunning(e *entry) *rpc.Error {
	m.mu.Lock()
	left := e.state.Unkillable
	m.mu.Unlock()
	if left != "" {
		return rpc.Errorf(rpc.StillRunning, "node %s hasn't ended: %s, outlives SIGKILL", e.id, left).With("node_id", e.id).
			WithHint("look at the disk or device that it waits for; it is gone once that answers: sutra node-status --node %s", e.id)
	}
	return rpc.Errorf(rpc.StillRunning, "node %s hasn't ended yet", e.id).With("node_id", e.id).
		WithHint("it is killed when its profile's stop_grace_secs is over: sutra node-status --node %s", e.id)
}

// Get returns what a node does now.
func (m *Manager) Get(id string) (*sutrav1.Node, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[id]
	if e == nil {
		return nil, false
	}
	return m.view(e), true
}

// List returns what all nodes do now, by id.
func (m *Manager) List() []*sutrav1.Node {
	nodes, _, _ := m.Changes(0)
	return nodes
}

// Changes returns the nodes that changed after a revision (0: all of them), those that
// were forgotten after it, and the revision that this brings the caller to. What was
// forgotten at or before since is dropped: the caller has passed it on.
func (m *Manager) Changes(since uint64) (changed []*sutrav1.Node, gone []string, now uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range m.entries {
		if e.revision > since {
			changed = append(changed, m.view(e))
		}
	}
	for id, at := range m.gone {
		switch {
		case at > since:
			gone = append(gone, id)
		default:
			delete(m.gone, id)
		}
	}
	slices.SortFunc(changed, func(a, b *sutrav1.Node) int { return strings.Compare(a.GetNodeId(), b.GetNodeId()) })
	slices.Sort(gone)
	return changed, gone, m.revision
}

// Close ends the supervision, and the nodes as well where stop is set; else they run on, and the next agent of this
// home takes them up. It waits until that is done. No node is admitted any more.
func (m *Manager) Close(stop bool) error {
	if stop {
		m.stopStrays("")
	}
	m.mu.Lock()
	m.closing = true
	entries := make([]*entry, 0, len(m.entries))
	for _, e := range m.entries {
		entries = append(entries, e)
	}
	m.mu.Unlock()
	for _, e := range entries {
		<-e.launched
		switch {
		case e.unit == nil:
		case stop:
			e.unit.Stop()
			e.unit.Release() // what can't be killed isn't waited for
		default:
			e.unit.Release()
		}
	}
	for _, e := range entries {
		if e.unit != nil {
			<-e.unit.Done()
		}
	}
	if stop || len(m.List()) == 0 {
		if err := m.cfg.Cgroups.Remove(); err != nil {
			m.cfg.Log.Warn().Err(err).Msg("control groups not removed")
		}
	}
	m.erasures.Wait()
	m.settle()
	return m.records.db.Close()
}

// drop erases and forgets an entry.
func (m *Manager) drop(e *entry) {
	m.mu.Lock()
	known := m.entries[e.id] == e
	m.mu.Unlock()
	if !known {
		return
	}
	m.erase(e)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.forget(e)
}

// forget drops an entry; its slot, port and path are free. Needs mu.
func (m *Manager) forget(e *entry) {
	id := e.spec.GetNodeId()
	if m.entries[id] != e {
		return
	}
	delete(m.entries, id)
	m.silence(e)
	m.touch(e)
	m.gone[id] = e.revision
}

// touch marks an entry as changed. Needs mu.
func (m *Manager) touch(e *entry) {
	m.revision++
	e.revision = m.revision
	select {
	case m.dirty <- struct{}{}:
	default:
	}
}

// started waits until the outcome of the entry's launch is known; false where ctx ended before. A launch that is
// over counts also for a caller whose time is: its stop must be noted.
func (e *entry) started(ctx context.Context) bool {
	select {
	case <-e.launched:
		return true
	default:
	}
	select {
	case <-e.launched:
		return true
	case <-ctx.Done():
		return false
	}
}
