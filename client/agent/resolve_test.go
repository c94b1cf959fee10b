package agent_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/proxy/server"
)

// resolver is a name server whose answers can be changed.
type resolver struct {
	mu    sync.Mutex // protects what follows
	found []netip.Addr
	err   error
}

func (n *resolver) set(err error, addresses ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.found, n.err = nil, err
	for _, a := range addresses {
		n.found = append(n.found, netip.MustParseAddr(a))
	}
}

func (n *resolver) lookup(_ context.Context, host string) ([]netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if host != "proxies.test" {
		return nil, errors.New("no such host")
	}
	return n.found, n.err
}

// With ResolveAll, each address of a proxy's host has a link of its own.
func TestResolveAll(t *testing.T) {
	t.Parallel()
	first := newProxy(t, nil)
	_, port, _ := net.SplitHostPort(first.addr)
	at := func(address string) *testProxy {
		l, err := net.Listen("tcp", net.JoinHostPort(address, port))
		if err != nil {
			t.Skipf("this host has no second loopback address with port %s free: %v", port, err)
		}
		l.Close()
		return newProxy(t, func(c *server.Config) { c.ListenAddresses = []string{net.JoinHostPort(address, port)} })
	}
	second := at("127.0.0.2")
	dns := new(resolver)
	dns.set(nil, "127.0.0.1", "127.0.0.2", "::ffff:127.0.0.1")
	base := "http://proxies.test:" + port
	a := startAgent(t, nil, func(c *agent.Config) {
		c.ProxyURLs, c.ResolveAll, c.LookupHost = []string{base}, true, dns.lookup
	})
	connected := func(addresses ...string) {
		t.Helper()
		var want []string
		for _, address := range addresses {
			want = append(want, base+" at "+address)
		}
		eventually(t, "connected to "+strings.Join(addresses, " and "), func() bool {
			got := a.Connected()
			slices.Sort(got)
			return slices.Equal(got, want)
		})
	}
	look := func() { // as it does by itself every 30 s
		t.Helper()
		if err := a.Reload(a.config(nil)); err != nil {
			t.Fatal(err)
		}
	}
	connected("127.0.0.1", "127.0.0.2")

	third := at("127.0.0.3")
	dns.set(nil, "127.0.0.1", "127.0.0.2", "127.0.0.3")
	look()
	connected("127.0.0.1", "127.0.0.2", "127.0.0.3")

	// No answer changes nothing, and neither does an address that has gone while the
	// proxy there is alive.
	dns.set(errors.New("no answer"))
	look()
	a.logs.wait(t, "can't be looked up")
	dns.set(nil, "127.0.0.2", "127.0.0.3")
	look()
	connected("127.0.0.1", "127.0.0.2", "127.0.0.3")
	first.stop()
	connected("127.0.0.2", "127.0.0.3")
	look()
	eventually(t, "the address that has gone is left alone", func() bool {
		_, body := second.get("http://agent.web-1/metrics")
		return strings.Contains(body, `127.0.0.2"`) && !strings.Contains(body, `127.0.0.1"`)
	})
	for _, p := range []*testProxy{second, third} {
		p.want("http://agent.web-1/metrics", 200, "culvert_client_connected")
	}
	if got := a.logs.count("level=WARN", "127.0.0.1"); got > 3 {
		t.Errorf("%d warnings of the address that has gone", got)
	}
}

// Two addresses of one proxy get one session.
func TestResolveAllSameProxy(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.ListenAddresses = []string{"0.0.0.0:0"} })
	_, port, _ := net.SplitHostPort(p.addr)
	dns := new(resolver)
	dns.set(nil, "127.0.0.1", "127.0.0.2")
	a := startAgent(t, nil, func(c *agent.Config) {
		c.ProxyURLs, c.ResolveAll, c.LookupHost = []string{"http://proxies.test:" + port}, true, dns.lookup
	})
	a.logs.wait(t, "msg=Connected")
	a.logs.wait(t, "level=DEBUG", "Not needed", "leads to the same proxy")
	if got := a.Connected(); len(got) != 1 {
		t.Errorf("connected: %q, want one", got)
	}
	if got := a.logs.count("level=WARN"); got != 0 {
		t.Errorf("%d warnings", got)
	}
}

func TestResolveAllWithPushes(t *testing.T) {
	_, err := agent.New(agent.Config{Name: "web-1", ProxyURLs: []string{"http://proxies.test"}, ResolveAll: true, Push: agent.Push{StoragePath: t.TempDir(), Relay: agent.RelayAll}})
	if err == nil || !strings.Contains(err.Error(), "--push.relay=first") {
		t.Errorf("got %v", err)
	}
}

// eventually polls what has no event to wait for.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, patience)
		}
	}
}
