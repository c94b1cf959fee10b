package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	dto "github.com/prometheus/client_model/go"
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
	// Limit is ErrTooManySeries where that was the reason.
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

	// The place in the store's heap of deadlines, -1: none. Of the writer only.
	deadline      time.Time
	deadlineIndex int
}

// state is what a change replaces in a group.
type state struct {
	pushed, failed int64    // Unix nanoseconds, 0: never
	named          Lifetime // by its own pushes, else unnamed
	life           Lifetime // that counts
	up             bool     // push_up is 1
	expired        bool     // its samples went with the TTL
	image          *image   // of the pushed families and the generated ones
}

// Store holds the groups. One goroutine makes all changes, in the order in which
// they came, and stores all that waits together.
type Store struct {
	config  StoreConfig
	backend Backend
	queue   chan *change
	done    chan struct{}

	mu sync.RWMutex // protects index and spools; only the writer changes them
	index
	spools spools

	// Of the writer only.
	lifetimes func(Key) Lifetime
	deadlines deadlines

	failure atomic.Pointer[error] // of the last write, nil: it succeeded
	stats   stats
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
	// queueWait is how long a change waits for a place in the queue.
	queueWait = 5 * time.Second
	// probeEvery is the time between tries to write after a failure.
	probeEvery = 5 * time.Second
)

// OpenStore reads the groups from the backend, which it owns from now on.
func OpenStore(config StoreConfig, backend Backend) (*Store, error) {
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
	s := &Store{
		config: config, backend: backend, queue: make(chan *change, queueSize), done: make(chan struct{}),
		index: newIndex(config.Logger), spools: newSpools(config.MaxSpools), lifetimes: config.Lifetimes,
	}
	var marks []Mark
	err := backend.Load(func(rec Record) error {
		g := newGroup(rec.Key)
		s.install(g, s.build(g.key, rec.state, rec.families, config.Now()))
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
	s.expire()
	return s, nil
}

func newGroup(key Key) *group {
	return &group{key: key, id: key.ID(), canonical: key.canonical(), state: state{named: unnamed}, deadlineIndex: -1}
}

// Run makes the changes until ctx ends and the queue is empty. Then it closes the
// backend.
func (s *Store) Run(ctx context.Context) error {
	defer close(s.done)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		timer.Reset(s.untilTimer())
		select {
		case c := <-s.queue:
			s.expire()
			s.apply(s.collect(c))
		case <-timer.C:
			s.expire()
			if s.failure.Load() != nil {
				s.probe()
			}
		case <-ctx.Done():
			for {
				select {
				case c := <-s.queue:
					s.apply(s.collect(c))
					continue
				default:
				}
				return s.backend.Close()
			}
		}
	}
}

func (s *Store) untilTimer() time.Duration {
	wait := time.Hour
	if s.failure.Load() != nil {
		wait = probeEvery
	}
	if len(s.deadlines) > 0 {
		wait = min(wait, max(s.deadlines[0].deadline.Sub(s.config.Now()), 0))
	}
	return wait
}

// Err returns why pushes can't be taken now: the last write failed, or too much
// waits for its turn. After a failed write the store tries to write every few
// seconds, so it becomes nil by itself when the reason is gone.
func (s *Store) Err() error {
	if p := s.failure.Load(); p != nil {
		return fmt.Errorf("%w: %w", ErrUnavailable, *p)
	}
	if len(s.queue) == cap(s.queue) {
		return ErrBusy
	}
	return nil
}

// wrote notes how a write ended. One that succeeds does not end a failure: on a
// disk that is nearly full a deletion may, where pushes fail.
func (s *Store) wrote(err error) {
	if err == nil {
		s.stats.writes.Add(1)
		return
	}
	s.stats.failedWrites.Add(1)
	if s.failure.Swap(&err) == nil {
		s.config.Logger.Error("The push store can't write: pushes are refused until it can", "err", err)
	}
}

// probe tries whether the store can write again.
func (s *Store) probe() {
	if err := s.backend.Probe(); err != nil {
		s.wrote(err)
		return
	}
	s.failure.Store(nil)
	s.config.Logger.Info("The push store can write again")
}

// collect takes what else waits. Requests that can go on without waiting for anything
// go first: what they bring shares the flush.
func (s *Store) collect(first *change) []*change {
	batch := []*change{first}
	runtime.Gosched()
	for len(batch) < maxBatch {
		select {
		case c := <-s.queue:
			batch = append(batch, c)
		default:
			return batch
		}
	}
	return batch
}

// do hands a change to the writer and waits until it is stored, or refused.
func (s *Store) do(ctx context.Context, c *change) error {
	c.reply = make(chan error, 1)
	select {
	case s.queue <- c:
	default:
		wait, cancel := context.WithTimeout(ctx, queueWait)
		defer cancel()
		select {
		case s.queue <- c:
		case <-s.done:
			return fmt.Errorf("%w: it is closed", ErrUnavailable)
		case <-wait.Done():
			return fmt.Errorf("%w: %d changes wait; try again later", ErrBusy, queueSize)
		}
	}
	// From here on it will be applied, whether the caller waits or not.
	select {
	case err := <-c.reply:
		return err
	case <-s.done:
		// The writer may have answered before it ended.
		select {
		case err := <-c.reply:
			return err
		default:
			return fmt.Errorf("%w: it is closed", ErrUnavailable)
		}
	case <-ctx.Done():
		return ctx.Err()
	}
}

// step is an applied change of one group, to be stored or undone.
type step struct {
	group    *group
	old, new state
	created  bool
	deleted  bool
	repeats  bool // Record.Repeats
}

// apply makes a batch of changes: each is checked against what the ones before it
// left, all are stored together, and undone where that fails.
func (s *Store) apply(batch []*change) {
	var steps []step
	var noted map[string]Mark // of the batch
	var marks []Mark
	results := make([]error, len(batch))
	failure := s.failure.Load()
	s.mu.Lock()
	for i, c := range batch {
		if c.id.spool != "" && c.id.seq <= max(noted[c.id.spool].Seq, s.spools.seq(c.id.spool)) {
			c.repeated = true
			continue
		}
		if failure != nil && c.pushes() {
			results[i] = fmt.Errorf("%w: %w", ErrUnavailable, *failure)
			continue
		}
		var made []step
		made, results[i] = s.make(c)
		steps = append(steps, made...)
		_, rejected := results[i].(*Rejection)
		if c.id.spool != "" && (results[i] == nil || rejected) {
			if noted == nil {
				noted = map[string]Mark{}
			}
			noted[c.id.spool] = Mark{c.id.spool, c.id.seq, s.config.Now()}
		}
	}
	if noted != nil {
		marks = s.spools.withForgotten(noted)
	}
	s.mu.Unlock()
	if err := s.store(steps, marks); err != nil {
		s.mu.Lock()
		s.undo(steps)
		s.mu.Unlock()
		for i := range results {
			results[i] = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	} else if len(marks) > 0 {
		s.mu.Lock()
		for _, m := range marks {
			s.spools.note(m)
		}
		s.mu.Unlock()
	}
	for _, st := range steps {
		s.schedule(st.group)
	}
	for i, c := range batch {
		c.reply <- results[i]
	}
}

// store hands the last state of each changed group to the backend, with the marks.
func (s *Store) store(steps []step, marks []Mark) error {
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
	if len(last) == 0 && len(marks) == 0 {
		return nil
	}
	start := time.Now()
	err := s.backend.Apply(slices.Collect(maps.Values(last)), marks)
	s.stats.writeNanos.Add(int64(time.Since(start)))
	s.wrote(err)
	return err
}

// undo takes steps back. It is called with mu held.
func (s *Store) undo(steps []step) {
	for _, st := range slices.Backward(steps) {
		if st.created {
			s.remove(st.group)
		} else {
			s.install(st.group, st.old)
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
}

// Groups tells of all groups, sorted by job and then by the other labels.
func (s *Store) Groups() []GroupInfo {
	groups := s.snapshot()
	infos := make([]GroupInfo, len(groups))
	for i, g := range groups {
		infos[i] = GroupInfo{Key: g.key, Lifetime: g.life, Up: g.up, Expired: g.expired}
		if g.pushed > 0 {
			infos[i].Pushed = time.Unix(0, g.pushed)
		}
		if g.failed > 0 {
			infos[i].Failed = time.Unix(0, g.failed)
		}
		for _, b := range g.image.blocks() {
			if !isGenerated(b.name()) {
				infos[i].Series += int(b.series)
			}
		}
	}
	slices.SortStableFunc(infos, func(a, b GroupInfo) int {
		jobA, _ := a.Key.Get("job")
		jobB, _ := b.Key.Get("job")
		return strings.Compare(jobA, jobB)
	})
	return infos
}
