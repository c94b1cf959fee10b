package fleet_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// TestResolve is the order of names. Liveness plays no part in it.
func TestResolve(t *testing.T) {
	t.Parallel()
	f, _ := open(t, fleet.Config{})
	targets := []protocol.Target{{Name: "node", Path: "/metrics"}}
	conns := map[string]*fleet.Conn{}
	for name, reg := range map[string]protocol.Registration{
		"web.lan":     {Targets: targets},
		"left":        {Hosts: []string{"db.lan", "*.lan"}},
		"right":       {Hosts: []string{"db.lan", "*.b.lan"}},
		"deep.b.lan":  {Targets: targets},
		"single":      {Targets: targets, Hosts: []string{"*.single.example"}},
		"example":     {},
		"x.10.in.org": {Hosts: []string{"*.10.in.org"}},
	} {
		conns[name] = register(t, f, name, reg)
	}
	rows := []struct {
		name  string
		want  string // the agents; "" for nobody
		exact bool
	}{
		{"web.lan", "web.lan", true},
		{"node.web.lan", "web.lan", true},
		{"agent.web.lan", "web.lan", true},
		{"other.web.lan", "left", false}, // the wildcard comes before a target that nobody declared
		{"db.lan", "left right", true},
		{"x.lan", "left", false},
		{"x.y.lan", "left", false},
		{"lan", "", false},
		{"x.b.lan", "right", false},
		{"x.y.b.lan", "right", false},
		{"b.lan", "left", false},
		{"deep.b.lan", "deep.b.lan", true},
		{"node.deep.b.lan", "deep.b.lan", true},
		{"single", "single", true},
		{"node.single", "single", true},
		{"undeclared.single", "single", false}, // which refuses, and names --target
		{"a.b.single", "", false},
		{"a.single.example", "single", false},
		{"single.example", "example", false}, // an undeclared target of "example"
		{"y.10.in.org", "x.10.in.org", false},
		{"", "", false},
		{".", "", false},
	}
	check := func(t *testing.T) {
		for _, c := range rows {
			route, ok := f.Resolve(c.name)
			var got []string
			for _, a := range route.Agents {
				got = append(got, a.Name)
			}
			slices.Sort(got)
			if strings.Join(got, " ") != c.want || ok != (c.want != "") || route.Exact != c.exact {
				t.Errorf("%q: got %v, exact %v, %v; want %q, exact %v", c.name, got, route.Exact, ok, c.want, c.exact)
			}
		}
	}
	check(t)
	for name, conn := range conns {
		if !f.Lost(conn, "test") || f.Lost(conn, "again") {
			t.Errorf("%s: Lost said the wrong thing", name)
		}
	}
	t.Run("all lost", check)
}

// TestConnected waits for an agent until the context ends.
func TestConnected(t *testing.T) {
	t.Parallel()
	f, _ := open(t, fleet.Config{})
	conn := register(t, f, "web-1", protocol.Registration{})
	route, _ := f.Resolve("web-1")
	if a, c, ok := f.Connected(t.Context(), route); !ok || a.Name != "web-1" || c != conn {
		t.Errorf("got %v %v %v", a, c, ok)
	}
	f.Lost(conn, "test")
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, ok := f.Connected(ended, route); ok {
		t.Error("a lost agent is connected")
	}
	const n = 20
	var waiting sync.WaitGroup
	results := make(chan *fleet.Conn, n)
	for range n {
		waiting.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			_, c, _ := f.Connected(ctx, route)
			results <- c
		})
	}
	again, _ := connect(t, "web-1", "2")
	if err := f.Register(t.Context(), again, protocol.Registration{}); err != nil {
		t.Fatal(err)
	}
	waiting.Wait()
	for range n {
		if c := <-results; c != again {
			t.Errorf("a waiting scrape got %v", c)
		}
	}
}

// TestConnectedAfterForget: a route that was found before its agent was forgotten
// leads nowhere, and harms nobody.
func TestConnectedAfterForget(t *testing.T) {
	t.Parallel()
	f, _ := open(t, fleet.Config{})
	f.Lost(register(t, f, "web-1", protocol.Registration{}), "test")
	route, _ := f.Resolve("web-1")
	f.Forget("web-1")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, _, ok := f.Connected(ctx, route); ok {
		t.Error("a forgotten agent is connected")
	}
}

// TestSessionGone: a session that ended can't register.
func TestSessionGone(t *testing.T) {
	t.Parallel()
	f, _ := open(t, fleet.Config{})
	conn, agent := connect(t, "web-1", "1")
	agent.Close()
	<-conn.Done()
	err := f.Register(t.Context(), conn, protocol.Registration{})
	if r, ok := protocol.AsRefusal(err); !ok || r.Code != protocol.CodeUnavailable {
		t.Errorf("got %v", err)
	}
	if _, known := f.Resolve("web-1"); known {
		t.Error("it is known")
	}
}

// TestPersistence: what was registered is on disk when Register returns.
func TestPersistence(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "sub", "fleet.db")
	f, stop := open(t, fleet.Config{Path: path})
	if settled, _ := f.Settled(); !settled {
		t.Error("not settled without a settle time")
	}
	reg := protocol.Registration{
		Version: "1", Capabilities: []string{"x"}, Hosts: []string{"db.lan"}, Labels: map[string]string{"a": "b"},
		Targets: []protocol.Target{{Name: "node", Path: "/x", Params: map[string][]string{"p": {"1", "2"}}, Labels: map[string]string{"c": "d"}}},
	}
	register(t, f, "connected", reg)
	f.Lost(register(t, f, "lost", reg), "test")
	f.Lost(register(t, f, "forgotten", reg2("x.lan")), "test")
	f.Forget("forgotten")
	before, _ := f.Agent("lost")
	stop()

	start := time.Now()
	again, stopAgain := open(t, fleet.Config{Path: path, SettleTime: time.Hour})
	if settled, _ := again.Settled(); !settled {
		t.Error("a stored list is not settled")
	}
	infos := again.Agents()
	if len(infos) != 2 || infos[0].Name != "connected" || infos[1].Name != "lost" {
		t.Fatalf("got %+v", infos)
	}
	for _, info := range infos {
		if info.Connected || fmt.Sprintf("%+v", info.Registration) != fmt.Sprintf("%+v", reg) {
			t.Errorf("got %+v", info)
		}
	}
	if !infos[1].Since.Equal(before.Since) {
		t.Errorf("lost %s, stored as lost %s", before.Since, infos[1].Since)
	}
	if infos[0].Since.Before(start.Add(-time.Second)) { // it can't be known when it was lost
		t.Errorf("the agent that was connected counts as lost since %s", infos[0].Since)
	}
	stopAgain()
}

func reg2(host string) protocol.Registration { return protocol.Registration{Hosts: []string{host}} }

// TestForgetAfterRestart: the time that the proxy was away counts, but an agent
// that was connected gets its chance to come back.
func TestForgetAfterRestart(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "fleet.db")
	f, stop := open(t, fleet.Config{Path: path})
	register(t, f, "connected", protocol.Registration{})
	f.Lost(register(t, f, "lost", protocol.Registration{}), "test")
	stop()
	again, _ := open(t, fleet.Config{Path: path, ForgetAfter: time.Second})
	if connected, lost := again.Counts(); connected != 0 || lost != 2 {
		t.Errorf("%d connected, %d lost", connected, lost)
	}
	eventually(t, "the lost agent is forgotten", func() bool { _, ok := again.Agent("lost"); return !ok })
	eventually(t, "both are forgotten", func() bool { return len(again.Agents()) == 0 })
}

// TestInUse: the file belongs to one process.
func TestInUse(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "fleet.db")
	open(t, fleet.Config{Path: path})
	_, err := fleet.Open(fleet.Config{Path: path})
	if !errors.Is(err, fleet.ErrInUse) || !strings.Contains(err.Error(), path) {
		t.Errorf("got %v", err)
	}
}

// TestConcurrency lets everything happen at the same time; the race detector and
// the checks at the end tell whether that went well.
func TestConcurrency(t *testing.T) {
	t.Parallel()
	f, _ := open(t, fleet.Config{Path: filepath.Join(t.TempDir(), "fleet.db"), MaxScrapes: 1})
	var tasks sync.WaitGroup
	for i := range 4 {
		name := fmt.Sprintf("web-%d", i%3)
		for instance := range 2 {
			conn, _ := connect(t, name, fmt.Sprint(10*i+instance))
			tasks.Go(func() {
				for n := range 20 {
					err := f.Register(context.Background(), conn, reg2(fmt.Sprintf("h%d.lan", n%4)))
					if _, ok := protocol.AsRefusal(err); err != nil && !ok {
						t.Error(err)
					}
					if n%5 == 0 {
						f.Lost(conn, "test")
					}
				}
			})
		}
		tasks.Go(func() {
			for n := range 200 {
				route, _ := f.Resolve(fmt.Sprintf("h%d.lan", n%4))
				ctx, cancel := context.WithTimeout(context.Background(), time.Microsecond)
				f.Connected(ctx, route)
				cancel()
				f.Agents()
				f.Counts()
				f.Conns()
				f.Settled()
			}
		})
	}
	tasks.Wait()
	for i := range 3 {
		name := fmt.Sprintf("web-%d", i)
		f.Forget(name)
		if _, known := f.Resolve(name); known {
			t.Errorf("%s is still known", name)
		}
	}
	for i := range 4 {
		if route, known := f.Resolve(fmt.Sprintf("h%d.lan", i)); known {
			t.Errorf("h%d.lan still leads to %v", i, route.Agents)
		}
	}
}
