package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/alecthomas/kingpin/v2"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/config"
	"github.com/prometheus/common/model"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/culvert-io/culvert/gateway"
)

// importFlags is the command line of import.
type importFlags struct {
	from, to                     string
	fromConfigFile, toConfigFile string
	dryRun                       bool
	timeout                      time.Duration
}

const (
	importAttempts   = 5 // at reading a group at one moment
	importPause      = 300 * time.Millisecond
	importConcurrent = 4
	// maxReply bounds what a server answers, in bytes.
	maxReply = 1 << 30
	// sameTime is the distance within which two times are one: as seconds in a
	// float64 they have steps of a quarter of a microsecond.
	sameTime = int64(time.Microsecond)

	protobufType = "application/vnd.google.protobuf; proto=io.prometheus.client.MetricFamily; encoding=delimited"
)

// The families that the server makes for each group.
const (
	pushTimeName    = "push_time_seconds"
	failureTimeName = "push_failure_time_seconds"
	pushUpName      = "push_up"
)

// command adds the command to the command line's grammar.
func (f *importFlags) command(app *kingpin.Application) *kingpin.CmdClause {
	c := app.Command("import", "Take all groups of a running Pushgateway over into a running culvert-proxy, with their push and failure times. Groups that are there already, or were pushed there since, stay as they are, so it may run again.")
	c.Flag("from", "Base URL of the Pushgateway (1.2 or later), as in http://pushgateway.example.net:9091; with its path prefix, and USER:PASSWORD@ if it asks for them.").
		Required().PlaceHolder("URL").StringVar(&f.from)
	c.Flag("to", "Base URL of the culvert-proxy, in the same form.").
		Default("http://localhost:8080").StringVar(&f.to)
	c.Flag("from.http.config.file", "TLS and credentials for --from, as Prometheus's HTTP client configuration in YAML.").
		PlaceHolder("FILE").StringVar(&f.fromConfigFile)
	c.Flag("to.http.config.file", "The same for --to.").
		PlaceHolder("FILE").StringVar(&f.toConfigFile)
	c.Flag("dry-run", "Say what would be done, and change nothing.").
		BoolVar(&f.dryRun)
	duration(c.Flag("timeout", "How long one request may take.").Default("30s"), &f.timeout)
	return c
}

// run imports the groups and writes to out what became of them. It returns an
// error unless each group is at the target.
func (f *importFlags) run(ctx context.Context, out io.Writer) error {
	if f.timeout <= 0 {
		return fmt.Errorf("--timeout=%s: use more than 0", f.timeout)
	}
	from, err := newEndpoint("--from", f.from, f.fromConfigFile, f.timeout)
	if err != nil {
		return err
	}
	defer from.client.CloseIdleConnections()
	to, err := newEndpoint("--to", f.to, f.toConfigFile, f.timeout)
	if err != nil {
		return err
	}
	defer to.client.CloseIdleConnections()

	groups, unread, err := readSource(ctx, from)
	if err != nil {
		return err
	}
	// Only now: a job may push to the target at any time, and the less time lies
	// between the look and the writing, the better.
	there, err := readTarget(ctx, to)
	if err != nil {
		return err
	}
	i := &importer{to: to, there: there, dryRun: f.dryRun, out: out}
	for _, g := range unread {
		i.fail(g.key, g.err)
	}
	var tasks errgroup.Group
	tasks.SetLimit(importConcurrent)
	for _, g := range groups {
		if ctx.Err() != nil {
			break
		}
		tasks.Go(func() error { i.group(ctx, g); return nil })
	}
	_ = tasks.Wait() // the tasks return none

	imported := "imported"
	if f.dryRun {
		imported = "to import"
	}
	found := len(groups) + len(unread)
	fmt.Fprintf(out, "%d groups found at %s: %d %s, %d already there, %d failed\n", found, from.base.Redacted(), i.imported, imported, i.kept, i.failed)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("import stopped early; run it again for the rest: %w", context.Cause(ctx))
	case i.failed > 0:
		return fmt.Errorf("%d of %d groups failed; see above", i.failed, found)
	}
	return nil
}

// importer writes groups to the target.
type importer struct {
	to     *endpoint
	there  map[string]pushTimes // by the keys' IDs
	dryRun bool

	mu                     sync.Mutex // protects what follows
	out                    io.Writer
	imported, kept, failed int
}

func (i *importer) fail(key gateway.Key, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.failed++
	fmt.Fprintf(i.out, "group %s: not imported: %s\n", key, oneLine(err))
}

// group writes one group, unless the target has it.
func (i *importer) group(ctx context.Context, g sourceGroup) {
	there, exists := i.there[g.key.ID()]
	pushes := g.pushes()
	switch {
	case exists && there.pushed > g.pushed+sameTime,
		exists && there.pushed >= g.pushed-sameTime && there.failed >= g.failed-sameTime:
		i.mu.Lock()
		defer i.mu.Unlock()
		i.kept++
		return
	case exists && there.pushed >= g.pushed-sameTime:
		// The last good push is there; what is new is a failed one.
		pushes = []timedPush{{method: http.MethodPost, at: g.pushed}}
	}
	path, err := pushPath(g.key)
	if err != nil {
		i.fail(g.key, err)
		return
	}
	if !i.dryRun {
		for n, p := range pushes {
			header := http.Header{"Content-Type": {protobufType}, gateway.HeaderPushTime: {unixSeconds(p.at)}, gateway.HeaderUnlessPushedSince: {unixSeconds(g.pushed)}}
			if n == len(pushes)-1 && g.failed != there.failed {
				header.Set(gateway.HeaderFailureTime, unixSeconds(g.failed))
			}
			if err := i.push(ctx, path, p, header); errors.Is(err, gateway.ErrPushedSince) {
				i.mu.Lock()
				defer i.mu.Unlock()
				i.kept++
				return
			} else if err != nil {
				if ctx.Err() == nil {
					i.fail(g.key, err)
				}
				return
			}
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.imported++
	if i.dryRun {
		fmt.Fprintf(i.out, "group %s: would be imported: %s\n", g.key, g.describe())
	}
}

// push sends one request.
func (i *importer) push(ctx context.Context, path string, p timedPush, header http.Header) error {
	var body bytes.Buffer
	for _, f := range p.families {
		if _, err := protodelim.MarshalTo(&body, f); err != nil {
			return fmt.Errorf("metric %q: %w", f.GetName(), err)
		}
	}
	a, err := i.to.do(ctx, p.method, path, header, body.Bytes())
	if err != nil {
		return err
	}
	switch a.status {
	case http.StatusOK:
		return nil
	case http.StatusPreconditionFailed:
		return gateway.ErrPushedSince
	}
	return errors.New(a.String())
}

// sourceGroup is a group as it was at one moment.
type sourceGroup struct {
	key gateway.Key
	pushTimes
	families []timedFamily // sorted by time, then by name
}

// pushTimes are Unix nanoseconds, 0: never.
type pushTimes struct{ pushed, failed int64 }

type timedFamily struct {
	at     int64 // Unix nanoseconds of its last push
	family *dto.MetricFamily
}

// unreadGroup is a group that could not be read, and why.
type unreadGroup struct {
	key gateway.Key
	err error
}

// timedPush is one request of those that make up a group.
type timedPush struct {
	method   string
	at       int64
	families []*dto.MetricFamily
}

// pushes returns the requests that leave the group with all its times: the first
// puts the oldest families, one more for each later time adds those, and the last
// one bears the time of the group's last push, which may have brought nothing.
func (g sourceGroup) pushes() []timedPush {
	var pushes []timedPush
	for _, f := range g.families {
		if len(pushes) == 0 || pushes[len(pushes)-1].at != f.at {
			pushes = append(pushes, timedPush{method: http.MethodPost, at: f.at})
		}
		last := &pushes[len(pushes)-1]
		last.families = append(last.families, f.family)
	}
	if len(pushes) == 0 || pushes[len(pushes)-1].at != g.pushed {
		pushes = append(pushes, timedPush{method: http.MethodPost, at: g.pushed})
	}
	pushes[0].method = http.MethodPut
	return pushes
}

func (g sourceGroup) describe() string {
	if g.pushed == 0 {
		return "no push to it ever succeeded"
	}
	series := 0
	for _, f := range g.families {
		series += len(f.family.Metric)
	}
	return fmt.Sprintf("%d series in %d families, last pushed %s", series, len(g.families), time.Unix(0, g.pushed).UTC().Format(time.RFC3339))
}

// pushPath returns the path of the group's pushes below the base URL.
func pushPath(key gateway.Key) (string, error) {
	// The "=" stands for empty values, and is taken off again.
	encode := func(value string) string {
		return "@base64/" + base64.RawURLEncoding.EncodeToString([]byte(value)) + "="
	}
	job, _ := key.Get(model.JobLabel)
	rest := encode(job)
	for _, l := range key {
		if l.Name == model.JobLabel {
			continue
		}
		name := model.EscapeName(l.Name, model.ValueEncodingEscaping)
		if name == l.Name && strings.HasPrefix(name, "U__") {
			// It is not escaped, and must not be taken for it.
			name = "U__" + strings.ReplaceAll(name, "_", "__")
		}
		rest += "/" + name + encode(l.Value)
	}
	if parsed, err := gateway.ParsePath(rest); err != nil {
		return "", err
	} else if parsed.ID() != key.ID() {
		return "", fmt.Errorf("its labels can't be written in a URL")
	}
	return "metrics/job" + rest, nil
}

// unixSeconds returns nanoseconds as seconds, exactly.
func unixSeconds(nanos int64) string {
	if nanos%1e9 == 0 {
		return strconv.FormatInt(nanos/1e9, 10)
	}
	return fmt.Sprintf("%d.%09d", nanos/1e9, nanos%1e9)
}

var errMoving = errors.New("it is being pushed to; run import again")

// readSource reads all groups. Their times come from the query API, their samples
// from the exposition, where they are complete. The two are read one after the
// other, so a group counts only if nobody pushed to it in between; the others are
// read again, a few times.
func readSource(ctx context.Context, from *endpoint) (groups []sourceGroup, unread []unreadGroup, err error) {
	done := map[string]bool{}
	for n := range importAttempts {
		if n > 0 {
			select {
			case <-time.After(importPause):
			case <-ctx.Done():
				return nil, nil, context.Cause(ctx)
			}
		}
		listed, err := from.groups(ctx)
		if err != nil {
			return nil, nil, err
		}
		exposed, err := from.samples(ctx)
		if err != nil {
			return nil, nil, err
		}
		unread = nil
		for _, l := range listed {
			if done[l.key.ID()] {
				continue
			}
			g, err := l.fill(exposed)
			if err != nil {
				unread = append(unread, unreadGroup{l.key, err})
				continue
			}
			done[l.key.ID()] = true
			groups = append(groups, g)
		}
		if len(unread) == 0 {
			break
		}
	}
	return groups, unread, nil
}

// readTarget returns the times of the groups that are there, by their keys' IDs.
func readTarget(ctx context.Context, to *endpoint) (map[string]pushTimes, error) {
	listed, err := to.groups(ctx)
	if err != nil {
		return nil, err
	}
	a, err := to.do(ctx, http.MethodGet, "api/v1/agents", http.Header{}, nil)
	if err != nil {
		return nil, err
	}
	if a.status == http.StatusNotFound {
		// A Pushgateway would take all groups, as pushed now.
		return nil, to.errorf("GET /api/v1/agents: %s; this is no culvert-proxy, and would not keep the push times", a)
	}
	there := make(map[string]pushTimes, len(listed))
	for _, l := range listed {
		there[l.key.ID()] = l.times()
	}
	return there, nil
}

// listedGroup is a group as the query API shows it.
type listedGroup struct {
	key      gateway.Key
	families map[string]listedFamily
}

type listedFamily struct {
	Time   time.Time `json:"time_stamp"`
	Help   string    `json:"help"`
	Series []struct {
		Labels map[string]string `json:"labels"`
		Value  string            `json:"value"` // of counters, gauges and untyped
	} `json:"metrics"`
}

// UnmarshalJSON reads one element of the API's list: the families by their names,
// and two keys that are no families unless a family of that name hides them.
func (g *listedGroup) UnmarshalJSON(text []byte) error {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil {
		return err
	}
	var labels map[string]string
	if json.Unmarshal(fields["labels"], &labels) == nil {
		delete(fields, "labels")
	} else {
		labels = nil
	}
	if json.Unmarshal(fields["last_push_successful"], new(bool)) == nil {
		delete(fields, "last_push_successful")
	}
	g.families = make(map[string]listedFamily, len(fields))
	for name, field := range fields {
		var f listedFamily
		if err := json.Unmarshal(field, &f); err != nil {
			return fmt.Errorf("metric %q: %w", name, err)
		}
		g.families[name] = f
	}
	pushTime := g.families[pushTimeName]
	if len(pushTime.Series) == 0 {
		return fmt.Errorf("a group has no %s", pushTimeName)
	}
	if labels == nil {
		// The labels of push_time_seconds are the key, and instance where that has none.
		labels = maps.Clone(pushTime.Series[0].Labels)
		if labels[model.InstanceLabel] == "" {
			delete(labels, model.InstanceLabel)
		}
	}
	g.key = keyOf(labels)
	return nil
}

// keyOf returns labels sorted by name.
func keyOf(labels map[string]string) gateway.Key {
	key := make(gateway.Key, 0, len(labels))
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		key = append(key, gateway.Label{Name: name, Value: labels[name]})
	}
	return key
}

// seconds returns the value of the first series, 0 where there is none.
func (f listedFamily) seconds() float64 {
	if len(f.Series) == 0 {
		return 0
	}
	v, err := strconv.ParseFloat(f.Series[0].Value, 64)
	if err != nil {
		return 0
	}
	return v
}

// times returns when pushes to the group succeeded and failed.
func (g listedGroup) times() pushTimes {
	pushTime, failureTime := g.families[pushTimeName], g.families[failureTimeName]
	candidates := []time.Time{pushTime.Time, failureTime.Time}
	for _, f := range g.families {
		candidates = append(candidates, f.Time)
	}
	return pushTimes{exactTime(pushTime.seconds(), candidates), exactTime(failureTime.seconds(), candidates)}
}

// exactTime returns the Unix nanoseconds that the Pushgateway's formula
// (float64(nanoseconds)/1e9) makes to this many seconds: those of a candidate, or
// of the many that do the ones nearest.
func exactTime(seconds float64, candidates []time.Time) int64 {
	if !(seconds > 0 && seconds < math.MaxInt64/1e9) {
		return 0
	}
	for _, c := range candidates {
		if nanos := c.UnixNano(); float64(nanos)/1e9 == seconds {
			return nanos
		}
	}
	nearest := math.Round(seconds * 1e9)
	for _, nanos := range []float64{nearest, math.Nextafter(nearest, 0), math.Nextafter(nearest, math.MaxInt64)} {
		if nanos/1e9 == seconds {
			return int64(nanos)
		}
	}
	return int64(nearest)
}

// fill puts the samples to what the API told. It returns errMoving where the two
// are not of one moment.
func (g listedGroup) fill(exposed map[string]exposedSeries) (sourceGroup, error) {
	for _, name := range []string{pushTimeName, failureTimeName} {
		if f := g.families[name]; len(f.Series) > 0 {
			series, ok := exposed[seriesID(name, keyOf(f.Series[0].Labels))]
			if !ok || series.Gauge != nil && series.Gauge.GetValue() != f.seconds() {
				return sourceGroup{}, errMoving
			}
		}
	}
	out := sourceGroup{key: g.key, pushTimes: g.times()}
	for name, listed := range g.families {
		if name == pushTimeName || name == failureTimeName || name == pushUpName || len(listed.Series) == 0 {
			continue
		}
		f := &dto.MetricFamily{Name: &name}
		if listed.Help != "" { // the exposition has one of all groups
			f.Help = &listed.Help
		}
		for _, s := range listed.Series {
			labels := keyOf(s.Labels)
			series, ok := exposed[seriesID(name, labels)]
			if !ok {
				return sourceGroup{}, fmt.Errorf("its /api/v1/metrics has the series %s%s, its /metrics has not", name, labels)
			}
			f.Type = &series.kind
			f.Metric = append(f.Metric, series.Metric)
		}
		// A family may seem younger than its group where two pushes came at once.
		out.families = append(out.families, timedFamily{min(listed.Time.UnixNano(), out.pushed), f})
	}
	slices.SortFunc(out.families, func(a, b timedFamily) int {
		return cmp.Or(cmp.Compare(a.at, b.at), strings.Compare(a.family.GetName(), b.family.GetName()))
	})
	return out, nil
}

// exposedSeries is a series of the exposition.
type exposedSeries struct {
	*dto.Metric
	kind dto.MetricType
}

// seriesID identifies a series by its name and its sorted labels.
func seriesID(name string, labels gateway.Key) string { return name + "\xff" + labels.ID() }

// endpoint is a server with the Pushgateway's HTTP API, as a client sees it.
type endpoint struct {
	flag    string // that names it
	base    *url.URL
	client  *http.Client
	timeout time.Duration
}

func newEndpoint(flag, rawURL, configFile string, timeout time.Duration) (*endpoint, error) {
	u, err := url.Parse(rawURL)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return nil, fmt.Errorf("%s: use a whole base URL, as in http://pushgateway.example.net:9091", flag)
	}
	httpConfig := &config.HTTPClientConfig{EnableHTTP2: true, ProxyConfig: config.ProxyConfig{ProxyFromEnvironment: true}}
	if configFile != "" {
		if httpConfig, _, err = config.LoadHTTPConfigFile(configFile); err != nil {
			return nil, fmt.Errorf("%s.http.config.file=%s: %w", flag, configFile, err)
		}
	}
	client, err := config.NewClientFromConfig(*httpConfig, "import")
	if err != nil {
		return nil, fmt.Errorf("%s.http.config.file=%s: %w", flag, configFile, err)
	}
	// A redirected PUT can become a GET, which succeeds and changes nothing.
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &endpoint{flag: flag, base: u, client: client, timeout: timeout}, nil
}

// errorf returns an error that names the endpoint.
func (e *endpoint) errorf(format string, args ...any) error {
	return fmt.Errorf("%s=%s: "+format, append([]any{e.flag, e.base.Redacted()}, args...)...)
}

// reply is an answer, read to its end.
type reply struct {
	status    int
	mediaType string
	body      []byte
}

// String tells what the server answered.
func (a *reply) String() string {
	status := fmt.Sprintf("%d %s", a.status, http.StatusText(a.status))
	text := strings.TrimSpace(string(a.body[:min(len(a.body), 64<<10)]))
	if a.mediaType == "text/html" || text == "" {
		return status
	}
	return status + ": " + text
}

// do sends a request for a path below the base URL. Redirects and missing
// credentials are errors.
func (e *endpoint) do(ctx context.Context, method, path string, header http.Header, body []byte) (*reply, error) {
	late := fmt.Errorf("no whole answer within %s; see whether the server is overloaded, or give it more with --timeout", e.timeout)
	ctx, cancel := context.WithTimeoutCause(ctx, e.timeout, late)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, e.base.JoinPath(path).String(), bytes.NewReader(body))
	if err != nil {
		return nil, e.errorf("%w", err)
	}
	r.Header = header
	resp, err := e.client.Do(r)
	if ctx.Err() != nil {
		return nil, e.errorf("%s /%s: %w", method, path, context.Cause(ctx))
	}
	if err != nil {
		if wrapped, ok := errors.AsType[*url.Error](err); ok {
			err = wrapped.Err // the URL stands in front already
		}
		return nil, e.errorf("can't be reached: %w; check the URL, and that the server runs", err)
	}
	defer resp.Body.Close()
	a := &reply{status: resp.StatusCode}
	a.mediaType, _, _ = mime.ParseMediaType(resp.Header.Get("Content-Type"))
	switch {
	case a.status == http.StatusUnauthorized, a.status == http.StatusForbidden:
		return nil, e.errorf("%s /%s: %s; give credentials in %s.http.config.file (basic_auth, authorization), or as USER:PASSWORD@ in the URL", method, path, a, e.flag)
	case a.status >= 300 && a.status < 400:
		return nil, e.errorf("%s /%s is redirected to %s; use the URL that this leads to", method, path, resp.Header.Get("Location"))
	}
	limited := http.MaxBytesReader(nil, resp.Body, maxReply)
	if resp.ContentLength <= maxReply {
		a.body, err = io.ReadAll(limited)
	}
	_, more := errors.AsType[*http.MaxBytesError](err)
	switch {
	case more, resp.ContentLength > maxReply:
		return nil, e.errorf("%s /%s: the answer is larger than %d MiB, the most that import takes", method, path, maxReply>>20)
	case ctx.Err() != nil:
		return nil, e.errorf("%s /%s: %w", method, path, context.Cause(ctx))
	case err != nil:
		return nil, e.errorf("%s /%s: the answer broke off: %w", method, path, err)
	}
	return a, nil
}

// groups reads all groups from the query API.
func (e *endpoint) groups(ctx context.Context) ([]listedGroup, error) {
	const path = "api/v1/metrics"
	a, err := e.do(ctx, http.MethodGet, path, http.Header{}, nil)
	if err != nil {
		return nil, err
	}
	switch {
	case a.status == http.StatusNotFound && e.flag == "--from":
		return nil, e.errorf("GET /%s: %s; a Pushgateway older than 1.2 must be updated first, else check the URL, path prefix included", path, a)
	case a.status == http.StatusNotFound:
		return nil, e.errorf("GET /%s: %s; check that it is a culvert-proxy, and one that takes pushes", path, a)
	case a.status != http.StatusOK:
		return nil, e.errorf("GET /%s: %s", path, a)
	}
	var list struct {
		Status string         `json:"status"`
		Data   *[]listedGroup `json:"data"`
	}
	if err = json.Unmarshal(a.body, &list); err == nil && (list.Status != "success" || list.Data == nil) {
		err = errors.New("no groups in it")
	}
	if err != nil {
		return nil, e.errorf("GET /%s: the answer is not a Pushgateway's (%w); check the URL", path, err)
	}
	return *list.Data, nil
}

// samples reads all series from the exposition, by their IDs.
func (e *endpoint) samples(ctx context.Context) (map[string]exposedSeries, error) {
	path := "metrics"
	header := http.Header{"Accept": {protobufType + "; escaping=" + model.AllowUTF8}}
	a, err := e.do(ctx, http.MethodGet, path, header, nil)
	if err == nil && a.status == http.StatusNotFound {
		if path, err = e.telemetryPath(ctx); err == nil {
			a, err = e.do(ctx, http.MethodGet, path, header, nil)
		}
	}
	if err != nil {
		return nil, err
	}
	switch {
	case a.status == http.StatusInternalServerError:
		return nil, e.errorf("GET /%s: %s\nIts groups contradict each other, so nobody can read them; delete there the groups that the reasons above tell of, then run import again", path, a)
	case a.status != http.StatusOK:
		return nil, e.errorf("GET /%s: %s", path, a)
	case a.mediaType != "application/vnd.google.protobuf":
		return nil, e.errorf("GET /%s: the answer is %q, a Pushgateway's would be protobuf; check the URL", path, a.mediaType)
	}
	series := map[string]exposedSeries{}
	r := bytes.NewReader(a.body)
	for {
		f := new(dto.MetricFamily)
		err := protodelim.UnmarshalOptions{MaxSize: -1}.UnmarshalFrom(r, f)
		if err == io.EOF {
			return series, nil
		}
		if err != nil {
			return nil, e.errorf("GET /%s: the answer is not delimited protobuf: %w", path, err)
		}
		for _, m := range f.Metric {
			labels := make(gateway.Key, len(m.Label))
			for i, l := range m.Label {
				labels[i] = gateway.Label{Name: l.GetName(), Value: l.GetValue()}
			}
			slices.SortFunc(labels, func(a, b gateway.Label) int { return strings.Compare(a.Name, b.Name) })
			series[seriesID(f.GetName(), labels)] = exposedSeries{m, f.GetType()}
		}
	}
}

// telemetryPath returns where the Pushgateway has its exposition, if not at
// /metrics.
func (e *endpoint) telemetryPath(ctx context.Context) (string, error) {
	a, err := e.do(ctx, http.MethodGet, "api/v1/status", http.Header{}, nil)
	if err != nil {
		return "", err
	}
	var status struct {
		Data struct {
			Flags map[string]string `json:"flags"`
		} `json:"data"`
	}
	if err := json.Unmarshal(a.body, &status); err != nil || status.Data.Flags["web.telemetry-path"] == "" {
		return "", e.errorf("GET /metrics: 404 Not Found, and GET /api/v1/status doesn't tell another --web.telemetry-path; check the URL")
	}
	return strings.TrimPrefix(status.Data.Flags["web.telemetry-path"], "/"), nil
}

// oneLine returns an error's text as one line.
func oneLine(err error) string { return strings.Join(strings.FieldsFunc(err.Error(), isLineEnd), " ") }

func isLineEnd(r rune) bool { return r == '\n' || r == '\r' }
