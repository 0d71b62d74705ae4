package supervisor

import (
	"fmt"
	"os"
	"strings"
	"time"
)

// killPatience is how long what was killed may take to be gone. Within it all are, but what the kernel holds: in the wait for a
// disk or a network file system that doesn't answer, or in a group that somebody has frozen.
const killPatience = 5 * time.Second

// remains are what is left of a unit's process: a process with what it forked, or kin whose leader is gone.
type remains interface {
	left() bool
	kill()
	find() []int
}

// The pauses between looks at what is left: at first, at most, and once there is no hope that it is gone soon.
const (
	firstLook = 200 * time.Microsecond
	rareLook  = 20 * time.Millisecond
	lateLook  = time.Second
)

// emptied waits until nothing is left of a process whose leader has ended. What hasn't got the stop signal with the leader's group
// is sent it, has until grace to end, and is killed then, which is told where it is still to be. It returns false where the
// unit was let go before.
func (u *Unit) emptied(p *process, grace time.Time, tell bool, release <-chan struct{}) bool {
	if time.Now().Before(grace) {
		p.kin.signal(u.spec.stopSignal(), p.identity.PID)
	}
	for pause := firstLook; p.left(); pause = min(2*pause, rareLook) {
		if !time.Now().Before(grace) {
			if tell {
				u.emit(StopEscalated)
			}
			return u.outlast(p)
		}
		select {
		case <-release:
			if !closed(u.stop) {
				return false
			}
			release = nil // the stop comes first
		case <-time.After(pause):
		}
	}
	return true
}

// outlast kills until nothing is left, because only then port and files are free, and what forks while it is looked for is
// found the next time. What can't be killed is told of and waited for; from then on the unit may be let go, and false
// is returned.
func (u *Unit) outlast(r remains) bool {
	hopeless := time.Now().Add(u.s.patience)
	release := make(<-chan struct{}) // never, until there is no hope
	told := false
	for pause := firstLook; r.left(); {
		r.kill()
		if !told && time.Now().After(hopeless) {
			told, release, pause = true, u.release, lateLook
			u.unkillable(r)
		}
		select {
		case <-release:
			return false
		case <-time.After(pause):
		}
		if !told {
			pause = min(2*pause, rareLook)
		}
	}
	if told {
		u.set(func(s *State) { s.Unkillable = "" })
	}
	return true
}

// unkillable tells of what outlives SIGKILL.
func (u *Unit) unkillable(r remains) {
	who := describe(r.find())
	u.update(KillFailed, func(s *State) {
		s.Unkillable = who
		if s.Phase == Running {
			s.Phase = Restarting // it ended, and only its leftovers are in the way
		}
	})
}

// describe names processes, for people: the first of them, what it does, and how many others there are.
func describe(pids []int) string {
	if len(pids) == 0 {
		return "a process that can't be seen"
	}
	first := fmt.Sprintf("process %d", pids[0])
	if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pids[0])); err == nil {
		fields := map[string]string{}
		for line := range strings.Lines(string(status)) {
			name, value, _ := strings.Cut(line, ":")
			fields[name] = strings.TrimSpace(value)
		}
		first += fmt.Sprintf(", %s, in state %s", fields["Name"], fields["State"])
	}
	if others := len(pids) - 1; others > 0 {
		first += fmt.Sprintf(", and %d more", others)
	}
	return first
}
