package pki

import (
	"fmt"
	"strings"
	"testing"
)

func token(t testing.TB) Token {
	t.Helper()
	made, err := NewToken([32]byte{1, 2, 3})
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func TestParseToken(t *testing.T) {
	made, other := token(t), token(t)
	whole := made.Encode()
	parts := strings.Split(whole, ":")
	with := func(i int, text string) string {
		changed := append([]string{}, parts...)
		changed[i] = text
		return strings.Join(changed, ":")
	}
	for text, want := range map[string]string{
		whole: "", "  " + whole + "\n": "",
		"": "the token is empty", "\n": "the token is empty",
		"sutra2" + whole[6:]:                      "that is no join token",
		"hunter2":                                 "that is no join token",
		with(1, "") + ":":                         "more than a token",
		strings.Join(parts[:3], ":"):              "cut off",
		whole[:len(whole)-1]:                      "its secret has 42 of 43 characters",
		with(3, ""):                               "its secret has 0 of 43 characters",
		with(1, parts[1][:5]):                     "its root has 5 of 43 characters",
		whole + "A":                               "secret is damaged",
		whole + whole:                             "more than a token",
		with(3, parts[3][:42]+"*"):                "secret is damaged",
		with(3, parts[3][:42]+"B"):                "secret is damaged", // bits that would be lost
		with(1, parts[1][:20]+"\n"+parts[1][20:]): "root is damaged",
		with(1, parts[1][:42]+"\n"):               "root is damaged",
		with(2, strings.ToUpper(parts[2])):        "id is damaged",
		with(2, "x"):                              "id is damaged",
	} {
		got, err := ParseToken(text)
		wantWords(t, fmt.Sprintf("%q", text), err, want)
		if err == nil && got != made || err != nil && got != (Token{}) {
			t.Errorf("%q is read as %+v", text, got)
		}
		if err != nil && (strings.Contains(err.Error(), parts[3][:8]) || strings.Contains(err.Error(), "hunter2")) {
			t.Errorf("the error shows what was given: %v", err)
		}
	}
	if !made.Matches(made.SecretHash()) || made.Matches(other.SecretHash()) || made.Matches(nil) || made.Matches(made.SecretHash()[:31]) {
		t.Error("the hash of a secret isn't taken, or another is")
	}
	if made.Secret == other.Secret || made.ID == other.ID {
		t.Error("two tokens are alike")
	}
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x"} {
		for _, shown := range []any{made, &made, struct{ T Token }{made}, []Token{made}} {
			text := fmt.Sprintf(format, shown)
			if strings.Contains(text, fmt.Sprintf("%x", made.Secret[:4])) || strings.Contains(text, strings.Trim(fmt.Sprintf("%d", made.Secret[:4]), "[]")) {
				t.Errorf("%s of %T shows the secret: %s", format, shown, text)
			}
		}
	}
}
