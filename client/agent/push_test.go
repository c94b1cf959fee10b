package agent_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/gateway/boltstore"
	"github.com/culvert-io/culvert/protocol"
)

// relayed is a push as it came to a proxy.
type relayed struct {
	method, target, body string
	header               http.Header
}

// scripted is a proxy that answers relays as a test says.
type scripted struct {
	*httptest.Server
	relays chan relayed

	mu      sync.Mutex // protects what follows
	answer  http.HandlerFunc
	session *protocol.Session
}

func newScripted(t *testing.T, answer http.HandlerFunc) *scripted {
	t.Helper()
	p := &scripted{relays: make(chan relayed, 1000), answer: answer}
	var tasks sync.WaitGroup
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		session, err := protocol.Accept(w, r, "upgrade", fmt.Sprintf("%p", p), protocol.SessionConfig{})
		if err != nil {
			return
		}
		p.mu.Lock()
		p.session = session
		p.mu.Unlock()
		tasks.Go(func() {
			http.Serve(session.Listener(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if strings.HasPrefix(r.URL.Path, "/v1/") {
					return
				}
				body, err := io.ReadAll(r.Body)
				if err != nil {
					panic(http.ErrAbortHandler)
				}
				p.mu.Lock()
				answer := p.answer // what the test says once it has the relay is for the next one
				p.mu.Unlock()
				p.relays <- relayed{r.Method, r.RequestURI, string(body), r.Header}
				answer(w, r)
			}))
		})
	}))
	t.Cleanup(func() { p.end(); p.Close(); tasks.Wait() })
	return p
}

// end closes the session.
func (p *scripted) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.session != nil {
		p.session.Close()
	}
}

// script replaces the answer.
func (p *scripted) script(answer http.HandlerFunc) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer = answer
}

func (p *scripted) next(t *testing.T) relayed {
	t.Helper()
	return received(t, p.relays, "a relay")
}

// id returns the spool and the number of a relay.
func (r relayed) id(t *testing.T) (string, uint64) {
	t.Helper()
	name, text, _ := strings.Cut(r.header.Get("Culvert-Push-Id"), "/")
	seq, err := strconv.ParseUint(text, 10, 63)
	if err != nil || len(name) != 32 {
		t.Errorf("Culvert-Push-Id: %q", r.header.Get("Culvert-Push-Id"))
	}
	return name, seq
}

func accept(http.ResponseWriter, *http.Request) {}

// status answers with a status, first of all, and then with 200.
func status(code int, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
		fmt.Fprintln(w, "because it says so")
	}
}

// pushAgent is an agent that takes pushes.
type pushAgent struct {
	*testAgent
	t   *testing.T
	url string
}

// startPushAgent starts an agent of the proxies, with its files in dir.
func startPushAgent(t *testing.T, dir string, tweak func(*agent.Config), proxies ...*scripted) *pushAgent {
	t.Helper()
	a := startAgent(t, nil, func(c *agent.Config) {
		for _, p := range proxies {
			c.ProxyURLs = append(c.ProxyURLs, p.URL)
		}
		c.Push = agent.Push{ListenAddresses: []string{"127.0.0.1:0"}, StoragePath: dir}
		if tweak != nil {
			tweak(c)
		}
	})
	a.logs.wait(t, `msg="Taking pushes"`)
	found := regexp.MustCompile(`msg="Taking pushes" address=(\S+)`).FindStringSubmatch(a.logs.String())
	return &pushAgent{a, t, "http://" + found[1]}
}

func (a *pushAgent) do(method, target, body string, header ...string) (*http.Response, string) {
	a.t.Helper()
	req, err := http.NewRequestWithContext(a.t.Context(), method, a.url+target, strings.NewReader(body))
	if err != nil {
		a.t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := (&http.Transport{DisableKeepAlives: true, DisableCompression: true}).RoundTrip(req)
	if err != nil {
		a.t.Fatalf("%s %s: %v", method, target, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	return resp, string(text)
}

// want checks the answer to a request.
func (a *pushAgent) want(code int, word, method, target, body string, header ...string) {
	a.t.Helper()
	if resp, text := a.do(method, target, body, header...); resp.StatusCode != code || !strings.Contains(text, word) {
		a.t.Errorf("%s %s: %d %q, want %d with %q", method, target, resp.StatusCode, text, code, word)
	}
}

// served returns what the target "agent" serves.
func (a *pushAgent) served() string {
	w := httptest.NewRecorder()
	a.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	return w.Body.String()
}

// awaitMetric waits for a sample of the agent's own.
func (a *pushAgent) awaitMetric(line string) {
	a.t.Helper()
	deadline := time.Now().Add(patience)
	for !strings.Contains("\n"+a.served(), "\n"+line+"\n") {
		if time.Now().After(deadline) {
			a.t.Fatalf("the agent does not serve %q:\n%s", line, a.served())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func gzipped(text string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	io.WriteString(w, text)
	w.Close()
	return b.String()
}

// TestPushAPI: what the endpoint answers, what becomes the machine's, and what goes to
// the proxies.
func TestPushAPI(t *testing.T) {
	t.Parallel()
	proxy := newScripted(t, accept)
	a := startPushAgent(t, t.TempDir(), func(c *agent.Config) {
		c.Push.MaxBodySize = 10_000
		registry := prometheus.NewRegistry()
		registry.MustRegister(collectors.NewGoCollector())
		c.Gatherer = registry
	}, proxy)
	a.logs.wait(t, "msg=Connected")
	const machine, service, neither = "machine", "service", ""
	for _, test := range []struct {
		method, target, body string
		header               []string
		code                 int
		word                 string // of the answer
		goes                 string
		sees                 string // line that the agent serves, or target of the relay
	}{
		{"PUT", "/metrics/job/a/instance/i", "a_value 1\n", nil, 200, "", machine, `a_value{instance="i",job="a"} 1`},
		{"POST", "/metrics/job@base64/YQ/instance/i/zone/z", "a_value 2\n", nil, 200, "", machine, `a_value{instance="i",job="a",zone="z"} 2`},
		{"POST", "/metrics/job/run/instance/i", "culvert_job_exit_code 0\n", nil, 200, "", machine, `culvert_job_exit_code{instance="i",job="run"} 0`},
		{"PUT", "/metrics/job/b?scope=machine", "b_value 3\n", nil, 200, "", machine, `b_value{instance="",job="b"} 3`},
		{"PUT", "/metrics/job/up/instance/i?interval=1h", "", nil, 200, "", machine, `push_up{instance="i",job="up"} 1`},
		{"POST", "/api/v1/push?group_by=job,instance", "c_value{job=\"c\",instance=\"i\"} 4\n", nil, 200, `"groups":1`, machine, `c_value{instance="i",job="c"} 4`},
		{"PUT", "/metrics/job/gone/instance/i", "gone 1\n", nil, 200, "", machine, `gone{instance="i",job="gone"} 1`},
		{"DELETE", "/metrics/job/gone/instance/i", "", nil, 202, "", neither, ""},

		{"PUT", "/metrics/job/s", "s_value 1\n", nil, 202, "", service, "/metrics/job/s"},
		{"POST", "/metrics/job/s/instance@base64/=", "s_value 1\n", nil, 202, "", service, "/metrics/job/s/instance@base64/="},
		{"POST", "/metrics/job/s/zone/a%20b?aggregate=sum&ttl=1h", "s_value 1\n", nil, 202, "", service, "/metrics/job/s/zone/a%20b?aggregate=sum&ttl=1h"},
		{"POST", "/metrics/job/s/instance/i?scope=service&ttl=1h", "s_value 1\n", nil, 202, "", service, "/metrics/job/s/instance/i?ttl=1h"},
		{"POST", "/metrics/job/s", gzipped("s_value 1\n"), []string{"Content-Encoding", "gzip", "Culvert-TTL", "5m", "Culvert-Interval", "1m", "X-Other", "x"}, 202, "", service, "/metrics/job/s"},
		{"POST", "/api/v1/push?group_by=job", "c_value{job=\"c\",instance=\"i\"} 4\n", nil, 202, "", service, "/api/v1/push?group_by=job"},
		{"DELETE", "/metrics/job/s", "", nil, 202, "", service, "/metrics/job/s"},

		{"PUT", "/metrics/job/s", "s_value x\n", nil, 400, "line 1", neither, ""},
		{"PUT", "/metrics/job/s", "s_value 1", nil, 400, "", neither, ""},
		{"PUT", "/metrics/job/s", "no gzip", []string{"Content-Encoding", "gzip"}, 400, "it is not gzip", neither, ""},
		{"PUT", "/metrics/job/s", "s_value 1 1\n", nil, 400, "timestamp", neither, ""},
		{"PUT", "/metrics/job/s", "culvert_proxy_x 1\n", nil, 400, "culvert_proxy_", neither, ""},
		{"PUT", "/metrics/job/s?ttl=long", "s_value 1\n", nil, 400, "long", neither, ""},
		{"PUT", "/metrics/job/s?aggregate=mean", "s_value 1\n", nil, 400, "aggregate=sum", neither, ""},
		{"PUT", "/metrics/job/s?scope=both", "s_value 1\n", nil, 400, "scope=machine", neither, ""},
		{"PUT", "/metrics/job/s/zone", "s_value 1\n", nil, 400, "zone", neither, ""},
		{"DELETE", "/metrics/job/s/zone", "", nil, 400, "zone", neither, ""},
		{"POST", "/api/v1/push?group_by=zone", "s_value 1\n", nil, 400, "job must be", neither, ""},
		{"POST", "/api/v1/push?group_by=job", "s_value 1\n", nil, 400, "belongs to no group", neither, ""},
		{"PUT", "/metrics/job/m/instance/i", "culvert_client_x 1\n", nil, 400, "culvert_client_", neither, ""},
		{"PUT", "/metrics/job/m/instance/i", "go_goroutines 1\n", nil, 400, "go_goroutines", neither, ""},
		{"PUT", "/metrics/job/m/instance/i", "# TYPE go_goroutines gauge\ngo_goroutines 1\n", nil, 200, "", machine, `go_goroutines{instance="i",job="m"} 1`},
		{"PUT", "/metrics/job/large", strings.Repeat("# a comment\n", 1000), nil, 413, "10000 bytes", neither, ""},

		{"GET", "/-/healthy", "", nil, 200, "OK", neither, ""},
		{"GET", "/-/ready", "", nil, 200, "OK", neither, ""},
		{"GET", "/api/v1/metrics", "", nil, 200, `"job":"a"`, neither, ""},
		{"GET", "/metrics", "", nil, 200, "culvert_client_spool_bytes", neither, ""},
		{"OPTIONS", "/api/v1/metrics", "", nil, 200, "", neither, ""},
		{"PUT", "/api/v1/admin/wipe", "", nil, 404, "", neither, ""},
		{"DELETE", "/api/v1/groups?match[]={job=\"a\"}", "", nil, 404, "", neither, ""},
		{"GET", "/", "", nil, 404, "", neither, ""},
		{"GET", "/metrics/job/a", "", nil, 405, "", neither, ""},
		{"PUT", "/metrics/job/", "", nil, 307, "", neither, ""},
		{"PATCH", "/metrics/job/a", "", nil, 405, "", neither, ""},
		{"DELETE", "/api/v1/push", "", nil, 405, "", neither, ""},
		{"GET", "/metrics//job", "", nil, 307, "", neither, ""},
	} {
		a.want(test.code, test.word, test.method, test.target, test.body, test.header...)
		switch test.goes {
		case machine:
			if served := a.served(); !strings.Contains(served, "\n"+test.sees+"\n") {
				t.Errorf("%s %s: the agent does not serve %q:\n%s", test.method, test.target, test.sees, served)
			}
		case service:
			r := proxy.next(t)
			if r.method != test.method || r.target != test.sees || r.body != test.body {
				t.Errorf("%s %s was relayed as %s %s with %q", test.method, test.target, r.method, r.target, r.body)
			}
			for i := 0; i < len(test.header); i += 2 {
				want := test.header[i+1]
				if test.header[i] == "X-Other" {
					want = ""
				}
				if got := r.header.Get(test.header[i]); got != want {
					t.Errorf("%s %s: %s was relayed as %q, want %q", test.method, test.target, test.header[i], got, want)
				}
			}
			made, err := strconv.ParseFloat(r.header.Get("Culvert-Push-Time"), 64)
			if age := time.Since(time.UnixMicro(int64(made * 1e6))); err != nil || age < 0 || age > patience {
				t.Errorf("Culvert-Push-Time: %q", r.header.Get("Culvert-Push-Time"))
			}
		}
	}
	if len(proxy.relays) > 0 {
		t.Errorf("this was relayed as well: %+v", <-proxy.relays)
	}
	var own []string
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (culvert_client_\S+)`).FindAllStringSubmatch(a.served(), -1) {
		own = append(own, m[1])
	}
	if problems, err := testutil.GatherAndLint(a.Gatherer(), own...); err != nil || len(problems) > 0 {
		t.Errorf("the agent's metrics: %v, %v", problems, err)
	}
}

// TestRelayAnswers: a push that can be taken later waits, and what is behind it too; one
// that can't is dropped, and what is behind it goes on.
func TestRelayAnswers(t *testing.T) {
	t.Parallel()
	const dropped, again = "dropped", "again"
	for _, test := range []struct {
		code    int
		header  []string
		outcome string
		reason  string // label of the metric
		logs    string
	}{
		{400, nil, dropped, "refused", "because it says so"},
		{413, nil, dropped, "too_large", "because it says so"},
		{412, nil, dropped, "other", "because it says so"},
		{401, []string{"Retry-After", "0"}, again, "forbidden", "does not let this agent relay"},
		{403, nil, again, "forbidden", "does not let this agent relay"},
		{404, []string{"Culvert-Error", "not-found"}, again, "not_supported", "older than this agent"},
		{405, nil, again, "not_supported", "older than this agent"},
		{429, nil, again, "busy", "because it says so"},
		{429, []string{"Retry-After", "1"}, again, "busy", "because it says so"},
		{500, nil, again, "unavailable", "because it says so"},
		{503, nil, again, "unavailable", "because it says so"},
		{507, nil, again, "unavailable", "because it says so"},
		{302, nil, again, "unavailable", "because it says so"},
	} {
		t.Run(fmt.Sprint(test.code, test.header), func(t *testing.T) {
			t.Parallel()
			proxy := newScripted(t, status(test.code, test.header...))
			a := startPushAgent(t, t.TempDir(), nil, proxy)
			a.want(202, "", "POST", "/metrics/job/first", "s_value 1\n")
			a.want(202, "", "POST", "/metrics/job/second", "s_value 2\n")
			first := proxy.next(t)
			if test.outcome == dropped {
				proxy.script(accept)
				// The script may have come too late for the second.
				a.logs.wait(t, "it was dropped", "job=first", "status="+strconv.Itoa(test.code), test.logs)
				if r := proxy.next(t); r.target != "/metrics/job/second" {
					t.Errorf("behind the push that was dropped comes %s", r.target)
				}
				a.awaitMetric(`culvert_client_spool_waiting_pushes{proxy="` + proxy.URL + `"} 0`)
				if served := a.served(); !strings.Contains(served, `culvert_client_relayed_pushes_total{outcome="`+test.reason+`",proxy="`+proxy.URL+`"} `) {
					t.Errorf("the agent serves:\n%s", served)
				}
				return
			}
			a.logs.wait(t, "Pushes wait in the spool", test.logs)
			a.awaitMetric(`culvert_client_relay_retries_total{proxy="` + proxy.URL + `",reason="` + test.reason + `"} 1`)
			if len(proxy.relays) > 0 {
				t.Errorf("behind the push that waits comes %+v", <-proxy.relays)
			}
			proxy.script(accept)
			proxy.end() // a new session is a reason to try again at once
			second := proxy.next(t)
			name, seq := first.id(t)
			if name2, seq2 := second.id(t); first.target != second.target || first.body != second.body || name != name2 || seq != seq2 || first.header.Get("Culvert-Push-Time") != second.header.Get("Culvert-Push-Time") {
				t.Errorf("sent again, %+v is %+v", first, second)
			}
			third := proxy.next(t)
			if name3, seq3 := third.id(t); third.target != "/metrics/job/second" || name3 != name || seq3 <= seq {
				t.Errorf("behind %+v comes %+v", second, third)
			}
			a.logs.wait(t, "Pushes are relayed again")
		})
	}
}

// TestRelayRetries: without a new session the agent tries again too, under the same ID;
// an answer that got lost costs nothing.
func TestRelayRetries(t *testing.T) {
	t.Parallel()
	proxy := newScripted(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	a := startPushAgent(t, t.TempDir(), nil, proxy)
	a.want(202, "", "POST", "/metrics/job/first", "s_value 1\n")
	_, seq := proxy.next(t).id(t)
	proxy.script(status(503, "Retry-After", "1"))
	if _, seq2 := proxy.next(t).id(t); seq != seq2 {
		t.Errorf("push %d became %d", seq, seq2)
	}
	proxy.script(status(200, "Culvert-Push-Repeated", "true"))
	if _, seq2 := proxy.next(t).id(t); seq != seq2 {
		t.Errorf("push %d became %d", seq, seq2)
	}
	a.awaitMetric(`culvert_client_relayed_pushes_total{outcome="repeated",proxy="` + proxy.URL + `"} 1`)
	a.awaitMetric(`culvert_client_relay_retries_total{proxy="` + proxy.URL + `",reason="no_answer"} 1`)
}

// TestRelayModes: all proxies get all, or the first that is connected.
func TestRelayModes(t *testing.T) {
	t.Parallel()
	one, two := newScripted(t, accept), newScripted(t, accept)
	a := startPushAgent(t, t.TempDir(), nil, one, two)
	a.want(202, "", "POST", "/metrics/job/j", "s_value 1\n")
	r1, r2 := one.next(t), two.next(t)
	if r1.body != r2.body || r1.header.Get("Culvert-Push-Id") != r2.header.Get("Culvert-Push-Id") {
		t.Errorf("%+v and %+v are not the same", r1, r2)
	}
	a.awaitMetric("culvert_client_spool_bytes 0")
	if err := a.Reload(a.config(func(c *agent.Config) { c.Push.Relay = agent.RelayFirst })); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		a.want(202, "", "POST", "/metrics/job/j", "s_value 1\n")
		one.next(t)
	}
	a.awaitMetric(`culvert_client_spool_waiting_pushes{proxy="first"} 0`)
	one.end()
	one.Config.Handler = http.NotFoundHandler() // not in use by a session
	one.CloseClientConnections()
	one.Listener.Close()
	a.logs.wait(t, `msg="Session lost"`, one.URL)
	a.want(202, "", "POST", "/metrics/job/j", "s_value 2\n")
	if r := two.next(t); r.body != "s_value 2\n" {
		t.Errorf("the second proxy gets %+v", r)
	}
	a.awaitMetric(`culvert_client_spool_waiting_pushes{proxy="first"} 0`)

	// Back to all: the one that is gone lacks what comes from now on.
	if err := a.Reload(a.config(nil)); err != nil {
		t.Fatal(err)
	}
	a.want(202, "", "POST", "/metrics/job/j", "s_value 3\n")
	two.next(t)
	a.awaitMetric(`culvert_client_spool_waiting_pushes{proxy="` + one.URL + `"} 1`)
	a.awaitMetric(`culvert_client_spool_waiting_pushes{proxy="` + two.URL + `"} 0`)
	// Without it, nothing waits.
	if err := a.Reload(a.config(func(c *agent.Config) { c.ProxyURLs = c.ProxyURLs[1:] })); err != nil {
		t.Fatal(err)
	}
	a.awaitMetric("culvert_client_spool_bytes 0")
}

// TestRelaySameProxy: of two URLs of one proxy, neither keeps pushes waiting.
func TestRelaySameProxy(t *testing.T) {
	t.Parallel()
	proxy := newScripted(t, accept)
	other := strings.Replace(proxy.URL, "127.0.0.1", "localhost", 1)
	a := startPushAgent(t, t.TempDir(), func(c *agent.Config) { c.ProxyURLs = append(c.ProxyURLs, other) }, proxy)
	a.logs.wait(t, "this is the same proxy")
	a.want(202, "", "POST", "/metrics/job/j", "s_value 1\n")
	if r1, r2 := proxy.next(t), proxy.next(t); r1.header.Get("Culvert-Push-Id") != r2.header.Get("Culvert-Push-Id") {
		t.Errorf("%+v and %+v are not the same", r1, r2)
	}
	a.awaitMetric("culvert_client_spool_bytes 0")
}

// TestPushRestart: groups and spool are there after a restart of the agent, with and
// without an address for more.
func TestPushRestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	proxy := newScripted(t, status(503))
	a := startPushAgent(t, dir, nil, proxy)
	for n := range 3 {
		a.want(202, "", "POST", "/metrics/job/j", fmt.Sprintf("s_value %d\n", n))
	}
	a.want(200, "", "PUT", "/metrics/job/j/instance/i", "m_value 7\n")
	name, _ := proxy.next(t).id(t)
	other, err := agent.New(a.config(nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Run(t.Context()); !errors.Is(err, boltstore.ErrInUse) || !strings.Contains(err.Error(), "--storage.path") {
		t.Errorf("a second agent with the same directory: %v", err)
	}
	a.stop()
	proxy.script(accept)
	for len(proxy.relays) > 0 {
		<-proxy.relays
	}
	b := startAgent(t, nil, func(c *agent.Config) {
		c.ProxyURLs, c.Push.StoragePath = []string{proxy.URL}, dir
	})
	for n := range 3 {
		r := proxy.next(t)
		if name2, _ := r.id(t); name != name2 || r.body != fmt.Sprintf("s_value %d\n", n) {
			t.Errorf("after the restart push %d comes as %+v", n, r)
		}
	}
	served := (&pushAgent{b, t, ""}).served()
	if !strings.Contains(served, "m_value{instance=\"i\",job=\"j\"} 7\n") {
		t.Errorf("after the restart the agent serves:\n%s", served)
	}
}

// TestSpoolFull: when there is no room, pushes are refused and say why, until a proxy
// takes some.
func TestSpoolFull(t *testing.T) {
	t.Parallel()
	proxy := newScripted(t, status(503))
	a := startPushAgent(t, t.TempDir(), func(c *agent.Config) { c.Push.SpoolMaxBytes = 10_000 }, proxy)
	body := strings.Repeat("# a comment\n", 300)
	a.want(202, "", "POST", "/metrics/job/j", body)
	a.want(202, "", "POST", "/metrics/job/j", body)
	resp, text := a.do("POST", "/metrics/job/j", body)
	if resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" || !strings.Contains(text, "--push.spool-max-bytes") {
		t.Errorf("when the spool is full: %s %v %s", resp.Status, resp.Header, text)
	}
	a.want(413, "--push.spool-max-bytes", "POST", "/metrics/job/j", strings.Repeat(body, 3))
	a.want(200, "", "POST", "/metrics/job/j/instance/i", body)
	a.awaitMetric("culvert_client_spool_refused_total 2")
	proxy.script(accept)
	a.awaitMetric("culvert_client_spool_bytes 0")
	a.want(202, "", "POST", "/metrics/job/j", body)
}

// TestPushDamage: a damaged file is left as it is, and is trouble for its own pushes
// alone; when it is moved away, the agent starts a new one.
func TestPushDamage(t *testing.T) {
	t.Parallel()
	for file, targets := range map[string][2]string{
		"spool.db": {"/metrics/job/j", "/metrics/job/j/instance/i"},
		"push.db":  {"/metrics/job/j/instance/i", "/metrics/job/j"},
	} {
		t.Run(file, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := filepath.Join(dir, file)
			damaged := bytes.Repeat([]byte("hello "), 10_000)
			if err := os.WriteFile(path, damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			proxy := newScripted(t, accept)
			a := startPushAgent(t, dir, nil, proxy)
			a.logs.wait(t, "msg=Connected")
			a.want(503, path, "POST", targets[0], "s_value 1\n")
			a.want(503, "move it away", "GET", "/-/ready", "")
			if resp, _ := a.do("POST", targets[1], "s_value 1\n"); resp.StatusCode/100 != 2 {
				t.Errorf("a push that has nothing to do with it: %s", resp.Status)
			}
			a.awaitMetric("culvert_client_push_store_up 0")
			if after, err := os.ReadFile(path); err != nil || !bytes.Equal(after, damaged) {
				t.Errorf("the file was changed (%v)", err)
			}
			if err := os.Rename(path, path+".damaged"); err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(2 * patience); ; time.Sleep(50 * time.Millisecond) {
				resp, text := a.do("POST", targets[0], "s_value 1\n")
				if resp.StatusCode/100 == 2 {
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("once the file is gone: %s %s", resp.Status, text)
				}
			}
			a.awaitMetric("culvert_client_push_store_up 1")
			a.awaitMetric("culvert_client_spool_bytes 0")
		})
	}
}

// TestPushClashes: a family that several sources have never fails a scrape.
func TestPushClashes(t *testing.T) {
	t.Parallel()
	textfiles := t.TempDir()
	for name, text := range map[string]string{
		"a.prom": "# TYPE clash_bytes counter\nclash_bytes 1\n",
		"b.prom": "# TYPE same_bytes gauge\nsame_bytes{instance=\"i\",job=\"j\"} 1\nsame_bytes{file=\"b\"} 2\n",
		"c.prom": "# TYPE wait histogram\nwait_bucket{le=\"+Inf\"} 1\nwait_sum 1\nwait_count 1\n",
	} {
		if err := os.WriteFile(filepath.Join(textfiles, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p := newProxy(t, nil)
	a := startPushAgent(t, t.TempDir(), func(c *agent.Config) {
		c.ProxyURLs = []string{p.url}
		c.Textfile.Directories = []string{textfiles}
	})
	a.logs.wait(t, "msg=Connected")
	a.want(200, "", "PUT", "/metrics/job/j/instance/i", "# TYPE clash_bytes gauge\nclash_bytes 3\n# TYPE same_bytes gauge\nsame_bytes 4\n# TYPE wait_count gauge\nwait_count 5\n")
	code, body := p.get("http://agent.web-1/metrics")
	if code != 200 {
		t.Errorf("the scrape: %d", code)
	}
	for line, want := range map[string]bool{
		"clash_bytes{instance=\"i\",job=\"j\"} 3": true, "clash_bytes 1": false,
		"same_bytes{instance=\"i\",job=\"j\"} 4": true, "same_bytes{instance=\"i\",job=\"j\"} 1": false, `same_bytes{file="b",instance="",job=""} 2`: true,
		"wait_count{instance=\"i\",job=\"j\"} 5": true, "wait_count 1": false,
	} {
		if got := strings.Contains(body, "\n"+line+"\n"); got != want {
			t.Errorf("line %q: %v, want %v in\n%s", line, got, want, body)
		}
	}
}

// TestPushSocket: pushes come by a Unix socket too; one that a killed process left is
// replaced, one that is in use is not.
func TestPushSocket(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "push.sock")
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	left.Close()
	proxy := newScripted(t, accept)
	a := startPushAgent(t, dir, func(c *agent.Config) { c.Push.ListenAddresses = append(c.Push.ListenAddresses, "unix:"+path) }, proxy)
	a.logs.waitN(t, 2, "Taking pushes")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
	resp, err := client.Post("http://localhost/metrics/job/j", "text/plain", strings.NewReader("s_value 1\n"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 202 {
		t.Errorf("by the socket: %s", resp.Status)
	}
	if r := proxy.next(t); r.body != "s_value 1\n" {
		t.Errorf("what came by the socket was relayed as %+v", r)
	}
	other, err := agent.New(a.config(func(c *agent.Config) {
		c.Push = agent.Push{ListenAddresses: []string{"unix:" + path}, StoragePath: t.TempDir()}
	}))
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Run(t.Context()); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a second agent on the socket: %v", err)
	}
	a.stop()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left behind: %v", err)
	}
}

func TestPushConfig(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		push agent.Push
		want string
	}{
		{agent.Push{ListenAddresses: []string{"127.0.0.1:9091"}}, "--storage.path"},
		{agent.Push{ListenAddresses: []string{"9091"}, StoragePath: "x"}, "127.0.0.1:9091"},
		{agent.Push{ListenAddresses: []string{"unix:"}, StoragePath: "x"}, "unix:/run"},
		{agent.Push{ListenAddresses: []string{"unix:/" + strings.Repeat("x", 200)}, StoragePath: "x"}, "201 bytes"},
		{agent.Push{SpoolMaxBytes: -1}, "--push.spool-max-bytes"},
		{agent.Push{Relay: "some"}, "--push.relay=some"},
	} {
		if _, err := agent.New(agent.Config{Name: "a", ProxyURLs: []string{"http://p:1"}, Push: test.push}); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: got %v, want an error with %q", test.push, err, test.want)
		}
	}
}

// TestRelayTrim: a proxy that takes nothing for long loses the oldest pushes, when another
// one has them and there is no room; that costs nobody else anything.
func TestRelayTrim(t *testing.T) {
	t.Parallel()
	one, two := newScripted(t, accept), newScripted(t, status(503))
	a := startPushAgent(t, t.TempDir(), func(c *agent.Config) { c.Push.SpoolMaxBytes = 20_000 }, one, two)
	comment := strings.Repeat("# a comment\n", 80)
	const pushes = 60
	for n := range pushes {
		body := fmt.Sprintf("%ss_value %d\n", comment, n)
		a.want(202, "", "POST", "/metrics/job/j", body)
		if r := one.next(t); r.body != body {
			t.Fatalf("push %d came as %+v", n, r)
		}
		a.awaitMetric(`culvert_client_spool_waiting_pushes{proxy="` + one.URL + `"} 0`)
	}
	a.logs.wait(t, "The spool is full", two.URL)
	served := a.served()
	m := regexp.MustCompile(`culvert_client_spool_trimmed_total\{proxy="` + two.URL + `"\} (\d+)\n`).FindStringSubmatch(served)
	if m == nil || !strings.Contains(served, `culvert_client_spool_trimmed_total{proxy="`+one.URL+`"} 0`+"\n") || !strings.Contains(served, "culvert_client_spool_refused_total 0\n") {
		t.Fatalf("the agent serves\n%s", served)
	}
	trimmed, _ := strconv.Atoi(m[1])
	if trimmed < pushes/2 {
		t.Errorf("%d pushes of %d were trimmed", trimmed, pushes)
	}
	two.script(accept)
	two.end()
	a.awaitMetric("culvert_client_spool_bytes 0")
	var got []string
	for len(two.relays) > 0 {
		if r := <-two.relays; len(got) == 0 || got[len(got)-1] != r.body {
			got = append(got, r.body) // but for what was sent again
		}
	}
	for n := trimmed; n < pushes; n++ {
		if want := fmt.Sprintf("%ss_value %d\n", comment, n); len(got) < pushes-trimmed || got[len(got)-pushes+n] != want {
			t.Fatalf("push %d is missing, or in the wrong place, of %d", n, len(got))
		}
	}
}
