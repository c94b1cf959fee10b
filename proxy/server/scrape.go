package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/cluster"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// Outcomes of a scrape beside the codes of refusals.
const (
	outcomeOK          = "ok"
	outcomeTargetError = "target-error" // the target itself answered 400 or above
	outcomeCancelled   = "cancelled"    // the scraper went away
	outcomeBroken      = "broken"       // the response broke off half way
)

// scrape is one scrape on its way through.
type scrape struct {
	server *Server
	mode   string // "proxy", "path", "connect"
	// target is the request target in absolute form, as the agent gets it.
	target string
	// host, in its normal form, and port are the target's.
	host, port string

	route   fleet.Route
	timeout time.Duration
	start   time.Time

	agent   *fleet.Agent // that serves it, once it is known
	conn    *fleet.Conn  // to it, nil: another proxy holds it
	place   chan struct{}
	ways    *ways
	outcome string
	status  int    // of the answer's head
	reason  string // of a refusal
	bytes   int64  // of the answer's body, that were passed on
}

// scrapeAbsolute serves GET http://NAME:PORT/PATH.
func (s *Server) scrapeAbsolute(w http.ResponseWriter, r *http.Request) {
	if r.URL.Host == "" || (r.URL.Scheme != "http" && r.URL.Scheme != "https") {
		s.refuse(w, r, protocol.Refusef(http.StatusBadRequest, protocol.CodeBadRequest,
			"%q is not an http or https URL", r.RequestURI))
		return
	}
	s.forward(w, r, &scrape{mode: "proxy", target: r.RequestURI}, r.URL.Host)
}

// forward finds the agent that answers for authority and passes the scrape on,
// without buffering it.
func (s *Server) forward(w http.ResponseWriter, r *http.Request, sc *scrape, authority string) {
	sc.server, sc.start, sc.outcome = s, time.Now(), outcomeOK
	finished := false
	defer func() {
		if !finished && (sc.outcome == outcomeOK || sc.outcome == outcomeTargetError) {
			sc.outcome = outcomeBroken
			if r.Context().Err() != nil {
				sc.outcome = outcomeCancelled
			}
			if conn, ok := r.Context().Value(rawConnKey{}).(net.Conn); ok && !r.ProtoAtLeast(1, 1) {
				// HTTP/1.0 has no end mark but the end of the connection.
				protocol.Reset(conn)
			}
		}
		took := time.Since(sc.start)
		s.metrics.scrapes.WithLabelValues(sc.mode, sc.outcome).Inc()
		s.metrics.duration.WithLabelValues(sc.mode).Observe(took.Seconds())
		sc.log(took)
		if sc.place != nil {
			<-sc.place
		}
	}()

	sc.host, sc.port = protocol.SplitAuthority(authority)
	var refusal *protocol.Refusal
	if sc.route, sc.ways, refusal = s.routeOf(r, sc.host); refusal != nil {
		sc.refuse(w, r, refusal)
		finished = true
		return
	}
	sc.timeout = s.timeoutOf(r)
	ctx, cancel := context.WithTimeout(r.Context(), sc.timeout)
	defer cancel()
	proxy := httputil.ReverseProxy{
		Transport:  sc,
		BufferPool: protocol.Buffers,
		ErrorLog:   errorLog(s.logger),
		Rewrite: func(pr *httputil.ProxyRequest) {
			// The opaque URL goes out as it came in, in absolute form.
			pr.Out.URL = &url.URL{Scheme: "http", Host: "agent", Opaque: sc.target}
			pr.Out.Host = authority
			cluster.ClearHeader(pr.Out.Header)
			if sc.mode == "path" {
				// Both are between the scraper and this proxy.
				pr.Out.Header.Del("Authorization")
				pr.Out.Header.Del("Cookie")
			}
		},
		ModifyResponse: sc.check,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			if r.Context().Err() != nil {
				sc.outcome = outcomeCancelled
				panic(http.ErrAbortHandler)
			}
			if _, ok := errors.AsType[*notHeld](err); ok {
				w.Header().Set(cluster.HeaderHeld, "no")
			}
			sc.refuse(w, r, s.explain(ctx, err, sc.route, sc.agent, sc.conn, sc.timeout))
		},
	}
	defer s.running.enter()()
	// A scraper that sends no body, or reads none, must not hold the agent's place.
	scraper := http.NewResponseController(w)
	if r.ContentLength != 0 {
		scraper.SetReadDeadline(sc.start.Add(sc.timeout))
	}
	scraper.SetWriteDeadline(sc.start.Add(sc.timeout + time.Second))
	defer finish(w)
	r.Header.Del("Upgrade") // ReverseProxy would pass an upgrade on
	proxy.ServeHTTP(finalOnly{w}, r.WithContext(ctx))
	finished = true
}

// log notes the scrape in the log of its agent. One that no agent was chosen for, of
// several, or that the scraper may not make, is nobody's.
func (sc *scrape) log(took time.Duration) {
	agent := sc.agent
	if agent == nil {
		if len(sc.route.Agents) != 1 {
			return
		}
		agent = sc.route.Agents[0]
	}
	entry := fleet.Scrape{
		Host: sc.host, Port: sc.port, URL: sc.target, Mode: sc.mode, At: sc.start, Took: took,
		Status: sc.status, Outcome: sc.outcome, Reason: sc.reason, Bytes: sc.bytes,
	}
	if sc.mode == "peer" {
		entry.Mode = "proxy"
	}
	switch sc.outcome {
	case outcomeOK:
		entry.Answered = true
	case outcomeCancelled:
	case outcomeTargetError:
		entry.Failed, entry.Reason = true, fmt.Sprintf("the target answered %d %s", sc.status, http.StatusText(sc.status))
	case outcomeBroken:
		entry.Failed, entry.Reason = true, fmt.Sprintf("the response broke off after %d bytes", sc.bytes)
	default:
		entry.Failed = true
	}
	sc.server.fleet.LogScrape(agent, entry)
}

// RoundTrip passes the request to a connected agent, or to the proxy that holds it. A
// session that ends before the response's head came gets one more try, where that can do
// no harm; a proxy that gave no answer is not asked again.
func (sc *scrape) RoundTrip(req *http.Request) (*http.Response, error) {
	harmless := (req.Method == http.MethodGet || req.Method == http.MethodHead) && req.Body == nil
	for try := 1; ; try++ {
		way, err := sc.acquire(req.Context())
		if err != nil {
			return nil, err
		}
		conn := way.Conn
		if conn == nil {
			resp, again, err := sc.server.passOn(req, sc.route, way, sc.ways, time.Until(sc.start.Add(sc.timeout)))
			if again && harmless && req.Context().Err() == nil {
				continue
			}
			return resp, err
		}
		resp, err := conn.RoundTrip(req)
		if err == nil {
			// A copy gets no trailers: net/http adds them to the original.
			final := *resp
			final.Trailer = nil
			return &final, nil
		}
		// A session that ends wakes its streams before it says so itself.
		select {
		case <-conn.Done():
		case <-req.Context().Done():
		case <-time.After(100 * time.Millisecond):
		}
		if try >= 2 || !harmless || conn.Err() == nil || req.Context().Err() != nil {
			return nil, err
		}
	}
}

// acquire returns the way to a connected agent of the route, and takes one of the
// agent's places where it is connected here. It returns a *protocol.Refusal.
func (sc *scrape) acquire(ctx context.Context) (fleet.Way, error) {
	if sc.place != nil { // of the first try
		<-sc.place
	}
	sc.place, sc.agent, sc.conn = nil, nil, nil
	if len(sc.route.Agents) > 1 && !(sc.server.cluster != nil && sc.server.draining.Load()) { // any that has a place will do
		for _, a := range rand.Perm(len(sc.route.Agents)) {
			agent := sc.route.Agents[a]
			conn := sc.server.fleet.ConnOf(agent)
			if conn == nil {
				continue
			}
			select {
			case agent.Scrapes <- struct{}{}:
				sc.place, sc.agent, sc.conn = agent.Scrapes, agent, conn
				return fleet.Way{Agent: agent, Conn: conn}, nil
			default:
			}
		}
	}
	way, err := sc.server.await(ctx, sc.route, sc.ways)
	if err != nil {
		return way, err
	}
	agent := way.Agent
	if sc.agent, sc.conn = agent, way.Conn; way.Conn == nil {
		return way, nil // the places are counted where the session is
	}
	if err := sc.server.takePlace(ctx, agent.Scrapes); err != nil {
		return way, protocol.Refusef(http.StatusTooManyRequests, protocol.CodeAgentBusy,
			"agent %q has %d scrapes running (--scrape.max-concurrent), so %q had to wait too long; are its targets slow, or its scrapers too many?", agent.Name, cap(agent.Scrapes), sc.route.Name)
	}
	sc.place = agent.Scrapes
	return way, nil
}

// ways are the ways to an agent that a scrape may take.
type ways struct {
	here  bool             // of this proxy alone: another one has passed the scrape on
	tried map[string]int64 // see fleet.Reach
	last  error            // why the last of these is of no use
}

// await returns the way to a connected agent of the route; it waits ReconnectWait for
// one. It returns a *protocol.Refusal.
func (s *Server) await(ctx context.Context, route fleet.Route, ways *ways) (way fleet.Way, err error) {
	waitCtx, cancel := context.WithTimeout(ctx, s.config.ReconnectWait)
	defer cancel()
	if ways.here {
		if conn := s.fleet.ConnOf(route.Agents[0]); conn != nil {
			return fleet.Way{Agent: route.Agents[0], Conn: conn}, nil
		}
		return way, &notHeld{s.offline(route)}
	}
	way, ok := s.fleet.Reach(waitCtx, route, ways.tried)
	switch {
	case ok:
		return way, nil
	case ways.last != nil:
		return way, ways.last
	}
	return way, s.offline(route)
}

var errNoPlace = errors.New("no place became free")

// takePlace puts a token into places; it waits ReconnectWait for a free one.
func (s *Server) takePlace(ctx context.Context, places chan struct{}) error {
	select {
	case places <- struct{}{}:
		return nil
	default:
	}
	timer := time.NewTimer(s.config.ReconnectWait)
	defer timer.Stop()
	select {
	case places <- struct{}{}:
		return nil
	case <-timer.C:
	case <-ctx.Done():
	}
	return errNoPlace
}

func unknownAgent(name string) *protocol.Refusal {
	return protocol.Refusef(http.StatusNotFound, protocol.CodeUnknownAgent,
		"no agent ever registered %q; compare the target in Prometheus with --fqdn, --target and --host of the agent, and see /clients", name)
}

// offline tells since when the route's agents are away.
func (s *Server) offline(route fleet.Route) *protocol.Refusal {
	var lost []string
	program := "culvert-client"
	for _, a := range route.Agents {
		info, ok := s.fleet.Agent(a.Name)
		if info.Kind == fleet.KindPushProx {
			program = "the PushProx client"
		}
		switch {
		case !ok:
		case info.Connected:
			lost = append(lost, fmt.Sprintf("agent %q has just come back", a.Name))
		default:
			lost = append(lost, fmt.Sprintf("agent %q lost %s ago (%s)", a.Name, since(info.Since), info.LostReason))
		}
	}
	if len(lost) == 0 {
		return unknownAgent(route.Name)
	}
	return protocol.Refusef(http.StatusServiceUnavailable, protocol.CodeAgentOffline,
		"%s, so %q can't be scraped; check %s there", strings.Join(lost, ", "), route.Name, program)
}

// since says a time span in the unit that people would choose.
func since(t time.Time) string {
	d := time.Since(t)
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}

// check looks at the response's head. What it returns goes to the ErrorHandler.
func (sc *scrape) check(resp *http.Response) error {
	if resp.StatusCode < 200 && resp.StatusCode != http.StatusSwitchingProtocols || resp.StatusCode > 599 {
		return protocol.Refusef(http.StatusBadGateway, protocol.CodeBadResponse, "agent %q sent the status %d, which is none", sc.agent.Name, resp.StatusCode)
	}
	if code := resp.Header.Get(protocol.HeaderError); code != "" {
		return agentRefusal(resp)
	}
	bodyless := resp.Request.Method == http.MethodHead || resp.StatusCode == http.StatusNoContent || resp.StatusCode == http.StatusNotModified
	if resp.ContentLength < 0 && len(resp.TransferEncoding) == 0 && !bodyless {
		// The end of the session would read as the end of this body.
		return protocol.Refusef(http.StatusBadGateway, protocol.CodeBadResponse,
			"agent %q sent a response without a length and not chunked; is it a culvert-client?", sc.agent.Name)
	}
	if resp.StatusCode == http.StatusSwitchingProtocols {
		return protocol.Refusef(http.StatusBadGateway, protocol.CodeBadResponse, "agent %q switched protocols without being asked", sc.agent.Name)
	}
	if sc.status = resp.StatusCode; sc.status >= 400 {
		sc.outcome = outcomeTargetError
	}
	if sc.mode == "path" {
		sandbox(resp.Header)
	}
	resp.Body = &countedBody{resp.Body, sc, resp.ContentLength > 0}
	return nil
}

// agentRefusal reads a refusal that the agent sent.
func agentRefusal(resp *http.Response) *protocol.Refusal {
	if resp.StatusCode < 400 || resp.StatusCode > 599 {
		return protocol.Refusef(http.StatusBadGateway, protocol.CodeBadResponse, "the agent refused with the status %d, which is no refusal", resp.StatusCode)
	}
	return &protocol.Refusal{
		Status:  resp.StatusCode,
		Code:    protocol.Code(clip(resp.Header.Get(protocol.HeaderError), 40)),
		Message: clip(resp.Header.Get(protocol.HeaderMessage), 1000),
	}
}

// explain translates an error on the way to the agent. conn is the session that
// was used, nil where none was.
func (s *Server) explain(ctx context.Context, err error, route fleet.Route, agent *fleet.Agent, conn *fleet.Conn, timeout time.Duration) *protocol.Refusal {
	if refusal, ok := protocol.AsRefusal(err); ok {
		return refusal
	}
	switch {
	case ctx.Err() != nil:
		return s.timedOut(route, agent, timeout)
	case errors.Is(err, protocol.ErrTooManyStreams):
		return protocol.Refusef(http.StatusTooManyRequests, protocol.CodeAgentBusy, "the agent for %q: %v", route.Name, err)
	case conn != nil && conn.Err() == nil:
		return protocol.Refusef(http.StatusBadGateway, protocol.CodeBadResponse,
			"the response of %q broke off before its head was through (%v); look at the target", route.Name, err)
	}
	return protocol.Refusef(http.StatusBadGateway, protocol.CodeSessionLost,
		"the session to the agent for %q broke before it answered: %v", route.Name, err)
}

// finalOnly drops interim responses: a scraper has no use for them, and in path
// mode they would carry a target's header fields.
type finalOnly struct{ http.ResponseWriter }

func (w finalOnly) WriteHeader(status int) {
	if status < 100 || status > 199 {
		w.ResponseWriter.WriteHeader(status)
	}
}

// Unwrap lets http.ResponseController find the rest.
func (w finalOnly) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// timedOut is the refusal for a scrape whose time is over. It tells a slow target
// from an agent that is silent altogether.
func (s *Server) timedOut(route fleet.Route, agent *fleet.Agent, timeout time.Duration) *protocol.Refusal {
	what := fmt.Sprintf("%q", route.Name)
	if agent != nil && agent.Name != route.Name {
		what += fmt.Sprintf(" (through agent %q)", agent.Name)
	}
	return protocol.Refusef(http.StatusGatewayTimeout, protocol.CodeTimeout,
		"%s did not answer within %s; raise scrape_timeout if the target is slow, or look at the target", what, timeout.Round(time.Millisecond))
}

func (sc *scrape) refuse(w http.ResponseWriter, r *http.Request, refusal *protocol.Refusal) {
	sc.outcome, sc.status, sc.reason = refusal.Code.Outcome(), refusal.Status, refusal.Message
	sc.server.refuse(w, r, refusal)
}

// timeout returns how long a scrape may take: what the scraper allows, less the
// offset, within the limits. A value that is no positive number counts as absent.
func (s *Server) timeout(h http.Header) time.Duration {
	seconds, err := strconv.ParseFloat(strings.TrimSpace(h.Get(timeoutHeader)), 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) || !(seconds > 0) {
		return s.config.DefaultTimeout
	}
	timeout := s.config.MaxTimeout
	if seconds < timeout.Seconds() && !math.IsInf(seconds, 1) {
		timeout = time.Duration(seconds * float64(time.Second))
	}
	// A very short timeout keeps half of itself.
	return max(timeout-s.config.TimeoutOffset, timeout/2)
}

// largeScrape is the length from which on a body goes better on all processors: two
// goroutines, one that reads from the tunnel and one that writes to the scraper, have enough
// to do at the same time.
const largeScrape = 1 << 20

// countedBody counts the bytes of response bodies. It fills the buffer where the
// length of the body is known: each write to the scraper is a system call.
type countedBody struct {
	io.ReadCloser
	scrape *scrape
	fill   bool
}

func (b *countedBody) Read(p []byte) (n int, err error) {
	for {
		var got int
		got, err = b.ReadCloser.Read(p[n:])
		n += got
		if err != nil || n == len(p) || !b.fill {
			break
		}
	}
	before := b.scrape.bytes
	b.scrape.bytes += int64(n)
	if before < largeScrape && b.scrape.bytes >= largeScrape {
		b.scrape.server.config.UseAllProcessors()
	}
	b.scrape.server.metrics.bytes.Add(float64(n))
	return n, err
}
