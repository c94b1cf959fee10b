package main_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/encoding/prototext"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// A job that stops pushing is noticed: push_up falls, an alert fires, and after
// the TTL its series are gone, but for what tells of it.
func TestPrometheusPushOverdue(t *testing.T) {
	t.Parallel()
	proxy := startProxy(t)
	rules := write(t, t.TempDir(), "rules.yml", `
groups:
- name: push
  interval: 1s
  rules:
  - {alert: PushOverdue, expr: push_up == 0}
`)
	prom := startPrometheus(t, fmt.Sprintf(`
- job_name: culvert
  honor_labels: true
  static_configs: [{targets: ["%s"]}]
rule_files: [%s]
`, proxy.address, rules))
	prom.awaitSample(`up{job="culvert"}`, "1", time.Time{})

	// The grace is 1 min at least, so this push is one from the past.
	const interval, grace, ttl = 4 * time.Second, time.Minute, 70 * time.Second
	at := time.Now().Add(3*time.Second - grace).Truncate(time.Millisecond)
	overdue, expired := at.Add(interval+grace), at.Add(ttl)
	pushTime := strconv.FormatFloat(float64(at.UnixMilli())/1000, 'f', 3, 64)
	pushURL := fmt.Sprintf("%s/metrics/job/backup?interval=4s&ttl=70s", proxy.url)
	a, err := send(direct, http.MethodPut, pushURL, "# TYPE e2e_rows gauge\ne2e_rows 5\n", "Culvert-Push-Time", pushTime)
	if err != nil || a.status != http.StatusOK {
		t.Fatalf("push: %d %s %v", a.status, a.body, err)
	}

	const up, rows, pushed = `push_up{job="backup"}`, `e2e_rows{job="backup"}`, `push_time_seconds{job="backup"}`
	prom.awaitSample(up, "1", time.Time{})
	prom.awaitSample(rows, "5", time.Time{})
	down := prom.awaitSample(up, "0", time.Time{})
	if late := down.at.Sub(overdue); late < 0 || late > soon {
		t.Errorf("push_up fell to 0 %s after the push was overdue, want 0s to %s", late, soon)
	}
	prom.awaitAlert("PushOverdue", map[string]string{"job": "backup"}, "firing")

	eventually(t, 30*time.Second, func() error {
		if result := prom.query(rows); len(result) != 0 {
			return fmt.Errorf("%s is still there: %v", rows, result)
		}
		return nil
	})
	samples := prom.query(rows + "[10m]")[0].Values
	if late := samples[len(samples)-1].at.Sub(expired); late < -soon || late > soon {
		t.Errorf("the last sample was taken %s after the TTL, want -%s to %s", late, soon, soon)
	}
	// What is left says 0, and when the last push was, now and later on.
	prom.awaitSample(up, "0", expired.Add(soon))
	// Seconds as a float64 have 0.2 µs.
	if result := prom.query(fmt.Sprintf("abs(%s - %s) < 1e-6", pushed, pushTime)); len(result) != 1 {
		t.Errorf("%s is %v after the TTL, want %s", pushed, prom.query(pushed), pushTime)
	}
	prom.awaitAlert("PushOverdue", map[string]string{"job": "backup"}, "firing")

	again := time.Now()
	push(t, http.StatusOK, http.MethodPut, proxy.url+"/metrics/job/backup", "# TYPE e2e_rows gauge\ne2e_rows 6\n")
	prom.awaitSample(up, "1", again)
	prom.awaitSample(rows, "6", again)
	prom.awaitAlert("PushOverdue", map[string]string{"job": "backup"}, "")
}

// awaitAlert waits until an alert with these labels is in a state, "": there is
// none.
func (p *prometheus) awaitAlert(name string, labels map[string]string, state string) {
	p.t.Helper()
	eventually(p.t, 15*time.Second, func() error {
		var data struct {
			Alerts []struct {
				Labels map[string]string
				State  string
			}
		}
		p.api("/api/v1/alerts", &data)
		found := ""
	alerts:
		for _, alert := range data.Alerts {
			if alert.Labels["alertname"] != name {
				continue
			}
			for label, value := range labels {
				if alert.Labels[label] != value {
					continue alerts
				}
			}
			found = alert.State
		}
		if found != state {
			return fmt.Errorf("alert %s%v: the state is %q, want %q; %v", name, labels, found, state, data.Alerts)
		}
		return nil
	})
}

// The same groups give the same series in Prometheus, whether a Pushgateway serves
// them or a proxy.
func TestPrometheusPushgateway(t *testing.T) {
	t.Parallel()
	gateway, proxy := startPushgateway(t), startProxy(t)
	for _, g := range comparedPushes(t) {
		for _, base := range []string{gateway, proxy.url} {
			pushBody(t, http.StatusOK, g.method, base+"/metrics/job"+g.path, g.contentType, g.body)
		}
	}
	config := fmt.Sprintf(`
- job_name: pushed
  honor_labels: true
  static_configs:
  - {targets: ["%s"], labels: {server: pushgateway}}
  - {targets: ["%s"], labels: {server: culvert}}
`, strings.TrimPrefix(gateway, "http://"), proxy.address)

	text := startPrometheus(t, config)
	// It asks for protobuf.
	native := startPrometheusWith(t, config, "--enable-feature=native-histograms")
	t.Logf("text: %d series", comparePushed(t, text))
	t.Logf("protobuf: %d series", comparePushed(t, native))
	if all := native.query(`histogram_count(e2e_native_seconds) == 6`); len(all) != 2 {
		t.Errorf("the native histograms with a count of 6 are %v, want one a server", all)
	}
}

// startPrometheusWith is startPrometheus with more flags.
func startPrometheusWith(t *testing.T, scrapeConfigs string, args ...string) *prometheus {
	t.Helper()
	program := externaltest.Program(t, "prometheus", "prometheus")
	dir := t.TempDir()
	file := write(t, dir, "prometheus.yml", "global: {scrape_interval: 1s, scrape_timeout: 1s}\nscrape_configs:\n"+scrapeConfigs)
	args = append(args, "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address=127.0.0.1:0")
	p := &prometheus{process: start(t, "prometheus", program, args...)}
	p.url = "http://" + p.awaitLog(`msg="Listening on" address=(\S+)`)[1]
	p.awaitLog(`Server is ready to receive web requests`)
	return p
}

// comparedPush is a push that both servers take.
type comparedPush struct {
	method, path, contentType string
	body                      []byte
}

func comparedPushes(t *testing.T) []comparedPush {
	t.Helper()
	const types = `# HELP e2e_rows_total Rows, \\ and\nlines.
# TYPE e2e_rows_total counter
e2e_rows_total{code="200"} 1e+06
e2e_rows_total{code="500"} 12345678901
# TYPE e2e_fill gauge
e2e_fill -0.1
e2e_fill{text="a\"b\\c\nd <&> äöü 😀"} +Inf
e2e_untyped 1e-300
# HELP e2e_took_seconds Time.
# TYPE e2e_took_seconds summary
e2e_took_seconds{quantile="0.5"} 1
e2e_took_seconds{quantile="0.990"} NaN
e2e_took_seconds{quantile="1"} 3
e2e_took_seconds_sum 2.5
e2e_took_seconds_count 3
e2e_took_seconds{step="x",quantile="0.5"} 1
e2e_took_seconds_sum{step="x"} 2
e2e_took_seconds_count{step="x"} 3
# TYPE e2e_size_bytes histogram
e2e_size_bytes_bucket{le="0.50"} 1
e2e_size_bytes_bucket{le="1"} 1
e2e_size_bytes_bucket{le="1e3"} 2
e2e_size_bytes_bucket{le="1000000"} 2
e2e_size_bytes_bucket{le="+Inf"} 3
e2e_size_bytes_sum 7
e2e_size_bytes_count 3
# TYPE e2e_endless histogram
e2e_endless_bucket{le="2"} 1
e2e_endless_sum 1
e2e_endless_count 4
`
	var native bytes.Buffer
	for _, text := range []string{
		`name: "e2e_native_seconds" type: HISTOGRAM metric { histogram { sample_count: 6 sample_sum: 12.5 schema: 3
			zero_threshold: 0.001 zero_count: 1 positive_span { offset: -1 length: 2 } positive_span { offset: 3 length: 1 }
			positive_delta: 2 positive_delta: -1 positive_delta: 1 } }`,
		`name: "e2e_both_seconds" help: "Classic buckets." type: HISTOGRAM metric { label { name: "le_" value: "1" } histogram { sample_count: 3 sample_sum: 2
			bucket { cumulative_count: 1 upper_bound: 0.25 } bucket { cumulative_count: 3 upper_bound: 5 } } }`,
		`name: "e2e_proto_total" type: COUNTER metric { counter { value: 7 } } metric { label { name: "x" value: "" } label { name: "y" value: "1" } counter { value: 8 } }`,
		`name: "e2e_proto_seconds" type: SUMMARY metric { summary { sample_count: 1 sample_sum: 2 quantile { quantile: 0.5 value: 2 } quantile { quantile: 1 value: 2 } } }`,
	} {
		f := new(dto.MetricFamily)
		if err := prototext.Unmarshal([]byte(text), f); err != nil {
			t.Fatal(err)
		}
		if _, err := protodelim.MarshalTo(&native, f); err != nil {
			t.Fatal(err)
		}
	}
	text := func(method, path, body string) comparedPush {
		return comparedPush{method, path, "text/plain", []byte(body)}
	}
	return []comparedPush{
		text(http.MethodPut, "/types", types),
		text(http.MethodPut, "/types/instance/i-1", types),
		text(http.MethodPost, "/types/instance/i-2/zone/b", types),
		text(http.MethodPut, "@base64/L3NsYXNoZWQvam9i", "e2e_odd 1\n"), // /slashed/job
		text(http.MethodPut, "/odd/path@base64/L3Zhci90bXA/b@base64/w6TDtsO8IPCfmIA", "e2e_odd{also=\"\"} 2\n"),
		text(http.MethodPut, "/odd/empty@base64/=/a/a+b%20c", "e2e_odd 3\n"),
		text(http.MethodPut, "/odd/le/7/quantile/8", "e2e_odd 4\n"),
		text(http.MethodPut, "/noinstance/instance@base64/=", "e2e_instance 1\n"),
		text(http.MethodPut, "/bodyinstance", "e2e_instance{instance=\"from-body\"} 2\ne2e_instance 3\n"),
		text(http.MethodPut, "/sequence", "e2e_a 1\ne2e_b 1\n"),
		text(http.MethodPost, "/sequence", "e2e_b{x=\"1\"} 3\n"),
		text(http.MethodPut, "/emptied", "e2e_a 1\n"),
		text(http.MethodPut, "/emptied", ""),
		{http.MethodPut, "/protobuf", delimited, native.Bytes()},
	}
}

// ofServer are the series that a server makes of itself, and Prometheus of the
// scrape.
var ofServer = regexp.MustCompile(`^(up|scrape_.*|go_.*|process_.*|promhttp_.*|pushgateway_.*|culvert_proxy_.*)$`)

// comparePushed waits for both servers, and compares the series and the metadata
// that Prometheus has of them. It returns how many series there are.
func comparePushed(t *testing.T, prom *prometheus) int {
	t.Helper()
	servers := []string{"pushgateway", "culvert"}
	for _, server := range servers {
		prom.awaitSample(fmt.Sprintf(`up{server=%q}`, server), "1", time.Time{})
	}
	of := func(server string) (values, metadata map[string]string) {
		values, metadata = map[string]string{}, map[string]string{}
		var data struct {
			Result []struct {
				series
				Histogram []json.RawMessage // a time and a native histogram
			}
		}
		prom.api("/api/v1/query?query="+url.QueryEscape(fmt.Sprintf(`{server=%q}`, server)), &data)
		for _, s := range data.Result {
			name := s.Metric["__name__"]
			if ofServer.MatchString(name) {
				continue
			}
			delete(s.Metric, "server")
			value := s.Value.value
			if name == "push_time_seconds" {
				value = "some time"
			}
			values[fmt.Sprint(s.Metric)] = value
			if len(s.Histogram) == 2 {
				values[fmt.Sprint(s.Metric)] = string(s.Histogram[1])
			}
		}
		var all []struct{ Metric, Type, Help, Unit string }
		prom.api("/api/v1/targets/metadata?match_target="+url.QueryEscape(fmt.Sprintf(`{server=%q}`, server)), &all)
		for _, m := range all {
			if !ofServer.MatchString(m.Metric) {
				metadata[m.Metric] = fmt.Sprintf("type %q, help %q, unit %q", m.Type, m.Help, m.Unit)
			}
		}
		return values, metadata
	}
	wantValues, wantMetadata := of(servers[0])
	values, metadata := of(servers[1])
	for _, d := range differences(wantValues, values) {
		t.Errorf("%s", d)
	}
	for _, d := range differences(wantMetadata, metadata) {
		t.Errorf("metadata of %s", d)
	}
	if len(values) < 100 || len(metadata) < 10 {
		t.Errorf("there are only %d series and metadata of %d metrics", len(values), len(metadata))
	}
	return len(values)
}
