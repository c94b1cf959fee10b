package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/klauspost/compress/s2"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Backend keeps groups, and how far spools have come. The store calls it from one
// goroutine at a time.
type Backend interface {
	// Load calls group for each stored group and mark for each stored spool, in any
	// order, before anything else is called. It stops at the first error and returns it.
	// Where it could read all of them and Apply can't write, it returns ErrReadOnly,
	// wrapped.
	Load(group func(Record) error, mark func(Mark) error) error
	// Apply stores changes of different groups and marks of different spools, all of
	// them or none, also after a crash. One of the two may be empty; a spool that is to be
	// forgotten may be unknown. When it returns nil they survive the end of the process.
	// The records' bytes must not be changed.
	Apply(changes []Change, marks []Mark) error
	// Probe tells whether Apply can write, by writing something of the size of a
	// large push and removing it. It is called after Apply failed.
	Probe() error
	// Close ends it. Nothing is called after it.
	Close() error
}

// InTurn is a Backend that may ask for changes in turn: a change is made when all that
// came before it are stored, not while they are.
type InTurn interface {
	InTurn() bool
}

// Change is the new state of one group.
type Change struct {
	ID     string  // Key.ID of the group
	Record *Record // nil: the group is gone
}

// Record is a group as it is stored.
type Record struct {
	Key Key
	// Repeats: the record differs from the last one of the group that was applied in
	// nothing but what AppendRepeat appends.
	Repeats  bool
	state    state      // but for what Store.build makes of it, the image too where it was read
	families []prepared // where it was read
}

// A record is a protobuf message. Of the fields, label, ttl and interval may be absent,
// a family follows its age, and what a newer version adds is skipped.
const (
	recordLabel    = 1 // repeated LabelPair: the key
	recordPushed   = 2 // Unix nanoseconds, as all times
	recordFailed   = 3
	recordTTL      = 4 // nanoseconds, where a push named it
	recordInterval = 5
	recordExpired  = 6
	recordAge      = 7 // how much earlier than pushed the next family came
	recordFamily   = 8 // repeated MetricFamily
)

// AppendBinary appends the record.
func (r *Record) AppendBinary(out []byte) ([]byte, error) {
	st := r.state
	number := func(field protowire.Number, v int64) {
		out = protowire.AppendVarint(protowire.AppendTag(out, field, protowire.VarintType), uint64(v))
	}
	for _, l := range r.Key {
		out = appendPair(protowire.AppendTag(out, recordLabel, protowire.BytesType), l.Name, l.Value)
	}
	number(recordPushed, st.pushed)
	if st.failed != 0 {
		number(recordFailed, st.failed)
	}
	if st.named.TTL >= 0 {
		number(recordTTL, int64(st.named.TTL))
	}
	if st.named.Interval >= 0 {
		number(recordInterval, int64(st.named.Interval))
	}
	if st.expired {
		number(recordExpired, 1)
	}
	var head, series []byte
	for _, b := range st.image.blocks() {
		m := b.meta.Value()
		if isGenerated(m.name) {
			continue
		}
		if b.pushed != st.pushed {
			number(recordAge, st.pushed-b.pushed)
		}
		series = b.appendProto(series[:0])
		head = appendFamilyHead(head[:0], m.name, m.help, m.unit, m.kind)
		out = protowire.AppendTag(out, recordFamily, protowire.BytesType)
		out = protowire.AppendVarint(out, uint64(len(head)+len(series)))
		out = append(append(out, head...), series...)
	}
	return out, nil
}

// cutField reads the first field of a message: its number, and its value where that is a
// varint or bytes. size is that of the field, negative where it can't be read, which
// protowire.ParseError explains.
func cutField(data []byte) (field protowire.Number, number uint64, content []byte, size int) {
	field, kind, size := protowire.ConsumeTag(data)
	if size < 0 {
		return 0, 0, nil, size
	}
	n := 0
	switch value := data[size:]; kind {
	case protowire.VarintType:
		number, n = protowire.ConsumeVarint(value)
	case protowire.BytesType:
		content, n = protowire.ConsumeBytes(value)
	default:
		n = protowire.ConsumeFieldValue(field, kind, value)
	}
	if n < 0 {
		return 0, 0, nil, n
	}
	return field, number, content, size + n
}

// UnmarshalBinary reads what AppendBinary wrote.
func (r *Record) UnmarshalBinary(data []byte) error {
	*r = Record{state: state{named: unnamed}}
	labels, families := map[string]string{}, map[string]*dto.MetricFamily{}
	ages, age := map[string]int64{}, int64(0)
	for len(data) > 0 {
		field, number, content, n := cutField(data)
		if n < 0 {
			return fmt.Errorf("a record can't be read: %w", protowire.ParseError(n))
		}
		data = data[n:]
		switch field {
		case recordLabel:
			l := new(dto.LabelPair)
			if err := proto.Unmarshal(content, l); err != nil {
				return fmt.Errorf("key of a record: %w", err)
			}
			labels[l.GetName()] = l.GetValue()
		case recordPushed:
			r.state.pushed = int64(number)
		case recordFailed:
			r.state.failed = int64(number)
		case recordTTL:
			r.state.named.TTL = time.Duration(number)
		case recordInterval:
			r.state.named.Interval = time.Duration(number)
		case recordExpired:
			r.state.expired = number != 0
		case recordAge:
			age = int64(number)
		case recordFamily:
			f := new(dto.MetricFamily)
			if err := proto.Unmarshal(content, f); err != nil {
				return fmt.Errorf("family of a record: %w", err)
			}
			families[f.GetName()], ages[f.GetName()], age = f, age, 0
		}
	}
	var err error
	if r.Key, err = NewKey(labels); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(families)) {
		p, err := prepareFamily(r.Key, r.Key.forced(), families[name], r.state.pushed-ages[name])
		if err != nil {
			return fmt.Errorf("group %s: %w", r.Key, err)
		}
		r.families = append(r.families, p)
	}
	return nil
}

// AppendRepeat appends what sets a record that Repeats apart from the one before: the
// time of the push and the values of all families, in the order of the record, as 8 bytes
// each, little-endian. A family's are those of prepared.values.
func (r *Record) AppendRepeat(out []byte) []byte {
	out = binary.LittleEndian.AppendUint64(out, uint64(r.state.pushed))
	for i, n := range r.state.image.order {
		if n != noValue {
			out = binary.LittleEndian.AppendUint64(out, math.Float64bits(r.state.image.values[i]))
		}
	}
	return out
}

// ApplyRepeat returns the record that follows on one, both as AppendBinary appends
// them. It returns an error where the two don't belong together.
func ApplyRepeat(record, repeat []byte) (next []byte, err error) {
	mismatch := errors.New("the values of a record are of another one")
	if len(repeat)%8 != 0 || len(repeat) == 0 {
		return nil, mismatch
	}
	pushed, values := binary.LittleEndian.Uint64(repeat), make([]float64, 0, len(repeat)/8-1)
	for repeat = repeat[8:]; len(repeat) > 0; repeat = repeat[8:] {
		values = append(values, math.Float64frombits(binary.LittleEndian.Uint64(repeat)))
	}
	next = make([]byte, 0, len(record)+8)
	var family []byte
	for len(record) > 0 {
		field, _, content, n := cutField(record)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		switch field {
		case recordPushed:
			next = protowire.AppendVarint(protowire.AppendTag(next, recordPushed, protowire.VarintType), pushed)
		case recordAge: // it is as new as all of the push
		case recordFamily:
			var left []float64
			var ok bool
			family, left, ok = appendProtoValues(family[:0], content, values)
			if !ok {
				return nil, mismatch
			}
			values = left
			next = protowire.AppendBytes(protowire.AppendTag(next, recordFamily, protowire.BytesType), family)
		default:
			next = append(next, record[:n]...)
		}
		record = record[n:]
	}
	if len(values) > 0 {
		return nil, mismatch
	}
	return next, nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Pack returns a record in the form in which it is to be kept: one Snappy block, and a
// CRC-32C of it in 4 bytes, little-endian. Compressed, a record takes about a tenth: of
// what a disk has to write, and of the memory that a memory-mapped file takes.
func Pack(record []byte) []byte {
	packed := s2.EncodeSnappy(make([]byte, 0, s2.MaxEncodedLen(len(record))), record)
	out := append(make([]byte, 0, len(packed)+crc32.Size), packed...)
	return binary.LittleEndian.AppendUint32(out, crc32.Checksum(out, castagnoli))
}

// Unpack returns the record that Pack packed, an error where it is damaged.
func Unpack(packed []byte) ([]byte, error) {
	n := len(packed) - crc32.Size
	if n < 0 || binary.LittleEndian.Uint32(packed[n:]) != crc32.Checksum(packed[:n], castagnoli) {
		return nil, errors.New("the checksum of a record is wrong")
	}
	return s2.Decode(nil, packed[:n])
}

// appendPair appends a LabelPair with its length in front.
func appendPair(out []byte, name, value string) []byte {
	out = protowire.AppendVarint(out, uint64(2+protowire.SizeBytes(len(name))+protowire.SizeBytes(len(value))))
	out = protowire.AppendString(protowire.AppendTag(out, 1, protowire.BytesType), name)
	return protowire.AppendString(protowire.AppendTag(out, 2, protowire.BytesType), value)
}

// appendLength appends what stands in front of a delimited message.
func appendLength(out []byte, n int) []byte { return protowire.AppendVarint(out, uint64(n)) }

// appendFamilyHead appends the fields of a MetricFamily but for its series
// (io.prometheus.client: 1 name, 2 help, 3 type, 5 unit).
func appendFamilyHead(out []byte, name, help, unit string, kind dto.MetricType) []byte {
	out = protowire.AppendString(protowire.AppendTag(out, 1, protowire.BytesType), name)
	if help != "" {
		out = protowire.AppendString(protowire.AppendTag(out, 2, protowire.BytesType), help)
	}
	out = protowire.AppendVarint(protowire.AppendTag(out, 3, protowire.VarintType), uint64(kind))
	if unit != "" {
		out = protowire.AppendString(protowire.AppendTag(out, 5, protowire.BytesType), unit)
	}
	return out
}

// Memory returns a Backend that keeps nothing.
func Memory() Backend { return memory{} }

type memory struct{}

func (memory) Load(func(Record) error, func(Mark) error) error { return nil }
func (memory) Apply([]Change, []Mark) error                    { return nil }
func (memory) Probe() error                                    { return nil }
func (memory) Close() error                                    { return nil }
