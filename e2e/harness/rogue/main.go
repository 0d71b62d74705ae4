// Command rogue is a server that misbehaves on request: each word of its command line behind --port is one misbehaviour.
// It answers HTTP on its port as soon as it is what it is to be.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "rogue:", err)
		os.Exit(99)
	}
}

// server is what is served once the misbehaviours are set up.
type server struct {
	port string
	// answers is how many requests are answered before all others hang; negative: all of them.
	answers int64
	// elsewhere: another process of the family serves.
	elsewhere bool
}

func run(args []string) error {
	if len(args) < 2 || args[0] != "--port" {
		return errors.New("usage: rogue --port PORT [MISBEHAVIOUR[=N]] and so on")
	}
	s := server{port: args[1], answers: -1}
	for _, word := range args[2:] {
		name, number, _ := strings.Cut(word, "=")
		n, err := strconv.Atoi("0" + number)
		if err != nil {
			return fmt.Errorf("%s: %w", word, err)
		}
		if err := s.misbehave(name, n); err != nil {
			return fmt.Errorf("%s: %w", word, err)
		}
	}
	if s.elsewhere {
		for {
			time.Sleep(time.Hour)
		}
	}
	return s.serve()
}

func (s *server) misbehave(name string, n int) error {
	switch name {
	case "ignore-term":
		signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	case "escape": // forks twice; the grandchild leads a session of its own, has no parent here, and serves
		s.elsewhere = true
		return s.again(&syscall.SysProcAttr{}, "escape-once").Run()
	case "daemonize": // the same, and leaves it alone
		err := s.again(&syscall.SysProcAttr{}, "escape-once").Run()
		if err == nil {
			os.Exit(0)
		}
		return err
	case "escape-once":
		if err := s.again(&syscall.SysProcAttr{Setsid: true}, "ignore-term").Start(); err != nil {
			return err
		}
		os.Exit(0)
	case "regroup": // the child serves, in a process group of its own
		s.elsewhere = true
		return s.again(&syscall.SysProcAttr{Setpgid: true}, "ignore-term").Start()
	case "leak": // n MiB, one after the other
		go leak(n)
	case "flood": // n MiB of numbered lines as fast as the file takes them
		go flood(n)
	case "exit": // at random, after n to 2n ms
		time.AfterFunc(time.Duration(n+rand.IntN(n+1))*time.Millisecond, func() { os.Exit(rand.IntN(100)) })
	case "hang": // after n answers
		s.answers = int64(n)
	case "late": // n ms
		time.Sleep(time.Duration(n) * time.Millisecond)
	case "close-stdout":
		return errors.Join(os.Stdout.Close(), os.Stderr.Close())
	case "delete-binary":
		path, err := os.Readlink("/proc/self/exe")
		if err != nil {
			return err
		}
		return os.Remove(path)
	default:
		return errors.New("unknown misbehaviour")
	}
	return nil
}

// again is this program once more, with another misbehaviour.
func (s *server) again(attr *syscall.SysProcAttr, word string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", "--port", s.port, word) //nolint:noctx // nothing is to end it
	cmd.SysProcAttr, cmd.Stdout, cmd.Stderr = attr, os.Stdout, os.Stderr
	return cmd
}

func (s *server) serve() error {
	l, err := net.Listen("tcp", ":"+s.port)
	if err != nil {
		return err
	}
	var asked atomic.Int64
	return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { //nolint:gosec // it is to hang
		if n := asked.Add(1); s.answers >= 0 && n > s.answers {
			<-r.Context().Done()
			return
		}
		fmt.Fprintln(w, "rogue")
	}))
}

func leak(mib int) {
	var held [][]byte
	for range mib {
		page := make([]byte, 1<<20)
		for i := 0; i < len(page); i += 4096 {
			page[i] = 1
		}
		held = append(held, page)
		time.Sleep(time.Millisecond)
	}
	for {
		time.Sleep(time.Hour)
		_ = held[0] // so that it isn't given back
	}
}

func flood(mib int) {
	const line = 64
	w := bufio.NewWriterSize(os.Stdout, 1<<16)
	for i := range mib << 20 / line {
		fmt.Fprintf(w, "%0*d\n", line-1, i)
	}
	if err := w.Flush(); err != nil {
		fmt.Fprintln(os.Stderr, "rogue: flood:", err)
	}
}
