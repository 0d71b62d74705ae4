package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/sutra-grid/sutra/config"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// Streams is where output goes and what may be written there.
type Streams struct {
	Out, Err io.Writer
	// OutTTY and ErrTTY tell whether a person sees the stream on a terminal: symbols and next
	// commands are for terminals only.
	OutTTY, ErrTTY bool
	// Color is false where the person wants none (NO_COLOR). Without a terminal there is none anyway.
	Color bool
	// Call is how the person calls the binary, ready to be pasted into a shell.
	Call string
}

// Flags are the flags of every verb. The app takes them too, so that they may stand before the
// verb as well as after it; after it wins. Each call makes new ones.
func Flags() []cli.Flag {
	const category = "The grid and the output:"
	return []cli.Flag{
		&cli.StringFlag{Name: "master", Category: category, Usage: "the master's `HOST:PORT` (default: $SUTRA_MASTER, " +
			"else the master of this host, else " + config.DefaultMaster + ")"},
		&cli.StringFlag{Name: "home", Category: category, Usage: "`FOLDER` in which this host's roles find each other (default: $SUTRA_HOME, " +
			"else /var/lib/sutra for root, else $XDG_DATA_HOME/sutra)"},
		OutputFlag(category),
		InsecureFlag(category),
		&cli.DurationFlag{
			Name: "timeout", Category: category, DefaultText: "each call's own",
			Usage: "`LIMIT` of each call, retries included, for example 3s, of logs and events until they begin to come; one longer than the call's own changes nothing",
		},
	}
}

// insecureValue is the value of --insecure, which may stand alone.
type insecureValue struct{ rpc.Insecure }

// IsBoolFlag has the flag package take --insecure without a value.
func (*insecureValue) IsBoolFlag() bool { return true }

// Set takes what stands behind the =, or "true".
func (v *insecureValue) Set(s string) error {
	switch s {
	case "true":
		v.Insecure = rpc.InsecureLoopback
	case "false":
		v.Insecure = rpc.Secure
	case "anywhere":
		v.Insecure = rpc.InsecureAnywhere
	default:
		return errors.New("--insecure stands alone, for loopback addresses, or is --insecure=anywhere")
	}
	return nil
}

// String is the value as it is written.
func (v *insecureValue) String() string { return string(v.Insecure) }

// InsecureFlag is --insecure: both ends of a connection need it.
func InsecureFlag(category string) cli.Flag {
	return &cli.GenericFlag{
		Name: "insecure", Category: category, Value: &insecureValue{}, DefaultText: "TLS",
		Usage: "talk in the clear, as the other end was told to as well; `[=anywhere]` is for other than loopback addresses",
	}
}

// InsecureOf is what --insecure says.
func InsecureOf(cctx *cli.Context) rpc.Insecure {
	if v, ok := global(cctx, "insecure").Generic("insecure").(*insecureValue); ok {
		return v.Insecure
	}
	return rpc.Secure
}

// OutputFlag is --output, before and after each verb that has something to print.
func OutputFlag(category string) cli.Flag {
	return &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Category: category, Value: "table", Usage: "`FORMAT` of the output: table or json"}
}

// OutputJSON tells whether JSON is asked for.
func OutputJSON(cctx *cli.Context) (bool, error) {
	switch output := global(cctx, "output").String("output"); output {
	case "table":
		return false, nil
	case "json":
		return true, nil
	default:
		return false, &UsageError{Message: fmt.Sprintf("unknown output format %q", output), Hint: "--output is table or json"}
	}
}

// Commands are the client's verbs. Their errors are for PrintError and ExitCode.
func Commands(s *Streams) []*cli.Command {
	return (&client{Streams: s, now: time.Now, portFree: portFreeLimit}).commands()
}

// client is what all verbs share.
type client struct {
	*Streams
	// now is for ages and durations.
	now func() time.Time
	// portFree is how long smoke waits for a stopped node's port.
	portFree time.Duration
}

func (c *client) commands() []*cli.Command {
	all := []*cli.Command{
		c.spawnCommand(), c.stopCommand(), c.restartCommand(), c.removeCommand(), c.statusCommand(),
		c.nodeStatusCommand(), c.listAgentsCommand(), c.listNodesCommand(), c.logsCommand(), c.eventsCommand(), c.smokeCommand(),
		c.agentsCommand(), c.usersCommand(), c.listBansCommand(), c.tokenCommand(), c.loginCommand(), c.caCommand(),
	}
	shared(all)
	return all
}

// shared gives commands, and those beneath them, what all verbs have.
func shared(commands []*cli.Command) {
	for _, command := range commands {
		command.Flags = append(command.Flags, Flags()...)
		command.OnUsageError = OnUsageError
		command.Before = RefuseEmpty
		command.HideHelpCommand = true // else `sutra stop help` would be no stray argument
		shared(command.Subcommands)
	}
}

// session is one run of a verb: a master to call and a way to answer. As a connection it gives
// each call the --timeout and its errors a hint.
type session struct {
	*client
	json     bool
	endpoint string
	// home is where this account's identities are.
	home string
	// own are this account's identities, and files where each is kept.
	own   []*pki.Credentials
	files map[*pki.Credentials]string
	// unsaved is why one of them that was renewed couldn't be kept; nil where all were.
	unsaved error
	// announced is the master that the home names; zero where the endpoint came from elsewhere.
	announced config.Local
	// call is how the person calls a verb that is to ask the same master, up to the verb.
	call string
	// timeout limits each call; 0 leaves that to the contract.
	timeout  time.Duration
	insecure rpc.Insecure
	channel  *rpc.Channel
	master   sutrav1.GridMasterClient
}

var _ grpc.ClientConnInterface = (*session)(nil)

// argument in strayFlag's place tells verb that the command takes arguments, and looks at them itself.
const argument = "<argument>"

// theArgument is the one argument of a command that takes one.
func theArgument(cctx *cli.Context, what, where string) (string, error) {
	if cctx.Args().Len() != 1 || cctx.Args().First() == "" {
		return "", &UsageError{
			Message: fmt.Sprintf("%s takes one %s, behind its flags, and has %d words there", cctx.Command.HelpName, what, cctx.Args().Len()),
			Hint:    cctx.Command.UsageText + "   (" + where + ")",
		}
	}
	return cctx.Args().First(), nil
}

// verb is the action of a command: do, once the flags that all verbs share are read. strayFlag is
// the flag that a person most likely meant who wrote its value alone; "" where there is none.
func (c *client) verb(strayFlag string, do func(*cli.Context, *session) error) cli.ActionFunc {
	return func(cctx *cli.Context) error {
		if strayFlag != argument {
			if err := RefuseStray(cctx, strayFlag); err != nil {
				return err
			}
		}
		s := &session{client: c}
		var err error
		if s.json, err = OutputJSON(cctx); err != nil {
			return err
		}
		timeout := global(cctx, "timeout")
		s.timeout = timeout.Duration("timeout")
		if s.timeout < 0 || s.timeout == 0 && timeout.IsSet("timeout") {
			return &UsageError{
				Message: fmt.Sprintf("--timeout %s leaves no time for a call", s.timeout),
				Hint:    "write a duration such as 500ms, 3s or 1m, or leave --timeout out",
			}
		}
		master, home := global(cctx, "master").String("master"), global(cctx, "home").String("home")
		if s.endpoint, s.announced, err = lookup(master, home); err != nil {
			return err
		}
		s.call = c.Call
		if master != "" {
			s.call += " --master " + shellWord(master)
		}
		if home != "" {
			s.call += " --home " + shellWord(home)
		}
		if s.home, err = config.Home(home); err != nil {
			return &UsageError{Message: err.Error()}
		}
		s.insecure = InsecureOf(cctx)
		if err := s.dial(cctx.Context, renewalDue); err != nil {
			return err
		}
		defer func() { s.channel.Close() }()
		s.master = sutrav1.NewGridMasterClient(s)
		err = do(cctx, s)
		// Where the grid moves to another root, as the calls have shown, the move may be over at the next verb.
		s.renewOwn(cctx.Context, (*pki.Credentials).Outdated)
		return err
	}
}

// dial makes the channel to the master, with this account's identities as they are now, those that are due renewed, or in the clear.
func (s *session) dial(ctx context.Context, due func(*pki.Credentials) bool) error {
	if err := s.insecure.Allows(s.endpoint); err != nil {
		return &UsageError{Message: err.Error()}
	}
	if s.insecure != rpc.Secure {
		s.channel = rpc.Master(s.endpoint, nil, nil)
		return nil
	}
	var err error
	if s.own, s.files, err = credentials(s.home); err != nil {
		return err
	}
	s.renewOwn(ctx, due)
	all := s.own
	s.channel = rpc.Master(s.endpoint, func() []*pki.Credentials { return all }, nil)
	return nil
}

// redial makes the channel anew.
func (s *session) redial(ctx context.Context, due func(*pki.Credentials) bool) error {
	s.channel.Close()
	return s.dial(ctx, due)
}

// global is the level, verb or app, at which a flag of Flags was written; the verb where it was nowhere.
func global(cctx *cli.Context, name string) *cli.Context {
	for _, level := range cctx.Lineage() {
		if slices.Contains(level.LocalFlagNames(), name) {
			return level
		}
	}
	return cctx
}

// shellWord is a word as a shell takes it.
func shellWord(w string) string {
	if !strings.ContainsFunc(w, func(r rune) bool {
		return (r < 'a' || 'z' < r) && (r < 'A' || 'Z' < r) && (r < '0' || '9' < r) && !strings.ContainsRune("-_./:,@%+=", r)
	}) {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}

// UsualMaster is the endpoint of the master that a verb without flags asks.
func UsualMaster() (string, error) {
	endpoint, _, err := lookup("", "")
	return endpoint, err
}

// lookup finds the master to ask: the one that is named, else $SUTRA_MASTER, else the one that the home
// names, which is announced then, else the default.
func lookup(master, homeFlag string) (endpoint string, announced config.Local, err error) {
	address, from := master, "--master"
	if address == "" {
		address, from = os.Getenv("SUTRA_MASTER"), "SUTRA_MASTER"
	}
	if address == "" {
		home, err := config.Home(homeFlag)
		if err != nil {
			return "", config.Local{}, &UsageError{Message: err.Error(), Hint: "or name the master with --master HOST:PORT"}
		}
		address, from = config.DefaultMaster, "the default"
		if local, ok := config.Announced(home, "master"); ok {
			address, from, announced = local.Endpoint, "the master's address under "+home, local
		}
	}
	if endpoint, err = config.Endpoint(address); err != nil {
		return "", config.Local{}, &UsageError{Message: from + ": " + err.Error()}
	}
	return endpoint, announced, nil
}

// requiredNode is the value of --node, which the verb can't do without.
func requiredNode(cctx *cli.Context) (string, error) {
	if value := cctx.String("node"); value != "" {
		return value, nil
	}
	return "", &UsageError{
		Message: cctx.Command.HelpName + " needs --node",
		Hint:    cctx.Command.HelpName + " --node NODE   (sutra list-nodes shows the ids)",
	}
}

// nodeFlag is the --node of the verbs that work on one node.
func nodeFlag() cli.Flag {
	return &cli.StringFlag{Name: "node", Aliases: []string{"n"}, Usage: "id of the `NODE`, as list-nodes shows it"}
}

// Invoke makes one call within --timeout.
func (s *session) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	if s.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.timeout)
		defer cancel()
	}
	if err := s.channel.Invoke(ctx, method, args, reply, opts...); err != nil {
		return s.advise(method, rpc.AsError(err))
	}
	return nil
}

// NewStream opens a stream, of which --timeout limits the time until the first message; then it lives as long as its caller.
func (s *session) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return s.channel.NewStreamWithin(ctx, s.timeout, desc, method, opts...)
}

// notMaster is how rpc speaks of a port where something listens that doesn't speak gRPC, hangs up or is
// silent. It has no reason of its own.
const notMaster = "what listens there"

// refusedThere is how rpc speaks of a port where nothing listens.
const refusedThere = "connection refused"

// advise says what to do next where the master, which may not be there, said nothing.
func (s *session) advise(method string, e *rpc.Error) *rpc.Error {
	policy, _ := rpc.PolicyOf(method)
	switch {
	case e.Hint != "", !rpc.Unanswered(e):
	case strings.Contains(e.Message, notMaster), e.Reason == rpc.Unimplemented:
		_, port, _ := net.SplitHostPort(s.endpoint) // config.Endpoint made it
		_ = e.WithHint("another service listens there; on that host this names it: ss -ltnp 'sport = :%s'; "+
			"name the master with --master HOST:PORT", port)
	case e.Reason == rpc.MasterUnreachable && s.announced.Endpoint != "" && strings.Contains(e.Message, refusedThere):
		who := "this home's master"
		if pid := s.announced.PID; pid != 0 {
			who += fmt.Sprintf(" (pid %d)", pid)
		}
		_ = e.WithHint("%s is gone; start it again with: sutra master   or name another with --master HOST:PORT", who)
	case e.Reason == rpc.MasterUnreachable:
		_ = e.WithHint("start one with: sutra master   or name one with --master HOST:PORT")
	case e.Reason == rpc.TimedOut && s.timeout > 0 && s.timeout < policy.Timeout:
		_ = e.WithHint("the limit was --timeout %s; give it more or leave it out", s.timeout)
	case e.Reason == rpc.TimedOut:
		_, port, _ := net.SplitHostPort(s.endpoint) // config.Endpoint made it
		_ = e.WithHint("a master that hangs, or another service, listens there; on that host this names it: ss -ltnp 'sport = :%s'", port)
	}
	return e
}

// show answers: the response as one JSON document, or the text for people.
func (s *session) show(response proto.Message, text func() string) error {
	if !s.json {
		return s.write(text())
	}
	document, err := compactJSON(response)
	if err != nil {
		return err
	}
	return s.write(string(document) + "\n")
}

// write fails where the output is lost, so that a script on a full disk learns of it.
func (s *session) write(text string) error {
	if _, err := io.WriteString(s.Out, text); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// tell says something beside the answer, to people only. It goes to stderr, so that a table stays one.
func (s *session) tell(format string, args ...any) {
	if !s.json {
		fmt.Fprintf(s.Err, format+"\n", args...)
	}
}
