package roles

import (
	"fmt"
	"time"

	"github.com/rs/zerolog"
	"github.com/urfave/cli/v2"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/health"
	"github.com/sutra-grid/sutra/roles/client"
	"github.com/sutra-grid/sutra/roles/master"
)

func masterCommand(s *client.Streams, version string) *cli.Command {
	defaults := health.DefaultThresholds()
	return &cli.Command{
		Name:  "master",
		Usage: "run the master of a grid",
		Description: "Keeps its state under HOME/master and needs nothing else. Agents and clients call it on --listen.\n\n" +
			"   sutra master\n   sutra master --listen 10.0.0.10:7000 --http off\n\n" +
			"Exit codes: 0 stopped by a signal, 1 failed, 2 usage, 7 the address or the home is taken.",
		Flags: append(homeFlag(),
			&cli.StringFlag{Name: "listen", Usage: "gRPC `ADDRESS`; port 0 takes any free one", Value: "0.0.0.0:7000"},
			&cli.StringFlag{Name: "http", Usage: "`ADDRESS` of /metrics (over TLS, for people of the grid) and /healthz, or off", Value: "127.0.0.1:7080"},
			client.InsecureFlag(""),
			&cli.DurationFlag{Name: "certificate-life", Usage: "`TIME` that the grid's certificates last, and are renewed in", Value: 24 * time.Hour},
			&cli.DurationFlag{Name: "degraded-after", Usage: "silence after which an agent is DEGRADED", Value: defaults.Degraded},
			&cli.DurationFlag{Name: "offline-after", Usage: "silence after which an agent is OFFLINE", Value: defaults.Offline},
		),
		Action: func(c *cli.Context) error {
			if err := client.RefuseStray(c, ""); err != nil {
				return err
			}
			home, err := config.Home(c.String("home"))
			if err != nil {
				return err
			}
			cfg := master.Config{
				Home: home, Version: version, Insecure: client.InsecureOf(c), CertificateLife: c.Duration("certificate-life"), Log: newLogger(s, zerolog.InfoLevel),
				Thresholds: health.Thresholds{Degraded: c.Duration("degraded-after"), Offline: c.Duration("offline-after")},
			}
			if err := cfg.Thresholds.Validate(); err != nil {
				return &client.UsageError{Message: err.Error()}
			}
			if cfg.CertificateLife < time.Second || cfg.CertificateLife > master.MaxCertificateLife {
				return &client.UsageError{Message: fmt.Sprintf("--certificate-life %s isn't between 1s and %s", cfg.CertificateLife, master.MaxCertificateLife)}
			}
			if err := cfg.Insecure.Allows(c.String("listen")); err != nil {
				return &client.UsageError{Message: err.Error(), Hint: "sutra master --insecure --listen 127.0.0.1:7000"}
			}
			if err := cfg.Insecure.Allows(c.String("http")); err != nil && c.String("http") != "off" {
				return &client.UsageError{Message: err.Error(), Hint: "sutra master --insecure --http 127.0.0.1:7080|off"}
			}
			if cfg.Listener, err = listen("the master", c.String("listen"), "sutra master --listen HOST:PORT"); err != nil {
				return err
			}
			defer cfg.Listener.Close()
			if at := c.String("http"); at != "off" {
				if cfg.HTTP, err = listen("the master's HTTP server", at, "sutra master --http HOST:PORT|off"); err != nil {
					return err
				}
				defer cfg.HTTP.Close()
			}
			m, err := master.New(c.Context, cfg)
			if err != nil {
				return unlessInterrupted(c.Context, err)
			}
			return m.Run(c.Context)
		},
	}
}
