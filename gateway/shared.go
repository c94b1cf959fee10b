package gateway

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sort"
	"strings"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/s2"
)

// Shared keeps groups that several stores change, those of other processes too. Each
// store has all of them in memory, and follows what the others do.
//
// All changes are made one after the other, whoever makes them: a store says which
// version its changes were checked against, and they are stored only where nobody was
// faster. So whatever one store can promise, several can: no clashing types, no series
// twice, no push made twice, no group too many.
type Shared interface {
	// Updates returns a channel, always the same one, of what becomes of the groups, in
	// the order in which that is stored, the store's own changes among it. It has no buffer.
	// The first update that isn't Lost is a Snapshot; so is the next one behind each that is
	// Lost. A Snapshot is read after the update before it was taken from the channel.
	Updates() <-chan Update
	// Limits bound what one Commit takes.
	Limits() Limits
	// Commit stores changes of different groups and marks of different spools, all of them
	// or none, where base is the last version, and returns the new one. Without changes and
	// marks it tells whether it could. It returns a *Conflict where base is not the last
	// version. With any other error they may have been stored all the same, or be stored
	// later: then they come as an update. It returns within a bounded time.
	Commit(base Version, changes []Change, marks []Mark) (Version, error)
	// CurrentAt returns the latest time of which is known that all that was stored by then
	// has been taken from Updates; zero: none is.
	CurrentAt() time.Time
	// Close ends it. Nothing is called after it.
	Close() error
}

// Version names a state of the groups. The zero Version is that of a store in which
// nothing was ever stored.
type Version struct {
	Revision int64  // it grows with each change, unless the store was set back
	ID       string // no other version has it
}

// Update is what becomes of the groups, or tells that the store lost sight of that.
type Update struct {
	Version Version
	// Lost is why the store can't tell what was changed since the version before: its
	// groups may be behind until a Snapshot comes.
	Lost error
	// Snapshot: groups and spools that the update doesn't have are gone.
	Snapshot bool
	// At is the time of the clock of whoever made the change, when that was sent, zero in a
	// Snapshot.
	At time.Time
	// Read returns the changes, and what could not be read of them: such a group is given as
	// gone.
	Read func() (changes []Change, marks []Mark, damaged []error)
}

// Conflict is the error of Shared.Commit where somebody else was faster.
type Conflict struct {
	Last Version // what is stored now; the updates up to it are on their way
	// TriedID is the ID of the version that the Commit would have made. Where nothing was
	// heard of a first try, that may have been made before the other change: then it comes as
	// an update.
	TriedID string
}

func (c *Conflict) Error() string { return "somebody else changed the groups at the same time" }

// Limits bound what can be stored together.
type Limits struct {
	Changes int // of groups and of spools
	// Bytes of all records, as Pack packs them, and of their keys.
	Bytes int
	// RaiseChanges and RaiseBytes say how to raise the two, as in "raise etcd's
	// --max-txn-ops".
	RaiseChanges, RaiseBytes string
}

// ErrTooLarge: what a push would store is more than can be stored together.
var ErrTooLarge = errors.New("it is too large for the shared push store")

const (
	// commitWithin is how long a store tries to make its changes before others make theirs.
	commitWithin = 10 * time.Second
	// updateWait is how long it waits for the update that it was told of.
	updateWait = 5 * time.Second
	// behindAfter is the age of the last time at which the groups were known to be all at
	// which the store says that they may be behind.
	behindAfter = 15 * time.Second
	// maxPersistDelay is how long a store waits at most before it stores what expired: one
	// of several does, and the others hear of it.
	maxPersistDelay = 5 * time.Second
	// clockNoise is the difference of two clocks, or the way of an update, that is none.
	clockNoise = 5 * time.Second
)

// sharing is what a store has that shares its groups.
type sharing struct {
	shared  Shared                // nil: it doesn't
	steps   sharedSteps           // of Store.Run
	updates <-chan Update         // nil where shared is
	loaded  chan struct{}         // closed when the first snapshot is there
	lost    atomic.Pointer[error] // why the groups may lack what others changed, nil: they don't

	// Of the writer only.
	version  Version
	failedAt time.Time // when the last failed write had failed
	// What expired in memory and is not stored yet: groups by ID, spools; and when it is to be.
	agedGroups map[string]Key
	agedSpools map[string]struct{}
	persistAt  time.Time
	clockTold  time.Time // when a clock that differs was logged

	conflicts, damaged, snapshots atomic.Uint64
	clockOffset                   atomic.Int64 // nanoseconds
}

// sharedSteps are what Store.Run does for a store that shares its groups. They are
// fields so that the programs whose store shares none don't carry the code: half a percent
// of the agent.
type sharedSteps struct {
	follow     func()
	takeUpdate func(Update)
	store      func()
	probe      func() error
}

// OpenShared returns a store of groups that are shared. It has none until the first
// snapshot comes to Store.Run: see Store.Loaded. It owns what it shares from now on.
//
// Stores that share groups should have the same StoreConfig. The time that counts for a
// TTL is that of the store that took the push: one whose clock is ahead of that one's
// waits for as much longer, and one that finds a group in a snapshot, and so can't tell,
// leaves it the TTL, but at most 5 minutes, from then on. One whose clock is behind
// would be late, and hears from the others.
func OpenShared(config StoreConfig, shared Shared) *Store {
	s := newStore(config)
	s.inTurn = true // for what a change is checked against must be what is stored
	s.shared, s.updates, s.loaded = shared, shared.Updates(), make(chan struct{})
	s.steps = sharedSteps{s.follow, s.takeUpdate, s.storeShared, s.probeShared}
	s.agedGroups, s.agedSpools = map[string]Key{}, map[string]struct{}{}
	err := errors.New("the groups have not been read yet")
	s.lost.Store(&err)
	return s
}

// Loaded returns a channel that is closed once the groups are there, nil where they
// were from the beginning.
func (s *Store) Loaded() <-chan struct{} { return s.loaded }

// isLoaded returns why the groups are not there yet.
func (s *Store) isLoaded() error {
	if s.shared == nil {
		return nil
	}
	select {
	case <-s.loaded:
		return nil
	default:
		return s.sharingErr()
	}
}

// sharingErr returns why the groups may lack what others changed.
func (s *Store) sharingErr() error {
	if s.shared == nil {
		return nil
	}
	if lost := s.lost.Load(); lost != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, *lost)
	}
	if age := time.Since(s.shared.CurrentAt()); age > behindAfter {
		return fmt.Errorf("%w: the groups may be behind, the shared store has not answered for %s", ErrUnavailable, age.Round(time.Second))
	}
	return nil
}

// behind returns the age, in seconds, of the last time at which the groups were known to be
// all, NaN: there was none.
func (s *Store) behind() float64 {
	at := s.shared.CurrentAt()
	if at.IsZero() || s.isLoaded() != nil {
		return math.NaN()
	}
	return time.Since(at).Seconds()
}

// follow takes over the updates that wait, and stores what expired where it is time for
// that, however many changes wait.
func (s *Store) follow() {
	for more := true; more; {
		select {
		case u := <-s.updates:
			s.takeUpdate(u)
		default:
			more = false
		}
	}
	if wait, aged := s.persistWait(); aged && wait == 0 {
		_ = s.storeAged() // it is tried again; in memory it stays expired
	}
}

func (s *Store) takeUpdate(u Update) {
	r := s.receive(u)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.takeOver(r)
}

// storeShared makes the changes of the first batch and answers them, with as many commits
// as the limits need; a change is never divided, but for deletions by matcher. What comes
// while another store was faster shares the commit.
func (s *Store) storeShared() {
	var changes []*change
	batches := 0
	more := func() { // is called with mu held
		for batches < len(s.batches) && len(changes) < maxBatch {
			b := s.batches[batches]
			b.sealed = true
			changes = append(changes, b.changes...)
			s.places.Release(int64(len(b.changes)))
			batches++
		}
	}
	s.mu.Lock()
	more()
	s.mu.Unlock()
	for rest := 0; rest < len(changes); {
		c := changes[rest]
		if c.match != nil {
			c.result = s.deleteShared(c)
			rest++
			continue
		} else if c.lifetimes != nil { // nothing of it is stored
			s.mu.Lock()
			_, c.result = s.make(c)
			s.mu.Unlock()
			rest++
			continue
		}
		var m *made
		// What the changes are checked against must be what is stored.
		err := s.storeAged()
		if err == nil {
			err = s.commit(func() ([]step, []Change, []Mark) {
				if m != nil {
					more()
				}
				m = s.makeRoomFor(changes[rest:])
				return m.steps, lastChanges(m.steps), m.marks
			})
		}
		if m == nil { // none can be made now
			m = &made{changes: 1}
			for rest+m.changes < len(changes) && !changes[rest+m.changes].alone() {
				m.changes++
			}
		}
		for _, c := range changes[rest : rest+m.changes] {
			if err != nil {
				c.repeated, c.result = false, fmt.Errorf("%w: %w", ErrUnavailable, err)
			}
		}
		rest += m.changes
	}
	s.mu.Lock()
	ended := s.batches[:batches:batches]
	s.batches = s.batches[batches:]
	s.mu.Unlock()
	for _, b := range ended {
		close(b.done)
	}
}

// alone reports whether a change shares no commit with others.
func (c *change) alone() bool { return c.match != nil || c.lifetimes != nil }

// made is what the first of some changes did in memory.
type made struct {
	changes int // so many of them
	steps   []step
	marks   []Mark
}

// makeRoomFor makes some changes in memory, as many of them as fit into a commit: at least
// one, which is refused if need be. It is called with mu held.
func (s *Store) makeRoomFor(changes []*change) *made {
	room := newRoom(s.shared.Limits())
	m := new(made)
	var noted map[string]Mark
	failure := s.failure.Load()
	for _, c := range changes {
		if c.alone() {
			break
		}
		c.result = nil
		c.repeated = c.id.spool != "" && c.id.seq <= max(noted[c.id.spool].Seq, s.spools.seq(c.id.spool))
		if c.repeated {
			m.changes++
			continue
		}
		if failure != nil && c.pushes() {
			c.result = fmt.Errorf("%w: %w", ErrUnavailable, *failure)
			m.changes++
			continue
		}
		steps, err := s.make(c)
		if !room.take(steps, c.id.spool != "") {
			s.undo(steps)
			if m.changes > 0 {
				break
			}
			if err == nil {
				err = room.limits.refuse(c, steps)
			}
			steps = nil
			if len(c.edits) == 1 {
				if st := s.markFailed(&c.edits[0]); st != nil {
					steps = []step{*st}
				}
			}
			if !room.take(steps, c.id.spool != "") {
				s.undo(steps)
				steps = nil
			}
		}
		c.result = err
		m.changes, m.steps = m.changes+1, append(m.steps, steps...)
		if c.id.spool != "" && err == nil {
			if noted == nil {
				noted = map[string]Mark{}
			}
			noted[c.id.spool] = Mark{c.id.spool, c.id.seq, s.config.Now()}
		}
	}
	if noted != nil {
		m.marks = s.spools.withForgotten(noted)
	}
	return m
}

// deleteShared deletes the groups that a change matches.
func (s *Store) deleteShared(c *change) error {
	deleted := []Key{}
	c.most = s.shared.Limits().Changes
	err := s.storeAged()
	for err == nil {
		err = s.commit(func() ([]step, []Change, []Mark) {
			steps, _ := s.make(c)
			// The room for keys is half of that for all: a record was stored with each.
			room := newRoom(s.shared.Limits())
			n := slices.IndexFunc(steps, func(st step) bool { return !room.take([]step{st}, false) })
			if n > 0 {
				s.undo(steps[n:])
				steps, c.matched = steps[:n], c.matched[:n]
			}
			return steps, lastChanges(steps), nil
		})
		if err == nil {
			if deleted = append(deleted, c.matched...); len(c.matched) == 0 {
				break
			}
		}
	}
	if err != nil {
		if len(deleted) > 0 {
			err = fmt.Errorf("%w; %d groups were deleted before that", err, len(deleted))
		}
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	sort.Slice(deleted, func(i, j int) bool { return deleted[i].ID() < deleted[j].ID() })
	c.matched = deleted
	return nil
}

// commit has changes made in memory, and stores them. Where another store was faster it
// takes over what that one changed, and has them made again. Where it fails they are
// undone.
//
// Between two tries no scrape sees the groups without the changes: a counter would seem to
// be reset.
func (s *Store) commit(make func() ([]step, []Change, []Mark)) error {
	var steps []step
	var updates []received
	undo := func() {
		s.undo(steps)
		steps = nil
		for _, u := range updates {
			s.takeOver(u)
		}
		updates = nil
	}
	fail := func(err error) error {
		s.mu.Lock()
		defer s.mu.Unlock()
		undo()
		return err
	}
	deadline := time.Now().Add(commitWithin)
	for {
		s.mu.Lock()
		undo()
		if lost := s.lost.Load(); lost != nil {
			s.mu.Unlock()
			return *lost
		}
		var changes []Change
		var marks []Mark
		steps, changes, marks = make()
		s.mu.Unlock()
		if len(changes) == 0 && len(marks) == 0 {
			return nil
		}
		start := time.Now()
		version, err := s.shared.Commit(s.version, changes, marks)
		s.stats.writeNanos.Add(int64(time.Since(start)))
		conflict, ok := err.(*Conflict)
		if !ok {
			if s.wrote(err); err != nil {
				s.failedAt = time.Now()
				s.probeAt = s.failedAt.Add(time.Second)
				return fail(err)
			}
			s.version = version
			s.mu.Lock()
			for _, m := range marks {
				s.spools.note(m)
			}
			for _, st := range steps {
				s.schedule(st.group)
			}
			s.mu.Unlock()
			for _, c := range changes {
				delete(s.agedGroups, c.ID)
			}
			for _, m := range marks {
				delete(s.agedSpools, m.Spool)
			}
			return nil
		}
		s.conflicts.Add(1)
		var done bool
		if updates, done, err = s.await(conflict); done {
			return fail(nil) // the updates have all that was to be done
		} else if err != nil {
			return fail(err)
		}
		if time.Now().After(deadline) {
			return fail(fmt.Errorf("%w: other proxies were faster for %s; try again later", ErrBusy, commitWithin))
		}
	}
}

// await receives the updates that a commit lacked. done tells that what it brought is
// among them.
func (s *Store) await(conflict *Conflict) (updates []received, done bool, err error) {
	timeout := time.NewTimer(updateWait)
	defer timeout.Stop()
	for {
		select {
		case u := <-s.updates:
			updates = append(updates, s.receive(u))
			done = done || u.Lost == nil && u.Version.ID == conflict.TriedID
			if u.Lost != nil || u.Version.ID == conflict.Last.ID {
				// Of several that want to write, the one with the longest way to the shared store
				// must not always lose.
				time.Sleep(rand.N(time.Millisecond))
				return updates, done, nil
			}
		case <-timeout.C:
			return updates, done, fmt.Errorf("%w, and what was changed has not come within %s", conflict, updateWait)
		}
	}
}

// room is what can be stored together.
type room struct {
	limits Limits
	groups map[string]int // bytes of the changed groups, by ID
	marks  int
	bytes  int
}

func newRoom(limits Limits) *room { return &room{limits: limits, groups: map[string]int{}} }

// markSize is what a spool's mark takes at most, with its key.
const markSize = 2*maxSpoolName + 64

// take takes the room for what was done, and for a mark and one that is forgotten for
// it. It returns false, and takes nothing, where there isn't so much.
func (r *room) take(steps []step, marks bool) bool {
	changes, bytes := r.marks, r.bytes
	if marks {
		changes, bytes = changes+2, bytes+2*markSize
	}
	sizes := make(map[string]int, len(steps))
	for _, st := range steps {
		sizes[st.group.id] = st.maxSize()
	}
	for {
		total, added := bytes, 0
		for id, size := range sizes {
			before, changed := r.groups[id]
			if total += size - before; !changed {
				added++
			}
		}
		if len(r.groups)+added+changes > r.limits.Changes {
			return false
		}
		if total <= r.limits.Bytes {
			bytes = total
			break
		}
		exact := false
		for _, st := range steps {
			if size := st.size(); size < sizes[st.group.id] {
				sizes[st.group.id], exact = size, true
			}
		}
		if !exact {
			return false
		}
	}
	r.bytes = bytes
	if marks {
		r.marks += 2
	}
	for id, size := range sizes {
		r.groups[id] = size
	}
	return true
}

// keySize is what the key of a group takes at most, with what goes with each.
func (st step) keySize() int { return 3*len(st.group.id) + 256 }

// maxSize is what the step's group takes at most where it is stored, known without
// packing it.
func (st step) maxSize() int {
	if st.deleted {
		return st.keySize()
	}
	size := 2*len(st.group.id) + 64
	for _, b := range st.new.image.blocks() {
		m := b.meta.Value()
		size += len(m.name) + len(m.help) + len(m.unit) + max(len(b.proto)+32*len(b.values), 2*len(b.text)+32*len(b.series)) + 64
	}
	return s2.MaxEncodedLen(size) + st.keySize()
}

// size is what the step's group takes where it is stored.
func (st step) size() int {
	if st.deleted {
		return st.keySize()
	}
	record, err := (&Record{Key: st.group.key, state: st.new}).AppendBinary(nil)
	if err != nil {
		return st.maxSize()
	}
	return len(Pack(record)) + st.keySize()
}

// refuse tells why a change that fits in no room is refused.
func (l Limits) refuse(c *change, steps []step) *Rejection {
	size := 0
	for _, st := range steps {
		size += st.size()
	}
	most := l.Changes
	if c.id.spool != "" {
		most -= 2
	}
	if len(steps) > most {
		return &Rejection{c.edits[0].key, []string{fmt.Sprintf("%s: the push changes %d groups, and at most %d can be stored together; make several of it, or %s", ErrTooLarge, len(steps), most, l.RaiseChanges)}, ErrTooLarge}
	}
	if len(steps) > 1 {
		return &Rejection{c.edits[0].key, []string{fmt.Sprintf("%s: the %d groups of the push would take %d bytes together, compressed, and at most %d are possible; make several pushes of it, or %s", ErrTooLarge, len(steps), size, l.Bytes, l.RaiseBytes)}, ErrTooLarge}
	}
	return &Rejection{c.edits[0].key, []string{fmt.Sprintf("%s: the group would take %d bytes, compressed, and at most %d are possible; push less to it, or %s", ErrTooLarge, size, l.Bytes, l.RaiseBytes)}, ErrTooLarge}
}

// received is an update that was read.
type received struct {
	Update
	changes []Change
	marks   []Mark
	damaged []error
	came    time.Time
}

// receive reads an update, unless it is one that is here already.
func (s *Store) receive(u Update) received {
	r := received{Update: u, came: s.config.Now()}
	if u.Lost == nil && (u.Snapshot || u.Version.Revision > s.version.Revision) {
		r.changes, r.marks, r.damaged = u.Read()
	}
	return r
}

// takeOver brings the groups and the spools to the version of an update. It is called
// with mu held.
func (s *Store) takeOver(u received) {
	if u.Lost != nil {
		before := s.lost.Swap(&u.Lost)
		if before == nil || (*before).Error() != u.Lost.Error() {
			s.config.Logger.Warn("The groups may be behind those of the shared push store: pushes are refused until they have been read", "err", u.Lost)
		}
		return
	}
	if !u.Snapshot && u.Version.Revision <= s.version.Revision {
		return
	}
	damaged := u.damaged
	now := s.config.Now()
	var ahead time.Duration // of this clock
	if !u.Snapshot {
		ahead = max(s.compareClocks(u.came.Sub(u.At)), 0)
	}

	var touched []*group
	if u.Snapshot {
		there := make(map[string]struct{}, len(u.changes))
		for _, c := range u.changes {
			there[c.ID] = struct{}{}
		}
		for _, g := range s.groups {
			if _, ok := there[g.id]; !ok {
				s.remove(g)
				touched = append(touched, g)
			}
		}
		clear(s.agedGroups)
		clear(s.agedSpools)
		s.spools = newSpools(s.config.MaxSpools)
	}
	// A family may go from one group to another with another type. So first all goes that
	// is to be replaced.
	groups := make([]*group, len(u.changes))
	for i, c := range u.changes {
		delete(s.agedGroups, c.ID)
		key := keyOfID(c.ID)
		g := s.get(key)
		if g != nil && c.Record != nil && s.holds(g, c.Record) {
			continue
		}
		if g == nil {
			g = newGroup(key)
		} else {
			s.remove(g)
		}
		groups[i] = g
		touched = append(touched, g)
	}
	for i, c := range u.changes {
		g := groups[i]
		if g == nil || c.Record == nil {
			continue
		}
		rec := c.Record
		if other := s.groups[g.canonical.ID()]; other != nil {
			damaged = append(damaged, fmt.Errorf("the group %s is left out: it has the same labels as the group %s", g.key, other.key))
			continue
		}
		families := slices.DeleteFunc(slices.Clone(rec.families), func(p prepared) bool {
			f := s.families[p.name()]
			clashes := f != nil && f.kind != p.meta.Value().kind
			if clashes {
				damaged = append(damaged, fmt.Errorf("group %s: the metric %q is left out: it has another type in other groups", g.key, p.name()))
			}
			return clashes
		})
		next := rec.state
		switch {
		case !u.Snapshot:
			next.ahead = ahead
		case next.pushed == g.pushed && next.failed == g.failed:
			next.ahead, next.found = g.ahead, g.found
		default:
			next.found = now.UnixNano()
		}
		s.install(g, s.build(g.key, next, families, now))
	}
	for _, m := range u.marks {
		delete(s.agedSpools, m.Spool)
		if !u.Snapshot {
			s.spools.note(m)
		}
	}
	if u.Snapshot {
		s.spools.load(u.marks)
	}
	s.version = u.Version
	for _, g := range touched {
		s.schedule(g)
	}
	for _, err := range damaged {
		s.damaged.Add(1)
		s.config.Logger.Error("Something in the shared push store can't be used", "err", err)
	}
	if !u.Snapshot {
		return
	}
	s.snapshots.Add(1)
	s.lost.Store(nil)
	select {
	case <-s.loaded:
	default:
		close(s.loaded)
	}
	s.config.Logger.Info("The groups of the shared push store have been read", "groups", len(s.groups))
}

// holds reports whether the group is already as the record has it.
func (s *Store) holds(g *group, rec *Record) bool {
	if g.pushed != rec.state.pushed || g.failed != rec.state.failed || g.named != rec.state.named || g.expired != rec.state.expired {
		return false
	}
	return slices.EqualFunc(withoutGenerated(g.image), rec.families, prepared.equal)
}

// keyOfID returns the key with that ID.
func keyOfID(id string) Key {
	parts := strings.Split(id, "\xff")
	key := make(Key, 0, len(parts)/2)
	for i := 0; i+1 < len(parts); i += 2 {
		key = append(key, Label{parts[i], parts[i+1]})
	}
	return key
}

// compareClocks notes how far this clock is ahead of another store's, and returns that,
// or 0 where it may be due to the way of the update.
func (s *Store) compareClocks(ahead time.Duration) time.Duration {
	s.clockOffset.Store(int64(ahead))
	if ahead.Abs() >= time.Minute && time.Since(s.clockTold) > time.Hour {
		s.clockTold = time.Now()
		s.config.Logger.Warn("The clock of a proxy that shares the push store differs from this one's: groups may expire late", "ahead", ahead.Round(time.Second))
	}
	if ahead.Abs() < clockNoise {
		return 0
	}
	return ahead
}

// aged notes what expired, to be stored in a while: of several stores, in which it does
// at the same time, one is enough.
func (s *Store) aged(steps []step, forgotten []Mark) {
	if len(steps) == 0 && len(forgotten) == 0 {
		return
	}
	if len(s.agedGroups) == 0 && len(s.agedSpools) == 0 {
		s.persistAt = time.Now().Add(rand.N(maxPersistDelay))
	}
	for _, st := range steps {
		s.agedGroups[st.group.id] = st.group.key
	}
	for _, m := range forgotten {
		s.agedSpools[m.Spool] = struct{}{}
	}
}

// storeAged stores all that expired.
func (s *Store) storeAged() error {
	for len(s.agedGroups) > 0 || len(s.agedSpools) > 0 {
		if failure := s.failure.Load(); failure != nil {
			s.persistAt = time.Now().Add(probeEvery)
			return *failure
		}
		err := s.commit(func() (_ []step, changes []Change, marks []Mark) {
			room := newRoom(s.shared.Limits())
			for id, key := range s.agedGroups {
				c, st := Change{ID: id}, step{group: s.get(key), deleted: true}
				if st.group != nil {
					st.deleted, st.new = false, st.group.state
					c.Record = &Record{Key: key, state: st.new}
				} else {
					st.group = newGroup(key)
				}
				if !room.take([]step{st}, false) {
					break
				}
				changes = append(changes, c)
			}
			for spool := range s.agedSpools {
				if !room.take(nil, true) {
					break
				}
				marks = append(marks, Mark{Spool: spool})
			}
			return nil, changes, marks
		})
		if err != nil {
			s.persistAt = time.Now().Add(probeEvery)
			return err
		}
	}
	return nil
}

// persistWait returns when what expired is to be stored, if anything did.
func (s *Store) persistWait() (wait time.Duration, ok bool) {
	if len(s.agedGroups) == 0 && len(s.agedSpools) == 0 {
		return 0, false
	}
	return max(time.Until(s.persistAt), 0), true
}

// answersAgain reports whether the shared store has answered since the last failed write.
// Until it does a probe would but keep pushes waiting for their refusal.
func (s *Store) answersAgain() bool {
	return s.lost.Load() == nil && s.shared.CurrentAt().After(s.failedAt)
}

// probeShared tries whether the shared store takes changes.
func (s *Store) probeShared() error {
	version, err := s.shared.Commit(s.version, nil, nil)
	if _, ok := err.(*Conflict); ok {
		return nil
	}
	if err == nil {
		s.version = version
	}
	return err
}
