package registry_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/sutra-grid/sutra/health"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/registry"
)

// A master that stood still holds its own silence against nobody, also before its next look, and still
// finds out who has really died.
func TestFrozenMasterBlamesNoAgent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := registry.New(health.DefaultThresholds(), nil)
		register := func(id string) {
			claim, err := r.Claim(&sutrav1.Agent{AgentId: id, InstanceId: id, MaxNodes: 1}, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			r.Register(claim, nil, time.Now())
		}
		expect := func(when string, want map[string]sutrav1.AgentHealth) {
			t.Helper()
			for _, a := range r.Agents(time.Now()) {
				if a.GetHealth() != want[a.GetAgentId()] {
					t.Errorf("%s: %s is %s, want %s", when, a.GetAgentId(), a.GetHealth().Word(), want[a.GetAgentId()].Word())
				}
			}
		}
		run := func(d time.Duration) {
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(250 * time.Millisecond) {
				if stood := r.Watch(time.Now()); stood > 0 {
					t.Errorf("a punctual look found %v of standstill", stood)
				}
			}
			r.Watch(time.Now())
		}
		const (
			healthy  = sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY
			degraded = sutrav1.AgentHealth_AGENT_HEALTH_DEGRADED
			offline  = sutrav1.AgentHealth_AGENT_HEALTH_OFFLINE
		)

		register("dead")
		run(30 * time.Second)
		register("dying")
		run(20 * time.Second)
		register("well")
		run(5 * time.Second)
		before := map[string]sutrav1.AgentHealth{"dead": offline, "dying": degraded, "well": healthy}
		expect("before the standstill", before)

		time.Sleep(10 * time.Minute)
		expect("after it, before the next look", before)
		if _, err := r.Callable("well", time.Now()); err != nil {
			t.Errorf("an agent can't be called after the standstill: %v", err)
		}
		// A beat that is read before the next look counts from then on.
		if _, err := r.Beat(&sutrav1.HeartbeatRequest{AgentId: "well", Epoch: 1, Sequence: 1, Full: true}, time.Now()); err != nil {
			t.Fatal(err)
		}
		if stood := r.Watch(time.Now()); stood < 10*time.Minute-2*time.Second || stood > 10*time.Minute {
			t.Errorf("the look after a standstill of 10m found %v of it", stood)
		}
		expect("after it", before)
		run(10 * time.Second)
		expect("10 s later", map[string]sutrav1.AgentHealth{"dead": offline, "dying": offline, "well": healthy})
		run(5 * time.Second)
		expect("15 s later", map[string]sutrav1.AgentHealth{"dead": offline, "dying": offline, "well": degraded})

		// Standing still again and again doesn't keep a dead agent alive.
		for range 20 {
			time.Sleep(time.Minute)
			r.Watch(time.Now())
		}
		expect("after many standstills", map[string]sutrav1.AgentHealth{"dead": offline, "dying": offline, "well": offline})
	})
}
