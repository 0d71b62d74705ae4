package config

import _ "embed"

//go:embed agent.example.toml
var agentExample string

// AgentExample is a commented agent.toml that loads as it is: every key with its default.
func AgentExample() string { return agentExample }
