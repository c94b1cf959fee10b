package agent_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/client/httpclient"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/protocol/externaltest"
	"github.com/culvert-io/culvert/proxy/server"
)

// TestOneProxyTwoNames: two URLs that lead to one proxy make one session, which
// stays, and the log says what to remove.
func TestOneProxyTwoNames(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	other := strings.Replace(p.url, "127.0.0.1", "localhost", 1)
	a := newAgent(t, p, func(c *agent.Config) { c.ProxyURLs = []string{p.url, other} })
	a.logs.wait(t, "Not connected", "same proxy as", "--proxy-url")
	since, _ := p.since("web-1")
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if now, connected := p.since("web-1"); !connected || !now.Equal(since) {
			t.Fatalf("the session changed: since %s, now %s, connected %v", since, now, connected)
		}
	}
	if n := p.logs.count("Agent connected"); n != 1 {
		t.Errorf("%d registrations", n)
	}
	connected := a.Connected()
	if len(connected) != 1 {
		t.Fatalf("connected to %v", connected)
	}
	// The URL that has no session takes over when the other one is removed.
	rest := other
	if connected[0] == other {
		rest = p.url
	}
	if err := a.Reload(a.config(func(c *agent.Config) { c.ProxyURLs = []string{rest} })); err != nil {
		t.Fatal(err)
	}
	a.logs.wait(t, "msg=Connected", "proxy="+rest)
	p.want("http://agent.web-1/metrics", 200, "culvert_client_connected")
}

// TestTwoProxies: one agent, a session to each, and one that is down is no harm.
func TestTwoProxies(t *testing.T) {
	t.Parallel()
	left, right := newProxy(t, nil), newProxy(t, nil)
	base, _ := newTarget(t, nil)
	down := externaltest.FreeAddress(t)
	a := newAgent(t, left, func(c *agent.Config) {
		c.ProxyURLs = []string{"http://" + down, left.url, right.url}
		c.Targets = []agent.Target{{Name: "node", URL: base}}
	})
	a.logs.wait(t, "msg=Connected", left.url)
	a.logs.wait(t, "msg=Connected", right.url)
	a.logs.wait(t, "Not connected", down)
	for _, p := range []*testProxy{left, right} {
		p.want("http://node.web-1/metrics", 200, "up 1")
	}
	left.stop()
	a.logs.wait(t, "The proxy drains this session", left.url)
	right.want("http://node.web-1/metrics", 200, "up 1")
	right.want("http://agent.web-1/metrics", 200, `culvert_client_connected{proxy="`+left.url+`"} 0`)
	right.want("http://agent.web-1/metrics", 200, `culvert_client_connected{proxy="`+right.url+`"} 1`)
}

// TestOneNameTwoAgents: the first stays, the second logs why it can't.
func TestOneNameTwoAgents(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	first := newAgent(t, p, nil)
	since, _ := p.since("web-1")
	second := startAgent(t, p, nil)
	second.logs.wait(t, "level=WARN", "Not connected", "409", "taken", "--fqdn")
	if now, connected := p.since("web-1"); !connected || !now.Equal(since) {
		t.Errorf("the first agent lost its session")
	}
	if n := first.logs.count("Session lost"); n != 0 {
		t.Errorf("the first agent lost %d sessions", n)
	}
	first.stop()
	p.want("http://agent.web-1/metrics", 503, "shutdown")
	if err := second.Reload(second.config(nil)); err != nil { // cuts the long wait short
		t.Fatal(err)
	}
	second.logs.wait(t, "msg=Connected")
}

// TestRestart: the same host, a new process: it has its name at once.
func TestRestart(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	for range 5 {
		a := newAgent(t, p, nil)
		p.want("http://agent.web-1/metrics", 200, "culvert_client_connected")
		a.stop()
	}
	if n := p.logs.count("Registration refused"); n != 0 {
		t.Errorf("%d registrations were refused", n)
	}
}

// TestProxyRestarts: the agent comes back by itself; and it may start before the
// proxy does.
func TestProxyRestarts(t *testing.T) {
	t.Parallel()
	address := externaltest.FreeAddress(t)
	a := startAgent(t, nil, func(c *agent.Config) { c.ProxyURLs = []string{"http://" + address} })
	a.logs.wait(t, "Not connected", "connection refused")
	at := func(c *server.Config) { c.ListenAddresses = []string{address} }
	p := newProxy(t, at)
	a.logs.wait(t, "msg=Connected")
	p.stop()
	a.logs.wait(t, "The proxy drains this session")
	p = newProxy(t, at)
	a.logs.waitN(t, 2, "msg=Connected")
	p.want("http://agent.web-1/metrics", 200, "culvert_client_reconnects_total")
}

// TestReload: the registration is replaced in place, and no scrape is dropped.
func TestReload(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	started, release := make(chan struct{}, 1), make(chan struct{})
	slow, _ := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		started <- struct{}{}
		select {
		case <-release:
		case <-r.Context().Done():
		}
		io.WriteString(w, "slow but whole")
	})
	base, _ := newTarget(t, nil)
	targets := func(targets ...agent.Target) func(*agent.Config) {
		return func(c *agent.Config) { c.Targets = targets }
	}
	a := newAgent(t, p, targets(agent.Target{Name: "slow", URL: slow}, agent.Target{Name: "old", URL: base}))
	since, _ := p.since("web-1")
	done := make(chan string, 1)
	go func() { _, body := p.get("http://slow.web-1/metrics"); done <- body }()
	received(t, started, "the slow scrape")

	if err := a.Reload(a.config(targets(agent.Target{Name: "new", URL: base}))); err != nil {
		t.Fatal(err)
	}
	a.logs.wait(t, "Registration updated")
	p.want("http://new.web-1/metrics", 200, "up 1")
	p.want("http://old.web-1/metrics", 403, "--target=old")
	p.want("/targets", 200, "new.web-1")
	close(release)
	if body := received(t, done, "the slow scrape"); body != "slow but whole" {
		t.Errorf("the running scrape got %q", body)
	}
	if now, connected := p.since("web-1"); !connected || !now.Equal(since) {
		t.Error("the session changed")
	}

	t.Run("a bad configuration", func(t *testing.T) {
		err := a.Reload(a.config(targets(agent.Target{Name: "agent", URL: base})))
		if err == nil || !strings.Contains(err.Error(), `"agent"`) {
			t.Errorf("got %v", err)
		}
		p.want("http://new.web-1/metrics", 200, "up 1")
	})
	t.Run("what the proxy refuses", func(t *testing.T) {
		newAgent(t, p, func(c *agent.Config) { c.Name = "db.lan" })
		err := a.Reload(a.config(func(c *agent.Config) {
			c.Targets = []agent.Target{{Name: "third", URL: base}}
			c.Hosts = []agent.Host{{Name: "db.lan"}}
		}))
		if err != nil {
			t.Fatal(err)
		}
		a.logs.wait(t, "level=ERROR", "refused the new registration", "db.lan")
		if now, connected := p.since("web-1"); !connected || !now.Equal(since) {
			t.Error("the session changed")
		}
	})
	t.Run("proxies", func(t *testing.T) {
		other := newProxy(t, nil)
		if err := a.Reload(a.config(func(c *agent.Config) { c.ProxyURLs = []string{other.url} })); err != nil {
			t.Fatal(err)
		}
		a.logs.wait(t, "msg=Connected", other.url)
		other.want("http://agent.web-1/metrics", 200, "culvert_client_connected")
		p.logs.wait(t, "Agent leaves", "agent=web-1", "shutdown")
	})
	t.Run("name", func(t *testing.T) {
		a := newAgent(t, p, func(c *agent.Config) { c.Name = "before" })
		if err := a.Reload(a.config(func(c *agent.Config) { c.Name = "after" })); err != nil {
			t.Fatal(err)
		}
		a.logs.wait(t, "msg=Connected", "agent=after")
		p.want("http://agent.after/metrics", 200, "culvert_client_connected")
	})
}

// TestReloadOrder: of many reloads, the last one is what the proxy knows.
func TestReloadOrder(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	a := newAgent(t, p, nil)
	const n = 50
	for i := range n {
		err := a.Reload(a.config(func(c *agent.Config) {
			c.Targets = []agent.Target{{Name: fmt.Sprintf("t%d", i), URL: "http://127.0.0.1:1"}}
		}))
		if err != nil {
			t.Fatal(err)
		}
	}
	deadline := time.Now().Add(3 * time.Second)
	for {
		_, body := p.get("/targets")
		if strings.Contains(body, fmt.Sprintf(`"t%d.web-1"`, n-1)) && a.logs.count("Registration updated") > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the proxy lists %s", body)
		}
		time.Sleep(20 * time.Millisecond)
	}
	time.Sleep(300 * time.Millisecond) // for one that comes too late
	p.want("/targets", 200, fmt.Sprintf(`"t%d.web-1"`, n-1))
}

// TestReloadSpelling: the same proxy by another URL is no reason for a pause.
func TestReloadSpelling(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	a := newAgent(t, p, nil)
	port := strings.TrimPrefix(p.url, "http://127.0.0.1:")
	for i := range 10 {
		host := []string{"localhost", "127.0.0.1"}[i%2]
		if err := a.Reload(a.config(func(c *agent.Config) { c.ProxyURLs = []string{"http://" + host + ":" + port} })); err != nil {
			t.Fatal(err)
		}
		a.logs.waitN(t, i+2, "msg=Connected")
		p.want("http://agent.web-1/metrics", 200, host)
	}
}

// TestReloadWhileConnecting: a reload that comes between the handshake's start
// and its end is not lost.
func TestReloadWhileConnecting(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		reload func(*agent.Config)
		target string // that only the new configuration has
	}{
		{"host", func(c *agent.Config) { c.Hosts = []agent.Host{{Name: "agent.lan", Address: "127.0.0.1"}} }, "http://agent.lan:1/"},
		{"name", func(c *agent.Config) { c.Name = "web-2" }, "http://web-2:1/"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := newProxy(t, nil)
			release := make(chan struct{})
			f := newFront(t, p, func(_ http.ResponseWriter, r *http.Request) bool { <-release; return true })
			a := startAgent(t, p, func(c *agent.Config) { c.ProxyURLs = []string{f.URL} })
			received(t, f.tried, "the handshake")
			err := a.Reload(a.config(func(config *agent.Config) {
				config.ProxyURLs = []string{f.URL}
				c.reload(config)
			}))
			close(release)
			if err != nil {
				t.Fatal(err)
			}
			a.logs.wait(t, "msg=Connected")
			deadline := time.Now().Add(3 * time.Second)
			for {
				code, body := p.get(c.target)
				if code == 403 { // routed to the agent, which allows no port
					return
				}
				if time.Now().After(deadline) {
					t.Fatalf("the proxy never heard of the new configuration: %d %s", code, body)
				}
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
}

// TestTLS: an https proxy, and credentials in its URL that nobody gets to see.
func TestTLS(t *testing.T) {
	t.Parallel()
	webConfig, pool := newCertificate(t, "127.0.0.1")
	p := newProxy(t, func(c *server.Config) { c.WebConfigFile = webConfig })
	a := newAgent(t, nil, func(c *agent.Config) {
		c.ProxyURLs = []string{"https://joe:secret@" + p.addr}
		c.TLS = &tls.Config{RootCAs: pool}
	})
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: true, DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: transport}).Get("https://" + p.addr + "/api/v1/agents/web-1")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if resp.ProtoMajor != 1 || !strings.Contains(string(body), `"connected":true`) {
		t.Errorf("%s: %s", resp.Proto, body)
	}
	for name, text := range map[string]string{"log": a.logs.String(), "metrics": gathered(t, a.Gatherer())} {
		if strings.Contains(text, "secret") {
			t.Errorf("the %s shows the password: %s", name, text)
		}
	}
	t.Run("unknown certificate", func(t *testing.T) {
		b := startAgent(t, nil, func(c *agent.Config) { c.Name, c.ProxyURLs = "web-2", []string{"https://" + p.addr} })
		b.logs.wait(t, "Not connected", "certificate")
	})
	t.Run("http to an https port", func(t *testing.T) {
		b := startAgent(t, nil, func(c *agent.Config) { c.Name, c.ProxyURLs = "web-3", []string{"http://" + p.addr} })
		b.logs.wait(t, "Not connected", "400")
	})
	t.Run("WebSocket", func(t *testing.T) {
		f := newFront(t, p, func(w http.ResponseWriter, r *http.Request) bool { w.WriteHeader(500); return false })
		b := startAgent(t, nil, func(c *agent.Config) { c.Name, c.ProxyURLs = "web-4", []string{f.URL + "/base/path"} })
		b.logs.wait(t, "Not connected", "500")
	})
}

func gathered(t *testing.T, g prometheus.Gatherer) string {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(families)
}

// TestCredentialsAndPath: user information and path of the proxy's URL are used.
func TestCredentialsAndPath(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	paths := make(chan string, 10)
	f := newFront(t, p, func(w http.ResponseWriter, r *http.Request) bool {
		user, password, _ := r.BasicAuth()
		paths <- user + ":" + password + " " + r.URL.Path
		r.URL.Path = strings.TrimPrefix(r.URL.Path, "/base")
		return true
	})
	newAgent(t, nil, func(c *agent.Config) {
		c.ProxyURLs = []string{strings.Replace(f.URL, "://", "://joe:pw@", 1) + "/base/"}
	})
	if got := received(t, paths, "the handshake"); got != "joe:pw /base/tunnel" {
		t.Errorf("got %q", got)
	}
}

// TestNew lists what a configuration can't be; errors name the field.
func TestNew(t *testing.T) {
	t.Parallel()
	good := func(c *agent.Config) *agent.Config {
		if c.Name == "" {
			c.Name = "web-1"
		}
		if c.ProxyURLs == nil {
			c.ProxyURLs = []string{"proxy:8080"}
		}
		return c
	}
	target := func(name, url string) agent.Config {
		return agent.Config{Targets: []agent.Target{{Name: name, URL: url}}}
	}
	host := func(name, address string) agent.Config {
		return agent.Config{Hosts: []agent.Host{{Name: name, Address: address}}}
	}
	auth := httpclient.DefaultConfig
	auth.BasicAuth = &httpclient.BasicAuth{Username: "x"}
	bad := httpclient.DefaultConfig
	bad.BasicAuth, bad.BearerToken = &httpclient.BasicAuth{Username: "x"}, "y"
	for name, c := range map[string]struct {
		config agent.Config
		words  []string // nil: fine
	}{
		"least":                    {agent.Config{}, nil},
		"name in another form":     {agent.Config{Name: "WEB-1.Example.net."}, nil},
		"no proxy":                 {agent.Config{ProxyURLs: []string{}}, []string{"--proxy-url"}},
		"bad name":                 {agent.Config{Name: "web 1"}, []string{"agent name", "--fqdn"}},
		"scheme of the proxy":      {agent.Config{ProxyURLs: []string{"ftp://proxy"}}, []string{"ftp", "http or https"}},
		"proxy without a host":     {agent.Config{ProxyURLs: []string{"http://:8080"}}, []string{"host"}},
		"query of the proxy":       {agent.Config{ProxyURLs: []string{"http://proxy/?a=b"}}, []string{"query"}},
		"password in a bad URL":    {agent.Config{ProxyURLs: []string{"http://joe:secret@proxy:x"}}, []string{"proxy URL"}},
		"target without a URL":     {target("a", ""), []string{`"a"`, "http"}},
		"scheme of a target":       {target("a", "file:///etc/passwd"), []string{`"a"`, "http or https"}},
		"target without a host":    {target("a", "http:///metrics"), []string{`"a"`, "host"}},
		"fragment":                 {target("a", "http://x/#y"), []string{`"a"`, "fragment"}},
		"target of digits":         {target("9100", "http://x"), []string{"digits"}},
		"target agent":             {target("agent", "http://x"), []string{`"agent"`}},
		"target in capitals":       {target("Node", "http://x"), nil},
		"password in a bad target": {target("a", "http://joe:secret@x:y"), []string{`"a"`}},
		"URL and handler":          {agent.Config{Targets: []agent.Target{{Name: "a", URL: "http://x", Handler: http.NotFoundHandler()}}}, []string{`"a"`, "Handler"}},
		"credentials twice":        {agent.Config{Targets: []agent.Target{{Name: "a", URL: "http://joe:secret@x", HTTP: &auth}}}, []string{`"a"`, "credentials"}},
		"bad HTTP configuration":   {agent.Config{Targets: []agent.Target{{Name: "a", URL: "http://x", HTTP: &bad}}}, []string{`"a"`}},
		"target twice":             {agent.Config{Targets: []agent.Target{{Name: "a", URL: "http://x"}, {Name: "A", URL: "http://y"}}}, []string{"targets[1]"}},
		"host":                     {host("db.lan", "10.0.0.1"), nil},
		"IPv6 host":                {host("db.lan", "[::1]"), nil},
		"host with a port":         {host("db.lan", "10.0.0.1:9100"), []string{"port", "--allow"}},
		"host with a URL":          {host("db.lan", "http://10.0.0.1"), []string{"db.lan"}},
		"bad wildcard":             {host("*", ""), []string{"*.example.net"}},
		"own name as a host":       {host("web-1", ""), []string{"own name"}},
		"bad label":                {agent.Config{Labels: map[string]string{"a-b": ""}}, []string{"labels", "a-b"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := agent.New(*good(&c.config))
			if c.words == nil {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil {
				t.Fatal("no error")
			}
			for _, word := range append(c.words, "") {
				if !strings.Contains(err.Error(), word) {
					t.Errorf("%q does not say %q", err, word)
				}
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("%q repeats a password", err)
			}
		})
	}
}

// TestHandler serves targets from inside the program, and what Gatherer adds.
func TestHandler(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	registry := prometheus.NewRegistry()
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "mine"}, func() float64 { return 1 }))
	got := make(chan *http.Request, 1)
	a := newAgent(t, p, func(c *agent.Config) {
		c.Gatherer = registry
		c.Targets = []agent.Target{{Name: "app", Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			got <- r
			io.WriteString(w, "app_up 1")
		})}}
	})
	p.want("http://app.web-1/metrics?name=x", 200, "app_up 1")
	if r := <-got; r.URL.String() != "/metrics?name=x" || r.RequestURI != "/metrics?name=x" || r.Header.Get("Proxy-Connection") != "" {
		t.Errorf("the handler saw %s, %s, %v", r.URL, r.RequestURI, r.Header)
	}
	p.want("http://app.web-1/other", 403, "/metrics")
	p.want("http://agent.web-1/metrics", 200, "mine 1")
	problems, err := testutil.GatherAndLint(a.Gatherer())
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range problems {
		if problem.Metric != "mine" {
			t.Errorf("%s: %s", problem.Metric, problem.Text)
		}
	}
}

// TestSelf puts the target "agent" together: the agent's own metrics, a gatherer's,
// textfiles. Clashes cost the later source its series, and no scrape.
func TestSelf(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	file("a.prom", "# TYPE mine gauge\nmine{by=\"file\"} 1\nculvert_client_connected 5\n# TYPE job_bytes counter\njob_bytes 7\n")
	file("bad.prom", "half")
	registry := prometheus.NewRegistry()
	for _, name := range []string{"mine", "culvert_client_streams"} {
		registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: "From a gatherer."}, func() float64 { return 99 }))
	}
	p := newProxy(t, nil)
	a := newAgent(t, p, func(c *agent.Config) {
		c.Gatherer = registry
		c.Textfile.Directories = []string{dir}
	})
	for range 2 { // what a scrape leaves out is counted by the next
		for _, line := range []string{"# HELP mine From a gatherer.\n# TYPE mine gauge\nmine 99\nmine{by=\"file\"} 1\n", "\njob_bytes 7\n", "\nnode_textfile_scrape_error 1\n", "\nculvert_client_connected{proxy="} {
			p.want("http://agent.web-1/metrics", 200, line)
		}
	}
	_, body := p.get("http://agent.web-1/metrics")
	if strings.Contains(body, "streams 99") || strings.Contains(body, "connected 5") || !strings.Contains(body, "\nculvert_client_dropped_series_total 8\n") {
		t.Errorf("got %s", body)
	}
	if n := a.logs.count("A textfile or directory is left out", "bad.prom"); n != 1 {
		t.Errorf("%d lines in the log for 9 scrapes", n)
	}
	if err := a.Reload(a.config(func(c *agent.Config) { c.Textfile.Directories = nil })); err != nil {
		t.Fatal(err)
	}
	if _, body := p.get("http://agent.web-1/metrics"); strings.Contains(body, "node_textfile_") || !strings.Contains(body, "culvert_client_connected{") {
		t.Errorf("without directories: %s", body)
	}
}

// TestScrape answers without a proxy, as one would.
func TestScrape(t *testing.T) {
	t.Parallel()
	base, port := newTarget(t, say(strings.Repeat("up 1\n", 50_000)))
	a, err := agent.New(agent.Config{Name: "web-1", ProxyURLs: []string{"proxy"}, LocalHost: "127.0.0.1",
		Targets: []agent.Target{{Name: "node", URL: base}, {Name: "dead", URL: "http://" + externaltest.FreeAddress(t)}}})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		target string
		status int
		code   protocol.Code
	}{
		{"http://node.web-1/metrics", 200, ""},
		{"http://agent.web-1/metrics", 200, ""},
		{"http://dead.web-1/metrics", 502, protocol.CodeTargetUnreachable},
		{"http://web-1:" + port + "/metrics", 403, protocol.CodeNotAllowed},
		{"http://other:9100/metrics", 421, protocol.CodeMismatch},
	} {
		resp, err := a.Scrape(t.Context(), c.target)
		if err != nil {
			t.Errorf("%s: %v", c.target, err)
			continue
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != c.status || resp.Header.Get("Culvert-Error") != string(c.code) || err != nil {
			t.Errorf("%s: got %d %q, %v", c.target, resp.StatusCode, resp.Header.Get("Culvert-Error"), err)
		}
		if c.target == "http://node.web-1/metrics" && len(body) != 250_000 {
			t.Errorf("%d bytes", len(body))
		}
	}
	t.Run("an end before the end", func(t *testing.T) {
		resp, err := a.Scrape(t.Context(), "http://node.web-1/metrics")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
	})
	t.Run("cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if resp, err := a.Scrape(ctx, "http://node.web-1/metrics"); err == nil {
			resp.Body.Close()
			t.Error("no error")
		}
	})
}

// TestFQDN: the host has a name that can be an agent's.
func TestFQDN(t *testing.T) {
	t.Parallel()
	name, err := agent.FQDN()
	if err == nil {
		err = protocol.CheckName(protocol.NormalizeName(name))
	}
	if err != nil {
		t.Error(err)
	}
}

// TestRunTwice is a mistake that is reported.
func TestRunTwice(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	a := newAgent(t, p, nil)
	if err := a.Run(t.Context()); err == nil {
		t.Error("no error")
	}
}

// TestStopWhileConnecting: Run ends at once, whatever it waits for.
func TestStopWhileConnecting(t *testing.T) {
	t.Parallel()
	t.Run("handshake", func(t *testing.T) {
		t.Parallel()
		f := newFront(t, nil, func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return false })
		a := startAgent(t, nil, func(c *agent.Config) { c.ProxyURLs = []string{f.URL} })
		received(t, f.tried, "the handshake")
		start := time.Now()
		a.stop()
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("it took %s", took)
		}
	})
	t.Run("wait", func(t *testing.T) {
		t.Parallel()
		f := newFront(t, nil, func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(401); return false })
		a := startAgent(t, nil, func(c *agent.Config) { c.ProxyURLs = []string{f.URL} })
		a.logs.wait(t, "Not connected")
		start := time.Now()
		a.stop()
		if took := time.Since(start); took > 2*time.Second {
			t.Errorf("it took %s", took)
		}
	})
}
