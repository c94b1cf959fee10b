package ui_test

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol/externaltest"
	"github.com/culvert-io/culvert/proxy/server"
)

// browser is a tab of a real Chromium that looks at a site.
type browser struct {
	t    testing.TB
	ctx  context.Context
	site *site

	mu       sync.Mutex // protects what follows
	troubles []string   // errors of the console, and requests to elsewhere
}

func newBrowser(t testing.TB, s *site, more ...chromedp.ExecAllocatorOption) *browser {
	t.Helper()
	program := ""
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "chrome"} {
		if path, err := exec.LookPath(name); err == nil {
			program = path
			break
		}
	}
	if program == "" {
		externaltest.Missing(t, "chromium is not installed: apt-get install chromium")
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(program), chromedp.NoSandbox, chromedp.WindowSize(1280, 800), chromedp.Flag("disable-component-update", true))
	allocator, end := chromedp.NewExecAllocator(context.Background(), append(options, more...)...)
	t.Cleanup(end)
	b := &browser{t: t, site: s}
	ctx, _ := chromedp.NewContext(allocator, chromedp.WithListener(b.listen))
	t.Cleanup(func() {
		if err := chromedp.Cancel(ctx); err != nil {
			t.Errorf("end the browser: %v", err)
		}
	})
	b.ctx = ctx
	if err := chromedp.Do(ctx); err != nil { // without a time limit, which would be the browser's
		t.Fatalf("start %s: %v", program, err)
	}
	call(b, network.Enable, network.EnableParams{})
	call(b, log.Enable, cdp.Empty{})
	return b
}

// listen notes what must not happen.
func (b *browser) listen(event any) {
	trouble := ""
	switch event := event.(type) {
	case *network.EventRequestWillBeSent:
		if u, err := url.Parse(event.Request.URL); err != nil || u.Host != b.site.Addr() && u.Scheme != "data" {
			trouble = "a request to " + event.Request.URL
		}
	case *runtime.EventExceptionThrown:
		trouble = "exception: " + event.ExceptionDetails.Text
		if e := event.ExceptionDetails.Exception; e != nil {
			trouble += " " + e.Description
		}
	case *runtime.EventConsoleAPICalled:
		if event.Type == runtime.ConsoleAPICalledTypeError || event.Type == runtime.ConsoleAPICalledTypeWarning {
			trouble = "console:"
			for _, arg := range event.Args {
				trouble += " " + string(arg.Value) + arg.Description
			}
		}
	case *log.EventEntryAdded:
		if e := event.Entry; e.Level == log.EntryLevelError || e.Level == log.EntryLevelWarning {
			trouble = fmt.Sprintf("log: %s %s", e.Text, e.URL)
		}
	}
	if trouble == "" {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.troubles = append(b.troubles, trouble)
}

// fail ends the test, and tells what the page shows.
func (b *browser) fail(format string, args ...any) {
	b.t.Helper()
	text, err := run(b, chromedp.Evaluate[string]("document.body.innerText.slice(0, 3000)"))
	if err != nil {
		text = err.Error()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.t.Fatalf("%s; troubles: %q; the page shows:\n%s", fmt.Sprintf(format, args...), b.troubles, text)
}

// run runs an action within the test's patience.
func run[T any](b *browser, action chromedp.Action[T]) (T, error) {
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	return chromedp.Run(ctx, action)
}

// do runs actions.
func (b *browser) do(actions ...chromedp.Action[chromedp.Void]) {
	b.t.Helper()
	if _, err := run(b, chromedp.Steps(actions...)); err != nil {
		b.fail("%v", err)
	}
}

// call sends a command of the DevTools protocol.
func call[P, R any](b *browser, command cdp.Command[P, R], params P) R {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.ctx, patience)
	defer cancel()
	result, err := chromedp.Call(ctx, command, params)
	if err != nil {
		b.fail("%s: %v", command.Method, err)
	}
	return result
}

// value evaluates an expression in the page.
func value[T any](b *browser, expression string) T {
	b.t.Helper()
	v, err := run(b, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
	if err != nil {
		b.fail("%s: %v", expression, err)
	}
	return v
}

// await waits until an expression is true in the page.
func (b *browser) await(expression string) {
	b.t.Helper()
	if _, err := run(b, chromedp.Poll[chromedp.Void](expression, chromedp.WithPollingInterval(20*time.Millisecond), chromedp.WithPollingTimeout(patience))); err != nil {
		b.fail("%s is not true: %v", expression, err)
	}
}

// open loads the page of a query, and waits until it is live.
func (b *browser) open(query string) {
	b.t.Helper()
	b.do(chromedp.Navigate(b.site.url + query))
	b.await(`document.querySelector("#live").textContent === "live"`)
}

// theme has the system say that people like it light or dark.
func (b *browser) theme(theme string) {
	b.t.Helper()
	call(b, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: theme}}})
}

// size makes the screen one of a desktop or of a phone.
func (b *browser) size(width, height int64, phone bool) {
	b.t.Helper()
	call(b, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{Width: width, Height: height, DeviceScaleFactor: 1, Mobile: phone})
	call(b, emulation.SetTouchEmulationEnabled, emulation.SetTouchEmulationEnabledParams{Enabled: phone})
}

func (b *browser) desktop() { b.t.Helper(); b.size(1280, 800, false) }
func (b *browser) phone()   { b.t.Helper(); b.size(390, 844, true) }

// axe is axe-core, which finds what keeps people with disabilities out.
func axe(t testing.TB) string {
	t.Helper()
	// From NODE_PATH, or among npm's global packages.
	dirs := filepath.SplitList(os.Getenv("NODE_PATH"))
	if global, err := exec.CommandContext(t.Context(), "npm", "root", "--global").Output(); err == nil {
		dirs = append(dirs, strings.TrimSpace(string(global)))
	}
	for _, dir := range dirs {
		if script, err := os.ReadFile(filepath.Join(dir, "axe-core", "axe.min.js")); err == nil {
			return string(script)
		}
	}
	externaltest.Missing(t, "axe-core is not installed: npm install --global axe-core")
	return ""
}

// accessible fails the test where axe-core finds a serious fault in what the page shows.
func (b *browser) accessible(script, where string) {
	b.t.Helper()
	if !value[bool](b, "typeof axe === 'object'") {
		value[any](b, script+"\n;null")
	}
	found := value[[]string](b, `axe.run(document, {resultTypes: ["violations"], preload: false}).then(({violations}) => violations
		.filter(({impact}) => impact === "serious" || impact === "critical")
		.map(({id, help, nodes}) => id + ": " + help + ": " + nodes.slice(0, 3).map((n) => n.html.slice(0, 200) + " " + n.failureSummary).join(" | ")))`)
	for _, fault := range found {
		b.t.Errorf("%s: %s", where, fault)
	}
	if wide := value[int](b, "document.scrollingElement.scrollWidth - innerWidth"); wide > 0 {
		b.t.Errorf("%s: the page is %d px wider than the screen", where, wide)
	}
}

// press presses a key.
func (b *browser) press(key string) {
	b.t.Helper()
	b.do(chromedp.KeyEvent(key))
}

// write presses the keys of a text. A key that the page has a use for of its own writes
// nothing.
func (b *browser) write(text string) {
	b.t.Helper()
	for _, r := range text {
		key := string(r)
		call(b, input.DispatchKeyEvent, input.DispatchKeyEventParams{Type: input.DispatchKeyEventTypeKeyDown, Key: key, Text: key})
		call(b, input.DispatchKeyEvent, input.DispatchKeyEventParams{Type: input.DispatchKeyEventTypeKeyUp, Key: key})
	}
}

// click clicks the first element of a selector.
func (b *browser) click(selector string) {
	b.t.Helper()
	b.do(chromedp.Click(chromedp.CSS(selector), chromedp.NodeVisible))
}

// text is what an element says.
func (b *browser) text(selector string) string {
	b.t.Helper()
	return value[string](b, fmt.Sprintf("document.querySelector(%q).textContent", selector))
}

// quiet fails the test where the console had an error, or something was asked elsewhere.
// Of answers that were provoked, the browser itself writes to the console.
func (b *browser) quiet(provoked ...string) {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, trouble := range b.troubles {
		if !slices.ContainsFunc(provoked, func(part string) bool { return strings.Contains(trouble, part) }) {
			b.t.Error(trouble)
		}
	}
	b.troubles = nil
}

// TestBrowser has Chromium do what people do with the page of a proxy that has many
// agents and groups.
func TestBrowser(t *testing.T) {
	script := axe(t)
	agents, groups := 2000, 500
	if raceEnabled {
		agents, groups = 200, 100
	}
	s := newSite(t, nil)
	b := newBrowser(t, s)
	s.startAgents(0, agents)
	s.push(groups)
	for range 8 {
		for i := range 40 {
			s.scrape("app", hostName(i))
		}
	}
	s.scrape("agent", hostName(0), hostName(4))
	s.scrape("9100", hostName(5)) // which no agent allows
	lost := 0

	for round, theme := range []string{"light", "dark"} {
		b.theme(theme)
		b.desktop()

		b.open("")
		rowCount := func(n int) string {
			return fmt.Sprintf(`document.querySelector("#rows").getAttribute("aria-rowcount") === "%d"`, n+1)
		}
		b.await(rowCount(agents - 0))
		if n := value[int](b, `document.querySelectorAll("#rows tbody th").length`); n > 80 {
			t.Errorf("%s: %d rows are elements; only those in view should be", theme, n)
		}
		if n := value[int](b, `document.querySelectorAll("#rows tbody th a[tabindex='0']").length`); n != 1 {
			t.Errorf("%s: %d rows are in the tab order, want 1", theme, n)
		}
		b.await(`document.querySelectorAll("#rows .spark").length > 2`)
		b.accessible(script, theme+" agents")
		b.shot("agents-" + theme)

		// The proxy sorts as the page does.
		for _, sort := range []string{"-name", "state", "since", "-version"} {
			made := value[string](b, fmt.Sprintf(`new Promise((resolve) => {
				const request = new XMLHttpRequest();
				request.open("GET", "./?sort=%s");
				request.responseType = "document";
				request.onload = () => resolve([...request.response.querySelectorAll("#rows tbody th")].slice(0, 15).map((th) => th.textContent).join());
				request.send();
			})`, sort))
			value[any](b, fmt.Sprintf(`{
				const column = document.querySelector("#rows [data-sort=%s]");
				while (column.parentElement.getAttribute("aria-sort") !== %q) column.click();
			} null`, strings.TrimPrefix(sort, "-"), map[bool]string{true: "descending", false: "ascending"}[sort[0] == '-']))
			if shown := value[string](b, `[...document.querySelectorAll("#rows tbody th")].slice(0, 15).map((th) => th.textContent).join()`); shown != made {
				t.Errorf("%s: sorted by %s the page shows %s, and the proxy %s", theme, sort, shown, made)
			}
		}
		value[any](b, `document.querySelector("#rows [data-sort=name]").click(), null`)

		// To the last row, which is one of the highest number.
		value[any](b, `document.querySelector("main").scrollTop = 1e9, null`)
		last := fmt.Sprintf("web-%d.example.net", agents/len(hosts))
		b.await(fmt.Sprintf(`[...document.querySelectorAll("#rows tbody th")].at(-1).textContent === %q`, last))
		value[any](b, `document.querySelector("main").scrollTop = 0, null`)

		// Filter as one types, sort by a column, open a row by keys alone.
		b.write("/")
		b.await(`document.activeElement.id === "filter"`)
		b.write("role=database env=prod db-1")
		b.await(fmt.Sprintf(`document.querySelector("#found").textContent.endsWith(" of %s")`, thousands(agents)))
		b.await(`location.search.includes("q=role")`)
		if name := value[string](b, `document.querySelector("#rows tbody th").textContent`); name != "db-1.example.net" {
			t.Errorf("%s: the first row that is found is %q", theme, name)
		}
		b.click(`#rows thead [data-sort="name"]`)
		b.await(`document.querySelector("#rows thead [aria-sort]").getAttribute("aria-sort") === "descending"`)
		b.click(`#rows thead [data-sort="name"]`)
		b.await(`document.querySelector("#rows tbody th").textContent === "db-1.example.net"`)
		b.do(chromedp.Focus(chromedp.CSS("#filter")))
		b.press(kb.ArrowDown)
		b.await(`document.activeElement.textContent === "db-1.example.net"`)
		b.press(kb.ArrowDown)
		b.press(kb.ArrowUp)
		b.press(kb.Enter)
		b.await(`document.querySelector("#panel-title")?.textContent === "db-1.example.net"`)
		b.await(`document.activeElement.id === "panel-title"`)
		b.await(`document.querySelector("#panel .history")`)

		// Scrape a target now, and a port that the agent doesn't allow.
		b.click(`#panel [aria-label="Scrape now: app"]`)
		b.await(`document.querySelector("#panel .target .output pre")?.textContent.includes("app_requests_total")`)
		if head := b.text("#panel .target .output p"); !strings.Contains(head, "200 in ") || !strings.Contains(head, ", 296 B") || !strings.Contains(head, "text/plain") {
			t.Errorf("%s: over what came back stands %q", theme, head)
		}
		b.shot("agent-" + theme)
		b.accessible(script, theme+" agent")
		b.do(chromedp.SendKeys(chromedp.CSS("#panel [name=port]"), "9100"+kb.Enter))
		b.await(`document.querySelector("#panel form + .output")?.textContent.includes('does not allow port 9100 of "db-1.example.net"; start it with --allow=9100')`)
		if head := b.text("#panel form + .output p"); !strings.Contains(head, "403 not-allowed") {
			t.Errorf("%s: over the refusal stands %q", theme, head)
		}
		b.press(kb.Escape) // the field has text, which Escape is for
		b.do(chromedp.Focus(chromedp.CSS("#panel .close")))
		b.press(kb.Escape)
		b.await(`document.querySelector("#panel").hidden && document.activeElement.textContent === "db-1.example.net"`)

		// An agent drops while somebody looks, and keeps the focus.
		b.open("?q=queue-" + fmt.Sprint(round+1) + ".example")
		b.await(`document.querySelector("#rows tbody th a")`)
		gone := fmt.Sprintf("queue-%d.example.net", round+1)
		b.do(chromedp.Focus(chromedp.CSS("#rows tbody th a")))
		value[any](b, `window.before = document.querySelector("#rows tr:has(th[scope=row])"), null`)
		s.stopAgent(gone)
		lost++
		b.await(`document.querySelector("#rows tr:has(th[scope=row])").classList.contains("lost")`)
		b.await(fmt.Sprintf(`document.querySelector(".chip.lost b").textContent === "%d"`, lost))
		b.await(fmt.Sprintf(`document.querySelector("#say").textContent === "%s is lost"`, gone))
		if !value[bool](b, `window.before === document.activeElement.closest("tr")`) {
			t.Errorf("%s: the row of the lost agent, or its focus, is another one now", theme)
		}
		b.click(".chip.lost")
		b.await(rowCount(lost))
		b.accessible(script, theme+" lost agents")
		b.click(".chip.lost")
		b.await(rowCount(agents))

		// A group: its samples, and its end.
		b.click(`nav [data-view="groups"]`)
		b.await(rowCount(groups))
		b.accessible(script, theme+" groups")
		b.shot("groups-" + theme)
		b.click("#rows tbody th a")
		b.await(`document.querySelector("#panel-title")`)
		name := value[string](b, `new URLSearchParams(location.search).get("group")`)
		b.click("#panel h3 + button")
		b.await(`document.querySelector("#panel .samples")?.textContent.includes("job_rows{")`)
		b.accessible(script, theme+" group")
		b.shot("group-" + theme)
		b.click("#panel .danger")
		b.await(`document.querySelector("dialog[open]")`)
		b.accessible(script, theme+" dialog")
		b.shot("delete-" + theme)
		b.press(kb.Escape)
		b.await(`!document.querySelector("dialog") && document.activeElement.matches("#panel .danger")`)
		b.click("#panel .danger")
		b.click("dialog .danger")
		groups--
		b.await(rowCount(groups))
		b.await(`document.querySelector("#panel").hidden`)
		if a := s.get("api/v1/groups/" + name); a.code != 404 {
			t.Errorf("%s: the group %s that was deleted is there: %d %s", theme, name, a.code, a.body)
		}

		// Several by a selector: nothing goes before it was shown.
		b.click(".actions button")
		selector := fmt.Sprintf(`{job="report",instance=~"build-%d[0-9]?.example.net"}`, round+1)
		b.do(chromedp.SendKeys(chromedp.CSS("dialog [name=match]"), "{job="+kb.Enter))
		b.await(`document.querySelector("dialog .why").textContent.includes("match[]")`)
		value[any](b, `document.querySelector("dialog [name=match]").select(), null`)
		b.write(selector)
		b.press(kb.Enter)
		b.await(`document.querySelectorAll("dialog li").length > 0`)
		going := value[int](b, `document.querySelectorAll("dialog li").length`)
		b.accessible(script, theme+" selector")
		b.shot("selector-" + theme)
		if n := value[int](b, `+document.querySelector("[data-count=groups]").textContent`); n != groups {
			t.Errorf("%s: the dry run left %d groups of %d", theme, n, groups)
		}
		b.click("dialog .danger")
		groups -= going
		b.await(rowCount(groups))

		for _, view := range []string{"status", "config"} {
			b.click(fmt.Sprintf(`nav [data-view=%q]`, view))
			b.await(map[string]string{"status": `document.querySelector("#s-flags")`, "config": `document.querySelector(".copied button")`}[view])
			b.accessible(script, theme+" "+view)
			b.shot(view + "-" + theme)
		}
		if config := b.text("#scrape-config"); !strings.Contains(config, "proxy_url: http://"+s.Addr()) {
			t.Errorf("%s: the scrape configuration is %q", theme, config)
		}

		b.phone()
		for _, query := range []string{"", "?agent=db-1.example.net", "?view=groups", "?view=status", "?view=config"} {
			b.open(query)
			b.await(`!document.querySelector("main > .muted")`)
			if strings.Contains(query, "agent=") {
				b.await(`document.querySelector("#panel .history")`)
			}
			b.accessible(script, theme+" phone "+query)
			b.shot("phone-" + strings.Trim(strings.NewReplacer("?", "", "=", "-").Replace(query+"-"+theme), "-"))
		}
		b.quiet("status of 403 (not-allowed", "status of 400")
	}

	// A theme that was chosen stays.
	b.desktop()
	b.open("")
	b.click("#theme")
	b.open("")
	if theme := value[string](b, "document.documentElement.dataset.theme"); theme != "light" {
		t.Errorf("after a click on the button in the dark, and a reload, the theme is %q", theme)
	}

	// The lost ones are forgotten on request.
	b.open("?agent=queue-1.example.net")
	b.click("#panel .danger")
	b.click("dialog .danger")
	b.await(fmt.Sprintf(`document.querySelector(".chip.lost b").textContent === "%d"`, lost-1))
	b.quiet()

	// The proxy is out of reach, and comes back.
	offline := func(off bool) {
		call(b, network.EmulateNetworkConditionsByRule, network.EmulateNetworkConditionsByRuleParams{MatchedNetworkConditions: []*network.Conditions{{Offline: off, DownloadThroughput: -1, UploadThroughput: -1}}})
	}
	offline(true)
	b.await(`document.querySelector("#live").textContent === "not live: the proxy can't be reached"`)
	b.shot("away")
	offline(false)
	b.await(`document.querySelector("#live").textContent === "live"`)
}

// TestBrowserRoles has people with less than all roles look at the page.
func TestBrowserRoles(t *testing.T) {
	s := newSecureSite(t, nil)
	b := newBrowser(t, s)
	s.startAgents(0, 10)
	s.push(5)
	s.scrape("app", "web-1.example.net")
	s.stopAgent("web-2.example.net")
	s.awaitConnected(9)

	for _, c := range []struct {
		user    string
		agents  int
		actions bool
	}{{"prom", 2, false}, {"root", 10, true}} {
		// Credentials in the address, as people type them.
		b.do(chromedp.Navigate(strings.Replace(s.url, "http://", "http://"+c.user+":secret@", 1)))
		b.await(`document.querySelector("#live").textContent === "live"`)
		b.await(fmt.Sprintf(`document.querySelector("#rows").getAttribute("aria-rowcount") === "%d"`, c.agents+1))
		b.click("#rows tbody th a")
		b.click(`#panel [aria-label="Scrape now: app"]`)
		b.await(`document.querySelector("#panel .target .output pre")`)
		offered := func(what, selector string) {
			t.Helper()
			if got := value[bool](b, fmt.Sprintf("document.querySelector(%q) !== null", selector)); got != c.actions {
				t.Errorf("%s is offered %s: %t, want %t", c.user, what, got, c.actions)
			}
		}
		b.click(".chip.lost")
		b.click("#rows tbody th a")
		b.await(`document.querySelector("#panel-title").textContent === "web-2.example.net"`)
		offered("to forget an agent", "#panel .danger")
		b.click(`nav [data-view="groups"]`)
		b.await(`document.querySelectorAll("#rows tbody th").length === 5`)
		offered("to delete by a selector", ".actions button")
		b.click("#rows tbody th a")
		b.await(`document.querySelector("#panel .facts")`)
		offered("to delete a group", "#panel .danger")
		b.click(`nav [data-view="status"]`)
		b.await(`!document.querySelector("main > .muted")`)
		offered("the flags", "#s-flags")
		if n := value[int](b, `document.querySelectorAll(".warning").length`); n != 0 {
			t.Errorf("%s is warned of %q", c.user, b.text("#warnings"))
		}
		b.quiet()
		call(b, network.ClearBrowserCache, cdp.Empty{})
	}
}

// TestBrowserForeignText has the page show names that would be markup.
func TestBrowserForeignText(t *testing.T) {
	const foreign = `<img src=x onerror=alert(1)><script>alert(2)</script>"'&amp;`
	s := newSite(t, nil)
	b := newBrowser(t, s)
	s.startAgent(agent.Config{Name: "web-1.example.net", Labels: map[string]string{"note": foreign}, Targets: []agent.Target{{Name: "app", Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		io.WriteString(w, foreign)
	})}}})
	s.awaitConnected(1)
	if err := s.do(http.MethodPut, "metrics/job/"+url.PathEscape(foreign[:40])+"/note@base64/"+base64.RawURLEncoding.EncodeToString([]byte(foreign)), "m{l=\"<script>alert(3)</script>\"} 1\n"); err != nil {
		t.Fatal(err)
	}
	shows := func(selector, want string) {
		t.Helper()
		if text := b.text(selector); !strings.Contains(text, want) {
			t.Errorf("%s shows %q, want %q", selector, text, want)
		}
	}
	b.open("?agent=web-1.example.net")
	b.await(`document.querySelector("#panel .facts .tag")`)
	shows("#rows tbody .tag", foreign)
	shows("#panel .facts", foreign)
	b.click(`#panel [aria-label="Scrape now: app"]`)
	b.await(`document.querySelector("#panel .target .output pre")`)
	shows("#panel .target .output pre", foreign)
	b.open("?view=groups")
	b.click("#rows tbody th a")
	shows("#rows tbody th", foreign)
	shows("#panel h2", foreign[:40])
	b.click("#panel h3 + button")
	b.await(`document.querySelector("#panel .samples")?.textContent.includes("<script>alert(3)</script>")`)
	b.click("#panel .danger")
	shows("dialog", foreign)
	b.click("dialog .danger")
	b.await(`document.querySelector("#empty [data-empty=none]").checkVisibility()`)

	// A link that was made up, or is from another version, leads to the default.
	for _, query := range []string{"?view=constructor", "?view=__proto__", "?state=constructor", "?state=__proto__", "?state=tired", "?sort=constructor", "?sort=-__proto__", "?sort=colour"} {
		b.open(query)
		b.await(`document.querySelectorAll("#rows tbody th").length === 1`)
		if got := value[string](b, `document.querySelector("#state").value + document.querySelector("nav [aria-current]").dataset.view + document.querySelector("#rows [aria-sort]").textContent`); got != "agentsAgent" {
			t.Errorf("%s shows %s", query, got)
		}
	}
	b.quiet()
}

// TestBrowserOtherSite has a page of another site, in the browser of somebody who may do
// everything here, try to change something and to read something.
func TestBrowserOtherSite(t *testing.T) {
	tweak := func(c *server.Config) { c.EnableLifecycle, c.EnableAdminAPI = true, true }
	for name, s := range map[string]*site{"open": newSite(t, tweak), "roles": newSecureSite(t, tweak)} {
		t.Run(name, func(t *testing.T) {
			s.startAgents(0, 1)
			s.push(1)
			path := "metrics/job/backup/instance/" + hostName(0)
			evil := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "text/html")
				io.WriteString(w, "<!DOCTYPE html><title>evil</title><p>Look at the kittens")
			}))
			t.Cleanup(evil.Close)
			_, evilPort, _ := net.SplitHostPort(evil.Listener.Addr().String())
			_, port, _ := net.SplitHostPort(s.Addr())
			b := newBrowser(t, s, chromedp.Flag("host-resolver-rules", "MAP *.test 127.0.0.1"))

			// By name, without TLS, browsers leave Sec-Fetch-Site away, and Origin alone tells.
			for _, host := range []string{"127.0.0.1", "proxy.culvert.test"} {
				own := "http://" + net.JoinHostPort(host, port) + "/"
				for _, from := range []string{"127.0.0.1", "kittens.culvert.test", "evil.test"} {
					if s.tokenFile != "" { // the browser keeps the password
						b.do(chromedp.Navigate(strings.Replace(own, "http://", "http://root:secret@", 1)))
						b.await(`document.querySelector("#live").textContent === "live"`)
					}
					site := "http://" + net.JoinHostPort(from, evilPort) + "/"
					b.do(chromedp.Navigate(site))
					for _, try := range [][2]string{
						{"DELETE", path}, {"PUT", path}, {"POST", path}, {"POST", "metrics/job/evil"}, {"PUT", "metrics/job/evil"}, {"POST", "api/v1/push?id=evil"},
						{"DELETE", "api/v1/groups?match[]={job%3D\"backup\"}"}, {"PUT", "api/v1/admin/wipe"}, {"DELETE", "api/v1/agents/" + hostName(0)},
						{"POST", "-/reload"}, {"POST", "-/quit"}, {"PUT", "-/quit"},
					} {
						for _, mode := range []string{"cors", "no-cors"} {
							for _, credentials := range []string{"include", "omit"} {
								got := value[string](b, fmt.Sprintf(`fetch(%q, {method: %q, mode: %q, credentials: %q, headers: {"Content-Type": "text/plain"}, body: "evil 1\n"}).then((r) => r.type + " " + r.status, (e) => e.name)`, own+try[1], try[0], mode, credentials))
								if !slices.Contains([]string{"TypeError", "opaque 0", "cors 403", "cors 401"}, got) {
									t.Errorf("%s: %s %s%s (%s, %s): %s", site, try[0], own, try[1], mode, credentials, got)
								}
							}
						}
						if try[0] != "POST" {
							continue
						}
						value[any](b, fmt.Sprintf(`new Promise((answered) => {
							const form = document.createElement("form"), frame = document.createElement("iframe");
							Object.assign(form, {method: "POST", enctype: "text/plain", action: %q, target: "frame"});
							form.innerHTML = "<textarea name='evil 1\n#'></textarea>";
							frame.name = "frame";
							document.body.replaceChildren(form, frame);
							frame.onload = () => answered(null);
							form.submit();
						})`, own+try[1]))
					}
					for _, route := range []string{"", "api/v1/page", "api/v1/agents", "api/v1/agents/" + hostName(0), "api/v1/scrapes?agent=" + hostName(0), "api/v1/scrape_config", "api/v1/groups", "targets", "clients", "metrics", "scrape/" + hostName(0) + "/app/metrics"} {
						if got := value[string](b, fmt.Sprintf(`fetch(%q, {credentials: "include"}).then((r) => r.text(), (e) => e.name)`, own+route)); got != "TypeError" {
							t.Errorf("%s can read %s%s: %.100q", site, own, route, got)
						}
					}
				}
			}
			if got := s.get("api/v1/groups").body; !strings.Contains(got, `"backup"`) || strings.Contains(got, "evil") {
				t.Errorf("the groups are %s", got)
			}
			if got := s.get("metrics?only=groups").body; strings.Contains(got, "evil") {
				t.Errorf("pushed was\n%s", got)
			}
			if got := s.get("api/v1/agents/" + hostName(0)); got.code != http.StatusOK {
				t.Errorf("the agent's details are %d %s", got.code, got.body)
			}

			// The same request of the proxy's own page does what it says.
			b.do(chromedp.Navigate("http://" + net.JoinHostPort("proxy.culvert.test", port) + "/"))
			if got := value[string](b, fmt.Sprintf(`fetch("/%s", {method: "DELETE"}).then((r) => r.type + " " + r.status, (e) => e.message)`, path)); got != "basic 202" {
				t.Errorf("the proxy's own page gets %s", got)
			}
		})
	}
}

// thousands writes a number as the page does.
func thousands(n int) string {
	if n < 1000 {
		return fmt.Sprint(n)
	}
	return fmt.Sprintf("%d,%03d", n/1000, n%1000)
}
