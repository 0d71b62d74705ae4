// Package health judges whether an agent is alive and whether a node is ready:
// a state machine over heartbeats that reads no clock, and probes that leave
// nothing open between checks. It never logs.
package health
