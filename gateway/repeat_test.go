package gateway_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/gateway"
)

// repeating is a backend that checks that a record that repeats is what it says.
type repeating struct {
	gateway.Backend
	t       *testing.T
	records map[string][]byte
	repeats int
}

func (b *repeating) Apply(changes []gateway.Change, _ []gateway.Mark) error {
	for _, c := range changes {
		if c.Record == nil {
			delete(b.records, c.ID)
			continue
		}
		record, err := c.Record.AppendBinary(nil)
		if err != nil {
			return err
		}
		if c.Record.Repeats {
			b.repeats++
			next, err := gateway.ApplyRepeat(b.records[c.ID], c.Record.AppendRepeat(nil))
			if err != nil || !bytes.Equal(next, record) {
				b.t.Errorf("the repeated record is\n%q, %v, want\n%q", next, err, record)
			}
		}
		b.records[c.ID] = record
	}
	return nil
}

// afterPushes returns what a store has after pushes to a group, by PUT, and the status
// of the last one.
func afterPushes(t *testing.T, path string, bodies ...string) (state string, status, repeats int) {
	backend := &repeating{gateway.Memory(), t, map[string][]byte{}, 0}
	s := start(t, gateway.StoreConfig{Now: newClock().now}, backend)
	for _, body := range bodies {
		status = s.do("PUT", path, body).Code
	}
	return s.samples(true) + "\n" + s.query(), status, backend.repeats
}

// A push that brings the series of the one before leaves what it would leave as the
// first one.
func TestRepeat(t *testing.T) {
	const path = "/j/instance/i%20j"
	for name, c := range map[string]struct {
		before, body string
		repeats      bool
	}{
		"a value":            {"m 1\n", "m 2\n", true},
		"longer and shorter": {"m 1\nn 123456789.25\n", "m 1e300\nn 3\n", true},
		"all kinds of values": {"a 1\nb 1\nc 1\nd 1\ne 1\nf 1\ng 1\nh 1\n",
			"a NaN\nb +Inf\nc -Inf\nd -0\ne 0.1\nf 1.5e-9\ng 1234567890123456789\nh -.5\n", true},
		"series and families out of order": {
			"# TYPE z counter\nz{b=\"2\",a=\"1\"} 1\nz{a=\"3\"} 2\nz 3\n# HELP y says y\ny{x=\"2\"} 4\ny{x=\"1\"} 5\n",
			"# TYPE z counter\nz{b=\"2\",a=\"1\"} 6\nz{a=\"3\"} 7\nz 8\n# HELP y says y\ny{x=\"2\"} 9\ny{x=\"1\"} 10\n", true},
		"label values with blanks":     {"m{a=\"b c 1\"} 1\n", "m{a=\"b c 1\"} 2\n", true},
		"labels of the grouping key":   {"m{job=\"x\",instance=\"y\"} 1\n", "m{job=\"x\",instance=\"y\"} 2\n", true},
		"what the gateway makes":       {"push_time_seconds 7\nm 1\npush_up 3\n", "push_time_seconds 8\nm 2\npush_up 0\n", true},
		"a comment":                    {"# about\n\nm 1\n", "# about\n\nm 2\n", false},
		"another comment":              {"# about\nm 1\n", "# other\nm 2\n", false},
		"another label":                {"m{a=\"1\"} 1\n", "m{a=\"2\"} 1\n", false},
		"another type":                 {"# TYPE m counter\nm 1\n", "# TYPE m gauge\nm 1\n", false},
		"another order":                {"a 1\nb 2\n", "b 2\na 1\n", false},
		"one sample more":              {"a 1\n", "a 1\nb 1\n", false},
		"one sample less":              {"a 1\nb 1\n", "a 1\n", false},
		"a histogram":                  {"# TYPE h histogram\nh_count 1\nh_sum 1\n", "# TYPE h histogram\nh_count 2\nh_sum 2\n", false},
		"a UTF-8 name":                 {"{\"a.b\"} 1\n", "{\"a.b\"} 2\n", false},
		"a value that is none":         {"m 1\n", "m 1x\n", false},
		"a timestamp":                  {"m 1\n", "m 1 2\n", false},
		"a timestamp for the same":     {"m 1 1\n", "m 1 2\n", false},
		"no end":                       {"m 1\n", "m 2", false},
		"nothing":                      {"", "", false},
		"a duplicate":                  {"m 1\nm 1\n", "m 1\nm 2\n", false},
		"a family that is interrupted": {"a{x=\"1\"} 1\nb 2\na{x=\"2\"} 3\n", "a{x=\"1\"} 4\nb 5\na{x=\"2\"} 6\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			want, status, _ := afterPushes(t, path, c.body)
			got, again, repeats := afterPushes(t, path, c.before, c.body)
			if again != status || status == 200 && got != want {
				t.Errorf("status %d, want %d; got\n%s\nwant\n%s", again, status, got, want)
			}
			if (repeats > 0) != c.repeats {
				t.Errorf("%d of the pushes were taken for repetitions", repeats)
			}
		})
	}
}

// Between two pushes of the same series the group may change in other ways.
func TestRepeatOfAChangedGroup(t *testing.T) {
	c := newClock()
	backend := &repeating{gateway.Memory(), t, map[string][]byte{}, 0}
	s := start(t, gateway.StoreConfig{Now: c.now}, backend)
	repeats := func(want int) {
		t.Helper()
		if backend.repeats != want {
			t.Errorf("%d repetitions, want %d", backend.repeats, want)
		}
	}
	s.want(200, "PUT", "/j", "a 1\nb 1\n")
	s.want(200, "PUT", "/j", "a 2\nb 2\n")
	repeats(1)
	s.want(200, "POST", "/j", "b{x=\"1\"} 3\n")
	s.want(200, "PUT", "/j", "a 4\nb 4\n")
	repeats(1)
	s.expect(`a{instance="",job="j"} 4`, `b{instance="",job="j"} 4`)
	s.want(400, "PUT", "/j", "a 1 1\n") // its failure time is set
	s.want(200, "POST", "/j", "a 5\nb 5\n")
	repeats(2)
	s.expectPush(`push_failure_time_seconds{instance="",job="j"} 1.9e+09`, `push_time_seconds{instance="",job="j"} 1.9e+09`)
	s.want(200, "PUT", "/j?interval=10m", "a 6\nb 6\n") // push_up comes
	repeats(2)
	s.want(200, "PUT", "/j?interval=20m&ttl=1h", "a 7\nb 7\n") // what is stored beside the values changes
	repeats(2)
	s.want(200, "PUT", "/j?interval=20m&ttl=1h", "a 8\nb 8\n")
	repeats(3)
	s.want(200, "PUT", "/j?aggregate=sum", "# TYPE c counter\nc 1\n")
	s.want(200, "PUT", "/j", "a 9\nb 9\n")
	repeats(3)
	s.expect(`a{instance="",job="j"} 9`, `b{instance="",job="j"} 9`)
	c.advance(3600e9)
	s.want(202, "DELETE", "/nobody", "") // time has passed: the samples are gone
	s.expect()
	s.want(200, "PUT", "/j", "a 10\nb 10\n")
	repeats(3)
	s.expect(`a{instance="",job="j"} 10`, `b{instance="",job="j"} 10`)
	s.want(202, "DELETE", "/j", "")
	s.want(200, "PUT", "/j", "a 11\nb 11\n")
	repeats(3)
	s.expect(`a{instance="",job="j"} 11`, `b{instance="",job="j"} 11`)
	s.want(200, "PUT", "/other", "a 1\nb 1\n") // the same body, another group
	repeats(3)
}

// FuzzRepeat pushes two bodies, the second of which often has the series of the first
// with other values.
func FuzzRepeat(f *testing.F) {
	f.Add("a 1\nb{x=\"y z\"} 2.5\n", "17 -3e5", true)
	f.Add("# TYPE z counter\nz{b=\"2\"} 1\nz{a=\"1\"} 2\n# HELP z says\n", "NaN +Inf", true)
	f.Add("push_time_seconds 1\nm{job=\"x\"} 2\n", "0.1 1e22", true)
	f.Add("a 1\n", "a 1\nb 2\n", false)
	f.Fuzz(func(t *testing.T, before, other string, values bool) {
		body := other
		if values {
			var b strings.Builder
			tokens := strings.Fields(other)
			for line := range strings.Lines(before) {
				at := strings.LastIndexByte(line, ' ')
				if at < 0 || line[0] == '#' || len(tokens) == 0 {
					b.WriteString(line)
					continue
				}
				fmt.Fprintf(&b, "%s%s\n", line[:at+1], tokens[0])
				tokens = append(tokens[1:], tokens[0])
			}
			body = b.String()
		}
		want, status, _ := afterPushes(t, "/j/x/1", body)
		got, again, _ := afterPushes(t, "/j/x/1", before, body)
		if again != status || status == 200 && got != want {
			t.Errorf("after %q and %q: status %d, want %d; got\n%s\nwant\n%s", before, body, again, status, got, want)
		}
	})
}
