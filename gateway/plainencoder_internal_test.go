package gateway

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/proto"
)

var testKey = Key{{"instance", "i"}, {"job", "a \"job\"\\\n"}}

// checkPlain compares the fast way with the slow one. It reports whether the fast
// way was taken.
func checkPlain(t *testing.T, key Key, body string) bool {
	t.Helper()
	fast, plain := encodePlain(key, []byte(body), 7)
	if !plain {
		return false
	}
	families, err := formatText.parse([]byte(body))
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
			if !checkPlain(t, key, body) {
				t.Errorf("%q: not taken for plain with the key %s", body, key)
			}
		}
	}
	for _, body := range otherBodies {
		checkPlain(t, testKey, body)
		checkPlain(t, noInstance, body)
	}
	if checkPlain(t, Key{{"job", "j"}, {"utf.8", "x"}}, "m 1\n") {
		t.Error("a key outside the legacy rules was taken for plain")
	}
}

func TestAppendFloat(t *testing.T) {
	for _, f := range []float64{0, math.Copysign(0, -1), 1, -1, 1.5, 1e6, 1e-7, 123456, 999999, 1 << 53, math.MaxFloat64, math.NaN(), math.Inf(1), math.Inf(-1)} {
		checkPlain(t, testKey, "m "+string(appendFloat(nil, f))+"\n")
	}
}

// FuzzEncodePlain looks for a body that the two ways take differently.
func FuzzEncodePlain(f *testing.F) {
	for _, body := range append(plainBodies, otherBodies...) {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body string) {
		checkPlain(t, testKey, body)
		checkPlain(t, Key{{"job", "j"}}, body)
	})
}

// BenchmarkEncode compares the fast way of a plain body with the slow one, rounds of
// the two alternating.
func BenchmarkEncode(b *testing.B) {
	var text strings.Builder
	for i := range 50 {
		fmt.Fprintf(&text, "# HELP bench_metric_%02d Some help.\n# TYPE bench_metric_%02d gauge\nbench_metric_%02d{kind=\"some_value\"} %d.5\n", i, i, i, i)
	}
	body := []byte(text.String())
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	var slow time.Duration
	for range b.N {
		if _, plain := encodePlain(testKey, body, 1); !plain {
			b.Fatal("the body is not plain")
		}
		b.StopTimer()
		start := time.Now()
		families, err := formatText.parse(body)
		if err != nil {
			b.Fatal(err)
		}
		prepare(testKey, families, 1)
		slow += time.Since(start)
		b.StartTimer()
	}
	b.ReportMetric(float64(slow)/float64(b.Elapsed()), "x-slow-way")
}
