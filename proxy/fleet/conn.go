package fleet

import (
	"context"
	"net/http"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// Kinds of agents.
const (
	KindCulvert  = "culvert"  // culvert-client, by a session
	KindPushProx = "pushprox" // a client of PushProx, by its polls
)

// Link carries scrapes to a connected agent. All methods may be called at the same time.
type Link interface {
	// RoundTrip passes a scrape on, which has the form that the scraper gave it as the
	// opaque part of its URL, and returns the response when its head has come.
	http.RoundTripper
	// Alive asks for a sign of life until ctx ends.
	Alive(ctx context.Context) bool
	// Done is closed when the link has ended. Err tells why, and is nil before.
	Done() <-chan struct{}
	Err() error
	// Close ends the link. It may wait for a write that is stuck.
	Close() error
	// CloseIdle lets go of what waits for the next scrape for so long.
	// CloseIdleConnections does so at once, and nothing waits from then on.
	CloseIdle(after time.Duration)
	CloseIdleConnections()
}

// Conn is a connected agent.
type Conn struct {
	Link
	// Agent is the name. Instance tells processes apart that have one name.
	Agent, Instance string
	// RemoteAddr is the address of the other side where it is known.
	RemoteAddr string
	Kind       string
	// Transport is what the link is made of, as the API shows it.
	Transport string
	// Session is the link's, nil where Kind is not KindCulvert.
	Session  *protocol.Session
	started  time.Time
	unproven bool // see Fleet.Unsaved; protected by the fleet's mu
}

// NewConn returns a Conn for the session.
func NewConn(s *protocol.Session) *Conn {
	return &Conn{
		Link: &sessionLink{s, protocol.Transport{Session: s}}, Session: s, Kind: KindCulvert,
		Agent: s.Agent, Instance: s.Instance, RemoteAddr: s.RemoteAddr, Transport: s.Transport, started: time.Now(),
	}
}

// NewPushProxConn returns a Conn for a client of PushProx.
func NewPushProxConn(link Link, agent, instance, remoteAddr string) *Conn {
	return &Conn{
		Link: link, Kind: KindPushProx, Agent: agent, Instance: instance, RemoteAddr: remoteAddr, Transport: "poll", started: time.Now(),
	}
}

// sessionLink is the link of a session, and the HTTP connections in it.
type sessionLink struct {
	session *protocol.Session
	http    protocol.Transport
}

func (l *sessionLink) RoundTrip(req *http.Request) (*http.Response, error) {
	return l.http.RoundTrip(req)
}

func (l *sessionLink) Alive(ctx context.Context) bool {
	asked := time.Now()
	if _, err := l.session.Ping(ctx); err == nil {
		return true
	}
	// The answer may wait behind data: any frame will do.
	return l.session.Err() == nil && l.session.LastHeard().After(asked)
}

func (l *sessionLink) Done() <-chan struct{}         { return l.session.Done() }
func (l *sessionLink) Err() error                    { return l.session.Err() }
func (l *sessionLink) Close() error                  { return l.session.Close() }
func (l *sessionLink) CloseIdle(after time.Duration) { l.http.CloseIdle(after) }
func (l *sessionLink) CloseIdleConnections()         { l.http.CloseIdleConnections() }
