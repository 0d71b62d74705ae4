package rpc

import (
	"go/ast"
	"go/parser"
	"go/token"
	"regexp"
	"strconv"
	"testing"

	"google.golang.org/grpc/codes"
)

// declaredReasons reads the constants of type Reason from the source.
func declaredReasons(t *testing.T) map[string]Reason {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "reason.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]Reason{}
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if typ, ok := spec.Type.(*ast.Ident); !ok || typ.Name != "Reason" {
			return true
		}
		for i, name := range spec.Names {
			value, err := strconv.Unquote(spec.Values[i].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			found[name.Name] = Reason(value)
		}
		return true
	})
	return found
}

func TestCodesCoverEveryReason(t *testing.T) {
	declared := declaredReasons(t)
	table := Codes()
	if len(declared) == 0 || len(declared) != len(table) {
		t.Errorf("%d reasons are declared, %d have a code", len(declared), len(table))
	}
	upperSnake := regexp.MustCompile(`^[A-Z]+(_[A-Z]+)*$`)
	for name, reason := range declared {
		code, ok := table[reason]
		if !ok || code == codes.OK {
			t.Errorf("%s has no code", name)
		}
		if !upperSnake.MatchString(string(reason)) {
			t.Errorf("%s is %q, want UPPER_SNAKE", name, reason)
		}
		if got := Errorf(reason, "said").Code(); got != code {
			t.Errorf("an error for %s has the code %s, want %s", name, got, code)
		}
	}
}

// What a status without a reason becomes must keep the status's code.
func TestReasonForKeepsTheCode(t *testing.T) {
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		reason := reasonFor(code)
		if got := Codes()[reason]; got != code && reason != Internal {
			t.Errorf("%s becomes %s, which stands for %s", code, reason, got)
		}
	}
}
