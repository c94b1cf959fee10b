package main_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// The cluster of TestCluster: each machine is a network namespace. The front network has
// the proxies, agents, scrapers and pushers, the back network the proxies and etcd.
//
//	here ── front bridge ── proxy-1, proxy-2, proxy-3 ── back bridge ── etcd-1, etcd-2, etcd-3
type network struct {
	t           *testing.T
	n           int // tells the networks of test processes apart
	front, back string
}

func newNetwork(t *testing.T) *network {
	t.Helper()
	n := os.Getpid() % 256
	w := &network{t: t, n: n, front: fmt.Sprintf("cvf%d", n), back: fmt.Sprintf("cvb%d", n)}
	if out, err := exec.Command("ip", "link", "add", w.front, "type", "bridge").CombinedOutput(); err != nil {
		externaltest.Missing(t, fmt.Sprintf("this test makes networks: install iproute2, and run it as root: %v: %s", err, out))
	}
	t.Cleanup(func() { w.ip("link", "del", w.front) })
	w.ip("link", "add", w.back, "type", "bridge")
	t.Cleanup(func() { w.ip("link", "del", w.back) })
	for bridge, host := range map[string]int{w.front: 1, w.back: 129} {
		w.ip("addr", "add", w.address(host)+"/25", "dev", bridge)
		w.ip("link", "set", bridge, "up")
	}
	return w
}

// address is in the front network up to 127, and in the back network from 129 on.
func (w *network) address(host int) string { return fmt.Sprintf("198.19.%d.%d", w.n, host) }

func (w *network) ip(args ...string) {
	w.t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		w.t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// machine is a namespace in one of the networks, or in both.
type machine struct {
	network         *network
	name, namespace string
	links           map[string]string // its cables' ends at the bridges, by bridge
}

func (w *network) machine(name string, front, back int) *machine {
	w.t.Helper()
	m := &machine{network: w, name: name, namespace: fmt.Sprintf("culvert-%s-%d", name, w.n), links: map[string]string{}}
	w.ip("netns", "add", m.namespace)
	w.t.Cleanup(func() { w.ip("netns", "del", m.namespace) }) // and its cables
	w.ip("-n", m.namespace, "link", "set", "lo", "up")
	for bridge, host := range map[string]int{w.front: front, w.back: back} {
		if host == 0 {
			continue
		}
		link, inside := fmt.Sprintf("%s-%d", bridge, host), "eth-"+bridge
		w.ip("link", "add", link, "type", "veth", "peer", "name", inside, "netns", m.namespace)
		w.ip("link", "set", link, "master", bridge, "up")
		w.ip("-n", m.namespace, "addr", "add", w.address(host)+"/25", "dev", inside)
		w.ip("-n", m.namespace, "link", "set", inside, "up")
		m.links[bridge] = link
	}
	return m
}

// cut has all packets of the machine in these networks dropped, and nobody told; mend
// undoes it.
func (m *machine) cut(bridges ...string) {
	for _, bridge := range bridges {
		m.network.ip("link", "set", m.links[bridge], "down")
	}
}

func (m *machine) mend() {
	for _, link := range m.links {
		m.network.ip("link", "set", link, "up")
	}
}

func (m *machine) start(program string, args ...string) *process {
	return start(m.network.t, m.name, "ip", append([]string{"netns", "exec", m.namespace, program}, args...)...)
}

// clusterProxy is a proxy of the cluster, which can be started again.
type clusterProxy struct {
	*machine
	url  string
	args []string
	*process
}

func (p *clusterProxy) restart() {
	p.process = p.machine.start(filepath.Join(programDir, "culvert-proxy"), p.args...)
	p.awaitLog(`msg=Listening address=`)
}

// TestCluster: three proxies, an etcd of three members, 50 agents, and a Prometheus a side.
// One thing after the other goes wrong under a steady load of scrapes and pushes, and is
// put right again.
func TestCluster(t *testing.T) {
	if raceEnabled {
		t.Skip("ten programs that have to keep their times are too slow with the race detector: run it without -race")
	}
	etcd, nginx := externaltest.Program(t, "etcd", "etcd-server"), externaltest.Program(t, "nginx", "nginx")
	externaltest.Program(t, "prometheus", "prometheus")
	if err := programs(); err != nil {
		t.Fatal(err)
	}
	w := newNetwork(t)

	var members, endpoints []string
	for n := range 3 {
		members = append(members, fmt.Sprintf("etcd-%d=http://%s:2380", n, w.address(141+n)))
		endpoints = append(endpoints, fmt.Sprintf("http://%s:2379", w.address(141+n)))
	}
	etcds := make([]*etcdMember, 3)
	for n := range etcds {
		etcds[n] = &etcdMember{machine: w.machine(fmt.Sprintf("etcd-%d", n), 0, 141+n), url: endpoints[n], program: etcd, args: []string{
			"--name", fmt.Sprintf("etcd-%d", n), "--data-dir", filepath.Join(t.TempDir(), "data"),
			"--listen-client-urls", endpoints[n], "--advertise-client-urls", endpoints[n],
			"--listen-peer-urls", fmt.Sprintf("http://%s:2380", w.address(141+n)), "--initial-advertise-peer-urls", fmt.Sprintf("http://%s:2380", w.address(141+n)),
			"--initial-cluster", strings.Join(members, ","),
		}}
		etcds[n].restart()
	}
	proxies := make([]*clusterProxy, 3)
	var urls []string
	for n := range proxies {
		front, back := w.address(11+n), w.address(151+n)
		proxies[n] = &clusterProxy{machine: w.machine(fmt.Sprintf("proxy-%d", n), 11+n, 151+n), url: "http://" + front + ":8080", args: []string{
			"--web.listen-address=" + front + ":8080", "--storage.path=", "--agent.settle-time=0",
			"--cluster.listen-address=" + back + ":8090", "--cluster.etcd-endpoints=" + strings.Join(endpoints, ","),
		}}
		urls = append(urls, proxies[n].url)
	}
	var ready sync.WaitGroup
	for _, p := range proxies {
		p.restart()
		ready.Go(func() { p.awaitReady() })
	}
	ready.Wait()

	// Agents with a tunnel to each proxy, and to each two of them.
	loadtest := filepath.Join(t.TempDir(), "loadtest")
	if out, err := exec.Command("go", "build", "-o", loadtest, "../examples/loadtest").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const agents = 50
	for _, part := range []struct {
		first, number int
		proxies       []int
	}{{0, 29, []int{0, 1, 2}}, {29, 7, []int{0, 1}}, {36, 7, []int{1, 2}}, {43, 7, []int{0, 2}}} {
		args := []string{"agents", fmt.Sprintf("--first=%d", part.first), fmt.Sprintf("--agents=%d", part.number)}
		for _, n := range part.proxies {
			args = append(args, "--proxy-url="+urls[n])
		}
		start(t, "agents", loadtest, args...)
	}
	connected := func() error {
		for n, p := range proxies {
			own := 29 + 14
			if got, err := p.connected(); err != nil || got != own {
				return fmt.Errorf("proxy %d has %d agents, not %d (%v)", n, got, own, err)
			}
		}
		return nil
	}
	eventually(t, time.Minute, connected)

	// A balancer that passes TCP on as it is.
	balancer := w.address(1) + ":8080"
	stream := startStream(t, nginx, balancer, proxies)
	var targets []string
	for n := range agents {
		targets = append(targets, fmt.Sprintf("app-0.agent-%d", n))
	}
	watch := func(name, proxyURL string) *watcher {
		config := fmt.Sprintf("- job_name: agents\n  proxy_url: %s\n  scrape_interval: 4s\n  scrape_timeout: 4s\n  static_configs: [{targets: [%s]}]\n", proxyURL, strings.Join(targets, ", "))
		return &watcher{name: name, prometheus: startPrometheus(t, config)}
	}
	watchers := []*watcher{watch("through proxy 0", urls[0]), watch("through proxy 1", urls[1]), watch("through the balancer", "http://"+balancer)}
	for _, watcher := range watchers {
		eventually(t, time.Minute, func() error {
			if up := watcher.prometheus.query(`count(up == 1) == ` + fmt.Sprint(agents)); len(up) != 1 {
				return errors.New("not all targets are up")
			}
			return nil
		})
	}
	pushers := startPushers(t, urls)

	var table []string
	// phase does something, waits, undoes it, and counts what those that had no part in
	// it have lost; in the end all proxies have to say the same again.
	phase := func(name string, judged []*watcher, length time.Duration, inject, heal func()) {
		begin := time.Now().Add(-time.Second) // a scrape's time is when it began
		before := pushers.acknowledged.Load()
		inject()
		time.Sleep(length)
		heal()
		healed := time.Now()
		pushers.pause()
		var alike time.Duration
		if err := try(10*time.Second, func() error { return sameEverywhere(proxies) }); err != nil {
			t.Errorf("%s: 10 s after it was over: %v", name, err)
		}
		alike = time.Since(healed)
		pushers.resume()
		eventually(t, time.Minute, connected)
		end := time.Now()
		var scraped, lost int
		for _, watcher := range judged {
			s, l := watcher.count(begin, end)
			scraped, lost = scraped+s, lost+len(l)
			for _, one := range l {
				t.Errorf("%s, %s: lost %s", name, watcher.name, one)
			}
		}
		table = append(table, fmt.Sprintf("%-44s %5.1f s %6d scrapes, %d lost; %6d pushes, %d refused and repeated; alike after %.1f s",
			name, end.Sub(begin).Seconds(), scraped, lost, pushers.acknowledged.Load()-before, pushers.repeated.Swap(0), alike.Seconds()))
	}
	nothing := func() {}
	phase("nothing", watchers, 8*time.Second, nothing, nothing)
	phase("a proxy is killed (-9), and started again", watchers[:2], 15*time.Second,
		func() { proxies[2].kill() },
		func() { proxies[2].restart(); proxies[2].awaitReady() })
	phase("a proxy is cut off from etcd and the others", watchers[:2], 15*time.Second,
		func() { proxies[2].cut(w.back) }, proxies[2].mend)
	phase("a proxy is cut off from everything", watchers[:2], 15*time.Second,
		func() { proxies[2].cut(w.front, w.back) }, proxies[2].mend)
	leader := func() int {
		for n, e := range etcds {
			if e.leads() {
				return n
			}
		}
		t.Fatal("etcd has no leader")
		return 0
	}
	follower := etcds[(leader()+1)%3]
	phase("a member of etcd is stopped, and started again", watchers, 10*time.Second,
		func() { follower.stop() },
		func() { follower.restart(); follower.awaitHealthy() })
	old := etcds[leader()]
	phase("the leader of etcd is cut off", watchers, 15*time.Second,
		func() { old.cut(w.back) },
		func() { old.mend(); old.awaitHealthy() })
	phase("all proxies are restarted in turn (SIGTERM)", watchers[2:], 0, func() {
		for _, p := range proxies {
			p.process.stop()
			p.restart()
			p.awaitReady()
			eventually(t, time.Minute, connected)
			time.Sleep(4 * time.Second) // each target is scraped once
		}
	}, nothing)

	pushers.stop()
	eventually(t, 10*time.Second, func() error { return sameEverywhere(proxies) })
	for _, p := range proxies {
		pushers.check(p.url)
	}
	stream.stop()
	t.Logf("what was injected, and what was lost:\n%s", strings.Join(table, "\n"))
}

func (p *clusterProxy) awaitReady() {
	eventually(p.network.t, time.Minute, func() error {
		a, err := fetch(direct, p.url+"/-/ready?for=push", "")
		if err == nil && a.status != http.StatusOK {
			err = fmt.Errorf("%d %s", a.status, a.body)
		}
		return err
	})
}

// connected returns the number of agents that the proxy itself has.
func (p *clusterProxy) connected() (int, error) {
	a, err := fetch(direct, p.url+"/metrics?only=self", "")
	if err != nil {
		return 0, err
	}
	for line := range strings.SplitSeq(a.body, "\n") {
		var n int
		if _, err := fmt.Sscanf(line, `culvert_proxy_cluster_held_agents %d`, &n); err == nil {
			return n, nil
		}
	}
	return 0, errors.New("no culvert_proxy_cluster_held_agents")
}

// etcdMember is a member of etcd, which can be started again.
type etcdMember struct {
	*machine
	url, program string
	args         []string
	*process
}

func (e *etcdMember) restart() { e.process = e.machine.start(e.program, e.args...) }

// stop ends the member as a restart of its machine would.
func (e *etcdMember) stop() {
	e.signal(syscall.SIGTERM)
	<-e.exited
}

func (e *etcdMember) awaitHealthy() {
	eventually(e.network.t, time.Minute, func() error {
		a, err := fetch(direct, e.url+"/health", "")
		if err == nil && a.status != http.StatusOK {
			err = fmt.Errorf("%d %s", a.status, a.body)
		}
		return err
	})
}

func (e *etcdMember) leads() bool {
	a, err := fetch(direct, e.url+"/metrics", "")
	return err == nil && strings.Contains(a.body, "\netcd_server_is_leader 1\n")
}

// startStream starts nginx as a balancer of TCP connections.
func startStream(t *testing.T, program, address string, proxies []*clusterProxy) *process {
	t.Helper()
	dir := t.TempDir()
	const module = "/usr/lib/nginx/modules/ngx_stream_module.so"
	if _, err := os.Stat(module); err != nil {
		externaltest.Missing(t, "nginx has no stream module: apt-get install libnginx-mod-stream")
	}
	servers := ""
	for _, p := range proxies {
		servers += fmt.Sprintf("server %s max_fails=1 fail_timeout=1s; ", strings.TrimPrefix(p.url, "http://"))
	}
	config := write(t, dir, "nginx.conf", fmt.Sprintf(`load_module %s;
daemon off; master_process off; pid %s/pid; error_log stderr warn;
events {}
stream {
  upstream proxies { %s}
  server { listen %s; proxy_pass proxies; proxy_connect_timeout 1s; proxy_next_upstream on; }
}
`, module, dir, servers, address))
	p := start(t, "nginx", program, "-p", dir, "-e", "stderr", "-c", config)
	eventually(t, 10*time.Second, func() error {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err
	})
	return p
}

// watcher is a Prometheus of which the scrapes are counted.
type watcher struct {
	name       string
	prometheus *prometheus
}

// count returns how many scrapes began between two times, and those that failed.
func (w *watcher) count(begin, end time.Time) (scraped int, lost []string) {
	for _, s := range w.prometheus.query(`up[15m]`) {
		for _, sample := range s.Values {
			if sample.at.Before(begin) || !sample.at.Before(end) {
				continue
			}
			scraped++
			if sample.value != "1" {
				lost = append(lost, fmt.Sprintf("%s at %s (%s)", s.Metric["instance"], sample.at.Format("15:04:05.000"), sample.at.Sub(begin).Round(100*time.Millisecond)))
			}
		}
	}
	for _, target := range w.prometheus.targets() {
		if len(lost) > 0 && target.LastError != "" {
			lost = append(lost, fmt.Sprintf("%s: %s", target.Labels["instance"], target.LastError))
		}
	}
	return scraped, lost
}

// sameEverywhere returns an error unless all proxies show the same groups and agents.
func sameEverywhere(proxies []*clusterProxy) error {
	for path, sorted := range map[string]func(string) (string, error){
		"/metrics?only=groups": func(text string) (string, error) {
			lines := strings.Split(text, "\n")
			slices.Sort(lines)
			return strings.Join(lines, "\n"), nil
		},
		"/clients": func(text string) (string, error) {
			var entries []json.RawMessage
			if err := json.Unmarshal([]byte(text), &entries); err != nil {
				return "", err
			}
			lines := make([]string, len(entries))
			for i, entry := range entries {
				lines[i] = string(entry)
			}
			slices.Sort(lines)
			return strings.Join(lines, "\n"), nil
		},
	} {
		var first string
		for n, p := range proxies {
			a, err := fetch(direct, p.url+path, "")
			if err == nil && a.status != http.StatusOK {
				err = fmt.Errorf("%d %s", a.status, a.body)
			}
			if err != nil {
				return fmt.Errorf("%s of proxy %d: %w", path, n, err)
			}
			text, err := sorted(a.body)
			if err != nil {
				return fmt.Errorf("%s of proxy %d: %w", path, n, err)
			}
			if n == 0 {
				first = text
			} else if text != first {
				return fmt.Errorf("%s of proxy %d differs from proxy 0's: %s", path, n, firstDifference(first, text))
			}
		}
	}
	return nil
}

func firstDifference(a, b string) string {
	as, bs := strings.Split(a, "\n"), strings.Split(b, "\n")
	for i := range min(len(as), len(bs)) {
		if as[i] != bs[i] {
			return fmt.Sprintf("%.300q and %.300q", as[i], bs[i])
		}
	}
	return fmt.Sprintf("%d and %d lines", len(as), len(bs))
}

// clusterPushers push without pause, each its own groups, to one proxy after the other:
// what one refuses, or doesn't answer, goes to the next, as the same push.
type clusterPushers struct {
	t                      *testing.T
	acknowledged, repeated atomic.Int64
	odd                    atomic.Bool  // a refusal was none of a store that is away
	gate                   sync.RWMutex // held for writing during a pause
	ended                  chan struct{}
	pushing                sync.WaitGroup
	mu                     sync.Mutex // protects pushed
	pushed                 map[string]int
}

func startPushers(t *testing.T, urls []string) *clusterPushers {
	p := &clusterPushers{t: t, ended: make(chan struct{}), pushed: map[string]int{}}
	t.Cleanup(p.stop)
	for n := range urls {
		p.pushing.Go(func() { p.run(n, urls) })
	}
	return p
}

func (p *clusterPushers) run(n int, urls []string) {
	client := &http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	name := fmt.Sprintf("pusher-of-cluster-%d", n)
	for seq := 1; ; seq++ {
		p.gate.RLock()
		for try := 0; ; try++ {
			u := urls[(n+try)%len(urls)]
			// Two pushes of one number: a sum, in which each counts once, and a value, of which
			// the last one counts.
			err := p.push(client, http.MethodPost, u+"/metrics/job/sum/instance/"+name+"?aggregate=sum", "# TYPE e2e_cluster_sum_total counter\ne2e_cluster_sum_total 1\n", fmt.Sprintf("%s/%d", name, 2*seq))
			if err == nil {
				err = p.push(client, http.MethodPut, u+"/metrics/job/last/instance/"+name, fmt.Sprintf("e2e_cluster_last %d\n", seq), fmt.Sprintf("%s/%d", name, 2*seq+1))
			}
			if err == nil {
				break
			}
			p.repeated.Add(1)
			select {
			case <-p.ended:
				// Whether this one was made is open.
				p.gate.RUnlock()
				p.t.Errorf("%s was not through with its push %d in the end: %v", name, seq, err)
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
		p.acknowledged.Add(2)
		p.mu.Lock()
		p.pushed[name] = seq
		p.mu.Unlock()
		p.gate.RUnlock()
		select {
		case <-p.ended:
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (p *clusterPushers) push(client *http.Client, method, u, body, id string) error {
	a, err := send(client, method, u, body, "Culvert-Push-Id", id)
	if err == nil && a.status != http.StatusOK {
		err = fmt.Errorf("%s: %d %s", u, a.status, a.body)
		if a.status != http.StatusServiceUnavailable && p.odd.CompareAndSwap(false, true) {
			p.t.Error(err) // and the ones after it would say the same
		}
	}
	return err
}

// pause waits for the pushes that run, and holds up the next; resume lets them go on.
func (p *clusterPushers) pause()  { p.gate.Lock() }
func (p *clusterPushers) resume() { p.gate.Unlock() }

func (p *clusterPushers) stop() {
	select {
	case <-p.ended:
	default:
		close(p.ended)
	}
	p.pushing.Wait()
}

// check compares what a proxy has with what was pushed.
func (p *clusterPushers) check(proxyURL string) {
	p.t.Helper()
	text := get(p.t, proxyURL+"/metrics?only=groups").body
	for name, n := range p.pushed {
		for _, line := range []string{
			fmt.Sprintf(`e2e_cluster_sum_total{instance=%q,job="sum"} %d`, name, n),
			fmt.Sprintf(`e2e_cluster_last{instance=%q,job="last"} %d`, name, n),
		} {
			if !strings.Contains(text, "\n"+line+"\n") {
				series, _, _ := strings.Cut(line, " ")
				_, found, _ := strings.Cut(text, "\n"+series+" ")
				found, _, _ = strings.Cut(found, "\n")
				p.t.Errorf("%s: want %s, got %s", proxyURL, line, found)
			}
		}
	}
}
