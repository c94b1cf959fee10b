package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/access"
	"github.com/culvert-io/culvert/proxy/cluster"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// tunnel is an open CONNECT tunnel.
type tunnel struct {
	agent   string
	conn    *fleet.Conn // nil: another proxy holds the agent
	stream  farEnd
	scraper net.Conn

	identity *access.Identity // of the scraper
}

// farEnd is the end of a tunnel that is not the scraper: a stream of an agent's session,
// or a connection to the proxy that holds one.
type farEnd interface {
	net.Conn
	Idle() time.Duration
}

// connect serves CONNECT NAME:PORT.
func (s *Server) connect(w http.ResponseWriter, r *http.Request) {
	start := time.Now()
	entry := fleet.Scrape{URL: r.RequestURI, Mode: "connect", At: start}
	outcome, agent, open := s.openTunnel(w, r, &entry)
	mode := "connect"
	if passedOn(r) {
		mode = "peer"
	}
	s.metrics.scrapes.WithLabelValues(mode, outcome).Inc()
	entry.Took, entry.Outcome = time.Since(start), outcome
	s.metrics.duration.WithLabelValues(mode).Observe(entry.Took.Seconds())
	var logged fleet.Logged
	if agent != nil {
		entry.Answered, entry.Failed = outcome == outcomeOK, outcome != outcomeOK && outcome != outcomeCancelled
		logged = s.fleet.LogScrape(agent, entry)
	}
	if open != nil {
		logged.Passed(open())
	}
}

// openTunnel does all up to the 200. It returns the outcome, the agent where there is one,
// and, where there is a tunnel now, what passes the bytes and returns how many went to the
// scraper. It completes the entry for the agent's log.
func (s *Server) openTunnel(w http.ResponseWriter, r *http.Request, entry *fleet.Scrape) (outcome string, agent *fleet.Agent, open func() int64) {
	start := entry.At
	refuse := func(refusal *protocol.Refusal) (string, *fleet.Agent, func() int64) {
		s.refuse(w, r, refusal)
		entry.Status, entry.Reason = refusal.Status, refusal.Message
		return refusal.Code.Outcome(), agent, nil
	}
	name, port := protocol.SplitAuthority(r.RequestURI)
	entry.Host, entry.Port = name, port
	if port == "" {
		return refuse(protocol.Refusef(http.StatusBadRequest, protocol.CodeBadRequest, "CONNECT %s: the port is missing", r.RequestURI))
	}
	route, ways, refusal := s.routeOf(r, name)
	if refusal != nil {
		return refuse(refusal)
	}
	timeout := s.timeoutOf(r)
	ctx, cancel := context.WithTimeout(r.Context(), timeout)
	defer cancel()
	if len(route.Agents) == 1 {
		agent = route.Agents[0]
	}
	var conn *fleet.Conn
	var stream farEnd
	var ahead *bufio.Reader
	release := func() {}
	for again := true; again; {
		way, err := s.await(ctx, route, ways)
		if err != nil {
			if _, ok := errors.AsType[*notHeld](err); ok {
				w.Header().Set(cluster.HeaderHeld, "no")
			}
			refusal, _ := protocol.AsRefusal(err)
			return refuse(refusal)
		}
		agent, conn, again, refusal = way.Agent, way.Conn, false, nil
		if conn == nil {
			stream, ahead, again, refusal = s.passOnConnect(ctx, r.RequestURI, route, way, ways, timeout-time.Since(start))
			if refusal == nil && ctx.Err() != nil {
				refusal = s.timedOut(route, agent, timeout)
			}
			continue
		}
		if conn.Session == nil {
			return refuse(protocol.Refusef(http.StatusForbidden, protocol.CodeNotAllowed,
				"agent %q is a PushProx client, which takes no CONNECT: scrape it with scheme: http, and params: {_scheme: [https]} for its targets with TLS, or run culvert-client there", agent.Name))
		}
		if err := s.takePlace(ctx, agent.Tunnels); err != nil {
			return refuse(protocol.Refusef(http.StatusTooManyRequests, protocol.CodeAgentBusy,
				"agent %q has %d CONNECT tunnels open (--connect.max-concurrent)", agent.Name, cap(agent.Tunnels)))
		}
		release = func() { <-agent.Tunnels }
		stream, ahead, refusal = s.dialAgent(ctx, conn, r.RequestURI, route, agent, timeout)
	}
	if refusal != nil {
		release()
		if stream != nil {
			stream.Close()
		}
		if r.Context().Err() != nil {
			return outcomeCancelled, agent, nil
		}
		return refuse(refusal)
	}
	entry.Status = http.StatusOK
	scraper, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		release()
		stream.Close()
		return refuse(protocol.Refusef(http.StatusInternalServerError, protocol.CodeBadRequest, "CONNECT: %v", err))
	}
	if !s.sessions.begin() { // the proxy has stopped
		release()
		stream.Close()
		scraper.Close()
		return outcomeCancelled, agent, nil
	}
	t := &tunnel{agent: agent.Name, conn: conn, stream: stream, scraper: scraper, identity: s.identity(r)}
	s.mu.Lock()
	s.tunnels[t] = struct{}{}
	s.mu.Unlock()
	return outcomeOK, agent, func() int64 {
		defer s.sessions.group.Done()
		defer release()
		defer func() {
			s.mu.Lock()
			delete(s.tunnels, t)
			s.mu.Unlock()
		}()
		scraper.SetDeadline(time.Now().Add(timeout))
		established := "HTTP/1.1 200 Connection established\r\n"
		if passedOn(r) {
			established += cluster.HeaderPeer + ": " + s.id + "\r\n"
		}
		_, err := io.WriteString(scraper, established+"\r\n")
		if err == nil {
			err = protocol.PassAhead(scraper, ahead)
		}
		if err == nil {
			err = protocol.PassAhead(stream, buffered.Reader)
		}
		if err != nil {
			protocol.Reset(scraper)
			protocol.Reset(stream)
			return 0
		}
		scraper.SetDeadline(time.Time{})
		n, err := protocol.Splice(scraper, stream, s.config.ConnectIdleTimeout)
		s.metrics.bytes.Add(float64(n))
		if err != nil {
			s.logger.Debug("CONNECT tunnel ended", "target", r.RequestURI, "agent", agent.Name, "err", err)
		}
		return n
	}
}

// dialAgent opens a stream and has the agent connect to authority. It returns
// the stream, and the reader that may hold what the target said already.
func (s *Server) dialAgent(ctx context.Context, conn *fleet.Conn, authority string, route fleet.Route, agent *fleet.Agent, timeout time.Duration) (farEnd, *bufio.Reader, *protocol.Refusal) {
	opened, err := conn.Session.Open(ctx)
	if err != nil {
		return nil, nil, s.explain(ctx, err, route, agent, conn, timeout)
	}
	stream := opened.(*protocol.Stream)
	stop := context.AfterFunc(ctx, func() { stream.Close() })
	head := &io.LimitedReader{R: stream, N: 64 << 10}
	r := bufio.NewReader(head)
	_, err = fmt.Fprintf(stream, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", authority, authority)
	var resp *http.Response
	if err == nil {
		resp, err = http.ReadResponse(r, &http.Request{Method: http.MethodConnect})
	}
	var refusal *protocol.Refusal
	switch {
	case err != nil:
		refusal = s.explain(ctx, err, route, agent, conn, timeout)
	case resp.StatusCode == http.StatusOK:
		if stop() {
			return stream, r, nil
		}
		refusal = s.timedOut(route, agent, timeout)
	case resp.Header.Get(protocol.HeaderError) != "":
		refusal = agentRefusal(resp)
	default:
		refusal = protocol.Refusef(http.StatusBadGateway, protocol.CodeBadResponse, "agent %q answered CONNECT with %s", agent.Name, resp.Status)
	}
	stop()
	stream.Close()
	return nil, nil, refusal
}

// closeTunnels closes CONNECT tunnels as they fall silent for a second, until
// none is left that match selects, or ctx ends.
func (s *Server) closeTunnels(ctx context.Context, match func(*tunnel) bool) {
	for {
		left := 0
		s.mu.Lock()
		for t := range s.tunnels {
			if !match(t) {
				continue
			}
			left++
			if t.stream.Idle() >= time.Second || ctx.Err() != nil {
				t.stream.Close()
				t.scraper.Close()
			}
		}
		s.mu.Unlock()
		if left == 0 || ctx.Err() != nil {
			return
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}
