package etcdstore_test

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/gateway/etcdstore"
	"github.com/culvert-io/culvert/protocol/externaltest"
)

// proxy is a push store in etcd.
type proxy struct {
	t        testing.TB
	store    *gateway.Store
	gateway  *gateway.Gateway
	registry *prometheus.Registry
	stop     func()
}

// commitTimeout is longer than an election takes.
const commitTimeout = 3 * time.Second

// open starts a store, and doesn't wait for anything.
func open(t testing.TB, client *clientv3.Client, prefix string, config gateway.StoreConfig) *proxy {
	t.Helper()
	return openWith(t, client, prefix, config, commitTimeout)
}

func openWith(t testing.TB, client *clientv3.Client, prefix string, config gateway.StoreConfig, commitTimeout time.Duration) *proxy {
	t.Helper()
	config.Logger = slog.New(slog.DiscardHandler)
	if os.Getenv("ETCDSTORE_TEST_LOG") != "" {
		config.Logger = slog.New(slog.NewTextHandler(os.Stderr, nil))
	}
	p := &proxy{t: t, registry: prometheus.NewRegistry()}
	p.store = gateway.OpenShared(config, etcdstore.Open(client, prefix, etcdstore.Config{
		CommitTimeout: commitTimeout, CheckInterval: 200 * time.Millisecond, Logger: config.Logger, Now: config.Now,
	}))
	p.gateway = gateway.New(gateway.Config{Registerer: p.registry}, p.store)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.store.Run(ctx) }()
	p.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(p.stop)
	return p
}

// start starts a store, and waits for its groups.
func start(t testing.TB, client *clientv3.Client, prefix string, config gateway.StoreConfig) *proxy {
	t.Helper()
	return open(t, client, prefix, config).loaded()
}

func (p *proxy) loaded() *proxy {
	p.t.Helper()
	select {
	case <-p.store.Loaded():
	case <-time.After(20 * time.Second):
		p.t.Fatalf("the groups were not read: %v", p.store.Err())
	}
	return p
}

// several starts stores that share their groups in the shared etcd.
func several(t testing.TB, n int, config gateway.StoreConfig) (proxies []*proxy, client *clientv3.Client, prefix string) {
	t.Helper()
	m := sharedEtcd(t)
	prefix = newPrefix(t)
	for range n {
		client = newClient(t, m.Address)
		proxies = append(proxies, start(t, client, prefix, config))
	}
	return proxies, client, prefix
}

// send makes a request; header are names and values.
func (p *proxy) send(method, path, body string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "/metrics/job"+path, strings.NewReader(body))
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	rest, _, _ := strings.Cut(path, "?")
	w := httptest.NewRecorder()
	if method == http.MethodDelete {
		p.gateway.ServeDelete(w, r, rest)
	} else {
		p.gateway.ServePush(w, r, rest)
	}
	return w
}

// want makes a request and checks the status.
func (p *proxy) want(status int, method, path, body string, header ...string) string {
	p.t.Helper()
	w := p.send(method, path, body, header...)
	if w.Code != status {
		p.t.Errorf("%s %s: %d %s, want %d", method, path, w.Code, w.Body, status)
	}
	if w.Code == http.StatusServiceUnavailable && w.Header().Get("Retry-After") == "" {
		p.t.Errorf("%s %s: no Retry-After", method, path)
	}
	return w.Body.String()
}

// batch pushes to many groups at once.
func (p *proxy) batch(status int, body string) string {
	p.t.Helper()
	w := httptest.NewRecorder()
	p.gateway.ServeBatch(w, httptest.NewRequest(http.MethodPut, "/?group_by=job,n", strings.NewReader(body)))
	if w.Code != status {
		p.t.Errorf("a batch: %d %s, want %d", w.Code, w.Body, status)
	}
	return w.Body.String()
}

// scrape answers GET /metrics, in two formats.
func (p *proxy) scrape(query string) string {
	var out strings.Builder
	for _, accept := range []string{"text/plain", "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"} {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodGet, "/metrics"+query, nil)
		r.Header.Set("Accept", accept)
		gateway.ServeMetrics(p.gateway, w, r)
		out.WriteString(w.Body.String())
	}
	return out.String()
}

func (p *proxy) groups() string { return p.scrape("?only=groups") }

// value returns the value of a series, NaN where it isn't there.
func (p *proxy) value(series string) float64 {
	for line := range strings.Lines(p.groups()) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				p.t.Error(err)
			}
			return v
		}
	}
	return -1
}

// metric returns the value of an own metric.
func (p *proxy) metric(name string) float64 {
	p.t.Helper()
	families, err := p.registry.Gather()
	if err != nil {
		p.t.Error(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.Metric[0].GetGauge().GetValue() + f.Metric[0].GetCounter().GetValue()
		}
	}
	p.t.Errorf("there is no metric %s", name)
	return 0
}

// eventually waits until something is so.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 20 s", what)
		}
	}
}

// alike waits until all proxies answer the same, and checks that one that starts now does
// too.
func alike(t testing.TB, client *clientv3.Client, prefix string, proxies ...*proxy) {
	t.Helper()
	proxies = append(proxies, start(t, client, prefix, gateway.StoreConfig{}))
	defer proxies[len(proxies)-1].stop()
	var all []string
	same := func() bool {
		all = all[:0]
		for _, p := range proxies {
			all = append(all, p.groups())
		}
		return len(slices.Compact(slices.Clone(all))) == 1
	}
	for deadline := time.Now().Add(10 * time.Second); !same(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			for i, got := range all {
				t.Logf("proxy %d:\n%.3000s", i, got)
			}
			t.Fatal("the proxies don't answer alike")
		}
	}
}

// atOnce runs functions at the same time.
func atOnce(functions ...func()) {
	var all sync.WaitGroup
	begin := make(chan struct{})
	for _, f := range functions {
		all.Go(func() {
			<-begin
			f()
		})
	}
	close(begin)
	all.Wait()
}

// Of two pushes to two proxies that can't both be taken one is.
func TestClash(t *testing.T) {
	t.Parallel()
	proxies, client, prefix := several(t, 2, gateway.StoreConfig{})
	for n := range 10 {
		for what, push := range map[string][2]func(p *proxy) *httptest.ResponseRecorder{
			"types": {
				func(p *proxy) *httptest.ResponseRecorder {
					return p.send("PUT", "/a", fmt.Sprintf("# TYPE m%d gauge\nm%d 1\n", n, n))
				},
				func(p *proxy) *httptest.ResponseRecorder {
					return p.send("POST", "/b", fmt.Sprintf("# TYPE m%d counter\nm%d 1\n", n, n))
				},
			},
			"series": {
				func(p *proxy) *httptest.ResponseRecorder {
					return p.send("PUT", fmt.Sprint("/series/n/", n), `s{instance="i"} 1`+"\n")
				},
				func(p *proxy) *httptest.ResponseRecorder {
					return p.send("PUT", fmt.Sprintf("/series/n/%d/instance/i", n), "s 1\n")
				},
			},
			"keys": {
				func(p *proxy) *httptest.ResponseRecorder { return p.send("PUT", fmt.Sprint("/key/n/", n), "k 1\n") },
				func(p *proxy) *httptest.ResponseRecorder {
					return p.send("PUT", fmt.Sprintf("/key/n/%d/instance@base64/=", n), "l 1\n")
				},
			},
		} {
			var codes [2]int
			atOnce(func() { codes[0] = push[0](proxies[0]).Code }, func() { codes[1] = push[1](proxies[1]).Code })
			if codes != [2]int{200, 400} && codes != [2]int{400, 200} {
				t.Errorf("%s: got %v", what, codes)
			}
		}
	}
	alike(t, client, prefix, proxies...)
}

// Several proxies together don't take more groups than one may.
func TestMaxGroups(t *testing.T) {
	t.Parallel()
	proxies, client, prefix := several(t, 3, gateway.StoreConfig{MaxGroups: 10})
	var accepted atomic.Int64
	var pushes []func()
	for n := range 30 {
		pushes = append(pushes, func() {
			switch w := proxies[n%3].send("PUT", fmt.Sprint("/j/n/", n), "m 1\n"); w.Code {
			case 200:
				accepted.Add(1)
			case http.StatusInsufficientStorage:
			default:
				t.Errorf("%d %s", w.Code, w.Body)
			}
		})
	}
	atOnce(pushes...)
	if n := accepted.Load(); n != 10 {
		t.Errorf("%d groups were accepted, want 10", n)
	}
	alike(t, client, prefix, proxies...)
}

// Nothing that was acknowledged is lost or made twice, whatever three proxies do to the
// same groups; and in the end they answer alike.
func TestManyWriters(t *testing.T) {
	t.Parallel()
	proxies, client, prefix := several(t, 3, gateway.StoreConfig{})
	const pushers, pushes = 24, 25
	var writers []func()
	for w := range pushers {
		writers = append(writers, func() {
			random := rand.New(rand.NewPCG(uint64(w), 1))
			at := func() *proxy { return proxies[random.IntN(3)] }
			spool := fmt.Sprintf("spool-of-pusher-%02d", w)
			for n := 1; n <= pushes; n++ {
				// Each answer must be true at the proxy that gave it.
				p := at()
				own := fmt.Sprintf("/own/pusher/%d", w)
				p.want(200, "PUT", own, fmt.Sprintf("# HELP own about %d\nown %d\n", random.IntN(3), n))
				if got := p.value(fmt.Sprintf(`own{instance="",job="own",pusher="%d"}`, w)); got != float64(n) {
					t.Errorf("pusher %d: push %d was acknowledged, and %v is shown", w, n, got)
				}
				p.want(200, "POST", own, fmt.Sprintf("posted{n=\"%d\"} %d\n", n%3, n))
				at().want(200, "POST", "/sum?aggregate=sum", "# TYPE c counter\nc 1\n", gateway.HeaderPushID, fmt.Sprintf("%s/%d", spool, n))
				at().want(200, "POST", "/sum?aggregate=sum", "# TYPE c counter\nc 1\n", gateway.HeaderPushID, fmt.Sprintf("%s/%d", spool, n))
				at().want(200, "PUT", "/rest", fmt.Sprintf("rest %d\n", n))
				if n%5 == 0 {
					at().want(202, "DELETE", "/rest", "")
				}
			}
		})
	}
	atOnce(writers...)
	alike(t, client, prefix, proxies...)
	for _, p := range proxies {
		if got := p.value(`c{instance="",job="sum"}`); got != pushers*pushes {
			t.Errorf("the sum is %v, want %v", got, pushers*pushes)
		}
		t.Logf("%v writes, %v conflicts", p.metric("push_store_writes_total"), p.metric("push_store_conflicts_total"))
	}
	for w := range pushers {
		if got := proxies[0].value(fmt.Sprintf(`own{instance="",job="own",pusher="%d"}`, w)); got != pushes {
			t.Errorf("pusher %d: %v, want %v", w, got, pushes)
		}
	}
}

// A proxy that was cut off while etcd forgot what it missed reads all groups again, and
// loses those that are gone.
func TestCompaction(t *testing.T) {
	t.Parallel()
	m := sharedEtcd(t)
	prefix := newPrefix(t)
	r := newRelay(t, m.Address)
	client := newClient(t, m.Address)
	a := start(t, client, prefix, gateway.StoreConfig{})
	b := start(t, newClient(t, r.address), prefix, gateway.StoreConfig{})
	a.want(200, "PUT", "/stays", "m 1\n")
	a.want(200, "PUT", "/goes", "m 1\n")
	alike(t, client, prefix, a, b)
	before := b.groups()

	r.set(cut)
	for n := range 20 {
		a.want(200, "PUT", "/stays", fmt.Sprintf("m %d\n", n))
	}
	a.want(202, "DELETE", "/goes", "")
	b.want(503, "PUT", "/new", "m 1\n")
	if b.groups() != before {
		t.Error("a proxy that is cut off does not answer from its memory")
	}
	if behind := b.metric("push_store_behind_seconds"); behind < 2 {
		t.Errorf("a proxy that was cut off for 3 s says that it is %v s behind", behind)
	}
	if err := b.store.Err(); err == nil {
		t.Error("a proxy that is cut off says that it takes pushes")
	}
	resp, err := client.Get(t.Context(), prefix+"head")
	if err == nil {
		_, err = client.Compact(t.Context(), resp.Header.Revision)
	}
	if err != nil {
		t.Fatal(err)
	}
	a.want(200, "PUT", "/later", "m 1\n")
	r.set(passing)
	alike(t, client, prefix, a, b)
	if n := b.metric("push_store_snapshots_total"); n != 2 {
		t.Errorf("%v snapshots were read, want 2", n)
	}
	eventually(t, "a push to the proxy that was cut off", func() bool { return b.send("PUT", "/again", "m 1\n").Code == 200 })
	alike(t, client, prefix, a, b)
}

// While etcd is away scrapes are answered from memory, and pushes with 503.
func TestEtcdAway(t *testing.T) {
	t.Parallel()
	m := externaltest.StartEtcd(t)
	client := newClient(t, m.Address)
	p := start(t, client, "culvert", gateway.StoreConfig{})
	p.want(200, "PUT", "/a", "m 1\n")
	before := p.groups()
	m.Stop()
	for range 3 {
		p.want(503, "PUT", "/a", "m 2\n")
	}
	if got := p.groups(); got != before {
		t.Errorf("got\n%s\nwant\n%s", got, before)
	}

	// A proxy can start in spite of that.
	late := open(t, newClient(t, m.Address), "culvert", gateway.StoreConfig{})
	late.want(503, "PUT", "/b", "m 2\n")
	late.want(503, "DELETE", "/a", "")
	for _, query := range []string{"?only=groups", "", "?only=self"} {
		w := httptest.NewRecorder()
		gateway.ServeMetrics(late.gateway, w, httptest.NewRequest(http.MethodGet, "/metrics"+query, nil))
		if want := map[string]int{"?only=groups": 503}[query]; want != 0 && w.Code != want || want == 0 && w.Code != 200 {
			t.Errorf("/metrics%s of a proxy that has not read the groups: %d", query, w.Code)
		}
	}
	w := httptest.NewRecorder()
	late.gateway.ServeQuery(w, httptest.NewRequest(http.MethodGet, "/api/v1/metrics", nil))
	if w.Code != 503 || late.store.Err() == nil {
		t.Errorf("/api/v1/metrics of a proxy that has not read the groups: %d; %v", w.Code, late.store.Err())
	}

	m.Start(t)
	for _, p := range []*proxy{p, late} {
		eventually(t, "a push once etcd is back", func() bool { return p.send("PUT", "/a", "m 3\n").Code == 200 })
	}
	alike(t, client, "culvert", p, late)
	eventually(t, "ready", func() bool { return p.store.Err() == nil && late.store.Err() == nil })
}

// An etcd that has reached its quota refuses pushes until it has room again.
func TestEtcdFull(t *testing.T) {
	t.Parallel()
	m := externaltest.StartEtcd(t, "--quota-backend-bytes=8000000")
	client := newClient(t, m.Address)
	p := start(t, client, "culvert", gateway.StoreConfig{})
	p.want(200, "PUT", "/a", "m 1\n")
	refusal := ""
	for n := 0; refusal == ""; n++ {
		switch w := p.send("PUT", "/large", fmt.Sprintf("large{x=\"%s\"} 1\n", random(900_000+n))); {
		case w.Code == 503:
			refusal = w.Body.String()
		case w.Code != 200 || n == 20:
			t.Fatalf("push %d: %d %s", n, w.Code, w.Body)
		}
	}
	if !strings.Contains(refusal, "space exceeded") || !strings.Contains(refusal, "disarm") {
		t.Errorf("the refusal %q does not say what to do", refusal)
	}
	if p.store.Err() == nil || !strings.Contains(p.groups(), `m{instance="",job="a"} 1`) {
		t.Errorf("with etcd full: %v; the groups are\n%.300s", p.store.Err(), p.groups())
	}
	resp, err := client.Get(t.Context(), "culvert/head")
	if err == nil {
		_, err = client.Compact(t.Context(), resp.Header.Revision, clientv3.WithCompactPhysical())
	}
	if err == nil {
		_, err = client.Defragment(t.Context(), m.URL)
	}
	if err == nil {
		_, err = client.AlarmDisarm(t.Context(), &clientv3.AlarmMember{})
	}
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "a push", func() bool { return p.send("PUT", "/a", "m 2\n").Code == 200 })
	alike(t, client, "culvert", p)
}

// Whatever happens to the connections, a push is made once, however often it is sent, and
// whichever proxy it is sent to.
func TestUnknownOutcome(t *testing.T) {
	t.Parallel()
	m := sharedEtcd(t)
	prefix := newPrefix(t)
	client := newClient(t, m.Address)
	var proxies []*proxy
	var relays []*relay
	for range 3 {
		r := newRelay(t, m.Address)
		relays = append(relays, r)
		proxies = append(proxies, start(t, newClient(t, r.address), prefix, gateway.StoreConfig{}))
	}
	stop := make(chan struct{})
	var trouble sync.WaitGroup
	for i, r := range relays {
		trouble.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 7))
			for {
				// What was swallowed never comes: its connection has to be cut.
				for mode, longest := range []time.Duration{passing: 100 * time.Millisecond, swallowing: 20 * time.Millisecond, cut: 5 * time.Millisecond} {
					r.set(mode)
					select {
					case <-stop:
						r.set(cut)
						r.set(passing)
						return
					case <-time.After(time.Duration(random.Int64N(int64(longest)))):
					}
				}
			}
		})
	}
	const pushers, pushes = 6, 25
	var refused, repeated atomic.Int64
	var writers []func()
	for w := range pushers {
		writers = append(writers, func() {
			random := rand.New(rand.NewPCG(uint64(w), 3))
			deadline := time.Now().Add(40 * time.Second)
			for n := 1; n <= pushes; {
				response := proxies[random.IntN(3)].send("POST", "/sum?aggregate=sum", "# TYPE c counter\nc 1\n",
					gateway.HeaderPushID, fmt.Sprintf("spool-of-pusher-%02d/%d", w, n))
				switch response.Code {
				case 200:
					n++
					if response.Header().Get(gateway.HeaderPushRepeated) != "" {
						repeated.Add(1)
					}
				case 503:
					refused.Add(1)
					time.Sleep(10 * time.Millisecond)
				default:
					t.Errorf("%d %s", response.Code, response.Body)
					return
				}
				if time.Now().After(deadline) {
					t.Errorf("push %d of pusher %d was not taken", n, w)
					return
				}
			}
		})
	}
	atOnce(writers...)
	close(stop)
	trouble.Wait()
	alike(t, client, prefix, proxies...)
	if got := proxies[0].value(`c{instance="",job="sum"}`); got != pushers*pushes {
		t.Errorf("the sum is %v, want %v", got, pushers*pushes)
	}
	t.Logf("%d pushes were refused and sent again, %d of these had been made", refused.Load(), repeated.Load())
}

// A push that was refused is refused again by whichever proxy it is sent to: it is not
// noted.
func TestRefusedAgain(t *testing.T) {
	t.Parallel()
	proxies, _, _ := several(t, 2, gateway.StoreConfig{})
	const spool = "spool-of-refusals/"
	for _, p := range proxies {
		w := p.send("PUT", "/a", "m 1 1\n", gateway.HeaderPushID, spool+"1")
		if w.Code != 400 || !strings.Contains(w.Body.String(), "timestamps") || w.Header().Get(gateway.HeaderPushRepeated) != "" || w.Header().Get(gateway.HeaderPushSeq) != "0" {
			t.Errorf("a refused push: %d %s %v", w.Code, w.Body, w.Header())
		}
	}
	if w := proxies[0].send("PUT", "/a", "m 1\n", gateway.HeaderPushID, spool+"2"); w.Code != 200 || w.Header().Get(gateway.HeaderPushSeq) != "2" {
		t.Errorf("the next push: %d %s %v", w.Code, w.Body, w.Header())
	}
}

// A proxy that can't find out in time whether a push was stored refuses it; sent again it
// is known, and not made twice.
func TestGivenUp(t *testing.T) {
	t.Parallel()
	m := sharedEtcd(t)
	prefix := newPrefix(t)
	r := newRelay(t, m.Address)
	client := newClient(t, m.Address)
	a := openWith(t, newClient(t, r.address), prefix, gateway.StoreConfig{}, 300*time.Millisecond).loaded()
	b := start(t, client, prefix, gateway.StoreConfig{})
	for n := 1; n <= 3; n++ {
		eventually(t, "ready", func() bool { return a.store.Err() == nil })
		r.set(swallowing)
		id := fmt.Sprintf("spool-a_0123456789/%d", n)
		a.want(503, "POST", "/sum?aggregate=sum", "# TYPE c counter\nc 1\n", gateway.HeaderPushID, id)
		eventually(t, "the transaction", func() bool { return b.value(`c{instance="",job="sum"}`) == float64(n) })
		if got := a.value(`c{instance="",job="sum"}`); got >= float64(n) {
			t.Errorf("what was refused is shown: %v", got)
		}
		r.set(cut)
		r.set(passing)
		var again *httptest.ResponseRecorder
		eventually(t, "the push", func() bool {
			again = a.send("POST", "/sum?aggregate=sum", "# TYPE c counter\nc 1\n", gateway.HeaderPushID, id)
			return again.Code == 200
		})
		if again.Header().Get(gateway.HeaderPushRepeated) != "true" || a.value(`c{instance="",job="sum"}`) != float64(n) {
			t.Errorf("push %d was made twice: %v, %v", n, again.Header(), a.value(`c{instance="",job="sum"}`))
		}
	}
	alike(t, client, prefix, a, b)
}

// A transaction that was made, and whose answer was lost, is found out about: the push is
// acknowledged.
func TestAnswerLost(t *testing.T) {
	t.Parallel()
	m := sharedEtcd(t)
	prefix := newPrefix(t)
	r := newRelay(t, m.Address)
	client := newClient(t, m.Address)
	a := start(t, newClient(t, r.address), prefix, gateway.StoreConfig{})
	b := start(t, client, prefix, gateway.StoreConfig{})
	for n := 1; n <= 5; n++ {
		r.set(swallowing)
		answered := make(chan int)
		go func() { answered <- a.send("POST", "/sum?aggregate=sum", "# TYPE c counter\nc 1\n").Code }()
		eventually(t, "the transaction", func() bool { return b.value(`c{instance="",job="sum"}`) == float64(2*n-1) })
		b.want(200, "POST", "/sum?aggregate=sum", "# TYPE c counter\nc 1\n") // head is another one now
		r.set(cut)
		r.set(passing)
		if code := <-answered; code != 200 {
			t.Errorf("the push was answered %d", code)
		}
		eventually(t, "the sum", func() bool { return a.value(`c{instance="",job="sum"}`) == float64(2*n) })
	}
	alike(t, client, prefix, a, b)
}

// What expires goes from all proxies, at once where it expires, and from etcd.
func TestExpiry(t *testing.T) {
	t.Parallel()
	proxies, client, prefix := several(t, 3, gateway.StoreConfig{})
	const groups = 300 // more than a transaction can change
	var body strings.Builder
	for n := range groups {
		if fmt.Fprintf(&body, "gone{job=\"j\",n=\"%d\"} 1\n", n); n%100 == 99 {
			w := httptest.NewRecorder()
			proxies[0].gateway.ServeBatch(w, httptest.NewRequest(http.MethodPut, "/?group_by=job,n&ttl=1s", strings.NewReader(body.String())))
			if w.Code != 200 {
				t.Fatal(w.Body)
			}
			body.Reset()
		}
	}
	proxies[0].want(200, "PUT", "/left?ttl=1s&interval=1h", "gone 1\n")
	proxies[1].want(200, "PUT", "/stays?ttl=1h", "m 1\n")
	for _, p := range proxies {
		eventually(t, "expired", func() bool {
			text := p.groups()
			return !strings.Contains(text, "gone") && strings.Contains(text, `push_up{instance="",job="left"} 0`)
		})
	}
	stored := func(n int64) func() bool {
		return func() bool {
			resp, err := client.Get(t.Context(), prefix+"groups/", clientv3.WithPrefix(), clientv3.WithCountOnly())
			return err == nil && resp.Count == n
		}
	}
	// A metric that went can be pushed with another type at once; what expired goes before
	// that.
	proxies[2].want(200, "PUT", "/gone", "# TYPE gone counter\ngone 1\n")
	if !stored(3)() {
		t.Error("there are groups in etcd that expired")
	}
	alike(t, client, prefix, proxies...)
	// Without a push one of the proxies stores that, in a while.
	proxies[0].want(200, "PUT", "/gone?ttl=1s", "# TYPE gone counter\ngone 1\n")
	eventually(t, "expired in etcd", stored(2))
	alike(t, client, prefix, proxies...)
}

// A clock that is ahead does not take away what should still be there.
func TestClocks(t *testing.T) {
	t.Parallel()
	m := sharedEtcd(t)
	prefix := newPrefix(t)
	client := newClient(t, m.Address)
	ahead := gateway.StoreConfig{Now: func() time.Time { return time.Now().Add(time.Hour) }}
	right := start(t, client, prefix, gateway.StoreConfig{})
	there := start(t, client, prefix, ahead)
	right.want(200, "PUT", "/a?ttl=10m&interval=10m", "m 1\n")
	late := start(t, client, prefix, ahead)
	for _, p := range []*proxy{there, late} {
		eventually(t, "the group", func() bool { return strings.Contains(p.groups(), "m{") })
		p.want(200, "PUT", "/b", "n 1\n") // it would store what expired
	}
	for _, p := range []*proxy{right, there, late} {
		eventually(t, "the other push", func() bool { return strings.Contains(p.groups(), "n{") })
		if text := p.groups(); !strings.Contains(text, "m{") {
			t.Errorf("the group is gone:\n%s", text)
		}
	}
	if !strings.Contains(there.groups(), `push_up{instance="",job="a"} 1`) {
		t.Errorf("push_up is not 1 where the clock is ahead:\n%s", there.groups())
	}
	if offset := there.metric("push_store_clock_ahead_seconds"); offset == 0 {
		t.Error("the difference of the clocks is not told")
	}
}

// random returns n bytes that can't be compressed much, as letters and digits.
func random(n int) string {
	source := rand.New(rand.NewPCG(1, uint64(n)))
	out := make([]byte, n)
	for i := range out {
		out[i] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"[source.IntN(64)]
	}
	return string(out)
}

func TestLimits(t *testing.T) {
	t.Parallel()
	proxies, client, prefix := several(t, 2, gateway.StoreConfig{})
	p := proxies[0]
	words := func(message string, words ...string) {
		t.Helper()
		for _, word := range words {
			if !strings.Contains(message, word) {
				t.Errorf("%q does not say %q", message, word)
			}
		}
	}
	large := func(n int) string { return fmt.Sprintf("large{x=\"%s\"} 1\n", random(n)) }
	p.want(200, "PUT", "/large", "large{x=\"\"} 1\n")
	words(p.want(413, "PUT", "/large", large(1600_000)), `{job="large"}`, "1568768", "--max-request-bytes")
	if got := p.value(`push_failure_time_seconds{instance="",job="large"}`); got <= 0 {
		t.Errorf("the failure time is %v", got)
	}
	if !strings.Contains(p.groups(), `large{instance="",job="large",x=""} 1`) {
		t.Error("the group was changed")
	}
	// Just below the limit etcd takes it: what is allowed is not too much.
	p.want(200, "PUT", "/large", large(1568768-600))
	p.want(200, "PUT", "/"+strings.Repeat("%25", 1000), large(1500_000))
	// What doesn't fit together goes one by one.
	var pushes []func()
	for n := range 8 {
		pushes = append(pushes, func() { proxies[n%2].want(200, "PUT", fmt.Sprint("/large/n/", n), large(700_000+n)) })
	}
	atOnce(pushes...)

	var many strings.Builder
	for n := range 128 {
		if n == 127 {
			p.batch(200, many.String())
		}
		fmt.Fprintf(&many, "many{job=\"many\",n=\"%d\"} 1\n", n)
	}
	words(p.batch(413, many.String()), "128 groups", "--max-txn-ops")
	words(p.batch(413, fmt.Sprintf("l{job=\"j\",n=\"1\",x=\"%s\"} 1\nl{job=\"j\",n=\"2\",x=\"%s\"} 1\n", random(800_000), random(800_001))), "2 groups", "--max-request-bytes")
	alike(t, client, prefix, proxies...)

	for n := range 3 {
		p.batch(200, more(n))
	}
	w := httptest.NewRecorder()
	p.gateway.ServeWipe(w, httptest.NewRequest(http.MethodPut, "/", nil))
	if w.Code != 202 || p.store.Len() != 0 {
		t.Errorf("wipe: %d %s, and %d groups are left", w.Code, w.Body, p.store.Len())
	}
	alike(t, client, prefix, proxies...)
}

func more(n int) string {
	var body strings.Builder
	for i := range 100 {
		fmt.Fprintf(&body, "more{job=\"more-%d\",n=\"%d\"} 1\n", n, i)
	}
	return body.String()
}

// With its leader gone a cluster goes on, and so do pushes.
func TestLeaderStopped(t *testing.T) {
	t.Parallel()
	members := externaltest.StartEtcdCluster(t, 3)
	var addresses []string
	for _, m := range members {
		addresses = append(addresses, m.Address)
	}
	client := newClient(t, addresses...)
	var proxies []*proxy
	for range 3 {
		proxies = append(proxies, start(t, newClient(t, addresses...), "culvert", gateway.StoreConfig{}))
	}
	const pushers, pushes = 6, 40
	var writers []func()
	var acknowledged atomic.Int64
	half := make(chan struct{})
	for w := range pushers {
		writers = append(writers, func() {
			deadline := time.Now().Add(30 * time.Second)
			for n := 1; n <= pushes; {
				r := proxies[w%3].send("POST", "/sum?aggregate=sum", "# TYPE c counter\nc 1\n", gateway.HeaderPushID, fmt.Sprintf("spool-of-pusher-%02d/%d", w, n))
				if r.Code == 200 {
					n++
					if acknowledged.Add(1) == pushers*pushes/2 {
						close(half)
					}
				} else if time.Sleep(50 * time.Millisecond); r.Code != 503 || time.Now().After(deadline) {
					t.Errorf("push %d: %d %s", n, r.Code, r.Body)
					return
				}
			}
		})
	}
	writers = append(writers, func() {
		<-half
		for _, m := range members {
			status, err := client.Status(t.Context(), m.Address)
			if err == nil && status.Leader == status.Header.MemberId {
				m.Stop()
				return
			}
		}
		t.Error("there is no leader")
	})
	atOnce(writers...)
	alike(t, client, "culvert", proxies...)
	if got := proxies[0].value(`c{instance="",job="sum"}`); got != pushers*pushes {
		t.Errorf("the sum is %v, want %v", got, pushers*pushes)
	}
}

// What others do to the keys breaks nothing, and all proxies see the same of it.
func TestForeignChanges(t *testing.T) {
	t.Parallel()
	proxies, client, prefix := several(t, 2, gateway.StoreConfig{})
	a, b := proxies[0], proxies[1]
	key := func(name string) string { return prefix + name }
	get := func(name string) string {
		t.Helper()
		resp, err := client.Get(t.Context(), key(name))
		if err != nil || len(resp.Kvs) != 1 {
			t.Fatalf("%s: %v, %v", name, resp, err)
		}
		return string(resp.Kvs[0].Value)
	}
	do := func(ops ...clientv3.Op) {
		t.Helper()
		if _, err := client.Txn(t.Context()).Then(ops...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
	fill := func() {
		t.Helper()
		for _, push := range []string{"/a", "/b/x/y%20z/u@base64/w7w", "/c"} {
			eventually(t, "a push", func() bool { return a.send("PUT", push, "# TYPE m gauge\nm 1\n").Code == 200 })
		}
		a.want(200, "POST", "/d", "# TYPE c counter\nc 1\n", gateway.HeaderPushID, "spool-a_0123456789/1")
		alike(t, client, prefix, a, b)
	}
	fill()
	recordA, recordD := get("groups/job/a"), get("groups/job/d")
	snapshots := func() float64 {
		return min(a.metric("push_store_snapshots_total"), b.metric("push_store_snapshots_total"))
	}
	for what, c := range map[string]struct {
		ops     []clientv3.Op
		damaged bool
	}{
		"a group is deleted":       {[]clientv3.Op{clientv3.OpDelete(key("groups/job/a"))}, false},
		"a record is damaged":      {[]clientv3.Op{clientv3.OpPut(key("groups/job/a"), recordA[:20]+"x"+recordA[21:])}, true},
		"a record is empty":        {[]clientv3.Op{clientv3.OpPut(key("groups/job/a"), "")}, true},
		"a record is another's":    {[]clientv3.Op{clientv3.OpPut(key("groups/job/b"), recordA)}, true},
		"a key is none":            {[]clientv3.Op{clientv3.OpPut(key("groups/job"), recordA), clientv3.OpPut(key("groups//"), ""), clientv3.OpPut(key("groups/%"), "")}, true},
		"a mark is damaged":        {[]clientv3.Op{clientv3.OpPut(key("spools/spool-a_0123456789"), "x")}, true},
		"a key is unknown":         {[]clientv3.Op{clientv3.OpPut(key("what/else"), "x")}, false},
		"all are gone":             {[]clientv3.Op{clientv3.OpDelete(prefix, clientv3.WithPrefix())}, false},
		"the head is gone":         {[]clientv3.Op{clientv3.OpDelete(key("head"))}, false},
		"changes are left out":     {[]clientv3.Op{clientv3.OpPut(key("head"), get("head"))}, false},
		"a record is put back":     {[]clientv3.Op{clientv3.OpPut(key("groups/job/d"), recordD)}, false},
		"several keys are damaged": {[]clientv3.Op{clientv3.OpPut(key("groups/job/a"), "x"), clientv3.OpPut(key("groups/job/c"), "x"), clientv3.OpPut(key("spools/x"), "x")}, true},
	} {
		before, damagedBefore := snapshots(), b.metric("push_store_damaged_records_total")
		do(c.ops...)
		eventually(t, what, func() bool { return snapshots() > before })
		alike(t, client, prefix, a, b)
		if damaged := b.metric("push_store_damaged_records_total") > damagedBefore; damaged != c.damaged {
			t.Errorf("%s: that something is damaged: %v", what, damaged)
		}
		do(clientv3.OpDelete(prefix, clientv3.WithPrefix()))
		eventually(t, "empty", func() bool { return a.store.Len() == 0 && b.store.Len() == 0 })
		fill()
	}

	// In a transaction that looks like a proxy's the rest of it is taken. A field of a newer
	// version is skipped.
	headAfter := func(format uint64) clientv3.Op {
		before, n := protowire.ConsumeBytes([]byte(get("head"))[1:])
		if n < 0 {
			t.Fatalf("the head is %q", get("head"))
		}
		var head []byte
		head = protowire.AppendBytes(protowire.AppendTag(head, 1, protowire.BytesType), []byte(random(16)))
		head = protowire.AppendVarint(protowire.AppendTag(head, 2, protowire.VarintType), uint64(time.Now().UnixNano()))
		head = protowire.AppendVarint(protowire.AppendTag(head, 3, protowire.VarintType), format)
		head = protowire.AppendBytes(protowire.AppendTag(head, 4, protowire.BytesType), before)
		head = protowire.AppendBytes(protowire.AppendTag(head, 99, protowire.BytesType), []byte("new"))
		return clientv3.OpPut(key("head"), string(head))
	}
	before, snapshotsBefore := a.metric("push_store_damaged_records_total"), snapshots()
	do(clientv3.OpPut(key("groups/job/a"), "x"), clientv3.OpDelete(key("groups/job/c")), headAfter(1))
	eventually(t, "the rest", func() bool {
		return a.store.Len() == 2 && b.store.Len() == 2 && a.metric("push_store_damaged_records_total") == before+1
	})
	if snapshots() != snapshotsBefore {
		t.Error("a snapshot was read for a change of a proxy")
	}
	a.want(200, "PUT", "/a", "# TYPE m gauge\nm 2\n")

	// What a newer version has written in another way is left alone.
	do(headAfter(2))
	eventually(t, "the newer version", func() bool {
		return a.store.Err() != nil && strings.Contains(a.store.Err().Error(), "newer version")
	})
	a.want(503, "PUT", "/a", "m 3\n")
	if !strings.Contains(a.groups(), `m{instance="",job="a"} 2`) {
		t.Error("the groups are gone")
	}
}

// Where etcd is set back to an earlier state the proxies go with it.
func TestSetBack(t *testing.T) {
	t.Parallel()
	m := externaltest.StartEtcd(t)
	client := newClient(t, m.Address)
	a := start(t, client, "culvert", gateway.StoreConfig{})
	b := start(t, client, "culvert", gateway.StoreConfig{})
	a.want(200, "PUT", "/a", "m 1\n")
	m.Stop()
	if err := os.CopyFS(m.Dir+".copy", os.DirFS(m.Dir)); err != nil {
		t.Fatal(err)
	}
	m.Start(t)
	for n := range 10 {
		eventually(t, "a push", func() bool { return a.send("PUT", fmt.Sprint("/later/n/", n), "m 1\n").Code == 200 })
	}
	alike(t, client, "culvert", a, b)
	m.Stop()
	err := os.RemoveAll(m.Dir)
	if err == nil {
		err = os.Rename(m.Dir+".copy", m.Dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	m.Start(t)
	eventually(t, "the earlier state", func() bool { return a.store.Len() == 1 && b.store.Len() == 1 })
	eventually(t, "a push", func() bool { return b.send("PUT", "/new", "m 1\n").Code == 200 })
	alike(t, client, "culvert", a, b)
}

// The order in which pushes come to the proxies decides nothing of what they show.
func TestDeterminism(t *testing.T) {
	t.Parallel()
	proxies, client, prefix := several(t, 3, gateway.StoreConfig{})
	at := func(seconds int) []string {
		return []string{gateway.HeaderPushTime, fmt.Sprint(1_700_000_000 + seconds)}
	}
	var pushes []func()
	for n := range 12 {
		pushes = append(pushes, func() {
			p := proxies[n%3]
			// Several HELP texts, of pushes of one time too; families of one group that came at
			// different times.
			p.want(200, "PUT", fmt.Sprint("/j/n/", n), fmt.Sprintf("# HELP m text %d\n# TYPE m gauge\nm{b=\"1\",a=\"2\"} 1\nm{a=\"1\"} 0.25\n", n%4), at(n%2)...)
			p.want(200, "POST", fmt.Sprint("/j/n/", n), fmt.Sprintf("# HELP k text %d\n# TYPE k histogram\nk_bucket{le=\"1\"} 1\nk_bucket{le=\"+Inf\"} 2\nk_count 2\nk_sum 3\n{\"utf.8\"} 1\n", n), at(-n%3)...)
		})
	}
	atOnce(pushes...)
	alike(t, client, prefix, proxies...)
	if !regexp.MustCompile(`(?m)^# HELP m text \d$`).MatchString(proxies[0].groups()) {
		t.Error("there is no HELP")
	}
}
