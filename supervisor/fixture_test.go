package supervisor

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// fixtureEnv makes this test binary a server that behaves as its value says.
const fixtureEnv = "SUTRA_FIXTURE"

// raceEnv keeps a fixture under the race detector from sleeping a second at its exit.
const raceEnv = "GORACE=atexit_sleep_ms=0"

func TestMain(m *testing.M) {
	if mode := os.Getenv(fixtureEnv); mode != "" {
		if err := fixture(mode, os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, "fixture:", err)
			os.Exit(99)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// fixture is a server that misbehaves. Those that go on for ever create the file args[0]
// once they are what they are; a second process of the fixture is told of by its pid there.
func fixture(mode string, args []string) error {
	switch mode {
	case "serve":
	case "ignore-term":
		signal.Ignore(unix.SIGTERM)
	case "slow-term": // finishes its work after the signal, and leaves a mark of that
		term := make(chan os.Signal, 1)
		signal.Notify(term, unix.SIGTERM)
		if err := touch(args[0], ""); err != nil {
			return err
		}
		<-term
		time.Sleep(200 * time.Millisecond)
		return touch(args[0]+".finished", "")
	case "with-child": // args[1] is the child's mode
		child := again(args[1], args[0]+".child")
		if err := child.Start(); err != nil {
			return err
		}
		if err := awaitFile(args[0] + ".child"); err != nil {
			return err
		}
		if err := touch(args[0], strconv.Itoa(child.Process.Pid)); err != nil {
			return err
		}
		time.Sleep(time.Hour)
	case "exit-at-term", "end-at-term":
		term := make(chan os.Signal, 1)
		signal.Notify(term, unix.SIGTERM)
		if err := touch(args[0], ""); err != nil {
			return err
		}
		<-term
		syscall.Exit(map[string]int{"exit-at-term": 3}[mode])
	case "thread-at-term": // its first thread ended long ago, and otherwise than the process
		go endFirstThread()
		for {
			status, err := os.ReadFile("/proc/self/status")
			if err != nil {
				return err
			}
			if strings.Contains(string(status), "State:\tZ") {
				break
			}
			time.Sleep(time.Millisecond)
		}
		term := make(chan os.Signal, 1)
		signal.Notify(term, unix.SIGTERM)
		if err := touch(args[0], ""); err != nil {
			return err
		}
		<-term
		syscall.Exit(5)
	case "witness":
		return witness(args)
	case "escape": // args[1] is the mode of a grandchild that leads a session of its own, and whose parent is gone
		if err := again("escape-twice", args...).Run(); err != nil {
			return err
		}
		if err := awaitFile(args[0] + ".child"); err != nil {
			return err
		}
		pid, err := os.ReadFile(args[0] + ".pid")
		if err != nil {
			return err
		}
		if err := touch(args[0], string(pid)); err != nil {
			return err
		}
		time.Sleep(time.Hour)
	case "escape-twice":
		child := again(args[1], args[0]+".child")
		child.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := child.Start(); err != nil {
			return err
		}
		return touch(args[0]+".pid", strconv.Itoa(child.Process.Pid))
	case "groups": // tells the control groups that it was born into
		own, err := os.ReadFile("/proc/self/cgroup")
		if err != nil {
			return err
		}
		fmt.Fprintf(os.Stdout, "%s", own)
	case "allocate": // args[1]: how many MiB, once the file args[0].go is there
		if err := touch(args[0], ""); err != nil {
			return err
		}
		if err := awaitFile(args[0] + ".go"); err != nil {
			return err
		}
		mib, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		if _, err := unix.Mmap(-1, 0, mib<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE|unix.MAP_POPULATE); err != nil {
			return err
		}
		if err := touch(args[0]+".done", ""); err != nil {
			return err
		}
		time.Sleep(time.Hour)
	case "allocate-in-child": // ends with 7 when its child does, in whatever way
		_ = again("allocate", args...).Run()
		syscall.Exit(7)
	case "outlive": // has a child that allocates, and goes on when it is gone
		_ = again("allocate", args...).Run()
		args = []string{args[0] + ".done"}
	case "count": // writes lines that tell who wrote them and how many before
		if err := touch(args[0], ""); err != nil {
			return err
		}
		for i := 0; ; i++ {
			fmt.Fprintf(os.Stdout, "%d %d\n", os.Getpid(), i)
			time.Sleep(time.Millisecond)
		}
	case "flood":
		if err := touch(args[0], ""); err != nil {
			return err
		}
		return flood()
	case "keep":
		return keep(args)
	case "supervise":
		return supervise(args)
	case "stop-self":
		if err := unix.Kill(os.Getpid(), unix.SIGSTOP); err != nil {
			return err
		}
	case "exit": // args: the code and what to write to stdout and to stderr
		fmt.Fprint(os.Stdout, args[1])
		fmt.Fprint(os.Stderr, args[2])
		code, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		syscall.Exit(code) // unlike os.Exit, it adds nothing to the output of a build for coverage
	case "print": // args: how many lines
		lines, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		fmt.Fprint(os.Stdout, numbered(lines))
		syscall.Exit(3)
	case "die": // args: the signal's number
		sig, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		if err := unix.Kill(os.Getpid(), unix.Signal(sig)); err != nil {
			return err
		}
	default:
		return fmt.Errorf("unknown mode %q", mode)
	}
	if err := touch(args[0], ""); err != nil {
		return err
	}
	time.Sleep(time.Hour)
	return nil
}

// endFirstThread ends the thread by which the kernel shows this process. Sooner or later the runtime gives a goroutine
// that thread, where those that have others keep them.
func endFirstThread() {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		_, _, _ = unix.Syscall(unix.SYS_EXIT, 1, 0, 0)
	}
	go endFirstThread()
	select {}
}

// witness tells, as user args[1], what it knows of how process args[0] ended, at once and later.
func witness(args []string) error {
	pid, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	uid, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	if uid != os.Getuid() {
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(uid), syscall.Setuid(uid)); err != nil {
			return err
		}
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	p := &process{identity: Identity{PID: pid}, pidfd: os.NewFile(uintptr(fd), "pidfd")}
	status, known := p.status()
	fmt.Fprintln(os.Stdout, int(status), known)
	status, known = p.statusLater()
	fmt.Fprintln(os.Stdout, int(status), known)
	return nil
}

// again is this fixture once more, with its environment and another mode.
func again(mode string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), fixtureEnv+"="+mode, raceEnv)
	return cmd
}

func awaitFile(path string) error {
	for deadline := time.Now().Add(patience); !exists(path); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("still waiting for %s", path)
		}
	}
	return nil
}

// touch makes the file appear whole.
func touch(path, content string) error {
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// numbered is a text no two parts of which are the same.
func numbered(lines int) string {
	var b strings.Builder
	for i := range lines {
		fmt.Fprintf(&b, "line %d\n", i)
	}
	return b.String()
}

// floodLine is the length of each line of a flood.
const floodLine = 64

// flood writes numbered lines as fast as it can.
func flood() error {
	var buf []byte
	for line := int64(0); ; {
		buf = buf[:0]
		for range 1000 {
			buf = fmt.Appendf(buf, "%0*d\n", floodLine-1, line)
			line++
		}
		if _, err := os.Stdout.Write(buf); err != nil {
			return err
		}
	}
}
