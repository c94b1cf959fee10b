package main_test

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// startMember starts a proxy of a cluster.
func startMember(t testing.TB, etcd *externaltest.Etcd, args ...string) *proxyProcess {
	t.Helper()
	p := startProxy(t, append([]string{"--cluster.etcd-endpoints=" + etcd.URL, "--cluster.listen-address=127.0.0.1:0", "--cluster.ttl=2s"}, args...)...)
	p.awaitLog(`msg="Connected to the cluster"`)
	return p
}

// connected returns which agents a proxy lists, and whether they are connected.
func (p *proxyProcess) connected() (map[string]bool, error) {
	resp, err := http.Get(p.url + "/api/v1/agents")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	var answer struct {
		Data []struct {
			Name      string
			Connected bool
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return nil, err
	}
	agents := map[string]bool{}
	for _, a := range answer.Data {
		agents[a.Name] = a.Connected
	}
	return agents, nil
}

// awaitAgent waits until the proxy lists the agent as connected or not.
func (p *proxyProcess) awaitAgent(name string, connected bool) {
	p.t.Helper()
	eventually(p.t, 30*time.Second, func() error {
		agents, err := p.connected()
		if is, known := agents[name]; err == nil && (!known || is != connected) {
			err = fmt.Errorf("agent %q: known %v, connected %v", name, known, is)
		}
		return err
	})
}

// Agents of a proxy that is killed are lost on the others, who forward to another proxy
// that holds them meanwhile.
func TestClusterKill(t *testing.T) {
	t.Parallel()
	etcd := externaltest.StartEtcd(t)
	killed, left, right := startMember(t, etcd), startMember(t, etcd), startMember(t, etcd)
	exporter := serve(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "e2e 1\n") })
	port := exporter.URL[strings.LastIndex(exporter.URL, ":")+1:]
	startAgent(t, killed.url, "only", "--allow="+port)
	both := startAgent(t, killed.url, "both", "--allow="+port, "--proxy-url="+left.url)
	both.awaitLog(`(?s)msg=Connected.*msg=Connected`)
	for _, p := range []*proxyProcess{left, right} {
		p.awaitAgent("only", true)
		p.awaitAgent("both", true)
	}
	client := through(t, right.url, nil)
	for _, name := range []string{"only", "both"} {
		if a, err := fetch(client, "http://"+name+":"+port+"/metrics", "5"); err != nil || a.status != http.StatusOK || a.body != "e2e 1\n" {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
	killed.kill()
	died := time.Now()
	for time.Since(died) < time.Second { // before the lease has ended
		if a, err := fetch(client, "http://both:"+port+"/metrics", "5"); err != nil || a.status != http.StatusOK {
			t.Fatalf("both: %+v, %v", a, err)
		}
	}
	for _, p := range []*proxyProcess{left, right} {
		p.awaitAgent("only", false)
		p.awaitAgent("both", true)
	}
	t.Logf("noticed %s after the kill; the lease is for 2 s", time.Since(died).Round(10*time.Millisecond))
	if a, err := fetch(client, "http://only:"+port+"/metrics", "5"); err != nil || a.status != http.StatusServiceUnavailable {
		t.Errorf("only: %+v, %v", a, err)
	}
}

// balancer is a TCP load balancer in front of some proxies: of those that are ready, it
// takes one after the other.
type balancer struct {
	net.Listener
	mu    sync.Mutex // protects what follows
	next  int
	ready map[string]bool
}

func newBalancer(t *testing.T, addresses ...string) *balancer {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{Listener: l, ready: map[string]bool{}}
	var tasks sync.WaitGroup
	ended := make(chan struct{})
	t.Cleanup(func() { close(ended); l.Close(); tasks.Wait() })
	probe := &http.Client{Timeout: time.Second}
	tasks.Go(func() {
		for {
			for _, address := range addresses {
				resp, err := probe.Get("http://" + address + "/-/ready")
				if err == nil {
					resp.Body.Close()
				}
				b.mu.Lock()
				b.ready[address] = err == nil && resp.StatusCode == http.StatusOK
				b.mu.Unlock()
			}
			select {
			case <-ended:
				return
			case <-time.After(100 * time.Millisecond):
			}
		}
	})
	tasks.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", b.choose(addresses))
			if err != nil {
				near.Close()
				continue
			}
			tasks.Go(func() { defer near.Close(); defer far.Close(); io.Copy(near, far) })
			tasks.Go(func() { defer near.Close(); defer far.Close(); io.Copy(far, near) })
		}
	})
	return b
}

func (b *balancer) choose(addresses []string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	for range addresses {
		b.next++
		if a := addresses[b.next%len(addresses)]; b.ready[a] {
			return a
		}
	}
	return addresses[b.next%len(addresses)]
}

// Proxies that are restarted one after the other fail not one scrape that another one
// takes, whether their agents come through a balancer or know all of them.
func TestClusterRollingRestart(t *testing.T) {
	t.Parallel()
	etcd := externaltest.StartEtcd(t)
	addresses := []string{externaltest.FreeAddress(t), externaltest.FreeAddress(t), externaltest.FreeAddress(t)}
	begin := func(i int) *proxyProcess {
		return startMember(t, etcd, "--web.listen-address="+addresses[i], "--web.shutdown-timeout=10s")
	}
	var members []*proxyProcess
	for i := range addresses {
		members = append(members, begin(i))
	}
	lb := newBalancer(t, addresses...)
	exposition := func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, strings.Repeat("e2e 1\n", 1000)) }
	exporter, secure := serve(t, exposition), newAuthority(t).serveTLS(web1, exposition)
	port, securePort := exporter.URL[strings.LastIndex(exporter.URL, ":")+1:], secure.URL[strings.LastIndex(secure.URL, ":")+1:]
	var names []string
	for i := range 6 {
		name := fmt.Sprintf("balanced-%d", i)
		startAgent(t, "http://"+lb.Addr().String(), name, "--allow="+port, "--allow="+securePort)
		names = append(names, name)
	}
	all := startAgent(t, members[0].url, "all", "--allow="+port, "--allow="+securePort, "--proxy-url="+members[1].url, "--proxy-url="+members[2].url)
	all.awaitLog(`(?s)msg=Connected.*msg=Connected.*msg=Connected`)
	names = append(names, "all")
	for _, m := range members {
		for _, name := range names {
			m.awaitAgent(name, true)
		}
	}
	var scrapes, failed atomic.Int64
	for round := range addresses {
		stop := make(chan struct{})
		var scrapers sync.WaitGroup
		for i, m := range members {
			if i == round {
				continue
			}
			client := through(t, m.url, &tls.Config{InsecureSkipVerify: true}) // one certificate for all
			scrapers.Go(func() {
				for n := 0; ; n++ {
					select {
					case <-stop:
						return
					case <-time.After(5 * time.Millisecond):
					}
					name := names[n%len(names)]
					target := "http://" + name + ":" + port + "/metrics"
					if n%20 == 0 { // so that a tunnel falls silent between two scrapes
						target = "https://" + name + ":" + securePort + "/metrics"
					}
					a, err := fetch(client, target, "5")
					scrapes.Add(1)
					if err != nil || a.status != http.StatusOK || len(a.body) != 6000 {
						failed.Add(1)
						t.Errorf("round %d: %s through %d: %d %.200q, %v", round, target, i, a.status, a.body, err)
					}
				}
			})
		}
		began := time.Now()
		members[round].stop()
		ended := time.Now()
		members[round] = begin(round)
		for _, name := range names {
			members[round].awaitAgent(name, true)
		}
		close(stop)
		scrapers.Wait()
		t.Logf("proxy %d ended within %s, and was complete %s later", round, ended.Sub(began).Round(time.Millisecond), time.Since(ended).Round(time.Millisecond))
	}
	t.Logf("%d of %d scrapes failed", failed.Load(), scrapes.Load())
}
