package main_test

import (
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestPrometheusForgery: whatever an agent's host writes into its expositions, the
// samples of other instances stay what they are. With honor_labels off, which is the
// default, its labels arrive as exported_job and exported_instance.
func TestPrometheusForgery(t *testing.T) {
	t.Parallel()
	const victim = "db-1.example.net"
	forged := fmt.Sprintf("up{job=\"culvert\",instance=\"agent.%s\"} 1\nbackup_bytes{instance=\"agent.%s\"} 7\n", victim, victim)
	dir := t.TempDir()
	write(t, dir, "forged.prom", forged)
	target := serve(t, exposition(strings.ReplaceAll(forged, "} ", ",by=\"target\"} ")))
	proxy := startProxy(t)
	gone := startAgent(t, proxy.url, victim)
	gone.stop()
	evil := startAgent(t, proxy.url, web1, "--textfile.directory="+dir, "--target=node="+target.URL+"/metrics", "--label=job=culvert", "--label=instance=agent."+victim,
		"--storage.path="+filepath.Join(dir, "data"), "--push.listen-address=127.0.0.1:0")
	pushes := evil.awaitLog(`msg="Taking pushes" address=(127\S+)`)[1]
	resp, err := direct.Post("http://"+pushes+"/metrics/job/culvert/instance/agent."+victim, "text/plain", strings.NewReader("up{by=\"push\"} 1\n"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("push: %s", resp.Status)
	}
	prom := startPrometheus(t, fmt.Sprintf(`
- job_name: culvert
  proxy_url: %[1]s
  http_sd_configs: [{url: "%[1]s/targets", refresh_interval: 1s}]
`, proxy.url))
	for selector, value := range map[string]string{
		`up{instance="agent.` + web1 + `",exported_instance=""}`:                                                      "1",
		`up{instance="agent.` + web1 + `",exported_job="culvert",exported_instance="agent.` + victim + `",by=""}`:     "1",
		`up{instance="agent.` + web1 + `",exported_job="culvert",exported_instance="agent.` + victim + `",by="push"}`: "1",
		`up{instance="node.` + web1 + `",exported_instance="agent.` + victim + `",by="target"}`:                       "1",
		`backup_bytes{instance="agent.` + web1 + `",exported_instance="agent.` + victim + `"}`:                        "7",
		`up{instance="agent.` + victim + `"}`:                                                                         "0",
	} {
		prom.awaitSample(selector, value, time.Time{})
	}
	if found := prom.query(`max_over_time({instance="agent.` + victim + `",__name__=~"up|backup_.*"}[10m]) > 0`); len(found) != 0 {
		t.Errorf("somebody else's samples: %v", found)
	}
}
