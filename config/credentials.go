package config

import (
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
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

// DevHome is what the names of the temporary homes of `sutra dev` begin with, in the folder for temporary files.
const DevHome = "sutra-dev-"

// DevCredentials are the files with identities in the temporary homes of this account, and of no other.
func DevCredentials() []string {
	homes, _ := filepath.Glob(filepath.Join(os.TempDir(), DevHome+"*")) // the pattern is right
	var all []string
	for _, home := range homes {
		var st unix.Stat_t
		if unix.Lstat(home, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Mode&0o077 == 0 && int(st.Uid) == os.Geteuid() {
			all = append(all, AllCredentials(home)...)
		}
	}
	return all
}
