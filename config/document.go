package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// maxDepth is that of the deepest known key, storage.profiles.NAME.args.
const maxDepth = 4

// document is a parsed file and the problems found in it so far.
type document struct {
	name   string
	values map[string]any
	// lines says where a key or table is first written, by its path; paths longer than maxDepth are left out.
	lines    map[string]int
	tables   []*table
	problems []problem
}

type problem struct {
	line int // 0 where it is unknown
	text string
}

// table reads one table of a document. A key that was asked for is a known key; all others are refused
// by refuseUnknown in the end.
type table struct {
	doc    *document
	path   []string
	values map[string]any
	known  []string
	// mistyped is set where the document has something else than a table here.
	mistyped bool
}

func parseDocument(data []byte, name string) (*document, error) {
	if len(data) > maxFileBytes {
		return nil, fmt.Errorf("%s: is larger than 1 MiB; %s", name, printConfigHint)
	}
	// Some editors begin a UTF-8 file with a byte order mark, which TOML does not know.
	data = bytes.TrimPrefix(data, []byte("\uFEFF"))
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, fmt.Errorf("%s: is empty; %s", name, printConfigHint)
	}
	newlines := offsetsOf(data, '\n')
	if at := invalidUTF8(data); at >= 0 {
		return nil, fmt.Errorf("%s:%d: is not UTF-8 text; save the file as UTF-8", name, lineAt(newlines, at))
	}
	doc := &document{name: name, values: map[string]any{}, lines: map[string]int{}}
	if err := toml.Unmarshal(data, &doc.values); err != nil {
		return nil, syntaxError(name, err)
	}
	var parser unstable.Parser
	parser.Reset(data)
	for prefix := []string(nil); parser.NextExpression(); {
		node := parser.Expression()
		if node.Kind == unstable.KeyValue {
			doc.noteLines(prefix, node, newlines)
		} else {
			prefix = doc.noteKey(nil, node, newlines)
		}
	}
	if err := parser.Error(); err != nil {
		return nil, syntaxError(name, err)
	}
	return doc, nil
}

// noteLines notes a key-value below prefix, and those of an inline table.
func (d *document) noteLines(prefix []string, node *unstable.Node, newlines []int) {
	path := d.noteKey(prefix, node, newlines)
	if value := node.Value(); value.Kind == unstable.InlineTable && len(path) < maxDepth {
		for it := value.Children(); it.Next(); {
			d.noteLines(path, it.Node(), newlines)
		}
	}
}

// noteKey notes the node's key, dotted or not, and returns its path cut to maxDepth.
func (d *document) noteKey(prefix []string, node *unstable.Node, newlines []int) []string {
	path := slices.Clone(prefix)
	for it := node.Key(); len(path) < maxDepth && it.Next(); {
		path = append(path, string(it.Node().Data))
		if id := dotted(path); d.lines[id] == 0 {
			d.lines[id] = lineAt(newlines, int(it.Node().Raw.Offset))
		}
	}
	return path
}

// dotted writes a path as TOML does, so that different paths never read the same.
func dotted(path []string) string {
	shown := make([]string, len(path))
	for i, key := range path {
		shown[i] = key
		if key == "" || strings.ContainsFunc(key, func(r rune) bool { return !isIDRune(r) || r == '.' }) {
			shown[i] = fmt.Sprintf("%q", key)
		}
	}
	return strings.Join(shown, ".")
}

func offsetsOf(data []byte, b byte) []int {
	var offsets []int
	for i, c := range data {
		if c == b {
			offsets = append(offsets, i)
		}
	}
	return offsets
}

func lineAt(newlines []int, offset int) int {
	before, _ := slices.BinarySearch(newlines, offset)
	return before + 1
}

// invalidUTF8 returns the offset of the first byte that is no UTF-8, -1 where all is well.
func invalidUTF8(data []byte) int {
	for i := 0; i < len(data); {
		r, size := utf8.DecodeRune(data[i:])
		if r == utf8.RuneError && size == 1 {
			return i
		}
		i += size
	}
	return -1
}

func syntaxError(name string, err error) error {
	place := name
	if decode := (*toml.DecodeError)(nil); errors.As(err, &decode) {
		line, column := decode.Position()
		place = fmt.Sprintf("%s:%d: column %d", name, line, column)
	}
	// The message may quote a key as it is, and must stay one line.
	message := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.TrimPrefix(err.Error(), "toml: "))
	return fmt.Errorf("%s: not valid TOML: %s; `sutra agent --print-config` shows a valid file", place, message)
}

// err joins the problems in the order of their lines.
func (d *document) err() error {
	slices.SortStableFunc(d.problems, func(a, b problem) int {
		return cmp.Compare(uint(a.line-1), uint(b.line-1)) // those without a line come last
	})
	errs := make([]error, len(d.problems))
	for i, p := range d.problems {
		errs[i] = errors.New(p.text)
	}
	return errors.Join(errs...)
}

func (d *document) root() *table {
	t := &table{doc: d, values: d.values}
	d.tables = append(d.tables, t)
	return t
}

// refuseUnknown is called once all known keys have been asked for.
func (d *document) refuseUnknown() {
	for _, t := range d.tables {
		for _, key := range t.names() {
			if !slices.Contains(t.known, key) {
				t.refuse(key)
			}
		}
	}
}

func (t *table) refuse(key string) {
	kind := "key"
	if _, ok := t.values[key].(map[string]any); ok {
		kind = "table"
	}
	for _, other := range t.doc.tables {
		if len(other.path) == 1 && slices.Contains(other.known, key) {
			t.problem(key, "unknown %s; it belongs in [%s]", kind, dotted(other.path))
			return
		}
	}
	if near, ok := Nearest(key, t.known); ok {
		t.problem(key, "unknown %s; did you mean %s?", kind, near)
		return
	}
	t.problem(key, "unknown %s; allowed here: %s", kind, strings.Join(t.known, ", "))
}

// problem notes what is wrong with a key, at the line of the key or else of its table.
func (t *table) problem(key, format string, args ...any) {
	path := append(slices.Clone(t.path), key)
	line := 0
	for i := len(path); i > 0 && line == 0; i-- {
		line = t.doc.lines[dotted(path[:i])]
	}
	place := t.doc.name
	if line > 0 {
		place = fmt.Sprintf("%s:%d", place, line)
	}
	text := fmt.Sprintf("%s: %s: %s", place, dotted(path), fmt.Sprintf(format, args...))
	t.doc.problems = append(t.doc.problems, problem{line: line, text: text})
}

// take makes key a known one and returns its value, nil where it is absent.
func (t *table) take(key string) any {
	t.known = append(t.known, key)
	return t.values[key]
}

// read takes a value of one type; false where it is absent or, noted as a problem, of another.
func read[T any](t *table, key, want string) (T, bool) {
	value := t.take(key)
	typed, ok := value.(T)
	if value != nil && !ok {
		t.problem(key, "is %s; must be %s", kindOf(value), want)
	}
	return typed, ok
}

// text takes a string and what parse makes of it; fallback where it is absent or bad.
func text[T any](t *table, key string, fallback T, parse func(string) (T, error)) T {
	s, ok := read[string](t, key, "a string")
	if !ok {
		return fallback
	}
	value, err := parse(s)
	if err != nil {
		t.problem(key, "%v", err)
		return fallback
	}
	return value
}

// whole takes an integer between lowest and highest; fallback where it is absent or bad.
func (t *table) whole(key string, fallback, lowest, highest int64) int64 {
	n, ok := read[int64](t, key, "a whole number")
	if !ok {
		return fallback
	}
	if n < lowest || n > highest {
		t.problem(key, "%d is out of range; allowed: %d to %d", n, lowest, highest)
		return fallback
	}
	return n
}

// truth takes true or false; fallback where it is absent or bad.
func (t *table) truth(key string, fallback bool) bool {
	value, ok := read[bool](t, key, "true or false")
	if !ok {
		return fallback
	}
	return value
}

// port takes a port that needs no privilege, or 0 where anyFree says what it means.
func (t *table) port(key string, fallback int, anyFree bool) int {
	n, ok := read[int64](t, key, "a whole number")
	if !ok {
		return fallback
	}
	allowed := "use 1024 to 65535"
	if anyFree {
		allowed += ", or 0 for any free port"
	}
	switch {
	case n >= minPort && n <= maxPort, n == 0 && anyFree:
		return int(n)
	case n > 0 && n < minPort:
		t.problem(key, "%d is a privileged port, which only root may open; %s", n, allowed)
	default:
		t.problem(key, "%d is not a usable port; %s", n, allowed)
	}
	return fallback
}

func (t *table) seconds(key string, fallback, lowest int64) time.Duration {
	return time.Duration(t.whole(key, fallback, lowest, maxSeconds)) * time.Second
}

// strings returns the elements that are strings and refuses the others.
func (t *table) strings(key string, list []any) []string {
	texts := make([]string, 0, len(list))
	for i, element := range list {
		s, ok := element.(string)
		if !ok {
			t.problem(key, "element %d is %s; must be a string, in quotes", i+1, kindOf(element))
			continue
		}
		texts = append(texts, s)
	}
	return texts
}

// wholes takes a list of integers between lowest and highest; fallback where it is absent or bad.
func (t *table) wholes(key string, fallback []int, lowest, highest int64) []int {
	list, ok := read[[]any](t, key, "a list of whole numbers")
	if !ok {
		return fallback
	}
	numbers := make([]int, 0, len(list))
	for i, element := range list {
		n, ok := element.(int64)
		switch {
		case !ok:
			t.problem(key, "element %d is %s; must be a whole number", i+1, kindOf(element))
		case n < lowest || n > highest:
			t.problem(key, "element %d, %d, is out of range; allowed: %d to %d", i+1, n, lowest, highest)
		default:
			numbers = append(numbers, int(n))
		}
	}
	return numbers
}

// child takes a table; an absent one is empty.
func (t *table) child(key string) *table {
	values, ok := read[map[string]any](t, key, "a table")
	child := &table{
		doc: t.doc, path: append(slices.Clone(t.path), key), values: values,
		mistyped: !ok && t.values[key] != nil,
	}
	t.doc.tables = append(t.doc.tables, child)
	return child
}

// names returns the table's keys in order.
func (t *table) names() []string { return slices.Sorted(maps.Keys(t.values)) }

// kindOf says in words what TOML value this is.
func kindOf(value any) string {
	switch value.(type) {
	case string:
		return "a string"
	case int64:
		return "a whole number"
	case float64:
		return "a decimal number"
	case bool:
		return "true or false"
	case []any:
		return "a list"
	case map[string]any:
		return "a table"
	}
	return "a date or time"
}
