// Package supervisor runs processes and keeps them running: it starts each in a
// session of its own with its log file as stdout and stderr, waits until it is
// ready, restarts it by its policy at growing intervals, a few at a time, or when it
// is asked to, and stops it with everything that it forked. Processes outlive their
// supervisor: the next one takes them up by what is in the journal. It knows nothing
// of nodes, networks or disks beyond the log file, says what happens through events
// and never logs.
//
// It needs Linux 5.4 (pidfd).
package supervisor
