package server_test

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/proxy/server"
)

// metricSum adds up the counters and gauges of a family whose labels hold all the
// given values.
func metricSum(t *testing.T, g prometheus.Gatherer, family string, values ...string) float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != family {
			continue
		}
	metric:
		for _, m := range f.GetMetric() {
		value:
			for _, v := range values {
				for _, l := range m.GetLabel() {
					if l.GetValue() == v {
						continue value
					}
				}
				continue metric
			}
			sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return sum
}

// TestMetrics: the metrics of both programs are lint-free once every kind of
// scrape has been there, and count what happened.
func TestMetrics(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	p := newProxy(t, func(c *server.Config) { c.Registry = registry })
	_, port := newTarget(t, nil)
	a := newAgent(t, p, allowAll)
	p.get("http://web-1:"+port+"/metrics").ok(t, "up 1")
	p.get("/scrape/web-1/"+port+"/metrics").ok(t, "up 1")
	p.get("http://agent.web-1/metrics").ok(t, "culvert_client_connected")
	p.get("http://nobody/metrics").refused(t, 404, "unknown-agent")
	p.get("/metrics", "Host: web-1").refused(t, 421, "misdirected")
	p.send("CONNECT", "web-1:1").refused(t, 502, "target-unreachable")
	p.get("/tunnel").refused(t, 400, "no-upgrade")
	startAgent(t, p, func(c *agent.Config) {}).logs.wait(t, "Not connected", "taken") // the name is taken

	for name, g := range map[string]prometheus.Gatherer{"proxy": registry, "client": a.Gatherer()} {
		t.Run(name, func(t *testing.T) {
			problems, err := testutil.GatherAndLint(g)
			if err != nil {
				t.Fatal(err)
			}
			for _, problem := range problems {
				t.Errorf("%s: %s", problem.Metric, problem.Text)
			}
		})
	}
	for _, c := range []struct {
		family string
		labels []string
		want   float64
	}{
		{"culvert_proxy_scrapes_total", []string{"proxy", "ok"}, 2},
		{"culvert_proxy_scrapes_total", []string{"path", "ok"}, 1},
		{"culvert_proxy_scrapes_total", []string{"proxy", "unknown-agent"}, 1},
		{"culvert_proxy_scrapes_total", []string{"misdirected", "misdirected"}, 1},
		{"culvert_proxy_scrapes_total", []string{"connect", "target-unreachable"}, 1},
		{"culvert_proxy_handshakes_total", []string{"no-upgrade"}, 1},
		{"culvert_proxy_handshakes_total", []string{"ok"}, 2},
		{"culvert_proxy_registrations_total", []string{"ok"}, 1},
		{"culvert_proxy_registrations_total", []string{"taken"}, 1},
		{"culvert_proxy_agents", []string{"connected"}, 1},
		{"culvert_proxy_agents", []string{"lost"}, 0},
		{"culvert_proxy_fleet_stored", nil, 0},
	} {
		if got := metricSum(t, registry, c.family, c.labels...); got != c.want {
			t.Errorf("%s%q is %v, want %v", c.family, c.labels, got, c.want)
		}
	}
}
