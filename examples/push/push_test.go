package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/culvert-io/culvert/protocol/externaltest"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/server"
)

// python returns a Python that has prometheus_client. Debian's package is for
// Debian's Python, which needs not be the first in the PATH.
func python(t *testing.T) string {
	t.Helper()
	for _, program := range []string{"python3", "/usr/bin/python3"} {
		if exec.CommandContext(t.Context(), program, "-c", "import prometheus_client").Run() == nil {
			return program
		}
	}
	externaltest.Missing(t, "prometheus_client for Python is not installed: apt-get install python3-prometheus-client")
	return ""
}

// node returns Node.js, and the environment in which it finds prom-client: in
// NODE_PATH, among npm's global packages, or in this folder after npm install.
func node(t *testing.T) (program, env string) {
	t.Helper()
	program = externaltest.Program(t, "node", "nodejs")
	local, err := filepath.Abs("node_modules")
	if err != nil {
		t.Fatal(err)
	}
	global, _ := exec.CommandContext(t.Context(), "npm", "root", "--global").Output()
	env = "NODE_PATH=" + strings.Join([]string{local, os.Getenv("NODE_PATH"), strings.TrimSpace(string(global))}, string(os.PathListSeparator))
	find := exec.CommandContext(t.Context(), program, "--eval", "require('prom-client')")
	find.Env = append(os.Environ(), env)
	if find.Run() != nil {
		externaltest.Missing(t, "prom-client for Node.js is not installed: npm install --global prom-client")
	}
	return program, env
}

// startProxy starts a proxy and returns its URL.
func startProxy(t *testing.T) string {
	t.Helper()
	// The program has these as well, and clients push metrics of the same names.
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	proxy, err := server.New(server.Config{
		ListenAddresses: []string{"127.0.0.1:0"},
		StoragePath:     t.TempDir(),
		Fleet:           fleet.Config{SettleTime: -1}, // nobody had a list of agents before
		Registry:        registry,
		Logger:          slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := proxy.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- proxy.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the proxy ended with %v", err)
		}
	})
	return "http://" + proxy.Addr()
}

// scrape is what a scrape of the groups brings: series, as they are written there,
// with their values.
type scrape map[string]float64

func scrapeOf(t *testing.T, url string) scrape {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url+"/metrics?only=groups", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "text/plain;version=0.0.4;escaping=allow-utf-8")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("the scrape got %s", resp.Status)
	}
	return parse(t, resp.Body)
}

func parse(t *testing.T, r io.Reader) scrape {
	t.Helper()
	s := scrape{}
	for lines := bufio.NewScanner(r); lines.Scan(); {
		line := lines.Text()
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		end := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[end+1:], 64)
		if err != nil {
			t.Fatalf("not a sample: %q", line)
		}
		s[line[:end]] = value
	}
	return s
}

// want checks one sample.
func (s scrape) want(t *testing.T, series string, value float64) {
	t.Helper()
	if got, ok := s[series]; !ok {
		t.Errorf("%s is missing in:\n%s", series, s)
	} else if got != value {
		t.Errorf("%s is %v, want %v", series, got, value)
	}
}

// wantNow checks that the value of a sample is a time not long ago.
func (s scrape) wantNow(t *testing.T, series string) {
	t.Helper()
	if age := float64(time.Now().UnixNano())/1e9 - s[series]; age < -1 || age > 300 {
		t.Errorf("%s is %v, want the present time; all:\n%s", series, s[series], s)
	}
}

// wantNot checks that no series has the text in it.
func (s scrape) wantNot(t *testing.T, text string) {
	t.Helper()
	for series := range s {
		if strings.Contains(series, text) {
			t.Errorf("%s should not be there", series)
		}
	}
}

func (s scrape) String() string {
	var lines []string
	for series, value := range s {
		lines = append(lines, fmt.Sprintf("\t%s %v\n", series, value))
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// execute runs a program that finds the proxy by CULVERT_URL, and returns its exit
// code and what it printed.
func execute(t *testing.T, url string, env []string, program string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var out, errs strings.Builder
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = append(append(os.Environ(), "CULVERT_URL="+url), env...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		exit, ok := errors.AsType[*exec.ExitError](err)
		if !ok || ctx.Err() != nil {
			t.Fatalf("%s: %v\n%s%s", cmd, err, out.String(), errs.String())
		}
		code = exit.ExitCode()
	}
	return code, out.String(), errs.String()
}

// succeed is execute for what must exit with 0.
func succeed(t *testing.T, url string, env []string, program string, args ...string) (stdout string) {
	t.Helper()
	code, stdout, stderr := execute(t, url, env, program, args...)
	if code != 0 {
		t.Fatalf("%s %s exited with %d:\n%s%s", program, strings.Join(args, " "), code, stdout, stderr)
	}
	return stdout
}

// TestCurl runs curl.sh, and compares the scrapes that it prints.
func TestCurl(t *testing.T) {
	externaltest.Program(t, "curl", "curl")
	sh := externaltest.Program(t, "sh", "dash")
	url := startProxy(t)
	steps := strings.Split(succeed(t, url, nil, sh, "curl.sh"), "\n== ")
	if steps[0] != "" {
		t.Fatalf("curl.sh starts with %q", steps[0])
	}
	groups := `"groups":[{"instance":"db-2","job":"example_nightly"},{"instance":"web-1","job":"example_sync"},{"job":"example_disk","path":"/srv/data"},{"job":"example_report"},{"job":"example_worker"}]}}`
	want := []string{
		`report_duration_seconds{instance="",job="example_report"} 12.5
		 report_rows{instance="",job="example_report"} 4711`,
		`report_duration_seconds{instance="",job="example_report"} 12.5
		 report_rows{instance="",job="example_report"} 4712`,
		`push_up{instance="web-1",job="example_sync"} 1
		 sync_files{instance="web-1",job="example_sync"} 17`,
		`disk_files{instance="",job="example_disk",path="/srv/data"} 12`,
		`worker_longest_seconds{instance="",job="example_worker"} 0.4
		 worker_requests_total{instance="",job="example_worker"} 7`,
		`{"status":"success","data":{"groups":2}}
		 nightly_success{instance="db-1",job="example_nightly"} 1
		 nightly_success{instance="db-2",job="example_nightly"} 0`,
		`nightly_success{instance="db-2",job="example_nightly"} 0`,
		`{"status":"success","data":{"dry_run":true,` + groups + `
		 {"status":"success","data":{"dry_run":false,` + groups,
	}
	if len(steps)-1 != len(want) {
		t.Fatalf("curl.sh has %d steps, want %d", len(steps)-1, len(want))
	}
	for i, step := range steps[1:] {
		title, body, _ := strings.Cut(step, "\n")
		var got []string
		for line := range strings.Lines(body) {
			if !strings.HasPrefix(line, "push_time_seconds") && !strings.HasPrefix(line, "push_failure_time_seconds") {
				got = append(got, strings.TrimSpace(line))
			}
		}
		if want := strings.ReplaceAll(want[i], "\n\t\t ", "\n"); strings.Join(got, "\n") != want {
			t.Errorf("%s:\n%s\nwant:\n%s", title, strings.Join(got, "\n"), want)
		}
	}
	if left := scrapeOf(t, url); len(left) > 0 {
		t.Errorf("curl.sh left behind:\n%s", left)
	}
	if code, _, stderr := execute(t, "http://127.0.0.1:1", nil, sh, "curl.sh"); code == 0 || stderr == "" {
		t.Errorf("without a proxy curl.sh exited with %d and said %q", code, stderr)
	}
}

// TestBackup runs backup.sh as cron would, in good and in bad times.
func TestBackup(t *testing.T) {
	externaltest.Program(t, "curl", "curl")
	externaltest.Program(t, "tar", "tar")
	sh := externaltest.Program(t, "sh", "dash")
	url := startProxy(t)
	dir := t.TempDir()
	source, archive := filepath.Join(dir, "data"), filepath.Join(dir, "data.tar")
	write(t, filepath.Join(source, "file"), "content")
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	labels := fmt.Sprintf("{instance=%q,job=\"backup\"}", name)

	succeed(t, url, nil, sh, "backup.sh", source, archive)
	good := scrapeOf(t, url)
	good.want(t, "backup_success"+labels, 1)
	good.want(t, "push_up"+labels, 1)
	good.want(t, "push_failure_time_seconds"+labels, 0)
	for _, series := range []string{"backup_start_time_seconds", "backup_last_success_time_seconds", "push_time_seconds"} {
		good.wantNow(t, series+labels)
	}
	if took := good["backup_duration_seconds"+labels]; took < 0 || took > 300 {
		t.Errorf("the backup took %v s", took)
	}
	info, err := os.Stat(archive)
	if err != nil {
		t.Fatal(err)
	}
	good.want(t, "backup_size_bytes"+labels, float64(info.Size()))
	if list := succeed(t, url, nil, "tar", "-tf", archive); !strings.Contains(list, "./file\n") {
		t.Errorf("the archive has %q", list)
	}

	failed := func(t *testing.T, wantCode, code int) {
		t.Helper()
		if code != wantCode {
			t.Errorf("backup.sh exited with %d, want %d", code, wantCode)
		}
		bad := scrapeOf(t, url)
		bad.want(t, "backup_success"+labels, 0)
		bad.want(t, "backup_last_success_time_seconds"+labels, good["backup_last_success_time_seconds"+labels])
		bad.want(t, "backup_size_bytes"+labels, float64(info.Size()))
		bad.want(t, "push_up"+labels, 1) // it failed, and said so
		if _, err := os.Stat(archive + ".part"); !os.IsNotExist(err) {
			t.Errorf("half an archive is left: %v", err)
		}
		if _, err := os.Stat(archive); err != nil {
			t.Errorf("the last good archive is gone: %v", err)
		}
	}
	t.Run("fails", func(t *testing.T) {
		code, _, stderr := execute(t, url, nil, sh, "backup.sh", filepath.Join(dir, "nothing"), archive)
		failed(t, 2, code) // tar's
		if !strings.Contains(stderr, "tar: ") {
			t.Errorf("backup.sh kept to itself what tar said: %q", stderr)
		}
	})
	t.Run("succeeds again", func(t *testing.T) {
		succeed(t, url, nil, sh, "backup.sh", source, archive)
		good = scrapeOf(t, url)
		good.want(t, "backup_success"+labels, 1)
	})
	t.Run("is terminated", func(t *testing.T) {
		// In place of tar: something in the midst of which the script is told to end.
		write(t, filepath.Join(dir, "bin", "tar"), "#!/bin/sh\nkill -TERM \"$PPID\"\n")
		code, _, _ := execute(t, url, []string{"PATH=" + filepath.Join(dir, "bin") + string(os.PathListSeparator) + os.Getenv("PATH")}, sh, "backup.sh", source, archive)
		failed(t, 143, code)
	})
	t.Run("has no proxy", func(t *testing.T) {
		if err := os.Remove(archive); err != nil {
			t.Fatal(err)
		}
		code, _, stderr := execute(t, "http://127.0.0.1:1", nil, sh, "backup.sh", source, archive)
		if code != 0 || !strings.Contains(stderr, "could not push to http://127.0.0.1:1/metrics/job/backup") {
			t.Errorf("backup.sh exited with %d and said %q", code, stderr)
		}
		if _, err := os.Stat(archive); err != nil {
			t.Error(err)
		}
	})
	t.Run("is refused", func(t *testing.T) {
		code, _, stderr := execute(t, url+"/metrics/job/x", nil, sh, "backup.sh", source, archive)
		if code != 0 || !strings.Contains(stderr, "400") || !strings.Contains(stderr, "label part") {
			t.Errorf("backup.sh exited with %d and said %q", code, stderr)
		}
	})
	t.Run("lacks an argument", func(t *testing.T) {
		code, _, stderr := execute(t, url, nil, sh, "backup.sh", source)
		if code == 0 || !strings.Contains(stderr, "usage: backup.sh DIRECTORY ARCHIVE") {
			t.Errorf("backup.sh exited with %d and said %q", code, stderr)
		}
	})
}

// TestLineCount runs the same job in three languages.
func TestLineCount(t *testing.T) {
	for _, language := range []struct {
		name    string
		job     string
		command func(t *testing.T, url string) func(args ...string) (code int, message string)
	}{
		{"Go", "example_go", func(t *testing.T, url string) func(args ...string) (int, string) {
			return func(args ...string) (int, string) {
				if err := run(url, args[len(args)-1], args[0] == "--delete"); err != nil {
					return 1, err.Error()
				}
				return 0, ""
			}
		}},
		{"Python", "example_python", func(t *testing.T, url string) func(args ...string) (int, string) {
			program := python(t)
			return func(args ...string) (int, string) {
				code, _, stderr := execute(t, url, nil, program, append([]string{"job.py"}, args...)...)
				return code, stderr
			}
		}},
		{"Node", "example_node", func(t *testing.T, url string) func(args ...string) (int, string) {
			program, env := node(t)
			return func(args ...string) (int, string) {
				code, _, stderr := execute(t, url, []string{env}, program, append([]string{"job.js"}, args...)...)
				return code, stderr
			}
		}},
	} {
		t.Run(language.name, func(t *testing.T) {
			url := startProxy(t)
			command := language.command(t, url)
			file := filepath.Join(t.TempDir(), "three lines")
			write(t, file, "1\n2\n3\n")
			other := filepath.Join(filepath.Dir(file), "one line")
			write(t, other, "1\n")
			labels := fmt.Sprintf("{file=%q,instance=\"\",job=%q}", file, language.job)
			otherLabels := fmt.Sprintf("{file=%q,instance=\"\",job=%q}", other, language.job)

			for _, args := range [][]string{{file}, {other}} {
				if code, message := command(args...); code != 0 {
					t.Fatalf("it exited with %d: %s", code, message)
				}
			}
			first := scrapeOf(t, url)
			first.want(t, "linecount_lines"+labels, 3)
			first.want(t, "linecount_lines"+otherLabels, 1)
			first.want(t, "linecount_success"+labels, 1)
			first.want(t, "push_up"+labels, 1)
			first.want(t, "push_failure_time_seconds"+labels, 0)
			first.wantNow(t, "linecount_last_success_time_seconds"+labels)
			first.wantNow(t, "push_time_seconds"+labels)
			if _, ok := first["linecount_duration_seconds"+labels]; !ok {
				t.Errorf("the duration is missing in:\n%s", first)
			}

			// What worked stays known while it fails.
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			if code, message := command(file); code != 1 || !strings.Contains(strings.ToLower(message), "no such file") {
				t.Errorf("without the file it exited with %d: %s", code, message)
			}
			second := scrapeOf(t, url)
			second.want(t, "linecount_success"+labels, 0)
			second.want(t, "linecount_lines"+labels, 3)
			second.want(t, "linecount_last_success_time_seconds"+labels, first["linecount_last_success_time_seconds"+labels])
			if second["push_time_seconds"+labels] <= first["push_time_seconds"+labels] {
				t.Error("the failure was not pushed")
			}

			if code, message := command("--delete", file); code != 0 {
				t.Fatalf("--delete exited with %d: %s", code, message)
			}
			last := scrapeOf(t, url)
			last.wantNot(t, labels)
			last.want(t, "linecount_lines"+otherLabels, 1)
		})
	}
}

// TestRules has promtool check the configuration and the alerts.
func TestRules(t *testing.T) {
	promtool := externaltest.Program(t, "promtool", "prometheus")
	succeed(t, "", nil, promtool, "check", "config", "prometheus.yml")
	out := succeed(t, "", nil, promtool, "test", "rules", "alerts_test.yml")
	if !strings.Contains(out, "SUCCESS") {
		t.Error(out)
	}
	alerts, err := os.ReadFile("alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	tests, err := os.ReadFile("alerts_test.yml")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(alerts)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "- alert: "); ok && !strings.Contains(string(tests), "alertname: "+name+"\n") {
			t.Errorf("alerts_test.yml doesn't test the alert %s", name)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := cmp.Or(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o755)); err != nil {
		t.Fatal(err)
	}
}
