package server

import (
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

const (
	// maxSessions bounds the sessions of one agent. It needs one, and a few more while
	// those are ending that its network or its restart has cut off.
	maxSessions = 16
	// displaceAfter is how long a session that sends no registration keeps its place
	// where others wait for one. An agent sends it right behind the handshake.
	displaceAfter = 5 * time.Second
)

// admission bounds the sessions that have not registered yet, and the sessions of one
// name. All methods may be called at the same time.
type admission struct {
	places int // for those that have not registered

	mu      sync.Mutex // protects what follows, and agentConn.placed
	taken   int        // places, those of handshakes that run included
	waiting []*agentConn
	names   map[string]int // sessions of each name that has one
}

// enter takes a place for a handshake. At the limit it takes that of a session which has
// sent no registration for a while, or comes from an address that has most places, and
// not from this one: who opens sessions and says nothing must not keep agents out. The
// caller closes that session.
//
// It returns a refusal where there is no place, or where the name has its maxSessions.
func (a *admission) enter(name string, from netip.Prefix) (displaced *agentConn, refusal *protocol.Refusal) {
	a.mu.Lock()
	defer a.mu.Unlock()
	busy := func(format string, args ...any) *protocol.Refusal {
		refusal := protocol.Refusef(http.StatusTooManyRequests, protocol.CodeBusy, format, args...)
		refusal.RetryAfter = busyRetry
		return refusal
	}
	if a.names[name] >= maxSessions {
		return nil, busy("%d sessions of agent %q are open; stop what opens them, or come back when they have ended", maxSessions, name)
	}
	if a.taken >= a.places {
		of := map[netip.Prefix]int{}
		for _, c := range a.waiting {
			of[c.from]++
		}
		i := slices.IndexFunc(a.waiting, func(c *agentConn) bool {
			return time.Since(c.begin) >= displaceAfter || c.from != from && of[c.from] > a.places/2
		})
		if i < 0 {
			return nil, busy("%d agents are in their handshakes; come back later", a.places)
		}
		displaced = a.waiting[i]
		a.leavePlace(displaced)
	}
	a.taken++
	a.names[name]++
	return displaced, nil
}

// fails gives back what enter took for a handshake of which nothing came.
func (a *admission) fails(name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.taken--
	a.leaveName(name)
}

// begins says that the handshake has become a session.
func (a *admission) begins(c *agentConn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c.placed = true
	a.waiting = append(a.waiting, c)
}

// asks says that the session has sent a registration, and so can't be displaced until
// it is answered.
func (a *admission) asks(c *agentConn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.waiting = slices.DeleteFunc(a.waiting, func(w *agentConn) bool { return w == c })
}

// answered says what became of the registration.
func (a *admission) answered(c *agentConn, registered bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if registered {
		a.leavePlace(c)
	} else if c.placed {
		a.waiting = append(a.waiting, c)
	}
}

// ends says that the session has ended.
func (a *admission) ends(c *agentConn) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.leavePlace(c)
	a.leaveName(c.Agent)
}

// pending returns how many places are taken.
func (a *admission) pending() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.taken
}

// leavePlace is called with mu held.
func (a *admission) leavePlace(c *agentConn) {
	if c.placed {
		c.placed = false
		a.taken--
		a.waiting = slices.DeleteFunc(a.waiting, func(w *agentConn) bool { return w == c })
	}
}

// leaveName is called with mu held.
func (a *admission) leaveName(name string) {
	if a.names[name]--; a.names[name] == 0 {
		delete(a.names, name)
	}
}
