package supervisor

import (
	"strconv"
	"testing"
)

// What ends by itself and isn't restarted by its policy is completed; the next supervisor leaves it so.
func TestPolicyCompletesAUnit(t *testing.T) {
	for name, test := range map[string]struct {
		policy  Policy
		code    int
		phase   Phase
		restart bool
	}{
		"always, success":     {Always, 0, 0, true},
		"always, failure":     {Always, 3, 0, true},
		"on failure, success": {OnFailure, 0, Stopped, false},
		"on failure, excused": {OnFailure, 7, Stopped, false},
		"on failure, failure": {OnFailure, 3, 0, true},
		"never, success":      {Never, 0, Stopped, false},
		"never, failure":      {Never, 3, Failed, false},
	} {
		t.Run(name, func(t *testing.T) {
			spec := commandSpec(t, "sh", "-c", "exit "+strconv.Itoa(test.code))
			spec.Restart.Policy, spec.Restart.Success = test.policy, []int{0, 7}
			w := watch(t, spec)
			if test.restart {
				w.until(ProcessExited)
				w.until(ProcessReady)
				w.expect(
					"process started: starting", "process ready: running", "process exited: starting", "process started: starting", "process ready: running",
				)
				if w.State().Completed {
					t.Error("it is completed and runs")
				}
				return
			}
			end := w.end().State
			last := "unit ended: " + test.phase.String()
			w.expect("process started: starting", "process ready: running", last)
			if !end.Completed || end.Phase != test.phase || end.LastExit.Code != test.code {
				t.Errorf("ended %+v", end)
			}
			r := w.journal.last()
			again := adopt(t, spec, r)
			taken := again.end().State
			again.expect("process adopted: "+test.phase.String(), last)
			if !taken.Completed || taken.LastExit != r.LastExit || taken.Restarts != 0 {
				t.Errorf("taken up %+v", taken)
			}
			if n := len(again.journal.all()); n != 1 {
				t.Errorf("%d records were written", n-1)
			}
			if got := outcome(t, again.Restart(0)); got.State.Phase != test.phase || got.Early != nil {
				t.Errorf("restarted: %+v", got)
			}
		})
	}
}

// What ended while nobody watched isn't taken for a success, and the policy decides.
func TestPolicyOfAnExitThatNobodySaw(t *testing.T) {
	for policy, want := range map[Policy][]string{
		OnFailure: {"process adopted: starting", "process exited: starting", "process started: starting", "process ready: running"},
		Never:     {"process adopted: starting", "unit ended: failed"},
	} {
		t.Run(policy.String(), func(t *testing.T) {
			spec := commandSpec(t, "sleep", "3600")
			spec.Restart.Policy = policy
			w := adopt(t, spec, ranBefore(t, spec))
			if policy == Never {
				if end := w.end().State; !end.Completed || !end.LastExit.Unknown {
					t.Errorf("ended %+v", end)
				}
			} else {
				w.until(ProcessReady)
			}
			w.expect(want...)
		})
	}
}

// A host's boot is no end of a process's own: whatever the policy, what was wanted runs again.
func TestPolicyLetsABootStartAnew(t *testing.T) {
	spec := commandSpec(t, "sleep", "3600")
	spec.Restart.Policy = Never
	r := ranBefore(t, spec)
	r.Identity.BootID = "another"
	w := adopt(t, spec, r)
	w.until(ProcessReady)
	w.expect("process adopted: starting", "process started: starting", "process ready: running")
}

// A process that ends before it was ever ready has failed, and isn't completed: its spawn says so.
func TestPolicyDoesNotExcuseAnEarlyEnd(t *testing.T) {
	spec, _ := gatedSpec(t)
	spec.Args = []string{"0"}
	spec.Restart.Policy = OnFailure
	if end := watch(t, spec).end().State; end.Phase != Failed || end.Completed || end.LastExit.Code != 0 {
		t.Errorf("ended %+v", end)
	}
}
