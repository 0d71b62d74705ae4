package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Home is the folder under which a host's master, agents and clients keep what is theirs and find
// each other, as an absolute path: flag, else $SUTRA_HOME, else /var/lib/sutra for root, else
// $XDG_DATA_HOME/sutra, else ~/.local/share/sutra. It creates nothing.
func Home(flag string) (string, error) {
	return home(flag, os.Geteuid(), os.Getenv)
}

func home(flag string, uid int, getenv func(string) string) (string, error) {
	folder := flag
	if folder == "" {
		folder = getenv("SUTRA_HOME")
	}
	if folder == "" {
		return defaultHome(uid, getenv)
	}
	absolute, err := filepath.Abs(folder)
	if err != nil {
		return "", fmt.Errorf("find home folder %q: %w; give an absolute path with --home or SUTRA_HOME", folder, err)
	}
	return absolute, nil
}

func defaultHome(uid int, getenv func(string) string) (string, error) {
	if uid == 0 {
		return "/var/lib/sutra", nil
	}
	// The XDG specification wants a relative value ignored.
	if data := getenv("XDG_DATA_HOME"); filepath.IsAbs(data) {
		return filepath.Join(data, "sutra"), nil
	}
	if user := getenv("HOME"); filepath.IsAbs(user) {
		return filepath.Join(user, ".local", "share", "sutra"), nil
	}
	return "", errors.New("find home folder: neither SUTRA_HOME nor XDG_DATA_HOME nor HOME names an absolute folder; give one with --home")
}
