package rpc

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
)

func TestCheckStoragePath(t *testing.T) {
	for path, want := range map[string]string{
		"/var/lib/storage":                   "",
		"/a":                                 "",
		"/a/./b//c/":                         "",
		"/with spaces/and-ümlauts":           "",
		"/a/..b/c..":                         "",
		"/a/...":                             "",
		"/" + strings.Repeat("x", maxPath-1): "",
		"":                                   "must be absolute, for example /var/lib/storage",
		"relative":                           "must be absolute, for example /var/lib/storage",
		"./a":                                "must be absolute, for example /var/lib/storage",
		"~/a":                                "must be absolute, for example /var/lib/storage",
		"..":                                 "must be absolute, for example /var/lib/storage",
		"/a/../b":                            `must not contain ".."`,
		"/..":                                `must not contain ".."`,
		"/a/..":                              `must not contain ".."`,
		"/a\x00b":                            "must not contain control characters",
		"/a\nb":                              "must not contain control characters",
		"/a\x7f":                             "must not contain control characters",
		"/a\xff":                             "must be valid UTF-8",
		"/":                                  "must not be the root folder",
		"//./":                               "must not be the root folder",
		"/" + strings.Repeat("x", maxPath):   "is too long",
		"/" + strings.Repeat("./", maxPath) + "a": "is too long",
	} {
		err := CheckStoragePath(path)
		if want == "" {
			if err != nil {
				t.Errorf("%.40q: %v", path, err)
			}
			continue
		}
		e := AsError(err)
		if e == nil {
			t.Errorf("%.40q passes, want %q", path, want)
			continue
		}
		if e.Message != "storage_path "+want || e.Reason != InvalidArgument || len(e.Violations) != 1 ||
			e.Violations[0] != (Violation{"storage_path", want}) || e.Meta["storage_path"] != path {
			t.Errorf("%.40q: got %+v, want %q", path, e, want)
		}
	}
}

func TestCheckPort(t *testing.T) {
	for port, want := range map[int]string{
		-1: "out of range", 0: "no port", 80: "privileged", 1023: "privileged", 1024: "", 50051: "", 65535: "", 65536: "out of range",
	} {
		if why := CheckPort(port); !strings.Contains(why, want) || (why == "") != (want == "") {
			t.Errorf("%d: %q, want %q", port, why, want)
		}
	}
}

func TestInvalid(t *testing.T) {
	e := Invalid(Violation{"port", "is privileged"}, Violation{"agent_id", "is empty"})
	if e.Message != "port is privileged; agent_id is empty" || e.Code() != codes.InvalidArgument || len(e.Violations) != 2 {
		t.Errorf("got %+v", e)
	}
}

func FuzzCheckStoragePath(f *testing.F) {
	for _, seed := range []string{"/var/lib/storage", "", "..", "/a/../b", "/\xff", "/a\x00", "//", "/a/./b"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		err := CheckStoragePath(path)
		if err == nil {
			clean := filepath.Clean(path)
			if !filepath.IsAbs(path) || clean == "/" || len(path) > maxPath || strings.Contains("/"+path+"/", "/../") ||
				strings.ToValidUTF8(path, "?") != path || strings.ContainsAny(path, "\x00\n\r\t\x1b\x7f") {
				t.Errorf("%q passes", path)
			}
			if !Overlap(path, clean) || CheckStoragePath(clean) != nil {
				t.Errorf("%q passes, but isn't taken for %q", path, clean)
			}
			return
		}
		var e *Error
		if !errors.As(err, &e) || e.Reason != InvalidArgument || len(e.Violations) != 1 {
			t.Fatalf("%q: %#v", path, err)
		}
		if !answered(e) {
			t.Errorf("%q: the error's details don't travel", path)
		}
	})
}
