package server_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

// relays sends requests in origin form on streams that it opens in a session, as an
// agent does.
type relays struct {
	t      *testing.T
	client *http.Client
}

func newRelays(t *testing.T, s *protocol.Session) relays {
	transport := &http.Transport{
		DialContext:        func(ctx context.Context, _, _ string) (net.Conn, error) { return s.Open(ctx) },
		DisableCompression: true, ExpectContinueTimeout: patience,
	}
	t.Cleanup(transport.CloseIdleConnections)
	return relays{t, &http.Client{Transport: transport, Timeout: patience}}
}

// push relays a push; header has names and values in turn.
func (r relays) push(method, target string, body io.Reader, header ...string) answer {
	req, err := http.NewRequest(method, "http://tunnel"+target, body)
	if err != nil {
		return answer{err: err}
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return answer{err: err}
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return answer{code: resp.StatusCode, header: resp.Header, body: string(text), err: err, raw: resp}
}

// slow relays a push whose body is what is written to the result, which runs from now on.
func (r relays) slow(method, target string, done func(answer), header ...string) *io.PipeWriter {
	r.t.Helper()
	body, writer := io.Pipe()
	// The body is sent when the proxy reads it.
	go func() { done(r.push(method, target, body, append(header, "Expect", "100-continue")...)) }()
	if _, err := fmt.Fprintln(writer, "# the first line"); err != nil {
		r.t.Fatal(err)
	}
	return writer
}

const relaySpool = "web-1-0123456789abcdef"

// TestRelay: an agent relays what names its groups, each push once, and nothing else.
func TestRelay(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	p := newProxy(t, func(c *server.Config) {
		c.Registry, c.EnableAdminAPI, c.RoutePrefix = registry, true, "/prefix"
		c.Push.MaxBodySize = 1 << 20
	})
	session := dial(t, p, "web-1", "1")
	r := newRelays(t, session)
	a := r.push("PUT", "/metrics/job/j", strings.NewReader("m 1\n"))
	a.want(t, 503, "web-1", "register")
	if a.header.Get("Retry-After") == "" || a.header.Get(protocol.HeaderError) != string(protocol.CodeUnavailable) {
		t.Errorf("before the registration: %v", a.header)
	}
	if err := session.Register(t.Context(), &protocol.Registration{}); err != nil {
		t.Fatal(err)
	}

	tooLarge := strings.Repeat("\n", 1<<20) + "m 1\n"
	for _, c := range []struct {
		name, method, target, body string
		header                     []string
		seq                        int // 0: the request has no ID
		code                       int
		repeated                   bool
		answerSeq, words           string
	}{
		{"PUT", "PUT", "/metrics/job/j?interval=1h&ttl=2h", "m 1\n", nil, 1, 200, false, "1", ""},
		{"its repetition", "PUT", "/metrics/job/j?interval=1h&ttl=2h", "m 1\n", nil, 1, 200, true, "1", ""},
		{"POST of protobuf's gzip", "POST", "/metrics/job@base64/ai9r/instance/i", gzipped("n 2\n"), []string{"Content-Encoding", "gzip"}, 2, 200, false, "2", ""},
		{"a sum", "POST", "/metrics/job/sum?aggregate=sum", "# TYPE c counter\nc 3\n", nil, 3, 200, false, "3", ""},
		{"the sum again", "POST", "/metrics/job/sum?aggregate=sum", "# TYPE c counter\nc 3\n", nil, 3, 200, true, "3", ""},
		{"its time", "POST", "/metrics/job/sum?aggregate=sum", "# TYPE c counter\nc 4\n", []string{gateway.HeaderPushTime, "1700000000.5"}, 4, 200, false, "4", ""},
		{"a batch", "POST", "/api/v1/push?group_by=job,instance", "b{job=\"x\",instance=\"1\"} 1\nb{job=\"x\",instance=\"2\"} 2\n", nil, 5, 200, false, "5", `"groups":2`},
		{"the batch again", "POST", "/api/v1/push?group_by=job,instance", "b{job=\"x\",instance=\"1\"} 3\nb{job=\"x\",instance=\"2\"} 4\n", nil, 5, 200, true, "5", `"groups":2`},
		{"DELETE", "DELETE", "/metrics/job/x/instance/1", "", nil, 6, 202, false, "6", ""},
		{"DELETE again", "DELETE", "/metrics/job/x/instance/1", "", nil, 6, 202, true, "6", ""},
		{"a bad body", "PUT", "/metrics/job/j", "m\n", nil, 7, 400, false, "6", "line 1"},
		{"an inconsistent push", "PUT", "/metrics/job/j", "# TYPE c gauge\nc 1\n", nil, 7, 400, false, "6", "type"},
		{"an inconsistent push again", "PUT", "/metrics/job/j", "# TYPE c gauge\nc 1\n", nil, 7, 400, false, "6", "type"},
		{"a large body", "PUT", "/metrics/job/j", tooLarge, nil, 8, 413, false, "6", "--push.max-body-size"},
		{"a bad path", "PUT", "/metrics/job/j/x", "m 1\n", nil, 8, 400, false, "6", "without a value"},
		{"an empty part of the path", "PUT", "/metrics/job//x/y", "m 1\n", nil, 8, 400, false, "6", "job name"},
		{"a name of the proxy's", "PUT", "/metrics/job/j", "culvert_proxy_x 1\n", nil, 8, 400, false, "6", "server's own"},
		{"without an ID", "POST", "/metrics/job/noid", "m 5\n", nil, 0, 200, false, "", ""},
		{"a bad ID", "POST", "/metrics/job/noid", "m 6\n", []string{gateway.HeaderPushID, "x/1"}, 0, 400, false, "", gateway.HeaderPushID},

		{"wipe", "PUT", "/api/v1/admin/wipe", "", nil, 9, 404, false, "", "no such control request"},
		{"deletion by matcher", "DELETE", "/api/v1/groups?match[]={job=\"j\"}", "", nil, 9, 404, false, "", "no such control request"},
		{"DELETE of a batch", "DELETE", "/api/v1/push?group_by=job", "", nil, 9, 405, false, "6", "PUT and POST"},
		{"GET", "GET", "/metrics/job/j", "", nil, 9, 405, false, "6", "PUT, POST and DELETE"},
		{"a scrape", "GET", "/metrics", "", nil, 9, 404, false, "", "no such control request"},
		{"the route prefix", "PUT", "/prefix/metrics/job/j", "m 9\n", nil, 9, 404, false, "", "no such control request"},
		{"a path that only begins like it", "PUT", "/metrics/jobs/j", "m 9\n", nil, 9, 404, false, "", "no such control request"},
		{"no job", "PUT", "/metrics/job", "m 9\n", nil, 9, 404, false, "", "no such control request"},
	} {
		header := c.header
		if c.seq > 0 {
			header = append(header, gateway.HeaderPushID, fmt.Sprintf("%s/%d", relaySpool, c.seq))
		}
		a := r.push(c.method, c.target, strings.NewReader(c.body), header...)
		if a.want(t, c.code, c.words); t.Failed() {
			t.Fatal(c.name)
		}
		if seq, repeated := a.header.Get(gateway.HeaderPushSeq), a.header.Get(gateway.HeaderPushRepeated) == "true"; seq != c.answerSeq || repeated != c.repeated {
			t.Errorf("%s: got the number %q, repeated %v, want %q, %v", c.name, seq, repeated, c.answerSeq, c.repeated)
		}
	}
	groups := raw(t, p.addr, "GET /prefix/metrics?only=groups HTTP/1.1\r\nHost: "+p.addr+"\r\n\r\n")
	groups.want(t, 200, `m{instance="",job="j"} 1`, `n{instance="i",job="j/k"} 2`, `c{instance="",job="sum"} 7`, `b{instance="2",job="x"} 2`,
		`push_time_seconds{instance="",job="sum"} 1.7000000005e+09`, `push_up{instance="",job="j"} 1`, `m{instance="",job="noid"} 5`)
	if strings.Contains(groups.body, `{instance="1",job="x"}`) {
		t.Errorf("a group that was deleted is there:\n%s", groups.body)
	}

	// In absolute form it would be a scrape, which agents don't send.
	conn, err := session.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "PUT http://tunnel/metrics/job/absolute HTTP/1.1\r\nHost: tunnel\r\nContent-Length: 4\r\n\r\nm 1\n")
	readAnswer(bufio.NewReader(conn), "PUT").want(t, 404)

	// The public routes know the spool as well.
	a = p.push("POST", "/prefix/metrics/job/sum?aggregate=sum", "# TYPE c counter\nc 3\n", gateway.HeaderPushID+": "+relaySpool+"/6")
	a.want(t, 200)
	if a.header.Get(gateway.HeaderPushRepeated) != "true" || a.header.Get(gateway.HeaderPushSeq) != "6" {
		t.Errorf("on the public route: %v", a.header)
	}

	for outcome, want := range map[string]float64{"applied": 7, "repeated": 4, "refused": 10, "unavailable": 1} {
		if got := metricSum(t, registry, "culvert_proxy_push_relayed_total", outcome); got != want {
			t.Errorf("%v relays are %s, want %v", got, outcome, want)
		}
	}
	if got := metricSum(t, registry, "culvert_proxy_push_spools"); got != 1 {
		t.Errorf("%v spools, want 1", got)
	}
	problems, err := testutil.GatherAndLint(registry)
	if err != nil || len(problems) > 0 {
		t.Errorf("the metrics have %v, %v", problems, err)
	}
}

// Relays whose bodies are large and slow hold up neither the registration nor other
// agents, and what is too much is told to come back.
func TestRelayLarge(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	session := register(t, p, "web-1", "1", protocol.Registration{})
	r := newRelays(t, session)
	text := make([]byte, 1<<20)
	for i := range text {
		text[i] = "0123456789abcdef"[rand.IntN(16)]
	}
	// 63 MiB: as much as may be.
	var large strings.Builder
	for i := range 63 {
		fmt.Fprintf(&large, "large{n=\"%d\",text=%q} 1\n", i, text)
	}
	r.client.Timeout = time.Minute // a race detector takes its time
	if a := r.push("PUT", "/metrics/job/large", strings.NewReader(large.String()), gateway.HeaderPushID, relaySpool+"/1"); a.code != 200 {
		t.Fatalf("a push of %d bytes: %d %s %v", large.Len(), a.code, a.body, a.err)
	}

	const running = 4
	answers := make(chan answer, running)
	var bodies []*io.PipeWriter
	for i := range running {
		bodies = append(bodies, r.slow("PUT", fmt.Sprintf("/metrics/job/slow/instance/%d", i), func(a answer) { answers <- a }))
	}
	busy := r.push("PUT", "/metrics/job/more", strings.NewReader("m 1\n"))
	busy.want(t, 429, "web-1")
	if busy.header.Get("Retry-After") == "" || busy.header.Get(protocol.HeaderError) != string(protocol.CodeBusy) {
		t.Errorf("got %v", busy.header)
	}
	// A body that nobody reads.
	r.push("PUT", "/metrics/job/more", strings.NewReader(large.String())).want(t, 429)
	if err := session.Register(t.Context(), &protocol.Registration{Labels: map[string]string{"a": "b"}}); err != nil {
		t.Errorf("registration while relays run: %v", err)
	}
	other := newRelays(t, register(t, p, "web-2", "2", protocol.Registration{}))
	other.push("PUT", "/metrics/job/other", strings.NewReader("m 1\n")).want(t, 200)
	for _, w := range bodies {
		fmt.Fprintf(w, "m 1\nn 2\n")
		w.Close()
	}
	for range running {
		received(t, answers, "the answer to a slow relay").want(t, 200)
	}
	r.push("PUT", "/metrics/job/more", strings.NewReader("m 1\n")).want(t, 200)
	if got := strings.Count(p.samples(), `job="slow"`); got != 2*running {
		t.Errorf("%d series of slow pushes are there, want %d", got, 2*running)
	}
}

// A proxy that goes away takes no new relays, and finishes those that run.
func TestRelayDrain(t *testing.T) {
	t.Parallel()
	storage := t.TempDir()
	p := newProxy(t, func(c *server.Config) { c.StoragePath, c.ShutdownTimeout = storage, patience })
	session := register(t, p, "web-1", "1", protocol.Registration{})
	r := newRelays(t, session)
	r.push("POST", "/metrics/job/j?aggregate=sum", strings.NewReader("# TYPE c counter\nc 1\n"), gateway.HeaderPushID, relaySpool+"/1").want(t, 200)
	slow := make(chan answer, 1)
	writer := r.slow("POST", "/metrics/job/j?aggregate=sum", func(a answer) { slow <- a }, gateway.HeaderPushID, relaySpool+"/2")
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		p.stop()
	}()
	p.logs.wait(t, "msg=Stopping")
	a := r.push("POST", "/metrics/job/j?aggregate=sum", strings.NewReader("# TYPE c counter\nc 1\n"), gateway.HeaderPushID, relaySpool+"/2")
	a.want(t, 503, "going away")
	if a.header.Get("Retry-After") == "" || a.header.Get(protocol.HeaderError) != string(protocol.CodeDraining) || a.header.Get(gateway.HeaderPushSeq) != "1" {
		t.Errorf("got %v", a.header)
	}
	fmt.Fprintf(writer, "# TYPE c counter\nc 1\n")
	writer.Close()
	received(t, slow, "the relay that ran").want(t, 200)
	received(t, stopped, "the proxy's end")

	again := newProxy(t, func(c *server.Config) { c.StoragePath = storage })
	r = newRelays(t, register(t, again, "web-1", "1", protocol.Registration{}))
	a = r.push("POST", "/metrics/job/j?aggregate=sum", strings.NewReader("# TYPE c counter\nc 1\n"), gateway.HeaderPushID, relaySpool+"/2")
	if a.want(t, 200); a.header.Get(gateway.HeaderPushRepeated) != "true" {
		t.Errorf("after a restart: %v", a.header)
	}
	if got, want := again.samples(), `c{instance="",job="j"} 2`; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
