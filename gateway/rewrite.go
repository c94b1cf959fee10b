package gateway

import (
	"encoding/binary"
	"iter"
	"math"

	"google.golang.org/protobuf/encoding/protowire"
)

// Messages of io.prometheus.client are rewritten with other values as they are, without
// building messages of them: that takes a tenth of the time.

// slot is what a value in a message is.
type slot int8

const (
	slotValue   slot = iota // of a counter, a gauge, an untyped series, or a quantile
	slotBucket              // observations up to the bucket's bound
	slotSum                 // of the observations
	slotCount               // of the observations
	slotCreated             // when the series was created: see createdValue
)

// maxCount is up to where a float64 has all counts.
const maxCount = 1 << 53

// createdValue returns Unix nanoseconds as a value: their bits, since a float64 doesn't
// have all of them.
func createdValue(nanos int64) float64 { return math.Float64frombits(uint64(nanos)) }

// rewriting is what happens to a field.
type rewriting int8

const (
	refused rewriting = iota
	copied
	entered // the message in it is rewritten
	valued  // it gets another value
)

// field is what happens to the field of a message.
type field struct {
	what rewriting
	slot slot
	wire protowire.Type
	in   *fields // of the message in it
}

// fields are the fields of a message, by their numbers. One that is not there is refused:
// exemplars, native histograms, counts that are floats, times of samples, and whatever a
// newer version of the format adds.
type fields [16]field

var (
	familyFields = &fields{
		1:           {what: copied, wire: protowire.BytesType},  // name
		2:           {what: copied, wire: protowire.BytesType},  // help
		3:           {what: copied, wire: protowire.VarintType}, // type
		metricField: {what: entered, wire: protowire.BytesType, in: metricFields},
		5:           {what: copied, wire: protowire.BytesType}, // unit
	}
	metricFields = &fields{
		1:              {what: copied, wire: protowire.BytesType}, // label
		2:              {what: entered, wire: protowire.BytesType, in: valueFields},
		3:              {what: entered, wire: protowire.BytesType, in: counterFields},
		4:              {what: entered, wire: protowire.BytesType, in: summaryFields},
		5:              {what: entered, wire: protowire.BytesType, in: valueFields},
		histogramField: {what: entered, wire: protowire.BytesType, in: histogramFields},
	}
	valueFields = &fields{ // of a gauge or an untyped series
		1: {what: valued, wire: protowire.Fixed64Type, slot: slotValue},
	}
	counterFields = &fields{
		1: {what: valued, wire: protowire.Fixed64Type, slot: slotValue},
		3: {what: valued, wire: protowire.BytesType, slot: slotCreated},
	}
	summaryFields = &fields{
		1:           {what: valued, wire: protowire.VarintType, slot: slotCount},
		2:           {what: valued, wire: protowire.Fixed64Type, slot: slotSum},
		bucketField: {what: entered, wire: protowire.BytesType, in: quantileFields},
		4:           {what: valued, wire: protowire.BytesType, slot: slotCreated},
	}
	quantileFields = &fields{
		1: {what: copied, wire: protowire.Fixed64Type}, // quantile
		2: {what: valued, wire: protowire.Fixed64Type, slot: slotValue},
	}
	histogramFields = &fields{
		1:           {what: valued, wire: protowire.VarintType, slot: slotCount},
		2:           {what: valued, wire: protowire.Fixed64Type, slot: slotSum},
		bucketField: {what: entered, wire: protowire.BytesType, in: bucketFields},
		15:          {what: valued, wire: protowire.BytesType, slot: slotCreated},
	}
	bucketFields = &fields{
		1:          {what: valued, wire: protowire.VarintType, slot: slotBucket},
		boundField: {what: copied, wire: protowire.Fixed64Type},
	}
)

// Numbers of fields: of summary and histogram in a Metric, of bucket in a Histogram, which is
// that of quantile in a Summary, and of upper_bound in a Bucket.
const summaryField, histogramField, bucketField, boundField = 4, 7, 3, 2

// rewriter writes messages with other values.
type rewriter struct {
	out []byte
	// value returns the new value of a slot, given the one that is there.
	value func(of slot, old float64) float64
	// series is called with each Metric before its values, nil: it isn't. Where it returns
	// false the message is refused.
	series func(metric []byte) bool
}

// body rewrites a body of delimited messages. It returns false where something is refused.
func (r *rewriter) body(body []byte) bool {
	for len(body) > 0 {
		message, n := protowire.ConsumeBytes(body)
		if n < 0 {
			return false
		}
		body = body[n:]
		r.out = append(r.out, 0)
		start := len(r.out)
		if !r.message(message, familyFields) {
			return false
		}
		r.setLength(start)
	}
	return true
}

// message rewrites the content of a message. It returns false where something is refused.
func (r *rewriter) message(content []byte, of *fields) bool {
	for len(content) > 0 {
		tag := content[0] // one byte: the numbers are below 16
		f := &of[tag>>3&15]
		if tag >= 0x80 || f.what == refused || protowire.Type(tag&7) != f.wire {
			return false
		}
		start, end := 1, 1+8 // of the value
		if f.wire != protowire.Fixed64Type {
			number, n := protowire.ConsumeVarint(content[1:])
			if end = 1 + n; n < 0 || f.wire == protowire.BytesType && number > uint64(len(content)) {
				return false
			}
			if f.wire == protowire.BytesType {
				start, end = end, end+int(number)
			}
		}
		if end > len(content) {
			return false
		}
		field, value := content[:end], content[start:end]
		content = content[end:]
		switch f.what {
		case copied:
			r.out = append(r.out, field...)
		case entered:
			if f.in == metricFields && r.series != nil && !r.series(value) {
				return false
			}
			r.out = append(r.out, tag, 0)
			start := len(r.out)
			if !r.message(value, f.in) {
				return false
			}
			r.setLength(start)
		case valued:
			r.out = append(r.out, tag)
			if !r.put(f, value) {
				return false
			}
		}
	}
	return true
}

// put writes the new value of a field. It returns false where the old one is refused.
func (r *rewriter) put(f *field, old []byte) bool {
	switch f.wire {
	case protowire.Fixed64Type:
		value := r.value(f.slot, math.Float64frombits(binary.LittleEndian.Uint64(old)))
		r.out = binary.LittleEndian.AppendUint64(r.out, math.Float64bits(value))
	case protowire.VarintType:
		count, _ := protowire.ConsumeVarint(old)
		if count > maxCount {
			return false
		}
		value := r.value(f.slot, float64(count))
		r.out = protowire.AppendVarint(r.out, uint64(value))
		return isExactCount(value)
	default:
		nanos, ok := readTime(old)
		if !ok {
			return false
		}
		r.out = append(r.out, 0)
		start := len(r.out)
		r.out, ok = appendTime(r.out, int64(math.Float64bits(r.value(f.slot, createdValue(nanos)))))
		r.setLength(start)
		return ok
	}
	return true
}

// setLength writes the length of what begins at start into the byte in front of it, and
// makes room where it takes more.
func (r *rewriter) setLength(start int) {
	n := len(r.out) - start
	if n < 0x80 {
		r.out[start-1] = byte(n)
		return
	}
	more := protowire.SizeVarint(uint64(n)) - 1
	r.out = append(r.out, make([]byte, more)...)
	copy(r.out[start+more:], r.out[start:start+n])
	protowire.AppendVarint(r.out[:start-1], uint64(n))
}

// maxSeconds bounds the times that fit into createdValue.
const maxSeconds = math.MaxInt64/1_000_000_000 - 1

// readTime reads a google.protobuf.Timestamp (1 seconds, 2 nanos) as Unix nanoseconds. It
// returns false where those don't have it, or it is none.
func readTime(message []byte) (nanos int64, ok bool) {
	var parts [3]int64
	for len(message) > 0 {
		number, wire, n := protowire.ConsumeTag(message)
		if n < 0 || number > 2 || wire != protowire.VarintType {
			return 0, false
		}
		value, size := protowire.ConsumeVarint(message[n:])
		if size < 0 {
			return 0, false
		}
		parts[number], message = int64(value), message[n+size:]
	}
	if parts[1] < -maxSeconds || parts[1] > maxSeconds || parts[2] < 0 || parts[2] >= 1_000_000_000 {
		return 0, false
	}
	return parts[1]*1_000_000_000 + parts[2], true
}

// appendTime appends the content of a google.protobuf.Timestamp. It returns false where
// readTime would not take it.
func appendTime(out []byte, nanos int64) ([]byte, bool) {
	seconds, rest := nanos/1_000_000_000, nanos%1_000_000_000
	if rest < 0 {
		seconds, rest = seconds-1, rest+1_000_000_000
	}
	if seconds != 0 {
		out = protowire.AppendVarint(protowire.AppendTag(out, 1, protowire.VarintType), uint64(seconds))
	}
	if rest != 0 {
		out = protowire.AppendVarint(protowire.AppendTag(out, 2, protowire.VarintType), uint64(rest))
	}
	return out, seconds >= -maxSeconds && seconds <= maxSeconds
}

// isExactCount reports whether a value is a count that a float64 has exactly.
func isExactCount(v float64) bool {
	return v >= 0 && v <= maxCount && v == math.Trunc(v) && !math.Signbit(v)
}

// lineValues are the values of a family in the order of prepared.values, while they are
// read from its series or written into them.
type lineValues struct {
	lines, created []float64 // of the series that follow
	series         []float64 // the lines of the current one: buckets or quantiles, sum, count
	total          bool      // see linesOf
	next           int       // of series
}

// enter goes to the lines of the next series. It returns false where there are too few.
func (v *lineValues) enter(metric []byte) bool {
	var n int
	if n, v.total = linesOf(metric); n > len(v.lines) {
		return false
	}
	v.series, v.lines, v.next = v.lines[:n:n], v.lines[n:], 0
	return true
}

// of returns the place of the next value of a slot, nil where there is none.
func (v *lineValues) of(s slot) (place *float64) {
	switch n := len(v.series); {
	case s == slotCreated && len(v.created) > 0:
		place, v.created = &v.created[0], v.created[1:]
	case s == slotSum && n > 1:
		place = &v.series[n-2]
	case s == slotCount && n > 1:
		place = &v.series[n-1]
	case (s == slotValue || s == slotBucket) && v.next < n:
		place = &v.series[v.next]
		v.next++
	}
	return place
}

// cutProtoValues returns series, as in prepared.proto, with zeros for values, and these as
// prepared.values has them; false where something is refused.
func cutProtoValues(series []byte) (without []byte, values []float64, ok bool) {
	values = make([]float64, linesOfAll(series))
	var created []float64
	v := lineValues{lines: values}
	r := rewriter{out: make([]byte, 0, len(series)), series: v.enter, value: func(s slot, old float64) float64 {
		if s == slotCreated {
			created = append(created, old)
		} else if place := v.of(s); place != nil {
			*place = old
		}
		if s == slotCount && v.total {
			v.series[len(v.series)-3] = old
		}
		return 0
	}}
	ok = r.message(series, familyFields)
	return r.out, append(values, created...), ok
}

// appendProtoValues appends a family, or only its series, with the values in it replaced. It
// returns the values that are left, and false where they don't fit or something is refused.
func appendProtoValues(out, family []byte, values []float64) (written []byte, left []float64, ok bool) {
	lines := linesOfAll(family)
	if lines > len(values) {
		return out, values, false
	}
	v, fit := lineValues{lines: values[:lines], created: values[lines:]}, true
	r := rewriter{out: out, series: v.enter, value: func(s slot, _ float64) float64 {
		place := v.of(s)
		if place == nil {
			fit = false
			return 0
		}
		return *place
	}}
	ok = r.message(family, familyFields)
	return r.out, v.created, ok && fit
}

// linesOfAll returns how many lines the text of a family has, given at least its series.
func linesOfAll(family []byte) (lines int) {
	for number, metric := range fieldsOf(family) {
		if number == metricField {
			n, _ := linesOf(metric)
			lines += n
		}
	}
	return lines
}

// linesOf returns how many lines the text of a Metric has; and total, whether one of them is
// for a bucket of all observations that is not there.
func linesOf(metric []byte) (lines int, total bool) {
	for number, content := range fieldsOf(metric) {
		switch number {
		case 2, 3, 5:
			lines++
		case summaryField, histogramField:
			total = number == histogramField
			for inner, bucket := range fieldsOf(content) {
				if inner == bucketField { // the number of quantile in a Summary too
					lines++
					total = total && !isInfinite(bucket)
				}
			}
			if total {
				lines++
			}
			lines += 2 // sum and count
		}
	}
	return lines, total
}

// isInfinite reports whether a Bucket is for all observations.
func isInfinite(bucket []byte) bool {
	for len(bucket) > 0 {
		number, wire, n := protowire.ConsumeTag(bucket)
		if n < 0 {
			break
		}
		size := protowire.ConsumeFieldValue(number, wire, bucket[n:])
		if size < 0 {
			break
		}
		if number == boundField && wire == protowire.Fixed64Type && math.IsInf(math.Float64frombits(binary.LittleEndian.Uint64(bucket[n:])), +1) {
			return true
		}
		bucket = bucket[n+size:]
	}
	return false
}

// fieldsOf returns the numbers of a message's fields, and their content where that is bytes,
// up to the first field that can't be read.
func fieldsOf(message []byte) iter.Seq2[protowire.Number, []byte] {
	return func(yield func(protowire.Number, []byte) bool) {
		for len(message) > 0 {
			number, _, content, n := cutField(message)
			if n < 0 || !yield(number, content) {
				return
			}
			message = message[n:]
		}
	}
}
