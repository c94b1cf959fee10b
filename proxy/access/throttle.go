package access

import (
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// freeTries may be wrong before the next have to wait.
	freeTries = 10
	// firstWait doubles with each further wrong try, up to longestWait.
	firstWait, longestWait = time.Second, time.Minute
	// forgetTries is how long after the last one wrong tries count.
	forgetTries = 15 * time.Minute
	// maxThrottled bounds who is remembered.
	maxThrottled = 10_000
)

// throttle counts wrong tries.
type throttle struct {
	mu    sync.Mutex // protects tries
	tries map[throttleKey]*tries
}

type throttleKey struct {
	address netip.Prefix
	claimed proof // of the claimed name, which may be as long as a header
}

type tries struct {
	n          int
	last, next time.Time
}

func newThrottle() *throttle { return &throttle{tries: map[throttleKey]*tries{}} }

// begin counts a try, before it is known whether it is wrong: else as many as come
// at the same time would be free. It returns how long to wait instead of trying, and
// whether this is the first time.
func (t *throttle) begin(key throttleKey, now time.Time) (wait time.Duration, first bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.tries[key]
	if e != nil && now.Sub(e.last) > forgetTries {
		delete(t.tries, key)
		e = nil
	}
	if e == nil {
		t.makeRoom(now)
		e = new(tries)
		t.tries[key] = e
	}
	if wait := e.next.Sub(now); wait > 0 {
		return wait, false
	}
	e.n++
	e.last = now
	if over := e.n - freeTries; over >= 0 {
		e.next = now.Add(min(firstWait<<min(over, 10), longestWait))
		return 0, over == 0
	}
	return 0, false
}

// undo takes a try back that was not looked at.
func (t *throttle) undo(key throttleKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.tries[key]; e != nil {
		e.n--
		e.next = time.Time{}
	}
}

// forget forgets the tries: one was right.
func (t *throttle) forget(key throttleKey) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.tries, key)
}

// makeRoom is called with mu held. It looks at a few of many, which the map gives
// in random order, and drops what is over or the oldest of them.
func (t *throttle) makeRoom(now time.Time) {
	if len(t.tries) < maxThrottled {
		return
	}
	var oldest throttleKey
	var when time.Time
	looked := 0
	for key, e := range t.tries {
		if now.Sub(e.last) > forgetTries {
			delete(t.tries, key)
		} else if when.IsZero() || e.last.Before(when) {
			oldest, when = key, e.last
		}
		if looked++; looked == 20 {
			break
		}
	}
	if len(t.tries) >= maxThrottled {
		delete(t.tries, oldest)
	}
}

// Address returns where a request comes from: the peer, or, as long as that is a
// trusted proxy, who it says it speaks for. IPv6 counts by its /64, of which every
// host has one.
func (a *Authenticator) Address(r *http.Request) netip.Prefix {
	addr := parseAddress(r.RemoteAddr)
	if a.trusts(addr) {
		hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
		for _, hop := range slices.Backward(hops) {
			next := parseAddress(strings.TrimSpace(hop))
			if !next.IsValid() {
				break
			}
			if addr = next; !a.trusts(addr) {
				break
			}
		}
	}
	bits := 32
	if addr.Is6() {
		bits = 64
	}
	prefix, _ := addr.Prefix(bits)
	return prefix
}

func (a *Authenticator) trusts(addr netip.Addr) bool {
	return slices.ContainsFunc(a.trusted, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// parseAddress takes an address with a port or without.
func parseAddress(s string) netip.Addr {
	if host, _, err := net.SplitHostPort(s); err == nil {
		s = host
	}
	addr, err := netip.ParseAddr(strings.Trim(s, "[]"))
	if err != nil {
		return netip.Addr{}
	}
	return addr.Unmap().WithZone("")
}

// ParseTrusted reads an address or a network, as in 10.0.0.0/8.
func ParseTrusted(s string) (netip.Prefix, error) {
	if addr, err := netip.ParseAddr(s); err == nil {
		return addr.Unmap().Prefix(addr.Unmap().BitLen())
	}
	p, err := netip.ParsePrefix(s)
	return p.Masked(), err
}
