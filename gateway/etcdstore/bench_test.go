package etcdstore_test

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-io/culvert/gateway"
)

// benchmarkBody has 50 series, one a metric.
func benchmarkBody() string {
	var body strings.Builder
	for i := range 50 {
		fmt.Fprintf(&body, "# TYPE bench_metric_%02d gauge\nbench_metric_%02d{kind=\"some_value\"} %d\n", i, i, i)
	}
	return body.String()
}

// BenchmarkPush pushes 50 series to one of 300 groups, from 48 clients at a time, without
// HTTP: to one proxy, and to three that share etcd. Beside it the same etcd is written to
// directly, one key in each request, by one client and by 48.
func BenchmarkPush(b *testing.B) {
	body := benchmarkBody()
	const clients, groups = 48, 300
	parallel := func(b *testing.B, clients int, f func(n int)) {
		var next atomic.Int64
		var all []func()
		b.ResetTimer()
		for range clients {
			all = append(all, func() {
				for n := next.Add(1); n <= int64(b.N); n = next.Add(1) {
					f(int(n))
				}
			})
		}
		atOnce(all...)
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "pushes/s")
	}
	for _, n := range []int{1, 3} {
		b.Run(fmt.Sprint("proxies=", n), func(b *testing.B) {
			proxies, _, _ := several(b, n, gateway.StoreConfig{})
			push := func(n int) {
				proxies[n%len(proxies)].want(200, "PUT", fmt.Sprintf("/bench/instance/host-%05d", n%groups), body)
			}
			for n := range groups {
				push(n)
			}
			var before [3]float64
			for i, p := range proxies {
				before[i] = p.metric("push_store_conflicts_total")
			}
			parallel(b, clients, push)
			conflicts := 0.0
			for i, p := range proxies {
				conflicts += p.metric("push_store_conflicts_total") - before[i]
			}
			b.ReportMetric(conflicts/float64(b.N), "conflicts/push")
		})
	}
	for _, clients := range []int{1, clients} {
		b.Run(fmt.Sprint("etcd/clients=", clients), func(b *testing.B) {
			client := newClient(b, sharedEtcd(b).Address)
			value := strings.Repeat("x", 700) // what such a record takes, packed
			parallel(b, clients, func(n int) {
				if _, err := client.Put(b.Context(), fmt.Sprint("bench/", n%groups), value); err != nil {
					b.Error(err)
				}
			})
		})
	}
}

// BenchmarkVisible measures the time from the acknowledgement of a push to one proxy to
// when two others show it.
func BenchmarkVisible(b *testing.B) {
	proxies, _, _ := several(b, 3, gateway.StoreConfig{})
	var times []time.Duration
	b.ResetTimer()
	for n := range b.N {
		p := proxies[n%3]
		p.want(200, "PUT", "/visible", fmt.Sprintf("visible %d\n", n))
		acknowledged := time.Now()
		for i := 1; i < 3; {
			if strings.Contains(proxies[(n+i)%3].groups(), fmt.Sprintf("visible{instance=\"\",job=\"visible\"} %d\n", n)) {
				i++
			} else {
				runtime.Gosched()
			}
		}
		times = append(times, time.Since(acknowledged))
	}
	slices.Sort(times)
	b.ReportMetric(float64(times[len(times)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "p99-us")
}
