package agent

import (
	"fmt"
	"strings"
	"time"
)

// Unit is the systemd service that runs an agent. All paths are absolute; uid is whom it runs as, 0 being the
// service manager's own choice. stopNodes has the agent take its nodes along, which each have grace at most.
func Unit(binary, file, home string, uid int, stopNodes bool, grace time.Duration) string {
	var user, flag string
	if uid != 0 {
		user = fmt.Sprintf("\n# Whose home that is. Nodes run as the same user.\nUser=%d\n", uid)
	}
	ends := nodesRunOn
	if stopNodes {
		// They stop together. What is killed takes moments; then the master is told.
		const reserve = 30 * time.Second
		flag, ends = " --stop-nodes", fmt.Sprintf(nodesStop, int((grace+reserve).Seconds()))
	}
	return fmt.Sprintf(unitText, execPath(binary), execArg(file), execArg(home), flag, user, ends)
}

const nodesRunOn = `# Nodes outlive their agent: a stop, a crash or an upgrade ends the agent alone, and the next start takes them up.
KillMode=process
`

const nodesStop = `# A stop ends the nodes, too: the agent sees to that, by each node's stop signal and grace. Its crash ends the agent alone, and
# the next start takes them up; so does one after a stop that took longer than this, which is to be as long as the longest
# stop_grace_secs of the agent's file and half a minute.
KillMode=process
TimeoutStopSec=%d
`

const unitText = `[Unit]
Description=Sutra agent, which runs this host's storage nodes
# Where the network is late the agent starts all the same, but may advertise the wrong address.
Wants=network-online.target
After=network-online.target
# It is started again for ever: while it is away nobody restarts a node that crashes.
StartLimitIntervalSec=0

[Service]
# It says that it is ready once its nodes are taken up and it listens.
Type=notify
NotifyAccess=main
ExecStart=%s agent --config %s --home %s%s
%s
%sRestart=always
RestartSec=1

# Nodes get control groups of their own: where the agent isn't root, or the host has v1 groups, within the service's. The agent
# is kept in one beside them (systemd 254 or newer; older ones say that they ignore it, and nodes have no limits then).
Delegate=yes
DelegateSubgroup=agent
# A node that runs out of memory is the agent's to restart, and no reason to stop all others.
OOMPolicy=continue
# Of all processes here the agent should be the last to go.
OOMScoreAdjust=-900

# A descriptor for each node, and some for each call; nodes begin with a limit of their own.
LimitNOFILE=65536
# The nodes' threads count as the service's, too.
TasksMax=infinity

[Install]
WantedBy=multi-user.target
`

// execPath quotes the first word of a command line. In it, systemd replaces no variables.
func execPath(s string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`, "%", "%%").Replace(s) + `"`
}

// execArg quotes any other word.
func execArg(s string) string { return strings.ReplaceAll(execPath(s), "$", "$$") }
