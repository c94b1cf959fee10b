package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// check runs check-config with a configuration file of the text.
func check(t *testing.T, text string, args ...string) (file, out string, err error) {
	t.Helper()
	args = append([]string{"check-config"}, args...)
	if text != "" {
		file = filepath.Join(t.TempDir(), "client.yml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--config.file="+file)
	}
	f, command, err := parseFlags(args)
	if err != nil || command != "check-config" {
		t.Fatalf("%v: %q, %v", args, command, err)
	}
	var b strings.Builder
	err = checkConfig(&b, f)
	return file, b.String(), err
}

func TestCheckConfig(t *testing.T) {
	_, out, err := check(t, `
proxy_urls: ["https://u:secret@b:8443"]
labels: {env: prod}
allow: [9100, 9200-9299]
hosts: ["*.berlin.lan", {name: db-2.lan, address: 10.0.0.7}]
targets:
  - name: router
    url: https://10.0.0.1/metrics?module=if
    labels: {floor: "2"}
    basic_auth: {username: u, password: secret}
scrape: {allow_addresses: [169.254.7.7], max_concurrent: 9, max_body_size: 1MiB}
storage_path: /var/lib/culvert-client
push: {listen_addresses: ["unix:/run/p.sock"], relay: first}
`, "--push.listen-address=127.0.0.1:9091", "--fqdn=web-1", "--proxy-url=http://a:8080")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"agent web-1\n", `label __meta_culvert_label_env="prod"`, "proxy http://a:8080\n", "proxy https://u:xxxxx@b:8443\n",
		"allow port 9100\n", "allow ports 9200 to 9299\n", "host web-1, at localhost\n", "host *.berlin.lan\n", "host db-2.lan, at 10.0.0.7\n",
		`target http://router.web-1/metrics?module=if: https://10.0.0.1/metrics?module=if, with basic_auth, labels floor="2"`,
		"pushes on 127.0.0.1:9091\n", "pushes on unix:/run/p.sock\n",
		"pushes with an instance: kept in /var/lib/culvert-client, served by the target agent\n",
		"pushes without one: relayed to the first proxy that is connected, at most 256MiB wait in /var/lib/culvert-client\n",
		"allow names that lead to 169.254.7.7/32\n", "scrapes at most 9 at a time, responses of at most 1MiB; at most 512 CONNECT tunnels\n",
		"own metrics on :9369\n", "reconnects after at most 1s, growing to 5s\n",
	} {
		if plain := strings.ReplaceAll(strings.Join(strings.Fields(strings.ReplaceAll(out, "\n", " \x00 ")), " "), " \x00", "\n"); !strings.Contains(plain, want) {
			t.Errorf("%q is missing in:\n%s", want, out)
		}
	}
	if strings.Contains(out, "secret") {
		t.Errorf("a password is shown:\n%s", out)
	}
	if _, out, err := check(t, "", "--fqdn=web-1", "--proxy-url=http://a:8080", "--metrics-addr=", "--allow=all"); err != nil || !strings.Contains(out, "all ports") || !strings.Contains(out, "no address") {
		t.Errorf("%v\n%s", err, out)
	}
	if _, out, err := check(t, "", "--fqdn=web-1", "--proxy-url=http://a:8080"); err != nil || !strings.Contains(out, "allow ports with --allow=9100") {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestCheckConfigErrors(t *testing.T) {
	for _, c := range []struct {
		text string
		args []string
		want []string // FILE stands for the file's name
	}{
		{"alow: [9100]\nfqdn: a\nmetric_address: x\n", nil, []string{`FILE:1: "alow" is no field here; did you mean "allow"?`, `FILE:3: "metric_address" is no field here; did you mean "metrics_address"?`}},
		{"targets:\n  - name: a\n    basic_outh: {}\n", nil, []string{`FILE:3: "basic_outh" is no field here; did you mean "basic_auth"?`}},
		{"something: 1\n", nil, []string{`FILE:1: "something" is no field here; remove it`}},
		{"fqdn: a\nlabels: [a]\nlocal_host: {}\n", nil, []string{"FILE:2: a list stands here", "FILE:3: a map stands here"}},
		{"fqdn: [a\nallow: 1\n", nil, []string{"FILE:", "did not find expected"}},
		{"allow: [70000]\n", nil, []string{"70000"}},
		{"fqdn: a\n", nil, []string{"--proxy-url=http://"}},
		{"proxy_urls: [http://a]\ntls_config: {ca_file: nowhere.pem}\n", nil, []string{"nowhere.pem"}},
		{"proxy_urls: [http://a]\ntargets: [{name: a b, url: http://x}]\n", nil, []string{"a b"}},
		{"", []string{"--config.file=nowhere.yml"}, []string{"nowhere.yml"}},
		{"", []string{"--proxy-url=ftp://a"}, []string{"ftp"}},
		{"", []string{"--proxy-url=http://a", "--push.listen-address=127.0.0.1:9091"}, []string{"--storage.path=/var/lib"}},
		{"push: {listen_address: [x]}\n", nil, []string{`"listen_address" is no field here; did you mean "listen_addresses"?`}},
	} {
		file, out, err := check(t, c.text, c.args...)
		if err == nil || out != "" {
			t.Errorf("%q %v: no error, and:\n%s", c.text, c.args, out)
			continue
		}
		for _, want := range c.want {
			if want = strings.ReplaceAll(want, "FILE", file); !strings.Contains(err.Error(), want) {
				t.Errorf("%q %v: got %q, want %q", c.text, c.args, err, want)
			}
		}
	}
}

// TestDefaultCommand: without a command, flags are the agent's.
func TestDefaultCommand(t *testing.T) {
	for _, args := range [][]string{nil, {"--allow=9100"}, {"--proxy-url=http://a", "--target=run=http://b"}, {"agent", "--allow=9100"}} {
		if _, command, err := parseFlags(args); err != nil || command != "agent" {
			t.Errorf("%v: %q, %v", args, command, err)
		}
	}
}
