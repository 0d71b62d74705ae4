package rpc

import (
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// maxPath is a little less than Linux's PATH_MAX, so that a server finds room for its own files.
const maxPath = 3800

// CheckStoragePath tells what is wrong with a storage path that isn't empty, before anything is looked at on disk.
func CheckStoragePath(path string) error {
	var why string
	switch {
	case !filepath.IsAbs(path):
		why = "must be absolute, for example /var/lib/storage"
	case slices.Contains(strings.Split(path, "/"), ".."):
		why = `must not contain ".."`
	case !utf8.ValidString(path):
		why = "must be valid UTF-8"
	case strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f }):
		why = "must not contain control characters"
	case filepath.Clean(path) == "/":
		why = "must not be the root folder"
	case len(path) > maxPath:
		why = "is too long"
	default:
		return nil
	}
	return Invalid(Violation{"storage_path", why}).With("storage_path", path)
}

const (
	// MinPort is the first port that a node may have: those before are privileged.
	MinPort = 1024
	// MaxPort is the last one.
	MaxPort = 65535
)

// CheckPort says what is wrong with a node's port; empty where nothing is.
func CheckPort(port int) (why string) {
	switch {
	case port == 0:
		return "is no port that a node could be reached at"
	case port < 0 || port > MaxPort:
		return "is out of range"
	case port < MinPort:
		return "is privileged: only root may listen there"
	}
	return ""
}

// Invalid is the error of a request with fields that can't be right.
func Invalid(violations ...Violation) *Error {
	said := make([]string, len(violations))
	for i, v := range violations {
		said[i] = v.Field + " " + v.Description
	}
	return &Error{Reason: InvalidArgument, Message: strings.Join(said, "; "), Violations: violations}
}

// Exited is the error of a node whose process ended before it was ready.
func Exited(n *sutrav1.Node) *Error {
	exit, profile := n.GetLastExit(), n.GetProfile()
	e := Errorf(NodeDiedEarly, "node %s on %s started and died before it was ready: %s", n.GetNodeId(), n.GetAgentId(), exit.Summary()).
		With("node_id", n.GetNodeId())
	e.Exit = exit
	switch {
	case exit.GetOomKilled():
		return e.WithHint("its limit was %d MiB: spawn it with more --memory, or have the server use less ({memory_mb} in args of profile %s in the agent's file)",
			n.GetMemoryLimitMb(), profile)
	case exit.GetCause() != "":
		return e.WithHint("it didn't end by itself; ready and ready_timeout_secs of profile %s in the agent's file say what is asked of it, and for how long", profile)
	case exit.GetCode() == 0 && exit.GetSignal() == "" && !exit.GetUnknown():
		return e.WithHint("a server must stay in the foreground, and not become a daemon: its args stand under profile %s in the agent's file", profile)
	default:
		return e.WithHint("its last output says why, where it wrote any; how it is run stands under profile %s in the agent's file", profile)
	}
}

// Ended is the error of a restart where nothing is left to restart, or soon will be.
func Ended(n *sutrav1.Node) *Error {
	what := "has ended (" + n.GetPhase().Word() + ")"
	if !n.Ended() {
		what = "is being stopped"
	}
	e := Errorf(NodeEnded, "node %s on %s %s, and isn't started again", n.GetNodeId(), n.GetAgentId(), what).With("node_id", n.GetNodeId())
	path := n.GetStoragePath()
	if strings.HasSuffix(path, string(filepath.Separator)+filepath.Join("agents", n.GetAgentId(), "data", n.GetNodeId())) {
		// It was given one of its own in the agent's home, where no other node may have its path.
		return e.WithHint("its data stays in %s of its host; a new node takes up a copy: sutra spawn --agent %s --profile %s --storage-path COPY",
			path, n.GetAgentId(), n.GetProfile())
	}
	return e.WithHint("a new node takes up its data: sutra spawn --agent %s --profile %s --storage-path %s", n.GetAgentId(), n.GetProfile(), path)
}
