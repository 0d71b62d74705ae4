package supervisor

import (
	"bytes"
	"debug/elf"
	encoding "encoding/binary"
	"errors"
	"fmt"
	"os"
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

// slowdown keeps this process from doing anything soon after a fork, so that what the child does first comes before it,
// until relax is called.
func slowdown(t *testing.T) (relax func()) {
	t.Helper()
	procs := runtime.GOMAXPROCS(1)
	over := make(chan struct{})
	var busy sync.WaitGroup
	for range 2 {
		busy.Go(func() {
			for n := 0; !closed(over); n++ {
				runtime.KeepAlive(n)
			}
		})
	}
	relax = sync.OnceFunc(func() {
		close(over)
		busy.Wait()
		runtime.GOMAXPROCS(procs)
	})
	t.Cleanup(relax)
	return relax
}

// Everything that a process forks is in all of its groups, and nothing of this process is.
func TestDescendantsAreBornIntoTheGroups(t *testing.T) {
	for _, kind := range []string{"1", "v1"} {
		t.Run(kind, func(t *testing.T) {
			t.Setenv(groupsEnv, kind)
			const script = "(sleep 3600 & setsid sleep 3600 & wait) & sleep 3600 & echo >ready; wait"
			spec := commandSpec(t, "sh", "-c", script)
			spec.Limits.CPUWeight = 200
			relax := slowdown(t)
			w := watch(t, spec)
			relax()
			leader := w.until(ProcessReady).State.PID
			all := newKin(group{}, &spec)
			await(t, "all five", func() bool { return len(all.find()) == 5 })
			want := slices.Sorted(slices.Values(all.find()))
			for _, dir := range spec.Cgroups.of(spec.ID).dirs() {
				if got := slices.Sorted(slices.Values(pidsIn(dir))); !slices.Equal(got, want) || !slices.Contains(got, leader) {
					t.Errorf("%s has %v, want %v", dir, got, want)
				}
			}
			for _, dir := range group(spec.Cgroups).dirs() {
				if got := pidsIn(dir); len(got) > 0 {
					t.Errorf("%s has %v, want nobody", dir, got)
				}
			}
		})
	}
}

// A thread that can't go home ends: nothing else is to run in a unit's groups.
func TestStrandedThreadEnds(t *testing.T) {
	t.Setenv(groupsEnv, "v1")
	dir := group(wantedGroups(t, t.TempDir())).old()[0]
	var tid int
	note := func() error { tid = unix.Gettid(); return nil }
	if err := visit([]string{dir}, []string{filepath.Join(dir, "missing")}, false, note); err != nil {
		t.Fatal(err)
	}
	await(t, "the thread's end", func() bool { return !exists(fmt.Sprintf("/proc/self/task/%d", tid)) })
	if err := visit([]string{dir, filepath.Join(dir, "missing")}, []string{filepath.Dir(dir), ""}, false, note); !errors.Is(err, unix.ENOENT) {
		t.Errorf("error %v, want that there is no such group", err)
	}
	if got := pidsIn(dir); len(got) > 0 {
		t.Errorf("%v are left in the group", got)
	}
}

// score gives this process a score of its own for a test's time.
func score(t *testing.T) {
	t.Helper()
	was := strconv.Itoa(ownScore())
	const file = "/proc/self/oom_score_adj"
	if err := write(file, "300"); err != nil { // everybody may raise it
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := write(file, was); err != nil {
			t.Error(err)
		}
	})
}

// What a child inherits isn't the agent's own score, and its files are as limited as asked for.
func TestLimitsOfAProcess(t *testing.T) {
	spec := commandSpec(t, "sh", "-c", "echo $(ulimit -Sn) $(ulimit -Hn) $(cat /proc/$$/oom_score_adj)")
	score(t)
	var own unix.Rlimit
	if err := unix.Prlimit(0, unix.RLIMIT_NOFILE, nil, &own); err != nil {
		t.Fatal(err)
	}
	for files, hard := range map[uint64]uint64{0: own.Max, 123: 123} {
		spec.Limits.OpenFiles = files
		exit := runOnce(t, spec)
		said := strings.Fields(exit.Output)
		if exit.Code != 0 || len(said) != 3 || said[1] != strconv.FormatUint(hard, 10) || said[2] != "0" || files > 0 && said[0] != said[1] {
			t.Errorf("with a limit of %d files: %v %q", files, exit, exit.Output)
		}
	}
}

// runOnce starts a process that ends by itself, without a unit.
func runOnce(t *testing.T, spec Spec) *Exit {
	t.Helper()
	p, err := start(&spec, "")
	if err != nil {
		t.Fatal(err)
	}
	awaitClosed(t, "its end", p.exited)
	exit := p.reap(func() bool { return killed(p) })
	noChildren(t)
	return exit
}

// The limit on files holds before the program's first instruction: those of this one ask for it and write the answer, long
// before anybody could set it who only began then.
func TestLimitsHoldFromTheFirstInstruction(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		skip(t, "the program is one for amd64")
	}
	code := []byte{
		0x48, 0x83, 0xec, 16, // sub rsp, 16
		0xb8, unix.SYS_GETRLIMIT, 0, 0, 0, // mov eax, SYS_GETRLIMIT
		0xbf, unix.RLIMIT_NOFILE, 0, 0, 0, // mov edi, RLIMIT_NOFILE
		0x48, 0x89, 0xe6, // mov rsi, rsp
		0x0f, 0x05, // syscall
		0xb8, unix.SYS_WRITE, 0, 0, 0, // mov eax, SYS_WRITE
		0xbf, 1, 0, 0, 0, // mov edi, 1
		0x48, 0x89, 0xe6, // mov rsi, rsp
		0xba, 16, 0, 0, 0, // mov edx, 16
		0x0f, 0x05, // syscall
		0xb8, unix.SYS_EXIT, 0, 0, 0, // mov eax, SYS_EXIT
		0x31, 0xff, // xor edi, edi
		0x0f, 0x05, // syscall
	}
	const base, headers = 0x400000, 64 + 56
	size := uint64(headers + len(code))
	var binary bytes.Buffer
	for _, part := range []any{
		elf.Header64{
			Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
			Type:  uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
			Entry: base + headers, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1,
		},
		elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: base, Paddr: base, Filesz: size, Memsz: size, Align: 4096},
		code,
	} {
		if err := encoding.Write(&binary, encoding.LittleEndian, part); err != nil {
			t.Fatal(err)
		}
	}
	spec := commandSpec(t, "true")
	spec.Path = filepath.Join(spec.Dir, "program")
	if err := os.WriteFile(spec.Path, binary.Bytes(), 0o700); err != nil {
		t.Fatal(err)
	}
	spec.Limits.OpenFiles = 123
	want := strings.Repeat("\x7b"+strings.Repeat("\x00", 7), 2)
	for range 20 {
		if exit := runOnce(t, spec); exit.Code != 0 || exit.Output != want {
			t.Fatalf("%v, saying %q", exit, exit.Output)
		}
	}
}

// A limit that can't be set fails the start, and the program has done nothing. As a start may be tried again and again, nothing
// of it stays open.
func TestLimitThatCannotBeSet(t *testing.T) {
	spec := commandSpec(t, "touch", "ran")
	spec.Limits.OpenFiles = 1 << 31 // more than the kernel lets anybody have
	s := newSupervisor(t, &memory{}, func(Event) {})
	before := 0
	for try := range 5 {
		if _, err := s.Start(spec); !errors.Is(err, ErrLimit) || !errors.Is(err, unix.EPERM) {
			t.Errorf("error %v, want %v", err, ErrLimit)
		}
		if try == 0 { // the first one may have opened what the runtime keeps
			before = descriptors(t)
		}
	}
	if after := descriptors(t); after != before {
		t.Errorf("%d descriptors are open, and were %d", after, before)
	}
	if exists(filepath.Join(spec.Dir, "ran")) {
		t.Error("the program ran")
	}
	noChildren(t)
}

// A child that was killed before it could be held is like any other that ends early.
func TestHeldChildIsKilled(t *testing.T) {
	err := visit(nil, nil, false, func() error {
		pid, err := syscall.ForkExec("/bin/sleep", []string{"sleep", "3600"}, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{Ptrace: true}})
		if err != nil {
			return err
		}
		defer func() { _, _ = unix.Wait4(pid, nil, 0, nil) }()
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			return err
		}
		await(t, "its end", func() bool { return gone(pid) })
		if trapped(pid) {
			t.Error("it is taken for alive")
		}
		if !exists(fmt.Sprintf("/proc/%d", pid)) {
			t.Error("it was reaped: its exit is lost")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
