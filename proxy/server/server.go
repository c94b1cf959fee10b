// Package server is the front door of culvert-proxy: scrapes come in here and
// leave through the agents' sessions; agents, discovery and people come in here
// too.
package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/access"
	"github.com/culvert-io/culvert/proxy/cluster"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// Config says how a proxy behaves. Zero values mean the defaults.
type Config struct {
	// ListenAddresses are for scrapers, people, and agents where AgentListenAddresses
	// is empty. ":8080" by default.
	ListenAddresses []string
	// WebConfigFile is exporter-toolkit's web configuration: TLS, headers.
	WebConfigFile string
	// AgentListenAddresses take /tunnel, and PushProx's /poll and /push, alone, which then
	// leave ListenAddresses.
	AgentListenAddresses []string
	// AgentWebConfigFile is the web configuration of AgentListenAddresses.
	AgentWebConfigFile string
	// ExternalURL is how people and scrapers reach the proxy: for discovery's path
	// mode, and to tell the proxy's own name from an agent's.
	ExternalURL *url.URL
	// RoutePrefix stands in front of the paths of the proxy's own routes, as in
	// "/culvert". None by default. Agents find /tunnel without it too.
	RoutePrefix string
	// TelemetryPath is where the groups of the push store and the proxy's own metrics
	// are scraped: "/metrics" by default. Pushes go to /metrics/job/… whatever it is.
	TelemetryPath string
	// EnableAdminAPI opens PUT /api/v1/admin/wipe, EnableLifecycle PUT and POST of
	// /-/quit.
	EnableAdminAPI, EnableLifecycle bool
	// TrustedProxies are the networks of reverse proxies whose X-Forwarded-For tells
	// where wrong credentials come from.
	TrustedProxies []netip.Prefix
	// Flags are shown by /api/v1/status.
	Flags map[string]string
	// StoragePath is the directory for state; "" keeps it in memory only.
	StoragePath string
	// ConfigFile is the YAML file of what can be reloaded; "" for none.
	ConfigFile string

	// DefaultTimeout is the timeout of a scrape that names none: 15 s by default.
	DefaultTimeout time.Duration
	// MaxTimeout caps what a scrape may name: 5 min by default.
	MaxTimeout time.Duration
	// TimeoutOffset is taken off the scraper's timeout, so that the answer still
	// arrives: 250 ms by default.
	TimeoutOffset time.Duration
	// ReconnectWait is how long a scrape waits for an agent that is not connected,
	// or busy: 2 s by default, negative for none.
	ReconnectWait time.Duration
	// ConnectIdleTimeout ends a CONNECT tunnel that nothing goes through: 6 min by
	// default, longer than common scrape intervals.
	ConnectIdleTimeout time.Duration
	// MaxHandshakes bounds the sessions that have not registered yet: 256 by default.
	MaxHandshakes int
	// ShutdownTimeout bounds how long running scrapes and relays may take after Run's context
	// has ended: 20 s by default.
	ShutdownTimeout time.Duration

	// DisablePushProx takes /poll and /push away, which clients of PushProx use.
	DisablePushProx bool
	// Cluster makes one of several proxies. Without Endpoints the proxy is alone.
	Cluster Cluster
	// Push tunes the push store.
	Push Push
	// Fleet tunes what is known of agents; its Path is set from StoragePath.
	Fleet fleet.Config
	// Session tunes the sessions; for tests and experiments.
	Session protocol.SessionConfig
	// UseAllProcessors is called where work begins that goes better on all processors, if the
	// program keeps to fewer: a large scrape. It does nothing by default.
	UseAllProcessors func()
	// Registry gets the proxy's metrics and is served at /metrics. A new one by default.
	Registry *prometheus.Registry
	// Logger is slog.Default by default.
	Logger *slog.Logger
}

// Server is a proxy. New, then Listen, then Run.
type Server struct {
	config    Config
	id        string
	logger    *slog.Logger
	fleet     *fleet.Fleet
	metrics   *metrics
	settings  atomic.Pointer[Settings]
	reloading sync.Mutex // held during a reload: the last one has to win
	access    *access.Authenticator
	pins      *access.Pins
	guarded   []string      // the routes of the router: see routeAccess
	recheck   chan struct{} // has one after a reload: see watchAccess

	crossOrigin   *http.CrossOriginProtection
	pageSeal      pageSeal
	reloadFailure atomic.Pointer[reloadFailure] // nil: the last reload succeeded
	fleetStored   bool                          // the known agents survive a restart

	cluster *cluster.Cluster // nil: the proxy is alone

	main, agents []*listener
	peers        []*listener // for other proxies
	mux          *http.ServeMux
	push         *pushStore
	started      time.Time
	quit         chan struct{} // closed by /-/quit
	quitOnce     sync.Once
	agentAPI     *http.Server // serves agentStreams
	agentStreams *streamListener
	lists        lists // of discovery
	pushProx     *pushProx
	admission    admission

	draining atomic.Bool
	running  inFlight
	sessions tasks // sessions, and goroutines of them and of tunnels

	mu      sync.Mutex // protects what follows
	tunnels map[*tunnel]struct{}
	conns   map[*agentConn]struct{} // all sessions; nil: no more are taken
}

// New checks the configuration and reads the stored state.
func New(config Config) (*Server, error) {
	setDefault(&config.DefaultTimeout, 15*time.Second)
	setDefault(&config.MaxTimeout, 5*time.Minute)
	setDefault(&config.TimeoutOffset, 250*time.Millisecond)
	setDefault(&config.ReconnectWait, 2*time.Second)
	setDefault(&config.ConnectIdleTimeout, 6*time.Minute)
	setDefault(&config.MaxHandshakes, 256)
	setDefault(&config.ShutdownTimeout, 20*time.Second)
	if len(config.ListenAddresses) == 0 {
		config.ListenAddresses = []string{":8080"}
	}
	setDefault(&config.TelemetryPath, "/metrics")
	if config.UseAllProcessors == nil {
		config.UseAllProcessors = func() {}
	}
	if config.Logger == nil {
		config.Logger = slog.Default()
	}
	if config.Registry == nil {
		config.Registry = prometheus.NewRegistry()
	}
	id := make([]byte, 16)
	rand.Read(id)
	s := &Server{config: config, id: hex.EncodeToString(id), logger: config.Logger, tunnels: map[*tunnel]struct{}{}, conns: map[*agentConn]struct{}{}, agentStreams: newStreamListener(), pushProx: newPushProx(), recheck: make(chan struct{}, 1), started: time.Now(), quit: make(chan struct{}), pageSeal: newPageSeal()}
	s.admission = admission{places: config.MaxHandshakes, names: map[string]int{}}
	if err := s.loadSettings(); err != nil {
		return nil, err
	}
	var err error
	if s.crossOrigin, err = newCrossOrigin(config.ExternalURL); err != nil {
		return nil, err
	}
	config.Fleet.Logger = s.logger
	if err := s.joinCluster(&config.Fleet); err != nil {
		return nil, err
	}
	if config.StoragePath != "" {
		config.Fleet.Path = filepath.Join(config.StoragePath, "fleet.db")
	}
	s.fleet, err = fleet.Open(config.Fleet)
	stored := config.Fleet.Path != ""
	switch {
	case errors.Is(err, fleet.ErrInUse):
		return nil, err
	case err != nil:
		// Scrapes matter more than a list that survives a restart.
		s.logger.Error("The list of known agents can't be used; going on without it, so lost agents are unknown after a restart", "err", err)
		config.Fleet.Path, stored = "", false
		if s.fleet, err = fleet.Open(config.Fleet); err != nil {
			return nil, err
		}
	}
	pinsPath := ""
	if config.StoragePath != "" {
		pinsPath = filepath.Join(config.StoragePath, "agent-keys")
	}
	// If these keys didn't count, who has the token of many agents could pass for one.
	if s.pins, err = access.OpenPins(pinsPath); err != nil {
		return nil, err
	}
	if s.cluster != nil {
		s.pins.Share(s.cluster)
	}
	s.fleetStored = stored
	s.metrics = newMetrics(config.Registry, s)
	s.config.Session.Stats = s.metrics.stats
	s.config.Session.Logger = s.logger
	setDefault(&s.config.Session.MaxAccepted, 2*maxRelays) // agents open streams for control and relays alone
	if err := s.openPushStore(); err != nil {
		return nil, err
	}
	if err := s.routes(); err != nil {
		return nil, err
	}
	s.agentAPI = s.newServer(http.HandlerFunc(s.serveAgent))
	s.agentAPI.IdleTimeout = time.Minute
	s.agentAPI.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		return context.WithValue(ctx, connKey{}, c.(agentStream).conn)
	}
	return s, nil
}

func setDefault[T comparable](v *T, value T) {
	var zero T
	if *v == zero {
		*v = value
	}
}

// Listen binds all addresses. It returns an error that names the address.
func (s *Server) Listen() error {
	agentHandler := http.Handler(nil)
	var err error
	if len(s.config.AgentListenAddresses) > 0 {
		agentHandler = http.HandlerFunc(s.serveAgentListener)
	}
	purpose := "scrapers, discovery and agents"
	if agentHandler != nil {
		purpose = "scrapers and discovery"
	}
	if s.main, err = s.listen(purpose, s.config.ListenAddresses, s.config.WebConfigFile, http.HandlerFunc(s.serveMain)); err != nil {
		return err
	}
	if s.agents, err = s.listen("agents", s.config.AgentListenAddresses, s.config.AgentWebConfigFile, agentHandler); err != nil {
		for _, l := range s.main {
			l.Close()
		}
		return err
	}
	if s.cluster == nil {
		return nil
	}
	if s.peers, err = s.listen("other proxies", []string{s.config.Cluster.ListenAddress}, s.config.Cluster.WebConfigFile, http.HandlerFunc(s.servePeer)); err == nil {
		s.config.Cluster.AdvertiseURL, err = s.advertise()
	}
	if err != nil {
		for _, l := range s.listeners() {
			l.Close()
		}
	}
	return err
}

func (s *Server) listeners() []*listener { return slices.Concat(s.main, s.agents, s.peers) }

// Addr returns the first address that scrapers can use, after Listen.
func (s *Server) Addr() string { return s.main[0].Addr().String() }

// AgentAddr returns the first address that agents can use, after Listen.
func (s *Server) AgentAddr() string {
	if len(s.agents) > 0 {
		return s.agents[0].Addr().String()
	}
	return s.Addr()
}

// Run serves until ctx ends, or /-/quit asks for it. Then agents are told to go, running scrapes finish
// for at most Config.ShutdownTimeout, and it returns nil. It returns an error
// when a listener fails.
func (s *Server) Run(ctx context.Context) error {
	storesCtx, stopStores := context.WithCancel(context.Background())
	var stores sync.WaitGroup
	var pushErr error
	stores.Go(func() { s.fleet.Run(storesCtx) })
	if s.cluster != nil {
		self := cluster.Peer{URL: s.config.Cluster.AdvertiseURL, Version: protocol.BuildVersion(), Started: s.started.UTC()}
		stores.Go(func() { s.cluster.Run(storesCtx, self, s.fleet, s.pins) })
	}
	stores.Go(func() { pushErr = s.push.run(storesCtx) })
	s.sessions.start(func() { s.agentAPI.Serve(s.agentStreams) })
	group, groupCtx := errgroup.WithContext(ctx)
	for _, l := range s.listeners() {
		group.Go(func() error {
			s.logger.Info("Listening", "address", l.Addr(), "tls", l.tls, "for", l.purpose)
			if err := l.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
	stores.Go(func() { s.watchAccess(storesCtx) })
	group.Go(func() error {
		select {
		case <-groupCtx.Done():
		case <-s.quit:
		}
		s.shutdown()
		return nil
	})
	err := group.Wait()
	// Only now nobody can push any more.
	stopStores()
	stores.Wait()
	return errors.Join(err, pushErr)
}

// shutdown tells the agents to go, waits for what runs, and closes the rest.
func (s *Server) shutdown() {
	s.draining.Store(true)
	ctx, cancel := context.WithTimeout(context.Background(), s.config.ShutdownTimeout)
	defer cancel()
	conns := s.fleet.Conns()
	s.logger.Info("Stopping", "agents", len(conns), "timeout", s.config.ShutdownTimeout)
	spread, moving := spreadReconnects(len(conns)), time.Duration(0)
	if s.cluster != nil && !s.cluster.Alone() {
		// Half of the time is for agents to find another proxy. Scrapes go on meanwhile.
		moving = s.config.ShutdownTimeout / 2
		spread = min(spread, moving/2)
	}
	s.fleet.Drain()
	drain := protocol.Drain{Reason: "shutdown", ReconnectAfterSeconds: spread.Seconds()}
	var told errgroup.Group
	told.SetLimit(64)
	tellCtx, cancelTell := context.WithTimeout(ctx, 3*time.Second)
	defer cancelTell()
	for _, conn := range conns {
		if client, ok := conn.Link.(*pushProxClient); ok {
			if moving > 0 { // behind a balancer it finds another proxy; who comes back may stay
				client.end(errors.New("the proxy is going away"), goingAway(), false)
			}
			continue
		}
		told.Go(func() error {
			if err := conn.Session.SendDrain(tellCtx, drain); err != nil {
				s.logger.Debug("The agent did not take the drain", "agent", conn.Agent, "err", err)
			}
			return nil
		})
	}
	// The listeners stay open meanwhile: who balances load has to see /-/ready fail.
	s.awaitMoved(ctx, moving)
	if moving > 0 {
		s.closeIdle(ctx)
	}
	select {
	case <-s.running.drain():
	case <-ctx.Done():
	}
	close(s.pushProx.ending) // scrapes that ran had to get through
	var stopped sync.WaitGroup
	for _, l := range s.listeners() {
		stopped.Go(func() {
			if err := l.server.Shutdown(ctx); err != nil {
				s.logger.Warn("Requests were cut off", "address", l.Addr(), "err", err)
				l.server.Close()
			}
		})
	}
	told.Wait()
	stopped.Wait()
	for _, conn := range s.fleet.Conns() {
		if conn.Session == nil {
			conn.Close() // one that is between two polls
		}
	}
	s.closeTunnels(ctx, func(*tunnel) bool { return true })
	s.mu.Lock()
	open := s.conns
	s.conns = nil
	s.mu.Unlock()
	for conn := range open {
		conn.CloseIdleConnections()
		conn.Close()
	}
	s.agentAPI.Close()
	s.sessions.wait()
}

// lastCall is how long requests are still taken on new connections once those are closed
// that wait for one.
const lastCall = 200 * time.Millisecond

// closeIdle closes the connections that wait for a request. One that was about to bring a
// scrape has its scraper try again, on a new connection: that must not meet a listener
// that closes, but another proxy, or this one for lastCall.
func (s *Server) closeIdle(ctx context.Context) {
	for _, l := range s.listeners() {
		l.server.SetKeepAlivesEnabled(false)
	}
	select {
	case <-time.After(lastCall):
	case <-ctx.Done():
	}
}

// tasks are goroutines that shutdown waits for. A request that it cut off may still be
// running, and wants to start one.
type tasks struct {
	mu    sync.Mutex // protects ended
	ended bool
	group sync.WaitGroup
}

// start runs f in a goroutine. It returns false, and doesn't, once wait was called.
func (t *tasks) start(f func()) bool {
	if !t.begin() {
		return false
	}
	go func() {
		defer t.group.Done()
		f()
	}()
	return true
}

// begin makes wait wait for a call of group.Done. It returns false once wait was called.
func (t *tasks) begin() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.ended {
		t.group.Add(1)
	}
	return !t.ended
}

func (t *tasks) wait() {
	t.mu.Lock()
	t.ended = true
	t.mu.Unlock()
	t.group.Wait()
}

// inFlight counts the scrapes and relays that shutdown waits for: those that began
// before it.
type inFlight struct {
	mu      sync.Mutex // protects what follows
	n       int
	drained chan struct{} // not nil: drain was called; closed when n is 0
}

// enter returns what is to be called when the scrape or relay ends.
func (f *inFlight) enter() (leave func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.drained != nil {
		return func() {}
	}
	f.n++
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.n--; f.n == 0 && f.drained != nil {
			close(f.drained)
		}
	}
}

// drain may be called once.
func (f *inFlight) drain() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.drained = make(chan struct{})
	if f.n == 0 {
		close(f.drained)
	}
	return f.drained
}

// spreadReconnects returns over which time n agents should come back. A handshake
// costs a proxy less than a millisecond of one processor; what is too much for it
// all the same, it tells to wait.
func spreadReconnects(n int) time.Duration {
	return min(max(time.Duration(n)*time.Millisecond, time.Second), time.Minute)
}

// serveMain is the front door: the first byte of the request target tells
// scrapes from the proxy's own routes, before any mux sees the request.
func (s *Server) serveMain(w http.ResponseWriter, r *http.Request) {
	if proxied := r.Method == http.MethodConnect || !protocol.IsControl(r); proxied {
		if r.Header.Get(cluster.HeaderPeer) != "" { // it would go round in circles
			s.refuse(w, r, protocol.Refusef(http.StatusMisdirectedRequest, protocol.CodeMisdirected,
				"another proxy passed this scrape on to the address for scrapers; its --cluster.advertise-url has to be that of --cluster.listen-address"))
			return
		}
		if r = s.authenticate(w, r, true); r == nil {
			return
		}
	}
	switch {
	case r.Method == http.MethodConnect:
		s.connect(w, r)
	case !protocol.IsControl(r):
		s.scrapeAbsolute(w, r)
	default:
		s.serveOwn(w, r)
	}
}

// serveAgentListener takes agents and nobody else.
func (s *Server) serveAgentListener(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.Method == http.MethodConnect || !protocol.IsControl(r):
		s.refuse(w, r, protocol.Refusef(http.StatusMethodNotAllowed, protocol.CodeMethod,
			"this address is for agents; scrape through the one of --web.listen-address"))
	case r.URL.Path == protocol.PathTunnel || r.URL.Path == s.config.RoutePrefix+protocol.PathTunnel:
		s.serveTunnel(w, r)
	case s.servesPushProx(w, r):
	default:
		s.refuse(w, r, protocol.Refusef(http.StatusNotFound, protocol.CodeNotFound,
			"this address is for agents alone; everything else is at the address of --web.listen-address"))
	}
}

// serveOwn serves the proxy's own routes.
func (s *Server) serveOwn(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == protocol.PathTunnel || r.URL.Path == s.config.RoutePrefix+protocol.PathTunnel {
		if len(s.agents) > 0 {
			s.refuse(w, r, protocol.Refusef(http.StatusNotFound, protocol.CodeNotFound,
				"agents connect to the address of --agent.listen-address, not to this one"))
			return
		}
		s.serveTunnel(w, r)
		return
	}
	if len(s.agents) == 0 && s.servesPushProx(w, r) {
		return
	}
	if !s.sameOrigin(w, r) {
		return
	}
	if r = s.authenticate(w, r, false); r == nil {
		return
	}
	if refusal := s.misdirected(r); refusal != nil {
		s.metrics.scrapes.WithLabelValues("misdirected", string(refusal.Code)).Inc()
		s.refuse(w, r, refusal)
		return
	}
	if rest, ok := s.cutScrapePath(r); ok {
		s.scrapePath(w, r, rest)
		return
	}
	if s.servePlainPush(w, r) {
		return
	}
	// Who reads none of the answer must not keep it in memory.
	conn := http.NewResponseController(w)
	conn.SetWriteDeadline(time.Now().Add(max(answerTimeout, s.timeout(r.Header))))
	if r.ContentLength != 0 {
		conn.SetReadDeadline(time.Now().Add(restTimeout)) // pushes have deadlines of their own
	}
	s.mux.ServeHTTP(w, r)
	finish(w)
}

// timeoutHeader is sent by Prometheus with each scrape, in seconds.
const timeoutHeader = "X-Prometheus-Scrape-Timeout-Seconds"

// misdirected refuses a scrape that something on the way rewrote from absolute
// to origin form: served, it would pass the proxy's own metrics off as the
// target's.
func (s *Server) misdirected(r *http.Request) *protocol.Refusal {
	if path := strings.TrimPrefix(r.URL.Path, s.config.RoutePrefix); r.Method != http.MethodGet && r.Method != http.MethodHead &&
		(strings.HasPrefix(path, "/metrics/job") || path == "/api/v1/push") {
		return nil // a push: scrapes only read
	}
	scrape := r.Header.Get(timeoutHeader) != ""
	metricsPath := r.URL.Path == "/metrics" || r.URL.Path == s.config.RoutePrefix+s.config.TelemetryPath
	for _, authority := range []string{r.Host, r.Header.Get("X-Forwarded-Host")} {
		if authority == "" {
			continue
		}
		name, port := protocol.SplitAuthority(authority)
		if s.config.ExternalURL != nil && name == protocol.NormalizeName(s.config.ExternalURL.Hostname()) {
			return nil
		}
		route, known := s.fleet.Resolve(name)
		if !known {
			continue
		}
		// An agent on the proxy's own machine has the proxy's name, and a wildcard may
		// cover it: that must not take the pages and discovery away.
		if port == localPort(r) || !route.Exact && !scrape && !metricsPath {
			continue
		}
		return protocol.Refusef(http.StatusMisdirectedRequest, protocol.CodeMisdirected,
			"the request for %q came in origin form: a balancer that speaks HTTP rewrote the scrape. Use proxy_url with the proxy's own address or a TCP balancer, or discovery with ?mode=path; if %q is this proxy itself, set --web.external-url", authority, name)
	}
	// nginx puts its own idea of the host into the request, unless it is told
	// otherwise; but it speaks HTTP/1.0 then, or sets Connection. Prometheus does
	// neither.
	if scrape && metricsPath && (!r.ProtoAtLeast(1, 1) || r.Header.Get("Connection") != "") {
		return protocol.Refusef(http.StatusMisdirectedRequest, protocol.CodeMisdirected,
			"the scrape came in origin form from a balancer that speaks HTTP, which may have rewritten the scrape of another host. Use proxy_url with the proxy's own address or a TCP balancer, or discovery with ?mode=path; to scrape the proxy itself through the balancer, have it pass the Host header on and set --web.external-url")
	}
	return nil
}

func localPort(r *http.Request) string {
	addr, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if tcp, ok := addr.(*net.TCPAddr); ok {
		return fmt.Sprint(tcp.Port)
	}
	return "80"
}
