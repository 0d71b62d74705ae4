package client

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// tone is how a word is meant; on a terminal it has a colour.
type tone int

const (
	toneNone tone = iota
	toneGood
	toneWarn
	toneBad
)

// toneOf is the tone of a health or phase.
func toneOf(word string) tone {
	switch word {
	case "HEALTHY", "READY", "RUNNING":
		return toneGood
	case "DEGRADED", "UNKNOWN", "NOT_READY", "STARTING", "STOPPING":
		return toneWarn
	case "OFFLINE", "DOWN", "FAILED", "CRASH_LOOP":
		return toneBad
	default:
		return toneNone
	}
}

func paint(text string, t tone, color bool) string {
	if !color || t == toneNone {
		return text
	}
	return [...]string{toneGood: "\x1b[32m", toneWarn: "\x1b[33m", toneBad: "\x1b[31m"}[t] + text + "\x1b[0m"
}

// cell is one field of a table. Its text may come from anywhere: render cleans it.
type cell struct {
	text string
	tone tone
}

func text(s string) cell { return cell{text: s} }

// word is a cell with a health or phase in it.
func word(w string) cell {
	if w == "UNSPECIFIED" {
		return cell{}
	}
	return cell{w, toneOf(w)}
}

// table is rows of aligned columns, without borders.
type table [][]cell

func header(names ...string) table {
	row := make([]cell, len(names))
	for i, name := range names {
		row[i] = text(name)
	}
	return table{row}
}

// add adds a row; an empty cell reads "-", so that every row has as many words as the header.
func (t *table) add(cells ...cell) { *t = append(*t, cells) }

func (t table) render(color bool) string { return t.renderWithin(nil, color) }

// renderWithin has columns of some widths at least, so that the rows of several tables stand below each other.
func (t table) renderWithin(least []int, color bool) string {
	widths := slices.Clone(least)
	for _, row := range t {
		for i := range row {
			if row[i].text = clean(row[i].text); row[i].text == "" {
				row[i].text = "-"
			}
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i].text))
		}
	}
	var out strings.Builder
	for _, row := range t {
		for i, c := range row {
			out.WriteString(paint(c.text, c.tone, color))
			if i < len(row)-1 {
				out.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c.text)+2))
			}
		}
		out.WriteByte('\n')
	}
	return out.String()
}

// clean makes text that someone else wrote safe to show in one line of a terminal: what
// doesn't print, escape sequences above all, is written as Go would write it.
func clean(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&out, `\x%02x`, s[i])
		case unicode.IsPrint(r):
			out.WriteRune(r)
		default:
			quoted := strconv.QuoteRune(r)
			out.WriteString(quoted[1 : len(quoted)-1])
		}
		i += size
	}
	return out.String()
}

// cleanLines cleans text of several lines.
func cleanLines(s string) []string {
	lines := strings.Split(strings.ReplaceAll(strings.TrimRight(s, "\r\n"), "\r\n", "\n"), "\n")
	for i, line := range lines {
		lines[i] = clean(strings.ReplaceAll(line, "\t", "    "))
	}
	return lines
}

// quoteOutput sets a process's last output apart from what sutra says.
func quoteOutput(output string) string {
	if strings.TrimSpace(output) == "" {
		return ""
	}
	return "  | " + strings.Join(cleanLines(output), "\n  | ") + "\n"
}

// age is how long ago t was, in one short word such as 12s, 3m, 2h or 4d; empty for no time.
// The clocks of two hosts differ: what lies ahead was just now.
func age(now time.Time, t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	d := max(0, now.Sub(t.AsTime()))
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	default:
		return fmt.Sprintf("%dd", d/(24*time.Hour))
	}
}

// ago is age as part of a sentence.
func ago(now time.Time, t *timestamppb.Timestamp) string {
	if t == nil {
		return ""
	}
	return age(now, t) + " ago"
}

func number[T ~int32 | ~uint32](n T) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}
