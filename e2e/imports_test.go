package e2e_test

import (
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const modulePath = "github.com/sutra-grid/sutra"

// topLevel is all that may stand at the repository's top, besides dotfiles.
var topLevel = []string{
	"main.go", "roles", "rpc", "supervisor", "health", "config", "proto", "e2e",
	"go.mod", "go.sum", "Justfile", "README.md", "CHANGELOG.md", "LICENSE",
}

// mayImport holds, for each part of the module, the other parts that its code
// and its tests may import, and why no more.
var mayImport = map[string]struct {
	parts  []string
	reason string
}{
	"main":          {[]string{"roles"}, "main hands its arguments to roles and only exits"},
	"roles":         {[]string{"roles/master", "roles/agent", "roles/client", "roles/storage", "roles/dev", "rpc", "health", "config", "proto"}, "the command table starts roles; processes are the agent's"},
	"roles/master":  {[]string{"rpc", "health", "config", "proto"}, "roles meet over gRPC only, and processes are the agent's"},
	"roles/agent":   {[]string{"rpc", "supervisor", "health", "config", "proto"}, "roles meet over gRPC only"},
	"roles/client":  {[]string{"rpc", "health", "config", "proto"}, "roles meet over gRPC only, and processes are the agent's"},
	"roles/storage": {[]string{"rpc", "health", "config", "proto"}, "roles meet over gRPC only, and processes are the agent's"},
	"roles/dev":     {[]string{"roles/master", "roles/agent", "rpc", "health", "config", "proto"}, "dev runs a master and agents in one process and has no other privilege"},
	"rpc":           {[]string{"proto"}, "imports point down only, and rpc stands on the contract alone"},
	"supervisor":    {nil, "the supervisor knows processes, not grids"},
	"health":        {nil, "health is a library of its own"},
	"config":        {nil, "config is a library of its own"},
	"proto":         {nil, "the contract stands on nothing"},
	"e2e":           {[]string{"rpc", "proto"}, "e2e drives the real binary and sees what a user sees"},
}

// goPackage is what the tests need of go list's JSON.
type goPackage struct {
	Dir          string
	ImportPath   string
	Standard     bool
	Module       *struct{ Path string }
	GoFiles      []string
	TestGoFiles  []string
	XTestGoFiles []string
	Imports      []string
	TestImports  []string
	XTestImports []string
	Deps         []string
}

func TestImportsPointDown(t *testing.T) {
	packages, own := listPackages(t)
	for _, path := range own {
		pkg, from := packages[path], part(path)
		rule, known := mayImport[from]
		if !known {
			t.Errorf("%s belongs to no part of the layout; give %s a rule in mayImport or move it", path, from)
			continue
		}
		for _, imported := range slices.Concat(pkg.Imports, pkg.TestImports, pkg.XTestImports) {
			to := part(imported)
			if to != "" && to != from && !slices.Contains(rule.parts, to) {
				t.Errorf("%s imports %s: %s may import %q of this module: %s", path, imported, from, rule.parts, rule.reason)
			}
		}
	}
}

func TestSupervisorStandsAlone(t *testing.T) {
	packages, own := listPackages(t)
	for _, path := range own {
		if part(path) != "supervisor" {
			continue
		}
		for _, dep := range packages[path].Deps {
			if !packages[dep].Standard && !strings.HasPrefix(dep, "golang.org/x/sys/") && part(dep) != "supervisor" {
				t.Errorf("%s depends on %s: the supervisor uses the standard library and golang.org/x/sys only, "+
					"because what outlives crashes must be small enough to read", path, dep)
			}
		}
	}
}

func TestTopLevelIsTheAgreedOne(t *testing.T) {
	root := moduleRoot(t)
	skip := t.Skip
	if os.Getenv("SUTRA_TEST_NO_SKIP") != "" { // All that tests need is said to be here.
		skip = t.Fatal
	}
	if _, err := exec.LookPath("git"); err != nil {
		skip("git isn't installed")
	}
	if _, err := os.Stat(filepath.Join(root, ".git")); err != nil {
		skip("the source isn't a git checkout")
	}
	index := strings.TrimSpace(commandOutput(t, root, "git", "rev-parse", "--path-format=absolute", "--git-path", "index"))
	if _, err := os.Stat(index); err != nil { // The stat ties go test's cached result to the index.
		skip("git tracks no files yet")
	}
	var alien []string
	for file := range strings.SplitSeq(strings.TrimRight(commandOutput(t, root, "git", "ls-files", "-z"), "\x00"), "\x00") {
		top, _, _ := strings.Cut(file, "/")
		if !strings.HasPrefix(top, ".") && !slices.Contains(topLevel, top) {
			alien = append(alien, top)
		}
	}
	if len(alien) > 0 {
		t.Errorf("git tracks %q at the top level, which is fixed so that a reader finds all parts at a glance; move them into one of %q",
			slices.Compact(alien), topLevel)
	}
}

// part returns the part of the module that an import path belongs to: "main",
// a top-level folder or a folder below roles. It is empty for other modules.
func part(importPath string) string {
	if importPath == modulePath {
		return "main"
	}
	below, ours := strings.CutPrefix(importPath, modulePath+"/")
	if !ours {
		return ""
	}
	first, rest, _ := strings.Cut(below, "/")
	if first != "roles" || rest == "" {
		return first
	}
	role, _, _ := strings.Cut(rest, "/")
	return first + "/" + role
}

// listPackages returns all packages that the module builds from, tests aside,
// by import path, and the sorted import paths of the module's own.
func listPackages(t *testing.T) (packages map[string]goPackage, own []string) {
	t.Helper()
	root := moduleRoot(t)
	packages = make(map[string]goPackage)
	fields := "Dir,ImportPath,Standard,Module,GoFiles,TestGoFiles,XTestGoFiles,Imports,TestImports,XTestImports,Deps"
	list := json.NewDecoder(strings.NewReader(commandOutput(t, root, "go", "list", "-deps", "-json="+fields, "./...")))
	for {
		var pkg goPackage
		if err := list.Decode(&pkg); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("read go list's answer: %v", err)
		}
		packages[pkg.ImportPath] = pkg
	}
	for _, path := range slices.Sorted(maps.Keys(packages)) {
		pkg := packages[path]
		if pkg.Module == nil || pkg.Module.Path != modulePath {
			continue
		}
		own = append(own, path)
		trackSources(t, root, pkg)
	}
	if len(own) < 2 {
		t.Fatalf("go list ./... in %s lists %q of %s: without packages the rules prove nothing", root, own, modulePath)
	}
	return packages, own
}

// trackSources looks at a package's files and folders, so that go test doesn't
// serve a cached result after one of them changed: it can't see what go list reads.
func trackSources(t *testing.T, root string, pkg goPackage) {
	t.Helper()
	for _, name := range slices.Concat(pkg.GoFiles, pkg.TestGoFiles, pkg.XTestGoFiles) {
		if _, err := os.Stat(filepath.Join(pkg.Dir, name)); err != nil {
			t.Fatalf("look at a listed file: %v", err)
		}
	}
	for dir := pkg.Dir; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(dir); err != nil {
			t.Fatalf("look at a listed folder: %v", err)
		}
		if len(dir) <= len(root) {
			return
		}
	}
}

func moduleRoot(t *testing.T) string {
	t.Helper()
	root, err := filepath.Abs("..") // A test runs in its package's folder.
	if err != nil {
		t.Fatalf("find the module: %v", err)
	}
	return root
}

// commandOutput returns what a command prints and fails the test if it fails.
func commandOutput(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("run %s: %v\n%s", cmd, err, exit.Stderr)
		}
		t.Fatalf("run %s: %v", cmd, err)
	}
	return string(out)
}
