package storage

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/rs/zerolog"
	"pgregory.net/rapid"
)

func TestPutGetHeadDelete(t *testing.T) {
	c, _ := start(t, t.TempDir())
	c.expect(404, "GET", "/kv/k", "")
	c.expect(404, "HEAD", "/kv/k", "")
	c.expect(204, "DELETE", "/kv/k", "")
	c.expect(204, "PUT", "/kv/k", "one")
	c.expect(204, "PUT", "/kv/k", "two\x00\xff")
	a := c.expect(200, "GET", "/kv/k", "")
	if string(a.body) != "two\x00\xff" || a.header.Get("Content-Type") != "application/octet-stream" {
		t.Errorf("got %q as %s", a.body, a.header.Get("Content-Type"))
	}
	a = c.expect(200, "HEAD", "/kv/k", "")
	if len(a.body) != 0 || a.header.Get("Content-Length") != "5" {
		t.Errorf("HEAD: body %q, length %s, want none and 5", a.body, a.header.Get("Content-Length"))
	}
	if n := c.count(); n != 1 {
		t.Errorf("%d keys, want 1", n)
	}
	c.expect(204, "DELETE", "/kv/k", "")
	c.expect(404, "GET", "/kv/k", "")
	c.expect(204, "PUT", "/kv/empty", "")
	c.expect(204, "PUT", "/kv/empty", "")
	c.expectValue("/kv/empty", "")
	if n := c.count(); n != 1 {
		t.Errorf("%d keys, want 1", n)
	}
	want := `{"status":"ok","node_id":"node-1","keys":1}` + "\n"
	if a := c.expect(200, "GET", "/healthz", ""); string(a.body) != want || a.header.Get("Content-Type") != "application/json" {
		t.Errorf("health is %s as %s, want %s", a.body, a.header.Get("Content-Type"), want)
	}
}

func TestOddKeysStayAsTheyAre(t *testing.T) {
	keys := []string{
		"a//b", "../x", "..", ".", "./", "a/./b", "a/../b", "/", "//", "a/", "/a", "%", "%2F", "?", "?limit=1", "#", "a b", "a+b", ";",
		"ключ", "\x00", "a\nb", `quote"\`, "<&>\u2028", "kv", "healthz", strings.Repeat("k", maxKeyBytes), strings.Repeat("é", maxKeyBytes/2),
	}
	c, stop := start(t, t.TempDir())
	for i, key := range keys {
		c.expect(204, "PUT", "/kv/"+url.PathEscape(key), strconv.Itoa(i))
	}
	for i, key := range keys {
		c.expectValue("/kv/"+url.PathEscape(key), strconv.Itoa(i))
	}
	// Unescaped on the wire they are the same keys.
	for _, key := range []string{"a//b", "../x", "..", ".", "./", "a/./b", "a/../b", "/", "//", "a/", "/a"} {
		c.expectValue("/kv/"+key, strconv.Itoa(slices.Index(keys, key)))
	}
	sorted := slices.Sorted(slices.Values(keys))
	if got := c.list(""); !slices.Equal(got.Keys, sorted) || got.Next != nil {
		t.Errorf("list is %q, next %v, want %q", got.Keys, got.Next, sorted)
	}
	for _, key := range keys {
		c.expect(204, "DELETE", "/kv/"+url.PathEscape(key), "")
	}
	if got := c.list(""); len(got.Keys) != 0 || c.count() != 0 {
		t.Errorf("%q and a count of %d are left", got.Keys, c.count())
	}
	stop()
}

func TestRefusedRequests(t *testing.T) {
	c, _ := start(t, t.TempDir())
	c.expect(204, "PUT", "/kv/k", "v")
	long := strings.Repeat("k", maxKeyBytes+1)
	for _, tc := range []struct {
		code           int
		method, target string
	}{
		{400, "PUT", "/kv/"},
		{400, "GET", "/kv/"},
		{400, "DELETE", "/kv/"},
		{400, "PUT", "/kv/" + long},
		{400, "GET", "/kv/" + long},
		{400, "PUT", "/kv/%ff"},
		{400, "PUT", "/kv/a%C3"},
		{404, "GET", "/"},
		{404, "PUT", "/kvk"},
		{404, "GET", "/healthz/"},
		{404, "GET", "//kv/k"},
		{404, "GET", "/x/../kv/k"},
		{400, "GET", "/kv?limit=0"},
		{400, "GET", "/kv?limit=-1"},
		{400, "GET", "/kv?limit=10001"},
		{400, "GET", "/kv?limit="},
		{400, "GET", "/kv?limit=1x"},
		{400, "GET", "/kv?limit=99999999999999999999"},
		{400, "GET", "/kv?prefix=%zz"},
		{400, "GET", "/kv?a;b"},
	} {
		c.expect(tc.code, tc.method, tc.target, "v")
	}
	for target, allow := range map[string]string{"/kv/k": "GET, HEAD, PUT, DELETE", "/kv": "GET, HEAD", "/healthz": "GET, HEAD"} {
		for _, method := range []string{"POST", "PATCH", "OPTIONS", "TRACE", "PUT", "DELETE"} {
			if strings.Contains(allow, method) {
				continue
			}
			if a := c.expect(405, method, target, ""); a.header.Get("Allow") != allow {
				t.Errorf("%s %s: Allow is %q, want %q", method, target, a.header.Get("Allow"), allow)
			}
		}
	}
	if a := c.do("GET", "/kv?prefix="+strings.Repeat("p", 2*maxHeaderBytes), ""); a.code != 431 {
		t.Errorf("a header beyond the limit was answered %d, want 431", a.code)
	}
	if got := c.list(""); !slices.Equal(got.Keys, []string{"k"}) {
		t.Errorf("keys are %q, want only k", got.Keys)
	}
	c.expectValue("/kv/k", "v")
}

func TestLargestValue(t *testing.T) {
	c, _ := start(t, t.TempDir())
	largest := strings.Repeat("0123456789abcdef", maxValueBytes/16)
	c.expect(204, "PUT", "/kv/k", largest)
	c.expectValue("/kv/k", largest)
	c.expect(413, "PUT", "/kv/k", largest+"x")
	// Without a length the excess shows at its end only.
	a, err := c.try("PUT", "/kv/k", io.MultiReader(strings.NewReader(largest), strings.NewReader("x")))
	if err != nil || a.code != 413 {
		t.Errorf("chunked: %d, %v, want 413", a.code, err)
	}
	c.expectValue("/kv/k", largest)
}

func TestAHalfSentValueIsNotStored(t *testing.T) {
	c, _ := start(t, t.TempDir())
	c.expect(204, "PUT", "/kv/k", "old")
	conn, err := net.Dial("tcp", strings.TrimPrefix(c.base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "PUT /kv/k HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if err != nil || !bytes.HasPrefix(got, []byte("HTTP/1.1 400")) {
		t.Errorf("answered %q, %v, want 400", got, err)
	}
	c.expectValue("/kv/k", "old")
}

// TestListEqualsAModel fills a store, pages through it and compares the pages'
// sum with a sorted, filtered slice.
func TestListEqualsAModel(t *testing.T) {
	word := rapid.StringOfN(rapid.SampledFrom([]rune("ab/é")), 0, 4, -1)
	rapid.Check(t, func(r *rapid.T) {
		s, err := New(Config{Listener: loopback(t), Path: t.TempDir(), Log: zerolog.Nop()})
		if err != nil {
			r.Fatal(err)
		}
		defer func() {
			if err := s.store.close(); err != nil {
				r.Error(err)
			}
		}()
		h := s.handler()
		request := func(method, target string) *httptest.ResponseRecorder {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(method, target, http.NoBody))
			return w
		}
		all := rapid.SliceOfN(rapid.StringOfN(rapid.SampledFrom([]rune("ab/é")), 1, 4, -1), 0, 30).Draw(r, "keys")
		dropped := rapid.SliceOfN(word, 0, 5).Draw(r, "dropped")
		var writers sync.WaitGroup
		for _, key := range all {
			writers.Go(func() { request("PUT", "/kv/"+url.PathEscape(key)) })
		}
		writers.Wait()
		for _, key := range dropped {
			request("DELETE", "/kv/"+url.PathEscape(key))
		}
		prefix, after := word.Draw(r, "prefix"), word.Draw(r, "after")
		var want []string
		stored := slices.DeleteFunc(slices.Compact(slices.Sorted(slices.Values(all))), func(key string) bool { return slices.Contains(dropped, key) })
		for _, key := range stored {
			if strings.HasPrefix(key, prefix) && key > after {
				want = append(want, key)
			}
		}

		limit := rapid.IntRange(1, 12).Draw(r, "limit")
		var got []string
		for from := &after; from != nil; {
			q := url.Values{"prefix": {prefix}, "after": {*from}, "limit": {strconv.Itoa(limit)}}
			w := request("GET", "/kv?"+q.Encode())
			var page keyPage
			if err := json.Unmarshal(w.Body.Bytes(), &page); err != nil || page.Keys == nil {
				r.Fatalf("page %s: %v", w.Body, err)
			}
			if len(page.Keys) > limit || (page.Next != nil && len(page.Keys) != limit) {
				r.Fatalf("page of %d keys at limit %d, next %v", len(page.Keys), limit, page.Next)
			}
			got, from = append(got, page.Keys...), page.Next
		}
		if !slices.Equal(got, want) {
			r.Fatalf("pages hold %q, want %q", got, want)
		}
		if n, err := s.store.count(); err != nil || int(n) != len(stored) {
			r.Fatalf("count is %d, %v, want %d", n, err, len(stored))
		}
	})
}

func TestListLimits(t *testing.T) {
	c, _ := start(t, t.TempDir())
	var writers sync.WaitGroup
	for i := range 1001 {
		writers.Go(func() {
			if a, err := c.try("PUT", fmt.Sprintf("/kv/%04d", i), http.NoBody); err != nil || a.code != http.StatusNoContent {
				t.Errorf("put %d: %d, %v, want 204", i, a.code, err)
			}
		})
		if i%50 == 0 {
			writers.Wait()
		}
	}
	writers.Wait()
	if got := c.list(""); len(got.Keys) != 1000 || got.Next == nil || *got.Next != "0999" {
		t.Errorf("%d keys by default, next %v, want 1000 and 0999", len(got.Keys), got.Next)
	}
	if got := c.list("?limit=10000"); len(got.Keys) != 1001 || got.Next != nil {
		t.Errorf("%d keys at the largest limit, want 1001 and no next", len(got.Keys))
	}
	if got := c.list("?limit=1001"); len(got.Keys) != 1001 || got.Next != nil {
		t.Errorf("%d keys at a limit that just holds them, next %v", len(got.Keys), got.Next)
	}
}
