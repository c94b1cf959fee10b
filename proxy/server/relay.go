package server

import (
	"net/http"
	"strings"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/protocol"
)

// maxRelays is how many relays of one session run at a time. With those of large bodies
// that are on their way, streams stay free for control: see SessionConfig.MaxAccepted.
const maxRelays = 4

// Outcomes of a relay, for metrics.
const (
	relayApplied     = "applied"
	relayRepeated    = "repeated"
	relayRefused     = "refused"
	relayUnavailable = "unavailable"
)

const batchPath = "/api/v1/push"

// cutPushPath returns what follows /metrics/job in the path of a push to a group.
func cutPushPath(path string) (rest string, ok bool) {
	rest, ok = strings.CutPrefix(path, "/metrics/job")
	return rest, ok && (strings.HasPrefix(rest, "/") || strings.HasPrefix(rest, "@base64/"))
}

// relay answers a push that an agent passes on, and returns false for other requests.
// It takes what names its groups: neither the wipe nor deletion by matcher.
func (s *Server) relay(w http.ResponseWriter, r *http.Request, conn *agentConn) bool {
	rest, isGroup := cutPushPath(r.URL.Path)
	if !protocol.IsControl(r) || !isGroup && r.URL.Path != batchPath {
		return false
	}
	leave := s.running.enter()
	defer leave()
	answer := &relayAnswer{ResponseWriter: w}
	if refusal := s.admitRelay(r, conn, isGroup); refusal != nil {
		if g := s.push.gateway.Load(); g != nil {
			g.TellSeq(answer, r)
		}
		refusal.Write(answer)
	} else {
		defer conn.relays.Add(-1)
		s.push.with(func(g *gateway.Gateway, w http.ResponseWriter, r *http.Request) {
			switch {
			case !isGroup:
				g.ServeBatch(w, r)
			case r.Method == http.MethodDelete:
				g.ServeDelete(w, r, rest)
			default:
				g.ServePush(w, r, rest)
			}
		})(answer, s.relayed(r, conn))
	}
	s.metrics.relayed.WithLabelValues(answer.outcome()).Inc()
	return true
}

// admitRelay takes one of the session's places for relays, or tells why not. An agent
// that is registered may relay pushes; of which jobs, relayed tells.
func (s *Server) admitRelay(r *http.Request, conn *agentConn, isGroup bool) *protocol.Refusal {
	switch {
	case r.Method == http.MethodPut, r.Method == http.MethodPost, r.Method == http.MethodDelete && isGroup:
	default:
		return protocol.Refusef(http.StatusMethodNotAllowed, protocol.CodeMethod, "%s %s: groups are relayed by PUT, POST and DELETE, batches by PUT and POST", r.Method, r.URL.Path)
	}
	if s.draining.Load() {
		refusal := protocol.Refusef(http.StatusServiceUnavailable, protocol.CodeDraining, "this proxy is going away; relay the push again later")
		refusal.RetryAfter = drainRetry
		return refusal
	}
	if !conn.registered.Load() {
		refusal := protocol.Refusef(http.StatusServiceUnavailable, protocol.CodeUnavailable, "agent %q is not registered here; register, and relay the push again", conn.Agent)
		refusal.RetryAfter = busyRetry
		return refusal
	}
	if conn.relays.Add(1) > maxRelays {
		conn.relays.Add(-1)
		refusal := protocol.Refusef(http.StatusTooManyRequests, protocol.CodeBusy, "%d relays of agent %q are running; relay the push again when one has ended", maxRelays, conn.Agent)
		refusal.RetryAfter = busyRetry
		return refusal
	}
	return nil
}

// relayAnswer keeps the status of an answer.
type relayAnswer struct {
	http.ResponseWriter
	status int // 0: 200
}

func (a *relayAnswer) WriteHeader(status int) {
	a.status = status
	a.ResponseWriter.WriteHeader(status)
}

// Unwrap is for http.ResponseController.
func (a *relayAnswer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *relayAnswer) outcome() string {
	switch {
	case a.status >= 500, a.status == http.StatusTooManyRequests, a.status == http.StatusRequestTimeout, a.status == http.StatusForbidden:
		return relayUnavailable
	case a.status >= 300:
		return relayRefused
	case a.Header().Get(gateway.HeaderPushRepeated) != "":
		return relayRepeated
	}
	return relayApplied
}
