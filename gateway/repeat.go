package gateway

import (
	"bytes"
	"errors"
	"hash/maphash"
	"math"
	"slices"
	"sync"
)

// Jobs push the same series again and again; only the values differ. Such a push is
// neither parsed nor checked nor encoded anew: it replaces the values alone, which takes a
// tenth of the time.

// layout stands for all of a body but its values: two bodies of one layout have the same
// series. The zero layout is that of no body.
type layout struct {
	hash   uint64 // of the body without its values
	values int
}

// layoutSeeds make hashes that nobody outside can aim at. One in 2^64 pushes of an other
// layout would be taken for the same one.
var layoutSeeds = [...]maphash.Seed{formatText: maphash.MakeSeed(), formatProtobuf: maphash.MakeSeed()}

// maxValues bounds the values of a layout: places.order has 16 bits for each.
const maxValues = noValue

// layoutBuffer is what a body is taken apart into.
type layoutBuffer struct {
	rest   []byte
	values []float64
}

var layoutBuffers = sync.Pool{New: func() any { return new(layoutBuffer) }}

// layoutOf returns the layout of a body and its values, in the order in which they stand
// there. It does not look at what else is in it: a body means what another one of its layout
// means that was parsed. A body that has no layout, in OpenMetrics say, where whether it is
// valid depends on the values, has the zero layout, or one that nothing else has.
func (f format) layoutOf(body []byte) (layout, []float64) {
	if f != formatText && f != formatProtobuf {
		return layout{}, nil
	}
	buf := layoutBuffers.Get().(*layoutBuffer)
	buf.values = buf.values[:0]
	var ok bool
	buf.rest, ok = f.replaceValues(buf.rest[:0], body, func(old float64) float64 {
		buf.values = append(buf.values, old)
		return 0
	})
	if cap(buf.rest) <= smallBody {
		defer layoutBuffers.Put(buf)
	}
	if !ok || len(buf.values) > maxValues {
		return layout{}, nil
	}
	return layout{maphash.Bytes(layoutSeeds[f], buf.rest), len(buf.values)}, slices.Clone(buf.values)
}

// replaceValues appends a body with other values: value returns each, given the one that is
// there. It returns false where a body has no layout.
func (f format) replaceValues(out, body []byte, value func(old float64) float64) ([]byte, bool) {
	if f == formatProtobuf {
		r := rewriter{out: out, value: func(_ slot, old float64) float64 { return value(old) }}
		ok := r.body(body)
		return r.out, ok
	}
	copied := 0
	for start := 0; start < len(body); {
		end := bytes.IndexByte(body[start:], '\n')
		if end < 0 {
			return out, false
		}
		end += start
		if start < end && (body[start] == ' ' || body[start] == '\t') {
			return out, false // a comment may stand behind it
		}
		if start < end && body[start] != '#' {
			at := start + bytes.LastIndexByte(body[start:end], ' ') + 1
			old, ok := plainFloat(body[at:end])
			if !ok {
				return out, false
			}
			out = appendFloat(append(out, body[copied:at]...), value(old))
			copied = end
		}
		start = end + 1
	}
	return append(out, body[copied:]...), true
}

// places tells where in a body the values of families stand, that of all one after the
// other: those of a body of the same layout are taken from there.
type places struct {
	// order is which value of the body each is. Nil: it is not known yet; empty: it can't
	// be told.
	order []uint16
	// counts are the values of the body that have to be exact counts.
	counts []uint16
}

// fit reports whether the values of a body that have to be exact counts are.
func (at places) fit(values []float64) bool {
	for _, n := range at.counts {
		if !isExactCount(values[n]) {
			return false
		}
	}
	return true
}

// firstNumber is above what bodies have at other places than those of values.
const firstNumber = 1 << 40

// placesIn finds out where in a body the values of families stand. The families were made of
// it, and values are what layoutOf returned of it. It makes the same of a body that has in
// place of each value its number, from firstNumber on.
func (f format) placesIn(body []byte, values []float64, key Key, families []prepared) places {
	unknown := places{order: []uint16{}}
	number := float64(firstNumber - 1)
	numbered, ok := f.replaceValues(make([]byte, 0, len(body)), body, func(float64) float64 {
		number++
		return number
	})
	if !ok {
		return unknown
	}
	parsed, err := f.parse(numbered)
	if err != nil {
		return unknown
	}
	numbers, reasons := prepare(key, parsed, 0)
	if len(reasons) > 0 || !slices.EqualFunc(numbers.families, families, prepared.sameSeries) {
		return unknown
	}
	at := places{order: make([]uint16, 0, len(values))}
	for i, p := range numbers.families {
		counts := p.countLines()
		for j, number := range p.values {
			n := int64(number) - firstNumber
			if n < 0 || n >= int64(len(values)) || float64(n+firstNumber) != number || math.Float64bits(values[n]) != math.Float64bits(families[i].values[j]) {
				return unknown
			}
			at.order = append(at.order, uint16(n))
			if counts != nil && counts[j] {
				at.counts = append(at.counts, uint16(n))
			}
		}
	}
	return at
}

// sameSeries reports whether two families are the same in all but values and times, and
// the values stand apart.
func (p prepared) sameSeries(o prepared) bool {
	return p.meta == o.meta && p.values != nil && len(p.values) == len(o.values) &&
		slices.Equal(p.series, o.series) && bytes.Equal(p.text, o.text) && bytes.Equal(p.proto, o.proto)
}

// countLines tells of each value of a summary or a histogram whether it has to be an exact
// count. It returns nil for other families.
func (p prepared) countLines() []bool {
	m := p.meta.Value()
	if suffixesOf(m.kind) == nil {
		return nil
	}
	counts, n := make([]bool, len(p.values)), 0
	for line := range bytes.Lines(p.text) {
		suffix := line[len(m.name):]
		counts[n] = bytes.HasPrefix(suffix, []byte("_bucket{")) || bytes.HasPrefix(suffix, []byte("_count{"))
		n++
	}
	return counts
}

// errNewLayout: the group is no longer of the layout that a push of values is for.
var errNewLayout = errors.New("the group has other series now")

// layoutOf returns the group of that key, nil where there is none; the layout of its last
// push, the zero layout where that did not bring all that the group has; and where the
// values stand in it.
func (s *Store) layoutOf(key Key) (*group, layout, places) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	g := s.get(key)
	if g == nil {
		return nil, layout{}, places{}
	}
	return g, g.image.layout, g.image.places
}

// repeat makes an edit that brings the values of a layout. What other groups have does
// not matter: the series are there already.
func (s *Store) repeat(g *group, e *edit) (*step, error) {
	if g == nil || g.image.layout != e.layout || len(g.image.order) == 0 || !g.image.fit(e.values) {
		return nil, errNewLayout
	}
	next := g.afterPush(e)
	if e.ttl != nil || e.interval != nil {
		next.life = next.named.orElse(s.lifetimes(g.key))
	}
	if (next.life.Interval > 0) != (g.life.Interval > 0) {
		return nil, errNewLayout // push_up comes or goes
	}
	next.up = next.isUp(s.config.Now())
	next.image = g.image.withValues(e.values, next)
	st := &step{group: g, old: g.state, new: next, repeats: next.named == g.named && next.failed == g.failed}
	s.install(g, next)
	return st, nil
}

// withValues returns the image with the values of a body of its layout, and with what
// the gateway itself says of the state.
func (im *image) withValues(values []float64, st state) *image {
	next := &image{frame: im.frame, values: make([]float64, len(im.values)), pushed: st.pushed}
	for i, n := range im.order {
		if n == noValue {
			next.values[i] = st.generatedValue(im.familyOf(i))
		} else {
			next.values[i] = values[n]
		}
	}
	return next
}
