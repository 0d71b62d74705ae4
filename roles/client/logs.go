package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode/utf8"

	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

func (c *client) logsCommand() *cli.Command {
	return &cli.Command{
		Name:      "logs",
		Usage:     "print what a node wrote to stdout and stderr",
		UsageText: "sutra logs --node NODE [--follow] [--tail LINES] [--since WHEN]",
		Description: `Prints what is kept of a node's log, wherever the node is, also when it has ended or was removed. It goes
on until the node is stopped or removed with --follow, across restarts of the node, its agent and the
master. With -o json each piece of the log is one line: {"position":...,"data":"..."}, where position counts
the log's bytes up to the end of data; bytes that aren't text are in data_base64 instead.

Examples:
  sutra logs --node NODE --tail 100
  sutra logs --node NODE --follow --since 10m
  sutra logs --node NODE --since 2026-03-01T12:00:00Z

Exit codes: 0 all is printed, or following was interrupted; 1 failed; 2 bad flags; 3 no such node, or
nothing is kept of its log; 4 master or agent unavailable; 5 master or agent didn't answer in time; 6 not allowed`,
		Flags: []cli.Flag{
			nodeFlag(),
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on with what is written from then on"},
			&cli.UintFlag{Name: "tail", DefaultText: "all", Usage: "at most so many of the last `LINES`"},
			&cli.StringFlag{Name: "since", Usage: "leave out what is surely older: a duration such as 10m, or a time `WHEN` as 2026-03-01T12:00:00Z (default: all)"},
		},
		Action: c.verb("node", logs),
	}
}

func logs(cctx *cli.Context, s *session) error {
	id, err := requiredNode(cctx)
	if err != nil {
		return err
	}
	run := logRun{session: s, id: id, rest: &sutrav1.LogRange{Follow: cctx.Bool("follow")}}
	if cctx.IsSet("tail") {
		lines := uint32(min(cctx.Uint("tail"), 1<<32-1))
		run.rest.Tail = &lines
	}
	if run.rest.Since, err = s.moment(cctx.String("since")); err != nil {
		return err
	}
	if !run.rest.GetFollow() {
		_, err := run.once(cctx.Context)
		return err
	}
	return s.follow(cctx.Context, run.once)
}

// logRun prints one node's log.
type logRun struct {
	*session
	id string
	// rest is what isn't printed yet.
	rest *sutrav1.LogRange
}

// once prints what one stream brings.
func (r *logRun) once(ctx context.Context) (answered bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := r.master.TailLogs(ctx, &sutrav1.TailLogsRequest{NodeId: r.id, Range: r.rest})
	if err != nil {
		return false, r.advise(sutrav1.GridMaster_TailLogs_FullMethodName, rpc.AsError(err))
	}
	for {
		got, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return answered, nil
		}
		if err != nil {
			return answered, r.advise(sutrav1.GridMaster_TailLogs_FullMethodName, rpc.AsError(err))
		}
		answered = true
		if err := r.print(got); err != nil {
			return answered, err
		}
		if c := got.GetChunk(); c != nil {
			r.rest = &sutrav1.LogRange{Follow: r.rest.GetFollow(), Position: c.GetPosition()}
		}
	}
}

// logLine is the JSON form of a piece of a log, or of a notice.
type logLine struct {
	Notice string `json:"notice,omitempty"`
	// Position is where the log goes on after the data.
	Position *uint64 `json:"position,omitempty"`
	// Skipped counts the bytes before the data that aren't kept any more.
	Skipped uint64  `json:"skipped,omitempty"`
	Data    *string `json:"data,omitempty"`
	// Bytes are the data where they aren't text.
	Bytes []byte `json:"data_base64,omitempty"`
}

func (r *logRun) print(got *sutrav1.TailLogsResponse) error {
	c := got.GetChunk()
	if r.json {
		return r.printJSON(got)
	}
	if notice := got.GetNotice(); notice != "" {
		r.tell("%s", clean(notice))
	}
	if c.GetSkipped() > 0 {
		r.tell("%d bytes before this aren't kept any more", c.GetSkipped())
	}
	data := c.GetData()
	if r.OutTTY {
		data = printable(data)
	}
	if len(data) == 0 {
		return nil
	}
	if _, err := r.Out.Write(data); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

func (r *logRun) printJSON(got *sutrav1.TailLogsResponse) error {
	line := logLine{Notice: got.GetNotice()}
	if c := got.GetChunk(); c != nil {
		if len(c.GetData()) == 0 && c.GetSkipped() == 0 {
			return nil // it only says where the log begins
		}
		position := c.GetPosition()
		line.Position, line.Skipped = &position, c.GetSkipped()
		if utf8.Valid(c.GetData()) {
			data := string(c.GetData())
			line.Data = &data
		} else {
			line.Bytes = c.GetData()
		}
	}
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(line); err != nil {
		return fmt.Errorf("encode log: %w", err)
	}
	return r.write(out.String())
}

// printable makes a piece of a log safe to show on a terminal, line by line.
func printable(data []byte) []byte {
	var out bytes.Buffer
	for line := range bytes.Lines(data) {
		text, whole := bytes.CutSuffix(line, []byte("\n"))
		out.WriteString(clean(strings.ReplaceAll(strings.TrimSuffix(string(text), "\r"), "\t", "    ")))
		if whole {
			out.WriteByte('\n')
		}
	}
	return out.Bytes()
}
