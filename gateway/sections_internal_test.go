package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/common/expfmt"
)

// exposed is a store in memory whose scrapes are compared with those of a gateway that has
// kept nothing.
type exposed struct {
	t testing.TB
	*Gateway
}

func newExposed(t testing.TB) exposed {
	store, err := OpenStore(StoreConfig{Logger: slog.New(slog.DiscardHandler)}, Memory())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- store.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return exposed{t, New(Config{}, store)}
}

func (x exposed) push(rest, body string) {
	x.t.Helper()
	w := httptest.NewRecorder()
	x.ServePush(w, httptest.NewRequest(http.MethodPut, "/", strings.NewReader(body)), rest)
	if w.Code != http.StatusOK {
		x.t.Fatalf("%s: %d %s", rest, w.Code, w.Body)
	}
}

func (x exposed) delete(rest string) {
	x.t.Helper()
	w := httptest.NewRecorder()
	x.ServeDelete(w, httptest.NewRequest(http.MethodDelete, "/", nil), rest)
	if w.Code != http.StatusAccepted {
		x.t.Fatalf("%s: %d %s", rest, w.Code, w.Body)
	}
}

// scrape returns what a moment looks like by what is kept.
func (x exposed) scrape(at *moment, kept *expositions) string {
	x.t.Helper()
	w := httptest.NewRecorder()
	expose(w, httptest.NewRequest(http.MethodGet, "/metrics", nil), at, nil, kept, slog.New(slog.DiscardHandler))
	return w.Body.String()
}

func (x exposed) expectAsAnew(at *moment) {
	x.t.Helper()
	want := x.scrape(at, newExpositions(standardGzip, func() {}))
	if got := x.scrape(at, x.kept); got != want {
		missing, surplus := difference(want, got), difference(got, want)
		x.t.Errorf("%d lines are missing, as\n%.500s\nand %d are not to be there, as\n%.500s", len(missing), strings.Join(missing, ""), len(surplus), strings.Join(surplus, ""))
	}
}

// difference returns the lines of a that b lacks.
func difference(a, b string) []string {
	lines := map[string]int{}
	for line := range strings.Lines(b) {
		lines[line]++
	}
	return slices.DeleteFunc(slices.Collect(strings.Lines(a)), func(line string) bool {
		lines[line]--
		return lines[line] >= 0
	})
}

// Sections of large groups end where they have too many series. Where a group goes, the
// next one takes its place there, and there are as many groups as before.
func TestSectionsOfLargeGroups(t *testing.T) {
	x := newExposed(t)
	var body strings.Builder
	for n := range sectionSeries/2 - 100 {
		fmt.Fprintf(&body, "m{n=\"%d\"} 1\n", n)
	}
	for n := range 8 {
		x.push(fmt.Sprintf("/j/instance/%d", n), body.String())
	}
	x.expectAsAnew(x.store.moment())
	for _, n := range []int{1, 4} {
		x.delete(fmt.Sprintf("/j/instance/%d", n))
		x.expectAsAnew(x.store.moment())
	}
}

// A scrape may wait until another one, which came later and saw more, has made its
// sections.
func TestSectionsOfALaterMoment(t *testing.T) {
	for name, change := range map[string]func(x exposed){
		"a family comes":           func(x exposed) { x.push("/j/instance/2", "a 1\nb 1\nc 1\n") },
		"a family goes":            func(x exposed) { x.push("/j/instance/2", "a 1\n") },
		"a group goes":             func(x exposed) { x.delete("/j/instance/2") },
		"one takes another's slot": func(x exposed) { x.delete("/j/instance/2"); x.push("/j/instance/20", "a 1\n") },
		"a value":                  func(x exposed) { x.push("/j/instance/2", "a 2\nc 2\n") },
	} {
		t.Run(name, func(t *testing.T) {
			x := newExposed(t)
			for n := range 5 {
				x.push(fmt.Sprintf("/j/instance/%d", n), "a 1\nc 1\n")
			}
			before := x.store.moment()
			change(x)
			after := x.store.moment()
			for _, at := range []*moment{after, before, after, before} {
				x.expectAsAnew(at)
			}
		})
	}
}

// What is kept of the groups stays where the server's own metrics are scraped in between,
// and goes with the groups.
func TestSectionsStay(t *testing.T) {
	x := newExposed(t)
	x.push("/j", "a 1\n")
	format := expfmt.Format("")
	scrape := func(query string) {
		w := httptest.NewRecorder()
		ServeMetrics(x.Gateway, w, httptest.NewRequest(http.MethodGet, "/metrics"+query, nil))
		format = expfmt.Format(w.Header().Get("Content-Type"))
	}
	scrape("?only=groups")
	kept := x.kept.of(format)
	if len(kept.sections) != 1 {
		t.Fatalf("%d sections are kept", len(kept.sections))
	}
	scrape("?only=self")
	if len(kept.sections) != 1 {
		t.Errorf("%d sections are kept after a scrape of other metrics", len(kept.sections))
	}
	x.delete("/j")
	scrape("")
	if len(kept.sections) != 0 {
		t.Errorf("%d sections are kept of no groups", len(kept.sections))
	}
}
