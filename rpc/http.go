package rpc

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/rs/zerolog"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// ServeHTTP serves a role's few HTTP pages until ctx ends. It closes the listener. Where the guard has credentials, the pages are
// for those people of the grid who show a certificate, over TLS; /healthz is for this host's processes as well, in the clear. m may be nil.
func ServeHTTP(ctx context.Context, h http.Handler, l net.Listener, g Guard, m *Metrics) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
	}
	if g.Credentials != nil { // in the clear nobody is known, and nobody a stranger
		l = visited{guarding{l, newDoor(zerolog.Nop(), m)}, g}
		srv.Handler = g.restrict(h, m)
		srv.ConnContext = func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, visitorKey{}, c) }
	}
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(l) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve HTTP on %s: %w", l.Addr(), errors.Join(err, srv.Close()))
	case <-ctx.Done():
	}
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	err := srv.Shutdown(limited)
	if err != nil {
		err = errors.Join(err, srv.Close())
	}
	if ended := <-failed; !errors.Is(ended, http.ErrServerClosed) {
		err = errors.Join(err, ended)
	}
	if err != nil {
		return fmt.Errorf("stop HTTP on %s: %w", l.Addr(), err)
	}
	return nil
}

// visited is a listener whose connections may speak TLS or not.
type visited struct {
	net.Listener
	guard Guard
}

// Accept waits for the next connection.
func (l visited) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &visitor{Conn: c, guard: l.guard}, nil
}

// visitor is a connection that speaks TLS if its first byte says so.
type visitor struct {
	net.Conn
	guard Guard
	begin sync.Once
	// What follows is there once something was read. talk is the connection as it is spoken on, secure whether that is TLS, and
	// shown what its other end has shown to say who it is.
	talk   net.Conn
	secure bool
	shown  []*x509.Certificate
	err    error
}

// handshake is what a TLS connection's first byte is.
const handshake = 22

// Read reads what the other end says, beneath TLS or without it.
func (v *visitor) Read(p []byte) (int, error) {
	v.begin.Do(func() { v.err = v.start() })
	if v.err != nil {
		return 0, v.err
	}
	return v.talk.Read(p)
}

// start finds out how the other end speaks, within the deadline that the server has set for a request's headers.
func (v *visitor) start() error {
	first := make([]byte, 1)
	if _, err := io.ReadFull(v.Conn, first); err != nil {
		if !errors.Is(err, io.EOF) { // else it only looked whether somebody is there
			v.failed(err)
		}
		return err
	}
	raw := &reread{Conn: v.Conn, Reader: io.MultiReader(bytes.NewReader(first), v.Conn)}
	if v.talk = raw; first[0] != handshake {
		return nil
	}
	config := v.guard.Credentials.ServerTLS()
	current := config.GetConfigForClient
	config.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		c, err := current(hello)
		if c != nil {
			c.NextProtos = []string{"http/1.1"}
		}
		return c, err
	}
	secure := tls.Server(raw, config)
	if err := secure.HandshakeContext(context.Background()); err != nil {
		v.failed(err)
		return fmt.Errorf("TLS handshake: %w", err)
	}
	v.talk, v.secure, v.shown = secure, true, secure.ConnectionState().PeerCertificates
	id, err := v.guard.Credentials.PeerOf(v.shown)
	if g, ok := v.Conn.(*guest); ok && err == nil {
		return g.welcome(id)
	}
	return nil // each request hears who isn't known
}

// failed tells the metrics of a connection that didn't get as far as a request.
func (v *visitor) failed(err error) {
	if g, ok := v.Conn.(*guest); ok {
		g.failed(err)
	}
}

// Write answers; a server has always read something before.
func (v *visitor) Write(p []byte) (int, error) {
	if v.talk == nil {
		return 0, net.ErrClosed
	}
	return v.talk.Write(p)
}

// reread is a connection whose first byte was looked at.
type reread struct {
	net.Conn
	io.Reader
}

// Read reads from the first byte on.
func (r *reread) Read(p []byte) (int, error) { return r.Reader.Read(p) }

type visitorKey struct{}

// restrict keeps those from the pages who may not see them.
func (g Guard) restrict(h http.Handler, m *Metrics) http.Handler {
	readers := []sutrav1.Role{sutrav1.Role_ROLE_VIEWER, sutrav1.Role_ROLE_OPERATOR, sutrav1.Role_ROLE_ADMIN}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, _ := r.Context().Value(visitorKey{}).(*visitor)
		var refused *Error
		switch host := hostOf(v.RemoteAddr()); {
		case r.URL.Path == "/healthz" && host.IsLoopback():
			if !v.secure {
				w.Header().Set("Connection", "close") // the door ends a stranger's before long, perhaps in the middle of an answer
			}
		case !v.secure:
			refused = Errorf(Unauthenticated, "this takes TLS and a certificate of the grid: that of a viewer, for example")
		default:
			// Anew for each request: a certificate ends, and a root may be trusted no more.
			id, err := g.Credentials.PeerOf(v.shown)
			switch {
			case err != nil:
				refused = Errorf(Unauthenticated, "the caller isn't known here: %v", err)
			case !slices.Contains(readers, id.Role):
				refused = Errorf(PermissionDenied, "%s may not read this; that takes the role %s", id, roleWords(readers))
			default:
				refused = g.banned(id)
			}
		}
		if refused == nil {
			h.ServeHTTP(w, r)
			return
		}
		m.refuse(refused)
		code := http.StatusForbidden
		if refused.Reason == Unauthenticated {
			code = http.StatusUnauthorized
		}
		http.Error(w, refused.Message, code)
	})
}

// Observability answers /metrics from r, and /healthz by healthy: 200 for nil, else 503 and the error's text.
func Observability(r *prometheus.Registry, healthy func() error) *http.ServeMux {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(r, promhttp.HandlerOpts{Registry: r}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if err := healthy(); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = fmt.Fprintln(w, err) // a caller that went away needs no answer
			return
		}
		_, _ = fmt.Fprintln(w, "ok") // a caller that went away needs no answer
	})
	return mux
}
