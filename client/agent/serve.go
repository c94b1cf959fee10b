package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"net/textproto"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/alecthomas/units"

	"github.com/culvert-io/culvert/protocol"
)

// connectIdle ends a CONNECT tunnel that nothing goes through. The proxy's
// --connect.idle-timeout comes first.
const connectIdle = 10 * time.Minute

// schemeParameter is the query parameter by which PushProx's scrapers ask for https.
const schemeParameter = "_scheme"

// placeWait is how long a scrape waits for a place, where MaxConcurrent run already.
const placeWait = time.Second

// maxTargetHead bounds the header of a target's response, in bytes. A proxy takes 64 KiB
// of a response's head, and the agent's own fields are in it too.
const maxTargetHead = 60 << 10

// sessionHandler serves what comes through one session.
type sessionHandler struct {
	agent   *Agent
	drained chan<- protocol.Drain
	running sync.WaitGroup // scrapes; http.Server doesn't wait for CONNECT
}

// ServeHTTP tells control from scrapes by the first byte of the request target,
// before anything else looks at the request.
func (h *sessionHandler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s := h.agent.current.Load()
	if protocol.IsControl(r) {
		h.control(w, r)
		return
	}
	h.running.Add(1)
	defer h.running.Done()
	start := time.Now()
	m := h.agent.metrics
	m.inFlight.Inc()
	defer m.inFlight.Dec()
	var kind, outcome string
	if r.Method == http.MethodConnect {
		kind, outcome = "connect", s.connect(w, r)
	} else {
		kind, outcome = s.scrape(w, r)
	}
	m.scrapes.WithLabelValues(outcome).Inc()
	m.duration.WithLabelValues(kind).Observe(time.Since(start).Seconds())
}

// control answers the proxy's own requests.
func (h *sessionHandler) control(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path != protocol.PathDrain || r.Method != http.MethodPost {
		protocol.Refusef(http.StatusNotFound, protocol.CodeNotFound, "%s %s: this agent knows no such control request", r.Method, r.URL.Path).Write(w)
		return
	}
	var d protocol.Drain
	if err := json.NewDecoder(io.LimitReader(r.Body, 1<<16)).Decode(&d); err != nil {
		protocol.Refusef(http.StatusBadRequest, protocol.CodeInvalid, "drain: %v", err).Write(w)
		return
	}
	select {
	case h.drained <- d:
	default: // a second drain says nothing new
	}
	w.WriteHeader(http.StatusNoContent)
}

const outcomeOK, outcomeCancelled, outcomeTooLong = "ok", "cancelled", "too-long"

// scrape answers a request in absolute form.
func (s *snapshot) scrape(w http.ResponseWriter, r *http.Request) (kind, outcome string) {
	for name := range r.Header { // what is between scraper and proxy; "Proxy" is for CGI programs to trip over
		if name == "Proxy" || strings.HasPrefix(name, "Proxy-") {
			delete(r.Header, name)
		}
	}
	if r.URL.Host == "" || (r.URL.Scheme != "http" && r.URL.Scheme != "https") {
		return "other", refuse(w, protocol.Refusef(http.StatusBadRequest, protocol.CodeBadRequest,
			"agent %q: %q is not an http or https URL", s.name, r.RequestURI))
	}
	name, port := protocol.SplitAuthority(r.URL.Host)
	if targetName, ok := s.named(name); ok {
		if targetName == protocol.AgentTarget {
			return "agent", s.scrapeSelf(w, r, port)
		}
		t := s.targets[targetName]
		if refusal := t.refuses(s, r, port); refusal != nil {
			return "target", refuse(w, refusal)
		}
		if !s.agent.scrapes.take(r.Context(), placeWait) {
			return "target", s.busy(w, r)
		}
		defer s.agent.scrapes.give()
		if t.handler != nil {
			return "target", s.serveLocally(t.handler, w, r)
		}
		return "target", s.forward(w, r, t, t.resolve(r), t.owned, "target \""+targetName+"\"")
	}
	if _, ok := s.address(name); !ok {
		return "other", refuse(w, s.mismatch(name))
	}
	u := *r.URL
	// PushProx's way to an https target: the agent makes the TLS.
	if query := u.Query(); u.Scheme == "http" && query.Get(schemeParameter) == "https" {
		u.Scheme = "https"
		query.Del(schemeParameter)
		u.RawQuery = query.Encode()
	}
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	if refusal := s.allowed(name, port); refusal != nil {
		return "port", refuse(w, refusal)
	}
	if !s.agent.scrapes.take(r.Context(), placeWait) {
		return "port", s.busy(w, r)
	}
	defer s.agent.scrapes.give()
	u.Host, u.User = net.JoinHostPort(name, port), nil
	return "port", s.forward(w, r, s.ports, &u, nil, "port "+port+" of \""+name+"\"")
}

// scrapeSelf serves the target "agent".
func (s *snapshot) scrapeSelf(w http.ResponseWriter, r *http.Request, port string) string {
	self := target{declared: protocol.Target{Name: protocol.AgentTarget, Path: "/metrics"}}
	if refusal := self.refuses(s, r, port); refusal != nil {
		return refuse(w, refusal)
	}
	if !s.agent.scrapes.take(r.Context(), placeWait) {
		return s.busy(w, r)
	}
	defer s.agent.scrapes.give()
	return s.serveLocally(s.self, w, r)
}

// busy answers a scrape that got no place.
func (s *snapshot) busy(w http.ResponseWriter, r *http.Request) string {
	if r.Context().Err() != nil {
		return outcomeCancelled
	}
	what, flag, most := "scrapes running", "--scrape.max-concurrent", s.agent.scrapes.limit()
	if r.Method == http.MethodConnect {
		what, flag, most = "CONNECT tunnels open", "--connect.max-concurrent", s.agent.tunnels.limit()
	}
	return refuse(w, protocol.Refusef(http.StatusTooManyRequests, protocol.CodeAgentBusy,
		"agent %q has %d %s (%s of the agent), and none ended within %s; are its targets slow, or its scrapers too many?", s.name, most, what, flag, placeWait))
}

// serveLocally hands a scrape to a handler of this process, as a request in
// origin form without the header fields that are between scraper and proxy.
func (s *snapshot) serveLocally(h http.Handler, w http.ResponseWriter, r *http.Request) string {
	local := r.Clone(r.Context())
	local.URL.Scheme, local.URL.Host = "", ""
	local.RequestURI = local.URL.RequestURI()
	local.Header.Del("Upgrade")
	h.ServeHTTP(w, local)
	return outcomeOK
}

// forward sends the request to u and the response back, without buffering it.
func (s *snapshot) forward(w http.ResponseWriter, r *http.Request, via http.RoundTripper, u *url.URL, owned []string, what string) string {
	outcome, brokenOff := outcomeOK, false
	r.Header.Del("Upgrade") // ReverseProxy would pass an upgrade on, and this
	r.Header.Del("Te")
	proxy := httputil.ReverseProxy{
		Transport:  finalOnly{via},
		BufferPool: protocol.Buffers,
		ErrorLog:   slog.NewLogLogger(s.Logger.Handler(), slog.LevelDebug),
		Rewrite: func(pr *httputil.ProxyRequest) {
			pr.Out.URL = u
			pr.Out.Trailer = nil
			if via == http.RoundTripper(s.ports) {
				pr.Out.Host = r.Host
			} else {
				pr.Out.Host = ""
			}
			for _, name := range owned {
				pr.Out.Header.Del(name)
			}
		},
		ModifyResponse: func(resp *http.Response) error {
			if resp.StatusCode == http.StatusSwitchingProtocols {
				return protocol.Refusef(http.StatusBadGateway, protocol.CodeTargetUnreachable, "%s switched protocols without being asked", what)
			}
			if resp.StatusCode < 200 || resp.StatusCode > 599 {
				return protocol.Refusef(http.StatusBadGateway, protocol.CodeBadResponse, "%s of agent %q sent the status %d, which is none", what, s.name, resp.StatusCode)
			}
			resp.Header.Del(protocol.HeaderError) // a target must not speak for the agent
			resp.Header.Del(protocol.HeaderMessage)
			head := 0
			for name, values := range resp.Header {
				for _, value := range values {
					head += len(name) + len(value) + len(": \r\n")
				}
			}
			if head > maxTargetHead {
				return protocol.Refusef(http.StatusBadGateway, protocol.CodeBadResponse, "%s of agent %q sent a header of %d bytes; at most %d are passed on", what, s.name, head, maxTargetHead)
			}
			body := &countedBody{ReadCloser: resp.Body, agent: s.agent, fill: resp.ContentLength > 0, left: math.MaxInt64}
			if s.MaxBodySize > 0 {
				if resp.ContentLength > s.MaxBodySize && resp.Body != http.NoBody {
					return protocol.Refusef(http.StatusBadGateway, protocol.CodeBadResponse, "the response of %s of agent %q has %d bytes, more than --scrape.max-body-size=%s; raise that if they are meant",
						what, s.name, resp.ContentLength, units.Base2Bytes(s.MaxBodySize))
				}
				body.left = s.MaxBodySize
				body.long = func() {
					brokenOff = true
					s.agent.longResponse.log("A response was broken off", "of", what, "max_body_size", units.Base2Bytes(s.MaxBodySize))
				}
			}
			resp.Body = body
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if r.Context().Err() != nil {
				outcome = outcomeCancelled
				panic(http.ErrAbortHandler)
			}
			refusal, ok := protocol.AsRefusal(err)
			if !ok {
				refusal = s.unreachable(what, err)
			}
			outcome = refuse(w, refusal)
		},
	}
	defer func() {
		if p := recover(); p != nil {
			// The body broke off half way, or nobody reads it any more.
			if outcome == outcomeOK {
				switch {
				case brokenOff:
					outcome = outcomeTooLong
				case r.Context().Err() != nil:
					outcome = outcomeCancelled
				default:
					outcome = "broken"
				}
			}
			s.agent.metrics.scrapes.WithLabelValues(outcome).Inc()
			panic(p)
		}
	}()
	proxy.ServeHTTP(w, r)
	return outcome
}

// maxInterim is how many interim responses a target may send before its response.
const maxInterim = 10

// finalOnly drops interim responses: no scraper has a use for them, and a target could
// send them without an end.
type finalOnly struct{ http.RoundTripper }

func (t finalOnly) RoundTrip(r *http.Request) (*http.Response, error) {
	n := 0
	hook := &httptrace.ClientTrace{Got1xxResponse: func(int, textproto.MIMEHeader) error {
		if n++; n > maxInterim {
			return fmt.Errorf("more than %d interim responses came", maxInterim)
		}
		return nil
	}}
	return t.RoundTripper.RoundTrip(r.WithContext(hooked{r.Context(), hook}))
}

// hooked is a context with a hook in place of the one that ReverseProxy leaves there.
type hooked struct {
	context.Context
	hook *httptrace.ClientTrace
}

func (c hooked) Value(key any) any {
	value := c.Context.Value(key)
	if _, ok := value.(*httptrace.ClientTrace); ok {
		return c.hook
	}
	return value
}

// errTooLong breaks a response off.
var errTooLong = errors.New("the response is longer than --scrape.max-body-size")

// countedBody counts the bytes of response bodies, and breaks off those that are too
// long. It fills the buffer where the
// length of the body is known: the pieces that the target's connection brings would
// become small frames. Other bodies are passed on as they come.
type countedBody struct {
	io.ReadCloser
	agent *Agent
	fill  bool
	left  int64  // that may still come
	long  func() // is called where more does
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
	b.agent.metrics.bytes.Add(float64(n))
	if int64(n) > b.left {
		n, err = int(b.left), errTooLong
		b.long()
	}
	b.left -= int64(n)
	return n, err
}

// connect opens a connection to a port and passes bytes both ways.
func (s *snapshot) connect(w http.ResponseWriter, r *http.Request) string {
	name, port := protocol.SplitAuthority(r.RequestURI)
	if _, ok := s.named(name); ok {
		return refuse(w, protocol.Refusef(http.StatusForbidden, protocol.CodeNotAllowed,
			"CONNECT goes to ports, and %q is a named target of agent %q: scrape it with scheme http, the agent holds its TLS", name, s.name))
	}
	if _, ok := s.address(name); !ok {
		return refuse(w, s.mismatch(name))
	}
	if refusal := s.allowed(name, port); refusal != nil {
		return refuse(w, refusal)
	}
	if !s.agent.tunnels.take(r.Context(), placeWait) {
		return s.busy(w, r)
	}
	defer s.agent.tunnels.give()
	upstream, err := s.dialPort(r.Context(), "tcp", net.JoinHostPort(name, port))
	if err != nil {
		if r.Context().Err() != nil {
			return outcomeCancelled
		}
		if refusal, ok := protocol.AsRefusal(err); ok {
			return refuse(w, refusal)
		}
		return refuse(w, s.unreachable("port "+port+" of \""+name+"\"", err))
	}
	stream, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		upstream.Close()
		return refuse(w, protocol.Refusef(http.StatusInternalServerError, protocol.CodeBadRequest, "CONNECT: %v", err))
	}
	if _, err := io.WriteString(stream, "HTTP/1.1 200 Connection established\r\n\r\n"); err != nil {
		stream.Close()
		upstream.Close()
		return outcomeCancelled
	}
	if err := protocol.PassAhead(upstream, buffered.Reader); err != nil {
		stream.Close()
		upstream.Close()
		return string(protocol.CodeTargetUnreachable)
	}
	// The tunnel's end ends it too: reads from the stream fail then.
	n, err := protocol.Splice(stream, upstream, connectIdle)
	s.agent.metrics.bytes.Add(float64(n))
	if err != nil {
		return "broken"
	}
	return outcomeOK
}

// refuse answers with a refusal and returns its code as the outcome.
func refuse(w http.ResponseWriter, refusal *protocol.Refusal) string {
	refusal.Write(w)
	return string(refusal.Code)
}
