package rpc

import (
	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/sutra-grid/sutra/rpc/pki"
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

// ExportCredentials has metrics tell when a process's certificate ends, and how often it was renewed.
func ExportCredentials(r prometheus.Registerer, h *pki.Holder) {
	r.MustRegister(
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "sutra_certificate_expiry_timestamp_seconds", Help: "When this process's certificate ends, in seconds since 1970; 0 while it has none.",
		}, func() float64 {
			if c := h.Get(); c != nil {
				return float64(c.Expires.Unix())
			}
			return 0
		}),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "sutra_certificate_renewals_total", Help: "How often this process's certificate was renewed since it started.",
		}, func() float64 { return float64(h.Renewals()) }),
	)
}
