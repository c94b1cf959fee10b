package server_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v2"

	"github.com/culvert-io/culvert/proxy/server"
)

// FuzzSettings: no --config.file panics or takes long; one with a section roles never
// leaves everything open, and no label of an agent becomes one that would let it pass for
// another.
func FuzzSettings(f *testing.F) {
	f.Add("discovery: {promote_labels: [env, dc]}\npush: {rules: [{job: 'backup-.*', ttl: 30d, interval: 24h}]}\n")
	f.Add(everyRole())
	f.Add("roles: {agent_tokens: tokens.yml, scrapers: [{name: a, basic_auth: {username: b, password_file: secret}}]}")
	f.Add("a: &a {roles: {}}\n<<: *a\n")
	f.Add("discovery: {}\n---\nroles: {}\n")
	f.Add("roles: ~\n")
	f.Add("roles: !!null x\n")
	f.Add("push: {rules: [{job: '(a|b){1,1000}'}]}\ndiscovery: {promote_labels: [__name__, job]}\n")
	dir := f.TempDir()
	for name, text := range map[string]string{"secret": "0123456789abcdef", "tokens.yml": "- {name: t, token_hash: " + hashOf("t") + ", agents: ['*.example.net']}"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			f.Fatal(err)
		}
	}
	f.Fuzz(func(t *testing.T, text string) {
		settings, err := server.ParseSettings([]byte(text))
		if err != nil {
			return
		}
		for _, name := range settings.Discovery.PromoteLabels {
			if name == "job" || name == "instance" || strings.HasPrefix(name, "__") {
				t.Errorf("the label %q is promoted", name)
			}
		}
		roles, err := settings.Roles.Compile(dir)
		if err != nil {
			return
		}
		var sections map[string]any
		if err := yaml.Unmarshal([]byte(text), &sections); err != nil {
			t.Fatalf("the sections can't be read, and the settings can: %v", err)
		}
		if _, closed := sections["roles"]; closed && roles.Open() {
			t.Errorf("there is a section roles, and everything is open")
		}
	})
}
