package storage

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unicode/utf8"
)

const (
	maxKeyBytes   = 1024
	maxValueBytes = 8 << 20
	defaultLimit  = 1000
	maxLimit      = 10_000
)

// handler routes by itself: a ServeMux would clean paths, and keys such as
// "a//b" and "../x" with them.
func (s *Server) handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key, isKey := strings.CutPrefix(r.URL.Path, "/kv/")
		switch {
		case isKey:
			s.serveKey(w, r, key)
		case r.URL.Path == "/kv":
			s.serveList(w, r)
		case r.URL.Path == "/healthz":
			s.serveHealth(w, r)
		default:
			fail(w, http.StatusNotFound, "no such page: use /kv/KEY, /kv or /healthz")
		}
	})
}

func (s *Server) serveKey(w http.ResponseWriter, r *http.Request, key string) {
	if !allowed(w, r, http.MethodGet, http.MethodHead, http.MethodPut, http.MethodDelete) {
		return
	}
	if key == "" || len(key) > maxKeyBytes {
		fail(w, http.StatusBadRequest, fmt.Sprintf("the key has %d bytes: it must have 1 to %d", len(key), maxKeyBytes))
		return
	}
	if !utf8.ValidString(key) {
		fail(w, http.StatusBadRequest, "the key is not valid UTF-8: encode it, for example as base64url")
		return
	}
	switch r.Method {
	case http.MethodPut:
		s.put(w, r, key)
	case http.MethodDelete:
		s.answerWrite(w, s.store.remove(key))
	default:
		s.get(w, key)
	}
}

func (s *Server) put(w http.ResponseWriter, r *http.Request, key string) {
	value, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxValueBytes))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		fail(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("the value is larger than %d bytes: split it", maxValueBytes))
		return
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		fail(w, http.StatusRequestTimeout, fmt.Sprintf("the value did not arrive within %s: send it again", readTimeout))
	case err != nil:
		fail(w, http.StatusBadRequest, "the value did not arrive whole: send it again")
	default:
		s.answerWrite(w, s.store.put(key, value))
	}
}

func (s *Server) get(w http.ResponseWriter, key string) {
	value, ok, err := s.store.get(key)
	switch {
	case err != nil:
		s.failInternal(w, "read", err)
	case !ok:
		fail(w, http.StatusNotFound, "no such key")
	default:
		// The length makes an answer that was cut short one that the client can tell. To a HEAD the body isn't sent.
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Content-Length", strconv.Itoa(len(value)))
		_, _ = w.Write(value)
	}
}

func (s *Server) answerWrite(w http.ResponseWriter, err error) {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		if !s.full.Swap(true) {
			s.cfg.Log.Error().Err(err).Str("path", s.cfg.Path).Msg("disk full: writes are refused until there is room")
		}
		fail(w, http.StatusInsufficientStorage, "the disk is full: make room and try again")
	case err != nil:
		s.failInternal(w, "write", err)
	default:
		if s.full.Load() && s.full.Swap(false) {
			s.cfg.Log.Info().Str("path", s.cfg.Path).Msg("the disk has room again")
		}
		w.WriteHeader(http.StatusNoContent)
	}
}

func (s *Server) serveList(w http.ResponseWriter, r *http.Request) {
	if !allowed(w, r, http.MethodGet, http.MethodHead) {
		return
	}
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		fail(w, http.StatusBadRequest, "the query is malformed: percent-encode prefix and after")
		return
	}
	limit := defaultLimit
	if query.Has("limit") {
		limit, err = strconv.Atoi(query.Get("limit"))
		if err != nil || limit < 1 || limit > maxLimit {
			fail(w, http.StatusBadRequest, fmt.Sprintf("limit is %q: it must be a number from 1 to %d", query.Get("limit"), maxLimit))
			return
		}
	}
	keys, more, err := s.store.list(query.Get("prefix"), query.Get("after"), limit)
	if err != nil {
		s.failInternal(w, "list", err)
		return
	}
	var page struct {
		Keys []string `json:"keys"`
		// Next is the value of after for the next page; empty on the last one.
		Next string `json:"next,omitempty"`
	}
	page.Keys = keys
	if more {
		page.Next = keys[len(keys)-1]
	}
	answer(w, http.StatusOK, page)
}

func (s *Server) serveHealth(w http.ResponseWriter, r *http.Request) {
	if !allowed(w, r, http.MethodGet, http.MethodHead) {
		return
	}
	keys, err := s.store.count()
	if err != nil {
		s.failInternal(w, "count", err)
		return
	}
	answer(w, http.StatusOK, struct {
		Status string `json:"status"`
		NodeID string `json:"node_id"`
		Keys   uint64 `json:"keys"`
	}{"ok", s.cfg.NodeID, keys})
}

// allowed answers a request with any other method.
func allowed(w http.ResponseWriter, r *http.Request, methods ...string) bool {
	for _, m := range methods {
		if r.Method == m {
			return true
		}
	}
	allow := strings.Join(methods, ", ")
	w.Header().Set("Allow", allow)
	fail(w, http.StatusMethodNotAllowed, fmt.Sprintf("method %s is not for this page: use %s", r.Method, allow))
	return false
}

func (s *Server) failInternal(w http.ResponseWriter, what string, err error) {
	s.cfg.Log.Error().Err(err).Str("path", s.cfg.Path).Msg("could not " + what)
	fail(w, http.StatusInternalServerError, fmt.Sprintf("could not %s: %v: the server's log says more", what, err))
}

func fail(w http.ResponseWriter, code int, message string) {
	answer(w, code, struct {
		Error string `json:"error"`
	}{message})
}

// answer ignores the error of writing: it says that the client is gone.
func answer(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(body)
}
