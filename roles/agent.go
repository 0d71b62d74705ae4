package roles

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/roles/agent"
	"github.com/sutra-grid/sutra/roles/client"
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
				return printUnit(s, binary, c.String("config"), home)
			}
			cfg := agent.Config{Home: home, File: file, Binary: binary, StopNodes: c.Bool("stop-nodes"), Version: version, Log: newLogger(s, zerolog.InfoLevel)}
			at := fmt.Sprintf("0.0.0.0:%d", file.AgentPort)
			if cfg.Listener, err = listen("the agent", at, "agent_port in "+c.String("config")); err != nil {
				return err
			}
			defer cfg.Listener.Close()
			if file.MetricsListen != "" {
				if cfg.Metrics, err = listen("the agent's HTTP server", file.MetricsListen, "metrics_listen in "+c.String("config")); err != nil {
					return err
				}
				defer cfg.Metrics.Close()
			}
			a, err := agent.New(c.Context, cfg)
			if err != nil {
				return err
			}
			return a.Run(c.Context)
		},
	}
}

// printUnit prints the unit of an agent whose file is known to be right.
func printUnit(s *client.Streams, binary, file, home string) error {
	file, err := filepath.Abs(file)
	if err != nil {
		return fmt.Errorf("find the agent's file: %w", err)
	}
	return writeString(s.Out, agent.Unit(binary, file, home, os.Getuid()))
}
