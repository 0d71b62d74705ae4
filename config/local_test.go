package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestLockIsOnes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := Lock(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Lock(path); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), fmt.Sprintf("pid %d", os.Getpid())) {
		t.Errorf("the second lock: %v", err)
	}
	// Who holds it may be about to let it go.
	time.AfterFunc(200*time.Millisecond, func() {
		if err := unlock(); err != nil {
			t.Error(err)
		}
	})
	again, err := Lock(path)
	if err != nil {
		t.Fatalf("the lock after the first: %v", err)
	}
	if err := again(); err != nil {
		t.Error(err)
	}
}

func TestAbandoned(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	if Abandoned(path) {
		t.Error("a lock that nobody took is abandoned")
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("the question made the file")
	}
	unlock, err := Lock(path)
	if err != nil {
		t.Fatal(err)
	}
	if Abandoned(path) {
		t.Error("a lock that is held is abandoned")
	}
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
	if !Abandoned(path) {
		t.Error("a lock that nobody holds isn't abandoned")
	}
}
