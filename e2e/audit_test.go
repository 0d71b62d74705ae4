package e2e_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// onRecord reads a record of calls, each line as WHO METHOD CODE REASON.
func onRecord(t *testing.T, path string) (lines []string, all []map[string]any) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		var one map[string]any
		if err := json.Unmarshal([]byte(line), &one); err != nil {
			t.Fatalf("%s has %q: %v", path, line, err)
		}
		all = append(all, one)
		reason, _ := one["reason"].(string)
		code, _ := one["code"].(string)
		if one["begun"] == true {
			code = "begun"
		}
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("%v %v %s %s", one["who"], one["method"], code, reason)))
	}
	return lines, all
}

// as is a client of the grid's master for anybody.
func as(t *testing.T, g *harness.Grid, id pki.Identity) sutrav1.GridMasterClient {
	t.Helper()
	channel := rpc.Master(g.Endpoint, g.As(id), nil)
	t.Cleanup(channel.Close)
	return sutrav1.NewGridMasterClient(channel)
}

// Every call that changes something is on record with who made it and how it ended, at the master and at the agent that it
// was carried out by; so is what was refused, and what was answered, or had begun, before a kill -9.
func TestAudit(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	master := g.StartMaster()
	g.StartAgent("a1", sleepProfile+`
[storage.profiles.slow]
storage_binary = "/bin/sleep"
args = ["100000"]
ready = "exec:false"
`)
	_, grid := g.Authority()
	olga := as(t, g, pki.UserIdentity(grid, "olga", sutrav1.Role_ROLE_OPERATOR))
	vera := as(t, g, pki.UserIdentity(grid, "vera", sutrav1.Role_ROLE_VIEWER))
	spawned, err := olga.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{AgentId: "a1", Profile: "sleep"})
	if err != nil {
		t.Fatal(err)
	}
	node := spawned.GetNode().GetNodeId()
	if _, err := vera.StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: node}); rpc.ReasonOf(err) != rpc.PermissionDenied {
		t.Errorf("a viewer's stop: %v", err)
	}
	if _, err := vera.ListNodes(t.Context(), &sutrav1.ListNodesRequest{}); err != nil {
		t.Error(err)
	}
	if _, err := olga.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{AgentId: "nobody"}); err == nil {
		t.Error("a spawn on no agent succeeded")
	}
	g.MustRun("token", "create")
	if _, err := olga.StopNode(t.Context(), &sutrav1.StopNodeRequest{NodeId: node}); err != nil {
		t.Error(err)
	}
	go func() { _, _ = olga.SpawnNode(t.Context(), &sutrav1.SpawnNodeRequest{AgentId: "a1", Profile: "slow"}) }() // it is answered by nobody
	slow := ""
	harness.Await(t, "the slow one's process", func() error {
		nodes, err := vera.ListNodes(t.Context(), &sutrav1.ListNodesRequest{})
		for _, n := range nodes.GetNodes() {
			if n.GetProfile() == "slow" && n.GetPid() != 0 {
				slow = n.GetNodeId()
				return nil
			}
		}
		return errors.Join(err, errors.New("it isn't there"))
	})
	master.Signal(syscall.SIGKILL)
	master.Wait()

	lines, all := onRecord(t, filepath.Join(g.Home, "master", "audit.log"))
	want := []string{
		"nobody Enroll OK", "user olga SpawnNode begun", "user olga SpawnNode OK", "user admin CreateToken OK", "user olga StopNode begun", "user olga StopNode OK",
		"user olga SpawnNode begun",
	}
	if !slices.Equal(lines, want) {
		t.Errorf("on record is\n%s\nwant\n%s", strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
	if what, _ := all[len(all)-1]["what"].(map[string]any); what["node_id"] != slow || what["agent_id"] != "a1" {
		t.Errorf("the spawn of %s is on record as %v", slow, all[len(all)-1])
	}
	for _, one := range all {
		if one["method"] == "SpawnNode" && one["code"] == "OK" {
			what, _ := one["what"].(map[string]any)
			if what["node_id"] != node || what["agent_id"] != "a1" || what["profile"] != "sleep" || one["role"] != "operator" || !strings.HasPrefix(fmt.Sprint(one["from"]), "127.0.0.1:") {
				t.Errorf("the spawn of %s is on record as %v", node, one)
			}
		}
	}
	if lines, _ := onRecord(t, filepath.Join(g.Home, "master", "refused.log")); !slices.Equal(lines, []string{
		"user vera StopNode PermissionDenied PERMISSION_DENIED", "user olga SpawnNode NotFound AGENT_NOT_REGISTERED",
	}) {
		t.Errorf("refused was, by the record, %q", lines)
	}
	if lines, _ := onRecord(t, filepath.Join(g.Home, "master", "upkeep.log")); !slices.Equal(lines, []string{"agent a1 RegisterAgent OK"}) {
		t.Errorf("upkeep was, by the record, %q", lines)
	}
	own, _ := onRecord(t, filepath.Join(g.Home, "agents", "a1", "audit.log"))
	for i, line := range own {
		_, own[i], _ = strings.Cut(strings.TrimPrefix(line, "master "), " ") // the master's name is its host's
	}
	if !slices.Equal(own, []string{"SpawnNode OK", "StopNode OK"}) {
		t.Errorf("the agent's record has %q", own)
	}
	if log := string(master.Log()); !strings.Contains(log, `"who":"user olga"`) {
		t.Error("the master's log doesn't tell of a call")
	}
	g.StartMaster()
	if again, _ := onRecord(t, filepath.Join(g.Home, "master", "audit.log")); len(again) < len(want) {
		t.Errorf("after a start %d lines are left", len(again))
	}
}
