// Command culvert-proxy carries Prometheus's scrapes to agents behind firewalls.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"os/signal"
	gopath "path"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/alecthomas/units"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	versioncollector "github.com/prometheus/client_golang/prometheus/collectors/version"
	"github.com/prometheus/common/model"
	"github.com/prometheus/common/promslog"
	promslogflag "github.com/prometheus/common/promslog/flag"
	"github.com/prometheus/common/version"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/protocol/help"
	"github.com/culvert-io/culvert/proxy/access"
	"github.com/culvert-io/culvert/proxy/server"
)

func main() {
	version.Version = protocol.BuildVersion()
	flags, command, err := parseFlags(os.Args[1:])
	if err != nil {
		fmt.Fprintf(os.Stderr, "culvert-proxy: %v\n", err)
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if command == "import" {
		if err := flags.importing.run(ctx, os.Stdout); err != nil {
			fmt.Fprintf(os.Stderr, "culvert-proxy: %v\n", err)
			os.Exit(1)
		}
		return
	}
	if strings.HasPrefix(command, "token ") {
		if err := flags.token.run(command, flags.ConfigFile, os.Stdout, os.Stderr); err != nil {
			fmt.Fprintf(os.Stderr, "culvert-proxy: %v\n", err)
			os.Exit(1)
		}
		return
	}
	if err := relaxTimers(); err != nil {
		flags.Logger.Debug("The timer slack stays as it is", "err", err)
	}
	for _, line := range flags.unneeded {
		flags.Logger.Info(line)
	}
	if err := run(ctx, flags.Config); err != nil {
		flags.Logger.Error("Stopped", "err", err)
		os.Exit(1)
	}
}

// run serves until ctx ends.
func run(ctx context.Context, config server.Config) error {
	config.Logger.Info("Starting culvert-proxy", "version", version.Info())
	cpus := newProcessors()
	config.UseAllProcessors = cpus.useAll
	s, err := server.New(config)
	if err != nil {
		return err
	}
	if err := s.Listen(); err != nil {
		return err
	}
	go saveMemory(ctx)
	go cpus.run(ctx)
	tellSystemd(config.Logger, daemon.SdNotifyReady)
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	defer signal.Stop(hangup)
	go func() {
		for {
			select {
			case <-hangup:
				_ = s.Reload() // it logs, and the old configuration stays
			case <-ctx.Done():
				tellSystemd(config.Logger, daemon.SdNotifyStopping)
				return
			}
		}
	}()
	return s.Run(ctx)
}

// tellSystemd tells the state to the service manager, where one asked for it (Type=notify).
func tellSystemd(logger *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		logger.Warn("The service manager could not be told", "state", state, "err", err)
	}
}

// flags is the command line.
type flags struct {
	server.Config
	externalURL         string
	pushProx            string
	trustedProxies      []string
	etcdEndpoints       []string
	routePrefix         string
	routePrefixSet      bool
	maxBodySize         units.Base2Bytes
	persistenceFile     string
	unneeded            []string // flags of the Pushgateway that were given and do nothing here
	importing           importFlags
	token               tokenFlags
	registrationTimeout time.Duration
	forgetAfterSet      bool
	log                 promslog.Config
}

// app returns the command line's grammar; parsing it fills c.
func (c *flags) app() *kingpin.Application {
	app := kingpin.New("culvert-proxy", "Carries Prometheus's scrapes to agents behind firewalls and NAT.")
	app.HelpFlag.Short('h')
	app.UsageFuncs(help.Functions)
	app.Version(version.Print("culvert-proxy"))
	app.UsageWriter(os.Stdout)

	app.Flag("web.listen-address", "Address for scrapers and people, and for agents where --agent.listen-address is not given. Repeatable.").
		Default(":8080").StringsVar(&c.ListenAddresses)
	app.Flag("web.config.file", "Web configuration in exporter-toolkit's format: TLS, response headers.").
		StringVar(&c.WebConfigFile)
	app.Flag("web.external-url", "URL under which people and scrapers reach this proxy; discovery's path mode names it.").
		StringVar(&c.externalURL)
	app.Flag("web.route-prefix", "Prefix of the paths of the proxy's own routes; the path of --web.external-url where it is not given.").
		IsSetByUser(&c.routePrefixSet).StringVar(&c.routePrefix)
	app.Flag("web.telemetry-path", "Path under which the pushed groups and the proxy's own metrics are scraped.").
		Default("/metrics").StringVar(&c.TelemetryPath)
	app.Flag("web.enable-lifecycle", "Let PUT and POST of /-/quit stop the proxy.").
		BoolVar(&c.EnableLifecycle)
	app.Flag("web.enable-admin-api", "Let PUT of /api/v1/admin/wipe delete all pushed groups.").
		BoolVar(&c.EnableAdminAPI)
	app.Flag("web.trusted-proxies", "Address or network of a reverse proxy whose X-Forwarded-For tells where wrong credentials come from. Repeatable.").
		StringsVar(&c.trustedProxies)
	app.Flag("agent.listen-address", "Address for agents alone; they can't connect to --web.listen-address then. Repeatable.").
		StringsVar(&c.AgentListenAddresses)
	app.Flag("agent.web.config.file", "Web configuration of --agent.listen-address.").
		StringVar(&c.AgentWebConfigFile)
	app.Flag("pushprox.enabled", "Let PushProx's clients connect, by /poll and /push: true or false.").
		Default("true").EnumVar(&c.pushProx, "true", "false")
	app.Flag("cluster.etcd-endpoints", "URL of an etcd member, as in http://etcd-1:2379. With it all proxies of that etcd are one. Repeatable, or several with commas.").
		StringsVar(&c.etcdEndpoints)
	app.Flag("cluster.etcd-prefix", "What the keys in etcd start with.").
		Default("/culvert/").StringVar(&c.Cluster.Prefix)
	app.Flag("cluster.etcd-username", "User name for etcd.").
		StringVar(&c.Cluster.Username)
	app.Flag("cluster.etcd-password-file", "File with the password for etcd.").
		StringVar(&c.Cluster.PasswordFile)
	app.Flag("cluster.etcd-ca-file", "Authorities that etcd's certificate is from, in PEM, where they are not the system's.").
		StringVar(&c.Cluster.EtcdTLS.CAFile)
	app.Flag("cluster.etcd-cert-file", "Certificate for etcd, in PEM.").
		StringVar(&c.Cluster.EtcdTLS.CertFile)
	app.Flag("cluster.etcd-key-file", "Key of --cluster.etcd-cert-file, in PEM.").
		StringVar(&c.Cluster.EtcdTLS.KeyFile)
	app.Flag("cluster.listen-address", "Address for the other proxies, which pass scrapes on to it.").
		Default(":8081").StringVar(&c.Cluster.ListenAddress)
	app.Flag("cluster.advertise-url", "URL under which the other proxies reach --cluster.listen-address; made of the address, or the host's name, and the port where it is not given.").
		StringVar(&c.Cluster.AdvertiseURL)
	app.Flag("cluster.web.config.file", "Web configuration of --cluster.listen-address.").
		StringVar(&c.Cluster.WebConfigFile)
	app.Flag("cluster.ca-file", "Authorities that the other proxies' certificates are from, in PEM, where they are not the system's.").
		StringVar(&c.Cluster.PeerTLS.CAFile)
	app.Flag("cluster.cert-file", "Certificate for the other proxies, where their web configuration asks for one.").
		StringVar(&c.Cluster.PeerTLS.CertFile)
	app.Flag("cluster.key-file", "Key of --cluster.cert-file, in PEM.").
		StringVar(&c.Cluster.PeerTLS.KeyFile)
	duration(app.Flag("cluster.ttl", "After which time without a word to etcd the other proxies take this one for gone.").Default("10s"), &c.Cluster.TTL)
	app.Flag("storage.path", "Directory for state, so that known agents survive a restart. Empty: memory only.").
		Default("data/").StringVar(&c.StoragePath)
	app.Flag("config.file", "Configuration that can be reloaded, in YAML.").
		StringVar(&c.ConfigFile)

	duration(app.Flag("scrape.default-timeout", "Timeout of a scrape that names none.").Default("15s"), &c.DefaultTimeout)
	duration(app.Flag("scrape.max-timeout", "Longest timeout that a scrape may name.").Default("5m"), &c.MaxTimeout)
	duration(app.Flag("scrape.timeout-offset", "Taken off the scraper's timeout, so that it still gets the answer.").Default("250ms"), &c.TimeoutOffset)
	duration(app.Flag("scrape.reconnect-wait", "How long a scrape waits for an agent that is not connected, or busy.").Default("2s"), &c.ReconnectWait)
	app.Flag("scrape.max-concurrent", "Scrapes that may run for one agent at a time.").
		Default("64").IntVar(&c.Fleet.MaxScrapes)
	duration(app.Flag("connect.idle-timeout", "Ends a CONNECT tunnel (a scrape of an https target) that nothing goes through.").Default("6m"), &c.ConnectIdleTimeout)
	app.Flag("connect.max-concurrent", "CONNECT tunnels that may be open for one agent at a time.").
		Default("256").IntVar(&c.Fleet.MaxTunnels)

	duration(app.Flag("agent.forget-after", "How long a lost agent stays in discovery.").Default("7d").IsSetByUser(&c.forgetAfterSet), &c.Fleet.ForgetAfter)
	duration(app.Flag("registration.timeout", "PushProx's name for --agent.forget-after."), &c.registrationTimeout)
	duration(app.Flag("agent.settle-time", "How long discovery answers 503 after a start without a stored list of agents. 0: not at all.").Default("60s"), &c.Fleet.SettleTime)
	app.Flag("agent.max-handshakes", "Agents that may be in their handshakes at a time; more are told to come back.").
		Default("256").IntVar(&c.MaxHandshakes)
	app.Flag("agent.max-known", "Agents that may be known, the lost ones included; new names beyond it are refused. Their registrations may take 16 KiB each on average.").
		Default("20000").IntVar(&c.Fleet.MaxKnown)
	duration(app.Flag("push.default-ttl", "After which time without a push the samples of a group go, where neither a push nor --config.file names one. 0: never.").Default("0"), &c.Push.DefaultTTL)
	duration(app.Flag("push.forget-after", "How long a group that declared an interval leaves push_up 0 behind after its TTL.").Default("7d"), &c.Push.ForgetAfter)
	app.Flag("push.max-body-size", "Largest body of a push, decompressed too.").
		Default("64MiB").BytesVar(&c.maxBodySize)
	app.Flag("push.max-series-per-group", "Most series that a group may have. 0: no limit.").
		Default("0").IntVar(&c.Push.MaxSeriesPerGroup)
	app.Flag("push.max-groups", "Most groups that the push store may have. 0: no limit.").
		Default("0").IntVar(&c.Push.MaxGroups)
	c.unneededFlag(app.Flag("push.enable-utf8-names", "Of the Pushgateway; not needed."),
		"--push.enable-utf8-names is not needed: UTF-8 names are always taken").Bool()
	c.unneededFlag(app.Flag("push.disable-consistency-check", "Of the Pushgateway; not needed."),
		"--push.disable-consistency-check is not needed: the check costs as much as the push is large, so it is always on").Bool()
	c.unneededFlag(app.Flag("persistence.interval", "Of the Pushgateway; not needed."),
		"--persistence.interval is not needed: a push is on disk before it is acknowledged").String()
	app.Flag("persistence.file", "Of the Pushgateway; not needed, see --storage.path.").
		StringVar(&c.persistenceFile)

	duration(app.Flag("web.shutdown-timeout", "How long running scrapes may take after SIGTERM.").Default("20s"), &c.ShutdownTimeout)

	promslogflag.AddFlags(app, &c.log)
	app.Command("serve", "Run the proxy (what culvert-proxy does without a command).").Default()
	c.importing.command(app)
	c.token.command(app)
	return app
}

// parseFlags turns the command line into a configuration, and tells the command.
func parseFlags(args []string) (*flags, string, error) {
	c := new(flags)
	fail := func(format string, args ...any) (*flags, string, error) {
		return nil, "", fmt.Errorf(format, args...)
	}
	app := c.app()
	command, err := app.Parse(args)
	if err != nil {
		return fail("%w; see --help", err)
	}
	if c.registrationTimeout > 0 {
		if c.forgetAfterSet {
			return fail("--registration.timeout and --agent.forget-after mean the same; give one of them")
		}
		c.Fleet.ForgetAfter = c.registrationTimeout
	}
	// In the configuration 0 means the default.
	for _, d := range []*time.Duration{&c.Fleet.SettleTime, &c.ReconnectWait, &c.TimeoutOffset} {
		if *d == 0 {
			*d = -1
		}
	}
	for name, n := range map[string]int{"scrape.max-concurrent": c.Fleet.MaxScrapes, "connect.max-concurrent": c.Fleet.MaxTunnels, "agent.max-handshakes": c.MaxHandshakes, "agent.max-known": c.Fleet.MaxKnown} {
		if n < 1 {
			return fail("--%s=%d: use at least 1", name, n)
		}
	}
	for name, d := range map[string]time.Duration{
		"scrape.default-timeout": c.DefaultTimeout, "scrape.max-timeout": c.MaxTimeout, "connect.idle-timeout": c.ConnectIdleTimeout,
		"agent.forget-after": c.Fleet.ForgetAfter, "web.shutdown-timeout": c.ShutdownTimeout, "push.forget-after": c.Push.ForgetAfter,
	} {
		if d <= 0 {
			return fail("--%s=%s: use more than 0", name, d)
		}
	}
	if c.externalURL != "" {
		u, err := url.Parse(c.externalURL)
		if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
			return fail("--web.external-url=%q: use a whole URL, as in https://culvert.example.net", c.externalURL)
		}
		c.ExternalURL = u
		if !c.routePrefixSet {
			c.routePrefix = u.Path
		}
	}
	for _, raw := range c.trustedProxies {
		trusted, err := access.ParseTrusted(raw)
		if err != nil {
			return fail("--web.trusted-proxies=%q: write an address or a network, as in 10.0.0.0/8", raw)
		}
		c.TrustedProxies = append(c.TrustedProxies, trusted)
	}
	for _, given := range c.etcdEndpoints {
		for endpoint := range strings.SplitSeq(given, ",") {
			c.Cluster.Endpoints = append(c.Cluster.Endpoints, strings.TrimSpace(endpoint))
		}
	}
	if c.Cluster.TTL < 2*time.Second || c.Cluster.TTL > time.Hour {
		return fail("--cluster.ttl=%s: use 2s to 1h", c.Cluster.TTL)
	}
	if c.RoutePrefix, err = cleanPrefix(c.routePrefix); err != nil {
		return fail("--web.route-prefix=%q: %w", c.routePrefix, err)
	}
	if _, err := cleanPrefix(c.TelemetryPath); err != nil || !strings.HasPrefix(c.TelemetryPath, "/") || strings.HasSuffix(c.TelemetryPath, "/") {
		return fail("--web.telemetry-path=%q: use a plain path, as in /metrics", c.TelemetryPath)
	}
	if c.Push.MaxBodySize = int64(c.maxBodySize); c.Push.MaxBodySize < 1 {
		return fail("--push.max-body-size=%s: use more than 0, as in 64MiB", c.maxBodySize)
	}
	if c.Push.MaxGroups < 0 || c.Push.MaxSeriesPerGroup < 0 {
		return fail("--push.max-groups and --push.max-series-per-group: use 0 for no limit, or more")
	}
	if c.persistenceFile != "" {
		if _, err := os.Stat(c.persistenceFile); err == nil {
			return fail("--persistence.file=%s: this is a Pushgateway's file, which culvert-proxy doesn't read, and would not be kept up to date: start without the flag, and take the groups over from the running Pushgateway by culvert-proxy import --from=http://old-pushgateway:9091", c.persistenceFile)
		}
		c.unneeded = append(c.unneeded, "--persistence.file is not needed: pushed groups are kept in --storage.path")
	}
	c.DisablePushProx = c.pushProx == "false"
	c.Flags = map[string]string{}
	for _, flag := range app.Model().Flags {
		if flag.Name != "help" && flag.Name != "version" && !strings.HasPrefix(flag.Name, "completion-") && flag.Name != "help-long" && flag.Name != "help-man" {
			c.Flags[flag.Name] = flag.Value.String()
		}
	}
	c.Logger = promslog.New(&c.log)
	c.Registry = prometheus.NewRegistry()
	c.Registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		versioncollector.NewCollector("culvert_proxy"))
	return c, command, nil
}

// unneededFlag accepts a flag of the Pushgateway, and has the log say why it does
// nothing.
func (c *flags) unneededFlag(flag *kingpin.FlagClause, why string) *kingpin.FlagClause {
	return flag.Action(func(*kingpin.ParseContext) error {
		c.unneeded = append(c.unneeded, why)
		return nil
	})
}

// cleanPrefix returns a path with a slash in front and none behind; "" for "/".
func cleanPrefix(path string) (string, error) {
	path = strings.Trim(path, "/")
	if path == "" {
		return "", nil
	}
	path = "/" + path
	if u, err := url.Parse(path); err != nil || u.EscapedPath() != path || gopath.Clean(path) != path || strings.ContainsAny(path, ":*") {
		return "", errors.New("use a plain path, as in /culvert")
	}
	return path, nil
}

// duration makes a flag take Prometheus's durations (7d) and Go's (1.5h).
func duration(flag *kingpin.FlagClause, d *time.Duration) { flag.SetValue((*durationValue)(d)) }

type durationValue time.Duration

func (v *durationValue) String() string { return time.Duration(*v).String() }

func (v *durationValue) Set(s string) error {
	if d, err := model.ParseDuration(s); err == nil {
		*v = durationValue(d)
		return nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || strings.HasPrefix(s, "-") {
		return fmt.Errorf("%q is not a duration; write it as in 30s, 5m or 7d", s)
	}
	*v = durationValue(d)
	return nil
}
