package server_test

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

// long bounds the wait for the end of what has a time limit.
const long = time.Minute

// frontDoors starts a proxy with a listener for agents, once plain and once with TLS, and
// tells how to reach each listener.
func frontDoors(t *testing.T, tweak func(*server.Config)) map[string]func(*testing.T) net.Conn {
	doors := map[string]func(*testing.T) net.Conn{}
	ca := newCA(t)
	for _, secured := range []bool{false, true} {
		p := newProxy(t, func(c *server.Config) {
			c.AgentListenAddresses = []string{"127.0.0.1:0"}
			if secured {
				c.WebConfigFile = ca.webConfig("VerifyClientCertIfGiven")
				c.AgentWebConfigFile = c.WebConfigFile
			}
			c.Logger = slog.New(slog.DiscardHandler)
			if tweak != nil {
				tweak(c)
			}
		})
		for name, addr := range map[string]string{"main": p.addr, "agents": p.AgentAddr()} {
			if secured {
				name += ", TLS"
			}
			doors[name] = func(t *testing.T) net.Conn {
				t.Helper()
				conn := rawConn(t, addr)
				conn.SetDeadline(time.Now().Add(long))
				if secured {
					conn = tls.Client(conn, &tls.Config{RootCAs: ca.pool, ServerName: "localhost"})
				}
				return conn
			}
		}
	}
	return doors
}

// ends waits until the proxy has ended the connection.
func ends(t *testing.T, what string, conn net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, conn); err != nil && !isBroken(err) {
		t.Errorf("%s: the connection is still open: %v", what, err)
	}
}

// TestSlowBodies: a body that never comes holds no connection, whether a route wants it
// or not.
func TestSlowBodies(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	doors := frontDoors(t, func(c *server.Config) { c.ConfigFile = file.path })
	const rest = " HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
	root, prom := "Authorization: "+basic("root", "secret")+"\r\n", "Proxy-Authorization: "+basic("prom", "secret")+"\r\n"
	var answers sync.WaitGroup // each takes seconds
	defer answers.Wait()
	for name, door := range doors {
		for what, head := range map[string]string{
			"401":               "PUT /metrics/job/x" + rest,
			"404":               "PUT /nowhere" + rest + root,
			"407":               "POST http://web-1/" + rest,
			"unknown agent":     "POST http://web-1/" + rest + prom,
			"a GET":             "GET /clients" + rest + root,
			"a long answer":     "GET /metrics" + rest + root,
			"DELETE":            "DELETE /metrics/job/x" + rest + root,
			"a bad path":        "PUT /metrics/job/x/y" + rest + root,
			"reload":            "POST /-/reload" + rest + root,
			"path mode":         "GET /scrape/web-1/agent/metrics" + rest + root,
			"tunnel":            "GET /tunnel" + rest + upgrade,
			"chunked":           "PUT /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + root,
			"half a chunk":      "PUT /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n" + root + "\r\n100\r\nx",
			"tunnel, WebSocket": "GET /tunnel" + rest + "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: culvert.v1\r\nCulvert-Agent: web-1\r\nCulvert-Instance: 1\r\n",
		} {
			conn := door(t)
			if !strings.Contains(head, "\r\n\r\n") {
				head += "\r\n"
			}
			answers.Go(func() {
				what := name + ", " + what
				io.WriteString(conn, head)
				method, _, _ := strings.Cut(head, " ")
				if a := readAnswer(bufio.NewReader(conn), method); a.err != nil || a.code == 101 {
					t.Errorf("%s: got %d %s, %v", what, a.code, a.reason, a.err)
				}
				ends(t, what, conn)
			})
		}
	}
}

// TestSlowBodyInTunnel: the same, on the streams of an agent.
func TestSlowBodyInTunnel(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	s := register(t, p, "web-1", "1", protocol.Registration{})
	const rest = " HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
	var streams []net.Conn
	for _, head := range []string{"PUT /v1/registration" + rest, "POST /v1/drain" + rest, "PUT /v1/nothing" + rest, "PUT /metrics/job/x/y" + rest, "GET http://x/" + rest, "G"} {
		stream, err := s.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		stream.SetDeadline(time.Now().Add(long))
		io.WriteString(stream, head)
		streams = append(streams, stream)
	}
	for _, stream := range streams {
		ends(t, "a stream", stream)
	}
	if _, err := s.Ping(t.Context()); err != nil {
		t.Errorf("the session is gone: %v", err)
	}
}

// TestUnreadAnswers: who sends requests and reads no answer is cut off.
func TestUnreadAnswers(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	var answers sync.WaitGroup
	defer answers.Wait()
	for name, door := range frontDoors(t, func(c *server.Config) { c.ConfigFile = file.path }) {
		conn := door(t)
		answers.Go(func() {
			requests := []byte(strings.Repeat("PUT /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx", 1000))
			for {
				if _, err := conn.Write(requests); err != nil {
					if !isBroken(err) {
						t.Errorf("%s: the connection is still open: %v", name, err)
					}
					return
				}
			}
		})
	}
}

// TestLargeHeads: 431, and in the tunnel too.
func TestLargeHeads(t *testing.T) {
	t.Parallel()
	head := "GET /tunnel HTTP/1.1\r\nHost: x\r\nX-A: " + strings.Repeat("a", 70<<10)
	check := func(t *testing.T, conn net.Conn) {
		t.Helper()
		go io.WriteString(conn, head+"\r\n\r\n")
		if a := readAnswer(bufio.NewReader(conn), "GET"); a.code != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("got %d %s, %v", a.code, a.reason, a.err)
		}
	}
	for name, door := range frontDoors(t, nil) {
		t.Run(name, func(t *testing.T) { check(t, door(t)) })
	}
	t.Run("in the tunnel", func(t *testing.T) {
		s := dial(t, newProxy(t, nil), "web-1", "1")
		stream, err := s.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		stream.SetDeadline(time.Now().Add(patience))
		check(t, stream)
	})
}

// TestHalfOpen: connections that never become more take nothing from scrapes and agents,
// and are closed: silent ones, half a TLS handshake, half a head that goes on and on, and
// sessions that never register, a thousand in all.
func TestHalfOpen(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	web := ca.webConfig("VerifyClientCertIfGiven")
	p := newProxy(t, func(c *server.Config) {
		c.AgentListenAddresses, c.MaxHandshakes = []string{"127.0.0.1:0"}, 100
		c.WebConfigFile, c.AgentWebConfigFile = web, web
	})
	client := &tls.Config{RootCAs: ca.pool, ServerName: "localhost"}
	_, port := newTarget(t, nil)
	connect := func(name string) *testAgent {
		return startAgent(t, p, func(c *agent.Config) {
			allowAll(c)
			c.Name, c.ProxyURLs, c.TLS = name, []string{"https://" + p.AgentAddr()}, client
		})
	}
	scrape := func(name string) {
		t.Helper()
		conn := tls.Client(rawConn(t, p.addr), client)
		defer conn.Close()
		fmt.Fprintf(conn, "GET http://%s:%s/metrics HTTP/1.1\r\nHost: x\r\n\r\n", name, port)
		readAnswer(bufio.NewReader(conn), "GET").ok(t, "up 1")
	}
	connect("before").logs.wait(t, "msg=Connected")

	var dripping sync.WaitGroup
	stop := make(chan struct{})
	t.Cleanup(func() { close(stop); dripping.Wait() })
	var conns []net.Conn
	for i := range 1000 {
		addr := []string{p.addr, p.AgentAddr()}[i%2]
		if i%10 == 9 {
			addr = p.AgentAddr()
		}
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(long))
		conns = append(conns, conn)
		secured := tls.Client(conn, client)
		switch {
		case i%10 < 4: // silent
		case i%10 < 6: // half a ClientHello
			io.WriteString(conn, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
		case i%10 < 9 && i < 200: // a head that goes on and on
			io.WriteString(secured, "GET /tunnel HTTP/1.1\r\n")
			dripping.Go(func() {
				tick := time.NewTicker(500 * time.Millisecond)
				defer tick.Stop()
				for {
					select {
					case <-stop:
						return
					case <-tick.C:
						if _, err := io.WriteString(secured, "X-A: a\r\n"); err != nil {
							return
						}
					}
				}
			})
		case i%10 < 9:
			io.WriteString(secured, "G")
		default: // a session without a registration, or the refusal of one too many
			fmt.Fprintf(secured, "GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: culvert/1\r\nCulvert-Agent: half-%d\r\nCulvert-Instance: 1\r\n\r\n", i)
		}
	}
	scrape("before")
	after := connect("after")
	within(t, long, "an agent takes a place", func() bool { return after.logs.count("msg=Connected") > 0 })
	scrape("after")
	for _, conn := range conns {
		ends(t, "half open", conn)
	}
	scrape("before")
	within(t, long, "all places are free", func() bool {
		conn := tls.Client(rawConn(t, p.addr), client)
		defer conn.Close()
		io.WriteString(conn, "GET /metrics?only=self HTTP/1.1\r\nHost: x\r\n\r\n")
		return strings.Contains(readAnswer(bufio.NewReader(conn), "GET").body, "\nculvert_proxy_handshakes_pending 0\n")
	})
}

// TestPlaces: who opens sessions and registers none keeps those from other addresses out
// not at all, and those from its own for a while.
func TestPlaces(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) {
		c.MaxHandshakes, c.TrustedProxies = 4, []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
	})
	open := func(name, from string) (*protocol.Session, error) {
		d := &protocol.Dialer{ProxyURL: mustParse(t, p.url), Agent: name, Instance: "1", Header: http.Header{"X-Forwarded-For": {from}}}
		return d.Dial(t.Context())
	}
	var silent []*protocol.Session
	for i := range 4 {
		s, err := open(fmt.Sprint("silent-", i), "192.0.2.1")
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		silent = append(silent, s)
	}
	_, err := open("same", "192.0.2.1")
	wantRefusal(t, err, 429, protocol.CodeBusy, "4 agents are in their handshakes")
	// A handshake is a session a moment after its answer, and can be displaced from then on.
	var other *protocol.Session
	eventually(t, "a place for another address", func() bool {
		other, err = open("other", "192.0.2.2")
		return err == nil
	})
	defer other.Close()
	eventually(t, "one was displaced", func() bool {
		return slices.ContainsFunc(silent, func(s *protocol.Session) bool { return s.Err() != nil })
	})
	if err := other.Register(t.Context(), &protocol.Registration{}); err != nil {
		t.Fatal(err)
	}
	within(t, long, "places are free after a while", func() bool {
		s, err := open("same", "192.0.2.1")
		if err == nil {
			defer s.Close()
			err = s.Register(t.Context(), &protocol.Registration{})
		}
		return err == nil
	})
	for _, s := range silent {
		s.Close()
	}
	eventually(t, "nothing is pending", func() bool {
		return strings.Contains(p.get("/metrics?only=self").body, "\nculvert_proxy_handshakes_pending 0\n")
	})
}

// TestSessionsOfOneName: one agent has a few sessions, and not those of everybody.
func TestSessionsOfOneName(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.MaxTimeout = time.Millisecond })
	var sessions []*protocol.Session
	for i := range 16 {
		s := dial(t, p, "web-1", "1")
		sessions = append(sessions, s)
		if i < 8 { // they stay beside the next ones
			if err := s.Register(t.Context(), &protocol.Registration{}); err != nil {
				t.Fatal(err)
			}
			if err := s.SendDrain(t.Context(), protocol.Drain{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	_, err := tryDial(p, "web-1", "1")
	wantRefusal(t, err, 429, protocol.CodeBusy, `16 sessions of agent "web-1"`)
	dial(t, p, "web-2", "1").Close()
	sessions[15].Close()
	eventually(t, "there is room", func() bool {
		s, err := tryDial(p, "web-1", "1")
		if err == nil {
			s.Close()
		}
		return err == nil
	})
	for _, s := range sessions[:8] {
		select {
		case <-s.Done():
		case <-time.After(long):
			t.Fatal("a session that its agent drained is still open")
		}
	}
}

// TestFullFleet: an agent of a new name is told why it finds no room, and comes in when
// there is some.
func TestFullFleet(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.Fleet.MaxKnown = 1 })
	register(t, p, "first", "1", protocol.Registration{})
	late := dial(t, p, "late", "2")
	status, code, text := control(t, late, "PUT", protocol.PathRegistration, strings.NewReader("{}"))
	if status != 503 || code != string(protocol.CodeUnavailable) || !strings.Contains(text, "--agent.max-known") {
		t.Errorf("got %d %s %s", status, code, text)
	}
	if a := p.send("DELETE", "/api/v1/agents/first"); a.code != 204 {
		t.Fatalf("got %d", a.code)
	}
	if err := late.Register(t.Context(), &protocol.Registration{}); err != nil {
		t.Error(err)
	}
}
