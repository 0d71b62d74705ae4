package supervisor

import (
	"context"
	"fmt"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Spec is how one process is run, again and again.
type Spec struct {
	// ID names the unit, in events and as the name of its control group: it is a plain file name.
	ID string
	// Path of the binary, absolute.
	Path string
	// Args without the binary's own name.
	Args []string
	// Env is the whole environment: nothing is inherited.
	Env []string
	// Dir is the working directory, absolute. No part of the path may be a symbolic link when a process is started.
	Dir string
	// LogPath is the file that the process's stdout and stderr are appended to. It is a file and
	// not a pipe, so that the process neither blocks nor dies with its supervisor.
	LogPath string
	// Ready blocks until the process serves, and returns an error, which says what kept it, only when ctx ended first. It is
	// called once for each process, by each supervisor. nil: ready as soon as it is started.
	Ready func(ctx context.Context) error
	// ReadyTimeout is how long each process may take until it serves, counted anew by each supervisor. One that takes longer
	// hangs: it is ended, and that is a crash. 0: as long as it takes.
	ReadyTimeout time.Duration
	// StopSignal asks the process to end; it goes to its whole group. 0: SIGTERM.
	StopSignal unix.Signal
	// StopGrace is how long the group may take after StopSignal before it is killed.
	StopGrace time.Duration
	// Mark is an entry of Env, NAME=VALUE, that no other unit on the host has. What bears it descends from this one.
	Mark string
	// Cgroups is where the unit gets a control group of its own; the zero Cgroups gives none.
	Cgroups Cgroups
	// Limits are what the unit's processes may use.
	Limits Limits
	// Credential is whom the unit's processes run as, which takes the right to become that; their log is opened before, as this
	// process. nil: as this process.
	Credential *syscall.Credential
	// NoNewPrivileges keeps the unit's processes for ever from getting rights that their parent hasn't, by executing programs that
	// are set-user-id, set-group-id or have capabilities: prctl(2), PR_SET_NO_NEW_PRIVS.
	NoNewPrivileges bool
	// Restart says when a crashed process is started again.
	Restart Restart
}

func (s *Spec) validate() error {
	for name, path := range map[string]string{"Path": s.Path, "Dir": s.Dir, "LogPath": s.LogPath} {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("spec of %s: %s %q isn't absolute", s.ID, name, path)
		}
	}
	if s.ID != filepath.Base(s.ID) || s.ID == "." || s.ID == ".." { // it names files and control groups
		return fmt.Errorf("spec of %q: its ID isn't a plain name", s.ID)
	}
	if s.StopGrace < 0 {
		return fmt.Errorf("spec of %s: StopGrace %v is negative", s.ID, s.StopGrace)
	}
	if s.ReadyTimeout < 0 {
		return fmt.Errorf("spec of %s: ReadyTimeout %v is negative", s.ID, s.ReadyTimeout)
	}
	if w := s.Limits.CPUWeight; w < 0 || w > 10000 {
		return fmt.Errorf("spec of %s: CPUWeight %d isn't from 1 to 10000", s.ID, w)
	}
	return s.Restart.validate()
}

// readiness bounds the wait for one process to serve.
func (s *Spec) readiness() (context.Context, context.CancelFunc) {
	if s.ReadyTimeout == 0 {
		return context.WithCancel(context.Background())
	}
	return context.WithTimeoutCause(context.Background(), s.ReadyTimeout, fmt.Errorf("not ready within %v", s.ReadyTimeout))
}

// stopSignal is the signal that a stop begins with.
func (s *Spec) stopSignal() unix.Signal {
	if s.StopSignal == 0 {
		return unix.SIGTERM
	}
	return s.StopSignal
}
