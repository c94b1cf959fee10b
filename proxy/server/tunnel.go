package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/access"
	"github.com/culvert-io/culvert/proxy/fleet"
)

const (
	// registerTimeout is how long a session may live without a registration.
	registerTimeout = 20 * time.Second
	// busyRetry and drainRetry are the Retry-After of 429 and 503. A proxy that
	// restarts is back soon: of its agents half would try too early for the new one.
	busyRetry, drainRetry = 2 * time.Second, 2 * time.Second
	// leaveTimeout bounds the wait for the answer to a leave to get through.
	leaveTimeout = 5 * time.Second
	// drainedGrace is how long after the longest scrape a session that its agent has
	// drained may live.
	drainedGrace = 10 * time.Second
)

// serveTunnel answers GET /tunnel, and serves the session.
func (s *Server) serveTunnel(w http.ResponseWriter, r *http.Request) {
	transport, refusal := protocol.CheckUpgrade(r)
	if refusal == nil {
		refusal = s.admit(r)
	}
	var identity *access.Identity
	if refusal == nil {
		identity, refusal = s.admitAgent(r)
	}
	if refusal != nil {
		s.metrics.handshakes.WithLabelValues(string(refusal.Code)).Inc()
		s.refuse(w, r, refusal)
		return
	}
	name, from := protocol.NormalizeName(r.Header.Get(protocol.HeaderAgent)), s.access.Address(r)
	displaced, refusal := s.admission.enter(name, from)
	if refusal != nil {
		s.metrics.handshakes.WithLabelValues(string(refusal.Code)).Inc()
		s.refuse(w, r, refusal)
		return
	}
	if displaced != nil {
		s.logger.Debug("No registration came, and others wait", "agent", displaced.Agent, "from", displaced.RemoteAddr)
		s.sessions.start(func() { displaced.Close() }) // it may wait for a stuck write
	}
	session, err := protocol.Accept(w, r, transport, s.id, s.config.Session)
	if err != nil {
		s.admission.fails(name)
		s.metrics.handshakes.WithLabelValues("failed").Inc()
		s.logger.Debug("Handshake failed", "from", r.RemoteAddr, "err", err)
		return
	}
	s.metrics.handshakes.WithLabelValues(outcomeOK).Inc()
	conn := &agentConn{Conn: fleet.NewConn(session), from: from, begin: time.Now(), turn: make(chan struct{}, 1)}
	conn.identity.Store(identity)
	conn.key = r.Header.Get(protocol.HeaderKey)
	s.mu.Lock()
	if s.conns == nil || !s.sessions.begin() {
		s.mu.Unlock()
		s.admission.fails(name)
		session.Close()
		return
	}
	s.conns[conn] = struct{}{}
	s.mu.Unlock()
	s.admission.begins(conn)
	s.expireAfter(conn, registerTimeout)
	// No goroutine of the session's own waits for its streams and its end: of
	// thousands, nearly all have nothing to do.
	session.AfterEnd(func() {
		defer s.sessions.group.Done()
		s.sessionEnded(conn)
	})
	session.Handle(func(stream *protocol.Stream) { s.agentStreams.pass(agentStream{stream, conn}) })
}

// admit checks what the handshake says of the agent.
func (s *Server) admit(r *http.Request) *protocol.Refusal {
	if r.ContentLength != 0 { // what follows would be taken for frames
		return protocol.Refusef(http.StatusBadRequest, protocol.CodeInvalid, "the request for a tunnel has a body; send it without one")
	}
	if s.draining.Load() {
		refusal := protocol.Refusef(http.StatusServiceUnavailable, protocol.CodeDraining, "this proxy is going away")
		refusal.RetryAfter = drainRetry
		return refusal
	}
	name := protocol.NormalizeName(r.Header.Get(protocol.HeaderAgent))
	if err := protocol.CheckName(name); err != nil {
		return protocol.Refusef(http.StatusBadRequest, protocol.CodeInvalid, "%s: %v", protocol.HeaderAgent, err)
	}
	instance := r.Header.Get(protocol.HeaderInstance)
	if instance == "" || len(instance) > 64 || strings.Trim(instance, "0123456789abcdefABCDEF-") != "" {
		return protocol.Refusef(http.StatusBadRequest, protocol.CodeInvalid, "%s: use 1 to 64 hexadecimal digits", protocol.HeaderInstance)
	}
	return nil
}

// agentConn is a session while it is served.
type agentConn struct {
	*fleet.Conn
	from       netip.Prefix  // see access.Authenticator.Address
	begin      time.Time     // of the session
	placed     bool          // has one of admission.places
	registered atomic.Bool   // changed by who has the turn
	turn       chan struct{} // of one registration at a time
	relays     atomic.Int32  // those that run
	identity   atomic.Pointer[access.Identity]
	key        string      // the agent's own, "" for none
	unchecked  atomic.Bool // a reload may have come in the middle of the registration

	expiring sync.Mutex  // protects expire
	expire   *time.Timer // ends the session that doesn't register, or was drained; nil: it may stay
}

// expireAfter closes the session after d, or, where d is 0, lets it stay.
func (s *Server) expireAfter(conn *agentConn, d time.Duration) {
	conn.expiring.Lock()
	defer conn.expiring.Unlock()
	if conn.expire != nil {
		conn.expire.Stop()
		conn.expire = nil
	}
	if d > 0 {
		conn.expire = time.AfterFunc(d, func() {
			s.logger.Debug("No registration came, or the agent left a drained session open", "agent", conn.Agent, "from", conn.RemoteAddr)
			conn.Close()
		})
	}
}

type connKey struct{}

// agentStream is a stream that an agent has opened.
type agentStream struct {
	*protocol.Stream
	conn *agentConn
}

// streamListener passes the streams of all sessions to one http.Server.
type streamListener struct {
	streams chan agentStream
	once    sync.Once
	closed  chan struct{}
}

func newStreamListener() *streamListener {
	return &streamListener{streams: make(chan agentStream), closed: make(chan struct{})}
}

func (l *streamListener) pass(stream agentStream) {
	select {
	case l.streams <- stream:
	case <-l.closed:
		stream.Close()
	}
}

func (l *streamListener) Accept() (net.Conn, error) {
	select {
	case stream := <-l.streams:
		return stream, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *streamListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *streamListener) Addr() net.Addr { return &net.UnixAddr{Name: "tunnels", Net: "culvert"} }

// sessionEnded clears up behind a session.
func (s *Server) sessionEnded(conn *agentConn) {
	s.expireAfter(conn, 0)
	registered := conn.isRegistered()
	s.admission.ends(conn)
	reason := conn.Err()
	if s.fleet.Lost(conn.Conn, reason.Error()) && !s.draining.Load() {
		s.logger.Info("Agent lost", "agent", conn.Agent, "from", conn.RemoteAddr, "reason", reason)
	}
	if registered {
		s.metrics.ended.WithLabelValues(protocol.EndReason(reason)).Inc()
	}
	conn.CloseIdleConnections()
	conn.Close()
	s.mu.Lock()
	delete(s.conns, conn)
	s.mu.Unlock()
}

func (c *agentConn) isRegistered() bool {
	c.turn <- struct{}{}
	defer func() { <-c.turn }()
	return c.registered.Load()
}

// serveAgent answers the requests of an agent. All of them are control, or pushes.
func (s *Server) serveAgent(w http.ResponseWriter, r *http.Request) {
	conn := r.Context().Value(connKey{}).(*agentConn)
	if r.ContentLength != 0 {
		http.NewResponseController(w).SetReadDeadline(time.Now().Add(registerTimeout))
	}
	defer finish(w)
	route := r.Method + " " + r.URL.Path
	if !protocol.IsControl(r) {
		route = ""
	}
	switch route {
	case "PUT " + protocol.PathRegistration:
		s.register(w, r, conn)
	case "DELETE " + protocol.PathRegistration:
		s.leave(w, r, conn)
	case "POST " + protocol.PathDrain:
		var d protocol.Drain
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<16)).Decode(&d); err != nil {
			protocol.Refusef(http.StatusBadRequest, protocol.CodeInvalid, "drain: %v", err).Write(w)
			return
		}
		if s.fleet.Lost(conn.Conn, "it said: "+clip(d.Reason, 100)) {
			s.logger.Info("Agent leaves", "agent", conn.Agent, "from", conn.RemoteAddr, "reason", clip(d.Reason, 100))
		}
		w.WriteHeader(http.StatusNoContent)
		s.sessions.start(func() {
			ctx, cancel := context.WithTimeout(context.Background(), s.config.ShutdownTimeout)
			defer cancel()
			s.closeTunnels(ctx, func(t *tunnel) bool { return t.conn == conn.Conn })
		})
		if conn.registered.Load() {
			// It is the agent's to close, when scrapes that run now have ended at the latest.
			s.expireAfter(conn, s.config.MaxTimeout+drainedGrace)
		}
	default:
		if s.relay(w, r, conn) {
			return
		}
		protocol.Refusef(http.StatusNotFound, protocol.CodeNotFound, "%s %s: this proxy knows no such control request", r.Method, r.RequestURI).Write(w)
	}
}

func clip(s string, n int) string {
	if len(s) > n {
		s = s[:n] + "…"
	}
	return s
}

// register takes a registration, one at a time for each session.
func (s *Server) register(w http.ResponseWriter, r *http.Request, conn *agentConn) {
	reg, err := decodeRegistration(w, r)
	if err == nil {
		err = s.mayRegister(conn, &reg)
	}
	if !conn.registered.Load() {
		s.admission.asks(conn)
		defer func() { s.admission.answered(conn, conn.registered.Load()) }()
	}
	select {
	case conn.turn <- struct{}{}:
	case <-r.Context().Done():
		return
	}
	defer func() { <-conn.turn }()
	check := r.URL.RawQuery == protocol.QueryCheck
	switch {
	case err != nil:
	case check:
		err = s.fleet.Check(r.Context(), conn.Conn, reg)
	default:
		if err = s.fleet.Register(r.Context(), conn.Conn, reg); err == nil {
			err = s.pin(conn)
		}
	}
	if err != nil {
		refusal, ok := protocol.AsRefusal(err)
		if !ok {
			refusal = protocol.Refusef(http.StatusServiceUnavailable, protocol.CodeUnavailable, "registration of %q: %v", conn.Agent, err)
		}
		s.metrics.registrations.WithLabelValues(string(refusal.Code)).Inc()
		s.logger.Debug("Registration refused", "agent", conn.Agent, "from", conn.RemoteAddr, "reason", refusal)
		refusal.Write(w)
		return
	}
	if !check {
		s.expireAfter(conn, 0)
		conn.unchecked.Store(true)
		s.metrics.registrations.WithLabelValues(outcomeOK).Inc()
	}
	if !check && !conn.registered.Load() {
		conn.registered.Store(true)
		s.logger.Info("Agent connected", "agent", conn.Agent, "from", conn.RemoteAddr, "version", clip(reg.Version, 40), "transport", conn.Transport)
		s.sessions.start(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if rtt, err := conn.Session.Ping(ctx); err == nil {
				s.metrics.rtt.Observe(rtt.Seconds())
			}
		})
	}
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintln(w, "{}")
}

func decodeRegistration(w http.ResponseWriter, r *http.Request) (reg protocol.Registration, err error) {
	err = json.NewDecoder(http.MaxBytesReader(w, r.Body, protocol.MaxRegistrationBytes)).Decode(&reg)
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return reg, protocol.Refusef(http.StatusRequestEntityTooLarge, protocol.CodeTooLarge, "the registration is larger than %d bytes", protocol.MaxRegistrationBytes)
	}
	if err != nil {
		return reg, protocol.Refusef(http.StatusBadRequest, protocol.CodeInvalid, "registration: %v", err)
	}
	for i := range reg.Hosts {
		reg.Hosts[i] = protocol.NormalizeName(reg.Hosts[i])
	}
	// The decoder leaves room for more in each slice, and thousands are kept.
	reg.Targets, reg.Hosts, reg.Capabilities = slices.Clone(reg.Targets), slices.Clone(reg.Hosts), slices.Clone(reg.Capabilities)
	return reg, nil
}

// leave forgets the agent on its own wish.
func (s *Server) leave(w http.ResponseWriter, r *http.Request, conn *agentConn) {
	switch err := s.fleet.Leave(r.Context(), conn.Conn); {
	case errors.Is(err, fleet.ErrUnknown):
		protocol.Refusef(http.StatusNotFound, protocol.CodeUnregistered, "no agent %q is known here", conn.Agent).Write(w)
	case errors.Is(err, fleet.ErrConnected):
		protocol.Refusef(http.StatusConflict, protocol.CodeTaken, "agent %q is connected, and would come back at once; stop it first", conn.Agent).Write(w)
	case err != nil:
		protocol.Refusef(http.StatusServiceUnavailable, protocol.CodeUnavailable, "leave: %v", err).Write(w)
	default:
		s.release(conn.Agent)
		s.logger.Info("Agent left for good", "agent", conn.Agent, "from", conn.RemoteAddr)
		w.WriteHeader(http.StatusNoContent)
		http.NewResponseController(w).Flush()
		s.sessions.start(func() {
			ctx, cancel := context.WithTimeout(context.Background(), leaveTimeout)
			defer cancel()
			conn.Session.Ping(ctx) // comes back behind the answer
			conn.Close()
		})
	}
}
