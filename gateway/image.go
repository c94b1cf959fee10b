package gateway

import (
	"iter"
	"math"
	"slices"
	"sort"
	"strings"
	"sync/atomic"
	"unique"
)

// image is all families of a group, immutable. It is a few pieces of memory: most groups
// have many families of a few series, and with an allocation for each of them the store
// would take twice the memory. What pushes of other values leave alone is shared by the
// images before and after.
type image struct {
	*frame
	values []float64 // of all families: prepared.values
	pushed int64     // when the pushed families came, in Unix nanoseconds
	times  []int64   // the same of each family, nil: they came together
}

// frame is what an image has beside values and times.
type frame struct {
	*familyList
	parts  []extent // of each family of the list
	hashes []uint64 // of the series of all families
	data   []byte   // of all families: prepared.text and prepared.proto
	// layout is that of the last push where it brought all pushed families. places then
	// tells where in the body the values stand, noValue of what the gateway itself says.
	layout layout
	places
}

// noValue is in places.order for the values of the gateway itself.
const noValue = math.MaxUint16

// familyList tells which families a frame has. Most groups have the same ones as others, and
// share the list: with one for each group the collector would look at as many pointers as all
// of them have families.
type familyList struct {
	metas []unique.Handle[meta] // sorted by name
}

// recentLists are the lists that were new last, listCount how many there were in all.
var (
	recentLists [64]atomic.Pointer[familyList]
	listCount   atomic.Uint32
)

// maxShared bounds the families of a list that may stay in recentLists when its groups are
// gone.
const maxShared = 1000

// shared returns a list that has the same families, the list itself where none is there.
func (l *familyList) shared() *familyList {
	if len(l.metas) > maxShared {
		return l
	}
	for i := range recentLists {
		if other := recentLists[i].Load(); other != nil && slices.Equal(other.metas, l.metas) {
			return other
		}
	}
	recentLists[listCount.Add(1)%uint32(len(recentLists))].Store(l)
	return l
}

// name returns the name of a family.
func (l *familyList) name(i int) string { return l.metas[i].Value().name }

// extent is where a family stands in a frame, up to where the next one starts.
type extent struct {
	first  uint32 // of its series
	values uint32 // the first of them
	start  uint32 // in the data
	proto  uint32 // so many bytes at its end are prepared.proto
}

// maxImage bounds the data of an image, whose extents have 32 bits. It leaves room for what
// the gateway itself says of a group.
const maxImage int64 = 4_000_000_000

// imageSize returns how many bytes of data families take in an image.
func imageSize(families []prepared) (size int64) {
	for _, p := range families {
		size += int64(len(p.text)) + int64(len(p.proto))
	}
	return size
}

// newImage builds an image of at most maxImage bytes of families, sorted by name.
func newImage(families []prepared) *image {
	size, series, values := 0, 0, 0
	for _, p := range families {
		size += len(p.text) + len(p.proto)
		series += len(p.series)
		values += len(p.values)
	}
	list := &familyList{make([]unique.Handle[meta], 0, len(families))}
	im := &image{
		frame:  &frame{parts: make([]extent, 0, len(families)), hashes: make([]uint64, 0, series), data: make([]byte, 0, size)},
		values: make([]float64, 0, values),
	}
	for _, p := range families {
		list.metas = append(list.metas, p.meta)
		im.parts = append(im.parts, extent{uint32(len(im.hashes)), uint32(len(im.values)), uint32(len(im.data)), uint32(len(p.proto))})
		im.hashes = append(im.hashes, p.series...)
		im.values = append(im.values, p.values...)
		im.data = append(append(im.data, p.text...), p.proto...)
		if !isGenerated(p.name()) {
			im.pushed = max(im.pushed, p.pushed)
		}
	}
	im.familyList = list.shared()
	if slices.ContainsFunc(families, func(p prepared) bool { return p.pushed != im.pushed && !isGenerated(p.name()) }) {
		im.times = make([]int64, len(families))
		for i, p := range families {
			im.times[i] = p.pushed
		}
	}
	return im
}

// setLayout notes that the pushed families came in a body of that layout, and where in it
// their values stand. It is called before the image is used.
func (im *image) setLayout(of layout, at places) {
	if of.values == 0 {
		return
	}
	im.layout, im.places = of, at
	if len(at.order) == 0 {
		return
	}
	im.order = make([]uint16, 0, len(im.values))
	for _, b := range im.blocks() {
		if isGenerated(b.name()) {
			im.order = append(im.order, noValue)
			continue
		}
		im.order = append(im.order, at.order[:len(b.values)]...)
		at.order = at.order[len(b.values):]
	}
}

// pushedPlaces returns the places that setLayout was called with.
func (im *image) pushedPlaces() places {
	at := im.places
	at.order = slices.DeleteFunc(slices.Clone(at.order), func(n uint16) bool { return n == noValue })
	return at
}

// blocks returns the families, and their numbers.
func (im *image) blocks() iter.Seq2[int, prepared] {
	return func(yield func(int, prepared) bool) {
		if im == nil {
			return
		}
		for i := range im.parts {
			if !yield(i, im.block(i)) {
				return
			}
		}
	}
}

// block returns a family as it was prepared. Its memory is the image's.
func (im *image) block(i int) prepared {
	from, first, end := im.parts[i], im.parts[i].first, extent{first: uint32(len(im.hashes)), values: uint32(len(im.values)), start: uint32(len(im.data))}
	if i+1 < len(im.parts) {
		end = im.parts[i+1]
	}
	behind := end.start - from.proto
	b := prepared{meta: im.metas[i], series: im.hashes[first:end.first:end.first], text: im.data[from.start:behind:behind], pushed: im.pushed}
	if from.proto > 0 {
		b.proto = im.data[behind:end.start:end.start]
	}
	if from.values < end.values {
		b.values = im.values[from.values:end.values:end.values]
	}
	if im.times != nil {
		b.pushed = im.times[i]
	}
	return b
}

// all returns the families that want takes. Their memory is the image's.
func (im *image) all(want func(name string) bool) []prepared {
	if im == nil {
		return nil
	}
	families := make([]prepared, 0, len(im.parts))
	for _, b := range im.blocks() {
		if want(b.name()) {
			families = append(families, b)
		}
	}
	return families
}

// find returns the family of that name.
func (im *image) find(name string) (b prepared, ok bool) {
	if im == nil {
		return b, false
	}
	i, ok := slices.BinarySearchFunc(im.metas, name, func(m unique.Handle[meta], name string) int { return strings.Compare(m.Value().name, name) })
	if !ok {
		return b, false
	}
	return im.block(i), true
}

// familyOf returns the name of the family that the n-th value is the first one of. Those
// before it that have none are other ones.
func (im *image) familyOf(n int) string {
	i := sort.Search(len(im.parts), func(i int) bool { return im.parts[i].values > uint32(n) }) - 1
	return im.name(i)
}

// sameFamilies reports whether two images have the same families, with the same
// types and HELP.
func (im *image) sameFamilies(other *image) bool {
	return im != nil && (im.familyList == other.familyList || slices.Equal(im.metas, other.metas))
}

// sameness is what a family has in common with that of the same name in an image.
type sameness int8

const (
	different  sameness = iota
	sameMeta            // type and HELP
	sameSeries          // and all series
)

// same reports what some families, sorted by name, have in common with those of the image.
func (im *image) same(families []prepared) []sameness {
	same := make([]sameness, len(families))
	if im == nil {
		return same
	}
	n := 0
	for i, p := range families {
		for n < len(im.metas) && im.metas[n] != p.meta && im.name(n) < p.name() {
			n++
		}
		if n < len(im.metas) && im.metas[n] == p.meta {
			same[i] = sameMeta
			if slices.Equal(im.block(n).series, p.series) {
				same[i] = sameSeries
			}
		}
	}
	return same
}
