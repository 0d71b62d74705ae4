// Package placement decides which agent a node goes to. It is pure.
package placement

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/registry"
	"github.com/sutra-grid/sutra/rpc"
)

// Choose returns the agent that a node without one goes to: of the healthy ones with the profile and with
// room, the one with the smallest part of its slots taken, then the one with the fewest nodes, then by id.
func Choose(candidates []registry.Candidate, want *sutrav1.Node) (agentID string, err error) {
	var fit []registry.Candidate
	var why []string
	var first *rpc.Error // the most telling refusal: of an agent that could be asked
	for _, c := range candidates {
		id := c.Agent.GetAgentId()
		switch {
		case c.State != health.Healthy:
			why = append(why, id+" is "+strings.ToUpper(c.State.String()))
		case c.Agent.GetDraining():
			why = append(why, id+" is draining")
		case !slices.Contains(c.Agent.GetProfiles(), want.GetProfile()):
			why = append(why, id+" has no profile "+want.GetProfile())
		default:
			misfit := rpc.Fit(c.Agent, c.Slots, sized(want, c.Agent))
			if misfit == nil {
				fit = append(fit, c)
				continue
			}
			if first == nil {
				first = misfit
			}
			why = append(why, misfit.Message)
		}
	}
	switch {
	case len(fit) > 0:
		return slices.MinFunc(fit, emptier).Agent.GetAgentId(), nil
	case len(candidates) == 0:
		return "", rpc.Errorf(rpc.NoAgentAvailable, "no agent is registered").
			WithHint("start one: sutra agent --config agent.toml")
	case !offered(candidates, want.GetProfile()):
		return "", unknownProfile(candidates, want.GetProfile())
	case first != nil:
		e := rpc.Errorf(first.Reason, "no agent can take the node: %s", strings.Join(why, "; "))
		e.Meta, e.Hint = first.Meta, first.Hint
		return "", e
	default:
		return "", rpc.Errorf(rpc.NoAgentAvailable, "no agent can take the node: %s", strings.Join(why, "; ")).
			WithHint("see the agents: sutra list-agents")
	}
}

// offered tells whether any agent, in whatever state, has a profile.
func offered(candidates []registry.Candidate, profile string) bool {
	return slices.ContainsFunc(candidates, func(c registry.Candidate) bool { return slices.Contains(c.Agent.GetProfiles(), profile) })
}

func unknownProfile(candidates []registry.Candidate, profile string) *rpc.Error {
	var known []string
	for _, c := range candidates {
		known = append(known, c.Agent.GetProfiles()...)
	}
	slices.Sort(known)
	return rpc.Invalid(rpc.Violation{
		Field: "profile", Description: "no agent has " + strconv.Quote(profile) + "; there are: " + strings.Join(slices.Compact(known), ", "),
	}).WithHint("add [storage.profiles.%s] to an agent's file and restart that agent; its nodes run on", profile)
}

// sized is the node with the memory that this agent would give it.
func sized(want *sutrav1.Node, on *sutrav1.Agent) *sutrav1.Node {
	if want.GetMemoryLimitMb() != 0 {
		return want
	}
	n := proto.CloneOf(want)
	n.MemoryLimitMb = on.GetDefaultMemoryMb()
	return n
}

func emptier(a, b registry.Candidate) int {
	return cmp.Or(
		// a/A < b/B without division
		cmp.Compare(len(a.Slots)*int(b.Agent.GetMaxNodes()), len(b.Slots)*int(a.Agent.GetMaxNodes())),
		cmp.Compare(len(a.Slots), len(b.Slots)),
		cmp.Compare(a.Agent.GetAgentId(), b.Agent.GetAgentId()),
	)
}
