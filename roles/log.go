package roles

import (
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/rs/zerolog"

	"github.com/sutra-grid/sutra/roles/client"
)

// newLogger logs to stderr: for people on a terminal, a JSON line each elsewhere.
func newLogger(s *client.Streams, level zerolog.Level) zerolog.Logger {
	// A log that nobody reads any more doesn't end a role: the write fails, and the work goes on.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	if !s.ErrTTY {
		return zerolog.New(s.Err).Level(level).With().Timestamp().Logger()
	}
	return zerolog.New(zerolog.ConsoleWriter{
		Out: s.Err, TimeFormat: time.TimeOnly, NoColor: !s.Color,
	}).Level(level).With().Timestamp().Logger()
}
