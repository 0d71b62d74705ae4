package store

import (
	"context"
	"errors"
	"fmt"

	"go.uber.org/zap/zapcore"
)

// fatalHook stands where etcd would end the process or panic: it reports the reason
// once and holds the goroutine for good. To let it go on or unwind would run etcd on
// a state that it has just declared impossible.
type fatalHook struct {
	// Ends with etcd; its cause is the reason.
	alive context.Context
	end   context.CancelCauseFunc
	// Holds one error; what comes later follows from it.
	errc chan error
}

func newFatalHook() *fatalHook {
	h := &fatalHook{errc: make(chan error, 1)}
	h.alive, h.end = context.WithCancelCause(context.Background())
	return h
}

// OnWrite implements zapcore.CheckWriteHook. It doesn't return.
func (h *fatalHook) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	err := errors.New(e.Message)
	for _, f := range fields {
		if cause, ok := f.Interface.(error); ok {
			err = fmt.Errorf("%s: %w", e.Message, cause)
		}
	}
	h.end(fmt.Errorf("etcd failed: %w", err))
	select {
	case h.errc <- h.err():
	default:
	}
	select {}
}

// failed is closed once etcd can't go on.
func (h *fatalHook) failed() <-chan struct{} { return h.alive.Done() }

// err is what etcd failed with, nil as long as it hasn't.
func (h *fatalHook) err() error { return context.Cause(h.alive) }

// bind returns a context for one call to etcd that ends when etcd fails, so that no
// caller waits for what will never be answered. The caller must call release.
func (h *fatalHook) bind(ctx context.Context) (bound context.Context, release func()) {
	bound, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(h.alive, cancel)
	return bound, func() {
		stop()
		cancel()
	}
}
