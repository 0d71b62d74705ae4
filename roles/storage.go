package roles

import (
	"fmt"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"github.com/sutra-grid/sutra/roles/client"
	"github.com/sutra-grid/sutra/roles/storage"
)

func storageCommand(s *client.Streams) *cli.Command {
	return &cli.Command{
		Name:  "storage",
		Usage: "run the built-in storage server, a small durable key-value store over HTTP",
		Description: "Agents start it for nodes whose profile names no storage_binary; by hand it is for trying out.\n\n" +
			"   sutra storage --port 50051 --storage-path /tmp/kv\n" +
			"   curl -T file localhost:50051/kv/KEY; curl localhost:50051/kv/KEY; curl 'localhost:50051/kv?prefix=K&limit=10'\n\n" +
			"A PUT that was answered is on disk. Exit codes: 0 stopped by a signal, 1 failed, 2 usage, 7 port or path taken.",
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "port", Usage: "TCP `PORT`, on all addresses", DefaultText: "none: it must be given"},
			&cli.StringFlag{Name: "storage-path", Usage: "`FOLDER` of the data"},
			&cli.StringFlag{Name: "node-id", Usage: "what /healthz says it is"},
		},
		Action: func(c *cli.Context) error {
			if err := client.RefuseStray(c, ""); err != nil {
				return err
			}
			const example = "sutra storage --port 50051 --storage-path /tmp/kv"
			if !c.IsSet("port") || !c.IsSet("storage-path") {
				return &client.UsageError{Message: "sutra storage needs --port and --storage-path", Hint: example}
			}
			if port := c.Int("port"); port < 1 || port > 65535 {
				return &client.UsageError{Message: fmt.Sprintf("--port %d is no port that a server could be reached at", port), Hint: "choose one of 1-65535: " + example}
			}
			l, err := listen("the storage server", fmt.Sprintf(":%d", c.Int("port")), "--port PORT")
			if err != nil {
				return err
			}
			defer l.Close()
			srv, err := storage.New(storage.Config{
				Listener: l, Path: c.String("storage-path"), NodeID: c.String("node-id"), Log: newLogger(s, zerolog.InfoLevel),
			})
			if err != nil {
				return err
			}
			return srv.Run(c.Context)
		},
	}
}
