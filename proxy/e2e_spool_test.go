package main_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/protocol/externaltest"
)

// spooling is an agent that takes pushes, and survives kills.
type spooling struct {
	*process
	t      *testing.T
	prefix []string // in front of the program
	args   []string
	client *http.Client
	socket string
}

// startSpooling starts an agent whose pushes come by a socket.
func startSpooling(t *testing.T, proxyURL, name string, prefix []string, args ...string) *spooling {
	t.Helper()
	if err := programs(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s := &spooling{t: t, prefix: prefix, socket: filepath.Join(dir, "s")}
	s.args = append([]string{"--proxy-url=" + proxyURL, "--fqdn=" + name, "--metrics-addr=", "--push.listen-address=unix:" + s.socket}, args...)
	if !slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "--storage.path=") }) {
		s.args = append(s.args, "--storage.path="+dir)
	}
	transport := &http.Transport{MaxIdleConnsPerHost: 64, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", s.socket)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	s.client = &http.Client{Timeout: time.Minute, Transport: transport}
	s.restart()
	return s
}

// restart starts it, again after a kill.
func (s *spooling) restart() {
	s.t.Helper()
	argv := append(append(slices.Clone(s.prefix), filepath.Join(programDir, "culvert-client")), s.args...)
	s.process = start(s.t, "culvert-client", argv[0], argv[1:]...)
	s.awaitLog(`msg="Taking pushes"`)
}

// value returns the sum of the series of a family of the agent's own.
func (s *spooling) value(name string) (sum float64, err error) {
	a, err := fetch(s.client, "http://localhost/metrics", "")
	if err != nil {
		return 0, err
	}
	for _, m := range regexp.MustCompile(`(?m)^`+name+`(?:\{.*\})? (\S+)$`).FindAllStringSubmatch(a.body, -1) {
		v, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return 0, err
		}
		sum += v
	}
	return sum, nil
}

// awaitRelayed waits until nothing waits in the spool.
func (s *spooling) awaitRelayed() {
	s.t.Helper()
	eventually(s.t, 2*time.Minute, func() error {
		n, err := s.value("culvert_client_spool_waiting_pushes")
		if err == nil && n > 0 {
			err = fmt.Errorf("%v pushes wait in the spool", n)
		}
		return err
	})
}

// relayedOp is a push that is to be relayed.
type relayedOp struct {
	method, path, body string
	bad                bool // the store refuses it
}

// opsOf returns what one of the pushers pushes: n requests of every kind to groups that
// are its own.
func opsOf(pusher, n int) []relayedOp {
	job := fmt.Sprintf("p%d", pusher)
	histogram := func(labels string) string {
		return fmt.Sprintf("# TYPE e2e_wait_seconds histogram\ne2e_wait_seconds_bucket{%[1]sle=\"1\"} 1\ne2e_wait_seconds_bucket{%[1]sle=\"+Inf\"} 2\ne2e_wait_seconds_sum{%[2]s} 3\ne2e_wait_seconds_count{%[2]s} 2\n", labels, strings.TrimSuffix(labels, ","))
	}
	ops := make([]relayedOp, n)
	for i := range ops {
		group := "/metrics/job/" + job + "-" + strconv.Itoa(i%23)
		switch i % 6 {
		case 0:
			ops[i] = relayedOp{method: http.MethodPost, path: "/metrics/job/" + job + "?aggregate=sum",
				body: fmt.Sprintf("# TYPE e2e_sum_total counter\ne2e_sum_total %d\n", i) + histogram("")}
		case 1:
			ops[i] = relayedOp{method: http.MethodPut, path: group + "?ttl=30d", body: stamped(i, "")}
		case 2:
			ops[i] = relayedOp{method: http.MethodPost, path: group, body: fmt.Sprintf("e2e_other %d\n", i)}
		case 3:
			ops[i] = relayedOp{method: http.MethodPost, path: "/api/v1/push?group_by=job,zone&aggregate=sum&gauge=max",
				body: fmt.Sprintf("# TYPE e2e_sum_total counter\ne2e_sum_total{job=\"%[1]s\",zone=\"a\"} 1\ne2e_sum_total{job=\"%[1]s\",zone=\"b\"} 2\n# TYPE e2e_most gauge\ne2e_most{job=\"%[1]s\",zone=\"a\"} %[2]d\n", job, i*7919%1000)}
		case 4:
			ops[i] = relayedOp{method: http.MethodDelete, path: group}
		case 5:
			ops[i] = relayedOp{method: http.MethodPost, path: "/metrics/job/" + job + "/zone/own%20one?aggregate=sum&interval=1h",
				body: fmt.Sprintf("# TYPE e2e_sum_total counter\ne2e_sum_total{of=\"%d\"} 1\n", i%3)}
		}
		if i == n/2 { // a counter elsewhere
			ops[i] = relayedOp{method: http.MethodPost, path: "/metrics/job/" + job + "/zone/bad", body: "# TYPE e2e_sum_total gauge\ne2e_sum_total 1\n", bad: true}
		}
	}
	return ops
}

// spoolRun sends the pushes of several pushers, and knows when each was made.
type spoolRun struct {
	t      *testing.T
	ops    [][]relayedOp
	begin  time.Time
	lasted time.Duration
}

// madeAt is the time that a push carries. Those of the first pusher carry none.
func (r *spoolRun) madeAt(pusher, i int) []string {
	if pusher == 0 {
		return nil
	}
	at := r.begin.Add(time.Duration(i) * time.Millisecond)
	return []string{gateway.HeaderPushTime, fmt.Sprintf("%d.%09d", at.Unix(), at.Nanosecond())}
}

// send sends the pushes from one number of each pusher up to another.
func (r *spoolRun) send(client *http.Client, base string, from, to int, check func(op relayedOp, a answer) error) {
	r.t.Helper()
	var all sync.WaitGroup
	for pusher, ops := range r.ops {
		all.Go(func() {
			for i := from; i < to; i++ {
				a, err := send(client, ops[i].method, base+ops[i].path, ops[i].body, r.madeAt(pusher, i)...)
				if err == nil {
					err = check(ops[i], a)
				}
				if err != nil {
					r.t.Errorf("push %d of pusher %d: %v", i, pusher, err)
					return
				}
			}
		})
	}
	all.Wait()
	if r.t.Failed() {
		r.t.FailNow()
	}
}

func wasSpooled(_ relayedOp, a answer) error {
	if a.status != http.StatusAccepted {
		return fmt.Errorf("%d %s", a.status, a.body)
	}
	return nil
}

func wasStored(op relayedOp, a answer) error {
	want := http.StatusOK
	switch {
	case op.bad:
		want = http.StatusBadRequest
	case op.method == http.MethodDelete:
		want = http.StatusAccepted
	}
	if a.status != want {
		return fmt.Errorf("%d %s, want %d", a.status, a.body, want)
	}
	return nil
}

// compare checks that a store that pushes were relayed to has what one has that they were
// sent to without detours.
func (r *spoolRun) compare(relayed, straight string) {
	r.t.Helper()
	// Of the first pusher the times are those of the agent.
	loose := regexp.MustCompile(`^(push_time_seconds|push_failure_time_seconds)\{.*job="p0.*\} (\S+)$`)
	lines := func(url string, check bool) []string {
		var out []string
		for line := range strings.Lines(get(r.t, url+"/metrics?only=groups").body) {
			line = strings.TrimSpace(line)
			if m := loose.FindStringSubmatch(line); m != nil {
				at, err := strconv.ParseFloat(m[2], 64)
				made := time.UnixMicro(int64(at * 1e6))
				if err != nil || check && at != 0 && (made.Before(r.begin.Add(-time.Second)) || made.After(r.begin.Add(r.lasted+time.Second))) {
					r.t.Errorf("%s: this is not when it was pushed, %s to %s later", line, r.begin, r.lasted)
				}
				line = strings.TrimSuffix(line, m[2])
			}
			out = append(out, line)
		}
		slices.Sort(out)
		return out
	}
	got, want := lines(relayed, true), lines(straight, false)
	if slices.Equal(got, want) {
		return
	}
	for _, line := range got {
		if _, ok := slices.BinarySearch(want, line); !ok {
			r.t.Errorf("too much: %s", line)
		}
	}
	for _, line := range want {
		if _, ok := slices.BinarySearch(got, line); !ok {
			r.t.Errorf("missing: %s", line)
		}
	}
	if !r.t.Failed() {
		r.t.Error("there are lines that are there twice")
	}
}

const spoolPushers = 4

func newSpoolRun(t *testing.T, pushes int) *spoolRun {
	r := &spoolRun{t: t, begin: time.Now()}
	for pusher := range spoolPushers {
		r.ops = append(r.ops, opsOf(pusher, pushes/spoolPushers))
	}
	return r
}

// TestSpool: 10,000 pushes are made while the proxy is killed, comes back and is killed
// again, and the agent is killed too. The store then has what it would have without all
// that.
func TestSpool(t *testing.T) {
	t.Parallel()
	const pushes = 10_000
	storage, address := "--storage.path="+t.TempDir(), "--web.listen-address="+externaltest.FreeAddress(t)
	straight := startProxy(t)
	proxy := startProxy(t, storage, address)
	agent := startSpooling(t, proxy.url, web1, nil)
	agent.awaitLog(`msg=Connected`)
	run := newSpoolRun(t, pushes)
	each := pushes / spoolPushers
	run.send(agent.client, "http://localhost", 0, each/10, wasSpooled)
	proxy.kill()
	run.send(agent.client, "http://localhost", each/10, each/2+10, wasSpooled)
	agent.kill()
	agent.restart()
	run.send(agent.client, "http://localhost", each/2+10, each*9/10, wasSpooled)
	proxy = startProxy(t, storage, address)
	run.send(agent.client, "http://localhost", each*9/10, each, wasSpooled)
	run.lasted = time.Since(run.begin)
	for _, part := range []float64{0.8, 0.5} { // it dies while it takes what waited
		eventually(t, time.Minute, func() error {
			n, err := agent.value("culvert_client_spool_waiting_pushes")
			if err == nil && n > part*pushes {
				err = fmt.Errorf("%v pushes wait", n)
			}
			return err
		})
		proxy.kill()
		proxy = startProxy(t, storage, address)
	}
	back := time.Now()
	agent.awaitRelayed()
	t.Logf("the last half was relayed within %s", time.Since(back).Round(time.Millisecond))

	run.send(keepAlive(t, false), straight.url, 0, each, wasStored)
	run.compare(proxy.url, straight.url)
	if n, err := agent.value(`culvert_client_relayed_pushes_total\{outcome="refused",.*\}`); err != nil || n != spoolPushers {
		t.Errorf("%v pushes were dropped (%v), want %d", n, err, spoolPushers)
	}
	agent.awaitLog(`it was dropped.* job=p1 .*status=400 .*e2e_sum_total`)
	if strings.Contains(agent.log(), "DATA RACE") {
		t.Error("there is a data race")
	}
	agent.stop()
}

// TestPrometheusMachineGroups: what a cron job pushes to the agent of its machine is
// scraped with the agent, and goes with it: nothing is left behind when it stops, or is
// renamed.
func TestPrometheusMachineGroups(t *testing.T) {
	t.Parallel()
	proxy := startProxy(t, "--agent.forget-after=10s")
	agent := startSpooling(t, proxy.url, "old.example.net", nil, "--push.listen-address=127.0.0.1:0")
	agent.awaitLog(`msg=Connected`)
	tcp := agent.awaitLog(`msg="Taking pushes" address=(127\S+)`)[1]
	prom := startPrometheus(t, fmt.Sprintf(`
- job_name: agents
  proxy_url: %[1]s
  http_sd_configs:
  - {url: "%[1]s/targets", refresh_interval: 1s}
- job_name: pushed
  honor_labels: true
  static_configs: [{targets: [%[2]q]}]
  params: {only: [groups]}
`, proxy.url, proxy.address))
	cron := func(url string, args ...string) {
		t.Helper()
		args = append([]string{"run", "--job=backup", "--interval=24h", "--push-url=" + url}, args...)
		if out, err := exec.Command(filepath.Join(programDir, "culvert-client"), append(args, "--", "true")...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", args, err, out)
		}
	}
	cron("unix:"+agent.socket, "--grouping=instance=db-1")
	cron(tcp, "--grouping=zone=a")

	const code = `culvert_job_exit_code{exported_job="backup",exported_instance="db-1",instance="agent.%s"}`
	old, renamed := fmt.Sprintf(code, "old.example.net"), fmt.Sprintf(code, "new.example.net")
	prom.awaitSample(old, "0", time.Time{})
	prom.awaitSample(`push_up{exported_job="backup",exported_instance="db-1"}`, "1", time.Time{})
	prom.awaitSample(`up{instance="agent.old.example.net"}`, "1", time.Time{})
	prom.awaitSample(`culvert_job_exit_code{job="backup",zone="a"}`, "0", time.Time{})
	prom.awaitSample(`push_up{job="backup",zone="a"}`, "1", time.Time{})

	none := func(selector string) {
		t.Helper()
		eventually(t, 30*time.Second, func() error {
			if found := prom.query(selector); len(found) > 0 {
				return fmt.Errorf("%s: there is %v", selector, found)
			}
			return nil
		})
	}
	stopping := time.Now()
	agent.stop()
	prom.awaitSample(`up{instance="agent.old.example.net"}`, "0", stopping)
	none(old)

	for i, arg := range agent.args {
		if strings.HasPrefix(arg, "--fqdn=") {
			agent.args[i] = "--fqdn=new.example.net"
		}
	}
	agent.restart()
	prom.awaitSample(renamed, "0", time.Time{})
	prom.awaitSample(`up{instance="agent.new.example.net"}`, "1", time.Time{})
	none(`{instance="agent.old.example.net"}`)
	if found := prom.query(`culvert_job_exit_code`); len(found) != 2 {
		t.Errorf("in the end there is %v", found)
	}
}
