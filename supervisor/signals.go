package supervisor

import (
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// catchIgnored has this process catch the signals that it ignores, SIGHUP under nohup for example, and do nothing about them as
// before: what is caught is a program's own again once it is executed, and what is ignored stays so.
func catchIgnored() {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return
	}
	for _, sig := range ignored(string(status)) {
		// To catch these would have a background job try to use its terminal for ever. Units have no terminal.
		if !slices.Contains([]unix.Signal{unix.SIGTTIN, unix.SIGTTOU}, sig) {
			signal.Notify(make(chan os.Signal, 1), sig) // nobody listens
		}
	}
}

// ignored are the signals that a process ignores, as its /proc/PID/status says.
func ignored(status string) (sigs []unix.Signal) {
	for line := range strings.Lines(status) {
		if mask, ok := strings.CutPrefix(line, "SigIgn:"); ok {
			bits, _ := strconv.ParseUint(strings.TrimSpace(mask), 16, 64) // none where it makes no sense
			for i := range 64 {
				if bits&(1<<i) != 0 {
					sigs = append(sigs, unix.Signal(i+1))
				}
			}
		}
	}
	return sigs
}

// forkUnblocked is syscall.ForkExec for a program that no signal is blocked for, though this process may have been started so.
func forkUnblocked(path string, argv []string, attr *syscall.ProcAttr) (pid int, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var none, before unix.Sigset_t
	if unix.PthreadSigmask(unix.SIG_SETMASK, &none, &before) == nil {
		defer func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil) }() // what succeeded once does again
	}
	if attr.Sys.Credential != nil {
		defer stayHidden()()
	}
	return syscall.ForkExec(path, argv, attr)
}
