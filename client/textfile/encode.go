package textfile

import (
	"encoding/binary"
	"errors"
	"math"
	"slices"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
)

// How a family of a file is stored, until the file changes. Numbers are unsigned varints,
// texts have their length in front, and every size is known before what it is of, so that
// a reader who wants the names alone skips the rest:
//
//	header size, then the header: name, help, unit, kind (a byte), duplicates, series,
//	    body size
//	hashes: 8 bytes a series, little-endian, as hashSeries makes them
//	body: number of label names, label names, series
//
// A series has one value for each label name: how many bytes it shares with that of the
// series in front, and the rest as a text. The series are sorted, so that is little. What
// follows is one of
//
//	formInt, and the value as a signed varint
//	formFloat, and the value's 8 bytes, little-endian
//	formMessage, and as a text the protobuf message of what else is neither
//
// A family of many series takes about a third of what its text does.
const (
	formInt = iota
	formFloat
	formMessage
)

var errStored = errors.New("what was stored of the file is damaged")

// encodeFamily appends a family that is complete. duplicates is how many series more the
// file has that are there already.
func encodeFamily(b []byte, f *dto.MetricFamily, duplicates int) ([]byte, error) {
	var body []byte
	var names []string
	if len(f.Metric) > 0 {
		for _, l := range f.Metric[0].Label {
			names = append(names, l.GetName())
		}
		body = binary.AppendUvarint(make([]byte, 0, 32*len(f.Metric)), uint64(len(names)))
		for _, name := range names {
			body = appendText(body, name)
		}
	}
	var before []*dto.LabelPair
	for _, m := range f.Metric {
		if len(m.Label) != len(names) {
			return nil, errors.New("its series have different labels")
		}
		for i, l := range m.Label {
			value, shared := l.GetValue(), 0
			if before != nil {
				last := before[i].GetValue()
				for most := min(len(value), len(last)); shared < most && value[shared] == last[shared]; {
					shared++
				}
			}
			body = binary.AppendUvarint(body, uint64(shared))
			body = appendText(body, value[shared:])
		}
		before = m.Label
		if value, plain := plainValue(m, f.GetType()); !plain {
			message, err := proto.Marshal(&dto.Metric{Gauge: m.Gauge, Counter: m.Counter, Summary: m.Summary, Untyped: m.Untyped, Histogram: m.Histogram})
			if err != nil {
				return nil, err
			}
			body = appendText(append(body, formMessage), string(message))
		} else if n := int64(value); math.Abs(value) < 1<<53 && math.Float64bits(float64(n)) == math.Float64bits(value) {
			body = binary.AppendVarint(append(body, formInt), n)
		} else {
			body = binary.LittleEndian.AppendUint64(append(body, formFloat), math.Float64bits(value))
		}
	}
	header := appendText(nil, f.GetName())
	header = appendText(header, f.GetHelp())
	header = appendText(header, f.GetUnit())
	header = append(header, byte(f.GetType()))
	for _, n := range []int{duplicates, len(f.Metric), len(body)} {
		header = binary.AppendUvarint(header, uint64(n))
	}
	b = appendText(b, string(header))
	for _, m := range f.Metric {
		b = binary.LittleEndian.AppendUint64(b, hashSeries(m.Label))
	}
	return append(b, body...), nil
}

// plainValue returns the value of a series that has nothing else.
func plainValue(m *dto.Metric, kind dto.MetricType) (value float64, plain bool) {
	switch {
	case m.Summary != nil || m.Histogram != nil:
	case kind == dto.MetricType_GAUGE && m.Counter == nil && m.Untyped == nil:
		return m.Gauge.GetValue(), m.Gauge != nil && m.Gauge.Value != nil
	case kind == dto.MetricType_UNTYPED && m.Counter == nil && m.Gauge == nil:
		return m.Untyped.GetValue(), m.Untyped != nil && m.Untyped.Value != nil
	case kind == dto.MetricType_COUNTER && m.Gauge == nil && m.Untyped == nil:
		return m.Counter.GetValue(), m.Counter != nil && m.Counter.Value != nil && m.Counter.Exemplar == nil && m.Counter.CreatedTimestamp == nil
	}
	return 0, false
}

func appendText(b []byte, text string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(text))), text...)
}

// decoder reads what is stored. It notes that something is wrong, and yields zeros then.
type decoder struct {
	b      []byte
	broken bool
}

func (d *decoder) number() int {
	n, size := binary.Uvarint(d.b)
	if size <= 0 || n > math.MaxInt32 {
		d.broken, d.b = true, nil
		return 0
	}
	d.b = d.b[size:]
	return int(n)
}

func (d *decoder) bytes(n int) []byte {
	if n > len(d.b) {
		d.broken, d.b = true, nil
		return nil
	}
	text := d.b[:n]
	d.b = d.b[n:]
	return text
}

func (d *decoder) text() []byte { return d.bytes(d.number()) }

// seriesDecoder makes series of bodies. What it makes them of is used again after release.
type seriesDecoder struct {
	decoder
	kind   dto.MetricType
	names  []string
	values []*string // of the series in front
	text   []byte

	metrics  slab[dto.Metric]
	labels   slab[*dto.LabelPair]
	pairs    slab[dto.LabelPair]
	texts    slab[string]
	numbers  slab[float64]
	gauges   slab[dto.Gauge]
	counters slab[dto.Counter]
	untyped  slab[dto.Untyped]
}

// slab hands out zeros, many of them at a time, which costs less than one by one.
type slab[T any] struct {
	all  []T
	used int
}

func (s *slab[T]) take(n int) []T {
	if s.used+n > len(s.all) {
		// Those that are out stay where they are.
		s.all, s.used = make([]T, max(n, min(2*len(s.all), pieceSize))), 0
	}
	taken := s.all[s.used : s.used+n : s.used+n]
	s.used += n
	return taken
}

func (s *slab[T]) release() {
	clear(s.all[:s.used])
	s.used = 0
}

// release takes back all series.
func (d *seriesDecoder) release() {
	for i, value := range d.values {
		kept := *value
		d.values[i] = &kept
	}
	d.metrics.release()
	d.labels.release()
	d.pairs.release()
	d.texts.release()
	d.numbers.release()
	d.gauges.release()
	d.counters.release()
	d.untyped.release()
}

// begin starts with a body. Those in front are over.
func (d *seriesDecoder) begin(body []byte, kind dto.MetricType) {
	d.decoder, d.kind, d.values = decoder{b: body}, kind, d.values[:0]
	if len(body) == 0 {
		return
	}
	count := d.number()
	if count > len(body) {
		d.broken = true
		return
	}
	names := d.names
	if len(names) != count {
		names = make([]string, count)
	}
	empty := ""
	for i := range count {
		if name := d.decoder.text(); names[i] != string(name) {
			if len(d.names) == count && &names[0] == &d.names[0] {
				names = slices.Clone(names) // series that are out point to them
			}
			names[i] = string(name)
		}
		d.values = append(d.values, &empty)
	}
	d.names = names
}

// next returns the next n series of the body, or an error where there are not that many.
func (d *seriesDecoder) next(n int) ([]*dto.Metric, error) {
	result := make([]*dto.Metric, n)
	for i := range n {
		m := &d.metrics.take(1)[0]
		result[i] = m
		labels, pairs := d.labels.take(len(d.names)), d.pairs.take(len(d.names))
		for j := range d.names {
			shared, rest := d.number(), d.decoder.text()
			last := *d.values[j]
			if d.broken || shared > len(last) {
				return nil, errStored
			}
			if shared < len(last) || len(rest) > 0 {
				d.text = append(append(d.text[:0], last[:shared]...), rest...)
				d.values[j] = &d.texts.take(1)[0]
				*d.values[j] = string(d.text)
			}
			pairs[j].Name, pairs[j].Value = &d.names[j], d.values[j]
			labels[j] = &pairs[j]
		}
		form := d.bytes(1)
		if d.broken {
			return nil, errStored
		}
		if len(labels) > 0 {
			m.Label = labels
		}
		if form[0] == formMessage {
			if err := (proto.UnmarshalOptions{Merge: true}).Unmarshal(d.decoder.text(), m); err != nil {
				return nil, err
			}
			if d.broken {
				return nil, errStored
			}
			continue
		}
		value := &d.numbers.take(1)[0]
		switch form[0] {
		case formInt:
			v, size := binary.Varint(d.b)
			d.bytes(max(size, 0))
			d.broken = d.broken || size <= 0
			*value = float64(v)
		case formFloat:
			if v := d.bytes(8); v != nil {
				*value = math.Float64frombits(binary.LittleEndian.Uint64(v))
			}
		default:
			d.broken = true
		}
		switch d.kind {
		case dto.MetricType_GAUGE:
			m.Gauge = &d.gauges.take(1)[0]
			m.Gauge.Value = value
		case dto.MetricType_COUNTER:
			m.Counter = &d.counters.take(1)[0]
			m.Counter.Value = value
		case dto.MetricType_UNTYPED:
			m.Untyped = &d.untyped.take(1)[0]
			m.Untyped.Value = value
		}
		if d.broken {
			return nil, errStored
		}
	}
	return result, nil
}
