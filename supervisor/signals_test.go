package supervisor

import (
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Whatever signals its supervisor was started deaf to, a process hears all of them.
func TestProcessHearsAllSignals(t *testing.T) {
	for _, groups := range []string{"", "1", "v1"} {
		t.Run(fmt.Sprintf("groups=%q", groups), func(t *testing.T) {
			t.Setenv(groupsEnv, groups)
			p := plan{
				Dir: t.TempDir(), Mode: "serve", Groups: groups != "", V1: groups == "v1", DieAt: 3, Written: true, BackOff: quick(), Deaf: true,
			}
			spec, err := p.spec(wantedGroups(t, p.Dir))
			if err != nil {
				t.Fatal(err)
			}
			r, over := carryOut(t, p)
			for line := range strings.Lines(procFile(t, r.Identity.PID, "status")) {
				name, mask, _ := strings.Cut(strings.TrimSpace(line), ":")
				if (name == "SigIgn" || name == "SigBlk") && strings.Trim(mask, "0\t") != "" {
					t.Errorf("the process has %s", line)
				}
			}
			w := adopt(t, spec, *r)
			w.until(ProcessReady)
			w.Stop()
			if exit := w.end().State.LastExit; exit.Signal != "SIGTERM" {
				t.Errorf("exit %v", exit)
			}
			over()
		})
	}
}

// What a supervisor ignores doesn't end it once it is caught.
func TestSupervisorIsAsDeafAsBefore(t *testing.T) {
	signal.Ignore(unix.SIGHUP, unix.SIGTTOU)
	defer signal.Reset(unix.SIGHUP, unix.SIGTTOU)
	newSupervisor(t, &memory{}, func(Event) {})
	if got := ignored(procFile(t, os.Getpid(), "status")); !slices.Equal(got, []unix.Signal{unix.SIGTTOU}) {
		t.Errorf("%v are ignored", got)
	}
	if err := unix.Kill(os.Getpid(), unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
}
