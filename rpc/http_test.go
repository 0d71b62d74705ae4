package rpc

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/test/bufconn"

	"github.com/sutra-grid/sutra/rpc/pki"
)

// get asks on a connection of its own.
func get(ctx context.Context, url string) (string, error) {
	transport := &http.Transport{DisableKeepAlives: true}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return "", err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

func TestServeHTTPLetsRequestsUnderWayEnd(t *testing.T) {
	checkLeaks(t)
	started, release := make(chan struct{}, 1), make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		started <- struct{}{}
		<-release
		_, _ = io.WriteString(w, "done")
	})
	l := listen(t, anyPort)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	served := make(chan error, 1)
	go func() { served <- ServeHTTP(ctx, h, l, Guard{}, nil) }()
	type answer struct {
		body string
		err  error
	}
	answered := make(chan answer, 1)
	go func() {
		body, err := get(context.WithoutCancel(ctx), "http://"+l.Addr().String())
		answered <- answer{body, err}
	}()
	receive(t, "the request's start", started)
	stop()
	await(t, "the listener is closed", func() bool { return refuses(l.Addr()) })
	close(release)
	if got := receive(t, "the answer", answered); got.err != nil || got.body != "done" {
		t.Errorf("the request under way ends in %+v", got)
	}
	if err := receive(t, "ServeHTTP's return", served); err != nil {
		t.Errorf("ServeHTTP returns %v", err)
	}
}

func TestServeHTTPWhenAlreadyOverOrBroken(t *testing.T) {
	checkLeaks(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	l := listen(t, anyPort)
	if err := ServeHTTP(ctx, http.NotFoundHandler(), l, Guard{}, nil); err != nil || !refuses(l.Addr()) {
		t.Errorf("ServeHTTP returns %v, listener closed: %v", err, refuses(l.Addr()))
	}
	err := ServeHTTP(t.Context(), http.NotFoundHandler(), l, Guard{}, nil)
	if err == nil || !strings.Contains(err.Error(), "serve HTTP on "+l.Addr().String()) {
		t.Errorf("on a closed listener ServeHTTP returns %v", err)
	}
}

// inMemory runs ServeHTTP in a bubble; stop ends it and gives what it returned.
func inMemory(t *testing.T, h http.Handler) (l *bufconn.Listener, stop func() error) {
	t.Helper()
	l = bufconn.Listen(64 << 10)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- ServeHTTP(ctx, h, l, Guard{}, nil) }()
	return l, func() error { cancel(); return <-served }
}

func TestServeHTTPCutsRequestsAfterTheDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		over := make(chan struct{})
		defer close(over)
		l, stop := inMemory(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			<-over // a connection in memory closes for one side after the other: an answer could slip out in between
		}))
		c, err := l.Dial()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		synctest.Wait() // the request is in its handler
		stopped := time.Now()
		err = stop()
		if took := time.Since(stopped); took != drainTime || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("ServeHTTP returns %v after %s, want the deadline after %s", err, took, drainTime)
		}
		if rest, err := io.ReadAll(c); err == nil && len(rest) > 0 {
			t.Errorf("the request was answered: %q", rest)
		}
		if took := time.Since(stopped); took != drainTime {
			t.Errorf("its connection was cut after %s, want %s", took, drainTime)
		}
	})
}

func TestServeHTTPCutsAHeaderThatDawdles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, stop := inMemory(t, http.NotFoundHandler())
		c, err := l.Dial()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		began := time.Now()
		gaveUp := make(chan struct{})
		go func() {
			defer close(gaveUp)
			for _, err := io.WriteString(c, "GET / HTTP/1.1\r\n"); err == nil; _, err = io.WriteString(c, "X: y\r\n") {
				time.Sleep(time.Second)
			}
		}()
		_, _ = io.ReadAll(c) // until the server hangs up
		if took := time.Since(began); took < 5*time.Second || took > 6*time.Second {
			t.Errorf("the header was cut after %s, want 5s", took)
		}
		<-gaveUp
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
}

func TestObservability(t *testing.T) {
	var trouble error
	registry := prometheus.NewRegistry()
	NewMetrics(registry)
	mux := Observability(registry, func() error { return trouble })
	ask := func(path string) (int, string) {
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, http.NoBody))
		return w.Code, w.Body.String()
	}
	if code, body := ask("/healthz"); code != 200 || body != "ok\n" {
		t.Errorf("healthy: %d %q", code, body)
	}
	trouble = errors.New("no master")
	if code, body := ask("/healthz"); code != 503 || body != "no master\n" {
		t.Errorf("unhealthy: %d %q", code, body)
	}
	if code, body := ask("/metrics"); code != 200 || !strings.Contains(body, "sutra_rpc_pool_connections 0") {
		t.Errorf("metrics: %d %.200q", code, body)
	}
}

// Who keeps a connection in the clear keeps it: there nobody is a stranger. A server that knows strangers has them come anew for each
// answer, since theirs may end at any time.
func TestServeHTTPEndsNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, stop := inMemory(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }))
		c, err := l.Dial()
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		answers := bufio.NewReader(c)
		for range 4 {
			if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			resp, err := http.ReadResponse(answers, nil)
			if err != nil {
				t.Fatalf("a kept connection: %v", err)
			}
			if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "ok" || resp.Close {
				t.Errorf("it answers %q, %v, closes: %v", body, err, resp.Close)
			}
			_ = resp.Body.Close()
			time.Sleep(strangerTime / 2)
		}
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	authority, err := pki.OpenAuthority(t.TempDir(), "g")
	if err != nil {
		t.Fatal(err)
	}
	own, err := authority.Own(pki.MasterIdentity("g", "m"), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	var held pki.Holder
	held.Set(own)
	l := listen(t, anyPort)
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() {
		served <- ServeHTTP(ctx, Observability(prometheus.NewRegistry(), func() error { return nil }), l, Guard{Credentials: &held}, nil)
	}()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+l.Addr().String()+"/healthz", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "ok\n" || !resp.Close {
		t.Errorf("/healthz answers %q, %v, and its connection is kept: %v", body, err, !resp.Close)
	}
	_ = resp.Body.Close()
	stop()
	if err := receive(t, "ServeHTTP's return", served); err != nil {
		t.Error(err)
	}
}
