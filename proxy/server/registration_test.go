package server_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
)

// target returns a declared target.
func target(name string) protocol.Target { return protocol.Target{Name: name, Path: "/metrics"} }

// TestRegistration is the table of what one registration can be.
func TestRegistration(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	many := func(n int) (targets []protocol.Target) {
		for i := range n {
			targets = append(targets, target(fmt.Sprintf("t%d", i)))
		}
		return targets
	}
	labels := func(name, value string) map[string]string { return map[string]string{name: value} }
	manyLabels := map[string]string{}
	for i := range protocol.MaxLabels + 1 {
		manyLabels[fmt.Sprintf("l%d", i)] = ""
	}
	manyHosts := make([]string, protocol.MaxHosts+1)
	for i := range manyHosts {
		manyHosts[i] = fmt.Sprintf("h%d.lan", i)
	}
	type r = protocol.Registration
	for _, c := range []struct {
		name  string
		reg   r
		words []string // of the refusal; nil: accepted
	}{
		{"empty", r{}, nil},
		{"all fields", r{
			Version: "1.2.3", Capabilities: []string{"time-travel"},
			Targets: []protocol.Target{{Name: "node_1-x", Path: "/a/*", Params: map[string][]string{"a": {"b"}}, Labels: labels("job", "x")}},
			Hosts:   []string{"db.lan", "*.lan", "10.0.0.1", "UPPER.lan."}, Labels: labels("env", "prod"),
		}, nil},
		{"most targets", r{Targets: many(protocol.MaxTargets)}, nil},

		{"target without a name", r{Targets: []protocol.Target{target("")}}, []string{"targets[0].name"}},
		{"target of two labels", r{Targets: []protocol.Target{target("ok"), target("a.b")}}, []string{"targets[1].name", `"a.b"`}},
		{"target in capitals", r{Targets: []protocol.Target{target("Node")}}, []string{"targets[0].name"}},
		{"target with a blank", r{Targets: []protocol.Target{target("a b")}}, []string{"targets[0].name"}},
		{"target with a dash in front", r{Targets: []protocol.Target{target("-a")}}, []string{"targets[0].name"}},
		{"target of digits", r{Targets: []protocol.Target{target("9100")}}, []string{"targets[0].name", "digits"}},
		{"target agent", r{Targets: []protocol.Target{target("agent")}}, []string{"targets[0].name", `"agent"`}},
		{"target twice", r{Targets: []protocol.Target{target("a"), target("a")}}, []string{"targets[1].name", `"a"`}},
		{"too many targets", r{Targets: many(protocol.MaxTargets + 1)}, []string{"targets", "1001"}},
		{"path without a slash", r{Targets: []protocol.Target{{Name: "a", Path: "metrics"}}}, []string{"targets[0].path", `"metrics"`}},
		{"no path", r{Targets: []protocol.Target{{Name: "a"}}}, []string{"targets[0].path"}},
		{"bad label of a target", r{Targets: []protocol.Target{{Name: "a", Path: "/", Labels: labels("a-b", "")}}}, []string{"targets[0].labels", `"a-b"`}},
		{"bad label name", r{Labels: labels("a.b", "")}, []string{"labels", `"a.b"`}},
		{"empty label name", r{Labels: labels("", "")}, []string{"labels"}},
		{"reserved label name", r{Labels: labels("__address__", "")}, []string{"labels", `"__address__"`}},
		{"long label value", r{Labels: labels("a", strings.Repeat("x", protocol.MaxLabelValueBytes+1))}, []string{"labels", "1025"}},
		{"too many labels", r{Labels: manyLabels}, []string{"labels", "65"}},
		{"bad host", r{Hosts: []string{"ok.lan", "a b"}}, []string{"hosts[1]"}},
		{"empty host", r{Hosts: []string{""}}, []string{"hosts[0]"}},
		{"host with a port", r{Hosts: []string{"db.lan:9100"}}, []string{"hosts[0]"}},
		{"host *", r{Hosts: []string{"*"}}, []string{"hosts[0]", "*.example.net"}},
		{"wildcard in the middle", r{Hosts: []string{"a.*.lan"}}, []string{"hosts[0]"}},
		{"host twice", r{Hosts: []string{"db.lan", "DB.lan."}}, []string{"hosts[1]", "db.lan"}},
		{"too many hosts", r{Hosts: manyHosts}, []string{"hosts", "1001"}},
		{"host is the own name", r{Hosts: []string{"reg"}}, []string{"hosts[0]", "own name"}},
		{"host is an own target", r{Hosts: []string{"a.reg"}, Targets: []protocol.Target{target("a")}}, []string{"hosts[0]", "a.reg"}},
		{"host is the agent itself", r{Hosts: []string{"agent.reg"}}, []string{"hosts[0]", "agent.reg"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := dial(t, p, "reg", "1")
			defer s.Close()
			err := s.Register(t.Context(), &c.reg)
			if c.words == nil {
				if err != nil {
					t.Errorf("refused: %v", err)
				}
				return
			}
			wantRefusal(t, err, 400, protocol.CodeInvalid, c.words...)
		})
	}
}

// control sends a control request as it is on the session.
func control(t *testing.T, s *protocol.Session, method, path string, body io.Reader) (status int, code, text string) {
	t.Helper()
	transport := &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Open(ctx) },
		DisableKeepAlives: true,
	}
	req, err := http.NewRequest(method, "http://tunnel"+path, body)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	all, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, resp.Header.Get(protocol.HeaderError), string(all)
}

// TestRegistrationBody is what the JSON itself can be.
func TestRegistrationBody(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	s := dial(t, p, "reg", "1")
	for _, c := range []struct {
		name, body string
		status     int
		code       protocol.Code
	}{
		{"unknown fields", `{"version":"9","flavour":{"a":[1]},"targets":[{"name":"a","path":"/","colour":"red"}]}`, 200, ""},
		{"null", `null`, 200, ""},
		{"no JSON", `hello`, 400, protocol.CodeInvalid},
		{"empty", ``, 400, protocol.CodeInvalid},
		{"cut off", `{"version":`, 400, protocol.CodeInvalid},
		{"a list", `[]`, 400, protocol.CodeInvalid},
		{"wrong type", `{"targets":"a"}`, 400, protocol.CodeInvalid},
		{"too large", `{"version":"` + strings.Repeat("x", protocol.MaxRegistrationBytes) + `"}`, 413, protocol.CodeTooLarge},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, code, text := control(t, s, "PUT", protocol.PathRegistration, strings.NewReader(c.body))
			if status != c.status || code != string(c.code) {
				t.Errorf("got %d %q: %s", status, code, text)
			}
		})
	}
	t.Run("too large, chunked", func(t *testing.T) {
		body := io.MultiReader(strings.NewReader(`{"version":"`), bytes.NewReader(bytes.Repeat([]byte("x"), 3*protocol.MaxRegistrationBytes)))
		if status, _, text := control(t, s, "PUT", protocol.PathRegistration, body); status != 413 {
			t.Errorf("got %d: %s", status, text)
		}
	})
	for _, c := range []struct{ method, path string }{
		{"GET", "/v1/registration"}, {"POST", "/v1/registration"}, {"GET", "/"}, {"GET", "/metrics"},
		{"GET", "/api/v1/agents"}, {"PUT", "/v2/registration"}, {"PUT", "/api/v1/admin/wipe"},
	} {
		t.Run("unknown "+c.method+" "+c.path, func(t *testing.T) {
			status, code, _ := control(t, s, c.method, c.path, nil)
			if status != 404 || code != string(protocol.CodeNotFound) {
				t.Errorf("got %d %q", status, code)
			}
		})
	}
	t.Run("an agent can't scrape through the proxy", func(t *testing.T) {
		conn, err := s.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, "GET http://reg:9100/metrics HTTP/1.1\r\nHost: reg\r\nConnection: close\r\n\r\n")
		all, _ := io.ReadAll(conn)
		if !strings.HasPrefix(string(all), "HTTP/1.1 404 ") {
			t.Errorf("got %.40q", all)
		}
	})
}

// TestSameName: who may have a name that somebody has.
func TestSameName(t *testing.T) {
	t.Parallel()
	answers := func(s *protocol.Session) bool {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		_, err := s.Ping(ctx)
		return err == nil
	}
	t.Run("a live agent keeps it", func(t *testing.T) {
		t.Parallel()
		p := newProxy(t, nil)
		first := register(t, p, "web-1", "1", protocol.Registration{})
		second := dial(t, p, "web-1", "2")
		err := second.Register(t.Context(), &protocol.Registration{})
		wantRefusal(t, err, 409, protocol.CodeTaken, `"web-1"`, "live agent at 127.0.0.1:", "--fqdn")
		if !answers(first) || !answers(second) {
			t.Error("a session was closed")
		}
		first.Close()
		p.logs.wait(t, "Agent lost")
		if err := second.Register(t.Context(), &protocol.Registration{}); err != nil {
			t.Errorf("the name is free: %v", err)
		}
	})
	t.Run("the same instance replaces", func(t *testing.T) {
		t.Parallel()
		p := newProxy(t, nil)
		first := register(t, p, "web-1", "1", protocol.Registration{})
		register(t, p, "web-1", "1", protocol.Registration{Version: "new"})
		received(t, first.Done(), "the end of the old session")
		p.get("/api/v1/agents/web-1").ok(t, `"version":"new"`)
	})
	t.Run("the old session goes only when the new registration is good", func(t *testing.T) {
		t.Parallel()
		p := newProxy(t, nil)
		first := register(t, p, "web-1", "1", protocol.Registration{Version: "old"})
		second := dial(t, p, "web-1", "1")
		err := second.Register(t.Context(), &protocol.Registration{Targets: []protocol.Target{target("agent")}})
		wantRefusal(t, err, 400, protocol.CodeInvalid)
		if !answers(first) {
			t.Error("the old session was closed")
		}
		p.get("/api/v1/agents/web-1").ok(t, `"version":"old"`)
	})
	t.Run("a dead session gives way", func(t *testing.T) {
		t.Parallel()
		p := newProxy(t, nil)
		r := newRelay(t, p)
		newAgent(t, p, func(c *agent.Config) { c.ProxyURLs = []string{r.url} })
		r.freeze() // its host lost power: no FIN, no answers
		start := time.Now()
		newAgent(t, p, nil)
		if took := time.Since(start); took > 6*time.Second {
			t.Errorf("it took %s", took)
		}
		p.get("http://agent.web-1/metrics").ok(t, "culvert_client_connected")
	})
	t.Run("in place", func(t *testing.T) {
		t.Parallel()
		p := newProxy(t, nil)
		s := register(t, p, "web-1", "1", protocol.Registration{Targets: []protocol.Target{target("old")}, Hosts: []string{"old.lan"}})
		since := p.agent("web-1").Since
		if err := s.Register(t.Context(), &protocol.Registration{Targets: []protocol.Target{target("new")}, Hosts: []string{"new.lan"}}); err != nil {
			t.Fatal(err)
		}
		info := p.agent("web-1")
		if !info.Since.Equal(since) || !info.Connected {
			t.Errorf("the session changed: %+v", info)
		}
		p.get("http://old.lan/").refused(t, 404, protocol.CodeUnknownAgent)
		register(t, p, "old.web-1", "2", protocol.Registration{}) // the old target's name is free
	})
	t.Run("many at once", func(t *testing.T) {
		t.Parallel()
		p := newProxy(t, nil)
		const n = 8
		results := make(chan error, n)
		for i := range n {
			s := dial(t, p, "web-1", fmt.Sprint(i))
			go func() { results <- s.Register(context.Background(), &protocol.Registration{}) }()
		}
		good := 0
		for range n {
			if err := received(t, results, "a registration"); err == nil {
				good++
			} else {
				wantRefusal(t, err, 409, protocol.CodeTaken)
			}
		}
		if good != 1 {
			t.Errorf("%d agents have one name", good)
		}
	})
}

// TestCollisions: no two names may be equal, but hosts with hosts.
func TestCollisions(t *testing.T) {
	t.Parallel()
	type r = protocol.Registration
	targets := func(names ...string) r {
		var reg r
		for _, n := range names {
			reg.Targets = append(reg.Targets, target(n))
		}
		return reg
	}
	hosts := func(names ...string) r { return r{Hosts: names} }
	for _, c := range []struct {
		name           string
		holder         string
		held           r
		claims         string
		claim          r
		words          []string // of the refusal; nil: accepted
		holderGoesLost bool
	}{
		{"agent and host", "a", hosts("db.lan"), "db.lan", r{}, []string{`"db.lan"`, `"a"`}, false},
		{"agent and target", "web-1", targets("node"), "node.web-1", r{}, []string{`"node.web-1"`, `target of agent "web-1"`}, false},
		{"agent and the agent itself", "web-1", r{}, "agent.web-1", r{}, []string{`"agent.web-1"`, `"web-1"`}, false},
		{"target and agent", "node.web-1", r{}, "web-1", targets("ok", "node"), []string{`"node"`, `"node.web-1"`}, false},
		{"the agent itself and agent", "x.agent", r{}, "y", r{}, nil, false},
		{"target and host", "a", hosts("node.web-1"), "web-1", targets("node"), []string{`"node"`, `"node.web-1"`, `"a"`}, false},
		{"the agent itself and host", "a", hosts("agent.web-1"), "web-1", r{}, []string{`"agent.web-1"`, `"a"`}, false},
		{"host and agent", "db.lan", r{}, "a", hosts("ok.lan", "db.lan"), []string{`"db.lan"`, "an agent"}, false},
		{"host and target", "web-1", targets("node"), "a", hosts("node.web-1"), []string{`"node.web-1"`, `target of agent "web-1"`}, false},
		{"host and the agent itself", "web-1", r{}, "a", hosts("agent.web-1"), []string{`"agent.web-1"`, `"web-1"`}, false},
		{"with a lost agent too", "db.lan", r{}, "a", hosts("db.lan"), []string{`"db.lan"`, "culvert-client leave", "DELETE /api/v1/agents/db.lan"}, true},

		{"host and host", "a", hosts("db.lan"), "b", hosts("db.lan"), nil, false},
		{"wildcard and wildcard", "a", hosts("*.lan"), "b", hosts("*.lan"), nil, false},
		{"host within a wildcard", "a", hosts("*.lan"), "b", hosts("db.lan"), nil, false},
		{"agent within a wildcard", "a", hosts("*.lan"), "db.lan", targets("node"), nil, false},
		{"same target of two agents", "a", targets("node"), "b", targets("node"), nil, false},
		{"agent below an agent", "web-1", targets("node"), "other.web-1", r{}, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := newProxy(t, nil)
			holder := register(t, p, c.holder, "1", c.held)
			if c.holderGoesLost {
				holder.Close()
				p.logs.wait(t, "Agent lost")
			}
			s := dial(t, p, c.claims, "2")
			checked := s.CheckRegistration(t.Context(), &c.claim)
			err := s.Register(t.Context(), &c.claim)
			if fmt.Sprint(checked) != fmt.Sprint(err) {
				t.Errorf("the check said %v, the registration %v", checked, err)
			}
			if c.words == nil {
				if err != nil {
					t.Errorf("refused: %v", err)
				}
				return
			}
			wantRefusal(t, err, 409, protocol.CodeCollision, c.words...)
			if a := p.get("/api/v1/agents/" + c.claims); a.code != 404 {
				t.Errorf("the refused agent is known: %s", a.body)
			}
		})
	}
}

// TestCheckHasNoEffect: a check tells what a registration would be told.
func TestCheckHasNoEffect(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	register(t, p, "web-1", "1", protocol.Registration{Version: "old"})
	s := dial(t, p, "new", "2")
	if err := s.CheckRegistration(t.Context(), &protocol.Registration{Hosts: []string{"db.lan"}}); err != nil {
		t.Fatal(err)
	}
	if a := p.get("/api/v1/agents/new"); a.code != 404 {
		t.Errorf("the check registered: %s", a.body)
	}
	p.get("http://db.lan/").refused(t, 404, protocol.CodeUnknownAgent)
	again := dial(t, p, "web-1", "1")
	if err := again.CheckRegistration(t.Context(), &protocol.Registration{Version: "new"}); err != nil {
		t.Fatal(err)
	}
	p.get("/api/v1/agents/web-1").ok(t, `"version":"old"`)
	wantRefusal(t, s.CheckRegistration(t.Context(), &protocol.Registration{Hosts: []string{"web-1"}}), 409, protocol.CodeCollision)
	status, _, text := control(t, s, "PUT", protocol.PathRegistration+"?check=true", strings.NewReader(`{"hosts":["*"]}`))
	if status != 400 {
		t.Errorf("got %d %s", status, text)
	}
}

// TestLeave: an agent forgets itself, unless another live one has the name.
func TestLeave(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	register(t, p, "live", "1", protocol.Registration{})
	gone := register(t, p, "gone", "1", protocol.Registration{Hosts: []string{"db.lan"}})
	gone.Close()
	p.logs.wait(t, "Agent lost", "agent=gone")

	wantRefusal(t, dial(t, p, "nobody", "2").Leave(t.Context()), 404, protocol.CodeUnregistered, `"nobody"`)
	wantRefusal(t, dial(t, p, "live", "2").Leave(t.Context()), 409, protocol.CodeTaken, `"live"`)
	if err := dial(t, p, "gone", "2").Leave(t.Context()); err != nil {
		t.Errorf("leave: %v", err)
	}
	p.get("http://db.lan/").refused(t, 404, protocol.CodeUnknownAgent)
	if a := p.get("/api/v1/agents"); strings.Contains(a.body, `"gone"`) || !strings.Contains(a.body, `"live"`) {
		t.Errorf("got %s", a.body)
	}
	t.Run("on its own session", func(t *testing.T) {
		s := register(t, p, "self", "3", protocol.Registration{})
		if err := s.Leave(t.Context()); err != nil {
			t.Errorf("leave: %v", err)
		}
		received(t, s.Done(), "the end of the session")
		if a := p.get("/api/v1/agents/self"); a.code != 404 {
			t.Errorf("still known: %s", a.body)
		}
	})
}
