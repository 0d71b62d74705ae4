// Package pki is a grid's own public-key infrastructure: an authority that signs, identities that it vouches for, tokens
// to join with, and the TLS of every connection. All keys are ECDSA P-256, all connections TLS 1.3.
package pki

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"strings"

	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
)

// Kind is what an identity is one of.
type Kind string

// The kinds of identities.
const (
	Master Kind = "master"
	Agent  Kind = "agent"
	User   Kind = "user"
)

// Identity is whom a certificate of a grid names. The zero Identity is nobody.
type Identity struct {
	// Grid is the grid's id.
	Grid string
	Kind Kind
	// Name of a master or a user, agent_id of an agent: letters, digits, - _ and . as in all ids.
	Name string
	// Role is what it may do. That of a master or an agent follows from its kind.
	Role sutrav1.Role
}

// URI is the identity's SPIFFE ID: spiffe://GRID/KIND/NAME.
func (id Identity) URI() *url.URL {
	return &url.URL{Scheme: "spiffe", Host: id.Grid, Path: "/" + string(id.Kind) + "/" + id.Name}
}

// String is how messages call it, for example "agent agent-001".
func (id Identity) String() string {
	if id == (Identity{}) {
		return "nobody"
	}
	return string(id.Kind) + " " + id.Name
}

// userRoles are what people may be, by the word that stands in a certificate.
func userRoles() map[string]sutrav1.Role {
	return map[string]sutrav1.Role{
		"viewer": sutrav1.Role_ROLE_VIEWER, "operator": sutrav1.Role_ROLE_OPERATOR, "admin": sutrav1.Role_ROLE_ADMIN,
	}
}

// RoleWord is a role as people write it, for example "operator".
func RoleWord(r sutrav1.Role) string {
	return strings.ToLower(strings.TrimPrefix(r.String(), "ROLE_"))
}

// validate tells whether a certificate can say this.
func (id Identity) validate() error {
	if !isName(id.Grid) || !isName(id.Name) {
		return fmt.Errorf("neither grid %q nor name %q may have more than letters, digits, - _ and ., 1 to 64 of them", id.Grid, id.Name)
	}
	switch id.Kind {
	case Master, Agent:
		if id.Role != roleOf(id.Kind) {
			return fmt.Errorf("%s can't have the role %s", id, RoleWord(id.Role))
		}
	case User:
		if userRoles()[RoleWord(id.Role)] != id.Role || id.Role == sutrav1.Role_ROLE_UNSPECIFIED {
			return fmt.Errorf("%s can't have the role %s", id, RoleWord(id.Role))
		}
	default:
		return fmt.Errorf("there is no kind %q of identities", id.Kind)
	}
	return nil
}

// roleOf is the role that goes with a kind; UNSPECIFIED for users, who have one each.
func roleOf(k Kind) sutrav1.Role {
	switch k {
	case Master:
		return sutrav1.Role_ROLE_MASTER
	case Agent:
		return sutrav1.Role_ROLE_AGENT
	default:
		return sutrav1.Role_ROLE_UNSPECIFIED
	}
}

// MasterIdentity names a master.
func MasterIdentity(grid, name string) Identity {
	return Identity{Grid: grid, Kind: Master, Name: name, Role: sutrav1.Role_ROLE_MASTER}
}

// AgentIdentity names an agent.
func AgentIdentity(grid, id string) Identity {
	return Identity{Grid: grid, Kind: Agent, Name: id, Role: sutrav1.Role_ROLE_AGENT}
}

// UserIdentity names a person or a program, with its role.
func UserIdentity(grid, name string, role sutrav1.Role) Identity {
	return Identity{Grid: grid, Kind: User, Name: name, Role: role}
}

// isName is the rule for ids of package config, which this one can't import.
func isName(s string) bool {
	odd := strings.IndexFunc(s, func(r rune) bool {
		return ('a' > r || r > 'z') && ('A' > r || r > 'Z') && ('0' > r || r > '9') && !strings.ContainsRune("-_.", r)
	})
	return odd < 0 && s != "" && len(s) <= 64 && s != "." && s != ".."
}

// identityOf reads whom a certificate names. It doesn't verify it.
func identityOf(cert *x509.Certificate) (Identity, error) {
	if len(cert.URIs) != 1 || len(cert.IPAddresses)+len(cert.EmailAddresses) > 0 {
		return Identity{}, errors.New("it names no identity of a grid: one URI is wanted, and nothing beside it")
	}
	uri := cert.URIs[0]
	for _, name := range cert.DNSNames {
		if name != uri.Host { // that of its grid, which servers have
			return Identity{}, fmt.Errorf("it names no identity of a grid: it has a name beside it, %q", name)
		}
	}
	parts := strings.Split(uri.Path, "/")
	if uri.Scheme != "spiffe" || len(parts) != 3 || parts[0] != "" {
		return Identity{}, fmt.Errorf("%q is no identity of a grid", uri)
	}
	id := Identity{Grid: uri.Host, Kind: Kind(parts[1]), Name: parts[2], Role: roleOf(Kind(parts[1]))}
	words := cert.Subject.Organization
	switch {
	case id.Kind == User && len(words) == 1:
		id.Role = userRoles()[words[0]]
	case id.Kind == User || len(words) > 0:
		return Identity{}, fmt.Errorf("%q comes with %d roles", uri, len(words))
	}
	if err := id.validate(); err != nil {
		return Identity{}, fmt.Errorf("%q is no identity of a grid: %w", uri, err)
	}
	if id.URI().String() != uri.String() { // a port, a query, an escaped letter
		return Identity{}, fmt.Errorf("%q is no identity of a grid: it says more than %q", uri, id.URI())
	}
	return id, nil
}
