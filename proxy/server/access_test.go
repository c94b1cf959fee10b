package server_test

import (
	"bufio"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/bcrypt"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

// secretHash is the bcrypt hash of "secret", at the least cost.
var secretHash = sync.OnceValue(func() string {
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		panic(err)
	}
	return string(hash)
})

func hashOf(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// rolesFile is a configuration that can be rewritten.
type rolesFile struct {
	t    *testing.T
	path string
}

func newRolesFile(t *testing.T, text string) *rolesFile {
	f := &rolesFile{t, filepath.Join(t.TempDir(), "culvert.yml")}
	f.write(text)
	return f
}

func (f *rolesFile) write(text string) {
	f.t.Helper()
	if err := os.WriteFile(f.path, []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// everyRole has an entry for each column of the matrix.
func everyRole() string {
	return `
roles:
  scrapers:
  - {name: scraper, basic_auth: {username: prom, password_hash: '` + secretHash() + `'}}
  - {name: scraper of others, token_hash: ` + hashOf("scraper2") + `, agents: ['*.elsewhere.net']}
  agents:
  - {name: agent, token_hash: ` + hashOf("agent") + `, agents: ['web-*.example.net'], push_jobs: [backup]}
  - {name: agent of another name, token_hash: ` + hashOf("agent2") + `, agents: [db-1.example.net]}
  pushers:
  - {name: pusher, token_hash: ` + hashOf("pusher") + `, jobs: [backup]}
  - {name: pusher of another job, token_hash: ` + hashOf("pusher2") + `, jobs: [other]}
  operators:
  - {name: operator, basic_auth: {username: root, password_hash: '` + secretHash() + `'}}
  - {name: expired, token_hash: ` + hashOf("expired") + `, expires: 2020-01-31}
`
}

// identities are the columns of the matrix. Operators come last: one may stop the
// proxy.
var identities = []struct{ name, authorization string }{
	{"none", ""},
	{"wrong", basic("prom", "wrong")},
	{"expired", "Bearer expired"},
	{"revoked", "Bearer revoked"},
	{"agent", "Bearer agent"},
	{"agent2", "Bearer agent2"},
	{"pusher", "Bearer pusher"},
	{"pusher2", "Bearer pusher2"},
	{"scraper", basic("prom", "secret")},
	{"scraper2", "Bearer scraper2"},
	{"operator", basic("root", "secret")},
}

// matrix tells for each route what each identity gets, in the order of identities.
// "PORT" is the port of a target.
var matrix = []struct {
	route, request, body, want string
}{
	// route, request, body                              none wrng expd rvkd agnt agt2 push psh2 scrp scr2 oper
	{"GET /-/healthy", "GET /-/healthy", "", "             200 200 200 200 200 200 200 200 200 200 200"},
	{"GET /-/ready", "GET /-/ready", "", "                 200 200 200 200 200 200 200 200 200 200 200"},
	{"OPTIONS /-/quit", "OPTIONS /-/quit", "", "           200 200 200 200 200 200 200 200 200 200 200"},
	{"OPTIONS /api/v1/*any", "OPTIONS /api/v1/x", "", "    200 200 200 200 200 200 200 200 200 200 200"},
	{"GET /api/v1/", "GET /api/v1/", "", "                 404 404 404 404 404 404 404 404 404 404 404"},
	{"POST /-/reload", "POST /-/reload", "", "             401 401 401 401 403 403 403 403 403 403 200"},
	{"PUT /-/reload", "PUT /-/reload", "", "               401 401 401 401 403 403 403 403 403 403 200"},
	{"GET /-/quit", "GET /-/quit", "", "                   401 401 401 401 403 403 403 403 403 403 405"},
	{"POST /-/quit", "POST /-/quit", "", "                 401 401 401 401 403 403 403 403 403 403 200"},
	{"PUT /-/quit", "PUT /-/quit", "", "                   401 401 401 401 403 403 403 403 403 403 200"},
	{"GET /", "GET /", "", "                               401 401 401 401 403 403 403 403 200 200 200"},
	{"GET /status", "GET /status", "", "                   401 401 401 401 403 403 403 403 200 200 200"},
	{"GET /ui/*file", "GET /ui/icon.svg", "", "              401 401 401 401 403 403 403 403 200 200 200"},
	{"HEAD /ui/*file", "HEAD /ui/icon.svg", "", "            401 401 401 401 403 403 403 403 200 200 200"},
	{"GET /api/v1/page", "GET /api/v1/page", "", "           401 401 401 401 403 403 403 403 200 200 200"},
	{"HEAD /api/v1/page", "HEAD /api/v1/page", "", "         401 401 401 401 403 403 403 403 200 200 200"},
	{"GET /api/v1/scrapes", "GET /api/v1/scrapes?agent=web-1.example.net", "", "   401 401 401 401 403 403 403 403 200 200 200"},
	{"HEAD /api/v1/scrapes", "HEAD /api/v1/scrapes?agent=web-1.example.net", "", " 401 401 401 401 403 403 403 403 200 200 200"},
	{"GET /api/v1/scrape_config", "GET /api/v1/scrape_config", "", "               401 401 401 401 403 403 403 403 200 200 200"},
	{"HEAD /api/v1/scrape_config", "HEAD /api/v1/scrape_config", "", "             401 401 401 401 403 403 403 403 200 200 200"},
	{"GET $telemetry", "GET /metrics", "", "               401 401 401 401 403 403 403 403 200 200 200"},
	{"GET /clients", "GET /clients", "", "                 401 401 401 401 403 403 403 403 200 200 200"},
	{"HEAD /clients", "HEAD /clients", "", "               401 401 401 401 403 403 403 403 200 200 200"},
	{"GET /targets", "GET /targets", "", "                 401 401 401 401 403 403 403 403 200 200 200"},
	{"HEAD /targets", "HEAD /targets", "", "               401 401 401 401 403 403 403 403 200 200 200"},
	{"GET /api/v1/agents", "GET /api/v1/agents", "", "     401 401 401 401 403 403 403 403 200 200 200"},
	{"HEAD /api/v1/agents", "HEAD /api/v1/agents", "", "   401 401 401 401 403 403 403 403 200 200 200"},
	{"GET /api/v1/agents/:name", "GET /api/v1/agents/web-1.example.net", "", "   401 401 401 401 403 403 403 403 200 404 200"},
	{"HEAD /api/v1/agents/:name", "HEAD /api/v1/agents/web-1.example.net", "", " 401 401 401 401 403 403 403 403 200 404 200"},
	{"DELETE /api/v1/agents/:name", "DELETE /api/v1/agents/ghost", "", "         401 401 401 401 403 403 403 403 403 403 404"},
	{"GET /api/v1/metrics", "GET /api/v1/metrics", "", "                         401 401 401 401 403 403 403 403 200 200 200"},
	{"GET /api/v1/status", "GET /api/v1/status", "", "                           401 401 401 401 403 403 403 403 403 403 200"},

	{"PUT /metrics/job/:job", "PUT /metrics/job/backup", "x 1\n", "                       401 401 401 401 403 403 200 403 403 403 200"},
	{"POST /metrics/job/:job", "POST /metrics/job/backup", "x 1\n", "                     401 401 401 401 403 403 200 403 403 403 200"},
	{"DELETE /metrics/job/:job", "DELETE /metrics/job/backup", "", "                      401 401 401 401 403 403 202 403 403 403 202"},
	{"PUT /metrics/job/:job/*labels", "PUT /metrics/job/backup/a/b", "x 1\n", "           401 401 401 401 403 403 200 403 403 403 200"},
	{"PUT /metrics/job/:job/*labels", "PUT /metrics/job/backup/job/other", "x 1\n", "     401 401 401 401 403 403 200 403 403 403 200"},
	{"PUT /metrics/job/:job/*labels", "PUT /metrics/job/other/job/backup", "x 1\n", "     401 401 401 401 403 403 403 200 403 403 200"},
	{"PUT /metrics/job/:job/*labels", "PUT //metrics/./job/backup/a/b", "x 1\n", "        401 401 401 401 307 307 307 307 307 307 307"},
	{"POST /metrics/job/:job/*labels", "POST /metrics/job/backup/a/b", "x 1\n", "         401 401 401 401 403 403 200 403 403 403 200"},
	{"DELETE /metrics/job/:job/*labels", "DELETE /metrics/job/backup/a/b", "", "          401 401 401 401 403 403 202 403 403 403 202"},
	{"PUT /metrics/job@base64/:job", "PUT /metrics/job@base64/YmFja3Vw", "x 1\n", "       401 401 401 401 403 403 200 403 403 403 200"},
	{"POST /metrics/job@base64/:job", "POST /metrics/job@base64/YmFja3Vw", "x 1\n", "     401 401 401 401 403 403 200 403 403 403 200"},
	{"DELETE /metrics/job@base64/:job", "DELETE /metrics/job@base64/YmFja3Vw", "", "      401 401 401 401 403 403 202 403 403 403 202"},
	{"PUT /metrics/job@base64/:job/*labels", "PUT /metrics/job@base64/YmFja3Vw/a/b", "x 1\n", "   401 401 401 401 403 403 200 403 403 403 200"},
	{"POST /metrics/job@base64/:job/*labels", "POST /metrics/job@base64/YmFja3Vw/a/b", "x 1\n", " 401 401 401 401 403 403 200 403 403 403 200"},
	{"DELETE /metrics/job@base64/:job/*labels", "DELETE /metrics/job@base64/YmFja3Vw/a/b", "", "  401 401 401 401 403 403 202 403 403 403 202"},
	{"PUT /api/v1/push", "PUT /api/v1/push?group_by=job", "x{job=\"backup\"} 1\n", "              401 401 401 401 403 403 200 403 403 403 200"},
	{"POST /api/v1/push", "POST /api/v1/push?group_by=job", "x{job=\"backup\"} 1\n", "            401 401 401 401 403 403 200 403 403 403 200"},
	{"POST /api/v1/push", "POST /api/v1/push?group_by=job", "x{job=\"backup\"} 1\nx{job=\"other\"} 1\n", " 401 401 401 401 403 403 403 403 403 403 200"},
	{"DELETE /api/v1/groups", "DELETE /api/v1/groups?match[]={job=\"backup\"}", "", "             401 401 401 401 403 403 403 403 403 403 200"},
	{"GET /api/v1/groups", "GET /api/v1/groups", "", "                                            401 401 401 401 403 403 403 403 200 200 200"},
	{"HEAD /api/v1/groups", "HEAD /api/v1/groups", "", "                                          401 401 401 401 403 403 403 403 200 200 200"},
	{"GET /api/v1/groups/*path", "GET /api/v1/groups/job/ghost", "", "                            401 401 401 401 403 403 403 403 404 404 404"},
	{"HEAD /api/v1/groups/*path", "HEAD /api/v1/groups/job/ghost", "", "                          401 401 401 401 403 403 403 403 404 404 404"},
	{"PUT /api/v1/admin/wipe", "PUT /api/v1/admin/wipe", "", "                                    401 401 401 401 403 403 403 403 403 403 202"},
	{"", "GET /nowhere", "", "                                                                    401 401 401 401 404 404 404 404 404 404 404"},

	{"GET http://NAME/PATH", "GET http://web-1.example.net:PORT/metrics", "", "         407 407 407 407 403 403 403 403 200 403 200"},
	{"GET http://NAME/PATH", "GET http://ghost.example.net:PORT/metrics", "", "         407 407 407 407 403 403 403 403 404 404 404"},
	{"GET http://NAME/PATH", "POST http://web-1.example.net:PORT/metrics", "x", "       407 407 407 407 403 403 403 403 200 403 200"},
	{"CONNECT NAME:PORT", "CONNECT web-1.example.net:PORT", "", "                       407 407 407 407 403 403 403 403 200 403 200"},
	{"GET /scrape/AGENT/TARGET/PATH", "GET /scrape/web-1.example.net/PORT/metrics", "", " 401 401 401 401 403 403 403 403 200 403 200"},
	{"POST /poll", "POST /poll", "web-1.example.net", "                                  401 401 401 401 409 403 403 403 403 403 409"},
	{"POST /push", "POST /push", "HTTP/1.1 200 OK\r\nId: x\r\n\r\n", "                   401 401 401 401 404 404 403 403 403 403 404"},
	{"GET /tunnel", "GET /tunnel", "", "                                                401 401 401 401 101 403 403 403 403 403 101"},
}

// TestMatrix asks for every route as everybody.
func TestMatrix(t *testing.T) {
	t.Parallel()
	start := func(t *testing.T) (*testProxy, string) {
		// The revoked one was good, and known to be.
		file := newRolesFile(t, everyRole()+"  - {name: revoked, token_hash: "+hashOf("revoked")+"}\n")
		p := newProxy(t, func(c *server.Config) {
			c.ConfigFile, c.EnableAdminAPI, c.EnableLifecycle = file.path, true, true
			c.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}
		})
		p.get("/api/v1/status", "Authorization: Bearer revoked").ok(t, "start_time")
		file.write(everyRole())
		if err := p.Reload(); err != nil {
			t.Fatal(err)
		}
		_, port := newTarget(t, nil)
		token := filepath.Join(t.TempDir(), "token")
		os.WriteFile(token, []byte("agent\n"), 0o600)
		newAgent(t, p, func(c *agent.Config) { c.Name, c.TokenFile = "web-1.example.net", token; allowAll(c) })
		return p, port
	}
	p, port := start(t)
	seen, requests := map[string]bool{}, 0
	for _, row := range matrix {
		seen[row.route] = true
		p, port := p, port
		if strings.HasSuffix(row.request, "T /-/quit") && !strings.HasPrefix(row.request, "GET") {
			p, port = start(t) // it will stop
		}
		want := strings.Fields(row.want)
		if len(want) != len(identities) {
			t.Fatalf("%s: %d columns, want %d", row.request, len(want), len(identities))
		}
		for i, id := range identities {
			request := strings.ReplaceAll(row.request, "PORT", port)
			method, target, _ := strings.Cut(request, " ")
			head := request + " HTTP/1.1\r\nHost: proxy\r\n"
			// From everywhere, else the wrong ones would be slowed.
			requests++
			head += fmt.Sprintf("X-Forwarded-For: 192.0.%d.%d\r\n", requests/256, requests%256)
			field := "Authorization: "
			if method == http.MethodConnect || !strings.HasPrefix(target, "/") {
				field = "Proxy-Authorization: "
			}
			if id.authorization != "" {
				head += field + id.authorization + "\r\n"
			}
			if row.body != "" {
				head += fmt.Sprintf("Content-Length: %d\r\n", len(row.body))
			}
			if row.route == "GET /tunnel" {
				head += "Connection: Upgrade\r\nUpgrade: culvert/1\r\nCulvert-Agent: web-2.example.net\r\nCulvert-Instance: 1\r\n"
			}
			conn := rawConn(t, p.addr)
			io.WriteString(conn, head+"\r\n"+row.body)
			resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
			if err != nil {
				t.Errorf("%s as %s: %v", row.request, id.name, err)
				conn.Close()
				continue
			}
			if fmt.Sprint(resp.StatusCode) != want[i] {
				t.Errorf("%s as %s: got %s, want %s", row.request, id.name, resp.Status, want[i])
			}
			challenge := map[int]string{401: "Www-Authenticate", 407: "Proxy-Authenticate"}[resp.StatusCode]
			if challenge != "" && !strings.HasPrefix(resp.Header.Get(challenge), "Basic realm=") {
				t.Errorf("%s as %s: %s without %s", row.request, id.name, resp.Status, challenge)
			}
			conn.Close()
		}
	}
	for _, route := range append(server.RouteAccess(), p.Guarded()...) {
		if !seen[route] {
			t.Errorf("the route %q has no row in the matrix", route)
		}
	}
	for route := range seen {
		if route != "" && !slices.Contains(server.RouteAccess(), route) {
			t.Errorf("the matrix has a row for %q, which is no route", route)
		}
	}
}

// TestOpen: without roles everything is open, and both the log and the page say so.
func TestOpen(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	p.get("/", "Authorization: Bearer nonsense").ok(t, "No roles are configured")
	if n := p.logs.count("level=WARN", "No roles are configured"); n != 1 {
		t.Errorf("%d warnings, want 1", n)
	}
	p.Reload()
	if n := p.logs.count("level=WARN", "No roles are configured"); n != 1 {
		t.Errorf("%d warnings after a reload, want 1", n)
	}
	file := newRolesFile(t, everyRole())
	closed := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	if a := closed.get("/", "Authorization: "+basic("root", "secret")); a.code != 200 || strings.Contains(a.body, "No roles") {
		t.Errorf("got %d %s", a.code, a.body)
	}
	if n := closed.logs.count("No roles are configured"); n != 0 {
		t.Errorf("%d warnings with roles", n)
	}
}

// TestReloadRoles: a bad file changes nothing; a good one counts at once.
func TestReloadRoles(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	root := "Authorization: " + basic("root", "secret")
	for _, bad := range []string{"roles:\n", "roles: {operators: [{name: a}]}", "roles: {agents: [{name: a, client_cert: [x], nonsense: 1}]}", "roles: [", "roles: {scrapers: [{name: a, client_cert: [x], agents: }]}"} {
		file.write(bad)
		if a := p.send("POST", "/-/reload", root); a.code != 500 || !strings.Contains(a.body, "roles") && !strings.Contains(a.body, "yaml") {
			t.Errorf("%s: got %d %s", bad, a.code, a.body)
		}
		if a := p.get("/clients"); a.code != 401 {
			t.Errorf("%s: the door is open: %d", bad, a.code)
		}
		p.get("/api/v1/status", root).ok(t, "start_time")
	}
	file.write("roles: {}")
	p.send("POST", "/-/reload", root)
	if a := p.get("/api/v1/status", root); a.code != 401 {
		t.Errorf("roles without an entry: %d", a.code)
	}
	file.write("")
	if err := p.Reload(); err != nil {
		t.Fatal(err)
	}
	p.get("/api/v1/status").ok(t, "start_time")
	if n := p.logs.count("level=WARN", "No roles are configured"); n != 1 {
		t.Errorf("%d warnings, want 1", n)
	}
}

// TestCredentialsStayHere: what is for the proxy goes no further, and what is for the
// target arrives.
func TestCredentialsStayHere(t *testing.T) {
	t.Parallel()
	got := make(chan http.Header, 1)
	_, port := newTarget(t, func(_ http.ResponseWriter, r *http.Request) { got <- r.Header.Clone() })
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	newAgent(t, p, func(c *agent.Config) { c.Name, c.TokenFile = "web-1.example.net", tokenFile(t, "agent"); allowAll(c) })
	prom := basic("prom", "secret")
	p.get("http://web-1.example.net:"+port+"/metrics", "Proxy-Authorization: "+prom, "Authorization: Bearer of-the-target").ok(t, "")
	if h := received(t, got, "the scrape"); h.Get("Proxy-Authorization") != "" || h.Get("Authorization") != "Bearer of-the-target" {
		t.Errorf("the target got %v", h)
	}
	// The connection that names it as one of its own changes nothing.
	p.get("http://web-1.example.net:"+port+"/metrics", "Proxy-Authorization: "+prom, "Connection: Proxy-Authorization, Authorization").ok(t, "")
	if h := received(t, got, "the scrape"); h.Get("Proxy-Authorization") != "" {
		t.Errorf("the target got %v", h)
	}
	p.get("/scrape/web-1.example.net/"+port+"/metrics", "Authorization: "+prom, "Proxy-Authorization: x").ok(t, "")
	if h := received(t, got, "the scrape"); h.Get("Proxy-Authorization") != "" || h.Get("Authorization") != "" {
		t.Errorf("the target got %v", h)
	}
	// A right Authorization is not one for the proxy in absolute form.
	p.get("http://web-1.example.net:"+port+"/metrics", "Authorization: "+prom).refused(t, 407, protocol.CodeUnauthorized, "Proxy-Authorization")
	p.get("/clients", "Proxy-Authorization: "+prom).refused(t, 401, protocol.CodeUnauthorized)
	for _, secret := range []string{prom, "of-the-target", "secret"} {
		if p.logs.count(secret) > 0 {
			t.Errorf("the log has %q", secret)
		}
	}
}

func tokenFile(t *testing.T, token string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestScraperSeesItsOwn: a scraper that is limited to some agents is told of no others.
func TestScraperSeesItsOwn(t *testing.T) {
	t.Parallel()
	_, port := newTarget(t, nil)
	file := newRolesFile(t, `
roles:
  scrapers: [{name: webs, token_hash: `+hashOf("webs")+`, agents: ['web-*']}]
  agents: [{name: all, token_hash: `+hashOf("agent")+`, agents: ['*'], hosts: ['*']}]
`)
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	for _, name := range []string{"web-1", "db-1"} {
		newAgent(t, p, func(c *agent.Config) {
			c.Name, c.TokenFile, c.Hosts = name, tokenFile(t, "agent"), []agent.Host{{Name: "shared.lan", Address: "127.0.0.1"}, {Name: name + ".lan", Address: "127.0.0.1"}}
			allowAll(c)
		})
	}
	webs := "Authorization: Bearer webs"
	for _, path := range []string{"/clients", "/targets", "/targets?mode=path", "/api/v1/agents", "/"} {
		if a := p.get(path, webs); a.code != 200 || !strings.Contains(a.body, "web-1") || strings.Contains(a.body, "db-1") {
			t.Errorf("%s: got %d %s", path, a.code, a.body)
		}
	}
	for target, want := range map[string]int{"web-1": 200, "db-1": 403, "web-1.lan": 200, "db-1.lan": 403, "shared.lan": 200, "ghost": 404} {
		for range 5 { // of a shared host it has to be the right agent
			if a := p.get("http://"+target+":"+port+"/metrics", "Proxy-Authorization: Bearer webs"); a.code != want {
				t.Errorf("%s: got %d %s, want %d", target, a.code, a.reason, want)
			}
		}
	}
}

// TestOtherSite: a page in an operator's browser can't use the credentials that the
// browser has.
func TestOtherSite(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	root := "Authorization: " + basic("root", "secret")
	p.send("POST", "/-/reload", root, "Sec-Fetch-Site: cross-site").refused(t, 403, protocol.CodeForbidden, "another site")
	p.send("POST", "/-/reload", root, "Origin: http://evil.example.net").refused(t, 403, protocol.CodeForbidden, "another site")
	p.send("POST", "/-/reload", root, "Sec-Fetch-Site: same-origin").ok(t, "")
}

// TestAgentClaims: what an agent may say of itself.
func TestAgentClaims(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, `
roles:
  agents:
  - {name: webs, token_hash: `+hashOf("webs")+`, agents: ['web-*.example.net'], hosts: ['*.berlin.lan']}
  - {name: root, token_hash: `+hashOf("root")+`, agents: [example.net]}
`)
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	open := func(token, name string) (*protocol.Session, error) {
		d := &protocol.Dialer{ProxyURL: mustParse(t, p.url), Agent: name, Instance: "1"}
		if token != "" {
			d.Token = func() (string, error) { return token, nil }
		}
		return d.Dial(t.Context())
	}
	for _, c := range []struct {
		token, name string
		status      int
		code        protocol.Code
	}{
		{"", "web-1.example.net", 401, protocol.CodeUnauthorized},
		{"wrong", "web-1.example.net", 401, protocol.CodeUnauthorized},
		{"webs", "db-1.example.net", 403, protocol.CodeForbidden},
		{"webs", "web-1.evil.example.net", 403, protocol.CodeForbidden},
		{"webs", "example.net", 403, protocol.CodeForbidden},
	} {
		_, err := open(c.token, c.name)
		wantRefusal(t, err, c.status, c.code)
	}
	for _, c := range []struct {
		token, name string
		reg         protocol.Registration
		want        string
	}{
		{"webs", "web-1.example.net", protocol.Registration{Hosts: []string{"a.berlin.lan", "*.b.berlin.lan"}}, ""},
		{"webs", "WEB-2.example.net.", protocol.Registration{Targets: []protocol.Target{{Name: "node", Path: "/metrics"}}}, ""},
		{"webs", "web-3.example.net", protocol.Registration{Hosts: []string{"db-1.example.net"}}, `host "db-1.example.net"`},
		{"webs", "web-3.example.net", protocol.Registration{Hosts: []string{"*.lan"}}, `host "*.lan"`},
		{"webs", "web-3.example.net", protocol.Registration{Hosts: []string{"EVIL.lan."}}, `host "evil.lan"`},
		{"root", "example.net", protocol.Registration{Targets: []protocol.Target{{Name: "web-9", Path: "/metrics"}}}, `"web-9.example.net"`},
		{"root", "example.net", protocol.Registration{Targets: []protocol.Target{{Name: "node", Path: "/metrics"}}}, ""},
	} {
		s, err := open(c.token, c.name)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		for what, err := range map[string]error{"check": s.CheckRegistration(t.Context(), &c.reg), "register": s.Register(t.Context(), &c.reg)} {
			if c.want != "" {
				wantRefusal(t, err, 403, protocol.CodeForbidden, c.want)
			} else if err != nil {
				t.Errorf("%s of %s: %v", what, c.name, err)
			}
		}
		s.Close()
	}
}

// TestRevoked: who loses the right to a name loses the session, after a reload and in
// time, with the tunnels in it; the others stay.
func TestRevoked(t *testing.T) {
	t.Parallel()
	const before = `
roles:
  agents:
  - {name: a, token_hash: %[1]s, agents: [web-1, web-3], hosts: [%[3]s]}
  - {name: b, token_hash: %[2]s, agents: [web-2]}
`
	first := fmt.Sprintf(before, hashOf("a"), hashOf("b"), "db.lan")
	file := newRolesFile(t, first)
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	open := func(token, name string, hosts ...string) *protocol.Session {
		t.Helper()
		d := &protocol.Dialer{ProxyURL: mustParse(t, p.url), Agent: name, Instance: "1", Token: func() (string, error) { return token, nil }}
		s, err := d.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		if err := s.Register(t.Context(), &protocol.Registration{Hosts: hosts}); err != nil {
			t.Fatal(err)
		}
		return s
	}
	reload := func(text string) {
		t.Helper()
		file.write(text)
		if err := p.Reload(); err != nil {
			t.Fatal(err)
		}
	}
	web1, web2, web3 := open("a", "web-1", "db.lan"), open("b", "web-2"), open("a", "web-3")
	unregistered, err := (&protocol.Dialer{ProxyURL: mustParse(t, p.url), Agent: "web-2", Instance: "1", Token: func() (string, error) { return "b", nil }}).Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer unregistered.Close()

	// The host is gone: only who answers for it has to go.
	reload(fmt.Sprintf(before, hashOf("a"), hashOf("b"), "other.lan"))
	received(t, web1.Done(), "the end of web-1")
	p.logs.wait(t, "Agent disconnected", "agent=web-1", "db.lan")
	for _, s := range []*protocol.Session{web2, web3} {
		if _, err := s.Ping(t.Context()); err != nil {
			t.Errorf("%s went along: %v", s.Agent, err)
		}
	}
	reload(strings.ReplaceAll(first, hashOf("b"), hashOf("c")))
	received(t, web2.Done(), "the end of web-2")
	received(t, unregistered.Done(), "the end of the session that has not registered")
	if _, err := web3.Ping(t.Context()); err != nil {
		t.Errorf("web-3 went along: %v", err)
	}
	_, err = (&protocol.Dialer{ProxyURL: mustParse(t, p.url), Agent: "web-2", Instance: "1", Token: func() (string, error) { return "b", nil }}).Dial(t.Context())
	wantRefusal(t, err, 401, protocol.CodeUnauthorized)
	reload(strings.ReplaceAll(first, "name: a,", "name: a, expires: 2020-01-01,"))
	received(t, web3.Done(), "the end of web-3")
}

// TestRelayedJobs: an agent relays pushes of its own jobs alone.
func TestRelayedJobs(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	d := &protocol.Dialer{ProxyURL: mustParse(t, p.url), Agent: "web-1.example.net", Instance: "1", Token: func() (string, error) { return "agent", nil }}
	s, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Register(t.Context(), &protocol.Registration{}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		request, body string
		want          int
	}{
		{"PUT /metrics/job/backup", "x 1\n", 200},
		{"PUT /metrics/job/other", "x 1\n", 403},
		{"POST /metrics/job/other/job/backup", "x 1\n", 403},
		{"PUT /metrics/job@base64/b3RoZXI=", "x 1\n", 403},
		{"DELETE /metrics/job/other", "", 403},
		{"DELETE /metrics/job/backup", "", 202},
		{"POST /api/v1/push?group_by=job", "x{job=\"backup\"} 1\n", 200},
		{"POST /api/v1/push?group_by=job", "x{job=\"backup\"} 2\nx{job=\"other\"} 1\n", 403},
		{"PUT /api/v1/admin/wipe", "", 404},
		{"DELETE /api/v1/groups?match[]={job=\"backup\"}", "", 404},
		{"GET /metrics", "", 404},
	} {
		stream, err := s.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(stream, "%s HTTP/1.1\r\nHost: proxy\r\nContent-Length: %d\r\n\r\n%s", c.request, len(c.body), c.body)
		method, _, _ := strings.Cut(c.request, " ")
		a := readAnswer(bufio.NewReader(stream), method)
		if a.err != nil || a.code != c.want {
			t.Errorf("%s: got %d %s %v, want %d", c.request, a.code, a.body, a.err, c.want)
		}
		stream.Close()
	}
	a := p.get("/metrics?only=groups", "Authorization: "+basic("prom", "secret"))
	a.ok(t, `x{instance="",job="backup"} 1`)
	if strings.Contains(a.body, `job="other"`) {
		t.Errorf("a job that is not the agent's: %s", a.body)
	}
}

// TestRevokedScraper: a CONNECT tunnel ends with the right to have it.
func TestRevokedScraper(t *testing.T) {
	t.Parallel()
	_, port := newTarget(t, nil)
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	newAgent(t, p, func(c *agent.Config) { c.Name, c.TokenFile = "web-1.example.net", tokenFile(t, "agent"); allowAll(c) })
	conn := rawConn(t, p.addr)
	fmt.Fprintf(conn, "CONNECT web-1.example.net:%s HTTP/1.1\r\nHost: x\r\nProxy-Authorization: %s\r\n\r\n", port, basic("prom", "secret"))
	r := bufio.NewReader(conn)
	if a := readAnswer(r, "CONNECT"); a.code != 200 {
		t.Fatal(a)
	}
	file.write(strings.ReplaceAll(everyRole(), "username: prom", "username: prometheus"))
	if err := p.Reload(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ReadByte(); !isBroken(err) {
		t.Errorf("the tunnel is still open: %v", err)
	}
}

// TestSlowedGuesses: who guesses is told to wait, and counted.
func TestSlowedGuesses(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	prom := basic("prom", "secret")
	p.get("/clients", "Authorization: "+prom).ok(t, "")
	slowed := false
	for i := 0; i < 100 && !slowed; i++ {
		// A stranger's word about the address changes nothing.
		a := p.get("/clients", "Authorization: "+basic("prom", fmt.Sprint(i)), fmt.Sprintf("X-Forwarded-For: 192.0.2.%d", i))
		slowed = a.code == 429 && a.header.Get("Retry-After") != ""
		if a.code != 429 && a.code != 401 {
			t.Fatalf("got %d", a.code)
		}
	}
	if !slowed {
		t.Error("100 guesses, and none was slowed")
	}
	p.get("/clients", "Authorization: "+prom).ok(t, "") // it was checked before
	p.get("/metrics?only=self", "Authorization: "+prom).ok(t, `culvert_proxy_auth_failures_total{reason="wrong"} 1`)
	p.logs.wait(t, "level=WARN", "further tries are slowed")
}

// TestPinned: a token of many agents is not enough to pass for one that is there
// already, across a restart, until an operator releases the name or the agent leaves.
func TestPinned(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, `
roles:
  agents:
  - {name: webs, token_hash: `+hashOf("webs")+`, agents: ['web-*']}
  - {name: strict, token_hash: `+hashOf("strict")+`, agents: ['db-*'], require_key: true}
  operators: [{name: root, token_hash: `+hashOf("root")+`}]
`)
	storage := t.TempDir()
	start := func() *testProxy {
		return newProxy(t, func(c *server.Config) { c.ConfigFile, c.StoragePath = file.path, storage })
	}
	p := start()
	open := func(token, name, instance, key string) (*protocol.Session, error) {
		d := &protocol.Dialer{ProxyURL: mustParse(t, p.url), Agent: name, Instance: instance, Token: func() (string, error) { return token, nil }}
		if key != "" {
			d.Key = func() (string, error) { return key, nil }
		}
		s, err := d.Dial(t.Context())
		if err != nil {
			return nil, err
		}
		t.Cleanup(func() { s.Close() })
		return s, s.Register(t.Context(), &protocol.Registration{})
	}
	mine, other := strings.Repeat("m", 40), strings.Repeat("o", 40)
	first, err := open("webs", "web-1", "1", mine)
	if err != nil {
		t.Fatal(err)
	}
	attempts := func() {
		t.Helper()
		for _, key := range []string{"", other} {
			_, err := open("webs", "web-1", "2", key)
			wantRefusal(t, err, 403, protocol.CodeForbidden, "pinned to another key", "DELETE /api/v1/agents/web-1")
		}
	}
	attempts() // while it is there
	first.Close()
	attempts() // while it is away
	p.stop()
	p = start()
	attempts() // after a restart
	if _, err := open("webs", "web-1", "3", mine); err != nil {
		t.Fatal(err)
	}
	if a := p.send("DELETE", "/api/v1/agents/web-1", "Authorization: Bearer webs"); a.code != 403 {
		t.Errorf("an agent releases a name: %d", a.code)
	}
	if a := p.send("DELETE", "/api/v1/agents/web-1", "Authorization: Bearer root"); a.code != 204 {
		t.Fatalf("an operator can't release a name: %d %s", a.code, a.body)
	}
	second, err := open("webs", "web-1", "4", other)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := open("webs", "web-1", "5", mine); err != nil {
		t.Errorf("after it left: %v", err)
	}
	_, err = open("strict", "db-1", "1", "")
	wantRefusal(t, err, 403, protocol.CodeForbidden, "--key-file")
	if _, err := open("strict", "db-1", "1", mine); err != nil {
		t.Error(err)
	}
	_, err = open("webs", "web-9", "1", "short")
	wantRefusal(t, err, 400, protocol.CodeInvalid, "32 to 128")
}

func writeFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
