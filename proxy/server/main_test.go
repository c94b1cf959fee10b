package server_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait for an event that has to come.
const patience = 10 * time.Second

// testProxy is a real proxy on a port of its own.
type testProxy struct {
	*server.Server
	t    *testing.T
	addr string // of scrapers
	url  string // for agents
	logs *logBuffer
	stop func() // ends it and waits; may be called more than once
}

// newProxy starts a proxy. Its defaults suit tests: no settling, short waits.
func newProxy(t *testing.T, tweak func(*server.Config)) *testProxy {
	t.Helper()
	logs := &logBuffer{}
	config := server.Config{
		ListenAddresses: []string{"127.0.0.1:0"},
		ReconnectWait:   -1,
		ShutdownTimeout: 3 * time.Second,
		Logger:          slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	config.Fleet.SettleTime = -1
	if tweak != nil {
		tweak(&config)
	}
	s, err := server.New(config)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("proxy: Run returned %v", err)
			}
		case <-time.After(30 * time.Second):
			t.Error("proxy: Run did not return")
		}
	})
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			t.Logf("log of the proxy:\n%s", logs)
		}
	})
	return &testProxy{Server: s, t: t, addr: s.Addr(), url: "http://" + s.AgentAddr(), logs: logs, stop: stop}
}

// testAgent is a real agent.
type testAgent struct {
	*agent.Agent
	logs *logBuffer
	stop func() // ends it in good order and waits; may be called more than once
}

// newAgent starts the agent "web-1" of the proxy, and waits until it is connected.
func newAgent(t *testing.T, p *testProxy, tweak func(*agent.Config)) *testAgent {
	t.Helper()
	a := startAgent(t, p, tweak)
	a.logs.wait(t, "msg=Connected")
	return a
}

// startAgent is newAgent without the waiting.
func startAgent(t *testing.T, p *testProxy, tweak func(*agent.Config)) *testAgent {
	t.Helper()
	logs := &logBuffer{}
	config := agent.Config{
		Name:             "web-1",
		LocalHost:        "127.0.0.1",
		RetryInitialWait: 10 * time.Millisecond,
		RetryMaxWait:     50 * time.Millisecond,
		ShutdownTimeout:  2 * time.Second,
		Logger:           slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	if p != nil {
		config.ProxyURLs = []string{p.url}
	}
	if tweak != nil {
		tweak(&config)
	}
	a, err := agent.New(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("agent: Run returned %v", err)
			}
		case <-time.After(30 * time.Second):
			t.Error("agent: Run did not return")
		}
	})
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			t.Logf("log of the agent:\n%s", logs)
		}
	})
	return &testAgent{Agent: a, logs: logs, stop: stop}
}

// allowAll lets the agent be scraped on all ports.
func allowAll(c *agent.Config) { c.Allow = []agent.PortRange{{First: 1, Last: 65535}} }

// dial opens a session to the proxy as an agent would, without registering.
func dial(t *testing.T, p *testProxy, name, instance string) *protocol.Session {
	t.Helper()
	s, err := tryDial(p, name, instance)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func tryDial(p *testProxy, name, instance string) (*protocol.Session, error) {
	u, err := url.Parse(p.url)
	if err != nil {
		return nil, err
	}
	d := &protocol.Dialer{ProxyURL: u, Agent: name, Instance: instance}
	return d.Dial(context.Background())
}

// register opens a session and registers.
func register(t *testing.T, p *testProxy, name, instance string, reg protocol.Registration) *protocol.Session {
	t.Helper()
	s := dial(t, p, name, instance)
	if err := s.Register(t.Context(), &reg); err != nil {
		t.Fatalf("register %q: %v", name, err)
	}
	return s
}

// wantRefusal checks that err is a refusal of the status and code whose message
// holds all the words.
func wantRefusal(t *testing.T, err error, status int, code protocol.Code, words ...string) {
	t.Helper()
	r, ok := protocol.AsRefusal(err)
	if !ok {
		t.Fatalf("got error %v, want the refusal %d %s", err, status, code)
	}
	if r.Status != status || r.Code != code {
		t.Errorf("got the refusal %v, want %d %s", r, status, code)
	}
	for _, word := range words {
		if !strings.Contains(r.Message, word) {
			t.Errorf("the refusal %q does not say %q", r.Message, word)
		}
	}
}

// newTarget starts a target and returns its URL and port.
func newTarget(t *testing.T, handler http.HandlerFunc) (base, port string) {
	t.Helper()
	if handler == nil {
		handler = func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "up 1") }
	}
	s := httptest.NewServer(handler)
	t.Cleanup(func() {
		s.CloseClientConnections() // pooled ones of agents that are still running
		s.Close()
	})
	u, _ := url.Parse(s.URL)
	return s.URL, u.Port()
}

// say returns a handler that answers with the text.
func say(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, text) }
}

// answer is a response as it stood on the wire.
type answer struct {
	code   int
	reason string // the reason phrase of the status line
	header http.Header
	body   string
	err    error // of reading the head or the body
	raw    *http.Response
}

// raw sends the text and reads one response.
func raw(t *testing.T, addr, request string) answer {
	t.Helper()
	conn := rawConn(t, addr)
	defer conn.Close()
	method, _, _ := strings.Cut(request, " ")
	io.WriteString(conn, request)
	return readAnswer(bufio.NewReader(conn), method)
}

// rawConn connects to addr; the connection has a deadline.
func rawConn(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	conn.SetDeadline(time.Now().Add(patience))
	t.Cleanup(func() { conn.Close() })
	return conn
}

func readAnswer(r *bufio.Reader, method string) answer {
	resp, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		return answer{err: err}
	}
	a := answer{code: resp.StatusCode, header: resp.Header, raw: resp}
	a.reason = strings.TrimPrefix(strings.TrimPrefix(resp.Status, strconv.Itoa(resp.StatusCode)), " ")
	if method == http.MethodConnect && a.code == http.StatusOK {
		return a
	}
	body, err := io.ReadAll(resp.Body)
	a.body, a.err = string(body), err
	return a
}

// get sends a GET whose request target is given as it is, with extra header lines.
func (p *testProxy) get(target string, header ...string) answer {
	p.t.Helper()
	return p.send(http.MethodGet, target, header...)
}

func (p *testProxy) send(method, target string, header ...string) answer {
	p.t.Helper()
	host := p.addr
	if u, err := url.Parse(target); err == nil && u.Host != "" {
		host = u.Host
	}
	if method == http.MethodConnect {
		host = target
	}
	lines := []string{method + " " + target + " HTTP/1.1"}
	for _, h := range header {
		if strings.HasPrefix(h, "Host:") {
			host = ""
		}
	}
	if host != "" {
		lines = append(lines, "Host: "+host)
	}
	lines = append(lines, header...)
	return raw(p.t, p.addr, strings.Join(lines, "\r\n")+"\r\n\r\n")
}

// ok checks a good answer with the body.
func (a answer) ok(t *testing.T, body string) {
	t.Helper()
	if a.err != nil || a.code != http.StatusOK || !strings.Contains(a.body, body) {
		t.Errorf("got %d %q, body %q, error %v; want 200 with %q", a.code, a.reason, a.body, a.err, body)
	}
}

// refused checks that the answer is a refusal with its reason in the header, the
// status line and the body.
func (a answer) refused(t *testing.T, status int, code protocol.Code, words ...string) {
	t.Helper()
	if a.err != nil {
		t.Errorf("got the error %v (%d %q), want %d %s", a.err, a.code, a.reason, status, code)
		return
	}
	if a.code != status || a.header.Get(protocol.HeaderError) != string(code) {
		t.Errorf("got %d %q with %s %q, want %d %s", a.code, a.reason, protocol.HeaderError, a.header.Get(protocol.HeaderError), status, code)
	}
	if !strings.HasPrefix(a.reason, string(code)+": ") {
		t.Errorf("the reason phrase %q does not start with %q", a.reason, string(code)+": ")
	}
	if a.raw.Request.Method != http.MethodHead && printable(strings.TrimSpace(a.body)) != strings.TrimPrefix(a.reason, string(code)+": ") {
		t.Errorf("the body %q is not what the reason phrase %q says", a.body, a.reason)
	}
	for _, word := range words {
		if !strings.Contains(a.reason, word) {
			t.Errorf("the reason phrase %q does not say %q", a.reason, word)
		}
	}
}

// printable is what a status line can show of s.
func printable(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' {
			return '?'
		}
		return c
	}, s)
}

// relay is a piece of network between agent and proxy that can fail.
type relay struct {
	ln     net.Listener
	url    string
	target string
	tasks  sync.WaitGroup

	mu     sync.Mutex // protects what follows
	conns  []net.Conn
	frozen chan struct{} // closed: nothing goes through any more
}

// newRelay starts a relay to the proxy's address for agents.
func newRelay(t *testing.T, p *testProxy) *relay {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{ln: ln, url: "http://" + ln.Addr().String(), target: p.AgentAddr(), frozen: make(chan struct{})}
	r.tasks.Go(func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", r.target)
			if err != nil {
				near.Close()
				continue
			}
			r.mu.Lock()
			r.conns = append(r.conns, near, far)
			r.mu.Unlock()
			r.tasks.Go(func() { r.pass(near, far) })
			r.tasks.Go(func() { r.pass(far, near) })
		}
	})
	t.Cleanup(func() {
		r.cut()
		r.tasks.Wait()
	})
	return r
}

func (r *relay) pass(dst, src net.Conn) {
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		select {
		case <-r.frozen:
			continueReading(src)
			return
		default:
		}
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				src.Close()
				return
			}
		}
		if err != nil {
			dst.Close()
			return
		}
	}
}

// continueReading swallows what comes: the network is gone, but nobody said so.
func continueReading(src net.Conn) { io.Copy(io.Discard, src) }

// cut closes all connections, and lets no new ones through.
func (r *relay) cut() {
	r.ln.Close()
	r.drop()
}

// drop closes all connections; new ones come through.
func (r *relay) drop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		c.Close()
	}
	r.conns = nil
}

// freeze lets nothing through any more, without closing anything.
func (r *relay) freeze() { close(r.frozen) }

// logBuffer keeps a log in memory; one can wait for what is written to it.
type logBuffer struct {
	mu      sync.Mutex // protects what follows
	text    strings.Builder
	changed chan struct{} // closed at the next write
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.changed != nil {
		close(b.changed)
		b.changed = nil
	}
	return b.text.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// count returns how many lines hold all the words.
func (b *logBuffer) count(words ...string) int {
	n := 0
line:
	for line := range strings.Lines(b.String()) {
		for _, word := range words {
			if !strings.Contains(line, word) {
				continue line
			}
		}
		n++
	}
	return n
}

// wait waits for a line that holds all the words.
func (b *logBuffer) wait(t *testing.T, words ...string) { t.Helper(); b.waitN(t, 1, words...) }

// waitN waits for n lines that hold all the words.
func (b *logBuffer) waitN(t *testing.T, n int, words ...string) {
	t.Helper()
	timeout := time.After(patience)
	for {
		b.mu.Lock()
		if b.changed == nil {
			b.changed = make(chan struct{})
		}
		changed := b.changed
		b.mu.Unlock()
		if b.count(words...) >= n {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("no %d lines with %q in the log:\n%s", n, words, b)
		}
	}
}

// eventually polls what has no event to wait for.
func eventually(t *testing.T, what string, f func() bool) { t.Helper(); within(t, patience, what, f) }

// within is eventually for what takes its time.
func within(t *testing.T, limit time.Duration, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, limit)
		}
	}
}

// received waits for a value.
func received[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("%s: not within %s", what, patience)
		panic("unreachable")
	}
}

// isBroken reports whether a transfer ended with an error, and not because the
// test lost its patience.
func isBroken(err error) bool {
	var timeout net.Error
	return err != nil && !(errors.As(err, &timeout) && timeout.Timeout())
}
