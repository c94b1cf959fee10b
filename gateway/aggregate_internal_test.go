package gateway

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
)

func TestParseAggregation(t *testing.T) {
	for _, c := range []struct{ query, gauge, err string }{
		{"", "none", ""},
		{"ttl=1h", "none", ""},
		{"aggregate=sum", "last", ""},
		{"aggregate=sum&gauge=last", "last", ""},
		{"aggregate=sum&gauge=sum", "sum", ""},
		{"gauge=min&aggregate=sum", "min", ""},
		{"aggregate=sum&gauge=max", "max", ""},
		{"aggregate=avg", "", `aggregate="avg" is not known; write aggregate=sum`},
		{"aggregate=", "", `aggregate="" is not known; write aggregate=sum`},
		{"aggregate=sum&aggregate=avg", "", `aggregate="sum,avg" is not known; write aggregate=sum`},
		{"aggregate=sum&gauge=avg", "", `gauge="avg" is not known; write gauge=last, gauge=sum, gauge=min or gauge=max`},
		{"aggregate=sum&gauge=", "", `gauge="" is not known`},
		{"aggregate=sum&gauge=min&gauge=max", "", `gauge="min,max" is not known`},
		{"gauge=sum", "", "write aggregate=sum too"},
	} {
		query, err := url.ParseQuery(c.query)
		if err != nil {
			t.Fatal(err)
		}
		a, err := parseAggregation(query)
		gauge := ""
		if err == nil {
			gauge = cmp.Or(a, &aggregation{gauge: "none"}).gauge
		}
		if gauge != c.gauge || c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: got %q, error %v; want %q, error %q", c.query, gauge, err, c.gauge, c.err)
		}
	}
}

// aggregate pushes families one after the other, each time through the stored form,
// and returns what is stored in the end.
func aggregate(t *testing.T, gauge string, pushes ...*dto.MetricFamily) (*dto.MetricFamily, error) {
	t.Helper()
	var old *dto.MetricFamily
	for _, pushed := range pushes {
		var err error
		if _, err = stored(pushed); err != nil {
			return nil, err
		}
		before := proto.Clone(old)
		merged, err := (&aggregation{gauge}).merge(old, pushed)
		if err != nil {
			return nil, err
		}
		merged, err = stored(merged)
		if err != nil {
			return nil, err
		}
		if !proto.Equal(before, old) {
			t.Fatalf("the stored family changed from\n%v\nto\n%v", before, old)
		}
		old = merged
	}
	return old, nil
}

// stored prepares a family of the metric m and returns it as it is read from the
// image of a group.
func stored(f *dto.MetricFamily) (*dto.MetricFamily, error) {
	p, err := prepareFamily(nil, Key(nil).forced(), f, 0)
	if err != nil {
		return nil, err
	}
	im := newImage([]prepared{p})
	return im.block(0).decode()
}

// parseSamples reads samples of the metric m, one a line.
func parseSamples(t *testing.T, kind, samples string) *dto.MetricFamily {
	t.Helper()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader("# TYPE m " + kind + "\n" + trimLines(samples)))
	if err != nil {
		t.Fatal(err)
	}
	return families["m"]
}

// trimLines removes the indentation of the tables.
func trimLines(text string) string {
	var out strings.Builder
	for line := range strings.Lines(text) {
		out.WriteString(strings.TrimSpace(line) + "\n")
	}
	return out.String()
}

// formatSamples is the reverse of parseSamples, without the label that forceLabels
// adds.
func formatSamples(t *testing.T, f *dto.MetricFamily) string {
	t.Helper()
	var text strings.Builder
	if _, err := expfmt.MetricFamilyToText(&text, f); err != nil {
		t.Fatal(err)
	}
	_, samples, _ := strings.Cut(text.String(), "\n")
	return strings.NewReplacer(`{instance=""}`, "", `instance="",`, "", `,instance=""`, "").Replace(samples)
}

func TestAggregateText(t *testing.T) {
	for _, c := range []struct {
		name, kind, gauge string
		pushes            []string
		want, err         string
	}{
		{name: "a counter is summed", kind: "counter", pushes: []string{`m 1`, `m 2.5`, `m 3`}, want: `m 6.5`},
		{name: "a counter may fall", kind: "counter", pushes: []string{`m 1`, `m -3`}, want: `m -2`},
		{name: "NaN sticks to a counter", kind: "counter", pushes: []string{`m 1`, `m NaN`, `m 3`}, want: `m NaN`},
		{name: "an infinite counter", kind: "counter", pushes: []string{`m +Inf`, `m -Inf`}, want: `m NaN`},
		{name: "untyped is summed", kind: "untyped", pushes: []string{`m 1`, `m 2`}, want: `m 3`},
		{name: "NaN sticks to untyped", kind: "untyped", pushes: []string{`m NaN`, `m 2`}, want: `m NaN`},
		{
			name: "union of series, in order", kind: "counter",
			pushes: []string{
				`m{b="2"} 1
				 m{a="9",b="1"} 2
				 m{b="1"} 3`,
				`m 4
				 m{b="2"} 5
				 m{c="1"} 6
				 m{a="1",b="1",c="1"} 7`,
			},
			want: `m 4
				m{b="1"} 3
				m{c="1"} 6
				m{b="2"} 6
				m{a="9",b="1"} 2
				m{a="1",b="1",c="1"} 7`,
		},
		{name: "equal values of other labels stay apart", kind: "counter", pushes: []string{`m{a="1"} 1`, `m{b="1"} 2`}, want: `m{a="1"} 1
			m{b="1"} 2`},
		{name: "the same series twice in a push", kind: "counter", pushes: []string{`m 1`, `m 2
			m 3`}, err: `metric "m": the labels {instance=""} were already seen`},

		{name: "gauge last", kind: "gauge", gauge: "last", pushes: []string{`m 3`, `m 5`, `m 4`}, want: `m 4`},
		{name: "gauge last NaN", kind: "gauge", gauge: "last", pushes: []string{`m NaN`, `m 5`}, want: `m 5`},
		{name: "gauge sum", kind: "gauge", gauge: "sum", pushes: []string{`m 3`, `m 5`, `m -4`}, want: `m 4`},
		{name: "gauge sum NaN", kind: "gauge", gauge: "sum", pushes: []string{`m 3`, `m NaN`, `m 4`}, want: `m NaN`},
		{name: "gauge min", kind: "gauge", gauge: "min", pushes: []string{`m 3`, `m 2`, `m 4`}, want: `m 2`},
		{name: "gauge min NaN", kind: "gauge", gauge: "min", pushes: []string{`m NaN`, `m 2`}, want: `m NaN`},
		{name: "gauge max", kind: "gauge", gauge: "max", pushes: []string{`m 3`, `m 5`, `m 4`}, want: `m 5`},
		{name: "gauge max NaN", kind: "gauge", gauge: "max", pushes: []string{`m 3`, `m NaN`, `m +Inf`}, want: `m NaN`},
		{name: "gauge is for gauges only", kind: "counter", gauge: "max", pushes: []string{`m 3`, `m 5`}, want: `m 8`},

		{name: "a first summary keeps its quantiles", kind: "summary", pushes: []string{`m{quantile="0.5"} 7
			m_sum 10
			m_count 2`}, want: `m{quantile="0.5"} 7
			m_sum 10
			m_count 2`},
		{
			name: "quantiles are dropped for good", kind: "summary",
			pushes: []string{
				`m{quantile="0.5"} 7
				 m_sum 10
				 m_count 2`,
				`m_sum 1
				 m_count 1`,
				`m{quantile="0.5"} 9
				 m_sum 9
				 m_count 1`,
			},
			want: `m_sum 20
				m_count 4`,
		},
		{
			name: "quantiles of other series stay", kind: "summary",
			pushes: []string{
				`m{quantile="0.5"} 7
				 m_sum 10
				 m_count 2`,
				`m{a="1",quantile="0.5"} 3
				 m_sum{a="1"} 3
				 m_count{a="1"} 1`,
			},
			want: `m{quantile="0.5"} 7
				m_sum 10
				m_count 2
				m{a="1",quantile="0.5"} 3
				m_sum{a="1"} 3
				m_count{a="1"} 1`,
		},
		{name: "a summary without sum and count", kind: "summary", pushes: []string{`m_sum 10`, `m_count 1`, `m{quantile="0.5"} 7`}, want: `m_sum 10
			m_count 1`},
		{name: "a count of a summary saturates", kind: "summary", pushes: []string{`m_count 18446744073709549568`, `m_count 18446744073709549568`}, want: `m_sum 0
			m_count 1.8446744073709552e+19`},
		{name: "NaN sticks to a sum", kind: "summary", pushes: []string{`m_sum NaN`, `m_sum 1`}, want: `m_sum NaN
			m_count 0`},

		{
			name: "equal bounds", kind: "histogram",
			pushes: []string{
				`m_bucket{le="1"} 1
				 m_bucket{le="2"} 3
				 m_bucket{le="+Inf"} 4
				 m_sum 10
				 m_count 4`,
				`m_bucket{le="1"} 10
				 m_bucket{le="2"} 20
				 m_bucket{le="+Inf"} 30
				 m_sum 0.5
				 m_count 30`,
			},
			want: `m_bucket{le="1"} 11
				m_bucket{le="2"} 23
				m_bucket{le="+Inf"} 34
				m_sum 10.5
				m_count 34`,
		},
		{
			name: "a union that would fall if unequal bounds were kept", kind: "histogram",
			pushes: []string{
				`m_bucket{le="1"} 10
				 m_bucket{le="+Inf"} 10
				 m_count 10`,
				`m_bucket{le="2"} 1
				 m_bucket{le="+Inf"} 1
				 m_count 1`,
			},
			want: `m_bucket{le="1"} 10
				m_bucket{le="2"} 11
				m_bucket{le="+Inf"} 11
				m_sum 0
				m_count 11`,
		},
		{
			name: "bounds of three pushes", kind: "histogram",
			pushes: []string{
				`m_bucket{le="2"} 1
				 m_bucket{le="4"} 2
				 m_bucket{le="+Inf"} 3
				 m_count 3`,
				`m_bucket{le="1"} 10
				 m_bucket{le="3"} 20
				 m_bucket{le="+Inf"} 30
				 m_count 30`,
				`m_bucket{le="-1"} 100
				 m_bucket{le="+Inf"} 300
				 m_count 300`,
			},
			want: `m_bucket{le="-1"} 100
				m_bucket{le="1"} 110
				m_bucket{le="2"} 111
				m_bucket{le="3"} 121
				m_bucket{le="4"} 122
				m_bucket{le="+Inf"} 333
				m_sum 0
				m_count 333`,
		},
		{
			name: "+Inf from the count", kind: "histogram",
			pushes: []string{
				`m_bucket{le="1"} 1
				 m_count 3`,
				`m_bucket{le="1"} 1
				 m_bucket{le="+Inf"} 4
				 m_count 4`,
			},
			want: `m_bucket{le="1"} 2
				m_bucket{le="+Inf"} 7
				m_sum 0
				m_count 7`,
		},
		{
			name: "+Inf from both counts", kind: "histogram",
			pushes: []string{
				`m_bucket{le="1"} 1
				 m_count 3`,
				`m_bucket{le="2"} 1
				 m_count 4`,
			},
			want: `m_bucket{le="1"} 1
				m_bucket{le="2"} 2
				m_bucket{le="+Inf"} 7
				m_sum 0
				m_count 7`,
		},
		{
			name: "without sum and count", kind: "histogram",
			pushes: []string{`m_bucket{le="+Inf"} 1`, `m_bucket{le="+Inf"} 2
				m_sum 3
				m_count 2`, `m_bucket{le="+Inf"} 4`},
			want: `m_bucket{le="+Inf"} 7
				m_sum 3
				m_count 2`,
		},
		{
			name: "without buckets", kind: "histogram",
			pushes: []string{`m_sum 3
				m_count 2`, `m_sum 5
				m_count 1`},
			want: `m_bucket{le="+Inf"} 3
				m_sum 8
				m_count 3`,
		},
		{
			name: "unsorted and duplicate bounds", kind: "histogram",
			pushes: []string{
				`m_bucket{le="+Inf"} 5
				 m_bucket{le="2"} 4
				 m_bucket{le="1"} 2
				 m_bucket{le="2"} 3
				 m_bucket{le="NaN"} 9
				 m_count 5`,
				`m_bucket{le="2.0"} 1
				 m_bucket{le="1"} 1
				 m_bucket{le="1"} 0
				 m_count 1`,
			},
			want: `m_bucket{le="1"} 3
				m_bucket{le="2"} 5
				m_bucket{le="+Inf"} 6
				m_sum 0
				m_count 6`,
		},
		{
			name: "a float histogram makes the sum float", kind: "histogram",
			pushes: []string{
				`m_bucket{le="1"} 1
				 m_bucket{le="+Inf"} 2
				 m_count 2`,
				`m_bucket{le="1"} 0.5
				 m_bucket{le="2"} 1
				 m_bucket{le="+Inf"} 1.25
				 m_count 1.25`,
			},
			want: `m_bucket{le="1"} 1.5
				m_bucket{le="2"} 2
				m_bucket{le="+Inf"} 3.25
				m_sum 0
				m_count 3.25`,
		},
		{
			name: "NaN sticks to a float histogram", kind: "histogram",
			pushes: []string{
				`m_bucket{le="1"} NaN
				 m_bucket{le="+Inf"} NaN
				 m_sum NaN
				 m_count NaN`,
				`m_bucket{le="1"} 1
				 m_bucket{le="+Inf"} 1
				 m_sum 1
				 m_count 1`,
			},
			want: `m_bucket{le="1"} NaN
				m_bucket{le="+Inf"} NaN
				m_sum NaN
				m_count NaN`,
		},
		{
			name: "a gauge histogram is summed", kind: "gaugehistogram", gauge: "sum",
			pushes: []string{
				`m_bucket{le="1"} 10
				 m_count 10`,
				`m_bucket{le="2"} 1
				 m_count 1`,
			},
			want: `m_bucket{le="1"} 10
				m_bucket{le="2"} 11
				m_bucket{le="+Inf"} 11
				m_sum 0
				m_count 11`,
		},
		{
			name: "a gauge histogram is replaced", kind: "gaugehistogram", gauge: "last",
			pushes: []string{
				`m_bucket{le="1"} 10
				 m_count 10`,
				`m_bucket{le="2"} 1
				 m_count 1`,
			},
			want: `m_bucket{le="2"} 1
				m_bucket{le="+Inf"} 1
				m_sum 0
				m_count 1`,
		},
		{name: "a gauge histogram has no min", kind: "gaugehistogram", gauge: "min", pushes: []string{`m_count 1`}, err: `metric "m": a gauge histogram has no min; write gauge=last or gauge=sum`},
		{name: "a gauge histogram has no max", kind: "gaugehistogram", gauge: "max", pushes: []string{`m_count 1`}, err: `metric "m": a gauge histogram has no max; write gauge=last or gauge=sum`},
	} {
		t.Run(c.name, func(t *testing.T) {
			var families []*dto.MetricFamily
			for _, samples := range c.pushes {
				families = append(families, parseSamples(t, c.kind, samples))
			}
			got, err := aggregate(t, cmp.Or(c.gauge, "last"), families...)
			if c.err != "" {
				if err == nil || err.Error() != c.err {
					t.Fatalf("error %v, want %s", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got, want := formatSamples(t, got), trimLines(c.want); got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// TestAggregateMessages has what the text format lacks. A push is a message of
// prototext, the type of the family in front.
func TestAggregateMessages(t *testing.T) {
	for _, c := range []struct {
		name, gauge string
		pushes      []string // of a MetricFamily, but for its name
		want, err   string
	}{
		{
			name:   "HELP and unit are those of the first push",
			pushes: []string{`type:COUNTER help:"a" unit:"s" metric{counter{value:1}}`, `type:COUNTER help:"b" unit:"m" metric{counter{value:1}}`},
			want:   `type:COUNTER help:"a" unit:"s" metric{counter{value:2}}`,
		},
		{
			name:   "HELP of the first push, though it had none",
			pushes: []string{`type:COUNTER metric{counter{value:1}}`, `type:COUNTER help:"b" metric{counter{value:1}}`},
			want:   `type:COUNTER metric{counter{value:2}}`,
		},
		{
			name:   "a push without series",
			pushes: []string{`type:COUNTER metric{counter{value:1}}`, `type:COUNTER`},
			want:   `type:COUNTER metric{counter{value:1}}`,
		},
		{
			name:   "another type",
			pushes: []string{`type:COUNTER metric{counter{value:1}}`, `type:GAUGE metric{gauge{value:1}}`},
			err:    `metric "m" has type gauge, should have counter as in the group`,
		},
		{
			name:   "another type, untyped, without series",
			pushes: []string{`type:HISTOGRAM metric{histogram{}}`, `type:UNTYPED`},
			err:    `metric "m" has type untyped, should have histogram as in the group`,
		},
		{
			name: "the earliest creation",
			pushes: []string{
				`type:COUNTER metric{counter{value:1 created_timestamp{seconds:5 nanos:7}}}`,
				`type:COUNTER metric{counter{value:1 created_timestamp{seconds:5 nanos:6}}}`,
				`type:COUNTER metric{counter{value:1 created_timestamp{seconds:6 nanos:1}}}`,
			},
			want: `type:COUNTER metric{counter{value:3 created_timestamp{seconds:5 nanos:6}}}`,
		},
		{
			name: "a creation that one push knows",
			pushes: []string{
				`type:SUMMARY metric{summary{}}`,
				`type:SUMMARY metric{summary{created_timestamp{seconds:5}}}`,
				`type:SUMMARY metric{summary{}}`,
			},
			want: `type:SUMMARY metric{summary{sample_count:0 sample_sum:0 created_timestamp{seconds:5}}}`,
		},
		{
			name: "counts saturate",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:18446744073709551615 bucket{upper_bound:1 cumulative_count:18446744073709551614}}}`,
				`type:HISTOGRAM metric{histogram{sample_count:3 bucket{upper_bound:1 cumulative_count:1}}}`,
				`type:HISTOGRAM metric{histogram{sample_count:3 bucket{upper_bound:1 cumulative_count:1}}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:18446744073709551615 sample_sum:0 bucket{upper_bound:1 cumulative_count:18446744073709551615}}}`,
		},
		{
			name: "integers stay exact",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:9007199254740993 bucket{upper_bound:1 cumulative_count:9007199254740993}}}`,
				`type:HISTOGRAM metric{histogram{sample_count:2 bucket{upper_bound:1 cumulative_count:2}}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:9007199254740995 sample_sum:0 bucket{upper_bound:1 cumulative_count:9007199254740995}}}`,
		},
		{
			name: "a sum of floats stays float",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count_float:0.5 bucket{upper_bound:1 cumulative_count_float:0.5}}}`,
				`type:HISTOGRAM metric{histogram{sample_count_float:0.5 bucket{upper_bound:1 cumulative_count_float:0.5}}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count_float:1 sample_sum:0 bucket{upper_bound:1 cumulative_count_float:1}}}`,
		},
		{
			name: "a float count of 0 does not hide the integer",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:5 sample_count_float:0 bucket{upper_bound:1 cumulative_count:5 cumulative_count_float:0}}}`,
				`type:HISTOGRAM metric{histogram{sample_count:1 bucket{upper_bound:1 cumulative_count:1}}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:6 sample_sum:0 bucket{upper_bound:1 cumulative_count:6}}}`,
		},
		{
			name: "a bound of NaN is left out",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:1 bucket{upper_bound:nan cumulative_count:1}}}`,
				`type:HISTOGRAM metric{histogram{sample_count:1 bucket{upper_bound:1 cumulative_count:1} bucket{upper_bound:nan cumulative_count:1}}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:2 sample_sum:0 bucket{upper_bound:1 cumulative_count:1}}}`,
		},
		{
			name: "exemplars: the pushed one, else the stored one",
			pushes: []string{
				`type:COUNTER metric{counter{value:1 exemplar{value:1}}} metric{label{name:"a" value:"1"} counter{value:1 exemplar{value:2}}}`,
				`type:COUNTER metric{counter{value:1 exemplar{value:3}}} metric{label{name:"a" value:"1"} counter{value:1}}`,
			},
			want: `type:COUNTER metric{counter{value:2 exemplar{value:3}}} metric{label{name:"a" value:"1"} counter{value:2 exemplar{value:2}}}`,
		},
		{
			name: "exemplars of buckets",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:4 bucket{upper_bound:1 cumulative_count:1 exemplar{value:0.1}} bucket{upper_bound:2 cumulative_count:2 exemplar{value:1.1}}}}`,
				`type:HISTOGRAM metric{histogram{sample_count:4 bucket{upper_bound:1 cumulative_count:1 exemplar{value:0.2}} bucket{upper_bound:2 cumulative_count:2} bucket{upper_bound:3 cumulative_count:3}
					bucket{upper_bound:4 cumulative_count:4 exemplar{value:3.2}}}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:8 sample_sum:0 bucket{upper_bound:1 cumulative_count:2 exemplar{value:0.2}} bucket{upper_bound:2 cumulative_count:4 exemplar{value:1.1}}
				bucket{upper_bound:3 cumulative_count:5} bucket{upper_bound:4 cumulative_count:6 exemplar{value:3.2}}}}`,
		},
		{
			// Counts by bucket: -: 1 at -2; +: 1,2 at 0, 4 at 3. Then -: 5 at -2; +: 3 at 1, 1 at 2.
			name: "native buckets",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:9 sample_sum:3 schema:1 zero_threshold:0.001 zero_count:1
					negative_span{offset:-2 length:1} negative_delta:1 positive_span{offset:0 length:2} positive_span{offset:1 length:1} positive_delta:[1,1,2]}}`,
				`type:HISTOGRAM metric{histogram{sample_count:11 sample_sum:4 schema:1 zero_threshold:0.001 zero_count:2
					negative_span{offset:-2 length:1} negative_delta:5 positive_span{offset:1 length:2} positive_delta:[3,-2]}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:20 sample_sum:7 schema:1 zero_threshold:0.001 zero_count:3
				negative_span{offset:-2 length:1} negative_delta:6 positive_span{offset:0 length:4} positive_delta:[1,4,-4,3]}}`,
		},
		{
			// Buckets 1 and 2 of schema 1 are bucket 1 of schema 0, buckets 3 and 4 bucket 2.
			name: "native buckets of another schema",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:10 schema:1 zero_threshold:0.001 positive_span{offset:1 length:4} positive_delta:[1,1,1,1]}}`,
				`type:HISTOGRAM metric{histogram{sample_count:9 schema:0 zero_threshold:0.001 positive_span{offset:2 length:1} positive_delta:9}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:19 sample_sum:0 schema:0 zero_threshold:0.001 zero_count:0 positive_span{offset:1 length:2} positive_delta:[3,13]}}`,
		},
		{
			// Bucket 0 of schema 0 ends at 1, bucket -1 at 0.5.
			name: "a wider zero bucket",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:7 schema:0 zero_threshold:0.25 zero_count:1 positive_span{offset:-1 length:2} positive_delta:[2,2]}}`,
				`type:HISTOGRAM metric{histogram{sample_count:5 schema:0 zero_threshold:0.5 zero_count:5 positive_span{}}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:12 sample_sum:0 schema:0 zero_threshold:0.5 zero_count:8 positive_span{offset:0 length:1} positive_delta:4}}`,
		},
		{
			// Buckets 5 and 6 of schema 0, up to 32 and 64, are bucket 2 of schema -2, up to
			// 256, which has to go into the zero bucket whole.
			name: "a wider zero bucket of another schema",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:2 schema:-2 zero_threshold:40 zero_count:2}}`,
				`type:HISTOGRAM metric{histogram{sample_count:7 schema:0 zero_threshold:0.25 positive_span{offset:5 length:2} positive_span{offset:3 length:1} positive_delta:[1,1,2]}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:9 sample_sum:0 schema:-2 zero_threshold:256 zero_count:5 positive_span{offset:3 length:1} positive_delta:4}}`,
		},
		{
			// Buckets -1 and 0 of schema 0 end at 0.5 and 1.
			name: "observations in buckets inside the zero bucket",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:7 schema:0 zero_threshold:0.5 positive_span{offset:-1 length:2} positive_delta:[1,1] negative_span{offset:-1 length:1} negative_delta:4}}`,
				`type:HISTOGRAM metric{histogram{sample_count:7 schema:0 zero_threshold:0.5 positive_span{offset:-1 length:2} positive_delta:[1,1] negative_span{offset:-1 length:1} negative_delta:4}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:14 sample_sum:0 schema:0 zero_threshold:0.5 zero_count:10 positive_span{offset:0 length:1} positive_delta:4}}`,
		},
		{
			name: "native without observations",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{schema:3 positive_span{offset:0 length:0}}}`,
				`type:HISTOGRAM metric{histogram{schema:3 positive_span{offset:0 length:0}}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:0 sample_sum:0 schema:3 zero_threshold:0 zero_count:0 positive_span{offset:0 length:0}}}`,
		},
		{
			name: "native observations after none",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{schema:3 positive_span{offset:0 length:0}}}`,
				`type:HISTOGRAM metric{histogram{sample_count:1 sample_sum:1 schema:3 positive_span{offset:0 length:1} positive_delta:1}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:1 sample_sum:1 schema:3 zero_threshold:0 zero_count:0 positive_span{offset:0 length:1} positive_delta:1}}`,
		},
		{
			name: "native float",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:3 schema:1 zero_count:1 positive_span{offset:1 length:1} positive_delta:2}}`,
				`type:HISTOGRAM metric{histogram{sample_count_float:1.5 schema:1 zero_count_float:0.5 positive_span{offset:1 length:1} positive_count:1}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count_float:4.5 sample_sum:0 schema:1 zero_threshold:0 zero_count_float:1.5 positive_span{offset:1 length:1} positive_count:3}}`,
		},
		{
			name: "native and classic buckets",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:3 schema:1 positive_span{offset:1 length:1} positive_delta:3 bucket{upper_bound:1 cumulative_count:0} bucket{upper_bound:2 cumulative_count:3}}}`,
				`type:HISTOGRAM metric{histogram{sample_count:1 schema:1 positive_span{offset:1 length:1} positive_delta:1 bucket{upper_bound:4 cumulative_count:1}}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:4 sample_sum:0 schema:1 zero_threshold:0 zero_count:0 positive_span{offset:1 length:1} positive_delta:4
				bucket{upper_bound:1 cumulative_count:0} bucket{upper_bound:2 cumulative_count:3} bucket{upper_bound:4 cumulative_count:4}}}`,
		},
		{
			name: "classic buckets of some observations only",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:3 schema:1 positive_span{offset:1 length:1} positive_delta:3 bucket{upper_bound:2 cumulative_count:3}}}`,
				`type:HISTOGRAM metric{histogram{sample_count:1 schema:1 positive_span{offset:1 length:1} positive_delta:1}}`,
				`type:HISTOGRAM metric{histogram{sample_count:1 schema:1 positive_span{offset:1 length:1} positive_delta:1 bucket{upper_bound:2 cumulative_count:1}}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:5 sample_sum:0 schema:1 zero_threshold:0 zero_count:0 positive_span{offset:1 length:1} positive_delta:5}}`,
		},
		{
			name: "exemplars of native histograms",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{schema:1 positive_span{} exemplars{value:1}}} metric{label{name:"a" value:"1"} histogram{schema:1 positive_span{} exemplars{value:2}}}`,
				`type:HISTOGRAM metric{histogram{schema:1 positive_span{} exemplars{value:3} exemplars{value:4}}} metric{label{name:"a" value:"1"} histogram{schema:1 positive_span{} created_timestamp{seconds:1}}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:0 sample_sum:0 schema:1 zero_threshold:0 zero_count:0 positive_span{offset:0 length:0} exemplars{value:3} exemplars{value:4}}}
				metric{label{name:"a" value:"1"} histogram{sample_count:0 sample_sum:0 schema:1 zero_threshold:0 zero_count:0 positive_span{offset:0 length:0} exemplars{value:2} created_timestamp{seconds:1}}}`,
		},
		{
			name: "native counts saturate",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:18446744073709551615 sample_sum:nan schema:1 zero_count:1 positive_span{offset:1 length:1} positive_delta:9223372036854775807}} metric{label{name:"a" value:"1"} histogram{sample_count:18446744073709551615 schema:1 zero_count:18446744073709551615}}`,
				`type:HISTOGRAM metric{histogram{sample_count:9223372036854775807 schema:1 positive_span{offset:1 length:1} positive_delta:9223372036854775807}} metric{label{name:"a" value:"1"} histogram{sample_count:1 schema:1 zero_count:1}}`,
			},
			want: `type:HISTOGRAM metric{histogram{sample_count:18446744073709551615 sample_sum:nan schema:1 zero_threshold:0 zero_count:1 positive_span{offset:1 length:1} positive_delta:9223372036854775807}}
				metric{label{name:"a" value:"1"} histogram{sample_count:18446744073709551615 sample_sum:0 schema:1 zero_threshold:0 zero_count:18446744073709551615}}`,
		},
		{
			name: "a gauge histogram is replaced by one of the other form", gauge: "last",
			pushes: []string{
				`type:GAUGE_HISTOGRAM metric{histogram{sample_count:1 schema:1 positive_span{offset:1 length:1} positive_delta:1}}`,
				`type:GAUGE_HISTOGRAM metric{histogram{sample_count:2}}`,
			},
			want: `type:GAUGE_HISTOGRAM metric{histogram{sample_count:2}}`,
		},
		{
			name: "classic after native",
			pushes: []string{
				`type:HISTOGRAM metric{histogram{sample_count:1 schema:1 positive_span{offset:1 length:1} positive_delta:1}}`,
				`type:HISTOGRAM metric{histogram{sample_count:1 bucket{upper_bound:1 cumulative_count:1}}}`,
			},
			err: `metric "m": labels {instance=""}: the stored histogram is native and the pushed one is classic; push what is stored, or delete the group first`,
		},
		{
			name: "native after classic", gauge: "sum",
			pushes: []string{
				`type:GAUGE_HISTOGRAM metric{histogram{sample_count:1 bucket{upper_bound:1 cumulative_count:1}}}`,
				`type:GAUGE_HISTOGRAM metric{histogram{sample_count:1 schema:1 positive_span{offset:1 length:1} positive_delta:1 bucket{upper_bound:1 cumulative_count:1}}}`,
			},
			err: `metric "m": labels {instance=""}: the stored histogram is classic and the pushed one is native; push what is stored, or delete the group first`,
		},
		{
			name:   "a zero threshold that is no number",
			pushes: []string{`type:HISTOGRAM metric{histogram{schema:1 zero_threshold:nan positive_span{}}}`},
			err:    `metric "m": the zero threshold NaN of the native histogram is negative or not finite`,
		},
		{
			name:   "buckets beyond float64",
			pushes: []string{`type:HISTOGRAM metric{histogram{sample_count:1 schema:-1 negative_span{offset:513 length:2} negative_delta:[0,1]}}`},
			err:    `metric "m": the native histogram of schema -1 has buckets outside those of float64, from -537 to 513`,
		},
		{
			name:   "buckets next to 0 beyond float64",
			pushes: []string{`type:HISTOGRAM metric{histogram{sample_count:1 schema:8 positive_span{offset:-274945 length:1} positive_delta:1}}`},
			err:    `metric "m": the native histogram of schema 8 has buckets outside those of float64, from -274944 to 262145`,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			parse := func(text string) *dto.MetricFamily {
				f := &dto.MetricFamily{Name: proto.String("m")}
				if err := (prototext.UnmarshalOptions{}).Unmarshal([]byte(`name:"m" `+text), f); err != nil {
					t.Fatal(err)
				}
				return f
			}
			var families []*dto.MetricFamily
			for _, text := range c.pushes {
				families = append(families, parse(text))
			}
			got, err := aggregate(t, cmp.Or(c.gauge, "last"), families...)
			if c.err != "" {
				if err == nil || err.Error() != c.err {
					t.Fatalf("error %v, want %s", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			want := parse(c.want)
			for _, m := range want.Metric {
				forceLabels(nil, Key(nil).forced(), m)
			}
			if !proto.Equal(got, want) {
				t.Errorf("got\n%s\nwant\n%s", prototext.Format(got), prototext.Format(want))
			}
		})
	}
}

// TestAggregateLabels: forcing labels onto the result writes into its slices only;
// others may read the stored ones meanwhile.
func TestAggregateLabels(t *testing.T) {
	key := Key{{"job", "j"}}
	old, pushed := parseSamples(t, "counter", `m{a="1",instance="",job="j"} 1`), parseSamples(t, "counter", `m{a="2",instance="",job="j"} 1`)
	labels := slices.Clone(old.Metric[0].Label)
	merged, err := (&aggregation{"last"}).merge(old, pushed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := prepareFamily(key, key.forced(), merged, 0); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(old.Metric[0].Label, labels) {
		t.Error("the labels of the stored series were replaced")
	}
}

// TestAggregateNativeOfClient compares the sum of histograms with the histogram of
// all observations, as the client library makes it.
func TestAggregateNativeOfClient(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	options := prometheus.HistogramOpts{Name: "m", Help: "h", NativeHistogramBucketFactor: 1.1, Buckets: []float64{-10, 1, 100}}
	collect := func(h prometheus.Histogram) *dto.MetricFamily {
		m := new(dto.Metric)
		if err := h.Write(m); err != nil {
			t.Fatal(err)
		}
		m.Histogram.CreatedTimestamp = nil
		return &dto.MetricFamily{Name: proto.String("m"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{m}}
	}
	for range 50 {
		all := prometheus.NewHistogram(options)
		var families []*dto.MetricFamily
		for range 1 + r.IntN(5) {
			part := prometheus.NewHistogram(options)
			for range r.IntN(20) {
				v := math.Trunc(r.NormFloat64() * math.Pow(10, float64(r.IntN(5))))
				part.Observe(v)
				all.Observe(v)
			}
			families = append(families, collect(part))
		}
		got, err := aggregate(t, "last", families...)
		if err != nil {
			t.Fatal(err)
		}
		want, err := aggregate(t, "last", collect(all))
		if err != nil {
			t.Fatal(err)
		}
		g, w := addendOf(got.Metric[0].Histogram), addendOf(want.Metric[0].Histogram)
		if g, w := formatSamples(t, got), formatSamples(t, want); g != w {
			t.Fatalf("got\n%s\nwant\n%s", g, w)
		}
		if !reflect.DeepEqual(g, w) {
			t.Fatalf("got\n%v\nwant\n%v", g, w)
		}
	}
}

// TestAggregateNativeOfClients has clients of different options: no observation is
// lost or counted twice. The order makes no difference as long as not both the
// resolution and the width of the zero bucket differ.
func TestAggregateNativeOfClients(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 8))
	factors, thresholds := []float64{1.01, 1.1, 1.5, 3, 50}, []float64{1e-300, 0.1, 0.25, 1, 3, 100}
	for range 200 {
		sameFactor, sameThreshold := r.IntN(2) == 0, r.IntN(2) == 0
		pushes := make([]*dto.MetricFamily, 3)
		for i := range pushes {
			options := prometheus.HistogramOpts{Name: "m", NativeHistogramBucketFactor: factors[1], NativeHistogramZeroThreshold: thresholds[1]}
			if !sameFactor {
				options.NativeHistogramBucketFactor = factors[r.IntN(len(factors))]
			}
			if !sameThreshold {
				options.NativeHistogramZeroThreshold = thresholds[r.IntN(len(thresholds))]
			}
			h := prometheus.NewHistogram(options)
			h.Observe(math.Inf(r.IntN(2)*2 - 1))
			h.Observe(math.MaxFloat64)
			h.Observe(-math.SmallestNonzeroFloat64)
			for range r.IntN(30) {
				h.Observe(math.Trunc(r.NormFloat64() * 500))
			}
			m := new(dto.Metric)
			if err := h.Write(m); err != nil {
				t.Fatal(err)
			}
			m.Histogram.SampleSum, m.Histogram.CreatedTimestamp = nil, nil
			pushes[i] = &dto.MetricFamily{Name: proto.String("m"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{m}}
		}
		var first *dto.MetricFamily
		for range 3 {
			got, err := aggregate(t, "last", shuffled(r, pushes)...)
			if err != nil {
				t.Fatal(err)
			}
			n := addendOf(got.Metric[0].Histogram)
			if want := float64(got.Metric[0].Histogram.GetSampleCount()); observations(n) != want {
				t.Fatalf("%v observations in buckets, want %v, in\n%v\npushed\n%v", observations(n), want, got, pushes)
			}
			if first == nil {
				first = got
			}
			if (sameFactor || sameThreshold) && !proto.Equal(got, first) {
				t.Fatalf("another order gives\n%v\ninstead of\n%v\npushed\n%v", got, first, pushes)
			}
		}
	}
}

func observations(n *nativeHistogram) float64 {
	total := 0.0
	for _, b := range n.intervals() {
		total += b.count
	}
	return total
}

// shuffled returns copies, as merge uses them up.
func shuffled(r *rand.Rand, pushes []*dto.MetricFamily) []*dto.MetricFamily {
	out := make([]*dto.MetricFamily, len(pushes))
	for i, j := range r.Perm(len(pushes)) {
		out[i] = proto.Clone(pushes[j]).(*dto.MetricFamily)
	}
	return out
}

// TestAggregateManyNativeBuckets: the resolution goes down, not the memory up.
func TestAggregateManyNativeBuckets(t *testing.T) {
	push := func(offset int32, buckets int) *dto.MetricFamily {
		h := &dto.Histogram{
			SampleCount: proto.Uint64(uint64(buckets)), Schema: proto.Int32(8), PositiveDelta: make([]int64, buckets),
			PositiveSpan: []*dto.BucketSpan{{Offset: &offset, Length: proto.Uint32(uint32(buckets))}},
		}
		h.PositiveDelta[0] = 1 // as many as the others
		return &dto.MetricFamily{Name: proto.String("m"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{{Histogram: h}}}
	}
	for _, c := range []struct {
		a, b   *dto.MetricFamily
		schema int32
	}{
		{push(0, maxNativeBuckets/2), push(maxNativeBuckets/2, maxNativeBuckets/2), 8},
		{push(1, maxNativeBuckets/2), push(maxNativeBuckets, maxNativeBuckets), 7},
		{push(0, 1), push(1, 100*maxNativeBuckets), 1},
		{push(1, 100*maxNativeBuckets), push(0, 1), 1},
	} {
		f, err := aggregate(t, "last", c.a, c.b)
		if err != nil {
			t.Fatal(err)
		}
		n := addendOf(f.Metric[0].Histogram)
		if want := float64(f.Metric[0].Histogram.GetSampleCount()); n.schema != c.schema || observations(n) != want || len(n.positive) > maxNativeBuckets {
			t.Errorf("schema %d with %v observations in %d buckets, want schema %d with %v", n.schema, observations(n), len(n.positive), c.schema, want)
		}
	}
}

// randomHistogram returns a classic histogram in which no count is lower than the
// one before.
func randomHistogram(r *rand.Rand) *dto.MetricFamily {
	h := &dto.Histogram{SampleSum: proto.Float64(float64(r.IntN(100)))}
	count := uint64(0)
	for bound := range 8 {
		if count += uint64(r.IntN(5)); r.IntN(2) == 0 {
			h.Bucket = append(h.Bucket, &dto.Bucket{UpperBound: proto.Float64(float64(bound)), CumulativeCount: proto.Uint64(count)})
		}
	}
	count += uint64(r.IntN(3))
	if r.IntN(2) == 0 {
		h.Bucket = append(h.Bucket, &dto.Bucket{UpperBound: proto.Float64(math.Inf(+1)), CumulativeCount: &count})
	}
	h.SampleCount = &count
	if r.IntN(4) == 0 {
		h.SampleCount, h.SampleCountFloat = nil, proto.Float64(float64(count)+0.5)
		for _, b := range h.Bucket {
			b.CumulativeCountFloat, b.CumulativeCount = proto.Float64(float64(b.GetCumulativeCount())+0.5), nil
		}
	}
	return &dto.MetricFamily{Name: proto.String("m"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{{Histogram: h}}}
}

func TestAggregateHistogramProperties(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 300 {
		pushes := make([]*dto.MetricFamily, 2+r.IntN(4))
		count, sum := 0.0, 0.0
		for i := range pushes {
			pushes[i] = randomHistogram(r)
			count += sampleCount(pushes[i].Metric[0].Histogram)
			sum += pushes[i].Metric[0].Histogram.GetSampleSum()
		}
		var first *dto.MetricFamily
		for range 3 {
			got, err := aggregate(t, "last", shuffled(r, pushes)...)
			if err != nil {
				t.Fatal(err)
			}
			if first == nil {
				first = got
			}
			if !proto.Equal(got, first) {
				t.Fatalf("another order gives\n%v\ninstead of\n%v\npushed\n%v", got, first, pushes)
			}
		}
		h := first.Metric[0].Histogram
		if sampleCount(h) != count || h.GetSampleSum() != sum {
			t.Fatalf("count %v and sum %v, want %v and %v", sampleCount(h), h.GetSampleSum(), count, sum)
		}
		for i, b := range h.Bucket {
			if i > 0 && (bucketCount(b) < bucketCount(h.Bucket[i-1]) || b.GetUpperBound() <= h.Bucket[i-1].GetUpperBound()) || bucketCount(b) > count {
				t.Fatalf("counts fall in\n%v\npushed\n%v", h, pushes)
			}
			// Each push as a step function.
			want := 0.0
			for _, f := range pushes {
				p, at := f.Metric[0].Histogram, 0.0
				for _, pb := range p.Bucket {
					if pb.GetUpperBound() <= b.GetUpperBound() {
						at = bucketCount(pb)
					}
				}
				if math.IsInf(b.GetUpperBound(), +1) {
					at = sampleCount(p)
				}
				want += at
			}
			if bucketCount(b) != want {
				t.Fatalf("%v up to %v, want %v in\n%v\npushed\n%v", bucketCount(b), b.GetUpperBound(), want, h, pushes)
			}
		}
	}
}

// TestAggregateOrder merges families of many series in any order.
func TestAggregateOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 6))
	for _, kind := range []dto.MetricType{dto.MetricType_COUNTER, dto.MetricType_GAUGE, dto.MetricType_UNTYPED, dto.MetricType_SUMMARY, dto.MetricType_GAUGE_HISTOGRAM} {
		for range 20 {
			pushes := make([]*dto.MetricFamily, 3)
			for i := range pushes {
				pushes[i] = &dto.MetricFamily{Name: proto.String("m"), Type: &kind}
				for _, n := range r.Perm(20)[:r.IntN(20)] {
					value := proto.Float64(float64(r.IntN(100)))
					m := &dto.Metric{Label: []*dto.LabelPair{{Name: proto.String("abc"[n%3 : n%3+1]), Value: proto.String(fmt.Sprint(n))}}}
					switch kind {
					case dto.MetricType_COUNTER:
						m.Counter = &dto.Counter{Value: value}
					case dto.MetricType_GAUGE:
						m.Gauge = &dto.Gauge{Value: value}
					case dto.MetricType_UNTYPED:
						m.Untyped = &dto.Untyped{Value: value}
					case dto.MetricType_SUMMARY:
						m.Summary = &dto.Summary{SampleSum: value, SampleCount: proto.Uint64(1)}
					case dto.MetricType_GAUGE_HISTOGRAM:
						m.Histogram = randomHistogram(r).Metric[0].Histogram
					}
					pushes[i].Metric = append(pushes[i].Metric, m)
				}
			}
			var first *dto.MetricFamily
			for range 3 {
				got, err := aggregate(t, "sum", shuffled(r, pushes)...)
				if err != nil {
					t.Fatal(err)
				}
				if first == nil {
					first = got
				}
				if !proto.Equal(got, first) || !slices.IsSortedFunc(got.Metric, compareSeries) {
					t.Fatalf("another order gives\n%v\ninstead of\n%v", got, first)
				}
			}
		}
	}
}

// nativeOfBytes returns a family of one native histogram with any spans: mutations
// of protobuf rarely get there.
func nativeOfBytes(data []byte) *dto.MetricFamily {
	next := func() (b byte) {
		if len(data) > 0 {
			b, data = data[0], data[1:]
		}
		return b
	}
	h := &dto.Histogram{Schema: proto.Int32(int32(next()%13) - 4), ZeroThreshold: proto.Float64(math.Ldexp(float64(next()), int(int8(next()))))}
	h.ZeroCount = proto.Uint64(uint64(next()))
	total := h.GetZeroCount()
	var lasts [2]int64
	for len(data) > 0 {
		shape := next()
		spans, deltas, last := &h.PositiveSpan, &h.PositiveDelta, &lasts[0]
		if shape&0x80 != 0 {
			spans, deltas, last = &h.NegativeSpan, &h.NegativeDelta, &lasts[1]
		}
		length := uint32(shape >> 5 % 4)
		*spans = append(*spans, &dto.BucketSpan{Offset: proto.Int32(int32(int8(next())) << (shape % 32)), Length: &length})
		for range length {
			count := int64(next() % 8)
			*deltas = append(*deltas, count-*last)
			*last = count
			total += uint64(count)
		}
	}
	if !isNative(h) {
		h.PositiveSpan = []*dto.BucketSpan{{}}
	}
	h.SampleCount = &total
	return &dto.MetricFamily{Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{{Histogram: h}}}
}

// FuzzAggregate merges two families that prepareFamily takes, of text, protobuf or
// nativeOfBytes, and the second one again.
func FuzzAggregate(f *testing.F) {
	const (
		last      = 0
		sum       = 1
		asText    = 4
		asBuckets = 8
	)
	f.Add(uint8(asBuckets|sum), []byte("\x07\x00\x00\x00\x38\x81\x01"), []byte("\x07\x00\x00\x00\x38\x7f\x01"))
	f.Add(uint8(asBuckets|sum), []byte("\x02\x05\x03\x02\xc0\x04\x01\x02"), []byte("\x04\x01\xfe\x01\xe0\x02\x01\x01\x01\x60\x01\x01\x00\x03"))
	for _, text := range []string{
		"# TYPE m counter\nm 1\nm{a=\"1\"} 2\n",
		"# TYPE m counter\nm NaN\nm{b=\"1\"} -2\n",
		"# TYPE m gauge\nm 1\n",
		"m 1\n",
		"# TYPE m summary\nm{quantile=\"0.5\"} 7\nm_sum 10\nm_count 2\n",
		"# TYPE m histogram\nm_bucket{le=\"1\"} 10\nm_bucket{le=\"+Inf\"} 10\nm_sum 1\nm_count 10\n",
		"# TYPE m histogram\nm_bucket{le=\"2\"} 0.5\nm_bucket{le=\"1\"} 1\nm_bucket{le=\"1\"} 3\nm_count 1.5\n",
		"# TYPE m gaugehistogram\nm_bucket{le=\"2\"} 1\n",
	} {
		f.Add(uint8(asText|last), []byte(text), []byte(text))
		f.Add(uint8(asText|sum), []byte(text), []byte("# TYPE m histogram\nm_bucket{le=\"3\"} 10\nm_count 11\n"))
	}
	var messages [][]byte
	for _, text := range []string{
		`metric{counter{value:1 exemplar{value:1} created_timestamp{seconds:1}}}`,
		`type:GAUGE metric{gauge{value:1}} metric{label{name:"a"} gauge{value:2}}`,
		`type:SUMMARY metric{summary{sample_count:1 sample_sum:2 quantile{quantile:0.5 value:1}}}`,
		`type:HISTOGRAM metric{histogram{sample_count:9 sample_sum:3 schema:1 zero_threshold:0.001 zero_count:1 negative_span{offset:-2 length:1} negative_delta:1
			positive_span{offset:0 length:2} positive_span{offset:1 length:1} positive_delta:[1,1,2] exemplars{value:1} bucket{upper_bound:1 cumulative_count:9}}}`,
		`type:HISTOGRAM metric{histogram{sample_count:10 schema:-1 zero_threshold:0.25 positive_span{offset:-1 length:4} positive_delta:[1,1,1,1]}}`,
		`type:HISTOGRAM metric{histogram{sample_count:10 schema:8 zero_threshold:3 positive_span{offset:-9 length:4} positive_delta:[1,-1,0,1] negative_span{} negative_span{offset:7 length:1} negative_delta:3}}`,
		`type:HISTOGRAM metric{histogram{schema:3 positive_span{}}}`,
		`type:HISTOGRAM metric{histogram{sample_count:5 bucket{upper_bound:1 cumulative_count:5 exemplar{value:1}} bucket{upper_bound:inf cumulative_count:6}}}`,
		`type:GAUGE_HISTOGRAM metric{histogram{sample_count_float:1.5 schema:1 zero_count_float:0.5 positive_span{offset:1 length:1} positive_count:1}}`,
	} {
		m := new(dto.MetricFamily)
		if err := prototext.Unmarshal([]byte(text), m); err != nil {
			f.Fatal(err)
		}
		data, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		messages = append(messages, data)
	}
	for i, a := range messages {
		f.Add(uint8(sum), a, a)
		for _, b := range messages[i+1:] {
			f.Add(uint8(sum), a, b)
		}
	}
	f.Fuzz(func(t *testing.T, choice uint8, a, b []byte) {
		gauge := []string{last: "last", sum: "sum", 2: "min", 3: "max"}[choice%4]
		// read returns a family as it is stored, nil where a push could not bring it. It
		// mends what would make most inputs fail.
		read := func(data []byte) *dto.MetricFamily {
			f := new(dto.MetricFamily)
			if choice&asBuckets != 0 {
				f = nativeOfBytes(data)
			} else if choice&asText != 0 {
				parser := expfmt.NewTextParser(model.UTF8Validation)
				families, err := parser.TextToMetricFamilies(strings.NewReader(string(data)))
				if err != nil || families["m"] == nil {
					return nil
				}
				f = families["m"]
			} else if proto.Unmarshal(data, f) != nil {
				return nil
			}
			f.Name = proto.String("m")
			f.Metric = slices.DeleteFunc(f.Metric, func(m *dto.Metric) bool {
				m.TimestampMs = nil
				return !onlyValue(m, f.GetType()) || m.GetHistogram().GetSampleCount() > 1<<50 // not exact
			})
			if f, err := stored(f); err == nil && len(f.Metric) > 0 {
				return f
			}
			return nil
		}
		old, pushed := read(a), read(b)
		if old == nil || pushed == nil {
			return
		}
		before, again := proto.Clone(old), proto.Clone(pushed).(*dto.MetricFamily)
		series := map[string]bool{}
		for _, m := range slices.Concat(old.Metric, pushed.Metric) {
			series[labelString(m.Label)] = true
		}
		merge := func(old, pushed *dto.MetricFamily) (*dto.MetricFamily, error) {
			merged, err := (&aggregation{gauge}).merge(old, pushed)
			if err != nil {
				return nil, err
			}
			if merged.GetType() != old.GetType() || len(merged.Metric) != len(series) || !slices.IsSortedFunc(merged.Metric, compareSeries) {
				t.Fatalf("type %s, %d series, want %s, %d; or they are not sorted:\n%v", merged.GetType(), len(merged.Metric), old.GetType(), len(series), merged)
			}
			// It is encoded as text and as protobuf there.
			if merged, err = stored(merged); err != nil && strings.Contains(err.Error(), "already seen where UTF-8 names are escaped") {
				return nil, err // two labels of different names that read the same
			} else if err != nil {
				t.Fatalf("%v, in the sum of\n%v\nand\n%v", err, before, again)
			}
			return merged, nil
		}
		merged, err := merge(old, pushed)
		if !proto.Equal(old, before) {
			t.Fatalf("the stored family changed from\n%v\nto\n%v", before, old)
		}
		if err != nil {
			return
		}
		if _, err := merge(merged, again); err != nil {
			t.Fatalf("what was merged once can't be merged again: %v", err)
		}
	})
}
