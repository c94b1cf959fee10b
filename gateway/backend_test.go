package gateway_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/culvert-io/culvert/gateway"
)

// sampleRecords returns records, and repetitions of the last one, as a store writes them.
func sampleRecords(tb testing.TB) (records, repeats [][]byte) {
	backend := &recording{Backend: gateway.Memory()}
	s := start(tb, gateway.StoreConfig{Now: newClock().now}, backend)
	s.want(200, "PUT", "/j/x/1?ttl=1h&interval=10m", "# HELP m some help\n# TYPE m counter\nm 1\nn{a=\"b\"} 2\n# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_count 2\nh_sum 3\n")
	s.want(200, "POST", "/j/x/1", "n{a=\"c\"} 3\n{\"utf.8\"} 1\n", gateway.HeaderPushTime, "1899999999")
	s.want(400, "PUT", "/j/x/1", "m 1 1\n")
	s.want(200, "PUT", "/k", "a 1\nb{c=\"d\"} 2\n")
	s.want(200, "PUT", "/k", "a 3\nb{c=\"d\"} 4\n")
	return backend.records, backend.repeats
}

// recording is a backend that notes all that it gets.
type recording struct {
	gateway.Backend
	records, repeats [][]byte
}

func (b *recording) Apply(changes []gateway.Change, _ []gateway.Mark) error {
	for _, c := range changes {
		if c.Record.Repeats {
			b.repeats = append(b.repeats, c.Record.AppendRepeat(nil))
			continue
		}
		record, err := c.Record.AppendBinary(nil)
		if err != nil {
			return err
		}
		b.records = append(b.records, record)
	}
	return nil
}

// FuzzApplyRepeat puts arbitrary values into arbitrary records. What belongs together
// gives a record that takes the same values again, and is read where the first one is.
func FuzzApplyRepeat(f *testing.F) {
	records, repeats := sampleRecords(f)
	for _, record := range records {
		for _, repeat := range append(repeats, make([]byte, 8), nil) {
			f.Add(record, repeat)
		}
	}
	f.Fuzz(func(t *testing.T, record, repeat []byte) {
		before := bytes.Clone(record)
		next, err := gateway.ApplyRepeat(record, repeat)
		if !bytes.Equal(record, before) {
			t.Errorf("%q was changed", before)
		}
		if err != nil {
			return
		}
		again, err := gateway.ApplyRepeat(next, repeat)
		if err != nil || !bytes.Equal(again, next) {
			t.Errorf("%q and %q: got %q, and with the same values again %q, %v", record, repeat, next, again, err)
		}
		var r gateway.Record
		_ = r.UnmarshalBinary(next) // an error or none, and no panic
	})
}

// FuzzRecord reads arbitrary bytes as a record and as a mark. A record that can be read
// can be served, a mark is written so that it can be read again.
func FuzzRecord(f *testing.F) {
	records, repeats := sampleRecords(f)
	for _, data := range append(records, repeats...) {
		f.Add(data)
	}
	mark, err := (&gateway.Mark{Spool: spoolA, Seq: 300, Noted: time.Unix(1_900_000_000, 5)}).AppendBinary(nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(mark)
	f.Fuzz(func(t *testing.T, data []byte) {
		var m, again gateway.Mark
		if m.UnmarshalBinary(data) == nil {
			written, err := m.AppendBinary(nil)
			if err == nil {
				err = again.UnmarshalBinary(written)
			}
			rewritten, _ := again.AppendBinary(nil)
			if err != nil || !bytes.Equal(rewritten, written) || again.Spool != m.Spool || again.Seq != m.Seq {
				t.Errorf("%q: read as %v, and written as %q, which is read as %v, %v", data, m, written, again, err)
			}
		}

		var r gateway.Record
		if r.UnmarshalBinary(data) != nil {
			return
		}
		backend := newStored()
		backend.records["read"] = data
		s := start(t, gateway.StoreConfig{Now: newClock().now}, backend)
		s.samples(true)
		s.query() // it panics where it can't read a family
	})
}
