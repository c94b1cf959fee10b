package gateway

import (
	"bufio"
	"encoding/json"
	"net/http"
	"slices"
	"sort"
	"strconv"
	"time"

	dto "github.com/prometheus/client_model/go"
)

// The objects of the Pushgateway's query API, version 1.

type apiFamily struct {
	Time   time.Time   `json:"time_stamp"`
	Type   string      `json:"type"`
	Help   string      `json:"help,omitempty"`
	Series []apiSeries `json:"metrics"`
}

// apiSeries is one series. All numbers are strings.
type apiSeries struct {
	Labels map[string]string `json:"labels"`
	Value  string            `json:"value,omitempty"`
	// Quantiles is a map, which is there for summaries, empty or not.
	Quantiles any `json:"quantiles,omitempty"`
	// Buckets is a map from upper bounds to cumulative counts; for native histograms
	// a list of [kind, lower, upper, count].
	Buckets any    `json:"buckets,omitempty"`
	Count   string `json:"count,omitempty"`
	Sum     string `json:"sum,omitempty"`
}

// ServeQuery answers GET /api/v1/metrics: all groups with their series. They are
// written one by one: as Go values all of them would take many times the store.
func (g *Gateway) ServeQuery(w http.ResponseWriter, r *http.Request) {
	SetAPIHeaders(w.Header())
	if err := g.store.isLoaded(); err != nil {
		w.Header().Set("Retry-After", strconv.Itoa(retryAfter))
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	out := bufio.NewWriterSize(w, 64<<10)
	out.WriteString(`{"status":"success","data":[`)
	groups, _ := g.store.snapshot()
	for i, grp := range groups {
		group, err := apiGroup(grp)
		var text []byte
		if err == nil {
			text, err = json.Marshal(group)
		}
		if err != nil {
			// The status is out: what is written must not pass for the whole.
			g.store.config.Logger.Error("A group can't be read", "group", grp.key, "err", err)
			panic(http.ErrAbortHandler)
		}
		if i > 0 {
			out.WriteByte(',')
		}
		if _, err := out.Write(text); err != nil {
			return // the reader went away
		}
	}
	out.WriteString("]}")
	out.Flush()
}

// WriteAPI writes data in the envelope of the Pushgateway's API, with its headers.
func WriteAPI(w http.ResponseWriter, data any) {
	text, err := json.Marshal(struct {
		Status string `json:"status"`
		Data   any    `json:"data"`
	}{"success", data})
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	SetAPIHeaders(w.Header())
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(text) // an error now is the reader's going away
}

// SetAPIHeaders sets the CORS and cache headers of the Pushgateway's API.
func SetAPIHeaders(h http.Header) {
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Access-Control-Allow-Methods", "GET, POST, DELETE, OPTIONS")
	h.Set("Access-Control-Allow-Headers", "Accept, Authorization, Content-Type, Origin")
	h.Set("Access-Control-Expose-Headers", "Date")
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
}

// snapshot returns copies of all groups, sorted by ID, and by their slots when they last
// changed.
func (s *Store) snapshot() (groups []group, changed []uint64) {
	s.mu.RLock()
	groups, changed = make([]group, 0, len(s.groups)), slices.Clone(s.changed)
	for _, g := range s.groups {
		groups = append(groups, *g)
	}
	s.mu.RUnlock()
	sort.Slice(groups, func(i, j int) bool { return groups[i].id < groups[j].id })
	return groups, changed
}

func apiGroup(g group) (map[string]any, error) {
	out := map[string]any{}
	for _, b := range g.image.blocks() {
		f, err := b.decode()
		if err != nil {
			return nil, err
		}
		at := b.pushed
		if isGenerated(f.GetName()) {
			at = max(g.pushed, g.failed)
		}
		family := apiFamily{Time: time.Unix(0, at), Type: f.GetType().String(), Help: f.GetHelp(), Series: make([]apiSeries, len(f.Metric))}
		for i, m := range f.Metric {
			family.Series[i] = newAPISeries(m)
		}
		out[f.GetName()] = family
	}
	// After the metrics: one of these names must not hide them.
	out["labels"] = g.key.Map()
	out["last_push_successful"] = g.failed <= g.pushed
	return out, nil
}

func newAPISeries(m *dto.Metric) apiSeries {
	s := apiSeries{Labels: make(map[string]string, len(m.Label))}
	for _, l := range m.Label {
		s.Labels[l.GetName()] = l.GetValue()
	}
	switch {
	case m.Counter != nil:
		s.Value = number(m.Counter.GetValue())
	case m.Gauge != nil:
		s.Value = number(m.Gauge.GetValue())
	case m.Untyped != nil:
		s.Value = number(m.Untyped.GetValue())
	case m.Summary != nil:
		quantiles := map[string]string{}
		s.Quantiles = quantiles
		for _, q := range m.Summary.Quantile {
			quantiles[number(q.GetQuantile())] = number(q.GetValue())
		}
		s.Count, s.Sum = strconv.FormatUint(m.Summary.GetSampleCount(), 10), number(m.Summary.GetSampleSum())
	case m.Histogram != nil:
		h := m.Histogram
		s.Sum = number(h.GetSampleSum())
		s.Count = strconv.FormatUint(h.GetSampleCount(), 10)
		isFloat := h.GetSampleCountFloat() > 0
		if isFloat {
			s.Count = number(h.GetSampleCountFloat())
		}
		if len(h.PositiveSpan) > 0 || len(h.NegativeSpan) > 0 {
			s.Buckets = listBuckets(h)
			break
		}
		buckets := make(map[string]string, len(h.Bucket))
		for _, b := range h.Bucket {
			count := strconv.FormatUint(b.GetCumulativeCount(), 10)
			if b.CumulativeCountFloat != nil {
				count = number(b.GetCumulativeCountFloat())
			}
			buckets[number(b.GetUpperBound())] = count
		}
		s.Buckets = buckets
	}
	return s
}

// listBuckets lists the buckets of a native histogram, ascending, without empty
// ones, as Prometheus's API does: [boundaries, lower, upper, count], where
// boundaries is 0 for (], 1 for [), 2 for (), 3 for [].
func listBuckets(h *dto.Histogram) [][4]any {
	buckets := [][4]any{}
	for _, b := range nativeOf(h).intervals() {
		boundaries := 3
		switch {
		case !b.closedUpper:
			boundaries = 1
		case !b.closedLower:
			boundaries = 0
		}
		buckets = append(buckets, [4]any{boundaries, number(b.lower), number(b.upper), number(b.count)})
	}
	return buckets
}

// number formats as the text format does; minus zero is "-0".
func number(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }
