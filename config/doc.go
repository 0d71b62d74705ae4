// Package config reads what operators write: the agent's TOML file, endpoints, ids
// and the home folder. It is strict: what it returns is valid, and what it refuses it
// explains, every problem of a file at once.
package config
