package config

import (
	"errors"
	"fmt"
	"strings"
)

const (
	maxIDLen = 64
	idRule   = "letters, digits, - _ and . are allowed, 1 to 64 of them"
)

// ValidID says why id cannot name an agent, a node or a profile; nil where it can. kind is what
// the message calls it, for example "agent id"; "" leaves that to the caller. An id is safe as a file name.
func ValidID(kind, id string) error {
	err := checkID(id)
	if err != nil && kind != "" {
		return fmt.Errorf("%s %w", kind, err)
	}
	return err
}

func checkID(id string) error {
	odd := strings.IndexFunc(id, func(r rune) bool { return !isIDRune(r) })
	switch {
	case id == "":
		return errors.New("is empty; " + idRule)
	case len(id) > maxIDLen:
		return fmt.Errorf("%.16q... is %d bytes long; %s", id, len(id), idRule)
	case odd >= 0:
		return fmt.Errorf("%q has %.1q in it; %s", id, id[odd:], idRule)
	case id == "." || id == "..":
		return fmt.Errorf("%q names a folder; %s, and not only dots", id, idRule)
	}
	return nil
}

func isIDRune(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("-_.", r)
}

// NameOf makes an id of a name from elsewhere, a host's or an account's: what an id can't have becomes a dash. Where nothing is left
// it is fallback.
func NameOf(name, fallback string) string {
	name = strings.Map(func(r rune) rune {
		if isIDRune(r) {
			return r
		}
		return '-'
	}, name)
	name = name[:min(len(name), maxIDLen)]
	if checkID(name) != nil {
		return fallback
	}
	return name
}
