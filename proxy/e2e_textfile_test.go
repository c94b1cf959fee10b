package main_test

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// fleeting are lines that may be others at each scrape.
var fleeting = regexp.MustCompile(`(?m)^(# HELP |# TYPE )?(go_|process_|node_scrape_|culvert_client_([^t]|tu)).*\n`)

// TestTextfiles: what stands in the agent's textfile directories comes through the
// proxy, and at --metrics-addr; a reload adds a directory.
func TestTextfiles(t *testing.T) {
	t.Parallel()
	if err := programs(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"jobs-a", "jobs-b", "more"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir, "jobs-a/backup.prom", "# HELP backup_bytes Size.\n# TYPE backup_bytes counter\nbackup_bytes{disk=\"a\"} 1\n")
	write(t, dir, "jobs-b/backup.prom", "# TYPE backup_bytes counter\nbackup_bytes{disk=\"b\"} 2\n")
	write(t, dir, "jobs-b/bad.prom", "half")
	write(t, dir, "jobs-b/clash.prom", "# TYPE culvert_client_streams gauge\nculvert_client_streams 99\n")
	write(t, dir, "more/late.om", "# TYPE late gauge\nlate 3\n# EOF\n")
	old := write(t, dir, "jobs-b/old.prom", "old 1\n")
	if err := os.Chtimes(old, time.Unix(1e9, 0), time.Unix(1e9, 0)); err != nil {
		t.Fatal(err)
	}
	config := write(t, dir, "agent.yml", "")
	proxy := startProxy(t)
	agent := start(t, "culvert-client", filepath.Join(programDir, "culvert-client"), "--proxy-url="+proxy.url, "--fqdn="+web1,
		"--metrics-addr=127.0.0.1:0", "--config.file="+config, "--textfile.directory="+dir+"/jobs-*", "--textfile.max-age=1h")
	agent.awaitLog(`msg=Connected`)
	client := through(t, proxy.url, nil)
	scrape := func(u string) string {
		t.Helper()
		a, err := fetch(client, u, "10")
		if err != nil || a.status != http.StatusOK {
			t.Fatalf("%s: %d %s %v", u, a.status, a.body, err)
		}
		return a.body
	}
	body := scrape("http://agent." + web1 + "/metrics")
	for _, line := range []string{
		"# HELP backup_bytes Size.\n# TYPE backup_bytes counter\nbackup_bytes{disk=\"a\"} 1\nbackup_bytes{disk=\"b\"} 2\n",
		fmt.Sprintf("culvert_client_textfile_errors{file=%q,reason=\"parse\"} 1\n", dir+"/jobs-b/bad.prom"),
		fmt.Sprintf("culvert_client_textfile_errors{file=%q,reason=\"too_old\"} 1\n", dir+"/jobs-b/old.prom"),
		fmt.Sprintf("culvert_client_textfile_dropped_series{file=%q,reason=\"duplicate\"} 1\n", dir+"/jobs-b/clash.prom"),
		fmt.Sprintf("node_textfile_mtime_seconds{file=%q} 1e+09\n", dir+"/jobs-b/old.prom"),
		"node_textfile_scrape_error 1\n",
		"\nculvert_client_connected{proxy=\"" + proxy.url + "\"} 1\n",
	} {
		if !strings.Contains(body, line) {
			t.Errorf("the target agent lacks %q in\n%s", line, body)
		}
	}
	if strings.Contains(body, "culvert_client_streams 99") || strings.Contains(body, "\nold ") {
		t.Errorf("the target agent shows too much:\n%s", body)
	}
	address := agent.awaitLog(`msg="Serving the agent's metrics" address=(\S+)`)[1]
	if own := get(t, "http://"+address+"/metrics").body; fleeting.ReplaceAllString(own, "") != fleeting.ReplaceAllString(body, "") {
		t.Errorf("--metrics-addr serves\n%s\nthe target agent\n%s", own, body)
	}

	write(t, dir, "agent.yml", "textfile: {directories: [more]}\n")
	agent.signal(syscall.SIGHUP)
	agent.awaitLog(`msg="Configuration reloaded"`)
	if body := scrape("http://agent." + web1 + "/metrics"); !strings.Contains(body, "\nlate 3\n") || !strings.Contains(body, "\nbackup_bytes{disk=\"b\"} 2\n") {
		t.Errorf("after the reload:\n%s", body)
	}
	agent.stop()
}

// TestPrometheusTextfiles: a real Prometheus, which likes OpenMetrics best, stores the
// names that stand in the files.
func TestPrometheusTextfiles(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, "backup.prom", "# TYPE backup_bytes counter\nbackup_bytes 7\n# TYPE backup_seconds histogram\nbackup_seconds_bucket{le=\"1\"} 1\nbackup_seconds_count 2\nbackup_seconds_sum 3\n")
	proxy := startProxy(t)
	startAgent(t, proxy.url, web1, "--textfile.directory="+dir)
	prom := startPrometheus(t, fmt.Sprintf("- {job_name: agent, proxy_url: %q, static_configs: [{targets: [agent.%s]}]}\n", proxy.url, web1))
	start := time.Now()
	for selector, value := range map[string]string{
		"backup_bytes": "7", `backup_seconds_bucket{le="+Inf"}`: "2", `backup_seconds_bucket{le=~"1|1.0"}`: "1", "node_textfile_scrape_error": "0",
		`up{job="agent"}`: "1",
	} {
		prom.awaitSample(selector, value, start.Add(-time.Minute))
	}
	write(t, dir, "backup.prom", "backup_bytes")
	prom.awaitSample("node_textfile_scrape_error", "1", start)
	prom.awaitSample(`culvert_client_textfile_errors{reason="parse"}`, "1", start)
}
