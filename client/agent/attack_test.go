package agent_test

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
)

// newSession starts the agent "web-1" and returns the proxy's end of its session.
func newSession(t *testing.T, tweak func(*agent.Config)) (*testAgent, *protocol.Session) {
	t.Helper()
	sessions := make(chan *protocol.Session, 10)
	var tasks sync.WaitGroup
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		session, err := protocol.Accept(w, r, "upgrade", "raw", protocol.SessionConfig{})
		if err != nil {
			return
		}
		tasks.Go(func() { // takes the registration
			http.Serve(session.Listener(), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		})
		sessions <- session
	}))
	t.Cleanup(func() { s.Close(); tasks.Wait() })
	a := startAgent(t, nil, func(c *agent.Config) {
		c.ProxyURLs = []string{s.URL}
		tweak(c)
	})
	a.logs.wait(t, "msg=Connected")
	session := received(t, sessions, "the session")
	t.Cleanup(func() { session.Close() })
	return a, session
}

// TestRawStreams: what a proxy, or who pretends to be one, writes to a stream does what
// its request line says, once, and no more.
func TestRawStreams(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex // protects asked
	var asked []string
	base, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		asked = append(asked, r.Method+" "+r.RequestURI+" "+string(body))
	})
	a, session := newSession(t, func(c *agent.Config) {
		var n uint16
		fmt.Sscan(port, &n)
		c.Allow = []agent.PortRange{{First: n, Last: n}}
		c.Targets = []agent.Target{{Name: "node", URL: base + "/metrics"}}
	})
	const drain = "POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
	for what, c := range map[string]struct {
		request string
		status  int    // of the first answer
		code    string // Culvert-Error
		asked   string // of the target
	}{
		"drain of the name agent":   {"POST http://agent/v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 421, "name-mismatch", ""},
		"drain of some name":        {"GET http://x/v1/drain HTTP/1.1\r\nHost: x\r\n\r\n", 421, "name-mismatch", ""},
		"drain of the own name":     {"POST http://web-1/v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 403, "not-allowed", ""},
		"drain of the agent":        {"POST http://agent.web-1/v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 403, "not-allowed", ""},
		"drain of the port":         {"POST http://web-1:PORT/v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 200, "", "POST /v1/drain {}"},
		"drain of nobody":           {"POST http:///v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 400, "bad-request", ""},
		"drain by another method":   {"GET /v1/drain HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not-found", ""},
		"drain by CONNECT":          {"CONNECT /v1/drain HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not-found", ""},
		"drain behind two slashes":  {"POST //web-1/v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 404, "not-found", ""},
		"drain behind dots":         {"POST /x/../v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 404, "not-found", ""},
		"drain that is no JSON":     {"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nno", 400, "invalid", ""},
		"drain in a body":           {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nContent-Length: LEN\r\n\r\n" + drain, 200, "", "POST /a " + drain},
		"drain in a refused body":   {"POST http://node.web-1/metrics HTTP/1.1\r\nHost: x\r\nContent-Length: LEN\r\n\r\n" + drain, 403, "not-allowed", ""},
		"drain in a body of GET":    {"GET http://agent.web-1/other HTTP/1.1\r\nHost: x\r\nContent-Length: LEN\r\n\r\n" + drain, 403, "not-allowed", ""},
		"drain in chunks":           {"POST http://web-1:PORT/a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nHEX\r\n" + drain + "\r\n0\r\n\r\n", 200, "", "POST /a " + drain},
		"drain behind CONNECT":      {"CONNECT node.web-1:80 HTTP/1.1\r\nHost: x\r\nContent-Length: LEN\r\n\r\n" + drain, 403, "not-allowed", ""},
		"drain through CONNECT":     {"CONNECT web-1:PORT HTTP/1.1\r\nHost: x\r\n\r\n" + strings.Replace(drain, "Host: x", "Host: x\r\nConnection: close", 1), 200, "", "POST /v1/drain {}"},
		"CONNECT to other hosts":    {"CONNECT evil:PORT HTTP/1.1\r\nHost: web-1\r\n\r\n", 421, "name-mismatch", ""},
		"CONNECT past an @":         {"CONNECT web-1:PORT@evil:80 HTTP/1.1\r\nHost: web-1\r\n\r\n", 0, "", ""},
		"CONNECT to another port":   {"CONNECT web-1:1 HTTP/1.1\r\nHost: web-1:PORT\r\n\r\n", 403, "not-allowed", ""},
		"a port of too many digits": {"CONNECT web-1:65536PORT HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad-request", ""},
		"a port with a sign":        {"GET http://web-1:+PORT/a HTTP/1.1\r\nHost: x\r\n\r\n", 400, "", ""},
		"a user":                    {"GET http://joe:pw@web-1:PORT/a HTTP/1.1\r\nHost: x\r\n\r\n", 200, "", "GET /a "},
		"a user that is a name":     {"GET http://web-1:PORT@evil/a HTTP/1.1\r\nHost: web-1:PORT\r\n\r\n", 421, "name-mismatch", ""},
		"another scheme":            {"GET ftp://web-1:PORT/a HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad-request", ""},
		"an opaque URL":             {"GET http:web-1:PORT/a HTTP/1.1\r\nHost: web-1:PORT\r\n\r\n", 400, "bad-request", ""},
		"a star":                    {"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad-request", ""},
		"authority form":            {"GET web-1:PORT HTTP/1.1\r\nHost: web-1:PORT\r\n\r\n", 400, "bad-request", ""},
		"another Host":              {"GET http://node.web-1/metrics HTTP/1.1\r\nHost: web-1:PORT\r\n\r\n", 200, "", "GET /metrics "},
		"another path":              {"GET http://node.web-1/v1/drain HTTP/1.1\r\nHost: x\r\n\r\n", 403, "not-allowed", ""},
		"a head without an end":     {"GET http://web-1:PORT/ HTTP/1.1\r\nX-A: " + strings.Repeat("y", 2<<20), 431, "", ""},
		"HTTP/2":                    {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 0, "", ""},
		"no HTTP":                   {"\x16\x03\x01\x00\xf4\x01\x00\x00\xf0\x03\x03\r\n\r\n", 400, "", ""},
	} {
		request := strings.NewReplacer("PORT", port, "LEN", fmt.Sprint(len(drain)), "HEX", fmt.Sprintf("%x", len(drain))).Replace(c.request)
		stream, err := session.Open(t.Context())
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		stream.SetDeadline(time.Now().Add(patience))
		go io.WriteString(stream, request)
		method, _, _ := strings.Cut(request, " ")
		resp, err := http.ReadResponse(bufio.NewReader(stream), &http.Request{Method: method})
		switch {
		case err != nil:
			t.Errorf("%s: %v", what, err)
		case c.status == 0 && resp.StatusCode < 400, c.status != 0 && (resp.StatusCode != c.status || resp.Header.Get("Culvert-Error") != c.code):
			t.Errorf("%s: got %s %q, want %d %q", what, resp.Status, resp.Header.Get("Culvert-Error"), c.status, c.code)
		default: // to the end of the tunnel, for CONNECT
			if method == "CONNECT" && resp.StatusCode == 200 {
				io.Copy(io.Discard, stream)
			}
		}
		stream.Close()
		mu.Lock()
		if got := strings.Join(asked, "; "); got != c.asked {
			t.Errorf("%s: the target was asked for %q, want %q", what, got, c.asked)
		}
		asked = nil
		mu.Unlock()
	}
	if n := a.logs.count("drains this session"); n != 0 || session.Err() != nil {
		t.Errorf("the session was drained, or ended: %v", session.Err())
	}
	if n := a.logs.count("panic"); n != 0 {
		t.Errorf("%d panics", n)
	}
	t.Run("a drain", func(t *testing.T) {
		stream, err := session.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		io.WriteString(stream, drain)
		resp, err := http.ReadResponse(bufio.NewReader(stream), nil)
		if err != nil || resp.StatusCode != http.StatusNoContent {
			t.Fatalf("got %v, %v", resp, err)
		}
		a.logs.wait(t, "drains this session")
	})
}

// TestTreePaths: of a target whose URL ends in /*, all below is asked for as it was
// spelled, and nothing above, in whatever spelling.
func TestTreePaths(t *testing.T) {
	t.Parallel()
	asked := make(chan string, 1)
	base, _ := newTarget(t, func(_ http.ResponseWriter, r *http.Request) { asked <- r.RequestURI })
	_, session := newSession(t, func(c *agent.Config) {
		c.Targets = []agent.Target{{Name: "tree", URL: base + "/tree/*"}, {Name: "spaced", URL: base + "/a%20tree/*"}, {Name: "all", URL: base + "/*"}, {Name: "exact", URL: base + "/tree/x"}}
	})
	get := func(target string) (int, string) {
		stream, err := session.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		stream.SetDeadline(time.Now().Add(patience))
		fmt.Fprintf(stream, "GET http://%s HTTP/1.1\r\nHost: x\r\n\r\n", target)
		resp, err := http.ReadResponse(bufio.NewReader(stream), nil)
		if err != nil {
			t.Fatalf("%s: %v", target, err)
		}
		select {
		case uri := <-asked:
			return resp.StatusCode, uri
		default:
			return resp.StatusCode, ""
		}
	}
	for _, path := range []string{
		"/tree/", "/tree/a", "/tree/a/b/", "/tree//a", "/tree/a//b", "/tree/...", "/tree/..a", "/tree/a..", "/tree/.a", "/tree/%61", "/tree/a%20b", "/tree/a;b=c",
		"/tree/a%3bb", "/tree/%e2%82%ac", "/tree/a?b=../c", "/tree/a?b=%2e%2e%2f", "/tree/a:b", "/tree/~a", "/tree/a,b@c",
	} {
		if status, uri := get("tree.web-1" + path); status != 200 || uri != path && uri != strings.Replace(path, "../", "..%2F", 1) && uri != strings.Replace(path, "%2e%2e%2f", "..%2F", 1) {
			t.Errorf("%s: %d, and the target was asked for %q", path, status, uri)
		}
	}
	for _, path := range []string{
		"", "/", "/tree", "/treetop/a", "/Tree/a", "//tree/a", "/./tree/a", "/%74ree/a", "/tree%2fa", "/tree%2Fa", "/tree\\a", "/tree;a=b/c", "/tree;/c",
		"/tree/..", "/tree/../", "/tree/../x", "/tree/a/../../x", "/tree/a/..", "/tree/.", "/tree/./a", "/tree/..//x", "/tree//../x", "/tree/../tree/x",
		"/tree/%2e%2e/x", "/tree/%2E%2E/x", "/tree/.%2e/x", "/tree/%2e./x", "/tree/%2e/x", "/tree/%252e%252e/x", "/tree/%25252e%25252e/x", "/tree/%2525252e%2525252e/x",
		"/tree/..%2fx", "/tree/..%2Fx", "/tree/%2f..%2fx", "/tree/%2e%2e%2fx", "/tree/%252f..%252fx", "/tree/a%2fb", "/tree/a%252fb",
		"/tree/..\\x", "/tree/..%5cx", "/tree/..%5Cx", "/tree/a%5c..%5c..%5cx", "/tree/%255c..%255cx", "/tree/a\\b",
		"/tree/..;/x", "/tree/..;a=b/x", "/tree/.;/x", "/tree/..%3b/x", "/tree/..%3Ba=b/x", "/tree/%2e%2e;/x", "/tree/%2e%2e%3b/x",
		"/tree/..%00/x/../../", "/tree/%u002e%u002e/x", "/tree/%c0%ae%c0%ae%2fx", "/tree/%", "/tree/%2", "/tree/%zz/../x",
	} {
		if status, uri := get("tree.web-1" + path); status < 400 || uri != "" {
			t.Errorf("%s: %d, and the target was asked for %q", path, status, uri)
		}
	}
	for target, want := range map[string]string{
		"spaced.web-1/a%20tree/b": "/a%20tree/b", "spaced.web-1/a+tree/b": "", "spaced.web-1/a%20tree/../b": "",
		"all.web-1/": "/", "all.web-1/a/b": "/a/b", "all.web-1/..": "", "all.web-1/a/%2e%2e/b": "", "all.web-1//evil/b": "//evil/b",
		"exact.web-1/tree/x": "/tree/x", "exact.web-1/tree/%78": "/tree/x", "exact.web-1/tree/y/../x": "", "exact.web-1/tree/x/": "", "exact.web-1/tree//x": "", "exact.web-1/tree/x;a=b": "", "exact.web-1/tree%2fx": "/tree/x", "exact.web-1/tree/x%00": "",
	} {
		if status, uri := get(target); uri != want || (status == 200) != (want != "") {
			t.Errorf("%s: %d, and the target was asked for %q, want %q", target, status, uri, want)
		}
	}
}

// TestAgentTargetStaysIn: the scraper of the target agent has no say in which files are
// read, and a file's name is no more than a label's value.
func TestAgentTargetStaysIn(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	dir := t.TempDir()
	for name, text := range map[string]string{"in/a.prom": "inside 1\n", "in/b\"} 1\nevil 1\n.prom": "inside{b=\"1\"} 1\n", "out/c.prom": "outside 1\n"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Skip(err)
		}
	}
	newAgent(t, p, func(c *agent.Config) { c.Textfile.Directories = []string{filepath.Join(dir, "in")} })
	for _, target := range []string{"/metrics", "/metrics?directory=../out", "/metrics?textfile.directory=" + dir + "/out", "/metrics?collect[]=../out", "/metrics?file=../out/c.prom"} {
		code, body := p.get("http://agent.web-1" + target)
		if code != 200 || !strings.Contains(body, "\ninside 1\n") || strings.Contains(body, "outside") || strings.Contains(body, "\nevil") || !strings.Contains(body, `in/b\"} 1\nevil 1\n.prom"`) {
			t.Errorf("%s: %d %s", target, code, body)
		}
	}
	for _, path := range []string{"/metrics/../out/c.prom", "/metrics/..%2fout", "/metrics%2f..%2fout", "/metrics;/../out", "/..", "/out/c.prom", "//metrics", "/metrics//", "/metrics\\..\\out", "/%2e%2e/out"} {
		p.want("http://agent.web-1"+path, 403, "/metrics")
	}
}
