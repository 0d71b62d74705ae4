package rpc

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// secured is a grid of a master and an agent's channel to it.
type secured struct {
	*pki.Authority
	server *Server
	*running
	master *master
	// own are the master's credentials, agent those of the agent that calls.
	own, agent *pki.Holder
	channel    *Channel
	client     sutrav1.GridMasterClient
}

func secure(t *testing.T, m *master, banned func(pki.Identity) error) *secured {
	t.Helper()
	a := newAuthority(t, gridID)
	s := &secured{
		Authority: a, master: m,
		own: held(t, a, pki.MasterIdentity(gridID, "m")), agent: held(t, a, pki.AgentIdentity(gridID, "agent-001")),
	}
	s.server = NewServer(zerolog.Nop(), nil, Guard{Credentials: s.own, Banned: banned})
	sutrav1.RegisterGridMasterServer(s.server, m)
	s.running = serve(t, s.server, anyPort)
	s.channel = Master(s.endpoint, Held(s.agent), nil)
	t.Cleanup(s.channel.Close)
	s.client = sutrav1.NewGridMasterClient(s.channel)
	return s
}

func (s *secured) known() int {
	s.server.admission.mu.Lock()
	defer s.server.admission.mu.Unlock()
	return len(s.server.admission.conns)
}

func beat(ctx context.Context, c sutrav1.GridMasterClient) error {
	_, err := c.Heartbeat(ctx, &sutrav1.HeartbeatRequest{AgentId: "agent-001"})
	return err
}

// beats is a master that answers beats.
func beats() *master {
	return &master{heartbeat: func(context.Context, int) (*sutrav1.HeartbeatResponse, error) {
		return &sutrav1.HeartbeatResponse{}, nil
	}}
}

// serialShown is the number of the certificate that a server shows now.
func serialShown(t *testing.T, endpoint string) string {
	t.Helper()
	conn, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}}).DialContext(t.Context(), "tcp", endpoint)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber.String()
}

func leaf(t *testing.T, h *pki.Holder) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(h.Get().Chain()[0])
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRenewalDropsNoCall(t *testing.T) {
	checkLeaks(t)
	var shown sync.Map
	m := &master{heartbeat: func(ctx context.Context, _ int) (*sutrav1.HeartbeatResponse, error) {
		shown.Store(callerOf(ctx).Expires, true)
		return &sutrav1.HeartbeatResponse{}, nil
	}}
	s := secure(t, m, nil)
	const callers, rounds = 16, 12 // more would wait for each other longer than a beat may, on a busy machine
	var calls, failed atomic.Int64
	var calling sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	for range callers {
		calling.Go(func() {
			for ctx.Err() == nil {
				if err := beat(t.Context(), s.client); err != nil && failed.Add(1) == 1 {
					t.Errorf("a call failed: %v", err)
				}
				calls.Add(1)
			}
		})
	}
	for range rounds {
		before := calls.Load()
		await(t, "calls went on", func() bool { return calls.Load() > before+callers })
		renew(t, s.Authority, pki.MasterIdentity(gridID, "m"), s.own)
		renew(t, s.Authority, pki.AgentIdentity(gridID, "agent-001"), s.agent)
		if got, want := serialShown(t, s.endpoint), leaf(t, s.own).SerialNumber.String(); got != want {
			t.Errorf("a new connection shows certificate %s, not %s", got, want)
		}
	}
	before := calls.Load()
	await(t, "calls went on", func() bool { return calls.Load() > before+callers })
	stop()
	calling.Wait()
	if failed.Load() > 0 {
		t.Errorf("%d of %d calls failed", failed.Load(), calls.Load())
	}
	await(t, "the earlier connections are closed", func() bool { return s.open.Load() == 1 && s.known() == 1 })
	// One connection each round and one more, and the test's own.
	if got := s.accepted.Load(); got != 2*rounds+1 {
		t.Errorf("%d connections, want %d", got, 2*rounds+1)
	}
	if _, ok := shown.Load(leaf(t, s.agent).NotAfter); !ok {
		t.Error("the agent's last certificate was never shown")
	}
}

func TestExpelEndsTheConnectionsOfTheBanned(t *testing.T) {
	checkLeaks(t)
	var ban atomic.Bool
	m := beats()
	s := secure(t, m, func(id pki.Identity) error {
		if id == (pki.Identity{}) {
			t.Error("nobody may be banned")
		}
		if ban.Load() && id.Name == "agent-001" {
			return errors.New("by user admin")
		}
		return nil
	})
	other := Master(s.endpoint, Held(held(t, s.Authority, pki.AgentIdentity(gridID, "agent-002"))), nil)
	t.Cleanup(other.Close)
	second := func() error {
		_, err := sutrav1.NewGridMasterClient(other).Heartbeat(t.Context(), &sutrav1.HeartbeatRequest{AgentId: "agent-002"})
		return err
	}
	if err := errors.Join(beat(t.Context(), s.client), second()); err != nil {
		t.Fatal(err)
	}
	// One that shows nothing, and does nothing.
	silent, err := (&tls.Dialer{Config: pki.JoinTLS(s.Hash())}).DialContext(t.Context(), "tcp", s.endpoint)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	await(t, "all are known", func() bool { return s.known() == 3 })

	s.server.Expel()
	if s.known() != 3 || s.open.Load() != 3 {
		t.Errorf("of 3 connections %d are left where nobody is banned", s.open.Load())
	}
	ban.Store(true)
	s.server.Expel()
	await(t, "the banned one's connection is closed", func() bool { return s.open.Load() == 2 && s.known() == 2 })
	err = beat(t.Context(), s.client)
	if err != nil && ReasonOf(err) != Banned { // the call that finds the connection broken; a beat isn't tried again
		err = beat(t.Context(), s.client)
	}
	wantError(t, err, Banned, "agent agent-001 is banned from this grid by user admin")
	if err := second(); err != nil || s.accepted.Load() != 4 {
		t.Errorf("another agent's call: %v, %d connections in all, want 4", err, s.accepted.Load())
	}
	ban.Store(false)
	if err := beat(t.Context(), s.client); err != nil {
		t.Errorf("after the ban: %v", err)
	}
}

func TestExpelEndsTheConnectionsOfARetiredRoot(t *testing.T) {
	checkLeaks(t)
	s := secure(t, beats(), nil)
	before := s.Authority
	during, err := before.Rotate(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	moved := Master(s.endpoint, Held(held(t, during, pki.AgentIdentity(gridID, "agent-002"))), nil)
	t.Cleanup(moved.Close)
	second := func() error {
		_, err := sutrav1.NewGridMasterClient(moved).Heartbeat(t.Context(), &sutrav1.HeartbeatRequest{AgentId: "agent-002"})
		return err
	}
	// Its own credentials are replaced while calls go on: both agents are known by either root.
	if err := beat(t.Context(), s.client); err != nil {
		t.Fatal(err)
	}
	renew(t, during, pki.MasterIdentity(gridID, "m"), s.own)
	if err := errors.Join(beat(t.Context(), s.client), second()); err != nil {
		t.Fatal(err)
	}
	s.server.Expel()
	if err := errors.Join(beat(t.Context(), s.client), second()); err != nil || s.accepted.Load() != 2 {
		t.Errorf("while both roots are trusted: %v, %d connections, want 2", err, s.accepted.Load())
	}
	after, err := during.Retire(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	renew(t, after, pki.MasterIdentity(gridID, "m"), s.own)
	s.server.Expel()
	await(t, "the connection by the old root is closed", func() bool { return s.open.Load() == 1 && s.known() == 1 })
	if err := second(); err != nil || s.accepted.Load() != 2 {
		t.Errorf("who has moved: %v, %d connections, want 2", err, s.accepted.Load())
	}
	err = beat(t.Context(), s.client)
	if err != nil && ReasonOf(err) != UntrustedPeer { // the call that finds the connection broken; a beat isn't tried again
		err = beat(t.Context(), s.client)
	}
	wantError(t, err, UntrustedPeer, "its certificate is of another grid, or of this grid's before it was made anew")
}

// Nobody calls when the credentials are replaced: it is the next call that has to close the connection made with the old ones.
func TestRenewalClosesAnIdleConnection(t *testing.T) {
	checkLeaks(t)
	s := secure(t, beats(), nil)
	for range 3 {
		if err := beat(t.Context(), s.client); err != nil {
			t.Fatal(err)
		}
		renew(t, s.Authority, pki.AgentIdentity(gridID, "agent-001"), s.agent)
	}
	await(t, "the earlier connections are closed", func() bool { return s.open.Load() == 1 })
	if s.accepted.Load() != 3 {
		t.Errorf("%d connections, want 3", s.accepted.Load())
	}
}

// One that reads nothing, so that a word of parting would wait for it.
func TestExpelWaitsForNobody(t *testing.T) {
	checkLeaks(t)
	var ban atomic.Bool
	s := secure(t, beats(), func(pki.Identity) error {
		if ban.Load() {
			return errors.New("by user admin")
		}
		return nil
	})
	a := s.server.admission
	for range 3 {
		near, far := net.Pipe() // it holds nothing: whoever writes waits for a reader
		shaken := make(chan error, 1)
		go func() {
			_, _, err := a.ServerHandshake(near)
			shaken <- err
		}()
		client := tls.Client(far, pki.ClientTLS(Held(s.agent), pki.Peer{Kind: pki.Master}))
		if err := errors.Join(client.Handshake(), receive(t, "the handshake's end", shaken)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = far.Close() })
	}
	ban.Store(true)
	expelled := make(chan struct{})
	go func() { defer close(expelled); s.server.Expel() }()
	select {
	case <-expelled:
	case <-time.After(patience): // a word of parting waits for 5 s, with each of the three
		t.Error("those who don't read hold up the rest")
	}
	<-expelled
	if s.known() != 0 {
		t.Errorf("%d are known still", s.known())
	}
}

// Whatever becomes of a connection after its handshake, it is forgotten with its end.
func TestNoConnectionIsKeptOnRecord(t *testing.T) {
	checkLeaks(t)
	s := secure(t, beats(), nil)
	config := pki.ClientTLS(Held(s.agent), pki.Peer{Kind: pki.Master})
	for name, treat := range map[string]func(net.Conn){
		"hangs up":        func(net.Conn) {},
		"speaks no HTTP2": func(c net.Conn) { _, _ = io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n") },
		"breaks off":      func(c net.Conn) { _, _ = io.WriteString(c, "PRI * HTTP/2.0\r\n") },
		"sends an odd frame": func(c net.Conn) {
			_, _ = io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x06\x00\x00\x00\x00\x00")
		},
		"is reset": func(c net.Conn) { _ = c.(*tls.Conn).NetConn().(*net.TCPConn).SetLinger(0) },
	} {
		for range 5 {
			conn, err := (&tls.Dialer{Config: config}).DialContext(t.Context(), "tcp", s.endpoint)
			if err != nil {
				t.Fatal(err)
			}
			treat(conn)
			if name == "is reset" {
				_ = conn.(*tls.Conn).NetConn().Close()
			}
			_ = conn.Close()
		}
		await(t, "one who "+name+" is forgotten", func() bool { return s.known() == 0 && s.open.Load() == 0 })
	}
	if err := beat(t.Context(), s.client); err != nil || s.known() != 1 {
		t.Errorf("%v, %d known, want 1", err, s.known())
	}
	s.kill()
	if s.known() != 0 {
		t.Errorf("%d are known after the server's end", s.known())
	}
}

// An identity that is verified once holds no longer than its certificate, whatever the connection does.
func TestAConnectionOutlivesItsCertificate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, gridID)
		const life = time.Minute
		short, err := a.Own(pki.AgentIdentity(gridID, "agent-001"), life)
		if err != nil {
			t.Fatal(err)
		}
		var agent pki.Holder
		agent.Set(short)
		var who pki.Identity
		srv := NewServer(zerolog.Nop(), nil, Guard{Credentials: held(t, a, pki.MasterIdentity(gridID, "m"))})
		sutrav1.RegisterGridMasterServer(srv, &master{heartbeat: func(ctx context.Context, _ int) (*sutrav1.HeartbeatResponse, error) {
			who = CallerOf(ctx)
			return &sutrav1.HeartbeatResponse{}, nil
		}})
		ch, dials := dialInMemory(t, serveInMemory(t, srv), Trust{Credentials: Held(&agent), Peer: pki.Peer{Kind: pki.Master}})
		client := sutrav1.NewGridMasterClient(ch)
		if err := beat(t.Context(), client); err != nil {
			t.Fatal(err)
		}
		if who != short.Identity {
			t.Errorf("the caller is %s", who)
		}
		time.Sleep(life + 1)
		err = beat(t.Context(), client)
		wantError(t, err, Unauthenticated, "the certificate of agent agent-001 expired at")
		if dials.Load() != 1 {
			t.Errorf("%d connections, want 1", dials.Load())
		}
		ctx := withCaller(Caller{Identity: short.Identity, Expires: short.Expires})
		if id := CallerOf(ctx); id != (pki.Identity{}) {
			t.Errorf("after its end the caller is %s still", id)
		}
	})
}
