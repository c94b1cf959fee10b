package ui_test

import (
	"fmt"
	"testing"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/network"
)

// BenchmarkPage tells how long people wait in a real Chromium, with an empty cache: from
// the click until the first rows are painted, which the proxy has made; until the page is
// live and knows all agents; from a key until a filtered list is painted; and from a jump
// to elsewhere in the list until that is. Beside it stands the same with 100 agents.
func BenchmarkPage(b *testing.B) {
	for _, agents := range []int{100, 5000} {
		b.Run(fmt.Sprintf("agents=%d", agents), func(b *testing.B) {
			s := newSite(b, nil)
			tab := newBrowser(b, s)
			s.startAgents(0, agents)
			s.push(agents / 10)
			tab.desktop()
			sums := map[string]float64{}
			n := 0.0
			for b.Loop() {
				call(tab, network.ClearBrowserCache, cdp.Empty{})
				tab.open("")
				tab.await(fmt.Sprintf(`document.querySelector("#rows").getAttribute("aria-rowcount") === "%d" && performance.getEntriesByName("first-contentful-paint").length > 0`, agents+1))
				for name, ms := range value[map[string]float64](tab, `(async () => {
					const painted = () => new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(performance.now()))));
					const found = {"first-rows-ms": performance.getEntriesByName("first-contentful-paint")[0].startTime};
					const update = performance.getEntriesByType("resource").find((r) => r.name.includes("api/v1/page"));
					found["live-ms"] = update.responseEnd;
					const filter = document.getElementById("filter");
					let began = performance.now();
					filter.value = "role=database env=prod 1";
					filter.dispatchEvent(new Event("input"));
					found["filter-ms"] = await painted() - began;
					filter.value = "";
					filter.dispatchEvent(new Event("input"));
					await painted();
					began = performance.now();
					document.querySelector("main").scrollTop = 1e5;
					await painted();
					found["scroll-ms"] = performance.now() - began;
					return found;
				})()`) {
					sums[name] += ms
				}
				n++
			}
			for name, sum := range sums {
				b.ReportMetric(sum/n, name)
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}
