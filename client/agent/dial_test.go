package agent_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/client/httpclient"
)

// names is what the tests' name server answers, by name without the final dot. Names
// that are not there don't exist.
var names = map[string]func() []string{}

// addName has a name lead to the addresses. A name belongs to one test.
func addName(name string, addresses ...string) {
	namesMu.Lock()
	defer namesMu.Unlock()
	names[name] = func() []string { return addresses }
}

var namesMu sync.Mutex

// serveNames has the process ask a real name server of its own, on loopback: the names of
// the tests lead where the tests say.
func serveNames() {
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go func() {
		packet := make([]byte, 1500)
		for {
			n, from, err := conn.ReadFrom(packet)
			if err != nil {
				panic(err)
			}
			var m dnsmessage.Message
			if m.Unpack(packet[:n]) != nil || len(m.Questions) != 1 {
				continue
			}
			q := m.Questions[0]
			m = dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, RecursionAvailable: true}, Questions: m.Questions}
			namesMu.Lock()
			addresses := names[strings.ToLower(strings.TrimSuffix(q.Name.String(), "."))]
			namesMu.Unlock()
			if addresses == nil {
				m.RCode = dnsmessage.RCodeNameError
			} else {
				for _, text := range addresses() {
					a := netip.MustParseAddr(text)
					header := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, Type: q.Type}
					switch {
					case q.Type == dnsmessage.TypeA && a.Is4():
						m.Answers = append(m.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AResource{A: a.As4()}})
					case q.Type == dnsmessage.TypeAAAA && a.Is6():
						m.Answers = append(m.Answers, dnsmessage.Resource{Header: header, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
					}
				}
			}
			answer, err := m.Pack()
			if err != nil {
				panic(err)
			}
			conn.WriteTo(answer, from)
		}
	}()
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", conn.LocalAddr().String())
	}}
}

// TestNamesLeadAstray: no name leads the agent to an address that hands out credentials,
// is this host, or is no host's; whoever answers for it in DNS.
func TestNamesLeadAstray(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	bad := []string{
		"169.254.169.254", "169.254.170.2", "169.254.0.1", "fe80::1", "fe80::a9fe:a9fe", "fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254",
		"fd00:a9fe:a9fe::1", "fd00:42::42", "100.100.100.200", "192.0.0.192", "168.63.129.16", "0.0.0.0", "0.1.2.3", "::", "224.0.0.1",
		"239.255.255.250", "ff02::1", "ff0e::1", "255.255.255.255", "127.0.0.1", "127.0.1.1", "127.255.255.254", "::1",
		"::ffff:169.254.169.254", "::ffff:127.0.0.1", "::169.254.169.254", "64:ff9b::169.254.169.254", "64:ff9b::7f00:1",
		"64:ff9b:1::169.254.169.254", "64:ff9b:1:a9fe:a9:fe00::", "64:ff9b:1:1:a9:fea9:fe00::", "64:ff9b:1:2:a9:fea9:fe00:0", "2002:a9fe:a9fe::1", "2002:7f00:1::",
	}
	var hosts []agent.Host
	var targets []agent.Target
	for i, address := range bad {
		name := fmt.Sprintf("n%d.astray.test", i)
		addName(name, address)
		addName(fmt.Sprintf("w%d.wild.test", i), address)
		hosts = append(hosts, agent.Host{Name: name}, agent.Host{Name: fmt.Sprintf("alias%d.test", i), Address: name})
		targets = append(targets, agent.Target{Name: fmt.Sprintf("t%d", i), URL: "http://" + name + ":9100/metrics"})
	}
	hosts = append(hosts, agent.Host{Name: "*.wild.test"})
	a := newAgent(t, p, func(c *agent.Config) {
		c.Hosts, c.Targets, c.Allow = hosts, targets, []agent.PortRange{{First: 1, Last: 65535}}
	})
	for i, address := range bad {
		flag := "--scrape.allow-address=" + netip.MustParseAddr(address).Unmap().String()
		for _, target := range []string{
			fmt.Sprintf("http://n%d.astray.test:9100/metrics", i), fmt.Sprintf("http://alias%d.test:9100/metrics", i),
			fmt.Sprintf("http://w%d.wild.test:80/metrics", i), fmt.Sprintf("https://n%d.astray.test:9100/metrics", i), fmt.Sprintf("http://t%d.web-1/metrics", i),
		} {
			code, body := p.getRaw(t, target)
			if code != 403 || !strings.Contains(body, flag+"\n") {
				t.Errorf("%s, which leads to %s: %d %q, want 403 with %s", target, address, code, body, flag)
			}
		}
		if line := p.connect(t, fmt.Sprintf("n%d.astray.test:9100", i)); !strings.HasPrefix(line, "HTTP/1.1 403 not-allowed: ") || !strings.Contains(line, flag) {
			t.Errorf("CONNECT to what leads to %s: %s", address, line)
		}
	}
	want := fmt.Sprintf(`culvert_client_scrapes_total{outcome="not-allowed"} %d`, 6*len(bad))
	p.want("http://agent.web-1/metrics", 200, want)
	a.logs.wait(t, "level=WARN", "A name leads where the agent does not go", "address=169.254.169.254")
	if n := a.logs.count("level=WARN", "A name leads"); n > 2 {
		t.Errorf("%d warnings in the log", n)
	}
}

// getRaw is get in absolute form whatever the scheme: for https a client would use CONNECT.
func (p *testProxy) getRaw(t *testing.T, target string) (int, string) {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", target, u.Host)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Errorf("get %s: %v", target, err)
		return 0, ""
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Errorf("get %s: %v", target, err)
	}
	return resp.StatusCode, string(body)
}

// connect asks for a tunnel and returns the status line.
func (p *testProxy) connect(t *testing.T, authority string) string {
	t.Helper()
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", authority, authority)
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		t.Errorf("CONNECT %s: %v", authority, err)
	}
	return strings.TrimSpace(line)
}

// TestAddressesMeant: what the operator wrote down, or allows, is reached; and the names
// of this host lead to its loopback.
func TestAddressesMeant(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	base, port := newTarget(t, nil)
	addName("local.test", "127.0.0.1")
	addName("web-9", "127.0.0.1")
	addName("db.meant.test", "127.0.0.1")
	addName("mixed.meant.test", "169.254.169.254", "127.0.0.1")
	addName("idp.meant.test", "127.0.0.1")
	configure := func(c *agent.Config) {
		c.Name, c.LocalHost = "web-9", "local.test"
		c.Allow = []agent.PortRange{{First: 1, Last: 65535}}
		c.Hosts = []agent.Host{{Name: "literal.test", Address: "127.0.0.1"}, {Name: "127.0.0.1"}, {Name: "db.meant.test"}, {Name: "mixed.meant.test"}, {Name: "same.test", Address: "localhost"}, {Name: "*.0.1"}}
		c.Targets = []agent.Target{{Name: "literal", URL: base}, {Name: "localhost", URL: "http://localhost:" + port}, {Name: "other", URL: "http://db.meant.test:" + port}, {Name: "own", URL: "http://web-9:" + port}}
	}
	a := startAgent(t, p, configure)
	a.logs.wait(t, "msg=Connected")
	for _, target := range []string{"http://web-9:" + port, "http://literal.test:" + port, "http://127.0.0.1:" + port, "http://same.test:" + port, "http://literal.web-9", "http://localhost.web-9", "http://own.web-9"} {
		p.want(target+"/metrics", 200, "up 1")
	}
	for _, target := range []string{"http://db.meant.test:" + port, "http://mixed.meant.test:" + port, "http://other.web-9"} {
		p.want(target+"/metrics", 403, "--scrape.allow-address=")
	}
	// The scraper wrote this one down: 127.1.0.1 is under *.0.1.
	p.want("http://127.1.0.1:"+port+"/metrics", 403, "--scrape.allow-address=127.1.0.1")
	// A reload counts for connections that are kept, too.
	for range 2 {
		if err := a.Reload(a.config(func(c *agent.Config) {
			configure(c)
			c.AllowAddresses = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
		})); err != nil {
			t.Fatal(err)
		}
		for _, target := range []string{"http://db.meant.test:" + port, "http://mixed.meant.test:" + port, "http://other.web-9"} {
			p.want(target+"/metrics", 200, "up 1")
		}
		if err := a.Reload(a.config(configure)); err != nil {
			t.Fatal(err)
		}
		p.want("http://db.meant.test:"+port+"/metrics", 403, "--scrape.allow-address=127.0.0.1")
	}
}

// TestOwnNameLeadsAstray: --scrape.local-host may be a name, which may lead to this
// host's loopback, and nowhere else that other names may not.
func TestOwnNameLeadsAstray(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	addName("local.astray.test", "169.254.169.254")
	newAgent(t, p, func(c *agent.Config) {
		c.LocalHost = "local.astray.test"
		c.Allow = []agent.PortRange{{First: 1, Last: 65535}}
	})
	p.want("http://web-1:80/latest/meta-data", 403, "--scrape.allow-address=169.254.169.254")
	if line := p.connect(t, "web-1:80"); !strings.HasPrefix(line, "HTTP/1.1 403 not-allowed: ") {
		t.Error(line)
	}
}

// TestRebinding: a name that leads to another address each time it is asked for. What is
// looked at and what is connected to is the same.
func TestRebinding(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	good := httptest.NewUnstartedServer(say("good"))
	ln, err := net.Listen("tcp", "127.0.0.2:0")
	if err != nil {
		t.Skipf("no loopback address 127.0.0.2 here: %v", err)
	}
	good.Listener.Close()
	good.Listener = ln
	good.Config.SetKeepAlivesEnabled(false) // each scrape asks for the name again
	good.Start()
	t.Cleanup(good.Close)
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	evil, err := net.Listen("tcp", "127.0.0.3:"+port)
	if err != nil {
		t.Skip(err)
	}
	var reached atomic.Int64
	var tasks sync.WaitGroup
	t.Cleanup(func() { evil.Close(); tasks.Wait() })
	tasks.Go(func() {
		for {
			conn, err := evil.Accept()
			if err != nil {
				return
			}
			reached.Add(1)
			conn.Close()
		}
	})
	var asked atomic.Int64
	namesMu.Lock()
	names["rebind.test"] = func() []string { return []string{[]string{"127.0.0.2", "127.0.0.3"}[asked.Add(1)/2%2]} }
	namesMu.Unlock()
	newAgent(t, p, func(c *agent.Config) {
		c.Hosts = []agent.Host{{Name: "rebind.test"}}
		c.Targets = []agent.Target{{Name: "named", URL: "http://rebind.test:" + port}}
		c.Allow = []agent.PortRange{{First: 1, Last: 65535}}
		c.AllowAddresses = []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}
	})
	served, refused := 0, 0
	for range 40 {
		for _, target := range []string{"http://rebind.test:" + port + "/", "http://named.web-1/metrics"} {
			switch code, body := p.get(target); code {
			case 200:
				served++
			case 403:
				refused++
			default:
				t.Errorf("%s: %d %s", target, code, body)
			}
		}
	}
	if served == 0 || refused == 0 || reached.Load() != 0 {
		t.Errorf("%d served, %d refused, the closed address reached %d times", served, refused, reached.Load())
	}
}

// TestTokenEndpointRedirects: what an OAuth 2 endpoint redirects to is not what the
// operator wrote down.
func TestTokenEndpointRedirects(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	base, _ := newTarget(t, nil)
	token, _ := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://169.254.169.254/latest/meta-data", http.StatusTemporaryRedirect)
	})
	newAgent(t, p, func(c *agent.Config) {
		hc := httpclient.DefaultConfig
		hc.OAuth2 = &httpclient.OAuth2{ClientID: "me", ClientSecret: "secret", TokenURL: token}
		c.Targets = []agent.Target{{Name: "node", URL: base, HTTP: &hc}}
	})
	p.want("http://node.web-1/metrics", 403, "--scrape.allow-address=169.254.169.254")
}

// TestHTTPProxyLeadsAstray: a target's HTTP proxy, its token endpoint and that one's HTTP
// proxy are names like any other, unless the operator wrote an address.
func TestHTTPProxyLeadsAstray(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	base, port := newTarget(t, nil)
	addName("forward.test", "127.0.0.1")
	oauth2 := func(tokenURL string) *httpclient.Config {
		return &httpclient.Config{OAuth2: &httpclient.OAuth2{ClientID: "me", ClientSecret: "secret", TokenURL: tokenURL}}
	}
	named, err := url.Parse("http://forward.test:" + port)
	if err != nil {
		t.Fatal(err)
	}
	forward := &httpclient.Config{Proxy: httpclient.Proxy{ProxyURL: httpclient.URL{URL: named}}}
	tokenForward := oauth2("http://127.0.0.1:1/")
	tokenForward.OAuth2.Proxy = forward.Proxy
	literal := &httpclient.Config{Proxy: httpclient.Proxy{ProxyURL: httpclient.URL{URL: &url.URL{Scheme: "http", Host: "127.0.0.1:" + port}}}}
	newAgent(t, p, func(c *agent.Config) {
		c.Targets = []agent.Target{
			{Name: "forward", URL: base, HTTP: forward},
			{Name: "token", URL: base, HTTP: oauth2(named.String())},
			{Name: "token-forward", URL: base, HTTP: tokenForward},
			{Name: "literal", URL: "http://nowhere.test/metrics", HTTP: literal},
		}
	})
	for _, name := range []string{"forward", "token", "token-forward"} {
		p.want("http://"+name+".web-1/metrics", 403, "--scrape.allow-address=127.0.0.1")
	}
	p.want("http://literal.web-1/metrics", 200, "up 1")
}

// TestParseAddresses reads what the flag takes.
func TestParseAddresses(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"169.254.7.7": "169.254.7.7/32", "169.254.7.7/16": "169.254.0.0/16", "fd00:ec2::254": "fd00:ec2::254/128", "fe80::/10": "fe80::/10", "0.0.0.0/0": "0.0.0.0/0",
		"": "", "x": "", "1.2.3": "", "1.2.3.4/33": "", "fe80::1%eth0": "", "::ffff:1.2.3.4": "", "::ffff:1.2.3.0/120": "", "localhost": "",
	} {
		got, err := agent.ParseAddresses(in)
		if want == "" && err == nil || want != "" && (err != nil || got.String() != want) {
			t.Errorf("%q: got %s, %v, want %q", in, got, err, want)
		}
	}
}
