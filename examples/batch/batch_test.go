//go:build unix

// Package batch has batch jobs that run with culvert-client run, to copy from.
package batch

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol/externaltest"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/server"
)

// bin has culvert-client and this folder's backup.sh, as /usr/local/bin would.
var bin string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "culvert-batch-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		bin = dir
		build := exec.Command("go", "build", "-o", filepath.Join(bin, "culvert-client"), "../../client")
		out, err := build.CombinedOutput()
		script, err2 := filepath.Abs("backup.sh")
		if err = cmp.Or(err, err2); err == nil {
			err = os.Symlink(script, filepath.Join(bin, "backup.sh"))
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "%v\n%s", err, out)
			return 1
		}
		return m.Run()
	}())
}

// startProxy starts a proxy and returns its address.
func startProxy(t *testing.T) string {
	t.Helper()
	proxy, err := server.New(server.Config{
		ListenAddresses: []string{"127.0.0.1:0"},
		Fleet:           fleet.Config{SettleTime: -1}, // nobody had a list of agents before
		Logger:          slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := proxy.Listen(); err != nil {
		t.Fatal(err)
	}
	inBackground(t, "the proxy", proxy.Run)
	return proxy.Addr()
}

func inBackground(t *testing.T, what string, run func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("%s ended with %v", what, err)
		}
	})
}

// command runs a command line of an example, as a shell of cron's would, with some
// more in the environment.
func command(t *testing.T, line string, env ...string) (code int, output string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", line)
	cmd.Env = append(append(os.Environ(), "PATH="+bin+string(os.PathListSeparator)+os.Getenv("PATH")), env...)
	out, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && ctx.Err() == nil {
		return exit.ExitCode(), string(out)
	}
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return 0, string(out)
}

// crontab returns the variables and the command of backup.cron.
func crontab(t *testing.T) (env []string, line string) {
	t.Helper()
	text, err := os.ReadFile("backup.cron")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasSuffix(string(text), "\n") {
		t.Error("cron ignores a last line without a line feed")
	}
	for l := range strings.Lines(string(text)) {
		l = strings.TrimSuffix(l, "\n")
		switch fields := strings.Fields(l); {
		case l == "" || strings.HasPrefix(l, "#"):
		case regexp.MustCompile(`^[A-Z_]+=`).MatchString(l):
			env = append(env, l)
		case line != "" || len(fields) < 7:
			t.Fatalf("not an entry, or more than one: %q", l)
		default:
			for i, bound := range []int{59, 23, 31, 12, 7} {
				if n, err := strconv.Atoi(fields[i]); fields[i] != "*" && (err != nil || n > bound) {
					t.Errorf("field %d of the entry is %q", i+1, fields[i])
				}
			}
			if fields[5] != "root" {
				t.Errorf("the user is %q", fields[5])
			}
			line = l[strings.Index(l, " root ")+len(" root "):]
		}
	}
	if strings.Contains(line, "%") {
		t.Error("cron takes a % for a line feed")
	}
	return env, line
}

// service returns the variables and the command of backup.service.
func service(t *testing.T) (env []string, line string) {
	t.Helper()
	text, err := os.ReadFile("backup.service")
	if err != nil {
		t.Fatal(err)
	}
	for l := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(l, "Environment="); ok {
			env = append(env, strings.Fields(value)...)
		}
		if value, ok := strings.CutPrefix(l, "ExecStart="); ok {
			line = strings.TrimSpace(value)
		}
	}
	return env, line
}

// TestCommands runs the commands of the crontab and of the service, in good and in
// bad times.
func TestCommands(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	cronEnv, cronLine := crontab(t)
	serviceEnv, serviceLine := service(t)
	// What systemd puts in, and where the programs are.
	serviceLine = strings.NewReplacer("%H", host, "/usr/local/bin/", bin+"/").Replace(serviceLine)
	for _, c := range []struct {
		name, line string
		env        []string
	}{{"cron", cronLine, cronEnv}, {"systemd", serviceLine, serviceEnv}} {
		t.Run(c.name, func(t *testing.T) {
			externaltest.Program(t, "tar", "tar")
			proxy := startProxy(t)
			dir := t.TempDir()
			data, archive := filepath.Join(dir, "data"), filepath.Join(dir, "data.tar")
			if err := os.Mkdir(data, 0o755); err != nil {
				t.Fatal(err)
			}
			variables := strings.Join(c.env, "\n")
			for _, name := range []string{"DIRECTORY=/", "ARCHIVE=/"} {
				if !strings.Contains("\n"+variables, "\n"+name) {
					t.Errorf("the variables lack %s…", name)
				}
			}
			env := []string{"DIRECTORY=" + data, "ARCHIVE=" + archive, "CULVERT_PUSH_URL=http://" + proxy}
			series := func(name string, more ...string) string {
				return fmt.Sprintf("%s{instance=%q,job=\"backup\"%s}", name, host, strings.Join(more, ""))
			}

			if code, out := command(t, c.line, env...); code != 0 || out != "" {
				t.Fatalf("exit code %d\n%s", code, out)
			}
			info, err := os.Stat(archive)
			if err != nil {
				t.Fatal(err)
			}
			good := scrape(t, proxy)
			for name, value := range map[string]float64{
				series("backup_size_bytes"):                            float64(info.Size()),
				series("culvert_job_exit_code"):                        0,
				series("culvert_job_runs_total", `,outcome="success"`): 1,
				series("culvert_job_runs_total", `,outcome="failure"`): 0,
				series("push_up"):                                      1,
			} {
				if got, ok := good[name]; !ok || got != value {
					t.Errorf("%s is %v, want %v; all: %v", name, got, value, good)
				}
			}

			env[0] = "DIRECTORY=" + filepath.Join(dir, "nothing")
			if code, out := command(t, c.line, env...); code != 2 || !strings.Contains(out, "tar: ") {
				t.Errorf("exit code %d, want tar's\n%s", code, out)
			}
			bad := scrape(t, proxy)
			for name, value := range map[string]float64{
				series("backup_size_bytes"):                            float64(info.Size()),
				series("culvert_job_exit_code"):                        2,
				series("culvert_job_last_success_time_seconds"):        good[series("culvert_job_last_success_time_seconds")],
				series("culvert_job_runs_total", `,outcome="success"`): 1,
				series("culvert_job_runs_total", `,outcome="failure"`): 1,
			} {
				if got, ok := bad[name]; !ok || got != value {
					t.Errorf("%s is %v, want %v; all: %v", name, got, value, bad)
				}
			}
		})
	}
	t.Run("by hand", func(t *testing.T) {
		externaltest.Program(t, "tar", "tar")
		if code, out := command(t, `unset CULVERT_METRICS_FILE; backup.sh . "$ARCHIVE"`, "ARCHIVE="+filepath.Join(t.TempDir(), "data.tar")); code != 0 || out != "" {
			t.Errorf("exit code %d\n%s", code, out)
		}
	})
}

// scrape returns the samples of the pushed groups, by their series.
func scrape(t *testing.T, proxy string) map[string]float64 {
	t.Helper()
	resp, err := http.Get("http://" + proxy + "/metrics?only=groups")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	defer http.DefaultClient.CloseIdleConnections()
	samples := map[string]float64{}
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if line := lines.Text(); !strings.HasPrefix(line, "#") {
			end := strings.LastIndexByte(line, ' ')
			if samples[line[:end]], err = strconv.ParseFloat(line[end+1:], 64); err != nil {
				t.Errorf("%q: %v", line, err)
			}
		}
	}
	return samples
}

// TestUnits has systemd check the service and the timer.
func TestUnits(t *testing.T) {
	analyze := externaltest.Program(t, "systemd-analyze", "systemd")
	dir := t.TempDir()
	for _, name := range []string{"backup.service", "backup.timer"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text = []byte(strings.ReplaceAll(string(text), "/usr/local/bin/", bin+"/"))
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.CommandContext(t.Context(), analyze, "verify", filepath.Join(dir, "backup.service"), filepath.Join(dir, "backup.timer")).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "backup.") { // units of the system that runs the test may have their own faults
			t.Error(line)
		}
	}
	if err != nil {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// TestRules has promtool check the configuration and the alerts.
func TestRules(t *testing.T) {
	promtool := externaltest.Program(t, "promtool", "prometheus")
	for _, args := range [][]string{{"check", "config", "prometheus.yml"}, {"test", "rules", "alerts_test.yml"}} {
		if out, err := exec.CommandContext(t.Context(), promtool, args...).CombinedOutput(); err != nil || !strings.Contains(string(out), "SUCCESS") {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
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

// TestPrometheus has a real Prometheus scrape an agent that serves the groups of its
// host, with prometheus.yml, and waits for an alert: it has the job that was pushed,
// and the agent's name.
func TestPrometheus(t *testing.T) {
	program := externaltest.Program(t, "prometheus", "prometheus")
	front, store := startProxy(t), startProxy(t)
	if code, out := command(t, "culvert-client run --job=backup --grouping=instance=somebody-else -- sh -c 'exit 3'", "CULVERT_PUSH_URL=http://"+store); code != 3 || out != "" {
		t.Fatalf("exit code %d\n%s", code, out)
	}
	a, err := agent.New(agent.Config{
		Name: "web-1", ProxyURLs: []string{"http://" + front}, Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Gatherer: prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
			resp, err := http.Get("http://" + store + "/metrics?only=groups")
			if err != nil {
				return nil, err
			}
			defer resp.Body.Close()
			parser := expfmt.NewTextParser(model.UTF8Validation)
			families, err := parser.TextToMetricFamilies(resp.Body)
			var list []*dto.MetricFamily
			for _, f := range families {
				list = append(list, f)
			}
			return list, err
		}),
	})
	if err != nil {
		t.Fatal(err)
	}
	inBackground(t, "the agent", a.Run)
	await(t, func() string { // else Prometheus asks for the targets too early, and then after a minute
		resp, err := http.Get("http://" + front + "/targets")
		if err != nil {
			return err.Error()
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err != nil || !strings.Contains(string(text), "web-1") {
			return fmt.Sprintf("the agent is no target: %s %v", text, err)
		}
		return ""
	})

	prom := startPrometheus(t, program, front)
	want := "BatchJobFailed culvert_job_exit_code job=backup instance=web-1 exported_job= exported_instance=somebody-else"
	await(t, func() string {
		var alerts struct {
			Alerts []struct {
				Labels map[string]string
				State  string
			}
		}
		ask(t, prom+"/api/v1/alerts", &alerts)
		var got []string
		for _, alert := range alerts.Alerts {
			l := alert.Labels
			got = append(got, fmt.Sprintf("%s culvert_job_exit_code job=%s instance=%s exported_job=%s exported_instance=%s", l["alertname"], l["job"], l["instance"], l["exported_job"], l["exported_instance"]))
		}
		if strings.Join(got, "; ") != want {
			return fmt.Sprintf("the alerts are %q, want %q", got, want)
		}
		return ""
	})
	var answer struct {
		Result []struct{ Metric map[string]string }
	}
	ask(t, prom+"/api/v1/query?query="+url.QueryEscape(`{__name__=~"up|culvert_client_connected",job="culvert-agents",instance="web-1"}`), &answer)
	if len(answer.Result) != 2 {
		t.Errorf("of the agent itself there is %v", answer.Result)
	}
}

// startPrometheus starts Prometheus with this folder's configuration and the given
// proxy. It returns its URL.
func startPrometheus(t *testing.T, program, proxy string) string {
	t.Helper()
	dir := t.TempDir()
	monitoring, err := filepath.Abs("../monitoring")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"prometheus.yml", "alerts.yml"} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		edited := strings.NewReplacer("culvert.example.net:8080", proxy, "../monitoring/", monitoring+"/").Replace(string(text))
		if name == "prometheus.yml" {
			edited = "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}\n" + edited
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(edited), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), program, "--config.file="+filepath.Join(dir, "prometheus.yml"),
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address=127.0.0.1:0")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	listening := regexp.MustCompile(`msg="Listening on" address=(\S+)`)
	found := make(chan string, 1)
	var lines []string
	read := make(chan struct{}) // closed when lines are complete
	go func() {
		defer close(read)
		for scanner := bufio.NewScanner(log); scanner.Scan(); {
			lines = append(lines, scanner.Text())
			if m := listening.FindStringSubmatch(scanner.Text()); m != nil && len(found) == 0 {
				found <- m[1]
			}
		}
	}()
	t.Cleanup(func() { // the test's context has ended by now
		<-read
		_ = cmd.Wait() // ended by us
		if t.Failed() {
			t.Logf("Prometheus's log:\n%s", strings.Join(lines, "\n"))
		}
	})
	select {
	case address := <-found:
		return "http://" + address
	case <-read:
		t.Fatal("Prometheus ended")
	case <-time.After(time.Minute):
		t.Fatal("Prometheus did not listen within a minute")
	}
	return ""
}

// ask gets the data of an answer of Prometheus's API. While Prometheus is starting,
// it has none.
func ask(t *testing.T, url string, data any) {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusServiceUnavailable {
		return
	}
	if err := json.NewDecoder(resp.Body).Decode(&struct{ Data any }{data}); err != nil {
		t.Fatalf("%s: %s: %v", url, resp.Status, err)
	}
}

// await waits until what is there is what is wanted: until unmet returns "".
func await(t *testing.T, unmet func() string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; {
		why := unmet()
		if why == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(why)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
