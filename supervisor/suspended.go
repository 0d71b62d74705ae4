package supervisor

// Suspended tells whether a process was stopped by a signal and not continued: it holds its port, for which the kernel
// accepts, and doesn't work. One that stands still for a debugger isn't.
func Suspended(pid int) bool {
	st, err := readStat(pid)
	return err == nil && st.stopped
}
