package protocol_test

import (
	"bufio"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// front is a server that answers the handshake as it is told; what it leaves
// alone goes to the real Accept.
type front struct {
	*httptest.Server
	mu       sync.Mutex // protects what follows
	requests []*http.Request
	sessions []*protocol.Session
}

// newFront starts a front. answer returns true when it has answered.
func newFront(t testing.TB, answer func(http.ResponseWriter, *http.Request) bool) *front {
	f := new(front)
	f.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		f.requests = append(f.requests, r)
		f.mu.Unlock()
		if answer != nil && answer(w, r) {
			return
		}
		transport, refusal := protocol.CheckUpgrade(r)
		if refusal != nil {
			refusal.Write(w)
			return
		}
		s, err := protocol.Accept(w, r, transport, "proxy-1", protocol.SessionConfig{})
		if err != nil {
			t.Errorf("accept: %v", err)
			return
		}
		f.mu.Lock()
		f.sessions = append(f.sessions, s)
		f.mu.Unlock()
	}))
	t.Cleanup(func() {
		f.CloseClientConnections()
		f.Close()
		f.mu.Lock()
		defer f.mu.Unlock()
		for _, s := range f.sessions {
			s.Close()
		}
	})
	return f
}

func (f *front) dialer(path string) *protocol.Dialer {
	u, _ := url.Parse(f.URL + path)
	return &protocol.Dialer{ProxyURL: u, Agent: "web-1", Instance: "6f1c", Timeout: patience}
}

// asked returns the Upgrade headers of the requests so far.
func (f *front) asked() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []string
	for _, r := range f.requests {
		all = append(all, r.Header.Get("Upgrade"))
	}
	return strings.Join(all, " ")
}

func (f *front) last() *http.Request {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.requests[len(f.requests)-1]
}

func isRaw(r *http.Request) bool { return r.Header.Get("Upgrade") == protocol.UpgradeToken }

func dial(t testing.TB, d *protocol.Dialer) *protocol.Session {
	t.Helper()
	s, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestDialSendsWhatTheHandshakeNeeds(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			f := newFront(t, func(w http.ResponseWriter, r *http.Request) bool {
				if isRaw(r) && transport == "websocket" {
					w.WriteHeader(http.StatusBadGateway)
					return true
				}
				return false
			})
			d := f.dialer("/monitoring/culvert/")
			d.ProxyURL.User = url.UserPassword("web", "se:cret")
			d.Header = http.Header{"X-Tenant": {"a"}}
			if s := dial(t, d); s.Transport != transport || s.Proxy != "proxy-1" {
				t.Errorf("transport %q, proxy %q", s.Transport, s.Proxy)
			}
			r := f.last()
			user, password, _ := r.BasicAuth()
			if r.RequestURI != "/monitoring/culvert/tunnel" || user != "web" || password != "se:cret" {
				t.Errorf("asked for %q as %q, %q", r.RequestURI, user, password)
			}
			if r.Header.Get("Culvert-Agent") != "web-1" || r.Header.Get("Culvert-Instance") != "6f1c" || r.Header.Get("X-Tenant") != "a" {
				t.Errorf("header %v", r.Header)
			}
			if len(d.Header) != 1 {
				t.Errorf("the caller's header was changed: %v", d.Header)
			}
			d.Header.Set("Authorization", "Bearer token")
			dial(t, d)
			if got := f.last().Header.Get("Authorization"); got != "Bearer token" {
				t.Errorf("Authorization %q beside one of the caller's own", got)
			}
		})
	}
}

func TestDialFallsBackAndRemembers(t *testing.T) {
	refusals := map[string]func(http.ResponseWriter){
		"no-upgrade": func(w http.ResponseWriter) {
			protocol.Refusef(http.StatusBadRequest, protocol.CodeNoUpgrade, "lost").Write(w)
		},
		"502 of something": func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) },
		"200 of something": func(w http.ResponseWriter) { io.WriteString(w, "<html>") },
		"403 of something": func(w http.ResponseWriter) { w.WriteHeader(http.StatusForbidden) },
		"101 to something": func(w http.ResponseWriter) {
			w.Header().Set("Connection", "Upgrade")
			w.Header().Set("Upgrade", "h2c")
			w.WriteHeader(http.StatusSwitchingProtocols)
		},
	}
	for name, refuse := range refusals {
		t.Run(name, func(t *testing.T) {
			var rawWorks, nothingWorks atomic.Bool
			f := newFront(t, func(w http.ResponseWriter, r *http.Request) bool {
				if isRaw(r) && !rawWorks.Load() || nothingWorks.Load() {
					refuse(w)
					return true
				}
				return false
			})
			d := f.dialer("")
			if s := dial(t, d); s.Transport != "websocket" {
				t.Errorf("transport %q", s.Transport)
			}
			dial(t, d)
			if got, want := f.asked(), "culvert/1 websocket websocket"; got != want {
				t.Errorf("asked for %q, want %q", got, want)
			}
			// When the remembered one fails, both are tried again from the start.
			nothingWorks.Store(true)
			if _, err := d.Dial(t.Context()); err == nil {
				t.Fatal("it connected")
			}
			nothingWorks.Store(false)
			rawWorks.Store(true)
			if s := dial(t, d); s.Transport != "upgrade" {
				t.Errorf("transport %q after the way became free", s.Transport)
			}
		})
	}
}

// TestDialWhereTheConnectionIsCut: some firewalls answer an unknown upgrade with
// a reset. A proxy that restarts does too, so it is not remembered.
func TestDialWhereTheConnectionIsCut(t *testing.T) {
	for name, reset := range map[string]bool{"closed": false, "reset": true} {
		t.Run(name, func(t *testing.T) {
			f := newFront(t, func(w http.ResponseWriter, r *http.Request) bool {
				if !isRaw(r) {
					return false
				}
				conn, _, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
					return true
				}
				if reset {
					protocol.Reset(conn)
				}
				conn.Close()
				return true
			})
			d := f.dialer("")
			for range 2 {
				if s := dial(t, d); s.Transport != "websocket" {
					t.Errorf("transport %q", s.Transport)
				}
			}
			if got, want := f.asked(), "culvert/1 websocket culvert/1 websocket"; got != want {
				t.Errorf("asked for %q, want %q", got, want)
			}
		})
	}
}

func TestDialReadsRefusals(t *testing.T) {
	cases := []struct {
		name   string
		status int
		header http.Header
		body   string
		want   protocol.Refusal
		asked  string
	}{
		{"credentials", 401, http.Header{"Culvert-Error": {"unauthorized"}}, "no token\nmore\n",
			protocol.Refusal{Status: 401, Code: protocol.CodeUnauthorized, Message: "no token"}, "culvert/1"},
		{"name", 403, http.Header{"Culvert-Error": {"forbidden"}}, "not web-1\n",
			protocol.Refusal{Status: 403, Code: protocol.CodeForbidden, Message: "not web-1"}, "culvert/1"},
		{"version", 426, http.Header{"Culvert-Error": {"version"}, "Upgrade": {"culvert/2"}, "Connection": {"Upgrade"}}, "culvert/2 only\n",
			protocol.Refusal{Status: 426, Code: protocol.CodeVersion, Message: "culvert/2 only"}, "culvert/1"},
		{"version, header lost", 426, http.Header{"Upgrade": {"culvert/2"}, "Connection": {"Upgrade"}}, "culvert/2 only\n",
			protocol.Refusal{Status: 426, Code: protocol.CodeVersion, Message: "culvert/2 only"}, "culvert/1"},
		{"busy", 429, http.Header{"Culvert-Error": {"busy"}, "Retry-After": {"7"}}, "later\n",
			protocol.Refusal{Status: 429, Code: protocol.CodeBusy, Message: "later", RetryAfter: 7 * time.Second}, "culvert/1"},
		{"draining", 503, http.Header{"Culvert-Error": {"draining"}, "Retry-After": {"0"}}, "going\n",
			protocol.Refusal{Status: 503, Code: protocol.CodeDraining, Message: "going"}, "culvert/1"},
		{"an unknown code", 418, http.Header{"Culvert-Error": {"teapot"}}, "short and stout",
			protocol.Refusal{Status: 418, Code: "teapot", Message: "short and stout"}, "culvert/1"},
		{"a day", 503, http.Header{"Culvert-Error": {"draining"}, "Retry-After": {"86400"}}, "",
			protocol.Refusal{Status: 503, Code: protocol.CodeDraining, RetryAfter: time.Hour}, "culvert/1"},
		{"an age", 503, http.Header{"Culvert-Error": {"draining"}, "Retry-After": {"9999999999"}}, "",
			protocol.Refusal{Status: 503, Code: protocol.CodeDraining, RetryAfter: time.Hour}, "culvert/1"},
		{"nonsense", 503, http.Header{"Culvert-Error": {"draining"}, "Retry-After": {"-5"}}, "",
			protocol.Refusal{Status: 503, Code: protocol.CodeDraining}, "culvert/1"},
		{"a date", 503, http.Header{"Culvert-Error": {"draining"}, "Retry-After": {"Wed, 21 Oct 2026 07:28:00 GMT"}}, "",
			protocol.Refusal{Status: 503, Code: protocol.CodeDraining}, "culvert/1"},
		{"a balancer", 503, http.Header{"Server": {"nginx"}, "Retry-After": {"3"}}, "<html>\n",
			protocol.Refusal{Status: 503, Message: "nginx answered 503 Service Unavailable", RetryAfter: 3 * time.Second}, "culvert/1 websocket"},
		{"a redirect", 302, http.Header{"Location": {"/elsewhere"}}, "",
			protocol.Refusal{Status: 302, Message: `something that is no culvert-proxy answered 302 Found to "/elsewhere"; use that in the proxy's URL, without /tunnel`}, "culvert/1 websocket"},
		{"another server", 404, http.Header{"Location": {"/elsewhere"}}, "",
			protocol.Refusal{Status: 404, Message: "something that is no culvert-proxy answered 404 Not Found"}, "culvert/1 websocket"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			f := newFront(t, func(w http.ResponseWriter, r *http.Request) bool {
				for name, values := range c.header {
					w.Header()[name] = values
				}
				w.WriteHeader(c.status)
				io.WriteString(w, c.body)
				return true
			})
			_, err := f.dialer("").Dial(t.Context())
			refusal, ok := protocol.AsRefusal(err)
			if !ok {
				t.Fatalf("%v is no refusal", err)
			}
			if *refusal != c.want {
				t.Errorf("got  %q, Retry-After %s\nwant %q, Retry-After %s", refusal, refusal.RetryAfter, &c.want, c.want.RetryAfter)
			}
			var handshake *protocol.HandshakeError
			if !errors.As(err, &handshake) || (handshake.Before != nil) != (c.asked != "culvert/1") {
				t.Errorf("the error is %#v", err)
			}
			if got := f.asked(); got != c.asked {
				t.Errorf("asked for %q, want %q", got, c.asked)
			}
		})
	}
}

func TestDialRefusesAnotherWebSocketServer(t *testing.T) {
	f := newFront(t, func(w http.ResponseWriter, r *http.Request) bool {
		if isRaw(r) {
			w.WriteHeader(http.StatusBadGateway)
			return true
		}
		r.Header.Del("Sec-WebSocket-Protocol") // Accept then answers without one
		s, err := protocol.Accept(w, r, "websocket", "other", protocol.SessionConfig{})
		if err == nil {
			t.Cleanup(func() { s.Close() })
		}
		return true
	})
	if _, err := f.dialer("").Dial(t.Context()); err == nil || !strings.Contains(err.Error(), protocol.Subprotocol) {
		t.Errorf("%v", err)
	}
}

func TestDialTimeouts(t *testing.T) {
	hang := func(w http.ResponseWriter, r *http.Request) bool {
		<-r.Context().Done()
		return true
	}
	hangInBody := func(w http.ResponseWriter, r *http.Request) bool {
		w.Header().Set("Content-Length", "100")
		w.WriteHeader(http.StatusBadGateway)
		io.WriteString(w, "half a bo")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		return true
	}
	onlyRaw := func(answer func(http.ResponseWriter, *http.Request) bool) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if isRaw(r) {
				return answer(w, r)
			}
			w.WriteHeader(http.StatusBadGateway)
			return true
		}
	}
	onlyWebSocket := func(answer func(http.ResponseWriter, *http.Request) bool) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if isRaw(r) {
				w.WriteHeader(http.StatusBadGateway)
				return true
			}
			return answer(w, r)
		}
	}
	for name, answer := range map[string]func(http.ResponseWriter, *http.Request) bool{
		"no answer":                    onlyRaw(hang),
		"no answer to WebSocket":       onlyWebSocket(hang),
		"half an answer":               onlyRaw(hangInBody),
		"half an answer to WebSocket":  onlyWebSocket(hangInBody),
		"half an answer to everything": hangInBody,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFront(t, answer)
			d := f.dialer("")
			d.Timeout = 200 * time.Millisecond
			result := make(chan error, 1)
			go func() {
				_, err := d.Dial(context.Background())
				result <- err
			}()
			select {
			case err := <-result:
				var handshake *protocol.HandshakeError
				if !errors.As(err, &handshake) {
					t.Errorf("%v is no HandshakeError", err)
				}
				if strings.Contains(err.Error(), context.DeadlineExceeded.Error()) {
					t.Errorf("%q does not tell the timeout", err)
				}
			case <-time.After(d.Timeout + 4*time.Second):
				t.Errorf("the handshake goes on %s after its timeout of %s", 4*time.Second, d.Timeout)
				f.CloseClientConnections()
				<-result
			}
		})
	}
}

func TestDialEndsWithItsContext(t *testing.T) {
	arrived := make(chan struct{}, 2)
	f := newFront(t, func(w http.ResponseWriter, r *http.Request) bool {
		arrived <- struct{}{}
		<-r.Context().Done()
		return true
	})
	cause := errors.New("reload")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	result := make(chan error, 1)
	go func() {
		_, err := f.dialer("").Dial(ctx)
		result <- err
	}()
	await(t, "request", arrived)
	cancel(cause)
	if err := await(t, "Dial", result); !errors.Is(err, cause) {
		t.Errorf("%v, want %v", err, cause)
	}
}

// TestSessionOutlivesDialContext: the context of Dial is for the handshake.
func TestSessionOutlivesDialContext(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			f := newFront(t, func(w http.ResponseWriter, r *http.Request) bool {
				if isRaw(r) && transport == "websocket" {
					w.WriteHeader(http.StatusBadGateway)
					return true
				}
				return false
			})
			ctx, cancel := context.WithCancel(t.Context())
			d := f.dialer("")
			d.Timeout = time.Second
			s, err := d.Dial(ctx)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			cancel()
			for range 3 {
				if _, err := s.Ping(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			select {
			case <-s.Done():
				t.Errorf("the session ended: %v", s.Err())
			case <-time.After(d.Timeout + 200*time.Millisecond):
			}
		})
	}
}

func TestDialNetworkErrors(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u := &url.URL{Scheme: "http", Host: l.Addr().String()}
	l.Close()
	_, err = (&protocol.Dialer{ProxyURL: u, Agent: "web-1", Instance: "6f1c"}).Dial(t.Context())
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "dial" {
		t.Errorf("%v", err)
	}
	if _, ok := protocol.AsRefusal(err); ok {
		t.Errorf("%v is a refusal", err)
	}
	server, _ := tunnel{tls: true}.serve(t)
	u, _ = url.Parse(server.URL)
	_, err = (&protocol.Dialer{ProxyURL: u, Agent: "web-1", Instance: "6f1c"}).Dial(t.Context())
	var unknown x509.UnknownAuthorityError
	if !errors.As(err, &unknown) {
		t.Errorf("%v", err)
	}
}

// TestDialThroughHTTPProxy runs in a process of its own: the environment counts
// from the first request of a process on.
func TestDialThroughHTTPProxy(t *testing.T) {
	const helper = "CULVERT_TEST_PROXY_URL"
	if target := os.Getenv(helper); target != "" {
		u, _ := url.Parse(target)
		d := &protocol.Dialer{ProxyURL: u, Agent: "web-1", Instance: "6f1c", Timeout: patience}
		if s := dial(t, d); s.Proxy != "proxy-1" {
			t.Errorf("proxy %q", s.Proxy)
		} else if _, err := s.Ping(t.Context()); err != nil {
			t.Error(err)
		}
		return
	}
	f := newFront(t, nil)
	backend, _ := url.Parse(f.URL)
	var seen atomic.Pointer[string]
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var tasks sync.WaitGroup
	tasks.Go(func() { // a forward proxy that passes everything on
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			tasks.Go(func() {
				defer conn.Close()
				r := bufio.NewReader(conn)
				req, err := http.ReadRequest(r)
				if err != nil {
					return
				}
				line := req.Method + " " + req.RequestURI
				seen.Store(&line)
				far, err := net.Dial("tcp", backend.Host)
				if err != nil {
					return
				}
				defer far.Close()
				req.Write(far)
				protocol.Splice(conn, far, patience)
			})
		}
	})
	defer tasks.Wait()
	defer l.Close()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestDialThroughHTTPProxy$")
	cmd.Env = append(os.Environ(), helper+"=http://proxy.example.net:8080/base", "HTTP_PROXY=http://"+l.Addr().String(), "NO_PROXY=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if got := seen.Load(); got == nil || *got != "GET http://proxy.example.net:8080/base/tunnel" {
		t.Errorf("the HTTP proxy was asked for %v", fmt.Sprint(got))
	}
}

func TestCheckUpgrade(t *testing.T) {
	request := func(method, proto string, lines ...string) *http.Request {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(method + " /tunnel " + proto + "\r\nHost: x\r\n" + strings.Join(lines, "\r\n") + "\r\n\r\n")))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	const (
		connection = "Connection: keep-alive, Upgrade"
		key        = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
		ours       = "Sec-WebSocket-Protocol: culvert.v1"
	)
	cases := []struct {
		name      string
		r         *http.Request
		transport string
		code      protocol.Code
	}{
		{"raw", request("GET", "HTTP/1.1", connection, "Upgrade: culvert/1"), "upgrade", ""},
		{"any case", request("GET", "HTTP/1.1", "connection: upgrade", "upgrade: Culvert/1"), "upgrade", ""},
		{"POST", request("POST", "HTTP/1.1", connection, "Upgrade: culvert/1"), "", protocol.CodeMethod},
		{"nothing", request("GET", "HTTP/1.1"), "", protocol.CodeNoUpgrade},
		{"Connection lost", request("GET", "HTTP/1.1", "Upgrade: culvert/1"), "", protocol.CodeNoUpgrade},
		{"Upgrade lost", request("GET", "HTTP/1.1", connection), "", protocol.CodeNoUpgrade},
		{"Upgrade replaced", request("GET", "HTTP/1.1", connection, "Upgrade: websocket"), "", protocol.CodeNoUpgrade},
		{"Upgrade replaced by another", request("GET", "HTTP/1.1", connection, "Upgrade: h2c"), "", protocol.CodeNoUpgrade},
		{"Upgrade empty", request("GET", "HTTP/1.1", connection, "Upgrade:"), "", protocol.CodeNoUpgrade},
		{"version 2 alone", request("GET", "HTTP/1.1", connection, "Upgrade: culvert/2"), "", protocol.CodeVersion},
		{"version 10", request("GET", "HTTP/1.1", connection, "Upgrade: culvert/10"), "", protocol.CodeVersion},
		// The agent's order is its preference (RFC 9110, section 7.8); what we speak is taken.
		{"version 1 or 2", request("GET", "HTTP/1.1", connection, "Upgrade: culvert/1, culvert/2"), "upgrade", ""},
		{"version 2 or 1", request("GET", "HTTP/1.1", connection, "Upgrade: culvert/2, culvert/1"), "upgrade", ""},
		{"version 2 or 1 on two lines", request("GET", "HTTP/1.1", connection, "Upgrade: culvert/2", "Upgrade: culvert/1"), "upgrade", ""},
		{"something else or 1", request("GET", "HTTP/1.1", connection, "Upgrade: websocket, culvert/1"), "upgrade", ""},
		// RFC 9110, section 7.8: a server must ignore Upgrade in HTTP/1.0.
		{"HTTP/1.0", request("GET", "HTTP/1.0", connection, "Upgrade: culvert/1"), "", protocol.CodeNoUpgrade},
		{"WebSocket", request("GET", "HTTP/1.1", connection, "Upgrade: websocket", key, ours), "websocket", ""},
		{"WebSocket with a choice", request("GET", "HTTP/1.1", connection, "Upgrade: WebSocket", key, "Sec-WebSocket-Protocol: culvert.v2, culvert.v1"), "websocket", ""},
		{"WebSocket, version 2", request("GET", "HTTP/1.1", connection, "Upgrade: websocket", key, "Sec-WebSocket-Protocol: culvert.v2"), "", protocol.CodeVersion},
		{"WebSocket of another kind", request("GET", "HTTP/1.1", connection, "Upgrade: websocket", key), "", protocol.CodeVersion},
	}
	status := map[protocol.Code]int{protocol.CodeMethod: 405, protocol.CodeNoUpgrade: 400, protocol.CodeVersion: 426}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			transport, refusal := protocol.CheckUpgrade(c.r)
			if refusal == nil {
				refusal = &protocol.Refusal{}
			}
			if transport != c.transport || refusal.Code != c.code || refusal.Status != status[c.code] {
				t.Errorf("%q, %v; want %q, %q", transport, refusal, c.transport, c.code)
			}
		})
	}
}
