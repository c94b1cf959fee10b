package gateway

import (
	"bytes"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// openMetricsAccepted are bodies, without # EOF, and what is in them: the families
// as text protobuf, sorted by name.
var openMetricsAccepted = map[string]struct {
	body string
	want []string
}{
	"nothing": {},
	"families without samples": {body: `# TYPE a histogram
# HELP b text
`},
	"counter": {body: `# TYPE foo counter
# HELP foo Counts \"foo\"\nand \\more.
foo_total{a="x"} 17.0
foo_created{a="x"} 1520430000.123
foo_total{a="y"} 5
`, want: []string{`name:"foo_total" help:"Counts \"foo\"\nand \\more." type:COUNTER
	metric:{label:{name:"a" value:"x"} counter:{value:17 created_timestamp:{seconds:1520430000 nanos:123000000}}}
	metric:{label:{name:"a" value:"y"} counter:{value:5}}`,
	}},
	"created in front of the total": {body: `# TYPE foo counter
foo_created 1
foo_total 2
`, want: []string{`name:"foo_total" type:COUNTER metric:{counter:{value:2 created_timestamp:{seconds:1}}}`}},
	"exemplars of a counter": {body: `# TYPE foo counter
foo_total{a="1"} 1 # {} 0.5
foo_total{a="2"} 1 # {trace_id="\"x\\ny\n"} 1 1520879607.789
foo_total{a="3"} 1 7 # {"b.c"="d",a="é"} -1 1.001
`, want: []string{`name:"foo_total" type:COUNTER
	metric:{label:{name:"a" value:"1"} counter:{value:1 exemplar:{value:0.5}}}
	metric:{label:{name:"a" value:"2"} counter:{value:1 exemplar:{
		label:{name:"trace_id" value:"\"x\\ny\n"} value:1 timestamp:{seconds:1520879607 nanos:789000000}}}}
	metric:{label:{name:"a" value:"3"} timestamp_ms:7000 counter:{value:1 exemplar:{
		label:{name:"a" value:"é"} label:{name:"b.c" value:"d"} value:-1 timestamp:{seconds:1 nanos:1000000}}}}`,
	}},
	"unit": {body: `# TYPE foo_seconds counter
# UNIT foo_seconds seconds
foo_seconds_total 1
# UNIT bar_bytes bytes
bar_bytes 2
`, want: []string{
		`name:"bar_bytes" type:UNTYPED unit:"bytes" metric:{untyped:{value:2}}`,
		`name:"foo_seconds_total" type:COUNTER unit:"seconds" metric:{counter:{value:1}}`,
	}},
	"empty HELP and UNIT count as none": {body: `# HELP foo 
# UNIT foo 
# HELP foo text
# TYPE foo gauge
foo 1
# HELP foo 
`, want: []string{`name:"foo" help:"text" type:GAUGE metric:{gauge:{value:1}}`}},
	"gauge": {body: `# TYPE foo gauge
foo NaN
foo{b="2",a="1"} -Inf
foo{a=""} 1e3
`, want: []string{`name:"foo" type:GAUGE
	metric:{gauge:{value:nan}}
	metric:{label:{name:"a" value:"1"} label:{name:"b" value:"2"} gauge:{value:-inf}}
	metric:{label:{name:"a" value:""} gauge:{value:1000}}`,
	}},
	"timestamp": {body: `# TYPE foo gauge
foo 17.0 1520879607.5
`, want: []string{`name:"foo" type:GAUGE metric:{timestamp_ms:1520879607500 gauge:{value:17}}`}},
	"unknown, declared and not": {body: `a_total 1
a_sum 2
# TYPE b unknown
b 3
# HELP c text
c 4
`, want: []string{
		`name:"a_sum" type:UNTYPED metric:{untyped:{value:2}}`,
		`name:"a_total" type:UNTYPED metric:{untyped:{value:1}}`,
		`name:"b" type:UNTYPED metric:{untyped:{value:3}}`,
		`name:"c" help:"text" type:UNTYPED metric:{untyped:{value:4}}`,
	}},
	"le and quantile of other types": {body: `# TYPE h histogram
h_bucket{le="+Inf"} 0
x{le="1"} 1
# TYPE s summary
s{quantile="0.50",le="1"} 1
# HELP y text
y{quantile="0.50"} 1
`, want: []string{
		`name:"h" type:HISTOGRAM metric:{histogram:{sample_count:0 bucket:{upper_bound:inf cumulative_count:0}}}`,
		`name:"s" type:SUMMARY metric:{label:{name:"le" value:"1"} summary:{quantile:{quantile:0.5 value:1}}}`,
		`name:"x" type:UNTYPED metric:{label:{name:"le" value:"1"} untyped:{value:1}}`,
		`name:"y" help:"text" type:UNTYPED metric:{label:{name:"quantile" value:"0.50"} untyped:{value:1}}`,
	}},
	"info": {body: `# TYPE foo info
# HELP foo text
foo_info{entity="controller",version="8.2.7"} 1
foo_info{entity="replica",version="8.1.9"} 1.0
`, want: []string{`name:"foo_info" help:"text" type:GAUGE
	metric:{label:{name:"entity" value:"controller"} label:{name:"version" value:"8.2.7"} gauge:{value:1}}
	metric:{label:{name:"entity" value:"replica"} label:{name:"version" value:"8.1.9"} gauge:{value:1}}`,
	}},
	"stateset": {body: `# TYPE foo stateset
foo{entity="controller",foo="a"} 1.0
foo{entity="controller",foo="bb"} 0
`, want: []string{`name:"foo" type:GAUGE
	metric:{label:{name:"entity" value:"controller"} label:{name:"foo" value:"a"} gauge:{value:1}}
	metric:{label:{name:"entity" value:"controller"} label:{name:"foo" value:"bb"} gauge:{value:0}}`,
	}},
	"summary": {body: `# TYPE foo summary
foo_count 17.0
foo_sum -324789.3
foo{quantile="0.99"} NaN
foo{quantile="0.5"} 2
foo_created 1520430000
foo_sum{a="b"} NaN
foo_count{a="b"} 0
`, want: []string{`name:"foo" type:SUMMARY
	metric:{summary:{sample_count:17 sample_sum:-324789.3 created_timestamp:{seconds:1520430000}
		quantile:{quantile:0.99 value:nan} quantile:{quantile:0.5 value:2}}}
	metric:{label:{name:"a" value:"b"} summary:{sample_count:0 sample_sum:nan}}`,
	}},
	"histogram": {body: `# TYPE foo histogram
foo_bucket{le="0.01"} 0
foo_bucket{le="0.1"} 8 # {} 0.054
foo_bucket{le="1"} 11 # {trace_id="KOO5S4vxi0o"} 0.67
foo_bucket{le="1e1"} 17 # {trace_id="oHg5SJYRHA0"} 9.8 1520879607.789
foo_bucket{le="+Inf"} 17
foo_count 17
foo_sum 324789.3
foo_created -1.5
`, want: []string{`name:"foo" type:HISTOGRAM metric:{histogram:{
	sample_count:17 sample_sum:324789.3 created_timestamp:{seconds:-2 nanos:500000000}
	bucket:{upper_bound:0.01 cumulative_count:0}
	bucket:{upper_bound:0.1 cumulative_count:8 exemplar:{value:0.054}}
	bucket:{upper_bound:1 cumulative_count:11 exemplar:{label:{name:"trace_id" value:"KOO5S4vxi0o"} value:0.67}}
	bucket:{upper_bound:10 cumulative_count:17 exemplar:{
		label:{name:"trace_id" value:"oHg5SJYRHA0"} value:9.8 timestamp:{seconds:1520879607 nanos:789000000}}}
	bucket:{upper_bound:inf cumulative_count:17}}}`,
	}},
	"histogram without sum and count": {body: `# TYPE foo histogram
foo_bucket{le="-1"} 1
foo_bucket{le="+Inf"} 3
`, want: []string{`name:"foo" type:HISTOGRAM metric:{histogram:{
	sample_count:3 bucket:{upper_bound:-1 cumulative_count:1} bucket:{upper_bound:inf cumulative_count:3}}}`,
	}},
	"float histogram": {body: `# TYPE foo histogram
foo_bucket{le="1"} 0
foo_bucket{le="2"} 0.5
foo_bucket{le="+Inf"} 2
foo_sum 3
foo_count 2
`, want: []string{`name:"foo" type:HISTOGRAM metric:{histogram:{sample_count_float:2 sample_sum:3
	bucket:{upper_bound:1 cumulative_count_float:0}
	bucket:{upper_bound:2 cumulative_count_float:0.5}
	bucket:{upper_bound:inf cumulative_count_float:2}}}`,
	}},
	"more than a uint64 counts": {body: `# TYPE foo histogram
foo_bucket{le="+Inf"} 1e30
`, want: []string{`name:"foo" type:HISTOGRAM metric:{histogram:{
	sample_count_float:1e30 bucket:{upper_bound:inf cumulative_count_float:1e30}}}`,
	}},
	"gaugehistogram": {body: `# TYPE foo gaugehistogram
foo_bucket{le="0.01"} 20.0
foo_bucket{le="+Inf"} 42.0
foo_gcount 42.0
foo_gsum -3289.3
foo_bucket{of="expfmt",le="+Inf"} 1
foo_sum{of="expfmt"} 2
foo_count{of="expfmt"} 1
`, want: []string{`name:"foo" type:GAUGE_HISTOGRAM
	metric:{histogram:{sample_count:42 sample_sum:-3289.3
		bucket:{upper_bound:0.01 cumulative_count:20} bucket:{upper_bound:inf cumulative_count:42}}}
	metric:{label:{name:"of" value:"expfmt"} histogram:{sample_count:1 sample_sum:2
		bucket:{upper_bound:inf cumulative_count:1}}}`,
	}},
	"quoted names": {body: `# TYPE "foo.bar" counter
# HELP "foo.bar" text
{"foo.bar_total","a b"="c","d\"\\\n"="e"} 1 # {"f.g"="h"} 1
{"d\"\\\n"="e","a b"="c","foo.bar_created"} 2
# TYPE "a\n\"é\"_s" gauge
# UNIT "a\n\"é\"_s" s
{x="y","a\n\"é\"_s"} 1
# TYPE "plain" gauge
plain 1
`, want: []string{
		`name:"a\n\"é\"_s" type:GAUGE unit:"s" metric:{label:{name:"x" value:"y"} gauge:{value:1}}`,
		`name:"foo.bar_total" help:"text" type:COUNTER metric:{
			label:{name:"a b" value:"c"} label:{name:"d\"\\\n" value:"e"} counter:{value:1
				exemplar:{label:{name:"f.g" value:"h"} value:1} created_timestamp:{seconds:2}}}`,
		`name:"plain" type:GAUGE metric:{gauge:{value:1}}`,
	}},
	"a label's value with everything in it": {body: "foo{a=\"# EOF } # {\\\\n\\n\\\"\x00é\"} 1\n",
		want: []string{`name:"foo" type:UNTYPED metric:{label:{name:"a" value:"# EOF } # {\\n\n\"\x00é"} untyped:{value:1}}`},
	},
}

func TestParseOpenMetrics(t *testing.T) {
	for name, test := range openMetricsAccepted {
		t.Run(name, func(t *testing.T) {
			families, err := parseOpenMetrics([]byte(test.body + "# EOF\n"))
			withoutEnd, _ := parseOpenMetrics([]byte(test.body))
			if len(withoutEnd) != len(families) {
				t.Errorf("without # EOF there are %d families, want %d", len(withoutEnd), len(families))
			}
			if err != nil {
				t.Fatal(err)
			}
			var want []*dto.MetricFamily
			for _, text := range test.want {
				f := new(dto.MetricFamily)
				if err := prototext.Unmarshal([]byte(text), f); err != nil {
					t.Fatal(err)
				}
				want = append(want, f)
			}
			compareFamilies(t, families, want)
		})
	}
}

// compareFamilies compares with families that are sorted by name.
func compareFamilies(t *testing.T, got map[string]*dto.MetricFamily, want []*dto.MetricFamily) {
	t.Helper()
	names := slices.Sorted(maps.Keys(got))
	for i := range max(len(names), len(want)) {
		switch {
		case i >= len(want):
			t.Errorf("got beside what is wanted\n%s", prototext.Format(got[names[i]]))
		case i >= len(names):
			t.Errorf("missing\n%s", prototext.Format(want[i]))
		case got[names[i]].GetName() != names[i] || !proto.Equal(got[names[i]], want[i]):
			t.Errorf("got %q\n%s\nwant\n%s", names[i], prototext.Format(got[names[i]]), prototext.Format(want[i]))
		}
	}
}

// TestParseOpenMetricsText takes the example of the specification: what text 0.0.4
// shows of it.
func TestParseOpenMetricsText(t *testing.T) {
	families, err := parseOpenMetrics([]byte(`# TYPE acme_http_router_request_seconds summary
# UNIT acme_http_router_request_seconds seconds
# HELP acme_http_router_request_seconds Latency though all of ACME's HTTP request router.
acme_http_router_request_seconds_sum{path="/api/v1",method="GET"} 9036.32
acme_http_router_request_seconds_count{path="/api/v1",method="GET"} 807283.0
acme_http_router_request_seconds_created{path="/api/v1",method="GET"} 1605281325.0
acme_http_router_request_seconds_sum{path="/api/v2",method="POST"} 479.3
acme_http_router_request_seconds_count{path="/api/v2",method="POST"} 34.0
acme_http_router_request_seconds_created{path="/api/v2",method="POST"} 1605281325.0
# TYPE go_goroutines gauge
# HELP go_goroutines Number of goroutines that currently exist.
go_goroutines 69
# TYPE process_cpu_seconds counter
# UNIT process_cpu_seconds seconds
# HELP process_cpu_seconds Total user and system CPU time spent in seconds.
process_cpu_seconds_total 4.20072246e+06
# TYPE queue gaugehistogram
queue_bucket{le="1.0"} 1
queue_bucket{le="+Inf"} 2
queue_gcount 2
queue_gsum 3
# EOF`))
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, name := range slices.Sorted(maps.Keys(families)) {
		if _, err := expfmt.MetricFamilyToText(&got, families[name]); err != nil {
			t.Fatal(err)
		}
	}
	want := `# HELP acme_http_router_request_seconds Latency though all of ACME's HTTP request router.
# TYPE acme_http_router_request_seconds summary
acme_http_router_request_seconds_sum{method="GET",path="/api/v1"} 9036.32
acme_http_router_request_seconds_count{method="GET",path="/api/v1"} 807283
acme_http_router_request_seconds_sum{method="POST",path="/api/v2"} 479.3
acme_http_router_request_seconds_count{method="POST",path="/api/v2"} 34
# HELP go_goroutines Number of goroutines that currently exist.
# TYPE go_goroutines gauge
go_goroutines 69
# HELP process_cpu_seconds_total Total user and system CPU time spent in seconds.
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 4.20072246e+06
# TYPE queue histogram
queue_bucket{le="1"} 1
queue_bucket{le="+Inf"} 2
queue_sum 3
queue_count 2
`
	if got.String() != want {
		t.Errorf("got\n%s\nwant\n%s", got.String(), want)
	}
}

// openMetricsRefused are whole bodies, and what the error tells of them.
var openMetricsRefused = []struct{ name, body, want string }{
	{"no line feed", "a 1", "the last line does not end with a line feed"},
	{"EOF behind a sample", "a 1 # EOF\n", "line 1: "},
	{"blank line behind EOF", "a 1\n# EOF\n\n", "line 2: "},
	{"text behind EOF", "a 1\n# EOF\nb 1\n", "line 2: unexpected data after # EOF"},
	{"EOF twice", "a 1\n# EOF\n# EOF\n", "line 2: unexpected data after # EOF"},
	{"blank line", "a 1\n\nb 1\n# EOF\n", "line 2: expected a valid start token"},
	{"CRLF", "a 1\r\n# EOF\n", "line 1: strconv.ParseFloat"},
	{"byte-order mark", "\ufeffa 1\n# EOF\n", "line 1: expected a valid start token"},
	{"comment", "# a 1\n# EOF\n", "line 1: expected a valid start token"},
	{"leading blank", " a 1\n# EOF\n", "line 1: expected a valid start token"},
	{"final blank", "a 1 \n# EOF\n", "line 1: the line does not end behind its value"},
	{"text behind a timestamp", "a 1 2 3\n# EOF\n", "line 1: expected next entry after timestamp"},
	{"value", "a one\n# EOF\n", `parsing "one"`},
	{"no value", "a\n# EOF\n", "line 1: expected value after metric"},
	{"value out of range", "a 1e400\n# EOF\n", "value out of range"},
	{"line too long", "a 1\n# HELP a " + strings.Repeat("x", maxOpenMetricsLine) + "\n# EOF\n", "line 2: it is longer than 1048576 bytes"},
	{"long label in front of a mistake", "a{b=\"" + strings.Repeat("x", 1<<19) + "\"} one\n# EOF\n", `line 1: strconv.ParseFloat: parsing "one"`},
	{"unclosed quotes", "{\"a\nb\"} 1\n# EOF\n", "line 1: expected label name"},
	{"unclosed quotes in metadata", "# TYPE \"a\nb\" gauge\n# EOF\n", "line 1: expected metric name after TYPE"},

	{"bare name between braces", "{a} 1\n# EOF\n", "line 1: expected equal"},
	{"no name", "{} 1\n# EOF\n", "line 1: metric name not set"},
	{"no name beside labels", "a 1\n{b=\"c\"} 1\n# EOF\n", "line 2: metric name not set"},
	{"two names", `a{"b"} 1` + "\n# EOF\n", "line 1: metric name already set"},
	{"empty name", `{""} 1` + "\n# EOF\n", `metric name "" is empty or not UTF-8`},
	{"empty name in metadata", `# TYPE "" gauge` + "\n# EOF\n", `metric name "" is empty or not UTF-8`},
	{"name not UTF-8", "{\"a\xff\"} 1\n# EOF\n", `metric name "a\xff" is empty or not UTF-8`},
	{"name of metadata not UTF-8", "# HELP \"a\xff\" text\n# EOF\n", `metric name "a\xff" is empty or not UTF-8`},
	{"HELP not UTF-8", "# HELP a \xff\n# EOF\n", "line 1: help text"},
	{"label value not UTF-8", "a{b=\"\xff\"} 1\n# EOF\n", "line 1: invalid UTF-8 label value"},
	{"label name not UTF-8", "a{\"b\xff\"=\"\"} 1\n# EOF\n", `metric "a": label name "b\xff" is empty or not UTF-8`},
	{"label name empty", "a{\"\"=\"b\"} 1\n# EOF\n", `metric "a": label name "" is empty or not UTF-8`},
	{"label twice", `a{b="1",c="2",b="3"} 1` + "\n# EOF\n", `metric "a": label "b" stands twice`},
	{"label twice, once in quotes", `a{b="1","b"="1"} 1` + "\n# EOF\n", `metric "a": label "b" stands twice`},
	{"label __name__", `a{__name__="b"} 1` + "\n# EOF\n", `label "__name__" stands twice`},

	{"unknown type", "# TYPE a untyped\n# EOF\n", `line 1: invalid metric type "untyped"`},
	{"no type", "# TYPE a\n# EOF\n", "line 1: expected text in TYPE"},
	{"TYPE twice", "# TYPE a gauge\n# TYPE a gauge\n# EOF\n", `line 2: metric "a": it has a TYPE already`},
	{"HELP twice", "# HELP a b\n# HELP a b\n# EOF\n", `line 2: metric "a": it has a HELP already`},
	{"UNIT twice", "# UNIT a_s s\n# UNIT a_s s\n# EOF\n", `line 2: metric "a_s": it has a UNIT already`},
	{"TYPE behind samples", "a 1\n# TYPE a gauge\n# EOF\n", `line 2: metric "a": TYPE must stand in front of the samples`},
	{"HELP behind samples", "# TYPE a gauge\na 1\n# HELP a b\n# EOF\n", `line 3: metric "a": HELP must stand in front of the samples`},
	{"UNIT behind samples", "a_s 1\n# UNIT a_s s\n# EOF\n", `line 2: metric "a_s": UNIT must stand in front of the samples`},
	{"UNIT not in the name", "# UNIT a s\n# EOF\n", `line 1: unit "s" not a suffix of metric "a"`},
	{"UNIT of an info", "# TYPE a_s info\n# UNIT a_s s\na_s_info 1\n# EOF\n", `line 4: metric "a_s": type info has no UNIT`},
	{"UNIT of a stateset", "# TYPE a_s stateset\n# UNIT a_s s\na_s{a_s=\"x\"} 1\nb 1\n# EOF\n", `line 4: metric "a_s": type stateset has no UNIT`},
	{"metadata of a family apart", "# HELP a b\n# HELP c d\n# TYPE a gauge\n# EOF\n", `line 3: metric "a": the name belongs to the family "a" above`},
	{"families interleaved", "# TYPE a gauge\na{b=\"1\"} 1\n# TYPE c gauge\nc 1\na{b=\"2\"} 1\n# EOF\n", `line 5: metric "a": the name belongs to the family "a" above`},
	{"histogram interleaved", "# TYPE a histogram\na_bucket{le=\"+Inf\"} 1\nb 1\na_sum 1\n# EOF\n", `line 4: metric "a_sum": the name belongs to the family "a" above`},
	{"samples and a counter of the name", "a_total 1\n# TYPE a counter\na_total{b=\"c\"} 1\n# EOF\n", `line 2: metric "a_total": the name belongs to the family "a_total" above`},
	{"counter and a gauge of its samples' name", "# TYPE a counter\n# TYPE a_created gauge\n# EOF\n", `line 2: metric "a_created": the name belongs to the family "a" above`},
	{"gauge and counter", "# TYPE a gauge\na 1\n# TYPE a counter\na_total 1\n# EOF\n", `line 3: metric "a": TYPE must stand in front of the samples`},

	{"counter without _total", "# TYPE a counter\na 1\n# EOF\n", `line 2: metric "a": the samples of the counter "a" are named a_total, a_created`},
	{"counter with _total in its own name", "# TYPE a_total counter\na_total 1\n# EOF\n", `line 2: metric "a_total": the samples of the counter "a_total" are named a_total_total`},
	{"counter with a bucket", "# TYPE a counter\na_bucket{le=\"1\"} 1\n# EOF\n", `metric "a_bucket": the samples of the counter "a"`},
	{"gauge with _total", "# TYPE a gauge\na_total 1\n# EOF\n", `metric "a_total": the samples of the gauge "a" are named a;`},
	{"info without _info", "# TYPE a info\na 1\n# EOF\n", `metric "a": the samples of the info "a" are named a_info;`},
	{"histogram without suffix", "# TYPE a histogram\na 1\n# EOF\n", `metric "a": the samples of the histogram "a"`},
	{"histogram with _gcount", "# TYPE a histogram\na_gcount 1\n# EOF\n", `metric "a_gcount": the samples of the histogram "a"`},
	{"gaugehistogram with _created", "# TYPE a gaugehistogram\na_created 1\n# EOF\n", `metric "a_created": the samples of the gaugehistogram "a"`},
	{"summary with _bucket", "# TYPE a summary\na_bucket{le=\"1\"} 1\n# EOF\n", `metric "a_bucket": the samples of the summary "a"`},
	{"stateset with _info", "# TYPE a stateset\na_info 1\n# EOF\n", `metric "a_info": the samples of the stateset "a"`},

	{"gauge twice", "# TYPE a gauge\na{b=\"1\",c=\"2\"} 1\na{c=\"2\",b=\"1\"} 1\n# EOF\n", `line 3: metric "a": the series {b="1",c="2"} stands above already`},
	{"gauge twice, apart", "# TYPE a gauge\na 1\na{b=\"1\"} 1\na 1\n# EOF\n", `line 4: metric "a": the series {} stands above already`},
	{"counter twice", "# TYPE a counter\na_total 1\na_created 1\na_total 1\n# EOF\n", `line 4: metric "a_total": the series {} stands above already`},
	{"created twice", "# TYPE a counter\na_total 1\na_created 1\na_created 1\n# EOF\n", `line 4: metric "a_created": the series {} stands above already`},
	{"unknown twice", "a 1\na 1\n# EOF\n", `line 2: metric "a": the series {} stands above already`},
	{"info twice", "# TYPE a info\na_info 1\na_info 1\n# EOF\n", `line 3: metric "a_info": the series {} stands above already`},
	{"sum twice", "# TYPE a summary\na_sum 1\na_sum 1\n# EOF\n", `line 3: metric "a_sum": the series {} stands above already`},
	{"count twice", "# TYPE a summary\na_count 1\na_count 1\n# EOF\n", `line 3: metric "a_count": the series {} stands above already`},
	{"gsum and sum", "# TYPE a gaugehistogram\na_gsum 1\na_sum 1\n# EOF\n", `line 3: metric "a_sum": the series {} stands above already`},
	{"gcount twice", "# TYPE a gaugehistogram\na_gcount 1\na_gcount 1\n# EOF\n", `line 3: metric "a_gcount": the series {} stands above already`},
	{"bucket twice", "# TYPE a histogram\na_bucket{le=\"1\"} 1\na_bucket{le=\"1.0\"} 1\n# EOF\n", `line 3: metric "a_bucket": the bucket le="1.0" stands behind le="1"`},
	{"quantile twice", "# TYPE a summary\na{quantile=\"0.5\"} 1\na{quantile=\"1\"} 1\na{quantile=\"0.50\"} 1\n# EOF\n", `line 5: metric "a": the series {} above has the quantile 0.5 twice`},
	{"series interleaved", "# TYPE a summary\na_count{b=\"1\"} 1\na_count{b=\"2\"} 1\na_sum{b=\"1\"} 1\n# EOF\n", `line 4: metric "a_sum": the series {b="1"} stands above already; its samples stand together`},

	{"NaN counter", "# TYPE a counter\na_total NaN\n# EOF\n", `metric "a_total": the counter is NaN`},
	{"negative counter", "# TYPE a counter\na_total -1\n# EOF\n", `metric "a_total": the counter is -1`},
	{"created alone", "# TYPE a counter\na_created{b=\"c\"} 1\n# EOF\n", `line 3: metric "a": the series {b="c"} above has no sample "a_total"`},
	{"created is NaN", "# TYPE a counter\na_total 1\na_created NaN\n# EOF\n", `metric "a_created": NaN is not a time`},
	{"created out of range", "# TYPE a counter\na_total 1\na_created 1e30\n# EOF\n", `metric "a_created": 1e+30 is not a time`},
	{"info with 2", "# TYPE a info\na_info 2\n# EOF\n", `metric "a_info": the info is 2, not 1`},
	{"state with 2", "# TYPE a stateset\na{a=\"b\"} 2\n# EOF\n", `metric "a": the state is 2, neither 0 nor 1`},
	{"stateset without states", "# TYPE a stateset\na 1\n# EOF\n", `metric "a": the state is missing: a label with the name "a"`},

	{"summary without quantile", "# TYPE a summary\na 1\n# EOF\n", `metric "a": label "quantile" is missing`},
	{"quantile no number", "# TYPE a summary\na{quantile=\"p99\"} 1\n# EOF\n", `metric "a": label "quantile" is not a number: "p99"`},
	{"quantile above 1", "# TYPE a summary\na{quantile=\"1.01\"} 1\n# EOF\n", `metric "a": the quantile 1.01 is not between 0 and 1`},
	{"quantile NaN", "# TYPE a summary\na{quantile=\"NaN\"} 1\n# EOF\n", `metric "a": the quantile NaN is not between 0 and 1`},
	{"quantile of a sum", "# TYPE a summary\na_sum{quantile=\"1\"} 1\n# EOF\n", `metric "a_sum": label "quantile" is not allowed here`},
	{"summary with a fractional count", "# TYPE a summary\na_count 1.5\n# EOF\n", `metric "a_count": the count 1.5 of a summary is not an integer`},
	{"summary with a negative count", "# TYPE a summary\na_count -1\n# EOF\n", `metric "a_count": -1 is not a count`},
	{"summary with a huge count", "# TYPE a summary\na_count 1e30\n# EOF\n", `metric "a_count": the count 1e+30 of a summary is not an integer`},

	{"bucket without le", "# TYPE a histogram\na_bucket 1\n# EOF\n", `metric "a_bucket": label "le" is missing`},
	{"bucket le no number", "# TYPE a histogram\na_bucket{le=\"x\"} 1\n# EOF\n", `metric "a_bucket": label "le" is not a number: "x"`},
	{"bucket le NaN", "# TYPE a histogram\na_bucket{le=\"NaN\"} 1\n# EOF\n", `metric "a_bucket": the bound of a bucket is NaN`},
	{"le of a sum", "# TYPE a histogram\na_sum{le=\"1\"} 1\n# EOF\n", `metric "a_sum": label "le" is not allowed here`},
	{"buckets descend", "# TYPE a histogram\na_bucket{le=\"2\"} 1\na_bucket{le=\"1\"} 1\n# EOF\n", `metric "a_bucket": the bucket le="1" stands behind le="2"`},
	{"buckets not cumulative", "# TYPE a histogram\na_bucket{le=\"1\"} 2\na_bucket{le=\"+Inf\"} 1\n# EOF\n", `metric "a_bucket": the bucket le="+Inf" has less than the one in front of it`},
	{"negative bucket", "# TYPE a histogram\na_bucket{le=\"1\"} -1\n# EOF\n", `metric "a_bucket": -1 is not a count`},
	{"infinite bucket", "# TYPE a histogram\na_bucket{le=\"1\"} +Inf\n# EOF\n", `metric "a_bucket": +Inf is not a count`},
	{"NaN in count", "# TYPE a histogram\na_count NaN\n# EOF\n", `metric "a_count": NaN is not a count`},
	{"no last bucket", "# TYPE a histogram\na_bucket{le=\"1\",b=\"1\"} 1\na_bucket{le=\"1\",b=\"2\"} 1\n# EOF\n", `line 3: metric "a_bucket": the series {b="1"} above has no bucket le="+Inf"`},
	{"no bucket", "# TYPE a gaugehistogram\na_gsum 1\na_gcount 1\nb 1\n# EOF\n", `line 4: metric "a": the series {} above has no bucket le="+Inf"`},
	{"other count than in the buckets", "# TYPE a histogram\na_bucket{le=\"+Inf\"} 1\na_sum 1\na_count 2\n# EOF\n", `line 5: metric "a": the series {} above has the count 2, but 1 in the bucket le="+Inf"`},
	{"sum without count", "# TYPE a histogram\na_bucket{le=\"+Inf\"} 1\na_sum 1\n# EOF\n", `metric "a": the series {} above has a sum, but no count`},

	{"exemplar of a gauge", "# TYPE a gauge\na 1 # {} 1\n# EOF\n", `metric "a": only counters and buckets can have an exemplar`},
	{"exemplar of a sum", "# TYPE a histogram\na_sum 1 # {} 1\n# EOF\n", `metric "a_sum": only counters and buckets can have an exemplar`},
	{"exemplar of a creation", "# TYPE a counter\na_created 1 # {} 1\n# EOF\n", `metric "a_created": only counters and buckets can have an exemplar`},
	{"exemplar too long", "# TYPE a counter\na_total 1 # {a=\"" + strings.Repeat("é", 128) + "\"} 1\n# EOF\n", `metric "a_total": the labels of the exemplar have more than 128 characters`},
	{"exemplar without value", "# TYPE a counter\na_total 1 # {a=\"b\"}\n# EOF\n", "line 2: expected value after exemplar labels"},
	{"exemplar with a name alone", "# TYPE a counter\na_total 1 # {\"a\"} 1\n# EOF\n", "line 2: expected label name"},
	{"exemplar with a label twice", "# TYPE a counter\na_total 1 # {a=\"1\",\"a\"=\"1\"} 1\n# EOF\n", `metric "a_total": label "a" stands twice in the exemplar`},
	{"exemplar label name not UTF-8", "# TYPE a counter\na_total 1 # {\"a\xff\"=\"1\"} 1\n# EOF\n", `metric "a_total": label name "a\xff" of the exemplar is empty or not UTF-8`},
	{"exemplar out of time", "# TYPE a counter\na_total 1 # {} 1 1e30\n# EOF\n", `metric "a_total": 1e+30 is not a time`},
	{"text behind an exemplar", "# TYPE a counter\na_total 1 # {} 1 1 1\n# EOF\n", "line 2: expected next entry after exemplar timestamp"},
}

func TestParseOpenMetricsErrors(t *testing.T) {
	for _, test := range openMetricsRefused {
		t.Run(test.name, func(t *testing.T) {
			families, err := parseOpenMetrics([]byte(test.body))
			if err == nil {
				t.Fatalf("got %v, want an error with %s", families, test.want)
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %s, want %s", err, test.want)
			}
			if len(err.Error()) > 2000 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

// TestParseOpenMetricsKeepsNothing overwrites the body, as one does that is read
// into a buffer that is used again.
func TestParseOpenMetricsKeepsNothing(t *testing.T) {
	body := []byte(openMetricsAccepted["counter"].body + "# EOF\n")
	families, err := parseOpenMetrics(body)
	if err != nil {
		t.Fatal(err)
	}
	want := proto.CloneOf(families["foo_total"])
	for i := range body {
		body[i] = 'x'
	}
	compareFamilies(t, families, []*dto.MetricFamily{want})
}

// TestOpenMetricsRoundTrip reads what expfmt's encoder writes.
func TestOpenMetricsRoundTrip(t *testing.T) {
	at := timestamppb.New(time.Date(2031, 5, 6, 7, 8, 9, 123456000, time.UTC))
	label := func(value string) []*dto.LabelPair {
		return []*dto.LabelPair{{Name: proto.String("a.b"), Value: &value}, {Name: proto.String("c"), Value: proto.String("\\\n\"é")}}
	}
	example := &dto.Exemplar{Label: label("trace"), Value: proto.Float64(0.1), Timestamp: at}
	histogram := &dto.Histogram{
		SampleCount: proto.Uint64(7), SampleSum: proto.Float64(-1.5),
		Bucket: []*dto.Bucket{
			{UpperBound: proto.Float64(-1), CumulativeCount: proto.Uint64(0)},
			{UpperBound: proto.Float64(0.25), CumulativeCount: proto.Uint64(6), Exemplar: example},
			{UpperBound: proto.Float64(1e300), CumulativeCount: proto.Uint64(7), Exemplar: &dto.Exemplar{Label: label("other"), Value: proto.Float64(1)}},
			{UpperBound: proto.Float64(math.Inf(1)), CumulativeCount: proto.Uint64(7)},
		},
	}
	created := proto.CloneOf(histogram)
	created.CreatedTimestamp = at
	want := []*dto.MetricFamily{
		{Name: proto.String("counter_seconds_total"), Help: proto.String("text\n\"\\"), Unit: proto.String("seconds"), Type: dto.MetricType_COUNTER.Enum(), Metric: []*dto.Metric{
			{Label: label("1"), Counter: &dto.Counter{Value: proto.Float64(1e100), Exemplar: example, CreatedTimestamp: at}},
			{Label: label("2"), Counter: &dto.Counter{Value: proto.Float64(0)}},
		}},
		{Name: proto.String("counter.utf8 é_total"), Type: dto.MetricType_COUNTER.Enum(), Metric: []*dto.Metric{
			{Counter: &dto.Counter{Value: proto.Float64(1), CreatedTimestamp: at}},
		}},
		{Name: proto.String("gauge"), Help: proto.String("text"), Type: dto.MetricType_GAUGE.Enum(), Metric: []*dto.Metric{
			{Label: label("1"), Gauge: &dto.Gauge{Value: proto.Float64(math.NaN())}},
			{Label: label("2"), Gauge: &dto.Gauge{Value: proto.Float64(math.Inf(-1))}, TimestampMs: proto.Int64(1234567890125)},
		}},
		{Name: proto.String("gaugehistogram"), Type: dto.MetricType_GAUGE_HISTOGRAM.Enum(), Metric: []*dto.Metric{
			{Label: label("1"), Histogram: histogram},
		}},
		{Name: proto.String("histogram"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{
			{Label: label("1"), Histogram: created},
			{Label: label("2"), Histogram: histogram},
		}},
		{Name: proto.String("summary"), Type: dto.MetricType_SUMMARY.Enum(), Metric: []*dto.Metric{
			{Label: label("1"), Summary: &dto.Summary{
				SampleCount: proto.Uint64(1 << 53), SampleSum: proto.Float64(1.5), CreatedTimestamp: at,
				Quantile: []*dto.Quantile{{Quantile: proto.Float64(0.5), Value: proto.Float64(1)}, {Quantile: proto.Float64(0.999), Value: proto.Float64(math.NaN())}},
			}},
			{Label: label("2"), Summary: &dto.Summary{SampleCount: proto.Uint64(0), SampleSum: proto.Float64(0)}},
		}},
		{Name: proto.String("untyped"), Type: dto.MetricType_UNTYPED.Enum(), Metric: []*dto.Metric{{Untyped: &dto.Untyped{Value: proto.Float64(4)}}}},
	}
	slices.SortFunc(want, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	var body bytes.Buffer
	for _, f := range want {
		if _, err := expfmt.MetricFamilyToOpenMetrics(&body, f, expfmt.WithCreatedLines()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := expfmt.FinalizeOpenMetrics(&body); err != nil {
		t.Fatal(err)
	}
	got, err := parseOpenMetrics(body.Bytes())
	if err != nil {
		t.Fatalf("%v in\n%s", err, body.Bytes())
	}
	compareFamilies(t, got, want)
}

// FuzzParseOpenMetrics wants no panic, and of what is read that text 0.0.4 can
// carry it: with as many series, and as many lines, as were read.
func FuzzParseOpenMetrics(f *testing.F) {
	for _, test := range openMetricsAccepted {
		f.Add([]byte(test.body + "# EOF\n"))
	}
	for _, test := range openMetricsRefused {
		if len(test.body) < 1000 {
			f.Add([]byte(test.body))
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		families, err := parseOpenMetrics(body)
		if err != nil {
			return
		}
		for name, family := range families {
			if name != family.GetName() {
				t.Errorf("%q is stored as %q", family.GetName(), name)
			}
			var text bytes.Buffer
			if _, err := expfmt.MetricFamilyToText(&text, family); err != nil {
				t.Fatalf("%q: %v", name, err)
			}
			parser := expfmt.NewTextParser(model.UTF8Validation)
			again, err := parser.TextToMetricFamilies(bytes.NewReader(text.Bytes()))
			if err != nil {
				t.Fatalf("%v in\n%s", err, text.Bytes())
			}
			if len(again) != 1 || len(again[name].GetMetric()) != len(family.Metric) {
				t.Fatalf("got %v from\n%s", again, text.Bytes())
			}
		}
	})
}
