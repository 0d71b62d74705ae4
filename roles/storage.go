package roles

import (
	"fmt"
	"os"
	"runtime/debug"
	"strconv"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/roles/client"
	"github.com/sutra-grid/sutra/roles/storage"
	"github.com/sutra-grid/sutra/rpc"
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
			if err := refuseOddNode(c, example); err != nil {
				return err
			}
			// Near its limit the collector works harder, before the kernel ends the process.
			if mb, err := strconv.ParseInt(os.Getenv("SUTRA_MEMORY_MB"), 10, 32); err == nil && mb > 0 {
				debug.SetMemoryLimit(mb << 20 / 10 * 8)
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

// refuseOddNode refuses what no agent would run a node with.
func refuseOddNode(c *cli.Context, example string) error {
	port, path := c.Int("port"), c.String("storage-path")
	if why := rpc.CheckPort(port); why != "" {
		return &client.UsageError{
			Message: fmt.Sprintf("--port %d %s", port, why), Hint: fmt.Sprintf("choose one of %d-%d: %s", rpc.MinPort, rpc.MaxPort, example),
		}
	}
	if e := rpc.AsError(rpc.CheckStoragePath(path)); e != nil {
		return &client.UsageError{Message: fmt.Sprintf("--storage-path %q %s", path, e.Violations[0].Description), Hint: example}
	}
	if id := c.String("node-id"); c.IsSet("node-id") {
		if err := config.ValidID("--node-id", id); err != nil {
			return &client.UsageError{Message: err.Error(), Hint: example + " --node-id kv-1"}
		}
	}
	return nil
}
