package master

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"time"

	"github.com/rs/zerolog"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/events"
	"github.com/sutra-grid/sutra/roles/master/registry"
	"github.com/sutra-grid/sutra/roles/master/store"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// service is what agents and clients call. Its handlers stand in a file a subject.
type service struct {
	sutrav1.UnimplementedGridMasterServer
	store      *store.Store
	registry   *registry.Registry
	events     *events.Hub
	pool       *rpc.Pool
	metrics    *metrics
	thresholds health.Thresholds
	version    string
	access     *access
	identity   *pki.Holder // nil: in the clear
	// expel ends the connections of those who are banned by now.
	expel func()
	// anew gives the master and its host what they have from the authority.
	anew func(context.Context, *access) error
	// leaveAdmin leaves this host's account an identity where the one that it has is banned.
	leaveAdmin func() error
	started    time.Time
	log        zerolog.Logger
}

// agentClient returns the client of an agent that can be called now.
func (s *service) agentClient(id string) (sutrav1.GridAgentClient, error) {
	a, err := s.registry.Callable(id, time.Now())
	if err != nil {
		return nil, err
	}
	return sutrav1.NewGridAgentClient(s.pool.Agent(id, a.GetEndpoint())), nil
}

// persisted turns a store's error into what a caller is told.
func persisted(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, store.ErrDiskFull):
		return rpc.Errorf(rpc.DiskFull, "nothing was changed: %v", err).
			WithHint("free some space on the master's host; it goes on by itself")
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
		return err
	default:
		return rpc.Errorf(rpc.Internal, "the master's store failed: %v", err).WithHint("see the master's log")
	}
}

// checks collects what is wrong with a request.
type checks []rpc.Violation

func (c *checks) add(field, format string, args ...any) {
	*c = append(*c, rpc.Violation{Field: field, Description: fmt.Sprintf(format, args...)})
}

func (c *checks) id(field, id string) {
	if err := config.ValidID("", id); err != nil {
		c.add(field, "%v", err)
	}
}

func (c *checks) err() error {
	if len(*c) == 0 {
		return nil
	}
	return rpc.Invalid(*c...)
}

// address tells what is wrong with a host:port that others are to call; empty where nothing is. from is where
// the one who names it calls from.
func address(endpoint string, from net.Addr) string {
	host, port, err := net.SplitHostPort(endpoint)
	if err != nil {
		return fmt.Sprintf("%q isn't host:port", endpoint)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return fmt.Sprintf("%q has no port between 1 and 65535", endpoint)
	}
	ip := net.ParseIP(host)
	if host == "" || (ip != nil && (ip.IsUnspecified() || ip.IsMulticast())) {
		return fmt.Sprintf("%q names no host that could be called; set advertise in the agent's file", endpoint)
	}
	caller, ok := from.(*net.TCPAddr)
	if ok && !caller.IP.IsLoopback() && rpc.Loopback(endpoint) {
		return fmt.Sprintf("%q is loopback, and the agent calls from %s; set advertise in the agent's file", endpoint, caller.IP)
	}
	return ""
}
