package main_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// gate is an exporter whose answer is half out when it says so, and goes on
// trickling until the test lets it finish.
type gate struct {
	reached, release chan struct{}
}

func newGate() *gate {
	return &gate{make(chan struct{}, 10), make(chan struct{})}
}

// The second half is large enough to be under way when whoever waits for the end
// of the scrape takes it for finished.
var firstHalf, secondHalf = "e2e_first 1\n", strings.Repeat("e2e_second 2\n", 100_000)

func (g *gate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	io.WriteString(w, firstHalf)
	http.NewResponseController(w).Flush()
	g.reached <- struct{}{}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-g.release:
			io.WriteString(w, "\n"+secondHalf)
			return
		case <-tick.C: // a CONNECT tunnel that is silent would count as idle
			io.WriteString(w, "\n")
			http.NewResponseController(w).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

// slowScrape starts a scrape of a gate and returns, once it is half way, what
// waits for its end. It fails the test unless the scrape ends complete.
func (g *gate) slowScrape(t *testing.T, client *http.Client, u string) (finish func()) {
	t.Helper()
	ended := make(chan error, 1)
	go func() {
		a, err := fetch(client, u, "100")
		if err == nil && (a.status != http.StatusOK || !strings.HasPrefix(a.body, firstHalf) || !strings.HasSuffix(a.body, secondHalf)) {
			err = fmt.Errorf("%d, %d bytes: %.100q", a.status, len(a.body), a.body)
		}
		ended <- err
	}()
	select {
	case <-g.reached:
	case err := <-ended:
		t.Fatalf("the slow scrape ended early: %v", err)
	}
	return func() {
		t.Helper()
		select {
		case err := <-ended:
			t.Errorf("the slow scrape did not run on: %v", err)
			return
		default:
		}
		close(g.release)
		if err := <-ended; err != nil {
			t.Errorf("the slow scrape: %v", err)
		}
	}
}

// slowLink relays connections to address, and carries 400 kB a second there.
func slowLink(t *testing.T, address string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var relays sync.WaitGroup
	t.Cleanup(relays.Wait)
	t.Cleanup(func() { l.Close() })
	relays.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", address)
			if err != nil {
				near.Close()
				continue
			}
			relays.Go(func() {
				defer near.Close()
				io.Copy(near, far)
			})
			relays.Go(func() {
				defer far.Close()
				for buf := make([]byte, 4_000); ; time.Sleep(10 * time.Millisecond) {
					n, err := near.Read(buf)
					far.Write(buf[:n])
					if err != nil {
						return
					}
				}
			})
		}
	})
	return l.Addr().String()
}

// Who is told to stop lets running scrapes finish, and takes no new ones.
func TestGracefulStop(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	for _, c := range []struct{ scheme, link string }{{"http", "fast"}, {"https", "fast"}, {"http", "slow"}, {"https", "slow"}} {
		// begin starts a slow scrape through a proxy and an agent of its own.
		begin := func(t *testing.T) (proxy *proxyProcess, agent *process, target string, finish func()) {
			g := newGate()
			var exporter *httptest.Server
			if c.scheme == "http" {
				exporter = serve(t, g.ServeHTTP)
			} else {
				exporter = ca.serveTLS(web1, g.ServeHTTP)
			}
			proxy = startProxy(t, "--scrape.reconnect-wait=100ms")
			address := proxy.address
			if c.link == "slow" {
				address = slowLink(t, address)
			}
			agent = startAgent(t, "http://"+address, web1, "--allow="+port(t, exporter))
			target = c.scheme + "://" + web1 + ":" + port(t, exporter) + "/metrics"
			return proxy, agent, target, g.slowScrape(t, through(t, proxy.url, ca.config()), target)
		}
		name := c.scheme + ", " + c.link + " link, "
		if c.link == "fast" { // a proxy that stops waits for what comes over the link, slow or not
			t.Run(name+"proxy", func(t *testing.T) {
				proxy, agent, _, finish := begin(t)
				proxy.signal(syscall.SIGTERM)
				agent.awaitLog(`msg="The proxy drains this session".* reason=shutdown`)
				finish()
				proxy.awaitExit()
			})
		}
		t.Run(name+"agent", func(t *testing.T) {
			proxy, agent, target, finish := begin(t)
			agent.signal(syscall.SIGTERM)
			proxy.awaitLog(`msg="Agent leaves".* reason=shutdown`)
			a, err := fetch(through(t, proxy.url, ca.config()), target, "10")
			switch {
			case c.scheme == "https":
				if err == nil || !strings.Contains(err.Error(), "agent-offline") {
					t.Errorf("a new scrape got %d %v, want agent-offline", a.status, err)
				}
			case err != nil || a.status != http.StatusServiceUnavailable || a.header.Get("Culvert-Error") != "agent-offline":
				t.Errorf("a new scrape got %d %s %v, want 503 agent-offline", a.status, a.body, err)
			}
			finish()
			agent.awaitExit()
		})
	}
}

// A new configuration takes effect within the session, and costs no scrape.
func TestAgentReload(t *testing.T) {
	t.Parallel()
	one, two := serve(t, exposition("e2e_value 1\n")), serve(t, exposition("e2e_value 2\n"))
	proxy := startProxy(t)
	dir := t.TempDir()
	old := fmt.Sprintf("targets:\n- {name: one, url: %q}\n", one.URL)
	file := write(t, dir, "agent.yml", old+"allow: ["+port(t, one)+"]\n")
	agent := startAgent(t, proxy.url, web1, "--config.file="+file)
	since := proxy.agent(web1).Since

	client := through(t, proxy.url, nil)
	onPort := func(s *httptest.Server) string { return "http://" + web1 + ":" + port(t, s) + "/metrics" }
	allowed, refused := onPort(one), onPort(two)
	for _, u := range []string{"http://one." + web1 + "/metrics", allowed} {
		background(t, time.Millisecond, func() error { return expect(client, u, "10", "e2e_value 1\n") })
	}
	if a, err := fetch(client, refused, "10"); err != nil || a.status != http.StatusForbidden {
		t.Errorf("a port that is not allowed: %d %s %v, want 403", a.status, a.body, err)
	}

	check := func() error {
		discovered := get(t, proxy.url+"/targets").body
		if !strings.Contains(discovered, `"one.`+web1+`"`) || !strings.Contains(discovered, `"two.`+web1+`"`) {
			return fmt.Errorf("/targets lists %s", discovered)
		}
		return errors.Join(
			expect(client, "http://two."+web1+"/metrics", "10", "e2e_value 2\n"),
			expect(client, refused, "10", "e2e_value 2\n"))
	}
	write(t, dir, "agent.yml", old+fmt.Sprintf("- {name: two, url: %q}\nallow: [%s, %s]\n", two.URL, port(t, one), port(t, two)))
	agent.signal(syscall.SIGHUP)
	eventually(t, 10*time.Second, check)

	write(t, dir, "agent.yml", old+"allow: [99999]\n")
	agent.signal(syscall.SIGHUP)
	agent.awaitLog(`level=ERROR.*the old configuration stays.*99999`)
	if err := check(); err != nil {
		t.Errorf("after a broken file: %v", err)
	}
	if info := proxy.agent(web1); !info.Connected || !info.Since.Equal(since) {
		t.Errorf("the session is not the one from before: %+v, want since %s", info, since)
	}
}

// An agent that hangs costs its own scrapes and no more, and is found out.
func TestStuckAgent(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it takes a minute until an agent counts as silent")
	}
	const scrapes = 100
	exporter := serve(t, exposition("e2e_value 1\n"))
	proxy := startProxy(t, fmt.Sprintf("--scrape.max-concurrent=%d", scrapes))
	agent := startAgent(t, proxy.url, web1, "--target=app="+exporter.URL)
	client := through(t, proxy.url, nil)
	const target = "http://app." + web1 + "/metrics"
	if err := expect(client, target, "10", "e2e_value 1\n"); err != nil {
		t.Fatal(err)
	}
	atRest := proxy.gauge("go_goroutines")

	agent.signal(syscall.SIGSTOP)
	timesOut := func() error {
		a, err := fetch(client, target, "1")
		if err == nil && (a.status != http.StatusGatewayTimeout || a.header.Get("Culvert-Error") != "timeout") {
			err = fmt.Errorf("a scrape of a stuck agent: %d %s, want 504 timeout", a.status, a.body)
		}
		return err
	}
	var all sync.WaitGroup
	for range scrapes {
		all.Go(func() {
			if err := timesOut(); err != nil {
				t.Error(err)
			}
		})
	}
	// A scrape takes a stream and a handful of goroutines, and nothing stays of it.
	bounded := func(n int) error {
		if streams := proxy.gauge("culvert_proxy_streams"); streams > float64(n+1) {
			return fmt.Errorf("%g streams are open for %d scrapes", streams, n)
		}
		if goroutines := proxy.gauge("go_goroutines"); goroutines > atRest+float64(8*n)+20 {
			return fmt.Errorf("%g goroutines run for %d scrapes, and %g did before", goroutines, n, atRest)
		}
		return nil
	}
	done := make(chan struct{})
	go func() { defer close(done); all.Wait() }()
	for running := true; running; {
		if err := bounded(scrapes); err != nil {
			t.Error(err)
		}
		select {
		case <-done:
			running = false
		case <-time.After(50 * time.Millisecond):
		}
	}

	// Prometheus goes on scraping until the session is found dead.
	eventually(t, 90*time.Second, func() error {
		info := proxy.agent(web1)
		if !info.Connected {
			if !strings.Contains(info.LostReason, "nothing was heard") {
				t.Errorf("the agent was lost because %q, want silence", info.LostReason)
			}
			return nil
		}
		if err := try(5*time.Second, func() error { return bounded(1) }); err != nil {
			t.Error(err)
		}
		if a, err := fetch(client, target, "1"); err != nil || a.status != http.StatusGatewayTimeout && a.header.Get("Culvert-Error") != "agent-offline" {
			t.Errorf("a scrape of a stuck agent: %d %s %v", a.status, a.body, err)
		}
		return errors.New("the stuck agent still counts as connected")
	})
	client.CloseIdleConnections()
	eventually(t, 20*time.Second, func() error {
		if now := proxy.gauge("go_goroutines"); now > atRest+5 {
			return fmt.Errorf("%g goroutines run, and %g did with the agent connected", now, atRest)
		}
		return nil
	})

	agent.signal(syscall.SIGCONT)
	eventually(t, 30*time.Second, func() error { return expect(client, target, "10", "e2e_value 1\n") })
	if !proxy.agent(web1).Connected {
		t.Error("the agent is back and not shown as connected")
	}
}
