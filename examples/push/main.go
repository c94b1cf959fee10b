// Command push is a batch job that pushes its metrics by client_golang's push
// package. It counts the lines of a file:
//
//	go run ./examples/push go.mod
//	go run ./examples/push --delete go.mod
//
// CULVERT_URL names the proxy, http://localhost:8080 by default.
package main

import (
	"bytes"
	"cmp"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/push"
)

func main() {
	remove := flag.Bool("delete", false, "delete the file's metrics: it is not counted any more")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: push [--delete] FILE")
		os.Exit(2)
	}
	url := cmp.Or(os.Getenv("CULVERT_URL"), "http://localhost:8080")
	if err := run(url, flag.Arg(0), *remove); err != nil {
		fmt.Fprintf(os.Stderr, "push: %v\n", err)
		os.Exit(1)
	}
}

func run(url, file string, remove bool) error {
	file, err := filepath.Abs(file)
	if err != nil {
		return err
	}
	pusher := push.New(url, "example_go").
		// One group for each file. Any value will do; the package takes care of slashes.
		Grouping("file", file).
		// push_up becomes 0 where no push comes for 24 h and a grace of 10 %.
		Header(http.Header{"Culvert-Interval": {"24h"}}).
		Client(&http.Client{Timeout: 10 * time.Second})
	if remove {
		return pusher.Delete()
	}

	start := time.Now()
	text, err := os.ReadFile(file)
	pusher.Collector(gauge("linecount_duration_seconds", "How long the last count took.", time.Since(start).Seconds()))
	if err != nil {
		// Add replaces only the metrics that it brings, so the last success stays.
		pusher.Collector(gauge("linecount_success", "1 if the last count succeeded, else 0.", 0))
		return errors.Join(err, pusher.Add())
	}
	// Push replaces all metrics of the group.
	return pusher.
		Collector(gauge("linecount_success", "1 if the last count succeeded, else 0.", 1)).
		Collector(gauge("linecount_last_success_time_seconds", "When a count succeeded last.", float64(time.Now().Unix()))).
		Collector(gauge("linecount_lines", "Lines of the file.", float64(bytes.Count(text, []byte("\n"))))).
		Push()
}

func gauge(name, help string, value float64) prometheus.Gauge {
	g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	g.Set(value)
	return g
}
