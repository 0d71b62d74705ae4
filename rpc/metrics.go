package rpc

import (
	"slices"

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
	ended   *prometheus.CounterVec
	refused *prometheus.CounterVec
}

// Why a server ends connections, as metrics call it.
const (
	// noRoom: a stranger, for another one.
	noRoom = "no_room"
	// outOfTime and tooMuch: a stranger that stayed for too long, and one that sent too much.
	outOfTime = "out_of_time"
	tooMuch   = "too_much"
	// tooMany: one identity has as many as it may.
	tooMany = "too_many"
	// badHandshake and slowHandshake: it never got as far.
	badHandshake  = "handshake_failed"
	slowHandshake = "handshake_timeout"
)

// refusals are the reasons of errors that are refusals of somebody, rather than of what they ask for.
func refusals() []Reason {
	return []Reason{Unauthenticated, TokenRefused, Banned, PermissionDenied, TooManyRequests}
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
	m.ended = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sutra_rpc_connections_ended_total", Help: "Connections that were ended because their other end didn't say in good time, or at all, who it is, or has too many, by why.",
	}, []string{"why"})
	m.refused = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "sutra_rpc_calls_refused_total", Help: "Calls, and pages, that were refused because of who asked for them or how often, by reason.",
	}, []string{"reason"})
	for _, why := range []string{noRoom, outOfTime, tooMuch, tooMany, badHandshake, slowHandshake} {
		m.ended.WithLabelValues(why) // there from the start, so that the first one shows as a rise
	}
	for _, reason := range refusals() {
		m.refused.WithLabelValues(string(reason))
	}
	r.MustRegister(m.server, m.client, m.retries, m.conns, m.ended, m.refused)
	return m
}

// end counts a connection that was ended.
func (m *Metrics) end(why string) {
	if m != nil {
		m.ended.WithLabelValues(why).Inc()
	}
}

// refuse counts a call where its error is a refusal. Reasons may come from elsewhere: only those that are known become labels.
func (m *Metrics) refuse(err error) {
	if m == nil || err == nil {
		return
	}
	if reason := ReasonOf(err); slices.Contains(refusals(), reason) {
		m.refused.WithLabelValues(string(reason)).Inc()
	}
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
