package gateway

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

var testKey = Key{{"instance", "i"}, {"job", "a \"job\"\\\n"}}

// checkPlain compares the fast way with the slow one. It reports whether the fast
// way was taken.
func checkPlain(t *testing.T, f format, key Key, body string) bool {
	t.Helper()
	fast, plain := f.encodePlain(key, []byte(body), 7)
	if !plain {
		return false
	}
	families, err := f.parse([]byte(body))
	if err != nil {
		t.Fatalf("%q was accepted; the parser says %v", body, err)
	}
	slow, reasons := prepare(key, families, 7)
	if len(reasons) > 0 {
		t.Fatalf("%q was accepted; the slow way says %v", body, reasons)
	}
	if len(fast.families) != len(slow.families) || len(slow.dropped) > 0 {
		t.Fatalf("%q: got %d families, want %d and %q dropped", body, len(fast.families), len(slow.families), slow.dropped)
	}
	for i, got := range fast.families {
		want := slow.families[i]
		if got.meta != want.meta || got.pushed != want.pushed || string(got.text) != string(want.text) || !slices.Equal(got.series, want.series) {
			t.Fatalf("%q: got\n%+v\n%s%x\nwant\n%+v\n%s%x", body, got.meta.Value(), got.text, got.series, want.meta.Value(), want.text, want.series)
		}
		gotFamily, err := got.decode()
		if err != nil {
			t.Fatalf("%q: %v", body, err)
		}
		wantFamily, err := want.decode()
		if err != nil {
			t.Fatal(err)
		}
		if !proto.Equal(gotFamily, wantFamily) {
			t.Fatalf("%q: got %v, want %v", body, gotFamily, wantFamily)
		}
		m := want.meta.Value()
		text, err := encodeText(m.name, m.kind, wantFamily.Metric, model.UnderscoreEscaping, false)
		if err != nil || string(got.appendText(nil)) != string(text) {
			t.Fatalf("%q: got the text\n%s, want\n%s (%v)", body, got.appendText(nil), text, err)
		}
	}
	if layout, values := f.layoutOf([]byte(body)); layout.values > 0 {
		if want := f.placesIn([]byte(body), values, key, slow.families); !slices.Equal(fast.order, want.order) || !slices.Equal(fast.counts, want.counts) {
			t.Fatalf("%q: got the places %v, want %v", body, fast.places, want)
		}
	}
	return true
}

// plainBodies are what client libraries write: the fast way has to take them.
var plainBodies = []string{
	"",
	"\n",
	"m 1\n",
	"# HELP m Some help.\n# TYPE m counter\nm 1\n",
	"# TYPE m gauge\n# HELP m Some \"help\" = {}.\nm{a=\"b\"} 1.5\nm{a=\"a\",} -2e-7\n\nm{} 0\n",
	"# TYPE m untyped\nm NaN\nn +Inf\no -Inf\np -0\nq 999999\nr 1000000\ns 123456789012345\nt 1234567890123456789\n",
	"z 1\ny 1\nx{c=\"1\",b=\"2\",a=\"3\"} 1\n",
	"m{b=\"2\",c=\"3\"} 1\nm{b=\"2\"} 2\nm{d=\"1\"} 3\nm{a=\"2\"} 4\n",
	"m{job=\"other\",instance=\"other\"} 1\n",
	"m{le=\"x\",quantile=\"y\"} 1\n",
	"m{a=\"ü €, {}=# \"} 1\n",
	"# TYPE m gauge\n# TYPE n gauge\nn 1\n",
	"push_time_seconds 1\npush_failure_time_seconds 1\npush_up 1\na 1\n",
	"x_count 1\nx_sum 2\nx_bucket{le=\"1\"} 1\nx:y 1\n",
}

// otherBodies are valid too, or not, and left to the slow way.
var otherBodies = []string{
	"m 1", "m 1\r\n", "m  1\n", " m 1\n", "m 1 \n", "m 1 5\n", "m{a=\"\\n\"} 1\n", "m {a=\"b\"} 1\n", "m{a = \"b\"} 1\n",
	"m{a=\"1\"} 1\nn 1\nm{a=\"2\"} 1\n", "m{job=\"1\"} 1\nm{job=\"2\"} 1\n", "m{a=\"1\",a=\"2\"} 1\n", "m{__x=\"1\"} 1\n",
	"# TYPE m histogram\nm_bucket{le=\"1\"} 1\n", "# TYPE m counter\n# TYPE m counter\nm 1\n", "m 1\n# TYPE m counter\n", "# HELP m a\\nb\nm 1\n",
	"# a comment\nm 1\n", "{\"m\"} 1\n", "{a=\"b\"} 1\n", "m 0x1p1\n", "m 1_000\n", "m 1e400\n", "m inf\n", "m{1=\"\"} 1\n", "m{a:b=\"\"} 1\n", "1m 1\n", "m{a=\"\xff\"} 1\n",
	"# HELP m\nm 1\n", "# HELP m  two blanks\nm 1\n", "# HELP m blank behind \nm 1\n", "m{a=\"b\"}1\n", "m{a=\"b\" } 1\n", "m{,} 1\n", "# TYPE m COUNTER\nm 1\n", "m +1\n",
}

func TestEncodePlain(t *testing.T) {
	noInstance := Key{{"job", "j"}}
	for _, body := range plainBodies {
		for _, key := range []Key{testKey, noInstance} {
			if !checkPlain(t, formatText, key, body) {
				t.Errorf("%q: not taken for plain with the key %s", body, key)
			}
		}
	}
	for _, body := range otherBodies {
		checkPlain(t, formatText, testKey, body)
		checkPlain(t, formatText, noInstance, body)
	}
	if checkPlain(t, formatText, Key{{"job", "j"}, {"utf.8", "x"}}, "m 1\n") {
		t.Error("a key outside the legacy rules was taken for plain")
	}
}

// delimited returns messages as a body.
func delimited(families ...*dto.MetricFamily) string {
	var body bytes.Buffer
	encoder := expfmt.NewEncoder(&body, expfmt.NewFormat(expfmt.TypeProtoDelim))
	for _, f := range families {
		if err := encoder.Encode(f); err != nil {
			panic(err)
		}
	}
	return body.String()
}

// asProtobuf returns a body in text format as protobuf; "" where it can't be read.
func asProtobuf(body string) string {
	families, err := formatText.parse([]byte(body))
	if err != nil {
		return ""
	}
	return delimited(families...)
}

// bytesField returns a field of a message.
func bytesField(number protowire.Number, content string) string {
	return string(protowire.AppendString(protowire.AppendTag(nil, number, protowire.BytesType), content))
}

// message returns a message of fields, with its length.
func message(fields ...string) string {
	return string(protowire.AppendString(nil, strings.Join(fields, "")))
}

func TestEncodePlainProtobuf(t *testing.T) {
	keys := []Key{testKey, {{"job", "j"}}}
	for _, body := range plainBodies {
		for _, key := range keys {
			if !checkPlain(t, formatProtobuf, key, asProtobuf(body)) {
				t.Errorf("%q: not taken for plain with the key %s", body, key)
			}
		}
	}
	for _, body := range otherBodies {
		for _, key := range keys {
			checkPlain(t, formatProtobuf, key, asProtobuf(body))
		}
	}
	gauge := bytesField(2, "\x09\x00\x00\x00\x00\x00\x00\xf0\x3f")
	counter := bytesField(3, gauge[2:])
	label := func(name, value string) string { return bytesField(1, bytesField(1, name)+bytesField(2, value)) }
	const isGauge, isCounter, isSummary, isUntyped = "\x18\x01", "\x18\x00", "\x18\x02", "\x18\x03"
	for name, c := range map[string]struct {
		body  string
		plain bool
	}{
		"a gauge":                     {message(bytesField(1, "m"), isGauge, bytesField(4, gauge)), true},
		"no type":                     {message(bytesField(1, "m"), bytesField(4, counter)), true},
		"HELP behind the series":      {message(bytesField(1, "m"), bytesField(4, counter), bytesField(2, "Some help.")), true},
		"the value before the labels": {message(bytesField(1, "m"), isGauge, bytesField(4, gauge+label("a", "b"))), true},
		"an empty label":              {message(bytesField(1, "m"), isGauge, bytesField(4, label("a", "")+gauge)), true},
		"a label without a value":     {message(bytesField(1, "m"), isGauge, bytesField(4, bytesField(1, bytesField(1, "a"))+gauge)), true},
		"lines in HELP and a label":   {message(bytesField(1, "m"), bytesField(2, "a\n\\b\n"), isGauge, bytesField(4, label("a", "\n\"\\")+gauge)), true},
		"series out of order":         {message(bytesField(1, "m"), isGauge, bytesField(4, label("a", "2")+gauge), bytesField(4, label("a", "1")+gauge)), true},
		"families out of order":       {message(bytesField(1, "n"), isGauge, bytesField(4, gauge)) + message(bytesField(1, "m"), isGauge, bytesField(4, gauge)), true},

		"a type behind the series":     {message(bytesField(1, "m"), bytesField(4, counter), isGauge), false},
		"a name behind the series":     {message(bytesField(4, counter), bytesField(1, "m")), false},
		"another type's value":         {message(bytesField(1, "m"), isCounter, bytesField(4, gauge)), false},
		"another type's value, too":    {message(bytesField(1, "m"), isCounter, bytesField(4, counter+gauge)), false},
		"two values":                   {message(bytesField(1, "m"), isCounter, bytesField(4, counter+counter)), false},
		"no value":                     {message(bytesField(1, "m"), isUntyped, bytesField(4, "")), false},
		"an empty value":               {message(bytesField(1, "m"), isGauge, bytesField(4, bytesField(2, ""))), false},
		"a value of another wire type": {message(bytesField(1, "m"), isGauge, bytesField(4, "\x10\x01")), false},
		"a type of another wire type":  {message(bytesField(1, "m"), bytesField(3, ""), bytesField(4, counter)), false},
		"a summary":                    {message(bytesField(1, "m"), isSummary, bytesField(4, counter)), false},
		"a timestamp":                  {message(bytesField(1, "m"), isGauge, bytesField(4, gauge+"\x30\x01")), false},
		"a unit":                       {message(bytesField(1, "m_s"), isGauge, bytesField(4, gauge), bytesField(5, "s")), false},
		"an unknown field":             {message(bytesField(1, "m"), isGauge, bytesField(4, gauge), bytesField(9, "x")), false},
		"an exemplar":                  {message(bytesField(1, "m"), bytesField(4, bytesField(3, counter[2:]+bytesField(2, "")))), false},
		"two names":                    {message(bytesField(1, "m"), bytesField(1, "n"), bytesField(4, counter)), false},
		"two HELP texts":               {message(bytesField(1, "m"), bytesField(2, "a"), bytesField(2, "b"), bytesField(4, counter)), false},
		"two types":                    {message(bytesField(1, "m"), isGauge, isCounter, bytesField(4, counter)), false},
		"two names of a label":         {message(bytesField(1, "m"), bytesField(4, bytesField(1, bytesField(1, "a")+bytesField(1, "b"))+counter)), false},
		"no series":                    {message(bytesField(1, "m"), isGauge), false},
		"a family twice":               {message(bytesField(1, "m"), bytesField(4, counter)) + message(bytesField(1, "m"), bytesField(4, counter)), false},
		"a label twice":                {message(bytesField(1, "m"), bytesField(4, label("a", "1")+label("a", "1")+counter)), false},
		"a series twice":               {message(bytesField(1, "m"), bytesField(4, counter), bytesField(4, counter)), false},
		"UTF-8 in a name":              {message(bytesField(1, "m.n"), bytesField(4, counter)), false},
		"UTF-8 in a label's name":      {message(bytesField(1, "m"), bytesField(4, label("a.b", "c")+counter)), false},
		"a reserved label":             {message(bytesField(1, "m"), bytesField(4, label("__a", "c")+counter)), false},
		"no UTF-8":                     {message(bytesField(1, "m"), bytesField(4, label("a", "\xff")+counter)), false},
		"no UTF-8 in HELP":             {message(bytesField(1, "m"), bytesField(2, "\xff"), bytesField(4, counter)), false},
		"cut off":                      {message(bytesField(1, "m"), bytesField(4, counter)[:5]), false},
		"a length beyond the end":      {"\x7f" + bytesField(1, "m"), false},
	} {
		for _, key := range keys {
			if plain := checkPlain(t, formatProtobuf, key, c.body); plain != c.plain {
				t.Errorf("%s: taken for plain: %v, want %v", name, plain, c.plain)
			}
		}
	}
}

func TestAppendFloat(t *testing.T) {
	for _, f := range []float64{0, math.Copysign(0, -1), 1, -1, 1.5, 1e6, 1e-7, 123456, 999999, 1 << 53, math.MaxFloat64, math.NaN(), math.Inf(1), math.Inf(-1)} {
		checkPlain(t, formatText, testKey, "m "+string(appendFloat(nil, f))+"\n")
	}
}

// FuzzEncodePlain looks for a body that the two ways take differently.
func FuzzEncodePlain(f *testing.F) {
	for _, body := range append(plainBodies, otherBodies...) {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body string) {
		checkPlain(t, formatText, testKey, body)
		checkPlain(t, formatText, Key{{"job", "j"}}, body)
	})
}

// FuzzEncodePlainProtobuf looks for a body that the two ways take differently.
func FuzzEncodePlainProtobuf(f *testing.F) {
	for _, body := range append(plainBodies, otherBodies...) {
		f.Add([]byte(asProtobuf(body)))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		checkPlain(t, formatProtobuf, testKey, string(body))
		checkPlain(t, formatProtobuf, Key{{"job", "j"}}, string(body))
	})
}

// BenchmarkEncode compares the fast way of a plain body with the slow one, rounds of
// the two alternating.
func BenchmarkEncode(b *testing.B) {
	var text strings.Builder
	for i := range 50 {
		fmt.Fprintf(&text, "# HELP bench_metric_%02d Some help.\n# TYPE bench_metric_%02d gauge\nbench_metric_%02d{kind=\"some_value\"} %d.5\n", i, i, i, i)
	}
	for _, c := range []struct {
		name   string
		format format
		body   string
	}{{"text", formatText, text.String()}, {"protobuf", formatProtobuf, asProtobuf(text.String())}} {
		b.Run(c.name, func(b *testing.B) {
			body := []byte(c.body)
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			var slow time.Duration
			for range b.N {
				if _, plain := c.format.encodePlain(testKey, body, 1); !plain {
					b.Fatal("the body is not plain")
				}
				b.StopTimer()
				start := time.Now()
				families, err := c.format.parse(body)
				if err != nil {
					b.Fatal(err)
				}
				prepare(testKey, families, 1)
				slow += time.Since(start)
				b.StartTimer()
			}
			b.ReportMetric(float64(slow)/float64(b.Elapsed()), "x-slow-way")
		})
	}
}
