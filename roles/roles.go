// Package roles is the command table: which verb starts what, where output goes, and
// what an error means to the shell.
package roles

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/roles/client"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// Main runs one command line and returns the process's exit code.
func Main(args []string, version string) int {
	// A first SIGINT, SIGTERM or SIGHUP (a terminal that was closed; not under nohup) ends the command in good order.
	// Further ones change nothing: every role bounds its own stop, and to break that off would leave processes behind.
	ends := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) {
		ends = append(ends, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	defer stop()
	streams := &client.Streams{
		Out: os.Stdout, Err: concealing{os.Stderr}, OutTTY: isTerminal(os.Stdout), ErrTTY: isTerminal(os.Stderr),
		Color: os.Getenv("NO_COLOR") == "", Call: callName(args),
	}
	args = hideSecrets(args)
	err := run(ctx, streams, version, args)
	if err != nil {
		client.PrintError(streams, client.WantsJSON(args), err)
	}
	return client.ExitCode(err)
}

// hideSecrets takes the secrets out of the command line that the host's other accounts see of this process, and returns a copy
// that still has them.
func hideSecrets(args []string) []string {
	own := make([]string, len(args))
	for i, arg := range args {
		own[i] = strings.Clone(arg)
	}
	for i, arg := range args {
		secret := secretIn(own, i)
		if secret > 0 && len(os.Args) > i && unsafe.StringData(os.Args[i]) == unsafe.StringData(arg) { //nolint:gosec // only compared
			// The words of os.Args are where the kernel has put them, and shows them from.
			hidden := arg[len(arg)-secret:]
			clear(unsafe.Slice(unsafe.StringData(hidden), secret)) //nolint:gosec // the process's own memory, which may be written to
		}
	}
	return own
}

// secretIn is how many of the last bytes of a word are a secret: the value of a flag that has one, with one dash or two, and
// whatever looks like a token, wherever it was pasted.
func secretIn(args []string, i int) int {
	arg := args[i]
	for _, flag := range []string{"join-token", "token"} {
		for _, dashes := range []string{"-", "--"} {
			if value, ok := strings.CutPrefix(arg, dashes+flag+"="); ok {
				return len(value)
			}
			if i > 0 && args[i-1] == dashes+flag {
				return len(arg)
			}
		}
	}
	if at := pki.HoldsToken(arg); at >= 0 {
		return len(arg) - at
	}
	return 0
}

// concealing takes tokens out of what is written: no log and no error is to have one.
type concealing struct{ io.Writer }

// Write writes whole texts: a token that came in two pieces would be seen in part.
func (c concealing) Write(text []byte) (int, error) {
	if _, err := c.Writer.Write(pki.Conceal(text)); err != nil {
		return 0, err
	}
	return len(text), nil
}

// callName is how the person calls the binary: "go run ." where that built it.
func callName(args []string) string {
	if binary, err := os.Executable(); err != nil || !strings.Contains(binary, "/go-build") {
		return args[0]
	}
	return "go run ."
}

func run(ctx context.Context, streams *client.Streams, version string, args []string) error {
	a := app(streams, version)
	var unknown error
	a.CommandNotFound = func(c *cli.Context, word string) { unknown = unknownVerb(c.App, word) } // help on no verb
	return errors.Join(a.RunContext(ctx, args), unknown)
}

func app(streams *client.Streams, version string) *cli.App {
	a := &cli.App{
		Name:  "sutra",
		Usage: "run storage servers on many hosts",
		Description: "One binary is all three roles: the master decides, an agent on each host runs the storage\n" +
			"processes, and the client verbs ask. Begin with: sutra dev",
		Version:              version,
		HideVersion:          true,
		EnableBashCompletion: true,
		Flags: append(client.Flags(),
			&cli.BoolFlag{Name: "version", Aliases: []string{"v"}, Usage: "print the binary's version", DisableDefaultText: true}),
		Commands: slices.Concat(
			[]*cli.Command{devCommand(streams, version), masterCommand(streams, version), agentCommand(streams, version)},
			client.Commands(streams),
			[]*cli.Command{storageCommand(streams), versionCommand(streams, version), completionCommand(streams)},
		),
		Writer:         streams.Out,
		ErrWriter:      streams.Err,
		ExitErrHandler: func(*cli.Context, error) {}, // Main alone prints errors and exits
		OnUsageError:   client.OnUsageError,
		Before: func(c *cli.Context) error {
			if c.Bool("version") && c.Args().Present() {
				return &client.UsageError{Message: "--version stands alone", Hint: "sutra --version"}
			}
			return client.RefuseEmpty(c)
		},
		Action: func(c *cli.Context) error {
			switch {
			case c.Bool("version"):
				return printVersion(c, streams, version)
			case c.Args().Present():
				return unknownVerb(c.App, c.Args().First())
			}
			return cli.ShowAppHelp(c)
		},
	}
	for _, c := range a.Commands {
		c.OnUsageError = client.OnUsageError
		c.Before = client.RefuseEmpty
		if c.Name != "storage" { // a node, which has no secret of the grid's and may well leave a core file
			c.Before = func(c *cli.Context) error { return errors.Join(hideMemory(), client.RefuseEmpty(c)) }
		}
	}
	return a
}

// unknownVerb refuses a word that is no verb, and names those that it looks like.
func unknownVerb(a *cli.App, word string) error {
	e := &client.UsageError{Message: fmt.Sprintf("there is no verb %q", word), Hint: "sutra --help lists the verbs"}
	if like := alike(a, word); len(like) > 0 {
		e.Hint = "did you mean: sutra " + strings.Join(like, ", sutra ") + "   (sutra --help lists the verbs)"
	}
	return e
}

// alike are the verbs that begin with the word, else those that have it in them, else those that begin with
// the word that a typing error most likely meant.
func alike(a *cli.App, word string) []string {
	var names, words []string
	for _, c := range a.VisibleCommands() {
		names = append(names, c.Name)
		first, _, _ := strings.Cut(c.Name, "-")
		words = append(words, c.Name, first)
	}
	with := func(part string, in func(name, part string) bool) []string {
		return slices.DeleteFunc(slices.Clone(names), func(name string) bool { return part == "" || !in(name, part) })
	}
	if like := with(word, strings.HasPrefix); len(like) > 0 {
		return like
	}
	if like := with(word, strings.Contains); len(like) > 0 {
		return like
	}
	near, _ := config.Nearest(word, words)
	return with(near, strings.HasPrefix)
}

// unlessInterrupted is the error of a role's start, nil where the start was broken off because ctx has ended.
func unlessInterrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// homeFlag is how the roles that keep something on disk are told where.
func homeFlag() []cli.Flag {
	return []cli.Flag{&cli.StringFlag{
		Name: "home", Usage: "`FOLDER` that everything is kept under (default: $SUTRA_HOME, else /var/lib/sutra for root, else $XDG_DATA_HOME/sutra)",
	}}
}

// Version is what the binary says of itself: what the linker was told, else what Go recorded of the build.
func Version(version, commit string) string {
	if version != "" {
		if commit != "" {
			return version + " (" + commit + ")"
		}
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	return "devel"
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func writeString(w io.Writer, s string) error {
	_, err := io.WriteString(w, s)
	return err
}
