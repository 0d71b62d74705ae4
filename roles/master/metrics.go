package master

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/roles/master/registry"
	"github.com/sutra-grid/sutra/rpc"
)

// metrics counts what a master does; what it knows is counted when asked for.
type metrics struct {
	beats  *prometheus.CounterVec
	stages *prometheus.HistogramVec
}

func newMetrics(r prometheus.Registerer, reg *registry.Registry) *metrics {
	m := &metrics{
		beats: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sutra_heartbeats_received_total", Help: "Heartbeats received from agents, by outcome (ok or the error's reason).",
		}, []string{"outcome"}),
		stages: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "sutra_spawn_stage_seconds",
			Help:    "Time that a spawn spent in each of the master's stages: persist (the intent), agent (until the agent answered).",
			Buckets: []float64{.00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"stage"}),
	}
	r.MustRegister(m.beats, m.stages, newGridCollector(reg))
	return m
}

func (m *metrics) stage(name string, since time.Time) {
	m.stages.WithLabelValues(name).Observe(time.Since(since).Seconds())
}

func (m *metrics) beat(err error) {
	outcome := "ok"
	if err != nil {
		outcome = string(rpc.ReasonOf(err))
	}
	m.beats.WithLabelValues(outcome).Inc()
}

// gridCollector counts agents by health and nodes by phase from the registry.
type gridCollector struct {
	registry                *registry.Registry
	agents, nodes, restarts *prometheus.Desc
}

func newGridCollector(r *registry.Registry) *gridCollector {
	return &gridCollector{
		registry: r,
		agents:   prometheus.NewDesc("sutra_agents", "Registered agents, by health.", []string{"health"}, nil),
		nodes:    prometheus.NewDesc("sutra_nodes", "Nodes that are remembered, by phase.", []string{"phase"}, nil),
		restarts: prometheus.NewDesc("sutra_node_restarts_total", "Restarts of crashed nodes that agents told of since this master started.", nil, nil),
	}
}

func (c *gridCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.agents
	ch <- c.nodes
	ch <- c.restarts
}

func (c *gridCollector) Collect(ch chan<- prometheus.Metric) {
	now := time.Now()
	health := map[sutrav1.AgentHealth]int{}
	for _, a := range c.registry.Agents(now) {
		health[a.GetHealth()]++
	}
	phase := map[sutrav1.Phase]int{}
	for _, v := range c.registry.Nodes("", true, now) {
		phase[v.Node.GetPhase()]++
	}
	for value := range sutrav1.AgentHealth_name {
		if h := sutrav1.AgentHealth(value); h != 0 {
			ch <- prometheus.MustNewConstMetric(c.agents, prometheus.GaugeValue, float64(health[h]), h.Word())
		}
	}
	for value := range sutrav1.Phase_name {
		if p := sutrav1.Phase(value); p != 0 {
			ch <- prometheus.MustNewConstMetric(c.nodes, prometheus.GaugeValue, float64(phase[p]), p.Word())
		}
	}
	ch <- prometheus.MustNewConstMetric(c.restarts, prometheus.CounterValue, float64(c.registry.Restarts()))
}
