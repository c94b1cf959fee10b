package agent_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
)

// held is a target whose answers wait.
type held struct {
	started chan struct{}
	release chan struct{}
}

func newHeld() *held { return &held{make(chan struct{}, 1000), make(chan struct{})} }

func (h *held) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h.started <- struct{}{}
	select {
	case <-h.release:
	case <-r.Context().Done():
	}
	io.WriteString(w, "held 1")
}

// TestMaxConcurrent: scrapes of all targets and through all proxies are counted together;
// those beyond the limit are refused after a wait, and nothing is lost with a reload.
func TestMaxConcurrent(t *testing.T) {
	t.Parallel()
	left, right := newProxy(t, nil), newProxy(t, nil)
	target := newHeld()
	base, port := newTarget(t, target.ServeHTTP)
	a := newAgent(t, left, func(c *agent.Config) {
		c.ProxyURLs = append(c.ProxyURLs, right.url)
		c.Targets = []agent.Target{{Name: "node", URL: base}, {Name: "app", Handler: target}}
		c.Allow = []agent.PortRange{{First: 1, Last: 65535}}
		c.MaxConcurrent = 3
	})
	a.logs.waitN(t, 2, "msg=Connected")
	var tasks sync.WaitGroup
	t.Cleanup(tasks.Wait)
	hold := func(p *testProxy, target string) { tasks.Go(func() { p.want(target, 200, "held 1") }) }
	hold(left, "http://node.web-1/metrics")
	hold(right, "http://web-1:"+port+"/metrics")
	hold(right, "http://app.web-1/metrics")
	for range 3 {
		received(t, target.started, "a scrape")
	}
	var waiting sync.WaitGroup
	for _, p := range []*testProxy{left, right} {
		for _, scrape := range []string{"http://node.web-1/metrics", "http://web-1:" + port + "/metrics", "http://app.web-1/metrics", "http://agent.web-1/metrics"} {
			waiting.Go(func() {
				p.want(scrape, 429, `agent "web-1" has 3 scrapes running (--scrape.max-concurrent of the agent)`)
			})
		}
		p.want("http://node.web-1/other", 403, "/metrics") // at once
	}
	waiting.Wait()
	if len(target.started) != 0 {
		t.Error("a scrape beyond the limit reached the target")
	}
	text := gathered(t, a.Gatherer())
	for _, want := range []string{"agent-busy", "culvert_client_scrapes_max_concurrent"} {
		if !strings.Contains(text, want) {
			t.Errorf("the metrics lack %s: %s", want, text)
		}
	}
	// One more place, and one who gets it while it waits.
	hold(left, "http://node.web-1/metrics")
	if err := a.Reload(a.config(func(c *agent.Config) { c.MaxConcurrent = 4 })); err != nil {
		t.Fatal(err)
	}
	received(t, target.started, "the scrape that waited")
	close(target.release)
	tasks.Wait()
	left.want("http://agent.web-1/metrics", 200, "\nculvert_client_scrapes_max_concurrent 4\n")
	if err := a.Reload(a.config(func(c *agent.Config) { c.MaxConcurrent = -1 })); err != nil {
		t.Fatal(err)
	}
	left.want("http://agent.web-1/metrics", 200, "\nculvert_client_scrapes_max_concurrent 0\n")
}

// TestMaxTunnels: tunnels have places of their own, and give them back when they end.
func TestMaxTunnels(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	_, port := newTarget(t, nil)
	a := newAgent(t, p, func(c *agent.Config) {
		c.Allow = []agent.PortRange{{First: 1, Last: 65535}}
		c.MaxTunnels, c.MaxConcurrent = 2, 1
	})
	var open []net.Conn
	for range 2 {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "CONNECT web-1:%s HTTP/1.1\r\nHost: x\r\n\r\n", port)
		if line, _ := bufio.NewReader(conn).ReadString('\n'); !strings.Contains(line, "200") {
			t.Fatal(line)
		}
		open = append(open, conn)
	}
	if line := p.connect(t, "web-1:"+port); !strings.HasPrefix(line, "HTTP/1.1 429 agent-busy: ") || !strings.Contains(line, "2 CONNECT tunnels open (--connect.max-concurrent of the agent)") {
		t.Error(line)
	}
	p.want("http://web-1:"+port+"/metrics", 200, "up 1")
	open[0].Close()
	for deadline := time.Now().Add(patience); ; { // each try waits for the end of the other
		line := p.connect(t, "web-1:"+port)
		if strings.Contains(line, "200") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(line)
		}
	}
	if n := a.logs.count("panic"); n > 0 {
		t.Errorf("%d panics", n)
	}
}

// TestMaxBodySize: a response that is too long is refused where its length is known, and
// arrives broken where it isn't: never as a short success.
func TestMaxBodySize(t *testing.T) {
	t.Parallel()
	const limit = 100_000
	p := newProxy(t, nil)
	base, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.URL.Query().Get("n"))
		if r.URL.Query().Has("length") {
			w.Header().Set("Content-Length", strconv.Itoa(n))
		} else {
			w.(http.Flusher).Flush() // chunked
		}
		line := strings.Repeat("x", 999) + "\n"
		for ; n > 0; n -= len(line) {
			if _, err := io.WriteString(w, line[:min(n, len(line))]); err != nil {
				return
			}
		}
	})
	a := newAgent(t, p, func(c *agent.Config) {
		c.Targets = []agent.Target{{Name: "tree", URL: base + "/*"}}
		c.Allow = []agent.PortRange{{First: 1, Last: 65535}}
		c.MaxBodySize = limit
	})
	get := func(method, target, version string) (*http.Response, int, error) {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "%s %s HTTP/%s\r\nHost: x\r\nConnection: close\r\n\r\n", method, target, version)
		req, _ := http.NewRequest(method, target, nil)
		resp, err := http.ReadResponse(bufio.NewReader(conn), req)
		if err != nil {
			return &http.Response{}, 0, err
		}
		n, err := io.Copy(io.Discard, resp.Body)
		return resp, int(n), err
	}
	for _, from := range []string{"http://web-1:" + port + "/", "http://tree.web-1/"} {
		for _, c := range []struct {
			query        string
			method       string
			status, size int // size -1: the transfer is broken
		}{
			{"?n=100000&length", "GET", 200, limit}, {"?n=100000", "GET", 200, limit}, {"?n=0", "GET", 200, 0},
			{"?n=100001&length", "GET", 502, 0}, {"?n=100001", "GET", 200, -1}, {"?n=10000000", "GET", 200, -1}, {"?n=100001&length", "HEAD", 200, 0},
		} {
			for _, version := range []string{"1.1", "1.0"} {
				resp, n, err := get(c.method, from+c.query, version)
				switch {
				case c.size == -1:
					if err == nil {
						t.Errorf("%s: %d with %d bytes, want a broken transfer", from+c.query, resp.StatusCode, n)
					}
				case resp.StatusCode != c.status || err != nil || c.status == 200 && n != c.size:
					t.Errorf("%s %s: %d with %d bytes, %v, want %d with %d", c.method, from+c.query, resp.StatusCode, n, err, c.status, c.size)
				case c.status == 502 && (resp.Header.Get("Culvert-Error") != "bad-response" || !strings.Contains(resp.Status, "100001 bytes, more than --scrape.max-body-size=")):
					t.Errorf("%s: %s %v", from+c.query, resp.Status, resp.Header)
				}
			}
		}
	}
	a.logs.wait(t, "level=WARN", "A response was broken off", "max_body_size")
	p.want("http://agent.web-1/metrics", 200, `culvert_client_scrapes_total{outcome="too-long"} 8`)
	if err := a.Reload(a.config(func(c *agent.Config) { c.MaxBodySize = -1 })); err != nil {
		t.Fatal(err)
	}
	if resp, n, err := get("GET", "http://tree.web-1/?n=10000000", "1.1"); n != 10_000_000 || err != nil {
		t.Errorf("without a limit: %v, %d bytes, %v", resp.StatusCode, n, err)
	}
}
