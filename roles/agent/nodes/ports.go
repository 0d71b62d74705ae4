package nodes

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/sutra-grid/sutra/rpc"
)

const maxPort = 65535

// takePort makes sure of the entry's port, or finds one: the first from the base port that no node
// holds and that can be bound. A candidate is reserved before it is tried, so that two spawns
// never try the same one. release is for when the node listens, or doesn't start: until then no other agent of the host takes
// the port, whose node would be taken for this one's as soon as it accepts.
func (m *Manager) takePort(e *entry) (release func(), err error) {
	if port := e.spec.GetPort(); port != 0 {
		release, err := holdPort(int(port))
		if err != nil {
			return nil, rpc.Errorf(rpc.PortInUse, "port %d on %s can't be used: %v", port, m.cfg.Agent.GetAgentId(), err).
				With("port", strconv.Itoa(int(port))).
				WithHint("leave out the port to get a free one, or find its holder: ss -ltnp 'sport = :%d'", port)
		}
		return release, nil
	}
	for port := m.cfg.BasePort; ; port++ {
		if port = m.reserve(e, port); port == 0 {
			return nil, rpc.Errorf(rpc.NoFreePort, "agent %s has no free port from %d to %d", m.cfg.Agent.GetAgentId(), m.cfg.BasePort, maxPort).
				WithHint("lower base_port in the agent's file")
		}
		if release, err := holdPort(port); err == nil {
			return release, nil
		}
	}
}

// reserve gives the entry the first port from from on that no other node holds, and returns it; 0 where there is none.
func (m *Manager) reserve(e *entry, from int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	held := map[uint32]bool{}
	for _, n := range m.live("") {
		if n != e.spec {
			held[n.GetPort()] = true
		}
	}
	for port := from; port <= maxPort; port++ {
		if !held[uint32(port)] {
			spec := proto.CloneOf(e.spec)
			spec.Port = uint32(port)
			e.spec = spec
			m.touch(e)
			return port
		}
	}
	return 0
}

// holdPort keeps other agents from a port that can be bound, until it is released or this process ends. What they agree by has the
// same bounds as ports have, the network namespace, and leaves no file behind.
func holdPort(port int) (release func(), err error) {
	held, err := net.ListenUnix("unix", &net.UnixAddr{Name: "@sutra-port-" + strconv.Itoa(port), Net: "unix"})
	if errors.Is(err, unix.EADDRINUSE) {
		return nil, errors.New("another agent on the host is starting a node there")
	}
	if err != nil {
		return nil, err
	}
	if err := tryBind(port); err != nil {
		_ = held.Close() // errs only where it was closed before
		return nil, err
	}
	return func() { _ = held.Close() }, nil
}

// tryBind tells whether a server could listen on the port, on all addresses.
func tryBind(port int) error {
	l, err := net.Listen("tcp", ":"+strconv.Itoa(port))
	if err == nil {
		return l.Close()
	}
	if errors.Is(err, unix.EADDRINUSE) {
		return errors.New("another process on the host holds it")
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Err
	}
	return err
}

func (m *Manager) endpoint(port uint32) string {
	return net.JoinHostPort(m.cfg.Host, strconv.Itoa(int(port)))
}

// WarnOfPorts says so where the kernel may hand the nodes' ports to outgoing connections, which
// then hold them when a node wants them.
func WarnOfPorts(log zerolog.Logger, base, count int) {
	low, high, ok := portRange("/proc/sys/net/ipv4/ip_local_port_range")
	if !ok || base > high || base+count-1 < low {
		return
	}
	reserved, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_reserved_ports")
	if err == nil && covers(strings.TrimSpace(string(reserved)), base, base+count-1) {
		return
	}
	log.Warn().Str("ephemeral", fmt.Sprintf("%d-%d", low, high)).
		Str("hint", fmt.Sprintf("sysctl -w net.ipv4.ip_local_reserved_ports=%d-%d", base, base+count-1)).
		Msg("base_port lies in the range that the kernel takes outgoing connections' ports from; one of them may hold a node's port")
}

func portRange(path string) (low, high int, ok bool) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, 0, false
	}
	n, err := fmt.Sscan(string(data), &low, &high)
	return low, high, err == nil && n == 2
}

// covers tells whether one of the kernel's comma-separated ranges ("8080,50051-50060") holds all ports from low to high.
func covers(ranges string, low, high int) bool {
	for r := range strings.SplitSeq(ranges, ",") {
		from, to, isRange := strings.Cut(r, "-")
		if !isRange {
			to = from
		}
		a, err1 := strconv.Atoi(from)
		b, err2 := strconv.Atoi(to)
		if err1 == nil && err2 == nil && a <= low && high <= b {
			return true
		}
	}
	return false
}
