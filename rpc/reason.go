package rpc

import "google.golang.org/grpc/codes"

// Reason is the machine's half of an error: what kind of trouble it is. It
// travels as ErrorInfo.reason and decides the gRPC code.
type Reason string

// The reasons, by the code they map to.
const (
	InvalidArgument Reason = "INVALID_ARGUMENT"

	AgentNotRegistered Reason = "AGENT_NOT_REGISTERED"
	NodeNotFound       Reason = "NODE_NOT_FOUND"
	TokenNotFound      Reason = "TOKEN_NOT_FOUND"

	MasterUnreachable Reason = "MASTER_UNREACHABLE"
	AgentUnreachable  Reason = "AGENT_UNREACHABLE"
	AgentOffline      Reason = "AGENT_OFFLINE"
	NoAgentAvailable  Reason = "NO_AGENT_AVAILABLE"
	ShuttingDown      Reason = "SHUTTING_DOWN"

	TimedOut     Reason = "TIMED_OUT"
	NotReadyYet  Reason = "NOT_READY_YET"
	StillRunning Reason = "STILL_RUNNING"

	PortInUse    Reason = "PORT_IN_USE"
	PathInUse    Reason = "PATH_IN_USE"
	AgentIDTaken Reason = "AGENT_ID_TAKEN"
	NameTaken    Reason = "NAME_TAKEN"

	AgentFull           Reason = "AGENT_FULL"
	NoFreePort          Reason = "NO_FREE_PORT"
	MemoryOverCommitted Reason = "MEMORY_OVER_COMMITTED"
	DiskFull            Reason = "DISK_FULL"
	MessageTooLarge     Reason = "MESSAGE_TOO_LARGE"
	TooManyRequests     Reason = "TOO_MANY_REQUESTS"

	NodeStillLive    Reason = "NODE_STILL_LIVE"
	NodeEnded        Reason = "NODE_ENDED"
	BinaryUnusable   Reason = "BINARY_UNUSABLE"
	PathUnusable     Reason = "PATH_UNUSABLE"
	WrongAgent       Reason = "WRONG_AGENT"
	EpochSuperseded  Reason = "EPOCH_SUPERSEDED"
	RotationUnderWay Reason = "ROTATION_UNDER_WAY"
	NoRotation       Reason = "NO_ROTATION"
	AgentsLeft       Reason = "AGENTS_LEFT"
	InTheClear       Reason = "IN_THE_CLEAR"
	NodeDiedEarly    Reason = "NODE_DIED_EARLY"
	StoppedMeanwhile Reason = "STOPPED_MEANWHILE"

	Unauthenticated Reason = "UNAUTHENTICATED"
	// CertificateExpired is that of a stream which has come to the end of the certificate that it was begun with: with a
	// renewed one it may go on.
	CertificateExpired Reason = "CERTIFICATE_EXPIRED"

	UntrustedPeer    Reason = "UNTRUSTED_PEER"
	TokenRefused     Reason = "TOKEN_REFUSED"
	Banned           Reason = "BANNED"
	PermissionDenied Reason = "PERMISSION_DENIED"

	Canceled      Reason = "CANCELED"
	Unimplemented Reason = "UNIMPLEMENTED"
	Internal      Reason = "INTERNAL"
)

// Codes is the whole table of reasons and the gRPC code of each.
func Codes() map[Reason]codes.Code {
	return map[Reason]codes.Code{
		InvalidArgument:     codes.InvalidArgument,
		AgentNotRegistered:  codes.NotFound,
		NodeNotFound:        codes.NotFound,
		TokenNotFound:       codes.NotFound,
		MasterUnreachable:   codes.Unavailable,
		AgentUnreachable:    codes.Unavailable,
		AgentOffline:        codes.Unavailable,
		NoAgentAvailable:    codes.Unavailable,
		ShuttingDown:        codes.Unavailable,
		TimedOut:            codes.DeadlineExceeded,
		NotReadyYet:         codes.DeadlineExceeded,
		StillRunning:        codes.DeadlineExceeded,
		PortInUse:           codes.AlreadyExists,
		PathInUse:           codes.AlreadyExists,
		AgentIDTaken:        codes.AlreadyExists,
		NameTaken:           codes.AlreadyExists,
		AgentFull:           codes.ResourceExhausted,
		NoFreePort:          codes.ResourceExhausted,
		MemoryOverCommitted: codes.ResourceExhausted,
		DiskFull:            codes.ResourceExhausted,
		MessageTooLarge:     codes.ResourceExhausted,
		TooManyRequests:     codes.ResourceExhausted,
		NodeStillLive:       codes.FailedPrecondition,
		NodeEnded:           codes.FailedPrecondition,
		BinaryUnusable:      codes.FailedPrecondition,
		PathUnusable:        codes.FailedPrecondition,
		WrongAgent:          codes.FailedPrecondition,
		EpochSuperseded:     codes.FailedPrecondition,
		RotationUnderWay:    codes.FailedPrecondition,
		NoRotation:          codes.FailedPrecondition,
		AgentsLeft:          codes.FailedPrecondition,
		InTheClear:          codes.FailedPrecondition,
		NodeDiedEarly:       codes.Aborted,
		StoppedMeanwhile:    codes.Aborted,
		Unauthenticated:     codes.Unauthenticated,
		CertificateExpired:  codes.Unauthenticated,
		UntrustedPeer:       codes.Unauthenticated,
		TokenRefused:        codes.Unauthenticated,
		Banned:              codes.PermissionDenied,
		PermissionDenied:    codes.PermissionDenied,
		Canceled:            codes.Canceled,
		Unimplemented:       codes.Unimplemented,
		Internal:            codes.Internal,
	}
}

// reasonFor is the reason of a bare status, one that names none itself: it comes
// from gRPC or from another server.
func reasonFor(code codes.Code) Reason {
	switch code {
	case codes.InvalidArgument:
		return InvalidArgument
	case codes.DeadlineExceeded:
		return TimedOut
	case codes.Canceled:
		return Canceled
	case codes.Unimplemented:
		return Unimplemented
	default:
		return Internal
	}
}
