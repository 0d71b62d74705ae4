package config

import (
	"errors"
	"fmt"
	"os/user"
	"slices"
	"strconv"
	"strings"
)

// Account is a user of this host with the groups that a process of it is in.
type Account struct {
	// Name is what the file calls it.
	Name     string
	UID, GID uint32
	// Groups are all of its groups, in order.
	Groups []uint32
}

// account finds a user by "user" or "user:group", each by name or number. Without a group it is in all of its own; with one, in
// that alone. Names are those of /etc/passwd and /etc/group.
func account(s string) (*Account, error) {
	if s == "" {
		return nil, nil // as the agent
	}
	name, group, hasGroup := strings.Cut(s, ":")
	const form = `write "user" or "user:group", by name or number`
	if name == "" || hasGroup && group == "" {
		return nil, fmt.Errorf("%.80q is half an account; %s", s, form)
	}
	found, err := user.Lookup(name)
	uid, isNumber := number(name)
	if err != nil && isNumber {
		found, err = user.LookupId(name)
	}
	switch {
	case err == nil:
		if uid, isNumber = number(found.Uid); !isNumber {
			return nil, fmt.Errorf("user %.80q has the id %q, which is no number; %s", name, found.Uid, form)
		}
	case !isNumber && errors.As(err, new(user.UnknownUserError)):
		return nil, fmt.Errorf("there is no user %.80q on this host; make one, or %s", name, form)
	case !isNumber:
		return nil, fmt.Errorf("user %.80q can't be looked up: %w", name, err)
	case !hasGroup:
		return nil, fmt.Errorf("there is no user with the id %d on this host, whose groups it could have; write %d:GROUP", uid, uid)
	}
	if hasGroup {
		gid, err := groupID(group)
		if err != nil {
			return nil, err
		}
		return &Account{Name: s, UID: uid, GID: gid, Groups: []uint32{gid}}, nil
	}
	ids, err := found.GroupIds()
	gid, isNumber := number(found.Gid)
	if err == nil && !isNumber {
		err = fmt.Errorf("%q is no number", found.Gid)
	}
	if err != nil {
		return nil, fmt.Errorf("the groups of user %.80q can't be looked up (%w); write %s:GROUP", name, err, name)
	}
	a := &Account{Name: s, UID: uid, GID: gid}
	for _, id := range ids {
		if n, ok := number(id); ok {
			a.Groups = append(a.Groups, n)
		}
	}
	slices.Sort(a.Groups)
	return a, nil
}

func groupID(name string) (uint32, error) {
	found, err := user.LookupGroup(name)
	if err == nil {
		name = found.Gid
	}
	gid, isNumber := number(name)
	switch {
	case isNumber:
		return gid, nil
	case errors.As(err, new(user.UnknownGroupError)):
		return 0, fmt.Errorf("there is no group %.80q on this host; make one, or write its number", name)
	default:
		return 0, fmt.Errorf("group %.80q can't be looked up: %w", name, err)
	}
}

// number reads a user's or a group's id. The highest stands for none.
func number(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n != 1<<32-1
}
