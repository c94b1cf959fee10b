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

	"github.com/klauspost/compress/s2"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protowire"
)

// Backend keeps groups. The store calls it from one goroutine at a time.
type Backend interface {
	// Load calls f for each stored group, in any order, before anything else is
	// called. It stops at the first error and returns it. Where it could read all of
	// them and Apply can't write, it returns ErrReadOnly, wrapped.
	Load(f func(Record) error) error
	// Apply stores changes of different groups, all of them or none. When it
	// returns nil they survive the end of the process. The records' bytes must not
	// be changed.
	Apply(changes []Change) error
	// Probe tells whether Apply can write, by writing something of the size of a
	// large push and removing it. It is called after Apply failed.
	Probe() error
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
	state    state      // but for what Store.build makes of it, the image too where it was read
	families []prepared // where it was read
}

// recordHead is the JSON in front of a marshalled record.
type recordHead struct {
	Version  int               `json:"version"`
	Key      map[string]string `json:"key"`
	Pushed   int64             `json:"pushed"`
	Failed   int64             `json:"failed,omitempty"`
	TTL      *time.Duration    `json:"ttl,omitempty"` // only where a push named it
	Interval *time.Duration    `json:"interval,omitempty"`
	Expired  bool              `json:"expired,omitempty"`
	Ages     []int64           `json:"ages"` // how much earlier than pushed the families came, in order
}

// recordVersion is the version of the format that MarshalBinary writes.
const recordVersion = 1

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// MarshalBinary returns the record in its stored form: the length of a JSON head
// as a varint, the head, and the families as delimited protobuf messages, as in the
// exposition format, compressed as one Snappy block; and a CRC-32C of that in 4
// bytes, little-endian. Compressed, a record takes about a tenth: of the pages that
// a commit writes, and of the memory that a memory-mapped file takes.
func (r *Record) MarshalBinary() ([]byte, error) {
	st := r.state
	head := recordHead{Version: recordVersion, Key: r.Key.Map(), Pushed: st.pushed, Failed: st.failed, Expired: st.expired}
	if st.named.TTL >= 0 {
		head.TTL = &st.named.TTL
	}
	if st.named.Interval >= 0 {
		head.Interval = &st.named.Interval
	}
	for i := range st.image.blocks {
		if b := &st.image.blocks[i]; !isGenerated(b.name()) {
			head.Ages = append(head.Ages, st.pushed-b.pushed)
		}
	}
	text, err := json.Marshal(head)
	if err != nil {
		return nil, err
	}
	scratch := buffers.Get().(*bytes.Buffer)
	defer buffers.Put(scratch)
	scratch.Reset()
	scratch.Grow(2 * (len(text) + len(st.image.data) + 64*len(st.image.blocks)))
	content := binary.AppendUvarint(scratch.AvailableBuffer(), uint64(len(text)))
	content = append(content, text...)
	var familyHead []byte
	for i := range st.image.blocks {
		b := &st.image.blocks[i]
		m := b.meta.Value()
		if isGenerated(m.name) {
			continue
		}
		series := st.image.protoOf(b)
		familyHead = appendFamilyHead(familyHead[:0], m.name, m.help, m.unit, m.kind)
		content = appendLength(content, len(familyHead)+len(series))
		content = append(append(content, familyHead...), series...)
	}
	compressed := s2.EncodeSnappy(content[len(content):cap(content)], content)
	out := append(make([]byte, 0, len(compressed)+crc32.Size), compressed...)
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
	data, err := s2.Decode(nil, data[:len(data)-4])
	if err != nil {
		return err
	}
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
	families, err := parseProtobuf(data[n+int(size):])
	if err != nil {
		return fmt.Errorf("group %s: %w", key, err)
	}
	if len(families) != len(head.Ages) {
		return fmt.Errorf("group %s: %d families, and %d ages of them", key, len(families), len(head.Ages))
	}
	*r = Record{Key: key, state: state{pushed: head.Pushed, failed: head.Failed, named: unnamed, expired: head.Expired}}
	if head.TTL != nil {
		r.state.named.TTL = *head.TTL
	}
	if head.Interval != nil {
		r.state.named.Interval = *head.Interval
	}
	for i, name := range slices.Sorted(maps.Keys(families)) {
		p, err := prepareFamily(key, key.forced(), families[name], head.Pushed-head.Ages[i])
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
func (memory) Probe() error                  { return nil }
func (memory) Close() error                  { return nil }
