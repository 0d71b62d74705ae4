package storage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"
)

// serverPath makes the test binary a storage server on that folder, which prints its address.
const serverPath = "SUTRA_TEST_STORAGE_PATH"

func TestMain(m *testing.M) {
	if path := os.Getenv(serverPath); path != "" {
		fmt.Fprintln(os.Stderr, serveProcess(path))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

func serveProcess(path string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s, err := New(Config{Listener: l, Path: path, Log: zerolog.New(os.Stderr)})
	if err != nil {
		return err
	}
	fmt.Fprintln(os.Stdout, l.Addr())
	return s.Run(context.Background())
}

// skip is for what this machine lacks. Where the machine is meant to have all, that is a failure.
func skip(t *testing.T, why string) {
	t.Helper()
	if os.Getenv("SUTRA_TEST_NO_SKIP") == "1" {
		t.Fatal(why)
	}
	t.Skip(why)
}

func loopback(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// client speaks to one server.
type client struct {
	t    *testing.T
	base string
	http *http.Client
}

func newClient(t *testing.T, addr string) *client {
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	t.Cleanup(transport.CloseIdleConnections)
	return &client{t: t, base: "http://" + addr, http: &http.Client{Transport: transport}}
}

// start runs a server over loopback. stop ends it and may be called again; the test's end calls it.
func start(t *testing.T, path string) (c *client, stop func()) {
	t.Helper()
	l := loopback(t)
	s, err := New(Config{Listener: l, Path: path, NodeID: "node-1", Log: zerolog.New(zerolog.NewTestWriter(t))})
	if err != nil {
		t.Fatal(err)
	}
	c = newClient(t, l.Addr().String())
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	stop = func() {
		c.http.CloseIdleConnections()
		cancel()
		if err, ok := <-ended; ok {
			close(ended)
			if err != nil {
				t.Errorf("run: %v", err)
			}
		}
	}
	t.Cleanup(stop)
	return c, stop
}

// answered is a whole response.
type answered struct {
	code   int
	header http.Header
	body   []byte
}

// try sends a request. target is all that follows the address, and is sent as it is.
func (c *client) try(method, target string, body io.Reader) (answered, error) {
	req, err := http.NewRequestWithContext(c.t.Context(), method, c.base+target, body)
	if err != nil {
		return answered{}, err
	}
	res, err := c.http.Do(req)
	if err != nil {
		return answered{}, err
	}
	got, err := io.ReadAll(res.Body)
	return answered{res.StatusCode, res.Header, got}, errors.Join(err, res.Body.Close())
}

func (c *client) do(method, target, body string) answered {
	c.t.Helper()
	a, err := c.try(method, target, strings.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	return a
}

// expect sends a request and fails unless it is answered so.
func (c *client) expect(code int, method, target, body string) answered {
	c.t.Helper()
	a := c.do(method, target, body)
	if a.code != code {
		c.t.Fatalf("%s %.80s was answered %d %.200s, want %d", method, target, a.code, a.body, code)
	}
	if code >= 400 && method != http.MethodHead {
		var e struct{ Error string }
		if err := json.Unmarshal(a.body, &e); err != nil || e.Error == "" {
			c.t.Errorf("%s %.80s: the error is %q, want JSON", method, target, a.body)
		}
	}
	return a
}

func (c *client) expectValue(target, want string) {
	c.t.Helper()
	if got := c.expect(http.StatusOK, http.MethodGet, target, ""); !bytes.Equal(got.body, []byte(want)) {
		c.t.Fatalf("%.80s holds %d bytes %.80q, want %d bytes %.80q", target, len(got.body), got.body, len(want), want)
	}
}

type keyPage struct {
	Keys []string
	Next *string
}

func (c *client) list(query string) keyPage {
	c.t.Helper()
	var p keyPage
	if err := json.Unmarshal(c.expect(http.StatusOK, http.MethodGet, "/kv"+query, "").body, &p); err != nil {
		c.t.Fatal(err)
	}
	return p
}

// count asks /healthz for the number of keys.
func (c *client) count() int {
	c.t.Helper()
	var h struct{ Keys int }
	if err := json.Unmarshal(c.expect(http.StatusOK, http.MethodGet, "/healthz", "").body, &h); err != nil {
		c.t.Fatal(err)
	}
	return h.Keys
}

// awaitLimit is long enough for a busy machine: only a failing test reaches it.
const awaitLimit = 30 * time.Second

func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(awaitLimit); !done(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s did not come within %s", what, awaitLimit)
		}
	}
}
