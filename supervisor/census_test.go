package supervisor

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"testing"
)

// waiting tells how many marks are asked for in the look that is to come.
func (c *census) waiting() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.next == nil {
		return 0
	}
	return len(c.next.marks)
}

// Who asks while a look is under way gets the next one, together, and in it what came after the question.
func TestLooksAreShared(t *testing.T) {
	const askers = 10
	c := newCensus()
	c.looking <- struct{}{} // a look is under way
	looks := make([]*look, askers)
	var asking sync.WaitGroup
	for i := range looks {
		asking.Go(func() { looks[i] = c.find("SUTRA_TEST_ASKER="+strconv.Itoa(i), "", 0) })
	}
	await(t, "all to ask", func() bool { return c.waiting() == askers })
	late := exec.Command("sleep", "3600")
	late.Env = []string{"SUTRA_TEST_ASKER=7"}
	if err := late.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = late.Process.Kill()
		_ = late.Wait() // killed
	})
	await(t, "the environment", func() bool { return marked(late.Process.Pid, "SUTRA_TEST_ASKER=7") })
	<-c.looking
	asking.Wait()
	for i, l := range looks {
		if l != looks[0] {
			t.Error("two looks were made")
		}
		if got := len(l.marks["SUTRA_TEST_ASKER="+strconv.Itoa(i)]); got != btoi(i == 7) {
			t.Errorf("asker %d: found %d", i, got)
		}
	}
	if again := c.find("SUTRA_TEST_ASKER=7", "", 0); again == looks[0] || !slices.Equal(again.marks["SUTRA_TEST_ASKER=7"], []int{late.Process.Pid}) {
		t.Errorf("asked later: %+v", again)
	}
}

// A process is found by each of the things that are asked for, and by nothing that it has beside them.
func TestLookFindsWhatIsAskedFor(t *testing.T) {
	dir := t.TempDir()
	log, _, err := openLog(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command("sleep", "3600")
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = []string{"A=1", "B=2", "B=2"}, log, log, &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // killed
	})
	pid := cmd.Process.Pid
	await(t, "the environment", func() bool { return marked(pid, "B=2") })
	want := []int{pid}
	none := newCensus()
	if l := none.find("B=2", "", 0); !slices.Contains(l.marks["B=2"], pid) || len(l.marks)+len(l.logs)+len(l.groups) != 1 {
		t.Errorf("by the mark: %+v", l)
	}
	if l := none.find("", log.Name(), 0); !slices.Equal(l.logs[log.Name()], want) || len(l.marks)+len(l.groups) != 0 {
		t.Errorf("by the log: %+v", l)
	}
	if l := none.find("", "", pid); !slices.Equal(l.groups[pid], want) || len(l.marks)+len(l.logs) != 0 {
		t.Errorf("by the process group: %+v", l)
	}
	if l := none.find("B=", "/elsewhere", pid+1<<22); len(l.marks["B="])+len(l.logs["/elsewhere"])+len(l.groups[pid+1<<22]) != 0 {
		t.Errorf("by what it hasn't: %+v", l)
	}
}

// Units without control groups that stop at once look together.
func TestUnitsThatStopAtOnceLookTogether(t *testing.T) {
	const count = 5
	s := newSupervisor(t, &memory{}, func(Event) {})
	units := make([]*Unit, count)
	for i := range units {
		spec := commandSpec(t, "sleep", "3600")
		var err error
		if units[i], err = s.Start(spec); err != nil {
			t.Fatal(err)
		}
	}
	s.census.looking <- struct{}{}
	for _, u := range units {
		u.Stop()
	}
	await(t, "all to ask", func() bool { return s.census.waiting() == count })
	for _, u := range units {
		if closed(u.Done()) {
			t.Error("a unit ended without a look at what it left")
		}
	}
	<-s.census.looking
	for _, u := range units {
		awaitClosed(t, "the unit's end", u.Done())
	}
	noChildren(t)
}
