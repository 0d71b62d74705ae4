package rpc

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rs/zerolog"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
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

// versus measures two things in turn, so that whatever else the host does slows down both, and reports the middle of each
// and how many times the second one takes the first one's.
func versus(b *testing.B, names [2]string, do [2]func()) {
	b.Helper()
	var took [2][]time.Duration
	do[0]()
	do[1]()
	for b.Loop() {
		for i := range do {
			start := time.Now()
			do[i]()
			took[i] = append(took[i], time.Since(start))
		}
	}
	var p50 [2]float64
	for i, all := range took {
		slices.Sort(all)
		p50[i] = float64(all[len(all)/2].Nanoseconds()) / 1e3
		b.ReportMetric(p50[i], "p50-us-"+names[i])
	}
	b.ReportMetric(p50[1]/p50[0], names[1]+"/"+names[0])
}

// BenchmarkConnect is a new connection and its first call: with mutual TLS as gRPC and Go do it, one root and nothing
// between, and as a grid does it.
func BenchmarkConnect(b *testing.B) {
	authority := newAuthority(b, gridID)
	srv := NewServer(zerolog.Nop(), nil, Guard{Credentials: held(b, authority, pki.AgentIdentity(gridID, "agent-001"))})
	sutrav1.RegisterGridAgentServer(srv, &agent{})
	grid := serve(b, srv, anyPort).endpoint
	pool := NewPool(Held(held(b, authority, pki.MasterIdentity(gridID, "m"))), nil)
	b.Cleanup(pool.Close)

	server, client := bareMutualTLS(b)
	bareSrv := grpc.NewServer(grpc.Creds(credentials.NewTLS(server)))
	sutrav1.RegisterGridAgentServer(bareSrv, &agent{})
	bare := serve(b, bareSrv, anyPort).endpoint

	call := func(cc grpc.ClientConnInterface) {
		if _, err := sutrav1.NewGridAgentClient(cc).ListNodes(b.Context(), &sutrav1.GridAgentListNodesRequest{}); err != nil {
			b.Fatal(err)
		}
	}
	versus(b, [2]string{"bare", "grid"}, [2]func(){
		func() {
			cc, err := grpc.NewClient("passthrough:///"+bare, grpc.WithTransportCredentials(credentials.NewTLS(client)))
			if err != nil {
				b.Fatal(err)
			}
			call(cc)
			_ = cc.Close()
		},
		func() {
			call(pool.Agent("agent-001", grid))
			pool.Drop("agent-001")
		},
	})
}

// BenchmarkPooledCall is a call on a connection that is there.
func BenchmarkPooledCall(b *testing.B) {
	authority := newAuthority(b, gridID)
	call := func(own, callers *pki.Holder) func() {
		srv := NewServer(zerolog.Nop(), nil, Guard{Credentials: own})
		sutrav1.RegisterGridAgentServer(srv, &agent{})
		endpoint := serve(b, srv, anyPort).endpoint
		pool := NewPool(Held(callers), nil)
		b.Cleanup(pool.Close)
		return func() {
			if _, err := sutrav1.NewGridAgentClient(pool.Agent("agent-001", endpoint)).ListNodes(b.Context(), &sutrav1.GridAgentListNodesRequest{}); err != nil {
				b.Fatal(err)
			}
		}
	}
	versus(b, [2]string{"plain", "tls"}, [2]func(){
		call(nil, nil),
		call(held(b, authority, pki.AgentIdentity(gridID, "agent-001")), held(b, authority, pki.MasterIdentity(gridID, "m"))),
	})
}

// bareMutualTLS are both ends of a connection as Go's documentation has them.
func bareMutualTLS(b *testing.B) (server, client *tls.Config) {
	b.Helper()
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			b.Fatal(err)
		}
		return k
	}
	sign := func(cert, by *x509.Certificate, of, with *ecdsa.PrivateKey) *x509.Certificate {
		cert.NotBefore, cert.NotAfter, cert.BasicConstraintsValid = time.Now().Add(-time.Hour), time.Now().Add(time.Hour), true
		der, err := x509.CreateCertificate(rand.Reader, cert, by, of.Public(), with)
		if err != nil {
			b.Fatal(err)
		}
		made, err := x509.ParseCertificate(der)
		if err != nil {
			b.Fatal(err)
		}
		return made
	}
	rootKey := key()
	self := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}
	root := sign(self, self, rootKey, rootKey)
	roots := x509.NewCertPool()
	roots.AddCert(root)
	end := func(n int64, use x509.ExtKeyUsage) tls.Certificate {
		k := key()
		leaf := sign(&x509.Certificate{
			SerialNumber: big.NewInt(n), DNSNames: []string{"end"}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{use},
		}, root, k, rootKey)
		return tls.Certificate{Certificate: [][]byte{leaf.Raw}, PrivateKey: k, Leaf: leaf}
	}
	server = &tls.Config{
		MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{end(2, x509.ExtKeyUsageServerAuth)}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots,
	}
	return server, &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{end(3, x509.ExtKeyUsageClientAuth)}, RootCAs: roots, ServerName: "end"}
}
