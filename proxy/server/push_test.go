package server_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/snappy"
	"github.com/klauspost/compress/zstd"
	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/encoding/prototext"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

// push sends a request with a body; the target is sent as it is.
func (p *testProxy) push(method, target, body string, header ...string) answer {
	p.t.Helper()
	lines := append([]string{method + " " + target + " HTTP/1.1", "Content-Length: " + strconv.Itoa(len(body))}, header...)
	if !strings.Contains(strings.Join(header, "\n"), "Host:") {
		lines = append(lines, "Host: "+p.addr)
	}
	return raw(p.t, p.addr, strings.Join(lines, "\r\n")+"\r\n\r\n"+body)
}

// pushed is a push that has to be taken.
func (p *testProxy) pushed(target, body string, header ...string) {
	p.t.Helper()
	p.push("PUT", target, body, header...).want(p.t, 200)
}

// want checks the status, and that the body says all the words.
func (a answer) want(t *testing.T, code int, words ...string) {
	t.Helper()
	if a.err != nil || a.code != code {
		t.Errorf("got %d %q, %v, want %d", a.code, a.body, a.err, code)
	}
	for _, word := range words {
		if !strings.Contains(a.body, word) {
			t.Errorf("the answer %d %q does not say %q", a.code, a.body, word)
		}
	}
}

// wantError checks an answer to a push or deletion that failed.
func (a answer) wantError(t *testing.T, code int, words ...string) {
	t.Helper()
	a.want(t, code, words...)
	if got := a.header.Get("Content-Type"); got != "text/plain; charset=utf-8" {
		t.Errorf("got Content-Type %q", got)
	}
	if got := a.header.Get("X-Content-Type-Options"); got != "nosniff" {
		t.Errorf("got X-Content-Type-Options %q", got)
	}
	if message, ok := strings.CutSuffix(a.body, "\n"); !ok || message == "" || strings.HasSuffix(message, "\n") {
		t.Errorf("got the body %q, want a message and a line feed", a.body)
	}
}

// samples returns the series of a scrape that aren't the proxy's own, nor the
// groups' times.
func (p *testProxy) samples() string {
	p.t.Helper()
	a := p.get("/metrics?only=groups")
	a.want(p.t, 200)
	var samples []string
	for line := range strings.Lines(a.body) {
		if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "push_") {
			samples = append(samples, strings.TrimSuffix(line, "\n"))
		}
	}
	return strings.Join(samples, "\n")
}

// groups returns the grouping keys as JSON, sorted.
func (p *testProxy) groups() string {
	p.t.Helper()
	var answer struct {
		Data []struct{ Labels json.RawMessage }
	}
	if a := p.get("/api/v1/metrics"); json.Unmarshal([]byte(a.body), &answer) != nil {
		p.t.Errorf("got %d %s", a.code, a.body)
	}
	groups := make([]string, len(answer.Data))
	for i, g := range answer.Data {
		groups[i] = string(g.Labels)
	}
	return strings.Join(groups, " ")
}

// TestPushRoutes is section 2 of the contract.
func TestPushRoutes(t *testing.T) {
	t.Parallel()
	const (
		html      = "Content-Type: text/html; charset=utf-8"
		plain     = "Content-Type: text/plain; charset=utf-8"
		inJSON    = "Content-Type: application/json"
		pushAllow = "Allow: DELETE, OPTIONS, POST, PUT"
		empty     = "\x00"
	)
	type route struct {
		method, target string
		code           int
		header, body   string // of the answer
	}
	external, _ := url.Parse("https://culvert.example.net/base")
	for name, proxy := range map[string]struct {
		tweak func(*server.Config)
		rows  []route
	}{
		"defaults": {nil, []route{
			{"PUT", "/metrics/job/j", 200, "", empty},
			{"POST", "/metrics/job/j", 200, "", empty},
			{"PUT", "/metrics/job/j/a/b", 200, "", empty},
			{"POST", "/metrics/job@base64/ag", 200, "", empty},
			{"PUT", "/metrics/job@base64/ag/a/b", 200, "", empty},
			{"PUT", "/metrics/%6Aob/j", 200, "", empty},
			{"DELETE", "/metrics/job/j", 202, "", empty},
			{"DELETE", "/metrics/job/j/a/b", 202, "", empty},
			{"DELETE", "/metrics/job@base64/ag", 202, "", empty},
			{"DELETE", "/metrics/job@base64/ag/a/b", 202, "", empty},
			{"DELETE", "/metrics/job/unknown", 202, "", empty},
			{"DELETE", "/metrics/job/j/a", 400, plain, `"/a"`},
			{"GET", "/metrics", 200, "Content-Type: text/plain; version=0.0.4; charset=utf-8; escaping=underscores", "# TYPE"},
			{"GET", "/", 200, html, "<"},
			{"GET", "/status", 200, html, "<"},
			{"GET", "/-/healthy", 200, plain, "OK"},
			{"GET", "/-/ready", 200, plain, "OK"},
			{"PUT", "/-/quit", 403, plain, "lifecycle"},
			{"POST", "/-/quit", 403, plain, "lifecycle"},
			{"GET", "/-/quit", 405, "Allow: OPTIONS, POST, PUT", ""},
			{"GET", "/api/v1/metrics", 200, inJSON, "{"},
			{"GET", "/api/v1/status", 200, inJSON, "{"},
			{"OPTIONS", "/api/v1/metrics", 200, "Access-Control-Allow-Origin: *", empty},
			{"OPTIONS", "/api/v1/status", 200, "Access-Control-Allow-Origin: *", empty},
			{"OPTIONS", "/api/v1/no/such/path", 200, "Access-Control-Allow-Origin: *", empty},
			{"PUT", "/api/v1/admin/wipe", 404, plain, ""},

			{"GET", "/no/such/path", 404, plain, ""},
			{"PUT", "/metrics/job", 404, plain, ""},
			{"PUT", "/metrics/jobs/j", 404, plain, ""},
			{"PUT", "/metrics/job@base65/ag", 404, plain, ""},
			{"GET", "/static/no", 404, plain, ""},
			{"GET", "/debug/pprof/", 404, plain, ""}, // W14: profiling is not open to all
			{"GET", "/api/v1/", 404, plain, ""},

			{"GET", "/metrics/job/j", 405, pushAllow, ""},
			{"HEAD", "/metrics/job/j", 405, pushAllow, ""},
			{"PATCH", "/metrics/job/j/a/b", 405, pushAllow, ""},
			{"GET", "/metrics/job@base64/ag", 405, pushAllow, ""},
			{"HEAD", "/metrics", 405, "Allow: GET, OPTIONS", ""},
			{"POST", "/metrics", 405, "Allow: GET, OPTIONS", ""},
			{"DELETE", "/metrics", 405, "Allow: GET, OPTIONS", ""},
			{"HEAD", "/", 405, "Allow: GET, OPTIONS", ""},
			{"POST", "/-/healthy", 405, "Allow: GET, OPTIONS", ""},
			{"HEAD", "/-/ready", 405, "Allow: GET, OPTIONS", ""},
			{"POST", "/api/v1/metrics", 405, "Allow: GET, OPTIONS", ""},
			{"HEAD", "/api/v1/status", 405, "Allow: GET, OPTIONS", ""},
			{"OPTIONS", "/metrics", 200, "Allow: GET, OPTIONS", empty},
			{"OPTIONS", "/metrics/job/j", 200, pushAllow, empty},
			{"OPTIONS", "/-/quit", 200, "Allow: OPTIONS, POST, PUT", empty},

			{"GET", "/metrics/", 301, "Location: /metrics", ""},
			{"GET", "/api/v1", 301, "Location: /api/v1/", ""},
			{"POST", "/metrics/job/", 307, "Location: /metrics/job", ""},
			{"PUT", "//metrics/job/j", 307, "Location: /metrics/job/j", ""},
			{"POST", "/metrics//job/j", 307, "Location: /metrics/job/j", ""},
			{"PUT", "/metrics/job/j//b?ttl=1h", 307, "Location: /metrics/job/j/b?ttl=1h", ""}, // P15
			{"DELETE", "/metrics/job/./j", 307, "Location: /metrics/job/j", ""},
			{"PUT", "/metrics/job/j/a/..", 307, "Location: /metrics/job/j", ""},
			{"GET", "//metrics", 307, "Location: /metrics", ""},
			{"PUT", "/metrics/JOB/J", 307, "Location: /metrics/job/J", ""},
			{"POST", "/Metrics/job/j/A/B", 307, "Location: /metrics/job/j/A/B", ""},
			{"DELETE", "/metrics/JOB@BASE64/aG", 307, "Location: /metrics/job@base64/aG", ""},
			{"GET", "/METRICS", 301, "Location: /metrics", ""},
			{"PUT", "/metrics/job/%zz", 400, "", ""},
			{"PUT", "/metrics/job/j/a/%2", 400, "", ""},
			{"PUT", "/metrics/job/j/a/%", 400, "", ""},
		}},
		"admin API and lifecycle": {func(c *server.Config) { c.EnableAdminAPI, c.EnableLifecycle = true, true }, []route{
			{"PUT", "/api/v1/admin/wipe", 202, "", empty},
			{"POST", "/api/v1/admin/wipe", 405, "Allow: OPTIONS, PUT", ""},
			{"GET", "/api/v1/admin/wipe", 405, "Allow: OPTIONS, PUT", ""},
			{"GET", "/-/quit", 405, "Allow: OPTIONS, POST, PUT", ""},
		}},
		"telemetry path": {func(c *server.Config) { c.TelemetryPath = "/tele" }, []route{
			{"PUT", "/metrics/job/j", 200, "", empty},
			{"GET", "/tele", 200, "", `push_time_seconds{instance="",job="j"}`},
			{"GET", "/metrics", 404, plain, ""},
			{"PUT", "/tele/job/j", 404, plain, ""},
			{"HEAD", "/tele", 405, "Allow: GET, OPTIONS", ""},
			{"DELETE", "/metrics/job/j", 202, "", empty},
		}},
		"route prefix": {func(c *server.Config) { c.RoutePrefix, c.ExternalURL = "/base", external }, []route{
			{"PUT", "/base/metrics/job/j", 200, "", empty},
			{"POST", "/base/metrics/job@base64/ag/a@base64/=", 200, "", empty},
			{"GET", "/base/metrics", 200, "", `push_time_seconds{instance="",job="j"}`},
			{"DELETE", "/base/metrics/job/j", 202, "", empty},
			{"GET", "/base/", 200, html, "<"},
			{"GET", "/base", 301, "Location: /base/", ""},
			{"GET", "/", 302, "Location: /base/", ""},
			{"GET", "/base/status", 200, html, "<"},
			{"GET", "/base/-/ready", 200, plain, "OK"},
			{"GET", "/base/api/v1/metrics", 200, inJSON, `"labels":{"a":"","job":"j"}`},
			{"OPTIONS", "/base/api/v1/no/such/path", 200, "Access-Control-Allow-Origin: *", empty},
			{"POST", "/base/-/quit", 403, plain, ""},
			{"GET", "/base/-/quit", 405, "Allow: OPTIONS, POST, PUT", ""},
			{"GET", "/-/quit", 404, plain, ""}, // W14
			{"PUT", "/metrics/job/j", 404, plain, ""},
			{"GET", "/metrics", 404, plain, ""},
			{"GET", "/api/v1/metrics", 404, plain, ""},
			{"PUT", "/base//metrics/job/j", 307, "Location: /base/metrics/job/j", ""},
			{"PUT", "/base/metrics/JOB/j", 307, "Location: /base/metrics/job/j", ""},
			{"PUT", "/base/metrics/job/j/a", 400, plain, `"/a"`},
		}},
		"external URL behind a proxy that strips its path": {func(c *server.Config) { c.ExternalURL = external }, []route{
			{"PUT", "/metrics/job/j", 200, "", empty},
			{"GET", "/metrics", 200, "", `push_time_seconds{instance="",job="j"}`},
			{"PUT", "/base/metrics/job/j", 404, plain, ""},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProxy(t, proxy.tweak)
			for _, c := range proxy.rows {
				t.Run("2 "+c.method+" "+c.target, func(t *testing.T) {
					a := p.push(c.method, c.target, "")
					a.want(t, c.code, strings.TrimPrefix(c.body, empty))
					if c.body == empty && a.body != "" {
						t.Errorf("got the body %q", a.body)
					}
					if key, value, _ := strings.Cut(c.header, ": "); key != "" && a.header.Get(key) != value {
						t.Errorf("got %s %q, want %q", key, a.header.Get(key), value)
					}
				})
			}
		})
	}
}

// TestPushPath is section 3, end to end: the group that a path makes, which the same
// path deletes, or the part that a refusal names.
func TestPushPath(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	for _, c := range []struct{ rule, tail, want string }{
		{"plain", "/job/j", `{"job":"j"}`},
		{"base64", "/job@base64/L2E/x@base64/Yi9j", `{"job":"/a","x":"b/c"}`},
		{"empty value", "/job/j/a@base64/=", `{"a":"","job":"j"}`},
		{"empty value", "/job/j/a@base64/==", `{"a":"","job":"j"}`},
		{"empty value", "/job/j/a@base64/", `{"a":"","job":"j"}`},
		{"P1 empty job", "/job@base64/=", "job"},
		{"P1 empty job", "/job/%2F", "job"},
		{"P1 empty job", "/job/%2Fa%2Fb", "job"},
		{"P2 odd", "/job/j/instance", `"/instance"`},
		{"P2 odd", "/job/j/a/b/c", `"/a/b/c"`},
		{"P2 odd, before an empty job", "/job/%2Fa", `"/a"`},
		{"P3 digit first", "/job/j/1x/v", `{"1x":"v","job":"j"}`},
		{"P3 minus", "/job/j/a-b/v", `{"a-b":"v","job":"j"}`},
		{"P3 colon", "/job/j/a:b/v", `{"a:b":"v","job":"j"}`},
		{"P3 reserved", "/job/j/__x/v", `"__x"`},
		{"P3 __name__", "/job/j/__name__/v", `"__name__"`},
		{"P3 empty name", "/job/j/%2Fv", `""`},
		{"P3 empty base64 name", "/job/j/@base64/dg", `""`},
		{"P4 padding", "/job/j/a@base64/Zm9v====", `{"a":"foo","job":"j"}`},
		{"P4 URL-safe", "/job/j/a@base64/Pz4_Pj8-", `{"a":"?\u003e?\u003e?\u003e","job":"j"}`},
		{"P4 plus", "/job/j/a@base64/a+b", `value "a+b" of label "a"`},
		{"P4 foreign byte", "/job/j/a@base64/Zm9%20", `value "Zm9 " of label "a"`},
		{"P4 impossible length", "/job/j/a@base64/Zm9vZ", `value "Zm9vZ" of label "a"`},
		{"P4 padding in the middle", "/job/j/a@base64/Zg==Zg==", `label "a"`},
		{"P4 job", "/job@base64/a+b", `"a+b"`},
		{"P4 job, before the label part", "/job@base64/a+b/odd", `"a+b"`},
		{"P5 one @base64", "/job/j/a@base64@base64/YQ", `"a@base64"`},
		{"P6 job again", "/job/j/job/other", `{"job":"j"}`},
		{"P6 job again, base64", "/job/j/job@base64/=/a/b", `{"a":"b","job":"j"}`},
		{"P7 repeated", "/job/j/a/1/a/2", `{"a":"2","job":"j"}`},
		{"P7 repeated, base64", "/job/j/a/1/a@base64/=", `{"a":"","job":"j"}`},
		{"P8 encoded slash, odd", "/job/a%2Fb", `"/b"`},
		{"P8 encoded slashes", "/job/a%2Fb%2Fc", `{"b":"c","job":"a"}`},
		{"P8 decoded once", "/job/a%252Fb", `{"job":"a%2Fb"}`},
		{"P9 plus", "/job/j/x/a+b", `{"job":"j","x":"a+b"}`},
		{"P9 space", "/job/j/x/a%20b", `{"job":"j","x":"a b"}`},
		{"P10 dots", "/job/%2E%2E/x/%2E", `{"job":"..","x":"."}`},
		{"P10 control bytes", "/job/j/x/%00%0A%7F", `{"job":"j","x":"\u0000\n` + "\x7f" + `"}`},
		{"P10 more", "/job/j/x/%3F%23%25%22", `{"job":"j","x":"?#%\""}`},
		{"P10 raw UTF-8", "/job/j/x/日本", `{"job":"j","x":"日本"}`},
		{"P11 query", "/job/j?x=y&job=k", `{"job":"j"}`},
		{"P12 slash behind the job", "/job/j/", `{"job":"j"}`},
		{"P12 slash behind the job, base64", "/job@base64/ag/", `{"job":"j"}`},
		{"P13 slash behind a name", "/job/j/instance/", `{"instance":"","job":"j"}`},
		{"P14 slash behind a pair", "/job/j/a/b/", `"/a/b/"`},
		{"P15 empty value in the middle", "/job/j/a@base64/=/b/c", `{"a":"","b":"c","job":"j"}`},
		{"P16 not UTF-8", "/job/j/x/%FF", "UTF-8"},
		{"P16 not UTF-8, base64", "/job/j/x@base64/_w", "UTF-8"},
		{"P16 job not UTF-8", "/job/%FF", "UTF-8"},
		{"P16 name not UTF-8", "/job/j/%FF/v", `"\xff"`},
		{"P17 case", "/job/j/a/1/A/2", `{"A":"2","a":"1","job":"j"}`},
		{"%40 is @", "/job%40base64/Zm9v", `{"job":"foo"}`},
		{"U2 raw name", "/job/j/foo.bar/v", `{"foo.bar":"v","job":"j"}`},
		{"P14 slash behind a pair, U2", "/job/j/f%C3%A9/a%20b/", `"/fé/a b/"`},
		{"U2 encoded names", "/job/j/f%C3%A9/1/a%20b/2", `{"a b":"2","fé":"1","job":"j"}`},
		{"U3 escaped name", "/job/j/U__foo_2e_bar/baz", `{"foo.bar":"baz","job":"j"}`},
		{"U5 empty name", "/job/j/U__/v", `""`},
		{"U6 escaped name, base64", "/job/j/U__foo_2e_bar@base64/YmF6", `{"foo.bar":"baz","job":"j"}`},
		{"U7 escaped job", "/job/j/U__job/k", `{"job":"j"}`},
		{"W1 smuggled reserved name", "/job/j/U______x/v", `"__x"`},
	} {
		t.Run(c.rule+" "+c.tail, func(t *testing.T) {
			target := "/metrics" + c.tail
			taken := strings.HasPrefix(c.want, "{")
			for _, method := range []string{"PUT", "POST", "DELETE"} {
				a := p.push(method, target, "m 1\n")
				switch {
				case !taken:
					a.wantError(t, 400, c.want)
				case method == "DELETE":
					a.want(t, 202)
				default:
					a.want(t, 200)
					if got := p.groups(); got != c.want {
						t.Errorf("%s: got the group %s", method, got)
					}
				}
			}
			if got := p.groups(); got != "" {
				t.Errorf("in the end there is %s", got)
			}
		})
	}
}

func gzipped(text string) string {
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	io.WriteString(w, text)
	w.Close()
	return out.String()
}

func snappyFramed(text string) string {
	var out bytes.Buffer
	w := snappy.NewBufferedWriter(&out)
	io.WriteString(w, text)
	w.Close()
	return out.String()
}

func zstdFramed(text string, options ...zstd.EOption) string {
	w, _ := zstd.NewWriter(nil, options...)
	return string(w.EncodeAll([]byte(text), nil))
}

// TestPushCompression is section 4.2.
func TestPushCompression(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	const text = "m 1\n"
	for name, c := range map[string]struct {
		encoding, body string
		code           int
	}{
		"gzip":                       {"gzip", gzipped(text), 200},
		"gzip, any case":             {"GZip", gzipped(text), 200},
		"gzip, two members":          {"gzip", gzipped("m ") + gzipped("1\n"), 200},
		"gzip of nothing":            {"gzip", gzipped(""), 200},
		"gzip that isn't":            {"gzip", text, 400},
		"gzip without a byte":        {"gzip", "", 400},
		"gzip cut off":               {"gzip", gzipped(text)[:20], 400},
		"gzip without its checksum":  {"gzip", gzipped(text)[:len(gzipped(text))-8], 400},
		"gzip with a bad checksum":   {"gzip", gzipped(text)[:len(gzipped(text))-1] + "x", 400},
		"gzip with more behind":      {"gzip", gzipped(text) + "more", 400},
		"snappy, framed":             {"snappy", snappyFramed(text), 200},
		"snappy, any case":           {"Snappy", snappyFramed(text), 200},
		"snappy, raw block":          {"snappy", string(snappy.Encode(nil, []byte(text))), 400},
		"snappy cut off":             {"snappy", snappyFramed(text)[:len(snappyFramed(text))-1], 400},
		"snappy that isn't":          {"snappy", text, 400},
		"zstd":                       {"zstd", zstdFramed(text), 200},
		"zstd, two frames":           {"zstd", zstdFramed("m ") + zstdFramed("1\n"), 200},
		"zstd cut off":               {"zstd", zstdFramed(text)[:len(zstdFramed(text))-1], 400},
		"zstd that isn't":            {"zstd", text, 400},
		"deflate is ignored":         {"deflate", text, 200},
		"x-gzip is ignored":          {"x-gzip", text, 200},
		"a list is ignored":          {"gzip, identity", text, 200},
		"a list is ignored, so gzip": {"gzip, identity", gzipped(text), 400},
		"identity is ignored":        {"identity", text, 200},
		"no encoding, gzip":          {"", gzipped(text), 400},
	} {
		t.Run("4.2 "+name, func(t *testing.T) {
			defer p.push("DELETE", "/metrics/job/j", "")
			a := p.push("PUT", "/metrics/job/j", c.body, "Content-Encoding: "+c.encoding)
			a.want(t, c.code)
			if c.code != 200 {
				a.wantError(t, c.code)
				if got := p.groups(); got != "" {
					t.Errorf("got the group %s", got)
				}
			} else if got := p.samples(); got != `m{instance="",job="j"} 1` && name != "gzip of nothing" {
				t.Errorf("got %s", got)
			}
		})
	}
	t.Run("4.2 ignored where there is no body", func(t *testing.T) {
		p.push("DELETE", "/metrics/job/j", "no gzip", "Content-Encoding: gzip").want(t, 202)
		p.get("/metrics", "Content-Encoding: gzip").want(t, 200)
	})
	t.Run("4.2 chunked", func(t *testing.T) {
		raw(t, p.addr, "PUT /metrics/job/chunked HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nm 1\r\n3\r\n23\n\r\n0\r\n\r\n").want(t, 200)
		if got := p.samples(); got != `m{instance="",job="chunked"} 123` {
			t.Errorf("got %s", got)
		}
	})
	t.Run("4.2 chunked, cut off", func(t *testing.T) {
		conn := rawConn(t, p.addr)
		io.WriteString(conn, "PUT /metrics/job/cut HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nm 1\n\r\n")
		conn.(interface{ CloseWrite() error }).CloseWrite()
		readAnswer(bufio.NewReader(conn), "PUT").want(t, 400)
		if got := p.groups(); strings.Contains(got, "cut") {
			t.Errorf("got %s", got)
		}
	})
	t.Run("4.2 Expect: 100-continue", func(t *testing.T) {
		conn := rawConn(t, p.addr)
		r := bufio.NewReader(conn)
		io.WriteString(conn, "PUT /metrics/job/expect HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
		if a := readAnswer(r, "PUT"); a.code != 100 {
			t.Fatalf("got %d, %v", a.code, a.err)
		}
		io.WriteString(conn, "m 1\n")
		readAnswer(r, "PUT").want(t, 200)
	})
}

// TestPushQuery is section 12.1: the exact answer for each type of metric.
func TestPushQuery(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	when := time.Unix(1_700_000_000, 500_000_000).Format(time.RFC3339Nano)
	generated := func(labels, failed string) string {
		return fmt.Sprintf(`"push_failure_time_seconds":{"time_stamp":"%s","type":"GAUGE","help":"Last Unix time when changing this group in the Pushgateway failed.","metrics":[{"labels":%s,"value":"%s"}]},`+
			`"push_time_seconds":{"time_stamp":"%s","type":"GAUGE","help":"Last Unix time when changing this group in the Pushgateway succeeded.","metrics":[{"labels":%s,"value":"1.7000000005e+09"}]}`, when, labels, failed, when, labels)
	}
	const l = `{"labels":{"instance":"","job":"j"},`
	protobuf := func(text string) string {
		f := new(dto.MetricFamily)
		if err := prototext.Unmarshal([]byte(`name:"m" `+text), f); err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		protodelim.MarshalTo(&out, f)
		return out.String()
	}
	for name, c := range map[string]struct{ body, want string }{
		"gauge with HELP":           {"# HELP m fill <&>\n# TYPE m gauge\nm 1234567\n", `"GAUGE","help":"fill \u003c\u0026\u003e","metrics":[` + l + `"value":"1.234567e+06"}]`},
		"counter":                   {"# TYPE m counter\nm 1.5\n", `"COUNTER","metrics":[` + l + `"value":"1.5"}]`},
		"untyped":                   {"m -0\n", `"UNTYPED","metrics":[` + l + `"value":"-0"}]`},
		"NaN and infinities":        {"m{a=\"1\"} NaN\nm{a=\"2\"} Inf\nm{a=\"3\"} -Inf\n", `"UNTYPED","metrics":[{"labels":{"a":"1","instance":"","job":"j"},"value":"NaN"},{"labels":{"a":"2","instance":"","job":"j"},"value":"+Inf"},{"labels":{"a":"3","instance":"","job":"j"},"value":"-Inf"}]`},
		"labels escaped and sorted": {"m{z=\"<a href='&'>\",a=\"\\\"\\\\\\n\u2028é\",\"b.c\"=\"\"} 1\n", `"UNTYPED","metrics":[{"labels":{"a":"\"\\\n\u2028é","b.c":"","instance":"","job":"j","z":"\u003ca href='\u0026'\u003e"},"value":"1"}]`},
		"summary":                   {"# TYPE m summary\nm{quantile=\"0.9\"} 2e6\nm{quantile=\"0.50\"} 1\nm_count 3\nm_sum 2.5\n", `"SUMMARY","metrics":[` + l + `"quantiles":{"0.5":"1","0.9":"2e+06"},"count":"3","sum":"2.5"}]`},
		"summary without quantiles": {"# TYPE m summary\nm_count 3\nm_sum 2.5\n", `"SUMMARY","metrics":[` + l + `"quantiles":{},"count":"3","sum":"2.5"}]`},
		"histogram":                 {"# TYPE m histogram\nm_bucket{le=\"0.5\"} 1\nm_bucket{le=\"+Inf\"} 3\nm_count 3\nm_sum 2.5\n", `"HISTOGRAM","metrics":[` + l + `"buckets":{"+Inf":"3","0.5":"1"},"count":"3","sum":"2.5"}]`},
		"histogram without +Inf":    {"# TYPE m histogram\nm_bucket{le=\"0.5\"} 1\nm_count 3\nm_sum 2.5\n", `"HISTOGRAM","metrics":[` + l + `"buckets":{"0.5":"1"},"count":"3","sum":"2.5"}]`},
		"histogram without buckets": {"# TYPE m histogram\nm_count 1234567\nm_sum 2.5\n", `"HISTOGRAM","metrics":[` + l + `"buckets":{},"count":"1234567","sum":"2.5"}]`},
		"float histogram":           {"# TYPE m histogram\nm_bucket{le=\"0.5\"} 1.5\nm_bucket{le=\"1\"} 2\nm_count 3\nm_sum 2.5\n", `"HISTOGRAM","metrics":[` + l + `"buckets":{"0.5":"1.5","1":"2"},"count":"3","sum":"2.5"}]`},
		"gauge histogram":           {"# TYPE m gaugehistogram\nm_bucket{le=\"0.5\"} 1\nm_count 3\nm_sum 2.5\n", `"GAUGE_HISTOGRAM","metrics":[` + l + `"buckets":{"0.5":"1"},"count":"3","sum":"2.5"}]`},
		"native histogram": {protobuf(`type:HISTOGRAM metric{histogram{sample_count:9 sample_sum:2.5 schema:0 zero_threshold:0.001 zero_count:2 negative_span{offset:0 length:1} negative_delta:3 positive_span{offset:0 length:2} positive_span{offset:1 length:1} positive_delta:1 positive_delta:-1 positive_delta:3}}`),
			`"HISTOGRAM","metrics":[` + l + `"buckets":[[1,"-1","-0.5","3"],[3,"-0.001","0.001","2"],[0,"0.5","1","1"],[0,"4","8","3"]],"count":"9","sum":"2.5"}]`},
		"native and classic": {protobuf(`type:HISTOGRAM metric{histogram{sample_count:3 sample_sum:2.5 bucket{cumulative_count:3 upper_bound:1} positive_span{offset:1 length:1} positive_delta:3}}`),
			`"HISTOGRAM","metrics":[` + l + `"buckets":[[0,"1","2","3"]],"count":"3","sum":"2.5"}]`},
		"native float histogram": {protobuf(`type:HISTOGRAM metric{histogram{sample_count_float:2.5 sample_sum:2.5 zero_threshold:0.5 zero_count_float:1 positive_span{offset:1 length:1} positive_count:1.5}}`),
			`"HISTOGRAM","metrics":[` + l + `"buckets":[[3,"-0.5","0.5","1"],[0,"1","2","1.5"]],"count":"2.5","sum":"2.5"}]`},
		"native gauge histogram": {protobuf(`type:GAUGE_HISTOGRAM metric{histogram{sample_count:3 sample_sum:2.5 negative_span{offset:1 length:1} negative_delta:3}}`),
			`"GAUGE_HISTOGRAM","metrics":[` + l + `"buckets":[[1,"-2","-1","3"]],"count":"3","sum":"2.5"}]`},
	} {
		t.Run("12.1 "+name, func(t *testing.T) {
			contentType := "text/plain"
			if strings.HasPrefix(name, "native") {
				contentType = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
			}
			p.pushed("/metrics/job/j", c.body, "Content-Type: "+contentType, "Culvert-Push-Time: 1700000000.5")
			want := `{"status":"success","data":[{"labels":{"job":"j"},"last_push_successful":true,"m":{"time_stamp":"` + when + `","type":` + c.want + `},` + generated(`{"instance":"","job":"j"}`, "0") + `}]}`
			if a := p.get("/api/v1/metrics"); a.body != want {
				t.Errorf("got\n%s\nwant\n%s", a.body, want)
			}
		})
	}
	t.Run("12.1 no groups", func(t *testing.T) {
		p.push("DELETE", "/metrics/job/j", "").want(t, 202)
		if a := p.get("/api/v1/metrics"); a.body != `{"status":"success","data":[]}` {
			t.Errorf("got %s", a.body)
		}
	})
	t.Run("12.1 keys, times of families and a failed push", func(t *testing.T) {
		p.pushed("/metrics/job/j/instance/i", "m 1\nZ 1\n", "Culvert-Push-Time: 1600000000")
		p.push("POST", "/metrics/job/j/instance/i", "m 2\n", "Culvert-Push-Time: 1700000000.5", "Culvert-Failure-Time: 1500000000").want(t, 200)
		labels, old := `{"instance":"i","job":"j"}`, time.Unix(1_600_000_000, 0).Format(time.RFC3339Nano)
		family := func(name, at, value string) string {
			return fmt.Sprintf(`"%s":{"time_stamp":"%s","type":"UNTYPED","metrics":[{"labels":%s,"value":"%s"}]},`, name, at, labels, value)
		}
		want := `{"status":"success","data":[{` + family("Z", old, "1") + `"labels":` + labels + `,"last_push_successful":true,` + family("m", when, "2") + generated(labels, "1.5e+09") + `}]}`
		if a := p.get("/api/v1/metrics"); a.body != want {
			t.Errorf("got\n%s\nwant\n%s", a.body, want)
		}
		p.push("POST", "/metrics/job/j/instance/i", "m 2 5\n").want(t, 400)
		p.get("/api/v1/metrics").want(t, 200, `"last_push_successful":false`)
	})
}

// TestPushAPI is the rest of section 12, and W14: headers, status, wipe.
func TestPushAPI(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) {
		c.EnableAdminAPI = true
		c.Flags = map[string]string{"web.listen-address": ":1,:2", "web.enable-admin-api": "true", "persistence.interval": "<5m0s>"}
	})
	for _, c := range []struct{ method, target, contentType, origin string }{
		{"GET", "/api/v1/metrics", "application/json", "*"},
		{"GET", "/api/v1/status", "application/json", "*"},
		{"OPTIONS", "/api/v1/metrics", "", "*"},
		{"OPTIONS", "/api/v1/x/y", "", "*"},
		{"PUT", "/api/v1/admin/wipe", "", ""},
	} {
		t.Run("12 headers of "+c.method+" "+c.target, func(t *testing.T) {
			a := p.push(c.method, c.target, "")
			for name, want := range map[string]string{
				"Content-Type":                  c.contentType,
				"Access-Control-Allow-Origin":   "*",
				"Access-Control-Allow-Methods":  "GET, POST, DELETE, OPTIONS",
				"Access-Control-Allow-Headers":  "Accept, Authorization, Content-Type, Origin",
				"Access-Control-Expose-Headers": "Date",
				"Cache-Control":                 "no-cache, no-store, must-revalidate",
			} {
				if c.origin == "" {
					want = ""
				}
				if got := a.header.Get(name); got != want {
					t.Errorf("got %s %q, want %q", name, got, want)
				}
			}
		})
	}
	t.Run("12.2 status", func(t *testing.T) {
		a := p.get("/api/v1/status")
		a.want(t, 200, `"flags":{"persistence.interval":"\u003c5m0s\u003e","web.enable-admin-api":"true","web.listen-address":":1,:2"}`)
		var got struct {
			Status string
			Data   struct {
				BuildInformation map[string]string `json:"build_information"`
				StartTime        time.Time         `json:"start_time"`
			}
		}
		if err := json.Unmarshal([]byte(a.body), &got); err != nil || got.Status != "success" || time.Since(got.Data.StartTime).Abs() > time.Minute {
			t.Errorf("got %s, %v", a.body, err)
		}
		for _, key := range []string{"branch", "buildDate", "buildUser", "goVersion", "revision", "version"} {
			if _, ok := got.Data.BuildInformation[key]; !ok || len(got.Data.BuildInformation) != 6 {
				t.Errorf("got %s, want the key %s", a.body, key)
			}
		}
	})
	t.Run("12.3 wipe", func(t *testing.T) {
		p.pushed("/metrics/job/a", "m 1\n")
		p.pushed("/metrics/job/b/instance/", "m 1\n")
		p.push("PUT", "/api/v1/admin/wipe", "a body, which is ignored").want(t, 202)
		if got := p.groups(); got != "" {
			t.Errorf("got %s", got)
		}
		p.pushed("/metrics/job/a", "m 1\n")
	})
	t.Run("12.3 wipe is off", func(t *testing.T) {
		p := newProxy(t, nil)
		p.pushed("/metrics/job/a", "m 1\n")
		p.push("PUT", "/api/v1/admin/wipe", "").want(t, 404)
		if got := p.groups(); got != `{"job":"a"}` {
			t.Errorf("got %s", got)
		}
	})
}

// TestPushLifecycle is section 13.
func TestPushLifecycle(t *testing.T) {
	t.Parallel()
	for _, method := range []string{"PUT", "POST"} {
		t.Run("13 quit by "+method, func(t *testing.T) {
			dir := t.TempDir()
			p := newProxy(t, func(c *server.Config) { c.EnableLifecycle, c.StoragePath = true, dir })
			p.get("/-/ready?for=push").want(t, 200, "OK")
			p.pushed("/metrics/job/j", "m 1\n")
			p.push(method, "/-/quit", "").want(t, 200, "\n")
			p.logs.wait(t, "msg=Stopping")
			p.stop()
			// What was acknowledged is there after it.
			if got := newProxy(t, func(c *server.Config) { c.StoragePath = dir }).groups(); got != `{"job":"j"}` {
				t.Errorf("got %s", got)
			}
		})
	}
	t.Run("13 quit is off", func(t *testing.T) {
		p := newProxy(t, nil)
		for _, method := range []string{"PUT", "POST"} {
			p.push(method, "/-/quit", "").wantError(t, 403, "--web.enable-lifecycle")
		}
		p.get("/-/healthy").want(t, 200)
	})
	t.Run("13, W10 a damaged store", func(t *testing.T) {
		dir := t.TempDir()
		file, garbage := filepath.Join(dir, "push.db"), strings.Repeat("garbage ", 10_000)
		os.WriteFile(file, []byte(garbage), 0o600)
		p := newProxy(t, func(c *server.Config) { c.StoragePath = dir })
		for _, c := range []struct{ method, target string }{
			{"PUT", "/metrics/job/j"}, {"POST", "/metrics/job@base64/ag"}, {"DELETE", "/metrics/job/j"}, {"GET", "/metrics?only=groups"},
			{"GET", "/api/v1/metrics"}, {"PUT", "/api/v1/push?group_by=job"}, {"DELETE", "/api/v1/groups?match[]={job=%22j%22}"},
		} {
			a := p.push(c.method, c.target, "m 1\n")
			a.wantError(t, 503, "push.db")
			if a.header.Get("Retry-After") == "" {
				t.Errorf("%s %s: no Retry-After", c.method, c.target)
			}
		}
		p.get("/-/ready?for=push").want(t, 503, "push.db")
		for _, target := range []string{"/-/ready", "/-/healthy", "/"} {
			p.get(target).want(t, 200)
		}
		for _, target := range []string{"/metrics", "/metrics?only=self"} {
			p.get(target).want(t, 200, "\nculvert_proxy_push_store_up 0\n")
		}
		p.logs.wait(t, "level=ERROR", "push.db")
		p.stop()
		if now, err := os.ReadFile(file); err != nil || string(now) != garbage {
			t.Errorf("the file was changed: %d bytes, %v", len(now), err)
		}
	})
}

// TestPushOwn is the server's own metrics beside pushed ones: S1, S6, T5, T6, T7,
// and the parts of an exposition.
func TestPushOwn(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	gauge := prometheus.NewGauge(prometheus.GaugeOpts{Name: "own_gauge", Help: "Of the server."})
	registry.MustRegister(gauge, prometheus.NewHistogram(prometheus.HistogramOpts{Name: "own_seconds", Help: "Of the server."}),
		prometheus.NewCounterVec(prometheus.CounterOpts{Name: "own_unused_total", Help: "Has no series."}, []string{"x"}))
	p := newProxy(t, func(c *server.Config) { c.Registry = registry })
	for name, c := range map[string]struct {
		body string
		code int
		want string
	}{
		"T5 another type":             {"# TYPE own_gauge counter\nown_gauge 1\n", 400, `metric "own_gauge" has type counter, should have gauge`},
		"T5 no type":                  {"own_seconds 1\n", 400, `metric "own_seconds" has type untyped, should have histogram`},
		"T6 another HELP":             {"# HELP own_gauge Of the job.\n# TYPE own_gauge gauge\nown_gauge 1\n", 200, "# HELP own_gauge Of the server.\n# TYPE own_gauge gauge\nown_gauge 0\nown_gauge{instance=\"\",job=\"j\"} 1\n"},
		"S6 no HELP":                  {"# TYPE own_gauge gauge\nown_gauge 1\n", 200, "# HELP own_gauge Of the server.\n# TYPE own_gauge gauge\nown_gauge 0\nown_gauge{instance=\"\",job=\"j\"} 1\n"},
		"T7 beside a histogram":       {"own_seconds_count 1\n", 400, `metric "own_seconds_count" collides with the histogram "own_seconds"`},
		"T7 a histogram":              {"# TYPE own histogram\nown_count 1\n", 200, ""},
		"T7 a summary of a own gauge": {"# TYPE own_gauge_x summary\nown_gauge_x_count 1\n", 200, ""},
		"own prefix":                  {"culvert_proxy_x 1\n", 400, "culvert_proxy_"},
	} {
		t.Run(name, func(t *testing.T) {
			a := p.push("PUT", "/metrics/job/j", c.body)
			if c.code == 200 {
				a.want(t, 200)
				a = p.get("/metrics")
			}
			a.want(t, c.code, c.want)
		})
	}
	p.pushed("/metrics/job/j", "a 1\nz 1\nown_h 1\n")
	for target, c := range map[string]struct{ has, hasNot []string }{
		"/metrics":             {[]string{"own_gauge 0\n# TYPE own_h untyped\nown_h{instance=\"\",job=\"j\"} 1\n# HELP own_seconds", "culvert_proxy_push_groups 1\n", "push_time_seconds{"}, []string{"own_unused"}},
		"/metrics?only=groups": {[]string{"# TYPE a untyped\na{", "own_h{", "push_time_seconds{"}, []string{"own_gauge", "culvert_proxy_"}},
		"/metrics?only=self":   {[]string{"own_gauge 0\n# HELP own_seconds", "culvert_proxy_push_groups 1\n"}, []string{"own_h", "push_time_seconds{"}},
	} {
		t.Run("S1 "+target, func(t *testing.T) {
			a := p.get(target)
			a.want(t, 200, c.has...)
			for _, not := range c.hasNot {
				if strings.Contains(a.body, not) {
					t.Errorf("it has %s", not)
				}
			}
			var last string
			for line := range strings.Lines(a.body) {
				if name, ok := strings.CutPrefix(line, "# TYPE "); ok {
					if name, _, _ = strings.Cut(name, " "); name <= last {
						t.Errorf("%s comes after %s", name, last)
					}
					last = name
				}
			}
		})
	}
	t.Run("W3 a HELP that differs is logged once", func(t *testing.T) {
		for _, job := range []string{"x", "y", "x", "y"} {
			p.pushed("/metrics/job/"+job, "# HELP w3 of "+job+"\nw3 1\n")
			p.get("/metrics").want(t, 200, "# HELP w3 of "+job+"\n")
		}
		if n := p.logs.count("level=INFO", "HELP", "w3"); n != 1 {
			t.Errorf("it is logged %d times", n)
		}
	})
	for _, only := range []string{"all", "GROUPS", "groups,self"} {
		p.get("/metrics?only="+only).wantError(t, 400, only, "only=groups")
	}
}

// TestPushDeleteGroups is DELETE /api/v1/groups.
func TestPushDeleteGroups(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	fill := func() {
		for _, tail := range []string{"a", "a/instance/i1", "a/instance/i2", "b/env/%3Cx%3E"} {
			p.pushed("/metrics/job/"+tail, "m 1\n")
		}
	}
	for _, c := range []struct {
		name, query string
		code        int
		gone        string // the groups in the answer, or what an error says
	}{
		{"one", `match[]={job="a",instance="i1"}`, 200, `{"instance":"i1","job":"a"}`},
		{"several", `match[]={job="a",instance=~"i."}`, 200, `{"instance":"i1","job":"a"},{"instance":"i2","job":"a"}`},
		{"a label that isn't there is empty", `match[]={job="a",instance=""}`, 200, `{"job":"a"}`},
		{"a missing label and !=", `match[]={instance!="",job!="b"}`, 200, `{"instance":"i1","job":"a"},{"instance":"i2","job":"a"}`},
		{"two selectors", `match[]={job="b"}&match[]={instance="i2"}`, 200, `{"env":"\u003cx\u003e","job":"b"},{"instance":"i2","job":"a"}`},
		{"anchored", `match[]={instance=~"i"}`, 200, ``},
		{"nothing", `match[]={job="c"}`, 200, ``},
		{"dry run", `match[]={job="b"}&dry_run=true`, 200, `{"env":"\u003cx\u003e","job":"b"}`},
		{"no dry run", `match[]={job="b"}&dry_run=false`, 200, `{"env":"\u003cx\u003e","job":"b"}`},
		{"no selector", ``, 400, "match[] is missing"},
		{"no selector, dry run", `dry_run=true`, 400, "match[] is missing"},
		{"another parameter", `match={job="a"}`, 400, "match[] is missing"},
		{"empty selector", `match[]=`, 400, "match[]"},
		{"bad selector", `match[]={job="a"}&match[]={job=`, 400, "match[]"},
		{"bad regular expression", `match[]={job=~"("}`, 400, "match[]"},
		{"a metric's name", `match[]=m{job="a"}`, 400, "grouping labels"},
		{"a metric's name as a label", `match[]={__name__="m"}`, 400, "grouping labels"},
		{"bad dry_run", `match[]={job="a"}&dry_run=yes`, 400, "dry_run"},
	} {
		t.Run(c.name, func(t *testing.T) {
			fill()
			var parts []string
			for part := range strings.SplitSeq(c.query, "&") {
				name, value, _ := strings.Cut(part, "=")
				parts = append(parts, url.QueryEscape(name)+"="+url.QueryEscape(value))
			}
			a := p.push("DELETE", "/api/v1/groups?"+strings.Join(parts, "&"), "")
			dry := strings.Contains(c.query, "dry_run=true")
			if c.code != 200 {
				a.wantError(t, c.code, c.gone)
			} else if want := fmt.Sprintf(`{"status":"success","data":{"dry_run":%t,"groups":[%s]}}`, dry, c.gone); a.code != 200 || a.body != want {
				t.Errorf("got %d %s, want %s", a.code, a.body, want)
			}
			left := 4
			if c.code == 200 && !dry {
				left -= strings.Count(c.gone, `"job"`)
			}
			if got := p.groups(); strings.Count(got, `"job"`) != left {
				t.Errorf("%d groups should be left, got %s", left, got)
			}
		})
	}
	if a := p.send("PUT", "/api/v1/groups", "Content-Length: 0"); a.code != 405 || a.header.Get("Allow") != "DELETE, GET, HEAD, OPTIONS" {
		t.Errorf("PUT: got %d %v", a.code, a.header)
	}
}

// TestPushBatch is POST and PUT /api/v1/push?group_by=: all groups or none.
func TestPushBatch(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		method, query, body string
		want                string // samples; or, for 400, what the answer says, apart by "|"
	}{
		"keys from labels": {"POST", "group_by=job,instance", "m{job=\"a\",instance=\"i\"} 1\nm{job=\"b\",x=\"y\"} 2\n# TYPE n gauge\nn{job=\"a\",instance=\"i\"} 3\n",
			"before{instance=\"\",job=\"a\"} 1\nm{instance=\"i\",job=\"a\"} 1\nm{instance=\"\",job=\"b\",x=\"y\"} 2\nn{instance=\"i\",job=\"a\"} 3"},
		"PUT replaces the groups that it names": {"PUT", "group_by=job", "m{job=\"a\",instance=\"i\"} 1\n", `m{instance="i",job="a"} 1`},
		"POST adds":                             {"POST", "group_by=job", "m{job=\"a\"} 1\n", "before{instance=\"\",job=\"a\"} 1\nm{instance=\"\",job=\"a\"} 1"},
		"an empty label is no part of the key":  {"PUT", "group_by=instance,job", "m{job=\"a\",instance=\"\"} 1\n", `m{instance="",job="a"} 1`},
		"names with blanks and twice":           {"PUT", "group_by=job,%20instance,job", "m{job=\"a\"} 1\n", `m{instance="",job="a"} 1`},
		"UTF-8 names":                           {"PUT", "group_by=job,a.b", "m{job=\"a\",\"a.b\"=\"c\"} 1\n", "before{instance=\"\",job=\"a\"} 1\nm{a_b=\"c\",instance=\"\",job=\"a\"} 1"},
		"no families":                           {"PUT", "group_by=job", "", `before{instance="",job="a"} 1`},
		"no group_by":                           {"PUT", "", "m{job=\"a\"} 1\n", `group_by|job`},
		"no job in group_by":                    {"PUT", "group_by=instance", "m{job=\"a\",instance=\"i\"} 1\n", `group_by="instance"|job`},
		"empty name in group_by":                {"PUT", "group_by=job,", "m{job=\"a\"} 1\n", `group_by="job,"|""`},
		"reserved name in group_by":             {"PUT", "group_by=job,__x", "m{job=\"a\"} 1\n", `group_by="job,__x"|"__x"`},
		"a series without a job":                {"PUT", "group_by=job", "m{job=\"b\"} 1\nn{x=\"y\"} 2\n", `metric "n"|{x="y"}|job`},
		"an empty job":                          {"PUT", "group_by=job", "m{job=\"b\"} 1\nn{job=\"\"} 2\n", `metric "n"|{job=""}|job`},
		"one of the groups is refused":          {"PUT", "group_by=job", "m{job=\"b\"} 1\nn{job=\"a\",__x=\"1\"} 2\n", `metric "n"|"__x"|group {job="a"}|none of the 2 groups`},
		"a timestamp":                           {"POST", "group_by=job", "m{job=\"b\"} 1\nn{job=\"a\"} 2 5\n", `metric "n"|timestamp|group {job="a"}`},
		"a type that clashes":                   {"POST", "group_by=job", "# TYPE before gauge\nbefore{job=\"b\"} 1\n", `metric "before"|gauge|group {job="b"}`},
		"a duplicate":                           {"POST", "group_by=job", "m{job=\"b\",x=\"1\"} 1\nm{x=\"1\",job=\"b\"} 1\n", `metric "m"|already seen|group {job="b"}`},
		"a syntax error":                        {"POST", "group_by=job", "m{job=\"b\"} 1\nm{job=\"c\"} x\n", `line 2`},
		"a bad TTL":                             {"POST", "group_by=job&ttl=x", "m{job=\"b\"} 1\n", `ttl="x"`},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProxy(t, nil)
			p.pushed("/metrics/job/a", "before 1\n")
			a := p.push(c.method, "/api/v1/push?"+c.query, c.body)
			if !strings.Contains(c.want, "{instance=") {
				a.wantError(t, 400, strings.Split(c.want, "|")...)
				c.want = `before{instance="",job="a"} 1`
			} else if want := fmt.Sprintf(`{"status":"success","data":{"groups":%d}}`, strings.Count(c.body, "m{")); a.code != 200 || a.body != want {
				t.Errorf("got %d %s, want %s", a.code, a.body, want)
			}
			if got := p.samples(); got != c.want {
				t.Errorf("got\n%s\nwant\n%s", got, c.want)
			}
		})
	}
	if a := newProxy(t, nil).get("/api/v1/push"); a.code != 405 || a.header.Get("Allow") != "OPTIONS, POST, PUT" {
		t.Errorf("GET: got %d %v", a.code, a.header)
	}
}

// TestPushRules: TTL and interval by job, from --config.file and anew with a reload;
// what a push names counts more.
func TestPushRules(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "proxy.yml")
	write := func(rules string) {
		if err := os.WriteFile(file, []byte("push:\n  rules:\n"+rules), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("  - {job: backup-.*, interval: 1d}\n  - {job: 'short|backup-1', ttl: 1h}\n  - {job: keep, ttl: 0}\n")
	p := newProxy(t, func(c *server.Config) { c.ConfigFile, c.Push.DefaultTTL = file, 48*time.Hour })
	ago := func(d time.Duration) string {
		return fmt.Sprintf("Culvert-Push-Time: %d", time.Now().Add(-d).Unix())
	}
	push := func(job string, d time.Duration, header ...string) {
		p.pushed("/metrics/job/"+job, "m 1\n", append(header, ago(d))...)
	}
	up := func(job, want string) {
		t.Helper()
		a := p.get("/metrics?only=groups")
		_, after, _ := strings.Cut(a.body, `push_up{instance="",job="`+job+`"} `)
		if got, _, _ := strings.Cut(after, "\n"); got != want {
			t.Errorf("push_up of %s: got %q, want %q", job, got, want)
		}
	}
	gone := func(job string) {
		t.Helper()
		eventually(t, "the end of "+job, func() bool { return !strings.Contains(p.samples(), `job="`+job+`"`) })
	}
	push("backup-1", 2*time.Hour)  // the first rule that matches counts
	push("backup-2", 30*time.Hour) // overdue
	push("backup-3", 30*time.Hour, "Culvert-Interval: 2d")
	push("xbackup-1", 2*time.Hour) // the whole name has to match
	push("keep", 1000*time.Hour)
	push("long", 2*time.Hour, "Culvert-TTL: 3h")
	push("short", 2*time.Hour)
	push("default", 49*time.Hour)
	gone("short")
	gone("default")
	up("backup-1", "1")
	up("backup-2", "0")
	up("backup-3", "1")
	up("xbackup-1", "")
	for _, job := range []string{"backup-1", "backup-2", "backup-3", "xbackup-1", "keep", "long"} {
		if !strings.Contains(p.samples(), `job="`+job+`"`) {
			t.Errorf("%s is gone", job)
		}
	}
	write("  - {job: backup-2, interval: 7d}\n  - {job: '(keep|long)', ttl: 1h}\n")
	p.push("POST", "/-/reload", "").want(t, 200)
	gone("keep")
	up("backup-1", "")
	up("backup-2", "1")
	up("backup-3", "1")
	if !strings.Contains(p.samples(), `job="long"`) {
		t.Error("long named its TTL itself")
	}
	for name, rules := range map[string]string{
		"no job":                "  - {ttl: 1h}\n",
		"no regular expression": "  - {job: '('}\n",
		"no duration":           "  - {job: a, ttl: 1 hour}\n",
		"negative":              "  - {job: a, interval: -1h}\n",
		"unknown field":         "  - {job: a, time_to_live: 1h}\n",
	} {
		t.Run(name, func(t *testing.T) {
			write(rules)
			p.push("POST", "/-/reload", "").want(t, 500, file)
			up("backup-2", "1")
		})
	}
	os.WriteFile(file, nil, 0o600)
	p.push("PUT", "/-/reload", "").want(t, 200)
	up("backup-2", "")
}

// TestPushLimits is W12: what is too much is refused with 413 or 507, which names the
// flag, and none of it is stored.
func TestPushLimits(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	p := newProxy(t, func(c *server.Config) {
		c.Push.MaxBodySize, c.Push.MaxSeriesPerGroup, c.Push.MaxGroups = limit, 3, 2
	})
	p.pushed("/metrics/job/j", "m 1\n")
	largest := "m 1\n" + strings.Repeat("\n", limit-4)
	for name, c := range map[string]struct {
		encoding, body string
		code           int
	}{
		"as large as allowed":          {"", largest, 200},
		"one byte more":                {"", largest + "\n", 413},
		"gzip, as large as allowed":    {"gzip", gzipped(largest), 200},
		"gzip, one byte more":          {"gzip", gzipped(largest + "\n"), 413},
		"gzip bomb":                    {"gzip", gzipped(strings.Repeat("\n", 4<<20)), 413},
		"gzip bomb of many members":    {"gzip", strings.Repeat(gzipped(strings.Repeat("\n", 1<<20)), 20), 413},
		"gzip bomb that is not for it": {"gzip", gzipped(gzipped(strings.Repeat("\n", 4<<20))), 400},
		"gzip, too much sent":          {"gzip", strings.Repeat(gzipped(""), limit/len(gzipped(""))+1), 413},
		"snappy, as large as allowed":  {"snappy", snappyFramed(largest), 200},
		"snappy, one byte more":        {"snappy", snappyFramed(largest + "\n"), 413},
		"snappy bomb":                  {"snappy", snappyFramed(strings.Repeat("\n", 1<<20)), 413},
		"zstd, as large as allowed":    {"zstd", zstdFramed(largest), 200},
		"zstd, one byte more":          {"zstd", zstdFramed(largest + "\n"), 413},
		"zstd bomb":                    {"zstd", zstdFramed(strings.Repeat("\n", 4<<20)), 413},
		"zstd bomb of many frames":     {"zstd", strings.Repeat(zstdFramed(strings.Repeat("\n", 1<<20)), 20), 413},
	} {
		t.Run("W12 body: "+name, func(t *testing.T) {
			before := p.get("/metrics?only=groups").body
			a := p.push("POST", "/metrics/job/j", c.body, "Content-Encoding: "+c.encoding)
			a.want(t, c.code)
			if c.code == 413 {
				a.wantError(t, 413, "--push.max-body-size", strconv.Itoa(limit), `{job="j"}`)
			}
			if after := p.get("/metrics?only=groups").body; (after == before) != (c.code != 200) {
				t.Errorf("got\n%s", after)
			}
		})
	}
	t.Run("W12 body: a Content-Length alone", func(t *testing.T) {
		a := raw(t, p.addr, fmt.Sprintf("PUT /metrics/job/j HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", limit+1))
		a.wantError(t, 413, "--push.max-body-size")
	})
	t.Run("W12 body: no Content-Length", func(t *testing.T) {
		a := raw(t, p.addr, fmt.Sprintf("PUT /metrics/job/j HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\n\r\n0\r\n\r\n", limit+1, largest))
		a.wantError(t, 413, "--push.max-body-size")
	})
	t.Run("W12 body: of a batch", func(t *testing.T) {
		p.push("PUT", "/api/v1/push?group_by=job", largest+"\n").wantError(t, 413, "--push.max-body-size")
	})
	for name, c := range map[string]struct {
		method, target, body string
		code                 int
		words                string
	}{
		"series of one push":            {"PUT", "/metrics/job/j", "m 1\nn{a=\"1\"} 1\nn{a=\"2\"} 1\no 1\n", 413, "--push.max-series-per-group|{job=\"j\"}|4|3"},
		"series with those before":      {"POST", "/metrics/job/j", "n{a=\"1\"} 1\nn{a=\"2\"} 1\nn{a=\"3\"} 1\n", 413, "--push.max-series-per-group"},
		"series of a new group":         {"POST", "/metrics/job/new", "n{a=\"1\"} 1\nn{a=\"2\"} 1\nn{a=\"3\"} 1\nn 1\n", 413, "--push.max-series-per-group"},
		"series of a batch":             {"PUT", "/api/v1/push?group_by=job", "n{job=\"new\"} 1\nm{job=\"j\",a=\"1\"} 1\nm{job=\"j\",a=\"2\"} 1\nm{job=\"j\",a=\"3\"} 1\nm{job=\"j\",a=\"4\"} 1\n", 413, "--push.max-series-per-group"},
		"groups of a batch":             {"PUT", "/api/v1/push?group_by=job", "n{job=\"new\"} 1\nn{job=\"newer\"} 1\n", 507, "--push.max-groups"},
		"a syntax error in a new group": {"PUT", "/metrics/job/new", "n 1", 400, "line 1"},
	} {
		t.Run("W12 "+name, func(t *testing.T) {
			p.push(c.method, c.target, c.body).wantError(t, c.code, strings.Split(c.words, "|")...)
			if got := p.samples(); got != `m{instance="",job="j"} 1` {
				t.Errorf("got\n%s", got)
			}
			p.push("DELETE", "/metrics/job/new", "").want(t, 202) // where the push left its failure time
		})
	}
	t.Run("W12 groups", func(t *testing.T) {
		p.pushed("/metrics/job/second", "m 1\nn{a=\"1\"} 1\nn{a=\"2\"} 1\n")
		p.push("PUT", "/metrics/job/third", "m 1\n").wantError(t, 507, "--push.max-groups", `{job="third"}`)
		p.push("PUT", "/metrics/job/third", "m 1 5\n").wantError(t, 507, "--push.max-groups")
		p.pushed("/metrics/job/second", "m 1\n")
		p.push("DELETE", "/metrics/job/j", "").want(t, 202)
		p.pushed("/metrics/job/third", "m 1\n")
		if got := p.groups(); got != `{"job":"second"} {"job":"third"}` {
			t.Errorf("got %s", got)
		}
	})
	t.Run("W12 a slow sender holds up nobody", func(t *testing.T) {
		conn := rawConn(t, p.addr)
		fmt.Fprint(conn, "PUT /metrics/job/third HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nm ")
		p.pushed("/metrics/job/second", "m 2\n")
		p.get("/metrics").want(t, 200)
		fmt.Fprint(conn, "3\n")
		readAnswer(bufio.NewReader(conn), "PUT").want(t, 200)
		if got := p.samples(); got != "m{instance=\"\",job=\"second\"} 2\nm{instance=\"\",job=\"third\"} 3" {
			t.Errorf("got %s", got)
		}
	})
}

// TestPushHeaders is the header fields of a push, good and bad ones.
func TestPushHeaders(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	for _, c := range []struct {
		name, query, header string
		want                string // a part of the exposition; or of the error
		code                int
	}{
		{"interval", "", "Culvert-Interval: 1d", "\npush_up{instance=\"\",job=\"j\"} 1\n", 200},
		{"interval in the query", "?interval=1d12h", "", "\npush_up{instance=\"\",job=\"j\"} 1\n", 200},
		{"the query counts more", "?interval=2d", "Culvert-Interval: x", "\npush_up{instance=\"\",job=\"j\"} 1\n", 200},
		{"interval that has passed", "?interval=1h", "Culvert-Push-Time: 1700000000", "\npush_up{instance=\"\",job=\"j\"} 0\n", 200},
		{"no interval", "?interval=0", "", "\npush_time_seconds{", 200},
		{"TTL", "", "Culvert-TTL: 30m", "\nm{instance=\"\",job=\"j\"} 1\n", 200},
		{"push time", "", "Culvert-Push-Time: 1700000000", "\npush_time_seconds{instance=\"\",job=\"j\"} 1.7e+09\n", 200},
		{"push time with decimals", "", "Culvert-Push-Time: 1700000000.500000000", "\npush_time_seconds{instance=\"\",job=\"j\"} 1.7000000005e+09\n", 200},
		{"push time 0 is never", "", "Culvert-Push-Time: 0", "\npush_time_seconds{instance=\"\",job=\"j\"} 0\n", 200},
		{"failure time", "", "Culvert-Failure-Time: 1600000000.5", "\npush_failure_time_seconds{instance=\"\",job=\"j\"} 1.6000000005e+09\n", 200},
		{"failure time 0", "", "Culvert-Failure-Time: 0.0", "\npush_failure_time_seconds{instance=\"\",job=\"j\"} 0\n", 200},
		{"bad interval", "", "Culvert-Interval: daily", `"daily"`, 400},
		{"bad interval in the query", "?interval=-1h", "", `"-1h"`, 400},
		{"bad TTL", "", "Culvert-TTL: 1.5h", `"1.5h"`, 400},
		{"bad TTL in the query", "?ttl=1", "", `"1"`, 400},
		{"TTL beyond what there is", "?ttl=300000d", "", `"300000d"`, 400},
		{"bad push time", "", "Culvert-Push-Time: yesterday", `Culvert-Push-Time: "yesterday"`, 400},
		{"push time with too many decimals", "", "Culvert-Push-Time: 1.0000000001", "Culvert-Push-Time", 400},
		{"push time in another form", "", "Culvert-Push-Time: 1.7e9", "Culvert-Push-Time", 400},
		{"negative push time", "", "Culvert-Push-Time: -1", "Culvert-Push-Time", 400},
		{"push time in the future", "", fmt.Sprintf("Culvert-Push-Time: %d", time.Now().Add(time.Hour).Unix()), "future", 400},
		{"bad failure time", "", "Culvert-Failure-Time: 1,5", `Culvert-Failure-Time: "1,5"`, 400},
		{"failure time in the future", "", fmt.Sprintf("Culvert-Failure-Time: %d", time.Now().Add(time.Hour).Unix()), "future", 400},
		{"bad aggregation", "?aggregate=mean", "", "mean", 400},
	} {
		t.Run(c.name, func(t *testing.T) {
			header := []string{}
			if c.header != "" {
				header = append(header, c.header)
			}
			a := p.push("PUT", "/metrics/job/j"+c.query, "m 1\n", header...)
			if c.code != 200 {
				a.wantError(t, c.code, c.want)
				if got := p.groups(); got != "" {
					t.Errorf("got the group %s", got)
				}
				return
			}
			a.want(t, 200)
			a = p.get("/metrics?only=groups")
			a.want(t, 200, c.want)
			if c.name == "no interval" && strings.Contains(a.body, "push_up") {
				t.Errorf("got %s", a.body)
			}
			p.push("DELETE", "/metrics/job/j", "").want(t, 202)
		})
	}
}

// TestPushHost: a push is no scrape that lost its way, whatever its Host is.
func TestPushHost(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	register(t, p, "web-1", "1", protocol.Registration{Hosts: []string{"*.lan"}})
	for _, host := range []string{"web-1", "web-1:9091", "agent.web-1", "pushgateway.lan:9091"} {
		t.Run(host, func(t *testing.T) {
			for method, code := range map[string]int{"PUT": 200, "POST": 200, "DELETE": 202} {
				p.push(method, "/metrics/job/j", "m 1\n", "Host: "+host).want(t, code)
				p.push(method, "/metrics/job@base64/ag/a@base64/=", "m 1\n", "Host: "+host, "X-Forwarded-Host: "+host).want(t, code)
			}
			p.push("GET", "/metrics", "", "Host: "+host).want(t, http.StatusMisdirectedRequest)
			p.push("GET", "/metrics/job/j", "", "Host: web-1").want(t, http.StatusMisdirectedRequest)
		})
	}
}
