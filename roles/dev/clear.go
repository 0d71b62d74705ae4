package dev

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"github.com/rs/zerolog"

	"github.com/sutra-grid/sutra/config"
	"github.com/sutra-grid/sutra/roles/agent"
)

// clearAbandoned ends what a dev that was killed left running in its temporary home, and removes that. What can't be
// cleared away is told of, and left.
func clearAbandoned(ctx context.Context, cfg Config) {
	homes, _ := filepath.Glob(filepath.Join(os.TempDir(), config.DevHome+"*")) // the pattern is right
	for _, home := range homes {
		if !abandoned(home) {
			continue
		}
		if err := clearHome(ctx, cfg, home); err != nil {
			fmt.Fprintf(cfg.Out, "what a killed sutra dev left in %s isn't cleared away: %v\n", home, err)
			continue
		}
		fmt.Fprintf(cfg.Out, "cleared away what a killed sutra dev left in %s\n", home)
	}
}

// abandoned tells whether a home is this user's and both of its roles, which lock it in this order, have been there and gone.
func abandoned(home string) bool {
	info, err := os.Lstat(home)
	if err != nil || !info.IsDir() {
		return false
	}
	owner, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(owner.Uid) == os.Getuid() &&
		config.Abandoned(filepath.Join(home, "master", "lock")) && config.Abandoned(filepath.Join(home, "agents", agentID, "lock"))
}

// clearHome has an agent take up the home's nodes and stop them. It ends at once, and so its master, which is nobody, never
// hears of it.
func clearHome(ctx context.Context, cfg Config, home string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen on loopback: %w", err)
	}
	defer l.Close()
	file, err := parseFile(home, l.Addr())
	if err != nil {
		return err
	}
	a, err := agent.New(ctx, agent.Config{
		Home: home, File: file, Listen: only(l), Binary: cfg.Binary, StopNodes: true, Version: cfg.Version, Log: zerolog.Nop(),
	})
	if err != nil {
		return err
	}
	ended, end := context.WithCancel(ctx)
	end()
	if err := a.Run(ended); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return os.RemoveAll(home)
}
