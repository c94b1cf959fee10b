package fleet_test

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// all takes every agent.
func all(string) bool { return true }

// scrapeOf is a scrape of a port of web-1.
func scrapeOf(port int, outcome string) fleet.Scrape {
	s := fleet.Scrape{
		Host: "web-1", Port: fmt.Sprint(port), URL: fmt.Sprintf("http://web-1:%d/metrics", port), Mode: "proxy",
		At: time.Now(), Took: time.Millisecond, Status: 200, Outcome: outcome, Bytes: 10, Answered: outcome == "ok",
	}
	if s.Failed = outcome != "ok" && outcome != "cancelled"; s.Failed {
		s.Status, s.Bytes, s.Reason = 502, 0, "it is "+outcome
	}
	return s
}

func agentOf(t *testing.T, f *fleet.Fleet, name string) *fleet.Agent {
	t.Helper()
	route, ok := f.Resolve(name)
	if !ok || len(route.Agents) != 1 {
		t.Fatalf("%q leads to %v", name, route.Agents)
	}
	return route.Agents[0]
}

// logged returns the targets in the log of web-1.
func logged(t *testing.T, f *fleet.Fleet) map[string]fleet.TargetLog {
	t.Helper()
	logs, _, ok := f.Scrapes("web-1")
	if !ok {
		t.Fatal("web-1 is not known")
	}
	found := map[string]fleet.TargetLog{}
	for _, l := range logs {
		found[l.Target] = l
	}
	return found
}

func TestScrapeLog(t *testing.T) {
	t.Parallel()
	f, _ := open(t, fleet.Config{})
	register(t, f, "web-1", protocol.Registration{Targets: []protocol.Target{{Name: "router", Path: "/m"}}, Hosts: []string{"db.lan"}})
	a := agentOf(t, f, "web-1")
	if logs, bytes, ok := f.Scrapes("web-1"); len(logs) != 0 || bytes != 0 || !ok {
		t.Errorf("before: %v, %d, %v", logs, bytes, ok)
	}
	if _, _, ok := f.Scrapes("nobody"); ok {
		t.Error("nobody has a log")
	}
	for _, c := range []struct{ host, port, url, want string }{
		{"web-1", "9100", "http://WEB-1:9100/metrics?a=b", "9100"},
		{"web-1", "", "http://web-1/metrics", "80"},
		{"router.web-1", "", "http://router.web-1/m", "router"},
		{"agent.web-1", "80", "http://agent.web-1:80/metrics", "agent"},
		{"db.lan", "9187", "http://db.lan:9187/metrics", "db.lan:9187"},
		{"web-1", "9443", "web-1:9443", "9443"},
	} {
		f.LogScrape(a, fleet.Scrape{Host: c.host, Port: c.port, URL: c.url, Mode: "proxy", At: time.Now(), Outcome: "ok", Answered: true})
		if l, ok := logged(t, f)[c.want]; !ok || l.URL != c.url || l.Scrapes != 1 || l.Failures != 0 {
			t.Errorf("%s: got %+v", c.url, logged(t, f))
		}
	}

	// The history is of the last twenty, the oldest first; a tunnel's bytes come later.
	var tunnel fleet.Logged
	for i := range 50 {
		s := scrapeOf(9182, "ok")
		s.Took = time.Duration(i) * time.Second
		if i%10 == 9 {
			s = scrapeOf(9182, "timeout")
			s.Reason = strings.Repeat("ä", 200) + fmt.Sprint(i)
			s.Took = time.Duration(i) * time.Second
		}
		if l := f.LogScrape(a, s); i == 48 {
			tunnel = l
		}
	}
	tunnel.Passed(1000)
	l := logged(t, f)["9182"]
	if l.Scrapes != 50 || l.Failures != 5 || len(l.History) != 20 {
		t.Fatalf("got %d scrapes, %d failures, %d in the history", l.Scrapes, l.Failures, len(l.History))
	}
	for i, e := range l.History {
		if e.Seconds != float64(30+i) || (e.Outcome == "timeout") != (i%10 == 9) {
			t.Errorf("%d: got %+v", i, e)
		}
		if e.Outcome == "timeout" && (len(e.Error) > 210 || !strings.HasPrefix(e.Error, "ää")) {
			t.Errorf("%d: the reason is %q", i, e.Error)
		}
	}
	if l.History[18].Bytes != 1010 {
		t.Errorf("the tunnel's scrape has %d bytes", l.History[18].Bytes)
	}
	if _, bytes, _ := f.Scrapes("web-1"); bytes != 45*10+1000 {
		t.Errorf("%d bytes in all", bytes)
	}

	// Who comes back after it was forgotten begins anew.
	f.Forget("web-1")
	register(t, f, "web-1", protocol.Registration{})
	f.LogScrape(a, scrapeOf(1, "ok")) // of before
	tunnel.Passed(1)
	if logs := logged(t, f); len(logs) != 0 {
		t.Errorf("got %v", logs)
	}
}

// TestScrapeLogBounded: whatever is asked for, the log stays small, and what answers, or
// is declared, keeps its place.
func TestScrapeLogBounded(t *testing.T) {
	t.Parallel()
	f, _ := open(t, fleet.Config{})
	register(t, f, "web-1", protocol.Registration{Targets: []protocol.Target{{Name: "router", Path: "/m"}}})
	a := agentOf(t, f, "web-1")
	f.LogScrape(a, fleet.Scrape{Host: "router.web-1", URL: "http://router.web-1/m", At: time.Now(), Outcome: "target-unreachable", Failed: true})
	for port := 1; port <= 20; port++ {
		f.LogScrape(a, scrapeOf(port, "ok"))
	}
	for port := 1000; port < 2000; port++ {
		f.LogScrape(a, scrapeOf(port, "not-allowed"))
	}
	logs := logged(t, f)
	if len(logs) != 32 {
		t.Errorf("%d targets are logged", len(logs))
	}
	kept := func(first, last int) {
		t.Helper()
		logs := logged(t, f)
		if _, ok := logs["router"]; !ok {
			t.Error("the declared target is gone")
		}
		for port := first; port <= last; port++ {
			if _, ok := logs[fmt.Sprint(port)]; !ok {
				t.Errorf("the port %d is gone", port)
			}
		}
	}
	kept(1, 20)
	kept(1989, 1999) // of the others the last
	for port := 21; port <= 31; port++ {
		f.LogScrape(a, scrapeOf(port, "ok"))
	}
	kept(1, 31)
	f.LogScrape(a, scrapeOf(3000, "not-allowed"))
	kept(1, 31)
	if _, ok := logged(t, f)["3000"]; ok {
		t.Error("a refused port has taken a place")
	}
	// One that answers takes the place of the one that was scraped the longest ago.
	f.LogScrape(a, fleet.Scrape{Host: "router.web-1", URL: "http://router.web-1/m", At: time.Now(), Outcome: "ok", Answered: true})
	f.LogScrape(a, scrapeOf(1, "ok"))
	f.LogScrape(a, scrapeOf(40, "ok"))
	kept(3, 31)
	if _, ok := logged(t, f)["2"]; ok || len(logged(t, f)) != 32 {
		t.Errorf("%d targets, with 2: %v", len(logged(t, f)), ok)
	}
	// The path of a URL is bounded too.
	long := scrapeOf(50, "ok")
	long.URL += strings.Repeat("x", 10_000)
	f.LogScrape(a, long)
	long = scrapeOf(31, "ok")
	long.URL += "?" + strings.Repeat("x", 10_000)
	f.LogScrape(a, long)
	if l := logged(t, f); len(l["31"].URL) > 210 || len(l) != 32 {
		t.Errorf("%d targets, a URL of %d bytes", len(l), len(l["31"].URL))
	}
}

// TestSince: what is told of changes, one after the other, is what is known.
func TestSince(t *testing.T) {
	t.Parallel()
	f, _ := open(t, fleet.Config{})
	known := map[string]fleet.Info{}
	var change uint64
	update := func() fleet.Update {
		t.Helper()
		u, ok := f.Since(change, all)
		if !ok {
			return u
		}
		change = u.Change
		if u.Whole {
			clear(known)
		}
		for _, a := range u.Agents {
			known[a.Name] = a
		}
		for _, name := range u.Gone {
			delete(known, name)
		}
		there := f.Agents()
		if len(there) != len(known) || u.Connected+u.Lost != len(there) {
			t.Errorf("%d agents are told, %d counted, %d are there", len(known), u.Connected+u.Lost, len(there))
		}
		for _, a := range there {
			if told := known[a.Name]; told.Connected != a.Connected || told.Failing != a.Failing || told.Scraped != a.Scraped || told.LostReason != a.LostReason {
				t.Errorf("told %+v, there %+v", told, a)
			}
		}
		return u
	}
	conn := register(t, f, "web-1", protocol.Registration{})
	register(t, f, "web-2", protocol.Registration{})
	if u := update(); !u.Whole || len(u.Agents) != 2 {
		t.Errorf("got %+v", u)
	}
	listed := f.Changes()
	if u, ok := f.Since(change, all); ok {
		t.Errorf("nothing has changed, and got %+v", u)
	}
	if u, ok := f.Since(change+1, all); !ok || !u.Whole {
		t.Errorf("of the future: %+v", u)
	}
	a := agentOf(t, f, "web-1")
	for _, c := range []struct {
		outcome          string
		told             bool
		scraped, failing int
	}{
		{"ok", true, 1, 0}, {"ok", false, 1, 0}, {"timeout", true, 1, 1}, {"cancelled", false, 1, 1}, {"timeout", false, 1, 1}, {"ok", true, 1, 0},
	} {
		f.LogScrape(a, scrapeOf(9100, c.outcome))
		u := update()
		if told := len(u.Agents) == 1; told != c.told || known["web-1"].Scraped != c.scraped || known["web-1"].Failing != c.failing || c.told && u.Failing != c.failing {
			t.Errorf("after %s: told %v, %+v", c.outcome, told, known["web-1"])
		}
	}
	if f.Changes() != listed {
		t.Error("discovery's list is outdated by what it doesn't list")
	}
	f.Lost(conn, "test")
	if u := update(); u.Whole || len(u.Agents) != 1 || u.Lost != 1 {
		t.Errorf("got %+v", u)
	}
	f.Forget("web-1")
	if u := update(); u.Whole || !slices.Equal(u.Gone, []string{"web-1"}) {
		t.Errorf("got %+v", u)
	}
	// One that comes back is not gone, and who may not see it is not told.
	f.Forget("web-2")
	register(t, f, "web-2", protocol.Registration{})
	f.Forget("web-2")
	if u, ok := f.Since(change, func(name string) bool { return name != "web-2" }); !ok || len(u.Gone) != 0 || len(u.Agents) != 0 || u.Connected != 0 {
		t.Errorf("got %+v", u)
	}
	conn = register(t, f, "web-2", protocol.Registration{})
	if u := update(); len(u.Agents) != 1 || len(u.Gone) != 0 {
		t.Errorf("got %+v", u)
	}
	// Who went is remembered for a while.
	for range 1100 {
		if err := f.Leave(t.Context(), conn); err != nil {
			t.Fatal(err)
		}
		if err := f.Register(t.Context(), conn, protocol.Registration{}); err != nil {
			t.Fatal(err)
		}
	}
	if u := update(); !u.Whole {
		t.Errorf("got %+v", u)
	}
}

// TestScrapeLogRace scrapes, reads and forgets at the same time.
func TestScrapeLogRace(t *testing.T) {
	t.Parallel()
	f, _ := open(t, fleet.Config{})
	register(t, f, "web-1", protocol.Registration{Targets: []protocol.Target{{Name: "router", Path: "/m"}}})
	a := agentOf(t, f, "web-1")
	var scraping sync.WaitGroup
	for i := range 4 {
		scraping.Go(func() {
			for n := range 500 {
				l := f.LogScrape(a, scrapeOf(1+(n*7+i)%50, []string{"ok", "timeout", "cancelled"}[n%3]))
				l.Passed(1)
			}
		})
	}
	scraping.Go(func() {
		var change uint64
		for range 200 {
			if u, ok := f.Since(change, all); ok {
				change = u.Change
			}
			f.Scrapes("web-1")
		}
	})
	scraping.Wait()
	f.Forget("web-1")
}

// TestScrapeLogAges: what nobody scrapes any more says nothing of the agent's health, and
// goes in the end.
func TestScrapeLogAges(t *testing.T) {
	t.Parallel()
	f, _ := open(t, fleet.Config{ForgetAfter: 100 * time.Millisecond}) // it looks ten times as often
	register(t, f, "web-1", protocol.Registration{})
	a := agentOf(t, f, "web-1")
	ago := func(port int, outcome string, age time.Duration) {
		s := scrapeOf(port, outcome)
		s.At = time.Now().Add(-age)
		f.LogScrape(a, s)
	}
	ago(1, "ok", 10*time.Minute)
	ago(2, "not-allowed", 10*time.Minute)
	ago(3, "not-allowed", 20*time.Minute)
	ago(4, "ok", 3*time.Hour)
	ago(4, "timeout", 2*time.Hour)
	ago(5, "ok", 25*time.Hour)
	eventually(t, "old targets are let go", func() bool { return len(logged(t, f)) == 3 })
	info, _ := f.Agent("web-1")
	logs := logged(t, f)
	if _, ok := logs["4"]; !ok || info.Scraped != 3 || info.Failing != 1 {
		t.Errorf("got %+v, %d scraped, %d failing", logs, info.Scraped, info.Failing)
	}
}

// BenchmarkLogScrape is what a scrape costs more for being logged, of an agent with a few
// targets.
func BenchmarkLogScrape(b *testing.B) {
	f, err := fleet.Open(fleet.Config{SettleTime: -1})
	if err != nil {
		b.Fatal(err)
	}
	conn, _ := connect(b, "web-1", "1")
	if err := f.Register(b.Context(), conn, protocol.Registration{}); err != nil {
		b.Fatal(err)
	}
	route, _ := f.Resolve("web-1")
	scrapes := []fleet.Scrape{scrapeOf(9100, "ok"), scrapeOf(9187, "ok"), scrapeOf(9182, "ok")}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		f.LogScrape(route.Agents[0], scrapes[i%len(scrapes)])
	}
}

// BenchmarkSince asks for changes of 10,000 agents: where there are none, where one has
// changed, and for all of them.
func BenchmarkSince(b *testing.B) {
	f, err := fleet.Open(fleet.Config{SettleTime: -1})
	if err != nil {
		b.Fatal(err)
	}
	var conn *fleet.Conn
	for i := range 10_000 {
		// What their sessions cost is not what is measured.
		conn = fleet.NewPushProxConn(new(deadLink), fmt.Sprintf("web-%d", i), "1", "")
		if err := f.Register(b.Context(), conn, protocol.Registration{}); err != nil {
			b.Fatal(err)
		}
	}
	for _, c := range []struct {
		name string
		back uint64
	}{{"none", 0}, {"one", 1}, {"all", 1 << 62}} {
		b.Run(c.name, func(b *testing.B) {
			u, _ := f.Since(0, all)
			change := u.Change - min(c.back, u.Change)
			b.ReportAllocs()
			for b.Loop() {
				f.Since(change, all)
			}
		})
	}
}

// deadLink is a link that carries nothing.
type deadLink struct{ fleet.Link }

func (*deadLink) Err() error { return nil }
