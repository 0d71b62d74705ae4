// Package agent is the daemon on each host: it runs the nodes that the master asks
// for and tells it what they do.
package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/rs/zerolog"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/agent/nodes"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/supervisor"
)

// Config is what an agent is made of.
type Config struct {
	// Home is SUTRA_HOME; the agent's own part of it is agents/AGENT_ID.
	Home string
	// File is the agent's validated file.
	File *config.Agent
	// Listen opens where the master calls, and where /metrics and /healthz are served; nil: nowhere. New calls it once the home
	// is this agent's: of two starts of one agent, the second is to hear that, and not that its port is taken.
	Listen func() (calls, metrics net.Listener, err error)
	// Binary is the sutra binary, which runs the built-in storage server.
	Binary string
	// StopNodes takes the nodes along when the agent ends. Else they run on, and are taken up at its next start.
	StopNodes bool
	// JoinToken gets the agent its identity, where it has none yet; empty: the token that a master of this host has left.
	JoinToken string
	// JoinTokenFile has that token, where JoinToken is empty; empty: none has. It is read when a token is needed.
	JoinTokenFile string
	// Insecure has everything in the clear.
	Insecure rpc.Insecure
	Version  string
	Log      zerolog.Logger
}

// Agent runs the nodes of one host.
type Agent struct {
	cfg      Config
	unlock   func() error
	calls    net.Listener
	http     net.Listener // nil: there is none
	registry *prometheus.Registry
	metrics  *rpc.Metrics
	self     *sutrav1.Agent
	nodes    *nodes.Manager
	link     *link
	identity *identity // nil: in the clear
	audit    *rpc.Audit
}

// New takes the agent's home and prepares everything; Run starts it.
func New(ctx context.Context, cfg Config) (*Agent, error) {
	if err := keepDescriptors(); err != nil {
		return nil, err
	}
	if err := mayRunAs(cfg.File.Profiles); err != nil {
		return nil, err
	}
	id := cfg.File.AgentID
	dir := filepath.Join(cfg.Home, "agents", id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the agent's home: %w", err)
	}
	dir, err := filepath.EvalSymlinks(dir) // the kernel names a node's log so
	if err != nil {
		return nil, fmt.Errorf("find the agent's home: %w", err)
	}
	unlock, err := config.Lock(filepath.Join(dir, "lock"))
	if errors.Is(err, config.ErrLocked) {
		return nil, rpc.Errorf(rpc.AgentIDTaken, "agent %s can't have its home %s: %v", id, dir, err).
			WithHint("an agent with this agent_id runs on this host; give this one another, or stop that one")
	}
	if err != nil {
		return nil, fmt.Errorf("agent %s can't have its home %s: %w", id, dir, err)
	}
	a := &Agent{cfg: cfg, unlock: unlock, registry: prometheus.NewRegistry()}
	if a.calls, a.http, err = cfg.Listen(); err != nil {
		return nil, errors.Join(err, unlock())
	}
	if err := a.build(ctx, dir); err != nil {
		return nil, errors.Join(err, a.leave())
	}
	return a, nil
}

// leave gives back what New took. To close a listener once more is no error here: who serves closes it, too.
func (a *Agent) leave() error {
	_ = a.calls.Close()
	if a.http != nil {
		_ = a.http.Close()
	}
	return a.unlock()
}

func (a *Agent) build(ctx context.Context, dir string) error {
	file := a.cfg.File
	instance, err := instanceID(filepath.Join(dir, "instance_id"))
	if err != nil {
		return err
	}
	masters := file.MasterEndpoints
	if len(masters) == 0 {
		masters = []string{config.LocalMaster(a.cfg.Home)}
	}
	endpoint, err := advertised(ctx, file.Advertise, a.calls.Addr(), masters[0])
	if err != nil {
		return err
	}
	hostname, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("ask for the host's name: %w", err)
	}
	var host unix.Sysinfo_t
	if err := unix.Sysinfo(&host); err != nil {
		return fmt.Errorf("ask for the host's memory: %w", err)
	}
	a.self = &sutrav1.Agent{
		AgentId: file.AgentID, Hostname: hostname, Endpoint: endpoint, Platform: runtime.GOOS + "/" + runtime.GOARCH,
		Version: a.cfg.Version, MaxNodes: uint32(file.MaxNodes), Labels: file.Labels,
		MemoryTotalMb: uint32(host.Totalram * uint64(host.Unit) >> 20), DefaultMemoryMb: uint32(file.DefaultMemoryMB),
		Profiles: slices.Sorted(maps.Keys(file.Profiles)), InstanceId: instance,
	}

	a.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	a.metrics = rpc.NewMetrics(a.registry)
	nodeHost, _, _ := net.SplitHostPort(endpoint) // advertised makes sure of the form
	groups, lacking := supervisor.OpenCgroups("sutra-" + instance)
	for _, what := range lacking {
		a.cfg.Log.Warn().Msg(what)
	}
	home, err := filepath.EvalSymlinks(a.cfg.Home)
	if err != nil {
		return fmt.Errorf("find the home: %w", err)
	}
	a.nodes, err = nodes.New(nodes.Config{
		Cgroups: groups, Home: home,
		Agent: a.self, Host: nodeHost, Dir: dir, BasePort: file.BasePort, Profiles: file.Profiles, AllowedPaths: file.AllowedPaths, Builtin: a.cfg.Binary,
		NodeLogBudget: int64(file.NodeLogBudgetMB) << 20, LogBudget: int64(file.LogBudgetMB) << 20,
		CheckEvery: file.HealthCheckInterval, Metrics: nodes.NewMetrics(a.registry), Log: a.cfg.Log,
	})
	if err != nil {
		return err
	}
	a.nodes.Collect(a.registry)
	if a.audit, err = rpc.OpenAudit(dir, a.cfg.Log, nil); err != nil {
		return err
	}
	if a.cfg.Insecure == rpc.Secure {
		a.identity = &identity{
			agentID: file.AgentID, file: filepath.Join(dir, "identity.pem"), keyFile: filepath.Join(dir, "join.key"), home: a.cfg.Home,
			token: a.cfg.JoinToken, tokenFile: a.cfg.JoinTokenFile, log: a.cfg.Log, soon: make(chan struct{}, 1),
		}
		// One that can't be used ends no agent that has nodes to look after: the link tells of it, and tries on.
		if err := a.identity.open(); err != nil && len(a.nodes.List()) == 0 {
			return err
		}
		rpc.ExportCredentials(a.registry, &a.identity.held)
	} else {
		a.cfg.Log.Warn().Msg("--insecure: everything is sent in the clear, and whoever reaches this port runs this host's nodes")
	}
	a.link = &link{
		self: a.self, identity: a.identity, masters: masters, every: file.HeartbeatInterval, nodes: a.nodes,
		rpcMetrics: a.metrics, metrics: newLinkMetrics(a.registry), log: a.cfg.Log,
	}
	return nil
}

// Run runs the agent until ctx ends, or until the master refuses it for good. Then it lets its
// nodes run on, or stops them where it was told to, takes leave of the master and gives its home back.
func (a *Agent) Run(ctx context.Context) error {
	log := a.cfg.Log
	defer func() {
		if err := a.leave(); err != nil {
			log.Warn().Err(err).Msg("home not unlocked")
		}
	}()
	defer func() { _ = a.audit.Close() }() // nothing is buffered
	guard := rpc.Guard{Audit: a.audit, ForMasters: true}
	if a.identity != nil {
		guard.Credentials = &a.identity.held
	}
	server := rpc.NewServer(log, a.metrics, guard)
	if a.identity != nil {
		a.identity.expel = server.Expel
	}
	sutrav1.RegisterGridAgentServer(server, &service{agentID: a.self.GetAgentId(), nodes: a.nodes})

	// What talks outlives what works: while nodes stop, the master can ask for them and hears the last of them.
	talking, stopTalking := context.WithCancel(context.WithoutCancel(ctx))
	defer stopTalking()
	asked := ctx // ends when the agent is told to stop, and not when it fails
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return rpc.Serve(talking, server, a.calls) })
	if a.http != nil {
		group.Go(func() error {
			return rpc.ServeHTTP(talking, rpc.Observability(a.registry, a.link.healthy), a.http, guard, a.metrics)
		})
		log.Info().Str("http", a.http.Addr().String()).Msg("serving /metrics and /healthz")
	}
	log.Info().Str("version", a.cfg.Version).Str("agent_id", a.self.GetAgentId()).
		Str("listen", a.calls.Addr().String()).Str("advertise", a.self.GetEndpoint()).
		Int("max_nodes", a.cfg.File.MaxNodes).Msg("agent listening")
	nodes.WarnOfPorts(log, a.cfg.File.BasePort, a.cfg.File.MaxNodes)
	a.nodes.WarnOfBinaries()
	warnOfOpenFiles(log, a.cfg.File.Profiles)
	a.notify(daemon.SdNotifyReady) // New has taken the nodes up, and callers wait in the listener's queue

	group.Go(func() error { return a.link.run(talking) })
	if a.identity != nil {
		group.Go(func() error { a.identity.keep(talking, a.link.master); return nil })
	}
	group.Go(func() error {
		defer stopTalking()
		err := a.nodes.Run(ctx) // until ctx ends
		a.notify(daemon.SdNotifyStopping)
		stop := a.cfg.StopNodes && asked.Err() != nil // one that is refused takes nothing along: it may be a stranger to what runs
		if running := len(a.nodes.List()); running > 0 && stop {
			log.Info().Int("nodes", running).Msg("stopping nodes")
		} else if running > 0 {
			log.Info().Int("nodes", running).Msg("nodes run on; the next start takes them up")
		}
		return errors.Join(err, a.nodes.Close(stop))
	})
	err := group.Wait()
	log.Info().Msg("agent stopped")
	return err
}

// notify tells systemd, where that has started the agent and waits for it.
func (a *Agent) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		a.cfg.Log.Warn().Err(err).Str("state", state).Msg("the service manager wasn't told")
	}
}

// instanceID reads the random name of this agent's home, or draws one.
func instanceID(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err == nil && len(data) > 0 {
		return string(data), nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("read instance id: %w", err)
	}
	id := newInstanceID()
	if err := config.WriteFile(path, []byte(id)); err != nil {
		return "", fmt.Errorf("write instance id: %w", err)
	}
	return id, nil
}

// advertised is where the master reaches this agent: what the operator says, else the address that this
// host uses towards the master, at the port that the agent listens on.
func advertised(ctx context.Context, said string, listen net.Addr, master string) (string, error) {
	if said != "" {
		return said, nil
	}
	at, ok := listen.(*net.TCPAddr)
	if !ok {
		return "", fmt.Errorf("listening on %s, which is no TCP address", listen)
	}
	ip := at.IP
	if ip.IsUnspecified() {
		ip = localTowards(ctx, master)
	}
	return net.JoinHostPort(ip.String(), strconv.Itoa(at.Port)), nil
}

// localTowards is the address that packets to the master would leave from. Where nobody knows yet, because the
// network isn't up or the name isn't served, it is the host's first address that others could reach: an
// agent starts, and looks after its nodes, without its master.
func localTowards(ctx context.Context, master string) net.IP {
	// Connecting a UDP socket sends nothing: it only asks the routing table.
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second) // for a name server that doesn't answer
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "udp", master)
	if err == nil {
		defer conn.Close()
		if local, ok := conn.LocalAddr().(*net.UDPAddr); ok {
			return local.IP
		}
	}
	addrs, _ := net.InterfaceAddrs() // none is as good as an error
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			return n.IP
		}
	}
	return net.IPv4(127, 0, 0, 1)
}
