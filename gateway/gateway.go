// Package gateway is a push store with the Pushgateway's HTTP API: batch jobs
// push their metrics, Prometheus scrapes them. A push costs what its own size
// costs, is on disk before it is acknowledged, can expire, and can tell that the
// next one is overdue.
package gateway

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
)

// Header fields of a push, and the query parameters of the same meaning.
const (
	HeaderTTL      = "Culvert-TTL"      // ?ttl=
	HeaderInterval = "Culvert-Interval" // ?interval=
)

// Config tunes a Gateway. Zero values mean the defaults.
type Config struct {
	// MaxBodySize bounds the body of a push in bytes, as sent and decompressed. 64
	// MiB by default.
	MaxBodySize int64
	// MaxSeriesPerGroup bounds the series of one push, 0: no bound.
	MaxSeriesPerGroup int
	// Own are the server's own metrics, served beside the groups.
	Own prometheus.Gatherer
}

// Gateway is the HTTP side of a store.
type Gateway struct {
	config Config
	store  *Store
}

// New returns a gateway to the store.
func New(config Config, store *Store) *Gateway {
	if config.MaxBodySize == 0 {
		config.MaxBodySize = 64 << 20
	}
	if config.Own == nil {
		config.Own = prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) { return nil, nil })
	}
	return &Gateway{config: config, store: store}
}

// badRequest is a mistake of the client.
type badRequest struct{ err error }

func (e badRequest) Error() string { return e.err.Error() }
func (e badRequest) Unwrap() error { return e.err }

// ErrTooManySeries is returned for a push with more than Config.MaxSeriesPerGroup.
var ErrTooManySeries = errors.New("too many series")

// ServePush answers PUT, POST and DELETE of a group. rest is what follows
// /metrics/job in the path, percent-decoded.
func (g *Gateway) ServePush(w http.ResponseWriter, r *http.Request, rest string) {
	var err error
	switch r.Method {
	case http.MethodPut, http.MethodPost:
		err = g.push(r, rest)
	case http.MethodDelete:
		if err = g.delete(r, rest); err == nil {
			w.WriteHeader(http.StatusAccepted)
		}
	default:
		w.Header().Set("Allow", "DELETE, OPTIONS, POST, PUT")
		if r.Method != http.MethodOptions {
			http.Error(w, "use PUT, POST or DELETE", http.StatusMethodNotAllowed)
		}
		return
	}
	if err != nil {
		status := statusOf(err)
		if status == http.StatusServiceUnavailable {
			w.Header().Set("Retry-After", "5")
		}
		http.Error(w, err.Error(), status)
	}
}

// statusOf maps the errors of this package to HTTP.
func statusOf(err error) int {
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok || errors.Is(err, ErrBodyTooLarge) || errors.Is(err, ErrTooManySeries) {
		return http.StatusRequestEntityTooLarge
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

func (g *Gateway) push(r *http.Request, rest string) error {
	key, err := ParsePath(rest)
	if err != nil {
		return badRequest{err}
	}
	c := &change{key: key, replace: r.Method == http.MethodPut}
	if c.ttl, err = durationOf(r, "ttl", HeaderTTL); err != nil {
		return badRequest{err}
	}
	if c.interval, err = durationOf(r, "interval", HeaderInterval); err != nil {
		return badRequest{err}
	}
	body, done, err := readBody(r, g.config.MaxBodySize)
	if err != nil {
		return badRequest{err}
	}
	defer done()
	families, err := parseBody(r.Header.Get("Content-Type"), body)
	if errors.Is(err, ErrBodyTooLarge) {
		return fmt.Errorf("%w: at most %d bytes are allowed, decompressed too (--push.max-body-size)", ErrBodyTooLarge, g.config.MaxBodySize)
	}
	if err != nil {
		return badRequest{fmt.Errorf("the body of the push to %s: %w", key, err)}
	}
	n := 0
	for _, f := range families {
		n += len(f.Metric)
	}
	if limit := g.config.MaxSeriesPerGroup; limit > 0 && n > limit {
		return fmt.Errorf("%w: the push to %s has %d, at most %d are allowed (--push.max-series-per-group)", ErrTooManySeries, key, n, limit)
	}
	c.pushed, c.reasons = prepare(key, families, g.store.config.Now().UnixNano())
	return g.store.do(r.Context(), c)
}

func (g *Gateway) delete(r *http.Request, rest string) error {
	key, err := ParsePath(rest)
	if err != nil {
		return badRequest{err}
	}
	return g.store.do(r.Context(), &change{key: key, delete: true})
}

// durationOf reads a duration from the query, else from the header; nil where
// neither is there.
func durationOf(r *http.Request, parameter, header string) (*time.Duration, error) {
	text := r.URL.Query().Get(parameter)
	if text == "" {
		text = r.Header.Get(header)
	}
	if text == "" {
		return nil, nil
	}
	d, err := model.ParseDuration(strings.TrimSpace(text))
	if err != nil {
		return nil, fmt.Errorf("%s=%q is not a duration; write it as in 30m, 24h or 7d, or 0 for none", parameter, text)
	}
	v := time.Duration(d)
	return &v, nil
}

// ServeMetrics answers a scrape: the groups and the server's own metrics, or one
// of them with ?only=groups or ?only=self.
func (g *Gateway) ServeMetrics(w http.ResponseWriter, r *http.Request) {
	only := r.URL.Query().Get("only")
	var own []*dto.MetricFamily
	if only != "groups" {
		var err error
		if own, err = g.config.Own.Gather(); err != nil {
			g.store.config.Logger.Error("The server's own metrics are not complete", "err", err)
		}
	}
	g.store.Expose(w, r, own)
}
