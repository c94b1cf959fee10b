package fleet_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// others stands for what is between the proxies.
type others struct {
	mu      sync.Mutex // protects what follows
	changed []string
	leads   bool
	alive   func(held fleet.Held) (bool, error)
	silent  string // a proxy
}

func (o *others) shared() *fleet.Shared {
	return &fleet.Shared{
		Self: "self",
		Changed: func(agent string) {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.changed = append(o.changed, agent)
		},
		Alive:   func(_ context.Context, _ string, held fleet.Held) (bool, error) { return o.alive(held) },
		Leads:   func() bool { return o.leads },
		Silent:  func(proxy string) bool { return proxy == o.silent },
		Settled: func() {},
		URL:     func(proxy string) string { return "http://" + proxy },
	}
}

// take returns which agents have changed since the last call.
func (o *others) take() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	changed := o.changed
	o.changed = nil
	slices.Sort(changed)
	return slices.Compact(changed)
}

// openShared returns a fleet that knows what there is in the snapshot.
func openShared(t *testing.T, o *others, config fleet.Config, s fleet.Snapshot) *fleet.Fleet {
	t.Helper()
	config.Shared = o.shared()
	f, _ := open(t, config)
	if s.Cluster == "" {
		s.Cluster = "cluster"
	}
	f.Load(s)
	o.take()
	return f
}

func names(f *fleet.Fleet) []string {
	var all []string
	for _, info := range f.Agents() {
		all = append(all, info.Name)
	}
	return all
}

func record(created int64, reg protocol.Registration) fleet.Record {
	return fleet.Record{Registration: reg, FirstSeen: time.Unix(1, 0), Created: created, Modified: created}
}

// Of agents that claim one name, the one whose record is older stays, whatever the order
// in which a proxy hears of them.
func TestSharedCollision(t *testing.T) {
	t.Parallel()
	target := protocol.Registration{Targets: []protocol.Target{{Name: "node", Path: "/metrics"}}}
	older, younger := record(5, target), record(9, protocol.Registration{})
	for name, claims := range map[string]map[string]fleet.Record{
		"the agent with the target": {"web": older, "node.web": younger},
		"the agent of the name":     {"web": record(9, target), "node.web": record(5, protocol.Registration{})},
		"the host":                  {"other": record(5, protocol.Registration{Hosts: []string{"web"}}), "web": younger},
	} {
		t.Run(name, func(t *testing.T) {
			var want []string
			for agent, rec := range claims {
				if rec.Created == 5 {
					want = []string{agent}
				}
			}
			var agents []string
			for agent := range claims {
				agents = append(agents, agent)
			}
			for _, order := range [][]string{{agents[0], agents[1]}, {agents[1], agents[0]}} {
				f := openShared(t, &others{}, fleet.Config{}, fleet.Snapshot{})
				for _, agent := range order {
					rec := claims[agent]
					f.Apply([]fleet.Event{{Agent: agent, Record: &rec}})
				}
				if got := names(f); !slices.Equal(got, want) {
					t.Errorf("in the order %v: %v, want %v", order, got, want)
				}
			}
			if got := names(openShared(t, &others{}, fleet.Config{}, fleet.Snapshot{Records: claims})); !slices.Equal(got, want) {
				t.Errorf("loaded at once: %v, want %v", got, want)
			}
		})
	}
}

// An agent of this proxy whose name an older record has is disconnected, and its record
// deleted.
func TestSharedCollisionHere(t *testing.T) {
	t.Parallel()
	o := &others{}
	f := openShared(t, o, fleet.Config{}, fleet.Snapshot{})
	conn := register(t, f, "node.web", protocol.Registration{})
	rec := record(5, protocol.Registration{Targets: []protocol.Target{{Name: "node", Path: "/metrics"}}})
	f.Apply([]fleet.Event{{Agent: "web", Record: &rec}})
	select {
	case <-conn.Done():
	case <-time.After(patience):
		t.Fatal("the session goes on")
	}
	if got := names(f); !slices.Equal(got, []string{"web"}) {
		t.Errorf("known: %v", got)
	}
	if c, ok := f.Pending("node.web"); !ok || !c.Delete {
		t.Errorf("to be written: %+v, %v; want its deletion", c, ok)
	}
}

// What is written follows the agent.
func TestSharedPending(t *testing.T) {
	t.Parallel()
	o := &others{}
	f := openShared(t, o, fleet.Config{}, fleet.Snapshot{})
	conn := register(t, f, "web", protocol.Registration{})
	if got := o.take(); !slices.Equal(got, []string{"web"}) {
		t.Errorf("changed: %v", got)
	}
	c, ok := f.Pending("web")
	if !ok || c.Session == nil || c.Record == nil || !c.Record.LostAt.IsZero() || c.Modified >= 0 {
		t.Fatalf("connected: %+v", c)
	}
	if c.Session.Instance == conn.Instance || c.Session.Instance != fleet.HashInstance(conn.Instance) {
		t.Errorf("the instance is told as it is: %q", c.Session.Instance)
	}
	f.Written(c, 7, true)
	if c, ok := f.Pending("web"); ok {
		t.Errorf("all is written, but %+v", c)
	}
	f.Unsaved(false) // the lease was lost
	if c, ok = f.Pending("web"); !ok || c.Session == nil || c.Record != nil {
		t.Errorf("the session alone has gone: %+v, %v", c, ok)
	}
	f.Written(c, 8, true)
	o.take()
	f.Unsaved(true) // and this proxy was cut off: the agent answers
	eventually(t, "the agent's answer is to have the session written", func() bool { return slices.Equal(o.take(), []string{"web"}) })
	if c, ok = f.Pending("web"); !ok || c.Session == nil {
		t.Errorf("the session is proven: %+v, %v", c, ok)
	}
	f.Written(c, 8, true)
	f.Lost(conn, "test")
	if c, ok = f.Pending("web"); !ok || c.Session != nil || c.Keep || c.Record == nil || c.Record.Reason != "test" || c.Modified != 7 {
		t.Errorf("lost: %+v, %v", c, ok)
	}
	f.Written(c, 9, true)
	f.Forget("web")
	if c, ok = f.Pending("web"); !ok || !c.Delete {
		t.Errorf("forgotten: %+v, %v", c, ok)
	}
}

// Of the ways through other proxies those are taken that lead to one which answers.
func TestSharedSilent(t *testing.T) {
	t.Parallel()
	o := &others{silent: "b"}
	f := openShared(t, o, fleet.Config{}, fleet.Snapshot{})
	rec := record(5, protocol.Registration{})
	f.Apply([]fleet.Event{{Agent: "web", Record: &rec},
		{Agent: "web", Proxy: "a", Held: &fleet.Held{Proxy: "a", Revision: 6}},
		{Agent: "web", Proxy: "b", Held: &fleet.Held{Proxy: "b", Revision: 7}}})
	route, _ := f.Resolve("web")
	for range 50 {
		if way, ok := f.Reach(t.Context(), route, nil); !ok || way.Held.Proxy != "a" {
			t.Fatalf("got %+v, %v", way, ok)
		}
	}
	tried := map[string]int64{"a/web": 6}
	if way, ok := f.Reach(t.Context(), route, tried); !ok || way.Held.Proxy != "b" {
		t.Errorf("one that is silent is better than none: %+v, %v", way, ok)
	}
	if !f.Better(route, nil, "b") || f.Better(route, tried, "b") || f.Better(route, nil, "a") {
		t.Error("through a is better than through b, until it was tried; nothing is better than a")
	}
}

// Clocks that differ forget nobody early, and nobody never.
func TestSharedForgetByOwnClock(t *testing.T) {
	t.Parallel()
	o := &others{leads: true}
	f := openShared(t, o, fleet.Config{ForgetAfter: 300 * time.Millisecond}, fleet.Snapshot{})
	begin := time.Now()
	for name, lostAt := range map[string]time.Time{"behind": begin.Add(-24 * time.Hour), "ahead": begin.Add(24 * time.Hour)} {
		rec := record(5, protocol.Registration{})
		rec.LostAt, rec.Reason = lostAt, "test"
		f.Apply([]fleet.Event{{Agent: name, Record: &rec}})
		if info, _ := f.Agent(name); !info.Since.Equal(lostAt) || info.LostReason != "test" {
			t.Errorf("%s: lost since %s (%s), want what the record says", name, info.Since, info.LostReason)
		}
	}
	forgotten := map[string]time.Time{}
	eventually(t, "both are to be forgotten", func() bool {
		for _, name := range []string{"behind", "ahead"} {
			if c, _ := f.Pending(name); c.Forget && forgotten[name].IsZero() {
				forgotten[name] = time.Now()
			}
		}
		return len(forgotten) == 2
	})
	for name, at := range forgotten {
		if at.Sub(begin) < 300*time.Millisecond {
			t.Errorf("%s: forgotten after %s", name, at.Sub(begin))
		}
	}
}

// What is not among the records any more was forgotten; but the records of a cluster that
// this proxy did not know don't count for that.
func TestSharedLoad(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "fleet.db")
	f, stop := open(t, fleet.Config{Path: path})
	conn := register(t, f, "old", protocol.Registration{})
	f.Lost(conn, "test")
	stop()

	o := &others{}
	f, stop = open(t, fleet.Config{Path: path, Shared: o.shared()})
	f.Load(fleet.Snapshot{Cluster: "first", Records: map[string]fleet.Record{"new": record(5, protocol.Registration{})}})
	if got := names(f); !slices.Equal(got, []string{"new", "old"}) {
		t.Errorf("joined: %v", got)
	}
	if c, ok := f.Pending("old"); !ok || c.Record == nil || c.Record.LostAt.IsZero() || c.Modified != 0 {
		t.Errorf("what the cluster does not know is to be written where there is nothing: %+v, %v", c, ok)
	}
	stop()

	f, _ = open(t, fleet.Config{Path: path, Shared: o.shared()})
	if got := names(f); !slices.Equal(got, []string{"new", "old"}) {
		t.Errorf("kept: %v", got)
	}
	f.Load(fleet.Snapshot{Cluster: "first", Records: map[string]fleet.Record{"new": record(5, protocol.Registration{})}})
	if got := names(f); !slices.Equal(got, []string{"new"}) {
		t.Errorf("again: %v, want that alone which was not forgotten", got)
	}
	f.Load(fleet.Snapshot{Cluster: "second"})
	if got := names(f); !slices.Equal(got, []string{"new"}) {
		t.Errorf("in a cluster that was set up anew: %v", got)
	}
}

// Another process of the name is asked for where its proxy is.
func TestSharedTaken(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		alive bool
		err   error
		taken bool
	}{
		"alive":       {true, nil, true},
		"gone":        {false, nil, false},
		"unreachable": {false, errors.New("no answer"), false},
	} {
		t.Run(name, func(t *testing.T) {
			o := &others{alive: func(fleet.Held) (bool, error) { return row.alive, row.err }}
			f := openShared(t, o, fleet.Config{}, fleet.Snapshot{
				Records: map[string]fleet.Record{"web": record(5, protocol.Registration{})},
				Held:    map[string][]fleet.Held{"web": {{Proxy: "peer", Instance: fleet.HashInstance("2"), RemoteAddr: "192.0.2.1:1", Revision: 5}}},
			})
			conn, _ := connect(t, "web", "1")
			err := f.Register(t.Context(), conn, protocol.Registration{})
			refusal, refused := protocol.AsRefusal(err)
			if refused != row.taken || refused && refusal.Code != protocol.CodeTaken {
				t.Errorf("got %v, want taken: %v", err, row.taken)
			}
			twin, _ := connect(t, "web", "2")
			if err := f.Check(t.Context(), twin, protocol.Registration{}); row.taken && err != nil {
				t.Errorf("the same process, through this proxy too: %v", err)
			}
		})
	}
}
