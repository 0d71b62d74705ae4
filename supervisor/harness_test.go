package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// patience is after how long a test that waits has failed.
const patience = 30 * time.Second

// never is a pause or grace that no test sits out.
const never = time.Hour

// quick restarts at once, and never calls it a crash loop.
func quick() Restart {
	return Restart{First: time.Millisecond, Max: 4 * time.Millisecond, Threshold: 1 << 30, Window: never}
}

// fixtureSpec runs the fixture in a folder of its own: ready once the file it has for that is there.
func fixtureSpec(t *testing.T, mode string, args ...string) (spec Spec, readyFile string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	readyFile = filepath.Join(dir, "ready")
	if len(args) == 0 {
		args = []string{readyFile}
	}
	return Spec{
		ID: "unit", Path: self, Args: args,
		Env: []string{fixtureEnv + "=" + mode, raceEnv, markOf(dir)}, Mark: markOf(dir), Cgroups: wantedGroups(t, dir),
		Dir: dir, LogPath: filepath.Join(dir, "log"), StopGrace: never, Restart: quick(),
		Ready: fileAppears(readyFile),
	}, readyFile
}

// fileAppears is a readiness.
func fileAppears(path string) func(context.Context) error {
	return func(ctx context.Context) error {
		for !exists(path) {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(time.Millisecond):
			}
		}
		return nil
	}
}

// markOf is the mark of the unit that has a folder to itself.
func markOf(dir string) string { return "SUTRA_TEST_UNIT=" + dir }

// groupsEnv makes the specs of a test have control groups: as the host has them or, where it is "v1", without the
// unified hierarchy.
const groupsEnv = "SUTRA_TEST_CGROUPS"

// wantedGroups are those of a unit with a folder to itself, where the test wants them. They are gone at its end.
func wantedGroups(t *testing.T, dir string) Cgroups {
	t.Helper()
	if os.Getenv(groupsEnv) == "" {
		return Cgroups{}
	}
	c, why := OpenCgroups(groupsName(dir))
	if os.Getenv(groupsEnv) == "v1" {
		if err := c.Remove(); err != nil {
			t.Fatal(err)
		}
		mounts, own := hidden(t)
		c, why = openCgroups(mounts, own, groupsName(dir))
	}
	if !group(c).exists() {
		skip(t, "no control group can be made here: %s", why)
	}
	t.Cleanup(func() {
		if err := c.Remove(); err != nil {
			t.Errorf("the unit's control group is left: %v", err)
		}
	})
	return c
}

func groupsName(dir string) string { return "sutra-test" + strings.ReplaceAll(dir, "/", "-") }

// memory is a journal that lasts as long as a test. The zero memory is empty.
type memory struct {
	mu    sync.Mutex // guards what follows
	saves []Record
	fail  func(n int) error // decides about the nth save, from 1; nil: all succeed
}

var _ Journal = (*memory)(nil)

func (m *memory) Save(_ string, r Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.saves = append(m.saves, r)
	if m.fail != nil {
		return m.fail(len(m.saves))
	}
	return nil
}

// all returns the records of all saves.
func (m *memory) all() []Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.saves)
}

func (m *memory) last() Record {
	all := m.all()
	return all[len(all)-1]
}

func newSupervisor(t *testing.T, j Journal, notify func(Event)) *Supervisor {
	t.Helper()
	s, err := New(j, notify)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// commandSpec runs a command that every machine has. It is ready as soon as it is started.
func commandSpec(t *testing.T, name string, args ...string) Spec {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	return Spec{
		ID: "unit", Path: path, Args: args, Env: []string{markOf(dir)}, Dir: dir, LogPath: filepath.Join(dir, "log"),
		StopGrace: never, Mark: markOf(dir), Cgroups: wantedGroups(t, dir), Restart: quick(),
	}
}

// watched is a unit whose events a test reads one by one.
type watched struct {
	*Unit
	t       *testing.T
	journal *memory
	events  chan Event
	seen    []Event
}

// watch starts a unit that is stopped, and found to have left nothing, at the test's end.
// Each of notify is called by the unit as events happen.
func watch(t *testing.T, spec Spec, notify ...func(Event)) *watched {
	t.Helper()
	return watchFrom(t, spec, &memory{}, func(s *Supervisor) (*Unit, error) { return s.Start(spec) }, notify...)
}

// adopt is as watch, for a unit that is taken up by its record.
func adopt(t *testing.T, spec Spec, r Record, notify ...func(Event)) *watched {
	t.Helper()
	j := &memory{saves: []Record{r}}
	return watchFrom(t, spec, j, func(s *Supervisor) (*Unit, error) { return s.Adopt(spec, r, false) }, notify...)
}

func watchFrom(t *testing.T, spec Spec, j *memory, begin func(*Supervisor) (*Unit, error), notify ...func(Event)) *watched {
	t.Helper()
	w := &watched{t: t, journal: j, events: make(chan Event, 4096)}
	var pid atomic.Int64
	u, err := begin(newSupervisor(t, j, func(e Event) {
		if e.State.PID != 0 {
			pid.Store(int64(e.State.PID))
		} else if last := int(pid.Load()); last != 0 && !groupGone(last) {
			t.Errorf("%v: group %d isn't gone", e.Kind, last)
		}
		for _, f := range notify {
			f(e)
		}
		w.events <- e
	}))
	if err != nil {
		t.Fatal(err)
	}
	w.Unit = u
	t.Cleanup(func() {
		u.Stop()
		w.awaitDone()
		if pids := newKin(group{}, &spec).find(); len(pids) != 0 {
			t.Errorf("processes are left: %v", pids)
		}
		noChildren(t)
		goleak.VerifyNone(t)
	})
	return w
}

func (w *watched) next() Event {
	w.t.Helper()
	select {
	case e := <-w.events:
		w.seen = append(w.seen, e)
		return e
	case <-time.After(patience):
		w.t.Fatalf("no further event; so far:\n%s", strings.Join(w.sequence(), "\n"))
		return Event{}
	}
}

// until reads up to the next event of a kind.
func (w *watched) until(kind Kind) Event {
	w.t.Helper()
	for {
		if e := w.next(); e.Kind == kind {
			return e
		}
	}
}

func (w *watched) awaitDone() {
	w.t.Helper()
	awaitClosed(w.t, "the unit's end", w.Done())
}

// end awaits the unit's end and returns its last event, after which there is no other.
func (w *watched) end() Event {
	w.t.Helper()
	last := w.until(UnitEnded)
	w.awaitDone()
	awaitClosed(w.t, "settled", w.Settled())
	if len(w.events) > 0 {
		w.t.Errorf("an event after the last: %v", <-w.events)
	}
	if last.State.PID != 0 || !last.State.NextStart.IsZero() {
		w.t.Errorf("ended with a process or with one to come: %+v", last.State)
	}
	if diff := cmp.Diff(last.State, w.State(), cmpopts.EquateErrors()); diff != "" {
		w.t.Errorf("the state isn't that of the last event:\n%s", diff)
	}
	return last
}

// recorded waits until the process that runs now is on record, which follows its start, and returns that record.
func (w *watched) recorded() Record {
	w.t.Helper()
	pid := w.State().PID
	await(w.t, "the process to be on record", func() bool { return w.journal.last().Identity.PID == pid })
	return w.journal.last()
}

// sequence is what happened so far, and what the unit was then doing.
func (w *watched) sequence() []string {
	var lines []string
	for _, e := range w.seen {
		lines = append(lines, fmt.Sprintf("%v: %v", e.Kind, e.State.Phase))
	}
	return lines
}

func (w *watched) expect(want ...string) {
	w.t.Helper()
	if diff := cmp.Diff(want, w.sequence()); diff != "" {
		w.t.Errorf("events (-want +got):\n%s", diff)
	}
}

// kill ends the process that runs now as a crash would.
func (w *watched) kill() {
	w.t.Helper()
	if err := unix.Kill(w.State().PID, unix.SIGKILL); err != nil {
		w.t.Fatal(err)
	}
}

func await(t *testing.T, what string, met func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !met(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still waiting for %s", what)
		}
	}
}

func awaitClosed(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatalf("still waiting for %s", what)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// groupGone tells whether a group is no more, but for zombies: orphans are the first process's to reap, when it sees fit.
func groupGone(pid int) bool { return errors.Is(unix.Kill(-pid, 0), unix.ESRCH) || !groupLives(pid) }

// groupLives tells whether a process group has more than zombies.
func groupLives(pgrp int) bool { return len((*census)(nil).find("", "", pgrp).groups[pgrp]) > 0 }

// gone tells whether a process is no more, in the same way.
func gone(pid int) bool {
	st, err := readStat(pid)
	return err != nil || st.zombie
}

// noChildren finds children of this test that run or were never reaped.
func noChildren(t *testing.T) {
	t.Helper()
	var info unix.Siginfo
	err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	if !errors.Is(err, unix.ECHILD) {
		t.Errorf("a child process is left (%v)", err)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
