package agent

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/config"
)

// An agent that can't run nodes as a profile's user says so at its start; as its own user anybody can.
func TestUsersTakeRights(t *testing.T) {
	t.Parallel()
	const all = ^uint64(0)
	other := &config.Account{Name: "redis", UID: 999, GID: 999}
	for name, test := range map[string]struct {
		profile  config.Profile
		rights   uint64
		uid, gid int
		says     string
	}{
		"nobody else":           {config.Profile{}, 0, 1000, 1000, ""},
		"itself":                {config.Profile{RunAs: other}, 0, 999, 999, ""},
		"another group":         {config.Profile{RunAs: other}, 0, 999, 1000, "CAP_SETGID"},
		"root":                  {config.Profile{RunAs: other}, all, 0, 0, ""},
		"root with files":       {config.Profile{RunAs: other, OpenFiles: 10}, all, 0, 0, ""},
		"no rights":             {config.Profile{RunAs: other}, 0, 1000, 1000, `profile x: run_as = "redis" takes rights that this agent, which runs as user 1000, lacks: CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_FOWNER, CAP_KILL, CAP_SETGID, CAP_SETUID`},
		"one too few":           {config.Profile{RunAs: other}, all &^ (1 << unix.CAP_KILL), 0, 0, "lacks: CAP_KILL"},
		"no limits of others":   {config.Profile{RunAs: other, OpenFiles: 10}, all &^ (1 << unix.CAP_SYS_RESOURCE), 0, 0, `run_as = "redis", with open_files takes rights that this agent, which runs as user 0, lacks: CAP_SYS_RESOURCE`},
		"limits of none at all": {config.Profile{RunAs: other}, all &^ (1 << unix.CAP_SYS_RESOURCE), 0, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := checkUsers(map[string]config.Profile{"default": {}, "x": test.profile}, test.rights, test.uid, test.gid)
			if test.says == "" && err != nil || test.says != "" && (err == nil || !strings.Contains(err.Error(), test.says)) {
				t.Errorf("error %v, want %q", err, test.says)
			}
		})
	}
}

// What the kernel says of this process's rights is read as what it is.
func TestRights(t *testing.T) {
	t.Parallel()
	got, err := rights()
	if err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("CapEff:\t%016x", got); !strings.Contains(string(status), want) {
		t.Errorf("%s isn't in\n%s", want, status)
	}
}
