package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/rs/xid"
)

// Token is what one joins a grid with: whoever has it gets an identity.
type Token struct {
	// Root is the SHA-256 of the grid's root certificate: one who joins verifies by it whom it sends the secret to.
	Root [sha256.Size]byte
	// ID names the token in lists. It is no secret.
	ID     string
	Secret [secretSize]byte
}

const (
	tokenPrefix = "sutra1"
	secretSize  = 32
)

// NewToken draws a token for the grid with that root.
func NewToken(root [sha256.Size]byte) (Token, error) {
	t := Token{Root: root, ID: xid.New().String()}
	if _, err := rand.Read(t.Secret[:]); err != nil {
		return Token{}, fmt.Errorf("draw a secret: %w", err)
	}
	return t, nil
}

// Encode is the token as people pass it on. It is a secret.
func (t Token) Encode() string {
	b64 := base64.RawURLEncoding
	return strings.Join([]string{tokenPrefix, b64.EncodeToString(t.Root[:]), t.ID, b64.EncodeToString(t.Secret[:])}, ":")
}

// String keeps the secret out of logs and errors.
func (t Token) String() string { return "token " + t.ID }

// GoString does so for %#v.
func (t Token) GoString() string { return t.String() }

// SecretHash is what a grid keeps of a token's secret.
func (t Token) SecretHash() []byte {
	sum := sha256.Sum256(t.Secret[:])
	return sum[:]
}

// Matches tells, in a time that doesn't depend on it, whether the token's secret has a hash.
func (t Token) Matches(hash []byte) bool {
	return subtle.ConstantTimeCompare(t.SecretHash(), hash) == 1
}

// ParseToken reads a token. The error never shows any of it.
func ParseToken(s string) (Token, error) {
	s = strings.TrimSpace(s)
	parts := strings.Split(s, ":")
	switch {
	case s == "":
		return Token{}, errors.New("the token is empty")
	case parts[0] != tokenPrefix:
		return Token{}, fmt.Errorf("that is no join token: one begins with %q", tokenPrefix+":")
	case len(parts) < 4:
		return Token{}, errors.New("the token is cut off")
	case len(parts) > 4:
		return Token{}, errors.New("there is more than a token")
	}
	t := Token{ID: parts[2]}
	if _, err := xid.FromString(t.ID); err != nil {
		return Token{}, errors.New("the token's id is damaged")
	}
	for _, part := range []struct {
		name, text string
		to         []byte
	}{{"root", parts[1], t.Root[:]}, {"secret", parts[3], t.Secret[:]}} {
		want := base64.RawURLEncoding.EncodedLen(len(part.to))
		if len(part.text) < want {
			return Token{}, fmt.Errorf("the token is cut off: its %s has %d of %d characters", part.name, len(part.text), want)
		}
		got, err := base64.RawURLEncoding.Strict().DecodeString(part.text) // which skips line breaks
		if err != nil || len(part.text) > want || len(got) != len(part.to) {
			return Token{}, fmt.Errorf("the token's %s is damaged", part.name)
		}
		copy(part.to, got)
	}
	return t, nil
}

var tokenText = regexp.MustCompile(tokenPrefix + ":[A-Za-z0-9_:-]+")

// HoldsToken tells where in a text a token begins, or a piece of one; -1: nowhere.
func HoldsToken(text string) int {
	if found := tokenText.FindStringIndex(text); found != nil {
		return found[0]
	}
	return -1
}

// Conceal takes tokens, and pieces of them, out of a text that others may see: people paste them in wrong places.
func Conceal(text []byte) []byte { return tokenText.ReplaceAll(text, []byte(tokenPrefix+":(hidden)")) }
