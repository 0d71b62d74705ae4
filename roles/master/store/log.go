package store

import (
	"bytes"
	"io"

	"github.com/rs/zerolog"
	"go.uber.org/zap/zapcore"
)

// logCore hands etcd's log, from warnings up, to the master's.
type logCore struct {
	enc zapcore.Encoder
	log zerolog.Logger
}

// newEncoder leaves out what zerolog writes anyway: time, level and message.
func newEncoder() zapcore.Encoder {
	return zapcore.NewJSONEncoder(zapcore.EncoderConfig{
		NameKey:        "logger",
		EncodeName:     zapcore.FullNameEncoder,
		EncodeTime:     zapcore.RFC3339NanoTimeEncoder,
		EncodeDuration: zapcore.StringDurationEncoder,
	})
}

func (c *logCore) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

func (c *logCore) With(fields []zapcore.Field) zapcore.Core {
	enc := c.enc.Clone()
	for _, f := range fields {
		f.AddTo(enc)
	}
	return &logCore{enc: enc, log: c.log}
}

func (c *logCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !c.Enabled(e.Level) || ofNoConcern(e) {
		return ce
	}
	return ce.AddCore(e, c)
}

// ofNoConcern picks out what a sound start of a lone member says.
func ofNoConcern(e zapcore.Entry) bool {
	if e.Level != zapcore.WarnLevel {
		return e.Message == "failed to update storage version"
	}
	switch e.Message {
	// About listeners and users, of which there are none.
	case "Running http and grpc server on single port. This is not recommended for production.",
		"simple token is not cryptographically signed",
		// About a downgrade of etcd, for which the first snapshot leaves a note.
		"Failed to detect schema version",
		"Failed to detect storage schema version. Please wait till wal snapshot before upgrading cluster.":
		return true
	}
	// About elections that need a second try, a tick later.
	return e.LoggerName == "raft"
}

func (c *logCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	line, err := c.enc.EncodeEntry(e, fields)
	if err != nil {
		return err
	}
	defer line.Free()
	level := zerolog.WarnLevel
	if e.Level >= zapcore.ErrorLevel {
		level = zerolog.ErrorLevel
	}
	c.log.WithLevel(level).RawJSON("etcd", bytes.TrimSpace(line.Bytes())).Msg("etcd: " + e.Message)
	return nil
}

func (c *logCore) Sync() error { return nil }

// zapDiscard takes zap's complaints about its own core, which would go to stderr.
type zapDiscard struct{ io.Writer }

func (zapDiscard) Sync() error { return nil }
