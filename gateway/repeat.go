package gateway

import (
	"bytes"
	"errors"
	"hash/maphash"
	"sync"
)

// Jobs push the same series again and again; only the values differ. Such a push is
// neither parsed nor checked nor encoded anew: it replaces the values alone, which takes a
// tenth of the time.

// layout stands for all of a plain body in text format but its values: two bodies of one
// layout have the same series. The zero layout is that of no body.
type layout struct {
	hash   uint64 // of the body without its values
	values int
}

// layoutSeed makes hashes that nobody outside can aim at. One in 2^64 pushes of an other
// layout would be taken for the same one.
var layoutSeed = maphash.MakeSeed()

// maxValues bounds the values of a layout: image.order has 16 bits for each.
const maxValues = noValue

var layoutBuffers = sync.Pool{New: func() any { return new([]byte) }}

// layoutOf returns the layout of a body in text format 0.0.4 and its values, in the order
// in which they stand there. It does not look at what else is in a line: a body means
// what another one of its layout means that was parsed. A body that textEncoder doesn't
// take has the zero layout, or one that nothing else has.
func layoutOf(body []byte) (layout, []float64) {
	buf := layoutBuffers.Get().(*[]byte)
	defer layoutBuffers.Put(buf)
	rest := (*buf)[:0]
	values := make([]float64, 0, len(body)/48+1)
	copied := 0
	for start := 0; start < len(body); {
		end := bytes.IndexByte(body[start:], '\n')
		if end < 0 {
			return layout{}, nil
		}
		end += start
		if start < end && body[start] != '#' {
			at := start + bytes.LastIndexByte(body[start:end], ' ') + 1
			value, ok := plainFloat(body[at:end])
			if !ok || len(values) == maxValues {
				return layout{}, nil
			}
			values = append(values, value)
			rest = append(rest, body[copied:at]...)
			copied = end
		}
		start = end + 1
	}
	rest = append(rest, body[copied:]...)
	if cap(rest) <= smallBody {
		*buf = rest
	}
	return layout{maphash.Bytes(layoutSeed, rest), len(values)}, values
}

// errNewLayout: the group is no longer of the layout that a push of values is for.
var errNewLayout = errors.New("the group has other series now")

// hasLayout reports whether the group of that key has the series that a body of the
// layout would bring, and no others.
func (s *Store) hasLayout(key Key, of layout) bool {
	if of.values == 0 {
		return false
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	g := s.get(key)
	return g != nil && g.image.layout == of
}

// repeat makes an edit that brings the values of a layout. What other groups have does
// not matter: the series are there already.
func (s *Store) repeat(g *group, e *edit) (*step, error) {
	if g == nil || g.image.layout != e.layout {
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
