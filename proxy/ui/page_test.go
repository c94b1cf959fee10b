package ui_test

import (
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/html"

	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/server"
	"github.com/culvert-io/culvert/proxy/ui"
)

// serve returns the page of a query, and its document.
func serve(t *testing.T, query string, content ui.Content) (*httptest.ResponseRecorder, *html.Node) {
	t.Helper()
	values, err := url.ParseQuery(query)
	if err != nil {
		t.Fatal(err)
	}
	content.Query = ui.ParseQuery(values)
	w := httptest.NewRecorder()
	ui.Serve(w, httptest.NewRequest(http.MethodGet, "/?"+query, nil), content)
	return w, parse(t, w.Body.String())
}

func parse(t *testing.T, text string) *html.Node {
	t.Helper()
	doc, err := html.Parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// all returns the elements of a document for which wanted is true; what stands in
// templates is not of the document.
func all(doc *html.Node, wanted func(*html.Node) bool) []*html.Node {
	var found []*html.Node
	var walk func(n *html.Node)
	walk = func(n *html.Node) {
		if n.Type == html.ElementNode && wanted(n) {
			found = append(found, n)
		}
		if n.Type == html.ElementNode && n.Data == "template" {
			return
		}
		for c := n.FirstChild; c != nil; c = c.NextSibling {
			walk(c)
		}
	}
	walk(doc)
	return found
}

func attribute(n *html.Node, name string) string {
	for _, a := range n.Attr {
		if a.Key == name {
			return a.Val
		}
	}
	return ""
}

func text(n *html.Node) string {
	var b strings.Builder
	for d := range n.Descendants() {
		if d.Type == html.TextNode {
			b.WriteString(d.Data)
		}
	}
	return b.String()
}

// rows returns the heads of the rows that the page shows.
func rows(doc *html.Node) []string {
	var names []string
	for _, th := range all(doc, func(n *html.Node) bool { return n.Data == "th" && attribute(n, "scope") == "row" }) {
		names = append(names, strings.TrimSpace(text(th)))
	}
	return names
}

// links returns where the links of the page lead, by their text.
func links(doc *html.Node) map[string]string {
	found := map[string]string{}
	for _, a := range all(doc, func(n *html.Node) bool { return n.Data == "a" }) {
		found[strings.TrimSpace(text(a))] = attribute(a, "href")
	}
	return found
}

func yes() *bool { v := true; return &v }
func no() *bool  { v := false; return &v }

// some has something of all that the page shows.
func some(foreign string) ui.Content {
	now := time.Now()
	agent := ui.Agent{
		Name: foreign, Kind: "culvert", Since: now, FirstSeen: now, LostReason: foreign, Version: foreign, Labels: map[string]string{foreign: foreign},
		Targets: []string{foreign}, Hosts: []string{foreign}, RemoteAddr: foreign, Transport: foreign, Proxies: []string{foreign}, Health: "failing", Failing: 1, Scraped: 2,
	}
	group := ui.Group{Path: "job/" + url.PathEscape(foreign), Labels: map[string]string{"job": foreign, foreign: foreign}, Series: 3, Pushed: now, Failed: now, Expires: now.Add(time.Hour), Up: no(), State: "late"}
	return ui.Content{
		Version: foreign, Proxy: foreign, Summary: ui.Summary{Agents: 1, Lost: 1, Failing: 1, Groups: 1, GroupsLate: 1},
		Warnings: []ui.Warning{{Code: foreign, Text: foreign}}, Agents: []ui.Agent{agent}, Groups: []ui.Group{group},
		Agent: &ui.AgentDetails{Agent: agent, Endpoints: []ui.Endpoint{{Name: foreign, Path: foreign}}, BytesTotal: 12345,
			Scrapes: []fleet.TargetLog{{Target: foreign, URL: foreign, Scrapes: 2, Failures: 1, History: []fleet.ScrapeEntry{{At: now, Seconds: 1, Outcome: foreign, Error: foreign}}}}},
		Group: &group, Samples: foreign, ScrapeConfig: foreign, MetricsPath: "metrics",
		Status: map[string]any{"flags": map[string]string{"config.file": foreign}, "listeners": []map[string]any{{"address": foreign, "tls": true}}, "storage": map[string]any{"push_store_up": true, foreign: nil}, "start_time": now,
			"cluster": map[string]any{"etcd_up": true, "etcd_endpoints": []string{"http://etcd-1:2379", foreign}, "peers": []map[string]any{{"id": foreign, "url": "http://proxy-2:8081", "started": now}}}},
	}
}

// every is a query for each thing that the page can show.
var every = []string{"", "view=groups", "view=status", "view=config", "agent=a", "group=b", "q=nothing-like-it", "view=groups&q=nothing-like-it"}

// What agents and jobs are called is text, wherever it stands.
func TestPageEscapes(t *testing.T) {
	const foreign = `"><script>alert(1)</script><img src=x onerror=alert(1)>'&amp;` + "`${1}`javascript:alert(1)"
	for _, query := range every {
		w, doc := serve(t, query, some(foreign))
		all(doc, func(n *html.Node) bool {
			if n.Data == "script" && !strings.HasPrefix(attribute(n, "src"), "ui/") || n.Data == "img" && !strings.HasPrefix(attribute(n, "src"), "ui/") {
				t.Errorf("%q: the page has %s %v", query, n.Data, n.Attr)
			}
			for _, a := range n.Attr {
				u, err := url.Parse(a.Val)
				leads := a.Key == "href" || a.Key == "src" || a.Key == "action"
				if strings.HasPrefix(a.Key, "on") || a.Key == "style" || leads && (err != nil || u.Scheme != "" || u.Host != "" || strings.HasPrefix(u.Path, "/")) {
					t.Errorf("%q: <%s> has the attribute %s=%q", query, n.Data, a.Key, a.Val)
				}
			}
			return false
		})
		if strings.HasPrefix(query, "q=") || strings.Contains(query, "&q=") {
			continue
		}
		if !strings.Contains(text(doc), foreign) {
			t.Errorf("%q: the page does not show %q as it is: %s", query, foreign, w.Body)
		}
	}
	if _, doc := serve(t, "q="+url.QueryEscape(foreign), some(foreign)); attribute(all(doc, func(n *html.Node) bool { return attribute(n, "id") == "filter" })[0], "value") != foreign {
		t.Error("the field of the filter has not what was asked for")
	}
}

// The page is what it says it is: a parser has nothing to mend, and all IDs are of one
// element.
func TestPageValid(t *testing.T) {
	void := []string{"meta", "link", "img", "input", "br"}
	for _, query := range every {
		w, doc := serve(t, query, some("x"))
		var written, parsed []string
		tokens := html.NewTokenizer(w.Result().Body)
		var open []string
		for {
			kind := tokens.Next()
			if kind == html.ErrorToken {
				if tokens.Err() != io.EOF {
					t.Fatal(tokens.Err())
				}
				break
			}
			token := tokens.Token()
			switch kind {
			case html.StartTagToken:
				written = append(written, token.Data)
				if !slices.Contains(void, token.Data) {
					open = append(open, token.Data)
				}
			case html.EndTagToken:
				if len(open) == 0 || open[len(open)-1] != token.Data {
					t.Fatalf("%q: </%s> ends %v", query, token.Data, open)
				}
				open = open[:len(open)-1]
			}
		}
		for n := range doc.Descendants() {
			if n.Type == html.ElementNode {
				parsed = append(parsed, n.Data)
			}
		}
		if !slices.Equal(written, parsed) {
			t.Errorf("%q: a parser mends the page:\n%v\n%v", query, written, parsed)
		}
		ids := map[string]bool{}
		for _, n := range all(doc, func(n *html.Node) bool { return attribute(n, "id") != "" }) {
			if id := attribute(n, "id"); ids[id] {
				t.Errorf("%q: two elements have the ID %q", query, id)
			} else {
				ids[id] = true
			}
		}
		if n := len(all(doc, func(n *html.Node) bool { return n.Data == "h1" })); n != 1 {
			t.Errorf("%q: the page has %d h1", query, n)
		}
	}
}

// What /api/v1/status tells is shown, whatever it is.
func TestPageStatus(t *testing.T) {
	_, doc := serve(t, "view=status", some("x"))
	shown := map[string]string{}
	for _, s := range all(doc, func(n *html.Node) bool { return attribute(n, "class") == "card" || attribute(n, "class") == "card all" }) {
		var words []string
		for d := range s.Descendants() {
			if d.Type == html.TextNode {
				words = append(words, strings.Fields(d.Data)...)
			}
		}
		shown[attribute(s, "aria-labelledby")] = strings.Join(words, " ")
	}
	for id, want := range map[string]string{
		"s-cluster": "Cluster etcd endpoints http://etcd-1:2379, x etcd up yes", "s-cluster-peers": "Cluster: peers id started url x",
		"s-listeners": "Listeners address tls x yes", "s-flags": "Flags --config.file x", "s-storage": "Storage push store up yes x –", "s-proxy": "Proxy ID x version x start time 20",
	} {
		if !strings.HasPrefix(shown[id], want) {
			t.Errorf("the status has %q as %s, want %q", shown[id], id, want)
		}
	}
	if _, doc := serve(t, "view=status", ui.Content{}); !strings.Contains(text(doc), "are for operators") {
		t.Error("who is no operator is not told why there is no status")
	}
}

// fleetOf has agents of all kinds, not in order.
func fleetOf() []ui.Agent {
	now := time.Now()
	return []ui.Agent{
		{Name: "web-10", Connected: true, Since: now.Add(-time.Hour), Version: "0.10.0", RTTSeconds: 0.02, Health: "ok", Scraped: 1, Labels: map[string]string{"env": "prod"}},
		{Name: "web-2", Connected: true, Since: now.Add(-time.Minute), Version: "0.9.1", RTTSeconds: 0.03, Health: "failing", Failing: 1, Scraped: 3, Labels: map[string]string{"env": "staging"}, Targets: []string{"router"}},
		{Name: "db-1", Since: now.Add(-time.Second), LostReason: "it said: shutdown", Health: "none", Version: "0.9.1", Labels: map[string]string{"env": "prod"}},
		{Name: "web-1", Connected: true, Since: now.Add(-48 * time.Hour), Version: "0.9.1", RTTSeconds: 0.01, Health: "ok", Scraped: 2, Hosts: []string{"*.berlin.lan"}},
	}
}

func TestPageAgents(t *testing.T) {
	for _, c := range []struct {
		query string
		want  string
	}{
		{"", "db-1 web-1 web-2 web-10"},
		{"sort=-name", "web-10 web-2 web-1 db-1"},
		{"sort=nonsense", "db-1 web-1 web-2 web-10"},
		{"sort=state", "db-1 web-2 web-1 web-10"},
		{"sort=since", "db-1 web-2 web-10 web-1"},
		{"sort=health", "web-2 web-1 web-10 db-1"},
		{"sort=rtt", "db-1 web-1 web-10 web-2"},
		{"sort=version", "db-1 web-1 web-2 web-10"},
		{"sort=-version", "web-10 web-2 web-1 db-1"},
		{"state=connected", "web-1 web-2 web-10"},
		{"state=lost", "db-1"},
		{"state=failing", "web-2"},
		{"state=nonsense", "db-1 web-1 web-2 web-10"},
		{"q=WEB", "web-1 web-2 web-10"},
		{"q=env%3Dprod", "db-1 web-10"},
		{"q=web+env%3Dprod", "web-10"},
		{"q=router", "web-2"},
		{"q=berlin", "web-1"},
		{"q=shutdown", "db-1"},
		{"q=0.9.1&state=connected&sort=-rtt", "web-2 web-1"},
		{"q=nobody", ""},
	} {
		_, doc := serve(t, c.query, ui.Content{Agents: fleetOf(), Summary: ui.Summary{Agents: 4, Connected: 3, Lost: 1, Failing: 1}})
		if got := strings.Join(rows(doc), " "); got != c.want {
			t.Errorf("%q: the page has %q, want %q", c.query, got, c.want)
		}
	}
	_, doc := serve(t, "q=web&state=connected&sort=rtt", ui.Content{Agents: fleetOf(), Summary: ui.Summary{Agents: 4, Connected: 3, Lost: 1, Failing: 1}})
	found := links(doc)
	for name, want := range map[string]string{
		"RTT": "./?q=web&sort=-rtt&state=connected", "Agent": "./?q=web&state=connected", "web-1": "./?agent=web-1",
		"3 connected": "./?", "1 lost": "./?state=lost", "0 groups late": "./?state=late&view=groups",
	} {
		if found[name] != want {
			t.Errorf("%q leads to %q, want %q", name, found[name], want)
		}
	}
}

func TestPageGroups(t *testing.T) {
	now := time.Now()
	group := func(job, instance, state string, up *bool, pushed, expires time.Time, series int) ui.Group {
		return ui.Group{Path: "job/" + job + "/instance/" + instance, Labels: map[string]string{"job": job, "instance": instance}, State: state, Up: up, Pushed: pushed, Expires: expires, Series: series}
	}
	groups := []ui.Group{
		group("backup", "db-10", "ok", yes(), now, now.Add(time.Hour), 5),
		group("backup", "db-2", "late", no(), now.Add(-time.Hour), time.Time{}, 9),
		group("report", "a", "failed", nil, time.Time{}, time.Time{}, 0),
		group("archive", "a", "expired", no(), now.Add(-2*time.Hour), time.Time{}, 0),
	}
	for _, c := range []struct{ query, want string }{
		{"", "archive instance=a, backup instance=db-2, backup instance=db-10, report instance=a"},
		{"&sort=state", "report instance=a, backup instance=db-2, archive instance=a, backup instance=db-10"},
		{"&sort=pushed", "report instance=a, backup instance=db-10, backup instance=db-2, archive instance=a"},
		{"&sort=expires", "backup instance=db-10, archive instance=a, backup instance=db-2, report instance=a"},
		{"&sort=up", "archive instance=a, backup instance=db-2, backup instance=db-10, report instance=a"},
		{"&sort=-series", "report instance=a, archive instance=a, backup instance=db-10, backup instance=db-2"},
		{"&state=late", "archive instance=a, backup instance=db-2"},
		{"&state=failed", "report instance=a"},
		{"&state=ok", "backup instance=db-10"},
		{"&state=expired", "archive instance=a"},
		{"&q=job%3Dbackup+db-2", "backup instance=db-2"},
	} {
		_, doc := serve(t, "view=groups"+c.query, ui.Content{Groups: groups, Summary: ui.Summary{Groups: 4}})
		if got := strings.Join(rows(doc), ", "); got != c.want {
			t.Errorf("%q: the page has %q, want %q", c.query, got, c.want)
		}
	}
}

// Without JavaScript there are 200 rows a page.
func TestPagePaging(t *testing.T) {
	content := ui.Content{Summary: ui.Summary{Agents: 450, Connected: 450}}
	for i := range 450 {
		content.Agents = append(content.Agents, ui.Agent{Name: fmt.Sprintf("web-%d", i+1), Connected: true, Health: "none"})
	}
	for _, c := range []struct {
		query, first, last, prev, next, span string
	}{
		{"q=web", "web-1", "web-200", "", "./?page=2&q=web", "1 to 200 of 450"},
		{"page=2", "web-201", "web-400", "./?", "./?page=3", "201 to 400 of 450"},
		{"page=3&sort=-name", "web-50", "web-1", "./?page=2&sort=-name", "", "401 to 450 of 450"},
		{"page=99", "web-401", "web-450", "./?page=2", "", "401 to 450 of 450"},
		{"page=-1", "web-1", "web-200", "", "./?page=2", "1 to 200 of 450"},
		{"page=x", "web-1", "web-200", "", "./?page=2", "1 to 200 of 450"},
	} {
		_, doc := serve(t, c.query, content)
		names, found := rows(doc), links(doc)
		if names[0] != c.first || names[len(names)-1] != c.last || found["Previous"] != c.prev || found["Next"] != c.next || !strings.Contains(text(doc), c.span) {
			t.Errorf("%q: %s to %s, links %q and %q; want %+v", c.query, names[0], names[len(names)-1], found["Previous"], found["Next"], c)
		}
	}
}

// Where nothing is, the page tells how to begin.
func TestPageEmpty(t *testing.T) {
	for query, want := range map[string]string{"": "culvert-client --proxy-url=http://", "view=groups": "/metrics/job/my-job"} {
		_, doc := serve(t, query, ui.Content{})
		for _, n := range all(doc, func(n *html.Node) bool { return attribute(n, "data-empty") == "none" }) {
			hidden := slices.ContainsFunc(n.Attr, func(a html.Attribute) bool { return a.Key == "hidden" })
			if hidden || !strings.Contains(text(n), want) {
				t.Errorf("%q: an empty page says %q (hidden: %t), want %q", query, text(n), hidden, want)
			}
		}
	}
	for query, want := range map[string]int{"agent=nobody": 404, "group=job/nothing": 404, "agent=": 200} {
		if w, _ := serve(t, query, ui.Content{}); w.Code != want {
			t.Errorf("%q: %d, want %d", query, w.Code, want)
		}
	}
}

var assetLink = regexp.MustCompile(`"(ui/[^"]+)"`)

// Behind a prefix, as a reverse proxy gives one, all that the page and its modules name is
// there; a browser keeps the files as long as they are of this version.
func TestAssets(t *testing.T) {
	for _, prefix := range []string{"", "/some/culvert"} {
		s := newSite(t, func(c *server.Config) { c.RoutePrefix = prefix })
		page := s.get("")
		policy := page.header.Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} {
			if !strings.Contains(policy, want) || strings.Contains(policy, "unsafe") {
				t.Errorf("the page's policy is %q, want %s, and nothing unsafe", policy, want)
			}
		}
		for name, want := range map[string]string{"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Content-Type": "text/html; charset=utf-8"} {
			if got := page.header.Get(name); got != want {
				t.Errorf("the page has %s: %s, want %s", name, got, want)
			}
		}
		wanted := map[string]bool{}
		for _, m := range assetLink.FindAllStringSubmatch(page.body, -1) {
			wanted[m[1]] = true
		}
		total := 0
		var seen []string
		for len(wanted) > 0 {
			for name := range wanted {
				delete(wanted, name)
				if slices.Contains(seen, name) {
					continue
				}
				seen = append(seen, name)
				a := s.get(name, "Accept-Encoding", "identity")
				if a.code != http.StatusOK || a.header.Get("Cache-Control") != "private, max-age=31536000, immutable" || a.header.Get("ETag") == "" || a.header.Get("X-Content-Type-Options") != "nosniff" {
					t.Errorf("%s: %d, %v", name, a.code, a.header)
				}
				total += len(a.body)
				for _, m := range regexp.MustCompile(`from "\./([^"]+)"`).FindAllStringSubmatch(a.body, -1) {
					wanted[name[:strings.LastIndex(name, "/")+1]+m[1]] = true
				}
				if again := s.get(name, "If-None-Match", a.header.Get("ETag"), "Accept-Encoding", "identity"); again.code != http.StatusNotModified {
					t.Errorf("%s: %d for its own ETag", name, again.code)
				}
				zipped := s.get(name, "Accept-Encoding", "gzip")
				if z, err := gzip.NewReader(strings.NewReader(zipped.body)); err != nil {
					t.Errorf("%s: %v", name, err)
				} else if plain, err := io.ReadAll(z); err != nil || string(plain) != a.body || zipped.header.Get("ETag") == a.header.Get("ETag") {
					t.Errorf("%s: by gzip it has %d bytes, %v, and the ETag %s", name, len(plain), err, zipped.header.Get("ETag"))
				}
				parts := strings.Split(name, "/")
				parts[1] = "another"
				if old := s.get(strings.Join(parts, "/"), "Accept-Encoding", "identity"); old.body != a.body || old.header.Get("Cache-Control") != "no-cache" {
					t.Errorf("%s of another version: %d, %v", name, old.code, old.header)
				}
			}
		}
		if len(seen) < 8 || total > 100_000 {
			t.Errorf("the page has the files %q of %d bytes; want them all, and less than 100 kB", seen, total)
		}
		for _, name := range []string{"ui/", "ui/x", "ui/x/none.js", "ui/x/../ui.go", "ui/x/assets/page.js"} {
			if a := s.get(name); a.code != http.StatusNotFound {
				t.Errorf("%s: %d, want 404", name, a.code)
			}
		}
		zipped := s.get("", "Accept-Encoding", "gzip;q=0.5, br")
		if z, err := gzip.NewReader(strings.NewReader(zipped.body)); err != nil || zipped.header.Get("Vary") != "Accept-Encoding" {
			t.Errorf("the page by gzip: %v, %v", err, zipped.header)
		} else if plain, err := io.ReadAll(z); err != nil || !strings.HasPrefix(string(plain), "<!DOCTYPE html>") {
			t.Errorf("the page by gzip: %v, %.40q", err, plain)
		}
	}
}

// The page of a real proxy shows what is there, to whom it may.
func TestPageOfProxy(t *testing.T) {
	s := newSite(t, nil)
	s.startAgents(0, 3)
	s.push(2)
	s.scrape("app", "web-1.example.net")
	s.scrape("9100", "db-1.example.net")
	for query, want := range map[string][]string{
		"":                         {"web-1.example.net", "cache-1.example.net", "1 of 1 failing", "1 ok", "role=database", "none yet", "No roles are configured"},
		"?agent=web-1.example.net": {"app.web-1.example.net/metrics", "agent.web-1.example.net/metrics", "ok", "env=prod", "296 B"},
		"?agent=db-1.example.net":  {"failing", "not-allowed", "--allow=9100"},
		"?view=groups":             {"backup", "instance=web-1.example.net", "cert-renewal", "24 h"},
		"?group=job%2Fbackup%2Finstance%2Fweb-1.example.net": {"job_rows{instance=\"web-1.example.net\",job=\"backup\"} 4711", "instance=web-1.example.net"},
		"?view=status":               {"--storage.path", "/var/lib/culvert-proxy", "go1."},
		"status":                     {"--storage.path"},
		"?view=config":               {"scrape_configs:", "proxy_url: http://" + s.Addr()},
		"?view=config&port=9100":     {"scrape_configs:", "port-9100"},
		"?view=config&port=nonsense": {"write a port from 1 to 65535"},
	} {
		var a answer
		var missing []string
		// A scrape is noted when its scraper has the answer, which may be just before.
		for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
			a = s.get(query)
			shown := text(parse(t, a.body))
			missing = slices.DeleteFunc(slices.Clone(want), func(part string) bool { return strings.Contains(shown, part) })
			if len(missing) == 0 || time.Now().After(deadline) {
				break
			}
		}
		if a.code != http.StatusOK || len(missing) > 0 {
			t.Errorf("%q: %d, and the page does not show %q:\n%s", query, a.code, missing, a.body)
		}
	}
	if a := s.get("?agent=nobody"); a.code != http.StatusNotFound {
		t.Errorf("the page of an agent that nobody knows is %d", a.code)
	}
}
