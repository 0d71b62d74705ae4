package storage

import (
	"context"
	"errors"
	"fmt"
	"log" //nolint:depguard // for the type that http.Server.ErrorLog has; it writes to the given logger
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"
)

const (
	headerTimeout = 5 * time.Second
	// readTimeout bounds a whole request, and so lets the largest value in at 140 kB/s or more.
	readTimeout = time.Minute
	// writeTimeout counts from the end of the header: it leaves half a minute to answer the slowest request.
	writeTimeout = readTimeout + 30*time.Second
	idleTimeout  = 2 * time.Minute
	// maxHeaderBytes holds a listing's longest prefix and after, percent-encoded, twice over.
	maxHeaderBytes = 16 << 10
	// stopTimeout is how long the requests under way may take once the server is to stop.
	stopTimeout = 5 * time.Second
)

// Config is what a Server needs.
type Config struct {
	// Listener accepts the clients. The server closes it once it runs.
	Listener net.Listener
	// Path is the folder of the data; made, for this user alone, where it is missing.
	Path string
	// NodeID is told by /healthz; may be empty.
	NodeID string
	Log    zerolog.Logger
}

// Server is a key-value server. See the package for what it serves.
type Server struct {
	cfg   Config
	store *store
	// full says that the last write found no room, so that a full disk is logged once and not at each write.
	full atomic.Bool
}

// New opens the store, which stays open until Run returns. It refuses a path
// that another server has open, that can't be made or written, and a file that
// is damaged. The listener is the caller's until Run.
func New(cfg Config) (*Server, error) {
	if cfg.Listener == nil {
		return nil, errors.New("storage server: no listener")
	}
	if cfg.Path == "" {
		return nil, errors.New("storage server: no storage path: name the folder for its data")
	}
	store, err := openStore(cfg.Path)
	if err != nil {
		return nil, err
	}
	return &Server{cfg: cfg, store: store}, nil
}

// Run serves until the context ends, then lets the requests under way end for at
// most 5 s, cuts off the rest, and closes the store. It is called once.
func (s *Server) Run(ctx context.Context) error {
	var conns sync.WaitGroup
	srv := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          log.New(s.cfg.Log, "", 0),
		// Neither Shutdown after its time-out nor Close waits for the handlers, which use the store.
		ConnState: func(_ net.Conn, state http.ConnState) {
			switch state {
			case http.StateNew:
				conns.Add(1)
			case http.StateClosed:
				conns.Done()
			}
		},
	}
	s.cfg.Log.Info().Stringer("address", s.cfg.Listener.Addr()).Str("path", s.cfg.Path).Str("node_id", s.cfg.NodeID).
		Msg("storage server listening")
	served := make(chan error, 1)
	go func() { served <- srv.Serve(s.cfg.Listener) }()

	var err error
	select {
	case <-ctx.Done():
		s.shutdown(ctx, srv)
		err = <-served
	case err = <-served:
		_ = srv.Close()
	}
	if errors.Is(err, http.ErrServerClosed) {
		err = nil
	} else {
		err = fmt.Errorf("serve storage on %s: %w", s.cfg.Listener.Addr(), err)
	}
	// All connections were counted in before Serve returned.
	conns.Wait()
	return errors.Join(err, s.store.close())
}

func (s *Server) shutdown(ctx context.Context, srv *http.Server) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	if err := srv.Shutdown(ctx); err != nil {
		s.cfg.Log.Warn().Err(err).Dur("after", stopTimeout).Msg("cutting off the clients that are still connected")
		_ = srv.Close()
	}
}
