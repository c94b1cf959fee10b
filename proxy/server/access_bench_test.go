package server_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/bcrypt"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/server"
)

// BenchmarkScrapeCredentials scrapes through a proxy that asks for a password that is
// hashed with bcrypt at its usual cost, and beside each scrape through one that asks
// for nothing. x-open is the ratio of the
// medians of their times.
func BenchmarkScrapeCredentials(b *testing.B) {
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.DefaultCost)
	if err != nil {
		b.Fatal(err)
	}
	file := filepath.Join(b.TempDir(), "culvert.yml")
	text := fmt.Sprintf("roles:\n  scrapers: [{name: prom, basic_auth: {username: prom, password_hash: '%s'}}]\n  agents: [{name: all, token_hash: %s, agents: ['*']}]\n", hash, hashOf("agent"))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	token := filepath.Join(b.TempDir(), "token")
	if err := os.WriteFile(token, []byte("agent"), 0o600); err != nil {
		b.Fatal(err)
	}
	body := strings.Repeat("some_metric{label=\"value\"} 1234567\n", 100_000/35)
	exporter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var size int
		fmt.Sscan(r.URL.Query().Get("size"), &size)
		io.WriteString(w, body[:size])
	}))
	b.Cleanup(exporter.Close)
	port := exporter.URL[strings.LastIndex(exporter.URL, ":"):]
	logger := slog.New(slog.DiscardHandler)
	start := func(configFile string, user *url.Userinfo) *http.Client {
		s, err := server.New(server.Config{ListenAddresses: []string{"127.0.0.1:0"}, Fleet: fleet.Config{SettleTime: -1}, Logger: logger, ConfigFile: configFile})
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Listen(); err != nil {
			b.Fatal(err)
		}
		a, err := agent.New(agent.Config{Name: "web-1", ProxyURLs: []string{"http://" + s.Addr()}, Logger: logger, TokenFile: token,
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
		return &http.Client{Transport: &http.Transport{DisableCompression: true,
			Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: s.Addr(), User: user})}}
	}
	open, closed := start("", nil), start(file, url.UserPassword("prom", "secret"))
	get := func(c *http.Client, size int) time.Duration {
		start := time.Now()
		resp, err := c.Get(fmt.Sprintf("http://web-1%s/metrics?size=%d", port, size))
		if err != nil {
			b.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil || n != int64(size) || resp.StatusCode != http.StatusOK {
			b.Fatalf("%s: %d bytes, %v", resp.Status, n, err)
		}
		return time.Since(start)
	}
	for _, size := range []int{1_000, 90_000} {
		b.Run(fmt.Sprintf("%dkB", size/1000), func(b *testing.B) {
			var baseline, checked []time.Duration
			get(closed, size) // bcrypt once
			for i := 0; b.Loop(); i++ {
				if i%2 == 0 { // the second of two finds warm caches, or the garbage of the first
					baseline = append(baseline, get(open, size))
					checked = append(checked, get(closed, size))
				} else {
					checked = append(checked, get(closed, size))
					baseline = append(baseline, get(open, size))
				}
			}
			slices.Sort(baseline)
			slices.Sort(checked)
			b.ReportMetric(float64(checked[len(checked)/2])/float64(baseline[len(baseline)/2]), "x-open")
		})
	}
}
