//go:build unix

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
)

// TestPushProxFlags starts the agent with the command line of a pushprox-client, every
// flag of it, against a culvert-proxy behind TLS, a sub-path and a password.
func TestPushProxFlags(t *testing.T) {
	const name = "Web-1.Example.NET" // as PushProx's users write it
	ca, caKey, caFile, _ := issue(t, "ca", nil, nil)
	_, _, serverCert, serverKey := issue(t, strings.ToLower(name), ca, caKey)
	_, _, clientCert, clientKey := issue(t, "client.example.net", ca, caKey)
	certificate, err := tls.LoadX509KeyPair(serverCert, serverKey)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	secure := func(handler http.HandlerFunc) *httptest.Server {
		s := httptest.NewUnstartedServer(handler)
		s.TLS = &tls.Config{Certificates: []tls.Certificate{certificate}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
		s.StartTLS()
		t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
		return s
	}
	portOf := func(raw string) string { u, _ := url.Parse(raw); return u.Port() }

	proxy := startProxy(t)
	proxyURL, _ := url.Parse(proxy)
	pass := &httputil.ReverseProxy{Rewrite: func(pr *httputil.ProxyRequest) {
		pr.SetURL(proxyURL)
		pr.Out.URL.Path = strings.TrimPrefix(pr.In.URL.Path, "/sub/path")
		pr.Out.Header.Del("Authorization")
	}}
	front := secure(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "joe" || password != "p@ss" || !strings.HasPrefix(r.URL.Path, "/sub/path/") {
			http.Error(w, "who are you", http.StatusUnauthorized)
			return
		}
		pass.ServeHTTP(w, r)
	})
	exporter := secure(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "secure 1 ", r.URL.RawQuery) })
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "plain 1 ", r.URL.RawQuery) }))
	t.Cleanup(plain.Close)
	scraper := &http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(proxyURL), DisableKeepAlives: true}}
	get := func(target string) (int, string) {
		resp, err := scraper.Get(target)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(body)
	}

	metrics := "127.0.0.1:" + closedPort(t)
	args := []string{
		"--proxy-url=https://joe:p%40ss@127.0.0.1:" + portOf(front.URL) + "/sub/path///", "--fqdn=" + name, "--metrics-addr=" + metrics,
		"--tls.cacert=" + caFile, "--tls.cert=" + clientCert, "--tls.key=" + clientKey,
		"--proxy.retry.initial-wait=10ms", "--proxy.retry.max-wait=50ms", "--log.level=debug", "--log.format=json",
	}
	start := func(more ...string) (logs func() string, stop func()) {
		f, command, err := parseFlags(append(args, more...))
		if err != nil || command != "agent" {
			t.Fatal(command, err)
		}
		log := new(lockedBuffer)
		f.log.Writer = log
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- run(ctx, f, nil) }()
		stop = sync.OnceFunc(func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
		t.Cleanup(stop)
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			if code, _ := get("http://agent." + name + "/metrics"); code == http.StatusOK {
				return log.String, stop
			}
			if time.Now().After(end) {
				t.Fatalf("not connected:\n%s", log.String())
			}
		}
	}

	// Nothing but the flags of a pushprox-client: ports are closed, and the log says how
	// to open them at the start and with the first scrape that is refused.
	logs, stop := start()
	if code, body := get("http://" + name + ":" + portOf(plain.URL) + "/metrics"); code != http.StatusForbidden || !strings.Contains(body, "--allow="+portOf(plain.URL)) {
		t.Errorf("without --allow: %d %q", code, body)
	}
	stop()
	for _, want := range []string{"Nothing may be scraped but the agent itself", "A scrape was refused"} {
		found := false
		for line := range strings.Lines(logs()) {
			var entry map[string]any
			if err := json.Unmarshal([]byte(line), &entry); err != nil {
				t.Fatalf("--log.format=json: %q: %v", line, err)
			}
			found = found || entry["level"] == "WARN" && strings.Contains(line, want) && strings.Contains(line, "--allow=all")
		}
		if !found {
			t.Errorf("no warning %q with --allow=all in\n%s", want, logs())
		}
	}
	if strings.Contains(logs(), "p@ss") || strings.Contains(logs(), "p%40ss") {
		t.Error("the log has the password")
	}

	start("--allow=all")
	for target, want := range map[string]string{
		"http://" + name + ":" + portOf(plain.URL) + "/metrics?x=1":                           "plain 1 x=1",
		"http://" + name + ":" + portOf(exporter.URL) + "/metrics?z=1&_scheme=https&a=%20b":   "secure 1 a=+b&z=1",
		"http://" + name + ":" + portOf(plain.URL) + "/metrics?z=1&_scheme=nonsense&a=%20b":   "plain 1 z=1&_scheme=nonsense&a=%20b",
		"http://" + name + ":" + portOf(plain.URL) + "/metrics?_scheme=http&_scheme=https&a=": "plain 1 _scheme=http&_scheme=https&a=",
	} {
		if code, body := get(target); code != http.StatusOK || body != want {
			t.Errorf("get %s: %d %q, want %q", target, code, body, want)
		}
	}
	resp, err := http.Get("http://" + metrics + "/any/path")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if text, _ := io.ReadAll(resp.Body); !bytes.Contains(text, []byte("culvert_client_connected{")) {
		t.Errorf("--metrics-addr serves %q", text)
	}
}

// lockedBuffer is a log that several goroutines write to.
type lockedBuffer struct {
	mu   sync.Mutex // protects text
	text bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// TestProtocol: --proxy.protocol reaches the agent, and diagnosis knows what it means.
func TestProtocol(t *testing.T) {
	for _, c := range []struct {
		text string
		args []string
		want agent.Protocol
		says string
	}{
		{"", nil, agent.ProtocolAuto, "as long as a proxy knows no tunnel"},
		{"", []string{"--proxy.protocol=culvert"}, agent.ProtocolCulvert, "the tunnel\n"},
		{"proxy_protocol: pushprox\n", nil, agent.ProtocolPushProx, "PushProx's long polling\n"},
		{"proxy_protocol: pushprox\n", []string{"--proxy.protocol=auto"}, agent.ProtocolAuto, "as long as"},
	} {
		args := append([]string{"--proxy-url=http://a:8080", "--fqdn=web-1"}, c.args...)
		if s, err := load(t, c.text, args...); err != nil || s.Agent.Protocol != c.want {
			t.Errorf("%q %v: %v, %v", c.text, c.args, s, err)
		}
		if _, out, err := check(t, c.text, args...); err != nil || !strings.Contains(out, c.says) {
			t.Errorf("%q %v: check-config says %v\n%s", c.text, c.args, err, out)
		}
	}
	s, err := load(t, "proxy_protocol: polling\n", "--proxy-url=http://a:8080", "--fqdn=web-1")
	if err == nil {
		_, err = agent.New(s.Agent)
	}
	if err == nil || !strings.Contains(err.Error(), `"polling"`) {
		t.Errorf("an unknown protocol: %v", err)
	}
	if _, _, err := parseFlags([]string{"--proxy.protocol=polling"}); err == nil || !strings.Contains(err.Error(), "polling") {
		t.Errorf("an unknown protocol: %v", err)
	}

	// What doctor and leave ask of a pushprox-proxy: they poll nothing, which would take
	// the scrapes of the agent that runs.
	pushprox := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/base/clients":
			io.WriteString(w, `[{"targets":["Web-1"],"labels":null}]`+"\n")
		case "/base/poll", "/base/push":
			t.Error("it polls")
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(pushprox.Close)
	culvert := startProxy(t)
	for _, c := range []struct {
		args    []string
		healthy bool
		want    string
	}{
		{[]string{"--proxy-url=" + pushprox.URL + "/base", "--fqdn=Web-1"}, true, "ok      polls         it lists this agent"},
		{[]string{"--proxy-url=" + pushprox.URL + "/base", "--fqdn=web-2"}, true, "ok      polls         it does not list this agent"},
		{[]string{"--proxy-url=" + pushprox.URL + "/base", "--fqdn=Web-1", "--proxy.protocol=pushprox"}, true, "ok      polls         a pushprox-proxy, which lists"},
		{[]string{"--proxy-url=" + pushprox.URL + "/base", "--fqdn=Web-1", "--proxy.protocol=culvert"}, false, "FAILED  upgrade"},
		{[]string{"--proxy-url=" + pushprox.URL + "/bad", "--fqdn=Web-1", "--proxy.protocol=pushprox"}, false, "FAILED  polls         GET /bad/clients: 404 Not Found"},
		{[]string{"--proxy-url=" + pushprox.URL + "/bad", "--fqdn=Web-1"}, false, "→ the answer is not culvert-proxy's"},
		{[]string{"--proxy-url=" + culvert, "--fqdn=web-1"}, true, "ok      upgrade"},
	} {
		f, _, err := parseFlags(append(c.args, "doctor"))
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := doctor(t.Context(), &out, f); (err == nil) != c.healthy || !strings.Contains(out.String(), c.want) {
			t.Errorf("%v: %v, want %q:\n%s", c.args, err, c.want, out.String())
		}
	}
	f, _, err := parseFlags([]string{"--proxy-url=" + pushprox.URL + "/base", "--fqdn=Web-1", "leave"})
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := leave(t.Context(), &out, f); err != nil || !strings.Contains(out.String(), "is a pushprox-proxy") {
		t.Errorf("leave: %v\n%s", err, out.String())
	}
}
