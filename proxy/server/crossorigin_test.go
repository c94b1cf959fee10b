package server_test

import (
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/proxy/server"
)

// TestCrossOrigin: a page of another site changes nothing here, with roles or without, and
// programs, and the proxy's own page, are not affected.
func TestCrossOrigin(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	external, _ := url.Parse("https://Culvert.example.net:443/culvert")
	open := newProxy(t, func(c *server.Config) { c.EnableAdminAPI = true })
	behind := newProxy(t, func(c *server.Config) { c.EnableAdminAPI, c.ExternalURL = true, external })
	closed := newProxy(t, func(c *server.Config) { c.EnableAdminAPI, c.ConfigFile = true, file.path })
	root := "Authorization: " + basic("root", "secret")
	changing := []string{
		"PUT /metrics/job/x", "POST /metrics/job/x", "DELETE /metrics/job/x", "PUT /metrics/job/x/a/b", "POST /metrics/job@base64/eA",
		"POST /api/v1/push?group_by=job", "DELETE /api/v1/groups?match[]={job=\"x\"}", "PUT /api/v1/admin/wipe", "POST /-/reload", "PUT /-/reload",
		"POST /-/quit", "DELETE /api/v1/agents/ghost", "POST /scrape/web-1/9100/metrics", "POST /nowhere",
	}
	for _, c := range []struct {
		what    string
		proxy   *testProxy
		headers []string
		refused bool
	}{
		{"a program", open, nil, false},
		{"a program, with roles", closed, []string{root}, false},
		{"the own page", open, []string{"Sec-Fetch-Site: same-origin", "Origin: http://SELF"}, false},
		{"the own page, with roles", closed, []string{root, "Sec-Fetch-Site: same-origin", "Origin: http://SELF"}, false},
		{"the own page by plain http, where browsers send no Sec-Fetch-Site", open, []string{"Origin: http://SELF"}, false},
		{"the address bar", open, []string{"Sec-Fetch-Site: none"}, false},
		{"another site", open, []string{"Sec-Fetch-Site: cross-site", "Origin: https://evil.example.net"}, true},
		{"another site, with roles", closed, []string{root, "Sec-Fetch-Site: cross-site", "Origin: https://evil.example.net"}, true},
		{"another site, without credentials", closed, []string{"Sec-Fetch-Site: cross-site", "Origin: https://evil.example.net"}, true},
		{"another site by plain http", open, []string{"Origin: http://evil.example.net"}, true},
		{"another host of the site", open, []string{"Sec-Fetch-Site: same-site", "Origin: http://evil.proxy"}, true},
		{"another port", open, []string{"Origin: http://127.0.0.1:1"}, true},
		{"a sandbox", open, []string{"Origin: null"}, true},
		{"without an origin", open, []string{"Sec-Fetch-Site: cross-site"}, true},
		{"behind a reverse proxy that changes Host", behind, []string{"Origin: https://culvert.example.net"}, false},
		{"the same, and a browser that tells more", behind, []string{"Sec-Fetch-Site: same-origin", "Origin: https://culvert.example.net"}, false},
		{"the same by http", behind, []string{"Origin: http://culvert.example.net"}, true},
		{"a lookalike", behind, []string{"Origin: https://culvert.example.net.evil"}, true},
		{"a reverse proxy that nobody told of", open, []string{"Origin: https://culvert.example.net"}, true},
	} {
		for _, request := range changing {
			if strings.HasSuffix(request, "/-/quit") && !c.refused {
				continue // it is off, which is 403 too
			}
			method, path, _ := strings.Cut(request, " ")
			headers := []string{"Content-Length: 0"}
			for _, h := range c.headers {
				headers = append(headers, strings.ReplaceAll(h, "SELF", c.proxy.addr))
			}
			a := c.proxy.send(method, path, headers...)
			if refused := a.code == 403; refused != c.refused || a.err != nil {
				t.Errorf("%s: %s: got %d %s %v", c.what, request, a.code, a.reason, a.err)
			}
			if c.refused && (!strings.Contains(a.body, "a page of another site") || !strings.Contains(a.body, "--web.external-url")) {
				t.Errorf("%s: %s: got %q", c.what, request, a.body)
			}
		}
		// Reading is what it was: what answers bring, browsers keep from the page.
		for _, path := range []string{"/clients", "/api/v1/metrics", "/api/v1/page", "/-/healthy"} {
			var headers []string
			if c.proxy == closed && !slices.Contains(c.headers, root) {
				headers = []string{root}
			}
			for _, h := range c.headers {
				headers = append(headers, strings.ReplaceAll(h, "SELF", c.proxy.addr))
			}
			if a := c.proxy.get(path, headers...); a.code != 200 {
				t.Errorf("%s: GET %s: %d", c.what, path, a.code)
			}
		}
		if a := c.proxy.send("OPTIONS", "/api/v1/metrics", c.headers...); a.code != 200 || a.header.Get("Access-Control-Allow-Origin") != "*" {
			t.Errorf("%s: OPTIONS: %d %v", c.what, a.code, a.header)
		}
	}

	// A body that is refused is no reason to reset the connection before the answer is read.
	if a := open.send("PUT", "/metrics/job/x", "Sec-Fetch-Site: cross-site", "Content-Length: 4\r\n\r\nx 1\n"); a.code != 403 || a.err != nil {
		t.Errorf("with a body: %d %v", a.code, a.err)
	}
	// What passes through is the target's business.
	_, port := newTarget(t, nil)
	newAgent(t, open, allowAll)
	for _, method := range []string{"GET", "POST"} {
		open.send(method, "http://web-1:"+port+"/metrics", "Origin: https://evil.example.net", "Sec-Fetch-Site: cross-site", "Content-Length: 0").ok(t, "up 1")
	}
	if a := open.send("CONNECT", "web-1:"+port, "Origin: https://evil.example.net"); a.code != 200 {
		t.Errorf("CONNECT: %d", a.code)
	}
	if a := open.send("POST", "/push", "Origin: https://evil.example.net", "Content-Length: 0"); a.code == 403 {
		t.Errorf("a push of a PushProx client: %d %s", a.code, a.reason)
	}
}

// TestOriginOfExternalURL: an external URL of which no origin can be made is an error at the start.
func TestOriginOfExternalURL(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{"culvert.example.net", "https:///x"} {
		u, err := url.Parse(bad)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := server.New(server.Config{ExternalURL: u, Logger: slog.New(slog.DiscardHandler)}); err == nil || !strings.Contains(err.Error(), "--web.external-url") {
			t.Errorf("%s: got %v", bad, err)
		}
	}
}
