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

// Collect exposes with r the manager's nodes by phase, and what each uses.
func (m *Manager) Collect(r prometheus.Registerer) {
	desc := func(name, help string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, []string{"node_id", "profile"}, nil)
	}
	r.MustRegister(
		&phases{m: m, desc: prometheus.NewDesc("sutra_nodes", "Nodes, by phase.", []string{"phase"}, nil)},
		&usages{
			m:      m,
			cpu:    desc("sutra_node_cpu_seconds_total", "Processor time that a node has used since its process was started."),
			memory: desc("sutra_node_memory_bytes", "Resident memory of a node's processes."),
			disk:   desc("sutra_node_disk_bytes", "Blocks that the files under a node's storage path take."),
		},
	)
}

type usages struct {
	m                 *Manager
	cpu, memory, disk *prometheus.Desc
}

func (u *usages) Describe(ch chan<- *prometheus.Desc) {
	ch <- u.cpu
	ch <- u.memory
	ch <- u.disk
}

func (u *usages) Collect(ch chan<- prometheus.Metric) {
	for _, n := range u.m.List() {
		use, id, profile := n.GetUsage(), n.GetNodeId(), n.GetProfile()
		if use == nil {
			continue
		}
		ch <- prometheus.MustNewConstMetric(u.cpu, prometheus.CounterValue, use.GetCpuTime().AsDuration().Seconds(), id, profile)
		ch <- prometheus.MustNewConstMetric(u.memory, prometheus.GaugeValue, float64(use.GetMemoryBytes()), id, profile)
		ch <- prometheus.MustNewConstMetric(u.disk, prometheus.GaugeValue, float64(use.GetDiskBytes()), id, profile)
	}
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
