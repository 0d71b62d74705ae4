package rpc

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"sync"

	"google.golang.org/grpc/peer"
)

// maxAddresses bounds what is remembered of addresses, or others, so that whoever has many of them can't fill the memory.
const maxAddresses = 4096

// byAddress remembers something of each address that had to do with this process.
type byAddress[T any] = remembered[netip.Addr, T]

// remembered is something of each of those that had to do with this process; the zero T is what is known of a new one.
type remembered[K comparable, T any] struct {
	mu    sync.Mutex // guards all that is remembered
	known map[K]*T
}

// at calls f with what is remembered of one.
func (b *remembered[K, T]) at(key K, f func(*T)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.known == nil {
		b.known = map[K]*T{}
	}
	t := b.known[key]
	if t == nil {
		for old := range b.known {
			if len(b.known) < maxAddresses {
				break
			}
			delete(b.known, old) // any: who has as many addresses has no use of one
		}
		t = new(T)
		b.known[key] = t
	}
	f(t)
}

// hostOf is the host that an address is of; a network of 64 bits counts as one, because one host has all of it. The zero Addr
// stands for what has none.
func hostOf(addr net.Addr) netip.Addr {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	ip, _ := netip.AddrFromSlice(tcp.IP)
	if ip = ip.Unmap(); !ip.Is6() || ip.IsLoopback() {
		return ip
	}
	network, _ := ip.WithZone("").Prefix(64) // fits
	return network.Addr()
}

// Loopback tells whether an address, with a port or without, is of the host itself.
func Loopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = address
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// callersAddress is where a call came from; nil where nobody knows.
func callersAddress(ctx context.Context) net.Addr {
	if p, ok := peer.FromContext(ctx); ok {
		return p.Addr
	}
	return nil
}
