// Command loadtest measures Culvert beside its baselines: it starts exporters,
// culvert-proxy, culvert-client and scrapers, has them and the baselines work in
// turns, and prints a table with the ratios.
//
//	go run ./examples/loadtest --list
//	go run ./examples/loadtest 100kB-64 100kB-1
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kingpin/v2"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "loadtest: %v\n", err)
		os.Exit(1)
	}
}

// options is the command line of a measurement. Zero means the scenario's own.
type options struct {
	Scenarios []string
	Duration  time.Duration // of one round of one subject
	Rounds    int
	Scrapers  int
	Body      size
	Agents    int
	Chunked   bool
	TLS       bool
	Programs  string // directory

	ProxyURL, Target, DirectURL  string
	CompareProxyURL, CompareHost string

	List, JSON bool
	SVG        string // file
}

// run does what the arguments say, until it is done or ctx ends.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	var o options
	app := kingpin.New("loadtest", "Measures Culvert beside its baselines.")
	app.HelpFlag.Short('h')
	measure := app.Command("measure", "Run scenarios (what loadtest does without a command).").Default()
	measure.Arg("scenario", "Scenarios to run, all by default; see --list.").StringsVar(&o.Scenarios)
	measure.Flag("list", "List the scenarios.").BoolVar(&o.List)
	measure.Flag("duration", "How long one subject is measured in one round.").Default("3s").DurationVar(&o.Duration)
	measure.Flag("rounds", "How often the subjects take turns; the table shows medians.").Default("5").IntVar(&o.Rounds)
	measure.Flag("scrapers", "Concurrent scrapers, instead of the scenario's.").IntVar(&o.Scrapers)
	measure.Flag("body", "Size of the exporters' bodies, as in 100kB, instead of the scenario's.").SetValue(&o.Body)
	measure.Flag("agents", "Agents in the scenarios that have many.").Default("5000").IntVar(&o.Agents)
	measure.Flag("chunked", "Exporters send no Content-Length, as client libraries do with long bodies.").BoolVar(&o.Chunked)
	measure.Flag("tls", "TLS to the proxy, for scrapers and agents; the baselines get TLS as well. Scenarios that have no TLS are skipped.").BoolVar(&o.TLS)
	measure.Flag("programs", "Directory with culvert-proxy and culvert-client; they are built from this module by default.").StringVar(&o.Programs)
	measure.Flag("proxy-url", "A running proxy to scrape through, instead of one that is started. Takes --target.").StringVar(&o.ProxyURL)
	measure.Flag("target", "What to scrape through --proxy-url, as in http://web-1:9100/metrics.").StringVar(&o.Target)
	measure.Flag("direct-url", "The same target's URL without the proxy, for the baselines of --proxy-url.").StringVar(&o.DirectURL)
	measure.Flag("compare-proxy-url", "Another HTTP proxy, for one more baseline.").StringVar(&o.CompareProxyURL)
	measure.Flag("compare-host", "The name under which --compare-proxy-url reaches this host; the exporter's port is added.").Default("127.0.0.1").StringVar(&o.CompareHost)
	measure.Flag("json", "Print JSON instead of tables.").BoolVar(&o.JSON)
	measure.Flag("svg", "Write a plot of the scenario \"latency\", which then runs too, to this file.").StringVar(&o.SVG)

	var agents agentsOptions
	playAgents := app.Command("agents", "Play many agents in one process, until Ctrl-C.")
	playAgents.Flag("proxy-url", "The proxy to connect to. Repeatable: each agent connects to all of them.").Required().StringsVar(&agents.proxyURLs)
	playAgents.Flag("tls.cacert", "PEM file of the CA of the proxies' certificates, instead of the system's.").StringVar(&agents.caFile)
	playAgents.Flag("first", "The first agent's number; it is called agent-NUMBER.").Default("0").IntVar(&agents.first)
	playAgents.Flag("agents", "How many: agent-0, agent-1, …").Default("5000").IntVar(&agents.number)
	playAgents.Flag("targets", "Targets of each agent: app-0, app-1, …").Default("1").IntVar(&agents.targets)
	playAgents.Flag("body", "Size of the targets' bodies.").Default("1kB").SetValue(&agents.body)

	var exporter exporterOptions
	playExporter := app.Command("exporter", "Play an exporter, until Ctrl-C.")
	playExporter.Flag("web.listen-address", "Address of the exporter.").Default("127.0.0.1:0").StringVar(&exporter.address)
	playExporter.Flag("body", "Size of /metrics.").Default("100kB").SetValue(&exporter.body)
	playExporter.Flag("large-body", "Size of /large.").Default("50MB").SetValue(&exporter.large)
	playExporter.Flag("chunked", "Send no Content-Length.").BoolVar(&exporter.chunked)

	command, err := app.Parse(args)
	if err != nil {
		return fmt.Errorf("%w; see --help", err)
	}
	switch command {
	case playAgents.FullCommand():
		return agents.run(ctx)
	case playExporter.FullCommand():
		return exporter.run(ctx, stdout)
	}
	if o.List {
		for _, s := range scenarios {
			fmt.Fprintf(stdout, "%-14s %s\n", s.name, s.about)
		}
		return nil
	}
	return o.run(ctx, stdout, stderr)
}

// report is what --json prints.
type report struct {
	Time     time.Time     `json:"time"`
	Go       string        `json:"go"`
	CPUs     int           `json:"cpus"`
	Load     string        `json:"load_average,omitempty"` // when it began
	Duration time.Duration `json:"round_nanoseconds"`
	Rounds   int           `json:"rounds"`
	Results  []*result     `json:"results"`
}

// run runs the scenarios one after the other. What an interrupted run has found is
// printed all the same.
func (o *options) run(ctx context.Context, stdout, stderr io.Writer) (err error) {
	chosen, err := o.choose()
	if err != nil {
		return err
	}
	bench, err := newBench(ctx, o, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bench.close()) }()

	r := report{Time: time.Now(), Go: runtime.Version(), CPUs: runtime.NumCPU(), Load: loadAverage(), Duration: o.Duration, Rounds: o.Rounds}
	if !o.JSON {
		fmt.Fprintf(stdout, "%s, %d CPUs, load average %s; medians of %d rounds of %s\n", r.Go, r.CPUs, r.Load, r.Rounds, r.Duration)
	}
	var failed []error
	for _, s := range chosen {
		found, err := bench.play(ctx, s)
		if ctx.Err() != nil {
			failed = append(failed, errors.New("interrupted"))
			break
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("scenario %s: %w", s.name, err))
			continue
		}
		r.Results = append(r.Results, found)
		if !o.JSON {
			found.print(stdout)
		}
		if o.SVG != "" && found.Scenario == latencyScenario && found.Skipped == "" {
			if err := os.WriteFile(o.SVG, plot(found), 0o644); err != nil {
				failed = append(failed, err)
			}
		}
	}
	if o.JSON {
		out := json.NewEncoder(stdout)
		out.SetIndent("", "  ")
		failed = append(failed, out.Encode(r))
	}
	return errors.Join(failed...)
}

// choose returns the scenarios that were asked for. It returns an error for what
// makes no sense, before anything is started.
func (o *options) choose() ([]scenario, error) {
	switch {
	case o.Rounds < 1 || o.Duration <= 0 || o.Agents < 1 || o.Scrapers < 0:
		return nil, errors.New("--rounds, --duration, --agents and --scrapers must be positive")
	case (o.ProxyURL == "") != (o.Target == ""):
		return nil, errors.New("give --proxy-url and --target together")
	case o.TLS && o.ProxyURL != "":
		return nil, errors.New("--tls is for the proxy that loadtest starts; say https in --proxy-url")
	}
	names := o.Scenarios
	if o.SVG != "" && len(names) > 0 {
		names = append(names[:len(names):len(names)], latencyScenario)
	}
	if len(names) == 0 {
		for _, s := range scenarios {
			names = append(names, s.name)
		}
	}
	var chosen []scenario
	seen := map[string]bool{}
	for _, name := range names {
		if seen[name] {
			continue
		}
		seen[name] = true
		found := false
		for _, s := range scenarios {
			if s.name == name {
				chosen, found = append(chosen, s), true
			}
		}
		if !found {
			return nil, fmt.Errorf("no scenario is called %q; see --list", name)
		}
	}
	return chosen, nil
}

// loadAverage returns the machine's load where it tells: figures of a busy machine
// are worth less.
func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if fields := strings.Fields(string(text)); err == nil && len(fields) > 3 {
		return strings.Join(fields[:3], " ")
	}
	return "unknown"
}
