package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/server"
)

// startProxy runs a proxy and returns its URL.
func startProxy(t *testing.T) string {
	t.Helper()
	s, err := server.New(server.Config{
		ListenAddresses: []string{"127.0.0.1:0"},
		Fleet:           fleet.Config{SettleTime: -1},
		Logger:          slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	runInBackground(t, s.Run)
	return "http://" + s.Addr()
}

func runInBackground(t *testing.T, run func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// startAgent runs an agent until its registration is there.
func startAgent(t *testing.T, name, proxy string) (stop func()) {
	t.Helper()
	a, err := agent.New(agent.Config{Name: name, ProxyURLs: []string{proxy}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); a.Run(ctx) }()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	for len(a.Connected()) == 0 {
		select {
		case <-t.Context().Done():
			t.Fatal("the agent did not connect")
		default:
		}
	}
	return stop
}

func closedPort(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func TestDoctor(t *testing.T) {
	proxy := startProxy(t)
	exporter := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "up 1") }))
	t.Cleanup(exporter.Close)
	_, port, _ := net.SplitHostPort(strings.TrimPrefix(exporter.URL, "http://"))
	unauthorized := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusUnauthorized) }))
	t.Cleanup(unauthorized.Close)
	proxyURL, _ := url.Parse(proxy)
	stripping := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(pr *httputil.ProxyRequest) {
		pr.SetURL(proxyURL)
		pr.Out.Header.Del("Upgrade")
		pr.Out.Header.Del("Connection")
	}})
	t.Cleanup(stripping.Close)
	tlsServer := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(tlsServer.Close)
	dead := closedPort(t)
	startAgent(t, "web-2", proxy)

	for _, test := range []struct {
		name    string
		args    []string
		healthy bool
		want    []string
	}{
		{"all well", []string{"--proxy-url=" + proxy, "--target=node=" + exporter.URL}, true,
			[]string{"ok      DNS", "ok      proxy", "-       TLS", "ok      upgrade", "ok      credentials", "ok      registration  would be accepted", "ok      --allow", "ok      target        http://node.web-1/metrics answered 200 OK, 5 bytes"}},
		{"a port", []string{"--proxy-url=" + proxy, "--allow=" + port, "--scrape.local-host=127.0.0.1", "doctor", port}, true,
			[]string{"ok      target        http://web-1:" + port + "/metrics"}},
		{"name resolution", []string{"--proxy-url=http://no-such-host.invalid"}, false, []string{"FAILED  DNS", "→ check the host in --proxy-url"}},
		{"nobody listens", []string{"--proxy-url=http://127.0.0.1:" + dead}, false, []string{"FAILED  proxy", "refused", "→ is culvert-proxy running"}},
		{"https to an http port", []string{"--proxy-url=" + strings.Replace(proxy, "http", "https", 1)}, false, []string{"FAILED  TLS", "→ the other side doesn't speak TLS"}},
		{"unknown CA", []string{"--proxy-url=" + tlsServer.URL}, false, []string{"FAILED  TLS", "→ name the CA that signed it with --tls.cacert"}},
		{"upgrade lost", []string{"--proxy-url=" + stripping.URL}, false, []string{"FAILED  upgrade", "no-upgrade", "→ have the reverse proxy in front"}},
		{"no culvert-proxy", []string{"--proxy-url=" + exporter.URL}, false, []string{"FAILED  upgrade", "→ the answer is not culvert-proxy's"}},
		{"credentials", []string{"--proxy-url=" + unauthorized.URL}, false, []string{"FAILED  credentials", "401"}},
		{"name taken", []string{"--proxy-url=" + proxy, "--fqdn=web-2"}, true, []string{"ok      registration", "taken by a live agent", "this host's own agent"}},
		{"name of a target", []string{"--proxy-url=" + proxy, "--fqdn=agent.web-2"}, false, []string{"FAILED  registration", "is a target of agent"}},
		{"port not allowed", []string{"--proxy-url=" + proxy, "doctor", port}, false, []string{"FAILED  --allow", "--allow=" + port}},
		{"exporter down", []string{"--proxy-url=" + proxy, "--target=node=http://127.0.0.1:" + dead}, false, []string{"FAILED  target", "refused"}},
		{"exporter broken", []string{"--proxy-url=" + proxy, "--target=node=" + unauthorized.URL}, false, []string{"FAILED  target", "answered 401"}},
		{"no such target", []string{"--proxy-url=" + proxy, "doctor", "router"}, false, []string{"FAILED  target", "→ declare it with --target=router=URL"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			args := test.args
			if !strings.Contains(strings.Join(args, " "), "--fqdn") {
				args = append([]string{"--fqdn=web-1"}, args...)
			}
			f, _, err := parseFlags(args)
			if err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			err = doctor(t.Context(), &out, f)
			if (err == nil) != test.healthy {
				t.Errorf("doctor returned %v", err)
			}
			for _, want := range test.want {
				if !strings.Contains(out.String(), want) {
					t.Errorf("the report lacks %q", want)
				}
			}
			if t.Failed() {
				t.Log(out.String())
			}
		})
	}
}

func TestLeave(t *testing.T) {
	proxy := startProxy(t)
	run := func() (string, error) {
		f, command, err := parseFlags([]string{"--proxy-url=" + proxy, "--fqdn=web-1", "leave"})
		if err != nil || command != "leave" {
			t.Fatal(command, err)
		}
		var out bytes.Buffer
		err = leave(t.Context(), &out, f)
		return out.String(), err
	}
	known := func() bool {
		resp, err := http.Get(proxy + "/api/v1/agents/web-1")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	}
	stop := startAgent(t, "web-1", proxy)
	if out, err := run(); err == nil || !strings.Contains(err.Error(), "stop it first") || !known() {
		t.Errorf("while the agent runs: %q, %v", out, err)
	}
	stop()
	if out, err := run(); err != nil || !strings.Contains(out, `has forgotten "web-1"`) || known() {
		t.Errorf("after it stopped: %q, %v", out, err)
	}
	if out, err := run(); err != nil || !strings.Contains(out, `did not know "web-1"`) {
		t.Errorf("again: %q, %v", out, err)
	}
}
