package client

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/rs/xid"
	"github.com/urfave/cli/v2"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
)

// cleanupTime bounds the cleaning up after a smoke test that failed or was interrupted. Its calls'
// own limits add up to less.
const cleanupTime = time.Minute

func (c *client) smokeCommand() *cli.Command {
	return &cli.Command{
		Name:      "smoke",
		Usage:     "try the whole round on a live grid: spawn, look, use, stop, remove",
		UsageText: "sutra smoke [--agent AGENT] [--profile PROFILE]",
		Description: `Spawns a node of its own, checks that it is seen and can be used, stops it and removes it; the agent keeps
what it stored. It stops at the first step that fails, and removes its node also then and when it is
interrupted. The node must be reachable from here. Other nodes aren't touched.

Examples:
  sutra smoke
  sutra smoke --agent agent-001 --profile redis
  sutra smoke -o json | jq -r '.steps[] | select(.ok | not) | .error'

Exit codes: 0 all steps passed; else that of the step that failed: 1 failed; 2 bad flags; 3 no such
agent; 4 master or agent unavailable; 5 timed out; 6 not allowed; 7 no room`,
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "agent", Aliases: []string{"a"}, Usage: "id of the `AGENT` to try (default: the master picks one)"},
			&cli.StringFlag{Name: "profile", Usage: "`PROFILE` of the node (default: \"default\")"},
		},
		Action: c.verb("agent", smoke),
	}
}

// smokeReport is the JSON form of a run.
type smokeReport struct {
	// Steps are those that were tried, in order; only the last can have failed.
	Steps  []smokeStep `json:"steps"`
	Passed int         `json:"passed"`
	Total  int         `json:"total"`
	// Cleanup is there where a failed step left something to clean up.
	Cleanup *smokeStep `json:"cleanup,omitempty"`
}

type smokeStep struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	MS     int64  `json:"ms"`
	Detail string `json:"detail"`
	Error  string `json:"error"`
}

func smoke(cctx *cli.Context, s *session) error {
	run := &smokeRun{session: s, request: &sutrav1.SpawnNodeRequest{
		RequestId: xid.New().String(), AgentId: cctx.String("agent"), Profile: cctx.String("profile"),
	}}
	steps := run.steps()
	report := smokeReport{Steps: []smokeStep{}, Total: len(steps)}
	start := s.now()
	var failed error
	for i, step := range steps {
		done, err := run.try(cctx.Context, step)
		report.Steps = append(report.Steps, done)
		if err == nil {
			report.Passed++
		} else {
			failed = fmt.Errorf("smoke step %d, %s: %w", i+1, step.name, err)
		}
		// A reader that went away must not keep the node from being removed.
		if lost := run.line(fmt.Sprintf("%d %s", i+1, done.Name), done); failed == nil {
			failed = lost
		}
		if failed != nil {
			break
		}
	}
	if run.unclean {
		// The caller may be gone: this is owed all the same.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(cctx.Context), cleanupTime)
		defer cancel()
		done, err := run.try(ctx, smokeAction{"clean up", run.cleanUp})
		report.Cleanup = &done
		if lost := run.line("  "+done.Name, done); failed == nil {
			failed = lost
		}
		if err != nil {
			failed = fmt.Errorf("%w; cleaning up failed, too: %s", failed, done.Error)
		}
	}
	if lost := run.summary(report, s.now().Sub(start)); failed == nil {
		failed = lost
	}
	return failed
}

// try does one step and takes its time.
func (r *smokeRun) try(ctx context.Context, step smokeAction) (smokeStep, error) {
	start := r.now()
	detail, err := step.do(ctx)
	done := smokeStep{Name: step.name, OK: err == nil, MS: r.now().Sub(start).Milliseconds(), Detail: detail}
	if err != nil {
		done.Error = err.Error()
	}
	return done, err
}

func (r *smokeRun) line(name string, step smokeStep) error {
	if r.json {
		return nil
	}
	mark, t, said := "ok  ", toneGood, step.Detail
	if !step.OK {
		mark, t, said = "FAIL", toneBad, step.Error
	}
	if r.OutTTY {
		mark = map[bool]string{true: "✓", false: "✗"}[step.OK]
	}
	return r.write(fmt.Sprintf("%s %-28s %6d ms  %s\n", paint(mark, t, r.Color && r.OutTTY), name, step.MS, clean(said)))
}

func (r *smokeRun) summary(report smokeReport, took time.Duration) error {
	if r.json {
		document, err := json.Marshal(report)
		if err != nil {
			return fmt.Errorf("encode report: %w", err)
		}
		return r.write(string(document) + "\n")
	}
	said := fmt.Sprintf("%d of %d steps passed", report.Passed, report.Total)
	if report.Passed == report.Total {
		said += fmt.Sprintf(" in %d ms", took.Milliseconds())
	}
	return r.write(said + "\n")
}

// cleanUp stops and removes what the run's spawn started or may have started.
func (r *smokeRun) cleanUp(ctx context.Context) (string, error) {
	if r.nodeID == "" {
		// The answer with the id got lost. The same request gives the same node, and its id.
		response, err := r.master.SpawnNode(ctx, r.request)
		switch e := rpc.AsError(err); {
		case e == nil:
			r.nodeID = response.GetNode().GetNodeId()
		case rpc.Refused(e) || e.Reason == rpc.NoAgentAvailable:
			return "no node was started", nil
		default:
			if r.nodeID = e.Meta["node_id"]; r.nodeID == "" {
				return "", fmt.Errorf("a node may be left, look with %s list-nodes (request id %s): %w", r.call, r.request.GetRequestId(), err)
			}
		}
	}
	if _, err := r.stop(ctx); err != nil {
		return "", r.left(err)
	}
	if _, err := r.remove(ctx); err != nil {
		return "", r.left(err)
	}
	return "stopped and removed " + r.nodeID, nil
}

func (r *smokeRun) left(err error) error {
	return fmt.Errorf("node %s is left, remove it with %s stop --node %[1]s && %[2]s remove --node %[1]s: %[3]w", r.nodeID, r.call, err)
}
