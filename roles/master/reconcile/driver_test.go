package reconcile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rs/zerolog"
	"go.uber.org/goleak"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/registry"
	"github.com/sutra-grid/sutra/rpc"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// actorFunc is an Actor.
type actorFunc func(ctx context.Context, a Action) error

func (f actorFunc) Act(ctx context.Context, a Action) error { return f(ctx, a) }

// gridOf is a registry with one patient agent and nodes that are wanted of it and don't run.
func gridOf(t *testing.T, nodes int) *registry.Registry {
	t.Helper()
	r := registry.New(health.Thresholds{Degraded: time.Hour, Offline: 2 * time.Hour}, nil)
	claim, err := r.Claim(&sutrav1.Agent{AgentId: "a", InstanceId: "home"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	r.Register(claim, nil, time.Now())
	for i := range nodes {
		r.Put(&sutrav1.NodeRecord{Node: &sutrav1.Node{
			NodeId: fmt.Sprintf("n%03d", i), AgentId: "a", Desired: sutrav1.Desired_DESIRED_RUNNING,
		}, Confirmed: true})
	}
	return r
}

func runs(id string) *sutrav1.Node {
	return &sutrav1.Node{NodeId: id, AgentId: "a", Phase: running}
}

// drive runs a driver until stop is called, which waits for its end.
func drive(t *testing.T, d *Driver) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	return func() {
		t.Helper()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the driver ended with %v", err)
		}
	}
}

func TestDriverBoundsWhatIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const nodes = 3*parallel + 5
		r := gridOf(t, nodes)
		var mu sync.Mutex
		acted, now, most := map[string]int{}, 0, 0
		proceed := make(chan struct{})
		stop := drive(t, &Driver{Registry: r, Log: zerolog.Nop(), Actor: actorFunc(func(_ context.Context, a Action) error {
			mu.Lock()
			acted[a.NodeID]++
			now++
			most = max(most, now)
			mu.Unlock()
			<-proceed
			r.Observe(runs(a.NodeID), time.Now())
			mu.Lock()
			defer mu.Unlock()
			now--
			return nil
		})})
		time.Sleep(10 * period)
		synctest.Wait()
		if now != parallel {
			t.Errorf("%d actions are under way, want %d", now, parallel)
		}
		busy := 0
		for _, s := range r.States(time.Now()) {
			if s.Busy {
				busy++
			}
		}
		if busy != parallel {
			t.Errorf("%d nodes are held, want those %d that are acted on", busy, parallel)
		}
		close(proceed)
		time.Sleep(10 * period)
		stop()
		if len(acted) != nodes || most != parallel {
			t.Errorf("%d of %d nodes were acted on, %d at a time", len(acted), nodes, most)
		}
		for id, times := range acted {
			if times != 1 {
				t.Errorf("%s was acted on %d times", id, times)
			}
		}
	})
}

func TestDriverTriesAgainAfterEachPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := gridOf(t, 1)
		var log bytes.Buffer
		var at []time.Time
		stop := drive(t, &Driver{Registry: r, Log: zerolog.New(&log), Actor: actorFunc(func(context.Context, Action) error {
			at = append(at, time.Now())
			if len(at) == 5 {
				r.Observe(runs("n000"), time.Now())
				return nil
			}
			return errors.New("no route")
		})})
		time.Sleep(5 * time.Minute)
		stop()
		if len(at) != 5 {
			t.Fatalf("acted %d times, want until it succeeds the fifth time", len(at))
		}
		for i, pause := range []time.Duration{1, 2, 4, 8} {
			pause *= time.Second
			if gap := at[i+1].Sub(at[i]); gap < pause || gap > pause+period+settle {
				t.Errorf("try %d came %v after the last, want after %v", i+2, gap, pause)
			}
		}
		if s := r.States(time.Now())[0]; !s.RetryAt.IsZero() || s.Busy {
			t.Errorf("the trouble isn't over: %+v", s)
		}
		said := strings.Count(log.String(), `"message":"reconcile failed"`)
		if said != 4 || strings.Count(log.String(), `"message":"reconciled"`) != 1 || !strings.Contains(log.String(), `"error":"no route"`) {
			t.Errorf("the log says otherwise:\n%s", &log)
		}
	})
}

// An agent that stops, and its nodes with it, reports their end before its own: that they can't run there is no trouble.
func TestDriverWarnsOfNoAgentThatStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := gridOf(t, 1)
		var log bytes.Buffer
		tries := 0
		stop := drive(t, &Driver{Registry: r, Log: zerolog.New(&log).Level(zerolog.InfoLevel), Actor: actorFunc(func(context.Context, Action) error {
			tries++
			return fmt.Errorf("spawn: %w", rpc.Errorf(rpc.ShuttingDown, "agent a is shutting down"))
		})})
		time.Sleep(3*time.Second + settle)
		stop()
		if log.Len() > 0 {
			t.Errorf("the log says\n%s", log.String())
		}
		if tries < 2 {
			t.Errorf("tried %d times: the agent may come back", tries)
		}
	})
}

func TestDriverActsOnAChangeAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := gridOf(t, 0)
		var acted []time.Time
		stop := drive(t, &Driver{Registry: r, Log: zerolog.Nop(), Actor: actorFunc(func(_ context.Context, a Action) error {
			acted = append(acted, time.Now())
			r.Observe(runs(a.NodeID), time.Now())
			return nil
		})})
		time.Sleep(period + period/2) // between two looks
		end := r.Begin("n")
		r.Put(&sutrav1.NodeRecord{Node: &sutrav1.Node{NodeId: "n", AgentId: "a", Desired: sutrav1.Desired_DESIRED_RUNNING}, Confirmed: true})
		end()
		changed := time.Now()
		time.Sleep(period / 4)
		synctest.Wait()
		if len(acted) != 1 || acted[0].Sub(changed) != settle {
			t.Fatalf("acted at %v, want once, %v after the change at %v", acted, settle, changed)
		}

		r.Gone("n") // nobody tells: it is seen at the next look
		time.Sleep(period)
		synctest.Wait()
		if len(acted) != 2 {
			t.Fatalf("acted %d times, want again at the next look", len(acted))
		}

		end = r.Begin("n")
		r.Gone("n")
		time.Sleep(10 * period)
		synctest.Wait()
		if len(acted) != 2 {
			t.Fatal("acted on a node that somebody else is at")
		}
		end()
		time.Sleep(settle)
		synctest.Wait()
		if len(acted) != 3 {
			t.Error("not acted on a node that was left alone at last")
		}
		stop()
	})
}

func TestDriverWaitsForWhatItStarted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := gridOf(t, 3)
		ctx, cancel := context.WithCancel(t.Context())
		acting, told := 0, 0
		var mu sync.Mutex
		proceed := make(chan struct{})
		d := &Driver{Registry: r, Log: zerolog.Nop(), Actor: actorFunc(func(ctx context.Context, _ Action) error {
			mu.Lock()
			acting++
			mu.Unlock()
			<-ctx.Done()
			mu.Lock()
			told++
			mu.Unlock()
			<-proceed // what can't be broken off
			return ctx.Err()
		})}
		ended := make(chan error, 1)
		go func() { ended <- d.Run(ctx) }()
		synctest.Wait()
		if acting != 3 {
			t.Fatalf("%d actions are under way, want 3", acting)
		}
		cancel()
		time.Sleep(time.Minute)
		synctest.Wait()
		if told != 3 {
			t.Errorf("%d actions were told to end, want 3", told)
		}
		select {
		case err := <-ended:
			t.Fatalf("the driver ended (%v) before what it started", err)
		default:
		}
		close(proceed)
		if err := <-ended; err != nil {
			t.Errorf("the driver ended with %v", err)
		}
		for _, s := range r.States(time.Now()) {
			if s.Busy || !s.RetryAt.IsZero() {
				t.Errorf("the end of the master counts as trouble of a node: %+v", s)
			}
		}

		// Also while it lets changes settle.
		settling, cancel := context.WithCancel(t.Context())
		go func() { ended <- (&Driver{Registry: gridOf(t, 0), Log: zerolog.Nop()}).Run(settling) }()
		synctest.Wait()
		began := time.Now()
		cancel()
		if err := <-ended; err != nil || time.Since(began) != 0 {
			t.Errorf("the driver took %v to end with nothing to do: %v", time.Since(began), err)
		}
	})
}

// An agent that doesn't answer holds up nobody but itself.
func TestDriverIsFairToAgents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := gridOf(t, 10*parallel) // "a", which hangs; its nodes come first by their ids
		claim, err := r.Claim(&sutrav1.Agent{AgentId: "b", InstanceId: "other"}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		r.Register(claim, nil, time.Now())
		r.Put(&sutrav1.NodeRecord{Node: &sutrav1.Node{NodeId: "z", AgentId: "b", Desired: sutrav1.Desired_DESIRED_RUNNING}, Confirmed: true})
		acted := make(chan string, 1)
		stop := drive(t, &Driver{Registry: r, Log: zerolog.Nop(), Actor: actorFunc(func(ctx context.Context, a Action) error {
			if a.AgentID == "a" {
				<-ctx.Done()
				return ctx.Err()
			}
			r.Observe(&sutrav1.Node{NodeId: "z", AgentId: "b", Phase: running}, time.Now())
			acted <- a.NodeID
			return nil
		})})
		time.Sleep(2 * period)
		synctest.Wait()
		select {
		case <-acted:
		default:
			t.Error("nothing was done on b while a hangs")
		}
		stop()
	})
}
