package rpc

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// guardedBy is vouched with more of a guard; the server is told of, too.
func guardedBy(t *testing.T, m *master, g Guard) (r *running, srv *Server, own func(pki.Identity) func() []*pki.Credentials) {
	t.Helper()
	authority, err := pki.OpenAuthority(t.TempDir(), "g")
	if err != nil {
		t.Fatal(err)
	}
	issue := func(id pki.Identity) *pki.Credentials {
		c, err := authority.Own(id, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	g.Credentials = &pki.Holder{}
	g.Credentials.Set(issue(pki.MasterIdentity("g", "m")))
	srv = NewServer(zerolog.Nop(), nil, g)
	sutrav1.RegisterGridMasterServer(srv, m)
	return serve(t, srv, anyPort), srv, func(id pki.Identity) func() []*pki.Credentials {
		c := issue(id)
		return func() []*pki.Credentials { return []*pki.Credentials{c} }
	}
}

// begin begins a call whose request doesn't come.
func begin(ctx context.Context, t *testing.T, cc *grpc.ClientConn, method string) grpc.ClientStream {
	t.Helper()
	stream, err := cc.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// Whoever may not make a call hears so, and is on record, before anything is read of it.
func TestRefusedBeforeTheRequestIsRead(t *testing.T) {
	audit, dir, _ := openAudit(t)
	banned := func(id pki.Identity) error {
		if id.Name == "rogue" {
			return context.Canceled
		}
		return nil
	}
	r, _, own := guardedBy(t, &master{}, Guard{Audit: audit, Banned: banned})
	for _, c := range []struct {
		id     pki.Identity
		method string
		want   Reason
	}{
		{pki.UserIdentity("g", "vera", sutrav1.Role_ROLE_VIEWER), sutrav1.GridMaster_StopNode_FullMethodName, PermissionDenied},
		{pki.AgentIdentity("g", "a1"), sutrav1.GridMaster_ListAgents_FullMethodName, PermissionDenied},
		{pki.AgentIdentity("g", "rogue"), sutrav1.GridMaster_Heartbeat_FullMethodName, Banned},
		{pki.Identity{}, sutrav1.GridMaster_ListAgents_FullMethodName, Unauthenticated},
	} {
		var credentials func() []*pki.Credentials
		if c.id != (pki.Identity{}) {
			credentials = own(c.id)
		}
		ctx, cancel := context.WithTimeout(t.Context(), requestTime-time.Second)
		err := begin(ctx, t, dialAs(t, r, credentials), c.method).RecvMsg(&sutrav1.StopNodeResponse{})
		cancel()
		if reason := ReasonOf(err); reason != c.want {
			t.Errorf("%s hears %v, want %s", c.id, err, c.want)
		}
		lines := records(t, filepath.Join(dir, refusedFile))
		if last := lines[len(lines)-1]; last["who"] != c.id.String() || last["reason"] != string(c.want) {
			t.Errorf("on record is %v", last)
		}
	}
}

// A request that doesn't come is waited for so long, a stream's as well.
func TestRequestsMustBeWholeInTime(t *testing.T) {
	for _, method := range []string{sutrav1.GridMaster_SpawnNode_FullMethodName, sutrav1.GridMaster_TailLogs_FullMethodName} {
		synctest.Test(t, func(t *testing.T) {
			l := bufconn.Listen(64 << 10)
			srv := NewServer(zerolog.Nop(), nil, Guard{})
			sutrav1.RegisterGridMasterServer(srv, &master{})
			var served sync.WaitGroup
			served.Go(func() { _ = srv.Serve(l) }) // ends by Stop
			cc, err := grpc.NewClient("passthrough:///memory", grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			began := time.Now()
			err = begin(ctx, t, cc, method).RecvMsg(&sutrav1.SpawnNodeResponse{})
			if took := time.Since(began); took != requestTime {
				t.Errorf("%s was waited for %s, want %s", method, took, requestTime)
			}
			wantError(t, err, TimedOut, "deadline exceeded")
			_ = cc.Close()
			srv.Stop()
			served.Wait()
		})
	}
}

// One identity has so many calls under way, over all of its connections; others have their own.
func TestCallsOfOneIdentity(t *testing.T) {
	var there atomic.Int32
	release := make(chan struct{})
	r, _, own := guardedBy(t, &master{listAgents: func(ctx context.Context, _ int) (*sutrav1.ListAgentsResponse, error) {
		there.Add(1)
		select {
		case <-release:
		case <-ctx.Done():
		}
		return &sutrav1.ListAgentsResponse{}, nil
	}}, Guard{})
	eve := own(pki.UserIdentity("g", "eve", sutrav1.Role_ROLE_VIEWER))
	one, two := sutrav1.NewGridMasterClient(dialAs(t, r, eve)), sutrav1.NewGridMasterClient(dialAs(t, r, eve))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var all sync.WaitGroup
	defer all.Wait()
	defer close(release)
	for i := range maxStreamsOfOne {
		client := []sutrav1.GridMasterClient{one, two}[i%2]
		all.Go(func() {
			if err := listAgents(ctx, client); err != nil {
				t.Error(err)
			}
		})
	}
	await(t, "all are under way", func() bool { return there.Load() == maxStreamsOfOne })
	wantError(t, listAgents(ctx, one), TooManyRequests, "user eve has 256 calls under way already")
	wantError(t, listAgents(ctx, two), TooManyRequests, "user eve has 256 calls under way already")
	anna := sutrav1.NewGridMasterClient(dialAs(t, r, own(pki.UserIdentity("g", "anna", sutrav1.Role_ROLE_VIEWER))))
	all.Go(func() {
		if err := listAgents(ctx, anna); err != nil {
			t.Errorf("another one's: %v", err)
		}
	})
	await(t, "another one's is under way", func() bool { return there.Load() == maxStreamsOfOne+1 })
}

// Of one identity so many requests are read at once; one more is when one of those is done, and others' are all the while.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var all turns
		eve, anna, m := pki.UserIdentity("g", "eve", sutrav1.Role_ROLE_VIEWER), pki.UserIdentity("g", "anna", sutrav1.Role_ROLE_VIEWER), pki.MasterIdentity("g", "m")
		var ends []func()
		take := func(id pki.Identity) {
			t.Helper()
			done, err := all.await(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			ends = append(ends, done)
		}
		for range maxRead {
			take(eve)
			take(m)
		}
		take(anna)
		take(m)
		var got atomic.Int32
		for range 2 {
			go func() {
				done, err := all.await(t.Context(), eve)
				if err == nil {
					got.Add(1)
					done()
				}
			}()
		}
		synctest.Wait()
		if got.Load() != 0 {
			t.Errorf("%d more are read at once", got.Load())
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := all.await(ctx, eve); err == nil {
			t.Error("one is read although it isn't its turn")
		}
		ends[0]()
		synctest.Wait()
		if got.Load() != 2 {
			t.Errorf("when one is done, %d of two that waited are read", got.Load())
		}
		for _, end := range ends[1:] {
			end()
		}
		if len(all.all) != 0 {
			t.Errorf("%v are remembered", all.all)
		}
	})
}

// Who is banned may come in as a stranger may, and hears why it is refused; once it is let in again it is none.
func TestBannedAreStrangers(t *testing.T) {
	var out atomic.Bool
	out.Store(true)
	banned := func(id pki.Identity) error {
		if out.Load() && id.Name == "rogue" {
			return context.Canceled
		}
		return nil
	}
	m := &master{heartbeat: func(context.Context, int) (*sutrav1.HeartbeatResponse, error) {
		return &sutrav1.HeartbeatResponse{}, nil
	}}
	r, srv, own := guardedBy(t, m, Guard{Banned: banned})
	cc := dialAs(t, r, own(pki.AgentIdentity("g", "rogue")))
	rogue := sutrav1.NewGridMasterClient(cc)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	beat := func(reason int) error {
		_, err := rogue.Heartbeat(ctx, &sutrav1.HeartbeatRequest{AgentId: "rogue", Changed: []*sutrav1.Node{{Reason: strings.Repeat("x", reason)}}})
		return err
	}
	for range strangerCalls + 5 {
		wantError(t, beat(0), Banned, "agent rogue is banned")
	}
	if n := r.accepted.Load(); n != 1 {
		t.Errorf("there were %d connections, want 1", n)
	}
	await(t, "the connection that sends too much is ended", func() bool { _ = beat(strangerBytes / 4); return r.accepted.Load() > 1 })
	out.Store(false)
	srv.Expel()
	before := r.accepted.Load()
	for range 2 * strangerCalls {
		if err := beat(0); err != nil && ReasonOf(err) != Internal { // the first may be on the old connection
			t.Fatalf("once it is let in again: %v", err)
		}
	}
	if n := r.accepted.Load(); n > before+1 {
		t.Errorf("it came %d times more", n-before)
	}
}
