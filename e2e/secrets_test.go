package e2e_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sutra-grid/sutra/e2e/harness"
	sutrav1 "github.com/sutra-grid/sutra/proto/sutra/v1"
	"github.com/sutra-grid/sutra/rpc/pki"
)

// secrets are what must be found in no place but those that are named with them.
type secrets struct {
	t     *testing.T
	words map[string]string // by what they are of
	// home is where a secret may stand.
	home map[string]string
}

// token plants a token, whose secret may stand in one file; "": in none.
func (s *secrets) token(name, text, file string) {
	s.t.Helper()
	token, err := pki.ParseToken(text)
	if err != nil {
		s.t.Fatal(err)
	}
	s.words[name] = base64.RawURLEncoding.EncodeToString(token.Secret[:])
	s.words[name+", as bytes"] = string(token.Secret[:])
	s.home[name] = file
}

// keys plants the private keys of all files of a folder.
func (s *secrets) keys(dir string) {
	s.t.Helper()
	found := 0
	s.each(dir, func(path string, data []byte) {
		_, key, ok := strings.Cut(string(data), "PRIVATE KEY-----\n")
		if !ok {
			return
		}
		found++
		lines := strings.Split(key, "\n")
		s.words["the key in "+path], s.home["the key in "+path] = lines[1], path // the first line has the form alone
	})
	if found == 0 {
		s.t.Errorf("there is no key under %s", dir)
	}
}

func (s *secrets) each(dir string, do func(path string, data []byte)) {
	s.t.Helper()
	if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		do(path, data)
		return err
	}); err != nil {
		s.t.Error(err)
	}
}

// look fails the test where a text has a secret that isn't at home there.
func (s *secrets) look(where string, text []byte) {
	s.t.Helper()
	for name, word := range s.words {
		if bytes.Contains(text, []byte(word)) && s.home[name] != where {
			s.t.Errorf("%s has the secret of %s", where, name)
		}
	}
}

// Tokens and keys are planted in every way there is to give them, right and wrong: no log, no error, no record, no event, no list of
// processes, no environment of a node and nothing that the master keeps has one.
func TestSecretsAreKept(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	g.StartMaster()
	s := &secrets{t: t, words: map[string]string{}, home: map[string]string{}}
	left := filepath.Join(g.Home, "credentials", "join-token")
	local, err := os.ReadFile(left)
	if err != nil {
		t.Fatal(err)
	}
	s.token("the host's token", string(local), left)
	mint := func(name, file string, args ...string) string {
		token := strings.TrimSpace(g.MustRun(append([]string{"token", "create", "--uses", "9"}, args...)...))
		s.token(name, token, file)
		return token
	}
	inFile := filepath.Join(g.Dir, "token")
	byFlag, byEnv, byFile, mine := mint("a flag", ""), mint("a variable", ""), mint("a file", inFile), mint("a person's", "", "--role", "viewer")
	if err := os.WriteFile(inFile, []byte(byFile), 0o600); err != nil {
		t.Fatal(err)
	}

	processes := []*harness.Process{}
	join := func(id string, env []string, args ...string) {
		t.Helper()
		plain := g.Env
		g.Env = append(append([]string{}, plain...), env...)
		p := g.LaunchAgent(id, g.AgentFile(id, sleepProfile), append([]string{"--home", filepath.Join(g.Dir, "home-"+id)}, args...)...)
		g.Env = plain
		g.AwaitAgent(id, sutrav1.AgentHealth_AGENT_HEALTH_HEALTHY)
		processes = append(processes, p)
		g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: id, Profile: "sleep"})
	}
	join("a1", nil, "--join-token", byFlag)
	join("a2", []string{"SUTRA_JOIN_TOKEN=" + byEnv})
	join("a3", nil, "--join-token-file", inFile)
	join("a4", nil, "-join-token="+byFlag)
	processes = append(processes, g.Launch("cut", "agent", "--config", g.AgentFile("a5", ""), "--home", filepath.Join(g.Dir, "home-a5"), "--join-token", byFlag[:len(byFlag)-3]))

	said := func(args ...string) {
		r := g.Run(args...)
		s.look("sutra "+strings.Join(args[:2], " ")+": stderr", []byte(r.Stderr))
		s.look("sutra "+strings.Join(args[:2], " ")+": stdout", []byte(r.Stdout))
	}
	if r := g.Run("login", "--home", filepath.Join(g.Dir, "home-me"), "--master", g.Endpoint, "--token", mine); r.Code != 0 {
		t.Errorf("login: %+v", r)
	}
	said("login", "--master", g.Endpoint, "--token", byFlag) // an agent's
	said("login", "--master", g.Endpoint, "--token", mine+"x")
	said("login", "--master", g.Endpoint, "--token", mine, "--name", mine)
	said("login", "--master", "127.0.0.1:1", "--token", mine)
	said("login", "--master", mine, "--token", mine)
	said("-o", "json", "login", "--nonesuch", "--token", mine, mine)
	said("agent", "--config", byFlag)
	said("agent", "--conifg", "x", "--join-token", byFlag)
	said("agent", "--join-token", byFlag, "--join-token-file", inFile, "--config", g.AgentFile("a6", ""))
	said("agents", "ban", byFlag)
	said("users", "ban", byFlag)
	said("users", "ban", "--reason", byFlag, "nobody")
	said("list-bans", "-o", "json")
	said("node-status", "--node", byFlag)
	said("stop", "--agent", byFlag, "--node", "node-1")
	said("spawn", "--agent", byFlag, "--profile", "sleep")
	said("spawn", "--request-id", byFlag, "--agent", "a1", "--profile", byFlag)
	said("token", byFlag)
	said("token", "list")
	said("token", "create", "--agent-id", byEnv)
	said(byFlag, "")

	nodes := g.NodeProcesses()
	if len(nodes) < 4 {
		t.Fatalf("there are the nodes %v", nodes)
	}
	for pid := range nodes {
		for _, name := range []string{"cmdline", "environ"} {
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
			if err != nil {
				t.Error(err)
			}
			s.look(fmt.Sprintf("%s of node process %d", name, pid), data)
		}
	}
	lists, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range lists {
		if data, err := os.ReadFile(list); err == nil { // else it has ended
			s.look(list, data)
		}
	}
	if r := g.Run("token", "revoke", mine); r.Code != 0 { // a whole token is taken for its id
		t.Errorf("token revoke: %+v", r)
	}

	s.keys(g.Dir)
	events := g.MustRun("events", "-o", "json")
	if s.look("sutra events", []byte(events)); !strings.Contains(events, "(hidden)") || !strings.Contains(events, "CreateToken") {
		t.Errorf("events tell of no call that had a token in it:\n%s", events)
	}
	files := 0
	s.each(g.Dir, func(path string, data []byte) {
		files++
		s.look(path, data)
	})
	if files < 20 {
		t.Errorf("%d files were looked at", files)
	}
	for _, p := range processes {
		s.look("the log of "+p.Name, p.Log())
	}
}

// A master or an agent that crashes leaves no core file, which would have its keys; a node may leave one.
func TestNoCoreFiles(t *testing.T) {
	t.Parallel()
	g := harness.New(t)
	unlimited := unix.Rlimit{Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY}
	dumps := func(p *exec.Cmd) bool {
		t.Helper()
		p.Dir = t.TempDir()
		if err := p.Start(); err != nil {
			t.Fatal(err)
		}
		if err := unix.Prlimit(p.Process.Pid, unix.RLIMIT_CORE, &unlimited, nil); err != nil {
			harness.Skip(t, "needs the right to leave core files: "+err.Error())
		}
		_ = p.Process.Signal(syscall.SIGSEGV) // it lives: nobody else ends it
		_ = p.Wait()                          // the state says how
		return p.ProcessState.Sys().(syscall.WaitStatus).CoreDump()
	}
	if !dumps(exec.Command("sleep", "1000")) {
		harness.Skip(t, "this host leaves no core files")
	}
	g.Env = append(g.Env, "GOTRACEBACK=crash") // with it Go dies by the signal
	master := g.StartMaster()
	agent := g.StartAgent("a1", sleepProfile)
	for _, p := range []*harness.Process{agent, master} {
		if err := unix.Prlimit(p.PID(), unix.RLIMIT_CORE, &unlimited, nil); err != nil {
			t.Fatal(err)
		}
	}
	node := g.Spawn(&sutrav1.SpawnNodeRequest{AgentId: "a1", Profile: "sleep"})
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", node.GetPid()))
	if err != nil || !strings.Contains(string(limits), "Max core file size        unlimited            unlimited") {
		t.Errorf("the node's limits are\n%s%v", limits, err)
	}
	g.MustRun("stop", "--node", node.GetNodeId())
	for _, p := range []*harness.Process{agent, master} {
		p.Signal(syscall.SIGABRT)
		if code := p.Wait(); code != -1 {
			t.Errorf("%s ended with exit code %d, want a signal", p.Name, code)
		}
		if p.Cmd.ProcessState.Sys().(syscall.WaitStatus).CoreDump() {
			t.Errorf("%s left a core file", p.Name)
		}
	}
}
