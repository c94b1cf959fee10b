package main_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
	"github.com/culvert-io/culvert/proxy/pushproxtest"
)

// Of agents and of clients of PushProx beside each other no scrape fails, but those that
// meet no proxy while it is restarted. CULVERT_PUSHPROX_FLEET=2m has it go on for that
// long.
func TestPushProxFleet(t *testing.T) {
	t.Parallel()
	length := 20 * time.Second
	if text := os.Getenv("CULVERT_PUSHPROX_FLEET"); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	exporter := serve(t, exposition("e2e_value 42\n"))
	exporterPort := exporter.URL[strings.LastIndex(exporter.URL, ":")+1:]
	// A client that was told of the end comes back within 1.5 s, and where it comes too
	// early, within 2.25 s more.
	flags := []string{"--storage.path=" + t.TempDir(), "--web.listen-address=" + externaltest.FreeAddress(t), "--scrape.reconnect-wait=4s"}
	proxy := startProxy(t, flags...)
	names := []string{}
	for i := range 3 {
		name := fmt.Sprintf("culvert-%d.example.net", i)
		startAgent(t, proxy.url, name, "--allow="+exporterPort)
		names = append(names, name)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	stop := sync.OnceFunc(func() { cancel(); running.Wait() })
	t.Cleanup(stop)
	targets := &http.Transport{DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, exporter.Listener.Addr().String()) // each is its own host
	}}
	t.Cleanup(targets.CloseIdleConnections)
	clients := make([]*pushproxtest.Client, 10)
	for i := range clients {
		clients[i] = &pushproxtest.Client{ProxyURL: proxy.url + "/", Name: fmt.Sprintf("pushprox-%d.example.net", i), Targets: targets}
		running.Go(func() { clients[i].Run(ctx) })
		names = append(names, clients[i].Name)
	}
	eventually(t, time.Minute, func() error {
		if n := proxy.gauge(`culvert_proxy_agents{state="connected"}`); n != float64(len(names)) {
			return fmt.Errorf("%g agents are connected, want %d", n, len(names))
		}
		return nil
	})
	prom := startPrometheus(t, fmt.Sprintf(`
- job_name: fleet
  scrape_interval: 5s
  scrape_timeout: 5s
  proxy_url: %[1]s/
  http_sd_configs:
  - {url: "%[1]s/clients", refresh_interval: 1s}
  relabel_configs:
  - {source_labels: [__address__], target_label: __address__, replacement: "$1:%[2]s"}
`, proxy.url, exporterPort))
	for _, name := range names {
		prom.awaitSample(`up{instance="`+name+":"+exporterPort+`"}`, "1", time.Time{})
	}
	began := time.Now()
	time.Sleep(length / 2)
	stopping := time.Now()
	proxy.stop()
	proxy = startProxy(t, flags...)
	ready := time.Now()
	time.Sleep(length / 2)

	scrapes, failed := 0, 0
	all := prom.query(`up{job="fleet"}[10m]`)
	if len(all) != len(names) {
		t.Errorf("Prometheus has %d targets, want %d", len(all), len(names))
	}
	for _, one := range all {
		last := began
		for _, s := range one.Values {
			scrapes++
			if s.value != "1" {
				failed++
				if s.at.Before(stopping) || s.at.After(ready) {
					t.Errorf("%s: a scrape at %s failed; the proxy was away from %s to %s", one.Metric["instance"], s.at, stopping, ready)
				}
			}
			if gap := s.at.Sub(last); gap > 8*time.Second {
				t.Errorf("%s: no scrape for %s", one.Metric["instance"], gap)
			}
			last = s.at
		}
	}
	stop()
	var polls, pushes, errs int64
	for _, c := range clients {
		polls, pushes, errs = polls+c.PollErrors.Load(), pushes+c.PushErrors.Load(), errs+c.ScrapeErrors.Load()
	}
	t.Logf("%d targets, %s: %d scrapes, of which %d met no proxy during its restart of %s; %d PushProx clients had %d poll errors (one and more each for the restart), %d push errors, %d scrape errors",
		len(all), length, scrapes, failed, ready.Sub(stopping).Round(time.Millisecond), len(clients), polls, pushes, errs)
}
