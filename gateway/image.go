package gateway

import (
	"encoding/binary"
	"iter"
	"slices"
	"strings"
	"unique"

	dto "github.com/prometheus/client_model/go"
)

// image is all families of a group as one piece of memory, immutable. Most groups
// have many families of a few series: with an allocation for each of them the
// store would take twice the memory.
type image struct {
	data   []byte
	blocks []block // sorted by name
	// layout is that of the last push where it brought all pushed families, and order
	// tells for each of their series which value of the body it has.
	layout layout
	order  []uint16
}

// block is one family in an image: from start on, the hashes of its series, its
// text and its protobuf stand one behind the other.
type block struct {
	meta               unique.Handle[meta]
	pushed             int64 // Unix nanoseconds
	start, text, proto uint32
	series             uint32
}

// newImage builds an image of families, sorted by name.
func newImage(families []prepared) *image {
	size := 0
	for _, p := range families {
		size += 8*len(p.series) + len(p.text) + len(p.proto)
	}
	im := &image{data: make([]byte, 0, size), blocks: make([]block, 0, len(families))}
	for _, p := range families {
		im.blocks = append(im.blocks, block{
			meta: p.meta, pushed: p.pushed, start: uint32(len(im.data)),
			text: uint32(len(p.text)), proto: uint32(len(p.proto)), series: uint32(len(p.series)),
		})
		for _, h := range p.series {
			im.data = binary.LittleEndian.AppendUint64(im.data, h)
		}
		im.data = append(append(im.data, p.text...), p.proto...)
	}
	return im
}

// all returns the families that want takes as they were prepared. Their bytes are
// the image's.
func (im *image) all(want func(name string) bool) []prepared {
	if im == nil {
		return nil
	}
	families := make([]prepared, 0, len(im.blocks))
	for i := range im.blocks {
		if b := &im.blocks[i]; want(b.name()) {
			families = append(families, prepared{meta: b.meta, series: slices.Collect(im.hashes(b)), text: im.textOf(b), proto: im.protoOf(b), pushed: b.pushed})
		}
	}
	return families
}

func (im *image) find(name string) *block {
	if im == nil {
		return nil
	}
	i, ok := slices.BinarySearchFunc(im.blocks, name, func(b block, name string) int { return strings.Compare(b.name(), name) })
	if !ok {
		return nil
	}
	return &im.blocks[i]
}

func (b *block) name() string { return b.meta.Value().name }

func (im *image) textOf(b *block) []byte {
	from := b.start + 8*b.series
	return im.data[from : from+b.text : from+b.text]
}

func (im *image) protoOf(b *block) []byte {
	from := b.start + 8*b.series + b.text
	return im.data[from : from+b.proto : from+b.proto]
}

// sameFamilies reports whether two images have the same families, with the same
// types and HELP.
func (im *image) sameFamilies(other *image) bool {
	return im != nil && slices.EqualFunc(im.blocks, other.blocks, func(a, b block) bool { return a.meta == b.meta })
}

// same reports which of some families, sorted by name, the image has with the same
// type, HELP and series.
func (im *image) same(families []prepared) []bool {
	same := make([]bool, len(families))
	if im == nil {
		return same
	}
	blocks := im.blocks
	for i, p := range families {
		for len(blocks) > 0 && blocks[0].meta != p.meta && blocks[0].name() < p.name() {
			blocks = blocks[1:]
		}
		same[i] = len(blocks) > 0 && blocks[0].meta == p.meta && im.hasSameSeries(&blocks[0], p.series)
	}
	return same
}

func (im *image) hasSameSeries(b *block, series []uint64) bool {
	if int(b.series) != len(series) {
		return false
	}
	i := 0
	for h := range im.hashes(b) {
		if h != series[i] {
			return false
		}
		i++
	}
	return true
}

// hasSeries reports whether a series of that hash is in the block.
func (im *image) hasSeries(b *block, hash uint64) bool {
	for h := range im.hashes(b) {
		if h == hash {
			return true
		}
	}
	return false
}

// hashes returns the hashes of the series, in the order of the series.
func (im *image) hashes(b *block) iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		for i := range b.series {
			if !yield(binary.LittleEndian.Uint64(im.data[b.start+8*i:])) {
				return
			}
		}
	}
}

// decode returns the family as a message.
func (im *image) decode(b *block) (*dto.MetricFamily, error) {
	return prepared{meta: b.meta, proto: im.protoOf(b)}.decode()
}
