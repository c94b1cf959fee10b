package main_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

const delimited = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"

// TestImport takes a real Pushgateway over: groups of all types and labels, with
// their times, once and then again.
func TestImport(t *testing.T) {
	from, to := startPushgateway(t), startProxy(t)
	fillPushgateway(t, from)
	got := culvertImport(t, 0, "--from="+from, "--to="+to.url)
	groups := len(queryGroups(t, from))
	if want := fmt.Sprintf("%d groups found at %s: %d imported, 0 already there, 0 failed\n", groups, from, groups); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	expectImported(t, from, to.url)

	before := queryGroups(t, to.url)
	got = culvertImport(t, 0, "--from="+from, "--to="+to.url)
	if want := fmt.Sprintf("%d groups found at %s: 0 imported, %d already there, 0 failed\n", groups, from, groups); got != want {
		t.Errorf("the second run: got %q, want %q", got, want)
	}
	if after := queryGroups(t, to.url); !maps.Equal(before, after) {
		t.Errorf("the second run changed %s\nto %s", before, after)
	}

	// What is pushed to the old place later comes with the next run: good pushes,
	// and bad ones alone.
	push(t, 200, "PUT", from+"/metrics/job/plain", "later 1\n")
	push(t, 400, "PUT", from+"/metrics/job/sequence", "bad 1 5\n")
	push(t, 400, "PUT", from+"/metrics/job/neverpushed", "bad 1 5\n")
	push(t, 200, "PUT", from+"/metrics/job/new", "new 1\n")
	got = culvertImport(t, 0, "--from="+from, "--to="+to.url)
	if want := fmt.Sprintf(": 4 imported, %d already there, 0 failed\n", groups-3); !strings.HasSuffix(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	expectImported(t, from, to.url)

	// What is pushed to the new place later stays, bad pushes and good ones.
	push(t, 200, "PUT", from+"/metrics/job/plain", "old 1\n")
	push(t, 400, "PUT", from+"/metrics/job/plain", "bad 1 5\n")
	push(t, 400, "PUT", from+"/metrics/job/sequence", "bad 1 5\n")
	push(t, 200, "PUT", to.url+"/metrics/job/plain", "moved 1\n")
	push(t, 400, "PUT", to.url+"/metrics/job/sequence", "bad 1 5\n")
	before = queryGroups(t, to.url)
	got = culvertImport(t, 0, "--from="+from, "--to="+to.url)
	if want := fmt.Sprintf(": 0 imported, %d already there, 0 failed\n", groups+1); !strings.HasSuffix(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if after := queryGroups(t, to.url); !maps.Equal(before, after) {
		t.Errorf("import changed %s\nto %s", before, after)
	}
}

// TestImportFromCulvert: another culvert-proxy may be the source, with names that
// old Pushgateways don't take.
func TestImportFromCulvert(t *testing.T) {
	from, to := startProxy(t), startProxy(t)
	for _, labels := range []string{"/U__a_2e_b/1", "/U__a_2f_b/2", "/U___55_____x/3", "/a:b/4", "/%C3%A9/5", "/U__job_2e_x@base64/Lw/instance/"} {
		push(t, 200, "PUT", from.url+"/metrics/job/j"+labels, "{\"m.n\",\"o.p\"=\"\"} 1\n")
		push(t, 200, "POST", from.url+"/metrics/job/j"+labels, "p 1\n")
		push(t, 200, "POST", from.url+"/metrics/job/j"+labels, "") // no family has the time of this one
		push(t, 400, "POST", from.url+"/metrics/job/j"+labels, "p 1 5\n")
	}
	culvertImport(t, 0, "--from="+from.url, "--to="+to.url)
	expectImported(t, from.url, to.url)
	if got := culvertImport(t, 0, "--from="+from.url, "--to="+to.url); !strings.HasSuffix(got, ": 0 imported, 6 already there, 0 failed\n") {
		t.Errorf("got %q", got)
	}
}

// TestImportDryRun says what would be done, and does nothing.
func TestImportDryRun(t *testing.T) {
	from, to := startPushgateway(t), startProxy(t)
	push(t, 200, "PUT", from+"/metrics/job/a", "m 1\nn{x=\"1\"} 1\nn{x=\"2\"} 2\n")
	push(t, 400, "PUT", from+"/metrics/job/b", "m 1 5\n")
	push(t, 200, "PUT", from+"/metrics/job/c", "m 1\n")
	push(t, 200, "PUT", to.url+"/metrics/job/c", "m 1\n")
	before := queryGroups(t, to.url)
	got := culvertImport(t, 0, "--from="+from, "--to="+to.url, "--dry-run")
	for _, want := range []string{
		`group {job="a"}: would be imported: 3 series in 2 families, last pushed 2`,
		`group {job="b"}: would be imported: no push to it ever succeeded` + "\n",
		`: 2 to import, 1 already there, 0 failed` + "\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("got %q, want it to have %q", got, want)
		}
	}
	if after := queryGroups(t, to.url); !maps.Equal(before, after) {
		t.Errorf("a dry run changed %s\nto %s", before, after)
	}
}

// TestImportFailures: groups that the target refuses are named with its reason, and
// don't keep the others from being imported.
func TestImportFailures(t *testing.T) {
	from, to := startPushgateway(t), startProxy(t)
	push(t, 200, "PUT", from+"/metrics/job/a", "m 1\n")
	push(t, 200, "PUT", from+"/metrics/job/b", "n 1\n")
	push(t, 200, "PUT", from+"/metrics/job/c", "m 1\n")
	push(t, 200, "PUT", to.url+"/metrics/job/other", "# TYPE m gauge\nm 1\n")
	got := culvertImport(t, 1, "--from="+from, "--to="+to.url)
	for _, want := range []string{
		`group {job="a"}: not imported: 400 Bad Request: `, `group {job="c"}: not imported: 400 Bad Request: `, "has type untyped, should have gauge",
		": 1 imported, 0 already there, 2 failed\n", "culvert-proxy: 2 of 3 groups failed; see above\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("got %q, want it to have %q", got, want)
		}
	}
	push(t, 202, "DELETE", to.url+"/metrics/job/other", "")
	culvertImport(t, 0, "--from="+from, "--to="+to.url)
	expectImported(t, from, to.url)
}

// TestImportHiddenLabels: families of two names hide what the Pushgateway's API
// tells of the group itself.
func TestImportHiddenLabels(t *testing.T) {
	from, to := startPushgateway(t), startProxy(t)
	push(t, 200, "PUT", from+"/metrics/job/j/a/b", "labels 1\nlast_push_successful 0\n")
	culvertImport(t, 0, "--from="+from, "--to="+to.url)
	if want, got := scrapeGroups(t, from), scrapeGroups(t, to.url); !maps.Equal(want, got) || len(got) != 4 {
		t.Errorf("got %q, want %q", got, want)
	}
	got := culvertImport(t, 0, "--from="+from, "--to="+to.url)
	if !strings.HasSuffix(got, ": 0 imported, 1 already there, 0 failed\n") {
		t.Errorf("got %q", got)
	}
	push(t, 202, "DELETE", to.url+"/metrics/job/j/a/b", "") // that was its key
	if got := queryGroups(t, to.url); len(got) > 0 {
		t.Errorf("got %s", got)
	}
}

// TestImportInterrupted: a run that ended between the requests for a group is
// completed by the next.
func TestImportInterrupted(t *testing.T) {
	from, to := startPushgateway(t), startProxy(t)
	push(t, 200, "PUT", from+"/metrics/job/j", "a 1\n")
	push(t, 200, "POST", from+"/metrics/job/j", "b 1\n")
	push(t, 200, "POST", from+"/metrics/job/j", "c 1\n")
	var pushes atomic.Int32
	front := reverseProxy(t, to.url, func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodGet || pushes.Add(1) < 3 {
			return true
		}
		http.Error(w, "out of order", http.StatusServiceUnavailable)
		return false
	})
	got := culvertImport(t, 1, "--from="+from, "--to="+front)
	if want := `group {job="j"}: not imported: 503 Service Unavailable: out of order`; !strings.Contains(got, want) {
		t.Errorf("got %q, want it to have %q", got, want)
	}
	culvertImport(t, 0, "--from="+from, "--to="+to.url)
	expectImported(t, from, to.url)
}

// TestImportWhilePushing: a group whose API and exposition were not read at one
// moment is read again.
func TestImportWhilePushing(t *testing.T) {
	from, to := startPushgateway(t), startProxy(t)
	push(t, 200, "PUT", from+"/metrics/job/still", "a 1\n")
	var scrapes, most atomic.Int32
	front := reverseProxy(t, from, func(_ http.ResponseWriter, r *http.Request) bool {
		if n := scrapes.Add(1); r.URL.Path == "/metrics" && n <= most.Load() {
			push(t, 200, "PUT", from+"/metrics/job/moving", fmt.Sprintf("b%d 1\n", n))
		}
		return true
	})
	push(t, 200, "PUT", from+"/metrics/job/moving", "b 1\n")

	most.Store(1 << 30)
	got := culvertImport(t, 1, "--from="+front, "--to="+to.url)
	for _, want := range []string{`group {job="moving"}: not imported: it is being pushed to; run import again` + "\n", ": 1 imported, 0 already there, 1 failed\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("got %q, want it to have %q", got, want)
		}
	}
	scrapes.Store(0)
	most.Store(4) // two rounds: each reads the API and the exposition
	got = culvertImport(t, 0, "--from="+front, "--to="+to.url)
	if !strings.HasSuffix(got, ": 1 imported, 1 already there, 0 failed\n") {
		t.Errorf("got %q", got)
	}
	expectImported(t, from, to.url)
}

// TestImportAccess: path prefixes, another telemetry path, credentials and TLS.
func TestImportAccess(t *testing.T) {
	dir, ca := t.TempDir(), newAuthority(t)
	to := startProxy(t)
	from := startPushgateway(t, "--web.route-prefix=/old", "--web.telemetry-path=/tele")
	push(t, 200, "PUT", from+"/old/metrics/job/j", "a 1\n")

	authorized := func(want string) func(w http.ResponseWriter, r *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if r.Header.Get("Authorization") == want {
				return true
			}
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return false
		}
	}
	const basic = "Basic bWU6c2VjcmV0" // me:secret
	fromFront := reverseProxy(t, from, authorized(basic))
	target, _ := url.Parse(to.url)
	toFront := ca.serveTLS("127.0.0.1", func(w http.ResponseWriter, r *http.Request) {
		if authorized("Bearer token")(w, r) {
			http.StripPrefix("/new", httputil.NewSingleHostReverseProxy(target)).ServeHTTP(w, r)
		}
	})
	withPassword := strings.Replace(fromFront, "http://", "http://me:secret@", 1) + "/old/"
	fromConfig := write(t, dir, "from.yml", "basic_auth: {username: me, password_file: password}\n")
	write(t, dir, "password", "secret")
	toConfig := write(t, dir, "to.yml", fmt.Sprintf("authorization: {credentials: token}\ntls_config: {ca_file: %s}\n", ca.file))

	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"--from=" + fromFront + "/old", "--to=" + to.url}, 1, "--from=" + fromFront + "/old: GET /api/v1/metrics: 401 Unauthorized; give credentials in --from.http.config.file"},
		{[]string{"--from=" + withPassword, "--to=" + toFront.URL + "/new"}, 1, "certificate"},
		{[]string{"--from=" + withPassword, "--to=" + toFront.URL + "/new", "--to.http.config.file=" + toConfig}, 0, ": 1 imported,"},
		{[]string{"--from=" + fromFront + "/old", "--from.http.config.file=" + fromConfig, "--to=" + to.url}, 0, ": 0 imported, 1 already there,"},
	} {
		got := culvertImport(t, test.code, test.args...)
		if !strings.Contains(got, test.want) || strings.Contains(got, "secret") {
			t.Errorf("%q: got %q, want it to have %q", test.args, got, test.want)
		}
	}
	if got := queryGroups(t, to.url); len(got) != 1 {
		t.Errorf("got %s", got)
	}
}

// TestImportToPushgateway: what doesn't take push times is not written to.
func TestImportToPushgateway(t *testing.T) {
	from := startPushgateway(t)
	push(t, 200, "PUT", from+"/metrics/job/j", "a 1\n")
	to := startPushgateway(t)
	got := culvertImport(t, 1, "--from="+from, "--to="+to)
	if want := "--to=" + to + ": GET /api/v1/agents: 404 Not Found: 404 page not found; this is no culvert-proxy"; !strings.Contains(got, want) {
		t.Errorf("got %q, want it to have %q", got, want)
	}
	if got := queryGroups(t, to); len(got) > 0 {
		t.Errorf("got %s", got)
	}
}

// TestImportContradictions: a Pushgateway that can't be scraped can't be imported.
func TestImportContradictions(t *testing.T) {
	from := startPushgateway(t, "--push.disable-consistency-check")
	push(t, 202, "PUT", from+"/metrics/job/a", "m 1\n")
	push(t, 202, "PUT", from+"/metrics/job/b", "# TYPE m gauge\nm 1\n")
	got := culvertImport(t, 1, "--from="+from, "--to=http://127.0.0.1:1")
	for _, want := range []string{"--from=" + from + ": GET /metrics: 500", `collected metric "m"`, "contradict each other", "delete there the groups"} {
		if !strings.Contains(got, want) {
			t.Errorf("got %q, want it to have %q", got, want)
		}
	}
}

// TestImportErrors: each error names the URL and says what to do.
func TestImportErrors(t *testing.T) {
	const noGroups = `{"status":"success","data":[]}`
	answer := func(status int, contentType, body string) string {
		return serve(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", contentType)
			w.WriteHeader(status)
			io.WriteString(w, body)
		}).URL
	}
	empty := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/metrics" {
			w.Header().Set("Content-Type", delimited)
			return
		}
		io.WriteString(w, noGroups)
	}).URL
	slow := serve(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }).URL
	closed := "http://" + externaltest.FreeAddress(t)
	for name, test := range map[string]struct{ from, to, want string }{
		"no URL":           {"old-pushgateway:9091", empty, "--from: use a whole base URL, as in http://"},
		"no server":        {closed, empty, "--from=" + closed + ": can't be reached: "},
		"no target":        {empty, closed, "--to=" + closed + ": can't be reached: "},
		"old":              {answer(404, "text/plain", "404 page not found\n"), empty, "GET /api/v1/metrics: 404 Not Found: 404 page not found; a Pushgateway older than 1.2 must be updated"},
		"target without":   {empty, answer(404, "text/plain", "404 page not found\n"), "check that it is a culvert-proxy, and one that takes pushes"},
		"a web page":       {answer(200, "text/html", "<html>"), empty, "is not a Pushgateway's (invalid character '<'"},
		"other JSON":       {answer(200, "application/json", `{"status":"success","data":{"alertmanagers":[]}}`), empty, "is not a Pushgateway's"},
		"no data":          {answer(200, "application/json", `{}`), empty, "is not a Pushgateway's (no groups in it); check the URL"},
		"a list of others": {answer(200, "application/json", `{"status":"success","data":[{"labels":{"job":"j"}}]}`), empty, "is not a Pushgateway's (a group has no push_time_seconds)"},
		"no protobuf":      {answer(200, "application/json", noGroups), empty, `GET /metrics: the answer is "application/json", a Pushgateway's would be protobuf`},
		"ill":              {answer(502, "text/html", "<html>"), empty, "GET /api/v1/metrics: 502 Bad Gateway\n"},
		"slow":             {slow, empty, "no whole answer within 500ms; see whether the server is overloaded, or give it more with --timeout"},
		"redirect": {serve(t, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://new.example.net"+r.URL.Path, http.StatusMovedPermanently)
		}).URL, empty, "is redirected to https://new.example.net/api/v1/metrics; use the URL that this leads to"},
		"huge": {serve(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1073741825")
			io.WriteString(w, "{")
		}).URL, empty, "GET /api/v1/metrics: the answer is larger than 1024 MiB"},
		"cut off": {serve(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "10")
			io.WriteString(w, "{")
		}).URL, empty, "GET /api/v1/metrics: the answer broke off: unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			args := []string{"--from=" + test.from, "--to=" + test.to}
			if test.from == slow {
				args = append(args, "--timeout=500ms")
			}
			got := culvertImport(t, 1, args...)
			if !strings.Contains(got, test.want) || !strings.HasPrefix(got, "culvert-proxy: ") {
				t.Errorf("got %q, want it to have %q", got, test.want)
			}
		})
	}
	for flag, want := range map[string]string{
		"--from.http.config.file=/no/such/file":                                        "--from.http.config.file=/no/such/file: ",
		"--to.http.config.file=" + write(t, t.TempDir(), "bad.yml", "basic_aut: {}\n"): "basic_aut",
		"--timeout=soon": "soon",
		"--timeout=0":    "more than 0",
	} {
		if got := culvertImport(t, 1, "--from="+empty, "--to="+empty, flag); !strings.Contains(got, want) {
			t.Errorf("%s: got %q, want it to have %q", flag, got, want)
		}
	}
	if got := culvertImport(t, 1); !strings.Contains(got, "--from") {
		t.Errorf("without --from: got %q", got)
	}
}

// TestImportStops: SIGTERM ends it in the middle of reading, and of writing.
func TestImportStops(t *testing.T) {
	if err := programs(); err != nil {
		t.Fatal(err)
	}
	from, to := startPushgateway(t), startProxy(t)
	for i := range 10 {
		push(t, 200, "PUT", fmt.Sprintf("%s/metrics/job/j%d", from, i), "a 1\n")
	}
	for method, want := range map[string]string{
		http.MethodGet: "GET /api/v1/metrics: ",
		http.MethodPut: "10 groups found at " + from + ": 0 imported, 0 already there, 0 failed\nculvert-proxy: import stopped early; run it again for the rest: ",
	} {
		arrived := make(chan struct{}, 10)
		front := reverseProxy(t, to.url, func(_ http.ResponseWriter, r *http.Request) bool {
			if r.Method != method {
				return true
			}
			arrived <- struct{}{}
			io.Copy(io.Discard, r.Body) // else nobody sees that the client goes
			<-r.Context().Done()
			return false
		})
		p := start(t, "import", filepath.Join(programDir, "culvert-proxy"), "import", "--from="+from, "--to="+front)
		select {
		case <-arrived:
			p.signal(syscall.SIGTERM)
		case <-p.exited:
		}
		select {
		case <-p.exited:
		case <-time.After(20 * time.Second):
			t.Fatal("import does not end")
		}
		if code := p.cmd.ProcessState.ExitCode(); code != 1 || !strings.Contains(p.log(), want) {
			t.Errorf("%s: got the exit code %d and %q, want 1 and %q", method, code, p.log(), want)
		}
	}
}

// startPushgateway starts a Pushgateway without persistence and returns its base URL.
func startPushgateway(t *testing.T, args ...string) string {
	t.Helper()
	program := externaltest.Program(t, "prometheus-pushgateway", "prometheus-pushgateway")
	p := start(t, "pushgateway", program, append(args, "--web.listen-address=127.0.0.1:0", "--persistence.file=")...)
	return "http://" + p.awaitLog(`msg="Listening on" address=(\S+)`)[1]
}

// culvertImport runs culvert-proxy import and returns what it printed.
func culvertImport(t *testing.T, code int, args ...string) string {
	t.Helper()
	if err := programs(); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(programDir, "culvert-proxy"), append([]string{"import"}, args...)...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != code {
		t.Fatalf("import %q: %v, want exit code %d:\n%s", args, err, code, out)
	}
	return string(out)
}

// reverseProxy forwards requests to a base URL where first returns true; else
// first has answered.
func reverseProxy(t *testing.T, base string, first func(http.ResponseWriter, *http.Request) bool) string {
	t.Helper()
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	forward := httputil.NewSingleHostReverseProxy(u)
	return serve(t, func(w http.ResponseWriter, r *http.Request) {
		if first(w, r) {
			forward.ServeHTTP(w, r)
		}
	}).URL
}

// push sends a body in text format, or one request without a body.
func push(t *testing.T, status int, method, u, body string) {
	t.Helper()
	pushBody(t, status, method, u, "", []byte(body))
}

func pushBody(t *testing.T, status int, method, u, contentType string, body []byte) {
	t.Helper()
	r, err := http.NewRequest(method, u, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", contentType)
	resp, err := direct.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if text, _ := io.ReadAll(resp.Body); resp.StatusCode != status {
		t.Fatalf("%s %s: %d %s, want %d", method, u, resp.StatusCode, text, status)
	}
}

// fillPushgateway pushes groups of each type, with odd labels, in sequences, and
// failures. Every push has a time of its own.
func fillPushgateway(t *testing.T, base string) {
	t.Helper()
	base += "/metrics/job"
	push(t, 200, "PUT", base+"/plain", "# HELP c_total of plain\n# TYPE c_total counter\nc_total{code=\"200\"} 1e+06\nc_total{code=\"500\"} NaN\n# TYPE g gauge\ng -0.1\nu +Inf\n")
	push(t, 200, "PUT", base+"/plain/instance/i-1", "# HELP c_total of i-1\n# TYPE c_total counter\nc_total{code=\"200\"} 2\n")
	push(t, 200, "PUT", base+"/types", `# HELP s a summary
# TYPE s summary
s{quantile="0.5"} 1
s{quantile="0.99"} NaN
s_sum 2.5
s_count 3
s{x="y",quantile="0.5"} 1
s_sum{x="y"} 2
s_count{x="y"} 3
# HELP h a histogram\nof two lines
# TYPE h histogram
h_bucket{le="0.5"} 1
h_bucket{le="+Inf"} 3
h_sum 7
h_count 3
`)
	// Labels.
	push(t, 200, "PUT", base+"@base64/L3NsYXNoZWQvam9i", "l1 1\n") // /slashed/job
	push(t, 200, "PUT", base+"/odd/path@base64/L3Zhci90bXA/b@base64/w6TDtsO8IPCfmIA", "l2{text=\"a\\\"b\\\\c\\nd <&>\"} 1\n")
	push(t, 200, "PUT", base+"/odd/empty@base64/=/a/a+b%20c", "l3{also=\"\"} 1\n")
	push(t, 200, "PUT", base+"/odd/U__a_2e_b/literal", "l4 1\n") // not escaped, here
	push(t, 200, "PUT", base+"/odd/A/1/a/2", "l5 1\n")
	push(t, 200, "PUT", base+"/..", "l6 1\n")
	// An instance that is part of the key and empty, one that is not, and one that
	// the body brings.
	push(t, 200, "PUT", base+"/noinstance/instance@base64/=", "i1 1\n")
	push(t, 200, "PUT", base+"/bodyinstance", "i2{instance=\"from-body\"} 1\ni2 2\n")
	// Families of different times: c is replaced, and the last push brings nothing.
	push(t, 200, "PUT", base+"/sequence", "a 1\nb 1\nc 1\n")
	push(t, 200, "POST", base+"/sequence", "c 2\nd 2\n")
	push(t, 200, "POST", base+"/sequence", "# HELP b again\nb{x=\"1\"} 3\n")
	push(t, 200, "POST", base+"/sequence", "")
	push(t, 200, "PUT", base+"/emptied", "a 1\n")
	push(t, 200, "PUT", base+"/emptied", "")
	// Failures.
	push(t, 200, "PUT", base+"/failed", "a 1\n")
	push(t, 400, "POST", base+"/failed", "b 1 5\n")
	push(t, 200, "PUT", base+"/recovered", "a 1\n")
	push(t, 400, "POST", base+"/recovered", "b 1 5\n")
	push(t, 200, "POST", base+"/recovered", "b 1\n")
	push(t, 400, "PUT", base+"/neverpushed", "a 1 5\n")
	// What has no text format.
	at := timestamppb.New(time.Unix(1_700_000_000, 5))
	label := func(name, value string) *dto.LabelPair { return &dto.LabelPair{Name: &name, Value: &value} }
	exemplar := &dto.Exemplar{Label: []*dto.LabelPair{label("trace", "1")}, Value: proto.Float64(0.5), Timestamp: at}
	var body bytes.Buffer
	for _, f := range []*dto.MetricFamily{
		{Name: proto.String("created_total"), Type: dto.MetricType_COUNTER.Enum(), Metric: []*dto.Metric{
			{Label: []*dto.LabelPair{label("text", "ä")}, Counter: &dto.Counter{Value: proto.Float64(7), Exemplar: exemplar, CreatedTimestamp: at}},
		}},
		{Name: proto.String("utf8.metric"), Help: proto.String("UTF-8"), Type: dto.MetricType_GAUGE.Enum(), Metric: []*dto.Metric{
			{Gauge: &dto.Gauge{Value: proto.Float64(1.7e9 + 1.0/3)}},
		}},
		{Name: proto.String("native_seconds"), Type: dto.MetricType_HISTOGRAM.Enum(), Metric: []*dto.Metric{
			{Histogram: &dto.Histogram{
				SampleCount: proto.Uint64(6), SampleSum: proto.Float64(12.5), Schema: proto.Int32(3), ZeroThreshold: proto.Float64(0.001), ZeroCount: proto.Uint64(1),
				PositiveSpan: []*dto.BucketSpan{{Offset: proto.Int32(-1), Length: proto.Uint32(2)}, {Offset: proto.Int32(3), Length: proto.Uint32(1)}}, PositiveDelta: []int64{2, -1, 1},
				CreatedTimestamp: at, Exemplars: []*dto.Exemplar{exemplar},
				Bucket: []*dto.Bucket{{CumulativeCount: proto.Uint64(4), UpperBound: proto.Float64(1), Exemplar: exemplar}},
			}},
		}},
	} {
		if _, err := protodelim.MarshalTo(&body, f); err != nil {
			t.Fatal(err)
		}
	}
	pushBody(t, 200, "PUT", base+"/protobuf", delimited, body.Bytes())
}

// expectImported compares all groups of two gateways: what the API and the
// exposition tell of them.
func expectImported(t *testing.T, from, to string) {
	t.Helper()
	want, got := queryGroups(t, from), queryGroups(t, to)
	if !slices.Equal(slices.Sorted(maps.Keys(want)), slices.Sorted(maps.Keys(got))) {
		t.Errorf("got the groups %q, want %q", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	}
	for key := range want {
		if want, got := comparable(t, want[key]), comparable(t, got[key]); !reflect.DeepEqual(want, got) {
			t.Errorf("group %s: got\n%v\nwant\n%v", key, got, want)
		}
	}
	wantSeries, gotSeries := scrapeGroups(t, from), scrapeGroups(t, to)
	for id, want := range wantSeries {
		if got := gotSeries[id]; got != want {
			t.Errorf("series %s: got %s, want %s", id, got, want)
		}
	}
	for id := range gotSeries {
		if wantSeries[id] == "" {
			t.Errorf("series %s: not in %s", id, from)
		}
	}
}

// queryGroups returns what the API tells of each group, by the labels of its push
// time.
func queryGroups(t *testing.T, base string) map[string]string {
	t.Helper()
	a := get(t, base+"/api/v1/metrics")
	var list struct{ Data []json.RawMessage }
	if err := json.Unmarshal([]byte(a.body), &list); err != nil || a.status != http.StatusOK {
		t.Fatalf("%s: %v: %d %s", base, err, a.status, a.body)
	}
	groups := map[string]string{}
	for _, text := range list.Data {
		var group struct {
			PushTime struct {
				Metrics []struct{ Labels map[string]string }
			} `json:"push_time_seconds"`
		}
		if err := json.Unmarshal(text, &group); err != nil {
			t.Fatal(err)
		}
		groups[fmt.Sprint(group.PushTime.Metrics[0].Labels)] = string(text)
	}
	return groups
}

// comparable returns what the API tells of a group without what differs between
// servers: the order of series, the time stamps of the families that they make, and
// native histograms, which old ones don't show.
func comparable(t *testing.T, text string) map[string]any {
	t.Helper()
	var group map[string]any
	if err := json.Unmarshal([]byte(text), &group); err != nil {
		t.Fatal(err)
	}
	delete(group, "native_seconds")
	for name, family := range group {
		f, ok := family.(map[string]any)
		if ok && strings.HasPrefix(name, "push_") {
			delete(f, "time_stamp")
		}
		if at, ok := f["time_stamp"].(string); ok {
			parsed, err := time.Parse(time.RFC3339Nano, at)
			if err != nil {
				t.Fatal(err)
			}
			f["time_stamp"] = parsed.UnixNano()
		}
		if ok && name != "labels" {
			slices.SortFunc(f["metrics"].([]any), func(a, b any) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
		}
	}
	return group
}

// scrapeGroups returns all pushed series, and those that the server makes for
// groups, in protobuf's text by their names and labels.
func scrapeGroups(t *testing.T, base string) map[string]string {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, base+"/metrics", nil)
	r.RequestURI = ""
	r.Header.Set("Accept", delimited+"; escaping=allow-utf-8")
	resp, err := direct.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %v: %d %s", base, err, resp.StatusCode, body)
	}
	series := map[string]string{}
	in := bytes.NewReader(body)
	for {
		f := new(dto.MetricFamily)
		err := protodelim.UnmarshalFrom(in, f)
		if err == io.EOF {
			return series
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range f.Metric {
			pushed := slices.ContainsFunc(m.Label, func(l *dto.LabelPair) bool { return l.GetName() == "job" })
			if !pushed {
				continue // the server's own
			}
			text, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			series[fmt.Sprintf("%s%v", f.GetName(), m.Label)] = fmt.Sprintf("%s %x", f.GetType(), text)
		}
	}
}
