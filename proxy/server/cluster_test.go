package server_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/proxy/server"
)

// etcd is a real etcd of one member. It keeps its address across stop and start.
type etcd struct {
	t    *testing.T
	url  string
	args []string
	cmd  *exec.Cmd
	done chan struct{}
}

func newEtcd(t *testing.T, extra ...string) *etcd {
	t.Helper()
	path, err := exec.LookPath("etcd")
	if err != nil {
		const message = "etcd is not installed: apt-get install etcd-server"
		if os.Getenv("CULVERT_REQUIRE_EXTERNAL") == "1" {
			t.Fatal(message)
		}
		t.Skip(message)
	}
	client, peer := freeAddress(t), freeAddress(t)
	scheme := "http"
	for _, arg := range extra {
		if strings.HasPrefix(arg, "--cert-file") {
			scheme = "https"
		}
	}
	e := &etcd{t: t, url: scheme + "://" + client}
	e.args = append([]string{path, "--data-dir=" + filepath.Join(t.TempDir(), "etcd"), "--unsafe-no-fsync", "--logger=zap", "--log-level=error",
		"--listen-client-urls=" + e.url, "--advertise-client-urls=" + e.url,
		"--listen-peer-urls=http://" + peer, "--initial-advertise-peer-urls=http://" + peer, "--initial-cluster=default=http://" + peer}, extra...)
	e.start()
	t.Cleanup(e.stop)
	return e
}

// freeAddress returns an address of this host that nobody listens on.
func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func (e *etcd) start() {
	e.t.Helper()
	e.cmd = exec.Command(e.args[0], e.args[1:]...)
	e.cmd.Stderr = os.Stderr
	if err := e.cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	done, cmd := make(chan struct{}), e.cmd
	e.done = done
	go func() { defer close(done); cmd.Wait() }()
	address := strings.TrimPrefix(strings.TrimPrefix(e.url, "http://"), "https://")
	eventually(e.t, "etcd listens", func() bool {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			return false
		}
		conn.Close()
		return true
	})
}

func (e *etcd) stop() {
	e.cmd.Process.Kill()
	<-e.done
}

// freeze stops it without closing anything; thaw lets it go on.
func (e *etcd) freeze() { e.cmd.Process.Signal(syscall.SIGSTOP) }
func (e *etcd) thaw()   { e.cmd.Process.Signal(syscall.SIGCONT) }

// client returns a client of the test's own.
func (e *etcd) client() *clientv3.Client {
	e.t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{e.url}, Logger: zap.NewNop()})
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { client.Close() })
	return client
}

// newMember starts a proxy of the cluster.
func newMember(t *testing.T, e *etcd, tweak func(*server.Config)) *testProxy {
	t.Helper()
	p := newProxy(t, func(c *server.Config) {
		c.Cluster.Endpoints = []string{e.url}
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

var discoveryPaths = []string{"/clients", "/targets", "/api/v1/agents", "/clients?match[]={site=\"berlin\"}"}

func TestClusterDiscovery(t *testing.T) {
	t.Parallel()
	e := newEtcd(t)
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
		eventually(t, "both proxies hold it", func() bool { return strings.Count(p.get("/api/v1/agents/both").body, `"id":`) == 2 })
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

var _ = bufio.NewReader
var _ = context.Background
