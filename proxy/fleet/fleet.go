// Package fleet knows the agents: who is connected, who was, which names lead to
// whom. It keeps what it knows across restarts.
package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// Config tunes a fleet. Zero values mean the defaults.
type Config struct {
	// Path is the file that keeps the known agents, "" for memory only.
	Path string
	// ForgetAfter is how long a lost agent stays known. 7 days by default.
	ForgetAfter time.Duration
	// SettleTime is how long the list of agents is not to be trusted after a start
	// without a stored list. Negative: no time. 60 s by default.
	SettleTime time.Duration
	// MaxScrapes and MaxTunnels bound what runs at the same time for one agent:
	// scrapes, and open CONNECT tunnels. 64 and 256 by default.
	MaxScrapes, MaxTunnels int
	// Logger is slog.Default by default.
	Logger *slog.Logger
}

// pingTimeout is how long a connected agent has to answer when another process
// claims its name.
const pingTimeout = 3 * time.Second

// saveTimeout bounds how long a registration waits for the disk.
const saveTimeout = 10 * time.Second

// Fleet is the set of known agents. All methods may be called at the same time.
// No lock is held across I/O.
type Fleet struct {
	config  Config
	store   *store // nil: memory only
	started time.Time
	stored  bool // the list was read from the store

	mu        sync.RWMutex // protects what follows, and the fields of agents
	agents    map[string]*Agent
	names     map[string]*Agent              // TARGET.AGENT
	hosts     map[string]map[*Agent]struct{} // exact hosts
	wildcards map[string]map[*Agent]struct{} // suffixes ".example.net"
	newest    time.Time                      // when a name registered for the first time
}

// Agent is one known agent.
type Agent struct {
	// Name is fixed.
	Name string
	// Scrapes and Tunnels hold a token for each that runs.
	Scrapes, Tunnels chan struct{}

	// Protected by the fleet's mu.
	registration protocol.Registration
	conn         *Conn // nil: not connected
	since        time.Time
	firstSeen    time.Time
	reason       string // why it was lost
	waiters      map[chan struct{}]struct{}
}

// Conn is a session of an agent, and the HTTP connections in it.
type Conn struct {
	*protocol.Session
	// Transport sends requests through the session. The URL's host is ignored.
	Transport *http.Transport
	started   time.Time
}

// NewConn returns a Conn for the session.
func NewConn(s *protocol.Session) *Conn {
	return &Conn{Session: s, started: time.Now(), Transport: &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Open(ctx) },
		DisableCompression: true,
		// A scraper's own limit is of that size.
		MaxResponseHeaderBytes: 64 << 10,
		MaxIdleConnsPerHost:    64,
		IdleConnTimeout:        6 * time.Minute, // longer than common scrape intervals: opening a stream costs
	}}
}

// Open reads the known agents from the store. It returns an error when the
// store's file can't be had; the caller decides whether to go on without.
func Open(config Config) (*Fleet, error) {
	if config.ForgetAfter == 0 {
		config.ForgetAfter = 7 * 24 * time.Hour
	}
	if config.SettleTime == 0 {
		config.SettleTime = time.Minute
	}
	if config.MaxScrapes == 0 {
		config.MaxScrapes = 64
	}
	if config.MaxTunnels == 0 {
		config.MaxTunnels = 256
	}
	if config.Logger == nil {
		config.Logger = slog.Default()
	}
	f := &Fleet{
		config: config, started: time.Now(),
		agents: map[string]*Agent{}, names: map[string]*Agent{},
		hosts: map[string]map[*Agent]struct{}{}, wildcards: map[string]map[*Agent]struct{}{},
	}
	if config.Path == "" {
		return f, nil
	}
	var records []record
	var err error
	if f.store, records, f.stored, err = openStore(config.Path, config.Logger); err != nil {
		return nil, err
	}
	for _, rec := range records {
		a := f.newAgent(rec.Name)
		a.registration, a.firstSeen, a.since, a.reason = rec.Registration, rec.FirstSeen, rec.LostAt, "not back since the proxy started"
		if a.since.IsZero() { // it was connected when the proxy ended
			a.since = f.started
		}
		f.agents[a.Name] = a
		f.index(a)
	}
	return f, nil
}

// Run forgets agents that were lost for ForgetAfter, until ctx ends; then it
// closes the store.
func (f *Fleet) Run(ctx context.Context) {
	if f.store != nil {
		defer f.store.close()
	}
	// The first look comes after a while: an agent whose last return was not
	// stored yet has to get a chance to come back.
	tick := time.NewTicker(max(min(f.config.ForgetAfter/10, time.Minute), 10*time.Millisecond))
	defer tick.Stop()
	settle := time.NewTicker(max(f.config.SettleTime/20, 10*time.Millisecond))
	defer settle.Stop()
	for {
		select {
		case <-ctx.Done():
			f.noteSettled()
			return
		case <-settle.C:
			if f.noteSettled() {
				settle.Stop()
			}
			continue
		case <-tick.C:
		}
		for _, name := range f.expired(time.Now()) {
			if _, ok := f.remove(name, func(a *Agent) bool { return a.conn == nil }); ok {
				f.config.Logger.Info("Agent forgotten", "agent", name, "after", f.config.ForgetAfter)
			}
		}
	}
}

// noteSettled stores that the list can be trusted, once it can. It returns true
// when there is nothing left to do.
func (f *Fleet) noteSettled() bool {
	settled, _ := f.Settled()
	if !settled || f.stored || f.store == nil {
		return settled
	}
	if err := f.store.setSettled(); err != nil {
		f.config.Logger.Error("The list of known agents could not be marked as complete", "err", err)
		return false
	}
	return true
}

func (f *Fleet) expired(now time.Time) []string {
	f.mu.RLock()
	defer f.mu.RUnlock()
	var names []string
	for name, a := range f.agents {
		if a.conn == nil && now.Sub(a.since) >= f.config.ForgetAfter {
			names = append(names, name)
		}
	}
	return names
}

func (f *Fleet) newAgent(name string) *Agent {
	return &Agent{
		Name: name, waiters: map[chan struct{}]struct{}{},
		Scrapes: make(chan struct{}, f.config.MaxScrapes), Tunnels: make(chan struct{}, f.config.MaxTunnels),
	}
}

// Register makes conn the session of its agent, or, where it is that already,
// replaces the registration. An older session of the agent is closed. It returns
// a *protocol.Refusal: 400 for a malformed registration, 409 where a name is
// taken. When it returns nil the agent is stored, unless storing failed, which
// is logged: scrapes go on without a store.
func (f *Fleet) Register(ctx context.Context, conn *Conn, reg protocol.Registration) error {
	var dead *Conn
	for {
		err := f.check(ctx, conn, reg, &dead)
		if err != nil {
			return err
		}
		f.mu.Lock()
		a := f.agents[conn.Agent]
		if err := f.collision(conn.Agent, reg); err != nil || f.rival(conn, dead) != nil {
			f.mu.Unlock()
			continue // somebody came in between
		}
		if conn.Err() != nil { // it ended meanwhile, and Lost has seen to it
			f.mu.Unlock()
			return protocol.Refusef(http.StatusServiceUnavailable, protocol.CodeUnavailable, "the session has ended")
		}
		if a == nil {
			a = f.newAgent(conn.Agent)
			a.firstSeen = time.Now()
			f.newest = a.firstSeen
			f.agents[a.Name] = a
		}
		old := a.conn
		f.unindex(a)
		a.registration = reg
		f.index(a)
		if old != conn {
			a.conn, a.since, a.reason = conn, time.Now(), ""
			for w := range a.waiters {
				select {
				case w <- struct{}{}:
				default:
				}
			}
		}
		rec := a.record()
		f.mu.Unlock()
		if old != nil && old != conn {
			f.config.Logger.Info("Agent's session replaced", "agent", a.Name, "from", conn.RemoteAddr, "before", old.RemoteAddr)
			go old.Close() // ends with the write that may be stuck in it
		}
		if f.store != nil {
			saveCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), saveTimeout)
			err := f.store.save(saveCtx, rec)
			cancel()
			if err != nil {
				f.config.Logger.Error("The agent could not be stored; it would be unknown after a restart of this proxy", "agent", a.Name, "err", err)
			}
		}
		return nil
	}
}

// Check returns what Register would return, without any effect.
func (f *Fleet) Check(ctx context.Context, conn *Conn, reg protocol.Registration) error {
	var dead *Conn
	return f.check(ctx, conn, reg, &dead)
}

// check looks for what speaks against a registration. It sets dead to the session
// that has the name and gave no sign of life.
func (f *Fleet) check(ctx context.Context, conn *Conn, reg protocol.Registration, dead **Conn) error {
	if err := reg.Check(conn.Agent); err != nil {
		return protocol.Refusef(http.StatusBadRequest, protocol.CodeInvalid, "registration of %q: %v", conn.Agent, err)
	}
	f.mu.RLock()
	err := f.collision(conn.Agent, reg)
	rival := f.rival(conn, *dead)
	f.mu.RUnlock()
	if err != nil {
		return err
	}
	if rival == nil {
		return nil
	}
	if alive(ctx, rival) {
		return protocol.Refusef(http.StatusConflict, protocol.CodeTaken,
			"the name %q is taken by a live agent at %s, connected for %s; stop that one, or choose another --fqdn",
			conn.Agent, rival.RemoteAddr, time.Since(rival.started).Round(time.Second))
	}
	*dead = rival
	return ctx.Err() // nobody waits for the answer any more
}

// rival returns the session of another process that has the name of conn's
// agent, unless it is dead. It is called with mu held.
func (f *Fleet) rival(conn, dead *Conn) *Conn {
	a := f.agents[conn.Agent]
	if a == nil || a.conn == nil || a.conn == conn || a.conn == dead || a.conn.Instance == conn.Instance {
		return nil
	}
	return a.conn
}

// alive asks the session for a sign of life. Who asks may go away meanwhile; that
// says nothing of the session, so ctx's end is not passed on.
func alive(ctx context.Context, c *Conn) bool {
	asked := time.Now()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pingTimeout)
	defer cancel()
	if _, err := c.Ping(ctx); err == nil {
		return true
	}
	// The answer may wait behind data: any frame will do.
	return c.Err() == nil && c.LastHeard().After(asked)
}

// collision returns the refusal for a registration whose names lead elsewhere
// already. Only hosts may be shared between agents. It is called with mu held.
func (f *Fleet) collision(agent string, reg protocol.Registration) error {
	taken := func(what, by string) error {
		return protocol.Refusef(http.StatusConflict, protocol.CodeCollision,
			"%s; rename one of them, or remove %q with culvert-client leave or DELETE /api/v1/agents/%s", what, by, by)
	}
	if _, known := f.agents[agent]; !known {
		if holder := f.names[agent]; holder != nil {
			return taken(fmt.Sprintf("the name %q is a target of agent %q", agent, holder.Name), holder.Name)
		}
		for holder := range f.hosts[agent] {
			if holder.Name != agent {
				return taken(fmt.Sprintf("the name %q is a host that agent %q answers for", agent, holder.Name), holder.Name)
			}
		}
	}
	targets := []string{protocol.AgentTarget}
	for _, t := range reg.Targets {
		targets = append(targets, t.Name)
	}
	for _, t := range targets {
		full := t + "." + agent
		if holder := f.agents[full]; holder != nil {
			return taken(fmt.Sprintf("the target %q would have the name of agent %q", t, full), full)
		}
		for holder := range f.hosts[full] {
			if holder.Name != agent {
				return taken(fmt.Sprintf("the target %q would have the name %q, a host that agent %q answers for", t, full, holder.Name), holder.Name)
			}
		}
	}
	for _, h := range reg.Hosts {
		if holder := f.agents[h]; holder != nil && holder.Name != agent {
			return taken(fmt.Sprintf("the host %q is the name of an agent", h), h)
		}
		if holder := f.names[h]; holder != nil && holder.Name != agent {
			return taken(fmt.Sprintf("the host %q is a target of agent %q", h, holder.Name), holder.Name)
		}
	}
	return nil
}

func (f *Fleet) index(a *Agent) {
	f.names[protocol.AgentTarget+"."+a.Name] = a
	for _, t := range a.registration.Targets {
		f.names[t.Name+"."+a.Name] = a
	}
	for _, h := range a.registration.Hosts {
		table, key := f.hosts, h
		if suffix, ok := protocol.WildcardSuffix(h); ok {
			table, key = f.wildcards, suffix
		}
		if table[key] == nil {
			table[key] = map[*Agent]struct{}{}
		}
		table[key][a] = struct{}{}
	}
}

func (f *Fleet) unindex(a *Agent) {
	delete(f.names, protocol.AgentTarget+"."+a.Name)
	for _, t := range a.registration.Targets {
		delete(f.names, t.Name+"."+a.Name)
	}
	for _, h := range a.registration.Hosts {
		table, key := f.hosts, h
		if suffix, ok := protocol.WildcardSuffix(h); ok {
			table, key = f.wildcards, suffix
		}
		delete(table[key], a)
		if len(table[key]) == 0 {
			delete(table, key)
		}
	}
}

// Lost says that the session takes no more scrapes: it ended, or the agent
// drains it. It returns false where the session was not the agent's current one.
func (f *Fleet) Lost(conn *Conn, reason string) bool {
	f.mu.Lock()
	a := f.agents[conn.Agent]
	if a == nil || a.conn != conn {
		f.mu.Unlock()
		return false
	}
	a.conn, a.since, a.reason = nil, time.Now(), reason
	rec := a.record()
	f.mu.Unlock()
	conn.Transport.CloseIdleConnections()
	if f.store != nil {
		f.store.saveLater(rec)
	}
	return true
}

// ErrConnected is returned by Leave where another process holds the name.
var ErrConnected = errors.New("a live agent has that name")

// ErrUnknown is returned where nobody has the name.
var ErrUnknown = errors.New("no agent of that name is known")

// Leave forgets the agent of conn on its own wish. It returns ErrUnknown, or
// ErrConnected where a live agent with another session has the name.
func (f *Fleet) Leave(ctx context.Context, conn *Conn) error {
	f.mu.RLock()
	a := f.agents[conn.Agent]
	var other *Conn
	if a != nil && a.conn != conn {
		other = a.conn
	}
	f.mu.RUnlock()
	if a == nil {
		return ErrUnknown
	}
	if other != nil && alive(ctx, other) {
		return ErrConnected
	}
	if err := ctx.Err(); err != nil {
		return err // nobody waits for the answer any more
	}
	removed, ok := f.remove(conn.Agent, func(a *Agent) bool { return a.conn == nil || a.conn == conn || a.conn == other })
	if !ok {
		return ErrConnected
	}
	if removed != nil && removed != conn { // the answer still has to go through conn
		go removed.Close()
	}
	return nil
}

// Forget removes an agent at once and closes its session. It returns false where
// nobody has the name. An agent that still runs comes back by itself.
func (f *Fleet) Forget(name string) bool {
	removed, ok := f.remove(name, func(*Agent) bool { return true })
	if removed != nil {
		go removed.Close() // it may wait for a stuck write
	}
	return ok
}

// remove takes an agent out where if_ agrees, and returns the session that it had.
func (f *Fleet) remove(name string, if_ func(*Agent) bool) (*Conn, bool) {
	f.mu.Lock()
	a := f.agents[name]
	if a == nil || !if_(a) {
		f.mu.Unlock()
		return nil, false
	}
	conn := a.conn
	a.conn = nil
	f.unindex(a)
	delete(f.agents, name)
	f.mu.Unlock()
	if f.store != nil {
		f.store.saveLater(record{Name: name, deleted: true})
	}
	return conn, true
}

// Settled reports whether the list of agents can be trusted, and if not, when it
// will be at the latest. A list that was stored can. Without one it can after
// SettleTime, or when agents have come and no new one for a sixth of that: what
// discovery leaves out, Prometheus forgets, and nothing alerts.
func (f *Fleet) Settled() (bool, time.Time) {
	end := f.started.Add(f.config.SettleTime)
	now := time.Now()
	if f.stored || !now.Before(end) {
		return true, now
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	return !f.newest.IsZero() && now.Sub(f.newest) >= f.config.SettleTime/6, end
}

// Route is where a name leads: agents of which any may serve it.
type Route struct {
	Name   string
	Agents []*Agent
	// Exact is false where the name is known by a wildcard only, or would be a target
	// that its agent has not declared.
	Exact bool
}

// Resolve finds who answers for a name in its normal form: an agent of that
// name, an exact host, a named target, the longest wildcard. Whether they are
// connected plays no part. It returns false where nobody does.
func (f *Fleet) Resolve(name string) (Route, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if a := f.agents[name]; a != nil {
		return Route{Name: name, Agents: []*Agent{a}, Exact: true}, true
	}
	if shared := f.hosts[name]; len(shared) > 0 {
		return Route{Name: name, Agents: slices.Collect(maps.Keys(shared)), Exact: true}, true
	}
	if a := f.names[name]; a != nil {
		return Route{Name: name, Agents: []*Agent{a}, Exact: true}, true
	}
	for suffix := range protocol.Suffixes(name) {
		if shared := f.wildcards[suffix]; len(shared) > 0 {
			return Route{Name: name, Agents: slices.Collect(maps.Keys(shared))}, true
		}
	}
	if _, agentName, _ := protocol.SplitTarget(name); f.agents[agentName] != nil {
		a := f.agents[agentName]
		// The agent's own refusal names the flag that would declare the target.
		return Route{Name: name, Agents: []*Agent{a}}, true
	}
	return Route{}, false
}

// Connected returns a connected agent of the route and its session. Where there
// is none it waits until ctx ends, and returns false then.
func (f *Fleet) Connected(ctx context.Context, r Route) (*Agent, *Conn, bool) {
	f.mu.RLock()
	a, conn := r.connected()
	f.mu.RUnlock()
	if conn != nil {
		return a, conn, true
	}
	arrived := make(chan struct{}, 1)
	f.mu.Lock()
	for _, a := range r.Agents {
		a.waiters[arrived] = struct{}{}
	}
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		for _, a := range r.Agents {
			delete(a.waiters, arrived)
		}
		f.mu.Unlock()
	}()
	for {
		f.mu.RLock()
		a, conn := r.connected()
		f.mu.RUnlock()
		if conn != nil {
			return a, conn, true
		}
		select {
		case <-arrived:
		case <-ctx.Done():
			return nil, nil, false
		}
	}
}

func (r Route) connected() (*Agent, *Conn) {
	offset := 0
	if len(r.Agents) > 1 {
		offset = rand.IntN(len(r.Agents))
	}
	for i := range r.Agents {
		a := r.Agents[(offset+i)%len(r.Agents)]
		if a.conn != nil && a.conn.Err() == nil {
			return a, a.conn
		}
	}
	return nil, nil
}

// ConnOf returns the session of an agent, nil where it is not connected.
func (f *Fleet) ConnOf(a *Agent) *Conn {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if a.conn == nil || a.conn.Err() != nil {
		return nil
	}
	return a.conn
}

// Conns returns the sessions of all connected agents.
func (f *Fleet) Conns() []*Conn {
	f.mu.RLock()
	defer f.mu.RUnlock()
	var conns []*Conn
	for _, a := range f.agents {
		if a.conn != nil {
			conns = append(conns, a.conn)
		}
	}
	return conns
}

// Info is what is known of an agent, as the API shows it.
type Info struct {
	Name         string                `json:"name"`
	Kind         string                `json:"kind"` // "culvert"
	Connected    bool                  `json:"connected"`
	Since        time.Time             `json:"since"` // connected, or lost
	FirstSeen    time.Time             `json:"first_seen"`
	LostReason   string                `json:"lost_reason,omitempty"`
	RemoteAddr   string                `json:"remote_address,omitempty"`
	Transport    string                `json:"transport,omitempty"` // "upgrade" or "websocket"
	RTTSeconds   float64               `json:"rtt_seconds,omitempty"`
	Streams      int                   `json:"streams"`
	Registration protocol.Registration `json:"registration"`
}

// Agents returns what is known, sorted by name. The registrations are shared:
// they must not be changed.
func (f *Fleet) Agents() []Info {
	f.mu.RLock()
	infos := make([]Info, 0, len(f.agents))
	for _, a := range f.agents {
		infos = append(infos, a.info())
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
		return a.info(), true
	}
	return Info{}, false
}

func (a *Agent) info() Info {
	i := Info{
		Name: a.Name, Kind: "culvert", Since: a.since, FirstSeen: a.firstSeen,
		LostReason: a.reason, Registration: a.registration,
	}
	if c := a.conn; c != nil {
		i.Connected, i.RemoteAddr, i.Transport = true, c.RemoteAddr, c.Session.Transport
		i.RTTSeconds, i.Streams = c.RTT().Seconds(), c.NumStreams()
	}
	return i
}

// Counts returns how many agents are connected and how many are lost.
func (f *Fleet) Counts() (connected, lost int) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, a := range f.agents {
		if a.conn != nil {
			connected++
		} else {
			lost++
		}
	}
	return connected, lost
}
