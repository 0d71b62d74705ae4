package nodes

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/proto"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// wanted is a folder with a file a node, which says what was wanted of it: for when the records are damaged or gone and the
// node's process lives. That is why nothing is synced: a copy needn't outlive its host's end.
type wanted string

func (w wanted) path(id string) string { return filepath.Join(string(w), id) }

func (w wanted) keep(node *sutrav1.Node) error {
	data, err := proto.Marshal(node)
	if err != nil {
		return fmt.Errorf("encode what is wanted of %s: %w", node.GetNodeId(), err)
	}
	err = os.WriteFile(w.path(node.GetNodeId()), data, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		err = errors.Join(os.MkdirAll(string(w), 0o700), os.WriteFile(w.path(node.GetNodeId()), data, 0o600))
	}
	if err != nil {
		return fmt.Errorf("copy what is wanted of %s: %w", node.GetNodeId(), err)
	}
	return nil
}

// complete writes a copy where there is none.
func (w wanted) complete(node *sutrav1.Node) error {
	if _, err := os.Lstat(w.path(node.GetNodeId())); !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return w.keep(node)
}

func (w wanted) read(id string) (*sutrav1.Node, error) {
	data, err := os.ReadFile(w.path(id))
	if err != nil {
		return nil, err
	}
	node := &sutrav1.Node{}
	if err := proto.Unmarshal(data, node); err != nil {
		return nil, fmt.Errorf("read what was wanted of %s: %w", id, err)
	}
	if of := node.GetNodeId(); of != id {
		return nil, fmt.Errorf("read what was wanted of %s: %s is of %q", id, w.path(id), of)
	}
	return node, nil
}

func (w wanted) drop(id string) error {
	if err := os.Remove(w.path(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// dropOthers removes the copies of nodes that aren't among the known ones.
func (w wanted) dropOthers(known map[string]bool) error {
	files, err := os.ReadDir(string(w))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, f := range files {
		if !known[f.Name()] {
			err = errors.Join(err, w.drop(f.Name()))
		}
	}
	return err
}
