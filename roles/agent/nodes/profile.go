package nodes

import (
	"context"
	"maps"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/supervisor"
)

type profile = config.Profile

// probeTimeout bounds one readiness probe.
const probeTimeout = 2 * time.Second

// spec is the command that runs an entry's node by its profile, and makes the probe that it is asked by.
func (m *Manager) spec(e *entry, p profile, binary string) (supervisor.Spec, error) {
	n := e.spec
	args := slices.Clone(p.Args)
	fill := strings.NewReplacer(
		"{port}", strconv.Itoa(int(n.GetPort())),
		"{storage_path}", n.GetStoragePath(),
		"{node_id}", n.GetNodeId(),
		"{memory_mb}", strconv.FormatUint(uint64(n.GetMemoryLimitMb()), 10),
	)
	for i := range args {
		args[i] = fill.Replace(args[i])
	}
	if p.StorageBinary == "" {
		args = append([]string{"storage"}, args...)
	}
	spec := supervisor.Spec{
		ID: n.GetNodeId(), Path: binary, Args: args, Env: append(m.environment(n), m.mark(n.GetNodeId())), Dir: n.GetStoragePath(), LogPath: e.files.log,
		StopSignal: unix.SignalNum("SIG" + p.StopSignal), StopGrace: p.StopGrace, Mark: m.mark(n.GetNodeId()), Cgroups: m.cfg.Cgroups,
		Limits:  supervisor.Limits{Memory: uint64(n.GetMemoryLimitMb()) << 20, CPUWeight: p.CPUWeight, OpenFiles: uint64(p.OpenFiles)},
		Restart: restartOf(p), Credential: credential(p), NoNewPrivileges: p.NoNewPrivileges,
	}
	if p.Ready.Kind == "none" {
		return spec, nil
	}
	probe, err := m.probe(n, p)
	if err != nil {
		return spec, err
	}
	e.probe = probe
	spec.ReadyTimeout = p.ReadyTimeout
	spec.Ready = func(ctx context.Context) error { return health.AwaitReady(ctx, probe, probeTimeout) }
	return spec, nil
}

// credential is whom a profile's nodes run as; nil: as the agent.
func credential(p profile) *syscall.Credential {
	if p.RunAs == nil || int(p.RunAs.UID) == os.Geteuid() && int(p.RunAs.GID) == os.Getegid() {
		return nil
	}
	return &syscall.Credential{Uid: p.RunAs.UID, Gid: p.RunAs.GID, Groups: p.RunAs.Groups}
}

// restartOf is when a profile's nodes are started again. One without a policy is for ever.
func restartOf(p profile) supervisor.Restart {
	r := supervisor.DefaultRestart()
	r.Policy = map[string]supervisor.Policy{"on-failure": supervisor.OnFailure, "never": supervisor.Never}[p.Restart]
	r.Success = p.SuccessExitCodes
	return r
}

func (m *Manager) probe(n *sutrav1.Node, p profile) (health.Probe, error) {
	// The node is asked on this host: what its clients reach may lie behind a translated address.
	addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(int(n.GetPort())))
	return health.NewProbe(p.Ready.Kind, p.Ready.Arg, addr, health.Run{
		Dir: n.GetStoragePath(), Env: m.environment(n), Credential: credential(p), NoNewPrivileges: p.NoNewPrivileges,
	})
}

// environment is all that a node's process finds in its environment beside its mark: nothing of the agent's own leaks into
// it. An exec probe has the same without the mark: what bears that is taken for the node's own, watched and killed as such.
func (m *Manager) environment(n *sutrav1.Node) []string {
	return []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"LANG=C.UTF-8",
		"HOME=" + n.GetStoragePath(),
		"SUTRA_AGENT_ID=" + n.GetAgentId(),
		"SUTRA_MEMORY_MB=" + strconv.FormatUint(uint64(n.GetMemoryLimitMb()), 10),
		"SUTRA_NODE_ID=" + n.GetNodeId(),
		"SUTRA_PROFILE=" + n.GetProfile(),
		"SUTRA_PORT=" + strconv.Itoa(int(n.GetPort())),
		"SUTRA_STORAGE_PATH=" + n.GetStoragePath(),
	}
}

// mark is what only this node's processes have in their environment: another agent may have the same id, and another
// grid the same node's.
func (m *Manager) mark(nodeID string) string {
	return markName + "=" + m.cfg.Agent.GetInstanceId() + "/" + nodeID
}

const markName = "SUTRA_MARK"

func (m *Manager) unknownProfile(name string) *rpc.Error {
	known := slices.Sorted(maps.Keys(m.cfg.Profiles))
	return rpc.Errorf(rpc.InvalidArgument, "agent %s has no profile %q; it has: %s",
		m.cfg.Agent.GetAgentId(), name, strings.Join(known, ", ")).
		WithHint("add [storage.profiles.%s] to the agent's file and restart the agent", name)
}
