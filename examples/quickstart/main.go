// Command quickstart runs Culvert's main job on one machine and shows it: an
// exporter that listens on loopback only, an agent that dials out to a proxy, a cron
// job that leaves a textfile on the agent's host, a batch job that pushes to the proxy,
// and scrapes the way Prometheus does them.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/client_golang/prometheus/push"
	"golang.org/x/sync/errgroup"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/client/textfile"
	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/server"
)

func main() {
	once := flag.Bool("once", false, "exit after the first round of scrapes")
	address := flag.String("listen", "127.0.0.1:8080", "address of the proxy; where it is taken, a free port is used")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout, *address, *once); err != nil {
		fmt.Fprintf(os.Stderr, "quickstart: %v\n", err)
		os.Exit(1)
	}
}

// run starts everything, scrapes once, and stays up until ctx ends, unless once.
func run(ctx context.Context, out io.Writer, address string, once bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	dir, err := os.MkdirTemp("", "culvert-quickstart-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	logger := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	all, ctx := errgroup.WithContext(ctx)

	exporter, err := startExporter(ctx, all)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "1. An exporter listens on %s, which nobody outside can reach.\n", exporter)

	proxy, err := startProxy(ctx, all, address, dir, logger)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "2. culvert-proxy listens on %s.\n", proxy)

	textfiles, err := writeTextfile(dir)
	if err != nil {
		return err
	}
	_, port, _ := net.SplitHostPort(exporter)
	allowed, err := agent.ParsePortRange(port)
	if err != nil {
		return err
	}
	client, err := agent.New(agent.Config{
		Name:      "quickstart",
		ProxyURLs: []string{"http://" + proxy},
		Labels:    map[string]string{"env": "demo"},
		Targets:   []agent.Target{{Name: "app", URL: "http://" + exporter + "/metrics"}},
		Allow:     []agent.PortRange{allowed},
		LocalHost: "127.0.0.1",
		Textfile:  textfile.Config{Directories: []string{textfiles}},
		Logger:    logger,
	})
	if err != nil {
		return err
	}
	all.Go(func() error { return client.Run(ctx) })
	fmt.Fprintf(out, "3. The agent \"quickstart\" dials out to the proxy; no port is open on its side.\n")
	fmt.Fprintf(out, "4. A cron job of its host has left %s for it to serve.\n", filepath.Join(textfiles, "apt.prom"))

	err = pushBatch(ctx, out, proxy)
	if err == nil {
		err = scrapeAll(ctx, out, proxy, port)
	}
	if err != nil {
		cancel()
		return errors.Join(err, all.Wait())
	}
	printNext(out, proxy)
	if once {
		cancel()
	} else {
		fmt.Fprintln(out, "Running until Ctrl-C.")
	}
	return all.Wait()
}

// startExporter serves an application's metrics on loopback.
func startExporter(ctx context.Context, all *errgroup.Group) (string, error) {
	registry := prometheus.NewRegistry()
	started := prometheus.NewGauge(prometheus.GaugeOpts{Name: "quickstart_start_time_seconds", Help: "When the exporter started."})
	started.SetToCurrentTime()
	scrapes := prometheus.NewCounter(prometheus.CounterOpts{Name: "quickstart_scrapes_total", Help: "Scrapes of the exporter."})
	registry.MustRegister(started, scrapes)
	metrics := promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		scrapes.Inc()
		metrics.ServeHTTP(w, r)
	})}
	all.Go(func() error {
		if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	all.Go(func() error { <-ctx.Done(); return server.Close() })
	return l.Addr().String(), nil
}

// startProxy starts a proxy that keeps its state in dir.
func startProxy(ctx context.Context, all *errgroup.Group, address, dir string, logger *slog.Logger) (string, error) {
	start := func(address string) (*server.Server, error) {
		proxy, err := server.New(server.Config{
			ListenAddresses: []string{address},
			StoragePath:     dir,
			Fleet:           fleet.Config{SettleTime: -1}, // nobody had a list of agents before
			Logger:          logger,
		})
		if err != nil {
			return nil, err
		}
		return proxy, proxy.Listen()
	}
	if l, err := net.Listen("tcp", address); err != nil {
		address = "127.0.0.1:0"
	} else {
		l.Close()
	}
	proxy, err := start(address)
	if err != nil {
		return "", err
	}
	all.Go(func() error { return proxy.Run(ctx) })
	return proxy.Addr(), nil
}

// writeTextfile does what a cron job does: it writes its result under another name, so
// that no scrape sees half of it. It returns the directory.
func writeTextfile(dir string) (string, error) {
	textfiles := filepath.Join(dir, "textfiles")
	if err := os.Mkdir(textfiles, 0o755); err != nil {
		return "", err
	}
	file := filepath.Join(textfiles, "apt.prom")
	const text = "# HELP apt_upgrades_pending Packages that can be upgraded.\n# TYPE apt_upgrades_pending gauge\napt_upgrades_pending 3\n"
	if err := os.WriteFile(file+".new", []byte(text), 0o644); err != nil {
		return "", err
	}
	return textfiles, os.Rename(file+".new", file)
}

// pushBatch does what a batch job does when it has ended, by the client library for
// the Pushgateway. It says how often it comes, so that somebody notices when it
// doesn't.
func pushBatch(ctx context.Context, out io.Writer, proxy string) error {
	finished := prometheus.NewGauge(prometheus.GaugeOpts{Name: "backup_finished_time_seconds", Help: "When the backup finished."})
	finished.SetToCurrentTime()
	header := http.Header{gateway.HeaderInterval: {"24h"}}
	err := push.New("http://"+proxy, "backup").Grouping("database", "orders").Header(header).Collector(finished).PushContext(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "5. A batch job pushes to the proxy, and says that it comes every 24 h.\n\n")
	return nil
}

// scrapeAll does what Prometheus does: it asks discovery for the targets, and
// scrapes each through proxy_url.
func scrapeAll(ctx context.Context, out io.Writer, proxy, port string) error {
	var targets []struct {
		Targets []string          `json:"targets"`
		Labels  map[string]string `json:"labels"`
	}
	discover := func() error {
		body, err := get(ctx, http.DefaultClient, "http://"+proxy+"/targets")
		if err != nil {
			return err
		}
		return json.Unmarshal([]byte(body), &targets)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		if err := discover(); err != nil {
			return fmt.Errorf("discovery: %w", err)
		}
		if len(targets) > 0 {
			break
		}
		if time.Now().After(deadline) {
			return errors.New("the agent did not register within 10 s")
		}
		time.Sleep(20 * time.Millisecond)
	}
	through := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: proxy})}}
	defer through.CloseIdleConnections()
	urls := []string{"http://quickstart:" + port + "/metrics"}
	for _, t := range targets {
		urls = append(urls, t.Labels["__scheme__"]+"://"+t.Targets[0]+t.Labels["__metrics_path__"])
	}
	for _, u := range urls {
		if err := show(ctx, out, through, u, u+" through the proxy"); err != nil {
			return err
		}
	}
	groups := "http://" + proxy + "/metrics?only=groups"
	return show(ctx, out, http.DefaultClient, groups, groups)
}

// show scrapes a URL and prints the first samples.
func show(ctx context.Context, out io.Writer, client *http.Client, u, title string) error {
	body, err := get(ctx, client, u)
	if err != nil {
		return fmt.Errorf("scrape %s: %w", u, err)
	}
	fmt.Fprintf(out, "GET %s:\n", title)
	shown, more := 0, 0
	lines := bufio.NewScanner(strings.NewReader(body))
	for lines.Scan() {
		switch {
		case strings.HasPrefix(lines.Text(), "#"):
		case shown < 4:
			fmt.Fprintf(out, "   %s\n", lines.Text())
			shown++
		default:
			more++
		}
	}
	if shown == 0 {
		return fmt.Errorf("scrape %s: no samples came", u)
	}
	if more > 0 {
		fmt.Fprintf(out, "   … and %d samples more\n", more)
	}
	fmt.Fprintln(out)
	return nil
}

func get(ctx context.Context, client *http.Client, u string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", "10")
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, body)
	}
	return string(body), err
}

func printNext(out io.Writer, proxy string) {
	fmt.Fprintf(out, `Paste this into prometheus.yml:

scrape_configs:
  - job_name: culvert
    proxy_url: http://%[1]s
    http_sd_configs:
      - url: http://%[1]s/targets
  - job_name: batch
    honor_labels: true
    static_configs:
      - targets: ["%[1]s"]

And open http://%[1]s/ to see the agent, its scrapes and the pushed group.

`, proxy)
}
