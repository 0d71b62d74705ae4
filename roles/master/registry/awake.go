package registry

import "time"

// lateTick is the longest pause between two calls of Watch that counts as time in which agents could
// be heard. It must be some times what Watch is called with, or a busy host's hiccups would count.
const lateTick = time.Second

// Watch is called several times a second for as long as agents can be heard. Where it wasn't, this process
// stood still: it was frozen, or its host was. Agents are not to blame for a silence in which nobody listened,
// so that no more than a second of it counts. It returns how much doesn't.
func (r *Registry) Watch(now time.Time) (stood time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.watched.IsZero() {
		stood = max(0, now.Sub(r.watched)-lateTick)
	}
	r.stood += stood
	r.watched = now
	return stood
}

// awake is the time by which silences are measured: now, without the time in which this process stood
// still. It holds that also while the next Watch is due, so that nobody who asks first is misled. Needs mu.
func (r *Registry) awake(now time.Time) time.Time {
	if latest := r.watched.Add(lateTick); !r.watched.IsZero() && now.After(latest) {
		now = latest
	}
	return now.Add(-r.stood)
}
