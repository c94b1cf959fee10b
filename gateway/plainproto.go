package gateway

import (
	"encoding/binary"
	"math"
	"unicode/utf8"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protowire"
)

// Tags of fields of io.prometheus.client. Their numbers are below 16, so that they are
// one byte each.
const (
	familyName   = 1<<3 | byte(protowire.BytesType)
	familyHelp   = 2<<3 | byte(protowire.BytesType)
	familyType   = 3<<3 | byte(protowire.VarintType)
	familyMetric = metricField<<3 | byte(protowire.BytesType)

	metricLabel   = 1<<3 | byte(protowire.BytesType)
	metricGauge   = 2<<3 | byte(protowire.BytesType)
	metricCounter = 3<<3 | byte(protowire.BytesType)
	metricUntyped = 5<<3 | byte(protowire.BytesType)

	pairName  = 1<<3 | byte(protowire.BytesType)
	pairValue = 2<<3 | byte(protowire.BytesType)

	plainValue = 1<<3 | byte(protowire.Fixed64Type) // of Gauge, Counter and Untyped
)

// parseProtobuf reads all messages. It returns false where the body isn't plain.
func (e *plainEncoder) parseProtobuf(body []byte) bool {
	for len(body) > 0 {
		message, n := protowire.ConsumeBytes(body)
		if n < 0 || !e.protoFamily(message) {
			return false
		}
		body = body[n:]
	}
	return true
}

// cutPlainField cuts the first field off a message that is not empty. It returns a size
// below 0 where that is no varint and no bytes, or can't be read.
func cutPlainField(message []byte) (tag byte, number uint64, content []byte, size int) {
	tag = message[0]
	if protowire.Type(tag&7) == protowire.VarintType {
		number, size = protowire.ConsumeVarint(message[1:])
	} else {
		content, size = protowire.ConsumeBytes(message[1:])
	}
	if size >= 0 {
		size++
	}
	return tag, number, content, size
}

// protoFamily reads a MetricFamily, whose name and type stand in front of its series.
func (e *plainEncoder) protoFamily(message []byte) bool {
	f := plainFamily{kind: dto.MetricType_COUNTER, series: len(e.series)} // that is the type where none is given
	for len(message) > 0 {
		tag, number, content, n := cutPlainField(message)
		if n < 0 {
			return false
		}
		message = message[n:]
		switch tag {
		case familyName:
			if f.name != nil || !legacyName(content) {
				return false
			}
			f.name = content
		case familyHelp:
			if f.hasHelp || !utf8.Valid(content) {
				return false
			}
			f.help, f.hasHelp = content, true
		case familyType:
			if f.hasType || len(e.series) > f.series {
				return false
			}
			f.hasType = true
			switch f.kind = dto.MetricType(number); f.kind {
			case dto.MetricType_COUNTER, dto.MetricType_GAUGE, dto.MetricType_UNTYPED:
			default:
				return false
			}
		case familyMetric:
			if f.name == nil || !e.protoSeries(&f, content) {
				return false
			}
		default:
			return false
		}
	}
	e.families = append(e.families, f)
	return len(e.series) > f.series // one without series goes
}

// protoSeries reads a Metric that has labels and a value of the family's type.
func (e *plainEncoder) protoSeries(f *plainFamily, message []byte) bool {
	first, has, value := len(e.labels), false, 0.0
	for len(message) > 0 {
		tag, _, content, n := cutPlainField(message)
		if n < 0 {
			return false
		}
		message = message[n:]
		switch {
		case tag == metricLabel:
			label, ok := protoLabel(content)
			if !ok {
				return false
			}
			e.labels = append(e.labels, label)
		case tag == valueTag(f.kind) && !has && len(content) == 9 && content[0] == plainValue:
			value, has = math.Float64frombits(binary.LittleEndian.Uint64(content[1:])), true
		default:
			return false
		}
	}
	if !has || !e.forceLabels(first) {
		return false
	}
	e.add(f, e.labels[first:], value)
	return true
}

// protoLabel reads a LabelPair.
func protoLabel(message []byte) (l plainLabel, ok bool) {
	for len(message) > 0 {
		tag, _, content, n := cutPlainField(message)
		if n < 0 {
			return l, false
		}
		message = message[n:]
		switch {
		case tag == pairName && l.name == nil:
			l.name = content
		case tag == pairValue && l.value == nil && utf8.Valid(content):
			l.value = content
		default:
			return l, false
		}
	}
	return l, plainLabelName(l.name)
}
