package nodes

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// Metrics counts what happens to an agent's nodes. A nil *Metrics counts nothing.
type Metrics struct {
	restarts *prometheus.CounterVec
	stages   *prometheus.HistogramVec
}

// NewMetrics registers the metrics with r.
func NewMetrics(r prometheus.Registerer) *Metrics {
	m := &Metrics{
		restarts: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sutra_node_restarts_total", Help: "Starts of crashed node processes, by profile.",
		}, []string{"profile"}),
		stages: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "sutra_spawn_stage_seconds",
			Help:    "Time that a spawn spent in each of the agent's stages: prepare (files and port), fork, ready (until the readiness probe passed).",
			Buckets: []float64{.00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}, []string{"stage"}),
	}
	r.MustRegister(m.restarts, m.stages)
	return m
}

// Collect exposes the manager's nodes by phase with r.
func (m *Manager) Collect(r prometheus.Registerer) {
	r.MustRegister(&phases{m: m, desc: prometheus.NewDesc("sutra_nodes", "Nodes, by phase.", []string{"phase"}, nil)})
}

type phases struct {
	m    *Manager
	desc *prometheus.Desc
}

func (p *phases) Describe(ch chan<- *prometheus.Desc) { ch <- p.desc }

func (p *phases) Collect(ch chan<- prometheus.Metric) {
	count := map[sutrav1.Phase]int{}
	for _, n := range p.m.List() {
		count[n.GetPhase()]++
	}
	for value := range sutrav1.Phase_name {
		phase := sutrav1.Phase(value)
		if phase == sutrav1.Phase_PHASE_UNSPECIFIED {
			continue
		}
		ch <- prometheus.MustNewConstMetric(p.desc, prometheus.GaugeValue, float64(count[phase]), phase.Word())
	}
}

func (m *Metrics) stage(name string, since time.Time) {
	if m != nil {
		m.stages.WithLabelValues(name).Observe(time.Since(since).Seconds())
	}
}

func (m *Metrics) restarted(profile string) {
	if m != nil {
		m.restarts.WithLabelValues(profile).Inc()
	}
}
