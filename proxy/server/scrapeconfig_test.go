package server_test

import (
	"fmt"
	"net/url"
	"strings"
	"testing"

	"go.yaml.in/yaml/v2"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/proxy/server"
)

// scrapeJobs asks for a configuration and reads it.
func scrapeJobs(t *testing.T, p *testProxy, path string, header ...string) map[string]map[string]any {
	t.Helper()
	a := p.get(path, header...)
	if a.code != 200 || a.header.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Fatalf("%d %v %s", a.code, a.header, a.body)
	}
	var config struct {
		Jobs []map[string]any `yaml:"scrape_configs"`
	}
	if err := yaml.UnmarshalStrict([]byte(a.body), &config); err != nil {
		t.Fatalf("%v\n%s", err, a.body)
	}
	jobs := map[string]map[string]any{}
	for _, job := range config.Jobs {
		name := job["job_name"].(string)
		if jobs[name] != nil {
			t.Errorf("two jobs are called %q:\n%s", name, a.body)
		}
		jobs[name] = job
	}
	return jobs
}

// TestScrapeConfigAddresses: the jobs lead where Prometheus finds the proxy.
func TestScrapeConfigAddresses(t *testing.T) {
	t.Parallel()
	external, _ := url.Parse("https://culvert.example.net/x/")
	file := newRolesFile(t, everyRole())
	for _, c := range []struct {
		what        string
		tweak       func(*server.Config)
		prefix      string
		header      []string
		proxy, list string
		own         string
	}{
		{"by the request's host", nil, "", []string{"Host: prom-sees:8080"}, "http://prom-sees:8080", "http://prom-sees:8080/targets", "[map[targets:[prom-sees:8080]]] <nil> <nil> <nil>"},
		{"by the external URL", func(c *server.Config) { c.ExternalURL, c.RoutePrefix = external, "/y" }, "/y", nil,
			"https://culvert.example.net", "https://culvert.example.net/x/targets", "[map[targets:[culvert.example.net]]] https /x/metrics <nil>"},
		{"with a prefix and another telemetry path", func(c *server.Config) { c.RoutePrefix, c.TelemetryPath = "/y", "/m" }, "/y", []string{"Host: a"},
			"http://a", "http://a/y/targets", "[map[targets:[a]]] <nil> /y/m <nil>"},
		{"with roles", func(c *server.Config) { c.ConfigFile = file.path }, "", []string{"Host: a", "Authorization: " + basic("prom", "secret")},
			"http://USERNAME:PASSWORD@a", "http://a/targets", "[map[targets:[a]]] <nil> <nil> map[password:PASSWORD username:USERNAME]"},
	} {
		p := newProxy(t, c.tweak)
		jobs := scrapeJobs(t, p, c.prefix+"/api/v1/scrape_config", c.header...)
		targets := jobs["culvert-targets"]
		if got := targets["proxy_url"]; got != c.proxy {
			t.Errorf("%s: proxy_url is %v", c.what, got)
		}
		if got := fmt.Sprint(targets["http_sd_configs"]); !strings.Contains(got, "url:"+c.list) || strings.Contains(got, "USERNAME") != (c.what == "with roles") {
			t.Errorf("%s: http_sd_configs are %v", c.what, got)
		}
		own := jobs["culvert-proxy"]
		if got := fmt.Sprint(own["static_configs"], " ", own["scheme"], " ", own["metrics_path"], " ", own["basic_auth"]); got != c.own || own["honor_labels"] != true || len(jobs) != 2 {
			t.Errorf("%s: of the proxy itself: %s; %d jobs", c.what, got, len(jobs))
		}
	}
}

// TestScrapeConfigAccess: ports of agents are for who may scrape them.
func TestScrapeConfigAccess(t *testing.T) {
	t.Parallel()
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile = file.path })
	_, port := newTarget(t, nil)
	newAgent(t, p, func(c *agent.Config) {
		c.Name, c.TokenFile = "web-1.example.net", tokenFile(t, "agent")
		allowAll(c)
	})
	prom, other := "Authorization: "+basic("prom", "secret"), "Authorization: Bearer scraper2"
	for _, target := range []string{"http://web-1.example.net:" + port + "/metrics", "http://WEB-1.example.net.:" + port + "/metrics", "http://web-1.example.net:" + port + "/probe?target=x"} {
		p.get(target, "Proxy-"+prom).ok(t, "up 1")
	}
	eventually(t, "the port is listed", func() bool {
		return fmt.Sprint(scrapeJobs(t, p, "/api/v1/scrape_config", prom)["port-"+port]["static_configs"]) != "<nil>"
	})
	if jobs := scrapeJobs(t, p, "/api/v1/scrape_config", other); len(jobs) != 2 {
		t.Errorf("who may not scrape it is told %v", jobs)
	}
	jobs := scrapeJobs(t, p, "/api/v1/scrape_config?port="+port+"&port=9100", prom)
	if fmt.Sprint(jobs["port-"+port]["static_configs"]) != "<nil>" || !strings.Contains(fmt.Sprint(jobs["port-9100"]["relabel_configs"]), "$1:9100") || len(jobs) != 4 {
		t.Errorf("got %v", jobs)
	}
}

// TestScrapeConfigPaths: each path that answered is a job, of a name of its own.
func TestScrapeConfigPaths(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	_, port := newTarget(t, nil)
	newAgent(t, p, allowAll)
	for _, path := range []string{"", "/", "/metrics", "/metrics/", "/a/b", "/a-b", "/%3Ca%3E%23"} {
		p.get("http://web-1:"+port+path).ok(t, "up 1")
	}
	eventually(t, "all paths are listed", func() bool { return len(scrapeJobs(t, p, "/api/v1/scrape_config")) == 2+6 })
	jobs := scrapeJobs(t, p, "/api/v1/scrape_config")
	for name, path := range map[string]any{"": nil, "/": "/", "/metrics/": "/metrics/", "/a/b": "/a/b", "/a-b": "/a-b", "/<a>#": "/<a>#"} {
		if job := jobs["port-"+port+name]; job == nil || job["metrics_path"] != path {
			t.Errorf("port-%s%s: %v", port, name, job)
		}
	}
}
