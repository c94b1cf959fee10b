package main_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"mime"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/snappy"
	"github.com/klauspost/compress/zstd"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// TestPushgateway sends the same requests to the Pushgateway that is installed and
// to a proxy, and compares the answers and what the two then expose. The order of
// the requests, and most of them, are random: CULVERT_PUSHGATEWAY_SEED=N chooses
// others. What may differ stands in the list of differences.
func TestPushgateway(t *testing.T) {
	t.Parallel()
	started := time.Now()
	reference := start(t, "pushgateway", externaltest.Program(t, "prometheus-pushgateway", "prometheus-pushgateway"),
		"--persistence.file=", "--web.listen-address=127.0.0.1:0", "--web.enable-admin-api")
	// It has a line for each push that it refused, which would bury the differences.
	t.Cleanup(func() {
		reference.mu.Lock()
		defer reference.mu.Unlock()
		reference.out.Reset()
	})
	proxy := startProxy(t, "--persistence.file=", "--web.enable-admin-api")
	version := reference.awaitLog(`version="\(version=([^,]*)`)[1]
	address := reference.awaitLog(`msg="Listening on" address=(\S+)`)[1]
	seed := uint64(1)
	if text := os.Getenv("CULVERT_PUSHGATEWAY_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("Pushgateway %s, CULVERT_PUSHGATEWAY_SEED=%d", version, seed)

	every := 20 // requests between two comparisons
	if raceEnabled {
		every = 80
	}
	w := &twins{t: t, started: started, occurred: map[*difference]int{}, codes: map[int]int{},
		reference: &wire{t: t, name: "pushgateway", address: address}, ours: &wire{t: t, name: "ours", address: proxy.address}}
	m, wiped := maker{rand.New(rand.NewPCG(seed, 0))}, 0
	for _, scenario := range m.scenarios() {
		for _, r := range scenario {
			w.send(r)
		}
		if len(w.recent) >= every {
			w.compare()
			if w.sent-wiped >= 300 {
				w.wipe()
				wiped = w.sent
			}
		}
	}
	w.compare()
	w.compareStatus()
	// A job that is not base64 comes last: 1.5.1 then never unlocks a mutex, and all
	// later requests of that method to /metrics/job@base64/ hang.
	for _, method := range []string{"PUT", "POST", "DELETE"} {
		w.send(&pushRequest{method: method, target: "/metrics/job@base64/" + pick(m, []string{"a", "*/x/1", "a+b", "a%20b/x"})})
	}
	t.Logf("%d requests, %d comparisons of what is exposed, with %d series; status codes of the Pushgateway: %v", w.sent, w.compared, w.series, w.codes)
	for d, n := range w.occurred {
		if n == 0 && version == "1.5.1" && slices.ContainsFunc(d.codes, func(codes [2]int) bool { return codes[0] != codes[1] }) {
			t.Errorf("this difference did not occur; does it exist? %s", d.why)
		}
	}
}

// difference is one between the Pushgateway and the proxy that is meant.
type difference struct {
	why string
	// codes are the pairs of status codes, the Pushgateway's first, that may come of
	// it, and for which the answers are not compared further.
	codes [][2]int
}

// All that may differ. After a request that has one of them, its group is deleted
// on both sides, so that they are the same again. W is a weak point in section 19
// of the contract.
//
// Besides, compare knows of some that are in what is exposed: the order of series;
// which HELP is shown where groups have several; native histograms, which 1.5.1 does
// not show in /api/v1/metrics; escaping= in a Content-Type; gzip for "gzip;q=0".
var (
	// Debian's release is older than the contract.
	redirects    = &difference{"1.5.1 redirects to a clean path by 301, which makes clients turn a push into a GET", [][2]int{{301, 307}}}
	decodedPaths = &difference{"1.5.1 cleans the decoded path: it redirects for escaped dots and slashes, too",
		[][2]int{{301, 200}, {301, 202}, {301, 400}, {301, 404}}}
	apiSlash = &difference{"1.5.1 redirects /api/v1/metrics/ to /metrics, and /api/v1 to /api/v1/, which is 404 for all methods",
		[][2]int{{301, 404}, {301, 307}, {301, 301}, {307, 307}, {404, 405}}}
	floatHistograms = &difference{"since 1.10: counts of a histogram may be floats, and must not be negative", [][2]int{{200, 400}}}
	newFields       = &difference{"later releases: the time of creation", nil}
	newSyntax       = &difference{"later releases: quotes in HELP texts", [][2]int{{400, 200}}}
	newEncodings    = &difference{"later releases: snappy, and encodings in any case; ours: zstd", [][2]int{{400, 200}, {200, 400}}}
	cutOff          = &difference{"1.5.1 takes what it could read of some bodies that are cut off: protobuf in or behind a length, gzip behind a line",
		[][2]int{{200, 400}}}

	// The design, or our own choice.
	utf8Names = &difference{"UTF-8 names are always on: labels of the path and quoted names may be any, and U__ is decoded",
		[][2]int{{400, 200}, {400, 202}, {200, 400}, {202, 400}}}
	openMetrics     = &difference{"an OpenMetrics body is read as such", [][2]int{{400, 200}, {200, 400}}}
	ignoredEncoding = &difference{"Content-Encoding matters to pushes alone",
		[][2]int{{400, 200}, {400, 202}, {400, 404}, {400, 405}, {400, 301}, {400, 307}}}
	ownNames = &difference{"the server's own names start with culvert_proxy_, not with pushgateway_; it makes push_up",
		[][2]int{{400, 200}, {200, 400}}}
	noAssets   = &difference{"no /static and no /debug/pprof", [][2]int{{200, 404}, {301, 404}, {405, 404}}}
	scrapeable = &difference{"what makes Prometheus refuse a whole scrape is refused: the label le in a histogram, native histograms and exemplars that are not valid",
		[][2]int{{200, 400}}}
	noSeries    = &difference{"a family without series is not kept; the Pushgateway shows it in /api/v1/metrics alone", nil}
	otherValues = &difference{"of a series, the value of the family's type is kept and no other", nil}
	bothForms   = &difference{"since 1.8: a histogram in both forms is a native one in /api/v1/metrics", nil}

	badKeys         = &difference{"W1: a key that can't be exposed is refused, and creates no group", [][2]int{{202, 400}}}
	failureTime     = &difference{"W4: a pushed failure time is overridden", [][2]int{{400, 200}}}
	badNames        = &difference{"W5: the names in protobuf are checked", [][2]int{{200, 400}}}
	badHelp         = &difference{"W7: HELP must be UTF-8", [][2]int{{200, 400}}}
	jsonKeys        = &difference{"W8: a metric called labels doesn't replace the group's", nil}
	gaugeHistograms = &difference{"W9: gauge histograms are histograms; 1.5.1 doesn't know them in text", [][2]int{{400, 200}}}
	quit            = &difference{"W14: /-/quit", [][2]int{{403, 403}, {405, 405}, {200, 200}}}
)

// pushRequest is sent to both as it stands: Go's client would clean the path.
type pushRequest struct {
	method, target string
	header         []string // "Name: value"
	body           string
	chunked        bool
	meant          []*difference
}

func (r *pushRequest) String() string {
	body := r.body
	if len(body) > 600 {
		body = body[:600] + "…"
	}
	return fmt.Sprintf("%s %s %q %q", r.method, r.target, r.header, body)
}

// wire is a connection to one of the two servers.
type wire struct {
	t             *testing.T
	name, address string
	conn          net.Conn
	in            *bufio.Reader
}

// do sends a request and reads the answer to its end.
func (w *wire) do(r *pushRequest) answer {
	w.t.Helper()
	var out bytes.Buffer
	fmt.Fprintf(&out, "%s %s HTTP/1.1\r\nHost: %s\r\n", r.method, r.target, w.address)
	for _, line := range r.header {
		fmt.Fprintf(&out, "%s\r\n", line)
	}
	if r.chunked {
		half := len(r.body) / 2
		fmt.Fprint(&out, "Transfer-Encoding: chunked\r\n\r\n")
		for _, chunk := range []string{r.body[:half], r.body[half:]} {
			if chunk != "" {
				fmt.Fprintf(&out, "%x\r\n%s\r\n", len(chunk), chunk)
			}
		}
		fmt.Fprint(&out, "0\r\n\r\n")
	} else {
		fmt.Fprintf(&out, "Content-Length: %d\r\n\r\n%s", len(r.body), r.body)
	}
	if w.conn == nil {
		conn, err := net.Dial("tcp", w.address)
		if err != nil {
			w.t.Fatal(err)
		}
		w.t.Cleanup(func() { conn.Close() })
		w.conn, w.in = conn, bufio.NewReader(conn)
	}
	w.conn.SetDeadline(time.Now().Add(30 * time.Second))
	var resp *http.Response
	_, err := w.conn.Write(out.Bytes())
	if err == nil {
		resp, err = http.ReadResponse(w.in, &http.Request{Method: r.method})
		if err == nil && resp.StatusCode == 100 {
			resp, err = http.ReadResponse(w.in, &http.Request{Method: r.method})
		}
	}
	var body []byte
	if err == nil {
		body, err = io.ReadAll(resp.Body)
	}
	if err != nil {
		w.t.Fatalf("%s: %s: %v", w.name, r, err)
	}
	if resp.Close {
		w.conn.Close()
		w.conn = nil
	}
	return answer{resp.StatusCode, resp.Header, string(body)}
}

// twins are the two servers, and what they were asked.
type twins struct {
	t                      *testing.T
	reference, ours        *wire
	started                time.Time
	occurred               map[*difference]int
	codes                  map[int]int // answers of the reference
	recent                 []string    // requests since the last comparison
	sent, compared, series int
	failures               int
}

// fail tells of a difference that is not meant. It gives up after many.
func (w *twins) fail(format string, args ...any) {
	w.t.Helper()
	w.t.Errorf(format, args...)
	if w.failures++; w.failures == 40 {
		w.t.Fatal("there may be more")
	}
}

// send sends a request to both and compares the answers.
func (w *twins) send(r *pushRequest) {
	w.t.Helper()
	reference, ours := w.reference.do(r), w.ours.do(r)
	w.sent++
	w.codes[reference.status]++
	w.recent = append(w.recent, fmt.Sprintf("%d %d %s", reference.status, ours.status, r))
	meant := false
	for _, d := range r.meant {
		w.occurred[d] += 0
		if slices.Contains(d.codes, [2]int{reference.status, ours.status}) {
			w.occurred[d]++
			meant = true
		}
	}
	if reference.header.Get("X-Content-Type-Options") == "" {
		ours.header.Del("X-Content-Type-Options") // more of that is no harm
	}
	if a, b := visible(reference), visible(ours); !meant && a != b {
		w.fail("%s\n  pushgateway: %s %.300q\n  ours:        %s %.300q", r, a, reference.body, b, ours.body)
	}
	if len(r.meant) > 0 || reference.status != ours.status {
		w.forget(r)
	}
}

// forget deletes the group of a request whose effects may differ.
func (w *twins) forget(r *pushRequest) {
	if r.method != "PUT" && r.method != "POST" && r.method != "DELETE" {
		return
	}
	w.reference.do(&pushRequest{method: "DELETE", target: r.target})
	if !slices.Contains(r.meant, badKeys) { // ours must have nothing then
		w.ours.do(&pushRequest{method: "DELETE", target: r.target})
	}
}

// visible is what must be the same in two answers.
func visible(a answer) string {
	var b strings.Builder
	fmt.Fprint(&b, a.status)
	for _, name := range []string{"Allow", "Location", "X-Content-Type-Options", "Cache-Control", "Access-Control-Allow-Origin",
		"Access-Control-Allow-Methods", "Access-Control-Allow-Headers", "Access-Control-Expose-Headers"} {
		if name == "Cache-Control" && strings.HasPrefix(a.header.Get("Content-Type"), "text/html") {
			continue // the page for people is of each program's own
		}
		if v := a.header.Values(name); len(v) > 0 {
			fmt.Fprintf(&b, " %s: %q", name, v)
		}
	}
	if v := a.header.Get("Content-Type"); v != "" {
		fmt.Fprintf(&b, " Content-Type: %s", withoutEscaping(v))
	}
	switch a.body {
	case "":
		b.WriteString(", empty")
	case "OK":
		b.WriteString(", OK")
	}
	return b.String()
}

// withoutEscaping drops a parameter that 1.5.1 doesn't have.
func withoutEscaping(contentType string) string {
	mediaType, params, err := mime.ParseMediaType(contentType)
	if err != nil {
		return contentType
	}
	delete(params, "escaping")
	return mime.FormatMediaType(mediaType, params)
}

// scraped is what a scrape shows of the groups' series of one name.
type scraped struct {
	kind, help string
	own        bool // the server has series of that name itself, and its HELP counts
	series     []string
}

// acceptProtobuf asks for the format that has all.
const acceptProtobuf = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"

// accepts are Accept headers that a scraper may send, "" for none. One that takes
// OpenMetrics alone is not among them: ours has it.
var accepts = []string{
	"",
	"text/plain",
	"text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
	"application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
	acceptProtobuf + ",application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.8,text/plain;version=0.0.4;q=0.5",
	acceptProtobuf,
	"application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=text",
	"application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=compact-text",
	acceptProtobuf + ";q=0.2,text/plain;version=0.0.4;q=0.9",
	"application/vnd.google.protobuf",
	"application/vnd.google.protobuf;proto=other;encoding=delimited",
	"application/json",
	"text/html,application/xhtml+xml,*/*;q=0.8",
	"*/*",
	"text/*",
	"text/plain;version=9",
	"nonsense",
}

// compare compares what the two expose.
func (w *twins) compare() {
	w.t.Helper()
	before := w.failures
	// Deletions are answered before they are made; a push is not.
	w.send(&pushRequest{method: "POST", target: "/metrics/job/last"})
	helps := w.compareQuery()
	w.compareScrape(accepts[w.compared%len(accepts)], "", helps)
	w.compareScrape(acceptProtobuf, []string{"", "gzip", "gzip;q=0", "*", "deflate, gzip;q=0.5"}[w.compared%5], helps)
	if w.failures > before {
		w.t.Logf("since the last comparison:\n  %s", strings.Join(w.recent, "\n  "))
		w.wipe()
	}
	w.recent = nil
	w.compared++
}

func (w *twins) wipe() {
	w.t.Helper()
	w.send(&pushRequest{method: "PUT", target: "/api/v1/admin/wipe"})
}

func (w *twins) compareScrape(accept, encoding string, helps map[string][]string) {
	w.t.Helper()
	r := &pushRequest{method: "GET", target: "/metrics"}
	if accept != "" {
		r.header = append(r.header, "Accept: "+accept)
	}
	if encoding != "" {
		r.header = append(r.header, "Accept-Encoding: "+encoding)
	}
	a, b := w.reference.do(r), w.ours.do(r)
	if visible(a) != visible(b) || a.status != 200 {
		w.fail("%s\n  pushgateway: %s %.300q\n  ours:        %s %.300q", r, visible(a), a.body, visible(b), b.body)
		return
	}
	zipped := b.header.Get("Content-Encoding") == "gzip"
	if encoding == "gzip;q=0" { // 1.5.1 compresses for this, too
		if zipped {
			w.fail("%s: ours is compressed", r)
		}
	} else if zipped != (a.header.Get("Content-Encoding") == "gzip") {
		w.fail("%s: compressed: pushgateway %v, ours %v", r, !zipped, zipped)
	}
	reference, err := w.readScrape(a)
	if err != nil {
		w.fail("%s: pushgateway: %v", r, err)
		return
	}
	ours, err := w.readScrape(b)
	if err != nil {
		w.fail("%s: ours: %v", r, err)
		return
	}
	for _, name := range union(reference, ours) {
		a, b := reference[name], ours[name]
		if b != nil {
			w.series += len(b.series)
		}
		switch {
		case a == nil || b == nil:
			w.fail("%s: %s: pushgateway %v, ours %v", r, name, a, b)
			continue
		case a.kind != b.kind:
			w.fail("%s: %s: type: pushgateway %s, ours %s", r, name, a.kind, b.kind)
		case a.own != b.own:
			w.fail("%s: %s: own: pushgateway %v, ours %v", r, name, a.own, b.own)
		case a.own || a.help == b.help:
		case len(helps[name]) < 2 || !slices.Contains(helps[name], b.help): // of several, either may win
			w.fail("%s: %s: HELP: pushgateway %q, ours %q of %q", r, name, a.help, b.help, helps[name])
		}
		if x, y := without(a.series, b.series), without(b.series, a.series); len(x)+len(y) > 0 {
			w.fail("%s: %s: %d series only in the pushgateway, as %q; %d only in ours, as %q", r, name, len(x), x[:min(3, len(x))], len(y), y[:min(3, len(y))])
		}
	}
}

func union[V any](a, b map[string]V) []string {
	both := maps.Clone(a)
	maps.Copy(both, b)
	return slices.Sorted(maps.Keys(both))
}

// without returns what a has and b lacks. Both are sorted, and may have the same
// twice.
func without(a, b []string) (rest []string) {
	for _, s := range a {
		for len(b) > 0 && b[0] < s {
			b = b[1:]
		}
		if len(b) > 0 && b[0] == s {
			b = b[1:]
			continue
		}
		rest = append(rest, s)
	}
	return rest
}

// readScrape reads the groups' families of a scrape in any format.
func (w *twins) readScrape(a answer) (map[string]*scraped, error) {
	body := a.body
	if a.header.Get("Content-Encoding") == "gzip" {
		zr, err := gzip.NewReader(strings.NewReader(body))
		if err != nil {
			return nil, err
		}
		text, err := io.ReadAll(zr)
		if err != nil {
			return nil, err
		}
		body = string(text)
	}
	mediaType, params, err := mime.ParseMediaType(a.header.Get("Content-Type"))
	if err != nil {
		return nil, err
	}
	var messages []*dto.MetricFamily
	switch mediaType + " " + params["encoding"] {
	case "text/plain ":
		return w.readText(body)
	case "application/vnd.google.protobuf delimited":
		for r := bufio.NewReader(strings.NewReader(body)); ; {
			f := new(dto.MetricFamily)
			if err := protodelim.UnmarshalFrom(r, f); err == io.EOF {
				break
			} else if err != nil {
				return nil, err
			}
			messages = append(messages, f)
		}
	case "application/vnd.google.protobuf text", "application/vnd.google.protobuf compact-text":
		separator := "\n"
		if params["encoding"] == "text" {
			separator = "\n\n"
		}
		for text := range strings.SplitSeq(strings.TrimSpace(body), separator) {
			f := new(dto.MetricFamily)
			if err := prototext.Unmarshal([]byte(text), f); err != nil {
				return nil, err
			}
			messages = append(messages, f)
		}
	default:
		return nil, fmt.Errorf("unexpected Content-Type %s", a.header.Get("Content-Type"))
	}
	families := map[string]*scraped{}
	for _, f := range messages {
		s := &scraped{kind: f.GetType().String(), help: f.GetHelp()}
		if families[f.GetName()] != nil {
			return nil, fmt.Errorf("%s stands there twice", f.GetName())
		}
		for _, m := range f.Metric {
			if !slices.ContainsFunc(m.Label, func(l *dto.LabelPair) bool { return l.GetName() == "job" }) {
				s.own = true
				continue
			}
			if isTime(f.GetName()) {
				if m.Gauge == nil {
					return nil, fmt.Errorf("%s has no gauge: %v", f.GetName(), m)
				}
				if m.Gauge.Value, err = w.checkTime(m.Gauge.GetValue()); err != nil {
					return nil, fmt.Errorf("%s: %w", f.GetName(), err)
				}
			}
			s.series = append(s.series, prototext.MarshalOptions{}.Format(m))
		}
		if slices.Sort(s.series); len(s.series) > 0 {
			families[f.GetName()] = s
		}
	}
	return families, nil
}

func isTime(name string) bool {
	return name == "push_time_seconds" || name == "push_failure_time_seconds"
}

// checkTime returns 0 for 0 and 1 for a time since the start of the test.
func (w *twins) checkTime(v float64) (*float64, error) {
	switch now := time.Since(w.started).Seconds() + float64(w.started.UnixNano())/1e9; {
	case v == 0:
		return proto.Float64(0), nil
	case v < float64(w.started.UnixNano())/1e9-1 || v > now+1:
		return nil, fmt.Errorf("%v is no time between the start of the test and now", v)
	}
	return proto.Float64(1), nil
}

func (w *twins) readText(body string) (map[string]*scraped, error) {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	if _, err := parser.TextToMetricFamilies(strings.NewReader(body)); err != nil {
		return nil, err
	}
	families := map[string]*scraped{}
	f, help := new(scraped), ""
	for line := range strings.Lines(body) {
		line = strings.TrimSuffix(line, "\n")
		if rest, ok := strings.CutPrefix(line, "# HELP "); ok {
			_, help, _ = strings.Cut(rest, " ")
			help = strings.NewReplacer(`\\`, `\`, `\n`, "\n").Replace(help)
			continue
		}
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, kind, _ := strings.Cut(rest, " ")
			if families[name] != nil {
				return nil, fmt.Errorf("%s stands there twice", name)
			}
			f, help = &scraped{kind: kind, help: help}, ""
			families[name] = f
			continue
		}
		if !strings.Contains(line, `job="`) {
			f.own = true
			continue
		}
		space := strings.LastIndexByte(line, ' ')
		if name, _, _ := strings.Cut(line, "{"); isTime(name) {
			v, err := strconv.ParseFloat(line[space+1:], 64)
			if err != nil {
				return nil, err
			}
			t, err := w.checkTime(v)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", line, err)
			}
			line = fmt.Sprint(line[:space], " ", *t)
		}
		f.series = append(f.series, line)
	}
	maps.DeleteFunc(families, func(_ string, f *scraped) bool { return len(f.series) == 0 })
	for _, f := range families {
		slices.Sort(f.series)
	}
	return families, nil
}

// compareQuery compares GET /api/v1/metrics. It returns the HELP texts that the
// Pushgateway's groups have for each name.
func (w *twins) compareQuery() map[string][]string {
	w.t.Helper()
	r := &pushRequest{method: "GET", target: "/api/v1/metrics"}
	a, b := w.reference.do(r), w.ours.do(r)
	if visible(a) != visible(b) || a.status != 200 {
		w.fail("%s\n  pushgateway: %s %.300s\n  ours:        %s %.300s", r, visible(a), a.body, visible(b), b.body)
		return nil
	}
	helps := map[string][]string{}
	reference, err := w.readQuery(a.body, helps)
	if err != nil {
		w.fail("%s: pushgateway: %v", r, err)
		return nil
	}
	ours, err := w.readQuery(b.body, map[string][]string{})
	if err != nil {
		w.fail("%s: ours: %v", r, err)
		return nil
	}
	for _, key := range union(reference, ours) {
		// 1.5.1 doesn't show native histograms.
		if a, b := reference[key], ours[key]; a != b && a != nativeBuckets.ReplaceAllString(b, `"buckets":{}`) {
			w.fail("%s: %s:\n  pushgateway: %.2000s\n  ours:        %.2000s", r, key, a, b)
		}
	}
	return helps
}

var nativeBuckets = regexp.MustCompile(`"buckets":\[(\[[^]]*\],?)*\]`)

// readQuery flattens an answer to "group, name" → value. helps gets the HELP texts.
func (w *twins) readQuery(body string, helps map[string][]string) (map[string]string, error) {
	var envelope struct {
		Status string
		Data   []map[string]json.RawMessage
	}
	if err := json.Unmarshal([]byte(body), &envelope); err != nil || envelope.Status != "success" {
		return nil, fmt.Errorf("%v: %s", err, body)
	}
	flat := map[string]string{}
	for _, group := range envelope.Data {
		var labels map[string]string
		if err := json.Unmarshal(group["labels"], &labels); err != nil {
			return nil, err
		}
		key := fmt.Sprintf("%q", labels) // sorted
		if _, ok := flat[key]; ok {
			return nil, fmt.Errorf("group %s stands there twice", key)
		}
		flat[key] = string(group["last_push_successful"])
		delete(group, "labels")
		delete(group, "last_push_successful")
		for name, text := range group {
			var f struct {
				Time    *time.Time                   `json:"time_stamp"`
				Type    string                       `json:"type"`
				Help    *string                      `json:"help"`
				Metrics []map[string]json.RawMessage `json:"metrics"`
			}
			d := json.NewDecoder(bytes.NewReader(text))
			d.DisallowUnknownFields()
			if err := d.Decode(&f); err != nil {
				return nil, fmt.Errorf("%s: %s: %w", key, name, err)
			}
			if f.Time == nil || f.Time.Before(w.started.Add(-time.Second)) || f.Time.After(time.Now().Add(time.Second)) {
				return nil, fmt.Errorf("%s: %s: time_stamp %v", key, name, f.Time)
			}
			help := ""
			if f.Help != nil {
				help = *f.Help
			}
			if !slices.Contains(helps[name], help) {
				helps[name] = append(helps[name], help)
			}
			var series []string
			for _, m := range f.Metrics {
				if isTime(name) {
					v, err := strconv.ParseFloat(strings.Trim(string(m["value"]), `"`), 64)
					if err != nil {
						return nil, fmt.Errorf("%s: %s: %w", key, name, err)
					}
					t, err := w.checkTime(v)
					if err != nil {
						return nil, fmt.Errorf("%s: %s: %w", key, name, err)
					}
					m["value"] = json.RawMessage(fmt.Sprint(*t))
				}
				rest, err := json.Marshal(m)
				if err != nil {
					return nil, err
				}
				series = append(series, fmt.Sprintf("%s %s", m["labels"], rest)) // sorted by labels
			}
			slices.Sort(series)
			flat[key+" "+name] = fmt.Sprintf("%s %q %s", f.Type, help, series)
		}
	}
	return flat, nil
}

// compareStatus compares the form of GET /api/v1/status.
func (w *twins) compareStatus() {
	w.t.Helper()
	form := func(server *wire) string {
		var envelope struct {
			Status string
			Data   struct {
				Build map[string]string `json:"build_information"`
				Flags map[string]string `json:"flags"`
				Start time.Time         `json:"start_time"`
			}
		}
		a := server.do(&pushRequest{method: "GET", target: "/api/v1/status"})
		if err := json.Unmarshal([]byte(a.body), &envelope); err != nil {
			w.fail("GET /api/v1/status: %s: %v: %s", server.name, err, a.body)
		}
		d := envelope.Data
		return fmt.Sprint(visible(a), envelope.Status, slices.Sorted(maps.Keys(d.Build)), d.Flags["web.enable-admin-api"], d.Flags["web.telemetry-path"],
			d.Start.After(w.started.Add(-time.Second)) && d.Start.Before(time.Now()))
	}
	if a, b := form(w.reference), form(w.ours); a != b {
		w.fail("GET /api/v1/status\n  pushgateway: %s\n  ours:        %s", a, b)
	}
}

// maker makes requests.
type maker struct{ *rand.Rand }

func pick[T any](m maker, list []T) T { return list[m.IntN(len(list))] }

// scenarios returns requests in random order, some of which belong together.
func (m maker) scenarios() (list [][]*pushRequest) {
	add := func(requests ...*pushRequest) { list = append(list, requests) }
	push := func(method string, path, body part) *pushRequest {
		return &pushRequest{method: method, target: "/metrics" + path.text, header: body.header, body: body.text, meant: slices.Concat(path.meant, body.meant)}
	}
	small := parts("", "m 1\n", "n 2\n", "# TYPE g gauge\ng 3\n", "m 1 5\n", "m{\n")
	for _, p := range goodPaths {
		for _, method := range []string{"PUT", "POST", "DELETE", "PUT"} {
			add(push(method, p, pick(m, small)))
		}
	}
	for _, p := range badPaths {
		for _, method := range []string{"PUT", "POST", "DELETE"} {
			add(push(method, p, pick(m, small)))
		}
	}
	for _, p := range routes {
		for _, method := range methods {
			add(&pushRequest{method: method, target: p.text, body: pick(m, small).text, meant: p.meant})
		}
	}
	for _, b := range slices.Concat(textBodies, protobufBodies) {
		for _, method := range []string{"PUT", "POST"} {
			path := pick(m, goodPaths)
			if len(b.meant) > 0 { // one at a time
				path = part{text: pick(m, []string{"/job/j", "/job/k", "/job/j/x/1"})}
			}
			add(push(method, path, b))
		}
	}
	// Large groups, with body labels that the path overrides.
	for _, n := range []int{20, 80, 300, 800} {
		add(push("PUT", part{text: fmt.Sprintf("/job/many/A/%d/B/2/C/3/D/4/x/5", n)}, part{text: many(n)}))
	}
	for _, c := range contentTypes {
		for _, text := range []string{"m 1\n", inProtobuf(family("m", dto.MetricType_UNTYPED, untyped(1))), ""} {
			add(push(pick(m, []string{"PUT", "POST"}), pick(m, goodPaths), part{text, []string{"Content-Type: " + c.text}, c.meant}))
		}
	}
	for _, text := range openMetricsBodies {
		add(push(pick(m, []string{"PUT", "POST"}), pick(m, goodPaths), part{text, []string{"Content-Type: application/openmetrics-text"}, []*difference{openMetrics}}))
	}
	for _, body := range []part{m.body(), m.body(), m.body(), {text: "m 1\n"}} {
		for _, b := range coded(body.text) {
			b.header = slices.Concat(b.header, body.header)
			b.meant = slices.Concat(b.meant, body.meant)
			add(push(pick(m, []string{"PUT", "POST"}), pick(m, goodPaths), b))
			b.meant = append(b.meant, ignoredEncoding)
			add(push("DELETE", pick(m, goodPaths), b))
			route := pick(m, routes)
			add(&pushRequest{method: "GET", target: route.text, header: b.header, body: b.text, meant: slices.Concat(b.meant, route.meant)})
		}
	}
	for range 1500 {
		method := pick(m, []string{"PUT", "PUT", "POST", "POST", "POST", "DELETE"})
		r := push(method, pick(m, goodPaths), m.body())
		r.chunked = m.IntN(10) == 0
		if m.IntN(20) == 0 {
			r.header = append(slices.Clip(r.header), "Expect: 100-continue")
		}
		add(r)
	}
	for _, text := range []string{"push_failure_time_seconds 7\n", "# TYPE push_failure_time_seconds gauge\npush_failure_time_seconds 7\n",
		"# TYPE push_failure_time_seconds counter\npush_failure_time_seconds{a=\"1\"} 7\nm 1\n"} {
		failing := part{text: "/job/failing"}
		add(push("DELETE", failing, part{}), push("PUT", failing, part{text: "m 1\n"}), push("POST", failing, part{text: text, meant: []*difference{failureTime}}))
	}
	// Of two groups whose push times have the same labels, neither order is possible.
	twin := func(method, target string, meant ...*difference) *pushRequest {
		return &pushRequest{method: method, target: "/metrics/job/twin" + target, body: "m 1\n", meant: meant}
	}
	for range 3 {
		add(twin("DELETE", "/instance/"), twin("PUT", ""), twin("PUT", "/instance/", badKeys), twin("POST", "/instance@base64/=", badKeys), twin("POST", ""))
		add(twin("DELETE", ""), twin("PUT", "/instance/"), twin("PUT", "", badKeys), twin("POST", "/", badKeys), twin("POST", "/instance/"))
		add(twin("DELETE", ""), twin("DELETE", "/instance/"))
	}
	m.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}

// kinds are metric names with the type that they mostly have: some collide.
var kinds = []struct {
	name string
	kind dto.MetricType
}{
	{"m", dto.MetricType_UNTYPED},
	{"n", dto.MetricType_UNTYPED},
	{"g", dto.MetricType_GAUGE},
	{"c", dto.MetricType_COUNTER},
	{"s", dto.MetricType_SUMMARY},
	{"h", dto.MetricType_HISTOGRAM},
	{"s_count", dto.MetricType_COUNTER},
	{"h_bucket", dto.MetricType_UNTYPED},
	{"h_sum", dto.MetricType_SUMMARY},
	{"go_goroutines", dto.MetricType_GAUGE},
	{"push_time_seconds", dto.MetricType_GAUGE},
}

// body returns a random body in one of the formats.
func (m maker) body() part {
	var families []*dto.MetricFamily
	text := m.IntN(2) == 0
	for range 1 + m.IntN(3) {
		which := pick(m, kinds)
		kind := which.kind
		if m.IntN(10) == 0 {
			kind = pick(m, kinds).kind
		}
		f := family(which.name, kind)
		if m.IntN(3) == 0 {
			f.Help = proto.String(pick(m, []string{"one", "two", "back\\slash", "li\nne", "", "é"}))
		}
		for range 1 + m.IntN(3) {
			one := m.series(kind, text)
			twice := slices.ContainsFunc(f.Metric, func(other *dto.Metric) bool { return fmt.Sprint(other.Label) == fmt.Sprint(one.Label) })
			if !twice || m.IntN(20) == 0 {
				f.Metric = append(f.Metric, one)
			}
		}
		families = append(families, f)
	}
	b := part{text: inProtobuf(families...), header: []string{protobuf}}
	if text {
		var lines bytes.Buffer
		for _, f := range families {
			if _, err := expfmt.MetricFamilyToText(&lines, f); err != nil {
				panic(err)
			}
		}
		b = part{text: lines.String()}
	}
	if m.IntN(20) == 0 {
		b.text = b.text[:m.IntN(len(b.text))]
		if !text {
			b.meant = append(b.meant, cutOff)
		}
	}
	return b
}

func (m maker) series(kind dto.MetricType, text bool) (out *dto.Metric) {
	v := pick(m, []float64{0, 1, -1, 2.5, 1e6, 123456, 1e-5, 1.5e300, math.NaN(), math.Inf(1), math.Inf(-1), math.Copysign(0, -1)})
	switch kind {
	case dto.MetricType_COUNTER:
		out = counter(v)
	case dto.MetricType_GAUGE:
		out = gauge(v)
	case dto.MetricType_UNTYPED:
		out = untyped(v)
	case dto.MetricType_SUMMARY:
		out = summary(m.Uint64N(1e6), v, []float64{0.5, 0.9, 1}[:m.IntN(4)]...)
	case dto.MetricType_HISTOGRAM:
		if out = histogram(m.Uint64N(1e6), v, []float64{0.1, 1, 10, math.Inf(1)}[:m.IntN(5)]...); !text && m.IntN(4) == 0 {
			out = native(int32(m.IntN(12)-4), m.IntN(3), m.IntN(4), 1+m.IntN(4))
		}
	}
	for _, l := range [][]string{{"a", "1", "2", ""}, {"instance", "i", ""}, {"x", "1"}, {"job", "j"}} {
		if m.IntN(2+len(l)) == 0 {
			out = labelled(out, l[0], pick(m, l[1:]))
		}
	}
	if m.IntN(60) == 0 {
		out.TimestampMs = proto.Int64(m.Int64N(2e12))
	}
	return out
}

// part is a piece of a request: a path, or a body with header fields.
type part struct {
	text   string
	header []string
	meant  []*difference
}

func parts(texts ...string) (list []part) {
	for _, text := range texts {
		list = append(list, part{text: text})
	}
	return list
}

// differing are parts that may come of a difference.
func differing(d *difference, texts ...string) (list []part) {
	for _, text := range texts {
		list = append(list, part{text: text, meant: []*difference{d}})
	}
	return list
}

// goodPaths are paths of pushes, behind /metrics: spellings of a few keys.
var goodPaths = slices.Concat(
	parts("/job/j", "/job/j/", "/job@base64/ag", "/job@base64/ag==", "/job@base64/ag==/", "/job%40base64/ag", "/job/%6A", "/job/%6a", "/job%2Fj",
		"/job/j?ignored=1&x", "/job/j/job/other", "/job/j/job@base64/b3RoZXI", "/job/j/job/"),
	parts("/job/k", "/job@base64/aw", "/job/k/?"),
	parts("/job/j/instance/i", "/job/j/instance@base64/aQ", "/job@base64/ag/instance@base64/aQ==", "/job/j/instance%40base64/aQ",
		"/job/j/instance/other/instance/i"),
	parts("/job/j/x/1", "/job/j/x@base64/MQ", "/job/j/x/2/x/1", "/job/j/x/1/job/other", "/job/j%2Fx%2F1"),
	parts("/job/j/x/1/y/2", "/job/j/y/2/x/1", "/job/j%2Fx%2F1%2Fy/2", "/job/j/x/1/y@base64/Mg====", "/job/j/instance/i/x/1"),
	parts("/job/j/x@base64/=", "/job/j/x@base64/==", "/job/j/x@base64/", "/job/j/x/", "/job/j/x@base64/=/y/2", "/job/j/y/2/x@base64/="),
	parts("/job/a%20b", "/job@base64/YSBi", "/job/a+b", "/job/%C3%A9", "/job@base64/w6k", "/job@base64/L2E/x@base64/Yi9j", "/job/j/x/a+b",
		"/job/j/x@base64/Zm9v====", "/job/j/x@base64/Z%0Am9v", "/job/j/X/1", "/job/j/x/%20", "/job/j/x/%0A", "/job/j/x/%22%5C", "/job/j/x/%00",
		"/job/j/x/1%3F", "/job/j/x/%F0%9F%98%80", "/job/j/x/%25", "/job/j/x/a:b@c;d,e=f$g!h'i(j)k*l", "/job/j/x/~._-", "/job/job/x/1", "/job/j/x_/1"),
	parts("/job/j/U__in_xxx_valid/1", "/job/j/U_____x/1", "/job/j/U__a_2e/1", "/job/j/U___/1", "/job/j/U__a_000041_b/1", "/job/j/U__a_110000_b/1",
		"/job/j/U__a_D800_b/1"),
	parts("/job/empty/instance/", "/job/empty/instance@base64/=", "/job@base64/ZW1wdHk/instance@base64/"),
	differing(scrapeable, "/job/j/le/1"),
	parts("/job/j/quantile/0.5", "/job/j/push_time_seconds/1"),
	differing(decodedPaths, "/job/j/x/%2E%2E", "/job/%2E%2E", "/job/j/x/%2E/y/2"),
	differing(utf8Names, "/job/u/U__foo_2e_bar/baz", "/job/u/U__foo_2e_bar@base64/YmF6", "/job/u/U___55_____/1", "/job/u/U__a_1F600_b/1",
		"/job/u/U__a_2F_b/1", "/job/u/U__job/other",
		"/job/u/U___6a_ob/other", "/job/u/U__instance/i", "/job/u/U______x/1", "/job/u/U__/1", "/job/u/1x/1", "/job/u/a-b/1", "/job/u/a:b/1",
		"/job/u/foo.bar/1", "/job/u/f%C3%A9/1", "/job/u/a%20b/1"),
)

// badPaths are refused.
var badPaths = slices.Concat(
	parts("/job/j/x", "/job/j/x/1/y", "/job/j/x/1/", "/job/j/x/1/y/2/", "/job/a%2Fb", "/job/j%2F", "/job/j%2Fx%2F1%2F", "/job@base64/=",
		"/job@base64/", "/job@base64/==/x/1",
		"/job/j/__x/1", "/job/j/__name__/1", "/job/j/x/1/__y/2", "/job/j/@base64/x",
		"/job/j/x@base64/a+b", "/job/j/x@base64/a", "/job/j/x@base64/*", "/job/j/x@base64/aQ=a", "/job/j/x@base64/=aQ", "/job/j/x@base64/%C3%A9",
		"/job/j/a@base64@base64/eA", "/job/j/%FF/1", "/job/j/x/%zz", "/job/j/x/%", "/job/j/x/%4", "/job/%", "/job/%/x"),
	differing(decodedPaths, "/job/%2F", "/job/j/%2F1", "/job/j/x%2F%2Fy/1"),
	differing(badKeys, "/job/j/x/%FF", "/job/j/x@base64/_w", "/job@base64/_w", "/job/%FF", "/job/j/x/1/y/%C3"),
)

// routes are the others, and paths that are redirected or unknown.
var routes = slices.Concat(
	parts("/metrics", "/metrics/", "/metrics?x=1", "/METRICS", "/metrics/nothing", "/metrics/job", "/metrics/job/", "/metrics/jobs/j",
		"/metrics/job@base64", "/metrics/job@base64/",
		"/metrics/job/j", "/metrics/job/j/x/1", "/metrics/job@base64/ag", "/metrics%2Fjob%2Fj",
		"/", "/?x", "/status", "/status/", "/Status", "/-/healthy", "/-/healthy/", "/-/ready", "/-/Ready", "/-/", "/-/none",
		"/api", "/api/", "/api/v1/metrics", "/api/v1/status", "/api/v1/none", "/api/v1/none/none", "/api/v2/metrics", "/api/v1/admin",
		"/api/v1/admin/wipe",
		"/favicon.ico", "/nothing", "/job/j", "/%zz", "/metrics/JOB/j", "/Metrics/job/j", "/metrics/job@BASE64/ag", "/metrics/Job/j/X/1"),
	differing(quit, "/-/quit"),
	differing(apiSlash, "/api/v1", "/api/v1/", "/api/v1/metrics/", "/api/v1/admin/wipe/"),
	differing(noAssets, "/static", "/static/", "/static/none", "/debug/pprof", "/debug/pprof/"),
	differing(decodedPaths, "/%2E/metrics"),
	differing(redirects, "//", "/./", "/../metrics", "//metrics", "/metrics//", "/x/../metrics",
		"//metrics/job/j", "/metrics//job/j", "/metrics/job//j", "/metrics/job/j//x/1", "/metrics/job/j/x//y/2", "/metrics/job/j/x//",
		"/metrics/job/./j", "/metrics/job/j/../k", "/metrics/job/j/.", "/metrics/./job/j"),
)

var methods = []string{"PUT", "POST", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH"}

// textBodies are in text format, or nearly.
var textBodies = slices.Concat(
	parts("", "\n\n", "# a comment\n", "# EOF\n", "#\n", "m 1\n", " \tm\t 1\n", "m{} 1\n", "m{a=\"1\",} 1\n", "m {a=\"1\"} 1\n",
		"m{ a = \"1\" , x = \"2\" } 1\n", "\n \nm 1\n\n",
		"m{,} 1\n", "m{a=\"1\",,x=\"2\"} 1\n", "m{a=\"1\"x=\"2\"} 1\n", "m{a=\"1\"}1\n"),
	values("0", "1", "-1", "+1", "-0", ".5", "5.", "1e3", "1E-3", "1e-400", "1e308", "1e309", "1e400", "-1e400", "NaN", "nan", "NAN", "Inf", "+Inf",
		"-Inf", "inf", "+INF", "-infinity", "Infinity",
		"0x1p3", "0x10", "0b1", "0o7", "1_000", "1__0", "NaN(1)", "one", "", "\"1\"", "1,5", "--1", "+-1", "123456", "999999", "1000000", "1234567",
		"12345678901", "0.0001", "0.00001", "100000.5",
		"4.9406564584124654e-324", "1.7976931348623157e308", "0.1", "9007199254740993", "1 ", "1 5", "1 -5", "1 5.5", "1 99999999999999999999",
		"1 5 ", "1 5 6", "1  5", "1\t5", "1 # {} 1"),
	parts("m 1", "m 1\r\n", "\r\n", "m 1\n\r\nm 2\n", "m\n", "m \n", "m{a=\"1\"}\n", "m{a=\"1\" 1\n", "m{a=\"1} 1\n", "m{a=1} 1\n", "m{a} 1\n",
		"m{a=} 1\n", "m{=\"1\"} 1\n", "m{1a=\"1\"} 1\n", "m{a-b=\"1\"} 1\n", "m{a:b=\"1\"} 1\n", "m} 1\n", "m{{} 1\n",
		"1m 1\n", "m-a 1\n", "m.a 1\n", "é 1\n", "m:a 1\n", ":m 1\n", "_m 1\n", "U__m_2e_a 1\n", "M 1\n", "= 1\n", "\xef\xbb\xbfm 1\n", "\x00\n",
		"m\x00 1\n", "\xff 1\n"),
	parts("# TYPE m counter\nm 1\n", "# TYPE m gauge\nm 1\n", "# TYPE m untyped\nm 1\n", "# TYPE m COUNTER\nm 1\n", "# TYPE m Gauge\nm 1\n",
		"# TYPE m summary\nm{quantile=\"0.5\"} 1\nm_sum 2\nm_count 3\n",
		"# TYPE m histogram\nm_bucket{le=\"1\"} 1\nm_bucket{le=\"+Inf\"} 2\nm_sum 3\nm_count 2\n",
		"# TYPE m unknown\nm 1\n", "# TYPE m info\nm 1\n", "# TYPE m stateset\nm 1\n", "# TYPE m counter \nm 1\n", "# TYPE m counter extra\nm 1\n",
		"# TYPE m\nm 1\n", "# TYPE\nm 1\n", "# TYPE \nm 1\n", "#TYPE m counter\nm 1\n", "#  TYPE  m  counter\nm 1\n", " # TYPE m counter\nm 1\n",
		"# type m counter\nm 1\n", "# TYPE 1m counter\n",
		"# TYPE m counter\n# TYPE m counter\nm 1\n", "# TYPE m counter\nm 1\n# TYPE m gauge\n", "m 1\n# TYPE m counter\n", "# TYPE m counter\n",
		"# TYPE m counter\n\nm 1\n# TYPE n gauge\nn 2\n",
		"# HELP m one\n# HELP m two\nm 1\n", "m 1\n# HELP m one\n", "# HELP m\nm 1\n", "# HELP m \nm 1\n", "# HELP\nm 1\n", "#HELP m one\nm 1\n",
		"# HELP m one  two \nm 1\n", "# HELP m one\n", "# HELP 1m one\nm 1\n", "# UNIT m seconds\nm 1\n",
		"# HELP m a \\\\ b \\n c\nm 1\n", "# HELP m \\x\nm 1\n", "# HELP m \\\nm 1\n", "# HELP m ünïcode\nm 1\n", "# HELP m other\nm 1\n",
		"# HELP m \"quoted\"\nm 1\n"),
	parts("m{a=\"\\\\ \\n \\\"\"} 1\n", "m{a=\"\\x\"} 1\n", "m{a=\"\n\"} 1\n", "m{a=\"\"} 1\n", "m{a=\"é 😀\"} 1\n", "m{a=\"\t\r\x01\"} 1\n",
		"m{a=\"\xff\"} 1\n", "m{a=\"\x00\"} 1\n", "m{a=\"1\",a=\"2\"} 1\n", "m{__name__=\"n\"} 1\n", "m{__x=\"1\"} 1\n", "m{U__a_2e=\"1\"} 1\n",
		"m{A=\"1\",a=\"2\"} 1\n", "m{a=\"{}#,= \"} 1\n"),
	parts("m 1\nm 2\n", "m 1\nn 1\nm{a=\"1\"} 2\nn{a=\"1\"} 3\n", "m{job=\"1\"} 1\nm{job=\"2\"} 1\n", "m{job=\"j\",x=\"9\",instance=\"i\"} 1\n",
		"m{instance=\"\"} 1\n", "m{instance=\"i\"} 1\n", "m{instance=\"i\"} 1\nm 2\n", "m{instance=\"\"} 1\nm 2\n", "m{x=\"1\"} 1\n",
		"m{x=\"1\",y=\"2\"} 1\n", "m{x=\"\"} 1\nm 1\n",
		"m{le=\"1\"} 1\n", "m{quantile=\"1\"} 1\n", "# TYPE c counter\nc{le=\"x\"} -1\n"),
	parts("# TYPE h histogram\nh_bucket{le=\"0.50\"} 1\nh_bucket{le=\"1e0\"} 2\nh_sum 3\nh_count 2\n", "# TYPE h histogram\nh_bucket{le=\"x\"} 1\n",
		"# TYPE h histogram\nh_bucket{le=\"\"} 1\n", "# TYPE h histogram\nh_bucket 1\n", "# TYPE h histogram\nh 1\n",
		"# TYPE h histogram\nh{le=\"1\"} 1\n", "# TYPE h histogram\nh_count 1\n", "# TYPE h histogram\nh_sum 1\n",
		"# TYPE h histogram\nh_bucket{le=\"2\"} 1\nh_bucket{le=\"1\"} 2\nh_count 1\n",
		"# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"1\"} 2\n",
		"# TYPE h histogram\nh_bucket{le=\"NaN\"} 1\nh_bucket{le=\"-Inf\"} 2\nh_bucket{le=\"+Inf\"} 2\nh_count 9\nh_sum NaN\n",
		"# TYPE h histogram\nh_bucket{le=\"1\",a=\"1\"} 1\nh_bucket{le=\"1\",a=\"2\"} 2\nh_count{a=\"1\"} 3\n",
		"# TYPE h histogram\nh_count{le=\"1\"} 1\n", "# TYPE h histogram\nh_bucket{le=\"1\"} 1 5\n",
		"# TYPE h histogram\nh_created 1\nh_bucket{le=\"1\"} 1\n", "h_bucket{le=\"1\"} 1\nh_count 1\n",
		"# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh 5\n"),
	differing(floatHistograms, "# TYPE fh histogram\nfh_bucket{le=\"1\"} -1\n", "# TYPE fh histogram\nfh_count -1\n",
		"# TYPE fh histogram\nfh_count NaN\n", "# TYPE fh histogram\nfh_count 1e30\n", "# TYPE fh histogram\nfh_count 1.5\n",
		"# TYPE fh histogram\nfh_bucket{le=\"1\"} 0.5\nfh_count 1\n"),
	parts("# TYPE s summary\ns{quantile=\"0.50\"} 1\ns{quantile=\"1\"} NaN\ns_sum 3\ns_count 2\n", "# TYPE s summary\ns{quantile=\"x\"} 1\n",
		"# TYPE s summary\ns 1\n", "# TYPE s summary\ns_count 1.5\n", "# TYPE s summary\ns_count -1\n", "# TYPE s summary\ns_sum 1\n",
		"# TYPE s summary\ns{quantile=\"2\"} 1\ns{quantile=\"2\"} 2\n", "# TYPE s summary\ns_count{quantile=\"1\"} 1\n",
		"# TYPE s summary\ns{a=\"1\",quantile=\"0.5\"} 1\ns{a=\"2\",quantile=\"0.5\"} 1\n"),
	parts("s_count 1\n", "s_sum 1\n", "h_bucket 1\n", "# TYPE s summary\ns_count 1\n# TYPE s_count counter\ns_count 1\n",
		"# TYPE h_count summary\nh_count_sum 1\n", "s_bucket 1\n", "h_total 1\n"),
	parts("push_time_seconds 1\n", "# TYPE push_time_seconds counter\npush_time_seconds{a=\"1\"} 1\nm 1\n",
		"# HELP go_goroutines mine\n# TYPE go_goroutines gauge\ngo_goroutines 1\n", "go_goroutines 1\n",
		"# TYPE go_gc_duration_seconds summary\ngo_gc_duration_seconds{quantile=\"0\"} 1\n", "go_gc_duration_seconds_count 1\n",
		"# TYPE go_info counter\ngo_info 1\n",
		"# TYPE process_start_time_seconds gauge\nprocess_start_time_seconds 1\n"),
	parts(many(300), many(300)+"many{a=\"1\",x=\"1\",job=\"9\"} 1\n"),
	differing(ownNames, "push_up 1\n", "# TYPE push_up counter\npush_up{a=\"1\"} 1\nm 1\n",
		"# TYPE pushgateway_build_info counter\npushgateway_build_info 1\n",
		"# HELP pushgateway_http_requests_total mine\n# TYPE pushgateway_http_requests_total counter\npushgateway_http_requests_total 1\n",
		"pushgateway_http_requests_total 1\n", "pushgateway_mine 1\n", "culvert_proxy_mine 1\n",
		"# TYPE culvert_proxy_agents counter\nculvert_proxy_agents 1\n"),
	differing(jsonKeys, "labels 1\n", "last_push_successful 1\n"),
	differing(badHelp, "# HELP m \xff\nm 1\n"),
	parts("m 1\n{a=\"1\"} 2\n", "# TYPE m gauge\n {} 2\n", "{a=\"1\"} 2\n", "{} 1\n"),
	differing(utf8Names, "{\"m.a\"} 1\n", "{\"m.a\",a=\"1\"} 1\n", "{a=\"1\",\"m.a\"} 1\n", "{\"m\"} 1\n", "m{\"a.b\"=\"1\"} 1\n",
		"# TYPE \"m.a\" counter\n# HELP \"m.a\" help\n{\"m.a\",\"l.b\"=\"c\"} 1\n", "{\"é\"} 1\n", "{\"\"} 1\n", "{\"m\",\"n\"} 1\n"),
	differing(newSyntax, "# HELP quoted a \\\" b\nquoted 1\n"),
	differing(gaugeHistograms, "# TYPE gh gaugehistogram\ngh_bucket{le=\"1\"} 1\ngh_count 1\ngh_sum 2\n",
		"# TYPE gh GAUGE_HISTOGRAM\ngh_bucket{le=\"1\"} 1\ngh_count 1\ngh_sum 2\n"),
)

// many returns a body of n series in no order, with labels that the key may force.
func many(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "many{a=\"%d\",x=\"%d\",job=\"9\"} %d\n", i*7%n, i, i)
	}
	return b.String()
}

// values are samples with these values.
func values(texts ...string) (list []part) {
	for _, text := range texts {
		list = append(list, part{text: "m " + text + "\n"}, part{text: "# TYPE c counter\nc{a=\"1\"} " + text + "\n"})
	}
	return list
}

const protobuf = "Content-Type: application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"

// inProtobuf returns families as a body.
func inProtobuf(families ...*dto.MetricFamily) string {
	var b bytes.Buffer
	for _, f := range families {
		if _, err := protodelim.MarshalTo(&b, f); err != nil {
			panic(err)
		}
	}
	return b.String()
}

func family(name string, kind dto.MetricType, series ...*dto.Metric) *dto.MetricFamily {
	return &dto.MetricFamily{Name: &name, Type: &kind, Metric: series}
}

// labelled adds labels to a series.
func labelled(m *dto.Metric, pairs ...string) *dto.Metric {
	for i := 0; i < len(pairs); i += 2 {
		m.Label = append(m.Label, &dto.LabelPair{Name: &pairs[i], Value: &pairs[i+1]})
	}
	return m
}

func counter(v float64) *dto.Metric { return &dto.Metric{Counter: &dto.Counter{Value: &v}} }
func gauge(v float64) *dto.Metric   { return &dto.Metric{Gauge: &dto.Gauge{Value: &v}} }
func untyped(v float64) *dto.Metric { return &dto.Metric{Untyped: &dto.Untyped{Value: &v}} }
func summary(count uint64, sum float64, quantiles ...float64) *dto.Metric {
	s := &dto.Summary{SampleCount: &count, SampleSum: &sum}
	for i := range quantiles {
		s.Quantile = append(s.Quantile, &dto.Quantile{Quantile: &quantiles[i], Value: proto.Float64(float64(i))})
	}
	return &dto.Metric{Summary: s}
}
func histogram(count uint64, sum float64, bounds ...float64) *dto.Metric {
	h := &dto.Histogram{SampleCount: &count, SampleSum: &sum}
	for i := range bounds {
		h.Bucket = append(h.Bucket, &dto.Bucket{UpperBound: &bounds[i], CumulativeCount: proto.Uint64(min(count, uint64(i)))})
	}
	return &dto.Metric{Histogram: h}
}

// native returns a native histogram with one observation in each bucket.
func native(schema int32, zero, positive, negative int) *dto.Metric {
	m := histogram(uint64(zero+positive+negative), 1.5)
	h := m.Histogram
	h.Schema, h.ZeroThreshold, h.ZeroCount = &schema, proto.Float64(0.25), proto.Uint64(uint64(zero))
	fill := func(n int) (spans []*dto.BucketSpan, deltas []int64) {
		if n > 0 {
			spans = []*dto.BucketSpan{{Offset: proto.Int32(-1), Length: proto.Uint32(uint32(n))}}
			deltas = make([]int64, n)
			deltas[0] = 1
		}
		return spans, deltas
	}
	h.PositiveSpan, h.PositiveDelta = fill(positive)
	h.NegativeSpan, h.NegativeDelta = fill(negative)
	return m
}

// protobufBodies are messages, or nearly.
var protobufBodies = func() []part {
	const c, g, s, u, h, gh = dto.MetricType_COUNTER, dto.MetricType_GAUGE, dto.MetricType_SUMMARY, dto.MetricType_UNTYPED, dto.MetricType_HISTOGRAM,
		dto.MetricType_GAUGE_HISTOGRAM
	noType := family("c", c, counter(1))
	noType.Type = nil
	helped := family("m", u, untyped(1))
	helped.Help, helped.Unit = proto.String("one \\ \n two"), proto.String("seconds")
	badHelped := family("m", u, untyped(1))
	badHelped.Help = proto.String("\xff")
	timed := untyped(1)
	timed.TimestampMs = proto.Int64(0)
	nameless := family("", u, untyped(1))
	nameless.Name = nil
	exemplar := func(label string) *dto.Exemplar {
		return &dto.Exemplar{Label: []*dto.LabelPair{{Name: &label, Value: proto.String("1")}}, Value: proto.Float64(1),
			Timestamp: timestamppb.New(time.Unix(1e9, 0))}
	}
	withExemplar := func(label string) *dto.Metric {
		m := counter(1)
		m.Counter.Exemplar = exemplar(label)
		return m
	}
	bucketExemplar := histogram(3, 1, 1, 2, 3)
	bucketExemplar.Histogram.Bucket[1].Exemplar = exemplar("trace_id")
	created := counter(1)
	created.Counter.CreatedTimestamp = timestamppb.New(time.Unix(1e9, 5))
	both := native(2, 1, 2, 3)
	both.Histogram.Bucket = histogram(6, 1.5, 1, 2).Histogram.Bucket
	badSchema, badSpan := native(99, 1, 2, 3), native(1, 1, 2, 3)
	badSpan.Histogram.PositiveSpan[0].Length = proto.Uint32(7)
	badCount := native(1, 1, 2, 3)
	badCount.Histogram.SampleCount = proto.Uint64(1)
	float := native(1, 0, 0, 0)
	float.Histogram.SampleCount, float.Histogram.ZeroCount = nil, nil
	float.Histogram.SampleCountFloat, float.Histogram.PositiveSpan, float.Histogram.PositiveCount = proto.Float64(2.5),
		[]*dto.BucketSpan{{Offset: proto.Int32(0), Length: proto.Uint32(2)}}, []float64{1, 1.5}
	twoValues := gauge(1)
	twoValues.Counter = counter(2).Counter
	whole := inProtobuf(family("m", u, untyped(1)), family("g", g, gauge(2)))
	var list []part
	add := func(d *difference, families ...*dto.MetricFamily) {
		list = append(list, part{text: inProtobuf(families...), header: []string{protobuf}})
		if d != nil {
			list[len(list)-1].meant = []*difference{d}
		}
	}
	add(nil)
	add(nil, family("m", u, untyped(1)))
	add(nil, noType)
	add(nil, helped)
	add(nil, family("c", c, counter(-1), labelled(counter(2), "a", "1")))
	add(nil, family("g", g, gauge(math.NaN())), family("c", c, counter(math.Inf(1))))
	add(nil, family("g", g, gauge(math.Copysign(0, -1))))
	add(nil, family("s", s, summary(1, 2, 0.5, 0.9), labelled(summary(math.MaxUint64, math.NaN()), "a", "1")))
	add(nil, family("s", s, summary(1, 2, 0.9, 0.5, 0.5)))
	add(nil, family("h", h, histogram(3, 2, 1, 2), labelled(histogram(1, 0), "a", "1")))
	add(nil, family("h", h, histogram(3, 2, 2, 1, 1, math.Inf(1), math.NaN())))
	add(nil, family("m", u, untyped(1)), family("m", u, labelled(untyped(2), "a", "1")))
	add(nil, family("m", u, untyped(1)), family("m", g, gauge(2)))
	add(nil, family("h", h, native(0, 1, 2, 3)))
	add(nil, family("h", h, native(8, 0, 4, 0), labelled(native(-4, 0, 0, 1), "a", "1")))
	add(nil, family("h", h, native(3, 1, 0, 0)))
	add(nil, family("c", c, withExemplar("trace_id")))
	add(nil, family("h", h, bucketExemplar))
	add(newFields, family("c", c, created))
	add(nil, family("other_c", c, gauge(1)))
	add(nil, family("other_g", g, counter(1)))
	add(nil, family("other_s", s, histogram(1, 1)))
	add(nil, family("other_h", h, summary(1, 1)))
	add(nil, family("other_m", u, &dto.Metric{}))
	add(nil, family("m", u, timed))
	add(nil, family("m", u, untyped(1), untyped(2)))
	add(nil, family("m", u, labelled(untyped(1), "a", "1", "a", "2")))
	add(nil, family("m", u, labelled(untyped(1), "job", "1"), labelled(untyped(1), "job", "2")))
	add(nil, family("m", u, labelled(untyped(1), "", "1")))
	add(nil, family("m", u, labelled(untyped(1), "__x", "1")))
	add(nil, family("m", u, labelled(untyped(1), "\xff", "1")))
	add(nil, family("m", u, labelled(untyped(1), "a", "\xff")))
	add(nil, family("s", s, labelled(summary(1, 2), "quantile", "1")))
	add(nil, family("m", u, labelled(untyped(1), "quantile", "1", "le", "2")))
	add(nil, family("m", u, labelled(untyped(1), "z", "1", "b", "2", "instance", "i")))
	add(nil, family("push_time_seconds", g, gauge(5)))
	add(nil, family("go_goroutines", c, counter(5)))
	add(nil, family("go_goroutines", g, gauge(5)))
	add(nil, family("go_gc_duration_seconds", s, summary(1, 1)))
	add(nil, family("s", s, summary(1, 2)), family("s_count", c, counter(1)))
	add(nil, family("h", h, histogram(1, 2)), family("h_bucket", c, counter(1)))
	add(floatHistograms, family("fh", h, float))
	add(gaugeHistograms, family("gh", gh, histogram(3, 2, 1, 2)))
	add(bothForms, family("h", h, both))
	add(scrapeable, family("bad_h", h, labelled(histogram(1, 1, 1), "le", "1")))
	add(scrapeable, family("bad_h", h, badSchema))
	add(scrapeable, family("bad_h", h, badSpan))
	add(scrapeable, family("bad_h", h, badCount))
	add(scrapeable, family("bad_c", c, withExemplar("")))
	add(badHelp, badHelped)
	add(utf8Names, family("m.a", u, untyped(1)))
	add(utf8Names, family("1m", u, untyped(1)))
	add(utf8Names, family("m", u, labelled(untyped(1), "a.b", "1")))
	add(badNames, family("\xff", u, untyped(1)))
	add(badNames, family("", u, untyped(1)))
	add(badNames, nameless)
	add(badNames, nameless, family("m", u, untyped(1)))
	add(badNames, &dto.MetricFamily{})
	add(noSeries, family("none", u))
	add(noSeries, family("none", u), family("g", g, gauge(1)))
	add(otherValues, family("two", g, twoValues))
	// A family with its name, no type, and an unknown field.
	list = append(list, part{text: "\x05\x0a\x01z\x38\x05", header: []string{protobuf}, meant: []*difference{noSeries}})
	for _, text := range []string{"\x00", "\x01", "\x02\x0a\x05m", "\x05\xff\xff\xff\xff\xff", "m 1\n", "\x02\x08\x01", "\x02\x18\x09",
		"\x03\x0a\x01m\x80", whole + "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "\xff\xff\x3f"} {
		list = append(list, part{text: text, header: []string{protobuf}, meant: []*difference{cutOff}})
	}
	for n := range len(whole) {
		list = append(list, part{text: whole[:n], header: []string{protobuf}, meant: []*difference{cutOff}})
	}
	return list
}()

// contentTypes are for a body of either format.
var contentTypes = slices.Concat(
	parts("", "text/plain", "text/plain; version=0.0.4; charset=utf-8", "application/json", "application/x-www-form-urlencoded",
		"multipart/form-data; boundary=x", "nonsense;;;", "application/vnd.google.protobuf",
		"application/vnd.google.protobuf; encoding=delimited", "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily",
		"application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=text",
		"application/vnd.google.protobuf; proto=other; encoding=delimited",
		"application/vnd.google.protobuf; encoding=delimited; proto=io.prometheus.client.MetricFamily",
		"Application/VND.google.Protobuf; Proto=\"io.prometheus.client.MetricFamily\"; ENCODING=\"delimited\"",
		"application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited; escaping=allow-utf-8; x=y",
		"application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=DELIMITED",
		"application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited;;"),
	differing(openMetrics, "application/openmetrics-text", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
)

// openMetricsBodies are read by other rules in ours.
var openMetricsBodies = []string{"# EOF\n", "m 1\n# EOF\n", "m 1\n", "# TYPE x counter\nx_total 1\n# EOF\n",
	"# TYPE x counter\nx_total 1 # {a=\"1\"} 1\n# EOF\n", "# TYPE x unknown\nx 1\n# EOF\n", "# TYPE x info\nx_info{a=\"1\"} 1\n# EOF\n",
	"x 1 1.5\n# EOF\n", ""}

// coded returns a body in encodings, whole, broken and mislabelled.
func coded(body string) []part {
	var zipped, framed bytes.Buffer
	zw := gzip.NewWriter(&zipped)
	io.WriteString(zw, body)
	zw.Close()
	sw := snappy.NewBufferedWriter(&framed)
	io.WriteString(sw, body)
	sw.Close()
	zstdWriter, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	var members bytes.Buffer
	half := len(body) / 2
	for _, text := range []string{body[:half], body[half:]} {
		zw.Reset(&members)
		io.WriteString(zw, text)
		zw.Close()
	}
	var list []part
	add := func(encoding, content string, meant ...*difference) {
		list = append(list, part{content, []string{"Content-Encoding: " + encoding}, meant})
	}
	add("identity", body)
	add("deflate", body)
	add("x-gzip", body)
	add("gzip, identity", body)
	add("br", body)
	add("", body)
	add("deflate", zipped.String())
	add("x-gzip", zipped.String())
	add("gzip, gzip", zipped.String())
	list = append(list, part{text: zipped.String()})
	add("gzip", zipped.String())
	add("GZip", zipped.String(), newEncodings)
	add("gzip", members.String())
	add("gzip", body)
	add("gzip", "")
	add("gzip", zipped.String()[:zipped.Len()-5], cutOff)
	add("gzip", zipped.String()+"x", cutOff)
	add("gzip", "x"+zipped.String())
	add("snappy", string(snappy.Encode(nil, []byte(body))), newEncodings)
	add("snappy", framed.String(), newEncodings)
	add("Snappy", framed.String(), newEncodings)
	add("snappy", body, newEncodings)
	add("snappy", framed.String()[:framed.Len()-2], newEncodings)
	list = append(list, part{text: framed.String()})
	add("zstd", string(zstdWriter.EncodeAll([]byte(body), nil)), newEncodings)
	add("zstd", body, newEncodings)
	return list
}
