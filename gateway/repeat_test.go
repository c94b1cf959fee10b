package gateway_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/reflect/protoreflect"

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

// afterPushes returns what a store has after pushes to a group, by PUT, the status of
// the last one, and whether that was taken for a repetition.
func afterPushes(t *testing.T, path, contentType string, bodies ...string) (state string, status int, repeats bool) {
	backend := &repeating{gateway.Memory(), t, map[string][]byte{}, 0}
	s := start(t, gateway.StoreConfig{Now: newClock().now}, backend)
	before := 0
	for _, body := range bodies {
		before = backend.repeats
		status = s.do("PUT", path, body, "Content-Type", contentType).Code
	}
	return s.samples(true) + "\n" + s.query() + "\n" + s.scrape("Accept", protobufType).Body.String(), status, backend.repeats > before
}

// checkRepeat pushes body after two pushes of before: where the values stand in a body that
// has more than one a series is only found out with the second. It reports whether the last
// one was taken for a repetition.
func checkRepeat(t *testing.T, path, contentType, before, body string) bool {
	t.Helper()
	if _, status, _ := afterPushes(t, path, contentType, before); status != 200 {
		return false // it leaves a failure time
	}
	want, status, _ := afterPushes(t, path, contentType, body)
	got, again, repeats := afterPushes(t, path, contentType, before, before, body)
	if again != status || status == 200 && got != want {
		t.Errorf("after %q and %q: status %d, want %d; got\n%s\nwant\n%s", before, body, again, status, got, want)
	}
	return repeats
}

// A push that brings the series of the one before leaves what it would leave as the
// first one.
func TestRepeat(t *testing.T) {
	const histogram = "# HELP h says h\n# TYPE h histogram\n"
	const summary = "# TYPE s summary\n"
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
		"only what the gateway makes":  {"push_time_seconds 7\n", "push_time_seconds 8\n", false},
		"a comment":                    {"# about\n\nm 1\n", "# about\n\nm 2\n", true},
		"another comment":              {"# about\nm 1\n", "# other\nm 2\n", false},
		"a comment with a number":      {"  # about 1\nm 1\n", "  # about 2\nm 2\n", false},
		"a HELP with a number":         {"  # HELP m says 1\nm 1\n", "  # HELP m says 2\nm 2\n", false},
		"another label":                {"m{a=\"1\"} 1\n", "m{a=\"2\"} 1\n", false},
		"another type":                 {"# TYPE m counter\nm 1\n", "# TYPE m gauge\nm 1\n", false},
		"another order":                {"a 1\nb 2\n", "b 2\na 1\n", false},
		"one sample more":              {"a 1\n", "a 1\nb 1\n", false},
		"one sample less":              {"a 1\nb 1\n", "a 1\n", false},
		"a UTF-8 name":                 {"{\"a.b\"} 1\n", "{\"a.b\"} 2\n", false},
		"a UTF-8 name among others":    {"{\"a.b\"} 1\nm 1\n", "{\"a.b\"} 2\nm 2\n", false},
		"a value that is none":         {"m 1\n", "m 1x\n", false},
		"a timestamp":                  {"m 1\n", "m 1 2\n", false},
		"a timestamp for the same":     {"m 1 1\n", "m 1 2\n", false},
		"no end":                       {"m 1\n", "m 2", false},
		"nothing":                      {"", "", false},
		"a duplicate":                  {"m 1\nm 1\n", "m 1\nm 2\n", false},
		"a family that is interrupted": {"a{x=\"1\"} 1\nb 2\na{x=\"2\"} 3\n", "a{x=\"1\"} 4\nb 5\na{x=\"2\"} 6\n", true},

		"a histogram": {
			histogram + "h_bucket{le=\"1\"} 1\nh_bucket{le=\"2.50\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 3.5\nh_count 2\n",
			histogram + "h_bucket{le=\"1\"} 123\nh_bucket{le=\"2.50\"} 456\nh_bucket{le=\"+Inf\"} 7890123\nh_sum NaN\nh_count 7890124\n", true},
		"histograms and gauges, with labels, in any order": {
			"m{a=\"2\"} 1\nm{a=\"1\"} 2\n" + histogram + "h_count{a=\"2\"} 3\nh_sum{a=\"2\"} 4\nh_bucket{a=\"2\",le=\"1\"} 5\nh_bucket{a=\"1\",le=\"1\"} 6\nh_sum{a=\"1\"} 7\nh_count{a=\"1\"} 8\n",
			"m{a=\"2\"} 9\nm{a=\"1\"} 8\n" + histogram + "h_count{a=\"2\"} 7\nh_sum{a=\"2\"} 6\nh_bucket{a=\"2\",le=\"1\"} 5\nh_bucket{a=\"1\",le=\"1\"} 4\nh_sum{a=\"1\"} -3\nh_count{a=\"1\"} 2\n", true},
		"a histogram without buckets": {histogram + "h_sum 1\nh_count 1\n", histogram + "h_sum 2\nh_count 2\n", true},
		"a histogram without a sum":   {histogram + "h_bucket{le=\"1\"} 0\nh_count 0\n", histogram + "h_bucket{le=\"1\"} 1\nh_count 1\n", false},
		"a histogram without a count": {histogram + "h_bucket{le=\"1\"} 1\nh_sum 1\n", histogram + "h_bucket{le=\"1\"} 2\nh_sum 2\n", false},
		"another bucket":              {histogram + "h_bucket{le=\"1\"} 1\nh_sum 1\nh_count 1\n", histogram + "h_bucket{le=\"2\"} 1\nh_sum 1\nh_count 1\n", false},
		"a bucket twice":              {histogram + "h_bucket{le=\"1\"} 1\nh_bucket{le=\"1\"} 2\nh_sum 1\nh_count 1\n", histogram + "h_bucket{le=\"1\"} 3\nh_bucket{le=\"1\"} 4\nh_sum 1\nh_count 1\n", true},
		"a sum twice":                 {histogram + "h_sum 1\nh_sum 2\nh_count 1\n", histogram + "h_sum 3\nh_sum 4\nh_count 1\n", true},
		"a count that is none":        {histogram + "h_bucket{le=\"1\"} 1\nh_sum 1\nh_count 1\n", histogram + "h_bucket{le=\"1\"} 1.5\nh_sum 1\nh_count 1\n", false},
		"a negative count":            {histogram + "h_sum 1\nh_count 1\n", histogram + "h_sum 1\nh_count -0\n", false},
		"a count that is large":       {histogram + "h_sum 1\nh_count 1\n", histogram + "h_sum 1\nh_count 9007199254740992\n", true},
		"a count that is too large":   {histogram + "h_sum 1\nh_count 1\n", histogram + "h_sum 1\nh_count 9007199254740994\n", false},
		"a summary": {
			summary + "s{quantile=\"0.5\"} 1\ns{quantile=\"0.90\"} 2\ns_sum 3\ns_count 4\n",
			summary + "s{quantile=\"0.5\"} NaN\ns{quantile=\"0.90\"} -2.5\ns_sum 1e100\ns_count 4000000\n", true},
		"a summary's count that is none": {summary + "s_sum 3\ns_count 4\n", summary + "s_sum 3\ns_count 4.5\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			if repeats := checkRepeat(t, "/j/instance/i%20j", "", c.before, c.body); repeats != c.repeats {
				t.Errorf("taken for a repetition: %t", repeats)
			}
		})
	}
}

// TestRepeatProtobuf is TestRepeat for the format of the Go client library.
func TestRepeatProtobuf(t *testing.T) {
	for name, c := range map[string]struct {
		before, body []string
		repeats      bool
	}{
		"a gauge":         {[]string{`name:"m" type:GAUGE metric{gauge{value:1}}`}, []string{`name:"m" type:GAUGE metric{gauge{value:nan}}`}, true},
		"an absent value": {[]string{`name:"m" type:GAUGE metric{gauge{}}`}, []string{`name:"m" type:GAUGE metric{gauge{}}`}, false},
		"series and families out of order": {
			[]string{`name:"z" help:"z" type:COUNTER metric{label{name:"a" value:"2"} counter{value:1}} metric{label{name:"a" value:"1"} counter{value:2}}`, `name:"b" type:UNTYPED metric{untyped{value:3}}`},
			[]string{`name:"z" help:"z" type:COUNTER metric{label{name:"a" value:"2"} counter{value:4}} metric{label{name:"a" value:"1"} counter{value:5}}`, `name:"b" type:UNTYPED metric{untyped{value:6}}`}, true},
		"counters that tell when they were created": {
			[]string{`name:"m" type:COUNTER metric{counter{value:1 created_timestamp{seconds:1500000000 nanos:1}}} metric{label{name:"a" value:"1"} counter{value:2}} metric{label{name:"a" value:"2"} counter{value:2 created_timestamp{seconds:1500000000}}}`},
			[]string{`name:"m" type:COUNTER metric{counter{value:3 created_timestamp{seconds:-5 nanos:999999999}}} metric{label{name:"a" value:"1"} counter{value:4}} metric{label{name:"a" value:"2"} counter{value:1 created_timestamp{}}}`}, true},
		"one that doesn't tell it any more": {
			[]string{`name:"m" type:COUNTER metric{counter{value:1 created_timestamp{seconds:1500000000}}}`},
			[]string{`name:"m" type:COUNTER metric{counter{value:3}}`}, false},
		"a time that nanoseconds don't have": {
			[]string{`name:"m" type:COUNTER metric{counter{value:1 created_timestamp{seconds:1500000000}}}`},
			[]string{`name:"m" type:COUNTER metric{counter{value:3 created_timestamp{seconds:9223372037}}}`}, false},
		"a histogram": {
			[]string{`name:"h" type:HISTOGRAM metric{histogram{sample_count:3 sample_sum:2.5 bucket{cumulative_count:1 upper_bound:1} bucket{cumulative_count:2 upper_bound:2} created_timestamp{seconds:1500000000}}}`},
			[]string{`name:"h" type:HISTOGRAM metric{histogram{sample_count:300000 sample_sum:-inf bucket{cumulative_count:100000 upper_bound:1} bucket{cumulative_count:200000 upper_bound:2} created_timestamp{seconds:1500000001}}}`}, true},
		"histograms, one with all buckets": {
			[]string{`name:"h" type:HISTOGRAM metric{histogram{sample_count:3 sample_sum:2.5 bucket{cumulative_count:1 upper_bound:1} bucket{cumulative_count:2 upper_bound:inf}}} metric{label{name:"a" value:"1"} histogram{sample_count:1 sample_sum:1 bucket{cumulative_count:1 upper_bound:1}}}`},
			[]string{`name:"h" type:HISTOGRAM metric{histogram{sample_count:6 sample_sum:3.5 bucket{cumulative_count:4 upper_bound:1} bucket{cumulative_count:5 upper_bound:inf}}} metric{label{name:"a" value:"1"} histogram{sample_count:8 sample_sum:9 bucket{cumulative_count:7 upper_bound:1}}}`}, true},
		"a gauge histogram": {
			[]string{`name:"h" type:GAUGE_HISTOGRAM metric{histogram{sample_count:3 sample_sum:2.5 bucket{cumulative_count:3 upper_bound:1}}}`},
			[]string{`name:"h" type:GAUGE_HISTOGRAM metric{histogram{sample_count:4 sample_sum:1.5 bucket{cumulative_count:2 upper_bound:1}}}`}, true},
		"a summary": {
			[]string{`name:"s" type:SUMMARY metric{summary{sample_count:3 sample_sum:2.5 quantile{quantile:0.5 value:1} quantile{quantile:0.9 value:2} created_timestamp{seconds:1500000000}}}`},
			[]string{`name:"s" type:SUMMARY metric{summary{sample_count:30000 sample_sum:3.5 quantile{quantile:0.5 value:nan} quantile{quantile:0.9 value:4} created_timestamp{seconds:1600000000 nanos:7}}}`}, true},
		"another quantile": {
			[]string{`name:"s" type:SUMMARY metric{summary{sample_count:3 sample_sum:2.5 quantile{quantile:0.5 value:1}}}`},
			[]string{`name:"s" type:SUMMARY metric{summary{sample_count:3 sample_sum:2.5 quantile{quantile:0.6 value:1}}}`}, false},
		"a count that a float64 doesn't have": {
			[]string{`name:"s" type:SUMMARY metric{summary{sample_count:3 sample_sum:2.5}}`},
			[]string{`name:"s" type:SUMMARY metric{summary{sample_count:9007199254740993 sample_sum:2.5}}`}, false},
		"an exemplar": {
			[]string{`name:"m" type:COUNTER metric{counter{value:1}}`},
			[]string{`name:"m" type:COUNTER metric{counter{value:2 exemplar{label{name:"trace_id" value:"x"} value:1}}}`}, false},
		"a native histogram": {
			[]string{`name:"h" type:HISTOGRAM metric{histogram{sample_count:3 sample_sum:2.5 schema:0 positive_span{offset:0 length:1} positive_delta:3}}`},
			[]string{`name:"h" type:HISTOGRAM metric{histogram{sample_count:4 sample_sum:2.5 schema:0 positive_span{offset:0 length:1} positive_delta:4}}`}, false},
		"a histogram of floats": {
			[]string{`name:"h" type:HISTOGRAM metric{histogram{sample_count_float:3.5 bucket{cumulative_count_float:1.5 upper_bound:1}}}`},
			[]string{`name:"h" type:HISTOGRAM metric{histogram{sample_count_float:4.5 bucket{cumulative_count_float:2.5 upper_bound:1}}}`}, false},
		"a time of a sample": {
			[]string{`name:"m" type:GAUGE metric{gauge{value:1}}`},
			[]string{`name:"m" type:GAUGE metric{gauge{value:1} timestamp_ms:5}`}, false},
		"a family twice": {
			[]string{`name:"m" type:GAUGE metric{gauge{value:1}}`, `name:"m" type:GAUGE metric{gauge{value:2}}`},
			[]string{`name:"m" type:GAUGE metric{gauge{value:3}}`, `name:"m" type:GAUGE metric{gauge{value:4}}`}, true},
		"a value beside that of the type": {
			[]string{`name:"m" type:GAUGE metric{gauge{value:1} untyped{value:2}}`},
			[]string{`name:"m" type:GAUGE metric{gauge{value:3} untyped{value:4}}`}, true},
		"another HELP": {
			[]string{`name:"m" type:GAUGE help:"a" metric{gauge{value:1}}`},
			[]string{`name:"m" type:GAUGE help:"b" metric{gauge{value:1}}`}, false},
		"a label more": {
			[]string{`name:"m" type:GAUGE metric{label{name:"a" value:"1"} gauge{value:1}}`},
			[]string{`name:"m" type:GAUGE metric{label{name:"a" value:"1"} label{name:"b" value:"1"} gauge{value:1}}`}, false},
		"what belongs to another series": {
			[]string{`name:"m" type:GAUGE metric{gauge{value:1}} metric{label{name:"a" value:"1"} gauge{value:2}}`},
			[]string{`name:"m" type:GAUGE metric{label{name:"a" value:"1"} gauge{value:1}} metric{gauge{value:2}}`}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if repeats := checkRepeat(t, "/j/instance/i", protobufType, delimited(t, c.before...), delimited(t, c.body...)); repeats != c.repeats {
				t.Errorf("taken for a repetition: %t", repeats)
			}
		})
	}
}

// A family that is not in protobuf's own order means the same; so does one with lengths and
// numbers that take more bytes than they need, and one with a field twice.
func TestRepeatUnusualProtobuf(t *testing.T) {
	number := func(v float64) string {
		return "\x09" + string(binary.LittleEndian.AppendUint64(nil, math.Float64bits(v)))
	}
	sum := func(v float64) string { return "\x11" + number(v)[1:] }
	message := func(tag byte, content string) string { return string(tag) + string(byte(len(content))) + content }
	family := func(content string) string { return string(byte(len(content))) + content }
	for name, body := range map[string]func(a, b byte) string{
		"the count behind the sum": func(a, b byte) string {
			return family("\x0a\x01s\x18\x02" + message(0x22, message(0x22, sum(float64(a))+"\x08"+string(b))))
		},
		"the name at the end": func(a, b byte) string {
			return family("\x18\x01" + message(0x22, message(0x12, number(float64(a)))+message(0x0a, "\x0a\x01a\x12\x01b")) + "\x0a\x01m")
		},
		"long numbers": func(a, b byte) string {
			return family("\x0a\x01s\x18\x82\x00" + message(0x22, message(0x22, "\x08"+string([]byte{0x80 | a, 0x80, 0})+sum(float64(b)))))
		},
		"a value twice": func(a, b byte) string {
			return family("\x0a\x01m\x18\x01" + message(0x22, message(0x12, number(float64(a))+number(float64(b)))))
		},
		"a message twice": func(a, b byte) string {
			return family("\x0a\x01s\x18\x02" + message(0x22, message(0x22, "\x08"+string(a))+message(0x22, sum(float64(b)))))
		},
	} {
		t.Run(name, func(t *testing.T) {
			if !checkRepeat(t, "/j/instance/i", protobufType, body(0, 0), body(3, 7)) {
				t.Error("it was not taken for a repetition")
			}
			checkRepeat(t, "/j/instance/i", protobufType, body(5, 5), body(0, 7))
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
		checkRepeat(t, "/j/x/1", "", before, body)
	})
}

// FuzzRepeatProtobuf pushes a body in protobuf, and then it again with other values.
func FuzzRepeatProtobuf(f *testing.F) {
	for _, families := range [][]string{
		{`name:"m" help:"h" type:COUNTER metric{label{name:"a" value:"1"} counter{value:1 created_timestamp{seconds:1500000000 nanos:5}}} metric{counter{value:2}}`, `name:"g" type:GAUGE metric{gauge{value:2}}`},
		{`name:"h" type:HISTOGRAM metric{histogram{sample_count:3 sample_sum:2.5 bucket{cumulative_count:1 upper_bound:1} bucket{cumulative_count:2 upper_bound:inf} created_timestamp{seconds:1500000000}}}`},
		{`name:"s" type:SUMMARY metric{summary{sample_count:3 sample_sum:2.5 quantile{quantile:0.5 value:1}}}`, `name:"u" metric{untyped{value:2}}`},
		{`name:"n" type:HISTOGRAM metric{histogram{sample_count:3 sample_sum:2.5 schema:0 positive_span{offset:0 length:1} positive_delta:3}}`},
	} {
		f.Add([]byte(delimited(f, families...)), []byte("\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\xf0?"))
	}
	f.Fuzz(func(t *testing.T, before, values []byte) {
		checkRepeat(t, "/j/x/1", protobufType, string(before), withNumbers(t, before, values))
	})
}

// withNumbers returns a body with the numbers in it taken from values, 8 bytes each, as far
// as it can be read.
func withNumbers(t *testing.T, body, values []byte) string {
	next := func() (n uint64) {
		if len(values) < 8 {
			return 7
		}
		n, values = binary.LittleEndian.Uint64(values), append(values[8:], values[:8]...)
		return n
	}
	var replace func(m protoreflect.Message)
	replace = func(m protoreflect.Message) {
		m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			switch {
			case f.IsList() && f.Message() != nil:
				for i := range v.List().Len() {
					replace(v.List().Get(i).Message())
				}
			case f.IsList():
			case f.Message() != nil:
				replace(v.Message())
			case f.Kind() == protoreflect.DoubleKind && f.Name() != "upper_bound" && f.Name() != "quantile":
				m.Set(f, protoreflect.ValueOfFloat64(math.Float64frombits(next())))
			case f.Kind() == protoreflect.Uint64Kind:
				m.Set(f, protoreflect.ValueOfUint64(next()%(1<<54)))
			case f.Kind() == protoreflect.Int64Kind && f.Name() == "seconds":
				m.Set(f, protoreflect.ValueOfInt64(int64(next())%1e11))
			}
			return true
		})
	}
	var out bytes.Buffer
	for r := bytes.NewReader(body); ; {
		family := new(dto.MetricFamily)
		if protodelim.UnmarshalFrom(r, family) != nil {
			return out.String()
		}
		replace(family.ProtoReflect())
		if _, err := protodelim.MarshalTo(&out, family); err != nil {
			t.Fatal(err)
		}
	}
}
