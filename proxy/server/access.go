package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/common/route"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/access"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// who tells which identities a route is for. Operators may do everything.
type who int

const (
	nobody    who = iota
	everybody     // without credentials too
	scrapers
	pushers // for the jobs of the groups that the request names
	agents  // for the name in Culvert-Agent, or in the body of a poll
	operators
)

// telemetry stands for Config.TelemetryPath.
const telemetry = "$telemetry"

// routeAccess tells for each route who may use it. A route of the router that is not
// here is an error at the start. The last rows are the ones that the router does not
// have; serveMain and serveOwn see to them.
var routeAccess = map[string]who{
	"GET /-/healthy":  everybody,
	"GET /-/ready":    everybody,
	"POST /-/reload":  operators,
	"PUT /-/reload":   operators,
	"OPTIONS /-/quit": everybody,
	"GET /-/quit":     operators,
	"POST /-/quit":    operators,
	"PUT /-/quit":     operators,

	"GET /":       scrapers,
	"GET /status": scrapers,

	"GET /ui/*file":     scrapers,
	"HEAD /ui/*file":    scrapers,
	"GET /api/v1/page":  scrapers,
	"HEAD /api/v1/page": scrapers,

	"GET /api/v1/scrapes":        scrapers,
	"HEAD /api/v1/scrapes":       scrapers,
	"GET /api/v1/scrape_config":  scrapers,
	"HEAD /api/v1/scrape_config": scrapers,

	"GET " + telemetry:         scrapers,
	"GET /clients":             scrapers,
	"HEAD /clients":            scrapers,
	"GET /targets":             scrapers,
	"HEAD /targets":            scrapers,
	"GET /api/v1/agents":       scrapers,
	"HEAD /api/v1/agents":      scrapers,
	"GET /api/v1/agents/:name": scrapers, "HEAD /api/v1/agents/:name": scrapers,
	"DELETE /api/v1/agents/:name": operators,

	"PUT /metrics/job/:job":                   pushers,
	"POST /metrics/job/:job":                  pushers,
	"DELETE /metrics/job/:job":                pushers,
	"PUT /metrics/job/:job/*labels":           pushers,
	"POST /metrics/job/:job/*labels":          pushers,
	"DELETE /metrics/job/:job/*labels":        pushers,
	"PUT /metrics/job@base64/:job":            pushers,
	"POST /metrics/job@base64/:job":           pushers,
	"DELETE /metrics/job@base64/:job":         pushers,
	"PUT /metrics/job@base64/:job/*labels":    pushers,
	"POST /metrics/job@base64/:job/*labels":   pushers,
	"DELETE /metrics/job@base64/:job/*labels": pushers,
	"PUT /api/v1/push":                        pushers,
	"POST /api/v1/push":                       pushers,
	"GET /api/v1/metrics":                     scrapers,
	"GET /api/v1/status":                      operators,
	"GET /api/v1/":                            everybody,
	"OPTIONS /api/v1/*any":                    everybody,
	"DELETE /api/v1/groups":                   operators,
	"GET /api/v1/groups":                      scrapers,
	"HEAD /api/v1/groups":                     scrapers,
	"GET /api/v1/groups/*path":                scrapers,
	"HEAD /api/v1/groups/*path":               scrapers,
	"PUT /api/v1/admin/wipe":                  operators,

	routeAbsolute: scrapers,
	routeConnect:  scrapers,
	routePath:     scrapers,
	routeTunnel:   agents,
	routePoll:     agents,
	routePush:     agents,
}

const (
	routeAbsolute = "GET http://NAME/PATH"
	routeConnect  = "CONNECT NAME:PORT"
	routePath     = "GET /scrape/AGENT/TARGET/PATH"
	routeTunnel   = "GET /tunnel"
	routePoll     = "POST /poll"
	routePush     = "POST /push"
)

// guard is the router with routeAccess in front of each route.
type guard struct {
	*route.Router
	server  *Server
	missing *[]string // routes that have no row
}

func (s *Server) guard(r *route.Router) guard { return guard{r, s, new([]string)} }

// WithPrefix returns a router whose routes start with prefix.
func (g guard) WithPrefix(prefix string) guard {
	g.Router = g.Router.WithPrefix(prefix)
	return g
}

func (g guard) check(method, path string, h http.HandlerFunc) http.HandlerFunc {
	name := method + " " + path
	if path == g.server.config.TelemetryPath {
		name = method + " " + telemetry
	}
	for_, ok := routeAccess[name]
	if !ok {
		*g.missing = append(*g.missing, name)
	}
	g.server.guarded = append(g.server.guarded, name)
	return func(w http.ResponseWriter, r *http.Request) {
		if r, ok := g.server.permit(w, r, for_); ok {
			h(w, r)
		}
	}
}

// Get and its siblings add a route, as those of route.Router do.
func (g guard) Get(path string, h http.HandlerFunc)  { g.Router.Get(path, g.check("GET", path, h)) }
func (g guard) Head(path string, h http.HandlerFunc) { g.Router.Head(path, g.check("HEAD", path, h)) }
func (g guard) Put(path string, h http.HandlerFunc)  { g.Router.Put(path, g.check("PUT", path, h)) }
func (g guard) Post(path string, h http.HandlerFunc) { g.Router.Post(path, g.check("POST", path, h)) }
func (g guard) Del(path string, h http.HandlerFunc)  { g.Router.Del(path, g.check("DELETE", path, h)) }
func (g guard) Options(path string, h http.HandlerFunc) {
	g.Router.Options(path, g.check("OPTIONS", path, h))
}

// err tells of routes that nobody has thought about.
func (g guard) err() error {
	if len(*g.missing) > 0 {
		return fmt.Errorf("routes without a row in routeAccess: %s", strings.Join(*g.missing, ", "))
	}
	return nil
}

// setRoles takes the roles of new settings.
func (s *Server) setRoles(settings *Settings) {
	roles := settings.roles
	opens := roles.Open() && (s.access == nil || !s.access.Roles().Open())
	if s.access == nil {
		s.access = access.New(roles, s.config.TrustedProxies, s.config.Registry, s.logger)
	} else {
		s.access.SetRoles(roles)
	}
	switch {
	case opens:
		s.logger.Warn("No roles are configured: whoever reaches this proxy may scrape through it, register as an agent, push, delete and reload; add roles to --config.file")
	case !roles.Open() && roles.Entries() == 0:
		s.logger.Warn("The roles in --config.file have no entry: nobody may do anything")
	}
	select {
	case s.recheck <- struct{}{}:
	default:
	}
}

type identityKey struct{}

// identity returns for whom the proxy takes the request.
func (s *Server) identity(r *http.Request) *access.Identity {
	if id, ok := r.Context().Value(identityKey{}).(*access.Identity); ok {
		return id
	}
	if s.access.Roles().Open() {
		return access.Anybody
	}
	return new(access.Identity)
}

// authenticate finds out who sent a request. It returns the request with its identity
// in the context, or answers and returns nil.
//
// On proxied requests Authorization is the target's and Proxy-Authorization ours; it
// goes no further than here.
func (s *Server) authenticate(w http.ResponseWriter, r *http.Request, proxied bool) *http.Request {
	if s.access.Roles().Open() || !proxied && s.isOpen(r) {
		return r
	}
	field := "Authorization"
	if proxied {
		field = "Proxy-Authorization"
	}
	id, err := s.access.Identify(r, field, "")
	if err != nil {
		refusal := authRefusal(err, proxied)
		if proxied {
			mode := "proxy"
			if r.Method == http.MethodConnect {
				mode = "connect"
			}
			s.metrics.scrapes.WithLabelValues(mode, refusal.Code.Outcome()).Inc()
		}
		s.refuse(w, r, refusal)
		return nil
	}
	if proxied {
		r.Header.Del(field)
		if r, ok := s.permit(w, r.WithContext(context.WithValue(r.Context(), identityKey{}, id)), scrapers); ok {
			return r
		}
		return nil
	}
	return r.WithContext(context.WithValue(r.Context(), identityKey{}, id))
}

// isOpen reports whether a request in origin form needs no credentials, right or wrong.
func (s *Server) isOpen(r *http.Request) bool {
	if r.Method == http.MethodOptions {
		return true
	}
	path, ok := strings.CutPrefix(r.URL.Path, s.config.RoutePrefix)
	return ok && r.Method == http.MethodGet && routeAccess["GET "+path] == everybody
}

// authRefusal translates an error of access.
func authRefusal(err error, proxied bool) *protocol.Refusal {
	refusal := protocol.Refusef(http.StatusUnauthorized, protocol.CodeUnauthorized, "%v", err)
	if proxied {
		refusal.Status = http.StatusProxyAuthRequired
	}
	if failure, ok := errors.AsType[*access.Failure](err); ok && failure.RetryAfter > 0 {
		refusal.Status, refusal.Code, refusal.RetryAfter = http.StatusTooManyRequests, protocol.CodeBusy, failure.RetryAfter
	}
	return refusal
}

// challenge adds the header field that a 401 and a 407 must have.
func challenge(h http.Header, status int) {
	switch status {
	case http.StatusUnauthorized:
		h["Www-Authenticate"] = []string{`Basic realm="culvert-proxy"`, "Bearer"}
	case http.StatusProxyAuthRequired:
		h["Proxy-Authenticate"] = []string{`Basic realm="culvert-proxy"`, "Bearer"}
	}
}

// permit checks that a request is from whom its route is for. It returns the request to
// go on with, or answers and returns false.
func (s *Server) permit(w http.ResponseWriter, r *http.Request, for_ who) (*http.Request, bool) {
	if for_ == everybody || s.access.Roles().Open() {
		return r, true
	}
	id := s.identity(r)
	var role string
	var ok bool
	switch for_ {
	case scrapers:
		role, ok = "a scraper", id.Scraper()
	case pushers:
		role, ok = "a pusher", id.Pusher()
		if ok && !id.Operator() {
			r = r.WithContext(gateway.WithAllow(r.Context(), func(key gateway.Key) error {
				job, _ := key.Get("job")
				if !id.MayPush(job) {
					return fmt.Errorf("the job %q is not for %s; see jobs: there", job, id)
				}
				return nil
			}))
		}
	default:
		role, ok = "an operator", id.Operator()
	}
	if !ok {
		s.refuse(w, r, protocol.Refusef(http.StatusForbidden, protocol.CodeForbidden, "this is for %s, and the credential is of %s", role, id))
		return nil, false
	}
	return r, true
}

// limitRoute takes the agents out of a route that the scraper may not scrape. It returns
// a refusal where none is left.
func (s *Server) limitRoute(r *http.Request, route *fleet.Route) *protocol.Refusal {
	id := s.identity(r)
	if !slices.ContainsFunc(route.Agents, func(a *fleet.Agent) bool { return !id.MayScrape(a.Name) }) {
		return nil
	}
	var reached []*fleet.Agent
	for _, agent := range route.Agents {
		if id.MayScrape(agent.Name) {
			reached = append(reached, agent)
		}
	}
	if route.Agents = reached; len(reached) > 0 {
		return nil
	}
	return protocol.Refusef(http.StatusForbidden, protocol.CodeForbidden, "%q is not for %s; see agents: there", route.Name, id)
}

// visibleAgents returns the known agents that who asks may scrape.
func (s *Server) visibleAgents(r *http.Request) []fleet.Info {
	id, infos := s.identity(r), s.fleet.Agents()
	visible := infos[:0]
	for _, info := range infos {
		if s.cluster != nil { // the list is alike on every proxy; GET of one agent tells
			info.RTTSeconds, info.Streams = 0, nil
		}
		if id.MayScrape(info.Name) {
			visible = append(visible, info)
		}
	}
	return visible
}

// admitAgent finds out who opens a session, and whether it may have the name.
func (s *Server) admitAgent(r *http.Request) (*access.Identity, *protocol.Refusal) {
	name := protocol.NormalizeName(r.Header.Get(protocol.HeaderAgent))
	id, err := s.access.Identify(r, "Authorization", name)
	if err != nil {
		return nil, authRefusal(err, false)
	}
	if !id.MayBe(name) {
		return nil, protocol.Refusef(http.StatusForbidden, protocol.CodeForbidden, "the credential is of %s, which does not cover the name %q", id, name)
	}
	return id, s.checkKey(r, name, id)
}

// checkKey checks the agent's own secret: who has a name has shown it first, and a
// token of many agents is not enough to pass for one of them.
func (s *Server) checkKey(r *http.Request, name string, id *access.Identity) *protocol.Refusal {
	if s.access.Roles().Open() {
		return nil
	}
	key := r.Header.Get(protocol.HeaderKey)
	if key != "" && (len(key) < 32 || len(key) > 128) || len(r.Header.Values(protocol.HeaderKey)) > 1 {
		return protocol.Refusef(http.StatusBadRequest, protocol.CodeInvalid, "%s: use 32 to 128 characters, once", protocol.HeaderKey)
	}
	if err := s.pins.Check(name, key); err != nil {
		return protocol.Refusef(http.StatusForbidden, protocol.CodeForbidden, "agent %q: %v than the one shown; if the agent has lost its --key-file, have an operator DELETE /api/v1/agents/%s", name, err, name)
	}
	if key == "" && !id.MayBeWithoutKey(name) {
		return protocol.Refusef(http.StatusForbidden, protocol.CodeForbidden, "the credential is of %s, which takes agents with a key of their own alone; give the agent a --key-file", id)
	}
	return nil
}

// pin gives the name to the agent that has registered. Where that fails, the agent is
// not connected.
func (s *Server) pin(conn *agentConn) error {
	if conn.key == "" || s.access.Roles().Open() {
		return nil
	}
	err := s.pins.Pin(conn.Agent, conn.key)
	if err == nil {
		return nil
	}
	s.logger.Error("The agent's key could not be kept", "agent", conn.Agent, "from", conn.RemoteAddr, "err", err)
	if errors.Is(err, access.ErrNotKept) {
		return nil
	}
	s.fleet.Lost(conn.Conn, err.Error())
	if errors.Is(err, access.ErrPinned) {
		return protocol.Refusef(http.StatusForbidden, protocol.CodeForbidden, "agent %q: %v", conn.Agent, err)
	}
	return protocol.Refusef(http.StatusServiceUnavailable, protocol.CodeUnavailable, "agent %q: %v", conn.Agent, err)
}

// release lets the next agent of a name choose its key.
func (s *Server) release(name string) (released bool) {
	released, err := s.pins.Release(name)
	if err != nil {
		s.logger.Error("The agent's key could not be forgotten", "agent", name, "err", err)
	}
	return released
}

// mayRegister checks a registration against what the session's credential covers now.
func (s *Server) mayRegister(conn *agentConn, reg *protocol.Registration) error {
	roles := s.access.Roles()
	return roles.CheckRegistration(roles.Renew(conn.identity.Load()), conn.Agent, reg)
}

// relayed returns the request of an agent that relays a push, with the jobs that it may
// relay for.
func (s *Server) relayed(r *http.Request, conn *agentConn) *http.Request {
	roles := s.access.Roles()
	if roles.Open() {
		return r
	}
	id := roles.Renew(conn.identity.Load())
	return r.WithContext(gateway.WithAllow(r.Context(), func(key gateway.Key) error {
		job, _ := key.Get("job")
		if !id.MayRelay(conn.Agent, job) {
			return fmt.Errorf("the job %q is not for agent %q by %s; see push_jobs: there", job, conn.Agent, id)
		}
		return nil
	}))
}

// recheckEvery is how often sessions are checked for credentials that have expired.
const recheckEvery = time.Second

// watchAccess ends what goes on under credentials that don't count any more, after
// each reload and as they expire, until ctx ends.
func (s *Server) watchAccess(ctx context.Context) {
	seen, replaced := s.access.Roles().Stamped(), s.pins.Replaced()
	tick := time.NewTicker(recheckEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.recheck:
		case <-tick.C:
		}
		// culvert-proxy token has no other way to tell of what it changed. A file that
		// is bad is tried once.
		if stamp := s.access.Roles().Stamp(); stamp != seen {
			seen = stamp
			if stamp != s.access.Roles().Stamped() {
				_ = s.Reload() // it logs
			}
		}
		roles := s.access.Roles()
		s.mu.Lock()
		conns := slices.AppendSeq(make([]*agentConn, 0, len(s.conns)), maps.Keys(s.conns))
		s.mu.Unlock()
		// Two proxies may have pinned a name while they could not reach etcd.
		otherKeys := s.pins.Replaced()
		recheckKeys := otherKeys != replaced && !roles.Open()
		replaced = otherKeys
		for _, conn := range conns {
			if recheckKeys && conn.registered.Load() && s.pins.Check(conn.Agent, conn.key) != nil && conn.Err() == nil {
				s.logger.Warn("Agent disconnected: its name is pinned to the key that another proxy was shown first", "agent", conn.Agent, "from", conn.RemoteAddr)
				s.sessions.start(func() { conn.Close() })
				continue
			}
			before := conn.identity.Load()
			id := roles.Renew(before)
			conn.identity.Store(id)
			if !conn.unchecked.Swap(false) && id == before && !id.Expired() {
				continue
			}
			reg := new(protocol.Registration)
			if info, ok := s.fleet.Agent(conn.Agent); ok && conn.registered.Load() {
				reg = &info.Registration
			}
			if err := roles.CheckRegistration(id, conn.Agent, reg); err != nil && conn.Err() == nil {
				s.logger.Info("Agent disconnected: its credential does not cover it any more", "agent", conn.Agent, "from", conn.RemoteAddr, "reason", err)
				s.sessions.start(func() { conn.Close() }) // it may wait for a stuck write
			}
		}
		for _, conn := range s.fleet.Conns() {
			if client, ok := conn.Link.(*pushProxClient); ok {
				client.recheck(roles, recheckKeys)
			}
		}
		s.mu.Lock()
		for t := range s.tunnels {
			if t.identity == otherProxy { // which looks after it
				continue
			}
			if t.identity = roles.Renew(t.identity); !t.identity.MayScrape(t.agent) {
				t.stream.Close()
				t.scraper.Close()
			}
		}
		s.mu.Unlock()
	}
}
