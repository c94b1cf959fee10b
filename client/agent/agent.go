// Package agent is culvert-client as a library: it dials out to the proxies,
// keeps a session to each, and serves the scrapes that come through them.
//
// A program that embeds it needs no port of its own: see the example.
package agent

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/culvert-io/culvert/client/httpclient"
	"github.com/culvert-io/culvert/client/textfile"
	"github.com/culvert-io/culvert/protocol"
)

// Config says what an agent is and what it may reach. Its zero values are
// useful, but for ProxyURLs.
type Config struct {
	// Name is what Prometheus asks for. The host's fully qualified name by default.
	Name string
	// ProxyURLs are the proxies; the agent keeps a session to each. At least one.
	ProxyURLs []string
	// ResolveAll takes each address of the host of a proxy URL for a proxy of its own.
	// The hosts are looked up again every 30 s. A forward proxy of the environment
	// (HTTPS_PROXY) looks names up itself: it has no effect there.
	ResolveAll bool
	// LookupHost looks a host up for ResolveAll: net.DefaultResolver by default.
	LookupHost func(ctx context.Context, host string) ([]netip.Addr, error)
	// Protocol is ProtocolAuto by default.
	Protocol Protocol
	// Labels describe the agent in discovery, as __meta_culvert_label_NAME.
	Labels map[string]string
	// Targets are reached as TARGET.NAME.
	Targets []Target
	// Hosts are other hosts that the agent answers for.
	Hosts []Host
	// Allow are the ports of the own host and of Hosts that may be scraped. None
	// by default.
	Allow []PortRange
	// LocalHost is the address of the own host, "localhost" by default.
	LocalHost string
	// AllowAddresses are those that a name may lead to although they are link-local,
	// loopback, multicast, unspecified, or a cloud's metadata service. None by default:
	// DNS doesn't decide that the agent reaches them. Addresses that stand in LocalHost,
	// Hosts or Targets need no leave.
	AllowAddresses []netip.Prefix
	// MaxConcurrent bounds the scrapes that run at a time, of all targets and through all
	// proxies together; one more waits for a second, and is refused then. 128 by default:
	// what two proxies send at most, as they come. Negative: no limit.
	MaxConcurrent int
	// MaxTunnels bounds the CONNECT tunnels (https scrapes) likewise. 512 by default, as
	// much as two proxies open. Negative: no limit.
	MaxTunnels int
	// MaxBodySize bounds the body of a target's response, in bytes as they are
	// transferred. A longer one arrives broken, or is refused where its length is known.
	// 1 GiB by default: far more than a Prometheus takes, and an end for what has none.
	// Negative: no limit. What goes through CONNECT is not measured.
	MaxBodySize int64
	// TLS is used towards https proxies, and for https scrapes that the agent
	// makes itself. Nil means the defaults of crypto/tls.
	TLS *tls.Config
	// TokenFile holds the bearer token for the proxies, in one line. It is read for each
	// handshake. None by default.
	TokenFile string
	// KeyFile keeps the agent's own secret. It is made where it is not there. A proxy with
	// roles pins the agent's name to it, so that nobody else can be this agent. None by
	// default.
	KeyFile string
	// RetryInitialWait and RetryMaxWait bound the waits between tries to reach a
	// proxy: 1 s and 5 s by default. Each wait is a random part of the bound,
	// which grows by half with each failure.
	RetryInitialWait, RetryMaxWait time.Duration
	// Gatherer adds to what the target "agent" serves, beside the agent's own
	// metrics, which win where both have a series.
	Gatherer prometheus.Gatherer
	// Textfile names directories of textfiles, which the target "agent" serves too. No
	// Directories, no textfile collector. Its Logger is the agent's by default.
	Textfile textfile.Config
	// Push says where pushes of the host are taken. Without a Push.StoragePath none are.
	// A reload changes all of it but ListenAddresses, StoragePath and MaxBodySize.
	Push Push
	// ShutdownTimeout bounds how long running scrapes may take after Run's context
	// has ended, and the proxies were told, for which there are 3 s. 10 s by default.
	ShutdownTimeout time.Duration
	// Session tunes the sessions; for tests and experiments.
	Session protocol.SessionConfig
	// Logger is slog.Default by default.
	Logger *slog.Logger
}

// Target is a named target. Exactly one of URL and Handler is given.
type Target struct {
	// Name is one DNS label.
	Name string
	// URL is http or https; its path and query are what may be asked for. Without
	// a path it means /metrics. A path that ends in "/*" opens all below it.
	URL string
	// Handler serves the target from inside this process, at /metrics.
	Handler http.Handler
	// Labels are added to the agent's in discovery, and win over them.
	Labels map[string]string
	// HTTP holds TLS, credentials and headers for the target, as in Prometheus's
	// scrape_config. Nil means httpclient.DefaultConfig.
	HTTP *httpclient.Config
}

// Host is a host of the agent's network that it answers for.
type Host struct {
	// Name is a host name, or "*." and a domain.
	Name string
	// Address is what to connect to, without a port: the name itself by default.
	Address string
}

// PortRange is a range of ports, both ends included.
type PortRange struct{ First, Last uint16 }

// Agent is a running or startable agent.
type Agent struct {
	instance string
	metrics  *metrics
	current  atomic.Pointer[snapshot]
	pushes   atomic.Pointer[pushes] // nil: none are taken

	scrapes, tunnels *places // those that run

	refusedAddress, refusedPort, longResponse, replacedPoll, lostPush rarely

	resolveNow chan struct{} // has one after a reload

	mu       sync.Mutex // protects what follows, and changes of current
	links    map[linkKey]*link
	resolved map[string][]netip.Addr // by host, for ResolveAll
	started  bool                    // Run was called
	ready    chan struct{}           // closed by Run
	running  context.Context         // of the links, nil before there are any
	tasks    sync.WaitGroup          // the links' goroutines
	held     map[string]*link        // by the proxy's ID: one session each
}

// New checks the configuration. It returns an error that names the field.
func New(cfg Config) (*Agent, error) {
	id := make([]byte, 16)
	rand.Read(id)
	a := &Agent{instance: hex.EncodeToString(id), links: map[linkKey]*link{}, resolved: map[string][]netip.Addr{}, resolveNow: make(chan struct{}, 1), ready: make(chan struct{}), held: map[string]*link{}, scrapes: new(places), tunnels: new(places)}
	logger := func() *slog.Logger { return a.current.Load().Logger }
	for _, r := range []*rarely{&a.refusedAddress, &a.refusedPort, &a.longResponse, &a.replacedPoll, &a.lostPush} {
		r.logger = logger
	}
	a.metrics = newMetrics(a)
	snap, err := a.newSnapshot(cfg)
	if err != nil {
		return nil, err
	}
	a.current.Store(snap)
	a.resizePlaces(snap)
	return a, nil
}

// Run keeps the sessions until ctx ends. Then it tells the proxies that it goes,
// lets running scrapes finish for at most Config.ShutdownTimeout, and returns
// nil. It may be called once. It returns an error at once where it can't take pushes as
// Config.Push says.
func (a *Agent) Run(ctx context.Context) error {
	a.mu.Lock()
	if a.started {
		a.mu.Unlock()
		return errors.New("agent: Run was called twice")
	}
	a.started = true
	a.mu.Unlock()
	// Before there are sessions: the first scrape finds the machine's groups.
	stopPushes, err := a.startPushes(a.current.Load().Push)
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.running = ctx
	a.startLinks()
	a.mu.Unlock()
	close(a.ready)
	a.tasks.Go(func() { a.resolveLoop(ctx) })
	<-ctx.Done()
	stopPushes()
	a.tasks.Wait()
	return nil
}

// Ready returns a channel that is closed when Run takes pushes and dials the proxies.
func (a *Agent) Ready() <-chan struct{} { return a.ready }

// Reload takes a new configuration. Sessions stay where the name is the same: the
// registration is replaced in place, and no scrape is dropped. New TLS settings
// count from the next time that the agent dials. On an error the old configuration
// stays.
func (a *Agent) Reload(cfg Config) error {
	snap, err := a.newSnapshot(cfg)
	if err != nil {
		return err
	}
	a.reload(snap)
	if p := a.pushes.Load(); p != nil {
		p.configure()
		p.changed() // a session may have got another URL
	}
	return nil
}

func (a *Agent) reload(snap *snapshot) {
	a.mu.Lock()
	defer a.mu.Unlock()
	old := a.current.Swap(snap)
	a.resizePlaces(snap)
	old.retire()
	if a.running == nil || a.running.Err() != nil {
		return
	}
	a.startLinks()
	select {
	case a.resolveNow <- struct{}{}:
	default:
	}
	for _, l := range a.links {
		l.reload(old, snap)
	}
}

func (a *Agent) resizePlaces(snap *snapshot) {
	a.scrapes.resize(snap.MaxConcurrent)
	a.tunnels.resize(snap.MaxTunnels)
}

// startLinks starts and stops links so that there is one for each proxy URL, or for
// each address of its host. It is called with mu held.
func (a *Agent) startLinks() {
	wanted := a.wantedLinks()
	for key, u := range wanted {
		if a.links[key] == nil {
			l := newLink(a, u, key.address)
			a.links[key] = l
			ctx, cancel := context.WithCancel(a.running)
			l.stop = cancel
			a.tasks.Go(func() { l.run(ctx) })
		}
	}
	for key, l := range a.links {
		if wanted[key] == nil {
			l.stop()
			delete(a.links, key)
			if key.address.IsValid() { // of names with many addresses in the course of time
				for _, counter := range []*prometheus.CounterVec{a.metrics.connects, a.metrics.reconnects, a.metrics.polls, a.metrics.polled, a.metrics.relayed, a.metrics.relayRetries} {
					counter.DeletePartialMatch(prometheus.Labels{"proxy": l.label})
				}
			}
		}
	}
}

// hold claims the proxy with the given ID for l. It returns the link that holds
// it already, if another one does.
func (a *Agent) hold(id string, l *link) *link {
	a.mu.Lock()
	defer a.mu.Unlock()
	if other := a.held[id]; other != nil && other != l && id != "" {
		return other
	}
	a.held[id] = l
	return nil
}

func (a *Agent) release(id string, l *link) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.held[id] != l {
		return
	}
	delete(a.held, id)
	for _, other := range a.links {
		if other.second.Swap(nil) != nil {
			other.nudge()
		}
	}
}

// Name returns the agent's name.
func (a *Agent) Name() string { return a.current.Load().name }

// Gatherer returns what the target "agent" serves. With many textfiles, Handler
// needs less memory.
func (a *Agent) Gatherer() prometheus.Gatherer {
	return prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		return a.current.Load().self.Gather()
	})
}

// Handler serves what the target "agent" serves, on every path.
func (a *Agent) Handler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.current.Load().self.ServeHTTP(w, r)
	})
}

// ProxyURLs returns the proxies of the configuration.
func (a *Agent) ProxyURLs() []*ProxyURL { return a.current.Load().proxies }

// Registration returns what the agent tells the proxies of itself. It must not be
// changed.
func (a *Agent) Registration() *protocol.Registration { return &a.current.Load().registration }

// Dial opens a session to a proxy that is not registered and serves nothing, for
// diagnosis. The caller closes it. Errors are those of protocol.Dialer.
func (a *Agent) Dial(ctx context.Context, proxy *ProxyURL) (*protocol.Session, error) {
	return a.dialer(proxy).Dial(ctx)
}

func (a *Agent) dialer(proxy *ProxyURL) *protocol.Dialer {
	d := &protocol.Dialer{ProxyURL: proxy.URL, Instance: a.instance}
	a.update(d)
	return d
}

// update brings what a reload may change in a dialer up to date.
func (a *Agent) update(d *protocol.Dialer) {
	s := a.current.Load()
	d.Agent, d.TLS, d.Session = s.name, s.TLS, s.Session
	if d.Key = nil; s.KeyFile != "" {
		d.Key = func() (string, error) { return readOrMakeKey(s.KeyFile) }
	}
	if d.Token = nil; s.TokenFile != "" {
		d.Token = func() (string, error) { return readToken(s.TokenFile) }
	}
}

// Scrape answers a scrape as if it had come through a proxy: target is the
// absolute URL that the scraper asks for, as in "http://web-1:9100/metrics". What
// the agent refuses comes as a response with the header Culvert-Error.
func (a *Agent) Scrape(ctx context.Context, target string) (*http.Response, error) {
	u, err := url.Parse(target)
	if err != nil {
		return nil, err
	}
	listener := newPipeListener()
	server := &http.Server{Handler: &sessionHandler{agent: a}}
	go server.Serve(listener)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent", nil)
	if err != nil {
		return nil, err
	}
	req.URL.Opaque, req.Host = target, u.Host
	resp, err := (&http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return listener.dial(ctx) },
		DisableKeepAlives:  true,
		DisableCompression: true,
	}).RoundTrip(req)
	if err != nil {
		server.Close()
		return nil, err
	}
	resp.Body = &closeBoth{resp.Body, server}
	return resp, nil
}

// closeBoth ends the server with the body.
type closeBoth struct {
	io.ReadCloser
	server *http.Server
}

func (c *closeBoth) Close() error {
	err := c.ReadCloser.Close()
	c.server.Close()
	return err
}

// Connected returns the URLs of the proxies that accepted the registration and
// are connected now, and of those that take polls now, without credentials.
func (a *Agent) Connected() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var urls []string
	for _, l := range a.links {
		if l.connected.Load() || l.polls() {
			urls = append(urls, l.label)
		}
	}
	return urls
}

// snapshot is a configuration as it is used: immutable, replaced by Reload.
type snapshot struct {
	Config
	agent        *Agent
	name         string
	proxies      []*ProxyURL
	registration protocol.Registration
	targets      map[string]*target
	hosts        map[string]place // exact names
	wildcards    map[string]place // suffixes ".example.net"
	guard        *guard           // connects to targets
	ports        *http.Transport  // for scrapes of ports
	self         *self            // the target "agent"
}

func (a *Agent) newSnapshot(cfg Config) (*snapshot, error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if cfg.LocalHost == "" {
		cfg.LocalHost = "localhost"
	}
	switch cfg.Protocol {
	case "":
		cfg.Protocol = ProtocolAuto
	case ProtocolAuto, ProtocolCulvert, ProtocolPushProx:
	default:
		return nil, fmt.Errorf("protocol %q: use %s, %s or %s", cfg.Protocol, ProtocolAuto, ProtocolCulvert, ProtocolPushProx)
	}
	if cfg.RetryInitialWait <= 0 {
		cfg.RetryInitialWait = time.Second
	}
	if cfg.RetryMaxWait <= 0 {
		cfg.RetryMaxWait = 5 * time.Second
	}
	if cfg.MaxConcurrent == 0 {
		cfg.MaxConcurrent = 128
	}
	if cfg.MaxTunnels == 0 {
		cfg.MaxTunnels = 512
	}
	if cfg.MaxBodySize == 0 {
		cfg.MaxBodySize = 1 << 30
	}
	if cfg.ShutdownTimeout <= 0 {
		cfg.ShutdownTimeout = 10 * time.Second
	}
	if cfg.LookupHost == nil {
		cfg.LookupHost = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	if cfg.Name == "" {
		name, err := FQDN()
		if err != nil {
			return nil, fmt.Errorf("look up the host's name: %w; name the agent with --fqdn", err)
		}
		cfg.Name = name
	}
	if cfg.Session.Stats == nil {
		cfg.Session.Stats = a.metrics.stats
	}
	if cfg.Session.Logger == nil {
		cfg.Session.Logger = cfg.Logger
	}
	s := &snapshot{Config: cfg, agent: a, name: protocol.NormalizeName(cfg.Name)}
	if err := protocol.CheckName(s.name); err != nil {
		return nil, fmt.Errorf("agent name: %w; choose one with --fqdn", err)
	}
	if len(cfg.ProxyURLs) == 0 {
		return nil, errors.New("no proxy: give at least one --proxy-url, as in --proxy-url=http://proxy.example.net:8080")
	}
	for _, raw := range cfg.ProxyURLs {
		u, err := ParseProxyURL(raw)
		if err != nil {
			return nil, err
		}
		s.proxies = append(s.proxies, u)
	}
	if cfg.ResolveAll && cfg.Push.StoragePath != "" && cfg.Push.Relay != RelayFirst {
		return nil, errors.New("with --proxy.resolve-all the proxies are not known beforehand, so pushes can't be kept for each of them: share one push store among them, and give --push.relay=first")
	}
	if err := s.checkToken(); err != nil {
		return nil, err
	}
	if err := s.addRoutes(); err != nil {
		return nil, err
	}
	s.registration.Version = protocol.BuildVersion()
	s.registration.Labels = cfg.Labels
	if err := s.registration.Check(s.name); err != nil {
		return nil, err
	}
	var err error
	if err = cfg.Push.check(); err != nil {
		return nil, err
	}
	if s.self, err = newSelf(a, cfg); err != nil {
		return nil, err
	}
	return s, nil
}

// retire lets go of the connections that only the old configuration uses.
func (s *snapshot) retire() {
	s.ports.CloseIdleConnections()
	for _, t := range s.targets {
		t.close()
	}
}

// ProxyURL is the checked base URL of a proxy.
type ProxyURL struct{ *url.URL }

// ParseProxyURL checks the base URL of a proxy: http or https, with a host. A
// bare host:port means http.
func ParseProxyURL(raw string) (*ProxyURL, error) {
	full := raw
	if !strings.Contains(raw, "://") {
		full = "http://" + raw
	}
	u, err := url.Parse(full)
	switch {
	case err != nil:
		var reason *url.Error
		if errors.As(err, &reason) {
			err = reason.Err // the whole error would repeat a password
		}
		return nil, fmt.Errorf("proxy URL: %w; it looks like http://proxy.example.net:8080", err)
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("proxy URL %q: scheme %q is not http or https", u.Redacted(), u.Scheme)
	case u.Hostname() == "":
		return nil, fmt.Errorf("proxy URL %q: the host is missing", u.Redacted())
	case u.RawQuery != "" || u.Fragment != "":
		return nil, fmt.Errorf("proxy URL %q: a query or fragment has no meaning here", u.Redacted())
	}
	return &ProxyURL{u}, nil
}

// FQDN returns the host's fully qualified name: what the resolver calls it, else
// the kernel's host name.
func FQDN() (string, error) {
	host, err := os.Hostname()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupHost(ctx, host)
	if err != nil {
		return host, nil
	}
	for _, addr := range addrs {
		names, err := net.DefaultResolver.LookupAddr(ctx, addr)
		if err != nil || len(names) == 0 || names[0] == "localhost" || names[0] == "localhost." {
			continue
		}
		return protocol.NormalizeName(names[0]), nil
	}
	return host, nil
}
