// Sutra runs storage servers on many hosts. One binary is the master, the agent on
// each host and the client.
package main

import (
	"os"

	"github.com/sutra-grid/sutra/roles"
)

// Set by the linker; see the Justfile's build recipe.
var (
	version = ""
	commit  = ""
)

func main() {
	os.Exit(roles.Main(os.Args, roles.Version(version, commit)))
}
