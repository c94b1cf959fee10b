package main_test

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

const web1 = "web-1.example.net"

// soon is how late the first failed scrape may start after its agent is gone: one
// scrape interval, and a second.
const soon = 2 * time.Second

// A scrape stays a scrape: up follows the agent, and nothing that happens to an
// agent or to the proxy empties Prometheus's list of targets.
func TestPrometheus(t *testing.T) {
	t.Parallel()
	node := startNodeExporter(t)
	storage := "--storage.path=" + t.TempDir()
	address := "--web.listen-address=" + externaltest.FreeAddress(t)
	proxy := startProxy(t, storage, address)
	declared := "--target=node=" + node + "/metrics"
	agent := startAgent(t, proxy.url, web1, declared)
	prom := startPrometheus(t, fmt.Sprintf(`
- job_name: culvert
  proxy_url: %[1]s
  http_sd_configs:
  - {url: "%[1]s/targets", refresh_interval: 1s}
`, proxy.url))

	const up = `up{instance="node.` + web1 + `"}`
	prom.awaitSample(up, "1", time.Time{})
	prom.awaitSample(`node_uname_info{instance="node.`+web1+`"}`, "1", time.Time{})

	var discovered atomic.Int64
	stopWatching := background(t, 20*time.Millisecond, func() error {
		// Anything but 200 makes Prometheus keep the list that it has.
		if a, err := fetch(direct, proxy.url+"/targets", ""); err == nil && a.status == http.StatusOK {
			discovered.Add(1)
			var groups []any
			if err := json.Unmarshal([]byte(a.body), &groups); err != nil || len(groups) == 0 {
				return fmt.Errorf("discovery lists no target: %s", a.body)
			}
		}
		a, err := fetch(direct, prom.url+"/api/v1/targets?state=active", "")
		if err == nil && !strings.Contains(a.body, `"instance":"node.`+web1+`"`) {
			err = fmt.Errorf("Prometheus has lost the target: %s", a.body)
		}
		return err
	})

	stopping := time.Now()
	gone := agent.stop()
	if down := prom.awaitSample(up, "0", stopping); down.at.Sub(gone) > soon {
		t.Errorf("up fell to 0 %s after the agent had gone, want at most %s", down.at.Sub(gone), soon)
	}
	prom.awaitError("culvert", "node."+web1, "503 agent-offline", web1)

	back := time.Now()
	startAgent(t, proxy.url, web1, declared)
	prom.awaitSample(up, "1", back)

	proxy.kill()
	killed := time.Now()
	prom.awaitSample(up, "0", killed)
	before := discovered.Load()
	restarted := time.Now()
	startProxy(t, storage, address)
	prom.awaitSample(up, "1", restarted)
	eventually(t, 10*time.Second, func() error {
		if discovered.Load() == before {
			return errors.New("discovery was not asked after the restart")
		}
		return nil
	})
	stopWatching()
}

// TLS is end to end: Prometheus verifies the exporter's certificate, through the
// proxy and the agent.
func TestPrometheusHTTPS(t *testing.T) {
	t.Parallel()
	ca, other := newAuthority(t), newAuthority(t)
	exporter := ca.serveTLS(web1, exposition("e2e_value 42\n"))
	proxy := startProxy(t)
	allow := "--allow=" + port(t, exporter)
	agent := startAgent(t, proxy.url, web1, allow)
	prom := startPrometheus(t, fmt.Sprintf(`
- job_name: good
  scheme: https
  proxy_url: %[1]s
  tls_config: {ca_file: %[2]s}
  static_configs: [{targets: ["%[3]s"]}]
- job_name: wrong
  scheme: https
  proxy_url: %[1]s
  tls_config: {ca_file: %[4]s}
  static_configs: [{targets: ["%[3]s"]}]
`, proxy.url, ca.file, web1+":"+port(t, exporter), other.file))

	prom.awaitSample(`up{job="good"}`, "1", time.Time{})
	prom.awaitSample(`e2e_value{job="good"}`, "42", time.Time{})
	prom.awaitError("wrong", web1+":"+port(t, exporter), "x509")
	prom.awaitSample(`up{job="wrong"}`, "0", time.Time{})

	stopping := time.Now()
	gone := agent.stop()
	if down := prom.awaitSample(`up{job="good"}`, "0", stopping); down.at.Sub(gone) > soon {
		t.Errorf("up fell to 0 %s after the agent had gone, want at most %s", down.at.Sub(gone), soon)
	}
	back := time.Now()
	startAgent(t, proxy.url, web1, allow)
	prom.awaitSample(`up{job="good"}`, "1", back)
	if ups := prom.query(`max_over_time(up{job="wrong"}[10m])`); len(ups) != 1 || ups[0].Value.value != "0" {
		t.Errorf("with the wrong CA up is %v, want 0 throughout", ups)
	}
}

// Whoever looks at Prometheus's targets page is told what is wrong, with which
// target of which agent, and what to do.
func TestPrometheusShowsReasons(t *testing.T) {
	t.Parallel()
	holding := make(chan struct{}, 1)
	slow := serve(t, func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/held" {
			holding <- struct{}{}
		}
		<-r.Context().Done()
	})
	proxy := startProxy(t, "--scrape.reconnect-wait=100ms")
	narrow := startProxy(t, "--scrape.reconnect-wait=100ms", "--scrape.max-concurrent=1")
	startAgent(t, proxy.url, "gone.example.net", "--allow=9100", "--target=node=http://127.0.0.1:9100").stop()
	// Nothing ever listens on port 1.
	startAgent(t, proxy.url, web1, "--allow=1", "--target=node=http://127.0.0.1:1/metrics", "--target=slow="+slow.URL)
	startAgent(t, narrow.url, web1, "--target=held="+slow.URL+"/held", "--target=node=http://127.0.0.1:1")

	client := through(t, narrow.url, nil)
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		fetch(client, "http://held."+web1+"/held", "110")
	}()
	t.Cleanup(func() { <-answered })
	t.Cleanup(slow.CloseClientConnections)
	<-holding

	prom := startPrometheus(t, fmt.Sprintf(`
- job_name: http
  proxy_url: %[1]s
  scrape_interval: 2s
  scrape_timeout: 2s
  static_configs:
  - targets: [nobody.example.net:9100, node.gone.example.net, web-1.example.net:9, web-1.example.net:1, node.web-1.example.net, slow.web-1.example.net]
- job_name: https
  scheme: https
  proxy_url: %[1]s
  static_configs:
  - targets: [nobody.example.net:9100, gone.example.net:9100, web-1.example.net:9, web-1.example.net:1, node.web-1.example.net:443]
- job_name: narrow
  proxy_url: %[2]s
  static_configs:
  - targets: [node.web-1.example.net]
`, proxy.url, narrow.url))

	const agent, gone = `agent "` + web1 + `"`, `agent "gone.example.net"`
	for _, c := range []struct {
		job, instance string
		want          []string
	}{
		{"http", "nobody.example.net:9100", []string{"404 unknown-agent", `"nobody.example.net"`, "--fqdn"}},
		{"http", "node.gone.example.net:80", []string{"503 agent-offline", gone, "node.gone.example.net", "check culvert-client"}},
		{"http", web1 + ":9", []string{"403 not-allowed", agent, "port 9", "--allow=9"}},
		{"http", web1 + ":1", []string{"502 target-unreachable", agent, "port 1", "127.0.0.1:1", "connection refused", "is the exporter running"}},
		{"http", "node." + web1 + ":80", []string{"502 target-unreachable", agent, `target "node"`, "127.0.0.1:1", "connection refused", "is the exporter running"}},
		{"http", "slow." + web1 + ":80", []string{"504 timeout", agent, `"slow.` + web1 + `"`, "1.75s", "scrape_timeout"}},
		{"narrow", "node." + web1 + ":80", []string{"429 agent-busy", agent, "node." + web1, "--scrape.max-concurrent"}},
		{"https", "nobody.example.net:9100", []string{"unknown-agent", `"nobody.example.net"`, "--fqdn"}},
		{"https", "gone.example.net:9100", []string{"agent-offline", gone, "gone.example.net:9100", "check culvert-client"}},
		{"https", web1 + ":9", []string{"not-allowed", agent, "port 9", "--allow=9"}},
		{"https", web1 + ":1", []string{"target-unreachable", agent, "port 1", "127.0.0.1:1", "connection refused", "is the exporter running"}},
		{"https", "node." + web1 + ":443", []string{"not-allowed", agent, "named target", "scheme http"}},
	} {
		if err := try(10*time.Second, func() error { return prom.missingError(c.job, c.instance, c.want...) }); err != nil {
			t.Error(err)
		}
	}
}

// Without proxy_url all targets have one address, and are still told apart.
func TestPathMode(t *testing.T) {
	t.Parallel()
	a, b := serve(t, exposition("e2e_value 1\n")), serve(t, exposition("e2e_value 2\n"))
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/metrics/page" {
			w.Header().Set("Set-Cookie", "session=stolen")
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<script>alert(1)</script>")
			return
		}
		exposition("e2e_value 3\n")(w, r)
	})
	proxy := startProxy(t)
	startAgent(t, proxy.url, web1, "--target=a="+a.URL, "--target=b="+b.URL+"/metrics", "--target=c="+c.URL+"/metrics/*")
	prom := startPrometheus(t, fmt.Sprintf(`
- job_name: culvert
  http_sd_configs:
  - {url: "%s/targets?mode=path", refresh_interval: 1s}
`, proxy.url))

	instance := func(metric, target string) string {
		return fmt.Sprintf(`%s{instance="%s.%s"}`, metric, target, web1)
	}
	for value, target := range map[string]string{"1": "a", "2": "b", "3": "c"} {
		prom.awaitSample(instance("up", target), "1", time.Time{})
		prom.awaitSample(instance("e2e_value", target), value, time.Time{})
	}
	prom.awaitSample(instance("up", "agent"), "1", time.Time{})
	prom.awaitSample(instance("culvert_client_scrapes_in_flight", "agent"), "1", time.Time{})
	if all := prom.query("up"); len(all) != 4 {
		t.Errorf("there are %d series up, want 4: %v", len(all), all)
	}

	stopping := time.Now()
	b.Close()
	down := prom.awaitSample(instance("up", "b"), "0", stopping)
	for _, target := range []string{"a", "c", "agent"} {
		prom.awaitSample(instance("up", target), "1", down.at)
	}

	page := get(t, proxy.url+"/scrape/"+web1+"/c/metrics/page")
	if page.status != http.StatusOK || page.body != "<script>alert(1)</script>" {
		t.Errorf("the page arrived as %d %q", page.status, page.body)
	}
	if got := page.header.Get("Content-Type"); !strings.HasPrefix(got, "text/plain") {
		t.Errorf("HTML of a target arrives as %q, want text/plain", got)
	}
	for name, want := range map[string][]string{
		"Content-Security-Policy": {"sandbox; default-src 'none'"},
		"X-Content-Type-Options":  {"nosniff"},
		"Set-Cookie":              nil,
	} {
		if got := page.header.Values(name); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
}

// With TLS on the proxy's own listener, scrapers and agents reach it with https.
func TestProxyTLS(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	certFile, keyFile := ca.server("127.0.0.1")
	webConfig := write(t, t.TempDir(), "web.yml", fmt.Sprintf(`
tls_server_config: {cert_file: %s, key_file: %s}
http_server_config: {http2: true}
`, certFile, keyFile))
	plain := serve(t, exposition("e2e_value 1\n"))
	secure := ca.serveTLS(web1, exposition("e2e_value 2\n"))
	proxy := startProxy(t, "--web.config.file="+webConfig)
	startAgent(t, proxy.url, web1, "--tls.cacert="+ca.file, "--target=app="+plain.URL, "--allow="+port(t, secure))

	conn, err := tls.Dial("tcp", proxy.address, &tls.Config{RootCAs: ca.config().RootCAs, NextProtos: []string{"h2", "http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := conn.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
		t.Errorf("the listener chose %q, want http/1.1", got)
	}

	// tls_config is for the way to the proxy and for the target alike.
	prom := startPrometheus(t, fmt.Sprintf(`
- job_name: http
  proxy_url: %[1]s
  tls_config: &tls {ca_file: %[2]s}
  http_sd_configs:
  - {url: "%[1]s/targets", refresh_interval: 1s, tls_config: *tls}
- job_name: https
  scheme: https
  proxy_url: %[1]s
  tls_config: *tls
  static_configs: [{targets: ["%[3]s"]}]
`, proxy.url, ca.file, web1+":"+port(t, secure)))
	prom.awaitSample(`up{job="http",instance="app.`+web1+`"}`, "1", time.Time{})
	prom.awaitSample(`e2e_value{job="http"}`, "1", time.Time{})
	prom.awaitSample(`up{job="https"}`, "1", time.Time{})
	prom.awaitSample(`e2e_value{job="https"}`, "2", time.Time{})
}
