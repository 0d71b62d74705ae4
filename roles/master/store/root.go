package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/sutra-grid/sutra/config"
)

// RootFile names the file with the SHA-256 of the root by which the grid gives its certificates. It lies beside etcd and not in
// it: an operator whose root is lost for good removes it to say so.
func (s *Store) RootFile() string { return filepath.Join(s.dir, "root.sha256") }

// Root is what SaveRoot wrote last; empty where that was nothing yet.
func (s *Store) Root() (string, error) {
	data, err := os.ReadFile(s.RootFile())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read which root the grid has: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

// SaveRoot writes by which root the grid gives its certificates, durably.
func (s *Store) SaveRoot(root string) error {
	if is, err := s.Root(); err == nil && is == root {
		return nil
	}
	if err := config.WriteFile(s.RootFile(), []byte(root+"\n")); err != nil {
		return fmt.Errorf("write which root the grid has: %w", err)
	}
	return nil
}
