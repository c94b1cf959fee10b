// Package systemd has units for both programs, as the packages install them.
package systemd

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// maxExposure is ten times the score that systemd may give, of 0 to 10. That of Debian 12
// (252) gives 1.1, as the README says; newer ones look at more.
const maxExposure = "15"

var programs = []string{"proxy", "client"}

// bin has the programs, as /usr/bin would.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "culvert-systemd-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		bin = dir
		for _, kind := range programs {
			if out, err := exec.Command("go", "build", "-o", program(kind), "../../"+kind).CombinedOutput(); err != nil {
				fmt.Fprintf(os.Stderr, "%v\n%s", err, out)
				return 1
			}
		}
		return m.Run()
	}())
}

func program(kind string) string { return filepath.Join(bin, "culvert-"+kind) }

// TestUnits has systemd check the units, and say how much they shut in.
func TestUnits(t *testing.T) {
	analyze := externaltest.Program(t, "systemd-analyze", "systemd")
	for _, kind := range programs {
		t.Run(kind, func(t *testing.T) {
			name := "culvert-" + kind + ".service"
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			unit := filepath.Join(t.TempDir(), name)
			if err := os.WriteFile(unit, []byte(strings.ReplaceAll(string(text), "/usr/bin/culvert-"+kind, program(kind))), 0o644); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command(analyze, "verify", "--man=no", unit).CombinedOutput()
			for line := range strings.Lines(string(out)) {
				// Units of the system that runs the test may have their own faults.
				if strings.Contains(line, name) && !unknownBefore254.MatchString(line) {
					t.Error(line)
				}
			}
			if err != nil {
				t.Errorf("systemd-analyze verify: %v\n%s", err, out)
			}
			out, err = exec.Command(analyze, "security", "--offline=true", "--no-pager", "--threshold="+maxExposure, unit).CombinedOutput()
			if err != nil {
				t.Errorf("systemd-analyze security: %v\n%s", err, out)
			}
			t.Log(regexp.MustCompile(`Overall exposure level.*`).FindString(string(out)))
		})
	}
}

// unknownBefore254 are the warnings of an older systemd about two names that it doesn't know.
var unknownBefore254 = regexp.MustCompile(`Unknown key '(RestartSteps|RestartMaxDelaySec)'`)

// TestSysusers has systemd make the users.
func TestSysusers(t *testing.T) {
	sysusers := externaltest.Program(t, "systemd-sysusers", "systemd")
	for _, kind := range programs {
		path, err := filepath.Abs("culvert-" + kind + ".sysusers")
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(sysusers, "--root="+t.TempDir(), "--dry-run", path).CombinedOutput(); err != nil || !strings.Contains(string(out), "culvert-"+kind) {
			t.Errorf("%s: %v\n%s", path, err, out)
		}
	}
}

// TestConfiguration has the programs read their configuration, as it stands and with what is
// commented out.
func TestConfiguration(t *testing.T) {
	for _, kind := range programs {
		t.Run(kind, func(t *testing.T) {
			text, err := os.ReadFile(kind + ".yml")
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			for name, text := range map[string]string{
				"plain.yml": string(text),
				"all.yml":   regexp.MustCompile(`(?m)^#([^ ]|  )`).ReplaceAllString(string(text), "$1"),
				// What the comments name.
				"prometheus.password": "p", "admin.password": "a", "agent.token": strings.Repeat("t", 32), "tokens.yml": "[]",
			} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			path := program(kind)
			if kind == "proxy" {
				for _, config := range []string{"plain.yml", "all.yml"} {
					// What can't be listened on is found out after the configuration was read.
					out, err := exec.Command(path, "--config.file="+filepath.Join(dir, config), "--storage.path=", "--web.listen-address=192.0.2.1:1").CombinedOutput()
					if err == nil || !strings.Contains(string(out), "192.0.2.1:1: bind") {
						t.Errorf("%s: %v\n%s", config, err, out)
					}
				}
				return
			}
			if out, err := exec.Command(path, "--config.file="+filepath.Join(dir, "plain.yml"), "check-config").CombinedOutput(); err == nil || !strings.Contains(string(out), "--proxy-url") {
				t.Errorf("a client without a proxy: %v\n%s", err, out)
			}
			if out, err := exec.Command(path, "--config.file="+filepath.Join(dir, "all.yml"), "check-config").CombinedOutput(); err != nil || !strings.Contains(string(out), "https://proxy.example.net:8080") {
				t.Errorf("all.yml: %v\n%s", err, out)
			}
		})
	}
}

// TestEnvironment has the programs take the flags of the environment files.
func TestEnvironment(t *testing.T) {
	for _, kind := range programs {
		text, err := os.ReadFile("culvert-" + kind + ".default")
		if err != nil {
			t.Fatal(err)
		}
		lines := regexp.MustCompile(`(?m)^#?ARGS=(".*")$`).FindAllStringSubmatch(string(text), -1)
		if len(lines) == 0 {
			t.Errorf("culvert-%s.default has no ARGS", kind)
		}
		path := program(kind)
		for _, line := range lines {
			var args string
			if err := json.Unmarshal([]byte(line[1]), &args); err != nil {
				t.Fatal(err)
			}
			// --version comes after all flags were read.
			if out, err := exec.Command(path, append(strings.Fields(args), "--version")...).CombinedOutput(); err != nil {
				t.Errorf("culvert-%s %s: %v\n%s", kind, args, err, out)
			}
		}
	}
}
