package server_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/protocol/externaltest"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/server"
)

// page is what GET /api/v1/page answers, as far as tests look at it.
type page struct {
	Token  string
	Full   bool
	Agents []struct {
		Name, Health, Version string
		Connected             bool
		LostReason            string `json:"lost_reason"`
		Failing, Scraped      int
		Targets, Hosts        []string
		Labels                map[string]string
		Proxies               []string
	}
	AgentsGone []string `json:"agents_gone"`
	Groups     []struct {
		Path, State     string
		Labels          map[string]string
		Series          int
		Up              *bool
		TTL             float64 `json:"ttl_seconds"`
		Pushed, Expires string
	}
	GroupsGone []string `json:"groups_gone"`
	Summary    map[string]int
	Warnings   []struct{ Code, Text string }
	Draining   bool
	Proxy      string
	May        struct{ Operate, Push bool }
}

// names returns the names of the agents, and the paths of the groups, that the page has.
func (p page) names() string {
	var names []string
	for _, a := range p.Agents {
		names = append(names, a.Name)
	}
	for _, g := range p.Groups {
		names = append(names, g.Path)
	}
	return strings.Join(names, " ")
}

func (p page) gone() string {
	return strings.Join(append(slices.Clone(p.AgentsGone), p.GroupsGone...), " ")
}

func (p page) codes() string {
	var codes []string
	for _, w := range p.Warnings {
		codes = append(codes, w.Code)
	}
	return strings.Join(codes, " ")
}

// api asks for a path of the API, and reads the data of its answer, without what data
// held before.
func (p *testProxy) api(path string, data any, header ...string) {
	p.t.Helper()
	reflect.ValueOf(data).Elem().SetZero()
	a := p.get(path, header...)
	if a.code != 200 {
		p.t.Fatalf("%s: %d %s %s", path, a.code, a.reason, a.body)
	}
	if err := json.Unmarshal([]byte(a.body), &struct{ Data any }{data}); err != nil {
		p.t.Fatalf("%s: %v in %s", path, err, a.body)
	}
}

// page asks for what changed since the page before, all where since is its zero.
func (p *testProxy) page(since page, header ...string) (got page) {
	p.t.Helper()
	p.api("/api/v1/page?since="+since.Token, &got, header...)
	if got.Agents == nil || got.Groups == nil || got.AgentsGone == nil || got.GroupsGone == nil || got.Warnings == nil {
		p.t.Errorf("a list is missing: %+v", got)
	}
	return got
}

func TestPage(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	first := p.page(page{})
	if !first.Full || first.names() != "" || first.Proxy == "" || !first.May.Operate || !first.May.Push || first.codes() != "open-access storage" {
		t.Errorf("the first page: %+v", first)
	}
	_, port := newTarget(t, nil)
	a := newAgent(t, p, func(c *agent.Config) {
		allowAll(c)
		c.Labels = map[string]string{"env": "prod"}
		c.Targets = []agent.Target{{Name: "router", URL: "http://127.0.0.1:" + port + "/metrics"}}
	})
	p.send("PUT", "/metrics/job/backup/x@base64/Lw?interval=1h&ttl=2h", "Content-Length: 4\r\n\r\nx 1\n")
	got := p.page(first)
	if got.Full || got.names() != "web-1 job/backup/x@base64/Lw" || got.gone() != "" {
		t.Fatalf("got %+v", got)
	}
	if row := got.Agents[0]; !row.Connected || row.Health != "none" || !slices.Equal(row.Targets, []string{"router"}) || row.Labels["env"] != "prod" {
		t.Errorf("the agent's row: %+v", row)
	}
	if row := got.Groups[0]; row.State != "ok" || row.Up == nil || !*row.Up || row.TTL != 7200 || row.Series != 1 || row.Path == "" || row.Labels["x"] != "/" || row.Expires == "" {
		t.Errorf("the group's row: %+v", row)
	}
	if s := got.Summary; s["agents"] != 1 || s["connected"] != 1 || s["groups"] != 1 || s["failing"] != 0 || s["groups_late"] != 0 {
		t.Errorf("the summary: %v", s)
	}
	next := p.page(got)
	if next.Full || next.names() != "" || next.gone() != "" || fmt.Sprint(next.Summary) != fmt.Sprint(got.Summary) {
		t.Errorf("nothing has changed, and got %+v", next)
	}

	// Health: a row is sent when it changes, not for each scrape.
	settle := func(scrape string, want string) {
		t.Helper()
		eventually(t, scrape+" makes "+want, func() bool {
			page := p.page(next)
			if len(page.Agents) == 0 {
				return false
			}
			next = page
			return page.Agents[0].Health == want
		})
	}
	p.get("http://web-1:"+port+"/metrics").ok(t, "")
	settle("a good scrape", "ok")
	p.get("http://web-1:"+closedPort(t)+"/metrics").refused(t, 502, protocol.CodeTargetUnreachable)
	settle("a failed one", "failing")
	if row := next.Agents[0]; row.Failing != 1 || row.Scraped != 2 || next.Summary["failing"] != 1 {
		t.Errorf("got %+v, %v", row, next.Summary)
	}
	scrapes := func() (n int) {
		var one struct{ Scrapes []struct{ Scrapes int } }
		p.api("/api/v1/agents/web-1", &one)
		for _, l := range one.Scrapes {
			n += l.Scrapes
		}
		return n
	}
	p.get("http://web-1:"+port+"/metrics").ok(t, "")
	eventually(t, "the third scrape is logged", func() bool { return scrapes() == 3 })
	if page := p.page(next); page.names() != "" {
		t.Errorf("a scrape like the last one: %+v", page)
	}

	a.stop()
	got = p.page(next)
	if got.names() != "web-1" || got.Agents[0].Connected || got.Agents[0].LostReason == "" || got.Summary["lost"] != 1 {
		t.Errorf("after the agent went: %+v", got)
	}
	p.send("DELETE", "/api/v1/agents/web-1")
	p.send("DELETE", "/metrics/job/backup/x@base64/Lw")
	got = p.page(next)
	if got.Full || got.names() != "" || got.gone() != "web-1 job/backup/x@base64/Lw" || got.Summary["agents"] != 0 || got.Summary["groups"] != 0 {
		t.Errorf("after both were removed: %+v", got)
	}
	// Tokens of nowhere.
	for _, token := range []string{"x", strings.Repeat("A", 5000), url.QueryEscape("+/=\x00"), newProxy(t, nil).page(page{}).Token, got.Token[:len(got.Token)-2] + "AA"} {
		if got := p.page(page{Token: token}); !got.Full {
			t.Errorf("%.20q: got %+v", token, got)
		}
	}
}

// TestPageAccess: each sees what it may scrape, and nothing tells of the rest.
func TestPageAccess(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	prom, other, root := "Authorization: "+basic("prom", "secret"), "Authorization: Bearer scraper2", "Authorization: "+basic("root", "secret")
	mine, others, roots := p.page(page{}, prom), p.page(page{}, other), p.page(page{}, root)
	_, port := newTarget(t, nil)
	newAgent(t, p, func(c *agent.Config) {
		c.Name, c.TokenFile = "web-1.example.net", tokenFile(t, "agent")
		allowAll(c)
	})
	if got := p.page(mine, prom); got.Full || got.names() != "web-1.example.net" || got.May.Operate || got.May.Push {
		t.Errorf("who may scrape it: %+v", got)
	}
	if got := p.page(roots, root); got.Full || got.names() != "web-1.example.net" || !got.May.Operate {
		t.Errorf("an operator: %+v", got)
	}
	if got := p.page(others, other); got.names() != "" || got.Summary["agents"] != 0 {
		t.Errorf("who may not: %+v", got)
	}
	// The token of one who sees it all tells another nothing.
	if got := p.page(p.page(roots, root), other); !got.Full || got.names() != "" || got.Summary["agents"] != 0 {
		t.Errorf("with another's token: %+v", got)
	}
	p.get("http://web-1.example.net:"+port+"/metrics", "Proxy-"+prom).ok(t, "")
	p.get("http://web-1.example.net:"+port+"/metrics", "Proxy-"+other).refused(t, 403, protocol.CodeForbidden)
	type log struct {
		Target            string
		Scrapes, Failures int
	}
	var scrapes map[string][]log
	eventually(t, "the scrape is logged", func() bool {
		scrapes = nil
		p.api("/api/v1/scrapes?agent=WEB-1.example.net.&agent=ghost", &scrapes, prom)
		return len(scrapes["web-1.example.net"]) == 1
	})
	// A scrape that was not for who asked is not the agent's failure.
	if l := scrapes["web-1.example.net"][0]; l != (log{port, 1, 0}) || len(scrapes) != 1 {
		t.Errorf("got %+v", scrapes)
	}
	scrapes = nil
	if p.api("/api/v1/scrapes?agent=web-1.example.net", &scrapes, other); len(scrapes) != 0 {
		t.Errorf("who may not: %+v", scrapes)
	}
	// It is told in full to whom a new configuration shows more.
	mine = p.page(page{}, other)
	file.write(strings.ReplaceAll(everyRole(), "*.elsewhere.net", "*.example.net"))
	if err := p.Reload(); err != nil {
		t.Fatal(err)
	}
	if got := p.page(mine, other); !got.Full || got.names() != "web-1.example.net" {
		t.Errorf("after the reload: %+v", got)
	}
	for _, bad := range []string{"", "?agent=" + strings.Repeat("a&agent=", 200) + "b"} {
		if a := p.get("/api/v1/scrapes"+bad, prom); a.code != 400 || !strings.Contains(a.body, "name 1 to 200") {
			t.Errorf("%.20s: %d %s", bad, a.code, a.body)
		}
	}
}

// TestScrapesLogged: what came of a scrape stands in the agent's log, by whichever way it
// came.
func TestScrapesLogged(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	_, good := newTarget(t, say("up 1\n"))
	_, bad := newTarget(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", 500) })
	half := make(chan struct{})
	_, broken := newTarget(t, func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "half")
		http.NewResponseController(w).Flush()
		<-half
		panic(http.ErrAbortHandler)
	})
	slow, given := newHang(t, ""), newHang(t, "")
	dead := closedPort(t)
	a := newAgent(t, p, func(c *agent.Config) {
		for _, port := range []string{good, bad, broken, slow.port, given.port, dead} {
			r, _ := agent.ParsePortRange(port)
			c.Allow = append(c.Allow, r)
		}
		c.Targets = []agent.Target{{Name: "router", URL: "http://127.0.0.1:" + good + "/metrics"}}
	})
	p.get("http://web-1:"+good+"/metrics?x=y").ok(t, "up 1")
	p.get("/scrape/web-1/router/metrics").ok(t, "up 1")
	p.get("http://web-1:" + bad + "/metrics")
	conn := rawConn(t, p.addr)
	fmt.Fprintf(conn, "GET http://web-1:%s/metrics HTTP/1.1\r\nHost: web-1\r\n\r\n", broken)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err == nil {
		_, err = io.ReadFull(resp.Body, make([]byte, 4))
	}
	close(half)
	if err != nil {
		t.Fatal(err)
	}
	p.get("http://web-1:"+slow.port+"/metrics", timeoutHeader+"0.3").refused(t, 504, protocol.CodeTimeout)
	p.get("http://web-1:"+dead+"/metrics").refused(t, 502, protocol.CodeTargetUnreachable)
	p.get("http://web-1:1/metrics").refused(t, 403, protocol.CodeNotAllowed)
	p.get("http://nobody:1/metrics").refused(t, 404, protocol.CodeUnknownAgent)
	p.send("CONNECT", "web-1:"+dead).refused(t, 502, protocol.CodeTargetUnreachable)
	conn = rawConn(t, p.addr)
	fmt.Fprintf(conn, "GET http://web-1:%s/metrics HTTP/1.1\r\nHost: web-1\r\n\r\n", given.port)
	received(t, given.started, "the scrape")
	conn.Close()
	tunnel := rawConn(t, p.addr)
	fmt.Fprintf(tunnel, "CONNECT web-1:%s HTTP/1.1\r\nHost: web-1\r\n\r\nGET / HTTP/1.0\r\n\r\n", good)
	passed, err := io.ReadAll(tunnel)
	if err != nil {
		t.Fatal(err)
	}
	tunnel.Close()
	_, inside, _ := bytes.Cut(passed, []byte("\r\n\r\n"))

	type row struct {
		mode, outcome string
		status        int
		bytes         int
		failures      int
		reason        string
	}
	want := map[string]row{
		good + " http://web-1:" + good + "/metrics?x=y":         {"proxy", "ok", 200, 5, 0, ""},
		"router http://router.web-1/metrics":                    {"path", "ok", 200, 5, 0, ""},
		bad + " http://web-1:" + bad + "/metrics":               {"proxy", "target-error", 500, 3, 1, "the target answered 500 Internal Server Error"},
		broken + " http://web-1:" + broken + "/metrics":         {"proxy", "broken", 200, 4, 1, "the response broke off after 4 bytes"},
		slow.port + " http://web-1:" + slow.port + "/metrics":   {"proxy", "timeout", 504, 0, 1, "did not answer within"},
		dead + " http://web-1:" + dead + "/metrics":             {"proxy", "target-unreachable", 502, 0, 1, "connection refused"},
		"1 http://web-1:1/metrics":                              {"proxy", "not-allowed", 403, 0, 1, "--allow=1"},
		given.port + " http://web-1:" + given.port + "/metrics": {"proxy", "cancelled", 0, 0, 0, ""},
		dead + " web-1:" + dead:                                 {"connect", "target-unreachable", 502, 0, 1, "connection refused"},
		good + " web-1:" + good:                                 {"connect", "ok", 200, len(inside), 0, ""},
	}
	type entry struct {
		At, Outcome, Error string
		Seconds            float64
		Status, Bytes      int
	}
	type log struct {
		Target, URL, Mode string
		Scrapes, Failures int
		History           []entry
		Last              entry
		Durations         []float64
	}
	var one struct {
		Health  string
		Scrapes []log
		Bytes   int `json:"bytes_total"`
	}
	total := 0
	for _, w := range want {
		total += w.bytes
	}
	eventually(t, "all is logged", func() bool {
		one.Scrapes = nil
		p.api("/api/v1/agents/web-1", &one)
		return len(one.Scrapes) == len(want) && one.Bytes == total
	})
	check := func(l log, e entry) {
		t.Helper()
		w, ok := want[l.Target+" "+l.URL]
		if got := (row{l.Mode, e.Outcome, e.Status, e.Bytes, l.Failures, w.reason}); !ok || got != w || l.Scrapes != 1 || !strings.Contains(e.Error, w.reason) || (e.Error == "") != (w.reason == "") || e.At == "" {
			t.Errorf("%s %s: got %+v %q, want %+v", l.Target, l.URL, got, e.Error, w)
		}
	}
	for _, l := range one.Scrapes {
		if len(l.History) != 1 {
			t.Fatalf("got %+v", l)
		}
		check(l, l.History[0])
	}
	if one.Health != "failing" {
		t.Errorf("the agent is %s", one.Health)
	}
	var rows map[string][]log
	p.api("/api/v1/scrapes?agent=web-1", &rows)
	for _, l := range rows["web-1"] {
		if l.History != nil || len(l.Durations) != 1 {
			t.Errorf("got %+v", l)
		}
		check(l, l.Last)
	}
	if len(rows["web-1"]) != len(want) {
		t.Errorf("%d rows", len(rows["web-1"]))
	}

	// The failure of one that is away is its own.
	a.stop()
	p.get("http://web-1:"+good+"/metrics").refused(t, 503, protocol.CodeAgentOffline)
	p.send("CONNECT", "web-1:"+good).refused(t, 503, protocol.CodeAgentOffline)
	eventually(t, "both are logged", func() bool {
		p.api("/api/v1/agents/web-1", &one)
		n := 0
		for _, l := range one.Scrapes {
			if last := l.History[len(l.History)-1]; l.Target == good && last.Outcome == "agent-offline" && strings.Contains(last.Error, "lost") {
				n++
			}
		}
		return n == 2
	})
}

// TestPageForeignVersion: what an agent calls its version doesn't fill everybody's page.
func TestPageForeignVersion(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	d := &protocol.Dialer{ProxyURL: mustParse(t, p.url), Agent: "web-1", Instance: "1"}
	s, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.Register(t.Context(), &protocol.Registration{Version: strings.Repeat("1.2.3 ", 100_000)}); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/", "/?agent=web-1", "/api/v1/page"} {
		if a := p.get(path); a.code != 200 || len(a.body) > 20_000 || !strings.Contains(a.body, "1.2.3") {
			t.Errorf("%s: %d, %d bytes", path, a.code, len(a.body))
		}
	}
}

// TestGroupsAPI lists groups, and shows one.
func TestGroupsAPI(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.RoutePrefix = "/culvert" })
	for _, path := range []string{"job/backup", "job/backup/instance/a%20b", "job@base64/YS9i/x@base64/="} {
		p.send("PUT", "/culvert/metrics/"+path, "Content-Length: 4\r\n\r\nx 1\n").ok(t, "")
	}
	p.send("PUT", "/culvert/metrics/job/backup", "Content-Length: 21\r\n\r\n# TYPE x counter\nx 1\n")
	var groups []struct{ Path, State string }
	p.api("/culvert/api/v1/groups", &groups)
	if fmt.Sprint(groups) != "[{job@base64/YS9i/x@base64/= ok} {job/backup/instance/a%20b ok} {job/backup failed}]" {
		t.Errorf("got %v", groups)
	}
	for _, g := range groups {
		p.get("/culvert/api/v1/groups/"+g.Path).ok(t, "push_time_seconds{")
	}
	groups = nil
	if p.api("/culvert/api/v1/groups?match[]={instance!=\"\"}", &groups); len(groups) != 1 || groups[0].Path != "job/backup/instance/a%20b" {
		t.Errorf("got %v", groups)
	}
	for path, want := range map[string]string{
		"/culvert/api/v1/groups?match[]={":       "400 match[]",
		"/culvert/api/v1/groups/job/ghost":       `404 there is no group {job="ghost"}`,
		"/culvert/api/v1/groups/job/backup/odd":  "400 has a name without a value",
		"/culvert/api/v1/groups/x":               `404 "x" is no group`,
		"/culvert/api/v1/groups/job@base64/!":    "400 base64",
		"/culvert/api/v1/scrape_config?port=x":   `400 port="x": write a port`,
		"/culvert/ui/nothing.js":                 `404 there is no file "nothing.js"`,
		"/culvert/ui/..%2f..%2fui.go":            "404",
		"/culvert/api/v1/scrape_config?port=0":   `400 port="0"`,
		"/culvert/api/v1/scrape_config?port=1e3": `400 port="1e3"`,
	} {
		a := p.get(path)
		status, words, _ := strings.Cut(want, " ")
		if !strings.HasPrefix(fmt.Sprint(a.code), status) || !strings.Contains(a.body, words) {
			t.Errorf("%s: got %d %s, want %s", path, a.code, a.body, want)
		}
	}
}

// TestPageWarnings: what is wrong is on the page, with what to do.
func TestPageWarnings(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "push.db"), bytes.Repeat([]byte("damage "), 10_000), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "fleet.db"), bytes.Repeat([]byte("damage "), 10_000), 0o600); err != nil {
		t.Fatal(err)
	}
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile, c.StoragePath = file.path, dir })
	prom, root := "Authorization: "+basic("prom", "secret"), "Authorization: "+basic("root", "secret")
	if got := p.page(page{}, prom).codes(); got != "push-store storage" {
		t.Errorf("got %s", got)
	}
	file.write("roles: {nonsense: secret-of-the-file}")
	if err := p.Reload(); err == nil {
		t.Fatal("the file is good")
	}
	mine, roots := p.page(page{}, prom), p.page(page{}, root)
	if mine.codes() != "push-store storage reload" || roots.codes() != mine.codes() {
		t.Errorf("got %s and %s", mine.codes(), roots.codes())
	}
	// What may tell of files is for operators.
	for _, w := range mine.Warnings {
		if strings.Contains(w.Text, dir) || strings.Contains(w.Text, file.path) || strings.Contains(w.Text, "nonsense") {
			t.Errorf("a scraper is told %q", w.Text)
		}
	}
	if text := fmt.Sprint(roots.Warnings); !strings.Contains(text, "nonsense") || !strings.Contains(text, "damaged") {
		t.Errorf("an operator is told %s", text)
	}
	file.write(everyRole())
	if err := p.Reload(); err != nil {
		t.Fatal(err)
	}
	if got := p.page(page{}, root).codes(); got != "push-store storage" {
		t.Errorf("after the reload: %s", got)
	}
	file.write("")
	if err := p.Reload(); err != nil {
		t.Fatal(err)
	}
	if got := p.page(page{}).codes(); got != "open-access push-store storage" {
		t.Errorf("without roles: %s", got)
	}
	var status struct {
		Listeners []struct {
			Address string
			TLS     bool
		}
		Storage map[string]any
	}
	if p.api("/api/v1/status", &status); len(status.Listeners) != 1 || status.Listeners[0].Address != p.addr || status.Storage["push_store_up"] != false || status.Storage["agents_stored"] != false {
		t.Errorf("got %+v", status)
	}
}

// TestPageGzip: long answers are compressed where that is welcome.
func TestPageGzip(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	for i := range 20 {
		register(t, p, fmt.Sprintf("web-%d", i), "1", protocol.Registration{Hosts: []string{fmt.Sprintf("db-%d.lan", i)}})
	}
	a := p.get("/api/v1/page", "Accept-Encoding: gzip")
	if a.header.Get("Content-Encoding") != "gzip" || a.header.Get("Cache-Control") != "no-store" || a.header.Get("Access-Control-Allow-Origin") != "" {
		t.Errorf("got %v", a.header)
	}
	zr, err := gzip.NewReader(strings.NewReader(a.body))
	if err != nil {
		t.Fatal(err)
	}
	var got struct{ Data page }
	if err := json.NewDecoder(zr).Decode(&got); err != nil || len(got.Data.Agents) != 20 {
		t.Errorf("%d agents, %v", len(got.Data.Agents), err)
	}
}

// TestPageCluster: a scrape that another proxy passes on is logged where it came in and
// where the agent is. The page says which proxies hold an agent, and when etcd is away.
func TestPageCluster(t *testing.T) {
	t.Parallel()
	e := externaltest.StartEtcd(t)
	a, b := newMember(t, e, nil), newMember(t, e, nil)
	_, port := newTarget(t, nil)
	first := b.page(page{})
	newAgent(t, a, allowAll)
	b.holds("web-1", true)
	got := b.page(first)
	holder := a.page(page{}).Proxy
	if got.Full || got.names() != "web-1" || !slices.Equal(got.Agents[0].Proxies, []string{holder}) {
		t.Errorf("got %+v", got)
	}
	b.get("http://web-1:"+port+"/metrics").ok(t, "up 1")
	tunnel := rawConn(t, b.addr)
	fmt.Fprintf(tunnel, "CONNECT web-1:%s HTTP/1.1\r\nHost: web-1\r\n\r\nGET / HTTP/1.0\r\n\r\n", port)
	if passed, err := io.ReadAll(tunnel); err != nil || !strings.Contains(string(passed), "up 1") {
		t.Errorf("%q, %v", passed, err)
	}
	tunnel.Close()
	for _, p := range []*testProxy{a, b} {
		eventually(t, "both scrapes are logged with their bytes", func() bool {
			var one struct {
				Scrapes []struct {
					Target, Mode string
					Scrapes      int
					History      []struct{ Bytes int }
				}
			}
			p.api("/api/v1/agents/web-1", &one)
			modes := map[string]int{}
			for _, l := range one.Scrapes {
				if l.Target == port && l.Scrapes == 1 {
					modes[l.Mode] = l.History[0].Bytes
				}
			}
			return len(one.Scrapes) == 2 && modes["proxy"] == 5 && modes["connect"] > 100
		})
	}
	var status struct {
		Cluster struct {
			Up    bool `json:"etcd_up"`
			Peers []struct{ ID, URL string }
		}
	}
	if b.api("/api/v1/status", &status); !status.Cluster.Up || len(status.Cluster.Peers) != 1 || status.Cluster.Peers[0].ID != holder || status.Cluster.Peers[0].URL == "" {
		t.Errorf("got %+v", status)
	}
	if jobs := scrapeJobs(t, b, "/api/v1/scrape_config"); fmt.Sprint(jobs["culvert-pushed"]["params"], jobs["culvert-proxy"]["params"]) != "map[only:[groups]] map[only:[self]]" {
		t.Errorf("got %v", jobs)
	}
	e.Stop()
	b.logs.wait(t, "etcd does not answer")
	eventually(t, "the page says that etcd is away", func() bool { return b.page(page{}).codes() == "open-access cluster" })
}

// BenchmarkPage asks a proxy that knows 10,000 agents and 10,000 groups for the page: all of
// it, what changed where that is one group, and where nothing did.
func BenchmarkPage(b *testing.B) {
	logger := slog.New(slog.DiscardHandler)
	s, err := server.New(server.Config{ListenAddresses: []string{"127.0.0.1:0"}, Fleet: fleet.Config{SettleTime: -1}, Logger: logger})
	if err != nil {
		b.Fatal(err)
	}
	if err := s.Listen(); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { s.Run(ctx); close(ended) }()
	b.Cleanup(func() { cancel(); <-ended })
	client := &http.Client{Transport: &http.Transport{DisableCompression: true}}
	b.Cleanup(client.CloseIdleConnections)
	do := func(method, path, body string) []byte {
		req, err := http.NewRequest(method, "http://"+s.Addr()+path, strings.NewReader(body))
		if err != nil {
			b.Fatal(err)
		}
		req.Header.Set("Accept-Encoding", "gzip")
		resp, err := client.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != 200 {
			b.Fatal(resp.Status, err, string(text))
		}
		if resp.Header.Get("Content-Encoding") == "gzip" {
			zr, err := gzip.NewReader(bytes.NewReader(text))
			if err != nil {
				b.Fatal(err)
			}
			text, _ = io.ReadAll(zr)
		}
		return text
	}
	const n = 10_000
	var polls [100]net.Conn // the last ones: each has to live until its agent is registered
	for i := range n {
		if last := polls[i%len(polls)]; last != nil {
			last.Close()
		}
		do("PUT", fmt.Sprintf("/metrics/job/backup/instance/web-%d.example.net?interval=24h", i), "last_success 1\nduration_seconds 17\n")
		conn, err := net.Dial("tcp", s.Addr())
		if err != nil {
			b.Fatal(err)
		}
		name := fmt.Sprintf("web-%d.example.net", i)
		fmt.Fprintf(conn, "POST /poll HTTP/1.1\r\nHost: proxy\r\nContent-Length: %d\r\n\r\n%s", len(name), name)
		polls[i%len(polls)] = conn
	}
	for _, conn := range polls {
		defer conn.Close()
	}
	ask := func(token string) page {
		var got struct{ Data page }
		if err := json.Unmarshal(do("GET", "/api/v1/page?since="+token, ""), &got); err != nil {
			b.Fatal(err)
		}
		return got.Data
	}
	for len(ask("").Agents) < n {
		time.Sleep(10 * time.Millisecond)
	}
	get := func(token string) { do("GET", "/api/v1/page?since="+token, "") }
	b.Run("all", func(b *testing.B) {
		for b.Loop() {
			get("")
		}
	})
	token := ask("").Token
	do("PUT", "/metrics/job/backup/instance/web-1.example.net", "last_success 2\nduration_seconds 17\n")
	b.Run("one", func(b *testing.B) {
		for b.Loop() {
			get(token)
		}
	})
	token = ask(token).Token
	b.Run("none", func(b *testing.B) {
		for b.Loop() {
			get(token)
		}
	})
	b.Run("healthy", func(b *testing.B) { // the least that a request costs
		for b.Loop() {
			do("GET", "/-/healthy", "")
		}
	})
}
