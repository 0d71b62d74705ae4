package supervisor

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

func statLine(name, rest string) string { return "4242 (" + name + ") " + rest }

const fields = "S 1 4242 4240 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2 3"

func TestParseStat(t *testing.T) {
	want := stat{parent: 1, group: 4242, session: 4240, startTicks: 987654, cpu: 260 * time.Millisecond}
	halted := want
	halted.stopped = true
	ended := want
	ended.zombie = true
	forked := want
	forked.forked = true
	withExit := ended
	withExit.exit = 3 << 8
	for name, test := range map[string]struct {
		line string
		want stat
		err  string
	}{
		"plain":              {statLine("sleep", fields), want, ""},
		"parentheses":        {statLine("a) (b", fields), want, ""},
		"a stat in a name":   {statLine(") Z 1 1 1 0 0 (", fields), want, ""},
		"a line break":       {statLine("a\nb) S 1\n", fields), want, ""},
		"no name":            {statLine("", fields), want, ""},
		"a last line break":  {statLine("sleep", fields+"\n"), want, ""},
		"a stopped one":      {statLine("sleep", "T"+fields[1:]), halted, ""},
		"a traced one":       {statLine("sleep", "t"+fields[1:]), want, ""},
		"a zombie":           {statLine("sleep", "Z"+fields[1:]), ended, ""},
		"a dead one":         {statLine("sleep", "X"+fields[1:]), ended, ""},
		"a first thread":     {statLine("server", "Z"+strings.Replace(fields[1:], " 20 0 1 ", " 20 0 2 ", 1)), want, ""},
		"how it ended":       {statLine("sleep", "Z"+fields[1:]+strings.Repeat(" 0", 26)+" 768"), withExit, ""},
		"a mere fork":        {statLine("sleep", strings.Replace(fields, " 4194560 ", " 4194624 ", 1)), forked, ""},
		"odd flags":          {statLine("sleep", strings.Replace(fields, " 4194560 ", " -4194560 ", 1)), stat{}, "read flags: "},
		"an odd exit":        {statLine("sleep", fields+strings.Repeat(" 0", 26)+" -1"), stat{}, "read exit code: "},
		"odd threads":        {statLine("sleep", strings.Replace(fields, " 20 0 1 ", " 20 0 x ", 1)), stat{}, "read count of threads: "},
		"the least there is": {statLine("sleep", fields[:len(fields)-6]), want, ""},
		"a field too few":    {statLine("sleep", fields[:len(fields)-13]), stat{}, "it has 19 fields after the name"},
		"empty":              {"", stat{}, "there is no name in it"},
		"only a name":        {"1 (sleep)", stat{}, "it has 0 fields"},
		"an odd group":       {statLine("sleep", strings.Replace(fields, "4242", "x", 1)), stat{}, "read process group: "},
		"an odd session":     {statLine("sleep", strings.Replace(fields, "4240", "x", 1)), stat{}, "read session: "},
		"an odd parent":      {statLine("sleep", strings.Replace(fields, " 1 ", " x ", 1)), stat{}, "read parent: "},
		"an odd time":        {statLine("sleep", strings.Replace(fields, " 8 ", " x ", 1)), stat{}, "read cpu time: "},
		"an odd start":       {statLine("sleep", strings.Replace(fields, "987654", "-1", 1)), stat{}, "read start time: "},
		"too great a start":  {statLine("sleep", strings.Replace(fields, "987654", "18446744073709551616", 1)), stat{}, "read start time: "},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := parseStat([]byte(test.line))
			switch {
			case test.err == "" && (err != nil || got != test.want):
				t.Errorf("got %+v (%v), want %+v", got, err, test.want)
			case test.err != "" && (err == nil || !strings.HasPrefix(err.Error(), test.err)):
				t.Errorf("error %v, want %q", err, test.err)
			}
		})
	}
}

// Whatever stands in the name, the fields behind it are read.
func FuzzParseStat(f *testing.F) {
	f.Add("sleep", []byte("1 (x) S"))
	f.Add(") (", []byte(statLine("sleep", fields)))
	f.Add("a\nb) S 1 2\n", []byte(")"))
	f.Add("\x00\xff", []byte{})
	f.Fuzz(func(t *testing.T, name string, line []byte) {
		got, err := parseStat([]byte(statLine(name, fields)))
		if want := (stat{parent: 1, group: 4242, session: 4240, startTicks: 987654, cpu: 260 * time.Millisecond}); err != nil || got != want {
			t.Errorf("a process named %q: %+v (%v)", name, got, err)
		}
		if _, err := parseStat(line); err != nil && err.Error() == "" {
			t.Error("an error that says nothing")
		}
	})
}

func TestIdentityOfThisProcess(t *testing.T) {
	boot, err := BootID()
	if err != nil || len(boot) != 36 {
		t.Fatalf("boot id %q (%v)", boot, err)
	}
	id, err := identify(os.Getpid(), boot)
	if err != nil || id.PID != os.Getpid() || id.StartTicks == 0 || id.BootID != boot {
		t.Fatalf("identity %+v (%v)", id, err)
	}
	info, err := os.Stat(fmt.Sprintf("/proc/%d", os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	if at := startTime(id.StartTicks); at.After(info.ModTime().Add(time.Second)) || time.Since(at) > time.Hour {
		t.Errorf("this process started at %v", at)
	}
	for name, other := range map[string]Identity{
		"nobody":         {},
		"another start":  {PID: id.PID, StartTicks: id.StartTicks + 1, BootID: boot},
		"another boot":   {PID: id.PID, StartTicks: id.StartTicks, BootID: "another"},
		"a negative pid": {PID: -1, StartTicks: id.StartTicks, BootID: boot},
		"no such pid":    {PID: 1 << 30, StartTicks: id.StartTicks, BootID: boot},
	} {
		before := descriptors(t)
		if fd, err := openIdentity(other, boot); fd != -1 || err != nil {
			t.Errorf("%s: descriptor %d (%v)", name, fd, err)
		}
		if after := descriptors(t); after != before {
			t.Errorf("%s: a descriptor is left open", name)
		}
	}
}

func TestForkIsToldFromAProgram(t *testing.T) {
	// The shell forks a part in brackets, and that waits for its command.
	spec := commandSpec(t, "sh", "-c", "(sleep 3600; :) & wait")
	w := watch(t, spec)
	leader := w.until(ProcessReady).State.PID
	await(t, "the fork and its command", func() bool { return len(newKin(group{}, &spec).find()) == 3 })
	await(t, "the command's program", func() bool {
		forks, programs := 0, 0
		for _, pid := range newKin(group{}, &spec).find() {
			switch st, err := readStat(pid); {
			case err != nil:
				t.Error(err)
			case st.forked && pid == leader:
				t.Error("the leader is taken for a mere fork")
			case st.forked:
				forks++
			default:
				programs++
			}
		}
		return forks == 1 && programs == 2
	})
}
