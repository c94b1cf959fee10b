package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// TestPrometheus has a real Prometheus scrape the proxy with prometheus.yml, and
// waits for the alerts of alerts.yml.
func TestPrometheus(t *testing.T) {
	program := externaltest.Program(t, "prometheus", "prometheus")
	proxy := startProxy(t)

	pushTo := func(group, body string, header http.Header) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, proxy+"/metrics/job/"+group, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header = header
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp
	}
	now := time.Now().Unix()
	daysAgo := func(days int64) string { return fmt.Sprint(now - days*24*60*60) }
	for _, push := range []struct {
		group, body string
		header      http.Header
		status      int
	}{
		{"backup/instance/good", "backup_last_success_time_seconds " + daysAgo(0) + "\n", http.Header{"Culvert-Interval": {"24h"}}, 200},
		{"backup/instance/failing", "backup_last_success_time_seconds " + daysAgo(2) + "\n", http.Header{"Culvert-Interval": {"24h"}}, 200},
		{"overdue", "x 1\n", http.Header{"Culvert-Interval": {"24h"}, "Culvert-Push-Time": {daysAgo(2)}}, 200},
		{"refused", "x 1 1\n", nil, 400},
	} {
		if resp := pushTo(push.group, push.body, push.header); resp.StatusCode != push.status {
			t.Fatalf("the push to %s got %s, want %d", push.group, resp.Status, push.status)
		}
	}

	url := startPrometheus(t, program, strings.TrimPrefix(proxy, "http://"))
	var alerts struct {
		Alerts []struct {
			Labels map[string]string
			State  string
		}
	}
	want := map[string]bool{
		"BackupTooOld backup/failing": true,
		"BatchJobOverdue overdue/":    true,
		"BatchPushRefused refused/":   true,
	}
	await(t, func() string {
		ask(t, url+"/api/v1/alerts", &alerts)
		firing := map[string]bool{}
		for _, a := range alerts.Alerts {
			firing[fmt.Sprintf("%s %s/%s", a.Labels["alertname"], a.Labels["job"], a.Labels["instance"])] = a.State == "firing"
		}
		if fmt.Sprint(firing) != fmt.Sprint(want) {
			return fmt.Sprintf("the alerts are %v, want %v", firing, want)
		}
		return ""
	})

	// The labels are those that were pushed, without Prometheus's own.
	var answer struct {
		Result []struct{ Metric map[string]string }
	}
	ask(t, url+"/api/v1/query?query=x", &answer)
	if got := fmt.Sprint(answer.Result); got != "[{map[__name__:x job:overdue]}]" {
		t.Errorf("x is %s", got)
	}
	ask(t, url+"/api/v1/query?query=push_up==1", &answer)
	if len(answer.Result) != 2 {
		t.Errorf("push_up is 1 for %v", answer.Result)
	}
	ask(t, url+"/api/v1/query?query=culvert_proxy_push_groups==4", &answer)
	if len(answer.Result) != 1 || answer.Result[0].Metric["job"] != "culvert" {
		t.Errorf("the proxy's own metrics are %v", answer.Result)
	}
}

// startPrometheus starts Prometheus with this folder's configuration, but scrapes
// the given address, once a second. It returns its URL.
func startPrometheus(t *testing.T, program, address string) string {
	t.Helper()
	dir := t.TempDir()
	monitoring, err := filepath.Abs("../monitoring")
	if err != nil {
		t.Fatal(err)
	}
	for name, edit := range map[string]func(string) string{
		"prometheus.yml": func(text string) string {
			return "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}\n" +
				strings.NewReplacer("[localhost:8080]", "["+address+"]", "../monitoring/", monitoring+"/").Replace(text)
		},
		"alerts.yml": func(text string) string { return text },
	} {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name), edit(string(text)))
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
	var mu sync.Mutex // protects lines
	var lines []string
	read := make(chan struct{})
	go func() {
		defer close(read)
		for scanner := bufio.NewScanner(log); scanner.Scan(); {
			mu.Lock()
			lines = append(lines, scanner.Text())
			mu.Unlock()
			if m := listening.FindStringSubmatch(scanner.Text()); m != nil && len(found) == 0 {
				found <- m[1]
			}
		}
	}()
	t.Cleanup(func() { // the test's context has ended by now
		<-read
		_ = cmd.Wait() // ended by us
		if t.Failed() {
			mu.Lock()
			defer mu.Unlock()
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

// ask gets the data of an answer of Prometheus's API, and nothing of what data held
// before: decoding adds to maps. While Prometheus is starting, it has none.
func ask(t *testing.T, url string, data any) {
	t.Helper()
	reflect.ValueOf(data).Elem().SetZero()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
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
