package gateway

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"slices"
	"time"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protowire"
)

// Backend keeps groups. The store calls it from one goroutine at a time.
type Backend interface {
	// Load calls f for each stored group, in any order, before anything else is
	// called. It stops at the first error and returns it.
	Load(f func(Record) error) error
	// Apply stores changes of different groups, all of them or none. When it
	// returns nil they survive the end of the process. The records' bytes must not
	// be changed.
	Apply(changes []Change) error
	// Close ends it. Nothing is called after it.
	Close() error
}

// Change is the new state of one group.
type Change struct {
	ID     string  // Key.ID of the group
	Record *Record // nil: the group is gone
}

// Record is a group as it is stored.
type Record struct {
	Key      Key
	state    state // but for the image
	families []prepared
}

func newRecord(key Key, st state) Record {
	return Record{key, st, withoutGenerated(st.image)}
}

// recordHead is the JSON in front of a marshalled record.
type recordHead struct {
	Version  int               `json:"version"`
	Key      map[string]string `json:"key"`
	Pushed   int64             `json:"pushed"`
	Failed   int64             `json:"failed,omitempty"`
	TTL      time.Duration     `json:"ttl,omitempty"`
	Interval time.Duration     `json:"interval,omitempty"`
	Expired  bool              `json:"expired,omitempty"`
	Times    []int64           `json:"times"` // of the families' pushes, in order
}

// recordVersion is the version of the format that MarshalBinary writes.
const recordVersion = 1

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// MarshalBinary returns the record in its stored form: the length of a JSON head
// as a varint, the head, the families as delimited protobuf messages, as in the
// exposition format, and a CRC-32C of all that in 4 bytes, little-endian.
func (r *Record) MarshalBinary() ([]byte, error) {
	st := r.state
	head := recordHead{Version: recordVersion, Key: r.Key.Map(), Pushed: st.pushed, Failed: st.failed, TTL: st.ttl, Interval: st.interval, Expired: st.expired}
	size := 0
	for _, p := range r.families {
		head.Times = append(head.Times, p.pushed)
		size += len(p.proto) + 256
	}
	text, err := json.Marshal(head)
	if err != nil {
		return nil, err
	}
	out := make([]byte, 0, size+len(text)+binary.MaxVarintLen64)
	out = binary.AppendUvarint(out, uint64(len(text)))
	out = append(out, text...)
	for _, p := range r.families {
		m := p.meta.Value()
		familyHead := appendFamilyHead(nil, m.name, m.help, m.unit, m.kind)
		out = appendLength(out, len(familyHead)+len(p.proto))
		out = append(append(out, familyHead...), p.proto...)
	}
	return binary.LittleEndian.AppendUint32(out, crc32.Checksum(out, castagnoli)), nil
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

// UnmarshalBinary reads what MarshalBinary wrote.
func (r *Record) UnmarshalBinary(data []byte) error {
	if len(data) < 4 || binary.LittleEndian.Uint32(data[len(data)-4:]) != crc32.Checksum(data[:len(data)-4], castagnoli) {
		return errors.New("the checksum of a record is wrong")
	}
	data = data[:len(data)-4]
	size, n := binary.Uvarint(data)
	if n <= 0 || uint64(len(data)-n) < size {
		return errors.New("the head of the record is cut off")
	}
	var head recordHead
	if err := json.Unmarshal(data[n:n+int(size)], &head); err != nil {
		return fmt.Errorf("head of the record: %w", err)
	}
	if head.Version != recordVersion {
		return fmt.Errorf("the record has version %d; this program reads version %d", head.Version, recordVersion)
	}
	key, err := NewKey(head.Key)
	if err != nil {
		return err
	}
	families, err := parseProtobuf(bytes.NewReader(data[n+int(size):]))
	if err != nil {
		return fmt.Errorf("group %s: %w", key, err)
	}
	if len(families) != len(head.Times) {
		return fmt.Errorf("group %s: %d families, and %d times of them", key, len(families), len(head.Times))
	}
	*r = Record{Key: key, state: state{pushed: head.Pushed, failed: head.Failed, ttl: head.TTL, interval: head.Interval, expired: head.Expired}}
	for i, name := range slices.Sorted(maps.Keys(families)) {
		p, err := prepareFamily(key, families[name], head.Times[i])
		if err != nil {
			return fmt.Errorf("group %s: %w", key, err)
		}
		r.families = append(r.families, p)
	}
	return nil
}

// Memory returns a Backend that keeps nothing.
func Memory() Backend { return memory{} }

type memory struct{}

func (memory) Load(func(Record) error) error { return nil }
func (memory) Apply([]Change) error          { return nil }
func (memory) Close() error                  { return nil }
