// Package rpc is how the roles of a grid talk: one way to serve, one way to call,
// one pool of connections, one retry/timeout middleware and one form of error.
package rpc
