package server_test

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/client/httpclient"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

// TestRoutes is the routing table of the design.
func TestRoutes(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	base, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "path=%s", r.URL.Path) })
	newAgent(t, p, func(c *agent.Config) {
		allowAll(c)
		c.Name = "Web-1.example.net."
		c.Targets = []agent.Target{{Name: "router", URL: base + "/snmp"}}
		c.Hosts = []agent.Host{
			{Name: "db-2.berlin.lan", Address: "127.0.0.1"},
			{Name: "*.berlin.lan", Address: "127.0.0.1"},
			{Name: "localhost"}, // its own name is its address
		}
	})
	for _, c := range []struct{ name, target, body string }{
		{"own port", "http://web-1.example.net:" + port + "/metrics", "path=/metrics"},
		{"other path", "http://web-1.example.net:" + port + "/a/b", "path=/a/b"},
		{"case", "http://WEB-1.Example.NET:" + port + "/metrics", "path=/metrics"},
		{"trailing dot", "http://web-1.example.net.:" + port + "/metrics", "path=/metrics"},
		{"named target", "http://router.web-1.example.net/snmp", "path=/snmp"},
		{"named target with port 80", "http://router.web-1.example.net:80/snmp", "path=/snmp"},
		{"named target, case and dot", "http://ROUTER.web-1.example.net./snmp", "path=/snmp"},
		{"the agent itself", "http://agent.web-1.example.net/metrics", "culvert_client_scrapes_total"},
		{"host", "http://db-2.berlin.lan:" + port + "/metrics", "path=/metrics"},
		{"host without an address", "http://localhost:" + port + "/metrics", "path=/metrics"},
		{"wildcard, one label", "http://db-3.berlin.lan:" + port + "/metrics", "path=/metrics"},
		{"wildcard, two labels", "http://a.db-3.berlin.lan:" + port + "/metrics", "path=/metrics"},
	} {
		t.Run(c.name, func(t *testing.T) { p.get(c.target).ok(t, c.body) })
	}
	t.Run("the wildcard's own domain is not in it", func(t *testing.T) {
		p.get("http://berlin.lan:"+port+"/metrics").refused(t, 404, protocol.CodeUnknownAgent, "berlin.lan")
	})
	t.Run("a suffix that is no domain", func(t *testing.T) {
		p.get("http://xberlin.lan:"+port+"/metrics").refused(t, 404, protocol.CodeUnknownAgent)
	})
}

// TestRouteOrder has one name lead to several agents, and stops them one by one:
// the name is resolved first and liveness second.
func TestRouteOrder(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	start := func(name string, hosts []string, targets ...string) *testAgent {
		_, port := newTarget(t, say("of "+name))
		return newAgent(t, p, func(c *agent.Config) {
			c.Name = name
			allowAll(c)
			for _, h := range hosts {
				c.Hosts = append(c.Hosts, agent.Host{Name: h, Address: "127.0.0.1"})
			}
			for _, target := range targets {
				c.Targets = append(c.Targets, agent.Target{Name: target, URL: "http://127.0.0.1:" + port})
			}
		})
	}
	start("wide", []string{"*.lan"})
	start("narrow", []string{"*.berlin.lan"})
	exact := start("exact", []string{"db.berlin.lan"})
	named := start("web.berlin.lan", nil, "router")
	_, port := newTarget(t, say("all ports are of one host here"))

	// The agent that answers is told by what its target "agent" would say; ports
	// all lead to one machine in a test, so the agent's own refusal tells it: of
	// the names below each agent knows its own only.
	by := func(target string) string {
		a := p.get(target)
		if a.code == 200 {
			return "answered: " + a.body
		}
		return fmt.Sprintf("%d %s", a.code, a.reason)
	}
	scrapes := func(a *testAgent) float64 { return metricSum(t, a.Gatherer(), "culvert_client_scrapes_total") }
	servedBy := func(t *testing.T, target string, want *testAgent) {
		t.Helper()
		before := scrapes(want)
		got := by(target)
		eventually(t, "a scrape of "+target+" is counted by "+want.Name()+" ("+got+")", func() bool { return scrapes(want) == before+1 })
	}
	servedBy(t, "http://db.berlin.lan:"+port+"/metrics", exact)
	servedBy(t, "http://router.web.berlin.lan/metrics", named)
	servedBy(t, "http://web.berlin.lan:"+port+"/metrics", named)

	exact.stop()
	named.stop()
	for _, target := range []string{
		"http://db.berlin.lan:" + port + "/metrics",  // exact host
		"http://router.web.berlin.lan/metrics",       // named target
		"http://agent.web.berlin.lan/metrics",        // the agent itself
		"http://web.berlin.lan:" + port + "/metrics", // agent
	} {
		t.Run("offline "+target, func(t *testing.T) {
			p.get(target).refused(t, 503, protocol.CodeAgentOffline)
		})
	}
}

// TestLongestWildcard has two agents whose wildcards both fit.
func TestLongestWildcard(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	_, port := newTarget(t, nil)
	agents := map[string]*testAgent{}
	for name, host := range map[string]string{"wide": "*.lan", "narrow": "*.berlin.lan"} {
		agents[name] = newAgent(t, p, func(c *agent.Config) {
			c.Name = name
			allowAll(c)
			c.Hosts = []agent.Host{{Name: host, Address: "127.0.0.1"}}
		})
	}
	for _, c := range []struct{ host, by string }{
		{"db.berlin.lan", "narrow"},
		{"a.b.berlin.lan", "narrow"},
		{"db.rome.lan", "wide"},
		{"berlin.lan", "wide"},
	} {
		t.Run(c.host, func(t *testing.T) {
			count := func() float64 { return metricSum(t, agents[c.by].Gatherer(), "culvert_client_scrapes_total") }
			before := count()
			p.get("http://"+c.host+":"+port+"/metrics").ok(t, "up 1")
			eventually(t, c.by+" counts the scrape", func() bool { return count() == before+1 })
		})
	}
	agents["narrow"].stop()
	t.Run("offline wildcard", func(t *testing.T) {
		p.get("http://db.berlin.lan:"+port+"/metrics").refused(t, 503, protocol.CodeAgentOffline, "narrow")
	})
}

// TestSharedHost cuts one of two agents that answer for a host: the other serves.
func TestSharedHost(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	_, port := newTarget(t, nil)
	relays := map[string]*relay{}
	agents := map[string]*testAgent{}
	for _, name := range []string{"left", "right"} {
		relays[name] = newRelay(t, p)
		agents[name] = newAgent(t, p, func(c *agent.Config) {
			c.Name, c.ProxyURLs = name, []string{relays[name].url}
			allowAll(c)
			c.Hosts = []agent.Host{{Name: "db.lan", Address: "127.0.0.1"}}
		})
	}
	for range 8 {
		p.get("http://db.lan:"+port+"/metrics").ok(t, "up 1")
	}
	relays["left"].cut()
	p.logs.wait(t, "Agent lost", "agent=left")
	for range 8 {
		p.get("http://db.lan:"+port+"/metrics").ok(t, "up 1")
	}
	relays["right"].cut()
	p.logs.wait(t, "Agent lost", "agent=right")
	p.get("http://db.lan:"+port+"/metrics").refused(t, 503, protocol.CodeAgentOffline, `"left"`, `"right"`)
}

// TestNotAllowed lists what an agent refuses, and the flag that it names.
func TestNotAllowed(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	base, port := newTarget(t, nil)
	newAgent(t, p, func(c *agent.Config) {
		c.Targets = []agent.Target{{Name: "node", URL: base + "/metrics"}, {Name: "tree", URL: base + "/tree/*"}}
		c.Hosts = []agent.Host{{Name: "db.lan", Address: "127.0.0.1"}}
		c.Allow = []agent.PortRange{{First: 9100, Last: 9100}}
	})
	for _, c := range []struct {
		method, target string
		words          []string
	}{
		{"GET", "http://web-1:" + port + "/metrics", []string{"--allow=" + port}},
		{"GET", "http://db.lan:" + port + "/metrics", []string{"--allow=" + port}},
		{"GET", "http://web-1/metrics", []string{"--allow=80"}},
		{"GET", "https://web-1/metrics", []string{"--allow=443"}},
		{"CONNECT", "web-1:" + port, []string{"--allow=" + port}},
		{"CONNECT", "db.lan:" + port, []string{"--allow=" + port}},
		{"GET", "http://other.web-1/metrics", []string{"--target=other="}},
		{"CONNECT", "node.web-1:443", []string{"named target", "scheme http"}},
		{"CONNECT", "agent.web-1:443", []string{"scheme http"}},
		{"POST", "http://node.web-1/metrics", []string{"GET and HEAD"}},
		{"PUT", "http://node.web-1/metrics", []string{"GET and HEAD"}},
		{"DELETE", "http://node.web-1/metrics", []string{"GET and HEAD"}},
		{"OPTIONS", "http://node.web-1/metrics", []string{"GET and HEAD"}},
		{"POST", "http://agent.web-1/metrics", []string{"GET and HEAD"}},
		{"GET", "http://agent.web-1/debug/pprof/", []string{"/metrics"}},
		{"GET", "http://node.web-1/", []string{"/metrics", "/*"}},
		{"GET", "http://node.web-1/metrics/", []string{"/metrics"}},
		{"GET", "http://node.web-1//metrics", []string{"/metrics"}},
		{"GET", "http://node.web-1/metrics/../admin", []string{"/metrics"}},
		{"GET", "http://node.web-1/%6detrics", nil},
		{"GET", "http://node.web-1:9100/metrics", []string{"no port 9100"}},
		{"GET", "http://tree.web-1/metrics", []string{"/tree/*"}},
		{"GET", "http://tree.web-1/tree", []string{"/tree/*"}},
		{"GET", "http://tree.web-1/treetop", []string{"/tree/*"}},
		{"GET", "http://tree.web-1/tree/../metrics", []string{"/tree/*"}},
		{"GET", "http://tree.web-1/tree/a/../../metrics", nil},
		{"GET", "http://tree.web-1/tree/..", nil},
		{"GET", "http://tree.web-1/tree/./x", nil},
		{"GET", "http://tree.web-1/tree/%2e%2e/metrics", nil},
		{"GET", "http://tree.web-1/tree/%2E%2e/metrics", nil},
		{"GET", "http://tree.web-1/tree/.%2e/metrics", nil},
		{"GET", "http://tree.web-1/tree/..%2fmetrics", nil},
		{"GET", "http://tree.web-1/tree/%2e%2e%2Fmetrics", nil},
		{"GET", "http://tree.web-1/tree/..%5cmetrics", nil},
		{"GET", "http://tree.web-1/tree%2f../metrics", nil},
		{"GET", "http://tree.web-1/%74ree/../metrics", nil},
	} {
		t.Run(c.method+" "+c.target, func(t *testing.T) {
			var header []string
			a := p.send(c.method, c.target, header...)
			if c.target == "http://node.web-1/%6detrics" {
				// The same path in another spelling: to refuse it is as good as to serve it.
				if a.code != 200 && a.code != 403 {
					t.Errorf("got %d", a.code)
				}
				return
			}
			a.refused(t, 403, protocol.CodeNotAllowed, append(c.words, `"web-1"`)...)
		})
	}
	t.Run("prefix", func(t *testing.T) {
		for _, path := range []string{"/tree/", "/tree/a", "/tree/a/b", "/tree/a..b/", "/tree/a%20b"} {
			p.get("http://tree.web-1"+path).ok(t, "up 1")
		}
	})
	t.Run("HEAD", func(t *testing.T) {
		a := p.send("HEAD", "http://node.web-1/metrics")
		if a.code != 200 || a.body != "" {
			t.Errorf("got %d with body %q", a.code, a.body)
		}
	})
}

// TestNamedTargetRequest tells what reaches a named target: the declared
// parameters win, the agent's credentials are used, and the scraper's stay out.
func TestNamedTargetRequest(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	got := make(chan *http.Request, 1)
	base, port := newTarget(t, func(_ http.ResponseWriter, r *http.Request) { got <- r })
	u, _ := url.Parse(base)
	newAgent(t, p, func(c *agent.Config) {
		allowAll(c)
		token := httpclient.DefaultConfig
		token.Authorization = &httpclient.Authorization{Type: "Bearer", Credentials: "of-the-agent"}
		extra := httpclient.DefaultConfig
		extra.HTTPHeaders = map[string]httpclient.Header{"X-Api-Key": {Values: []string{"of-the-agent"}}}
		c.Targets = []agent.Target{
			{Name: "plain", URL: base + "/probe?target=a&module=m"},
			{Name: "basic", URL: "http://joe:secret@" + u.Host + "/metrics"},
			{Name: "token", URL: base + "/metrics", HTTP: &token},
			{Name: "header", URL: base + "/metrics", HTTP: &extra},
		}
	})
	scraper := []string{
		"Authorization: Bearer of-the-scraper", "Proxy-Authorization: Basic cHJveHk6cHJveHk=", "Proxy-Connection: keep-alive",
		"X-Api-Key: of-the-scraper", "Connection: X-Hop", "X-Hop: 1", "Accept: application/openmetrics-text", "User-Agent: Prometheus/3",
	}
	for _, c := range []struct {
		name, target                 string
		query, authorization, apiKey string
	}{
		{"parameters added", "http://plain.web-1/probe", "module=m&target=a", "Bearer of-the-scraper", "of-the-scraper"},
		{"declared parameters win", "http://plain.web-1/probe?target=evil&debug=1&target=b", "debug=1&module=m&target=a", "Bearer of-the-scraper", "of-the-scraper"},
		{"basic auth of the URL", "http://basic.web-1/metrics", "", "Basic am9lOnNlY3JldA==", "of-the-scraper"},
		{"user of the scrape URL", "http://x:y@basic.web-1/metrics", "", "Basic am9lOnNlY3JldA==", "of-the-scraper"},
		{"token of the HTTP configuration", "http://token.web-1/metrics", "", "Bearer of-the-agent", "of-the-scraper"},
		{"header of the HTTP configuration", "http://header.web-1/metrics", "", "Bearer of-the-scraper", "of-the-agent"},
		{"port", "http://web-1:" + port + "/x?b=2&a=1", "b=2&a=1", "Bearer of-the-scraper", "of-the-scraper"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if a := p.get(c.target, scraper...); a.code != 200 {
				t.Fatalf("got %d %s", a.code, a.reason)
			}
			r := <-got
			if r.URL.RawQuery != c.query {
				t.Errorf("query %q, want %q", r.URL.RawQuery, c.query)
			}
			if v := r.Header.Get("Authorization"); v != c.authorization {
				t.Errorf("Authorization %q, want %q", v, c.authorization)
			}
			if v := r.Header.Values("X-Api-Key"); len(v) != 1 || v[0] != c.apiKey {
				t.Errorf("X-Api-Key %q, want %q", v, c.apiKey)
			}
			for _, name := range []string{"Proxy-Authorization", "Proxy-Connection", "X-Hop", "Connection"} {
				if v, ok := r.Header[name]; ok {
					t.Errorf("%s %q reached the target", name, v)
				}
			}
			if r.Header.Get("Accept") != "application/openmetrics-text" || r.Header.Get("User-Agent") != "Prometheus/3" {
				t.Errorf("the scraper's header got lost: %v", r.Header)
			}
		})
	}
}

// TestPassThrough: a port gets any method and a body, and all of the answer.
func TestPassThrough(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		w.Header()["Set-Cookie"] = []string{"a=1", "b=2"}
		w.Header().Set("Culvert-Error", "forged")
		w.WriteHeader(http.StatusTeapot)
		fmt.Fprintf(w, "%s %s", r.Method, body)
	})
	newAgent(t, p, allowAll)
	a := raw(t, p.addr, "POST http://web-1:"+port+"/x HTTP/1.1\r\nHost: web-1\r\nContent-Length: 5\r\n\r\nhello")
	if a.code != http.StatusTeapot || a.body != "POST hello" || len(a.header["Set-Cookie"]) != 2 {
		t.Errorf("got %d %q %v", a.code, a.body, a.header)
	}
	if v := a.header.Get("Culvert-Error"); v != "" {
		t.Errorf("a target spoke for the agent: Culvert-Error %q", v)
	}
	t.Run("Host", func(t *testing.T) {
		hosts := make(chan string, 1)
		_, port := newTarget(t, func(_ http.ResponseWriter, r *http.Request) { hosts <- r.Host })
		p.get("http://web-1:" + port + "/metrics")
		if got := <-hosts; got != "web-1:"+port {
			t.Errorf("the target saw Host %q", got)
		}
	})
	t.Run("chunked body", func(t *testing.T) {
		a := raw(t, p.addr, "PUT http://web-1:"+port+"/x HTTP/1.1\r\nHost: web-1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
		if a.body != "PUT abc" {
			t.Errorf("got %d %q", a.code, a.body)
		}
	})
	t.Run("compressed answers stay compressed", func(t *testing.T) {
		_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "%q", r.Header["Accept-Encoding"])
		})
		p.get("http://web-1:"+port+"/metrics").ok(t, "[]")
		p.get("http://web-1:"+port+"/metrics", "Accept-Encoding: gzip").ok(t, `["gzip"]`)
	})
}

// TestRedirects: those within what was declared are followed, others are passed on.
func TestRedirects(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	elsewhere, _ := newTarget(t, say("elsewhere"))
	loops := 0
	var mu sync.Mutex
	var base, port string
	base, port = newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		to := r.URL.Query().Get("to")
		switch {
		case r.URL.Path == "/tree/loop":
			mu.Lock()
			loops++
			mu.Unlock()
			http.Redirect(w, r, "/tree/loop", http.StatusFound)
		case to != "":
			w.Header().Set("Location", to)
			w.WriteHeader(http.StatusFound)
		default:
			user, _, _ := r.BasicAuth()
			fmt.Fprintf(w, "served %s to %q", r.URL.RequestURI(), user)
		}
	})
	u, _ := url.Parse(base)
	newAgent(t, p, func(c *agent.Config) {
		allowAll(c)
		off := httpclient.DefaultConfig
		off.FollowRedirects = false
		c.Targets = []agent.Target{
			{Name: "tree", URL: "http://joe:pw@" + u.Host + "/tree/*"},
			{Name: "exact", URL: base + "/exact"},
			{Name: "off", URL: base + "/tree/*", HTTP: &off},
		}
	})
	for _, c := range []struct {
		name, target, to string
		followed         string // "" where it is passed on
	}{
		{"within the prefix", "tree.web-1/tree/a", "/tree/b", `served /tree/b to "joe"`},
		{"relative", "tree.web-1/tree/a", "b?x=1", `served /tree/b?x=1 to "joe"`},
		{"absolute, same origin", "tree.web-1/tree/a", base + "/tree/b", `served /tree/b to "joe"`},
		{"out of the prefix", "tree.web-1/tree/a", "/secret", ""},
		{"out of the prefix by dots", "tree.web-1/tree/a", "/tree/../secret", ""},
		{"out of the prefix by escaped dots", "tree.web-1/tree/a", "/tree/%2e%2e/secret", ""},
		{"out of the prefix by a backslash", "tree.web-1/tree/a", "/tree/..\\secret", ""},
		{"out of the prefix by a parameter", "tree.web-1/tree/a", "/tree/..;/secret", ""},
		{"out of the prefix by dots escaped twice", "tree.web-1/tree/a", "/tree/%252e%252e/secret", ""},
		{"metadata of a cloud", "tree.web-1/tree/a", "http://169.254.169.254/tree/b", ""},
		{"metadata without a scheme", "tree.web-1/tree/a", "//169.254.169.254/tree/b", ""},
		{"another name of the same host", "tree.web-1/tree/a", "http://localhost:" + port + "/tree/b", ""},
		{"another port", "tree.web-1/tree/a", "http://127.0.0.1:1/tree/b", ""},
		{"no URL", "tree.web-1/tree/a", "http://[::1/tree/b", ""},
		{"another origin", "tree.web-1/tree/a", elsewhere + "/tree/b", ""},
		{"another scheme", "tree.web-1/tree/a", "https://" + u.Host + "/tree/b", ""},
		{"exact path, same path", "exact.web-1/exact", "/exact?x=1", "served /exact?x=1"},
		{"exact path, another path", "exact.web-1/exact", "/exact/", ""},
		{"switched off", "off.web-1/tree/a", "/tree/b", ""},
		{"port", "web-1:" + port + "/tree/a", "/tree/b", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := p.get("http://" + c.target + "?to=" + url.QueryEscape(c.to))
			if c.followed != "" {
				a.ok(t, c.followed)
				return
			}
			if a.code != http.StatusFound || a.header.Get("Location") != c.to {
				t.Errorf("got %d to %q, want 302 to %q", a.code, a.header.Get("Location"), c.to)
			}
		})
	}
	t.Run("loop", func(t *testing.T) {
		if a := p.get("http://tree.web-1/tree/loop"); a.code != http.StatusFound {
			t.Errorf("got %d", a.code)
		}
		mu.Lock()
		defer mu.Unlock()
		if loops > 20 {
			t.Errorf("the agent followed a loop %d times", loops)
		}
	})
}

// TestHTTPSTargets: https through CONNECT end to end, https in absolute form by
// the agent, and https of a named target.
func TestHTTPSTargets(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	s := httptest.NewTLSServer(say("secure"))
	t.Cleanup(s.Close)
	u, _ := url.Parse(s.URL)
	pool := x509.NewCertPool()
	pool.AddCert(s.Certificate())
	newAgent(t, p, func(c *agent.Config) {
		allowAll(c)
		c.TLS = &tls.Config{RootCAs: pool}
		c.Hosts = []agent.Host{{Name: "example.com", Address: "127.0.0.1"}} // a name in the certificate
		insecure := httpclient.DefaultConfig
		insecure.TLSConfig.InsecureSkipVerify = true
		c.Targets = []agent.Target{
			{Name: "node", URL: s.URL + "/metrics", HTTP: &insecure},
			{Name: "strict", URL: s.URL + "/metrics"},
		}
	})
	t.Run("CONNECT, as Prometheus does", func(t *testing.T) {
		proxyURL := &url.URL{Scheme: "http", Host: p.addr}
		transport := &http.Transport{Proxy: http.ProxyURL(proxyURL), TLSClientConfig: &tls.Config{RootCAs: pool}}
		defer transport.CloseIdleConnections()
		client := &http.Client{Transport: transport}
		for range 3 { // the second goes through the same tunnel
			resp, err := client.Get("https://example.com:" + u.Port() + "/metrics")
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || string(body) != "secure" {
				t.Errorf("got %q, %v", body, err)
			}
		}
	})
	t.Run("absolute form", func(t *testing.T) {
		p.get("https://example.com:"+u.Port()+"/metrics").ok(t, "secure")
	})
	t.Run("named target", func(t *testing.T) { p.get("http://node.web-1/metrics").ok(t, "secure") })
	t.Run("named target with an unknown certificate", func(t *testing.T) {
		p.get("http://strict.web-1/metrics").refused(t, 502, protocol.CodeTargetUnreachable, "strict", "certificate")
	})
}

// TestConnect passes raw bytes both ways, half-closed connections included.
func TestConnect(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var tasks sync.WaitGroup
	t.Cleanup(func() { ln.Close(); tasks.Wait() })
	tasks.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			tasks.Go(func() {
				defer conn.Close()
				io.WriteString(conn, "hello ")
				all, _ := io.ReadAll(conn)
				fmt.Fprintf(conn, "%d bytes", len(all))
			})
		}
	})
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	newAgent(t, p, allowAll)
	t.Run("both ways", func(t *testing.T) {
		conn := rawConn(t, p.addr)
		// What the scraper says ahead of the answer must not get lost.
		fmt.Fprintf(conn, "CONNECT web-1:%s HTTP/1.1\r\nHost: web-1:%s\r\n\r\nahead", port, port)
		r := bufio.NewReader(conn)
		if a := readAnswer(r, "CONNECT"); a.code != 200 {
			t.Fatalf("got %d %s", a.code, a.reason)
		}
		io.WriteString(conn, strings.Repeat("x", 300_000))
		conn.(*net.TCPConn).CloseWrite()
		all, err := io.ReadAll(r)
		if err != nil || string(all) != "hello 300005 bytes" {
			t.Errorf("got %q, %v", all, err)
		}
	})
	t.Run("idle", func(t *testing.T) {
		p := newProxy(t, func(c *server.Config) { c.ConnectIdleTimeout = 300 * time.Millisecond })
		newAgent(t, p, allowAll)
		conn := rawConn(t, p.addr)
		fmt.Fprintf(conn, "CONNECT web-1:%s HTTP/1.1\r\nHost: web-1:%s\r\n\r\n", port, port)
		r := bufio.NewReader(conn)
		if a := readAnswer(r, "CONNECT"); a.code != 200 {
			t.Fatalf("got %d %s", a.code, a.reason)
		}
		if _, err := io.Copy(io.Discard, r); err != nil && !isBroken(err) {
			t.Errorf("the tunnel was not closed: %v", err)
		}
	})
	t.Run("without a port", func(t *testing.T) {
		p.send("CONNECT", "web-1").refused(t, 400, protocol.CodeBadRequest, "port")
	})
}
