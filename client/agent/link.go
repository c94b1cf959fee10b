package agent

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

const (
	// stableAfter is how long a session has to hold for the backoff to start anew.
	stableAfter = 30 * time.Second
	// slowWait is the mean wait after an answer that only a person can change.
	slowWait = 30 * time.Second
	// takenWait is the mean wait after "another live agent has your name".
	takenWait = 10 * time.Second
	// registerTimeout bounds a registration.
	registerTimeout = 15 * time.Second
	// drainTimeout bounds the word to the proxy that the agent goes.
	drainTimeout = 3 * time.Second
	// repeatLog is how often a failure that stays the same is logged again.
	repeatLog = 10 * time.Minute
)

// link keeps one session to one proxy.
type link struct {
	agent *Agent
	url   *ProxyURL
	label string // the URL without credentials
	// address is the one of the URL's host that this link is for; the zero value where
	// it is for all of them.
	address netip.Addr
	stop    context.CancelFunc
	logger  func() *slog.Logger

	connected atomic.Bool
	second    atomic.Pointer[link]   // has a session to the same proxy, so this link waits
	poller    atomic.Pointer[poller] // while there is no session, and polls are in its stead
	polled    atomic.Bool            // a poller was of use once

	wake        chan struct{} // cuts a wait short
	registering sync.Mutex    // held during a registration in place

	mu      sync.Mutex // protects what follows
	session *protocol.Session

	lastFailure string // of run only
	lastLogged  time.Time
}

func newLink(a *Agent, u *ProxyURL, address netip.Addr) *link {
	l := &link{agent: a, url: u, label: u.Redacted(), address: address, wake: make(chan struct{}, 1)}
	if address.IsValid() {
		l.label += " at " + address.String()
	}
	l.logger = func() *slog.Logger { return a.current.Load().Logger.With("proxy", l.label) }
	return l
}

// run dials, serves, and dials again, until ctx ends.
func (l *link) run(ctx context.Context) {
	bound := time.Duration(0) // of the next wait; 0: start anew
	dialer := l.agent.dialer(l.url)
	if l.address.IsValid() {
		dialer.Host = l.address.String()
	}
	for ctx.Err() == nil {
		snap := l.agent.current.Load()
		l.agent.update(dialer)
		var session *protocol.Session
		var err error
		if snap.Protocol != ProtocolPushProx {
			session, err = l.connect(ctx, dialer, snap)
		}
		if snap.Protocol == ProtocolPushProx || snap.Protocol == ProtocolAuto && wantsPolls(err) {
			before, since := err, time.Now()
			if session, err = l.poll(ctx, dialer, snap, before); err == errStartAgain {
				bound = 0
				continue
			}
			if time.Since(since) >= stableAfter {
				bound = 0
			}
		}
		wait := time.Duration(0) // at least
		if err == nil {
			since := time.Now()
			wait = l.serve(ctx, session, snap)
			if ctx.Err() != nil {
				return
			}
			if time.Since(since) >= stableAfter {
				bound = 0
			}
		} else {
			if ctx.Err() != nil {
				return
			}
			wait = l.failed(err)
		}
		if bound == 0 {
			bound = snap.RetryInitialWait
		} else {
			bound = min(bound*3/2, snap.RetryMaxWait)
		}
		if wait == 0 {
			wait = rand.N(bound) // full jitter
		}
		select {
		case <-ctx.Done():
		case <-l.wake:
			bound = 0
		case <-time.After(wait):
		}
	}
}

// errSameProxy: two URLs lead to one proxy.
type errSameProxy struct{ link *link }

func (e errSameProxy) Error() string {
	if e.link.address.IsValid() {
		return "this address leads to the same proxy as " + e.link.label + ", which has a session already"
	}
	return "this is the same proxy as " + e.link.label + ", which has a session already; remove one of the two --proxy-url"
}

// connect dials and registers.
func (l *link) connect(ctx context.Context, dialer *protocol.Dialer, snap *snapshot) (*protocol.Session, error) {
	session, err := dialer.Dial(ctx)
	if err != nil {
		result := "handshake-failed"
		if snap.Protocol == ProtocolAuto && wantsPolls(err) {
			result = "no-tunnel"
		}
		l.agent.metrics.connects.WithLabelValues(l.label, result).Inc()
		return nil, err
	}
	if other := l.agent.hold(session.Proxy, l); other != nil {
		session.Close()
		l.agent.metrics.connects.WithLabelValues(l.label, "same-proxy").Inc()
		return nil, errSameProxy{other}
	}
	rctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	if err := session.Register(rctx, &snap.registration); err != nil {
		if ended := session.Err(); ended != nil {
			err = ended
		}
		session.Close()
		l.agent.release(session.Proxy, l)
		l.agent.metrics.connects.WithLabelValues(l.label, "registration-failed").Inc()
		return nil, &registrationError{err}
	}
	l.agent.metrics.connects.WithLabelValues(l.label, "ok").Inc()
	return session, nil
}

type registrationError struct{ err error }

func (e *registrationError) Error() string { return "registration: " + e.err.Error() }
func (e *registrationError) Unwrap() error { return e.err }

// failed logs why there is no session, once as long as the reason stays the
// same, and returns how long to wait at least; 0 leaves it to the backoff.
func (l *link) failed(err error) time.Duration {
	wait, hint := time.Duration(0), ""
	var same errSameProxy
	if refusal, ok := protocol.AsRefusal(err); ok {
		switch refusal.Status {
		case http.StatusUnauthorized, http.StatusForbidden:
			wait, hint = slowly(slowWait), "the proxy does not take this agent's credentials for this name; see its configuration"
		case http.StatusBadRequest, http.StatusUpgradeRequired, http.StatusRequestEntityTooLarge:
			wait = slowly(slowWait)
		case http.StatusConflict:
			hint = "choose another --fqdn, or stop the other agent"
			if !l.polled.Load() { // the proxy may have yet to see that this agent's poll is gone
				wait = slowly(takenWait)
			}
		case http.StatusTooManyRequests, http.StatusServiceUnavailable:
			if refusal.RetryAfter > 0 {
				wait = refusal.RetryAfter + rand.N(refusal.RetryAfter/2+time.Second)
			}
		case http.StatusNotFound:
			hint = "is there a culvert-proxy at this URL? with --agent.listen-address it takes agents on that port only"
		}
	} else if errors.As(err, &same) {
		wait = slowly(slowWait)
		l.second.Store(same.link)
		l.agent.pushes.Load().changed()
	}
	// Something between us answered. Where that is for a pushprox-proxy that restarts, its
	// clients try again soon.
	if refusal, ok := protocol.AsRefusal(err); ok && refusal.Code == "" && !(l.polled.Load() && refusal.Status >= 500) {
		wait = max(wait, slowly(takenWait))
	}
	attrs := []any{"agent", l.agent.Name(), "err", err}
	if hint != "" {
		attrs = append(attrs, "hint", hint)
	}
	kind := err.Error()
	if op, ok := errors.AsType[*net.OpError](err); ok {
		kind = op.Op + ": " + op.Err.Error() // the ports differ each time
	}
	if same.link != nil && l.address.IsValid() { // two addresses of one host are nothing special
		l.lastFailure = kind
		l.logger().Debug("Not needed", attrs...)
		return wait
	}
	if kind != l.lastFailure || time.Since(l.lastLogged) > repeatLog {
		l.lastFailure, l.lastLogged = kind, time.Now()
		l.logger().Warn("Not connected", attrs...)
	} else {
		l.logger().Debug("Still not connected", attrs...)
	}
	return wait
}

// slowly returns mean ±50 %.
func slowly(mean time.Duration) time.Duration { return mean/2 + rand.N(mean) }

// serve answers scrapes until the session ends, the proxy drains it or ctx ends.
// snap is what was registered. It returns how long to wait before the next try, 0 for the backoff.
func (l *link) serve(ctx context.Context, session *protocol.Session, snap *snapshot) time.Duration {
	l.lastFailure = ""
	drained := make(chan protocol.Drain, 1)
	handler := &sessionHandler{agent: l.agent, drained: drained}
	server := &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 10 * time.Second,
		// "OPTIONS *" is a scrape of nothing like any other.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(l.logger().Handler(), slog.LevelDebug),
	}
	l.agent.tasks.Go(func() { server.Serve(session.Listener()) })
	l.setSession(session)
	if now := l.agent.current.Load(); now != snap {
		l.reload(snap, now) // a reload that found no session here
	}
	l.logger().Info("Connected", "agent", session.Agent, "transport", session.Transport)

	select {
	case <-session.Done():
		l.setSession(nil)
		l.agent.release(session.Proxy, l)
		reason := session.Err()
		l.agent.metrics.reconnects.WithLabelValues(l.label, protocol.EndReason(reason)).Inc()
		l.logger().Info("Session lost", "agent", session.Agent, "reason", reason)
		server.Close()
		session.Close()
		return 0
	case d := <-drained:
		l.setSession(nil)
		l.agent.release(session.Proxy, l)
		l.agent.metrics.reconnects.WithLabelValues(l.label, "drained").Inc()
		l.logger().Info("The proxy drains this session", "agent", session.Agent, "reason", d.Reason)
		// What runs goes on beside the next session, until the proxy closes.
		l.agent.tasks.Go(func() {
			select {
			case <-session.Done():
				server.Close()
				session.Close()
			case <-ctx.Done():
				l.finish(session, server, handler)
			}
		})
		if spread := time.Duration(min(d.ReconnectAfterSeconds, 3600) * float64(time.Second)); spread > 0 {
			return 1 + rand.N(spread) // 0 would leave it to the backoff
		}
		return 0
	case <-ctx.Done():
		l.setSession(nil)
		l.agent.release(session.Proxy, l)
		drainCtx, cancel := context.WithTimeout(context.Background(), drainTimeout)
		defer cancel()
		if err := session.SendDrain(drainCtx, protocol.Drain{Reason: "shutdown"}); err != nil {
			l.logger().Debug("The proxy did not take the drain", "err", err)
		}
		l.finish(session, server, handler)
		l.logger().Info("Disconnected", "agent", session.Agent)
		return 0
	}
}

// finish lets running scrapes end, for at most ShutdownTimeout, and closes the
// session once the proxy has all of them.
func (l *link) finish(session *protocol.Session, server *http.Server, handler *sessionHandler) {
	timeout := l.agent.current.Load().ShutdownTimeout
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	idle := make(chan struct{})
	l.agent.tasks.Go(func() { // ends with the session at the latest
		handler.running.Wait() // the proxy closes CONNECT tunnels as they fall silent
		close(idle)
	})
	err := server.Shutdown(ctx)
	select {
	case <-idle:
		// The answer comes behind all data: a close before it could reset the
		// connection, and take along what is still in the kernel's buffer.
		session.Ping(ctx)
	case <-session.Done():
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		l.logger().Warn("Scrapes were cut off", "timeout", timeout)
	}
	server.Close()
	session.Close()
}

// nudge cuts the wait before the next try short.
func (l *link) nudge() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// polls reports whether the proxy takes polls now, in place of a session.
func (l *link) polls() bool {
	p := l.poller.Load()
	return p != nil && p.taken.Load()
}

func (l *link) setSession(s *protocol.Session) {
	l.mu.Lock()
	l.session = s
	l.mu.Unlock()
	l.connected.Store(s != nil)
	l.agent.pushes.Load().changed()
}

func (l *link) currentSession() *protocol.Session {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.session
}

// reload brings the registration up to date.
func (l *link) reload(old, new *snapshot) {
	session := l.currentSession()
	if session == nil {
		l.nudge() // the reason of the failure may be gone
		return
	}
	if old.name != new.name {
		session.Close() // the name is the session's; run dials again
		return
	}
	l.agent.tasks.Go(func() {
		l.registering.Lock()
		defer l.registering.Unlock()
		// Of reloads that follow each other the last one counts.
		latest := l.agent.current.Load()
		ctx, cancel := context.WithTimeout(l.agent.running, registerTimeout)
		defer cancel()
		if err := session.Register(ctx, &latest.registration); err != nil {
			l.logger().Error("The proxy refused the new registration, the old one stays there", "err", err)
			return
		}
		l.logger().Info("Registration updated")
	})
}
