package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"unicode"
)

const (
	defaultMasterPort = "7000"
	maxHostLen        = 253
	hostPortExample   = "write host:port, for example 10.0.0.10:7000"
)

// Endpoint turns a master's address, with or without an http or https scheme and a port, into
// host:port; the default port is 7000. The scheme says nothing about security.
func Endpoint(s string) (string, error) {
	address := s
	if scheme, rest, ok := strings.Cut(s, "://"); ok {
		if !strings.EqualFold(scheme, "http") && !strings.EqualFold(scheme, "https") {
			return "", fmt.Errorf("%.80q has an unknown scheme; %s", s, hostPortExample)
		}
		address = rest
	}
	if strings.ContainsAny(address, "/?#") {
		return "", fmt.Errorf("%.80q has a path or query after the address; %s", s, hostPortExample)
	}
	host, port, err := splitAddress(address)
	if err == nil && port == "" {
		port = defaultMasterPort
	}
	if err == nil {
		port, err = checkPort(port, 1)
	}
	if err != nil {
		return "", fmt.Errorf("%.80q %w; %s", s, err, hostPortExample)
	}
	return net.JoinHostPort(host, port), nil
}

// advertise accepts what another host can dial.
func advertise(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	host, port, err := splitAddress(s)
	if err == nil {
		port, err = checkPort(port, 1)
	}
	if err == nil && isUnspecified(host) {
		err = errors.New("is every address of a host and none that a master could call")
	}
	if err != nil {
		return "", fmt.Errorf("%.80q %w; write the host:port at which the master reaches this agent, for example 10.0.0.5:8001", s, err)
	}
	return net.JoinHostPort(host, port), nil
}

func metricsListen(s string) (string, error) {
	if s == "" {
		return "", nil
	}
	host, port, err := splitAddress(s)
	if err == nil {
		port, err = checkPort(port, 0)
	}
	if err != nil {
		return "", fmt.Errorf("%.80q %w; write host:port, for example 127.0.0.1:9090, or 0.0.0.0:9090 for every address", s, err)
	}
	return net.JoinHostPort(host, port), nil
}

// splitAddress returns a host that is a name or an IP address without brackets, and the port as
// it was written, "" where there is none.
func splitAddress(s string) (host, port string, err error) {
	switch {
	case s == "":
		return "", "", errors.New("is empty")
	case strings.ContainsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) }):
		return "", "", errors.New("has a space or control character in it")
	}
	if _, err := netip.ParseAddr(s); err == nil {
		return s, "", checkHost(s)
	}
	var colon bool
	if rest, bracketed := strings.CutPrefix(s, "["); bracketed {
		var closed bool
		host, rest, closed = strings.Cut(rest, "]")
		port, colon = strings.CutPrefix(rest, ":")
		if addr, err := netip.ParseAddr(host); !closed || err != nil || !addr.Is6() || !colon && rest != "" {
			return "", "", errors.New("is not an IPv6 address in brackets, as in [::1]:7000")
		}
	} else {
		host, port, colon = strings.Cut(s, ":")
		if strings.Contains(port, ":") {
			return "", "", errors.New("has too many colons for host:port and is no IPv6 address")
		}
	}
	if colon && port == "" {
		return "", "", errors.New("has no port after the colon")
	}
	return host, port, checkHost(host)
}

func checkHost(host string) error {
	if host == "" {
		return errors.New("has no host")
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		if strings.ContainsFunc(addr.Zone(), func(r rune) bool { return !isIDRune(r) }) {
			return errors.New("has an odd IPv6 zone")
		}
		return nil
	}
	labels := strings.Split(strings.TrimSuffix(host, "."), ".")
	for _, label := range labels {
		if label == "" || label[0] == '-' || strings.ContainsFunc(label, func(r rune) bool { return !isIDRune(r) }) {
			return errors.New("has a host that is neither a name nor an IP address")
		}
	}
	// Resolvers read a last label of digits as part of an IPv4 address: "0" would be 0.0.0.0.
	if strings.Trim(labels[len(labels)-1], "0123456789") == "" {
		return errors.New("has a host that looks like an IPv4 address and is none")
	}
	if len(host) > maxHostLen {
		return fmt.Errorf("has a host of more than %d characters", maxHostLen)
	}
	return nil
}

// checkPort returns the port in its shortest form.
func checkPort(port string, lowest uint64) (string, error) {
	if port == "" {
		return "", errors.New("has no port")
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n < lowest {
		return "", fmt.Errorf("has port %.20q, which is not one of %d-%d", port, lowest, maxPort)
	}
	return strconv.FormatUint(n, 10), nil
}

func isUnspecified(host string) bool {
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.WithZone("").Unmap().IsUnspecified()
}
