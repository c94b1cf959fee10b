package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/access"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// Clients of PushProx reach the proxy by two requests of theirs. A client POSTs its name
// to /poll, and is answered when there is a scrape for it: the answer's body is the
// request. It polls again at once, so that several scrapes may run, and POSTs the
// target's response to /push, as the body of that request; the header Id tells to which
// scrape it belongs. It looks at the status of no answer: what it can't read as a
// scrape makes it count an error and pause for about a second.

const (
	pathPoll = "/poll"
	pathPush = "/push"
)

const (
	// pollGrace is how long a client that was given a scrape may take to poll again. It
	// does so at once; where that fails it pauses for at most 1.5 s, and then 2.25 s.
	pollGrace = 5 * time.Second
	// pollSoon is how long the next poll is said to be about to come, where another
	// process claims the name.
	pollSoon = time.Second
	// retakeAfter is when a scrape may be given again whose connection was closed.
	retakeAfter = time.Second
	// maxPollBytes bounds the body of a poll, which is a name.
	maxPollBytes = 1 << 10
	// maxScrapeBody bounds the body of a scrape, which scrapes don't have: it is kept in
	// memory until the client polls, and the client reads larger ones unreliably.
	maxScrapeBody = 64 << 10
	// pollWriteTimeout is how long the answer to a poll may take to be sent.
	pollWriteTimeout = 10 * time.Second
	// twinPolls is how many polls of one client that end another within twinTime are more
	// than broken connections explain.
	twinPolls, twinTime = 3, time.Minute
)

// Results of polls and pushes beside the codes of refusals.
const (
	pollScrape   = "scrape"   // answered by a scrape
	pollReplaced = "replaced" // another poll of the client came
	pollClosed   = "closed"   // the client closed the connection, or it broke
)

// pushProx is what the proxy knows of scrapes that clients of PushProx have.
type pushProx struct {
	ending   chan struct{} // closed when no poll may wait any more
	given    sync.Map      // by net.Conn the *pushProxScrape that its last poll got: see connState
	warnings rate.Sometimes

	mu      sync.Mutex // protects scrapes
	scrapes map[string]*pushProxScrape
}

func newPushProx() *pushProx {
	return &pushProx{ending: make(chan struct{}), warnings: rate.Sometimes{First: 5, Interval: time.Minute}, scrapes: map[string]*pushProxScrape{}}
}

// pushProxClient is the link to a client. It is connected while one of its polls waits,
// and for pollGrace after one was answered.
type pushProxClient struct {
	server *Server
	name   string
	conn   *fleet.Conn
	done   chan struct{} // closed when it is connected no more
	// aborted is closed too where the scrapes that it has must not be answered by it any
	// more. Else they go on: pushes come on connections of their own.
	aborted chan struct{}

	mu       sync.Mutex // protects what follows; err is set before done is closed
	err      error
	spelling string // of the name, as the client insists on it
	identity *access.Identity
	poll     *poll             // that waits, nil: none does
	queue    []*pushProxScrape // that wait for a poll
	given    time.Time         // when it was given the last scrape
	expire   *time.Timer       // calls expired
	twins    []time.Time       // when a poll ended another one
}

// poll is a poll that waits.
type poll struct {
	work  chan *pushProxScrape // has room for one
	ended chan struct{}        // closed: it is to be answered by refusal
	why   *protocol.Refusal
}

// pushProxScrape is a scrape that a client has, or will get.
type pushProxScrape struct {
	id     string
	client *pushProxClient
	req    *http.Request
	target *url.URL
	body   []byte
	answer chan *http.Response // has room for one
	lost   chan struct{}       // closed by losing: no poll got it, and none will
	losing sync.Once
}

// servesPushProx answers polls and pushes, and returns false for other requests.
func (s *Server) servesPushProx(w http.ResponseWriter, r *http.Request) bool {
	if s.config.DisablePushProx {
		return false
	}
	path := r.URL.Path
	if path != pathPoll && path != pathPush {
		path = strings.TrimPrefix(path, s.config.RoutePrefix)
	}
	switch path {
	case pathPoll:
		s.metrics.pushProx.WithLabelValues("poll", s.servePoll(w, r)).Inc()
	case pathPush:
		s.metrics.pushProx.WithLabelValues("push", s.servePushed(w, r)).Inc()
	default:
		return false
	}
	return true
}

// refusePushProx answers a poll or a push. The answer has no body, since the client
// leaves it unread, and the connection with it.
func (s *Server) refusePushProx(w http.ResponseWriter, r *http.Request, refusal *protocol.Refusal) string {
	s.logger.Debug("Refused", "method", r.Method, "target", r.RequestURI, "from", r.RemoteAddr, "status", refusal.Status, "reason", refusal.Reason())
	challenge(w.Header(), refusal.Status)
	refusal.SetHeader(w.Header())
	w.Header()["Content-Type"] = nil // of which net/http makes none
	finish(w)
	w.WriteHeader(refusal.Status)
	return string(refusal.Code)
}

// servePoll answers a poll when there is a scrape, and returns what became of it.
func (s *Server) servePoll(w http.ResponseWriter, r *http.Request) string {
	control := http.NewResponseController(w)
	control.SetReadDeadline(time.Now().Add(headTimeout))
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxPollBytes))
	spelling := strings.TrimSpace(string(body))
	name := protocol.NormalizeName(spelling)
	if err == nil {
		err = protocol.CheckName(name)
	}
	if err != nil {
		return s.refusePushProx(w, r, protocol.Refusef(http.StatusBadRequest, protocol.CodeInvalid, "the body of a poll is the name of the client: %v; choose another --fqdn", err))
	}
	identity, refusal := s.admitPushProx(r, name)
	if refusal != nil {
		return s.refusePushProx(w, r, refusal)
	}
	select {
	case <-s.pushProx.ending: // not while it drains: scrapes that run may need further polls
		return s.refusePushProx(w, r, goingAway())
	default:
	}
	// It may wait for hours. That the connection ends, tells the request's context.
	control.SetReadDeadline(time.Time{})
	control.SetWriteDeadline(time.Time{})
	p := &poll{work: make(chan *pushProxScrape, 1), ended: make(chan struct{})}
	client, refusal := s.pollOf(r, name, spelling, identity, p)
	if refusal != nil {
		return s.refusePushProx(w, r, refusal)
	}
	var scrape *pushProxScrape
	select {
	case scrape = <-p.work:
	case <-p.ended:
		result := s.refusePushProx(w, r, p.why)
		if p.why.Status == http.StatusRequestTimeout {
			result = pollReplaced
		}
		return result
	case <-s.pushProx.ending:
		client.end(errors.New("the proxy stopped"), nil, false)
		return s.refusePushProx(w, r, goingAway())
	case <-r.Context().Done():
		client.closed(p)
		return pollClosed
	}
	conn, watched := r.Context().Value(rawConnKey{}).(net.Conn)
	if watched = watched && !r.Close; watched { // else it ends with the answer
		s.pushProx.given.Store(conn, scrape)
	}
	control.SetWriteDeadline(time.Now().Add(pollWriteTimeout))
	text := scrape.text(client)
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	_, err = w.Write(text)
	if err == nil {
		err = control.Flush()
	}
	if err != nil && (!watched || s.pushProx.given.CompareAndDelete(conn, scrape)) {
		client.again(scrape)
		return pollClosed
	}
	return pollScrape
}

// connState takes a scrape back whose poll was answered into a connection that its client
// had closed, unless its response comes within retakeAfter: clients close connections
// too of which they have enough.
func (p *pushProx) connState(conn net.Conn, state http.ConnState) {
	if state != http.StateActive && state != http.StateClosed {
		return
	}
	given, ok := p.given.LoadAndDelete(conn)
	if scrape, _ := given.(*pushProxScrape); ok && state == http.StateClosed && scrape.harmless() {
		time.AfterFunc(retakeAfter, func() {
			p.mu.Lock()
			pending := p.scrapes[scrape.id] == scrape
			p.mu.Unlock()
			if pending {
				scrape.client.again(scrape)
			}
		})
	}
}

// harmless reports whether the client may be given the scrape twice.
func (x *pushProxScrape) harmless() bool {
	return (x.req.Method == http.MethodGet || x.req.Method == http.MethodHead) && x.req.Body == nil
}

// lose says that no poll will get the scrape.
func (x *pushProxScrape) lose() { x.losing.Do(func() { close(x.lost) }) }

func goingAway() *protocol.Refusal {
	return protocol.Refusef(http.StatusServiceUnavailable, protocol.CodeDraining, "this proxy is going away")
}

// admitPushProx finds out who polls, and whether it may have the name.
func (s *Server) admitPushProx(r *http.Request, name string) (*access.Identity, *protocol.Refusal) {
	id, refusal := s.identifyPushProx(r, name)
	if refusal != nil {
		return nil, refusal
	}
	if !id.MayBe(name) {
		return nil, protocol.Refusef(http.StatusForbidden, protocol.CodeForbidden, "the credential is of %s, which does not cover the name %q", id, name)
	}
	return id, s.checkKey(r, name, id)
}

// identifyPushProx finds out who polls or pushes: an agent, or whoever comes where
// there are no roles.
func (s *Server) identifyPushProx(r *http.Request, name string) (*access.Identity, *protocol.Refusal) {
	id, err := s.access.IdentifyBasic(r, "Authorization", name)
	if err != nil {
		return nil, authRefusal(err, false)
	}
	if s.access.Roles().Open() {
		return id, nil
	}
	if !id.Agent() {
		return nil, protocol.Refusef(http.StatusForbidden, protocol.CodeForbidden, "this is for an agent, and the credential is of %s", id)
	}
	if err := s.crossOrigin.Check(r); err != nil {
		return nil, protocol.Refusef(http.StatusForbidden, protocol.CodeForbidden, "a page of another site sent this request: %v", err)
	}
	return id, nil
}

// pollOf has a poll wait for scrapes of its client, which it registers where it was not
// connected.
//
// Polls of one address are of one client: the newest has the scrapes, and ends the one
// that waits, whose connection broke without the proxy's knowing. A poll from elsewhere
// is one of another client, and refused as long as the first is connected.
func (s *Server) pollOf(r *http.Request, name, spelling string, identity *access.Identity, p *poll) (*pushProxClient, *protocol.Refusal) {
	from := sha256.Sum256([]byte("pushprox " + s.access.Address(r).String()))
	instance := hex.EncodeToString(from[:16])
	if conn := s.fleet.Conn(name); conn != nil && conn.Instance == instance {
		if client, ok := conn.Link.(*pushProxClient); ok && client.offer(p, spelling, identity) {
			return client, nil
		}
	}
	client := &pushProxClient{server: s, name: name, done: make(chan struct{}), aborted: make(chan struct{})}
	client.conn = fleet.NewPushProxConn(client, name, instance, r.RemoteAddr)
	client.expire = time.AfterFunc(pollGrace, client.expired)
	client.offer(p, spelling, identity)
	if err := s.fleet.Register(r.Context(), client.conn, protocol.Registration{}); err != nil {
		client.end(err, nil, false)
		refusal, ok := protocol.AsRefusal(err)
		if !ok {
			refusal = protocol.Refusef(http.StatusServiceUnavailable, protocol.CodeUnavailable, "the poll of %q: %v", name, err)
		}
		s.metrics.registrations.WithLabelValues(string(refusal.Code)).Inc()
		s.pushProx.warnings.Do(func() {
			s.logger.Warn("A PushProx client is refused, and tries again all the time", "agent", name, "from", r.RemoteAddr, "reason", refusal)
		})
		return nil, refusal
	}
	s.metrics.registrations.WithLabelValues(outcomeOK).Inc()
	s.logger.Info("Agent connected", "agent", name, "from", r.RemoteAddr, "kind", fleet.KindPushProx)
	return client, nil
}

// offer has a poll wait for scrapes. It returns false where the client has ended.
func (c *pushProxClient) offer(p *poll, spelling string, identity *access.Identity) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return false
	}
	c.expire.Stop()
	if c.poll != nil {
		c.poll.why = protocol.Refusef(http.StatusRequestTimeout, protocol.CodeTaken, "another poll of %q came from the same address", c.name)
		close(c.poll.ended)
		c.warnOfTwins()
	}
	c.poll, c.spelling, c.identity = p, spelling, identity
	c.handOver()
	return true
}

// warnOfTwins tells that two clients have one name and one address. It is called with
// mu held.
func (c *pushProxClient) warnOfTwins() {
	now := time.Now()
	c.twins = append(c.twins, now)
	if len(c.twins) < twinPolls {
		return
	}
	if now.Sub(c.twins[0]) > twinTime {
		c.twins = slices.Delete(c.twins, 0, 1)
		return
	}
	c.twins = nil
	c.server.pushProx.warnings.Do(func() {
		c.server.logger.Warn("Polls of one name and one address end each other: two PushProx clients seem to run with one --fqdn", "agent", c.name, "from", c.conn.RemoteAddr)
	})
}

// handOver gives the next scrape to the poll that waits, where there are both. It is
// called with mu held.
func (c *pushProxClient) handOver() {
	for c.poll != nil && len(c.queue) > 0 {
		scrape := c.queue[0]
		c.queue = slices.Delete(c.queue, 0, 1)
		if scrape.req.Context().Err() != nil {
			continue
		}
		c.poll.work <- scrape
		c.poll, c.given = nil, time.Now()
		c.expire.Reset(pollGrace)
	}
}

// again takes a scrape back that could not be sent: the next poll gets it.
func (c *pushProxClient) again(scrape *pushProxScrape) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		scrape.lose()
		return
	}
	c.queue = slices.Insert(c.queue, 0, scrape)
	c.handOver()
}

// closed says that the connection of a poll has ended. What was given to it meanwhile
// the next one gets.
func (c *pushProxClient) closed(p *poll) {
	c.mu.Lock()
	if c.poll == p {
		c.endLocked(errors.New("the connection of its poll was closed"), nil, false)
		return
	}
	c.mu.Unlock()
	select {
	case scrape := <-p.work:
		c.again(scrape)
	default:
	}
}

// expired ends the client where it has not polled since it was given a scrape.
func (c *pushProxClient) expired() {
	c.mu.Lock()
	if c.poll != nil || time.Since(c.given) < pollGrace {
		c.mu.Unlock()
		return
	}
	c.endLocked(fmt.Errorf("it was given a scrape, and did not poll again within %s", pollGrace), nil, false)
}

// end ends the client. A poll that waits is answered with why, nil: 408. With abort, what
// the client has been given ends too.
func (c *pushProxClient) end(reason error, why *protocol.Refusal, abort bool) {
	c.mu.Lock()
	c.endLocked(reason, why, abort)
}

// endLocked is end. It is called with mu held, and releases it.
func (c *pushProxClient) endLocked(reason error, why *protocol.Refusal, abort bool) {
	if c.err != nil {
		c.mu.Unlock()
		return
	}
	c.err = reason
	p := c.poll
	for _, scrape := range c.queue {
		scrape.lose()
	}
	c.poll, c.queue = nil, nil
	c.expire.Stop()
	close(c.done)
	if abort {
		close(c.aborted)
	}
	c.mu.Unlock()
	if p != nil {
		if p.why = why; why == nil {
			p.why = protocol.Refusef(http.StatusRequestTimeout, protocol.CodeUnavailable, "the client %q was disconnected: %v", c.name, reason)
		}
		close(p.ended)
	}
	if c.server.fleet.Lost(c.conn, reason.Error()) && !c.server.draining.Load() {
		c.server.logger.Info("Agent lost", "agent", c.name, "from", c.conn.RemoteAddr, "reason", reason)
	}
}

// recheck ends the client where its credential covers the name no more.
func (c *pushProxClient) recheck(roles *access.Roles, keys bool) {
	c.mu.Lock()
	before := c.identity
	id := roles.Renew(before)
	c.identity = id
	c.mu.Unlock()
	pinned := keys && c.server.pins.Check(c.name, "") != nil
	if id == before && !id.Expired() && !pinned {
		return
	}
	if id.MayBeWithoutKey(c.name) && !pinned {
		return
	}
	reason := errors.New("its credential does not cover it any more")
	c.server.logger.Info("Agent disconnected: its credential does not cover it any more", "agent", c.name, "from", c.conn.RemoteAddr)
	c.end(reason, protocol.Refusef(http.StatusForbidden, protocol.CodeForbidden, "the credential does not cover the name %q any more", c.name), true)
}

// Alive reports whether a poll waits, or the next one is about to come.
func (c *pushProxClient) Alive(context.Context) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err == nil && (c.poll != nil || time.Since(c.given) < pollSoon)
}

// Done implements fleet.Link.
func (c *pushProxClient) Done() <-chan struct{} { return c.done }

// Err implements fleet.Link.
func (c *pushProxClient) Err() error {
	select {
	case <-c.done:
		return c.err
	default:
		return nil
	}
}

// Close implements fleet.Link.
func (c *pushProxClient) Close() error {
	c.end(errors.New("another connection of the agent came, or it was forgotten"), nil, false)
	return nil
}

// CloseIdle implements fleet.Link. Nothing but the poll waits.
func (c *pushProxClient) CloseIdle(time.Duration) {}

// CloseIdleConnections implements fleet.Link.
func (c *pushProxClient) CloseIdleConnections() {}

// RoundTrip gives the scrape to the next poll, and returns what the client pushes. It
// returns a *protocol.Refusal for what such a client can't do.
func (c *pushProxClient) RoundTrip(req *http.Request) (*http.Response, error) {
	scrape, err := c.scrape(req)
	if req.Body != nil {
		req.Body.Close()
	}
	if err != nil {
		return nil, err
	}
	pending := c.server.pushProx
	pending.mu.Lock()
	pending.scrapes[scrape.id] = scrape
	pending.mu.Unlock()
	c.mu.Lock()
	if c.err == nil {
		c.queue = append(c.queue, scrape)
		c.handOver()
	} else {
		scrape.lose()
	}
	c.mu.Unlock()
	select {
	case resp := <-scrape.answer:
		return resp, nil
	case <-req.Context().Done():
		err = context.Cause(req.Context())
	case <-scrape.lost:
		err = c.Err()
	case <-c.aborted:
		err = c.Err()
	}
	c.mu.Lock()
	if i := slices.Index(c.queue, scrape); i >= 0 {
		c.queue = slices.Delete(c.queue, i, i+1)
	}
	c.mu.Unlock()
	if pending.take(scrape.id, func(string) bool { return true }) == nil { // its push has come
		return <-scrape.answer, nil
	}
	return nil, err
}

// scrape checks a request and reads its body.
func (c *pushProxClient) scrape(req *http.Request) (*pushProxScrape, error) {
	target, err := url.Parse(req.URL.Opaque)
	if err != nil {
		return nil, protocol.Refusef(http.StatusBadRequest, protocol.CodeBadRequest, "%q is no URL: %v", req.URL.Opaque, err)
	}
	if name, _ := protocol.SplitAuthority(target.Host); name != c.name {
		return nil, protocol.Refusef(http.StatusForbidden, protocol.CodeNotAllowed,
			"%q: agent %q is a PushProx client, which has no targets; scrape a port of it, as in %s:9100, or run culvert-client there", name, c.name, c.name)
	}
	scrape := &pushProxScrape{id: rand.Text(), client: c, req: req, target: target, answer: make(chan *http.Response, 1), lost: make(chan struct{})}
	if c.server.cluster != nil {
		scrape.id += "." + c.server.id + "." + c.name // see passPush
	}
	if req.Body == nil {
		return scrape, nil
	}
	scrape.body, err = io.ReadAll(io.LimitReader(req.Body, maxScrapeBody+1))
	if err == nil && len(scrape.body) > maxScrapeBody {
		err = protocol.Refusef(http.StatusRequestEntityTooLarge, protocol.CodeTooLarge, "agent %q is a PushProx client, which takes scrapes with at most %d bytes of body", c.name, maxScrapeBody)
	}
	return scrape, err
}

// text returns the request in the form that the client takes.
func (x *pushProxScrape) text(c *pushProxClient) []byte {
	c.mu.Lock()
	host := c.spelling // the client compares it byte by byte
	c.mu.Unlock()
	target := *x.target
	target.User, target.Fragment, target.RawFragment = nil, "", ""
	if port := target.Port(); port != "" {
		host += ":" + port
	}
	target.Host = host
	if target.Path == "" {
		target.Path = "/"
	}
	header := x.req.Header.Clone()
	agent := header.Get("User-Agent")
	for name := range header {
		if strings.HasPrefix(name, "Proxy-") {
			header.Del(name)
		}
	}
	for _, name := range []string{"User-Agent", "Connection", "Te", "Trailer", "Expect", "Content-Length", "Transfer-Encoding"} {
		header.Del(name)
	}
	header.Set("Id", x.id)
	// Without a timeout the client does nothing.
	deadline, _ := x.req.Context().Deadline()
	left := max(time.Until(deadline).Seconds(), 0.001)
	header.Set(timeoutHeader, strconv.FormatFloat(left, 'f', 3, 64))
	var out bytes.Buffer
	fmt.Fprintf(&out, "%s %s HTTP/1.1\r\nHost: %s\r\n", x.req.Method, target.String(), host)
	if agent != "" {
		fmt.Fprintf(&out, "User-Agent: %s\r\n", agent)
	}
	if x.req.Body != nil {
		fmt.Fprintf(&out, "Content-Length: %d\r\n", len(x.body))
	}
	header.Write(&out)
	out.WriteString("\r\n")
	out.Write(x.body)
	return out.Bytes()
}
