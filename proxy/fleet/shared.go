package fleet

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// Several proxies are one fleet: each tells the others which sessions it holds and what
// it knows of its agents, and takes theirs into the same tables that names are looked up
// in. What is between them only carries it: see the package cluster.
//
// An agent's record outlives its sessions. Whose names collide is settled by the records'
// first revisions, which are alike everywhere: the older one stays.

// Shared connects a fleet with those of other proxies.
type Shared struct {
	// Self is this proxy's ID.
	Self string
	// Changed is told which agent has something to be written: see Fleet.Pending. It
	// is called with a lock held: it must neither wait nor call the fleet.
	Changed func(agent string)
	// Alive asks the proxy that holds a session whether the agent answers there. It
	// returns an error where that proxy can't be asked.
	Alive func(ctx context.Context, agent string, held Held) (bool, error)
	// Leads reports whether this is the one proxy that writes down what no proxy
	// holds any more.
	Leads func() bool
	// Settled is told once that the list of agents can be trusted.
	Settled func()
	// URL tells how a proxy is reached by the others, "" where it is not known.
	URL func(proxy string) string
	// Silent reports whether a proxy does not answer now.
	Silent func(proxy string) bool
}

// Held is a session of an agent that a proxy holds.
type Held struct {
	Proxy      string // the proxy's ID
	Instance   string // by HashInstance
	Since      time.Time
	RemoteAddr string
	Transport  string
	// Revision grows from session to session, over all proxies. 0: not written yet.
	Revision int64
}

// HashInstance returns what proxies tell each other of an agent's instance, which
// would let who knows it take the agent's name.
func HashInstance(instance string) string {
	sum := sha256.Sum256([]byte(instance))
	return hex.EncodeToString(sum[:16])
}

// Record is what the proxies keep together of an agent until it is forgotten.
type Record struct {
	Kind         string // KindCulvert or KindPushProx
	Registration protocol.Registration
	FirstSeen    time.Time
	LostAt       time.Time // zero: connected
	Reason       string    // why it was lost
	// Created and Modified are the revisions of the record's first and last writing.
	Created, Modified int64
}

// Event is a change of a record or of a session.
type Event struct {
	Agent   string
	Record  *Record // not nil: the record is this now
	Deleted bool    // the record is no more, since Revision
	Proxy   string  // not "": whose session it is about
	Held    *Held   // the session that Proxy holds now; nil: none

	Revision int64
}

// Snapshot is all that the proxies keep together.
type Snapshot struct {
	// Cluster tells one set of records from another.
	Cluster string
	Records map[string]Record
	Held    map[string][]Held
	// Settled: the records are complete.
	Settled bool
}

// sharing is an agent's part that is about other proxies. Protected by the fleet's mu.
type sharing struct {
	peers             map[string]Held // sessions of other proxies, by their IDs
	created, modified int64           // of the record as it is known; 0: there is none
	lost              bool            // the record says so
	lostAt            time.Time       // what it says then
	lostReason        string
	held              int64     // the highest revision of a session that was seen
	own               int64     // the revision of this proxy's session
	learned           time.Time // when this proxy got to know that the agent is lost
	put               *Conn     // the session that is written
	dirty             bool      // the record has to be written
	forget            bool      // the record has to be deleted, if nobody has come back
	generation        uint64    // counts what makes it dirty
}

// isConnected reports whether some proxy holds a session. It is called with mu held.
func (a *Agent) isConnected() bool { return a.conn != nil || len(a.peers) > 0 }

// share marks an agent for writing, the record too where record is true. It is called
// with mu held.
func (f *Fleet) share(a *Agent, record bool) {
	if f.config.Shared == nil {
		return
	}
	if record {
		a.dirty = true
		a.generation++
	}
	f.config.Shared.Changed(a.Name)
}

// Change is what is to be written of an agent.
type Change struct {
	Agent string
	// Session is to be put as this proxy's; nil: it is to be deleted, unless Keep.
	Session *Held
	Keep    bool
	// Record is to be put, nil: it stays. It is put only if its revision is still
	// Modified, where that is not negative; 0 is that of no record.
	Record   *Record
	Modified int64
	// Forget deletes the record if its revision is still Modified and no proxy holds
	// a session. Delete deletes it with all sessions.
	Forget, Delete bool

	generation uint64
	conn       *Conn
}

// Pending returns what is to be written of an agent, and false where that is nothing.
func (f *Fleet) Pending(name string) (Change, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	a := f.agents[name]
	if a == nil {
		_, deleted := f.deleted[name]
		return Change{Agent: name, Delete: deleted}, true
	}
	c := Change{Agent: name, conn: a.conn, generation: a.generation, Modified: -1}
	switch {
	case a.conn == nil, f.draining && len(a.peers) > 0:
		c.conn = nil
		c.Keep = a.put == nil && a.own == 0
	case a.put == a.conn, a.conn.unproven:
		c.Keep = true
	default:
		c.Session = &Held{Proxy: f.config.Shared.Self, Instance: HashInstance(a.conn.Instance), Since: a.since.UTC(), RemoteAddr: a.conn.RemoteAddr, Transport: a.conn.Transport}
	}
	if a.dirty {
		c.Record = &Record{Kind: a.kind, Registration: a.registration, FirstSeen: a.firstSeen.UTC()}
		if !a.isConnected() {
			c.Record.LostAt, c.Record.Reason = a.since.UTC(), a.reason
			c.Modified = a.modified // nobody has come back, nor deleted it, meanwhile
		}
	} else if a.forget && !a.isConnected() {
		c.Forget, c.Modified = true, a.modified
	}
	return c, !c.Keep || c.Record != nil || c.Forget
}

// Written says that a change was written at the revision, or that its condition did
// not hold: the events tell then what is true now.
func (f *Fleet) Written(c Change, revision int64, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if c.Delete {
		delete(f.deleted, c.Agent)
	}
	a := f.agents[c.Agent]
	if a == nil {
		return
	}
	if c.Session != nil && ok {
		a.put, a.own = c.conn, revision
	} else if c.Session == nil && !c.Keep {
		a.put, a.own = nil, 0
	}
	if c.Record != nil && a.generation == c.generation {
		// Another proxy may have written the record at the same time, and this one has not
		// taken over what it says: the two have to end alike.
		a.dirty = ok && (a.modified > revision || !a.firstSeen.Equal(c.Record.FirstSeen))
	}
	if c.Record != nil && ok {
		a.modified, a.lost = max(a.modified, revision), !c.Record.LostAt.IsZero()
		a.lostAt, a.lostReason = c.Record.LostAt, c.Record.Reason
		if a.created == 0 {
			a.created = revision
		}
	}
	a.forget = false
	if next := a.conn != nil && a.put != a.conn && !a.conn.unproven && !(f.draining && len(a.peers) > 0); next || a.dirty {
		f.config.Shared.Changed(a.Name)
	}
}

// closing is what Apply and Load do once they have let go of mu.
type closing struct {
	conn   *Conn
	reason error
}

// Apply takes changes that other proxies made, and this one's own, in their order.
func (f *Fleet) Apply(events []Event) {
	var ended []closing
	f.mu.Lock()
	for _, e := range events {
		switch {
		case e.Record != nil:
			ended = f.applyRecord(e.Agent, *e.Record, time.Now(), ended)
		case e.Deleted:
			ended = f.applyDeleted(e.Agent, e.Revision, ended)
		case e.Held != nil:
			f.applyHeld(e.Agent, *e.Held)
		default:
			f.applyEnd(e.Agent, e.Proxy)
		}
	}
	f.mu.Unlock()
	f.closeAll(ended)
}

func (f *Fleet) closeAll(ended []closing) {
	for _, c := range ended {
		f.config.Logger.Info("Agent disconnected", "agent", c.conn.Agent, "from", c.conn.RemoteAddr, "reason", c.reason)
		c.conn.CloseIdleConnections()
		go c.conn.Close() // it may wait for a stuck write
	}
}

var errForgotten = errors.New("the agent was forgotten through another proxy")

// applyRecord is called with mu held.
func (f *Fleet) applyRecord(name string, rec Record, learned time.Time, ended []closing) []closing {
	a := f.agents[name]
	if a != nil && rec.Modified < a.modified {
		return ended // older than what this proxy wrote itself
	}
	if _, deleted := f.deleted[name]; deleted && a == nil {
		return ended
	}
	for { // who is younger gives way
		holder := f.collider(name, &rec.Registration)
		if holder == nil {
			break
		}
		loser := holder
		if holder.created != 0 && holder.created < rec.Created {
			loser = a
		}
		reason := fmt.Errorf("agents %q and %q claim one name, and the other was first", name, holder.Name)
		if loser == nil { // it never was one of this fleet
			f.config.Logger.Warn("An agent is left out", "agent", name, "reason", reason)
			if f.config.Shared.Leads() {
				f.deleted[name] = struct{}{}
				f.config.Shared.Changed(name)
			}
			return ended
		}
		ours := loser.conn != nil
		if ours {
			ended = append(ended, closing{loser.conn, reason})
		}
		f.drop(loser)
		if ours || f.config.Shared.Leads() {
			f.deleted[loser.Name] = struct{}{}
		}
		f.config.Shared.Changed(loser.Name)
		if loser == a {
			return ended
		}
	}
	if a == nil {
		a = f.newAgent(name)
		a.firstSeen = rec.FirstSeen
		f.newest = time.Now()
		f.agents[name] = a
		f.index(a)
		f.changed(a)
	}
	a.created, a.modified, a.lost, a.lostAt, a.lostReason = rec.Created, rec.Modified, !rec.LostAt.IsZero(), rec.LostAt, rec.Reason
	if rec.FirstSeen.Before(a.firstSeen) || a.firstSeen.IsZero() {
		a.firstSeen = rec.FirstSeen
	}
	if a.dirty {
		return ended // this proxy has something newer
	}
	a.firstSeen = rec.FirstSeen
	if kind := cmp.Or(rec.Kind, KindCulvert); a.kind != kind || !reflect.DeepEqual(a.registration, rec.Registration) {
		f.unindex(a)
		a.registration, a.kind = rec.Registration, kind
		f.index(a)
		f.changed(a)
	}
	switch {
	case a.lost && !a.isConnected():
		a.since, a.reason, a.learned = rec.LostAt, rec.Reason, learned
		f.shows(a)
	case a.lost && a.conn != nil:
		f.share(a, true) // another proxy took this one for gone
	case !a.isConnected() && a.since.IsZero():
		a.since, a.reason, a.learned = time.Now().UTC(), "no proxy holds a session of it", time.Now()
		f.shows(a)
	}
	f.saveRecord(a)
	return ended
}

// collider returns an agent that the names of a registration lead to already.
func (f *Fleet) collider(name string, reg *protocol.Registration) *Agent {
	by, err := f.collision(name, *reg)
	if err == nil {
		return nil
	}
	return f.agents[by]
}

// drop takes an agent out of the tables. It is called with mu held.
func (f *Fleet) drop(a *Agent) {
	a.conn, a.peers = nil, nil
	f.unindex(a)
	delete(f.agents, a.Name)
	f.goes(a)
	if f.store != nil {
		f.store.saveLater(record{Name: a.Name, deleted: true})
	}
}

func (f *Fleet) saveRecord(a *Agent) {
	if f.store != nil {
		f.store.saveLater(a.record())
	}
}

// applyDeleted is called with mu held.
func (f *Fleet) applyDeleted(name string, revision int64, ended []closing) []closing {
	a := f.agents[name]
	if a == nil || a.modified == 0 || revision < a.modified || a.dirty && a.conn != nil && a.created == 0 {
		return ended
	}
	if a.conn != nil {
		ended = append(ended, closing{a.conn, errForgotten})
	} else {
		f.config.Logger.Info("Agent forgotten", "agent", name, "by", "another proxy")
	}
	f.drop(a)
	f.config.Shared.Changed(name) // the session's key
	return ended
}

// applyHeld is called with mu held.
func (f *Fleet) applyHeld(name string, held Held) {
	a := f.agents[name]
	if a == nil {
		return // its record lost against an older one, or was deleted
	}
	a.held, a.forget = max(a.held, held.Revision), false
	if held.Proxy == f.config.Shared.Self {
		if a.conn != nil {
			a.own = held.Revision
		} else if a.put == nil {
			a.own = held.Revision
			f.config.Shared.Changed(name) // it has ended
		}
		return
	}
	was := a.isConnected()
	if a.peers == nil {
		a.peers = map[string]Held{}
	}
	a.peers[held.Proxy] = held
	if !was {
		a.reason = ""
		f.changed(a)
		f.saveRecord(a)
	} else {
		f.shows(a)
	}
	f.wake(a)
	switch {
	case a.conn == nil:
	case f.draining:
		f.config.Shared.Changed(name)
	case HashInstance(a.conn.Instance) != held.Instance:
		select {
		case f.conflicts <- struct{}{}:
		default:
		}
	}
}

// applyEnd is called with mu held.
func (f *Fleet) applyEnd(name, proxy string) {
	a := f.agents[name]
	if a == nil {
		return
	}
	if proxy == f.config.Shared.Self {
		if a.conn != nil && a.put == a.conn && !f.draining {
			a.put = nil // somebody else deleted it
			f.config.Shared.Changed(name)
		}
		return
	}
	ended, ok := a.peers[proxy]
	if !ok {
		return
	}
	delete(a.peers, proxy)
	if !a.isConnected() {
		a.since, a.reason, a.learned = time.Now().UTC(), "the proxy that held its session is gone", time.Now()
		// The record tells the same on every proxy, and comes with the end, or soon.
		if a.lost && a.modified > ended.Revision {
			a.since, a.reason = a.lostAt, a.lostReason
		}
		f.changed(a)
		f.saveRecord(a)
	} else {
		f.shows(a)
	}
}

// wake tells those that wait for the agent. It is called with mu held.
func (f *Fleet) wake(a *Agent) {
	for w := range a.waiters {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

// Load takes all that the proxies keep together, in place of what was known of others.
// An agent that is not there was forgotten meanwhile, unless the records are not those
// that this proxy knew: then it puts its own beside them.
func (f *Fleet) Load(s Snapshot) {
	if f.store != nil && f.cluster != s.Cluster {
		err := f.store.setCluster(s.Cluster)
		if err == nil && s.Settled {
			err = f.store.setSettled()
		}
		if err != nil {
			f.config.Logger.Error("The list of known agents could not be written", "err", err)
		}
	}
	var ended []closing
	f.mu.Lock()
	same := f.cluster == s.Cluster
	f.cluster, f.loaded = s.Cluster, true
	if s.Settled {
		f.stored, f.sharedSettled = true, true
	}
	was := map[string]bool{}
	for name, a := range f.agents {
		was[name] = a.isConnected()
		if len(a.peers) > 0 {
			f.shows(a)
		}
		a.peers, a.put, a.own = nil, nil, 0
		if !same {
			a.created, a.modified = 0, 0
		}
	}
	// The oldest first, so that each proxy leaves out the same of those that collide.
	names := make([]string, 0, len(s.Records))
	for name := range s.Records {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return int(s.Records[a].Created - s.Records[b].Created) })
	now := time.Now()
	for _, name := range names {
		rec := s.Records[name]
		// The writer's clock may be ahead.
		learned := rec.LostAt
		if learned.After(now) {
			learned = now
		}
		if a := f.agents[name]; a != nil && a.lost && !a.learned.IsZero() {
			learned = a.learned
		}
		ended = f.applyRecord(name, rec, learned, ended)
	}
	for name, held := range s.Held {
		for _, h := range held {
			f.applyHeld(name, h)
		}
	}
	for name, a := range f.agents {
		if _, ok := s.Records[name]; ok {
			if a.conn != nil {
				f.share(a, a.lost)
			}
			if !a.isConnected() && was[name] {
				if a.learned = now; !a.lost {
					a.since, a.reason = now.UTC(), "no proxy holds a session of it"
				}
				f.changed(a)
			}
			continue
		}
		switch {
		case a.conn != nil:
			a.created, a.modified = 0, 0
			f.share(a, true)
		case same && !a.dirty:
			f.drop(a)
		default: // of a time before the cluster, or etcd was set up anew
			a.created, a.modified = 0, 0
			f.share(a, true)
		}
	}
	f.mu.Unlock()
	f.closeAll(ended)
}

// Unsaved marks all that this proxy holds for writing: its sessions' keys have gone.
// Where cut is true the proxy may have been cut off from its agents as well as from etcd:
// then a session is written once its agent has given a sign of life, for TCP takes as
// long again to notice that a way is back, and scrapes would wait for that.
func (f *Fleet) Unsaved(cut bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.agents {
		if a.put = nil; a.conn == nil {
			continue
		}
		if cut {
			a.conn.unproven = true
		} else {
			f.share(a, false)
		}
	}
	select {
	case f.unproven <- struct{}{}:
	default:
	}
}

// proveSessions asks the agents of sessions that have to be proven for a sign of life,
// until ctx ends.
func (f *Fleet) proveSessions(ctx context.Context) {
	var asking sync.WaitGroup
	defer asking.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.unproven:
		}
		f.mu.RLock()
		var conns []*Conn
		for _, a := range f.agents {
			if a.conn != nil && a.conn.unproven {
				conns = append(conns, a.conn)
			}
		}
		f.mu.RUnlock()
		for _, conn := range conns {
			asking.Go(func() { f.prove(ctx, conn) })
		}
	}
}

// prove asks until the agent answers, or its session ends as one that is silent does.
func (f *Fleet) prove(ctx context.Context, conn *Conn) {
	for !alive(ctx, conn) {
		select {
		case <-conn.Done():
			return
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	conn.unproven = false
	if a := f.agents[conn.Agent]; a != nil && a.conn == conn {
		f.share(a, false)
	}
}

// PeerGone takes back what a proxy held.
func (f *Fleet) PeerGone(proxy string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, a := range f.agents {
		if _, ok := a.peers[proxy]; ok {
			f.applyEnd(name, proxy)
		}
	}
}

// sweep writes down what happened to agents whose proxies can't do so any more: of all
// proxies the one that leads does it.
func (f *Fleet) sweep() {
	if f.config.Shared == nil || !f.config.Shared.Leads() {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.agents {
		// A proxy that ends in good order writes it itself, at about the same time.
		if !a.isConnected() && a.modified != 0 && !a.dirty && (!a.lost || a.held > a.modified) && time.Since(a.learned) > sweepAfter {
			f.share(a, true)
		}
	}
}

const (
	sweepEvery = time.Second
	sweepAfter = time.Second
)

// Drain says that this proxy goes: scrapes take the sessions of others where there are
// some, and its own count no more for agents that have one.
func (f *Fleet) Drain() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.config.Shared == nil {
		return
	}
	f.draining = true
	for _, a := range f.agents {
		if a.conn != nil && len(a.peers) > 0 {
			f.share(a, false)
		}
	}
}

// Staying returns how many agents have their only session here.
func (f *Fleet) Staying() int {
	f.mu.RLock()
	defer f.mu.RUnlock()
	n := 0
	for _, a := range f.agents {
		if a.conn != nil && len(a.peers) == 0 {
			n++
		}
	}
	return n
}

// settleConflicts ends sessions of names that two instances have, each through another
// proxy, until ctx ends. It happens where both came at once, or the proxies could not
// ask each other.
func (f *Fleet) settleConflicts(ctx context.Context) {
	tick := time.NewTicker(30 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-f.conflicts:
		}
		type conflict struct {
			conn *Conn
			own  int64
			held Held
		}
		var found []conflict
		f.mu.RLock()
		for _, a := range f.agents {
			for _, held := range a.peers {
				if a.conn != nil && held.Instance != HashInstance(a.conn.Instance) {
					found = append(found, conflict{a.conn, a.own, held})
				}
			}
		}
		f.mu.RUnlock()
		for _, c := range found {
			reason := fmt.Sprintf("another agent of the name is connected from %s through another proxy", c.held.RemoteAddr)
			if younger := c.own == 0 || c.own > c.held.Revision; younger {
				askCtx, cancel := context.WithTimeout(ctx, pingTimeout)
				alive, err := f.config.Shared.Alive(askCtx, c.conn.Agent, c.held)
				cancel()
				if err != nil || !alive {
					continue
				}
			} else if alive(ctx, c.conn) {
				continue // the other proxy ends the other one
			} else {
				reason = "it gives no sign of life, and " + reason
			}
			if f.Lost(c.conn, reason) {
				f.closeAll([]closing{{c.conn, errors.New(reason)}})
			}
		}
	}
}

// strangers returns the sessions of the name that another instance has through other
// proxies. It is called with mu held.
func (f *Fleet) strangers(conn *Conn, gone map[int64]struct{}) []Held {
	a := f.agents[conn.Agent]
	if a == nil {
		return nil
	}
	var found []Held
	for _, held := range a.peers {
		if _, ok := gone[held.Revision]; !ok && held.Instance != HashInstance(conn.Instance) {
			found = append(found, held)
		}
	}
	return found
}

// AliveHere asks an agent's session of this proxy for a sign of life, on behalf of
// another one. A session that gives none is ended.
func (f *Fleet) AliveHere(ctx context.Context, name, instance string) bool {
	f.mu.RLock()
	var conn *Conn
	if a := f.agents[name]; a != nil {
		conn = a.conn
	}
	f.mu.RUnlock()
	if conn == nil || HashInstance(conn.Instance) != instance {
		return false
	}
	if alive(ctx, conn) {
		return true
	}
	if f.Lost(conn, "it gave no sign of life when another process came with its name") {
		go conn.Close()
	}
	return false
}

// Way is how an agent is reached: by its session here, or by the one that another
// proxy holds.
type Way struct {
	Agent *Agent
	Conn  *Conn // nil: through Held.Proxy
	Held  Held
}

// Reach returns a way to an agent of the route. Tried holds, by proxy, the revisions of
// sessions that are of no use. Where there is no way it waits until ctx ends, and
// returns false then.
func (f *Fleet) Reach(ctx context.Context, r Route, tried map[string]int64) (Way, bool) {
	var way Way
	ok := f.await(ctx, r, func() bool {
		if a, conn := r.connected(); conn != nil && !f.draining {
			way = Way{Agent: a, Conn: conn}
			return true
		}
		if others := f.others(r, tried); len(others) > 0 {
			way = others[rand.IntN(len(others))]
			return true
		}
		a, conn := r.connected()
		way = Way{Agent: a, Conn: conn}
		return conn != nil
	})
	return way, ok
}

// others returns the ways through other proxies, but for those of tried: through those
// that answer, where there are such. It is called with mu held.
func (f *Fleet) others(r Route, tried map[string]int64) (ways []Way) {
	var silent []Way
	for _, a := range r.Agents {
		for _, held := range a.peers {
			if rev, was := tried[held.Proxy+"/"+a.Name]; was && rev == held.Revision {
				continue
			}
			if f.config.Shared.Silent(held.Proxy) {
				silent = append(silent, Way{Agent: a, Held: held})
			} else {
				ways = append(ways, Way{Agent: a, Held: held})
			}
		}
	}
	if len(ways) == 0 {
		return silent
	}
	return ways
}

// Better reports whether there is a way to an agent of the route that is not tried and
// does not lead through the given proxy, which has fallen silent.
func (f *Fleet) Better(r Route, tried map[string]int64, proxy string) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if _, conn := r.connected(); conn != nil && !f.draining {
		return true
	}
	return slices.ContainsFunc(f.others(r, tried), func(w Way) bool {
		return w.Held.Proxy != proxy && !f.config.Shared.Silent(w.Held.Proxy)
	})
}

// Holder is a proxy that holds a session of an agent, as the API shows it.
type Holder struct {
	ID         string    `json:"id"`
	URL        string    `json:"url,omitempty"` // for the other proxies
	Since      time.Time `json:"since"`
	RemoteAddr string    `json:"remote_address,omitempty"`
	Transport  string    `json:"transport,omitempty"`
}

// holders returns who holds sessions of an agent, sorted by ID. It is called with mu
// held.
func (f *Fleet) holders(a *Agent) []Holder {
	var holders []Holder
	add := func(h Held) {
		holders = append(holders, Holder{ID: h.Proxy, URL: f.config.Shared.URL(h.Proxy), Since: h.Since, RemoteAddr: h.RemoteAddr, Transport: h.Transport})
	}
	for _, held := range a.peers {
		add(held)
	}
	if c := a.conn; c != nil && !(f.draining && len(a.peers) > 0) {
		add(Held{Proxy: f.config.Shared.Self, Since: a.since.UTC(), RemoteAddr: c.RemoteAddr, Transport: c.Transport})
	}
	slices.SortFunc(holders, func(a, b Holder) int { return strings.Compare(a.ID, b.ID) })
	return holders
}

// Cluster returns which records the fleet shares: see Snapshot.
func (f *Fleet) Cluster() string {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.cluster
}
