// Package protocol is the tunnel between culvert-client and culvert-proxy: the
// upgrade that starts it, the session that carries it, and the few messages
// that both ends exchange on it. SPEC.md beside this file is the normative text.
//
// # Layout
//
// The agent dials out and asks for an upgrade of one HTTP/1.1 connection:
//
//	GET /tunnel HTTP/1.1
//	Connection: Upgrade
//	Upgrade: culvert/1
//	Culvert-Agent: web-1.example.net
//	Culvert-Instance: 6f1c…
//
// After "101 Switching Protocols" the connection carries yamux frames. Where
// something on the way refuses an unknown upgrade, the same frames travel in
// binary WebSocket messages of the subprotocol culvert.v1.
//
// Both ends speak HTTP/1.1 over the streams. A request whose target starts with
// "/" is control (registration, drain), or from the agent a push that it relays;
// one in absolute form, or CONNECT, is a scrape. Only the proxy sends scrapes.
//
// # Versions
//
//	1: upgrade, WebSocket fallback, registration, drain, leave, relayed pushes.
package protocol

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
)

// Version is the major version that this package speaks. It stands in the
// Upgrade token and in the WebSocket subprotocol.
const Version = 1

const (
	// UpgradeToken is the protocol asked for in the Upgrade header.
	UpgradeToken = "culvert/1"
	// Subprotocol is the WebSocket subprotocol of the fallback.
	Subprotocol = "culvert.v1"
)

// Paths of control requests.
const (
	// PathTunnel is where the agent asks the proxy for the upgrade.
	PathTunnel = "/tunnel"
	// PathRegistration takes PUT (register, or replace the registration in
	// place) and DELETE (leave) from the agent, on the session.
	PathRegistration = "/v1/registration"
	// QueryCheck is the query of a PUT that is answered and has no effect.
	QueryCheck = "check=true"
	// PathDrain takes POST from either end, on the session.
	PathDrain = "/v1/drain"
)

// Header fields.
const (
	HeaderAgent    = "Culvert-Agent"    // the agent's name
	HeaderInstance = "Culvert-Instance" // random per agent process
	HeaderKey      = "Culvert-Key"      // the agent's own secret, which its name is pinned to
	HeaderProxy    = "Culvert-Proxy"    // random per proxy process
	HeaderError    = "Culvert-Error"    // one of the Code constants
	HeaderMessage  = "Culvert-Message"  // goes with it: the body's text in one line, for HEAD and reason phrases
)

// Code is the machine-readable reason of a refusal, sent in Culvert-Error.
type Code string

// Codes that answer the upgrade and the registration.
const (
	CodeNoUpgrade    Code = "no-upgrade"    // 400: the Upgrade header got lost on the way
	CodeInvalid      Code = "invalid"       // 400: a field of the request is malformed
	CodeUnauthorized Code = "unauthorized"  // 401, 407 for a scrape: no or wrong credentials
	CodeForbidden    Code = "forbidden"     // 403: not for this name, host or label, or not to be scraped by who asks
	CodeTaken        Code = "taken"         // 409: a live agent with another instance has the name
	CodeCollision    Code = "collision"     // 409: a name is another agent's, its target's or its host's
	CodeVersion      Code = "version"       // 426: the Upgrade header names another version
	CodeBusy         Code = "busy"          // 429: too many handshakes at once
	CodeDraining     Code = "draining"      // 503: the proxy is going away
	CodeUnregistered Code = "unregistered"  // 404: DELETE of a registration that is not there
	CodeNotFound     Code = "not-found"     // 404: no such control request
	CodeUnavailable  Code = "unavailable"   // 503: the proxy can't keep the registration now
	CodeTooLarge     Code = "too-large"     // 413: the registration's body is over MaxRegistrationBytes
	CodeMethod       Code = "wrong-method"  // 405
	CodeMismatch     Code = "name-mismatch" // 421: the agent does not answer for the name in the request
)

// Codes that answer a scrape.
const (
	CodeUnknownAgent      Code = "unknown-agent"      // 404
	CodeAgentOffline      Code = "agent-offline"      // 503
	CodeNotAllowed        Code = "not-allowed"        // 403
	CodeTargetUnreachable Code = "target-unreachable" // 502
	CodeTimeout           Code = "timeout"            // 504
	CodeAgentBusy         Code = "agent-busy"         // 429
	CodeMisdirected       Code = "misdirected"        // 421
	CodeBadResponse       Code = "bad-response"       // 502: the tunnel brought a response without an end mark
	CodeSessionLost       Code = "session-lost"       // 502: the session died before the response's head
	CodePeerUnreachable   Code = "peer-unreachable"   // 502: the proxy that holds the agent can't be reached
	CodeBadRequest        Code = "bad-request"        // 400: the scrape itself is malformed
)

// Limits, on both ends.
const (
	// MaxRegistrationBytes bounds the JSON body of a registration.
	MaxRegistrationBytes = 1 << 20
	// MaxTargets bounds the named targets of one agent.
	MaxTargets = 1000
	// MaxHosts bounds the hosts that one agent answers for.
	MaxHosts = 1000
	// MaxLabels bounds the labels of an agent or a target.
	MaxLabels = 64
	// MaxLabelValueBytes bounds one label value.
	MaxLabelValueBytes = 1024
)

// Refusal is an answer that says no: to an upgrade, a registration or a scrape.
// It travels as a status, a Culvert-Error header and a plain text body.
type Refusal struct {
	Status     int
	Code       Code
	Message    string
	RetryAfter time.Duration // 0 where the answer names none
}

// Error returns the code and the message.
func (r *Refusal) Error() string {
	if r.Code == "" {
		return fmt.Sprintf("%d: %s", r.Status, r.Message)
	}
	return fmt.Sprintf("%d %s: %s", r.Status, r.Code, r.Message)
}

// Refusef returns a refusal with a formatted message.
func Refusef(status int, code Code, format string, args ...any) *Refusal {
	return &Refusal{Status: status, Code: code, Message: fmt.Sprintf(format, args...)}
}

// AsRefusal returns the refusal in err's chain, if there is one.
func AsRefusal(err error) (*Refusal, bool) {
	return errors.AsType[*Refusal](err)
}

// Write sends the refusal as a response.
func (r *Refusal) Write(w http.ResponseWriter) {
	r.SetHeader(w.Header())
	w.WriteHeader(r.Status)
	fmt.Fprintln(w, r.Message)
}

// SetHeader sets the header fields that go with the refusal.
func (r *Refusal) SetHeader(h http.Header) {
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set(HeaderError, string(r.Code))
	h.Set(HeaderMessage, oneLine(r.Message))
	if r.Status == http.StatusUpgradeRequired {
		h.Set("Connection", "Upgrade")
		h.Set("Upgrade", UpgradeToken)
	}
	if r.RetryAfter > 0 {
		h.Set("Retry-After", fmt.Sprint(int((r.RetryAfter+time.Second-1)/time.Second)))
	}
}

// Reason returns the refusal as a reason phrase (RFC 9112, section 4): one line
// of printable ASCII, at most 400 bytes. Prometheus shows it as the scrape error.
func (r *Refusal) Reason() string {
	reason := oneLine(string(r.Code) + ": " + r.Message)
	if len(reason) > 400 {
		reason = reason[:397] + "..."
	}
	return reason
}

// oneLine replaces what a header field or a reason phrase can't carry.
func oneLine(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' {
			return '?'
		}
		return c
	}, s)
}

// scrapeCodes are the codes that a scrape's refusal can have.
var scrapeCodes = []Code{
	CodeUnknownAgent, CodeAgentOffline, CodeNotAllowed, CodeTargetUnreachable, CodeTimeout, CodeAgentBusy, CodeMisdirected, CodeBadResponse,
	CodeSessionLost, CodeBadRequest, CodeMismatch, CodeMethod, CodeUnauthorized, CodeForbidden, CodePeerUnreachable,
}

// Outcome returns the code as the value of a metric's label: "other" for one that
// is not known here, so that the other side can't make series.
func (c Code) Outcome() string {
	if slices.Contains(scrapeCodes, c) {
		return string(c)
	}
	return "other"
}

// IsControl tells a control request (origin form) from a scrape (absolute form
// or CONNECT) by the first byte of the request target.
func IsControl(r *http.Request) bool {
	return strings.HasPrefix(r.RequestURI, "/")
}
