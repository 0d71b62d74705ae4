package supervisor

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// stranger is a user that isn't this process's and owns nothing, in two groups.
func stranger(t *testing.T) *syscall.Credential {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "only root can run something as another user")
	}
	return &syscall.Credential{Uid: 65533, Gid: 65532, Groups: []uint32{65531, 65532}}
}

// strangersSpec runs a script as another user, whose folder it is.
func strangersSpec(t *testing.T, script string) Spec {
	t.Helper()
	spec := commandSpec(t, "sh", "-c", script)
	spec.Credential, spec.NoNewPrivileges = stranger(t), true
	if err := os.Chown(spec.Dir, 65533, 65532); err != nil {
		t.Fatal(err)
	}
	return spec
}

// statusField is a line of a process's or thread's /proc/PID/status.
func statusField(t *testing.T, pid, name string) string {
	t.Helper()
	status, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.Join(strings.Fields(value), " ")
		}
	}
	t.Fatalf("no %s in\n%s", name, status)
	return ""
}

// A unit of another user is one like any other: it is started, measured, adopted, ended with all that it forked, and how it
// ended is known.
func TestUnitOfAnotherUser(t *testing.T) {
	for _, kind := range []string{"", "1", "v1"} {
		t.Run("groups="+kind, func(t *testing.T) {
			t.Setenv(groupsEnv, kind)
			spec := strangersSpec(t, "(trap '' TERM; setsid sleep 3600 & while :; do sleep 3600; done) & echo said; echo >ready; wait")
			spec.Ready = fileAppears(filepath.Join(spec.Dir, "ready"))
			spec.StopGrace = 0
			score(t) // which has it held at its first instruction
			before := watch(t, spec)
			before.until(ProcessReady)
			pid := strconv.Itoa(before.State().PID)
			for name, want := range map[string]string{
				"Uid": "65533 65533 65533 65533", "Gid": "65532 65532 65532 65532", "Groups": "65531 65532", "NoNewPrivs": "1", "CapEff": "0000000000000000",
			} {
				if got := statusField(t, pid, name); got != want {
					t.Errorf("its %s is %s, want %s", name, got, want)
				}
			}
			if got, err := os.ReadFile("/proc/" + pid + "/oom_score_adj"); string(got) != "0\n" {
				t.Errorf("its score is %q (%v)", got, err)
			}
			await(t, "all four", func() bool { return len(newKin(group{}, &spec).find()) == 4 })
			if use := Measure([]*Unit{before.Unit})[spec.ID]; use.OpenFiles < 3 || use.Memory == 0 {
				t.Errorf("measured %+v", use)
			}
			r := before.recorded()
			before.Release()
			before.awaitDone()

			w := adopt(t, spec, r)
			if got := strconv.Itoa(w.until(ProcessReady).State.PID); got != pid {
				t.Errorf("adopted %s, want %s", got, pid)
			}
			if err := unix.Kill(w.State().PID, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			exit := w.until(ProcessExited).State.LastExit
			if exit.Signal != "SIGKILL" || !strings.Contains(exit.Output, "said") {
				t.Errorf("it ended by %v, saying %q", exit, exit.Output)
			}
			w.until(ProcessReady)
			w.Stop()
			w.end()
		})
	}
}

// What is set-user-id gets no rights where no new ones are to be had. This process's own threads keep theirs.
func TestNoNewPrivileges(t *testing.T) {
	id, err := exec.LookPath("id")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"", "v1"} {
		for _, forbidden := range []bool{false, true} {
			t.Run(fmt.Sprintf("groups=%s/forbidden=%v", kind, forbidden), func(t *testing.T) {
				t.Setenv(groupsEnv, kind)
				spec := strangersSpec(t, "./id -u")
				spec.NoNewPrivileges = forbidden
				copyFile(t, id, filepath.Join(spec.Dir, "id"))
				if err := os.Chmod(filepath.Join(spec.Dir, "id"), 0o755|os.ModeSetuid); err != nil {
					t.Fatal(err)
				}
				var disk unix.Statfs_t
				if err := unix.Statfs(spec.Dir, &disk); err != nil {
					t.Fatal(err)
				}
				if disk.Flags&unix.ST_NOSUID != 0 {
					skip(t, "set-user-id means nothing in %s", spec.Dir)
				}
				want := map[bool]string{false: "0\n", true: "65533\n"}[forbidden]
				for range 20 {
					if exit := runOnce(t, spec); exit.Code != 0 || exit.Output != want {
						t.Fatalf("%v, saying %q; want %q", exit, exit.Output, want)
					}
				}
				threads, err := os.ReadDir("/proc/self/task")
				if err != nil {
					t.Fatal(err)
				}
				await(t, "the threads that gave theirs up to be gone", func() bool {
					return !slices.ContainsFunc(threads, func(thread os.DirEntry) bool {
						status, _ := os.ReadFile("/proc/self/task/" + thread.Name() + "/status") // gone: it has none
						return strings.Contains(string(status), "NoNewPrivs:\t1")
					})
				})
			})
		}
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o700)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

// As has a user's rights on files and makes files of that user, while the rest of this process goes on as it was.
func TestAs(t *testing.T) {
	user := stranger(t)
	dir := t.TempDir()
	shared, secret := filepath.Join(dir, "shared"), filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(shared, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(shared, 0, 65531); err != nil { // one of its further groups
		t.Fatal(err)
	}
	for path, mode := range map[string]os.FileMode{filepath.Dir(dir): 0o711, dir: 0o711, shared: 0o770} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	said := errors.New("said")
	err := As(user, func() error {
		if _, err := os.ReadFile(secret); !errors.Is(err, unix.EACCES) {
			t.Errorf("reading a secret: %v", err)
		}
		if err := As(nil, func() error { return os.WriteFile(filepath.Join(shared, "new"), nil, 0o600) }); err != nil {
			t.Error(err)
		}
		return said
	})
	if !errors.Is(err, said) {
		t.Errorf("error %v, want what f returned", err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(shared, "new"), &st); err != nil || st.Uid != user.Uid || st.Gid != user.Gid {
		t.Errorf("it made a file of %d:%d (%v)", st.Uid, st.Gid, err)
	}
	// All threads that are there to be used, and more, each in one goroutine.
	const many = 64
	var all sync.WaitGroup
	var there sync.WaitGroup
	there.Add(many)
	for range many {
		all.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			there.Done()
			there.Wait()
			if _, err := os.ReadFile(secret); err != nil {
				t.Errorf("this process has lost its rights: %v", err)
			}
		})
	}
	all.Wait()
}

// Who acts for another user, or starts something of his, leaves this process's memory as hidden, or open, as it was.
func TestMemoryStaysAsHiddenAsItWas(t *testing.T) {
	user := stranger(t)
	for _, was := range []int{1, 0} {
		if err := unix.Prctl(unix.PR_SET_DUMPABLE, uintptr(was), 0, 0, 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0) }) // as it took the others
		is := func(after string) {
			t.Helper()
			if got, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || got != was {
				t.Errorf("after %s it is %d, %v; want %d", after, got, err, was)
			}
		}
		err := As(user, func() error { is("it became somebody else"); return nil })
		if err != nil {
			t.Fatal(err)
		}
		is("As")
		pid, err := forkUnblocked("/bin/true", []string{"true"}, &syscall.ProcAttr{Env: []string{}, Sys: &syscall.SysProcAttr{Credential: user}})
		if err != nil {
			t.Fatal(err)
		}
		is("a fork")
		if _, err := unix.Wait4(pid, nil, 0, nil); err != nil {
			t.Error(err)
		}
	}
}
