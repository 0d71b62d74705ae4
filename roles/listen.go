package roles

import (
	"errors"
	"net"

	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/rpc"
)

// listen opens a TCP listener for what; the error says who may hold the address and which flag or key changes it.
func listen(what, addr, remedy string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err == nil {
		return l, nil
	}
	if errors.Is(err, unix.EADDRINUSE) {
		_, port, _ := net.SplitHostPort(addr)
		return nil, rpc.Errorf(rpc.PortInUse, "%s can't listen on %s: the address is in use", what, addr).
			WithHint("find its holder with: ss -ltnp 'sport = :%s'   or choose another: %s", port, remedy)
	}
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	return nil, rpc.Errorf(rpc.InvalidArgument, "%s can't listen on %s: %v", what, addr, err).WithHint("choose another address: %s", remedy)
}
