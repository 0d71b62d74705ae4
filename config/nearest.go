package config

import "strings"

// Nearest returns the known word, in lower case, that a typing error most likely meant; false where none is near. A word
// that is the beginning of one known word alone was cut short, however near others are.
func Nearest(word string, known []string) (string, bool) {
	best, least := "", -1
	if whole := beginning(word, known); len(word) > 2 && len(whole) == 1 {
		return whole[0], true
	}
	for _, candidate := range known {
		// The length difference alone bounds the distance from below, and spares work on absurd words.
		near := max(2, len(candidate)/2)
		if len(word) > len(candidate)+near {
			continue
		}
		d := distance(strings.ToLower(word), candidate)
		if d <= near && (least < 0 || d < least) {
			best, least = candidate, d
		}
	}
	return best, least >= 0
}

// beginning returns the known words that begin with a word.
func beginning(word string, known []string) []string {
	var all []string
	for _, candidate := range known {
		if strings.HasPrefix(candidate, strings.ToLower(word)) {
			all = append(all, candidate)
		}
	}
	return all
}

// distance is the Levenshtein distance in bytes.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			substitute := diagonal
			if a[i] != b[j] {
				substitute++
			}
			diagonal = row[j+1]
			row[j+1] = min(substitute, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
