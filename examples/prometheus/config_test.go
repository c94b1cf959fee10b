// Package prometheus has configurations of Prometheus to copy from.
package prometheus

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// TestConfigs has promtool check every configuration in this folder.
func TestConfigs(t *testing.T) {
	promtool := externaltest.Program(t, "promtool", "prometheus")
	files, err := filepath.Glob("*.yml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no configurations: %v", err)
	}
	for _, file := range files {
		t.Run(file, func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			// https.yml names a file that only its users have.
			dir := t.TempDir()
			for name, content := range map[string][]byte{file: text, "exporters-ca.pem": nil} {
				if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if out, err := exec.CommandContext(t.Context(), promtool, "check", "config", filepath.Join(dir, file)).CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
}
