package server_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/server"
)

// TestListsAreKept: the lists are kept until something changes. A selector that
// selects all lists what is true at the moment.
func TestListsAreKept(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "proxy.yml")
	os.WriteFile(file, nil, 0o600)
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file })
	all := "match[]=" + url.QueryEscape(`{__meta_culvert_agent!="nobody"}`)
	sessions := map[string]*protocol.Session{}
	env := func(value string, targets ...string) protocol.Registration {
		reg := protocol.Registration{Labels: map[string]string{"env": value, "odd": "\"\\\n\x00é<&>\u2028"}}
		for _, name := range targets {
			reg.Targets = append(reg.Targets, target(name))
		}
		return reg
	}
	for _, step := range []struct {
		what   string
		change func()
		agents string
	}{
		{"nobody", func() {}, ""},
		{"the first", func() { sessions["m"] = register(t, p, "m", "1", env("prod", "node")) }, "m"},
		{"one in front", func() { sessions["c"] = register(t, p, "c", "1", env("prod", "node", "db")) }, "c m"},
		{"one behind", func() { sessions["x"] = register(t, p, "x", "1", env("test")) }, "c m x"},
		{"one between", func() { sessions["h"] = register(t, p, "h", "1", env("test", "node")) }, "c h m x"},
		{"nothing", func() {}, "c h m x"},
		{"another registration", func() {
			reg := env("new", "other", "third")
			if err := sessions["h"].Register(t.Context(), &reg); err != nil {
				t.Error(err)
			}
		}, "c h m x"},
		{"the last one lost", func() { sessions["x"].Close(); p.logs.wait(t, "Agent lost", "agent=x") }, "c h m x"},
		{"the last one back", func() { sessions["x"] = register(t, p, "x", "2", env("back")) }, "c h m x"},
		{"the last one gone", func() { p.send("DELETE", "/api/v1/agents/x") }, "c h m"},
		{"one replaced by one of its name", func() {
			p.send("DELETE", "/api/v1/agents/h")
			register(t, p, "h", "9", env("prod"))
		}, "c h m"},
		{"the first one gone", func() { p.send("DELETE", "/api/v1/agents/c") }, "h m"},
		{"other settings", func() {
			os.WriteFile(file, []byte("discovery: {promote_labels: [env]}"), 0o600)
			if a := p.send("POST", "/-/reload"); a.code != 200 {
				t.Errorf("reload: %d", a.code)
			}
		}, "h m"},
		{"all gone", func() { p.send("DELETE", "/api/v1/agents/h"); p.send("DELETE", "/api/v1/agents/m") }, ""},
	} {
		step.change()
		for _, path := range []string{"/clients?", "/targets?", "/targets?mode=path&"} {
			for _, host := range []string{"one.lan", "two.lan:8080"} {
				wantGroups(t, p.discover(path, "Host: "+host), p.discover(path+all, "Host: "+host))
			}
		}
		var names []string
		for _, g := range p.discover("/clients") {
			names = append(names, g.Targets[0])
		}
		if got := strings.Join(names, " "); got != step.agents {
			t.Errorf("%s: got %q, want %q", step.what, got, step.agents)
		}
	}
}

// TestListEncodings: gzip on request, and 304 for a list that the asker has.
func TestListEncodings(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	register(t, p, "web-1", "1", protocol.Registration{Targets: []protocol.Target{target("node")}})
	for _, path := range []string{"/clients", "/targets", "/targets?mode=path", "/targets?match[]=" + url.QueryEscape(`{instance="node.web-1"}`)} {
		plain := p.get(path)
		if plain.header.Get("Content-Encoding") != "" || plain.header.Get("Vary") != "Accept-Encoding" || plain.header.Get("Content-Length") != fmt.Sprint(len(plain.body)) {
			t.Errorf("%s: %v", path, plain.header)
		}
		a := p.get(path, "Accept-Encoding: gzip")
		zr, err := gzip.NewReader(strings.NewReader(a.body))
		if err != nil || a.header.Get("Content-Encoding") != "gzip" {
			t.Fatalf("%s: %v, %v", path, a.header, err)
		}
		if got, err := io.ReadAll(zr); err != nil || string(got) != plain.body {
			t.Errorf("%s: got %q, %v, want %q", path, got, err, plain.body)
		}
		if a := p.get(path, "Accept-Encoding: gzip;q=0"); a.body != plain.body {
			t.Errorf("%s: gzip was not wanted", path)
		}
		if a := p.send("HEAD", path); a.code != 200 || a.body != "" || a.header.Get("Content-Length") != fmt.Sprint(len(plain.body)) {
			t.Errorf("HEAD %s: %d %v", path, a.code, a.header)
		}
		tag := plain.header.Get("ETag")
		if strings.Contains(path, "match") {
			if tag != "" {
				t.Errorf("%s: ETag %s", path, tag)
			}
			continue
		}
		if a := p.get(path, "If-None-Match: \"other\", "+tag, "Accept-Encoding: gzip"); a.code != 304 || a.body != "" || a.header.Get("ETag") != tag {
			t.Errorf("%s: %d %v", path, a.code, a.header)
		}
		register(t, p, fmt.Sprintf("web-%d", len(path)), "1", protocol.Registration{})
		if a := p.get(path, "If-None-Match: "+tag); a.code != 200 || a.header.Get("ETag") == tag {
			t.Errorf("%s: the list has changed, and got %d", path, a.code)
		}
	}
}

// TestListsInAStorm asks while agents come and go. What is listed in the end has to
// be true.
func TestListsInAStorm(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	var storm sync.WaitGroup
	for i := range 8 {
		storm.Go(func() {
			for n := range 5 {
				s, err := tryDial(p, fmt.Sprintf("web-%d", i), "1")
				if err == nil {
					err = s.Register(t.Context(), &protocol.Registration{Labels: map[string]string{"n": fmt.Sprint(n)}})
				}
				if err != nil {
					t.Error(err)
					return
				}
				if n < 4 {
					s.Close()
				} else {
					t.Cleanup(func() { s.Close() })
				}
			}
		})
	}
	asked := make(chan struct{})
	go func() {
		defer close(asked)
		for range 200 {
			p.get("/clients")
		}
	}()
	storm.Wait()
	<-asked
	want := p.discover("/clients?match[]=" + url.QueryEscape(`{n="4",__meta_culvert_connected="true"}`))
	if len(want) != 8 {
		t.Fatalf("%d agents are there", len(want))
	}
	wantGroups(t, p.discover("/clients"), want)
}

// BenchmarkTargets lists 5,000 agents of three targets each: as it is kept, after
// one agent has changed, and by a selector. x-encode is the ratio to encoding/json
// encoding the list of the same entries.
func BenchmarkTargets(b *testing.B) {
	const agents = 5000
	s, err := server.New(server.Config{ListenAddresses: []string{"127.0.0.1:0"}, Fleet: fleet.Config{SettleTime: -1}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { s.Run(ctx); close(ended) }()
	b.Cleanup(func() { cancel(); <-ended })
	u := &url.URL{Scheme: "http", Host: s.Addr()}
	reg := protocol.Registration{Labels: map[string]string{"env": "prod", "rack": "17"}, Targets: []protocol.Target{target("app-0"), target("app-1"), target("app-2")}}
	var one *protocol.Session
	for i := range agents {
		if one, err = (&protocol.Dialer{ProxyURL: u, Agent: fmt.Sprintf("agent-%d", i), Instance: "1"}).Dial(ctx); err != nil {
			b.Fatal(err)
		}
		defer one.Close()
		if err := one.Register(ctx, &reg); err != nil {
			b.Fatal(err)
		}
	}
	client := &http.Client{Transport: &http.Transport{DisableCompression: true}}
	defer client.CloseIdleConnections()
	answer := new(bytes.Buffer)
	get := func(b *testing.B, query, encoding string) []byte {
		req, _ := http.NewRequest(http.MethodGet, u.String()+"/targets"+query, nil)
		req.Header.Set("Accept-Encoding", encoding)
		resp, err := client.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		defer resp.Body.Close()
		answer.Reset()
		if _, err := answer.ReadFrom(resp.Body); err != nil || resp.StatusCode != 200 {
			b.Fatal(resp.Status, err)
		}
		return answer.Bytes()
	}
	var groups []group
	if err := json.Unmarshal(get(b, "", "identity"), &groups); err != nil || len(groups) != 4*agents {
		b.Fatal(len(groups), err)
	}
	for _, c := range []struct {
		name, query, encoding string
		change                bool
	}{
		{"kept", "", "identity", false},
		{"kept,gzip", "", "gzip", false},
		{"changed", "", "identity", true},
		{"changed,gzip", "", "gzip", true},
		{"selected", "?match[]=" + url.QueryEscape(`{rack="17"}`), "identity", false},
		{"selected-few", "?match[]=" + url.QueryEscape(`{instance="app-0.agent-7"}`), "identity", false},
	} {
		b.Run(c.name, func(b *testing.B) {
			var baseline, took time.Duration
			for b.Loop() {
				start := time.Now()
				if err := json.NewEncoder(io.Discard).Encode(groups); err != nil {
					b.Fatal(err)
				}
				baseline += time.Since(start)
				if c.change {
					if err := one.Register(ctx, &reg); err != nil {
						b.Fatal(err)
					}
				}
				start = time.Now()
				get(b, c.query, c.encoding)
				took += time.Since(start)
			}
			b.ReportMetric(took.Seconds()*1e3/float64(b.N), "ms/list")
			b.ReportMetric(float64(took)/float64(baseline), "x-encode")
		})
	}
}
