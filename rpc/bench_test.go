package rpc

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// BenchmarkUnary shows what the channel and the server's guard add to gRPC: each through its own server.
func BenchmarkUnary(b *testing.B) {
	run := func(b *testing.B, srv server, dial func(endpoint string) grpc.ClientConnInterface) {
		b.Helper()
		sutrav1.RegisterGridMasterServer(srv, &master{})
		endpoint := serve(b, srv, anyPort).endpoint
		client := sutrav1.NewGridMasterClient(dial(endpoint))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := client.ListAgents(b.Context(), &sutrav1.ListAgentsRequest{}); err != nil {
				b.Fatal(err)
			}
		}
	}
	b.Run("bare", func(b *testing.B) {
		run(b, grpc.NewServer(), func(endpoint string) grpc.ClientConnInterface {
			cc, err := grpc.NewClient("passthrough:///"+endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { _ = cc.Close() })
			return cc
		})
	})
	channel := func(b *testing.B, m *Metrics) {
		b.Helper()
		run(b, NewServer(zerolog.Nop(), m, Guard{}), func(endpoint string) grpc.ClientConnInterface {
			pool := NewPool(nil, m)
			b.Cleanup(pool.Close)
			return pool.Agent("agent-001", endpoint)
		})
	}
	b.Run("channel", func(b *testing.B) { channel(b, nil) })
	b.Run("channel-metrics", func(b *testing.B) { channel(b, NewMetrics(prometheus.NewRegistry())) })
}
