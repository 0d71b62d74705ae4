// Package client holds the verbs with which people and scripts ask a grid's master:
// one file a verb, a table for people and a JSON document for programs.
package client
