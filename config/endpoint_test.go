package config

import (
	"strings"
	"testing"
)

func TestEndpoint(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"http://h:7001": "h:7001", "https://h:7001": "h:7001", "HTTP://h": "h:7000", "h:7001": "h:7001", "h": "h:7000",
		"10.0.0.10": "10.0.0.10:7000", "10.0.0.10:1": "10.0.0.10:1", "m.example.org.:65535": "m.example.org.:65535",
		"[::1]:7001": "[::1]:7001", "[::1]": "[::1]:7000", "::1": "[::1]:7000", "http://[fe80::1%eth0]:80": "[fe80::1%eth0]:80",
		"my_host-1:007000": "my_host-1:7000", "1.host": "1.host:7000",
	} {
		if got, err := Endpoint(in); err != nil || got != want {
			t.Errorf("Endpoint(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		"": "is empty", "http://": "is empty", ":7000": "has no host", "h:": "has no port after the colon",
		"h:0": `has port "0"`, "h:65536": `has port "65536"`, "h:-1": `has port "-1"`, "h:x": `has port "x"`, "h:+80": `has port "+80"`,
		"h:99999999999999999999999": `has port "99999999999999999999"`, "h:1:2": "too many colons",
		"http://h:7000/": "has a path", "h/x": "has a path", "h?x=1": "has a path or query", "h#x": "has a path",
		"ftp://h": "has an unknown scheme", "http://http://h": "has a path", " h:7000": "has a space", "h :7000": "has a space", "h:7000\n": "control character",
		"[h]:7000": "is not an IPv6 address", "[::1": "is not an IPv6 address", "[::1]7000": "is not an IPv6 address", "[10.0.0.1]:1": "is not an IPv6 address", "[::1]:": "no port after",
		"u@h:7000": "neither a name nor an IP address", "a..b": "neither a name", "-h": "neither a name", "h%20x:1": "neither a name", "fe80::1%e'x": "odd IPv6 zone",
		"256.0.0.1:7000": "looks like an IPv4 address", "0": "looks like an IPv4 address", "0:7000": "looks like an IPv4 address",
		strings.Repeat("a.", 130): "more than 253",
	} {
		got, err := Endpoint(in)
		if err == nil {
			t.Errorf("Endpoint(%q) = %q; want an error", in, got)
		} else if !strings.Contains(err.Error(), want) || !strings.HasSuffix(err.Error(), "write host:port, for example 10.0.0.10:7000") {
			t.Errorf("Endpoint(%q): %v; want %q and an example", in, err, want)
		}
	}
}

func TestAdvertise(t *testing.T) {
	t.Parallel()
	for _, in := range []string{"10.0.0.5:8001", "host.example:1", "[fd00::1]:65535", "127.0.0.1:8001"} {
		if got, err := advertise(in); err != nil || got != in {
			t.Errorf("advertise(%q) = %q, %v", in, got, err)
		}
	}
	for in, want := range map[string]string{
		"10.0.0.5": "has no port", "::1": "has no port", "h:0": `has port "0"`, ":8001": "has no host", "http://h:8001": "too many colons",
		"0.0.0.0:8001": "is every address", "[::]:8001": "is every address", "[::ffff:0.0.0.0]:8001": "is every address", "[::%eth0]:8001": "is every address",
		"0:8001": "looks like an IPv4 address", "h:8001/x": `has port "8001/x"`,
	} {
		if got, err := advertise(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("advertise(%q) = %q, %v; want %q", in, got, err, want)
		}
	}
}

func FuzzEndpoint(f *testing.F) {
	for _, s := range []string{"http://h:7000", "::1", "[::1%x]:1", "h", "1.2.3.4:5"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		once, err := Endpoint(s)
		if err != nil {
			return
		}
		if twice, err := Endpoint(once); err != nil || twice != once {
			t.Errorf("Endpoint(%q) = %q, and again %q, %v", s, once, twice, err)
		}
	})
}
