package gateway_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/gateway/fastgzip"
)

const protobufType = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"

// delimited encodes families that are given in protobuf's text form.
func delimited(t testing.TB, families ...string) string {
	t.Helper()
	var out bytes.Buffer
	for _, text := range families {
		f := new(dto.MetricFamily)
		if err := prototext.Unmarshal([]byte(text), f); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if _, err := protodelim.MarshalTo(&out, f); err != nil {
			t.Fatal(err)
		}
	}
	return out.String()
}

// scrape answers GET /metrics.
func (s server) scrape(header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	gateway.ServeMetrics(s.Gateway, w, r)
	return w
}

// scrapeProtobuf returns a family as a scrape in protobuf has it, nil where it is
// not there.
func (s server) scrapeProtobuf(name string) *dto.MetricFamily {
	s.t.Helper()
	body := bufio.NewReader(s.scrape("Accept", protobufType).Body)
	var found *dto.MetricFamily
	for {
		f := new(dto.MetricFamily)
		err := protodelim.UnmarshalFrom(body, f)
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			s.t.Fatal(err)
		}
		if f.GetName() == name {
			found = f
		}
	}
}

// exposed compares an exposition, without the families that the gateway makes, with
// lines in which @ stands for the labels that every series of the job "j" gets.
func exposed(t *testing.T, got string, want ...string) {
	t.Helper()
	lines := slices.Collect(strings.Lines(got))
	lines = slices.DeleteFunc(lines, func(line string) bool {
		return strings.HasPrefix(strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE "), "push_")
	})
	got = strings.TrimSuffix(strings.Join(lines, ""), "\n")
	if want := strings.ReplaceAll(strings.Join(want, "\n"), "@", `instance="",job="j"`); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// wantWords checks that a message says it all.
func wantWords(t *testing.T, message string, words ...string) {
	t.Helper()
	for _, word := range words {
		if !strings.Contains(message, word) {
			t.Errorf("%q does not say %q", message, word)
		}
	}
}

// TestContentType is section 4.1: of three bodies, each valid in one format alone,
// the one of the format that the Content-Type means is taken.
func TestContentType(t *testing.T) {
	bodies := map[string]string{
		"text":        "\nm 1\n",
		"protobuf":    delimited(t, `name:"m" metric{counter{value:1}}`),
		"OpenMetrics": "# TYPE m unknown\nm 1\n# EOF\n",
	}
	for contentType, want := range map[string]string{
		"":                                  "text",
		"text/plain; version=0.0.4":         "text",
		"application/json":                  "text",
		"application/x-www-form-urlencoded": "text",
		"multipart/form-data; boundary=x":   "text",
		"; nonsense ;;=":                    "text",
		"application/vnd.google.protobuf":   "text",
		"application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily":                     "text",
		"application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=text":      "text",
		"application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=Delimited": "text",
		"application/vnd.google.protobuf; proto=io.prometheus.client.Metric; encoding=delimited":       "text",
		"application/vnd.google.protobuf; encoding=delimited":                                          "text",
		protobufType: "protobuf",
		"application/vnd.google.protobuf;encoding=delimited;proto=io.prometheus.client.MetricFamily":       "protobuf",
		"Application/VND.google.Protobuf; Proto=io.prometheus.client.MetricFamily; ENCODING=delimited":     "protobuf",
		`application/vnd.google.protobuf; proto="io.prometheus.client.MetricFamily"; encoding="delimited"`: "protobuf",
		protobufType + "; escaping=values":                           "protobuf",
		"application/openmetrics-text; version=1.0.0; charset=utf-8": "OpenMetrics",
	} {
		t.Run(contentType, func(t *testing.T) {
			s := start(t, gateway.StoreConfig{}, gateway.Memory())
			for format, body := range bodies {
				status := 400
				if format == want {
					status = 200
				}
				s.want(status, "PUT", "/"+format, body, "Content-Type", contentType)
			}
		})
	}
}

// TestTextAccepted is section 4.4: what is taken, and how it comes out again.
func TestTextAccepted(t *testing.T) {
	for name, c := range map[string]struct{ body, want string }{
		"empty body":                     {"", ""},
		"only blank lines":               {"\n \n\t\n", ""},
		"only comments":                  {"# a comment\n#HELP m without a blank\n#\n", ""},
		"EOF":                            {"# EOF\n", ""},
		"TYPE and HELP without anything": {"# TYPE m\n# HELP m\n# TYPE\n# HELP n\nm 1\n", "# TYPE m untyped\nm{@} 1"},
		"untyped":                        {"m 1\n", "# TYPE m untyped\nm{@} 1"},
		"leading blanks and tabs":        {" \tm 1\n", "# TYPE m untyped\nm{@} 1"},
		"tabs as separators":             {"m\t{\ta\t=\t\"b\"\t}\t1\n", "# TYPE m untyped\nm{a=\"b\",@} 1"},
		"blank lines between":            {"\nm 1\n\nn 2\n\n", "# TYPE m untyped\nm{@} 1\n# TYPE n untyped\nn{@} 2"},
		"trailing comma in braces":       {"m{a=\"b\",} 1\n", "# TYPE m untyped\nm{a=\"b\",@} 1"},
		"empty braces":                   {"m{} 1\n", "# TYPE m untyped\nm{@} 1"},
		"names of the legacy rules":      {":a_Z9:{_a9=\"x\"} 1\n", "# TYPE :a_Z9: untyped\n:a_Z9:{_a9=\"x\",@} 1"},
		"TYPE counter":                   {"# TYPE m counter\nm 1\n", "# TYPE m counter\nm{@} 1"},
		"TYPE gauge, any case":           {"# TYPE m GauGE\nm 1\n", "# TYPE m gauge\nm{@} 1"},
		"TYPE untyped":                   {"# TYPE m UNTYPED\nm 1\n", "# TYPE m untyped\nm{@} 1"},
		"TYPE summary":                   {"# TYPE m summary\nm{quantile=\"0.50\"} 1\nm_sum 2\nm_count 3\n", "# TYPE m summary\nm{@,quantile=\"0.5\"} 1\nm_sum{@} 2\nm_count{@} 3"},
		"TYPE histogram":                 {"# TYPE m histogram\nm_bucket{le=\"1.0\"} 1\nm_bucket{le=\"+Inf\"} 3\nm_sum 2\nm_count 3\n", "# TYPE m histogram\nm_bucket{@,le=\"1\"} 1\nm_bucket{@,le=\"+Inf\"} 3\nm_sum{@} 2\nm_count{@} 3"},
		"TYPE gaugehistogram":            {"# TYPE m gaugehistogram\nm_bucket{le=\"1\"} 1\nm_count 1\n", "# TYPE m histogram\nm_bucket{@,le=\"1\"} 1\nm_bucket{@,le=\"+Inf\"} 1\nm_sum{@} 0\nm_count{@} 1"},
		"TYPE gauge_histogram":           {"# TYPE m gauge_histogram\nm_count 1\n", "# TYPE m histogram\nm_bucket{@,le=\"+Inf\"} 1\nm_sum{@} 0\nm_count{@} 1"},
		"fractional buckets":             {"# TYPE m histogram\nm_bucket{le=\"1\"} 1.5\nm_bucket{le=\"+Inf\"} 2\nm_count 2\n", "# TYPE m histogram\nm_bucket{@,le=\"1\"} 1.5\nm_bucket{@,le=\"+Inf\"} 2\nm_sum{@} 0\nm_count{@} 2"},
		"fractional summary count":       {"# TYPE m summary\nm_count 2.9\n", "# TYPE m summary\nm_sum{@} 0\nm_count{@} 2"},
		"plain sample of a histogram":    {"# TYPE m histogram\nm 5\n", "# TYPE m histogram\nm_bucket{@,le=\"+Inf\"} 0\nm_sum{@} 0\nm_count{@} 0"},
		"plain sample of a summary":      {"# TYPE m summary\nm_count 1\nm 5\n", "# TYPE m summary\nm_sum{@} 0\nm_count{@} 1"},
		"HELP escapes":                   {`# HELP m a\\b\nc\"d` + "\nm 1\n", `# HELP m a\\b\nc"d` + "\n# TYPE m untyped\nm{@} 1"},
		"HELP with blanks behind":        {"# HELP  m  some  help \nm 1\n", "# HELP m some  help \n# TYPE m untyped\nm{@} 1"},
		"label value escapes":            {`m{a="\\\n\""} 1` + "\n", "# TYPE m untyped\n" + `m{a="\\\n\"",@} 1`},
		"UTF-8 in values and HELP":       {"# HELP m grüße\nm{a=\"日本\"} 1\n", "# HELP m grüße\n# TYPE m untyped\nm{a=\"日本\",@} 1"},
		"interleaved samples":            {"m{a=\"1\"} 1\nn 2\nm{a=\"2\"} 3\n", "# TYPE m untyped\nm{a=\"1\",@} 1\nm{a=\"2\",@} 3\n# TYPE n untyped\nn{@} 2"},
	} {
		t.Run("4.4 "+name, func(t *testing.T) {
			s := start(t, gateway.StoreConfig{}, gateway.Memory())
			s.want(200, "PUT", "/j", c.body)
			exposed(t, s.scrape().Body.String(), c.want)
		})
	}
}

// TestTextRefused is section 4.4: what is a syntax error. The answer names the line
// and the reason; nothing changes, no failure time either.
func TestTextRefused(t *testing.T) {
	for name, c := range map[string]struct {
		body string
		line int
		want string
	}{
		"no final LF":                  {"m 1\nn 2", 2, "unexpected end"},
		"no final LF of a comment":     {"m 1\n# comment", 2, "unexpected end"},
		"CRLF":                         {"m 1\r\n", 1, `"1\r"`},
		"CRLF behind TYPE":             {"# TYPE m counter\r\nm 1\r\n", 1, `"counter\r"`},
		"blank after the value":        {"m 1 \n", 1, "timestamp"},
		"no value":                     {"m\n", 1, "float"},
		"not a value":                  {"a 1\nb 2\nc one\n", 3, `"one"`},
		"timestamp of OpenMetrics":     {"m 1 5.5\n", 1, `"5.5"`},
		"timestamp in hex":             {"m 1 0x5\n", 1, `"0x5"`},
		"timestamp beyond 64 bits":     {"m 1 9223372036854775808\n", 1, "9223372036854775808"},
		"more behind the timestamp":    {"m 1 5 6\n", 1, "spurious"},
		"exemplar":                     {"m_total 1 # {a=\"b\"} 1\n", 1, `"#"`},
		"TYPE unknown":                 {"# TYPE m unknown\n", 1, `"unknown"`},
		"TYPE info":                    {"m 1\n# TYPE n info\n", 2, `"info"`},
		"TYPE stateset":                {"# TYPE m stateset\n", 1, `"stateset"`},
		"blank behind the type":        {"# TYPE m counter \n", 1, `"counter "`},
		"second TYPE":                  {"# TYPE m counter\n# TYPE m counter\n", 2, "second TYPE"},
		"second HELP":                  {"# HELP m a\n# HELP m b\n", 2, "second HELP"},
		"TYPE after a sample":          {"m 1\n# TYPE m untyped\n", 2, "TYPE"},
		"HELP escape":                  {`# HELP m a\t` + "\n", 1, `\t`},
		"label value escape":           {`m{a="\t"} 1` + "\n", 1, `\t`},
		"duplicate label name":         {"m{a=\"1\",a=\"2\"} 1\n", 1, `duplicate label`},
		"label __name__":               {"m{__name__=\"x\"} 1\n", 1, "__name__"},
		"label value not UTF-8":        {"m{a=\"\xff\"} 1\n", 1, `label value`},
		"label value without quotes":   {"m{a=1} 1\n", 1, "label value"},
		"label value not closed":       {"m{a=\"1\n\"} 1\n", 1, "new-line"},
		"brace not closed":             {"m{a=\"1\" 1\n", 1, ""},
		"label name of a digit":        {"m{1a=\"1\"} 1\n", 1, "label name"},
		"label name empty":             {"m{=\"1\"} 1\n", 1, "label name"},
		"metric name of a digit":       {"1m 1\n", 1, "metric name"},
		"byte-order mark":              {"\xef\xbb\xbfm 1\n", 1, "metric name"},
		"le is no float":               {"# TYPE m histogram\nm_bucket{le=\"x\"} 1\n", 2, `"x"`},
		"le of a gauge histogram":      {"# TYPE m gaugehistogram\nm_bucket{le=\"x\"} 1\n", 2, `"x"`},
		"quantile is no float":         {"# TYPE m summary\nm{quantile=\"\"} 1\n", 2, "quantile"},
		"negative bucket":              {"# TYPE m histogram\nm_bucket{le=\"1\"} -1\n", 2, "negative"},
		"negative count":               {"# TYPE m histogram\nm_count -1\n", 2, "negative"},
		"multipart body":               {"--x\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\nm 1\r\n--x--\r\n", 1, ""},
		"W13 a brace line":             {"m 1\n{a=\"b\"} 2\n", 2, "metric name"},
		"W13 empty braces":             {"m 1\n {} 2\n", 2, "metric name"},
		"W13 a name among the values":  {"m 1\n{a=\"b,\\\"n\",c=\"d\"} 2\n", 2, "metric name"},
		"U1 two names in the braces":   {"{\"m.a\",\"m.b\"} 2\n", 1, "metric name"},
		"U1 quoted name not closed":    {"m 1\n{\"m.a} 2\n", 2, ""},
		"U1 quoted name is empty":      {"m 1\n{\"\"} 2\n", 2, "name"},
		"U1 quoted name is not UTF-8":  {"{\"a\xff\"} 2\n", 1, "name"},
		"U1 quoted label is not UTF-8": {"m{\"a\xff\"=\"1\"} 2\n", 1, "name"},
	} {
		t.Run("4.4 "+name, func(t *testing.T) {
			clock := newClock()
			s := start(t, gateway.StoreConfig{Now: clock.now}, gateway.Memory())
			s.want(200, "PUT", "/j", "m 7\n")
			before := s.samples(true)
			clock.advance(time.Second)
			for _, path := range []string{"/j", "/new"} {
				wantWords(t, s.want(400, "POST", path, c.body), fmt.Sprintf("line %d", c.line), c.want, `{job="`+path[1:]+`"}`)
			}
			if after := s.samples(true); after != before {
				t.Errorf("the store changed from\n%s\nto\n%s", before, after)
			}
		})
	}
}

// TestValues is the value row of section 4.4 and the table of S7. In JSON a value
// is the same, but for minus zero.
func TestValues(t *testing.T) {
	s := start(t, gateway.StoreConfig{}, gateway.Memory())
	for in, want := range map[string]string{
		"123456": "123456", "999999": "999999", "1000000": "1e+06", "1234567": "1.234567e+06", "12345678901": "1.2345678901e+10",
		"0.0001": "0.0001", "0.00001": "1e-05", "100000.5": "100000.5",
		"0": "0", "-0": "0", "+1": "1", "-1": "-1", "1e3": "1000", "1E-3": "0.001", "1e+400": "", ".5": "0.5", "5.": "5", "007": "7",
		"0.1": "0.1", "0.30000000000000004": "0.30000000000000004", "9007199254740993": "9.007199254740992e+15", "5e-324": "5e-324", "1e100": "1e+100",
		"NaN": "NaN", "nan": "NaN", "Inf": "+Inf", "+inf": "+Inf", "-INF": "-Inf", "Infinity": "+Inf", "-infinity": "-Inf",
		"0x10": "", "0x1p4": "", "0b1": "", "0o7": "", "1_000": "", "1e400": "", "-1e400": "", "1,5": "", "true": "", "--1": "", "1e": "",
	} {
		t.Run("S7 "+in, func(t *testing.T) {
			body := "m " + in + "\n"
			if want == "" {
				wantWords(t, s.want(400, "PUT", "/j", body), "line 1", in)
				return
			}
			s.want(200, "PUT", "/j", body)
			s.expect(`m{instance="",job="j"} ` + want)
			if in == "-0" {
				want = "-0"
			}
			wantWords(t, s.query(), `"labels":{"instance":"","job":"j"},"value":"`+want+`"`)
		})
	}
}

// TestProtobuf is section 4.3.
func TestProtobuf(t *testing.T) {
	for name, c := range map[string]struct {
		families []string
		want     string
	}{
		"empty body":                       {nil, ""},
		"missing type is counter":          {[]string{`name:"m" metric{counter{value:1}}`}, "# TYPE m counter\nm{@} 1"},
		"type 0":                           {[]string{`name:"m" type:COUNTER help:"h" metric{counter{value:1}}`}, "# HELP m h\n# TYPE m counter\nm{@} 1"},
		"type 1":                           {[]string{`name:"m" type:GAUGE metric{label{name:"b" value:"2"} label{name:"a" value:"1"} gauge{value:1}}`}, "# TYPE m gauge\nm{a=\"1\",b=\"2\",@} 1"},
		"type 2":                           {[]string{`name:"m" type:SUMMARY metric{summary{sample_count:3 sample_sum:2.5 quantile{quantile:0.5 value:1} quantile{quantile:0.9 value:nan}}}`}, "# TYPE m summary\nm{@,quantile=\"0.5\"} 1\nm{@,quantile=\"0.9\"} NaN\nm_sum{@} 2.5\nm_count{@} 3"},
		"type 3":                           {[]string{`name:"m" type:UNTYPED metric{untyped{value:1}}`}, "# TYPE m untyped\nm{@} 1"},
		"type 4":                           {[]string{`name:"m" type:HISTOGRAM metric{histogram{sample_count:3 sample_sum:2.5 bucket{cumulative_count:1 upper_bound:1}}}`}, "# TYPE m histogram\nm_bucket{@,le=\"1\"} 1\nm_bucket{@,le=\"+Inf\"} 3\nm_sum{@} 2.5\nm_count{@} 3"},
		"S9 type 5":                        {[]string{`name:"m" type:GAUGE_HISTOGRAM metric{histogram{sample_count:3 bucket{cumulative_count:3 upper_bound:inf}}}`}, "# TYPE m histogram\nm_bucket{@,le=\"+Inf\"} 3\nm_sum{@} 0\nm_count{@} 3"},
		"float histogram":                  {[]string{`name:"m" type:HISTOGRAM metric{histogram{sample_count_float:3.5 bucket{cumulative_count_float:1.5 upper_bound:1}}}`}, "# TYPE m histogram\nm_bucket{@,le=\"1\"} 1.5\nm_bucket{@,le=\"+Inf\"} 3.5\nm_sum{@} 0\nm_count{@} 3.5"},
		"absent values are 0":              {[]string{`name:"m" type:GAUGE metric{gauge{}}`}, "# TYPE m gauge\nm{@} 0"},
		"the later of two messages counts": {[]string{`name:"m" type:GAUGE help:"one" metric{label{name:"a" value:"1"} gauge{value:1}}`, `name:"m" type:COUNTER metric{counter{value:2}}`}, "# TYPE m counter\nm{@} 2"},
		"a family without metrics":         {[]string{`name:"m" type:GAUGE help:"h"`, `name:"n" metric{counter{value:1}}`}, "# TYPE n counter\nn{@} 1"},
	} {
		t.Run("4.3 "+name, func(t *testing.T) {
			s := start(t, gateway.StoreConfig{}, gateway.Memory())
			s.want(200, "PUT", "/j", delimited(t, c.families...), "Content-Type", protobufType)
			exposed(t, s.scrape().Body.String(), c.want)
		})
	}
	t.Run("4.3 POST of a family without metrics", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{}, gateway.Memory())
		s.want(200, "PUT", "/j", "m 1\nn 2\n")
		s.want(200, "POST", "/j", delimited(t, `name:"m" type:GAUGE`), "Content-Type", protobufType)
		s.expect(`n{instance="",job="j"} 2`)
	})
	whole := delimited(t, `name:"m" metric{counter{value:1}}`, `name:"n" metric{counter{value:1}}`)
	for name, body := range map[string]string{
		"cut off":                 whole[:len(whole)-1],
		"cut off in the length":   whole + "\x80",
		"length beyond the end":   "\x7f" + whole,
		"negative length":         "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
		"not a message":           "\x03abc",
		"not delimited":           whole[1:],
		"text in place of it":     "m 1\n",
		"good, and then nonsense": whole + "\x02\xff\xff",
	} {
		t.Run("4.3 "+name, func(t *testing.T) {
			s := start(t, gateway.StoreConfig{}, gateway.Memory())
			s.want(200, "PUT", "/j", "before 1\n")
			before := s.samples(true)
			wantWords(t, s.want(400, "PUT", "/j", body, "Content-Type", protobufType), "protobuf", `{job="j"}`)
			if after := s.samples(true); after != before {
				t.Errorf("the store changed from\n%s\nto\n%s", before, after)
			}
		})
	}
}

// TestProtobufKeepsAll is S8 and S10: a scrape in protobuf has all that was pushed,
// but for the unit. Text has native histograms as their +Inf bucket, sum and count.
func TestProtobufKeepsAll(t *testing.T) {
	for name, c := range map[string]struct{ family, text string }{
		"counter, exemplar, created":              {`type:COUNTER metric{counter{value:3 exemplar{label{name:"trace_id" value:"x"} value:2 timestamp{seconds:1600000000 nanos:5}} created_timestamp{seconds:1500000000}}}`, "m{@} 3"},
		"summary, created":                        {`type:SUMMARY metric{summary{sample_count:3 sample_sum:2.5 quantile{quantile:0.5 value:1} created_timestamp{seconds:1500000000}}}`, "m{@,quantile=\"0.5\"} 1\nm_sum{@} 2.5\nm_count{@} 3"},
		"histogram, exemplar, created":            {`type:HISTOGRAM metric{histogram{sample_count:3 sample_sum:2.5 bucket{cumulative_count:1 upper_bound:1 exemplar{label{name:"a" value:"b"} value:0.5}} created_timestamp{seconds:1500000000}}}`, "m_bucket{@,le=\"1\"} 1\nm_bucket{@,le=\"+Inf\"} 3\nm_sum{@} 2.5\nm_count{@} 3"},
		"gauge histogram":                         {`type:GAUGE_HISTOGRAM metric{histogram{sample_count:3 sample_sum:2.5 bucket{cumulative_count:3 upper_bound:1}}}`, "m_bucket{@,le=\"1\"} 3\nm_bucket{@,le=\"+Inf\"} 3\nm_sum{@} 2.5\nm_count{@} 3"},
		"native histogram, exemplars, created":    {`type:HISTOGRAM metric{histogram{sample_count:9 sample_sum:-2.5 schema:1 zero_threshold:0.001 zero_count:2 negative_span{offset:0 length:1} negative_delta:3 positive_span{offset:-2 length:2} positive_span{offset:1 length:1} positive_delta:1 positive_delta:1 positive_delta:-1 exemplars{label{name:"a" value:"b"} value:1 timestamp{seconds:1600000000}} created_timestamp{seconds:1500000000}}}`, "m_bucket{@,le=\"+Inf\"} 9\nm_sum{@} -2.5\nm_count{@} 9"},
		"native and classic at once":              {`type:HISTOGRAM metric{histogram{sample_count:3 sample_sum:2.5 bucket{cumulative_count:1 upper_bound:1} bucket{cumulative_count:3 upper_bound:inf} schema:0 positive_span{offset:0 length:1} positive_delta:3}}`, "m_bucket{@,le=\"1\"} 1\nm_bucket{@,le=\"+Inf\"} 3\nm_sum{@} 2.5\nm_count{@} 3"},
		"native float histogram":                  {`type:HISTOGRAM metric{histogram{sample_count_float:5 sample_sum:2.5 schema:3 zero_threshold:0.001 zero_count_float:1 positive_span{offset:0 length:2} positive_count:1.5 positive_count:2.5}}`, "m_bucket{@,le=\"+Inf\"} 5\nm_sum{@} 2.5\nm_count{@} 5"},
		"native gauge histogram of floats":        {`type:GAUGE_HISTOGRAM metric{histogram{sample_count_float:1.5 sample_sum:2.5 schema:-4 negative_span{offset:0 length:1} negative_count:1.5}}`, "m_bucket{@,le=\"+Inf\"} 1.5\nm_sum{@} 2.5\nm_count{@} 1.5"},
		"native histogram without observations":   {`type:HISTOGRAM metric{histogram{sample_count:0 sample_sum:0 schema:8 zero_threshold:1e-128 zero_count:0 positive_span{offset:0 length:0}}}`, "m_bucket{@,le=\"+Inf\"} 0\nm_sum{@} 0\nm_count{@} 0"},
		"label values of all kinds of characters": {`type:GAUGE metric{label{name:"a" value:"\"\\\n\t\000é"} gauge{value:1}}`, "m{a=\"\\\"\\\\\\n\t\x00é\",@} 1"},
	} {
		t.Run("S8 "+name, func(t *testing.T) {
			s := start(t, gateway.StoreConfig{}, gateway.Memory())
			s.want(200, "PUT", "/j", delimited(t, `name:"m" help:"h" unit:"u" `+c.family), "Content-Type", protobufType)
			want := new(dto.MetricFamily)
			if err := prototext.Unmarshal([]byte(`name:"m" help:"h" `+c.family), want); err != nil {
				t.Fatal(err)
			}
			want.Metric[0].Label = append(want.Metric[0].Label,
				&dto.LabelPair{Name: proto.String("instance"), Value: proto.String("")}, &dto.LabelPair{Name: proto.String("job"), Value: proto.String("j")})
			if got := s.scrapeProtobuf("m"); !proto.Equal(got, want) {
				t.Errorf("got %v\nwant %v", got, want)
			}
			kind := strings.TrimPrefix(strings.ToLower(want.GetType().String()), "gauge_")
			exposed(t, s.scrape().Body.String(), "# HELP m h", "# TYPE m "+kind, c.text)
		})
	}
}

// TestTimesOfEvents is the table of section 8, as far as TestTimes doesn't have it.
func TestTimesOfEvents(t *testing.T) {
	const failed, pushed = `push_failure_time_seconds{instance="i",job="j"} `, `push_time_seconds{instance="i",job="j"} `
	for name, c := range map[string]struct {
		status             int
		method, path, body string
		failed, pushed     string // "": the group is gone
	}{
		"later good PUT":         {200, "PUT", "/j/instance/i", "m 1\n", "1.90000001e+09", "1.90000002e+09"},
		"later good POST":        {200, "POST", "/j/instance/i", "n 1\n", "1.90000001e+09", "1.90000002e+09"},
		"PUT without families":   {200, "PUT", "/j/instance/i", "", "1.90000001e+09", "1.90000002e+09"},
		"POST without families":  {200, "POST", "/j/instance/i", "", "1.90000001e+09", "1.90000002e+09"},
		"the key in other order": {200, "POST", "/j/job/x/instance@base64/aQ==", "", "1.90000001e+09", "1.90000002e+09"},
		"rejected push":          {400, "PUT", "/j/instance/i", "m 1 5\n", "1.90000002e+09", "1.9e+09"},
		"parse error":            {400, "PUT", "/j/instance/i", "m 1", "1.90000001e+09", "1.9e+09"},
		"URL error":              {400, "PUT", "/j/instance/i/x", "m 1\n", "1.90000001e+09", "1.9e+09"},
		"URL error of a delete":  {400, "DELETE", "/j/instance/i/x", "", "1.90000001e+09", "1.9e+09"},
		"delete":                 {202, "DELETE", "/j/instance/i", "", "", ""},
		"delete of another":      {202, "DELETE", "/j", "", "1.90000001e+09", "1.9e+09"},
	} {
		t.Run("8 "+name, func(t *testing.T) {
			clock := newClock()
			s := start(t, gateway.StoreConfig{Now: clock.now}, gateway.Memory())
			s.want(200, "PUT", "/j/instance/i", "m 1\n")
			clock.advance(10 * time.Second)
			s.want(400, "PUT", "/j/instance/i", "m 1 5\n")
			clock.advance(10 * time.Second)
			s.want(c.status, c.method, c.path, c.body)
			if c.pushed == "" {
				s.expectPush()
				return
			}
			s.expectPush(failed+c.failed, pushed+c.pushed)
		})
	}
	t.Run("8 wipe", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{}, gateway.Memory())
		s.want(200, "PUT", "/j", "m 1\n")
		s.want(400, "PUT", "/k", "m 1 5\n")
		w := httptest.NewRecorder()
		s.ServeWipe(w, httptest.NewRequest(http.MethodPut, "/api/v1/admin/wipe", nil))
		if got := s.samples(true); w.Code != 202 || got != "" {
			t.Errorf("got %d, and\n%s", w.Code, got)
		}
	})
}

// TestLabelRewriting is section 6, as far as TestLabels doesn't have it.
func TestLabelRewriting(t *testing.T) {
	for name, c := range map[string]struct{ path, body, want string }{
		"L1 instance of the key":         {"/j/instance/key", "m{instance=\"body\"} 1\n", `m{instance="key",job="j"} 1`},
		"L1 empty value of the key":      {"/j/a@base64/=", "m{a=\"body\"} 1\n", `m{a="",instance="",job="j"} 1`},
		"L1 le and quantile in the key":  {"/j/le/1/quantile/2", "m 1\n", `m{instance="",job="j",le="1",quantile="2"} 1`},
		"L2 no instance":                 {"/j", "m 1\n", `m{instance="",job="j"} 1`},
		"L2 empty instance in the body":  {"/j", "m{instance=\"\"} 1\n", `m{instance="",job="j"} 1`},
		"L3 sorted, as bytes":            {"/j/b/1/Z/2", "m{c=\"3\",a=\"4\",_=\"5\"} 1\n", `m{Z="2",_="5",a="4",b="1",c="3",instance="",job="j"} 1`},
		"S2 series by number and values": {"/j", "m{a=\"2\",c=\"1\"} 1\nm{b=\"1\"} 2\nm{a=\"10\"} 3\nm 4\nm{a=\"2\"} 5\n", "m{instance=\"\",job=\"j\"} 4\nm{b=\"1\",instance=\"\",job=\"j\"} 2\nm{a=\"10\",instance=\"\",job=\"j\"} 3\nm{a=\"2\",instance=\"\",job=\"j\"} 5\nm{a=\"2\",c=\"1\",instance=\"\",job=\"j\"} 1"},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, gateway.StoreConfig{}, gateway.Memory())
			s.want(200, "PUT", c.path, c.body)
			s.expect(c.want)
		})
	}
	t.Run("L1 many series", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{}, gateway.Memory())
		var body strings.Builder
		for i := range 10_000 {
			fmt.Fprintf(&body, "m{x=\"body\",i=\"%d\"} 1\n", i)
		}
		s.want(200, "PUT", "/j/a/1/x/key", body.String())
		if got := s.samples(false); strings.Count(got, `,instance="",job="j",x="key"} 1`) != 10_000 {
			t.Errorf("%d series have the label of their body", strings.Count(got, `x="body"`))
		}
	})
}

// TestProtobufRejections is section 7 for what text can't say, and what Prometheus
// would refuse of native histograms. Nothing is stored but the failure time.
func TestProtobufRejections(t *testing.T) {
	series := func(label string) string {
		return `name:"m" type:GAUGE metric{` + label + ` gauge{value:1}}`
	}
	native := func(fields string) string {
		return `name:"m" type:HISTOGRAM metric{histogram{sample_sum:1 ` + fields + `}}`
	}
	for name, c := range map[string]struct{ family, want string }{
		"T1 timestamp":                  {`name:"m" type:GAUGE metric{gauge{value:1} timestamp_ms:5}`, "timestamps are not allowed"},
		"T1 timestamp 0":                {`name:"m" type:GAUGE metric{gauge{value:1} timestamp_ms:0}`, "timestamps are not allowed"},
		"T2 in the body":                {`name:"m" type:GAUGE metric{gauge{value:1}} metric{gauge{value:1}}`, "already seen"},
		"T4 counter with a gauge":       {`name:"m" type:COUNTER metric{gauge{value:1}}`, "type counter"},
		"T4 no type with a gauge":       {`name:"m" metric{gauge{value:1}}`, "type counter"},
		"T4 summary with a histogram":   {`name:"m" type:SUMMARY metric{histogram{sample_count:1}}`, "type summary"},
		"T4 histogram with a summary":   {`name:"m" type:HISTOGRAM metric{summary{sample_count:1}}`, "type histogram"},
		"T4 untyped without a value":    {`name:"m" type:UNTYPED metric{}`, "type untyped"},
		"T8 two labels of one name":     {series(`label{name:"a" value:"1"} label{name:"a" value:"2"}`), `"a"`},
		"T8 empty label name":           {series(`label{name:"" value:"1"}`), `label name ""`},
		"T8 no label name":              {series(`label{value:"1"}`), `label name ""`},
		"T8 reserved label":             {series(`label{name:"__a" value:"1"}`), `"__a"`},
		"T8 __name__":                   {series(`label{name:"__name__" value:"n"}`), `"__name__"`},
		"T9 quantile of a summary":      {`name:"m" type:SUMMARY metric{label{name:"quantile" value:"0.5"} summary{sample_count:1}}`, `"quantile"`},
		"T9 le of a histogram":          {`name:"m" type:HISTOGRAM metric{label{name:"le" value:"1"} histogram{sample_count:1}}`, `"le"`},
		"T9 le of a gauge histogram":    {`name:"m" type:GAUGE_HISTOGRAM metric{label{name:"le" value:"1"} histogram{sample_count:1}}`, `"le"`},
		"T10 label name":                {series(`label{name:"a\377" value:"1"}`), `"a\xff"`},
		"T10 label value":               {series(`label{name:"a" value:"\377"}`), `not UTF-8`},
		"W5 empty metric name":          {`name:"" type:GAUGE metric{gauge{value:1}}`, `metric name ""`},
		"W5 no metric name":             {`type:GAUGE metric{gauge{value:1}}`, `metric name ""`},
		"W5 metric name":                {`name:"m\377" type:GAUGE metric{gauge{value:1}}`, `"m\xff"`},
		"W7 HELP":                       {`name:"m" type:GAUGE help:"\377" metric{gauge{value:1}}`, "HELP"},
		"native: schema too low":        {native(`sample_count:1 schema:-5 positive_span{offset:0 length:1} positive_delta:1`), "schema"},
		"native: schema too high":       {native(`sample_count:1 schema:9 positive_span{offset:0 length:1} positive_delta:1`), "schema"},
		"native: more spans":            {native(`sample_count:1 positive_span{offset:0 length:2} positive_delta:1`), "span"},
		"native: more buckets":          {native(`sample_count:2 positive_span{offset:0 length:1} positive_delta:1 positive_delta:0`), "span"},
		"native: negative offset":       {native(`sample_count:2 positive_span{offset:0 length:1} positive_span{offset:-1 length:1} positive_delta:1 positive_delta:0`), "span"},
		"native: negative bucket":       {native(`sample_count:1 positive_span{offset:0 length:1} positive_delta:-1`), "negative"},
		"native: count mismatch":        {native(`sample_count:3 positive_span{offset:0 length:1} positive_delta:1`), "count"},
		"native: negative float bucket": {native(`sample_count_float:1 positive_span{offset:0 length:1} positive_count:-2.5`), "negative"},
	} {
		t.Run(name, func(t *testing.T) {
			clock := newClock()
			s := start(t, gateway.StoreConfig{Now: clock.now}, gateway.Memory())
			s.want(200, "PUT", "/j", "before 1\n")
			clock.advance(time.Second)
			got := s.want(400, "POST", "/j", delimited(t, c.family, `name:"good" metric{counter{value:1}}`), "Content-Type", protobufType)
			wantWords(t, got, "invalid or inconsistent", c.want, `{job="j"}`, "metric ")
			s.expect(`before{instance="",job="j"} 1`)
			s.expectPush(`push_failure_time_seconds{instance="",job="j"} 1.900000001e+09`, `push_time_seconds{instance="",job="j"} 1.9e+09`)
		})
	}
}

// TestCollisions is T7 and T3 for the combinations that TestRejections doesn't have.
func TestCollisions(t *testing.T) {
	summary, histogram := "# TYPE x summary\nx_count 1\n", "# TYPE x histogram\nx_count 1\n"
	for name, c := range map[string]struct {
		before, body string
		status       int
	}{
		"T7 x_sum beside a summary":             {summary, "x_sum 1\n", 400},
		"T7 x_bucket beside a summary":          {summary, "x_bucket 1\n", 200},
		"T7 x_count beside a histogram":         {histogram, "# TYPE x_count gauge\nx_count 1\n", 400},
		"T7 x_sum beside a histogram":           {histogram, "x_sum 1\n", 400},
		"T7 x_bucket beside a histogram":        {histogram, "x_bucket 1\n", 400},
		"T7 x_bucket beside a gauge histogram":  {"# TYPE x gaugehistogram\nx_count 1\n", "x_bucket 1\n", 400},
		"T7 x_total beside a histogram":         {histogram, "x_total 1\n", 200},
		"T7 a histogram beside x_sum":           {"x_sum 1\n", histogram, 400},
		"T7 a summary beside x_bucket":          {"x_bucket 1\n", summary, 200},
		"T7 x_count beside a gauge":             {"# TYPE x gauge\nx 1\n", "x_count 1\n", 200},
		"T3 histogram and gauge histogram":      {histogram, "# TYPE x gaugehistogram\nx_count 1\n", 400},
		"T3 untyped and no TYPE":                {"# TYPE x untyped\nx 1\n", "x 1\n", 200},
		"T3 the same type":                      {summary, summary, 200},
		"T7 both in one body":                   {"", "x_count 1\n# TYPE x summary\nx{quantile=\"1\"} 1\n", 400},
		"T7 replaced by the same push":          {"", summary, 200},
		"not rejected: another HELP":            {"# HELP x one\nx 1\n", "# HELP x two\nx 1\n", 200},
		"not rejected: other label names":       {"x{a=\"1\"} 1\n", "x{b=\"1\"} 1\nx 1\n", 200},
		"not rejected: a negative counter":      {"", "# TYPE x counter\nx -1\n", 200},
		"not rejected: a counter that falls":    {"# TYPE x counter\nx 5\n", "# TYPE x counter\nx 4\n", 200},
		"not rejected: unsorted buckets":        {"", "# TYPE x histogram\nx_bucket{le=\"2\"} 2\nx_bucket{le=\"1\"} 1\nx_count 2\n", 200},
		"not rejected: repeated buckets":        {"", "# TYPE x histogram\nx_bucket{le=\"1\"} 2\nx_bucket{le=\"1.0\"} 1\nx_count 2\n", 200},
		"not rejected: no +Inf":                 {"", "# TYPE x histogram\nx_bucket{le=\"1\"} 1\n", 200},
		"not rejected: labels of the key":       {"", "x{job=\"other\"} 1\n", 200},
		"not rejected: label le of a gauge":     {"", "# TYPE x gauge\nx{le=\"a\",quantile=\"b\"} 1\n", 200},
		"not rejected: label le of a summary":   {"", "# TYPE x summary\nx{le=\"a\",quantile=\"1\"} 1\n", 200},
		"not rejected: quantile of a histogram": {"", "# TYPE x histogram\nx_bucket{le=\"1\",quantile=\"b\"} 1\n", 200},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, gateway.StoreConfig{}, gateway.Memory())
			s.want(200, "PUT", "/before", c.before)
			before := s.samples(false)
			s.want(c.status, "PUT", "/j", c.body)
			if after := s.samples(false); c.status == 400 && after != before || c.status == 200 && !strings.Contains(after, `job="j"`) {
				t.Errorf("got\n%s", after)
			}
			// Within the group of which the push takes all away it makes no difference.
			s.want(202, "DELETE", "/before", "")
			if c.before != "" {
				s.want(200, "PUT", "/j", c.body)
			}
		})
	}
	t.Run("7 several reasons", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{}, gateway.Memory())
		got := s.want(400, "PUT", "/j", "a 1 5\nb{__b=\"1\"} 1\nc 1\nd 1\nd 2\n")
		wantWords(t, got, "3 errors", "\n* metric \"a\": ", "\n* metric \"b\": ", "\n* metric \"d\": ")
	})
	t.Run("7 the type may change within a PUT", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{}, gateway.Memory())
		s.want(200, "PUT", "/j", "x_count 1\n")
		s.want(400, "POST", "/j", summary)
		s.want(200, "PUT", "/j", summary)
		s.expect(`x_sum{instance="",job="j"} 0`, `x_count{instance="",job="j"} 1`)
	})
}

// TestUTF8Names is section 10: names that the reference takes only when it is told
// to. U3 to U8 are in TestParsePath too.
func TestUTF8Names(t *testing.T) {
	for name, c := range map[string]struct{ body, want string }{
		"metric and label":               {`{"m.a","l.b"="c"} 1` + "\n", "# TYPE \"m.a\" untyped\n" + `{"m.a",@,"l.b"="c"} 1`},
		"the name at the end":            {`{a="b","m.a"} 1` + "\n", "# TYPE \"m.a\" untyped\n" + `{"m.a",a="b",@} 1`},
		"the name in the middle":         {`{a="b" , "m.a" , x="d" , } 1` + "\n", "# TYPE \"m.a\" untyped\n" + `{"m.a",a="b",@,x="d"} 1`},
		"legacy names in quotes":         {`{"m","a"="b"} 1` + "\n", "# TYPE m untyped\n" + `m{a="b",@} 1`},
		"a label alone in quotes":        {`m{"l.b"="c",} 1` + "\n", "# TYPE m untyped\n" + `m{@,"l.b"="c"} 1`},
		"escapes":                        {`{"a\"\\\n","l\"\\"="c"} 1` + "\n", "# TYPE \"a\\\"\\\\\\n\" untyped\n" + `{"a\"\\\n",@,"l\"\\"="c"} 1`},
		"braces and commas":              {`{"a}{,b","l=}"="c"} 1` + "\n", "# TYPE \"a}{,b\" untyped\n" + `{"a}{,b",@,"l=}"="c"} 1`},
		"characters that don't print":    {"{\"a\u00a0\tb\"} 1\n", "# TYPE \"a\u00a0\tb\" untyped\n{\"a\u00a0\tb\",@} 1"},
		"TYPE and HELP":                  {"# HELP \"m.a\" some help\n# TYPE \"m.a\" counter\n{\"m.a\"} 1\n", "# HELP \"m.a\" some help\n# TYPE \"m.a\" counter\n{\"m.a\",@} 1"},
		"histogram":                      {"# TYPE \"h.x\" histogram\n{\"h.x_bucket\",le=\"1\"} 1\n{le=\"+Inf\",\"h.x_bucket\"} 2\n{\"h.x_sum\"} 3\n{\"h.x_count\"} 2\n", "# TYPE \"h.x\" histogram\n{\"h.x_bucket\",@,le=\"1\"} 1\n{\"h.x_bucket\",@,le=\"+Inf\"} 2\n{\"h.x_sum\",@} 3\n{\"h.x_count\",@} 2"},
		"summary behind another metric":  {"# TYPE s summary\nm 1\n{\"s\",a=\"b\",quantile=\"1\"} 2\n", "# TYPE m untyped\nm{@} 1\n# TYPE s summary\ns{a=\"b\",@,quantile=\"1\"} 2\ns_sum{a=\"b\",@} 0\ns_count{a=\"b\",@} 0"},
		"histogram behind another":       {"# TYPE h histogram\nm 1\n{\"h_bucket\",a=\"b\",le=\"1\"} 2\n", "# TYPE h histogram\nh_bucket{a=\"b\",@,le=\"1\"} 2\nh_bucket{a=\"b\",@,le=\"+Inf\"} 0\nh_sum{a=\"b\",@} 0\nh_count{a=\"b\",@} 0\n# TYPE m untyped\nm{@} 1"},
		"a count without the labels":     {"# TYPE h histogram\nh_count{a=\"1\"} 5\nm 1\n{\"h_count\"} 1\n", "# TYPE h histogram\nh_bucket{@,le=\"+Inf\"} 1\nh_sum{@} 0\nh_count{@} 1\nh_bucket{a=\"1\",@,le=\"+Inf\"} 5\nh_sum{a=\"1\",@} 0\nh_count{a=\"1\",@} 5\n# TYPE m untyped\nm{@} 1"},
		"quantile in front of the name":  {"# TYPE s summary\nm 1\n{quantile=\"1\",\"s\"} 2\n", "# TYPE m untyped\nm{@} 1\n# TYPE s summary\ns{@,quantile=\"1\"} 2\ns_sum{@} 0\ns_count{@} 0"},
		"le in front of the name, gauge": {"# TYPE h histogram\nh_count 1\n{le=\"5\",\"m\"} 2\n", "# TYPE h histogram\nh_bucket{@,le=\"+Inf\"} 1\nh_sum{@} 0\nh_count{@} 1\n# TYPE m untyped\nm{@,le=\"5\"} 2"},
	} {
		t.Run("U1 "+name, func(t *testing.T) {
			s := start(t, gateway.StoreConfig{}, gateway.Memory())
			defer func() {
				if p := recover(); p != nil {
					t.Errorf("the push panics: %v", p)
				}
			}()
			s.want(200, "PUT", "/j", c.body)
			exposed(t, s.scrape("Accept", "text/plain; escaping=allow-utf-8").Body.String(), c.want)
		})
	}
	for path, want := range map[string]string{
		"P3 /j/a-b/x":                   `{a-b="x",job="j"}`,
		"P3 /j/a:b/x":                   `{a:b="x",job="j"}`,
		"P3 /j/1x/x":                    `{1x="x",job="j"}`,
		"P7 /j/U__a_2e_b/1/a.b/2":       `{a.b="2",job="j"}`,
		"U2 /j/a b/x":                   `{a b="x",job="j"}`,
		"U3 /j/u__foo_2e_bar/x":         `{job="j",u__foo_2e_bar="x"}`,
		"U3 /j/U__a_1f600_b/x":          `{a😀b="x",job="j"}`,
		"U3 /j/U__U__x/x":               `{U_x="x",job="j"}`,
		"U3 /j/U___7B__7d_/x":           `{job="j",{}="x"}`,
		"U4 /j/U___/x":                  `{U___="x",job="j"}`,
		"U4 /j/U__a_110000_b/x":         `{U__a_110000_b="x",job="j"}`,
		"U6 /j/U__instance@base64/YmF6": `{instance="baz",job="j"}`,
	} {
		t.Run(path, func(t *testing.T) {
			if key, err := gateway.ParsePath(path[3:]); err != nil || key.String() != want {
				t.Errorf("got %s, %v, want %s", key, err, want)
			}
		})
	}
}

// TestEscaping is S11 and S12: names outside the legacy rules as the scraper wants
// them, in text and in protobuf.
func TestEscaping(t *testing.T) {
	s := start(t, gateway.StoreConfig{}, gateway.Memory())
	s.want(200, "PUT", "/j/k.1/v", "# HELP \"a.b\" h\n# TYPE \"a.b\" gauge\n{\"a.b\",\"l.2\"=\"w\"} 1\n{\"a.b\"} 2\nplain 3\n")
	for escaping, want := range map[string]struct{ name, key, label string }{
		"":            {"a_b", "k_1", "l_2"},
		"underscores": {"a_b", "k_1", "l_2"},
		"unknown":     {"a_b", "k_1", "l_2"},
		"dots":        {"a_dot_b", "k_dot_1", "l_dot_2"},
		"values":      {"U__a_2e_b", "U__k_2e_1", "U__l_2e_2"},
		"allow-utf-8": {`a.b`, `k.1`, `l.2`},
		"ALLOW-UTF-8": {"a_b", "k_1", "l_2"},
	} {
		t.Run("S12 escaping="+escaping, func(t *testing.T) {
			param, scheme := "", escaping
			if escaping != "" {
				param = ";escaping=" + escaping
			}
			if want.name == "a_b" {
				scheme = "underscores"
			}
			name, series, key, label := want.name, want.name+"{", want.key, want.label
			if scheme == "allow-utf-8" {
				name, series, key, label = `"a.b"`, `{"a.b",`, `"k.1"`, `"l.2"`
			}
			w := s.scrape("Accept", "text/plain;version=0.0.4"+param)
			if got, want := w.Header().Get("Content-Type"), "text/plain; version=0.0.4; charset=utf-8; escaping="+scheme; got != want {
				t.Errorf("got Content-Type %q, want %q", got, want)
			}
			exposed(t, w.Body.String(), "# HELP "+name+" h", "# TYPE "+name+" gauge",
				fmt.Sprintf(`%s@,%s="v"} 2`, series, key), fmt.Sprintf(`%s@,%s="v",%s="w"} 1`, series, key, label),
				"# TYPE plain untyped", fmt.Sprintf(`plain{@,%s="v"} 3`, key))

			w = s.scrape("Accept", strings.ReplaceAll(protobufType, " ", "")+param)
			if got, want := w.Header().Get("Content-Type"), protobufType+"; escaping="+scheme; got != want {
				t.Errorf("got Content-Type %q, want %q", got, want)
			}
			families := map[string]*dto.MetricFamily{}
			for body := bufio.NewReader(w.Body); ; {
				f := new(dto.MetricFamily)
				if protodelim.UnmarshalFrom(body, f) != nil {
					break
				}
				families[f.GetName()] = f
			}
			if f := families[want.name]; f == nil || f.Metric[1].Label[2].GetName() != want.key || f.Metric[1].Label[3].GetName() != want.label {
				t.Errorf("protobuf: got %v", families)
			}
			if f := families["push_time_seconds"]; f == nil || f.Metric[0].Label[2].GetName() != want.key {
				t.Errorf("protobuf: got %v", families)
			}
		})
	}
}

// TestFormats is S10: which format answers an Accept header. OpenMetrics only where
// neither text nor protobuf would do.
func TestFormats(t *testing.T) {
	const (
		text        = "text/plain; version=0.0.4; charset=utf-8; escaping=underscores"
		protobuf    = protobufType + "; escaping=underscores"
		asked       = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding="
		openMetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8; escaping="
	)
	s := start(t, gateway.StoreConfig{}, gateway.Memory())
	s.want(200, "PUT", "/j", "# TYPE m_total counter\nm_total 1\n")
	for accept, want := range map[string]struct{ contentType, body string }{
		"":                         {text, "# TYPE m_total counter\nm_total{"},
		"*/*":                      {text, "# TYPE m_total counter\nm_total{"},
		"text/plain":               {text, "# TYPE m_total counter\nm_total{"},
		"text/plain;version=0.0.4": {text, "# TYPE m_total counter\nm_total{"},
		"text/plain;version=0.0.5": {text, "# TYPE m_total counter\nm_total{"},
		"text/html,image/*;q=0.9":  {text, "# TYPE m_total counter\nm_total{"},
		"nonsense;;q=x":            {text, "# TYPE m_total counter\nm_total{"},
		asked + "delimited":        {protobuf, "\n\am_total"},
		asked + "text":             {"application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=text; escaping=underscores", `"m_total"`},
		asked + "compact-text":     {"application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=compact-text; escaping=underscores", `"m_total"`},
		asked + "other":            {text, "# TYPE m_total counter\nm_total{"},
		asked + "delimited;q=0.1,text/plain;q=0.9":                                {text, "# TYPE m_total counter\nm_total{"},
		"text/plain;q=0.1," + asked + "delimited;q=0.9":                           {protobuf, "\n\am_total"},
		"application/openmetrics-text;version=1.0.0,text/plain;q=0.1":             {text, "# TYPE m_total counter\nm_total{"},
		"application/openmetrics-text;version=1.0.0,*/*;q=0.1":                    {text, "# TYPE m_total counter\nm_total{"},
		"application/openmetrics-text;version=1.0.0," + asked + "delimited;q=0.1": {protobuf, "\n\am_total"},
		"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8":         {openMetrics + "allow-utf-8", "# TYPE m counter\nm_total{"},
		"application/openmetrics-text;version=1.0.0,image/png":                    {openMetrics + "underscores", "# TYPE m counter\nm_total{"},
		"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1": {"text/plain; version=0.0.4; charset=utf-8; escaping=allow-utf-8", "# TYPE m_total counter\nm_total{"},
		asked + "delimited;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2":                                                                                                   {protobuf, "\n\am_total"},
	} {
		t.Run("S10 "+accept, func(t *testing.T) {
			w := s.scrape("Accept", accept)
			if got := w.Header().Get("Content-Type"); got != want.contentType {
				t.Errorf("got Content-Type %q, want %q", got, want.contentType)
			}
			body := w.Body.String()
			wantWords(t, body, want.body)
			if strings.HasSuffix(body, "# EOF\n") != strings.HasPrefix(want.contentType, openMetrics) {
				t.Errorf("got the end %q", body[len(body)-20:])
			}
		})
	}
}

// TestGzip is S13, and a push that is compressed, with both implementations.
func TestGzip(t *testing.T) {
	for implementation, zip := range map[string]*gateway.Gzip{"compress/gzip": nil, "fastgzip": fastgzip.Gzip} {
		s := startGateway(t, gateway.Config{Gzip: zip}, gateway.StoreConfig{}, gateway.Memory())
		var packed bytes.Buffer
		zw := gzip.NewWriter(&packed)
		io.WriteString(zw, "m 1\n")
		zw.Close()
		s.want(200, "PUT", "/j", packed.String(), "Content-Encoding", "gzip")
		s.want(400, "PUT", "/j", packed.String()[:packed.Len()-1], "Content-Encoding", "gzip")
		s.want(400, "PUT", "/j", "m 2\n", "Content-Encoding", "gzip")
		plain := s.scrape().Body.String()
		exposed(t, plain, "# TYPE m untyped\nm{@} 1")
		for accept, want := range map[string]bool{
			"gzip": true, "deflate, gzip;q=0.5, *;q=0": true, "zstd,gzip": true, "gzip;q=0.001": true,
			"": false, "gzip;q=0": false, "gzip;q=0.0, identity": false, "*": false, "*;q=1": false, "identity": false, "zstd": false, "deflate": false, "br, snappy": false, "x-gzip": false,
		} {
			t.Run("S13 "+implementation+" "+accept, func(t *testing.T) {
				w := s.scrape("Accept-Encoding", accept)
				if got := w.Header().Get("Content-Encoding"); (got == "gzip") != want || got != "" && got != "gzip" {
					t.Errorf("got Content-Encoding %q", got)
				}
				body := io.Reader(w.Body)
				if want {
					zr, err := gzip.NewReader(body)
					if err != nil {
						t.Fatal(err)
					}
					body = zr
				}
				if got, err := io.ReadAll(body); err != nil || string(got) != plain {
					t.Errorf("got %q, %v, want %q", got, err, plain)
				}
				if got := w.Header().Get("Vary"); !strings.Contains(got, "Accept-Encoding") {
					t.Errorf("got Vary %q", got)
				}
			})
		}
	}
}

// TestExposition is what section 11 says of families: S1, S3 to S5, S8, with W3.
func TestExposition(t *testing.T) {
	for name, c := range map[string]struct {
		pushes [][2]string // path and body
		want   string
	}{
		"S1 families sorted as bytes": {[][2]string{{"/j", "b 1\nB 2\na_ 3\na 4\nA 5\n_ 6\n"}},
			"# TYPE A untyped\nA{@} 5\n# TYPE B untyped\nB{@} 2\n# TYPE _ untyped\n_{@} 6\n# TYPE a untyped\na{@} 4\n# TYPE a_ untyped\na_{@} 3\n# TYPE b untyped\nb{@} 1"},
		"S3 HELP": {[][2]string{{"/j", "# HELP a some \\\\ \\n help\na 1\nb 1\n# HELP c \nc 1\n# HELP d alone\n"}},
			"# HELP a some \\\\ \\n help\n# TYPE a untyped\na{@} 1\n# TYPE b untyped\nb{@} 1\n# TYPE c untyped\nc{@} 1"},
		"S5 groups as one family": {[][2]string{{"/k", "m 1\n"}, {"/j", "m 2\n"}, {"/j/instance/i", "m 3\n"}},
			"# TYPE m untyped\nm{instance=\"i\",job=\"j\"} 3\nm{@} 2\nm{instance=\"\",job=\"k\"} 1"},
		"S5, W3 the most recent HELP": {[][2]string{{"/j", "# HELP m one\nm 1\n"}, {"/k", "# HELP m two\nm 2\n"}},
			"# HELP m two\n# TYPE m untyped\nm{@} 1\nm{instance=\"\",job=\"k\"} 2"},
		"S5, W3 the most recent push, of the first": {[][2]string{{"/k", "# HELP m two\nm 2\n"}, {"/j", "# HELP m one\nm 1\n"}},
			"# HELP m one\n# TYPE m untyped\nm{@} 1\nm{instance=\"\",job=\"k\"} 2"},
		"S5, W3 a missing HELP counts as different": {[][2]string{{"/j", "# HELP m one\nm 1\n"}, {"/k", "m 2\n"}},
			"# TYPE m untyped\nm{@} 1\nm{instance=\"\",job=\"k\"} 2"},
		"S8 buckets as they were pushed": {[][2]string{{"/j", "# TYPE m histogram\nm_bucket{le=\"5\"} 2\nm_bucket{le=\"1\"} 1\nm_bucket{le=\"+Inf\"} 3\nm_bucket{le=\"7\"} 2\nm_count 4\nm_sum 5\n"}},
			"# TYPE m histogram\nm_bucket{@,le=\"5\"} 2\nm_bucket{@,le=\"1\"} 1\nm_bucket{@,le=\"+Inf\"} 3\nm_bucket{@,le=\"7\"} 2\nm_sum{@} 5\nm_count{@} 4"},
		"S8 +Inf is the count": {[][2]string{{"/j", "# TYPE m histogram\nm_bucket{le=\"5\"} 2\nm_count 4\nm_sum -5.5\n"}},
			"# TYPE m histogram\nm_bucket{@,le=\"5\"} 2\nm_bucket{@,le=\"+Inf\"} 4\nm_sum{@} -5.5\nm_count{@} 4"},
		"S8 summary": {[][2]string{{"/j", "# TYPE m summary\nm{quantile=\"0.9\"} NaN\nm{quantile=\"0.5\"} 1\nm_count 4\nm_sum 1e6\n"}},
			"# TYPE m summary\nm{@,quantile=\"0.9\"} NaN\nm{@,quantile=\"0.5\"} 1\nm_sum{@} 1e+06\nm_count{@} 4"},
	} {
		t.Run(name, func(t *testing.T) {
			clock := newClock()
			s := start(t, gateway.StoreConfig{Now: clock.now}, gateway.Memory())
			for _, p := range c.pushes {
				s.want(200, "PUT", p[0], p[1])
				clock.advance(time.Second)
			}
			for range 2 {
				exposed(t, s.scrape().Body.String(), c.want)
			}
		})
	}
	t.Run("S5, W3 the HELP goes with its group", func(t *testing.T) {
		clock := newClock()
		s := start(t, gateway.StoreConfig{Now: clock.now}, gateway.Memory())
		for _, job := range []string{"j", "k", "l"} {
			s.want(200, "PUT", "/"+job, "# HELP m of "+job+"\nm 1\n")
			clock.advance(time.Second)
		}
		s.want(200, "PUT", "/k", "# HELP m of k\nm 1\n")
		for _, job := range []string{"k", "l", "j"} {
			wantWords(t, s.scrape().Body.String(), "# HELP m of "+job+"\n")
			s.want(202, "DELETE", "/"+job, "")
		}
	})
	t.Run("S5, W3 the most recent push is the latest made, not the latest that came", func(t *testing.T) {
		clock := newClock()
		s := start(t, gateway.StoreConfig{Now: clock.now}, gateway.Memory())
		for range 2 {
			s.want(200, "PUT", "/j", "# HELP m one\nm 1\n")
			clock.advance(10 * time.Second)
		}
		s.want(200, "PUT", "/k", "# HELP m two\nm 1\n", "Culvert-Push-Time", "1900000005")
		wantWords(t, s.scrape().Body.String(), "# HELP m one\n")
	})
	t.Run("S8 an empty store", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{}, gateway.Memory())
		if w := s.scrape(); w.Code != 200 || w.Body.Len() != 0 {
			t.Errorf("got %d %s", w.Code, w.Body)
		}
	})
}

// stored is a backend that keeps records and marks, can fail, and can be stopped.
type stored struct {
	gateway.Backend
	records map[string][]byte
	marks   map[string][]byte
	fails   atomic.Bool
	gate    chan struct{} // not nil: each change waits for a value
}

func (b *stored) Load(f func(gateway.Record) error, mark func(gateway.Mark) error) error {
	for _, data := range b.marks {
		var m gateway.Mark
		if err := m.UnmarshalBinary(data); err != nil {
			return err
		}
		if err := mark(m); err != nil {
			return err
		}
	}
	for _, data := range b.records {
		var r gateway.Record
		if err := r.UnmarshalBinary(data); err != nil {
			return err
		}
		if err := f(r); err != nil {
			return err
		}
	}
	return nil
}

func (b *stored) Probe() error {
	if b.fails.Load() {
		return errors.New("disk full")
	}
	return nil
}

func (b *stored) Apply(changes []gateway.Change, marks []gateway.Mark) error {
	if b.gate != nil {
		<-b.gate
	}
	if err := b.Probe(); err != nil {
		return err
	}
	for _, c := range changes {
		delete(b.records, c.ID)
		if c.Record != nil {
			data, err := c.Record.AppendBinary(nil)
			if err != nil {
				return err
			}
			b.records[c.ID] = data
		}
	}
	for _, m := range marks {
		delete(b.marks, m.Spool)
		if m.Seq != 0 {
			data, err := m.AppendBinary(nil)
			if err != nil {
				return err
			}
			b.marks[m.Spool] = data
		}
	}
	return nil
}

func newStored() *stored {
	return &stored{Backend: gateway.Memory(), records: map[string][]byte{}, marks: map[string][]byte{}}
}

// query returns the answer of GET /api/v1/metrics.
func (s server) query() string {
	w := httptest.NewRecorder()
	s.ServeQuery(w, httptest.NewRequest(http.MethodGet, "/api/v1/metrics", nil))
	return w.Body.String()
}

// TestWeakPoints is section 19: what is better here than in the reference. W5, W7
// and W13 are rows of TestProtobufRejections and TestTextRefused, W16 is
// TestExpiry; what needs the whole server is in its package.
func TestWeakPoints(t *testing.T) {
	t.Run("W1 a key at fault creates nothing", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{}, gateway.Memory())
		s.want(200, "PUT", "/j", "m 1\n")
		before := s.samples(true)
		for path, body := range map[string]string{
			"/j/a@base64/_w": "n 1\n", "/j/U______x/1": "n 1\n", "/j/__x/1": "n 1\n", "/j/instance/": "n 1\n", "/j/instance@base64/=": "n 1 5\n",
		} {
			s.want(400, "PUT", path, body)
			if after := s.samples(true); after != before {
				t.Errorf("%q: got\n%s", path, after)
			}
		}
		s.want(200, "PUT", "/other", "m 1\n")
	})
	t.Run("W2 contradictions elsewhere don't matter", func(t *testing.T) {
		backend := newStored()
		for path, body := range map[string]string{"/a": "# TYPE m counter\nm 1\n", "/b": "# TYPE m gauge\nm 1\n"} {
			one := newStored()
			t.Run(path, func(t *testing.T) { start(t, gateway.StoreConfig{}, one).want(200, "PUT", path, body) })
			for id, r := range one.records {
				backend.records[id] = r
			}
		}
		s := start(t, gateway.StoreConfig{}, backend)
		if w := s.scrape(); w.Code != 200 {
			t.Errorf("got %d %s", w.Code, w.Body)
		}
		s.want(200, "PUT", "/c", "n 1\n")
		s.want(400, "PUT", "/c", "m 1\n")
	})
	t.Run("W4 the failure time is the server's", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{Now: newClock().now}, gateway.Memory())
		for range 2 {
			s.want(200, "PUT", "/j", delimited(t, `name:"push_failure_time_seconds" type:SUMMARY metric{label{name:"__a" value:"\377"} summary{sample_count:1}}`, `name:"push_time_seconds" metric{counter{value:1}}`), "Content-Type", protobufType)
			s.expectPush(`push_failure_time_seconds{instance="",job="j"} 0`, `push_time_seconds{instance="",job="j"} 1.9e+09`)
		}
	})
	for name, c := range map[string]struct{ first, path, second string }{
		"metric names":                     {"{\"a.b\"} 1\n", "/j/a_b/1", "{\"a-b\"} 1\n"},
		"metric names of one body":         {"", "/j/a_b/1", "c_d 1\n{\"c.d\"} 1\n"},
		"a summary's series":               {"x_y_count 1\n", "/j/a_b/1", "# TYPE \"x.y\" summary\n{\"x.y_count\"} 1\n"},
		"a histogram's series":             {"# TYPE \"x.y\" histogram\n{\"x.y_count\"} 1\n", "/j/a_b/1", "x_y_bucket{le=\"+Inf\"} 1\n"},
		"a histogram's series of one body": {"", "/j/a_b/1", "x_y_sum 1\n# TYPE \"x.y\" histogram\n{\"x.y_count\"} 1\n"},
		"label names of two series":        {"", "/j/a_b/1", "m{\"x.y\"=\"1\"} 1\nm{x_y=\"1\"} 2\n"},
		"label names of two keys":          {"n 1\n", "/j/a-b/1", "m 1\n"},
	} {
		t.Run("W6 escaped alike: "+name, func(t *testing.T) {
			s := start(t, gateway.StoreConfig{}, gateway.Memory())
			s.want(200, "PUT", "/j/a_b/1", c.first)
			answer := s.do("POST", c.path, c.second)
			seen := map[string]bool{}
			for line := range strings.SplitSeq(s.samples(true), "\n") {
				series := line[:strings.LastIndexByte(line, ' ')]
				if seen[series] {
					t.Errorf("the push was answered %d, and %s is exposed twice", answer.Code, series)
				}
				seen[series] = true
			}
		})
	}
	t.Run("W8 fixed keys in JSON stay", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{}, gateway.Memory())
		s.want(200, "PUT", "/j", "labels 1\nlast_push_successful 0\n")
		wantWords(t, s.query(), `"labels":{"job":"j"},"last_push_successful":true`)
		s.expect(`labels{instance="",job="j"} 1`, `last_push_successful{instance="",job="j"} 0`)
	})
	t.Run("W9 gauge histograms in JSON", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{}, gateway.Memory())
		s.want(200, "PUT", "/j", "# TYPE m gaugehistogram\nm_bucket{le=\"1\"} 1\nm_sum 2.5\nm_count 3\n")
		wantWords(t, s.query(), `"type":"GAUGE_HISTOGRAM","metrics":[{"labels":{"instance":"","job":"j"},"buckets":{"1":"1"},"count":"3","sum":"2.5"}]`)
	})
	for name, c := range map[string]struct{ method, path string }{
		"PUT": {"PUT", "/j"}, "POST": {"POST", "/j"}, "PUT of a new group": {"PUT", "/new"}, "DELETE": {"DELETE", "/j"},
	} {
		t.Run("W10 a write that fails changes nothing: "+name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				backend := newStored()
				s := start(t, gateway.StoreConfig{}, backend)
				s.want(200, "PUT", "/j", "m 1\nn 1\n")
				before := s.samples(true)
				backend.fails.Store(true)
				for range 2 { // the second is refused without a try
					w := s.do(c.method, c.path, "m 2\n")
					if w.Code != 503 || w.Header().Get("Retry-After") == "" || !strings.Contains(w.Body.String(), "disk full") {
						t.Errorf("got %d %v %s", w.Code, w.Header(), w.Body)
					}
					if after := s.samples(true); after != before {
						t.Errorf("the series changed from\n%s\nto\n%s", before, after)
					}
				}
				backend.fails.Store(false)
				time.Sleep(6 * time.Second) // until the store has tried
				s.want(200, "POST", "/j", "m 2\n")
				s.expect(`m{instance="",job="j"} 2`, `n{instance="",job="j"} 1`)
			})
		})
	}
	t.Run("W10 failed writes are told until they are over", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			backend := newStored()
			store, err := gateway.OpenStore(gateway.StoreConfig{Logger: slog.New(slog.DiscardHandler)}, backend)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			go store.Run(ctx)
			s := server{t, gateway.New(gateway.Config{}, store), store}
			backend.fails.Store(true)
			s.want(503, "PUT", "/j", "m 1\n")
			time.Sleep(time.Minute) // of the bubble's clock, as all here
			if err := store.Err(); !errors.Is(err, gateway.ErrUnavailable) {
				t.Errorf("got %v", err)
			}
			backend.fails.Store(false)
			time.Sleep(time.Minute)
			if err := store.Err(); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	})
	t.Run("W11 a bounded wait", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			const queue = 1000
			backend := newStored()
			backend.gate = make(chan struct{})
			s := start(t, gateway.StoreConfig{}, backend)
			codes := make(chan int, queue+1)
			send := func(method, path string) {
				go func() { codes <- s.do(method, path, "m 1\n").Code }()
			}
			send("PUT", "/j") // is being written
			synctest.Wait()
			for range queue {
				send("DELETE", "/j")
			}
			synctest.Wait()
			began := time.Now()
			for _, method := range []string{"PUT", "DELETE"} {
				w := s.do(method, "/k", "m 1\n")
				if w.Code != 503 || w.Header().Get("Retry-After") == "" {
					t.Errorf("%s: got %d %v %s", method, w.Code, w.Header(), w.Body)
				}
			}
			if took := time.Since(began); took > time.Minute {
				t.Errorf("the answers took %s", took)
			}
			if w := s.scrape(); w.Code != 200 {
				t.Errorf("a scrape meanwhile: got %d", w.Code)
			}
			close(backend.gate)
			got := map[int]int{}
			for range queue + 1 {
				got[<-codes]++
			}
			if got[200] != 1 || got[202] != queue {
				t.Errorf("got the answers %v", got)
			}
		})
	})
	t.Run("W12 slow senders", func(t *testing.T) {
		for name, c := range map[string]struct {
			pause time.Duration
			most  time.Duration
			want  int
		}{
			"one that stops":          {0, time.Minute, 408},
			"one that drips":          {20 * time.Second, 11 * time.Minute, 408},
			"one that takes its time": {time.Second, 2 * time.Minute, 200},
		} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) { slowSender(t, c.pause, c.most, c.want) })
			})
		}
	})
	t.Run("W12 no push holds its place for ever", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := start(t, gateway.StoreConfig{}, gateway.Memory())
			for range 100 * runtime.GOMAXPROCS(0) {
				func() {
					defer func() { _ = recover() }() // the server does that too
					s.do("PUT", "/j", "# TYPE s summary\nm 1\n{\"s\",a=\"b\"} 2\n")
				}()
			}
			s.want(200, "PUT", "/j", "m 1\n")
		})
	})
	t.Run("W15 contradictions within a family pass", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{}, gateway.Memory())
		s.want(200, "PUT", "/j", "# TYPE h histogram\nh_bucket{le=\"2\"} 5\nh_bucket{le=\"1\"} 7\nh_bucket{le=\"1\"} 8\nh_count 1\n# TYPE s summary\ns_count -1\n")
		wantWords(t, s.samples(false), `h_bucket{instance="",job="j",le="1"} 8`, `h_count{instance="",job="j"} 1`, `s_count{`)
	})
	t.Run("W17 a label name with a slash", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{}, gateway.Memory())
		s.want(200, "PUT", "/j/U__a_2F_b@base64/Yy9k", "m 1\n")
		wantWords(t, s.query(), `"labels":{"a/b":"c/d","job":"j"}`)
		s.want(202, "DELETE", "/j/U__a_2f_b@base64/Yy9k", "")
		s.expectPush()
	})
}

// slowSender sends a push with a pause behind each byte; 0: it stops after the
// first.
func slowSender(t *testing.T, pause, most time.Duration, want int) {
	s := start(t, gateway.StoreConfig{}, gateway.Memory())
	near, far := net.Pipe()
	listener := &pipeListener{conns: make(chan net.Conn, 1), closed: make(chan struct{})}
	listener.conns <- far
	closed := make(chan struct{})
	server := &http.Server{ConnState: func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			close(closed)
		}
	}, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { s.ServePush(w, r, "/slow") })}
	go server.Serve(listener)
	sent := make(chan struct{})
	defer func() {
		near.Close()
		server.Close()
		<-sent
		<-closed
	}()
	body := "# a body that is sent byte by byte\nm 1\n"
	size := len(body)
	if want != 200 {
		size = 1 << 20
	}
	began := time.Now()
	go func() {
		defer close(sent)
		fmt.Fprintf(near, "PUT / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n", size)
		for i := range size {
			if _, err := near.Write([]byte{body[min(i, len(body)-1)]}); err != nil || pause == 0 {
				return
			}
			time.Sleep(pause)
		}
	}()
	a, err := http.ReadResponse(bufio.NewReader(near), nil)
	if err != nil {
		t.Fatal(err)
	}
	a.Body.Close()
	if took := time.Since(began); a.StatusCode != want || took > most {
		t.Errorf("got %d after %s, want %d within %s", a.StatusCode, took, want, most)
	}
	if got := s.samples(true); (got != "") != (want == 200) {
		t.Errorf("got\n%s", got)
	}
}

// pipeListener accepts the connections that it is given.
type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { close(l.closed); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.TCPAddr{} }
