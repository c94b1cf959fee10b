package gateway_test

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/gateway"
)

// TestPath: the path of a key leads to it again, and comes through a router as it is.
func TestPath(t *testing.T) {
	for _, c := range []struct {
		labels map[string]string
		want   string
	}{
		{map[string]string{"job": "backup"}, "job/backup"},
		{map[string]string{"job": "backup", "instance": "web-1", "a": "b"}, "job/backup/a/b/instance/web-1"},
		{map[string]string{"job": "a/b", "x": "/"}, "job@base64/YS9i/x@base64/Lw"},
		{map[string]string{"job": "j", "x": ""}, "job/j/x@base64/="},
		{map[string]string{"job": ".", "x": ".."}, "job@base64/Lg/x@base64/Li4"},
		{map[string]string{"job": "a b%2F?#+", "x": "ü\n"}, "job/a%20b%252F%3F%23+/x/%C3%BC%0A"},
		{map[string]string{"job": "j", "foo.bar": "x", "a/b": "y"}, "job/j/U__a_2f_b/y/U__foo_2e_bar/x"},
		{map[string]string{"job": "j", "U__foo_2e_bar": "x"}, ""},
		{map[string]string{"job": "j", "U__": "x"}, ""},
	} {
		key, err := gateway.NewKey(c.labels)
		if err != nil {
			t.Fatal(err)
		}
		path := gateway.PathOf(key)
		if c.want != "" && path != c.want {
			t.Errorf("%s: got %q, want %q", key, path, c.want)
		}
		got := ""
		mux := http.NewServeMux() // it cleans paths
		mux.HandleFunc("/metrics/", func(_ http.ResponseWriter, r *http.Request) { got = r.URL.Path })
		mux.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/metrics/"+path, nil))
		back, err := gateway.ParsePath(strings.TrimPrefix(got, "/metrics/job"))
		if err != nil || back.ID() != key.ID() {
			t.Errorf("%s: %q leads to %s, %v", key, path, back, err)
		}
	}
}

func FuzzPath(f *testing.F) {
	f.Add("backup", "instance", "web-1")
	f.Add("/", "U__a_2e_b", "..")
	f.Fuzz(func(t *testing.T, job, name, value string) {
		key, err := gateway.NewKey(map[string]string{"job": job, name: value})
		if err != nil || name == "job" {
			return
		}
		plain, err := url.PathUnescape(gateway.PathOf(key))
		if err != nil {
			t.Fatal(err)
		}
		back, err := gateway.ParsePath(strings.TrimPrefix(plain, "job"))
		if err != nil || back.ID() != key.ID() {
			t.Errorf("%s: %q leads to %s, %v", key, gateway.PathOf(key), back, err)
		}
	})
}

// TestSince: what is told of changes, one after the other, is what is there.
func TestSince(t *testing.T) {
	clock := newClock()
	store, err := gateway.OpenStore(gateway.StoreConfig{Now: clock.now, Logger: slog.New(slog.DiscardHandler)}, gateway.Memory())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- store.Run(ctx) }()
	defer func() { cancel(); <-done }()
	s := server{t: t, Gateway: gateway.New(gateway.Config{}, store)}
	push := func(path, body string) { t.Helper(); s.want(200, "PUT", path, body) }
	remove := func(path string) { t.Helper(); s.want(202, "DELETE", path, "") }
	known := map[string]bool{}
	var change uint64
	update := func() gateway.GroupUpdate {
		t.Helper()
		u, ok := gateway.Since(store, change)
		if !ok {
			return u
		}
		change = u.Change
		if u.Whole {
			clear(known)
		}
		for _, g := range u.Groups {
			known[g.Key.String()] = true
		}
		for _, k := range u.Gone {
			delete(known, k.String())
		}
		there := store.Groups()
		if len(there) != len(known) || u.Count != len(there) {
			t.Errorf("%d groups are known, %d counted, %d are there", len(known), u.Count, len(there))
		}
		for _, g := range there {
			if !known[g.Key.String()] {
				t.Errorf("the group %s is there and was not told", g.Key)
			}
		}
		return u
	}
	push("/a", "x 1\n")
	push("/b", "x 1\n")
	if u := update(); !u.Whole || len(u.Groups) != 2 {
		t.Errorf("got %+v", u)
	}
	if u, ok := gateway.Since(store, change); ok {
		t.Errorf("nothing has changed, and got %+v", u)
	}
	push("/b", "x 2\n")
	if u := update(); u.Whole || len(u.Groups) != 1 || u.Groups[0].Series != 1 {
		t.Errorf("got %+v", u)
	}
	remove("/a")
	if u := update(); u.Whole || len(u.Groups) != 0 || len(u.Gone) != 1 {
		t.Errorf("got %+v", u)
	}
	// One that comes back is not gone.
	remove("/b")
	push("/b", "x 1\n")
	if u := update(); len(u.Groups) != 1 || len(u.Gone) != 0 {
		t.Errorf("got %+v", u)
	}
	// Of two that were removed of which the first is no longer remembered, all is told.
	for i := range 1100 {
		push(fmt.Sprintf("/c/n/%d", i), "x 1\n")
	}
	update()
	for i := range 1100 {
		remove(fmt.Sprintf("/c/n/%d", i))
	}
	if u := update(); !u.Whole || len(u.Groups) != 1 {
		t.Errorf("whole %v, %d groups, %d gone", u.Whole, len(u.Groups), len(u.Gone))
	}
}

// TestServeGroup: the series of one group are those that /metrics has of it.
func TestServeGroup(t *testing.T) {
	t.Parallel()
	s := start(t, gateway.StoreConfig{}, gateway.Memory())
	s.want(200, "PUT", "/a/x@base64/Yi9j", "# HELP y told\n# TYPE y counter\ny{l=\"1\"} 1\ny{l=\"2\"} 2\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 3\nh_sum 4\nh_count 3\n")
	s.want(200, "PUT", "/b", "# HELP y told\n# TYPE y counter\ny 3\n")
	serve := func(rest string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		r := httptest.NewRequest("GET", "/api/v1/groups/job"+rest, nil)
		r.Header.Set("Accept", "text/html, application/openmetrics-text, */*;q=0.8")
		gateway.ServeGroup(s.Gateway, w, r, rest)
		return w
	}
	got := serve("/a/x/b/c")
	if got.Code != 400 {
		t.Errorf("an odd path: %d %s", got.Code, got.Body)
	}
	got = serve("/a/x@base64/Yi9j")
	if got.Code != 200 || !strings.HasPrefix(got.Header().Get("Content-Type"), "text/plain; version=0.0.4") {
		t.Errorf("got %d %v", got.Code, got.Header())
	}
	var want []string
	for line := range strings.Lines(s.samples(true)) {
		if strings.Contains(line, `job="a"`) {
			want = append(want, strings.TrimSpace(line))
		}
	}
	var lines []string
	for line := range strings.Lines(got.Body.String()) {
		if !strings.HasPrefix(line, "#") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	if len(lines) != 7 || strings.Join(lines, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", got.Body, strings.Join(want, "\n"))
	}
	for _, comment := range []string{"# HELP y told\n# TYPE y counter\n", "# TYPE h histogram\n"} {
		if !strings.Contains(got.Body.String(), comment) {
			t.Errorf("%q is missing in\n%s", comment, got.Body)
		}
	}
	if got := serve("/nobody"); got.Code != 404 || !strings.Contains(got.Body.String(), `no group {job="nobody"}`) {
		t.Errorf("got %d %s", got.Code, got.Body)
	}
}

// TestHelpOfMostRecent pushes a metric with several HELP texts at times that come and go:
// that of the most recent push that is there counts, and of two at one time that of the
// first group.
func TestHelpOfMostRecent(t *testing.T) {
	s := start(t, gateway.StoreConfig{Now: newClock().now}, gateway.Memory())
	type push struct{ at, help int }
	groups := map[int]push{}
	random := rand.New(rand.NewPCG(3, 4))
	for step := range 2000 {
		group := random.IntN(6)
		if path := fmt.Sprintf("/j/instance/%d", group); random.IntN(4) == 0 {
			s.want(202, "DELETE", path, "")
			delete(groups, group)
		} else {
			p := push{1_899_999_000 + random.IntN(8), random.IntN(3)}
			s.want(200, "PUT", path, fmt.Sprintf("# HELP m text %d\nm %d\n", p.help, step), gateway.HeaderPushTime, strconv.Itoa(p.at))
			groups[group] = p
		}
		if len(groups) == 0 {
			continue
		}
		latest := push{}
		for _, group := range slices.Sorted(maps.Keys(groups)) {
			if groups[group].at > latest.at {
				latest = groups[group]
			}
		}
		if text := s.scrape().Body.String(); !strings.Contains(text, fmt.Sprintf("# HELP m text %d\n", latest.help)) {
			t.Fatalf("after step %d, of %v: got\n%s", step, groups, text)
		}
	}
}
