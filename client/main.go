// Command culvert-client is the agent: it runs on a firewalled host, dials out to
// the proxies, and serves the scrapes that come through them.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	versioncollector "github.com/prometheus/client_golang/prometheus/collectors/version"
	"github.com/prometheus/common/version"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
)

func main() {
	version.Version = protocol.BuildVersion()
	if runAsService() {
		return
	}
	flags, command, err := parseFlags(os.Args[1:])
	if err != nil {
		complain(err)
		os.Exit(usageCode(command))
	}
	if command == "run" {
		runJob(flags) // before signals are caught that are the job's
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch command {
	case "doctor":
		err = doctor(ctx, os.Stdout, flags)
	case "leave":
		err = leave(ctx, os.Stdout, flags)
	case "check-config":
		err = checkConfig(os.Stdout, flags)
	case "push":
		err = push(ctx, os.Stdin, flags)
	case "service install", "service uninstall":
		err = controlService(command, flags, os.Args[1:])
	default:
		hangup := make(chan os.Signal, 1)
		signal.Notify(hangup, syscall.SIGHUP)
		err = run(ctx, flags, hangup)
	}
	if err != nil {
		complain(err)
		if coded, ok := errors.AsType[codedError](err); ok {
			os.Exit(coded.code)
		}
		os.Exit(1)
	}
}

// complain writes an error to standard error; each of its lines says whose it is.
func complain(err error) {
	fmt.Fprintf(os.Stderr, "culvert-client: %s\n", strings.ReplaceAll(err.Error(), "\n", "\nculvert-client: "))
}

// run keeps the tunnels until ctx ends, and reads the configuration again for each
// hangup.
func run(ctx context.Context, flags *flags, hangup <-chan os.Signal) error {
	settings, err := flags.load()
	if err != nil {
		return err
	}
	// A scrape is a chain of goroutines of which one works at a time. With more processors
	// Go wakes a thread for most of them, which costs a tenth to a quarter of the time.
	runtime.GOMAXPROCS(flags.processors)
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		versioncollector.NewCollector("culvert_client"))
	reloaded := newReloadMetrics(registry)
	settings.Agent.Gatherer = registry
	logger := settings.Agent.Logger
	a, err := agent.New(settings.Agent)
	if err != nil {
		return err
	}
	logger.Info("Starting culvert-client", "agent", a.Name(), "version", version.Info())
	if len(settings.Agent.Allow) == 0 && len(settings.Agent.Targets) == 0 && len(settings.Agent.Textfile.Directories) == 0 && settings.Agent.Push.StoragePath == "" {
		logger.Warn("Nothing may be scraped but the agent itself; allow ports with --allow=9100, or name targets with --target=NAME=URL; --allow=all opens every port, as PushProx's client does")
	}
	if settings.Agent.Push.StoragePath != "" && len(settings.Agent.Push.ListenAddresses) == 0 {
		logger.Info("No pushes are taken without --push.listen-address; those that are in the storage path are served and relayed", "path", settings.Agent.Push.StoragePath)
	}
	stopMetrics := serveMetrics(settings.MetricsAddress, a, logger)
	defer stopMetrics()

	go func() {
		ready := a.Ready()
		for {
			select {
			case <-ready:
				ready = nil
				tellSystemd(logger, daemon.SdNotifyReady)
			case <-ctx.Done():
				tellSystemd(logger, daemon.SdNotifyStopping)
				return
			case <-hangup:
				err := reload(flags, a, registry, settings)
				reloaded.set(err)
				if err != nil {
					logger.Error("Reload failed, the old configuration stays", "err", err)
				} else {
					logger.Info("Configuration reloaded")
				}
			}
		}
	}()
	return a.Run(ctx)
}

// tellSystemd tells the state to the service manager, where one asked for it (Type=notify).
func tellSystemd(logger *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		logger.Warn("The service manager could not be told", "state", state, "err", err)
	}
}

// reload reads the configuration again. first is that of the start.
func reload(flags *flags, a *agent.Agent, registry *prometheus.Registry, first *settings) error {
	settings, err := flags.load()
	if err != nil {
		return err
	}
	settings.Agent.Gatherer = registry
	for _, fixed := range []struct {
		name     string
		now, new any
	}{
		{"metrics_address", first.MetricsAddress, settings.MetricsAddress},
		{"storage_path", first.Agent.Push.StoragePath, settings.Agent.Push.StoragePath},
		{"push.listen_addresses", fmt.Sprint(first.Agent.Push.ListenAddresses), fmt.Sprint(settings.Agent.Push.ListenAddresses)},
		{"push.max_body_size", first.Agent.Push.MaxBodySize, settings.Agent.Push.MaxBodySize},
	} {
		if fixed.now != fixed.new {
			settings.Agent.Logger.Warn("The new "+fixed.name+" takes a restart", "now", fixed.now, "new", fixed.new)
		}
	}
	return a.Reload(settings.Agent)
}

// reloadMetrics tell whether the configuration in use is the one in the file.
type reloadMetrics struct{ ok, at prometheus.Gauge }

func newReloadMetrics(registry *prometheus.Registry) *reloadMetrics {
	m := &reloadMetrics{
		ok: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "culvert_client_config_last_reload_successful",
			Help: "Whether the last reload of the configuration succeeded. At 0 the agent goes on with the old one; the log says what is wrong, and check-config does.",
		}),
		at: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "culvert_client_config_last_reload_success_timestamp_seconds",
			Help: "When the configuration was last loaded with success.",
		}),
	}
	registry.MustRegister(m.ok, m.at)
	m.set(nil)
	return m
}

func (m *reloadMetrics) set(err error) {
	if err != nil {
		m.ok.Set(0)
		return
	}
	m.ok.Set(1)
	m.at.SetToCurrentTime()
}

// serveMetrics serves what the target "agent" serves, on every path, as PushProx's
// client does; that the address can't be had is only logged, as there. It returns what
// stops it.
func serveMetrics(address string, a *agent.Agent, logger *slog.Logger) func() {
	if address == "" {
		return func() {}
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		logger.Error("The agent's metrics are not served on an address of its own; the target \"agent\" has them as well", "err", err)
		return func() {}
	}
	server := &http.Server{
		Handler:           a.Handler(),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
	}
	logger.Info("Serving the agent's metrics", "address", l.Addr())
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	return func() { server.Close(); <-done }
}
