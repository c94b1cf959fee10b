package main_test

import (
	"fmt"
	"net/http"
	"net/url"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// BenchmarkCluster tells, with 5,000 groups and 2,000 agents on three proxies, how long it
// takes until an agent that has come to one can be scraped through the others too, and
// until a push that one has acknowledged is on the others.
func BenchmarkCluster(b *testing.B) {
	const groups, agents, newAgents = 5000, 2000, 200
	etcd := externaltest.StartEtcd(b)
	var proxies []*proxyProcess
	for range 3 {
		proxies = append(proxies, startProxy(b, "--cluster.etcd-endpoints="+etcd.URL, "--cluster.listen-address=127.0.0.1:0"))
	}
	for _, p := range proxies {
		eventually(b, time.Minute, func() error {
			a, err := fetch(direct, p.url+"/-/ready?for=push", "")
			if err == nil && a.status != http.StatusOK {
				err = fmt.Errorf("%d %s", a.status, a.body)
			}
			return err
		})
	}
	loadtest := filepath.Join(b.TempDir(), "loadtest")
	if out, err := exec.Command("go", "build", "-o", loadtest, "../examples/loadtest").CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	play := func(first, number, proxy int) {
		start(b, "agents", loadtest, "agents", "--proxy-url="+proxies[proxy].url, fmt.Sprintf("--first=%d", first), fmt.Sprintf("--agents=%d", number))
	}
	for n := range proxies {
		play(n*agents, agents/3+1, n)
	}
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	defer client.CloseIdleConnections()
	body := strings.Builder{}
	for n := range 20 {
		fmt.Fprintf(&body, "e2e_value{n=\"%d\"} %d\n", n, n)
	}
	push := func(n, proxy int) {
		a, err := send(client, http.MethodPut, fmt.Sprintf("%s/metrics/job/j/instance/%d", proxies[proxy].url, n), body.String())
		if err != nil || a.status != http.StatusOK {
			b.Fatalf("push: %d %s, %v", a.status, a.body, err)
		}
	}
	for n := range groups {
		push(n, 0)
	}
	for _, p := range proxies {
		eventually(b, time.Minute, func() error {
			known, err := p.connected()
			if err == nil && len(known) < agents {
				err = fmt.Errorf("%d agents", len(known))
			}
			return err
		})
	}
	report := func(b *testing.B, took []time.Duration) {
		slices.Sort(took)
		b.ReportMetric(float64(took[len(took)/2])/1e6, "p50-ms")
		b.ReportMetric(float64(took[len(took)*99/100])/1e6, "p99-ms")
		b.ReportMetric(0, "ns/op")
	}
	// onAll returns how long it takes until f is true for the other proxies than from.
	onAll := func(b *testing.B, from int, f func(p *proxyProcess) bool) time.Duration {
		begin := time.Now()
		var seeing sync.WaitGroup
		for n, p := range proxies {
			if n == from {
				continue
			}
			seeing.Go(func() {
				for !f(p) {
					if time.Since(begin) > time.Minute {
						b.Error("not after a minute")
						return
					}
					time.Sleep(time.Millisecond)
				}
			})
		}
		seeing.Wait()
		return time.Since(begin)
	}
	b.Run("push", func(b *testing.B) {
		var took []time.Duration
		n := groups
		for b.Loop() {
			push(n, n%3)
			selector := url.QueryEscape(fmt.Sprintf(`{instance="%d"}`, n))
			took = append(took, onAll(b, n%3, func(p *proxyProcess) bool {
				a, err := send(client, http.MethodDelete, p.url+"/api/v1/groups?dry_run=true&match[]="+selector, "")
				return err == nil && strings.Contains(a.body, fmt.Sprintf("%q", fmt.Sprint(n)))
			}))
			n++
		}
		report(b, took)
	})
	b.Run("agent", func(b *testing.B) {
		first := 10 * agents
		var took []time.Duration
		for b.Loop() {
			var mu sync.Mutex
			var waiting sync.WaitGroup
			play(first, newAgents, 0)
			for n := first; n < first+newAgents; n += newAgents / 20 { // to ask for all would be a load of its own
				waiting.Go(func() {
					scraped := func(p *proxyProcess) bool {
						resp, err := (&http.Transport{Proxy: func(*http.Request) (*url.URL, error) { return url.Parse(p.url) }, DisableKeepAlives: true}).
							RoundTrip(must(http.NewRequest(http.MethodGet, fmt.Sprintf("http://app-0.agent-%d/metrics", n), nil)))
						if err != nil {
							return false
						}
						resp.Body.Close()
						return resp.StatusCode == http.StatusOK
					}
					for !scraped(proxies[0]) {
						time.Sleep(5 * time.Millisecond)
					}
					d := onAll(b, 0, scraped)
					mu.Lock()
					defer mu.Unlock()
					took = append(took, d)
				})
			}
			waiting.Wait()
			first += newAgents
		}
		report(b, took)
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
