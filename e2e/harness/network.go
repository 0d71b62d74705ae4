package harness

import (
	"bytes"
	"encoding/binary"
	"errors"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// OwnNetwork moves the calling test into a network of its own, which has a loopback interface and nothing else, and returns what
// hands out all frames that went over it so far. The processes that the test starts are in there, and so are connections that it dials
// itself; those that other goroutines dial for it, as gRPC's do, aren't. It needs root, and skips where making a network is forbidden.
func OwnNetwork(t testing.TB) (frames func() [][]byte) {
	t.Helper()
	Need(t, "root")
	runtime.LockOSThread() // for good: a thread that isn't where the others are ends with its test
	err := unix.Unshare(unix.CLONE_NEWNET)
	if errors.Is(err, unix.EPERM) {
		Skip(t, "may not make a network")
	}
	if err != nil {
		t.Fatalf("make a network: %v", err)
	}
	all := binary.NativeEndian.Uint16([]byte{unix.ETH_P_ALL >> 8, unix.ETH_P_ALL & 0xff})
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, int(all))
	if err != nil {
		t.Fatalf("listen to the network: %v", err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) }) // it was only read
	up, err := unix.NewIfreq("lo")
	if err != nil {
		t.Fatal(err)
	}
	up.SetUint16(unix.IFF_UP)
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1), // each comes in again
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20),    // they wait there until they are asked for
		unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, up),
	)
	if err != nil {
		t.Fatalf("set up the network: %v", err)
	}
	var seen [][]byte
	buffer := make([]byte, 1<<20)
	return func() [][]byte {
		t.Helper()
		for {
			n, _, err := unix.Recvfrom(fd, buffer, unix.MSG_TRUNC)
			if errors.Is(err, unix.EAGAIN) {
				break
			}
			if err != nil || n > len(buffer) {
				t.Fatalf("read a frame of %d bytes: %v", n, err)
			}
			seen = append(seen, bytes.Clone(buffer[:n]))
		}
		if lost, err := unix.GetsockoptTpacketStats(fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err != nil || lost.Drops > 0 {
			t.Fatalf("of the network's frames some are lost: %+v, %v", lost, err)
		}
		return seen
	}
}
