package health

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// Probe is a readiness check. Checks may run at the same time, and one that has
// returned has left nothing open. The caller's context bounds each. Who asks the same node again has the same Probe do that:
// it knows of what it couldn't end.
type Probe interface {
	// Check returns nil where the node is ready, and else why it isn't, in one line.
	Check(ctx context.Context) error
}

// Run is how the command of an "exec" probe is run; other kinds have no use for it.
type Run struct {
	// Dir is its folder; empty: this process's.
	Dir string
	// Env is its whole environment.
	Env []string
	// Credential is whom it runs as, which takes the right to become that; nil: as this process.
	Credential *syscall.Credential
	// NoNewPrivileges keeps it from getting rights that it wasn't started with, by set-user-id programs for example.
	NoNewPrivileges bool
}

// NewProbe makes the probe of a kind:
//
//   - "tcp": addr accepts a connection. The kernel accepts for a process that
//     hangs, so this says that the node has started, not that it works.
//   - "http": a GET of arg, a path with an optional query, answers 2xx or 3xx; redirects aren't followed.
//   - "grpc": grpc.health.v1 Check of the whole server answers SERVING, without TLS.
//   - "exec": arg, run by /bin/sh -c as run says, exits 0. It is
//     killed with its process group when the context ends, and when this process
//     is killed, and what it left in its group is killed when it exits. One
//     that can't be killed is left behind a second later, and while it lives
//     all further checks fail without running another.
//   - "none": always ready.
//
// addr is the node's host:port; "exec" and "none" don't look at it. An unknown
// kind, or an arg or addr that the kind can't use, is an error.
func NewProbe(kind, arg, addr string, run Run) (Probe, error) {
	switch kind {
	case "tcp", "http", "grpc":
		if _, port, err := net.SplitHostPort(addr); err != nil || port == "" {
			return nil, fmt.Errorf("%s probe: address %q is not host:port", kind, addr)
		}
	}
	switch kind {
	case "tcp", "grpc", "none":
		if arg != "" {
			return nil, fmt.Errorf("%s probe: takes no argument, got %q: remove it", kind, arg)
		}
	}
	switch kind {
	case "tcp":
		return tcpProbe{addr: addr}, nil
	case "http":
		return newHTTPProbe(addr, arg)
	case "grpc":
		return grpcProbe{addr: addr}, nil
	case "exec":
		if strings.TrimSpace(arg) == "" {
			return nil, errors.New("exec probe: no command: name the one to run, as in exec:CMD")
		}
		return &execProbe{command: arg, run: run}, nil
	case "none":
		return noProbe{}, nil
	default:
		return nil, fmt.Errorf("probe kind %q is unknown: use tcp, http, grpc, exec or none", kind)
	}
}

// failed says why a check isn't content: that its time ran out, where it did,
// because the errors of the layers below say that in many ways.
func failed(ctx context.Context, what string, err error) error {
	ended := ctx.Err()
	// A socket's deadline, set from the context's, can fire just before the context's own timer does.
	if ended == nil && errors.Is(err, context.DeadlineExceeded) {
		ended = context.DeadlineExceeded
	}
	switch {
	case ended == nil:
		return fmt.Errorf("%s: %w", what, err)
	case errors.Is(ended, context.DeadlineExceeded):
		return fmt.Errorf("%s: no answer in time: %w", what, ended)
	default:
		return fmt.Errorf("%s: given up: %w", what, ended)
	}
}

type noProbe struct{}

func (noProbe) Check(context.Context) error { return nil }

type tcpProbe struct{ addr string }

func (p tcpProbe) Check(ctx context.Context) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", p.addr)
	if err != nil {
		return failed(ctx, "tcp probe", err)
	}
	_ = conn.Close()
	return nil
}

type httpProbe struct {
	url    string
	client *http.Client
}

func newHTTPProbe(addr, path string) (Probe, error) {
	if !strings.HasPrefix(path, "/") {
		return nil, fmt.Errorf("http probe: path %q does not start with a slash: write it as in http:/healthz", path)
	}
	target := "http://" + addr + path
	if _, err := url.Parse(target); err != nil {
		return nil, fmt.Errorf("http probe: parse path: %w", err)
	}
	return httpProbe{url: target, client: &http.Client{
		// No proxy: the node is asked itself. No keep-alive: nothing stays open.
		Transport:     &http.Transport{DisableKeepAlives: true, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

func (p httpProbe) Check(ctx context.Context) error {
	what := "http probe of " + p.url
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url, http.NoBody)
	if err != nil {
		return failed(ctx, what, err)
	}
	res, err := p.client.Do(req)
	if err != nil {
		// The method and address that url.Error adds are said already.
		if wrapped, ok := errors.AsType[*url.Error](err); ok {
			err = wrapped.Err
		}
		return failed(ctx, what, err)
	}
	_ = res.Body.Close()
	if res.StatusCode < 200 || res.StatusCode > 399 {
		return fmt.Errorf("%s: answered %q, need 2xx or 3xx", what, res.Status)
	}
	return nil
}

type grpcProbe struct{ addr string }

func (p grpcProbe) Check(ctx context.Context) error {
	what := "grpc probe of " + p.addr
	conn, err := grpc.NewClient("passthrough:///"+p.addr,
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy(), grpc.WithDisableServiceConfig())
	if err != nil {
		return failed(ctx, what, err)
	}
	defer conn.Close()
	res, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		s := status.Convert(err)
		return failed(ctx, what, fmt.Errorf("%s: %s", s.Code(), s.Message()))
	}
	if res.GetStatus() != grpc_health_v1.HealthCheckResponse_SERVING {
		return fmt.Errorf("%s: answered %s, need SERVING", what, res.GetStatus())
	}
	return nil
}
