package agent_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
)

// front is an HTTP middle box before a proxy, or in place of one.
type front struct {
	*httptest.Server
	tried chan struct{} // gets a value for each request

	mu    sync.Mutex // protects what follows
	asked []string   // the Upgrade header of each request
	times []time.Time
}

// newFront starts a middle box. filter may change the request, or answer it
// itself and return false.
func newFront(t *testing.T, p *testProxy, filter func(http.ResponseWriter, *http.Request) bool) *front {
	t.Helper()
	transport := &http.Transport{}
	pass := &httputil.ReverseProxy{Transport: transport, Rewrite: func(pr *httputil.ProxyRequest) {
		u, _ := url.Parse(p.url)
		pr.SetURL(u)
	}}
	f := &front{tried: make(chan struct{}, 100)}
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.asked = append(f.asked, r.Header.Get("Upgrade"))
		f.times = append(f.times, time.Now())
		f.mu.Unlock()
		f.tried <- struct{}{}
		if filter(w, r) {
			pass.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(func() {
		f.CloseClientConnections()
		f.Close()
		transport.CloseIdleConnections()
	})
	return f
}

// upgrades returns what was asked for so far.
func (f *front) upgrades() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(f.asked, " ")
}

// strip takes upgrades away, but those to the given protocol.
func strip(but string) func(http.ResponseWriter, *http.Request) bool {
	return func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Upgrade") != but {
			r.Header.Del("Upgrade")
			r.Header.Del("Connection")
		}
		return true
	}
}

// TestAnswers is the table of answers to the upgrade: what the agent logs, what
// it tries, and that it is in no hurry where only a person can help.
func TestAnswers(t *testing.T) {
	t.Parallel()
	const both, raw = "culvert/1 websocket", "culvert/1" // a poll asks for no upgrade: ""
	ours := func(status int, code protocol.Code, message string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { protocol.Refusef(status, code, "%s", message).Write(w) }
	}
	html := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Server", "nginx/1.27")
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(status)
			fmt.Fprintf(w, "<html><h1>%d</h1></html>", status)
		}
	}
	for _, c := range []struct {
		name     string
		answer   http.HandlerFunc
		upgrades string
		words    []string
	}{
		{"401 of ours", ours(401, protocol.CodeUnauthorized, "no token"), raw, []string{"no token", "credentials"}},
		{"403 of ours", ours(403, protocol.CodeForbidden, "not for this name"), raw, []string{"not for this name", "credentials"}},
		{"400 of ours", ours(400, protocol.CodeInvalid, "a bad name"), raw, []string{"a bad name"}},
		{"426", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Upgrade", "culvert/9")
			w.WriteHeader(426)
		}, raw, []string{"426"}},
		{"426 of ours", ours(426, protocol.CodeVersion, "this proxy speaks culvert/1, not culvert/9"), raw, []string{"culvert/9"}},
		{"401 of a front", html(401), both, []string{"nginx/1.27", "401", "credentials"}},
		{"403 of a front", html(403), both, []string{"nginx/1.27", "403", "credentials"}},
		{"404 of a front", html(404), both + " ", []string{"nginx/1.27", "404", "culvert-proxy at this URL"}},
		{"502 of a front", html(502), both, []string{"nginx/1.27", "502"}},
		{"503 of a front", html(503), both, []string{"nginx/1.27", "503"}},
		{"504 of a front", html(504), both, []string{"nginx/1.27", "504"}},
		{"429 of a front", html(429), both, []string{"nginx/1.27", "429"}},
		{"200 of a web site", html(200), both, []string{"nginx/1.27", "200"}},
		{"redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://login.example/", http.StatusFound)
		}, both, []string{"302"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			f := newFront(t, nil, func(w http.ResponseWriter, r *http.Request) bool { c.answer(w, r); return false })
			a := startAgent(t, nil, func(c *agent.Config) { c.ProxyURLs = []string{f.URL} })
			a.logs.wait(t, append([]string{"level=WARN", "Not connected", "web-1"}, c.words...)...)
			time.Sleep(2 * time.Second) // that nothing happens has no event
			if got := f.upgrades(); got != c.upgrades {
				t.Errorf("the agent asked for %q within 2 s, want %q", got, c.upgrades)
			}
			if n := a.logs.count("level=WARN"); n != 1 {
				t.Errorf("%d warnings of one trouble", n)
			}
		})
	}
}

// TestRetryAfter: the agent waits as long as it is told to.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		status int
		code   protocol.Code
	}{{429, protocol.CodeBusy}, {503, protocol.CodeDraining}} {
		t.Run(string(c.code), func(t *testing.T) {
			t.Parallel()
			p := newProxy(t, nil)
			var once sync.Once
			f := newFront(t, p, func(w http.ResponseWriter, r *http.Request) bool {
				pass := true
				once.Do(func() {
					refusal := protocol.Refusef(c.status, c.code, "later")
					refusal.RetryAfter = time.Second
					refusal.Write(w)
					pass = false
				})
				return pass
			})
			a := startAgent(t, nil, func(c *agent.Config) { c.ProxyURLs = []string{f.URL} })
			a.logs.wait(t, "msg=Connected")
			f.mu.Lock()
			defer f.mu.Unlock()
			if len(f.times) != 2 {
				t.Fatalf("%d tries", len(f.times))
			}
			if gap := f.times[1].Sub(f.times[0]); gap < time.Second {
				t.Errorf("the second try came after %s", gap)
			}
		})
	}
}

// TestFallback: WebSocket is chosen where a front takes the raw upgrade away, and
// remembered.
func TestFallback(t *testing.T) {
	t.Parallel()
	for name, filter := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"stripped": strip("websocket"),
		"refused": func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Upgrade") != "websocket" {
				w.WriteHeader(http.StatusBadGateway)
				return false
			}
			return true
		},
		"replaced": func(_ http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Upgrade") != "websocket" {
				r.Header.Set("Upgrade", "h2c")
			}
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProxy(t, nil)
			f := newFront(t, p, filter)
			a := newAgent(t, p, func(c *agent.Config) { c.ProxyURLs = []string{f.URL} })
			p.want("http://agent.web-1/metrics", 200, "culvert_client_connected")
			a.logs.wait(t, "msg=Connected", "transport=websocket")
			p.get("/api/v1/agents/web-1")
			forget(t, p, "web-1") // which ends the session
			a.logs.waitN(t, 2, "msg=Connected", "transport=websocket")
			if got := f.upgrades(); got != "culvert/1 websocket websocket" {
				t.Errorf("the agent asked for %q", got)
			}
			p.want("http://agent.web-1/metrics", 200, "culvert_client_connected")
		})
	}
	t.Run("neither", func(t *testing.T) {
		t.Parallel()
		p := newProxy(t, nil)
		f := newFront(t, p, strip("neither"))
		a := startAgent(t, p, func(c *agent.Config) { c.ProxyURLs = []string{f.URL} })
		a.logs.wait(t, "Polling", "proxy_http_version 1.1", "proxy_set_header Upgrade $http_upgrade", "proxy_set_header Connection", "upgrade", "websocket")
	})
	t.Run("not without need", func(t *testing.T) {
		t.Parallel()
		p := newProxy(t, nil)
		f := newFront(t, p, strip("culvert/1"))
		a := newAgent(t, p, func(c *agent.Config) { c.ProxyURLs = []string{f.URL} })
		forget(t, p, "web-1")
		a.logs.waitN(t, 2, "msg=Connected", "transport=upgrade")
		if got := f.upgrades(); got != "culvert/1 culvert/1" {
			t.Errorf("the agent asked for %q", got)
		}
	})
	t.Run("a front that is repaired", func(t *testing.T) {
		t.Parallel()
		p := newProxy(t, nil)
		var mu sync.Mutex
		broken := "culvert/1"
		f := newFront(t, p, func(w http.ResponseWriter, r *http.Request) bool {
			mu.Lock()
			defer mu.Unlock()
			if r.Header.Get("Upgrade") == broken {
				r.Header.Del("Upgrade")
				r.Header.Del("Connection")
			}
			return true
		})
		a := newAgent(t, p, func(c *agent.Config) { c.ProxyURLs = []string{f.URL} })
		mu.Lock()
		broken = "websocket"
		mu.Unlock()
		forget(t, p, "web-1")
		a.logs.wait(t, "Polling")
		if err := a.Reload(a.config(nil)); err != nil { // has it look for the tunnel at once
			t.Fatal(err)
		}
		a.logs.wait(t, "msg=Connected", "transport=upgrade")
	})
}

// forget has an operator remove the agent, which ends its session.
func forget(t *testing.T, p *testProxy, name string) {
	t.Helper()
	req, _ := http.NewRequest(http.MethodDelete, "http://"+p.addr+"/api/v1/agents/"+name, nil)
	transport := &http.Transport{DisableKeepAlives: true}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		t.Fatalf("DELETE %s: %s", name, resp.Status)
	}
}
