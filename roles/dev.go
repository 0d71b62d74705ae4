package roles

import (
	"fmt"
	"os"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"github.com/sutra-grid/sutra/roles/client"
	"github.com/sutra-grid/sutra/roles/dev"
)

func devCommand(s *client.Streams, version string) *cli.Command {
	return &cli.Command{
		Name:  "dev",
		Usage: "run a whole grid in this process: a master, an agent and one node",
		Description: "For a laptop and a first look. Takes the usual ports where they are free and others where not,\n" +
			"prints what runs where, and on Ctrl-C stops all of it.\n\n" +
			"   sutra dev\n   sutra dev --home ./grid\n\n" +
			"Exit codes: 0 stopped by a signal, 1 failed, 2 usage.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "home", Usage: "keep everything in this `FOLDER`, and find it there again (default: a temporary one)"},
		},
		Action: func(c *cli.Context) error {
			if err := client.RefuseStray(c, ""); err != nil {
				return err
			}
			binary, err := os.Executable()
			if err != nil {
				return fmt.Errorf("find the sutra binary: %w", err)
			}
			return unlessInterrupted(c.Context, dev.Run(c.Context, dev.Config{
				Home: c.String("home"), Binary: binary, Call: s.Call, UsualMaster: client.UsualMaster, Version: version, Out: s.Out,
				Log: newLogger(s, zerolog.WarnLevel),
			}))
		},
	}
}
