package client

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// epoch is what the clock of the tests shows.
var epoch = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// fakeMaster answers from a script, served by a real server. A method without a script is UNIMPLEMENTED.
type fakeMaster struct {
	sutrav1.UnimplementedGridMasterServer
	endpoint string

	onSpawn      func(context.Context, *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error)
	onStop       func(*sutrav1.StopNodeRequest) (*sutrav1.StopNodeResponse, error)
	onRestart    func(*sutrav1.RestartNodeRequest) (*sutrav1.RestartNodeResponse, error)
	onRemove     func(*sutrav1.RemoveNodeRequest) (*sutrav1.RemoveNodeResponse, error)
	onNodeStatus func(*sutrav1.GetNodeStatusRequest) (*sutrav1.GetNodeStatusResponse, error)
	onListNodes  func(*sutrav1.ListNodesRequest) (*sutrav1.ListNodesResponse, error)
	onListAgents func() (*sutrav1.ListAgentsResponse, error)
	onStatus     func() (*sutrav1.GetClusterStatusResponse, error)
	onListBans   func() (*sutrav1.ListBansResponse, error)
	onLogs       func(*sutrav1.TailLogsRequest, grpc.ServerStreamingServer[sutrav1.TailLogsResponse]) error
	onEvents     func(*sutrav1.WatchEventsRequest, grpc.ServerStreamingServer[sutrav1.WatchEventsResponse]) error

	mu   sync.Mutex // guards seen
	seen []proto.Message
}

// note keeps a request and says whether there is a script for it.
func (f *fakeMaster) note(request proto.Message, scripted bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.seen = append(f.seen, request)
	if !scripted {
		return rpc.Errorf(rpc.Unimplemented, "no script for %T", request).WithHint("write one")
	}
	return nil
}

func (f *fakeMaster) requests() []proto.Message {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.seen)
}

func (f *fakeMaster) SpawnNode(ctx context.Context, r *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
	if err := f.note(r, f.onSpawn != nil); err != nil {
		return nil, err
	}
	return f.onSpawn(ctx, r)
}

func (f *fakeMaster) StopNode(_ context.Context, r *sutrav1.StopNodeRequest) (*sutrav1.StopNodeResponse, error) {
	if err := f.note(r, f.onStop != nil); err != nil {
		return nil, err
	}
	return f.onStop(r)
}

func (f *fakeMaster) RestartNode(_ context.Context, r *sutrav1.RestartNodeRequest) (*sutrav1.RestartNodeResponse, error) {
	if err := f.note(r, f.onRestart != nil); err != nil {
		return nil, err
	}
	return f.onRestart(r)
}

func (f *fakeMaster) RemoveNode(_ context.Context, r *sutrav1.RemoveNodeRequest) (*sutrav1.RemoveNodeResponse, error) {
	if err := f.note(r, f.onRemove != nil); err != nil {
		return nil, err
	}
	return f.onRemove(r)
}

func (f *fakeMaster) GetNodeStatus(_ context.Context, r *sutrav1.GetNodeStatusRequest) (*sutrav1.GetNodeStatusResponse, error) {
	if err := f.note(r, f.onNodeStatus != nil); err != nil {
		return nil, err
	}
	return f.onNodeStatus(r)
}

func (f *fakeMaster) ListNodes(_ context.Context, r *sutrav1.ListNodesRequest) (*sutrav1.ListNodesResponse, error) {
	if err := f.note(r, f.onListNodes != nil); err != nil {
		return nil, err
	}
	return f.onListNodes(r)
}

func (f *fakeMaster) ListAgents(_ context.Context, r *sutrav1.ListAgentsRequest) (*sutrav1.ListAgentsResponse, error) {
	if err := f.note(r, f.onListAgents != nil); err != nil {
		return nil, err
	}
	return f.onListAgents()
}

func (f *fakeMaster) GetClusterStatus(_ context.Context, r *sutrav1.GetClusterStatusRequest) (*sutrav1.GetClusterStatusResponse, error) {
	if err := f.note(r, f.onStatus != nil); err != nil {
		return nil, err
	}
	return f.onStatus()
}

func (f *fakeMaster) ListBans(_ context.Context, r *sutrav1.ListBansRequest) (*sutrav1.ListBansResponse, error) {
	if err := f.note(r, f.onListBans != nil); err != nil {
		return nil, err
	}
	return f.onListBans()
}

func (f *fakeMaster) TailLogs(r *sutrav1.TailLogsRequest, stream grpc.ServerStreamingServer[sutrav1.TailLogsResponse]) error {
	if err := f.note(r, f.onLogs != nil); err != nil {
		return err
	}
	return f.onLogs(r, stream)
}

func (f *fakeMaster) WatchEvents(r *sutrav1.WatchEventsRequest, stream grpc.ServerStreamingServer[sutrav1.WatchEventsResponse]) error {
	if err := f.note(r, f.onEvents != nil); err != nil {
		return err
	}
	return f.onEvents(r, stream)
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func serve(t *testing.T, f *fakeMaster) *fakeMaster {
	t.Helper()
	l := listen(t)
	srv := rpc.NewServer(zerolog.Nop(), nil, rpc.Guard{})
	sutrav1.RegisterGridMasterServer(srv, f)
	serveUntilEnd(t, srv, l)
	f.endpoint = l.Addr().String()
	return f
}

// server is a bare gRPC server or one of a grid's.
type server interface {
	Serve(l net.Listener) error
	Stop()
}

func serveUntilEnd(t *testing.T, srv server, l net.Listener) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-done; err != nil && !errors.Is(err, grpc.ErrServerStopped) { // nobody called, and it was stopped first
			t.Error(err)
		}
	})
}

// terminal is a client whose output is kept.
type terminal struct {
	client
	out, err bytes.Buffer
}

func newTerminal() *terminal {
	var term terminal
	term.client = client{
		Streams:  &Streams{Out: &term.out, Err: &term.err, Call: "sutra"},
		now:      func() time.Time { return epoch },
		portFree: portFreeLimit,
	}
	return &term
}

// parsing is held by the one command line that is parsed: package cli has its --help in a variable, and each parsing
// writes to it.
var parsing sync.Mutex

// parsed makes each command's action say that the command line is parsed.
func parsed(commands []*cli.Command, done func()) {
	for _, c := range commands {
		if act := c.Action; act != nil {
			c.Action = func(cctx *cli.Context) error {
				done()
				return act(cctx)
			}
		}
		parsed(c.Subcommands, done)
	}
}

// run runs a command line as the binary would, without the name sutra.
func (term *terminal) run(ctx context.Context, args ...string) error {
	parsing.Lock()
	done := sync.OnceFunc(parsing.Unlock)
	defer done()
	commands := term.commands()
	parsed(commands, done)
	app := &cli.App{
		Name: "sutra", HelpName: "sutra", Writer: &term.out, ErrWriter: &term.err,
		Flags: Flags(), Commands: commands, OnUsageError: OnUsageError,
		ExitErrHandler: func(*cli.Context, error) {},
	}
	// The masters of these tests answer in the clear: what a secure one answers is tried with the real binary.
	return app.RunContext(ctx, append([]string{"sutra", "--insecure=anywhere"}, args...))
}

// ask runs a command line against f that must succeed.
func ask(t *testing.T, f *fakeMaster, args ...string) (out, errs string) {
	t.Helper()
	term := newTerminal()
	if err := term.run(t.Context(), append([]string{"--master", f.endpoint}, args...)...); err != nil {
		t.Fatal(err)
	}
	return term.out.String(), term.err.String()
}

// refused runs a command line against f that must fail.
func refused(t *testing.T, f *fakeMaster, args ...string) (said string, err error) {
	t.Helper()
	term := newTerminal()
	err = term.run(t.Context(), append([]string{"--master", f.endpoint}, args...)...)
	if err == nil {
		t.Fatalf("%v succeeded:\n%s", args, term.out.String())
	}
	PrintError(term.Streams, WantsJSON(args), err)
	return term.err.String(), err
}

func diff(t *testing.T, got, want string) {
	t.Helper()
	if d := cmp.Diff(strings.TrimPrefix(want, "\n"), got); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

func wantRequests(t *testing.T, f *fakeMaster, want ...proto.Message) {
	t.Helper()
	if d := cmp.Diff(want, f.requests(), protocmp.Transform()); d != "" {
		t.Errorf("requests: -want +got\n%s", d)
	}
}

func announceMaster(t *testing.T, home string, l config.Local) {
	t.Helper()
	withdraw, err := config.Announce(home, "master", l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := withdraw(); err != nil {
			t.Error(err)
		}
	})
}

func healthyGrid() (*sutrav1.GetClusterStatusResponse, error) {
	return &sutrav1.GetClusterStatusResponse{
		GridId: "grid-1", Version: "0.1.0", Health: sutrav1.ClusterHealth_CLUSTER_HEALTH_HEALTHY,
	}, nil
}

// The same flag works on either side of the verb, the inner one wins, and both win over the environment.
func TestSharedFlagsOnEitherSideOfTheVerb(t *testing.T) {
	f := serve(t, &fakeMaster{onStatus: healthyGrid})
	home := t.TempDir()
	announceMaster(t, home, config.Local{Endpoint: f.endpoint})
	const wrong = "127.0.0.1:1" // nothing of ours may listen there
	cases := map[string]struct {
		env  map[string]string
		args []string
		json bool
	}{
		"master before":                 {args: []string{"--master", f.endpoint, "status"}},
		"master after":                  {args: []string{"status", "--master", f.endpoint}},
		"master with a scheme":          {args: []string{"status", "--master=http://" + f.endpoint}},
		"after wins":                    {args: []string{"--master", wrong, "status", "--master", f.endpoint}},
		"environment":                   {env: map[string]string{"SUTRA_MASTER": f.endpoint}, args: []string{"status"}},
		"before wins over environment":  {env: map[string]string{"SUTRA_MASTER": wrong}, args: []string{"--master", f.endpoint, "status"}},
		"after wins over environment":   {env: map[string]string{"SUTRA_MASTER": wrong}, args: []string{"status", "--master", f.endpoint}},
		"home before":                   {args: []string{"--home", home, "status"}},
		"home after":                    {args: []string{"status", "--home", home}},
		"home from environment":         {env: map[string]string{"SUTRA_HOME": home}, args: []string{"status"}},
		"flag home wins over its env":   {env: map[string]string{"SUTRA_HOME": "/nowhere"}, args: []string{"--home", home, "status"}},
		"json before":                   {args: []string{"-o", "json", "--master", f.endpoint, "status"}, json: true},
		"json after":                    {args: []string{"status", "--output", "json", "--master", f.endpoint}, json: true},
		"json short after":              {args: []string{"--master", f.endpoint, "status", "-o=json"}, json: true},
		"table after wins over json":    {args: []string{"-o", "json", "status", "-o", "table", "--master", f.endpoint}},
		"timeout before, master after":  {args: []string{"--timeout", "5s", "status", "--master", f.endpoint}},
		"timeout after, output between": {args: []string{"-o", "json", "status", "--timeout", "5s", "--master", f.endpoint}, json: true},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			for _, key := range []string{"SUTRA_MASTER", "SUTRA_HOME"} {
				t.Setenv(key, c.env[key])
			}
			term := newTerminal()
			if err := term.run(t.Context(), c.args...); err != nil {
				t.Fatal(err)
			}
			if got := strings.HasPrefix(term.out.String(), "{"); got != c.json {
				t.Errorf("json is %v, want %v:\n%s", got, c.json, term.out.String())
			}
		})
	}
}

// timed is a context whose time is over when a test says so. What has to be under way by then is, on a busy machine, too.
type timed struct {
	context.Context
	over chan struct{}
}

func (c timed) Done() <-chan struct{} { return c.over }

func (c timed) Err() error {
	select {
	case <-c.over:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

func TestTimeoutOnEitherSideOfTheVerb(t *testing.T) {
	const limit = 20 * time.Second // the contract gives a spawn more
	for _, args := range [][]string{
		{"--timeout", limit.String(), "spawn", "--request-id", "r1"},
		{"spawn", "--timeout", limit.String(), "--request-id", "r1"},
	} {
		ctx := timed{t.Context(), make(chan struct{})}
		left, over := time.Duration(0), make(chan struct{})
		f := serve(t, &fakeMaster{onSpawn: func(called context.Context, _ *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
			if deadline, ok := called.Deadline(); ok {
				left = time.Until(deadline)
			}
			close(ctx.over)
			<-over
			return nil, context.Canceled
		}})
		term := newTerminal()
		err := term.run(ctx, append([]string{"--master", f.endpoint}, args...)...)
		close(over)
		PrintError(term.Streams, false, err)
		if said := term.err.String(); ExitCode(err) != exitTimedOut || !strings.Contains(said, "didn't answer in time") ||
			!strings.Contains(said, "sutra list-nodes") || !strings.Contains(said, "--request-id r1") {
			t.Errorf("%v: exit %d\n%s", args, ExitCode(err), said)
		}
		if left <= 0 || left > limit {
			t.Errorf("%v: the call has %s, want at most %s", args, left, limit)
		}
	}
}

func TestNoMaster(t *testing.T) {
	l := listen(t)
	endpoint := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"status", "spawn"} {
		said, err := refused(t, &fakeMaster{endpoint: endpoint}, verb)
		if ExitCode(err) != exitUnavailable {
			t.Errorf("exit code %d", ExitCode(err))
		}
		diff(t, said, `
error: can't reach the master at `+endpoint+`: connection refused (MASTER_UNREACHABLE)
hint: start one with: sutra master   or name one with --master HOST:PORT
`)
	}
}

// A master that this home announces and that refuses is said to be gone; one that was named otherwise isn't.
func TestAnnouncedMasterIsGone(t *testing.T) {
	l := listen(t)
	endpoint := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SUTRA_MASTER", "")
	home := t.TempDir()
	for pid, who := range map[int]string{0: "this home's master", 4242: "this home's master (pid 4242)"} {
		announceMaster(t, filepath.Join(home, strconv.Itoa(pid)), config.Local{Endpoint: endpoint, PID: pid})
		term := newTerminal()
		err := term.run(t.Context(), "status", "--home", filepath.Join(home, strconv.Itoa(pid)))
		PrintError(term.Streams, false, err)
		diff(t, term.err.String(), `
error: can't reach the master at `+endpoint+`: connection refused (MASTER_UNREACHABLE)
hint: `+who+` is gone; start it again with: sutra master   or name another with --master HOST:PORT
`)
	}
	t.Setenv("SUTRA_HOME", filepath.Join(home, "4242"))
	if said, _ := refused(t, &fakeMaster{endpoint: endpoint}, "status"); strings.Contains(said, "gone") {
		t.Errorf("of a master that was named:\n%s", said)
	}
}

// Another service on the master's port is called what it is.
func TestAnotherServiceThere(t *testing.T) {
	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	other := listen(t)
	serveUntilEnd(t, grpc.NewServer(), other)
	for name, endpoint := range map[string]string{
		"doesn't speak gRPC":   strings.TrimPrefix(web.URL, "http://"),
		"another gRPC service": other.Addr().String(),
	} {
		_, port, _ := net.SplitHostPort(endpoint)
		for _, verb := range []string{"status", "spawn"} {
			said, _ := refused(t, &fakeMaster{endpoint: endpoint}, verb)
			if !strings.Contains(said, name) || !strings.Contains(said, "ss -ltnp 'sport = :"+port+"'") ||
				strings.Contains(said, "sutra master") || strings.Contains(said, "request-id") {
				t.Errorf("%s, %s:\n%s", name, verb, said)
			}
		}
	}
}

func TestTheMastersHintWins(t *testing.T) {
	f := serve(t, &fakeMaster{})
	said, _ := refused(t, f, "status")
	diff(t, said, "error: no script for *sutrav1.GetClusterStatusRequest (UNIMPLEMENTED)\nhint: write one\n")
}

// full is a disk without room.
type full struct{}

func (full) Write([]byte) (int, error) { return 0, net.ErrWriteToConnected }

func TestLostOutputIsAnError(t *testing.T) {
	f := serve(t, &fakeMaster{onStatus: healthyGrid})
	for _, format := range []string{"table", "json"} {
		term := newTerminal()
		term.Out = full{}
		err := term.run(t.Context(), "status", "--master", f.endpoint, "-o", format)
		if ExitCode(err) != exitFailed {
			t.Errorf("%s: %v", format, err)
		}
	}
}

func TestHelp(t *testing.T) {
	for _, command := range newTerminal().commands() {
		term := newTerminal()
		if err := term.run(t.Context(), command.Name, "--help"); err != nil {
			t.Fatal(err)
		}
		for _, part := range []string{"sutra " + command.Name, "Examples:", "Exit codes:", "--master", "--timeout"} {
			if !strings.Contains(term.out.String(), part) {
				t.Errorf("help of %s lacks %q:\n%s", command.Name, part, term.out.String())
			}
		}
	}
}

// Nothing is written for a client that only asks.
func TestHomeIsLeftAlone(t *testing.T) {
	f := serve(t, &fakeMaster{onStatus: healthyGrid})
	home := filepath.Join(t.TempDir(), "home")
	ask(t, f, "--home", home, "status")
	if found, err := filepath.Glob(home + "*"); err != nil || len(found) != 0 {
		t.Errorf("%v, %v", found, err)
	}
}
