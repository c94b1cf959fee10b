package main

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/client/agent"
)

// FuzzLoad has the command line, one argument in a line, and the configuration file be
// anything: what comes out is an error that says something, or a configuration that
// keeps to its rules.
func FuzzLoad(f *testing.F) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		f.Fatal(err)
	}
	_, section, _ := strings.Cut(string(readme), "\n## culvert-client\n")
	_, example, _ := strings.Cut(section, "```yaml\n")
	example, _, _ = strings.Cut(example, "```")
	f.Add(example, "--proxy-url=http://a:8080\n--allow=9100")
	f.Add("", "--proxy-url=https://u:p@a/base/\n--host=*.lan\n--host=db=10.0.0.7\n--target=node=http://localhost:9100/*\n--label=a=b\n--allow=1-5,all")
	f.Add("scrape: {allow_addresses: [169.254.0.0/16], max_concurrent: 1, max_body_size: 1MiB}\nconnect: {max_concurrent: 0}", "--scrape.allow-address=fe80::/10\n--scrape.max-body-size=0")
	f.Add("targets: [{name: a, url: 'http://x', authorization: {credentials: c}, http_headers: {X-A: {values: [b]}}}]\nhosts: [{name: a, address: '[::1]'}, b]", "check-config")
	f.Add("targets: [{name: a, url: 'http://x', oauth2: {client_id: i, client_secret: s, token_url: 'http://t', scopes: [x]}, proxy_url: 'http://p'}]", "doctor\n9100")
	f.Add("push: {listen_addresses: ['unix:p'], relay: first, spool_max_bytes: 1GiB}\nstorage_path: s\ntextfile: {directories: ['a/*'], max_age: 1d}\nlog_level: warn", "--log.format=json")
	f.Add("a: &a [*a]\n<<: {}\nlabels: {? [x] : y}\nallow: [1e3, 0x1F, ~, 2020-01-01]", "--\n-x\n--no-allow\n--allow")
	f.Add("", "run\n--job=j\n--grouping=a=b\n--interval=1h\n--\n./x\n-y")
	f.Add("", "push\n--job=j\n--method=post\n--ttl=1d\n-")
	f.Fuzz(func(t *testing.T, text, line string) {
		var args []string
		if line != "" {
			args = strings.Split(line, "\n")
		}
		for _, arg := range args {
			// What ends the process, or reads files that are not the fuzzer's.
			if strings.HasPrefix(arg, "@") || strings.HasPrefix(arg, "-h") || strings.HasPrefix(arg, "--help") || strings.HasPrefix(arg, "--version") ||
				strings.HasPrefix(arg, "--completion") || arg == "help" || strings.Contains(arg, "file") || strings.Contains(arg, "/dev/") {
				t.Skip()
			}
		}
		if strings.Contains(text, "/dev/") || strings.Contains(text, "/proc/") {
			t.Skip() // they may never end
		}
		path := filepath.Join(t.TempDir(), "client.yml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		args = append([]string{"--config.file=" + path}, args...)
		if !strings.Contains(line, "fqdn") {
			args = append([]string{"--fqdn=web-1"}, args...) // nobody is asked for the host's name
		}
		flags, command, err := parseFlags(args)
		if err != nil {
			if err.Error() == "" {
				t.Error("an error that says nothing")
			}
			return
		}
		if !slices.Contains([]string{"agent", "doctor", "leave", "check-config", "run", "push"}, command) {
			t.Errorf("command %q", command)
		}
		s, err := flags.load()
		if err != nil {
			if explain(path, err).Error() == "" {
				t.Error("an error that says nothing")
			}
			return
		}
		c := s.Agent
		for _, r := range c.Allow {
			if r.First == 0 || r.First > r.Last {
				t.Errorf("ports %v", r)
			}
		}
		for _, prefix := range c.AllowAddresses {
			if !prefix.IsValid() || prefix != prefix.Masked() {
				t.Errorf("addresses %v", prefix)
			}
		}
		if c.MaxConcurrent == 0 || c.MaxTunnels == 0 || c.MaxBodySize == 0 {
			t.Errorf("limits %d, %d, %d", c.MaxConcurrent, c.MaxTunnels, c.MaxBodySize)
		}
		if c.Name == "" {
			return
		}
		if _, err := agent.New(c); (err == nil) != (checkConfig(io.Discard, flags) == nil) {
			t.Errorf("check-config disagrees with the agent, which says %v", err)
		}
	})
}
