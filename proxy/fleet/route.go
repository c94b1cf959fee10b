package fleet

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"

	"github.com/culvert-io/culvert/protocol"
)

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
	var agent *Agent
	var conn *Conn
	ok := f.await(ctx, r, func() bool {
		agent, conn = r.connected()
		return conn != nil
	})
	return agent, conn, ok
}

// await asks found, with mu held, until it says yes, whenever an agent of the route
// comes. It returns false where ctx ends before.
func (f *Fleet) await(ctx context.Context, r Route, found func() bool) bool {
	f.mu.RLock()
	ok := found()
	f.mu.RUnlock()
	if ok {
		return true
	}
	arrived := make(chan struct{}, 1)
	f.mu.Lock()
	for _, a := range r.Agents {
		if a.waiters == nil {
			a.waiters = map[chan struct{}]struct{}{}
		}
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
		ok := found()
		f.mu.RUnlock()
		if ok {
			return true
		}
		select {
		case <-arrived:
		case <-ctx.Done():
			return false
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

// Conn returns the connection of the agent of a name, nil where there is none.
func (f *Fleet) Conn(name string) *Conn {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if a := f.agents[name]; a != nil && a.conn != nil && a.conn.Err() == nil {
		return a.conn
	}
	return nil
}

// index makes the names of an agent lead to it. It is called with mu held.
func (f *Fleet) index(a *Agent) {
	f.bytes += size(a.registration)
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
	f.bytes -= size(a.registration)
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
