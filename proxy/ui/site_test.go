package ui_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/proxy/server"
)

// patience bounds every wait for an event that has to come.
const patience = 20 * time.Second

// site is a real proxy with real agents and groups.
type site struct {
	*server.Server
	t   testing.TB
	url string // of the page
	run sync.WaitGroup

	tokenFile string // of the agents, where there are roles
	slow      bool   // targets take some milliseconds, as real ones do

	mu    sync.Mutex // protects stops
	stops map[string]func()
}

// newSite starts a proxy with its state in memory.
func newSite(t testing.TB, tweak func(*server.Config)) *site {
	t.Helper()
	config := server.Config{
		ListenAddresses: []string{"127.0.0.1:0"}, ReconnectWait: -1, ShutdownTimeout: 3 * time.Second,
		MaxHandshakes: 2000, Logger: slog.New(slog.DiscardHandler),
		Flags: map[string]string{"web.listen-address": ":8080", "storage.path": "/var/lib/culvert-proxy", "agent.forget-after": "168h0m0s"},
	}
	config.Fleet.SettleTime = -1
	if tweak != nil {
		tweak(&config)
	}
	proxy, err := server.New(config)
	if err != nil {
		t.Fatal(err)
	}
	if err := proxy.Listen(); err != nil {
		t.Fatal(err)
	}
	s := &site{Server: proxy, t: t, url: "http://" + proxy.Addr() + config.RoutePrefix + "/", stops: map[string]func(){}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- proxy.Run(ctx) }()
	t.Cleanup(func() {
		s.mu.Lock()
		for _, stop := range s.stops {
			stop()
		}
		s.mu.Unlock()
		s.run.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("proxy: Run returned %v", err)
		}
	})
	return s
}

// newSecureSite starts a proxy with roles, and its state on disk: nothing to warn of. The
// operator is root, and prom may scrape web-*; both have the password "secret".
func newSecureSite(t testing.TB, tweak func(*server.Config)) *site {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"password": "secret\n", "token": "a-token-of-all-agents\n", "culvert.yml": `
roles:
  operators:
  - {name: admins, basic_auth: {username: root, password_file: password}}
  scrapers:
  - {name: prometheus, basic_auth: {username: prom, password_file: password}, agents: ['web-*.example.net']}
  agents:
  - {name: machines, token_file: token, agents: ['*.example.net']}
`} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s := newSite(t, func(c *server.Config) {
		c.ConfigFile, c.StoragePath = filepath.Join(dir, "culvert.yml"), filepath.Join(dir, "data")
		if tweak != nil {
			tweak(c)
		}
	})
	s.tokenFile = filepath.Join(dir, "token")
	return s
}

// hosts are what the machines of a company may be called.
var hosts = []struct{ name, role string }{{"web", "web"}, {"db", "database"}, {"cache", "cache"}, {"queue", "queue"}, {"build", "ci"}}

// hostName is the name of the i-th agent.
func hostName(i int) string {
	return fmt.Sprintf("%s-%d.example.net", hosts[i%len(hosts)].name, i/len(hosts)+1)
}

// startAgents starts agents from number first on, and waits until they are connected.
func (s *site) startAgents(first, number int) {
	s.t.Helper()
	app := func(w http.ResponseWriter, _ *http.Request) {
		if s.slow {
			time.Sleep(time.Duration(4+rand.IntN(9)) * time.Millisecond)
		}
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		io.WriteString(w, "# HELP app_requests_total Requests that were answered.\n# TYPE app_requests_total counter\n"+
			"app_requests_total{method=\"GET\",code=\"200\"} 18231\napp_requests_total{method=\"POST\",code=\"200\"} 911\n"+
			"# HELP app_up_time_seconds Time since the start.\n# TYPE app_up_time_seconds gauge\napp_up_time_seconds 86413\n")
	}
	for i := first; i < first+number; i++ {
		host := hosts[i%len(hosts)]
		s.startAgent(agent.Config{
			Name:    hostName(i),
			Labels:  map[string]string{"env": []string{"prod", "prod", "staging"}[i/len(hosts)%3], "role": host.role, "site": []string{"fra1", "ams2"}[i/len(hosts)%2]},
			Targets: []agent.Target{{Name: "app", Handler: http.HandlerFunc(app)}},
		})
	}
	s.awaitConnected(first + number)
}

func (s *site) startAgent(config agent.Config) {
	s.t.Helper()
	config.ProxyURLs = []string{"http://" + s.AgentAddr()}
	config.RetryInitialWait, config.RetryMaxWait, config.ShutdownTimeout = 10*time.Millisecond, 100*time.Millisecond, time.Second
	config.Logger, config.TokenFile = slog.New(slog.DiscardHandler), s.tokenFile
	a, err := agent.New(config)
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	s.run.Go(func() {
		defer close(ended)
		if err := a.Run(ctx); err != nil {
			s.t.Errorf("agent %s: %v", config.Name, err)
		}
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stops[config.Name] = cancel
}

// stopAgent ends an agent, which is lost then.
func (s *site) stopAgent(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stops[name]()
}

// awaitConnected waits until so many agents are connected.
func (s *site) awaitConnected(want int) {
	s.t.Helper()
	series := fmt.Sprintf("culvert_proxy_agents{state=\"connected\"} %d\n", want)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if strings.Contains(s.get("metrics?only=self").body, series) {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("not %d agents are connected within a minute", want)
		}
	}
}

// push pushes groups: backups, reports and the like.
func (s *site) push(groups int) {
	s.t.Helper()
	jobs := []string{"backup", "cert-renewal", "etl-orders", "log-rotation", "report"}
	var pushes errgroup.Group
	pushes.SetLimit(16)
	for i := range groups {
		pushes.Go(func() error {
			path := fmt.Sprintf("metrics/job/%s/instance/%s?interval=24h&ttl=%dh", jobs[i%len(jobs)], hostName(i), 24*(1+i%30))
			return s.do(http.MethodPut, path, "job_last_success_time_seconds 1.7e9\njob_duration_seconds 12.5\njob_rows 4711\n")
		})
	}
	if err := pushes.Wait(); err != nil {
		s.t.Fatal(err)
	}
}

// authorize makes a request one of the operator, where there are roles.
func (s *site) authorize(req *http.Request) {
	if s.tokenFile != "" && req.Header.Get("Authorization") == "" {
		req.SetBasicAuth("root", "secret")
	}
}

func (s *site) do(method, path, body string) error {
	req, err := http.NewRequest(method, s.url+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	s.authorize(req)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 400 {
		err = fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, text)
	}
	return err
}

// scrape scrapes a target of agents once each, as a scraper that sets no proxy does.
func (s *site) scrape(target string, names ...string) {
	s.t.Helper()
	for _, name := range names {
		s.get("scrape/" + url.PathEscape(name) + "/" + target + "/metrics")
	}
}

// answer is a response, read to its end.
type answer struct {
	code   int
	header http.Header
	body   string
}

// get fetches a path relative to the page.
func (s *site) get(path string, header ...string) answer {
	s.t.Helper()
	req, err := http.NewRequest(http.MethodGet, s.url+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	s.authorize(req)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return answer{resp.StatusCode, resp.Header, string(body)}
}
