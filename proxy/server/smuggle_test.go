package server_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
)

// rawExporter is a target that answers with bytes, whatever they are, and keeps what it
// was sent.
type rawExporter struct {
	base, port string

	mu     sync.Mutex // protects what follows
	answer string     // "ok" where it is empty
	got    bytes.Buffer
	conns  []net.Conn
}

func newRawExporter(t *testing.T) *rawExporter {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &rawExporter{base: "http://" + ln.Addr().String()}
	_, e.port, _ = net.SplitHostPort(ln.Addr().String())
	var tasks sync.WaitGroup
	t.Cleanup(func() {
		ln.Close()
		e.mu.Lock()
		for _, conn := range e.conns { // the agent's pool has some
			conn.Close()
		}
		e.mu.Unlock()
		tasks.Wait()
	})
	tasks.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			e.mu.Lock()
			e.conns = append(e.conns, conn)
			e.mu.Unlock()
			tasks.Go(func() { e.serve(conn) })
		}
	})
	return e
}

func (e *rawExporter) serve(conn net.Conn) {
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	r := bufio.NewReader(io.TeeReader(conn, writerFunc(func(p []byte) (int, error) {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.got.Write(p)
	})))
	for {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		io.Copy(io.Discard, req.Body)
		answer := "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"
		e.mu.Lock()
		if e.answer != "" {
			answer = e.answer
		}
		e.mu.Unlock()
		repeated, endless := strings.CutPrefix(answer, "∞")
		for {
			if _, err := io.WriteString(conn, repeated); err != nil {
				return
			}
			if !endless {
				break
			}
		}
		if strings.Contains(answer, "Connection: close") {
			return
		}
	}
}

// take returns what came since the last time.
func (e *rawExporter) take() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	defer e.got.Reset()
	return e.got.String()
}

func (e *rawExporter) say(answer string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.answer = answer
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// TestRequestsStayWhole: each request of a scraper reaches the target as one request with
// one length, and without what is between scraper and proxy.
func TestRequestsStayWhole(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	e := newRawExporter(t)
	newAgent(t, p, func(c *agent.Config) {
		allowAll(c)
		c.Targets = []agent.Target{{Name: "node", URL: e.base + "/metrics"}}
	})
	hop := "Connection: X-Hop, keep-alive, X-Other\r\nX-Hop: 1\r\nX-Other: 1\r\nKeep-Alive: timeout=5\r\nTe: trailers, deflate\r\nTrailer: X-T\r\nUpgrade: h2c\r\nHttp2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n" +
		"Proxy: http://evil\r\nProxy-Authorization: Basic eDp5\r\nProxy-Authenticate: x\r\nProxy-Connection: close\r\nProxy-Foo: x\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-Host: evil\r\nForwarded: for=1.2.3.4\r\n"
	hidden := "GET /hidden HTTP/1.1\r\nHost: evil\r\nX-Evil: 1\r\n\r\n"
	for what, c := range map[string]struct {
		request string
		want    string // of the target: METHOD PATH BODY; "" where nothing may come
		status  int    // 0: any of 4xx and 5xx
	}{
		"hop by hop":                 {"GET http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\n" + hop + "\r\n", "GET /a ", 200},
		"hop by hop, named target":   {"GET http://node.web-1/metrics HTTP/1.1\r\nHost: x\r\n" + hop + "\r\n", "GET /metrics ", 200},
		"length and chunks":          {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "POST /a abc", 200},
		"chunks and length":          {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 999\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "POST /a abc", 200},
		"one length twice":           {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc", "POST /a abc", 200},
		"two lengths":                {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", "", 400},
		"a list of lengths":          {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nContent-Length: 3, 4\r\n\r\nabcd", "", 400},
		"a signed length":            {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nContent-Length: +3\r\n\r\nabc", "", 400},
		"hexadecimal length":         {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nContent-Length: 0x3\r\n\r\nabc", "", 400},
		"coding with a tab":          {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:\tchunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "POST /a abc", 200},
		"coding with a vertical tab": {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: \vchunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "", 0},
		"codings":                    {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", "", 501},
		"coding twice":               {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "", 0},
		"coding in HTTP/1.0":         {"POST http://web-1:PORT/a HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", "POST /a ", 200},
		"bad chunk":                  {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n-3\r\nabc\r\n0\r\n\r\n", "-", 0},
		"huge chunk":                 {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000003\r\nabc\r\n0\r\n\r\n", "-", 0},
		"chunk that ends in LF":      {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n", "-", 0},
		"a request in a body":        {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nContent-Length: LEN\r\n\r\n" + hidden, "POST /a " + hidden, 200},
		"a request in a GET's body":  {"GET http://node.web-1/metrics HTTP/1.1\r\nHost: x\r\nContent-Length: LEN\r\n\r\n" + hidden, "GET /metrics " + hidden, 200},
		"a request behind chunks":    {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden, "POST /a ", 200},
		"trailers":                   {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nTrailer: X-Evil, Host\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3\r\nabc\r\n0\r\nX-Evil: 1\r\nHost: evil\r\n\r\n", "POST /a abc", 200},
		"a folded field":             {"GET http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nX-A: a\r\n X-Evil: 1\r\n\r\n", "GET /a ", 200},
		"a field folded at once":     {"GET http://web-1:PORT/a HTTP/1.1\r\n X-Evil: 1\r\nHost: x\r\n\r\n", "", 0},
		"NUL in a value":             {"GET http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nX-A: a\x00b\r\n\r\n", "", 400},
		"CR in a value":              {"GET http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nX-A: a\rX-Evil: 1\r\n\r\n", "", 400},
		"LF ends a line":             {"GET http://web-1:PORT/a HTTP/1.1\nHost: x\nX-A: a\n\n", "GET /a ", 200},
		"a space before the colon":   {"GET http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nX-Evil : 1\r\n\r\n", "", 400},
		"a name that is none":        {"GET http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nX(Evil): 1\r\n\r\n", "", 400},
		"another Host":               {"GET http://web-1:PORT/a HTTP/1.1\r\nHost: evil.example.net\r\n\r\n", "GET /a ", 200},
		"two Hosts":                  {"GET http://web-1:PORT/a HTTP/1.1\r\nHost: web-1:PORT\r\nHost: evil\r\n\r\n", "", 400},
		"no Host":                    {"GET http://web-1:PORT/a HTTP/1.1\r\n\r\n", "", 400},
		"CR LF in the path":          {"GET http://web-1:PORT/a%20HTTP/1.1%0d%0aX-Evil:%201%0d%0a HTTP/1.1\r\nHost: x\r\n\r\n", "GET /a%20HTTP/1.1%0d%0aX-Evil:%201%0d%0a ", 200},
		"CR LF in the query":         {"GET http://node.web-1/metrics?a=b%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: x\r\n\r\n", "GET /metrics?a=b%0D%0AX-Evil%3A+1 ", 200},
		"drain in absolute form":     {"POST http://web-1/v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", "", 0},
		"drain of the port":          {"POST http://web-1:PORT/v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", "POST /v1/drain {}", 200},
		"drain of the target agent":  {"POST http://agent.web-1/v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", "", 403},
		"drain of a name":            {"POST http://agent/v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", "", 404},
		"drain in origin form":       {"POST /v1/drain HTTP/1.1\r\nHost: web-1\r\nContent-Length: 2\r\n\r\n{}", "", 0},
		"an absolute path":           {"POST http:///v1/drain HTTP/1.1\r\nHost: web-1\r\nContent-Length: 2\r\n\r\n{}", "", 0},
		"a path of two slashes":      {"POST //web-1:PORT/v1/drain HTTP/1.1\r\nHost: web-1\r\nContent-Length: 2\r\n\r\n{}", "", 0},
		"CONNECT to a target":        {"CONNECT node.web-1:80 HTTP/1.1\r\nHost: x\r\n\r\n", "", 403},
		"CONNECT to the agent":       {"CONNECT agent.web-1:80 HTTP/1.1\r\nHost: x\r\n\r\n", "", 403},
		"CONNECT without a port":     {"CONNECT web-1 HTTP/1.1\r\nHost: x\r\n\r\n", "", 400},
		"CONNECT with a path":        {"CONNECT /v1/drain HTTP/1.1\r\nHost: x\r\n\r\n", "", 0},
		"CONNECT with a URL":         {"CONNECT http://web-1:PORT/v1/drain HTTP/1.1\r\nHost: x\r\n\r\n", "", 0},
		"CONNECT with another Host":  {"CONNECT node.web-1:80 HTTP/1.1\r\nHost: web-1:PORT\r\n\r\n", "", 403},
	} {
		request := strings.ReplaceAll(strings.ReplaceAll(c.request, "PORT", e.port), "LEN", fmt.Sprint(len(hidden)))
		a := raw(t, p.addr, request)
		if c.status == 0 && a.err == nil && a.code < 400 || c.status != 0 && a.code != c.status {
			t.Errorf("%s: got %d %s, %v; want %d", what, a.code, a.reason, a.err, c.status)
		}
		got := e.take()
		if c.want == "" || c.want == "-" {
			// A body that turns out bad may have had a part of it sent: never a whole.
			if c.want == "" && got != "" || strings.Contains(got, "0\r\n\r\n") {
				t.Errorf("%s: the target got %q", what, got)
			}
			continue
		}
		r := bufio.NewReader(strings.NewReader(got))
		req, err := http.ReadRequest(r)
		if err != nil {
			t.Errorf("%s: the target got %q: %v", what, got, err)
			continue
		}
		body, err := io.ReadAll(req.Body)
		if text := req.Method + " " + req.RequestURI + " " + string(body); text != c.want || err != nil || r.Buffered() > 0 {
			t.Errorf("%s: the target got %q, %v, and %d bytes more; want %q", what, text, err, r.Buffered(), c.want)
		}
		head, _, _ := strings.Cut(got, "\r\n\r\n")
		lengths := 0
		for line := range strings.SplitSeq(head, "\r\n") {
			name, _, _ := strings.Cut(strings.ToLower(line), ":")
			switch {
			case name == "content-length", name == "transfer-encoding":
				lengths++
			case name == "connection", name == "keep-alive", name == "te", name == "trailer", name == "upgrade", name == "proxy", name == "forwarded",
				strings.HasPrefix(name, "proxy-"), strings.HasPrefix(name, "x-forwarded-"), name == "x-hop", name == "x-other", name == "x-evil":
				t.Errorf("%s: the target got %q", what, line)
			case strings.ContainsAny(line, "\r\n\x00"):
				t.Errorf("%s: the target got %q", what, line)
			}
		}
		if lengths > 1 || len(req.TransferEncoding) > 1 || strings.Contains(strings.ToLower(got), "trailer") {
			t.Errorf("%s: the target got %q", what, got)
		}
		if host := "web-1:" + e.port; strings.Contains(what, "Host") && req.Host != host && !strings.Contains(request, "node.") {
			t.Errorf("%s: the target got Host %q, want %q", what, req.Host, host)
		}
	}
	p.get("http://node.web-1/metrics").ok(t, "ok") // nothing was drained
}

// TestResponsesStayWhole: what an exporter answers, the scraper gets as one whole
// response, as a refusal, or as a broken transfer; and no other target's scrape gets it.
func TestResponsesStayWhole(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	e := newRawExporter(t)
	other := newRawExporter(t)
	newAgent(t, p, func(c *agent.Config) {
		allowAll(c)
		c.Targets = []agent.Target{{Name: "node", URL: e.base + "/metrics"}, {Name: "other", URL: other.base + "/metrics"}}
	})
	const evil = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Evil: 1\r\n\r\nevil\n"
	const good = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\ngood\n"
	for what, c := range map[string]struct {
		answer string
		status int    // 0: 502, or a broken transfer
		body   string // "*": any
	}{
		"a second response":        {good + evil, 200, "good\n"},
		"a second behind chunks":   {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ngood\n\r\n0\r\n\r\n" + evil, 200, "good\n"},
		"a body of 204":            {"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n" + evil, 204, ""},
		"a body of 304":            {"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n" + evil, 304, ""},
		"length and chunks":        {"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ngood\n\r\n0\r\n\r\n", 200, "good\n"},
		"two lengths":              {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 50\r\n\r\ngood\n", 0, ""},
		"one length twice":         {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\ngood\n", 200, "good\n"},
		"a list of lengths":        {"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\ngood\n", 0, ""},
		"a signed length":          {"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\ngood\n", 0, ""},
		"codings":                  {"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 0, ""},
		"a coding twice":           {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 0, ""},
		"a bad chunk":              {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\ngood\n\r\n0\r\n\r\n", 0, ""},
		"a huge chunk":             {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10000000000000005\r\ngood\n\r\n0\r\n\r\n", 0, ""},
		"a long chunk extension":   {"∞HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;" + strings.Repeat("x", 1<<16), 0, ""},
		"trailers":                 {"HTTP/1.1 200 OK\r\nTrailer: Culvert-Error, X-Evil\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ngood\n\r\n0\r\nCulvert-Error: not-allowed\r\nX-Evil: 1\r\nContent-Length: 3\r\n\r\n", 200, "good\n"},
		"fields of a hop":          {"HTTP/1.1 200 OK\r\nConnection: X-Evil, keep-alive\r\nX-Evil: 1\r\nKeep-Alive: timeout=9\r\nProxy-Authenticate: Basic\r\nContent-Length: 5\r\n\r\ngood\n", 200, "good\n"},
		"a folded field":           {"HTTP/1.1 200 OK\r\nX-A: a\r\n X-Evil: 1\r\nContent-Length: 5\r\n\r\ngood\n", 200, "good\n"},
		"CR in a value":            {"HTTP/1.1 200 OK\r\nX-A: a\rX-Evil: 1\r\nContent-Length: 5\r\n\r\ngood\n", 0, ""},
		"NUL in a value":           {"HTTP/1.1 200 OK\r\nX-A: a\x00b\r\nContent-Length: 5\r\n\r\ngood\n", 0, ""},
		"a space before the colon": {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Evil : 1\r\n\r\ngood\n", 200, "good\n"},
		"CR in the reason":         {"HTTP/1.1 200 OK\rX-Evil: 1\r\nContent-Length: 5\r\n\r\ngood\n", 200, "good\n"},
		"an interim response":      {"HTTP/1.1 103 Early Hints\r\nX-Evil: 1\r\n\r\n" + good, 200, "good\n"},
		"interim responses":        {strings.Repeat("HTTP/1.1 102 Processing\r\n\r\n", 5) + good, 200, "good\n"},
		"a flood of them":          {"∞" + strings.Repeat("HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nX-Evil: 1\r\n\r\n", 100), 502, "*"},
		"a header of 200 kB":       {"HTTP/1.1 200 OK\r\n" + strings.Repeat("X-A: "+strings.Repeat("y", 994)+"\r\n", 200) + "Content-Length: 5\r\n\r\ngood\n", 502, "*"},
		"a field of 200 kB":        {"HTTP/1.1 200 OK\r\nX-A: " + strings.Repeat("y", 200_000) + "\r\nContent-Length: 5\r\n\r\ngood\n", 502, "*"},
		"a header without an end":  {"∞" + "HTTP/1.1 200 OK\r\n" + strings.Repeat("X-A: "+strings.Repeat("y", 994)+"\r\n", 100), 502, "*"},
		"a line without an end":    {"∞" + strings.Repeat("y", 100_000), 502, "*"},
		"a header of 50 kB":        {"HTTP/1.1 200 OK\r\n" + strings.Repeat("X-A: "+strings.Repeat("y", 993)+"\r\n", 50) + "Content-Length: 5\r\n\r\ngood\n", 200, "good\n"},
		"a refusal of the agent":   {"HTTP/1.1 403 Forbidden\r\nCulvert-Error: not-allowed\r\nCulvert-Message: forged\r\nContent-Length: 5\r\n\r\ngood\n", 403, "good\n"},
		"a status that is none":    {"HTTP/1.1 000 No\r\nContent-Length: 5\r\n\r\ngood\n", 0, ""},
		"HTTP/2":                   {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0, ""},
		"no version":               {"good\n", 0, ""},
	} {
		for _, target := range []string{"http://web-1:" + e.port + "/metrics", "http://node.web-1/metrics"} {
			for _, method := range []string{"GET", "HEAD"} {
				if method == "HEAD" && (c.status == 0 || strings.Contains(c.answer, "∞")) {
					continue
				}
				e.say(c.answer)
				conn := rawConn(t, p.addr)
				fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", method, target)
				all, err := io.ReadAll(conn)
				head, _, _ := bytes.Cut(all, []byte("\r\n\r\n"))
				a := readAnswer(bufio.NewReader(bytes.NewReader(all)), method)
				if err != nil {
					a.err = err
				}
				body := c.body
				if method == "HEAD" {
					body = ""
				}
				switch {
				case c.status == 0 && a.code != 502 && a.err == nil, c.status != 0 && (a.code != c.status || a.err != nil):
					t.Errorf("%s, %s %s: got %d %s, %q, %v; want %d", what, method, target, a.code, a.reason, a.body, a.err, c.status)
				case c.status != 0 && c.status != 502 && a.body != body:
					t.Errorf("%s, %s %s: got the body %q, want %q", what, method, target, a.body, body)
				}
				if text := strings.ReplaceAll(string(head), "\r\n", ""); strings.ContainsAny(text, "\r\n\x00") || a.code < 400 && strings.Contains(strings.ReplaceAll(text, "X-A: a X-Evil: 1", ""), "X-Evil") ||
					c.status != 502 && len(all) > 0 && strings.Count(string(all), "HTTP/1.1 ") != 1 || strings.Contains(string(all), "evil\n") || a.code < 400 && strings.Contains(strings.ToLower(string(all)), "culvert-error") {
					t.Errorf("%s, %s %s: the scraper got %q", what, method, target, all[:min(len(all), 2000)])
				}
				// What is left over is no other target's answer. The same target may meet it
				// once, where the next request is faster than the look at the connection:
				// it could as well answer that to a request.
				e.say("")
				p.get("http://other.web-1/metrics").ok(t, "ok\n")
				for try := 1; ; try++ {
					if a := p.get(target); a.code == 200 && a.body == "ok\n" {
						break
					} else if try == 5 {
						t.Fatalf("%s: %s answers %d %s %q", what, target, a.code, a.reason, a.body)
					}
				}
			}
		}
	}
}
