//go:build unix

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/culvert-io/culvert/client/jobrun"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/server"
)

// patience bounds every wait for an event that has to come.
const patience = time.Minute

func init() { children["signals"] = tellSignals }

// tellSignals is a job that writes a line for each signal that it gets, and ends
// with 7 when standard input does.
func tellSignals() {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		io.Copy(io.Discard, os.Stdin)
	}()
	fmt.Println("ready")
	for {
		select {
		case s := <-signals:
			fmt.Println(s)
		case <-ended:
			os.Exit(7)
		}
	}
}

// startPushProxy starts a proxy, and returns its URL.
func startPushProxy(t *testing.T, configure ...func(*server.Config)) string {
	t.Helper()
	config := server.Config{
		ListenAddresses: []string{"127.0.0.1:0"},
		Fleet:           fleet.Config{SettleTime: -1},
		Logger:          slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	for _, f := range configure {
		f(&config)
	}
	proxy, err := server.New(config)
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
		http.DefaultClient.CloseIdleConnections()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the proxy ended with %v", err)
		}
	})
	return "http://" + proxy.Addr()
}

// serve starts an endpoint that may pass pushes on to a proxy.
func serve(t *testing.T, proxy string, handler func(w http.ResponseWriter, r *http.Request, pass http.Handler)) *httptest.Server {
	t.Helper()
	u, err := url.Parse(proxy)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DisableKeepAlives: true}
	pass := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(u) }, Transport: transport}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler(w, r, pass) }))
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	return s
}

// groups returns what a scrape of the proxy's groups brings.
func groups(t *testing.T, proxy string) string {
	t.Helper()
	resp, err := http.Get(proxy + "/metrics?only=groups")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// sample returns the value of a series, as it is written in the scrape.
func sample(t *testing.T, scrape, series string) float64 {
	t.Helper()
	_, rest, ok := strings.Cut("\n"+scrape, "\n"+series+" ")
	if !ok {
		t.Errorf("%s is missing in:\n%s", series, scrape)
		return -1
	}
	text, _, _ := strings.Cut(rest, "\n")
	v, err := strconv.ParseFloat(text, 64)
	if err != nil {
		t.Error(err)
	}
	return v
}

func wantSamples(t *testing.T, scrape string, want map[string]float64) {
	t.Helper()
	for series, value := range want {
		if got := sample(t, scrape, series); got != value {
			t.Errorf("%s is %v, want %v", series, got, value)
		}
	}
}

// call is a culvert-client to be run.
type call struct {
	env    []string
	stdin  string
	prefix []string // in front of the program
	args   []string
}

func (c call) command(ctx context.Context) *exec.Cmd {
	argv := append(append(append([]string{}, c.prefix...), os.Args[0]), c.args...)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = append(append(os.Environ(), childName+"=client", "GORACE=atexit_sleep_ms=0"), c.env...)
	cmd.Stdin = strings.NewReader(c.stdin)
	cmd.WaitDelay = patience
	return cmd
}

// do runs it to its end.
func (c call) do(t *testing.T) (state *os.ProcessState, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := c.command(ctx)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if ctx.Err() != nil || cmd.ProcessState == nil {
		t.Fatalf("%v: %v\n%s%s", c.args, err, out.String(), errs.String())
	}
	return cmd.ProcessState, out.String(), errs.String()
}

// job is call for a job, with a group {job="j"}.
func job(url string, command ...string) call {
	return call{args: append([]string{"run", "--job=j", "--push-url=" + url, "--push-timeout=50s", "--"}, command...)}
}

// doJob runs a job, and checks its exit code.
func (c call) want(t *testing.T, code int) (stdout, stderr string) {
	t.Helper()
	state, stdout, stderr := c.do(t)
	if got := state.ExitCode(); got != code {
		t.Errorf("%v: exit code %d, want %d\n%s%s", c.args, got, code, stdout, stderr)
	}
	for line := range strings.Lines(stderr) {
		if !strings.HasPrefix(line, "culvert-client: ") || !strings.HasSuffix(line, "\n") {
			t.Errorf("standard error has the line %q", line)
		}
	}
	return stdout, stderr
}

func TestRunPushes(t *testing.T) {
	t.Parallel()
	proxy := startPushProxy(t)
	before := float64(time.Now().UnixNano()) / 1e9
	run := func(code int, command ...string) string {
		t.Helper()
		c := job(proxy, command...)
		c.args = append([]string{"run", "--interval=24h", "--grouping=instance=web-1"}, c.args[1:]...)
		if _, stderr := c.want(t, code); stderr != "" && code != 127 && code != 126 {
			t.Errorf("it said %q", stderr)
		}
		return groups(t, proxy)
	}
	const labels = `{instance="web-1",job="j"}`
	count := func(scrape string, success, failure, signal, start float64) {
		t.Helper()
		wantSamples(t, scrape, map[string]float64{
			`culvert_job_runs_total{instance="web-1",job="j",outcome="success"}`:     success,
			`culvert_job_runs_total{instance="web-1",job="j",outcome="failure"}`:     failure,
			`culvert_job_runs_total{instance="web-1",job="j",outcome="signal"}`:      signal,
			`culvert_job_runs_total{instance="web-1",job="j",outcome="start_error"}`: start,
		})
	}

	// A failure first: nothing says when it succeeded, because it never did.
	scrape := run(3, "sh", "-c", "exit 3")
	count(scrape, 0, 1, 0, 0)
	wantSamples(t, scrape, map[string]float64{"culvert_job_exit_code" + labels: 3, "push_up" + labels: 1})
	if strings.Contains(scrape, "last_success") {
		t.Errorf("there was no success:\n%s", scrape)
	}

	scrape = run(0, "sh", "-c", "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done")
	count(scrape, 1, 1, 0, 0)
	wantSamples(t, scrape, map[string]float64{"culvert_job_exit_code" + labels: 0})
	start, duration := sample(t, scrape, "culvert_job_start_time_seconds"+labels), sample(t, scrape, "culvert_job_duration_seconds"+labels)
	success := sample(t, scrape, "culvert_job_last_success_time_seconds"+labels)
	now := float64(time.Now().UnixNano()) / 1e9
	if start < before || duration <= 0 || success < start || success > now {
		t.Errorf("start %v, duration %v, success %v; before %v, now %v", start, duration, success, before, now)
	}
	if sample(t, scrape, `culvert_job_cpu_seconds{instance="web-1",job="j",mode="user"}`) <= 0 {
		t.Error("no CPU time was taken")
	}
	if memory := sample(t, scrape, "culvert_job_peak_memory_bytes"+labels); memory < 100<<10 || memory > 10<<30 {
		t.Errorf("the peak memory is %v bytes", memory)
	}

	// What follows keeps the time of the success.
	for _, c := range []struct {
		command []string
		code    int
		counts  [4]float64
	}{
		{[]string{"sh", "-c", "exit 1"}, 1, [4]float64{1, 2, 0, 0}},
		{[]string{"sh", "-c", "kill -USR1 $$"}, 128 + int(syscall.SIGUSR1), [4]float64{1, 2, 1, 0}},
		{[]string{"no-such-program"}, 127, [4]float64{1, 2, 1, 1}},
		{[]string{"./no-such-program"}, 127, [4]float64{1, 2, 1, 2}},
		{[]string{"leak_test.go"}, 127, [4]float64{1, 2, 1, 3}},
		{[]string{"./leak_test.go"}, 126, [4]float64{1, 2, 1, 4}},
		{[]string{"/"}, 126, [4]float64{1, 2, 1, 5}},
	} {
		scrape = run(c.code, c.command...)
		count(scrape, c.counts[0], c.counts[1], c.counts[2], c.counts[3])
		wantSamples(t, scrape, map[string]float64{
			"culvert_job_exit_code" + labels:                 float64(c.code),
			"culvert_job_last_success_time_seconds" + labels: success,
		})
	}

	problems, err := promlint.New(strings.NewReader(regexp.MustCompile(`(?m)^(# .... |)push_.*\n`).ReplaceAllString(scrape, ""))).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("promlint: %v %v", err, problems)
	}
}

// TestRunEnds: the process ends as the job ended.
func TestRunEnds(t *testing.T) {
	t.Parallel()
	proxy := startPushProxy(t)
	for _, c := range []struct {
		script string
		signal syscall.Signal
		code   int
	}{
		{script: "exit 0"},
		{script: "exit 1", code: 1},
		{script: "exit 255", code: 255},
		{script: "kill -HUP $$", signal: syscall.SIGHUP},
		{script: "kill -INT $$", signal: syscall.SIGINT},
		{script: "kill -TERM $$", signal: syscall.SIGTERM},
		{script: "kill -KILL $$", signal: syscall.SIGKILL},
		{script: "kill -PIPE $$", code: 141},
		{script: "ulimit -c 0; kill -QUIT $$", code: 131},
		{script: "ulimit -c 0; kill -SEGV $$", code: 139},
	} {
		state, _, stderr := job(proxy, "sh", "-c", c.script).do(t)
		status := state.Sys().(syscall.WaitStatus)
		switch {
		case c.signal != 0 && (!status.Signaled() || status.Signal() != c.signal):
			t.Errorf("%s: %v, want signal %d", c.script, state, c.signal)
		case c.signal == 0 && (!status.Exited() || status.ExitStatus() != c.code):
			t.Errorf("%s: %v, want exit code %d", c.script, state, c.code)
		}
		if stderr != "" {
			t.Errorf("%s: it said %q", c.script, stderr)
		}
	}
	wantSamples(t, groups(t, proxy), map[string]float64{
		`culvert_job_runs_total{instance="",job="j",outcome="signal"}`: 7,
		`culvert_job_exit_code{instance="",job="j"}`:                   139,
	})
}

// running is a culvert-client in the midst of a job.
type running struct {
	*exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
}

func (c call) start(t *testing.T) *running {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	r := &running{Cmd: c.command(ctx)}
	r.Cmd.Stdin = nil
	r.Cmd.Stderr = t.Output()
	var err error
	if r.stdin, err = r.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := r.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.out = bufio.NewReader(out)
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *running) wantLine(t *testing.T, want string) {
	t.Helper()
	if line, err := r.out.ReadString('\n'); line != want+"\n" {
		t.Fatalf("got %q, %v, want the line %q", line, err, want)
	}
}

func (r *running) wantEnd(t *testing.T, code int) {
	t.Helper()
	if rest, err := io.ReadAll(r.out); err != nil || len(rest) > 0 {
		t.Errorf("it wrote too much: %q, %v", rest, err)
	}
	_ = r.Wait() // the state tells
	if r.ProcessState.ExitCode() != code {
		t.Errorf("it ended with %v, want exit code %d", r.ProcessState, code)
	}
}

// TestRunPassesSignalsOn: each once.
func TestRunPassesSignalsOn(t *testing.T) {
	t.Parallel()
	proxy := startPushProxy(t)
	r := job(proxy, "env", childName+"=signals", os.Args[0]).start(t)
	r.wantLine(t, "ready")
	for _, s := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGTERM} {
		if err := r.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
		r.wantLine(t, s.String())
	}
	r.stdin.Close()
	r.wantEnd(t, 7)
	wantSamples(t, groups(t, proxy), map[string]float64{`culvert_job_exit_code{instance="",job="j"}`: 7})
}

// TestRunKeepsIgnoredSignals: nohup works as without culvert-client.
func TestRunKeepsIgnoredSignals(t *testing.T) {
	t.Parallel()
	proxy := startPushProxy(t)
	c := job(proxy, "sh", "-c", "kill -HUP $PPID; kill -HUP $$; kill -INT $$; echo alive")
	c.prefix = []string{"sh", "-c", `trap "" HUP INT; exec "$@"`, "sh"}
	if stdout, stderr := c.want(t, 0); stdout != "alive\n" || stderr != "" {
		t.Errorf("got %q, and %q", stdout, stderr)
	}
}

// TestRunPassesFilesOn: standard files are the job's own, and nothing is copied.
func TestRunPassesFilesOn(t *testing.T) {
	t.Parallel()
	proxy := startPushProxy(t)
	c := job(proxy, "sh", "-c", "cat; echo to stderr >&2")
	c.stdin = "from stdin\n"
	_, stdout, stderr := c.do(t)
	if stdout != "from stdin\n" || stderr != "to stderr\n" {
		t.Errorf("got %q and %q", stdout, stderr)
	}
	c = job(proxy, "sh", "-c", `echo "$FOO|$CULVERT_METRICS_FILE|$OLD"; pwd`)
	c.env = []string{"FOO=a b", "CULVERT_METRICS_FILE=/outer", "OLD=x"}
	stdout, _ = c.want(t, 0)
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^a b\|/.*/culvert-client-run-.*/metrics.prom\|x\n` + regexp.QuoteMeta(here) + "\n$").MatchString(stdout) {
		t.Errorf("the job's environment: %q", stdout)
	}
	// A PATH that has the current directory is the user's wish.
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "here"), []byte("#!/bin/sh\necho here\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	c = job(proxy, "here")
	c.prefix = []string{"sh", "-c", `cd "$0" && PATH=.:$PATH exec "$@"`, dir}
	if stdout, _ := c.want(t, 0); stdout != "here\n" {
		t.Errorf("the job wrote %q", stdout)
	}
	c = job(proxy, "printf", "%s\n", "", "@file", "-h", "--", "--job=x", "a  b")
	if stdout, _ := c.want(t, 0); stdout != "\n@file\n-h\n--\n--job=x\na  b\n" {
		t.Errorf("the job's arguments: %q", stdout)
	}
}

// TestRunLargeOutput has a job write 1 GB: none of it goes through culvert-client.
func TestRunLargeOutput(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("the memory of a process is read from /proc, which only Linux has")
	}
	proxy := startPushProxy(t)
	const size = 1 << 30
	r := job(proxy, "sh", "-c", fmt.Sprintf("readlink /proc/self/fd/1; head -c %d /dev/zero; echo; echo written; read line", size)).start(t)
	ours, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/1", r.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	r.wantLine(t, ours) // the job writes to the same pipe
	if n, err := io.CopyN(io.Discard, r.out, size); err != nil {
		t.Fatalf("%d bytes came: %v", n, err)
	}
	r.wantLine(t, "")
	r.wantLine(t, "written")
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", r.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status)
	if m == nil {
		t.Fatalf("no VmHWM in:\n%s", status)
	}
	kib, err := strconv.Atoi(string(m[1]))
	if err != nil || kib > 100<<10 { // with -race it takes about twice what it does without
		t.Errorf("culvert-client took %d MiB, %v", kib>>10, err)
	}
	t.Logf("culvert-client took %d MiB", kib>>10)
	io.WriteString(r.stdin, "end\n")
	r.wantEnd(t, 0)
}

// TestRunWithoutAnswer: whatever becomes of the push, the job's exit code stays.
func TestRunWithoutAnswer(t *testing.T) {
	t.Parallel()
	proxy := startPushProxy(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() }) // it never accepts
	hang := make(chan struct{})
	silent := serve(t, proxy, func(http.ResponseWriter, *http.Request, http.Handler) { <-hang })
	t.Cleanup(func() { close(hang) })
	busy := serve(t, proxy, func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
		w.Header().Set("Retry-After", "3600")
		http.Error(w, "come\nlater", http.StatusServiceUnavailable)
	})
	moved := serve(t, proxy, func(w http.ResponseWriter, r *http.Request, _ http.Handler) {
		http.Redirect(w, r, "http://elsewhere.invalid/", http.StatusFound)
	})
	for _, c := range []struct{ name, url, want string }{
		{"hangs", silent.URL, "no answer in time"},
		{"never accepts", "http://" + ln.Addr().String(), "no answer in time"},
		{"is not there", "http://127.0.0.1:1", "connection refused"},
		{"no socket", "unix:" + filepath.Join(t.TempDir(), "none"), "no such file"},
		{"503 and a long wait", busy.URL, "503 Service Unavailable: come later (tried once"},
		{"redirects", moved.URL, "http://elsewhere.invalid/"},
		{"no push endpoint", proxy + "/elsewhere", "is that the address of a push endpoint?"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			run := job(c.url, "sh", "-c", "echo x 1 >$CULVERT_METRICS_FILE; exit 5")
			run.args[3] = "--push-timeout=9s"
			_, stderr := run.want(t, 5)
			if !strings.Contains(stderr, c.want) || !strings.Contains(stderr, "push to "+c.url) {
				t.Errorf("it said %q, want %q", stderr, c.want)
			}
		})
	}
}

// TestRunTriesAgain: what was not taken is pushed again, and counts once.
func TestRunTriesAgain(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		first func(w http.ResponseWriter, r *http.Request, pass http.Handler)
		runs  float64
		want  string
	}{
		{"503, then taken", func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			http.Error(w, "later", http.StatusServiceUnavailable)
		}, 1, ""},
		{"429 with Retry-After", func(w http.ResponseWriter, _ *http.Request, _ http.Handler) {
			w.Header().Set("Retry-After", "1")
			http.Error(w, "later", http.StatusTooManyRequests)
		}, 1, ""},
		{"taken, and the answer lost", func(_ http.ResponseWriter, r *http.Request, pass http.Handler) {
			pass.ServeHTTP(httptest.NewRecorder(), r)
			panic(http.ErrAbortHandler)
		}, 1, "this run may be missing in culvert_job_runs_total"},
		{"taken, and 504", func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
			pass.ServeHTTP(httptest.NewRecorder(), r)
			w.WriteHeader(http.StatusGatewayTimeout)
		}, 1, "this run may be missing in culvert_job_runs_total"},
		{"cut off before it was taken", func(http.ResponseWriter, *http.Request, http.Handler) {
			panic(http.ErrAbortHandler)
		}, 0, "this run may be missing in culvert_job_runs_total"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			proxy := startPushProxy(t)
			var tries atomic.Int64
			s := serve(t, proxy, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
				if tries.Add(1) == 1 {
					c.first(w, r, pass)
					return
				}
				pass.ServeHTTP(w, r)
			})
			_, stderr := job(s.URL, "true").want(t, 0)
			if !strings.Contains(stderr, c.want) || c.want == "" && stderr != "" {
				t.Errorf("it said %q, want %q", stderr, c.want)
			}
			if tries.Load() != 2 {
				t.Errorf("it tried %d times", tries.Load())
			}
			scrape := groups(t, proxy)
			if c.runs > 0 {
				wantSamples(t, scrape, map[string]float64{`culvert_job_runs_total{instance="",job="j",outcome="success"}`: c.runs})
			}
			wantSamples(t, scrape, map[string]float64{`culvert_job_exit_code{instance="",job="j"}`: 0})
			sample(t, scrape, `culvert_job_last_success_time_seconds{instance="",job="j"}`)
		})
	}
}

// TestRunRefused: another group has the metric with another type.
func TestRunRefused(t *testing.T) {
	t.Parallel()
	proxy := startPushProxy(t)
	c := call{args: []string{"push", "--job=other", "--push-url=" + proxy}, stdin: "# TYPE culvert_job_exit_code counter\nculvert_job_exit_code 1\n"}
	c.want(t, 0)
	_, stderr := job(proxy, "sh", "-c", "exit 9").want(t, 9)
	if !strings.Contains(stderr, "400 Bad Request") || !strings.Contains(stderr, "culvert_job_exit_code") || strings.Count(stderr, "\n") != 1 {
		t.Errorf("it said %q", stderr)
	}
	if at := sample(t, groups(t, proxy), `push_failure_time_seconds{instance="",job="j"}`); at <= 0 {
		t.Errorf("the failure was at %v", at)
	}
}

// TestRunIsInterrupted: a push that hangs doesn't outlive a signal for long.
func TestRunIsInterrupted(t *testing.T) {
	t.Parallel()
	hang, asked := make(chan struct{}), make(chan struct{}, 100)
	s := serve(t, "http://unused.invalid", func(http.ResponseWriter, *http.Request, http.Handler) { asked <- struct{}{}; <-hang })
	t.Cleanup(func() { close(hang) })
	for _, signals := range []int{1, 2} {
		c := job(s.URL, "sh", "-c", "exit 4")
		c.args[3] = "--push-timeout=1h"
		r := c.start(t)
		select {
		case <-asked:
		case <-time.After(patience):
			t.Fatal("nothing was pushed")
		}
		for range signals {
			if err := r.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
		r.wantEnd(t, 4)
	}
}

func TestRunMetricsFile(t *testing.T) {
	t.Parallel()
	proxy := startPushProxy(t)
	const own = `culvert_job_exit_code{instance="",job="%s"}`
	for _, c := range []struct {
		name, script string
		series       string // that is there with the value 3
		want         string // on standard error
	}{
		{"none", "true", "", ""},
		{"empty", `: >"$CULVERT_METRICS_FILE"`, "", ""},
		{"text", `printf '# TYPE files gauge\nfiles{kind="a"} 3\n' >"$CULVERT_METRICS_FILE"`, `files{instance="",job="text",kind="a"}`, ""},
		{"moved", `echo moved 3 >"$CULVERT_METRICS_FILE.tmp"; mv "$CULVERT_METRICS_FILE.tmp" "$CULVERT_METRICS_FILE"`, `moved{instance="",job="moved"}`, ""},
		{"openmetrics", `printf '# TYPE things counter\nthings_total 3\n# EOF\n' >"$CULVERT_METRICS_FILE"`, `things_total{instance="",job="openmetrics"}`, ""},
		{"bad", `printf 'a 1\nb\n' >"$CULVERT_METRICS_FILE"`, "", "line 2"},
		{"bad_openmetrics", `printf '# TYPE b counter\nb 1\n# EOF\n' >"$CULVERT_METRICS_FILE"`, "", "line 2"},
		{"no_line_feed", `printf 'a 1' >"$CULVERT_METRICS_FILE"`, "", "line 1, the last one, does not end with a line feed"},
		{"timestamp", `echo a 1 1 >"$CULVERT_METRICS_FILE"`, "", "timestamps are not allowed"},
		{"ours", `echo culvert_job_exit_code 0 >"$CULVERT_METRICS_FILE"`, "", "choose another"},
		{"huge", `head -c 17000000 /dev/zero | tr '\0' '#' >"$CULVERT_METRICS_FILE"`, "", "more than 16 MiB"},
		{"endless", `ln -s /dev/zero "$CULVERT_METRICS_FILE"`, "", "no regular file"},
		{"fifo", `mkfifo "$CULVERT_METRICS_FILE"`, "", "no regular file"},
		{"directory", `mkdir "$CULVERT_METRICS_FILE"`, "", "no regular file"},
		{"refused", `printf '# TYPE files counter\nfiles 3\n' >"$CULVERT_METRICS_FILE"`, "", "400 Bad Request"}, // after "text"
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			_, stderr := call{env: []string{"TMPDIR=" + dir}, args: []string{"run", "--job=" + c.name, "--push-url=" + proxy, "--", "sh", "-c", c.script + "; exit 6"}}.want(t, 6)
			if c.want == "" && stderr != "" || !strings.Contains(stderr, c.want) || strings.Count(stderr, "\n") > 1 {
				t.Errorf("it said %q, want %q", stderr, c.want)
			}
			scrape := groups(t, proxy)
			wantSamples(t, scrape, map[string]float64{fmt.Sprintf(own, c.name): 6})
			if c.series != "" {
				wantSamples(t, scrape, map[string]float64{c.series: 3})
			}
			failed := sample(t, scrape, fmt.Sprintf(`push_failure_time_seconds{instance="",job=%q}`, c.name))
			if pushed := sample(t, scrape, fmt.Sprintf(`push_time_seconds{instance="",job=%q}`, c.name)); (failed > pushed) != (c.name == "refused") {
				t.Errorf("pushed at %v, failed at %v", pushed, failed)
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v %v", left, err)
			}
		})
	}
	t.Run("nowhere", func(t *testing.T) {
		c := job(proxy, "sh", "-c", `echo "[$CULVERT_METRICS_FILE]"`)
		c.env = []string{"TMPDIR=/no/such/directory"}
		stdout, stderr := c.want(t, 0)
		if stdout != "[]\n" || !strings.Contains(stderr, "the job has no CULVERT_METRICS_FILE") {
			t.Errorf("got %q, and %q", stdout, stderr)
		}
	})
}

// TestPushURLs: every kind of endpoint, and where it is named.
func TestPushURLs(t *testing.T) {
	t.Parallel()
	proxy := startPushProxy(t)
	socket := filepath.Join(t.TempDir(), "push.sock")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	onSocket := serve(t, proxy, func(w http.ResponseWriter, r *http.Request, pass http.Handler) { pass.ServeHTTP(w, r) })
	server := &http.Server{Handler: onSocket.Config.Handler}
	ended := make(chan struct{})
	go func() { defer close(ended); server.Serve(ln) }()
	t.Cleanup(func() { server.Close(); <-ended })

	secured := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if user, password, _ := r.BasicAuth(); user != "u" || password != "p w" {
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		onSocket.Config.Handler.ServeHTTP(w, r)
	}))
	secured.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	secured.StartTLS()
	t.Cleanup(secured.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secured.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	withUser := strings.Replace(secured.URL, "https://", "https://u:p%20w@", 1)
	for i, c := range []struct {
		flags  []string
		env    string
		stderr string
		pushed bool // where something is said
	}{
		{flags: []string{"--push-url=" + proxy}},
		{flags: []string{"--push-url=" + proxy + "/"}},
		{flags: []string{"--push-url=" + strings.TrimPrefix(proxy, "http://")}},
		{flags: []string{"--push-url=unix:" + socket}},
		{env: "unix:" + socket},
		{flags: []string{"--push-url=" + proxy}, env: "http://unused.invalid"},
		{env: withUser, flags: []string{"--tls.cacert=" + ca}},
		{flags: []string{"--push-url=" + withUser, "--tls.cacert=" + ca}, stderr: "in the list of processes", pushed: true},
		{flags: []string{"--push-url=" + secured.URL, "--tls.cacert=" + ca}, stderr: "401 Unauthorized: who are you?"},
		{flags: []string{"--push-url=" + withUser}, stderr: "certificate"},
		{flags: []string{"--push-url=" + withUser, "--tls.cacert=/nowhere.pem"}, stderr: "nothing will be pushed: TLS for pushes"},
		{env: "ftp://u:secret@x", stderr: "nothing will be pushed: push URL"},
	} {
		name := fmt.Sprintf("case%d", i)
		_, stderr := call{
			env:  []string{"CULVERT_PUSH_URL=" + c.env},
			args: append(append([]string{"run", "--job=" + name}, c.flags...), "--", "true"),
		}.want(t, 0)
		if c.stderr == "" && stderr != "" || !strings.Contains(stderr, c.stderr) || strings.Contains(stderr, "p%20w") || strings.Contains(stderr, "secret") {
			t.Errorf("%v %s: it said %q, want %q", c.flags, c.env, stderr, c.stderr)
		}
		if pushed := strings.Contains(groups(t, proxy), `culvert_job_exit_code{instance="",job="`+name+`"} 0`); pushed != (c.stderr == "" || c.pushed) {
			t.Errorf("%v %s: pushed %t", c.flags, c.env, pushed)
		}
	}
}

// TestRunUsage: what can't be understood is said before anything is run.
func TestRunUsage(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ args, want string }{
		{"run -- touch FILE", "--job"},
		{"run --job=j", "command"},
		{"run --job=j touch -c FILE", "put -- in front"},
		{"run --job= -- touch FILE", "--job is empty"},
		{"run --job=j --grouping=x -- touch FILE", "KEY=VALUE"},
		{"run --job=j --grouping=job=x -- touch FILE", "--job"},
		{"run --job=j --grouping=__x=y -- touch FILE", "__x"},
		{"run --job=j --interval=soon -- touch FILE", `interval "soon"`},
		{"run --job=j --ttl=1y1 -- touch FILE", `ttl "1y1"`},
		{"run --job=j --push-url=ftp://x -- touch FILE", "ftp"},
		{"run --job=j --push-url=unix: -- touch FILE", "path is missing"},
		{"run --job=j --push-timeout=0 -- touch FILE", "push-timeout"},
		{"run --job=j --push-timeout=-1s -- touch FILE", "push-timeout"},
		{"run --job=j --allow=9100 -- touch FILE", "--allow is the agent's"},
		{"--proxy-url=http://a run --job=j -- touch FILE", "--proxy-url is the agent's"},
	} {
		file := filepath.Join(t.TempDir(), "file")
		_, stderr := call{args: strings.Fields(strings.Replace(c.args, "FILE", file, 1))}.want(t, codeNoRun)
		if !strings.Contains(stderr, c.want) {
			t.Errorf("%s: it said %q, want %q", c.args, stderr, c.want)
		}
		if _, err := os.Stat(file); err == nil {
			t.Errorf("%s: the job was run", c.args)
		}
	}
}

func TestPush(t *testing.T) {
	t.Parallel()
	proxy := startPushProxy(t)
	push := func(t *testing.T, code int, body string, args ...string) string {
		t.Helper()
		stdout, stderr := call{
			env: []string{"CULVERT_PUSH_URL=" + proxy}, stdin: body, args: append([]string{"push", "--job=j"}, args...),
		}.want(t, code)
		if stdout != "" || code == 0 && stderr != "" {
			t.Errorf("it said %q and %q", stdout, stderr)
		}
		return stderr
	}
	push(t, 0, "a 1\nb 2\n")
	push(t, 0, "b 3\n", "--method=post", "-")
	wantSamples(t, groups(t, proxy), map[string]float64{`a{instance="",job="j"}`: 1, `b{instance="",job="j"}`: 3})
	push(t, 0, "b 4\n", "--interval=10m", "--ttl=1h")
	scrape := groups(t, proxy)
	wantSamples(t, scrape, map[string]float64{`b{instance="",job="j"}`: 4, `push_up{instance="",job="j"}`: 1})
	if strings.Contains(scrape, "a{") {
		t.Errorf("put did not replace:\n%s", scrape)
	}
	file := filepath.Join(t.TempDir(), "metrics")
	if err := os.WriteFile(file, []byte("# TYPE c counter\nc_total 5\n# EOF\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	push(t, 0, "", "--grouping=path=/srv/data", "--grouping=empty=", "--grouping=up=..", "--grouping=größe=a b%+?#", "--interval=0", file)
	wantSamples(t, groups(t, proxy), map[string]float64{
		`c_total{empty="",gr__e="a b%+?#",instance="",job="j",path="/srv/data",up=".."}`: 5,
	})

	for _, c := range []struct {
		body string
		args []string
		code int
		want string
	}{
		{"a 1\nb x\n", nil, codeBadInput, "standard input: text format parsing error in line 2"},
		{"a 1\r\n", nil, codeBadInput, "line 1 ends with CR LF"},
		{"a 1", nil, codeBadInput, "line 1, the last one"},
		{"a 1\na 2\n", nil, codeBadInput, "already seen"},
		{"", []string{"/no/such/file"}, codeBadInput, "/no/such/file"},
		{"", []string{"/"}, codeBadInput, "directory"},
		{"", []string{"--method=get"}, codeBadInput, "get"},
		{"", []string{"--target=a=http://b"}, codeBadInput, "--target is the agent's"},
		{strings.Repeat("#", maxPush+1), nil, codeBadInput, "more than 64 MiB"},
		{"# TYPE c_total gauge\nc_total 1\n", nil, codeRefused, "400 Bad Request"},
		{"a 1\n", []string{"--push-url=http://127.0.0.1:1", "--push-timeout=3s"}, codeNotPushed, "connection refused"},
	} {
		if stderr := push(t, c.code, c.body, c.args...); !strings.Contains(stderr, c.want) {
			t.Errorf("%v: it said %q, want %q", c.args, stderr, c.want)
		}
	}

	t.Run("tries again", func(t *testing.T) {
		var tries atomic.Int64
		s := serve(t, proxy, func(w http.ResponseWriter, r *http.Request, pass http.Handler) {
			if tries.Add(1) == 1 {
				http.Error(w, "later", http.StatusServiceUnavailable)
				return
			}
			pass.ServeHTTP(w, r)
		})
		push(t, 0, "again 1\n", "--push-url="+s.URL)
		sample(t, groups(t, proxy), `again{instance="",job="j"}`)
	})
	t.Run("is interrupted", func(t *testing.T) {
		r := call{args: []string{"push", "--job=j", "--push-url=" + proxy}}.start(t)
		if _, err := io.Copy(r.stdin, bytes.NewReader(make([]byte, 1<<20))); err != nil { // it reads
			t.Fatal(err)
		}
		if err := r.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		r.wantEnd(t, codeNotPushed)
	})
}

// TestPusherNeedsDeadline: no push goes on for ever.
func TestPusherNeedsDeadline(t *testing.T) {
	t.Parallel()
	f, _, err := parseFlags([]string{"push", "--job=j"})
	if err != nil {
		t.Fatal(err)
	}
	p, _, err := f.pusher()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Push(context.Background(), jobrun.Push{Method: "PUT"}); err == nil {
		t.Error("a push without a deadline")
	}
}

// TestCheckConfigExitCode: 1 where something is wrong, and each line says whose it is.
func TestCheckConfigExitCode(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "client.yml")
	if err := os.WriteFile(file, []byte("alow: [1]\nfqdm: a\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, stderr := (call{args: []string{"check-config", "--config.file=" + file}}).want(t, 1); strings.Count(stderr, "\n") != 2 {
		t.Errorf("it said %q", stderr)
	}
	if stdout, stderr := (call{args: []string{"check-config", "--proxy-url=http://a", "--fqdn=web-1"}}).want(t, 0); !strings.Contains(stdout, "web-1") || stderr != "" {
		t.Errorf("it said %q and %q", stdout, stderr)
	}
}
