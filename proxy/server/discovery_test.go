package server_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/server"
)

// group is an entry of discovery, as Prometheus reads it.
type group struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels"`
}

// discover reads a list; header lines may be added.
func (p *testProxy) discover(path string, header ...string) []group {
	p.t.Helper()
	a := p.get(path, header...)
	if a.code != 200 || a.header.Get("Content-Type") != "application/json" {
		p.t.Fatalf("%s: got %d, %q: %s", path, a.code, a.header.Get("Content-Type"), a.body)
	}
	var groups []group
	if err := json.Unmarshal([]byte(a.body), &groups); err != nil || groups == nil {
		p.t.Fatalf("%s: %v in %s", path, err, a.body)
	}
	return groups
}

// agent reads what the API says of an agent.
func (p *testProxy) agent(name string) fleet.Info {
	p.t.Helper()
	var answer struct {
		Status string
		Data   fleet.Info
	}
	a := p.get("/api/v1/agents/" + name)
	if err := json.Unmarshal([]byte(a.body), &answer); err != nil || answer.Status != "success" {
		p.t.Fatalf("agent %q: %d %s", name, a.code, a.body)
	}
	return answer.Data
}

func (p *testProxy) names(query string) []string {
	p.t.Helper()
	var names []string
	for _, g := range p.discover("/targets" + query) {
		names = append(names, g.Targets[0])
	}
	return names
}

func wantGroups(t *testing.T, got, want []group) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		g, _ := json.MarshalIndent(got, "", " ")
		w, _ := json.MarshalIndent(want, "", " ")
		t.Errorf("got %s\nwant %s", g, w)
	}
}

// TestDiscovery is the shape of both lists.
func TestDiscovery(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "proxy.yml")
	os.WriteFile(file, []byte("discovery:\n  promote_labels: [env, team]\n"), 0o600)
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file })
	wantGroups(t, p.discover("/clients"), []group{})
	wantGroups(t, p.discover("/targets"), []group{})
	reg := protocol.Registration{
		Version: "1.2.3",
		Labels:  map[string]string{"env": "prod", "dc": "b1", "job": "evil", "instance": "evil", "scrape_interval": "1s"},
		Targets: []protocol.Target{
			{Name: "node", Path: "/metrics"},
			{Name: "snmp", Path: "/snmp/a%20b", Params: map[string][]string{"target": {"10.0.0.1"}, "module": {"if", "ip"}},
				Labels: map[string]string{"env": "test", "job": "x"}},
			{Name: "tree", Path: "/tree/*"},
		},
		Hosts: []string{"db.lan"},
	}
	s := register(t, p, "web-1", "abc", reg)
	labels := func(target, connected string, more ...string) map[string]string {
		l := map[string]string{
			"__meta_culvert_agent": "web-1", "__meta_culvert_target": target, "__meta_culvert_connected": connected,
			"__meta_culvert_label_env": "prod", "__meta_culvert_label_dc": "b1", "__meta_culvert_label_job": "evil",
			"__meta_culvert_label_instance": "evil", "__meta_culvert_label_scrape_interval": "1s", "env": "prod",
		}
		for i := 0; i < len(more); i += 2 {
			l[more[i]] = more[i+1]
		}
		return l
	}
	all := func(connected string) []group {
		return []group{
			{[]string{"node.web-1"}, labels("node", connected, "instance", "node.web-1", "__scheme__", "http", "__metrics_path__", "/metrics")},
			{[]string{"snmp.web-1"}, labels("snmp", connected, "instance", "snmp.web-1", "__scheme__", "http", "__metrics_path__", "/snmp/a b",
				"__param_target", "10.0.0.1", "__param_module", "if",
				"__meta_culvert_label_env", "test", "__meta_culvert_label_job", "x", "env", "test")},
			{[]string{"tree.web-1"}, labels("tree", connected, "instance", "tree.web-1", "__scheme__", "http", "__metrics_path__", "/tree/")},
			{[]string{"agent.web-1"}, labels("agent", connected, "instance", "agent.web-1", "__scheme__", "http", "__metrics_path__", "/metrics")},
		}
	}
	wantGroups(t, p.discover("/clients"), []group{{[]string{"web-1"}, labels("", "true")}})
	wantGroups(t, p.discover("/targets"), all("true"))
	wantGroups(t, p.discover("/targets?mode=proxy"), all("true"))

	t.Run("path mode", func(t *testing.T) {
		for i, path := range []string{"/scrape/web-1/node/metrics", "/scrape/web-1/snmp/snmp/a b", "/scrape/web-1/tree/tree/", "/scrape/web-1/agent/metrics"} {
			want := all("true")[i]
			want.Targets, want.Labels["__metrics_path__"] = []string{"proxy.lan:8080"}, path
			wantGroups(t, p.discover("/targets?mode=path", "Host: proxy.lan:8080")[i:i+1], []group{want})
		}
	})
	t.Run("bad mode", func(t *testing.T) {
		if a := p.get("/targets?mode=other"); a.code != 400 {
			t.Errorf("got %d", a.code)
		}
	})
	t.Run("a lost agent stays, and says so", func(t *testing.T) {
		s.Close()
		p.logs.wait(t, "Agent lost")
		wantGroups(t, p.discover("/targets"), all("false"))
		wantGroups(t, p.discover("/clients"), []group{{[]string{"web-1"}, labels("", "false")}})
	})
	t.Run("what was declared can be scraped as listed", func(t *testing.T) {
		base, _ := newTarget(t, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.RequestURI()) })
		newAgent(t, p, func(c *agent.Config) {
			c.Name = "listed"
			c.Targets = []agent.Target{
				{Name: "blank", URL: base + "/a%20b/m?x=1"},
				{Name: "signs", URL: base + "/a(b)!'c/*x"},
				{Name: "slash", URL: base + "/tree/*"},
				{Name: "star", URL: base + "/metrics*"},
				{Name: "list", URL: base + "/federate?match[]=a&match[]=b"},
			}
		})
		for _, mode := range []string{"proxy", "path"} {
			for _, g := range p.discover("/targets?mode=" + mode + "&match[]={__meta_culvert_agent=\"listed\"}") {
				// As Prometheus puts the URL together.
				u := &url.URL{Scheme: g.Labels["__scheme__"], Host: g.Targets[0], Path: g.Labels["__metrics_path__"]}
				query := url.Values{}
				for name, value := range g.Labels {
					if param, ok := strings.CutPrefix(name, "__param_"); ok {
						query.Set(param, value)
					}
				}
				u.RawQuery = query.Encode()
				target := u.String()
				if mode == "path" {
					target = u.RequestURI()
				}
				if a := p.get(target); a.code != 200 {
					t.Errorf("%s: got %d %s", target, a.code, a.reason)
				}
			}
		}
	})
}

// TestDiscoveryLabelNames: one agent's declaration must not spoil the list for
// all. Prometheus 2 refuses a list as a whole for one label name that isn't
// letters, digits and underscores.
func TestDiscoveryLabelNames(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	register(t, p, "web-1", "1", protocol.Registration{Targets: []protocol.Target{
		{Name: "federate", Path: "/federate", Params: map[string][]string{"match[]": {"{job=\"x\"}"}, "": {"x"}, "a b": {"1"}, "ok": {"1"}}},
	}})
	for _, g := range p.discover("/targets") {
		for name := range g.Labels {
			if !model.LegacyValidation.IsValidLabelName(name) {
				t.Errorf("label name %q of %s", name, g.Targets[0])
			}
		}
	}
}

// TestExternalURL: path mode's addresses are those of --web.external-url.
func TestExternalURL(t *testing.T) {
	t.Parallel()
	external, _ := url.Parse("https://Culvert.example.net/base/")
	p := newProxy(t, func(c *server.Config) { c.ExternalURL = external })
	register(t, p, "web-1", "1", protocol.Registration{})
	g := p.discover("/targets?mode=path")[0]
	if g.Targets[0] != "Culvert.example.net" || g.Labels["__scheme__"] != "https" || g.Labels["__metrics_path__"] != "/base/scrape/web-1/agent/metrics" ||
		g.Labels["instance"] != "agent.web-1" {
		t.Errorf("got %+v", g)
	}
}

// TestMatch selects by label.
func TestMatch(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	for name, env := range map[string]string{"a": "prod", "b": "test", "c": ""} {
		reg := protocol.Registration{Targets: []protocol.Target{target("node"), {Name: "db", Path: "/", Labels: map[string]string{"role": "db"}}}}
		if env != "" {
			reg.Labels = map[string]string{"env": env}
		}
		register(t, p, name, "1", reg)
	}
	for _, c := range []struct {
		query string
		want  string // "bad" for 400
	}{
		{`{env="prod"}`, "node.a db.a agent.a"},
		{`{__meta_culvert_label_env="prod"}`, "node.a db.a agent.a"},
		{`{env=~"prod|test",__meta_culvert_target="node"}`, "node.a node.b"},
		{`{env!="prod",__meta_culvert_target="agent"}`, "agent.b agent.c"},
		{`{env="",__meta_culvert_target="agent"}`, "agent.c"},
		{`{role="db"}`, "db.a db.b db.c"},
		{`{__meta_culvert_connected="true",instance="db.b"}`, "db.b"},
		{`{env="prod"}&match[]={env="test"}`, "node.a db.a agent.a node.b db.b agent.b"},
		{`{env="nowhere"}`, ""},
		{`{env=`, "bad"},
		{``, "bad"},
		{`{env=~"("}`, "bad"},
		{`sum(up)`, "bad"},
	} {
		t.Run(c.query, func(t *testing.T) {
			parts := strings.Split(c.query, "&match[]=")
			for i := range parts {
				parts[i] = "match[]=" + url.QueryEscape(parts[i])
			}
			query := "?" + strings.Join(parts, "&")
			if c.want == "bad" {
				if a := p.get("/targets" + query); a.code != 400 || !strings.Contains(a.body, "match[]") {
					t.Errorf("got %d %s", a.code, a.body)
				}
				return
			}
			if got := strings.Join(p.names(query), " "); got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
	if got := p.discover("/clients?match[]=" + url.QueryEscape(`{env="test"}`)); len(got) != 1 || got[0].Targets[0] != "b" {
		t.Errorf("/clients: %v", got)
	}
}

// TestPromoteLabels: what a configuration may not promote.
func TestPromoteLabels(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"job", "instance", "__scrape_interval__", "__address__", "a-b", `""`} {
		_, err := server.ParseSettings([]byte("discovery:\n  promote_labels: [env, " + name + "]\n"))
		if err == nil || !strings.Contains(err.Error(), "promote_labels") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := server.ParseSettings([]byte("discovery:\n  promote: [env]\n")); err == nil || !strings.HasSuffix(err.Error(), "line 2: field promote not found here: correct its name or its place") {
		t.Errorf("an unknown field: got %v", err)
	}
}

// TestReload reads the configuration anew; a bad file keeps the old one.
func TestReload(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "proxy.yml")
	write := func(text string) { os.WriteFile(file, []byte(text), 0o600) }
	write("")
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file })
	register(t, p, "web-1", "1", protocol.Registration{Labels: map[string]string{"env": "prod"}})
	env := func() string { return p.discover("/clients")[0].Labels["env"] }
	if got := env(); got != "" {
		t.Errorf("env=%q", got)
	}
	write("discovery: {promote_labels: [env]}")
	if a := p.send("POST", "/-/reload"); a.code != 200 || env() != "prod" {
		t.Errorf("%d, env=%q", a.code, env())
	}
	write("discovery: {promote_labels: [job]}")
	if a := p.send("PUT", "/-/reload"); a.code != 500 || !strings.Contains(a.body, "job") || env() != "prod" {
		t.Errorf("%d %s, env=%q", a.code, a.body, env())
	}
	p.get("/metrics").ok(t, "culvert_proxy_config_last_reload_successful 0")
	if a := p.get("/-/reload"); a.code != 405 {
		t.Errorf("GET: %d", a.code)
	}
}

// TestSettle: without a stored list the list is not to be trusted for a while.
func TestSettle(t *testing.T) {
	t.Parallel()
	unsettled := func(t *testing.T, p *testProxy) {
		t.Helper()
		for _, path := range []string{"/clients", "/targets", "/targets?mode=path"} {
			a := p.get(path)
			if a.code != 503 || a.header.Get("Retry-After") == "" || !strings.Contains(a.body, "--agent.settle-time") {
				t.Errorf("%s: got %d %v %s", path, a.code, a.header, a.body)
			}
		}
	}
	settle := func(d time.Duration, storage string) func(*server.Config) {
		return func(c *server.Config) { c.Fleet.SettleTime, c.StoragePath = d, storage }
	}
	t.Run("time passes", func(t *testing.T) {
		t.Parallel()
		p := newProxy(t, settle(500*time.Millisecond, ""))
		unsettled(t, p)
		eventually(t, "the list", func() bool { return p.get("/targets").code == 200 })
	})
	t.Run("agents came, and no new ones", func(t *testing.T) {
		t.Parallel()
		p := newProxy(t, settle(3*time.Second, ""))
		start := time.Now()
		register(t, p, "web-1", "1", protocol.Registration{})
		unsettled(t, p)
		eventually(t, "the list", func() bool { return p.get("/targets").code == 200 })
		if took := time.Since(start); took > 2500*time.Millisecond {
			t.Errorf("it took %s", took)
		}
	})
	t.Run("empty storage", func(t *testing.T) {
		t.Parallel()
		unsettled(t, newProxy(t, settle(time.Hour, t.TempDir())))
	})
	t.Run("a stored list", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		first := newProxy(t, settle(-1, dir))
		register(t, first, "web-1", "1", protocol.Registration{}).Close()
		first.logs.wait(t, "Agent lost")
		first.stop()
		p := newProxy(t, settle(time.Hour, dir))
		if got := p.names(""); !slices.Equal(got, []string{"agent.web-1"}) {
			t.Errorf("got %v", got)
		}
	})
	t.Run("a start that ended before the list had settled", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		first := newProxy(t, settle(time.Hour, dir))
		unsettled(t, first)
		first.stop() // before any agent came: nothing was stored that could be trusted
		unsettled(t, newProxy(t, settle(time.Hour, dir)))
	})
	t.Run("a start that ended while agents came back", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		first := newProxy(t, settle(time.Hour, dir))
		s := register(t, first, "web-1", "1", protocol.Registration{})
		unsettled(t, first)
		s.Close()
		first.logs.wait(t, "Agent lost")
		first.stop() // one of many was back
		unsettled(t, newProxy(t, settle(time.Hour, dir)))
	})
}

// TestRestart: lost agents survive a restart of the proxy, with all that
// discovery says of them.
func TestRestart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	storage := func(c *server.Config) { c.StoragePath = dir; c.ReconnectWait = -1 }
	first := newProxy(t, storage)
	base, _ := newTarget(t, nil)
	tweak := func(c *agent.Config) {
		c.Targets = []agent.Target{{Name: "node", URL: base, Labels: map[string]string{"role": "web"}}}
		c.Hosts = []agent.Host{{Name: "db.lan", Address: "127.0.0.1"}, {Name: "*.rome.lan"}}
		c.Labels = map[string]string{"env": "prod"}
	}
	newAgent(t, first, tweak).stop()
	s := register(t, first, "left", "1", protocol.Registration{})
	s.Leave(t.Context())
	before := first.discover("/targets")
	seen, lost := first.agent("web-1").FirstSeen, first.agent("web-1").Since
	first.stop()

	p := newProxy(t, storage)
	wantGroups(t, p.discover("/targets"), before)
	if len(before) != 2 || before[0].Labels["__meta_culvert_connected"] != "false" {
		t.Errorf("got %v", before)
	}
	info := p.agent("web-1")
	if !info.FirstSeen.Equal(seen) || !info.Since.Equal(lost) || info.Connected {
		t.Errorf("got %+v, want first seen %s, lost %s", info, seen, lost)
	}
	for _, name := range []string{"web-1:9100", "node.web-1", "db.lan:9100", "x.rome.lan:9100"} {
		p.get("http://"+name+"/metrics").refused(t, 503, protocol.CodeAgentOffline)
	}
	p.get("http://left/metrics").refused(t, 404, protocol.CodeUnknownAgent)
	wantRefusal(t, dial(t, p, "db.lan", "2").Register(t.Context(), &protocol.Registration{}), 409, protocol.CodeCollision)
	newAgent(t, p, tweak)
	p.get("http://node.web-1/metrics").ok(t, "up 1")
}

// TestForgetAfter: lost agents are forgotten in time; connected ones never.
func TestForgetAfter(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	tweak := func(c *server.Config) { c.StoragePath, c.Fleet.ForgetAfter = dir, 200*time.Millisecond }
	p := newProxy(t, tweak)
	stays := register(t, p, "stays", "1", protocol.Registration{})
	register(t, p, "goes", "1", protocol.Registration{Hosts: []string{"db.lan"}}).Close()
	p.logs.wait(t, "Agent forgotten", "agent=goes")
	p.get("http://db.lan/").refused(t, 404, protocol.CodeUnknownAgent)
	if a := p.get("/api/v1/agents"); strings.Contains(a.body, "goes") || !strings.Contains(a.body, "stays") {
		t.Errorf("got %s", a.body)
	}
	stays.Close()
	p.stop()
	again := newProxy(t, func(c *server.Config) { tweak(c); c.Fleet.ForgetAfter = time.Hour })
	if got := again.names(""); !slices.Equal(got, []string{"agent.stays"}) {
		t.Errorf("after a restart: %v", got)
	}
}

// TestForget: an operator removes an agent at once; a running one comes back.
func TestForget(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := newProxy(t, func(c *server.Config) { c.StoragePath = dir })
	register(t, p, "gone", "1", protocol.Registration{Hosts: []string{"db.lan"}}).Close()
	p.logs.wait(t, "Agent lost")
	for _, c := range []struct {
		path string
		code int
	}{{"/api/v1/agents/GONE.", 204}, {"/api/v1/agents/gone", 404}, {"/api/v1/agents/nobody", 404}} {
		if a := p.send("DELETE", c.path); a.code != c.code {
			t.Errorf("%s: got %d %s", c.path, a.code, a.body)
		}
	}
	p.get("http://db.lan/").refused(t, 404, protocol.CodeUnknownAgent)
	a := newAgent(t, p, nil)
	if d := p.send("DELETE", "/api/v1/agents/web-1"); d.code != 204 {
		t.Errorf("got %d", d.code)
	}
	a.logs.waitN(t, 2, "msg=Connected")
	p.get("http://agent.web-1/metrics").ok(t, "culvert_client_connected")
	a.stop()
	p.send("DELETE", "/api/v1/agents/web-1")
	p.stop()
	if got := newProxy(t, func(c *server.Config) { c.StoragePath = dir }).names(""); len(got) != 0 {
		t.Errorf("after a restart: %v", got)
	}
}

// TestDamagedStorage: the proxy starts without its list, says so, and leaves the
// file as it is.
func TestDamagedStorage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "fleet.db")
	garbage := []byte(strings.Repeat("garbage ", 10_000))
	os.WriteFile(file, garbage, 0o600)
	p := newProxy(t, func(c *server.Config) { c.StoragePath, c.Fleet.SettleTime = dir, time.Hour })
	p.logs.wait(t, "level=ERROR", "fleet.db", "move it away")
	if a := p.get("/targets"); a.code != 503 {
		t.Errorf("without its list: %d", a.code)
	}
	_, port := newTarget(t, nil)
	newAgent(t, p, allowAll)
	p.get("http://web-1:"+port+"/metrics").ok(t, "up 1")
	p.get("/metrics").ok(t, "culvert_proxy_fleet_stored 0")
	p.get("/-/ready").ok(t, "OK")
	p.stop()
	if now, err := os.ReadFile(file); err != nil || string(now) != string(garbage) {
		t.Errorf("the file was changed: %d bytes, %v", len(now), err)
	}
}

// TestSharedStorage: two proxies with one directory is a mistake, and says so.
func TestSharedStorage(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	newProxy(t, func(c *server.Config) { c.StoragePath = dir })
	_, err := server.New(server.Config{StoragePath: dir})
	if !errors.Is(err, fleet.ErrInUse) || !strings.Contains(err.Error(), "--storage.path") || !strings.Contains(err.Error(), dir) {
		t.Errorf("got %v", err)
	}
}

// TestListenErrors name the address.
func TestListenErrors(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	for name, config := range map[string]server.Config{
		"main":   {ListenAddresses: []string{"127.0.0.1:0", p.addr}},
		"agents": {ListenAddresses: []string{"127.0.0.1:0"}, AgentListenAddresses: []string{p.addr}},
	} {
		s, err := server.New(config)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Listen(); err == nil || !strings.Contains(err.Error(), p.addr) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
