package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// Protocol is how the agent reaches its proxies.
type Protocol string

// Protocols of Config.
const (
	// ProtocolAuto is the tunnel, and PushProx's long polling as long as a proxy takes polls
	// and knows no tunnel, or what is in front of it lets none through.
	ProtocolAuto Protocol = "auto"
	// ProtocolCulvert is the tunnel alone.
	ProtocolCulvert Protocol = "culvert"
	// ProtocolPushProx is long polling alone.
	ProtocolPushProx Protocol = "pushprox"
)

const (
	// heldAfter is how long a poll has to be held without an answer to count as taken: who
	// does not know polls refuses them at once.
	heldAfter = 2 * time.Second
	// tunnelProbe is the mean distance of looks for the tunnel while the agent polls.
	tunnelProbe = 30 * time.Second
	// lastPoll is how long the waiting poll goes on when there is a tunnel in its stead:
	// the proxy may have given a scrape to it at that very moment.
	lastPoll = 5 * time.Second
	// maxPollAnswer bounds the answer to a poll, a scrape request with its body.
	maxPollAnswer = 1 << 20
	// pollAnswerTimeout bounds the way of an answer from its first byte on.
	pollAnswerTimeout = 10 * time.Second
	// maxPolled bounds the scrapes of one proxy that are on their way, those that wait for
	// a place included. With that many the agent does not ask for more.
	maxPolled = 1024
)

var (
	// errReplaced: another poll of the name has come; PushProx's proxy answers 408.
	errReplaced = errors.New("another poll replaced this one")
	// errStartAgain: a reload has changed what polls depend on.
	errStartAgain = errors.New("the configuration has changed")
)

// pollError is why polling ended.
type pollError struct {
	err error
	// before is why there is no tunnel; nil where polls were taken, or are all that the
	// agent may do.
	before error
}

func (e *pollError) Error() string {
	if e.before != nil {
		return fmt.Sprintf("%v; nor does it take polls: %v", e.before, e.err)
	}
	return "poll: " + e.err.Error()
}

func (e *pollError) Unwrap() error {
	if e.before != nil {
		return e.before
	}
	return e.err
}

// wantsPolls reports whether a handshake failed as it does where there is a pushprox-proxy,
// or a culvert-proxy behind what was made for one and passes no upgrade on.
func wantsPolls(err error) bool {
	refusal, ok := protocol.AsRefusal(err)
	return protocol.NoTunnel(err) || ok && refusal.Code == protocol.CodeNoUpgrade
}

// poll serves the proxy by long polling. It returns a registered session as soon as the
// proxy has a tunnel, where auto has it look for one; else why polling has ended. Scrapes
// that run then go on beside, and Run waits for them.
func (l *link) poll(ctx context.Context, dialer *protocol.Dialer, snap *snapshot, before error) (*protocol.Session, error) {
	p, err := newPoller(l, dialer, snap, before)
	if err != nil {
		return nil, err
	}
	l.poller.Store(p)
	defer func() {
		l.poller.Store(nil)
		if p.taken.Load() {
			l.lastFailure = "" // whatever comes now is news
		}
	}()
	ended := make(chan error, 1)
	l.agent.tasks.Go(func() { ended <- p.run() })
	defer l.agent.tasks.Go(func() { p.finish(ctx) })

	type tunnel struct {
		session *protocol.Session
		err     error
	}
	var next <-chan time.Time
	if snap.Protocol == ProtocolAuto {
		next = time.After(slowly(tunnelProbe))
	}
	probeCtx, endProbe := context.WithCancel(ctx)
	probed := make(chan tunnel, 1)
	probing := false
	// stopProbe waits for a look for the tunnel that goes on. It may have found one.
	stopProbe := func() *protocol.Session {
		endProbe()
		if !probing {
			return nil
		}
		return (<-probed).session
	}
	for {
		select {
		case err := <-ended:
			if session := stopProbe(); session != nil {
				return session, nil
			}
			if !p.taken.Load() {
				return nil, &pollError{err, before}
			}
			return nil, &pollError{err, nil}
		case <-ctx.Done():
			p.stop()
			if session := stopProbe(); session != nil {
				return session, nil // serve tells the proxy that the agent goes
			}
			return nil, ctx.Err()
		case <-l.wake:
			now := l.agent.current.Load()
			if now.Name == snap.Name && now.Protocol == snap.Protocol && now.TokenFile == snap.TokenFile {
				if probing {
					continue
				}
				l.agent.update(dialer)
				p.connectBy(dialer)
				if next != nil {
					next = time.After(0)
				}
				continue
			}
			if now.Protocol == snap.Protocol || now.Protocol == ProtocolPushProx {
				p.retire()
			} else {
				p.stop() // at a culvert-proxy, the poll has the name that the tunnel asks for
			}
			if session := stopProbe(); session != nil {
				return session, nil
			}
			return nil, errStartAgain
		case <-next:
			next, probing = nil, true
			l.agent.tasks.Go(func() {
				session, err := l.connect(probeCtx, dialer, snap)
				probed <- tunnel{session, err}
			})
		case t := <-probed:
			probing = false
			if t.err == nil {
				endProbe()
				p.retire()
				return t.session, nil
			}
			if refusal, ok := protocol.AsRefusal(t.err); ok && refusal.Status == http.StatusConflict {
				endProbe()
				p.stop() // it may be this agent's own poll that has the name
				return nil, errStartAgain
			}
			l.logger().Debug("Still no tunnel", "err", t.err)
			next = time.After(slowly(tunnelProbe))
		}
	}
}

// poller speaks PushProx's protocol with one proxy: POST /poll waits for a scrape
// request, POST /push takes the response. The scrapes themselves go through the very
// handler that serves a tunnel.
type poller struct {
	link   *link
	name   string                  // as the operator wrote it: PushProx compares bytes
	before error                   // why there is no tunnel, where one is looked for
	base   atomic.Pointer[url.URL] // of the proxy, as far as redirects of polls have told
	auth   string
	client atomic.Pointer[http.Client] // to the proxy
	older  []*http.Client              // of link.poll, and then of finish

	server *http.Server
	local  *http.Transport // to server, in this process

	polling   context.Context // of polls
	stop      context.CancelFunc
	scraping  context.Context // of scrapes and pushes
	cutOff    context.CancelFunc
	last      atomic.Bool   // no poll after this one
	done      chan struct{} // run has returned
	taken     atomic.Bool   // the proxy takes polls
	announced sync.Once

	places  chan struct{} // has one value for each scrape
	running sync.WaitGroup
}

func newPoller(l *link, dialer *protocol.Dialer, snap *snapshot, before error) (*poller, error) {
	auth, err := dialer.Authorization()
	if err != nil {
		return nil, err
	}
	p := &poller{link: l, name: snap.Name, before: before, auth: auth,
		done: make(chan struct{}), places: make(chan struct{}, maxPolled)}
	base := *l.url.URL
	base.User = nil
	p.base.Store(&base)
	p.polling, p.stop = context.WithCancel(context.Background())
	p.scraping, p.cutOff = context.WithCancel(context.Background())
	p.connectBy(dialer)
	listener := newPipeListener()
	p.server = &http.Server{
		Handler:                      &sessionHandler{agent: l.agent},
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(l.logger().Handler(), slog.LevelDebug),
	}
	l.agent.tasks.Go(func() { p.server.Serve(listener) })
	p.local = &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return listener.dial(ctx) },
		DisableCompression:     true,
		MaxIdleConnsPerHost:    64,
		IdleConnTimeout:        time.Minute,
		MaxResponseHeaderBytes: 2 * maxTargetHead,
	}
	return p, nil
}

// connectBy has polls and pushes from now on use connections of the dialer's TLS settings.
func (p *poller) connectBy(dialer *protocol.Dialer) {
	transport := dialer.Transport()
	transport.MaxIdleConnsPerHost, transport.IdleConnTimeout = 64, 90*time.Second
	if old := p.client.Swap(&http.Client{Transport: transport, CheckRedirect: checkRedirect}); old != nil {
		// Its connections are those by which scrapes came that run now: behind a balancer
		// they lead to the proxy that waits for the answers.
		p.older = append(p.older, old)
	}
}

// checkRedirect follows what keeps method and body, and never out of TLS.
func checkRedirect(r *http.Request, via []*http.Request) error {
	if r.Method != http.MethodPost || len(via) >= 5 || via[0].URL.Scheme == "https" && r.URL.Scheme != "https" {
		return http.ErrUseLastResponse
	}
	return nil
}

// run polls until it fails, is stopped or retired.
func (p *poller) run() error {
	defer close(p.done)
	polls := func(result string) {
		p.link.agent.metrics.polls.WithLabelValues(p.link.label, result).Inc()
	}
	replaced, bound := 0, time.Duration(0)
	for !p.last.Load() {
		select {
		case p.places <- struct{}{}:
		case <-p.polling.Done():
			return nil
		}
		since := time.Now()
		scrape, err := p.ask()
		if err == nil {
			p.take()
			polls("scrape")
			replaced = 0
			p.running.Go(func() {
				defer func() { <-p.places }()
				p.scrape(scrape)
			})
			continue
		}
		<-p.places
		if p.polling.Err() != nil {
			return nil
		}
		if !errors.Is(err, errReplaced) {
			polls("failed")
			return err
		}
		p.take()
		polls("replaced")
		// Once is nothing: the proxy may end an old poll of ours. Again and again, two
		// clients with one name take the polls from each other.
		if replaced++; time.Since(since) > heldAfter {
			replaced = 0
		}
		if replaced <= 1 {
			bound = 0
			continue
		}
		p.link.agent.replacedPoll.log("Another client polls the proxy under this agent's name, and each ends the other's polls; stop it, or choose another --fqdn", "agent", p.name, "proxy", p.link.label)
		snap := p.link.agent.current.Load()
		if bound = min(bound*3/2, snap.RetryMaxWait); bound == 0 {
			bound = snap.RetryInitialWait
		}
		select {
		case <-time.After(rand.N(bound)):
		case <-p.polling.Done():
			return nil
		}
	}
	return nil
}

// take notes that the proxy takes polls.
func (p *poller) take() {
	p.taken.Store(true)
	p.announced.Do(func() {
		l := p.link
		l.polled.Store(true)
		l.agent.metrics.connects.WithLabelValues(l.label, "polling").Inc()
		attrs := []any{"agent", p.name, "protocol", ProtocolPushProx}
		if l.agent.current.Load().Push.StoragePath != "" {
			attrs = append(attrs, "pushes", "a pushprox-proxy takes none: those without an instance wait in the spool")
		}
		if p.before != nil {
			l.logger().Warn("Polling, as PushProx's client does, for want of a tunnel; the agent goes on looking for one", append(attrs, "err", p.before)...)
			return
		}
		l.logger().Info("Polling", attrs...)
	})
}

// retire has the waiting poll be the last one, and ends it in a while.
func (p *poller) retire() {
	p.last.Store(true)
	time.AfterFunc(lastPoll, p.stop)
}

// finish waits for the last poll and for the scrapes that run, and lets go of all. When
// ctx has ended they have ShutdownTimeout.
func (p *poller) finish(ctx context.Context) {
	idle := make(chan struct{})
	p.link.agent.tasks.Go(func() {
		<-p.done // adds to running no more
		p.running.Wait()
		close(idle)
	})
	select {
	case <-idle:
	case <-ctx.Done():
		p.stop()
		timeout := p.link.agent.current.Load().ShutdownTimeout
		select {
		case <-idle:
		case <-time.After(timeout):
			p.link.logger().Warn("Scrapes were cut off", "timeout", timeout)
		}
	}
	p.stop()
	p.cutOff()
	<-idle
	p.local.CloseIdleConnections()
	for _, client := range append(p.older, p.client.Load()) {
		client.CloseIdleConnections()
	}
	p.server.Close()
}

// request returns a request to the proxy.
func (p *poller) request(ctx context.Context, path string, body io.Reader) (*http.Request, error) {
	base := p.base.Load()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, base.JoinPath(path).String(), body)
	if err != nil {
		return nil, err
	}
	r.Header.Set("User-Agent", "culvert-client/"+protocol.BuildVersion())
	if p.auth != "" && base.Hostname() == p.link.url.Hostname() {
		r.Header.Set("Authorization", p.auth)
	}
	return r, nil
}

// ask polls once. It returns the scrape, errReplaced, or why there is none.
func (p *poller) ask() (*polledScrape, error) {
	ctx, cancel := context.WithCancel(p.polling)
	defer cancel()
	held := time.AfterFunc(math.MaxInt64, func() {
		if ctx.Err() == nil {
			p.take()
		}
	})
	defer held.Stop()
	r, err := p.request(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteRequest:         func(info httptrace.WroteRequestInfo) { held.Reset(heldAfter) },
		GotFirstResponseByte: func() { held.Stop() },
	}), "poll", strings.NewReader(p.name))
	if err != nil {
		return nil, err
	}
	client := p.client.Load()
	resp, err := client.Do(r)
	if err != nil {
		var failed *url.Error
		if errors.As(err, &failed) {
			err = failed.Err // the whole error would have the URL, which the log names anyway
		}
		return nil, err
	}
	defer resp.Body.Close()
	late := time.AfterFunc(pollAnswerTimeout, cancel)
	defer late.Stop()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxPollAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("the answer broke off: %w", err)
	}
	// PushProx's client doesn't look at the status either.
	scrape, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(answer)))
	switch {
	case err == nil && len(scrape.Header[headerID]) > 0:
		if final := resp.Request.URL; final.String() != r.URL.String() && strings.HasSuffix(final.Path, "/poll") {
			base := *final // pushes go where polls do: their bodies can't be sent twice
			base.Path, base.RawPath = strings.TrimSuffix(final.Path, "poll"), ""
			p.base.Store(&base)
		}
		return &polledScrape{scrape, client, time.Now(), len(answer) > maxPollAnswer}, nil
	case resp.StatusCode == http.StatusRequestTimeout:
		return nil, errReplaced
	case resp.StatusCode/100 == 3:
		return nil, fmt.Errorf("the proxy answered %s to %q; use that in the proxy's URL, without /poll", resp.Status, resp.Header.Get("Location"))
	case resp.Header.Get(protocol.HeaderError) != "": // a culvert-proxy, whose answers to polls have no body
		seconds, _ := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 12)
		return nil, &protocol.Refusal{
			Status: resp.StatusCode, Code: protocol.Code(resp.Header.Get(protocol.HeaderError)),
			Message: resp.Header.Get(protocol.HeaderMessage), RetryAfter: time.Duration(seconds) * time.Second,
		}
	case resp.StatusCode == http.StatusUnauthorized, resp.StatusCode == http.StatusForbidden:
		return nil, &protocol.Refusal{Status: resp.StatusCode, Message: "the proxy answered " + resp.Status}
	case resp.StatusCode == http.StatusGatewayTimeout:
		return nil, fmt.Errorf("the proxy answered %s; what stands in front of it ends polls that wait, and should let them wait for hours", resp.Status)
	case resp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("the proxy answered %s", resp.Status)
	case err == nil:
		err = errors.New("there is no Id in it")
	case len(answer) == 0:
		return nil, errors.New("the proxy ended the poll without a scrape")
	}
	return nil, fmt.Errorf("the proxy's answer is no scrape: %w", err)
}

// ListedByPushProx tells whether a pushprox-proxy lists the agent among its clients, for
// diagnosis: it does for some minutes after a poll. It returns an error where the proxy's
// list is none of a pushprox-proxy.
func (a *Agent) ListedByPushProx(ctx context.Context, proxy *ProxyURL) (bool, error) {
	dialer := a.dialer(proxy)
	auth, err := dialer.Authorization()
	if err != nil {
		return false, err
	}
	base := *proxy.URL
	base.User = nil
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, base.JoinPath("clients").String(), nil)
	if err != nil {
		return false, err
	}
	if auth != "" {
		r.Header.Set("Authorization", auth)
	}
	transport := dialer.Transport()
	defer transport.CloseIdleConnections()
	resp, err := transport.RoundTrip(r)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return false, fmt.Errorf("GET %s: %s", r.URL.Path, resp.Status)
	}
	var groups []struct{ Targets []string }
	if err := json.NewDecoder(io.LimitReader(resp.Body, 64<<20)).Decode(&groups); err != nil {
		return false, fmt.Errorf("GET %s: the answer is no list of clients: %w", r.URL.Path, err)
	}
	name := a.current.Load().Config.Name
	for _, group := range groups {
		if slices.Contains(group.Targets, name) {
			return true, nil
		}
	}
	return false, nil
}
