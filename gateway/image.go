package gateway

import (
	"encoding/binary"
	"fmt"
	"iter"
	"slices"
	"strings"
	"unique"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
)

// image is all families of a group as one piece of memory, immutable. Most groups
// have many families of a few series: with an allocation for each of them the
// store would take twice the memory.
type image struct {
	data   []byte
	blocks []block // sorted by name
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

// all returns the families as they were prepared. Their bytes are the image's.
func (im *image) all() []prepared {
	if im == nil {
		return nil
	}
	families := make([]prepared, len(im.blocks))
	for i := range im.blocks {
		b := &im.blocks[i]
		families[i] = prepared{meta: b.meta, series: slices.Collect(im.hashes(b)), text: im.textOf(b), proto: im.protoOf(b), pushed: b.pushed}
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

// decodeOnly decodes the only family of an image.
func (im *image) decodeOnly() (*dto.MetricFamily, error) { return im.decode(&im.blocks[0]) }

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
	m := b.meta.Value()
	f := new(dto.MetricFamily)
	if err := proto.Unmarshal(im.protoOf(b), f); err != nil {
		return nil, fmt.Errorf("metric %q: stored series: %w", m.name, err)
	}
	f.Name, f.Type = &m.name, &m.kind
	if m.help != "" {
		f.Help = &m.help
	}
	if m.unit != "" {
		f.Unit = &m.unit
	}
	return f, nil
}
