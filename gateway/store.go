package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"sort"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sync/semaphore"
)

// Errors of the store.
var (
	// ErrUnavailable wraps why a change could not be stored. Nothing was changed.
	ErrUnavailable = errors.New("the push store can't write")
	// ErrReadOnly wraps why a backend can be read and not written.
	ErrReadOnly = errors.New("it can't be written")
	// ErrBusy: the change waited too long for its turn.
	ErrBusy = errors.New("the push store is busy")
	// ErrTooManyGroups: the group would be one more than StoreConfig.MaxGroups.
	ErrTooManyGroups = errors.New("too many groups")
	// ErrTooManySeries: the group would have more than StoreConfig.MaxSeriesPerGroup.
	ErrTooManySeries = errors.New("too many series")
	// ErrPushedSince: the group was pushed after the time of HeaderUnlessPushedSince.
	ErrPushedSince = errors.New("the group was pushed since")
)

// Rejection tells why a push was refused: none of it was stored.
type Rejection struct {
	Key     Key
	Reasons []string
	// Limit is ErrTooManySeries, ErrTooLarge or ErrBodyTooLarge where that was the reason.
	Limit error
}

func (r *Rejection) Unwrap() error { return r.Limit }

func (r *Rejection) Error() string {
	const introduction = "the push is invalid or inconsistent with existing metrics"
	if len(r.Reasons) == 1 {
		return fmt.Sprintf("%s: group %s: %s", introduction, r.Key, r.Reasons[0])
	}
	return fmt.Sprintf("%s: group %s: %d errors:\n* %s", introduction, r.Key, len(r.Reasons), strings.Join(r.Reasons, "\n* "))
}

// StoreConfig tunes a store. Zero values mean the defaults.
type StoreConfig struct {
	// MaxGroups bounds the groups, 0: no bound.
	MaxGroups int
	// MaxSeriesPerGroup bounds the series of one group, 0: no bound.
	MaxSeriesPerGroup int
	// MaxSpools bounds the spools that are known, 100,000 by default. Beyond it the one
	// that was silent for longest is forgotten: see HeaderPushID.
	MaxSpools int
	// ForgetAfter is how long a group that declared an interval leaves push_up 0 and
	// its push time behind after its TTL. 7 days by default. Silent spools are
	// forgotten after that time too, but not before 7 days.
	ForgetAfter time.Duration
	// Lifetimes tells the TTL and the interval of a group that names none itself,
	// by its key. None by default. Store.SetLifetimes replaces it.
	Lifetimes func(Key) Lifetime
	// Reserved tells the type of a family of the server's own, so that pushes can't
	// clash with it.
	Reserved func(name string) (kind dto.MetricType, ok bool)
	// Now is time.Now by default.
	Now func() time.Time
	// Logger is slog.Default by default.
	Logger *slog.Logger
}

// group is one group. Its state changes under the store's mu.
type group struct {
	key       Key
	id        string
	canonical Key
	slot      int32 // in the index
	state

	// The place in the store's heap of deadlines, -1: none.
	deadline      time.Time
	deadlineIndex int
}

// state is what a change replaces in a group.
type state struct {
	pushed, failed int64    // Unix nanoseconds, 0: never
	named          Lifetime // by its own pushes, else unnamed
	life           Lifetime // that counts

	// Of a group that another store changed: how far this clock is ahead of that one's; or,
	// where that is not known, when it was found, in Unix nanoseconds.
	ahead time.Duration
	found int64

	up      bool   // push_up is 1
	expired bool   // its samples went with the TTL
	image   *image // of the pushed families and the generated ones
}

// Store holds the groups. A change is made in memory as it comes, and is answered when
// it is stored: one goroutine, Run's, stores all that came while it stored what came
// before. Where that fails, what waits was made of what is not there now: all of it is
// undone, the latest first.
type Store struct {
	config  StoreConfig
	backend Backend
	inTurn  bool                // Backend is InTurn
	places  *semaphore.Weighted // of the changes that wait to be stored
	wake    chan struct{}       // has one where Run rests and something waits

	mu sync.RWMutex // protects what follows, and all groups
	index
	spools    spools // changed by Run only
	lifetimes func(Key) Lifetime
	deadlines deadlines
	batches   []*batch // that are not stored, in their order; Run is at the first
	rest      int      // Run waits for wake until so many changes wait, 0: it doesn't
	closed    bool     // no more changes are taken

	failure atomic.Pointer[error] // of the last write, nil: it succeeded
	probeAt time.Time             // when to try again, of Run only
	stats   stats
	crowd   crowd // of Run only

	sharing
}

// batch is changes that are stored together.
type batch struct {
	changes []*change
	steps   []step          // what was made of them
	noted   map[string]Mark // with them
	gone    []Mark          // of spools that are forgotten
	aging   bool            // the steps are of time, not of changes
	sealed  bool            // it takes no more changes
	done    chan struct{}   // closed when all of them have their results
}

// stats are for metrics.
type stats struct {
	expired, writes, failedWrites atomic.Uint64
	writeNanos                    atomic.Int64
}

const (
	queueSize = 1000
	// maxBatch bounds the changes that are stored together.
	maxBatch = 256
	// queueWait is how long a change waits for a place among those that wait.
	queueWait = 5 * time.Second
	// probeEvery is the time between tries to write after a failure.
	probeEvery = 5 * time.Second
)

// newStore returns a store without a backend.
func newStore(config StoreConfig) *Store {
	if config.Now == nil {
		config.Now = time.Now
	}
	if config.Logger == nil {
		config.Logger = slog.Default()
	}
	if config.ForgetAfter == 0 {
		config.ForgetAfter = 7 * 24 * time.Hour
	}
	if config.Reserved == nil {
		config.Reserved = func(string) (dto.MetricType, bool) { return 0, false }
	}
	if config.Lifetimes == nil {
		config.Lifetimes = func(Key) Lifetime { return Lifetime{} }
	}
	return &Store{
		config: config, places: semaphore.NewWeighted(queueSize), wake: make(chan struct{}, 1),
		crowd: crowd{patience: minPatience}, index: newIndex(config.Logger), spools: newSpools(config.MaxSpools), lifetimes: config.Lifetimes,
	}
}

// OpenStore reads the groups from the backend, which it owns from now on.
func OpenStore(config StoreConfig, backend Backend) (*Store, error) {
	s := newStore(config)
	s.backend = backend
	if b, ok := backend.(InTurn); ok {
		s.inTurn = b.InTurn()
	}
	var marks []Mark
	err := backend.Load(func(rec Record) error {
		g := newGroup(rec.Key)
		s.install(g, s.build(g.key, rec.state, rec.families, s.config.Now()))
		s.schedule(g)
		return nil
	}, func(m Mark) error {
		marks = append(marks, m)
		return nil
	})
	if errors.Is(err, ErrReadOnly) {
		s.wrote(err)
	} else if err != nil {
		return nil, fmt.Errorf("load the push store: %w", err)
	}
	s.spools.load(marks)
	s.storeNext() // what expired meanwhile
	return s, nil
}

func newGroup(key Key) *group {
	return &group{key: key, id: key.ID(), canonical: key.canonical(), state: state{named: unnamed}, deadlineIndex: -1}
}

// Run stores the changes until ctx ends. Then no more are taken, and when those that
// wait are stored it closes the backend.
func (s *Store) Run(ctx context.Context) error {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for ctx.Err() == nil {
		if s.failure.Load() != nil && !time.Now().Before(s.probeAt) {
			s.probe()
		}
		if s.shared != nil {
			s.steps.follow()
		}
		if s.storeNext() {
			continue
		}
		timer.Reset(s.untilTimer())
		select {
		case <-s.wake:
		case u := <-s.updates:
			s.steps.takeUpdate(u)
		case <-timer.C:
		case <-ctx.Done():
		}
	}
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	for s.storeNext() {
	}
	if s.shared != nil {
		return s.shared.Close()
	}
	return s.backend.Close()
}

func (s *Store) untilTimer() time.Duration {
	wait := time.Hour
	if s.failure.Load() != nil {
		wait = max(time.Until(s.probeAt), 0)
	}
	if persist, aged := s.persistWait(); aged {
		wait = min(wait, persist)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if len(s.deadlines) > 0 {
		wait = min(wait, max(s.deadlines[0].deadline.Sub(s.config.Now()), 0))
	}
	return wait
}

// Err returns why pushes can't be taken now: the last write failed, or too much
// waits for its turn, or the groups may lack what other stores changed. After a failed write the store tries to write every few
// seconds, so it becomes nil by itself when the reason is gone.
func (s *Store) Err() error {
	if err := s.sharingErr(); err != nil {
		return err
	}
	if p := s.failure.Load(); p != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, *p)
	}
	if s.waiting() >= queueSize {
		return ErrBusy
	}
	return nil
}

// waiting returns the number of changes that wait to be stored.
func (s *Store) waiting() (n int) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, b := range s.batches {
		if !b.sealed {
			n += len(b.changes)
		}
	}
	return n
}

// wrote notes how a write ended. One that succeeds does not end a failure: on a
// disk that is nearly full a deletion may, where pushes fail.
func (s *Store) wrote(err error) {
	if err == nil {
		s.stats.writes.Add(1)
		return
	}
	s.stats.failedWrites.Add(1)
	s.probeAt = time.Now().Add(probeEvery)
	if s.failure.Swap(&err) == nil {
		s.config.Logger.Error("The push store can't write: pushes are refused until it can", "err", err)
	}
}

// probe tries whether the store can write again.
func (s *Store) probe() {
	probe := s.steps.probe
	if s.shared == nil {
		probe = s.backend.Probe
	} else if !s.answersAgain() {
		s.probeAt = time.Now().Add(time.Second)
		return
	}
	if err := probe(); err != nil {
		s.wrote(err)
		return
	}
	s.failure.Store(nil)
	s.config.Logger.Info("The push store can write again")
}

// do makes a change and waits until it is stored, or refused.
func (s *Store) do(ctx context.Context, c *change) error {
	if !s.places.TryAcquire(1) {
		wait, cancel := context.WithTimeout(ctx, queueWait)
		defer cancel()
		if s.places.Acquire(wait, 1) != nil {
			return fmt.Errorf("%w: %d changes wait; try again later", ErrBusy, queueSize)
		}
	}
	b := s.take(c)
	if b == nil {
		s.places.Release(1)
		return fmt.Errorf("%w: it is closed", ErrUnavailable)
	}
	// From here on it will be stored, whether the caller waits or not.
	select {
	case <-b.done:
		return c.result
	case <-ctx.Done():
		return ctx.Err()
	}
}

// take puts a change into a batch and makes it, if it need not wait for its turn. It
// returns nil where the store is closed.
func (s *Store) take(c *change) *batch {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		if p := recover(); p != nil {
			// A change is half made. Nothing may go on from there, and net/http would.
			go panic(fmt.Sprintf("%v\n%s", p, debug.Stack()))
			select {}
		}
	}()
	if s.closed {
		return nil
	}
	var b *batch
	if n := len(s.batches); n > 0 && !s.batches[n-1].sealed && len(s.batches[n-1].changes) < maxBatch {
		b = s.batches[n-1]
	} else {
		b = &batch{done: make(chan struct{})}
		s.batches = append(s.batches, b)
	}
	b.changes = append(b.changes, c)
	if !s.inTurn {
		s.makeIn(b, c)
	}
	if s.rest > 0 && len(b.changes) >= s.rest {
		s.rest = 0
		select {
		case s.wake <- struct{}{}:
		default:
		}
	}
	return b
}

// step is an applied change of one group, to be stored or undone.
type step struct {
	group    *group
	old, new state
	created  bool
	deleted  bool
	repeats  bool // Record.Repeats
}

// makeIn makes a change of a batch in memory: it is checked against what the ones
// before it left, those that are not stored yet too. It is called with mu held.
func (s *Store) makeIn(b *batch, c *change) {
	if c.id.spool != "" && c.id.seq <= s.highest(c.id.spool) {
		c.repeated = true // of one that may not be stored yet: it ends as that does
		return
	}
	if failure := s.failure.Load(); failure != nil && c.pushes() {
		c.result = fmt.Errorf("%w: %w", ErrUnavailable, *failure)
		return
	}
	var steps []step
	steps, c.result = s.make(c)
	for _, st := range steps {
		s.schedule(st.group)
	}
	b.steps = append(b.steps, steps...)
	if c.id.spool != "" && c.result == nil {
		if b.noted == nil {
			b.noted = map[string]Mark{}
		}
		b.noted[c.id.spool] = Mark{c.id.spool, c.id.seq, s.config.Now()}
	}
}

// highest returns the highest number of a spool's pushes that is stored, or waits for
// that.
func (s *Store) highest(spool string) uint64 {
	seq := s.spools.seq(spool)
	for _, b := range s.batches {
		seq = max(seq, b.noted[spool].Seq)
	}
	return seq
}

// storeNext stores the batch whose turn it is, and answers its changes; where that fails,
// those of all others too. It returns false where none waits.
func (s *Store) storeNext() bool {
	s.gather()
	s.mu.Lock()
	s.expire()
	if s.rest = 0; len(s.batches) == 0 {
		s.rest = 1
		s.mu.Unlock()
		return false
	}
	b := s.batches[0]
	b.sealed = true
	if s.shared != nil {
		s.mu.Unlock()
		s.steps.store()
		return true
	}
	if s.inTurn {
		for _, c := range b.changes {
			s.makeIn(b, c)
		}
	}
	marks := b.gone
	if b.noted != nil {
		marks = s.spools.withForgotten(b.noted)
	}
	s.mu.Unlock()
	s.places.Release(int64(len(b.changes)))
	start := time.Now()
	err := s.store(b.steps, marks)
	s.crowd.flush += (time.Since(start) - s.crowd.flush) / 8
	s.mu.Lock()
	ended := s.batches[:1]
	if err == nil {
		s.batches = s.batches[1:]
		together := len(b.changes)
		if len(s.batches) > 0 {
			together += len(s.batches[0].changes)
		}
		// Some are between an answer and their next push, and not seen: more were there before.
		s.crowd.size = min(max(s.crowd.size, together), maxBatch)
		for _, m := range marks {
			s.spools.note(m)
		}
	} else {
		ended, s.batches = s.batches, nil
		s.fail(ended, err)
	}
	s.mu.Unlock()
	for i, b := range ended {
		close(b.done)
		if i > 0 {
			s.places.Release(int64(len(b.changes)))
		}
	}
	return true
}

// fail undoes batches and answers their changes with an error. It is called with mu
// held.
func (s *Store) fail(batches []*batch, err error) {
	for _, b := range slices.Backward(batches) {
		for _, c := range b.changes {
			if c.lifetimes == nil { // they are not stored
				c.repeated, c.result = false, fmt.Errorf("%w: %w", ErrUnavailable, err)
			}
		}
		if b.aging {
			continue // what expired stays expired; after a restart it expires again
		}
		s.undo(b.steps)
		for _, st := range b.steps {
			s.schedule(st.group)
		}
	}
	s.renewLifetimes() // they may have changed since what is there again was made
}

// lastChanges returns the last state of each changed group.
func lastChanges(steps []step) []Change {
	last := map[string]Change{}
	for _, st := range steps {
		ch := Change{ID: st.group.id}
		if !st.deleted {
			before, changed := last[ch.ID]
			repeats := st.repeats && (!changed || before.Record != nil && before.Record.Repeats)
			ch.Record = &Record{Key: st.group.key, Repeats: repeats, state: st.new}
		}
		last[ch.ID] = ch
	}
	return slices.Collect(maps.Values(last))
}

// store hands the last state of each changed group to the backend, with the marks.
func (s *Store) store(steps []step, marks []Mark) error {
	changes := lastChanges(steps)
	if len(changes) == 0 && len(marks) == 0 {
		return nil
	}
	start := time.Now()
	err := s.backend.Apply(changes, marks)
	s.stats.writeNanos.Add(int64(time.Since(start)))
	s.wrote(err)
	return err
}

// undo takes steps back. It is called with mu held.
func (s *Store) undo(steps []step) {
	for _, st := range slices.Backward(steps) {
		switch {
		case !st.created:
			s.install(st.group, st.old)
		case s.has(st.group): // it may have expired since
			s.remove(st.group)
		}
	}
}

// SetLifetimes replaces StoreConfig.Lifetimes, for the groups that are there too.
func (s *Store) SetLifetimes(ctx context.Context, lifetimes func(Key) Lifetime) error {
	return s.do(ctx, &change{lifetimes: lifetimes})
}

// Delete removes the groups whose key match takes, or, dry, only tells which. It
// returns their keys, sorted.
func (s *Store) Delete(ctx context.Context, match func(Key) bool, dry bool) ([]Key, error) {
	c := &change{match: match}
	if err := s.isLoaded(); err != nil {
		return nil, err
	}
	if dry {
		s.mu.RLock()
		defer s.mu.RUnlock()
		return s.matching(c.match), nil
	}
	err := s.do(ctx, c)
	return c.matched, err
}

// Len returns the number of groups.
func (s *Store) Len() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.groups)
}

// GroupInfo tells of a group for people.
type GroupInfo struct {
	Key    Key
	Series int // pushed ones
	// Pushed and Failed are when the last good push and the last refused one came,
	// zero: none did.
	Pushed, Failed time.Time
	Lifetime            // that counts, by its own pushes or by the rules
	Up             bool // push_up, where there is an interval
	Expired        bool // its samples went with the TTL
	// Expires is when that will be, zero: never, or they have.
	Expires time.Time

	// Change grows with each change of the group: of two infos of one group with the same
	// Change all is the same. It is of this process alone.
	Change uint64
}

// Changes returns a number that grows whenever a group comes, goes or changes. What Groups
// returned at the same number is still true.
func (s *Store) Changes() uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.changes
}

// Groups tells of all groups, sorted by job and then by the other labels.
func (s *Store) Groups() []GroupInfo {
	groups, changed := s.snapshot()
	infos := make([]GroupInfo, len(groups))
	for i := range groups {
		infos[i] = groups[i].info(changed[groups[i].slot])
	}
	sort.SliceStable(infos, func(i, j int) bool {
		jobI, _ := infos[i].Key.Get("job")
		jobJ, _ := infos[j].Key.Get("job")
		return jobI < jobJ
	})
	return infos
}
