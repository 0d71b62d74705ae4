package roles

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/roles/agent"
	"github.com/sutra-grid/sutra/roles/client"
	"github.com/sutra-grid/sutra/rpc"
)

func agentCommand(s *client.Streams, version string) *cli.Command {
	return &cli.Command{
		Name:  "agent",
		Usage: "run the agent of this host",
		Description: "Registers with the master that its file names and runs the nodes that the master asks for. The\n" +
			"nodes outlive it: an agent that is stopped, killed or replaced by a new version takes them up again.\n\n" +
			"   sutra agent --print-config > agent.toml\n   sutra agent --config agent.toml\n\n" +
			"To have systemd run it:\n\n" +
			"   sutra agent --print-unit --config agent.toml > /etc/systemd/system/sutra-agent.service\n" +
			"   systemctl daemon-reload && systemctl enable --now sutra-agent\n\n" +
			"Exit codes: 0 stopped by a signal, 1 failed, 2 usage or a file that can't be right, 7 its agent_id is taken.",
		Flags: append(homeFlag(),
			&cli.StringFlag{Name: "config", Usage: "the agent's `FILE`"},
			&cli.StringFlag{
				Name: "join-token", EnvVars: []string{"SUTRA_JOIN_TOKEN"}, FilePath: "",
				Usage: "`TOKEN` to join the grid with, the first time (default: $SUTRA_JOIN_TOKEN, which shows in no list of processes; else the one that a master of this host has left)",
			},
			&cli.StringFlag{Name: "join-token-file", Usage: "`FILE` that has the token; it is read when one is needed"},
			client.InsecureFlag(""),
			&cli.BoolFlag{Name: "stop-nodes", Usage: "take the nodes along when the agent is stopped (default: they run on, and the next start takes them up)"},
			&cli.BoolFlag{Name: "print-config", Usage: "print a commented example of the file and exit"},
			&cli.BoolFlag{Name: "print-unit", Usage: "print a commented systemd unit that runs this agent and exit"},
		),
		Action: func(c *cli.Context) error {
			if err := client.RefuseStray(c, ""); err != nil {
				return err
			}
			if c.Bool("print-config") {
				return writeString(s.Out, config.AgentExample())
			}
			if c.String("config") == "" {
				return &client.UsageError{Message: "sutra agent needs --config FILE", Hint: "an example to begin with: sutra agent --print-config > agent.toml"}
			}
			file, err := config.LoadAgent(c.String("config"))
			if err != nil {
				return &client.UsageError{Message: err.Error()}
			}
			home, err := config.Home(c.String("home"))
			if err != nil {
				return err
			}
			binary, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find the sutra binary: %w", err)
			}
			if c.Bool("print-unit") {
				return printUnit(s, binary, c.String("config"), home, file, c.Bool("stop-nodes"))
			}
			token, tokenFile := c.String("join-token"), c.String("join-token-file")
			if token != "" && tokenFile != "" {
				return &client.UsageError{Message: "--join-token and --join-token-file exclude each other"}
			}
			insecure := client.InsecureOf(c)
			for _, address := range append([]string{file.Advertise, file.MetricsListen}, file.MasterEndpoints...) {
				if err := insecure.Allows(address); address != "" && err != nil {
					return &client.UsageError{Message: err.Error()}
				}
			}
			a, err := agent.New(c.Context, agent.Config{
				JoinToken: token, JoinTokenFile: tokenFile, Insecure: insecure, Home: home, File: file, Binary: binary, StopNodes: c.Bool("stop-nodes"), Version: version, Log: newLogger(s, zerolog.InfoLevel),
				Listen: func() (calls, metrics net.Listener, err error) { return listenAs(file, insecure, c.String("config")) },
			})
			if err != nil {
				return err
			}
			return a.Run(c.Context)
		},
	}
}

// listenAs opens what an agent's file says, the path of which is name.
func listenAs(file *config.Agent, insecure rpc.Insecure, name string) (calls, metrics net.Listener, err error) {
	host := "0.0.0.0"
	if insecure.Allows(host) != nil {
		host = "127.0.0.1"
	}
	calls, err = listen("the agent", fmt.Sprintf("%s:%d", host, file.AgentPort), "agent_port in "+name)
	if err != nil || file.MetricsListen == "" {
		return calls, nil, err
	}
	metrics, err = listen("the agent's HTTP server", file.MetricsListen, "metrics_listen in "+name)
	if err != nil {
		_ = calls.Close() // nobody was let in
		return nil, nil, err
	}
	return calls, metrics, nil
}

// printUnit prints the unit of an agent whose file, at path, is known to be right.
func printUnit(s *client.Streams, binary, path, home string, file *config.Agent, stopNodes bool) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return fmt.Errorf("find the agent's file: %w", err)
	}
	var grace time.Duration
	for _, profile := range file.Profiles {
		grace = max(grace, profile.StopGrace)
	}
	return writeString(s.Out, agent.Unit(binary, path, home, os.Getuid(), stopNodes, grace))
}
