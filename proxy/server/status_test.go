package server_test

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

const timeoutHeader = "X-Prometheus-Scrape-Timeout-Seconds: "

// hang is a target that never answers; it tells of requests, and of their end.
type hang struct {
	port           string
	started, ended chan struct{}
}

func newHang(t *testing.T, head string) *hang {
	t.Helper()
	h := &hang{started: make(chan struct{}, 16), ended: make(chan struct{}, 16)}
	_, h.port = newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		if head != "" {
			io.WriteString(w, head)
			http.NewResponseController(w).Flush()
		}
		h.started <- struct{}{}
		<-r.Context().Done()
		h.ended <- struct{}{}
		panic(http.ErrAbortHandler)
	})
	return h
}

// closedPort returns a port on which nobody listens.
func closedPort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
}

// TestStatuses is the status table of the design: status, Culvert-Error, reason
// phrase and body, in absolute form, for CONNECT and in path mode.
func TestStatuses(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	slow := newHang(t, "")
	dead := closedPort(t)
	newAgent(t, p, func(c *agent.Config) {
		for _, port := range []string{slow.port, dead} {
			r, _ := agent.ParsePortRange(port)
			c.Allow = append(c.Allow, r)
		}
		c.Targets = []agent.Target{{Name: "dead", URL: "http://127.0.0.1:" + dead}}
	})
	gone := newAgent(t, p, func(c *agent.Config) { c.Name = "gone" })
	gone.stop()
	type row struct {
		target, path, connect string // the same case three ways; "" where there is none
		status                int
		code                  protocol.Code
		words                 []string
	}
	for name, c := range map[string]row{
		"unknown-agent": {"http://nobody:9100/metrics", "/scrape/nobody/9100/metrics", "nobody:9100", 404, protocol.CodeUnknownAgent, []string{`"nobody"`}},
		"agent-offline": {"http://gone:9100/metrics", "/scrape/gone/9100/metrics", "gone:9100", 503, protocol.CodeAgentOffline, []string{`agent "gone" lost `, " s ago (it said: shutdown)"}},
		"not-allowed":   {"http://web-1:1/metrics", "/scrape/web-1/1/metrics", "web-1:1", 403, protocol.CodeNotAllowed, []string{"--allow=1"}},
		"undeclared":    {"http://x.web-1/metrics", "/scrape/web-1/x/metrics", "", 403, protocol.CodeNotAllowed, []string{"--target=x="}},
		"target-unreachable": {"http://web-1:" + dead + "/metrics", "/scrape/web-1/" + dead + "/metrics", "web-1:" + dead, 502, protocol.CodeTargetUnreachable,
			[]string{dead, "connection refused"}},
		"named target-unreachable": {"http://dead.web-1/metrics", "/scrape/web-1/dead/metrics", "", 502, protocol.CodeTargetUnreachable, []string{`"dead"`, "connection refused"}},
		"timeout":                  {"http://web-1:" + slow.port + "/metrics", "/scrape/web-1/" + slow.port + "/metrics", "", 504, protocol.CodeTimeout, []string{`"web-1"`}},
		"port 0":                   {"http://web-1:0/metrics", "/scrape/web-1/0/metrics", "web-1:0", 400, protocol.CodeBadRequest, nil},
		"port too large":           {"http://web-1:70000/metrics", "/scrape/web-1/70000/metrics", "web-1:70000", 400, protocol.CodeBadRequest, nil},
	} {
		t.Run(name, func(t *testing.T) {
			p := *p
			p.t = t
			timeout := timeoutHeader + "8"
			if c.code == protocol.CodeTimeout {
				timeout = timeoutHeader + "0.5"
			}
			t.Run("proxy", func(t *testing.T) {
				p.get(c.target, timeout).refused(t, c.status, c.code, c.words...)
			})
			t.Run("HEAD", func(t *testing.T) {
				p.send("HEAD", c.target, timeout).refused(t, c.status, c.code, c.words...)
			})
			t.Run("HTTP/1.0", func(t *testing.T) {
				raw(t, p.addr, "GET "+c.target+" HTTP/1.0\r\n"+timeout+"\r\n\r\n").refused(t, c.status, c.code, c.words...)
			})
			t.Run("path", func(t *testing.T) {
				p.get(c.path, timeout).refused(t, c.status, c.code, c.words...)
			})
			if c.connect != "" {
				t.Run("connect", func(t *testing.T) {
					p.send("CONNECT", c.connect, timeout).refused(t, c.status, c.code, c.words...)
				})
			}
		})
	}
	t.Run("a body does not spoil the answer", func(t *testing.T) {
		a := raw(t, p.addr, "POST http://nobody/ HTTP/1.1\r\nHost: nobody\r\nContent-Length: 300000\r\n\r\n"+strings.Repeat("x", 300_000))
		if a.err != nil || a.code != 404 || a.header.Get("Culvert-Error") != "unknown-agent" {
			t.Errorf("got %d %v, %v", a.code, a.header, a.err)
		}
	})
}

// TestErrorTextFitsStatusLine: what targets and scrapers say can't break the
// status line.
func TestErrorTextFitsStatusLine(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	for _, target := range []string{
		"http://" + strings.Repeat("a", 2000) + "/metrics",
		"http://caf\xc3\xa9/metrics",
		"http://a%0d%0aX-Injected:1/metrics",
		"http://a%00b/metrics",
		"ftp://web-1/metrics",
		"http:///metrics",
	} {
		a := raw(t, p.addr, "GET "+target+" HTTP/1.1\r\nHost: x\r\n\r\n")
		if a.err != nil || a.code != 404 && a.code != 400 {
			t.Errorf("%.40q: got %d, %v", target, a.code, a.err)
		}
		if _, ok := a.header["X-Injected"]; ok {
			t.Errorf("%q: a header field was injected", target)
		}
		if len(a.reason) > 400 || regexp.MustCompile(`[^ -~]`).MatchString(a.reason) {
			t.Errorf("%.40q: reason phrase %q", target, a.reason)
		}
	}
}

// TestReconnectWait: a scrape waits for an agent that comes back, and no longer.
func TestReconnectWait(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.ReconnectWait = patience })
	_, port := newTarget(t, nil)
	newAgent(t, p, allowAll).stop()
	p.logs.wait(t, "Agent leaves")
	t.Run("the scraper's timeout is shorter", func(t *testing.T) {
		p.get("http://web-1:"+port+"/metrics", timeoutHeader+"0.5").refused(t, 503, protocol.CodeAgentOffline)
	})
	done := make(chan answer, 2)
	go func() { done <- p.get("http://web-1:"+port+"/metrics", timeoutHeader+"9") }()
	go func() { done <- p.send("CONNECT", "web-1:"+port, timeoutHeader+"9") }()
	newAgent(t, p, allowAll)
	for range 2 {
		if a := received(t, done, "the waiting scrape"); a.code != 200 {
			t.Errorf("got %d %s", a.code, a.reason)
		}
	}
	t.Run("unknown names don't wait", func(t *testing.T) {
		p.get("http://nobody/metrics").refused(t, 404, protocol.CodeUnknownAgent)
	})
}

// TestAgentBusy fills the places of one agent; another agent is not affected.
func TestAgentBusy(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) {
		c.Fleet.MaxScrapes, c.Fleet.MaxTunnels = 2, 1
		c.ReconnectWait = 20 * time.Millisecond
	})
	slow := newHang(t, "")
	_, port := newTarget(t, nil)
	newAgent(t, p, allowAll)
	newAgent(t, p, func(c *agent.Config) { c.Name = "web-2"; allowAll(c) })
	var running []net.Conn
	for range 2 {
		conn := rawConn(t, p.addr)
		fmt.Fprintf(conn, "GET http://web-1:%s/ HTTP/1.1\r\nHost: x\r\n\r\n", slow.port)
		received(t, slow.started, "a slow scrape")
		running = append(running, conn)
	}
	p.get("http://web-1:"+port+"/metrics").refused(t, 429, protocol.CodeAgentBusy, `"web-1"`, "2", "--scrape.max-concurrent")
	p.get("/scrape/web-1/"+port+"/metrics").refused(t, 429, protocol.CodeAgentBusy)
	p.get("http://web-2:"+port+"/metrics").ok(t, "up 1")
	running[0].Close()
	received(t, slow.ended, "the end of a slow scrape")
	eventually(t, "a place is free", func() bool { return p.get("http://web-1:"+port+"/metrics").code == 200 })

	tunnel := rawConn(t, p.addr)
	fmt.Fprintf(tunnel, "CONNECT web-1:%s HTTP/1.1\r\nHost: x\r\n\r\n", port)
	r := bufio.NewReader(tunnel)
	if a := readAnswer(r, "CONNECT"); a.code != 200 {
		t.Fatalf("CONNECT: %d %s", a.code, a.reason)
	}
	p.send("CONNECT", "web-1:"+port).refused(t, 429, protocol.CodeAgentBusy, "--connect.max-concurrent")
	p.get("http://web-1:"+port+"/metrics").ok(t, "up 1") // tunnels don't count as scrapes
	tunnel.Close()
	eventually(t, "a tunnel is free", func() bool { return p.send("CONNECT", "web-1:"+port).code == 200 })
}

// TestMisdirected: what a balancer rewrote from absolute to origin form is never
// served as the proxy's own.
func TestMisdirected(t *testing.T) {
	t.Parallel()
	external, _ := url.Parse("https://culvert.example.net/base")
	p := newProxy(t, func(c *server.Config) { c.ExternalURL = external })
	newAgent(t, p, func(c *agent.Config) {
		c.Name = "web-1.example.net"
		c.Targets = []agent.Target{{Name: "node", URL: "http://127.0.0.1:1/"}}
		c.Hosts = []agent.Host{{Name: "db.lan"}, {Name: "*.example.net"}}
	})
	for _, c := range []struct {
		name, request string
		misdirected   bool
	}{
		{"agent", "GET /metrics HTTP/1.1\r\nHost: web-1.example.net:9100\r\n", true},
		{"agent, case and dot", "GET /metrics HTTP/1.1\r\nHost: WEB-1.example.net.:9100\r\n", true},
		{"agent without a port", "GET / HTTP/1.1\r\nHost: web-1.example.net\r\n", true},
		{"named target", "GET /metrics HTTP/1.1\r\nHost: node.web-1.example.net\r\n", true},
		{"the agent itself", "GET /metrics HTTP/1.1\r\nHost: agent.web-1.example.net\r\n", true},
		{"host", "GET /metrics HTTP/1.1\r\nHost: db.lan:9187\r\n", true},
		{"wildcard", "GET /metrics HTTP/1.1\r\nHost: x.example.net:9187\r\n", true},
		{"any path", "GET /clients HTTP/1.1\r\nHost: db.lan:9187\r\n", true},
		{"path mode", "GET /scrape/web-1.example.net/agent/metrics HTTP/1.1\r\nHost: db.lan:9187\r\n", true},
		{"any method", "DELETE /api/v1/agents/web-1.example.net HTTP/1.1\r\nHost: db.lan:9187\r\n", true},
		{"forwarded host", "GET /metrics HTTP/1.1\r\nHost: backend\r\nX-Forwarded-Host: db.lan:9187\r\n", true},
		{"HTTP/1.0 scrape", "GET /metrics HTTP/1.0\r\nHost: proxy\r\n" + timeoutHeader + "10\r\n", true},
		{"HTTP/1.0 scrape without Host", "GET /metrics HTTP/1.0\r\n" + timeoutHeader + "10\r\n", true},

		{"a scrape that nginx passed on", "GET /metrics HTTP/1.1\r\nHost: backend\r\nConnection: close\r\n" + timeoutHeader + "10\r\n", true},

		{"the proxy's address", "GET /metrics HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\n", false},
		{"a scrape of the proxy itself", "GET /metrics HTTP/1.1\r\nHost: proxy:8080\r\n" + timeoutHeader + "10\r\n", false},
		{"HTTP/1.0, no scrape", "GET /metrics HTTP/1.0\r\n", false},
		{"HTTP/1.0 of another path", "GET /clients HTTP/1.0\r\n" + timeoutHeader + "10\r\n", false},
		{"external URL within a wildcard", "GET /metrics HTTP/1.1\r\nHost: culvert.example.net\r\n", false},
		{"a scrape of the proxy on an agent's host", "GET /metrics HTTP/1.1\r\nHost: web-1.example.net:PORT\r\n" + timeoutHeader + "10\r\n", false},
		{"discovery within a wildcard", "GET /targets HTTP/1.1\r\nHost: proxy.example.net\r\n", false},
		{"a browser on the proxy's port of an agent's host", "GET /metrics HTTP/1.1\r\nHost: web-1.example.net:PORT\r\n", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, port, _ := net.SplitHostPort(p.addr)
			a := raw(t, p.addr, strings.ReplaceAll(c.request, "PORT", port)+"\r\n")
			if c.misdirected {
				a.refused(t, 421, protocol.CodeMisdirected)
			} else if a.code != 200 {
				t.Errorf("got %d %s", a.code, a.reason)
			}
		})
	}
}

// TestAgentListener: with an address of their own, agents are there alone.
func TestAgentListener(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.AgentListenAddresses = []string{"127.0.0.1:0"} })
	_, port := newTarget(t, nil)
	newAgent(t, p, allowAll)
	p.get("http://web-1:"+port+"/metrics").ok(t, "up 1")
	at := *p
	at.addr = p.AgentAddr()
	at.get("http://web-1:"+port+"/metrics").refused(t, 405, protocol.CodeMethod, "--web.listen-address")
	at.send("CONNECT", "web-1:"+port).refused(t, 405, protocol.CodeMethod)
	for _, path := range []string{"/metrics", "/clients", "/targets", "/", "/api/v1/agents", "/scrape/web-1/agent/metrics", "/-/ready"} {
		at.get(path).refused(t, 404, protocol.CodeNotFound)
	}
	at.send("DELETE", "/api/v1/agents/web-1").refused(t, 404, protocol.CodeNotFound)
	p.get("/tunnel", "Connection: Upgrade", "Upgrade: culvert/1", "Culvert-Agent: x", "Culvert-Instance: 1").
		refused(t, 404, protocol.CodeNotFound, "--agent.listen-address")
}

// TestTimeoutHeader: what the scraper allows, less the offset, within the limits.
func TestTimeoutHeader(t *testing.T) {
	t.Parallel()
	const byDefault, most = 130 * time.Millisecond, 230 * time.Millisecond
	p := newProxy(t, func(c *server.Config) {
		c.DefaultTimeout, c.MaxTimeout, c.TimeoutOffset = byDefault, most, 20*time.Millisecond
	})
	slow := newHang(t, "")
	newAgent(t, p, allowAll)
	for _, c := range []struct {
		value  string
		within string // as the refusal says it
	}{
		{"0.1", "80ms"},
		{" 0.1 ", "80ms"},
		{"1e-1", "80ms"},
		{"0.03", "15ms"}, // the offset leaves at least half
		{"0.000001", "0s"},
		{"10", "210ms"},
		{"missing", "130ms"},
		{"", "130ms"},
		{"abc", "130ms"},
		{"0", "130ms"},
		{"-1", "130ms"},
		{"NaN", "130ms"},
		{"-Inf", "130ms"},
		{"+Inf", "210ms"},
		{"1e300", "210ms"},
		{"1e999", "210ms"},
		{"9223372036.9", "210ms"},
	} {
		t.Run(c.value, func(t *testing.T) {
			t.Parallel()
			header := []string{timeoutHeader + c.value}
			if c.value == "missing" {
				header = nil
			}
			p.get("http://web-1:"+slow.port+"/metrics", header...).refused(t, 504, protocol.CodeTimeout, "within "+c.within+";")
		})
	}
	t.Run("the header reaches the target", func(t *testing.T) {
		got := make(chan string, 1)
		_, port := newTarget(t, func(_ http.ResponseWriter, r *http.Request) {
			got <- r.Header.Get("X-Prometheus-Scrape-Timeout-Seconds")
		})
		p.get("http://web-1:"+port+"/metrics", timeoutHeader+"0.2")
		if v := <-got; v != "0.2" {
			t.Errorf("got %q", v)
		}
	})
}

// TestStall: a target that stalls half way ends at the timeout as a broken
// transfer, and other scrapes of that agent go on meanwhile.
func TestStall(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	slow := newHang(t, "half")
	_, port := newTarget(t, nil)
	newAgent(t, p, allowAll)
	for _, version := range []string{"1.1", "1.0"} {
		conn := rawConn(t, p.addr)
		fmt.Fprintf(conn, "GET http://web-1:%s/metrics HTTP/%s\r\nHost: web-1\r\n%s1\r\n\r\n", slow.port, version, timeoutHeader)
		received(t, slow.started, "the slow scrape")
		p.get("http://web-1:"+port+"/metrics").ok(t, "up 1")
		a := readAnswer(bufio.NewReader(conn), "GET")
		if !isBroken(a.err) {
			t.Errorf("HTTP/%s: got %d %q and the error %v, want a broken transfer", version, a.code, a.body, a.err)
		}
		received(t, slow.ended, "the end of the request at the target")
		p.get("http://web-1:"+port+"/metrics").ok(t, "up 1")
	}
}

// TestSlowReader: a scraper that doesn't read holds up nobody else.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	_, port := newTarget(t, nil)
	started := make(chan struct{}, 4)
	_, big := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		started <- struct{}{}
		chunk := make([]byte, 1<<20)
		for range 64 {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	newAgent(t, p, allowAll)
	for range 4 {
		conn := rawConn(t, p.addr)
		conn.(*net.TCPConn).SetReadBuffer(4096)
		fmt.Fprintf(conn, "GET http://web-1:%s/ HTTP/1.1\r\nHost: x\r\n%s10\r\n\r\n", big, timeoutHeader)
		received(t, started, "the big scrape")
	}
	for range 20 {
		p.get("http://web-1:"+port+"/metrics", timeoutHeader+"5").ok(t, "up 1")
	}
}

// TestCancel: when the scraper goes away, the target sees it within a second.
func TestCancel(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	newAgent(t, p, allowAll)
	for name, head := range map[string]string{"before the head": "", "in mid-body": "half"} {
		slow := newHang(t, head)
		for _, request := range []string{
			"GET http://web-1:" + slow.port + "/ HTTP/1.1\r\nHost: x\r\n\r\n",
			"GET /scrape/web-1/" + slow.port + "/ HTTP/1.1\r\nHost: x\r\n\r\n",
			"CONNECT web-1:" + slow.port + " HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n",
		} {
			t.Run(name+" "+request[:4], func(t *testing.T) {
				conn := rawConn(t, p.addr)
				io.WriteString(conn, request)
				received(t, slow.started, "the scrape")
				conn.Close()
				select {
				case <-slow.ended:
				case <-time.After(time.Second):
					t.Error("the target did not see its request cancelled within a second")
				}
			})
		}
	}
}

// TestAgentKilled cuts the agent's connection while a response is on its way.
// Prometheus has to see a broken transfer, never a short success.
func TestAgentKilled(t *testing.T) {
	t.Parallel()
	withLength := func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "1000000")
		io.WriteString(w, "half\n")
		w.Write(make([]byte, 100_000)) // more than any buffer on the way
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}
	chunked := func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "half\n")
		http.NewResponseController(w).Flush()
		<-r.Context().Done()
	}
	untilClose := func(w http.ResponseWriter, r *http.Request) {
		conn, buffered, _ := http.NewResponseController(w).Hijack()
		io.WriteString(conn, "HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nhalf\n")
		io.Copy(io.Discard, buffered) // until the agent goes
		conn.Close()
	}
	for _, c := range []struct {
		name    string
		target  http.HandlerFunc
		request string
	}{
		{"length", withLength, "GET http://web-1:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"chunked", chunked, "GET http://web-1:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"until close", untilClose, "GET http://web-1:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"length, HTTP/1.0", withLength, "GET http://web-1:PORT/ HTTP/1.0\r\n\r\n"},
		{"chunked, HTTP/1.0", chunked, "GET http://web-1:PORT/ HTTP/1.0\r\n\r\n"},
		{"until close, HTTP/1.0", untilClose, "GET http://web-1:PORT/ HTTP/1.0\r\n\r\n"},
		{"chunked, HTTP/1.0, path mode", chunked, "GET /scrape/web-1/PORT/ HTTP/1.0\r\n\r\n"},
		{"chunked, path mode", chunked, "GET /scrape/web-1/PORT/ HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"CONNECT", untilClose, "CONNECT web-1:PORT HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"CONNECT over WebSocket", untilClose, "CONNECT web-1:PORT HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"chunked, HTTP/1.0, over WebSocket", chunked, "GET http://web-1:PORT/ HTTP/1.0\r\n\r\n"},
		{"CONNECT over TLS", untilClose, "CONNECT web-1:PORT HTTP/1.1\r\nHost: x\r\n\r\n"},
		{"chunked, HTTP/1.0, over TLS", chunked, "GET http://web-1:PORT/ HTTP/1.0\r\n\r\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			overTLS := strings.HasSuffix(c.name, "over TLS")
			p := newProxy(t, func(c *server.Config) {
				if overTLS {
					c.WebConfigFile, c.AgentListenAddresses = newCertificate(t), []string{"127.0.0.1:0"}
				}
			})
			r := newRelay(t, p)
			_, port := newTarget(t, c.target)
			proxyURL := r.url
			if strings.HasSuffix(c.name, "over WebSocket") {
				behind := *p
				behind.url = r.url
				proxyURL = newFront(t, &behind, stripUpgrade).URL
			}
			newAgent(t, p, func(c *agent.Config) {
				allowAll(c)
				c.ProxyURLs = []string{proxyURL}
			})
			conn := rawConn(t, p.addr)
			if overTLS {
				conn = tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
			}
			io.WriteString(conn, strings.ReplaceAll(c.request, "PORT", port))
			reader := bufio.NewReader(conn)
			method, _, _ := strings.Cut(c.request, " ")
			if method == "CONNECT" {
				if a := readAnswer(reader, "CONNECT"); a.code != 200 {
					t.Fatalf("CONNECT: %d %s", a.code, a.reason)
				}
				io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n")
			}
			for line := ""; line != "half\n"; {
				var err error
				if line, err = reader.ReadString('\n'); err != nil {
					t.Fatalf("before the cut: %v", err)
				}
			}
			r.cut()
			_, err := io.Copy(io.Discard, reader)
			if strings.Contains(c.request, "HTTP/1.0") || method == "CONNECT" {
				// Here the end of the connection is the only end mark there is.
				if !errors.Is(err, syscall.ECONNRESET) && !(overTLS && isBroken(err)) {
					t.Errorf("the connection ended with %v, want a reset", err)
				}
				return
			}
			if err != nil && !isBroken(err) {
				t.Errorf("the transfer did not end: %v", err)
			}
		})
	}
	// What an HTTP/1.1 client makes of it.
	for name, target := range map[string]http.HandlerFunc{"length": withLength, "chunked": chunked, "until close": untilClose} {
		t.Run("client, "+name, func(t *testing.T) {
			t.Parallel()
			p := newProxy(t, nil)
			r := newRelay(t, p)
			_, port := newTarget(t, target)
			newAgent(t, p, func(c *agent.Config) {
				allowAll(c)
				c.ProxyURLs = []string{r.url}
			})
			conn := rawConn(t, p.addr)
			fmt.Fprintf(conn, "GET http://web-1:%s/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(resp.Body, make([]byte, 5)); err != nil {
				t.Fatal(err)
			}
			r.cut()
			if _, err := io.ReadAll(resp.Body); !isBroken(err) {
				t.Errorf("the response ended with %v, want a broken transfer", err)
			}
		})
	}
}

// TestAgentKilledBeforeHead: a scrape without side effects gets a second try with
// the next session; one with side effects doesn't.
func TestAgentKilledBeforeHead(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.ReconnectWait = patience })
	r := newRelay(t, p)
	requests := make(chan string, 8)
	hold := make(chan struct{})
	_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		requests <- r.Method
		select {
		case <-hold:
			fmt.Fprint(w, "up 1")
		case <-r.Context().Done():
		}
	})
	newAgent(t, p, func(c *agent.Config) {
		allowAll(c)
		c.ProxyURLs = []string{r.url}
	})
	done := make(chan answer, 2)
	go func() { done <- p.get("http://web-1:" + port + "/") }()
	received(t, requests, "the first try")
	r.drop()
	received(t, requests, "the second try")
	close(hold)
	received(t, done, "the answer").ok(t, "up 1")

	hold = make(chan struct{})
	go func() { done <- p.send("POST", "http://web-1:"+port+"/") }()
	received(t, requests, "the POST")
	r.drop()
	received(t, done, "the answer to the POST").refused(t, 502, protocol.CodeSessionLost)
	select {
	case <-requests:
		t.Error("a POST was tried twice")
	default:
	}
}

// TestTargetBreaks: a target that ends a response too early is a broken transfer.
func TestTargetBreaks(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	newAgent(t, p, allowAll)
	for name, response := range map[string]string{
		"short of its length": "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
		"chunked":             "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
	} {
		_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
			conn, _, _ := http.NewResponseController(w).Hijack()
			io.WriteString(conn, response)
			conn.Close()
		})
		for _, version := range []string{"1.1", "1.0"} {
			t.Run(name+", HTTP/"+version, func(t *testing.T) {
				a := raw(t, p.addr, "GET http://web-1:"+port+"/ HTTP/"+version+"\r\nHost: x\r\n\r\n")
				if !isBroken(a.err) && a.code != 502 {
					t.Errorf("got %d %q and the error %v, want a broken transfer or 502", a.code, a.body, a.err)
				}
				if code := a.header.Get("Culvert-Error"); code == string(protocol.CodeSessionLost) {
					t.Errorf("the target broke off, and the session is blamed: %s", a.reason)
				}
			})
		}
	}
	t.Run("no answer at all", func(t *testing.T) {
		_, port := newTarget(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
		p.get("http://web-1:"+port+"/").refused(t, 502, protocol.CodeTargetUnreachable)
	})
	t.Run("no HTTP", func(t *testing.T) {
		_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
			conn, _, _ := http.NewResponseController(w).Hijack()
			io.WriteString(conn, "SSH-2.0-OpenSSH\r\n")
			conn.Close()
		})
		p.get("http://web-1:"+port+"/").refused(t, 502, protocol.CodeTargetUnreachable)
	})
	t.Run("switches protocols", func(t *testing.T) {
		_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
			conn, _, _ := http.NewResponseController(w).Hijack()
			io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
			conn.Close()
		})
		p.get("http://web-1:"+port+"/", "Connection: Upgrade", "Upgrade: x").refused(t, 502, protocol.CodeTargetUnreachable)
	})
}

// fakeAgent registers and answers every scrape with the bytes: an agent as it
// should not be.
func fakeAgent(t *testing.T, p *testProxy, name string, respond func(net.Conn, *http.Request)) *protocol.Session {
	t.Helper()
	s := register(t, p, name, "1", protocol.Registration{})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := s.Accept(ctx)
			if err != nil {
				return
			}
			r, err := http.ReadRequest(bufio.NewReader(conn))
			if err != nil {
				conn.Close()
				continue
			}
			respond(conn, r)
		}
	}()
	t.Cleanup(func() { cancel(); <-done })
	return s
}

// TestBadAgent: what a broken or evil agent sends does no harm.
func TestBadAgent(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	var response atomic.Value
	session := fakeAgent(t, p, "evil", func(conn net.Conn, _ *http.Request) {
		io.WriteString(conn, response.Load().(string))
		conn.Close()
	})
	for _, c := range []struct {
		name, response string
		status         int
		code           protocol.Code
	}{
		{"no length, not chunked", "HTTP/1.1 200 OK\r\n\r\nup 1\n", 502, protocol.CodeBadResponse},
		{"HTTP/1.0", "HTTP/1.0 200 OK\r\n\r\nup 1\n", 502, protocol.CodeBadResponse},
		{"no HTTP", "garbage\r\n\r\n", 502, ""},
		{"nothing", "", 502, ""},
		{"101", "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", 502, protocol.CodeBadResponse},
	} {
		t.Run(c.name, func(t *testing.T) {
			response.Store(c.response)
			for _, target := range []string{"http://evil:1/", "/scrape/evil/1/"} {
				a := p.get(target)
				if a.err != nil || a.code != c.status || a.header.Get("Culvert-Error") == "" {
					t.Errorf("%s: got %d %q (%s), %v", target, a.code, a.reason, a.header.Get("Culvert-Error"), a.err)
				}
				if c.code != "" {
					a.refused(t, c.status, c.code)
				}
			}
		})
	}
	t.Run("CONNECT with an odd answer", func(t *testing.T) {
		response.Store("HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n")
		p.send("CONNECT", "evil:1").refused(t, 502, protocol.CodeBadResponse)
	})
	t.Run("a line break in the refusal", func(t *testing.T) {
		response.Store("HTTP/1.1 403 Forbidden\r\nCulvert-Error: not-allowed\r\nContent-Length: 30\r\n\r\nno\rX-Injected: 1\u00e9\x00" + strings.Repeat(" ", 11))
		a := p.get("http://evil:1/")
		if a.code != 403 || a.header.Get("X-Injected") != "" || printable(a.reason) != a.reason {
			t.Errorf("got %d %q %v", a.code, a.reason, a.header)
		}
	})
	t.Run("invented reasons don't make series", func(t *testing.T) {
		for i := range 50 {
			response.Store(fmt.Sprintf("HTTP/1.1 403 Forbidden\r\nCulvert-Error: invented-%d\r\nContent-Length: 2\r\n\r\nno", i))
			p.get("http://evil:1/")
		}
		a := p.get("/metrics")
		if n := strings.Count(a.body, "invented-"); n > 1 {
			t.Errorf("an agent made %d series of the proxy's own metrics", n)
		}
	})
	if session.Err() != nil {
		t.Errorf("the session ended: %v", session.Err())
	}
}

// TestManyScrapes runs scrapes of all kinds at the same time.
func TestManyScrapes(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.Fleet.MaxScrapes = 100 })
	text := strings.Repeat("some_metric{label=\"value\"} 1\n", 4000)
	_, port := newTarget(t, say(text))
	newAgent(t, p, allowAll)
	done := make(chan answer, 100)
	for i := range cap(done) {
		target := "http://web-1:" + port + "/metrics"
		if i%4 == 0 {
			target = "/scrape/web-1/" + port + "/metrics"
		}
		go func() { done <- p.get(target) }()
	}
	for range cap(done) {
		if a := <-done; a.err != nil || a.code != 200 || a.body != text {
			t.Fatalf("got %d %s with %d bytes, %v", a.code, a.reason, len(a.body), a.err)
		}
	}
}

// TestKeepAlive: a scraper's connection is used again, as Prometheus does.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	_, port := newTarget(t, nil)
	newAgent(t, p, allowAll)
	conn := rawConn(t, p.addr)
	r := bufio.NewReader(conn)
	for range 5 {
		fmt.Fprintf(conn, "GET http://web-1:%s/metrics HTTP/1.1\r\nHost: x\r\n\r\n", port)
		readAnswer(r, "GET").ok(t, "up 1")
		fmt.Fprintf(conn, "HEAD http://web-1:%s/metrics HTTP/1.1\r\nHost: x\r\n\r\n", port)
		readAnswer(r, "HEAD").ok(t, "")
	}
}

// TestPageIsSafe: what agents say of themselves is text on the page for people.
func TestPageIsSafe(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	const evil = `<script>alert("1")</script>`
	s := register(t, p, "web-1", "1", protocol.Registration{
		Version: evil, Capabilities: []string{evil}, Labels: map[string]string{"a": evil},
		Targets: []protocol.Target{{Name: "node", Path: "/" + evil, Params: map[string][]string{evil: {evil}}, Labels: map[string]string{"b": evil}}},
	})
	for range 2 {
		a := p.get("/")
		a.ok(t, "web-1")
		if strings.Contains(a.body, "<script>alert") {
			t.Errorf("the page runs an agent's script: %s", a.body)
		}
		if err := s.SendDrain(t.Context(), protocol.Drain{Reason: evil}); err != nil {
			t.Fatal(err)
		}
	}
}
