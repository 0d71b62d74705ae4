package rpc

import (
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// Policy is what the contract says of one method.
type Policy struct {
	// Timeout bounds the whole call, retries included. 0: as long as the caller likes.
	Timeout time.Duration
	// RetrySafe methods are tried again on UNAVAILABLE.
	RetrySafe bool
	// Roles that may call.
	Roles []sutrav1.Role
	// Mutates methods are put on record, with who called them.
	Mutates bool
	// SecureOnly methods are refused in the clear.
	SecureOnly bool
}

// policies maps "/sutra.v1.GridMaster/SpawnNode" and its like to what their
// descriptors say. Built once, at the first call.
var policies = sync.OnceValue(func() map[string]Policy {
	all := map[string]Policy{}
	for _, file := range []protoreflect.FileDescriptor{
		sutrav1.File_sutra_v1_grid_master_proto,
		sutrav1.File_sutra_v1_grid_agent_proto,
	} {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				if p, ok := read(methods.Get(j)); ok {
					all[fullMethod(methods.Get(j))] = p
				}
			}
		}
	}
	// Reflection says of the contract what everybody could read, and yet it is a way to look around.
	for _, service := range []string{"grpc.reflection.v1", "grpc.reflection.v1alpha"} {
		all["/"+service+".ServerReflection/ServerReflectionInfo"] = Policy{Timeout: 5 * time.Second, Roles: []sutrav1.Role{sutrav1.Role_ROLE_ADMIN}}
	}
	return all
})

func fullMethod(m protoreflect.MethodDescriptor) string {
	return fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
}

func read(m protoreflect.MethodDescriptor) (Policy, bool) {
	if !proto.HasExtension(m.Options(), sutrav1.E_Policy) {
		return Policy{}, false
	}
	p := proto.GetExtension(m.Options(), sutrav1.E_Policy).(*sutrav1.Policy)
	return Policy{
		Timeout: p.GetTimeout().AsDuration(), RetrySafe: p.GetRetrySafe(), Roles: p.GetRoles(), Mutates: p.GetMutates(), SecureOnly: p.GetSecureOnly(),
	}, true
}

// PolicyOf returns the policy of a method given as "/package.Service/Method".
// ok is false for a method that is none of the grid's.
func PolicyOf(method string) (p Policy, ok bool) {
	p, ok = policies()[method]
	return p, ok
}
