// Package fleet knows the agents: who is connected, who was, which names lead to
// whom. It keeps what it knows across restarts.
package fleet

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
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
	// MaxKnown bounds the agents that are known, the lost ones included, and, at
	// meanRegistration bytes each, what their registrations take together. 20,000 by
	// default.
	MaxKnown int
	// Shared connects the fleet with those of other proxies; nil where there are none.
	Shared *Shared
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

	conflicts chan struct{} // has one when a name has two instances: see settleConflicts
	unproven  chan struct{} // has one when there are sessions to prove: see proveSessions
	doubtful  atomic.Int64  // about how many targets are logged that never answered: see logTarget

	mu        sync.RWMutex // protects what follows, and the fields of agents
	stored    bool         // the list was read from the store, or the other proxies have it
	agents    map[string]*Agent
	names     map[string]*Agent              // TARGET.AGENT
	hosts     map[string]map[*Agent]struct{} // exact hosts
	wildcards map[string]map[*Agent]struct{} // suffixes ".example.net"
	newest    time.Time                      // when a name registered for the first time
	bytes     int                            // of all registrations: see size

	changes   uint64 // counts what can be seen of agents: see changed
	listed    uint64 // the last of them that discovery can see
	gone      []gone // who went last, the oldest first
	goneUntil uint64 // who went before that change is not known any more

	// Of a fleet that is shared: see shared.go.
	cluster       string              // Snapshot.Cluster
	deleted       map[string]struct{} // agents whose records are to be deleted
	draining      bool
	loaded        bool // what the other proxies know has come
	sharedSettled bool // the other proxies know that the list is complete
}

// Agent is one known agent.
type Agent struct {
	// Name is fixed.
	Name string
	// Scrapes and Tunnels hold a token for each that runs.
	Scrapes, Tunnels chan struct{}

	log atomic.Pointer[scrapeLog] // nil: nobody has scraped it

	// Protected by the fleet's mu.
	registration protocol.Registration
	kind         string // of the last connection
	conn         *Conn  // nil: not connected
	since        time.Time
	firstSeen    time.Time
	reason       string                     // why it was lost
	change       uint64                     // Fleet.changes at its last change that discovery can see
	shown        uint64                     // the same at its last change that the page shows
	waiters      map[chan struct{}]struct{} // nil: there were none yet
	sharing
}

// streamIdle is how long a stream waits for the next scrape: longer than common
// scrape intervals, since opening one costs.
const streamIdle = 6 * time.Minute

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
	if config.MaxKnown == 0 {
		config.MaxKnown = 20_000
	}
	if config.Logger == nil {
		config.Logger = slog.Default()
	}
	f := &Fleet{
		config: config, started: time.Now(), changes: 1,
		agents: map[string]*Agent{}, names: map[string]*Agent{},
		hosts: map[string]map[*Agent]struct{}{}, wildcards: map[string]map[*Agent]struct{}{},
		conflicts: make(chan struct{}, 1), unproven: make(chan struct{}, 1), deleted: map[string]struct{}{},
	}
	if config.Path == "" {
		return f, nil
	}
	var records []record
	var err error
	if f.store, records, f.stored, err = openStore(config.Path, config.Logger); err != nil {
		return nil, err
	}
	f.cluster = f.store.cluster
	for _, rec := range records {
		a := f.newAgent(rec.Name)
		a.kind = cmp.Or(rec.Kind, KindCulvert)
		a.registration, a.firstSeen, a.since, a.reason = rec.Registration, rec.FirstSeen, rec.LostAt, "not back since the proxy started"
		if a.since.IsZero() { // it was connected when the proxy ended
			a.since = f.started
		}
		f.agents[a.Name] = a
		f.index(a)
		f.changed(a)
	}
	return f, nil
}

// Run forgets agents that were lost for ForgetAfter, and closes streams that wait for
// no scrape, until ctx ends; then it closes the store.
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
	var sweep <-chan time.Time
	if f.config.Shared != nil {
		ticker := time.NewTicker(sweepEvery)
		defer ticker.Stop()
		sweep = ticker.C
		var settling sync.WaitGroup
		defer settling.Wait()
		settling.Go(func() { f.settleConflicts(ctx) })
		settling.Go(func() { f.proveSessions(ctx) })
	}
	for {
		select {
		case <-ctx.Done():
			f.noteSettled()
			return
		case <-sweep:
			f.sweep()
			continue
		case <-settle.C:
			if f.noteSettled() {
				settle.Stop()
			}
			continue
		case <-tick.C:
		}
		for _, conn := range f.Conns() {
			conn.CloseIdle(streamIdle)
		}
		f.sweepLogs(time.Now())
		for _, name := range f.expired(time.Now()) {
			if f.config.Shared != nil {
				f.forgetShared(name)
				continue
			}
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
	if !settled {
		return false
	}
	f.mu.Lock()
	tell := f.config.Shared != nil && !f.sharedSettled && f.loaded
	if tell {
		f.sharedSettled = true
	}
	unknown := f.config.Shared != nil && !f.loaded
	stored := f.stored
	f.mu.Unlock()
	if tell {
		f.config.Shared.Settled()
	}
	if stored || f.store == nil {
		return !unknown
	}
	if err := f.store.setSettled(); err != nil {
		f.config.Logger.Error("The list of known agents could not be marked as complete", "err", err)
		return false
	}
	return !unknown
}

func (f *Fleet) expired(now time.Time) []string {
	f.mu.RLock()
	defer f.mu.RUnlock()
	var names []string
	for name, a := range f.agents {
		since := a.since
		// Another proxy's clock may be behind: what counts is when this one learned it.
		if f.config.Shared != nil && !a.learned.IsZero() {
			since = a.learned
		}
		if !a.isConnected() && now.Sub(since) >= f.config.ForgetAfter {
			names = append(names, name)
		}
	}
	return names
}

// forgetShared has the record of an agent deleted that no proxy holds. The event of
// that takes it out here, as everywhere.
func (f *Fleet) forgetShared(name string) {
	if !f.config.Shared.Leads() {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if a := f.agents[name]; a != nil && !a.isConnected() {
		a.forget = true
		f.share(a, false)
	}
}

func (f *Fleet) newAgent(name string) *Agent {
	return &Agent{
		Name: name, kind: KindCulvert,
		Scrapes: make(chan struct{}, f.config.MaxScrapes), Tunnels: make(chan struct{}, f.config.MaxTunnels),
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
	a.conn = nil
	if !a.isConnected() {
		a.since, a.reason, a.learned = time.Now(), reason, time.Now()
		f.changed(a)
	} else {
		f.shows(a)
	}
	f.share(a, !a.isConnected())
	rec := a.record()
	f.mu.Unlock()
	conn.CloseIdleConnections()
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
	strangers := f.strangers(conn, nil)
	f.mu.RUnlock()
	if a == nil {
		return ErrUnknown
	}
	for _, held := range strangers {
		askCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pingTimeout+time.Second)
		alive, err := f.config.Shared.Alive(askCtx, conn.Agent, held)
		cancel()
		if err != nil || alive {
			return ErrConnected
		}
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
	if f.config.Shared != nil && (a.modified != 0 || a.put != nil || f.cluster == "") {
		f.deleted[name] = struct{}{}
	}
	f.drop(a)
	f.share(a, false)
	f.mu.Unlock()
	return conn, true
}

// loadRetry is when to ask again for a list that waits for other proxies' records.
const loadRetry = 10 * time.Second

// Settled reports whether the list of agents can be trusted, and if not, when it
// will be at the latest. A list that was stored can. Without one it can after
// SettleTime, or when agents have come and no new one for a sixth of that: what
// discovery leaves out, Prometheus forgets, and nothing alerts.
func (f *Fleet) Settled() (bool, time.Time) {
	end := f.started.Add(f.config.SettleTime)
	now := time.Now()
	f.mu.RLock()
	defer f.mu.RUnlock()
	switch {
	case f.stored:
		return true, now
	case f.config.Shared != nil && !f.loaded: // others know more, and nothing tells when they can be asked
		return false, now.Add(loadRetry)
	case !now.Before(end):
		return true, now
	}
	return !f.newest.IsZero() && now.Sub(f.newest) >= f.config.SettleTime/6, end
}

// Conns returns the sessions of all connected agents.
func (f *Fleet) Conns() []*Conn {
	f.mu.RLock()
	defer f.mu.RUnlock()
	conns := make([]*Conn, 0, len(f.agents))
	for _, a := range f.agents {
		if a.conn != nil {
			conns = append(conns, a.conn)
		}
	}
	return conns
}
