package server_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol/externaltest"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/server"
)

// BenchmarkScrape scrapes one exporter through proxy and agent, and beside each
// scrape does a direct one. x-direct is the ratio of the times.
func BenchmarkScrape(b *testing.B) {
	logger := slog.New(slog.DiscardHandler)
	s, err := server.New(server.Config{ListenAddresses: []string{"127.0.0.1:0"}, Fleet: fleet.Config{SettleTime: -1}, Logger: logger})
	if err != nil {
		b.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		b.Fatal(err)
	}
	body := strings.Repeat("some_metric{label=\"value\"} 1234567\n", 5<<20/35)
	exporter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var size int
		fmt.Sscan(r.URL.Query().Get("size"), &size)
		w.Header().Set("Content-Length", fmt.Sprint(size))
		io.WriteString(w, body[:size])
	}))
	b.Cleanup(exporter.Close)
	a, err := agent.New(agent.Config{Name: "web-1", ProxyURLs: []string{"http://" + s.Addr()}, Logger: logger,
		LocalHost: "127.0.0.1", Allow: []agent.PortRange{{First: 1, Last: 65535}}})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{}, 2)
	go func() { s.Run(ctx); ended <- struct{}{} }()
	go func() { a.Run(ctx); ended <- struct{}{} }()
	b.Cleanup(func() { cancel(); <-ended; <-ended })
	for len(a.Connected()) == 0 {
		time.Sleep(time.Millisecond)
	}
	proxyURL := &url.URL{Scheme: "http", Host: s.Addr()}
	direct := &http.Client{Transport: &http.Transport{DisableCompression: true}}
	through := &http.Client{Transport: &http.Transport{DisableCompression: true, Proxy: http.ProxyURL(proxyURL)}}
	port := exporter.URL[strings.LastIndex(exporter.URL, ":"):]
	buf := make([]byte, 64<<10)
	get := func(c *http.Client, u string, size int) time.Duration {
		start := time.Now()
		resp, err := c.Get(u)
		if err != nil {
			b.Fatal(err)
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, resp.Body, buf)
		resp.Body.Close()
		if err != nil || n != int64(size) {
			b.Fatalf("%s: %d bytes, %v", resp.Status, n, err)
		}
		return time.Since(start)
	}
	for _, size := range []int{1_000, 100_000, 5_000_000} {
		b.Run(fmt.Sprintf("%dkB", size/1000), func(b *testing.B) {
			var baseline, tunnel time.Duration
			query := fmt.Sprintf("/metrics?size=%d", size)
			for b.Loop() {
				baseline += get(direct, exporter.URL+query, size)
				tunnel += get(through, "http://web-1"+port+query, size)
			}
			b.ReportMetric(float64(tunnel)/float64(baseline), "x-direct")
			b.ReportMetric(float64(tunnel.Nanoseconds())/float64(b.N), "ns/scrape")
		})
	}
	direct.CloseIdleConnections()
	through.CloseIdleConnections()
}

// BenchmarkForwarded scrapes one exporter through the proxy that holds its agent, and
// beside each scrape does one through another proxy, which passes it on to the first.
// x-local is the ratio of the times.
func BenchmarkForwarded(b *testing.B) {
	etcd := externaltest.StartEtcd(b)
	logger := slog.New(slog.DiscardHandler)
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	b.Cleanup(func() { cancel(); running.Wait() })
	var proxies [2]*server.Server
	for i := range proxies {
		config := server.Config{ListenAddresses: []string{"127.0.0.1:0"}, Fleet: fleet.Config{SettleTime: -1}, Logger: logger, ShutdownTimeout: time.Second}
		config.Cluster.Endpoints, config.Cluster.ListenAddress = []string{etcd.URL}, "127.0.0.1:0"
		s, err := server.New(config)
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Listen(); err != nil {
			b.Fatal(err)
		}
		proxies[i] = s
		running.Go(func() { s.Run(ctx) })
	}
	body := strings.Repeat("some_metric{label=\"value\"} 1234567\n", 5<<20/35)
	exporter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var size int
		fmt.Sscan(r.URL.Query().Get("size"), &size)
		w.Header().Set("Content-Length", fmt.Sprint(size))
		io.WriteString(w, body[:size])
	}))
	b.Cleanup(exporter.Close)
	a, err := agent.New(agent.Config{Name: "web-1", ProxyURLs: []string{"http://" + proxies[0].Addr()}, Logger: logger,
		LocalHost: "127.0.0.1", Allow: []agent.PortRange{{First: 1, Last: 65535}}})
	if err != nil {
		b.Fatal(err)
	}
	running.Go(func() { a.Run(ctx) })
	client := func(s *server.Server) *http.Client {
		transport := &http.Transport{DisableCompression: true, Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: s.Addr()})}
		b.Cleanup(transport.CloseIdleConnections)
		return &http.Client{Transport: transport}
	}
	local, passed := client(proxies[0]), client(proxies[1])
	port := exporter.URL[strings.LastIndex(exporter.URL, ":"):]
	buf := make([]byte, 64<<10)
	get := func(c *http.Client, size int) (time.Duration, error) {
		start := time.Now()
		resp, err := c.Get(fmt.Sprintf("http://web-1%s/metrics?size=%d", port, size))
		if err != nil {
			return 0, err
		}
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, resp.Body, buf)
		resp.Body.Close()
		if err == nil && n != int64(size) {
			err = fmt.Errorf("%s: %d bytes", resp.Status, n)
		}
		return time.Since(start), err
	}
	for {
		_, err1 := get(local, 10)
		_, err2 := get(passed, 10)
		if err1 == nil && err2 == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	for _, size := range []int{1_000, 100_000, 5_000_000} {
		b.Run(fmt.Sprintf("%dkB", size/1000), func(b *testing.B) {
			var here, there time.Duration
			for b.Loop() {
				l, err := get(local, size)
				if err != nil {
					b.Fatal(err)
				}
				p, err := get(passed, size)
				if err != nil {
					b.Fatal(err)
				}
				here, there = here+l, there+p
			}
			b.ReportMetric(float64(there)/float64(here), "x-local")
			b.ReportMetric(float64(there.Nanoseconds())/float64(b.N), "ns/scrape")
		})
	}
}
