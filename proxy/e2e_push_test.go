package main_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// A kill -9 loses nothing that was acknowledged, and leaves nothing half done.
func TestPushKill(t *testing.T) {
	t.Parallel()
	storage, address := "--storage.path="+t.TempDir(), "--web.listen-address="+externaltest.FreeAddress(t)
	one := func(method, group string, n int) pushOp {
		return pushOp{method, groupPath(group), stamped(n, ""), []string{group}, n}
	}
	large := noise(200_000)
	pushers := []*pusher{
		{name: "PUT", op: func(n int) pushOp { return one(http.MethodPut, fmt.Sprintf("put/%d", n%3), n) }},
		{name: "large PUT", op: func(n int) pushOp {
			op := one(http.MethodPut, "large", n)
			op.body += large
			return op
		}},
		{name: "POST", op: func(n int) pushOp { return one(http.MethodPost, "post", n) }},
		{name: "PUT and DELETE", op: func(n int) pushOp {
			if n%2 == 0 {
				return pushOp{http.MethodDelete, groupPath("gone"), "", []string{"gone"}, 0}
			}
			return one(http.MethodPut, "gone", n)
		}},
		{name: "batch", op: func(n int) pushOp {
			op := pushOp{http.MethodPut, "/api/v1/push?group_by=job,instance", "", nil, n}
			for i := range 4 {
				op.body += stamped(n, fmt.Sprintf(`job="batch",instance="%d"`, i))
				op.groups = append(op.groups, fmt.Sprintf("batch/%d", i))
			}
			op.body = byFamily(op.body)
			return op
		}},
	}
	// Both add to the same counters.
	adders := []*pusher{{name: "first sum"}, {name: "second sum"}}
	for _, p := range adders {
		p.op = func(int) pushOp {
			return pushOp{http.MethodPost, groupPath("sum") + "?aggregate=sum",
				"# TYPE e2e_sum_total counter\ne2e_sum_total 1\n# TYPE e2e_other_sum_total counter\ne2e_other_sum_total 1\n", nil, 0}
		}
	}
	unanswered := 0 // additions that had no answer, and were stored

	proxy := startProxy(t, storage, address)
	if a, err := send(direct, http.MethodPut, proxy.url+groupPath("post"), "e2e_kept 7\n"); err != nil || a.status != http.StatusOK {
		t.Fatalf("the first push: %d %s %v", a.status, a.body, err)
	}
	const rounds = 8
	scrapes := 0
	for round := range rounds {
		client := keepAlive(t, true)
		var running sync.WaitGroup
		var first sync.WaitGroup // what is to be done once at least in this round
		for _, p := range slices.Concat(pushers, adders) {
			first.Add(1)
			running.Go(func() { p.run(t, client, proxy.url, sync.OnceFunc(first.Done)) })
		}
		first.Add(1)
		running.Go(func() {
			done := sync.OnceFunc(first.Done)
			defer done()
			for {
				shown, err := scrapeStamped(client, proxy.url, "")
				if _, broken := errors.AsType[*invalid](err); broken {
					t.Error(err)
				}
				if err != nil {
					return
				}
				if err := shown.sameStamps("batch/0", "batch/1", "batch/2", "batch/3"); err != nil {
					t.Error(err)
				}
				scrapes++
				done()
			}
		})
		first.Wait()
		time.Sleep(time.Duration(100+rand.N(500)) * time.Millisecond)
		proxy.kill()
		running.Wait()
		if t.Failed() {
			return
		}
		if round%2 == 1 { // dies while it opens the store, too
			p := start(t, "culvert-proxy that dies early", filepath.Join(programDir, "culvert-proxy"), storage, address)
			time.Sleep(rand.N(150 * time.Millisecond))
			p.kill()
		}

		proxy = startProxy(t, storage, address)
		shown, err := scrapeStamped(direct, proxy.url, "")
		if err != nil {
			t.Fatal(err)
		}
		if kept := shown.series["post"]["e2e_kept"]; kept != 7 {
			t.Errorf("round %d: a family that POST did not name is %v, want 7", round, kept)
		}
		known := map[string]bool{"post": true, "sum": true}
		for _, p := range pushers {
			if err := p.compare(shown); err != nil {
				t.Errorf("round %d: %s: %v", round, p.name, err)
			}
			for group := range p.state {
				known[group] = true
			}
		}
		for group := range shown.series {
			if !known[group] {
				t.Errorf("round %d: there is a group %s", round, group)
			}
		}
		acked, pending := 0, 0
		for _, p := range adders {
			acked += p.acked
			if p.pending != nil {
				pending++
			}
			p.pending = nil
		}
		sum, other := int(shown.series["sum"]["e2e_sum_total"]), int(shown.series["sum"]["e2e_other_sum_total"])
		if least := acked + unanswered; sum < least || sum > least+pending || other != sum {
			t.Errorf("round %d: the sums are %d and %d, want the same of both, and %d to %d", round, sum, other, least, least+pending)
		}
		unanswered = sum - acked
		if t.Failed() {
			return
		}
	}
	for _, p := range slices.Concat(pushers, adders) {
		t.Logf("%s: %d sent, %d acknowledged; %d requests in flight at a kill were stored", p.name, p.sent, p.acked, p.lucky)
	}
	t.Logf("%d additions in flight at a kill were stored; %d scrapes", unanswered, scrapes)
}

// While pushes go on, each scrape shows all of a push or nothing of it, and what
// was acknowledged before the scrape began.
func TestPushWhileScraped(t *testing.T) {
	t.Parallel()
	proxy := startProxy(t)
	const pushers, groupsEach, wanted = 8, 4, 60
	var acked [pushers][groupsEach]atomic.Int64
	var pushed [pushers]atomic.Int64
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	t.Cleanup(running.Wait)
	t.Cleanup(cancel)
	client := keepAlive(t, true)
	for i := range pushers {
		running.Go(func() {
			for n := 1; ctx.Err() == nil; n++ {
				method, j := []string{http.MethodPut, http.MethodPost}[i%2], n%groupsEach
				a, err := send(client, method, proxy.url+groupPath(fmt.Sprintf("pusher-%d/%d", i, j)), stamped(n, ""))
				if err == nil && a.status != http.StatusOK {
					err = fmt.Errorf("%d %s", a.status, a.body)
				}
				if err != nil {
					t.Errorf("push: %v", err)
					cancel()
					return
				}
				acked[i][j].Store(int64(n))
				pushed[i].Add(1)
			}
		})
	}

	enough := func() bool {
		for i := range pushed {
			if pushed[i].Load() < wanted {
				return false
			}
		}
		return true
	}
	clients := [...]*http.Client{keepAlive(t, false), keepAlive(t, true)}
	var scraping sync.WaitGroup
	for name, accept := range map[string]string{
		"text":        "text/plain;version=0.0.4",
		"protobuf":    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited",
		"OpenMetrics": "application/openmetrics-text;version=1.0.0",
	} {
		scraping.Go(func() {
			n, newest := 0, 0
			for ; ctx.Err() == nil && (n < wanted || !enough()); n++ {
				var before [pushers][groupsEach]int64
				for i := range before {
					for j := range before[i] {
						before[i][j] = acked[i][j].Load()
					}
				}
				shown, err := scrapeStamped(clients[n%2], proxy.url, accept)
				if err != nil {
					t.Errorf("%s: %v", name, err)
					return
				}
				for i := range before {
					for j, least := range before[i] {
						group := fmt.Sprintf("pusher-%d/%d", i, j)
						if stamp := shown.stamps[group]; int64(stamp) < least {
							t.Errorf("%s: the group %s has %d, %d was acknowledged before", name, group, stamp, least)
							return
						}
						newest = max(newest, shown.stamps[group])
					}
				}
			}
			t.Logf("%s: %d scrapes, while each pusher pushed about %d times", name, n, newest)
		})
	}
	scraping.Wait()
}

// keepAlive returns a client that keeps connections open.
func keepAlive(t *testing.T, compressed bool) *http.Client {
	transport := &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: !compressed}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: time.Minute}
}

// send makes a request with a body and header fields, names and values in turn.
func send(client *http.Client, method, u, body string, header ...string) (answer, error) {
	req, err := http.NewRequestWithContext(context.Background(), method, u, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	for pair := range slices.Chunk(header, 2) {
		req.Header.Set(pair[0], pair[1])
	}
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(text)}, err
}

// groupPath returns where a group is pushed to. A group's name is JOB or
// JOB/INSTANCE.
func groupPath(group string) string {
	job, instance, ok := strings.Cut(group, "/")
	if !ok {
		return "/metrics/job/" + job
	}
	return "/metrics/job/" + job + "/instance/" + instance
}

// stamped returns the body of a push whose values are all n, but for e2e_size: it
// tells how many series there are, which depends on n. So half a push can be told
// from a whole one, and two mixed ones too.
func stamped(n int, labels string) string {
	comma := ""
	if labels != "" {
		comma = ","
	}
	parts := 1 + n%5
	var b strings.Builder
	fmt.Fprintf(&b, "# HELP e2e_size Series of the push.\n# TYPE e2e_size gauge\ne2e_size{%s} %d\n", labels, parts+9)
	fmt.Fprintf(&b, "# TYPE e2e_pushes_total counter\ne2e_pushes_total{%s} %d\n", labels, n)
	fmt.Fprintf(&b, "# TYPE e2e_seconds histogram\n")
	fmt.Fprintf(&b, "e2e_seconds_bucket{%[1]s%[3]sle=\"0.5\"} %[2]d\ne2e_seconds_bucket{%[1]s%[3]sle=\"+Inf\"} %[2]d\ne2e_seconds_sum{%[1]s} %[2]d\ne2e_seconds_count{%[1]s} %[2]d\n", labels, n, comma)
	fmt.Fprintf(&b, "# TYPE e2e_took_seconds summary\n")
	fmt.Fprintf(&b, "e2e_took_seconds{%[1]s%[3]squantile=\"0.9\"} %[2]d\ne2e_took_seconds_sum{%[1]s} %[2]d\ne2e_took_seconds_count{%[1]s} %[2]d\n", labels, n, comma)
	fmt.Fprintf(&b, "# TYPE e2e_parts gauge\n")
	for i := range parts {
		fmt.Fprintf(&b, "e2e_parts{%s%spart=\"%d\"} %d\n", labels, comma, i, n)
	}
	return b.String()
}

// noise returns a family of its own, whose series takes n bytes that can't be
// compressed.
func noise(n int) string {
	text := make([]byte, n)
	for i := range text {
		text[i] = "0123456789abcdef"[rand.IntN(16)]
	}
	return fmt.Sprintf("e2e_noise{text=%q} 1\n", text)
}

// byFamily puts the lines of stamped bodies that stand behind each other into one
// body, in which each family stands once.
func byFamily(bodies string) string {
	var names []string
	lines := map[string][]string{}
	name := ""
	for line := range strings.Lines(bodies) {
		if fields := strings.Fields(line); fields[0] == "#" {
			if name = fields[2]; slices.Contains(lines[name], line) {
				continue
			}
		}
		if lines[name] == nil {
			names = append(names, name)
		}
		lines[name] = append(lines[name], line)
	}
	var b strings.Builder
	for _, name := range names {
		b.WriteString(strings.Join(lines[name], ""))
	}
	return b.String()
}

// exposed is what a scrape of the groups shows: their series, by the group's name.
// stamps are what stamped pushes carry.
type exposed struct {
	series map[string]map[string]float64
	stamps map[string]int
}

// invalid is a scrape that arrived, and is wrong.
type invalid struct{ reason string }

func (e *invalid) Error() string { return "a scrape shows " + e.reason }

// scrapeStamped scrapes the groups, and checks that none shows half a push.
func scrapeStamped(client *http.Client, proxyURL, accept string) (exposed, error) {
	shown := exposed{map[string]map[string]float64{}, map[string]int{}}
	a, err := send(client, http.MethodGet, proxyURL+"/metrics?only=groups", "", "Accept", accept)
	if err != nil {
		return shown, err
	}
	if a.status != http.StatusOK {
		return shown, &invalid{fmt.Sprintf("%d %s", a.status, a.body)}
	}
	if a.body == "" {
		return shown, nil
	}
	format := expfmt.ResponseFormat(a.header)
	if strings.HasPrefix(a.header.Get("Content-Type"), "application/openmetrics-text") {
		// What the stamped pushes have of it reads like the text format.
		format = expfmt.NewFormat(expfmt.TypeTextPlain)
		if !strings.HasSuffix("\n"+a.body, "\n# EOF\n") {
			return shown, &invalid{fmt.Sprintf("no end: %.100q", a.body[max(0, len(a.body)-100):])}
		}
	}
	decoder := expfmt.SampleDecoder{Dec: expfmt.NewDecoder(strings.NewReader(a.body), format), Opts: &expfmt.DecodeOptions{}}
	for {
		var family model.Vector
		if err := decoder.Decode(&family); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return shown, &invalid{fmt.Sprintf("what can't be parsed: %v", err)}
		}
		for _, sample := range family {
			group := string(sample.Metric["job"])
			if instance := sample.Metric["instance"]; instance != "" {
				group += "/" + string(instance)
			}
			delete(sample.Metric, "job")
			delete(sample.Metric, "instance")
			name := sample.Metric.String()
			if shown.series[group] == nil {
				shown.series[group] = map[string]float64{}
			}
			if _, twice := shown.series[group][name]; twice {
				return shown, &invalid{fmt.Sprintf("the series %s of the group %s twice", name, group)}
			}
			shown.series[group][name] = float64(sample.Value)
		}
	}
	for group, series := range shown.series {
		size, isStamped := series["e2e_size"]
		if !isStamped {
			continue
		}
		stamp, n := series["e2e_pushes_total"], 0
		for name, value := range series {
			switch {
			case !strings.HasPrefix(name, "e2e_") || strings.HasPrefix(name, "e2e_kept"), strings.HasPrefix(name, "e2e_noise"):
				continue
			case name != "e2e_size" && value != stamp:
				return shown, &invalid{fmt.Sprintf("half a push: in the group %s, e2e_pushes_total is %v and %s is %v", group, stamp, name, value)}
			}
			n++
		}
		if n != int(size) {
			return shown, &invalid{fmt.Sprintf("half a push: the group %s has %d series of %v", group, n, size)}
		}
		shown.stamps[group] = int(stamp)
	}
	return shown, nil
}

// sameStamps returns an error unless all the groups were last pushed together.
func (e exposed) sameStamps(groups ...string) error {
	for _, group := range groups {
		if e.stamps[group] != e.stamps[groups[0]] {
			return &invalid{fmt.Sprintf("half a push to several groups: %s has %d, %s has %d", groups[0], e.stamps[groups[0]], group, e.stamps[group])}
		}
	}
	return nil
}

// pushed is a proxy that groups were pushed to, and that has an agent.
type pushed struct {
	*proxyProcess
	t     *testing.T
	args  []string
	acked map[string]int // stamps, by group
}

const pushedTarget, pushedExposition = "http://app." + web1 + "/metrics", "e2e_scraped 1\n"

func startPushed(t *testing.T, storage string) *pushed {
	t.Helper()
	exporter := serve(t, exposition(pushedExposition))
	p := &pushed{t: t, args: []string{"--storage.path=" + storage, "--web.listen-address=" + externaltest.FreeAddress(t)}, acked: map[string]int{}}
	p.proxyProcess = startProxy(t, p.args...)
	startAgent(t, p.url, web1, "--target=app="+exporter.URL+"/metrics", "--proxy.retry.max-wait=500ms")
	return p
}

// restart ends the proxy, starts it again, and waits for the agent. All series of
// the groups have to be as before, the times of the pushes too, where the groups
// are served at all.
func (p *pushed) restart(end func(*process), between func()) {
	p.t.Helper()
	before, err := scrapeStamped(direct, p.url, "")
	if err != nil {
		p.t.Fatal(err)
	}
	end(p.process)
	if between != nil {
		between()
	}
	p.proxyProcess = startProxy(p.t, p.args...)
	client := through(p.t, p.url, nil)
	eventually(p.t, 20*time.Second, func() error { return expect(client, pushedTarget, "5", pushedExposition) })
	if after, err := scrapeStamped(direct, p.url, ""); err == nil {
		for _, d := range differences(before.series, after.series) {
			p.t.Errorf("after a restart the group %.1000s", d)
		}
	}
}

// scrape scrapes the agent's target again and again until stop is called. All
// scrapes have to succeed.
func (p *pushed) scrape() (stop func()) {
	p.t.Helper()
	client, n := through(p.t, p.url, nil), 0
	end := background(p.t, 20*time.Millisecond, func() error {
		n++
		return expect(client, pushedTarget, "5", pushedExposition)
	})
	return func() {
		end()
		p.t.Logf("%d scrapes went through the tunnel meanwhile", n)
	}
}

// put pushes a stamped group, with so much noise, and notes it if it was
// acknowledged.
func (p *pushed) put(group string, n, size int) answer {
	p.t.Helper()
	a, err := send(direct, http.MethodPut, p.url+groupPath(group), stamped(n, "")+noise(size))
	if err != nil {
		p.t.Fatal(err)
	}
	if a.status == http.StatusOK {
		p.acked[group] = n
	}
	return a
}

// expectPush fails the test unless a push is taken.
func (p *pushed) expectPush(group string, n int) {
	p.t.Helper()
	if a := p.put(group, n, 100); a.status != http.StatusOK {
		p.t.Errorf("push to %s: %d %s", group, a.status, a.body)
	}
}

// expectStored fails the test unless the groups are those that were acknowledged.
func (p *pushed) expectStored() {
	p.t.Helper()
	shown, err := scrapeStamped(direct, p.url, "")
	if err != nil {
		p.t.Fatal(err)
	}
	for _, d := range differences(p.acked, shown.stamps) {
		p.t.Errorf("group %s", d)
	}
	for group := range shown.series {
		if p.acked[group] == 0 {
			p.t.Errorf("group %s: nothing was acknowledged, and there is %v", group, shown.series[group])
		}
	}
}

// expectRefused fails the test unless pushes to these groups, new ones or not, are
// refused with all of the reasons, and the proxy tells so, and nothing more.
func (p *pushed) expectRefused(size int, groups []string, reasons ...string) {
	p.t.Helper()
	tells := func(what string, a answer) {
		p.t.Helper()
		if a.status != http.StatusServiceUnavailable {
			p.t.Errorf("%s: %d %s, want 503", what, a.status, a.body)
		}
		for _, reason := range reasons {
			if !strings.Contains(a.body, reason) {
				p.t.Errorf("%s: the answer lacks %q: %s", what, reason, a.body)
			}
		}
	}
	for _, group := range groups {
		a := p.put(group, 999, size)
		tells("push to "+group, a)
		if seconds, err := strconv.Atoi(a.header.Get("Retry-After")); err != nil || seconds < 1 {
			p.t.Errorf("push to %s: Retry-After: %q", group, a.header.Get("Retry-After"))
		}
	}
	tells("readiness for pushes", get(p.t, p.url+"/-/ready?for=push"))
	for _, path := range []string{"/-/ready", "/-/healthy", "/metrics", "/metrics?only=self"} {
		if a := get(p.t, p.url+path); a.status != http.StatusOK {
			p.t.Errorf("%s: %d %s, want 200", path, a.status, a.body)
		}
	}
	if up := p.gauge("culvert_proxy_push_store_up"); up != 0 {
		p.t.Errorf("culvert_proxy_push_store_up is %v, want 0", up)
	}
}

// awaitRecovery waits until the proxy says that it takes pushes, with nobody
// pushing, and pushes.
func (p *pushed) awaitRecovery(within time.Duration) {
	p.t.Helper()
	start := time.Now()
	eventually(p.t, within, func() error {
		if a := get(p.t, p.url+"/-/ready?for=push"); a.status != http.StatusOK {
			return errors.New(a.body)
		}
		return nil
	})
	p.t.Logf("pushes are taken again after %s", time.Since(start).Round(time.Millisecond))
	if up := p.gauge("culvert_proxy_push_store_up"); up != 1 {
		p.t.Errorf("culvert_proxy_push_store_up is %v, want 1", up)
	}
	p.expectPush("after", 7)
}

// differences tells where two maps differ.
func differences[V any](want, got map[string]V) (lines []string) {
	all := maps.Clone(want)
	maps.Copy(all, got)
	for _, key := range slices.Sorted(maps.Keys(all)) {
		w, inWant := want[key]
		g, inGot := got[key]
		switch {
		case !inWant:
			lines = append(lines, fmt.Sprintf("%s: is %v, and should not be there", key, g))
		case !inGot:
			lines = append(lines, fmt.Sprintf("%s: is missing, want %v", key, w))
		case fmt.Sprint(w) != fmt.Sprint(g):
			lines = append(lines, fmt.Sprintf("%s: is %v, want %v", key, g, w))
		}
	}
	return lines
}

// pushOp is a request that leaves all of its groups with the stamp n, 0: deleted.
type pushOp struct {
	method, path, body string
	groups             []string
	n                  int
}

// pusher makes one request after the other.
type pusher struct {
	name string
	op   func(n int) pushOp // the n-th, from 1 on

	state       map[string]int // of its groups, as acknowledged or found later
	pending     *pushOp        // sent, with no answer
	sent, acked int
	lucky       int // how often what had no answer was stored
}

// run pushes until there is no answer. It calls done after the first.
func (p *pusher) run(t *testing.T, client *http.Client, proxyURL string, done func()) {
	defer done()
	if p.state == nil {
		p.state = map[string]int{}
	}
	for {
		p.sent++
		op := p.op(p.sent)
		p.pending = &op
		// What follows the head of the answer has nothing to say.
		a, _ := send(client, op.method, proxyURL+op.path, op.body)
		if a.status == 0 {
			return
		}
		if a.status != http.StatusOK && a.status != http.StatusAccepted {
			t.Errorf("%s: %d %s", p.name, a.status, a.body)
			return
		}
		p.pending = nil
		p.acked++
		for _, group := range op.groups {
			p.state[group] = op.n
		}
		done()
	}
}

// compare returns an error unless the groups are as they were acknowledged, or as
// the request without an answer would leave them. What it finds counts from now on.
func (p *pusher) compare(shown exposed) error {
	before, after := maps.Clone(p.state), maps.Clone(p.state)
	if p.pending != nil {
		for _, group := range p.pending.groups {
			after[group] = p.pending.n
		}
	}
	found := map[string]int{}
	for group := range after {
		found[group] = shown.stamps[group]
	}
	is := func(state map[string]int) bool {
		for group, n := range found {
			if state[group] != n {
				return false
			}
		}
		return true
	}
	switch {
	case is(before):
	case is(after):
		p.lucky++
	default:
		return fmt.Errorf("the groups are %v, want %v or %v", found, before, after)
	}
	for group, n := range found {
		if n == 0 && shown.series[group] != nil && group != "post" {
			return fmt.Errorf("the group %s was deleted, and has %v", group, shown.series[group])
		}
	}
	p.state, p.pending = found, nil
	return nil
}
