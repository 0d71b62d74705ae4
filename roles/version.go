package roles

import (
	"encoding/json"
	"fmt"
	"runtime"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/sutra-grid/sutra/roles/client"
)

func versionCommand(s *client.Streams, version string) *cli.Command {
	return &cli.Command{
		Name:  "version",
		Usage: "print the binary's version",
		Description: "   sutra version\n\n" +
			"Exit codes: 0 printed, 1 failed, 2 usage.",
		Flags: []cli.Flag{client.OutputFlag("")},
		Action: func(c *cli.Context) error {
			if err := client.RefuseStray(c, ""); err != nil {
				return err
			}
			return printVersion(c, s, version)
		},
	}
}

func printVersion(c *cli.Context, s *client.Streams, version string) error {
	asJSON, err := client.OutputJSON(c)
	if err != nil {
		return err
	}
	if asJSON {
		said := struct {
			Version  string `json:"version"`
			Commit   string `json:"commit"` // empty where the build didn't say
			Go       string `json:"go"`
			Platform string `json:"platform"`
		}{Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
		said.Version, said.Commit, _ = strings.Cut(strings.TrimSuffix(version, ")"), " (") // as Version puts them together
		return json.NewEncoder(s.Out).Encode(said)
	}
	return writeString(s.Out, fmt.Sprintf("sutra %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH))
}

// completions make a shell ask the binary itself what may come next. Behind "--" the binary would not see
// that it is only asked, and would run the verb: there, and for a "--" that is being typed, the word is never passed on.
var completions = map[string]string{
	"bash": `_sutra() {
  local words=("${COMP_WORDS[@]:0:$COMP_CWORD}") word="${COMP_WORDS[$COMP_CWORD]}"
  [[ " ${words[*]} " == *" -- "* ]] && return
  [[ $word == -* ]] && words+=(-)
  COMPREPLY=($(compgen -W "$("${words[@]}" --generate-bash-completion 2>/dev/null)" -- "$word"))
}
complete -o default -F _sutra sutra
`,
	"zsh": `#compdef sutra
_sutra() {
  local -a asked found
  asked=("${(@)words[1,$CURRENT-1]}")
  (( ${asked[(Ie)--]} )) && return
  [[ ${words[$CURRENT]} == -* ]] && asked+=(-)
  found=("${(@f)$("${(@)asked}" --generate-bash-completion 2>/dev/null)}")
  compadd -a found
}
compdef _sutra sutra
`,
}

func completionCommand(s *client.Streams) *cli.Command {
	return &cli.Command{
		Name:      "completion",
		Usage:     "print the completion script of a shell",
		ArgsUsage: "bash|zsh",
		Description: "   source <(sutra completion bash)\n\n" +
			"Exit codes: 0 printed, 1 failed, 2 usage.",
		Action: func(c *cli.Context) error {
			script, ok := completions[c.Args().First()]
			if !ok || c.NArg() != 1 {
				return &client.UsageError{Message: "completion takes one shell, bash or zsh", Hint: "source <(sutra completion bash)"}
			}
			return writeString(s.Out, script)
		},
	}
}
