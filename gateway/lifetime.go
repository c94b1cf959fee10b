package gateway

import (
	"container/heap"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
)

// Lifetime says how long a group lives, and how often it should be pushed.
type Lifetime struct {
	// TTL is after which time without a push the group's samples go, 0: never.
	TTL time.Duration
	// Interval is how often the group should be pushed, 0: it declares none. With
	// one the group gets push_up.
	Interval time.Duration
}

// unnamed stands for what a group's pushes did not name.
var unnamed = Lifetime{TTL: -1, Interval: -1}

// orElse returns l, with what it doesn't name taken from other.
func (l Lifetime) orElse(other Lifetime) Lifetime {
	if l.TTL < 0 {
		l.TTL = other.TTL
	}
	if l.Interval < 0 {
		l.Interval = other.Interval
	}
	return l
}

// isUp returns the value of push_up.
func (st state) isUp(now time.Time) bool {
	return st.life.Interval > 0 && !st.expired && now.Before(st.upUntil())
}

// upUntil returns when push_up becomes 0: the interval and a grace of 10 %, at
// least 1 min, after the last good push.
func (st state) upUntil() time.Time {
	return time.Unix(0, st.pushed).Add(st.life.Interval + max(st.life.Interval/10, time.Minute) + st.ahead)
}

// expires returns when the samples go, for a state with a TTL. A refused push
// counts too: what it left behind must not stay for ever.
func (st state) expires() time.Time {
	at := time.Unix(0, max(st.pushed, st.failed)).Add(st.life.TTL + st.ahead)
	if st.found > 0 {
		// Which clock the push was stored by is not known; it may be that far behind.
		if found := time.Unix(0, st.found).Add(min(st.life.TTL, maxClockSkew)); found.After(at) {
			return found
		}
	}
	return at
}

// nextChange returns when the group changes by itself.
func (st state) nextChange(forgetAfter time.Duration) (at time.Time, ok bool) {
	earlier := func(t time.Time) {
		if !ok || t.Before(at) {
			at, ok = t, true
		}
	}
	if st.up {
		earlier(st.upUntil())
	}
	switch {
	case st.expired:
		earlier(st.expires().Add(forgetAfter))
	case st.life.TTL > 0:
		earlier(st.expires())
	}
	return at, ok
}

// deadlines is a heap of groups by their next change.
type deadlines []*group

func (d deadlines) Len() int           { return len(d) }
func (d deadlines) Less(i, j int) bool { return d[i].deadline.Before(d[j].deadline) }
func (d deadlines) Swap(i, j int) {
	d[i], d[j] = d[j], d[i]
	d[i].deadlineIndex, d[j].deadlineIndex = i, j
}
func (d *deadlines) Push(x any) {
	g := x.(*group)
	g.deadlineIndex = len(*d)
	*d = append(*d, g)
}
func (d *deadlines) Pop() any {
	last := (*d)[len(*d)-1]
	(*d)[len(*d)-1] = nil
	*d = (*d)[:len(*d)-1]
	last.deadlineIndex = -1
	return last
}

// schedule brings the group's place in the heap up to date.
func (s *Store) schedule(g *group) {
	at, ok := g.nextChange(s.config.ForgetAfter)
	switch listed := g.deadlineIndex >= 0; {
	case !s.has(g) || !ok:
		if listed {
			heap.Remove(&s.deadlines, g.deadlineIndex)
		}
	case listed:
		g.deadline = at
		heap.Fix(&s.deadlines, g.deadlineIndex)
	default:
		g.deadline = at
		heap.Push(&s.deadlines, g)
	}
}

// expire makes the changes whose time has come, in a batch of their own. It is called
// with mu held.
func (s *Store) expire() {
	now := s.config.Now()
	var steps []step
	for len(s.deadlines) > 0 && !s.deadlines[0].deadline.After(now) {
		g := heap.Pop(&s.deadlines).(*group)
		if st := s.age(g, now); st != nil {
			steps = append(steps, *st)
		}
		s.schedule(g)
	}
	gone := s.spools.silentSince(now.Add(-max(s.config.ForgetAfter, minForgetSpools)))
	if s.shared != nil {
		s.aged(steps, gone)
	} else if len(steps) > 0 || len(gone) > 0 {
		s.batches = append(s.batches, &batch{steps: steps, gone: gone, aging: true, sealed: true, done: make(chan struct{})})
	}
}

// age brings a group to the state of now. It returns nil where nothing is to be
// stored.
func (s *Store) age(g *group, now time.Time) *step {
	st := step{group: g, old: g.state}
	next := g.state
	if next.life.TTL > 0 && !now.Before(next.expires()) {
		next.expired = true
	}
	if next.expired && !g.expired {
		s.stats.expired.Add(1)
	}
	if next.expired && (next.life.Interval <= 0 || !now.Before(next.expires().Add(s.config.ForgetAfter))) {
		s.remove(g)
		st.deleted = true
		return &st
	}
	if next.expired == g.expired && next.isUp(now) == g.up {
		return nil
	}
	st.new = s.rebuild(g, next, now)
	s.install(g, st.new)
	if st.new.expired == st.old.expired {
		return nil // push_up is not stored: it follows from the times
	}
	return &st
}

// renewLifetimes gives all groups the lifetimes that count now. Nothing of that is
// stored: it follows from what their pushes named.
func (s *Store) renewLifetimes() {
	now := s.config.Now()
	for _, g := range s.groups {
		if life := g.named.orElse(s.lifetimes(g.key)); life != g.life {
			s.install(g, s.rebuild(g, g.state, now))
			s.schedule(g)
		}
	}
}

// generated is a gauge that the gateway itself has for each group.
type generated struct {
	name, help string
	value      float64
}

// generate makes the families that every group has, sorted by name.
func generate(key Key, st state) []prepared {
	gauges := make([]generated, 0, 3)
	if !st.expired {
		gauges = append(gauges, generated{failureTimeName, "Last Unix time when changing this group in the Pushgateway failed.", 0})
	}
	gauges = append(gauges, generated{pushTimeName, "Last Unix time when changing this group in the Pushgateway succeeded.", 0})
	if st.life.Interval > 0 {
		gauges = append(gauges, generated{pushUpName, "1 while the last good push of the group is younger than its interval and a grace of 10 %, at least 1 min, else 0.", 0})
	}
	for i := range gauges {
		gauges[i].value = st.generatedValue(gauges[i].name)
	}
	if families, plain := encodeGauges(key, gauges); plain {
		return families
	}
	families := make([]prepared, len(gauges))
	for i, g := range gauges {
		var err error
		families[i], err = prepareFamily(key, key.forced(), &dto.MetricFamily{
			Name: &g.name, Help: &g.help, Type: dto.MetricType_GAUGE.Enum(),
			Metric: []*dto.Metric{{Gauge: &dto.Gauge{Value: &g.value}}},
		}, 0)
		if err != nil {
			panic(err) // the key was checked
		}
	}
	return families
}

// generatedValue returns the value of one of the families that generate makes.
func (st state) generatedValue(name string) float64 {
	switch {
	case name == pushTimeName:
		return seconds(st.pushed)
	case name == failureTimeName:
		return seconds(st.failed)
	case st.up:
		return 1
	}
	return 0
}

// withoutGenerated returns the pushed families of an image.
func withoutGenerated(im *image) []prepared {
	return im.all(func(name string) bool { return !isGenerated(name) })
}

func isGenerated(name string) bool {
	return name == pushTimeName || name == failureTimeName || name == pushUpName
}

// seconds returns Unix nanoseconds in seconds, rounded as the Pushgateway does: a
// group that moves here keeps its values.
func seconds(nanos int64) float64 { return float64(nanos) / 1e9 }

// unixNano returns 0 for the zero time.
func unixNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// durationOf reads a duration from the query, else from a header; nil where neither
// has it.
func durationOf(query url.Values, parameter string, h http.Header, header string) (*time.Duration, error) {
	text := query.Get(parameter)
	if text == "" {
		text = h.Get(header)
	}
	if text == "" {
		return nil, nil
	}
	d, err := model.ParseDuration(strings.TrimSpace(text))
	if err != nil {
		return nil, fmt.Errorf("%s=%q is not a duration; write it as in 30m, 24h or 7d, or 0 for none", parameter, text)
	}
	v := time.Duration(d)
	return &v, nil
}

// errFuture: the clock of the client is far ahead of this one.
var errFuture = errors.New("it is in the future; is the clock wrong?")

// timeOf reads a Unix time in seconds, with at most 9 decimals, from a header; nil
// where it isn't there. It returns errFuture, wrapped.
func timeOf(h http.Header, name string, now time.Time) (*time.Time, error) {
	text := strings.TrimSpace(h.Get(name))
	if text == "" {
		return nil, nil
	}
	whole, fraction, _ := strings.Cut(text, ".")
	secs, err := strconv.ParseUint(whole, 10, 33)
	nanos, err2 := strconv.ParseUint((fraction + "000000000")[:max(9, len(fraction))], 10, 30)
	if err != nil || err2 != nil || len(fraction) > 9 {
		return nil, fmt.Errorf("%s: %q is not a time; write Unix seconds with at most 9 decimals, as in 1900000000.25", name, text)
	}
	if secs == 0 && nanos == 0 {
		return new(time.Time), nil
	}
	t := time.Unix(int64(secs), int64(nanos))
	if t.After(now.Add(maxClockSkew)) {
		return nil, fmt.Errorf("%s: %s: %w", name, t.UTC().Format(time.RFC3339), errFuture)
	}
	return &t, nil
}

// maxClockSkew is how far ahead the clock of a client may be, and that of a store that
// shares its groups with others.
const maxClockSkew = 5 * time.Minute
