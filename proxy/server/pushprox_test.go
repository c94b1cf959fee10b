package server_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/protocol/externaltest"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/pushproxtest"
	"github.com/culvert-io/culvert/proxy/server"
)

// rawClient is a client of PushProx whose bytes the test writes and reads itself.
type rawClient struct {
	t    *testing.T
	p    *testProxy
	name string
	conn net.Conn // of the poll
	r    *bufio.Reader
}

// newRawClient polls, and waits until the client is connected.
func newRawClient(t *testing.T, p *testProxy, name string) *rawClient {
	t.Helper()
	c := &rawClient{t: t, p: p, name: name}
	c.poll()
	p.logs.wait(t, "Agent connected", "agent="+protocol.NormalizeName(name)+" ")
	return c
}

// pollText is a poll as the client sends it.
func pollText(name string, header ...string) string {
	return "POST /poll HTTP/1.1\r\nHost: proxy:8080\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: " + strconv.Itoa(len(name)) +
		"\r\nContent-Type: \r\nAccept-Encoding: gzip\r\n" + strings.Join(append(header, ""), "\r\n") + "\r\n" + name
}

func (c *rawClient) poll() {
	c.t.Helper()
	c.conn = rawConn(c.t, c.p.AgentAddr())
	c.r = bufio.NewReader(c.conn)
	io.WriteString(c.conn, pollText(c.name))
}

// scrape reads the answer to the poll, and returns its body, and the ID in it.
func (c *rawClient) scrape() (text, id string) {
	c.t.Helper()
	a := readAnswer(c.r, http.MethodPost)
	if a.err != nil || a.code != http.StatusOK {
		c.t.Fatalf("the poll of %q was answered by %d %v %v", c.name, a.code, a.header, a.err)
	}
	match := regexp.MustCompile(`(?m)^Id: (\S+)\r$`).FindAllStringSubmatch(a.body, -1)
	if len(match) != 1 {
		c.t.Fatalf("the scrape has %d IDs:\n%s", len(match), a.body)
	}
	return a.body, match[0][1]
}

// push pushes a body. It has no Content-Type.
func (c *rawClient) push(body string, header ...string) answer {
	c.t.Helper()
	return raw(c.t, c.p.AgentAddr(), "POST /push HTTP/1.1\r\nHost: proxy:8080\r\nUser-Agent: Go-http-client/1.1\r\nContent-Length: "+strconv.Itoa(len(body))+
		"\r\nAccept-Encoding: gzip\r\n"+strings.Join(append(header, ""), "\r\n")+"\r\n"+body)
}

// later sends a scrape, and returns its answer in a channel.
func later(p *testProxy, method, target string, header ...string) <-chan answer {
	answers := make(chan answer, 1)
	go func() { answers <- p.send(method, target, header...) }()
	return answers
}

// TestPushProxPushes: all that an unmodified client pushes, and what the scraper gets.
func TestPushProxPushes(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	const id, left = "Id: ID\r\n", "X-Prometheus-Scrape-Timeout: 4.998583\r\n"
	for i, c := range []struct {
		name, method, push, body string
		code                     int
		header                   map[string]string // "": it is not there
		broken                   bool
	}{
		{name: "known length", push: "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Type: text/plain; version=0.0.4\r\n" + id + left + "\r\nm 1\n", body: "m 1\n",
			header: map[string]string{"Content-Type": "text/plain; version=0.0.4", "Content-Length": "4", "Id": "", "X-Prometheus-Scrape-Timeout": "4.998583"}},
		{name: "chunked with trailer", push: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n" + id + "\r\n4\r\nm 1\n\r\n4\r\nm 2\n\r\n0\r\nX-T: 1\r\n\r\n", body: "m 1\nm 2\n",
			header: map[string]string{"X-T": "", "Trailer": ""}},
		{name: "until the end", push: "HTTP/1.1 200 OK\r\nConnection: close\r\n" + id + "\r\nm 1\n", body: "m 1\n", header: map[string]string{"Connection": ""}},
		{name: "HTTP/1.0", push: "HTTP/1.0 200 OK\r\nConnection: close\r\n" + id + "\r\nm 1\n", body: "m 1\n"},
		{name: "no length", push: "HTTP/1.1 200 OK\r\n" + id + "\r\nm 1\n", body: "m 1\n", header: map[string]string{"Content-Encoding": ""}},
		{name: "no content", push: "HTTP/1.1 204 No Content\r\n" + id + "\r\n", code: 204},
		{name: "not modified", push: "HTTP/1.1 304 Not Modified\r\nEtag: \"x\"\r\n" + id + "\r\n", code: 304, header: map[string]string{"Etag": `"x"`}},
		{name: "empty", push: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + id + "\r\n"},
		{name: "too short", push: "HTTP/1.1 200 OK\r\nContent-Length: 400\r\n" + id + "\r\nm 1\n", broken: true},
		{name: "chunked and too short", push: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + id + "\r\n4\r\nm 1\n\r\n", broken: true},
		{name: "HEAD", method: "HEAD", push: "HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n" + id + "\r\n", header: map[string]string{"Content-Length": "1234"}},
		{name: "HEAD without a length", method: "HEAD", push: "HTTP/1.1 200 OK\r\n" + id + "\r\n"},
		{name: "the client's own error", push: "HTTP/0.0 500 Internal Server Error\r\n" + id + left + "\r\nscrape target doesn't match client fqdn", code: 500, body: "scrape target doesn't match client fqdn"},
		{name: "the target's error", push: "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n" + id + "\r\nno!\n", code: 503, body: "no!\n"},
		{name: "LF alone", push: "HTTP/1.1 200 OK\nContent-Length: 4\n" + id + "\nm 1\n", body: "m 1\n"},
		{name: "ID in other letters", push: "HTTP/1.1 200 OK\r\nContent-Length: 4\r\niD: ID\r\n\r\nm 1\n", body: "m 1\n"},
		{name: "interim response first", push: "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 4\r\n" + id + "\r\nm 1\n", body: "m 1\n"},
		{name: "interim response alone", push: "HTTP/1.1 103 Early Hints\r\n" + id + "\r\n", code: 502, body: "103"},
		{name: "status below 100", push: "HTTP/1.1 099 What\r\nContent-Length: 0\r\n" + id + "\r\n", code: 502, body: "99"},
		{name: "another protocol", push: "HTTP/1.1 101 Switching Protocols\r\n" + id + "\r\n", code: 502, body: "switched"},
		{name: "several values, and hop by hop", push: "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX-M: 1\r\nX-M: 2\r\nConnection: X-Hop\r\nX-Hop: 1\r\nProxy-Authenticate: Basic\r\nX-Prometheus-Scrape-Timeout-Seconds: 1\r\n" + id + "\r\nm 1\n", body: "m 1\n",
			header: map[string]string{"X-M": "1,2", "X-Hop": "", "Proxy-Authenticate": "", "X-Prometheus-Scrape-Timeout-Seconds": ""}},
		{name: "a refusal that is none", push: "HTTP/1.1 503 X\r\nContent-Length: 4\r\nCulvert-Error: agent-offline\r\nCulvert-Message: lies\r\n" + id + "\r\nm 1\n", code: 503, body: "m 1\n",
			header: map[string]string{"Culvert-Error": "", "Culvert-Message": ""}},
	} {
		t.Run(c.name, func(t *testing.T) {
			client := newRawClient(t, p, fmt.Sprintf("node-%d", i))
			method := c.method
			if method == "" {
				method = http.MethodGet
			}
			answers := later(p, method, "http://"+client.name+":9100/metrics")
			_, id := client.scrape()
			if a := client.push(strings.ReplaceAll(c.push, "ID", id)); a.err != nil || a.code != 200 || a.body != "" {
				t.Errorf("the push was answered by %d %q %v, want an empty 200", a.code, a.body, a.err)
			}
			a := received(t, answers, "the scrape's answer")
			if c.broken {
				if a.code != 200 && a.code != 0 || !isBroken(a.err) { // the head may not have been sent yet

					t.Errorf("got %d, error %v; want a broken transfer", a.code, a.err)
				}
				return
			}
			code := c.code
			if code == 0 {
				code = 200
			}
			if a.err != nil || a.code != code || code != 502 && a.body != c.body || !strings.Contains(a.body, c.body) {
				t.Errorf("got %d %q, error %v; want %d %q", a.code, a.body, a.err, code, c.body)
			}
			for name, want := range c.header {
				if got := strings.Join(a.header.Values(name), ","); got != want {
					t.Errorf("%s is %q, want %q", name, got, want)
				}
			}
			if len(a.raw.Trailer) > 0 || a.header.Get("Date") == "" {
				t.Errorf("trailers %v, Date %q", a.raw.Trailer, a.header.Get("Date"))
			}
			// What was pushed once is pushed no more.
			if a := client.push(strings.ReplaceAll(c.push, "ID", id)); a.code != 404 || a.body != "" {
				t.Errorf("the repeated push was answered by %d %q, want an empty 404", a.code, a.body)
			}
		})
	}
}

// TestPushProxBadPushes: what belongs to no scrape is refused at once, with no body.
func TestPushProxBadPushes(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	client := newRawClient(t, p, "node-a")
	for name, c := range map[string]struct {
		push string
		code int
		why  string
	}{
		"empty":       {"", 400, "no HTTP response"},
		"no response": {"m 1\n", 400, "no HTTP response"},
		"unknown ID":  {"HTTP/1.1 200 OK\r\nId: e6bcd105-3fa6-4dd1-a208-fd059332eab3\r\nContent-Length: 4\r\n\r\nm 1\n", 404, "nobody waits"},
		"no ID":       {"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nm 1\n", 404, "nobody waits"},
		"long head":   {"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 70<<10) + "\r\n\r\n", 400, "head of at most"},
	} {
		if a := client.push(c.push); a.err != nil || a.code != c.code || a.body != "" || !strings.Contains(a.header.Get("Culvert-Message"), c.why) {
			t.Errorf("%s: got %d %v %q %v, want %d", name, a.code, a.header, a.body, a.err, c.code)
		}
	}
	// A scraper that has gone leaves nothing behind.
	conn := rawConn(t, p.addr)
	io.WriteString(conn, "GET http://node-a:9100/metrics HTTP/1.1\r\nHost: node-a:9100\r\n\r\n")
	_, id := client.scrape()
	conn.Close()
	eventually(t, "the scrape is over", func() bool {
		return strings.Contains(p.get("/metrics").body, `culvert_proxy_scrapes_total{mode="proxy",outcome="cancelled"} 1`)
	})
	if a := client.push("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nId: " + id + "\r\n\r\nm 1\n"); a.code != 404 {
		t.Errorf("the late push was answered by %d", a.code)
	}
	if n := p.PushProxScrapes(); n != 0 {
		t.Errorf("%d scrapes are kept", n)
	}
}

// TestPushProxScrapes: the request that a client gets.
func TestPushProxScrapes(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.TimeoutOffset = -1 })
	const seconds = `X-Prometheus-Scrape-Timeout-Seconds: (\S+)\r\n`
	for i, c := range []struct {
		name, spelling, request, want string
	}{
		{"as the contract shows it", "", "GET http://NAME:9100/metrics?x=1 HTTP/1.1\r\nHost: other\r\nX-Prometheus-Scrape-Timeout-Seconds: 5\r\nAccept-Encoding: gzip\r\nAccept: text/plain\r\nUser-Agent: Prometheus/3.0\r\n\r\n",
			`GET http://NAME:9100/metrics\?x=1 HTTP/1.1\r\nHost: NAME:9100\r\nUser-Agent: Prometheus/3.0\r\nAccept: text/plain\r\nAccept-Encoding: gzip\r\nId: \S+\r\n` + seconds + `\r\n`},
		{"no header at all", "", "GET http://NAME HTTP/1.1\r\nHost: NAME\r\n\r\n", `GET http://NAME/ HTTP/1.1\r\nHost: NAME\r\nId: \S+\r\n` + seconds + `\r\n`},
		{"the scraper's Id and what is between it and the proxy", "", "GET http://user:secret@NAME:1/ HTTP/1.1\r\nHost: x\r\nId: mine\r\nConnection: X-Hop, keep-alive\r\nX-Hop: 1\r\nKeep-Alive: 1\r\nTe: trailers\r\nProxy-Connection: keep-alive\r\nProxy-Authorization: Basic eA==\r\nProxy-Foo: 1\r\nUpgrade: x\r\n\r\n",
			`GET http://NAME:1/ HTTP/1.1\r\nHost: NAME:1\r\nId: \S{20,}\r\n` + seconds + `\r\n`},
		{"its own spelling", "Node-SPELLED.Example.net", "GET http://node-spelled.EXAMPLE.net.:9100/m HTTP/1.1\r\nHost: x\r\n\r\n",
			`GET http://Node-SPELLED.Example.net:9100/m HTTP/1.1\r\nHost: Node-SPELLED.Example.net:9100\r\n(?s:.*)`},
		{"_scheme", "", "GET http://NAME:1/%20x?z=1&_scheme=https&a=%20b HTTP/1.1\r\nHost: x\r\n\r\n", `GET http://NAME:1/%20x\?z=1&_scheme=https&a=%20b HTTP/1.1\r\n(?s:.*)`},
		{"https", "", "GET https://NAME:1/ HTTP/1.1\r\nHost: x\r\n\r\n", `GET https://NAME:1/ HTTP/1.1\r\n(?s:.*)`},
		{"a body", "", "POST http://NAME:1/ HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Type: text/x\r\n\r\nhello", `POST http://NAME:1/ HTTP/1.1\r\nHost: NAME:1\r\nContent-Length: 5\r\nContent-Type: text/x\r\nId: \S+\r\n` + seconds + `\r\nhello`},
		{"a chunked body", "", "PUT http://NAME:1/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", `PUT http://NAME:1/ HTTP/1.1\r\nHost: NAME:1\r\nContent-Length: 5\r\n(?s:.*)\r\nhello`},
		{"path mode", "", "GET /scrape/NAME/9100/metrics?x=1 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\n\r\n", `GET http://NAME:9100/metrics\?x=1 HTTP/1.1\r\nHost: NAME:9100\r\nId: \S+\r\n` + seconds + `\r\n`},
	} {
		t.Run(c.name, func(t *testing.T) {
			name := c.spelling
			if name == "" {
				name = fmt.Sprintf("node-%d", i)
			}
			client := newRawClient(t, p, name)
			answers := make(chan answer, 1)
			go func() { answers <- raw(t, p.addr, strings.ReplaceAll(c.request, "NAME", name)) }()
			text, id := client.scrape()
			if want := "^" + strings.ReplaceAll(c.want, "NAME", name) + "$"; !regexp.MustCompile(want).MatchString(text) {
				t.Errorf("got %q\nwant %s", text, want)
			}
			client.push("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nId: " + id + "\r\n\r\nm 1\n")
			received(t, answers, "the answer").ok(t, "m 1\n")
		})
	}

	// They are logged as all scrapes are, without what is for the target alone.
	for name, want := range map[string]string{"node-0": "9100 http://node-0:9100/metrics?x=1 ok 4", "node-2": "1 http://node-2:1/ ok 4"} {
		eventually(t, "the scrape of "+name+" is logged", func() bool {
			var one struct {
				Scrapes []struct {
					Target, URL string
					History     []struct {
						Outcome string
						Bytes   int
					}
				}
			}
			p.api("/api/v1/agents/"+name, &one)
			if len(one.Scrapes) == 0 {
				return false
			}
			l := one.Scrapes[0]
			if got := fmt.Sprint(l.Target, " ", l.URL, " ", l.History[0].Outcome, " ", l.History[0].Bytes); got != want {
				t.Fatalf("got %s, want %s", got, want)
			}
			return true
		})
	}

	// There always is a timeout, and the values of section 6 mean what they say.
	client := newRawClient(t, p, "node-timeouts")
	for value, most := range map[string]float64{"0.5": .5, "10": 10, "600": 300, "": 15, "abc": 15, "0": 15, "-1": 15, "NaN": 15, "+Inf": 300, "1e300": 300, "9.3e9": 300} {
		ctx, cancel := context.WithCancel(t.Context())
		req, _ := http.NewRequestWithContext(ctx, "GET", "http://node-timeouts:1/", nil)
		req.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", value)
		done := make(chan struct{})
		go func() {
			defer close(done)
			proxy, _ := url.Parse("http://" + p.addr)
			transport := &http.Transport{Proxy: http.ProxyURL(proxy), DisableKeepAlives: true}
			if resp, err := transport.RoundTrip(req); err == nil {
				resp.Body.Close()
			}
		}()
		text, _ := client.scrape()
		got := regexp.MustCompile(seconds).FindStringSubmatch(text)
		if left, err := strconv.ParseFloat(got[1], 64); err != nil || left <= 0 || left > most || left < most-10 {
			t.Errorf("%q: the client has %s s, want at most %g", value, got[1], most)
		}
		cancel()
		<-done
		client.poll()
	}
}

// TestPushProxPolls: what a poll may look like, and what it is refused for.
func TestPushProxPolls(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.RoutePrefix = "/culvert"; c.Fleet.MaxKnown = 3 })
	newAgent(t, p, nil)
	for name, c := range map[string]struct {
		request string
		code    int
		why     string
	}{
		"no name":           {"GET /poll HTTP/1.1\r\nHost: x\r\n\r\n", 400, "--fqdn"},
		"white space":       {pollText(" \r\n"), 400, "--fqdn"},
		"no host name":      {pollText("a b"), 400, "--fqdn"},
		"an IPv6 address":   {pollText("2001:db8::1"), 400, "--fqdn"},
		"too long":          {pollText(strings.Repeat("a", 2000)), 400, "--fqdn"},
		"of an agent":       {pollText("web-1"), 409, "taken by a live agent"},
		"of a target":       {pollText("agent.web-1"), 409, "target of agent"},
		"another path":      {strings.Replace(pollText("x"), "/poll", "/poll/", 1), 404, ""},
		"behind the prefix": {strings.Replace(pollText("web-1"), "/poll", "/culvert/poll", 1), 409, ""},
	} {
		if a := raw(t, p.addr, c.request); a.err != nil || a.code != c.code || !strings.Contains(a.header.Get("Culvert-Message"), c.why) || a.header.Get("Culvert-Error") != "" && a.body != "" {
			t.Errorf("%s: got %d %v %q %v, want %d with %q", name, a.code, a.header, a.body, a.err, c.code, c.why)
		}
	}
	// Any method, white space around the name, and no Content-Type will do.
	for i, request := range []string{
		"GET /poll HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n node-0 \r\n",
		strings.Replace(pollText("node-1"), "/poll", "/culvert/poll", 1),
	} {
		conn := rawConn(t, p.addr)
		io.WriteString(conn, request)
		name := fmt.Sprintf("node-%d", i)
		p.logs.wait(t, "Agent connected", "agent="+name, "kind=pushprox")
		answers := later(p, "GET", "http://"+name+":1/")
		c := &rawClient{t: t, p: p, name: name, conn: conn, r: bufio.NewReader(conn)}
		_, id := c.scrape()
		c.push("HTTP/1.1 200 OK\r\nContent-Length: 4\r\nId: " + id + "\r\n\r\nm 1\n")
		received(t, answers, "the answer").ok(t, "m 1\n")
	}
	// The list of names is bounded.
	if a := raw(t, p.addr, pollText("node-2")); a.code != 503 || !strings.Contains(a.header.Get("Culvert-Message"), "--agent.max-known") {
		t.Errorf("one more: got %d %v", a.code, a.header)
	}

	off := newProxy(t, func(c *server.Config) { c.DisablePushProx = true })
	for _, path := range []string{"/poll", "/push"} {
		if a := raw(t, off.addr, strings.Replace(pollText("x"), "/poll", path, 1)); a.code != 404 {
			t.Errorf("%s is switched off: got %d", path, a.code)
		}
	}
	apart := newProxy(t, func(c *server.Config) { c.AgentListenAddresses = []string{"127.0.0.1:0"} })
	newRawClient(t, apart, "node-a")
	if a := raw(t, apart.addr, pollText("node-b")); a.code != 404 {
		t.Errorf("/poll where scrapers are: got %d", a.code)
	}
}

// TestPushProxLiveness: a client is there while it polls, and what was meant for a poll
// that died the next one gets.
func TestPushProxLiveness(t *testing.T) {
	t.Parallel()
	storage := t.TempDir()
	p := newProxy(t, func(c *server.Config) {
		c.StoragePath, c.ReconnectWait = storage, time.Second
		c.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	})
	p.get("http://node-a:1/").refused(t, 404, protocol.CodeUnknownAgent)
	c := newRawClient(t, p, "node-a")

	list := p.get("/clients")
	list.ok(t, `{"targets":["node-a"],"labels":{`)
	list.ok(t, `"__meta_culvert_connected":"true"`)
	if targets := p.get("/targets").body; targets != "[]" {
		t.Errorf("a PushProx client has targets: %s", targets)
	}
	for target, word := range map[string]string{"http://node.node-a/metrics": "which has no targets", "http://agent.node-a/metrics": "which has no targets"} {
		p.get(target).refused(t, 403, protocol.CodeNotAllowed, "node-a", word)
	}
	p.send("CONNECT", "node-a:9100").refused(t, 403, protocol.CodeNotAllowed, "_scheme")
	if a := raw(t, p.addr, "POST http://node-a:1/ HTTP/1.1\r\nHost: x\r\nContent-Length: 70000\r\n\r\n"+strings.Repeat("x", 70000)); a.code != 413 {
		t.Errorf("a large body: got %d %v", a.code, a.err)
	}
	for _, kind := range []string{"culvert_proxy_pushprox_clients 1", `culvert_proxy_agents{state="connected"} 1`} {
		p.get("/metrics").ok(t, kind)
	}

	// The same client polls again: the older poll ends.
	first := *c
	c.poll()
	if a := readAnswer(first.r, "POST"); a.code != 408 || a.body != "" {
		t.Errorf("the older poll was answered by %d %q", a.code, a.body)
	}
	// Somebody else of that name is refused, and does no harm.
	if a := raw(t, p.addr, pollText("NODE-A.", "X-Forwarded-For: 192.0.2.7")); a.code != 409 || !strings.Contains(a.header.Get("Culvert-Message"), "127.0.0.1") {
		t.Errorf("another client of the name: got %d %v", a.code, a.header)
	}
	p.logs.wait(t, "A PushProx client is refused", "node-a")
	// A culvert-client neither.
	_, err := tryRegister(p, "node-a")
	wantRefusal(t, err, 409, protocol.CodeTaken, "node-a")

	// Two scrapes at a time, answered in the wrong order.
	one, two := later(p, "GET", "http://node-a:1/"), later(p, "GET", "http://node-a:1/")
	textA, idA := c.scrape()
	c.poll()
	_, idB := c.scrape()
	if idA == idB {
		t.Errorf("both scrapes have the ID %q: %s", idA, textA)
	}
	c.push("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nId: " + idB + "\r\n\r\nb\n")
	c.push("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nId: " + idA + "\r\n\r\na\n")
	if a, b := received(t, one, "one"), received(t, two, "two"); a.code != 200 || b.code != 200 || a.body == b.body {
		t.Errorf("got %d %q and %d %q", a.code, a.body, b.code, b.body)
	}

	// A scrape that meets no poll waits for the next one.
	waiting := later(p, "GET", "http://node-a:1/")
	c.poll()
	_, id := c.scrape()
	c.poll()
	c.push("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nId: " + id + "\r\n\r\nc\n")
	received(t, waiting, "the answer").ok(t, "c\n")

	// The poll's connection dies: the client is lost, and back with its next poll. What it
	// was given before goes on.
	waiting = later(p, "GET", "http://node-a:1/")
	_, id = c.scrape()
	c.poll()
	another := later(p, "GET", "http://node-a:1/")
	_, idOfAnother := c.scrape()
	c.poll()
	c.push("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nId: " + idOfAnother + "\r\n\r\nd\n")
	received(t, another, "the answer").ok(t, "d\n")
	c.conn.Close()
	p.logs.wait(t, "Agent lost", "node-a", "poll was closed")
	c.push("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nId: " + id + "\r\n\r\nc\n")
	received(t, waiting, "the answer").ok(t, "c\n")
	p.logs.wait(t, "Agent lost", "node-a", "poll was closed")
	p.get("http://node-a:1/").refused(t, 503, protocol.CodeAgentOffline, "node-a", "the PushProx client")
	p.get("/clients").ok(t, `"__meta_culvert_connected":"false"`)
	waiting = later(p, "GET", "http://node-a:1/")
	c.poll()
	_, id = c.scrape()
	c.poll()
	c.push("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nId: " + id + "\r\n\r\nd\n")
	received(t, waiting, "the answer").ok(t, "d\n")

	var agents struct{ Data []fleet.Info }
	json.Unmarshal([]byte(p.get("/api/v1/agents").body), &agents)
	if len(agents.Data) != 1 || agents.Data[0].Kind != "pushprox" || !agents.Data[0].Connected || agents.Data[0].Transport != "poll" {
		t.Errorf("the API shows %+v", agents.Data)
	}
	p.stop()
	if a := readAnswer(c.r, "POST"); a.code != 503 || a.body != "" {
		t.Errorf("when the proxy stops, the poll is answered by %d %q %v", a.code, a.body, a.err)
	}
	p = newProxy(t, func(c *server.Config) { c.StoragePath = storage })
	p.get("/api/v1/agents/node-a").ok(t, `"kind":"pushprox","connected":false`)
	p.get("http://node-a:1/").refused(t, 503, protocol.CodeAgentOffline)
	// Now it is replaced by a culvert-client.
	newAgent(t, p, func(c *agent.Config) { c.Name = "node-a" })
	p.get("/api/v1/agents/node-a").ok(t, `"kind":"culvert","connected":true`)
}

func tryRegister(p *testProxy, name string) (*protocol.Session, error) {
	s, err := tryDial(p, name, "1")
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return s, s.Register(context.Background(), &protocol.Registration{})
}

// TestPushProxRoles: a client shows an agent's token as a password, and pushes for its
// own scrapes alone.
func TestPushProxRoles(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	scraper := "Proxy-Authorization: " + basic("prom", "secret")
	poll := func(name, authorization string) *rawClient {
		conn := rawConn(t, p.addr)
		io.WriteString(conn, pollText(name, "Authorization: "+authorization))
		return &rawClient{t: t, p: p, name: name, conn: conn, r: bufio.NewReader(conn)}
	}
	for _, authorization := range []string{basic("web-7.example.net", "agent2"), basic("x", "pusher")} {
		if a := readAnswer(poll("web-7.example.net", authorization).r, "POST"); a.code != 403 {
			t.Errorf("%s: got %d %v", authorization, a.code, a.header)
		}
	}
	if a := readAnswer(poll("web-7.example.net", basic("x", "wrong")).r, "POST"); a.code != 401 || a.header.Get("WWW-Authenticate") == "" {
		t.Errorf("a wrong password: got %d %v", a.code, a.header)
	}
	c := poll("web-7.example.net", basic("whoever", "agent"))
	p.logs.wait(t, "Agent connected", "web-7")
	answers := later(p, "GET", "http://web-7.example.net:1/", scraper)
	_, id := c.scrape()
	push := "HTTP/1.1 200 OK\r\nContent-Length: 4\r\nId: " + id + "\r\n\r\nm 1\n"
	for authorization, code := range map[string]int{"Bearer agent2": 404, "Bearer pusher": 403, "Bearer nonsense": 401} {
		if a := c.push(push, "Authorization: "+authorization); a.code != code || a.body != "" {
			t.Errorf("a push by %s: got %d %q, want %d", authorization, a.code, a.body, code)
		}
	}
	if a := c.push(push, "Authorization: "+basic("whoever", "agent")); a.code != 200 {
		t.Errorf("its own push: got %d %v", a.code, a.header)
	}
	received(t, answers, "the answer").ok(t, "m 1\n")

	// Who may not be an agent any more is disconnected.
	c = poll("web-7.example.net", "Bearer agent")
	answers = later(p, "GET", "http://web-7.example.net:1/", scraper)
	_, id = c.scrape()
	c = poll("web-7.example.net", "Bearer agent")
	file.write(strings.ReplaceAll(everyRole(), hashOf("agent"), hashOf("another")))
	if err := p.Reload(); err != nil {
		t.Fatal(err)
	}
	if a := readAnswer(c.r, "POST"); a.code != 403 && a.code != 401 { // it may come after the reload
		t.Errorf("the poll of a revoked client: got %d", a.code)
	}
	if a := received(t, answers, "the answer"); a.code == 200 {
		t.Errorf("a revoked client has answered %s: %q", id, a.body)
	}
}

// TestPushProxStreams: a body is passed on as it comes, and takes no memory; nor does it
// hold anything when the scraper has gone.
func TestPushProxStreams(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	c := newRawClient(t, p, "node-a")
	scrape := func() (scraper, pusher net.Conn) {
		scraper = rawConn(t, p.addr)
		io.WriteString(scraper, "GET http://node-a:1/ HTTP/1.1\r\nHost: node-a\r\n\r\n")
		_, id := c.scrape()
		c.poll()
		pusher = rawConn(t, p.addr)
		fmt.Fprintf(pusher, "POST /push HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nHTTP/1.1 200 OK\r\nId: %s\r\n\r\nm 1\n", id)
		return scraper, pusher
	}
	scraper, pusher := scrape()
	resp, err := http.ReadResponse(bufio.NewReader(scraper), nil)
	if err != nil {
		t.Fatal(err)
	}
	begin := make([]byte, 4)
	if _, err := io.ReadFull(resp.Body, begin); err != nil || string(begin) != "m 1\n" {
		t.Errorf("got %q, %v before the push had ended", begin, err)
	}
	pusher.Close()
	if _, err := io.Copy(io.Discard, resp.Body); !isBroken(err) {
		t.Errorf("half a push: the scraper reads to %v, want a broken transfer", err)
	}
	scraper, pusher = scrape()
	http.ReadResponse(bufio.NewReader(scraper), nil)
	scraper.Close()
	if a := readAnswer(bufio.NewReader(pusher), "POST"); a.err != nil || a.code != 200 {
		t.Errorf("nobody reads the push: got %d %v", a.code, a.err)
	}
}

// TestPushProxCluster: a proxy that has no poll of a client passes its scrapes on.
func TestPushProxCluster(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	one, two := newMember(t, e, nil), newMember(t, e, nil)
	c := newRawClient(t, one, "node-a")
	two.holds("node-a", true)
	answers := later(two, "GET", "http://node-a:9100/metrics")
	text, id := c.scrape()
	if !strings.HasPrefix(text, "GET http://node-a:9100/metrics HTTP/1.1\r\nHost: node-a:9100\r\n") || strings.Contains(text, "Culvert") {
		t.Errorf("got %q", text)
	}
	c.poll()
	c.push("HTTP/1.1 200 OK\r\nId: " + id + "\r\n\r\nm 1\n")
	received(t, answers, "the answer").ok(t, "m 1\n")
	two.get("/api/v1/agents").ok(t, `"kind":"pushprox","connected":true`)

	// Behind a balancer the push may meet the other proxy.
	big := strings.Repeat("m 1\n", 50_000)
	answers = later(one, "GET", "http://node-a:9100/metrics")
	_, id = c.scrape()
	c.poll()
	away := *c
	away.p = two
	if a := away.push("HTTP/1.1 200 OK\r\nId: " + id + "\r\n\r\n" + big); a.code != 200 || a.body != "" {
		t.Errorf("the push through the other proxy was answered by %d %v", a.code, a.header)
	}
	if a := received(t, answers, "the answer"); a.code != 200 || a.body != big || a.header.Get("Id") != "" {
		t.Errorf("got %d, %d bytes, %v", a.code, len(a.body), a.err)
	}
	for _, other := range []string{id, "x." + strings.SplitN(id, ".", 2)[1], "x.y.node-a"} {
		if a := away.push("HTTP/1.1 200 OK\r\nId: " + other + "\r\n\r\n"); a.code != 404 && a.code != 502 || a.body != "" {
			t.Errorf("%s: got %d %v", other, a.code, a.header)
		}
	}
	two.get("http://agent.node-a/metrics").refused(t, 403, protocol.CodeNotAllowed, "no targets")
	two.send("CONNECT", "node-a:1").refused(t, 403, protocol.CodeNotAllowed, "_scheme")
	// One that stops sends its clients away before it stops.
	go one.stop()
	if a := readAnswer(c.r, "POST"); a.code != 503 || a.body != "" {
		t.Errorf("the poll of the proxy that stops was answered by %d %v", a.code, a.err)
	}
	two.holds("node-a", false)
	c.p = two
	c.poll()
	two.holds("node-a", true)
	c.conn.Close()
	two.holds("node-a", false)
	two.get("/api/v1/agents").ok(t, `"kind":"pushprox","connected":false`)
}

// answering is a target that every host has.
type answering struct{ body string }

func (a answering) RoundTrip(req *http.Request) (*http.Response, error) {
	body := fmt.Sprintf("up{host=%q} 1\n%s", req.URL.Host, a.body)
	return &http.Response{
		Status: "200 OK", StatusCode: 200, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, ContentLength: int64(len(body)),
		Header: http.Header{"Content-Type": {"text/plain; version=0.0.4"}}, Body: io.NopCloser(strings.NewReader(body)), Request: req,
	}, nil
}

// TestPushProxLoad: of many clients and scrapers no scrape is lost, and memory stays.
// CULVERT_PUSHPROX_LOAD=5m has 2,000 clients for that long.
func TestPushProxLoad(t *testing.T) {
	clients, length, pause := 100, 2*time.Second, time.Duration(0)
	if text := os.Getenv("CULVERT_PUSHPROX_LOAD"); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
		clients, pause = 2000, 50*time.Millisecond // which is a scrape of each in 3 s
	}
	const scrapers = 32
	p := newProxy(t, func(c *server.Config) {
		c.StoragePath = filepath.Join(t.TempDir(), "data")
		c.ReconnectWait = 2 * time.Second
	})
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	targets := answering{strings.Repeat("some_metric{label=\"value\"} 1234.5\n", 300)}
	all := make([]*pushproxtest.Client, clients)
	for i := range all {
		all[i] = &pushproxtest.Client{ProxyURL: p.url, Name: fmt.Sprintf("node-%d", i), Targets: targets}
		running.Go(func() { all[i].Run(ctx) })
	}
	within(t, time.Minute, "all clients are connected", func() bool {
		return strings.Contains(p.get("/metrics").body, fmt.Sprintf("culvert_proxy_pushprox_clients %d\n", clients))
	})
	memory := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	var scraped, lost atomic.Int64
	var scraping sync.WaitGroup
	proxy, _ := url.Parse("http://" + p.addr)
	start, begin := time.Now(), memory()
	var slowest atomic.Int64
	for n := range scrapers {
		scraping.Go(func() {
			transport := &http.Transport{Proxy: http.ProxyURL(proxy)}
			defer transport.CloseIdleConnections()
			client := &http.Client{Transport: transport}
			for i := n; time.Since(start) < length; i += scrapers {
				time.Sleep(pause)
				host := fmt.Sprintf("node-%d:9100", i%clients)
				begin := time.Now()
				resp, err := client.Get("http://" + host + "/metrics")
				var body []byte
				if err == nil {
					body, err = io.ReadAll(resp.Body)
					resp.Body.Close()
				}
				if err != nil || resp.StatusCode != 200 || !bytes.HasPrefix(body, []byte(fmt.Sprintf("up{host=%q} 1\n", host))) || len(body) < len(targets.body) {
					if lost.Add(1) < 10 {
						t.Errorf("%s: %v %v %.100s", host, resp, err, body)
					}
				}
				scraped.Add(1)
				for took := int64(time.Since(begin)); ; {
					if old := slowest.Load(); took <= old || slowest.CompareAndSwap(old, took) {
						break
					}
				}
			}
		})
	}
	middle := make(chan uint64, 1)
	scraping.Go(func() {
		time.Sleep(length / 3)
		middle <- memory()
	})
	scraping.Wait()
	end := memory()
	var errors int64
	for _, c := range all {
		errors += c.PollErrors.Load() + c.PushErrors.Load() + c.ScrapeErrors.Load()
	}
	t.Logf("%d clients, %d scrapers, %s: %d scrapes, %d lost, %d errors of clients, the slowest took %s; heap and stacks of proxy and clients together %d MiB before, %d MiB after a third, %d MiB at the end",
		clients, scrapers, length, scraped.Load(), lost.Load(), errors, time.Duration(slowest.Load()).Round(time.Millisecond), begin>>20, <-middle>>20, end>>20)
	if lost.Load() > 0 || errors > 0 {
		t.Errorf("%d scrapes were lost, clients had %d errors", lost.Load(), errors)
	}
	if n := p.PushProxScrapes(); n != 0 {
		t.Errorf("%d scrapes are kept", n)
	}
	if end > 3*begin/2+64<<20 {
		t.Errorf("memory grew from %d to %d MiB", begin>>20, end>>20)
	}
}

// TestPushProxClient: a whole client, with its credential in --proxy-url and a path there,
// in front of targets with and without TLS, in proxy mode and in path mode.
func TestPushProxClient(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile, c.RoutePrefix = file.path, "/culvert" })
	const name = "web-5.example.net"
	var queries atomic.Value
	handler := func(w http.ResponseWriter, r *http.Request) {
		queries.Store(r.URL.RawQuery + " " + r.Host)
		if r.URL.Path == "/slow" {
			<-r.Context().Done()
		}
		io.WriteString(w, "up 1\n")
	}
	_, port := newTarget(t, handler)
	secure := httptest.NewTLSServer(http.HandlerFunc(handler))
	t.Cleanup(secure.Close)
	_, securePort, _ := net.SplitHostPort(secure.Listener.Addr().String())
	targets := &http.Transport{
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			_, port, _ := net.SplitHostPort(address)
			return (&net.Dialer{}).DialContext(ctx, network, "127.0.0.1:"+port)
		},
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}
	t.Cleanup(targets.CloseIdleConnections)
	client := &pushproxtest.Client{ProxyURL: "http://whoever:agent@" + p.AgentAddr() + "/culvert//", Name: name, Targets: targets}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { client.Run(ctx) })
	defer running.Wait()
	defer cancel()
	p.logs.wait(t, "Agent connected", name)
	scraper, here := "Proxy-Authorization: "+basic("prom", "secret"), "Authorization: "+basic("prom", "secret")

	p.get("http://"+name+":"+port+"/metrics?x=1", scraper).ok(t, "up 1\n")
	p.get("/culvert/scrape/"+name+"/"+port+"/metrics", here).ok(t, "up 1\n")
	p.get("http://"+name+":"+securePort+"/metrics?z=1&_scheme=https&a=%20b", scraper).ok(t, "up 1\n")
	if got := queries.Load(); got != "a=+b&z=1 "+name+":"+securePort {
		t.Errorf("the target with TLS was asked for %q", got)
	}
	if a := p.send("HEAD", "http://"+name+":"+port+"/metrics", scraper); a.code != 200 || a.header.Get("Content-Length") != "5" {
		t.Errorf("HEAD: got %d %v", a.code, a.header)
	}
	if a := p.get("http://"+name+":"+portOfNobody(t)+"/metrics", scraper); a.code != 500 || !strings.Contains(a.body, "connection refused") {
		t.Errorf("nobody listens: got %d %q", a.code, a.body)
	}
	p.get("http://"+name+":"+port+"/slow", scraper, "X-Prometheus-Scrape-Timeout-Seconds: 0.3").refused(t, 504, protocol.CodeTimeout)
	var many sync.WaitGroup
	for range 50 {
		many.Go(func() { p.get("http://"+name+":"+port+"/metrics", scraper).ok(t, "up 1\n") })
	}
	many.Wait()
	if n := client.PollErrors.Load(); n != 0 {
		t.Errorf("%d polls failed", n)
	}
}

// TestPushProxDeadPolls: a poll whose connection is closed as it gets a scrape costs that
// nothing: the next one has it.
func TestPushProxDeadPolls(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.ReconnectWait = patience })
	newRawClient(t, p, "node-a").conn.Close()
	p.logs.wait(t, "Agent lost", "node-a")
	for range 3 {
		answers := later(p, "GET", "http://node-a:1/", "X-Prometheus-Scrape-Timeout-Seconds: 9")
		for range 3 {
			dead := rawConn(t, p.addr)
			io.WriteString(dead, pollText("node-a"))
			dead.Close()
		}
		c := &rawClient{t: t, p: p, name: "node-a"}
		id := []string(nil)
		for tries := 0; id == nil && tries < 10; tries++ { // one of these may end this poll
			c.poll()
			id = regexp.MustCompile(`(?m)^Id: (\S+)\r$`).FindStringSubmatch(readAnswer(c.r, "POST").body)
		}
		if id == nil {
			t.Fatal("no poll gets the scrape")
		}
		c.push("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nId: " + id[1] + "\r\n\r\na\n")
		received(t, answers, "the answer").ok(t, "a\n")
	}
}

// TestPushProxTwins: two clients of one name and one address end each other's polls, which
// the log tells; not one scrape is lost by it.
func TestPushProxTwins(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	for i := range 2 {
		client := &pushproxtest.Client{ProxyURL: p.url, Name: "node-a", Targets: answering{fmt.Sprintf("twin %d\n", i)}, InitialWait: 10 * time.Millisecond, MaxWait: 20 * time.Millisecond}
		running.Go(func() { client.Run(ctx) })
	}
	p.logs.wait(t, "level=WARN", "two PushProx clients seem to run with one --fqdn", "node-a")
	for range 100 {
		p.get("http://node-a:1/").ok(t, "twin ")
	}
}

// portOfNobody returns a port that nobody listens on.
func portOfNobody(t *testing.T) string {
	_, port, err := net.SplitHostPort(externaltest.FreeAddress(t))
	if err != nil {
		t.Fatal(err)
	}
	return port
}
