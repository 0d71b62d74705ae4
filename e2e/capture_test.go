package e2e_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// A capture of all that goes over the network while somebody spawns a node, makes a token and joins holds nothing but TLS, and
// nothing of what is said. The same capture of a grid in the clear holds all of it, so that the search is known to find it.
func TestACaptureShowsNothing(t *testing.T) {
	t.Parallel()
	t.Run("TLS", func(t *testing.T) {
		t.Parallel()
		seen := overhear(t, false)
		for what, forms := range seen.said {
			if where := seen.find(forms); where != "" {
				t.Errorf("%s went by in the clear, in %s", what, where)
			}
		}
		for _, s := range seen.streams {
			if err := s.isTLS(); err != nil {
				t.Errorf("%s: %v", s, err)
			}
		}
	})
	t.Run("in the clear", func(t *testing.T) {
		t.Parallel()
		seen := overhear(t, true)
		for what, forms := range seen.said {
			if seen.find(forms) == "" {
				t.Errorf("%s isn't found", what)
			}
		}
		for _, s := range seen.streams {
			if s.isTLS() == nil && len(s.data) > 0 {
				t.Errorf("%s passes for TLS", s)
			}
		}
	})
}

// overheard is what a network's frames show, and what was said on it: each thing in the forms in which it may be sent.
type overheard struct {
	frames  [][]byte
	streams []*stream
	said    map[string][][]byte
}

func (o overheard) find(forms [][]byte) (where string) {
	for _, form := range forms {
		for i, f := range o.frames {
			if bytes.Contains(f, form) {
				return fmt.Sprintf("frame %d", i)
			}
		}
		for _, s := range o.streams { // it may be spread over frames
			if bytes.Contains(s.data, form) {
				return s.String()
			}
		}
	}
	return ""
}

// overhear runs a grid in a network of its own, and has somebody spawn a node, make tokens and join.
func overhear(t *testing.T, inClear bool) overheard {
	t.Helper()
	frames := harness.OwnNetwork(t)
	g := harness.New(t)
	run := func(args ...string) []string {
		if inClear {
			args = append(args, "--insecure")
		}
		return args
	}
	// All that this test calls itself it must dial in this network: there is no g.Client.
	master := g.Launch("master", run("master", "--listen", "127.0.0.1:0", "--http", "off")...)
	harness.Await(t, "the master", func() error { return logSays(master, "master listening") })
	var announced struct{ Endpoint string }
	data, err := os.ReadFile(filepath.Join(g.Home, "run", "master.json"))
	if err == nil {
		err = json.Unmarshal(data, &announced)
	}
	if err != nil {
		t.Fatal(err)
	}
	g.Endpoint = announced.Endpoint
	const profile = "\n[storage.profiles.a-visible-profile]\nstorage_binary = \"/bin/sleep\"\nargs = [\"100000\"]\nready = \"none\"\n"
	agent := g.Launch("agent", run("agent", "--config", g.AgentFile("a-visible-agent", profile))...)
	harness.Await(t, "the agent", func() error { return logSays(agent, "registered with the master") })

	var spawned sutrav1.SpawnNodeResponse
	path := filepath.Join(g.Dir, "a-visible-place")
	out := g.MustRun(run("spawn", "-o", "json", "--profile", "a-visible-profile", "--storage-path", path, "--request-id", "a-visible-request")...)
	if err := protojson.Unmarshal([]byte(out), &spawned); err != nil {
		t.Fatal(err)
	}
	var agents sutrav1.ListAgentsResponse
	if err := protojson.Unmarshal([]byte(g.MustRun(run("list-agents", "-o", "json")...)), &agents); err != nil {
		t.Fatal(err)
	}
	created := g.Run(run("token", "create", "--role", "viewer")...)
	secret := strings.TrimSpace(created.Stdout)
	token, err := pki.ParseToken(secret)
	if inClear { // where none is given, and a master that is asked for an identity refuses it
		if token, err = pki.NewToken([32]byte{1}); created.Code != 7 {
			t.Errorf("a token in the clear: %+v", created)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if inClear {
		enroll(t, g.Endpoint, token)
	} else {
		g.MustRun("login", "--home", filepath.Join(g.Dir, "b"), "--master", g.Endpoint, "--token", secret, "--name", "a-visible-person")
	}
	node := spawned.GetNode().GetNodeId()
	g.MustRun(run("stop", "-n", node)...)

	literal := func(texts ...string) (forms [][]byte) {
		for _, text := range texts {
			forms = append(forms, []byte(text))
		}
		return forms
	}
	method := func(name string) [][]byte { return append(literal(name), hpack.AppendHuffmanString(nil, name)) }
	seen := overheard{frames: frames(), said: map[string][][]byte{
		"the preface of HTTP/2": literal("PRI * HTTP/2.0"),
		"SpawnNode":             method(sutrav1.GridMaster_SpawnNode_FullMethodName),
		"an agent's SpawnNode":  method(sutrav1.GridAgent_SpawnNode_FullMethodName),
		"CreateToken":           method(sutrav1.GridMaster_CreateToken_FullMethodName),
		"Enroll":                method(sutrav1.GridMaster_Enroll_FullMethodName),
		"the path":              literal(path), "the profile": literal("a-visible-profile"), "the request id": literal("a-visible-request"),
		"the agent's id": literal("a-visible-agent"), "the node's id": literal(node), "the person": literal("a-visible-person"),
		"an identity": literal("spiffe://"), "the token": literal(secret, secret[strings.LastIndexByte(secret, ':')+1:]), "the token's id": literal(token.ID),
		"the token's secret": {token.Secret[:]},
	}}
	if inClear { // what is only in answers that nobody gets there
		delete(seen.said, "the token")
		delete(seen.said, "an identity")
	}
	if seen.streams, err = streamsOf(seen.frames); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d frames, %d streams", len(seen.frames), len(seen.streams))
	// The capture is of this: a client's and an agent's calls, and the master's.
	for who, at := range map[string]string{"the master": g.Endpoint, "the agent": agents.GetAgents()[0].GetEndpoint()} {
		heard := 0
		for _, s := range seen.streams {
			if at == fmt.Sprintf("127.0.0.1:%d", s.to) {
				heard += len(s.data)
			}
		}
		t.Logf("%s at %s was sent %d bytes", who, at, heard)
		if heard < 300 {
			t.Errorf("%s at %s was sent %d bytes: the capture shows nothing", who, at, heard)
		}
	}
	return seen
}

// enroll asks for an identity in the clear, over a connection of this goroutine's network.
func enroll(t *testing.T, endpoint string, token pki.Token) {
	t.Helper()
	wire, err := net.Dial("tcp", endpoint)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("passthrough:///"+endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return wire, nil }))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, request, err := pki.NewRequest()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sutrav1.NewGridMasterClient(conn).Enroll(t.Context(), &sutrav1.EnrollRequest{
		TokenId: token.ID, TokenSecret: token.Secret[:], CertificateRequest: request, Name: "a-visible-person",
	}); rpc.ReasonOf(err) != rpc.InTheClear {
		t.Fatal(err)
	}
}

// stream is what went one way on a TCP connection.
type stream struct {
	from, to uint16
	// begin is the sequence number before its first byte.
	begin uint32
	parts []segment
	data  []byte
}

type segment struct {
	at   int
	data []byte
}

func (s *stream) String() string {
	return "what port " + strconv.Itoa(int(s.from)) + " sent to port " + strconv.Itoa(int(s.to))
}

// streamsOf puts together what frames of a loopback interface carry over TCP.
func streamsOf(frames [][]byte) (all []*stream, err error) {
	const (
		ethernet, ipv4, tcp, syn = 14, 0x0800, 6, 0x02
	)
	open := map[[2]uint16]*stream{}
	for i, f := range frames {
		if kind := binary.BigEndian.Uint16(f[12:]); kind != ipv4 {
			return nil, fmt.Errorf("frame %d is of kind %#x, and only IPv4 is understood", i, kind)
		}
		packet := f[ethernet:]
		if packet[9] != tcp {
			continue
		}
		packet = packet[:binary.BigEndian.Uint16(packet[2:])]
		part := packet[int(packet[0]&0xf)*4:]
		ways := [2]uint16{binary.BigEndian.Uint16(part), binary.BigEndian.Uint16(part[2:])}
		number, payload := binary.BigEndian.Uint32(part[4:]), part[int(part[12]>>4)*4:]
		s := open[ways]
		if begins := part[13]&syn != 0; begins && (s == nil || s.begin != number) {
			s = &stream{from: ways[0], to: ways[1], begin: number}
			open[ways], all = s, append(all, s)
		}
		if s == nil {
			return nil, fmt.Errorf("frame %d is of a connection whose beginning wasn't seen", i)
		}
		if len(payload) > 0 {
			s.parts = append(s.parts, segment{int(int32(number - s.begin - 1)), payload})
		}
	}
	for _, s := range all {
		slices.SortStableFunc(s.parts, func(a, b segment) int { return cmp.Compare(a.at, b.at) })
		for _, p := range s.parts {
			if p.at > len(s.data) {
				return nil, fmt.Errorf("%s lacks what is between %d and %d", s, len(s.data), p.at)
			}
			if again := len(s.data) - p.at; again < len(p.data) { // else it was sent twice
				s.data = append(s.data, p.data[again:]...)
			}
		}
	}
	return all, nil
}

// isTLS tells why a stream isn't one of TLS 1.3 records: a hello, and from then on nothing that can be read. The last one may be cut
// where the capture ended.
func (s *stream) isTLS() error {
	const (
		cipherSpec, handshake, encrypted = 20, 22, 23
	)
	sealed := 0
	for rest, n := s.data, 0; len(rest) > 0; n++ {
		if len(rest) < 5 || rest[1] != 3 || rest[2] != 1 && rest[2] != 3 {
			return fmt.Errorf("record %d begins with % x", n, rest[:min(5, len(rest))])
		}
		switch kind := rest[0]; {
		case kind == handshake && n == 0, kind == cipherSpec && n > 0 && sealed == 0:
		case kind == encrypted && n > 0:
			sealed++
		default:
			return fmt.Errorf("record %d is of kind %d", n, kind)
		}
		rest = rest[min(5+int(binary.BigEndian.Uint16(rest[3:])), len(rest)):]
	}
	if sealed == 0 && len(s.data) > 0 {
		return errors.New("nothing in it is encrypted")
	}
	return nil
}
