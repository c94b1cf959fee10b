package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/access"
	"github.com/culvert-io/culvert/proxy/cluster"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// Cluster says how this proxy is one of several.
type Cluster struct {
	cluster.Config
	// ListenAddress takes the scrapes that other proxies pass on, and nothing else.
	// ":8081" by default.
	ListenAddress string
	// WebConfigFile is the web configuration of ListenAddress.
	WebConfigFile string
	// AdvertiseURL is how other proxies reach ListenAddress. By default it is made of
	// the address, or the host's name, and the port.
	AdvertiseURL string
}

// joinCluster has the fleet share what it knows, where there is a cluster.
func (s *Server) joinCluster(config *fleet.Config) (err error) {
	if len(s.config.Cluster.Endpoints) == 0 {
		return nil
	}
	setDefault(&s.config.Cluster.ListenAddress, ":8081")
	if s.cluster, err = cluster.New(s.config.Cluster.Config, s.logger, s.config.Registry); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	config.Shared = s.cluster.Shared(s.id)
	s.config.Registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "culvert_proxy_cluster_held_agents",
		Help: "Agents with a session to this proxy; culvert_proxy_agents counts those of all proxies.",
	}, func() float64 { return float64(len(s.fleet.Conns())) }))
	return nil
}

// advertise returns the URL at which other proxies reach this one.
func (s *Server) advertise() (string, error) {
	const hint = "say with --cluster.advertise-url how other proxies reach --cluster.listen-address, as in http://10.0.0.5:8081"
	if given := s.config.Cluster.AdvertiseURL; given != "" {
		u, err := url.Parse(given)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.User != nil {
			return "", fmt.Errorf("the URL %q is not for other proxies: it has a scheme, a host and a port alone; %s", given, hint)
		}
		return u.Scheme + "://" + u.Host, nil
	}
	l := s.peers[0]
	scheme := "http"
	if l.tls {
		scheme = "https"
	}
	address := l.Addr().(*net.TCPAddr)
	host := address.IP.String()
	if address.IP.IsUnspecified() {
		name, err := os.Hostname()
		if err != nil || name == "" || name == "localhost" {
			return "", fmt.Errorf("the host has no name (%q, %v); %s", name, err, hint)
		}
		host = name
	}
	return scheme + "://" + net.JoinHostPort(host, strconv.Itoa(address.Port)), nil
}

// otherProxy is who passes scrapes on: that proxy has checked who may scrape what.
var otherProxy = func() *access.Identity { id := *access.Anybody; return &id }()

// passedOn reports whether a request came from another proxy.
func passedOn(r *http.Request) bool {
	id, _ := r.Context().Value(identityKey{}).(*access.Identity)
	return id == otherProxy
}

type peerKey struct{}

// peerScrape is what another proxy says of a scrape that it passes on.
type peerScrape struct {
	agent   string
	timeout time.Duration
}

// servePeer takes what other proxies pass on. It never passes anything on itself.
func (s *Server) servePeer(w http.ResponseWriter, r *http.Request) {
	w.Header().Set(cluster.HeaderPeer, s.id)
	if !s.cluster.Authorized(r) {
		s.refuse(w, r, protocol.Refusef(http.StatusProxyAuthRequired, protocol.CodeUnauthorized,
			"this address is for proxies of the same etcd; scrape through the one of --web.listen-address"))
		return
	}
	seconds, err := strconv.ParseFloat(r.Header.Get(cluster.HeaderTimeout), 64)
	if err != nil || !(seconds >= 0) || seconds > 24*60*60 {
		s.refuse(w, r, protocol.Refusef(http.StatusBadRequest, protocol.CodeBadRequest, "%s: %q is no time in seconds", cluster.HeaderTimeout, r.Header.Get(cluster.HeaderTimeout)))
		return
	}
	passed := peerScrape{agent: r.Header.Get(cluster.HeaderAgent), timeout: time.Duration(seconds * float64(time.Second))}
	cluster.ClearHeader(r.Header)
	ctx := context.WithValue(r.Context(), identityKey{}, otherProxy)
	r = r.WithContext(context.WithValue(ctx, peerKey{}, passed))
	switch {
	case r.Method == http.MethodConnect:
		s.connect(w, r)
	case !protocol.IsControl(r):
		if r.URL.Host == "" {
			s.refuse(w, r, protocol.Refusef(http.StatusBadRequest, protocol.CodeBadRequest, "%q is not an http or https URL", r.RequestURI))
			return
		}
		s.forward(w, r, &scrape{mode: "peer", target: r.RequestURI}, r.URL.Host)
	case r.Method == http.MethodPost && r.URL.Path == cluster.PathAlive:
		s.cluster.ServeAlive(w, r, s.fleet)
	case r.URL.Path == cluster.PathPush && !s.config.DisablePushProx:
		s.servePushed(w, r)
	default:
		s.refuse(w, r, protocol.Refusef(http.StatusNotFound, protocol.CodeNotFound, "this address is for scrapes that other proxies pass on"))
	}
}

// routeOf finds who answers for a name, and which ways the scrape may take. It returns
// a refusal where nobody does, or the scraper may not.
func (s *Server) routeOf(r *http.Request, name string) (fleet.Route, *ways, *protocol.Refusal) {
	if passed, ok := r.Context().Value(peerKey{}).(peerScrape); ok {
		// The other proxy has chosen among those that answer for the name.
		route, known := s.fleet.Resolve(passed.agent)
		if !known || route.Agents[0].Name != passed.agent {
			return route, nil, unknownAgent(name)
		}
		route.Name = name
		return route, &ways{here: true}, nil
	}
	route, known := s.fleet.Resolve(name)
	if !known {
		return route, nil, unknownAgent(name)
	}
	refusal := s.limitRoute(r, &route)
	return route, &ways{tried: map[string]int64{}}, refusal
}

// timeoutOf returns how long a scrape may take.
func (s *Server) timeoutOf(r *http.Request) time.Duration {
	if passed, ok := r.Context().Value(peerKey{}).(peerScrape); ok {
		return passed.timeout
	}
	return s.timeout(r.Header)
}

// notHeld is the refusal of a scrape that was passed on to this proxy, which has no
// session of the agent: the other one may know a better way by now.
type notHeld struct{ refusal *protocol.Refusal }

func (e *notHeld) Error() string { return e.refusal.Error() }
func (e *notHeld) Unwrap() error { return e.refusal }

// peerGrace is how much longer a scrape may take at the proxy that holds the agent: the
// one that the scraper asked tells it that the time is over.
const peerGrace = time.Second

// passOn passes a scrape on to the proxy that holds the agent. It reports whether
// another way may be tried, and notes in ways that this one is of no use.
func (s *Server) passOn(req *http.Request, route fleet.Route, way fleet.Way, ways *ways, left time.Duration) (resp *http.Response, again bool, err error) {
	resp, err = s.cluster.RoundTrip(req, way.Held.Proxy, way.Agent.Name, left+peerGrace, s.better(route, way, ways))
	refusal := s.judge(req.Context(), way, ways, resp, err)
	switch {
	case errors.Is(refusal, errGone):
		return nil, false, req.Context().Err()
	case refusal != nil:
		if resp != nil {
			io.Copy(io.Discard, io.LimitReader(resp.Body, 4<<10)) // keeps the connection
			resp.Body.Close()
		}
		return nil, true, refusal
	}
	cluster.ClearHeader(resp.Header)
	resp.Trailer = nil
	return resp, false, nil
}

// better returns what tells whether there is a better way than one through a proxy that
// has fallen silent.
func (s *Server) better(route fleet.Route, way fleet.Way, ways *ways) func() bool {
	tried := maps.Clone(ways.tried) // it may be asked while the next way is taken
	return func() bool { return s.fleet.Better(route, tried, way.Held.Proxy) }
}

var errGone = errors.New("nobody waits for the answer")

// judge returns why a way through another proxy is of no use, nil where the answer is
// for the scraper. It counts what came out.
func (s *Server) judge(ctx context.Context, way fleet.Way, ways *ways, resp *http.Response, err error) error {
	outcome := cluster.OutcomeUnreachable
	switch {
	case ctx.Err() != nil:
		s.cluster.Forwarded(cluster.OutcomeCancelled)
		return errGone
	case err != nil:
	case resp.Header.Get(cluster.HeaderPeer) != way.Held.Proxy:
		peer, _ := s.cluster.Peer(way.Held.Proxy)
		err = fmt.Errorf("%s is not that proxy: something else answered %s; see its --cluster.advertise-url", peer.URL, resp.Status)
	case resp.StatusCode == http.StatusProxyAuthRequired && resp.Header.Get(protocol.HeaderError) == string(protocol.CodeUnauthorized):
		err = errors.New("it does not take this proxy for one of its cluster")
	case resp.Header.Get(cluster.HeaderHeld) == "no":
		outcome = cluster.OutcomeNotHeld
	case resp.Header.Get(protocol.HeaderError) != "":
		s.cluster.Forwarded(cluster.OutcomeRefused)
		return nil
	default:
		s.cluster.Forwarded(cluster.OutcomeOK)
		return nil
	}
	s.cluster.Forwarded(outcome)
	ways.tried[way.Held.Proxy+"/"+way.Agent.Name] = way.Held.Revision
	if outcome == cluster.OutcomeNotHeld {
		ways.last = agentRefusal(resp)
	} else {
		s.logger.Debug("Another proxy can't be reached", "proxy", way.Held.Proxy, "agent", way.Agent.Name, "err", err)
		ways.last = protocol.Refusef(http.StatusBadGateway, protocol.CodePeerUnreachable,
			"agent %q is connected to another proxy, and %v", way.Agent.Name, err)
	}
	return ways.last
}

// passOnConnect is passOn for CONNECT. Where there is a connection through the other
// proxy, it returns that and the reader that may hold what the target has said.
func (s *Server) passOnConnect(ctx context.Context, authority string, route fleet.Route, way fleet.Way, ways *ways, left time.Duration) (farEnd, *bufio.Reader, bool, *protocol.Refusal) {
	conn, ahead, resp, err := s.cluster.Connect(ctx, way.Held.Proxy, way.Agent.Name, authority, left+peerGrace, s.better(route, way, ways))
	refused := s.judge(ctx, way, ways, resp, err)
	switch {
	case refused != nil:
		if conn != nil {
			conn.Close()
		}
		refusal, _ := protocol.AsRefusal(refused)
		return nil, nil, refusal != nil, refusal
	case conn == nil && resp.Header.Get(protocol.HeaderError) != "":
		return nil, nil, false, agentRefusal(resp)
	case conn == nil:
		return nil, nil, false, protocol.Refusef(http.StatusBadGateway, protocol.CodeBadResponse, "the proxy that holds agent %q answered CONNECT with %s", way.Agent.Name, resp.Status)
	}
	far := &peerConn{Conn: conn}
	far.touch()
	return far, ahead, false, nil
}

// peerConn is a connection to another proxy that knows when something went through.
type peerConn struct {
	net.Conn
	last atomic.Int64 // Unix nanoseconds
}

func (c *peerConn) touch() { c.last.Store(time.Now().UnixNano()) }

func (c *peerConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.touch()
	return n, err
}

func (c *peerConn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.touch()
	return n, err
}

// CloseWrite ends one direction.
func (c *peerConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Conn.Close()
}

// NetConn returns what it wraps, for protocol.Reset.
func (c *peerConn) NetConn() net.Conn { return c.Conn }

// Idle returns for how long nothing went through.
func (c *peerConn) Idle() time.Duration { return time.Since(time.Unix(0, c.last.Load())) }

// awaitMoved waits until each agent has a session to another proxy, for at most so long.
func (s *Server) awaitMoved(ctx context.Context, atMost time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, atMost)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for atMost > 0 {
		staying := s.fleet.Staying()
		if staying == 0 {
			return
		}
		select {
		case <-ctx.Done():
			s.logger.Warn("Agents have found no other proxy", "agents", staying, "within", atMost)
			return
		case <-tick.C:
		}
	}
}
