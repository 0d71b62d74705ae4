package client

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/sutra-grid/sutra/rpc"
)

// The process's exit codes.
const (
	exitOK = iota
	exitFailed
	exitUsage
	exitNotFound
	exitUnavailable
	exitTimedOut
	exitRefused
	exitConflict
)

// Reasons of errors that no grid was asked for.
const (
	reasonUsage  = "USAGE"
	reasonFailed = "FAILED"
)

// UsageError is a command line that can't be right.
type UsageError struct {
	// Message says what is wrong, in one line.
	Message string
	// Hint says what to write instead; empty where nobody knows.
	Hint string
}

// Error is the message alone.
func (e *UsageError) Error() string { return e.Message }

// flagInError finds the flag in the flag package's messages, which write it with one dash.
var flagInError = regexp.MustCompile(`(for flag|not defined:|needs an argument:) -(\w[\w-]+)`)

// OnUsageError is a cli.OnUsageErrorFunc that makes a UsageError of what the flag parser said.
func OnUsageError(cctx *cli.Context, err error, _ bool) error {
	message := flagInError.ReplaceAllString(err.Error(), "$1 --$2")
	message = strings.Replace(message, "flag provided but not defined:", "unknown flag", 1)
	hint := cctx.Command.HelpName + " --help lists the flags and what they take"
	found := badValue.FindStringSubmatch(message)
	if found == nil {
		return &UsageError{Message: message, Hint: hint}
	}
	value, name, tooLarge := found[1], found[2], found[3] == "value out of range"
	written := "--" + name
	if len(name) == 1 {
		written = "-" + name
	}
	for _, f := range cctx.Command.Flags {
		if !slices.Contains(f.Names(), name) {
			continue
		}
		switch f.(type) {
		case *cli.DurationFlag:
			if !strings.ContainsFunc(value, func(r rune) bool { return r < '0' || '9' < r }) {
				hint = fmt.Sprintf("a duration has a unit: --%s %ss", name, value)
			}
		case *cli.IntFlag, *cli.UintFlag, *cli.Uint64Flag:
			message = fmt.Sprintf("%s %q isn't a whole number of 0 or more", written, value)
			if tooLarge {
				message = fmt.Sprintf("%s %s is too large", written, value)
			}
			hint = "write digits only, such as " + written + " 2000"
		case *cli.BoolFlag:
			message, hint = fmt.Sprintf("%s takes no value, and has %q", written, value), "write "+written+" alone, or leave it out"
		}
	}
	return &UsageError{Message: message, Hint: hint}
}

// badValue finds a value that a flag refused, and the flag.
var badValue = regexp.MustCompile(`^invalid (?:boolean )?value "(.*)" for (?:flag )?--?([\w-]+): (.*)`)

// RefuseEmpty is a cli.BeforeFunc that refuses string flags that were given without text, most often by a
// script's unset variable: taken as not given they would make the command do something else.
func RefuseEmpty(cctx *cli.Context) error {
	for _, f := range cctx.Command.Flags {
		name := f.Names()[0]
		if _, ok := f.(*cli.StringFlag); ok && cctx.String(name) == "" && slices.Contains(cctx.LocalFlagNames(), name) {
			return &UsageError{
				Message: fmt.Sprintf("--%s is empty", name),
				Hint:    fmt.Sprintf("give it a value or leave it out; %s --help says what it takes", cctx.Command.HelpName),
			}
		}
	}
	return nil
}

// RefuseStray refuses arguments that belong to no flag and says what was most likely meant; flag
// is the one whose value they may be, "" where there is none.
func RefuseStray(cctx *cli.Context, flag string) error {
	if !cctx.Args().Present() {
		return nil
	}
	verb := cctx.Command.HelpName
	e := &UsageError{
		Message: fmt.Sprintf("%s takes flags only, and %q is none", verb, cctx.Args().First()),
		Hint:    verb + " --help lists the flags",
	}
	switch {
	case cctx.Args().First() == "help":
		e.Hint = verb + " --help"
	case flag != "" && !cctx.IsSet(flag):
		e.Hint = fmt.Sprintf("%s --%s %s", verb, flag, strings.Join(cctx.Args().Slice(), " "))
	}
	return e
}

// WantsJSON tells whether a command line asks for JSON, also one that can't be parsed.
func WantsJSON(args []string) bool {
	wants, isValue := false, false
	for _, arg := range args {
		if isValue {
			wants, isValue = arg == "json", false
			continue
		}
		if arg == "--" {
			break
		}
		name, value, hasValue := strings.Cut(arg, "=")
		switch name {
		case "-o", "--o", "-output", "--output":
			wants, isValue = value == "json", !hasValue
		}
	}
	return wants
}

// ExitCode is the process's exit code for what a verb returned.
func ExitCode(err error) int {
	if err == nil {
		return exitOK
	}
	if usage := (*UsageError)(nil); errors.As(err, &usage) {
		return exitUsage
	}
	switch rpc.AsError(err).Code() {
	case codes.InvalidArgument:
		return exitUsage
	case codes.NotFound:
		return exitNotFound
	case codes.Unavailable:
		return exitUnavailable
	case codes.DeadlineExceeded:
		return exitTimedOut
	case codes.Unauthenticated, codes.PermissionDenied:
		return exitRefused
	case codes.AlreadyExists, codes.FailedPrecondition, codes.ResourceExhausted:
		return exitConflict
	default:
		return exitFailed
	}
}

// failure is the JSON form of an error.
type failure struct {
	Reason     string            `json:"reason"`
	Message    string            `json:"message"`
	Hint       string            `json:"hint"`
	Code       string            `json:"code"`
	Metadata   map[string]string `json:"metadata"`
	Violations []violation       `json:"violations"`
	// Exit is how the process ended, where that is the trouble; else null.
	Exit json.RawMessage `json:"exit"`
	// output is the last that the process said.
	output string
}

type violation struct {
	Field       string `json:"field"`
	Description string `json:"description"`
}

func newFailure(err error) failure {
	f := failure{
		Reason: reasonFailed, Message: err.Error(), Code: code.Code_UNKNOWN.String(),
		Metadata: map[string]string{}, Violations: []violation{},
	}
	if usage := (*UsageError)(nil); errors.As(err, &usage) {
		f.Reason, f.Hint, f.Code = reasonUsage, usage.Hint, code.Code_INVALID_ARGUMENT.String()
		return f
	}
	e := rpc.AsError(err)
	if own := (*rpc.Error)(nil); !errors.As(err, &own) {
		if _, ok := status.FromError(err); !ok && e.Reason == rpc.Internal {
			return f // nothing of a grid's: a file, a listener
		}
		f.Message = e.Message
	}
	f.Reason, f.Hint, f.Code = string(e.Reason), e.Hint, code.Code(e.Code()).String()
	if e.Meta != nil {
		f.Metadata = e.Meta
	}
	for _, v := range e.Violations {
		f.Violations = append(f.Violations, violation(v))
	}
	if e.Exit != nil {
		f.output = e.Exit.GetOutput()
		f.Exit, _ = compactJSON(e.Exit) // null where it can't be written
	}
	return f
}

// PrintError writes err to s.Err: for people a line, a hint where there is one and the last
// output of the process that is to blame; with asJSON one line {"error":{...}}.
func PrintError(s *Streams, asJSON bool, err error) {
	f := newFailure(err)
	if asJSON {
		encoder := json.NewEncoder(s.Err)
		encoder.SetEscapeHTML(false)
		_ = encoder.Encode(map[string]failure{"error": f}) // there is no third stream to complain on
		return
	}
	var text strings.Builder
	text.WriteString(paint("error:", toneBad, s.Color && s.ErrTTY) + " ")
	text.WriteString(strings.Join(cleanLines(f.Message), "\n  "))
	if f.Reason != reasonFailed {
		text.WriteString(" (" + clean(f.Reason) + ")")
	}
	text.WriteString("\n")
	if f.Hint != "" {
		text.WriteString("hint: " + clean(f.Hint) + "\n")
	}
	text.WriteString(quoteOutput(f.output))
	fmt.Fprint(s.Err, text.String())
}

// compactJSON is protojson in one line, without the random spaces that protojson adds.
func compactJSON(m proto.Message) ([]byte, error) {
	loose, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode response: %w", err)
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, loose); err != nil {
		return nil, fmt.Errorf("encode response: %w", err)
	}
	return compact.Bytes(), nil
}
