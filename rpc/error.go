package rpc

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// domain marks the ErrorInfo of a grid's own errors.
const domain = "sutra"

// hintKey is where a hint travels in ErrorInfo.metadata.
const hintKey = "hint"

// Error is what goes wrong in a grid, the same at both ends of a call: what
// failed, on what, why, and what to do next. A handler returns one and the caller
// gets an equal one.
type Error struct {
	Reason Reason
	// Message says what failed, on what and why, in one line.
	Message string
	// Hint says what to do next, in one line; empty where there is nothing to say.
	Hint string
	// Meta holds ids for machines: node_id, agent_id, port and so on.
	Meta map[string]string
	// Violations names the fields of a request that can't be right.
	Violations []Violation
	// Exit is how the process ended, where that is the trouble; else nil.
	Exit *sutrav1.Exit
	// RetryAfter is when the same call may well succeed; 0 where nobody knows.
	RetryAfter time.Duration

	// code is kept from a status that came without a reason of the grid's.
	code codes.Code
	// unsent: no attempt got as far as a connection to one who could have done it. The caller's own knowledge; it doesn't travel.
	unsent bool
	// unanswered: it is the transport's word, and not of the one who was called. The caller's own knowledge, too.
	unanswered bool
}

// Violation is one field that can't be right, and why.
type Violation struct {
	Field       string
	Description string
}

// Errorf makes an Error without hint and ids.
func Errorf(reason Reason, format string, args ...any) *Error {
	return &Error{Reason: reason, Message: fmt.Sprintf(format, args...)}
}

// With adds an id; it returns e.
func (e *Error) With(key, value string) *Error {
	if e.Meta == nil {
		e.Meta = map[string]string{}
	}
	e.Meta[key] = value
	return e
}

// WithHint says what to do next; it returns e.
func (e *Error) WithHint(format string, args ...any) *Error {
	e.Hint = fmt.Sprintf(format, args...)
	return e
}

// Error is the message alone: reason and hint are for those who ask.
func (e *Error) Error() string { return e.Message }

// Code is the gRPC code that the reason stands for.
func (e *Error) Code() codes.Code {
	if e.code != codes.OK {
		return e.code
	}
	if c, ok := Codes()[e.Reason]; ok {
		return c
	}
	return codes.Internal
}

// GRPCStatus is how the gRPC server finds out what to send.
func (e *Error) GRPCStatus() *status.Status {
	s := status.New(e.Code(), valid(e.Message))
	meta := map[string]string{}
	for key, value := range e.Meta {
		meta[key] = valid(value)
	}
	if e.Hint != "" {
		meta[hintKey] = valid(e.Hint)
	}
	details := []protoadapt.MessageV1{
		&errdetails.ErrorInfo{Reason: string(e.Reason), Domain: domain, Metadata: meta},
	}
	if len(e.Violations) > 0 {
		bad := &errdetails.BadRequest{}
		for _, v := range e.Violations {
			bad.FieldViolations = append(bad.FieldViolations,
				&errdetails.BadRequest_FieldViolation{Field: v.Field, Description: valid(v.Description)})
		}
		details = append(details, bad)
	}
	if e.RetryAfter > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryAfter)})
	}
	if e.Exit != nil {
		details = append(details, protoadapt.MessageV1Of(e.Exit))
	}
	if full, err := s.WithDetails(details...); err == nil {
		return full
	}
	return s
}

// valid is what protobuf can carry of a text that may quote a file's name or a program's output: for one
// bad byte gRPC would drop the reason and all details.
func valid(text string) string { return strings.ToValidUTF8(text, "\uFFFD") }

// AsError turns what a call returned into an Error; nil stays nil.
func AsError(err error) *Error {
	if err == nil {
		return nil
	}
	var own *Error
	if errors.As(err, &own) {
		return own
	}
	s, ok := status.FromError(err)
	if !ok {
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			return &Error{Reason: TimedOut, Message: err.Error()}
		case errors.Is(err, context.Canceled):
			return &Error{Reason: Canceled, Message: err.Error()}
		}
		return &Error{Reason: Internal, Message: err.Error()}
	}
	e := &Error{Reason: reasonFor(s.Code()), Message: s.Message(), code: s.Code()}
	for _, d := range s.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() != domain {
				continue
			}
			e.Reason, e.Hint = Reason(d.GetReason()), d.GetMetadata()[hintKey]
			delete(d.GetMetadata(), hintKey)
			if len(d.GetMetadata()) > 0 {
				e.Meta = d.GetMetadata()
			}
		case *errdetails.BadRequest:
			for _, v := range d.GetFieldViolations() {
				e.Violations = append(e.Violations, Violation{v.GetField(), v.GetDescription()})
			}
		case *errdetails.RetryInfo:
			e.RetryAfter = d.GetRetryDelay().AsDuration()
		case *sutrav1.Exit:
			e.Exit = d
		}
	}
	return e
}

// ReasonOf is the reason of an error; empty for nil.
func ReasonOf(err error) Reason {
	if e := AsError(err); e != nil {
		return e.Reason
	}
	return ""
}

// answered tells whether a server of the grid itself said this, rather than the
// transport on the way to it.
func answered(err error) bool {
	s, ok := status.FromError(err)
	if !ok {
		return false
	}
	for _, d := range s.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == domain {
			return true
		}
	}
	return false
}

// Unanswered tells whether a call failed without a word of the one who was called.
func Unanswered(err error) bool {
	e := AsError(err)
	return e != nil && e.unanswered
}

// Refused tells whether the called one decided against the call for a reason that lies in the
// call itself or in the state of things: soon after, it would do so again.
func Refused(err error) bool {
	if err == nil {
		return false
	}
	switch AsError(err).Code() {
	case codes.InvalidArgument, codes.NotFound, codes.AlreadyExists, codes.ResourceExhausted, codes.FailedPrecondition,
		codes.Aborted, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented, codes.OutOfRange:
		return true
	default:
		return false
	}
}

// NoEffect tells whether a failed call surely changed nothing: it was refused, or it never left. Of any other
// failure the outcome is unknown: the answer was lost or didn't come in time.
func NoEffect(err error) bool {
	e := AsError(err)
	return Refused(err) || e != nil && (e.unsent || e.Reason == AgentOffline || e.Reason == ShuttingDown)
}
