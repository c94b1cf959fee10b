//go:build unix

// Package examples has a test that goes over all examples.
package examples

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math/big"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/culvert-io/culvert/protocol/externaltest"
	"github.com/culvert-io/culvert/proxy/server"
)

// checks are the tools that read the files of the examples, by patterns of path.Match.
// The first that matches counts; a file that none matches fails the test.
var checks = []struct {
	pattern string
	check   func(t *testing.T, file string)
}{
	{"*/*_test.yml", promtool("test", "rules")},
	{"*/alerts.yml", promtool("check", "rules")},
	{"monitoring/prometheus.yml", promtool("check", "config")},
	{"monitoring/*.yml", promtool("check", "rules")},
	{"monitoring/dashboard.json", by("TestDashboard")},
	{"*/prometheus.yml", promtool("check", "config")},
	{"prometheus/*.yml", promtool("check", "config")},
	{"cluster/kubernetes/prometheus.yml", promtool("check", "config")},
	{"cluster/kubernetes/kustomization.yaml", kustomize},
	{"cluster/kubernetes/*.yaml", manifest},
	{"secure/web.yml", promtool("check", "web-config")},
	{"secure/culvert.yml", proxyConfig},
	{"secure/client.yml", clientConfig},
	{"batch/*.cron", crontab},
	{"batch/*.service", units},
	{"batch/*.timer", units},
	{"*/*.sh", tool("shellcheck", "shellcheck")},
	{"push/job.js", tool("node", "nodejs", "--check")},
	{"push/job.py", tool("python3", "python3", "-m", "py_compile")},
	{"push/package.json", tool("node", "nodejs", "--print", "JSON.parse(fs.readFileSync(process.argv[1])).dependencies['prom-client'].length")},
	{"docker/*.Dockerfile", by("TestImages")},
	{"kubernetes/*/*", by("TestManifests")},
	{"packages/copyright", by("TestDpkg")},
	{"packages/nfpm.yaml", by("TestDpkg")},
	{"packages/testdata/*.sh", tool("shellcheck", "shellcheck")},
	{"systemd/*.service", by("TestUnits")},
	{"systemd/*.sysusers", by("TestSysusers")},
	{"systemd/*.yml", by("TestConfiguration")},
	{"systemd/*.default", by("TestEnvironment")},
	{"push/testdata/client.js", by("TestNodeClient")},
	{"push/testdata/client.py", by("TestPythonClient")},
}

// TestExamples has a real tool read every configuration, rule, manifest, unit and script of
// the examples: those that somebody else's program reads, as that program does.
func TestExamples(t *testing.T) {
	dir := copyOfExamples(t)
	used := map[string]bool{}
	err := fs.WalkDir(os.DirFS("."), ".", func(file string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "node_modules" || d.Name() == "__pycache__"):
			return fs.SkipDir
		case d.IsDir() || slices.Contains([]string{".go", ".mod", ".sum"}, path.Ext(file)) || strings.HasPrefix(d.Name(), ".") || d.Name() == "package-lock.json":
			return nil
		}
		for _, c := range checks {
			match, err := path.Match(c.pattern, file)
			if err != nil {
				return fmt.Errorf("%s: %w", c.pattern, err)
			}
			if match {
				used[c.pattern] = true
				t.Run(file, func(t *testing.T) { c.check(t, filepath.Join(dir, file)) })
				return nil
			}
		}
		t.Errorf("no tool checks %s: name one in checks", file)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range checks {
		if !used[c.pattern] {
			t.Errorf("no file is left for %s", c.pattern)
		}
	}
}

// copyOfExamples returns a folder with all of them, and with the files that only their
// users have.
func copyOfExamples(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(".")); err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certPEM, keyPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
	for name, content := range map[string][]byte{
		"prometheus/exporters-ca.pem": certPEM, "secure/ca.pem": certPEM, "secure/proxy.pem": certPEM, "secure/proxy-key.pem": keyPEM,
		"secure/prometheus.password": []byte("s3cret"), "secure/admin.password": []byte("s3cret"),
		"secure/backups.token": []byte("0123456789abcdef"), "secure/agent.token": []byte("fedcba9876543210"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// run runs a command in the folder of a file. It has to succeed.
func run(t *testing.T, file, program string, args ...string) (output string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Dir = filepath.Dir(file)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s", cmd, err, out)
	}
	return string(out)
}

// tool is a program that takes the file behind its arguments.
func tool(program, debianPackage string, args ...string) func(*testing.T, string) {
	return func(t *testing.T, file string) {
		run(t, file, externaltest.Program(t, program, debianPackage), append(args[:len(args):len(args)], file)...)
	}
}

// promtool is one that says SUCCESS.
func promtool(args ...string) func(*testing.T, string) {
	return func(t *testing.T, file string) {
		if out := run(t, file, externaltest.Program(t, "promtool", "prometheus"), append(args[:len(args):len(args)], file)...); !strings.Contains(out, "SUCCESS") {
			t.Errorf("promtool did not look at it:\n%s", out)
		}
	}
}

// by is for files that a test has a program read which stands in the nearest folder with
// tests, and knows more of them than is known here.
func by(test string) func(*testing.T, string) {
	return func(t *testing.T, file string) {
		for folder := filepath.Dir(file); ; folder = filepath.Dir(folder) {
			tests, err := filepath.Glob(filepath.Join(folder, "*_test.go"))
			if err != nil || folder == filepath.Dir(folder) {
				t.Fatalf("no folder of it has tests: %v", err)
			}
			for _, source := range tests {
				text, err := os.ReadFile(source)
				if err != nil {
					t.Fatal(err)
				}
				if bytes.Contains(text, []byte("func "+test+"(")) {
					return
				}
			}
			if len(tests) > 0 {
				t.Errorf("%s is not there", test)
				return
			}
		}
	}
}

// proxyConfig has the proxy read its configuration, with the web configuration beside it.
func proxyConfig(t *testing.T, file string) {
	s, err := server.New(server.Config{
		ListenAddresses: []string{"127.0.0.1:0"}, ConfigFile: file, WebConfigFile: filepath.Join(filepath.Dir(file), "web.yml"),
		Logger: slog.New(slog.DiscardHandler),
	})
	if err == nil {
		err = s.Listen()
	}
	if err == nil {
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		err = s.Run(ended)
	}
	if err != nil {
		t.Error(err)
	}
}

// clientConfig has culvert-client check its configuration.
func clientConfig(t *testing.T, file string) {
	// What is only built is no dependency of the test: looked at, it is one.
	if err := filepath.WalkDir("../client", func(_ string, _ fs.DirEntry, err error) error { return err }); err != nil {
		t.Fatal(err)
	}
	run(t, file, "go", "build", "-C", repository(t), "-o", file+".program", "./client")
	if out := run(t, file, file+".program", "check-config", "--config.file="+file, "--fqdn=web-1.berlin.example.net"); !strings.Contains(out, "good") {
		t.Error(out)
	}
}

// crontab has cron read a file of /etc/cron.d. Its program reads those of users, which are
// the same without the user.
func crontab(t *testing.T, file string) {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	entry := regexp.MustCompile(`(?m)^((?:[-0-9*/,]+[ \t]+){5})root[ \t]+`)
	if !entry.Match(text) {
		t.Fatal("no line has five fields and the user root")
	}
	own := file + ".own"
	if err := os.WriteFile(own, entry.ReplaceAll(text, []byte("$1")), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, file, externaltest.Program(t, "crontab", "cron"), "-n", own)
}

// units has systemd verify a unit, whose programs are not installed here.
func units(t *testing.T, file string) {
	analyze := externaltest.Program(t, "systemd-analyze", "systemd")
	folder := filepath.Dir(file)
	found, err := filepath.Glob(filepath.Join(folder, "*.service"))
	if err != nil {
		t.Fatal(err)
	}
	for _, unit := range append(found, file) {
		text, err := os.ReadFile(unit)
		if err == nil {
			text = regexp.MustCompile(`/usr/local/bin/\S+`).ReplaceAll(text, []byte("/bin/true"))
			err = os.WriteFile(unit, text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	out := run(t, file, analyze, "verify", "--man=no", file)
	for line := range strings.Lines(out) {
		if strings.Contains(line, filepath.Base(file)) { // units of this system may have faults of their own
			t.Error(line)
		}
	}
}

// manifest reads objects of Kubernetes by its own types, strictly: a field that they don't
// have, or of another type, is an error.
func manifest(t *testing.T, file string) {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := decodeAll(text); err != nil {
		t.Error(err)
	}
}

func decodeAll(text []byte) error {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, appsv1.AddToScheme, policyv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return err
		}
	}
	decoder := serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	n := 0
	for documents := yaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(text))); ; n++ {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			_, _, err = decoder.Decode(document, nil, nil)
		}
		if err != nil {
			return fmt.Errorf("document %d: %w", n+1, err)
		}
	}
	if n == 0 {
		return errors.New("there is no object in it")
	}
	return nil
}

// kustomize builds what kubectl apply -k would. It is a module of its own: nobody else
// needs what it needs.
func kustomize(t *testing.T, file string) {
	command := func(args ...string) *exec.Cmd {
		return exec.CommandContext(t.Context(), "go", append([]string{"-C", filepath.Join(repository(t), "examples/kubernetes/kustomize")}, args...)...)
	}
	if out, err := command("mod", "download").CombinedOutput(); err != nil {
		externaltest.Missing(t, fmt.Sprintf("kustomize can't be had: %v: %s", err, out))
	}
	build := command("tool", "kustomize", "build", filepath.Dir(file))
	var problems bytes.Buffer
	build.Stderr = &problems
	built, err := build.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", build, err, &problems)
	}
	if err := decodeAll(built); err != nil {
		t.Errorf("%v\n%s", err, built)
	}
}

// repository returns the folder of the module.
func repository(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}
