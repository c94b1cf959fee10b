package fleet

import (
	"slices"
	"strings"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// Info is what is known of an agent, as the API shows it.
type Info struct {
	Name         string                `json:"name"`
	Kind         string                `json:"kind"` // KindCulvert or KindPushProx
	Connected    bool                  `json:"connected"`
	Since        time.Time             `json:"since"` // connected, or lost
	FirstSeen    time.Time             `json:"first_seen"`
	LostReason   string                `json:"lost_reason,omitempty"`
	RemoteAddr   string                `json:"remote_address,omitempty"`
	Transport    string                `json:"transport,omitempty"` // "upgrade", "websocket" or "poll"
	RTTSeconds   float64               `json:"rtt_seconds,omitempty"`
	Streams      *int                  `json:"streams,omitempty"` // nil: another proxy knows, or it has none
	Registration protocol.Registration `json:"registration"`
	Proxies      []Holder              `json:"proxies,omitempty"` // that hold a session, where several are one

	// Change grows with each change of what discovery lists: of two infos of one
	// name with the same Change, Connected and Registration are the same.
	Change uint64 `json:"-"`
	// Scraped is how many targets of the agent were scraped through this proxy, and Failing
	// how many of them failed the last time. See Scrapes.
	Scraped int `json:"-"`
	Failing int `json:"-"`
}

// Agents returns what is known, sorted by name. The registrations are shared:
// they must not be changed.
func (f *Fleet) Agents() []Info {
	f.mu.RLock()
	infos := make([]Info, 0, len(f.agents))
	for _, a := range f.agents {
		infos = append(infos, f.info(a))
	}
	f.mu.RUnlock()
	slices.SortFunc(infos, func(a, b Info) int { return strings.Compare(a.Name, b.Name) })
	return infos
}

// Agent returns what is known of one agent.
func (f *Fleet) Agent(name string) (Info, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if a := f.agents[name]; a != nil {
		return f.info(a), true
	}
	return Info{}, false
}

func (f *Fleet) info(a *Agent) Info {
	i := Info{
		Name: a.Name, Kind: a.kind, Since: a.since.UTC(), FirstSeen: a.firstSeen.UTC(),
		LostReason: a.reason, Registration: a.registration, Change: a.change,
	}
	i.Scraped, i.Failing = a.healthOf()
	if c := a.conn; c != nil {
		i.Connected, i.RemoteAddr, i.Transport = true, c.RemoteAddr, c.Transport
		if c.Session != nil {
			streams := c.Session.NumStreams()
			i.RTTSeconds, i.Streams = c.Session.RTT().Seconds(), &streams
		}
	} else if len(a.peers) == 0 {
		streams := 0
		i.Streams = &streams
	}
	if f.config.Shared == nil || !a.isConnected() {
		return i
	}
	// Of several sessions the oldest stands for the agent, on every proxy.
	i.Connected, i.LostReason, i.Proxies = true, "", f.holders(a)
	oldest := i.Proxies[0]
	for _, h := range i.Proxies {
		if h.Since.Before(oldest.Since) {
			oldest = h
		}
	}
	i.Since, i.RemoteAddr, i.Transport = oldest.Since, oldest.RemoteAddr, oldest.Transport
	return i
}

// Counts returns how many agents are connected and how many are lost.
func (f *Fleet) Counts() (connected, lost int) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, a := range f.agents {
		if a.isConnected() {
			connected++
		} else {
			lost++
		}
	}
	return connected, lost
}
