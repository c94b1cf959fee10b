package agent_test

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/protocol/externaltest"
	"github.com/culvert-io/culvert/proxy/server"
)

// framed returns an answer to a poll, in the shape that Go's server gives it.
func framed(request string) string {
	return fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n%s", len(request), request)
}

const emptyOK = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

// TestPollAndPush is the contract with a pushprox-proxy, byte by byte: what polls bring,
// and what is pushed.
func TestPollAndPush(t *testing.T) {
	t.Parallel()
	large := strings.Repeat("x", 200_000)
	var seen sync.Map // requests that targets got, by path
	mux := http.NewServeMux()
	mux.HandleFunc("/metrics", say("up 1\n"))
	mux.HandleFunc("/hop", say("up 1\n"))
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	mux.HandleFunc("/query", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.URL.RawQuery, " tls=", r.TLS != nil)
	})
	mux.HandleFunc("/nothing", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("/chunked", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "m 1\n")
		w.(http.Flusher).Flush()
		io.WriteString(w, "m 2\n")
	})
	mux.HandleFunc("/large", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", strconv.Itoa(len(large)))
		io.WriteString(w, large)
	})
	mux.HandleFunc("/large-chunked", say(large))
	cut := func(header, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			conn, _, _ := http.NewResponseController(w).Hijack()
			io.WriteString(conn, "HTTP/1.1 200 OK\r\n"+header+"\r\n\r\n"+body)
			conn.Close()
		}
	}
	mux.HandleFunc("/short", cut("Content-Length: 10", "m 1"))
	mux.HandleFunc("/short-large", cut("Content-Length: 100000", large[:90000]))
	mux.HandleFunc("/short-chunked", cut("Transfer-Encoding: chunked", "4\r\nm 1\n\r\n"))
	mux.HandleFunc("/short-large-chunked", cut("Transfer-Encoding: chunked", fmt.Sprintf("%x\r\n%s\r\n", 90000, large[:90000])))
	mux.HandleFunc("/slow", func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
		case <-time.After(patience):
		}
	})
	mux.HandleFunc("/slow-body", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, large)
		w.(http.Flusher).Flush()
		select {
		case <-r.Context().Done():
		case <-time.After(patience):
		}
	})
	recorded := func(w http.ResponseWriter, r *http.Request) {
		seen.Store(r.URL.Path, r.Clone(r.Context()))
		mux.ServeHTTP(w, r)
	}
	plain := httptest.NewServer(http.HandlerFunc(recorded))
	secure := httptest.NewTLSServer(http.HandlerFunc(recorded))
	t.Cleanup(func() {
		for _, s := range []*httptest.Server{plain, secure} {
			s.CloseClientConnections()
			s.Close()
		}
	})
	portOf := func(s *httptest.Server) string { u, _ := url.Parse(s.URL); return u.Port() }
	number := func(port string) uint16 { n, _ := strconv.ParseUint(port, 10, 16); return uint16(n) }
	http1, https1 := portOf(plain), portOf(secure)

	// P and S in what a poll brings are the ports.
	get := func(path string, more ...string) string {
		return "GET http://web-1:P" + path + " HTTP/1.1\r\nHost: web-1:P\r\nUser-Agent: Prometheus/3.0\r\nAccept: text/plain\r\nId: id-1\r\nX-Prometheus-Scrape-Timeout-Seconds: 5\r\n" + strings.Join(more, "") + "\r\n"
	}
	withTimeout := func(path, timeout string) string {
		return strings.Replace(get(path), "Timeout-Seconds: 5\r\n", "Timeout-Seconds: "+timeout+"\r\n", 1)
	}
	for _, test := range []struct {
		name, request string
		answer        func(request string) string // framed by default
		head          []string                    // lines that the pushed response has
		lacks         string                      // what it has not, case-insensitively
		body          string                      // with its framing; "~" in front: a part of it
		target        func(*testing.T, *http.Request)
	}{
		{name: "known length", request: get("/metrics"), head: []string{"HTTP/1.1 200 OK", "Content-Length: 5", "Content-Type: text/plain; charset=utf-8", "Id: id-1"}, body: "up 1\n"},
		{name: "the answer chunked", request: get("/metrics"), answer: func(r string) string {
			return fmt.Sprintf("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(r), r)
		}, body: "up 1\n"},
		{name: "the status is not looked at", request: get("/metrics"), answer: func(r string) string { return strings.Replace(framed(r), "200 OK", "503 No", 1) }, body: "up 1\n"},
		{name: "ends with a line feed alone", request: strings.ReplaceAll(get("/metrics"), "\r\n", "\n"), body: "up 1\n"},
		{name: "a name in other letters", request: strings.Replace(get("/metrics"), "http://web-1", "http://WEB-1.", 1), body: "up 1\n"},
		{name: "an Id of the scraper in front", request: strings.Replace(get("/metrics"), "Id: id-1", "Id: forged\r\nId: id-1", 1), head: []string{"Id: id-1"}, lacks: "forged", body: "up 1\n"},
		{name: "two requests", request: get("/metrics") + get("/nothing"), body: "up 1\n"},
		{name: "between scraper and proxy", request: get("/hop", "Connection: close, X-Hop\r\n", "X-Hop: 1\r\n", "Proxy-Authorization: Basic eDp5\r\n", "Proxy-Connection: keep-alive\r\n", "Authorization: Bearer t\r\n"), body: "up 1\n",
			target: func(t *testing.T, r *http.Request) {
				for _, name := range []string{"X-Hop", "Proxy-Authorization", "Proxy-Connection", "Id"} {
					if r.Header.Get(name) != "" {
						t.Errorf("the target got %s: %q", name, r.Header.Get(name))
					}
				}
				if r.Header.Get("Authorization") != "Bearer t" || r.UserAgent() != "Prometheus/3.0" || r.Header.Get("X-Prometheus-Scrape-Timeout-Seconds") != "5" {
					t.Errorf("the target got %v", r.Header)
				}
			}},
		{name: "a body", request: strings.Replace(get("/echo", "Content-Length: 5\r\n"), "GET", "POST", 1) + "hello", body: "hello"},
		{name: "a chunked body", request: strings.Replace(get("/echo", "Transfer-Encoding: chunked\r\n"), "GET", "POST", 1) + "5\r\nhello\r\n0\r\n\r\n", body: "hello"},
		{name: "too long", request: strings.Replace(get("/echo", "Content-Length: 2000000\r\n"), "GET", "POST", 1) + strings.Repeat("x", 2_000_000), head: []string{"HTTP/1.1 413 Request Entity Too Large", "Id: id-1"}, body: "~1048576"},
		{name: "HEAD", request: strings.Replace(get("/large"), "GET", "HEAD", 1), head: []string{"HTTP/1.1 200 OK", "Content-Length: 200000"}, body: ""},
		{name: "no content", request: get("/nothing"), head: []string{"HTTP/1.1 204 No Content"}, lacks: "content-length", body: ""},
		{name: "not found", request: get("/no-such"), head: []string{"HTTP/1.1 404 Not Found"}, body: "404 page not found\n"},
		{name: "chunked and small", request: get("/chunked"), head: []string{"Content-Length: 8"}, lacks: "transfer-encoding", body: "m 1\nm 2\n"},
		{name: "large", request: get("/large"), head: []string{"Content-Length: 200000"}, body: large},
		{name: "large and chunked", request: get("/large-chunked"), head: []string{"Transfer-Encoding: chunked"}, lacks: "content-length", body: "~chunked whole"},
		{name: "short", request: get("/short"), head: []string{"HTTP/1.1 502 Bad Gateway", "Culvert-Error: bad-response", "Id: id-1"}, body: "~broke off"},
		{name: "short and large", request: get("/short-large"), head: []string{"HTTP/1.1 200 OK", "Content-Length: 100000"}, body: large[:90000]},
		{name: "short and chunked", request: get("/short-chunked"), head: []string{"HTTP/1.1 502 Bad Gateway"}, body: "~broke off"},
		{name: "short, large and chunked", request: get("/short-large-chunked"), head: []string{"HTTP/1.1 200 OK", "Transfer-Encoding: chunked"}, body: "~\n}{ broken off\n"},
		{name: "origin form", request: strings.Replace(get("/metrics"), "http://web-1:P", "", 1), head: []string{"HTTP/1.1 400 Bad Request"}, body: "~no URL with scheme and host"},
		{name: "a drain, which is between tunnel and proxy", request: "POST /v1/drain HTTP/1.1\r\nHost: x\r\nId: id-1\r\nContent-Length: 2\r\n\r\n{}", head: []string{"HTTP/1.1 400 Bad Request"}, body: "~no URL"},
		{name: "CONNECT", request: "CONNECT web-1:P HTTP/1.1\r\nHost: web-1:P\r\nId: id-1\r\n\r\n", head: []string{"HTTP/1.1 400 Bad Request"}, body: "~_scheme=https"},
		{name: "a port that is not allowed", request: strings.ReplaceAll(get("/metrics"), ":P", ":9"), head: []string{"HTTP/1.1 403 Forbidden", "Culvert-Error: not-allowed"}, body: "~--allow=9"},
		{name: "another name", request: strings.ReplaceAll(get("/metrics"), "web-1", "web-2"), head: []string{"HTTP/1.1 421 Misdirected Request"}, body: "~web-2"},
		{name: "the agent itself", request: strings.ReplaceAll(get("/metrics"), "web-1:P", "agent.web-1"), head: []string{"HTTP/1.1 200 OK"}, body: "~culvert_client_polls_total"},
		{name: "no timeout", request: strings.Replace(get("/metrics"), "X-Prometheus-Scrape-Timeout-Seconds: 5\r\n", "", 1), body: "up 1\n"},
		{name: "no number for a timeout", request: withTimeout("/metrics", "abc"), body: "up 1\n"},
		{name: "a timeout that is NaN", request: withTimeout("/metrics", "NaN"), body: "up 1\n"},
		{name: "a timeout that has no end", request: withTimeout("/metrics", "1e300"), body: "up 1\n"},
		{name: "a timeout that is over", request: withTimeout("/slow", "0"), head: []string{"HTTP/1.1 504 Gateway Timeout", "Culvert-Error: timeout"}, body: "~timeout"},
		{name: "a slow target", request: withTimeout("/slow", "0.5"), head: []string{"HTTP/1.1 504 Gateway Timeout", "Culvert-Error: timeout", "Id: id-1"}, body: "~timeout"},
		{name: "a body that hangs", request: withTimeout("/slow-body", "0.5"), head: []string{"HTTP/1.1 200 OK", "Transfer-Encoding: chunked"}, body: "~\n}{ broken off\n"},
		{name: "https by parameter", request: strings.ReplaceAll(get("/query?z=1&_scheme=https&a=%20b"), ":P", ":S"), body: "a=+b&z=1 tls=true"},
		{name: "https by URL", request: strings.ReplaceAll(get("/query?z=1&a=2"), "http://web-1:P", "https://web-1:S"), body: "z=1&a=2 tls=true"},
		{name: "another scheme by parameter", request: get("/query?z=1&_scheme=HTTPS&a=%20b"), body: "z=1&_scheme=HTTPS&a=%20b tls=false"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := newRawProxy(t)
			startAgent(t, nil, func(c *agent.Config) {
				c.ProxyURLs = []string{"http://" + p.addr}
				c.Protocol = agent.ProtocolPushProx
				c.Allow = []agent.PortRange{{First: number(http1), Last: number(http1)}, {First: number(https1), Last: number(https1)}}
				c.TLS = &tls.Config{InsecureSkipVerify: true}
			})
			request := strings.ReplaceAll(strings.ReplaceAll(test.request, ":P", ":"+http1), ":S", ":"+https1)
			poll := received(t, p.polls, "the poll")
			if !strings.HasPrefix(poll.head, "POST /poll HTTP/1.1\r\n") || poll.body != "web-1" {
				t.Errorf("polled with\n%s%s", poll.head, poll.body)
			}
			if test.answer == nil {
				test.answer = framed
			}
			poll.answer(test.answer(request))
			received(t, p.polls, "the next poll") // while the scrape runs, or after
			push := received(t, p.posts, "the push")
			push.answer(emptyOK)
			if !strings.HasPrefix(push.head, "POST /push HTTP/1.1\r\n") {
				t.Fatalf("pushed with\n%s", push.head)
			}
			head, body, _ := strings.Cut(push.body, "\r\n\r\n")
			for _, line := range append(test.head, "Id: id-1") {
				if !strings.Contains(head+"\r\n", line+"\r\n") {
					t.Errorf("the pushed response has no %q:\n%s", line, head)
				}
			}
			if !regexp.MustCompile(`\r\nX-Prometheus-Scrape-Timeout-Seconds: [0-9]+\.[0-9]{6}(\r\n|$)`).MatchString(head) {
				t.Errorf("the pushed response has no time that is left:\n%s", head)
			}
			if test.lacks != "" && strings.Contains(strings.ToLower(head), test.lacks) {
				t.Errorf("the pushed response has %q:\n%s", test.lacks, head)
			}
			if part, ok := strings.CutPrefix(test.body, "~"); ok && part == "chunked whole" {
				resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(push.body)), nil)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := io.ReadAll(resp.Body); err != nil || string(got) != large {
					t.Errorf("the pushed response has %d bytes, %v", len(got), err)
				}
			} else if ok && !strings.Contains(body, part) || !ok && body != test.body {
				t.Errorf("pushed the body %.300q, want %.300q", body, test.body)
			}
			if test.target != nil {
				r, _ := seen.Load("/hop")
				test.target(t, r.(*http.Request))
			}
		})
	}
}

// TestPollFailures: what ends a poll is no end of polling.
func TestPollFailures(t *testing.T) {
	t.Parallel()
	_, port := newTarget(t, nil)
	n, _ := strconv.ParseUint(port, 10, 16)
	p := newRawProxy(t)
	a := startAgent(t, nil, func(c *agent.Config) {
		c.ProxyURLs = []string{"http://joe:secret@" + p.addr + "/a/b///"}
		c.Name = "Web-1.Example.NET"
		c.Protocol = agent.ProtocolPushProx
		c.Allow = []agent.PortRange{{First: uint16(n), Last: uint16(n)}}
	})
	authorization := "Authorization: Basic " + base64.StdEncoding.EncodeToString([]byte("joe:secret")) + "\r\n"
	scrape := func(id string) string {
		return framed("GET http://Web-1.Example.NET:" + port + "/metrics HTTP/1.1\r\nHost: x\r\nId: " + id + "\r\nX-Prometheus-Scrape-Timeout-Seconds: 5\r\n\r\n")
	}
	moved := newRawProxy(t)
	for i, answer := range []string{
		"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n",
		"HTTP/1.1 408 Request Timeout\r\nContent-Length: 8\r\nConnection: close\r\n\r\nreplaced",
		"HTTP/1.1 204 No Content\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
		"HTTP/1.1 200 OK\r\nContent-Length: 500\r\nConnection: close\r\n\r\nGET http://web-1/ HTTP/1.1\r\n",
		"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\nbad\n",
		"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: http://127.0.0.1:1/poll\r\n\r\n",
		"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nCulvert-Error: draining\r\nCulvert-Message: this proxy is going away\r\n\r\n",
		"\x16\x03\x01 no HTTP\r\n\r\n",
		"cut",
		framed("GET http://web-1/ HTTP/1.1\r\nHost: x\r\n\r\n"), // no Id
		scrape("id-1"),
		"HTTP/1.1 307 Temporary Redirect\r\nContent-Length: 0\r\nLocation: http://" + moved.addr + "/moved/poll\r\n\r\n",
	} {
		poll := received(t, p.polls, fmt.Sprintf("poll %d", i))
		if !strings.HasPrefix(poll.head, "POST /a/b/poll HTTP/1.1\r\n") || !strings.Contains(poll.head, authorization) || poll.body != "Web-1.Example.NET" {
			t.Errorf("poll %d:\n%s%s", i, poll.head, poll.body)
		}
		if answer == "cut" {
			poll.cut()
			continue
		}
		poll.answer(answer)
		if strings.Contains(answer, "id-1") {
			push := received(t, p.posts, "the push")
			if !strings.HasPrefix(push.head, "POST /a/b/push HTTP/1.1\r\n") || !strings.Contains(push.head, authorization) || !strings.HasSuffix(push.body, "up 1\n") {
				t.Errorf("pushed\n%s%s", push.head, push.body)
			}
			push.answer("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 9\r\n\r\ntoo late\n")
			a.logs.wait(t, "did not take the answer", "too late")
		}
	}
	a.logs.wait(t, "Not connected", "this proxy is going away")
	poll := received(t, moved.polls, "the poll that was redirected")
	if !strings.HasPrefix(poll.head, "POST /moved/poll") || poll.body != "Web-1.Example.NET" {
		t.Errorf("redirected to\n%s%s", poll.head, poll.body)
	}
	poll.answer(scrape("id-2"))
	if push := received(t, moved.posts, "the push"); !strings.HasPrefix(push.head, "POST /moved/push") || !strings.HasSuffix(push.body, "up 1\n") {
		t.Errorf("pushed\n%s%s", push.head, push.body)
	}
	if strings.Contains(a.logs.String(), "secret") {
		t.Error("the log has the password")
	}
}

// TestPushProxProxy has agents behind a pushprox-proxy.
func TestPushProxProxy(t *testing.T) {
	t.Parallel()
	p := newPushProx(t, "127.0.0.1:0")
	large := strings.Repeat("some_metric 1\n", 10_000)
	_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/large":
			io.WriteString(w, large)
		case "/short":
			io.WriteString(w, large)
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		default:
			fmt.Fprintln(w, "up 1")
		}
	})
	n, _ := strconv.ParseUint(port, 10, 16)
	allow := func(c *agent.Config) {
		c.ProxyURLs = []string{"http://" + p.addr}
		c.Allow = []agent.PortRange{{First: uint16(n), Last: uint16(n)}}
	}
	a := startAgent(t, nil, allow)
	a.logs.wait(t, "level=WARN", "Polling", "for want of a tunnel", p.addr, "404")
	if got := a.Connected(); len(got) != 1 {
		t.Errorf("connected to %v", got)
	}
	want := func(target string, status int, word string) {
		t.Helper()
		if code, body, err := getThrough(p.addr, target, "5"); err != nil || code != status || !strings.Contains(body, word) {
			t.Errorf("get %s: %d %.300q %v, want %d with %q", target, code, body, err, status, word)
		}
	}
	want("http://web-1:"+port+"/metrics", 200, "up 1")
	want("http://web-1:"+port+"/large", 200, large)
	want("http://web-1:9/metrics", 403, "--allow=9")
	a.logs.wait(t, "level=WARN", "A scrape was refused", "--allow=all")

	// This proxy takes a body that broke off for a whole one; it must be none to a parser.
	code, body, err := getThrough(p.addr, "http://web-1:"+port+"/short", "5")
	parser := expfmt.NewTextParser(model.UTF8Validation)
	if _, parses := parser.TextToMetricFamilies(strings.NewReader(body)); err == nil && parses == nil {
		t.Errorf("a broken response came as a good one: %d, %d bytes", code, len(body))
	}

	var scrapes sync.WaitGroup
	for range 40 {
		scrapes.Go(func() { want("http://web-1:"+port+"/large", 200, large) })
	}
	scrapes.Wait()

	t.Run("two of one name", func(t *testing.T) {
		b := startAgent(t, nil, allow)
		a.logs.wait(t, "level=WARN", "Another client polls", "--fqdn")
		b.stop()
		// This proxy gives one scrape to the poll that went with the agent.
		for end := time.Now().Add(patience); ; {
			if code, _, err := getThrough(p.addr, "http://web-1:"+port+"/metrics", "1"); err == nil && code == 200 {
				break
			}
			if time.Now().After(end) {
				t.Fatal("the one that stayed is not scraped")
			}
		}
	})
	t.Run("metrics", func(t *testing.T) {
		resp, err := a.Scrape(t.Context(), "http://agent.web-1/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		for _, want := range []string{
			`culvert_client_connected{proxy="http://` + p.addr + `"} 1`,
			`culvert_client_protocol_info{protocol="pushprox",proxy="http://` + p.addr + `"} 1`,
			`culvert_client_polled_scrapes_total{proxy="http://` + p.addr + `",result="ok"}`,
			`culvert_client_connects_total{proxy="http://` + p.addr + `",result="no-tunnel"} 1`,
		} {
			if !bytes.Contains(text, []byte(want)) {
				t.Errorf("%s is missing in\n%s", want, text)
			}
		}
	})
	t.Run("shutdown", func(t *testing.T) {
		a.stop()
		if n := a.logs.count("Scrapes were cut off"); n != 0 {
			t.Error("idle polling was cut off")
		}
	})
}

// TestPollingDrains: a scrape that runs is pushed although the agent goes.
func TestPollingDrains(t *testing.T) {
	t.Parallel()
	p := newPushProx(t, "127.0.0.1:0")
	started, release := make(chan struct{}), make(chan struct{})
	_, port := newTarget(t, func(w http.ResponseWriter, _ *http.Request) {
		close(started)
		<-release
		fmt.Fprintln(w, "up 1")
	})
	n, _ := strconv.ParseUint(port, 10, 16)
	a := startAgent(t, nil, func(c *agent.Config) {
		c.ProxyURLs, c.Protocol = []string{"http://" + p.addr}, agent.ProtocolPushProx
		c.Allow = []agent.PortRange{{First: uint16(n), Last: uint16(n)}}
		c.ShutdownTimeout = patience
	})
	answer := make(chan string, 1)
	go func() {
		_, body, err := getThrough(p.addr, "http://web-1:"+port+"/metrics", "10")
		answer <- fmt.Sprint(body, err)
	}()
	received(t, started, "the scrape")
	stopped := make(chan struct{})
	go func() { a.stop(); close(stopped) }()
	close(release)
	if got := received(t, answer, "the answer"); got != "up 1\n<nil>" {
		t.Errorf("got %q", got)
	}
	received(t, stopped, "the agent's end")
}

// TestNoPolling: a 404 alone makes nobody poll.
func TestNoPolling(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name     string
		handler  http.HandlerFunc
		protocol agent.Protocol
		polls    bool
	}{
		{"all is 404", http.NotFound, agent.ProtocolAuto, true},
		{"polls are answered with a page", func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/poll" {
				http.NotFound(w, r)
				return
			}
			io.WriteString(w, "<html>welcome</html>")
		}, agent.ProtocolAuto, true},
		{"a culvert-proxy says 404", func(w http.ResponseWriter, r *http.Request) {
			protocol.Refusef(http.StatusNotFound, protocol.CodeNotFound, "not here").Write(w)
		}, agent.ProtocolAuto, false},
		{"403", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusForbidden) }, agent.ProtocolAuto, false},
		{"the tunnel alone", http.NotFound, agent.ProtocolCulvert, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var polls atomic.Int64
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/poll" {
					polls.Add(1)
				}
				test.handler(w, r)
			}))
			t.Cleanup(s.Close)
			a := startAgent(t, nil, func(c *agent.Config) { c.ProxyURLs, c.Protocol = []string{s.URL}, test.protocol })
			a.logs.wait(t, "level=WARN", "Not connected")
			if n := a.logs.count("msg=\"Polling"); n != 0 || len(a.Connected()) != 0 || (polls.Load() > 0) != test.polls {
				t.Errorf("%d polls, %d times they were taken, connected to %v", polls.Load(), n, a.Connected())
			}
			if test.polls {
				a.logs.wait(t, "nor does it take polls")
			}
		})
	}
}

// TestPushProxUpgrade: a pushprox-proxy is replaced by a culvert-proxy on its port, and
// back, while a scraper scrapes; nothing is lost but what meets the restart itself.
func TestPushProxUpgrade(t *testing.T) {
	t.Parallel()
	address := externaltest.FreeAddress(t)
	_, port := newTarget(t, nil)
	n, _ := strconv.ParseUint(port, 10, 16)
	old := newPushProx(t, address)
	a := startAgent(t, nil, func(c *agent.Config) {
		c.ProxyURLs = []string{"http://" + address}
		c.Allow = []agent.PortRange{{First: uint16(n), Last: uint16(n)}}
	})
	a.logs.wait(t, "Polling")

	type scrape struct {
		start, end time.Time
		err        error
	}
	var mu sync.Mutex // protects scrapes
	var scrapes []scrape
	stop, stopped := make(chan struct{}), make(chan struct{})
	enough := func() { // scrapes after now
		t.Helper()
		mu.Lock()
		from := len(scrapes)
		mu.Unlock()
		for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
			mu.Lock()
			now := len(scrapes)
			mu.Unlock()
			if now >= from+5 {
				return
			}
			if time.Now().After(end) {
				t.Fatal("the scraper stands still")
			}
		}
	}
	go func() {
		defer close(stopped)
		for tick := time.NewTicker(100 * time.Millisecond); ; {
			select {
			case <-stop:
				tick.Stop()
				return
			case <-tick.C:
			}
			s := scrape{start: time.Now()}
			var code int
			var body string
			if code, body, s.err = getThrough(address, "http://web-1:"+port+"/metrics", "5"); s.err == nil && (code != 200 || body != "up 1\n") {
				s.err = fmt.Errorf("%d %q", code, body)
			}
			s.end = time.Now()
			mu.Lock()
			scrapes = append(scrapes, s)
			mu.Unlock()
		}
	}()
	enough()
	type gap struct{ from, to time.Time }
	var gaps []gap
	down := time.Now()
	old.stop()
	proxy := newProxy(t, func(c *server.Config) { c.ListenAddresses = []string{address} })
	a.logs.wait(t, "msg=Connected")
	gaps = append(gaps, gap{down, time.Now()})
	enough()
	down = time.Now()
	proxy.stop()
	newPushProx(t, address)
	a.logs.waitN(t, 2, "msg=\"Polling")
	gaps = append(gaps, gap{down, time.Now()})
	enough()
	close(stop)
	<-stopped
	failed := 0
	for _, s := range scrapes {
		if s.err == nil {
			continue
		}
		failed++
		beyond := true
		for _, g := range gaps {
			if s.end.After(g.from) && s.start.Before(g.to) {
				beyond = false
			}
		}
		if beyond {
			t.Errorf("a scrape from %s to %s was lost: %v", s.start, s.end, s.err)
		}
	}
	t.Logf("%d scrapes, %d failed, all during the restarts", len(scrapes), failed)
}

// TestReturnToTunnel: behind a balancer the proxy is replaced while old polls go on. The
// agent finds the tunnel, and the scrape that runs arrives.
func TestReturnToTunnel(t *testing.T) {
	t.Parallel()
	old := newPushProx(t, "127.0.0.1:0")
	front := newSwitchFront(t, old.addr)
	started, release := make(chan struct{}, 1), make(chan struct{})
	_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			started <- struct{}{}
			<-release
		}
		fmt.Fprintln(w, "up 1")
	})
	n, _ := strconv.ParseUint(port, 10, 16)
	a := startAgent(t, nil, func(c *agent.Config) {
		c.ProxyURLs = []string{"http://" + front.addr}
		c.Allow = []agent.PortRange{{First: uint16(n), Last: uint16(n)}}
	})
	a.logs.wait(t, "Polling")
	answer := make(chan error, 1)
	go func() {
		code, body, err := getThrough(old.addr, "http://web-1:"+port+"/slow", "10")
		if err == nil && (code != 200 || body != "up 1\n") {
			err = fmt.Errorf("%d %q", code, body)
		}
		answer <- err
	}()
	received(t, started, "the slow scrape")
	proxy := newProxy(t, nil)
	front.to.Store(&proxy.addr)
	if err := a.Reload(a.config(nil)); err != nil { // looks for the tunnel at once
		t.Fatal(err)
	}
	a.logs.wait(t, "msg=Connected")
	proxy.want("http://web-1:"+port+"/metrics", 200, "up 1")
	// A scrape that meets the last poll is no loss either.
	if code, body, err := getThrough(old.addr, "http://web-1:"+port+"/metrics", "3"); err != nil || code != 200 {
		t.Errorf("by the last poll: %d %q %v", code, body, err)
	}
	front.to.Store(&old.addr) // the answer goes to the proxy that waits for it
	close(release)
	if err := received(t, answer, "the answer"); err != nil {
		t.Error(err)
	}
	proxy.want("http://agent.web-1/metrics", 200, `culvert_client_protocol_info{protocol="culvert",proxy="http://`+front.addr+`"} 1`)
}

// switchFront passes connections on to what is behind it now.
type switchFront struct {
	addr string
	to   atomic.Pointer[string]
}

func newSwitchFront(t *testing.T, to string) *switchFront {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &switchFront{addr: l.Addr().String()}
	f.to.Store(&to)
	var tasks sync.WaitGroup
	var conns sync.Map
	tasks.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", *f.to.Load())
			if err != nil {
				near.Close()
				continue
			}
			conns.Store(near, far)
			pass := func(to, from net.Conn) {
				io.Copy(to, from)
				to.Close()
				from.Close()
			}
			tasks.Go(func() { pass(near, far) })
			tasks.Go(func() { pass(far, near) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		conns.Range(func(near, far any) bool {
			return errors.Join(near.(net.Conn).Close(), far.(net.Conn).Close()) != nil || true
		})
		tasks.Wait()
	})
	return f
}

// TestPollingEnvironmentProxy: HTTP_PROXY is for polls and pushes. The name
// pushprox.invalid is known to the forward proxy alone.
func TestPollingEnvironmentProxy(t *testing.T) {
	t.Parallel()
	p := newPushProx(t, "127.0.0.1:0")
	_, port := newTarget(t, nil)
	transport := &http.Transport{}
	var others sync.Map // hosts that were asked for besides
	forward := httptest.NewServer(&httputil.ReverseProxy{Transport: transport, Rewrite: func(pr *httputil.ProxyRequest) {
		if pr.In.URL.Host != "pushprox.invalid" {
			others.Store(pr.In.URL.Host, true)
		}
		pr.Out.URL.Host = p.addr
	}})
	t.Cleanup(func() { forward.CloseClientConnections(); forward.Close(); transport.CloseIdleConnections() })
	logs := startChild(t, "TEST_PROXY_URL=http://pushprox.invalid", "HTTP_PROXY="+forward.URL, "http_proxy=", "NO_PROXY=", "no_proxy=")
	logs.wait(t, "Polling", "pushprox.invalid")
	for range 3 {
		if code, body, err := getThrough(p.addr, "http://web-1:"+port+"/metrics", "5"); err != nil || code != 200 || body != "up 1\n" {
			t.Errorf("%d %q %v", code, body, err)
		}
	}
	others.Range(func(host, _ any) bool { t.Errorf("the forward proxy was asked for %v", host); return true })
}

// TestPollingWithoutUpgrade: a culvert-proxy has taken the place of a pushprox-proxy, and
// what stands in front of it passes polls on and no upgrade. It is polled until it does.
func TestPollingWithoutUpgrade(t *testing.T) {
	t.Parallel()
	p := newPushProx(t, "127.0.0.1:0")
	_, port := newTarget(t, nil)
	n, _ := strconv.ParseUint(port, 10, 16)
	var through atomic.Bool
	proxy := newProxy(t, nil)
	f := newFront(t, proxy, func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.URL.Path, "/p") {
			p.ServeHTTP(w, r)
			return false
		}
		return through.Load() || strip("")(w, r)
	})
	t.Cleanup(p.stop) // before the middle box, which waits for the polls
	a := startAgent(t, nil, func(c *agent.Config) {
		c.ProxyURLs = []string{f.URL}
		c.Allow = []agent.PortRange{{First: uint16(n), Last: uint16(n)}}
	})
	a.logs.wait(t, "level=WARN", "Polling", "for want of a tunnel", "no-upgrade")
	if code, body, err := getThrough(p.addr, "http://web-1:"+port+"/metrics", "5"); err != nil || code != 200 {
		t.Errorf("%d %q %v", code, body, err)
	}
	through.Store(true)
	if err := a.Reload(a.config(nil)); err != nil { // looks for the tunnel at once
		t.Fatal(err)
	}
	a.logs.wait(t, "msg=Connected")
	proxy.want("http://web-1:"+port+"/metrics", 200, "up 1")
}

// TestPollingReload: a reload changes protocol and name of an agent that polls.
func TestPollingReload(t *testing.T) {
	t.Parallel()
	p := newPushProx(t, "127.0.0.1:0")
	_, port := newTarget(t, nil)
	n, _ := strconv.ParseUint(port, 10, 16)
	a := startAgent(t, nil, func(c *agent.Config) {
		c.ProxyURLs, c.Protocol = []string{"http://" + p.addr}, agent.ProtocolCulvert
		c.Allow = []agent.PortRange{{First: uint16(n), Last: uint16(n)}}
	})
	a.logs.wait(t, "Not connected", "404")
	reload := func(name string, protocol agent.Protocol) {
		t.Helper()
		if err := a.Reload(a.config(func(c *agent.Config) { c.Name, c.Protocol = name, protocol })); err != nil {
			t.Fatal(err)
		}
	}
	want := func(name string) {
		t.Helper()
		if code, body, err := getThrough(p.addr, "http://"+name+":"+port+"/metrics", "5"); err != nil || code != 200 {
			t.Errorf("%s: %d %q %v", name, code, body, err)
		}
	}
	reload("web-1", agent.ProtocolAuto)
	a.logs.wait(t, "Polling", "agent=web-1")
	want("web-1")
	reload("web-2", agent.ProtocolAuto)
	want("web-2")
	reload("web-2", agent.ProtocolPushProx)
	want("web-2")
	reload("web-2", agent.ProtocolCulvert)
	a.logs.waitN(t, 2, "Not connected", "404")
	if got := a.Connected(); len(got) != 0 {
		t.Errorf("connected to %v", got)
	}
}
