package main_test

import (
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// startNginx starts an nginx whose location / has the given directives beside
// proxy_pass to upstream, and returns its address.
func startNginx(t *testing.T, upstream, directives string) string {
	t.Helper()
	program := externaltest.Program(t, "nginx", "nginx")
	dir, address := t.TempDir(), externaltest.FreeAddress(t)
	temp := ""
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		temp += fmt.Sprintf("%s_temp_path %s/%s;\n", kind, dir, kind)
	}
	config := write(t, dir, "nginx.conf", fmt.Sprintf(`
daemon off; master_process off; pid %[1]s/pid; error_log stderr;
events { worker_connections 256; }
http {
	access_log off;
	%[2]s
	map $http_upgrade $connection_upgrade { default upgrade; '' close; }
	map $http_upgrade $only_websocket { default ''; websocket websocket; }
	map $http_upgrade $only_websocket_connection { default close; websocket upgrade; }
	server {
		listen %[3]s;
		location / { proxy_pass http://%[4]s; %[5]s }
	}
}`, dir, temp, address, upstream, directives))
	start(t, "nginx", program, "-p", dir, "-c", config)
	eventually(t, 10*time.Second, func() error {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err
	})
	return address
}

// TestAgentThroughNginx connects agents through an nginx in its usual
// configurations.
func TestAgentThroughNginx(t *testing.T) {
	t.Parallel()
	proxy := startProxy(t)
	exporter := serve(t, exposition("up 1\n"))
	for name, test := range map[string]struct{ directives, transport string }{
		"raw":             {`proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";`, "upgrade"},
		"raw-map":         {`proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_upgrade; proxy_set_header Host $host;`, "upgrade"},
		"websocket-only":  {`proxy_http_version 1.1; proxy_set_header Upgrade $only_websocket; proxy_set_header Connection $only_websocket_connection;`, "websocket"},
		"websocket-fixed": {`proxy_http_version 1.1; proxy_set_header Upgrade websocket; proxy_set_header Connection upgrade;`, "websocket"},
	} {
		t.Run(name, func(t *testing.T) {
			nginx := startNginx(t, proxy.address, test.directives)
			agent := startAgent(t, "http://"+nginx, name, "--allow="+port(t, exporter))
			if transport := agent.awaitLog(`msg=Connected .*transport=(\w+)`)[1]; transport != test.transport {
				t.Errorf("the transport is %s, want %s", transport, test.transport)
			}
			if err := expect(through(t, proxy.url, nil), "http://"+name+":"+port(t, exporter)+"/metrics", "10", "up 1\n"); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("neither", func(t *testing.T) {
		nginx := startNginx(t, proxy.address, "")
		if err := programs(); err != nil {
			t.Fatal(err)
		}
		agent := start(t, "culvert-client", programDir+"/culvert-client", "--proxy-url=http://"+nginx, "--fqdn=neither", "--metrics-addr=")
		agent.awaitLog(`level=WARN .*msg="Polling, .*no-upgrade.*nginx needs proxy_http_version 1.1, proxy_set_header Upgrade \$http_upgrade and proxy_set_header Connection`)
	})
}

// TestPrometheusThroughBalancer puts an nginx between Prometheus and the proxy. It
// rewrites the scrapes; the proxy's own metrics must not pass for the target's.
func TestPrometheusThroughBalancer(t *testing.T) {
	t.Parallel()
	proxy := startProxy(t)
	exporter := serve(t, exposition("exported 1\n"))
	startAgent(t, proxy.url, "web-1", "--allow="+port(t, exporter))
	var jobs strings.Builder
	configs := map[string]string{
		"default":   "",
		"host":      "proxy_set_header Host $host;",
		"http-host": "proxy_http_version 1.1; proxy_set_header Host $http_host;",
		"http-1-1":  "proxy_http_version 1.1;",
		"websocket": `proxy_http_version 1.1; proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection $connection_upgrade;`,
		"keepalive": `proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $http_host;`,
	}
	instance := "web-1:" + port(t, exporter)
	for name, directives := range configs {
		nginx := startNginx(t, proxy.address, directives)
		fmt.Fprintf(&jobs, "  - {job_name: %s, proxy_url: 'http://%s', static_configs: [{targets: ['%s']}]}\n", name, nginx, instance)
	}
	fmt.Fprintf(&jobs, "  - {job_name: straight, proxy_url: '%s', static_configs: [{targets: ['%s']}]}\n", proxy.url, instance)
	prometheus := startPrometheus(t, jobs.String())
	prometheus.awaitSample(`up{job="straight"}`, "1", time.Time{})
	for name := range configs {
		prometheus.awaitError(name, instance, "421 misdirected", "balancer")
		prometheus.awaitSample(fmt.Sprintf("up{job=%q}", name), "0", time.Time{})
		if foreign := prometheus.query(fmt.Sprintf("{job=%q,__name__=~\"culvert_.+|exported\"}", name)); len(foreign) > 0 {
			t.Errorf("%s: got series that are not the target's: %v", name, foreign)
		}
	}

	// Path mode and discovery are for balancers.
	nginx := startNginx(t, proxy.address, "")
	client := &http.Client{Timeout: 10 * time.Second}
	if err := expect(client, "http://"+nginx+"/scrape/web-1/"+port(t, exporter)+"/metrics", "10", "exported 1\n"); err != nil {
		t.Error(err)
	}
	if a := get(t, "http://"+nginx+"/clients"); !strings.Contains(a.body, `"web-1"`) {
		t.Errorf("/clients through nginx: %d %s", a.status, a.body)
	}
}
