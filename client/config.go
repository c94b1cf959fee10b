package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/kingpin/v2"
	"github.com/alecthomas/units"
	"github.com/prometheus/common/model"
	"github.com/prometheus/common/promslog"
	promslogflag "github.com/prometheus/common/promslog/flag"
	"github.com/prometheus/common/version"
	"go.yaml.in/yaml/v2"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/client/httpclient"
	"github.com/culvert-io/culvert/protocol/help"
)

// flags is the command line. Where it and the configuration file speak of the
// same thing, lists are joined and the command line's value wins.
type flags struct {
	configFile                 string
	proxyURLs                  []string
	resolveAll                 bool
	fqdn                       string
	labels                     map[string]string
	targets, hosts, allow      []string
	localHost                  string
	allowAddresses             []string
	maxConcurrent              int
	maxConcurrentSet           bool
	maxResponseSize            units.Base2Bytes
	maxResponseSizeSet         bool
	maxTunnels                 int
	processors                 int
	maxTunnelsSet              bool
	tls                        httpclient.TLSConfig
	tokenFile, keyFile         string
	protocol                   string
	protocolSet                bool
	initialWait, maxWait       time.Duration
	initialWaitSet, maxWaitSet bool
	metricsAddress             string
	metricsAddressSet          bool
	textfileDirectories        []string
	textfileMaxAge             model.Duration
	textfileMaxAgeSet          bool
	textfileMaxFileSize        units.Base2Bytes
	textfileMaxFileSizeSet     bool
	pushAddresses              []string
	storagePath                string
	spoolMaxBytes              units.Base2Bytes
	spoolMaxBytesSet           bool
	maxBodySize                units.Base2Bytes
	maxBodySizeSet             bool
	relay                      string
	relaySet                   bool
	log                        *promslog.Config
	logLevelSet, logFormatSet  bool
	doctorTarget               string
	job                        jobFlags
}

// settings is what flags and file together say.
type settings struct {
	Agent          agent.Config
	MetricsAddress string
}

// parseFlags returns the command line and the command: "agent", "doctor", "leave",
// "check-config", "run" or "push". With an error too it returns the command, if
// one was given.
func parseFlags(args []string) (*flags, string, error) {
	f := new(flags)
	app := f.app()
	command, err := app.Parse(args)
	parsed, _ := app.ParseContext(args)
	if err != nil {
		if parsed != nil && parsed.SelectedCommand != nil {
			command = parsed.SelectedCommand.FullCommand()
		}
		if command == "run" && !slices.Contains(args, "--") {
			return nil, command, fmt.Errorf("%w; put -- in front of the job's command; see run --help", err)
		}
		return nil, command, fmt.Errorf("%w; see --help", err)
	}
	if command == "run" || command == "push" {
		if err := onlyJobFlags(parsed); err != nil {
			return nil, command, fmt.Errorf("%s: %w", command, err)
		}
	}
	return f, command, nil
}

// app returns the command line's grammar; parsing it fills f.
func (f *flags) app() *kingpin.Application {
	f.labels = map[string]string{}
	f.log = &promslog.Config{Level: promslog.NewLevel(), Format: promslog.NewFormat()}
	app := kingpin.New("culvert-client", "Dials out of a firewalled host, and serves Prometheus's scrapes that come through culvert-proxy.")
	app.HelpFlag.Short('h')
	app.UsageFuncs(help.Functions)
	app.Version(version.Print("culvert-client"))
	app.UsageWriter(os.Stdout)

	app.Flag("config.file", "Configuration in YAML: all that the flags say, and credentials and TLS for targets. Read again on SIGHUP.").
		StringVar(&f.configFile)
	app.Flag("proxy-url", "Base URL of a proxy, as in https://proxy.example.net:8080. Repeatable: the agent keeps a tunnel to each.").
		StringsVar(&f.proxyURLs)
	app.Flag("fqdn", "Name that Prometheus asks for. The host's fully qualified name by default.").
		StringVar(&f.fqdn)
	app.Flag("label", "NAME=VALUE that describes this agent in discovery, as __meta_culvert_label_NAME. Repeatable.").
		StringMapVar(&f.labels)
	app.Flag("target", "NAME=URL of a target that Prometheus reaches as NAME.FQDN. Repeatable.").
		StringsVar(&f.targets)
	app.Flag("host", "NAME or NAME=ADDRESS of another host that this agent answers for; NAME may start with \"*.\". Repeatable.").
		StringsVar(&f.hosts)
	app.Flag("allow", "PORT, PORT-PORT or \"all\": what may be scraped on this host and the --host ones. Repeatable; nothing by default.").
		StringsVar(&f.allow)
	app.Flag("scrape.local-host", "Address that stands for this host. \"localhost\" by default.").
		StringVar(&f.localHost)
	app.Flag("scrape.allow-address", "ADDRESS or NETWORK that names may lead to although it is link-local, loopback, multicast, or a cloud's metadata service. Repeatable; none by default.").
		StringsVar(&f.allowAddresses)
	app.Flag("scrape.max-concurrent", "Scrapes that run at a time, of all targets and through all proxies; 0: no limit.").
		Default("128").IsSetByUser(&f.maxConcurrentSet).IntVar(&f.maxConcurrent)
	app.Flag("scrape.max-body-size", "Largest body of a target's response, as it is transferred; a longer one arrives broken. 0: no limit.").
		Default("1GiB").IsSetByUser(&f.maxResponseSizeSet).BytesVar(&f.maxResponseSize)
	app.Flag("connect.max-concurrent", "CONNECT tunnels (https scrapes) that are open at a time, through all proxies; 0: no limit.").
		Default("512").IsSetByUser(&f.maxTunnelsSet).IntVar(&f.maxTunnels)
	app.Flag("runtime.gomaxprocs", "Processors that the agent uses at a time (GOMAXPROCS); the environment variable counts where the flag is not given.").
		Default("1").Envar("GOMAXPROCS").IntVar(&f.processors)
	app.Flag("tls.cacert", "CA certificates for proxies, https scrapes and https pushes, instead of the system's.").
		StringVar(&f.tls.CAFile)
	app.Flag("tls.cert", "Client certificate for proxies, https scrapes and https pushes.").
		StringVar(&f.tls.CertFile)
	app.Flag("tls.key", "Key of --tls.cert.").
		StringVar(&f.tls.KeyFile)
	app.Flag("token-file", "File with the bearer token for the proxies, read for each handshake; that of run and push for --push-url, read for each try.").
		StringVar(&f.tokenFile)
	app.Flag("key-file", "File with the agent's own secret, made where it is not there; a proxy with roles pins the agent's name to it.").
		StringVar(&f.keyFile)
	app.Flag("proxy.resolve-all", "Take each address that the host of a --proxy-url has for a proxy of its own, and keep a tunnel to each. The host is looked up again every 30 s.").
		BoolVar(&f.resolveAll)
	app.Flag("proxy.protocol", "How the proxies are reached: \"culvert\" is the tunnel, \"pushprox\" is PushProx's long polling, and \"auto\" is the tunnel, and long polling as long as a proxy knows no tunnel, or none gets through to it.").
		Default(string(agent.ProtocolAuto)).IsSetByUser(&f.protocolSet).EnumVar(&f.protocol, string(agent.ProtocolAuto), string(agent.ProtocolCulvert), string(agent.ProtocolPushProx))
	app.Flag("proxy.retry.initial-wait", "Upper bound of the first wait before the agent dials again; the wait is a random part of it.").
		Default("1s").IsSetByUser(&f.initialWaitSet).DurationVar(&f.initialWait)
	app.Flag("proxy.retry.max-wait", "Upper bound that the waits grow to, by half each time.").
		Default("5s").IsSetByUser(&f.maxWaitSet).DurationVar(&f.maxWait)
	app.Flag("metrics-addr", "Address for what the target \"agent\" serves: the agent's own metrics, textfiles and the machine's pushes; empty: none.").
		Default(":9369").IsSetByUser(&f.metricsAddressSet).StringVar(&f.metricsAddress)
	app.Flag("textfile.directory", "Directory, or pattern of directories, whose *.prom and *.om files the target \"agent\" serves. Repeatable.").
		StringsVar(&f.textfileDirectories)
	app.Flag("textfile.max-age", "Textfiles that were last modified longer ago are left out; 0: no limit.").
		Default("0s").IsSetByUser(&f.textfileMaxAgeSet).SetValue(&f.textfileMaxAge)
	app.Flag("textfile.max-file-size", "Textfiles that are larger are left out.").
		Default("16MiB").IsSetByUser(&f.textfileMaxFileSizeSet).BytesVar(&f.textfileMaxFileSize)
	app.Flag("push.listen-address", "HOST:PORT, or unix:PATH of a socket, for pushes of this host's jobs, by the Pushgateway's API. Repeatable; off by default.").
		PlaceHolder("127.0.0.1:9091").StringsVar(&f.pushAddresses)
	app.Flag("storage.path", "Directory for what was pushed; --push.listen-address needs one.").
		StringVar(&f.storagePath)
	app.Flag("push.relay", "Who gets the pushes without an instance: \"all\" proxies, where each has a push store of its own, or the \"first\" that is connected, where they share one.").
		Default(string(agent.RelayAll)).IsSetByUser(&f.relaySet).EnumVar(&f.relay, string(agent.RelayAll), string(agent.RelayFirst))
	app.Flag("push.spool-max-bytes", "How much may wait on disk for the proxies; then pushes are refused.").
		Default("256MiB").IsSetByUser(&f.spoolMaxBytesSet).BytesVar(&f.spoolMaxBytes)
	app.Flag("push.max-body-size", "Largest body of a push, decompressed too.").
		Default("64MiB").IsSetByUser(&f.maxBodySizeSet).BytesVar(&f.maxBodySize)
	app.Flag(promslogflag.LevelFlagName, promslogflag.LevelFlagHelp).
		Default("info").HintOptions(promslog.LevelFlagOptions...).IsSetByUser(&f.logLevelSet).SetValue(f.log.Level)
	app.Flag(promslogflag.FormatFlagName, promslogflag.FormatFlagHelp).
		Default("logfmt").HintOptions(promslog.FormatFlagOptions...).IsSetByUser(&f.logFormatSet).SetValue(f.log.Format)

	app.Command("agent", "Keep the tunnels (what culvert-client does without a command).").Default()
	doctor := app.Command("doctor", "Check the way from here to the proxies and to a target, step by step, and say what to do.")
	doctor.Arg("target", "Named target, PORT or HOST:PORT. All named targets by default.").StringVar(&f.doctorTarget)
	app.Command("leave", "Have the proxies forget this agent now. Stop the agent first.")
	app.Command("check-config", "Check flags and --config.file, and say what the agent would do.")
	f.job.addTo(app)
	addServiceCommands(app)
	return app
}

// file is the configuration file.
type file struct {
	ProxyURLs        []string             `yaml:"proxy_urls"`
	ResolveAll       bool                 `yaml:"resolve_all"`
	FQDN             string               `yaml:"fqdn"`
	Labels           map[string]string    `yaml:"labels"`
	Targets          []fileTarget         `yaml:"targets"`
	Hosts            []fileHost           `yaml:"hosts"`
	Allow            []fileScalar         `yaml:"allow"`
	LocalHost        string               `yaml:"local_host"`
	Scrape           fileScrape           `yaml:"scrape"`
	Connect          fileConnect          `yaml:"connect"`
	TLS              httpclient.TLSConfig `yaml:"tls_config"`
	TokenFile        string               `yaml:"token_file"`
	KeyFile          string               `yaml:"key_file"`
	Protocol         agent.Protocol       `yaml:"proxy_protocol"`
	RetryInitialWait model.Duration       `yaml:"retry_initial_wait"`
	RetryMaxWait     model.Duration       `yaml:"retry_max_wait"`
	MetricsAddress   *string              `yaml:"metrics_address"`
	Textfile         fileTextfile         `yaml:"textfile"`
	Push             filePush             `yaml:"push"`
	StoragePath      string               `yaml:"storage_path"`
	LogLevel         string               `yaml:"log_level"`
	LogFormat        string               `yaml:"log_format"`
}

type fileTarget struct {
	Name   string            `yaml:"name"`
	URL    string            `yaml:"url"`
	Labels map[string]string `yaml:"labels"`
	HTTP   httpclient.Config `yaml:",inline"`
}

// UnmarshalYAML sets the defaults of the inlined HTTP configuration.
func (t *fileTarget) UnmarshalYAML(unmarshal func(any) error) error {
	t.HTTP = httpclient.DefaultConfig
	type plain fileTarget
	return unmarshal((*plain)(t))
}

type fileTextfile struct {
	Directories []string       `yaml:"directories"`
	MaxAge      model.Duration `yaml:"max_age"`
	MaxFileSize fileBytes      `yaml:"max_file_size"`
}

type fileScrape struct {
	AllowAddresses []string   `yaml:"allow_addresses"`
	MaxConcurrent  *int       `yaml:"max_concurrent"`
	MaxBodySize    *fileBytes `yaml:"max_body_size"`
}

type fileConnect struct {
	MaxConcurrent *int `yaml:"max_concurrent"`
}

type filePush struct {
	ListenAddresses []string    `yaml:"listen_addresses"`
	Relay           agent.Relay `yaml:"relay"`
	SpoolMaxBytes   fileBytes   `yaml:"spool_max_bytes"`
	MaxBodySize     fileBytes   `yaml:"max_body_size"`
}

// fileBytes is a size as in 16MiB.
type fileBytes units.Base2Bytes

// UnmarshalYAML takes a number of bytes as well.
func (b *fileBytes) UnmarshalYAML(unmarshal func(any) error) error {
	var text string
	if err := unmarshal(&text); err != nil {
		return err
	}
	if n, err := strconv.ParseInt(text, 10, 64); err == nil {
		*b = fileBytes(n)
		return nil
	}
	n, err := units.ParseBase2Bytes(text)
	if err != nil {
		return fmt.Errorf("%q is not a size; write it as in 16MiB", text)
	}
	*b = fileBytes(n)
	return nil
}

type fileHost struct {
	Name    string `yaml:"name"`
	Address string `yaml:"address"`
}

// UnmarshalYAML takes NAME or NAME=ADDRESS as well, as the flag does.
func (h *fileHost) UnmarshalYAML(unmarshal func(any) error) error {
	var s string
	if unmarshal(&s) == nil {
		host := agent.ParseHost(s)
		h.Name, h.Address = host.Name, host.Address
		return nil
	}
	type plain fileHost
	return unmarshal((*plain)(h))
}

// fileScalar is text that YAML may take for a number.
type fileScalar string

func (s *fileScalar) UnmarshalYAML(unmarshal func(any) error) error {
	var v any
	if err := unmarshal(&v); err != nil {
		return err
	}
	switch v.(type) {
	case string, int:
		*s = fileScalar(fmt.Sprint(v))
		return nil
	}
	return fmt.Errorf("%v: use PORT, PORT-PORT or all", v)
}

// load reads the file, joins it with the flags, and checks what can be checked
// before the agent does.
func (f *flags) load() (*settings, error) {
	var c file
	if f.configFile != "" {
		text, err := os.ReadFile(f.configFile)
		if err != nil {
			return nil, fmt.Errorf("configuration: %w", err)
		}
		if c, err = parseFile(text, filepath.Dir(f.configFile)); err != nil {
			return nil, fmt.Errorf("configuration %s: %w", f.configFile, err)
		}
	}
	log := *f.log
	if c.LogLevel != "" && !f.logLevelSet {
		log.Level = promslog.NewLevel()
		if err := log.Level.Set(c.LogLevel); err != nil {
			return nil, fmt.Errorf("configuration %s: log_level: %w", f.configFile, err)
		}
	}
	if c.LogFormat != "" && !f.logFormatSet {
		log.Format = promslog.NewFormat()
		if err := log.Format.Set(c.LogFormat); err != nil {
			return nil, fmt.Errorf("configuration %s: log_format: %w", f.configFile, err)
		}
	}
	s := &settings{MetricsAddress: f.metricsAddress, Agent: agent.Config{
		Name:             cmp.Or(f.fqdn, c.FQDN),
		ProxyURLs:        append(append([]string{}, f.proxyURLs...), c.ProxyURLs...),
		ResolveAll:       f.resolveAll || c.ResolveAll,
		Labels:           c.Labels,
		LocalHost:        cmp.Or(f.localHost, c.LocalHost),
		TokenFile:        cmp.Or(f.tokenFile, c.TokenFile),
		KeyFile:          cmp.Or(f.keyFile, c.KeyFile),
		Protocol:         agent.Protocol(f.protocol),
		RetryInitialWait: f.initialWait,
		RetryMaxWait:     f.maxWait,
		Logger:           promslog.New(&log),
	}}
	if c.MetricsAddress != nil && !f.metricsAddressSet {
		s.MetricsAddress = *c.MetricsAddress
	}
	if c.Protocol != "" && !f.protocolSet {
		s.Agent.Protocol = c.Protocol
	}
	if c.RetryInitialWait > 0 && !f.initialWaitSet {
		s.Agent.RetryInitialWait = time.Duration(c.RetryInitialWait)
	}
	if c.RetryMaxWait > 0 && !f.maxWaitSet {
		s.Agent.RetryMaxWait = time.Duration(c.RetryMaxWait)
	}
	s.Agent.Textfile.Directories = append(append([]string{}, f.textfileDirectories...), c.Textfile.Directories...)
	s.Agent.Textfile.MaxAge = time.Duration(f.textfileMaxAge)
	if !f.textfileMaxAgeSet && c.Textfile.MaxAge > 0 {
		s.Agent.Textfile.MaxAge = time.Duration(c.Textfile.MaxAge)
	}
	s.Agent.Textfile.MaxFileSize = int64(f.textfileMaxFileSize)
	if !f.textfileMaxFileSizeSet && c.Textfile.MaxFileSize != 0 {
		s.Agent.Textfile.MaxFileSize = int64(c.Textfile.MaxFileSize)
	}
	push := &s.Agent.Push
	push.ListenAddresses = append(append([]string{}, f.pushAddresses...), c.Push.ListenAddresses...)
	push.StoragePath = cmp.Or(f.storagePath, c.StoragePath)
	push.Relay = agent.Relay(f.relay)
	if !f.relaySet && c.Push.Relay != "" {
		push.Relay = c.Push.Relay
	}
	push.SpoolMaxBytes = int64(f.spoolMaxBytes)
	if !f.spoolMaxBytesSet && c.Push.SpoolMaxBytes != 0 {
		push.SpoolMaxBytes = int64(c.Push.SpoolMaxBytes)
	}
	push.MaxBodySize = int64(f.maxBodySize)
	if !f.maxBodySizeSet && c.Push.MaxBodySize != 0 {
		push.MaxBodySize = int64(c.Push.MaxBodySize)
	}
	for _, raw := range append(append([]string{}, f.allowAddresses...), c.Scrape.AllowAddresses...) {
		prefix, err := agent.ParseAddresses(raw)
		if err != nil {
			return nil, fmt.Errorf("--scrape.allow-address: %w", err)
		}
		s.Agent.AllowAddresses = append(s.Agent.AllowAddresses, prefix)
	}
	limits := map[string]int64{"scrape.max-concurrent": int64(f.maxConcurrent), "connect.max-concurrent": int64(f.maxTunnels), "scrape.max-body-size": int64(f.maxResponseSize)}
	if n := c.Scrape.MaxConcurrent; n != nil && !f.maxConcurrentSet {
		limits["scrape.max-concurrent"] = int64(*n)
	}
	if n := c.Connect.MaxConcurrent; n != nil && !f.maxTunnelsSet {
		limits["connect.max-concurrent"] = int64(*n)
	}
	if n := c.Scrape.MaxBodySize; n != nil && !f.maxResponseSizeSet {
		limits["scrape.max-body-size"] = int64(*n)
	}
	if f.processors < 1 {
		return nil, fmt.Errorf("--runtime.gomaxprocs: %d is less than 1", f.processors)
	}
	for name, n := range limits {
		switch {
		case n < 0:
			return nil, fmt.Errorf("--%s: %d is less than 0; 0 is no limit", name, n)
		case n == 0:
			limits[name] = -1 // what the library takes for no limit
		}
	}
	s.Agent.MaxConcurrent, s.Agent.MaxTunnels, s.Agent.MaxBodySize = int(limits["scrape.max-concurrent"]), int(limits["connect.max-concurrent"]), limits["scrape.max-body-size"]
	if len(f.labels) > 0 {
		s.Agent.Labels = maps.Clone(c.Labels)
		if s.Agent.Labels == nil {
			s.Agent.Labels = map[string]string{}
		}
		maps.Copy(s.Agent.Labels, f.labels)
	}
	for _, raw := range f.targets {
		t, err := agent.ParseTarget(raw)
		if err != nil {
			return nil, fmt.Errorf("--target: %w", err)
		}
		s.Agent.Targets = append(s.Agent.Targets, t)
	}
	for _, t := range c.Targets {
		s.Agent.Targets = append(s.Agent.Targets, agent.Target{Name: t.Name, URL: t.URL, Labels: t.Labels, HTTP: &t.HTTP})
	}
	for _, raw := range f.hosts {
		s.Agent.Hosts = append(s.Agent.Hosts, agent.ParseHost(raw))
	}
	for _, h := range c.Hosts {
		s.Agent.Hosts = append(s.Agent.Hosts, agent.Host(h))
	}
	for _, raw := range append(append([]string{}, f.allow...), scalars(c.Allow)...) {
		for part := range strings.SplitSeq(raw, ",") {
			r, err := agent.ParsePortRange(strings.TrimSpace(part))
			if err != nil {
				return nil, fmt.Errorf("--allow: %w", err)
			}
			s.Agent.Allow = append(s.Agent.Allow, r)
		}
	}
	tls := c.TLS
	tls.CAFile = cmp.Or(f.tls.CAFile, tls.CAFile)
	tls.CertFile = cmp.Or(f.tls.CertFile, tls.CertFile)
	tls.KeyFile = cmp.Or(f.tls.KeyFile, tls.KeyFile)
	var err error
	if s.Agent.TLS, err = tls.New(); err != nil {
		return nil, fmt.Errorf("TLS for the proxies: %w", err)
	}
	return s, nil
}

// parseFile reads a configuration in YAML; relative file names in it count from
// dir. Unknown fields are errors.
func parseFile(text []byte, dir string) (file, error) {
	var c file
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.SetStrict(true)
	if err := decoder.Decode(&c); err != nil && !errors.Is(err, io.EOF) {
		return c, err
	}
	c.TLS.SetDirectory(dir)
	c.TokenFile = httpclient.JoinDir(dir, c.TokenFile)
	c.KeyFile = httpclient.JoinDir(dir, c.KeyFile)
	for i := range c.Targets {
		c.Targets[i].HTTP.SetDirectory(dir)
	}
	for i, directory := range c.Textfile.Directories {
		c.Textfile.Directories[i] = httpclient.JoinDir(dir, directory)
	}
	c.StoragePath = httpclient.JoinDir(dir, c.StoragePath)
	for i, address := range c.Push.ListenAddresses {
		if path, ok := strings.CutPrefix(address, "unix:"); ok {
			c.Push.ListenAddresses[i] = "unix:" + httpclient.JoinDir(dir, path)
		}
	}
	return c, nil
}

func scalars(in []fileScalar) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = string(s)
	}
	return out
}
