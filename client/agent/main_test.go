package agent_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/server"
)

func TestMain(m *testing.M) {
	serveNames()
	if child := children[os.Getenv(childName)]; child != nil {
		child()
		return
	}
	goleak.VerifyTestMain(m, goleak.IgnoreCurrent()) // serveNames
}

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
	base agent.Config
	logs *logBuffer
	stop func() // ends it in good order and waits; may be called more than once
}

// config returns the agent's first configuration, changed.
func (a *testAgent) config(tweak func(*agent.Config)) agent.Config {
	c := a.base
	if tweak != nil {
		tweak(&c)
	}
	return c
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
	return &testAgent{Agent: a, base: config, logs: logs, stop: stop}
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

// get scrapes target through the proxy as a scraper does, and returns the status
// and the body.
func (p *testProxy) get(target string) (int, string) {
	p.t.Helper()
	var u *url.URL
	if !strings.HasPrefix(target, "/") {
		u = &url.URL{Scheme: "http", Host: p.addr}
	} else {
		target = "http://" + p.addr + target
	}
	transport := &http.Transport{Proxy: http.ProxyURL(u), DisableKeepAlives: true}
	client := &http.Client{Transport: transport, Timeout: patience}
	resp, err := client.Get(target)
	if err != nil {
		p.t.Errorf("get %s: %v", target, err)
		return 0, ""
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Errorf("get %s: %v", target, err)
	}
	return resp.StatusCode, string(body)
}

// want checks the answer to a scrape.
func (p *testProxy) want(target string, status int, word string) {
	p.t.Helper()
	if code, body := p.get(target); code != status || !strings.Contains(body, word) {
		p.t.Errorf("get %s: %d %q, want %d with %q", target, code, body, status, word)
	}
}

// since tells since when the agent has its session, and false where it has none.
func (p *testProxy) since(name string) (time.Time, bool) {
	p.t.Helper()
	var answer struct{ Data fleet.Info }
	_, body := p.get("/api/v1/agents/" + name)
	json.Unmarshal([]byte(body), &answer)
	return answer.Data.Since, answer.Data.Connected
}

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
