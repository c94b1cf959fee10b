package server_test

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

// TestProxyStops: a running scrape finishes, new work is refused, agents are told.
func TestProxyStops(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.ShutdownTimeout = patience })
	release := make(chan struct{})
	started := make(chan struct{}, 2)
	_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "first half, ")
		http.NewResponseController(w).Flush()
		started <- struct{}{}
		<-release
		io.WriteString(w, "second half")
	})
	a := newAgent(t, p, allowAll)
	done := make(chan answer, 2)
	go func() { done <- p.get("http://web-1:" + port + "/") }()
	conn := rawConn(t, p.addr)
	fmt.Fprintf(conn, "CONNECT web-1:%s HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", port)
	go func() {
		r := bufio.NewReader(conn)
		if a := readAnswer(r, "CONNECT"); a.code != 200 {
			done <- a
			return
		}
		done <- readAnswer(r, "GET")
		conn.Close()
	}()
	received(t, started, "the scrape")
	received(t, started, "the scrape through CONNECT")
	stopped := make(chan struct{})
	go func() { p.stop(); close(stopped) }()
	a.logs.wait(t, "The proxy drains this session", "reason=shutdown")
	close(release)
	for range 2 {
		received(t, done, "the running scrape").ok(t, "first half, second half")
	}
	received(t, stopped, "the end of the proxy")
}

// TestProxyStopsInTime: a scraper that leaves its end of a CONNECT tunnel open
// does not hold up the end of the proxy beyond Config.ShutdownTimeout.
func TestProxyStopsInTime(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.ShutdownTimeout = time.Second })
	_, port := newTarget(t, nil)
	newAgent(t, p, allowAll)
	conn := rawConn(t, p.addr)
	fmt.Fprintf(conn, "CONNECT web-1:%s HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", port)
	r := bufio.NewReader(conn)
	readAnswer(r, "CONNECT")
	readAnswer(r, "GET").ok(t, "up 1")
	if _, err := r.ReadByte(); err != io.EOF {
		t.Fatalf("the target closed its end, and the scraper sees %v", err)
	}
	stopped := make(chan struct{})
	go func() { p.stop(); close(stopped) }()
	received(t, stopped, "the end of the proxy")
}

// TestAgentStops: a running scrape finishes, through CONNECT as well, and the
// proxy says at once that the agent has gone.
func TestAgentStops(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"GET", "CONNECT"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			p := newProxy(t, nil)
			release := make(chan struct{})
			started := make(chan struct{}, 1)
			_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
				io.WriteString(w, "first half, ")
				http.NewResponseController(w).Flush()
				started <- struct{}{}
				<-release
				io.WriteString(w, "second half")
			})
			a := newAgent(t, p, func(c *agent.Config) { allowAll(c); c.ShutdownTimeout = patience })
			conn := rawConn(t, p.addr)
			r := bufio.NewReader(conn)
			if mode == "CONNECT" {
				fmt.Fprintf(conn, "CONNECT web-1:%s HTTP/1.1\r\nHost: x\r\n\r\n", port)
				if a := readAnswer(r, "CONNECT"); a.code != 200 {
					t.Fatalf("CONNECT: %d %s", a.code, a.reason)
				}
				fmt.Fprint(conn, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
			} else {
				fmt.Fprintf(conn, "GET http://web-1:%s/ HTTP/1.1\r\nHost: x\r\n\r\n", port)
			}
			received(t, started, "the scrape")
			stopped := make(chan struct{})
			go func() { a.stop(); close(stopped) }()
			p.logs.wait(t, "Agent leaves", "reason=shutdown")
			p.get("http://web-1:"+port+"/").refused(t, 503, protocol.CodeAgentOffline, "shutdown")
			close(release)
			readAnswer(r, "GET").ok(t, "first half, second half")
			conn.Close()
			received(t, stopped, "the end of the agent")
		})
	}
}

// TestSilentNetwork: a network that swallows everything costs a scrape its own
// timeout, and neither side's end waits for the other.
func TestSilentNetwork(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.ShutdownTimeout = time.Second })
	r := newRelay(t, p)
	_, port := newTarget(t, nil)
	a := newAgent(t, p, func(c *agent.Config) {
		allowAll(c)
		c.ProxyURLs, c.ShutdownTimeout = []string{r.url}, time.Second
	})
	p.get("http://web-1:"+port+"/metrics").ok(t, "up 1")
	r.freeze()
	p.get("http://web-1:"+port+"/metrics", timeoutHeader+"0.5").refused(t, 504, protocol.CodeTimeout)
	p.send("CONNECT", "web-1:"+port, timeoutHeader+"0.5").refused(t, 504, protocol.CodeTimeout)
	p.get("/clients").ok(t, "web-1")
	for name, stop := range map[string]func(){"agent": a.stop, "proxy": p.stop} {
		start := time.Now()
		stop()
		if took := time.Since(start); took > patience {
			t.Errorf("the end of the %s took %s", name, took)
		}
	}
}
