package gateway_test

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/gateway/boltstore"
)

// clock is a clock that the test sets.
type clock struct{ nanos atomic.Int64 }

func newClock() *clock {
	c := new(clock)
	c.nanos.Store(time.Unix(1_900_000_000, 0).UnixNano())
	return c
}

func (c *clock) now() time.Time          { return time.Unix(0, c.nanos.Load()) }
func (c *clock) advance(d time.Duration) { c.nanos.Add(int64(d)) }

// server is a gateway that runs for the time of a test.
type server struct {
	t testing.TB
	*gateway.Gateway
	store *gateway.Store
}

func start(t testing.TB, config gateway.StoreConfig, backend gateway.Backend) server {
	t.Helper()
	return startGateway(t, gateway.Config{}, config, backend)
}

func startGateway(t testing.TB, own gateway.Config, config gateway.StoreConfig, backend gateway.Backend) server {
	t.Helper()
	config.Logger = slog.New(slog.DiscardHandler)
	store, err := gateway.OpenStore(config, backend)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- store.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return server{t, gateway.New(own, store), store}
}

// do sends a request for /metrics/job + path.
func (s server) do(method, path, body string, header ...string) *httptest.ResponseRecorder {
	s.t.Helper()
	r := httptest.NewRequest(method, "/metrics/job"+path, strings.NewReader(body))
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	rest, _, _ := strings.Cut(path, "?")
	w := httptest.NewRecorder()
	if method == http.MethodDelete {
		s.ServeDelete(w, r, rest)
	} else {
		s.ServePush(w, r, rest)
	}
	return w
}

func (s server) want(status int, method, path, body string, header ...string) string {
	s.t.Helper()
	w := s.do(method, path, body, header...)
	if w.Code != status {
		s.t.Errorf("%s %s: got %d %s, want %d", method, path, w.Code, w.Body, status)
	}
	return w.Body.String()
}

// samples returns the exposition without comments and the groups' times, unless
// all is asked for.
func (s server) samples(all bool) string {
	s.t.Helper()
	w := httptest.NewRecorder()
	gateway.ServeMetrics(s.Gateway, w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	var lines []string
	for line := range strings.Lines(w.Body.String()) {
		if !strings.HasPrefix(line, "#") && (all || !strings.HasPrefix(line, "push_")) {
			lines = append(lines, strings.TrimSuffix(line, "\n"))
		}
	}
	return strings.Join(lines, "\n")
}

func (s server) expect(want ...string) {
	s.t.Helper()
	if got := s.samples(false); got != strings.Join(want, "\n") {
		s.t.Errorf("got\n%s\nwant\n%s", got, strings.Join(want, "\n"))
	}
}

// expectPush compares the families that the gateway makes.
func (s server) expectPush(want ...string) {
	s.t.Helper()
	var got []string
	for line := range strings.SplitSeq(s.samples(true), "\n") {
		if strings.HasPrefix(line, "push_") {
			got = append(got, line)
		}
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		s.t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestEffects is section 5 of the contract: what a push or a deletion does.
func TestEffects(t *testing.T) {
	s := start(t, gateway.StoreConfig{Now: newClock().now}, gateway.Memory())
	s.want(200, "PUT", "/j", "a 1\nb 2\n")
	s.want(200, "POST", "/j", "b{x=\"1\"} 5\n")
	s.expect(`a{instance="",job="j"} 1`, `b{instance="",job="j",x="1"} 5`)
	s.want(200, "PUT", "/j", "c 3\n")
	s.expect(`c{instance="",job="j"} 3`)
	s.want(200, "POST", "/j", "")
	s.expect(`c{instance="",job="j"} 3`)
	s.want(200, "PUT", "/j/instance/i", "c 4\n")
	s.expect(`c{instance="i",job="j"} 4`, `c{instance="",job="j"} 3`)
	s.want(202, "DELETE", "/j", "")
	s.expect(`c{instance="i",job="j"} 4`)
	s.want(202, "DELETE", "/unknown", "")
	s.want(200, "PUT", "/j/instance/i", "")
	s.expect()
	s.expectPush(`push_failure_time_seconds{instance="i",job="j"} 0`, `push_time_seconds{instance="i",job="j"} 1.9e+09`)
}

// TestTimes is section 8: the series that the gateway adds.
func TestTimes(t *testing.T) {
	c := newClock()
	s := start(t, gateway.StoreConfig{Now: c.now}, gateway.Memory())
	s.want(200, "PUT", "/j", "a 1\npush_time_seconds 7\npush_failure_time_seconds 7\npush_up 7\n")
	s.expectPush(`push_failure_time_seconds{instance="",job="j"} 0`, `push_time_seconds{instance="",job="j"} 1.9e+09`)
	c.advance(time.Second)
	s.want(400, "PUT", "/j", "a 1 5\n")
	s.expectPush(`push_failure_time_seconds{instance="",job="j"} 1.900000001e+09`, `push_time_seconds{instance="",job="j"} 1.9e+09`)
	c.advance(time.Second)
	s.want(200, "POST", "/j", "a 2\n# TYPE push_failure_time_seconds counter\npush_failure_time_seconds 7\n")
	s.expectPush(`push_failure_time_seconds{instance="",job="j"} 1.900000001e+09`, `push_time_seconds{instance="",job="j"} 1.900000002e+09`)
	s.want(400, "PUT", "/new", "a 1 5\n")
	s.want(400, "PUT", "/none", "a b c\n")
	s.want(202, "DELETE", "/j", "")
	s.expectPush(`push_failure_time_seconds{instance="",job="new"} 1.900000002e+09`, `push_time_seconds{instance="",job="new"} 0`)
}

// TestLabels is section 6: label rewriting.
func TestLabels(t *testing.T) {
	s := start(t, gateway.StoreConfig{}, gateway.Memory())
	s.want(200, "PUT", "/j/x/1", "m{x=\"2\",instance=\"body\",le=\"3\",quantile=\"4\"} 1\n")
	s.expect(`m{instance="body",job="j",le="3",quantile="4",x="1"} 1`)
	if got := s.want(400, "PUT", "/k", "m{job=\"1\"} 1\nm{job=\"2\"} 1\n"); !strings.Contains(got, "already seen") {
		t.Errorf("got %s", got)
	}
}

// TestRejections is section 7: pushes that parse and are refused. Each names the
// metric and the group, and stores nothing.
func TestRejections(t *testing.T) {
	for name, test := range map[string]struct{ before, path, body, want string }{
		"T1 timestamp":          {"", "/j", "m 1 5\nn 1\n", "timestamps"},
		"T2 in the body":        {"", "/j", "m{a=\"1\"} 1\nm{a=\"1\"} 2\n", "already seen"},
		"T2 across groups":      {"m{instance=\"i\"} 1\n", "/other/instance/i", "m 1\nn 1\n", ""},
		"T3 type":               {"m 1\n", "/other", "# TYPE m gauge\nm 1\n", "has type gauge, should have untyped"},
		"T5 own type":           {"", "/j", "# TYPE own_metric counter\nown_metric 1\n", "should have gauge"},
		"T7 summary first":      {"# TYPE x summary\nx_count 1\nx_sum 1\n", "/other", "x_count 1\n", `collides with the summary "x"`},
		"T7 count first":        {"x_count 1\n", "/other", "# TYPE x summary\nx{quantile=\"0.5\"} 1\n", `collides with the untyped "x_count"`},
		"T7 histogram":          {"x_bucket 1\n", "/other", "# TYPE x histogram\nx_bucket{le=\"1\"} 1\nx_count 1\n", `collides with the untyped "x_bucket"`},
		"T8 reserved label":     {"", "/j", "m{__x=\"1\"} 1\n", `"__x"`},
		"W6 escaped alike":      {"a_b 1\n", "/other", "{\"a.b\"} 1\n", `same name as "a_b"`},
		"W6 escaped alike, too": {"{\"a.b\"} 1\n", "/other", "a_b 1\n", `same name as "a.b"`},
		"W6 labels alike":       {"", "/j", "m{\"a.b\"=\"1\",a_b=\"2\"} 1\n", "same name as another"},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, gateway.StoreConfig{Reserved: func(name string) (dto.MetricType, bool) {
				return dto.MetricType_GAUGE, name == "own_metric"
			}}, gateway.Memory())
			if test.before != "" {
				s.want(200, "PUT", "/before", test.before)
			}
			before := s.samples(false)
			if test.want == "" { // labels of the job differ: no clash
				s.want(200, "PUT", test.path, test.body)
				return
			}
			got := s.want(400, "PUT", test.path, test.body)
			metric := regexp.MustCompile(`metric "[a-z._]+"`)
			if !strings.Contains(got, test.want) || !metric.MatchString(got) || !strings.Contains(got, `{job="`) {
				t.Errorf("got %q, want it to name metric, group and %q", got, test.want)
			}
			if after := s.samples(false); after != before {
				t.Errorf("the store changed from\n%s\nto\n%s", before, after)
			}
			if !strings.Contains(s.samples(true), `push_failure_time_seconds{instance="",job="`+strings.TrimPrefix(test.path, "/")+`"} 1.`) {
				t.Errorf("no failure time:\n%s", s.samples(true))
			}
		})
	}
}

// TestDuplicatesAcrossGroups: two groups of one job whose series meet.
func TestDuplicatesAcrossGroups(t *testing.T) {
	s := start(t, gateway.StoreConfig{}, gateway.Memory())
	s.want(200, "PUT", "/j/instance/i", "m 1\n")
	if got := s.want(400, "PUT", "/j", "m{instance=\"i\"} 1\n"); !strings.Contains(got, `the labels {instance="i",job="j"} were already seen in the group {instance="i",job="j"}`) {
		t.Errorf("got %s", got)
	}
	s.want(202, "DELETE", "/j/instance/i", "")
	s.want(200, "PUT", "/j", "m{instance=\"i\"} 1\n")
	if got := s.want(400, "PUT", "/j/instance/", "n 1\n"); !strings.Contains(got, `renders the same labels as that of the group {job="j"}`) {
		t.Errorf("got %s", got)
	}
	s.want(202, "DELETE", "/j", "")
	s.want(200, "PUT", "/j/instance/", "n 1\n")
}

// A series is found in the group that has it, in whichever form it comes, and whatever its
// labels are: the group's key is a part of them.
func TestDuplicatesByLabels(t *testing.T) {
	const quoted = `/j/a@base64/ImJcCg` // a quote, b, a backslash and a line feed
	asText := func(labels string) []string { return []string{"m{" + labels + "} 1\n"} }
	asProtobuf := func(labels string) []string {
		return []string{delimited(t, `name:"m" type:GAUGE metric{`+labels+` gauge{value:1}}`), "Content-Type", protobufType}
	}
	for name, c := range map[string]struct {
		owner, owned, path string
		push               []string
		clash              bool
	}{
		"text":                      {"/j/a/b", "m 1\n", "/j", asText(`a="b"`), true},
		"text, another value":       {"/j/a/b", "m 1\n", "/j", asText(`a="c"`), false},
		"text, a quoted value":      {quoted, "m 1\n", "/j", asText(`a="\"b\\\n"`), true},
		"text, among others":        {"/j/a/b", "m 1\n", "/j", []string{"m{a=\"a\"} 1\nm{c=\"c\",a=\"b\"} 1\nm{a=\"b\"} 1\n"}, true},
		"protobuf":                  {"/j/a/b", "# TYPE m gauge\nm 1\n", "/j", asProtobuf(`label{name:"a" value:"b"}`), true},
		"protobuf, another value":   {"/j/a/b", "# TYPE m gauge\nm 1\n", "/j", asProtobuf(`label{name:"a" value:"c"}`), false},
		"protobuf, a quoted value":  {quoted, "# TYPE m gauge\nm 1\n", "/j", asProtobuf(`label{name:"a" value:"\"b\\\n"}`), true},
		"a shorter key has it":      {"/j", "m{a=\"b\"} 1\n", "/j/a/b", []string{"m 1\n"}, true},
		"a shorter key of another":  {"/k", "m{a=\"b\"} 1\n", "/j/a/b", []string{"m 1\n"}, false},
		"a shorter key has another": {"/j", "m{a=\"c\"} 1\n", "/j/a/b", []string{"m 1\n"}, false},
		"the instance is empty":     {"/j/instance/i", "m 1\n", "/j", asText(`a="b"`), false},
		"a histogram": {"/j/a/b", "# TYPE h histogram\nh_bucket{le=\"+Inf\"} 1\nh_count 1\nh_sum 1\n", "/j",
			[]string{"# TYPE h histogram\nh_bucket{a=\"b\",le=\"+Inf\"} 1\nh_count{a=\"b\"} 1\nh_sum{a=\"b\"} 1\n"}, true},
		"names that are escaped": {"/j/a_b/c", "m 1\n", "/j", []string{"m{\"a.b\"=\"c\"} 1\n"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			s := start(t, gateway.StoreConfig{}, gateway.Memory())
			s.want(200, "PUT", c.owner, c.owned)
			s.want(200, "PUT", "/elsewhere/zone/z", "other 1\n")
			if !c.clash {
				s.want(200, "PUT", c.path, c.push[0], c.push[1:]...)
				return
			}
			if got := s.want(400, "PUT", c.path, c.push[0], c.push[1:]...); !strings.Contains(got, "were already seen in the group") {
				t.Errorf("got %s", got)
			}
		})
	}
}

// TestTypeMayChange: the only owner of a family may change its type.
func TestTypeMayChange(t *testing.T) {
	s := start(t, gateway.StoreConfig{}, gateway.Memory())
	s.want(200, "PUT", "/j", "m 1\n")
	s.want(200, "POST", "/j", "# TYPE m counter\nm 2\n")
	s.want(200, "PUT", "/k", "# TYPE m counter\nm 2\n")
	s.want(400, "POST", "/j", "m 2\n")
}

// TestExpiry: TTL, interval, push_up, inheritance, clearing and forget-after.
func TestExpiry(t *testing.T) {
	c := newClock()
	s := start(t, gateway.StoreConfig{Now: c.now, ForgetAfter: 24 * time.Hour}, gateway.Memory())
	s.want(400, "PUT", "/bad?ttl=x", "m 1\n")
	s.want(200, "PUT", "/plain", "m 1\n")
	s.want(200, "PUT", "/ttl?ttl=1h", "m 1\n")
	s.want(200, "PUT", "/both?ttl=2h", "m 1\n", "Culvert-Interval", "30m")
	s.want(200, "POST", "/ttl", "n 1\n") // keeps the TTL
	s.expect(`m{instance="",job="both"} 1`, `m{instance="",job="plain"} 1`, `m{instance="",job="ttl"} 1`, `n{instance="",job="ttl"} 1`)
	up := func() string {
		return regexp.MustCompile(`push_up{.*`).FindString(s.samples(true))
	}
	wake := func() { s.want(202, "DELETE", "/nobody", "") } // the store looks at the clock
	if got := up(); got != `push_up{instance="",job="both"} 1` {
		t.Errorf("got %s", got)
	}
	c.advance(32 * time.Minute)
	wake()
	if got := up(); got != `push_up{instance="",job="both"} 1` {
		t.Errorf("within the grace: got %s", got)
	}
	c.advance(2 * time.Minute)
	wake()
	if got := up(); got != `push_up{instance="",job="both"} 0` {
		t.Errorf("after the grace: got %s", got)
	}
	c.advance(27 * time.Minute)
	wake()
	s.expect(`m{instance="",job="both"} 1`, `m{instance="",job="plain"} 1`)
	c.advance(time.Hour)
	wake()
	s.expect(`m{instance="",job="plain"} 1`)
	s.expectPush(`push_failure_time_seconds{instance="",job="plain"} 0`, `push_time_seconds{instance="",job="both"} 1.9e+09`, `push_time_seconds{instance="",job="plain"} 1.9e+09`, `push_up{instance="",job="both"} 0`)
	s.want(200, "PUT", "/both", "m 2\n")
	if got := up(); got != `push_up{instance="",job="both"} 1` {
		t.Errorf("after it came back: got %s", got)
	}
	s.want(200, "PUT", "/both?interval=0", "m 2\n")
	if got := up(); got != "" {
		t.Errorf("after the interval was cleared: got %s", got)
	}
	s.want(200, "PUT", "/both?interval=30m", "m 2\n")
	c.advance(27 * time.Hour)
	wake()
	s.expectPush(`push_failure_time_seconds{instance="",job="plain"} 0`, `push_time_seconds{instance="",job="plain"} 1.9e+09`)
}

// TestBolt: what was acknowledged is there after a restart, TTL and times included.
func TestBolt(t *testing.T) {
	path, c := t.TempDir()+"/push.db", newClock()
	open := func() gateway.Backend {
		b, err := boltstore.Open(path, nil)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var before string
	t.Run("first", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{Now: c.now}, open())
		s.want(200, "PUT", "/j/x/1", "# HELP m some help\n# TYPE m counter\nm 1\nn{a=\"b\"} 2\n# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_count 2\nh_sum 3\n")
		s.want(200, "POST", "/j/x/1?ttl=1h&interval=10m", "n{a=\"c\"} 3\n{\"utf.8\"} 1\n")
		s.want(400, "PUT", "/failed", "m 1\n")
		s.want(200, "PUT", "/gone", "g 1\n")
		s.want(202, "DELETE", "/gone", "")
		before = s.samples(true)
	})
	t.Run("second", func(t *testing.T) {
		s := start(t, gateway.StoreConfig{Now: c.now}, open())
		if after := s.samples(true); after != before {
			t.Errorf("got\n%s\nwant\n%s", after, before)
		}
		c.advance(2 * time.Hour)
		s.want(202, "DELETE", "/nobody", "")
		s.expect()
	})
}
