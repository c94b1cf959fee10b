package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-io/culvert/client/spool"
	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/protocol"
)

// firstCursor is the name of the one cursor of RelayFirst.
const firstCursor = "first"

const (
	// A relay without an answer, or with one that says to try again, waits for a random
	// part of a bound, at least half of it. The bound doubles from the first to the last.
	firstRelayWait, maxRelayWait = 500 * time.Millisecond, 30 * time.Second
	// maxRetryAfter bounds what a proxy may ask for with Retry-After.
	maxRetryAfter = time.Hour
	// A try may take relayTimeout, and longer with a large body: relayRate is what the
	// slowest way to a proxy takes, in bytes a second.
	relayTimeout, relayRate = time.Minute, 64 << 10
	// maxRelayAnswer is how many bytes of an answer are read for its reason.
	maxRelayAnswer = 2 << 10
)

// relay sends the pushes of one cursor to a proxy, in order, one at a time.
type relay struct {
	pushes *pushes
	spool  *spool.Spool
	cursor *spool.Cursor
	name   string // of the cursor: a proxy's URL without credentials, or firstCursor
	stop   context.CancelFunc
	done   chan struct{}
	wake   chan struct{} // sessions have changed

	// Of run alone.
	session  *protocol.Session
	proxy    string // that session leads to
	client   *http.Transport
	hangUp   context.CancelFunc // of client
	waiting  string             // why nothing goes on, as it was logged
	waitedAt time.Time
}

func startRelay(p *pushes, s *spool.Spool, cursor *spool.Cursor, name string) *relay {
	ctx, cancel := context.WithCancel(p.relaying)
	r := &relay{pushes: p, spool: s, cursor: cursor, name: name, stop: cancel, done: make(chan struct{}), wake: make(chan struct{}, 1)}
	go func() {
		defer close(r.done)
		r.run(ctx)
		r.disconnect()
	}()
	return r
}

// nudge has the relay look for its session.
func (r *relay) nudge() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *relay) run(ctx context.Context) {
	bound := firstRelayWait
	for {
		push, err := r.cursor.Next(ctx)
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, spool.ErrNoCursor) {
				r.logger().Error("Pushes are not relayed any more", "err", err)
			}
			return
		}
		select {
		case <-r.wake: // of the sessions that connect sees
		default:
		}
		if r.connect() {
			bound = firstRelayWait
		}
		wait := time.Duration(-1) // until there is a session
		if r.session != nil {
			answer, err := r.send(ctx, push)
			if ctx.Err() != nil {
				return
			}
			if err == nil && r.take(push, answer) {
				bound = firstRelayWait
				continue
			}
			wait = r.heldUp(answer, err)
			if wait == 0 {
				wait = bound/2 + rand.N(bound/2)
				bound = min(2*bound, maxRelayWait)
			}
		}
		r.cursor.SetAway(true)
		if !r.wait(ctx, wait) {
			return
		}
	}
}

// wait waits until there is another session, or none any more, and for at most the given
// time, where that is not negative. It returns false where ctx ended.
func (r *relay) wait(ctx context.Context, atMost time.Duration) bool {
	var timeout <-chan time.Time
	if atMost >= 0 {
		timeout = time.After(atMost)
	}
	for {
		select {
		case <-timeout:
			return true
		case <-r.wake: // may be of another proxy's session
			if session, _ := r.pushes.agent.sessionFor(r.name); session != r.session {
				return true
			}
		case <-ctx.Done():
			return false
		}
	}
}

// connect takes the session that is to be used now, and reports whether it is another
// one than before.
func (r *relay) connect() bool {
	session, proxy := r.pushes.agent.sessionFor(r.name)
	if session == r.session {
		return false
	}
	r.disconnect()
	if r.session, r.proxy = session, proxy; session == nil {
		return true
	}
	for _, outcome := range []string{"applied", "repeated", "refused", "too_large", "other"} {
		r.pushes.agent.metrics.relayed.WithLabelValues(proxy, outcome) // else increase() would not see the first
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.hangUp = cancel
	r.client = &http.Transport{
		// Not the transport's context, which outlives the request.
		DialContext:        func(context.Context, string, string) (net.Conn, error) { return session.Open(ctx) },
		MaxConnsPerHost:    1,
		IdleConnTimeout:    30 * time.Second, // the proxy closes after a minute
		DisableCompression: true,
	}
	return true
}

func (r *relay) disconnect() {
	if r.session != nil {
		r.hangUp()
		r.client.CloseIdleConnections()
		r.session = nil
	}
}

// sessionFor returns the session that a cursor's pushes go through, and the URL of its
// proxy without credentials. It is nil where there is none.
func (a *Agent) sessionFor(cursor string) (*protocol.Session, string) {
	snap := a.current.Load()
	a.mu.Lock()
	defer a.mu.Unlock()
	var links []*link
	for _, u := range snap.proxies {
		links = append(links, a.linksOf(u)...)
	}
	for _, l := range links {
		if cursor != firstCursor && l.label != cursor {
			continue
		}
		if session := l.currentSession(); session != nil {
			return session, l.label
		}
		// Of two URLs that lead to one proxy, one has the session. The proxy takes what
		// comes by both once.
		if twin := l.second.Load(); twin != nil {
			if session := twin.currentSession(); session != nil {
				return session, l.label
			}
		}
	}
	return nil, ""
}

// relayAnswer is what a proxy said to a push.
type relayAnswer struct {
	status     int
	repeated   bool
	reason     string
	retryAfter time.Duration // 0: it named none
}

// send relays a push once.
func (r *relay) send(ctx context.Context, push *spool.Push) (*relayAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, relayTimeout+time.Duration(len(push.Body)/relayRate)*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, push.Method, "http://tunnel"+push.Target, bytes.NewReader(push.Body))
	if err != nil {
		return nil, err
	}
	req.Header = push.Header.Clone()
	req.Header.Set(gateway.HeaderPushTime, unixSeconds(push.Received))
	req.Header.Set(gateway.HeaderPushID, r.spool.ID()+"/"+strconv.FormatUint(push.Seq, 10))
	resp, err := r.client.RoundTrip(req)
	if err != nil {
		if ended := r.session.Err(); ended != nil {
			err = ended
		}
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxRelayAnswer))
	if err != nil {
		return nil, err
	}
	answer := &relayAnswer{
		status:   resp.StatusCode,
		repeated: resp.Header.Get(gateway.HeaderPushRepeated) == "true",
		reason:   strings.Join(strings.Fields(strings.ToValidUTF8(string(text), "?")), " "),
	}
	if seconds, err := strconv.ParseUint(resp.Header.Get("Retry-After"), 10, 31); err == nil {
		answer.retryAfter = min(time.Duration(seconds)*time.Second, maxRetryAfter)
	}
	return answer, nil
}

// unixSeconds writes a time as Unix seconds with 9 decimals.
func unixSeconds(t time.Time) string {
	return fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond())
}

// take moves the cursor past a push that the proxy has, or will never take. It returns
// false where the push is to be sent again.
func (r *relay) take(push *spool.Push, answer *relayAnswer) bool {
	var outcome string
	switch status := answer.status; {
	case status/100 == 2 && answer.repeated:
		outcome = "repeated"
	case status/100 == 2:
		outcome = "applied"
	case isRetriable(status):
		return false
	case status == http.StatusRequestEntityTooLarge:
		outcome = "too_large"
	case status == http.StatusBadRequest:
		outcome = "refused"
	default: // a proxy of another version has a reason that is not known here
		outcome = "other"
	}
	if status := answer.status; status/100 != 2 {
		r.logger().Error("The proxy will never take a push: it was dropped", "to", r.proxy, "job", jobOf(push), "request", push.Method+" "+push.Target,
			"made", push.Received, "status", status, "reason", answer.reason)
	}
	r.pushes.agent.metrics.relayed.WithLabelValues(r.proxy, outcome).Inc()
	if r.waiting != "" {
		r.waiting = ""
		r.logger().Info("Pushes are relayed again", "to", r.proxy)
	}
	r.cursor.SetAway(false)
	r.cursor.Done(push.Seq)
	return true
}

// isRetriable reports whether a push that was answered so may be taken later, when
// somebody has changed something at the proxy.
func isRetriable(status int) bool {
	switch status {
	case http.StatusUnauthorized, http.StatusForbidden,
		http.StatusNotFound, http.StatusMethodNotAllowed, // an old proxy knows no relays
		http.StatusRequestTimeout, http.StatusConflict, http.StatusMisdirectedRequest, http.StatusTooEarly, http.StatusTooManyRequests:
		return true
	}
	return status/100 != 4
}

// heldUp logs why a push has to wait, once as long as the reason stays the same. It
// returns for how long, 0 leaves it to the backoff.
func (r *relay) heldUp(answer *relayAnswer, err error) (wait time.Duration) {
	reason, hint := "no_answer", ""
	attrs := []any{"to", r.proxy}
	if err != nil {
		attrs = append(attrs, "err", err)
	} else {
		switch status := answer.status; status {
		case http.StatusUnauthorized, http.StatusForbidden:
			reason, wait, hint = "forbidden", slowly(slowWait), "the proxy does not let this agent relay pushes; see its configuration"
		case http.StatusNotFound, http.StatusMethodNotAllowed:
			reason, wait, hint = "not_supported", slowly(slowWait), "this proxy takes no relayed pushes; it is older than this agent"
		case http.StatusTooManyRequests:
			reason = "busy"
		default:
			reason = "unavailable"
		}
		if answer.retryAfter > 0 {
			wait = answer.retryAfter + rand.N(answer.retryAfter/4+time.Second)
		}
		attrs = append(attrs, "status", answer.status, "reason", answer.reason)
	}
	r.pushes.agent.metrics.relayRetries.WithLabelValues(r.proxy, reason).Inc()
	if hint != "" {
		attrs = append(attrs, "hint", hint)
	}
	if r.session.Err() != nil {
		return 0 // the link tells of that
	}
	if r.waiting != reason || time.Since(r.waitedAt) > repeatLog {
		r.waiting, r.waitedAt = reason, time.Now()
		r.logger().Warn("Pushes wait in the spool", attrs...)
	} else {
		r.logger().Debug("Pushes still wait in the spool", attrs...)
	}
	return wait
}

// jobOf returns the job that a push is of, for the log.
func jobOf(push *spool.Push) string {
	u, err := url.ParseRequestURI(push.Target)
	if err != nil {
		return ""
	}
	rest, ok := strings.CutPrefix(u.Path, "/metrics/job")
	if !ok {
		return "(several)"
	}
	key, err := gateway.ParsePath(rest)
	if err != nil {
		return ""
	}
	job, _ := key.Get("job")
	return job
}

func (r *relay) logger() *slog.Logger { return r.pushes.agent.current.Load().Logger }
