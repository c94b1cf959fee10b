package server_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/protocol/externaltest"
	"github.com/culvert-io/culvert/proxy/cluster"
	"github.com/culvert-io/culvert/proxy/server"
)

// etcdClient returns a client of the test's own.
func etcdClient(t testing.TB, e *externaltest.Etcd) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{e.URL}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// newMember starts a proxy of the cluster.
func newMember(t *testing.T, e *externaltest.Etcd, tweak func(*server.Config)) *testProxy {
	t.Helper()
	p := newProxy(t, func(c *server.Config) {
		c.Cluster.Endpoints = []string{e.URL}
		c.Cluster.ListenAddress = "127.0.0.1:0"
		c.Cluster.TTL = 2 * time.Second
		c.ReconnectWait = 2 * time.Second
		if tweak != nil {
			tweak(c)
		}
	})
	p.logs.wait(t, "Connected to the cluster")
	return p
}

// alike waits until the paths are answered alike by all proxies, and returns the answer to
// the first one.
func alike(t *testing.T, paths []string, proxies ...*testProxy) string {
	t.Helper()
	first := ""
	for i, path := range paths {
		var bodies []string
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("%s:\n%s", path, strings.Join(bodies, "\n"))
			}
		})
		eventually(t, path+" is alike", func() bool {
			bodies = bodies[:0]
			for _, p := range proxies {
				a := p.get(path)
				if a.code != http.StatusOK {
					return false
				}
				bodies = append(bodies, a.body)
				if a.body != bodies[0] {
					return false
				}
			}
			return true
		})
		if i == 0 {
			first = bodies[0]
		}
	}
	return first
}

// holds waits until the proxy knows the agent as connected, or as lost.
func (p *testProxy) holds(name string, connected bool) {
	p.t.Helper()
	eventually(p.t, fmt.Sprintf("agent %q is connected=%v", name, connected), func() bool {
		return strings.Contains(p.get("/clients").body, fmt.Sprintf(`["%s"],"labels":{"__meta_culvert_agent":"%s","__meta_culvert_connected":"%v"`, name, name, connected))
	})
}

// knowsWays waits until the proxy knows n proxies, itself included, that hold the agent.
func (p *testProxy) knowsWays(n int, name string) {
	p.t.Helper()
	eventually(p.t, fmt.Sprintf("%d proxies hold %q", n, name), func() bool {
		return strings.Count(p.get("/api/v1/agents/"+name).body, `"id":`) == n
	})
}

var discoveryPaths = []string{"/clients", "/targets", "/api/v1/agents", "/clients?match[]={site=\"berlin\"}"}

func TestClusterDiscovery(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	a, b := newMember(t, e, nil), newMember(t, e, nil)
	_, port := newTarget(t, say("target_up 1\n"))
	one := newAgent(t, a, func(c *agent.Config) {
		c.Name, c.Labels = "one", map[string]string{"site": "berlin"}
		c.Targets = []agent.Target{{Name: "node", URL: "http://127.0.0.1:" + port + "/metrics"}}
	})
	newAgent(t, b, func(c *agent.Config) { c.Name = "two"; allowAll(c) })
	both := newAgent(t, a, func(c *agent.Config) {
		c.Name, c.ProxyURLs = "both", []string{a.url, b.url}
	})
	both.logs.waitN(t, 2, "msg=Connected")
	for _, p := range []*testProxy{a, b} {
		p.holds("one", true)
		p.holds("two", true)
		p.holds("both", true)
		p.knowsWays(2, "both")
	}
	alike(t, discoveryPaths, a, b)
	b.get("http://node.one/metrics").ok(t, "target_up 1")
	a.get("http://two:"+port+"/metrics").ok(t, "target_up 1")

	one.stop()
	b.holds("one", false)
	alike(t, discoveryPaths, a, b)
	late := newMember(t, e, nil)
	late.holds("one", false)
	alike(t, discoveryPaths, a, b, late)

	if got := late.send(http.MethodDelete, "/api/v1/agents/one"); got.code != http.StatusNoContent {
		t.Fatalf("DELETE: %d %s", got.code, got.body)
	}
	for _, p := range []*testProxy{a, b, late} {
		eventually(t, "the agent is forgotten", func() bool { return !strings.Contains(p.get("/clients").body, `"one"`) })
	}
	late.send(http.MethodDelete, "/api/v1/agents/two") // it runs, and comes back
	b.logs.wait(t, "Agent disconnected", "agent=two")
	b.logs.waitN(t, 2, "Agent connected", "agent=two")
	late.holds("two", true)
	alike(t, discoveryPaths, a, b, late)
}

// Each scrape through the proxy that holds the agent, and through one that doesn't, has to
// have the same answer.
func TestClusterForwards(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	a, b := newMember(t, e, nil), newMember(t, e, nil)
	release, cancelled := make(chan struct{}), make(chan struct{}, 1)
	_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/headers":
			for _, name := range []string{"Authorization", "Proxy-Authorization", "X-Prometheus-Scrape-Timeout-Seconds", "Culvert-Peer", "Culvert-Peer-Agent", "Culvert-Peer-Timeout", "X-Forwarded-For", "Accept-Encoding", "User-Agent"} {
				fmt.Fprintf(w, "%s=%q\n", name, r.Header.Values(name))
			}
		case "/large":
			w.Write(bytes.Repeat([]byte("metric_of_some_length 1\n"), 200_000))
		case "/teapot":
			w.Header().Set("X-Kind", "pot")
			w.WriteHeader(http.StatusTeapot)
			fmt.Fprint(w, "short and stout")
		case "/posted":
			body, _ := io.ReadAll(r.Body)
			fmt.Fprintf(w, "%s %q", r.Method, body)
		case "/broken":
			w.Header().Set("Content-Length", "1000")
			fmt.Fprint(w, "half")
			panic(http.ErrAbortHandler)
		case "/chunked-broken":
			fmt.Fprint(w, "half")
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		case "/stream":
			fmt.Fprint(w, "half")
			http.NewResponseController(w).Flush()
			<-r.Context().Done()
			cancelled <- struct{}{}
		case "/slow":
			select {
			case <-release:
			case <-r.Context().Done():
			}
		default:
			fmt.Fprintln(w, "up 1")
		}
	})
	defer close(release)
	newAgent(t, a, func(c *agent.Config) {
		c.Allow = []agent.PortRange{{First: portNumber(t, port), Last: portNumber(t, port)}, {First: 1, Last: 1}}
		c.Hosts = []agent.Host{{Name: "*.lan", Address: "127.0.0.1"}}
		c.Targets = []agent.Target{{Name: "node", URL: "http://127.0.0.1:" + port + "/metrics"}}
	})
	b.holds("web-1", true)
	lost := newAgent(t, a, func(c *agent.Config) { c.Name = "lost" })
	lost.stop()
	b.holds("lost", false)
	compare := func(method, target string, header ...string) {
		t.Run(method+" "+target, func(t *testing.T) {
			local, passed := a.send(method, target, header...), b.send(method, target, header...)
			age := regexp.MustCompile(`\d+ s ago`)
			for _, h := range []http.Header{local.header, passed.header} {
				h.Del("Date")
				if age.MatchString(local.reason) { // it may have one more digit
					h.Del("Content-Length")
				}
			}
			local.reason, passed.reason = age.ReplaceAllString(local.reason, ""), age.ReplaceAllString(passed.reason, "")
			local.body, passed.body = age.ReplaceAllString(local.body, ""), age.ReplaceAllString(passed.body, "")
			local.header.Set(protocol.HeaderMessage, age.ReplaceAllString(local.header.Get(protocol.HeaderMessage), ""))
			passed.header.Set(protocol.HeaderMessage, age.ReplaceAllString(passed.header.Get(protocol.HeaderMessage), ""))
			if local.code != passed.code || local.reason != passed.reason || local.body != passed.body || !reflect.DeepEqual(local.header, passed.header) || isBroken(local.err) != isBroken(passed.err) {
				t.Errorf("here: %d %q %v %.300q, %v\nthere: %d %q %v %.300q, %v", local.code, local.reason, local.header, local.body, local.err, passed.code, passed.reason, passed.header, passed.body, passed.err)
			}
			t.Logf("%d %q, %d bytes, %v", passed.code, passed.reason, len(passed.body), passed.err)
		})
	}
	web := "http://web-1:" + port
	compare("GET", web+"/metrics?x=%2F")
	compare("HEAD", web+"/metrics")
	compare("GET", "http://node.web-1/metrics")
	compare("GET", "http://node.web-1/metrics?", "If-None-Match: x", "Accept-Encoding: identity", "X-Prometheus-Scrape-Timeout-Seconds: nonsense", "Range: bytes=0-0")
	compare("GET", "http://deep.db.lan:"+port+"/metrics")
	compare("GET", "/scrape/web-1/node/metrics")
	compare("GET", "/scrape/web-1/"+port+"/teapot")
	compare("GET", web+"/headers", "Authorization: Basic eDp5", "Proxy-Authorization: Bearer x", "X-Prometheus-Scrape-Timeout-Seconds: 7", "X-Forwarded-For: 1.2.3.4", "Culvert-Peer-Agent: other")
	compare("GET", web+"/large")
	compare("GET", web+"/large", "Accept-Encoding: gzip")
	compare("GET", web+"/teapot")
	compare("HEAD", web+"/teapot")
	compare("GET", web+"/broken")
	compare("GET", web+"/chunked-broken")
	compare("GET", "http://web-1:1/metrics")
	compare("GET", "http://web-1:2/metrics")
	compare("HEAD", "http://web-1:2/metrics")
	compare("GET", "http://other.web-1/metrics")
	compare("GET", "http://node.web-1/other")
	compare("GET", "http://nobody/metrics")
	compare("GET", "http://lost/metrics")
	compare("GET", web+"/slow", "X-Prometheus-Scrape-Timeout-Seconds: 0.4")
	compare("CONNECT", "web-1:1")
	compare("CONNECT", "web-1:2")
	compare("CONNECT", "nobody:1")
	compare("CONNECT", "lost:1")
	compare("CONNECT", "web-1")

	t.Run("POST", func(t *testing.T) {
		request := "POST " + web + "/posted HTTP/1.1\r\nHost: web-1:" + port + "\r\nContent-Length: 4\r\n\r\nbody"
		local, passed := raw(t, a.addr, request), raw(t, b.addr, request)
		if local.code != 200 || local.body != `POST "body"` || passed.body != local.body {
			t.Errorf("here: %d %q, there: %d %q", local.code, local.body, passed.code, passed.body)
		}
	})
	t.Run("streaming", func(t *testing.T) {
		conn := rawConn(t, b.addr)
		fmt.Fprintf(conn, "GET %s/stream HTTP/1.1\r\nHost: web-1\r\n\r\n", web)
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		half := make([]byte, 4)
		if _, err := io.ReadFull(resp.Body, half); err != nil || string(half) != "half" {
			t.Errorf("the first half: %q, %v", half, err) // before there is a second one
		}
		conn.Close()
		received(t, cancelled, "the end of the request at the target")
	})
	t.Run("CONNECT", func(t *testing.T) {
		conn := rawConn(t, b.addr)
		fmt.Fprintf(conn, "CONNECT web-1:%s HTTP/1.1\r\nHost: web-1\r\n\r\nGET /metrics HTTP/1.1\r\nHost: web-1\r\nConnection: close\r\n\r\n", port)
		r := bufio.NewReader(conn)
		if got := readAnswer(r, http.MethodConnect); got.code != http.StatusOK || len(got.header) != 0 {
			t.Fatalf("CONNECT: %d %q %v %v", got.code, got.reason, got.header, got.err)
		}
		readAnswer(r, http.MethodGet).ok(t, "up 1")
		if rest, err := io.ReadAll(r); len(rest) > 0 || err != nil {
			t.Errorf("after the end: %q, %v", rest, err)
		}
	})
	if metrics := b.get("/metrics").body; !strings.Contains(metrics, `culvert_proxy_cluster_forwarded_scrapes_total{outcome="ok"}`) || strings.Contains(metrics, `forwarded_scrapes_total{outcome="ok"} 0`) {
		t.Errorf("nothing was forwarded:\n%s", metrics)
	}
	if metrics := a.get("/metrics").body; strings.Contains(metrics, `outcome="unreachable"} 1`) {
		t.Errorf("a proxy was unreachable:\n%s", metrics)
	}
}

// TestClusterLastCall: a proxy that stops closes the connections that wait, and takes
// scrapes on new ones for a moment: a balancer may still lead there.
func TestClusterLastCall(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	a, b := newMember(t, e, nil), newMember(t, e, nil)
	_, port := newTarget(t, nil)
	newAgent(t, a, func(c *agent.Config) { allowAll(c); c.ProxyURLs = []string{a.url, b.url} })
	a.knowsWays(2, "web-1")
	scrape := func(conn net.Conn) answer {
		fmt.Fprintf(conn, "GET http://web-1:%s/metrics HTTP/1.1\r\nHost: web-1:%s\r\n\r\n", port, port)
		return readAnswer(bufio.NewReader(conn), "GET")
	}
	waiting := rawConn(t, a.addr)
	scrape(waiting).ok(t, "up 1\n")
	stopped := make(chan struct{})
	began := time.Now()
	go func() { a.stop(); close(stopped) }()
	if n, err := waiting.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("the connection that waits: %d bytes, %v", n, err)
	}
	conn, err := net.Dial("tcp", a.addr)
	if err == nil {
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		if got := scrape(conn); got.code != http.StatusOK {
			err = fmt.Errorf("%+v", got)
		}
	}
	// On a machine this busy, the moment may have passed before the end was seen here.
	if took := time.Since(began); err != nil && took < 100*time.Millisecond {
		t.Errorf("a scrape right behind that, %s after the stop began: %v", took, err)
	}
	received(t, stopped, "the end of the proxy")
}

func portNumber(t *testing.T, port string) uint16 {
	t.Helper()
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	return uint16(n)
}

// What comes to the address for proxies has to show the cluster's secret, and goes no
// further than to the agents of that proxy.
func TestClusterPeerListener(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	a, b := newMember(t, e, nil), newMember(t, e, nil)
	_, port := newTarget(t, nil)
	newAgent(t, a, allowAll)
	b.holds("web-1", true)
	address := map[*testProxy]string{}
	for _, p := range []*testProxy{a, b} {
		found := regexp.MustCompile(`Listening address=(\S+) tls=false for="other proxies"`).FindStringSubmatch(p.logs.String())
		address[p] = found[1]
	}
	got, err := etcdClient(t, e).Get(t.Context(), "/culvert/fleet/secret")
	if err != nil || len(got.Kvs) != 1 {
		t.Fatalf("the secret: %v, %v", got, err)
	}
	secret := string(got.Kvs[0].Value)
	send := func(p *testProxy, line, secret, more string) answer {
		return raw(t, address[p], line+" HTTP/1.1\r\nHost: web-1:"+port+"\r\nProxy-Authorization: Bearer "+secret+"\r\nCulvert-Peer: x\r\nCulvert-Peer-Agent: web-1\r\nCulvert-Peer-Timeout: 3\r\n"+more+"\r\n")
	}
	get := "GET http://web-1:" + port + "/metrics"
	send(a, get, secret, "").ok(t, "up 1")
	for _, wrong := range []string{"", "x", secret + "x", secret[1:]} {
		for _, line := range []string{get, "CONNECT web-1:" + port, "GET /metrics", "POST /v1/alive"} {
			if got := send(a, line, wrong, ""); got.code != http.StatusProxyAuthRequired {
				t.Errorf("%s with a wrong secret: %d %q", line, got.code, got.reason)
			}
		}
	}
	// The agent is at the other proxy: this one must not pass it on.
	for _, line := range []string{get, "CONNECT web-1:" + port} {
		got := send(b, line, secret, "")
		if got.code != http.StatusServiceUnavailable || got.header.Get("Culvert-Peer-Held") != "no" || got.header.Get("Culvert-Error") != "agent-offline" {
			t.Errorf("%s: %d %q %v", line, got.code, got.reason, got.header)
		}
	}
	for _, line := range []string{"GET /metrics", "GET /clients", "GET /tunnel", "PUT /metrics/job/x", "DELETE /api/v1/agents/web-1"} {
		if got := send(a, line, secret, ""); got.code != http.StatusNotFound {
			t.Errorf("%s: %d %q", line, got.code, got.reason)
		}
	}
	// A wrong --cluster.advertise-url may lead to the address for scrapers.
	a.get("http://web-1:"+port+"/metrics", "Culvert-Peer: x").refused(t, http.StatusMisdirectedRequest, "misdirected", "--cluster.advertise-url")
}

// A proxy that another one can't reach, or that is none, is told by name, and other ways
// are taken where there are some.
func TestClusterUnreachablePeer(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	nobody := "http://" + externaltest.FreeAddress(t)
	wrong, _ := newTarget(t, nil)
	front := newMember(t, e, func(c *server.Config) { c.ReconnectWait = 300 * time.Millisecond })
	for _, c := range []struct{ url, says string }{{nobody, "refused"}, {wrong, "something else answered"}} {
		hidden := newMember(t, e, func(config *server.Config) { config.Cluster.AdvertiseURL = c.url })
		_, port := newTarget(t, nil)
		hiding := newAgent(t, hidden, func(c *agent.Config) { c.Name = "hidden"; allowAll(c) })
		front.holds("hidden", true)
		for _, target := range []string{"GET http://hidden:" + port + "/metrics", "CONNECT hidden:" + port} {
			method, target, _ := strings.Cut(target, " ")
			front.send(method, target).refused(t, http.StatusBadGateway, "peer-unreachable", c.says)
		}
		// A second proxy that holds it is a way.
		seen := newMember(t, e, nil)
		both := newAgent(t, hidden, func(c *agent.Config) {
			c.Name, c.ProxyURLs = "both", []string{hidden.url, seen.url}
			allowAll(c)
		})
		both.logs.waitN(t, 2, "msg=Connected")
		front.knowsWays(2, "both")
		for range 10 {
			front.get("http://both:"+port+"/metrics").ok(t, "up 1")
		}
		hiding.stop()
		both.stop()
		hidden.stop()
		seen.stop()
	}
}

// Names are unique over all proxies, whichever is asked.
func TestClusterNames(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	a, b := newMember(t, e, nil), newMember(t, e, nil)
	first := register(t, a, "web-1", "aaaa", protocol.Registration{Targets: []protocol.Target{{Name: "node", Path: "/metrics"}}, Hosts: []string{"db.lan"}})
	b.holds("web-1", true)
	try := func(name, instance string, reg protocol.Registration) error {
		s := dial(t, b, name, instance)
		defer s.Close()
		return s.Register(t.Context(), &reg)
	}
	wantRefusal(t, try("node.web-1", "bbbb", protocol.Registration{}), http.StatusConflict, protocol.CodeCollision, "web-1")
	wantRefusal(t, try("db.lan", "bbbb", protocol.Registration{}), http.StatusConflict, protocol.CodeCollision, "web-1")
	wantRefusal(t, try("other", "bbbb", protocol.Registration{Hosts: []string{"web-1"}}), http.StatusConflict, protocol.CodeCollision, "web-1")
	wantRefusal(t, try("other", "bbbb", protocol.Registration{Hosts: []string{"node.web-1"}}), http.StatusConflict, protocol.CodeCollision, "web-1")
	wantRefusal(t, try("web-1", "bbbb", protocol.Registration{}), http.StatusConflict, protocol.CodeTaken, "another proxy")
	// The same process through a second proxy is the normal case.
	second := register(t, b, "web-1", "aaaa", protocol.Registration{Targets: []protocol.Target{{Name: "node", Path: "/metrics"}}, Hosts: []string{"db.lan"}})
	if err := second.Leave(t.Context()); err != nil {
		t.Errorf("leave: %v", err)
	}
	for _, p := range []*testProxy{a, b} {
		eventually(t, "the agent has left", func() bool { return p.get("/clients").body == "[]" })
	}
	received(t, first.Done(), "the other session's end")
	if err := try("db.lan", "bbbb", protocol.Registration{}); err != nil {
		t.Errorf("the name is free again: %v", err)
	}
}

// Without etcd, each proxy goes on with what it knows; what came meanwhile is told to the
// others when etcd is back.
func TestClusterWithoutEtcd(t *testing.T) {
	t.Parallel()
	for name, away := range map[string]struct{ begin, end func(*externaltest.Etcd) }{
		"stopped": {(*externaltest.Etcd).Stop, func(e *externaltest.Etcd) { e.Start(t) }},
		"frozen": {
			func(e *externaltest.Etcd) { e.Signal(t, syscall.SIGSTOP) },
			func(e *externaltest.Etcd) { e.Signal(t, syscall.SIGCONT) },
		},
	} {
		t.Run(name, func(t *testing.T) { withoutEtcd(t, away.begin, away.end) })
	}
}

func withoutEtcd(t *testing.T, begin, end func(*externaltest.Etcd)) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	a, b := newMember(t, e, nil), newMember(t, e, nil)
	_, port := newTarget(t, nil)
	newAgent(t, a, func(c *agent.Config) { c.Name = "one"; allowAll(c) })
	gone := newAgent(t, b, func(c *agent.Config) { c.Name = "gone"; allowAll(c) })
	a.holds("gone", true)
	b.holds("one", true)
	begin(e)
	a.logs.wait(t, "etcd does not answer")
	b.logs.wait(t, "etcd does not answer")
	newAgent(t, a, func(c *agent.Config) { c.Name = "new"; allowAll(c) })
	gone.stop()
	for range 3 {
		a.get("http://one:"+port+"/metrics").ok(t, "up 1")
		a.get("http://new:"+port+"/metrics").ok(t, "up 1")
		b.get("http://one:"+port+"/metrics").ok(t, "up 1") // its proxy is known
	}
	b.get("http://gone:"+port+"/metrics").refused(t, http.StatusServiceUnavailable, protocol.CodeAgentOffline)
	for path, names := range map[string][]string{"/clients": {`"one"`, `"new"`, `"gone"`}, "/metrics": {"culvert_proxy_cluster_etcd_up 0"}} {
		for _, name := range names {
			if got := a.get(path); got.code != http.StatusOK || !strings.Contains(got.body, name) {
				t.Errorf("%s without etcd lacks %s: %d %.300q", path, name, got.code, got.body)
			}
		}
	}
	end(e)
	a.logs.wait(t, "etcd answers again")
	b.logs.wait(t, "etcd answers again")
	b.holds("new", true)
	b.get("http://new:"+port+"/metrics").ok(t, "up 1")
	a.holds("gone", false)
	alike(t, discoveryPaths, a, b)
	if got := a.get("/metrics").body; !strings.Contains(got, "culvert_proxy_cluster_etcd_up 1") {
		t.Error("culvert_proxy_cluster_etcd_up does not say that etcd is back")
	}
}

// An etcd that lost everything gets it again from the proxies, lost agents included.
func TestClusterEtcdAnew(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	a, b := newMember(t, e, nil), newMember(t, e, nil)
	newAgent(t, a, func(c *agent.Config) { c.Name = "one" })
	lost := newAgent(t, b, func(c *agent.Config) { c.Name = "lost" })
	lost.stop()
	a.holds("lost", false)
	e.Stop()
	if err := os.RemoveAll(e.Dir); err != nil {
		t.Fatal(err)
	}
	e.Start(t)
	a.logs.wait(t, "etcd was set up anew")
	b.logs.wait(t, "etcd was set up anew")
	late := newMember(t, e, nil)
	late.holds("one", true)
	late.holds("lost", false)
	alike(t, discoveryPaths, a, b, late)
}

// A proxy that starts while etcd is away answers from what it kept, and takes agents.
func TestClusterStartWithoutEtcd(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	dir := t.TempDir()
	a := newMember(t, e, func(c *server.Config) { c.StoragePath = dir })
	other := newMember(t, e, nil)
	newAgent(t, other, func(c *agent.Config) { c.Name = "one" })
	a.holds("one", true)
	a.stop()
	e.Stop()
	again := newProxy(t, func(c *server.Config) {
		c.StoragePath, c.Fleet.SettleTime = dir, time.Hour
		c.Cluster.Endpoints, c.Cluster.ListenAddress, c.Cluster.TTL = []string{e.URL}, "127.0.0.1:0", 2*time.Second
	})
	again.holds("one", false) // nobody told otherwise
	newAgent(t, again, func(c *agent.Config) { c.Name = "two" })
	again.holds("two", true)
	// One that kept nothing must not pass what it has for the whole list.
	empty := newProxy(t, func(c *server.Config) {
		c.Cluster.Endpoints, c.Cluster.ListenAddress, c.Cluster.TTL = []string{e.URL}, "127.0.0.1:0", 2*time.Second
	})
	if got := empty.get("/clients"); got.code != http.StatusServiceUnavailable || got.header.Get("Retry-After") == "" || !strings.Contains(got.body, "etcd") {
		t.Errorf("without a list: %d %q %v", got.code, got.body, got.header)
	}
	e.Start(t)
	empty.holds("one", true)
	other.holds("two", true)
	again.holds("one", true)
	alike(t, discoveryPaths, again, other)
}

// Lost agents are forgotten once, by whichever proxy.
func TestClusterForgets(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	short := func(c *server.Config) { c.Fleet.ForgetAfter = time.Second }
	a, b := newMember(t, e, short), newMember(t, e, short)
	newAgent(t, a, func(c *agent.Config) { c.Name = "stays" })
	lost := newAgent(t, a, func(c *agent.Config) { c.Name = "lost" })
	b.holds("lost", true)
	lost.stop()
	for _, p := range []*testProxy{a, b} {
		eventually(t, "the agent is forgotten", func() bool { return !strings.Contains(p.get("/clients").body, `"lost"`) })
		p.holds("stays", true)
	}
	got, err := etcdClient(t, e).Get(t.Context(), "/culvert/fleet/agents/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil || len(got.Kvs) != 1 {
		t.Errorf("records in etcd: %v, %v; want that of %q alone", got, err, "stays")
	}
}

// A key that is pinned on one proxy counts on all, and so does its release.
func TestClusterPins(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	const token, operator = "this is the token of them all", "this is the token of operators"
	roles := newRolesFile(t, "roles:\n  agents:\n    - {name: all, agents: ['*'], token_hash: "+hashOf(token)+"}\n  operators:\n    - {name: op, token_hash: "+hashOf(operator)+"}\n")
	secured := func(c *server.Config) { c.ConfigFile = roles.path }
	a, b := newMember(t, e, secured), newMember(t, e, secured)
	enter := func(p *testProxy, key string) error {
		u, _ := url.Parse(p.url)
		s, err := (&protocol.Dialer{ProxyURL: u, Agent: "web-1", Instance: "abcd", Key: func() (string, error) { return key, nil }, Token: func() (string, error) { return token, nil }}).Dial(t.Context())
		if err != nil {
			return err
		}
		defer s.Close()
		return s.Register(t.Context(), &protocol.Registration{})
	}
	one, two := strings.Repeat("1", 32), strings.Repeat("2", 32)
	if err := enter(a, one); err != nil {
		t.Fatal(err)
	}
	wantRefusal(t, enter(b, two), http.StatusForbidden, protocol.CodeForbidden, "another key")
	if err := enter(b, one); err != nil {
		t.Error(err)
	}
	late := newMember(t, e, secured)
	wantRefusal(t, enter(late, two), http.StatusForbidden, protocol.CodeForbidden, "another key")
	if got := b.send(http.MethodDelete, "/api/v1/agents/web-1", "Authorization: Bearer "+operator); got.code != http.StatusNoContent {
		t.Fatalf("DELETE: %d %s", got.code, got.body)
	}
	eventually(t, "the name is free on every proxy", func() bool { return enter(late, two) == nil })
	a.logs.wait(t, "Agent forgotten")
	wantRefusal(t, enter(a, one), http.StatusForbidden, protocol.CodeForbidden, "another key")
}

// An etcd that wants a user name, by TLS both ways, and proxies whose own listeners have TLS.
func TestClusterSecured(t *testing.T) {
	t.Parallel()
	ca := newClusterAuthority(t)
	e := externaltest.StartEtcd(t, "--cert-file="+ca.cert, "--key-file="+ca.key, "--client-cert-auth", "--trusted-ca-file="+ca.authority, "--auth-token=simple")
	pool, err := os.ReadFile(ca.authority)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pool)
	pair, err := tls.LoadX509KeyPair(ca.cert, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := clientv3.New(clientv3.Config{Endpoints: []string{e.URL}, Logger: zap.NewNop(), TLS: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}})
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for _, step := range []func() error{
		func() error { _, err := root.UserAdd(ctx, "root", "root's password"); return err },
		func() error { _, err := root.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := root.UserAdd(ctx, "culvert", "culvert's password"); return err },
		func() error { _, err := root.RoleAdd(ctx, "proxy"); return err },
		func() error {
			_, err := root.RoleGrantPermission(ctx, "proxy", "/culvert/", clientv3.GetPrefixRangeEnd("/culvert/"), clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := root.UserGrantRole(ctx, "culvert", "proxy"); return err },
		func() error { _, err := root.AuthEnable(ctx); return err },
	} {
		if err := step(); err != nil && !strings.Contains(err.Error(), "role name already exists") {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	web, password := filepath.Join(dir, "web.yml"), filepath.Join(dir, "password")
	for path, text := range map[string]string{
		web:      "tls_server_config: {cert_file: " + ca.cert + ", key_file: " + ca.key + ", client_auth_type: RequireAndVerifyClientCert, client_ca_file: " + ca.authority + "}\n",
		password: "culvert's password\n",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	files := cluster.TLS{CAFile: ca.authority, CertFile: ca.cert, KeyFile: ca.key}
	secured := func(c *server.Config) {
		c.Cluster.Username, c.Cluster.PasswordFile = "culvert", password
		c.Cluster.EtcdTLS, c.Cluster.PeerTLS, c.Cluster.WebConfigFile = files, files, web
	}
	a, b := newMember(t, e, secured), newMember(t, e, secured)
	_, port := newTarget(t, nil)
	newAgent(t, a, allowAll)
	b.holds("web-1", true)
	b.get("http://web-1:"+port+"/metrics").ok(t, "up 1")
	conn := rawConn(t, b.addr)
	fmt.Fprintf(conn, "CONNECT web-1:%s HTTP/1.1\r\nHost: web-1\r\n\r\nGET /metrics HTTP/1.1\r\nHost: web-1\r\nConnection: close\r\n\r\n", port)
	r := bufio.NewReader(conn)
	if got := readAnswer(r, http.MethodConnect); got.code != http.StatusOK {
		t.Fatalf("CONNECT: %d %q %v", got.code, got.reason, got.err)
	}
	readAnswer(r, http.MethodGet).ok(t, "up 1")
	alike(t, discoveryPaths, a, b)

	// Wrong credentials don't keep a proxy from its own agents, and the log tells.
	if err := os.WriteFile(password, []byte("wrong"), 0o600); err != nil {
		t.Fatal(err)
	}
	alone := newProxy(t, func(c *server.Config) {
		secured(c)
		c.Cluster.Endpoints, c.Cluster.ListenAddress = []string{e.URL}, "127.0.0.1:0"
	})
	alone.logs.wait(t, "etcd can't be reached", "authentication failed")
	newAgent(t, alone, func(c *agent.Config) { c.Name = "web-2"; allowAll(c) })
	alone.get("http://web-2:"+port+"/metrics").ok(t, "up 1")
}

// clusterAuthority is a certificate for this host, and the authority that it is from.
type clusterAuthority struct{ authority, cert, key string }

func newClusterAuthority(t *testing.T) clusterAuthority {
	t.Helper()
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, // etcd takes it for a user's name where there is none
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := write("cert.pem", "CERTIFICATE", der)
	return clusterAuthority{cert, cert, write("key.pem", "EC PRIVATE KEY", keyDER)}
}

// Names that are claimed through two proxies at the same moment are settled alike, and of
// two processes of one name one stays.
func TestClusterSettles(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	a, b := newMember(t, e, nil), newMember(t, e, nil)
	for i := range 5 {
		name := fmt.Sprintf("web-%d", i)
		claims := []struct {
			p              *testProxy
			name, instance string
			reg            protocol.Registration
		}{
			{a, name, "aaaa", protocol.Registration{Targets: []protocol.Target{{Name: "node", Path: "/metrics"}}}},
			{b, "node." + name, "bbbb", protocol.Registration{}},
		}
		if i%2 == 1 {
			claims[1].name, claims[1].reg = name, claims[0].reg
		}
		var sessions [2]*protocol.Session
		for j, c := range claims {
			sessions[j] = dial(t, c.p, c.name, c.instance)
		}
		var refused [2]error
		var both sync.WaitGroup
		for j, c := range claims {
			both.Go(func() { refused[j] = sessions[j].Register(t.Context(), &c.reg) })
		}
		both.Wait()
		eventually(t, "one of two has the name", func() bool {
			alive := 0
			for j := range sessions {
				if refused[j] == nil && sessions[j].Err() == nil {
					alive++
				}
			}
			return alive == 1
		})
		alike(t, []string{"/clients", "/targets"}, a, b)
		for _, s := range sessions {
			s.Close()
		}
	}
}

// Many agents that come at once take few transactions.
func TestClusterManyAgents(t *testing.T) {
	t.Parallel()
	n := 200
	if given := os.Getenv("CULVERT_TEST_AGENTS"); given != "" { // for a look at the figures
		fmt.Sscan(given, &n)
	}
	e := externaltest.StartEtcd(t)
	a := newMember(t, e, func(c *server.Config) { c.MaxHandshakes = n })
	b := newMember(t, e, nil)
	sessions := make([]*protocol.Session, n)
	var dialling sync.WaitGroup
	start := time.Now()
	for i := range sessions {
		dialling.Go(func() {
			s, err := tryDial(a, fmt.Sprintf("web-%d", i), "aaaa")
			if err == nil {
				sessions[i] = s
				err = s.Register(t.Context(), &protocol.Registration{Labels: map[string]string{"site": "berlin"}})
			}
			if err != nil {
				t.Error(err)
			}
		})
	}
	dialling.Wait()
	t.Logf("%d agents registered within %s", n, time.Since(start).Round(time.Millisecond))
	writes := func() (n int) {
		_, after, _ := strings.Cut(a.get("/metrics").body, "\nculvert_proxy_cluster_etcd_writes_total ")
		fmt.Sscan(after, &n)
		return n
	}
	eventually(t, "the other proxy knows them", func() bool {
		return strings.Contains(b.get("/metrics").body, fmt.Sprintf("culvert_proxy_agents{state=\"connected\"} %d", n))
	})
	t.Logf("the other proxy knew them %s after the first, %d transactions", time.Since(start).Round(time.Millisecond), writes())
	if got := writes(); got > n/2 {
		t.Errorf("%d transactions for %d agents", got, n)
	}
	a.stop()
	eventually(t, "the other proxy knows that they are lost", func() bool {
		return strings.Contains(b.get("/metrics").body, fmt.Sprintf("culvert_proxy_agents{state=\"lost\"} %d", n))
	})
	for _, s := range sessions {
		s.Close()
	}
}

// gate is the way to etcd of one proxy.
type gate struct {
	net.Listener
	target string
	tasks  sync.WaitGroup

	mu     sync.Mutex // protects what follows
	closed bool
	conns  []net.Conn
}

func newGate(t *testing.T, target string) *gate {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{Listener: l, target: target}
	t.Cleanup(func() { l.Close(); g.shut(true); g.tasks.Wait() })
	g.tasks.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", target)
			if err != nil {
				near.Close()
				continue
			}
			g.mu.Lock()
			if g.closed {
				near.Close()
				far.Close()
			}
			g.conns = append(g.conns, near, far)
			g.mu.Unlock()
			g.tasks.Go(func() { io.Copy(near, far); near.Close() })
			g.tasks.Go(func() { io.Copy(far, near); far.Close() })
		}
	})
	return g
}

// shut lets nothing through any more, or again.
func (g *gate) shut(closed bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = closed
	for _, c := range g.conns {
		c.Close()
	}
	g.conns = nil
}

// A proxy that can't reach etcd is gone for the others, and goes on by itself. When it is
// back it catches up, even where etcd has compacted what it missed.
func TestClusterCutOff(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	way := newGate(t, strings.TrimPrefix(e.URL, "http://"))
	cut := newMember(t, e, func(c *server.Config) { c.Cluster.Endpoints = []string{"http://" + way.Addr().String()} })
	other := newMember(t, e, func(c *server.Config) { c.ReconnectWait = -1 })
	_, port := newTarget(t, nil)
	newAgent(t, cut, func(c *agent.Config) { c.Name = "here"; allowAll(c) })
	newAgent(t, other, func(c *agent.Config) { c.Name = "there"; allowAll(c) })
	gone := newAgent(t, other, func(c *agent.Config) { c.Name = "gone"; allowAll(c) })
	other.holds("here", true)
	cut.holds("there", true)
	cut.holds("gone", true)
	way.shut(true)
	other.holds("here", false) // its lease has ended
	other.get("http://here:"+port+"/metrics").refused(t, http.StatusServiceUnavailable, protocol.CodeAgentOffline)
	cut.get("http://here:"+port+"/metrics").ok(t, "up 1")
	cut.get("http://there:"+port+"/metrics").ok(t, "up 1")
	gone.stop()
	if got := other.send(http.MethodDelete, "/api/v1/agents/gone"); got.code != http.StatusNoContent {
		t.Fatalf("DELETE: %d %s", got.code, got.body)
	}
	newAgent(t, other, func(c *agent.Config) { c.Name = "late"; allowAll(c) })
	client := etcdClient(t, e)
	eventually(t, "the newcomer is in etcd", func() bool {
		got, err := client.Get(t.Context(), "/culvert/fleet/agents/late")
		return err == nil && len(got.Kvs) == 1
	})
	now, err := client.Get(t.Context(), "/culvert/fleet/secret")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Compact(t.Context(), now.Header.Revision); err != nil {
		t.Fatal(err)
	}
	way.shut(false)
	for _, p := range []*testProxy{cut, other} {
		p.holds("here", true)
		p.holds("there", true)
		p.holds("late", true)
		eventually(t, "the agent is forgotten", func() bool { return !strings.Contains(p.get("/clients").body, `"gone"`) })
	}
	alike(t, discoveryPaths, cut, other)
	other.get("http://here:"+port+"/metrics").ok(t, "up 1")
	cut.get("http://late:"+port+"/metrics").ok(t, "up 1")
}
