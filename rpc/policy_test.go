package rpc

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/durationpb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// flaws tells what the policies of a file's methods lack.
func flaws(file protoreflect.FileDescriptor) []string {
	var found []string
	for i := range file.Services().Len() {
		methods := file.Services().Get(i).Methods()
		for j := range methods.Len() {
			m := methods.Get(j)
			p, ok := read(m)
			switch {
			case !ok:
				found = append(found, fmt.Sprintf("%s has no policy", m.Name()))
				continue
			case p.Timeout <= 0:
				found = append(found, fmt.Sprintf("%s has no timeout", m.Name()))
			}
			if len(p.Roles) == 0 || slices.Contains(p.Roles, sutrav1.Role_ROLE_UNSPECIFIED) {
				found = append(found, fmt.Sprintf("%s has no roles", m.Name()))
			}
			if reads := isRead(string(m.Name())); p.Mutates == reads {
				found = append(found, fmt.Sprintf("%s mutates: %v, and its name says: %v", m.Name(), p.Mutates, !reads))
			}
		}
	}
	return found
}

// isRead tells whether a method by its name only reads, or tells of what has changed already.
func isRead(method string) bool {
	return method == "Heartbeat" || slices.ContainsFunc([]string{"Get", "List", "Watch", "Tail"}, func(verb string) bool {
		return strings.HasPrefix(method, verb)
	})
}

func TestEveryMethodHasAPolicy(t *testing.T) {
	for _, file := range []protoreflect.FileDescriptor{sutrav1.File_sutra_v1_grid_master_proto, sutrav1.File_sutra_v1_grid_agent_proto} {
		if found := flaws(file); len(found) > 0 {
			t.Errorf("%s: %v", file.Path(), found)
		}
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				if _, ok := PolicyOf(fullMethod(methods.Get(j))); !ok {
					t.Errorf("the middleware doesn't know %s", fullMethod(methods.Get(j)))
				}
			}
		}
	}
}

func TestAMissingPolicyIsFound(t *testing.T) {
	options := func(p *sutrav1.Policy) *descriptorpb.MethodOptions {
		o := &descriptorpb.MethodOptions{}
		if p != nil {
			proto.SetExtension(o, sutrav1.E_Policy, p)
		}
		return o
	}
	roles := []sutrav1.Role{sutrav1.Role_ROLE_ADMIN}
	second := durationpb.New(time.Second)
	method := func(name string, streams bool, p *sutrav1.Policy) *descriptorpb.MethodDescriptorProto {
		return &descriptorpb.MethodDescriptorProto{
			Name: &name, InputType: new(".t.M"), OutputType: new(".t.M"), ServerStreaming: &streams, Options: options(p),
		}
	}
	file, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: new("t.proto"), Package: new("t"), Syntax: new("proto3"),
		MessageType: []*descriptorpb.DescriptorProto{{Name: new("M")}},
		Service: []*descriptorpb.ServiceDescriptorProto{{Name: new("S"), Method: []*descriptorpb.MethodDescriptorProto{
			method("Good", false, &sutrav1.Policy{Timeout: second, Roles: roles, Mutates: true}),
			method("GetGood", false, &sutrav1.Policy{Timeout: second, Roles: roles}),
			method("Bare", false, nil),
			method("Endless", false, &sutrav1.Policy{Roles: roles, Mutates: true}),
			method("TailStream", true, &sutrav1.Policy{Roles: roles}),
			method("Nobody", false, &sutrav1.Policy{Timeout: second, Mutates: true}),
			method("SetUnseen", false, &sutrav1.Policy{Timeout: second, Roles: roles}),
		}}},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"Bare has no policy", "Endless has no timeout", "TailStream has no timeout", "Nobody has no roles",
		"SetUnseen mutates: false, and its name says: true",
	}
	if got := flaws(file); !slices.Equal(got, want) {
		t.Errorf("found %q, want %q", got, want)
	}
}

// A master that asks an agent must be able to say how that went before its own caller gives up.
func TestMasterOutlastsTheAgentsItAsks(t *testing.T) {
	wraps := 0
	for method, outer := range policies() {
		const service = "/sutra.v1.GridMaster/"
		if len(method) < len(service) || method[:len(service)] != service {
			continue
		}
		inner, ok := PolicyOf("/sutra.v1.GridAgent/" + method[len(service):])
		if !ok || method == service+"ListNodes" { // it answers from memory
			continue
		}
		wraps++
		if outer.Timeout <= inner.Timeout {
			t.Errorf("%s takes %s, the agent's own up to %s", method, outer.Timeout, inner.Timeout)
		}
	}
	if wraps != 5 {
		t.Errorf("%d methods ask an agent, want 5: SpawnNode, StopNode, RestartNode, GetNodeStatus, TailLogs", wraps)
	}
}

func TestPolicyOf(t *testing.T) {
	beat, ok := PolicyOf("/sutra.v1.GridMaster/Heartbeat")
	if !ok || beat.RetrySafe || beat.Timeout != 5*time.Second || !slices.Equal(beat.Roles, []sutrav1.Role{sutrav1.Role_ROLE_AGENT}) {
		t.Errorf("Heartbeat: %+v, %v", beat, ok)
	}
	spawn, ok := PolicyOf("/sutra.v1.GridAgent/SpawnNode")
	if !ok || !spawn.RetrySafe || spawn.Timeout != 30*time.Second {
		t.Errorf("SpawnNode: %+v, %v", spawn, ok)
	}
	if p, ok := PolicyOf("/grpc.health.v1.Health/Check"); ok {
		t.Errorf("a stranger has a policy: %+v", p)
	}
}
