package gateway

import (
	"iter"
	"slices"
	"strings"
	"unique"

	dto "github.com/prometheus/client_model/go"
)

// image is all families of a group, immutable. It is a few pieces of memory: most groups
// have many families of a few series, and with an allocation for each of them the store
// would take twice the memory. What pushes of other values leave alone is shared by the
// images before and after.
type image struct {
	*frame
	places []moving // of the families, in the same order
	data   []byte   // of all families: the text and the protobuf of their series
}

// frame is what an image has beside values and times.
type frame struct {
	parts  []fixed  // sorted by name
	hashes []uint64 // of the series of all families
	// layout is that of the last push where it brought all pushed families, and order
	// tells for each of their series which value of the body it has.
	layout layout
	order  []uint16
}

// fixed is what does not change of a block.
type fixed struct {
	meta   unique.Handle[meta]
	first  uint32 // its first series
	series uint32 // how many it has
	proto  uint32 // size
}

// moving is where a family stands in the data: its text, and behind that the protobuf.
type moving struct {
	pushed      int64 // Unix nanoseconds
	start, text uint32
}

// block is a family in an image.
type block struct {
	fixed
	moving
}

// newImage builds an image of families, sorted by name.
func newImage(families []prepared) *image {
	size, series := 0, 0
	for _, p := range families {
		size += len(p.text) + len(p.proto)
		series += len(p.series)
	}
	im := &image{
		frame:  &frame{parts: make([]fixed, 0, len(families)), hashes: make([]uint64, 0, series)},
		places: make([]moving, 0, len(families)), data: make([]byte, 0, size),
	}
	for _, p := range families {
		im.parts = append(im.parts, fixed{p.meta, uint32(len(im.hashes)), uint32(len(p.series)), uint32(len(p.proto))})
		im.places = append(im.places, moving{p.pushed, uint32(len(im.data)), uint32(len(p.text))})
		im.hashes = append(im.hashes, p.series...)
		im.data = append(append(im.data, p.text...), p.proto...)
	}
	return im
}

// blocks returns the families, and their numbers.
func (im *image) blocks() iter.Seq2[int, block] {
	return func(yield func(int, block) bool) {
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

func (im *image) block(i int) block { return block{im.parts[i], im.places[i]} }

// all returns the families that want takes as they were prepared. Their bytes are
// the image's.
func (im *image) all(want func(name string) bool) []prepared {
	if im == nil {
		return nil
	}
	families := make([]prepared, 0, len(im.parts))
	for _, b := range im.blocks() {
		if want(b.name()) {
			families = append(families, prepared{meta: b.meta, series: im.hashesOf(b), text: im.textOf(b), proto: im.protoOf(b), pushed: b.pushed})
		}
	}
	return families
}

// find returns the family of that name.
func (im *image) find(name string) (b block, ok bool) {
	if im == nil {
		return b, false
	}
	i, ok := slices.BinarySearchFunc(im.parts, name, func(p fixed, name string) int { return strings.Compare(p.name(), name) })
	if !ok {
		return b, false
	}
	return im.block(i), true
}

func (p fixed) name() string { return p.meta.Value().name }

func (im *image) textOf(b block) []byte {
	return im.data[b.start : b.start+b.text : b.start+b.text]
}

func (im *image) protoOf(b block) []byte {
	from := b.start + b.text
	return im.data[from : from+b.proto : from+b.proto]
}

// hashesOf returns the hashes of the series, in the order of the series.
func (im *image) hashesOf(b block) []uint64 {
	return im.hashes[b.first : b.first+b.series : b.first+b.series]
}

// sameFamilies reports whether two images have the same families, with the same
// types and HELP.
func (im *image) sameFamilies(other *image) bool {
	return im != nil && (im.frame == other.frame || slices.EqualFunc(im.parts, other.parts, func(a, b fixed) bool { return a.meta == b.meta }))
}

// same reports which of some families, sorted by name, the image has with the same
// type, HELP and series.
func (im *image) same(families []prepared) []bool {
	same := make([]bool, len(families))
	if im == nil {
		return same
	}
	n := 0
	for i, p := range families {
		for n < len(im.parts) && im.parts[n].meta != p.meta && im.parts[n].name() < p.name() {
			n++
		}
		same[i] = n < len(im.parts) && im.parts[n].meta == p.meta && slices.Equal(im.hashesOf(im.block(n)), p.series)
	}
	return same
}

// decode returns the family as a message.
func (im *image) decode(b block) (*dto.MetricFamily, error) {
	return prepared{meta: b.meta, proto: im.protoOf(b)}.decode()
}
