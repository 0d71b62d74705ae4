package supervisor

import (
	"os"
	"slices"
	"time"
)

// find returns the unit's process as its record, its control group or its mark say; nil where it doesn't run.
// The record is the found process's then.
func (u *Unit) find() (*process, error) {
	r := &u.record
	if r.Identity == (Identity{}) {
		// It was about to be started when its supervisor ended.
		for _, k := range u.kin() {
			if id := k.leader(u.s.bootID); id.PID != 0 {
				r.Identity, r.StartedAt, r.LogStart = id, startTime(id.StartTicks), 0
				if r.LastExit != nil && r.LastExit.At.After(r.StartedAt) {
					r.StartedAt = r.LastExit.At // ticks are coarse, and that was before
				}
				break
			}
		}
	}
	fd, err := openIdentity(r.Identity, u.s.bootID)
	if err != nil || fd < 0 {
		return nil, err
	}
	children.add(r.Identity.PID)
	p := &process{
		identity: r.Identity, pidfd: os.NewFile(uintptr(fd), "pidfd"), kin: u.kinIn(group{}), exited: make(chan struct{}),
		startedAt: r.StartedAt, logPath: u.spec.LogPath, logStart: r.LogStart, ooms: ooms{kills: r.OOMKills},
	}
	for _, g := range u.groups() {
		if slices.Contains(g.members(), p.identity.PID) {
			p.kin.group = g
			break
		}
	} // else the supervisor before had no control groups
	p.limited = p.kin.group.limited(p.identity.PID, u.spec.Limits.Memory)
	go p.watch()
	return p, nil
}

// groups are the control groups that the unit's processes may be in: that of the last one first, as its record tells, because
// the supervisor before may have been in other groups itself.
func (u *Unit) groups() []group {
	var all []group
	for _, g := range []group{groupOnRecord(u.record.Cgroups, u.spec.ID), u.spec.Cgroups.of(u.spec.ID)} {
		if g.exists() && !slices.Contains(all, g) {
			all = append(all, g)
		}
	}
	return all
}

// kin is where the unit's processes may be found that an earlier supervisor started.
func (u *Unit) kin() []kin {
	var all []kin
	for _, g := range append(u.groups(), group{}) {
		all = append(all, u.kinIn(g))
	}
	return all
}

// kinIn are the unit's processes as a group tells them, or what they inherit where it is none.
func (u *Unit) kinIn(g group) kin {
	k := newKin(g, &u.spec)
	k.census = u.s.census
	return k
}

// endLeftovers ends what a process left behind that is gone itself, so that its port and its files are free. It returns
// false where the unit was let go before.
func (u *Unit) endLeftovers() bool {
	for _, k := range u.kin() {
		if k.left() && !u.outlast(k) {
			return false
		}
		_ = k.group.remove() // it was made for what is gone
	}
	return true
}

// letGo ends the watching of a process without touching it.
func (p *process) letGo() {
	if p.pidfd.SetReadDeadline(time.Unix(1, 0)) == nil { // wakes watch
		<-p.exited
	} // else watch waits in a thread, until the process or this one ends
	_ = p.pidfd.Close() // nothing was written
	children.forget(p.identity.PID)
}
