package rpc

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/rs/zerolog"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/durationpb"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// records reads a file of the record; each line must be whole.
func records(t *testing.T, path string) []map[string]any {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var all []map[string]any
	for line := range strings.Lines(string(data)) {
		var one map[string]any
		if err := json.Unmarshal([]byte(line), &one); err != nil || !strings.HasSuffix(line, "\n") {
			t.Errorf("%s has the line %q: %v", path, line, err)
		}
		all = append(all, one)
	}
	return all
}

func openAudit(t *testing.T) (a *Audit, dir string, log *bytes.Buffer) {
	t.Helper()
	dir, log = t.TempDir(), &bytes.Buffer{}
	a, err := OpenAudit(dir, zerolog.New(log), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() }) // some are closed by then
	return a, dir, log
}

// from is the context of a call of somebody; nil: a stranger.
func from(id *pki.Identity, host string) *peer.Peer {
	caller := Caller{CommonAuthInfo: credentials.CommonAuthInfo{}, Why: errors.New("it shows no certificate")}
	if id != nil {
		caller = Caller{Identity: *id, Expires: time.Now().Add(time.Hour)}
	}
	return &peer.Peer{Addr: &net.TCPAddr{IP: net.ParseIP(host), Port: 4711}, AuthInfo: caller}
}

func TestAuditSaysWhoDidWhat(t *testing.T) {
	a, dir, _ := openAudit(t)
	anna := pki.UserIdentity("g", "anna", sutrav1.Role_ROLE_OPERATOR)
	known := peer.NewContext(t.Context(), from(&anna, "10.0.0.7"))
	stranger := peer.NewContext(t.Context(), from(nil, "10.0.0.8"))
	const spawn, list, enroll = sutrav1.GridMaster_SpawnNode_FullMethodName, sutrav1.GridMaster_ListNodes_FullMethodName, sutrav1.GridMaster_Enroll_FullMethodName
	req := &sutrav1.SpawnNodeRequest{RequestId: "r1", AgentId: "a1", StoragePath: "/d\n", MemoryLimitMb: 64}
	resp := &sutrav1.SpawnNodeResponse{Node: &sutrav1.Node{NodeId: "node-1", AgentId: "a1", Port: 5000, Reason: "prints anything"}}
	start := time.Now()
	a.call(known, spawn, start, req, resp, nil)
	a.call(known, spawn, start, req, (*sutrav1.SpawnNodeResponse)(nil), Errorf(AgentFull, "full"))
	a.call(known, list, start, &sutrav1.ListNodesRequest{}, nil, Errorf(Internal, "reads aren't on record"))
	a.call(stranger, list, start, &sutrav1.ListNodesRequest{}, nil, Errorf(Unauthenticated, "who?"))
	a.call(stranger, enroll, start, &sutrav1.EnrollRequest{TokenId: "t1", Name: "a1"}, nil, Invalid(Violation{"name", "is bad"}))
	a.call(stranger, enroll, start, &sutrav1.EnrollRequest{TokenId: "t1", Name: "a1", Role: sutrav1.Role_ROLE_AGENT}, nil, nil)

	var got []string
	for _, file := range []string{auditFile, refusedFile} {
		for _, r := range records(t, filepath.Join(dir, file)) {
			if at, err := time.Parse(time.RFC3339Nano, fmt.Sprint(r["time"])); err != nil || !at.Equal(start) || r["took_ms"] == nil {
				t.Errorf("the time of %v: %v", r, err)
			}
			got = append(got, fmt.Sprint(file, " ", r["who"], " ", r["role"], " ", r["from"], " ", r["method"], " ", r["what"], " ", r["code"], " ", r["reason"]))
		}
	}
	want := []string{
		"audit.log user anna operator 10.0.0.7:4711 SpawnNode map[agent_id:a1 memory_limit_mb:64 node_id:node-1 port:5000 request_id:r1 storage_path:/d\n] OK <nil>",
		"audit.log nobody <nil> 10.0.0.8:4711 Enroll map[name:a1 role:agent token_id:t1] OK <nil>",
		"refused.log user anna operator 10.0.0.7:4711 SpawnNode map[agent_id:a1 memory_limit_mb:64 request_id:r1 storage_path:/d\n] ResourceExhausted AGENT_FULL",
		"refused.log nobody <nil> 10.0.0.8:4711 ListNodes <nil> Unauthenticated UNAUTHENTICATED",
		"refused.log nobody <nil> 10.0.0.8:4711 Enroll map[name:a1 token_id:t1] InvalidArgument INVALID_ARGUMENT",
	}
	if !slices.Equal(got, want) {
		t.Errorf("on record is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, file := range []string{auditFile, refusedFile} {
		if info, err := os.Stat(filepath.Join(dir, file)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", file, info, err)
		}
	}
}

// What is on record is published, the very same; what was refused isn't.
func TestAuditPublishesWhatIsOnRecord(t *testing.T) {
	a, dir, _ := openAudit(t)
	var published []*sutrav1.Event
	a.publish = func(e *sutrav1.Event) { published = append(published, e) }
	anna := pki.UserIdentity("g", "anna", sutrav1.Role_ROLE_ADMIN)
	known, stranger := peer.NewContext(t.Context(), from(&anna, "10.0.0.7")), peer.NewContext(t.Context(), from(nil, "10.0.0.8"))
	token, err := pki.NewToken([32]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now().Add(-1234567 * time.Microsecond)
	calls := 0
	call := func(ctx context.Context, method string, req, resp proto.Message, err error) {
		calls++
		a.call(ctx, method, start, req, resp, err)
	}
	// Each method with all that its messages can carry.
	for i := range sutrav1.File_sutra_v1_grid_master_proto.Services().Get(0).Methods().Len() {
		m := sutrav1.File_sutra_v1_grid_master_proto.Services().Get(0).Methods().Get(i)
		if p, _ := PolicyOf(fullMethod(m)); !p.Mutates || slices.Contains([]protoreflect.Name{"RegisterAgent", "UnregisterAgent", "Renew"}, m.Name()) { // which are upkeep
			continue
		}
		req, resp := dynamicpb.NewMessage(m.Input()), dynamicpb.NewMessage(m.Output())
		fill(req, "Request", 0)
		fill(resp, "Response", 0)
		call(known, fullMethod(m), req, resp, nil)
	}
	const spawn, enroll = sutrav1.GridMaster_SpawnNode_FullMethodName, sutrav1.GridMaster_Enroll_FullMethodName
	call(known, spawn, &sutrav1.SpawnNodeRequest{Port: 5000, MemoryLimitMb: 64, StoragePath: "x" + strings.Repeat("é", maxAudited), Profile: token.Encode()}, nil, nil)
	call(known, sutrav1.GridMaster_CreateToken_FullMethodName, &sutrav1.CreateTokenRequest{Ttl: durationpb.New(time.Hour), Role: sutrav1.Role_ROLE_VIEWER}, &sutrav1.CreateTokenResponse{Secret: token.Encode()}, nil)
	call(stranger, enroll, &sutrav1.EnrollRequest{TokenId: "t1", Name: "a1"}, &sutrav1.EnrollResponse{}, nil)
	// What isn't among it.
	a.call(known, sutrav1.GridMaster_Renew_FullMethodName, start, &sutrav1.RenewRequest{}, nil, nil)
	a.call(known, spawn, start, &sutrav1.SpawnNodeRequest{}, nil, Errorf(AgentFull, "full"))
	a.call(known, sutrav1.GridMaster_ListNodes_FullMethodName, start, &sutrav1.ListNodesRequest{}, nil, nil)
	a.call(known, spawn, start, &sutrav1.SpawnNodeRequest{}, nil, Errorf(PermissionDenied, "no"))
	a.call(stranger, enroll, start, &sutrav1.EnrollRequest{}, nil, Invalid(Violation{"name", "is bad"}))
	a.call(stranger, spawn, start, &sutrav1.SpawnNodeRequest{}, nil, Errorf(Unauthenticated, "who?"))

	lines := records(t, filepath.Join(dir, auditFile))
	if len(lines) != calls || len(published) != calls {
		t.Fatalf("of %d calls %d are on record, and %d are published", calls, len(lines), len(published))
	}
	for i, e := range published {
		if _, err := proto.Marshal(e); err != nil {
			t.Errorf("event %d can't be sent: %v", i, err)
		}
		c := e.GetCall()
		if c.GetTook().AsDuration() < 1234567*time.Microsecond {
			t.Errorf("%s took %v", c.GetMethod(), c.GetTook())
		}
		what := map[string]any{}
		if of, ok := lines[i]["what"].(map[string]any); ok {
			what = of
		}
		for field, value := range c.GetWhat() {
			if fmt.Sprint(what[field]) != value {
				t.Errorf("%s has %s %q in an event, and on record %v", c.GetMethod(), field, value, what[field])
			}
		}
		said := fmt.Sprint(c.GetWho(), c.GetRole(), c.GetFrom(), c.GetMethod(), len(c.GetWhat()), c.GetCode(), c.GetReason(),
			c.GetBeganAt().AsTime().Format(time.RFC3339Nano), float64(c.GetTook().AsDuration().Microseconds())/1000)
		of := func(key string) any {
			if value := lines[i][key]; value != nil {
				return value
			}
			return ""
		}
		if line := fmt.Sprint(of("who"), of("role"), of("from"), of("method"), len(what), of("code"), of("reason"), of("time"), of("took_ms")); said != line {
			t.Errorf("the event is\n%s\nand on record is\n%s", said, line)
		}
		if strings.Contains(fmt.Sprint(e), token.Encode()) || strings.Contains(fmt.Sprint(e), "secret:") {
			t.Errorf("an event has a secret: %v", e)
		}
	}
	if cut := published[calls-3].GetCall().GetWhat()["storage_path"]; len(cut) > maxAudited+4 || !utf8.ValidString(cut) {
		t.Errorf("a text of %d bytes", len(cut))
	}
}

// fill gives each field of a message, and of those in it, a value that tells which it is of.
func fill(m protoreflect.Message, path string, depth int) {
	for i := range m.Descriptor().Fields().Len() {
		f := m.Descriptor().Fields().Get(i)
		at := path + "/" + string(f.Name())
		switch {
		case f.IsMap():
		case f.IsList() && f.Kind() == protoreflect.BytesKind:
			m.Mutable(f).List().Append(protoreflect.ValueOfBytes([]byte(at)))
		case f.IsList() && f.Kind() == protoreflect.StringKind:
			m.Mutable(f).List().Append(protoreflect.ValueOfString(at))
		case f.IsList():
		case f.Kind() == protoreflect.BytesKind:
			m.Set(f, protoreflect.ValueOfBytes([]byte(at)))
		case f.Kind() == protoreflect.StringKind:
			m.Set(f, protoreflect.ValueOfString(at))
		case f.Kind() == protoreflect.MessageKind && depth < 4:
			fill(m.Mutable(f).Message(), at, depth+1)
		}
	}
}

// Of all that the contract's methods carry, a record has ids: no secret, no key, nothing that a node printed.
func TestAuditTellsNoSecrets(t *testing.T) {
	for _, file := range []protoreflect.FileDescriptor{sutrav1.File_sutra_v1_grid_master_proto, sutrav1.File_sutra_v1_grid_agent_proto} {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				for _, d := range []protoreflect.MessageDescriptor{methods.Get(j).Input(), methods.Get(j).Output()} {
					m := dynamicpb.NewMessage(d)
					fill(m, string(d.Name()), 0)
					what := map[string]any{}
					about(proto.Message(m), what)
					for key := range what {
						if !slices.Contains([]string{
							"agent_id", "node_id", "token_id", "request_id", "profile", "port", "storage_path", "memory_limit_mb", "role",
							"endpoint", "uses_left", "root", "name", "reason", "uses", "ttl", "epoch",
						}, key) {
							t.Errorf("of %s a record has %s: %v", d.Name(), key, what[key])
						}
					}
					if said := fmt.Sprint(what); strings.Contains(said, "secret") || strings.Contains(said, "certificate") || strings.Contains(said, "/node/reason") {
						t.Errorf("of %s a record has %s", d.Name(), said)
					}
				}
			}
		}
	}
	what := map[string]any{}
	about(&sutrav1.CreateTokenRequest{Ttl: durationpb.New(time.Hour), Uses: 2, Role: sutrav1.Role_ROLE_VIEWER}, what)
	about(&sutrav1.SpawnNodeRequest{StoragePath: strings.Repeat("x", maxAudited+1)}, what)
	if what["ttl"] != "1h0m0s" || what["role"] != "viewer" || len(what["storage_path"].(string)) > maxAudited+4 {
		t.Errorf("a record has %.100v", what)
	}
}

// A host that is refused all the time gets few lines, and keeps no other host from getting its own.
func TestAuditRestrainsRefusals(t *testing.T) {
	var r restraint
	now := time.Now()
	said := 0
	for range 1000 {
		if ok, _ := r.say(now, refusedBurst, refusedEvery); ok {
			said++
		}
	}
	if said != refusedBurst {
		t.Errorf("%d of 1000 are on record at once, want %d", said, refusedBurst)
	}
	if ok, omitted := r.say(now.Add(refusedEvery), refusedBurst, refusedEvery); !ok || omitted != 1000-refusedBurst {
		t.Errorf("a second later: %v, omitted %d", ok, omitted)
	}
	if ok, omitted := r.say(now.Add(refusedEvery), refusedBurst, refusedEvery); ok || omitted != 0 {
		t.Errorf("at the same time once more: %v, omitted %d", ok, omitted)
	}

	a, dir, _ := openAudit(t)
	for range 100 {
		a.call(peer.NewContext(t.Context(), from(nil, "10.0.0.8")), "/any", time.Now(), nil, nil, Errorf(PermissionDenied, "no"))
	}
	a.call(peer.NewContext(t.Context(), from(nil, "10.0.0.9")), "/any", time.Now(), nil, nil, Errorf(PermissionDenied, "no"))
	all := records(t, filepath.Join(dir, refusedFile))
	// A second or two may pass meanwhile.
	if last := all[len(all)-1]; len(all) > refusedBurst+30 || !strings.HasPrefix(fmt.Sprint(last["from"]), "10.0.0.9") {
		t.Errorf("%d lines, the last of %v", len(all), last["from"])
	}
}

func TestByAddressIsBounded(t *testing.T) {
	var b byAddress[int]
	for i := range 3 * maxAddresses {
		b.at(hostOf(&net.TCPAddr{IP: net.IPv4(10, byte(i>>16), byte(i>>8), byte(i))}), func(n *int) { *n++ })
	}
	if len(b.known) != maxAddresses {
		t.Errorf("%d addresses are known, want %d", len(b.known), maxAddresses)
	}
	if a, b := hostOf(&net.TCPAddr{IP: net.ParseIP("2001:db8::1")}), hostOf(&net.TCPAddr{IP: net.ParseIP("2001:db8::ffff:1"), Zone: "eth0"}); a != b || !a.IsValid() {
		t.Errorf("two addresses of a network: %v and %v", a, b)
	}
	if a, b := hostOf(&net.TCPAddr{IP: net.ParseIP("::ffff:10.0.0.1")}), hostOf(&net.TCPAddr{IP: net.IPv4(10, 0, 0, 1)}); a != b {
		t.Errorf("one address in two forms: %v and %v", a, b)
	}
}

// lines counts those of a file by who, method and code.
func lines(t *testing.T, path string) map[string]int {
	t.Helper()
	count := map[string]int{}
	for _, r := range records(t, path) {
		code := r["code"]
		if r["begun"] == true {
			code = "begun"
		}
		count[fmt.Sprint(r["who"], " ", r["method"], " ", code)]++
	}
	return count
}

// What costs nothing to repeat pushes nothing out: neither what agents do for themselves, nor what fails, nor what changes nothing.
// What people change is on record each time.
func TestAuditKeepsWhatPeopleDid(t *testing.T) {
	a, dir, _ := openAudit(t)
	olga, agent := pki.UserIdentity("g", "olga", sutrav1.Role_ROLE_OPERATOR), pki.AgentIdentity("g", "a1")
	operator := peer.NewContext(t.Context(), from(&olga, "10.0.0.7"))
	const (
		spawn, stop, renew = sutrav1.GridMaster_SpawnNode_FullMethodName, sutrav1.GridMaster_StopNode_FullMethodName, sutrav1.GridMaster_Renew_FullMethodName
		many               = 2000
	)
	began := time.Now()
	for i := range many {
		from := peer.NewContext(t.Context(), from(&agent, fmt.Sprintf("10.0.%d.%d", i/200, i%200))) // from anywhere
		a.call(from, sutrav1.GridMaster_RegisterAgent_FullMethodName, began, &sutrav1.RegisterAgentRequest{Agent: &sutrav1.Agent{AgentId: "a1", Endpoint: strings.Repeat("e", 3800)}},
			&sutrav1.RegisterAgentResponse{Epoch: uint64(i)}, nil)
		a.call(from, sutrav1.GridMaster_RegisterAgent_FullMethodName, began, &sutrav1.RegisterAgentRequest{Agent: &sutrav1.Agent{AgentId: "a1", Endpoint: strings.Repeat("e", 3800+i)}},
			nil, Invalid(Violation{"endpoint", "is bad"}))
		a.call(operator, renew, began, &sutrav1.RenewRequest{}, &sutrav1.RenewResponse{}, nil)
		a.call(operator, spawn, began, &sutrav1.SpawnNodeRequest{StoragePath: fmt.Sprint("/", i)}, nil, Errorf(AgentFull, "full"))
		a.call(operator, stop, began, &sutrav1.StopNodeRequest{NodeId: fmt.Sprint("no", i)}, &sutrav1.StopNodeResponse{AlreadyStopped: true}, nil)
		a.call(operator, spawn, began, &sutrav1.SpawnNodeRequest{RequestId: "r"}, &sutrav1.SpawnNodeResponse{Node: &sutrav1.Node{NodeId: "node-r"}}, nil)
	}
	for i := range 100 {
		a.call(operator, spawn, began, &sutrav1.SpawnNodeRequest{}, &sutrav1.SpawnNodeResponse{Node: &sutrav1.Node{NodeId: fmt.Sprint("node-", i)}}, nil)
	}
	a.call(t.Context(), sutrav1.GridMaster_RegisterAgent_FullMethodName, began, &sutrav1.RegisterAgentRequest{}, &sutrav1.RegisterAgentResponse{}, nil) // in the clear
	few := refusedBurst + 1 + int(time.Since(began)/refusedEvery)
	done, upkeep, refused := lines(t, filepath.Join(dir, auditFile)), lines(t, filepath.Join(dir, upkeepFile)), lines(t, filepath.Join(dir, refusedFile))
	if n := done["user olga SpawnNode OK"]; len(done) != 1 || n < 100 || n > 100+few {
		t.Errorf("done are %v", done)
	}
	for _, n := range upkeep {
		if n > few {
			t.Errorf("upkeep is %v", upkeep)
		}
	}
	in := 0
	for _, n := range refused {
		in += n
	}
	if len(upkeep) != 3 || in > 2*few || refused["agent a1 RegisterAgent InvalidArgument"] == 0 || refused["user olga SpawnNode ResourceExhausted"] == 0 {
		t.Errorf("upkeep is %v, and in vain were %v", upkeep, refused)
	}
	for _, name := range []string{upkeepFile, refusedFile} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() > int64(3*few*(600+maxText)) {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}

// A call that takes long is on record when it begins to have an effect, and again when it ends, however it does.
func TestAuditTellsWhatBegins(t *testing.T) {
	a, dir, _ := openAudit(t)
	path := filepath.Join(dir, auditFile)
	var begun []map[string]any
	var fails bool
	r, _, own := guardedBy(t, &master{spawnNode: func(ctx context.Context, req *sutrav1.SpawnNodeRequest) (*sutrav1.SpawnNodeResponse, error) {
		if req.GetAgentId() == "" {
			return nil, Errorf(NoAgentAvailable, "no")
		}
		Begins(context.WithoutCancel(ctx), "node-1", "a1")
		Begins(ctx, "node-1", "a1") // once more is nothing
		if begun = records(t, path); fails {
			return nil, Errorf(NodeDiedEarly, "dead")
		}
		return &sutrav1.SpawnNodeResponse{Node: &sutrav1.Node{NodeId: "node-1"}}, nil
	}}, Guard{Audit: a})
	olga := sutrav1.NewGridMasterClient(dialAs(t, r, own(pki.UserIdentity("g", "olga", sutrav1.Role_ROLE_OPERATOR))))
	if _, err := olga.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{AgentId: "a1", RequestId: "r1"}); err != nil {
		t.Fatal(err)
	}
	if len(begun) != 1 || begun[0]["who"] != "user olga" || begun[0]["begun"] != true || begun[0]["code"] != nil ||
		fmt.Sprint(begun[0]["what"]) != "map[agent_id:a1 node_id:node-1 request_id:r1]" {
		t.Errorf("while it is under way, on record is %v", begun)
	}
	fails = true
	_, err := olga.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{AgentId: "a1"})
	wantError(t, err, NodeDiedEarly, "dead")
	_, err = olga.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{})
	wantError(t, err, NoAgentAvailable, "no")
	if got := lines(t, path); len(got) != 3 || got["user olga SpawnNode begun"] != 2 || got["user olga SpawnNode OK"] != 1 || got["user olga SpawnNode Aborted"] != 1 {
		t.Errorf("on record is %v", got)
	}
	if got := lines(t, filepath.Join(dir, refusedFile)); len(got) != 1 || got["user olga SpawnNode Unavailable"] != 1 {
		t.Errorf("in vain were %v", got)
	}
	fails = false
	for i := range begunBurst + 50 { // however much came to a good end, what doesn't is on record
		if _, err := olga.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{AgentId: "a1", RequestId: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	fails = true
	_, err = olga.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{AgentId: "a1"})
	wantError(t, err, NodeDiedEarly, "dead")
	if got := lines(t, path); got["user olga SpawnNode begun"] != begunBurst+53 || got["user olga SpawnNode OK"] != begunBurst+51 || got["user olga SpawnNode Aborted"] != 2 {
		t.Errorf("on record is %v", got)
	}
	for range begunBurst + 50 { // who begins things in vain all the time gets so many lines
		_, _ = olga.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{AgentId: "a1"})
	}
	got := lines(t, path)
	// One may end when there is room for a line again that there wasn't when it began.
	ended, began := got["user olga SpawnNode Aborted"], got["user olga SpawnNode begun"]-got["user olga SpawnNode OK"]
	if ended > begunBurst+20 || ended < began || ended > began+20 {
		t.Errorf("on record is %v", got)
	}
	Begins(t.Context(), "node-1", "a1") // of no call
}

// Many write while the file is put aside again and again: each line is whole and in one file, and no more are kept than that.
func TestJournalTurns(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	j, err := openJournal(path, 16_000, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = j.close() }() // the test has read it
	// Each round writes more than a file takes: however slow a turn is, there is one in each.
	const rounds, writers, each = 3, 8, 20
	pad := strings.Repeat("x", 100)
	for round := range rounds {
		var all sync.WaitGroup
		for w := range writers {
			all.Go(func() {
				for i := range each {
					j.write(map[string]any{"n": (round*writers+w)*each + i, "pad": pad})
				}
			})
		}
		all.Wait()
	}
	seen := map[string]int{}
	files, err := filepath.Glob(path + "*")
	if err != nil || len(files) < 1+rounds {
		t.Errorf("after %d lines there are %v, %v", rounds*writers*each, files, err)
	}
	for _, name := range files {
		for _, r := range records(t, name) {
			seen[fmt.Sprint(r["n"])]++
		}
	}
	if len(seen) != rounds*writers*each {
		t.Errorf("%d lines of %d are there", len(seen), rounds*writers*each)
	}
	for n, times := range seen {
		if times != 1 {
			t.Errorf("line %s is there %d times", n, times)
		}
	}
	for range 1000 {
		j.write(map[string]any{"pad": pad})
	}
	if files, err = filepath.Glob(path + "*"); err != nil || len(files) != 1+auditKept {
		t.Errorf("there are %v, %v", files, err)
	}
}

// One that saw that the file is long, and comes to put it aside when another one has done so, leaves the new one where it is.
func TestJournalTurnsOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	j, err := openJournal(path, 100, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = j.close() }() // the test has read it
	j.write(map[string]any{"pad": strings.Repeat("x", 100)})
	j.write(map[string]any{"n": 1})
	j.turnOver() // late
	if n := len(records(t, path)); n != 1 {
		t.Errorf("the file has %d lines, want 1", n)
	}
}

// What a full disk cut off is one bad line, and no other; calls go on, and the log says it once.
func TestJournalOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16k"); err != nil {
		skip(t, "needs the right to mount: "+err.Error())
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	var log bytes.Buffer
	j, err := openJournal(filepath.Join(dir, "j"), 1<<20, zerolog.New(&log))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = j.close() }() // the test has read it
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 8<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	pad := strings.Repeat("x", 300)
	for range 100 {
		j.write(map[string]any{"pad": pad})
	}
	if n := strings.Count(log.String(), "aren't on record"); n != 1 {
		t.Errorf("the log says %d times that the disk is full:\n%s", n, log.String())
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	j.write(map[string]any{"after": 1})
	if !strings.Contains(log.String(), "on record again") {
		t.Errorf("the log:\n%s", log.String())
	}
	data, err := os.ReadFile(filepath.Join(dir, "j"))
	if err != nil {
		t.Fatal(err)
	}
	bad := 0
	lines := slices.Collect(strings.Lines(string(data)))
	for _, line := range lines {
		if !json.Valid([]byte(line)) {
			bad++
		}
	}
	if bad > 1 || lines[len(lines)-1] != "{\"after\":1}\n" {
		t.Errorf("%d lines are bad, the last is %q", bad, lines[len(lines)-1])
	}
}

// A record whose last line was cut off goes on with a line of its own.
func TestJournalMendsATornLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "j")
	if err := os.WriteFile(path, []byte("{\"a\":1}\n{\"b\":"), 0o600); err != nil {
		t.Fatal(err)
	}
	j, err := openJournal(path, 1<<20, zerolog.Nop())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = j.close() }() // the test has read it
	j.write(map[string]any{"c": 1})
	j.write(map[string]any{"d": 1})
	data, err := os.ReadFile(path)
	if want := "{\"a\":1}\n{\"b\":\n{\"c\":1}\n{\"d\":1}\n"; err != nil || string(data) != want {
		t.Errorf("the file has %q, %v; want %q", data, err, want)
	}
	if _, err := openJournal(filepath.Join(path, "x"), 1, zerolog.Nop()); err == nil || !strings.Contains(err.Error(), "record of calls") {
		t.Errorf("in no folder: %v", err)
	}
}

// FuzzRecordedStranger: whatever a stranger calls itself, the record of it is one line of JSON, of bounded length, without a token.
func FuzzRecordedStranger(f *testing.F) {
	token, err := pki.NewToken([32]byte{1})
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range []string{
		"", "agent-001", "a\nb", "\x00\xff\u2028", token.Encode(), "x" + token.Encode() + "\n", `"}` + "\n{",
		strings.Repeat("a", 3*maxAudited), strings.Repeat("a", maxAudited-10) + token.Encode(),
	} {
		f.Add(name, token.ID)
		f.Add("a", name)
	}
	file := filepath.Join(f.TempDir(), refusedFile)
	j, err := openJournal(file, 1<<40, zerolog.Nop())
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = j.close() })
	f.Fuzz(func(t *testing.T, name, id string) {
		what := map[string]any{}
		about(&sutrav1.EnrollRequest{TokenId: id, TokenSecret: []byte(name), Name: name, CertificateRequest: []byte(name)}, what)
		if err := j.file.Load().Truncate(0); err != nil {
			t.Fatal(err)
		}
		j.write(audited{Method: "Enroll", Who: "nobody", What: what})
		if all := records(t, file); len(all) != 1 {
			t.Errorf("%q and %q are on record as %v", name, id, all)
		}
		data, err := os.ReadFile(file)
		if err != nil || pki.HoldsToken(string(data)) >= 0 || len(data) > 20*maxAudited {
			t.Errorf("on record, with %v, are %d bytes: %.200q", err, len(data), data)
		}
	})
}
