package fleet

import (
	"cmp"
	"slices"
	"strings"
)

// maxGone bounds the agents that are remembered as gone.
const maxGone = 1024

// gone is an agent that was taken out.
type gone struct {
	name   string
	change uint64
}

// changed notes a change of a that discovery can see, the one thing that outdates what was
// made of Agents. It is called with mu held.
func (f *Fleet) changed(a *Agent) {
	f.shows(a)
	a.change, f.listed = f.changes, f.changes
}

// shows notes a change of a that the page alone shows. It is called with mu held.
func (f *Fleet) shows(a *Agent) {
	f.changes++
	a.shown = f.changes
}

// goes notes that a was taken out. It is called with mu held.
func (f *Fleet) goes(a *Agent) {
	f.changed(a)
	if len(f.gone) == maxGone {
		f.goneUntil = f.gone[0].change
		copy(f.gone, f.gone[1:])
		f.gone = f.gone[:maxGone-1]
	}
	f.gone = append(f.gone, gone{a.Name, a.change})
}

// Changes returns a number that grows whenever an agent comes, goes, or changes in
// a way that discovery lists. What Agents returned at the same number is still true.
func (f *Fleet) Changes() uint64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.listed
}

// Update is what became of the agents since some time before.
type Update struct {
	// Change is to be given to Since the next time. It grows with each change of what Info
	// tells, the health of an agent's targets included; not with round trips, nor with
	// streams.
	Change uint64
	// Whole: Agents are all there are.
	Whole  bool
	Agents []Info   // that changed, sorted by name
	Gone   []string // names that nobody has any more
	// Connected and Lost are how many there are now, and Failing how many of them have a
	// target whose last scrape failed.
	Connected, Lost, Failing int
}

// Since returns what changed since the update of that Change, of agents that visible
// takes; or all of them, where change is 0 or too long ago. It returns false, and nothing
// else, where nothing changed. visible is called with a lock held.
func (f *Fleet) Since(change uint64, visible func(name string) bool) (Update, bool) {
	f.mu.RLock()
	u := Update{Change: f.changes, Whole: change == 0 || change < f.goneUntil || change > f.changes}
	if change == f.changes && !u.Whole {
		f.mu.RUnlock()
		return Update{}, false
	}
	for _, a := range f.agents {
		if !visible(a.Name) {
			continue
		}
		if a.isConnected() {
			u.Connected++
		} else {
			u.Lost++
		}
		if _, failing := a.healthOf(); failing > 0 {
			u.Failing++
		}
		if u.Whole || a.shown > change {
			u.Agents = append(u.Agents, f.info(a))
		}
	}
	if !u.Whole {
		for _, g := range slices.Backward(f.gone) {
			if g.change <= change {
				break
			}
			if f.agents[g.name] == nil && visible(g.name) {
				u.Gone = append(u.Gone, g.name)
			}
		}
	}
	f.mu.RUnlock()
	slices.SortFunc(u.Agents, func(a, b Info) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(u.Gone, strings.Compare)
	u.Gone = slices.Compact(u.Gone)
	return u, true
}
