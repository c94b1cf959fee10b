// Package gateway is a push store with the Pushgateway's HTTP API: batch jobs
// push their metrics, Prometheus scrapes them. A push costs what its own size
// costs, is on disk before it is acknowledged, can expire, and can tell that the
// next one is overdue.
package gateway

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"golang.org/x/sync/semaphore"
)

// Header fields of a push.
const (
	// HeaderTTL and HeaderInterval are the query parameters ttl and interval.
	HeaderTTL      = "Culvert-Ttl"
	HeaderInterval = "Culvert-Interval"
	// HeaderPushTime says when the push was made, in Unix seconds with at most 9
	// decimals, where that is not now: it was relayed or imported. 0: never. A time that
	// is more than 5 minutes ahead is refused, or taken for now in a push that has a
	// HeaderPushID.
	HeaderPushTime = "Culvert-Push-Time"
	// HeaderFailureTime says when the last push of the group failed, in the same
	// form, for imports.
	HeaderFailureTime = "Culvert-Failure-Time"
	// HeaderUnlessPushedSince makes a push fail with 412 where the group has a push
	// of a later time, in the same form: an import must not replace what is newer. Where
	// such a push is refused, the group's failure time stays.
	HeaderUnlessPushedSince = "Culvert-Unless-Pushed-Since"
)

// Config tunes a Gateway. Zero values mean the defaults.
type Config struct {
	// MaxBodySize bounds the body of a push in bytes, as sent and decompressed. 64
	// MiB by default.
	MaxBodySize int64
	// Own are the server's own metrics. None by default.
	Own *Own
	// Registerer gets the gateway's metrics: names start with push_. None by default.
	Registerer prometheus.Registerer
	// Gzip compresses and decompresses. By default compress/gzip does; fastgzip.Gzip is
	// faster.
	Gzip *Gzip
	// UseAllProcessors is called where work begins that goes faster on all processors, if the
	// program keeps to fewer. It does nothing by default.
	UseAllProcessors func()
}

// Gateway is the HTTP side of a store.
type Gateway struct {
	config  Config
	store   *Store
	metrics *metrics
	kept    *expositions

	// memory is what bodies of more than smallBody may have together.
	memory *semaphore.Weighted
	// Parsing takes many times the memory of the body, so it takes a place: see pushBody.
	parsing, parsingLarge chan struct{}
}

// New returns a gateway to the store.
func New(config Config, store *Store) *Gateway {
	if config.MaxBodySize == 0 {
		config.MaxBodySize = 64 << 20
	}
	if config.Own == nil {
		config.Own = NewOwn(prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) { return nil, nil }), "culvert_")
	}
	if config.Gzip == nil {
		config.Gzip = standardGzip
	}
	if config.UseAllProcessors == nil {
		config.UseAllProcessors = func() {}
	}
	return &Gateway{
		config: config, store: store, metrics: newMetrics(config.Registerer, store), kept: newExpositions(config.Gzip, config.UseAllProcessors),
		memory:  semaphore.NewWeighted(max(4*config.MaxBodySize, 256<<20)),
		parsing: make(chan struct{}, 4*runtime.GOMAXPROCS(0)), parsingLarge: make(chan struct{}, 2),
	}
}

// badRequest is a mistake of the client.
type badRequest struct{ err error }

func (e badRequest) Error() string { return e.err.Error() }
func (e badRequest) Unwrap() error { return e.err }

// statusOf maps the errors of this package to HTTP.
func statusOf(err error) int {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok || errors.Is(err, ErrBodyTooLarge) || errors.Is(err, ErrTooManySeries) || errors.Is(err, ErrTooLarge) {
		return http.StatusRequestEntityTooLarge
	}
	if _, ok := errors.AsType[forbidden](err); ok {
		return http.StatusForbidden
	}
	if errors.Is(err, ErrPushedSince) {
		return http.StatusPreconditionFailed
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return http.StatusRequestTimeout
	}
	if _, ok := errors.AsType[*Rejection](err); ok {
		return http.StatusBadRequest
	}
	if _, ok := errors.AsType[badRequest](err); ok {
		return http.StatusBadRequest
	}
	if errors.Is(err, ErrTooManyGroups) {
		return http.StatusInsufficientStorage
	}
	return http.StatusServiceUnavailable
}

// retryAfter is how long, in seconds, a client is asked to wait where the store
// can't take its push.
const retryAfter = 5

// answer runs a handler, counts it, and answers with its error, or with a status
// where the handler has written nothing.
func (g *Gateway) answer(w http.ResponseWriter, handler string, success int, f func() error) {
	start, status := time.Now(), success
	if err := f(); err == nil {
		if success != http.StatusOK {
			w.WriteHeader(success)
		}
	} else {
		status = statusOf(err)
		if status == http.StatusServiceUnavailable {
			w.Header().Set("Retry-After", strconv.Itoa(retryAfter))
		}
		http.Error(w, err.Error(), status)
	}
	g.metrics.observe(handler, status, time.Since(start))
}

// ServePush answers PUT and POST of a group. rest is what follows /metrics/job in
// the path, percent-decoded.
func (g *Gateway) ServePush(w http.ResponseWriter, r *http.Request, rest string) {
	g.answer(w, "push", http.StatusOK, func() error { return g.push(w, r, rest) })
}

func (g *Gateway) push(w http.ResponseWriter, r *http.Request, rest string) error {
	id, key, err := g.addressed(w, r, rest)
	if err != nil {
		return err
	}
	e, err := g.editOf(r, id)
	if err != nil {
		return badRequest{err}
	}
	what := func() string { return "the push to " + key.String() }
	read, err := g.readBody(w, r, what)
	if err != nil {
		return err
	}
	defer read.release()
	body := read.content
	e.key = key
	g.received(&e)
	format := formatOf(r.Header.Get("Content-Type"))
	var values []float64
	if e.aggregate == nil {
		e.layout, values = format.layoutOf(body)
	}
	again := false // the last push had this layout
	if e.layout.values > 0 {
		group, last, at := g.store.layoutOf(key)
		again = last == e.layout && at.order == nil
		if last == e.layout && len(at.order) > 0 && at.fit(values) {
			read.parsed()
			e.group, e.values = group, values
			err := g.do(w, r, &change{id: id, edits: []edit{e}})
			if err != errNewLayout {
				return err
			}
			if err := read.enter(r); err != nil {
				return err
			}
			e.group, e.values = nil, nil
		}
	}
	var plain bool
	if e.pushed, plain = format.encodePlain(key, body, unixNano(e.at)); !plain {
		families, err := format.parse(body)
		if err != nil {
			return badRequest{fmt.Errorf("the body of %s: %w", what(), err)}
		}
		e.pushed, e.reasons = prepare(key, families, unixNano(e.at))
		if again && len(e.reasons) == 0 {
			e.pushed.places = format.placesIn(body, values, key, e.pushed.families)
		}
	}
	g.refuseOwn(&e)
	read.parsed()
	return g.do(w, r, &change{id: id, edits: []edit{e}})
}

// addressed returns the ID of a change of one group, and the group's key. It returns an
// error where that can't be, or where the client may not change it.
func (g *Gateway) addressed(w http.ResponseWriter, r *http.Request, rest string) (id pushID, key Key, err error) {
	if id, err = g.identify(w, r); err != nil {
		return id, nil, err
	}
	if key, err = ParsePath(rest); err != nil {
		return id, nil, badRequest{err}
	}
	return id, key, allowed(r.Context(), key)
}

// ServeDelete answers DELETE of a group; rest as for ServePush.
func (g *Gateway) ServeDelete(w http.ResponseWriter, r *http.Request, rest string) {
	g.answer(w, "delete", http.StatusAccepted, func() error {
		id, key, err := g.addressed(w, r, rest)
		if err != nil {
			return err
		}
		return g.do(w, r, &change{id: id, edits: []edit{{key: key, delete: true}}})
	})
}

// ServeWipe deletes all groups.
func (g *Gateway) ServeWipe(w http.ResponseWriter, r *http.Request) {
	g.answer(w, "wipe", http.StatusAccepted, func() error {
		_, err := g.store.Delete(r.Context(), func(Key) bool { return true }, false)
		return err
	})
}

// ServeDeleteMatching deletes the groups whose key match takes, or, dry, tells which
// they are.
func (g *Gateway) ServeDeleteMatching(w http.ResponseWriter, r *http.Request, match func(Key) bool, dry bool) {
	g.answer(w, "delete_matching", http.StatusOK, func() error {
		keys, err := g.store.Delete(r.Context(), match, dry)
		if err != nil {
			return err
		}
		groups := make([]map[string]string, len(keys))
		for i, key := range keys {
			groups[i] = key.Map()
		}
		if !dry {
			g.store.config.Logger.Info("Groups deleted on request", "groups", len(keys), "match", r.URL.Query()["match[]"], "from", r.RemoteAddr)
		}
		WriteAPI(w, map[string]any{"dry_run": dry, "groups": groups})
		return nil
	})
}

// ServeBatch answers a push to many groups at once, POST or PUT with
// ?group_by=job,instance: the grouping keys are read from the labels of the series
// themselves; a label that a series lacks, or has empty, is not part of its key.
// All groups are changed, or none.
func (g *Gateway) ServeBatch(w http.ResponseWriter, r *http.Request) {
	g.answer(w, "batch", http.StatusOK, func() error { return g.batch(w, r) })
}

func (g *Gateway) batch(w http.ResponseWriter, r *http.Request) error {
	id, err := g.identify(w, r)
	if err != nil {
		return err
	}
	names, err := groupBy(r.URL.Query().Get("group_by"))
	if err != nil {
		return badRequest{err}
	}
	template, err := g.editOf(r, id)
	if err != nil {
		return badRequest{err}
	}
	body, err := g.readBody(w, r, func() string { return "the push" })
	if err != nil {
		return err
	}
	defer body.release()
	g.received(&template)
	families, err := formatOf(r.Header.Get("Content-Type")).parse(body.content)
	if err != nil {
		return badRequest{fmt.Errorf("the body of the push: %w", err)}
	}
	parts, err := splitByKey(families, names)
	if err != nil {
		return badRequest{err}
	}
	c := &change{id: id}
	for _, p := range parts {
		if err := allowed(r.Context(), p.key); err != nil {
			return err
		}
		e := template
		e.key = p.key
		e.pushed, e.reasons = prepare(p.key, p.families, unixNano(e.at))
		g.refuseOwn(&e)
		c.edits = append(c.edits, e)
	}
	if err := g.do(w, r, c); err != nil {
		return err
	}
	WriteAPI(w, map[string]int{"groups": len(c.edits)})
	return nil
}

// editOf reads what the request says of its pushes beside the body.
func (g *Gateway) editOf(r *http.Request, id pushID) (e edit, err error) {
	now := g.store.config.Now()
	query := r.URL.Query()
	e.replace = r.Method == http.MethodPut
	if e.ttl, err = durationOf(query, "ttl", r.Header, HeaderTTL); err != nil {
		return e, err
	}
	if e.interval, err = durationOf(query, "interval", r.Header, HeaderInterval); err != nil {
		return e, err
	}
	if e.aggregate, err = parseAggregation(query); err != nil {
		return e, err
	}
	at, err := timeOf(r.Header, HeaderPushTime, now)
	if errors.Is(err, errFuture) && id.spool != "" {
		// Refused, what waited in a spool would be lost for a clock that is wrong.
		at, err = &now, nil
	}
	if err != nil {
		return e, err
	}
	if at != nil {
		e.at, e.dated = *at, true
	}
	if e.failed, err = timeOf(r.Header, HeaderFailureTime, now); err != nil {
		return e, err
	}
	e.unless, err = timeOf(r.Header, HeaderUnlessPushedSince, now)
	return e, err
}

// received sets the time of a push that doesn't tell its own: when all of it has
// come.
func (g *Gateway) received(e *edit) {
	if !e.dated {
		e.at = g.store.config.Now()
	}
}

// refuseOwn refuses families that are, or may become, the server's own.
func (g *Gateway) refuseOwn(e *edit) {
	for _, p := range e.pushed.families {
		if strings.HasPrefix(p.name(), g.config.Own.prefix) {
			e.reasons = append(e.reasons, fmt.Sprintf("metric %q: names that start with %q are the server's own", p.name(), g.config.Own.prefix))
		}
	}
}

// ServeMetrics answers a scrape: the groups and the server's own metrics, or one
// of them with ?only=groups or ?only=self. It is a function for the reason that Since is one.
func ServeMetrics(g *Gateway, w http.ResponseWriter, r *http.Request) {
	var own []*dto.MetricFamily
	at := &moment{heads: map[string]*head{}}
	only := r.URL.Query().Get("only")
	switch only {
	case "", "groups", "self":
	default:
		http.Error(w, fmt.Sprintf("only=%q: write only=groups or only=self, or leave it away for both", only), http.StatusBadRequest)
		return
	}
	if only != "groups" {
		var err error
		if own, err = g.config.Own.gather(); err != nil {
			g.store.config.Logger.Error("The server's own metrics are not complete", "err", err)
		}
	}
	switch err := g.store.isLoaded(); {
	case err == nil && only != "self":
		at = g.store.moment()
	case err != nil && only == "groups":
		// Without them all their series would seem to be gone.
		w.Header().Set("Retry-After", strconv.Itoa(retryAfter))
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	expose(w, r, at, own, g.kept, g.store.config.Logger)
}

// ServeOwn answers a scrape where there is no store: with the server's own metrics.
func ServeOwn(w http.ResponseWriter, r *http.Request, own *Own, logger *slog.Logger) {
	families, err := own.gather()
	if err != nil {
		logger.Error("The server's own metrics are not complete", "err", err)
	}
	expose(w, r, &moment{heads: map[string]*head{}}, families, newExpositions(standardGzip, func() {}), logger)
}
