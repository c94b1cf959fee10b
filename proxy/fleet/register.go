package fleet

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"reflect"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// Register makes conn the session of its agent, or, where it is that already,
// replaces the registration. An older session of the agent is closed. It returns
// a *protocol.Refusal: 400 for a malformed registration, 409 where a name is
// taken, 413 for a registration of which discovery would get too long, 503 where the
// fleet is full: see Config.MaxKnown. When it returns nil the agent is stored, unless storing failed, which
// is logged: scrapes go on without a store.
func (f *Fleet) Register(ctx context.Context, conn *Conn, reg protocol.Registration) error {
	var gone silent
	for {
		err := f.check(ctx, conn, reg, &gone)
		if err != nil {
			return err
		}
		f.mu.Lock()
		a := f.agents[conn.Agent]
		if _, err := f.collision(conn.Agent, reg); err != nil || f.full(conn.Agent, reg) != nil || f.rival(conn, gone.conn) != nil || len(f.strangers(conn, gone.held)) > 0 {
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
			delete(f.deleted, a.Name)
		}
		old := a.conn
		a.forget = false
		f.share(a, a.created == 0 || a.lost || a.kind != conn.Kind || !reflect.DeepEqual(a.registration, reg))
		f.unindex(a)
		a.registration, a.kind = reg, conn.Kind
		f.index(a)
		if old != conn {
			a.conn, a.since, a.reason = conn, time.Now(), ""
			f.wake(a)
		}
		f.changed(a)
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
	return f.check(ctx, conn, reg, new(silent))
}

// silent are sessions that have a name and gave no sign of life.
type silent struct {
	conn *Conn
	held map[int64]struct{} // of other proxies, by their revisions
}

// check looks for what speaks against a registration. It notes the sessions that have
// the name and gave no sign of life.
func (f *Fleet) check(ctx context.Context, conn *Conn, reg protocol.Registration, gone *silent) error {
	if err := reg.Check(conn.Agent); err != nil {
		return protocol.Refusef(http.StatusBadRequest, protocol.CodeInvalid, "registration of %q: %v", conn.Agent, err)
	}
	if n := size(reg); n > maxRegistration {
		return protocol.Refusef(http.StatusRequestEntityTooLarge, protocol.CodeTooLarge,
			"the registration of %q takes %d bytes with its labels at each target, as discovery lists them; at most %d: declare fewer targets, or fewer labels", conn.Agent, n, maxRegistration)
	}
	f.mu.RLock()
	_, err := f.collision(conn.Agent, reg)
	err = cmp.Or(err, f.full(conn.Agent, reg))
	rival := f.rival(conn, gone.conn)
	strangers := f.strangers(conn, gone.held)
	f.mu.RUnlock()
	if err != nil {
		return err
	}
	for _, held := range strangers {
		askCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pingTimeout+time.Second)
		alive, err := f.config.Shared.Alive(askCtx, conn.Agent, held)
		cancel()
		if alive {
			return protocol.Refusef(http.StatusConflict, protocol.CodeTaken,
				"the name %q is taken by a live agent at %s, connected for %s through another proxy; stop that one, or choose another --fqdn",
				conn.Agent, held.RemoteAddr, time.Since(held.Since).Round(time.Second))
		}
		if err != nil {
			f.config.Logger.Warn("The proxy that holds another agent of the name can't be asked for it; the newcomer is taken", "agent", conn.Agent, "holder", held.RemoteAddr, "err", err)
		}
		if gone.held == nil {
			gone.held = map[int64]struct{}{}
		}
		gone.held[held.Revision] = struct{}{}
	}
	if rival == nil {
		return ctx.Err()
	}
	if alive(ctx, rival) {
		return protocol.Refusef(http.StatusConflict, protocol.CodeTaken,
			"the name %q is taken by a live agent at %s, connected for %s; stop that one, or choose another --fqdn",
			conn.Agent, rival.RemoteAddr, time.Since(rival.started).Round(time.Second))
	}
	gone.conn = rival
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

// alive asks an agent for a sign of life. Who asks may go away meanwhile; that says
// nothing of the agent, so ctx's end is not passed on.
func alive(ctx context.Context, c *Conn) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pingTimeout)
	defer cancel()
	return c.Alive(ctx)
}

// collision returns the refusal for a registration whose names lead elsewhere
// already, and to whom. Only hosts may be shared between agents. It is called with mu held.
func (f *Fleet) collision(agent string, reg protocol.Registration) (holder string, err error) {
	taken := func(what, by string) (string, error) {
		return by, protocol.Refusef(http.StatusConflict, protocol.CodeCollision,
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
	return "", nil
}

const (
	// maxRegistration bounds what discovery lists of one agent, in bytes. Labels of the
	// agent stand at each of its targets there, so that 100 kB of JSON could become 64 MB.
	maxRegistration = 4 << 20
	// meanRegistration is what the registrations may take on average where there are
	// Config.MaxKnown. That of an agent with 50 targets takes about 10 kB.
	meanRegistration = 16 << 10
	// fullRetry is when an agent that found no room tries again.
	fullRetry = time.Minute
)

// size is about what a registration takes in memory and in discovery, in bytes.
func size(reg protocol.Registration) int {
	const perString = 16 // of its header, or of what stands around it in JSON
	length := func(labels map[string]string) (n int) {
		for name, value := range labels {
			n += len(name) + len(value) + 2*perString
		}
		return n
	}
	own := length(reg.Labels)
	n := len(reg.Version) + own
	for _, s := range [][]string{reg.Hosts, reg.Capabilities} {
		for _, s := range s {
			n += len(s) + perString
		}
	}
	for _, t := range reg.Targets {
		n += len(t.Name) + len(t.Path) + 2*perString + length(t.Labels) + own
		for name, values := range t.Params {
			n += len(name) + perString
			for _, value := range values {
				n += len(value) + perString
			}
		}
	}
	return n
}

// full returns the refusal for an agent for which there is no room. An agent that is
// known has its place, and may come back as it was. It is called with mu held.
func (f *Fleet) full(agent string, reg protocol.Registration) error {
	limit, before := f.config.MaxKnown, 0
	refuse := func(format string, args ...any) error {
		refusal := protocol.Refusef(http.StatusServiceUnavailable, protocol.CodeUnavailable, format, args...)
		refusal.RetryAfter = fullRetry
		return refusal
	}
	a, known := f.agents[agent]
	if known {
		before = size(a.registration)
	} else if len(f.agents) >= limit {
		return refuse("%d agents are known here, the lost ones included, and %q would be one more (--agent.max-known); forget those that are gone for good by DELETE /api/v1/agents/NAME", len(f.agents), agent)
	}
	if n := size(reg); n > before && f.bytes-before+n > limit*meanRegistration {
		return refuse("the registrations of all agents take %d bytes, and %d more of %q would be too many for --agent.max-known=%d; raise it, or declare fewer targets and labels", f.bytes, n-before, agent, limit)
	}
	return nil
}
