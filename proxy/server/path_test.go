package server_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/client/httpclient"
	"github.com/culvert-io/culvert/protocol"
)

// TestPathMode: what leaves the proxy's own origin is harmless there.
func TestPathMode(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	got := make(chan *http.Request, 1)
	respond := func(http.ResponseWriter) {}
	base, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		got <- r
		respond(w)
	})
	newAgent(t, p, func(c *agent.Config) {
		allowAll(c)
		token := httpclient.DefaultConfig
		token.Authorization = &httpclient.Authorization{Type: "Bearer", Credentials: "of-the-agent"}
		c.Targets = []agent.Target{{Name: "node", URL: base + "/metrics", HTTP: &token}, {Name: "tree", URL: base + "/tree/*"}}
	})
	const openMetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8"
	const protobuf = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
	for _, c := range []struct{ contentType, want string }{
		{"text/plain; version=0.0.4; charset=utf-8", "text/plain; version=0.0.4; charset=utf-8"},
		{openMetrics, openMetrics},
		{protobuf, protobuf},
		{"text/html; charset=utf-8", "text/plain; charset=utf-8"},
		{"TEXT/HTML", "text/plain; charset=utf-8"},
		{"text/html, text/plain", "text/plain; charset=utf-8"},
		{"image/svg+xml", "text/plain; charset=utf-8"},
		{"application/javascript", "text/plain; charset=utf-8"},
		{"", "text/plain; charset=utf-8"},
		{"garbage", "text/plain; charset=utf-8"},
	} {
		t.Run("type "+c.contentType, func(t *testing.T) {
			respond = func(w http.ResponseWriter) {
				w.Header()["Content-Type"] = []string{c.contentType}
				h := w.Header()
				h.Set("Set-Cookie", "session=evil")
				h.Set("Location", "https://evil.example/")
				h.Set("Refresh", "0; url=https://evil.example/")
				h.Set("Link", "</x.js>; rel=preload")
				h.Set("Content-Security-Policy", "default-src *")
				h.Set("Access-Control-Allow-Origin", "*")
				h.Set("Clear-Site-Data", "*")
				h.Set("Service-Worker-Allowed", "/")
				h.Set("Strict-Transport-Security", "max-age=1")
				h.Set("WWW-Authenticate", "Basic")
				h.Set("Content-Disposition", "attachment")
				io.WriteString(w, "<script>alert(1)</script>")
			}
			a := p.get("/scrape/web-1/" + port + "/metrics")
			<-got
			a.ok(t, "<script>")
			if v := a.header.Get("Content-Type"); v != c.want {
				t.Errorf("Content-Type: %q, want %q", v, c.want)
			}
			if v := a.header.Values("Content-Security-Policy"); len(v) != 1 || v[0] != "sandbox; default-src 'none'" {
				t.Errorf("Content-Security-Policy: %q", v)
			}
			if v := a.header.Get("X-Content-Type-Options"); v != "nosniff" {
				t.Errorf("X-Content-Type-Options: %q", v)
			}
			for _, name := range []string{"Set-Cookie", "Location", "Refresh", "Link", "Access-Control-Allow-Origin", "Clear-Site-Data",
				"Service-Worker-Allowed", "Strict-Transport-Security", "WWW-Authenticate"} {
				if v := a.header.Get(name); v != "" {
					t.Errorf("%s: %q", name, v)
				}
			}
		})
	}
	t.Run("errors and redirects of the target", func(t *testing.T) {
		for _, status := range []int{302, 401, 404, 500} {
			respond = func(w http.ResponseWriter) {
				w.Header().Set("Location", "https://evil.example/")
				w.Header().Set("Set-Cookie", "a=b")
				w.Header().Set("Content-Type", "text/html")
				w.WriteHeader(status)
			}
			a := p.get("/scrape/web-1/" + port + "/metrics")
			<-got
			if a.code != status || a.header.Get("Location") != "" || a.header.Get("Set-Cookie") != "" || a.header.Get("Content-Type") != "text/plain; charset=utf-8" {
				t.Errorf("%d: got %d %v", status, a.code, a.header)
			}
		}
	})
	t.Run("interim responses and trailers", func(t *testing.T) {
		respond = func(w http.ResponseWriter) {
			w.Header().Set("Link", "</x.js>; rel=preload")
			w.Header().Set("Set-Cookie", "interim=evil")
			w.WriteHeader(http.StatusEarlyHints)
			w.Header().Del("Link")
			w.Header().Del("Set-Cookie")
			w.Header().Set("Trailer", "Set-Cookie")
			io.WriteString(w, "up 1")
			w.Header().Set("Set-Cookie", "trailer=evil")
		}
		conn := rawConn(t, p.addr)
		fmt.Fprintf(conn, "GET /scrape/web-1/%s/metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", port)
		all, err := io.ReadAll(conn)
		<-got
		if err != nil || !strings.Contains(string(all), "up 1") {
			t.Fatalf("got %s, %v", all, err)
		}
		for _, word := range []string{"evil", "x.js"} {
			if strings.Contains(string(all), word) {
				t.Errorf("%q came through: %s", word, all)
			}
		}
	})
	t.Run("what reaches the target", func(t *testing.T) {
		respond = func(http.ResponseWriter) {}
		secrets := []string{"Authorization: Bearer of-the-proxy", "Cookie: session=1", "Proxy-Authorization: Basic x", "Accept: text/plain"}
		for _, c := range []struct{ path, uri, authorization string }{
			{"/scrape/web-1/" + port + "/metrics", "/metrics", ""},
			{"/scrape/WEB-1./" + port + "/a/b?x=1&y=%20", "/a/b?x=1&y=%20", ""},
			{"/scrape/web-1/" + port + "/", "/", ""},
			{"/scrape/web-1/" + port + "/a%2Fb/%3f", "/a%2Fb/%3f", ""},
			{"/scrape/web-1/node/metrics", "/metrics", "Bearer of-the-agent"},
			{"/scrape/web-1/NODE/metrics", "/metrics", "Bearer of-the-agent"},
			{"/scrape/web-1/tree/tree/a", "/tree/a", ""},
		} {
			if a := p.get(c.path, secrets...); a.code != 200 {
				t.Errorf("%s: got %d %s", c.path, a.code, a.reason)
				continue
			}
			r := <-got
			if r.RequestURI != c.uri {
				t.Errorf("%s: the target saw %s, want %s", c.path, r.RequestURI, c.uri)
			}
			if v := r.Header.Get("Authorization"); v != c.authorization {
				t.Errorf("%s: the target saw Authorization %q", c.path, v)
			}
			if r.Header.Get("Cookie") != "" || r.Header.Get("Proxy-Authorization") != "" || r.Header.Get("Accept") != "text/plain" {
				t.Errorf("%s: the target saw %v", c.path, r.Header)
			}
		}
		p.get("/scrape/web-1/agent/metrics", secrets...).ok(t, "culvert_client_connected")
	})
	t.Run("methods", func(t *testing.T) {
		for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS"} {
			a := p.send(method, "/scrape/web-1/"+port+"/metrics")
			a.refused(t, 405, protocol.CodeMethod)
			if v := a.header.Get("Allow"); v != "GET, HEAD" {
				t.Errorf("%s: Allow: %q", method, v)
			}
		}
	})
	t.Run("bad paths", func(t *testing.T) {
		for _, path := range []string{
			"/scrape/", "/scrape/web-1", "/scrape/web-1/", "/scrape/web-1/9100", "/scrape//9100/metrics", "/scrape/web-1//metrics",
			"/scrape/web%2F1/9100/metrics", "/scrape/web-1/a%20b/metrics", "/scrape/web-1/a:b/metrics", "/scrape/web-1:9100/9100/metrics",
			"/scrape/web-1@x/9100/metrics", "/scrape/web-1%00/9100/metrics",
		} {
			p.get(path).refused(t, 400, protocol.CodeBadRequest)
		}
	})
	t.Run("traversal", func(t *testing.T) {
		for _, path := range []string{
			"/scrape/web-1/tree/tree/../metrics", "/scrape/web-1/tree/tree/%2e%2e/metrics", "/scrape/web-1/tree/tree/..%2fmetrics", "/scrape/web-1/tree/metrics",
		} {
			p.get(path).refused(t, 403, protocol.CodeNotAllowed)
		}
	})
}
