package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
)

// load parses a command line and a configuration file's text.
func load(t *testing.T, text string, args ...string) (*settings, error) {
	t.Helper()
	if text != "" {
		path := filepath.Join(t.TempDir(), "client.yml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config.file="+path)
	}
	f, command, err := parseFlags(args)
	if err != nil {
		return nil, err
	}
	if command != "agent" {
		t.Fatalf("command %q without being asked for", command)
	}
	return f.load()
}

func TestLoadJoinsFlagsAndFile(t *testing.T) {
	s, err := load(t, `
proxy_urls: [http://b:8080]
fqdn: from-file
labels: {env: prod, rack: "7"}
allow: [9100, 9200-9299]
hosts: ["*.berlin.lan", {name: db-2.lan, address: 10.0.0.7}, c=10.0.0.8]
targets:
  - name: router
    url: https://10.0.0.1/metrics
    labels: {floor: "2"}
    basic_auth: {username: u, password: p}
retry_initial_wait: 2s
retry_max_wait: 7s
metrics_address: ""
local_host: 127.0.0.1
scrape: {allow_addresses: [169.254.0.0/16, "fe80::1"], max_concurrent: 9, max_body_size: 1MiB}
connect: {max_concurrent: 0}
textfile: {directories: [/b/*, c], max_age: 1d, max_file_size: 1MiB}
storage_path: state
push: {listen_addresses: ["127.0.0.1:9091", "unix:p.sock"], relay: first, spool_max_bytes: 1GiB, max_body_size: 1000}
`, "--scrape.allow-address=127.0.0.1", "--scrape.max-concurrent=7", "--push.listen-address=unix:/run/a.sock", "--push.spool-max-bytes=2GiB", "--textfile.directory=/a", "--textfile.max-file-size=2MiB", "--proxy-url=http://a:8080", "--fqdn=from-flag", "--label=env=test", "--allow=1-5,7", "--target=node=http://localhost:9100", "--host=x.lan", "--proxy.retry.max-wait=9s")
	if err != nil {
		t.Fatal(err)
	}
	c := s.Agent
	if strings.Join(c.ProxyURLs, " ") != "http://a:8080 http://b:8080" || c.Name != "from-flag" || c.LocalHost != "127.0.0.1" || s.MetricsAddress != "" {
		t.Errorf("got %+v", c)
	}
	if c.Labels["env"] != "test" || c.Labels["rack"] != "7" {
		t.Errorf("labels %v", c.Labels)
	}
	if len(c.Allow) != 4 || c.Allow[0] != (agent.PortRange{First: 1, Last: 5}) || c.Allow[3] != (agent.PortRange{First: 9200, Last: 9299}) {
		t.Errorf("allow %v", c.Allow)
	}
	if len(c.Hosts) != 4 || c.Hosts[0].Name != "x.lan" || c.Hosts[2] != (agent.Host{Name: "db-2.lan", Address: "10.0.0.7"}) || c.Hosts[3].Address != "10.0.0.8" {
		t.Errorf("hosts %v", c.Hosts)
	}
	if len(c.Targets) != 2 || c.Targets[1].HTTP.BasicAuth.Username != "u" || !c.Targets[1].HTTP.FollowRedirects {
		t.Errorf("targets %+v", c.Targets)
	}
	if fmt.Sprint(c.AllowAddresses) != "[127.0.0.1/32 169.254.0.0/16 fe80::1/128]" || c.MaxConcurrent != 7 || c.MaxTunnels != -1 || c.MaxBodySize != 1<<20 {
		t.Errorf("scrapes: %v, %d, %d, %d", c.AllowAddresses, c.MaxConcurrent, c.MaxTunnels, c.MaxBodySize)
	}
	if c.RetryInitialWait != 2*time.Second || c.RetryMaxWait != 9*time.Second {
		t.Errorf("waits %s %s", c.RetryInitialWait, c.RetryMaxWait)
	}
	if d := c.Textfile.Directories; len(d) != 3 || d[0] != "/a" || d[1] != "/b/*" || !filepath.IsAbs(d[2]) || filepath.Base(d[2]) != "c" {
		t.Errorf("textfile directories %q", d)
	}
	if c.Textfile.MaxAge != 24*time.Hour || c.Textfile.MaxFileSize != 2<<20 {
		t.Errorf("textfiles: %+v", c.Textfile)
	}
	if p := c.Push; len(p.ListenAddresses) != 3 || p.ListenAddresses[0] != "unix:/run/a.sock" || p.ListenAddresses[1] != "127.0.0.1:9091" ||
		!filepath.IsAbs(strings.TrimPrefix(p.ListenAddresses[2], "unix:")) || !filepath.IsAbs(p.StoragePath) || filepath.Base(p.StoragePath) != "state" ||
		p.Relay != agent.RelayFirst || p.SpoolMaxBytes != 2<<30 || p.MaxBodySize != 1000 {
		t.Errorf("pushes: %+v", p)
	}
	if _, err := agent.New(c); err != nil {
		t.Error(err)
	}
}

func TestLoadErrors(t *testing.T) {
	for _, test := range []struct{ text, flag, want string }{
		{"no_such: 1", "", "no_such"},
		{"allow: [70000]", "", "70000"},
		{"allow: [{a: 1}]", "", "PORT-PORT"},
		{"targets: [{name: a, url: 'http://x', basic_auth: {}, oauth3: {}}]", "", "oauth3"},
		{"log_level: loud", "", "log_level"},
		{"textfile: {max_file_size: big}", "", `"big"`},
		{"", "--textfile.max-age=-1s", "-1s"},
		{"push: {spool_max_bytes: big}", "", `"big"`},
		{"", "--push.relay=some", "some"},
		{"", "--scrape.allow-address=evil.test", "evil.test"},
		{"scrape: {allow_addresses: [1.2.3.4/40]}", "", "1.2.3.4/40"},
		{"scrape: {max_concurrent: -1}", "", "--scrape.max-concurrent"},
		{"scrape: {max_body_size: big}", "", `"big"`},
		{"", "--connect.max-concurrent=-1", "--connect.max-concurrent"},
		{"", "--runtime.gomaxprocs=0", "--runtime.gomaxprocs"},
		{"tls_config: {ca_file: nowhere.pem}", "", "nowhere.pem"},
		{"", "--config.file=nowhere.yml", "nowhere.yml"},
		{"", "--allow=x", `"x"`},
		{"", "--allow=9-5", "9-5"},
		{"", "--allow=0", `"0"`},
		{"", "--target=node", "NAME=URL"},
		{"", "--tls.cert=only.pem", "key"},
	} {
		args := []string{"--proxy-url=http://a:8080"}
		if test.flag != "" {
			args = append(args, test.flag)
		}
		if _, err := load(t, test.text, args...); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q %s: got %v, want an error with %q", test.text, test.flag, err, test.want)
		}
	}
}

// TestREADME keeps the README's table and its example of a configuration true.
func TestREADME(t *testing.T) {
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## culvert-client\n")
	section, _, _ = strings.Cut(section, "\n## ")
	if !ok {
		t.Fatal("README.md has no section culvert-client")
	}
	for _, flag := range new(flags).app().Model().Flags {
		if !flag.Hidden && !strings.Contains(section, "`--"+flag.Name+"`") {
			t.Errorf("README.md lacks --%s", flag.Name)
		}
	}
	for _, command := range new(flags).app().Model().Commands {
		if command.Name != "run" && command.Name != "push" {
			continue
		}
		for _, flag := range command.Flags {
			if !flag.Hidden && !strings.Contains(string(text), "`--"+flag.Name) {
				t.Errorf("README.md lacks --%s of %s", flag.Name, command.Name)
			}
		}
	}
	_, example, _ := strings.Cut(section, "```yaml\n")
	example, _, _ = strings.Cut(example, "```")
	c, err := parseFile([]byte(example), t.TempDir())
	if err != nil {
		t.Fatalf("the README's example: %v\n%s", err, example)
	}
	if len(c.Targets) != 1 || c.Targets[0].HTTP.BasicAuth == nil || len(c.Hosts) != 2 {
		t.Errorf("the README's example reads as %+v", c)
	}
}
