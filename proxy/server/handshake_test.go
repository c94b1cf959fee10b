package server_test

import (
	"bufio"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

const upgrade = "Connection: Upgrade\r\nUpgrade: culvert/1\r\nCulvert-Agent: web-1\r\nCulvert-Instance: 0aF-1\r\n"

// TestHandshake is the table of answers to the upgrade, on the wire.
func TestHandshake(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	webSocket := "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" +
		"Culvert-Agent: web-1\r\nCulvert-Instance: 1\r\n"
	with := func(old, new string) string { return strings.Replace(upgrade, old, new, 1) }
	for _, c := range []struct {
		name, header string
		status       int
		code         protocol.Code
		words        []string
	}{
		{"welcome", upgrade, 101, "", nil},
		{"tokens in any case", with("Upgrade: culvert/1", "Upgrade: CULVERT/1"), 101, "", nil},
		{"several tokens", with("Connection: Upgrade\r\nUpgrade: culvert/1", "Connection: keep-alive, upgrade\r\nUpgrade: x/1, culvert/1"), 101, "", nil},
		{"name in another form", with("Culvert-Agent: web-1", "Culvert-Agent: WEB-1.Example.NET."), 101, "", nil},
		{"WebSocket", webSocket + "Sec-WebSocket-Protocol: culvert.v1\r\n", 101, "", nil},

		{"no upgrade at all", with("Connection: Upgrade\r\nUpgrade: culvert/1\r\n", ""), 400, protocol.CodeNoUpgrade, []string{"proxy_set_header Upgrade $http_upgrade", "proxy_http_version 1.1", "Connection \"upgrade\""}},
		{"Upgrade lost", with("Upgrade: culvert/1\r\n", ""), 400, protocol.CodeNoUpgrade, []string{"nginx"}},
		{"Connection lost", with("Connection: Upgrade\r\n", ""), 400, protocol.CodeNoUpgrade, nil},
		{"Connection replaced", with("Connection: Upgrade", "Connection: close"), 400, protocol.CodeNoUpgrade, nil},
		{"Upgrade replaced", with("culvert/1", "h2c"), 400, protocol.CodeNoUpgrade, []string{"h2c"}},
		{"Upgrade replaced by websocket", with("culvert/1", "websocket"), 400, protocol.CodeNoUpgrade, []string{"websocket"}},

		{"another version", with("culvert/1", "culvert/9"), 426, protocol.CodeVersion, []string{"culvert/1", "culvert/9"}},
		{"another version over WebSocket", webSocket + "Sec-WebSocket-Protocol: culvert.v9\r\n", 426, protocol.CodeVersion, []string{"culvert.v1", "culvert.v9"}},
		{"WebSocket without a subprotocol", webSocket, 426, protocol.CodeVersion, nil},

		{"no name", with("Culvert-Agent: web-1\r\n", ""), 400, protocol.CodeInvalid, []string{"Culvert-Agent", "empty"}},
		{"blank in the name", with("web-1", "web 1"), 400, protocol.CodeInvalid, []string{"Culvert-Agent"}},
		{"slash in the name", with("web-1", "web/1"), 400, protocol.CodeInvalid, nil},
		{"port in the name", with("web-1", "web-1:9100"), 400, protocol.CodeInvalid, nil},
		{"wildcard as the name", with("web-1", "*.lan"), 400, protocol.CodeInvalid, nil},
		{"empty label", with("web-1", "web..1"), 400, protocol.CodeInvalid, nil},
		{"two dots at the end", with("web-1", "web-1.."), 400, protocol.CodeInvalid, nil},
		{"dash in front", with("web-1", "-web"), 400, protocol.CodeInvalid, nil},
		{"not ASCII", with("web-1", "caf\xc3\xa9"), 400, protocol.CodeInvalid, []string{"xn--"}},
		{"long label", with("web-1", strings.Repeat("a", 64)), 400, protocol.CodeInvalid, nil},
		{"long name", with("web-1", strings.Repeat("a.", 127)+"a"), 400, protocol.CodeInvalid, nil},
		{"no instance", with("Culvert-Instance: 0aF-1\r\n", ""), 400, protocol.CodeInvalid, []string{"Culvert-Instance"}},
		{"instance of other characters", with("0aF-1", "xyz"), 400, protocol.CodeInvalid, []string{"Culvert-Instance"}},
		{"long instance", with("0aF-1", strings.Repeat("a", 65)), 400, protocol.CodeInvalid, []string{"Culvert-Instance"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := rawConn(t, p.addr)
			fmt.Fprintf(conn, "GET /tunnel HTTP/1.1\r\nHost: x\r\n%s\r\n", c.header)
			r := bufio.NewReader(conn)
			if c.status == 101 {
				head := readAnswer(r, "GET")
				if head.code != 101 || head.header.Get("Culvert-Proxy") == "" || !strings.EqualFold(head.header.Get("Connection"), "upgrade") {
					t.Errorf("got %d %s %v", head.code, head.reason, head.header)
				}
				want := "culvert/1"
				if strings.HasPrefix(c.name, "WebSocket") {
					want = "websocket"
					if v := head.header.Get("Sec-WebSocket-Protocol"); v != "culvert.v1" {
						t.Errorf("subprotocol %q", v)
					}
				}
				if v := head.header.Get("Upgrade"); !strings.EqualFold(v, want) {
					t.Errorf("Upgrade: %q, want %q", v, want)
				}
				return
			}
			a := readAnswer(r, "GET")
			a.refused(t, c.status, c.code, c.words...)
			if c.status == 426 {
				if v := a.header.Get("Upgrade"); v != "culvert/1" {
					t.Errorf("Upgrade: %q", v)
				}
				if v := a.header.Get("Connection"); !strings.EqualFold(v, "upgrade") {
					t.Errorf("Connection: %q", v)
				}
			}
		})
	}
	t.Run("another method", func(t *testing.T) {
		raw(t, p.addr, "POST /tunnel HTTP/1.1\r\nHost: x\r\n"+upgrade+"\r\n").refused(t, 405, protocol.CodeMethod)
	})
	t.Run("HTTP/1.0", func(t *testing.T) {
		// Upgrade is ignored in HTTP/1.0 (RFC 9110, section 7.8); nginx's default.
		a := raw(t, p.addr, "GET /tunnel HTTP/1.0\r\nHost: x\r\nConnection: close\r\n\r\n")
		a.refused(t, 400, protocol.CodeNoUpgrade, "nginx")
	})
	t.Run("the ID is that of the process", func(t *testing.T) {
		a, b := dial(t, p, "x", "1"), dial(t, p, "y", "2")
		other := dial(t, newProxy(t, nil), "x", "1")
		if a.Proxy == "" || a.Proxy != b.Proxy || a.Proxy == other.Proxy {
			t.Errorf("IDs %q, %q and of another proxy %q", a.Proxy, b.Proxy, other.Proxy)
		}
	})
	t.Run("no API shows an instance", func(t *testing.T) {
		const instance = "abcdef0123456789"
		register(t, p, "secretive", instance, protocol.Registration{})
		for _, path := range []string{"/api/v1/agents", "/api/v1/agents/secretive", "/clients", "/targets", "/metrics", "/"} {
			if a := p.get(path); a.code != 200 || strings.Contains(a.body, instance) {
				t.Errorf("%s: %d, shows the instance: %v", path, a.code, strings.Contains(a.body, instance))
			}
		}
	})
}

// TestHandshakeLimit: more handshakes than Config.MaxHandshakes are told to come
// back; a registration makes room.
func TestHandshakeLimit(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.MaxHandshakes = 1 })
	pending := dial(t, p, "slow", "1")
	a := raw(t, p.addr, "GET /tunnel HTTP/1.1\r\nHost: x\r\n"+upgrade+"\r\n")
	a.refused(t, 429, protocol.CodeBusy)
	if v := a.header.Get("Retry-After"); v != "2" {
		t.Errorf("Retry-After: %q", v)
	}
	waiting := startAgent(t, p, nil)
	waiting.logs.wait(t, "Not connected", "busy")
	if err := pending.Register(t.Context(), &protocol.Registration{}); err != nil {
		t.Fatal(err)
	}
	dial(t, p, "next", "2").Close() // a session that ends makes room as well
	waiting.logs.wait(t, "msg=Connected")
}

// TestHandshakeWhileDraining: 503 with Retry-After.
func TestHandshakeWhileDraining(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.ShutdownTimeout = patience })
	slow := newHang(t, "half")
	agent := newAgent(t, p, allowAll)
	conn := rawConn(t, p.addr) // a running scrape, and so the proxy drains for a while
	fmt.Fprintf(conn, "GET http://web-1:%s/ HTTP/1.1\r\nHost: x\r\n\r\n", slow.port)
	received(t, slow.started, "the scrape")
	stopped := make(chan struct{})
	go func() { p.stop(); close(stopped) }()
	agent.logs.wait(t, "The proxy drains this session")
	for path, want := range map[string]protocol.Code{"/tunnel": protocol.CodeDraining, "/-/ready": ""} {
		late, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Errorf("%s while draining: %v", path, err)
			continue
		}
		fmt.Fprintf(late, "GET %s HTTP/1.1\r\nHost: x\r\n%s\r\n", path, upgrade)
		late.SetDeadline(time.Now().Add(patience))
		a := readAnswer(bufio.NewReader(late), "GET")
		late.Close()
		if a.code != 503 || a.header.Get("Culvert-Error") != string(want) {
			t.Errorf("%s while draining: got %d %s, %v", path, a.code, a.reason, a.err)
		}
		if v := a.header.Get("Retry-After"); want != "" && v != "2" {
			t.Errorf("Retry-After: %q", v)
		}
	}
	conn.Close()
	received(t, stopped, "the end of the proxy")
}

// TestWebSocketCarriesScrapes: all works over the fallback too.
func TestWebSocketCarriesScrapes(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	text := strings.Repeat("some_metric{label=\"value\"} 1\n", 20_000)
	_, port := newTarget(t, say(text))
	f := newFront(t, p, stripUpgrade)
	newAgent(t, p, func(c *agent.Config) { allowAll(c); c.ProxyURLs = []string{f.URL} })
	for range 3 {
		if a := p.get("http://web-1:" + port + "/metrics"); a.code != 200 || a.body != text {
			t.Errorf("got %d with %d bytes, %v", a.code, len(a.body), a.err)
		}
	}
	p.get("/api/v1/agents/web-1").ok(t, `"transport":"websocket"`)
	p.send("CONNECT", "web-1:"+port).ok(t, "")
}

// TestPendingSessionEnds: a session that ends without a registration makes room.
func TestPendingSessionEnds(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.MaxHandshakes = 1 })
	dial(t, p, "a", "1").Close()
	eventually(t, "a place is free", func() bool {
		s, err := tryDial(p, "b", "2")
		if err == nil {
			s.Close()
		}
		return err == nil
	})
}

// TestDeadSession: an agent whose network went silent is lost after DeadAfter.
func TestDeadSession(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.Session.DeadAfter = 300 * time.Millisecond })
	r := newRelay(t, p)
	a := newAgent(t, p, func(c *agent.Config) {
		c.ProxyURLs = []string{r.url}
		c.Session.PingInterval, c.Session.DeadAfter = 50*time.Millisecond, 300*time.Millisecond
	})
	eventually(t, "a ping", func() bool {
		return strings.Contains(p.get("http://agent.web-1/metrics").body, "culvert_client_session_rtt_seconds")
	})
	r.freeze()
	p.logs.wait(t, "Agent lost", "nothing was heard")
	a.logs.wait(t, "Session lost", "nothing was heard")
	p.get("http://agent.web-1/metrics").refused(t, 503, protocol.CodeAgentOffline, "nothing was heard")
}
