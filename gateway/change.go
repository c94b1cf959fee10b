package gateway

import (
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
)

// change is what one request wants of the store: some edits, of which all are
// made or none; or a deletion of groups by their keys; or new lifetimes.
type change struct {
	id        pushID // of the edits
	repeated  bool   // they were made before
	edits     []edit
	match     func(Key) bool
	most      int   // how many groups match may delete, 0: all
	matched   []Key // the answer to match
	lifetimes func(Key) Lifetime
	result    error // as repeated and matched it is valid once its batch is done
}

// pushes reports whether the change brings anything.
func (c *change) pushes() bool {
	return slices.ContainsFunc(c.edits, func(e edit) bool { return !e.delete })
}

// edit is a push to a group, or its deletion.
type edit struct {
	key       Key
	delete    bool
	replace   bool         // PUT: families that the push doesn't name go
	aggregate *aggregation // merge the series with those that are there
	pushed    pushedFamilies
	layout    layout         // of the body
	group     *group         // that had the key, nil: it is looked up
	values    []float64      // in place of pushed, where the group has that layout already
	reasons   []string       // why the push is refused already
	ttl       *time.Duration // nil: keep
	interval  *time.Duration
	dated     bool       // at is what the push tells
	at        time.Time  // when it was pushed
	failed    *time.Time // when the last push failed, if the push tells
	unless    *time.Time // nothing is done where the group was pushed after that
}

// make makes a change in memory. It returns what it did, even where it answers
// with an error: a refused push leaves its failure time. It is called with mu held.
func (s *Store) make(c *change) ([]step, error) {
	switch {
	case c.lifetimes != nil:
		s.lifetimes = c.lifetimes
		s.renewLifetimes()
		return nil, nil
	case c.match != nil:
		c.matched = s.matching(c.match)
		if c.most > 0 {
			c.matched = c.matched[:min(c.most, len(c.matched))]
		}
		steps := make([]step, len(c.matched))
		for i, key := range c.matched {
			g := s.get(key)
			steps[i] = step{group: g, old: g.state, deleted: true}
			s.remove(g)
		}
		return steps, nil
	}
	var steps []step
	var refused error
	for i := range c.edits {
		st, err := s.edit(&c.edits[i])
		if err != nil {
			refused = err
			break
		}
		if st != nil {
			steps = append(steps, *st)
		}
	}
	rejection, ok := refused.(*Rejection)
	if refused == nil {
		return steps, nil
	}
	s.undo(steps)
	if !ok {
		return nil, refused
	}
	if len(c.edits) > 1 {
		// The other groups' pushes were not made either.
		rejection.Reasons = append(rejection.Reasons, fmt.Sprintf("none of the %d groups of the push was changed", len(c.edits)))
	}
	steps = nil
	for i := range c.edits {
		if st := s.markFailed(&c.edits[i]); st != nil {
			steps = append(steps, *st)
		}
	}
	return steps, rejection
}

// edit makes one edit in memory. It returns nil where there was nothing to do,
// and an error where it is refused: then it did nothing.
func (s *Store) edit(e *edit) (*step, error) {
	g := e.group
	if g == nil || !s.has(g) {
		g = s.get(e.key)
	}
	exists := g != nil
	if e.delete {
		if !exists {
			return nil, nil
		}
		st := &step{group: g, old: g.state, deleted: true}
		s.remove(g)
		return st, nil
	}
	if exists && e.unless != nil && g.pushed > unixNano(*e.unless) {
		return nil, fmt.Errorf("%w: %s, at %s", ErrPushedSince, g.key, time.Unix(0, g.pushed).UTC().Format(time.RFC3339Nano))
	}
	if e.values != nil {
		return s.repeat(g, e)
	}
	if !exists {
		if err := s.mayCreate(e.key); err != nil {
			return nil, err
		}
		g = newGroup(e.key)
	}
	if len(e.reasons) > 0 {
		return nil, &Rejection{Key: e.key, Reasons: slices.Clone(e.reasons)}
	}
	pushed := e.pushed
	if e.aggregate != nil {
		var reasons []string
		if pushed.families, reasons = e.aggregate.apply(g, pushed.families, unixNano(e.at)); len(reasons) > 0 {
			return nil, &Rejection{Key: e.key, Reasons: reasons}
		}
		pushed.dropped = nil
	}
	families := pushed.families
	if !e.replace || e.aggregate != nil {
		families = merge(withoutGenerated(g.image), pushed)
	}
	if n := countSeries(families); s.config.MaxSeriesPerGroup > 0 && n > s.config.MaxSeriesPerGroup {
		return nil, &Rejection{e.key, []string{fmt.Sprintf("%s: the group would have %d, at most %d are allowed (--push.max-series-per-group)", ErrTooManySeries, n, s.config.MaxSeriesPerGroup)}, ErrTooManySeries}
	}
	if size := imageSize(families); size > maxImage {
		return nil, &Rejection{e.key, []string{fmt.Sprintf("with the labels of the grouping key on each series the group would take %d bytes, and at most %d are possible; push fewer series to it, or shorten the key", size, maxImage)}, ErrBodyTooLarge}
	}
	if reasons := s.inconsistencies(g, families, pushed.families); len(reasons) > 0 {
		return nil, &Rejection{Key: e.key, Reasons: reasons}
	}
	next := s.build(g.key, g.afterPush(e), families, s.config.Now())
	if e.aggregate == nil && len(families) == len(pushed.families) {
		next.image.setLayout(e.layout, pushed.places)
	}
	st := &step{group: g, old: g.state, new: next, created: !exists}
	s.install(g, next)
	return st, nil
}

// afterPush returns the state of a group after a good push, but for what Store.build
// makes of it.
func (g *group) afterPush(e *edit) state {
	next := g.state
	next.pushed, next.expired = unixNano(e.at), false
	next.ahead, next.found = 0, 0
	if e.failed != nil {
		next.failed = unixNano(*e.failed)
	}
	if e.ttl != nil {
		next.named.TTL = *e.ttl
	}
	if e.interval != nil {
		next.named.Interval = *e.interval
	}
	return next
}

// mayCreate tells what speaks against a new group of that key.
func (s *Store) mayCreate(key Key) error {
	if s.config.MaxGroups > 0 && len(s.groups) >= s.config.MaxGroups {
		return fmt.Errorf("%w: there are %d, and %s would be a new one; delete some, give them a TTL, or raise --push.max-groups", ErrTooManyGroups, len(s.groups), key)
	}
	if twin := s.twin(key); twin != nil {
		return &Rejection{Key: key, Reasons: []string{fmt.Sprintf("the grouping key renders the same labels as that of the group %s, so their series could not be told apart; use one of the two", twin.key)}}
	}
	return nil
}

// markFailed notes that a push to the group failed; a group that isn't there is
// created for that, unless its key is at fault.
func (s *Store) markFailed(e *edit) *step {
	if e.delete || e.unless != nil { // an import is no push that failed now
		return nil
	}
	g := s.get(e.key)
	exists := g != nil
	if !exists {
		if s.mayCreate(e.key) != nil {
			return nil
		}
		g = newGroup(e.key)
	}
	next := g.state
	failed := s.config.Now().UnixNano()
	if e.dated && !e.at.IsZero() {
		// It was relayed, and failed when it was made: the group's next push, which is on
		// its way, comes after that.
		failed = min(failed, e.at.UnixNano())
	}
	next.failed = max(next.failed, failed)
	next = s.rebuild(g, next, s.config.Now())
	st := &step{group: g, old: g.state, new: next, created: !exists}
	s.install(g, next)
	return st
}

// matching returns the keys that match takes, sorted. It is called with mu held.
func (s *Store) matching(match func(Key) bool) []Key {
	keys := []Key{}
	for _, g := range s.groups {
		if match(g.key) {
			keys = append(keys, g.key)
		}
	}
	sort.Slice(keys, func(i, j int) bool { return keys[i].ID() < keys[j].ID() })
	return keys
}

// build completes a state: which lifetime counts, what the gateway itself says of
// the group, and the image of it all.
func (s *Store) build(key Key, st state, families []prepared, now time.Time) state {
	st.life = st.named.orElse(s.lifetimes(key))
	if st.expired {
		families = nil
	}
	st.up = st.isUp(now)
	st.image = newImage(join(families, generate(key, st)))
	return st
}

// rebuild builds a state of a group that keeps its pushed families.
func (s *Store) rebuild(g *group, next state, now time.Time) state {
	next = s.build(g.key, next, withoutGenerated(g.image), now)
	if g.image != nil && !next.expired {
		next.image.setLayout(g.image.layout, g.image.pushedPlaces())
	}
	return next
}

// apply merges pushed families with those of the group. It returns what is to be
// stored, and what speaks against it.
func (a *aggregation) apply(g *group, pushed []prepared, now int64) (merged []prepared, reasons []string) {
	for _, p := range pushed {
		var old *dto.MetricFamily
		f, err := p.decode()
		b, exists := g.image.find(p.name())
		if err == nil && exists {
			old, err = b.decode()
		}
		if err == nil {
			f, err = a.merge(old, f) // of a first push too: the second must not find it can't
		}
		if err == nil && exists {
			p, err = prepareFamily(g.key, g.key.forced(), f, now)
		}
		if err != nil {
			reasons = append(reasons, err.Error())
			continue
		}
		merged = append(merged, p)
	}
	return merged, reasons
}

func countSeries(families []prepared) (n int) {
	for _, p := range families {
		n += len(p.series)
	}
	return n
}

// merge returns the families of a group after a push that replaces those that it
// names, sorted by name.
func merge(old []prepared, pushed pushedFamilies) []prepared {
	kept := slices.DeleteFunc(slices.Clone(old), func(p prepared) bool {
		return slices.Contains(pushed.dropped, p.name())
	})
	return join(kept, pushed.families)
}

// join returns two sorted lists as one; of two families of one name, b's counts.
func join(a, b []prepared) []prepared {
	out := make([]prepared, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		switch c := strings.Compare(a[0].name(), b[0].name()); {
		case c < 0:
			out, a = append(out, a[0]), a[1:]
		case c == 0:
			a = a[1:]
		default:
			out, b = append(out, b[0]), b[1:]
		}
	}
	return append(append(out, a...), b...)
}
