package server_test

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"runtime/metrics"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

// TestSpellings: no spelling of a path, or of a host, leads past the credentials.
func TestSpellings(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) {
		c.ConfigFile, c.EnableAdminAPI, c.EnableLifecycle = file.path, true, true
	})
	newAgent(t, p, func(c *agent.Config) { c.Name, c.TokenFile = "web-1.example.net", tokenFile(t, "agent"); allowAll(c) })
	for _, method := range []string{"GET", "PUT", "POST", "DELETE", "HEAD", "PATCH", "get", "OPTIONS"} {
		for _, target := range []string{
			"//metrics", "/./metrics", "/metrics/", "/%6detrics", "/metrics%2f", "/metrics%00", "/metrics;x", "/metrics?only=self", "/METRICS",
			"/-/healthy/../../metrics", "/-/healthy/..%2f..%2fmetrics", "/-/healthy/%2e%2e/%2e%2e/metrics", "/-/healthy/..;/..;/metrics", `/-/healthy\..\..\metrics`,
			"/-/ready/../reload", "/-/ready%2f..%2freload", "//-/reload", "/-//reload", "/-/./reload", "/-/reload/", "/-/reload/../reload",
			"/-/quit/../reload", "/tunnel/../metrics", "/tunnel/", "/tunnel/x", "/tunnel%2f", "/scrape/../metrics", "/scrape/..%2fmetrics", "/scrape/web-1.example.net/agent/metrics",
			"/scrape//web-1.example.net/agent/metrics", "/scrape/%2e%2e/metrics/x", "/api/v1/../v1/status", "/api/v1/status/", "/api//v1/agents/web-1.example.net",
			"/api/v1/agents/web-1.example.net/", "/api/v1/agents/%77eb-1.example.net", "/api/v1/admin/wipe", "/api/v1/admin/./wipe", "/api/v1/%61dmin/wipe",
			"/metrics/job/backup", "//metrics/job/backup", "/metrics/job/../job/backup", "/metrics/./job/backup", "/metrics/job@base64/YmFja3Vw", "/metrics/job//backup",
			"/clients#/-/healthy", "/targets?x=/-/healthy", "http:/metrics", "*", "/", "",
			"http://" + p.addr + "/metrics", "http://user@" + p.addr + "/-/healthy", "HTTP://web-1.example.net/metrics", "https://web-1.example.net/", "ftp://web-1.example.net/", "http:///metrics",
			"//web-1.example.net:9100/metrics",
		} {
			a := p.send(method, target, "Host: proxy")
			switch {
			case a.err != nil && a.code == 0 && isBroken(a.err): // no answer is none
			case a.code >= 300 && a.code < 600:
			case a.code == 200 && method == "OPTIONS" && a.body == "":
			default:
				t.Errorf("%s %s: got %d %s %v\n%s", method, target, a.code, a.reason, a.err, a.body)
			}
		}
	}
	p.get("/metrics?only=groups", "Authorization: "+basic("prom", "secret")).ok(t, "")
	p.get("/-/ready").ok(t, "OK")
	if n := p.logs.count("Configuration reloaded"); n != 0 {
		t.Error("somebody reloaded the configuration")
	}
	p.get("/api/v1/agents/web-1.example.net", "Authorization: "+basic("prom", "secret")).ok(t, `"connected":true`)
}

// TestForeignText: what strangers and agents say stays one value of a header, one line of
// the log, one string of JSON, and text on the page.
func TestForeignText(t *testing.T) {
	t.Parallel()
	const evil = "x\r\nX-Evil: 1\r\n\r\n<script>alert(1)</script>\nlevel=ERROR msg=\"all is lost\"\x1b[2J\x00\u2028"
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	d := &protocol.Dialer{ProxyURL: mustParse(t, p.url), Agent: "web-1.example.net", Instance: "1", Token: func() (string, error) { return "agent", nil }}
	s, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for what, reg := range map[string]protocol.Registration{
		"a label's name":  {Labels: map[string]string{evil: "x"}},
		"a target":        {Targets: []protocol.Target{{Name: evil, Path: "/"}}},
		"a path":          {Targets: []protocol.Target{{Name: "t", Path: evil}}},
		"a host":          {Hosts: []string{evil}},
		"a target's name": {Targets: []protocol.Target{{Name: "t", Path: "/", Labels: map[string]string{"__address__": evil}}}},
	} {
		if err := s.Register(t.Context(), &reg); err == nil {
			t.Errorf("%s was taken", what)
		} else if strings.ContainsAny(err.Error(), "\r\n\x1b") {
			t.Errorf("%s: the refusal is %q", what, err)
		}
	}
	if err := s.Register(t.Context(), &protocol.Registration{
		Version: evil, Capabilities: []string{evil}, Labels: map[string]string{"job": evil, "instance": evil},
		Targets: []protocol.Target{{Name: "t", Path: "/" + evil, Params: map[string][]string{"a": {evil}}, Labels: map[string]string{"job": evil}}},
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.SendDrain(t.Context(), protocol.Drain{Reason: evil}); err != nil {
		t.Fatal(err)
	}
	user := basic("prom", "secret")
	requests := []string{
		"GET http://web-1.example.net:1/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: " + user, // the answer tells why the agent was lost
		"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: " + user,
		"GET /clients HTTP/1.1\r\nHost: x\r\nAuthorization: " + user,
		"GET /targets HTTP/1.1\r\nHost: x\r\nAuthorization: " + user,
		"GET /targets?mode=path HTTP/1.1\r\nHost: <script>alert(1)</script>\r\nAuthorization: " + user,
		"GET /targets?mode=%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: x\r\nAuthorization: " + user,
		"GET /api/v1/agents HTTP/1.1\r\nHost: x\r\nAuthorization: " + user,
		"GET /api/v1/agents/x%0d%0aX-Evil:%201%3Cscript%3Ealert(1)%3C%2fscript%3E HTTP/1.1\r\nHost: x\r\nAuthorization: " + user,
		"GET /scrape/x%0d%0aX-Evil:%201/<script>/x HTTP/1.1\r\nHost: x\r\nAuthorization: " + user,
		"GET /%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: x\r\nAuthorization: " + user,
		"GET //%0d%0aX-Evil:%201/.. HTTP/1.1\r\nHost: x\r\nAuthorization: " + user,
		"GET http://%0d%0aX-Evil:%201/ HTTP/1.1\r\nHost: x\r\nProxy-Authorization: " + user,
		"PUT /metrics/job/x%0d%0aX-Evil:%201 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nAuthorization: Bearer pusher",
	}
	for range 12 { // until it is logged that they come again and again
		requests = append(requests, "GET /clients HTTP/1.1\r\nHost: x\r\nAuthorization: Basic "+base64.StdEncoding.EncodeToString([]byte(evil+":x")))
	}
	for _, name := range []string{"<b>web-2</b>", "web-2\"", "web-2\\", "web-\xff", "web 2", "w\u00e9b", "../web-2", "web-2/..", "web-2%00", "web_2.", "*", "*.example.net", ".", "-", strings.Repeat("a", 300)} {
		requests = append(requests, "GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: culvert/1\r\nCulvert-Instance: 1\r\nAuthorization: Bearer agent\r\nCulvert-Agent: "+name)
	}
	for _, request := range requests {
		a := raw(t, p.addr, request+"\r\n\r\n")
		what := strings.ReplaceAll(request, evil, "EVIL")
		if a.err != nil || a.header.Get("X-Evil") != "" || a.code == 101 {
			t.Errorf("%s: got %d %v %v", what, a.code, a.header, a.err)
		}
		if contentType := a.header.Get("Content-Type"); strings.HasPrefix(contentType, "text/html") && strings.Contains(a.body, "<script>alert") {
			t.Errorf("%s: a page runs what an agent says: %s", what, a.body)
		} else if contentType == "" && a.body != "" {
			t.Errorf("%s: a browser may guess what it is: %q", what, a.body)
		}
	}
	p.logs.wait(t, "level=WARN", "further tries are slowed")
	if n := p.logs.count("level=ERROR"); n != p.logs.count("level=DEBUG", "level=ERROR")+p.logs.count("level=INFO", "level=ERROR")+p.logs.count("level=WARN", "level=ERROR") {
		t.Error("somebody else's text is a line of the log")
	}
	if strings.ContainsAny(p.logs.String(), "\x1b\x00\u2028") {
		t.Error("the log has control characters")
	}
}

// TestLabelsThatPass: an agent's labels never become what Prometheus takes for its own,
// and no push passes for one of another job.
func TestLabelsThatPass(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole()+"discovery: {promote_labels: [env]}\n")
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	d := &protocol.Dialer{ProxyURL: mustParse(t, p.url), Agent: "web-1.example.net", Instance: "1", Token: func() (string, error) { return "agent", nil }}
	s, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, name := range []string{"__scrape_interval__", "__address__", "__meta_culvert_agent", "__name__", "__param_x", "__"} {
		for _, reg := range []protocol.Registration{{Labels: map[string]string{name: "1s"}}, {Targets: []protocol.Target{{Name: "t", Path: "/", Labels: map[string]string{name: "1s"}}}}} {
			wantRefusal(t, s.Register(t.Context(), &reg), 400, protocol.CodeInvalid, name)
		}
	}
	labels := map[string]string{"job": "node", "instance": "db-1", "env": "prod", "scrape_interval": "1s"}
	if err := s.Register(t.Context(), &protocol.Registration{Labels: labels, Targets: []protocol.Target{{Name: "t", Path: "/", Labels: labels}}}); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/clients", "/targets", "/targets?mode=path"} {
		a := p.get(path, "Authorization: "+basic("prom", "secret"))
		a.ok(t, `"__meta_culvert_label_job":"node"`)
		a.ok(t, `"__meta_culvert_label_instance":"db-1"`)
		for _, forged := range []string{`"job":`, `"instance":"db-1"`, `"scrape_interval":`, `__scrape_interval__`} {
			if strings.Contains(a.body, forged) {
				t.Errorf("%s has %s: %s", path, forged, a.body)
			}
		}
	}
	body := "up{job=\"node\",instance=\"db-1\"} 1\npush_up{job=\"node\",instance=\"db-1\"} 0\npush_time_seconds 1\n"
	a := raw(t, p.addr, fmt.Sprintf("PUT /metrics/job/backup HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer pusher\r\nContent-Length: %d\r\n\r\n%s", len(body), body))
	if a.code != 200 {
		t.Fatalf("got %d %s", a.code, a.body)
	}
	exposed := p.get("/metrics?only=groups", "Authorization: "+basic("prom", "secret"))
	exposed.ok(t, `up{instance="db-1",job="backup"} 1`) // which is not the up of a scrape: that has another job
	if strings.Contains(exposed.body, "node") {
		t.Errorf("a push passes for another job: %s", exposed.body)
	}
}

// TestRevokedTokenReplayed: a session that was opened with a token that is revoked does
// nothing any more, even before the proxy has ended it; nor does a new one.
func TestRevokedTokenReplayed(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	dial := func() (*protocol.Session, error) {
		d := &protocol.Dialer{ProxyURL: mustParse(t, p.url), Agent: "web-1.example.net", Instance: "1", Token: func() (string, error) { return "agent", nil }}
		return d.Dial(t.Context())
	}
	for range 20 { // the proxy may be faster
		file.write(everyRole())
		if err := p.Reload(); err != nil {
			t.Fatal(err)
		}
		s, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		if err := s.Register(t.Context(), &protocol.Registration{}); err != nil {
			t.Fatal(err)
		}
		file.write(strings.ReplaceAll(everyRole(), hashOf("agent"), hashOf("another")))
		if err := p.Reload(); err != nil {
			t.Fatal(err)
		}
		if err := s.Register(t.Context(), &protocol.Registration{Version: "again"}); err == nil {
			t.Error("the session registered again")
		} else if r, ok := protocol.AsRefusal(err); ok && r.Status != 403 {
			t.Errorf("got %v", err)
		}
		if stream, err := s.Open(t.Context()); err == nil {
			fmt.Fprint(stream, "PUT /metrics/job/backup HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nx 1\n")
			if a := readAnswer(bufio.NewReader(stream), "PUT"); a.code == 200 {
				t.Error("the session relayed a push")
			}
			stream.Close()
		}
		received(t, s.Done(), "the end of the session")
		_, err = dial()
		wantRefusal(t, err, 401, protocol.CodeUnauthorized)
	}
	if a := p.get("/metrics?only=groups", "Authorization: "+basic("prom", "secret")); strings.Contains(a.body, "backup") {
		t.Errorf("a push of a revoked token is stored: %s", a.body)
	}
}

// peak measures how much more memory is in use while f runs than before, in bytes.
func peak(f func()) int {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	before := heap()
	stop, most := make(chan struct{}), make(chan uint64)
	go func() {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		var highest uint64
		for {
			select {
			case <-tick.C:
				metrics.Read(sample)
				highest = max(highest, sample[0].Value.Uint64())
			case <-stop:
				most <- highest
				return
			}
		}
	}()
	f()
	close(stop)
	return int(<-most) - before
}

// endless sends up to 10 GB behind a head, in chunks where it has no length, and returns
// the answer and how much was sent before it came.
func endless(t *testing.T, conn net.Conn, head string) (answer, int) {
	t.Helper()
	const size = 10 << 30
	conn.SetDeadline(time.Now().Add(long))
	answered := make(chan answer, 1)
	method, _, _ := strings.Cut(head, " ")
	go func() { answered <- readAnswer(bufio.NewReader(conn), method) }()
	chunked := !strings.Contains(head, "Content-Length")
	if chunked {
		head += "Transfer-Encoding: chunked\r\n"
	}
	io.WriteString(conn, head+"\r\n")
	piece := bytes.Repeat([]byte("# 34567\n"), 8<<10)
	if chunked {
		piece = append(fmt.Appendf(nil, "%x\r\n", len(piece)), append(piece, "\r\n"...)...)
	}
	for sent := 0; sent < size; sent += len(piece) {
		select {
		case a := <-answered:
			return a, sent
		default:
		}
		if _, err := conn.Write(piece); err != nil {
			return received(t, answered, "the answer"), sent
		}
	}
	return received(t, answered, "the answer"), size
}

// TestEndlessBodies: a body of 10 GB is refused early, on each way in, and takes little
// memory. It runs alone, to measure.
func TestEndlessBodies(t *testing.T) {
	const limit = 1 << 20
	p := newProxy(t, func(c *server.Config) { c.Push.MaxBodySize, c.Logger = limit, slog.New(slog.DiscardHandler) })
	s := register(t, p, "web-1", "1", protocol.Registration{})
	const tenGB = "Content-Length: 10737418240\r\n"
	for _, c := range []struct {
		head   string
		tunnel bool
		want   int
	}{
		{"PUT /metrics/job/x HTTP/1.1\r\nHost: x\r\n", false, 413},
		{"PUT /metrics/job/x HTTP/1.1\r\nHost: x\r\n" + tenGB, false, 413},
		{"POST /api/v1/push?group_by=job HTTP/1.1\r\nHost: x\r\n", false, 413},
		{"POST /api/v1/push?group_by=job HTTP/1.1\r\nHost: x\r\n" + tenGB, false, 413},
		{"PUT /nowhere HTTP/1.1\r\nHost: x\r\n", false, 404},
		{"PUT /nowhere HTTP/1.1\r\nHost: x\r\n" + tenGB, false, 404},
		{"GET /tunnel HTTP/1.1\r\nHost: x\r\n" + upgrade, false, 400},
		{"POST http://ghost/ HTTP/1.1\r\nHost: x\r\n", false, 404},
		{"PUT /metrics/job/x HTTP/1.1\r\nHost: x\r\n", true, 413},
		{"PUT /metrics/job/x HTTP/1.1\r\nHost: x\r\n" + tenGB, true, 413},
		{"POST /api/v1/push?group_by=job HTTP/1.1\r\nHost: x\r\n", true, 413},
		{"PUT /v1/nothing HTTP/1.1\r\nHost: x\r\n", true, 404},
		{"POST /v1/drain HTTP/1.1\r\nHost: x\r\n", true, 400},
		{"PUT /v1/registration HTTP/1.1\r\nHost: x\r\n", true, 400},
	} {
		var a answer
		var sent int
		grown := peak(func() {
			conn := net.Conn(nil)
			if c.tunnel {
				stream, err := s.Open(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				conn = stream
			} else {
				conn = rawConn(t, p.addr)
			}
			defer conn.Close()
			a, sent = endless(t, conn, c.head)
		})
		what := fmt.Sprintf("%q, in the tunnel: %v", c.head, c.tunnel)
		// An answer may be lost behind the reset that ends what still comes.
		if a.code != c.want && !(a.code == 0 && isBroken(a.err)) {
			t.Errorf("%s: got %d %s %v, want %d", what, a.code, a.reason, a.err, c.want)
		}
		if sent > 64<<20 {
			t.Errorf("%s: %d bytes were taken", what, sent)
		}
		if grown > 48<<20 {
			t.Errorf("%s: %d kB more were in use", what, grown>>10)
		}
	}
	if a := p.get("/metrics?only=groups"); a.code != 200 || strings.Contains(a.body, "# 3") {
		t.Errorf("got %d %.100s", a.code, a.body)
	}
}

// TestBombs: a small body that is a gigabyte when it is decompressed is refused before it
// takes memory. It runs alone, to measure.
func TestBombs(t *testing.T) {
	const limit = 1 << 20
	p := newProxy(t, func(c *server.Config) { c.Push.MaxBodySize, c.Logger = limit, slog.New(slog.DiscardHandler) })
	for encoding, writer := range map[string]func(io.Writer) io.WriteCloser{
		"gzip": func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) },
		"snappy": func(w io.Writer) io.WriteCloser {
			return s2.NewWriter(w, s2.WriterSnappyCompat(), s2.WriterConcurrency(1))
		},
		"zstd": func(w io.Writer) io.WriteCloser {
			zw, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(8<<20))
			if err != nil {
				t.Fatal(err)
			}
			return zw
		},
	} {
		var bomb bytes.Buffer
		zw := writer(&limitedWriter{&bomb, limit - 1})
		lines := bytes.Repeat([]byte("#\n"), 512<<10)
		size := 0
		for size < 1<<30 {
			if _, err := zw.Write(lines); errors.Is(err, io.ErrShortWrite) {
				break // as much as may be sent
			}
			size += len(lines)
		}
		zw.Close()
		lines, zw = nil, nil
		var a answer
		grown := peak(func() {
			a = raw(t, p.addr, fmt.Sprintf("PUT /metrics/job/x HTTP/1.1\r\nHost: x\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n%s", encoding, bomb.Len(), bomb.Bytes()))
		})
		if a.code != http.StatusRequestEntityTooLarge {
			t.Errorf("%s: got %d %s %v", encoding, a.code, a.body, a.err)
		}
		if grown > 48<<20 {
			t.Errorf("%s: %d bytes, which are %d, took %d kB", encoding, bomb.Len(), size, grown>>10)
		}
	}
}

// limitedWriter takes n bytes.
type limitedWriter struct {
	w io.Writer
	n int
}

func (l *limitedWriter) Write(p []byte) (int, error) {
	if len(p) > l.n {
		return 0, io.ErrShortWrite
	}
	l.n -= len(p)
	return l.w.Write(p)
}
