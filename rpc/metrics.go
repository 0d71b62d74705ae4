package rpc

import (
	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts a role's calls, in and out. A nil *Metrics counts nothing.
type Metrics struct {
	server  *grpcprom.ServerMetrics
	client  *grpcprom.ClientMetrics
	retries *prometheus.CounterVec
	conns   prometheus.Gauge
}

// NewMetrics registers the metrics with r.
func NewMetrics(r prometheus.Registerer) *Metrics {
	// From a cached status (tens of microseconds) to a spawn that waits for a slow server.
	buckets := []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}
	m := &Metrics{
		server: grpcprom.NewServerMetrics(grpcprom.WithServerHandlingTimeHistogram(grpcprom.WithHistogramBuckets(buckets))),
		client: grpcprom.NewClientMetrics(grpcprom.WithClientHandlingTimeHistogram(grpcprom.WithHistogramBuckets(buckets))),
		retries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "sutra_rpc_retries_total", Help: "Calls that were tried again after UNAVAILABLE, by method.",
		}, []string{"grpc_method"}),
		conns: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "sutra_rpc_pool_connections", Help: "Outgoing connections that are kept for further calls.",
		}),
	}
	r.MustRegister(m.server, m.client, m.retries, m.conns)
	return m
}

func (m *Metrics) connections(delta float64) {
	if m != nil {
		m.conns.Add(delta)
	}
}
