# The project's habits. What each needs beyond Go and git it installs once, at
# the version below, into .tools/ (not in go.mod, so that no tool's dependency
# decides the version of one of Sutra's).

set shell := ["bash", "-euo", "pipefail", "-c"]
set positional-arguments

buf_version := "v1.75.0"
golangci_lint_version := "v2.15.0"
govulncheck_version := "v1.9.0"
grpcurl_version := "v1.9.4"

tools := justfile_directory() / ".tools"
buf := tools / "buf@" + buf_version / "buf"
golangci_lint := tools / "golangci-lint@" + golangci_lint_version / "golangci-lint"
govulncheck := tools / "govulncheck@" + govulncheck_version / "govulncheck"
grpcurl := tools / "grpcurl@" + grpcurl_version / "grpcurl"

# A test looks for it there, and is skipped where it isn't.
export PATH := parent_directory(grpcurl) + ":" + env("PATH")

# List the recipes.
default:
    @just --justfile {{ quote(justfile()) }} --list --unsorted

# Build the static binary ./bin/sutra.
build:
    #!/usr/bin/env bash
    set -euo pipefail
    version=$(git describe --tags --always --dirty 2>/dev/null || echo unknown)
    commit=$(git rev-parse --short=12 --verify --quiet HEAD || echo unknown)
    CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$version -X main.commit=$commit" -o bin/sutra .

# Run all tests; arguments go to go test.
test *args:
    go test "$@" ./...

# Run the tests that drive the real binary.
e2e *args:
    go test "$@" ./e2e/...

# What lacks for want of rights is skipped and said, here also where SUTRA_TEST_NO_SKIP forbids it elsewhere.

# Run the tests of what supervises processes as an ordinary user; only root can become one.
unprivileged:
    #!/usr/bin/env bash
    set -euo pipefail
    if ((EUID != 0)); then
        echo "unprivileged: not run: all tests of this user are"
        exit 0
    fi
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    chmod 0711 "$scratch"
    install -d -o nobody -m 0700 "$scratch/home"
    for package in supervisor roles/agent roles/agent/nodes; do
        binary=$scratch/${package//\//-}.test
        go test -c -race -o "$binary" "./$package"
        echo "unprivileged: ./$package"
        failed=0
        # setpriv keeps none of root's rights; the environment is the user's own.
        (cd "$scratch/home" && env -i PATH="$PATH" HOME="$scratch/home" TMPDIR="$scratch/home" \
            setpriv --reuid=nobody --regid=nogroup --clear-groups --inh-caps=-all --bounding-set=-all \
            "$binary" -test.v -test.timeout=10m) >"$scratch/output" 2>&1 || failed=1
        grep --before-context=1 '^ *--- SKIP' "$scratch/output" || true
        if ((failed)); then
            grep --invert-match -e '--- PASS' -e '^=== ' "$scratch/output" || true
            echo "error: the tests of $package fail for an ordinary user" >&2
            exit 1
        fi
    done

# Check Go and proto sources: findings and format (gofumpt is one of golangci-lint's formatters).
lint: _golangci_lint _buf
    {{ buf }} lint proto
    {{ buf }} format --diff --exit-code proto
    {{ golangci_lint }} run

# Format Go and proto sources.
fmt: _golangci_lint _buf
    {{ buf }} format --write proto
    {{ golangci_lint }} fmt

# Generate the Go code beside the proto files.
generate: _buf
    cd proto && {{ buf }} generate

# Fail, with the difference, if the generated code isn't what the proto files say.
generate-check: _buf
    #!/usr/bin/env bash
    set -euo pipefail
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    mkdir -p "$scratch/present/proto" "$scratch/generated/proto"
    find proto -name '*.pb.go' -exec cp --parents {} "$scratch/present" \;
    (cd proto && {{ buf }} generate --output "$scratch/generated/proto")
    cd "$scratch"
    if ! diff -ruN present generated; then
        echo "error: the generated code differs from the proto files; run: just generate" >&2
        exit 1
    fi

# Landed is what main has (origin's, where there is an origin). A wanted break
# is declared in proto/buf.yaml under breaking.ignore, where a review sees it.

# Fail if the proto files break callers of the last landed ones that differ from them.
breaking: _buf
    #!/usr/bin/env bash
    set -euo pipefail
    git rev-parse --git-dir >/dev/null
    base=
    if git rev-parse --verify --quiet HEAD >/dev/null; then
        landed=HEAD
        for main in refs/remotes/origin/main refs/heads/main; do
            if git rev-parse --verify --quiet "$main" >/dev/null; then
                # A shallow history may not hold the fork point.
                landed=$(git merge-base HEAD "$main" || echo HEAD)
                break
            fi
        done
        while read -r commit; do
            if ! git diff --quiet "$commit" -- 'proto/*.proto' && [[ -n $(git ls-tree --name-only "$commit" proto) ]]; then
                base=$commit
                break
            fi
        done < <(git log --format=%H "$landed" -- 'proto/*.proto')
    fi
    if [[ -z $base ]]; then
        echo "breaking: this history holds no earlier proto files to compare with (a shallow clone hides them)"
        exit 0
    fi
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    git archive "$base" proto | tar -x -C "$scratch"
    echo "breaking: comparing with $(git log -1 --format='%h (%s)' "$base")"
    if ! {{ buf }} breaking proto --against "$scratch/proto"; then
        echo "error: callers of the earlier proto files would break; keep them working, or ignore a wanted break in proto/buf.yaml" >&2
        exit 1
    fi

# The database is fetched as the Go module that it is kept in, the newest one each time: what is known today is to
# fail today. What the standard library has is mended by the toolchain that go.mod names.

# Fail on known vulnerabilities that this code can reach.
vulncheck: _govulncheck
    #!/usr/bin/env bash
    set -euo pipefail
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    database=$(go list -m -f '{{ "{{.Path}}@{{.Version}}" }}' golang.org/x/vulndb@latest)
    indexer={{ tools }}/${database##*/}/indexdb
    [[ -x $indexer ]] || GOBIN=${indexer%/*} go install "${database%@*}/cmd/indexdb@${database#*@}"
    "$indexer" -vulns "$(go mod download -json "$database" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')/data/osv" -out "$scratch"
    echo "vulncheck: $(go version), ${database##*/}"
    {{ govulncheck }} -db "file://$scratch" ./...

# Run the benchmarks.
bench *args:
    go test -run '^$' -bench . "$@" ./e2e/bench/...

# All that CI runs, cheap checks first and the tests last.
ci: generate-check breaking _tidy _vet _static lint vulncheck unprivileged _grpcurl (test "-race" "-count=1" "-timeout=30m")

_tidy:
    go mod tidy -diff

_vet:
    go vet ./...

# ldd fails on a static binary, so its words are what counts.
_static: build
    #!/usr/bin/env bash
    set -euo pipefail
    linked=$(LC_ALL=C ldd bin/sutra 2>&1 || true)
    if [[ $linked != *'not a dynamic executable'* ]]; then
        printf 'error: bin/sutra must be static, but needs:\n%s\n' "$linked" >&2
        exit 1
    fi

_buf:
    @[[ -x {{ buf }} ]] || GOBIN={{ parent_directory(buf) }} go install github.com/bufbuild/buf/cmd/buf@{{ buf_version }}

_golangci_lint:
    @[[ -x {{ golangci_lint }} ]] || GOBIN={{ parent_directory(golangci_lint) }} go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@{{ golangci_lint_version }}

_govulncheck:
    @[[ -x {{ govulncheck }} ]] || GOBIN={{ parent_directory(govulncheck) }} go install golang.org/x/vuln/cmd/govulncheck@{{ govulncheck_version }}

_grpcurl:
    @[[ -x {{ grpcurl }} ]] || GOBIN={{ parent_directory(grpcurl) }} go install github.com/fullstorydev/grpcurl/cmd/grpcurl@{{ grpcurl_version }}
