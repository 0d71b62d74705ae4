package rpc

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// fakeConn is a connection from a host, which may send as much as it likes.
type fakeConn struct {
	net.Conn
	from   net.Addr
	closed atomic.Int32
}

func (c *fakeConn) RemoteAddr() net.Addr        { return c.from }
func (c *fakeConn) Read(p []byte) (int, error)  { return len(p), nil }
func (c *fakeConn) Close() error                { c.closed.Add(1); return nil }
func (c *fakeConn) Write(p []byte) (int, error) { return len(p), nil }

func arrive(d *door, host byte) (*fakeConn, *guest) {
	c := &fakeConn{from: &net.TCPAddr{IP: net.IPv4(10, 0, host>>4, host), Port: 1}}
	g, _ := d.admit(c).(*guest)
	return c, g
}

// wantEnded compares all that the metrics say of connections that were ended.
func wantEnded(t *testing.T, m *Metrics, want map[string]float64) {
	t.Helper()
	for _, why := range []string{noRoom, outOfTime, tooMuch, tooMany, badHandshake, slowHandshake} {
		if got := value(t, m.ended.WithLabelValues(why)); got != want[why] {
			t.Errorf("%v connections were ended for %s, want %v", got, why, want[why])
		}
	}
}

// One more than a host may have ends its oldest; those of other hosts stay, and those that are known.
func TestDoorEndsTheOldestStranger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		m := NewMetrics(prometheus.NewRegistry())
		d := newDoor(zerolog.New(&log), m)
		other, _ := arrive(d, 2)
		friend, g := arrive(d, 1)
		if err := g.welcome(pki.AgentIdentity("g", "a1")); err != nil {
			t.Fatal(err)
		}
		var all []*fakeConn
		for range maxStrangersOfHost + 3 {
			c, _ := arrive(d, 1)
			all = append(all, c)
		}
		for i, c := range all {
			if want := i < 3; (c.closed.Load() > 0) != want {
				t.Errorf("connection %d of %d is ended: %v, want %v", i, len(all), !want, want)
			}
		}
		if other.closed.Load()+friend.closed.Load() > 0 {
			t.Error("somebody else's connection was ended")
		}
		if n := strings.Count(log.String(), "oldest were ended"); n != 1 {
			t.Errorf("the log says it %d times", n)
		}
		time.Sleep(strangerTime + time.Second)
		synctest.Wait()
		if all[len(all)-1].closed.Load() == 0 || other.closed.Load() == 0 {
			t.Error("a stranger stays for ever")
		}
		wantEnded(t, m, map[string]float64{noRoom: 3, outOfTime: maxStrangersOfHost + 1})
		if friend.closed.Load() > 0 {
			t.Error("one that is known was ended as a stranger")
		}
		if d.strangers.Len() != 0 || len(d.hosts) != 0 {
			t.Errorf("%d strangers of %d hosts are remembered", d.strangers.Len(), len(d.hosts))
		}
		_ = g.Close()
		if len(d.known) != 0 {
			t.Errorf("remembered are %v", d.known)
		}
		if err := g.welcome(pki.AgentIdentity("g", "a1")); !errors.Is(err, net.ErrClosed) {
			t.Errorf("one that has gone is welcome: %v", err)
		}
	})
}

func TestDoorBoundsAllStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDoor(zerolog.Nop(), nil)
		first, _ := arrive(d, 0)
		var guests []*guest
		for i := range maxStrangers {
			_, g := arrive(d, byte(1+i%200))
			guests = append(guests, g)
		}
		if d.strangers.Len() != maxStrangers || first.closed.Load() == 0 {
			t.Errorf("there are %d strangers, want %d; the first is ended: %v", d.strangers.Len(), maxStrangers, first.closed.Load() > 0)
		}
		for _, g := range guests {
			_ = g.Close()
		}
	})
}

func TestDoorBoundsWhatStrangersSend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMetrics(prometheus.NewRegistry())
		d := newDoor(zerolog.Nop(), m)
		read := func(g *guest, n int) (err error) {
			buf := make([]byte, 1<<10)
			for range n {
				if _, err = g.Read(buf); err != nil {
					return err
				}
			}
			return nil
		}
		conn, g := arrive(d, 1)
		if err := read(g, strangerBytes>>10); err != nil {
			t.Errorf("within what it may send: %v", err)
		}
		if err := read(g, 1); !errors.Is(err, errTooMuch) || conn.closed.Load() == 0 {
			t.Errorf("beyond: %v", err)
		}
		_ = read(g, 1) // counts no second time
		wantEnded(t, m, map[string]float64{tooMuch: 1})
		_, g = arrive(d, 1)
		if err := g.welcome(pki.AgentIdentity("g", "a1")); err != nil {
			t.Fatal(err)
		}
		if err := read(g, strangerBytes>>8); err != nil {
			t.Errorf("one that is known: %v", err)
		}
		_ = g.Close()
	})
}

func TestDoorBoundsOneIdentity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := NewMetrics(prometheus.NewRegistry())
		d := newDoor(zerolog.Nop(), m)
		eve, anna := pki.UserIdentity("g", "eve", sutrav1.Role_ROLE_VIEWER), pki.UserIdentity("g", "anna", sutrav1.Role_ROLE_VIEWER)
		var guests []*guest
		for range maxConnections {
			_, g := arrive(d, 1)
			if err := g.welcome(eve); err != nil {
				t.Fatal(err)
			}
			guests = append(guests, g)
		}
		_, one := arrive(d, 1)
		if err := one.welcome(eve); err == nil {
			t.Error("there is no limit")
		}
		_ = one.Close()
		_, two := arrive(d, 1)
		if err := two.welcome(anna); err != nil {
			t.Errorf("another one: %v", err)
		}
		_ = guests[0].Close()
		_ = guests[0].Close() // counts once
		_, three := arrive(d, 1)
		if err := three.welcome(eve); err != nil {
			t.Errorf("in the place of one that went: %v", err)
		}
		_, four := arrive(d, 1)
		if err := four.welcome(eve); err == nil {
			t.Error("one that went counted twice")
		}
		wantEnded(t, m, map[string]float64{tooMany: 2})
	})
}

func TestAttemptsBackOff(t *testing.T) {
	now := time.Now()
	var a attempts
	for i := range freeAttempts {
		a.fail(now)
		if wait := a.wait(now); wait != 0 {
			t.Fatalf("after %d have failed it waits %s", i+1, wait)
		}
	}
	var waits []time.Duration
	for range 9 {
		a.fail(now)
		wait := a.wait(now)
		waits = append(waits, wait)
		if now = now.Add(wait); a.wait(now) != 0 {
			t.Fatalf("one that has waited waits %s more", a.wait(now))
		}
	}
	want := []time.Duration{1, 2, 4, 8, 16, 32, 60, 60, 60}
	for i := range want {
		if waits[i] != want[i]*time.Second {
			t.Errorf("pauses are %v, want %v seconds", waits, want)
			break
		}
	}
	now = now.Add(attemptsForgotten + time.Second)
	if a.fail(now); a.wait(now) != 0 {
		t.Error("nothing is ever forgotten")
	}
}

// Of attempts only those count that have failed. One that succeeds does so whatever others at its address did, or do.
func TestGoodAttemptsAreHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		j := newJoins()
		at := func(host string) context.Context {
			return peer.NewContext(t.Context(), from(nil, host))
		}
		wrong := func() (any, error) { return nil, Errorf(TokenRefused, "wrong") }
		// Many at once, of which none has failed, wait for their turn at most.
		var most, now, good atomic.Int32
		release := make(chan struct{})
		for range 60 {
			go func() {
				_, err := j.attempt(at("10.0.0.1"), func() (any, error) {
					if n := now.Add(1); n > most.Load() {
						most.Store(n)
					}
					<-release
					now.Add(-1)
					return nil, nil
				})
				if err == nil {
					good.Add(1)
				}
			}()
		}
		synctest.Wait()
		if n := now.Load(); n != joinsAtOnce {
			t.Errorf("%d are looked at at once, want %d", n, joinsAtOnce)
		}
		close(release)
		synctest.Wait()
		if good.Load() != 60 || most.Load() > joinsAtOnce {
			t.Errorf("%d of 60 good ones are heard, %d at once", good.Load(), most.Load())
		}
		for range freeAttempts + 1 {
			_, err := j.attempt(at("10.0.0.1"), wrong)
			wantError(t, err, TokenRefused, "wrong")
		}
		_, err := j.attempt(at("10.0.0.1"), wrong)
		wantError(t, err, TooManyRequests, "too many attempts from 10.0.0.1 to be given an identity have failed; the next one is heard in 1s")
		if e := AsError(err); e.RetryAfter != firstWait {
			t.Errorf("it is to wait %s", e.RetryAfter)
		}
		// While wrong ones of that host keep coming, a good one is heard in its turn; another host's isn't held up by them.
		wrongs, hold := 0, make(chan struct{})
		for range 5 {
			go func() {
				_, _ = j.attempt(at("10.0.0.1"), func() (any, error) { <-hold; wrongs++; return wrong() })
			}()
		}
		synctest.Wait()
		joined := make(chan error, 1)
		go func() {
			_, err := j.attempt(at("10.0.0.1"), func() (any, error) { return nil, nil })
			joined <- err
		}()
		synctest.Wait()
		if _, err := j.attempt(at("10.0.0.2"), func() (any, error) { return nil, nil }); err != nil {
			t.Errorf("another host's: %v", err)
		}
		ctx, cancel := context.WithTimeout(at("10.0.0.1"), time.Second/2)
		_, err = j.attempt(ctx, wrong)
		cancel()
		wantError(t, err, TooManyRequests, "are under way")
		close(hold)
		if err := <-joined; err != nil || wrongs != 5 {
			t.Errorf("a good one after %d wrong ones: %v", wrongs, err)
		}
		time.Sleep(firstWait) // what failed while it had to wait made it wait no longer
		_, err = j.attempt(at("10.0.0.1"), wrong)
		wantError(t, err, TokenRefused, "wrong")
	})
}

// vouched is a server of a grid of its own, and what its identities are made with.
func vouched(t *testing.T, m *master) (r *running, own func(pki.Identity) func() []*pki.Credentials) {
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
	var held pki.Holder
	held.Set(issue(pki.MasterIdentity("g", "m")))
	srv := NewServer(zerolog.Nop(), nil, Guard{Credentials: &held})
	sutrav1.RegisterGridMasterServer(srv, m)
	return serve(t, srv, anyPort), func(id pki.Identity) func() []*pki.Credentials {
		c := issue(id)
		return func() []*pki.Credentials { return []*pki.Credentials{c} }
	}
}

// dialAs is a bare connection of somebody; nil: of nobody.
func dialAs(t *testing.T, r *running, own func() []*pki.Credentials) *grpc.ClientConn {
	t.Helper()
	config := pki.ClientTLS(func() []*pki.Credentials { return nil }, pki.Peer{})
	if own != nil {
		config = pki.ClientTLS(own, pki.Peer{Kind: pki.Master})
	} else {
		config.VerifyConnection = nil
	}
	cc, err := grpc.NewClient("passthrough:///"+r.endpoint, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	return cc
}

func TestStrangersHaveFewCalls(t *testing.T) {
	r, own := vouched(t, &master{})
	stranger := sutrav1.NewGridMasterClient(dialAs(t, r, nil))
	var last error
	for i := range strangerCalls + 1 {
		last = listAgents(t.Context(), stranger)
		if want := i < strangerCalls; (status.Code(last) == codes.Unauthenticated) != want {
			t.Fatalf("call %d: %v", i, last)
		}
	}
	if status.Code(last) != codes.ResourceExhausted {
		t.Errorf("one more: %v", last)
	}
	viewer := sutrav1.NewGridMasterClient(dialAs(t, r, own(pki.UserIdentity("g", "vera", sutrav1.Role_ROLE_VIEWER))))
	for i := range 3 * strangerCalls {
		if err := listAgents(t.Context(), viewer); err != nil {
			t.Fatalf("call %d of one that is known: %v", i, err)
		}
	}
}

func TestFailedAttemptsWait(t *testing.T) {
	r, own := vouched(t, &master{})
	heard := 0
	attempt := func() error { // each on a connection of its own: it is the host that counts
		_, err := sutrav1.NewGridMasterClient(dialAs(t, r, nil)).Enroll(t.Context(), &sutrav1.EnrollRequest{})
		if status.Code(err) == codes.Unimplemented {
			heard++
		}
		return err
	}
	// Each one more that comes when its pause is over, on a busy machine, doubles the next.
	var waits error
	for waits = attempt(); status.Code(waits) == codes.Unimplemented && heard < freeAttempts+5; {
		waits = attempt()
	}
	wantError(t, waits, TooManyRequests, "too many attempts from 127.0.0.1")
	if heard <= freeAttempts {
		t.Errorf("%d attempts were heard, want more than %d", heard, freeAttempts)
	}
	if e := AsError(waits); e.RetryAfter <= 0 || e.RetryAfter > firstWait<<max(heard-freeAttempts-1, 0) {
		t.Errorf("after %d attempts that were heard it is to wait %s", heard, e.RetryAfter)
	}
	_, err := sutrav1.NewGridMasterClient(dialAs(t, r, own(pki.AgentIdentity("g", "a1")))).Renew(t.Context(), &sutrav1.RenewRequest{})
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("one that is known waits, too: %v", err)
	}
}

func TestReflectionIsForAdmins(t *testing.T) {
	r, own := vouched(t, &master{})
	for role, want := range map[sutrav1.Role]codes.Code{
		sutrav1.Role_ROLE_UNSPECIFIED: codes.Unauthenticated, sutrav1.Role_ROLE_OPERATOR: codes.PermissionDenied, sutrav1.Role_ROLE_ADMIN: codes.OK,
	} {
		var credentials func() []*pki.Credentials
		if role != sutrav1.Role_ROLE_UNSPECIFIED {
			credentials = own(pki.UserIdentity("g", "u", role))
		}
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		stream, err := grpc_reflection_v1.NewServerReflectionClient(dialAs(t, r, credentials)).ServerReflectionInfo(ctx)
		if err != nil {
			t.Fatal(err)
		}
		_ = stream.Send(&grpc_reflection_v1.ServerReflectionRequest{ // what it comes to, Recv says
			MessageRequest: &grpc_reflection_v1.ServerReflectionRequest_ListServices{},
		})
		answer, err := stream.Recv()
		if status.Code(err) != want || want == codes.OK && !strings.Contains(answer.String(), "sutra.v1.GridMaster") {
			t.Errorf("%s: %v, %v", role, answer, err)
		}
		cancel()
	}
}

// One identity has so many streams, over all of its connections; others have their own.
func TestStreamsOfOneIdentity(t *testing.T) {
	var p perIdentity
	eve, anna, m := pki.UserIdentity("g", "eve", sutrav1.Role_ROLE_VIEWER), pki.UserIdentity("g", "anna", sutrav1.Role_ROLE_VIEWER), pki.MasterIdentity("g", "m")
	for i := range maxStreamsOfOne {
		if !p.begin(eve) || !p.begin(m) {
			t.Fatalf("stream %d is refused", i)
		}
	}
	if p.begin(eve) || !p.begin(anna) || !p.begin(m) || !p.begin(pki.Identity{}) {
		t.Error("the limit isn't that of one identity")
	}
	p.end(eve)
	if !p.begin(eve) || p.begin(eve) {
		t.Error("a stream that has ended counts")
	}
}

// A connection that says nothing, or too slowly, is ended, and calls go on meanwhile.
func TestSlowHandshakes(t *testing.T) {
	r, own := vouched(t, &master{})
	var silent []net.Conn
	for range 2 * maxStrangersOfHost {
		c, err := net.Dial("tcp", r.endpoint)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() }) // the server may have done so
		silent = append(silent, c)
	}
	if err := listAgents(t.Context(), sutrav1.NewGridMasterClient(dialAs(t, r, own(pki.UserIdentity("g", "vera", sutrav1.Role_ROLE_VIEWER))))); err != nil {
		t.Errorf("a call meanwhile: %v", err)
	}
	await(t, "no more are open than may be", func() bool { return r.open.Load() <= maxStrangersOfHost+1 })
	_ = silent[0].SetReadDeadline(time.Now().Add(patience))
	if _, err := silent[0].Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, io.EOF) && !strings.Contains(err.Error(), "reset") {
		t.Errorf("the oldest: %v", err)
	}
}
