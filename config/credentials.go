package config

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Credentials is the file with this account's identity in a grid, under credentials/ of a home.
func Credentials(home, grid string) string {
	return filepath.Join(home, "credentials", grid+".pem")
}

// AllCredentials are the files with this account's identities, one a grid.
func AllCredentials(home string) []string {
	files, _ := os.ReadDir(filepath.Join(home, "credentials")) // none where there is no such folder
	var all []string
	for _, f := range files {
		if strings.HasSuffix(f.Name(), ".pem") && !strings.HasPrefix(f.Name(), ".") {
			all = append(all, filepath.Join(home, "credentials", f.Name()))
		}
	}
	slices.Sort(all)
	return all
}

// JoinToken is the file with the token that a master leaves for the agents of its host.
func JoinToken(home string) string { return filepath.Join(home, "credentials", "join-token") }
