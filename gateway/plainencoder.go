package gateway

import (
	"bytes"
	"math"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"unique"

	"github.com/cespare/xxhash/v2"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
)

// plainEncoder does for plain bodies what format.parse and prepare do together, in one
// pass and without building messages: that takes a sixth of the time, and parsing and
// encoding are most of what a push of other series costs. A body is plain that has
// counters, gauges and untyped metrics only, in the form in which client libraries write
// it, as text or protobuf. Of any other, encodePlain says so and leaves it, errors
// included, to the two: it accepts nothing that they would not accept, and its result is
// the same.
type plainEncoder struct {
	forced []forcedLabel
	now    int64

	families []plainFamily
	text     []byte // of all series, without their values; memory that is used again
	series   []plainSeries
	labels   []plainLabel // of all series
	hash     xxhash.Digest

	metas   map[string]unique.Handle[meta] // by type, name and HELP: see metaOf
	scratch []byte
	names   [][]byte
	places  []place
}

// place is the order of a family's series: the numbers that they have in the body.
type place struct {
	name  []byte
	order []uint16
}

// forcedLabel is a label that every series has: of the grouping key, or instance.
type forcedLabel struct {
	plainLabel
	weak bool // instance="", which the series' own replaces
}

type plainLabel struct{ name, value []byte }

// plainFamily is a family on its way: its series are those up to that of the next.
type plainFamily struct {
	name, help       []byte
	kind             dto.MetricType
	hasType, hasHelp bool
	series           int
}

// plainSeries says where a series' text and labels end.
type plainSeries struct {
	hash         uint64
	value        float64
	text, labels int
}

var plainEncoders = sync.Pool{New: func() any {
	return &plainEncoder{metas: map[string]unique.Handle[meta]{}}
}}

// maxMetas bounds what an encoder remembers of families.
const maxMetas = 4096

// encodePlain returns what a plain body brings for a group; false where it isn't
// plain.
func (f format) encodePlain(key Key, body []byte, now int64) (pushedFamilies, bool) {
	e := plainEncoders.Get().(*plainEncoder)
	defer plainEncoders.Put(e)
	e.reset(key, now)
	plain := e.plainKey()
	switch f {
	case formatText:
		plain = plain && e.parseText(body)
	case formatProtobuf:
		plain = plain && e.parseProtobuf(body)
	default:
		plain = false
	}
	if !plain {
		return pushedFamilies{}, false
	}
	return e.result(false)
}

// encodeGauges returns one gauge a family for a group; false where its key isn't
// plain.
func encodeGauges(key Key, gauges []generated) ([]prepared, bool) {
	e := plainEncoders.Get().(*plainEncoder)
	defer plainEncoders.Put(e)
	e.reset(key, 0)
	if !e.plainKey() {
		return nil, false
	}
	for _, g := range gauges {
		f := plainFamily{name: []byte(g.name), help: []byte(g.help), kind: dto.MetricType_GAUGE, series: len(e.series)}
		e.families = append(e.families, f)
		first := len(e.labels)
		e.forceLabels(first)
		e.add(&f, e.labels[first:], g.value)
	}
	out, ok := e.result(true)
	return out.families, ok
}

func (e *plainEncoder) reset(key Key, now int64) {
	e.now, e.forced = now, e.forced[:0]
	for _, l := range key {
		e.forced = append(e.forced, forcedLabel{plainLabel{[]byte(l.Name), []byte(l.Value)}, false})
	}
	if _, ok := key.Get(model.InstanceLabel); !ok {
		e.forced = append(e.forced, forcedLabel{plainLabel{[]byte(model.InstanceLabel), nil}, true})
	}
	e.families, e.series, e.labels = e.families[:0], e.series[:0], e.labels[:0]
	if cap(e.text) > smallBody {
		e.text = nil
	}
	e.text = e.text[:0]
	if len(e.metas) > maxMetas {
		clear(e.metas)
	}
}

var labelEscaper = strings.NewReplacer(`\`, `\\`, "\n", `\n`, `"`, `\"`)

// plainKey reports whether the text of the forced labels is the same in every
// escaping scheme.
func (e *plainEncoder) plainKey() bool {
	return !slices.ContainsFunc(e.forced, func(l forcedLabel) bool { return !legacyLabel(l.name) })
}

// forceLabels puts the forced labels onto the series whose labels start at first,
// and sorts them. It returns false where a name stands twice.
func (e *plainEncoder) forceLabels(first int) bool {
	own := e.labels[first:]
	for i := range own {
		for j := range i {
			if bytes.Equal(own[i].name, own[j].name) {
				return false
			}
		}
	}
	for _, l := range e.forced {
		i := slices.IndexFunc(e.labels[first:], func(o plainLabel) bool { return bytes.Equal(o.name, l.name) })
		switch {
		case i < 0:
			e.labels = append(e.labels, l.plainLabel)
		case !l.weak:
			e.labels[first+i].value = l.value
		}
	}
	sortLabels(e.labels[first:])
	return true
}

// sortLabels sorts labels by name. Nearly all series have few, which are nearly in order.
func sortLabels(labels []plainLabel) {
	if len(labels) > 12 {
		sort.Slice(labels, func(i, j int) bool { return bytes.Compare(labels[i].name, labels[j].name) < 0 })
		return
	}
	for i := range labels {
		for j := i; j > 0 && bytes.Compare(labels[j].name, labels[j-1].name) < 0; j-- {
			labels[j], labels[j-1] = labels[j-1], labels[j]
		}
	}
}

// add encodes a series, as encodeText and hashSeries do.
func (e *plainEncoder) add(f *plainFamily, labels []plainLabel, value float64) {
	e.hash.Reset()
	e.hash.Write(f.name)
	e.hash.Write(hashSeparator)
	e.text = append(append(e.text, f.name...), '{')
	for i, l := range labels {
		e.hash.Write(l.name)
		e.hash.Write(hashSeparator)
		e.hash.Write(l.value)
		e.hash.Write(hashSeparator)
		if i > 0 {
			e.text = append(e.text, ',')
		}
		e.text = append(append(e.text, l.name...), '=', '"')
		if bytes.ContainsAny(l.value, "\\\n\"") {
			e.text = append(e.text, labelEscaper.Replace(string(l.value))...)
		} else {
			e.text = append(e.text, l.value...)
		}
		e.text = append(e.text, '"')
	}
	e.text = append(e.text, "} \n"...)
	e.series = append(e.series, plainSeries{hash: e.hash.Sum64(), value: value, text: len(e.text), labels: len(e.labels)})
}

// appendFloat appends a float as the text format writes it.
func appendFloat(b []byte, f float64) []byte {
	switch {
	case f == 0: // minus zero too
		return append(b, '0')
	case math.IsInf(f, +1):
		return append(b, "+Inf"...)
	case f > -1e6 && f < 1e6 && f == math.Trunc(f): // larger ones get an exponent
		return strconv.AppendInt(b, int64(f), 10)
	}
	return strconv.AppendFloat(b, f, 'g', -1, 64)
}

// result puts the families together, sorted by name, and their series in the order of
// compareSeries; those that the gateway generates only if that is said. It returns false
// where a series stands twice, or a family goes on after another.
func (e *plainEncoder) result(generated bool) (out pushedFamilies, ok bool) {
	inOrder := e.inOrder()
	if !inOrder && e.interleaved() {
		return out, false // the slow way puts them together
	}
	text := bytes.Clone(e.text) // it outlives the encoder: the writer copies it into an image
	hashes, values := make([]uint64, len(e.series)), make([]float64, len(e.series))
	out.families = make([]prepared, 0, len(e.families))
	orders := make([]uint16, len(e.series)) // of the families one after the other, as they stand in the body
	e.places = e.places[:0]
	for i := range e.families {
		f := &e.families[i]
		from, to := f.series, len(e.series)
		if i+1 < len(e.families) {
			to = e.families[i+1].series
		}
		if from == to || !generated && isGenerated(string(f.name)) {
			continue // the parser too leaves out a family that has no series
		}
		p := prepared{meta: e.metaOf(f), pushed: e.now, series: hashes[from:to:to], values: values[from:to:to]}
		for n := from; n < to; n++ {
			hashes[n], values[n] = e.series[n].hash, e.series[n].value
		}
		order := orders[from:to:to]
		for n := from; n < to; n++ {
			order[n-from] = uint16(n)
		}
		start, _ := e.start(from)
		last := e.series[to-1]
		p.text = text[start:last.text:last.text]
		if to-from > 1 && !e.sorted(from, to) && !e.sort(&p, order, from, to) {
			return pushedFamilies{}, false
		}
		out.families = append(out.families, p)
		e.places = append(e.places, place{f.name, order})
	}
	if !inOrder {
		sort.Slice(out.families, func(i, j int) bool { return out.families[i].name() < out.families[j].name() })
		sort.Slice(e.places, func(i, j int) bool { return bytes.Compare(e.places[i].name, e.places[j].name) < 0 })
	}
	if len(e.series) <= maxValues {
		out.order = make([]uint16, 0, len(e.series))
		for _, p := range e.places {
			out.order = append(out.order, p.order...)
		}
	}
	return out, true
}

// inOrder reports whether the families stand in the order of their names, each once: most
// client libraries write them so.
func (e *plainEncoder) inOrder() bool {
	for i := 1; i < len(e.families); i++ {
		if bytes.Compare(e.families[i-1].name, e.families[i].name) >= 0 {
			return false
		}
	}
	return true
}

// interleaved reports whether a family goes on after another one.
func (e *plainEncoder) interleaved() bool {
	e.names = e.names[:0]
	for i := range e.families {
		e.names = append(e.names, e.families[i].name)
	}
	sort.Slice(e.names, func(i, j int) bool { return bytes.Compare(e.names[i], e.names[j]) < 0 })
	for i := 1; i < len(e.names); i++ {
		if bytes.Equal(e.names[i-1], e.names[i]) {
			return true
		}
	}
	return false
}

// start returns where the text and the labels of the n-th series start.
func (e *plainEncoder) start(n int) (text, labels int) {
	if n == 0 {
		return 0, 0
	}
	before := e.series[n-1]
	return before.text, before.labels
}

// compare orders two series as compareSeries does.
func (e *plainEncoder) compare(a, b int) int {
	_, fromA := e.start(a)
	_, fromB := e.start(b)
	labelsA, labelsB := e.labels[fromA:e.series[a].labels], e.labels[fromB:e.series[b].labels]
	if len(labelsA) != len(labelsB) {
		return len(labelsA) - len(labelsB)
	}
	for i := range labelsA {
		if c := bytes.Compare(labelsA[i].value, labelsB[i].value); c != 0 {
			return c
		}
	}
	for i := range labelsA {
		if c := bytes.Compare(labelsA[i].name, labelsB[i].name); c != 0 {
			return c
		}
	}
	return 0
}

func (e *plainEncoder) sorted(from, to int) bool {
	for n := from + 1; n < to; n++ {
		if e.compare(n-1, n) >= 0 {
			return false
		}
	}
	return true
}

// sort puts the series of a family in order. It returns false where one stands
// twice.
func (e *plainEncoder) sort(p *prepared, places []uint16, from, to int) bool {
	order := make([]int, to-from)
	for i := range order {
		order[i] = from + i
	}
	sort.Slice(order, func(i, j int) bool { return e.compare(order[i], order[j]) < 0 })
	text := make([]byte, 0, len(p.text))
	for i, n := range order {
		places[i] = uint16(n)
		if i > 0 && e.compare(order[i-1], n) == 0 {
			return false
		}
		from, _ := e.start(n)
		text = append(text, e.text[from:e.series[n].text]...)
		p.series[i], p.values[i] = e.series[n].hash, e.series[n].value
	}
	p.text = text
	return true
}

// metaOf returns what describes a family. Jobs push the same families again and
// again.
func (e *plainEncoder) metaOf(f *plainFamily) unique.Handle[meta] {
	e.scratch = append(e.scratch[:0], byte(f.kind))
	e.scratch = append(append(append(e.scratch, f.name...), 0xff), f.help...)
	if m, ok := e.metas[string(e.scratch)]; ok {
		return m
	}
	m := unique.Make(meta{name: string(f.name), help: string(f.help), kind: f.kind})
	e.metas[string(e.scratch)] = m
	return m
}

func isNameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == ':'
}

// legacyName reports whether a metric's name follows the legacy rules.
func legacyName(name []byte) bool {
	for _, c := range name {
		if !isNameByte(c) {
			return false
		}
	}
	return len(name) > 0 && (name[0] < '0' || name[0] > '9')
}

// legacyLabel reports whether a label's name follows the legacy rules.
func legacyLabel(name []byte) bool {
	return legacyName(name) && bytes.IndexByte(name, ':') < 0
}

// plainLabelName reports whether a series may have a label of that name, and its text is
// the same in every escaping scheme.
func plainLabelName(name []byte) bool {
	return legacyLabel(name) && !bytes.HasPrefix(name, reservedPrefix)
}

var reservedPrefix = []byte(model.ReservedLabelPrefix)
