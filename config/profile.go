package config

import (
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
)

// DefaultProfile names the profile that the [storage] table itself describes.
const DefaultProfile = "default"

// Profile is a way to run a storage server. Profiles inherit nothing from each other.
type Profile struct {
	Name string
	// StorageBinary is an absolute path; "" is the server built into sutra. That it exists and can be
	// executed is checked at each spawn, since it may be installed later.
	StorageBinary string
	// Args are the arguments after the binary, one each, never nil; {port}, {storage_path}, {node_id} and
	// {memory_mb} stand for the node's. Default: --port, --storage-path and --node-id with theirs.
	Args []string
	// Ready says when a started node counts as ready. Default: its port accepts.
	Ready Ready
	// ReadyTimeout is how long a started process may take until it is ready before it is ended as one that hangs; whole seconds,
	// at most a day. 0: as long as it takes. Default 1 h: what ends a start that hangs also ends one that is only slow.
	ReadyTimeout time.Duration
	// StopSignal asks a node to end: TERM, INT, QUIT, HUP, USR1, USR2 or KILL. Default TERM.
	StopSignal string
	// StopGrace is how long a node has to follow StopSignal before it is killed; whole seconds, 0 to 1 h. Default 8 s.
	StopGrace time.Duration
	// Restart says when a process that ended by itself is started again: always, on-failure or never. Default always.
	Restart string
	// SuccessExitCodes are the exit codes, 0-255, that are no failure. Default 0 alone.
	SuccessExitCodes []int
	// CPUWeight is a node's share of the processors where not all get what they want, 1 to 10000 beside everything else's 100.
	// Default 100.
	CPUWeight int
	// OpenFiles is how many files each process of a node may have open, at most 1073741824. Default 0: as many as the agent's own.
	OpenFiles int
	// RunAs is whom a node's processes run as. Default nil: as the agent.
	RunAs *Account
	// NoNewPrivileges keeps a node's processes from getting rights that they weren't started with. Default true: hardly a storage
	// server needs a set-user-id program, and what takes one over is glad of any.
	NoNewPrivileges bool
}

// Ready is a readiness probe.
type Ready struct {
	// Kind is "tcp", "http", "grpc", "exec" or "none".
	Kind string
	// Arg is the path of an http probe, which starts with "/", or the command of an exec probe; "" for the others.
	Arg string
}

// DefaultStopGrace is the StopGrace of a profile that says none.
const DefaultStopGrace = 8 * time.Second

func placeholders() []string { return []string{"{port}", "{storage_path}", "{node_id}", "{memory_mb}"} }

func stopSignals() []string {
	return []string{"TERM", "INT", "QUIT", "HUP", "USR1", "USR2", "KILL"}
}

func restarts() []string { return []string{"always", "on-failure", "never"} }

func readProfile(t *table, name, dir string) Profile {
	return Profile{
		Name:          name,
		StorageBinary: text(t, "storage_binary", "", func(path string) (string, error) { return binary(dir, path) }),
		Args:          readArgs(t),
		Ready:         text(t, "ready", Ready{Kind: "tcp"}, ready),
		ReadyTimeout:  time.Duration(t.whole("ready_timeout_secs", 3600, 0, 86400)) * time.Second,
		StopSignal:    text(t, "stop_signal", "TERM", stopSignal),
		StopGrace:     t.seconds("stop_grace_secs", int64(DefaultStopGrace/time.Second), 0),
		Restart:       text(t, "restart", "always", restart),
		CPUWeight:     int(t.whole("cpu_weight", 100, 1, 10000)),
		OpenFiles:     int(t.whole("open_files", 0, 0, 1<<30)),
		RunAs:         text(t, "run_as", nil, account),

		NoNewPrivileges:  t.truth("no_new_privileges", true),
		SuccessExitCodes: t.wholes("success_exit_codes", []int{0}, 0, 255),
	}
}

func binary(dir, path string) (string, error) {
	if path == "" {
		return "", nil
	}
	if strings.ContainsRune(path, 0) {
		return "", fmt.Errorf("%.80q has a zero byte; write a path", path)
	}
	if filepath.IsAbs(path) {
		return filepath.Clean(path), nil
	}
	absolute, err := filepath.Abs(filepath.Join(dir, path))
	if err != nil {
		return "", fmt.Errorf("%.80q cannot be made absolute (%w); write an absolute path", path, err)
	}
	return absolute, nil
}

func readArgs(t *table) []string {
	const key = "args"
	list, ok := read[[]any](t, key, "a list of strings")
	if !ok {
		return []string{"--port", "{port}", "--storage-path", "{storage_path}", "--node-id", "{node_id}"}
	}
	args := t.strings(key, list)
	// Anything else in braces, such as JSON, is the server's own business.
	word := regexp.MustCompile(`\{[\w-]+\}`)
	for _, arg := range args {
		if strings.ContainsRune(arg, 0) {
			t.problem(key, "%.80q has a zero byte, which no argument can hold", arg)
		}
		for _, found := range word.FindAllString(arg, -1) {
			if !slices.Contains(placeholders(), found) {
				t.problem(key, "unknown placeholder %.80s; allowed: %s", found, strings.Join(placeholders(), " "))
			}
		}
	}
	return args
}

func ready(s string) (Ready, error) {
	kind, arg, hasArg := strings.Cut(s, ":")
	switch {
	case (kind == "tcp" || kind == "grpc" || kind == "none") && !hasArg:
		return Ready{Kind: kind}, nil
	case kind == "http" && hasArg:
		_, err := url.ParseRequestURI(arg)
		if err != nil || !strings.HasPrefix(arg, "/") || strings.ContainsFunc(arg, unicode.IsSpace) {
			return Ready{}, fmt.Errorf("%.80q needs a path; write it as http:/path, for example http:/healthz", s)
		}
		return Ready{Kind: kind, Arg: arg}, nil
	case kind == "exec" && hasArg:
		arg = strings.TrimSpace(arg)
		if arg == "" || strings.ContainsRune(arg, 0) {
			return Ready{}, errors.New("exec needs a command; write it as exec:CMD, for example exec:/usr/bin/redis-cli ping")
		}
		return Ready{Kind: kind, Arg: arg}, nil
	}
	return Ready{}, fmt.Errorf("unknown probe %.80q; allowed: tcp, http:/path, grpc, exec:CMD, none", s)
}

func restart(s string) (string, error) {
	if !slices.Contains(restarts(), s) {
		return "", fmt.Errorf("unknown policy %.80q; allowed: %s", s, strings.Join(restarts(), ", "))
	}
	return s, nil
}

func stopSignal(s string) (string, error) {
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if !slices.Contains(stopSignals(), name) {
		return "", fmt.Errorf("unknown signal %.80q; allowed: %s", s, strings.Join(stopSignals(), ", "))
	}
	return name, nil
}
