package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/proto"
)

// Errors of the store.
var (
	// ErrUnavailable wraps why a change could not be stored. Nothing was changed.
	ErrUnavailable = errors.New("the push store can't write")
	// ErrBusy: the change waited too long for its turn.
	ErrBusy = errors.New("the push store is busy")
	// ErrTooManyGroups: the group would be one more than StoreConfig.MaxGroups.
	ErrTooManyGroups = errors.New("too many groups")
)

// Rejection tells why a push was refused: none of it was stored.
type Rejection struct {
	Key     Key
	Reasons []string
}

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
	// ForgetAfter is how long a group that declared an interval leaves push_up 0 and
	// its push time behind after its TTL. 7 days by default.
	ForgetAfter time.Duration
	// DefaultTTL is the TTL of groups that name none, 0: for ever.
	DefaultTTL time.Duration
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
	key Key
	id  string
	state
}

// state is what a change replaces in a group.
type state struct {
	pushed, failed int64 // Unix nanoseconds, 0: never
	ttl, interval  time.Duration
	expired        bool   // its samples went with the TTL
	image          *image // of the pushed families and the generated ones
}

// family is all blocks of one metric name.
type family struct {
	kind    dto.MetricType
	entries []entry // sorted by group ID
	help    string  // of the most recent push
	helpAt  int64
}

type entry struct {
	group *group
	image *image
	block *block
}

// Store holds the groups. One goroutine makes all changes, in the order in which
// they came, and stores all that waits together.
type Store struct {
	config  StoreConfig
	backend Backend
	queue   chan *change
	done    chan struct{}

	mu       sync.RWMutex // protects what follows; only the writer changes it
	groups   map[string]*group
	families map[string]*family
	owners   map[uint64]*group              // by the hash of a series' name and labels
	foreign  map[string]map[string]struct{} // names outside the legacy rules, by their escaped form

	deadlines deadlines // of the writer only
}

// change is a push or a deletion on its way to the writer.
type change struct {
	key      Key
	delete   bool
	replace  bool // PUT: families that the push doesn't name go
	pushed   pushedFamilies
	reasons  []string       // why the push is refused already
	ttl      *time.Duration // nil: keep
	interval *time.Duration
	at       time.Time
	reply    chan error // buffered
}

const (
	queueSize = 1000
	// maxBatch bounds the changes that are stored together.
	maxBatch = 256
	// queueWait is how long a change waits for a place in the queue.
	queueWait = 5 * time.Second
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
	s := &Store{
		config: config, backend: backend, queue: make(chan *change, queueSize), done: make(chan struct{}),
		groups: map[string]*group{}, families: map[string]*family{}, owners: map[uint64]*group{}, foreign: map[string]map[string]struct{}{},
	}
	err := backend.Load(func(rec Record) error {
		g := &group{key: rec.Key, id: rec.Key.ID()}
		next := rec.state
		next.image = newImage(join(rec.families, s.generate(g.key, next, config.Now())))
		s.install(g, next)
		s.schedule(g)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("load the push store: %w", err)
	}
	return s, nil
}

// Run makes the changes until ctx ends and the queue is empty. Then it closes the
// backend.
func (s *Store) Run(ctx context.Context) error {
	defer close(s.done)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		timer.Reset(s.untilDeadline())
		select {
		case c := <-s.queue:
			s.expire()
			s.apply(s.collect(c))
		case <-timer.C:
			s.expire()
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

// collect takes what else waits.
func (s *Store) collect(first *change) []*change {
	batch := []*change{first}
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
	c.at = s.config.Now()
	c.reply = make(chan error, 1)
	wait, cancel := context.WithTimeout(ctx, queueWait)
	defer cancel()
	select {
	case s.queue <- c:
	case <-s.done:
		return fmt.Errorf("%w: it is closed", ErrUnavailable)
	case <-wait.Done():
		return ErrBusy
	}
	// From here on it will be applied, whether the caller waits or not.
	select {
	case err := <-c.reply:
		return err
	case <-s.done:
		return fmt.Errorf("%w: it is closed", ErrUnavailable)
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
}

// apply makes a batch of changes: each is checked against what the ones before it
// left, all are stored together, and undone where that fails.
func (s *Store) apply(batch []*change) {
	var steps []step
	results := make([]error, len(batch))
	s.mu.Lock()
	for i, c := range batch {
		st, err := s.applyOne(c)
		results[i] = err
		if st != nil {
			steps = append(steps, *st)
		}
	}
	s.mu.Unlock()
	if err := s.store(steps); err != nil {
		s.mu.Lock()
		for _, st := range slices.Backward(steps) {
			s.undo(st)
		}
		s.mu.Unlock()
		for i := range results {
			results[i] = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	for _, st := range steps {
		if s.groups[st.group.id] != nil {
			s.schedule(st.group)
		}
	}
	for i, c := range batch {
		c.reply <- results[i]
	}
}

// store hands the last state of each changed group to the backend.
func (s *Store) store(steps []step) error {
	last := map[string]Change{}
	for _, st := range steps {
		ch := Change{ID: st.group.id}
		if !st.deleted {
			rec := newRecord(st.group.key, st.new)
			ch.Record = &rec
		}
		last[ch.ID] = ch
	}
	if len(last) == 0 {
		return nil
	}
	return s.backend.Apply(slices.Collect(maps.Values(last)))
}

func (s *Store) undo(st step) {
	if st.created {
		s.remove(st.group)
	} else {
		s.install(st.group, st.old)
	}
}

// applyOne makes one change in memory. It returns the step, nil where nothing
// changed, and the answer. It is called with mu held.
func (s *Store) applyOne(c *change) (*step, error) {
	id := c.key.ID()
	g, exists := s.groups[id]
	if c.delete {
		if !exists {
			return nil, nil
		}
		st := &step{group: g, old: g.state, deleted: true}
		s.remove(g)
		return st, nil
	}
	if !exists {
		if s.config.MaxGroups > 0 && len(s.groups) >= s.config.MaxGroups {
			return nil, fmt.Errorf("%w: there are %d; delete some, give them a TTL, or raise --push.max-groups", ErrTooManyGroups, len(s.groups))
		}
		g = &group{key: c.key, id: id, state: state{ttl: s.config.DefaultTTL}}
		if twin := s.owners[s.generate(g.key, g.state, c.at)[0].series[0]]; twin != nil {
			return nil, &Rejection{c.key, []string{fmt.Sprintf("the grouping key renders the same labels as that of the group %s, so their series could not be told apart; use one of the two", twin.key)}}
		}
	}
	next, now := g.state, c.at.UnixNano()
	families := withoutGenerated(g.image)
	reasons := c.reasons
	if len(reasons) == 0 {
		after := merge(families, c.pushed, c.replace)
		if reasons = s.inconsistencies(g, after, c.pushed.families); len(reasons) == 0 {
			families = after
		}
	}
	if len(reasons) > 0 {
		next.failed = now
	} else {
		next.pushed, next.expired = now, false
		if c.ttl != nil {
			next.ttl = *c.ttl
		}
		if c.interval != nil {
			next.interval = *c.interval
		}
	}
	next.image = newImage(join(families, s.generate(g.key, next, c.at)))
	st := &step{group: g, old: g.state, new: next, created: !exists}
	s.install(g, next)
	if len(reasons) > 0 {
		return st, &Rejection{c.key, reasons}
	}
	return st, nil
}

// withoutGenerated returns the pushed families of an image.
func withoutGenerated(im *image) []prepared {
	return slices.DeleteFunc(im.all(), func(p prepared) bool { return isGenerated(p.name()) })
}

func isGenerated(name string) bool {
	return name == pushTimeName || name == failureTimeName || name == pushUpName
}

// merge returns the families of a group after a push, sorted by name.
func merge(old []prepared, pushed pushedFamilies, replace bool) []prepared {
	if replace {
		return pushed.families
	}
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

// install gives a group a new state, and brings the index up to date. It is called
// with mu held.
func (s *Store) install(g *group, next state) {
	if s.groups[g.id] == nil {
		s.groups[g.id] = g
	}
	old := g.image
	g.state = next
	if old != nil {
		for i := range old.blocks {
			if b := &old.blocks[i]; next.image.find(b.name()) == nil {
				s.dropEntry(entry{g, old, b})
			}
		}
	}
	for i := range next.image.blocks {
		b := &next.image.blocks[i]
		s.putEntry(entry{g, next.image, b}, old.find(b.name()), old)
	}
}

// remove takes a group out. It is called with mu held.
func (s *Store) remove(g *group) {
	for i := range g.image.blocks {
		s.dropEntry(entry{g, g.image, &g.image.blocks[i]})
	}
	delete(s.groups, g.id)
}

func (f *family) find(g *group) (int, bool) {
	return slices.BinarySearchFunc(f.entries, g, func(e entry, g *group) int { return strings.Compare(e.group.id, g.id) })
}

// putEntry adds a block to its family, or replaces old, of the image before, by it.
func (s *Store) putEntry(e entry, old *block, before *image) {
	if old != nil {
		s.disown(entry{e.group, before, old})
	}
	for h := range e.image.hashes(e.block) {
		s.owners[h] = e.group
	}
	m := e.block.meta.Value()
	f := s.families[m.name]
	if f == nil {
		f = new(family)
		s.families[m.name] = f
		if !model.LegacyValidation.IsValidMetricName(m.name) {
			escaped := model.EscapeName(m.name, model.UnderscoreEscaping)
			if s.foreign[escaped] == nil {
				s.foreign[escaped] = map[string]struct{}{}
			}
			s.foreign[escaped][m.name] = struct{}{}
		}
	}
	i, found := f.find(e.group)
	if found {
		f.entries[i] = e
	} else {
		f.entries = slices.Insert(f.entries, i, e)
	}
	f.kind = m.kind
	switch {
	case e.block.pushed >= f.helpAt:
		f.help, f.helpAt = m.help, e.block.pushed
	case old != nil:
		f.chooseHelp(old)
	}
}

func (s *Store) disown(e entry) {
	for h := range e.image.hashes(e.block) {
		if s.owners[h] == e.group {
			delete(s.owners, h)
		}
	}
}

func (s *Store) dropEntry(e entry) {
	s.disown(e)
	name := e.block.name()
	f := s.families[name]
	i, _ := f.find(e.group)
	f.entries = slices.Delete(f.entries, i, i+1)
	if len(f.entries) > 0 {
		f.chooseHelp(e.block)
		return
	}
	delete(s.families, name)
	escaped := model.EscapeName(name, model.UnderscoreEscaping)
	if names := s.foreign[escaped]; names != nil {
		if delete(names, name); len(names) == 0 {
			delete(s.foreign, escaped)
		}
	}
}

// chooseHelp finds the HELP of the most recent push again, after gone has left.
func (f *family) chooseHelp(gone *block) {
	if f.helpAt != gone.pushed {
		return
	}
	newest := slices.MaxFunc(f.entries, func(a, b entry) int { return cmp.Compare(a.block.pushed, b.block.pushed) })
	f.help, f.helpAt = newest.block.meta.Value().help, newest.block.pushed
}

// inconsistencies tells what speaks against the families that a group would have
// after a push, looking only at the names that the push touches.
func (s *Store) inconsistencies(g *group, after, pushed []prepared) []string {
	var reasons []string
	exists := func(name string) (dto.MetricType, bool) {
		if i, ok := slices.BinarySearchFunc(after, name, func(p prepared, name string) int { return strings.Compare(p.name(), name) }); ok {
			return after[i].meta.Value().kind, true
		}
		if f := s.families[name]; f != nil && f.sharedBeside(g) {
			return f.kind, true
		}
		return s.config.Reserved(name)
	}
	for _, p := range pushed {
		m := p.meta.Value()
		if kind, own := s.config.Reserved(m.name); own && kind != m.kind {
			reasons = append(reasons, fmt.Sprintf("metric %q has type %s, should have %s as the server's own", m.name, typeName(m.kind), typeName(kind)))
			continue
		}
		if f := s.families[m.name]; f != nil && f.kind != m.kind && f.sharedBeside(g) {
			reasons = append(reasons, fmt.Sprintf("metric %q has type %s, should have %s as in other groups", m.name, typeName(m.kind), typeName(f.kind)))
			continue
		}
		if reason := s.duplicate(g, p); reason != "" {
			reasons = append(reasons, reason)
			continue
		}
		if other, kind := suffixCollision(m.name, m.kind, exists); other != "" {
			reasons = append(reasons, fmt.Sprintf("metric %q collides with the %s %q", m.name, typeName(kind), other))
		}
		if other := s.escapeCollision(m.name, exists); other != "" {
			reasons = append(reasons, fmt.Sprintf("metric %q has the same name as %q where UTF-8 names are escaped", m.name, other))
		}
	}
	return reasons
}

// sharedBeside reports whether a group other than g has the family.
func (f *family) sharedBeside(g *group) bool {
	if len(f.entries) != 1 {
		return len(f.entries) > 1
	}
	return f.entries[0].group.id != g.id
}

func typeName(kind dto.MetricType) string { return strings.ToLower(kind.String()) }

// duplicate tells of the first series that another group has already.
func (s *Store) duplicate(g *group, p prepared) string {
	for i, h := range p.series {
		if owner := s.owners[h]; owner != nil && owner.id != g.id {
			labels := ""
			if f, err := (newImage([]prepared{p})).decodeOnly(); err == nil {
				labels = labelString(f.Metric[i].Label)
			}
			return fmt.Sprintf("metric %q: the labels %s were already seen in the group %s", p.name(), labels, owner.key)
		}
	}
	return ""
}

// suffixCollision looks for a family whose series would have the names that name's
// summary or histogram has, or the other way round.
func suffixCollision(name string, kind dto.MetricType, exists func(string) (dto.MetricType, bool)) (other string, is dto.MetricType) {
	suffixes := map[dto.MetricType][]string{
		dto.MetricType_SUMMARY:         {"_count", "_sum"},
		dto.MetricType_HISTOGRAM:       {"_count", "_sum", "_bucket"},
		dto.MetricType_GAUGE_HISTOGRAM: {"_count", "_sum", "_bucket"},
	}
	for _, suffix := range suffixes[kind] {
		if k, ok := exists(name + suffix); ok {
			return name + suffix, k
		}
	}
	for _, suffix := range []string{"_count", "_sum", "_bucket"} {
		base, ok := strings.CutSuffix(name, suffix)
		if !ok {
			continue
		}
		if k, ok := exists(base); ok && slices.Contains(suffixes[k], suffix) {
			return base, k
		}
	}
	return "", 0
}

// escapeCollision looks for a name that reads the same once it is escaped.
func (s *Store) escapeCollision(name string, exists func(string) (dto.MetricType, bool)) string {
	escaped := model.EscapeName(name, model.UnderscoreEscaping)
	if escaped != name {
		if _, ok := exists(escaped); ok {
			return escaped
		}
	}
	for other := range s.foreign[escaped] {
		if _, ok := exists(other); ok && other != name {
			return other
		}
	}
	return ""
}

// generate makes the families that every group has, sorted by name.
func (s *Store) generate(key Key, st state, now time.Time) []prepared {
	var generated []prepared
	if !st.expired {
		generated = append(generated, gauge(key, failureTimeName, "Last Unix time when changing this group in the Pushgateway failed.", seconds(st.failed)))
	}
	generated = append(generated, gauge(key, pushTimeName, "Last Unix time when changing this group in the Pushgateway succeeded.", seconds(st.pushed)))
	if st.interval > 0 {
		up := 0.0
		if st.up(now) {
			up = 1
		}
		generated = append(generated, gauge(key, pushUpName, "1 while the last good push of the group is younger than its interval and a grace of 10 %, at least 1 min, else 0.", up))
	}
	return generated
}

func seconds(nanos int64) float64 { return float64(nanos) / 1e9 }

// up returns the value of push_up.
func (st state) up(now time.Time) bool { return !st.expired && now.Before(st.upUntil()) }

// upUntil returns when push_up becomes 0.
func (st state) upUntil() time.Time {
	return time.Unix(0, st.pushed).Add(st.interval + max(st.interval/10, time.Minute))
}

func gauge(key Key, name, help string, value float64) prepared {
	p, err := prepareFamily(key, &dto.MetricFamily{
		Name: &name, Help: &help, Type: dto.MetricType_GAUGE.Enum(),
		Metric: []*dto.Metric{{Gauge: &dto.Gauge{Value: proto.Float64(value)}}},
	}, 0)
	if err != nil {
		panic(err) // the key was checked
	}
	return p
}
