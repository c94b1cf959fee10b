package gateway

import (
	"container/heap"
	"strings"
	"time"
)

// deadline is when a group may change by itself.
type deadline struct {
	at time.Time
	id string
}

type deadlines []deadline

func (d deadlines) Len() int           { return len(d) }
func (d deadlines) Less(i, j int) bool { return d[i].at.Before(d[j].at) }
func (d deadlines) Swap(i, j int)      { d[i], d[j] = d[j], d[i] }
func (d *deadlines) Push(x any)        { *d = append(*d, x.(deadline)) }
func (d *deadlines) Pop() any {
	last := (*d)[len(*d)-1]
	*d = (*d)[:len(*d)-1]
	return last
}

// schedule notes when the group changes by itself. Outdated deadlines stay in the
// heap and find nothing to do.
func (s *Store) schedule(g *group) {
	for _, at := range g.nextChanges(s.config.ForgetAfter) {
		heap.Push(&s.deadlines, deadline{at, g.id})
	}
}

func (g *group) nextChanges(forgetAfter time.Duration) []time.Time {
	var at []time.Time
	last := time.Unix(0, max(g.pushed, g.failed))
	if g.ttl > 0 {
		at = append(at, last.Add(g.ttl))
		if g.interval > 0 {
			at = append(at, last.Add(g.ttl+forgetAfter))
		}
	}
	if g.interval > 0 && !g.expired {
		at = append(at, g.upUntil())
	}
	return at
}

func (s *Store) untilDeadline() time.Duration {
	if len(s.deadlines) == 0 {
		return time.Hour
	}
	return min(max(s.deadlines[0].at.Sub(s.config.Now()), 0), time.Hour)
}

// expire makes the changes whose time has come.
func (s *Store) expire() {
	now := s.config.Now()
	var steps []step
	s.mu.Lock()
	for len(s.deadlines) > 0 && !s.deadlines[0].at.After(now) {
		d := heap.Pop(&s.deadlines).(deadline)
		if g := s.groups[d.id]; g != nil {
			if st := s.age(g, now); st != nil {
				steps = append(steps, *st)
			}
		}
	}
	s.mu.Unlock()
	if err := s.store(steps); err != nil {
		// What expired stays expired in memory; after a restart it expires again.
		s.config.Logger.Error("Expired groups could not be removed from the disk", "groups", len(steps), "err", err)
	}
}

// age brings a group to the state of now. It returns nil where nothing changes.
func (s *Store) age(g *group, now time.Time) *step {
	old := g.state
	last := time.Unix(0, max(g.pushed, g.failed))
	overdue := g.ttl > 0 && !now.Before(last.Add(g.ttl))
	if overdue && (g.interval == 0 || !now.Before(last.Add(g.ttl+s.config.ForgetAfter))) {
		s.remove(g)
		return &step{group: g, old: old, deleted: true}
	}
	next := old
	next.expired = next.expired || overdue
	up := old.image.find(pushUpName)
	if next.expired == old.expired && (up == nil || strings.HasSuffix(string(old.image.textOf(up)), " 1\n") == next.up(now)) {
		return nil
	}
	families := withoutGenerated(old.image)
	if next.expired {
		families = nil
	}
	next.image = newImage(join(families, s.generate(g.key, next, now)))
	s.install(g, next)
	return &step{group: g, old: old, new: next}
}
