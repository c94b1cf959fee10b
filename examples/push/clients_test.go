package main

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/push"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// doer is an HTTP client that keeps the statuses of the answers.
type doer struct{ statuses []int }

func (d *doer) Do(r *http.Request) (*http.Response, error) {
	resp, err := http.DefaultClient.Do(r)
	if err == nil {
		d.statuses = append(d.statuses, resp.StatusCode)
	}
	return resp, err
}

// TestGoClient calls all of client_golang's push package.
func TestGoClient(t *testing.T) {
	url := startProxy(t)
	for _, c := range []struct {
		name   string
		url    string // behind the scheme
		job    string
		set    func(*push.Pusher) *push.Pusher
		labels string // as they are scraped
	}{
		{name: "plain", job: "go_plain", labels: `{instance="",job="go_plain"}`},
		{name: "address", url: strings.TrimPrefix(url, "http://"), job: "go_address", labels: `{instance="",job="go_address"}`},
		{name: "slash behind", url: url + "/", job: "go_slash_behind", labels: `{instance="",job="go_slash_behind"}`},
		{name: "instance", job: "go_instance", set: grouping("instance", "web-1"), labels: `{instance="web-1",job="go_instance"}`},
		{name: "two labels", job: "go_two", set: grouping("zone", "b", "area", "a"), labels: `{area="a",instance="",job="go_two",zone="b"}`},
		{name: "empty value", job: "go_empty", set: grouping("empty", ""), labels: `{empty="",instance="",job="go_empty"}`},
		{name: "empty instance", job: "go_empty_instance", set: grouping("instance", ""), labels: `{instance="",job="go_empty_instance"}`},
		{name: "slash in value", job: "go_slash", set: grouping("path", "/srv/data", "other", "x"), labels: `{instance="",job="go_slash",other="x",path="/srv/data"}`},
		{name: "slash in job", job: "go/slash", labels: `{instance="",job="go/slash"}`},
		{name: "base64 of all characters", job: "go_base64", set: grouping("path", "/ÿþ?>"), labels: `{instance="",job="go_base64",path="/ÿþ?>"}`},
		{name: "UTF-8 in values", job: "go_ünicöde", set: grouping("city", "Zürich☃"), labels: `{city="Zürich☃",instance="",job="go_ünicöde"}`},
		{name: "UTF-8 in names", job: "go_names", set: grouping("größe", "1", "foo.bar", "2", "a b", "3"), labels: `{"a b"="3","foo.bar"="2","größe"="1",instance="",job="go_names"}`},
		{name: "escaped name", job: "go_escaped", set: grouping("U__foo_2e_bar", "1"), labels: `{"foo.bar"="1",instance="",job="go_escaped"}`},
		// The client writes a blank as "+", which in a path is a plus.
		{name: "reserved characters", job: "go_reserved", set: grouping("v", "50% & a+b=c?#@;,"), labels: `{instance="",job="go_reserved",v="50%+&+a+b=c?#@;,"}`},
		{name: "quotes", job: "go_quotes", set: grouping("v", "\"q\"\\\n"), labels: `{instance="",job="go_quotes",v="\"q\"\\\n"}`},
		{name: "text", job: "go_text", set: format(expfmt.TypeTextPlain), labels: `{instance="",job="go_text"}`},
		{name: "protobuf", job: "go_protobuf", set: format(expfmt.TypeProtoDelim), labels: `{instance="",job="go_protobuf"}`},
		{name: "password", job: "go_password", set: func(p *push.Pusher) *push.Pusher { return p.BasicAuth("somebody", "secret") }, labels: `{instance="",job="go_password"}`},
		{name: "header", job: "go_header", set: func(p *push.Pusher) *push.Pusher {
			return p.Header(http.Header{"Culvert-TTL": {"1h"}, "Culvert-Interval": {"10m"}})
		}, labels: `{instance="",job="go_header"}`},
	} {
		t.Run(c.name, func(t *testing.T) {
			var answers doer
			pusher := func(name string, value float64) *push.Pusher {
				p := push.New(url, c.job)
				if c.url != "" {
					p = push.New(c.url, c.job)
				}
				if c.set != nil {
					p = c.set(p)
				}
				return p.Client(&answers).Collector(gauge(name, "Of a test.", value))
			}
			for _, do := range []func() error{
				pusher("go_old", 1).Push,
				pusher("go_pushed", 2).Push,
				pusher("go_added", 3).Add,
			} {
				if err := do(); err != nil {
					t.Fatal(err)
				}
			}
			s := scrapeOf(t, url)
			s.wantNot(t, "go_old")
			s.want(t, "go_pushed"+c.labels, 2)
			s.want(t, "go_added"+c.labels, 3)
			s.want(t, "push_failure_time_seconds"+c.labels, 0)
			s.wantNow(t, "push_time_seconds"+c.labels)
			if _, up := s["push_up"+c.labels]; up != (c.name == "header") {
				t.Errorf("push_up is there: %t", up)
			}

			if err := pusher("go_ignored", 1).Delete(); err != nil {
				t.Fatal(err)
			}
			if want := []int{200, 200, 200, 202}; !slices.Equal(answers.statuses, want) {
				t.Errorf("the answers were %v, want %v", answers.statuses, want)
			}
			if left := scrapeOf(t, url); len(left) > 0 {
				t.Errorf("left behind:\n%s", left)
			}
		})
	}
	t.Run("unknown group", func(t *testing.T) {
		if err := push.New(url, "never_pushed").Delete(); err != nil {
			t.Error(err)
		}
	})
}

func grouping(pairs ...string) func(*push.Pusher) *push.Pusher {
	return func(p *push.Pusher) *push.Pusher {
		for pair := range slices.Chunk(pairs, 2) {
			p = p.Grouping(pair[0], pair[1])
		}
		return p
	}
}

func format(kind expfmt.FormatType) func(*push.Pusher) *push.Pusher {
	return func(p *push.Pusher) *push.Pusher { return p.Format(expfmt.NewFormat(kind)) }
}

// TestGoClientTypes pushes every type of metric in every format of client_golang.
func TestGoClientTypes(t *testing.T) {
	url := startProxy(t)
	for job, kind := range map[string]expfmt.FormatType{"text": expfmt.TypeTextPlain, "protobuf": expfmt.TypeProtoDelim} {
		t.Run(job, func(t *testing.T) {
			registry := prometheus.NewRegistry()
			counter := prometheus.NewCounterVec(prometheus.CounterOpts{Name: job + "_things_total", Help: "Of a \\ test,\nin lines."}, []string{"kind"})
			counter.WithLabelValues("a \"b\"\\\n").(prometheus.ExemplarAdder).AddWithExemplar(3, prometheus.Labels{"trace": "x"})
			summary := prometheus.NewSummary(prometheus.SummaryOpts{Name: job + "_took_seconds", Objectives: map[float64]float64{0.5: 0.05}})
			classic := prometheus.NewHistogram(prometheus.HistogramOpts{Name: job + "_sizes", Buckets: []float64{1, 2.5, 10}})
			native := prometheus.NewHistogram(prometheus.HistogramOpts{Name: job + "_native", NativeHistogramBucketFactor: 1.1})
			untyped := prometheus.NewUntypedFunc(prometheus.UntypedOpts{Name: job + "_untyped"}, func() float64 { return 7 })
			registry.MustRegister(counter, summary, classic, native, untyped,
				collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
			summary.Observe(1.5)
			classic.Observe(2)
			native.Observe(2)

			if err := push.New(url, job).Gatherer(registry).Format(expfmt.NewFormat(kind)).Push(); err != nil {
				t.Fatal(err)
			}
			s := scrapeOf(t, url)
			labels := fmt.Sprintf(`instance="",job=%q`, job)
			s.want(t, job+"_things_total{"+labels+`,kind="a \"b\"\\\n"}`, 3)
			s.want(t, job+"_took_seconds{"+labels+`,quantile="0.5"}`, 1.5)
			s.want(t, job+"_took_seconds_count{"+labels+"}", 1)
			for bound, count := range map[string]float64{"1": 0, "2.5": 1, "10": 1, "+Inf": 1} {
				s.want(t, job+"_sizes_bucket{"+labels+",le="+strconv.Quote(bound)+"}", count)
			}
			s.want(t, job+"_sizes_sum{"+labels+"}", 2)
			s.want(t, job+"_native_count{"+labels+"}", 1)
			s.want(t, job+"_untyped{"+labels+"}", 7)
			for _, name := range []string{"go_goroutines", "process_cpu_seconds_total"} {
				if _, ok := s[name+"{"+labels+"}"]; !ok {
					t.Errorf("%s is missing, which the proxy has too", name)
				}
			}
			checkWhole(t, url)
		})
	}
}

// checkWhole checks that what Prometheus scrapes, the proxy's own metrics with it,
// is well-formed.
func checkWhole(t *testing.T, url string) {
	t.Helper()
	resp, err := http.Get(url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if families["culvert_proxy_push_groups"] == nil || families["push_time_seconds"] == nil {
		t.Error("the scrape has not both, groups and the proxy's own metrics")
	}
}

// TestGoClientRefused pushes what can't be taken: the caller is told, and so is
// Prometheus, and what was there stays.
func TestGoClientRefused(t *testing.T) {
	url := startProxy(t)
	labels := `{instance="",job="go_refused"}`
	if err := push.New(url, "go_refused").Collector(gauge("go_good", "Of a test.", 1)).Push(); err != nil {
		t.Fatal(err)
	}
	stamped := prometheus.NewMetricWithTimestamp(time.Now(), gauge("go_stamped", "Of a test.", 2))
	err := push.New(url, "go_refused").Collector(constant{stamped}).Push()
	if err == nil || !strings.Contains(err.Error(), "400") || !strings.Contains(err.Error(), "timestamps are not allowed") {
		t.Fatalf("a push with a timestamp: %v", err)
	}
	s := scrapeOf(t, url)
	s.want(t, "go_good"+labels, 1)
	s.wantNot(t, "go_stamped")
	if s["push_failure_time_seconds"+labels] <= s["push_time_seconds"+labels] {
		t.Errorf("the failure is not told:\n%s", s)
	}
	if err := push.New(url, "go_refused").Collector(gauge("go_good", "Of a test.", 3)).Add(); err != nil {
		t.Fatal(err)
	}
	s = scrapeOf(t, url)
	s.want(t, "go_good"+labels, 3)
	if s["push_failure_time_seconds"+labels] >= s["push_time_seconds"+labels] {
		t.Errorf("the last push was good, and the failure counts still:\n%s", s)
	}
}

// constant is a collector of one metric.
type constant struct{ prometheus.Metric }

func (c constant) Describe(ch chan<- *prometheus.Desc) { ch <- c.Desc() }
func (c constant) Collect(ch chan<- prometheus.Metric) { ch <- c.Metric }

// TestPythonClient calls all of prometheus_client's push functions.
func TestPythonClient(t *testing.T) {
	program := python(t)
	url := startProxy(t)
	succeed(t, url, nil, program, "testdata/client.py", "push")
	s := scrapeOf(t, url)
	wantPushed(t, s, "py", []string{
		`{instance="",job="py_plain"}`,
		`{instance="",job="py_address"}`,
		`{instance="",job="py_slash_behind"}`,
		`{instance="web-1",job="py_instance"}`,
		`{instance="127.0.0.1",job="py_ip"}`,
		`{b="x",instance="",job="py/slash",path="/srv/data"}`,
		`{instance="",job="py_base64",path="/ÿþ?>"}`,
		`{empty="",instance="",job="py_empty"}`,
		// The client writes a blank as "+", which in a path is a plus.
		`{city="Zürich+☃",instance="",job="py_ünicöde"}`,
		`{instance="",job="py_reserved",v="50%+&+a+b=c?#@"}`,
		`{instance="",job="py_number",shard="7"}`,
		`{instance="",job="py_password"}`,
	})
	s.want(t, `py_things_total{instance="",job="py_types",kind="a \"b\"\\\n"}`, 3)
	s.wantNow(t, `py_things_created{instance="",job="py_types",kind="a \"b\"\\\n"}`)
	s.want(t, `py_took_seconds_count{instance="",job="py_types"}`, 1)
	s.want(t, `py_sizes_bucket{instance="",job="py_types",le="2.5"}`, 1)
	s.want(t, `py_sizes_bucket{instance="",job="py_types",le="+Inf"}`, 1)
	s.want(t, `py_build_info{instance="",job="py_types",version="1"}`, 1)
	s.want(t, `py_state{instance="",job="py_types",py_state="off"}`, 1)
	s.wantNow(t, `push_time_seconds{instance="",job="py_nothing"}`)
	s.wantNow(t, `process_start_time_seconds{instance="",job="py_default"}`)
	checkWhole(t, url)

	succeed(t, url, nil, program, "testdata/client.py", "delete")
	if left := scrapeOf(t, url); len(left) > 0 {
		t.Errorf("left behind:\n%s", left)
	}
}

// TestNodeClient calls all of prom-client's push functions.
func TestNodeClient(t *testing.T) {
	program, env := node(t)
	url := startProxy(t)
	succeed(t, url, []string{env}, program, "testdata/client.js", "push")
	s := scrapeOf(t, url)
	wantPushed(t, s, "js", []string{
		`{instance="",job="js_plain"}`,
		`{instance="",job="js_slash_behind"}`,
		`{instance="web-1",job="js_instance"}`,
		`{b="x",instance="",job="js_base64",path="/srv/data"}`,
		`{empty="",instance="",job="js_empty"}`,
		`{city="Zürich ☃",instance="",job="js_ünicöde"}`,
		`{instance="",job="js_reserved",v="50% & a+b=c?#@"}`,
		`{instance="",job="js_number",shard="7"}`,
		`{instance="",job="js_password"}`,
		`{instance="",job="js_gzip"}`,
		`{instance="",job="js_interval"}`,
	})
	s.want(t, `push_up{instance="",job="js_interval"}`, 1)
	s.want(t, `js_things_total{instance="",job="js_types",kind="a \"b\"\\\n"}`, 3)
	s.want(t, `js_took_seconds{instance="",job="js_types",quantile="0.5"}`, 1.5)
	s.want(t, `js_sizes_bucket{instance="",job="js_types",le="2.5"}`, 1)
	s.want(t, `js_sizes_count{instance="",job="js_types"}`, 1)
	s.wantNow(t, `process_start_time_seconds{instance="",job="js_default"}`)
	checkWhole(t, url)

	succeed(t, url, []string{env}, program, "testdata/client.js", "delete")
	if left := scrapeOf(t, url); len(left) > 0 {
		t.Errorf("left behind:\n%s", left)
	}
}

// wantPushed checks what testdata's programs push to groups with the given labels.
func wantPushed(t *testing.T, s scrape, prefix string, groups []string) {
	t.Helper()
	s.wantNot(t, prefix+"_old")
	pushed := 0
	for series := range s {
		if strings.HasPrefix(series, prefix+"_pushed{") {
			pushed++
		}
	}
	if pushed != len(groups) {
		t.Errorf("%d groups were pushed, want %d", pushed, len(groups))
	}
	for _, labels := range groups {
		s.want(t, prefix+"_pushed"+labels, 2)
		s.want(t, prefix+"_added"+labels, 3)
		s.want(t, "push_failure_time_seconds"+labels, 0)
		s.wantNow(t, "push_time_seconds"+labels)
	}
}
