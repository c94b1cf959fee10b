package main_test

import (
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// What the proxy says to paste into Prometheus is valid, and scrapes all that is there:
// declared targets, agents themselves, ports that were asked for, ports and hosts that
// answered before, TLS that goes through, what jobs pushed, and the proxy itself.
func TestScrapeConfig(t *testing.T) {
	t.Parallel()
	promtool := externaltest.Program(t, "promtool", "prometheus")
	ca := newAuthority(t)
	asked := serve(t, exposition("asked_for 1\n"))
	answered := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/actuator/prometheus" {
			http.NotFound(w, r)
			return
		}
		fmt.Fprintln(w, "answered 1")
	})
	secure := ca.serveTLS(web1, exposition("secure 1\n"))
	declared := serve(t, exposition("declared 1\n"))
	proxy := startProxy(t)
	startAgent(t, proxy.url, web1, "--allow="+port(t, asked), "--allow="+port(t, answered), "--allow="+port(t, secure), "--target=router="+declared.URL+"/metrics", "--host=db.lan=127.0.0.1")
	client := through(t, proxy.url, ca.config())
	for _, u := range []string{
		"http://" + web1 + ":" + port(t, answered) + "/actuator/prometheus", "http://db.lan:" + port(t, answered) + "/actuator/prometheus",
		"http://" + web1 + ":" + port(t, asked) + "/metrics", "https://" + web1 + ":" + port(t, secure) + "/metrics",
	} {
		if a, err := fetch(client, u, ""); err != nil || a.status != http.StatusOK {
			t.Fatalf("%s: %v %v", u, a, err)
		}
	}
	// What did not answer is not listed.
	fetch(client, "http://"+web1+":1/metrics", "")
	pushed, err := http.Post(proxy.url+"/metrics/job/backup", "text/plain", strings.NewReader("pushed 1\n"))
	if err != nil {
		t.Fatal(err)
	}
	pushed.Body.Close()

	u := proxy.url + "/api/v1/scrape_config?port=" + port(t, asked)
	var config string
	eventually(t, 10*time.Second, func() error { // a scrape is logged when its end is through
		a := get(t, u)
		if config = a.body; a.status != http.StatusOK || strings.Count(config, "job_name: port-") != 3 {
			return fmt.Errorf("%d\n%s", a.status, config)
		}
		return nil
	})
	t.Logf("%s", config)
	file := write(t, t.TempDir(), "prometheus.yml", config)
	if out, err := exec.CommandContext(t.Context(), promtool, "check", "config", file).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, config)
	}
	prom := startPrometheusFile(t, config, ca.file)
	want := []string{
		"culvert-targets agent." + web1, "culvert-targets router." + web1, "port-" + port(t, asked) + " " + web1 + ":" + port(t, asked),
		"port-" + port(t, answered) + "/actuator/prometheus " + web1 + ":" + port(t, answered), "port-" + port(t, answered) + "/actuator/prometheus db.lan:" + port(t, answered),
		"port-" + port(t, secure) + "-https " + web1 + ":" + port(t, secure), "culvert-proxy " + proxy.address,
	}
	slices.Sort(want)
	eventually(t, 30*time.Second, func() error {
		var up []string
		for _, target := range prom.targets() {
			if target.Health == "up" {
				up = append(up, target.Labels["job"]+" "+target.Labels["instance"])
			} else {
				up = append(up, fmt.Sprintf("%v", target))
			}
		}
		if slices.Sort(up); !slices.Equal(up, want) {
			return fmt.Errorf("got\n%s\nwant\n%s", strings.Join(up, "\n"), strings.Join(want, "\n"))
		}
		return nil
	})
	for _, metric := range []string{"asked_for", "secure", "declared", `pushed{job="backup"}`} {
		prom.awaitSample(metric, "1", time.Time{})
	}
}

// With roles the placeholders stand where the credentials have to be.
func TestScrapeConfigRoles(t *testing.T) {
	t.Parallel()
	promtool := externaltest.Program(t, "promtool", "prometheus")
	hash, err := bcrypt.GenerateFromPassword([]byte("s3cret"), bcrypt.MinCost)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	const token = "a-token-of-the-agent"
	file := write(t, dir, "culvert.yml", fmt.Sprintf(`
roles:
  scrapers: [{name: prometheus, basic_auth: {username: prom, password_hash: '%s'}}]
  agents: [{name: web, token_file: agent.token, agents: ['*.example.net']}]
`, hash))
	write(t, dir, "agent.token", token+"\n")
	proxy := startProxy(t, "--config.file="+file)
	startAgent(t, proxy.url, web1, "--token-file="+filepath.Join(dir, "agent.token"))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, proxy.url+"/api/v1/scrape_config", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.SetBasicAuth("prom", "s3cret")
	resp, err := direct.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatal(resp.Status, err)
	}
	config := string(body)
	if strings.Contains(config, "s3cret") || strings.Contains(config, "prom:") {
		t.Errorf("it has a credential:\n%s", config)
	}
	checked := write(t, t.TempDir(), "prometheus.yml", config)
	if out, err := exec.CommandContext(t.Context(), promtool, "check", "config", checked).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s\n%s", err, out, config)
	}
	prom := startPrometheusFile(t, strings.NewReplacer("USERNAME", "prom", "PASSWORD", "s3cret").Replace(config), "")
	eventually(t, 30*time.Second, func() error {
		up := 0
		for _, target := range prom.targets() {
			if target.Health == "up" {
				up++
			}
		}
		if up != 2 {
			return fmt.Errorf("%d targets are up: %v", up, prom.targets())
		}
		return nil
	})
}

// startPrometheusFile starts Prometheus with the jobs of a whole configuration. A private
// authority is added to those of https.
func startPrometheusFile(t *testing.T, config, ca string) *prometheus {
	t.Helper()
	_, jobs, ok := strings.Cut(config, "scrape_configs:\n")
	if !ok {
		t.Fatalf("no scrape_configs in\n%s", config)
	}
	if ca != "" {
		jobs = strings.ReplaceAll(jobs, "scheme: https\n", "scheme: https\n  tls_config: {ca_file: "+ca+"}\n")
	}
	return startPrometheus(t, jobs)
}
