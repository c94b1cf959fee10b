package server_test

import (
	"bufio"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/proxy/server"
)

// heap returns the bytes in use, after what can be freed was.
func heap() int {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

// TestStrangersGrowNothing: 10,000 unknown hosts asked for, and 10,000 guesses under as
// many names, leave nothing behind that grows with them. It runs alone, to measure.
func TestStrangersGrowNothing(t *testing.T) {
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile, c.Logger = file.path, slog.New(slog.DiscardHandler) })
	send := func(request string, want int) {
		t.Helper()
		conn, err := net.Dial("tcp", p.addr) // rawConn would be kept until the end
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		io.WriteString(conn, request+"\r\n\r\n")
		if a := readAnswer(bufio.NewReader(conn), "GET"); a.code != want {
			t.Fatalf("got %d %s %v, want %d", a.code, a.reason, a.err, want)
		}
	}
	padding := strings.Repeat("x", 60)
	ask := func(i int) {
		send(fmt.Sprintf("GET http://host-%d.%s.example.net/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: %s", i, padding, basic("prom", "secret")), 404)
		send(fmt.Sprintf("GET /clients HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %08d%s", i, padding), 401)
	}
	for i := range 200 {
		ask(i)
	}
	before := heap()
	for i := range 10_000 {
		ask(1000 + i)
	}
	// 10,000 guesses are remembered for a while, by hashes of one size each.
	if grown := heap() - before; grown > 5<<20 {
		t.Errorf("%d kB more are in use", grown>>10)
	}
}

// TestSlowRequests: 1,000 connections that never finish their request take nothing from
// others, and are closed, on each listener.
func TestSlowRequests(t *testing.T) {
	t.Parallel()
	_, port := newTarget(t, nil)
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) {
		c.ConfigFile, c.AgentListenAddresses, c.MaxHandshakes = file.path, []string{"127.0.0.1:0"}, 4
	})
	newAgent(t, p, func(c *agent.Config) { c.Name, c.TokenFile = "web-1.example.net", tokenFile(t, "agent"); allowAll(c) })
	var conns []net.Conn
	for i := range 1000 {
		addr := []string{p.addr, p.AgentAddr()}[i%2]
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprint(conn, []string{"G", "GET /tunnel HTTP/1.1\r\nUpgrade: culvert/1\r\nCulvert-Agent: web-2.exam", "CONNECT web-1.example.net:1 HTTP/1.1\r\nProxy-"}[i%3])
		conns = append(conns, conn)
	}
	p.get("http://web-1.example.net:"+port+"/metrics", "Proxy-Authorization: "+basic("prom", "secret")).ok(t, "up 1")
	newAgent(t, p, func(c *agent.Config) { c.Name, c.TokenFile = "web-3.example.net", tokenFile(t, "agent") })
	for _, conn := range conns {
		conn.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := io.Copy(io.Discard, conn); err != nil && !isBroken(err) {
			t.Fatalf("a connection is still open: %v", err)
		}
	}
}

// TestOneRequestIsOne: nothing that a scraper sends is one request for the proxy and
// another, or two, for the target.
func TestOneRequestIsOne(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex // protects paths
	var paths []string
	_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		mu.Lock()
		defer mu.Unlock()
		paths = append(paths, r.URL.Path)
		fmt.Fprintln(w, "up 1")
	})
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile, c.EnableLifecycle = file.path, true })
	newAgent(t, p, func(c *agent.Config) { c.Name, c.TokenFile = "web-1.example.net", tokenFile(t, "agent"); allowAll(c) })
	line := " http://web-1.example.net:" + port + "/good HTTP/1.1\r\nHost: web-1.example.net:" + port + "\r\nProxy-Authorization: " + basic("prom", "secret") + "\r\n"
	hidden := "GET /-/hidden HTTP/1.1\r\nHost: web-1.example.net\r\n\r\n"
	for what, c := range map[string]struct {
		request string
		want    int
	}{
		"both lengths":          {"POST" + line + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + hidden, 200},
		"two lengths":           {"POST" + line + "Content-Length: 4\r\nContent-Length: 8\r\n\r\nabcdefgh", 400},
		"odd coding":            {"POST" + line + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 501},
		"two codings":           {"POST" + line + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", 501},
		"space before colon":    {"POST" + line + "Content-Length : 4\r\n\r\nabcd", 400},
		"negative length":       {"POST" + line + "Content-Length: -1\r\n\r\n", 400},
		"NUL in a field":        {"GET" + line + "X-A: a\x00b\r\n\r\n", 400},
		"CR in a field":         {"GET" + line + "X-A: a\rGET / HTTP/1.1\r\n\r\n", 400},
		"NUL in the target":     {"GET http://web-1.example.net:" + port + "/\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400},
		"a body for a GET":      {"GET" + line + fmt.Sprintf("Content-Length: %d\r\n\r\n", len(hidden)) + hidden, 200},
		"control in absolute":   {"POST http://" + p.addr + "/-/quit HTTP/1.1\r\nHost: x\r\nProxy-Authorization: " + basic("root", "secret") + "\r\n\r\n", 404},
		"another in Host":       {"GET http://ghost.example.net/ HTTP/1.1\r\nHost: web-1.example.net:" + port + "\r\nProxy-Authorization: " + basic("prom", "secret") + "\r\n\r\n", 404},
		"the agent's control":   {"CONNECT agent.web-1.example.net:80 HTTP/1.1\r\nHost: x\r\nProxy-Authorization: " + basic("prom", "secret") + "\r\n\r\n", 403},
		"control of the agent":  {"POST http://agent.web-1.example.net/v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nProxy-Authorization: " + basic("prom", "secret") + "\r\n\r\n{}", 403},
		"a user in the target":  {"GET http://root:secret@web-1.example.net:" + port + "/good HTTP/1.1\r\nHost: x\r\n\r\n", 407},
		"an upgrade to tunnel":  {"GET http://web-1.example.net:" + port + "/good HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: culvert/1\r\nProxy-Authorization: " + basic("prom", "secret") + "\r\n\r\n", 200},
		"path mode, way out":    {"GET /scrape/web-1.example.net/" + port + "/../../-/quit HTTP/1.1\r\nHost: x\r\nAuthorization: " + basic("prom", "secret") + "\r\n\r\n", 0},
		"path mode, odd agent":  {"GET /scrape/web-1.example.net%0d%0aX:%20y/" + port + "/x HTTP/1.1\r\nHost: x\r\nAuthorization: " + basic("prom", "secret") + "\r\n\r\n", 400},
		"path mode, odd target": {"GET /scrape/web-1.example.net/..%2f/x HTTP/1.1\r\nHost: x\r\nAuthorization: " + basic("prom", "secret") + "\r\n\r\n", 400},
		"an agent of odd name":  {"GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: culvert/1\r\nCulvert-Agent: <b>web-2</b>\r\nCulvert-Instance: 1\r\nAuthorization: Bearer agent\r\n\r\n", 400},
	} {
		a := raw(t, p.addr, c.request)
		if a.err != nil || c.want != 0 && a.code != c.want {
			t.Errorf("%s: got %d %s %v, want %d", what, a.code, a.reason, a.err, c.want)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	for _, path := range paths {
		if strings.Contains(path, "hidden") {
			t.Errorf("a request was hidden in another: %q", paths)
		}
	}
	p.get("/-/ready").ok(t, "OK")
}

// TestFoldedField: a field that goes on in the next line (RFC 9112, section 5.2) arrives
// as one field, or not at all.
func TestFoldedField(t *testing.T) {
	t.Parallel()
	got := make(chan http.Header, 1)
	_, port := newTarget(t, func(_ http.ResponseWriter, r *http.Request) { got <- r.Header.Clone() })
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	newAgent(t, p, func(c *agent.Config) { c.Name, c.TokenFile = "web-1.example.net", tokenFile(t, "agent"); allowAll(c) })
	conn := rawConn(t, p.addr)
	fmt.Fprintf(conn, "GET http://web-1.example.net:%s/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: %s\r\nX-A: a\r\n X-Evil: b\r\n\r\n", port, basic("prom", "secret"))
	a := readAnswer(bufio.NewReader(conn), "GET")
	if a.code == 400 {
		return
	}
	if h := received(t, got, "the scrape"); h.Get("X-Evil") != "" || a.code != 200 {
		t.Errorf("got %d, and the target %v", a.code, h)
	}
}
