package rpc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rs/xid"
	"github.com/sethvargo/go-retry"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

const (
	// firstPause doubles with each retry: 100, 200, 400 ms.
	firstPause = 100 * time.Millisecond
	maxRetries = 3
)

// Channel is the one way to call a grid's server: a grpc.ClientConnInterface that
// gives every call its policy's deadline, tries retry-safe calls again on
// UNAVAILABLE and dials anew after each failure of the transport.
type Channel struct {
	// peer is what messages call the other end, for example "the master".
	peer string
	// unreachable is the reason of a call that got no answer.
	unreachable Reason
	link        *link
	metrics     *Metrics
}

var _ grpc.ClientConnInterface = (*Channel)(nil)

// Master returns a channel to the master at endpoint (host:port), for one with these credentials; nil: in the clear. It
// connects at the first call.
func Master(endpoint string, credentials func() []*pki.Credentials, m *Metrics) *Channel {
	return masterChannel(endpoint, Trust{Credentials: credentials, Peer: pki.Peer{Kind: pki.Master}}, m)
}

// Join returns a channel to the master at endpoint for one that has a token and no credentials yet.
func Join(endpoint string, token pki.Token) *Channel {
	return masterChannel(endpoint, Trust{Token: &token}, nil)
}

func masterChannel(endpoint string, trust Trust, m *Metrics) *Channel {
	return &Channel{peer: "the master", unreachable: MasterUnreachable, link: newLink(endpoint, trust, m), metrics: m}
}

// Close drops the connection; calls under way end in UNAVAILABLE.
func (c *Channel) Close() { c.link.close() }

// Invoke makes one call as its policy says. Errors are *Error.
func (c *Channel) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	policy, _ := PolicyOf(method)
	if spawn, ok := args.(*sutrav1.SpawnNodeRequest); ok && spawn.GetRequestId() == "" {
		// A retry must be the same wish.
		named := proto.CloneOf(spawn)
		named.RequestId = xid.New().String()
		args = named
	}
	if policy.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, policy.Timeout)
		defer cancel()
	}
	var last error
	unsent := true
	err := retry.Do(ctx, backoff(), func(ctx context.Context) error {
		if last != nil && c.metrics != nil {
			c.metrics.retries.WithLabelValues(method).Inc()
		}
		last = c.link.invoke(ctx, method, args, reply, opts...)
		unsent = unsent && (undialed(last) || foreign(last))
		if last != nil && policy.RetrySafe && transient(last) {
			return retry.RetryableError(last)
		}
		return last
	})
	if err == nil {
		return nil
	}
	if last == nil {
		last = err // ctx had ended before the first try
	}
	e := c.explain(last)
	e.unsent = unsent
	return e
}

// undialed tells whether an error came up before there was a connection: nothing was sent. gRPC has no
// other mark for it than these words.
func undialed(err error) bool {
	return errors.Is(err, errClosed) || broken(err) &&
		strings.HasPrefix(status.Convert(err).Message(), `connection error: desc = "transport: Error while dialing`)
}

// foreign tells whether what answered serves something else: another gRPC service, or no gRPC at all.
func foreign(err error) bool {
	s, ok := status.FromError(err)
	if !ok || s.Code() == codes.OK || answered(err) {
		return false
	}
	return strings.HasPrefix(s.Message(), "unknown service ") || strings.Contains(s.Message(), "unexpected HTTP status code") ||
		strings.Contains(s.Message(), "unexpected content-type")
}

// NewStream opens a stream. Streams aren't retried: only their caller knows from where. Their policy's timeout is for
// the first message, or the end where there is none; what follows may take as long as the caller likes.
func (c *Channel) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return c.NewStreamWithin(ctx, 0, desc, method, opts...)
}

// NewStreamWithin is NewStream with a limit of the caller's for the first message, where that is shorter; 0: none.
func (c *Channel) NewStreamWithin(
	ctx context.Context, limit time.Duration, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption,
) (grpc.ClientStream, error) {
	policy, _ := PolicyOf(method)
	if limit == 0 || 0 < policy.Timeout && policy.Timeout < limit {
		limit = policy.Timeout
	}
	s := &stream{channel: c, caller: ctx, answered: func() {}}
	ctx, end := context.WithCancelCause(ctx)
	s.own = ctx
	if limit > 0 {
		timer := time.AfterFunc(limit, func() { end(errNoAnswer) })
		s.answered = func() { timer.Stop() }
	}
	opened, err := c.link.newStream(ctx, desc, method, append(opts, grpc.OnFinish(func(error) {
		s.answered()
		end(nil)
	}))...)
	if err != nil {
		s.answered()
		defer end(nil)
		return nil, s.explain(err)
	}
	s.ClientStream = opened
	return s, nil
}

// errNoAnswer is the cause of a stream's end whose first message didn't come in time.
var errNoAnswer = errors.New("no answer in time")

// stream is a stream whose errors are *Error, but for io.EOF.
type stream struct {
	grpc.ClientStream
	channel *Channel
	// caller is the context that the stream was opened with, own the one that it has: it also ends with errNoAnswer.
	caller, own context.Context //nolint:containedctx // they are the stream's
	// answered says that the other end answered.
	answered func()
}

func (s *stream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	s.answered()
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return s.explain(err)
}

func (s *stream) explain(err error) *Error {
	if status.Code(err) != codes.Canceled || answered(err) || !errors.Is(context.Cause(s.own), errNoAnswer) {
		return s.channel.explain(uncanceled(s.caller, err))
	}
	e := s.channel.explain(status.Error(codes.DeadlineExceeded, errNoAnswer.Error()))
	if s.ClientStream != nil {
		if header, _ := s.Header(); header != nil { // the stream has ended: this waits for nothing
			e.Message = s.channel.peer + " at " + s.channel.link.endpoint + " is there, and sent nothing of what was asked for in time"
		}
	}
	return e
}

// backoff pauses 100, 200 and 400 ms, each shortened by up to a quarter, so that
// callers which failed together don't come back together. It never adds up to more than 700 ms.
func backoff() retry.Backoff {
	steps := retry.WithMaxRetries(maxRetries, retry.NewExponential(firstPause))
	return retry.BackoffFunc(func() (time.Duration, bool) {
		pause, stop := steps.Next()
		return pause - rand.N(pause/4+1), stop
	})
}

// transient tells whether the same call may succeed in a moment: nothing answered,
// or a server answered that it will be ready soon.
func transient(err error) bool {
	if _, ok := untrusted(err.Error()); ok || status.Code(err) != codes.Unavailable || errors.Is(err, errClosed) {
		return false
	}
	return !answered(err) || AsError(err).RetryAfter > 0
}

// explain says of a failed call what a person has to know: who was called, where, and why it failed.
func (c *Channel) explain(err error) *Error {
	if answered(err) {
		return AsError(err)
	}
	e := AsError(err)
	e.unanswered = true
	if why, ok := untrusted(e.Message); ok {
		e.Reason, e.code = UntrustedPeer, codes.Unauthenticated
		e.Message = "who answers at " + c.link.endpoint + " isn't taken for " + c.peer + " of this grid: " + why
		e.Hint = c.link.trust.hint(c.link.endpoint, why)
		return e
	}
	if foreign(err) {
		e.code = codes.Unavailable // whatever it answered: who was called isn't there
	}
	switch e.Code() {
	case codes.Unavailable:
		e.Reason, e.code = c.unreachable, codes.Unavailable
		e.Message = "can't reach " + c.peer + " at " + c.link.endpoint + ": " + cause(e.Message)
		if c.link.trust.inClear() && strings.HasSuffix(e.Message, closedAtOnce) {
			e.Message += ", as a grid without --insecure does to those who call with it"
		}
	case codes.DeadlineExceeded:
		e.Message = c.peer + " at " + c.link.endpoint + " didn't answer in time"
	case codes.Canceled:
		e.Message = "the call to " + c.peer + " was canceled"
	case codes.Unimplemented, codes.Unknown:
		e.Message = "what answers at " + c.link.endpoint + " isn't " + c.peer + ": " + cause(e.Message)
	case codes.ResourceExhausted:
		c.explainSize(e)
	}
	return e
}

// tooLarge is how gRPC says, at either end, that a message is longer than its receiver takes.
var tooLarge = regexp.MustCompile(`larger than max \((\d+) vs\. (\d+)\)`)

// explainSize tells a request that was refused for its size from an answer that was: behind the latter
// the call has done its work.
func (c *Channel) explainSize(e *Error) {
	found := tooLarge.FindStringSubmatch(e.Message)
	if found == nil {
		e.Message = c.peer + " at " + c.link.endpoint + " is out of some resource: " + e.Message
		return
	}
	e.Reason = MessageTooLarge
	size, limit := mebibytes(found[1]), mebibytes(found[2])
	if found[2] == strconv.Itoa(maxResponse) {
		e.code = codes.Internal
		e.Message = fmt.Sprintf("the answer of %s at %s is too large: %s, of which at most %s are read", c.peer, c.link.endpoint, size, limit)
		return
	}
	e.Message = fmt.Sprintf("the request to %s at %s is too large: %s, where at most %s are accepted", c.peer, c.link.endpoint, size, limit)
	e.Hint = "send less in one request"
}

// mebibytes is a number of bytes as people read it, rounded up, so that what is over a limit looks so.
func mebibytes(bytes string) string {
	n, _ := strconv.ParseFloat(bytes, 64) // digits only
	return fmt.Sprintf("%.1f MiB", math.Ceil(n/(1<<20)*10)/10)
}

// wrappers are the layers that gRPC puts around the error of a dial.
var wrappers = regexp.MustCompile(`^(connection error: desc = "?|transport: |Error while dialing: |error reading server preface: |dial tcp: |dial tcp [^ ]+ |connect: )+`)

// closedAtOnce is also all that one who talks in the clear sees of a server that wants TLS.
const closedAtOnce = "what listens there closed the connection at once"

// cause strips the transport's wrapping from a message, down to what the system said.
func cause(message string) string {
	has := func(words string) bool { return strings.Contains(message, words) }
	switch {
	case has("first record does not look like a TLS handshake"):
		return "what listens there doesn't speak TLS: it is another service, or a grid with --insecure, which is called with --insecure as well"
	case has("no application protocol") || has("missing selected ALPN"):
		return "what listens there doesn't speak gRPC"
	case has("protocol version not supported") || has("unsupported protocol version"):
		return "what listens there doesn't speak TLS 1.3, as all of a grid do"
	case has("remote error: tls: internal error"):
		return "it broke off the handshake, as one does that has no identity in a grid yet"
	case has(tlsTrouble) && (has("EOF") || has("connection reset") || has("broken pipe")):
		return closedAtOnce
	case has(tlsTrouble) && (has("deadline exceeded") || has("i/o timeout")):
		return "what listens there doesn't answer"
	case (has("server preface") || has("write: ")) && (has("EOF") || has("connection reset") || has("broken pipe")):
		return closedAtOnce
	case has("server preface") && has("use of closed network connection"):
		return "what listens there doesn't answer"
	case has("server preface") || has("not a settings frame") || has("unexpected HTTP status code") || has("unexpected content-type"):
		return "what listens there doesn't speak gRPC"
	case has("unknown service "):
		return "what listens there is another gRPC service"
	case has("keepalive ping failed"):
		return "it stopped answering"
	case has("connection is closing") || has("error reading from server"):
		return "the connection broke"
	}
	return strings.TrimSuffix(wrappers.ReplaceAllString(message, ""), `"`)
}

// errClosed is what callers get from a channel that was closed before the call.
var errClosed = status.Error(codes.Unavailable, "the connection was closed")
